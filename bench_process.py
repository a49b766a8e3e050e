"""A training run as a tree of processes: started, listened to, killed all at once. For bench.py faults.

torchrun puts each worker into a session of its own, so neither the end of torchrun nor a signal to its group ends them all.
What shows that all are dead is the pipe that they write to: it ends when the last one does.
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import signal
import subprocess
import threading
from pathlib import Path

PATIENCE = 300  # seconds after which a run that says nothing hangs
STEP_LINE = re.compile(r"\s*\d+/\d+\s+loss")
RESUMING = re.compile(r"resuming at step ([\d,]+)")


class Run:
    """A stage as users start it, alone or under torchrun.

    said      its lines, stdout and stderr        moving    event: past its first step, or over
    steps     how many steps it has logged        over      event: every process is dead
    resumed   the step that it went on from, or 0
    """

    def __init__(self, command: list[str], environment: dict[str, str], folder: Path):
        self.process = subprocess.Popen(command, env=environment, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                                        encoding="utf-8", errors="replace")  # fmt: skip
        self.said, self.steps, self.resumed = [], 0, 0
        self.moving, self.over = threading.Event(), threading.Event()
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        for line in self.process.stdout:
            self.said.append(line)
            if match := RESUMING.search(line):
                self.resumed = int(match[1].replace(",", ""))
            if STEP_LINE.match(line):
                self.steps += 1
                self.moving.set()
        self.over.set()
        self.moving.set()

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *exception) -> None:
        self.kill()

    def wait(self, event: threading.Event) -> None:
        said = None
        while not event.wait(PATIENCE):
            if said == (said := len(self.said)):
                self.fail(f"hangs: it said nothing for {PATIENCE} s")

    def end(self) -> None:
        """Let it run to its end. Raises RuntimeError if that is not a good one."""
        self.wait(self.over)
        if self.process.wait():
            self.fail(f"ended with status {self.process.returncode}")

    def fail(self, how: str) -> None:
        raise RuntimeError(f"{shlex.join(map(str, self.process.args))}\n{how}\n{''.join(self.said[-30:])}")

    def kill(self) -> bool:
        """SIGKILL to the whole tree. False if it had ended by itself."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGSTOP)  # so that it starts nobody while we look for its children
            for pid in family(self.process.pid):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        self.wait(self.over)
        return self.process.wait() == -signal.SIGKILL


def family(pid: int) -> list[int]:
    """A process and all its descendants."""
    found = [pid]
    for member in found:  # grows as it is read
        for children in Path("/proc").glob(f"{member}/task/*/children"):
            with contextlib.suppress(OSError):  # ended meanwhile
                found += map(int, children.read_text().split())
    return found
