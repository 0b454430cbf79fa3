"""Whole files or none, never over what is read, one run at a time, for every script."""

import errno
import importlib
import json
import os
import platform
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
from runs import compared

from nanoalign import UserError, cli, files
from nanoalign.files import beside, outputs, reserved, write_json, write_text, writing
from nanoalign.rows import write_rows

ROOT = Path(__file__).parents[1]


@dataclass
class Config:
    data: str = ""
    reward: str = ""
    several: tuple = ()
    out: str = "x.pt"
    beside_out = (".partial.pt", ".metrics.jsonl")


# ------------------------------------------------------------------------------------------------- writing


@pytest.mark.parametrize("error", [ValueError("a bug"), KeyboardInterrupt(), OSError(28, "No space left")])
def test_a_file_that_is_not_finished_leaves_the_old_one_and_nothing_else(tmp_path, error):
    path = tmp_path / "x.csv"
    path.write_text("old", encoding="utf-8")
    kind = UserError if isinstance(error, OSError) else type(error)
    with pytest.raises(kind) as caught, writing(path) as file:
        file.write("new")
        file.flush()
        raise error
    if isinstance(error, OSError):
        assert "could not write" in str(caught.value) and "No space left" in str(caught.value)
    assert path.read_text(encoding="utf-8") == "old" and os.listdir(tmp_path) == ["x.csv"]


def test_a_link_is_followed_and_what_stands_at_a_foreseeable_name_is_not(tmp_path):
    victim, target = tmp_path / "victim", tmp_path / "real" / "x.jsonl"
    victim.write_text("mine", encoding="utf-8")
    target.parent.mkdir()
    (tmp_path / "x.jsonl").symlink_to(target)
    for name in ("x.jsonl.writing", "real/x.jsonl.writing", "x.pt.writing"):
        (tmp_path / name).symlink_to(victim)
    write_rows(tmp_path / "x.jsonl", [{"a": 1}])
    assert (tmp_path / "x.jsonl").is_symlink() and json.loads(target.read_text("utf-8")) == {"a": 1}
    assert victim.read_text(encoding="utf-8") == "mine"


def test_two_writers_of_one_file_never_share_a_temporary_name(tmp_path):
    with writing(tmp_path / "x") as one, writing(tmp_path / "x") as two:
        one.write("one")
        two.write("two")
        assert len(os.listdir(tmp_path)) == 2 and one.name != two.name
    assert (tmp_path / "x").read_text(encoding="utf-8") == "one"  # the last to finish


def test_what_replaces_a_private_file_is_private_from_the_start(tmp_path, monkeypatch):
    (tmp_path / "old").touch(0o600)
    modes, opened = [], os.open

    def spy(path, *rest):
        handle = opened(path, *rest)
        modes.append(os.fstat(handle).st_mode & 0o077)
        return handle

    monkeypatch.setattr(os, "open", spy)
    write_text(tmp_path / "old", "secret")
    assert modes == [0]


def test_a_file_has_the_permissions_of_the_old_one_or_of_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        write_text(tmp_path / "new", "")
        (tmp_path / "old").touch(0o600)
        os.chmod(tmp_path / "old", 0o604)
        write_text(tmp_path / "old", "")
    finally:
        os.umask(before)
    modes = [(tmp_path / name).stat().st_mode & 0o777 for name in ("new", "old")]
    assert modes == [0o640, 0o604]


def test_no_device_pipe_or_folder_is_ever_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("/dev/null")
    for path in ("/dev/null", "/dev/stdout", tmp_path / "pipe", tmp_path / "link", tmp_path):
        if path == "/dev/stdout" and Path(path).is_file():
            continue
        with pytest.raises(UserError, match="no file that can be written"):
            write_text(path, "x")
    assert Path("/dev/null").is_char_device() and (tmp_path / "pipe").is_fifo()


