"""doors/gguf_file.py: our GGUF against the gguf package, transformers and llama.cpp; there and back without a difference."""

from __future__ import annotations

from settings import UserError

import ctypes
import dataclasses
import json
import os
import random
import shutil
import struct
import subprocess
import sys
import weakref

import numpy as np
import pytest
import torch

gguf = pytest.importorskip("gguf")

from tokenizers_at_hand import CHAT, NASTY, parity_texts, real  # noqa: E402

import chat_template  # noqa: E402
from doors import gguf_file as door  # noqa: E402
from doors.gguf_tokenizer import PRE_TOKENIZERS, go_template, read_tokenizer, tokenizer_metadata  # noqa: E402
from model import Llama, LlamaConfig  # noqa: E402
from sentencepiece_model import BYTE, CONTROL, NORMAL, UNKNOWN, USER_DEFINED, sentencepiece_bytes  # noqa: E402
from tokenizer import load_tokenizer  # noqa: E402
from weights import Lazy, Weights, permute  # noqa: E402

SMALL = LlamaConfig(vocab_size=703, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
                    num_key_value_heads=4, max_position_embeddings=256)  # fmt: skip
ROPES = {
    "linear": {"rope_type": "linear", "factor": 4.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 24},
    "yarn-attention": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 24, "attention_factor": 1.5},
    "yarn-mscale": {"rope_type": "yarn", "factor": 4, "original_max_position_embeddings": 24, "beta_fast": 32, "mscale": 0.7,
                    "mscale_all_dim": 0.3, "truncate": True},
    "llama3": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
               "original_max_position_embeddings": 24},
}  # fmt: skip
SHAPES = {
    "mha": {},
    "gqa": {"num_key_value_heads": 2},
    "tied": {"tie_word_embeddings": True},
    "head_dim": {"head_dim": 24, "num_key_value_heads": 1},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "theta": {"rope_theta": 500000.0, "rms_norm_eps": 1e-6, "vocab_size": 701},
    "no-f32": {"rope_theta": 40890.987654321},
    **{name: {"rope_scaling": rope} for name, rope in ROPES.items()},
}
NUMBERS = [("q8_0", gguf.GGMLQuantizationType.Q8_0), ("q4_0", gguf.GGMLQuantizationType.Q4_0)]


