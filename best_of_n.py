"""Best of n, and search over steps: is it worth scoring every step of a solution?

N solutions are drawn of each problem, once. For every n ≤ N the table then says how often the solution chosen
from n of them is right, by

    mean      none is chosen: the policy itself                pass      at least one of the n is right
    majority  the commonest final answer (Wang et al. 2022)    orm       the outcome model's favourite
    likelihood  the one that the policy itself finds likeliest: no second model at all
    prm-min, prm-product, prm-last                             the process model's, by its steps' minimum, …
    vote      the answer with the largest sum of prm-min (Li et al. 2023)

not for one draw of n but averaged over the subsets of size n of the N: exactly for all but the votes, whose
mean is taken over --subsets of them (both are unbiased). With scores s sorted upwards,

    E[right@n] = Σ_i right_i · C(i−1, n−1) / C(N, n),          pass@n = 1 − C(N−c, n) / C(N, n)
                                                               (Chen et al. 2021, eq. 1)

Search spends its tokens step by step: each of `width` prefixes is continued by `expansions` sampled steps,
the process model scores them, and the best `width` go on (beam), or the best of each prefix's own (dvts:
Beeching et al. 2024). It is compared with best-of-n at the same number of generated tokens.

    python best_of_n.py                                           # the table and a CSV
    python best_of_n.py --orm out/demo/orm.pt                     # the outcome model beside it
    python best_of_n.py --search beam --width 4 --expansions 4
    python best_of_n.py --show 3                                  # problems with every step coloured
    python best_of_n.py --plot out/demo/best_of_n.png             # needs the `plot` extra
"""

import csv
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from nanoalign import UserError, cli
from nanoalign.checkpoint import CHAT, load_policy, load_scalar
from nanoalign.data import collate, thin
from nanoalign.generate import rollouts
from nanoalign.model import GPT, ScalarGPT
from nanoalign.rewards import final_answer, gold_answer
from nanoalign.rows import read_rows
from nanoalign.steps import AGGREGATES, aggregate, step_probabilities
from nanoalign.tokenizer import Tokenizer
from nanoalign.training import freeze, setup
from nanoalign.world.steps import check_steps


@dataclass
class Config:
    policy: str = "out/demo/solver.pt"  # the checkpoint that solves
    prm: str = "out/demo/prm.pt"  # the process reward model
    orm: str = ""  # an outcome reward model to compare with, such as out/demo/orm.pt
    problems: str = "out/demo/world/problems_held_out.jsonl"  # prompt rows with an answer in meta; GSM8K's
    count: int = 200  # how many of them
    out: str = "out/demo/best_of_n.csv"  # the table to write
    samples: int = 64  # N: solutions drawn of each problem
    subsets: int = 200  # subsets of each size over which the votes are averaged
    search: tuple[str, ...] = ()  # beam, dvts: search over steps as well
    width: int = 4  # prefixes kept
    expansions: int = 4  # steps sampled after each
    depth: int = 12  # steps of a solution at most, in search
    by: str = "min"  # how search and --show sum up a solution's steps: min, product or last
    show: int = 0  # problems to print, each step coloured by its probability of being right
    plot: str = ""  # a picture of the curves to write
    max_new_tokens: int = 96  # length limit of a solution
    temperature: float = 1.0  # of sampling
    seed: int = 0  # of samples and subsets
    device: str = "auto"  # auto, cpu, cuda, …
    skip_bad_rows: bool = False  # drop and count malformed rows instead of stopping


# ---------------------------------------------------------------------------------- estimators over subsets


def mean_and_error(values) -> tuple[float, float]:
    """A value per problem → their mean and its standard error."""
    return float(np.mean(values)), float(np.std(values) / math.sqrt(len(values)))


def pass_at(right: np.ndarray, n: int) -> float:
    """right (N,) bool → the chance that a random subset of n holds a right one (Chen et al. 2021, eq. 1)."""
    return 1 - math.comb(int((~right).sum()), n) / math.comb(len(right), n)


def best_at(right: np.ndarray, scores: np.ndarray, n: int) -> float:
    """right (or any value) and scores (N,) → the mean value of the one with the highest score in a random
    subset of n: the chance that it is right. Equal scores share it."""
    _, level, sizes = np.unique(scores, return_inverse=True, return_counts=True)
    below, total = np.cumsum(sizes) - sizes, math.comb(len(scores), n)
    wins = [
        (math.comb(int(b + g), n) - math.comb(int(b), n)) / total for b, g in zip(below, sizes)
    ]  # of the level
    return float(np.bincount(level, right) / sizes @ wins)


