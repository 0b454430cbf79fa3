"""tokenizer.json: the ids that its merges give, or one sentence; and back."""

import copy
import json
import random
from collections import Counter
from itertools import pairwise

import pytest
import regex
import tiktoken

from nanoalign import UserError
from nanoalign.tokenizer import get_tokenizer, world_encoding
from nanoalign.vocabulary import DIGITS, GPT2, RUN, Vocabulary, encode, read_vocabulary, write_vocabulary

BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
PLAIN = {**BYTE_LEVEL, "use_regex": False}
WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
TEXT = """the cat sat on the mat; the other cats sat there. That hat's 1001 threads, 10 01!

   1   2   3    x   10
  "Eat," she said... é ünï 日本 日本語: brass bracelets\tare ((the best)) there is; isn't it the truth?!
"""
ALPHABET = [
    *"abcehrst  TH01.,;!'\n\t\r",
    "é",
    "e\u0301",
    "日",
    "語",
    "🏳️‍🌈",
    "'s",
    "the",
    " cat",
    "<a>",
    "<ab>",
    "<s>",
]


def letters():
    """What GPT-2's files spell each byte with, written down the way its authors did: printable bytes as
    themselves, all others as the next characters from 256 on."""
    printable = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    ]
    table = {}
    for byte in range(256):
        table[byte] = chr(byte if byte in printable else 256 + sum(b not in printable for b in range(byte)))
    return table


LETTER = letters()


def spelt(data: bytes) -> str:
    return "".join(LETTER[byte] for byte in data)


def trained(text: str, pattern: str, merges: int, alphabet=range(256)):
    """Byte pair encoding by its definition: the most frequent pair is merged, again and again."""
    words = [[*spelt(word.encode())] for word in regex.findall(pattern, text)]
    vocab, made = {LETTER[byte]: i for i, byte in enumerate(alphabet)}, []
    for _ in range(merges):
        pairs = Counter(pair for word in words for pair in pairwise(word))
        a, b = max(pairs, key=lambda pair: (pairs[pair], pair))
        words = [merged(word, a, b) for word in words]
        made.append([a, b])
        vocab[a + b] = len(vocab)
    return vocab, made


def merged(word: list[str], a: str, b: str) -> list[str]:
    out = []
    for part in word:
        if out and (out[-1], part) == (a, b):
            out[-1] = a + b
        else:
            out.append(part)
    return out


def by_merges(spec: dict, words: list[str]) -> list[int]:
    """The ids of words by definition: each merge of the list in turn, wherever it applies; bytes without a
    token are dropped from each word first."""
    vocab, ids = spec["model"]["vocab"], []
    for word in words:
        parts = [letter for letter in spelt(word.encode()) if letter in vocab]
        for a, b in spec["model"]["merges"]:
            parts = merged(parts, a, b)
        ids += [vocab[part] for part in parts]
    return ids


def added(i: int, content: str, special: bool = True, **flags) -> dict:
    rest = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, **flags}
    return {"id": i, "content": content, "special": special, **rest}


def file(
    splitter=BYTE_LEVEL, pattern=GPT2, count=60, tokens=(), normalizer=None, alphabet=range(256)
) -> dict:
    vocab, merges = trained(TEXT, pattern, count, alphabet)
    model = {"type": "BPE", "vocab": vocab, "merges": merges}
    rest = {"normalizer": normalizer, "pre_tokenizer": splitter, "added_tokens": [*tokens]}
    return copy.deepcopy({"version": "1.0", "model": model, **rest})


def split(pattern: str) -> dict:
    cut = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    return {"type": "Sequence", "pretokenizers": [cut, PLAIN]}


DIGITS_FIRST = {
    "type": "Sequence",
    "pretokenizers": [{"type": "Digits", "individual_digits": True}, BYTE_LEVEL],
}


def texts(count: int, seed: int = 0) -> list[str]:
    rng = random.Random(seed)
    return ["".join(rng.choices(ALPHABET, k=rng.randint(0, 30))) for _ in range(count)]


