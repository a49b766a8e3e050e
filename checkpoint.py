"""Tensors on disk: model directories in Hugging Face's layout, and training state that survives a crash.

    load_model, save_model      config.json + safetensors (one file or shards) + tokenizer: what transformers reads
    save_state, load_state      step-000200/: weights in fp32, optimizer, scaler, random numbers, position in the data

A training state is written by all ranks together: tensor by tensor each is gathered whole, and every rank writes its share of
the files, hashes them while the next are gathered, and none ever holds more than two files of a few gigabytes. The files do not
show how many ranks there were or how they shared the model, so any other number, under any strategy, can go on.
No file here can execute code when read: weights and state are safetensors and JSON, foreign .bin files are read with
weights_only=True.
"""

from __future__ import annotations

from settings import UserError, flag, read_json

import dataclasses
import hashlib
import shutil
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from adapter_files import (
    CONFIG,
    adapter_dir,
    adapter_tensors,
    hang,
    is_adapter,
    merge,
    open_adapter,
    peft_key,
    read_base,
    scaled,
    write_adapter_descriptions,
)
from adapters import AdapterConfig
from devices import random_state, set_random_state
from files import write_json, written_beside
from layers import STORAGES, pack, packed_layers
from model import Llama, LlamaConfig
from nf4 import Packed
from runs import STATE_FORMAT, begin_step, damage, finish_step, manifest_entries, newest_step, prune
from tokenizer import Tokenizer, load_tokenizer
from weights import (
    DTYPES,
    SHARD_BYTES,
    Lazy,
    parameters_in,
    plan,
    storage_of,
    tensors_in,
    weight_files,
    write_descriptions,
)

__all__ = ["DTYPES"]
SMALL_FILES = 20 * 10**6  # room for tokenizer, random states and descriptions beside the tensors
ARCHITECTURE = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
                "head_dim", "tie_word_embeddings", "attention_bias", "mlp_bias", "rms_norm_eps", "rope_theta", "rope_scaling")  # fmt: skip

# ----------------------------------------------------------------------------------------------------------------------
# Models


@dataclass(frozen=True, kw_only=True)
class Adapted:
    """What every command asks that takes a model with adapters on it."""

    adapter: tuple[str, ...] = flag((), "adapters to put on the model, in this order: directories or runs, with commas or spaces between")
    base_quant: str = flag("none", "round the model's projections to 8 or about 4 bits, as they were when the adapter was trained",
                           choices=tuple(STORAGES))  # fmt: skip

    def adapters(self) -> list[Path]:
        """Raises UserError if --adapter is there and names none."""
        found = [Path(part) for word in self.adapter for part in word.split(",") if part]
        if self.adapter and not found:
            raise UserError("--adapter names no directory")
        return found

    def with_adapters(self, model: Path) -> str:
        """What the model and its adapters are called together."""
        return " + ".join(map(str, [model, *self.adapters()]))

    def storage(self, directory: Path) -> str:
        """How the projections of the model in `directory` are to be kept. Says so, on stderr, if an adapter was trained beside others."""
        storage = storage_of(directory, self.base_quant)
        for path in map(adapter_dir, self.adapters()):
            trained = (read_base(path) or {}).get("storage")
            if trained not in (None, storage):
                before, here = (f"in {kind}" if kind != "none" else "as the model has them" for kind in (trained, storage))
                same = f"--base-quant {trained}" if trained != "none" else "leaving out --base-quant"
                print(f"notice: {path} was trained beside projections {before}, and here they are {here}; {same} makes them the same",
                      file=sys.stderr)  # fmt: skip
        return storage


