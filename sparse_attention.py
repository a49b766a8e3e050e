"""LongLoRA's shifted sparse attention (S²-Attn, 2309.12307 §3.2), for fine-tuning on texts longer than a model has read.

In training, a token looks back only within its group of g tokens. The second half of the heads has its borders shifted by
g/2, so that what was read passes from group to group, layer by layer:

    first half      |- - - - - - - -|- - - - - - - -|- - - - - - - -|- - - - - - - -|
    second half     |- - - -|- - - - - - - -|- - - - - - - -|- - - - - - - -|- - - -|

The authors' code rolls the sequence instead, which puts its last g/2 tokens and its first ones into one group; under a plain
causal mask the first then see the last: the future. Here each end is a group of its own, and nothing is rolled.

The weights stay those of a model with full attention, which evaluation and generation use.
"""

from __future__ import annotations

from settings import UserError

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from config import LlamaConfig


def check_groups(llama: LlamaConfig, seq_len: int) -> int:
    """The group size for `--s2-attn`: a quarter of the sequence, as in the paper.

    Raises UserError where the sequence has no four groups of even size, or the heads have no two halves.
    """
    if llama.num_attention_heads % 2:
        raise UserError(f"--s2-attn shifts half of the attention heads, and this model has {llama.num_attention_heads}; train without it")
    if seq_len % 8 or seq_len < 8:
        below = seq_len // 8 * 8
        lengths = f"{below} or {below + 8}" if below else "8"
        raise UserError(f"--s2-attn cuts a sequence into four groups and shifts them by half a group: --seq-len {seq_len} is not "
                        f"a multiple of 8; take {lengths}")  # fmt: skip
    return seq_len // 4


class Groups(NamedTuple):
    """How one batch is cut; made once, used by every layer."""

    size: int
    masks: list[Tensor] | list[None]  # for each part of `cut`, bool [B · groups, 1, size, size]; None: plain causal attention

    @classmethod
    def of(cls, T: int, size: int, heads: int, doc_ids: Tensor | None) -> Groups:
        """doc_ids [B, T]: a token sees only its own document. Raises UserError where groups of `size` do not fit T or the heads."""
        if size < 2 or size % 2 or T % size or heads % 2:
            raise UserError(f"shifted sparse attention cannot cut {T} tokens and {heads} heads into groups of {size}: it takes whole "
                            "groups of even size, and halves of the heads")  # fmt: skip
        if doc_ids is None:
            return cls(size, [None, None, None])
        parts = cut(doc_ids[:, None].expand(-1, 2, -1), size)  # as if each half of the heads were one
        return cls(size, [(part[..., :, None] == part[..., None, :]).tril() for part in parts])


def cut(x: Tensor, size: int) -> list[Tensor]:
    """x [B, heads, T, …] -> three parts, each [B · groups, heads / 2, tokens of a group, …]: the groups of the first heads,
    the shifted groups of the second, and the two half groups at the ends of the second."""
    first, second = x.chunk(2, dim=1)
    half = size // 2
    ends = torch.cat((second[:, :, :half], second[:, :, -half:]), dim=2)
    return [part.unflatten(2, (-1, length)).transpose(1, 2).flatten(0, 1)
            for part, length in ((first, size), (second[:, :, half:-half], size), (ends, half))]  # fmt: skip


def shifted_sparse_attention(q: Tensor, k: Tensor, v: Tensor, groups: Groups, dropout: float) -> Tensor:
    """q [B, H, T, hd], k, v [B, K, T, hd], rotated by their true positions -> [B, H, T, hd]: T · g scores, not T²."""
    if k.shape[1] < q.shape[1]:  # the border between the halves may part heads that share a key
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    parts = []
    for q_part, k_part, v_part, mask in zip(*(cut(x, groups.size) for x in (q, k, v)), groups.masks):
        y = q_part  # when all is one group, its shifted part is empty, which not every kernel takes
        if len(y):
            y = F.scaled_dot_product_attention(q_part, k_part, v_part, attn_mask=mask, is_causal=mask is None, dropout_p=dropout)
        parts.append(y.unflatten(0, (len(q), -1)).transpose(1, 2).flatten(2, 3))  # [B, H / 2, tokens, hd]
    first, middle, ends = parts
    start, end = ends.chunk(2, dim=2)
    return torch.cat((first, torch.cat((start, middle, end), dim=2)), dim=1)
