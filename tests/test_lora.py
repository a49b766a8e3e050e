"""Runs that train an adapter: sft.py and pretrain.py with --lora-rank, on one device and on several, resumed, offloaded."""

from __future__ import annotations

from settings import UserError, parse_config

import dataclasses
import importlib.util
import shutil
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from processes_at_hand import finished
from safetensors.torch import load_file
from test_pretrain import flags, losses, terminating
from test_sft import base_dir, chats, settings  # noqa: F401  fixtures

import adapter_files
import adapters
import pretrain
import sft
from checkpoint import load_model, save_model
from model import Llama, LlamaConfig
from offload import HostAdamW
from sft import Config, main

needs_deepspeed = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed")


@pytest.fixture
def lora(settings) -> dict:  # noqa: F811
    return {**settings, "lora_rank": 4, "lora_targets": ("all",), "lora_dropout": 0.0, "train_also": (), "keep": 9, "sample_tokens": 2}


def words(config: dict) -> list[str]:
    """The same settings as flags."""
    return flags({key: " ".join(value) if isinstance(value, tuple) else value for key, value in config.items() if value != ()})


def same_files(one: Path, other: Path, names=("adapter_model.safetensors", "optimizer.safetensors")) -> bool:
    pairs = [(load_file(one / name), load_file(other / name)) for name in names]
    return all(a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a) for a, b in pairs)


@pytest.mark.slow
@pytest.mark.parametrize("changes", [dict(base_quant="nf4-double", lora_dropout=0.1, dtype="bf16"),
                                     dict(dora=True, train_also=("norm", "embed")), dict(base_quant="int8", rslora=True, dtype="fp16")],
                         ids=["qlora", "dora", "int8"])  # fmt: skip
def test_stopped_and_resumed_equals_uninterrupted_bit_for_bit(lora, changes, monkeypatch, tmp_path):
    lora |= {**changes, "steps": 8}
    main(Config(**lora))
    other = {**lora, "out": tmp_path / "other"}
    with monkeypatch.context() as patch:
        patch.setattr(sft, "learning_rate", terminating(sft.learning_rate, 4))
        main(Config(**other))
    assert len(losses(other["out"])) == 5
    main(Config(**other))
    assert losses(other["out"]) == losses(lora["out"]) and same_files(other["out"] / "step-000008", lora["out"] / "step-000008")
    assert losses(lora["out"])[-1] < losses(lora["out"])[0]


def test_a_step_holds_only_what_is_trained(lora):
    lora["train_also"] = ("norm",)
    main(Config(**lora))
    step, llama = lora["out"] / "step-000010", LlamaConfig.from_json(lora["init_from"])
    names = load_file(step / "adapter_model.safetensors")
    assert {key.split(".")[-2] for key in names} == {"lora_A", "lora_B", "input_layernorm", "post_attention_layernorm", "norm"}
    remembered = {key.rpartition(":")[0] for key in load_file(step / "optimizer.safetensors")}
    assert {adapter_files.peft_key(name) for name in remembered} == set(names)
    assert not (step / "config.json").exists() and not (lora["out"] / "config.json").exists()
    with pytest.raises(UserError, match=r"is damaged: adapter_model\.safetensors"):
        content = (step / "adapter_model.safetensors").read_bytes()
        (step / "adapter_model.safetensors").write_bytes(content[:-400] + bytes(400))
        adapter_files.open_adapter(step, llama, lora["init_from"])
    adapter = adapter_files.open_adapter(lora["out"], llama, lora["init_from"])
    assert adapter.config.rank == 4 and adapter.base["storage"] == "none"
    assert main(Config(**lora))["step"] == 10  # a finished run: nothing to do


def test_training_moves_what_learns_and_the_samples_come_from_both(lora):
    """Chat, evaluation and the run's own validation see the same model."""
    main(Config(**lora))
    base, tuned = load_model(lora["init_from"]), load_model(lora["init_from"], adapters=[lora["out"]])
    changed = {name for (name, a), b in zip(base.named_parameters(), tuned.parameters()) if not torch.equal(a, b)}
    assert changed == {name for name, p in base.named_parameters() if p.dim() == 2 and "embed" not in name and "head" not in name}


def test_a_base_is_packed_tensor_by_tensor(lora, monkeypatch):
    """Two of its tensors in memory at most: the one being packed, and the one being read."""
    read, alive = sft.model_tensors, []

    def watched(*where):
        for name, tensor in read(*where):
            alive.append(weakref.ref(tensor))
            assert sum(reference() is not None for reference in alive) <= 2
            yield name, tensor
            del tensor

    monkeypatch.setattr(sft, "model_tensors", watched)
    main(Config(**{**lora, "steps": 1, "base_quant": "nf4-double", "sample_tokens": 0}))
    assert len(alive) == len(Llama(LlamaConfig.from_json(lora["init_from"])).parameter_shapes())
    assert not (lora["out"] / "samples.txt").exists()


