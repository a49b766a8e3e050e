"""Doors to other systems: bring Llamas in, take them out, look at what a directory or file holds; merge adapters, add words.

    python convert.py inspect path/to/anything                                            # what is it, and would it load?
    python convert.py import-meta --model Llama-2-7b --out out/llama2-7b                  # consolidated.*.pth + params.json
    python convert.py export-megatron --model out/llama2-7b --tp 8 --pp 1 --out out/tp8   # ModelLink, Megatron-LM
    python convert.py export-gguf --model out/sft --type q8_0 --out out/sft.gguf          # llama.cpp, Ollama
    python convert.py resize-vocab --model out/llama2-7b --tokenizer out/llama2-zh --out out/llama2-7b-zh
    python convert.py merge --model out/pretrain --adapter out/lora --out out/merged      # what LoRA learned, into the weights

Whatever `inspect` recognises can be the --model of any command: `export-megatron --model out/tp8 --tp 2 --pp 4` goes from one
Megatron directory to another. Every conversion works tensor by tensor and takes the memory of a few of the largest, whatever
the size of the model. It writes beside --out, reads all of it back, compares, and only then gives it its name; the source is
only read. Each format is a room in doors/.
"""

from __future__ import annotations

from settings import UserError, command_line, flag, too_small

import dataclasses
import os
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from adapter_files import is_adapter, open_adapter
from checkpoint import ARCHITECTURE, SMALL_FILES, Adapted, open_model_dir, resolve_model_dir
from config import LlamaConfig
from doors import gguf_file, huggingface, llama2c, megatron, meta, tiktoken_file
from extension import compare_tokens
from files import fsync_directory, locked
from merging import Change, is_projection, merging, share
from progress import human
from runs import steps
from tokenizer import Tokenizer, load_tokenizer
from vocabulary import METHODS, RowMaker, row_report
from weights import DTYPES, Lazy, Weights, check_dtypes, dtype_name, narrowed, not_finite, same_bits

DOORS = (huggingface, meta, megatron, gguf_file, llama2c)  # in the order in which they are asked whether they recognise a path
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
WORTH_KEEPING = 0.25  # part of what adapters change that may be lost in rounding before merge speaks of it


@dataclass(frozen=True)
class Convert:
    """What every conversion asks for."""

    model: Path = flag(help="what to convert: anything that `inspect` recognises")
    out: Path = flag(help="what to write; it must not exist yet")
    tokenizer: Path | None = flag(None, "tokenizer directory or file, where the model comes without one")
    dtype: str = flag("keep", "dtype of the tensors written", choices=("keep", *DTYPES))


@dataclass(frozen=True)
class ImportMeta(Convert):
    max_position: int | None = flag(None, "context length; default: what the release of this shape had")

    def problems(self) -> list[str]:
        return too_small(self, "max_position", least=1)


@dataclass(frozen=True)
class ExportMeta(Convert):
    shards: int = flag(1, "tensor-parallel files: 7B has 1, 13B 2, 70B 8")
    split: str = flag("auto", "how embeddings are cut: by width as LLaMA-1/2, by vocabulary as Llama-3, or as the model looks",
                      choices=meta.SPLITS)  # fmt: skip

    def problems(self) -> list[str]:
        return too_small(self, "shards", least=1)


@dataclass(frozen=True)
class ImportMegatron(Convert):
    hf_config: Path | None = flag(None, "config.json of the architecture, or its directory; default: what the files say of themselves")
    vocab_size: int | None = flag(None, "entries without padding; default: what the files say, else the tokenizer's")

    def problems(self) -> list[str]:
        return too_small(self, "vocab_size", least=1)


