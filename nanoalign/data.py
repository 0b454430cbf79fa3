"""Rows → examples → right-padded batches with masks.

An example is (ids, mask): int64 token ids (T,) and a bool mask (T,), true where scored.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Callable
from itertools import takewhile

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from nanoalign import UserError
from nanoalign.answers import check_answers
from nanoalign.rows import read_rows
from nanoalign.seeds import derived_seed
from nanoalign.tokenizer import Tokenizer

Example = tuple[np.ndarray, np.ndarray]
HELD_OUT = 0.05  # the share of prompts that no stage trains on


def prompt_key(row: dict) -> str:
    """What rows of one prompt have in common: all messages but the last answer; of a text, all of it."""
    return json.dumps(row.get("prompt") or row.get("messages", [])[:-1] or row)


def opening(row: dict) -> list[str]:
    """What decides on which side of the split a row is: the messages before the first answer, so that a
    conversation is on the side of its beginning; of a text, all of it."""
    messages = row.get("prompt") or row.get("messages")
    if not messages:
        return [row["text"].strip()]
    asked = list(takewhile(lambda m: m["role"] != "assistant", messages)) or messages[:1]
    return [part for m in asked for part in (m["role"], m["content"].strip())]


def place(row: dict) -> float:
    """The place in [0, 1) that a hash gives to a row's opening."""
    digest = hashlib.sha256(json.dumps(opening(row)).encode()).digest()
    return int.from_bytes(digest[:6], "big") / 2**48


def held_out(prompt: str | list[dict]) -> bool:
    """Is the prompt, a string or messages, set aside? One in twenty is, picked by a hash: the same in every
    file, stage and run, so that what a model is evaluated on no stage before it has trained on."""
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    return place({"prompt": messages}) < HELD_OUT


def split_rows(rows: list[dict], path: str) -> tuple[list[dict], list[dict]]:
    """Rows of the file `path` → those to train on, and the held-out ones (`held_out`).

    Where the hash picks none, the row nearest to it is held out. Prints that, and warns of a prompt that has
    more than a tenth of the rows.
    """
    openings = [json.dumps(opening(row)) for row in rows]
    places = {own: place(row) for own, row in zip(openings, rows)}
    first = min(places.values())
    if len(places) < 2 or all(p < HELD_OUT for p in places.values()):
        which = "a single prompt" if len(places) < 2 else "only prompts that are held out everywhere"
        raise UserError(f"{path} has {which}: it cannot be split; name held-out rows with --eval-data.")
    if first >= HELD_OUT:
        print(f"data: {path} has too few prompts for one in twenty; one is held out, in this stage alone")
    most, count = Counter(openings).most_common(1)[0]
    if count > max(1, len(rows) / 10):
        side = "held out" if places[most] <= max(first, HELD_OUT) else "trained on"
        asked = opening(rows[openings.index(most)])[-1][:60]
        print(f"warning: {count:,} of {len(rows):,} rows in {path} ask or say the same, {side}: {asked!r}")
    out = [places[own] < HELD_OUT or places[own] == first for own in openings]
    return [r for r, o in zip(rows, out) if not o], [r for r, o in zip(rows, out) if o]


def read_split(config, path: str, kind: str, most: int = 10**9) -> tuple[list[dict], list[dict]]:
    """The rows of `path` to train on, and the held-out rows, `most` of them: --eval-data's or some of its."""
    rows = read_rows(path, kind, config.skip_bad_rows, config.fields)
    if not config.eval_data:
        rows, eval_rows = split_rows(rows, path)
        return rows, thin(eval_rows, most)
    eval_rows = thin(read_rows(config.eval_data, kind, config.skip_bad_rows, config.fields), most)
    asked = {json.dumps(opening(row)) for row in rows}
    if shared := sum(json.dumps(opening(row)) in asked for row in eval_rows):
        print(f"warning: the prompts of {shared:,} of {len(eval_rows):,} held-out rows are trained on, too")
    return rows, eval_rows


def one_per_prompt(rows: list[dict]) -> list[dict]:
    """The rows, but only one of each prompt."""
    return list({prompt_key(row): row for row in rows}.values())


