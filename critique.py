"""Constitutional AI, first phase: a model criticises its own answers by principles, and revises them.

    y₀ ~ π(· | x)      c_k ~ π(· | x, y_{k−1}, p_k)      y_k ~ π(· | x, y_{k−1}, p_k, c_k)      k = 1 … rounds

with a principle p_k drawn from a constitution for every prompt and round (SL-CAI: Bai et al. 2022, §3.1).
SFT on (x, y_rounds) then teaches a model to answer at once as it would after all that thought:

    make out/demo/assistant.pt                                     # the built-in world's assistant
    python critique.py --watch judge
    python train_sft.py --data out/demo/revisions.jsonl --init out/demo/assistant.pt --out out/demo/sl-cai.pt
    python critique.py --policy chat.pt --prompts mine.jsonl --constitution mine.txt --out new.jsonl

It writes chat rows {"messages", "meta"} of the last revisions, and to X.trail.jsonl how they came about:
{"prompt", "response", "rounds": [{"principle", "critique", "revision"}…], "ended", "meta"}. A critique or
revision that is empty, cut short or for which the context has no room is null there and changes nothing;
an answer that is still cut short in the end is no row to learn from.

The wording is that of nanoalign/feedback.py. Deviations: the answer is quoted in the request instead of
standing in the conversation as the assistant's turn, and there are no few-shot examples: the model has been
taught the task (the world's assistant.pt), or knows it as any instructed model does.

--watch prints a reward's mean round by round: with the world's exact judge, what the revisions are worth.
"""

import random
from dataclasses import dataclass

from nanoalign import UserError, cli
from nanoalign.answers import check_answers
from nanoalign.checkpoint import load_policy
from nanoalign.data import prompt_examples
from nanoalign.feedback import ask_for_critique, ask_for_revision, read_constitution
from nanoalign.files import beside
from nanoalign.rewards import make_reward, score_texts
from nanoalign.rollouts import respond
from nanoalign.rows import read_rows, write_rows
from nanoalign.seeds import derived_seed
from nanoalign.training import setup


@dataclass
class Config:
    policy: str = "out/demo/assistant.pt"  # who answers, criticises and revises
    prompts: str = "out/demo/world/prompts.jsonl"  # prompt rows
    constitution: str = "constitution.txt"  # the principles, one a line
    out: str = "out/demo/revisions.jsonl"  # chat rows of the last revisions; the way: X.trail.jsonl
    rounds: int = 2  # of critique and revision, by a principle drawn anew; 0: none
    watch: str = ""  # a reward whose mean is printed round by round; judge: the world's
    count: int = 0  # how many of the prompts; 0: all
    max_new_tokens: int = 96  # length limit of an answer, critique or revision
    temperature: float = 0.7  # of sampling; 0: greedy
    top_k: int = 0  # from the k likeliest tokens only; 0: from all
    top_p: float = 1.0  # from the likeliest tokens of this probability together
    seed: int = 0  # of sampling, and of the principles drawn
    device: str = "auto"  # auto, cpu, cuda, …
    skip_bad_rows: bool = False  # drop and count malformed rows instead of stopping
    fields: str = ""  # other field names: prompt=instruction,completion=output

    beside_out = (".trail.jsonl",)


def whole(policy, tokenizer, asked: list, **options) -> list[str | None]:
    """Conversations, or None → the model's replies; None where one is empty, cut short or has no room."""
    ids = {i: tokenizer.prompt(messages) for i, messages in enumerate(asked) if messages}
    ids = {i: prompt for i, prompt in ids.items() if len(prompt) < policy.config.context}
    replies = [None] * len(asked)
    for i, text, ended in zip(ids, *respond(policy, tokenizer, list(ids.values()), **options)):
        replies[i] = text if ended and text.strip() else None
    return replies


def revise(policy, tokenizer, rows, answers, principles, seed: int, **options):
    """One round, each answer by its own principle → {"principle", "critique", "revision"} of each."""
    asked = [ask_for_critique(row["prompt"], *x) for row, *x in zip(rows, answers, principles)]
    critiques = whole(policy, tokenizer, asked, seed=seed, **options)
    asked = [said and ask_for_revision(a, said) for a, said in zip(asked, critiques)]
    revisions = whole(policy, tokenizer, asked, seed=derived_seed(seed, "revision"), **options)
    names = ("principle", "critique", "revision")
    return [dict(zip(names, step)) for step in zip(principles, critiques, revisions)]


def main(config: Config) -> None:
    principles = read_constitution(config.constitution)
    rng = random.Random(f"principles-{config.seed}")
    device, autocast = setup(config)
    policy, tokenizer, _ = load_policy(config.policy, device, chat=True)
    context = policy.config.context
    reward = make_reward(config.watch, tokenizer, device) if config.watch else None
    rows = read_rows(config.prompts, "prompts", config.skip_bad_rows, config.fields)
    rows, prompts = prompt_examples(rows, tokenizer, context - 1, config.count)
    check_answers(config.watch, rows)
    trail = str(beside(config.out, ".trail.jsonl"))
    flags = ("max_new_tokens", "temperature", "top_k", "top_p")
    options = {name: getattr(config, name) for name in flags}

    def show(what: str) -> None:
        worth = ""
        if reward:
            scores = score_texts(reward, rows, answers, tokenizer, context, device, ended=ended)
            worth = f"; {config.watch} {scores.nanmean():+.3f}"
        print(f"critique: {what}{worth}")

    with autocast:
        first = {"seed": config.seed, "what": "answer", **options}
        answers, ended = respond(policy, tokenizer, prompts, **first)
        show(f"{len(rows):,} first answers")
        trails = [
            {"prompt": row["prompt"], "response": y, "rounds": [], "ended": end, "meta": row["meta"]}
            for row, y, end in zip(rows, answers, ended)
        ]
        write_rows(trail, trails)
        for k in range(1, config.rounds + 1):
            drawn = rng.choices(principles, k=len(rows))
            options["seed"] = derived_seed(config.seed, "round", k)
            options["what"] = f"round {k} of {config.rounds}"
            steps = revise(policy, tokenizer, rows, answers, drawn, **options)
            if all(step["critique"] is None for step in steps):
                raise UserError(
                    f"round {k} brought no whole critique: {config.policy} never ends one, or prompt, "
                    f"answer and principle leave no room in its context of {context} tokens."
                )
            revisions = [step["revision"] for step in steps]
            failed, changed = revisions.count(None), 0
            for i, new in enumerate(revisions):
                trails[i]["rounds"].append(steps[i])
                if new is not None:
                    changed += new != answers[i]
                    answers[i], ended[i] = new, True
                    trails[i]["ended"] = True
            write_rows(trail, trails)  # whatever becomes of the next round
            show(f"round {k}: {changed:,} changed, {failed:,} without a whole revision")

    learnt = []
    for row, y, end in zip(rows, answers, ended):
        if end and y.strip():
            messages = [*row["prompt"], {"role": "assistant", "content": y}]
            learnt.append({"messages": messages, "meta": row["meta"]})
    if not learnt:
        raise UserError(f"every answer is empty or cut short: nothing to learn from; see {trail}.")
    write_rows(config.out, learnt)
    print(f"critique: {len(learnt):,} of {len(rows):,} answers → {config.out}")
    print(f"critique: how they came about → {trail}")


if __name__ == "__main__":
    cli.run(main, Config, __doc__)