@dataclass(frozen=True)
class ExportMegatron(Convert):
    tp: int = flag(1, "tensor parallelism: every matrix in so many pieces")
    pp: int = flag(1, "pipeline parallelism: the layers in so many stages")
    vpp: int | None = flag(None, "virtual stages of each pipeline stage, taking turns; default: none")
    layers: str | None = flag(None, "layers of each stage, 6,8,8,10; default: equally many")
    names: str = flag("legacy", "legacy: language_model.encoder …; mcore: decoder.layers …", choices=("legacy", "mcore"))
    vocab_divisor: int = flag(1, "pad the vocabulary to a multiple of this times --tp (make-vocab-size-divisible-by)")

    def problems(self) -> list[str]:
        found = too_small(self, "tp", "pp", "vpp", "vocab_divisor", least=1)
        if self.layers and not all(part.strip().isascii() and part.strip().isdigit() for part in self.layers.split(",")):
            found.append(f"--layers must be numbers with commas between them, 6,8,8,10, not {self.layers}")
        return found


@dataclass(frozen=True)
class ImportLlama2c(Convert):
    tokenizer_bin: Path | None = flag(None, "llama2.c's tokenizer; default: tokenizer.bin beside the model")


@dataclass(frozen=True)
class ExportLlama2c(Convert):
    version: int = flag(0, "0: fp32, for run.c; 2: int8 in groups, for runq.c")
    group_size: int = flag(64, "version 2: numbers that share a scale; halved until it divides the model's sizes")

    def problems(self) -> list[str]:
        found = too_small(self, "group_size", least=1)
        return found + ([] if self.version in (0, 2) else [f"--version must be 0 or 2, not {self.version}"])


@dataclass(frozen=True)
class ExportGguf(Convert):
    type: str = flag("auto", "how matrices are stored: auto keeps the model's dtypes; the others take 32, 16, 16, 8.5 and 4.5 bits per "
                     "weight", choices=("auto", *gguf_file.TYPES))  # fmt: skip


@dataclass(frozen=True)
class ResizeVocab(Convert):
    init: str = flag("subword", "new rows: subword (average of what the old tokenizer made of the piece), mean or normal",
                     choices=METHODS)  # fmt: skip
    multiple_of: int = flag(1, "pad the embedding to a multiple of this, 64 say: matrices of round sizes are faster on GPUs")
    seed: int = flag(0, "of the random part of new rows")
    text: Path | None = flag(None, "report tokens per character before and after on this file")

    def problems(self) -> list[str]:
        return (too_small(self, "multiple_of", least=1) + too_small(self, "seed", least=0)
                + ([f"--seed {self.seed} is too large"] if self.seed >= 2**31 else [])
                + ([] if self.tokenizer else ["--tokenizer is required: the larger one, from `tokenizer.py extend`"]))  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Merge(Adapted):
    model: Path = flag(help="the model that the adapters were trained on: a directory or a run")
    out: Path = flag(help="what to write; it must not exist yet")
    dtype: str = flag("keep", "dtype of the tensors written; what adapters change is often finer than bf16", choices=("keep", *DTYPES))

    def problems(self) -> list[str]:
        return [] if self.adapters() else ["--adapter is required: what to merge into --model"]


@dataclass(frozen=True)
class Inspect:
    path: Path = flag(help="a model directory, a run, a checkpoint or a file of any kind", positional=True)
    values: bool = flag(True, "read all tensors and look for NaN and infinities; --no-values is quick")


# ----------------------------------------------------------------------------------------------------------------------
# Opening


def located(path: Path, wanted=None):
    """(path, the room that knows its format, or None). A run directory is its newest intact step.

    `wanted`: the room that a command is for. Raises UserError if the path is missing, or known to another room only.
    """
    if not path.exists():
        raise UserError(f"{path} does not exist")
    if wanted and wanted.recognises(path):
        return path, wanted
    door = next((door for door in DOORS if door.recognises(path)), None)
    if door is None and path.is_dir() and ((path / "config.json").exists() or steps(path) or is_adapter(path)):
        path, door = resolve_model_dir(path), huggingface
    if wanted and door:
        raise UserError(f"--model {path} is of the kind {door.KIND}, not {wanted.KIND}")
    return path, door


