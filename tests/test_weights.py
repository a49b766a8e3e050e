"""weights.py: files of a model, tensor by tensor, against transformers and safetensors."""

from __future__ import annotations

from settings import UserError

import dataclasses
import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from checkpoint import load_model, save_model
from config import LlamaConfig
from model import Llama
from tokenizer import load_tokenizer
from weights import (
    Lazy,
    Weights,
    misfits,
    open_weights,
    permute,
    plan,
    shapes_of,
    unpermute,
    write_safetensors,
    write_weights,
)

SMALL = LlamaConfig(400, 32, 64, 2, 4, 2, max_position_embeddings=64)
TOKENS = torch.arange(20)[None]


def same(a: Llama, b: Llama) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


@pytest.mark.parametrize("shards", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_directories_saved_by_transformers_are_read(tmp_path, transformers, tied, shards):
    config = transformers.LlamaConfig(vocab_size=97, hidden_size=32, intermediate_size=56, num_hidden_layers=3, num_attention_heads=4,
                                      num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=tied)  # fmt: skip
    theirs = transformers.LlamaForCausalLM(config).eval()
    theirs.save_pretrained(tmp_path, max_shard_size="20KB" if shards else "1GB")
    assert (len(list(tmp_path.glob("model-*.safetensors"))) > 2) == shards
    weights = open_weights(tmp_path)
    assert list(weights.tensors) == list(shapes_of(weights.config)) and ("lm_head.weight" in weights.tensors) != tied
    state = theirs.state_dict()
    assert all(torch.equal(lazy.read(), state[name]) for name, lazy in weights.tensors.items())
    with torch.no_grad():
        assert torch.allclose(load_model(tmp_path)(TOKENS), theirs(TOKENS).logits, atol=1e-5)


def test_bin_shards_with_their_index_and_old_frequencies_are_read(tmp_path):
    model = Llama(SMALL)
    SMALL.to_json(tmp_path / "config.json")
    state = dict(model.state_dict())
    for layer in range(2):
        state[f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    names, weight_map = list(state), {}
    for part in range(2):
        file = f"pytorch_model-0000{part + 1}-of-00002.bin"
        torch.save({name: state[name] for name in names[part::2]}, tmp_path / file, _use_new_zipfile_serialization=part == 0)
        weight_map |= dict.fromkeys(names[part::2], file)
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    weights = open_weights(tmp_path)
    assert weights.odd == ["2 stored tensors of rotary frequencies (an old tool's) are left out: they are computed"]
    assert same(load_model(tmp_path), model)

    wrong = weight_map | {names[0]: "pytorch_model-00002-of-00002.bin"}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": wrong}))
    with pytest.raises(UserError, match=rf"index\.json is wrong: {names[0]} is in pytorch_model-00001-of-00002.bin and not in"):
        open_weights(tmp_path)


def test_indexes_and_shards_that_do_not_go_together(tmp_path):
    save_model(Llama(SMALL), tmp_path, shard_bytes=30_000)
    (tmp_path / "other.index.json").write_text("[1]")  # nobody's business
    open_weights(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    text = index.read_text()
    for content in ("[]", '{"weight_map": {}}', '{"weight_map": {"a": 1}}'):
        index.write_text(content)
        with pytest.raises(UserError, match=r"index\.json has no weight_map"):
            open_weights(tmp_path)
    index.unlink()
    with pytest.raises(UserError, match=r"model-00001-of-0000.\.safetensors and no model\.safetensors\.index\.json"):
        open_weights(tmp_path)
    index.write_text(text)
    save_file(dict(Llama(SMALL).state_dict()), tmp_path / "model.safetensors")
    assert "the shards that its index names beside it are not" in open_weights(tmp_path).odd[0]


def test_a_name_in_two_files_is_refused(tmp_path):
    save_model(Llama(SMALL), tmp_path, shard_bytes=30_000)
    first, second = sorted(tmp_path.glob("model-*.safetensors"))[:2]
    save_file(load_file(second) | {"model.embed_tokens.weight": torch.zeros(400, 32)}, second, metadata={"format": "pt"})
    with pytest.raises(UserError, match=f"model.embed_tokens.weight is in {first.name} and in {second.name}"):
        open_weights(tmp_path)


def test_the_streamed_file_is_what_safetensors_reads(tmp_path):
    tensors = {"b": torch.randn(3, 5).bfloat16(), "a": torch.randn(7), "ü": torch.randint(0, 9, (3,)), "s": torch.tensor(2.5),
               "8": torch.zeros(5).byte()}  # fmt: skip
    lazy = {name: Lazy(tensor.shape, tensor.dtype, lambda tensor=tensor: tensor) for name, tensor in tensors.items()}
    lazy["b"] = Lazy(torch.Size((5, 3)), torch.bfloat16, lambda: tensors["b"].t())  # not contiguous
    write_safetensors(tmp_path / "x.safetensors", lazy)
    read = load_file(tmp_path / "x.safetensors")
    assert read.keys() == tensors.keys() and torch.equal(read.pop("b"), tensors.pop("b").t())
    assert all(torch.equal(read[name], tensors[name]) and read[name].dtype == tensors[name].dtype for name in tensors)
    with safe_open(tmp_path / "x.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_directory_written_from_weights_equals_save_model(tmp_path, tokenizer_dir, dtype):
    tokenizer, model = load_tokenizer(tokenizer_dir), Llama(SMALL).to(dtype)
    save_model(model, tmp_path / "a", tokenizer, shard_bytes=30_000)
    weights = open_weights(tmp_path / "a")
    assert weights.dtypes == {dtype: model.num_parameters()} and weights.tokenizer.fingerprint == tokenizer.fingerprint
    write_weights(weights, tmp_path / "b", shard_bytes=30_000)
    files = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert sorted(path.name for path in (tmp_path / "b").iterdir()) == files
    for name in files:
        if not name.endswith(".safetensors"):
            assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name
    assert same(load_model(tmp_path / "b"), model)


def test_casting_and_planning():
    half = Lazy(torch.Size((4, 2)), torch.float32, lambda: torch.ones(4, 2)).to(torch.float16)
    assert half.nbytes == 16 and half.read().dtype == torch.float16 and half.to(None) is half and half.to(torch.float16) is half
    one = Lazy(torch.Size((10,)), torch.float32, lambda: torch.zeros(10))
    assert list(plan("m", [("a", one), ("b", one)], 80)) == ["m.safetensors"]
    files = plan("m", [("a", one), ("b", one), ("c", one)], 50)
    assert [list(tensors) for tensors in files.values()] == [["a"], ["b"], ["c"]] and list(files)[2] == "m-00003-of-00003.safetensors"


def test_rows_of_q_and_k_change_their_order_and_back():
    weight = torch.arange(2 * 8 * 3.0).reshape(16, 3)  # 2 heads of 8
    interleaved = permute(weight, 2)
    assert interleaved[:8, 0].div(3).tolist() == [0, 4, 1, 5, 2, 6, 3, 7]  # Hugging Face pairs k with k + 4, Meta 2k with 2k + 1
    assert torch.equal(unpermute(interleaved, 2), weight) and torch.equal(permute(weight[:, 0], 2), interleaved[:, 0])


def test_misfits_name_tensor_and_both_shapes():
    shapes = shapes_of(SMALL)
    assert misfits(SMALL, shapes) == []
    del shapes["model.norm.weight"]
    shapes |= {"lm_head.weight": torch.Size((3, 4)), "odd": torch.Size((1,))}
    assert misfits(SMALL, shapes, "params.json") == ["odd is unknown", "lm_head.weight is (3, 4) and params.json says (400, 32)",
                                                     "model.norm.weight is missing"]  # fmt: skip
    tied = dataclasses.replace(SMALL, tie_word_embeddings=True)
    assert "lm_head.weight" not in shapes_of(tied) and isinstance(Weights(tied, {}).facts, dict)
