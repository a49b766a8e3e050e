"""runtime.py: device and precision, the metrics file, the picture."""

from __future__ import annotations

from settings import UserError

import json
import os
import signal

import pytest
import torch

from devices import peak_rss, pick_device, pick_dtype
from progress import Metrics, count_skipped, duration, human, plot_loss, read_metrics
from runtime import Machine, MachineConfig


def test_devices_and_dtypes(monkeypatch):
    assert pick_device("cpu") == "cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=r"--device cuda: torch .* finds no such device"):
        pick_device("cuda")
    for capability, dtype in (((9, 0), torch.bfloat16), ((8, 0), torch.bfloat16), ((7, 0), torch.float16)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda capability=capability: capability)
        assert pick_dtype("auto", "cuda") == dtype
    assert pick_dtype("auto", "mps") == torch.float32 and pick_dtype("fp16", "cpu") == torch.float16
    for has, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        for test in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
            monkeypatch.setattr(torch.cpu, test, lambda has=has: has, raising=False)
        assert pick_dtype("auto", "cpu") == dtype


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
    assert state["skipped"] == 9
    with pytest.raises(UserError, match="ten steps in a row"):
        count_skipped(machine, state, False, tmp_path)


@pytest.mark.parametrize("number, text", [(1234567, "1.23M"), (999, "999"), (4.5e9, "4.5B"), (0.5, "0.5"), (2048, "2.05k")])
def test_human_numbers(number, text):
    assert human(number) == text


def test_durations():
    assert (duration(5), duration(65), duration(3725)) == ("0:05", "1:05", "1:02:05")


def test_out_of_memory_names_the_flags(monkeypatch):
    machine = Machine(MachineConfig(device="cpu"))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda *a: 7 * 2**30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda *a: type("P", (), {"total_memory": 8 * 2**30}))
    with pytest.raises(UserError, match=r"7\.0 GiB of 8\.0 GiB were allocated; lower --micro-batch"), \
            machine.explain_out_of_memory("lower --micro-batch"):  # fmt: skip
        raise torch.OutOfMemoryError
    assert peak_rss() > 10**7
