"""Collect preferences: sample K responses a prompt from a policy and have annotators compare them.

    P(a ≻ b) = σ((u(a) − u(b)) / noise)                       (Bradley & Terry 1952; InstructGPT §3.4)

    python collect.py                                          # the built-in world's people
    python collect.py --policy out/demo/dpo.pt --out out/demo/pairs2.jsonl     # a second round
    python collect.py --annotator rm:out/demo/rm.pt --out out/demo/by_rm.jsonl # a reward model
    python collect.py --annotator ai:out/demo/assistant.pt --out out/demo/by_ai.jsonl
    python collect.py --annotator human --samples 2 --count 50 --out mine.jsonl
    python collect.py --annotator human --resume --out mine.jsonl              # go on where you stopped
    python collect.py --annotator human:ann --resume --out mine.jsonl          # somebody else, the same pairs
    python collect.py --steps checker --policy out/demo/solver.pt --prompts out/demo/world/problems.jsonl \\
        --out out/demo/steps.jsonl

It writes pair rows {"prompt", "chosen", "rejected", "meta"}; where votes differ, a soft label: the chosen
side's share of them as "probability". Every vote goes to X.votes.jsonl. Printed of each annotator: the
log-odds of preferring what is shown first, and what is 10 words longer (a bias only as far as longer
responses are not better: compare annotators); where votes overlap, agreement, also beyond chance (κ).

`world`: people whose biases differ, drawn for each prompt from a crowd. As the crowd is known, the agreement
between two of its members and, where one votes, the best accuracy that any reward model could reach on these
labels are computed exactly, not estimated. They also give thumbs up or down to single responses, rows
{"prompt", "completion", "label"}. `rm:PATH`: a reward model's own probability σ(r_a − r_b). `ai:PATH`: a chat
model answers "A or B?" by a principle drawn from a constitution for every pair, in both orders (RL-CAI: Bai
et al. 2022, §4.1; RLAIF: Lee et al. 2023):

    ℓ(a, b) = log π("A" | x, a, b, principle) − log π("B" | …)        P(a ≻ b) = σ((ℓ(a, b) − ℓ(b, a)) / 2)

Log-odds are averaged where Lee et al. average probabilities: what the model adds to the logit of "A" cancels,
and leaves no trace in how sure the label is. The position bias is printed before and after. To both models an
unfinished response loses to a finished one. Of the world's prompts it is printed how often labels are right
by the exact judge: their noise is known.

`human` or `human:NAME`: at the terminal, two responses side by side in random order, which is recorded: keys
1 and 2, t for a tie, s to skip, u to undo, q to leave. Every key is saved at once.

With --steps it collects step labels for train_prm.py: rows {"prompt", "completions", "labels", "label",
"meta"} of K solutions a problem, "label" being whether the final answer is right. `checker`: the world's,
exact. `rollouts`: without any labeller, a step's label is the share of M continuations from it that reach the
right answer (Math-Shepherd: Wang et al. 2024, eq. 4, soft estimation), and of the last step whether it has.
"""

import math
import random
import re
import sys
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import numpy as np
import torch

from nanoalign import UserError, cli, human
from nanoalign.checkpoint import CHAT, load_policy, load_scalar
from nanoalign.comparisons import report
from nanoalign.data import prompt_examples, prompt_key
from nanoalign.feedback import ask_for_judgement, choice_logprobs, read_constitution
from nanoalign.generate import respond
from nanoalign.rewards import final_answer, model_reward, score_texts
from nanoalign.rows import read_rows, write_rows
from nanoalign.training import setup
from nanoalign.world.judge import knows
from nanoalign.world.people import against_judge, agreement, ceiling, impression, people
from nanoalign.world.steps import check_steps


@dataclass
class Config:
    policy: str = "out/demo/sft.pt"  # the checkpoint to sample from
    prompts: str = "out/demo/world/prompts.jsonl"  # prompt rows
    out: str = "out/demo/pairs.jsonl"  # pair rows; every vote goes to X.votes.jsonl, thumbs to X.thumbs.jsonl
    annotator: str = "world"  # who compares: world (built-in people), rm:PATH, ai:PATH, human or human:NAME
    constitution: str = "constitution.txt"  # of ai:PATH: the principles, one a line; # begins a comment
    crowd: int = 5  # how many different people the world has
    votes: int = 1  # how many of them compare the responses to each prompt
    min_agreement: float = 0.0  # leave out pairs whose chosen side has a smaller share of the votes
    soft: bool = True  # that share is the label's "probability"; --no-soft: the majority's label, no ties
    resume: bool = False  # vote on the comparisons in X.votes.jsonl that lack this annotator's vote
    samples: int = 4  # responses per prompt (K)
    count: int = 0  # how many of the prompts; 0: all
    steps: str = ""  # collect step labels instead: checker (the world's) or rollouts (Monte Carlo)
    continuations: int = 8  # M: of --steps rollouts, from each step
    rank: bool = True  # compare all K: K(K−1)/2 pairs a prompt; --no-rank: pair them off, K/2 a prompt
    max_new_tokens: int = 96  # length limit of a response
    temperature: float = 0.7  # of sampling: fewer blunders than at 1, and closer comparisons
    top_k: int = 0  # sample from the k likeliest tokens only; 0: from all
    top_p: float = 1.0  # sample from the likeliest tokens that together have this probability
    seed: int = 0  # of sampling, pairing and labels
    device: str = "auto"  # auto, cpu, cuda, …
    skip_bad_rows: bool = False  # drop and count malformed rows instead of stopping


