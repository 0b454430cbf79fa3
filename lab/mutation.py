"""Do the tests see what the main()s wire up? Every line of them is broken, one way at a time.

    python -m lab.mutation                                     # all; minutes on one thread
    python -m lab.mutation --only train_ppo train_grpo         # these files' functions

Each mutant (lab/mutants.py) runs in a process of its own against the tests in tests/wiring that are named
after its file, up to the first failure; nothing is written into the repository. A run that takes a minute
counts as dead. The dead are kept (--cache) as long as the function is as it was, for tests only grow; who
survived is judged again. What survives is in the report, with the reason that lab/mutation_reasons.py gives;
a survivor without one is a fault of the tests.
"""

import ast
import gc
import hashlib
import json
import os
import re
import shutil
import signal
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from lab.mutants import NOT_ONE, Mutant, mutant_by_hand, mutants_of, negated
from lab.mutation_reasons import KNOWN, REASONS
from nanoalign import UserError, cli

ROOT = Path(__file__).parents[1]
TRAINING = ("ppo", "grpo", "pretrain", "sft", "rm", "prm", "dpo", "kto", "orpo")
FUNCTIONS = {f"train_{name}": ["main"] for name in TRAINING} | {
    "collect": ["main", "sample"],
    "best_of_n": ["main", "draw"],
    "evaluate": ["main", "answer"],
    "nanoalign.training": [],  # of these only what is in KNOWN
    "nanoalign.rewards": [],
}
TESTS = {"nanoalign.training": "ppo", "nanoalign.rewards": "ppo"}  # whose, if not their own
LIMIT = 60  # seconds, by the clock


@dataclass
class Config:
    only: tuple[str, ...] = ()  # files, such as train_ppo; none: all
    out: str = "docs/mutation.md"  # the report to write
    share: float = 1.0  # of the mutants, picked by a hash; those that once survived are always run
    cache: str = "out/mutation.jsonl"  # verdicts, by what was run
    report: bool = False  # judge nothing: write the report of what the cache knows
    show: bool = False  # print every mutant as it is judged


# ---------------------------------------------------------------------------------------------- verdicts


def install(mutant: Mutant) -> None:
    """The mutated function in place of its original, wherever that was imported."""
    module = sys.modules[mutant.file]
    original = getattr(module, mutant.function)
    module.negated = negated
    exec(compile(ast.Module([mutant.code], []), f"<{mutant.name}>", "exec"), vars(module))
    for other in list(sys.modules.values()):
        for name, value in list(getattr(other, "__dict__", {}).items()):
            if value is original:
                setattr(other, name, getattr(module, mutant.function))


class Judge:
    """A pytest plugin that, in place of running the tests once, runs them on every mutant."""

    def __init__(self, mutants: list[tuple[Mutant, str]], note):
        self.mutants, self.note, self.answer = mutants, note, None

    def pytest_runtestloop(self, session):
        items = session.items
        self.ring = list(zip(items, [*items[1:], items[0]]))  # what follows, so that shared fixtures stay
        self.run()  # on the code as it is: fixtures are made, whatever is imported late is imported
        self.folder = session.config._tmp_path_factory.getbasetemp()
        kept = {*self.folder.iterdir()}
        gc.collect()
        gc.freeze()  # what a child does not touch is not copied
        for mutant, key in self.mutants:
            self.note(key, mutant, *self.judge(mutant))
            for path in {*self.folder.iterdir()} - kept:
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        return True

    def run(self) -> None:
        for item, following in self.ring:
            item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)

    def pytest_runtest_makereport(self, item, call):
        if call.excinfo and not call.excinfo.errisinstance(pytest.skip.Exception):
            kind = call.excinfo.type.__name__
            if not self.answer:
                raise UserError(f"{item.name} fails without any mutant: {call.excinfo.value}.")
            right = (AssertionError, pytest.fail.Exception)
            how = "assertion" if call.excinfo.errisinstance(right) else "exception"
            self.leave(f"{how}: {item.name}" if how == "assertion" else f"{how}: {item.name} ({kind})")

    def leave(self, verdict: str):
        """The child's last words."""
        os.write(self.answer, verdict.encode())
        os._exit(0)

    def judge(self, mutant: Mutant) -> tuple[str, float]:
        """→ "survives", "none" (nothing to negate), "time", or how it died and where; CPU seconds."""
        read, write = os.pipe()
        if not (child := os.fork()):
            gc.disable()
            self.answer = write
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.setitimer(signal.ITIMER_REAL, LIMIT)
            silence = os.open(os.devnull, os.O_WRONLY)
            os.dup2(silence, 1)
            os.dup2(silence, 2)
            try:
                os.chdir(self.folder)  # whatever a mutant writes where it should not
                install(mutant)
                self.run()
                self.leave("survives")
            except BaseException as error:
                self.leave(f"exception: {type(error).__name__}")
        os.close(write)
        with os.fdopen(read) as pipe:
            said = pipe.read()
        _, status, used = os.wait4(child, 0)
        seconds = used.ru_utime + used.ru_stime
        if os.WIFSIGNALED(status):
            return "time" if os.WTERMSIG(status) == signal.SIGALRM else "exception: signal", seconds
        return "none" if os.WEXITSTATUS(status) == NOT_ONE else said, seconds


def digest(*texts: str) -> str:
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:16]


def picked(file: str, share: float, judged: dict) -> list[Mutant]:
    """The mutants of a file: those that once survived, a share of the others, and who was judged before."""
    by_hand = [mutant_by_hand(*own) for what, *own in KNOWN if own[0] == file]
    others = [mutant for name in FUNCTIONS[file] for mutant in mutants_of(file, name)]
    keys = map(key_of, others)
    return by_hand + [m for m, key in zip(others, keys) if int(key[:8], 16) < share * 2**32 or key in judged]


