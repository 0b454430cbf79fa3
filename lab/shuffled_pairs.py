"""train_rm.py with every pair on its own: the pairs of a prompt are spread over batches, as if they had
nothing to do with each other. InstructGPT (§3.5) saw a reward model over-fit that way.

    python -m lab.shuffled_pairs --batch-size 96          # of pairs; other flags as train_rm.py's
"""

from unittest.mock import patch

import numpy as np

import train_rm
from nanoalign import cli

Config = train_rm.Config


def one_by_one(pairs: list, rows: list[dict]) -> list[train_rm.Prompt]:
    """In place of `train_rm.by_prompt`: a "prompt" for each pair, which weighs as much as any other."""
    first, second = np.array([0]), np.array([1])
    return [train_rm.Prompt(list(pair), first, second, [row]) for pair, row in zip(pairs, rows)]


def main(config: Config) -> None:
    with patch.object(train_rm, "by_prompt", one_by_one):
        train_rm.main(config)


if __name__ == "__main__":
    cli.run(main, Config, __doc__)
