"""Layers for large models on small cards: drop-in replacements for nn.Linear and nn.Embedding. Storage and forward only.

    LoRA            one adapter of one layer: two thin matrices that learn beside a frozen one; with DoRA also its rows' lengths
    Linear          nn.Linear that carries adapters
    NF4Linear       the same, its weight in 4 bits (QLoRA)        Int8Linear      … in 8 bits
    Embedding       nn.Embedding that carries adapters            EmbeddingLoRA   an adapter of it

A layer carries its adapters in a list: each adds to what those before it made. The parameters of the first are called
adapters.0.lora_A.weight and so on, PEFT's names but for the `adapters.0.` (adapters.py has the files).
"""

from __future__ import annotations

from settings import UserError

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import nf4
from loss import matmul_dtype

# ----------------------------------------------------------------------------------------------------------------------
# Adapters


def merged(weight: Tensor, A: Tensor, B: Tensor, scale: float, magnitude: Tensor | None = None) -> Tensor:
    """The one weight that does what a frozen one and its adapter do together, [out, in] float32.

    weight [out, in]; A [r, in], B [out, r]: W + scale · B A (LoRA, 2106.09685 §4.1). With magnitude [out], DoRA (2402.09353 §4):
    every row of that is given this length. No gradient flows through the length that it had (§4.3).
    """
    with torch.autocast(weight.device.type, enabled=False):
        weight = weight.float() + scale * (B.float() @ A.float())
        if magnitude is None:
            return weight
        return weight * (magnitude.float() / row_lengths(weight))[:, None]


def row_lengths(weight: Tensor) -> Tensor:
    """The Euclidean length of every row, [out] float32, without gradient: what DoRA's magnitudes begin as."""
    return torch.linalg.vector_norm(weight.detach().float(), dim=1)


class LoRA(nn.Module):
    """y = y₀ + scale · dropout(x) Aᵀ Bᵀ, where y₀ = x Wᵀ is what the frozen layer gives. With DoRA, y · m / |rows of W + scale · B A|.

    lora_A.weight [r, in], lora_B.weight [out, r], lora_magnitude_vector [out]. They get their first values from adapters.py: B is 0
    and m what the rows measure, so that training begins with the frozen model exactly.

    Where PEFT drops out a part of DoRA's input it computes x Wᵀ once more from what is left; here y₀ is as it is. Without
    dropout, which is always so outside of training, both are the same.
    """

    def __init__(self, in_features: int, out_features: int, rank: int, scale: float, dropout: float = 0.0, dora: bool = False):
        super().__init__()
        self.scale = scale
        self.lora_A = nn.Linear(in_features, rank, bias=False)
        self.lora_B = nn.Linear(rank, out_features, bias=False)
        self.lora_magnitude_vector = nn.Parameter(torch.ones(out_features)) if dora else None
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, y: Tensor, layer: Linear) -> Tensor:
        """x [..., in]; y [..., out]: what `layer` and the adapters before this one make of it, its bias included."""
        y = y + self.scale * self.lora_B(self.lora_A(self.dropout(x)))
        if self.lora_magnitude_vector is None:
            return y
        with torch.no_grad():
            lengths = row_lengths(merged(layer.dense(before=self), self.lora_A.weight, self.lora_B.weight, self.scale))
        product = y if layer.bias is None else y - layer.bias
        # Written as what is added to y, so that a factor of 1 leaves every bit of it.
        return (y + (self.lora_magnitude_vector / lengths - 1) * product).to(y.dtype)

    def merged(self, weight: Tensor) -> Tensor:
        return merged(weight, self.lora_A.weight, self.lora_B.weight, self.scale, self.lora_magnitude_vector)


class EmbeddingLoRA(nn.Module):
    """x = x₀ + scale · Aᵀ[token] Bᵀ. lora_embedding_A [r, V] begins as 0, lora_embedding_B [D, r] at random: the reverse of LoRA's."""

    def __init__(self, vocab_size: int, hidden_size: int, rank: int, scale: float):
        super().__init__()
        self.scale = scale
        self.lora_embedding_A = nn.Parameter(torch.zeros(rank, vocab_size))
        self.lora_embedding_B = nn.Parameter(torch.zeros(hidden_size, rank))

    def forward(self, tokens: Tensor, x: Tensor) -> Tensor:
        return x + self.scale * F.linear(F.embedding(tokens, self.lora_embedding_A.T), self.lora_embedding_B)


# ----------------------------------------------------------------------------------------------------------------------
# Layers that carry them


class Linear(nn.Linear):
    """y = x Wᵀ + b, and what the adapters add. The layers below store W in another way."""

    def __init__(self, in_features: int, out_features: int, bias: bool = False):
        super().__init__(in_features, out_features, bias)
        self.adapters = nn.ModuleList()

    def forward(self, x: Tensor) -> Tensor:
        y = self.frozen(x)
        for adapter in self.adapters:
            y = adapter(x, y, self)
        return y

    def frozen(self, x: Tensor) -> Tensor:
        """x [..., in] -> x Wᵀ + b [..., out] in the dtype of the matrix products."""
        return F.linear(x, self.weight, self.bias)

    def stored(self, dtype: torch.dtype) -> Tensor:
        """W [out, in] as the layer has it."""
        return self.weight.to(dtype)

    def dense(self, before: LoRA | None = None) -> Tensor:
        """W [out, in] float32 with the adapters merged into it: all, or those before a certain one."""
        weight = self.stored(torch.float32)
        for adapter in self.adapters:
            if adapter is before:
                break
            weight = adapter.merged(weight)
        return weight


