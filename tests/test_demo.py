"""The commands of the README, in miniature, as a newcomer types them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import demo
from files import write_text

REPOSITORY = Path(__file__).resolve().parent.parent


def test_the_cost_of_each_fine_tuning_and_how_far_qlora_is_from_lora(tmp_path, capsys):
    for name, file, shape, losses in (("sft", "model", (1000, 2000), (4, 1)), ("lora", "adapter_model", (300, 20), (4, 2)),
                                      ("qlora", "adapter_model", (300, 20), (4.1, 1.8))):  # fmt: skip
        (tmp_path / name / "step-000020").mkdir(parents=True)
        save_file({"a": torch.zeros(shape), "b": torch.zeros(shape)}, tmp_path / name / f"{file}.safetensors")
        (tmp_path / name / "step-000020" / "weights").write_bytes(bytes(len(name) * 10**6))
        lines = [{"step": 0, "val_loss": losses[0]}, {"step": 10, "loss": 3}, {"step": 20, "loss": 9}, {"step": 20, "val_loss": losses[1]}]
        write_text(tmp_path / name / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    demo.compare(tmp_path)
    table = [line.split()[-4:] for line in capsys.readouterr().out.splitlines()]
    assert table[1:4] == [["4M", "3.0", "MB", "1.000"], ["12k", "4.0", "MB", "2.000"], ["12k", "5.0", "MB", "1.800"]]
    assert "10.0%" in table[5]  # of 2.5% and 10% the larger


@pytest.mark.slow
def test_the_demo_ends_with_its_table_and_a_second_run_repeats_nothing(tmp_path, monkeypatch, capfd):
    def commands() -> list[str]:
        return [line.split()[2] for line in printed.splitlines() if line.startswith("$ python")]

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
    everything = demo.main(demo.Config(out=out, lora=True))
    printed = capfd.readouterr().out
    assert commands() == ["sft.py"] * 2 + ["eval.py"] * 4  # only what was missing
    assert everything.items() > scores.items() and everything.keys() - scores.keys() == {
        f"{exam}/{name}" for exam in ("exam", "exam_unasked") for name in ("lora", "qlora")}  # fmt: skip
    assert "with LoRA, rank 16" in printed and "numbers that learn" in printed
    for lora, seen in ((True, everything), (False, scores)):
        assert demo.main(demo.Config(out=out, lora=lora)) == seen
        printed = capfd.readouterr().out
        assert not commands() and ("LoRA" in printed) == lora


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