def test_offloaded_adamw_is_adamw():
    torch.manual_seed(0)
    start = [torch.randn(4, 6), torch.randn(5)]
    found = []
    for kind in (torch.optim.AdamW, HostAdamW):
        parameters = [torch.nn.Parameter(tensor.clone()) for tensor in start]
        optimizer = kind([{"params": parameters[:1], "weight_decay": 0.1}, {"params": parameters[1:], "weight_decay": 0.0}], lr=0.1,
                         betas=(0.9, 0.95), fused=False)  # fmt: skip
        for step in range(3):
            for parameter in parameters:
                parameter.grad = torch.sin(parameter.detach() + step)
            optimizer.step()
        found.append([*parameters, *(optimizer.state[p][key] for p in parameters for key in ("exp_avg", "exp_avg_sq", "step"))])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_a_run_goes_on_with_its_optimizer_offloaded(lora, tmp_path):
    main(Config(**lora))
    main(Config(**{**lora, "out": tmp_path / "half", "resume": str(lora["out"] / "step-000004"), "offload_optimizer": True}))
    assert losses(tmp_path / "half") == pytest.approx(losses(lora["out"])[4:], abs=1e-6)


@pytest.mark.slow
def test_qlora_follows_lora(lora, tmp_path):
    """The base loses little in 4 bits, and the adapter learns on it all the same."""
    lora |= {"steps": 12, "lr": 1e-2, "train_also": ("head", "embed"), "eval_every": 12}  # random ones let no adapter learn
    main(Config(**lora))
    main(Config(**{**lora, "out": tmp_path / "nf4", "base_quant": "nf4-double"}))
    assert losses(tmp_path / "nf4") == pytest.approx(losses(lora["out"]), rel=0.05)
    assert losses(lora["out"])[-1] < 0.9 * losses(lora["out"])[0]


def test_pretraining_with_an_adapter_and_shifted_groups(base_dir, tmp_path):  # noqa: F811
    """LongLoRA: a longer window by interpolation, groups in training, embedding and norms learning beside the adapter."""
    tokens = np.random.default_rng(0).integers(3, 90, 8000).astype(np.uint16)
    tokens.tofile(tmp_path / "text.bin")
    config = pretrain.Config(data=tmp_path / "text.bin", tokenizer=base_dir, init_from=base_dir, out=tmp_path / "run", steps=4,
                             batch_size=4, seq_len=128, rope_scaling="linear", rope_factor=2.0, lora_rank=4, lora_targets=("attention",),
                             s2_attn=True, train_also=("norm", "embed"), lr=1e-2, checkpointing=True, log_every=1, device="cpu",
                             dtype="fp32")  # fmt: skip
    pretrain.main(config)
    found = load_model(base_dir, adapters=[tmp_path / "run"]).config
    assert found.rope_scaling["factor"] == 2.0 and found.max_position_embeddings == 128
    plain = dataclasses.replace(config, out=tmp_path / "plain", s2_attn=False)
    pretrain.main(plain)
    assert losses(tmp_path / "plain") != losses(tmp_path / "run")
    assert losses(tmp_path / "run")[-1] < losses(tmp_path / "run")[0]


