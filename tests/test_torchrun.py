"""Runs under torchrun, as real processes: one clear line for a mistake that all share, no hang when one of them dies.

What a run prints and computes when nothing goes wrong is in test_pretrain.py; which process speaks is in test_settings.py.
"""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import test_pretrain
from processes_at_hand import ended, free_port
from test_pretrain import REPOSITORY, flags, losses

from pretrain import Config, main

settings, tiny_config = test_pretrain.settings, test_pretrain.tiny_config  # fixtures
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


class Torchrun:
    """A torchrun with its workers; what they say goes to a file."""

    def __init__(self, log: Path, launch: list[str], words: list[str], **environment: str):
        self.log = log
        with log.open("w") as file:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "torch.distributed.run", *launch, "pretrain.py", *words], cwd=REPOSITORY,
                stdout=file, stderr=file, env={**os.environ, "OMP_NUM_THREADS": "1", **environment})  # fmt: skip

    def wait(self, seconds: float) -> str:
        """What was said until the end, which must come within so many seconds."""
        try:
            self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            pytest.fail(f"still running after {seconds} s; it said:\n{self.log.read_text()}")
        return self.log.read_text()

    def workers(self) -> dict[int, int]:
        """{rank: process id} of those that live."""
        found = {}
        for directory in Path("/proc").glob("[0-9]*"):
            try:
                parent = int((directory / "stat").read_text().rpartition(")")[2].split()[1])
                if parent == self.process.pid:
                    variables = dict(pair.split("=", 1) for pair in (directory / "environ").read_text().split("\0") if "=" in pair)
                    found[int(variables["RANK"])] = int(directory.name)
            except (OSError, KeyError):  # it ended meanwhile, or has not begun
                continue
        return found


@pytest.fixture
def torchrun(tmp_path):
    """Start a torchrun; whatever is left of it goes when the test ends."""
    started = []

    def start(settings: dict, *launch: str, extra: tuple[str, ...] = (), **environment: str) -> Torchrun:
        log = tmp_path / f"torchrun-{len(started)}.log"
        started.append(Torchrun(log, list(launch or ("--standalone", "--nproc_per_node=2")), [*flags(settings), *extra], **environment))
        return started[-1]

    yield start
    for run in started:
        if run.process.poll() is None:
            for pid in (*run.workers().values(), run.process.pid):
                os.kill(pid, signal.SIGKILL)
            run.process.wait()


@pytest.fixture
def two_machines(torchrun):
    """Start two torchruns with one process each, as on two machines; the first keeps the store through which they meet."""

    def start(settings: dict) -> list[Torchrun]:
        port = free_port()
        meeting = ("--nnodes=2", "--nproc_per_node=1", "--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{port}", "--rdzv-id=test",
                   "--local-addr=127.0.0.1")  # fmt: skip
        return [torchrun(settings, *meeting, f"--rdzv-conf=is_host={is_host}") for is_host in (1, 0)]

    return start


def error_lines(said: str) -> list[str]:
    return [line for line in said.splitlines() if line.startswith("error:")]


def wait_for_steps(out: Path, count: int, runs: list[Torchrun]) -> None:
    deadline = time.monotonic() + 100
    while len(losses(out)) < count and time.monotonic() < deadline and all(run.process.poll() is None for run in runs):
        time.sleep(0.02)
    assert len(losses(out)) >= count, "\n".join(run.log.read_text() for run in runs)


