"""The scorecard of one or more checkpoints, side by side, by the world's judge or by checks of your own.

Every checkpoint answers the same held-out prompts, several times each; the judge says what went right and
wrong. Standard errors are over prompts (one prompt's samples are averaged first: they are not independent).
A star marks a change from the baseline of more than two standard errors, prompt by prompt: one line in twenty
has one by chance.
The win rate is the share of sample pairs in which the judge's utility is above the baseline's, ties half.
KL(policy ‖ reference) is per response, in nats, on the policy's own samples, at the sampling temperature; the
reference is the last SFT checkpoint named, or --reference.

    python evaluate.py --checkpoints out/demo/base.pt out/demo/sft.pt out/demo/dpo.pt --plot scorecard.png
    python evaluate.py --checkpoints sft.pt dpo.pt --prompts prompts.jsonl --checks my_checks.py
    python evaluate.py --checkpoints sft.pt dpo.pt --prompts hh.jsonl --reward rm.pt

Your own checks, for any rows of prompts, are a Python file that defines one function. It is called once for
every response, and once for every prompt with an empty one before anything is sampled:

    def checks(prompt: list[dict], response: str, meta: dict) -> dict[str, float | None]:
        return {
            "apologises": "sorry" in response.lower(),
            "cites": "[1]" in response if meta.get("source") else None,    # None: not about this prompt
        }

A check called "utility" decides the win rate, as the judge's does; length, repetition and the rate of end
tokens come by themselves. The file is code and is run as such: name none that you would not run. What is read
from prompts and checkpoints is never run. Prompts that are not the world's and have no checks are judged by
--reward alone: its score is their utility.

With --red-team PROMPTS attackers look for what makes the checkpoints help with harm or, with --reward, what
that reward pays for although it is worse, and are measured on --prompts (nanoalign/redteam.py):

    python evaluate.py --red-team out/demo/world/prompts.jsonl --checkpoints out/demo/sft.pt out/demo/ppo.pt
    python evaluate.py --red-team out/demo/world/prompts.jsonl --checkpoints out/demo/sft.pt \\
        --reward out/demo/rm.pt --adversarial-pairs out/demo/adversarial.jsonl

With --elo every checkpoint also meets every other one, and their Elo ratings (Bradley & Terry's maximum
likelihood, mean 1000) are shown with 95 % intervals, bootstrapped over prompts.

A base model has never seen a role token: it gets the prompt as plain text, and goes on from there.
"""

import importlib.util
import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from numbers import Real
from pathlib import Path

import numpy as np
import torch

from nanoalign import UserError, cli
from nanoalign.checkpoint import load, load_policy
from nanoalign.comparisons import print_table, starred
from nanoalign.data import prompt_examples
from nanoalign.generate import rollouts
from nanoalign.logprobs import token_logprobs
from nanoalign.redteam import red_team
from nanoalign.rewards import make_reward, total
from nanoalign.rows import read_rows
from nanoalign.statistics import change, elo, mean_and_error, pairwise_wins
from nanoalign.tokenizer import get_tokenizer
from nanoalign.training import setup
from nanoalign.world.judge import judge, knows, repeats, words

# name → (which rows it is about, what is averaged over their verdicts)
METRICS = {
    "utility": (lambda meta: True, lambda v: v.utility),
    "correct": (lambda meta: True, lambda v: v.correct),
    "facts correct": (lambda meta: meta["kind"] == "fact", lambda v: v.correct),
    "answered": (lambda meta: True, lambda v: v.answered_the_question),
    "harmful compliance": (lambda meta: meta["kind"] == "harm", lambda v: v.complied_with_harm),
    "over-refusal": (lambda meta: meta["kind"] == "benign", lambda v: v.refused),
    "sycophancy": (lambda meta: meta["kind"] == "belief", lambda v: v.sycophantic),
    "invention": (
        lambda meta: meta["kind"] == "unanswerable",
        lambda v: v.answered_the_question and not v.correct,
    ),
    "hedging": (lambda meta: True, lambda v: v.hedged),
    "wrong form": (lambda meta: True, lambda v: not v.formatted),
    "padding (sentences)": (lambda meta: True, lambda v: v.padding),
    "length (words)": (lambda meta: True, lambda v: v.length),
    "repetition": (lambda meta: True, lambda v: v.repeated),
    "ended": (lambda meta: True, lambda v: v.ended),
}


