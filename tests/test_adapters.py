"""adapters.py: what peft makes of ours and we of peft's, several at once, beside packed weights; and what cannot be an adapter."""

from __future__ import annotations

from settings import UserError

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from adapter_files import BASE, CONFIG, PREFIX, base_facts, open_adapter, peft_key
from adapters import FOREIGN, SETTINGS, AdapterConfig, AdapterFlags, attach, first_values
from checkpoint import load_model, model_tensors, open_model_dir, save_model
from layers import STORAGES, packed_layers
from model import PRESETS, Llama, LlamaConfig

SMALL = LlamaConfig(vocab_size=48, hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4,
                    num_key_value_heads=2, max_position_embeddings=32)  # fmt: skip
BASES = {"plain": SMALL, "biased": replace(SMALL, attention_bias=True, mlp_bias=True), "tied": replace(SMALL, tie_word_embeddings=True)}
TOKENS = torch.arange(24).view(2, 12) * 7 % 48
Q, Q_A = "model.layers.0.self_attn.q_proj", f"{PREFIX}model.layers.0.self_attn.q_proj.lora_A.weight"


@dataclass(frozen=True)
class Flags(AdapterFlags):
    fsdp: bool = False
    deepspeed: str | None = None


def adapter_of(llama: LlamaConfig = SMALL, **flags) -> AdapterConfig:
    return Flags(lora_rank=4, **flags).adapter(llama) if "lora_rank" not in flags else Flags(**flags).adapter(llama)


def shake(model, amount: float = 0.1) -> None:
    """As if what learns had learned."""
    dice = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=dice) * amount)


def begin(base: Path, storage: str = "none", dtype: torch.dtype = torch.float32, seed: int = 0, **flags) -> tuple[Llama, AdapterConfig]:
    """A model as a stage has it before its first step."""
    llama = LlamaConfig.from_json(base)
    adapter = replace(adapter_of(llama, **flags), base=base_facts(base, llama, storage))
    with torch.device("meta"):
        model = Llama(llama)
        attach(model, adapter, storage, dtype)
    model.to_empty(device="cpu")
    packed = packed_layers(model)
    for name, tensor in first_values(model_tensors(base, llama), model, seed):
        packed[name].store(tensor, name) if name in packed else model.get_parameter(name).data.copy_(tensor)
    return model.eval(), adapter


def train(base: Path, path: Path, storage: str = "none", **flags) -> torch.Tensor:
    """Write an adapter that has learned; returns the logits of the model that it was trained on."""
    model, adapter = begin(base, storage, **flags)
    shake(model)
    save_model(model, path, adapter=adapter)
    return logits(model)


@torch.no_grad()
def logits(model) -> torch.Tensor:
    result = model.eval()(TOKENS)
    return getattr(result, "logits", result)


def same(one: torch.Tensor, other: torch.Tensor, atol: float = 1e-5) -> None:
    torch.testing.assert_close(one, other, rtol=0, atol=atol)


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> dict[str, Path]:
    """Model directories in which every parameter matters, biases too."""
    paths = {}
    for kind, llama in BASES.items():
        torch.manual_seed(0)
        model = Llama(llama)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.normal_(1.0 if name.endswith("norm.weight") else 0.0, 0.1)
        paths[kind] = tmp_path_factory.mktemp("bases") / kind
        save_model(model, paths[kind])
    return paths


@pytest.fixture
def base(bases) -> Path:
    return bases["plain"]


@pytest.fixture(scope="module")
def whole_dir(bases, tmp_path_factory) -> Path:
    """An adapter of ours, of all kinds of tensors."""
    path = tmp_path_factory.mktemp("adapters") / "ours"
    train(bases["plain"], path, lora_targets=("q_proj,down_proj,embed_tokens",), train_also=("norm",))
    return path


@pytest.fixture
def theirs() -> Callable:
    """A function: a model directory, an adapter's or peft's configuration of one -> peft's model, around that of transformers."""
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")

    def load(base: Path, adapter: Path | peft.LoraConfig):
        model = transformers.LlamaForCausalLM.from_pretrained(base, dtype=torch.float32)
        if isinstance(adapter, peft.LoraConfig):
            return peft.get_peft_model(model, adapter).eval()
        return peft.PeftModel.from_pretrained(model, adapter, is_trainable=True).eval()

    return load


# ----------------------------------------------------------------------------------------------------------------------
# Interchange