# ------------------------------------------------------------------------------------------------- the ids


@pytest.mark.parametrize("splitter, pattern", [(BYTE_LEVEL, GPT2), (split(WORDS), WORDS)])
def test_ids_are_those_of_the_merges_applied_one_after_the_other(splitter, pattern):
    spec = file(splitter, pattern)
    vocabulary = read_vocabulary(spec, "x")
    for text in [TEXT, *texts(300)]:
        assert encode(vocabulary, text) == by_merges(spec, regex.findall(pattern, text))
        assert vocabulary.encoding.decode(encode(vocabulary, text)) == text


def test_digits_that_are_cut_out_first_are_words_and_so_is_the_white_space_before_them():
    spec, total = file(DIGITS_FIRST, DIGITS), 0
    assert "ĠĠĠ" in spec["model"]["vocab"]
    vocabulary = read_vocabulary(spec, "x")
    for text in [TEXT, "a  1 b   22\n3's 4't", *texts(300)]:
        pieces = regex.findall(r"\p{N}|\P{N}+", text)
        words = [word for piece in pieces for word in regex.findall(GPT2, piece)]
        assert encode(vocabulary, text) == by_merges(spec, words)
        total += words != regex.findall(GPT2, text)
    assert total > 20


def test_bytes_without_a_token_are_dropped_after_the_text_was_cut_into_words():
    kept = sorted({*TEXT.encode()} - {*b"!"})
    spec = file(alphabet=kept)
    vocabulary = read_vocabulary(spec, "x")
    assert {*vocabulary.missing} == {*range(256)} - {*kept}
    for text in ["a!t", "!a", "the!the", ".!;", "!", "🏳️‍🌈", "\U00040000a", *texts(300)]:
        assert encode(vocabulary, text) == by_merges(spec, regex.findall(GPT2, text))
    join = encode(vocabulary, "t!h"), encode(vocabulary, "th")
    assert len(join[0]) == 2 and len(join[1]) == 1  # "t", "!", "h" were three words
    assert encode(vocabulary, ".!;") == encode(vocabulary, ".;")
    assert encode(vocabulary, "a\ud800!") == encode(vocabulary, "a?!")  # what UTF-8 cannot hold


def test_special_tokens_in_a_text_stay_text_and_inline_ones_are_recognised_the_longest_first():
    tokens = [added(316, "<s>"), added(317, "<a", special=False), added(318, "<a>", special=False)]
    vocabulary = read_vocabulary(file(tokens=tokens), "x")
    assert vocabulary.inline == {"<a", "<a>"}
    plain = read_vocabulary(file(), "x")
    assert encode(vocabulary, "t<s>h") == encode(plain, "t<s>h")
    assert encode(vocabulary, "t<a>h<ab") == [
        *encode(plain, "t"),
        318,
        *encode(plain, "h"),
        317,
        *encode(plain, "b"),
    ]
    assert encode(vocabulary, "<a>") == [318] and encode(vocabulary, "") == []


def test_text_is_normalised_between_inline_tokens_which_are_looked_for_first():
    vocabulary = read_vocabulary(
        file(tokens=[added(316, "<a>", special=False)], normalizer={"type": "NFC"}), "x"
    )
    plain = read_vocabulary(file(), "x")
    assert vocabulary.nfc and not plain.nfc
    assert encode(vocabulary, "e\u0301") == encode(plain, "é") != encode(plain, "e\u0301")
    assert encode(vocabulary, "<a>\u0338") == [316, *encode(plain, "\u0338")]  # ">" and U+0338 would compose


def test_white_space_without_end_is_encoded_in_pieces():
    for pattern, splitter in ((GPT2, BYTE_LEVEL), (WORDS, split(WORDS)), (DIGITS, DIGITS_FIRST)):
        vocabulary = read_vocabulary(file(splitter, pattern), "x")
        text = "a" + " " * 10**6 + "b" + " \n" * 10**6
        assert vocabulary.encoding.decode(encode(vocabulary, text)) == text
        short = " " * RUN
        assert encode(vocabulary, short) == vocabulary.encoding.encode_ordinary(short)