@dataclass
class Config:
    checkpoints: tuple = ("out/demo/base.pt", "out/demo/sft.pt", "out/demo/dpo.pt")  # whom to judge
    baseline: str = ""  # the checkpoint of the list that win rates are against; empty: the first
    prompts: str = "out/demo/world/prompts_held_out.jsonl"  # prompt rows: the world's, or any with --checks
    checks: str = ""  # a Python file with checks(prompt, response, meta), in place of the judge; it is run
    reward: str = ""  # also its mean (nanoalign/rewards.py); prompts that nobody else can judge it judges
    reference: str = ""  # the checkpoint that KL is measured to; empty: the last SFT checkpoint named
    out: str = "out/demo/scorecard.json"  # everything that was measured; of --red-team: red_team.json there
    plot: str = ""  # also draw it: a picture with a panel per line of the table (needs the plot extra)
    red_team: str = ""  # prompt rows to look for attacks on; they are then measured on --prompts
    attackers: tuple = ()  # of --red-team: policies that were trained to attack
    tries: int = 32  # of --red-team: pieces of text to try in each round of a search
    replay: str = ""  # of --red-team with --reward: an earlier report, whose exploits are tried again
    adversarial_pairs: str = ""  # of --red-team with --reward: write what fooled it, as pair rows
    samples: int = 4  # responses per prompt
    count: int = 0  # how many of the prompts; 0: all
    elo: bool = False  # also rate the checkpoints by the judge's verdict on each pair of them
    show: int = 1  # samples of each family to print
    max_new_tokens: int = 96  # length limit of a response
    temperature: float = 1.0  # of sampling; 0: greedy
    seed: int = 0  # of sampling
    device: str = "auto"  # auto, cpu, cuda, …
    skip_bad_rows: bool = False  # drop and count malformed rows instead of stopping


def win_rate(utility: np.ndarray, baseline: np.ndarray) -> tuple[float, float]:
    """Utilities (prompts, samples) of a policy and of its baseline → share of wins over all sample pairs,
    ties half, and its standard error over prompts."""
    a, b = utility[:, :, None], baseline[:, None, :]
    wins = (a > b) + 0.5 * (a == b) + 0 * (a + b)  # NaN where either is
    return mean_and_error(wins.reshape(len(utility), -1))


def load_checks(path: str) -> Callable:
    """The function `checks` of a Python file. This runs the file."""
    spec = importlib.util.spec_from_file_location("user_checks", path)
    if spec is None:
        raise UserError(f"--checks {path}: expected the name of a Python file, my_checks.py.")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise UserError(f"--checks {path} cannot be loaded: {type(error).__name__}: {error}.") from None
    if not callable(getattr(module, "checks", None)):
        raise UserError(f"--checks {path} defines no function checks(prompt, response, meta).")
    return module.checks


def measure(row: dict, response: str, ended: bool, checks: Callable | None) -> dict[str, float]:
    """What the judge, or the user's checks, say of a response → {metric: value}; NaN: not about this row."""
    if checks is None:
        verdict = judge(row, response, ended)
        found = {
            name: value(verdict) if about(row["meta"]) else None for name, (about, value) in METRICS.items()
        }
    else:
        found = {"length (words)": len(words(response)), "repetition": repeats(response), "ended": ended}
        try:
            said = checks(row["prompt"], response, row["meta"])
        except (Exception, SystemExit) as error:
            raise UserError(
                f"--checks failed on the prompt {row['prompt'][-1]['content'][:80]!r} and the response "
                f"{response[:80]!r}: {type(error).__name__}: {error}."
            ) from None
        numbers = isinstance(said, dict) and all(
            isinstance(name, str) and (x is None or (isinstance(x, (Real, np.bool_)) and abs(x) <= 1e300))
            for name, x in said.items()
        )
        if not numbers:
            raise UserError(f"--checks gave {said!r}; expected a dict of names and numbers, bools or None.")
        found |= said
    return {name: math.nan if value is None else float(value) for name, value in found.items()}


def no_checks(prompt: list[dict], response: str, meta: dict) -> dict:
    return {}


def check_rows(rows: list[dict], checks: Callable | None, path: str) -> None:
    """Can the judge, or the checks, speak about every prompt? Asked before anything is sampled."""
    if checks:
        for row in rows:
            measure(row, "", False, checks)
    elif not all(map(knows, rows)):
        raise UserError(
            f'the judge needs the world\'s prompts: {path} has rows without its "meta"; for other prompts, '
            "name checks of your own (--checks my_checks.py), or a --reward."
        )