def vote_at(right: np.ndarray, answers: np.ndarray, weights: np.ndarray, subsets: np.ndarray) -> float:
    """right, answers (NaN: none) and weights (N,), subsets (S, N) bool → how often the answer with the
    largest sum of weights is right; answers with equal sums share it."""
    known = ~np.isnan(answers)
    if not known.any():
        return 0.0
    options, index = np.unique(answers[known], return_inverse=True)
    ballots = np.zeros((len(answers), len(options)))
    ballots[np.flatnonzero(known), index] = weights[known]
    sums = subsets @ ballots  # (S, options)
    winners = (sums >= sums.max(1, keepdims=True) - 1e-12) & (sums > 0)
    correct = np.isin(options, answers[right])
    return float(((winners & correct).sum(1) / winners.sum(1).clip(min=1)).mean())


def curves(
    right: np.ndarray, answers: np.ndarray, scores: dict[str, np.ndarray], subsets: int, seed: int
) -> dict:
    """right, answers and each of scores (P, N) → {selector: {n: (mean over problems, standard error)}}."""
    N, rng = right.shape[1], np.random.default_rng(seed)
    table: dict[str, dict[int, tuple[float, float]]] = {}

    def note(name: str, n: int, values) -> None:
        table.setdefault(name, {})[n] = mean_and_error(values)

    for n in sorted({*(2**k for k in range(N.bit_length())), N}):
        chosen = np.argsort(rng.random((subsets, N)), axis=1) < n  # each row: a random subset of n
        note("mean", n, right.mean(1))
        note("pass", n, [pass_at(r, n) for r in right])
        note("majority", n, [vote_at(r, a, np.ones(N), chosen) for r, a in zip(right, answers)])
        for name, values in scores.items():
            note(name, n, [best_at(r, s, n) for r, s in zip(right, values)])
        for name in {"prm-min"} & scores.keys():
            weighed = zip(right, answers, scores[name])
            note("vote", n, [vote_at(r, a, w, chosen) for r, a, w in weighed])
    return table


# ------------------------------------------------------------------------------------------------- search


def tree_search(
    roots: list, expand: Callable, score: Callable, width: int, expansions: int, depth: int, diverse: bool
) -> list[list[tuple[float, object]]]:
    """Search over steps, all problems side by side → for each root its finished solutions, best first.

    expand(nodes) → [(node, finished)], `expansions` for each node in turn; score(nodes) → a number for each.
    Of a root's candidates the best `width` go on, or with `diverse` the best one of each prefix.
    """
    open_nodes = [[root] * width for root in roots]
    done: list[list[tuple[float, object]]] = [[] for _ in roots]
    for _ in range(depth):
        nodes = [node for beam in open_nodes for node in beam]
        if not nodes:
            break
        children = expand(nodes)
        values, at = score([child for child, _ in children]), 0
        for r, beam in enumerate(open_nodes):
            mine = list(zip(values, children))[at : at + len(beam) * expansions]
            at += len(mine)
            pools = [mine[i : i + expansions] for i in range(0, len(mine), expansions)] if diverse else [mine]
            keep = 1 if diverse else width - len(done[r])
            best = [c for pool in pools for c in sorted(pool, key=lambda c: -c[0])[:keep]]
            done[r] += [(value, child) for value, (child, finished) in best if finished]
            open_nodes[r] = [child for _, (child, finished) in best if not finished]
    return [sorted(found, key=lambda c: -c[0]) for found in done]


@dataclass
class Solver:
    """A policy that writes solutions and a process model that reads them; counts the tokens written."""

    policy: GPT
    prm: ScalarGPT
    tokenizer: Tokenizer
    config: Config
    progress: cli.Progress
    tokens: int = 0
    calls: int = 0

    def expand(self, nodes: list[tuple[int, tuple]]) -> list[tuple[tuple[int, tuple], bool]]:
        """Nodes (length of the prompt, ids so far) → each continued by `expansions` sampled steps."""
        asked = [np.array(ids) for _, ids in nodes for _ in range(self.config.expansions)]
        starts = [start for start, _ in nodes for _ in range(self.config.expansions)]
        self.calls += 1
        children: list = [None] * len(asked)
        for indices, rollout in rollouts(
            self.policy, self.tokenizer, asked, self.config.max_new_tokens,
            self.config.seed + 1000 * self.calls, temperature=self.config.temperature,
            stops=self.tokenizer.newlines,
        ):  # fmt: skip
            written = rollout.responses()
            self.tokens += sum(map(len, written))
            for i, step in zip(indices, written):
                ids = (*asked[i].tolist(), *step)
                going_on = step[-1] in self.tokenizer.newlines and len(ids) < self.policy.config.context
                children[i] = (starts[i], ids), not going_on
        self.progress.advance(1)
        return children

    def score(self, nodes: list[tuple[int, tuple]]) -> list[float]:
        """→ the process model's view of each (unfinished) solution."""
        values = []
        for at in range(0, len(nodes), 256):
            batch = nodes[at : at + 256]
            examples = [(np.array(ids), np.arange(len(ids)) >= start) for start, ids in batch]
            device = self.policy.embed.weight.device
            ids, mask = (x.to(device) for x in collate(examples, self.tokenizer.pad))
            p, ends = step_probabilities(self.prm, ids, mask, self.tokenizer)
            values += aggregate(p, ends, self.config.by).tolist()
        return values