def resolve_model_dir(path) -> Path:
    """The directory that holds the weights: `path` itself, or the newest intact step of the run `path`.

    Raises UserError when there is neither.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path} does not exist; a model directory holds config.json and model.safetensors")
    if (path / "manifest.json").exists() and (problem := damage(path, without=("optimizer", "random", "state"))):
        raise UserError(f"{path} is damaged: {problem}; use another step of the run, or copy it again from where it is whole")
    if (path / "config.json").exists() and weight_files(path):
        return path
    step = newest_step(path) if path.is_dir() else None
    if found := next((place for place in (path, step) if place and is_adapter(place)), None):
        base = read_base(found) or {"path": "BASE", "storage": "none"}
        both = f"--model {base['path']} --adapter {path}" + f" --base-quant {base['storage']}" * (base["storage"] != "none")
        raise UserError(f"{path} is an adapter and no whole model: {both}; python convert.py merge {both} --out DIR makes them one")
    if step is None:
        raise UserError(f"{path} is no model directory: no config.json with model.safetensors, and no complete step inside")
    return step


def open_model_dir(path, rope_scaling: str = "none", rope_factor: float = 1.0,
                   adapters: Sequence[Path] = ()) -> tuple[Path, LlamaConfig, Tokenizer]:  # fmt: skip
    """What a model is, before its weights are read: its directory, architecture (scaled, if asked for) and tokenizer.

    An adapter that was trained with RoPE scaling brings that with it; the last one with a tokenizer brings that, and its chat template.
    Raises UserError when something is missing or broken, or when the tokenizer is larger than the model's vocabulary.
    """
    directory = resolve_model_dir(path)
    config, tokens = LlamaConfig.from_json(directory), directory
    adapters = [adapter_dir(adapter) for adapter in adapters]
    config = scaled(config, adapters)
    for adapter in adapters:
        tokens = adapter if any((adapter / name).exists() for name in ("tokenizer.model", "tokenizer.json")) else tokens
    if rope_scaling != "none":
        config = config.with_rope_scaling(rope_scaling, rope_factor)
    tokenizer = load_tokenizer(tokens)
    if len(tokenizer) > config.vocab_size:
        raise UserError(f"the tokenizer of {tokens} has {len(tokenizer)} entries, its model only {config.vocab_size}")
    return directory, config, tokenizer


def load_model(path, device="cpu", dtype: torch.dtype | None = None, config: LlamaConfig | None = None,
               adapters: Sequence[Path] = (), base_quant: str = "none") -> Llama:  # fmt: skip
    """Read a Llama from a Hugging Face directory, or from the newest intact step of a run.

    Tensor by tensor: no second copy of the model is ever in memory. dtype None keeps the file's. `config` replaces
    the directory's (with other RoPE scaling, say). `adapters` are put on in this order: merged into float32 weights, beside those of half
    precision, which would round away much of what they learned. With `base_quant` (layers.STORAGES) the projections are packed as they
    are read, with the adapters beside them.
    Raises UserError that names every missing, unknown or misshapen tensor, and adapters that are not this model's.
    """
    directory = resolve_model_dir(path)
    config = config or scaled(LlamaConfig.from_json(directory), [adapter_dir(adapter) for adapter in adapters])
    opened = [open_adapter(adapter, config, directory) for adapter in adapters]
    with torch.device("meta"):
        model = pack(Llama(config), base_quant)
    packed, state = packed_layers(model), {}
    tensors = parameters_in(directory, config, mapped=True)[0]
    for name in packed:
        packed[name].to_empty(device=device).store(tensors.pop(name).stored(base_quant).to(device), name)
    dtypes = {name: dtype or lazy.dtype for name, lazy in tensors.items()}
    beside = [name for name in tensors if dtypes[name] != torch.float32 and ".layers." in name
              and not any(name in adapter.whole for adapter in opened)]  # fmt: skip
    merged = merge({name: tensors[name].to(torch.float32) for name in tensors if name not in beside}, opened)
    for name, own in dtypes.items():
        changed = name in merged and any(adapter.touches(name) for adapter in opened)
        state[name] = (merged if changed else tensors)[name].read().to(device=device, dtype=own)
    model.load_state_dict(state, strict=False, assign=True)
    model.tie_weights()
    hang(model, opened, [*packed, *beside])
    return model.requires_grad_(True)


def model_tensors(directory: Path, config: LlamaConfig, storage: str = "none") -> Iterator[tuple[str, Tensor | Packed]]:
    """Yield (name, tensor) of every parameter of this architecture from a directory's weight files, one at a time. For a model that
    keeps its projections in `storage`, those that lie so in the files come as they are.

    Raises UserError, before the first, that names every missing, unknown or misshapen tensor.
    """
    for name, lazy in parameters_in(directory, config, mapped=True)[0].items():
        yield name, lazy.stored(storage)


def weights_identity(directory: Path) -> str:
    """Tells one set of weights from another without reading all of it: names, sizes, and both ends of every file."""
    digest = hashlib.sha256()
    for file in weight_files(directory):
        with file.open("rb") as stream:
            head = stream.read(1 << 16)
            stream.seek(max(0, file.stat().st_size - (1 << 16)))
            digest.update(f"{file.name} {file.stat().st_size} ".encode() + head + stream.read())
    return digest.hexdigest()


def save_model(model: Llama, path, tokenizer: Tokenizer | None = None, *, dtype: torch.dtype | None = None,
               template: str | None = None, shard_bytes: int = SHARD_BYTES, parallel=None,
               adapter: AdapterConfig | None = None) -> None:  # fmt: skip
    """Write a complete Hugging Face directory, or with `adapter` a PEFT directory with what of the model learns; each file is complete
    or absent, config.json or adapter_config.json comes last.

    dtype None keeps the parameters' own. The tokenizer is written beside, with its chat template. `parallel` (parallel.py) of
    a run whose ranks write together: then every rank calls this.
    """
    path, machine = Path(path), parallel.machine if parallel else Alone
    machine.on_main(lambda: path.mkdir(parents=True, exist_ok=True))
    dtype = dtype or next(parameter.dtype for parameter in model.parameters() if parameter.requires_grad or adapter is None)
    files = _weights_plan(model, parallel, dtype, shard_bytes, adapter)
    _write_tensors(path, files, machine)
    machine.on_main(lambda: _write_descriptions(path, model, files, tokenizer, dtype, template, adapter))


def _write_descriptions(path: Path, model: Llama, files: dict, tokenizer: Tokenizer | None, dtype: torch.dtype, template: str | None,
                        adapter: AdapterConfig | None) -> None:  # fmt: skip
    """Everything beside the tensors."""
    if adapter is None:
        write_descriptions(path, model.config, files, tokenizer, dtype=dtype, template=template)
        return
    if tokenizer is not None:
        tokenizer.save(path, template=template)
    write_adapter_descriptions(path, adapter, model.config)


class Alone:
    """What a Machine is, as far as writing files goes, when there is no run."""

    main, rank, world = True, 0, 1
    gather = staticmethod(lambda value: [value])
    on_main = staticmethod(lambda work: work())


def _weights_plan(model: Llama, parallel, dtype: torch.dtype, shard_bytes: int,
                  adapter: AdapterConfig | None = None) -> dict[str, dict[str, Lazy]]:  # fmt: skip
    own = dict(model.named_parameters())
    read = parallel.read if parallel else lambda name: own[name].detach()
    if adapter is not None:  # PEFT knows no shards
        return {"adapter_model.safetensors": adapter_tensors(model, read, dtype)}
    return plan("model", [(name, Lazy(shape, dtype, partial(read, name))) for name, shape in model.parameter_shapes().items()], shard_bytes)


def _write_tensors(directory: Path, files: dict[str, dict[str, Lazy]], machine) -> dict[str, dict]:
    """Write the files of a plan (weights.py); returns their manifest entries on every rank. All ranks call it.

    The ranks own the files in turn. All take part in gathering every tensor; a file's owner keeps it, and writes and hashes
    while the next file is being gathered. What goes wrong on one rank is raised on all.
    """
    written, problem, writing = {}, None, None
    with ThreadPoolExecutor(1) as writer:
        for number, (name, entries) in enumerate(files.items()):
            own, tensors = number % machine.world == machine.rank and problem is None, {}
            for key, lazy in entries.items():
                tensor = lazy.read()
                if own:
                    tensors[key] = tensor.to("cpu", lazy.dtype).contiguous()
            if own:
                problem = _collect(writing, written)
                writing = writer.submit(_write_file, directory / name, tensors)
        problem = problem or _collect(writing, written)
    reports = machine.gather((written, problem))
    for _, other in reports:
        if other is not None:
            raise other
    return {name: entry for entries, _ in reports for name, entry in entries.items()}


def _collect(writing: Future | None, written: dict) -> BaseException | None:
    """Wait for a file: its manifest entry goes to `written`, or its error is returned."""
    if writing is None:
        return None
    if (problem := writing.exception()) is None:
        written |= writing.result()
    return problem


def _write_file(path: Path, tensors: dict[str, Tensor]) -> dict[str, dict]:
    """Returns the file's manifest entry."""
    with written_beside(path) as temporary:
        save_file(tensors, temporary, metadata={"format": "pt"})
    return manifest_entries(path.parent, [path.name])


