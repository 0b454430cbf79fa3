"""How much goes through the models of a run at one time, at most: what memory.py multiplies shapes with."""

from typing import NamedTuple

import numpy as np

from nanoalign.pieces import micro_batches

READ = {"rm": 256, "prm": 128}  # sequences read at once without gradient; else --batch-size examples
ASKED = {"rm": 0, "prm": 0, "base": 1, "dpo": 128, "kto": 128}  # held-out prompts answered at once; else 4


class Batch(NamedTuple):
    """What goes through the models. Sequences of one prompt are one row, which it opens, once."""

    rows: int  # of the largest micro-batch
    length: int  # tokens of its longest row
    apart: int  # tokens of its sequences, each laid out on its own, with padding
    scored: int  # tokens whose log-prob is asked for, with gradient
    pieces: int  # micro-batches of an optimiser step
    read: int  # tokens read at once without gradient
    beside: int  # hidden states that are kept meanwhile
    judged: int  # tokens whose log-prob is then asked for
    told: int  # and of which a reader says how likely it finds them
    drawn: int  # answers sampled at once
    asked: int  # tokens of their prompts
    slots: int  # tokens of the longest prompt and its answer


def sides(example) -> list[tuple[np.ndarray, np.ndarray]]:
    """An example of any method → its sequences: ids, and which of them are scored."""
    if isinstance(example, np.ndarray):  # of plain text
        return [(example, np.arange(len(example)) > 0)]
    if isinstance(example[0], np.ndarray):
        return [(example[0], example[-1])]
    return [side for part in example if isinstance(part, (tuple, list)) for side in sides(part)]


def counted(example) -> tuple[int, ...]:
    """→ how many sequences; tokens of the longest, of all in one row, of the prompt; scored ones."""
    own = sides(example)
    lengths, prompt = [len(ids) for ids, _ in own], int(own[0][1].argmax())
    whole = sum(lengths) - (len(own) - 1) * prompt
    return len(own), max(lengths), whole, prompt, sum(int(mask.sum()) for _, mask in own)


def off_policy(config, stage: str, order, examples: list, steps: int) -> Batch:
    """The largest batch of the first epoch of a run that trains on given examples."""
    count, longest, whole, prompt, scored = np.array([counted(example) for example in examples]).T
    scored = whole if getattr(config, "nll", "") == "all" else scored  # ORPO, of the chosen side
    scored = scored * bool(getattr(config, "lm_weight", stage != "rm"))
    cost, split = longest * count, []
    for i in map(order.__getitem__, range(min(steps, order.steps_per_epoch))):
        split.append(micro_batches(i, config.micro_batch, cost[i], config.micro_tokens))
    i = max((i for step in split for i in step), key=lambda i: len(i) * whole[i].max())
    packed = getattr(config, "packing", False)
    rows, length = (1, whole[i].sum()) if packed else (len(i), whole[i].max())

    held = 10**6 if config.eval_data else len(examples) // 19 + 1  # held-out rows: one in twenty
    there = count.sum() if stage == "rm" else held * count.max()  # rm scores what it was trained on
    together = min(READ.get(stage, config.batch_size * count.max()), there)
    drawn, new = min(held, ASKED.get(stage, 4)), getattr(config, "max_new_tokens", 96)
    slots = prompt.max() + new
    read = max(together * longest.max(), drawn * slots)
    judged = max(-(-together // count.max()) * scored.max(), drawn * new)
    pieces, apart = max(map(len, split)), count[i].sum() * longest[i].max()
    learnt = rows, length, apart, scored[i].sum(), pieces
    return Batch(*learnt, read, 0, judged, read, drawn, drawn * prompt.max(), slots)


def on_policy(config, lengths: np.ndarray) -> Batch:
    """The largest batch of PPO and GRPO, whose answers are as long as they may be. lengths: of prompts."""
    prompt, new, group = lengths.max(), config.max_new_tokens, getattr(config, "group_size", 1)
    batch, T, n = config.batch_size, prompt + new, min(config.minibatch, config.batch_size)
    pieces = micro_batches(np.arange(n), config.micro_batch, np.full(n, T), config.micro_tokens)
    n, own = len(pieces[0]), min(config.micro_batch or batch, batch)
    G, packed = min(n, group), batch // group * (prompt + group * new)  # answers to a prompt share it
    learnt = -(-n // G), prompt + G * new, n * T, n * new, len(pieces)
    read, kept = (packed, 1) if group > 1 else (own * T, 1 + (own < batch))  # of PPO, of policy and critic
    told = batch * new + batch // group * lengths.mean()
    return Batch(*learnt, read, kept * batch * T, batch * new, told, batch, batch // group * prompt, T)


def largest(config, stage: str, order, examples: list, steps: int) -> Batch:
    """The largest batch of a run's first epoch. order: of the examples, or of PPO's and GRPO's prompts."""
    if hasattr(config, "minibatch"):
        return Batch(*map(int, on_policy(config, order.lengths)))
    return Batch(*map(int, off_policy(config, stage, order, examples, steps)))
