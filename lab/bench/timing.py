"""What the benchmarks share: alternating rounds, medians and ratios, peak memory, the machine, one table.

    python -m lab.bench.timing out/bench/short.jsonl        # everything that --out has gathered, as one table

A result is a row {"case", "name", "seconds": [a round's], "rates": [tokens/s], "mb", "note"}. The first row
of a case is its baseline; a ratio is taken within a round, so that a machine that slows down slows both.
"""

import ctypes
import gc
import json
import platform
import re
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

import torch

from lab.scoreboard import table
from nanoalign.cli import Progress, readable_rows

COLUMNS = ("case", "implementation", "ms (min – max)", "tokens/s", "× first row (min – max)", "extra MB", "")


def machine(device: torch.device) -> str:
    """Processor, torch, threads: what a figure means nothing without."""
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}"
    cpuinfo = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.*)", cpuinfo.read_text()) if cpuinfo.exists() else None
    name = found[1] if found else platform.processor() or platform.machine()
    return f"{name}, torch {torch.__version__}, threads {torch.get_num_threads()}"


def timed(function, device: torch.device) -> tuple[float, object]:
    """One call → how long it takes, on a device that may lag behind, and what it returns."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    result = function()
    wait()
    return time.perf_counter() - start, result


def alternate(functions: dict, rounds: int, what: str) -> dict[str, list]:
    """Each function once a round, in an order that rotates → {name: its results, one a round}."""
    names, results = list(functions), {name: [] for name in functions}
    progress = Progress(what, rounds * len(names))
    for turn in range(rounds):
        for i in range(len(names)):
            name = names[(turn + i) % len(names)]
            results[name].append(functions[name]())
            progress.advance(1)
    return results


def in_child(module: str, spec: dict) -> dict:
    """`python -m module child`, a fresh process: spec goes in as JSON, its last line of output comes back."""
    command = [sys.executable, "-m", module, "child"]
    done = subprocess.run(command, input=json.dumps(spec), capture_output=True, text=True)
    if done.returncode:
        return {"error": (done.stderr.strip() or "no output").splitlines()[-1][:160]}
    return json.loads(done.stdout.splitlines()[-1])


# ---------------------------------------------------------------------------------------------- memory


def memory(device: torch.device, peak: bool = False) -> float:
    """MB held now, or at most since `forget_peak`: on a GPU by tensors, else by the process (Linux only)."""
    if device.type == "cuda":
        held = torch.cuda.max_memory_allocated if peak else torch.cuda.memory_allocated
        return held(device) / 2**20
    status = Path("/proc/self/status")
    if not status.exists():
        return float("nan")
    return int(re.search(rf"{'VmHWM' if peak else 'VmRSS'}:\s+(\d+)", status.read_text())[1]) / 2**10


def forget_peak(device: torch.device) -> None:
    """Start a new peak. What the C allocator keeps of freed blocks goes back first: reuse would hide need."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif sys.platform == "linux":
        getattr(ctypes.CDLL(None), "malloc_trim", lambda pad: None)(0)  # glibc's
        Path("/proc/self/clear_refs").write_text("5")  # resets the kernel's own high-water mark


def extra_memory(function, device: torch.device) -> float:
    """The most that a second call holds beyond what was there before it, in MB, its result included."""
    function()
    forget_peak(device)
    before = memory(device)
    function()
    return memory(device, peak=True) - before


# ----------------------------------------------------------------------------------------------- limits


def matmul_flops(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a large square matrix product: what this machine reaches at best."""
    n = 8192 if device.type == "cuda" else 1536
    a = torch.randn(n, n, device=device, dtype=dtype)
    return 2 * n**3 / min(timed(lambda: a @ a, device)[0] for _ in range(5))


def copy_bandwidth(device: torch.device) -> float:
    """Bytes/s, read and written, of copying a block too large for any cache."""
    x = torch.ones(2**30 if device.type == "cuda" else 2**28, device=device, dtype=torch.uint8)
    y = x.clone()
    return 2 * x.numel() / min(timed(lambda: y.copy_(x), device)[0] for _ in range(5))


# ------------------------------------------------------------------------------------------------ table


def spread(values: list[float], digits: int = 3) -> str:
    """The median and both extremes."""
    show = [f"{v:,.0f}" if abs(v) >= 1000 else f"{v:.{digits}g}" for v in (median(values), *values)]
    return f"{show[0]} ({show[1 + values.index(min(values))]} – {show[1 + values.index(max(values))]})"


def cells(row: dict, baseline: dict) -> list[str]:
    """A result → what stands in the table."""
    if "error" in row:
        return [row["case"], row["name"], "–", "–", "–", "–", row["error"]]
    ratios = [own / other for own, other in zip(row["rates"], baseline.get("rates", []))]
    return [
        row["case"], row["name"], spread([1000 * s for s in row["seconds"]]), f"{median(row['rates']):,.0f}",
        "1" if row is baseline else spread(ratios) if ratios else "–",
        "–" if row.get("mb") is None else f"{row['mb']:,.0f}", row.get("note", ""),
    ]  # fmt: skip


def show(results: list[dict]) -> None:
    """One table of all results, under the machines that they come from."""
    first = {}
    for row in results:
        first.setdefault(row["case"], row)
    print("\n".join(dict.fromkeys(row["machine"] for row in results)) + "\n")
    table(list(COLUMNS), [cells(row, first[row["case"]]) for row in results])


def finish(results: list[dict], device: torch.device, out: str) -> None:
    """Print the table; with `out`, add the results to that file instead."""
    results = [{**row, "machine": machine(device)} for row in results]
    if not out:
        return show(results)
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    with open(out, "a", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in results)


if __name__ == "__main__":
    if not sys.argv[1:] or not all(Path(path).exists() for path in sys.argv[1:]):
        sys.exit("error: name files of results, as --out of the benchmarks writes them.")
    show([row for path in sys.argv[1:] for row in readable_rows(Path(path))])
