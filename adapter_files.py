"""Adapter directories: PEFT's files, read and written, and adapters merged into a model or hung beside its packed weights.

    adapter_config.json         rank, alpha, which modules …, as PEFT spells them (adapters.AdapterConfig)
    adapter_model.safetensors   what was trained and nothing else
    adapter_base.json           ours: which base it was trained on (a fingerprint of its weights), how that was stored and scaled

    open_adapter    a directory -> an Adapter, checked against the base
    merge           the base's tensors -> those of one model, one at a time          hang    beside a base that is packed
"""

from __future__ import annotations

from settings import UserError, read_json

import dataclasses
import hashlib
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from adapters import EMBEDDING, HEAD, AdapterConfig, places
from config import LlamaConfig
from files import write_json
from layers import STORAGES, LoRA, carrier, merged
from model import Llama
from runs import damage, newest_step
from weights import Lazy, check_dtypes, not_finite, parameters_in, same_bits, shapes_of, storage_of, tensors_in

CONFIG, BASE = "adapter_config.json", "adapter_base.json"
PREFIX = "base_model.model."  # PEFT's, before every name
KINDS = r"lora_A\.weight|lora_B\.weight|lora_magnitude_vector|lora_embedding_A|lora_embedding_B"


def is_adapter(path: Path) -> bool:
    return (Path(path) / CONFIG).exists()


def adapter_dir(path) -> Path:
    """The directory with the adapter's files: `path`, or the newest intact step of the run `path`. UserError if it is neither."""
    path = Path(path)
    if not path.exists():
        raise UserError(f"--adapter {path} does not exist; an adapter directory holds {CONFIG} and adapter_model.safetensors")
    if is_adapter(path):
        if (path / "manifest.json").exists() and (problem := damage(path, without=("optimizer", "random", "state"))):
            raise UserError(f"--adapter {path} is damaged: {problem}; use another step of the run, or copy it again from where it is whole")
        return path
    step = newest_step(path) if path.is_dir() else None
    if step is None or not is_adapter(step):
        model = ", but a model" if (path / "config.json").exists() else ""
        raise UserError(f"--adapter {path} has no {CONFIG}: it is no adapter{model}")
    return step


def peft_key(name: str) -> str:
    """The name of a parameter of ours in adapter_model.safetensors."""
    return PREFIX + name.replace(".adapters.0", "")


def adapter_tensors(model: Llama, read: Callable[[str], Tensor], dtype: torch.dtype) -> dict[str, Lazy]:
    """What adapter_model.safetensors holds: all parameters that learn, by PEFT's names. read(name) gives a whole one."""
    tensors = {peft_key(name): Lazy(shape, dtype, partial(read, name)) for name, shape in model.trained_shapes().items()}
    embedding = f"model.{EMBEDDING}.weight"
    if model.config.tie_word_embeddings and peft_key(embedding) in tensors:  # PEFT wants both modules of a tied pair
        again = dataclasses.replace(tensors[peft_key(embedding)], read=lambda: read(embedding).clone())
        tensors[peft_key(f"{HEAD}.weight")] = again
    return tensors


def write_adapter_descriptions(path: Path, config: AdapterConfig, llama: LlamaConfig) -> None:
    """The JSON files beside the tensors, adapter_config.json last."""
    if config.base is not None:
        write_json(path / BASE, config.base)
    write_json(path / CONFIG, config.to_dict(llama.tie_word_embeddings))


def base_facts(directory: Path, llama: LlamaConfig, storage: str, path: Path | None = None) -> dict:
    """What adapter_base.json says of the model that an adapter is trained on. `llama`: as it is read, RoPE scaling included. `path`: what
    the user calls it, which is what the adapter names as its base."""
    return {"path": str(path or directory), "fingerprint": fingerprint(directory, llama), "storage": storage, "config": llama.to_dict()}


