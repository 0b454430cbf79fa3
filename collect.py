"""Collect preferences: sample K responses a prompt from a policy and have people compare them.

    P(a ≻ b) = σ((u(a) − u(b)) / noise)                       (Bradley & Terry 1952; InstructGPT §3.4)

Writes pair rows {"prompt", "chosen", "rejected", "meta"} and, beside them, unpaired thumbs-up/down rows
{"prompt", "completion", "label"}. Each pair goes to one annotator drawn from a crowd whose biases differ; as
the crowd is known, the agreement between two of its members and the best accuracy that any reward model
could reach on these labels are computed exactly, not estimated.

    python collect.py                                          # the built-in world's people
    python collect.py --policy out/demo/dpo.pt --out out/demo/pairs2.jsonl     # a second round
    python collect.py --steps checker --policy out/demo/solver.pt --prompts out/demo/world/problems.jsonl \
        --out out/demo/steps.jsonl

With --steps it collects step labels for train_prm.py: rows {"prompt", "completions", "labels", "label",
"meta"} of K solutions a problem, "label" being whether the final answer is right. `checker`: the world's,
exact. `rollouts`: without any labeller, a step's label is the share of M continuations from it that reach the
right answer (Math-Shepherd: Wang et al. 2024, eq. 4, soft estimation), and of the last step whether it has.
"""

import math
import random
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import numpy as np

from nanoalign import UserError, cli
from nanoalign.checkpoint import CHAT, load_policy
from nanoalign.data import thin
from nanoalign.generate import respond
from nanoalign.rewards import final_answer
from nanoalign.rows import read_rows, write_rows
from nanoalign.training import setup
from nanoalign.world.people import agreement, ceiling, impression, people
from nanoalign.world.steps import check_steps


@dataclass
class Config:
    policy: str = "out/demo/sft.pt"  # the checkpoint to sample from
    prompts: str = "out/demo/world/prompts.jsonl"  # prompt rows
    out: str = "out/demo/pairs.jsonl"  # pair rows; thumbs-up/down rows go to X.thumbs.jsonl
    annotator: str = "world"  # who compares: "world", the built-in people
    crowd: int = 5  # how many different people there are
    samples: int = 4  # responses per prompt (K)
    count: int = 0  # how many of the prompts; 0: all
    steps: str = ""  # collect step labels instead: checker (the world's) or rollouts (Monte Carlo)
    continuations: int = 8  # M: of --steps rollouts, from each step
    rank: bool = True  # order all K: K(K−1)/2 pairs a prompt; --no-rank: pair them off, K/2 a prompt
    max_new_tokens: int = 96  # length limit of a response
    temperature: float = 0.7  # of sampling: fewer blunders than at 1, and closer comparisons
    top_k: int = 0  # sample from the k likeliest tokens only; 0: from all
    top_p: float = 1.0  # sample from the likeliest tokens that together have this probability
    seed: int = 0  # of sampling, pairing and labels
    device: str = "auto"  # auto, cpu, cuda, …
    skip_bad_rows: bool = False  # drop and count malformed rows instead of stopping


def label(prompts: list[dict], responses: list[list[tuple[str, bool]]], config: Config):
    """Have the world's people compare → pair rows, thumbs rows, and P(chosen side first) per pair and person.

    responses[i]: the (text, ended) drawn for prompts[i]. One person orders them by its utility / noise plus
    Gumbel noise (Plackett & Luce), so that every pair of the ranking follows Bradley–Terry exactly. Without
    --rank only pairs of neighbours in a random order are kept. Two alike make no pair.
    """
    rng, crowd = random.Random(f"label-{config.seed}"), people(config.crowd)
    pairs, thumbs, probabilities = [], [], []
    for row, drawn in zip(prompts, responses):
        rng.shuffle(drawn)
        seen = [impression(row, text, ended) for text, ended in drawn]
        utilities = [[person.weigh(what) for what in seen] for person in crowd]  # (people, K)
        thumb = rng.randrange(len(crowd))
        up = rng.random() < crowd[thumb].thumb_up(utilities[thumb][0])
        thumbs.append({"prompt": row["prompt"], "completion": drawn[0][0], "label": up, "meta": row["meta"]})

        person = rng.randrange(len(crowd))
        liked = [u + crowd[person].noise * gumbel(rng) for u in utilities[person]]
        K = len(drawn)
        candidates = combinations(range(K), 2) if config.rank else zip(range(0, K - 1, 2), range(1, K, 2))
        for i, j in candidates:
            if drawn[i][0] == drawn[j][0]:
                continue
            best, worst = (i, j) if liked[i] > liked[j] else (j, i)
            p = [someone.prefers(u[best], u[worst]) for someone, u in zip(crowd, utilities)]
            meta = {**row["meta"], "annotator": person, "p_chosen": round(sum(p) / len(p), 4)}
            chosen, rejected = drawn[best][0], drawn[worst][0]
            pairs.append({"prompt": row["prompt"], "chosen": chosen, "rejected": rejected, "meta": meta})
            probabilities.append(p)
    return pairs, thumbs, probabilities