# --------------------------------------------------------------------------------------------------- a run


def draw(policy, models: dict, tokenizer, rows: list[dict], config: Config) -> dict:
    """N solutions of each problem → texts, their steps' p, answers, tokens, right, and scores by name, (P, N)
    each.

    A solution without an end token gets the lowest score.
    """
    N, prompts = config.samples, [tokenizer.prompt(row["prompt"]) for row in rows]
    gold = [gold_answer(row["meta"].get("answer")) for row in rows]
    if None in gold:
        raise UserError(f"{config.problems} has rows without a final answer: GSM8K's, or meta.answer.")
    drawn = {"texts": np.empty((len(rows), N), object), "steps": np.empty((len(rows), N), object)}
    drawn |= {name: np.zeros((len(rows), N)) for name in ("answers", "tokens")}
    names = ["likelihood"] + [f"prm-{how}" for how in AGGREGATES] + ["orm"] * ("orm" in models)
    scores = {name: np.zeros((len(rows), N)) for name in names}
    for indices, rollout in rollouts(
        policy, tokenizer, [p for p in prompts for _ in range(N)], config.max_new_tokens, config.seed,
        what="solve", temperature=config.temperature,
    ):  # fmt: skip
        at = np.divmod(np.array(indices), N)
        scores["likelihood"][at] = rollout.logp.sum(1).masked_fill(~rollout.ended, -math.inf).cpu()
        p, ends = step_probabilities(models["prm"], rollout.ids, rollout.mask, tokenizer)
        for how in AGGREGATES:
            scores[f"prm-{how}"][at] = (aggregate(p, ends, how) * rollout.ended).cpu()
        for i, row, end in zip(indices, p.cpu(), ends.cpu()):
            drawn["steps"].flat[i] = row[end].tolist()
        if "orm" in models:
            p, ends = step_probabilities(models["orm"], rollout.ids, rollout.mask, tokenizer)
            scores["orm"][at] = (aggregate(p, ends, "last") * rollout.ended).cpu()
        texts = [tokenizer.decode_response(response) for response in rollout.responses()]
        drawn["texts"][at] = texts
        drawn["answers"][at] = [math.nan if (a := final_answer(t)) is None else a for t in texts]
        drawn["tokens"][at] = rollout.mask.sum(1).cpu()
    return {**drawn, "scores": scores, "right": drawn["answers"] == np.array(gold)[:, None]}


def print_table(table: dict, count: int) -> None:
    sizes = list(next(iter(table.values())))
    print(f"\n{count} problems; share right, ± standard error over problems\n" + f"{'n':>12}", end="")
    print("".join(f"{n:>14}" for n in sizes))
    for name, curve in table.items():
        cells = (f"{mean:.3f} ± {error:.3f}" for mean, error in curve.values())
        print(f"{name:>12}" + "".join(f"{cell:>14}" for cell in cells))


def print_steps(row: dict, text: str, p: list[float], right: bool) -> None:
    """A solution, each step coloured from red to green by its probability of being right, its true label
    beside it."""
    steps = text.split("\n")
    truth = check_steps(row["meta"], steps) if "steps" in row["meta"] else [None] * len(steps)
    print(f"\n{row['prompt'][-1]['content']}   ({'right' if right else 'wrong'} answer)")
    for step, probability, true in zip(steps, p, truth):
        cell = f"{probability:4.0%} {'' if true is None else '✓' if true else '✗':1} {step}"
        red, green = min(5, round(10 * (1 - probability))), min(5, round(10 * probability))
        shade = 16 + 36 * red + 6 * green  # of the 6 × 6 × 6 colours of a terminal
        print(f"  \x1b[38;5;{shade}m{cell}\x1b[0m" if sys.stdout.isatty() else f"  {cell}")


