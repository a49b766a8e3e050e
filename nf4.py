"""NF4: four bits per weight, with the sixteen levels where normally distributed weights need them (QLoRA, arXiv:2305.14314).

    quantise     weight -> codes of 4 bits, one scale per block of 64
    dequantise   back to a matrix; what every forward and backward of a quantised layer calls

A trained layer's weights look like draws from a normal distribution. Divided by the largest of their block they fill [-1, 1], and
the levels are quantiles of the normal distribution: each code is used about equally often, and 0, -1 and 1 are levels. The scale
of a block is its largest absolute value in float32: half a bit per weight. Double quantisation stores the scales themselves in
8 bits, in blocks of 256 around their mean: 0.127 bits.

Results and layout are those of bitsandbytes, so its checkpoints can be read and written.
"""

from __future__ import annotations

from settings import UserError

import functools
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 64  # weights that share a scale
NESTED_BLOCK = 256  # scales that share a scale of their own

# The levels, as bitsandbytes has them. Quantiles of the normal distribution at 8 even steps above and 7 below the middle, from
# 1 - 0.9677083 on (the mean of 1 - 1/30 and 1 - 1/32), and 0 between them, divided by the largest. Equation 4 of the paper
# describes them a little differently and gives other numbers.
CODEBOOK = torch.tensor([-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
                         -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
                         0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
                         0.7229568362236023, 1.0])  # fmt: skip


def _dynamic_map() -> Tensor:
    """The signed 8-bit numbers with an exponent of varying length (arXiv:1511.04561): 2^e even steps in each of the decades
    10^(e-6), e = 0 … 6, of both signs; 0 and 1. Float32 [256], rising."""
    decades = []
    for exponent in range(7):
        edges = torch.linspace(0.1, 1, 2**exponent + 1)
        decades.append(10.0 ** (exponent - 6) * (edges[:-1] + edges[1:]) / 2)
    positive = torch.cat(decades)
    return torch.cat([positive, -positive, torch.tensor([0.0, 1.0])]).sort().values


DYNAMIC = _dynamic_map()
STATE = "quant_state.bitsandbytes__"  # of the tensor that tells, in JSON, how a weight was quantised; its type follows


@dataclass(frozen=True)
class Packed:
    """A quantised matrix [out, in], n = out · in. Plain tensors, for a layer to keep as buffers; see packed_shapes().

    codes          uint8 [ceil(n / 2)]: two codes a byte in row-major order, the first in the high half
    scales         float32 [blocks], blocks = ceil(n / 64); uint8 [blocks] with double quantisation, and then
    nested_scales  float32 [ceil(blocks / 256)]
    offset         float32 []
    """

    codes: Tensor
    scales: Tensor
    shape: torch.Size
    nested_scales: Tensor | None = None
    offset: Tensor | None = None

    def tensors(self) -> dict[str, Tensor]:
        """The tensors by name, as many as there are: Packed(shape=shape, **tensors) is the way back."""
        return {name: getattr(self, name) for name in packed_shapes(self.shape, self.offset is not None)}

    def to(self, device) -> Packed:
        return Packed(shape=self.shape, **{name: tensor.to(device) for name, tensor in self.tensors().items()})


