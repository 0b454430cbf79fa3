"""How a run is stopped: after the step in progress, saved."""

import os
import signal
import sys

from nanoalign import parallel
from nanoalign.checkpoint import partial_path


class CleanStop:
    """Ctrl-C, SIGTERM or SIGHUP ends the run after the step in progress, to be saved. A second one kills."""

    def __init__(self):
        self.signal = 0
        for name in ("SIGINT", "SIGTERM", "SIGHUP"):  # Windows has no SIGHUP; nohup has it ignored
            number = getattr(signal, name, None)
            if number and (name != "SIGHUP" or signal.getsignal(number) != signal.SIG_IGN):
                signal.signal(number, self._receive)

    def _receive(self, number, frame):
        self.signal, hangup = number, number == getattr(signal, "SIGHUP", None)
        signal.signal(number, signal.SIG_IGN if hangup else signal.SIG_DFL)  # a shell hangs up twice
        for stream in (1, 2):
            try:
                os.write(stream, b"")
            except OSError:  # the terminal is gone, and what is printed must not end the run
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
        if not parallel.rank():
            print("\nstopping after this step; once more to stop at once.", file=sys.stderr)

    def __bool__(self) -> bool:
        return self.signal != 0

    def leave(self, config, step: int) -> None:  # with the conventional status, once the run is saved
        saved = f"saved in {partial_path(config.out)}; continue with --resume"
        if not parallel.rank():
            print(f"stopped at step {step}, {saved}.", file=sys.stderr)
        sys.exit(128 + (self.signal or signal.SIGTERM))
