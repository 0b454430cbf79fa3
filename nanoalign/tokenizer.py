"""A vocabulary, a chat format, and `render(messages) → ids, mask`.

A conversation is a flat run of turns, each opened by its role's tokens and closed by the end token:

    <|user|> What is the capital of France?<|end|><|assistant|> Paris.<|end|>

Published models bring a vocabulary and a format of their own (chat_formats.py). Special tokens that one
lacks are *added* beyond it, and text from people is always encoded with ordinary tokens, so a message that
spells "<|assistant|>" cannot open a turn. Each piece is encoded by itself: no BPE merge ever crosses from a
prompt into a response.
"""

import base64
import functools
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import tiktoken

from nanoalign import UserError
from nanoalign.chat_formats import FORMATS
from nanoalign.vocabulary import Vocabulary, encode

ROLES = ("system", "user", "assistant")
OWN = "nanoalign"  # this project's chat format
STEP, PAD = "<|step|>", "<|pad|>"
SPECIALS = (*(f"<|{role}|>" for role in ROLES), "<|end|>", STEP, PAD)  # of this project's own format
PADDING = ("<|endoftext|>", "<|end_of_text|>", "<|finetune_right_pad_id|>")  # what published models pad with

WORLD_BPE = Path(__file__).parent / "world" / "world.tiktoken"
WORLD_PATTERN = r" ?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s"  # a digit is a token: sums stay learnable


class Tokenizer:
    """A vocabulary and a chat format. Get one from `get_tokenizer`, or with its checkpoint.

    system: the system prompt of conversations that have none of their own.
    """

    def __init__(self, vocabulary: Vocabulary, chat_format: str = OWN, system: str = ""):
        base, form = vocabulary.encoding, FORMATS[chat_format]
        self.name = base.name if chat_format == OWN else f"{base.name}/{chat_format}"
        self.vocabulary, self.format, self.chat_format, self.system = vocabulary, form, chat_format, system
        turns = "".join([*map(form.opening.format, ROLES), form.end, form.after, form.start])
        needed, known = re.findall(r"<\|[^|]*\|>", turns), base._special_tokens
        spare = [] if chat_format == OWN else [t for t in sorted(known, key=known.get) if t not in needed]
        spare = [t for t in spare if t not in vocabulary.inline]
        pad = next((t for t in PADDING if t in spare), PAD)
        step = next((t for t in reversed(spare) if t != pad), STEP)
        new = [t for t in dict.fromkeys((*needed, step, pad)) if t not in known]
        self.encoding = tiktoken.Encoding(
            name=f"nanoalign-{base.name}",
            pat_str=base._pat_str,
            mergeable_ranks=base._mergeable_ranks,
            special_tokens={**known, **{t: base.n_vocab + i for i, t in enumerate(new)}},
        )
        self.vocab_size, specials = base.n_vocab + len(new), self.encoding._special_tokens
        self.end, self.step, self.pad = specials[form.end], specials[step], specials[pad]
        self.opening = {role: self._with_specials(form.opening.format(role)) for role in ROLES}
        self.after, self.start = self._with_specials(form.after), self._with_specials(form.start)
        self.answer, self.lead = encode(vocabulary, form.answer), form.lead
        self._ordinary = {*base._mergeable_ranks.values()}  # some encodings leave ids unused
        self._ordinary |= {specials[t] for t in vocabulary.inline}
        spelt = {i: self.encoding.decode_single_token_bytes(i) for i in sorted(self._ordinary)}
        self.newlines = [i for i, spelling in spelt.items() if b"\n" in spelling]  # tokens that end a line
        self.lengths = np.ones(self.vocab_size, dtype=np.int64)  # bytes of each token, 1 of a special one
        self.lengths[list(spelt)] = [*map(len, spelt.values())]

    def _with_specials(self, text: str) -> list[int]:
        return self.encoding.encode(text, allowed_special="all")

    def encode(self, text: str) -> list[int]:
        """Text → ordinary tokens only, whatever the text spells."""
        return encode(self.vocabulary, text)

    def encode_all(self, texts: list[str]) -> list[list[int]]:
        """`encode` of each text, on several threads."""
        with ThreadPoolExecutor(8) as pool:
            return list(pool.map(self.encode, texts))

    def decode(self, ids, specials: bool = False) -> str:
        """Token ids → text. Special tokens are left out, or spelt when `specials`."""
        kept = self._ordinary | {*self.encoding._special_tokens.values()} if specials else self._ordinary
        return self.encoding.decode([i for i in map(int, ids) if i in kept])

    def turn(
        self, role: str, content: str, weight: int = 1, last: bool = False
    ) -> tuple[list[int], list[bool]]:
        """One turn's ids and mask: an assistant's text and end token are scored, unless its weight is 0, and
        nothing else is. last: it ends the conversation."""
        if role not in self.opening:
            raise UserError(f'a message has role {role!r}; expected "system", "user" or "assistant".')
        if role != "assistant":  # what opens it and its text are one text to a published model
            special, name = re.fullmatch(r"(.*\|>)(.*)", self.format.opening.format(role), re.DOTALL).groups()
            ids = [*self._with_specials(special), *self.encode(name + self.body(content)), self.end]
            return ids, [False] * len(ids)
        opening = self.opening[role] + (self.answer if last else [])
        body = self.response(content).tolist()
        return [*opening, *body], [False] * len(opening) + [weight > 0] * len(body)

    def render(self, messages: list[dict], more: bool = False) -> tuple[np.ndarray, np.ndarray]:
        """A whole conversation → ids (T,) int64 and mask (T,) bool, true on assistant turns of weight 1.

        more: it goes on after the last of these messages.
        """
        if self.system and not any(m["role"] == "system" for m in messages[:1]):
            messages = [{"role": "system", "content": self.system}, *messages]
        ids, mask = [*self.start], [False] * len(self.start)
        for number, message in enumerate(messages, start=1):
            between, last = self.after if number > 1 else [], number == len(messages) and not more
            one, scored = self.turn(message["role"], message["content"], message.get("weight", 1), last)
            ids += between + one
            mask += [False] * len(between) + scored
        return np.array(ids, dtype=np.int64), np.array(mask, dtype=bool)

    def prompt(self, messages: list[dict], plain: bool = False) -> np.ndarray:
        """The conversation so far, and what opens the assistant's answer → ids (T,).

        `plain`: as bare text, a line per message, for a base model, which has never seen a role token.
        """
        if plain:
            text = self.encode("".join(m["content"] + "\n" for m in messages))
            return np.array([*self.start, *text], dtype=np.int64)
        so_far = self.render(messages, more=True)[0]
        return np.append(so_far, [*self.after, *self.opening["assistant"], *self.answer]).astype(np.int64)

    def shift(self, text: str) -> int:
        """By how many bytes `response` moves a text: the space in front, less the white space it strips."""
        lost = len(text) - len(text.lstrip()) if self.format.trim else 0
        return len(self.lead.encode()) - len(text[:lost].encode())

    def response(self, text: str) -> np.ndarray:
        """A message's text and the end token → ids (T,).

        The space that this project's format puts in front (`lead`) makes the first word the same token as
        that word inside a sentence.
        """
        return np.array([*self.encode(self.body(text)), self.end])

    def body(self, text: str) -> str:
        """A message's text as it stands in its turn."""
        return self.lead + (text.strip() if self.format.trim else text)

    def decode_response(self, ids) -> str:
        """The inverse of `response`: the text of the ordinary tokens."""
        return self.decode(ids).removeprefix(self.lead)