def open_source(path: Path, tokenizer: Path | None = None, door=None, *, rows_missing: bool = False, **options) -> Weights:
    """Any model as Weights, with the tokenizer that is given or its own. `door`: the only one it may come through.

    `options` are those of one kind of source. Raises UserError if nothing is recognised, if something is broken, or if the
    tokenizer has more entries than the embedding rows (unless rows_missing).
    """
    path, found = located(path, door)
    if found is None:
        raise UserError(f"{path} is nothing that is known here: no Hugging Face, Meta, Megatron, llama2.c or GGUF model")
    if found is huggingface:
        path = resolve_model_dir(path)  # a step of a run is checked against its manifest
    given = open_tokenizer(tokenizer) if tokenizer else None
    weights = found.open_weights(path, tokenizer=given, **options)
    check_dtypes(weights.tensors, path)
    if given is not None:
        ids = {"bos_token_id": given.bos_id, "eos_token_id": given.eos_id, "pad_token_id": given.pad_id}
        weights.config = dataclasses.replace(weights.config, **ids)
    entries, rows = len(weights.tokenizer or ()), weights.config.vocab_size
    if entries > rows and not rows_missing:
        raise UserError(f"the tokenizer has {entries:,} entries and the embedding of {path} only {rows:,} rows; use the model's own, or "
                        "convert.py resize-vocab")  # fmt: skip
    if 0 < entries < rows:
        weights.odd.append(f"the embedding has {rows:,} rows and the tokenizer {entries:,} entries: padding, or another model's tokenizer")
    return weights


def open_tokenizer(path: Path) -> Tokenizer:
    """Any tokenizer, Llama-3's original file of ranks included."""
    file = path / "tokenizer.model" if path.is_dir() else path
    return tiktoken_file.load_ranks(file, "3.1") if file.is_file() and tiktoken_file.is_ranks(file) else load_tokenizer(path)


def watched(source: Weights, bar: tqdm, strange: dict[str, int], dtype: torch.dtype | None = None) -> Weights:
    """The same weights, cast to `dtype`; each read moves the bar, and counts in `strange` the numbers that are not finite."""

    def watch(name: str, lazy: Lazy) -> Lazy:
        def read() -> Tensor:
            tensor = lazy.read()
            bar.update(lazy.nbytes)
            if bad := not_finite(tensor):
                strange[name] = bad
            return tensor if dtype is None or not tensor.is_floating_point() else narrowed(name, tensor, dtype)

        return Lazy(lazy.shape, dtype or lazy.dtype, read)

    return dataclasses.replace(source, tensors={name: watch(name, lazy) for name, lazy in source.tensors.items()})


@contextmanager
def progress_bar(title: str, total: int) -> Iterator[tqdm]:
    with tqdm(total=total, desc=title, unit="B", unit_scale=True, dynamic_ncols=True, mininterval=0.5) as bar:
        yield bar


# ----------------------------------------------------------------------------------------------------------------------
# Converting


