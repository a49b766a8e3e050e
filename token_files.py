"""Token files: the format between data_process.py, which writes it, and the trainers, which read it.

A token directory holds `train.bin` and `val.bin` (little-endian token ids, nothing else: each document is
[bos +] ids + eos), `meta.json`, a report of what became of every record, and a copy of the tokenizer. `open_tokens` reads
and checks it.
"""

from __future__ import annotations

from settings import UserError, read_json

import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from files import file_sha256

FORMAT = "cria-tokens-1"
SPLITS = ("train", "val")

def token_dtype(vocab_size: int) -> np.dtype:
    """The smallest of uint16 and uint32 (little-endian on disk, whatever the machine) that holds every id."""
    return np.dtype("<u2") if vocab_size <= 1 << 16 else np.dtype("<u4")


def pack_ids(ids: list[int], vocab_size: int) -> np.ndarray:
    """Ids -> the array that goes to disk. Raises ValueError for an id outside the vocabulary: it is never written."""
    wide = np.fromiter(ids, dtype=np.int32, count=len(ids))
    if wide.size and not 0 <= wide.min() <= wide.max() < vocab_size:
        bad = wide[(wide < 0) | (wide >= vocab_size)][0]
        raise ValueError(f"the tokenizer made the id {bad}, outside its vocabulary of {vocab_size}")
    return wide.astype(token_dtype(vocab_size))


@dataclass(frozen=True)
class Tokens:
    """One split of a token directory, mapped into memory read-only, or a bare uint16 file."""

    path: Path  # the .bin file
    split: str
    tokens: np.memmap  # [N] token ids
    meta: dict  # meta.json; for a bare file only {"dtype": "uint16"}

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def max_id(self) -> int:
        """The largest id in the file: from meta.json, or by reading through a bare file."""
        if "splits" in self.meta:
            return self.meta["splits"][self.split]["max_id"]
        step = 1 << 24
        return max(int(self.tokens[at : at + step].max()) for at in range(0, len(self.tokens), step))

    def check_model(self, tokenizer_fingerprint: str | None, vocab_size: int) -> None:
        """Raise UserError if these ids belong to another tokenizer or do not fit the model's vocabulary.

        A bare file does not say which tokenizer made it; then only the ids can be checked. None skips the comparison.
        """
        made_by = self.meta.get("tokenizer_sha256")
        if tokenizer_fingerprint and made_by and made_by != tokenizer_fingerprint:
            raise UserError(
                f"{self.path.parent} was made with another tokenizer (sha256 {made_by[:12]}…) than this one "
                f"({tokenizer_fingerprint[:12]}…): use that tokenizer, or prepare the data again with this one"
            )
        if self.max_id >= vocab_size:
            raise UserError(
                f"{self.path} holds the id {self.max_id}, but the model's vocabulary has only {vocab_size} entries: "
                "the data was made with another tokenizer"
            )

    def verify(self) -> None:
        """Read the whole file and compare its checksum: UserError if a byte has changed. A bare file has none."""
        expected = self.meta.get("splits", {}).get(self.split, {}).get("sha256")
        if expected and file_sha256(self.path) != expected:
            raise UserError(f"{self.path} is damaged: its sha256 is not the one in meta.json; prepare the data again")


def open_tokens(path: str | Path, split: str = "train") -> Tokens | None:
    """Open a split of a token directory, or a bare uint16 .bin file as Baby-Llama2-Chinese writes them.

    None if the data has no validation split (a bare file, or made with --val-fraction 0). Raises UserError if the
    directory is missing, of another kind, or shorter than meta.json says.
    """
    path = Path(path)
    if path.is_file() and path.stem in SPLITS and (path.parent / "meta.json").is_file():
        path, split = path.parent, path.stem
    if path.is_file():
        return _open_bare(path) if split == "train" else None
    if not (path / "meta.json").is_file():
        raise UserError(
            f"{path} " + ("holds no meta.json, so no token data" if path.is_dir() else "does not exist")
            + f"; make it: python data_process.py pretrain --corpus NAME=PATH --tokenizer DIR --out {path}"
        )
    meta = read_json(path / "meta.json")
    if meta.get("format") != FORMAT:
        raise UserError(f"{path / 'meta.json'}: the format is {meta.get('format')!r}, not {FORMAT!r} (token data)")
    if split not in meta["splits"]:
        return None
    file, dtype = path / f"{split}.bin", np.dtype(meta["dtype"]).newbyteorder("<")
    size = file.stat().st_size if file.is_file() else 0
    expected = meta["splits"][split]["tokens"] * dtype.itemsize
    if size != expected:
        raise UserError(
            f"{file} has {size:,} bytes, but meta.json says {expected:,}: it is cut off or does not belong here; "
            "prepare the data again"
        )
    return Tokens(file, split, np.memmap(file, dtype=dtype, mode="r"), meta)


def _open_bare(path: Path) -> Tokens:
    size = path.stat().st_size
    if size == 0 or size % 2:
        raise UserError(f"{path} has {size:,} bytes; a bare token file holds two per id, and at least one id")
    return Tokens(path, "train", np.memmap(path, dtype="<u2", mode="r"), {"dtype": "uint16"})


# ----------------------------------------------------------------------------------------------------------------------
# Prepared data and its settings: the same command again, or another one


def refuse_other_settings(where: Path, old: dict, new: dict) -> None:
    """Raise UserError that names every setting in which `where` differs from what is asked for now."""
    old, new = _flat(old), _flat(new)
    changed = [f"{key} was {old.get(key, 'absent')}, is {new.get(key, 'absent')}"
               for key in sorted(old.keys() | new.keys()) if old.get(key) != new.get(key)]
    if changed:
        changes = "; ".join(changed)
        raise UserError(f"{where} was made with other settings ({changes}): choose another --out or remove it")


def _flat(tree, prefix: str = "") -> dict:
    """{"a": {"b": 1}, "c": [2]} -> {"a.b": 1, "c.0": 2}"""
    if not isinstance(tree, (dict, list)):
        return {prefix: tree}
    items = tree.items() if isinstance(tree, dict) else enumerate(tree)
    return {k: v for key, value in items for k, v in _flat(value, f"{prefix}.{key}" if prefix else str(key)).items()}


def refuse_foreign(out: Path, format: str) -> dict | None:
    """meta.json if OUT holds finished data of this format, None if OUT is free. Raises UserError for anything else."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    meta = read_json(out / "meta.json") if (out / "meta.json").is_file() else {}
    if meta.get("format") != format:
        raise UserError(f"{out} already exists and holds something else; choose another --out or remove it")
    return meta


def finished(out: Path, settings: dict, format: str) -> bool:
    """Whether OUT holds the finished result of the same settings. UserError if it holds anything else."""
    meta = refuse_foreign(out, format)
    if meta is None:
        return False
    refuse_other_settings(out, meta["settings"], settings)
    names = ["report.json", *(f"{split}.bin" if format == FORMAT else f"{split}.jsonl" for split in meta["splits"])]
    gone = [name for name in names if not (out / name).is_file()]
    if gone:
        raise UserError(f"{out} is not complete any more: {', '.join(gone)} {'is' if len(gone) == 1 else 'are'} missing; remove it")
    shutil.rmtree(out / "spool", ignore_errors=True)  # if the run was killed just before it removed that itself
    print(f"{out} is already complete, made with the same settings from the same files: nothing to do")
    return True
