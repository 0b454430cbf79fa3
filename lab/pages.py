"""Write what commands print into the pages that quote it.

    python -m lab.pages docs/*.md README.md

A page names a command in a comment, and below it stands what the command printed, up to the closing comment:

    <!-- python -m lab.seeds out/seed0/scorecard.json out/seed1/scorecard.json -->
    | 2 seeds | base | sft |
    <!-- end -->

Commands are the laboratory's own (`python -m lab.NAME …`), run without a shell; one that fails leaves its
page as it was. A page whose commands print what it says already is left alone.
"""

import glob
import re
import shlex
import subprocess
import sys
from pathlib import Path

from lab import run_on_paths
from nanoalign import UserError
from nanoalign.files import write_text

BLOCK = re.compile(r"^<!-- (python -m lab\.\w+[^\n]*) -->\n(.*?)^<!-- end -->$", re.MULTILINE | re.DOTALL)


def printed(command: str) -> str:
    """What a command of the laboratory prints; names with * stand for the files that there are."""
    _, *words = shlex.split(command)
    words = [name for word in words for name in (sorted(glob.glob(word)) or [word])]
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, encoding="utf-8")
    if done.returncode:
        raise UserError(f"`{command}` failed: {done.stderr.strip()[-300:] or done.stdout.strip()[-300:]}")
    return done.stdout.strip("\n")


def renewed(page: str, run=printed) -> str:
    """A page with every block as its command prints it now; UserError if a block does not end."""
    if page.count("<!-- python -m lab.") != len(blocks := BLOCK.findall(page)):
        raise UserError(
            f"a table has no `<!-- end -->`: it is not behind one of {[name for name, _ in blocks]}."
        )
    return BLOCK.sub(lambda block: f"<!-- {block[1]} -->\n{run(block[1])}\n<!-- end -->", page)


def main(paths: list[str]) -> None:
    if not paths:
        raise UserError("name the pages, such as docs/results.md.")
    for path in paths:
        before = Path(path).read_text(encoding="utf-8")
        if (after := renewed(before)) != before:
            write_text(path, after)
        print(
            f"{path}: {len(BLOCK.findall(before))} tables, {'renewed' if after != before else 'as they were'}"
        )


if __name__ == "__main__":
    run_on_paths(main)
