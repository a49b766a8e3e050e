"""pretrain.py: one process = two, resumed = uninterrupted, small micro-batches = large ones, every mistake one line."""

from __future__ import annotations

from settings import UserError

import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from processes_at_hand import REPOSITORY, ended, finished
from safetensors.torch import load_file
from torch.utils.flop_counter import FlopCounterMode

import pretrain
from checkpoint import load_model, save_model
from model import Llama, LlamaConfig
from parallel import freeze
from pretrain import EMBEDDINGS, Batches, Config, document_ids, learning_rate, main, shuffled
from progress import Progress, plot_loss, read_metrics
from tokenizer import load_tokenizer


@pytest.fixture(scope="session")
def tiny_config(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("config") / "config.json"
    LlamaConfig(vocab_size=400, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                num_key_value_heads=2, max_position_embeddings=32).to_json(path)  # fmt: skip
    return path


@pytest.fixture
def settings(tiny_config, data_dir, tmp_path, monkeypatch) -> dict:
    """Of a run in some seconds: its curve is not drawn, which would be half of them."""
    monkeypatch.setattr(pretrain, "plot_loss", lambda metrics, out, title: None)
    return dict(data=data_dir, model=str(tiny_config), out=tmp_path / "run", steps=12, batch_size=8, micro_batch=4, lr=5e-3,
                dtype="fp32", device="cpu", dropout=0.1, log_every=1, eval_every=6, save_every=5)  # fmt: skip


def losses(out: Path) -> list[float]:
    return [line["loss"] for line in read_metrics(out / "metrics.jsonl") if "loss" in line]


def validation(out: Path) -> list[tuple]:
    return [(line["step"], line["val_loss"]) for line in read_metrics(out / "metrics.jsonl") if "val_loss" in line]


def same_weights(a: Path, b: Path) -> bool:
    return all(torch.equal(x, y) for x, y in zip(load_model(a).parameters(), load_model(b).parameters(), strict=True))


def run(script: str, *arguments, torchrun: int = 0) -> subprocess.Popen:
    command = [sys.executable, script] if not torchrun else [
        sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={torchrun}", script]  # fmt: skip
    return subprocess.Popen([*command, *map(str, arguments)], cwd=REPOSITORY, text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"})  # fmt: skip


def changed(a: Path, b: Path) -> list[str]:
    """The parameters in which two models differ by as little as a bit."""
    (a, b) = (dict(load_model(path).named_parameters()) for path in (a, b))
    return [name for name in a if not torch.equal(a[name], b[name])]


def terminating(schedule, at: int):
    """The schedule, and SIGTERM to this very process while step `at` is under way."""
    def wrapped(step, *rest):
        if step == at:
            os.kill(os.getpid(), signal.SIGTERM)
        return schedule(step, *rest)
    return wrapped


def flags(settings: dict) -> list[str]:
    return [word for key, value in settings.items() for word in (f"--{key}", str(value))]


# ---- data ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 3, 16, 17, 100, 1000])
def test_shuffled_is_a_permutation_that_the_key_changes(n):
    orders = [[shuffled(i, n, key) for i in range(n)] for key in (0, 1)]
    assert all(sorted(order) == list(range(n)) for order in orders)
    if n >= 16:
        assert orders[0] != orders[1] and orders[0] != list(range(n))
        assert np.corrcoef(orders[0], range(n))[0, 1] < 0.7


def test_every_window_is_read_once_per_epoch():
    batches = Batches(np.arange(100, dtype=np.uint16), seq_len=4, batch_size=3, seed=5)
    assert batches.windows == 20
    read = np.concatenate([batches.after(step * 3) for step in range(20)])  # three epochs
    for epoch in range(3):
        firsts = sorted(read[epoch * 20 : (epoch + 1) * 20, 0])
        assert firsts == list(range(0, 100, 5))
    assert all((row == row[0] + np.arange(5)).all() for row in read)


def test_document_ids_change_after_eos():
    assert document_ids(torch.tensor([[5, 2, 7, 8, 2, 2, 9]]), 2).tolist() == [[0, 0, 1, 1, 1, 2, 3]]


def test_schedules():
    config = Config(lr=1.0, warmup=10, min_lr=0.1)
    assert learning_rate(0, 100, config) == pytest.approx(1 / 11)
    assert learning_rate(10, 100, config) == pytest.approx(1.0)
    assert learning_rate(55, 100, config) == pytest.approx(0.55)
    assert learning_rate(100, 100, config) == pytest.approx(0.1)
    stable = Config(lr=1.0, warmup=0.1, min_lr=0.0, schedule="wsd", decay_part=0.2)
    assert [round(learning_rate(s, 100, stable), 3) for s in (10, 50, 80, 90, 100)] == [1, 1, 1, 0.5, 0]


# ---- runs ------------------------------------------------------------------------------------------------------------


def test_a_run_learns_and_leaves_everything(settings, capsys, monkeypatch):
    monkeypatch.setattr(pretrain, "plot_loss", plot_loss)
    result = main(Config(**{**settings, "steps": 40, "dropout": 0.0}))
    out = settings["out"]
    curve = losses(out)
    assert len(curve) == 40 and curve[0] == pytest.approx(math.log(400), rel=0.05) and curve[-1] < curve[0] - 0.8
    assert result["val_loss"] < curve[0] - 0.8 and 0 < result["val_bpb"] < 8
    assert {p.name for p in out.iterdir()} >= {"config.json", "model.safetensors", "tokenizer.model", "args.json", "metrics.jsonl",
                                               "loss.png", "samples.txt", "step-000040"}  # fmt: skip
    assert (out / "loss.png").read_bytes()[:4] == b"\x89PNG" and "step 40" in (out / "samples.txt").read_text("utf-8")
    assert json.loads((out / "args.json").read_text())["lr"] == settings["lr"]
    assert "tokens/s" in capsys.readouterr().out
    main(Config(**{**settings, "steps": 40, "dropout": 0.0}))
    assert "finished: nothing to do" in capsys.readouterr().out
    assert len(losses(out)) == 40


def test_validation_loss_does_not_depend_on_the_micro_batch_and_bits_per_byte_follow(settings, data_dir):
    settings["dropout"] = 0.0
    result = main(Config(**{**settings, "steps": 1, "eval_tokens": 10**6}))
    other = main(Config(**{**settings, "steps": 1, "eval_tokens": 10**6, "micro_batch": 3, "out": settings["out"].with_name("b")}))
    assert result["val_loss"] == pytest.approx(other["val_loss"], rel=1e-6)
    val = json.loads((data_dir / "meta.json").read_text())["splits"]["val"]
    assert result["val_bpb"] == pytest.approx(result["val_loss"] / math.log(2) * val["tokens"] / val["bytes"], rel=1e-5)


@pytest.mark.parametrize("extra", [{"micro_batch": 8}, {"micro_batch": 3}, {"checkpointing": True}], ids=str)
def test_micro_batches_and_checkpointing_change_nothing(settings, extra):
    settings["dropout"] = 0.0
    main(Config(**settings))
    other = {**settings, "out": settings["out"].with_name("other"), **extra}
    main(Config(**other))
    assert losses(other["out"]) == pytest.approx(losses(settings["out"]), abs=1e-5)


@pytest.mark.parametrize("at, dtype", [(3, "fp32"), (7, "fp32"), (3, "fp16")])
def test_stopped_and_resumed_equals_uninterrupted_bit_for_bit(settings, monkeypatch, capsys, at, dtype):
    settings["dtype"] = dtype  # fp16 has a loss scaler, which remembers as well
    main(Config(**settings))
    other = {**settings, "out": settings["out"].with_name("other")}
    real = pretrain.learning_rate
    monkeypatch.setattr(pretrain, "learning_rate", terminating(real, at))
    main(Config(**other))
    assert f"stopped at step {at + 1}" in capsys.readouterr().out
    monkeypatch.setattr(pretrain, "learning_rate", real)
    main(Config(**{**other, "micro_batch": 4, "log_every": 1}))
    assert losses(other["out"]) == losses(settings["out"]) and validation(other["out"]) == validation(settings["out"])
    assert same_weights(settings["out"], other["out"])
    scalers = [json.loads((out / "step-000012" / "state.json").read_text())["scaler"] for out in (settings["out"], other["out"])]
    assert scalers[0] == scalers[1] and (dtype == "fp32" or scalers[0]["_growth_tracker"] == 12)


def test_resuming_from_a_named_step_goes_to_a_new_directory(settings):
    main(Config(**settings))
    other = {**settings, "out": settings["out"].with_name("branch"), "resume": str(settings["out"] / "step-000010")}
    main(Config(**other))
    assert losses(other["out"]) == losses(settings["out"])[10:]
    assert same_weights(settings["out"], other["out"])
    with pytest.raises(UserError, match="already holds another run"):
        main(Config(**{**other, "resume": str(settings["out"])}))


def test_continued_pretraining_starts_where_the_model_was(settings, capsys):
    first = main(Config(**{**settings, "dropout": 0.0}))
    base = settings["out"]
    again = {**settings, "out": base.with_name("next"), "init_from": base, "steps": 2, "lr": 1e-9, "dropout": 0.0}
    second = main(Config(**again))
    assert second["val_loss"] == pytest.approx(first["val_loss"], abs=1e-4)
    longer = {**again, "out": base.with_name("long"), "rope_scaling": "yarn", "rope_factor": 4.0, "seq_len": 100}
    main(Config(**longer))
    config = LlamaConfig.from_json(longer["out"])
    assert config.max_position_embeddings == 128 and config.rope_scaling["original_max_position_embeddings"] == 32
    with pytest.raises(UserError, match=r"--seq-len 100 is longer than the 32 tokens"):
        main(Config(**{**longer, "rope_scaling": "none", "out": base.with_name("x")}))


@pytest.fixture(params=[False, True], ids=["untied", "tied"])
def embeddings(request, settings, tiny_config, tmp_path) -> dict:
    """Settings that train embedding and head of a model in which no weight is a round number."""
    torch.manual_seed(3)
    model = Llama(dataclasses.replace(LlamaConfig.from_json(tiny_config), tie_word_embeddings=request.param))
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    save_model(model, tmp_path / "base", load_tokenizer(settings["data"]))
    del settings["model"]
    return {**settings, "init_from": tmp_path / "base", "train": "embeddings", "dropout": 0.0}


def trained_of(base: Path) -> list[str]:
    return list(EMBEDDINGS[:1] if LlamaConfig.from_json(base).tie_word_embeddings else EMBEDDINGS)


def test_embeddings_alone_are_trained_and_all_else_stays_bit_for_bit(embeddings, capsys, monkeypatch):
    rates = []
    monkeypatch.setattr(pretrain, "Progress", lambda *a, flops_per_token, **k: (
        rates.append(flops_per_token), Progress(*a, flops_per_token=flops_per_token, **k))[1])  # fmt: skip
    base, out = embeddings["init_from"], embeddings["out"]
    trained = trained_of(base)
    main(Config(**embeddings))
    assert changed(base, out) == changed(base, out / "step-000010") == trained
    assert losses(out)[-1] < losses(out)[0] - 0.1
    names = {key.rpartition(":")[0] for key in load_file(out / "step-000012" / "optimizer.safetensors")}
    assert names == set(trained)
    said = capsys.readouterr().out
    assert f"{'12.8k' if len(trained) == 1 else '25.6k'} of them are trained: {', '.join(trained)}\n" in said
    assert json.loads((out / "args.json").read_text())["run"]["trained"] == 400 * 32 * len(trained)
    assert f"Next: python pretrain.py --init-from {out}, which trains all" in said

    everything = {**embeddings, "out": out.with_name("all"), "train": "all"}
    main(Config(**everything))
    assert losses(everything["out"])[0] == losses(out)[0] and set(trained) < set(changed(base, everything["out"]))
    assert rates[1] - rates[0] == saved_operations(base)
    for number, extra in enumerate(({"micro_batch": 3}, {"checkpointing": True})):
        other = {**embeddings, "out": out.with_name(f"other-{number}"), **extra}
        main(Config(**other))
        assert losses(other["out"]) == pytest.approx(losses(out), abs=1e-5) and changed(base, other["out"]) == trained


def saved_operations(base: Path) -> int:
    """Per token, between training all and the embeddings alone, as torch counts the matrix products that are really done; and that of
    the norms, which are so few that flops_per_token takes them for matrices."""
    done, tokens = [], torch.randint(0, 400, (2, 33))
    for trained in (None, EMBEDDINGS):
        model = freeze(load_model(base), trained)
        with FlopCounterMode(display=False) as counter:
            model(tokens[:, :-1], tokens[:, 1:]).backward()
        assert all((parameter.grad is not None) == (trained is None or name in trained) for name, parameter in model.named_parameters())
        done.append(counter.get_total_flops() // (2 * 32))
    return done[0] - done[1] + 2 * sum(parameter.numel() for parameter in model.parameters() if parameter.dim() == 1)


@pytest.mark.parametrize("embeddings, dtype", [(False, "fp32"), (True, "fp16")], indirect=["embeddings"])
def test_embeddings_alone_stopped_and_resumed_equal_uninterrupted_bit_for_bit(embeddings, monkeypatch, dtype):
    embeddings |= {"dropout": 0.1, "dtype": dtype}
    main(Config(**embeddings))
    other = {**embeddings, "out": embeddings["out"].with_name("other")}
    with monkeypatch.context() as patch:
        patch.setattr(pretrain, "learning_rate", terminating(pretrain.learning_rate, 7))
        main(Config(**other))
    assert len(losses(other["out"])) == 8
    main(Config(**other))
    assert losses(other["out"]) == losses(embeddings["out"]) and same_weights(other["out"], embeddings["out"])
    states = [load_file(settings["out"] / "step-000012" / "optimizer.safetensors") for settings in (embeddings, other)]
    assert states[0].keys() == states[1].keys() and all(torch.equal(states[0][key], states[1][key]) for key in states[0])


@pytest.mark.parametrize("embeddings", [False], indirect=True)
def test_what_is_trained_cannot_change_within_a_run(embeddings):
    embeddings["steps"] = 2
    main(Config(**embeddings))
    everything = {**embeddings, "train": "all"}
    with pytest.raises(UserError, match="--train was embeddings and is all"):
        main(Config(**everything))
    refusal = r"step-000002: \d tensors were trained there and 2\d are to be trained now \(--train\); .*--init-from"
    with pytest.raises(UserError, match=refusal):
        main(Config(**{**everything, "resume_anyway": True}))
    branch = {**everything, "out": embeddings["out"].with_name("branch"), "resume": str(embeddings["out"])}
    with pytest.raises(UserError, match=refusal):
        main(Config(**branch))
    assert not branch["out"].exists()
    following = {**everything, "out": embeddings["out"].with_name("next"), "init_from": embeddings["out"]}
    main(Config(**following))
    assert len(changed(embeddings["out"], following["out"])) > 20
    with pytest.raises(UserError, match=r"2\d tensors were trained there and \d are to be trained now"):
        main(Config(**{**embeddings, "out": branch["out"], "resume": str(following["out"])}))


def test_doc_mask_runs_and_compile_compiles(settings, monkeypatch):
    settings.update(steps=2, doc_mask=True, dropout=0.0)
    main(Config(**settings))
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, *a, **k: compiled.append(self))
    other = {**settings, "out": settings["out"].with_name("compiled"), "compile": True}
    main(Config(**other))
    assert len(compiled) == 1 and losses(other["out"]) == losses(settings["out"])


def test_ten_bad_steps_in_a_row_stop_the_run(settings, capsys):
    with pytest.raises(UserError, match="ten steps in a row"):
        main(Config(**{**settings, "steps": 30, "lr": 1e30, "warmup": 0}))
    assert "step skipped (10 in a row)" in capsys.readouterr().out


# ---- processes as users start them -----------------------------------------------------------------------------------


@pytest.mark.slow
def test_two_processes_equal_one(settings):
    settings["dropout"] = 0.0
    main(Config(**settings))
    other = {**settings, "out": settings["out"].with_name("two")}
    process = run("pretrain.py", *flags(other), torchrun=2)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert losses(other["out"]) == pytest.approx(losses(settings["out"]), abs=1e-5)
    ours, theirs = (read_metrics(s["out"] / "metrics.jsonl")[-1]["val_loss"] for s in (settings, other))
    assert ours == pytest.approx(theirs, abs=1e-5)
    assert out.count("done:") == 1  # rank 0 alone speaks


@pytest.mark.slow
def test_terminated_and_resumed_equals_uninterrupted(settings):
    """SIGTERM to torchrun, which passes it on; SIGKILL is for test_bench_faults.py."""
    settings.update(steps=60, save_every=4, log_every=1, eval_every=100)
    finished("pretrain.py", *flags(settings))
    other = {**settings, "out": settings["out"].with_name("killed")}
    process = run("pretrain.py", *flags(other), torchrun=2)
    deadline = time.time() + 200
    while len(losses(other["out"])) < 9 and time.time() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    process.wait(60)
    assert 9 <= len(losses(other["out"])) < 60
    assert "resuming at step" in finished("pretrain.py", *flags(other))
    assert losses(other["out"]) == losses(settings["out"]) and validation(other["out"]) == validation(settings["out"])
    assert same_weights(settings["out"], other["out"])


def test_mistakes_are_one_line_and_exit_2(settings, tmp_path):
    statuses, out, err = ended("pretrain.py", "--data", tmp_path / "nothing", "--out", tmp_path / "out")
    assert statuses == [2] and out == "" and err.count("\n") == 1
    assert err.startswith("error: --data") and "python data_process.py textbook" in err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("change, message", [
    ({"model": "93m"}, "--model 93m is neither a preset"),
    ({"lr": -1.0, "batch_size": 0}, "--batch-size must be above 0.*--lr must be above 0"),
    ({"steps": 0}, "--steps must be at least 1"),
    ({"lr": float("nan"), "beta2": 1.5, "seed": -1, "min_lr": -5.0}, "--lr must.*--min-lr must.*--seed must.*--beta2 must be below 1"),
    ({"dropout": 1.5}, "--dropout"),
    ({"train": "embeddings"}, "--train embeddings needs --init-from"),
])  # fmt: skip
def test_bad_settings_are_named_together(settings, change, message):
    import re

    problems = "; ".join(Config(**{**settings, **change}).problems())
    assert re.search(message, problems), problems


def test_inputs_that_do_not_fit(settings, tmp_path, data_dir, corpus):
    with pytest.raises(UserError, match="fewer than one sequence"):
        (tmp_path / "short.bin").write_bytes(np.arange(20, dtype=np.uint16).tobytes())
        main(Config(**{**settings, "data": tmp_path / "short.bin", "tokenizer": data_dir}))
    with pytest.raises(UserError, match="say which --tokenizer"):
        main(Config(**{**settings, "data": tmp_path / "short.bin"}))
    import tokenizer

    other = tmp_path / "other"
    tokenizer.train([corpus], vocab_size=380, out=other)
    with pytest.raises(UserError, match="another tokenizer"):
        main(Config(**{**settings, "tokenizer": other}))
    base = tmp_path / "base"
    save_model(Llama(LlamaConfig(vocab_size=400, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
                                 num_key_value_heads=2)), base, tokenizer.load_tokenizer(other))  # fmt: skip
    with pytest.raises(UserError, match="another tokenizer"):  # the data fits the vocabulary, but not the model's tokenizer
        main(Config(**{**settings, "init_from": base}))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    with pytest.raises(UserError, match="not a run of ours"):
        main(Config(**{**settings, "out": tmp_path / "mine"}))
    main(Config(**{**settings, "steps": 1}))
    with pytest.raises(UserError, match=r"--steps was 1 and is 2"):
        main(Config(**{**settings, "steps": 2}))
    with pytest.raises(UserError, match=r"--dtype was fp32 and is bf16; dtype has changed"):
        main(Config(**{**settings, "steps": 1, "dtype": "bf16"}))
    with pytest.raises(UserError, match="is not a directory"):
        main(Config(**{**settings, "out": tmp_path / "mine" / "thesis.tex"}))
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["thesis.tex"]
