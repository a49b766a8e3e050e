"""GGUF: the one file that llama.cpp and Ollama load, weights, tokenizer and chat template together.

    "GGUF", uint32 version 3, uint64 number of tensors, uint64 number of entries       all little-endian
    entries   key, type, value: the architecture (`llama.…`), the tokenizer (gguf_tokenizer.py), what it is (`general.…`)
    tensors   name, number of dimensions, the dimensions with the innermost first, type, offset from the start of the data
    data      each tensor, row by row, at a multiple of 32

A row of Q8_0 or Q4_0 is cut into blocks of 32 values, each with an fp16 scale d before it:

    Q8_0   34 bytes   32 int8; value = d · q, d = largest magnitude / 127
    Q4_0   18 bytes   16 bytes with two numbers of 0 … 15, element i low and i + 16 high; value = d · (q - 8), d = the value of
                      the largest magnitude / -8, so that this one is exact

Traps. Rows of q and k are in the interleaved order, as in Meta's files. Norms and biases are always F32. The file says less of RoPE
than config.json: linear and YaRN scaling as llama.rope.scaling.*, Llama-3's as a tensor rope_freqs.weight of factors that divide
the frequencies. transformers reads none of the three, nor biases. Floats are F32: they are read as the shortest decimal that gives
the same F32, 1e-05 again. What config.json says more exactly stands as JSON in an entry of our own, cria.config, which others skip.

Q4_0 files keep embedding and output head in Q8_0, where rounding hurts most (llama.cpp's own quantiser gives the head six bits).
A row that blocks of 32 do not fill becomes F16. Reading knows these types, and others (K-quants …) as far as the gguf package
can dequantise them.

Memory: writing takes the largest tensor once as it is read (q and k twice) and some megabytes; reading a tensor takes it once.
Format: docs/gguf.md of github.com/ggml-org/ggml; block layouts: ggml-common.h there.
"""

from __future__ import annotations

from settings import UserError

import json
import math
import struct
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from config import LlamaConfig
from doors.gguf_tokenizer import (
    ollama_modelfile,
    read_tokenizer,
    tokenizer_metadata,
    tokenizer_problems,
    tokenizer_remarks,
)
from model import rope_frequencies
from tokenizer import Tokenizer
from weights import Lazy, Weights, check_shapes, permute, shapes_of, unpermute

KIND = "GGUF"
MAGIC, ALIGNMENT = b"GGUF", 32
QUANTISATION = 2  # version of the block layouts
BLOCK = 32
CHUNK = 1 << 18  # values converted at a time: what the processor's cache holds, several times over


@dataclass(frozen=True)
class Type:
    """How a tensor's values are stored: `bytes` for every `block` of them. dtype: for those that are not quantised."""

    name: str
    code: int  # in the file
    block: int
    bytes: int
    dtype: torch.dtype | None = None

    def nbytes(self, shape) -> int:
        return math.prod(shape) // self.block * self.bytes