def test_a_report_is_valid_json_whatever_stands_in_it(tmp_path):
    report = {"NaN": [float("nan"), "NaN → π", "\ud800"], "x": (1.5, None)}
    write_json(tmp_path / "x.json", report)
    text = (tmp_path / "x.json").read_text(encoding="utf-8")
    read = json.loads(text, parse_constant=lambda name: pytest.fail(name))
    assert read == {"NaN": [None, "NaN → π", "\ud800"], "x": [1.5, None]}


# ------------------------------------------------------------------------------------- inputs and outputs


@pytest.mark.parametrize(
    "flags",
    [
        {"data": "x.pt"},
        {"data": "./folder/../x.pt"},
        {"data": "link"},
        {"data": "folder/link"},
        {"data": "~/x.pt"},
        {"data": "x.metrics.jsonl"},
        {"data": "x.partial.pt"},
        {"reward": "x.pt - 0.1*length"},
        {"reward": "judge + 0.5*./x.pt"},
        {"reward": "min:[abx].pt"},
        {"reward": "mean:a.pt,x.pt"},
        {"reward": "prm-min:x.pt"},
        {"reward": "judge, x.pt"},
        {"reward": "rules.py:score(x.pt)"},
        {"reward": "rm:x.pt"},
        {"several": ("a.pt", "x.pt")},
        {"several": ("*.pt",)},
        {"out": "rules.py", "reward": "rules.py:score"},
        {"out": "link", "data": "x.pt"},
        {"out": "with space.pt", "reward": "with space.pt"},
        {"out": "with space.pt", "reward": "0.5*with space.pt + judge"},
    ],
    ids=str,
)
def test_an_output_that_is_an_input_is_refused_however_it_is_spelt(flags, tmp_path, monkeypatch):
    (tmp_path / "folder").mkdir()
    for name in ("x.pt", "a.pt", "b.pt", "x.metrics.jsonl", "x.partial.pt", "rules.py", "with space.pt"):
        (tmp_path / name).write_text(name, encoding="utf-8")
    (tmp_path / "link").symlink_to("x.pt")
    (tmp_path / "folder" / "link").symlink_to(tmp_path / "x.pt")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    config = files.at_home(Config(**flags))
    refused = pytest.raises(UserError, match=r"is to be written, but --(data|reward|several) reads it")
    with refused, reserved(config):
        pytest.fail("it began")
    harmless = files.at_home(Config(**{**flags, "out": "other/y.pt"}))
    with reserved(harmless):
        assert (tmp_path / "other" / "y.pt.lock").exists()
    assert not (tmp_path / "other" / "y.pt.lock").exists()


SCRIPTS = ["train_sft", "train_ppo", "collect", "critique", "best_of_n", "evaluate", "lab.annotate",
           "lab.convert_steps", "lab.label_steps", "lab.red_team", "lab.hacking", "lab.train_online_dpo",
           "lab.score", "lab.reward_report"]  # fmt: skip
READS = {"lab.score": "data", "lab.reward_report": "model"}  # what their output is named after


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_script_refuses_at_the_start_what_it_could_not_write_at_the_end(
    script, tmp_path, monkeypatch, capsys
):
    """Before it opens any file: there are none to read here."""
    module = importlib.import_module(script)
    main = module.draw if script == "lab.hacking" else module.main
    (tmp_path / "file").touch()
    os.mkfifo(tmp_path / "pipe")
    flag = READS.get(script, "out")
    ends = {flag: [f"{tmp_path}/file/x.jsonl"]}
    if flag == "out":
        ends["out"] += ["/dev/null", str(tmp_path), f"{tmp_path}/pipe"]
    monkeypatch.chdir(tmp_path)
    for path in ends[flag]:
        monkeypatch.setattr(sys, "argv", ["x.py", f"--{flag}", path])
        with pytest.raises(SystemExit) as stopped:
            cli.run(main, module.Config)
        assert stopped.value.code.startswith("error: ") and "\n" not in stopped.value.code
        assert "written" in stopped.value.code or "exist" in stopped.value.code
    assert Path("/dev/null").is_char_device() and sorted(os.listdir(tmp_path)) == ["file", "pipe"]


