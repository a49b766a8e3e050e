"""Meta's checkpoints: exact round trips, against readers that are not ours, and everything that can be wrong with the files."""

from __future__ import annotations

from settings import UserError

import base64
import importlib.util
import json
import math
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from tokenizers_at_hand import NASTY, SHARED, parity_texts, sample_text

import weights as hugging_face
from config import LlamaConfig
from doors import meta, tiktoken_file
from model import Llama
from tokenizer import load_tokenizer
from weights import Lazy, Weights

MHA = dict(vocab_size=96, hidden_size=64, intermediate_size=176, num_hidden_layers=2, num_attention_heads=8, num_key_value_heads=8,
           max_position_embeddings=4096)  # fmt: skip
GQA = MHA | dict(num_key_value_heads=2, rope_theta=500000.0, max_position_embeddings=8192)


def source_of(dtype=torch.float32, tokenizer=None, **config) -> Weights:
    """A small model with random weights, as convert.py hands it to a door."""
    config = LlamaConfig(**(MHA | config))
    torch.manual_seed(0)
    tensors = {name: torch.randn(shape).to(dtype) for name, shape in hugging_face.shapes_of(config).items()}
    return Weights(config, {name: Lazy(tensor.shape, tensor.dtype, tensor.clone) for name, tensor in tensors.items()}, tokenizer)


def exported(folder: Path, shards: int = 1, split: str = "auto", **config) -> tuple[Weights, Path]:
    source, out = source_of(**config), folder / "meta"
    assert meta.problems(source, shards=shards, split=split) == []
    meta.write(source, out, shards=shards, split=split)
    return source, out


def stored(out: Path) -> list[dict]:
    """All shards, read by torch alone."""
    return [torch.load(file, weights_only=True) for file in sorted(out.glob("consolidated.*.pth"))]


def change(out: Path, edit, shard: int = 0) -> None:
    file = out / f"consolidated.{shard:02d}.pth"
    tensors = torch.load(file, weights_only=True)
    edit(tensors)
    torch.save(tensors, file)


def change_params(out: Path, **values) -> None:
    params = json.loads((out / "params.json").read_text()) | values
    (out / "params.json").write_text(json.dumps({key: value for key, value in params.items() if value is not None}))


def assert_same(source: Weights, back: Weights) -> None:
    assert list(source.tensors) == list(back.tensors)
    for name, lazy in source.tensors.items():
        a, b = lazy.read(), back.tensors[name].read()
        assert (back.tensors[name].shape, back.tensors[name].dtype) == (a.shape, a.dtype) == (b.shape, b.dtype), name
        assert torch.equal(a, b), name


# ----------------------------------------------------------------------------------------------------------------------
# There and back


@pytest.mark.parametrize(("shards", "dtype"), [(1, torch.float32), (1, torch.bfloat16), (2, torch.float16), (4, torch.float32),
                                               (8, torch.bfloat16)])  # fmt: skip
@pytest.mark.parametrize("config", [MHA, GQA, MHA | {"tie_word_embeddings": True}, GQA | {"tie_word_embeddings": True}])
def test_there_and_back_is_exact(tmp_path, config, shards, dtype):
    source, out = exported(tmp_path, shards, dtype=dtype, **config)
    back = meta.open_weights(out)
    assert_same(source, back)
    assert back.config == source.config
    assert back.tokenizer is None and back.kind == "Meta" and back.facts["shards"] == str(shards)
    assert len(stored(out)) == shards


@pytest.mark.parametrize(("vocabulary", "split", "tied"), [(97, "width", False), (97, "vocabulary", True), (102, "vocabulary", False),
                                                           (103, "width", True)])  # fmt: skip
