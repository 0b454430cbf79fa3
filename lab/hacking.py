"""The reward-hacking laboratory's report: what happened to proxy, judge and KL in a folder of PPO runs.

    python -m lab.hacking best-of-n --policy out/demo/sft.pt --reward out/demo/rm.pt
    python -m lab.hacking report out/demo/hacking        # several folders: mean ± standard error over seeds

`best-of-n` draws N responses a prompt and writes, for n = 1, 2, 3, 4, 6, … ≤ N, what the best of n by the
reward scores, by the reward and by the judge: unbiased, over all subsets of the N drawn. `report` reads every
metrics.jsonl (held-out `eval_rm`, `eval_judge`, `eval_kl`) and the folder's scorecard.json, if there is one.
It prints tables in markdown and the forms fitted by Gao et al. (2022) over d = √KL, d (α − β d) for best-of-n
and d (α − β log d) for RL, writes curves.csv and, with the `plot` extra, pictures: proxy and judge against d,
a line for each seed; failure modes by KL.
"""

import csv
import math
import sys
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import mean, stdev

import numpy as np

from best_of_n import best_at
from lab import run_on_paths
from lab.plot import write
from lab.seeds import scorecards
from nanoalign import UserError, cli
from nanoalign.checkpoint import load_policy
from nanoalign.data import prompt_examples, thin
from nanoalign.files import writing
from nanoalign.rewards import make_reward
from nanoalign.rollouts import rollouts
from nanoalign.rows import read_rows, write_rows
from nanoalign.training import setup


@dataclass
class Config:
    policy: str = "out/demo/sft.pt"  # the checkpoint to draw from
    reward: str = "out/demo/rm.pt"  # the proxy: an expression of nanoalign/rewards.py
    prompts: str = "out/demo/world/prompts_held_out.jsonl"  # prompt rows of the world
    out: str = "out/demo/hacking/best-of-n.jsonl"  # the curve: a row for each n
    samples: int = 64  # N, responses per prompt
    limit: int = 1000  # prompts
    max_new_tokens: int = 48  # length limit of a response
    seed: int = 0  # of sampling
    device: str = "auto"  # auto, cpu, cuda, …


