"""chat.py and eval.py with adapters on a model, and models that lie quantised on the disk, as bitsandbytes stores them."""

from __future__ import annotations

from settings import UserError, parse_config

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import chat
import convert as cv
import eval as evaluation
import nf4
from adapter_files import CONFIG, PREFIX, base_facts, write_adapter_descriptions
from adapters import AdapterFlags, places
from checkpoint import load_model, model_tensors
from config import LlamaConfig
from layers import pack, packed_layers
from model import Llama
from tokenizer import load_tokenizer
from weights import open_weights, shapes_of, storage_of

TOKENS = torch.arange(3, 43).view(2, 20)
SETTINGS = dict(device="cpu", dtype="fp32")


@dataclasses.dataclass(frozen=True)
class Flags(AdapterFlags):
    fsdp: bool = False
    deepspeed: str | None = None


def adapter_dir_of(base: Path, out: Path, *, seed: int = 0, strength: float = 1.0, storage: str = "none", template: str | None = None,
                   targets=("all",), also=(), dora: bool = False, llama: LlamaConfig | None = None) -> Path:  # fmt: skip
    """An adapter that has learned something, random numbers, as a run of sft.py leaves it."""
    llama = llama or LlamaConfig.from_json(base)
    config = Flags(lora_rank=4, lora_targets=targets, train_also=also, dora=dora).adapter(llama)
    config = dataclasses.replace(config, base=base_facts(base, llama, storage))
    dice, tensors = torch.Generator().manual_seed(seed), {}
    for module, (rows, columns) in config.modules(llama).items():
        tensors[f"{module}.lora_A.weight"] = torch.randn(4, rows, generator=dice) / rows**0.5
        tensors[f"{module}.lora_B.weight"] = torch.randn(columns, 4, generator=dice) * 0.05 * strength
        if dora:
            tensors[f"{module}.lora_magnitude_vector"] = 1 + torch.rand(columns, generator=dice)
    shapes = shapes_of(llama)
    tensors |= {name: torch.randn(shapes[name], generator=dice) for name in config.whole(llama)}
    out.mkdir()
    save_file({PREFIX + name: tensor for name, tensor in tensors.items()}, out / "adapter_model.safetensors")
    write_adapter_descriptions(out, config, llama)
    if template:
        load_tokenizer(base).save(out, template=template)
    return out


def quantised_dir(model: Path, out: Path, storage: str, dtype: torch.dtype = torch.float32, dense=()) -> Path:
    """The model as transformers saves it after quantising it with bitsandbytes, but for the projections of the names `dense`."""
    shutil.copytree(model, out)
    tensors = load_file(model / "model.safetensors")
    for module in places(LlamaConfig.from_json(model)):
        if ".layers." in module and not module.endswith(tuple(dense)):
            packed = nf4.quantise(tensors.pop(f"{module}.weight"), storage == "nf4-double")
            tensors |= nf4.to_bitsandbytes(f"{module}.weight", packed, dtype)
    save_file(tensors, out / "model.safetensors")
    say_quantised(out, quant_method="bitsandbytes", load_in_4bit=True, bnb_4bit_quant_type="nf4")
    return out


def say_quantised(model: Path, **facts) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"quantization_config": facts}))


def same(one: Llama, other: Llama) -> bool:
    with torch.no_grad():
        return torch.equal(one.eval()(TOKENS), other.eval()(TOKENS))


# ---- chat.py and eval.py ---------------------------------------------------------------------------------------------


def test_chat_with_adapters(model_dir, tmp_path, capsys):
    """Several in the order that they are given, in either spelling; the template is that of the last one that has a tokenizer."""
    a, b = adapter_dir_of(model_dir, tmp_path / "a", template="baby"), adapter_dir_of(model_dir, tmp_path / "b", seed=1, dora=True)
    talk = ["--model", str(model_dir), "--device", "cpu", "--dtype", "fp32", "--adapter"]
    wanted = load_model(model_dir, adapters=[a, b])
    for words in ([f"{a},{b}"], [f"{a},", str(b)]):
        conversation = chat.load(parse_config(chat.Config, [*talk, *words]))
        assert conversation.template == "baby" and same(conversation.model, wanted)
    assert not same(load_model(model_dir, adapters=[b, a]), wanted)
    assert chat.load(parse_config(chat.Config, [*talk, str(b)])).template is None
    result = chat.main(parse_config(chat.Config, [*talk, f"{a},{b}", "--prompt", "春眠", "--max-new-tokens", "3", "--temperature", "0"]))
    assert result["new_tokens"] <= 3 and result["answer"] in capsys.readouterr().out


