"""convert.py merge: what adapters do beside a model, its weights do alone afterwards; streaming, and honest about what rounding took."""

from __future__ import annotations

from settings import UserError

import dataclasses
import gc
import json
import re
import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_adapter_use import adapter_dir_of, quantised_dir

import convert as cv
from adapter_files import BASE
from checkpoint import load_model, open_model_dir, save_model
from config import LlamaConfig
from layers import packed_layers
from model import Llama
from weights import Lazy, open_weights

TOKENS = torch.arange(3, 43).view(2, 20)


def merge(model: Path, *adapters: Path, out: Path, **options) -> dict:
    return cv.merge(cv.Merge(model=model, adapter=tuple(map(str, adapters)), out=out, **options))


def logits(path: Path, **options) -> torch.Tensor:
    with torch.no_grad():
        return load_model(path, **options).eval()(TOKENS)


def bf16(model: Path, out: Path) -> Path:
    cv.convert(open_weights(model), cv.huggingface, out, "bf16")
    return out


def same_weights(one: Path, other) -> bool:
    state = load_model(one).state_dict()
    return all(torch.equal(tensor, state[name]) for name, tensor in other.state_dict().items())


def test_merged_is_what_ran_with_the_adapters(model_dir, tmp_path, capsys):
    """One behind the other, where the second (DoRA) starts from what the first made of the weight."""
    paths = [adapter_dir_of(model_dir, tmp_path / "a", seed=1), adapter_dir_of(model_dir, tmp_path / "b", seed=2, dora=True)]
    facts = merge(model_dir, *paths, out=tmp_path / "out")
    assert same_weights(tmp_path / "out", load_model(model_dir, adapters=paths))
    other_way = load_model(model_dir, adapters=paths[::-1])
    assert not same_weights(tmp_path / "out", other_way)
    assert facts["tensors"] == 14 and facts["lost"] == facts["rounded"] == 0 and facts["learned"] > 0.01
    assert "14 of 21 tensors are changed" in (said := capsys.readouterr().out) and "holds the merged weights" in said


@pytest.mark.parametrize("storage", ["nf4", "nf4-double", "int8"])
def test_a_base_that_was_quantised_in_training(model_dir, tmp_path, storage, capsys):
    """Its rounded weights are merged, all of them: also those that no adapter touches."""
    adapter = adapter_dir_of(model_dir, tmp_path / "a", storage=storage, targets=("q_proj", "down_proj"))
    trained = logits(model_dir, adapters=[adapter], base_quant=storage)
    merge(model_dir, adapter, out=tmp_path / "same", base_quant=storage)
    said = capsys.readouterr()
    assert "notice" not in said.err and "in training it was so too" in said.out
    told = re.search(rf"--base-quant {storage} changed the projections by (.*)%", said.out)
    pairs = [(load_model(model_dir).get_parameter(name), layer.stored(torch.float32))
             for name, layer in packed_layers(load_model(model_dir, base_quant=storage)).items()]  # fmt: skip
    moved, whole = (sum(x.square().sum().item() for x in xs) for xs in ([a - b for a, b in pairs], [a for a, _ in pairs]))
    assert float(told[1]) == pytest.approx(100 * (moved / whole) ** 0.5, abs=0.006)
    merge(model_dir, adapter, out=tmp_path / "other")
    assert f"was trained beside projections in {storage}" in (err := capsys.readouterr().err) and err.count("notice") == 1
    plain = adapter_dir_of(model_dir, tmp_path / "plain")
    merge(model_dir, plain, out=tmp_path / "rounded", base_quant=storage)
    said = capsys.readouterr()
    assert "leaving out --base-quant makes" in said.err and "in training" not in said.out
    near, far = ((logits(tmp_path / name) - trained).abs().max() for name in ("same", "other"))
    assert near < 1e-5 * trained.abs().max() and far > 100 * near


def test_a_base_that_lies_quantised(model_dir, tmp_path, capsys):
    base = quantised_dir(model_dir, tmp_path / "packed", "nf4-double")
    adapter = adapter_dir_of(base, tmp_path / "a", storage="nf4-double")
    merge(base, adapter, out=tmp_path / "out", dtype="fp32")
    assert "the projections of --model are in nf4-double" in (said := capsys.readouterr()).out and "notice" not in said.err
    with_codes = logits(base, adapters=[adapter], base_quant="nf4-double", dtype=torch.float32)
    assert torch.allclose(logits(tmp_path / "out"), with_codes, atol=1e-5 * with_codes.abs().max())
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    with pytest.raises(UserError, match=r"--base-quant nf4: .*packed is quantised already, in nf4-double"):
        merge(base, adapter, out=tmp_path / "again", base_quant="nf4")


