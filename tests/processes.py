"""Runs of every script, as one process or as several: python tests/processes.py FOLDER, by torchrun or not.

FOLDER/jobs.json holds [name, module, flags, dtype] of each. Of a training run its weights, before they are
rounded to fp32 for the file, go to FOLDER/N/name.weights.pt, of N processes.
"""

import importlib
import json
import sys
from pathlib import Path

import torch

from nanoalign import parallel, run
from nanoalign.checkpoint import in_full

torch.set_num_threads(1)


def keep_weights(path):
    """Let the next run leave its weights there."""

    def finish(config, model, **more):
        weights = in_full(dict(model.state_dict()))
        if not parallel.rank():
            torch.save(weights, path)
        original(config, model, **more)

    run.finish = finish


def main(folder: Path, few: list[str]) -> None:
    """All jobs, or a few of them."""
    for name, module, flags, dtype in json.loads((folder / "jobs.json").read_text()):
        if few and name not in few:
            continue
        own = folder / str(parallel.size())
        own.mkdir(exist_ok=True)
        keep_weights(own / f"{name}.weights.pt")
        torch.set_default_dtype(getattr(torch, dtype))
        script = importlib.import_module(module)
        flags = {flag: tuple(x) if isinstance(x, list) else x for flag, x in flags.items()}
        script.main(script.Config(**flags, out=str(own / f"{name}.pt")))
        torch.set_default_dtype(torch.float32)


original = run.finish
if __name__ == "__main__":
    timeout = run.Flags(timeout=5.0)
    with parallel.joined(timeout, shared=True):
        main(Path(sys.argv[1]), sys.argv[2:])
