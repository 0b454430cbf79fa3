"""Best of n, and search over steps: is it worth scoring every step of a solution?

N solutions are drawn of each problem, once. For every n ≤ N the table then says how often the solution chosen
from n of them is right, over all subsets of size n (for votes, --subsets of them), by

    mean        none is chosen: the policy itself             pass  at least one of the n is right
    majority    the commonest answer (Wang et al. 2022)       orm   the outcome model's favourite
    likelihood  the policy's own favourite: no second model   vote  the largest sum of prm-min
    prm-min, …  the process model's, by its steps' minimum, … (vote: Li et al. 2023)

    E[right@n] = Σ_i right_i C(i−1, n−1) / C(N, n),   pass@n = 1 − C(N−c, n) / C(N, n)    (Chen et al. 2021)

Search: each of `width` prefixes is continued by `expansions` sampled steps; the process model's best `width`
go on (beam), or the best of each prefix (dvts: Beeching et al. 2024). It is compared with best-of-n at as
many generated tokens. A solution that has not ended scores 0.

    python best_of_n.py --orm out/demo/orm.pt --search beam dvts --show 3    # coloured steps, too
"""

import csv
import math
import sys
from dataclasses import dataclass
from itertools import chain, islice, pairwise

import numpy as np
import torch

from nanoalign import UserError, cli
from nanoalign.answers import final_answer, gold_answer, same
from nanoalign.checkpoint import load_policy
from nanoalign.data import thin
from nanoalign.files import writing
from nanoalign.rewards import load_function, make_reward
from nanoalign.rollouts import Rollout, rollouts
from nanoalign.rows import read_rows
from nanoalign.seeds import derived_seed
from nanoalign.statistics import mean_and_error
from nanoalign.steps import AGGREGATES, aggregate, step_ends
from nanoalign.terminal import visible
from nanoalign.training import setup


@dataclass
class Config:
    policy: str = "out/demo/solver.pt"  # the checkpoint that solves
    prm: str = "out/demo/prm.pt"  # the process reward model
    orm: str = ""  # an outcome reward model to compare with
    problems: str = "out/demo/world/problems_held_out.jsonl"  # prompt rows with meta.answer
    count: int = 200  # how many of them
    out: str = "out/demo/best_of_n.csv"  # the table to write
    samples: int = 64  # N: solutions drawn of each problem
    subsets: int = 200  # subsets of each size that votes are averaged over
    search: tuple[str, ...] = ()  # beam, dvts: search over steps as well
    width: int = 4  # prefixes kept
    expansions: int = 4  # steps sampled after each
    depth: int = 12  # steps of a solution at most, in search
    by: str = "min"  # how search sums up a solution's steps: min, product or last
    show: int = 0  # problems to print, steps coloured by their probability
    checker: str = "nanoalign/world/steps.py:check_steps"  # who marks the steps of --show
    max_new_tokens: int = 96  # length limit of a solution
    temperature: float = 1.0  # of sampling
    seed: int = 0  # of samples and subsets
    device: str = "auto"  # auto, cpu, cuda, …
    skip_bad_rows: bool = False  # drop and count malformed rows instead of stopping
    fields: str = ""  # other field names: prompt=instruction,completion=output


def over_problems(values) -> tuple[float, float]:
    """A value per problem → their mean and its standard error."""
    return mean_and_error(np.array(values, float)[:, None])


def pass_at(right, n: int) -> float:
    """right (N,) bool → the chance that a random subset of n holds a right one."""
    return 1 - math.comb(int((~right).sum()), n) / math.comb(len(right), n)


def best_at(right, scores, n: int) -> float:
    """right (or any value) and scores (N,) → the mean value of the one with the highest score in a random
    subset of n: the chance that it is right. Equal scores share it."""
    _, level, sizes = np.unique(scores, return_inverse=True, return_counts=True)
    ways = [math.comb(int(upto), n) for upto in (0, *np.cumsum(sizes))]
    wins = [(b - a) / ways[-1] for a, b in pairwise(ways)]  # of the level
    return float(np.bincount(level, right) / sizes @ wins)


