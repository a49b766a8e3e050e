"""Merging: a model's weights and the adapters trained beside them made one, tensor by tensor, and what that changes and loses.

    merging     the tensors of the merged model, computed in float32 as they are read
    Change      how far the weights moved, how much of it the adapters learned, and how much the written dtype rounds away

Adapters change weights by little: by a per cent of their size, say. bf16 tells apart what differs by some tenths of a per cent, so
that much of the change can be lost where the weights themselves look well kept. Hence both are measured.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from adapter_files import Adapter, merge
from adapters import GROUPS
from layers import STORAGES
from weights import SCAN, Lazy, narrowed


class Change(NamedTuple):
    """What merging did to a weight, in squared lengths, which add up."""

    given: float  # the weight as it lies in its file
    packing: float  # what --base-quant changed in it
    base: float  # the weight that the adapters were trained beside
    learning: float  # what they changed
    rounding: float  # what the dtype that it is written in changed

    @classmethod
    def between(cls, given: Tensor, base: Tensor, merged: Tensor, written: Tensor) -> Change:
        """All of one shape, and but for the last in float32."""
        pieces = zip(*(tensor.reshape(-1).split(SCAN) for tensor in (given, base, merged, written)))
        squares = [[torch.dot(x, x).item() for x in (g, b - g, b, m - b, w.float() - m)] for g, b, m, w in pieces]
        return cls(*map(sum, zip(*squares)))


def share(changes: Iterable[Change], part: str, whole: str) -> float:
    """How long one kind of change is beside another, over several weights."""
    parts, wholes = zip(*((getattr(change, part), getattr(change, whole)) for change in changes))
    return math.sqrt(sum(parts) / sum(wholes)) if sum(wholes) else 0.0


def merging(tensors: dict[str, Lazy], adapters: Sequence[Adapter], storage: str, dtype: torch.dtype | None,
            changes: dict[str, Change]) -> dict[str, Lazy]:  # fmt: skip
    """A model's tensors with adapters merged into them in float32, then cast to `dtype` (None: their own). `storage`: how projections
    were kept when the adapters were trained; they are rounded so first. What reading a tensor changed in it goes to `changes`."""

    def read(name: str, lazy: Lazy, dtype: torch.dtype) -> Tensor:
        given = lazy.to(torch.float32).read()
        base = given if storage == "none" or not is_projection(name) else repacked(name, given, storage)
        merged = merge({name: Lazy(lazy.shape, torch.float32, lambda: base)}, adapters)[name].read()
        cast = narrowed(name, merged, dtype)
        if name not in changes:  # it is read once more to be compared
            changes[name] = Change.between(given, base, merged, cast)
        return cast

    touched = {name for name in tensors if any(adapter.touches(name) for adapter in adapters)}
    touched |= {name for name in tensors if storage != "none" and is_projection(name)}
    return {name: Lazy(lazy.shape, dtype or lazy.dtype, partial(read, name, lazy, dtype or lazy.dtype)) if name in touched else lazy
            for name, lazy in tensors.items()}  # fmt: skip


def is_projection(name: str) -> bool:
    """Whether a weight is among those that --base-quant packs."""
    return name.endswith(tuple(f".{module}.weight" for module in GROUPS["all"]))


def repacked(name: str, weight: Tensor, storage: str) -> Tensor:
    """What a layer that keeps its weight so makes of it, float32."""
    with torch.device("meta"):
        layer = STORAGES[storage](weight.shape[1], weight.shape[0])
    layer.to_empty(device="cpu").store(weight, name)
    return layer.stored(torch.float32)
