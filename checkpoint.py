"""The disk: model directories in Hugging Face's layout, and training state that survives a crash.

    load_model, save_model      config.json + safetensors (one file or shards) + tokenizer: what transformers reads
    open_run                    a run directory: fresh, to be resumed, finished, or somebody else's
    save_state, load_state      step-000200/: weights in fp32, optimizer, scaler, random numbers, position in the data

A step directory is complete or absent: written beside, fsynced, renamed, with a manifest.json of sizes and sha256.
No file here can execute code when read: weights and state are safetensors and JSON, foreign .bin files are read with
weights_only=True.
"""

from __future__ import annotations

from settings import UserError, config_to_dict, read_json

import hashlib
import json
import os
import pickle
import re
import shutil
import sys
import zipfile
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from files import file_sha256, fsync_directory, lock, write_json, written_beside
from model import Llama, LlamaConfig
from tokenizer import Tokenizer, load_tokenizer

SHARD_BYTES = 5 * 10**9  # Hugging Face's customary shard size
STEP_NAME = re.compile(r"step-(\d{6,})$")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

# ----------------------------------------------------------------------------------------------------------------------
# Models


def resolve_model_dir(path) -> Path:
    """The directory that holds the weights: `path` itself, or the newest intact step of the run `path`.

    Raises UserError when there is neither.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path} does not exist; a model directory holds config.json and model.safetensors")
    if (path / "config.json").exists() and _weight_files(path):
        return path
    step = newest_step(path) if path.is_dir() else None
    if step is None:
        raise UserError(f"{path} is no model directory: no config.json with model.safetensors, and no complete step inside")
    return step


def _weight_files(directory: Path) -> list[Path]:
    """The files holding the weights; safetensors before .bin. Raises UserError if the index names a missing file."""
    for single, index in (("model.safetensors", "model.safetensors.index.json"),
                          ("pytorch_model.bin", "pytorch_model.bin.index.json")):  # fmt: skip
        if (directory / single).exists():
            return [directory / single]
        if (directory / index).exists():
            weight_map = read_json(directory / index).get("weight_map")
            if not isinstance(weight_map, dict):
                raise UserError(f"{directory / index} has no weight_map")
            names = sorted(set(weight_map.values()))
            missing = [name for name in names if not (directory / name).exists()]
            if missing:
                raise UserError(f"{directory / index} names {', '.join(missing)}, which {'is' if len(missing) == 1 else 'are'} missing")
            return [directory / name for name in names]
    return []


def open_model_dir(path, rope_scaling: str = "none", rope_factor: float = 1.0) -> tuple[Path, LlamaConfig, Tokenizer]:
    """What a model is, before its weights are read: its directory, architecture (scaled, if asked for) and tokenizer.

    Raises UserError when one is missing or broken, or when the tokenizer is larger than the model's vocabulary.
    """
    directory = resolve_model_dir(path)
    config = LlamaConfig.from_json(directory)
    if rope_scaling != "none":
        config = config.with_rope_scaling(rope_scaling, rope_factor)
    tokenizer = load_tokenizer(directory)
    if len(tokenizer) > config.vocab_size:
        raise UserError(f"the tokenizer of {directory} has {len(tokenizer)} entries, its model only {config.vocab_size}")
    return directory, config, tokenizer


def load_model(path, device="cpu", dtype: torch.dtype | None = None, config: LlamaConfig | None = None) -> Llama:
    """Read a Llama from a Hugging Face directory, or from the newest intact step of a run.

    Tensor by tensor: no second copy of the model is ever in memory. dtype None keeps the file's. `config` replaces
    the directory's (with other RoPE scaling, say). Raises UserError that names every missing, unknown or misshapen tensor.
    """
    directory = resolve_model_dir(path)
    config = config or LlamaConfig.from_json(directory)
    with torch.device("meta"):
        model = Llama(config)
    wanted = dict(model.state_dict())
    if config.tie_word_embeddings:
        del wanted["lm_head.weight"]
    state, problems = {}, []
    for name, tensor in _tensors(directory):
        if name.endswith("rotary_emb.inv_freq") or (name == "lm_head.weight" and config.tie_word_embeddings):
            continue  # written by old tools; computed here
        if name not in wanted:
            problems.append(f"{name} is unknown")
        elif tensor.shape != wanted[name].shape:
            problems.append(f"{name} is {tuple(tensor.shape)} and config.json says {tuple(wanted[name].shape)}")
        else:
            state[name] = tensor.to(device=device, dtype=dtype or tensor.dtype)
    misshapen = {problem.partition(" ")[0] for problem in problems}
    problems += [f"{name} is missing" for name in wanted if name not in state and name not in misshapen]
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise UserError(f"{directory} does not fit its config.json: {'; '.join(problems[:5])}{more}")
    model.load_state_dict(state, strict=False, assign=True)
    model.tie_weights()
    return model.requires_grad_(True)


def _tensors(directory: Path):
    """Yield (name, tensor) from every weight file."""
    for file in _weight_files(directory):
        try:
            if file.suffix == ".safetensors":
                with safe_open(file, framework="pt") as tensors:
                    for name in tensors.keys():  # noqa: SIM118 - not a dict
                        yield name, tensors.get_tensor(name)
            else:
                mmap = zipfile.is_zipfile(file)  # files older than torch 1.6 are not
                yield from torch.load(file, map_location="cpu", weights_only=True, mmap=mmap).items()
        except pickle.UnpicklingError:
            raise UserError(f"{file} is no file of tensors, or holds code beside them, which is never run; "
                            "convert it to safetensors where it comes from") from None
        except (SafetensorError, RuntimeError, EOFError) as error:
            raise UserError(f"{file} cannot be read ({error}); it may be truncated: copy or download it again") from None


def weights_identity(directory: Path) -> str:
    """Tells one set of weights from another without reading all of it: names, sizes, and both ends of every file."""
    digest = hashlib.sha256()
    for file in _weight_files(directory):
        with file.open("rb") as stream:
            head = stream.read(1 << 16)
            stream.seek(max(0, file.stat().st_size - (1 << 16)))
            digest.update(f"{file.name} {file.stat().st_size} ".encode() + head + stream.read())
    return digest.hexdigest()


def save_model(model: Llama, path, tokenizer: Tokenizer | None = None, *, dtype: torch.dtype | None = None,
               template: str | None = None, shard_bytes: int = SHARD_BYTES) -> None:  # fmt: skip
    """Write a complete Hugging Face directory; each file is complete or absent, config.json comes last.

    dtype None keeps the parameters' own. The tokenizer is written beside, with its chat template.
    """
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    state = {name: tensor for name, tensor in model.state_dict().items()
             if not (name == "lm_head.weight" and model.config.tie_word_embeddings)}  # fmt: skip
    size = lambda t: t.numel() * torch.empty((), dtype=dtype or t.dtype).element_size()  # noqa: E731
    shards: list[dict[str, Tensor]] = [{}]
    for name, tensor in state.items():
        if shards[-1] and sum(map(size, shards[-1].values())) + size(tensor) > shard_bytes:
            shards.append({})
        shards[-1][name] = tensor
    names = ["model.safetensors"] if len(shards) == 1 else [
        f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]  # fmt: skip
    for name, shard in zip(names, shards):
        with written_beside(path / name) as temporary:
            save_file({key: t.detach().to("cpu", dtype or t.dtype).contiguous() for key, t in shard.items()},
                      temporary, metadata={"format": "pt"})  # fmt: skip
    if len(shards) > 1:
        total = sum(map(size, state.values()))
        weight_map = {key: name for name, shard in zip(names, shards) for key in shard}
        write_json(path / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map})
    if tokenizer is not None:
        tokenizer.save(path, template=template)
    config = model.config.to_dict()
    config["torch_dtype"] = str(dtype or next(iter(state.values())).dtype).removeprefix("torch.")
    generation = {"bos_token_id": config["bos_token_id"], "eos_token_id": config["eos_token_id"]}
    if tokenizer is not None:
        stops = tokenizer.stop_ids(template) if template or tokenizer.template else [tokenizer.eos_id]
        generation = {"bos_token_id": tokenizer.bos_id, "eos_token_id": stops[0] if len(stops) == 1 else stops}
    write_json(path / "generation_config.json", {**generation, "do_sample": True, "temperature": 0.7, "top_p": 0.9})
    write_json(path / "config.json", config)


# ----------------------------------------------------------------------------------------------------------------------
# Runs


def open_run(out: Path, config, *, resume: str, harmless: set[str], identity: dict) -> Path | None:
    """Decide what a stage does with its output directory. Call it on every rank; it writes nothing.

    Returns the step directory to go on from, or None for a fresh start. Raises `Finished` when the run is complete.
    Raises UserError when the directory holds something else, or the same run with other settings (those in `harmless`
    cannot change the result); `identity` is what the run's input was (data, tokenizer, first weights).
    """
    out = Path(out)
    named = None
    if resume not in ("auto", "never"):
        named = Path(resume) if STEP_NAME.search(Path(resume).name) else newest_step(Path(resume))
        if named is None or not is_intact(named):
            raise UserError(f"--resume {resume}: no intact step there (auto, never, a run or one of its steps)")
    parent = next(path for path in (out, *out.absolute().parents) if path.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise UserError(f"--out {out}: {parent} is {'not writable' if parent.is_dir() else 'not a directory'}")
    newest = newest_step(out) if out.is_dir() else None
    if named and (newest is None or named.resolve() != newest.resolve()):  # a branch of another run: its settings may differ
        if out.exists() and any(out.iterdir()):
            raise UserError(f"--out {out} already holds something: to go on from {named}, choose another directory")
        return named
    if not out.is_dir() or not set(os.listdir(out)) - {".lock"}:
        return None
    if not (out / "args.json").exists():
        raise UserError(f"--out {out} holds something that is not a run of ours; choose another directory")
    if resume == "never":
        raise UserError(f"--out {out} already holds a run; choose another directory, delete it, or leave out --resume never")
    if not steps(out) and not (out / "config.json").exists():
        return None  # it ended before there was anything to keep
    stored = read_json(out / "args.json")
    before, now = stored.pop("run", {}).get("identity", {}), config_to_dict(config)
    different = [f"--{key.replace('_', '-')} was {stored.get(key)} and is {value}" for key, value in now.items()
                 if key not in harmless and stored.get(key) != _as_json(value)]  # fmt: skip
    different += [f"{key} has changed" for key, value in identity.items() if before.get(key) != value]
    if different:
        raise UserError(f"--out {out} holds a run with other settings: {'; '.join(different)}. "
                        "Choose another --out, or the same settings to go on")
    if (out / "config.json").exists():
        raise Finished(out)
    return newest


class Finished(Exception):
    """The run in this directory is complete: nothing is left to do."""


def _as_json(value):
    return json.loads(json.dumps(value))


def lock_run(out: Path):
    """Reserve the run for this process: the lock is the returned open file, and ends with it. UserError if it is taken."""
    return lock(out / ".lock", f"another process is training in --out {out}; wait for it, or choose another directory")


def start_run(out: Path, config, identity: dict, facts: dict) -> None:
    """Create the run directory with args.json: the settings, and under "run" what they met (never read as settings)."""
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "args.json", {**config_to_dict(config), "run": {"identity": identity, **facts}})


def steps(out: Path) -> list[Path]:
    """The step directories of a run, oldest first."""
    return sorted((p for p in Path(out).glob("step-*") if STEP_NAME.search(p.name)), key=lambda p: int(p.name[5:]))


def newest_step(out: Path) -> Path | None:
    """The newest step whose files are all there and unchanged; a broken one is named on stderr and passed over."""
    for step in reversed(steps(out)):
        if is_intact(step):
            return step
        print(f"warning: {step} is incomplete or damaged; using the one before it", file=sys.stderr)
    return None


def is_intact(step: Path) -> bool:
    try:
        files = json.loads((step / "manifest.json").read_text(encoding="utf-8"))["files"]
        return all((step / name).stat().st_size == entry["size"] and file_sha256(step / name) == entry["sha256"]
                   for name, entry in files.items())  # fmt: skip
    except (OSError, ValueError, KeyError):
        return False


def save_state(out: Path, step: int, *, model: Llama, tokenizer: Tokenizer, optimizer: torch.optim.Optimizer,
               machine, progress: dict, template: str | None = None, keep: int = 2) -> Path:  # fmt: skip
    """Write out/step-NNNNNN: a model directory in fp32 plus all that decides the next step. Call it on every rank.

    `progress` is the stage's own state (JSON). The newest `keep` steps stay.
    """
    random_states = machine.gather(_random_state(machine.device))
    target = Path(out) / f"step-{step:06d}"
    if machine.main:
        partial = target.with_name(f".{target.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        try:
            save_model(model, partial, tokenizer, dtype=torch.float32, template=template)
            with written_beside(partial / "optimizer.safetensors") as temporary:
                save_file(_optimizer_tensors(model, optimizer), temporary)
            with written_beside(partial / "random.safetensors") as temporary:
                save_file({f"rank{r}.{kind}": t for r, states in enumerate(random_states) for kind, t in states.items()}, temporary)
            write_json(partial / "state.json", {"step": step, "scaler": machine.scaler.state_dict(), **progress})
            names = sorted(p.name for p in partial.iterdir())
            write_json(partial / "manifest.json", {"files": {
                name: {"size": (partial / name).stat().st_size, "sha256": file_sha256(partial / name)} for name in names}})  # fmt: skip
            fsync_directory(partial)
            shutil.rmtree(target, ignore_errors=True)
            os.replace(partial, target)
            fsync_directory(out)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        for old in steps(out)[:-keep]:
            shutil.rmtree(old)
    machine.barrier()
    return target


def load_state(step: Path, *, stage: str, model: Llama, optimizer: torch.optim.Optimizer, machine) -> dict:
    """Put a step's weights, optimizer, scaler and random numbers back; return its `progress` with "step".

    Raises UserError if another stage wrote it.

    With another number of ranks, ranks beyond the saved ones keep their fresh random numbers.
    """
    progress = read_json(step / "state.json")
    if progress["stage"] != stage:
        raise UserError(f"--resume {step}: this is a step of {progress['stage']}.py; to build on its weights use --init-from {step}")
    loaded = load_model(step, device="cpu", dtype=torch.float32, config=model.config)
    with torch.no_grad():
        for ours, theirs in zip(model.parameters(), loaded.parameters(), strict=True):
            ours.copy_(theirs)
    del loaded
    names = {parameter: name for name, parameter in model.named_parameters()}
    with safe_open(step / "optimizer.safetensors", framework="pt") as tensors:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                keys = [key for key in tensors.keys() if key.startswith(names[parameter] + ":")]  # noqa: SIM118
                # the fused kernel wants its step counter beside the parameters, the plain one wants it on the CPU
                step_device = machine.device if group.get("fused") else "cpu"
                optimizer.state[parameter] = {
                    key.rpartition(":")[2]: tensors.get_tensor(key).to(step_device if key.endswith(":step") else machine.device)
                    for key in keys}  # fmt: skip
    with safe_open(step / "random.safetensors", framework="pt") as tensors:
        for key in tensors.keys():  # noqa: SIM118
            if key.startswith(f"rank{machine.rank}."):
                kind, state = key.partition(".")[2], tensors.get_tensor(key)
                if kind == "cpu":
                    torch.set_rng_state(state)
                elif machine.device.type == kind:
                    getattr(torch, kind).set_rng_state(state)
    scaler = progress.pop("scaler")
    if scaler and machine.scaler.is_enabled():
        machine.scaler.load_state_dict(scaler)
    return progress


def _random_state(device: torch.device) -> dict[str, Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if device.type != "cpu":
        states[device.type] = getattr(torch, device.type).get_rng_state()
    return states


def _optimizer_tensors(model: Llama, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """AdamW's state as tensors named `parameter:exp_avg` …, in place of torch's pickled dictionary."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    return {f"{names[parameter]}:{key}": value.detach().cpu().contiguous()
            for parameter, state in optimizer.state.items() for key, value in state.items()}  # fmt: skip
