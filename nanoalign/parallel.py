"""One run on several processes, on torch's own engine: torchrun --nproc-per-node N train_X.py …

Every process knows all rows and what a step is made of. What takes time is shared out; then all know all.

    mine = share(len(rows))                 # of these rows (pieces.py) one makes samples, scores
    gather(mine, scores, logp)              # → those of all rows
    add_gradients(model)                    # of parts of the whole step's loss: the one all-reduce of a step

The first process alone prints and writes. On one process this does nothing. docs/distributed.md.
"""

import contextlib
import os
import re
import sys
from collections.abc import Iterator
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from nanoalign import UserError
from nanoalign.sharding import sharded

LOST = "gloo|nccl|Connection|[Tt]imed out|process group|store"  # of an error: who was to answer is gone


def size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:  # this process's number: 0 prints and writes
    return dist.get_rank() if dist.is_initialized() else 0


@contextlib.contextmanager
def joined(config, shared: bool) -> Iterator[None]:
    """While this lasts the processes that torchrun has started are one run, which ends with any of them: who
    fails first says why, in a sentence, or another that a process is lost, --timeout minutes later."""
    launched, minutes = dist.is_torchelastic_launched(), getattr(config, "timeout", 10.0)
    if not launched and getattr(config, "shard", False):
        raise UserError("--shard is for several processes: torchrun --nproc-per-node N train_X.py …")
    if launched and not shared:
        raise UserError("this runs in one process: start it with python, not by torchrun.")
    if not launched:
        yield
        return
    on_gpu = torch.cuda.is_available() and getattr(config, "device", "auto") != "cpu"
    limit = timedelta(minutes=minutes)
    if on_gpu and (own := int(os.environ["LOCAL_RANK"])) >= torch.cuda.device_count():
        raise UserError(f"this machine has no GPU {own}: --nproc-per-node is more than it has.")
    if on_gpu:
        torch.cuda.set_device(own)
    store, number, count = next(dist.rendezvous("env://", timeout=limit))
    backend = "cpu:gloo,cuda:nccl" if on_gpu else "gloo"  # what is on the CPU waits for no GPU
    dist.init_process_group(backend, store=store, rank=number, world_size=count, timeout=limit)
    try:
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere if number else sys.stdout):
            yield
    except Exception as error:
        lost = isinstance(error, RuntimeError) and re.search(LOST, str(error))
        with contextlib.suppress(RuntimeError):  # the store may be gone, too
            if store.add("ended", 1) > 1 and (lost or isinstance(error, UserError)):
                raise SystemExit(1) from None  # it has been said
        if not lost:
            raise
        why = f"or was silent for {minutes:g} minutes: all end ({str(error)[:200]})"
        raise UserError(f"another process of this run has ended, {why}.") from None
    dist.destroy_process_group()


def everyone(own) -> list:
    """What each process has of a plain value, array or tensor on the CPU, in their order."""
    if size() == 1:
        return [own]
    found = [None] * size()
    dist.all_gather_object(found, own)
    return found


def fill(mine, *columns) -> None:
    """Columns (lists or arrays) of all rows, known at `mine`: in place, what the other processes know."""
    if size() > 1:
        known = [c[list(mine)].tolist() if isinstance(c, Tensor) else [c[i] for i in mine] for c in columns]
        for rows, parts in everyone((list(mine), known)):
            for column, part in zip(columns, parts):
                for i, value in zip(rows, part):
                    column[i] = value


def gather(mine: np.ndarray, *values: Tensor | None) -> tuple:
    """Tensors (n, …) of the rows `mine` → of all rows, with zeros up to the longest of all processes."""
    if size() == 1:
        return values
    longest = max(everyone(max([x.shape[1] for x in values if x is not None and x.dim() > 1], default=0)))
    _, first = np.unique(np.concatenate(everyone(mine)), return_index=True)  # of a row that comes twice, one

    def whole(x: Tensor) -> Tensor:
        filled = x if x.dim() == 1 else F.pad(x, (*[0] * (2 * x.dim() - 4), 0, longest - x.shape[1]))
        parts = [torch.empty_like(filled) for _ in range(size())]
        dist.all_gather(parts, filled.contiguous())
        return torch.cat(parts)[torch.from_numpy(first).to(x.device)]

    return tuple(x if x is None else whole(x) for x in values)


def total(x: Tensor, largest: bool = False) -> Tensor:
    """The sum over all processes, or the largest."""
    if size() > 1:
        dist.all_reduce(x := x.clone(), dist.ReduceOp.MAX if largest else dist.ReduceOp.SUM)
    return x


def meet(flag: bool = False) -> bool:
    """Wait for each other → is the flag up anywhere? On the CPU: no GPU is waited for."""
    return flag if size() == 1 else bool(total(torch.tensor(float(flag)), largest=True))


def add_gradients(model: nn.Module) -> None:
    """Gradients → their sums over all processes, in place. (Those of sharded weights are sums already.)"""
    grads = [p.grad for p in model.parameters() if p.grad is not None and not sharded(p)]
    while size() > 1 and grads:
        most = int(np.searchsorted(np.cumsum([g.numel() for g in grads]), 2**24, "right"))  # of 64 MB
        some, grads = grads[: max(1, most)], grads[max(1, most) :]
        dist.all_reduce(summed := nn.utils.parameters_to_vector(some))
        nn.utils.vector_to_parameters(summed, some)
