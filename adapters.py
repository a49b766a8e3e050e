"""Adapters: what is trained beside a frozen model, and how it comes onto one. (adapter_files.py has what lies on disk.)

    AdapterFlags    the flags that every training stage has          AdapterConfig    what PEFT's adapter_config.json says
    attach          a Llama -> the same, frozen, with adapters that learn            first_values    what these begin as
"""

from __future__ import annotations

from settings import UserError, flag, read_json, too_small

import dataclasses
import difflib
import math
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from config import LlamaConfig
from layers import (
    STORAGES,
    EmbeddingLoRA,
    LoRA,
    PackedLinear,
    carrier,
    pack,
    row_lengths,
)
from model import Llama
from weights import shapes_of

ATTENTION, MLP = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")
EMBEDDING, HEAD = "embed_tokens", "lm_head"
TARGETS = (*ATTENTION, *MLP, EMBEDDING, HEAD)
GROUPS = {"all": ATTENTION + MLP, "attention": ATTENTION, "mlp": MLP}
ALSO = {"norm": ("input_layernorm", "post_attention_layernorm", "norm"), "embed": (EMBEDDING,), "head": (HEAD,)}
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
    lora_dropout: float = flag(0.0, "of the adapter's input; the head's adapter has none")
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
        for word in _words(self.lora_targets):
            name, equals, own = word.partition("=")
            if name not in TARGETS and name not in GROUPS:
                close = difflib.get_close_matches(name, TARGETS, 1)
                meant = f" (meant {close[0]}?)" if close else ""
                found.append(f"--lora-targets: there is no module {name!r}{meant}; there are {', '.join(TARGETS)}, and "
                             f"{', '.join(GROUPS)} for several")  # fmt: skip
            elif equals and not _rank_and_alpha(own):
                found.append(f"--lora-targets {word}: write NAME=RANK or NAME=RANK/ALPHA, both above 0")
        if strange := [name for name in _words(self.train_also) if name not in ALSO]:
            found.append(f"--train-also {', '.join(strange)}: there are {', '.join(ALSO)}")
        return found

    def adapter(self, llama: LlamaConfig, dtype: torch.dtype = torch.float32) -> AdapterConfig | None:
        """What to train on a model of this architecture, in this dtype of the matrix products; None: all of it.

        Raises UserError for what does not fit it: a rank that a matrix is too small for, an adapter on a tied head. (The flags by
        themselves have passed adapter_problems.)
        """
        if self.lora_rank is None:
            return None
        if self.dora and dtype != torch.float32 and (self.fsdp or self.deepspeed not in (None, "1")):
            raise UserError("--dora changes the lengths of rows by less than half precision tells apart, and --fsdp and --deepspeed 2 and "
                            "3 compute with rounded parameters: use DDP or --deepspeed 1, or --dtype fp32")  # fmt: skip
        where = "--lora-targets"
        ranks, alphas, targets = {}, {}, []
        for word in _words(self.lora_targets):
            name, _, own = word.partition("=")
            rank, alpha = _rank_and_alpha(own) or (None, None)
            for target in GROUPS.get(name, (name,)):
                targets += [target] if target not in targets else []
                ranks |= {target: rank} if rank else {}
                alphas |= {target: alpha} if alpha else {}
        also = _words(self.train_also)
        if llama.tie_word_embeddings and "head" in also and "embed" not in also:
            raise UserError("--train-also head: embedding and head are one matrix in this model; --train-also embed trains it")
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
            named = self.targets if isinstance(self.targets, str) else ", ".join(self.targets) or "of those, as none is named"
            raise UserError(f"{where}: the model has no module {named}; there are {', '.join(TARGETS)}")
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


def _rank_and_alpha(text: str) -> tuple[int, float | None] | None:
    """What stands behind NAME= in --lora-targets; None if it is no RANK or RANK/ALPHA."""
    rank, slash, alpha = text.partition("/")
    try:
        found = int(rank), float(alpha) if slash else None
    except ValueError:
        return None
    return found if found[0] > 0 and (found[1] is None or 0 < found[1] < math.inf) else None


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
    except (re.error, OverflowError, RecursionError):  # a repetition or a depth that no machine has
        return False


def _pattern(value, fits: Callable[[object], bool]) -> bool:
    return isinstance(value, dict) and all(_expression(f"({key})") and fits(own) for key, own in value.items())


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