def test_a_home_folder_is_meant_by_a_tilde_in_every_flag(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    flags = [
        "--data=~/a.jsonl",
        "--reward",
        "0.5*~/a.pt - ~/b.pt",
        "--several",
        "~/c",
        "x~/d",
        "--out=~/x.pt",
    ]
    config = cli.parse(Config, argv=flags)
    assert config.data == f"{tmp_path}/a.jsonl" and config.out == f"{tmp_path}/x.pt"
    assert config.reward == f"0.5*{tmp_path}/a.pt - {tmp_path}/b.pt"
    assert config.several == (f"{tmp_path}/c", "x~/d")
    mean = cli.parse(Config, argv=["--reward", "mean:~/a.pt,~/b.pt + rules.py:f(~/c.pt)"]).reward
    assert mean == f"mean:{tmp_path}/a.pt,{tmp_path}/b.pt + rules.py:f({tmp_path}/c.pt)"


def test_an_output_that_the_printed_lines_go_to_is_refused(tmp_path):
    """python script.py --out x > x: the report would take the place of what was printed."""
    code = "from nanoalign.files import write_text; write_text('x', 'report')"
    with open(tmp_path / "x", "w", encoding="utf-8") as file:
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=tmp_path, stdout=file, stderr=subprocess.PIPE, text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )  # fmt: skip
    assert "printed lines" in done.stderr and (tmp_path / "x").read_text(encoding="utf-8") == ""


def test_what_is_written_beside_an_output_is_named_by_one_rule(tmp_path):
    collect, annotate = (importlib.import_module(name).Config for name in ("collect", "lab.annotate"))
    assert outputs(collect(out="a/mine.jsonl")) == [
        "a/mine.jsonl",
        "a/mine.votes.jsonl",
        "a/mine.thumbs.jsonl",
    ]
    assert str(beside("a/x.v2.pt", ".partial.pt")) == "a/x.v2.partial.pt"
    write_rows(tmp_path / "mine.votes.jsonl", compared(2))
    with reserved(annotate(votes=f"{tmp_path}/mine.votes.jsonl", out=f"{tmp_path}/mine.jsonl")):
        pass
    both = annotate(votes=f"{tmp_path}/mine.votes.jsonl", out=f"{tmp_path}/mine.votes.jsonl")
    with pytest.raises(UserError, match="written twice"), reserved(both):
        pytest.fail("it began")


# ------------------------------------------------------------------------------------------------- the lock