def vote_at(right, answers, weights, subsets: np.ndarray) -> float:
    """right, answers (NaN: none) and weights (N,), subsets (S, N) bool → how often the answer with the
    largest sum of weights is right; answers with equal sums share it."""
    known = ~np.isnan(answers)
    options, index = np.unique(answers[known], return_inverse=True)
    ballots = np.zeros((len(answers), len(options)))
    ballots[np.flatnonzero(known), index] = weights[known]
    sums = subsets @ ballots  # (S, options)
    most = sums.max(1, keepdims=True, initial=0)
    winners = (sums >= most - 1e-12) & (sums > 0)
    correct = np.isin(options, answers[right])
    return float(((winners & correct).sum(1) / winners.sum(1).clip(min=1)).mean())


def curves(right, answers, scores: dict, subsets: int, seed: int) -> dict:
    """right, answers and each of scores (P, N) → {selector: {n: (mean over problems, standard error)}}."""
    N, rng, table = right.shape[1], np.random.default_rng(derived_seed(seed, "subsets")), {}
    ones, weights = np.ones(N), scores["prm-min"]
    for n in sorted({*(2**k for k in range(N.bit_length())), N}):
        subset = np.argsort(rng.random((subsets, N)), axis=1) < n  # (subsets, N)
        found = {"mean": right.mean(1), "pass": [pass_at(r, n) for r in right]}
        found["majority"] = [vote_at(r, a, ones, subset) for r, a in zip(right, answers)]
        for name, values in scores.items():
            found[name] = [best_at(r, s, n) for r, s in zip(right, values)]
        cast = zip(right, answers, weights)
        found["vote"] = [vote_at(*own, subset) for own in cast]
        for name, values in found.items():
            table.setdefault(name, {})[n] = over_problems(values)
    return table


def tree_search(roots, expand, score, width, expansions, depth, diverse: bool) -> list:
    """Search over steps, all problems side by side → for each root [(score, solution)], best first.

    expand(nodes) → [(node, finished)], `expansions` for each node in turn; score(nodes) → a number for each.
    Of a root's candidates the best `width` go on, or with `diverse` the best one of each prefix. Equal nodes
    are one candidate. What is unfinished after `depth` steps scores 0."""
    beams, done = [[root] * width for root in roots], [[] for _ in roots]
    for _ in range(depth):
        children = expand([node for beam in beams for node in beam])
        values = score([child for child, _ in children])
        scored = iter([(value, *child) for value, child in zip(values, children)])
        for r, beam in enumerate(beams):
            pools = [list(islice(scored, expansions)) for _ in beam]
            pools = pools if diverse else [list(chain(*pools))]
            keep = 1 if diverse else width - len(done[r])
            best = {}
            for pool in pools:
                new = {child: (value, finished) for value, child, finished in pool if child not in best}
                best |= dict(sorted(new.items(), key=lambda c: -c[1][0])[:keep])
            done[r] += [(value, child) for child, (value, finished) in best.items() if finished]
            beams[r] = [child for child, (_, finished) in best.items() if not finished]
    found = [own + [(0.0, node) for node in beam] for own, beam in zip(done, beams)]
    return [sorted(solutions, key=lambda c: -c[0]) for solutions in found]