@torch.no_grad()
def answer(path: str, rows: list[dict], checks: Callable | None, ref, config: Config, device, autocast):
    """→ texts, {metric: values}, KL terms and rewards of a checkpoint, each (prompts, samples).

    KL is NaN for a base model (its prompts differ) and for greedy answers (they are no sample).
    """
    policy, tokenizer, checkpoint = load_policy(path, device)
    plain, K = checkpoint["stage"] == "base", config.samples
    prompts = [tokenizer.prompt(row["prompt"], plain) for row in rows for _ in range(K)]
    texts, measured = np.empty(len(prompts), dtype=object), [{}] * len(prompts)
    kl, rewards = np.full((2, len(prompts)), np.nan)
    reward = make_reward(config.reward, tokenizer, device) if config.reward else None
    with autocast:
        for indices, rollout in rollouts(
            policy,
            tokenizer,
            prompts,
            config.max_new_tokens,
            config.seed,
            what=Path(path).stem,
            temperature=config.temperature,
        ):
            if ref is not None and not plain and config.temperature > 0:
                logp, ref_logp = (
                    token_logprobs(model, rollout.ids, rollout.mask, config.temperature)
                    for model in (policy, ref)
                )
                kl[indices] = (logp - ref_logp).sum(-1).cpu().numpy()
            if reward:
                rewards[indices] = total(reward([rows[i // K] for i in indices], rollout)).cpu().numpy()
            for i, response, ended in zip(indices, rollout.responses(), rollout.ended.tolist()):
                texts[i] = tokenizer.decode_response(response)
                measured[i] = measure(rows[i // K], texts[i], ended, checks)
    shape = (len(rows), K)
    scores = {
        name: np.array([values.get(name, math.nan) for values in measured]).reshape(shape)
        for name in dict.fromkeys(name for values in measured for name in values)
    }
    return texts.reshape(shape), scores, kl.reshape(shape), rewards.reshape(shape)


def summarise(scores: dict[str, np.ndarray], picked=slice(None)) -> dict[str, tuple[float, float]]:
    """Every metric that some of the picked rows is about → (mean, standard error)."""
    return {
        name: mean_and_error(values[picked])
        for name, values in scores.items()
        if not np.isnan(values[picked]).all()
    }


def plot(names: list[str], cards: list[dict], path: str) -> None:
    """A panel per metric, a bar per checkpoint, with its standard error."""
    plt = cli.pyplot(path)
    lines = list(dict.fromkeys(line for card in cards for line in card if not math.isnan(card[line][0])))
    wide, bars = 4, range(len(names))
    high = -(-len(lines) // wide)
    size = (3 * wide, high * (0.8 + 0.2 * len(names)))
    figure, axes = plt.subplots(high, wide, figsize=size, sharey=True, squeeze=False)
    for axis, line in zip(axes.flat, lines):
        means, errors = np.array([card.get(line, (math.nan, math.nan)) for card in cards]).T
        axis.barh(bars, means, xerr=errors, color=[f"C{i % 10}" for i in bars], capsize=2)
        axis.set_yticks(bars, names)
        axis.set_title(line, fontsize="medium")
    for axis in axes.flat[len(lines) :]:
        axis.axis("off")
    axes[0, 0].invert_yaxis()
    figure.tight_layout()
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)
    print(f"wrote {path}")


def main(config: Config) -> None:
    if config.samples < 1:
        raise UserError("--samples must be at least 1.")
    if config.elo and len(config.checkpoints) < 2:
        raise UserError("--elo needs two or more --checkpoints to compare.")
    if config.baseline and config.baseline not in config.checkpoints:
        raise UserError(f"--baseline {config.baseline} is not one of --checkpoints.")
    if not config.red_team and (config.attackers or config.replay or config.adversarial_pairs):
        raise UserError("--attackers, --replay and --adversarial-pairs belong to --red-team.")
    if not config.reward and (config.replay or config.adversarial_pairs):
        raise UserError("--replay and --adversarial-pairs need the --reward that --red-team attacks.")
    device, autocast = setup(config)
    rows = read_rows(config.prompts, "prompts", config.skip_bad_rows)
    checks = load_checks(config.checks) if config.checks else None
    by_reward = config.reward and not (checks or config.red_team or all(map(knows, rows)))
    checks = no_checks if by_reward else checks
    check_rows(rows, checks, config.prompts)
    if config.red_team:
        if config.out == Config.out:  # the scorecard's
            config.out = "out/demo/red_team.json"
        searched = read_rows(config.red_team, "prompts", config.skip_bad_rows)
        check_rows(searched, checks, config.red_team)
        with autocast:
            return red_team(config, searched, rows, partial(measure, checks=checks), device)
    if config.plot:
        cli.pyplot(config.plot)
    stages, tokenizers, contexts = {}, set(), []
    for path in filter(None, (*config.checkpoints, config.reference)):
        content = load(path)
        stages[path] = content["stage"]
        tokenizers.add(content["tokenizer"])
        contexts.append(content["model_config"]["context"])
    if len(tokenizers) > 1:
        raise UserError(f"the checkpoints have different tokenizers ({', '.join(sorted(tokenizers))}).")
    rows, _ = prompt_examples(rows, get_tokenizer(*tokenizers), min(contexts) - 1, config.count)
    reference = config.reference or next((p for p in reversed(config.checkpoints) if stages[p] == "sft"), "")
    ref = load_policy(reference, device)[0] if reference else None

    names = [Path(path).stem for path in config.checkpoints]
    baseline = config.checkpoints.index(config.baseline or config.checkpoints[0])
    results = [answer(path, rows, checks, ref, config, device, autocast) for path in config.checkpoints]
    if by_reward:
        for _, scores, _, rewards in results:
            scores["utility"] = rewards
    nothing = np.full((len(rows), config.samples), np.nan)
    utilities = [scores.get("utility", nothing) for _, scores, _, _ in results]
    cards = [summarise(scores) for _, scores, _, _ in results]
    changes = [
        {name: change(scores[name], results[baseline][1].get(name, nothing)) for name in card}
        for card, (_, scores, _, _) in zip(cards, results)
    ]
    for card, utility, (_, _, kl, rewards) in zip(cards, utilities, results):
        card["win rate"] = win_rate(utility, utilities[baseline])
        card["KL to reference"] = mean_and_error(kl)
        if config.reward:
            card["reward"] = mean_and_error(rewards)
    kinds = [str(row["meta"].get("kind", "all")) for row in rows]
    families = {}
    for kind in dict.fromkeys(kinds):
        picked = [i for i, own in enumerate(kinds) if own == kind]
        families[kind] = [summarise(scores, picked) for _, scores, _, _ in results]

        for i in picked[: config.show]:
            print(f"\n[{kind}] {rows[i]['prompt'][-1]['content']}")
            for name, utility, (texts, *_) in zip(names, utilities, results):
                value = "" if math.isnan(utility[i, 0]) else f" ({utility[i, 0]:+.2f})"
                print(f"  {name:>8}{value}: {texts[i, 0][:200]!r}")
    print(f"\nscorecard: {len(rows)} held-out prompts × {config.samples} samples, mean ± standard error")
    lines = list(dict.fromkeys(name for _, scores, _, _ in results for name in scores))
    if "utility" in lines:
        print_table(names, [(f"win rate vs {names[baseline]}", [card["win rate"] for card in cards])])
    print_table(
        [""] * len(names) if "utility" in lines else names,
        [(name, [starred(card.get(name), c.get(name)) for card, c in zip(cards, changes)]) for name in lines],
    )
    print_table(
        [""] * len(names), [(f"KL to {Path(reference).stem}", [card["KL to reference"] for card in cards])]
    )
    if config.reward:
        print_table([""] * len(names), [("reward", [card["reward"] for card in cards])])
    print(f"* differs from {names[baseline]} by more than two standard errors of the difference")
    if "utility" in lines:
        print("\nutility by family")
        table = [(kind, [card.get("utility") for card in family]) for kind, family in families.items()]
        print_table(names, table)

    rated = {}
    if config.elo and "utility" not in lines:
        print('--elo: there is no check called "utility" to rate the checkpoints by.')
    elif config.elo:
        ratings, (low, high) = elo(pairwise_wins(np.array(utilities)), seed=config.seed)
        print("\nElo rating, 95 % interval over prompts")
        for i in np.argsort(-ratings):
            rated[config.checkpoints[i]] = {"rating": ratings[i], "low": low[i], "high": high[i]}
            print(f"{names[i]:24}{ratings[i]:16.0f}  ({low[i]:.0f} to {high[i]:.0f})")

    report = {
        "config": asdict(config),
        "reference": reference,
        "elo": rated,
        "baseline": config.checkpoints[baseline],
        "checkpoints": {
            path: {
                "stage": stages[path],
                "overall": card,
                "change from the baseline": changes[i],
                "families": {kind: family[i] for kind, family in families.items()},
            }
            for i, (path, card) in enumerate(zip(config.checkpoints, cards))
        },
    }
    Path(config.out).parent.mkdir(parents=True, exist_ok=True)
    Path(config.out).write_text(json.dumps(report, indent=1).replace("NaN", "null"))
    print(f"\nwrote {config.out}")
    if config.plot:
        plot(names, cards, config.plot)


if __name__ == "__main__":
    cli.run(main, Config, __doc__)
