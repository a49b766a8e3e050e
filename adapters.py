"""Adapters: what LoRA training leaves on disk, and how it comes back onto a model. The directories are PEFT's.

    adapter_config.json         rank, alpha, which modules …, as PEFT spells them
    adapter_model.safetensors   what was trained and nothing else
    adapter_base.json           ours: which base it was trained on (a fingerprint of its weights), how that was stored and scaled

    AdapterFlags    the flags that every training stage has          AdapterConfig    what adapter_config.json says
    attach          a Llama -> the same, frozen, with adapters that learn
    open_adapter    a directory -> an Adapter, checked against the base
    merge           the base's tensors -> those of one model, one at a time
"""

from __future__ import annotations

from settings import UserError, flag, read_json, too_small

import dataclasses
import difflib
import hashlib
import math
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from config import LlamaConfig
from files import write_json
from layers import (
    STORAGES,
    EmbeddingLoRA,
    LoRA,
    PackedLinear,
    carrier,
    merged,
    pack,
    packed_layers,
    row_lengths,
)
from model import Llama
from runs import newest_step
from weights import Lazy, check_dtypes, parameters_in, same_bits, shapes_of, tensors_in

ATTENTION, MLP = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")
EMBEDDING, HEAD = "embed_tokens", "lm_head"
TARGETS = (*ATTENTION, *MLP, EMBEDDING, HEAD)
GROUPS = {"all": ATTENTION + MLP, "attention": ATTENTION, "mlp": MLP}
ALSO = {"norm": ("input_layernorm", "post_attention_layernorm", "norm"), "embed": (EMBEDDING,), "head": (HEAD,)}
CONFIG, BASE = "adapter_config.json", "adapter_base.json"
PREFIX = "base_model.model."  # PEFT's, before every name
# Settings of PEFT's that change what an adapter computes and that are not done here, with the value that leaves them out.
FOREIGN = {"bias": "none", "fan_in_fan_out": False, "lora_bias": False, "use_qalora": False, "use_bdlora": None, "layer_replication": None,
           "alora_invocation_tokens": None, "trainable_token_indices": None, "target_parameters": None, "arrow_config": None,
           "kasa_config": None, "velora_config": None, "monteclora_config": None}  # fmt: skip
