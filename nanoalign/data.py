"""Rows → examples → right-padded batches with masks.

An example is (ids, mask): int64 token ids (T,) and a bool mask (T,), true where scored.
"""

import json
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from nanoalign import UserError
from nanoalign.rows import read_rows
from nanoalign.seeds import derived_seed
from nanoalign.tokenizer import Tokenizer

Example = tuple[np.ndarray, np.ndarray]


def prompt_key(row: dict) -> str:
    """What rows of one prompt have in common: all messages but the last answer; of a text, all of it."""
    return json.dumps(row.get("prompt") or row.get("messages", [])[:-1] or row)


def split_rows(rows: list, eval_path: str, kind: str, skip_bad_rows: bool = False) -> tuple[list, list]:
    """Training rows and held-out rows: those of `eval_path`, or where that is empty all rows of every
    twentieth prompt, so that no prompt is on both sides."""
    if eval_path:
        return rows, read_rows(eval_path, kind, skip_bad_rows)
    keys, number = [prompt_key(row) for row in rows], {}
    for key in keys:
        number.setdefault(key, len(number))
    if len(number) < 2:
        raise UserError("a single prompt cannot be split; name held-out rows with --eval-data.")
    held_out = [number[key] % 20 == 1 for key in keys]
    return [r for r, out in zip(rows, held_out) if not out], [r for r, out in zip(rows, held_out) if out]


def read_split(config, path: str, kind: str) -> tuple[list[dict], list[dict]]:
    """The rows of `path` to train on, and the rows that are held out: --eval-data's, or some of them."""
    rows = read_rows(path, kind, config.skip_bad_rows)
    return split_rows(rows, config.eval_data, kind, config.skip_bad_rows)


def one_per_prompt(rows: list[dict]) -> list[dict]:
    """The rows, but only one of each prompt."""
    return list({prompt_key(row): row for row in rows}.values())


def questions(rows: list[dict], tokenizer: Tokenizer, max_length: int, count: int = 128) -> tuple[list, list]:
    """One row of each prompt, `count` at most, and their ids: the last ones, half of `max_length`."""
    rows = one_per_prompt(rows)[:count]
    return rows, [tokenizer.prompt(row["prompt"])[-max_length // 2 :] for row in rows]


def without_ties(pairs: list[dict]) -> list[dict]:
    """The pairs but for those of probability 1/2, in which no side is right. Prints how many those are."""
    kept = [pair for pair in pairs if pair.get("probability") != 0.5]
    if len(kept) < len(pairs):
        print(f"data: {len(pairs) - len(kept):,} ties of {len(pairs):,} pairs left out")
    if not kept:
        raise UserError(
            f"all {len(pairs):,} training or held-out pairs are ties: add rows, or name --eval-data."
        )
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


def chat_examples(rows: list[dict], tokenizer: Tokenizer, max_length: int) -> list[Example]:
    """Chat rows → examples, every assistant turn scored. Prints what was truncated and dropped."""

    def make(row: dict) -> tuple[Example | None, int]:
        ids, mask = tokenizer.render(row["messages"])
        example = ids[:max_length], mask[:max_length]
        return example if example[1].any() else None, len(ids)

    return _made("chat rows", rows, make, max_length)[0]


def labelled_examples(rows: list[dict], tokenizer: Tokenizer, max_length: int) -> tuple[list, list[dict]]:
    """Labelled rows → examples, and the row of each. Prints what was truncated and dropped."""

    def make(row: dict) -> tuple[Example | None, int]:
        prompt, response = tokenizer.prompt(row["prompt"]), tokenizer.response(row["completion"])
        return join(prompt, response, max_length), len(prompt) + len(response)

    return _made("labelled rows", rows, make, max_length)


def pair_examples(rows: list[dict], tokenizer: Tokenizer, max_length: int) -> tuple[list, list[dict]]:
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

    return _made("pairs", rows, make, max_length)


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
        raise UserError(
            f"none of the {len(rows):,} {what} can be used at --max-length {max_length}; raise it."
        )
    return [example for example, _ in kept], [row for _, row in kept]


def prompt_examples(rows: list[dict], tokenizer: Tokenizer, room: int, count: int = 0) -> tuple[list, list]:
    """Prompt rows → those of at most `room` tokens, and their ids. Prints what was dropped.

    room: the model's context less the tokens that a response may take, or has to have.
    count: how many of these to take (see `thin`); 0: all.
    """
    ids = [tokenizer.prompt(row["prompt"]) for row in rows]
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


def read_prompts(config, tokenizer: Tokenizer, room: int):
    """--prompts → (rows, ids) to train on, and as many held-out ones as --eval-prompts asks for."""
    rows, held_out = read_split(config, config.prompts, "prompts")
    held_out = thin(held_out, config.eval_prompts)
    return prompt_examples(rows, tokenizer, room), prompt_examples(held_out, tokenizer, room)


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


def micro_batches(indices: np.ndarray, size: int, lengths=(), tokens: int = 0) -> list[np.ndarray]:
    """One optimiser step's rows in pieces, for gradient accumulation: of at most `size` rows (0: any number)
    and at most `tokens` tokens, padding included (0: any number), or of one row.

    lengths: the tokens of each of these rows; with `tokens`, a piece holds rows alike in length.
    """
    if tokens:
        order = np.argsort(lengths, kind="stable")
        indices, lengths = indices[order], np.asarray(lengths)[order]
    cuts = [0]
    for i in range(1, len(indices)):
        rows = i + 1 - cuts[-1]
        if 0 < size < rows or 0 < tokens < rows * lengths[i]:
            cuts.append(i)
    return np.split(indices, cuts[1:])


def collate(examples: list[Example], pad_id: int) -> tuple[Tensor, Tensor]:
    """Examples → ids (B, T) right-padded with pad_id, mask (B, T) false on padding; both on the CPU."""
    ids, masks = ([torch.from_numpy(part) for part in parts] for parts in zip(*examples))
    return pad_sequence(ids, True, pad_id), pad_sequence(masks, True, False)
