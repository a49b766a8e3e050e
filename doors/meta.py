"""Meta's own checkpoints, as LLaMA-1 to Llama-3.3 were published.

    consolidated.00.pth …   one file for each tensor-parallel shard, 1 to 16: a dictionary of tensors
    params.json             dim, n_layers, n_heads, n_kv_heads, multiple_of, ffn_dim_multiplier, norm_eps, vocab_size, …
    tokenizer.model         sentencepiece (LLaMA-1, Llama-2) or tiktoken ranks (Llama-3); LLaMA-1 keeps it one folder up

What must be known to read them:

  * Rotary pairs are neighbours, rows 2k and 2k + 1 of a head, so the rows of wq and wk are reordered (weights.permute).
  * A shard has some heads (rows of wq, wk, wv, columns of wo), some of the hidden units (rows of w1, w3, columns of w2) and some
    rows of output. It has all of the norms. Of tok_embeddings it has some columns in LLaMA-1 and Llama-2, and some rows in
    Llama-3: the shapes tell which. With more shards than key/value heads, neighbouring shards hold copies of wk and wv.
  * params.json does not give the hidden size but a recipe for it (`hidden_size_of`). The tensors count.
  * LLaMA-1 and Llama-2 give the vocabulary as -1: it is the tokenizer's. Here the tensors count.
  * The length the model reads is nowhere (`_guess_length`), nor whether the embeddings are tied, nor bos, eos, and padding.
  * The factor of Llama-3.1's RoPE scaling is nowhere either, only that there is one. It is 8, but 32 in 3.2's two small models,
    which are also the only ones with tied embeddings.
  * rope.freqs, in some files, is what every reader computes.

Written are the same: the keys of params.json are those that the programs of that release know, because the older ones refuse
others, and tok_embeddings is cut as that release did. Where shards do not divide a vocabulary, the last one has the rest, as
people have published enlarged LLaMAs; converters read that, Meta's programs want whole parts.

Memory: reading a tensor takes it and the part that is mapped meanwhile; writing takes it and a part of it. So at most twice the
largest tensor, while only shapes are read when a checkpoint is opened (and the embeddings, as far as they equal the output).
"""

from __future__ import annotations

from settings import UserError, read_json

import contextlib
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from config import LlamaConfig
from doors import tiktoken_file
from files import write_json
from tokenizer import Tokenizer, load_tokenizer
from torch_files import TorchFile, TorchFileWriter
from weights import Lazy, Weights, check_shapes, permute, same_bits, shapes_of, unpermute

KIND = "Meta"
SPLITS = ("auto", "width", "vocabulary")
MOST_SHARDS = 16
PIECE = 2**24  # bytes of the embeddings and of the output that are compared at a time

# Meta's name -> Hugging Face's, and the axis that shards divide (None: each has all of it). Those of a layer follow "layers.N.".
OUTSIDE = {
    "tok_embeddings.weight": ("model.embed_tokens.weight", None),  # 0 or 1: see _split_of
    "norm.weight": ("model.norm.weight", None),
    "output.weight": ("lm_head.weight", 0),
}
IN_LAYER = {
    "attention.wq.weight": ("self_attn.q_proj.weight", 0),
    "attention.wk.weight": ("self_attn.k_proj.weight", 0),
    "attention.wv.weight": ("self_attn.v_proj.weight", 0),
    "attention.wo.weight": ("self_attn.o_proj.weight", 1),
    "feed_forward.w1.weight": ("mlp.gate_proj.weight", 0),
    "feed_forward.w2.weight": ("mlp.down_proj.weight", 1),
    "feed_forward.w3.weight": ("mlp.up_proj.weight", 0),
    "attention_norm.weight": ("input_layernorm.weight", None),
    "ffn_norm.weight": ("post_attention_layernorm.weight", None),
}
IGNORED = "rope.freqs"
EMBEDDING, OUTPUT, FIRST = "tok_embeddings.weight", "output.weight", "layers.0."