# Ways to begin that take the adapter's first values out of the base's weights: what is saved then belongs to weights that nobody has.
CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclass(frozen=True, kw_only=True)
class AdapterFlags:
    """What every training stage asks about adapters. Without --lora-rank there is none: the model itself learns."""

    lora_rank: int | None = flag(None, "train a LoRA adapter of this rank beside the frozen model")
    lora_alpha: float | None = flag(None, "what it adds is multiplied by alpha / rank; default: twice the rank")
    lora_targets: tuple[str, ...] = flag(("all",), f"where: all (seven projections), attention, mlp, or names ({', '.join(TARGETS)}); "
                                         "NAME=RANK or NAME=RANK/ALPHA gives one its own")  # fmt: skip
    lora_dropout: float = flag(0.0, "of the adapter's input")
    dora: bool = flag(False, "DoRA: the lengths of the weights' rows learn apart from their directions")
    rslora: bool = flag(False, "multiply by alpha / sqrt(rank), so that high ranks are not held back")
    train_also: tuple[str, ...] = flag((), f"beside the adapter, train these whole: {', '.join(ALSO)}")
    base_quant: str = flag("none", "keep the frozen projections in 8 or about 4 bits; nf4-double: 4.13 (QLoRA)", choices=tuple(STORAGES))

    def adapter_problems(self) -> list[str]:
        """What is wrong with these flags, as far as it can be told without the model."""
        found = too_small(self, "lora_rank", least=1) + too_small(self, "lora_alpha") + too_small(self, "lora_dropout", least=0)
        if self.lora_dropout >= 1:
            found.append(f"--lora-dropout must be below 1, not {self.lora_dropout}")
        if self.lora_rank is None:
            defaults = {f.name: f.default for f in dataclasses.fields(AdapterFlags)}
            lone = [f"--{name.replace('_', '-')}" for name, default in defaults.items() if getattr(self, name) != default]
            found += [f"{', '.join(lone)} {'needs' if len(lone) == 1 else 'need'} --lora-rank"] if lone else []
        if self.base_quant != "none" and (self.fsdp or self.deepspeed not in (None, "1", "2")):
            found.append(f"--base-quant {self.base_quant} works on one device, with DDP and with --deepspeed 1 or 2: packed weights "
                         "cannot be shared out")  # fmt: skip
        return found

    def adapter(self, llama: LlamaConfig) -> AdapterConfig | None:
        """What to train on a model of this architecture; None: all of it.

        Raises UserError for unknown modules (it lists the valid ones), and for a rank that a matrix is too small for.
        """
        if self.lora_rank is None:
            return None
        where = "--lora-targets"
        ranks, alphas, targets = {}, {}, []
        for word in _words(self.lora_targets):
            name, _, own = word.partition("=")
            if name not in TARGETS and name not in GROUPS:
                close = difflib.get_close_matches(name, TARGETS, 1)
                meant = f" (meant {close[0]}?)" if close else ""
                raise UserError(f"{where}: there is no module {name!r}{meant}; there are {', '.join(TARGETS)}, and "
                                f"{', '.join(GROUPS)} for several")  # fmt: skip
            if own and not re.fullmatch(r"[1-9]\d*(/\d+(\.\d+)?)?", own):
                raise UserError(f"{where} {word}: write NAME=RANK or NAME=RANK/ALPHA")
            rank, _, alpha = own.partition("/")
            for target in GROUPS.get(name, (name,)):
                targets += [target] if target not in targets else []
                ranks |= {target: int(rank)} if rank else {}
                alphas |= {target: float(alpha)} if alpha else {}
        also = _words(self.train_also)
        if strange := [name for name in also if name not in ALSO]:
            raise UserError(f"--train-also {', '.join(strange)}: there are {', '.join(ALSO)}")
        config = AdapterConfig(
            rank=self.lora_rank, alpha=2.0 * self.lora_rank if self.lora_alpha is None else self.lora_alpha, targets=tuple(targets),
            dropout=self.lora_dropout, dora=self.dora, rslora=self.rslora, rank_pattern=ranks, alpha_pattern=alphas,
            modules_to_save=tuple(module for name in dict.fromkeys(also) for module in ALSO[name]))  # fmt: skip
        if both := [name for name in config.targets if name in config.modules_to_save]:
            raise UserError(f"{where}: {', '.join(both)} cannot have an adapter and, by --train-also, be trained whole; choose one")
        config.check(llama, where)
        for name, (rows, columns) in config.modules(llama).items():
            if (rank := config.at(name)[0]) > min(rows, columns):
                raise UserError(f"rank {rank} on {name}: its matrix is {columns} x {rows}, so the rank can be 1 to {min(rows, columns)}")
        return config


