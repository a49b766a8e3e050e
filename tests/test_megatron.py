"""doors/megatron.py: against a second writer and a tensor-parallel forward pass, both made here from Megatron's description, and
against files saved the way training saves them."""

from __future__ import annotations

from settings import UserError

import argparse
import dataclasses
import enum
import os
import random
import shutil
import signal
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from doors import megatron
from model import Llama, LlamaConfig
from weights import Lazy, Weights, shapes_of

GQA = LlamaConfig(vocab_size=101, hidden_size=48, intermediate_size=40, num_hidden_layers=3, num_attention_heads=8,
                  num_key_value_heads=4, head_dim=8, max_position_embeddings=64, rope_theta=5e5, bos_token_id=7,
                  eos_token_id=[9, 10])  # fmt: skip
MHA = dataclasses.replace(GQA, num_key_value_heads=8, head_dim=6, vocab_size=96)
TIED = dataclasses.replace(GQA, tie_word_embeddings=True)
BIASED = dataclasses.replace(GQA, attention_bias=True, mlp_bias=True)
MODELS = {"gqa": GQA, "mha": MHA, "tied": TIED, "biased": BIASED}


def model(config: LlamaConfig = GQA, dtype: torch.dtype = torch.bfloat16) -> dict[str, torch.Tensor]:
    dice = torch.Generator().manual_seed(len(str(config)))
    return {name: (torch.randn(shape, generator=dice) * 0.3).to(dtype) for name, shape in shapes_of(config).items()}


def source(config: LlamaConfig, tensors: dict[str, torch.Tensor], tokenizer=None) -> Weights:
    lazies = {name: Lazy(tensor.shape, tensor.dtype, tensor.clone) for name, tensor in tensors.items()}
    return Weights(config, lazies, tokenizer)


def write(out: Path, config: LlamaConfig = GQA, **options) -> dict[str, torch.Tensor]:
    tensors = model(config)
    megatron.write(source(config, tensors), out, **options)
    return tensors


def assert_same(weights: Weights, tensors: dict[str, torch.Tensor]) -> None:
    assert list(weights.tensors) == list(tensors)
    for name, lazy in weights.tensors.items():
        read = lazy.read()
        assert (read.shape, read.dtype) == (lazy.shape, lazy.dtype) and torch.equal(read, tensors[name]), name


# ----------------------------------------------------------------------------------------------------------------------
# A second writer, row by row, from the description alone