class PackedLinear(Linear):
    """A Linear whose weight is frozen and stored in fewer bits. It has no parameter `weight`: store() takes one.

    The codes are buffers, and numbers beside them are kept as integers of the same bits: .bfloat16() and its like, which trainers
    call on whole models, then leave them alone. Subclasses say what the buffers are, how W goes in and how it comes out.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = False):
        super().__init__(in_features, out_features, bias)
        del self.weight
        for name, (shape, dtype) in self.layout().items():
            self.register_buffer(name, torch.empty(shape, dtype=torch.int32 if dtype == torch.float32 else dtype))

    def layout(self) -> dict[str, tuple[torch.Size, torch.dtype]]:
        """Name, shape and dtype of what W is packed into."""
        raise NotImplementedError

    def pack(self, weight: Tensor) -> dict[str, Tensor]:
        raise NotImplementedError

    def unpack(self, parts: dict[str, Tensor], dtype: torch.dtype) -> Tensor:
        raise NotImplementedError

    def store(self, weight: Tensor | nf4.Packed, name: str) -> None:
        """Take over W [out, in], rounded, or as it is if it is packed already. Raises UserError with its name if it holds values that
        are not finite."""
        try:
            self.put(weight.tensors() if isinstance(weight, nf4.Packed) else self.pack(weight.detach()))
        except UserError as error:
            raise UserError(f"{name}: {error}") from None

    def put(self, parts: dict[str, Tensor]) -> None:
        """Take over what pack() gave, or what lay packed in a file."""
        assert parts.keys() == self.layout().keys(), "packed in another way than this layer has it"
        for name, part in parts.items():
            buffer = getattr(self, name)
            buffer.copy_(part.view(torch.int32) if part.dtype == torch.float32 else part)

    def stored(self, dtype: torch.dtype) -> Tensor:
        parts = {name: getattr(self, name).view(kind) for name, (_, kind) in self.layout().items()}
        return self.unpack(parts, dtype)

    def frozen(self, x: Tensor) -> Tensor:
        y = _PackedProduct.apply(x.to(matmul_dtype(x)), self)
        return y if self.bias is None else y + self.bias.to(y.dtype)


class _PackedProduct(torch.autograd.Function):
    """x Wᵀ. W is unpacked for the product, once more for the gradient of x, and never kept; it has no gradient itself."""

    @staticmethod
    def forward(ctx, x, layer):
        ctx.layer = layer
        return F.linear(x, layer.stored(x.dtype))

    @staticmethod
    def backward(ctx, grad):
        return grad @ ctx.layer.stored(grad.dtype), None


class NF4Linear(PackedLinear):
    """W in 4-bit NormalFloat, 4.5 bits per weight (QLoRA, 2305.14314 §3)."""

    DOUBLE = False

    def layout(self):
        return nf4.packed_shapes(torch.Size((self.out_features, self.in_features)), self.DOUBLE)

    def pack(self, weight):
        return nf4.quantise(weight, self.DOUBLE).tensors()

    def unpack(self, parts, dtype):
        return nf4.dequantise(nf4.Packed(shape=torch.Size((self.out_features, self.in_features)), **parts), dtype)


class DoubleNF4Linear(NF4Linear):
    """The same with its scales quantised too, 4.127 bits per weight."""

    DOUBLE = True


class Int8Linear(PackedLinear):
    """W in 8-bit integers with one scale per row, 8 bits and a little: w ≈ code · scale, |code| <= 127."""

    def layout(self):
        return {"codes": (torch.Size((self.out_features, self.in_features)), torch.int8),
                "scales": (torch.Size((self.out_features,)), torch.float32)}  # fmt: skip

    def pack(self, weight):
        weight = weight.float()
        scales = weight.abs().amax(1) / 127
        if not scales.isfinite().all():
            raise UserError("weight holds values that are not finite")
        codes = weight / torch.where(scales > 0, scales, 1)[:, None]
        return {"codes": codes.round_().clamp_(-127, 127).to(torch.int8), "scales": scales}

    def unpack(self, parts, dtype):
        return (parts["codes"] * parts["scales"][:, None]).to(dtype)


STORAGES = {"none": Linear, "int8": Int8Linear, "nf4": NF4Linear, "nf4-double": DoubleNF4Linear}


class Embedding(nn.Embedding):
    """nn.Embedding, and what the adapters add."""

    def __init__(self, num_embeddings: int, embedding_dim: int):
        super().__init__(num_embeddings, embedding_dim)
        self.adapters = nn.ModuleList()

    def forward(self, tokens: Tensor) -> Tensor:
        x = super().forward(tokens)
        for adapter in self.adapters:
            x = adapter(tokens, x)
        return x


def carrier(layer: nn.Module) -> Linear | Embedding:
    """An nn.Linear or nn.Embedding as a layer that carries adapters, with the same parameters; any that does already."""
    if isinstance(layer, (Linear, Embedding)):
        return layer
    with torch.device("meta"):
        new = (Linear(layer.in_features, layer.out_features) if isinstance(layer, nn.Linear) else
               Embedding(layer.num_embeddings, layer.embedding_dim))  # fmt: skip
    for name, parameter in layer.named_parameters():
        new.register_parameter(name, parameter)
    return new


def pack(model: nn.Module, storage: str) -> nn.Module:
    """Replace every nn.Linear but the head by a layer that stores its weight so (a key of STORAGES); values come later."""
    for name, layer in list(model.named_modules()):
        if type(layer) is nn.Linear and name != "lm_head" and storage != "none":
            model.set_submodule(name, STORAGES[storage](layer.in_features, layer.out_features, layer.bias is not None))
    return model


def packed_layers(model: nn.Module) -> dict[str, PackedLinear]:
    """Name of the weight that it stands for -> layer, of every packed layer in a model."""
    return {f"{name}.weight": layer for name, layer in model.named_modules() if isinstance(layer, PackedLinear)}