F32 = Type("F32", 0, 1, 4, torch.float32)
F16 = Type("F16", 1, 1, 2, torch.float16)
BF16 = Type("BF16", 30, 1, 2, torch.bfloat16)
Q8_0 = Type("Q8_0", 8, BLOCK, 34)
Q4_0 = Type("Q4_0", 2, BLOCK, 18)
KNOWN = {kind.code: kind for kind in (F32, F16, BF16, Q8_0, Q4_0)}
# what --type says -> the type of matrices, and its number in general.file_type
TYPES = {"f32": (F32, 0), "f16": (F16, 1), "bf16": (BF16, 32), "q8_0": (Q8_0, 7), "q4_0": (Q4_0, 2)}
BY_DTYPE = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
NAMES = {EMBEDDING: "token_embd.weight", "model.norm.weight": "output_norm.weight", HEAD: "output.weight"}
LAYER_NAMES = {
    "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "post_attention_layernorm": "ffn_norm", "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip
ROPE_FACTORS = "rope_freqs.weight"
EXACT, EXACT_FIELDS = "cria.config", ("rope_theta", "rms_norm_eps", "rope_scaling")


def gguf_name(name: str) -> str:
    """Hugging Face's name of a parameter -> GGUF's."""
    if name in NAMES:
        return NAMES[name]
    _, _, layer, *middle, end = name.split(".")  # model.layers.N.self_attn.q_proj.weight
    return f"blk.{layer}.{LAYER_NAMES['.'.join(middle)]}.{end}"


def _rope_type(config: LlamaConfig) -> str:
    return config.rope_scaling["rope_type"] if config.rope_scaling else "default"


def _heads(name: str, config: LlamaConfig) -> int | None:
    """The number of heads whose rows are to be reordered; None for all but q and k."""
    if ".q_proj." in name:
        return config.num_attention_heads
    return config.num_key_value_heads if ".k_proj." in name else None


def _f32(value: float) -> float:
    """A number after being stored as F32: the shortest decimal that gives the same F32."""
    return float(str(np.float32(value)))


def _gguf():
    try:
        import gguf
    except ImportError:
        raise UserError("GGUF needs the gguf package: pip install gguf") from None
    return gguf


# ----------------------------------------------------------------------------------------------------------------------
# Values and blocks


def encode(values: Tensor, kind: Type) -> Tensor:
    """Values [..., a multiple of the block] as the file stores them: uint8 [n], n = kind.nbytes(values.shape).

    The same bytes as gguf.quants.quantize gives (tests/test_gguf_file.py). Infinite and undefined values give undefined blocks.
    """
    if kind.dtype is not None:
        return values.to(kind.dtype).contiguous().reshape(-1).view(torch.uint8)
    blocks = values.float().reshape(-1, BLOCK)
    if kind is Q8_0:
        scale = blocks.abs().amax(1, keepdim=True) / 127
    else:
        scale = blocks.gather(1, blocks.abs().argmax(1, keepdim=True)) / -8
    per_step = 1 / scale
    steps = blocks * torch.where(per_step.isinf(), 0, per_step)  # a scale that is 0, or as good as 0: fp16 cannot hold it
    if kind is Q8_0:
        whole = steps.trunc()
        numbers = (whole + (2 * (steps - whole)).trunc()).to(torch.int8).view(torch.uint8)  # halves go away from zero
    else:
        numbers = (steps + 8.5).trunc().clamp(max=15).to(torch.uint8)
        numbers = numbers[:, : BLOCK // 2] | numbers[:, BLOCK // 2 :] << 4
    return torch.cat((scale.half().view(torch.uint8), numbers), 1).reshape(-1)


def decode(data: Tensor, kind: Type) -> Tensor:
    """The values of stored bytes, uint8 [n]: float32 [n / bytes · block], or kind.dtype where that is stored."""
    if kind.dtype is not None:
        return data.view(kind.dtype)
    if kind.code not in KNOWN:
        gguf = _gguf()
        return torch.from_numpy(gguf.quants.dequantize(data.numpy(), gguf.GGMLQuantizationType(kind.code)))
    blocks = data.view(-1, kind.bytes)
    scale, numbers = blocks[:, :2].contiguous().view(torch.float16).float(), blocks[:, 2:]
    if kind is Q8_0:
        return (scale * numbers.contiguous().view(torch.int8)).reshape(-1)
    return (scale * (torch.cat((numbers & 15, numbers >> 4), 1).float() - 8)).reshape(-1)


def tensor_type(name: str, shape, dtype: torch.dtype, type: str) -> Type:
    """The type in which a parameter is stored. type: of TYPES, or "auto": as it is."""
    if len(shape) == 1:
        return F32
    kind, _ = TYPES[BY_DTYPE.get(dtype, "f32") if type == "auto" else type]
    if shape[-1] % kind.block:
        return F16
    return Q8_0 if kind is Q4_0 and name in (EMBEDDING, HEAD) else kind


# ----------------------------------------------------------------------------------------------------------------------
# Writing


def problems(source: Weights, type: str = "auto", title: str = "") -> list[str]:
    """Why this model cannot be a GGUF file that llama.cpp runs as it is meant, all at once; [] if it can."""
    found, rope = [], source.config.rope_scaling or {}
    if type not in ("auto", *TYPES):
        found.append(f"--type {type} is not written; there are {', '.join(TYPES)}, and auto for the type that it has")
    if _rope_type(source.config) == "dynamic":
        found.append("its RoPE scaling is dynamic NTK, which llama.cpp has not")
    if _rope_type(source.config) == "yarn":
        wrong = [f"{key} {rope[key]}" for key, fixed in (("beta_fast", 32), ("beta_slow", 1)) if (rope.get(key) or fixed) != fixed]
        wrong += ["truncate false"] if not rope.get("truncate", True) else []
        if wrong:
            found.append(f"its YaRN scaling has {', '.join(wrong)}; llama.cpp computes Llamas with 32, 1 and truncation")
    if source.tokenizer is None:
        return [*found, "it has no tokenizer, and llama.cpp loads no model without one"]
    return found + tokenizer_problems(source.tokenizer, source.config.vocab_size)


def remarks(source: Weights, type: str = "auto", title: str = "") -> list[str]:
    """What a user should know of the file, though it can be written."""
    found, config = [], source.config
    if type != "auto" and TYPES[type][0].block > 1:
        narrow = [key for key, lazy in source.tensors.items() if tensor_type(key, lazy.shape, lazy.dtype, type) is F16]
        if narrow:
            found.append(f"{len(narrow)} matrices whose rows are no multiple of {BLOCK} become F16, {narrow[0]} first")
    if _rope_type(config) in ("linear", "yarn", "llama3"):
        found.append(f"transformers ignores the file's RoPE scaling ({_rope_type(config)}); llama.cpp and Ollama heed it")
    if config.attention_bias or config.mlp_bias:
        found.append("transformers leaves out the file's biases; llama.cpp and Ollama use them")
    if source.tokenizer is not None and (spare := config.vocab_size - len(source.tokenizer)) > 0:
        found.append(f"{spare} rows of the embedding have no token; the file names them [PADn], unused")
    return found + (tokenizer_remarks(source.tokenizer) if source.tokenizer is not None else [])


def metadata(source: Weights, type: str = "auto", title: str = "") -> dict:
    """The file's entries in their order: str, bool, int (uint32), float (F32), lists (of int: int32). Without
    general.architecture, which the gguf package writes before all others."""
    config = source.config
    file_type = TYPES[BY_DTYPE.get(source.tensors[EMBEDDING].dtype, "f32") if type == "auto" else type]
    data = {
        "general.type": "model",
        "general.name": title or source.facts.get("name"),
        "general.file_type": file_type[1],
        "general.quantization_version": QUANTISATION,
        "llama.vocab_size": config.vocab_size,
        "llama.context_length": config.max_position_embeddings,
        "llama.embedding_length": config.hidden_size,
        "llama.block_count": config.num_hidden_layers,
        "llama.feed_forward_length": config.intermediate_size,
        "llama.attention.head_count": config.num_attention_heads,
        "llama.attention.head_count_kv": config.num_key_value_heads,
        "llama.attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "llama.rope.dimension_count": config.head_dim,
        "llama.rope.freq_base": float(config.rope_theta),
    }
    if config.head_dim * config.num_attention_heads != config.hidden_size:
        data |= {"llama.attention.key_length": config.head_dim, "llama.attention.value_length": config.head_dim}
    exact = {field: getattr(config, field) for field in EXACT_FIELDS}
    exact = {field: value for field, value in exact.items() if value and (isinstance(value, dict) or _f32(value) != value)}
    data |= _rope_metadata(config) | {EXACT: json.dumps(exact) if exact else None}
    data |= tokenizer_metadata(source.tokenizer, config.vocab_size)
    return {key: value for key, value in data.items() if value is not None}


def _rope_metadata(config: LlamaConfig) -> dict:
    """Linear and YaRN scaling. Llama-3's is a tensor, and an entry for its factor would make llama.cpp scale linearly as well."""
    rope, at = config.rope_scaling or {}, "llama.rope.scaling"
    if _rope_type(config) not in ("linear", "yarn"):
        return {}
    data = {f"{at}.type": _rope_type(config), f"{at}.factor": float(rope["factor"])}
    if _rope_type(config) == "yarn":
        data[f"{at}.original_context_length"] = int(rope["original_max_position_embeddings"])
        _, attention = rope_frequencies(config, 1)
        if (relative := attention / _yarn_attention(rope["factor"])) != 1:
            data[f"{at}.attn_factor"] = relative  # llama.cpp multiplies its own by this
    return data


def _yarn_attention(factor: float) -> float:
    return 0.1 * math.log(factor) + 1


def rope_factors(config: LlamaConfig) -> Tensor:
    """What Llama-3's scaling divides the plain frequencies by: float32 [hd/2], rope_freqs.weight."""
    exponent = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
    return 1 / config.rope_theta**exponent / rope_frequencies(config, 1)[0]


def size(source: Weights, type: str = "auto", title: str = "") -> int:
    """Bytes that the file takes, a little too many."""
    data = sum(tensor_type(name, lazy.shape, lazy.dtype, type).nbytes(lazy.shape) + ALIGNMENT + 100
               for name, lazy in source.tensors.items())  # fmt: skip
    tokens = source.tokenizer.pieces if source.tokenizer is not None else []
    words = sum(2 * (len(text.encode()) + 12) for text in tokens) + 40 * max(0, source.config.vocab_size - len(tokens))
    return data + words + 65536


def write(source: Weights, out: Path, type: str = "auto", title: str = "") -> None:
    """A .gguf file: header first, then one tensor after the other.

    type: of the matrices: f32, f16, bf16, q8_0, q4_0, or auto: as the source has them. title: general.name, shown by other
    programs. Raises UserError for what `problems` finds, and for a value that the type cannot hold, naming its tensor.
    """
    if found := problems(source, type, title):
        raise UserError(f"this model cannot be written as GGUF: {'; '.join(found)}")
    gguf = _gguf()
    kinds = {key: tensor_type(key, lazy.shape, lazy.dtype, type) for key, lazy in source.tensors.items()}
    factors = rope_factors(source.config) if _rope_type(source.config) == "llama3" else None

    writer = gguf.GGUFWriter(out, "llama")
    for key, value in metadata(source, type, title).items():
        add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string,
               list: writer.add_array}[value.__class__]  # fmt: skip
        add(key, value)
    infos = [(gguf_name(key), lazy.shape, kinds[key]) for key, lazy in source.tensors.items()]
    infos += [(ROPE_FACTORS, factors.shape, F32)] if factors is not None else []
    for stored_name, shape, kind in infos:
        writer.add_tensor_info(stored_name, shape, np.dtype(np.float32), kind.nbytes(shape), gguf.GGMLQuantizationType(kind.code))
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
    finally:
        writer.close()

    with Path(out).open("ab") as file:  # the package wants each tensor converted as a whole; here it goes in pieces
        file.write(bytes(-file.tell() % ALIGNMENT))
        for parameter, lazy in source.tensors.items():
            _append(file, parameter, lazy, kinds[parameter], _heads(parameter, source.config))
        if factors is not None:
            _append(file, ROPE_FACTORS, Lazy(factors.shape, torch.float32, lambda: factors), F32, None)


def _append(file, name: str, lazy: Lazy, kind: Type, heads: int | None) -> None:
    """One tensor's data. (A function of its own, so that the tensor is gone before the next one is read.)"""
    tensor = lazy.read()
    tensor = permute(tensor, heads) if heads else tensor
    for values in _pieces(tensor):
        file.write(_checked(name, values, kind).numpy())
    file.write(bytes(-file.tell() % ALIGNMENT))


def _pieces(tensor: Tensor) -> Iterator[Tensor]:
    """Whole rows of it, about CHUNK values at a time."""
    return iter(tensor.split(max(1, CHUNK // max(1, math.prod(tensor.shape[1:])))))


def _checked(name: str, values: Tensor, kind: Type) -> Tensor:
    """encode(), or UserError for values that it would falsify. Types that are not quantised keep NaN and infinity."""
    data = encode(values, kind)
    if kind.dtype is None and (bad := int((~values.isfinite()).sum())):
        raise UserError(f"{name} has {bad} values that are NaN or infinite, which {kind.name} cannot hold; use --type f32, or mend "
                        "the model")  # fmt: skip
    if kind in (F16, Q8_0, Q4_0):
        halves = data.view(-1, kind.bytes)[:, :2].contiguous().view(torch.float16)  # F16's values, or the scales
        if halves.isinf().any() and not values.isinf().any():
            raise UserError(f"{name} has values up to {values.abs().max():.3g}, too large for {kind.name}; use --type bf16 or f32")
    return data


def expected(source: Weights, name: str, tensor: Tensor, type: str = "auto", title: str = "") -> Tensor:
    """What reading parameter `name` back gives, exactly: the tensor after encode and decode, in the dtype that is read."""
    kind = tensor_type(name, tensor.shape, tensor.dtype, type)
    if kind.dtype is not None:
        return tensor.to(kind.dtype)
    return torch.cat([decode(encode(values, kind), kind).view(values.shape) for values in _pieces(tensor)])


def modelfile(out: Path, source: Weights) -> str:
    """The Modelfile that Ollama wants beside the file `out`: three lines."""
    return ollama_modelfile(out, source.tokenizer)


# ----------------------------------------------------------------------------------------------------------------------
# Reading

# Types of metadata values, and how struct spells those that are one number.
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9


@dataclass(frozen=True)
class Entry:
    """A tensor in the file."""

    shape: torch.Size
    kind: Type
    offset: int  # from the start of the file


class _Header:
    """metadata and tensors of a file: plain Python values, and Entries by GGUF's names. The file is not kept open.

    (gguf.GGUFReader maps the whole file and makes an array of every token.) Raises UserError for what is no such file,
    truncated or damaged.
    """

    def __init__(self, path: Path):
        self.path = path
        if not path.is_file():
            raise UserError(f"{path} {'is a directory' if path.is_dir() else 'does not exist'}; a GGUF model is one file")
        self._size = path.stat().st_size
        with path.open("rb") as self._file:
            if self._file.read(4) != MAGIC:
                raise UserError(f"{path} is no GGUF file: it does not start with {MAGIC.decode()}")
            self.version = self._scalar("I")
            if self.version & 0xFFFF == 0:
                raise UserError(f"{path} is a big-endian GGUF file; convert it with gguf_convert_endian.py of the gguf package")
            if self.version not in (2, 3):
                raise UserError(f"{path} is GGUF version {self.version}; 2 and 3 are read")
            tensors, entries = self._scalar("Q"), self._scalar("Q")
            self.metadata = {}
            for _ in range(entries):
                key = self._string()
                self.metadata[key] = self._value(self._scalar("I"))
            infos = [self._info() for _ in range(tensors)]
            alignment = self.metadata.get("general.alignment", ALIGNMENT)
            if not isinstance(alignment, int) or alignment < 1:
                raise UserError(f"{path} is damaged: its general.alignment is {alignment!r}")
            start = self._file.tell() + -self._file.tell() % alignment
        self.tensors = {name: Entry(shape, kind, start + offset) for name, shape, kind, offset in infos}
        for name, entry in self.tensors.items():
            end = entry.offset + entry.kind.nbytes(entry.shape)
            if end > self._size:
                raise UserError(f"{path} is truncated: {name} ends at byte {end:,} and the file at {self._size:,}; copy or download "
                                "it again")  # fmt: skip

    def _bytes(self, count: int) -> bytes:
        data = self._file.read(count) if count <= self._size else b""
        if len(data) < count:
            raise UserError(f"{self.path} is truncated or damaged: its header does not end within its {self._size:,} bytes; "
                            "copy or download it again")  # fmt: skip
        return data

    def _scalar(self, code: str):
        return struct.unpack(f"<{code}", self._bytes(struct.calcsize(f"<{code}")))[0]

    def _string(self) -> str:
        return self._bytes(self._scalar("Q")).decode(errors="replace")

    def _value(self, kind: int):
        if kind == STRING:
            return self._string()
        if kind == ARRAY:
            of, count = self._scalar("I"), self._scalar("Q")
            if of == ARRAY:
                raise UserError(f"{self.path} is damaged: its header has an array of arrays, which no model's metadata has")
            if of not in SCALARS:
                return [self._value(of) for _ in range(count)]
            numbers = np.dtype(f"<{SCALARS[of]}")
            return np.frombuffer(self._bytes(count * numbers.itemsize), numbers).tolist()
        if kind not in SCALARS:
            raise UserError(f"{self.path} is damaged: its header has a value of the unknown type {kind}")
        value = self._scalar(SCALARS[kind])
        return _f32(value) if SCALARS[kind] == "f" else value

    def _info(self) -> tuple[str, torch.Size, Type, int]:
        name, dimensions = self._string(), self._scalar("I")
        shape = tuple(reversed([self._scalar("Q") for _ in range(dimensions)]))
        kind = self._type(name, self._scalar("I"))
        if not shape or shape[-1] % kind.block or math.prod(shape) > 8 * self._size * kind.block:
            raise UserError(f"{self.path} is damaged or truncated: {name!r} has the shape {shape} in {kind.name}")
        return name, torch.Size(shape), kind, self._scalar("Q")

    def _type(self, name: str, code: int) -> Type:
        """A type of ours, or one that the gguf package can dequantise."""
        if code in KNOWN:
            return KNOWN[code]
        gguf = _gguf()
        try:
            kind = Type(gguf.GGMLQuantizationType(code).name, code, *gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(code)])
            decode(torch.zeros(kind.bytes, dtype=torch.uint8), kind)
        except (ValueError, KeyError):
            raise UserError(f"{self.path}: {name} is of the type {code}, which is not known here") from None
        except NotImplementedError:
            raise UserError(f"{self.path}: {name} is of the type {kind.name}, which the gguf package cannot dequantise") from None
        return kind


def recognises(path: Path) -> bool:
    """Whether a file starts as GGUF does."""
    try:
        with Path(path).open("rb") as file:
            return file.read(4) == MAGIC
    except OSError:
        return False


def open_weights(path: Path, tokenizer: Tokenizer | None = None) -> Weights:
    """A GGUF file of the architecture llama, its tensors still in it; quantised ones are dequantised as they are read.

    tokenizer: the model's, if it is at hand in another format and the file's is not wanted. Otherwise it is made from the
    metadata, or left out with a remark that says why. Raises UserError for what is no such file, truncated, of another
    architecture (named), or has tensors missing, unknown, of another shape or of a type that cannot be read.
    """
    path = Path(path)
    header = _Header(path)
    data = header.metadata
    if (architecture := data.get("general.architecture")) != "llama":
        raise UserError(f"{path} holds a model of the architecture {architecture!r}; only 'llama' is known")
    if data.get("split.count", 0) > 1:
        raise UserError(f"{path} is one of {data['split.count']} parts; merge them first: llama-gguf-split --merge FIRST OUT")
    if data.get("llama.expert_count", 0):
        raise UserError(f"{path} is a mixture of {data['llama.expert_count']} experts, which is no plain Llama")
    try:
        config = _config(header)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None

    names = {gguf_name(name): name for name in shapes_of(config)}
    lazies = {}
    for stored_name, entry in header.tensors.items():
        if stored_name != ROPE_FACTORS:
            name = names.get(stored_name, stored_name)
            read = partial(_read, path, stored_name, entry, _heads(name, config))
            lazies[name] = Lazy(entry.shape, entry.kind.dtype or torch.float32, read)
    count = Counter(entry.kind.name for entry in header.tensors.values())
    facts = {"name": data.get("general.name", ""), "version": str(header.version),
             "types": ", ".join(f"{number} {kind}" for kind, number in count.most_common())}  # fmt: skip
    weights = Weights(config, lazies, tokenizer, KIND, {key: value for key, value in facts.items() if value})
    check_shapes(weights, path, "metadata")
    if tokenizer is None and "tokenizer.ggml.model" not in data:
        weights.odd.append("the file has no tokenizer")
    elif tokenizer is None:
        try:
            weights.tokenizer = read_tokenizer(data)
        except UserError as error:
            weights.odd.append(f"its tokenizer is left out: {error}")
    if weights.tokenizer is not None and len(weights.tokenizer) > config.vocab_size:
        raise UserError(f"{path}: the tokenizer has {len(weights.tokenizer)} tokens, the embedding {config.vocab_size} rows; one of the "
                        "two belongs to another model")  # fmt: skip
    return weights


def _read(path: Path, name: str, entry: Entry, heads: int | None) -> Tensor:
    """One tensor in memory of its own; q and k (`heads`) with their rows in Hugging Face's order."""
    tensor = torch.empty(entry.shape, dtype=entry.kind.dtype or torch.float32)
    with path.open("rb") as file:
        file.seek(entry.offset)
        for values in _pieces(tensor):
            data = torch.empty(entry.kind.nbytes(values.shape), dtype=torch.uint8)
            if file.readinto(data.numpy().data) < len(data):
                raise UserError(f"{path} ends in the middle of {name}; copy or download it again")
            values.copy_(decode(data, entry.kind).view(values.shape))
    return unpermute(tensor, heads) if heads else tensor


def _config(header: _Header) -> LlamaConfig:
    """The architecture that the metadata describes. Raises UserError for what is missing, or no Llama's."""
    data, wrong = header.metadata, []

    def number(key: str, default=None):
        value = data.get(f"llama.{key}", default)
        if isinstance(value, list) and value and all(other == value[0] for other in value):  # one for every layer, all alike
            value = value[0]
        if value is None or not isinstance(value, (int, float)):
            wrong.append(f"llama.{key} is {'missing' if value is None else 'not one number'}")
        return value

    keys = {"hidden_size": "embedding_length", "intermediate_size": "feed_forward_length", "num_hidden_layers": "block_count",
            "num_attention_heads": "attention.head_count", "max_position_embeddings": "context_length",
            "rms_norm_eps": "attention.layer_norm_rms_epsilon"}  # fmt: skip
    values = {field: number(key) for field, key in keys.items()}
    if "token_embd.weight" not in header.tensors:
        wrong.append("token_embd.weight is missing")
    if not wrong and values["num_hidden_layers"] > len(header.tensors):
        wrong.append(f"llama.block_count is {values['num_hidden_layers']}, and there are {len(header.tensors)} tensors")
    wrong += [f"llama.{keys[field]} is {value}" for field, value in values.items() if not wrong and value <= 0]
    if wrong:
        raise UserError("; ".join(wrong))
    values["num_key_value_heads"] = number("attention.head_count_kv", values["num_attention_heads"])
    values["head_dim"] = number("attention.key_length", int(values["hidden_size"] // max(1, values["num_attention_heads"])))
    values["rope_theta"] = number("rope.freq_base", 10000.0)
    values["vocab_size"] = number("vocab_size", header.tensors["token_embd.weight"].shape[0])
    for key in ("attention.value_length", "rope.dimension_count"):
        if number(key, values["head_dim"]) != values["head_dim"]:
            wrong.append(f"llama.{key} is {data[f'llama.{key}']} and the head size {values['head_dim']}, which is no plain Llama's")
    if wrong:
        raise UserError("; ".join(wrong))
    ids = {name: data.get(f"tokenizer.ggml.{name}_token_id") for name in ("bos", "eos", "eot", "padding")}
    for name, token_id in ids.items():
        if token_id is not None and not (isinstance(token_id, int) and 0 <= token_id < values["vocab_size"]):
            raise UserError(f"tokenizer.ggml.{name}_token_id is {token_id}, and the embedding has {values['vocab_size']} rows")
    ends = list(dict.fromkeys(token_id for token_id in (ids["eos"], ids["eot"]) if token_id is not None))
    values["rope_scaling"] = _rope_scaling(header, values["max_position_embeddings"])
    try:
        exact = dict(json.loads(data.get(EXACT, "{}")))
    except (TypeError, ValueError):
        raise UserError(f"its {EXACT} is damaged: {data[EXACT]!r}") from None
    config = LlamaConfig(
        **values | {field: exact[field] for field in EXACT_FIELDS if field in exact},
        tie_word_embeddings="output.weight" not in header.tensors,
        attention_bias="blk.0.attn_q.bias" in header.tensors,
        mlp_bias="blk.0.ffn_up.bias" in header.tensors,
        bos_token_id=ids["bos"],
        eos_token_id=ends if len(ends) > 1 else ends[0] if ends else None,
        pad_token_id=ids["padding"],
    )
    if ROPE_FACTORS in header.tensors:
        stored = _read(header.path, ROPE_FACTORS, header.tensors[ROPE_FACTORS], None)
        if stored.shape != (config.head_dim // 2,) or not torch.allclose(stored, rope_factors(config), rtol=1e-4):
            raise UserError(f"{ROPE_FACTORS} is not Llama-3's scaling with {config.rope_scaling}; such a RoPE is not known here")
    return config


def _rope_scaling(header: _Header, context_length: int) -> dict | None:
    """config.json's rope_scaling, as far as the file says it in everybody's terms."""
    data, at = header.metadata, "llama.rope.scaling"
    if ROPE_FACTORS in header.tensors:
        # The tensor does not say the numbers it was made from: those of Llama-3.1 and 3.2, but for the factor, its largest value.
        largest = float(_read(header.path, ROPE_FACTORS, header.tensors[ROPE_FACTORS], None).max())
        return {"rope_type": "llama3", "factor": float(f"{largest:.6g}"), "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                "original_max_position_embeddings": data.get(f"{at}.original_context_length", 8192)}  # fmt: skip
    factor = data.get(f"{at}.factor", data.get("llama.rope.scale_linear", 0.0))
    kind = data.get(f"{at}.type", "linear" if factor not in (0.0, 1.0) else "none")
    if kind == "none" or (kind == "linear" and factor in (0.0, 1.0)):
        return None
    if kind == "yarn":
        scaling = {"rope_type": "yarn", "factor": factor,
                   "original_max_position_embeddings": data.get(f"{at}.original_context_length", context_length)}  # fmt: skip
        if f"{at}.attn_factor" in data:
            scaling["attention_factor"] = data[f"{at}.attn_factor"] * _yarn_attention(factor)
        return scaling | {key: data[f"{at}.yarn_{key}"] for key in ("beta_fast", "beta_slow") if f"{at}.yarn_{key}" in data}
    return {"rope_type": kind, "factor": factor}  # LlamaConfig refuses what it does not know
