"""Processes that start at once: forked from one that has imported torch and the stages, which takes each new process seconds.

    said = finished("pretrain.py", "--data", …, processes=2)                what they wrote to stdout, once all have ended well
    statuses, out, err = ended("pretrain.py", "--data", …, processes=1)     however they have ended

Each runs the script as a program, with the variables that torchrun sets if there are several. Since they have the seed of str's
hash in common, every way to share out a model is also started by torchrun itself in some test, which has none in common.

Run as a program, this file is the process that forks: it reads one job per line and answers with the statuses, both in JSON.
It computes nothing itself: after a first backward pass, where there is an accelerator, torch forbids to fork. In its runs no curve is
drawn and samples are short, since these took most of the time.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
PATIENCE = 300  # seconds
IMPORTED = ("pretrain", "torch.distributed.device_mesh", "torch.distributed.fsdp", "deepspeed.runtime.zero.muon.muon_optimizer")


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def ended(script: str | Path, *words, processes: int = 1, **environment: str) -> tuple[list[int], str, str]:
    """Run a script; the statuses of its processes (below zero: the signal), and what they wrote to stdout and stderr."""
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder) / "out", Path(folder) / "err"
        job = dict(script=str(script), words=[*map(str, words)], processes=processes, environment=environment, out=str(out), err=str(err))
        if processes > 1:
            job["environment"] |= dict(WORLD_SIZE=str(processes), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))
        forker = the_forker()
        forker.stdin.write(json.dumps(job) + "\n")
        forker.stdin.flush()
        if not select.select([forker.stdout], [], [], PATIENCE)[0]:
            end(forker)
            raise AssertionError(f"still running after {PATIENCE} s; stderr:\n{err.read_text()}")
        return json.loads(forker.stdout.readline()), out.read_text(), err.read_text()


def finished(script: str | Path, *words, processes: int = 2, **environment: str) -> str:
    """Run a script; what its processes wrote to stdout. Fails if one of them fails."""
    statuses, out, err = ended(script, *words, processes=processes, **environment)
    assert statuses == [0] * processes, f"{statuses}\n{err}"
    return out


@functools.cache
def the_forker() -> subprocess.Popen:
    forker = subprocess.Popen([sys.executable, __file__], cwd=REPOSITORY, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                              start_new_session=True, env={**os.environ, "OMP_NUM_THREADS": "1"})  # fmt: skip
    atexit.register(end, forker)
    return forker


def end(forker: subprocess.Popen) -> None:
    """End it and all that it has started."""
    the_forker.cache_clear()
    with contextlib.suppress(ProcessLookupError):
        os.killpg(forker.pid, signal.SIGKILL)
    forker.wait()


# ---- the process that forks --------------------------------------------------------------------------------------------


def serve() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what an import says is no answer
    sys.path.insert(0, str(REPOSITORY))
    shorten()
    os.environ["DS_ACCELERATOR"] = "cpu"
    for name in IMPORTED:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    del os.environ["DS_ACCELERATOR"]
    for line in sys.stdin:
        job = json.loads(line)
        started = {fork(job, rank): rank for rank in range(job["processes"])}
        statuses = [0] * len(started)
        while started:
            pid, status = os.wait()
            statuses[started.pop(pid)] = os.waitstatus_to_exitcode(status)
            if status:  # the others would wait for it
                for other in started:
                    os.kill(other, signal.SIGKILL)
        print(json.dumps(statuses), file=answers, flush=True)


def shorten() -> None:
    import progress
    from model import Llama

    progress.plot_loss = lambda metrics, out, title: None
    generate = Llama.generate
    Llama.generate = lambda self, prompts, most, **how: generate(self, prompts, min(most, 4), **how)


def fork(job: dict, rank: int) -> int:
    """Start one process of a job; its id."""
    if pid := os.fork():
        return pid
    status = 1
    try:
        for number, path in ((0, os.devnull), (1, job["out"]), (2, job["err"])):
            os.dup2(os.open(path, os.O_CREAT | os.O_RDWR | os.O_APPEND), number)
        sys.stdin = os.fdopen(0)  # the forker has read from its own
        os.environ.update(job["environment"])
        if job["processes"] > 1:
            os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
        sys.path[:0] = job["environment"].get("PYTHONPATH", "").split(os.pathsep)
        sys.argv = [job["script"], *job["words"]]
        runpy.run_path(job["script"], run_name="__main__")
        status = 0
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


if __name__ == "__main__":
    serve()
