"""How Megatron cuts a model: which tensors of ours make one of theirs, and which part of it each tensor-parallel rank holds.

The table of names and the traps are in megatron.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from config import LlamaConfig

LAYER = (  # Megatron-core's name, the legacy one, ours (after model.layers.N.), how it is cut
    ("input_layernorm.weight", "input_norm.weight", ("input_layernorm.weight",), "copy"),
    ("self_attention.linear_qkv.weight", "self_attention.query_key_value.weight",
     ("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"), "groups"),
    ("self_attention.linear_qkv.bias", "self_attention.query_key_value.bias",
     ("self_attn.q_proj.bias", "self_attn.k_proj.bias", "self_attn.v_proj.bias"), "groups"),
    ("self_attention.linear_proj.weight", "self_attention.dense.weight", ("self_attn.o_proj.weight",), "columns"),
    ("self_attention.linear_proj.bias", "self_attention.dense.bias", ("self_attn.o_proj.bias",), "copy"),
    ("pre_mlp_layernorm.weight", "post_attention_norm.weight", ("post_attention_layernorm.weight",), "copy"),
    ("mlp.linear_fc1.weight", "mlp.dense_h_to_4h.weight", ("mlp.gate_proj.weight", "mlp.up_proj.weight"), "halves"),
    ("mlp.linear_fc1.bias", "mlp.dense_h_to_4h.bias", ("mlp.gate_proj.bias", "mlp.up_proj.bias"), "halves"),
    ("mlp.linear_fc2.weight", "mlp.dense_4h_to_h.weight", ("mlp.down_proj.weight",), "columns"),
    ("mlp.linear_fc2.bias", "mlp.dense_4h_to_h.bias", ("mlp.down_proj.bias",), "copy"),
)  # fmt: skip
EMBEDDING, FINAL_NORM, HEAD = "embedding.word_embeddings.weight", "decoder.final_layernorm.weight", "output_layer.weight"
SPELLINGS = {legacy: mcore for mcore, legacy, _, _ in LAYER} | {
    "input_layernorm.weight": "input_layernorm.weight",  # legacy before 2023, and mcore
    "post_attention_layernorm.weight": "pre_mlp_layernorm.weight",
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",  # transformer-engine fuses each norm with what follows
    "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
}


@dataclass(frozen=True)
class Piece:
    """One tensor of a rank's file: its Megatron-core name, where legacy files have it, the tensors of ours that it holds."""

    mcore: str
    legacy: tuple[str, ...]
    ours: tuple[str, ...]
    how: str  # copy, rows (of the padded vocabulary), columns, groups (of q, k, v), halves (gate, up)

    def keys(self, names: str) -> tuple[str, ...]:
        """The way to it within the file's "model"."""
        return self.legacy if names == "legacy" else (self.mcore,)


def pieces(config: LlamaConfig, layers: range, first: bool, last: bool) -> list[Piece]:
    """What a stage (or virtual stage) with these layers holds, in order. `first` has the embedding, `last` the head."""
    embedding = ("language_model", "embedding", "word_embeddings", "weight")
    found = [Piece(EMBEDDING, embedding, ("model.embed_tokens.weight",), "rows")] * first
    for local, layer in enumerate(layers):
        for mcore, legacy, ours, how in LAYER:
            if mcore.endswith("bias") and not (config.mlp_bias if mcore.startswith("mlp") else config.attention_bias):
                continue
            keys = ("language_model", "encoder", f"layers.{local}.{legacy}")
            found.append(Piece(f"decoder.layers.{local}.{mcore}", keys, tuple(f"model.layers.{layer}.{name}" for name in ours), how))
    if last:
        found.append(Piece(FINAL_NORM, ("language_model", "encoder", "final_norm.weight"), ("model.norm.weight",), "copy"))
        if not config.tie_word_embeddings:
            found.append(Piece(HEAD, ("language_model", "output_layer", "weight"), ("lm_head.weight",), "rows"))
        elif not first:
            found.append(Piece(HEAD, ("word_embeddings_for_head", "weight"), ("model.embed_tokens.weight",), "rows"))
    return found


def shard_shape(piece: Piece, shapes: dict[str, torch.Size], tp: int, padded: int) -> torch.Size:
    """Of each of `tp` ranks. shapes: of our whole tensors; padded: rows of the padded vocabulary."""
    shape = shapes[piece.ours[0]]
    if piece.how == "copy":
        return shape
    if piece.how == "columns":
        return torch.Size((shape[0], shape[1] // tp))
    rows = padded if piece.how == "rows" else sum(shapes[name][0] for name in piece.ours)
    return torch.Size((rows // tp, *shape[1:]))


def cut(piece: Piece, tensors: list[Tensor], config: LlamaConfig, tp: int, padded: int) -> Iterator[Tensor]:
    """The shards of ranks 0 … tp - 1, of our whole tensors (those that `piece` names)."""
    first = tensors[0]
    for rank in range(tp):
        if piece.how == "copy":
            yield first
        elif piece.how == "columns":
            yield first.chunk(tp, dim=1)[rank]
        elif piece.how == "rows":
            mine = first[rank * padded // tp : (rank + 1) * padded // tp]
            lacking = padded // tp - len(mine)
            yield torch.cat((mine, first[-1:].expand(lacking, -1))) if lacking else mine
        elif piece.how == "halves":
            yield torch.cat([tensor.chunk(tp)[rank] for tensor in tensors])
        else:  # [K, rows of a group, …] of q, k and v; this rank's groups of each
            groups = [tensor.unflatten(0, (config.num_key_value_heads, -1)).chunk(tp)[rank] for tensor in tensors]
            yield torch.cat(groups, dim=1).flatten(0, 1)


def parts(piece: Piece, shard: Tensor, config: LlamaConfig, tp: int) -> tuple[Tensor, ...]:
    """The opposite: what a shard holds of each of our tensors, to be put behind what the ranks before it hold."""
    if piece.how == "halves":
        return shard.chunk(2)
    if piece.how == "groups":  # [groups, query heads and key and value, hd, …]
        heads = shard.unflatten(0, (config.num_key_value_heads // tp, -1, config.head_dim))
        return heads[:, :-2].flatten(0, 2), heads[:, -2].flatten(0, 1), heads[:, -1].flatten(0, 1)
    return (shard,)


def indivisible(config: LlamaConfig, tp: int) -> list[str]:
    return [f"tensor parallel {tp} does not divide the {count} {what}" for count, what in (
            (config.num_attention_heads, "attention heads"), (config.num_key_value_heads, "key/value heads"),
            (config.intermediate_size, "rows of gate and up (intermediate_size)")) if count % tp]  # fmt: skip


def padded_vocabulary(vocab_size: int, tp: int, vocab_divisor: int = 1) -> int:
    return -(-vocab_size // (tp * vocab_divisor)) * tp * vocab_divisor


def canonical(name: str) -> str:
    """The Megatron-core name of a tensor: for legacy ones, older ones, and those of models saved inside wrappers."""
    name = re.sub(r"^((module|model)\.)+", "", name).removeprefix("language_model.")
    name = re.sub(r"^(encoder|transformer)\.", "decoder.", name)
    if match := re.fullmatch(r"decoder\.layers\.(\d+)\.(.+)", name):
        rest = re.sub(r"^attention\.", "self_attention.", match[2])
        return f"decoder.layers.{match[1]}.{SPELLINGS.get(rest, rest)}"
    return {"decoder.final_norm.weight": FINAL_NORM, "word_embeddings_for_head.weight": HEAD}.get(name, name)
