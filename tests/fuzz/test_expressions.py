"""Reward expressions from a grammar and from noise: they are read, or refused in one sentence."""

import pytest

from nanoalign import UserError
from nanoalign.expressions import parse_reward, parse_rewards, spelled_out
from nanoalign.rewards import make_reward
from nanoalign.tokenizer import get_tokenizer

TOKENIZER = get_tokenizer("world")
NAMES = [
    "judge",
    "answer",
    "length",
    "a.pt",
    "b/c d.pt",
    "rm.*.pt",
    "rm.[12].pt",
    "[",
    "*",
    "x.py:f",
    "x.py:f(a - b)",
]
NAMES += [
    "",
    " ",
    ".pt",
    ":",
    "x.py:f(",
    "x.py:(a)",
    "own.py:score",
    "own.py:score()",
    "own.py:score(own.py)",
    "(",
    ")",
]
KINDS = [
    "",
    "",
    "",
    "mean:",
    "min:",
    "mean-1std:",
    "mean-1e999std:",
    "mean-std:",
    "prm-min:",
    "prm-steps:",
    "rm:",
    "max:",
]
WEIGHTS = [
    "",
    "",
    "",
    "0.5*",
    "-2*",
    "1e-3*",
    "nan*",
    "inf*",
    "1e999*",
    "1e39*",
    "-*",
    "**",
    "0x1*",
    "１*",
    "9" * 400 + "*",
]
JOINTS = [" + ", " - ", "+", " +", ", ", ",", " ", "  -  ", " + + ", "\n+ ", "\t-\n", ""]
NOISE = "ab.pt*:?[]()+-, \t\n\r\0\x1b/~\\'\"{}%$é½٣\u2028\ud800😀"


def expression(rng) -> str:
    terms = [rng.choice(WEIGHTS) + rng.choice(KINDS) + rng.choice(NAMES) for _ in range(rng.randint(1, 4))]
    text = "".join(term + rng.choice(JOINTS) * (rng.random() < 0.9) for term in terms)
    if rng.random() < 0.3:
        at = rng.randrange(len(text) + 1)
        text = text[:at] + "".join(rng.choices(NOISE, k=rng.randint(1, 6))) + text[at + rng.randint(0, 3) :]
    return text


def outcome(read, text: str) -> str:
    try:
        read(text)
    except UserError as error:
        assert str(error).isprintable(), (text, str(error))
        return "refused"
    return "read"


def test_an_expression_is_read_or_refused_in_one_sentence(fuzz, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.py").write_text(
        "def score(rows, texts, ended, text=''):\n    return [1.0] * len(texts)\n"
    )
    (tmp_path / "b").mkdir()
    outcomes = set()
    for rng in fuzz(300):
        text = expression(rng)
        whole = outcome(lambda text: make_reward(text, TOKENIZER, "cpu"), text)
        parts = outcome(parse_reward, text), outcome(parse_rewards, text)
        assert (whole, parts[0]) != ("read", "refused")
        assert isinstance(spelled_out(text), str)
        outcomes |= {whole, *parts}
    assert outcomes == {"read", "refused"}


@pytest.mark.parametrize("text", ["a.pt + " * 500, "(" * 10**4, "mean:" + "a.pt," * 500, "judge, " * 500])
def test_long_expressions_take_no_longer_than_they_are(text):
    for read in (parse_reward, parse_rewards, spelled_out, lambda text: make_reward(text, TOKENIZER, "cpu")):
        outcome(read, text)
