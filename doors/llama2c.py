"""llama2.c: one file that a C program of a thousand lines maps into memory and runs.

    DIR/model.bin        the weights: version 0 (fp32, for run.c), 1 (fp32, no C program reads it) or 2 (int8, for runq.c)
    DIR/tokenizer.bin    the vocabulary, for `run DIR/model.bin -z DIR/tokenizer.bin`

Everything is little-endian, matrices are [out, in], row by row. L layers, D hidden size, V vocabulary, S longest text:

    version 0   7 int32: D, feed-forward size, L, heads, key/value heads, V (negative: the head has weights of its own), S
                embedding, then of every layer: attention norms, q, k, v, o, feed-forward norms, gate, down, up; final norm;
                cosines and sines [S, head size / 2] (which today's run.c computes itself, and skips); head if not shared
    version 1   256 bytes: "24ka", int32 version, the 7 int32 (V positive), one byte: is the head shared?, zeros
                attention norms, feed-forward norms, final norm, embedding, q, k, v, o, gate, down, up, head if not shared
    version 2   as version 1, with int32 group size after that one byte, at the odd offset 37
                norms in fp32; then of every matrix its int8 values, and behind them one fp32 scale per group of them
    tokenizer   uint32 length of the longest entry; for each of the V tokens: fp32 score, uint32 length, UTF-8 with plain spaces;
                bytes are spelled "<0x0A>", BOS and EOS "\\n<s>\\n" and "\\n</s>\\n"

"all layers' q, then all layers' k", not layer by layer. Rows of q and k are in Meta's interleaved order. What the file does not
say the C programs hard-code: theta 10000, eps 1e-5, no RoPE scaling, BOS 1 and EOS 2, bytes at 3 … 258, a space put before the
text. `problems` refuses what would come out wrong for every text; `remarks` says what a user should know of the rest.

Version 0 is exact in both directions for fp32, bf16 and fp16. Version 2 rounds: value = int8 · scale, scale = largest magnitude
of the group / 127. Memory to write: the largest tensor as it comes from the source, twice for q and k, and about 100 MB; to read:
2.3 times the largest tensor in fp32.
Written from the format's description; llama2.c is Andrej Karpathy's (github.com/karpathy/llama2.c).
"""

from __future__ import annotations

from settings import UserError

import math
import string
import struct
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from config import LlamaConfig
from model import rope_frequencies
from sentencepiece_model import BYTE, CONTROL, NORMAL, SPACE, UNKNOWN, sentencepiece_bytes
from tokenizer import SentencePieceTokenizer, Tokenizer, load_tokenizer
from torch_files import tensor_bytes
from weights import Lazy, Weights, check_shapes, permute, unpermute

KIND = "llama2.c"
MODEL, TOKENIZER = "model.bin", "tokenizer.bin"
MAGIC, HEADER_BYTES = 0x616B3432, 256  # of versions 1 and 2
THETA, EPS = 10000.0, 1e-5  # what the C programs compute with
BOS, EOS, FIRST_BYTE = 1, 2, 3  # the tokens that they take for these
NEVER = -1e10  # a score that their merging does not take: it looks for better ones than this
C_INT = 2**31 - 1
BLOCK = 1 << 20  # numbers converted at a time
ROPE_TABLES = "cosines and sines"

# ----------------------------------------------------------------------------------------------------------------------
# The header, and what follows from it: which tensor lies where


@dataclass(frozen=True)
class Entry:
    """A tensor in the file. rotary_heads: of q and k, whose rows are interleaved. group_size: 0 is fp32, else int8 and scales."""

    name: str
    shape: tuple[int, ...]
    offset: int
    rotary_heads: int
    group_size: int

    @property
    def nbytes(self) -> int:
        return _stored(math.prod(self.shape), self.group_size)


