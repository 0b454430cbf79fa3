"""Reward expressions: text → terms, and the files that they read. The one parser of whatever names a reward.

    parse_reward("min:rm.*.pt - 0.02*length") → [Term(1.0, "min", "rm.*.pt"), Term(-0.02, "length", "")]

Terms are joined by + and − between spaces, and the rewards of --watch by a comma and a space. Neither parts
what stands in brackets, nor the name of a file that exists: "my runs - old, too/rm [1].pt" is a path, too.
"""

import glob
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from nanoalign import UserError

ALIASES = {"judge": "nanoalign/world/verdicts.py:utility"}
FUNCTION = r"(.+\.py):(\w+)(?:\((.*)\))?"
NUMBER = r"(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?"
MODELS = rf"(mean|min|mean-{NUMBER}std|prm-(?:min|product|last|steps)):(.+)"
UNPRINTABLE = r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udbff]"


class Term(NamedTuple):
    """weight · kind:path, of a kind that `make_reward` knows; a function's path is file.py:function(text)."""

    weight: float
    kind: str
    path: str

    @property
    def files(self) -> list[str]:
        """What it reads: checkpoints, or a function's file and the file that it is handed, if it is one."""
        if self.kind == "function":
            file, _, text = re.fullmatch(FUNCTION, self.path).groups()
            return [str(find(file)), *([text] if text and os.path.isfile(text) else [])]
        if self.kind.startswith(("mean", "min")):
            return members(self.path)
        return [self.path] if self.path else []


def parse_reward(expression: str) -> list[Term]:
    """A reward expression → its terms. Raises UserError for one that is unknown."""
    first, *more = cut(expression.strip(), r"\s+[+-]\s+", lambda text: [parse_term(text)])
    signs = [1.0, *(-1.0 if "-" in sign else 1.0 for sign in more[::2])]
    return [parse_term(text, sign) for text, sign in zip([first, *more[1::2]], signs)]


def parse_rewards(text: str) -> list[str]:
    """ "judge, out/rm.pt" → its expressions."""
    return cut(text, ", ", parse_reward)[::2] if text else []


def parse_term(text: str, sign: float = 1.0) -> Term:
    weighted = re.fullmatch(rf"([+-]?{NUMBER})\*(.+)", text)
    weight, name = (sign * float(weighted[1]), weighted[2]) if weighted else (sign, text)
    name = ALIASES.get(name, name)
    models = re.fullmatch(MODELS, name)
    deviations = re.fullmatch("mean-(.+)std", models[1]) if models else None
    if max(abs(weight), float(deviations[1]) if deviations else 0.0) > 3e38:
        raise UserError(f"the number in {text[:80]!r} is too large for single precision.")
    if re.search(UNPRINTABLE, name):
        raise UserError(f"the reward {text[:80]!r} has a line break or an unprintable character in it.")
    if name in ("length", "answer"):
        return Term(weight, name, "")
    if models:
        return Term(weight, *models.groups())
    if re.fullmatch(FUNCTION, name):
        return Term(weight, "function", name)
    if name.endswith(".pt") and not re.match(r"\w+:", name):
        return Term(weight, "rm", name)
    raise UserError(
        f"there is no reward {name[:80]!r}; give a checkpoint.pt, file.py:function, judge, answer, length, "
        "mean:…, min:…, mean-1std:… or prm-min:…, weighed (0.5*judge) and joined by ' + ' and ' - '."
    )


def cut(text: str, separator: str, parse: Callable) -> list[str]:
    """Text → its parts and the separators between them, in turn. A separator inside brackets is none, nor is
    one in a part that `parse` makes terms of whose files all exist."""
    opened, bracketed = [], set()
    for i, character in enumerate(text):
        if character == "(":
            opened.append(i)
        elif character == ")" and opened:
            bracketed.update(range(opened.pop(), i))
    parts, at = [], 0
    for found in re.finditer(separator, text):
        if found.start() not in bracketed:
            parts += [text[at : found.start()], found[0]]
            at = found.end()
    parts.append(text[at:])

    def exists(part: str) -> bool:
        try:
            files = [file for term in parse(part) for file in term.files]
        except UserError:
            return False
        return bool(files) and all(map(os.path.isfile, files))

    joined, i = [], 0
    while i < len(parts):
        ends = range(min(i + 9, len(parts)), i + 1, -2)  # of four separators at most
        end = next((end for end in ends if exists("".join(parts[i:end]))), i + 1)
        joined += ["".join(parts[i:end]), *parts[end : end + 1]]
        i = end + 1
    return joined


def members(names: str) -> list[str]:
    """Names and patterns of checkpoints, joined by commas → their paths, each once."""
    paths = {}
    for name in cut(names, ",", lambda text: [Term(1.0, "rm", path) for path in matching(text)])[::2]:
        if not (found := matching(name)):
            raise UserError(f"no checkpoint matches {name[:80]!r} of the ensemble {names[:80]!r}.")
        for path in found:
            paths.setdefault(os.path.realpath(path), path)
    return [*paths.values()]


def matching(name: str) -> list[str]:
    """A pattern → the finished checkpoints that it stands for; another name, or that of a file → itself."""
    if os.path.exists(name) or not re.search(r"[*?[]", name):
        return [name] if name else []
    found = glob.glob(name) or glob.glob(name.replace("[", "[[]"))  # a folder may have brackets in its name
    return sorted(path for path in found if not path.endswith(".partial.pt"))


def find(file: str) -> Path:
    """A Python file by its path from here, or from the repository's root."""
    for path in (file, os.path.join(Path(__file__).parents[1], file)):
        if os.path.isfile(path):
            return Path(path).resolve()
    raise UserError(f"there is no Python file {file}; check the path.")


def spelled_out(text: str) -> str:
    """A flag's text with every path in it in full: what names the same files becomes the same text."""
    if os.path.exists(text):
        return os.path.realpath(text)
    if re.search(UNPRINTABLE, text):
        return text
    try:
        return ", ".join(" + ".join(map(_spell, parse_reward(one))) for one in parse_rewards(text))
    except UserError:
        return os.path.realpath(text) if os.sep in text else text


def _spell(term: Term) -> str:
    path = ",".join(map(os.path.realpath, term.files))
    if term.kind == "function":
        _, name, text = re.fullmatch(FUNCTION, term.path).groups()
        path += f":{name}({text})"
    return f"{term.weight}*{term.kind}:{path}"