@dataclass(frozen=True)
class AdapterConfig:
    """What adapter_config.json says. Modules are named in full or by their last parts; targets, or what is excluded from them, that
    are one text are a regular expression. The patterns, expressions too, give single modules another rank or alpha."""

    rank: int
    alpha: float
    targets: tuple[str, ...] | str
    dropout: float = 0.0
    dora: bool = False
    rslora: bool = False
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    modules_to_save: tuple[str, ...] = ()
    excluded: tuple[str, ...] | str = ()
    layers: tuple[int, ...] | None = None
    base: dict | None = field(default=None, compare=False)  # adapter_base.json: what base_facts() found

    @classmethod
    def from_json(cls, path: Path) -> AdapterConfig:
        """Raises UserError for a file that is no LoRA's, that leaves out what it must say, or asks for what is not done here."""
        stored = read_json(path)
        if not isinstance(stored, dict) or stored.get("peft_type") != "LORA":
            kind = stored.get("peft_type") if isinstance(stored, dict) else None
            raise UserError(f"{path} describes no LoRA adapter: its peft_type is {kind}")
        if missing := [key for key in ("r", "lora_alpha", "target_modules") if stored.get(key) is None]:
            raise UserError(f"{path} does not say {', '.join(missing)}; what the adapter computes depends on it")
        stored |= {key: default for key, (default, _, _) in SETTINGS.items() if stored.get(key) is None}
        for key, (_, fits, wanted) in SETTINGS.items():
            if not fits(stored[key]):
                raise UserError(f"{path}: {key} is {stored[key]!r}, not {wanted}")
        if foreign := [f"{key} {stored[key]}" for key, off in FOREIGN.items() if (stored.get(key) or off) != off]:
            raise UserError(f"{path} asks for {', '.join(foreign)}, which is not done here; merge it with PEFT (merge_and_unload)")
        if str(begun := stored.get("init_lora_weights")).startswith(CHANGES_BASE):
            raise UserError(f"{path}: with init_lora_weights {begun} the base's weights were changed before training; merge it with PEFT, "
                            "or have PEFT save it for the weights as they were (path_initial_model_for_weight_conversion)")  # fmt: skip
        targets, excluded, layers = stored["target_modules"], stored["exclude_modules"], stored["layers_to_transform"]
        targets = GROUPS["all"] if targets == "all-linear" else targets if isinstance(targets, str) else tuple(targets)
        also = tuple(name for name in stored["modules_to_save"] if name != HEAD or not stored.get("ensure_weight_tying"))
        return cls(rank=stored["r"], alpha=float(stored["lora_alpha"]), targets=targets, dropout=float(stored["lora_dropout"]),
                   dora=stored["use_dora"], rslora=stored["use_rslora"], rank_pattern=stored["rank_pattern"],
                   alpha_pattern=stored["alpha_pattern"], modules_to_save=also,
                   excluded=excluded if isinstance(excluded, str) else tuple(excluded),
                   layers=((layers,) if isinstance(layers, int) else tuple(layers)) or None)  # fmt: skip

    def to_dict(self, tied: bool) -> dict:
        """As PEFT spells it. `tied`: the embedding is the head too."""
        also = list(self.modules_to_save) + [HEAD] * (tied and EMBEDDING in self.modules_to_save)
        return {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": self.base and self.base["path"],
                "r": self.rank, "lora_alpha": _whole(self.alpha), "lora_dropout": self.dropout,
                "target_modules": self.targets if isinstance(self.targets, str) else list(self.targets), "modules_to_save": also or None,
                "rank_pattern": self.rank_pattern, "alpha_pattern": {name: _whole(alpha) for name, alpha in self.alpha_pattern.items()},
                "use_rslora": self.rslora, "use_dora": self.dora, "bias": "none", "fan_in_fan_out": False, "inference_mode": True,
                "exclude_modules": (self.excluded if isinstance(self.excluded, str) else list(self.excluded)) or None,
                "layers_to_transform": None if self.layers is None else list(self.layers),
                "ensure_weight_tying": tied and EMBEDDING in also}  # fmt: skip

    def at(self, module: str) -> tuple[int, float]:
        """(rank, scale) of the adapter of a module. The first pattern that fits its end counts, as in PEFT."""
        rank, alpha = (next((own for key, own in pattern.items() if re.match(rf"(.*\.)?({key})$", module)), usual)
                       for pattern, usual in ((self.rank_pattern, self.rank), (self.alpha_pattern, self.alpha)))  # fmt: skip
        return rank, alpha / (math.sqrt(rank) if self.rslora else rank)

    def modules(self, llama: LlamaConfig) -> dict[str, tuple[int, int]]:
        """Name -> (in, out) of every module that gets an adapter; as in PEFT, none that is trained whole does. An embedding reads
        tokens, so there `in` is the vocabulary."""
        found = {}
        for name, size in places(llama).items():
            number = re.search(r"\.layers\.(\d+)\.", name)
            if self.layers is not None and (number is None or int(number[1]) not in self.layers):
                continue
            if _named(name, self.targets) and not _named(name, self.excluded) and not self._within_whole(name):
                found[name] = size
        return found

    def describe(self, llama: LlamaConfig, storage: str) -> str:
        kind = ("rank-stabilised " if self.rslora else "") + ("DoRA" if self.dora else "LoRA")
        where = list(dict.fromkeys(name.rpartition(".")[2] for name in self.modules(llama)))
        also = f", and {', '.join(self.modules_to_save)} whole" if self.modules_to_save else ""
        frozen = f"; the model is frozen, its projections in {storage}" if storage != "none" else "; the model is frozen"
        return f"{kind} of rank {self.rank}, alpha {self.alpha:g}, on {', '.join(where)}{also}{frozen}"

    def whole(self, llama: LlamaConfig) -> list[str]:
        """The parameters that are trained, and stored, as they are: those in modules_to_save, and in their parts."""
        return [name for name in shapes_of(llama) if self._within_whole(name)]

    def _within_whole(self, name: str) -> bool:
        return any(f".{module}." in f".{name}." for module in self.modules_to_save)

    def check(self, llama: LlamaConfig, where) -> None:
        """Raises UserError where this cannot be done on the architecture. `where` it was asked for."""
        modules = self.modules(llama)
        if not modules:
            raise UserError(f"{where}: the model has no module {self.targets}; there are {', '.join(TARGETS)}")
        outer = [name.rpartition(".")[2] for name in modules if name.endswith((EMBEDDING, HEAD))]
        if outer and llama.tie_word_embeddings:
            raise UserError(f"{where}: an adapter on {', '.join(outer)} would part embedding and head, which are one matrix in this model; "
                            "--train-also embed trains it whole")  # fmt: skip
        if EMBEDDING in outer and self.dora:
            raise UserError(f"{where}: DoRA is for matrices that multiply: take {EMBEDDING} out of the targets, or train it whole with "
                            "--train-also embed")  # fmt: skip


