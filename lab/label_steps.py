"""Collect step labels for train_prm.py: sample solutions to problems, and label each step.

    python -m lab.label_steps                                       # the world's checker: exact
    python -m lab.label_steps --by rollouts --samples 1 --count 1000 --out out/demo/steps.rollouts.jsonl

It writes rows {"prompt", "completions", "labels", "label", "meta"} of K solutions a problem, "label" being
whether the final answer is right. `rollouts` needs no labeller: a step's label is the share of M
continuations from it that reach the right answer (Math-Shepherd: Wang et al. 2024, eq. 4, soft estimation),
and of the last step whether it has.
"""

from dataclasses import dataclass

import numpy as np

from collect import sample
from nanoalign import UserError, cli
from nanoalign.answers import final_answer, gold_answer, same
from nanoalign.checkpoint import load_policy
from nanoalign.data import prompt_examples, prompt_key
from nanoalign.rollouts import respond
from nanoalign.rows import read_rows, write_rows
from nanoalign.seeds import derived_seed
from nanoalign.training import setup
from nanoalign.world.steps import check_steps


@dataclass
class Config:
    policy: str = "out/demo/solver.pt"  # the checkpoint to sample from
    prompts: str = "out/demo/world/problems.jsonl"  # prompt rows with answers; for the checker the world's
    out: str = "out/demo/steps.jsonl"  # rows of steps
    by: str = "checker"  # who labels: the world's checker, or rollouts (Monte Carlo)
    continuations: int = 8  # M: of rollouts, from each step
    samples: int = 4  # solutions per problem (K)
    count: int = 0  # how many of the problems; 0: all
    max_new_tokens: int = 96  # length limit of a solution, and of a continuation
    temperature: float = 1.0  # of sampling
    top_k: int = 0  # sample from the k likeliest tokens only; 0: from all
    top_p: float = 1.0  # sample from the likeliest tokens of this probability together
    seed: int = 0  # of sampling
    device: str = "auto"  # auto, cpu, cuda, …
    skip_bad_rows: bool = False  # drop and count malformed rows instead of stopping
    fields: str = ""  # other field names: prompt=instruction,completion=output


def label_steps(policy, tokenizer, rows: list[dict], drawn: list, config: Config) -> list[dict]:
    """Solutions drawn[i]: (text, ended) of the problem rows[i] → rows of steps with their labels.

    What comes after the last line break of a solution without an end token is no whole step.
    """
    solutions = []
    for row, (text, ended) in zip(rows, drawn):
        steps = text.split("\n")[: None if ended else -1]
        if steps:
            solutions.append((row, steps))
    right = [same(final_answer("\n".join(steps)), gold_answer(row)) for row, steps in solutions]
    if config.by == "checker":
        labels = [check_steps(row["meta"], steps) for row, steps in solutions]
    else:
        labels = monte_carlo(policy, tokenizer, solutions, right, config)
    return [
        {
            "prompt": row["prompt"],
            "completions": steps,
            "labels": values,
            "label": reached,
            "meta": row["meta"],
        }
        for (row, steps), values, reached in zip(solutions, labels, right)
    ]


def monte_carlo(policy, tokenizer, solutions: list, right: list[bool], config: Config) -> list[list]:
    """(problem, steps) → for each step the share of M continuations from it that reach the right answer."""
    M, keys, asked = config.continuations, [], {}
    for row, steps in solutions:
        keys.append([(prompt_key(row), *steps[:i]) for i in range(1, len(steps))])
        asked.update((key, row) for key in keys[-1])  # a prefix that two solutions share is continued once
    ids = []
    for key, row in asked.items():
        prefix = tokenizer.encode(tokenizer.lead + "\n".join(key[1:]) + "\n")
        ids += [np.append(tokenizer.prompt(row["prompt"]), prefix)] * M
    flags = ("max_new_tokens", "temperature", "top_k", "top_p")
    options = {name: getattr(config, name) for name in flags}
    options |= {"seed": derived_seed(config.seed, "continue"), "what": "continue"}
    texts, _ = respond(policy, tokenizer, ids, **options)
    gold = [gold_answer(row) for row in asked.values() for _ in range(M)]
    hits = np.array([same(final_answer(text), answer) for text, answer in zip(texts, gold)])
    share = dict(zip(asked, hits.reshape(-1, M).mean(axis=1).tolist()))
    return [[*(share[key] for key in prefixes), float(end)] for prefixes, end in zip(keys, right)]


def report(rows: list[dict], out: str) -> None:
    right = [row for row in rows if row["label"]]
    lucky = sum(min(row["labels"]) < 0.5 for row in right) / max(1, len(right))
    count = sum(len(row["labels"]) for row in rows)
    print(f"label_steps: {len(rows):,} solutions, {count:,} steps → {out}")
    share = len(right) / len(rows)
    print(f"label_steps: {share:.1%} reach the right answer, {lucky:.1%} of these by a wrong step")


def main(config: Config) -> None:
    if config.by not in ("checker", "rollouts"):
        raise UserError(f"--by {config.by} is unknown; choose checker or rollouts.")
    if min(config.samples, config.continuations) < 1:
        raise UserError("--samples and --continuations must be at least 1.")
    device, autocast = setup(config)
    policy, tokenizer, _ = load_policy(config.policy, device, chat=True)
    rows = read_rows(config.prompts, "prompts", config.skip_bad_rows, config.fields)
    rows, ids = prompt_examples(rows, tokenizer, policy.config.context - 1, config.count)
    for row in rows:  # before the work
        gold_answer(row)
        if config.by == "checker":
            check_steps(row["meta"], [])
    with autocast:
        drawn = [solution for each in sample(policy, tokenizer, ids, config) for solution in each]
        rows = [row for row in rows for _ in range(config.samples)]
        found = label_steps(policy, tokenizer, rows, drawn, config)
    if not found:
        raise UserError("no solution has a whole step, a line that ends: raise --max-new-tokens.")
    write_rows(config.out, found)
    report(found, config.out)


if __name__ == "__main__":
    cli.run(main, Config, __doc__)