def pairings(drawn: list[tuple[str, bool]], rank: bool) -> list[tuple[int, int]]:
    """Which of the (text, ended) drawn for a prompt are compared: all, or neighbours; two alike never are."""
    K = len(drawn)
    candidates = combinations(range(K), 2) if rank else zip(range(0, K - 1, 2), range(1, K, 2))
    return [(i, j) for i, j in candidates if drawn[i][0] != drawn[j][0]]


def comparison(row: dict, a: tuple[str, bool], b: tuple[str, bool], votes: list = (), **meta) -> dict:
    """Two responses (text, ended) to a prompt → a row of kind "compared" (nanoalign/rows.py)."""
    (text_a, ended_a), (text_b, ended_b) = a, b
    return {
        "prompt": row["prompt"],
        "responses": [text_a, text_b],
        "ended": [ended_a, ended_b],
        "votes": list(votes),
        "meta": {**row["meta"], **meta},
    }


def label(prompts: list[dict], responses: list[list[tuple[str, bool]]], config: Config):
    """Have the world's people compare → comparisons, thumbs rows, and per comparison each person's P(first).

    responses[i]: the (text, ended) drawn for prompts[i]. A person orders them by its utility / noise plus
    Gumbel noise (Plackett & Luce), so that every pair of the ranking follows Bradley–Terry exactly. Without
    --rank only pairs of neighbours in a random order are kept. Two alike make no pair.
    """
    rng, crowd = random.Random(f"label-{config.seed}"), people(config.crowd)
    comparisons, thumbs, probabilities = [], [], []
    for row, drawn in zip(prompts, responses):
        rng.shuffle(drawn)
        seen = [impression(row, text, ended) for text, ended in drawn]
        utilities = [[person.weigh(what) for what in seen] for person in crowd]  # (people, K)
        thumb = rng.randrange(len(crowd))
        up = rng.random() < crowd[thumb].thumb_up(utilities[thumb][0])
        thumbs.append({"prompt": row["prompt"], "completion": drawn[0][0], "label": up, "meta": row["meta"]})

        liked = {}
        for person in rng.sample(range(len(crowd)), config.votes):
            liked[person] = [u + crowd[person].noise * gumbel(rng) for u in utilities[person]]
        for i, j in pairings(drawn, config.rank):
            p = [someone.prefers(u[i], u[j]) for someone, u in zip(crowd, utilities)]
            votes = [{"annotator": f"world:{k}", "p": float(u[i] > u[j])} for k, u in liked.items()]
            p_first = round(sum(p) / len(p), 4)
            comparisons.append(comparison(row, drawn[i], drawn[j], votes, p_first=p_first))
            probabilities.append(p)
    return comparisons, thumbs, probabilities


def rm_votes(path: str, comparisons: list[dict], device) -> list[float | None]:
    """A reward model's P(first is better) = σ(r_a − r_b) for each comparison; None if the prompt is too long.

    The checkpoint's scores are normalised: times their "std" their difference is in nats again.
    """
    model, tokenizer, checkpoint = load_scalar(path, device)
    if "normalisation" not in checkpoint:
        raise UserError(f"{path} is unfinished: its scores have no scale yet; resume its training.")
    asked = {(prompt_key(c), text): (c, text) for c in comparisons for text in c["responses"]}
    rows, texts = zip(*asked.values())
    context = model.config.context
    scored = score_texts(model_reward(model), rows, texts, tokenizer, context, device, "judge")
    scores = dict(zip(asked, (checkpoint["normalisation"]["std"] * scored).tolist()))
    if all(map(math.isnan, scores.values())):
        raise UserError(f"{path} scores no response: it is broken, or every prompt is longer than it reads.")
    votes = []
    for c in comparisons:
        a, b = (scores[prompt_key(c), text] for text in c["responses"])
        votes.append(vote(c, a - b))
    return votes


