"""A dataclass becomes --flags; a run becomes metrics.jsonl and a console line.

Every field's comment in the source is its help text, so flag and documentation cannot part ways.
"""

import argparse
import contextlib
import dataclasses
import errno
import inspect
import json
import math
import os
import platform
import re
import sys
import time
from functools import cache, partial
from pathlib import Path

import torch

try:
    import resource
except ImportError:  # not on Windows
    resource = None

from nanoalign import UserError, parallel
from nanoalign.files import at_home, beside, reserved, write_json, write_text  # noqa: F401
from nanoalign.terminal import print_anything, visible


@cache
def field_comments(config_class) -> dict[str, str]:
    """{field: its trailing comment} from the source of a dataclass and of those it extends.

    A comment may go on in lines of its own.
    """
    comments = {}
    for part in reversed(config_class.__mro__[:-1]):
        name = None
        for line in inspect.getsource(part).splitlines():
            field = re.match(r"    (\w+)\s*:[^#]*(?:#\s*(.*))?$", line)
            more = re.match(r"\s+#\s*(.*)$", line)
            if field:
                name = field[1]
                comments[name] = field[2] or comments.get(name, "")
            elif more and name:
                comments[name] += " " + more[1]
    return comments


def program() -> str:
    """How this process was started, after `python`: a script's path, or -m and a module."""
    spec = sys.modules["__main__"].__spec__
    if spec is None:
        return os.path.relpath(sys.argv[0])
    return f"-m {spec.name.removesuffix('.__main__')}"


def one_line(message) -> str:
    """What a file's or a flag's text may be part of, for the terminal."""
    return visible(" ".join(str(message).splitlines()))


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"error: {one_line(message)}. `python {self.prog} --help` lists the flags.\n")


SIZES = {  # the memory that a run takes at once is a multiple of them: a million is a slip of the hand
    *("samples", "subsets", "width", "expansions", "depth", "continuations", "tries", "rounds", "crowd"),
    *("votes", "group_size"),
}
LENGTHS = ("context", "max_length", "max_new_tokens")  # as long as a checkpoint's context may be
SINGLE = torch.finfo(torch.float32)
LEAST = {"temperature": 1e-4}  # where it is not 0: a smaller one is greed, and beyond single precision


def bounds(name: str, default: float) -> tuple[float, float]:
    """The least value but for 0, and the largest, of a flag that is a number."""
    if isinstance(default, int):
        most = {"seed": 2**64 - 1, **dict.fromkeys(SIZES, 10**5), **dict.fromkeys(LENGTHS, 2**22)}
        return 1, most.get(name, 2**31 - 1)
    return LEAST.get(name, SINGLE.tiny), 10**6 if name == "epochs" else SINGLE.max


def number(text: str, name: str, default: float):
    """A flag's text → its value: digits, and within the flag's bounds."""
    whole = isinstance(default, int)
    digits = "[0-9]{1,99}" if whole else r"([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?"
    if not re.fullmatch(f"[+-]?{digits}", text):
        what = "a whole number" if whole else "a number"
        raise argparse.ArgumentTypeError(f"expected {what}, not {text[:40]!r}")
    value = type(default)(text)
    least, most = bounds(name, default)
    if value < 0 <= default:
        raise argparse.ArgumentTypeError(f"expected a number ≥ 0, not {text[:40]}")
    if value != 0 and not least <= abs(value) <= most:
        scope = f"a number from {least} to {most}" if whole else f"a number from {least:.3g} to {most:.3g}"
        raise argparse.ArgumentTypeError(f"expected 0, or {scope}, not {text[:40]}")
    return value + 0  # no −0


