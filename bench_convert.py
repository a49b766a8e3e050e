"""bench.py convert: memory and time of convert.py on a checkpoint of a real size, random weights on disk, in shards.

Each conversion is a process of its own, as users start it; its peak memory is what the operating system counted: the resident set,
files that are mapped at the moment included. (Linux counts a child from before it became another program, so no number can be
lower than what this benchmark itself takes.)
"""

from __future__ import annotations

from settings import UserError, flag, too_small

import dataclasses
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from config import PRESETS
from progress import human
from sentencepiece_model import BYTE, CONTROL, NORMAL, SPACE, UNKNOWN, sentencepiece_bytes
from tables import markdown_table, print_table
from tokenizer import Tokenizer, load_tokenizer
from weights import DTYPES, Lazy, Weights, shapes_of, write_weights

CONVERT = Path(__file__).with_name("convert.py")
# name -> (what it starts from, command of convert.py with its flags). Each leaves its result for those that start from it.
CONVERSIONS = {
    "gguf-f16": ("model", "export-gguf --type f16"),
    "gguf-q8_0": ("model", "export-gguf --type q8_0"),
    "from-gguf": ("gguf-q8_0", "import-gguf --dtype bf16"),
    "meta": ("model", "export-meta --shards 1"),
    "from-meta": ("meta", "import-meta"),
    "tp8": ("model", "export-megatron --tp 8"),
    "tp2-pp4": ("tp8", "export-megatron --tp 2 --pp 4 --names mcore"),
    "from-megatron": ("tp2-pp4", "import-megatron"),
    "llama2c-v2": ("model", "export-llama2c --version 2"),
}


@dataclass(frozen=True, kw_only=True)
class ConvertConfig:
    model: str = flag("llama2-7b", "architecture of the random checkpoint", choices=tuple(PRESETS))
    dtype: str = flag("bf16", "its dtype", choices=tuple(DTYPES))
    conversions: tuple[str, ...] = flag(tuple(CONVERSIONS), "which, in this order; what they start from is made first")
    folder: Path = flag(Path("out/bench-convert"), "where the files lie meanwhile; three times the checkpoint is needed")
    shard_gb: float = flag(5.0, "gigabytes per shard of the checkpoint")
    markdown: bool = flag(False, "print the table as Markdown")

    def problems(self) -> list[str]:
        unknown = [name for name in self.conversions if name not in CONVERSIONS]
        found = [f"--conversions {name} is unknown ({', '.join(CONVERSIONS)})" for name in unknown]
        for number, name in enumerate(self.conversions if not unknown else ()):
            if CONVERSIONS[name][0] not in ("model", *self.conversions[:number]):
                found.append(f"--conversions {name} starts from {CONVERSIONS[name][0]}: name that before it")
        return found + too_small(self, "shard_gb") + ([f"--folder {self.folder} exists"] if self.folder.exists() else [])


def made_up_tokenizer(folder: Path, size: int) -> Tokenizer:
    """A sentencepiece model of so many pieces: some formats hold no model without one."""
    pieces = [("<unk>", 0.0, UNKNOWN), ("<s>", 0.0, CONTROL), ("</s>", 0.0, CONTROL)]
    pieces += [(f"<0x{byte:02X}>", 0.0, BYTE) for byte in range(256)] + [(SPACE, 0.0, NORMAL)]
    pieces += [(f"{SPACE}{i}", -float(i), NORMAL) for i in range(size - len(pieces))]
    folder.mkdir(parents=True)
    (folder / "tokenizer.model").write_bytes(sentencepiece_bytes(pieces, add_dummy_prefix=True, unk_id=0, bos_id=1, eos_id=2))
    return load_tokenizer(folder)


def make_random(config: ConvertConfig, out: Path) -> Weights:
    """A checkpoint with N(0, 0.02) in every tensor, written as any other: one tensor in memory at a time."""
    llama, dtype = PRESETS[config.model], DTYPES[config.dtype]

    def draw(seed: int, shape: torch.Size):
        return lambda: torch.empty(shape, dtype=dtype).normal_(std=0.02, generator=torch.Generator().manual_seed(seed))

    tensors = {name: Lazy(shape, dtype, draw(seed, shape)) for seed, (name, shape) in enumerate(shapes_of(llama).items())}
    weights = Weights(llama, tensors, made_up_tokenizer(config.folder / "tokenizer", llama.vocab_size))
    write_weights(weights, out, int(config.shard_gb * 1e9))
    return weights


def measure(command: list[str]) -> tuple[float, float]:
    """(seconds, peak resident gigabytes) of a process. Raises UserError with its words if it fails."""
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding="utf-8", errors="replace")
    said = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise UserError(f"`{' '.join(command)}` failed: {' '.join(said.split())[-600:]}")
    return time.perf_counter() - started, usage.ru_maxrss * 1024 / 1e9


def convert(config: ConvertConfig) -> dict:
    folder, rows, summary = config.folder, [], {}
    folder.mkdir(parents=True)
    try:
        weights = make_random(config, folder / "model")
        largest = max(lazy.nbytes for lazy in weights.tensors.values())
        title = (f"{config.model}, {human(sum(lazy.shape.numel() for lazy in weights.tensors.values()))} parameters, {config.dtype}: "
                 f"{weights.nbytes / 1e9:.2f} GB in {len(list((folder / 'model').glob('*.safetensors')))} files; largest tensor "
                 f"{largest / 1e9:.3f} GB")  # fmt: skip
        print(title, flush=True)
        for name in config.conversions:
            source, command = CONVERSIONS[name]
            base, *flags = command.split()
            words = [sys.executable, str(CONVERT), base, *flags, "--model", str(folder / source), "--out", str(folder / name)]
            try:
                seconds, peak = measure(words)
            except UserError as error:  # the others are still worth knowing
                print(f"{command}: {error}", flush=True)
                continue
            written = sum(file.stat().st_size for file in ([folder / name] if (folder / name).is_file() else (folder / name).rglob("*"))
                          if file.is_file())  # fmt: skip
            rows.append((command, source, f"{written / 1e9:.2f}", f"{seconds:.0f}", f"{peak:.2f}"))
            summary[name] = {"seconds": seconds, "peak_gb": peak, "gb": written / 1e9}
            print(f"{command}: {peak:.2f} GB, {seconds:.0f} s", flush=True)
            later = config.conversions[config.conversions.index(name) + 1 :]
            for done in [path for path in folder.iterdir() if path.name not in ("model", "tokenizer")]:
                if not any(CONVERSIONS[other][0] == done.name for other in later):
                    shutil.rmtree(done) if done.is_dir() else done.unlink()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    header = ("convert.py", "from", "GB written", "seconds", "peak memory, GB")
    if config.markdown:
        print("\n".join([title, "", *markdown_table(header, rows, right=(2, 3, 4))]))
    else:
        print_table(header, rows, right=(2, 3, 4))
    return summary | {"largest_gb": largest / 1e9, "config": dataclasses.asdict(config)}
