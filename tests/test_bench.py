"""bench.py: both sides run, compute the same, and the arithmetic of the table is right."""

from __future__ import annotations

from settings import UserError, command_line

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from processes_at_hand import ended

import bench
import bench_turns
from bench import Clock, DecodeConfig, LossConfig, TrainConfig
from bench_turns import GIB
from checkpoint import save_model
from model import Llama, LlamaConfig

ROOT = Path(bench.__file__).parent
needs_transformers = pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="needs transformers")
CPU = {"device": "cpu", "dtype": "fp32"}


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A config.json of a model that takes milliseconds."""
    path = tmp_path_factory.mktemp("small") / "config.json"
    LlamaConfig(101, 32, 64, 2, 4, 2, max_position_embeddings=64).to_json(path)
    return str(path)


@pytest.fixture
def here(monkeypatch):
    """Measure in this process: the same workers and the same JSON in between, without waiting for imports."""

    def run(command, config, side):
        work = bench.COMMANDS[command][3]
        return json.loads(json.dumps(work(config, side)))

    monkeypatch.setattr(bench_turns, "run_worker", run)


# ----------------------------------------------------------------------------------------------------------------------
# The measurements


@needs_transformers
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable")
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_both_sides_train_alike(small, tied, checkpointing):
    config = TrainConfig(model=small, tied=tied, micro_batch=2, seq_len=16, steps=3, checkpointing=checkpointing, **CPU)
    ours, theirs = (bench.train_worker(config, side) for side in ("cria", "transformers"))
    # after four optimizer steps: the same weights, targets, loss and optimizer, or the losses would part
    assert ours["loss"] == pytest.approx(theirs["loss"], abs=2e-5)
    for result in (ours, theirs):
        assert len(result["seconds"]) == 3 and min(result["seconds"]) > 0
        assert result["peak_memory"] >= result["memory_before"] > 10 * 2**20
    assert theirs["versions"].startswith(ours["versions"]) and "transformers" in theirs["versions"]


@needs_transformers
def test_both_sides_start_from_the_same_weights(small):
    config = TrainConfig(model=small, vocab_size=77, tied=True, **CPU)
    machine = config.machine()
    ours, theirs = (bench.build(config.llama(), side, machine, torch.float32) for side in ("cria", "transformers"))
    theirs = dict(theirs.named_parameters())
    assert ours.lm_head.weight.shape == (77, 32) and ours.lm_head.weight is ours.model.embed_tokens.weight
    assert {name for name, _ in ours.named_parameters()} == set(theirs)
    assert all(torch.equal(parameter, theirs[name]) for name, parameter in ours.named_parameters())
    assert ours.model.layers[0].mlp.up_proj.weight.std().item() == pytest.approx(0.02, rel=0.1)


@needs_transformers
def test_both_sides_write_the_same_tokens(small):
    config = DecodeConfig(model=small, batch_size=2, prompt_tokens=5, new_tokens=12, **CPU)
    ours, theirs = (bench.decode_worker(config, side) for side in ("cria", "transformers"))
    assert ours["tokens"] == theirs["tokens"]
    assert [len(step) for step in ours["tokens"]] == [2] * 12
    for result in (ours, theirs):
        assert result["prefill_seconds"] > 0 and result["decode_seconds"] > 0


def test_every_way_to_compute_the_loss_gives_the_same(small):
    results = {side: bench.loss_worker(LossConfig(model=small, micro_batch=2, seq_len=20, **CPU), side)
               for side in bench.losses()}  # fmt: skip
    plain = results["plain"]
    assert len(results) == (5 if hasattr(torch.nn.functional, "linear_cross_entropy") else 2)
    assert plain["loss"] > 3 and min(plain["gradient_norms"]) > 0
    for result in results.values():
        assert result["loss"] == pytest.approx(plain["loss"], rel=1e-5)
        assert result["gradient_norms"] == pytest.approx(plain["gradient_norms"], rel=1e-4)
        assert len(result["seconds"]) == 3


def test_the_clock_notes_what_came_when():
    clock = Clock()
    for step in ([1, 2], [3, 4]):
        clock.put(torch.tensor(step))
    clock.end()
    assert clock.tokens == [[1, 2], [3, 4]] and len(clock.times) == 2 and clock.times[0] <= clock.times[1]


# ----------------------------------------------------------------------------------------------------------------------
# The table


def fake(monkeypatch, numbers: dict) -> list:
    """Workers that return, in turn, the given results of their side."""
    order = []

    def run(command, config, side):
        order.append(side)
        result = numbers[side][order.count(side) - 1]
        common = {"memory_before": GIB, "device": "cpu, 2 threads, bf16", "versions": "torch 2", "peak_flops": None}
        return {**common, "loss": 5.0, **result}

    monkeypatch.setattr(bench_turns, "run_worker", run)
    return order


def test_sides_take_turns_and_ratios_are_taken_pair_by_pair(monkeypatch, small, tmp_path, capsys):
    order = fake(monkeypatch, {
        "cria": [{"seconds": [1, 2, 9], "peak_memory": 2 * GIB}, {"seconds": [4, 4, 4], "peak_memory": 2 * GIB},
                 {"seconds": [3, 3, 3], "peak_memory": 3 * GIB}],
        "transformers": [{"seconds": [3, 3, 3], "peak_memory": 4 * GIB}, {"seconds": [8, 8, 8], "peak_memory": 5 * GIB},
                         {"seconds": [3, 3, 3], "peak_memory": 4 * GIB}],
    })  # fmt: skip
    config = TrainConfig(model=small, micro_batch=4, seq_len=30, against="transformers", peak_tflops=1e-6,
                         markdown=True, out=tmp_path / "deep" / "result.json", **CPU)  # fmt: skip
    summary = bench.train(config)
    assert order == ["cria", "transformers"] * 3
    assert summary["cria"]["seconds"] == 3 and summary["cria"]["tokens_per_s"] == 40
    assert summary["ratio"]["speed"] == (1.5, 1.0, 2.0)  # pairs 3/2, 8/4, 3/3
    assert summary["ratio"]["peak memory"] == (0.5, 0.4, 0.75)
    flops_per_token = Llama(config.llama()).flops_per_token(30)
    assert summary["cria"]["mfu"] == pytest.approx(40 * flops_per_token / 1e6)
    out = capsys.readouterr().out
    row = next(line for line in out.replace(" ", "").splitlines() if line.startswith("|cria|"))
    assert row.startswith("|cria|3.000|67%|40|") and row.endswith("|2.00|1.00|5.0000|")  # (4 - 2) / 3
    assert "cria : transformers = speed 1.50 (1.00 to 2.00), peak memory 0.50 (0.40 to 0.75)" in out
    assert f"torch {torch.__version__.split('.')[0]}" in out and "Median of 3 processes" in out and "cores" in out
    stored = json.loads((tmp_path / "deep" / "result.json").read_text(encoding="utf-8"))
    assert len(stored["runs"]["cria"]) == 3 and stored["settings"]["micro_batch"] == 4
    with pytest.raises(UserError, match="exists already"):
        raise UserError("; ".join(config.problems()))


def test_sides_that_compute_different_things_are_no_benchmark(monkeypatch, small):
    run = {"seconds": [1.0], "peak_memory": GIB}
    fake(monkeypatch, {"cria": [run], "transformers": [{**run, "loss": 5.2}]})
    with pytest.raises(RuntimeError, match=r"loss 5\.0000 and 5\.2000"):
        bench.train(TrainConfig(model=small, against="transformers", repeats=1, **CPU))


def test_decode_speeds(monkeypatch, small, capsys):
    run = {"prefill_seconds": 0.5, "decode_seconds": 2.0, "tokens": [[1]] * 9, "peak_memory": GIB}
    fake(monkeypatch, {"cria": [run]})
    summary = bench.decode(DecodeConfig(model=small, batch_size=3, prompt_tokens=10, new_tokens=9, repeats=1, **CPU))
    assert summary["cria"]["prefill_tokens_per_s"] == 60 and summary["cria"]["decode_tokens_per_s"] == 12
    assert "9 of 9" in capsys.readouterr().out


def test_loss_table(here, small, capsys):
    summary = bench.loss(LossConfig(model=small, micro_batch=1, seq_len=16, repeats=2, steps=1, warmup=0, **CPU))
    assert set(summary) == set(bench.losses()) and all(entry["seconds"] > 0 for entry in summary.values())
    assert "GiB above its input" in capsys.readouterr().out


# ----------------------------------------------------------------------------------------------------------------------
# Mistakes


@pytest.mark.parametrize("name", bench.COMMANDS)
def test_every_command_explains_its_flags(name, capsys):
    commands = {key: entry[:3] for key, entry in bench.COMMANDS.items()}
    with pytest.raises(SystemExit) as exit:
        command_line(None, None, [name, "--help"], commands=commands)
    assert exit.value.code == 0 and commands[name][2] in capsys.readouterr().out


@pytest.mark.parametrize("config, message", [
    (TrainConfig(model="93m"), "--model 93m is neither a preset"),
    (TrainConfig(repeats=0, steps=-1), r"--repeats must be at least 1, not 0.*--steps must be at least 1, not -1"),
    (TrainConfig(against="no_such_package"), "needs that package: pip install no_such_package"),
])  # fmt: skip
def test_problems_are_named_before_anything_runs(config, message):
    with pytest.raises(UserError, match=message):
        raise UserError("; ".join(config.problems()))
    assert TrainConfig(warmup=0, seed=0).problems() == []


@pytest.mark.parametrize("command, config, message", [
    (bench.train, TrainConfig(model="tiny", seq_len=257), "--seq-len 257 is longer than the 256 tokens that tiny"),
    (bench.loss, LossConfig(model="tiny", seq_len=257), "--seq-len 257"),
    (bench.decode, DecodeConfig(model="tiny", prompt_tokens=200, new_tokens=57), "more than the 256 tokens"),
    (bench.decode, DecodeConfig(model="tiny", new_tokens=1), "at least 2"),
])  # fmt: skip
def test_shapes_that_do_not_fit_are_refused(command, config, message):
    with pytest.raises(UserError, match=message):
        command(config)


def test_a_model_directory_lends_its_architecture(tmp_path):
    config = LlamaConfig(50, 32, 64, 1, 2, 2, max_position_embeddings=300)
    save_model(Llama(config), tmp_path)
    assert DecodeConfig(model=str(tmp_path)).llama() == config
    assert DecodeConfig(model=str(tmp_path), vocab_size=60).llama() == dataclasses.replace(config, vocab_size=60)


@pytest.mark.slow
def test_a_bug_in_a_worker_keeps_its_traceback(small):
    with pytest.raises(RuntimeError, match="KeyError"):
        bench_turns.run_worker("loss", LossConfig(model=small, **CPU), "no such loss")


@pytest.mark.slow
@needs_transformers
def test_the_program(small, tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    flags = ["--model", small, "--micro-batch", 2, "--seq-len", 16, "--repeats", 1, "--steps", 1, "--tied",
             "--device", "cpu", "--dtype", "fp32", "--against", "transformers", "--out", tmp_path / "r.json"]
    command = [sys.executable, ROOT / "bench.py", "train", *map(str, flags)]
    done = subprocess.run(command, capture_output=True, env=environment, encoding="utf-8", timeout=300)
    assert done.returncode == 0, done.stderr
    runs = json.loads((tmp_path / "r.json").read_text(encoding="utf-8"))["runs"]
    assert runs["cria"][0]["loss"] == pytest.approx(runs["transformers"][0]["loss"], abs=2e-5)
    assert "cria : transformers = speed" in done.stdout and "tied" in done.stdout
    statuses, _, err = ended(*command[1:])
    assert statuses == [2] and err.startswith("error: --out") and err.count("\n") == 1


@pytest.mark.slow
def test_conversions_are_measured(tmp_path, capsys):
    config = bench.ConvertConfig(model="tiny", conversions=("meta",), folder=tmp_path / "files", markdown=True)
    assert config.problems() == []
    summary = bench.convert(config)
    assert 0.005 < summary["meta"]["gb"] < 0.02 and 0.1 < summary["meta"]["peak_gb"] < 4 and not (tmp_path / "files").exists()
    assert "| export-meta " in capsys.readouterr().out
    wrong = dataclasses.replace(config, conversions=("from-meta", "nothing"))
    assert "nothing is unknown" in wrong.problems()[0]
    assert "from-meta starts from meta: name that before it" in dataclasses.replace(config, conversions=("from-meta",)).problems()[0]
