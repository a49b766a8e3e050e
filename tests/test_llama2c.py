"""doors/llama2c.py against a reader and a forward pass written here from the format's description, against sentencepiece, and
against the C programs themselves where they are at hand.
"""

from __future__ import annotations

from settings import UserError

import io
import itertools
import os
import shutil
import struct
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import torch
from tokenizers_at_hand import NASTY, VOCAB_SIZE, real, sample_text

from doors import llama2c
from model import Llama, LlamaConfig
from sentencepiece_model import BYTE, CONTROL, sentencepiece_bytes
from tokenizer import load_tokenizer
from weights import Lazy, Weights

SHAPES = {
    "MHA": {},
    "MHA tied": {"tie_word_embeddings": True},
    "GQA, odd vocabulary": {"num_key_value_heads": 2, "vocab_size": 1013},
    "GQA tied": {"num_key_value_heads": 2, "tie_word_embeddings": True},
    "MQA, odd feed-forward size": {"num_key_value_heads": 1, "intermediate_size": 99},
}
PROMPTS = ["", "The capital of", "法国的首都是", " 12 x", "问：中国在哪里？\n\n答："]


def model_of(**sizes) -> Llama:
    """Random weights, large enough that every one matters and no two logits are near."""
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCAB_SIZE, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
             "num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 48, **sizes}  # fmt: skip
    model = Llama(LlamaConfig(**sizes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(1.0 if parameter.dim() == 1 else 0.0, 0.2)
    return model


def source_of(model: Llama, tokenizer=None, reads: list | None = None) -> Weights:
    """The model as convert.py hands it over. reads: where the names of the tensors go as they are read."""
    def lazy(name, parameter):
        def read():
            if reads is not None:
                reads.append(name)
            return parameter.detach().clone()

        return Lazy(parameter.shape, parameter.dtype, read)

    return Weights(model.config, {name: lazy(name, p) for name, p in model.named_parameters()}, tokenizer)


def written(out: Path, model: Llama, tokenizer=None, **options) -> Path:
    source = source_of(model, tokenizer)
    assert llama2c.problems(source, **options) == []
    llama2c.write(source, out, **options)
    assert sum(file.stat().st_size for file in out.iterdir()) == llama2c.size(source, **options)
    return out


@pytest.fixture(scope="module")
def llama_tokenizer(tmp_path_factory):
    """Built like Llama-2's: bytes at 3 … 258, and a space put before every text."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sample_text().split("\n")), model_writer=model, model_type="bpe", vocab_size=VOCAB_SIZE,
        byte_fallback=True, split_digits=True, normalization_rule_name="identity", remove_extra_whitespaces=False,
        num_threads=1, minloglevel=2,
    )  # fmt: skip
    directory = tmp_path_factory.mktemp("llama-tokenizer")
    (directory / "tokenizer.model").write_bytes(model.getvalue())
    return load_tokenizer(directory)


# ----------------------------------------------------------------------------------------------------------------------
# The reader and the forward pass of the C programs, from their description


class Reader:
    """model.bin of version 0 or 2, as llama2.c's programs take it, in NumPy."""

    def __init__(self, path: Path):
        self.data, self.at = path.read_bytes(), 28
        self.group_size = 0
        sizes = np.frombuffer(self.data, "<i4", 7)
        shared = sizes[5] > 0
        version2 = self.data[:4] == b"24ka"
        if version2:
            assert struct.unpack_from("<i", self.data, 4) == (2,)
            sizes, shared = np.frombuffer(self.data, "<i4", 7, 8), self.data[36]
            self.group_size, self.at = struct.unpack_from("<i", self.data, 37)[0], 256
            assert not any(self.data[41:256])
        self.dim, self.hidden, self.layers, self.heads, self.kv_heads, self.vocab, self.seq_len = map(int, abs(sizes))
        kv = self.dim // self.heads * self.kv_heads
        if version2:
            self.att_norm, self.ffn_norm = self.floats(self.layers, self.dim), self.floats(self.layers, self.dim)
            self.norm = self.floats(self.dim)
        self.embedding = self.matrices(1, self.vocab, self.dim)[0]
        if not version2:
            self.att_norm = self.floats(self.layers, self.dim)
        self.wq, self.wk = self.matrices(self.layers, self.dim, self.dim), self.matrices(self.layers, kv, self.dim)
        self.wv, self.wo = self.matrices(self.layers, kv, self.dim), self.matrices(self.layers, self.dim, self.dim)
        if not version2:
            self.ffn_norm = self.floats(self.layers, self.dim)
        self.w1 = self.matrices(self.layers, self.hidden, self.dim)
        self.w2 = self.matrices(self.layers, self.dim, self.hidden)
        self.w3 = self.matrices(self.layers, self.hidden, self.dim)
        if not version2:
            self.norm = self.floats(self.dim)
            self.cosines, self.sines = (self.floats(self.seq_len, self.dim // self.heads // 2) for _ in range(2))
        self.head = self.embedding if shared else self.matrices(1, self.vocab, self.dim)[0]
        assert self.at == len(self.data)

    def floats(self, *shape: int) -> np.ndarray:
        count = int(np.prod(shape))
        self.at += 4 * count
        return np.frombuffer(self.data, "<f4", count, self.at - 4 * count).reshape(shape)

    def matrices(self, count: int, rows: int, columns: int) -> np.ndarray:
        if not self.group_size:
            return self.floats(count, rows, columns)
        found = []
        for _ in range(count):
            values = np.frombuffer(self.data, np.int8, rows * columns, self.at).astype(np.float32)
            self.at += rows * columns
            scales = self.floats(rows * columns // self.group_size)
            found.append((values.reshape(-1, self.group_size) * scales[:, None]).reshape(rows, columns))
        return np.stack(found)

    def greedy(self, prompt: list[int], count: int, rounded: bool = False) -> list[int]:
        """The `count` likeliest tokens after the prompt, one position after the other. rounded: as runq.c computes, which
        rounds what it multiplies with the weights to int8 in groups, too."""
        self.rounded = rounded
        keys, values = ([[] for _ in range(self.layers)] for _ in range(2))
        tokens = list(prompt)
        while len(tokens) < len(prompt) + count:
            for position in range(len(keys[0]), len(tokens)):
                logits = self.forward(tokens[position], position, keys, values)
            tokens.append(int(np.argmax(logits)))
        return tokens[len(prompt) :]

    def times(self, matrix: np.ndarray, x: np.ndarray) -> np.ndarray:
        if self.rounded:
            groups = x.reshape(-1, self.group_size)
            scales = np.abs(groups).max(1, keepdims=True) / np.float32(127)
            x = (np.sign(groups) * np.floor(np.abs(groups) / scales + np.float32(0.5)) * scales).reshape(-1)
        return matrix @ x

    def forward(self, token: int, position: int, keys: list, values: list) -> np.ndarray:
        def norm(x, weight):
            return weight * (x / np.sqrt(np.mean(x * x) + np.float32(1e-5)))

        def turned(x):  # pairs (0, 1), (2, 3), … of every head
            pairs = x.reshape(-1, size // 2, 2)
            angle = position * (1 / np.float32(10000) ** (np.arange(0, size, 2, dtype=np.float32) / size))
            cos, sin = np.cos(angle), np.sin(angle)
            first, second = pairs[..., 0], pairs[..., 1]
            return np.stack((first * cos - second * sin, first * sin + second * cos), -1).reshape(-1, size)

        size = self.dim // self.heads
        x = self.embedding[token]
        for layer in range(self.layers):
            y = norm(x, self.att_norm[layer])
            q = turned(self.times(self.wq[layer], y))
            keys[layer].append(turned(self.times(self.wk[layer], y)))
            values[layer].append(self.times(self.wv[layer], y).reshape(-1, size))
            heads = []
            for head in range(self.heads):
                shared = head // (self.heads // self.kv_heads)
                scores = np.array([q[head] @ key[shared] for key in keys[layer]]) / np.sqrt(np.float32(size))
                weights = np.exp(scores - scores.max())
                heads.append(sum(w * v[shared] for w, v in zip(weights / weights.sum(), values[layer])))
            x = x + self.times(self.wo[layer], np.concatenate(heads))
            y = norm(x, self.ffn_norm[layer])
            gate = self.times(self.w1[layer], y)
            x = x + self.times(self.w2[layer], gate / (1 + np.exp(-gate)) * self.times(self.w3[layer], y))
        return self.times(self.head, norm(x, self.norm))


def read_entries(path: Path) -> list[tuple[float, bytes]]:
    """tokenizer.bin: (score, text) of every token."""
    data, at, entries = path.read_bytes(), 4, []
    while at < len(data):
        score, length = struct.unpack_from("<fI", data, at)
        entries.append((score, data[at + 8 : at + 8 + length]))
        at += 8 + length
    assert struct.unpack_from("<I", data) == (max(len(text) for _, text in entries),)
    return entries


def c_encode(entries: list[tuple[float, bytes]], text: str) -> list[int]:
    """How the C programs split a text, without BOS: a space and the characters, those that are not in the vocabulary as their
    bytes + 3; then again and again the pair is merged that makes the best entry."""
    ids = {piece: i for i, (_, piece) in enumerate(entries)}
    tokens = [ids[b" "]] if text else []
    for char in text:
        tokens += [ids[char.encode()]] if char.encode() in ids else [byte + 3 for byte in char.encode()]
    while True:
        merged = [ids.get(entries[left][1] + entries[right][1], -1) for left, right in itertools.pairwise(tokens)]
        scores = [entries[token][0] if token >= 0 else -1e10 for token in merged]
        if max(scores, default=-1e10) <= -1e10:
            return tokens
        at = scores.index(max(scores))
        tokens[at : at + 2] = [merged[at]]


def c_printed(entries: list[tuple[float, bytes]], tokens: list[int]) -> bytes:
    """What the C programs print of a text: no space after BOS, no BOS, and of bytes only those that are printable ASCII."""
    printed = b""
    for before, token in itertools.pairwise(tokens):
        piece = entries[token][1]
        piece = piece[1:] if before == 1 and piece[:1] == b" " else piece
        if piece[:3] == b"<0x" and piece[5:] == b">":
            piece = bytes([int(piece[3:5], 16)])
        printed += piece if len(piece) > 1 or piece.isspace() or b" " <= piece <= b"~" else b""
    return printed


def greedy(model: Llama, prompt: list[int], count: int) -> list[int]:
    return [step[0] for step in model.generate([prompt], count, temperature=0)]


# ----------------------------------------------------------------------------------------------------------------------
# Weights


def test_header_of_version_0(tmp_path):
    out = written(tmp_path / "untied", model_of(num_key_value_heads=2, vocab_size=1013))
    data = (out / "model.bin").read_bytes()
    assert data[:28] == struct.pack("<7i", 64, 96, 2, 4, 2, -1013, 48)
    assert data[:28].hex() == "40000000600000000200000004000000020000000bfcffff30000000"
    assert struct.unpack_from("<f", data, 28)[0] == model_of(num_key_value_heads=2, vocab_size=1013).model.embed_tokens.weight[0, 0]
    out = written(tmp_path / "tied", model_of(tie_word_embeddings=True))
    assert (out / "model.bin").read_bytes()[:28] == struct.pack("<7i", 64, 96, 2, 4, 4, VOCAB_SIZE, 48)
    assert sorted(file.name for file in out.iterdir()) == ["model.bin"]


def test_header_of_version_2(tmp_path):
    out = written(tmp_path / "untied", model_of(num_key_value_heads=2), version=2)
    data = (out / "model.bin").read_bytes()
    assert data[:8] == b"24ka\x02\0\0\0"
    assert data[8:36] == struct.pack("<7i", 64, 96, 2, 4, 2, VOCAB_SIZE, 48)
    assert data[36] == 0 and data[37:41] == b"\x20\0\0\0" and data[41:256] == bytes(215)  # 64 does not divide 96: groups of 32
    norms, embedding = 5 * 64 * 4, VOCAB_SIZE * 64
    layer = 64 * 64 + 2 * 32 * 64 + 64 * 64 + 3 * 64 * 96
    assert len(data) == 256 + norms + (2 * embedding + 2 * layer) * (32 + 4) // 32
    data = (written(tmp_path / "tied", model_of(tie_word_embeddings=True, intermediate_size=128), version=2) / "model.bin").read_bytes()
    assert data[36] == 1 and data[37:41] == b"\x40\0\0\0"


@pytest.mark.parametrize("shape", SHAPES)
def test_version_0_is_exact(shape, tmp_path):
    model = model_of(**SHAPES[shape])
    out = written(tmp_path / "out", model)
    assert llama2c.recognises(out) and llama2c.recognises(out / "model.bin")
    found = llama2c.open_weights(out)
    assert found.config == replace(model.config, bos_token_id=1, eos_token_id=2)
    assert list(found.tensors) == [name for name, _ in model.named_parameters()]
    for name, parameter in model.named_parameters():
        assert torch.equal(found.tensors[name].read(), parameter)
    assert found.facts["version"] == "0 (fp32)"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_stored_exactly(dtype, tmp_path):
    model = model_of().to(dtype)
    found = llama2c.open_weights(written(tmp_path / "out", model))
    for name, parameter in model.named_parameters():
        tensor = found.tensors[name].read()
        assert tensor.dtype == torch.float32 and torch.equal(tensor, parameter.float())
        assert torch.equal(tensor, llama2c.expected(found, name, parameter.detach()))


@pytest.mark.parametrize("shape", SHAPES)
def test_another_reader_continues_alike(shape, tmp_path):
    model = model_of(**SHAPES[shape])
    reader = Reader(written(tmp_path / "out", model) / "model.bin")
    assert greedy(model, [1, 300, 17, 5], 30) == reader.greedy([1, 300, 17, 5], 30)
    angles = np.outer(np.arange(48), 10000.0 ** (-np.arange(0, 16, 2) / 16))
    assert np.allclose(reader.cosines, np.cos(angles), atol=1e-5) and np.allclose(reader.sines, np.sin(angles), atol=1e-5)


@pytest.mark.parametrize("shape", ["MHA", "GQA tied"])
def test_version_2_is_what_we_say_that_it_is(shape, tmp_path):
    model = model_of(**SHAPES[shape])
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 32:64] = 0  # a group of zeros
        model.model.layers[1].mlp.up_proj.weight[4, :32] = 1e-44  # and one whose scale is smaller than numbers usually get
    out = written(tmp_path / "out", model, version=2)
    found, reader = llama2c.open_weights(out), Reader(out / "model.bin")
    for name, parameter in model.named_parameters():
        assert torch.equal(found.tensors[name].read(), llama2c.expected(found, name, parameter.detach(), version=2, group_size=64))
    with torch.no_grad():
        for name, lazy in found.tensors.items():
            own = model.get_parameter(name)
            half_a_step = own.view(-1, 32).abs().amax(1) / 254 if own.dim() > 1 else torch.zeros(2)
            assert ((lazy.read() - own).view(-1, 32).abs().amax(1) <= 1.0001 * half_a_step + 1e-44).all(), name
            own.copy_(lazy.read())
    up = found.tensors["model.layers.1.mlp.up_proj.weight"].read().numpy()
    assert np.array_equal(reader.w3[1], up) and not up[3, 32:64].any()
    assert np.array_equal(reader.embedding, found.tensors["model.embed_tokens.weight"].read().numpy())
    assert greedy(model, [1, 300, 17, 5], 30) == reader.greedy([1, 300, 17, 5], 30)


def test_groups_that_cross_rows_are_read(tmp_path):
    """llama2.c's own exporter asks only that the size of a matrix be a multiple of the group size."""
    model = model_of(intermediate_size=72, num_hidden_layers=1)
    header = llama2c.Header(64, 72, 1, 4, 4, VOCAB_SIZE, 48, version=2, shared=False, group_size=64)
    file, wanted = io.BytesIO(), {}
    file.write(header.pack())
    for entry in header.entries():
        own = model.get_parameter(entry.name).detach()
        if entry.group_size:
            values = torch.randint(-127, 128, own.shape, dtype=torch.int8)
            scales = torch.rand(own.numel() // 64)
            file.write(values.numpy().tobytes() + scales.numpy().tobytes())
            wanted[entry.name] = (values.view(-1, 64) * scales[:, None]).view(own.shape)
        else:
            file.write(own.numpy().tobytes())
    (tmp_path / "x.bin").write_bytes(file.getvalue())
    found = llama2c.open_weights(tmp_path / "x.bin").tensors
    for name, tensor in wanted.items():
        if "q_proj" not in name and "k_proj" not in name:
            assert torch.equal(found[name].read(), tensor)


@pytest.mark.parametrize("tied", [False, True])
def test_version_1(tied, tmp_path):
    """fp32 with the new header, norms first; nothing here writes it."""
    model = model_of(tie_word_embeddings=tied, num_key_value_heads=2)
    state = {name: parameter.detach() for name, parameter in model.named_parameters()}
    layers = [f"model.layers.{i}." for i in range(2)]
    names = [f"{layer}input_layernorm" for layer in layers] + [f"{layer}post_attention_layernorm" for layer in layers]
    names += ["model.norm", "model.embed_tokens"]
    names += [f"{layer}self_attn.{kind}_proj" for kind in "qkvo" for layer in layers]
    names += [f"{layer}mlp.{kind}_proj" for kind in ("gate", "down", "up") for layer in layers]
    names += [] if tied else ["lm_head"]
    data = struct.pack("<I8iB", 0x616B3432, 1, 64, 96, 2, 4, 2, VOCAB_SIZE, 48, tied).ljust(256, b"\0")
    for name in names:
        weight = state[f"{name}.weight"].numpy()
        if name.endswith(("q_proj", "k_proj")):  # row 2i and 2i + 1 of a head are row i of its first and of its second half
            weight = np.concatenate([row for head in weight.reshape(-1, 16, 64) for row in
                                     np.stack((head[:8], head[8:]), 1).reshape(16, 64)[None]])  # fmt: skip
        data += weight.tobytes()
    (tmp_path / "model.bin").write_bytes(data)
    found = llama2c.open_weights(tmp_path)
    assert found.config.tie_word_embeddings == tied and found.facts["version"] == "1 (fp32)"
    assert all(torch.equal(found.tensors[name].read(), tensor) for name, tensor in state.items())
    with pytest.raises(UserError, match=r"in lm_head|in model.layers.1.mlp.up_proj.weight; copy"):
        (tmp_path / "model.bin").write_bytes(data[:-1])
        llama2c.open_weights(tmp_path)
    assert llama2c.problems(source_of(model), version=1) == ["version 1 is not written; there are 0 (fp32) and 2 (int8)"]


@pytest.mark.parametrize("version", [0, 2])
def test_every_tensor_is_read_once_in_the_order_of_the_file(version, tmp_path, monkeypatch):
    monkeypatch.setattr(llama2c, "BLOCK", 1000)
    reads, model = [], model_of(num_key_value_heads=2)
    llama2c.write(source_of(model, reads=reads), tmp_path / "small blocks", version=version)
    header = llama2c.Header.of(model.config, version, 64)
    assert reads == [entry.name for entry in header.entries() if entry.name in dict(model.named_parameters())]
    assert sorted(reads) == sorted(dict(model.named_parameters()))
    monkeypatch.undo()
    whole = written(tmp_path / "whole", model, version=version)
    assert (whole / "model.bin").read_bytes() == (tmp_path / "small blocks" / "model.bin").read_bytes()


# ----------------------------------------------------------------------------------------------------------------------
# The tokenizer

TEXTS = [*sample_text().split("\n")[:40], "Ünïcödé 龘😀", "a  b   c", "tab\there\r\n\n", "<s></s><unk>", "x" * 30, "123 + 4",
         *(text for text in NASTY if "\0" not in text and "▁" not in text)]  # fmt: skip


def exported(tokenizer, tmp_path, vocab_size=0) -> Path:
    path = tmp_path / "tokenizer.bin"
    path.write_bytes(llama2c.tokenizer_bytes(tokenizer, vocab_size or len(tokenizer)))
    return path


def test_tokenizer_bin_of_a_llama_tokenizer(llama_tokenizer, tmp_path):
    path = exported(llama_tokenizer, tmp_path)
    entries = read_entries(path)
    assert entries[:3] == [(0.0, b"<unk>"), (0.0, b"\n<s>\n"), (0.0, b"\n</s>\n")]
    assert entries[3 + 10] == (0.0, b"<0x0A>") and len(entries) == VOCAB_SIZE
    assert (-0.0, "法国".encode()) in [(0.0, text) for _, text in entries]
    again = llama2c.read_tokenizer(path, VOCAB_SIZE)
    for text in TEXTS:
        ids = llama_tokenizer.encode(text)
        assert again.encode(text) == ids == c_encode(entries, text)
        assert again.decode(ids) == text
    assert again.fingerprint == llama_tokenizer.fingerprint
    assert (again.bos_id, again.eos_id, again.add_bos) == (1, 2, True)


def test_tokenizer_bin_of_our_own(ours, tmp_path):
    """Bytes not where the C program looks for them, other special tokens, and no space put before a text."""
    path = exported(ours, tmp_path)
    entries = read_entries(path)
    assert entries[3] == (-1e10, b"<|im_start|>") and entries[ours.pieces.index("<0x0A>")] == (0.0, b"\n")
    assert entries[ours.pieces.index("<0xE4>")] == (0.0, b"<0xE4>")
    again = llama2c.read_tokenizer(path, len(ours))
    assert again.pieces == ours.pieces and again.special_tokens == ours.special_tokens
    assert again.dummy_prefix and not ours.dummy_prefix
    in_vocabulary = [text for text in TEXTS if all(c < "\x80" or c in ours.pieces for c in text)]
    assert len(in_vocabulary) > 40
    for text in TEXTS:
        assert again.encode(text) == ours.encode(" " * bool(text) + text)
        assert again.decode(again.encode(text)) == text
        if text in in_vocabulary:
            assert c_encode(entries, text) == again.encode(text)


def test_the_real_tokenizer_of_llama_2(tmp_path):
    tokenizer = real("llama2")
    path = exported(tokenizer, tmp_path)
    entries, again = read_entries(path), llama2c.read_tokenizer(path, len(tokenizer))
    for text in TEXTS:
        assert again.encode(text) == tokenizer.encode(text) == c_encode(entries, text)
    assert again.pieces == tokenizer.pieces


def test_padding(ours, tmp_path):
    entries = read_entries(exported(ours, tmp_path, 777))
    assert len(entries) == 777 and all(score == -1e10 and text for score, text in entries[len(ours) :])
    assert len({text for _, text in entries}) == 777
    assert llama2c.read_tokenizer(tmp_path / "tokenizer.bin", 777).pieces == ours.pieces


def test_the_first_llama2c_spelled_bytes_as_characters(llama_tokenizer, tmp_path):
    entries = read_entries(exported(llama_tokenizer, tmp_path))
    entries[3:259] = [(score, chr(byte).encode()) for byte, (score, _) in enumerate(entries[3:259])]
    data = struct.pack("<I", 99) + b"".join(struct.pack("<fI", score, len(text)) + text for score, text in entries)
    (tmp_path / "tokenizer.bin").write_bytes(data)
    again = llama2c.read_tokenizer(tmp_path / "tokenizer.bin", VOCAB_SIZE)
    assert again.fingerprint == llama_tokenizer.fingerprint


def test_model_and_tokenizer_go_together(llama_tokenizer, ours, tmp_path):
    out = written(tmp_path / "out", model_of(vocab_size=800), llama_tokenizer)
    found = llama2c.open_weights(out)
    assert found.tokenizer.fingerprint == llama_tokenizer.fingerprint and "run.c does" in found.odd[0]
    given = llama2c.open_weights(out, tokenizer=ours)
    assert given.tokenizer is ours and given.odd == [f"the tokenizer has {len(ours)} entries, the model 800"]
    shutil.move(out / "tokenizer.bin", tmp_path / "other.bin")
    assert llama2c.open_weights(out).tokenizer is None
    found = llama2c.open_weights(out / "model.bin", tokenizer_bin=tmp_path / "other.bin")
    assert found.tokenizer.fingerprint == llama_tokenizer.fingerprint


# ----------------------------------------------------------------------------------------------------------------------
# The C programs


@pytest.fixture(params=[("CRIA_RUN_C", 0), ("CRIA_RUNQ_C", 2)], ids=["run.c", "runq.c"])
def c_program(request, tmp_path):
    """(a function: directory, prompt, steps -> what the program prints, the version it reads)."""
    variable, version = request.param
    compiler = shutil.which("cc") or shutil.which("gcc")
    if not os.environ.get(variable) or not compiler:
        pytest.skip(f"{variable} does not name llama2.c's program" if compiler else "there is no C compiler")
    program = tmp_path / "run"
    subprocess.run([compiler, "-O2", "-o", program, os.environ[variable], "-lm"], check=True)

    def run(directory: Path, prompt: str, steps: int) -> bytes:
        command = [program, directory / "model.bin", "-z", directory / "tokenizer.bin", "-t", "0", "-n", str(steps)]
        command += ["-i", prompt] if prompt else []
        return subprocess.run(command, check=True, capture_output=True, timeout=60).stdout

    return run, version


@pytest.mark.parametrize("kind", ["llama", "ours"])
@pytest.mark.parametrize("shape", ["MHA", "GQA, odd vocabulary", "GQA tied"])
def test_c_program_continues_alike(shape, kind, c_program, llama_tokenizer, ours, tmp_path):
    run, version = c_program
    tokenizer, model = {"llama": llama_tokenizer, "ours": ours}[kind], model_of(**SHAPES[shape])
    out = written(tmp_path / "out", model, tokenizer, version=version)
    entries, reader = read_entries(out / "tokenizer.bin"), Reader(out / "model.bin")
    for prompt in PROMPTS:
        start = [1, *tokenizer.encode(" " * (kind == "ours" and prompt != "") + prompt)]
        if version == 0:
            tokens = start + greedy(model, start, 41 - len(start))
        else:
            tokens = start + reader.greedy(start, 41 - len(start), rounded=True)
        tokens = tokens[: tokens.index(1, 1)] if 1 in tokens[1:] else tokens  # BOS ends the text
        assert run(out, prompt, 40) == c_printed(entries, tokens) + b"\n"


# ----------------------------------------------------------------------------------------------------------------------
# What cannot be


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"rope_theta": 500000.0}, "its rope theta is 500000; the C program computes with 10000"),
        ({"rms_norm_eps": 1e-6}, "its rms_norm_eps is 1e-06; the C program computes with 1e-05"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "its RoPE is scaled (linear)"),
        ({"attention_bias": True}, "it has biases"),
        ({"mlp_bias": True}, "it has biases"),
        ({"head_dim": 8}, "4 heads of 8 are not its hidden size 64"),
        ({"vocab_size": 2**26}, "a matrix of 4,294,967,296 numbers is more than"),
        ({"max_position_embeddings": 2**24}, "a key cache of 2,147,483,648 numbers is more than"),
    ],
)
def test_refusals(change, reason):
    source = Weights(replace(model_of().config, **change), {})
    (found,) = llama2c.problems(source)
    assert reason in found


def test_refusals_are_named_at_once():
    config = replace(model_of().config, rope_theta=5e5, rms_norm_eps=1e-6, mlp_bias=True)
    assert len(llama2c.problems(Weights(config, {}), version=3)) == 4


def test_group_sizes():
    config = model_of(hidden_size=64, intermediate_size=172).config
    assert llama2c.group_size_for(config) == 4 and llama2c.group_size_for(config, 48) == 1 and llama2c.group_size_for(config, 2) == 2
    source = Weights(config, {})
    assert llama2c.problems(source, version=2) == [] and llama2c.remarks(source, version=2)[0].startswith("groups of 4 rather than 64")
    assert "48, halved until it divides hidden size 64 and feed-forward size 172, is 1" in llama2c.problems(source, 2, 48)[0]
    assert llama2c.problems(source, 2, 0) == ["a group size must be at least 2, not 0"]
    assert llama2c.problems(source, 0, 0) == []


def test_tokenizers_that_the_c_program_does_not_know(llama3_dir, llama_tokenizer, ours, tmp_path):
    config = model_of(vocab_size=600).config

    def reasons(tokenizer) -> str:
        return "; ".join(llama2c.problems(Weights(config, {}, tokenizer)))

    def variant(name: str, **options):
        options = {"model_type": "bpe", "byte_fallback": True, "vocab_size": 550, **options}
        model = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(sample_text().split("\n")), model_writer=model,
                                                 minloglevel=2, **options)  # fmt: skip
        (tmp_path / name).write_bytes(model.getvalue())
        return load_tokenizer(tmp_path / name)

    assert reasons(load_tokenizer(llama3_dir)) == (
        "its tokenizer is a tokenizer.json; the C program knows sentencepiece's byte pair encoding only, pieces with scores")
    assert "is a unigram model" in reasons(variant("unigram", model_type="unigram"))
    assert "changes the text before it splits it" in reasons(variant("nfkc"))
    identity = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}
    assert reasons(variant("identity", **identity)) == ""
    assert "user-defined or unused pieces ([A])" in reasons(variant("user", user_defined_symbols=["[A]"], **identity))
    assert "BOS is token None" in reasons(variant("no bos", bos_id=-1, **identity))
    assert f"has {VOCAB_SIZE} entries, the model only 600" in reasons(llama_tokenizer)