def test_an_adapter_beside_the_base_it_was_trained_on(model_dir, tmp_path, capsys):
    adapter = adapter_dir_of(model_dir, tmp_path / "a", storage="nf4-double", template="baby")
    wanted = load_model(model_dir, adapters=[adapter], base_quant="nf4-double")
    settings = dict(model=model_dir, adapter=(str(adapter),), **SETTINGS)
    assert same(chat.load(chat.Config(base_quant="nf4-double", **settings)).model, wanted)
    assert not capsys.readouterr().err
    assert not same(chat.load(chat.Config(**settings)).model, wanted)
    said = capsys.readouterr()
    assert said.err.count("notice") == 1 and "a was trained beside projections in nf4-double" in said.err and not said.out
    assert "--base-quant nf4-double makes" in said.err
    chat.load(chat.Config(base_quant="int8", **settings))
    assert "here they are in int8" in capsys.readouterr().err


def test_eval_with_an_adapter(model_dir, tmp_path, capsys):
    (tmp_path / "text.txt").write_text("春眠不觉晓\n", encoding="utf-8")
    adapter = adapter_dir_of(model_dir, tmp_path / "a")
    settings = dict(model=model_dir, tasks=("ppl",), data=(str(tmp_path / "text.txt"),), **SETTINGS)
    plain = evaluation.main(evaluation.Config(**settings))["ppl"]["nats_per_token"]
    ours = evaluation.main(evaluation.Config(adapter=(str(adapter),), base_quant="int8", out=tmp_path / "out", **settings))
    assert abs(ours["ppl"]["nats_per_token"] - plain) > 1e-3
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert f"{model_dir} + {adapter}: " in results["model"] and "projections in int8" in results["model"]
    assert (results["settings"]["adapter"], results["settings"]["base_quant"]) == ([str(adapter)], "int8")
    assert (tmp_path / "out" / "results.md").read_text().startswith(f"# {model_dir} + {adapter}\n")
    assert f"model     {model_dir} + {adapter}: " in capsys.readouterr().out


def test_what_is_no_adapter(model_dir, tmp_path):
    for wrong, message in ((tmp_path / "nowhere", "does not exist"), (model_dir, f"has no {CONFIG}: it is no adapter, but a model")):
        with pytest.raises(UserError, match=f"--adapter {wrong} {message}"):
            chat.load(chat.Config(model=model_dir, adapter=(str(wrong),), **SETTINGS))


# ---- quantised directories -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("storage", ["nf4", "nf4-double"])
def test_stored_codes_stay_as_they_are(model_dir, tmp_path, storage, capsys):
    path = quantised_dir(model_dir, tmp_path / "model", storage)
    assert storage_of(path) == storage and (storage_of(model_dir), storage_of(model_dir, storage)) == ("none", storage)
    stored, config = load_file(path / "model.safetensors"), LlamaConfig.from_json(path)
    filled = pack(Llama(config), storage)
    layers = packed_layers(filled)
    for name, tensor in model_tensors(path, config, storage):
        assert isinstance(tensor, nf4.Packed) == (name in layers)
        if name in layers:
            layers[name].store(tensor, name)
    for layers in (packed_layers(filled), packed_layers(load_model(path, base_quant=storage))):
        for name, layer in layers.items():
            assert torch.equal(layer.codes, stored[name].view(-1))
            assert torch.equal(layer.scales.view(stored[f"{name}.absmax"].dtype), stored[f"{name}.absmax"])
            if storage == "nf4-double":
                assert torch.equal(layer.nested_scales.view(torch.float32), stored[f"{name}.nested_absmax"])
    assert len(layers) == 14
    dense = load_model(path)
    assert not packed_layers(dense) and all(torch.equal(dense.get_parameter(name), layer.stored(torch.float32))
                                            for name, layer in layers.items())  # fmt: skip
    assert same(chat.load(chat.Config(model=path, **SETTINGS)).model, load_model(path, base_quant=storage))
    cv.inspect(cv.Inspect(path))
    assert f"14 weights in {storage}, in bitsandbytes' layout" in capsys.readouterr().out


def test_the_dtype_is_what_the_files_say(model_dir, tmp_path):
    path = quantised_dir(model_dir, tmp_path / "model", "nf4", torch.bfloat16)
    exact = load_model(quantised_dir(model_dir, tmp_path / "other", "nf4"))
    lazy, name = (open_weights(path).tensors[name := "model.layers.0.mlp.up_proj.weight"]), name
    assert (lazy.dtype, lazy.nbytes) == (torch.bfloat16, 2 * 48 * 32) and torch.equal(lazy.read(), exact.get_parameter(name).bfloat16())
    assert torch.equal(lazy.to(torch.float32).read(), exact.get_parameter(name)), "not rounded on the way"