def search(kind, policy, prm, tokenizer, rows, drawn, config: Config) -> dict:
    """Search over steps, beside best-of-n at the same number of generated tokens, printed → {that n: (share
    right, standard error)}. A node: the length of a prompt, and the ids so far."""
    by, breaks, worth, tokens = config.by, tokenizer.newlines, {}, 0
    progress = cli.Progress(f"{kind}, steps", config.depth)
    sampling = {"temperature": config.temperature, "stops": breaks}

    def expand(nodes: list[tuple]) -> list[tuple]:  # → (node, finished)
        nonlocal tokens
        progress.advance(1)
        asked = [node for node in nodes for _ in range(config.expansions)]
        prompts, found = [np.array(ids) for _, ids in asked], [None] * len(asked)
        limit = config.max_new_tokens
        seed = derived_seed(config.seed, "search", progress.done)
        how = {**sampling, "into": lambda: [found]}
        for indices, new in rollouts(policy, tokenizer, prompts, limit, seed, **how):
            starts = torch.tensor([[asked[i][0]] for i in indices])
            said = (torch.arange(new.ids.shape[1]) >= starts).to(new.ids.device)  # all steps so far
            p = prm(indices, Rollout(new.ids, said, new.logp, new.ended))
            values = aggregate(p, step_ends(new.ids, said, tokenizer), by).tolist()
            for i, step, value, ended in zip(indices, new.responses(), values, new.ended.tolist()):
                node = at, ids = asked[i][0], (*asked[i][1], *step)
                length, room = len(ids) - at, min(limit, policy.config.context - at)
                stopped = length >= room or step[-1] not in breaks
                complete = ended and length <= room
                found[i] = node, stopped, value if complete or not stopped else 0.0, len(step)
        worth.update((node, value) for node, _, value, _ in found)
        tokens += sum(length for *_, length in found)
        return [(node, stopped) for node, stopped, *_ in found]

    prompts = [tuple(tokenizer.prompt(row["prompt"]).tolist()) for row in rows]
    roots = [(len(ids), ids) for ids in prompts]
    how = config.width, config.expansions, config.depth, kind == "dvts"
    found = tree_search(roots, expand, lambda nodes: [worth[n] for n in nodes], *how)
    right = []
    for row, solutions in zip(rows, found):
        said = [tokenizer.decode_response(ids[at:]) for _, (at, ids) in solutions]
        right.append(any(same(final_answer(text), gold_answer(row)) for text in said[:1]))
    cost, each = tokens / len(rows), drawn["tokens"].mean()
    n = min(config.samples, max(1, round(cost / each)))
    equal = zip(drawn["right"], drawn["scores"][f"prm-{by}"])
    ours, theirs = over_problems(right), over_problems([best_at(*own, n) for own in equal])
    line = "{}: {:.3f} ± {:.3f} right, {:.0f} tokens a problem"
    print(line.format(f"\n{kind}, {config.width} × {config.expansions}, by {by}", *ours, cost))
    print(line.format(f"best of {n} by prm-{by}", *theirs, n * each))
    return {n: ours}


