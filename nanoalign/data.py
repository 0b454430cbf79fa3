"""JSONL rows → validated examples → right-padded batches with masks.

Row kinds, and the forms each accepts (any row may carry "meta"):

    text      {"text"} or a plain text file
    chat      {"messages"} · {"prompt", "completion"} · GSM8K's {"question", "answer"} · a pair's chosen side
    pairs     {"prompt", "chosen", "rejected"}, strings or messages · HH transcripts {"chosen", "rejected"};
              optionally a "margin"
    labelled  {"prompt", "completion", "label": bool}
    steps     {"prompt", "completions": [str…], "labels": [bool|null…]}
    prompts   {"prompt"} as a string or messages · {"question"} · whatever a chat or pair row starts with

An example is (ids, mask): int64 token ids (T,) and a bool mask (T,), true where scored.
"""

import json
import math
import re
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from nanoalign import UserError
from nanoalign.tokenizer import ROLES, Tokenizer

Example = tuple[np.ndarray, np.ndarray]


class RowError(ValueError):
    """What is wrong with one row: the field, and what was expected."""


# ---------------------------------------------------------------------------------------------- one row


def _parse_json(line: str) -> dict:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:  # malformed, a number of too many digits, nested too deeply
        raise RowError(f"not valid JSON ({getattr(error, 'msg', error)})") from None
    if "\\ud" in line.lower() and re.search(r"[\ud800-\udfff]", json.dumps(row, ensure_ascii=False)):
        raise RowError("a \\ud… escape is half of a character: not valid Unicode")
    if not isinstance(row, dict):
        raise RowError(f"expected a JSON object, found {line[:40]!r}")
    return row


def _meta(row: dict) -> dict:
    if not isinstance(row.get("meta", {}), dict):
        raise RowError(f'field "meta": expected an object, found {_describe(row, "meta")}')
    return row.get("meta", {})


def _text(row: dict, field: str) -> str:
    if not isinstance(row.get(field), str):
        raise RowError(f'field "{field}": expected a string, found {_describe(row, field)}')
    return row[field]


def _describe(row: dict, field: str) -> str:
    return f"{json.dumps(row[field])[:60]}" if field in row else f"only the fields {sorted(row)}"


def _messages(row: dict, field: str) -> list[dict]:
    """A list of messages with role and content; a plain string is one user message."""
    value = row.get(field)
    if isinstance(value, str):
        return [{"role": "user", "content": value}]
    if not isinstance(value, list) or not value:
        raise RowError(
            f'field "{field}": expected a string or a list of messages, found {_describe(row, field)}'
        )
    for i, message in enumerate(value):
        good = (
            isinstance(message, dict)
            and message.get("role") in ROLES
            and isinstance(message.get("content"), str)
        )
        if not good:
            raise RowError(
                f'field "{field}", message {i}: expected {{"role": {"|".join(ROLES)}, "content": string}}, '
                f"found {json.dumps(message)[:60]}"
            )
    return [{"role": m["role"], "content": m["content"]} for m in value]


def _transcript(row: dict, field: str) -> list[dict]:
    """An Anthropic HH transcript, "\\n\\nHuman: …\\n\\nAssistant: …" → messages."""
    pieces = re.split(r"(?:^|\n\n)(Human|Assistant):", _text(row, field))
    if len(pieces) < 5 or pieces[0].strip():
        raise RowError(
            f'field "{field}": expected "\\n\\nHuman: …\\n\\nAssistant: …" (the row has no "prompt")'
        )
    roles = {"Human": "user", "Assistant": "assistant"}
    return [{"role": roles[r], "content": t.strip()} for r, t in zip(pieces[1::2], pieces[2::2])]


def _side(row: dict, field: str) -> list[dict]:
    if isinstance(row.get(field), list):
        return _messages(row, field)
    if "prompt" in row:
        return [{"role": "assistant", "content": _text(row, field)}]
    return _transcript(row, field)


