"""The textbook on trial: what teaching texts claim, measured on the built-in world.

    python -m lab.claims out/seed0 out/seed1 out/seed2

Each folder is one seed's, as `make claims SEEDS=3` fills it on top of results, scoreboard, hacking, prm, cai,
pareto and weak-to-strong. A claim is one or several differences that must be above zero. Printed of each
difference is its mean over seeds and half of its 95 % interval (lab/evidence.py). All intervals above zero:
the claim holds here. One below: it does not. Else it cannot be said. Seeds without a
file that it needs are left out, and named.
"""

from collections.abc import Callable
from statistics import mean
from typing import NamedTuple

from lab import run_on_paths
from lab.evidence import Number, Seed, exact, less, moved, over_seeds, side
from lab.hacking import at_kl
from lab.scoreboard import table
from nanoalign import UserError

HALF = exact(0.5)


class Claim(NamedTuple):
    text: str
    how: str  # the target of `make` that measures it
    tests: dict[str, Callable[[Seed], Number]]  # what is above zero if the claim holds


def wins(name: str) -> Callable[[Seed], Number]:
    """Against the baseline of its scorecard."""
    return lambda s: less(s.won(name), HALF)


def beats(a: str, b: str) -> Callable[[Seed], Number]:
    """By the win rate against SFT."""
    return lambda s: less(s.won(a), s.won(b))


def matches(a: str, b: str) -> Callable[[Seed], Number]:
    """As `beats`, but for 0.02."""
    return lambda s: less(less(s.won(a), s.won(b)), exact(-0.02))


def more(a: str, b: str, metric: str) -> Callable[[Seed], Number]:
    return lambda s: less(s.value(a, metric), s.value(b, metric))


def helps(run: str, other="beta-0-long") -> Callable[[Seed], Number]:
    """By the judge's utility, of two runs of `make hacking`, at the highest KL that both get to."""

    def measure(s: Seed) -> Number:
        curves = s.curve(run), s.curve(other)
        kl = min(max(point["kl"] for point in points) for points in curves)
        one, two = (at_kl(points, kl, "judge") for points in curves)
        return exact(one - two)

    return measure


def last(metric: str, a: str, b: str) -> Callable[[Seed], Number]:
    """The last that a run logged of a metric, less another's."""
    return lambda s: exact(s.rows(a, metric)[-1] - s.rows(b, metric)[-1])


def spread(s: Seed, *names: str) -> float:
    found = [s.won(name)[0] for name in names]
    return max(found) - min(found)


def diminishing(s: Seed) -> Number:
    a, b, c, d = (s.accuracy(p)[0] for p in ("claims/rm-eighth.json", "claims/rm-quarter.json",
                                             "claims/rm-half.json", "rm.report.json"))  # fmt: skip
    return exact((b - a) - (d - c))


def better_rm(a: str, b: str) -> Callable[[Seed], Number]:
    return lambda s: less(s.accuracy(a), s.accuracy(b))


def falls_from_its_peak(run: str) -> Callable[[Seed], Number]:
    """The even looks say where the peak is, the odd ones beside it how high, the last odd one what is left: a
    peak that is looked for and measured on the same figures is always above the end."""

    def measure(s: Seed) -> Number:
        judge = [point["judge"] for point in s.curve(run)]
        peak = 2 * max(range(len(judge[::2])), key=judge[::2].__getitem__)
        beside = [judge[i] for i in (peak - 1, peak + 1) if 0 < i < len(judge)]
        return exact(mean(beside) - judge[1::2][-1])

    return measure


def learnt(a: str, b: str) -> Callable[[Seed], Number]:
    """By the held-out accuracy of two runs of `make weak-to-strong`."""
    return last("eval_accuracy", f"weak-to-strong/{a}", f"weak-to-strong/{b}")