# llama-models, models/llama3/model.py, apply_scaling; transformers has the same numbers, and the factor 32 for Llama-3.2.
SCALED_ROPE = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def _theirs(name: str, axis: int | None) -> tuple[str, int | None]:
    """Hugging Face's name -> Meta's, and the axis that shards divide; `axis` is that of the embeddings."""
    if layer := re.fullmatch(r"model\.layers\.(\d+)\.(.+)", name):
        meta, (_, cut) = next(item for item in IN_LAYER.items() if item[1][0] == layer[2])
        return f"layers.{layer[1]}.{meta}", cut
    meta, (_, cut) = next(item for item in OUTSIDE.items() if item[1][0] == name)
    return meta, axis if meta == EMBEDDING else cut


def _groups(name: str, config: LlamaConfig, shards: int) -> int:
    """Into how many parts the shards divide a tensor: fewer than there are shards where these share a head of keys and values."""
    return min(shards, config.num_key_value_heads) if name.endswith(("k_proj.weight", "v_proj.weight")) else shards


def _heads(name: str, config: LlamaConfig) -> int | None:
    """How many heads the rows of a tensor are reordered in; None if they stay as they are."""
    if name.endswith("q_proj.weight"):
        return config.num_attention_heads
    return config.num_key_value_heads if name.endswith("k_proj.weight") else None


def hidden_size_of(dim: int, multiple_of: int, ffn_dim_multiplier: float | None) -> int:
    """The feed-forward's hidden size, as Meta's programs compute it from params.json: two thirds of 4 · dim, enlarged by the
    multiplier, and rounded up to a multiple (llama/model.py, FeedForward)."""
    size = int(2 * (4 * dim) / 3)
    if ffn_dim_multiplier is not None:
        size = int(ffn_dim_multiplier * size)
    return multiple_of * math.ceil(size / multiple_of)


def recipe_for(dim: int, hidden: int) -> tuple[int, float | None]:
    """(multiple_of, ffn_dim_multiplier) from which hidden_size_of gives `hidden`. There always are some.

    Without a multiplier where that is possible, with the multiple that LLaMA-1 has, or else the nearest to it; the multiplier
    with as few digits as will do.
    """
    multiples = sorted((m for m in (2**i for i in range(13)) if hidden % m == 0), key=lambda m: abs(math.log2(m / 256)))
    for multiple in multiples:
        if hidden_size_of(dim, multiple, None) == hidden:
            return multiple, None
    base = int(2 * (4 * dim) / 3)
    middle = (hidden - multiples[0] / 2 + 0.5) / base  # all from `hidden` less a multiple up to `hidden` is rounded up to it
    tried = (round(middle, digits) for digits in range(1, 17))
    return multiples[0], next(x for x in tried if hidden_size_of(dim, multiples[0], x) == hidden)


# ----------------------------------------------------------------------------------------------------------------------
# Reading


def recognises(path: Path) -> bool:
    path = Path(path)
    return path.is_dir() and (any(path.glob("consolidated.*.pth")) or (path / "params.json").is_file())