def test_the_last_shard_has_the_rest_of_an_odd_vocabulary(tmp_path, vocabulary, tied, split):
    source, out = exported(tmp_path, 4, split, vocab_size=vocabulary, tie_word_embeddings=tied)
    rows = [shard["output.weight"].shape[0] for shard in stored(out)]
    assert rows == [vocabulary // 4] * 3 + [vocabulary - 3 * (vocabulary // 4)]
    shapes = [tuple(shard["tok_embeddings.weight"].shape) for shard in stored(out)]
    assert shapes == ([(vocabulary, 16)] * 4 if split == "width" else [(size, 64) for size in rows])
    assert_same(source, meta.open_weights(out))


def test_the_size_said_before_is_the_size_on_disk(tmp_path):
    for shards, config in ((1, MHA), (8, GQA), (2, GQA | {"tie_word_embeddings": True})):
        source, out = exported(tmp_path, shards, **(config | {"hidden_size": 512, "intermediate_size": 1376}))
        bytes_written = sum(file.stat().st_size for file in out.iterdir())
        shutil.rmtree(out)
        assert bytes_written <= meta.size(source, shards=shards) <= bytes_written + 2**20 * (shards + 32)


@pytest.mark.parametrize("size", [(4096, 11008), (5120, 13824), (6656, 17920), (8192, 22016), (8192, 28672), (4096, 14336),
                                  (2048, 8192), (3072, 8192), (16384, 53248), (8192, 14336)])  # fmt: skip
def test_the_recipe_gives_the_hidden_sizes_of_the_releases(size):
    multiple, multiplier = meta.recipe_for(*size)
    assert meta.hidden_size_of(size[0], multiple, multiplier) == size[1]
    published = {11008: (256, None), 13824: (256, None), 17920: (256, None), 22016: (256, None)}
    assert (multiple, multiplier) == published.get(size[1], (multiple, multiplier))


def test_there_is_a_recipe_for_every_hidden_size():
    for dim in (8, 64, 192, 511, 4096):
        for hidden in (*range(1, 60), *range(dim, 6 * dim, 37)):
            assert meta.hidden_size_of(dim, *meta.recipe_for(dim, hidden)) == hidden


def test_published_params_json_give_the_published_hidden_sizes():
    """llama (1), llama-2 7B and 70B, llama-3 8B and 70B, llama-3.2 1B and 3B."""
    assert meta.hidden_size_of(4096, 256, None) == 11008
    assert meta.hidden_size_of(8192, 4096, 1.3) == 28672
    assert meta.hidden_size_of(4096, 1024, 1.3) == 14336
    assert meta.hidden_size_of(8192, 1024, 1.3) == 28672
    assert meta.hidden_size_of(2048, 256, 1.5) == meta.hidden_size_of(3072, 256, 1.0) == 8192


def test_golden_shapes_of_llama2_70b_and_llama3_70b_in_eight_shards():
    """Shapes of the published files, by the description of the format."""
    for axis, vocabulary, part in ((1, 32000, (32000, 1024)), (0, 128256, (16032, 8192))):
        config = LlamaConfig(vocabulary, 8192, 28672, 1, 64, 8, rope_theta=1e4 if axis else 5e5)
        cut = {name: meta._size_of(shape, meta._shard_slices(name, shape, config, axis, 8)[0])
               for name, shape in hugging_face.shapes_of(config).items()}  # fmt: skip
        assert meta._axis(config, "auto") == axis
        assert cut["model.embed_tokens.weight"] == part and cut["lm_head.weight"] == (vocabulary // 8, 8192)
        layer = {name.split(".")[-2]: tuple(shape) for name, shape in cut.items() if ".layers." in name}
        assert layer == {"q_proj": (1024, 8192), "k_proj": (128, 8192), "v_proj": (128, 8192), "o_proj": (8192, 1024),
                         "gate_proj": (3584, 8192), "up_proj": (3584, 8192), "down_proj": (8192, 3584),
                         "input_layernorm": (8192,), "post_attention_layernorm": (8192,)}  # fmt: skip


# ----------------------------------------------------------------------------------------------------------------------
# Readers that are not ours


class MetaModel:
    """Llama as Meta describes it: tensors by Meta's names, neighbouring pairs rotated as complex numbers, params.json the truth.
    Every shard computes its own heads, hidden units and rows of the output; the sum over shards stands for the all-reduce."""

    def __init__(self, folder: Path):
        self.params = json.loads((folder / "params.json").read_text())
        self.shards = [{name: tensor.float() for name, tensor in shard.items()} for shard in stored(folder)]
        p = self.params
        hidden = int(8 * p["dim"] / 3)
        hidden = int(p.get("ffn_dim_multiplier", 1) * hidden)
        self.hidden = -(-hidden // p["multiple_of"]) * p["multiple_of"]

    def frequencies(self, head_dim: int) -> torch.Tensor:
        f = 1.0 / self.params.get("rope_theta", 10000.0) ** (torch.arange(0, head_dim, 2).float() / head_dim)
        if not self.params.get("use_scaled_rope"):
            return f
        scaled = []
        for x in f.tolist():
            wave = 2 * math.pi / x
            smooth = (8192 / wave - 1) / (4 - 1)
            scaled.append(x if wave < 8192 / 4 else x / 8 if wave > 8192 else (1 - smooth) * x / 8 + smooth * x)
        return torch.tensor(scaled)

    def norm(self, x, weight):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.params["norm_eps"]) * weight

    def rotate(self, x, angles):  # [T, heads, head_dim]
        pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2).contiguous())
        return torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)[:, None]).flatten(2)

    def __call__(self, ids: list[int]) -> torch.Tensor:
        p, n = self.params, len(self.shards)
        heads, kv_heads, head_dim = p["n_heads"] // n, max(p.get("n_kv_heads", p["n_heads"]) // n, 1), p["dim"] // p["n_heads"]
        tables = [shard["tok_embeddings.weight"] for shard in self.shards]
        table = torch.cat(tables, dim=0 if tables[0].shape[1] == p["dim"] else 1)
        x, mask = table[ids], torch.full((len(ids), len(ids)), -math.inf).triu(1)
        angles = torch.outer(torch.arange(len(ids)).float(), self.frequencies(head_dim))
        for layer in range(p["n_layers"]):
            def of(shard, name, at=f"layers.{layer}."):
                return shard[f"{at}{name}.weight"]

            total = 0
            for shard in self.shards:
                y = self.norm(x, of(shard, "attention_norm"))
                q, k, v = (F.linear(y, of(shard, f"attention.{w}")).view(len(ids), h, head_dim)
                           for w, h in (("wq", heads), ("wk", kv_heads), ("wv", kv_heads)))  # fmt: skip
                q, k = self.rotate(q, angles), self.rotate(k, angles)
                k, v = (t.repeat_interleave(heads // kv_heads, dim=1) for t in (k, v))
                scores = torch.einsum("qhd,khd->hqk", q, k) / math.sqrt(head_dim) + mask
                y = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v).flatten(1)
                total = total + F.linear(y, of(shard, "attention.wo"))
            x = x + total
            total = 0
            for shard in self.shards:
                y = self.norm(x, of(shard, "ffn_norm"))
                assert of(shard, "feed_forward.w1").shape[0] * n == self.hidden
                y = F.silu(F.linear(y, of(shard, "feed_forward.w1"))) * F.linear(y, of(shard, "feed_forward.w3"))
                total = total + F.linear(y, of(shard, "feed_forward.w2"))
            x = x + total
        x = self.norm(x, self.shards[0]["norm.weight"])
        return torch.cat([F.linear(x, shard["output.weight"]) for shard in self.shards], dim=-1)


SCALED = {**meta.SCALED_ROPE, "factor": 8.0}


@pytest.mark.parametrize("shards", [1, 2, 8])
@pytest.mark.parametrize("config", [MHA, GQA, MHA | {"tie_word_embeddings": True}, GQA | {"vocab_size": 99, "intermediate_size": 200},
                                    GQA | {"rope_scaling": SCALED, "max_position_embeddings": 131072}])  # fmt: skip
def test_metas_model_gives_our_logits(tmp_path, config, shards):
    """Also with more shards than key/value heads, where each shard uses the copy that it has."""
    model = Llama(LlamaConfig(**config)).eval()
    source = Weights(model.config, {name: Lazy(p.shape, p.dtype, p.detach().clone) for name, p in model.named_parameters()})
    meta.write(source, tmp_path / "meta", shards=shards)
    ids = [3, 1, 4, 1, 5, 9, 2, 6, 5, 35, 8, 95]
    with torch.no_grad():
        torch.testing.assert_close(MetaModel(tmp_path / "meta")(ids), model(torch.tensor([ids]))[0], rtol=1e-4, atol=2e-5)
    assert meta.open_weights(tmp_path / "meta").config == model.config


@pytest.mark.parametrize(("config", "shards", "release"), [(MHA, 1, "2"), (MHA, 4, "2"), (GQA, 1, "3"), (GQA, 2, "3")])
def test_transformers_own_script_reads_our_export(tmp_path, transformers, config, shards, release):
    """convert_llama_weights_to_hf.py, which transformers shipped until 4.45. It writes bfloat16."""
    script = os.environ.get("CRIA_LLAMA_CONVERTER")
    if not script:
        pytest.skip("CRIA_LLAMA_CONVERTER is not set to a convert_llama_weights_to_hf.py (in transformers 4.45's package)")
    spec = importlib.util.spec_from_file_location("convert_llama_weights_to_hf", script)
    converter = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(converter)
    source, out = exported(tmp_path, shards, dtype=torch.bfloat16, **config)
    theirs = tmp_path / "theirs"
    converter.write_model(str(theirs), str(out), llama_version=release, vocab_size=config["vocab_size"], num_shards=shards)
    tensors = load_file(theirs / "model.safetensors")
    assert tensors.keys() == source.tensors.keys()
    for name, lazy in source.tensors.items():
        assert torch.equal(tensors[name], lazy.read()), name
    written = LlamaConfig.from_json(theirs)
    assert all(getattr(written, key) == getattr(source.config, key) for key in config)


# ----------------------------------------------------------------------------------------------------------------------
# What the files leave open


def test_releases_are_told_apart_by_their_params(tmp_path):
    _, out = exported(tmp_path)
    releases = {
        2048: [{"norm_eps": 1e-6}],
        4096: [{}, {"norm_eps": 1e-5}],
        8192: [{"rope_theta": 500000.0}],
        16384: [{"rope_theta": 1000000.0}],
        131072: [{"rope_theta": 500000.0, "use_scaled_rope": True}],
    }
    before = (out / "params.json").read_text()
    for length, cases in releases.items():
        for values in cases:
            (out / "params.json").write_text(before)
            change_params(out, **values)
            opened = meta.open_weights(out)
            assert opened.config.max_position_embeddings == length, values
            assert any("how many tokens" in text for text in opened.odd) == (length in (2048, 4096))
    assert opened.config.rope_scaling == SCALED
    assert meta.open_weights(out, max_position=512).config.max_position_embeddings == 512
    large = meta._params(out) | {"use_scaled_rope": False, "rope_theta": 10000.0, "norm_eps": 1e-5, "dim": 8192, "n_layers": 80}
    assert meta._guess_length(large | {"n_kv_heads": 64}, 32000)[0] == 2048  # LLaMA-1 65B
    assert meta._guess_length(large | {"n_kv_heads": 8}, 32000)[0] == 4096  # Llama-2 70B


def test_the_small_llama32_are_tied_and_scaled_by_32(tmp_path):
    config = GQA | {"tie_word_embeddings": True, "rope_scaling": {**SCALED, "factor": 32.0}, "max_position_embeddings": 131072}
    source, out = exported(tmp_path, **config)
    assert meta.open_weights(out).config == source.config
    change(out, lambda tensors: tensors.pop("output.weight"))  # the other way to say it
    assert_same(source, meta.open_weights(out))
    assert meta.open_weights(out).config == source.config


def test_one_bit_between_embeddings_and_output_unties_them(tmp_path, monkeypatch):
    monkeypatch.setattr(meta, "PIECE", 1000)
    for shards in (1, 2):
        source, out = exported(tmp_path, shards, "width", vocab_size=33, num_hidden_layers=1, tie_word_embeddings=True)
        opened = meta.open_weights(out)
        assert opened.config.tie_word_embeddings and any("byte for byte" in text for text in opened.odd)
        change(out, lambda tensors: tensors["output.weight"][-1, -1].mul_(-1), shard=shards - 1)
        opened = meta.open_weights(out)
        assert not opened.config.tie_word_embeddings
        assert (opened.tensors["lm_head.weight"].read() != source.tensors["model.embed_tokens.weight"].read()).sum() == 1
        shutil.rmtree(out)


def test_what_old_files_leave_out_is_the_usual(tmp_path):
    _, out = exported(tmp_path)
    params = json.loads((out / "params.json").read_text())
    assert params == {"dim": 64, "n_layers": 2, "n_heads": 8, "vocab_size": 96, "multiple_of": params["multiple_of"], "norm_eps": 1e-5}
    change_params(out, vocab_size=-1)
    change(out, lambda tensors: tensors.update({"rope.freqs": torch.arange(4.0)}))
    opened = meta.open_weights(out)
    assert (opened.config.vocab_size, opened.config.num_key_value_heads, opened.config.rope_theta) == (96, 8, 10000.0)
    assert any("rope.freqs" in text for text in opened.odd)
    assert (opened.config.bos_token_id, opened.config.eos_token_id) == (1, 2)
    (out / "params.json").write_text(json.dumps({"model": params}))  # as some releases wrap it
    assert meta.open_weights(out).config == opened.config


def test_tensors_count_where_the_recipe_says_otherwise(tmp_path):
    source, out = exported(tmp_path)
    change_params(out, multiple_of=4096)
    opened = meta.open_weights(out)
    assert_same(source, opened)
    assert any("4096" in text and "176" in text for text in opened.odd)


def test_norms_that_differ_between_shards_are_reported(tmp_path):
    source, out = exported(tmp_path, 2)
    change(out, lambda tensors: tensors["layers.1.ffn_norm.weight"].add_(1), shard=1)
    opened = meta.open_weights(out)
    assert any("layers.1.ffn_norm.weight" in text and "consolidated.01.pth" in text for text in opened.odd)
    assert_same(source, opened)


def test_opening_reads_no_weights_but_the_embeddings_first_rows(tmp_path, monkeypatch):
    _, out = exported(tmp_path, 4, "vocabulary")
    read = []
    rows = meta.Joined.rows
    monkeypatch.setattr(meta.Joined, "rows", lambda self, start, stop: read.append((self.name, stop - start)) or rows(self, start, stop))
    monkeypatch.setattr(meta, "PIECE", 2048)
    meta.open_weights(out)
    assert read == [("tok_embeddings.weight", 8), ("output.weight", 8)]


# ----------------------------------------------------------------------------------------------------------------------
# Tokenizers


def test_a_sentencepiece_tokenizer_comes_and_goes_with_the_weights(tmp_path, tokenizer_dir):
    tokenizer = load_tokenizer(tokenizer_dir)
    _, out = exported(tmp_path, vocab_size=len(tokenizer), tokenizer=tokenizer)
    assert (out / "tokenizer.model").read_bytes() == (tokenizer_dir / "tokenizer.model").read_bytes()
    opened = meta.open_weights(out)
    assert opened.tokenizer.fingerprint == tokenizer.fingerprint and opened.tokenizer.template == tokenizer.template
    assert (opened.config.bos_token_id, opened.config.eos_token_id) == (tokenizer.bos_id, tokenizer.eos_id)

    for file in out.glob("tokenizer*"):
        file.unlink()
    assert meta.open_weights(out).tokenizer is None
    assert meta.open_weights(out, tokenizer=tokenizer).tokenizer is tokenizer
    shutil.copy(tokenizer_dir / "tokenizer.model", out.parent)  # LLaMA-1's place
    assert meta.open_weights(out).tokenizer.fingerprint == tokenizer.fingerprint
    shutil.rmtree(out)
    exported(tmp_path, vocab_size=len(tokenizer) + 1)
    assert meta.open_weights(out).tokenizer is None  # of another model


def ranks_of(directory: Path, folder: Path) -> Path:
    """The tokens of a byte-level tokenizer.json, without its specials, as a file of tiktoken ranks."""
    tokenizer = load_tokenizer(directory)
    tokens = [data for i, data in enumerate(tokenizer.token_bytes) if i not in tokenizer.special_texts]
    file = folder / "tokenizer.model"
    file.write_bytes(b"".join(base64.b64encode(token) + b" %d\n" % i for i, token in enumerate(tokens)))
    return file


def texts() -> list[str]:
    return [*NASTY, *parity_texts(), sample_text(), "It's they'RE 12345 \r\n\n  x\t\ty  \n z …"]


def test_ranks_give_the_ids_that_tiktoken_gives(tmp_path, llama3_dir):
    tiktoken = pytest.importorskip("tiktoken", reason="pip install tiktoken")
    file = ranks_of(llama3_dir, tmp_path)
    for release in ("3", "3.1"):
        ours, tokens = tiktoken_file.load_ranks(file, release), tiktoken_file.read_ranks(file)
        specials = {name: len(tokens) + i for i, name in enumerate(tiktoken_file.special_names(release))}
        theirs = tiktoken.Encoding("llama3", pat_str=tiktoken_file.WORDS, special_tokens=specials,
                                   mergeable_ranks={token: i for i, token in enumerate(tokens)})  # fmt: skip
        assert len(ours) == theirs.n_vocab and ours.special_tokens == specials
        for text in texts():
            assert ours.encode(text) == theirs.encode(text, disallowed_special=()), text
            assert ours.decode(ours.encode(text)) == text


def test_real_ranks_give_the_ids_that_tiktoken_gives(tmp_path):
    tiktoken = pytest.importorskip("tiktoken", reason="pip install tiktoken")
    if not (SHARED / "minimind").is_dir():
        pytest.skip("the real minimind tokenizer is not here")
    file = ranks_of(SHARED / "minimind", tmp_path)
    ours, tokens = tiktoken_file.load_ranks(file, "3"), tiktoken_file.read_ranks(file)
    theirs = tiktoken.Encoding("minimind", pat_str=tiktoken_file.WORDS, special_tokens={},
                               mergeable_ranks={token: i for i, token in enumerate(tokens)})  # fmt: skip
    for text in texts():
        assert ours.encode(text) == theirs.encode(text), text


def test_transformers_converts_ranks_to_the_same_vocabulary_and_merges(tmp_path, llama3_dir, transformers):
    pytest.importorskip("tiktoken", reason="pip install tiktoken")
    from transformers.convert_slow_tokenizer import TikTokenConverter

    file = ranks_of(llama3_dir, tmp_path)
    vocabulary, merges = TikTokenConverter(str(file)).extract_vocab_merges_from_model(str(file))
    model = tiktoken_file.tokenizers_json(tiktoken_file.read_ranks(file), tiktoken_file.special_names("3"))["model"]
    assert model["vocab"] == vocabulary
    assert model["merges"] == [" ".join(pair) for pair in merges]


def test_ranks_give_the_ids_of_the_tokenizer_json_that_they_are_from(tmp_path, llama3_dir):
    """The same tokens under the same rule for words: what differs is where the merges come from."""
    tokenizers = pytest.importorskip("tokenizers")
    content = tiktoken_file.tokenizers_json(tiktoken_file.read_ranks(ranks_of(llama3_dir, tmp_path)), tiktoken_file.special_names("3"))
    original = load_tokenizer(llama3_dir)
    content["pre_tokenizer"] = json.loads((llama3_dir / "tokenizer.json").read_text(encoding="utf-8"))["pre_tokenizer"]
    ours = tokenizers.Tokenizer.from_str(json.dumps(content))
    for text in texts():
        if "<|" not in text and "\ud7ff" not in text:
            ids = [i + len(original.special_tokens) for i in ours.encode(text, add_special_tokens=False).ids]
            assert ids == original.encode(text), text


def test_a_llama3_tokenizer_comes_and_goes_with_the_weights(tmp_path, llama3_dir):
    file = ranks_of(llama3_dir, tmp_path)
    size = len(tiktoken_file.read_ranks(file)) + 256
    _, out = exported(tmp_path, vocab_size=size, rope_theta=500000.0)
    shutil.move(file, out / "tokenizer.model")
    opened = meta.open_weights(out)
    tokenizer = opened.tokenizer
    assert len(tokenizer) == size and tokenizer.add_bos and tokenizer.template == "llama3"
    specials = [tokenizer.special_tokens[name] - (size - 256) for name in (
        "<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>",
        "<|reserved_special_token_0|>", "<|reserved_special_token_4|>", "<|reserved_special_token_250|>")]  # fmt: skip
    assert specials == [0, 1, 6, 7, 9, 2, 8, 255]
    assert (opened.config.bos_token_id, opened.config.eos_token_id) == (size - 256, size - 255)

    meta.write(opened, tmp_path / "again")  # the rank file, for Meta's programs, and a tokenizer.json for us
    assert (tmp_path / "again" / "tokenizer.model").read_bytes() == (out / "tokenizer.model").read_bytes()
    assert meta.open_weights(tmp_path / "again").tokenizer.fingerprint == tokenizer.fingerprint
    (tmp_path / "again" / "tokenizer.json").unlink()
    assert meta.open_weights(tmp_path / "again").tokenizer.fingerprint == tokenizer.fingerprint

    change_params(out, use_scaled_rope=True)
    names = meta.open_weights(out).tokenizer.special_tokens
    assert [names[name] - (size - 256) for name in ("<|finetune_right_pad_id|>", "<|eom_id|>", "<|eot_id|>", "<|python_tag|>",
            "<|reserved_special_token_2|>", "<|reserved_special_token_247|>")] == [4, 8, 9, 10, 5, 255]  # fmt: skip


def test_other_tokenizers_get_no_rank_file(tmp_path, llama3_dir):
    """Its specials come first, and so the ids of its tokens are no ranks."""
    tokenizer = load_tokenizer(llama3_dir)
    _, out = exported(tmp_path, vocab_size=len(tokenizer), tokenizer=tokenizer)
    assert not (out / "tokenizer.model").exists()
    assert meta.open_weights(out).tokenizer.fingerprint == tokenizer.fingerprint


@pytest.mark.parametrize(("text", "said"), [
    ("IQ== 0\nIg== one\n", "tokenizer.model:2: not a token"),
    ("IQ== 0\nIg=\n", "tokenizer.model:2: not a token"),
    ("IQ== 0\nIg== 0\n", "tokenizer.model:2: rank 0 for the second time"),
    ("IQ== 0\nIg== 7\n", "no token has rank 1"),
    ("IQ== 0\nIQ== 1\n", "two ranks"),
])  # fmt: skip
def test_a_damaged_rank_file_is_named(tmp_path, text, said):
    (tmp_path / "tokenizer.model").write_text(text)
    assert tiktoken_file.is_ranks(tmp_path / "tokenizer.model")
    with pytest.raises(UserError, match=said):
        tiktoken_file.load_ranks(tmp_path / "tokenizer.model", "3")


# ----------------------------------------------------------------------------------------------------------------------
# What cannot be written


@pytest.mark.parametrize(("config", "options", "said"), [
    ({}, {"shards": 0}, "1 to 16 shards"),
    ({}, {"shards": 17}, "1 to 16 shards"),
    ({}, {"split": "depth"}, "auto, width, vocabulary"),
    ({"intermediate_size": 192, "rope_theta": 500000.0, "num_key_value_heads": 1}, {"shards": 3}, "do not divide the attention heads, 8"),
    ({"intermediate_size": 178}, {"shards": 4}, "do not divide the intermediate size, 178"),
    ({"hidden_size": 72, "num_attention_heads": 12, "num_key_value_heads": 4, "intermediate_size": 192}, {"shards": 6},
     "do not divide the key/value heads, 4"),
    ({"head_dim": 16}, {}, "8 heads of 16 are not 64"),
    ({"attention_bias": True}, {}, "no biases"),
    ({"mlp_bias": True}, {}, "no biases"),
    ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, {}, "'linear'"),
    ({"rope_scaling": {**SCALED, "factor": 32.0}}, {}, "for untied embeddings means"),
    ({"rope_scaling": SCALED, "tie_word_embeddings": True}, {}, "for tied embeddings means"),
    ({"vocab_size": 3}, {"shards": 4}, "more than the vocabulary"),
])  # fmt: skip
def test_models_that_the_format_cannot_hold_are_refused_with_the_reason(config, options, said):
    found = meta.problems(source_of(**config), **options)
    assert len(found) == 1 and said in found[0], found