OURS = {  # name -> (base, flags)
    "lora": ("plain", {}),
    "rslora": ("plain", {"rslora": True, "lora_alpha": 3.5}),
    "dora": ("plain", {"dora": True}),
    "dora, rslora, some modules": ("plain", {"dora": True, "rslora": True, "lora_targets": ("k_proj", "down_proj")}),
    "ranks and alphas": ("plain", {"lora_targets": ("attention,q_proj=2/7.5", "down_proj=8"), "lora_alpha": 3.0}),
    "embedding and head": ("plain", {"lora_targets": ("all,embed_tokens=3,lm_head",)}),
    "dora on the head": ("plain", {"dora": True, "lora_targets": ("lm_head,mlp",)}),
    "norms, embedding and head whole": ("plain", {"train_also": ("norm,embed", "head")}),
    "biased": ("biased", {}),
    "biased, dora": ("biased", {"dora": True}),
    "tied": ("tied", {}),
    "tied, embedding whole": ("tied", {"train_also": ("embed",)}),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", OURS)
def test_peft_reads_what_we_write(name, bases, theirs, tmp_path):
    """Running beside the weights, merged by us, and merged by peft: the same logits, which are not the base's; and the same gradients."""
    kind, flags = OURS[name]
    trained, adapter = begin(bases[kind], **flags)
    shake(trained)
    save_model(trained, tmp_path, adapter=adapter)
    model, ours, base = theirs(bases[kind], tmp_path), load_model(bases[kind], adapters=[tmp_path]), load_model(bases[kind])
    learned = logits(trained)
    same(logits(model), learned)
    same(logits(ours), learned)
    assert (logits(base) - learned).abs().max() > 0.05

    targets = TOKENS.roll(-1, 1)
    trained(TOKENS, targets).backward()
    F.cross_entropy(model(TOKENS).logits.view(-1, 48), targets.view(-1)).backward()
    expected = {key.replace(".modules_to_save", "").replace(".default", ""): parameter.grad for key, parameter in model.named_parameters()
                if parameter.requires_grad}  # fmt: skip
    expected = {key.replace("magnitude_vector.weight", "magnitude_vector"): grad for key, grad in expected.items()}
    found = {peft_key(name): parameter.grad for name, parameter in trained.named_parameters() if parameter.grad is not None}
    assert expected.keys() - {f"{PREFIX}lm_head.weight"} == found.keys() - {f"{PREFIX}lm_head.weight"}
    for key, grad in found.items():
        same(grad, expected[key])

    merged = dict(model.merge_and_unload().named_parameters())
    for parameter, tensor in ours.named_parameters():
        same(tensor.detach(), merged[parameter].detach())


THEIRS = {  # name -> (base, what LoraConfig takes)
    "list": ("plain", {"target_modules": ["q_proj", "v_proj"]}),
    "one name in full": ("plain", {"target_modules": ["model.layers.1.mlp.up_proj"]}),
    "expression": ("plain", {"target_modules": r".*\.(self_attn|mlp)\.(q|o|up)_proj"}),
    "all-linear": ("plain", {"target_modules": "all-linear"}),
    "excluded": ("plain", {"target_modules": "all-linear", "exclude_modules": ["k_proj", "model.layers.0.mlp.up_proj"]}),
    "excluded by an expression": ("plain", {"target_modules": ["q_proj", "k_proj"], "exclude_modules": r".*\.0\..*q_proj"}),
    "some layers": ("plain", {"target_modules": ["q_proj"], "layers_to_transform": [1]}),
    "layer 0": ("plain", {"target_modules": ["q_proj"], "layers_to_transform": 0, "layers_pattern": "layers"}),
    "patterns": ("plain", {"target_modules": "all-linear", "rank_pattern": {r"model.layers.\d+.self_attn.q_proj": 2, "(up|down)_proj": 7},
                           "alpha_pattern": {"^model.layers.1.mlp.up_proj": 5, "k_proj": 9}}),
    "rank beyond the matrix": ("plain", {"target_modules": ["k_proj"], "r": 40}),
    "rslora, dora": ("plain", {"target_modules": "all-linear", "use_rslora": True, "use_dora": True}),
    "biased, dora": ("biased", {"target_modules": "all-linear", "use_dora": True}),
    "embedding": ("plain", {"target_modules": ["embed_tokens", "q_proj"]}),
    "embedding and head": ("plain", {"target_modules": ["embed_tokens", "lm_head"], "init_lora_weights": "gaussian"}),
    "the last norm and its namesakes": ("plain", {"target_modules": ["q_proj"], "modules_to_save": ["norm"]}),
    "embedding and head whole": ("plain", {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]}),
    "a whole projection": ("biased", {"target_modules": ["q_proj"], "modules_to_save": ["k_proj"]}),
    "whole rather than adapted": ("plain", {"target_modules": ["q_proj", "lm_head"], "modules_to_save": ["lm_head"]}),
    "a part of a block whole": ("plain", {"target_modules": ["q_proj", "up_proj"], "modules_to_save": ["model.layers.1.mlp"]}),
    "tied, embedding whole": ("tied", {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}),
    "dropout": ("plain", {"target_modules": ["q_proj"], "lora_dropout": 0.5}),
}  # fmt: skip