def open_weights(path: Path, tokenizer: Tokenizer | None = None, max_position: int | None = None) -> Weights:
    """A directory of Meta's, its weights still on disk.

    tokenizer: in place of the one beside the weights. max_position: how many tokens the model is meant to read, in place of what
    its parameters suggest.
    Raises UserError for missing and damaged files, shards that do not fit each other, and tensors that contradict params.json.
    """
    path = Path(path)
    params, shards = _params(path), _shards(path)
    _check_count(path, params, shards)
    axis, odd = _split_of(params, shards), []
    embedding = _joined(shards, EMBEDDING, axis)
    vocabulary = params["vocab_size"] if params["vocab_size"] > 0 else embedding.shape[0]
    output = _joined(shards, OUTPUT, 0) if any(OUTPUT in shard.content for shard in shards) else None
    tied = output is None or _equal(embedding, output)
    if tied and output:
        odd.append(f"{OUTPUT} equals {EMBEDDING}, byte for byte: the embeddings are tied")
    hidden = _joined(shards, f"{FIRST}feed_forward.w1.weight", 0).shape[0]
    if (formula := hidden_size_of(params["dim"], params["multiple_of"], params["ffn_dim_multiplier"])) != hidden:
        odd.append(f"params.json's recipe gives a hidden size of {formula}, and the tensors have {hidden}, which counts")

    tokenizer = tokenizer or _tokenizer(path, "3.1" if params["use_scaled_rope"] else "3", vocabulary)
    length, why = (max_position, "as told") if max_position else _guess_length(params, vocabulary)
    config = _config(path, params, tokenizer, vocab_size=vocabulary, intermediate_size=hidden, tie_word_embeddings=tied,
                     max_position_embeddings=length)  # fmt: skip
    facts = {"shards": str(len(shards)), "reads": f"{length} tokens ({why})"}
    if len(shards) > 1:
        facts["embedding"] = f"each shard has a part of the {'width' if axis else 'vocabulary'}"
    if max_position is None and params["rope_theta"] == 10000:
        odd.append(f"params.json does not say how many tokens the model reads: taken to be {length} ({why})")
    weights = Weights(config, _tensors(shards, config, axis), tokenizer, kind=KIND, facts=facts, odd=odd)
    check_shapes(weights, path, says="params.json")
    weights.odd += _ignored(shards) + _different_norms(shards, config)
    return weights


def _params(path: Path) -> dict:
    """params.json, with what older releases leave out. Raises UserError for what it lacks, and models that are no plain Llama."""
    file = path / "params.json"
    params = read_json(file)
    params = params.get("model", params) if isinstance(params, dict) else None  # some releases wrap it
    if not isinstance(params, dict):
        raise UserError(f"{file} holds no parameters by name")
    for key, kind in (("vision_chunk_size", "a vision model"), ("vision_model", "a vision model"), ("moe_args", "a mixture of experts"),
                      ("quantization_args", "a quantised model"), ("lora_args", "a model with adapters")):  # fmt: skip
        if params.get(key) not in (None, False, -1):
            raise UserError(f"{file} describes {kind} ({key}); only plain Llamas can be read")
    usual = {"n_kv_heads": params.get("n_heads"), "multiple_of": 256, "ffn_dim_multiplier": None, "norm_eps": 1e-5,
             "rope_theta": 10000.0, "vocab_size": -1, "use_scaled_rope": False}  # fmt: skip
    params = usual | {key: value for key, value in params.items() if value is not None}
    whole = ("dim", "n_layers", "n_heads", "n_kv_heads", "multiple_of", "vocab_size")
    problems = [f"{key} is missing" for key in whole if params.get(key) is None]
    problems += [f"{key} is {params[key]!r}, not a positive whole number" for key in whole if params.get(key) is not None
                 and (type(params[key]) is not int or params[key] < 1) and (key, params[key]) != ("vocab_size", -1)]  # fmt: skip
    problems += [f"{key} is {params[key]!r}, not a positive number" for key in ("norm_eps", "rope_theta", "ffn_dim_multiplier")
                 if params[key] is not None and (type(params[key]) not in (int, float) or params[key] <= 0)]  # fmt: skip
    if not problems and params["dim"] % params["n_heads"]:
        problems.append(f"dim {params['dim']} is not a multiple of n_heads {params['n_heads']}")
    if problems:
        raise UserError(f"{file}: {'; '.join(problems)}")
    return params