def plot(table: dict, path: str) -> None:
    plt = cli.pyplot(path)
    figure, axes = plt.subplots(figsize=(7, 4.5))
    for name, curve in table.items():
        means, errors = np.array(list(curve.values())).T
        axes.errorbar(
            list(curve), means, errors, label=name, capsize=2, ls="--" if name in ("pass", "mean") else "-"
        )
    axes.set(xscale="log", xlabel="n: solutions drawn", ylabel="share of problems right")
    sizes = list(next(iter(table.values())))
    axes.set_xticks(sizes, sizes)
    axes.minorticks_off()
    axes.legend(fontsize="small")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    print(f"wrote {path}")


def search(
    kind: str, policy, prm, tokenizer, rows: list[dict], drawn: dict, config: Config
) -> dict[int, tuple[float, float]]:
    """Search over steps, beside best-of-n at the same number of generated tokens, printed → {that n: (share
    right, standard error)}."""
    solver = Solver(policy, prm, tokenizer, config, cli.Progress(f"{kind}, steps", config.depth))
    prompts = [tokenizer.prompt(row["prompt"]).tolist() for row in rows]
    found = tree_search(
        [(len(ids), tuple(ids)) for ids in prompts], solver.expand, solver.score, config.width,
        config.expansions, config.depth, diverse=kind == "dvts",
    )  # fmt: skip
    gold = [gold_answer(row["meta"]["answer"]) for row in rows]

    def best(solutions: list) -> tuple:
        (_, (start, ids)), *_ = solutions
        return ids[start:]

    right = [bool(f) and final_answer(tokenizer.decode_response(best(f))) == g for f, g in zip(found, gold)]
    tokens, each = solver.tokens / len(rows), drawn["tokens"].mean()
    n = min(config.samples, max(1, round(tokens / each)))
    scores = drawn["scores"][f"prm-{config.by}"]
    equal = [best_at(r, s, n) for r, s in zip(drawn["right"], scores)]
    (ours, error), theirs = mean_and_error(right), mean_and_error(equal)
    print(
        f"\n{kind}, {config.width} × {config.expansions}, by {config.by}: {ours:.3f} ± {error:.3f} right, "
        f"{tokens:.0f} tokens a problem\n"
        f"best of {n} by prm-{config.by}: {theirs[0]:.3f} ± {theirs[1]:.3f} right, "
        f"{n * each:.0f} tokens a problem"
    )
    return {n: (ours, error)}


def check_flags(config: Config) -> None:
    if unknown := set(config.search) - {"beam", "dvts"}:
        raise UserError(f"--search {' '.join(sorted(unknown))} is unknown; choose beam, dvts or both.")
    if config.by not in AGGREGATES:
        raise UserError(f"--by {config.by} is unknown; choose from {', '.join(AGGREGATES)}.")
    numbers = ("samples", "count", "subsets", "width", "expansions", "depth")
    if min(getattr(config, name) for name in numbers) < 1:
        raise UserError(f"--{', --'.join(numbers)} must be at least 1.")
    if config.temperature <= 0:
        raise UserError("--temperature must be positive: greedy solutions are all alike.")


@torch.no_grad()
def main(config: Config) -> None:
    check_flags(config)
    if config.plot:
        cli.pyplot(config.plot)
    device, autocast = setup(config)
    policy, tokenizer, _ = load_policy(config.policy, device, CHAT)
    models = {"prm": config.prm} | ({"orm": config.orm} if config.orm else {})
    for name, path in models.items():
        model, own, _ = load_scalar(path, device, ("prm",))
        if own.name != tokenizer.name:
            raise UserError(
                f"{path} reads tokens of {own.name!r}, the policy writes tokens of {tokenizer.name!r}."
            )
        models[name] = freeze(model)
    rows = thin(read_rows(config.problems, "prompts", config.skip_bad_rows), config.count)
    with autocast:
        drawn = draw(policy, models, tokenizer, rows, config)
        table = curves(drawn["right"], drawn["answers"], drawn["scores"], config.subsets, config.seed)
        print_table(table, len(rows))
        for kind in config.search:
            table[kind] = search(kind, policy, models["prm"], tokenizer, rows, drawn, config)
    for i in range(min(config.show, len(rows))):
        print_steps(rows[i], drawn["texts"][i, 0], drawn["steps"][i, 0], drawn["right"][i, 0])
    Path(config.out).parent.mkdir(parents=True, exist_ok=True)
    with Path(config.out).open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("selector", "n", "right", "error"))
        writer.writerows((name, n, *values) for name, curve in table.items() for n, values in curve.items())
    print(f"wrote {config.out}")
    if config.plot:
        plot(table, config.plot)


if __name__ == "__main__":
    cli.run(main, Config, __doc__)