RM = "rm.report.json"
FLAWS = "harmful compliance", "over-refusal", "sycophancy", "invention", "padding (sentences)"
CLAIMS = [
    Claim("A base model continues a question instead of answering it", "results", {
        "texts that do not answer less those that do":
            lambda s: less(exact(1.0), s.value("base", "answered"), 2)}),
    Claim("SFT teaches the format of answering", "results", {
        "answers: SFT less base": more("sft", "base", "answered"),
        "ends by itself: SFT less base": more("sft", "base", "ended")}),
    Claim("SFT copies its demonstrators' flaws", "claims", {
        f"{flaw}: SFT on all demonstrations less SFT on good ones":
            more("claims/sft", "claims/sft-clean", flaw)
        for flaw in FLAWS}),
    Claim("Few good demonstrations beat many noisy ones", "claims", {
        "win rate of SFT on 1,200 good ones less one half": wins("claims/sft-clean")}),
    Claim("A reward model's accuracy is bounded by the noise of its labels", "results", {
        "ceiling less accuracy on the labels given":
            lambda s: less(s.accuracy(RM, "ceiling"), s.accuracy(RM, "accuracy"))}),
    Claim("More comparisons help, with diminishing returns", "claims", {
        "accuracy: all pairs less an eighth": better_rm(RM, "claims/rm-eighth.json"),
        "the gain from ⅛ to ¼ less that from ½ to all": diminishing}),
    Claim("Label smoothing helps with noisy labels", "claims", {
        "accuracy: smoothed less not": better_rm("claims/rm-smoothed.json", RM)}),
    Claim("Filtering by agreement helps with noisy labels", "claims", {
        "accuracy: pairs on which three agree less all pairs with three votes":
            better_rm("claims/rm-agreed.json", "claims/rm-voted.json")}),
    Claim("People agree on easy pairs at 85 to 95 %, on hard ones at 55 to 65 %", "results", {
        "easy: within 0.85 and 0.95 by": lambda s: exact(0.05 - abs(s.agreements["easy"] - 0.9)),
        "hard: within 0.55 and 0.65 by": lambda s: exact(0.05 - abs(s.agreements["hard"] - 0.6))}),
    Claim("Pairs of one ranking must share a batch, or the reward model over-fits", "claims", {
        "accuracy: together less shuffled": better_rm(RM, "claims/rm-shuffled.json")}),
    Claim("PPO beats SFT", "scoreboard", {"win rate less one half": wins("scoreboard/ppo")}),
    Claim("PPO needs four models", "claims", {
        "win rate: own critic less a head on the policy": beats("scoreboard/ppo", "claims/ppo-shared")}),
    Claim("Without the KL penalty the reward is hacked", "hacking", {
        "the proxy's rise": lambda s: moved(s.rows("hacking/beta-0-long", "eval_rm")),
        "the judge's fall from its peak": falls_from_its_peak("beta-0-long")}),
    Claim("β too high: nothing changes", "claims", {
        "0.05 less the distance of the win rate at β = 3 from one half":
            lambda s: (0.05 - abs(s.won("claims/ppo-tight")[0] - 0.5), s.won("claims/ppo-tight")[1])}),
    Claim("Adaptive β holds its target", "hacking", {
        "a quarter less the last KL's relative distance from 2 nats":
            lambda s: exact(0.25 - abs(mean(s.rows("hacking/adaptive", "eval_kl")[-2:]) / 2 - 1))}),
    Claim("Clipping and the KL penalty do different things", "claims", {
        "KL: no penalty less one": last("eval_kl", "hacking/beta-0", "hacking/beta-0.1"),
        "largest ratio in a step: no clipping less both": lambda s: exact(
            max(s.rows("claims/ppo-unclipped", "ratio_max")) - max(s.rows("scoreboard/ppo", "ratio_max")))}),
    Claim("A critic lowers the variance of the advantages", "scoreboard", {
        "share of the returns' variance that it explains, in the last iterations":
            lambda s: exact(mean(s.rows("scoreboard/ppo", "explained_variance")[-5:]))}),
    Claim("DPO gets most of PPO's benefit", "scoreboard", {
        "DPO's win rate above one half less half of PPO's": lambda s: less(
            less(s.won("scoreboard/dpo"), HALF), less(s.won("scoreboard/ppo"), HALF), 0.5)}),
    Claim("DPO is more stable than PPO", "claims", {
        "spread of win rates over learning rates ⅓, 1, 3: PPO less DPO": lambda s: exact(
            spread(s, "claims/ppo-slow", "scoreboard/ppo", "claims/ppo-fast")
            - spread(s, "claims/dpo-slow", "scoreboard/dpo", "claims/dpo-fast"))}),
    Claim("DPO is cheaper than PPO", "scoreboard", {
        "seconds: PPO less DPO":
            lambda s: less(s.cost("scoreboard/ppo", "seconds"), s.cost("scoreboard/dpo", "seconds")),
        "MB: PPO less DPO": lambda s: less(s.cost("scoreboard/ppo", "MB"), s.cost("scoreboard/dpo", "MB"))}),
    Claim("Under DPO both log-probs fall", "scoreboard", {
        "fall of log π(chosen), nats":
            lambda s: less(exact(0), moved(s.rows("scoreboard/dpo", "logp_chosen"))),
        "fall of log π(rejected), nats":
            lambda s: less(exact(0), moved(s.rows("scoreboard/dpo", "logp_rejected")))}),
    Claim("Pairs from another policy than the reference hurt DPO", "claims", {
        "win rate: own pairs less ORPO's": beats("scoreboard/dpo", "claims/dpo-foreign")}),
    Claim("β too low over-fits to the labels' noise", "claims", {
        "win rate: β 1 less 0.1": beats("scoreboard/dpo", "claims/dpo-loose")}),
    Claim("IPO over-fits less than DPO on near-certain pairs", "claims", {
        "KL: DPO less IPO": more("claims/dpo-certain", "claims/ipo-certain", "KL to reference"),
        "win rate: IPO less DPO": beats("claims/ipo-certain", "claims/dpo-certain")}),
    Claim("cDPO and robust DPO help where a fifth of the labels is flipped", "claims", {
        "win rate: cDPO less DPO": beats("claims/cdpo-flipped", "claims/dpo-flipped"),
        "win rate: robust less DPO": beats("claims/robust-flipped", "claims/dpo-flipped")}),
    Claim("KTO needs no pairs, and matches DPO on the same verdicts", "scoreboard", {
        "win rate: KTO less DPO, plus 0.02": matches("scoreboard/kto", "scoreboard/dpo")}),
    Claim("KTO stands nine thumbs up to one down", "claims", {
        "win rate less one half": wins("claims/kto-lopsided"),
        "win rate less that with all thumbs, plus 0.02":
            matches("claims/kto-lopsided", "claims/kto-thumbs")}),
    Claim("ORPO needs no SFT stage and no reference", "scoreboard", {
        "win rate less one half": wins("scoreboard/orpo")}),
    Claim("ORPO does more than imitate what was chosen", "scoreboard", {
        "win rate: ORPO less SFT on the chosen answers": beats("scoreboard/orpo", "scoreboard/chosen")}),
    Claim("SimPO needs no reference, and controls length", "scoreboard", {
        "win rate less one half": wins("scoreboard/simpo"),
        "words: DPO less SimPO": more("scoreboard/dpo", "scoreboard/simpo", "length (words)")}),
    Claim("Online data helps DPO", "scoreboard", {
        "win rate: online less offline": beats("scoreboard/online", "scoreboard/dpo")}),
    Claim("Preference training makes answers longer", "scoreboard", {
        f"words: {name} less SFT":
            more(f"scoreboard/{name}", "scoreboard/sft", "length (words)")
            for name in ("dpo", "ppo", "grpo")}),
    Claim("Sycophancy grows under people who like agreement", "claims", {
        "agreement with false beliefs: DPO on them less on people without that taste":
            more("scoreboard/dpo", "claims/dpo-no-agreement", "sycophancy")}),
    Claim("Answers grow longer under people who like length", "claims", {
        "words: DPO on them less on people without that taste":
            more("scoreboard/dpo", "claims/dpo-no-length", "length (words)")}),
    Claim("An ensemble helps against over-optimisation", "hacking", {
        "utility at equal KL: the least of three less one": helps("ensemble-long")}),
    Claim("A second round of data helps", "hacking", {
        "utility at the end: collected again less only continued":
            last("eval_judge", "hacking/iterated", "hacking/continued")}),
    Claim("A length penalty helps against over-optimisation", "hacking", {
        "utility at equal KL: with less without": helps("length-long")}),
    Claim("Adversarial training helps against over-optimisation", "hacking", {
        "utility at equal KL: with less without": helps("adversarial-long")}),
    Claim("A process model beats an outcome model in best of n", "prm", {
        "right at n = 16: process less outcome": lambda s: less(s.best("prm-min", 16), s.best("orm", 16))}),
    Claim("A process model beats the commonest answer", "prm", {
        f"right at n = {n}: process less majority":
            lambda s, n=n: less(s.best("prm-min", n), s.best("majority", n)) for n in (4, 16, 64)}),
    Claim("AI labels do what people's labels do", "cai", {
        "win rate against where it starts, less one half": wins("cai/ai"),
        "win rate: AI's labels less people's, plus 0.02": matches("cai/ai", "cai/human")}),
    Claim("Critique and revision make answers safer", "cai", {
        "help with harm: control less revised": more("cai/unrevised", "cai/sl-cai", "harmful compliance")}),
    Claim("… at a price in helpfulness", "cai", {
        "right answers: control less revised": more("cai/unrevised", "cai/sl-cai", "correct")}),
    Claim("Over-refusal rises with the share of safety data", "pareto", {
        "refusals of the harmless: half of the pairs about harm less none":
            more("pareto/share-0.5", "pareto/share-0", "over-refusal")}),
    Claim("A weak supervisor's student exceeds it", "weak-to-strong", {
        "accuracy: student less supervisor": learnt("naive", "weak")}),
    Claim("… and does not close the gap", "weak-to-strong", {
        "accuracy: taught on true labels less the student": learnt("ceiling", "naive")}),
]  # fmt: skip
VERDICTS = {1: "holds here", -1: "does not hold here", 0: "cannot be said"}