def vote(comparison: dict, log_odds: float) -> float | None:
    """Log-odds that the first is better → P(first is better). An unfinished response loses to a finished
    one; None for NaN."""
    finished = comparison["ended"][0] - comparison["ended"][1]
    p = finished / 2 + 0.5 if finished else torch.tensor(log_odds, dtype=torch.float64).sigmoid().item()
    return None if math.isnan(log_odds) else p


def ai_votes(
    path: str, comparisons: list[dict], device, principles: list[str], seed: int
) -> list[float | None]:
    """A judge model's P(first is better) = σ((ℓ(a, b) − ℓ(b, a)) / 2) for each comparison; None if the
    request is too long. Prints the judge's position bias before and after averaging."""
    model, tokenizer, _ = load_policy(path, device, CHAT)
    rng, asked = random.Random(f"principles-{seed}"), []
    for c in comparisons:
        (a, b), principle = c["responses"], rng.choice(principles)
        asked += [ask_for_judgement(c["prompt"], *order, principle) for order in ((a, b), (b, a))]
    logp = choice_logprobs(model, tokenizer, asked).double().view(-1, 2, 2)  # (pair, order, "A" or "B")
    log_odds = logp[..., 0] - logp[..., 1]  # of what is shown first, (pair, order)
    averaged = (log_odds[:, 0] - log_odds[:, 1]) / 2  # of a
    known = ~averaged.isnan()
    if not known.any():
        raise UserError(f"{path} judges no pair: it is broken, or every request is longer than it reads.")
    before, after, n = log_odds[known].mean(), averaged[known], int(known.sum())
    torn = (log_odds[known].sign().prod(1) > 0).double().mean().item()
    print(f'collect: the judge says "A" or "B" with probability {logp[known].exp().sum(-1).mean():.1%}')
    print(
        f"collect: log-odds of preferring what comes first: {before:+.2f} in one order, "
        f"{after.mean():+.2f} ± {after.std(correction=0) / n**0.5:.2f} over both; "
        f"the order alone decides {torn:.1%} of {n:,} pairs"
    )
    return [vote(c, x) for c, x in zip(comparisons, averaged.tolist())]


def decide(comparisons: list[dict], config: Config) -> list[dict]:
    """Comparisons → pair rows: most votes choose a side, and their share is the label's probability.

    Skipped votes do not count. A tie has a "chosen" side too, with probability 1/2.
    """
    pairs = []
    for c in comparisons:
        votes = [vote for vote in c["votes"] if vote["p"] is not None]
        if not votes:
            continue
        p = sum(vote["p"] for vote in votes) / len(votes)
        share = max(p, 1 - p)
        if share < config.min_agreement or (share == 0.5 and not config.soft):
            continue
        chosen, rejected = c["responses"] if p >= 0.5 else reversed(c["responses"])
        meta = {**c["meta"], "annotators": [vote["annotator"] for vote in votes]}
        p_first = meta.pop("p_first", None)
        if len(votes) == 1 and p_first is not None:
            meta["p_chosen"] = p_first if p >= 0.5 else round(1 - p_first, 4)
        soft = {"probability": round(share, 4)} if config.soft and share < 1 else {}
        pairs.append({"prompt": c["prompt"], "chosen": chosen, "rejected": rejected, **soft, "meta": meta})
    return pairs


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


BY_HAND = r'"annotator":\s*"human'  # in a file of votes, whoever has rewritten it


def autosave(path: Path, fresh: bool):
    """→ save(rows), which writes them to `path`, whole or not at all.

    Unless the file is fresh it must be as this process last left or found it: two people who vote on one
    file at the same time would undo each other's votes.
    """

    def state() -> tuple[int, int]:
        return path.stat().st_ino, path.stat().st_mtime_ns

    def save(rows: list[dict]) -> None:
        nonlocal seen
        if seen and seen != state():
            raise UserError(f"{path} was changed by another run: one at a time. --resume goes on from there.")
        write_rows(str(path), rows)
        seen = state()

    seen = None if fresh else state()
    return save


def check_flags(config: Config) -> str:
    """Complain about what cannot work → the kind of annotator."""
    kind, _, which = config.annotator.partition(":")
    if config.steps not in ("", "checker", "rollouts"):
        raise UserError(f"--steps {config.steps} is unknown; choose checker or rollouts.")
    if config.annotator not in ("world", "human") and not (kind in ("human", "rm", "ai") and which):
        raise UserError(
            f"there is no annotator {config.annotator!r}; choose from: world, rm:PATH, ai:PATH, human, "
            "human:NAME."
        )
    if min(config.samples, config.continuations) < 1 or config.count < 0:
        raise UserError("--samples and --continuations must be at least 1, --count not negative.")
    if config.steps and (config.resume or kind != "world"):
        raise UserError("--steps labels steps by itself; leave out --annotator and --resume.")
    if not config.steps and min(config.samples, config.crowd) < 2:
        raise UserError("comparing needs --samples of at least 2 and a --crowd of at least 2.")
    if not 1 <= config.votes <= config.crowd:
        raise UserError(f"--votes {config.votes} must be from 1 to the --crowd of {config.crowd}.")
    if config.min_agreement > 1:
        raise UserError(f"--min-agreement {config.min_agreement} is a share of votes: at most 1.")
    if kind == "human" and not sys.stdin:
        raise UserError("--annotator human has nobody to ask: standard input is closed.")
    if config.resume and kind == "world":
        raise UserError(
            "the world's people vote as responses are sampled; --resume is for human, rm:PATH and ai:PATH."
        )
    return kind