HOLD = """
import sys, time
from dataclasses import dataclass
from nanoalign.files import reserved
@dataclass
class Config:
    out: str = "x.pt"
with reserved(Config()):
    open(".x.pt.12345678.writing", "w").close()
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def held(tmp_path):
    """A process that holds the lock of x.pt."""
    surroundings = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD], cwd=tmp_path, env=surroundings, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def test_a_second_run_with_the_same_out_is_told_which_process_holds_it(held, tmp_path):
    (tmp_path / "link.pt").symlink_to("x.pt")
    for name in ("x.pt", "link.pt"):
        refused = pytest.raises(UserError, match=f"written by process {held.pid} on {platform.node()}")
        with refused, reserved(Config(out=f"{tmp_path}/{name}")):
            pytest.fail("it began")
    with reserved(Config(out=f"{tmp_path}/y.pt")):  # another one is free
        pass
    assert f"process {held.pid} " in (tmp_path / "x.pt.lock").read_text("utf-8")


def test_a_killed_run_leaves_neither_a_lock_that_holds_nor_half_a_file(held, tmp_path):
    held.kill()
    held.wait()
    assert (tmp_path / "x.pt.lock").exists() and (tmp_path / ".x.pt.12345678.writing").exists()
    with reserved(Config(out=f"{tmp_path}/x.pt")):
        assert f"process {os.getpid()} " in (tmp_path / "x.pt.lock").read_text("utf-8")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("left", ["", "\x00" * 40, "process 1 on elsewhere since yesterday"], ids=ascii)
def test_a_lock_that_nobody_holds_is_free_whatever_it_says(left, tmp_path):
    (tmp_path / "x.pt.lock").write_text(left, encoding="utf-8")
    with reserved(Config(out=f"{tmp_path}/x.pt")):
        assert left not in (tmp_path / "x.pt.lock").read_text("utf-8") or not left
    assert os.listdir(tmp_path) == []


def test_of_many_that_begin_at_once_one_run_holds_the_lock(tmp_path):
    """Threads stand for processes: a lock is of an open file, not of a process."""
    held, most, refused = [], [], []

    def run(_):
        try:
            with reserved(Config(out=f"{tmp_path}/x.pt")):
                held.append(1)
                most.append(len(held))
                held.pop()
        except UserError:
            refused.append(1)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(run, range(200)))
    assert set(most) == {1} and len(most) + len(refused) == 200 and os.listdir(tmp_path) == []


def test_a_link_at_the_locks_name_is_not_followed(tmp_path):
    (tmp_path / "dear.txt").write_text("dear", encoding="utf-8")
    (tmp_path / "x.pt.lock").symlink_to("dear.txt")
    with pytest.raises(OSError), reserved(Config(out=f"{tmp_path}/x.pt")):
        pytest.fail("it began")
    assert (tmp_path / "dear.txt").read_text(encoding="utf-8") == "dear"


def test_a_lock_goes_with_its_run_however_that_ends(tmp_path):
    for error in (UserError("no."), KeyboardInterrupt(), SystemExit(3), ZeroDivisionError()):
        with pytest.raises(type(error)), reserved(Config(out=f"{tmp_path}/x.pt")):
            raise error
    assert os.listdir(tmp_path) == []


def test_where_the_file_system_knows_no_locks_the_run_goes_on_and_says_so(tmp_path, monkeypatch, capsys):
    def flock(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(files.fcntl, "flock", flock)
    with reserved(Config(out=f"{tmp_path}/x.pt")):
        assert "x.pt.lock cannot be locked here" in capsys.readouterr().out
    assert os.listdir(tmp_path) == []


# ------------------------------------------------------------------------------------------------- Windows

HIDDEN = """
import os, platform, signal, subprocess, sys
import numpy, tiktoken, torch  # whose own builds for Windows do without
for name in ("resource", "fcntl", "pwd", "grp", "termios", "tty", "pty"):
    sys.modules[name] = None
for name in ("SIGHUP", "SIGKILL", "SIGALRM", "SIGXFSZ", "SIGUSR1"):
    delattr(signal, name)
for name in ("fork", "getuid", "geteuid", "sysconf", "uname", "WNOHANG", "getloadavg", "mkfifo", "statvfs"):
    delattr(os, name)
import importlib
for name in sys.argv[1:]:
    importlib.import_module(name)
import train_sft
from nanoalign import cli, run
run.CleanStop()
print(cli.peak_memory(torch.device("cpu")))
sys.argv = ["train_sft.py", "--help"]
cli.run(train_sft.main, train_sft.Config, train_sft.__doc__)
"""


def test_every_module_is_imported_and_helps_where_only_windows_is(run):
    """Imports checked, without what Unix alone has; there is no Windows machine here."""
    paths = [*ROOT.glob("*.py"), *ROOT.glob("nanoalign/**/*.py"), *ROOT.glob("lab/**/*.py")]
    modules = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in paths]
    modules = sorted(name.removesuffix(".__init__") for name in modules if name != "lab.bench.peers")
    code, out, errors = run("-c", HIDDEN, *modules)
    assert (code, errors) == (0, "") and out.startswith("0\n") and "usage:" in out