def questions(rows: list[dict], tokenizer: Tokenizer, max_length: int, count: int = 128) -> tuple[list, list]:
    """One row of each prompt that `max_length` leaves room to answer, `count` at most, and their ids. Prints
    how many are left out: a prompt without its beginning would be another one."""
    rows = one_per_prompt(rows)
    asked = [(row, tokenizer.prompt(row["prompt"])) for row in rows]
    kept = [(row, ids) for row, ids in asked if len(ids) < max_length]
    if len(kept) < len(rows):
        left = f"{len(rows) - len(kept):,} of {len(rows):,} held-out prompts are not answered"
        print(f"data: {left}: no room in {max_length} tokens")
    kept = thin(kept, count)
    return [row for row, _ in kept], [ids for _, ids in kept]


def without_ties(pairs: list[dict], part: str = "training") -> list[dict]:
    """The pairs but for those of probability 1/2, in which no side is right. Prints how many those are."""
    kept = [pair for pair in pairs if pair.get("probability") != 0.5]
    if len(kept) < len(pairs):
        print(f"data: {len(pairs) - len(kept):,} ties of {len(pairs):,} {part} pairs left out")
    if not kept:
        raise UserError(f"all {len(pairs):,} {part} pairs are ties: add rows, or name --eval-data.")
    return kept