def parse_pair(row: dict) -> dict:
    """→ {"prompt": messages, "chosen": str, "rejected": str, "meta"}, and "margin" if the row has one."""
    prompt = _messages(row, "prompt") if "prompt" in row else []
    sides = [prompt + _side(row, field) for field in ("chosen", "rejected")]
    repeated = [side[: 2 * len(prompt)] == prompt * 2 for side in sides]
    if prompt and all(repeated):  # each side repeats the prompt
        sides = [side[len(prompt) :] for side in sides]
    for field, side in zip(("chosen", "rejected"), sides):
        if len(side) < 2 or side[-1]["role"] != "assistant":
            raise RowError(f'field "{field}": expected to end with an assistant message after a prompt')
    if sides[0][:-1] != sides[1][:-1]:
        raise RowError(
            'fields "chosen" and "rejected": expected the same prompt, differing only in the last message'
        )
    margin = row.get("margin", 0.0)
    if isinstance(margin, bool) or not isinstance(margin, (int, float)) or not math.isfinite(margin):
        raise RowError(f'field "margin": expected a number, found {_describe(row, "margin")}')
    chosen, rejected = (side[-1]["content"] for side in sides)
    parsed = {"prompt": sides[0][:-1], "chosen": chosen, "rejected": rejected, "meta": _meta(row)}
    return {**parsed, "margin": margin} if "margin" in row else parsed


def parse_chat(row: dict) -> dict:
    """→ {"messages", "meta"}, with at least one assistant turn to learn from."""
    if "messages" in row:
        messages = _messages(row, "messages")
    elif "chosen" in row:
        pair = parse_pair(row)
        messages = [*pair["prompt"], {"role": "assistant", "content": pair["chosen"]}]
    elif "question" in row:
        messages = [*_messages(row, "question"), {"role": "assistant", "content": _text(row, "answer")}]
    else:
        messages = [*_messages(row, "prompt"), {"role": "assistant", "content": _text(row, "completion")}]
    if not any(m["role"] == "assistant" for m in messages):
        raise RowError('field "messages": expected at least one assistant message to learn from')
    return {"messages": messages, "meta": _meta(row)}


def parse_labelled(row: dict) -> dict:
    """→ {"prompt": messages, "completion": str, "label": bool, "meta"}."""
    if not isinstance(row.get("label"), bool):
        raise RowError(f'field "label": expected true or false, found {_describe(row, "label")}')
    prompt, completion = _messages(row, "prompt"), _text(row, "completion")
    return {"prompt": prompt, "completion": completion, "label": row["label"], "meta": _meta(row)}


def parse_steps(row: dict) -> dict:
    """→ {"prompt": messages, "completions": [str], "labels": [bool | None], "meta"}."""
    steps, labels = row.get("completions"), row.get("labels")
    if not isinstance(steps, list) or not steps or not all(isinstance(s, str) for s in steps):
        raise RowError(
            f'field "completions": expected a list of strings, found {_describe(row, "completions")}'
        )
    if not isinstance(labels, list) or not all(x is None or isinstance(x, bool) for x in labels):
        raise RowError(
            f'field "labels": expected a list of true, false or null, found {_describe(row, "labels")}'
        )
    if len(steps) != len(labels):
        raise RowError(f'fields "completions" and "labels": {len(steps)} steps but {len(labels)} labels')
    return {
        "prompt": _messages(row, "prompt"),
        "completions": steps,
        "labels": labels,
        "meta": _meta(row),
    }


def parse_prompt(row: dict) -> dict:
    """→ {"prompt": messages ending with the user, "meta"}. The answer of a GSM8K row goes into meta."""
    if "chosen" in row:
        prompt = parse_pair(row)["prompt"]
    elif "messages" in row:
        prompt = _messages(row, "messages")
        while prompt and prompt[-1]["role"] == "assistant":
            prompt = prompt[:-1]
    else:
        prompt = _messages(row, "question" if "question" in row else "prompt")
    if not prompt:
        raise RowError("expected a prompt before the first assistant message")
    gold = {"answer": row["answer"]} if "question" in row and "answer" in row else {}
    return {"prompt": prompt, "meta": {**gold, **_meta(row)}}


def parse_text(row: dict) -> dict:
    """→ {"text": str}."""
    return {"text": _text(row, "text")}