def with_base(adapter: AdapterConfig, directory: Path, llama: LlamaConfig, config, parallel) -> AdapterConfig:
    """The adapter of a run that begins, with what is known of the base in `directory`; its storage is as --base-quant says or as it lies
    there, and dense where the model is shared out. All ranks call it. Raises UserError for a base that is quantised already."""

    def facts() -> dict:
        storage = "none" if parallel.sharded else storage_of(directory, config.base_quant)
        return base_facts(directory, llama, storage, config.init_from)

    return dataclasses.replace(adapter, base=parallel.machine.on_main(facts))


def fingerprint(directory: Path, llama: LlamaConfig) -> str:
    """Tells one model's weights from another's: a hash of sixteen numbers of every tensor in bf16. The same for the same model in
    other shards, other files, fp32 or bf16."""
    digest = hashlib.sha256()
    for name, lazy in parameters_in(directory, llama, mapped=True)[0].items():
        values = lazy.read().reshape(-1)
        places = torch.linspace(0, len(values) - 1, min(16, len(values)), dtype=torch.float64).long()
        digest.update(name.encode() + values[places].to(torch.bfloat16).view(torch.int16).numpy().tobytes())
    return digest.hexdigest()[:16]


@dataclass(frozen=True)
class Adapter:
    """An adapter in its files. `parts`: module -> its tensors by their PEFT name; `whole`: parameter -> the tensor in its place."""

    path: Path
    config: AdapterConfig
    parts: dict[str, dict[str, Lazy]]
    whole: dict[str, Lazy]
    base: dict | None  # adapter_base.json, of ours only

    def touches(self, parameter: str) -> bool:
        return parameter in self.whole or parameter.removesuffix(".weight") in self.parts

    def merge(self, parameter: str, weight: Tensor) -> Tensor:
        """The parameter, float32, after this adapter. Unchanged if it does not touch it."""
        if parameter in self.whole:  # beside an adapter on the embedding or the head PEFT keeps a copy of what it is for
            weight = self._finite(parameter, self.whole[parameter]).float()
        module = parameter.removesuffix(".weight")
        parts = {name: self._finite(f"{module}.{name}", lazy) for name, lazy in self.parts.get(module, {}).items()}
        if not parts:
            return weight
        scale = self.config.at(module)[1]
        if "lora_embedding_A" in parts:
            return merged(weight.T, parts["lora_embedding_A"], parts["lora_embedding_B"], scale).T.contiguous()
        return merged(weight, parts["lora_A.weight"], parts["lora_B.weight"], scale, parts.get("lora_magnitude_vector"))

    def _finite(self, name: str, lazy: Lazy) -> Tensor:
        tensor = lazy.read()
        if not_finite(tensor):
            raise UserError(f"{self.path}: {name} holds values that are not finite: its training failed, or the file is damaged")
        return tensor

    def layer(self, module: str, rows: int, columns: int, dtype: torch.dtype) -> LoRA:
        """The adapter of a module as a layer, with its values: for a base that cannot take them in. Its products are in dtype."""
        rank, scale = self.config.at(module)
        lora = LoRA(rows, columns, rank, scale, dora=self.config.dora)
        lora.load_state_dict({name: self._finite(f"{module}.{name}", lazy).float() for name, lazy in self.parts[module].items()})
        lora.lora_A.to(dtype), lora.lora_B.to(dtype)
        return lora.requires_grad_(False)