def thin(rows: list, count: int) -> list:
    """At most `count` of the rows, evenly spaced: files may be sorted by kind."""
    return rows if len(rows) <= count else [rows[i * len(rows) // count] for i in range(count)]


# ---------------------------------------------------------------------------------------------- examples


def join(prompt: np.ndarray, response: np.ndarray, max_length: int) -> Example | None:
    """Prompt and response ids → one example of at most `max_length`; None if no response token fits."""
    ids = np.concatenate((prompt, response))[:max_length]
    if len(ids) <= len(prompt):
        return None
    return ids, np.arange(len(ids)) >= len(prompt)


def chat_examples(
    rows: list[dict], tokenizer: Tokenizer, max_length: int, part: str = "training"
) -> list[Example]:
    """Chat rows → examples, every assistant turn scored. Prints what was truncated and dropped."""

    def make(row: dict) -> tuple[Example | None, int]:
        ids, mask = tokenizer.render(row["messages"])
        example = ids[:max_length], mask[:max_length]
        return example if example[1].any() else None, len(ids)

    return _made(f"{part} chat rows", rows, make, max_length)[0]


def labelled_examples(
    rows: list[dict], tokenizer: Tokenizer, max_length: int, part: str = "training"
) -> tuple[list, list[dict]]:
    """Labelled rows → examples, and the row of each. Prints what was truncated and dropped."""

    def make(row: dict) -> tuple[Example | None, int]:
        prompt, response = tokenizer.prompt(row["prompt"]), tokenizer.response(row["completion"])
        return join(prompt, response, max_length), len(prompt) + len(response)

    return _made(f"{part} labelled rows", rows, make, max_length)


def pair_examples(
    rows: list[dict], tokenizer: Tokenizer, max_length: int, part: str = "training"
) -> tuple[list, list[dict]]:
    """Pair rows → (chosen, rejected) examples with identical prompt ids, and the row of each.

    Prints what was truncated, and what was dropped: pairs whose prompt leaves no room for a response token,
    or that are identical after truncation.
    """

    def make(row: dict) -> tuple[tuple[Example, Example] | None, int]:
        prompt = tokenizer.prompt(row["prompt"])
        responses = [tokenizer.response(row[side]) for side in ("chosen", "rejected")]
        pair = tuple(join(prompt, response, max_length) for response in responses)
        usable = None not in pair and not np.array_equal(pair[0][0], pair[1][0])
        return pair if usable else None, len(prompt) + max(map(len, responses))

    return _made(f"{part} pairs", rows, make, max_length)


def _made(what: str, rows: list[dict], make: Callable, max_length: int) -> tuple[list, list[dict]]:
    """make(row) → (example or None, its whole length), for each row → the examples, and the row of each."""
    made = [(*make(row), row) for row in rows]
    kept = [(example, row) for example, _, row in made if example is not None]
    truncated = sum(example is not None and length > max_length for example, length, _ in made)
    line = f"data: {len(kept):,} {what}"
    if truncated:
        line += f", {truncated:,} truncated to {max_length} tokens"
    if len(kept) < len(rows):
        dropped = len(rows) - len(kept)
        line += f", {dropped:,} dropped (no room for a response, or the two sides alike)"
    print(line)
    if not kept:
        raise UserError(f"none of {len(rows):,} {what} fit {max_length} tokens: raise --max-length.")
    return [example for example, _ in kept], [row for _, row in kept]


def prompt_examples(rows: list[dict], tokenizer: Tokenizer, room: int, count: int = 0) -> tuple[list, list]:
    """Prompt rows → those of at most `room` tokens, and their ids. Prints what was dropped.

    room: the model's context less the tokens that a response may take, or has to have.
    count: how many of these to take (see `thin`); 0: all.
    """
    ids, room = [tokenizer.prompt(row["prompt"]) for row in rows], max(0, room)
    kept = [i for i, prompt in enumerate(ids) if len(prompt) <= room]
    if len(kept) < len(rows):
        print(f"data: {len(rows) - len(kept):,} of {len(rows):,} prompts dropped: longer than {room} tokens")
    if not kept:
        raise UserError(
            f"no prompt leaves room for a response: the shortest has {min(map(len, ids))} tokens, and beside "
            f"a response {room} fit into the context. Lower --max-new-tokens, or use a longer context."
        )
    kept = thin(kept, count) if count else kept
    return [rows[i] for i in kept], [ids[i] for i in kept]


def read_prompts(config, tokenizer: Tokenizer, context: int):
    """--prompts → (rows, ids) to train on, and as many held-out ones as --eval-prompts asks for; those that
    leave room for a response of --max-new-tokens."""
    room = context - config.max_new_tokens
    rows, eval_rows = read_split(config, config.prompts, "prompts", config.eval_prompts)
    check_answers(config.reward, [*rows, *eval_rows])
    training = prompt_examples(rows, tokenizer, room)
    evaluated = prompt_examples(eval_rows, tokenizer, room)
    print(f"data: {len(training[0]):,} training prompts, {len(evaluated[0]):,} held out")
    return training, evaluated


# ---------------------------------------------------------------------------------------------- batches


class BatchOrder:
    """Which examples make up optimiser step `s`: `order[s] → indices`. A function of (seed, epoch) alone, so
    a resumed run re-enters it by its step number.

    Rows of similar length share a batch: each epoch is shuffled, sorted by length within pools of `pool`
    batches, cut into batches, and the batches are shuffled. A last batch of fewer than `least` rows joins the
    one before it.
    """

    def __init__(self, lengths, batch_size: int, seed: int, pool: int = 8, least: int = 1):
        if batch_size < 1:
            raise UserError(f"--batch-size must be at least 1, not {batch_size}.")
        self.lengths, self.seed = np.asarray(lengths), seed
        self.pool = pool * batch_size
        self.cuts = range(batch_size, len(self.lengths) - least + 1, batch_size)
        self.steps_per_epoch = len(self.cuts) + 1
        self._epoch, self._batches = -1, []

    def __getitem__(self, step: int) -> np.ndarray:
        epoch, index = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            self._epoch, self._batches = epoch, self._shuffled(epoch)
        return self._batches[index]

    def _shuffled(self, epoch: int) -> list[np.ndarray]:
        rng = np.random.default_rng(derived_seed(self.seed, "order", epoch))
        order = rng.permutation(len(self.lengths))
        pools = np.split(order, range(self.pool, len(order), self.pool))
        pools = [rows[np.argsort(self.lengths[rows], kind="stable")] for rows in pools]
        batches = np.split(np.concatenate(pools), self.cuts)
        return [batches[i] for i in rng.permutation(len(batches))]


def collate(examples: list[Example], pad_id: int) -> tuple[Tensor, Tensor]:
    """Examples → ids (B, T) right-padded with pad_id, mask (B, T) false on padding; both on the CPU."""
    ids, masks = ([torch.from_numpy(part) for part in parts] for parts in zip(*examples))
    return pad_sequence(ids, True, pad_id), pad_sequence(masks, True, False)