# ----------------------------------------------------------------------------------------------------------------------
# Training state


def save_state(out: Path, *, parallel, tokenizer: Tokenizer, state: dict, template: str | None = None, keep: int = 2,
               needed: bool = False, adapter: AdapterConfig | None = None) -> Path | None:  # fmt: skip
    """Write out/step-NNNNNN: a model directory in fp32 plus all that decides the next step; with `adapter` a PEFT directory, which
    holds only what is trained. All ranks call it.

    `state` is the stage's own (JSON), with its "step". The newest `keep` steps stay, and the best one. Where the disk has no
    room for it, nothing is begun: UserError if the save is `needed`, else a notice and None, because training can go on.
    """
    out, machine, step = Path(out), parallel.machine, state["step"]
    optimizer = [(f"{name}:{key}", Lazy(torch.Size() if key == "step" else shape, torch.float32, partial(parallel.read, name, key)))
                 for name, shape in parallel.model.trained_shapes().items() for key in parallel.state_keys()]  # fmt: skip
    weights = _weights_plan(parallel.model, parallel, torch.float32, SHARD_BYTES, adapter)
    files = weights | plan("optimizer", optimizer, SHARD_BYTES)
    size = sum(lazy.nbytes for tensors in files.values() for lazy in tensors.values()) + SMALL_FILES
    free = machine.on_main(lambda: shutil.disk_usage(out).free)
    if free < size:
        text = (f"--out {out} has {free / 1e9:,.2f} GB free and a checkpoint takes {size / 1e9:,.2f} GB: step {step:,} is not saved; "
                "free some space")  # fmt: skip
        if needed:
            raise UserError(f"{text}. The newest checkpoint is {newest_step(out) or 'missing'}")
        machine.print(f"notice: {text}; training goes on")
        return None
    random_states = machine.gather(random_state(machine.device))
    scaler = machine.scaler.state_dict()
    folder = machine.on_main(lambda: begin_step(out, step))
    try:
        entries = _write_tensors(folder, files, machine)

        def finish() -> Path:
            _write_descriptions(folder, parallel.model, weights, tokenizer, torch.float32, template, adapter)
            _write_file(folder / "random.safetensors", {f"rank{rank}.{kind}": tensor for rank, states in enumerate(random_states)
                                                        for kind, tensor in states.items()})  # fmt: skip
            write_json(folder / "state.json", {"format": STATE_FORMAT, "world": machine.world, "scaler": scaler, **state})
            small = sorted(path.name for path in folder.iterdir() if path.name not in entries)
            target = finish_step(folder, entries | manifest_entries(folder, small))
            prune(target, keep, (state.get("best") or {}).get("step"))
            return target

        return machine.on_main(finish)
    except BaseException:
        if machine.main:
            shutil.rmtree(folder, ignore_errors=True)
        raise


