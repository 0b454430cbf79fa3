"""Do the pages say what is so? What docs/methods and docs/README.md refer to, quote and measure.

    python -m lab.docs_check                        # all of them
    python -m lab.docs_check docs/methods/dpo.md

- `file.py:name` is in that file; lines of Python quoted below such a reference stand in it.
- `test_name` is a test; `--flag` (default `x`) is that flag's default; a link leads to a file.
- A table below a command is what the command prints (python -m lab.pages writes it).
- `0.5 ± 0.1 <!-- sweeps: dpo | --beta 1 | win rate -->` is what docs/figures/sweeps.json has there.
- There is no other decimal or percentage; in a code span one stands in the source, or behind a flag.
"""

import ast
import contextlib
import dataclasses
import importlib
import io
import json
import re
import shlex
from functools import cache
from pathlib import Path

from lab import exercises, run_on_paths
from lab.pages import BLOCK, renewed
from nanoalign import UserError

ROOT, MOST = Path(__file__).parents[1], 150  # lines of a page about a method
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
REFERENCE = re.compile(r"`([\w/]+\.py):([\w.]+)`")
FIGURE = re.compile(r"(-?\d[\d,.]*(?: ± \d[\d.]*)?|–) <!-- (\w+): ([^>]*) -->")
DEFAULT = re.compile(r"`--([\w-]+)` \(default `([^`]*)`\)")
NUMBER = re.compile(r"\d ?%|\d\.\d|\de-?\d")
NO_PROSE = re.compile(r"<!--.*?-->|\]\([^)]*\)|https?://\S+|§[\d.]+")
PAGES = [
    *sorted((ROOT / "docs/methods").glob("*.md")),
    *(ROOT / "docs" / f"{x}.md" for x in ("README", "exercises")),
]
SCRIPTS = [path.stem for path in sorted(ROOT.glob("*.py"))]


@cache
def source(file: str, name: str = "") -> str:
    """A file, or a function, class, method or constant of it; empty if it is not there."""
    path = ROOT / file
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    body = ast.parse("\n".join(lines)).body
    for part in filter(None, name.split(".")):
        for node in body:
            [own, *_] = getattr(node, "targets", [getattr(node, "target", node)])
            if part in (getattr(own, "id", ""), getattr(own, "name", "")):
                found, body = lines[node.lineno - 1 : node.end_lineno], getattr(node, "body", [])
                break
        else:
            return ""
    return "\n".join(found if name else lines)


@cache
def defaults(script: str) -> dict[str, object]:
    config = importlib.import_module(script).Config
    return {field.name.replace("_", "-"): field.default for field in dataclasses.fields(config)}


@cache
def tests() -> set[str]:
    texts = (file.read_text(encoding="utf-8") for file in (ROOT / "tests").rglob("test_*.py"))
    return {name for text in texts for name in re.findall(r"def (test_\w+)", text)}


def printed(command: str) -> str:
    """What a command of the laboratory prints, without a new interpreter."""
    _, _, module, *words = shlex.split(command)
    if module == "lab.exercises":
        return exercises.listed()
    with contextlib.redirect_stdout(io.StringIO()) as out:
        importlib.import_module(module).main(words)
    return out.getvalue().strip("\n")


def figure(file: str, keys: str) -> str | None:
    path = ROOT / "docs" / "figures" / f"{file}.json"
    found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
    for key in keys.split(" | "):
        found = found.get(key) if isinstance(found, dict) else None
    return found


def unquoted(text: str) -> list[str]:
    """Lines of quoted Python that are not in what the page refers to above them."""
    wrong = []
    for fence in FENCE.finditer(text):
        above = [("", ""), *REFERENCE.findall(text[: fence.start()])][-1]
        code = " ".join(source(*above).split()) if above[0] else ""
        lines = [line for line in fence[2].splitlines() if line.strip() and fence[1] == "python"]
        wrong += [f"not in {':'.join(above)}: {x}" for x in lines if " ".join(x.split()) not in code]
    return wrong


def problems(text: str, folder: Path = ROOT / "docs/methods", printed=printed) -> list[str]:
    """What a page gets wrong, a sentence each."""
    links = re.findall(r"\]\((?!\w+:)([^)#\s]+)", text)
    own = next((stem for link in links if (stem := Path(link).stem) in SCRIPTS), None)
    flags = {
        name: value for script in [*SCRIPTS, *filter(None, [own])] for name, value in defaults(script).items()
    }
    named = re.findall(r"`[^`\n]*?--(?:no-)?([a-z][\w-]*)", text)
    wrong = [f"no {file}:{name}" for file, name in REFERENCE.findall(text) if not source(file, name)]
    wrong += unquoted(text)
    wrong += [f"no test {name}" for name in re.findall(r"`(test_\w+)`", text) if name not in tests()]
    wrong += [f"no file {link}" for link in links if not (folder / link).exists()]
    wrong += [f"no flag --{flag}" for flag in named if flag not in flags | {"help": 0}]
    wrong += [f"--{flag} is {flags[flag]} by default, not {told}" for flag, told in DEFAULT.findall(text)
              if flag in flags and str(flags[flag]) != told]  # fmt: skip
    wrong += [
        f"{told} is not {file}: {keys}"
        for told, file, keys in FIGURE.findall(text)
        if figure(file, keys) != told
    ]
    if renewed(text, printed) != text:
        wrong.append("a table is not what its command prints: python -m lab.pages writes it")
    if folder.name == "methods" and (count := len(text.splitlines())) > MOST:
        wrong.append(f"{count} lines, more than {MOST}")
    prose = NO_PROSE.sub("", FIGURE.sub("", FENCE.sub("", BLOCK.sub("", text))))
    files = [file for file, _ in REFERENCE.findall(text)] + [f"{own}.py"] * bool(own)
    for span in re.findall(r"`([^`\n]+)`", DEFAULT.sub("", prose)):
        if NUMBER.search(span) and "--" not in span and not any(span in source(file) for file in files):
            wrong.append(f"`{span}` is neither behind a flag nor in {', '.join(sorted({*files}))}")
    bare = re.sub(r"`[^`\n]+`", "", prose).splitlines()
    return wrong + [f"by no command: {line.strip()}" for line in bare if NUMBER.search(line)]


def main(paths: list[str]) -> None:
    pages = [*map(Path, paths)] or PAGES
    texts = {page: page.read_text(encoding="utf-8") for page in pages}
    if found := [f"{page.name}: {x}" for page, text in texts.items() for x in problems(text, page.parent)]:
        raise UserError("; ".join(found))
    print(f"{len(pages)} pages say what is so")


if __name__ == "__main__":
    run_on_paths(main)