def test_all_problems_are_told_at_once():
    source = source_of(attention_bias=True, head_dim=16, rope_scaling={"rope_type": "linear", "factor": 2.0})
    found = " ".join(meta.problems(source, shards=3, split="width"))
    words = ("heads of 16", "biases", "'linear'", "attention heads", "intermediate size", "hidden size, 64", "key/value")
    assert all(word in found for word in words), found


def test_an_output_that_equals_the_embeddings_must_be_called_tied():
    source = source_of(vocab_size=4)
    source.tensors["lm_head.weight"] = source.tensors["model.embed_tokens.weight"]
    assert ["tie_word_embeddings" in text for text in meta.problems(source)] == [True]


def test_what_an_export_loses_is_told(tmp_path, tokenizer_dir):
    assert meta.remarks(source_of(**GQA)) == meta.remarks(source_of()) == []
    source = source_of(vocab_size=401, max_position_embeddings=512, tokenizer=load_tokenizer(tokenizer_dir))
    found = meta.remarks(source, shards=4)
    assert len(found) == 3 and "--max-position 512" in found[0] and "vocabulary, 401" in found[1] and "400 entries" in found[2]


# ----------------------------------------------------------------------------------------------------------------------
# Bad input


def refused(out: Path) -> str:
    with pytest.raises(UserError) as caught:
        meta.open_weights(out)
    return str(caught.value)


