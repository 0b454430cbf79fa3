"""A run stops cleanly, also where the terminal it was started from is gone."""

import os
import pty
import signal
import sys
import time

import pytest
from conftest import ROOT
from runs import steps

from nanoalign.stopping import CleanStop

STEPS = """
import sys, time
from nanoalign.stopping import CleanStop
stop = CleanStop()
print("ready", flush=True)
while not stop:
    time.sleep(0.01)
print("a line that nobody reads", flush=True)
time.sleep(0.2)  # long enough for a second signal
open(sys.argv[1], "w").write("saved")
"""


def test_a_run_outlives_its_terminal_long_enough_to_save(tmp_path):
    saved = tmp_path / "saved"
    child, terminal = pty.fork()
    if not child:
        os.chdir(ROOT)
        os.execv(sys.executable, [sys.executable, "-c", STEPS, str(saved)])
    told = b""
    while b"ready" not in told:
        told += os.read(terminal, 1024)
    os.close(terminal)  # the kernel hangs up; a shell would once more
    time.sleep(0.05)
    os.kill(child, signal.SIGHUP)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0 and saved.read_text() == "saved"


@pytest.mark.parametrize("before", [signal.SIG_IGN, signal.SIG_DFL])
def test_under_nohup_a_hangup_stays_ignored(before):
    signal.signal(signal.SIGHUP, before)
    CleanStop()
    assert (signal.getsignal(signal.SIGHUP) == signal.SIG_IGN) == (before == signal.SIG_IGN)


@pytest.mark.parametrize("warmup", [3, 12])
def test_a_warm_up_that_outlasts_the_run_is_said_with_the_learning_rate_that_is_reached(warmup, job, capsys):
    script, config = job("rm", steps=3, warmup=warmup)
    script.main(config)
    said = "warning: --warmup 12 outlasts the run's 3 steps, which reach 25% of --lr"
    assert (said in capsys.readouterr().out) == (warmup == 12)
    assert max(row["lr"] for row in steps(config.out)) == pytest.approx(config.lr * 3 / warmup)
