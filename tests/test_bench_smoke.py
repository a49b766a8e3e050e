"""bench_smoke.py: it passes where everything is right, and a wrong kernel shows in its own line and nowhere else."""

from __future__ import annotations

from settings import UserError

import re

import pytest
import torch
import torch.nn.functional as F
from npu_at_hand import calls, stand_in
from processes_at_hand import ended

import bench_smoke
import devices
from bench_smoke import CHECKS, SmokeConfig, smoke

SMOKE_ON_NPU = """
from settings import command_line
from bench_smoke import SmokeConfig, smoke
command_line(smoke, SmokeConfig, ["--device", "npu"])
"""


def table(text: str) -> dict[str, tuple[str, str]]:
    """The printed lines as name -> (result, what was measured); the names end in one column."""
    lines = text.splitlines()[: len(CHECKS)]
    rows = [re.fullmatch(rf"(.{{{max(map(len, CHECKS))}}})  (ok|failed|skipped) +(\S.*)", line).groups() for line in lines]
    return {name.strip(): (result, measured) for name, result, measured in rows}


@pytest.mark.parametrize("dtype", ["bf16", pytest.param("fp16", marks=pytest.mark.slow), "fp32"])
def test_everything_passes_on_a_cpu(capsys, dtype):
    assert smoke(SmokeConfig(device="cpu", dtype=dtype)) == dict.fromkeys(CHECKS, "ok")
    rows = table(capsys.readouterr().out)
    assert list(rows) == list(CHECKS) and {result for result, _ in rows.values()} == {"ok"}
    names = re.findall("bf16|fp16|fp32", rows["attention, both"][1])
    assert names == (["fp32"] if dtype == "fp32" else ["fp32", dtype])
    assert rows["process group"][1] == "gloo, one process"


def ignoring_the_mask(q, k, v, attn_mask=None, is_causal=False, **options):
    return RIGHT_ATTENTION(q, k, v, is_causal=True, **options)


def heads_in_wrong_order(q, k, v, enable_gqa=False, **options):
    k, v = (x.repeat(1, q.shape[1] // x.shape[1], 1, 1) for x in (k, v))
    return RIGHT_ATTENTION(q, k, v, **options)


def norm_without_root(x, shape, weight, eps):
    return x / (x.pow(2).mean(-1, keepdim=True) + eps) * weight


RIGHT_ATTENTION = F.scaled_dot_product_attention
MODEL = {"model", "generation"}


@pytest.mark.parametrize("name, wrong, failing", [
    ("scaled_dot_product_attention", ignoring_the_mask, {"attention, masked", "attention, both"}),
    ("scaled_dot_product_attention", heads_in_wrong_order, {"attention, shared heads", "attention, both"}),
    ("rms_norm", norm_without_root, {"RMSNorm"}),
])  # fmt: skip
def test_a_wrong_kernel_is_reported_and_the_rest_goes_on(monkeypatch, capsys, name, wrong, failing):
    monkeypatch.setattr(F, name, wrong)
    with pytest.raises(SystemExit) as stop:
        smoke(SmokeConfig(device="cpu", dtype="bf16"))
    out = capsys.readouterr().out
    failed = {name for name, (result, _) in table(out).items() if result == "failed"}
    assert stop.value.code == 1 and failed - MODEL == failing, out
    assert f"{len(CHECKS) - len(failed)} ok, {len(failed)} failed on cpu" in out.splitlines()[-1]


def test_nan_is_an_error(monkeypatch, capsys):
    monkeypatch.setattr(bench_smoke, "apply_rope", lambda x, cos, sin: x * torch.nan)
    with pytest.raises(SystemExit):
        smoke(SmokeConfig(device="cpu", dtype="fp32"))
    assert table(capsys.readouterr().out)["RoPE"] == ("failed", "ArithmeticError: error fp32 nan; at most fp32 1e-04")


def test_an_exception_is_a_line_of_the_table(monkeypatch, capsys):
    def raise_it(*values):
        raise NotImplementedError("no such kernel\non this device")

    monkeypatch.setattr(devices, "random_state", raise_it)
    with pytest.raises(SystemExit):
        smoke(SmokeConfig(device="cpu", dtype="fp32"))
    rows = table(capsys.readouterr().out)
    assert rows.pop("random numbers") == ("failed", "NotImplementedError: no such kernel")
    assert {result for result, _ in rows.values()} == {"ok"}


def test_random_numbers_that_do_not_come_back(monkeypatch, capsys):
    monkeypatch.setattr(devices, "set_random_state", lambda device, states: None)
    with pytest.raises(SystemExit):
        smoke(SmokeConfig(device="cpu", dtype="fp32"))
    assert "a saved state does not repeat it" in table(capsys.readouterr().out)["random numbers"][1]


def test_a_missing_device_is_said_at_once(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=r"--device cuda: .* finds no such device"):
        smoke(SmokeConfig(device="cuda"))


@pytest.mark.slow
def test_on_a_device_without_kernels_every_line_says_so(tmp_path):
    """The stand-in for an NPU has no tensors: what computes fails, each check with its own line, and nothing crashes."""
    (tmp_path / "smoke.py").write_text(SMOKE_ON_NPU)
    statuses, out, err = ended(tmp_path / "smoke.py", **stand_in(tmp_path))
    assert statuses == [1] and err == ""
    rows = table(out)
    assert rows.pop("memory") == ("ok", "peak 3,072 MiB")
    assert all(result == "failed" and "'npu' backend" in measured for result, measured in rows.values()), out
    assert {"set_device", "reset_peak_memory_stats", "get_rng_state", "max_memory_allocated"} <= {name for name, _ in calls(tmp_path)}
