"""Runs of many scripts, as one process or as several: python tests/processes.py FOLDER, by torchrun or not.

FOLDER/jobs.json holds [name, module, flags, dtype] of each. Of N processes what a run writes goes to
FOLDER/N/name.pt, its weights before they are rounded to fp32 to name.weights.pt, and what it would be resumed
from to name.kept.pt. A run of name+ goes on with FOLDER/M/name.kept.pt, of another number M of processes.
"""

import importlib
import json
import shutil
import sys
from pathlib import Path

import torch

from nanoalign import parallel, run
from nanoalign.checkpoint import partial_path
from nanoalign.files import beside
from nanoalign.sharding import full, sharded

torch.set_num_threads(1)
original = run.finish, run.save_partial, run.memory.plan


def plan(config, stage, trained, held, *rest):
    """With --shard no model is whole, a reward model included; without it all are."""
    own = [p for model in (trained, *filter(None, held)) for p in model.parameters()]
    assert {sharded(p) for p in own} == {config.shard}, f"{stage}: in part whole, in part sharded"
    return original[2](config, stage, trained, held, *rest)


run.memory.plan = plan


def keep(path: Path) -> None:
    """Let the next run leave its weights, and a copy of each partial checkpoint, beside its file."""

    def finish(config, model, **more):
        weights = full(dict(model.state_dict()))
        if not parallel.rank():
            torch.save(weights, path.with_suffix(".weights.pt"))
        original[0](config, model, **more)

    def save_partial(config, *args, **more):
        original[1](config, *args, **more)
        if not parallel.rank():
            shutil.copy(partial_path(config.out), path.with_suffix(".kept.pt"))

    run.finish, run.save_partial = finish, save_partial


def work(folder: Path, name: str, module: str, flags: dict, dtype: str) -> None:
    """One job."""
    out = folder / str(parallel.size()) / f"{name}.pt"
    out.parent.mkdir(exist_ok=True)
    keep(out)
    flags = {flag: tuple(x) if isinstance(x, list) else x for flag, x in flags.items()}
    if name.endswith("+"):
        [kept] = {*folder.glob(f"*/{name[:-1]}.kept.pt")} - {*out.parent.iterdir()}
        shutil.copy(kept, partial_path(str(out)))
        log = name[:-1] + ".metrics.jsonl"
        shutil.copy(kept.parent / log, beside(str(out), ".metrics.jsonl"))
        flags["resume"] = True
    torch.set_default_dtype(getattr(torch, dtype))
    script = importlib.import_module(module)
    script.main(script.Config(**flags, out=str(out)))
    torch.set_default_dtype(torch.float32)


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    with parallel.joined(run.Flags(timeout=5.0), shared=True):
        for job in json.loads((folder / "jobs.json").read_text()):
            work(folder, *job)