def random_model(dtype=torch.float32, **changes) -> Llama:
    """Weights large enough that attention and every rotary pair matter."""
    torch.manual_seed(0)
    model = Llama(dataclasses.replace(SMALL, head_dim=0, **changes) if "head_dim" not in changes else dataclasses.replace(SMALL, **changes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(1.0 if parameter.dim() == 1 else 0.0, 0.15)
    return model.to(dtype).eval()


def weights_of(model: Llama, tokenizer) -> Weights:
    state = model.state_dict()
    lazies = {name: Lazy(shape, state[name].dtype, lambda tensor=state[name]: tensor.clone())
              for name, shape in model.parameter_shapes().items()}  # fmt: skip
    ids = {"bos_token_id": tokenizer.bos_id, "pad_token_id": tokenizer.pad_id, "eos_token_id": tokenizer.eos_id}
    return Weights(dataclasses.replace(model.config, **ids), lazies, tokenizer)


def with_template(tokenizer, name, directory, **config):
    tokenizer.save(directory, template=name)
    path = directory / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    return load_tokenizer(directory)


@pytest.fixture(scope="session")
def chat(ours, tmp_path_factory):
    """Our own tokenizer with the chatml template."""
    return with_template(ours, "chatml", tmp_path_factory.mktemp("chat"))


@pytest.fixture
def written(tmp_path, chat):
    """A function: (type, **changes of the config) -> (the source, the file)."""
    def make(type="auto", dtype=torch.float32, **changes):
        source, out = weights_of(random_model(dtype, **changes), chat), tmp_path / f"{type}.gguf"
        door.write(source, out, type, "a model")
        return source, out

    return make


# ---- Blocks ----------------------------------------------------------------------------------------------------------


def test_our_blocks_are_those_of_the_gguf_package():
    draw = torch.Generator().manual_seed(0)
    random_rows = torch.randn(64, 96, generator=draw)
    halves = torch.arange(-16, 16).float()[None].repeat(3, 1) * 0.5  # ties, in the rounding and for the largest magnitude
    spread = random_rows * 10.0 ** torch.randint(-6, 4, (64, 96), generator=draw)
    one_sided = random_rows.abs()
    sparse = torch.where(torch.rand(64, 96, generator=draw) < 0.95, 0, random_rows)
    for rows in (random_rows, halves, spread, one_sided, sparse, -sparse, random_rows * 0, random_rows * 1e-30, random_rows * 1e5):
        for name, number in NUMBERS:
            kind, theirs = door.TYPES[name][0], gguf.quants.quantize(rows.numpy(), number)
            ours = door.encode(rows, kind)
            assert ours.numpy().tobytes() == theirs.tobytes()
            assert np.array_equal(door.decode(ours, kind).numpy(), gguf.quants.dequantize(theirs, number).ravel())
        bf16 = door.encode(rows, door.BF16)
        assert bf16.numpy().tobytes() == gguf.quants.quantize(rows.numpy(), gguf.GGMLQuantizationType.BF16).tobytes()


def test_golden_blocks():
    """Worked out by hand from the layouts."""
    row = torch.zeros(32)
    row[0], row[1], row[16] = -8.0, 7.0, 3.0
    scale = struct.pack("<e", 1.0)  # -8 / -8; numbers are q - 8: 0 is -8, 15 is 7, 11 is 3, and 8 is 0
    assert bytes(door.encode(row, door.Q4_0)) == scale + bytes([0 | 11 << 4, 15 | 8 << 4]) + bytes([8 | 8 << 4]) * 14
    row[0] = -127.0
    assert bytes(door.encode(row, door.Q8_0)) == struct.pack("<e32b", 1.0, -127, 7, *[0] * 14, 3, *[0] * 15)
    assert torch.equal(door.decode(door.encode(row, door.Q8_0), door.Q8_0), row)


def test_a_block_too_small_for_its_scale_is_zero():
    for kind in (door.Q8_0, door.Q4_0):
        assert door.decode(door.encode(torch.full((32,), 1e-42), kind), kind).abs().max() == 0


# ---- There and back --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
def test_fp32_comes_back_exactly_and_is_written_again_with_the_same_bytes(tmp_path, written, shape):
    source, out = written(**SHAPES[shape])
    assert not door.problems(source)
    assert abs(door.size(source) / out.stat().st_size - 1) < 0.3
    again = door.open_weights(out)
    assert again.config == dataclasses.replace(source.config, eos_token_id=[2, 4])  # <|im_end|> ends a turn as well
    assert list(again.tensors) == list(source.tensors) and not again.odd
    for name, lazy in source.tensors.items():
        assert again.tensors[name].shape == lazy.shape and torch.equal(again.tensors[name].read(), lazy.read()), name
        assert torch.equal(door.expected(source, name, lazy.read()), lazy.read())
    assert door.metadata(again) == door.metadata(source, title="a model")
    door.write(again, tmp_path / "again.gguf")
    assert (tmp_path / "again.gguf").read_bytes() == out.read_bytes()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("type", ["auto", *door.TYPES])
def test_every_type_comes_back_as_expected_says(tmp_path, written, type, dtype):
    source, out = written(type, dtype, num_key_value_heads=2, intermediate_size=80)
    again = door.open_weights(out)
    for name, lazy in source.tensors.items():
        read, expected = again.tensors[name].read(), door.expected(source, name, lazy.read(), type)
        assert read.dtype == expected.dtype == again.tensors[name].dtype and torch.equal(read, expected), name
    stored = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(out).tensors}
    plain = {torch.float32: "F32", torch.bfloat16: "BF16"}[dtype] if type == "auto" else type.upper()
    head = "Q8_0" if type == "q4_0" else plain
    assert stored["blk.1.attn_q.weight"] == plain and stored["token_embd.weight"] == stored["output.weight"] == head
    assert stored["blk.1.attn_norm.weight"] == stored["output_norm.weight"] == "F32"
    narrow = "F16" if type in ("q8_0", "q4_0") else plain  # rows of 80
    assert stored["blk.1.ffn_down.weight"] == narrow
    assert any("no multiple of 32" in text for text in door.remarks(source, type)) == (type in ("q8_0", "q4_0"))


@pytest.mark.parametrize("type", ["f32", "f16", "bf16", "q8_0", "q4_0"])
@pytest.mark.parametrize("shape", ["gqa", "tied", "head_dim"])
def test_transformers_reads_what_we_read(transformers, written, type, shape):
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    source, out = written(type, **SHAPES[shape])
    config = transformers.LlamaConfig(**load_gguf_checkpoint(out)["config"])
    for key in ("vocab_size", "hidden_size", "head_dim", "num_key_value_heads", "tie_word_embeddings", "bos_token_id", "eos_token_id"):
        assert getattr(config, key) == getattr(source.config, key), key
    theirs = load_gguf_checkpoint(out, return_tensors=True, model_to_load=transformers.LlamaForCausalLM(config))["tensors"]
    assert set(theirs) == set(source.tensors)
    for name, lazy in source.tensors.items():
        assert torch.equal(theirs[name], door.expected(source, name, lazy.read(), type).float()), name


@pytest.mark.slow
@torch.no_grad()
def test_transformers_builds_the_model(transformers, written):
    pytest.importorskip("accelerate", reason="transformers loads GGUF models only where accelerate is installed")
    source, out = written("q8_0", num_key_value_heads=2)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(out.parent, gguf_file=out.name, dtype=torch.float32).eval()
    ours = Llama(source.config).eval()
    ours.load_state_dict({name: door.expected(source, name, lazy.read(), "q8_0") for name, lazy in source.tensors.items()})
    ids = torch.arange(20, 80)[None]
    torch.testing.assert_close(theirs(ids).logits, ours(ids), atol=1e-4, rtol=1e-4)


def test_other_types_are_read_as_the_gguf_package_reads_them(tmp_path, written):
    """A K-quant, Q5_0 and Q4_1, of random bytes."""
    _, plain = written("f32", hidden_size=256)
    reader, out = gguf.GGUFReader(plain), tmp_path / "mixed.gguf"
    kinds = {"blk.0.ffn_up.weight": "Q6_K", "blk.0.ffn_gate.weight": "Q4_K", "blk.1.attn_v.weight": "Q5_0", "blk.1.attn_q.weight": "Q4_1"}
    draw, writer = np.random.default_rng(0), gguf.GGUFWriter(out, "llama")
    for key, field in reader.fields.items():
        if not key.startswith("GGUF.") and key != "general.architecture":
            writer.add_key_value(key, field.contents(), field.types[0], field.types[-1] if len(field.types) > 1 else None)
    values = {}
    for tensor in reader.tensors:
        data, kind = tensor.data, gguf.GGMLQuantizationType[kinds.get(tensor.name, "F32")]
        if tensor.name in kinds:
            shape = gguf.quant_shape_to_byte_shape(data.shape, kind)
            data = draw.integers(0, 60, shape, dtype=np.uint8)  # below the exponents that make an fp16 infinite
            values[tensor.name] = torch.from_numpy(gguf.quants.dequantize(data, kind))
        writer.add_tensor(tensor.name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    again = door.open_weights(out).tensors
    assert torch.equal(again["model.layers.0.mlp.up_proj.weight"].read(), values["blk.0.ffn_up.weight"])
    assert torch.equal(again["model.layers.0.mlp.gate_proj.weight"].read(), values["blk.0.ffn_gate.weight"])
    assert torch.equal(again["model.layers.1.self_attn.v_proj.weight"].read(), values["blk.1.attn_v.weight"])
    assert torch.equal(permute(again["model.layers.1.self_attn.q_proj.weight"].read(), 4), values["blk.1.attn_q.weight"])


def test_one_tensor_at_a_time(tmp_path, chat):
    source, alive, most = weights_of(random_model(), chat), weakref.WeakSet(), []

    def counted(read):
        def call():
            most.append(len(alive))
            tensor = read()
            alive.add(tensor)
            return tensor

        return call

    source.tensors = {name: dataclasses.replace(lazy, read=counted(lazy.read)) for name, lazy in source.tensors.items()}
    door.write(source, tmp_path / "out.gguf", "q8_0")
    assert len(most) == len(source.tensors) and max(most) == 0


# ---- The header ------------------------------------------------------------------------------------------------------


def test_golden_header(written):
    source, out = written()
    data, name = out.read_bytes(), b"general.architecture"
    entries = len(door.metadata(source, title="a model")) + 1
    assert data[:24] == b"GGUF" + struct.pack("<IQQ", 3, 21, entries)
    assert data[24:].startswith(struct.pack("<Q", 20) + name + struct.pack("<IQ", 8, 5) + b"llama")
    first = struct.pack("<Q17sIQQIQ", 17, b"token_embd.weight", 2, 64, 703, 0, 0)  # (struct pads nothing with "<")
    assert first in data
    start = data.index(source.tensors["model.embed_tokens.weight"].read().numpy().tobytes()[:64])
    assert start % 32 == 0 and out.stat().st_size % 32 == 0


def test_the_gguf_package_sees_the_metadata(written, chat):
    _, out = written("q4_0", num_key_value_heads=2, rope_scaling=ROPES["yarn"])
    fields = gguf.GGUFReader(out).fields
    wanted = {
        "general.architecture": "llama", "general.type": "model", "general.name": "a model", "general.file_type": 2,
        "general.quantization_version": 2, "llama.vocab_size": 703, "llama.context_length": 256, "llama.embedding_length": 64,
        "llama.block_count": 2, "llama.feed_forward_length": 96, "llama.attention.head_count": 4, "llama.attention.head_count_kv": 2,
        "llama.rope.dimension_count": 16, "llama.rope.freq_base": 10000.0, "llama.rope.scaling.type": "yarn",
        "llama.rope.scaling.factor": 4.0, "llama.rope.scaling.original_context_length": 24, "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default", "tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.eot_token_id": chat.special_tokens["<|im_end|>"], "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.add_bos_token": False, "tokenizer.ggml.add_eos_token": False, "tokenizer.ggml.add_space_prefix": False,
        "tokenizer.chat_template": chat.jinja,
    }  # fmt: skip
    assert {key: fields[key].contents() for key in wanted} == wanted
    assert fields["llama.attention.layer_norm_rms_epsilon"].contents() == np.float32(1e-5)
    tokens = fields["tokenizer.ggml.tokens"].contents()
    assert tokens == [*chat.pieces, "[PAD700]", "[PAD701]", "[PAD702]"]
    types = fields["tokenizer.ggml.token_type"].contents()
    assert types[:5] == [UNKNOWN, CONTROL, CONTROL, CONTROL, CONTROL] and types[-3:] == [5, 5, 5]
    assert types.count(BYTE) == 256 and len(fields["tokenizer.ggml.scores"].contents()) == 703
    ours = door._Header(out).metadata
    assert {key: field.contents() for key, field in fields.items() if not key.startswith("GGUF.")} == {
        key: pytest.approx(value, rel=1e-7) if isinstance(value, float) else value for key, value in ours.items()}  # fmt: skip


# ---- Tokenizers ------------------------------------------------------------------------------------------------------


def test_the_same_ids_after_the_round_trip(any_tokenizer):
    rows = len(any_tokenizer) + 3
    metadata = tokenizer_metadata(any_tokenizer, rows)
    assert len(metadata["tokenizer.ggml.tokens"]) == rows
    again = read_tokenizer(metadata)
    assert len(again) == len(any_tokenizer) and again.pieces == any_tokenizer.pieces
    assert again.special_tokens == any_tokenizer.special_tokens and again.add_bos == any_tokenizer.add_bos
    assert (again.bos_id, again.eos_id, again.pad_id) == (any_tokenizer.bos_id, any_tokenizer.eos_id, any_tokenizer.pad_id)
    assert again.template == any_tokenizer.template and again.jinja == any_tokenizer.jinja
    for text in [*NASTY, *parity_texts()[::7]]:
        assert again.encode(text) == any_tokenizer.encode(text), text
        assert again.decode(again.encode(text)) == any_tokenizer.decode(any_tokenizer.encode(text)), text
    if any_tokenizer.template:
        assert again.render(CHAT) == any_tokenizer.render(CHAT) and again.stop_ids() == any_tokenizer.stop_ids()
    assert tokenizer_metadata(again, rows) == metadata


@pytest.mark.parametrize("pre", PRE_TOKENIZERS)
def test_every_named_way_to_cut_words_is_recognised(llama3_dir, pre):
    metadata = tokenizer_metadata(load_tokenizer(llama3_dir), 600) | {"tokenizer.ggml.pre": pre}
    assert tokenizer_metadata(read_tokenizer(metadata), 600) == metadata


@pytest.mark.parametrize("changes, reason", [
    ({"pre_tokenizer": {"type": "Whitespace"}}, "in a way that has no name"),
    ({"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True}}, "in a way that has no name"),
    ({"normalizer": {"type": "NFC"}}, "normalises"),
])  # fmt: skip
def test_a_tokenizer_json_that_llama_cpp_would_read_otherwise_is_refused(tmp_path, llama3_dir, changes, reason):
    shutil.copytree(llama3_dir, tmp_path / "tokenizer")
    path = tmp_path / "tokenizer" / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    tokenizer = load_tokenizer(tmp_path / "tokenizer")
    assert any(reason in text for text in door.problems(weights_of(random_model(), tokenizer)))


def test_other_tokenizers_that_are_refused(tmp_path, chat, ours_dir):
    import sentencepiece

    def problems(tokenizer):
        return " ".join(door.problems(weights_of(random_model(), tokenizer)))

    (tmp_path / "text.txt").write_text("\n".join(parity_texts()), encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "text.txt"), model_prefix=str(tmp_path / "tokenizer"), model_type="unigram", vocab_size=100,
        hard_vocab_limit=False, minloglevel=2)  # fmt: skip
    assert "a unigram model" in problems(load_tokenizer(tmp_path / "tokenizer.model"))
    shutil.copytree(ours_dir, tmp_path / "converted")
    (tmp_path / "converted" / "tokenizer.model").unlink()
    assert "put the tokenizer.model" in problems(load_tokenizer(tmp_path / "converted"))
    small = dataclasses.replace(SMALL, vocab_size=600)
    assert "700 tokens, its embedding only 600 rows" in " ".join(door.problems(Weights(small, {}, chat)))
    assert "no tokenizer" in " ".join(door.problems(Weights(small, {})))


def test_pieces_of_the_user_are_spelled_with_plain_spaces(tmp_path):
    pieces = [("<unk>", 0.0, UNKNOWN), ("<s>", 0.0, CONTROL), ("</s>", 0.0, CONTROL), ("▁▁", 0.0, USER_DEFINED), ("a", -1.0, NORMAL),
              ("▁", -2.0, NORMAL)]  # fmt: skip
    data = sentencepiece_bytes(pieces, add_dummy_prefix=False, unk_id=0, bos_id=1, eos_id=2, byte_fallback=False)
    (tmp_path / "tokenizer.model").write_bytes(data)
    tokenizer = load_tokenizer(tmp_path / "tokenizer.model")
    metadata = tokenizer_metadata(tokenizer, 6)
    assert metadata["tokenizer.ggml.tokens"][3] == "  "
    assert read_tokenizer(metadata).encode("a  a a") == tokenizer.encode("a  a a") == [4, 3, 4, 5, 4]


def test_a_tokenizer_that_cannot_be_read_is_left_out_and_said_so(tmp_path, written, monkeypatch):
    source, _ = written()
    monkeypatch.setattr(door, "tokenizer_metadata", lambda *_: {"tokenizer.ggml.model": "bert", "tokenizer.ggml.tokens": ["a"]})
    door.write(source, tmp_path / "other.gguf")
    weights = door.open_weights(tmp_path / "other.gguf")
    assert weights.tokenizer is None and "of the kind 'bert'" in weights.odd[0]
    given = door.open_weights(tmp_path / "other.gguf", tokenizer=source.tokenizer)
    assert given.tokenizer is source.tokenizer and not given.odd


# ---- llama.cpp -------------------------------------------------------------------------------------------------------


def llama_cpp_model(path):
    """The file in llama.cpp, with keys and values in fp32 as ours are."""
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    f32 = 0
    return llama_cpp.Llama(str(path), n_ctx=256, logits_all=True, verbose=False, n_threads=1, type_k=f32, type_v=f32)


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_llama_cpp_computes_the_same(written, shape):
    """Logits, far beyond the original length of the scaled RoPEs, and 30 greedy tokens."""
    _, out = written("f32", **SHAPES[shape])
    ours, theirs = random_model(**SHAPES[shape]), llama_cpp_model(out)
    ids = torch.randint(20, 700, (120,), generator=torch.Generator().manual_seed(0)).tolist()
    theirs.eval(ids)
    torch.testing.assert_close(torch.tensor(theirs.scores[:120]), ours(torch.tensor([ids]))[0], atol=2e-4, rtol=0)
    theirs.reset()
    greedy = [token for token, _ in zip(theirs.generate(ids, temp=0.0, repeat_penalty=1.0), range(30))]
    assert greedy == [step[0] for step in ours.generate([ids], 30, temperature=0)]


@pytest.mark.slow
@pytest.mark.parametrize("type", ["f16", "bf16", "q8_0", "q4_0"])
@torch.no_grad()
def test_llama_cpp_computes_nearly_the_same_with_smaller_types(written, type):
    """It rounds activations too (to int8 in groups of 32 for the quantised types), hence the tolerances."""
    source, out = written(type, num_key_value_heads=2)
    ours = Llama(source.config).eval()
    ours.load_state_dict({name: lazy.read().float() for name, lazy in door.open_weights(out).tensors.items()})
    ids, theirs = list(range(20, 140)), llama_cpp_model(out)
    theirs.eval(ids)
    difference = torch.tensor(theirs.scores[:120]) - ours(torch.tensor([ids]))[0]
    assert difference.square().mean().sqrt() < {"f16": 0.005, "bf16": 0.03}.get(type, 0.1)


@pytest.mark.slow
def test_llama_cpp_gives_our_ids(tmp_path, any_tokenizer):
    """Of plain text; and what ends an answer here ends it there."""
    lib = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed").llama_cpp
    model = random_model(vocab_size=len(any_tokenizer) + 1, num_hidden_layers=1)
    source = weights_of(model, any_tokenizer)
    assert not door.problems(source)
    door.write(source, tmp_path / "model.gguf")
    theirs = llama_cpp_model(tmp_path / "model.gguf")
    wrong = [text for text in NASTY + parity_texts()
             if theirs.tokenize(text.encode(), add_bos=False, special=False) != any_tokenizer.encode(text)]  # fmt: skip
    said = " ".join(door.remarks(source))
    assert all("sop" in text and "sop" in said for text in wrong) and len(wrong) < 2  # ChatGLM2's "sop" is a word as well
    if any_tokenizer.add_bos:
        assert theirs.tokenize(b"a", add_bos=True) == any_tokenizer.encode("a", bos=True)
    vocabulary = lib.llama_model_get_vocab(theirs._model.model)
    ends = {i for i in range(len(any_tokenizer)) if lib.llama_vocab_is_eog(vocabulary, i)}
    assert set(any_tokenizer.stop_ids()) <= ends


@pytest.mark.slow
@pytest.mark.parametrize("pre", PRE_TOKENIZERS)
def test_llama_cpp_cuts_words_as_the_name_says(tmp_path, llama3_dir, pre):
    tokenizer = read_tokenizer(tokenizer_metadata(load_tokenizer(llama3_dir), 600) | {"tokenizer.ggml.pre": pre})
    door.write(weights_of(random_model(vocab_size=600, num_hidden_layers=1), tokenizer), tmp_path / "model.gguf")
    theirs = llama_cpp_model(tmp_path / "model.gguf")
    for text in [*NASTY, *parity_texts(), "I've 12345 WE'LL  x\r\n\r\n  y 1a2b３４ ...!?\n\n z\t\tq"]:
        assert theirs.tokenize(text.encode(), add_bos=False, special=False) == tokenizer.encode(text), text


@pytest.mark.slow
@pytest.mark.parametrize("template", chat_template.TEMPLATES)
def test_llama_cpp_renders_the_chat_with_our_ids(tmp_path, ours, template):
    formats = pytest.importorskip("llama_cpp.llama_chat_format", reason="llama-cpp-python is not installed")
    lib = pytest.importorskip("llama_cpp").llama_cpp
    tokenizer = with_template(ours, template, tmp_path)
    door.write(weights_of(random_model(), tokenizer), tmp_path / "model.gguf")
    theirs, messages = llama_cpp_model(tmp_path / "model.gguf"), CHAT[:-1]
    jinja, bos, eos = theirs.metadata["tokenizer.chat_template"], theirs.token_bos(), theirs.token_eos()
    assert (bos, eos) == (tokenizer.bos_id, tokenizer.eos_id)
    formatter = formats.Jinja2ChatFormatter(template=jinja, eos_token=tokenizer.pieces[eos], bos_token=tokenizer.pieces[bos])
    prompt = formatter(messages=messages)
    ids = theirs.tokenize(prompt.prompt.encode(), add_bos=not prompt.added_special, special=True)
    assert ids == tokenizer.render(messages, add_generation_prompt=True)[0]
    if template == "chatml":  # which its C code knows by itself
        array = (lib.llama_chat_message * len(messages))(*(
            lib.llama_chat_message(role=message["role"].encode(), content=message["content"].encode()) for message in messages))
        buffer = ctypes.create_string_buffer(4000)
        length = lib.llama_chat_apply_template(jinja.encode(), array, len(messages), True, buffer, 4000)
        assert buffer.raw[:length].decode() == prompt.prompt


# ---- Ollama ----------------------------------------------------------------------------------------------------------


def test_modelfile(tmp_path, ours, chat):
    assert door.modelfile(tmp_path / "model.gguf", Weights(SMALL, {}, chat)) == (
        'FROM ./model.gguf\nTEMPLATE """{{ range $i, $_ := .Messages }}'
        '{{ if eq .Role "system" }}<|im_start|>system{{ "\\n" }}{{ .Content }}<|im_end|>{{ "\\n" }}'
        '{{ else if eq .Role "user" }}<|im_start|>user{{ "\\n" }}{{ .Content }}<|im_end|>{{ "\\n" }}'
        '{{ else if eq .Role "assistant" }}<|im_start|>assistant{{ "\\n" }}{{ .Content }}<|im_end|>{{ "\\n" }}{{ end }}{{ end }}'
        '<|im_start|>assistant{{ "\\n" }}"""\nPARAMETER stop "<|im_end|>"')  # fmt: skip
    baby = Weights(SMALL, {}, with_template(ours, "baby", tmp_path))
    assert door.modelfile("model.gguf", baby).endswith('PARAMETER stop "</s>"')
    assert ours.template is None and door.modelfile("model.gguf", Weights(SMALL, {}, ours)) == "FROM ./model.gguf"


GO = """package main
import ("encoding/json"; "os"; "text/template")
type Message struct { Role, Content string }
func main() {
	var job struct { Template string; Messages []*Message }
	if err := json.NewDecoder(os.Stdin).Decode(&job); err != nil { panic(err) }
	parsed := template.Must(template.New("").Parse(job.Template))
	if err := parsed.Execute(os.Stdout, map[string]any{"Messages": job.Messages}); err != nil { panic(err) }
}
"""


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("go"), reason="no Go compiler to run Ollama's template language")
def test_go_renders_what_jinja_renders(tmp_path, ours):
    (tmp_path / "main.go").write_text(GO)
    environment = os.environ | {"GOCACHE": str(tmp_path / "cache"), "GO111MODULE": "off"}
    subprocess.run(["go", "build", "-o", "render", "main.go"], cwd=tmp_path, env=environment, check=True)
    for template in chat_template.TEMPLATES:
        for add_bos in (False, True):
            tokenizer = with_template(ours, template, tmp_path / template, add_bos_token=add_bos)
            for messages in (CHAT[:-1], CHAT[1:-1], CHAT[1:2]):
                job = {"Template": go_template(tokenizer), "Messages": messages}
                done = subprocess.run([tmp_path / "render"], input=json.dumps(job).encode(), capture_output=True, check=True)
                jinja = chat_template._run_jinja(tokenizer, messages, True)
                assert done.stdout.decode() == (jinja.removeprefix("<s>") if add_bos else jinja), (template, add_bos)


# ---- Mistakes --------------------------------------------------------------------------------------------------------


def refused(path) -> str:
    with pytest.raises(UserError) as caught:
        for lazy in door.open_weights(path).tensors.values():
            lazy.read()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_is_no_gguf_of_ours_is_refused(tmp_path, written):
    _, out = written()
    assert door.recognises(out) and not door.recognises(tmp_path) and not door.recognises(tmp_path / "none")
    assert "does not exist" in refused(tmp_path / "none") and "is a directory" in refused(tmp_path)
    data, bad = out.read_bytes(), tmp_path / "bad.gguf"
    for content, reason in ((b"hello, world", "no GGUF file"), (b"", "no GGUF file"), (b"GGUF", "truncated"), (data[:30], "truncated"),
                            (data[:2000], "truncated"), (data[:-100], "output.weight ends at byte"),
                            (b"GGUF" + struct.pack(">I", 3) + data[8:], "big-endian"),
                            (b"GGUF" + struct.pack("<I", 1) + data[8:], "version 1")):  # fmt: skip
        bad.write_bytes(content)
        assert reason in refused(bad)
        assert str(bad) in refused(bad)

    for architecture, entries, reason in (("qwen2", {}, "'qwen2'"), ("llama", {"llama.expert_count": 8}, "8 experts"),
                                          ("llama", {"split.count": 3}, "--merge"), ("llama", {}, "llama.embedding_length is missing")):
        writer = gguf.GGUFWriter(bad, architecture)
        for key, value in entries.items():
            writer.add_uint32(key, value)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        writer.close()
        assert reason in refused(bad)


def test_numbers_that_cannot_be_are_named(tmp_path, written, monkeypatch):
    source, _ = written()
    plain, bad = door.metadata, tmp_path / "bad.gguf"
    for key, value, reason in (("tokenizer.ggml.bos_token_id", 5000, "bos_token_id is 5000, and the embedding has"),
                               ("llama.embedding_length", 0, "llama.embedding_length is 0"),
                               ("llama.attention.head_count", 0, "llama.attention.head_count is 0")):  # fmt: skip
        monkeypatch.setattr(door, "metadata", lambda *args, key=key, value=value: plain(*args) | {key: value})
        door.write(source, bad)
        assert reason in refused(bad)
    nested = b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1) + b"a" + struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 20_000
    bad.write_bytes(nested)
    assert "array of arrays" in refused(bad)


def test_tensors_that_do_not_fit_are_named(tmp_path, written, monkeypatch):
    source, _ = written()
    monkeypatch.setattr(door, "metadata", lambda *args, plain=door.metadata: plain(*args) | {"llama.feed_forward_length": 128})
    door.write(source, tmp_path / "bad.gguf")
    assert "model.layers.0.mlp.gate_proj.weight is (96, 64) and metadata says (128, 64)" in refused(tmp_path / "bad.gguf")


def test_a_flipped_byte_is_never_more_than_a_mistake(tmp_path, written):
    _, out = written("q8_0", num_hidden_layers=1, rope_scaling=ROPES["llama3"])
    data, bad, draw = out.read_bytes(), tmp_path / "bad.gguf", random.Random(0)
    end = min(entry.offset for entry in door._Header(out).tensors.values())
    seen = 0
    for _ in range(60):
        copy = bytearray(data)
        copy[draw.choice((draw.randrange(1600), draw.randrange(end - 1400, end)))] = draw.randrange(256)
        bad.write_bytes(copy)
        try:
            for lazy in door.open_weights(bad).tensors.values():
                lazy.read()
        except UserError:
            seen += 1
    assert seen > 20


@pytest.mark.parametrize("type", ["q8_0", "q4_0"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_cannot_be_quantised_are_named(tmp_path, chat, type, value):
    model = random_model()
    with torch.no_grad():
        model.model.layers[1].self_attn.k_proj.weight[3, 5] = value
    with pytest.raises(UserError, match=r"layers\.1\.self_attn\.k_proj\.weight has 1 values that are NaN or infinite"):
        door.write(weights_of(model, chat), tmp_path / "out.gguf", type)
    door.write(weights_of(model, chat), tmp_path / "plain.gguf", "f32")  # as they are
    name = "model.layers.1.self_attn.k_proj.weight"
    assert torch.equal(door.open_weights(tmp_path / "plain.gguf").tensors[name].read().isfinite(), model.state_dict()[name].isfinite())


def test_values_too_large_for_fp16_are_named(tmp_path, chat):
    model = random_model(torch.bfloat16)
    with torch.no_grad():
        model.model.embed_tokens.weight[0, 0] = 1e30
    for type in ("f16", "q8_0"):
        with pytest.raises(UserError, match=r"model.embed_tokens.weight has values up to 1e\+30, too large"):
            door.write(weights_of(model, chat), tmp_path / f"{type}.gguf", type)
    door.write(weights_of(model, chat), tmp_path / "bf16.gguf", "bf16")


def test_what_llama_cpp_has_not_is_refused_with_the_reason(tmp_path, chat):
    for rope, reason in (({"rope_type": "dynamic", "factor": 2.0}, "dynamic NTK"), (ROPES["yarn"] | {"beta_fast": 16}, "beta_fast 16"),
                         (ROPES["yarn"] | {"truncate": False}, "truncate false")):  # fmt: skip
        source = weights_of(random_model(rope_scaling=rope), chat)
        assert reason in " ".join(door.problems(source))
        with pytest.raises(UserError, match=reason):
            door.write(source, tmp_path / "out.gguf")
    source = weights_of(random_model(), chat)
    assert "--type q3" in " ".join(door.problems(source, "q3"))
    remarks = door.remarks(dataclasses.replace(source, config=dataclasses.replace(source.config, vocab_size=700)))
    assert len(remarks) == 1 and "puts a space before every text" in remarks[0]
    assert "RoPE scaling (linear)" in " ".join(door.remarks(weights_of(random_model(rope_scaling=ROPES["linear"]), chat)))


@pytest.mark.parametrize("kind", ["linear", "yarn", "yarn-attention", "llama3"])
def test_rope_scaling_of_other_writers(tmp_path, written, monkeypatch, kind):
    """They leave no entry of ours, and of Llama-3's scaling the tensor alone."""
    rope = ROPES[kind] | ({"original_max_position_embeddings": 8192, "factor": 32.0} if kind == "llama3" else {})
    source, _ = written(rope_scaling=rope, rope_theta=500000.0)
    plain = door.metadata
    monkeypatch.setattr(door, "metadata", lambda *args: {key: value for key, value in plain(*args).items() if key != door.EXACT})
    door.write(source, tmp_path / "theirs.gguf")
    read = door.open_weights(tmp_path / "theirs.gguf").config.rope_scaling
    assert read == {key: pytest.approx(value, rel=1e-7) if key == "attention_factor" else value for key, value in rope.items()}
    if kind == "llama3":
        monkeypatch.setattr(door, "rope_factors", lambda config: torch.linspace(1, 3, 8))
        door.write(source, tmp_path / "other.gguf")
        monkeypatch.undo()
        assert "rope_freqs.weight is not Llama-3's scaling" in refused(tmp_path / "other.gguf")


def test_without_the_package(tmp_path, chat, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(UserError, match="pip install gguf"):
        door.write(weights_of(random_model(), chat), tmp_path / "out.gguf")


def test_the_real_llama3_layout_is_recognised():
    """minimind's tokenizer.json is GPT-2's kind; chat templates of others are kept as they are."""
    tokenizer = real("minimind")
    metadata = tokenizer_metadata(tokenizer, len(tokenizer))
    assert metadata["tokenizer.ggml.pre"] == "gpt-2" and metadata["tokenizer.chat_template"] == tokenizer.jinja
