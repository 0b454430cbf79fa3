"""Constitutional AI, first phase: a model criticises its own answers by principles, and revises them.

    y₀ ~ π(· | x)      c_k ~ π(· | x, y_{k−1}, p_k)      y_k ~ π(· | x, y_{k−1}, p_k, c_k)      k = 1 … rounds

with a principle p_k drawn from a constitution for every prompt and round (SL-CAI: Bai et al. 2022, §3.1).
SFT on (x, y_rounds) then teaches a model to answer at once as it would after all that thought:

    make out/demo/assistant.pt                                     # the built-in world's assistant
    python critique.py
    python train_sft.py --data out/demo/revisions.jsonl --init out/demo/assistant.pt --out out/demo/sl-cai.pt
    python critique.py --policy chat.pt --prompts mine.jsonl --constitution mine.txt --out new.jsonl

It writes chat rows {"messages", "meta"} of the last revisions, and to X.trail.jsonl how they came about:
{"prompt", "response", "rounds": [{"principle", "critique", "revision"}…], "ended", "meta"}. A critique or
revision that is empty, cut short or for which the context has no room is null there and changes nothing;
an answer that is still cut short in the end is no row to learn from.

The wording is that of nanoalign/feedback.py. Deviations: the answer is quoted in the request instead of
standing in the conversation as the assistant's turn, and there are no few-shot examples: the model has been
taught the task (the world's assistant.pt), or knows it as any instructed model does. On the world's prompts
the exact judge's utility is printed round by round: what the revisions are worth is known.
"""

import random
from dataclasses import dataclass
from pathlib import Path

from nanoalign import UserError, cli
from nanoalign.checkpoint import CHAT, load_policy
from nanoalign.data import prompt_examples
from nanoalign.feedback import ask_for_critique, ask_for_revision, read_constitution
from nanoalign.generate import respond
from nanoalign.rows import read_rows, write_rows
from nanoalign.training import setup
from nanoalign.world.judge import judge, knows


@dataclass
class Config:
    policy: str = "out/demo/assistant.pt"  # the checkpoint that answers, criticises and revises
    prompts: str = "out/demo/world/prompts.jsonl"  # prompt rows
    constitution: str = "constitution.txt"  # the principles, one a line; # begins a comment
    out: str = "out/demo/revisions.jsonl"  # chat rows of the last revisions; the way there: X.trail.jsonl
    rounds: int = 2  # critiques and revisions of each answer, by a principle drawn anew; 0: none, a control
    count: int = 0  # how many of the prompts; 0: all
    max_new_tokens: int = 96  # length limit of an answer, a critique and a revision
    temperature: float = 0.7  # of sampling; 0: greedy
    top_k: int = 0  # sample from the k likeliest tokens only; 0: from all
    top_p: float = 1.0  # sample from the likeliest tokens that together have this probability
    seed: int = 0  # of sampling, and of the principles that are drawn
    device: str = "auto"  # auto, cpu, cuda, …
    skip_bad_rows: bool = False  # drop and count malformed rows instead of stopping


def whole(policy, tokenizer, asked: list[list[dict] | None], **options) -> list[str | None]:
    """Conversations → the model's replies; None for one that is empty, cut short or has no room, and where
    nothing is asked."""
    ids = {i: tokenizer.prompt(messages) for i, messages in enumerate(asked) if messages}
    ids = {i: prompt for i, prompt in ids.items() if len(prompt) < policy.config.context}
    replies: list[str | None] = [None] * len(asked)
    for i, text, ended in zip(ids, *respond(policy, tokenizer, list(ids.values()), **options)):
        replies[i] = text if ended and text.strip() else None
    return replies


def revise(
    policy, tokenizer, rows: list[dict], answers: list[str], principles: list[str], seed: int, **options
):
    """One round, each answer by its own principle → {"principle", "critique", "revision"} of each."""
    asked = [ask_for_critique(row["prompt"], *both) for row, *both in zip(rows, answers, principles)]
    critiques = whole(policy, tokenizer, asked, seed=seed, **options)
    asked = [critique and ask_for_revision(a, critique) for a, critique in zip(asked, critiques)]
    revisions = whole(policy, tokenizer, asked, seed=seed + 1, **options)
    return [
        {"principle": principle, "critique": critique, "revision": revision}
        for principle, critique, revision in zip(principles, critiques, revisions)
    ]


def show(what: str, rows: list[dict], answers: list[str], ended: list[bool]) -> None:
    """Print what happened, and of the world's prompts what the exact judge thinks of the answers."""
    if all(map(knows, rows)):
        values = [judge(row, text, end).utility for row, text, end in zip(rows, answers, ended)]
        what += f"; the judge's utility {sum(values) / len(values):+.3f}"
    print(f"critique: {what}")


def main(config: Config) -> None:
    principles, rng = read_constitution(config.constitution), random.Random(f"principles-{config.seed}")
    device, autocast = setup(config)
    policy, tokenizer, _ = load_policy(config.policy, device, CHAT)
    rows = read_rows(config.prompts, "prompts", config.skip_bad_rows)
    rows, prompts = prompt_examples(rows, tokenizer, policy.config.context - 1, config.count)
    trail = str(Path(config.out).with_suffix(".trail.jsonl"))
    options = {
        "max_new_tokens": config.max_new_tokens, "temperature": config.temperature,
        "top_k": config.top_k, "top_p": config.top_p,
    }  # fmt: skip

    with autocast:
        answers, ended = respond(policy, tokenizer, prompts, seed=config.seed, what="answer", **options)
        show(f"{len(rows):,} first answers", rows, answers, ended)
        trails = [
            {"prompt": row["prompt"], "response": y, "rounds": [], "ended": end, "meta": row["meta"]}
            for row, y, end in zip(rows, answers, ended)
        ]
        write_rows(trail, trails)
        for k in range(1, config.rounds + 1):
            drawn, options["what"] = rng.choices(principles, k=len(rows)), f"round {k} of {config.rounds}"
            steps = revise(policy, tokenizer, rows, answers, drawn, config.seed + 2 * k - 1, **options)
            if all(step["critique"] is None for step in steps):
                raise UserError(
                    f"round {k} brought no whole critique: {config.policy} never ends one, or prompt, answer "
                    f"and principle leave no room in its context of {policy.config.context} tokens."
                )
            changed = sum(step["revision"] not in (None, y) for step, y in zip(steps, answers))
            failed = sum(step["revision"] is None for step in steps)
            for i, step in enumerate(steps):
                trails[i]["rounds"].append(step)
                if step["revision"] is not None:
                    answers[i], ended[i], trails[i]["ended"] = step["revision"], True, True
            write_rows(trail, trails)  # whatever becomes of the next round
            show(f"round {k}: {changed:,} changed, {failed:,} without a whole revision", rows, answers, ended)

    learnt = [
        {"messages": [*row["prompt"], {"role": "assistant", "content": answer}], "meta": row["meta"]}
        for row, answer, end in zip(rows, answers, ended)
        if end and answer.strip()
    ]
    if not learnt:
        raise UserError(f"every answer is empty or cut short: nothing to learn from; see {trail}.")
    write_rows(config.out, learnt)
    print(f"critique: {len(learnt):,} of {len(rows):,} answers → {config.out}; how they came about → {trail}")


if __name__ == "__main__":
    cli.run(main, Config, __doc__)