def convert(source: Weights, door, out: Path, dtype: str = "keep", **options) -> Weights:
    """Write `source` through a door, read it back, compare, and give it its name. Returns the result, opened.

    Raises UserError if the format cannot hold the model, if `out` is in use, if the disk is too small, or if what was read back
    differs. Then nothing is left.
    """
    wanted = DTYPES.get(dtype)
    cast = dataclasses.replace(source, tensors={name: lazy.to(wanted) for name, lazy in source.tensors.items()})
    if problems := door.problems(cast, **options):
        raise UserError(f"{door.KIND} cannot hold this model: {'; '.join(problems)}")
    if not out.name or os.path.lexists(out):
        raise UserError(f"--out {out} exists already; remove it or choose another name")
    parent = next(path for path in out.absolute().parents if os.path.lexists(path))
    if not parent.is_dir():
        raise UserError(f"--out {out}: {parent} is not a directory")
    partial = out.with_name(f".{out.name}.partial")
    check_disk(out, parent, door.size(cast, **options) - size_on_disk(partial))  # what a killed conversion left is written over
    with ended_politely(), locked(out.with_name(f".{out.name}.lock"), f"--out {out}: another process is writing it"):
        started, strange = time.perf_counter(), {}
        try:
            remove(partial)  # of an interrupted conversion
            with progress_bar("writing", source.nbytes) as bar:
                door.write(watched(source, bar, strange, wanted), partial, **options)
            with progress_bar("reading back", source.nbytes) as bar:
                written = door.open_weights(partial)
                compare(watched(source, bar, {}, wanted), written, lambda name, tensor: door.expected(cast, name, tensor, **options))
            sync(partial)
            if os.path.lexists(out):  # made by another process meanwhile
                raise UserError(f"--out {out} exists already; remove it or choose another name")
            os.replace(partial, out)
            fsync_directory(out.absolute().parent)
        except BaseException:
            remove(partial)
            raise
    remarks = [f"{name} holds {count:,} values that are NaN or infinite" for name, count in strange.items()]
    remarks += [*source.odd, *door.remarks(cast, **options)]
    for remark in remarks[:20]:
        print(f"notice: {remark}")
    if len(remarks) > 20:
        print(f"notice: and {len(remarks) - 20} more of that kind")
    print(f"{source.kind} -> {door.KIND}: {len(source.tensors)} tensors, {source.nbytes / 1e9:,.2f} GB in "
          f"{time.perf_counter() - started:.1f} s, every tensor read back and equal")  # fmt: skip
    return door.open_weights(out)


def compare(source: Weights, written: Weights, expected) -> None:
    """Raise UserError at the first difference: of architecture, names, shapes, or one bit of a tensor."""
    ours, theirs = source.config.to_dict(), written.config.to_dict()
    wrong = [f"{key} is {theirs[key]} and was {ours[key]}" for key in ARCHITECTURE if ours[key] != theirs[key]]
    wrong += [f"{name} is missing or new" for name in source.tensors.keys() ^ written.tensors.keys()]
    for name in source.tensors if not wrong else ():
        want, got = expected(name, source.tensors[name].read()), written.tensors[name].read()
        if not same_bits(want, got):
            wrong.append(f"{name} differs")
            break
    if wrong:
        raise UserError(f"what was written does not read back as it was: {'; '.join(wrong[:5])}. Nothing was kept; if this disk is "
                        "sound, this is a fault of Cria's")


def check_disk(out: Path, parent: Path, size: int) -> None:
    free = shutil.disk_usage(parent).free
    if free < size + SMALL_FILES:
        raise UserError(f"--out {out} will take {(size + SMALL_FILES) / 1e9:,.2f} GB and {parent} has {free / 1e9:,.2f} GB free; "
                        "nothing was begun")  # fmt: skip


@contextmanager
def ended_politely() -> Iterator[None]:
    """SIGTERM, as Ctrl-C, ends the block with KeyboardInterrupt, so that nothing half written stays."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Have everything below `path` on the disk before it gets its name."""
    for file in [path] if path.is_file() else [*sorted(path.rglob("*")), path]:
        if file.is_file():
            with file.open("rb+") as stream:
                os.fsync(stream.fileno())
        else:
            fsync_directory(file)


# ----------------------------------------------------------------------------------------------------------------------
# The commands


def to_house(config: Convert, source: Weights) -> dict:
    """Write a Hugging Face directory and say what can be done with it."""
    if source.tokenizer is None:
        print("notice: no tokenizer came with the model; give one with --tokenizer, or put its files into --out later")
    result = convert(source, huggingface, config.out, config.dtype)
    print(f"next: python chat.py --model {config.out}    or    python pretrain.py --init-from {config.out} --data DIR")
    return {"parameters": parameters(result), "bytes": result.nbytes}