def test_a_token_that_no_merge_makes_is_a_word_of_its_own_where_the_file_says_so():
    spec = file()
    spec["model"]["vocab"]["zqzqz"] = 316
    with pytest.raises(UserError, match="merges"):
        read_vocabulary(spec, "x")
    spec["model"]["ignore_merges"] = True
    vocabulary = read_vocabulary(spec, "x")
    assert encode(vocabulary, "zqzqz") == [316]
    assert encode(vocabulary, " zqzqz") == by_merges(spec, [" zqzqz"])
    assert write_vocabulary(vocabulary)["model"]["ignore_merges"] is True


def test_a_token_of_bytes_that_are_missing_is_refused():
    """`tokenizers` would look a word up before it drops them, or could not make the token at all."""
    for ignore in (False, True):
        spec = file(alphabet=sorted({*TEXT.encode()} - {*b"Z"}))
        spec["model"]["ignore_merges"] = ignore
        read_vocabulary(spec, "x")
        for token, merges in (("ZZ", [["Z", "Z"]]), ("zqzqz", [])):
            edited = copy.deepcopy(spec)
            edited["model"]["vocab"][token] = 316
            edited["model"]["merges"] += merges
            with pytest.raises(UserError, match="merges"):
                read_vocabulary(edited, "x")


def test_of_two_like_neighbours_the_first_are_joined():
    vocab, merges = file()["model"]["vocab"], [["a", "a"], ["aa", "a"]]
    spec = file(count=0)
    spec["model"] = {
        "vocab": {k: i for k, i in vocab.items() if i < 256} | {"aa": 256, "aaa": 257},
        "merges": merges,
    }
    assert (
        encode(read_vocabulary(spec, "x"), "aaaa aaa")
        == by_merges(spec, ["aaaa", " aaa"])
        == [256, 256, 32, 257]
    )
    spec["model"]["merges"][1] = ["a", "aa"]
    with pytest.raises(UserError, match="merges"):
        read_vocabulary(spec, "x")


def test_merges_that_tiktoken_would_not_make_are_refused():
    base = file()
    early, late = base["model"]["merges"][3], base["model"]["merges"][30]
    swapped = copy.deepcopy(base)
    swapped["model"]["merges"][3], swapped["model"]["merges"][30] = late, early
    fewer = copy.deepcopy(base)
    fewer["model"]["merges"].pop(30)
    other = copy.deepcopy(base)  # "abc" is made of a and bc, but a and b are joined first
    other["model"]["vocab"] |= {"Zx": 316, "xQ": 317, "ZxQ": 318}
    other["model"]["merges"] += [["Z", "x"], ["x", "Q"], ["Z", "xQ"]]
    assert by_merges(other, ["ZxQ"]) == [316, other["model"]["vocab"]["Q"]]
    unknown = copy.deepcopy(base)
    unknown["model"]["merges"].append(["Z", "x"])
    for spec in (swapped, fewer, other, unknown):
        for ignore in (False, True):
            spec["model"]["ignore_merges"] = ignore
            with pytest.raises(UserError, match=r"^x cannot be used: its merges are not"):
                read_vocabulary(spec, "x")


def test_merges_are_read_as_strings_and_as_pairs():
    spec = file()
    spaced = copy.deepcopy(spec)
    spaced["model"]["merges"] = [" ".join(pair) for pair in spec["model"]["merges"]]
    assert read_vocabulary(spec, "x").encoding.name == read_vocabulary(spaced, "y").encoding.name


