"""Collect preferences: sample K responses a prompt from a policy, and have an annotator compare them.

    P(a ≻ b) = σ((u(a) − u(b)) / noise)                       (Bradley & Terry 1952; InstructGPT §3.4)

    python collect.py                                          # the built-in world's people
    python collect.py --annotator rm:out/demo/rm.pt --out out/demo/by_rm.jsonl # a reward model
    python collect.py --annotator ai:out/demo/assistant.pt --out out/demo/by_ai.jsonl
    python collect.py --annotator rm:out/demo/rm.pt --resume   # one more vote on the same pairs
    python collect.py --annotator human --samples 2 --count 50 --out mine.jsonl    # then lab/annotate.py asks

It writes pair rows {"prompt", "chosen", "rejected", "meta"}; where votes differ, a soft label: the chosen
side's share of them as "probability". Every vote goes to X.votes.jsonl (lab/agreement.py reads it).

`rm:PATH`: a reward model's own probability σ(r_a − r_b). `ai:PATH`: a chat model's, asked "A or B?" by a
principle drawn from a constitution for every pair, in both orders (RLAIF; see nanoalign/feedback.py). With
--own w it also weighs w times which of the two it would rather have written itself. To both kinds an
unfinished response loses to a finished one.

`file.py:function`: an annotator of your own, in a Python file, which is code and is run as such.

    def shorter(rows, drawn, pairs, flags):     # drawn[n]: K responses (text, ended) to the prompt rows[n]
        compared = [c for row, texts in zip(rows, drawn) for i, j, c in pairs(row, texts)]
        for c in compared:                      # the comparison of texts[i] and texts[j]
            a, b = c["responses"]
            c["votes"].append({"annotator": "shorter", "p": float(len(a) < len(b))})    # P(a is better)
        return compared, []                     # and thumbs up and down {"prompt", "completion", "label"}

It is called before sampling too, with nothing drawn, to refuse rows that it cannot judge. `world` is such a
function, nanoalign/world/people.py:compare: people whose biases differ, drawn for each prompt from a crowd.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import combinations
from pathlib import Path

from nanoalign import UserError, cli, parallel
from nanoalign.checkpoint import load_policy, load_scalar
from nanoalign.data import prompt_examples
from nanoalign.feedback import ai_votes, read_constitution, vote
from nanoalign.files import beside
from nanoalign.rewards import load_function, model_reward, score_compared
from nanoalign.rollouts import respond
from nanoalign.rows import parse_compared, read_rows, write_rows
from nanoalign.training import setup

ALIASES = {"world": "nanoalign/world/people.py:compare"}
Response = tuple[str, bool]  # its text, and whether it ended by itself


@dataclass
class Config:
    policy: str = "out/demo/sft.pt"  # the checkpoint to sample from
    prompts: str = "out/demo/world/prompts.jsonl"  # prompt rows
    out: str = "out/demo/pairs.jsonl"  # pair rows; votes go to X.votes.jsonl, thumbs to X.thumbs.jsonl
    annotator: str = "world"  # who compares: world, rm:PATH, ai:PATH, human or file.py:function
    constitution: str = "constitution.txt"  # of ai:PATH: the principles, one a line
    own: float = 0.0  # of ai:PATH: the weight of its own odds of writing the one, not the other
    crowd: int = 5  # how many different people the world has
    votes: int = 1  # how many of them compare the responses to each prompt
    min_agreement: float = 0.0  # leave out pairs on which fewer of the votes agree
    soft: bool = True  # that share is the label's "probability"; --no-soft: no ties, all certain
    resume: bool = False  # vote on what is in X.votes.jsonl, where the annotator has not
    samples: int = 4  # responses per prompt (K)
    count: int = 0  # how many of the prompts; 0: all
    rank: bool = True  # compare all K: K(K−1)/2 pairs a prompt; --no-rank: pair them off, K/2
    max_new_tokens: int = 96  # length limit of a response
    temperature: float = 0.7  # below 1: fewer blunders, closer comparisons
    top_k: int = 0  # sample from the k likeliest tokens only; 0: from all
    top_p: float = 1.0  # sample from the likeliest tokens of this probability together
    seed: int = 0  # of sampling, pairing and labels
    device: str = "auto"  # auto, cpu, cuda, …
    skip_bad_rows: bool = False  # drop and count malformed rows instead of stopping
    fields: str = ""  # other field names: prompt=instruction,completion=output

    beside_out = (".votes.jsonl", ".thumbs.jsonl")


# ------------------------------------------------------------------------------------------- comparisons


def sample(policy, tokenizer, ids: list, config) -> list[list[Response]]:
    """Prompts (ids) → K responses to each."""
    K, ids = config.samples, [prompt for prompt in ids for _ in range(config.samples)]
    flags = ("max_new_tokens", "temperature", "top_k", "top_p", "seed")
    options = {name: getattr(config, name) for name in flags}
    drawn = list(zip(*respond(policy, tokenizer, ids, what="collect", **options)))
    return [drawn[i : i + K] for i in range(0, len(drawn), K)]


def pairings(row: dict, drawn: list[Response], rank: bool) -> list[tuple[int, int, dict]]:
    """What is compared of the responses to a prompt: every two, or neighbours; two alike never are → (i, j,
    comparison of the i-th and the j-th) of each pair."""
    K = len(drawn)
    neighbours = zip(range(0, K - 1, 2), range(1, K, 2))
    candidates = combinations(range(K), 2) if rank else neighbours
    unlike = [(i, j) for i, j in candidates if drawn[i][0] != drawn[j][0]]
    return [(i, j, comparison(row, drawn[i], drawn[j])) for i, j in unlike]


def comparison(row: dict, a: Response, b: Response, votes=(), **meta) -> dict:
    """Two responses to a prompt → a row of kind "compared" (nanoalign/rows.py)."""
    texts, ended = zip(a, b)
    return {
        "prompt": row["prompt"],
        "responses": list(texts),
        "ended": list(ended),
        "votes": list(votes),
        "meta": {**row["meta"], **meta},
    }


def unjudged(rows, drawn, pairs, flags):
    """The annotator that leaves all comparisons open, to those who vote on them afterwards."""
    return [c for row, texts in zip(rows, drawn) for _, _, c in pairs(row, texts)], []


def call(annotate: Callable, rows: list, drawn: list, config) -> tuple[list, list]:
    """An annotator's function (see the module's docstring) → comparisons, thumbs up and down."""
    pairs = partial(pairings, rank=config.rank)
    try:
        comparisons, thumbs = annotate(rows, drawn, pairs, config)
        return list(map(parse_compared, comparisons)), thumbs
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{config.annotator} failed: {type(error).__name__}: {error}.") from error


def rm_votes(path: str, comparisons: list[dict], device) -> list[float | None]:
    """A reward model's P(first is better) = σ(r_a − r_b) for each comparison; None if the prompt is too long.

    The checkpoint's scores are normalised: times their "std" their difference is in nats again.
    """
    model, tokenizer, checkpoint = load_scalar(path, device)
    if "normalisation" not in checkpoint:
        raise UserError(f"{path} is unfinished and its scores have no scale: resume its training.")
    context = model.config.context
    scores = score_compared(model_reward(model), comparisons, tokenizer, context, device, "judge")
    if scores.isnan().all():
        raise UserError(f"{path} scores no response: it is broken, or every prompt is longer than it reads.")
    r = checkpoint["normalisation"]["std"] * scores  # (N, 2)
    return list(map(vote, comparisons, (r[:, 0] - r[:, 1]).tolist()))


def decide(comparisons: list[dict], min_agreement=0.0, soft=True) -> list[dict]:
    """Comparisons → pair rows: most votes choose a side, and their share is the label's probability.

    Skipped votes do not count. A tie has a "chosen" side too, with probability 1/2.
    """
    pairs = []
    for c in comparisons:
        votes = [vote for vote in c["votes"] if vote["p"] is not None]
        p = sum(vote["p"] for vote in votes) / max(1, len(votes))
        share = max(p, 1 - p)
        if not votes or share < min_agreement or (share == 0.5 and not soft):
            continue
        chosen, rejected = c["responses"] if p >= 0.5 else reversed(c["responses"])
        pair = {"prompt": c["prompt"], "chosen": chosen, "rejected": rejected}
        if soft and share < 1:
            pair["probability"] = round(share, 4)
        meta = {**c["meta"], "annotators": [vote["annotator"] for vote in votes]}
        p_first = meta.pop("p_first", None)
        if len(votes) == 1 and p_first is not None:
            meta["p_chosen"] = p_first if p >= 0.5 else round(1 - p_first, 4)
        pairs.append({**pair, "meta": meta})
    return pairs


# ------------------------------------------------------------------------------------------------- a run


def check_flags(config: Config, record: Path) -> tuple[str, str]:
    """Complain about what cannot work → the kind of annotator, and where it is."""
    who = ALIASES.get(config.annotator, config.annotator)
    kind, _, path = who.partition(":")
    if ".py:" in who:
        kind, path = "function", who
    if who != "human" and not (kind in ("rm", "ai", "function") and path):
        known = "world, rm:PATH, ai:PATH, human or file.py:function"
        raise UserError(f"there is no annotator {who!r}; choose {known}.")
    if config.samples < 2 or config.count < 0:
        raise UserError("comparing needs --samples of at least 2; --count is not negative.")
    if config.min_agreement > 1:
        raise UserError(f"--min-agreement {config.min_agreement} is a share of votes: at most 1.")
    if config.own and not (kind == "ai" and config.own > 0):
        raise UserError("--own is a weight above 0, of ai:PATH.")
    if config.resume and kind not in ("rm", "ai"):
        raise UserError("--resume is for rm:PATH and ai:PATH; you vote by python -m lab.annotate.")
    if config.resume and not record.exists():
        raise UserError(f"{record} does not exist: there is nothing to resume.")
    by_hand = r'"annotator":\s*"human'  # whoever has rewritten the file
    if not config.resume and re.search(by_hand, content(record)):
        raise UserError(f"{record} holds votes by hand: add --resume, or choose another --out.")
    return kind, path


def content(record: Path) -> str:
    return record.read_text("utf-8", errors="replace") if record.exists() else ""


def collect(config: Config, function: str, device) -> tuple[list, list]:
    """Sample responses → comparisons, with the function's votes if there is one; thumbs up and down."""
    policy, tokenizer, _ = load_policy(config.policy, device, chat=True)
    rows = read_rows(config.prompts, "prompts", config.skip_bad_rows, config.fields)
    rows, ids = prompt_examples(rows, tokenizer, policy.config.context - 1, config.count)
    annotate = load_function(function) if function else unjudged
    call(annotate, rows, [], config)  # what it refuses, it refuses before the work
    drawn = sample(policy, tokenizer, ids, config)
    comparisons, thumbs = call(annotate, rows, drawn, config)
    if not comparisons:
        raise UserError("every two responses to a prompt were alike; raise --temperature or --samples.")
    K = config.samples
    alike = len(rows) * (K * (K - 1) // 2 if config.rank else K // 2) - len(comparisons)
    print(f"collect: {len(comparisons):,} pairs of {len(rows):,} prompts ({alike:,} more: alike)")
    return comparisons, thumbs


def main(config: Config) -> None:
    record = beside(config.out, ".votes.jsonl")
    kind, path = check_flags(config, record)
    principles = read_constitution(config.constitution) if kind == "ai" else []
    device, autocast = setup(config)
    if config.resume:
        comparisons, thumbs = read_rows(str(record), "compared"), []
    else:
        with autocast:
            comparisons, thumbs = collect(config, path if kind == "function" else "", device)
        write_rows(str(record), comparisons)  # whatever becomes of the votes
    if kind == "human":
        print(f"collect: {len(comparisons):,} pairs wait in {record}; to vote on them:")
        print(f"python -m lab.annotate --votes {record} --out {config.out}")
        return

    before = content(record)
    who = config.annotator + (f" --own {config.own:g}" if config.own else "")
    asked = [c for c in comparisons if all(vote["annotator"] != who for vote in c["votes"])]
    if asked and kind in ("rm", "ai"):
        with autocast:
            if kind == "rm":
                votes = rm_votes(path, asked, device)
            else:
                votes = ai_votes(path, asked, device, principles, config.seed, config.own)
        for c, p in zip(asked, votes):
            c["votes"].append({"annotator": who, "p": p})
        if parallel.meet(content(record) != before):
            raise UserError(f"{record} was changed by another run: one at a time; --resume goes on.")
        write_rows(str(record), comparisons)

    pairs = decide(comparisons, config.min_agreement, config.soft)
    if not pairs:
        raise UserError("no pair to write: all are ties or skipped, or --min-agreement is too high.")
    write_rows(config.out, pairs)
    print(f"collect: labels of {len(pairs):,} of {len(comparisons):,} pairs → {config.out}")
    if thumbs:
        up = sum(row["label"] for row in thumbs)
        write_rows(str(beside(config.out, ".thumbs.jsonl")), thumbs)
        print(f"collect: {up:,} thumbs up, {len(thumbs) - up:,} down")


if __name__ == "__main__":
    cli.run(main, Config, __doc__, shared=True)