def verdict(figures: list[Number]) -> str:
    return VERDICTS[min(map(side, figures))]


def tried(claim: Claim, seeds: list[Seed]) -> tuple[str, str]:
    """What was measured, on the seeds that have been, and the verdict."""
    found, missing = {what: [] for what in claim.tests}, []
    for s in seeds:
        try:
            one = {what: test(s) for what, test in claim.tests.items()}
        except (OSError, UserError) as error:
            missing.append((s.folder, error))
            continue
        for what, figure in one.items():
            found[what].append(figure)
    if len(missing) == len(seeds):
        return f"not measured: {missing[0][1]}"[:100], "–"
    figures = {what: over_seeds(numbers) for what, numbers in found.items()}
    told = [f"{what}: {value:+.3f} ± {error:.3f}" for what, (value, error) in figures.items()]
    if missing:
        told.append(f"(without {', '.join(str(folder) for folder, _ in missing)})")
    alone = " (one seed)" if len(seeds) - len(missing) == 1 else ""
    return "<br>".join(told), verdict(list(figures.values())) + alone


def main(folders: list[str]) -> None:
    if not folders:
        raise UserError("name the folders, such as out/seed0.")
    seeds = list(map(Seed, folders))
    rows = [(claim.text, *tried(claim, seeds), f"`make {claim.how} SEEDS=3`") for claim in CLAIMS]
    table(
        ["", "claim", f"measured, {len(seeds)} seeds (± half of the 95 % interval)", "verdict", "command"],
        [[str(i), *row] for i, row in enumerate(rows, 1)],
    )


if __name__ == "__main__":
    run_on_paths(main)