def test_partly_quantised_is_read_dense(model_dir, tmp_path):
    path = quantised_dir(model_dir, tmp_path / "model", "nf4", dense=("down_proj",))
    assert storage_of(path) == "none" and not packed_layers(load_model(path))
    with pytest.raises(UserError, match=r"--base-quant int8: .*model is quantised already, in nf4; without the flag it is used as it is"):
        storage_of(path, "int8")


def test_other_quantisations_are_refused_by_name(model_dir, tmp_path):
    for number, (names, facts, kind) in enumerate((
        (("weight", "weight.SCB"), {"quant_method": "bitsandbytes", "load_in_8bit": True}, "bitsandbytes' LLM.int8"),
        (("weight", "weight.absmax", f"weight.{nf4.STATE}fp4"), {"quant_method": "bitsandbytes"}, "bitsandbytes' fp4"),
        (("qweight", "qzeros", "scales"), {"quant_method": "gptq", "bits": 4}, "GPTQ"),
        (("qweight", "qzeros", "scales"), {"quant_method": "awq", "bits": 4}, "AWQ"),
        (("qweight", "qzeros", "scales"), {}, "GPTQ or AWQ"),
    )):  # fmt: skip
        path = tmp_path / str(number)
        shutil.copytree(model_dir, path)
        tensors = load_file(model_dir / "model.safetensors")
        del tensors["model.layers.0.self_attn.q_proj.weight"]
        tensors |= {f"model.layers.0.self_attn.q_proj.{name}": torch.zeros(4, dtype=torch.uint8) for name in names}
        save_file(tensors, path / "model.safetensors")
        say_quantised(path, **facts)
        for read in (load_model, open_weights, storage_of):
            with pytest.raises(UserError, match=f"{path} is quantised by {kind}; of quantised models those in nf4"):
                read(path)


def test_a_damaged_description(model_dir, tmp_path):
    path = quantised_dir(model_dir, tmp_path / "model", "nf4")
    tensors = load_file(path / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    for text in (b"{", b"[]", b'{"shape": [48, 32], "dtype": "nothing"}', b'{"shape": [48, 32], "dtype": "nn"}'):
        tensors[f"{name}.{nf4.STATE}nf4"] = torch.tensor(list(text), dtype=torch.uint8)
        save_file(tensors, path / "model.safetensors")
        with pytest.raises(UserError, match=f"{name}.{nf4.STATE}nf4 is damaged"):
            load_model(path)
    del tensors[name]
    del tensors[f"{name}.{nf4.STATE}nf4"]
    save_file(tensors, path / "model.safetensors")
    with pytest.raises(UserError, match=f"{name}.absmax is unknown"):
        load_model(path)


@pytest.mark.slow
@pytest.mark.parametrize("double", [False, True])
def test_what_transformers_and_bitsandbytes_save(tmp_path, double):
    """Their codes in our layers, bit for bit; their numbers, from the same codes."""
    bitsandbytes, transformers = pytest.importorskip("bitsandbytes"), pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(vocab_size=97, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
                                      num_key_value_heads=2, max_position_embeddings=64)  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "dense")
    how = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=double)
    theirs = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "dense", quantization_config=how, dtype=torch.bfloat16,
                                                           device_map="cpu")  # fmt: skip
    theirs.save_pretrained(tmp_path / "packed")
    storage, names = "nf4-double" if double else "nf4", dict(theirs.named_modules())
    assert storage_of(tmp_path / "packed") == storage
    dense = load_model(tmp_path / "packed")
    for name, layer in packed_layers(load_model(tmp_path / "packed", base_quant=storage)).items():
        weight = names[name.removesuffix(".weight")].weight
        assert torch.equal(layer.codes, weight.data.view(-1))
        numbers = bitsandbytes.functional.dequantize_4bit(weight.data, weight.quant_state)
        assert numbers.dtype == dense.get_parameter(name).dtype == torch.bfloat16
        assert torch.allclose(dense.get_parameter(name).float(), numbers.float(), rtol=2**-7, atol=0)
    with torch.no_grad():  # on a CPU theirs computes in blocks of its own
        assert torch.allclose(dense(TOKENS).float(), theirs(TOKENS).logits.float(), atol=0.05)