def by_hand(config: LlamaConfig, tensors: dict[str, torch.Tensor], tp: int, layers: list[int], names: str, divisor: int = 1) -> dict:
    """(rank, stage) -> the "model" of that rank's file."""
    legacy, files = names == "legacy", {}
    H, K, hd, pp = config.num_attention_heads, config.num_key_value_heads, config.head_dim, len(layers)

    def vocabulary(name: str, rank: int) -> torch.Tensor:
        rows = list(tensors[name])
        while len(rows) % (tp * divisor):
            rows.append(rows[-1])
        return torch.stack(rows[rank * len(rows) // tp : (rank + 1) * len(rows) // tp])

    for rank in range(tp):
        layer = 0
        for stage in range(pp):
            flat: dict[str, torch.Tensor] = {}
            for local in range(layers[stage]):
                ours, theirs = f"model.layers.{layer}.", f"layers.{local}."
                flat[theirs + ("input_norm" if legacy else "input_layernorm") + ".weight"] = tensors[ours + "input_layernorm.weight"]
                for kind in ("weight", "bias") if config.attention_bias else ("weight",):
                    q, k, v = (tensors[f"{ours}self_attn.{x}_proj.{kind}"] for x in "qkv")
                    rows = []
                    for group in range(rank * K // tp, (rank + 1) * K // tp):
                        for head in range(group * H // K, (group + 1) * H // K):
                            rows += q[head * hd : (head + 1) * hd]
                        rows += [*k[group * hd : (group + 1) * hd], *v[group * hd : (group + 1) * hd]]
                    flat[f"{theirs}self_attention.{'query_key_value' if legacy else 'linear_qkv'}.{kind}"] = torch.stack(rows)
                dense = f"{theirs}self_attention.{'dense' if legacy else 'linear_proj'}."
                width = H * hd // tp
                flat[dense + "weight"] = tensors[ours + "self_attn.o_proj.weight"][:, rank * width : (rank + 1) * width]
                if config.attention_bias:
                    flat[dense + "bias"] = tensors[ours + "self_attn.o_proj.bias"]
                post = "post_attention_norm" if legacy else "pre_mlp_layernorm"
                flat[f"{theirs}{post}.weight"] = tensors[ours + "post_attention_layernorm.weight"]
                mine = slice(rank * config.intermediate_size // tp, (rank + 1) * config.intermediate_size // tp)
                for kind in ("weight", "bias") if config.mlp_bias else ("weight",):
                    both = [*tensors[f"{ours}mlp.gate_proj.{kind}"][mine], *tensors[f"{ours}mlp.up_proj.{kind}"][mine]]
                    flat[f"{theirs}mlp.{'dense_h_to_4h' if legacy else 'linear_fc1'}.{kind}"] = torch.stack(both)
                down = f"{theirs}mlp.{'dense_4h_to_h' if legacy else 'linear_fc2'}."
                flat[down + "weight"] = tensors[ours + "mlp.down_proj.weight"][:, mine]
                if config.mlp_bias:
                    flat[down + "bias"] = tensors[ours + "mlp.down_proj.bias"]
                layer += 1
            if stage == pp - 1:
                flat["final_norm.weight" if legacy else "final_layernorm.weight"] = tensors["model.norm.weight"]
            embedding = vocabulary("model.embed_tokens.weight", rank)
            head = embedding if config.tie_word_embeddings else vocabulary("lm_head.weight", rank)
            has_head = stage == pp - 1 and not (config.tie_word_embeddings and pp == 1)
            if legacy:
                inner: dict = {"embedding": {"word_embeddings": {"weight": embedding}}} if stage == 0 else {}
                inner["encoder"] = flat
                files[rank, stage] = {"language_model": inner}
                place = files[rank, stage] if config.tie_word_embeddings else inner
                if has_head:
                    place["word_embeddings_for_head" if config.tie_word_embeddings else "output_layer"] = {"weight": head}
            else:
                files[rank, stage] = {"embedding.word_embeddings.weight": embedding} if stage == 0 else {}
                files[rank, stage] |= {f"decoder.{name}": tensor for name, tensor in flat.items()}
                files[rank, stage] |= {"output_layer.weight": head} if has_head else {}
    return files


def llama_arguments(config: LlamaConfig, tp: int, pp: int, **more) -> argparse.Namespace:
    """As training leaves them in its files: among hundreds of others."""
    told = dict(
        num_layers=config.num_hidden_layers, hidden_size=config.hidden_size, ffn_hidden_size=config.intermediate_size,
        num_attention_heads=config.num_attention_heads, group_query_attention=True, num_query_groups=config.num_key_value_heads,
        kv_channels=config.head_dim, norm_epsilon=config.rms_norm_eps, rotary_base=int(config.rope_theta), seq_length=32,
        max_position_embeddings=config.max_position_embeddings, swiglu=True, normalization="RMSNorm", position_embedding_type="rope",
        untie_embeddings_and_output_weights=not config.tie_word_embeddings, tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp, params_dtype=torch.bfloat16, lr=1e-4, data_path=["x"], vocab_size=None, num_experts=None,
    )  # fmt: skip
    return argparse.Namespace(**told | more)


def save_by_hand(folder: Path, files: dict, args, **more) -> Path:
    """As training saves: folder is SAVE/iter_…, or any other."""
    pp = max(stage for _, stage in files) + 1
    for (rank, stage), held in files.items():
        place = folder / (f"mp_rank_{rank:02d}" if pp == 1 else f"mp_rank_{rank:02d}_{stage:03d}")
        place.mkdir(parents=True)
        content = {"args": args, "checkpoint_version": 3.0, "iteration": 1000, "model": held} | more
        torch.save({key: value for key, value in content.items() if value is not None}, place / "model_optim_rng.pt")
    return folder


def load(path: Path) -> dict:
    with torch.serialization.safe_globals([argparse.Namespace]):
        return torch.load(path, weights_only=True)


def flat(node, name: str = "") -> dict[str, torch.Tensor]:
    if isinstance(node, torch.Tensor):
        return {name: node}
    return {key: value for step, below in node.items() for key, value in flat(below, f"{name}/{step}").items()}


@pytest.mark.parametrize("names", ["legacy", "mcore"])
@pytest.mark.parametrize(("kind", "tp", "layers"), [("gqa", 4, [3]), ("mha", 2, [1, 2]), ("tied", 1, [3]), ("tied", 2, [1, 1, 1]),
                                                    ("biased", 2, [2, 1])])  # fmt: skip
def test_files_are_those_of_the_description(kind, tp, layers, names, tmp_path):
    """Names, their order, and every bit; and the same files, with a trained model's arguments, are read."""
    config = MODELS[kind]
    tensors = write(tmp_path / "ours", config, tp=tp, pp=len(layers), layers=tuple(layers), names=names)
    files = by_hand(config, tensors, tp, layers, names)
    for (rank, stage), held in files.items():
        folder = f"mp_rank_{rank:02d}" if len(layers) == 1 else f"mp_rank_{rank:02d}_{stage:03d}"
        ours, theirs = flat(load(tmp_path / "ours" / "iter_0000001" / folder / "model_optim_rng.pt")["model"]), flat(held)
        assert list(ours) == list(theirs)
        assert all(ours[name].dtype == theirs[name].dtype and torch.equal(ours[name], theirs[name]) for name in theirs)
    assert sum(1 for _ in (tmp_path / "ours").rglob("*.pt")) == len(files)
    save_by_hand(tmp_path / "theirs", files, llama_arguments(config, tp, len(layers)))
    read = megatron.open_weights(tmp_path / "theirs", vocab_size=config.vocab_size)
    assert_same(read, tensors)
    assert read.config == dataclasses.replace(config, bos_token_id=1, eos_token_id=2)  # which Megatron does not keep
    assert read.facts["names"] == names and read.facts["layers by stage"] == ", ".join(map(str, layers))


# ----------------------------------------------------------------------------------------------------------------------
# There and back


@pytest.mark.parametrize(("kind", "options"), [
    ("gqa", dict()), ("gqa", dict(tp=4, vocab_divisor=8)), ("gqa", dict(tp=2, pp=3, names="mcore")),
    ("mha", dict(tp=8, pp=3)), ("mha", dict(tp=2, pp=2, layers=(1, 2), names="mcore")), ("tied", dict(tp=4, pp=3)),
    ("tied", dict(tp=2, names="mcore")), ("biased", dict(tp=4, pp=2, layers=(2, 1))),
])  # fmt: skip
def test_round_trip(kind, options, tmp_path):
    tensors = write(tmp_path / "out", MODELS[kind], **options)
    assert megatron.recognises(tmp_path / "out") and megatron.recognises(tmp_path / "out" / "iter_0000001")
    read = megatron.open_weights(tmp_path / "out")
    assert read.config == MODELS[kind]
    assert_same(read, tensors)
    assert all("padding" in remark for remark in read.odd)
    real = sum(path.stat().st_size for path in tmp_path.rglob("*.pt"))
    assert real <= megatron.size(source(MODELS[kind], tensors), **options) < 2 * real  # tiny tensors: mostly headers


def test_virtual_stages_take_turns(tmp_path):
    config = dataclasses.replace(TIED, num_hidden_layers=8)
    tensors = write(tmp_path / "out", config, tp=2, pp=2, vpp=2, names="legacy")
    one = load(tmp_path / "out" / "iter_0000001" / "mp_rank_00_001" / "model_optim_rng.pt")
    norms = [one[f"model{turn}"]["language_model"]["encoder"][f"layers.{local}.input_norm.weight"] for turn in (0, 1) for local in (0, 1)]
    assert all(torch.equal(norm, tensors[f"model.layers.{layer}.input_layernorm.weight"]) for norm, layer in zip(norms, (2, 3, 6, 7)))
    assert one["args"].num_layers_per_virtual_pipeline_stage == 2 and "word_embeddings_for_head" in one["model1"]
    read = megatron.open_weights(tmp_path / "out")
    assert_same(read, tensors)
    assert read.facts["virtual stages"] == "2"


def test_any_layout_to_any_other(tmp_path):
    """Converting again and again gives what converting once gives: every file the same."""
    tensors = write(tmp_path / "0", TIED, tp=4, pp=3)
    ways = [dict(tp=1, pp=2, layers=(2, 1), names="mcore"), dict(tp=2, pp=3, vocab_divisor=16), dict(tp=4)]
    for number, options in enumerate(ways):
        megatron.write(megatron.open_weights(tmp_path / str(number)), tmp_path / str(number + 1), **options)
    write(tmp_path / "at once", TIED, **ways[-1])
    for path in (tmp_path / "at once").rglob("*.pt"):
        assert path.read_bytes() == (tmp_path / "3" / path.relative_to(tmp_path / "at once")).read_bytes()
    assert_same(megatron.open_weights(tmp_path / "3"), tensors)


def test_each_tensor_is_read_once(tmp_path, monkeypatch):
    """Writing reads each of ours once, and reading in the order of the model reads each shard once, fused ones too."""
    tensors, count = model(GQA), []
    lazies = {name: Lazy(tensor.shape, tensor.dtype, lambda name=name: (count.append(name), tensors[name])[1])
              for name, tensor in tensors.items()}  # fmt: skip
    megatron.write(Weights(GQA, lazies), tmp_path / "out", tp=2, pp=3)
    assert sorted(count) == sorted(tensors)
    shards = []
    original = megatron.TorchFile.reader
    monkeypatch.setattr(megatron.TorchFile, "reader", lambda self, *keys: (
        lambda: (shards.append((self.path, keys)), original(self, *keys)())[1]))  # fmt: skip
    read = megatron.open_weights(tmp_path / "out")
    assert not shards  # only headers so far
    for lazy in read.tensors.values():
        lazy.read().fill_(7)  # one's own memory: it changes nothing for the next
    assert len(shards) == len(set(shards)) == 2 * (3 * 6 + 3)
    assert_same(read, tensors)


def test_tokenizer_beside(tmp_path, ours):
    config = dataclasses.replace(GQA, vocab_size=len(ours) + 3)
    megatron.write(source(config, model(config), ours), tmp_path / "out", tp=4)
    read = megatron.open_weights(tmp_path / "out" / "iter_0000001")
    assert read.tokenizer.fingerprint == ours.fingerprint and read.config.vocab_size == len(ours) + 3


# ----------------------------------------------------------------------------------------------------------------------
# What Megatron computes from these files


def parallel_logits(config: LlamaConfig, files: dict, tp: int, pp: int, tokens: torch.Tensor) -> torch.Tensor:
    """Megatron's forward pass: each rank with its own shards; sums where the ranks of a stage talk (all-reduce)."""
    H, K, hd = config.num_attention_heads // tp, config.num_key_value_heads // tp, config.head_dim  # of one rank
    angles = torch.outer(torch.arange(tokens.shape[1]).float(), config.rope_theta ** (-torch.arange(0, hd, 2).float() / hd))
    cos, sin = torch.cat((angles, angles), -1).cos(), torch.cat((angles, angles), -1).sin()

    def rotate(x: torch.Tensor) -> torch.Tensor:  # [B, heads, T, hd], in halves
        one, two = x.chunk(2, dim=-1)
        return x * cos + torch.cat((-two, one), dim=-1) * sin

    def norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return x / (x.pow(2).mean(-1, keepdim=True) + config.rms_norm_eps).sqrt() * weight

    def embed(weight: torch.Tensor, rank: int) -> torch.Tensor:  # a rank knows its own tokens; others' rows are 0
        local = tokens - rank * len(weight)
        known = (local >= 0) & (local < len(weight))
        return F.embedding(local.where(known, 0), weight) * known[..., None]

    x = sum(embed(files[rank, 0]["language_model"]["embedding"]["word_embeddings"]["weight"], rank) for rank in range(tp))
    B, T, _ = x.shape
    for stage in range(pp):
        held = [files[rank, stage]["language_model"]["encoder"] for rank in range(tp)]
        for layer in range(sum(name.endswith("input_norm.weight") for name in held[0])):
            at, after = f"layers.{layer}.", []
            for rank in range(tp):
                y = norm(x, held[rank][at + "input_norm.weight"]) @ held[rank][at + "self_attention.query_key_value.weight"].T
                mixed = y.view(B, T, K, H // K + 2, hd)
                q = mixed[:, :, :, : H // K].reshape(B, T, H, hd).transpose(1, 2)
                k, v = (mixed[:, :, :, H // K + i].repeat_interleave(H // K, dim=2).transpose(1, 2) for i in (0, 1))
                y = F.scaled_dot_product_attention(rotate(q), rotate(k), v, is_causal=True).transpose(1, 2).reshape(B, T, -1)
                after.append(y @ held[rank][at + "self_attention.dense.weight"].T)
            x, after = x + sum(after), []
            for rank in range(tp):
                y = norm(x, held[rank][at + "post_attention_norm.weight"]) @ held[rank][at + "mlp.dense_h_to_4h.weight"].T
                gate, up = y.chunk(2, dim=-1)
                after.append((F.silu(gate) * up) @ held[rank][at + "mlp.dense_4h_to_h.weight"].T)
            x = x + sum(after)
    x = norm(x, held[0]["final_norm.weight"])
    last = [files[rank, pp - 1] for rank in range(tp)]
    heads = [file.get("word_embeddings_for_head") or file["language_model"]["output_layer"] for file in last]
    return torch.cat([x @ head["weight"].T for head in heads], dim=-1)


@pytest.mark.parametrize(("kind", "tp", "layers"), [("gqa", 4, (3,)), ("mha", 2, (1, 2)), ("tied", 2, (2, 1))])
def test_tensor_parallel_forward_gives_our_logits(kind, tp, layers, tmp_path):
    config = MODELS[kind]
    tensors = model(config, torch.float32)
    megatron.write(source(config, tensors), tmp_path / "out", tp=tp, pp=len(layers), layers=layers)
    files = {}
    for path in (tmp_path / "out").rglob("*.pt"):
        rank, *stage = map(int, path.parent.name.removeprefix("mp_rank_").split("_"))
        files[rank, stage[0] if stage else 0] = load(path)["model"]
    tokens = torch.randint(config.vocab_size, (2, 9), generator=torch.Generator().manual_seed(1))
    ours = Llama(config)
    ours.load_state_dict(tensors, strict=not config.tie_word_embeddings)
    with torch.no_grad():
        wanted, got = ours(tokens), parallel_logits(config, files, tp, len(layers), tokens)
    padding = got.shape[-1] - config.vocab_size
    assert padding == -config.vocab_size % tp
    torch.testing.assert_close(got[..., : config.vocab_size], wanted, rtol=1e-4, atol=1e-4)
    assert torch.equal(got[..., config.vocab_size :], got[..., config.vocab_size - 1, None].expand(*got.shape[:2], padding))


# ----------------------------------------------------------------------------------------------------------------------
# Known shapes of real models, without their weights

LLAMA2_7B = LlamaConfig(32000, 4096, 11008, 32, 32, 32, max_position_embeddings=4096)
LLAMA3_8B = LlamaConfig(128256, 4096, 14336, 32, 32, 8, max_position_embeddings=8192, rope_theta=5e5)
LLAMA2_70B = LlamaConfig(32000, 8192, 28672, 80, 64, 8, max_position_embeddings=4096)


def shapes(config: LlamaConfig, stage: int = 0, **options) -> dict[str, tuple]:
    """Of one rank's file of a stage."""
    whole = shapes_of(config)
    weights = Weights(config, {name: Lazy(shape, torch.bfloat16, None) for name, shape in whole.items()})
    assert megatron.problems(weights, **options) == []
    told = dict(tp=1, pp=1, layers=None, names="legacy", vocab_divisor=1, vpp=None) | options
    args = megatron.arguments(weights, **told)
    held = megatron.stages(config, told["pp"], told["layers"])[stage]
    content = megatron.skeleton(held, args, whole, dict.fromkeys(whole, torch.bfloat16), told["names"])
    return {name.rpartition("/")[2] if "encoder" in name else name: tuple(tensor.shape) for name, tensor in flat(content["model"]).items()}


def test_golden_shapes():
    """Llama-2-7B at TP 8 (ModelLink's own unit test), Llama-3-8B at TP 8, 70B at TP 8 and PP 8."""
    found = shapes(LLAMA2_7B, tp=8)
    layer = "layers.31."
    assert found["/language_model/embedding/word_embeddings/weight"] == found["/language_model/output_layer/weight"] == (4000, 4096)
    assert found[layer + "self_attention.query_key_value.weight"] == (1536, 4096)
    assert found[layer + "self_attention.dense.weight"] == (4096, 512)
    assert found[layer + "mlp.dense_h_to_4h.weight"] == (2752, 4096) and found[layer + "mlp.dense_4h_to_h.weight"] == (4096, 1376)
    assert shapes(LLAMA3_8B, tp=8, names="mcore")["/decoder.layers.0.self_attention.linear_qkv.weight"] == (768, 4096)
    middle = shapes(LLAMA2_70B, stage=4, tp=8, pp=8)
    assert len([name for name in middle if name.endswith("query_key_value.weight")]) == 10
    assert middle["layers.9.self_attention.query_key_value.weight"] == ((8 + 1 + 1) * 128, 8192)  # one key/value head
    assert not any("embedding" in name or "output_layer" in name or "final" in name for name in middle)


def test_layer_list_of_the_recipes():
    config = dataclasses.replace(LLAMA2_7B, vocab_size=32001)
    found = [shapes(config, stage=stage, pp=4, layers=(6, 8, 8, 10)) for stage in range(4)]
    assert [sum(name.endswith("input_norm.weight") for name in stage) for stage in found] == [6, 8, 8, 10]
    assert shapes(config, tp=8)["/language_model/output_layer/weight"] == (4001, 4096)
    assert shapes(config, tp=8, vocab_divisor=128)["/language_model/output_layer/weight"] == (4096, 4096)  # a multiple of 8 x 128 in all


def test_arguments_are_those_that_megatron_compares(tmp_path):
    write(tmp_path / "out", GQA, tp=2, pp=3, layers=(1, 1, 1))
    assert (tmp_path / "out" / "latest_checkpointed_iteration.txt").read_text() == "1"
    content = load(tmp_path / "out" / "iter_0000001" / "mp_rank_01_002" / "model_optim_rng.pt")
    args = vars(content["args"])
    assert (content["checkpoint_version"], content["iteration"]) == (3.0, 1)
    wanted = dict(num_layers=3, hidden_size=48, num_attention_heads=8, add_position_embedding=True, max_position_embeddings=64,
                  tensor_model_parallel_size=2, pipeline_model_parallel_size=3, padded_vocab_size=102, vocab_size=101,
                  make_vocab_size_divisible_by=1, tokenizer_type="Llama2Tokenizer", group_query_attention=True, num_query_groups=4,
                  kv_channels=8, rotary_base=500000, params_dtype=torch.bfloat16, bf16=True, fp16=False, num_layer_list="1,1,1",
                  disable_bias_linear=True, untie_embeddings_and_output_weights=True, swiglu=True, normalization="RMSNorm")  # fmt: skip
    assert {name: args[name] for name in wanted} == wanted


# ----------------------------------------------------------------------------------------------------------------------
# Files as training leaves them


class ModelType(enum.Enum):
    encoder_or_decoder = 1


@pytest.fixture
def enums(monkeypatch):
    """A module of that name exists while files are made, and not while they are read."""
    module = types.ModuleType("megatron.core.enums")
    monkeypatch.setattr(ModelType, "__module__", module.__name__)
    module.ModelType = ModelType
    with monkeypatch.context() as patch:
        for name in ("megatron", "megatron.core", "megatron.core.enums"):
            patch.setitem(sys.modules, name, module if name.endswith("enums") else types.ModuleType(name))
        yield patch


def test_objects_of_megatron_are_not_needed(enums, tmp_path):
    """Arguments with enums, transformer-engine's names and extra states, and an optimizer: read where no Megatron is installed."""
    tensors = model(TIED)
    files = by_hand(TIED, tensors, 2, [1, 2], "mcore")
    for held in files.values():
        for name in list(held):
            held[name.replace("input_layernorm.weight", "self_attention.linear_qkv.layer_norm_weight")
                 .replace("pre_mlp_layernorm.weight", "mlp.linear_fc1.layer_norm_weight")] = held.pop(name)  # fmt: skip
        held["decoder.layers.0.self_attention.linear_qkv._extra_state"] = torch.zeros(3, dtype=torch.uint8)
        held["decoder.layers.0.self_attention.linear_proj._extra_state"] = None
        held["decoder.layers.0.self_attention.rotary_emb.inv_freq"] = torch.zeros(4)
    args = llama_arguments(TIED, 2, 2, model_type=ModelType.encoder_or_decoder, extra=types.SimpleNamespace(a=1), vocab_size=101)
    optimizer = {"fp32": [torch.zeros(4)], "param_scheduler": {"lr": 1e-4, "kind": ModelType.encoder_or_decoder}}
    save_by_hand(tmp_path / "save" / "release", files, args, optimizer=optimizer)
    (tmp_path / "save" / "latest_checkpointed_iteration.txt").write_text("release\n")
    enums.undo()
    assert "megatron.core.enums" not in sys.modules
    read = megatron.open_weights(tmp_path / "save")
    assert_same(read, tensors)
    assert any(remark == "left out: optimizer" for remark in read.odd)


def test_states_of_random_numbers_are_left_out(tmp_path):
    """Training stores numpy's among them, as arrays."""
    tensors = model(GQA)
    states = [{"np_rng_state": np.random.get_state(), "random_rng_state": random.getstate(), "torch_rng_state": torch.get_rng_state(),
               "rng_tracker_states": {"model-parallel-rng": torch.get_rng_state()}}]  # fmt: skip
    save_by_hand(tmp_path / "a", by_hand(GQA, tensors, 2, [3], "mcore"), llama_arguments(GQA, 2, 1, exit_signal=signal.SIGTERM),
                 rng_state=states)  # fmt: skip
    read = megatron.open_weights(tmp_path / "a", vocab_size=101)
    assert_same(read, tensors)
    assert "left out: rng_state" in read.odd


def test_names_of_older_megatrons(tmp_path):
    tensors, older = model(GQA), {"input_norm": "input_layernorm", "post_attention_norm": "post_attention_layernorm",
                                  "final_norm": "final_layernorm", "self_attention": "attention"}  # fmt: skip
    files = by_hand(GQA, tensors, 2, [3], "legacy")
    for held in files.values():
        encoder = held["language_model"].pop("encoder")
        for new, old in older.items():
            encoder = {name.replace(new, old): tensor for name, tensor in encoder.items()}
        held["language_model"]["transformer"] = encoder
    save_by_hand(tmp_path / "a", files, llama_arguments(GQA, 2, 1))
    assert_same(megatron.open_weights(tmp_path / "a", vocab_size=101), tensors)
    files = by_hand(GQA, tensors, 2, [3], "mcore")
    wrapped = {place: {f"module.{name}": tensor for name, tensor in held.items()} for place, held in files.items()}
    save_by_hand(tmp_path / "b", wrapped, llama_arguments(GQA, 2, 1), checkpoint_version=None)
    read = megatron.open_weights(tmp_path / "b", vocab_size=101)
    assert_same(read, tensors)
    assert "no checkpoint_version in the files: 3.0 is assumed" in read.odd


def test_biases_of_q_k_v_alone(tmp_path):
    """Megatron's add_qkv_bias: ours have one on the output projection too, so it is zero."""
    config = dataclasses.replace(GQA, attention_bias=True)
    tensors = {name: torch.zeros_like(tensor) if name.endswith("o_proj.bias") else tensor for name, tensor in model(config).items()}
    files = by_hand(config, tensors, 2, [3], "mcore")
    for held in files.values():
        for name in [name for name in held if name.endswith("linear_proj.bias")]:
            del held[name]
    save_by_hand(tmp_path / "a", files, llama_arguments(config, 2, 1, add_qkv_bias=True))
    read = megatron.open_weights(tmp_path / "a", vocab_size=101)
    assert_same(read, tensors)
    assert any("3 output projections have no bias" in remark for remark in read.odd)


def test_true_vocabulary(tmp_path, ours):
    """The option, then the config, then the arguments, then the tokenizer; else all rows, and a remark."""
    tensors = model(GQA)
    files = by_hand(GQA, tensors, 4, [3], "mcore")  # 104 rows

    def rows(name: str, argument=None, **options) -> tuple[int, list[str]]:
        if not (tmp_path / name).exists():
            save_by_hand(tmp_path / name, files, llama_arguments(GQA, 4, 1, vocab_size=argument))
        read = megatron.open_weights(tmp_path / name, **options)
        assert read.tensors["lm_head.weight"].read().shape[0] == read.config.vocab_size
        return read.config.vocab_size, [remark for remark in read.odd if "padding" in remark]

    assert rows("a", 102) == (102, ["2 of 104 rows of the embedding are padding (vocab_size of the arguments says 102): left out"])
    assert rows("a", 102, vocab_size=90)[0] == 90
    assert rows("a", 102, vocab_size=90, config=GQA)[0] == 90
    assert rows("a", 102, config=GQA)[0] == 101
    count, remarks = rows("b")
    assert count == 104 and "nothing tells how many of the 104 rows" in remarks[0]
    with pytest.raises(UserError, match="the tokenizer says 700 tokens, and the embedding has 104 rows"):
        rows("b", tokenizer=ours)
    with pytest.raises(UserError, match=r"--vocab-size says 105 tokens, and the embedding has 104 rows \(26 on each of 4 ranks\)"):
        rows("a", 102, vocab_size=105)


def test_what_arguments_lack_comes_from_shapes_and_config(tmp_path):
    tensors = model(TIED)
    files = by_hand(TIED, tensors, 2, [1, 2], "legacy")
    args = argparse.Namespace(num_attention_heads=8, kv_channels=8, seq_length=64)
    save_by_hand(tmp_path / "little", files, args)
    read = megatron.open_weights(tmp_path / "little", vocab_size=101)
    assert read.config == dataclasses.replace(TIED, bos_token_id=1, eos_token_id=2, rope_theta=1e4)
    assert [remark.partition(":")[0] for remark in read.odd] == [
        "1 of 102 rows of the embedding are padding (--vocab-size says 101)", "the arguments do not tell norm_epsilon",
        "the arguments do not tell rotary_base"]  # fmt: skip
    save_by_hand(tmp_path / "none", files, None)
    with pytest.raises(UserError, match="holds no arguments that tell the number of heads; give the model's config"):
        megatron.open_weights(tmp_path / "none")
    read = megatron.open_weights(tmp_path / "none", config=TIED)
    assert read.config == TIED
    assert_same(read, tensors)


def test_given_config_counts_before_a_converters_rotary_base(tmp_path):
    """ModelLink's converter leaves 10,000 there, whatever the model's is."""
    tensors = model(GQA)
    save_by_hand(tmp_path / "a", by_hand(GQA, tensors, 1, [3], "mcore"), llama_arguments(GQA, 1, 1, rotary_base=10000))
    assert megatron.open_weights(tmp_path / "a").config.rope_theta == 1e4
    read = megatron.open_weights(tmp_path / "a", config=GQA)
    assert read.config == GQA and "the arguments say rotary_base 10000, the config 500000, which counts" in read.odd


ROPES = {
    "llama 3.1": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                  "original_max_position_embeddings": 8192},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "beta_fast": 32, "beta_slow": 1, "original_max_position_embeddings": 16},
    "yarn, mscale": {"rope_type": "yarn", "factor": 4.0, "beta_fast": 16, "beta_slow": 2, "mscale": 0.7, "mscale_all_dim": 1.2,
                     "original_max_position_embeddings": 16},
}  # fmt: skip


@pytest.mark.parametrize("kind", ROPES)
def test_rope_scaling_through_arguments(kind):
    config = dataclasses.replace(GQA, rope_scaling=ROPES[kind])
    weights = source(config, model(config))
    assert megatron.problems(weights) == []
    args = vars(megatron.arguments(weights, 1, 1, None, "mcore", 1, None))
    assert megatron.rope_scaling(args) == ROPES[kind]
    if kind == "llama 3.1":  # Megatron-LM's own way to say it, without ModelLink's arguments
        assert args["use_rope_scaling"]
        assert megatron.rope_scaling({"use_rope_scaling": True, "rope_scaling_factor": 8.0}) == ROPES[kind]


def test_differing_copies(tmp_path):
    tensors = model(TIED)
    files = by_hand(TIED, tensors, 2, [1, 2], "legacy")
    for stage in (0, 1):
        encoder = files[1, stage]["language_model"]["encoder"]
        encoder["layers.0.input_norm.weight"] = encoder["layers.0.input_norm.weight"] + 1
    save_by_hand(tmp_path / "norms", files, llama_arguments(TIED, 2, 2, vocab_size=101))
    read = megatron.open_weights(tmp_path / "norms")
    assert_same(read, tensors)
    assert [remark for remark in read.odd if "ranks" in remark] == [
        "ranks differ in model.layers.0.input_layernorm.weight and 1 more, which all should have alike: rank 0's is taken"]
    files[1, 1]["word_embeddings_for_head"] = {"weight": files[1, 1]["word_embeddings_for_head"]["weight"].clone()}
    files[1, 1]["word_embeddings_for_head"]["weight"][0, 0] += 1
    save_by_hand(tmp_path / "heads", files, llama_arguments(TIED, 2, 2, vocab_size=101))
    read = megatron.open_weights(tmp_path / "heads")
    with pytest.raises(UserError, match=r"differ \(tensor-parallel rank 1\): the model is not tied"):
        read.tensors["model.embed_tokens.weight"].read()
    untied = megatron.open_weights(tmp_path / "heads", config=dataclasses.replace(TIED, tie_word_embeddings=False))
    assert not torch.equal(untied.tensors["lm_head.weight"].read(), tensors["model.embed_tokens.weight"])


# ----------------------------------------------------------------------------------------------------------------------
# What cannot be


def test_problems_are_named_at_once():
    config = dataclasses.replace(GQA, mlp_bias=True, rope_scaling={"rope_type": "dynamic", "factor": 2.0})
    tensors = model(config)
    tensors["model.layers.1.self_attn.k_proj.weight"] = tensors["model.layers.1.self_attn.k_proj.weight"].float()
    found = megatron.problems(source(config, tensors), tp=16, pp=2)
    for number, text in enumerate(("16 does not divide the 8 attention heads", "16 does not divide the 4 key/value heads",
                                   "16 does not divide the 40 rows", "--pp 2 does not divide the 3 layers; name the stages: --layers 2,1",
                                   "add_qkv_bias", "dynamic NTK", "different dtypes")):  # fmt: skip
        assert text in found[number]
    assert len(found) == 7

    def one(**options) -> str:
        (problem,) = megatron.problems(source(GQA, model(GQA)), **options)
        return problem

    assert one(pp=3, layers=(1, 1)) == ("--layers 1,1 is 2 stages and 2 layers; --pp is 3 and the model has 3 layers, at least 1 for each "
                                        "stage")  # fmt: skip
    assert "at least 1" in one(pp=3, layers=(0, 1, 2)) and "more stages than the 3 layers" in one(pp=5)
    assert "exclude each other" in one(pp=3, layers=(1, 1, 1), vpp=1) and "--vpp 2 needs" in one(pp=3, vpp=2)
    assert "--tp must be at least 1, not 0" in one(tp=0) and "legacy or mcore" in one(names="deepspeed")
    yarn = dataclasses.replace(GQA, rope_scaling=ROPES["yarn"] | {"attention_factor": 1.0})
    assert "attention_factor 1.0" in megatron.problems(source(yarn, model(yarn)))[0]
    linear = dataclasses.replace(GQA, rope_scaling={"rope_type": "linear", "factor": 1.5})
    assert "linear RoPE scaling by 1.5" in megatron.problems(source(linear, model(linear)))[0]
    with pytest.raises(UserError, match="--pp 2 does not divide the 3 layers"):
        megatron.write(source(GQA, model(GQA)), Path("nowhere"), pp=2)
    assert not Path("nowhere").exists()


def refusal(path: Path, **options) -> str:
    with pytest.raises(UserError) as caught:
        megatron.open_weights(path, **options)
    return str(caught.value)


def test_missing_and_damaged_files(tmp_path):
    write(tmp_path / "a", GQA, tp=4, pp=3)
    folder = tmp_path / "a" / "iter_0000001"
    file = folder / "mp_rank_03_001" / "model_optim_rng.pt"
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    assert str(file) in refusal(tmp_path / "a") and "truncated" in refusal(tmp_path / "a")
    file.unlink()
    assert "(tensor parallel 4, pipeline parallel 3) lacks mp_rank_03_001/model_optim_rng.pt" in refusal(tmp_path / "a")
    file.write_bytes(whole)
    for stage in range(3):  # the folders alone would pass for three ranks
        (folder / f"mp_rank_03_{stage:03d}").rename(tmp_path / f"away{stage}")
    assert "tensor parallel 4, pipeline parallel 3) lacks mp_rank_03_000/model_optim_rng.pt, mp_rank_03_001/" in refusal(tmp_path / "a")
    (folder / "mp_rank_00").mkdir()
    assert "two checkpoints in one place" in refusal(tmp_path / "a")


def test_wrong_places(tmp_path):
    assert not megatron.recognises(tmp_path / "missing") and not megatron.recognises(Path(__file__))
    assert "is no Megatron checkpoint: it has no latest_checkpointed_iteration.txt and no mp_rank_*" in refusal(tmp_path / "missing")
    save, tracker = tmp_path / "a", tmp_path / "a" / "latest_checkpointed_iteration.txt"
    write(save, GQA)
    tracker.unlink()
    assert "it holds iter_0000001: name one of these" in refusal(save)
    tracker.write_text("2")
    assert "iter_0000002 does not exist, although" in refusal(save)
    tracker.write_text("soon")
    assert "says 'soon'; it should say 'release' or the number" in refusal(save)
    (save / "iter_0000003").mkdir()
    tracker.write_text("3")
    assert "iter_0000003 holds no mp_rank_* folders" in refusal(save)
    (save / "iter_0000003" / "__0_0.distcp").touch()
    assert "torch's distributed format" in refusal(save)
    (save / "iter_0000003" / "mp_rank_00_000_001").mkdir()
    assert "a model with experts" in refusal(save)


def test_shapes_that_contradict(tmp_path):
    tensors = model(GQA)
    files = by_hand(GQA, tensors, 2, [3], "mcore")
    save_by_hand(tmp_path / "arguments", files, llama_arguments(GQA, 2, 1, ffn_hidden_size=48, vocab_size=101))
    text = refusal(tmp_path / "arguments")
    assert "mp_rank_00/model_optim_rng.pt: decoder.layers.0.mlp.linear_fc1.weight is (40, 48) and should be (48, 48)" in text
    assert "decoder.layers.0.mlp.linear_fc2.weight is (48, 20) and should be (48, 24)" in text and "7 more" in text
    assert "should be (40, 48)" not in text
    changed = {place: dict(held) for place, held in files.items()}
    changed[1, 0]["decoder.layers.2.mlp.linear_fc2.weight"] = torch.zeros(48, 21).bfloat16()
    changed[1, 0]["decoder.layers.1.mlp.linear_fc2.weight"] = torch.zeros(48, 20)
    changed[1, 0]["decoder.layers.0.mlp.router.weight"] = changed[1, 0].pop("decoder.final_layernorm.weight")
    save_by_hand(tmp_path / "ranks", changed, llama_arguments(GQA, 2, 1, vocab_size=101))
    text, where = refusal(tmp_path / "ranks"), "mp_rank_01/model_optim_rng.pt"
    for part in (f"{where}: decoder.layers.2.mlp.linear_fc2.weight is (48, 21) and should be (48, 20)",
                 f"{where}: decoder.layers.1.mlp.linear_fc2.weight is torch.float32, and torch.bfloat16 on rank 0",
                 f"{where} lacks decoder.final_layernorm.weight", f"{where} holds decoder.layers.0.mlp.router.weight"):  # fmt: skip
        assert part in text
    assert "mp_rank_00" not in text
    save_by_hand(tmp_path / "layers", files, llama_arguments(GQA, 2, 1, num_layers=4, vocab_size=101))
    assert "holds 3 layers (3 by stage); there should be 4, says num_layers of the arguments" in refusal(tmp_path / "layers")
    del changed[0, 0]
    changed[0, 0] = {name: tensor for name, tensor in files[0, 0].items() if "layers.1." not in name}
    save_by_hand(tmp_path / "gap", changed, llama_arguments(GQA, 2, 1))
    assert "lacks layer 1 of its stage" in refusal(tmp_path / "gap")
    save_by_hand(tmp_path / "heads", files, llama_arguments(GQA, 2, 1, num_attention_heads=3, num_query_groups=3, kv_channels=16))
    text = refusal(tmp_path / "heads", vocab_size=101)
    assert "tensor parallel 2 does not divide the 3 attention heads" in text and "2 does not divide the 3 key/value heads" in text


def test_other_models_are_refused_by_their_arguments(tmp_path):
    files = by_hand(GQA, model(GQA), 1, [3], "mcore")
    strange = llama_arguments(GQA, 1, 1, normalization="LayerNorm", num_experts=8, rotary_percent=0.5, swiglu=False,
                              position_embedding_type="learned_absolute", rope_scaling_type="longrope")  # fmt: skip
    save_by_hand(tmp_path / "a", files, strange)
    for part in ("normalization 'LayerNorm'", "num_experts 8", "rotary_percent 0.5", "swiglu False", "learned_absolute", "longrope"):
        assert part in refusal(tmp_path / "a")
    save_by_hand(tmp_path / "b", files, llama_arguments(GQA, 1, 1), checkpoint_version=1.0)
    assert "has checkpoint_version 1.0; 2.0 and later are read" in refusal(tmp_path / "b")
    save_by_hand(tmp_path / "c", files, llama_arguments(GQA, 1, 1, hidden_size="48"))
    assert "among the arguments, hidden_size '48' is no number" in refusal(tmp_path / "c")
    save_by_hand(tmp_path / "d", {(0, 0): None}, llama_arguments(GQA, 1, 1))
    assert 'has no "model", where Megatron keeps the weights' in refusal(tmp_path / "d")
    for name, args in (("e", 5), ("f", [1]), ("g", "x")):
        save_by_hand(tmp_path / name, files, args)
        assert "holds no arguments that tell the number of heads" in refusal(tmp_path / name)
    save_by_hand(tmp_path / "h", files, llama_arguments(GQA, 1, 1, tensor_model_parallel_size=2.5), checkpoint_version="3.0")
    assert "lacks mp_rank_01" in refusal(tmp_path / "h")
    save_by_hand(tmp_path / "i", files, llama_arguments(GQA, 1, 1), checkpoint_version="3.0")
    assert "has checkpoint_version '3.0'; 2.0 and later are read" in refusal(tmp_path / "i")
    save_by_hand(tmp_path / "j", {(0, 0): {**files[0, 0], 7: torch.zeros(2)}}, llama_arguments(GQA, 1, 1))
    assert_same(megatron.open_weights(tmp_path / "j", vocab_size=101), model(GQA))


class Evil:
    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call[0], self.call[1:]


@pytest.mark.parametrize("where", ["arguments", "model", "beside"])
@pytest.mark.parametrize("call", [(shutil.copyfile, __file__, "executed"), (os.mkdir, "executed")])
def test_code_is_never_run(where, call, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    files = by_hand(GQA, model(GQA), 1, [3], "mcore")
    args = llama_arguments(GQA, 1, 1, **({"lr": Evil(*call)} if where == "arguments" else {}))
    if where == "model":
        files[0, 0]["decoder.layers.0.self_attention._extra_state"] = Evil(*call)
    save_by_hand(tmp_path / "a", files, args, **({"rng_state": Evil(*call)} if where == "beside" else {}))
    text = refusal(tmp_path / "a")
    assert "mp_rank_00/model_optim_rng.pt" in text and "never run" in text
    assert call[0] is os.mkdir or "shutil.copyfile" in text
    assert not (tmp_path / "executed").exists()
