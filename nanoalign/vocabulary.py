"""A tokenizer.json of byte-level BPE ↔ a tiktoken encoding that gives the same ids.

`tokenizers` applies listed merges in their order; tiktoken joins the neighbours that make the lowest id. Both
join the bytes of a token as if nothing stood around them, so one pair alone ever makes it (`last_pairs`). If
all these pairs are listed, in the order of ids, the two agree on every text; other files are refused.
"""

import hashlib
import re
import unicodedata
from itertools import pairwise, product
from typing import NamedTuple

import regex  # tiktoken brings it
import tiktoken

from nanoalign import UserError

RUN = 50_000  # of white space: tiktoken's stack overflows at some 300,000
LARGEST, LONGEST = 2**22, 1000  # an id, the bytes of a joined token: more is a mistake
UNREAD = ["dropout", "continuing_subword_prefix", "end_of_word_suffix", "single_word", "lstrip", "rstrip"]
GPT2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
DIGITS = r"'(?:[sdmt]|ll|ve|re)|\p{N}| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+"  # a digit is a word
PLAIN = re.compile(  # patterns that mean the same to both: no ^, $, {1,3}+, repeated groups
    r"(?:\\p\{\w+\}|\\[\WnrsSt]|\[\^?(?:\\p\{\w+\}|\\[\WnrsSt]|(?!--)[^\\\[\]&~])+\]"
    r"|\(\?(?:[:>]|i:)|(?<=\+)(?:\(\?[=!]|\\z)|\)(?![*+{])|[^\\\[\](){}.^$?*+]|[?*+]\+?|\{\d+(?:,\d*)?\}(?!\+))*"
)
PROBE = "".join(map("".join, product("a1!' \né中", repeat=3)))  # each kind of character beside each other
HIDDEN = [*range(33), *range(127, 161), 173]  # bytes that a file spells as the characters from 256 on
SPELT = {byte: byte for byte in range(256)} | {byte: 256 + i for i, byte in enumerate(HIDDEN)}
BYTES = {spelling: byte for byte, spelling in SPELT.items()}


class Vocabulary(NamedTuple):
    encoding: tiktoken.Encoding
    nfc: bool = False  # text is brought to Unicode's normal form C first
    inline: frozenset[str] = frozenset()  # the special tokens that are recognised in it
    missing: bytes = b""  # no token has these bytes: text loses them


def encode(vocabulary: Vocabulary, text: str) -> list[int]:
    """Text → ordinary tokens and inline ones; any other special token that it spells stays text."""
    encoding, nfc, inline, missing = vocabulary
    longest_first = "|".join(map(re.escape, sorted(inline, key=len, reverse=True)))
    if inline and len(pieces := re.split(f"({longest_first})", text)) > 1:
        ids = ([encoding._special_tokens[p]] if p in inline else encode(vocabulary, p) for p in pieces)
        return [token for piece in ids for token in piece]
    text = unicodedata.normalize("NFC", text) if nfc else text
    if missing and len(data := text.encode(errors="replace")) > len(data.translate(None, missing)):
        words = (word[0].encode(errors="replace") for word in regex.finditer(encoding._pat_str, text))
        kept = [word.translate(None, missing) for word in words]  # as `tokenizers` does; tiktoken would die
        return [token for word in kept if word for token in encoding._encode_single_piece(word)]
    runs = re.finditer(rf"(?<!\s)\s{{{RUN},}}", text) if len(text) > RUN else ()
    cuts = [0, *(cut for run in runs for cut in range(run.start() + RUN, run.end(), RUN)), len(text)]
    return [token for a, b in pairwise(cuts) for token in encoding.encode_ordinary(text[a:b])]


def last_pairs(vocab: dict[str, int]) -> dict[str, tuple[str, str] | None]:
    """Each token of several bytes, as they are spelt, in the order of ids → the two parts that they become
    when neighbours are joined, always those that make the lowest id; None if they do not become two."""
    pairs = {}
    for token in sorted((token for token in vocab if len(token) > 1), key=vocab.get):
        parts = [*token] if len(token) <= LONGEST else []
        while len(parts) > 2:
            joined = [vocab.get(a + b, LARGEST) for a, b in pairwise(parts)]
            i = joined.index(lowest := min(joined))
            parts = [*parts[:i], parts[i] + parts[i + 1], *parts[i + 2 :]] if lowest < LARGEST else []
        pairs[token] = tuple(parts) if len(parts) == 2 and {*parts} <= vocab.keys() else None
    return pairs


def read_vocabulary(spec: dict, where: str) -> Vocabulary:
    """A parsed tokenizer.json; `where`: its name, for the error if tiktoken cannot do what it says. Its
    post-processor is not used: the chat format writes what a text begins with."""
    try:
        return read(spec)
    except Exception as error:  # a damaged file can fail in any way
        known = f"cannot be used: {error}" if isinstance(error, UserError) else "is no tokenizer.json."
        raise UserError(f"{where} {known}") from None


