"""The commands of the README, in miniature, as a newcomer types them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import demo

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.mark.slow
def test_the_demo_ends_with_its_table_and_a_second_run_repeats_nothing(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(REPOSITORY)
    monkeypatch.setattr(demo, "PRETRAIN", "--seq-len 64 --steps 3 --batch-size 2 --log-every 1")
    monkeypatch.setattr(demo, "SFT", "--seq-len 64 --steps 2 --batch-size 2 --log-every 1")
    out = tmp_path / "demo"
    scores = demo.main(demo.Config(out=out))
    printed = capfd.readouterr().out
    assert set(scores) == {f"{exam}/{name}" for exam in ("exam", "exam_unasked") for name in ("base", "sft", "control")}
    assert all(0.1 < score < 0.5 for score in scores.values())  # three steps teach nothing: about chance
    for words in ("characters per token", "done in", "bits per byte", "chance 25%", "without pretraining", "> 法国的首都是哪里？"):
        assert words in printed
    assert (out / "loss.png").read_bytes()[:4] == b"\x89PNG"
    assert "pretrain" in (out / "samples.txt").read_text(encoding="utf-8")
    assert demo.main(demo.Config(out=out)) == scores
    assert "$ python" not in capfd.readouterr().out


@pytest.mark.slow
def test_bare_torchrun_after_the_two_commands_that_it_names(tmp_path):
    def run(*words: str) -> subprocess.CompletedProcess:
        return subprocess.run([sys.executable, *words], cwd=tmp_path, capture_output=True, text=True, timeout=300,
                              env={**os.environ, "OMP_NUM_THREADS": "1"})  # fmt: skip

    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(REPOSITORY / "pretrain.py"))
    missing = run(*torchrun)
    assert missing.returncode == 1
    messages = [line for line in missing.stderr.splitlines() if "error: [rank " in line]
    assert len(messages) == 1  # two processes, one line
    message = messages[0]
    commands = [words for words in message.split("`") if words.startswith("python data_process.py")]
    assert len(commands) == 2
    for command in commands:
        script, *words = command.split()[1:]
        done = run(str(REPOSITORY / script), *words)
        assert done.returncode == 0, done.stderr
    # the bare command trains the 92m preset: too slow for a test, so a smaller model and two steps
    done = run(*torchrun, "--model", "tiny", "--steps", "2", "--batch-size", "4", "--seq-len", "64")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "pretrain" / "model.safetensors").exists()