def draw(policy, prm, orm, tokenizer, rows, config: Config) -> dict:
    """N solutions of each problem → texts, their steps' p, answers, tokens, right, and scores by name, (P, N)
    each. A solution without an end token gets the lowest score."""
    N, shape, scores = config.samples, (len(rows), config.samples), {}
    (texts, steps), tokens = np.empty((2, *shape), object), np.zeros(shape)
    prompts = [tokenizer.prompt(row["prompt"]) for row in rows for _ in range(N)]
    limit, how = config.max_new_tokens, {"what": "solve", "temperature": config.temperature}
    how["into"] = lambda: [x.reshape(-1) for x in (texts, steps, tokens, *scores.values())]
    for indices, new in rollouts(policy, tokenizer, prompts, limit, config.seed, **how):
        at, asked = np.divmod(np.array(indices), N), [rows[i // N] for i in indices]
        p, ends = prm(asked, new), step_ends(new.ids, new.mask, tokenizer)
        found = {"likelihood": new.logp.sum(1).masked_fill(~new.ended, -math.inf)}
        found |= {f"prm-{how}": aggregate(p, ends, how) * new.ended for how in AGGREGATES}
        found |= {"orm": orm(asked, new) * new.ended} if orm else {}
        for name, values in found.items():
            scores.setdefault(name, np.zeros(shape))[at] = values.cpu()
        texts[at] = [tokenizer.decode_response(response) for response in new.responses()]
        tokens[at] = new.mask.sum(1).cpu()
        for i, own, end in zip(indices, p.cpu(), ends.cpu()):
            steps.flat[i] = own[end].tolist()
    said = [[final_answer(text) for text in own] for own in texts]
    gold = map(gold_answer, rows)
    right = np.array([[same(answer, due) for answer in own] for own, due in zip(said, gold)])
    numbers = {None: math.nan}  # equal answers have equal numbers, 50% and 50 as well
    said = [[answer and answer.value for answer in own] for own in said]
    answers = np.array([[numbers.setdefault(a, len(numbers)) for a in own] for own in said], float)
    found = {"texts": texts, "steps": steps, "answers": answers, "tokens": tokens}
    return found | {"scores": scores, "right": right}


def print_steps(row: dict, drawn: dict, i: int, checker: str) -> None:
    """A solution, steps coloured from red to green by their probability, marked by the checker."""
    text, p, right = (drawn[name][i, 0] for name in ("texts", "steps", "right"))
    steps = text.split("\n")
    known = checker and "steps" in row["meta"]
    truth = load_function(checker)(row["meta"], steps) if known else [None] * len(steps)
    print(f"\n{visible(row['prompt'][-1]['content'])}   ({'right' if right else 'wrong'} answer)")
    for step, probability, true in zip(steps, p, truth):
        cell = f"{probability:4.0%} {'' if true is None else '✓' if true else '✗':1} {visible(step)}"
        red, green = (min(5, round(10 * x)) for x in (1 - probability, probability))
        shade = 16 + 36 * red + 6 * green  # of 6 × 6 × 6 colours
        print(f"  \x1b[38;5;{shade}m{cell}\x1b[0m" if sys.stdout.isatty() else f"  {cell}")


@torch.no_grad()
def main(config: Config) -> None:
    if unknown := set(config.search) - {"beam", "dvts"}:
        raise UserError(f"--search {' '.join(sorted(unknown))} is unknown; choose beam, dvts or both.")
    if config.by not in AGGREGATES:
        raise UserError(f"--by {config.by} is unknown; choose from {', '.join(AGGREGATES)}.")
    numbers = ("samples", "count", "subsets", "width", "expansions", "depth")
    if min(getattr(config, name) for name in numbers) < 1:
        raise UserError(f"--{', --'.join(numbers)} must be at least 1.")
    if config.temperature <= 0:
        raise UserError("--temperature must be positive: greedy solutions are all alike.")
    device, autocast = setup(config)
    policy, tokenizer, _ = load_policy(config.policy, device, chat=True)
    prm = make_reward(f"prm-steps:{config.prm}", tokenizer, device)
    orm = make_reward(f"prm-last:{config.orm}", tokenizer, device) if config.orm else None
    rows = thin(read_rows(config.problems, "prompts", config.skip_bad_rows, config.fields), config.count)
    with autocast:
        drawn = draw(policy, prm, orm, tokenizer, rows, config)
        right, answers, scores = (drawn[name] for name in ("right", "answers", "scores"))
        table = curves(right, answers, scores, config.subsets, config.seed)
        print(f"\n{len(rows)} problems; share right, ± standard error over problems")
        print(f"{'n':>12}" + "".join(f"{n:>14}" for n in table["mean"]))
        for name, curve in table.items():
            cells = (f"{mean:.3f} ± {error:.3f}" for mean, error in curve.values())
            print(f"{name:>12}" + "".join(f"{cell:>14}" for cell in cells))
        for kind in config.search:
            table[kind] = search(kind, policy, prm, tokenizer, rows, drawn, config)
    with writing(config.out) as file:
        lines = [(name, n, *table[name][n]) for name in table for n in table[name]]
        csv.writer(file).writerows([("selector", "n", "right", "error"), *lines])
    print(f"wrote {config.out}")
    for i, row in enumerate(rows[: config.show]):
        print_steps(row, drawn, i, config.checker)


if __name__ == "__main__":
    cli.run(main, Config, __doc__, shared=True)