def draw(config: Config) -> None:
    device, autocast = setup(config)
    policy, tokenizer, _ = load_policy(config.policy, device)
    rows = read_rows(config.prompts, "prompts")
    if min(config.samples, config.limit) < 1:
        raise UserError("--samples and --limit must be at least 1.")
    rows, prompts = prompt_examples(
        thin(rows, config.limit), tokenizer, policy.config.context - config.max_new_tokens
    )
    rewards = [make_reward(name, tokenizer, device) for name in (config.reward, "judge")]
    N = config.samples
    scores = np.zeros((2, len(rows) * N))
    drawn = [prompt for prompt in prompts for _ in range(N)]
    with autocast:
        for indices, rollout in rollouts(
            policy, tokenizer, drawn, config.max_new_tokens, config.seed, what="best-of-n"
        ):
            batch = [rows[i // N] for i in indices]
            for k, reward in enumerate(rewards):
                scores[k, indices] = reward(batch, rollout).cpu().numpy()
    proxy, judged = scores.reshape(2, len(rows), N)
    curve = []
    for n in (n for n in (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128) if n <= N):
        row = {"n": n, "eval_kl": math.log(n) - (n - 1) / n}  # a bound (Beirami et al. 2024)
        row["eval_reward"] = mean(best_at(p, p, n) for p in proxy)
        row["eval_judge"] = mean(best_at(j, p, n) for j, p in zip(judged, proxy))
        curve.append(row)
    write_rows(config.out, curve)
    print(f"best-of-n: {len(rows)} prompts × {N} samples → {config.out}")


# ----------------------------------------------------------------------------------------------- report


def curve(path: Path) -> list[dict]:
    """The held-out evaluations of a metrics file: kl, proxy and judge, in order."""
    rows = cli.readable_rows(path)
    return [
        {
            "kl": row["eval_kl"],
            "proxy": row.get("eval_rm", row.get("eval_reward", row.get("eval_score"))),
            "judge": row["eval_judge"],
        }
        for row in rows
        if "eval_judge" in row
    ]


def at_kl(points: list[dict], kl: float, name: str) -> float:
    """A run's value where its KL first passes `kl`, interpolated between two evaluations; NaN if never."""
    for before, after in pairwise(points):
        if before["kl"] <= kl <= after["kl"]:
            share = (kl - before["kl"]) / max(after["kl"] - before["kl"], 1e-9)
            return before[name] + share * (after[name] - before[name])
    return math.nan


def fit(points: list[dict], name: str, logarithmic: bool) -> tuple[float, float]:
    """Least-squares α, β of R(d) − R(0) = d (α − β log d), or d (α − β d) (Gao et al. 2022, §3)."""
    d = np.sqrt([max(p["kl"], 0.0) for p in points])
    gain = np.array([p[name] for p in points]) - points[0][name]
    keep = d > 1e-3
    d, gain = d[keep], gain[keep]
    columns = np.stack([d, -d * (np.log(d) if logarithmic else d)], axis=1)
    return tuple(np.linalg.lstsq(columns, gain, rcond=None)[0].tolist())


def spread(values: list[float]) -> str:
    """Mean ± standard error over seeds; a dash if a seed has no value."""
    if any(map(math.isnan, values)):
        return "–"
    return f"{mean(values):.2f}" + (f" ± {stdev(values) / len(values) ** 0.5:.2f}" if len(values) > 1 else "")


DRAWN = {
    "best-of-n",
    "beta-0-long",
    "ensemble-long",
    "length-long",
    "adversarial-long",
    "judge",
}  # of all seeds
FITTED = {"best-of-n": False, "beta-0-long": True}  # run: is the form of Gao et al. the logarithmic one?


def report(folders: list[str], kls: tuple[float, ...] = (0.5, 1.0, 2.0, 4.0)) -> None:
    runs: dict[str, list[list[dict]]] = {}
    for folder in folders:
        for path in sorted(Path(folder).glob("*.metrics.jsonl")):
            runs.setdefault(path.name.removesuffix(".metrics.jsonl"), []).append(curve(path))
        if (path := Path(folder) / "best-of-n.jsonl").exists():
            runs.setdefault("best-of-n", []).append(curve(path))
    runs = {name: kept for name, curves in runs.items() if (kept := list(filter(None, curves)))}
    if not runs:
        raise UserError(f"no run with held-out scores by the judge in {', '.join(folders)}.")
    header = ["run", "final KL", "final proxy", "final judge"]
    print(f"| {' | '.join([*header, *(f'judge at KL {kl:g}' for kl in kls)])} |")
    print("|---" * (len(header) + len(kls)) + "|")
    for name, curves in runs.items():
        cells = [spread([points[-1][key] for points in curves]) for key in ("kl", "proxy", "judge")]
        cells += [spread([at_kl(points, kl, "judge") for points in curves]) for kl in kls]
        print(f"| {name} | {' | '.join(cells)} |")
    with writing(f"{folders[0]}/curves.csv") as file:
        table = csv.writer(file)
        table.writerow(("run", "seed", "evaluation", "kl", "proxy", "judge"))
        for name, curves in runs.items():
            for seed, points in enumerate(curves):
                table.writerows(
                    (name, seed, i, *(round(p[key], 5) for key in ("kl", "proxy", "judge")))
                    for i, p in enumerate(points)
                )
    print(f"wrote {folders[0]}/curves.csv", file=sys.stderr)
    print()
    for name, curves in runs.items():
        if name in FITTED:
            form = f"d (α − β {'log ' * FITTED[name]}d)"
            for key in ("proxy", "judge"):
                fits = np.array([fit(points, key, FITTED[name]) for points in curves])
                a, b = (spread(column) for column in fits.T.tolist())
                print(f"- {name}, {key}: {form} with α = {a}, β = {b}")
    cards = failure_modes(folders)
    if cards:
        print_failures(cards)
    plot(runs, cards, Path(folders[0]))


FAILURES = {
    "padding (sentences)": "padding", "length (words)": "length", "sycophancy": "sycophancy",
    "hedging": "hedging", "wrong form": "wrong form", "over-refusal": "over-refusal",
}  # fmt: skip


def failure_modes(folders: list[str]) -> dict[str, dict[str, list[float]]]:
    """The scorecards of the folders → {run: {metric: a value per folder}}, by rising KL."""
    cards: dict[str, dict[str, list[float]]] = {}
    for folder in folders:
        path = Path(folder) / "scorecard.json"
        if path.exists():
            for checkpoint, card in scorecards([path])[0].items():
                for name, (value, _) in card["overall"].items():
                    cards.setdefault(Path(checkpoint).stem, {}).setdefault(name, []).append(value)
    return dict(sorted(cards.items(), key=lambda item: mean(item[1]["KL to reference"])))


def print_failures(cards: dict[str, dict[str, list[float]]]) -> None:
    names = ["KL to reference", "reward", "utility", "win rate", *FAILURES]
    print(f"\n| held-out entities | {' | '.join(FAILURES.get(name, name) for name in names)} |")
    print("|---" * (len(names) + 1) + "|")
    for run, card in cards.items():
        print(f"| {run} | {' | '.join(spread(card[name]) for name in names)} |")


def plot(runs: dict[str, list[list[dict]]], cards: dict, folder: Path) -> None:
    try:
        import matplotlib
    except ImportError:
        print("no plots: pip install -e '.[plot]' draws them", file=sys.stderr)
        return
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(12, 5), sharex=True)
    colours = plt.get_cmap("tab10")
    for k, name in enumerate(sorted(DRAWN & runs.keys()) or runs):
        for seed, points in enumerate(runs[name]):
            d = np.sqrt([max(p["kl"], 0.0) for p in points])
            for axis, key in zip(axes, ("proxy", "judge")):
                look = {"color": colours(k % 10), "label": "" if seed else name, "alpha": 0.9}
                axis.plot(d, [p[key] for p in points], "o-", ms=2, lw=1, **look)
    for axis, title in zip(axes, ("proxy: the reward model's score", "the judge's utility")):
        axis.set(xlabel="√KL(policy ‖ SFT), √nats", title=f"{title}, held-out prompts")
        axis.grid(alpha=0.3)
    axes[1].legend(fontsize=8)
    write(figure, f"{folder}/curves.png")
    if not cards:
        return
    figure, axes = plt.subplots(2, 3, figsize=(13, 7), sharex=True)
    kl = [mean(card["KL to reference"]) for card in cards.values()]
    for axis, name in zip(axes.flat, FAILURES):
        axis.scatter(kl, [mean(card[name]) for card in cards.values()], s=18)
        for x, (run, card) in zip(kl, cards.items()):
            axis.annotate(run, (x, mean(card[name])), fontsize=7, xytext=(3, 3), textcoords="offset points")
        axis.set(title=FAILURES[name], xlabel="KL to SFT, nats")
        axis.grid(alpha=0.3)
    write(figure, f"{folder}/failures.png")


if __name__ == "__main__":
    if sys.argv[1:2] == ["report"]:
        del sys.argv[1]
        run_on_paths(report)
    elif sys.argv[1:2] == ["best-of-n"]:
        del sys.argv[1]
        cli.run(draw, Config, __doc__)
    else:
        sys.exit("error: name a command: best-of-n or report (python -m lab.hacking best-of-n --help).")