def open_adapter(path, llama: LlamaConfig, base: Path | None = None) -> Adapter:
    """An adapter for a model of this architecture, its tensors still on disk. `base`: that model's directory, to compare fingerprints.

    Raises UserError where a part is missing, unknown or of another shape, and where the adapter was trained on other weights.
    """
    path = adapter_dir(path)
    config, own = AdapterConfig.from_json(path / CONFIG), read_base(path)
    config.check(llama, path / CONFIG)
    file = next((path / name for name in ("adapter_model.safetensors", "adapter_model.bin") if (path / name).exists()), None)
    if file is None:
        raise UserError(f"{path} has {CONFIG} and no adapter_model.safetensors: only half of an adapter; copy the other half there too")
    tensors = tensors_in(file)
    check_dtypes(tensors, file)
    parts, whole = _sorted(path, tensors, llama)
    expected = config.modules(llama)
    _check_parts(path, config, parts, expected)
    missing = [f"{module}.{name}" for module in expected for name in _kinds(module, config)
               if name not in parts.get(module, {})]  # fmt: skip
    missing += [name for name in config.whole(llama) if name not in whole]
    if missing:
        raise UserError(f"{file} has no {_some(missing)}: it is incomplete, or for a model with fewer layers")
    if base is not None and own and own.get("fingerprint") not in (None, found := fingerprint(base, llama)):
        raise UserError(f"{path} was trained on {own.get('path')} with the fingerprint {own['fingerprint']}, and {base} has {found}: other "
                        f"weights of the same shape. To use it all the same, remove {path / BASE}")  # fmt: skip
    return Adapter(path, config, parts, whole, own)


def read_base(path: Path) -> dict | None:
    """adapter_base.json of an adapter directory, with the base's architecture as "config"; None where PEFT alone wrote it. UserError
    if it is damaged."""
    if not (path / BASE).exists():
        return None
    stored = read_json(path / BASE)
    try:
        LlamaConfig.from_dict(stored["config"])
        if stored["storage"] not in STORAGES:
            raise UserError(f"no storage is called {stored['storage']}")
    except (KeyError, TypeError, AttributeError, UserError) as error:
        raise UserError(f"{path / BASE} is damaged ({error}); without that file the adapter works too, but its base is not "
                        "checked") from None  # fmt: skip
    return stored


def scaled(llama: LlamaConfig, adapters: Sequence[Path]) -> LlamaConfig:
    """An architecture as it is read with these adapters: one that was trained with RoPE scaling brings that with it."""
    for base in map(read_base, adapters):
        if base and (trained := LlamaConfig.from_dict(base["config"])).rope_scaling:
            llama = dataclasses.replace(llama, rope_scaling=trained.rope_scaling, max_position_embeddings=trained.max_position_embeddings)
    return llama


def _sorted(path: Path, tensors: dict[str, Lazy], llama: LlamaConfig) -> tuple[dict[str, dict[str, Lazy]], dict[str, Lazy]]:
    """(parts, whole) of an Adapter. Raises UserError for what this model has no place for."""
    parts, whole, strange = {}, {}, []
    sizes, shapes, tied = places(llama), shapes_of(llama), llama.tie_word_embeddings
    if tied:
        shapes[f"{HEAD}.weight"] = shapes[f"model.{EMBEDDING}.weight"]
    for key, lazy in tensors.items():
        if ".original_module." in key:  # a live PEFT model's copy of what it replaces
            continue
        name = _canonical(key)
        found = re.fullmatch(rf"(.+)\.({KINDS})", name)
        if found and found[1] in sizes:
            parts.setdefault(found[1], {})[found[2]] = lazy
        elif name in shapes:
            whole[name] = lazy
        else:
            strange.append(name)
    if strange:
        raise UserError(f"{path} is an adapter for another model: this one has no {_some(strange)}")
    for name, lazy in whole.items():
        if lazy.shape[1:] == shapes[name][1:] and name.endswith((f"{EMBEDDING}.weight", f"{HEAD}.weight")) and lazy.shape != shapes[name]:
            raise UserError(f"{path} was trained with a vocabulary of {lazy.shape[0]:,} tokens, and this model has {llama.vocab_size:,}: "
                            "convert.py resize-vocab gives it the rows; use the adapter with what that writes")  # fmt: skip
        if lazy.shape != shapes[name]:
            raise UserError(f"{path} is an adapter for another model: {name} is {tuple(lazy.shape)}, and this one's is "
                            f"{tuple(shapes[name])}")  # fmt: skip
    head, embedding = whole.pop(f"{HEAD}.weight", None) if tied else None, whole.get(f"model.{EMBEDDING}.weight")
    if tied and head is not embedding and (None in (head, embedding) or not same_bits(head.read(), embedding.read())):
        raise UserError(f"{path} was trained with an embedding and a head that are not the same; in this model they are one matrix. PEFT "
                        "trains them as one with ensure_weight_tying")  # fmt: skip
    return parts, whole