def _config(path: Path, params: dict, tokenizer: Tokenizer | None, *, tie_word_embeddings: bool, vocab_size: int, **more) -> LlamaConfig:
    """The architecture, from params.json and what only the tensors tell (`more`)."""
    usual = (128000, 128001) if vocab_size == 128256 else (1, 2)
    try:
        return LlamaConfig(
            hidden_size=params["dim"],
            num_hidden_layers=params["n_layers"],
            num_attention_heads=params["n_heads"],
            num_key_value_heads=params["n_kv_heads"],
            rms_norm_eps=params["norm_eps"],
            rope_theta=params["rope_theta"],
            rope_scaling={**SCALED_ROPE, "factor": _factor(tie_word_embeddings)} if params["use_scaled_rope"] else None,
            bos_token_id=tokenizer.bos_id if tokenizer else usual[0],
            eos_token_id=tokenizer.eos_id if tokenizer else usual[1],
            tie_word_embeddings=tie_word_embeddings,
            vocab_size=vocab_size,
            **more,
        )
    except UserError as error:
        raise UserError(f"{path / 'params.json'}: {error}") from None


class Shard(TorchFile):
    """One consolidated.NN.pth."""

    def __init__(self, path: Path):
        super().__init__(path)
        if not isinstance(self.content, dict) or not all(
            isinstance(name, str) and isinstance(value, Tensor) for name, value in self.content.items()):
            raise UserError(f"{path} is no file of named tensors, as Meta's are")


def _shards(path: Path) -> list[Shard]:
    found: dict[int, Path] = {}
    for file in sorted(path.glob("consolidated.*.pth")):
        if (number := file.suffixes[0][1:]).isascii() and number.isdigit():
            if int(number) in found:
                raise UserError(f"{path} has {found[int(number)].name} and {file.name}, two files of one shard; move one away")
            found[int(number)] = file
    missing = [f"consolidated.{i:02d}.pth" for i in range(max(found, default=0) + 1) if i not in found]
    if missing:
        raise UserError(f"{path}: {', '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing; copy the checkpoint again")
    shards = [Shard(found[i]) for i in sorted(found)]
    for shard in shards:
        if different := sorted(shards[0].content.keys() ^ shard.content.keys()):
            raise UserError(f"{shards[0].path} and {shard.path.name} are not of one checkpoint: only one has {', '.join(different[:5])}")
    return shards


def _check_count(path: Path, params: dict, shards: list[Shard]) -> None:
    """Raises UserError if params.json makes of the first projection more or fewer shards than there are."""
    name, dim = f"{FIRST}attention.wq.weight", params["dim"]
    if name not in shards[0].content:
        raise UserError(f"{shards[0].path} has no {name}: it is no checkpoint of Meta's")
    shape = shards[0].content[name].shape
    if len(shape) != 2 or shape[0] * len(shards) != dim:
        count = f"{dim // shape[0]} shards" if len(shape) == 2 and shape[0] and dim % shape[0] == 0 else "no number of shards"
        raise UserError(f"{path} has {len(shards)} consolidated.NN.pth; {name} is {tuple(shape)} in the first, and by params.json "
                        f"({dim}, {dim}) in all, which takes {count}: files are missing, or params.json is another model's")  # fmt: skip


def _split_of(params: dict, shards: list[Shard]) -> int:
    """The axis of tok_embeddings that the shards divide: 1 in LLaMA-1 and Llama-2, 0 in Llama-3 and where there is one shard."""
    part = shards[0].content.get(EMBEDDING)
    width = part.shape[1] if part is not None and part.ndim == 2 else None
    if width == params["dim"]:
        return 0
    if width is not None and width * len(shards) == params["dim"]:
        return 1
    raise UserError(f"{shards[0].path}: {EMBEDDING} is {'missing' if part is None else tuple(part.shape)}; by params.json it has "
                    f"{params['dim']} columns, or {params['dim'] / len(shards):g} in each of {len(shards)} shards")  # fmt: skip


@dataclass(frozen=True)
class Part:
    """What one shard has of a tensor: rows from `start` to `stop`, and the columns (of a matrix)."""

    shard: Shard
    start: int
    stop: int
    columns: slice