def of_peft(theirs, base: Path, path: Path, **settings):
    import peft

    model = theirs(base, peft.LoraConfig(task_type="CAUSAL_LM", **{"r": 4, **settings}))
    shake(model)
    model.save_pretrained(path)
    return model


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", THEIRS)
def test_we_read_what_peft_writes(name, bases, theirs, tmp_path):
    """And what we read of it we would say in the same words."""
    kind, settings = THEIRS[name]
    model = of_peft(theirs, bases[kind], tmp_path, **settings)
    ours = load_model(bases[kind], adapters=[tmp_path])
    same(logits(ours), logits(model))
    assert (logits(load_model(bases[kind])) - logits(model)).abs().max() > 0.05
    config = AdapterConfig.from_json(tmp_path / CONFIG)
    (tmp_path / "again.json").write_text(json.dumps(config.to_dict(kind == "tied")))
    assert AdapterConfig.from_json(tmp_path / "again.json") == config


def live(model) -> dict[str, torch.Tensor]:
    return dict(model.state_dict())


def first_dora(model) -> dict[str, torch.Tensor]:
    """As PEFT 0.9 and 0.10 had it: lora_magnitude_vector was a parameter inside a module."""
    tensors = {key.replace(".default", ""): tensor for key, tensor in live(model).items() if "lora_" in key}
    return {f"{key}.weight" if key.endswith("magnitude_vector") else key: tensor for key, tensor in tensors.items()}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("file", ["adapter_model.bin", "adapter_model.safetensors"])
@pytest.mark.parametrize("tensors", [live, first_dora])
@pytest.mark.parametrize("settings", [{"use_dora": True, "target_modules": "all-linear"},
                                      {"target_modules": ["q_proj", "embed_tokens"], "modules_to_save": ["lm_head"]}])  # fmt: skip
def test_older_files_and_live_names(settings, tensors, file, base, theirs, tmp_path):
    """`.default.`, `.base_layer.` and `.original_module.` come from the state dict of a running model."""
    model = of_peft(theirs, base, tmp_path, **settings)
    (tmp_path / "adapter_model.safetensors").unlink()
    content = tensors(model)
    if "modules_to_save" in settings and tensors is first_dora:
        content[f"{PREFIX}lm_head.weight"] = live(model)[f"{PREFIX}lm_head.modules_to_save.default.weight"]
    (torch.save if file.endswith("bin") else save_file)({key: tensor.contiguous() for key, tensor in content.items()}, tmp_path / file)
    same(logits(load_model(base, adapters=[tmp_path])), logits(model))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_adapters_are_merged_in_float32(dtype, base, theirs, tmp_path):
    of_peft(theirs, base, tmp_path, target_modules="all-linear", use_dora=True)
    file = tmp_path / "adapter_model.safetensors"
    save_file({key: tensor.to(dtype) for key, tensor in load_file(file).items()}, file)
    found = load_model(base, adapters=[tmp_path])
    save_file({key: tensor.float() for key, tensor in load_file(file).items()}, file)
    assert torch.equal(logits(found), logits(load_model(base, adapters=[tmp_path])))


# ----------------------------------------------------------------------------------------------------------------------
# On a model that is to be trained


@pytest.mark.parametrize("flags", [{"rslora": True, "train_also": ("norm",)}, {"dora": True, "lora_targets": ("all,lm_head",)}])
@pytest.mark.parametrize("storage", STORAGES)
def test_the_first_forward_is_the_bases_own(storage, flags, bases):
    """To the last bit, in float32 and in bf16."""
    half, _ = begin(bases["biased"], storage, torch.bfloat16, **flags)
    assert {parameter.dtype for parameter in half.parameters() if not parameter.requires_grad} == {torch.bfloat16}
    assert {parameter.dtype for parameter in half.parameters() if parameter.requires_grad} == {torch.float32}
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(logits(half), logits(load_model(bases["biased"], dtype=torch.bfloat16, base_quant=storage)))
    model, _ = begin(bases["biased"], storage, **flags)
    base = load_model(bases["biased"], base_quant=storage)
    assert torch.equal(logits(model), logits(base))
    targets = TOKENS.roll(-1, 1)
    assert torch.equal(model(TOKENS, targets), base(TOKENS, targets))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model(TOKENS, targets), base(TOKENS, targets))


def test_an_embedding_adapter_begins_with_the_base_too(base):
    model, _ = begin(base, lora_targets=("embed_tokens,lm_head",))
    assert torch.equal(logits(model), logits(load_model(base)))