def _check_parts(path: Path, config: AdapterConfig, parts: dict[str, dict[str, Lazy]], expected: dict[str, tuple[int, int]]) -> None:
    """Raises UserError where adapters are not what adapter_config.json says, or not of this model's shapes."""
    for module, tensors in parts.items():
        for name, lazy in tensors.items():
            if module not in expected or name not in _kinds(module, config):
                raise UserError(f"{path} has {module}.{name}, which its {CONFIG} does not ask for: one of the two files is another's")
            if 0 in lazy.shape:
                raise UserError(f"{path}: {module}.{name} is empty, as DeepSpeed's stage 3 leaves it when weights are not gathered to be "
                                "saved; save it again where it was trained")  # fmt: skip
            wanted = _shape(name, *expected[module], config.at(module)[0])
            if lazy.shape != wanted:
                raise UserError(f"{path} is an adapter for another model: {module}.{name} is {tuple(lazy.shape)}; on this one, at the rank "
                                f"in {CONFIG}, it is {wanted}")  # fmt: skip


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _canonical(key: str) -> str:
    """Our name of what PEFT, an older PEFT, or a live PEFT model calls so."""
    name = key.removeprefix(PREFIX)
    for inserted in (".default", ".base_layer", ".modules_to_save"):
        name = name.replace(inserted, "")
    return name.removesuffix(".weight") if name.endswith("lora_magnitude_vector.weight") else name


def _kinds(module: str, config: AdapterConfig) -> list[str]:
    if module.endswith(EMBEDDING):
        return ["lora_embedding_A", "lora_embedding_B"]
    return ["lora_A.weight", "lora_B.weight"] + ["lora_magnitude_vector"] * config.dora


def _shape(kind: str, rows: int, columns: int, rank: int) -> tuple[int, ...]:
    return {"A": (rank, rows), "B": (columns, rank)}.get(kind.removesuffix(".weight")[-1], (columns,))


def merge(tensors: dict[str, Lazy], adapters: Sequence[Adapter]) -> dict[str, Lazy]:
    """A model's tensors with adapters merged into them, in order. Each is computed in float32 as it is read, then cast back."""

    def read(name: str, lazy: Lazy) -> Tensor:
        weight = lazy.read()
        for adapter in adapters:
            weight = adapter.merge(name, weight)
        return weight.to(lazy.dtype)

    return {name: Lazy(lazy.shape, lazy.dtype, partial(read, name, lazy)) if any(a.touches(name) for a in adapters) else lazy
            for name, lazy in tensors.items()}  # fmt: skip


def hang(model: Llama, adapters: Sequence[Adapter], beside: Iterable[str]) -> None:
    """Put adapters beside the projections of these names, in order, to run and not to train: where merging would round away what
    they learned. A packed layer takes a weight that was trained whole in place of its own, and of all that was put beside it."""
    norm = model.model.norm.weight
    for adapter in adapters:
        for name in beside:
            module = name.removesuffix(".weight")
            layer = model.get_submodule(module)
            if name in adapter.whole:
                layer.store(adapter.whole[name].read().to(norm.device), name)
                del layer.adapters[:]
            if module in adapter.parts:
                layer = carrier(layer)
                model.set_submodule(module, layer)
                layer.adapters.append(adapter.layer(module, layer.in_features, layer.out_features, norm.dtype).to(norm.device))