@dataclass(frozen=True)
class Joined:
    """A tensor that shards share. copies: shards that have again what another one has."""

    name: str
    shape: torch.Size
    dtype: torch.dtype
    parts: tuple[Part, ...]
    copies: tuple[Part, ...] = ()

    def rows(self, start: int, stop: int) -> Tensor:
        """These rows of the whole tensor, in memory of their own. Raises UserError if copies differ."""
        whole = torch.empty((stop - start, *self.shape[1:]), dtype=self.dtype)
        for part in (*self.parts, *self.copies):
            first, last = max(start, part.start), min(stop, part.stop)
            if first < last:
                stored = part.shard.mapped()[self.name][first - part.start : last - part.start]
                place = whole[first - start : last - start]
                place = place[:, part.columns] if place.ndim == 2 else place
                if part not in self.copies:
                    place.copy_(stored)
                elif not same_bits(stored, place):
                    raise UserError(f"{part.shard.path}: {self.name} is not what the shard before has; by params.json's n_kv_heads, "
                                    "fewer than the shards, they share a head")  # fmt: skip
        return whole


def _joined(shards: list[Shard], name: str, axis: int | None, repeats: int = 1) -> Joined:
    """What the shards have of a tensor, put together along an axis (None: each has all of it).

    repeats: how many neighbouring shards have the same part.
    Raises UserError where it is missing, and where the shards' shapes or dtypes do not fit each other.
    """
    if name not in shards[0].content:
        raise UserError(f"{shards[0].path}: {name} is missing")
    stored = [shard.content[name] for shard in shards]
    for shard, tensor in zip(shards, stored):
        a, b = ([size for i, size in enumerate(part.shape) if i != axis] for part in (tensor, stored[0]))
        if a != b or tensor.ndim not in (1, 2) or tensor.dtype != stored[0].dtype:
            raise UserError(f"{shard.path}: {name} is {tuple(tensor.shape)} {tensor.dtype}, and in {shards[0].path.name} "
                            f"{tuple(stored[0].shape)} {stored[0].dtype}; the two do not fit")  # fmt: skip
    if axis is None:
        everything = Part(shards[0], 0, stored[0].shape[0], slice(None))
        return Joined(name, stored[0].shape, stored[0].dtype, (everything,))
    parts, copies, at = [], [], 0
    for i, (shard, tensor) in enumerate(zip(shards, stored)):
        size = tensor.shape[axis]
        start = at if i % repeats == 0 else at - size
        place = (start, start + size, slice(None)) if axis == 0 else (0, tensor.shape[0], slice(start, start + size))
        (parts if i % repeats == 0 else copies).append(Part(shard, *place))
        at = start + size
    shape = torch.Size(at if i == axis else size for i, size in enumerate(stored[0].shape))
    return Joined(name, shape, stored[0].dtype, tuple(parts), tuple(copies))