def test_remarks(ours, llama_tokenizer):
    config = model_of(vocab_size=1000).config
    assert llama2c.remarks(Weights(config, {}, llama_tokenizer)) == []
    space, bos, unknown = llama2c.remarks(Weights(config, {}, ours))
    assert "puts a space before every prompt" in space
    assert "starts every text with <s>" in bos and "goes on after </s>" in bos
    assert "here they are at 17 … 272" in unknown
    assert "does not start" in llama2c.remarks(Weights(config, {}))[0]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite(value, tmp_path):
    model = model_of()
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[3, 5] = value
    found = llama2c.open_weights(written(tmp_path / "fp32", model)).tensors["model.layers.1.mlp.down_proj.weight"].read()
    assert torch.equal(found, model.model.layers[1].mlp.down_proj.weight) or found[3, 5].isnan()
    with pytest.raises(UserError, match=r"model.layers.1.mlp.down_proj.weight holds values that are not finite, which int8 cannot"):
        llama2c.write(source_of(model), tmp_path / "int8", version=2)


@pytest.mark.parametrize("version", [0, 2])
def test_files_of_another_size(version, tmp_path):
    path = written(tmp_path / "out", model_of(), version=version) / "model.bin"
    data = path.read_bytes()
    for size, name in ((len(data) - 1, "lm_head.weight"), (300, ("model.embed_tokens.weight" if version == 0 else
                                                                "model.layers.0.input_layernorm.weight"))):  # fmt: skip
        path.write_bytes(data[:size])
        assert llama2c.recognises(path)
        with pytest.raises(UserError, match=f"is truncated: it ends at {size:,} of {len(data):,} bytes, in {name}"):
            llama2c.open_weights(path)
    path.write_bytes(data + b"\0")
    with pytest.raises(UserError, match=r"1 more than its header says"):
        llama2c.open_weights(path)
    path.write_bytes(data[:20])
    with pytest.raises(UserError, match=r"too short for a llama2.c model: 20 bytes"):
        llama2c.open_weights(path)
    path.write_bytes(data[:40])
    with pytest.raises(UserError, match=r"truncated: it ends at 40 of" if version == 0 else r"too short"):
        llama2c.open_weights(path)