def alive(pid: int) -> bool:
    try:
        return (Path("/proc") / str(pid) / "stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.fixture(scope="module")
def long_run(tiny_config, data_dir) -> dict:
    return dict(data=data_dir, model=str(tiny_config), steps=100, batch_size=8, micro_batch=4, lr=5e-3, dtype="fp32", device="cpu",
                log_every=1, eval_every=100, save_every=4)  # fmt: skip


@pytest.fixture(scope="module")
def undisturbed(long_run, tmp_path_factory) -> list[float]:
    """The losses of the long run in one process that nothing happens to."""
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    main(Config(**long_run, out=out))
    return losses(out)


@pytest.fixture
def disturbed(long_run, tmp_path) -> dict:
    return {**long_run, "out": tmp_path / "run"}


# ---- mistakes that all processes share ---------------------------------------------------------------------------------


@pytest.mark.slow
def test_world_size_without_torchrun_is_one_line(settings):
    process = subprocess.run([sys.executable, "pretrain.py", *flags(settings)], cwd=REPOSITORY, capture_output=True, text=True,
                             timeout=60, env={**os.environ, "WORLD_SIZE": "2"})  # fmt: skip
    assert process.returncode == 2 and re.fullmatch(r"error: WORLD_SIZE=2 is set but .*torchrun.*\n", process.stderr), process.stderr
    assert not settings["out"].exists()


@pytest.mark.slow
def test_a_port_in_use_is_one_line(settings):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        process = subprocess.run([sys.executable, "pretrain.py", *flags(settings)], cwd=REPOSITORY, capture_output=True, text=True,
                                 timeout=60, env={**os.environ, "RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
                                                  "MASTER_PORT": port})  # fmt: skip
    assert process.returncode == 2, process.stderr
    (line,) = error_lines(process.stderr)
    assert f"127.0.0.1:{port} is taken" in line and "Traceback" not in process.stderr


MISTAKES = {  # missing data: test_demo.py
    "no torch_npu": ({"device": "npu"}, (), r"--device npu.*torch_npu"),  # found before the processes have met
    "no deepspeed": ({}, ("--deepspeed", "2"), r"pip install deepspeed"),  # and after
}


@pytest.mark.slow
@pytest.mark.parametrize("change, extra, message", MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_one_line_and_ends_all(settings, torchrun, tmp_path, change, extra, message):
    (tmp_path / "absent").mkdir()
    for package in ("deepspeed", "torch_npu"):
        (tmp_path / "absent" / f"{package}.py").write_text(f"raise ModuleNotFoundError('no {package}', name='{package}')")
    run = torchrun({**settings, **change}, extra=extra, PYTHONPATH=str(tmp_path / "absent"))
    said = run.wait(60)
    assert_one_line(run, said, message)
    assert not settings["out"].exists()


@pytest.mark.parametrize("size, message", [(7, "7 cannot be shared equally by 2 processes.* 6 or 8"),
                                           (1, "1 cannot be shared equally by 2 processes.* 2 ")])  # fmt: skip
def test_a_batch_that_cannot_be_shared_out_is_one_line(settings, size, message):
    assert_one_line_without_torchrun({**settings, "batch_size": size}, rf"--batch-size {message}")
    assert not settings["out"].exists()


def assert_one_line_without_torchrun(settings: dict, message: str) -> None:
    """Of two processes that no launcher looks after."""
    statuses, _, err = ended("pretrain.py", *flags(settings), processes=2)
    assert statuses in ([2, 2], [2, -signal.SIGKILL])
    (line,) = err.splitlines()
    assert re.match(rf"error: \[rank 0\] .*{message}", line), line


def assert_one_line(run: Torchrun, said: str, message: str) -> None:
    assert run.process.returncode == 1
    assert len(error_lines(said)) == 1, said
    (line,) = error_lines(said)
    assert re.match(rf"error: \[rank \d\] .*{message}", line), line
    assert 'pretrain.py", line' not in said  # no traceback of ours
    assert said.rindex(line.removeprefix("error: ")) > said.index("FAILED")  # the report of torchrun ends with it


@pytest.mark.slow
def test_the_directory_of_another_model_is_one_line(settings, torchrun):
    main(Config(**{**settings, "steps": 1}))
    run = torchrun({**settings, "steps": 1, "model": "tiny"})
    assert_one_line(run, run.wait(60), r"holds a run with other settings: --model was .* and is tiny")


@pytest.fixture
def mount(tmp_path):
    """Mount a file system in memory, where the user may."""
    mounted = []

    def mount(options: str) -> Path:
        place = tmp_path / f"disk-{len(mounted)}"
        place.mkdir()
        if subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", place], capture_output=True).returncode:
            pytest.skip("needs the right to mount a tmpfs")
        mounted.append(place)
        return place

    yield mount
    for place in mounted:
        subprocess.run(["umount", place], check=True)


def test_a_read_only_directory_is_one_line(settings, mount):
    assert_one_line_without_torchrun({**settings, "out": mount("size=1m,ro") / "run"}, r"--out .*not writable")


@pytest.mark.slow
def test_a_disk_too_full_for_the_last_step_is_one_line(settings, torchrun, mount):
    run = torchrun({**settings, "steps": 2, "out": mount("size=1m") / "run"})
    assert_one_line(run, run.wait(60), r".*free some space")


# ---- processes that die ------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_death_of_a_worker_is_one_line_and_the_same_command_resumes(disturbed, undisturbed, torchrun):
    run = torchrun(disturbed)
    wait_for_steps(disturbed["out"], 9, [run])
    workers = run.workers()
    os.kill(workers[1], signal.SIGKILL)
    said = run.wait(60)
    assert_one_line(run, said, r"lost the connection.* same command")
    assert error_lines(said)[0].startswith("error: [rank 0]") and not any(map(alive, workers.values()))
    assert_resumes([torchrun(disturbed)], disturbed["out"], undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize("killed, orphan", [(0, True), (1, False)],
                         ids=["only the torchrun of the machine with the store", "all of the other machine"])  # fmt: skip
def test_the_death_of_a_machine_is_one_line_on_the_other(disturbed, undisturbed, two_machines, killed, orphan):
    """Each case takes another path: torchrun ends its workers when the store is gone, and notices nothing when it is not.
    What two machines compute, before and after, is what one process computes."""
    runs = two_machines(disturbed)
    wait_for_steps(disturbed["out"], 9, runs)
    victim, survivor = runs[killed], runs[1 - killed]
    workers = [*victim.workers().values(), *survivor.workers().values()]
    assert len(workers) == 2
    for pid in [victim.process.pid] if orphan else [victim.process.pid, workers[0]]:
        os.kill(pid, signal.SIGKILL)
    said = survivor.wait(60)
    assert survivor.process.returncode != 0
    assert len(error_lines(said)) == 1 and "same command" in error_lines(said)[0], said
    deadline = time.monotonic() + 60
    while any(map(alive, workers)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(map(alive, workers))  # no orphan trains on, in the way of the next run
    if not orphan:
        assert_resumes(two_machines(disturbed), disturbed["out"], undisturbed)


def assert_resumes(runs: list[Torchrun], out: Path, undisturbed: list[float]) -> None:
    assert 9 <= len(losses(out)) < 100
    said = "".join(run.wait(100) for run in runs)
    assert [run.process.returncode for run in runs] == [0] * len(runs) and "resuming at step" in said, said
    assert losses(out) == pytest.approx(undisturbed, abs=1e-5)