@pytest.mark.slow
@pytest.mark.parametrize("way", ["ddp", "fsdp", *(pytest.param(f"zero-{stage}", marks=needs_deepspeed) for stage in (1, 2, 3))])
def test_two_processes_are_one_and_go_on_from_its_steps(way, lora, tmp_path):
    """Packed weights where they may be; else DoRA, whose norms need the whole matrix. One process takes over from two, and back."""
    packed = {"ddp": "nf4-double", "zero-1": "int8", "zero-2": "nf4"}.get(way, "none")
    lora |= {"base_quant": packed, "dora": packed == "none", "micro_batch": 1, "steps": 6, "save_every": 3, "eval_every": 6}
    main(Config(**lora))
    share = {"ddp": [], "fsdp": ["--fsdp"]}.get(way, ["--deepspeed", way[-1]])
    dora = ["--dora"] * lora.pop("dora")
    finished("sft.py", *words({**lora, "out": tmp_path / "two"}), *share, *dora, processes=2)
    assert losses(tmp_path / "two") == pytest.approx(losses(lora["out"]), abs=1e-4)
    lora["dora"] = bool(dora)
    main(Config(**{**lora, "out": tmp_path / "back", "resume": str(tmp_path / "two" / "step-000003")}))
    assert losses(tmp_path / "back") == pytest.approx(losses(lora["out"])[3:], abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("way", ["ddp", "fsdp", pytest.param("zero-2", marks=needs_deepspeed)])
def test_in_bf16_with_checkpointing_when_shared_out(way, lora, tmp_path):
    """What is frozen is bf16 then, what learns fp32 (ZeRO: bf16 with fp32 masters): dtypes meet in one group."""
    lora |= {"dtype": "bf16", "steps": 6, "train_also": ("norm",), "lora_targets": ("all,lm_head",)}
    main(Config(**{**lora, "base_quant": "nf4-double" if way == "ddp" else "none"}))
    share = {"ddp": ["--base-quant", "nf4-double"], "fsdp": ["--fsdp"]}.get(way, ["--deepspeed", "2", "--offload"])
    finished("sft.py", *words({**lora, "out": tmp_path / "two"}), *share, "--checkpointing", processes=2)
    assert losses(tmp_path / "two") == pytest.approx(losses(lora["out"]), abs=0.02)


# ---- what a run must not do ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flags, expected", [
    ("--dora --base-quant nf4", "--dora, --base-quant need --lora-rank"),
    ("--lora-alpha 3", "--lora-alpha needs --lora-rank"),
    ("--lora-rank 0", "--lora-rank must be at least 1, not 0"),
    ("--lora-rank 4 --lora-alpha 0", "--lora-alpha must be above 0"),
    ("--lora-rank 4 --lora-dropout 1", "--lora-dropout must be below 1"),
    ("--lora-rank 4 --base-quant nf4 --fsdp", "packed weights cannot be shared out"),
    ("--lora-rank 4 --base-quant nf4 --deepspeed 3", "packed weights cannot be shared out"),
    ("--s2-attn --no-packing", "--s2-attn needs --packing"),
    ("--lora-rank 4 --lora-targets q_proj qproj --train-also bias", "no module 'qproj'.*meant q_proj.*k_proj, v_proj.*--train-also bias"),
    ("--lora-rank 4 --fresh-weights", "--fresh-weights is for training the model itself"),
    ("--offload-optimizer --fsdp", "--offload-optimizer is for one device"),
])  # fmt: skip
def test_flags_that_do_not_go_together(flags, expected):
    with pytest.raises(UserError, match=expected):
        parse_config(Config, flags.split())


@pytest.mark.parametrize("changes, expected", [
    (dict(lora_rank=33), "rank 33 on model.layers.0.self_attn.q_proj: its matrix is 32 x 32"),
    (dict(lora_targets=("all", "k_proj=20")), "rank 20 on model.layers.0.self_attn.k_proj: its matrix is 16 x 32"),
    (dict(s2_attn=True, seq_len=60), "--s2-attn.*--seq-len 60"),
])  # fmt: skip
def test_what_does_not_fit_the_model_is_said_before_anything_begins(lora, changes, expected):
    with pytest.raises(UserError, match=expected):
        main(Config(**{**lora, **changes}))
    assert not lora["out"].exists()


def test_another_adapter_base_or_kind_of_run_does_not_go_on(lora, tmp_path):
    lora |= {"steps": 4}
    main(Config(**lora))
    step = str(lora["out"] / "step-000004")
    with pytest.raises(UserError, match="--lora-rank was 4 and is 2"):
        main(Config(**{**lora, "lora_rank": 2}))
    with pytest.raises(UserError, match=r"another adapter was trained there .*rank 4 and now 2"):
        main(Config(**{**lora, "lora_rank": 2, "out": tmp_path / "b", "resume": step}))
    with pytest.raises(UserError, match=r"the adapter was trained beside .* \(none\), and now it would be beside .* \(nf4\)"):
        main(Config(**{**lora, "base_quant": "nf4", "out": tmp_path / "e", "resume": step}))
    other = tmp_path / "other"
    shutil.copytree(lora["init_from"], other)
    model = load_model(other)
    with torch.no_grad():
        model.lm_head.weight *= 2
    save_model(model, other)
    with pytest.raises(UserError, match=r"the adapter was trained beside .*, and now it would be beside .*other"):
        main(Config(**{**lora, "init_from": other, "out": tmp_path / "f", "resume": step}))
    with pytest.raises(UserError, match="an adapter was trained there, and now the whole model"):
        main(Config(**{**lora, "lora_rank": None, "out": tmp_path / "c", "resume": step}))
    with pytest.raises(UserError, match=r"is an adapter and no whole model.*convert\.py merge"):
        main(Config(**{**lora, "init_from": lora["out"], "out": tmp_path / "d"}))


def test_parameter_and_operation_counts():
    """Frozen weights take 4 operations per token, not 6."""
    config = LlamaConfig(1000, 64, 128, 2, 4, 4)
    with torch.device("meta"):
        model, plain = Llama(config), Llama(config)
    adapters.attach(model, adapters.AdapterConfig(8, 16.0, ("q_proj", "v_proj")))
    added = sum(shape.numel() for shape in model.trained_shapes().values())
    assert added == 2 * 2 * 8 * (64 + 64)
    frozen = plain.num_parameters() - 1000 * 64
    assert model.flops_per_token(32) == plain.flops_per_token(32) - 2 * frozen + 6 * added