def test_the_name_says_what_is_in_the_file_and_not_where_it_is():
    tokens = [added(316, "<s>"), added(317, "<a>", special=False)]
    name = read_vocabulary(file(tokens=tokens), "x").encoding.name
    assert regex.fullmatch("json-[0-9a-f]{12}", name)
    turned = file(tokens=tokens[::-1])
    turned["model"]["vocab"] = dict(reversed(turned["model"]["vocab"].items()))
    assert read_vocabulary(turned, "elsewhere").encoding.name == name
    others = [
        file(tokens=tokens, count=59),
        file(split(GPT2.replace("?:", "?i:")), tokens=tokens),
        file(tokens=tokens, normalizer={"type": "NFC"}),
        file(tokens=[added(316, "<s>"), added(317, "<a>")]),
        file(tokens=[added(316, "<s>"), added(318, "<a>", special=False)]),
        file(tokens=[added(316, "<t>"), added(317, "<a>", special=False)]),
    ]
    names = {read_vocabulary(spec, "x").encoding.name for spec in others}
    assert len(names) == len(others) and name not in names


# -------------------------------------------------------------------------------------------- and back


def test_what_is_written_is_what_was_read():
    tokens = [added(316, "<s>"), added(400, "<a>", special=False)]
    spec = file(DIGITS_FIRST, DIGITS, tokens=tokens, normalizer={"type": "NFC"})
    written = json.loads(json.dumps(write_vocabulary(read_vocabulary(spec, "x"))))
    assert written["model"]["merges"] == spec["model"]["merges"]
    assert written["model"]["vocab"] == {**spec["model"]["vocab"], "<s>": 316, "<a>": 400}
    assert written["added_tokens"] == tokens and written["normalizer"] == {"type": "NFC"}
    assert read_vocabulary(written, "y").encoding.name == read_vocabulary(spec, "x").encoding.name


@pytest.mark.parametrize("name", ["world", "r50k"])
def test_a_tiktoken_encoding_comes_back_with_all_its_ids(name, request):
    base = world_encoding() if name == "world" else request.getfixturevalue("r50k").encoding
    special = {**base._special_tokens, "<|u|>": base.n_vocab + 2, "<|v|>": base.n_vocab + 9}  # with gaps
    encoding = tiktoken.Encoding(
        "y", pat_str=base._pat_str, mergeable_ranks=base._mergeable_ranks, special_tokens=special
    )
    back = read_vocabulary(json.loads(json.dumps(write_vocabulary(Vocabulary(encoding)))), "x")
    assert back.encoding._mergeable_ranks == encoding._mergeable_ranks
    assert back.encoding._special_tokens == special and back[1:] == (False, frozenset(), b"")
    for text in [TEXT, "a \n", "  \n  ", *texts(300)]:
        assert encode(back, text) == encode(Vocabulary(encoding), text) == encoding.encode_ordinary(text)


