"""Known sicknesses of training runs, and what shows them in a run's metrics: one table, `SICKNESSES`.

    python -m lab.doctor out/demo/dpo.metrics.jsonl out/demo/ppo.metrics.jsonl

names those that each run shows, with a likely cause and a remedy. PPO and GRPO ask while they train, too
(--doctor lab/doctor.py:diagnose_rows).

A run is its columns: {"config": {…}, "loss": [a value per logged step], "eval_kl": [one per evaluation], …}.
A condition is asked only where all its columns were logged.

The thresholds are conventions, not laws: each lies well outside what the healthy runs of the demo and of the
scoreboard show, over three seeds. Where a threshold is a KL, it is in units that survive another size
of model: nats per token, or as what β makes of it.
"""

import math
from pathlib import Path

from lab import run_on_paths
from nanoalign import UserError
from nanoalign.cli import readable_rows

LEAST = 8  # logged steps before anything is called a trend


def columns(rows: list[dict]) -> dict:
    """Rows of metrics, in order → the run."""
    run = {"config": {}}
    for row in rows:
        run["config"] |= row.get("config", {})
        for name, value in row.items():
            if isinstance(value, (int, float)):
                run.setdefault(name, []).append(value)
    return run


def read_run(path: str) -> dict:
    """X.metrics.jsonl → the run."""
    if not Path(path).is_file():
        raise UserError(f"{path} does not exist; a run writes its metrics to X.metrics.jsonl, beside X.pt.")
    rows = readable_rows(Path(path))
    if not any("step" in row for row in rows):
        raise UserError(f"{path} has no row of metrics; name the X.metrics.jsonl of a run, not X.pt.")
    return columns(rows)


def early(values: list[float]) -> float:
    """The mean of the first quarter of a column; NaN, which is neither more nor less than anything, where
    there are too few for a trend."""
    count = len(values) // 4
    return sum(values[:count]) / count if len(values) >= LEAST else math.nan


