"""bench.py faults: the drill passes a run that survives, and notices every way not to."""

from __future__ import annotations

from settings import UserError

import os
import re
import signal
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file
from tqdm import tqdm

import bench_faults
import bench_process
from bench_faults import WRONG, Drill, FaultsConfig, compare
from bench_process import Run

ROOT = Path(bench_faults.__file__).parent
# A trainer without torch, whose only weight is one number. sys.argv[1] says what it does badly.
TRAINER = """
import json, os, shutil, sys, time
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

from files import write_json
from runs import damage, manifest_entries, steps

fault, out = sys.argv[1], Path(sys.argv[2])

def save(step, x):
    final = out / f"step-{step:06d}"
    if not damage(final):
        return
    tag = os.getpid() if fault == "leaves torn ones behind" else ""
    folder = out / f".step-{step:06d}{tag}.partial"
    for left in (final, folder):
        shutil.rmtree(left, ignore_errors=True)
    folder.mkdir()
    time.sleep(0.01)
    if fault == "names a step too early":
        folder = folder.rename(final)
    save_file({"x": x}, folder / "model.safetensors")
    time.sleep(0.1)
    write_json(folder / "manifest.json", {"files": manifest_entries(folder, ["model.safetensors"])})
    if folder != final:
        folder.rename(final)

first, x, metrics = 0, np.zeros(1), out / "metrics.jsonl"
whole = [step for step in steps(out) if not damage(step)]
if whole and fault != "starts again":
    first, x = int(whole[-1].name[5:]), load_file(whole[-1] / "model.safetensors")["x"]
    print(f"resuming at step {first}", flush=True)
if fault == "forgets a number":
    x = np.zeros(1)
out.mkdir(exist_ok=True)
if metrics.exists() and fault != "logs twice":
    metrics.write_text("".join(metrics.read_text().splitlines(keepends=True)[:first]))
for step in range(first, 10):
    if step > first and step % 2 == 0:
        save(step, x)
    time.sleep(0.01)
    x = 0.9 * x + step
    with metrics.open("a") as file:
        file.write(json.dumps({"step": step + 1, "loss": x.item(), "tokens_per_s": time.time()}) + "\\n")
    print(f"{step + 1}/10  loss {x.item()}", flush=True)
save_file({"x": x}, out / "model.safetensors")
"""


@pytest.mark.slow
@pytest.mark.parametrize("fault, found", [
    ("none", set()),
    ("names a step too early", {"torn, looks complete"}),
    ("leaves torn ones behind", {"torn, left at the end"}),
    ("starts again", {"wrong resumes"}),
    ("forgets a number", {"differing tensors", "differing losses"}),
    ("logs twice", {"differing losses"}),
])  # fmt: skip
def test_every_fault_of_a_trainer_is_found(tmp_path, monkeypatch, fault, found):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    (tmp_path / "trainer.py").write_text(TRAINER)
    (tmp_path / "tmp").mkdir()
    # With this seed two kills fall into the middle of a run's second save, the third between two saves.
    drill = Drill(tmp_path, "ddp", 1, 3, FaultsConfig(steps=10, seed=195), tqdm(disable=True))
    drill.command = [sys.executable, str(tmp_path / "trainer.py"), fault]
    count = drill.run()
    assert count["kills"] == 3
    assert {name for name in WRONG if count[name]} == found


def run_directory(path: Path, value: float = 1.0, losses: tuple = (3.0, 2.0), names: tuple = ("x", "y")) -> Path:
    (path / "step-000002").mkdir(parents=True)
    for folder in (path, path / "step-000002"):
        save_file({name: np.full(3, 1.0, dtype=np.float32) for name in names}, folder / "model.safetensors")
    save_file({"x:exp_avg": np.array([0.0, value], dtype=np.float32)}, path / "step-000002" / "optimizer.safetensors")
    lines = (f'{{"step": {step}, "loss": {loss}, "memory": {id(path)}}}\n' for step, loss in enumerate(losses, 1))
    (path / "metrics.jsonl").write_text("".join(lines))
    return path