def parse(config_class, description: str = "", argv: list[str] | None = None):
    """argv → an instance of the dataclass. Unknown flags and bad values exit with one sentence.

    The class's own fields come first in --help, those of the class that it extends as a second group.
    """
    raw = argparse.RawDescriptionHelpFormatter
    parser = _Parser(program(), description=description, formatter_class=raw, allow_abbrev=False)
    shared = {field.name for base in config_class.__mro__[1:-1] for field in dataclasses.fields(base)}
    groups = [parser.add_argument_group(name) for name in ("flags", "flags that all runs share")]
    comments = field_comments(config_class)
    for field in sorted(dataclasses.fields(config_class), key=lambda field: field.name in shared):
        flag, default = "--" + field.name.replace("_", "-"), field.default
        text = f"{comments[field.name]} (default: {default if default != '' else 'none'})"
        options = {"default": default, "help": text.replace("%", "%%"), "metavar": "X"}
        if isinstance(default, bool):
            del options["metavar"]
            options["action"] = argparse.BooleanOptionalAction
        elif isinstance(default, tuple):
            options["nargs"] = "+"
        elif isinstance(default, (int, float)):
            options["type"] = partial(number, name=field.name, default=default)
            options["metavar"] = type(default).__name__.upper()
        groups[field.name in shared].add_argument(flag, **options)
    values = vars(parser.parse_args(argv))
    for name, value in values.items():  # argparse makes an empty list of "--flag=--"
        listed = isinstance(getattr(config_class, name), tuple)
        if value in ([], ["--"], "--") or (isinstance(value, list) and not listed):
            parser.error(f"argument --{name.replace('_', '-')}: expected a value, not '--'")
    config = config_class(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})
    return at_home(config)


NO_MEMORY = "allocate memory|out of memory|too many elements|[Ss]torage size calculation overflowed"
LIGHTER = ("micro_batch", "micro_tokens", "batch_size", "samples", "max_length", "max_new_tokens", "context")


def run(main, config_class, description: str = "", shared: bool = False) -> None:
    """Parse the flags and run `main(config)`; a user's mistake is one sentence on stderr and status 1.
    shared: several processes may do it together, as they may train."""
    print_anything()
    config = parse(config_class, description)
    with sentences(config), parallel.joined(config, shared or hasattr(config, "timeout")), reserved(config):
        main(config)


@contextlib.contextmanager
def sentences(config=None):
    """What a user, a file or the machine did wrong is one sentence on stderr, whatever stands in it."""
    try:
        yield
    except UserError as error:
        sys.exit(f"error: {one_line(error)}")
    except KeyboardInterrupt:
        print("\ninterrupted.", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        sys.exit(141)
    except OSError as error:
        file = f": {error.filename}" if error.filename else ""
        hint = "; free some space and run again" if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
        sys.exit(f"error: {one_line(f'{error.strerror or error}{file}{hint}.')}")
    except (MemoryError, RuntimeError) as error:  # the CPU's allocator raises either
        on_gpu = isinstance(error, torch.OutOfMemoryError)
        if not (on_gpu or isinstance(error, MemoryError) or re.search(NO_MEMORY, str(error))):
            raise
        less = [f"--{name.replace('_', '-')}" for name in LIGHTER if hasattr(config, name)]
        flags, where = f" ({', '.join(less)})" if less else "", "GPU" if on_gpu else "machine"
        sys.exit(f"error: the {where} ran out of memory; use fewer or shorter rows at a time{flags}.")


def duration(seconds: float) -> str:
    """3725 → '1h02m'."""
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02}m" if hours else f"{minutes}m{seconds:02}s" if minutes else f"{seconds}s"


class Progress:
    """A line with percent and time left, on stderr, for loops that are not training."""

    def __init__(self, what: str, total: int):
        self.what, self.total, self.done = what, total, 0
        self.start = self.shown = math.inf if parallel.rank() else time.monotonic()  # only one shows it

    def advance(self, count: int) -> None:
        self.done += count
        now = time.monotonic()
        if now - self.shown > 2 or (self.done >= self.total and self.shown > self.start):
            left = duration((now - self.start) / self.done * (self.total - self.done))
            done = f"{self.done:,}/{self.total:,} {self.done / self.total:4.0%}"
            print(f"{self.what}: {done}  {left} left", file=sys.stderr)
            self.shown = now