def parameters(weights: Weights) -> int:
    return sum(lazy.shape.numel() for lazy in weights.tensors.values())


def import_meta(config: ImportMeta) -> dict:
    return to_house(config, open_source(config.model, config.tokenizer, meta, max_position=config.max_position))


def import_megatron(config: ImportMegatron) -> dict:
    given = LlamaConfig.from_json(config.hf_config) if config.hf_config else None
    return to_house(config, open_source(config.model, config.tokenizer, megatron, vocab_size=config.vocab_size, config=given))


def import_llama2c(config: ImportLlama2c) -> dict:
    return to_house(config, open_source(config.model, config.tokenizer, llama2c, tokenizer_bin=config.tokenizer_bin))


def import_gguf(config: Convert) -> dict:
    return to_house(config, open_source(config.model, config.tokenizer, gguf_file))


def export(config: Convert, door, **options) -> Weights:
    return convert(open_source(config.model, config.tokenizer), door, config.out, config.dtype, **options)


def export_meta(config: ExportMeta) -> dict:
    return {"parameters": parameters(export(config, meta, shards=config.shards, split=config.split))}


def export_megatron(config: ExportMegatron) -> dict:
    layers = tuple(int(part) for part in config.layers.split(",")) if config.layers else None
    result = export(config, megatron, tp=config.tp, pp=config.pp, vpp=config.vpp, layers=layers, names=config.names,
                    vocab_divisor=config.vocab_divisor)  # fmt: skip
    return {"parameters": parameters(result)}


def export_llama2c(config: ExportLlama2c) -> dict:
    result = export(config, llama2c, version=config.version, group_size=config.group_size)
    program = "runq" if config.version == 2 else "run"
    print(f"next: ./{program} {config.out}/model.bin -z {config.out}/tokenizer.bin -t 0 -i \"…\"")
    return {"parameters": parameters(result)}


def export_gguf(config: ExportGguf) -> dict:
    result = export(config, gguf_file, type=config.type, title=config.out.stem)
    print(f"an Ollama Modelfile for it:\n\n{gguf_file.modelfile(config.out, result)}\n\nnext: ollama create NAME -f Modelfile")
    return {"parameters": parameters(result)}


def resize_vocab(config: ResizeVocab) -> dict:
    """The model with rows for a larger tokenizer, in the place of its own: its old rows stay bit for bit."""
    source, new = open_source(config.model, rows_missing=True), load_tokenizer(config.tokenizer)
    old = source.tokenizer
    if old is None:
        raise UserError(f"--model {config.model} has no tokenizer: new rows are made from what its own made of the new pieces")
    found = compare_tokens(old, new, config.text) if config.text else None
    if new.template is None and old.template is not None:
        new.template, new.jinja = old.template, old.jinja
    for what in ("add_bos", "bos_id", "eos_id", "template"):
        if getattr(old, what) != getattr(new, what):
            print(f"notice: the tokenizers differ in {what}: {getattr(old, what)} before, {getattr(new, what)} now")
    tied, rows = source.config.tie_word_embeddings, source.config.vocab_size
    maker = RowMaker(old, new, rows, method=config.init, multiple_of=config.multiple_of, seed=config.seed,
                     initializer_range=source.config.initializer_range)  # fmt: skip
    resized = {}
    for name in (EMBEDDING,) if tied else (EMBEDDING, HEAD):
        lazy = source.tensors[name]
        shape = torch.Size((maker.size, lazy.shape[1]))
        resized[name] = Lazy(shape, lazy.dtype, lambda name=name, lazy=lazy: maker.resize(lazy.read(), output=name == HEAD))
    larger = dataclasses.replace(source, tensors=source.tensors | resized, tokenizer=new,
                                 config=dataclasses.replace(source.config, vocab_size=maker.size))  # fmt: skip
    result = convert(larger, huggingface, config.out, config.dtype)
    print(f"vocabulary {len(old):,} -> {len(new):,} tokens, {rows:,} -> {maker.size:,} rows; {len(maker.tokens):,} rows are new, by "
          f"{config.init}")
    reports = {}
    for name in resized:
        report = reports[name] = row_report(result.tensors[name].read(), maker)
        norms = " and ".join(f"{report[key]:.3f}" for key in ("norm_old", "norm_new") if report[key] is not None)
        print(f"{name}: {report['coinciding']} rows coincide with another; mean norm of old and new rows {norms}")
        if report["coinciding"]:
            print(f"notice: equal rows are equal to the model too: {name} of --model may hold zeros; --init normal parts them")
    if found:
        print(f"{config.text}: {found['before']:.3f} tokens per character before, {found['after']:.3f} after")
    print(f"next: python pretrain.py --init-from {config.out} --data DIR --train embeddings    (then with --train all)")
    return {"rows": maker.size, "new": len(maker.tokens), **reports}