def test_only_what_is_asked_for_learns(base):
    model, adapter = begin(base, "nf4", lora_targets=("attention,embed_tokens",), train_also=("norm", "head"))
    learning = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    expected = {f"model.layers.{layer}.self_attn.{target}.adapters.0.lora_{half}.weight" for layer in (0, 1) for half in "AB"
                for target in ("q_proj", "k_proj", "v_proj", "o_proj")}  # fmt: skip
    expected |= {f"model.layers.{layer}.{norm}_layernorm.weight" for layer in (0, 1) for norm in ("input", "post_attention")}
    expected |= {f"model.embed_tokens.adapters.0.lora_embedding_{half}" for half in "AB"} | {"model.norm.weight", "lm_head.weight"}
    assert learning == expected == model.trained_shapes().keys()
    shake(model)
    model.train()(TOKENS, TOKENS.roll(-1, 1)).backward()
    assert {name for name, parameter in model.named_parameters() if parameter.grad is not None} == expected
    text = adapter.describe(model.config, "nf4")
    assert text == ("LoRA of rank 4, alpha 8, on embed_tokens, q_proj, k_proj, v_proj, o_proj, and input_layernorm, "
                    "post_attention_layernorm, norm, lm_head whole; the model is frozen, its projections in nf4")  # fmt: skip


def test_first_values_depend_on_seed_and_module_alone(base):
    model = begin(base)[0].state_dict()
    key = "model.layers.1.self_attn.{}_proj.adapters.0.lora_{}.weight"
    alone = begin(base, "int8", lora_targets=("v_proj", "q_proj"))[0].state_dict()
    assert torch.equal(model[key.format("q", "A")], alone[key.format("q", "A")])
    assert not torch.equal(model[key.format("q", "A")], model[key.format("k", "A")])
    assert not torch.equal(model[key.format("q", "A")], begin(base, seed=1)[0].state_dict()[key.format("q", "A")])
    A = torch.cat([tensor.flatten() for name, tensor in model.items() if "lora_A" in name and "down_proj" not in name])
    assert 0.99 / 32**0.5 < A.abs().max() < 1 / 32**0.5  # uniform in ±1/sqrt(in)
    assert A.std() == pytest.approx(1 / 32**0.5 / 3**0.5, rel=0.05)
    assert not model[key.format("q", "B")].any()


# r(in + out) of every projection: 4,194,304 is also PEFT's count for q and v at rank 8.
COUNTS = {("llama2-7b", 8, "q_proj,v_proj"): 4_194_304, ("llama2-7b", 64, "all"): 159_907_840, ("llama2-13b", 64, "all"): 250_347_520,
          ("llama-65b", 64, "all"): 799_539_200}  # fmt: skip


@pytest.mark.parametrize(("preset", "rank", "targets"), COUNTS)
def test_parameter_counts(preset, rank, targets):
    L = PRESETS[preset].num_hidden_layers
    config, factor = (PRESETS[preset], 1) if rank == 8 else (replace(PRESETS[preset], num_hidden_layers=1), L)  # larger ones take seconds
    with torch.device("meta"):
        model = Llama(config)
        attach(model, adapter_of(config, lora_rank=rank, lora_targets=(targets,)), "nf4-double")
    assert factor * sum(shape.numel() for shape in model.trained_shapes().values()) == COUNTS[preset, rank, targets]


@pytest.mark.parametrize("dora", [False, True])
def test_the_fused_loss_reaches_an_adapter_on_the_head(dora, base):
    model, _ = begin(base, lora_targets=("lm_head,q_proj",), dora=dora)
    shake(model)
    learning, targets = [parameter for parameter in model.parameters() if parameter.requires_grad], TOKENS.roll(-1, 1)
    targets[0, :3] = -100
    loss, plain = model(TOKENS, targets), F.cross_entropy(model(TOKENS).view(-1, 48), targets.view(-1))
    same(loss, plain)
    for one, other in zip(torch.autograd.grad(loss, learning), torch.autograd.grad(plain, learning), strict=True):
        same(one, other)


# ----------------------------------------------------------------------------------------------------------------------
# Several adapters, and packed bases


@pytest.fixture(scope="module")
def pair(bases, tmp_path_factory) -> list[Path]:
    """A LoRA, and a DoRA that was trained on another thing: in another order they make another model."""
    folder = tmp_path_factory.mktemp("pair")
    train(bases["plain"], folder / "one", train_also=("norm",))
    train(bases["plain"], folder / "two", dora=True, lora_targets=("attention,lm_head",), lora_alpha=2.0)
    return [folder / "one", folder / "two"]


