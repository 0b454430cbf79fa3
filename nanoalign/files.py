"""What a run writes: whole files or none, never over what it reads, and one run at a time.

    with writing("out/table.csv") as file:    # the old table stays until the new one is whole
        ...
    with reserved(config):                    # by cli.run: the outputs are checked, --out is locked
        ...

A script's `Config` says what it writes: the flags of OUTPUTS and those in its `also_written`; the endings in
its `beside_out`, beside --out; or whatever its method `outputs` says. All other flags are what it reads. No
device is written to, /dev/stdout included: what a script prints goes there, a report goes to a file.
"""

import contextlib
import dataclasses
import glob
import json
import math
import os
import platform
import re
import secrets
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None
try:
    import msvcrt
except ImportError:
    msvcrt = None

from nanoalign import UserError, parallel
from nanoalign.expressions import parse_reward, parse_rewards

OUTPUTS = ("out", "plot", "adversarial_pairs")
HOME = re.compile(r"(^|[,:*(]\s*|\s[+-]\s+)(~)(?=[/\\]|$)")  # at the start of a path, in whatever expression


def beside(path: str, ending: str) -> Path:
    """out/dpo.pt, ".metrics.jsonl" → out/dpo.metrics.jsonl"""
    if Path(path).name in ("", ".."):
        raise UserError(f"{str(path)!r} is not the name of a file.")
    return Path(path).with_name(re.sub(r"\.(pt|json|jsonl|ndjson|jsonlines)$", "", Path(path).name) + ending)


def reason(error: OSError) -> str:
    return error.strerror or str(error)


def regular(path: str | Path) -> Path:
    """The file that a path leads to, links followed: a regular one, or none yet."""
    path, target = Path(path), Path(os.path.realpath(path))
    if path.exists() and not path.is_file():
        what = "a folder" if path.is_dir() else "a device or a pipe"
        raise UserError(f"{path} is {what}, no file that can be written; name another.")
    for stream in (1, 2):
        with contextlib.suppress(OSError):  # closed, or no such file yet
            if stat.S_ISREG(os.fstat(stream).st_mode) and os.path.samestat(os.fstat(stream), target.stat()):
                raise UserError(f"{path} is where this run's printed lines go; name another file.")
    return target


@contextlib.contextmanager
def writing(path: str | Path, mode: str = "w") -> Iterator[IO]:
    """A file that takes the place of `path` once it is whole. Until then it has a name beside it that nobody
    can foresee; whatever goes wrong, the old file stays as it is and the new one goes. A link is followed."""
    text = {} if "b" in mode else {"encoding": "utf-8", "newline": "", "errors": "backslashreplace"}
    if parallel.rank():  # the first process writes, and then all go on
        with open(os.devnull, mode, **text) as file:
            yield file
        return parallel.meet()
    target, temporary = regular(path), None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        name = target.with_name(f".{target.name[:100]}.{secrets.token_hex(4)}.writing")
        kept = 0o600 if target.exists() else 0o666  # who may not read the old one may not read this one
        with open(name, mode.replace("w", "x"), opener=lambda *at: os.open(*at, kept), **text) as file:
            temporary = name
            if target.exists():
                shutil.copymode(target, temporary)
            yield file
        os.replace(temporary, target)
        parallel.meet()
    except BaseException as error:  # Ctrl-C as well
        if temporary:
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and not isinstance(error, BrokenPipeError):
            sentence = f"could not write {path} ({reason(error)}); the file before it, if any, is untouched."
            raise UserError(sentence) from None
        raise


def write_text(path: str | Path, text: str) -> None:
    with writing(path) as file:
        file.write(text)


def without_nan(found):
    """JSON has no NaN: null."""
    if isinstance(found, dict):
        return {key: without_nan(value) for key, value in found.items()}
    if isinstance(found, (list, tuple)):
        return [without_nan(value) for value in found]
    return None if isinstance(found, float) and math.isnan(found) else found


def write_json(path: str | Path, report) -> None:
    write_text(path, json.dumps(without_nan(report), indent=1, ensure_ascii=False))


# --------------------------------------------------------------------------------------------- what is named


def at_home(config):
    """The flags with every ~ that begins a path written out."""
    home = os.path.expanduser("~").replace("\\", "\\\\")

    def full(value):
        if isinstance(value, tuple):
            return tuple(map(full, value))
        return HOME.sub(rf"\g<1>{home}", value) if isinstance(value, str) and "~" in value else value

    values = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    return dataclasses.replace(config, **{name: full(value) for name, value in values.items()})