def late(values: list[float]) -> float:
    """The mean of the last quarter."""
    last = values[-max(1, len(values) // 4) :]
    return sum(last) / len(last)


def margins(run: dict) -> list[float]:
    return [chosen - rejected for chosen, rejected in zip(run["reward_chosen"], run["reward_rejected"])]


def stuck(run: dict) -> bool:
    """No implicit reward tells chosen from rejected, all through the second half of the run."""
    half = margins(run)[len(run["reward_chosen"]) // 2 :]
    return len(run["reward_chosen"]) >= LEAST and max(map(abs, half)) < 0.002


def both_fall(run: dict) -> bool:
    """The chosen responses have lost e^(−1/β) of their probability, and the margin grew all the same."""
    margin, chosen = margins(run), run["reward_chosen"]
    trend = len(chosen) >= LEAST
    return trend and late(chosen) - chosen[0] < -1 and late(margin) - margin[0] > 0.1


def negative_kl(run: dict) -> bool:
    """Twice: the error of an iteration of few prompts is itself uncertain."""
    return sum(kl < -3 * error - 1e-3 for kl, error in zip(run["kl"], run["kl_error"])) > 1


def hacked(run: dict) -> bool:
    reward, judge = run["eval_reward"], run["eval_judge"]
    return reward != judge and reward[-1] > reward[0] and max(judge) - judge[-1] > 0.2


# name, the columns it shows in, is it there?, likely cause, what to do
SICKNESSES = (
    (
        "the loss is not a number",
        ("loss", "grad_norm"),
        lambda run: not all(map(math.isfinite, run["loss"] + run["grad_norm"])),
        "an update was too large, or a row is broken",
        "lower --lr, lengthen --warmup, look at the rows of the step before",
    ),
    (
        "the loss does not fall",
        ("loss",),
        lambda run: (
            not run.keys() & {"kl", "reward_chosen", "margin"}  # these have signs of their own
            and late(run["loss"]) > 0.97 * early(run["loss"])
        ),
        "the learning rate is far too small or too large, or the model knew it all before",
        "change --lr by factors of 3; see that the loss of a handful of rows goes to 0",
    ),
    (
        "the loss is stuck at its start (DPO: ln 2)",
        ("reward_chosen", "reward_rejected"),
        stuck,
        "the policy has not left its reference: --lr is next to nothing, the weights are frozen, or policy "
        "and reference are one model; or both sides of the pairs are alike",
        "raise --lr by factors of 3; look at grad_norm, and at a few pairs as the model reads them",
    ),
    (
        "the margin grows while both log-probs fall",
        ("reward_chosen", "reward_rejected"),
        both_fall,
        "the loss sees only their difference, and what both lose goes to responses that nobody wrote",
        "add --sft-weight 1, raise --beta, lower --lr or --epochs; prefer pairs of the policy's own samples",
    ),
    (
        "KL explodes",
        ("eval_kl",),
        lambda run: "kl" not in run and run["config"].get("beta", 0) * run["eval_kl"][-1] > 1,
        "the policy has moved further than the preferences can say: β times its KL is more than 1",
        "raise --beta, lower --lr or --epochs",
    ),
    (
        "the reward model is at chance",
        ("eval_accuracy", "eval_accuracy_error"),
        lambda run: run["eval_accuracy"][-1] < 0.5 + 2 * run["eval_accuracy_error"][-1],
        "its held-out accuracy is within two standard errors of a coin's: labels are noise or swapped, pairs "
        "or held-out pairs are too few, or it has learnt the training pairs by heart",
        "read twenty pairs and label them yourself; collect more; start from the SFT model; fewer --epochs",
    ),
    (
        "the step reward model is at chance",
        ("eval_auc", "eval_ece"),
        lambda run: run["eval_auc"][-1] < 0.55,
        "it ranks right and wrong steps like a coin: labels are noise, too few, or beside their steps",
        "read twenty labelled solutions; collect more; start from a model that can solve some",
    ),
    (
        "KL is negative beyond noise",
        ("kl", "kl_error"),
        negative_kl,
        "sampled and scored log-probs disagree",
        "look at the mask (does it run past the end token?), and at the temperature",
    ),
    (
        "KL stays near 0",
        ("kl",),
        lambda run: len(run["kl"]) >= 10 and abs(late(run["kl"])) < 0.01,
        "the policy does not move: --lr is next to nothing, β outweighs the reward, or no advantage is left",
        "raise --lr by factors of 3, lower --beta; look at the spread of the score within a batch",
    ),
    (
        "KL explodes",
        ("kl", "length"),
        lambda run: len(run["kl"]) >= LEAST and late(run["kl"]) > 0.4 * late(run["length"]),
        "more than 0.4 nats a token: the policy goes where the reward was never taught, and exploits it",
        "raise --beta or set --kl-target, stop earlier (the best held-out judge comes first), lower --lr",
    ),
    (
        "the reward rises while the judge falls",
        ("eval_reward", "eval_judge"),
        hacked,
        "the reward is being hacked: the policy has found what its makers did not mean",
        "stop at the judge's best, raise --beta, take off what it exploits (- 0.02*length), collect again",
    ),
    (
        "the ratio is off 1 at the first minibatch",
        ("ratio_error",),
        lambda run: max(run["ratio_error"]) > 0.03,
        "old and new log-probs come from different paths",
        "look at dtype, temperature and alignment",
    ),
    (
        "the end-token rate collapses",
        ("ended",),
        lambda run: late(run["ended"]) < max(0.5, early(run["ended"]) - 0.1),
        "the policy forgets to stop",
        "look at --missing-eos-score (is it below every real score?) and at what the reward thinks of long "
        "responses",
    ),
    (
        "all lengths are at the limit",
        ("at_limit",),
        lambda run: late(run["at_limit"]) > 0.9,
        "the reward pays for length",
        "take 0.02*length off it, or raise --beta",
    ),
    (
        "responses grow long",
        ("length",),
        lambda run: late(run["length"]) > 1.5 * early(run["length"]),
        "half as long again as at the start: the reward pays for length, or for what comes with it",
        "take 0.02*length off it, or raise --beta; fine where longer means more steps of reasoning",
    ),
    (
        "entropy collapses",
        ("entropy",),
        lambda run: late(run["entropy"]) < early(run["entropy"]) / 3,
        "the policy says one thing whatever it is asked, and explores no more",
        "raise --beta, lower --lr or --epochs, raise --clip-high (grpo); more, and more varied, prompts",
    ),
    (
        "explained variance is below 0",
        ("explained_variance",),
        lambda run: len(run["explained_variance"]) > 10 and late(run["explained_variance"]) < 0,
        "the critic predicts worse than a constant",
        "look at the scale of the score, at --clip-value, --vf-coef and --epochs",
    ),
    (
        "most groups teach nothing",
        ("equal_groups",),
        lambda run: late(run["equal_groups"]) > 0.8,
        "all responses to a prompt get one score, so no advantage is left",
        "look for prompts that are neither too easy nor too hard, or raise --group-size or --temperature",
    ),
)  # fmt: skip


def askable(run: dict) -> list[tuple]:
    """The rows of SICKNESSES whose columns the run has."""
    return [sickness for sickness in SICKNESSES if run.keys() >= set(sickness[1])]


def diagnose(run: dict) -> list[tuple[str, str, str]]:
    """→ (name, likely cause, remedy) of every known sickness that the run shows."""
    return [(name, cause, remedy) for name, _, ill, cause, remedy in askable(run) if ill(run)]


def diagnose_rows(rows: list[dict]) -> list[tuple[str, str, str]]:
    """The same of a run's rows of metrics, in order."""
    return diagnose(columns(rows))


def report(path: str) -> None:
    """Print what a metrics file says of its run's health."""
    try:
        run = read_run(path)
        found, steps = diagnose(run), len(run.get("loss", []))
    except (TypeError, ValueError):  # columns of other lengths, a config of another kind
        raise UserError(f"{path} holds metrics that do not fit together; name those of one run.") from None
    short = f"; only {steps} steps were logged, too few for a trend" if steps < LEAST else ""
    if not found:
        print(f"{path}: healthy, none of {len(askable(run))} known sicknesses{short}")
    for name, cause, remedy in found:
        print(f"{path}: {name}\n  likely cause: {cause}\n  remedy: {remedy}")


def main(paths: list[str]) -> None:
    if not paths:
        raise UserError("name the X.metrics.jsonl of one or more runs.")
    for path in paths:
        report(path)


if __name__ == "__main__":
    run_on_paths(main)