@pytest.mark.filterwarnings("ignore")
def test_several_adapters_are_merged_in_order(base, pair, theirs):
    found = logits(load_model(base, adapters=pair))
    peft = pytest.importorskip("peft")
    model = peft.PeftModel.from_pretrained(theirs(base, pair[0]).merge_and_unload(), pair[1])
    same(found, logits(model))
    assert (found - logits(load_model(base, adapters=pair[::-1]))).abs().max() > 0.01


@pytest.mark.parametrize("storage", [name for name in STORAGES if name != "none"])
def test_beside_packed_weights_as_merged_into_rounded_ones(storage, base, pair, tmp_path):
    packed = load_model(base, adapters=pair, base_quant=storage)
    rounded = load_model(base)
    for name, layer in packed_layers(packed).items():
        rounded.get_parameter(name).data = layer.stored(torch.float32)
    save_model(rounded, tmp_path / "rounded")
    copies = [shutil.copytree(adapter, tmp_path / adapter.name, ignore=shutil.ignore_patterns(BASE)) for adapter in pair]
    same(logits(packed), logits(load_model(tmp_path / "rounded", adapters=copies)))


@pytest.mark.parametrize("storage", STORAGES)
def test_a_model_comes_back_as_it_was_trained(storage, base, tmp_path):
    learned = train(base, tmp_path, storage, train_also=("norm",), dora=True)
    same(logits(load_model(base, adapters=[tmp_path], base_quant=storage)), learned)


def test_a_small_change_is_not_rounded_away(base, tmp_path):
    """Weights in bf16 keep of what is merged into them only what is larger than some tenths of a per cent: adapters stay beside them."""
    save_model(load_model(base).bfloat16(), half := tmp_path / "half")
    train(half, tmp_path)
    content = load_file(file := tmp_path / "adapter_model.safetensors")
    save_file({key: tensor * 0.01 if "lora_B" in key else tensor for key, tensor in content.items()}, file)
    without, exact = (load_model(half, dtype=torch.float32, adapters=adapters) for adapters in ([], [tmp_path]))
    rounded = load_model(half, dtype=torch.float32, adapters=[tmp_path]).bfloat16().float()
    beside = load_model(half, adapters=[tmp_path])
    assert all(len(beside.get_submodule(name).adapters) == 1 for name, _ in beside.named_modules() if name.endswith("_proj"))
    effect = (logits(exact) - logits(without)).abs().mean()
    assert (logits(beside.float()) - logits(exact)).abs().mean() < 0.01 * effect < 0.1 * (logits(rounded) - logits(exact)).abs().mean()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_adapters_compute_in_the_dtype_of_the_model(dtype, base, pair):
    """As chat.py runs it: no autocast, half precision throughout."""
    model = load_model(base, dtype=dtype, adapters=pair, base_quant="int8")
    found, exact = logits(model), logits(load_model(base, adapters=pair, base_quant="int8"))
    assert found.dtype == dtype
    assert (found.float() - exact).abs().mean() < 0.05 * exact.abs().mean()
    assert model(TOKENS, TOKENS).isfinite()


@pytest.mark.filterwarnings("ignore")
def test_a_projection_trained_whole_is_packed_anew(base, pair, theirs, tmp_path):
    """It takes the place of the weight and of what the adapters before it added."""
    of_peft(theirs, base, tmp_path, target_modules=["q_proj"], modules_to_save=["k_proj"])
    model = load_model(base, adapters=[pair[0], tmp_path], base_quant="nf4")
    alone = load_model(base, adapters=[tmp_path], base_quant="nf4")
    for name, layer in packed_layers(model).items():
        is_k = name.endswith("k_proj.weight")
        assert len(layer.adapters) == (0 if is_k else 2 if "q_proj" in name else 1)
        assert not is_k or torch.equal(layer.dense(), packed_layers(alone)[name].dense())
        assert is_k != torch.equal(layer.stored(torch.float32), packed_layers(load_model(base, base_quant="nf4"))[name].dense())


def test_the_same_model_in_other_files_is_the_same_base(base, whole_dir, tmp_path):
    """Shards, bf16 and another place leave the fingerprint; other weights do not."""
    model = load_model(base)
    save_model(model, tmp_path / "bf16", dtype=torch.bfloat16, shard_bytes=3000)
    assert len(list((tmp_path / "bf16").glob("*.safetensors"))) > 2
    open_adapter(whole_dir, SMALL, tmp_path / "bf16")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] += 1
    save_model(model, tmp_path / "other")
    with pytest.raises(UserError, match=r"was trained on .* with the fingerprint [0-9a-f]{16}, and .*other has [0-9a-f]{16}: other weights "
                                        r"of the same shape\. To use it all the same, remove .*adapter_base.json$"):  # fmt: skip
        load_model(tmp_path / "other", adapters=[whole_dir])
    shutil.copytree(whole_dir, tmp_path / "adapter")
    (tmp_path / "adapter" / BASE).unlink()
    load_model(tmp_path / "other", adapters=[tmp_path / "adapter"])