def test_what_is_recognised(tmp_path):
    _, out = exported(tmp_path)
    assert meta.recognises(out) and not meta.recognises(tmp_path) and not meta.recognises(out / "params.json")
    (out / "params.json").unlink()
    assert meta.recognises(out) and "params.json does not exist" in refused(out)


def test_missing_shards_are_named(tmp_path):
    _, out = exported(tmp_path, 4)
    (out / "consolidated.01.pth").rename(tmp_path / "hidden.pth")
    assert "consolidated.01.pth is missing" in refused(out)
    (tmp_path / "hidden.pth").rename(out / "consolidated.01.pth")
    shutil.copy(out / "consolidated.01.pth", out / "consolidated.1.pth")
    assert "consolidated.01.pth and consolidated.1.pth, two files of one shard" in refused(out)
    (out / "consolidated.1.pth").unlink()
    (out / "consolidated.03.pth").unlink()
    text = refused(out)
    assert "3 consolidated.NN.pth" in text and "(16, 64)" in text and "(64, 64)" in text and "4 shards" in text
    for file in out.glob("*.pth"):
        file.unlink()
    assert "consolidated.00.pth is missing" in refused(out)


def test_truncated_and_foreign_files_are_named(tmp_path):
    _, out = exported(tmp_path, 2)
    file = out / "consolidated.01.pth"
    torch.save({7: torch.zeros(2)}, tmp_path / "number.pth")
    kept = file.read_bytes()
    file.write_bytes((tmp_path / "number.pth").read_bytes())
    assert "consolidated.01.pth is no file of named tensors" in refused(out)
    file.write_bytes(kept)
    whole = file.read_bytes()
    for size in (0, 1, 100, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:size])
        assert str(file) in refused(out), size
    torch.save([torch.ones(3)], file)
    assert "named tensors" in refused(out)
    file.write_bytes(whole)
    change(out, lambda tensors: tensors.pop("norm.weight"), shard=1)
    assert "norm.weight" in refused(out) and "consolidated.01.pth" in refused(out)