PARSERS = {
    "text": parse_text,
    "chat": parse_chat,
    "pairs": parse_pair,
    "labelled": parse_labelled,
    "steps": parse_steps,
    "prompts": parse_prompt,
}

# ---------------------------------------------------------------------------------------------- a file


def read_rows(path: str, kind: str, skip_bad_rows: bool = False) -> list[dict]:
    """Every row of a JSONL file, validated as `kind` (see the module's docstring). "text" also reads plain
    text.

    Raises UserError naming file, line, field and what was expected; with `skip_bad_rows` drops and counts
    instead.
    """
    try:
        content = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(
            f"{path} does not exist; check the path, or run `make demo` to build the world's."
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read as UTF-8 text: {error}.") from None
    if not content.strip():
        raise UserError(f"{path} is empty; expected rows of kind {kind!r}.")
    if kind == "text" and not path.endswith((".jsonl", ".json")):
        return [{"text": content}]
    rows, bad = [], 0
    for number, line in enumerate(content.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            rows.append(PARSERS[kind](_parse_json(line)))
        except RowError as error:
            bad += 1
            if not skip_bad_rows:
                raise UserError(
                    f"{path}, line {number}: {error}. (--skip-bad-rows drops such rows.)"
                ) from None
    if bad:
        print(f"data: {path}: skipped {bad} bad rows of {bad + len(rows)}")
    if not rows:
        raise UserError(f"{path} has no usable row of kind {kind!r}.")
    return rows


def write_rows(path: str, rows) -> None:
    """Write rows as JSONL, whole or not at all: to a temporary name, then renamed."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    partial = Path(f"{path}.writing")
    with partial.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    partial.replace(path)


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


# ---------------------------------------------------------------------------------------------- examples


def join(prompt: np.ndarray, response: np.ndarray, max_length: int) -> Example | None:
    """Prompt and response ids → one example of at most `max_length`; None if no response token fits."""
    ids = np.concatenate((prompt, response))[:max_length]
    if len(ids) <= len(prompt):
        return None
    return ids, np.arange(len(ids)) >= len(prompt)


def chat_examples(rows: list[dict], tokenizer: Tokenizer, max_length: int) -> list[Example]:
    """Chat rows → examples, every assistant turn scored. Prints what was truncated and dropped."""
    examples, truncated = [], 0
    for row in rows:
        ids, mask = tokenizer.render(row["messages"])
        if not mask[:max_length].any():
            continue
        truncated += len(ids) > max_length
        examples.append((ids[:max_length], mask[:max_length]))
    _report("chat rows", len(rows), len(examples), truncated, max_length)
    return examples


def pair_examples(
    rows: list[dict], tokenizer: Tokenizer, max_length: int
) -> tuple[list[tuple[Example, Example]], list[dict]]:
    """Pair rows → (chosen, rejected) examples with identical prompt ids, and the row of each.

    Prints what was truncated, and what was dropped: pairs whose prompt leaves no room for a response token,
    or that are identical after truncation.
    """
    examples, kept, truncated = [], [], 0
    for row in rows:
        prompt = tokenizer.prompt(row["prompt"])
        responses = [tokenizer.response(row[side]) for side in ("chosen", "rejected")]
        chosen, rejected = (join(prompt, response, max_length) for response in responses)
        if chosen is None or rejected is None or np.array_equal(chosen[0], rejected[0]):
            continue
        truncated += any(len(prompt) + len(response) > max_length for response in responses)
        examples.append((chosen, rejected))
        kept.append(row)
    _report("pairs", len(rows), len(examples), truncated, max_length)
    return examples, kept


def prompt_examples(rows: list[dict], tokenizer: Tokenizer, room: int) -> tuple[list[dict], list[np.ndarray]]:
    """Prompt rows → those of at most `room` tokens, and their ids. Prints what was dropped.

    room: the model's context less the tokens that a response may take.
    """
    ids = [tokenizer.prompt(row["prompt"]) for row in rows]
    kept = [i for i, prompt in enumerate(ids) if len(prompt) <= room]
    if len(kept) < len(rows):
        print(f"data: {len(rows) - len(kept):,} of {len(rows):,} prompts dropped: longer than {room} tokens")
    if not kept:
        raise UserError(
            f"no prompt leaves room for a response: context less --max-new-tokens is {room} tokens, and the "
            f"shortest prompt has {min(map(len, ids))}. Lower --max-new-tokens, or use a longer context."
        )
    return [rows[i] for i in kept], [ids[i] for i in kept]


def _report(what: str, rows: int, kept: int, truncated: int, max_length: int) -> None:
    line = f"data: {kept:,} {what}"
    if truncated:
        line += f", {truncated:,} truncated to {max_length} tokens"
    if kept < rows:
        line += f", {rows - kept:,} dropped (no room for a response, or the two sides alike)"
    print(line)
    if not kept:
        raise UserError(f"none of the {rows:,} {what} can be used at --max-length {max_length}; raise it.")


def pack(rows: list[dict], tokenizer: Tokenizer, context: int) -> np.ndarray:
    """Texts, each followed by the end token, cut into blocks (N, context) int64.

    Neighbouring blocks share one token, so that every token but the very first is predicted exactly once.
    What fills no whole block at the end is left out.
    """
    if context < 2:
        raise UserError(
            f"--context must be at least 2, not {context}: a block of one token predicts nothing."
        )
    texts = tokenizer.encoding.encode_ordinary_batch([row["text"] for row in rows])
    stream = np.concatenate([np.array([*ids, tokenizer.end], dtype=np.int64) for ids in texts])
    blocks = (len(stream) - 1) // (context - 1)
    if not blocks:
        raise UserError(f"{len(stream)} tokens of text do not fill one block of {context}; lower --context.")
    return np.lib.stride_tricks.sliding_window_view(stream, context)[:: context - 1]


# ---------------------------------------------------------------------------------------------- batches


class BatchOrder:
    """Which examples make up optimiser step `s`: `order[s] → indices`. A function of (seed, epoch) alone, so
    a resumed run re-enters it by its step number.

    Rows of similar length share a batch: each epoch is shuffled, sorted by length within pools of `pool`
    batches, cut into batches, and the batches are shuffled.
    """

    def __init__(self, lengths, batch_size: int, seed: int, pool: int = 8):
        if batch_size < 1:
            raise UserError(f"--batch-size must be at least 1, not {batch_size}.")
        self.lengths, self.batch_size, self.seed = np.asarray(lengths), batch_size, seed
        self.pool = pool * batch_size
        self.steps_per_epoch = -(-len(self.lengths) // batch_size)
        self._epoch, self._batches = -1, []

    def __getitem__(self, step: int) -> np.ndarray:
        epoch, index = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            self._epoch, self._batches = epoch, self._shuffled(epoch)
        return self._batches[index]

    def _shuffled(self, epoch: int) -> list[np.ndarray]:
        rng = np.random.default_rng((self.seed, epoch))
        order = rng.permutation(len(self.lengths))
        order = np.concatenate(
            [
                rows[np.argsort(self.lengths[rows], kind="stable")]
                for rows in np.split(order, range(self.pool, len(order), self.pool))
            ]
        )
        batches = np.split(order, range(self.batch_size, len(order), self.batch_size))
        return [batches[i] for i in rng.permutation(len(batches))]


def micro_batches(indices: np.ndarray, size: int) -> list[np.ndarray]:
    """One optimiser step's rows in pieces of at most `size` (0: all at once), for gradient accumulation."""
    return np.split(indices, range(size, len(indices), size)) if size else [indices]


def collate(examples: list[Example], pad_id: int) -> tuple[Tensor, Tensor]:
    """Examples → ids (B, T) right-padded with pad_id, mask (B, T) false on padding; both on the CPU."""
    ids = pad_sequence([torch.from_numpy(ids) for ids, _ in examples], batch_first=True, padding_value=pad_id)
    mask = pad_sequence(
        [torch.from_numpy(mask) for _, mask in examples], batch_first=True, padding_value=False
    )
    return ids, mask