def _equal(one: Joined, other: Joined) -> bool:
    """Whether two tensors are the same, byte for byte. Where they are not, the first few rows mostly show it."""
    if (one.shape, one.dtype) != (other.shape, other.dtype):
        return False
    step = max(1, PIECE // (one.shape[1] * one.dtype.itemsize))
    stops = [(at, min(at + step, one.shape[0])) for at in range(0, one.shape[0], step)]
    return all(same_bits(one.rows(*stop), other.rows(*stop)) for stop in stops)


def _tensors(shards: list[Shard], config: LlamaConfig, axis: int) -> dict[str, Lazy]:
    """Hugging Face's name -> Lazy of all that the shards hold; what is unknown keeps its name, for check_shapes to find."""
    tensors, seen = {}, {IGNORED, *([OUTPUT] if config.tie_word_embeddings else [])}
    for name in shapes_of(config):
        theirs, cut = _theirs(name, axis)
        seen.add(theirs)
        if theirs in shards[0].content:
            joined = _joined(shards, theirs, cut, repeats=len(shards) // _groups(name, config, len(shards)))
            tensors[name] = Lazy(joined.shape, joined.dtype, _reader(joined, _heads(name, config)))
    unknown = (name for name in shards[0].content if name not in seen)
    return tensors | {name: _lazy_of(shards[0], name) for name in unknown}


def _lazy_of(shard: Shard, name: str) -> Lazy:
    return Lazy(shard.content[name].shape, shard.content[name].dtype, shard.reader(name))


def _reader(joined: Joined, heads: int | None) -> Callable[[], Tensor]:
    def read() -> Tensor:
        whole = joined.rows(0, joined.shape[0])
        return unpermute(whole, heads) if heads else whole

    return read


def _ignored(shards: list[Shard]) -> list[str]:
    return [f"{IGNORED} is left out: rotary frequencies are computed"] if IGNORED in shards[0].content else []


def _different_norms(shards: list[Shard], config: LlamaConfig) -> list[str]:
    """Every shard has all the norms, alike; a remark if not."""
    names = [_theirs(name, None)[0] for name, shape in shapes_of(config).items() if len(shape) == 1]
    first, odd = {name: shards[0].mapped()[name].clone() for name in names} if len(shards) > 1 else {}, []
    for shard in shards[1:]:
        tensors = shard.mapped()
        if different := [name for name in names if not same_bits(tensors[name], first[name])]:
            more = f" and {len(different) - 3} more" if len(different) > 3 else ""
            odd.append(f"{', '.join(different[:3])}{more} differ between {shards[0].path.name}, which counts, and {shard.path.name}")
    return odd


def _tokenizer(path: Path, release: str, vocabulary: int) -> Tokenizer | None:
    """The tokenizer beside the weights, or LLaMA-1's, one folder up, if it has their vocabulary."""
    file, above = path / "tokenizer.model", path.resolve().parent / "tokenizer.model"
    if (path / "tokenizer.json").is_file() and (not file.is_file() or tiktoken_file.is_ranks(file)):
        return load_tokenizer(path / "tokenizer.json")  # it tells more than ranks: names of special tokens, a chat template
    if file.is_file():
        return _read_tokenizer(file, release)
    tokenizer = _read_tokenizer(above, release) if above.is_file() else None
    return tokenizer if tokenizer and len(tokenizer) == vocabulary else None


def _read_tokenizer(file: Path, release: str) -> Tokenizer:
    return tiktoken_file.load_ranks(file, release) if tiktoken_file.is_ranks(file) else load_tokenizer(file)


def _factor(tied: bool) -> float:
    return 32.0 if tied else 8.0


def _guess_length(params: dict, vocabulary: int) -> tuple[int, str]:
    """(tokens that the model was trained to read, why it is taken to be these). No file of Meta's says it."""
    if params["use_scaled_rope"]:
        return 131072, "Llama-3.1 or later: use_scaled_rope"
    if vocabulary == 128256 or params["rope_theta"] == 500000:
        return 8192, "Llama-3: its vocabulary or rope_theta"
    if params["rope_theta"] > 10000:
        return 16384, "Code Llama: its rope_theta"
    if params["norm_eps"] < 5e-6:
        return 2048, "LLaMA-1: its norm_eps"
    if (params["dim"], params["n_layers"], params["n_kv_heads"]) == (8192, 80, 64):
        return 2048, "LLaMA-1 65B: its shape"
    return 4096, "Llama-2: nothing tells of another release"


# ----------------------------------------------------------------------------------------------------------------------
# Writing


def problems(source: Weights, shards: int = 1, split: str = "auto") -> list[str]:
    """What keeps this model from being written in Meta's format, or cut so."""
    c, found = source.config, []
    if split not in SPLITS:
        found.append(f"split is one of {', '.join(SPLITS)}, not {split!r}")
    if not 1 <= shards <= MOST_SHARDS:
        return [*found, f"Meta's checkpoints have 1 to {MOST_SHARDS} shards, not {shards}"]
    if c.head_dim * c.num_attention_heads != c.hidden_size:
        found.append(f"Meta's heads divide the hidden size, and here {c.num_attention_heads} heads of {c.head_dim} are not {c.hidden_size}")
    if c.attention_bias or c.mlp_bias:
        found.append("Meta's model has no biases, and this one has")
    if c.rope_scaling is not None and c.rope_scaling != {**SCALED_ROPE, "factor": _factor(c.tie_word_embeddings)}:
        known = {**SCALED_ROPE, "factor": _factor(c.tie_word_embeddings)}
        found.append(f"params.json can only say that RoPE is scaled as in Llama-3.1, which for {'' if c.tie_word_embeddings else 'un'}tied "
                     f"embeddings means {known}, and here it is {c.rope_scaling}")  # fmt: skip
    if not c.tie_word_embeddings and _looks_tied(source):
        found.append("the output equals the embeddings bit for bit, which Meta's files cannot tell from tied embeddings; say so in "
                     "config.json: tie_word_embeddings true")  # fmt: skip
    divided = [("attention heads", c.num_attention_heads), ("intermediate size", c.intermediate_size)]
    if _axis(c, split) == 1:
        divided.append(("hidden size", c.hidden_size))
    found += [f"{shards} shards do not divide the {what}, {size}" for what, size in divided if size % shards]
    if c.num_key_value_heads % shards and shards % c.num_key_value_heads:
        found.append(f"{shards} shards do not divide the key/value heads, {c.num_key_value_heads}, nor are they a multiple of them")
    if c.vocab_size < shards:
        found.append(f"{shards} shards are more than the vocabulary, {c.vocab_size}")
    return found


def _looks_tied(source: Weights) -> bool:
    """Whether the output is a copy of the embeddings, bit for bit. A row tells mostly, and spares holding both in memory."""
    embedding, output = source.tensors["model.embed_tokens.weight"], source.tensors["lm_head.weight"]
    first, other = (lazy.read()[:1].clone() for lazy in (embedding, output))
    return same_bits(first, other) and same_bits(embedding.read(), output.read())


def remarks(source: Weights, shards: int = 1, split: str = "auto") -> list[str]:
    """What a user should know of an export: what the files do not say, and what Meta's own programs will not take."""
    c, params, found = source.config, _params_for(source.config, 0), []
    guess, _ = _guess_length({"use_scaled_rope": False, **params}, c.vocab_size)
    if guess != c.max_position_embeddings:
        found.append(f"params.json does not say how many tokens the model reads: to import it again, give --max-position "
                     f"{c.max_position_embeddings}")  # fmt: skip
    if c.vocab_size % shards:
        found.append(f"{shards} shards do not divide the vocabulary, {c.vocab_size}: the last has the rest, as converters take it and "
                     "Meta's own programs do not")  # fmt: skip
    if source.tokenizer is not None and len(source.tokenizer) != c.vocab_size:
        found.append(f"the tokenizer has {len(source.tokenizer)} entries and the embeddings {c.vocab_size} rows: Meta's own programs want "
                     "as many")  # fmt: skip
    return found


def _axis(config: LlamaConfig, split: str) -> int:
    """The axis of tok_embeddings to divide. "auto": the vocabulary for what looks like Llama-3, because it has its rope_theta, its
    RoPE scaling, or a vocabulary as large; the width for all else (Code Llama, too, whose rope_theta is another)."""
    if split == "auto":
        like_llama3 = config.rope_theta == 500000 or config.rope_scaling is not None or config.vocab_size >= 100000
        return 0 if like_llama3 else 1
    return 0 if split == "vocabulary" else 1


def expected(source: Weights, name: str, tensor: Tensor, **options) -> Tensor:
    return tensor


def size(source: Weights, shards: int = 1, split: str = "auto") -> int:
    """Bytes that the files take, within a percent."""
    cuts = ((lazy, _shard_slices(name, lazy.shape, source.config, _axis(source.config, split), shards)) for name, lazy in _to_write(source))
    total = sum(math.prod(_size_of(lazy.shape, index)) * lazy.dtype.itemsize for lazy, indices in cuts for index in indices)
    return total + 2**20 * (shards + 30)  # names and alignment; the tokenizer


def write(source: Weights, out: Path, shards: int = 1, split: str = "auto") -> None:
    """Make the directory `out`: consolidated.NN.pth, params.json, and the tokenizer's files.

    Meta's programs read the tokenizer.model of them; the others hold what it does not say, for the way back.
    """
    config, axis = source.config, _axis(source.config, split)
    out = Path(out)
    out.mkdir()
    contents = [{} for _ in range(shards)]
    for name, lazy in _to_write(source):
        for content, index in zip(contents, _shard_slices(name, lazy.shape, config, axis, shards)):
            content[_theirs(name, axis)[0]] = torch.empty(_size_of(lazy.shape, index), dtype=lazy.dtype, device="meta")
    with contextlib.ExitStack() as stack:
        writers = [stack.enter_context(TorchFileWriter(out / f"consolidated.{i:02d}.pth", content)) for i, content in enumerate(contents)]
        for name, lazy in source.tensors.items():
            tensor, heads = lazy.read(), _heads(name, config)
            tensor = permute(tensor, heads) if heads else tensor
            tied = name == "model.embed_tokens.weight" and config.tie_word_embeddings
            for stored_as in (name, "lm_head.weight") if tied else (name,):
                for writer, index in zip(writers, _shard_slices(stored_as, lazy.shape, config, axis, shards)):
                    writer.write(_theirs(stored_as, axis)[0], tensor[index])
            del tensor  # before the next one is read
    write_json(out / "params.json", _params_for(config, axis))
    if source.tokenizer is not None:
        source.tokenizer.save(out)
        tiktoken_file.write_ranks(out)


def _to_write(source: Weights) -> list[tuple[str, Lazy]]:
    """All tensors, by Hugging Face's names. Meta's programs know no tied embeddings: the output is a copy."""
    tensors = dict(source.tensors)
    if source.config.tie_word_embeddings:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    return list(tensors.items())


def _shard_slices(name: str, shape: torch.Size, config: LlamaConfig, axis: int, shards: int) -> list[tuple[slice, ...]]:
    """What each shard has of a tensor, as indices into the whole."""
    cut = _theirs(name, axis)[1]
    if cut is None:
        return [(slice(None),)] * shards
    groups = _groups(name, config, shards)
    part, slices = shape[cut] // groups, []
    for shard in range(shards):
        group = shard * groups // shards
        here = slice(group * part, shape[cut] if group == groups - 1 else (group + 1) * part)
        slices.append((here,) if cut == 0 else (slice(None), here))
    return slices


def _size_of(shape: torch.Size, index: tuple[slice, ...]) -> torch.Size:
    return torch.Size([*(len(range(n)[part]) for n, part in zip(shape, index)), *shape[len(index) :]])


def _params_for(config: LlamaConfig, axis: int) -> dict:
    """params.json, with the keys that the release knows whose way to cut the embeddings this is: the programs of LLaMA-1, Llama-2
    and Llama-3 refuse unknown ones."""
    multiple, multiplier = recipe_for(config.hidden_size, config.intermediate_size)
    params = {"dim": config.hidden_size, "n_layers": config.num_hidden_layers, "n_heads": config.num_attention_heads,
              "vocab_size": config.vocab_size, "multiple_of": multiple, "norm_eps": config.rms_norm_eps}  # fmt: skip
    if config.num_key_value_heads != config.num_attention_heads or axis == 0:
        params["n_kv_heads"] = config.num_key_value_heads
    if multiplier is not None:
        params["ffn_dim_multiplier"] = multiplier
    if config.rope_theta != 10000 or axis == 0:
        params["rope_theta"] = config.rope_theta
    if config.rope_scaling is not None:
        params["use_scaled_rope"] = True
    return params
