"""bench.py train and plan with adapters: what is predicted is what autograd and the allocator really take."""

from __future__ import annotations

from settings import parse_config

import dataclasses
import json
import re
from pathlib import Path

import pytest
import torch
from test_bench_plan import DEEP, GROUPED, NO_OVERHEAD, most_allocated

import bench
import bench_memory
import bench_turns
import sft
from adapters import AdapterConfig, attach, first_values
from bench import TrainConfig
from bench_memory import DDP, FSDP, GIB, OFFLOAD, ZERO1, ZERO2, ZERO3, Step, count
from bench_plan import PlanConfig, largest_that, plan
from config import PRESETS
from layers import Linear
from model import Llama, LlamaConfig
from parallel import make_parallel
from runtime import Machine, MachineConfig

ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
LORA = AdapterConfig(rank=8, alpha=16, targets=ALL)
NORMS = ("input_layernorm", "post_attention_layernorm", "norm")


def step(adapter=LORA, storage="none", strategy=DDP, devices=1, llama=GROUPED, tokens=1024, checkpointing=False, **more) -> Step:
    return Step(counts=more.pop("counts", None) or count(llama, 512, "all", adapter, storage), strategy=strategy, devices=devices,
                tokens=tokens, checkpointing=checkpointing, **more)  # fmt: skip


def changed(**changes) -> AdapterConfig:
    return dataclasses.replace(LORA, **changes)


# ----------------------------------------------------------------------------------------------------------------------
# Against autograd and the allocator