def packed_shapes(shape: torch.Size, double: bool) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """Name -> (shape, dtype) of the tensors of a Packed."""
    n = math.prod(shape)
    blocks = -(-n // BLOCK)
    shapes = {"codes": (torch.Size([-(-n // 2)]), torch.uint8), "scales": (torch.Size([blocks]), torch.uint8 if double else torch.float32)}
    if double:
        shapes |= {"nested_scales": (torch.Size([-(-blocks // NESTED_BLOCK)]), torch.float32), "offset": (torch.Size([]), torch.float32)}
    return shapes


def bits_per_parameter(double: bool) -> float:
    """4.5, or 4.127 with double quantisation."""
    return 4 + (8 + 32 / NESTED_BLOCK if double else 32) / BLOCK


# ----------------------------------------------------------------------------------------------------------------------
# Both directions work on slices: what they need beside the result is a few MB, which on a CPU stay in the cache


def _slice(device: torch.device) -> int:
    """Weights at a time: a multiple of BLOCK. Measured on a CPU; a GPU wants few and large kernels."""
    return 2**19 if device.type == "cpu" else 2**23


@torch.no_grad()
def quantise(weight: Tensor, double: bool) -> Packed:
    """weight [out, in] of any floating dtype -> the code nearest to each value. UserError if one is NaN or infinite in float32."""
    flat, step = weight.reshape(-1), _slice(weight.device)
    packed = {name: torch.empty(shape, dtype=dtype, device=weight.device)
              for name, (shape, dtype) in packed_shapes(weight.shape, double=False).items()}  # fmt: skip
    for start in range(0, len(flat), step):
        codes, scales = _nearest(flat[start : start + step].float(), CODEBOOK, BLOCK)
        pairs, stored = codes[0::2] << 4 | codes[1::2], packed["codes"][start // 2 : (start + step) // 2]
        stored.copy_(pairs[: len(stored)])
        packed["scales"][start // BLOCK : (start + step) // BLOCK] = scales
    if not packed["scales"].isfinite().all():
        raise UserError("weight holds values that are not finite")
    if double:
        scales = packed["scales"]
        offset = scales.mean()
        codes, nested_scales = _nearest(scales - offset, DYNAMIC, NESTED_BLOCK)
        packed |= {"scales": codes[: len(scales)].to(torch.uint8), "nested_scales": nested_scales, "offset": offset}
    return Packed(shape=weight.shape, **packed)


def _nearest(values: Tensor, levels: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """values float32 [n] -> (number of the level nearest to value / scale, int32 [n, and on to the end of the block];
    scale of each block, its largest absolute value)."""
    if len(values) % block:
        values = F.pad(values, (0, -len(values) % block))
    values = values.view(-1, block)
    scales = values.abs().amax(1)
    # Times the reciprocal, as bitsandbytes has it: a quotient is rounded otherwise, and one value in ten million, half-way between
    # two levels, would get the other one (it does divide a last block that is not full). A block of zeros has no reciprocal.
    scaled = values * scales.clamp(min=torch.finfo(torch.float32).tiny).reciprocal()[:, None]
    middles = ((levels[:-1] + levels[1:]) / 2).to(values.device)
    return torch.bucketize(scaled, middles, out_int32=True).view(-1), scales


def dequantise(packed: Packed, dtype: torch.dtype) -> Tensor:
    """The matrix [out, in]: level · scale in float32, rounded to `dtype`."""
    return dequantise_into(torch.empty(packed.shape, dtype=dtype, device=packed.codes.device), packed)


def dequantise_into(out: Tensor, packed: Packed) -> Tensor:
    """The same into `out`, contiguous, of the matrix's shape. On a CPU touching fresh memory takes twice as long as the rest."""
    flat, codes, n = out.view(-1), packed.codes, out.numel()
    pairs, dynamic = _tables(codes.device)
    scales = packed.scales
    if packed.offset is not None:
        nested = packed.nested_scales.repeat_interleave(NESTED_BLOCK)[: len(scales)]
        scales = dynamic.index_select(0, scales.int()) * nested + packed.offset
    whole, step = n - n % BLOCK, _slice(codes.device)
    for start in range(0, whole, step):
        stop = min(start + step, whole)
        levels = pairs.index_select(0, codes[start // 2 : stop // 2].int()).view(torch.float32)
        torch.mul(levels.view(-1, BLOCK), scales[start // BLOCK : stop // BLOCK, None], out=flat[start:stop].view(-1, BLOCK))
    if whole < n:  # the last block is not full
        flat[whole:] = pairs.index_select(0, codes[whole // 2 :].int()).view(torch.float32)[: n - whole] * scales[-1]
    return out


@functools.cache
def _tables(device: torch.device) -> tuple[Tensor, Tensor]:
    """(both levels of each byte: [256], two float32 in the 8 bytes of an int64, for one look-up to find both; DYNAMIC)."""
    pairs = torch.stack([CODEBOOK.repeat_interleave(16), CODEBOOK.repeat(16)], dim=1).view(torch.int64).view(-1)
    return pairs.to(device), DYNAMIC.to(device)


# ----------------------------------------------------------------------------------------------------------------------
# The layout of bitsandbytes, in checkpoints of Hugging Face


def to_bitsandbytes(name: str, packed: Packed, dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors that stand for the weight `name` (`….q_proj.weight`). dtype: what readers are to compute in."""
    state = {"quant_type": "nf4", "blocksize": BLOCK, "dtype": str(dtype).removeprefix("torch."), "shape": list(packed.shape)}
    tensors = {name: packed.codes[:, None], f"{name}.absmax": packed.scales, f"{name}.quant_map": CODEBOOK.clone()}
    if packed.offset is not None:
        state |= {"nested_blocksize": NESTED_BLOCK, "nested_dtype": "float32", "nested_offset": packed.offset.item()}
        tensors |= {f"{name}.nested_absmax": packed.nested_scales, f"{name}.nested_quant_map": DYNAMIC.clone()}
    tensors[f"{name}.{STATE}nf4"] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    return tensors


def read_state(name: str, text: Tensor) -> dict:
    """What the tensor uint8 [n] that goes with the weight `name` says: blocksize, shape, dtype …"""
    try:
        return json.loads(bytes(text.tolist()))
    except (ValueError, TypeError):
        raise damaged(name) from None


def damaged(name: str) -> UserError:
    return UserError(f"{name}.{STATE}nf4 is damaged; copy or download the checkpoint again")


def from_bitsandbytes(name: str, tensors: Mapping[str, Tensor]) -> Packed:
    """The weight `name`, its parts among `tensors`. UserError, naming the tensor, if a part is missing or damaged, or if it is
    quantised in another way than `quantise` does."""

    def part(suffix: str) -> Tensor:
        if name + suffix not in tensors:
            raise UserError(f"{name}{suffix} is missing, a part of the 4-bit weight {name}; copy or download the checkpoint again")
        return tensors[name + suffix]

    if f"{name}.{STATE}fp4" in tensors:
        raise UserError(f"{name} is quantised to fp4; of the 4-bit types of bitsandbytes only nf4 can be read")
    state = read_state(name, part(f".{STATE}nf4"))
    try:
        shape, double = torch.Size(state["shape"]), "nested_offset" in state
        blocks = {"blocksize": state["blocksize"]} | ({"nested_blocksize": state["nested_blocksize"]} if double else {})
        tables = {".quant_map": CODEBOOK}
        # Trainers that shard weights have the codes stored as numbers of a wider type (bnb_4bit_quant_storage).
        found = {"codes": part("").reshape(-1).view(torch.uint8), "scales": part(".absmax")}
        if double:
            tables[".nested_quant_map"] = DYNAMIC
            found |= {"nested_scales": part(".nested_absmax"), "offset": torch.tensor(float(state["nested_offset"]))}
    except (ValueError, TypeError, KeyError):
        raise damaged(name) from None
    for key, size in blocks.items():
        if size != (wanted := BLOCK if key == "blocksize" else NESTED_BLOCK):
            raise UserError(f"{name} is quantised with a {key} of {size}; only {wanted} can be read")
    for suffix, table in tables.items():
        values = part(suffix)
        if values.shape != table.shape or not torch.allclose(values.cpu().float(), table, rtol=0, atol=1e-6):
            raise UserError(f"{name}{suffix} is not the table of nf4; such a weight cannot be read")
    for key, (size, dtype) in packed_shapes(shape, double).items():
        if (found[key].shape, found[key].dtype) != (size, dtype):
            suffix = {"codes": "", "scales": ".absmax", "nested_scales": ".nested_absmax"}[key]
            raise UserError(f"{name}{suffix} is {tuple(found[key].shape)} {found[key].dtype}, and of a weight of {tuple(shape)} it "
                            f"should be {tuple(size)} {dtype}; copy or download the checkpoint again")  # fmt: skip
    return Packed(shape=shape, **found)