def require(holds: bool, otherwise: str) -> None:
    if not holds:
        raise UserError(otherwise)


def read(spec: dict) -> Vocabulary:
    model, added, normalizer = spec["model"], spec.get("added_tokens") or [], spec.get("normalizer")
    kind = "SentencePiece" if model.get("byte_fallback") else model.get("type", "BPE")
    require(kind == "BPE", f"its model is {kind!a:.40}; only byte-level BPE is read.")
    nfc, pattern = normalizer is not None, word_pattern(spec.get("pre_tokenizer") or {"type": None})
    require(not nfc or normalizer["type"] == "NFC", f"its normalizer, {normalizer!a:.80}, is not NFC.")
    special = {token["content"]: token["id"] for token in added}
    inline = frozenset(token["content"] for token in added if not token["special"])
    vocab = {token: i for token, i in model["vocab"].items() if token not in special}
    require({*map(ord, "".join(vocab))} <= BYTES.keys(), "its tokens are not of bytes: no byte-level BPE.")
    missing = bytes(byte for byte in range(256) if chr(SPELT[byte]) not in vocab)
    odd = ["unk_token"] * bool(missing and model.get("unk_token"))
    odd += [name for part in (model, *added) for name in [*UNREAD, *["normalized"] * nfc] if part.get(name)]
    require(not odd, f"it has {min(odd, default='')}, which is not read.")
    ids = {*(names := model["vocab"] | special).values()}
    sound = {*map(type, ids)} == {int} and 0 <= min(ids) <= max(ids) < LARGEST and len(ids) == len(names)
    require(sound and "" not in names and names == special | model["vocab"], "its tokens' ids are not sound.")
    merges = [tuple(merge.split(" ") if isinstance(merge, str) else merge) for merge in model["merges"]]
    due = dict.fromkeys(filter(None, (pairs := last_pairs(vocab)).values()))
    alike = [pair for pair in merges if pair in due] == [*due] and {*map("".join, merges)} <= vocab.keys()
    alike &= None not in pairs.values() or (model.get("ignore_merges") is True and not missing)
    require(alike, "its merges are not those that the order of its tokens' ids implies.")
    words = regex.findall(pattern, PROBE)
    require(all(words) and "".join(words) == PROBE, "its pattern finds empty words, or leaves some out.")
    content = ascii((sorted(vocab.items()), pattern, sorted(special.items()), nfc, sorted(inline))).encode()
    name = f"json-{hashlib.sha256(content).hexdigest()[:12]}"
    ranks = {token.translate(BYTES).encode("latin-1"): i for token, i in vocab.items()}
    encoding = tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)
    return Vocabulary(encoding, nfc, inline, missing)


def word_pattern(splitter: dict) -> str:
    *first, last = splitter["pretokenizers"] if splitter["type"] == "Sequence" else [splitter]
    match [*first, (last["type"], last.get("add_prefix_space"), last.get("use_regex", True))]:
        case [("ByteLevel", False, True)]:
            return GPT2
        case [{"type": "Digits", "individual_digits": True}, ("ByteLevel", False, True)]:
            return DIGITS
        case [{"type": "Split", "pattern": {"Regex": found}, **how}, ("ByteLevel", False, False)]:
            if how == {"behavior": "Isolated", "invert": False} and PLAIN.fullmatch(found):
                return found
    raise UserError(f"it cuts text into words in a way that is not read: {splitter!a:.400}")


def write_vocabulary(vocabulary: Vocabulary) -> dict:
    """The inverse, for any encoding: the content of a tokenizer.json. Special tokens stand in the model's
    vocabulary too: otherwise `tokenizers` would number them anew, after it."""
    encoding, nfc, inline, _ = vocabulary
    counted = r"(\\p\{\w+\}|\[[^\]]*\])(\{[\d,]+\})\+"  # {1,3}+ and $ mean something else to `tokenizers`
    pattern = re.sub(counted, r"(?>\1\2)", encoding._pat_str).replace("++$", r"++\z")
    vocab = {token.decode("latin-1").translate(SPELT): i for token, i in encoding._mergeable_ranks.items()}
    special = encoding._special_tokens
    apart = PLAIN.fullmatch(pattern) and not vocab.keys() & special.keys()
    require(apart, f"the encoding {encoding.name!r} cannot be written so that `tokenizers` reads it alike.")
    pairs, flags = last_pairs(vocab), dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    added = [{"id": i, "content": t, **flags, "special": t not in inline} for t, i in special.items()]
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return {
        "version": "1.0", "added_tokens": added, "normalizer": {"type": "NFC"} if nfc else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, level]}, "decoder": level,
        "model": {"type": "BPE", "ignore_merges": None in pairs.values(), "vocab": vocab | special,
                  "merges": [*filter(None, pairs.values())]},
    }  # fmt: skip