@pytest.mark.parametrize(
    ("sizes", "reason"),
    [
        ((0, 96, 2, 4, 4, 700, 48), "dim 0"),
        ((64, -96, 2, 4, 4, 700, 48), "hidden_dim -96"),
        ((64, 96, 10**9, 4, 4, 700, 48), "n_layers 1000000000"),
        ((64, 96, 2, 5, 4, 700, 48), "dim 64 for 5 heads, 5 heads for 4 key/value heads"),
        ((12, 96, 2, 4, 4, 700, 48), "dim 12 for 4 heads"),
        ((64, 96, 2, 4, 4, 700, 2**31 - 1), "seq_len 2147483647"),
        ((64, 96, 2, 4, 4, -(2**31), 48), "vocab_size 2147483648"),
        ((2**26, 2**26, 10**4, 2, 2, 2**26, 2**26), "is truncated"),
    ],
)
def test_absurd_headers(sizes, reason, tmp_path):
    (tmp_path / "x.bin").write_bytes(struct.pack("<7i", *sizes) + bytes(1000))
    with pytest.raises(UserError, match=reason):
        llama2c.open_weights(tmp_path / "x.bin")
    (tmp_path / "model.bin").write_bytes(struct.pack("<I8iBi", 0x616B3432, 2, *sizes, 1, 64) + bytes(1000))
    with pytest.raises(UserError, match=reason if sizes[5] > 0 else r"vocab_size -2147483648"):
        llama2c.open_weights(tmp_path)