def outputs(config) -> list[str]:
    """All files that a script writes, --out first."""
    if hasattr(config, "outputs"):
        return config.outputs()
    named = [path for name in output_flags(config) if (path := getattr(config, name, ""))]
    if getattr(config, "out", ""):
        named += [str(beside(config.out, ending)) for ending in getattr(config, "beside_out", ())]
    return named


def output_flags(config) -> tuple[str, ...]:
    return OUTPUTS + getattr(config, "also_written", ())


def inputs(config) -> list[tuple[str, str]]:
    """(flag, path) of all files that the other flags name: a path, several, a glob, or an expression's."""
    found = []
    for name in [field.name for field in dataclasses.fields(config)]:
        value = getattr(config, name)
        texts = value if isinstance(value, tuple) else (value,)
        for text in texts if name not in output_flags(config) else ():
            paths = {text, *expression_files(text)} if isinstance(text, str) and text else ()
            found += [("--" + name.replace("_", "-"), path) for path in paths if os.path.exists(path)]
    return found


def expression_files(text: str) -> list[str]:
    """The files in "min:a*.pt - 0.5*b.pt, judge", "rules.py:score(a.pt)" or "rm:a.pt"."""
    words = [word for part in re.split(r"[\s,()]+", text) for word in (part, part.partition(":")[2])]
    found = [path for word in words if word for path in [word, *glob.glob(word)]]
    with contextlib.suppress(UserError, ValueError):  # no reward: other flags hold other words
        found += [file for one in parse_rewards(text) for term in parse_reward(one) for file in term.files]
    return found


def same_file(a: str, b: str) -> bool:
    if os.path.exists(a) and os.path.exists(b):
        return os.path.samefile(a, b)
    return os.path.realpath(a) == os.path.realpath(b)


def check_outputs(config, written: list[str]) -> None:
    """Complain now about an output that cannot be written, and about one that would overwrite an input."""
    read = inputs(config)
    for i, path in enumerate(written):
        target = regular(path)
        for flag, other in read:
            if same_file(path, other):
                raise UserError(f"{path} is to be written, but {flag} reads it; name another file.")
        if any(same_file(path, other) for other in written[:i]):
            raise UserError(f"{path} is to be written twice; name another file.")
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=target.parent, prefix=f".{target.name}.").close()
        except OSError as error:
            raise UserError(f"{path} cannot be written ({reason(error)}); name another file.") from None


# --------------------------------------------------------------------------------------------------- the lock


@contextlib.contextmanager
def reserved(config) -> Iterator[None]:
    """While this lasts the outputs are this run's: another one with the same --out is refused."""
    written = outputs(config)
    if not written or parallel.rank():
        yield
        return
    check_outputs(config, written)
    with locked(written[0]):
        stem = beside(os.path.realpath(written[0]), "").name
        for path in map(Path, map(os.path.realpath, written)):  # what a killed run was about to write
            if path.name.startswith(stem):  # other outputs this lock does not cover
                for left in path.parent.glob(f".{glob.escape(path.name[:100])}.????????.writing*"):
                    left.unlink(missing_ok=True)
        yield


@contextlib.contextmanager
def locked(path: str) -> Iterator[None]:
    """Hold X.lock, which says who does. The system frees it when this process ends, however it does."""
    lock = Path(f"{os.path.realpath(path)}.lock")
    while True:
        flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0)
        handle = os.open(lock, flags, 0o666)
        file = os.fdopen(handle, "r+", encoding="utf-8", errors="replace")
        if not hold(file, lock):
            who = file.read(200).strip() or "another process"
            file.close()
            raise UserError(f"{path} is being written by {who}: wait for it, or name another --out.")
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), lock.stat()):
                break
        file.close()  # who held it has just deleted it
    with file:
        file.truncate(0)
        file.write(f"process {os.getpid()} on {platform.node()} since {time.strftime('%Y-%m-%d %H:%M:%S')}")
        file.flush()
        try:
            yield
        finally:
            with contextlib.suppress(OSError):  # Windows deletes no open file
                lock.unlink()


def hold(file: IO, name: Path) -> bool:
    """Lock an open file, if nobody else holds it; True also where the file system knows no locks."""
    try:
        if fcntl:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        elif msvcrt:
            file.seek(2**20)  # what the file says stays readable
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
            file.seek(0)
    except (BlockingIOError, PermissionError):
        file.seek(0)
        return False
    except OSError:
        print(f"warning: {name} cannot be locked here; see to it that one run at a time writes it.")
    return True
