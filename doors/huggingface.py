"""Hugging Face directories: what Cria itself reads and writes. config.json, safetensors in one file or shards with their index,
tokenizer files; .bin files are read too. weights.py knows how.
"""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from weights import SHARD_BYTES, Weights, open_weights, write_weights

__all__ = ["open_weights"]
KIND = "Hugging Face"


def recognises(path: Path) -> bool:
    return (path / "config.json").is_file() and any(any(path.glob(f"{stem}*")) for stem in ("model*.safetensors", "pytorch_model*.bin"))


def problems(source: Weights, shard_bytes: int = SHARD_BYTES) -> list[str]:
    return []


def remarks(source: Weights, shard_bytes: int = SHARD_BYTES) -> list[str]:
    return []


def size(source: Weights, shard_bytes: int = SHARD_BYTES) -> int:
    return source.nbytes


def write(source: Weights, out: Path, shard_bytes: int = SHARD_BYTES) -> None:
    write_weights(source, out, shard_bytes)


def expected(source: Weights, name: str, tensor: Tensor, shard_bytes: int = SHARD_BYTES) -> Tensor:
    return tensor