def load_state(step: Path, *, stage: str, parallel, tokenizer: Tokenizer, adapter: AdapterConfig | None = None) -> dict:
    """Put a step's weights, optimizer, scaler and random numbers back; return the stage's state. All ranks call it.

    With `adapter` the step holds one, and the model around it has its values already.

    Another number of ranks, or another kind of device, gets fresh random numbers, other ones than at the start: dropout goes on
    differently, all else alike. Raises UserError if another stage wrote it, or it has another architecture or tokenizer, or other
    parameters were trained: those that are new to an optimizer would take their first, largest steps in the middle of a schedule.
    """
    machine, state = parallel.machine, read_json(step / "state.json")
    if state.get("stage") != stage:
        raise UserError(f"--resume {step}: this is a step of {state.get('stage')}.py; to build on its weights use --init-from {step}")
    if state.pop("format", None) != STATE_FORMAT:
        raise UserError(f"--resume {step}: an older Cria wrote this training state; go on from its weights: --init-from {step}")
    if is_adapter(step) != (adapter is not None):
        found, wanted = ("an adapter", "the whole model") if adapter is None else ("a whole model", "an adapter")
        raise UserError(f"--resume {step}: {found} was trained there, and now {wanted} is to be (--lora-rank)")
    if adapter is not None and (stored := AdapterConfig.from_json(step / CONFIG)) != adapter:
        raise UserError(f"--resume {step}: another adapter was trained there ({_difference(stored, adapter)})")
    own = LlamaConfig.from_dict(read_base(step)["config"]) if adapter is not None else LlamaConfig.from_json(step)
    ours, theirs = parallel.model.config.to_dict(), own.to_dict()
    if different := [f"{key} {theirs[key]} instead of {ours[key]}" for key in ARCHITECTURE if ours[key] != theirs[key]]:
        raise UserError(f"--resume {step}: it holds another model: {', '.join(different)}")
    if adapter is not None and (changed := [what for what in ("fingerprint", "storage")
                                         if (read_base(step) or adapter.base)[what] != adapter.base[what]]):  # fmt: skip
        now, then = adapter.base, read_base(step)
        before, after = (f"{base['path']} ({', '.join(base[what] for what in changed)})" for base in (then, now))
        raise UserError(f"--resume {step}: the adapter was trained beside {before}, and now it would be beside {after}")
    if load_tokenizer(step).fingerprint != tokenizer.fingerprint:
        raise UserError(f"--resume {step}: it was trained with another tokenizer than the one given now")
    remembered = _optimizer_remembers(step)
    if remembered and remembered != set(parallel.trained):
        raise UserError(f"--resume {step}: {len(remembered)} tensors were trained there and {len(parallel.trained)} are to be trained "
                        f"now (--train); begin a run of its own from those weights: --init-from {step} and another --out")
    if adapter is None:
        parallel.fill(model_tensors(step, parallel.model.config))
    else:
        stored = tensors_in(step / "adapter_model.safetensors", mapped=True)
        parallel.fill((name, stored[peft_key(name)].read()) for name in parallel.trained)
    for file in sorted(step.glob("optimizer*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118 - not a dict
                name, _, kind = key.rpartition(":")
                parallel.write(name, tensors.get_tensor(key), kind)
    with safe_open(step / "random.safetensors", framework="pt") as tensors:
        mine = f"rank{machine.rank}."
        states = {key.removeprefix(mine): tensors.get_tensor(key) for key in tensors.keys() if key.startswith(mine)}  # noqa: SIM118
    if state.pop("world") == machine.world and machine.device.type in states:
        set_random_state(machine.device, states)
    else:
        torch.manual_seed(torch.initial_seed() + 1_000_003 * state["step"])
    scaler = state.pop("scaler")
    if scaler and machine.scaler.is_enabled():
        machine.scaler.load_state_dict(scaler)
    return state


def _difference(before: AdapterConfig, now: AdapterConfig) -> str:
    return ", ".join(f"{field.name} {getattr(before, field.name)} and now {getattr(now, field.name)}" for field in dataclasses.fields(now)
                     if field.compare and getattr(before, field.name) != getattr(now, field.name))  # fmt: skip


def _optimizer_remembers(step: Path) -> set[str]:
    """The parameters for which a step holds the optimizer's memory; none before the first step that was taken."""
    names = set()
    for file in step.glob("optimizer*.safetensors"):
        with safe_open(file, framework="pt") as tensors:
            names |= {key.rpartition(":")[0] for key in tensors.keys()}  # noqa: SIM118 - not a dict
    return names