@pytest.mark.parametrize("strength, told", [(1.0, False), (0.01, True)])
def test_what_rounding_took(model_dir, tmp_path, strength, told, capsys):
    base = bf16(model_dir, tmp_path / "base")
    adapter = adapter_dir_of(base, tmp_path / "a", strength=strength)
    before, exact = load_model(base).state_dict(), load_model(base, dtype=torch.float32, adapters=[adapter])
    capsys.readouterr()
    facts = merge(base, adapter, out=tmp_path / "bf16")
    assert ("finer than bfloat16" in capsys.readouterr().out) == told
    merge(base, adapter, out=tmp_path / "fp32", dtype="fp32")
    after, full = load_model(tmp_path / "bf16").state_dict(), load_model(tmp_path / "fp32").state_dict()
    names = [name for name in before if not torch.equal(before[name].float(), full[name])]
    assert len(names) == 14 and {tensor.dtype for tensor in after.values()} == {torch.bfloat16}
    assert all(torch.equal(after[name], full[name].bfloat16()) for name in after), "rounded once"
    assert all(torch.equal(tensor.bfloat16(), after[name]) for name, tensor in exact.state_dict().items())

    def length(of) -> float:
        return sum(of(name).double().square().sum().item() for name in names) ** 0.5

    change, lost = length(lambda name: full[name] - before[name].float()), length(lambda name: after[name].float() - full[name])
    size = length(lambda name: before[name].float())
    assert facts["learned"] == pytest.approx(change / size, rel=1e-4)
    assert facts["lost"] == pytest.approx(lost / change, rel=1e-4)
    assert facts["rounded"] == pytest.approx(lost / size, rel=1e-4)


def test_what_goes_with_it(model_dir, tmp_path):
    """The adapter's tokenizer, chat template and RoPE scaling; parameters that it trained whole."""
    longer = LlamaConfig.from_json(model_dir).with_rope_scaling("linear", 4.0)
    adapter = adapter_dir_of(model_dir, tmp_path / "a", llama=longer, template="baby", also=("norm", "embed"))
    facts = merge(model_dir, adapter, out=tmp_path / "out")
    _, llama, tokenizer = open_model_dir(tmp_path / "out")
    assert (llama.rope_scaling, llama.context_length) == (longer.rope_scaling, 4 * 64)
    assert tokenizer.template == "baby" and open_model_dir(model_dir)[2].template is None
    stored = load_file(adapter / "adapter_model.safetensors")
    merged = load_model(tmp_path / "out").state_dict()
    for name in ("model.norm.weight", "model.embed_tokens.weight"):
        assert torch.equal(merged[name], stored[f"base_model.model.{name}"])
    assert facts["tensors"] == 14 + 5 + 1
    assert (tmp_path / "out" / "generation_config.json").exists() and not (tmp_path / "out" / "adapter_config.json").exists()


def test_only_a_few_tensors_are_in_memory(model_dir, tokenizer, tmp_path, monkeypatch):
    alive, most = 0, 0

    def watched(lazy: Lazy) -> Lazy:
        def read() -> torch.Tensor:
            nonlocal alive, most
            tensor = lazy.read().clone()
            alive += lazy.nbytes
            most = max(most, alive)

            def gone() -> None:
                nonlocal alive
                alive -= lazy.nbytes

            weakref.finalize(tensor, gone)
            return tensor

        return dataclasses.replace(lazy, read=read)

    def opened(directory: Path, tokenizer=None):
        weights = open_weights(directory, tokenizer)
        return dataclasses.replace(weights, tensors={name: watched(lazy) for name, lazy in weights.tensors.items()})

    deep = tmp_path / "deep"
    save_model(Llama(dataclasses.replace(LlamaConfig.from_json(model_dir), num_hidden_layers=10)), deep, tokenizer)
    adapter = adapter_dir_of(deep, tmp_path / "a")
    monkeypatch.setattr(cv.huggingface, "open_weights", opened)
    merge(deep, adapter, out=tmp_path / "out")
    gc.collect()
    sizes = sorted(lazy.nbytes for lazy in open_weights(deep).tensors.values())
    assert sizes[-1] <= most <= sum(sizes[-3:]) < sum(sizes) / 2 and alive == 0


def test_mistakes_leave_nothing(model_dir, tmp_path):
    adapter, out = adapter_dir_of(model_dir, tmp_path / "a"), tmp_path / "out"
    assert cv.Merge(model=model_dir, out=out).problems() == ["--adapter is required: what to merge into --model"]
    merge(model_dir, adapter, out=tmp_path / "merged")
    with pytest.raises(UserError, match="exists already"):
        merge(model_dir, adapter, out=tmp_path / "merged")
    with pytest.raises(UserError, match=r"was trained on .* with the fingerprint .*: other weights of the same shape"):
        merge(tmp_path / "merged", adapter, out=out)
    with pytest.raises(UserError, match="is an adapter and no whole model"):
        merge(adapter, adapter, out=out)
    (adapter / BASE).unlink()
    stored = load_file(adapter / "adapter_model.safetensors")
    save_file({name: tensor * 1e6 for name, tensor in stored.items()}, adapter / "adapter_model.safetensors")
    with pytest.raises(UserError, match="more than float16 holds; give --dtype bf16 or fp32"):
        merge(model_dir, adapter, out=out, dtype="fp16")
    assert sorted(path.name for path in tmp_path.iterdir() if "out" in path.name) in ([], [".out.lock"])