@dataclass(frozen=True)
class Header:
    """The seven numbers of the header in its order, and what else it says."""

    dim: int
    hidden_dim: int
    layers: int
    heads: int
    kv_heads: int
    vocab_size: int
    seq_len: int
    version: int = 0
    shared: bool = True  # the head is the embedding
    group_size: int = 0  # of version 2

    @classmethod
    def of(cls, config: LlamaConfig, version: int, group_size: int) -> Header:
        return cls(config.hidden_size, config.intermediate_size, config.num_hidden_layers, config.num_attention_heads,
                   config.num_key_value_heads, config.vocab_size, config.max_position_embeddings, version,
                   config.tie_word_embeddings, group_size_for(config, group_size) if version == 2 else 0)  # fmt: skip

    @classmethod
    def parse(cls, data: bytes) -> Header | None:
        """From the first 256 bytes of a file, or fewer if it has no more. None if they are too few."""
        if data[:4] == struct.pack("<I", MAGIC):
            if len(data) < HEADER_BYTES:
                return None
            version, *sizes, shared, group_size = struct.unpack_from("<8iBi", data, 4)
            return cls(*sizes, version, bool(shared), group_size if version == 2 else 0)
        if len(data) < 28:
            return None
        *sizes, vocab_size, seq_len = struct.unpack_from("<7i", data)
        return cls(*sizes, abs(vocab_size), seq_len, 0, vocab_size > 0)

    def pack(self) -> bytes:
        sizes = (self.dim, self.hidden_dim, self.layers, self.heads, self.kv_heads)
        if self.version == 0:
            return struct.pack("<7i", *sizes, self.vocab_size if self.shared else -self.vocab_size, self.seq_len)
        data = struct.pack("<I8iBi", MAGIC, self.version, *sizes, self.vocab_size, self.seq_len, self.shared, self.group_size)
        return data.ljust(HEADER_BYTES, b"\0")

    def config(self) -> LlamaConfig:
        return LlamaConfig(
            self.vocab_size, self.dim, self.hidden_dim, self.layers, self.heads, self.kv_heads,
            max_position_embeddings=self.seq_len, rms_norm_eps=EPS, rope_theta=THETA, tie_word_embeddings=self.shared,
            bos_token_id=BOS, eos_token_id=EOS,
        )  # fmt: skip

    def problems(self) -> list[str]:
        """Why no model can have these sizes."""
        sizes = {"dim": self.dim, "hidden_dim": self.hidden_dim, "n_layers": self.layers, "n_heads": self.heads,
                 "n_kv_heads": self.kv_heads, "vocab_size": self.vocab_size, "seq_len": self.seq_len}  # fmt: skip
        largest = {"n_layers": 10**4, "n_heads": 10**4, "n_kv_heads": 10**4}
        found = [f"{name} {size}" for name, size in sizes.items() if not 0 < size <= largest.get(name, 1 << 26)]
        if self.version not in (0, 1, 2):
            found.append(f"version {self.version}, of which nothing is known")
        if found:
            return found
        if self.dim % self.heads or self.dim // self.heads % 2:
            found.append(f"dim {self.dim} for {self.heads} heads")
        if self.heads % self.kv_heads:
            found.append(f"{self.heads} heads for {self.kv_heads} key/value heads")
        if self.version == 2 and not (self.group_size > 0 and all(
                math.prod(shape) % self.group_size == 0 for _, _, shape in self._parts() if len(shape) == 2)):  # fmt: skip
            found.append(f"group size {self.group_size}, which does not divide the matrices")
        return found

    def _parts(self) -> list[tuple[str, int, tuple[int, ...]]]:
        """(name with {} for the layer, how many, shape) in the file's order."""
        D, F, L, kv = self.dim, self.hidden_dim, self.layers, self.dim // self.heads * self.kv_heads
        embedding = [("model.embed_tokens.weight", 1, (self.vocab_size, D))]
        attention_norms = [("model.layers.{}.input_layernorm.weight", L, (D,))]
        attention = [("model.layers.{}.self_attn.q_proj.weight", L, (D, D)),
                     ("model.layers.{}.self_attn.k_proj.weight", L, (kv, D)),
                     ("model.layers.{}.self_attn.v_proj.weight", L, (kv, D)),
                     ("model.layers.{}.self_attn.o_proj.weight", L, (D, D))]  # fmt: skip
        mlp_norms = [("model.layers.{}.post_attention_layernorm.weight", L, (D,))]
        mlp = [("model.layers.{}.mlp.gate_proj.weight", L, (F, D)),
               ("model.layers.{}.mlp.down_proj.weight", L, (D, F)),
               ("model.layers.{}.mlp.up_proj.weight", L, (F, D))]  # fmt: skip
        final_norm = [("model.norm.weight", 1, (D,))]
        head = [] if self.shared else [("lm_head.weight", 1, (self.vocab_size, D))]
        if self.version == 0:
            tables = [(ROPE_TABLES, 1, (2, self.seq_len, self.dim // self.heads // 2))]
            return embedding + attention_norms + attention + mlp_norms + mlp + final_norm + tables + head
        return attention_norms + mlp_norms + final_norm + embedding + attention + mlp + head

    @property
    def nbytes(self) -> int:
        """The size of the whole file."""
        start = 28 if self.version == 0 else HEADER_BYTES
        return start + sum(count * _stored(math.prod(shape), self._group_size(shape)) for _, count, shape in self._parts())

    def entries(self) -> Iterator[Entry]:
        offset = 28 if self.version == 0 else HEADER_BYTES
        for name, count, shape in self._parts():
            heads = self.heads if "q_proj" in name else self.kv_heads if "k_proj" in name else 0
            for layer in range(count):
                entry = Entry(name.format(layer), shape, offset, heads, self._group_size(shape))
                yield entry
                offset += entry.nbytes

    def _group_size(self, shape: tuple[int, ...]) -> int:
        return self.group_size if len(shape) == 2 else 0  # 0 in versions 0 and 1


def _stored(numbers: int, group_size: int) -> int:
    return numbers + numbers // group_size * 4 if group_size else numbers * 4


def group_size_for(config: LlamaConfig, wanted: int = 64) -> int:
    """The group size of version 2: `wanted`, halved until it divides the lengths of all rows, hidden and feed-forward size.

    (runq.c multiplies row by row and forgets what is left over at the end of a row.)
    """
    while wanted > 1 and (config.hidden_size % wanted or config.intermediate_size % wanted):
        wanted //= 2
    return wanted


# ----------------------------------------------------------------------------------------------------------------------
# Reading


def recognises(path: Path) -> bool:
    """Whether this is such a file, or a directory with model.bin: by the magic number; version 0 has none, so by sizes that a
    model can have. (A truncated file is one, and open_weights says what is missing.)"""
    try:
        with _model_file(path).open("rb") as file:
            data = file.read(HEADER_BYTES)
    except OSError:
        return False
    header = Header.parse(data)
    return data[:4] == struct.pack("<I", MAGIC) or (header is not None and not header.problems())


def _model_file(path: Path) -> Path:
    path = Path(path)
    return path / MODEL if path.is_dir() else path


def open_weights(path: Path, tokenizer: Tokenizer | None = None, tokenizer_bin: Path | None = None) -> Weights:
    """A model.bin of version 0, 1 or 2, or the directory that holds it. Version 2 is dequantised as it is read.

    tokenizer: the model's, if it is at hand in another format. Without it tokenizer_bin, or the tokenizer.bin beside the
    model, becomes a sentencepiece model (`read_tokenizer`). Raises UserError for what is no such file, a size that is not what
    the header says (naming the tensor where the file ends), and a tokenizer that does not fit.
    """
    path = _model_file(path)
    if not path.is_file():
        raise UserError(f"{path} {'is a directory' if path.is_dir() else 'does not exist'}; llama2.c's model is one file")
    header = _read_header(path)
    config = header.config()
    tensors = {entry.name: Lazy(torch.Size(entry.shape), torch.float32, partial(_read, path, entry))
               for entry in header.entries() if entry.name != ROPE_TABLES}  # fmt: skip
    kind = f"int8 in groups of {header.group_size}" if header.version == 2 else "fp32"
    facts = {"version": f"{header.version} ({kind})"}
    weights = Weights(config, tensors, tokenizer, KIND, facts)
    check_shapes(weights, path, "header")

    beside = path.parent / TOKENIZER
    if tokenizer is None and (tokenizer_bin is not None or beside.is_file()):
        weights.tokenizer = read_tokenizer(Path(tokenizer_bin or beside), header.vocab_size)
        weights.odd.append(f"{TOKENIZER} does not say how a text starts: taken as run.c does, with a space put before it")
    elif tokenizer is None:
        weights.odd.append(f"no {TOKENIZER} beside {path.name}: the model comes without a tokenizer")
    elif len(tokenizer) > header.vocab_size:
        raise UserError(f"the tokenizer has {len(tokenizer)} entries, {path} only {header.vocab_size}; it belongs to another model")
    elif len(tokenizer) < header.vocab_size:
        weights.odd.append(f"the tokenizer has {len(tokenizer)} entries, the model {header.vocab_size}")
    return weights


def _read_header(path: Path) -> Header:
    size = path.stat().st_size
    with path.open("rb") as file:
        header = Header.parse(file.read(HEADER_BYTES))
    if header is None:
        raise UserError(f"{path} is too short for a llama2.c model: {size} bytes; copy or download it again")
    if problems := header.problems():
        raise UserError(f"{path} is no llama2.c model, or damaged; its header says {', '.join(problems)}")
    if size > header.nbytes:
        raise UserError(f"{path} has {size:,} bytes, {size - header.nbytes:,} more than its header says (version {header.version}): "
                        "it is no llama2.c model, or damaged")  # fmt: skip
    if size < header.nbytes:
        last = next(entry for entry in header.entries() if entry.offset + entry.nbytes > size)
        raise UserError(f"{path} is truncated: it ends at {size:,} of {header.nbytes:,} bytes, in {last.name}; "
                        "copy or download it again")  # fmt: skip
    return header


def _read(path: Path, entry: Entry) -> Tensor:
    """One tensor, fp32, in Hugging Face's layout."""
    numbers = math.prod(entry.shape)
    with path.open("rb") as file:
        file.seek(entry.offset)
        if not entry.group_size:
            tensor = torch.from_numpy(np.fromfile(file, "<f4", numbers))
        else:
            values = torch.from_numpy(np.fromfile(file, np.int8, numbers))
            scales = torch.from_numpy(np.fromfile(file, "<f4", numbers // entry.group_size))
            tensor = dequantize(values, scales)
    tensor = tensor.view(entry.shape)
    return unpermute(tensor, entry.rotary_heads) if entry.rotary_heads else tensor


# ----------------------------------------------------------------------------------------------------------------------
# Writing


def problems(source: Weights, version: int = 0, group_size: int = 64) -> list[str]:
    """Why this model cannot go to llama2.c, all at once; [] if it can."""
    config, found = source.config, []
    if version not in (0, 2):
        found.append(f"version {version} is not written; there are 0 (fp32) and 2 (int8)")
    if config.rope_theta != THETA:
        found.append(f"its rope theta is {config.rope_theta:g}; the C program computes with {THETA:g}")
    if config.rope_scaling and config.rope_scaling["rope_type"] != "default":
        found.append(f"its RoPE is scaled ({config.rope_scaling['rope_type']}); the C program has plain RoPE only")
    if config.rms_norm_eps != EPS:
        found.append(f"its rms_norm_eps is {config.rms_norm_eps:g}; the C program computes with {EPS:g}")
    if config.attention_bias or config.mlp_bias:
        found.append("it has biases, for which the file has no place")
    if config.head_dim * config.num_attention_heads != config.hidden_size:
        found.append(f"{config.num_attention_heads} heads of {config.head_dim} are not its hidden size {config.hidden_size}; "
                     "the C program takes the head size to be hidden size / heads")  # fmt: skip
    matrix = config.hidden_size * max(config.vocab_size, config.intermediate_size)
    cache = config.num_hidden_layers * config.max_position_embeddings * config.num_key_value_heads * config.head_dim
    found += [f"{what} of {numbers:,} numbers is more than the C program's 32-bit integers count" for what, numbers
              in (("a matrix", matrix), ("a key cache", cache)) if numbers > C_INT]  # fmt: skip
    if version == 2 and group_size < 1:
        found.append(f"a group size must be at least 2, not {group_size}")
    elif version == 2 and group_size_for(config, group_size) == 1:
        found.append(f"no group size: {group_size}, halved until it divides hidden size {config.hidden_size} and feed-forward size "
                     f"{config.intermediate_size}, is 1, and int8 larger than fp32; give a power of two, or version 0")  # fmt: skip
    return found + (_tokenizer_problems(source.tokenizer, config.vocab_size) if source.tokenizer is not None else [])


def _tokenizer_problems(tokenizer: Tokenizer, vocab_size: int) -> list[str]:
    if not isinstance(tokenizer, SentencePieceTokenizer) or not tokenizer.model.is_bpe:
        kind = "a unigram model" if isinstance(tokenizer, SentencePieceTokenizer) else "a tokenizer.json"
        return [f"its tokenizer is {kind}; the C program knows sentencepiece's byte pair encoding only, pieces with scores"]
    model, found = tokenizer.model, []
    if model.charsmap or model.remove_extra_whitespaces:
        found.append("its tokenizer changes the text before it splits it (normalisation), which the C program does not")
    if odd := [text for text, _, kind in model.pieces if kind not in (NORMAL, BYTE, CONTROL, UNKNOWN)]:
        found.append(f"its tokenizer has user-defined or unused pieces ({', '.join(odd[:3])}), which the C program would split otherwise")
    if tokenizer.bos_id != BOS:
        found.append(f"its tokenizer's BOS is token {tokenizer.bos_id}; the C program starts every text with token {BOS}")
    if SPACE not in tokenizer.pieces:
        found.append("its tokenizer has no piece for a space, which the C program puts before every text")
    spelled = Counter(text.replace(SPACE, " ") for text, _, _ in model.pieces)
    if twice := [text for text, count in spelled.items() if count > 1]:
        found.append(f"two of its tokenizer's pieces become {twice[0]!r}, which the C program could not tell apart")
    if len(tokenizer) > vocab_size:
        found.append(f"its tokenizer has {len(tokenizer)} entries, the model only {vocab_size}")
    return found


def remarks(source: Weights, version: int = 0, group_size: int = 64) -> list[str]:
    """What the C programs do otherwise than Cria with a model that they can run."""
    found, tokenizer = [], source.tokenizer
    if version == 2 and (size := group_size_for(source.config, group_size)) != group_size:
        found.append(f"groups of {size} rather than {group_size}, to divide the hidden and the feed-forward size")
    if tokenizer is None:
        return [*found, f"without a tokenizer no {TOKENIZER} is written, and the C program does not start"]
    if not tokenizer.dummy_prefix:
        found.append("run.c puts a space before every prompt; this tokenizer does not, so prompts start as the model never saw it")
    if not tokenizer.add_bos:
        found.append(f"run.c starts every text with {tokenizer.pieces[BOS]} (token {BOS}) and stops at it; this model's texts were "
                     f"not started with it, and run.c goes on after {tokenizer.special_texts.get(tokenizer.eos_id, 'EOS')}")  # fmt: skip
    first = _first_byte([text for text, _, _ in tokenizer.model.pieces])
    if first != FIRST_BYTE:
        where = "this tokenizer has none" if first is None else f"here they are at {first} … {first + 255}"
        found.append(f"run.c takes tokens {FIRST_BYTE} … {FIRST_BYTE + 255} for bytes, {where}: characters of a prompt that are not "
                     "in the vocabulary (printable ASCII and line ends excepted) reach the model as other tokens")  # fmt: skip
    if tokenizer.eos_id != EOS:
        found.append(f"run.c -m chat ends a turn at token {EOS}; this tokenizer's EOS is {tokenizer.eos_id}")
    return found


def size(source: Weights, version: int = 0, group_size: int = 64) -> int:
    """Bytes that `write` takes."""
    header = Header.of(source.config, version, group_size)
    return header.nbytes + (len(tokenizer_bytes(source.tokenizer, header.vocab_size)) if source.tokenizer is not None else 0)


def write(source: Weights, out: Path, version: int = 0, group_size: int = 64) -> None:
    """Make the directory `out` with model.bin and, if the source has a tokenizer, tokenizer.bin.

    Reads every tensor once, in the file's order. Call `problems` first. Raises UserError where int8 cannot hold a tensor
    because it has values that are not finite.
    """
    header, config = Header.of(source.config, version, group_size), source.config
    out.mkdir(parents=True)
    if source.tokenizer is not None:
        (out / TOKENIZER).write_bytes(tokenizer_bytes(source.tokenizer, config.vocab_size))
    with (out / MODEL).open("wb") as file:
        file.write(header.pack())
        for entry in header.entries():
            tensor = _rope_tables(config) if entry.name == ROPE_TABLES else source.tensors[entry.name].read()
            if entry.rotary_heads:
                tensor = permute(tensor, entry.rotary_heads)
            scales = []
            for block in _blocks(tensor, entry.group_size or 1):
                if entry.group_size:
                    if not block.isfinite().all():
                        raise UserError(f"{entry.name} holds values that are not finite, which int8 cannot store; use version 0")
                    block, scale = quantize(block, entry.group_size)
                    scales.append(scale)
                file.write(tensor_bytes(block))
            for scale in scales:
                file.write(tensor_bytes(scale))


def expected(source: Weights, name: str, tensor: Tensor, version: int = 0, group_size: int = 64) -> Tensor:
    """What reading a tensor back gives: exactly this, in fp32."""
    if version != 2 or tensor.dim() == 1:
        return tensor.float()
    group_size = group_size_for(source.config, group_size)
    # Groups lie within rows, so that it does not matter in which order the rows of q and k are.
    blocks = [dequantize(*quantize(block, group_size)) for block in _blocks(tensor, group_size)]
    return torch.cat(blocks).view(tensor.shape)


def quantize(values: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    """fp32 [n] -> int8 [n] and fp32 scales [n / group_size]: the largest magnitude of a group becomes 127.

    A group of zeros gets the scale 1 (0 would make 0/0).
    """
    groups = values.view(-1, group_size)
    scales = groups.abs().amax(dim=1) / 127
    scales[scales == 0] = 1
    return (groups / scales[:, None]).round_().clamp_(-127, 127).to(torch.int8).view(-1), scales


def dequantize(values: Tensor, scales: Tensor) -> Tensor:
    """int8 [n] and scales [groups] -> fp32 [n]."""
    groups = values.view(len(scales), -1).float()
    return groups.mul_(scales[:, None]).view(-1)


def _blocks(tensor: Tensor, multiple: int) -> Iterator[Tensor]:
    """A tensor's values in order as fp32, some at a time, so that no second copy of all of it is needed."""
    for part in tensor.detach().reshape(-1).split(max(BLOCK // multiple, 1) * multiple):
        yield part.float()


def _rope_tables(config: LlamaConfig) -> Tensor:
    """[2, S, head size / 2]: cosines and sines of every position, which the first run.c looked up."""
    frequencies, _ = rope_frequencies(config, config.max_position_embeddings)
    angles = torch.outer(torch.arange(config.max_position_embeddings, dtype=torch.float32), frequencies)
    return torch.stack((angles.cos(), angles.sin()))


# ----------------------------------------------------------------------------------------------------------------------
# tokenizer.bin


def tokenizer_bytes(tokenizer: SentencePieceTokenizer, vocab_size: int) -> bytes:
    """A tokenizer.bin with as many entries as the model has, because the C program reads so many.

    Special tokens other than BOS and EOS get a score that keeps text from becoming one. Where the bytes are not at 3 … 258, where
    the C program looks for them, printable ASCII and line ends are spelled as the character, which it finds by its text.
    """
    pieces = tokenizer.model.pieces
    first = _first_byte([text for text, _, _ in pieces])
    known = {text.replace(SPACE, " ") for text, _, kind in pieces if kind == NORMAL}
    entries = []
    for i, (text, score, kind) in enumerate(pieces):
        if kind == CONTROL and i in (BOS, EOS):
            text = f"\n{text}\n"
        elif kind == CONTROL:
            score = NEVER
        elif kind == BYTE and first not in (None, FIRST_BYTE):
            char = chr(i - first)
            text = char if char in string.printable and char not in known else text
        entries.append((score, text.replace(SPACE, " ")))
    # Tokens added outside the sentencepiece model; then what the model's vocabulary is padded with.
    entries += [(NEVER, tokenizer.id_to_piece(i)) for i in range(len(entries), vocab_size)]
    encoded = [(score, text.encode()) for score, text in entries]
    longest = max(len(text) for _, text in encoded)
    return struct.pack("<I", longest) + b"".join(struct.pack("<fI", score, len(text)) + text for score, text in encoded)


def read_tokenizer(path: Path, vocab_size: int) -> Tokenizer:
    """The sentencepiece tokenizer of a tokenizer.bin with so many entries.

    The file has no types and no settings. They are what run.c takes them to be: BOS is 1, EOS 2; what can never come out of
    merging is a control token; a space is put before every text, and nothing else is changed. Padding as `tokenizer_bytes`
    writes it is left out. Raises UserError for a file that is damaged, of another size, or no sentencepiece vocabulary.
    """
    entries = _read_entries(path, vocab_size)
    while entries and entries[-1][1] == f"<no token {len(entries) - 1}>":
        entries.pop()
    texts = [text for _, text in entries]
    first, unknown = _first_byte(texts), texts.index("<unk>") if "<unk>" in texts else 0
    pieces = []
    for i, (score, text) in enumerate(entries):
        text = text.replace(" ", SPACE)
        if i == unknown:
            piece = (text, score, UNKNOWN)
        elif i in (BOS, EOS):
            piece = (text.strip("\n"), score, CONTROL)
        elif first is not None and first <= i < first + 256:
            piece = (f"<0x{i - first:02X}>", score, BYTE)
        else:
            piece = (text, 0.0, CONTROL) if score <= NEVER else (text, score, NORMAL)
        pieces.append(piece)
    counts = Counter(text for text, _, _ in pieces)
    twice = [repr(text) for text, count in counts.items() if count > 1]
    if len(pieces) <= EOS or twice or "" in counts:
        what = f"{twice[0]} twice" if twice else "an empty entry" if "" in counts else f"{len(pieces)} entries"
        raise UserError(f"{path} is no sentencepiece vocabulary (it has {what}); give the model's tokenizer in another format")
    data = sentencepiece_bytes(pieces, add_dummy_prefix=True, unk_id=unknown, bos_id=BOS, eos_id=EOS, byte_fallback=first is not None)
    with tempfile.TemporaryDirectory() as directory:
        (Path(directory) / "tokenizer.model").write_bytes(data)
        return load_tokenizer(directory)


def _read_entries(path: Path, vocab_size: int) -> list[tuple[float, str]]:
    """(score, text) of every token."""
    if not path.is_file():
        raise UserError(f"{path} {'is a directory' if path.is_dir() else 'does not exist'}; a {TOKENIZER} is needed")
    data, at, entries = path.read_bytes(), 4, []
    while at < len(data):
        if len(entries) == vocab_size:
            raise UserError(f"{path} has more than the {vocab_size} entries of the model's vocabulary; it belongs to another model")
        score, length = struct.unpack_from("<fI", data, at) if at + 8 <= len(data) else (0.0, len(data))
        if at + 8 + length > len(data):
            raise UserError(f"{path} is no {TOKENIZER}, or truncated: entry {len(entries)} goes beyond its end; copy it again")
        try:
            entries.append((score, data[at + 8 : at + 8 + length].decode()))
        except UnicodeDecodeError:
            raise UserError(f"{path}: entry {len(entries)} is not UTF-8; give the model's tokenizer in another format") from None
        if math.isnan(score):
            raise UserError(f"{path}: entry {len(entries) - 1} has no score (NaN); it is damaged: copy it again")
        at += 8 + length
    if len(entries) < vocab_size:
        raise UserError(f"{path} has {len(entries)} entries and the model {vocab_size}; it belongs to another model")
    return entries


def _first_byte(texts: list[str]) -> int | None:
    """The token of byte 0, from which on the 256 bytes follow, spelled "<0x0A>" or (as tokenizer_bytes may, and the first
    versions of llama2.c did) as the character; None if there are none."""
    last = texts.index("<0xFF>") if "<0xFF>" in texts else FIRST_BYTE + 255
    run = texts[last - 255 : last + 1] if last >= 255 else []
    return last - 255 if len(run) == 256 and all(text in (f"<0x{i:02X}>", chr(i)) for i, text in enumerate(run)) else None