def _words(values: tuple[str, ...]) -> list[str]:
    """What was given, with commas or spaces between."""
    return [part for value in values for part in value.split(",") if part]


def _named(name: str, wanted: tuple[str, ...] | str) -> bool:
    if isinstance(wanted, str):
        return re.fullmatch(wanted, name) is not None
    return any(name == end or name.endswith("." + end) for end in wanted)


def _whole(number: float) -> float | int:
    return int(number) if float(number).is_integer() else number


def _count(value) -> bool:
    return type(value) is int and 0 < value < 2**31


def _number(value) -> bool:
    return type(value) in (int, float) and abs(value) < 1e30


def _switch(value) -> bool:
    return isinstance(value, bool)


def _names(value) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def _expression(value) -> bool:
    try:
        return isinstance(value, str) and re.compile(value) is not None
    except re.error:
        return False


def _pattern(value, fits: Callable[[object], bool]) -> bool:
    return isinstance(value, dict) and all(_expression(key) and fits(own) for key, own in value.items())


# What is read of adapter_config.json: key -> (what it is when it is not there, whether a value will do, what will do in words).
SETTINGS: dict[str, tuple[object, Callable[[object], bool], str]] = {
    "r": (None, _count, "a whole number above 0"),
    "lora_alpha": (None, _number, "a number"),
    "target_modules": (None, lambda value: _names(value) or _expression(value), "a list of names or a regular expression"),
    "exclude_modules": ([], lambda value: _names(value) or _expression(value), "a list of names or a regular expression"),
    "modules_to_save": ([], _names, "a list of names"),
    "lora_dropout": (0, _number, "a number"),
    "use_dora": (False, _switch, "true or false"),
    "use_rslora": (False, _switch, "true or false"),
    "rank_pattern": ({}, lambda value: _pattern(value, _count), "regular expressions and the rank of each"),
    "alpha_pattern": ({}, lambda value: _pattern(value, _number), "regular expressions and the alpha of each"),
    "layers_to_transform": ([], lambda value: all(type(layer) is int for layer in (value if isinstance(value, list) else [value])),
                            "numbers of layers"),
}  # fmt: skip


def places(llama: LlamaConfig) -> dict[str, tuple[int, int]]:
    """Name -> (in, out) of every module that can have an adapter, in the model's order."""
    shapes = {name.removesuffix(".weight"): shape for name, shape in shapes_of(llama).items() if len(shape) == 2}
    shapes |= {HEAD: shapes[f"model.{EMBEDDING}"]} if HEAD not in shapes else {}
    return {name: (shape[0], shape[1]) if name.endswith(EMBEDDING) else (shape[1], shape[0]) for name, shape in shapes.items()}


# ----------------------------------------------------------------------------------------------------------------------
# On a model that is to be trained


def attach(model: Llama, config: AdapterConfig, storage: str = "none", dtype: torch.dtype = torch.float32) -> None:
    """Freeze a Llama and give it what learns: an adapter on every module of the config, and the parameters trained whole.

    The frozen projections are kept as `storage` says, what else is frozen in `dtype`. Adapters get their values later (first_values).
    """
    pack(model, storage)
    for name, (rows, columns) in config.modules(model.config).items():
        layer, (rank, scale) = carrier(model.get_submodule(name)), config.at(name)
        if name.endswith(EMBEDDING):
            layer.adapters.append(EmbeddingLoRA(rows, columns, rank, scale))
        else:
            layer.adapters.append(LoRA(rows, columns, rank, scale, config.dropout, config.dora))
        model.set_submodule(name, layer)
    whole = config.whole(model.config)
    for name, parameter in model.named_parameters():
        if ".adapters." in name or name in whole:
            parameter.requires_grad_(True)
        else:
            parameter.requires_grad_(False)
            parameter.data = parameter.data.to(dtype)
    model.tie_weights()
    model.adapter_shapes = {name: parameter.shape for name, parameter in model.named_parameters() if ".adapters." in name}