@pytest.mark.parametrize("adapter, storage", [
    (LORA, "none"), (LORA, "int8"), (LORA, "nf4"), (LORA, "nf4-double"), (changed(dropout=0.1), "nf4"), (changed(dora=True), "nf4-double"),
    (changed(targets=("q_proj", "v_proj")), "nf4"), (changed(targets=ALL[4:]), "none"), (changed(rank_pattern={"o_proj": 3}), "none"),
    (changed(targets=("k_proj", "down_proj"), dropout=0.1, dora=True, modules_to_save=NORMS), "int8"),
    (changed(modules_to_save=(*NORMS, "embed_tokens")), "nf4-double"),
])  # fmt: skip
@pytest.mark.parametrize("strategy, dtype", [(DDP, torch.bfloat16), (DDP, torch.float32), (ZERO2, torch.bfloat16)])
def test_a_block_with_adapters_saves_what_the_table_says(adapter, storage, strategy, dtype):
    B, T, llama = 3, 37, LlamaConfig(100, 96, 250, 1, 4, 2)
    model = Llama(llama)
    attach(model, adapter, storage, dtype)
    block = model.model.layers[0]
    if strategy.casts_weights:
        block.bfloat16()
    predicted = step(adapter, storage, strategy, llama=llama, e=dtype.itemsize, kind="cpu")
    stream = {2: torch.bfloat16, 4: torch.float32}[predicted.stream]
    x = torch.randn(B, T, 96, dtype=stream, requires_grad=True)
    cos, sin = torch.randn(2, 1, 1, T, llama.head_dim // 2)
    weights = {shape for layer in block.modules() for p in layer.parameters() for shape in (p.shape, p.shape[::-1])}
    weights |= {size for layer in block.modules() if isinstance(layer, Linear) for size in
                (torch.Size((layer.in_features, layer.out_features)), torch.Size((layer.out_features, layer.in_features)))}  # fmt: skip
    not_counted, saved = {t.untyped_storage().data_ptr() for t in (cos, sin)}, {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in not_counted and tensor.shape not in weights:  # a weight's copy has its shape
            saved[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), \
            torch.autocast("cpu", dtype, enabled=strategy.autocast and dtype != torch.float32):  # fmt: skip
        block(x, cos, sin, None, None)
    assert sum(storage.nbytes() for storage in saved.values()) == B * T * sum(predicted.saved_per_token().values())


def train(llama: LlamaConfig, dtype: str, adapter: AdapterConfig, storage: str, *, tokens: int, checkpointing: bool) -> int:
    """Two optimizer steps as sft.py makes them; the most that was allocated."""
    config = MachineConfig(device="cpu", dtype=dtype)

    def work() -> None:
        parallel = make_parallel(machine, config)
        model = parallel.build(llama, lambda model: attach(model, adapter, storage, machine.dtype))
        model.checkpointing = checkpointing
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=True)
        network = parallel.wrap(model, optimizer, clip=1.0, micro_batch=1, micro_batches=1)
        parallel.fill(first_values(model.initial_weights(0), model, 0))
        network.train()
        x, y = torch.randint(0, llama.vocab_size, (2, tokens // 256, 256))
        for _ in range(2):
            with parallel.autocast():
                loss = network(x, y, denominator=tokens)
            parallel.backward(loss)
            parallel.clip(1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    with Machine(config) as machine:
        return most_allocated(work)


WIDE = LlamaConfig(1000, 512, 1408, 2, 8, 8, max_position_embeddings=512)


@pytest.mark.parametrize("llama, tokens, dtype, adapter, storage, checkpointing", [
    (GROUPED, 256, "bf16", changed(dropout=0.1), "none", False),
    (GROUPED, 256, "fp32", LORA, "int8", False),
    (DEEP, 512, "bf16", LORA, "nf4", True),
    (WIDE, 256, "bf16", LORA, "nf4-double", True),
    (WIDE, 512, "bf16", changed(dora=True), "none", True),
    (GROUPED, 256, "bf16", changed(modules_to_save=(*NORMS, "embed_tokens", "lm_head")), "nf4-double", True),
    (GROUPED, 256, "bf16", changed(targets=("q_proj", "v_proj", "lm_head")), "nf4-double", True),
])  # fmt: skip
def test_one_process_allocates_what_is_predicted(monkeypatch, llama, tokens, dtype, adapter, storage, checkpointing):
    monkeypatch.setattr(bench_memory, "OVERHEAD", NO_OVERHEAD)
    took = train(llama, dtype, adapter, storage, tokens=tokens, checkpointing=checkpointing)
    _, parts = step(adapter, storage, llama=llama, tokens=tokens, checkpointing=checkpointing, e=4 if dtype == "fp32" else 2,
                 accumulates=False, kind="cpu").peak()  # fmt: skip
    assert parts.total == pytest.approx(took, rel=0.05)


# ----------------------------------------------------------------------------------------------------------------------
# Numbers by hand, and what must hold for all numbers

QLORA = AdapterConfig(rank=64, alpha=16, targets=ALL)


@pytest.mark.parametrize("name, parameters, learning, nf4_double, nf4", [
    ("llama2-7b", 6_738_415_616, 159_907_840, 3.34, 3.64),
    ("llama2-13b", 13_015_864_320, 250_347_520, 6.55, 7.14),
    ("llama-65b", 65_285_660_672, 799_539_200, 33.41, 36.43),
])  # fmt: skip
def test_sizes_of_the_large_models(name, parameters, learning, nf4_double, nf4):
    double, single = (count(PRESETS[name], 512, "all", QLORA, storage) for storage in ("nf4-double", "nf4"))
    assert (double.all, double.trained) == (parameters, learning)
    assert (double.packed / 1e9, single.packed / 1e9) == pytest.approx((nf4_double, nf4), abs=0.006)
    assert double.frozen == 2 * 32000 * double.llama.hidden_size + (2 * double.llama.num_hidden_layers + 1) * double.llama.hidden_size


def test_7b_by_hand():
    n = count(PRESETS["llama2-7b"], 512, "all", QLORA, "nf4-double")
    alone = step(counts=n, kind="cuda", tokens=512, checkpointing=True)
    assert alone.states() == (n.packed + 2 * n.frozen + 4 * n.trained, 8 * n.trained, 0)
    assert dataclasses.replace(alone, offload_optimizer=True).states() == (alone.states()[0], 0, 8 * n.trained)
    assert dataclasses.replace(alone, devices=8, strategy=ZERO2).states() == (n.packed + 2 * (n.frozen + n.trained), 1.5 * n.trained, 0)
    assert alone.activations()["loss"] == 512 * (32 * 2 * 4096 + 4 * 4096 + 4 + 16)  # the inputs of 32 blocks in bf16; the last norm's
    # fused norms 2·4·D + 8, five casts 5·2·D, q k v and the output 2·4·D, H·4, o's input 2·D, 4·2·I, seven times x Aᵀ
    assert sum(alone.saved_per_token().values()) == 8 * 4096 + 8 + 10 * 4096 + 8 * 4096 + 4 * 32 + 2 * 4096 + 8 * 11008 + 7 * 2 * 64
    linear = n.all - n.frozen
    assert n.flops_per_token == 4 * (linear + 32000 * 4096 + 65 * 4096) + 6 * n.trained + 12 * 32 * 4096 * 512
    assert n.forward_flops == 2 * (linear + 32000 * 4096 + 65 * 4096) + 2 * n.trained + 4 * 32 * 4096 * 512


def test_fewer_bits_and_lower_ranks_take_less():
    def total(storage="nf4-double", checkpointing=True, **changes) -> float:
        n = count(seven, 512, "all", changed(**changes), storage)
        return step(counts=n, checkpointing=checkpointing).peak()[1].total

    seven = PRESETS["llama2-7b"]
    sizes = [total(storage) for storage in ("nf4-double", "nf4", "int8", "none")]
    assert sizes == sorted(sizes) and len(set(sizes)) == 4
    least = total()
    assert all(least < more for more in (total(rank=16), total(checkpointing=False), total(dora=True), total(dropout=0.1),
                                         total(modules_to_save=("embed_tokens",)), total(targets=(*ALL, "lm_head"))))  # fmt: skip
    assert total(targets=("q_proj", "v_proj")) < least < step(counts=count(seven, 512), checkpointing=True).peak()[1].total


@pytest.mark.parametrize("strategy", [DDP, ZERO1, ZERO2, FSDP, ZERO3, OFFLOAD], ids=lambda strategy: strategy.name)
def test_more_devices_need_less_and_more_tokens_more(strategy):
    n = count(GROUPED, 512, "all", LORA)
    totals = [step(counts=n, strategy=strategy, devices=N, tokens=tokens).peak()[1].total for N in (8, 2) for tokens in (512, 1024, 8192)]
    assert totals[:3] == sorted(totals[:3]) and totals[3:] == sorted(totals[3:])
    assert all(eight <= two for eight, two in zip(totals[:3], totals[3:]))


# ----------------------------------------------------------------------------------------------------------------------
# The commands


@pytest.mark.parametrize("flags, names, words", [
    ({"base_quant": "nf4-double"}, {"one device"}, ["python sft.py --init-from path/to/92m --lora-rank 8 --base-quant nf4-double"]),
    ({"base_quant": "nf4", "gpus": 2}, {"DDP", "ZeRO-1", "ZeRO-2"}, ["torchrun --nproc_per_node=2 sft.py"]),
    ({"gpus": 2, "dora": True}, {strategy.name for strategy in bench_memory.STRATEGIES}, ["--dora"]),
    ({"offload_optimizer": True, "lora_targets": ("q_proj=4", "mlp"), "train_also": ("norm", "embed"), "lora_dropout": 0.1},
     {"one device"}, ["--offload-optimizer", "--lora-targets q_proj=4 mlp --lora-dropout 0.1 --train-also norm embed"]),
])  # fmt: skip
def test_the_plan_for_an_adapter_and_its_command(flags, names, words, capsys):
    result = plan(PlanConfig(model="92m", gpu_memory=24, lora_rank=8, **flags))
    best, printed = result["recommended"], capsys.readouterr().out
    assert {row["name"] for row in result["rows"]} == names and all(word in best["command"] for word in words)
    config = parse_config(sft.Config, best["command"].partition("sft.py ")[2].split())
    assert config.micro_batch == best["micro_batch"] and config.lora_rank == 8 and config.batch_size % config.micro_batch == 0
    assert {key: getattr(config, key) for key in flags if key != "gpus"} == {key: value for key, value in flags.items() if key != "gpus"}
    assert "LoRA of rank 8" in printed or "DoRA of rank 8" in printed
    assert "parameters learn\n" in printed and "trained, sequences" not in printed


@pytest.mark.parametrize("flags, message", [
    ({"base_quant": "nf4"}, "--base-quant needs --lora-rank"),
    ({"lora_rank": 8, "train": "embeddings"}, "--lora-rank goes beside --train-also, not --train"),
    ({"lora_rank": 8, "base_quant": "nf4", "fsdp": True}, "packed weights cannot be shared out"),
    ({"lora_rank": 8, "base_quant": "nf4", "offload": True}, "--offload is planned for ZeRO-3"),
    ({"lora_rank": 8, "offload_optimizer": True, "deepspeed": "2"}, "--offload-optimizer is for one device and for DDP"),
])  # fmt: skip
def test_a_mistaken_plan_is_one_line(flags, message):
    found = PlanConfig(gpu_memory=24, **flags).problems()
    assert len(found) == 1 and message in found[0]


def test_an_unknown_target_is_named():
    (said,) = PlanConfig(gpu_memory=24, lora_rank=8, lora_targets=("q",)).problems()
    assert "there is no module 'q'" in said


@pytest.fixture
def here(monkeypatch, tmp_path):
    """Measure in this process, on a model that takes milliseconds. Returns the flags for that."""
    monkeypatch.setattr(bench_turns, "run_worker", lambda command, config, side: json.loads(json.dumps(bench.train_worker(config, side))))
    LlamaConfig(101, 64, 128, 2, 4, 2, max_position_embeddings=64).to_json(tmp_path / "config.json")
    return {"model": str(tmp_path / "config.json"), "micro_batch": 2, "seq_len": 16, "steps": 1, "warmup": 0, "repeats": 1,
            "device": "cpu", "dtype": "fp32"}  # fmt: skip


@pytest.mark.parametrize("more", [{}, {"checkpointing": True, "offload_optimizer": True}, {"s2_attn": True, "dora": True}])
def test_an_adapter_beside_full_fine_tuning(here, more, capsys):
    summary = bench.train(TrainConfig(**here, lora_rank=4, against="full", **more))
    assert summary["lora"]["loss"] == summary["full"]["loss"]  # of the first step: the same weights, and an adapter that adds nothing yet
    assert set(summary["ratio"]) == {"speed", "peak memory"}
    printed = capsys.readouterr().out
    assert "of rank 4, alpha 8" in printed and "lora : full" in printed


def test_a_packed_base_is_nearly_the_same_model(here):
    configs = (TrainConfig(**here, lora_rank=4, base_quant=storage) for storage in ("none", "nf4-double"))
    exact, packed = (bench.train(config)["lora"]["loss"] for config in configs)
    assert 0 < abs(packed - exact) < 0.01 * exact


@pytest.mark.parametrize("flags, message", [
    ({"against": "full"}, "--against full is for an adapter: it needs --lora-rank"),
    ({"lora_rank": 4, "against": "transformers"}, "no counterpart of --lora-rank"),
    ({"lora_rank": 0}, "--lora-rank must be at least 1, not 0"),
    ({"base_quant": "nf4"}, "--base-quant needs --lora-rank"),
])  # fmt: skip
def test_a_mistaken_measurement_is_one_line(here, flags, message):
    found = [problem for problem in TrainConfig(**here, **flags).problems() if "pip install" not in problem]
    assert len(found) == 1 and message in found[0]


# ----------------------------------------------------------------------------------------------------------------------
# The table in docs/scale.md


def large_models() -> list[str]:
    """Its rows: what 7B, 13B and 65B take, and the largest micro-batch on cards of 12 to 80 GiB."""
    rows = []
    for name, title in (("llama2-7b", "7B"), ("llama2-13b", "13B"), ("llama-65b", "65B")):
        n = count(PRESETS[name], 512, "all", QLORA, "nf4-double")
        for offload in (False, True):

            def at(micro_batch: int, n=n, offload=offload) -> bench_memory.Parts:
                return step(counts=n, tokens=512 * micro_batch, checkpointing=True, offload_optimizer=offload).peak()[1]

            one = at(1)
            sizes = [n.packed, 2 * n.frozen, 16 * n.trained if not offload else 8 * n.trained,
                     one.working + one.activations + one.loss, one.overhead, one.total]  # fmt: skip
            largest = [largest_that(lambda rows, card=card, at=at: at(rows).total <= 0.95 * card * GIB, 2**12) for card in (12, 24, 48, 80)]
            where = "host" if offload else "card"
            cells = [title, where, *(f"{size / GIB:.2f}" for size in sizes), *(str(most) if most else "–" for most in largest)]
            rows.append(f"| {' | '.join(cells)} |")
    return rows


def test_the_documented_table_is_that_of_today():
    text = (Path(bench.__file__).parent / "docs" / "scale.md").read_text(encoding="utf-8")
    assert set(large_models()) <= set(text.splitlines())
    commands = re.findall(r"^python bench.py plan (.*lora.*)$", text, re.MULTILINE)
    assert commands
    for words in commands:
        parse_config(PlanConfig, words.split())
