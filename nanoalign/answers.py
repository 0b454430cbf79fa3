"""The final answer of a solution: the number after its last mark, exact, or none.

The marks: "####", "Answer:", "Final answer:", "The answer is", "A:" at the start of a line, \\boxed{…} and
<answer>. What follows, to the end of the line or of its first sentence, has to be a number as a whole; what
only begins like one ("5 or 6", "2 + 3 = 5") is not understood. A number may have

    a sign + − –, a currency sign on either side, thousands 1,234 or 1 234, decimals 5. .5 5.0,
    an exponent 1e3 or 1.2 × 10^3, a fraction 1/2, \\frac{1}{2}, ½ or 3 1/2, "x =" before it, and after it
    hundred to trillion, %, dozen, and a unit of up to five words, which counts for nothing
    (18 dollars per day); around all of it bold, code or $LaTeX$.

50% is a half and also 50, for a question may have asked how many percent; so too 2 dozen. Not understood, as
they can be read in two ways: 1,5 (a decimal comma, or a slip), 5k, 5M, 5!, 5:30.
"""

import re
import unicodedata
from fractions import Fraction
from typing import NamedTuple

from nanoalign import UserError
from nanoalign.expressions import parse_reward

MARK = re.compile(
    r"""\#{4,} | <answer> | (?<![^\W_])answer[*_`]*\s*(?:is\b|[:=：])\s*[:=]?
      | ^[ \t*_>]*(?-i:A)[*_]*[:：] | \\boxed\s*\{ (?P<boxed>(?:[^{}]|\{[^{}]*\})*) \}""",
    re.VERBOSE | re.MULTILINE | re.IGNORECASE,
)
PLAIN = (  # how to write plainly what LaTeX and typography write otherwise
    (r"[−–‒]", "-"),
    (r"\\[dt]?frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}", r" \1/\2"),
    (r"\\[dt]?frac([0-9])([0-9])", r" \1/\2"),
    (r"\\(?:text|mathrm|textbf|mathbf)\s*\{([^{}]*)\}", r" \1"),
    (r"\\!|</answer>.*", ""),
    (r"\{,\}", ","),
    (r"\\[,;: ()\[\]]|~", " "),
    (r"\\times|\\cdot|[×·]", "*"),
    (r"\^\{([^{}]*)\}", r"^\1"),
    (r"\^?\\circ", "°"),
    (r"\*\*|`", ""),
    (r"\\([$%])", r"\1"),
    (r"⁄", "/"),
)
POWERS = {"hundred": 100, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
DIGITS = "(?:[1-9][0-9]{0,2}(?:,[0-9]{3})+|[0-9]+)"
SPACED = "[1-9][0-9]{0,2}(?:[ ][0-9]{3})+"
NUMBER = re.compile(
    rf"""(?:[a-z]\ ?=\ ?)?
    (?P<sign>[+-]?)\ ?  (?:(?:US[$]|USD|EUR|GBP|[$€£¥₹]+)\ ?(?P<inner>[+-]?))?
    (?: (?:(?P<whole>{DIGITS})\ )?  (?P<top>{DIGITS})\ ?/\ ?(?P<bottom>{DIGITS})
      | (?P<decimal>(?:{SPACED}|{DIGITS})(?:\.[0-9]*)?|\.[0-9]+)
        (?:(?:e|\ ?[*x]\ ?10\^)(?P<exponent>[+-]?[0-9]{{1,3}}))? )
    (?:\ ?[$€£¥₹¢])?  (?P<powers>(?:\ ?(?:{"|".join(POWERS)})s?\b)*)""",
    re.VERBOSE | re.IGNORECASE,
)
WORD = r"(?:%|°?[^\W\d_]+(?:\^?[23])?|°)"
UNIT = re.compile(rf"(?:[ /-]?{WORD}(?:[ /*-]{WORD}){{0,4}})?")
FRACTIONS = "half quarter third fourth fifth sixth seventh eighth ninth tenth twelfth hundredth thousandth"
NO_UNITS = set(  # words that make another number of it
    "and or not plus minus than times divided over point below above out to pi sqrt squared cubed factorial "
    "mille bn mn mil halves zero one two three four five six seven eight nine ten eleven twelve thirteen "
    "fourteen fifteen sixteen seventeen eighteen nineteen twenty thirty forty fifty sixty seventy eighty "
    f"ninety hundred thousand million billion trillion {FRACTIONS}".split()
).union(f"{word}s" for word in FRACTIONS.split())
LETTERS = "agmslhtCFJLNVW"  # units of one letter; x and π are no units, k and M are thousands or not


class Number(NamedTuple):
    """value · scale; the scale is 1 unless a percent sign or a dozen stands behind the value."""

    value: Fraction
    scale: Fraction = Fraction(1)


def same(one: Number | None, other: Number | None) -> bool:
    """Are they equal, at their scales or but for the scale that only one of them has?"""
    if one is None or other is None:
        return False
    alike = one.value * one.scale == other.value * other.scale
    return alike or (one.value == other.value and 1 in (one.scale, other.scale))


def plain(text: str) -> str:
    """Text as people, LaTeX or Markdown write it → ASCII, as far as it goes."""
    text = re.sub(r"(?=[¼-¾⅐-⅞])", " ", text)  # 1½ is not 11/2,
    text = re.sub(r"(?<![⁰¹²³⁴-⁹⁻])(?=[⁰¹²³⁴-⁹⁻])", "^", text)  # 10³ not 103
    text = unicodedata.normalize("NFKC", text)
    for pattern, plainly in PLAIN:
        text = re.sub(pattern, plainly, text)
    return " ".join(text.split()).lstrip("*_`$ ").rstrip("*_`$. ")


def number(text: str) -> Number | None:
    """All of a text → a number, or None. Of more than a thousand characters, or 10^1000: None."""
    if len(text) > 1000 or not (found := NUMBER.match(text := plain(text))):
        return None
    unit = UNIT.fullmatch(text, found.end())
    words = re.findall(r"[^\W\d_]+", unit[0]) if unit else ["not"]
    if NO_UNITS & set(map(str.lower, words)) or any(len(w) == 1 and w not in LETTERS for w in words):
        return None
    part = {name: re.sub("[ ,]", "", value or "") for name, value in found.groupdict().items()}
    if part["decimal"]:
        value = Fraction(part["decimal"]) * Fraction(10) ** int(part["exponent"] or 0)
    else:
        top, bottom = int(part["top"]), int(part["bottom"])
        if bottom == 0 or (part["whole"] and top >= bottom):  # 3 5/2 is no mixed number
            return None
        value = int(part["whole"] or 0) + Fraction(top, bottom)
    for word in re.findall("|".join(POWERS), part["powers"].lower()):
        value *= POWERS[word]
    if part["sign"] and part["inner"]:
        return None
    unit = unit[0].lower().strip()
    percent = unit.startswith(("%", "percent", "per cent"))
    scale = Fraction(1, 100) if percent else Fraction(12 if unit.startswith("dozen") else 1)
    return Number(-value if "-" in (part["sign"], part["inner"]) else value, scale)


def final_answer(text: str) -> Number | None:
    """What a text answers: the number after its last mark."""
    *_, mark = [None, *MARK.finditer(text)]
    if mark is None or mark["boxed"] is not None:
        return number(mark["boxed"]) if mark else None
    line = text[mark.end() :].lstrip().split("\n", 1)[0].strip()
    return number(re.split(r"(?<=[.?!])\s+(?=[^\W\d_])", line, maxsplit=1)[0])


def gold_answer(row: dict) -> Number:
    """The right answer to a prompt row: its meta.answer, a number, "5", or a worked solution that ends in
    "#### 5". Raises UserError where it is not understood."""
    given = row["meta"].get("answer")
    text = str(given) if isinstance(given, (str, int, float)) and not isinstance(given, bool) else ""
    found = final_answer(text) if MARK.search(text) else number(text)
    if found is None:
        asked, what = row["prompt"][-1]["content"][:80], "missing" if given is None else repr(given)[-80:]
        raise UserError(
            f'the final answer to {asked!r} has to be a number, such as 5, "1/2" or GSM8K\'s "… #### 1,234"; '
            f"its meta.answer is {what}."
        )
    return found


def check_answers(reward: str, rows: list[dict]) -> None:
    """If a reward compares answers, read that of every row: a bad one is found now, not after hours."""
    if reward and any(term.kind == "answer" for term in parse_reward(reward)):
        for row in rows:
            gold_answer(row)


def answers(rows: list[dict], texts: list[str], ended: list[bool]) -> list[float]:
    """1.0 for a response whose final answer is the one in the row's meta."""
    return [float(same(final_answer(text), gold_answer(row))) for row, text in zip(rows, texts)]