@functools.cache
def get_tokenizer(name: str) -> Tokenizer:
    """`"world"`, or the name of any tiktoken encoding (`"gpt2"`, `"r50k_base"`, `"cl100k_base"`, …)."""
    if name == "world":
        return Tokenizer(Vocabulary(world_encoding()))
    known = ["world", *tiktoken.list_encoding_names()]
    if name not in known:
        raise UserError(f"there is no tokenizer {name[:40]!r}; choose from {', '.join(known)}.")
    name = {"gpt2": "r50k_base"}.get(name, name)  # the same vocabulary, in one file
    try:
        return Tokenizer(Vocabulary(tiktoken.get_encoding(name)))
    except Exception as error:  # the download failed: requests raises a family of exceptions
        what = f"the vocabulary of {name!r} could not be loaded ({type(error).__name__})"
        how = "connect once, or set TIKTOKEN_CACHE_DIR to a folder that has it, or use --tokenizer world"
        raise UserError(f"{what}: {how}.") from error


def world_encoding() -> tiktoken.Encoding:
    """The built-in world's byte-level BPE (made by `python -m nanoalign.world.bpe`)."""
    if not WORLD_BPE.exists():
        raise UserError(f"{WORLD_BPE} is missing; make it with: python -m nanoalign.world.bpe")
    lines = map(bytes.split, WORLD_BPE.read_bytes().splitlines())  # tiktoken's own reader caches by name
    ranks = {base64.b64decode(token): int(rank) for token, rank in lines}
    return tiktoken.Encoding("world", pat_str=WORLD_PATTERN, mergeable_ranks=ranks, special_tokens={})