def label_steps(policy, tokenizer, prompts: list[dict], drawn: list, config: Config, sampling: dict):
    """Solutions drawn[i]: (text, ended) of prompts[i] → rows of steps with their labels.

    What comes after the last line break of a solution without an end token is no whole step.
    """
    solutions = []
    for row, (text, ended) in zip(prompts, drawn):
        steps = text.split("\n")[: None if ended else -1]
        if steps:
            solutions.append((row, steps))
    right = [final_answer("\n".join(steps)) == row["meta"]["answer"] for row, steps in solutions]
    if config.steps == "checker":
        labels = [check_steps(row["meta"], steps) for row, steps in solutions]
    else:
        labels = monte_carlo(policy, tokenizer, solutions, right, config, sampling)
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


def monte_carlo(policy, tokenizer, solutions: list, right: list[bool], config: Config, sampling: dict):
    """(problem, steps) → for each step the share of M continuations from it that reach the right answer."""
    M, keys, asked = config.continuations, [], {}
    for row, steps in solutions:
        question = row["prompt"][-1]["content"]
        keys.append([(question, *steps[:i]) for i in range(1, len(steps))])
        asked.update((key, row) for key in keys[-1])  # a prefix that two solutions share is continued once
    ids = []
    for key, row in asked.items():
        prefix = tokenizer.encode(" " + "\n".join(key[1:]) + "\n")
        ids += [np.append(tokenizer.prompt(row["prompt"]), prefix)] * M
    texts, _ = respond(policy, tokenizer, ids, seed=config.seed + 1, what="continue", **sampling)
    gold = [row["meta"]["answer"] for row in asked.values() for _ in range(M)]
    hits = np.array([final_answer(text) == answer for text, answer in zip(texts, gold)]).reshape(-1, M)
    share = dict(zip(asked, hits.mean(axis=1).tolist()))
    return [[*(share[key] for key in prefixes), float(end)] for prefixes, end in zip(keys, right)]


def report_steps(rows: list[dict], config: Config) -> None:
    right = [row for row in rows if row["label"]]
    lucky = sum(min(row["labels"]) < 0.5 for row in right) / max(1, len(right))
    count = sum(len(row["labels"]) for row in rows)
    print(f"collect: {len(rows):,} solutions, {count:,} steps → {config.out}")
    print(
        f"collect: {len(right) / len(rows):.1%} reach the right answer, {lucky:.1%} of these by a wrong step"
    )


def gumbel(rng: random.Random) -> float:
    """A draw from the standard Gumbel distribution: the difference of two is logistic."""
    return -math.log(-math.log(rng.uniform(1e-12, 1 - 1e-12)))


def main(config: Config) -> None:
    if config.steps not in ("", "checker", "rollouts"):
        raise UserError(f"--steps {config.steps} is unknown; choose checker or rollouts.")
    if config.annotator != "world":
        raise UserError(f"there is no annotator {config.annotator!r}; choose from: world.")
    if min(config.samples, config.continuations) < 1 or config.count < 0:
        raise UserError("--samples and --continuations must be at least 1, --count not negative.")
    if not config.steps and min(config.samples, config.crowd) < 2:
        raise UserError("comparing needs --samples of at least 2 and a --crowd of at least 2.")
    device, autocast = setup(config)
    policy, tokenizer, _ = load_policy(config.policy, device, CHAT)
    prompts = read_rows(config.prompts, "prompts", config.skip_bad_rows)
    prompts = thin(prompts, config.count) if config.count else prompts
    if any("kind" not in row["meta"] for row in prompts):
        raise UserError(
            f"{config.prompts} has rows without meta: the world's people only judge the world's prompts."
        )

    ids = [tokenizer.prompt(row["prompt"]) for row in prompts for _ in range(config.samples)]
    sampling = {
        "max_new_tokens": config.max_new_tokens, "temperature": config.temperature,
        "top_k": config.top_k, "top_p": config.top_p,
    }  # fmt: skip
    with autocast:
        drawn = list(zip(*respond(policy, tokenizer, ids, seed=config.seed, what="collect", **sampling)))
        if config.steps:
            each = [row for row in prompts for _ in range(config.samples)]
            rows = label_steps(policy, tokenizer, each, drawn, config, sampling)
            write_rows(config.out, rows)
            report_steps(rows, config)
            return
    responses = [drawn[i : i + config.samples] for i in range(0, len(drawn), config.samples)]
    pairs, thumbs, probabilities = label(prompts, responses, config)
    if not pairs:
        raise UserError("every two responses to a prompt were alike; raise --temperature or --samples.")

    write_rows(config.out, pairs)
    write_rows(str(Path(config.out).with_suffix(".thumbs.jsonl")), thumbs)
    K = config.samples
    alike = len(prompts) * (K * (K - 1) // 2 if config.rank else K // 2) - len(pairs)
    up = sum(row["label"] for row in thumbs)
    best = ceiling([sum(p) / len(p) for p in probabilities])
    print(f"collect: {len(pairs):,} pairs of {len(prompts):,} prompts ({alike:,} more: alike) → {config.out}")
    print(f"collect: {up:,} thumbs up, {len(thumbs) - up:,} down")
    print(f"collect: two people agree on {agreement(probabilities):.1%} of pairs (expected, exact)")
    print(f"collect: no reward model can exceed {best:.1%} accuracy on these labels (ceiling, exact)")


if __name__ == "__main__":
    cli.run(main, Config, __doc__)