def first_values(tensors: Iterable[tuple[str, Tensor]], model: Llama, seed: int) -> Iterator[tuple[str, Tensor]]:
    """The base's (name, tensor) as they pass by, and behind each weight the first values of its adapter: at first it adds nothing.

    A is uniform in ±1/sqrt(in) (Kaiming's with a = sqrt 5, as loralib and PEFT have it), B is 0; for an embedding A is 0 and B normal.
    They depend on the seed and the module's name alone: not on rank, device or order. DoRA's magnitudes are measured on what the
    layer keeps of the weight, rounded as it is.
    """
    for name, tensor in tensors:
        yield name, tensor
        module = name.removesuffix(".weight")
        dice = torch.Generator("cpu").manual_seed(seed + zlib.crc32(module.encode()))
        for own in [own for own in model.adapter_shapes if own.startswith(f"{module}.adapters.")]:
            shape, kind = model.adapter_shapes[own], own.removeprefix(f"{module}.adapters.0.")
            if kind == "lora_A.weight":
                yield own, torch.empty(shape).uniform_(-1, 1, generator=dice) / math.sqrt(shape[1])
            elif kind == "lora_embedding_B":
                yield own, torch.empty(shape).normal_(generator=dice)
            elif kind == "lora_magnitude_vector":
                layer = model.get_submodule(module)
                kept = layer.stored(torch.float32) if isinstance(layer, PackedLinear) else tensor.to(layer.weight.dtype)
                yield own, row_lengths(kept)
            else:
                yield own, torch.zeros(shape)


# ----------------------------------------------------------------------------------------------------------------------
# Directories


def is_adapter(path: Path) -> bool:
    return (Path(path) / CONFIG).exists()


def adapter_dir(path) -> Path:
    """The directory with the adapter's files: `path`, or the newest intact step of the run `path`. UserError if it is neither."""
    path = Path(path)
    if not path.exists():
        raise UserError(f"--adapter {path} does not exist; an adapter directory holds {CONFIG} and adapter_model.safetensors")
    if is_adapter(path):
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


def base_facts(directory: Path, llama: LlamaConfig, storage: str) -> dict:
    """What adapter_base.json says of the model that an adapter is trained on. `llama`: as it is read, RoPE scaling included."""
    return {"path": str(directory.resolve()), "fingerprint": fingerprint(directory, llama), "storage": storage, "config": llama.to_dict()}


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
            weight = self.whole[parameter].read().float()
        module = parameter.removesuffix(".weight")
        parts = {name: lazy.read() for name, lazy in self.parts.get(module, {}).items()}
        if not parts:
            return weight
        scale = self.config.at(module)[1]
        if "lora_embedding_A" in parts:
            return merged(weight.T, parts["lora_embedding_A"], parts["lora_embedding_B"], scale).T.contiguous()
        return merged(weight, parts["lora_A.weight"], parts["lora_B.weight"], scale, parts.get("lora_magnitude_vector"))

    def layer(self, module: str, rows: int, columns: int, dtype: torch.dtype) -> LoRA:
        """The adapter of a module as a layer, with its values: for a base that cannot take them in. Its products are in dtype."""
        rank, scale = self.config.at(module)
        lora = LoRA(rows, columns, rank, scale, dora=self.config.dora)
        lora.load_state_dict({name: lazy.read().float() for name, lazy in self.parts[module].items()})
        lora.lora_A.to(dtype), lora.lora_B.to(dtype)
        return lora.requires_grad_(False)


KINDS = r"lora_A\.weight|lora_B\.weight|lora_magnitude_vector|lora_embedding_A|lora_embedding_B"


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
    if not isinstance(stored, dict) or not isinstance(stored.get("config"), dict):
        raise UserError(f"{path / BASE} is damaged; without that file the adapter works too, but its base is not checked")
    return stored


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


def hang(model: Llama, adapters: Sequence[Adapter]) -> None:
    """Put adapters beside the packed projections of a model, in order, to run and not to train."""
    dtype = model.model.norm.weight.dtype
    for adapter in adapters:
        for name, layer in packed_layers(model).items():
            device, module = next(layer.buffers()).device, name.removesuffix(".weight")
            if name in adapter.whole:  # it takes the place of the weight and of all that was put beside it
                layer.store(adapter.whole[name].read().to(device), name)
                del layer.adapters[:]
            if module in adapter.parts:
                layer.adapters.append(adapter.layer(module, layer.in_features, layer.out_features, dtype).to(device))