def merge(config: Merge) -> dict:
    """The model with its adapters merged into it; tokenizer, chat template and RoPE scaling are those that it is used with."""
    directory, llama, tokenizer = open_model_dir(config.model, adapters=config.adapters())
    storage = config.storage(directory)
    source = dataclasses.replace(huggingface.open_weights(directory, tokenizer), config=llama)
    adapters = [open_adapter(path, llama, directory) for path in config.adapters()]
    changes: dict[str, Change] = {}
    tensors = merging(source.tensors, adapters, config.base_quant, DTYPES.get(config.dtype), changes)
    result = convert(dataclasses.replace(source, tensors=tensors, kind="Hugging Face + adapters"), huggingface, config.out, config.dtype)
    touched = [name for name in tensors if any(adapter.touches(name) for adapter in adapters)]
    by_size = sorted((share([changes[name]], "learning", "base"), name) for name in touched)
    learned, rounded, lost = (share([changes[name] for name in touched], part, whole)
                              for part, whole in (("learning", "base"), ("rounding", "base"), ("rounding", "learning")))  # fmt: skip
    dtypes = " and ".join(sorted({dtype_name(result.tensors[name].dtype) for name in touched}))
    print(f"merged: {len(touched)} of {len(tensors)} tensors are changed, by {learned:.2%} of their size; least {by_size[0][1]} "
          f"{by_size[0][0]:.2%}, most {by_size[-1][1]} {by_size[-1][0]:.2%}")  # fmt: skip
    if config.base_quant != "none":
        so_in_training = all(adapter.base is None or adapter.base["storage"] == storage for adapter in adapters)
        packing = share([change for name, change in changes.items() if is_projection(name)], "packing", "given")
        print(f"base: --base-quant {storage} changed the projections by {packing:.2%} of their size before"
              + "; in training it was so too" * so_in_training)  # fmt: skip
    elif storage != "none":
        print(f"base: the projections of --model are in {storage}, and are written in {dtypes}")
    print(f"precision: {dtypes} rounds the merged weights by {rounded:.2%} of their size, which is {lost:.2%} of the change"
          if rounded else f"precision: {dtypes} holds the merged weights as they were computed")  # fmt: skip
    if lost > WORTH_KEEPING:
        print(f"notice: much of what was learned is finer than {dtypes} tells apart; --dtype fp32 keeps it")
    print(f"next: python chat.py --model {config.out}")
    return {"parameters": parameters(result), "tensors": len(touched), "learned": learned, "rounded": rounded, "lost": lost}


