"""An optimiser step's rows in pieces, and of several processes each one's."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from nanoalign import parallel


def micro_batches(indices: np.ndarray, size: int, lengths=(), tokens: int = 0) -> list[np.ndarray]:
    """One optimiser step's rows in pieces, for gradient accumulation: of at most `size` rows (0: any number)
    and at most `tokens` tokens, padding included (0: any number), or of one row.

    lengths: the tokens of each of these rows; with `tokens`, a piece holds rows alike in length.
    """
    if tokens:
        order = np.argsort(lengths, kind="stable")
        indices, lengths = indices[order], np.asarray(lengths)[order]
    cuts = [0]
    for i in range(1, len(indices)):
        rows = i + 1 - cuts[-1]
        if 0 < size < rows or 0 < tokens < rows * lengths[i]:
            cuts.append(i)
    return np.split(indices, cuts[1:])


def share(count: int, unit: int = 1) -> np.ndarray:
    """Which of `count` rows are this process's, `unit` neighbours together. All get equally many, to take
    equally many steps: where it does not come out even, some come twice."""
    units, N = count // unit, parallel.size()
    mine = (np.arange(-(-units // N)) * N + parallel.rank()) % units
    return (mine[:, None] * unit + np.arange(unit)).flatten()


def dealt(rows: np.ndarray, lengths: np.ndarray, config, group: int = 1) -> list[tuple[np.ndarray, bool]]:
    """A step's rows, by index into lengths, their tokens → this process's pieces (--micro-batch and
    --micro-tokens, both of a process), and whether each counts. `group` neighbours stay together.

    All processes get equally many pieces, for they may have to meet in each: one that has too few gets one
    that counts nothing.
    """
    size, tokens, N = config.micro_batch, config.micro_tokens, parallel.size()
    shares = [rows.reshape(-1, group)[i::N].flatten() for i in range(N)]
    pieces = [micro_batches(own, size, lengths[own], tokens) if len(own) else [] for own in shares]
    own, most = pieces[parallel.rank()], max(map(len, pieces))
    own = [np.sort(piece) for piece in own] if group > 1 else own
    return [(piece, True) for piece in own] + [(rows[:1], False)] * (most - len(own))


def summed(lengths: list[int], config, measure: Callable) -> Tensor:
    """The sum (), over all rows, of these lengths, of measure(piece), a number for each row of a piece."""
    pieces = dealt(np.arange(len(lengths)), np.array(lengths), config)
    parts = [counts * measure(piece).sum() for piece, counts in pieces]
    return parallel.total(torch.stack(parts).sum())