# ----------------------------------------------------------------------------------------------------------------------
# Mistakes


def refusal(call: Callable[[], object]) -> str:
    with pytest.raises(UserError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


FLAGS = {  # what is asked for, of which model -> what is said
    ("plain", "lora_targets", ("q_proj,k_proj=17",)):
        "rank 17 on model.layers.0.self_attn.k_proj: its matrix is 16 x 32, so the rank can be 1 to 16",
    ("plain", "lora_rank", 33): "rank 33 on model.layers.0.self_attn.q_proj: its matrix is 32 x 32, so the rank can be 1 to 32",
    ("tied", "train_also", ("head",)): "--train-also head: embedding and head are one matrix in this model; --train-also embed trains it",
    ("tied", "lora_targets", ("all,lm_head",)):
        "--lora-targets: an adapter on lm_head would part embedding and head, which are one matrix in this model; --train-also embed",
    ("tied", "lora_targets", ("embed_tokens",)): "--lora-targets: an adapter on embed_tokens would part",
    ("plain", "lora_targets", ()): "--lora-targets: the model has no module of those, as none is named; there are q_proj",
}  # fmt: skip


@pytest.mark.parametrize(("kind", "flag", "value"), FLAGS)
def test_flags_that_no_model_can_follow(kind, flag, value):
    assert refusal(lambda: adapter_of(BASES[kind], **{flag: value})).startswith(FLAGS[kind, flag, value])


def test_flags_that_exclude_each_other():
    assert refusal(lambda: adapter_of(dora=True, lora_targets=("all,embed_tokens",))) == (
        "--lora-targets: DoRA is for matrices that multiply: take embed_tokens out of the targets, or train it whole with --train-also "
        "embed")
    assert refusal(lambda: adapter_of(lora_targets=("all,lm_head,embed_tokens",), train_also=("embed,head",))) == (
        "--lora-targets: lm_head, embed_tokens cannot have an adapter and, by --train-also, be trained whole; choose one")


@pytest.mark.parametrize(("flags", "problems"), [
    ({"lora_rank": 0}, ["--lora-rank must be at least 1, not 0"]),
    ({"lora_rank": -3, "lora_alpha": 0.0}, ["--lora-rank must be at least 1, not -3", "--lora-alpha must be above 0, not 0.0"]),
    ({"lora_rank": 4, "lora_alpha": float("nan")}, ["--lora-alpha must be above 0, not nan"]),
    ({"lora_rank": 4, "lora_dropout": 1.0}, ["--lora-dropout must be below 1, not 1.0"]),
    ({"lora_rank": 4, "lora_dropout": -0.1}, ["--lora-dropout must be at least 0, not -0.1"]),
    ({"lora_dropout": 0.1, "dora": True}, ["--lora-dropout, --dora need --lora-rank"]),
    ({"base_quant": "nf4"}, ["--base-quant needs --lora-rank"]),
    ({"lora_rank": 4, "base_quant": "nf4", "fsdp": True}, ["--base-quant nf4 works on one device, with DDP and with --deepspeed 1 or 2: "
                                                           "packed weights cannot be shared out"]),
    ({"lora_rank": 4, "lora_targets": ("q_porj", "k_proj=0,v_proj=x/2,o_proj=4/0"), "train_also": ("norms",)},
     ["--lora-targets: there is no module 'q_porj' (meant q_proj?); there are q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, "
      "down_proj, embed_tokens, lm_head, and all, attention, mlp for several",
      *(f"--lora-targets {word}: write NAME=RANK or NAME=RANK/ALPHA, both above 0" for word in ("k_proj=0", "v_proj=x/2", "o_proj=4/0")),
      "--train-also norms: there are norm, embed, head"]),
    ({"lora_rank": 4, "lora_targets": ("all", "q_proj=4/1e2")}, []), ({}, []),
])  # fmt: skip
def test_flags_that_mean_nothing(flags, problems):
    assert Flags(**flags).adapter_problems() == problems


def config(**changes) -> Callable[[Path], None]:
    """Change adapter_config.json; None takes a key out."""
    def change(path: Path) -> None:
        content = json.loads((path / CONFIG).read_text())
        content = {key: value for key, value in {**content, **changes}.items() if value is not None or key not in changes}
        (path / CONFIG).write_text(json.dumps(content))

    return change


def tensors(change: Callable[[dict], object]) -> Callable[[Path], None]:
    def change_file(path: Path) -> None:
        content = load_file(path / "adapter_model.safetensors")
        change(content)
        save_file(content, path / "adapter_model.safetensors")

    return change_file


def cut(path: Path) -> None:
    file = path / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def text(name: str, content: str) -> Callable[[Path], None]:
    return lambda path: (path / name).write_text(content)


SAYS = "{}/adapter_config.json"
OTHER = "{} is an adapter for another model: "
DAMAGE = {  # what happened to an adapter's directory -> what is said of it
    "no tensors": (
        lambda path: (path / "adapter_model.safetensors").unlink(),
        "{} has adapter_config.json and no adapter_model.safetensors: only half of an adapter; copy the other half there too"),
    "no config": (lambda path: (path / CONFIG).unlink(), "--adapter {} has no adapter_config.json: it is no adapter"),
    "a model": (lambda path: (path / CONFIG).rename(path / "config.json"), "--adapter {} has no adapter_config.json: it is no adapter,"),
    "nothing": (shutil.rmtree, "--adapter {} does not exist; an adapter directory holds adapter_config.json and adapter_model.safetensors"),
    "truncated": (cut, "{}/adapter_model.safetensors cannot be read ("),
    "empty file": (text("adapter_model.safetensors", ""), "{}/adapter_model.safetensors cannot be read ("),
    "no JSON": (text(CONFIG, "{'r': 4}"), SAYS + ":1: not valid JSON"),
    "another JSON": (text(CONFIG, "[1]"), SAYS + " describes no LoRA adapter: its peft_type is None"),
    "another method": (config(peft_type="IA3"), SAYS + " describes no LoRA adapter: its peft_type is IA3"),
    "no alpha": (config(lora_alpha=None), SAYS + " does not say lora_alpha; what the adapter computes depends on it"),
    "only the type": (text(CONFIG, '{"peft_type": "LORA"}'), SAYS + " does not say r, lora_alpha, target_modules;"),
    "rank 0": (config(r=0), SAYS + ": r is 0, not a whole number above 0"),
    "rank in letters": (config(r="4"), SAYS + ": r is '4', not a whole number above 0"),
    "alpha of a list": (config(lora_alpha=[8]), SAYS + ": lora_alpha is [8], not a number"),
    "targets of a dict": (
        config(target_modules={"q_proj": 1}),
        SAYS + ": target_modules is {'q_proj': 1}, not a list of names or a regular expression"),
    "half an expression": (config(target_modules="(q_proj"), SAYS + ": target_modules is '(q_proj', not a list of names or a regular"),
    "half a pattern": (
        config(rank_pattern={"(q_proj": 4}), SAYS + ": rank_pattern is {'(q_proj': 4}, not regular expressions and the rank of each"),
    "modules_to_save in one text": (config(modules_to_save="norm"), SAYS + ": modules_to_save is 'norm', not a list of names"),
    "foreign settings": (
        config(bias="lora_only", trainable_token_indices=[1]),
        SAYS + " asks for bias lora_only, trainable_token_indices [1], which is not done here; merge it with PEFT"),
    "other first weights": (
        config(init_lora_weights="pissa_niter_4"),
        SAYS + ": with init_lora_weights pissa_niter_4 the base's weights were changed before training; merge it with PEFT"),
    "another model's modules": (
        config(target_modules=["c_attn"]), SAYS + ": the model has no module c_attn; there are q_proj, k_proj"),
    "another rank": (
        config(r=8), OTHER + "model.embed_tokens.lora_embedding_A is (4, 48); on this one, at the rank in adapter_config.json, it is (8,"),
    "another width": (
        tensors(lambda content: content.update({Q_A: torch.ones(4, 64)})), OTHER + f"{Q}.lora_A.weight is (4, 64); on this one, at the"),
    "a vector": (tensors(lambda content: content.update({Q_A: torch.ones(4)})), OTHER + f"{Q}.lora_A.weight is (4,); on this one"),
    "more layers": (
        tensors(lambda content: content.update({Q_A.replace(".0.", ".2."): torch.ones(4, 32)})),
        OTHER + "this one has no model.layers.2.self_attn.q_proj.lora_A.weight"),
    "another norm": (
        tensors(lambda content: content.update({f"{PREFIX}model.norm.weight": torch.ones(64)})),
        OTHER + "model.norm.weight is (64,), and this one's is (32,)"),
    "a part missing": (
        tensors(lambda content: content.pop(Q_A)),
        f"{{}}/adapter_model.safetensors has no {Q}.lora_A.weight: it is incomplete, or for a model with fewer layers"),
    "a norm missing": (
        tensors(lambda content: content.pop(f"{PREFIX}model.norm.weight")), "{}/adapter_model.safetensors has no model.norm.weight: it is"),
    "magnitudes missing": (
        config(use_dora=True), SAYS + ": DoRA is for matrices that multiply: take embed_tokens out of the targets"),
    "too much": (
        config(target_modules=["q_proj", "embed_tokens"]),
        "{} has model.layers.0.mlp.down_proj.lora_A.weight, which its adapter_config.json does not ask for: one of the two files is"),
    "not gathered": (
        tensors(lambda content: content.update({Q_A: torch.empty(0)})),
        f"{{}}: {Q}.lora_A.weight is empty, as DeepSpeed's stage 3 leaves it when weights are not gathered to be saved"),
    "a larger vocabulary": (
        tensors(lambda content: content.update({f"{PREFIX}model.embed_tokens.base_layer.weight": torch.ones(64, 32)})),
        "{} was trained with a vocabulary of 64 tokens, and this model has 48: convert.py resize-vocab gives it the rows; use the adapter"),
    "whole numbers": (
        tensors(lambda content: content.update({Q_A: content[Q_A].to(torch.int8)})),
        f"{{}}/adapter_model.safetensors holds {Q_A} (int8); weights are read as fp32"),
    "a damaged base": (
        text(BASE, "[]"), "{}/adapter_base.json is damaged (list indices must be integers or slices, not str); without that file"),
    "a base without sizes": (
        text(BASE, '{"config": {}}'), "{}/adapter_base.json is damaged (vocab_size, hidden_size, intermediate_size, num_hidden_layers"),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGE)
def test_adapters_that_are_not_whole_or_not_this_models(name, whole_dir, base, tmp_path):
    damage, message = DAMAGE[name]
    path = tmp_path / "adapter"
    shutil.copytree(whole_dir, path)
    damage(path)
    said = refusal(lambda: open_adapter(path, SMALL, base))
    assert said.startswith(message.replace("{}", str(path)))


def test_an_adapter_whose_training_failed(whole_dir, base, tmp_path):
    shutil.copytree(whole_dir, tmp_path / "adapter")
    tensors(lambda content: content[Q_A].fill_(math.nan))(tmp_path / "adapter")
    for storage in ("none", "nf4"):
        said = refusal(lambda storage=storage: load_model(base, adapters=[tmp_path / "adapter"], base_quant=storage))
        assert said.startswith(f"{tmp_path / 'adapter'}: {Q}.lora_A.weight holds values that are not finite")


ANYTHING = (None, True, 0, -1, 1.5, math.nan, 10**400, "", "x", "(", [], [1], ["x"], [[]], {}, {"q_proj": 2}, {"(": 1}, {"x": {}},
            {"(?i)x": 2}, "a{99999999999}", "(" * 5000 + ")" * 5000)


@pytest.mark.parametrize("key", [*SETTINGS, *FOREIGN, "peft_type", "init_lora_weights", "ensure_weight_tying"])
def test_no_value_of_a_setting_ends_in_a_traceback(key, whole_dir, tmp_path):
    """It is refused, or means something."""
    content = json.loads((whole_dir / CONFIG).read_text())
    for value in ANYTHING:
        (tmp_path / CONFIG).write_text(json.dumps(content | {key: value}))
        try:
            config = AdapterConfig.from_json(tmp_path / CONFIG)
        except UserError as error:
            assert str(error).startswith(str(tmp_path / CONFIG)) and "\n" not in str(error)
        else:
            if key in SETTINGS:
                found = config.modules(SMALL)
                assert all(rank > 0 and math.isfinite(scale) for rank, scale in map(config.at, found))
                assert isinstance(config.describe(SMALL, "nf4"), str) and set(found).isdisjoint(config.whole(SMALL))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("modules", [["embed_tokens"], ["lm_head"], ["embed_tokens", "lm_head"]])
def test_peft_can_part_embedding_and_head_and_we_cannot(modules, bases, theirs, tmp_path):
    of_peft(theirs, bases["tied"], tmp_path, target_modules=["q_proj"], modules_to_save=modules)
    assert refusal(lambda: load_model(bases["tied"], adapters=[tmp_path])) == (
        f"{tmp_path} was trained with an embedding and a head that are not the same; in this model they are one matrix. PEFT trains them "
        "as one with ensure_weight_tying")


def test_each_in_the_others_place(base, whole_dir):
    """A model as --adapter, an adapter as --model."""
    assert refusal(lambda: load_model(base, adapters=[base])) == (
        f"--adapter {base} has no adapter_config.json: it is no adapter, but a model")
    both = f"--model {base} --adapter {whole_dir}"  # beside a packed base: --base-quant too
    for opens in (load_model, open_model_dir):
        assert refusal(lambda opens=opens: opens(whole_dir)) == (
            f"{whole_dir} is an adapter and no whole model: {both}; python convert.py merge {both} --out DIR makes them one")