def inspect(config: Inspect) -> dict:
    """Print what a path holds. Raises UserError, after printing what could be read, if it would not load."""
    path, weights, strange, problem = config.path, None, {}, ""
    if not path.exists():
        raise UserError(f"{path} does not exist")
    facts = {"path": str(path), "kind": next((door.KIND for door in DOORS if door.recognises(path)), "not recognised"),
             "size on disk": human_bytes(size_on_disk(path))}  # fmt: skip
    try:
        weights = open_source(path)
        facts |= {"kind": weights.kind, **weights.facts, **described(weights)}
        if config.values:
            with progress_bar("reading", weights.nbytes) as bar:
                for lazy in watched(weights, bar, strange).tensors.values():
                    lazy.read()
            facts["values"] = f"{len(strange)} tensors hold NaN or infinity" if strange else "all finite"
    except UserError as error:
        problem = str(error)
    facts["would load"] = f"no: {problem}" if problem else "yes"
    odd = [*(weights.odd if weights else []), *(f"{name}: {count:,} values are NaN or infinite" for name, count in strange.items())]
    width = max(map(len, facts))
    print("\n".join([f"{key:<{width}}  {value}" for key, value in facts.items()] + [f"{'odd':<{width}}  {remark}" for remark in odd]))
    if problem:
        raise UserError(problem)
    return {"kind": facts["kind"], "parameters": parameters(weights), "odd": odd, "not finite": len(strange)}


def described(weights: Weights) -> dict[str, str]:
    """What an architecture, its tensors and its tokenizer are, in words."""
    c, tokenizer = weights.config, weights.tokenizer
    scaling = f", {c.rope_scaling['rope_type']} scaling {c.rope_scaling.get('factor', '')}" if c.rope_scaling else ""
    stored = [f"{dtype_name(dtype)} {count / parameters(weights):.0%}" for dtype, count in weights.dtypes.items()]
    return {
        "architecture": f"{c.num_hidden_layers} layers, hidden {c.hidden_size}, feed-forward {c.intermediate_size}, "
                        f"{c.num_attention_heads} heads of {c.head_dim}, {c.num_key_value_heads} key/value heads",
        "context": f"{c.context_length:,} tokens, RoPE theta {c.rope_theta:,.0f}{scaling}, norm epsilon {c.rms_norm_eps:g}",
        "vocabulary": f"{c.vocab_size:,}, embedding and head {'tied' if c.tie_word_embeddings else 'separate'}",
        "parameters": f"{human(parameters(weights))} ({parameters(weights):,}) in {len(weights.tensors)} tensors",
        "dtypes": ", ".join(stored),
        "tokenizer": "none" if tokenizer is None else f"{len(tokenizer):,} entries, template {tokenizer.template or 'none'}",
    }  # fmt: skip


def size_on_disk(path: Path) -> int:
    return sum(file.stat().st_size for file in ([path] if path.is_file() else path.rglob("*")) if file.is_file())


def human_bytes(count: int) -> str:
    return f"{count / 1e9:,.2f} GB" if count >= 1e9 else f"{count / 1e6:,.1f} MB"


COMMANDS = {
    "inspect": (inspect, Inspect, "say what a directory or file is, and whether it would load"),
    "import-meta": (import_meta, ImportMeta, "consolidated.*.pth and params.json -> a model directory"),
    "export-meta": (export_meta, ExportMeta, "a model -> consolidated.*.pth and params.json"),
    "import-megatron": (import_megatron, ImportMegatron, "Megatron or ModelLink, any TP x PP -> a model directory"),
    "export-megatron": (export_megatron, ExportMegatron, "a model -> Megatron or ModelLink, any TP x PP"),
    "import-llama2c": (import_llama2c, ImportLlama2c, "llama2.c's .bin -> a model directory"),
    "export-llama2c": (export_llama2c, ExportLlama2c, "a model -> llama2.c's .bin, fp32 or int8"),
    "import-gguf": (import_gguf, Convert, "GGUF -> a model directory"),
    "export-gguf": (export_gguf, ExportGguf, "a model -> GGUF, for llama.cpp and Ollama"),
    "merge": (merge, Merge, "a model and the adapters trained on it -> a model directory"),
    "resize-vocab": (resize_vocab, ResizeVocab, "give a model the rows for a larger tokenizer"),
}

if __name__ == "__main__":
    command_line(None, None, description=__doc__, commands=COMMANDS)