def peak_memory(device: torch.device) -> int:
    """The most memory this process has held so far, in MB: on a GPU the tensors, on a CPU all of it."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) // 2**20
    if resource is None:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # kB on Linux, bytes on macOS
    return peak // (2**20 if sys.platform == "darwin" else 2**10)


def readable_rows(path: Path) -> list[dict]:
    """The rows of a metrics file, up to one that a crash cut short."""
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            break
        numbers = [row.get(name, 0) for name in ("step", "tokens")] if isinstance(row, dict) else [None]
        if not all(type(x) in (int, float) for x in numbers):
            raise UserError(f"{path}, line {number} is no row of a run's metrics; move the file away.")
        rows.append(row)
    return rows


class Metrics:
    """metrics.jsonl next to the checkpoint, and a console line: step, percent, values, tokens/s, time left.

    The file opens with versions and hardware. Values may be tensors: all of a row reach the host in one sync.
    `shown`: the values that the console line has room for; empty: all.
    """

    def __init__(self, config, steps: int, device: torch.device, start_step: int = 0, shown: tuple = ()):
        self.device, self.steps, self.start_step, self.shown = device, steps, start_step, shown
        path, self.name = beside(config.out, ".metrics.jsonl"), Path(config.out).stem
        kept = []
        if start_step and path.exists():  # a resumed run forgets what was logged beyond its checkpoint
            kept = [row for row in readable_rows(path) if row.get("step", 0) <= start_step]
        write_text(path, "".join(json.dumps(row) + "\n" for row in kept))
        path = Path(os.devnull) if parallel.rank() else path
        self.file = path.open("a", encoding="utf-8", buffering=1)
        on_gpu, processor = device.type == "cuda", platform.processor() or platform.machine()
        self.note(
            event="start", at_step=start_step, time=time.strftime("%Y-%m-%d %H:%M:%S"),
            python=platform.python_version(), torch=torch.__version__, device=str(device),
            hardware=torch.cuda.get_device_name(device) if on_gpu else processor,
            threads=torch.get_num_threads(), processes=parallel.size(), config=dataclasses.asdict(config),
        )  # fmt: skip
        self.tokens = self.tokens_before = max((row.get("tokens", 0) for row in kept), default=0)
        self.begin = time.monotonic()

    def log(self, step: int, optional=(), **values) -> dict:
        """Write one row after `step` steps; returns it, without those `optional` ones, by name, that are NaN:
        means over nothing. A loss that is not finite stops the run."""
        names = [k for k, v in values.items() if isinstance(v, torch.Tensor)]
        if names:  # the one sync
            values.update(zip(names, torch.stack([values[k].detach().float() for k in names]).tolist()))
        values = {k: v for k, v in values.items() if k not in optional or v == v}
        values = {k: float(f"{v:.6g}") if isinstance(v, float) else v for k, v in values.items()}
        elapsed = time.monotonic() - self.begin
        read = sum(parallel.everyone(self.tokens - self.tokens_before))
        rate = round(read / max(elapsed, 1e-9))
        speed = {"tokens": self.tokens_before + read, "tokens_per_s": rate, "elapsed": round(elapsed, 2)}
        self.note(step=step, **values, **speed, peak_mb=peak_memory(self.device))
        left = duration(elapsed / max(step - self.start_step, 1) * (self.steps - step))
        names = self.shown or values.keys() - {"lr"}
        shown = "  ".join(f"{k} {v:.4g}" for k, v in values.items() if k in names)
        done = f"{self.name}: step {step:>5}/{self.steps} {step / max(self.steps, 1):4.0%}"
        print(f"{done}  {shown}  {rate:,} tok/s  {left} left", flush=True)
        broken = [k for k in ("loss", "grad_norm") if not math.isfinite(values.get(k, 0.0))]
        if broken:
            raise UserError(
                f"the {broken[0]} is {values[broken[0]]} at step {step}; nothing was saved since the last "
                "checkpoint. Lower --lr, lengthen --warmup, or look for broken rows in the data."
            )
        return values

    def models(self, *names: str) -> None:
        """Say which models this run holds in memory."""
        print(f"models in memory: {', '.join(names)}")
        self.note(event="models", names=names)

    def note(self, **row) -> None:
        """A row that is not a training step: an evaluation, a step-0 check, the end."""
        self.file.write(json.dumps(row) + "\n")
