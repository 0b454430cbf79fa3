"""tiktoken encodings, the chat format, and `render(messages) → ids, mask`.

A conversation is a flat run of turns, each opened by its role's token and closed by the end token:

    <|user|>What is the capital of France?<|end|><|assistant|>Paris.<|end|>

The special tokens are *added* beyond the encoding's own, and text from people is always encoded with ordinary
tokens, so a message that spells "<|assistant|>" cannot open a turn. Each piece is encoded by itself: no BPE
merge ever crosses from a prompt into a response.
"""

import base64
import functools
import re
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import numpy as np
import tiktoken

from nanoalign import UserError

ROLES = ("system", "user", "assistant")
SPECIALS = (*(f"<|{role}|>" for role in ROLES), "<|end|>", "<|step|>", "<|pad|>")
RUN = 50_000

WORLD_BPE = Path(__file__).parent / "world" / "world.tiktoken"
WORLD_PATTERN = r" ?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s"  # a digit is a token: sums stay learnable


class Tokenizer:
    """A tiktoken encoding with this project's special tokens after its own. Get one from `get_tokenizer`."""

    def __init__(self, base: tiktoken.Encoding):
        self.name = base.name
        first = base.n_vocab
        self.encoding = tiktoken.Encoding(
            name=f"nanoalign-{base.name}",
            pat_str=base._pat_str,
            mergeable_ranks=base._mergeable_ranks,
            special_tokens={**base._special_tokens, **{s: first + i for i, s in enumerate(SPECIALS)}},
        )
        self.vocab_size = first + len(SPECIALS)
        self._ordinary = frozenset(base._mergeable_ranks.values())  # some encodings leave ids unused
        self.end, self.step, self.pad = (
            first + SPECIALS.index(s) for s in ("<|end|>", "<|step|>", "<|pad|>")
        )
        self.role = {role: first + i for i, role in enumerate(ROLES)}
        spelt = {i: self.encoding.decode_single_token_bytes(i) for i in sorted(self._ordinary)}
        self.newlines = [i for i, spelling in spelt.items() if b"\n" in spelling]  # tokens that end a line
        self.lengths = np.ones(self.vocab_size, dtype=np.int64)  # bytes of each token, 1 of a special one
        self.lengths[list(spelt)] = [*map(len, spelt.values())]

    def encode(self, text: str) -> list[int]:
        """Text → ordinary tokens only, whatever the text spells.

        A run of more than `RUN` white space is encoded in pieces: tiktoken's stack overflows at some 300,000.
        """
        if len(text) <= RUN:
            return self.encoding.encode_ordinary(text)
        runs = (found.span() for found in re.finditer(rf"(?<!\s)\s{{{RUN},}}", text))
        cuts = [0, *(cut for start, end in runs for cut in range(start + RUN, end, RUN)), len(text)]
        return [token for a, b in pairwise(cuts) for token in self.encoding.encode_ordinary(text[a:b])]

    def encode_all(self, texts: list[str]) -> list[list[int]]:
        """`encode` of each text, on several threads."""
        with ThreadPoolExecutor(8) as pool:
            return list(pool.map(self.encode, texts))

    def decode(self, ids, specials: bool = False) -> str:
        """Token ids → text. Special tokens are left out, or spelt when `specials`."""
        first = self.vocab_size - len(SPECIALS)
        kept = (int(i) for i in ids)
        return self.encoding.decode([i for i in kept if i in self._ordinary or (specials and i >= first)])

    def turn(self, role: str, content: str, weight: int = 1) -> tuple[list[int], list[bool]]:
        """One turn's ids and mask: an assistant's text and end token are scored, unless its weight is 0, and
        nothing else is."""
        if role not in self.role:
            raise UserError(f'a message has role {role!r}; expected "system", "user" or "assistant".')
        body = self.response(content).tolist()
        scored = role == "assistant" and weight > 0
        return [self.role[role], *body], [False, *[scored] * len(body)]

    def render(self, messages: list[dict]) -> tuple[np.ndarray, np.ndarray]:
        """A whole conversation → ids (T,) int64 and mask (T,) bool, true on assistant turns of weight 1."""
        ids, mask = [], []
        for message in messages:
            turn_ids, turn_mask = self.turn(message["role"], message["content"], message.get("weight", 1))
            ids += turn_ids
            mask += turn_mask
        return np.array(ids, dtype=np.int64), np.array(mask, dtype=bool)

    def prompt(self, messages: list[dict], plain: bool = False) -> np.ndarray:
        """The conversation so far, and the token that opens the assistant's answer → ids (T,).

        `plain`: as bare text, a line per message, for a base model, which has never seen a role token.
        """
        if plain:
            return np.array(self.encode("".join(m["content"] + "\n" for m in messages)), dtype=np.int64)
        return np.append(self.render(messages)[0], self.role["assistant"])

    def response(self, text: str) -> np.ndarray:
        """A message's text and the end token → ids (T,).

        The space in front makes its first word the same token as that word inside a sentence.
        """
        return np.array([*self.encode(" " + text), self.end], dtype=np.int64)

    def decode_response(self, ids) -> str:
        """The inverse of `response`: the text of the ordinary tokens."""
        return self.decode(ids).removeprefix(" ")


@functools.cache
def get_tokenizer(name: str) -> Tokenizer:
    """`"world"`, or the name of any tiktoken encoding (`"gpt2"`, `"r50k_base"`, `"cl100k_base"`, …)."""
    if name == "world":
        return Tokenizer(world_encoding())
    known = ["world", *tiktoken.list_encoding_names()]
    if name not in known:
        raise UserError(f"there is no tokenizer {name!r}; choose from {', '.join(known)}.")
    if name == "gpt2":
        name = "r50k_base"  # the same vocabulary, in one file
    try:
        return Tokenizer(tiktoken.get_encoding(name))
    except Exception as error:  # the download failed: requests raises a family of exceptions
        raise UserError(
            f"the vocabulary of {name!r} could not be loaded ({type(error).__name__}): connect once, "
            "or set TIKTOKEN_CACHE_DIR to a folder that has it, or use --tokenizer world."
        ) from error


def world_encoding() -> tiktoken.Encoding:
    """The built-in world's byte-level BPE (made by `python -m nanoalign.world.bpe`)."""
    if not WORLD_BPE.exists():
        raise UserError(f"{WORLD_BPE} is missing; make it with: python -m nanoalign.world.bpe")
    lines = (
        line.split() for line in WORLD_BPE.read_bytes().splitlines()
    )  # tiktoken's own reader caches by name
    ranks = {base64.b64decode(token): int(rank) for token, rank in lines}
    return tiktoken.Encoding("world", pat_str=WORLD_PATTERN, mergeable_ranks=ranks, special_tokens={})