def test_other_files(tmp_path):
    for name, content in (("x.bin", b"PK\3\4" + bytes(range(100))), ("text.bin", b"hello" * 100), ("empty.bin", b"")):
        (tmp_path / name).write_bytes(content)
        assert not llama2c.recognises(tmp_path / name)
    assert not llama2c.recognises(tmp_path) and not llama2c.recognises(tmp_path / "none")
    with pytest.raises(UserError, match=r"none does not exist; llama2.c's model is one file"):
        llama2c.open_weights(tmp_path / "none")
    (tmp_path / "x.bin").write_bytes(struct.pack("<I8iBi", 0x616B3432, 7, 64, 96, 2, 4, 4, 700, 48, 1, 64) + bytes(1000))
    with pytest.raises(UserError, match=r"version 7, of which nothing is known"):
        llama2c.open_weights(tmp_path / "x.bin")
    (tmp_path / "x.bin").write_bytes(struct.pack("<I8iBi", 0x616B3432, 2, 64, 96, 2, 4, 4, 700, 48, 1, 0) + bytes(1000))
    with pytest.raises(UserError, match=r"group size 0, which does not divide the matrices"):
        llama2c.open_weights(tmp_path / "x.bin")


def test_bad_tokenizer_bin(llama_tokenizer, llama3_dir, tmp_path):
    out = written(tmp_path / "out", model_of(), llama_tokenizer)
    path = out / "tokenizer.bin"
    data = path.read_bytes()

    def complaint(content: bytes) -> str:
        path.write_bytes(content)
        with pytest.raises(UserError) as error:
            llama2c.open_weights(out)
        return str(error.value)

    last = data[data.rindex(struct.pack("<I", len(read_entries(path)[-1][1]))) - 4 :]
    assert f"has {VOCAB_SIZE - 1} entries and the model {VOCAB_SIZE}" in complaint(data[: -len(last)])
    assert f"more than the {VOCAB_SIZE} entries" in complaint(data + last)
    assert f"truncated: entry {VOCAB_SIZE - 1} goes beyond its end" in complaint(data[:-1])
    assert "truncated: entry 0 goes beyond its end" in complaint(b"\xff" * 40)
    assert "entry 0 is not UTF-8" in complaint(data.replace(b"<unk>", b"<\xff\xfe\xfd>", 1))
    assert "entry 0 has no score (NaN)" in complaint(data[:4] + struct.pack("<f", float("nan")) + data[8:])
    assert "has '<0x42>' twice" in complaint(data.replace(b"<0x41>", b"<0x42>", 1))
    path.unlink()
    with pytest.raises(UserError, match=r"none.bin does not exist; a tokenizer.bin is needed"):
        llama2c.open_weights(out, tokenizer_bin=tmp_path / "none.bin")
    with pytest.raises(UserError, match=r"the tokenizer has 7\d\d entries, .*model.bin only 300; it belongs to another model"):
        llama2c.open_weights(written(tmp_path / "small", model_of(vocab_size=300)), tokenizer=llama_tokenizer)


def test_pieces_of_an_imported_tokenizer_have_the_types_that_the_c_program_gives_them(tmp_path):
    pieces = [("<unk>", 0.0, 2), ("<s>", 0.0, CONTROL), ("</s>", 0.0, CONTROL), ("<sep>", 0.0, CONTROL), ("▁", -1.0, 1), ("ab", -2.0, 1),
              ("a", -3.0, 1), ("b", -4.0, 1)]  # fmt: skip
    data = sentencepiece_bytes(pieces, add_dummy_prefix=True, unk_id=0, bos_id=1, eos_id=2, byte_fallback=False)
    (tmp_path / "tokenizer.model").write_bytes(data)
    again = llama2c.read_tokenizer(exported(load_tokenizer(tmp_path), tmp_path), 8)
    assert again.pieces == [text for text, _, _ in pieces] and again.special_tokens == {"<unk>": 0, "<s>": 1, "</s>": 2, "<sep>": 3}
    assert again.encode("ab<sep>") == [4, 5, 0] and BYTE not in [kind for _, _, kind in again.model.pieces]