class Malice:
    def __init__(self, path: str):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_pickle_is_refused_and_never_run(tmp_path, zipped):
    _, out = exported(tmp_path)
    target = tmp_path / "executed"
    tensors = stored(out)[0] | {"payload": Malice(str(target))}
    torch.save(tensors, out / "consolidated.00.pth", _use_new_zipfile_serialization=zipped)
    text = refused(out)
    assert "consolidated.00.pth" in text and "code" in text
    assert not target.exists()
    torch.load(out / "consolidated.00.pth", weights_only=False)  # the payload works where code is run
    assert target.exists()
    (out / "consolidated.00.pth").write_bytes(pickle.dumps(Malice(str(tmp_path / "bare")), protocol=2))
    refused(out)
    assert not (tmp_path / "bare").exists()


def test_files_of_before_torch_1_6_are_read(tmp_path):
    source, out = exported(tmp_path, 2)
    for file, tensors in zip(sorted(out.glob("*.pth")), stored(out)):
        torch.save(tensors, file, _use_new_zipfile_serialization=False)
    assert_same(source, meta.open_weights(out))


def test_shapes_that_contradict_params_json_are_named(tmp_path):
    _, out = exported(tmp_path, 2, **GQA)
    cases = [
        ({"n_layers": 3}, ["model.layers.2.self_attn.q_proj.weight is missing"]),
        ({"n_layers": 1}, ["layers.1.attention.wq.weight is unknown"]),
        ({"vocab_size": 100}, ["embed_tokens", "(96, 64)", "(100, 64)"]),
        ({"n_kv_heads": 4}, ["k_proj", "(16, 64)", "(32, 64)"]),
        ({"dim": 128}, ["layers.0.attention.wq.weight is (32, 64)", "(128, 128)", "4 shards"]),
        ({"dim": 48}, ["(32, 64)", "(48, 48)", "no number of shards"]),
    ]
    before = (out / "params.json").read_text()
    for values, said in cases:
        (out / "params.json").write_text(before)
        change_params(out, **values)
        text = refused(out)
        assert all(word in text for word in said), text


