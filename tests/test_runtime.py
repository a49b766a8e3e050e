"""runtime.py: device and precision, the metrics file, the picture."""

from __future__ import annotations

from settings import UserError

import json
import os
import signal
import time

import numpy as np
import pytest
import torch

import devices
from progress import BatchHash, Metrics, Progress, count_skipped, duration, human, plot_loss, read_metrics
from runtime import Machine, MachineConfig


def test_signals_set_a_flag_and_handlers_go_away():
    before = signal.getsignal(signal.SIGTERM)
    with Machine(MachineConfig(device="cpu")) as machine:
        assert not machine.should_stop()
        os.kill(os.getpid(), signal.SIGTERM)
        assert machine.should_stop()
    assert signal.getsignal(signal.SIGTERM) is before


def test_seed_decides_the_random_numbers():
    draws = []
    for seed in (1, 1, 2):
        Machine(MachineConfig(device="cpu", seed=seed))
        draws.append(torch.rand(3).tolist())
    assert draws[0] == draws[1] != draws[2]


def test_metrics_are_cut_back_and_survive_a_torn_line(tmp_path):
    machine, path = Machine(MachineConfig(device="cpu")), tmp_path / "metrics.jsonl"
    metrics = Metrics(machine, path)
    for step in (1, 2, 3):
        metrics.write(step=step, tokens=step * 10, loss=1 / step, lr=None)
    metrics.write(step=2, tokens=20, val_loss=5.0)
    with path.open("a") as file:
        file.write('{"step": 4, "lo')
    assert [line["step"] for line in read_metrics(path)] == [1, 2, 3, 2]
    Metrics(machine, path, from_step=2)
    assert [line["step"] for line in read_metrics(path)] == [1, 2] and "val_loss" not in path.read_text()
    Metrics(machine, path)
    assert path.read_text() == ""


def test_plot_needs_no_validation(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("\n".join(json.dumps({"step": i, "tokens": i * 100, "loss": 5 - i, "lr": 0.1}) for i in range(3)))
    plot_loss(path, tmp_path / "loss.png", "a run")
    assert (tmp_path / "loss.png").read_bytes()[:4] == b"\x89PNG"
    plot_loss(tmp_path / "nothing", tmp_path / "empty.png", "an empty run")


def test_skipped_steps_are_counted_in_a_row(tmp_path, capsys):
    machine, state = Machine(MachineConfig(device="cpu")), {"step": 5, "skipped": 0}
    for finite in [False] * 9 + [True] + [False] * 9:
        count_skipped(machine, state, finite, tmp_path)
    assert state["skipped"] == 9 and state["skipped_in_all"] == 18
    with pytest.raises(UserError, match=f"ten steps in a row .* the last good checkpoint is {tmp_path}"):
        count_skipped(machine, state, False, tmp_path)


@pytest.mark.parametrize("number, text", [(1234567, "1.23M"), (999, "999"), (4.5e9, "4.5B"), (0.5, "0.5"), (2048, "2.05k")])
def test_human_numbers(number, text):
    assert human(number) == text


def test_durations():
    assert (duration(5), duration(65), duration(3725)) == ("0:05", "1:05", "1:02:05")


def test_out_of_memory_names_the_flags(monkeypatch):
    machine = Machine(MachineConfig(device="cpu"))
    monkeypatch.setattr(devices, "peak_memory", lambda device: 7 * 2**30)
    monkeypatch.setattr(devices, "total_memory", lambda device: 8 * 2**30)
    for error in (torch.OutOfMemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate …")):
        with pytest.raises(UserError, match=r"out of memory on cpu: 7\.0 GiB of 8\.0 GiB were in use; lower --micro-batch"), \
                machine.explain_out_of_memory("lower --micro-batch"):  # fmt: skip
            raise error
    with pytest.raises(RuntimeError, match="a bug"), machine.explain_out_of_memory(""):
        raise RuntimeError("a bug")


def test_a_second_ctrl_c_counts_only_a_moment_later(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    with Machine(MachineConfig(device="cpu")) as machine:
        for _ in range(2):  # a terminal and torchrun deliver the same one
            os.kill(os.getpid(), signal.SIGINT)
        assert machine.should_stop()
        now[0] += 2
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_a_world_without_torchrun_is_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(UserError, match=r"WORLD_SIZE=4 is set but MASTER_ADDR, MASTER_PORT is not: .*torchrun .*unset WORLD_SIZE"):
        Machine(MachineConfig(device="cpu"))


def test_batch_sizes_that_fit_are_named():
    machine = Machine(MachineConfig(device="cpu"))
    machine.world = 3
    machine.check_batch_size(9)
    for size, fitting in ((8, "6 or 9"), (2, "3 for")):
        with pytest.raises(UserError, match=f"--batch-size {size} cannot be shared equally by 3 processes: .* {fitting}"):
            machine.check_batch_size(size)


def test_the_batch_hash_does_not_care_who_read_a_row():
    machine = Machine(MachineConfig(device="cpu"))
    rows = np.arange(24).reshape(4, 6)
    whole, parts = BatchHash(machine), BatchHash(machine)
    whole.add(7, rows)
    parts.add(7, rows[2:])
    halfway = BatchHash(machine, parts.total())
    halfway.add(7, rows[:2])
    assert halfway.total() == whole.total()
    for step, other in ((8, rows), (7, rows[:3]), (7, rows + 1)):
        different = BatchHash(machine)
        different.add(step, other)
        assert different.total() != whole.total()


def test_notices(tmp_path, capsys):
    machine = Machine(MachineConfig(device="cpu"))
    progress = Progress(machine, Metrics(machine, tmp_path / "metrics.jsonl"), steps=20, first=0, flops_per_token=1)
    for step in range(1, 14):
        progress.step(10)
        progress.log(step, tokens=step * 10, loss=torch.tensor(9.0 if step == 12 else 3 + step % 2 / 10), lr=1.0, norm=torch.tensor(1.0))
    assert capsys.readouterr().out.count("notice: the loss jumped to 9.000 at step 12; it was about 3.05") == 1
    progress.step(10)
    progress.waited = 1e6
    progress.log(14, tokens=140, loss=torch.tensor(3.0), lr=1.0, norm=torch.tensor(1.0))
    assert "into reading the data files" in capsys.readouterr().out