def test_counted_and_possessive_patterns_are_written_in_words_that_both_read_alike():
    ranks = world_encoding()._mergeable_ranks
    pattern = r"'(?i:[sdmt]|ll)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|"
    pattern += r"\s++$|\s*[\r\n]|\s+(?!\S)|\s"  # as cl100k_base has it
    encoding = tiktoken.Encoding("y", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
    written = write_vocabulary(Vocabulary(encoding))["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"]
    assert "{1,3}+" not in written and "$" not in written and r"(?>\p{N}{1,3})" in written
    back = read_vocabulary(write_vocabulary(Vocabulary(encoding)), "x")
    for text in ["12345678 \n", " \n ", "a  ", *texts(300)]:
        assert encode(back, text) == encoding.encode_ordinary(text)


def test_an_encoding_that_cannot_be_written_is_named():
    ranks = world_encoding()._mergeable_ranks
    odd = tiktoken.Encoding("odd", pat_str=r"^\w+|[\s\S]", mergeable_ranks=ranks, special_tokens={})
    twice = tiktoken.Encoding("twice", pat_str=GPT2, mergeable_ranks=ranks, special_tokens={"a": 5000})
    for encoding in (odd, twice):
        with pytest.raises(UserError, match=f"{encoding.name}.*cannot be written"):
            write_vocabulary(Vocabulary(encoding))


# --------------------------------------------------------------------------------------------- refusals


def change(path: str, value):
    """A change to a good file at "a.b.0"; `...` deletes."""

    def changed(spec):
        *way, last = (int(key) if key.isdigit() else key for key in path.split("."))
        for key in way:
            spec = spec[key]
        if value is ...:
            del spec[last]
        else:
            spec[last] = value

    return changed


SEQUENCE = "pre_tokenizer.pretokenizers"
REFUSED = [
    (change("model.type", "Unigram"), "'Unigram'.*byte-level BPE"),
    (change("model.type", "WordPiece"), "'WordPiece'.*byte-level BPE"),
    (change("model.byte_fallback", True), "SentencePiece"),
    (change("model.dropout", 0.1), "dropout"),
    (change("model.continuing_subword_prefix", "##"), "continuing_subword_prefix"),
    (change("model.end_of_word_suffix", "</w>"), "end_of_word_suffix"),
    (change("model.vocab.▁the", 316), "not of bytes"),
    (change("model.vocab.the", -1), "ids"),
    (change("model.vocab.the", 5), "ids"),
    (change("model.vocab.the", 2**31), "ids"),
    (change("model.vocab.the", 1.5), "ids"),
    (change("model.vocab.the", True), "ids"),
    (change("added_tokens.0.id", 5), "ids"),
    (change("added_tokens.0.content", ""), "ids"),
    (change("model.vocab.<s>", 317), "ids"),
    (change("added_tokens.0.lstrip", True), "lstrip"),
    (change("added_tokens.0.rstrip", True), "rstrip"),
    (change("added_tokens.0.single_word", True), "single_word"),
    (change("normalizer", {"type": "NFKC"}), "normalizer.*NFKC"),
    (change("normalizer", {"type": "Sequence", "normalizers": []}), "normalizer.*Sequence"),
    (change("pre_tokenizer", None), "cuts text into words"),
    (change("pre_tokenizer", {"type": "Metaspace", "replacement": "▁"}), "Metaspace"),
    (change("pre_tokenizer", {**BYTE_LEVEL, "add_prefix_space": True}), "add_prefix_space"),
    (change("pre_tokenizer", PLAIN), "cuts text into words"),
    (change(f"{SEQUENCE}.0.behavior", "Removed"), "Removed"),
    (change(f"{SEQUENCE}.0.invert", True), "cuts text into words"),
    (change(f"{SEQUENCE}.0.pattern", {"String": " "}), "String"),
    (change(f"{SEQUENCE}.1.use_regex", True), "cuts text into words"),
    (change(f"{SEQUENCE}.1.add_prefix_space", True), "cuts text into words"),
    (change(f"{SEQUENCE}.0", {"type": "Digits", "individual_digits": False}), "Digits"),
    *((change(f"{SEQUENCE}.0.pattern.Regex", p), "cuts text into words") for p in (
        r"\s+$|\S+|\s", r"^a|[\s\S]", r"\p{N}{1,3}+|\s|\S", r"(?:a|b)+|[\s\S]", r"\w+|\W", r"[a&&b]|\s|\S",
        r"(", r"(?=x)|[\s\S]", r"(a)|[\s\S]",
    )),
    *((change(f"{SEQUENCE}.0.pattern.Regex", p), "empty words") for p in ("", r"[\s\S]|x*", r"x?|[\s\S]")),
    (change(f"{SEQUENCE}.0.pattern.Regex", r"\p{L}+"), "leaves some out"),
    (change(f"{SEQUENCE}.0.pattern.Regex", r"\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"), "leaves some out"),
    (change("model", ...), "is no tokenizer.json"),
    (change("model.vocab", ...), "is no tokenizer.json"),
    (change("model.merges", ...), "is no tokenizer.json"),
    (change("model.merges.0", "a b c"), "x "),
    (change("model.merges.0", 7), "is no tokenizer.json"),
    (change("added_tokens.0", "<s>"), "is no tokenizer.json"),
]  # fmt: skip


@pytest.mark.parametrize("edit, told", REFUSED)
def test_what_tiktoken_cannot_do_is_refused_in_one_sentence(edit, told):
    spec = file(split(WORDS), WORDS, tokens=[added(316, "<s>")])
    read_vocabulary(spec, "x")
    edit(spec)
    with pytest.raises(UserError, match=told) as caught:
        read_vocabulary(spec, "x")
    assert str(caught.value).startswith("x ") and "\n" not in str(caught.value)


def test_flags_that_change_nothing_are_read():
    tokens = [added(316, "<s>", normalized=True)]
    plain = read_vocabulary(file(tokens=tokens), "x")
    spec = file(tokens=tokens)
    del spec["model"]["type"]  # as in older files
    spec["model"] |= {
        "unk_token": "<s>",
        "continuing_subword_prefix": "",
        "end_of_word_suffix": "",
        "dropout": None,
    }
    spec["post_processor"] = {"type": "TemplateProcessing"}
    assert read_vocabulary(spec, "x").encoding.name == plain.encoding.name
    few = file(alphabet=sorted({*TEXT.encode()}))
    few["model"]["unk_token"] = "a"
    with pytest.raises(UserError, match="unk_token"):
        read_vocabulary(few, "x")
    with pytest.raises(UserError, match="normalized"):
        read_vocabulary(file(tokens=tokens, normalizer={"type": "NFC"}), "x")


ODD = [
    None,
    True,
    -1,
    0,
    3,
    10**30,
    2**63,
    1.5,
    float("nan"),
    "",
    " ",
    "a b",
    "x" * 3000,
    "\ud800",
    "\x1b[2J\n",
]
ODD += [
    [],
    [1, [2]],
    {},
    {"type": "BPE"},
    {"a": {"b": 1}},
    [["a", "b"]],
    "\\p{L}+",
    "(?:",
    "ByteLevel",
    "Sequence",
]


def places(value, path=()):
    yield path
    if isinstance(value, dict | list):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield from places(value[key], (*path, key))


def test_edited_files_are_read_or_refused_in_one_sentence(fuzz):
    tokens = [added(316, "<s>"), added(317, "<a>", special=False)]
    good = file(split(WORDS), WORDS, count=20, tokens=tokens, normalizer={"type": "NFC"})
    good["model"]["vocab"] |= {"<s>": 316}
    everywhere = [*places(good)]
    short = [path for path in everywhere if path[:2] not in (("model", "vocab"), ("model", "merges"))]
    read = 0
    for rng in fuzz(400):
        spec = copy.deepcopy(good)
        for _ in range(rng.randint(1, 2)):
            *way, last = rng.choice(short if rng.random() < 0.7 else everywhere) or ["model"]
            try:
                inside = spec
                for key in way:
                    inside = inside[key]
                if rng.random() < 0.2:
                    del inside[last]
                elif rng.random() < 0.2 and isinstance(inside, dict):
                    inside[rng.choice(["", "a", "Ġthe", "é", "▁", "zz"])] = inside.pop(last)
                else:
                    inside[last] = copy.deepcopy(rng.choice(ODD))
            except (LookupError, TypeError):
                continue  # an earlier edit has taken the place away
        try:
            vocabulary = read_vocabulary(spec, "x")
        except UserError as error:
            assert str(error).startswith("x ") and "\n" not in str(error) and str(error).isprintable()
            continue
        for text in texts(3, seed=read):
            encode(vocabulary, text)
        read_vocabulary(write_vocabulary(vocabulary), "y")
        read += 1
    assert read > 20
    for whole in ODD:
        with pytest.raises(UserError):
            read_vocabulary(whole, "x")


def test_the_words_own_vocabulary_encodes_as_before():
    world = get_tokenizer("world")
    for text in texts(200):
        assert encode(Vocabulary(world_encoding()), text) == world.encode(text)