def test_fewer_key_value_heads_than_shards_must_be_copies(tmp_path):
    """n_kv_heads says that neighbours share a head. The shapes fit, the numbers do not."""
    _, out = exported(tmp_path, 8)
    change_params(out, n_kv_heads=4)
    opened = meta.open_weights(out)
    with pytest.raises(UserError, match=r"consolidated.01.pth: layers.0.attention.wk.weight is not what the shard before has"):
        opened.tensors["model.layers.0.self_attn.k_proj.weight"].read()


def test_shards_that_do_not_fit_each_other_are_named(tmp_path):
    _, out = exported(tmp_path, 2)
    whole = (out / "consolidated.01.pth").read_bytes()

    def refused_with(edit):
        (out / "consolidated.01.pth").write_bytes(whole)
        change(out, edit, shard=1)
        return refused(out)

    narrow = refused_with(lambda tensors: tensors.update({"layers.1.feed_forward.w1.weight": torch.ones(88, 63)}))
    assert "consolidated.01.pth: layers.1.feed_forward.w1.weight is (88, 63)" in narrow and "(88, 64)" in narrow
    cast = refused_with(lambda tensors: tensors.update({"output.weight": tensors["output.weight"].half()}))
    assert "output.weight" in cast and "float16" in cast and "float32" in cast
    short = refused_with(lambda tensors: tensors.update({"layers.1.feed_forward.w3.weight": torch.ones(80, 64)}))
    assert "up_proj" in short and "(168, 64)" in short and "(176, 64)" in short
    unknown = refused_with(lambda tensors: tensors.update({"layers.0.attention.wqkv.weight": torch.ones(2, 2)}))
    assert "layers.0.attention.wqkv.weight" in unknown


@pytest.mark.parametrize(("values", "said"), [
    ({"dim": None}, "dim is missing"),
    ({"n_layers": 0}, "n_layers is 0, not a positive whole number"),
    ({"n_heads": "8"}, "n_heads is '8'"),
    ({"vocab_size": -2}, "vocab_size is -2"),
    ({"norm_eps": 0}, "norm_eps is 0"),
    ({"n_heads": 7}, "dim 64 is not a multiple of n_heads 7"),
    ({"n_kv_heads": 3}, "params.json: num_attention_heads 8 is not a multiple of num_key_value_heads 3"),
    ({"vision_chunk_size": 448}, "a vision model"),
    ({"quantization_args": {"scheme": "int4"}}, "quantised"),
    ({"moe_args": {"num_experts": 16}}, "experts"),
])  # fmt: skip
def test_mistakes_in_params_json_are_named(tmp_path, values, said):
    _, out = exported(tmp_path)
    change_params(out, **values)
    assert said in refused(out)


def test_a_broken_params_json_is_named(tmp_path):
    _, out = exported(tmp_path)
    for text in ("", "{", "[1]", "\xff"):
        (out / "params.json").write_bytes(text.encode("latin-1"))
        assert "params.json" in refused(out)