def key_of(mutant: Mutant) -> str:
    return digest(mutant.file, mutant.name, ast.unparse(mutant.code))


def judge_all(file: str, mutants: list[Mutant], known: dict, note) -> None:
    """Judge the mutants of a file that are not known to be dead."""
    todo = [(m, key) for m in mutants if known.get(key := key_of(m), "survives") == "survives"]
    if todo:
        test = ROOT / "tests" / "wiring" / f"test_wired_{TESTS.get(file, file).removeprefix('train_')}.py"
        options = ["-o", "addopts=", "-p", "no:cacheprovider", "-p", "no:terminal", "--rootdir", ROOT]
        status = pytest.main([*map(str, options), str(test)], plugins=[Judge(todo, note)])
        if status not in (0, 1):
            raise UserError(f"pytest ended with status {int(status)} on {file}.")


# ------------------------------------------------------------------------------------------------ report


def reason(mutant: Mutant) -> str:
    """Why it may survive; empty: nobody has said."""
    for (file, pattern), why in REASONS.items():
        if re.fullmatch(file, mutant.file) and re.search(pattern, mutant.name):
            return why
    return ""


def quoted(text: str) -> str:
    text = text if len(text) <= 160 else text[:159] + "…"
    return "`" + text.replace("|", "\\|") + "`"


def report(judged: list[tuple[Mutant, str, float]], share: float) -> str:
    """The tables of docs/mutation.md."""
    minutes = sum(seconds for *_, seconds in judged) / 60
    total = len(KNOWN) + sum(len(mutants_of(file, name)) for file in FUNCTIONS for name in FUNCTIONS[file])
    part = "" if share == 1 else f" of {total:,}, picked by a hash"
    lines = [
        "# What the tests see of the wiring",
        "",
        "Written by `python -m lab.mutation`, which explains itself.",
        "",
        f"{len(judged):,} mutants{part}, {minutes:.0f} minutes of one thread. Each is one",
        "change to a function that wires a run up. It is dead if a test in tests/wiring fails, on a value",
        "(assertion) or because nothing runs (exception).",
        "",
        "| function | mutants | assertion | exception | time | survive | unexplained |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    groups = {}
    for mutant, verdict, _ in judged:
        group = groups.setdefault(f"{mutant.file}.{mutant.function}", Counter())
        group["mutants"] += 1
        group[verdict.split(":")[0]] += 1
        group["unexplained"] += verdict == "survives" and not reason(mutant)
    groups["all"] = sum(groups.values(), Counter())
    columns = "mutants", "assertion", "exception", "time", "survives", "unexplained"
    lines += [f"| {name} | {' | '.join(f'{g[c]:,}' for c in columns)} |" for name, g in groups.items()]
    lines += ["", "## What once survived", "", "| what is wrong | where | now |", "|---|---|---|"]
    verdicts = {key_of(mutant): verdict for mutant, verdict, _ in judged}
    for what, *own in KNOWN:
        verdict = verdicts.get(key_of(mutant_by_hand(*own)), "not judged")
        lines.append(f"| {what} | {own[0]}.{own[1]} | {verdict.replace('|', ' ')} |")
    lines += ["", "## What survives, and why", ""]
    alive = [mutant for mutant, verdict, _ in judged if verdict == "survives"]
    for why in dict.fromkeys(map(reason, alive)):
        lines += [why or "**Nobody has said why.**", ""]
        mutants = [mutant for mutant in alive if reason(mutant) == why]
        lines += [f"- {m.file}:{m.line} {quoted(m.before)} → {quoted(m.after)}" for m in mutants] + [""]
    return "\n".join(lines)


def main(config: Config) -> None:
    files = [file for file in FUNCTIONS if not config.only or file in config.only]
    cache = Path(config.cache)
    cache.parent.mkdir(parents=True, exist_ok=True)
    lines = cache.read_text(encoding="utf-8").splitlines() if cache.exists() else []
    rows = [*map(json.loads, lines)]
    known = {row["key"]: row["verdict"] for row in rows}
    took = {row["key"]: row["seconds"] for row in rows}

    def note(key: str, mutant: Mutant, verdict: str, seconds: float) -> None:
        known[key], took[key] = verdict, seconds
        row = {"key": key, "verdict": verdict, "seconds": round(took[key], 2), "mutant": mutant.name}
        with cache.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        if config.show:
            print(f"{verdict:70} {took[key]:5.2f} s  {mutant.line}: {mutant.name}", flush=True)

    torch.set_num_threads(1)
    sys.path.insert(0, str(ROOT / "tests"))
    judged = []
    for file in files:
        mutants = picked(file, config.share, known)
        if config.report:
            mutants = [mutant for mutant in mutants if key_of(mutant) in known]
        else:
            judge_all(file, mutants, known, note)
        judged += [(mutant, known[key_of(mutant)], took[key_of(mutant)]) for mutant in mutants]
    judged = [own for own in judged if own[1] != "none"]
    alive = [mutant for mutant, verdict, _ in judged if verdict == "survives"]
    for mutant in alive:
        print(f"{mutant.file}:{mutant.line}  {mutant.name}  {reason(mutant) or '?'}")
    unexplained = sum(not reason(mutant) for mutant in alive)
    print(f"{len(judged):,} mutants, {len(alive)} survive, {unexplained} unexplained")
    if not config.only:
        Path(config.out).write_text(report(judged, config.share), encoding="utf-8")
        print(f"wrote {config.out}")


if __name__ == "__main__":
    cli.run(main, Config, __doc__)