def main(config: Config) -> None:
    kind = check_flags(config)
    principles = read_constitution(config.constitution) if kind == "ai" else []
    device, autocast = setup(config)
    record = Path(config.out).with_suffix(".votes.jsonl")
    if config.resume and not record.exists():
        raise UserError(f"{record} does not exist: there is nothing to resume; leave out --resume.")
    fresh = not config.resume and record.exists()
    if fresh and re.search(BY_HAND, record.read_text("utf-8", errors="replace")):
        raise UserError(f"{record} holds votes by hand: add --resume to keep them, or choose another --out.")
    if config.resume:
        comparisons, save = read_rows(str(record), "compared"), autosave(record, fresh=False)
    else:
        policy, tokenizer, _ = load_policy(config.policy, device, CHAT)
        prompts = read_rows(config.prompts, "prompts", config.skip_bad_rows)
        prompts, ids = prompt_examples(prompts, tokenizer, policy.config.context - 1, config.count)
        if (kind == "world" or config.steps) and not all(map(knows, prompts)):
            raise UserError(
                f"{config.prompts} has rows without the world's meta: its people judge its own prompts only."
            )
        ids = [prompt for prompt in ids for _ in range(config.samples)]
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
        if kind == "world":
            comparisons, thumbs, probabilities = label(prompts, responses, config)
        else:
            comparisons = [
                comparison(row, texts[i], texts[j])
                for row, texts in zip(prompts, responses)
                for i, j in pairings(texts, config.rank)
            ]
        if not comparisons:
            raise UserError("every two responses to a prompt were alike; raise --temperature or --samples.")
        K, save = config.samples, autosave(record, fresh=True)
        alike = len(prompts) * (K * (K - 1) // 2 if config.rank else K // 2) - len(comparisons)
        print(f"collect: {len(comparisons):,} pairs of {len(prompts):,} prompts ({alike:,} more: alike)")

    def pending() -> list[dict]:
        return [c for c in comparisons if all(vote["annotator"] != config.annotator for vote in c["votes"])]

    save(comparisons)
    if kind == "human":
        human.annotate(comparisons, config.annotator, lambda: save(comparisons), config.seed)
    elif kind != "world" and (asked := pending()):
        path = config.annotator.partition(":")[2]
        with autocast:
            if kind == "rm":
                votes = rm_votes(path, asked, device)
            else:
                votes = ai_votes(path, asked, device, principles, config.seed)
        for c, p in zip(asked, votes):
            c["votes"].append({"annotator": config.annotator, "p": p})
    save(comparisons)

    if any(c["votes"] for c in comparisons):
        report(comparisons)
    if kind != "human" and all(map(knows, comparisons)):
        against_judge(comparisons, config.annotator)
    pairs = decide(comparisons, config)
    if kind == "human" and pending():
        print(f"collect: {len(pending()):,} pairs wait in {record}: --resume goes on with them")
    if kind == "human" and not pairs:
        return
    if not pairs:
        raise UserError(
            f"no pair to write: no votes in {record} yet, or ties, or --min-agreement is too high."
        )
    write_rows(config.out, pairs)
    print(f"collect: labels of {len(pairs):,} of {len(comparisons):,} pairs → {config.out}")
    if kind == "world":
        write_rows(str(Path(config.out).with_suffix(".thumbs.jsonl")), thumbs)
        up = sum(row["label"] for row in thumbs)
        print(f"collect: {up:,} thumbs up, {len(thumbs) - up:,} down")
        print(f"collect: two people agree on {agreement(probabilities):.1%} of pairs (expected, exact)")
        if config.votes == 1:
            best = ceiling([sum(p) / len(p) for p in probabilities])
            print(f"collect: no reward model can exceed {best:.1%} accuracy on these labels (ceiling, exact)")


if __name__ == "__main__":
    if sys.stdin:  # None where it is closed
        sys.stdin.reconfigure(errors="replace")  # a terminal may send what is not UTF-8
    cli.run(main, Config, __doc__)
