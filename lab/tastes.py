"""The world's people without one of their tastes: who likes agreement makes sycophants.

python collect.py --annotator "lab/tastes.py:without(agreement)" --out plain.jsonl
"""

from dataclasses import replace

from nanoalign import UserError
from nanoalign.world.people import BIASES, compare, people


def without(rows: list, drawn: list, pairs, flags, names: str) -> tuple[list, list]:
    """The world's comparison by a crowd whose biases of these names (joined by +, or all) are zero."""
    off = set(BIASES) if names == "all" else set(names.split("+"))
    if off - set(BIASES):
        raise UserError(f"people have no taste called {', '.join(off - set(BIASES))}: {', '.join(BIASES)}.")
    crowd = [replace(p, biases=p.biases | dict.fromkeys(off, 0.0)) for p in people(flags.crowd)]
    return compare(rows, drawn, pairs, flags, crowd)