@pytest.mark.parametrize("change, tensors, lines", [
    ({}, 0, 0),
    ({"value": float(np.nextafter(np.float32(1), np.float32(2)))}, 1, 0),  # the last bit of one number of the optimizer
    ({"value": -0.0}, 1, 0),
    ({"names": ("x",)}, 2, 0),
    ({"names": ("x", "z")}, 4, 0),
    ({"losses": (3.0, 2.0000001)}, 0, 1),
    ({"losses": (3.0,)}, 0, 1),
    ({"losses": (3.0, 3.0, 2.0)}, 0, 2),
])  # fmt: skip
def test_the_comparison_is_exact(tmp_path, change, tensors, lines):
    count = compare(run_directory(tmp_path / "a"), run_directory(tmp_path / "b", **change))
    assert count == Counter({"differing tensors": tensors, "differing losses": lines})


@pytest.mark.parametrize("wrong", [0, 1])
def test_a_difference_is_shown_and_exits_with_1(tmp_path, monkeypatch, capsys, wrong):
    monkeypatch.setattr(bench_faults.tempfile, "mkdtemp", lambda prefix: str(tmp_path / "drill"))
    monkeypatch.setattr(bench_faults, "make_data", lambda folder: folder.mkdir())
    shares = []

    def run(drill):
        shares.append((drill.name, len(drill.aims)))
        return Counter(kills=len(drill.aims), **{"wrong resumes": wrong * (drill.name == "fsdp-2")})

    monkeypatch.setattr(Drill, "run", run)
    config = FaultsConfig(kills=7, ranks=("1", "2"), strategy=("ddp", "fsdp"))
    if wrong:
        with pytest.raises(SystemExit) as exit:
            bench_faults.faults(config)
        assert exit.value.code == 1
    else:
        bench_faults.faults(config)
    assert shares == [("ddp-1", 2), ("ddp-2", 2), ("fsdp-1", 2), ("fsdp-2", 1)]
    out = capsys.readouterr().out
    assert re.findall("the same|DIFFERENT", out) == ["the same"] * 3 + ["DIFFERENT" if wrong else "the same"]
    assert (tmp_path / "drill").exists() == bool(wrong)


def test_a_kill_reaches_children_in_sessions_of_their_own(tmp_path, monkeypatch):
    """As torchrun's workers are. Were one left, it would hold the pipe open, and kill() would wait for it in vain."""
    monkeypatch.setattr(bench_process, "PATIENCE", 60)
    child = "import time; print('1/9  loss 1', flush=True); time.sleep(1000)"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}], start_new_session=True)"
    with Run([sys.executable, "-c", parent], dict(os.environ), tmp_path) as run:
        run.wait(run.moving)
        assert run.steps == 1 and not run.over.is_set()
        assert run.kill() and run.over.is_set()


def test_a_run_that_fails_by_itself_is_shown(tmp_path):
    with Run([sys.executable, "-c", "print('so far'); raise KeyError('bug')"], dict(os.environ), tmp_path) as run:
        with pytest.raises(RuntimeError, match=r"(?s)status 1\nso far.*KeyError: 'bug'"):
            run.end()
        assert not run.kill()


def test_a_run_that_hangs_is_shown_and_ended(tmp_path, monkeypatch):
    code = "import time; print('1/9  loss 1', flush=True); time.sleep(1000)"
    with Run([sys.executable, "-c", code], dict(os.environ), tmp_path) as run:
        run.wait(run.moving)
        monkeypatch.setattr(bench_process, "PATIENCE", 0.1)
        with pytest.raises(RuntimeError, match=r"hangs: it said nothing for 0.1 s\n1/9  loss 1"):
            run.wait(run.over)
        monkeypatch.undo()
    assert run.process.returncode == -signal.SIGKILL and run.over.is_set()


def test_bad_settings_are_named_together():
    with pytest.raises(UserError, match=r"--kills must be at least 2, not 1.*--steps must be at least 10.*--ranks two:.*--strategy zero: "):
        raise UserError("; ".join(FaultsConfig(kills=1, steps=9, ranks=("1", "two"), strategy=("zero",)).problems()))
    assert FaultsConfig().problems() == []


@pytest.mark.slow
def test_three_kills_change_nothing(capsys):
    """The drill with the real pretrain.py: two kills of one process, one of two ranks under torchrun."""
    bench_faults.faults(FaultsConfig(kills=3, steps=10))
    rows = [re.split(r"\s{2,}", line) for line in capsys.readouterr().out.splitlines()]
    assert [row[:3] for row in rows[1:3]] == [["ddp", "1", "2"], ["ddp", "2", "1"]]
    assert [row[7:] for row in rows[1:3]] == [["0"] * 5 + ["the same"]] * 2
