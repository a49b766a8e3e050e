"""layers.py: what adapters add, what packed layers round, keep and pass on, and what all of them weigh in models of known size."""

from __future__ import annotations

from settings import UserError

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import nf4
from layers import (
    STORAGES,
    Embedding,
    EmbeddingLoRA,
    Int8Linear,
    Linear,
    LoRA,
    PackedLinear,
    merged,
    pack,
    packed_layers,
    row_lengths,
)
from model import PRESETS, Llama

PACKED = [name for name in STORAGES if name != "none"]
IN, OUT = 96, 70  # 6,720 weights are 105 blocks of 64


def layer_of(storage: str, bias: bool = False, weight: torch.Tensor | None = None) -> Linear:
    torch.manual_seed(0)
    layer = STORAGES[storage](IN, OUT, bias).requires_grad_(False)
    weight = torch.randn(OUT, IN) if weight is None else weight
    layer.store(weight, "w") if isinstance(layer, PackedLinear) else layer.weight.copy_(weight)
    if bias:
        layer.bias.normal_()
    return layer


def hang(layer: Linear, *, dora: bool = False, fresh: bool = False, rank: int = 4, dropout: float = 0.0) -> LoRA:
    lora = LoRA(IN, OUT, rank, scale=0.5, dropout=dropout, dora=dora)
    with torch.no_grad():
        lora.lora_B.weight.zero_() if fresh else lora.lora_B.weight.normal_()
        if dora:
            lora.lora_magnitude_vector.copy_(row_lengths(layer.dense()) * (1 if fresh else torch.rand(OUT) + 0.5))
    layer.adapters.append(lora)
    return lora


# ----------------------------------------------------------------------------------------------------------------------
# Adapters


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("storage", STORAGES)
def test_a_fresh_adapter_changes_no_bit(storage, dora, bias, dtype):
    """Alone, and behind one that has learned."""
    layer, x = layer_of(storage, bias), torch.randn(3, 5, IN)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype is not None):
        plain = F.linear(x, layer.weight, layer.bias) if storage == "none" else layer(x)
        hang(layer, dora=dora, fresh=True)
        assert plain.dtype == (dtype or torch.float32)
        assert torch.equal(layer(x), plain)
        layer.adapters.insert(0, hang(layer_of(storage), dora=True))
        learned = layer(x)
        assert not torch.equal(learned, plain)
        if not dora:  # DoRA begins where the rows are as long as it was told
            del layer.adapters[1:]
            assert torch.equal(layer(x), learned)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("kinds", [(False,), (True,), (False, True), (True, True, False)])
def test_a_layer_is_its_merged_weight(storage, kinds, bias):
    """Also several adapters, one after the other. The gradients of the input agree with it."""
    layer, x, direction = layer_of(storage, bias), torch.randn(3, 5, IN, requires_grad=True), torch.randn(3, 5, OUT)
    for dora in kinds:
        hang(layer, dora=dora)
    y, dense = layer(x), F.linear(x, layer.dense(), layer.bias)
    torch.testing.assert_close(y, dense, rtol=1e-5, atol=3e-5)
    torch.testing.assert_close(*(torch.autograd.grad(out, x, direction)[0] for out in (y, dense)), rtol=0, atol=1e-4)


def test_merged_is_the_formula_whatever_the_dtype():
    W, A, B, m = torch.randn(5, 7), torch.randn(2, 7), torch.randn(5, 2), torch.rand(5)
    sum_ = W + 0.3 * B @ A
    torch.testing.assert_close(merged(W, A, B, 0.3), sum_)
    torch.testing.assert_close(merged(W, A, B, 0.3, m), torch.diag(m / sum_.square().sum(1).sqrt()) @ sum_)
    half = [tensor.to(torch.bfloat16) for tensor in (W, A, B)]
    with torch.autocast("cpu", torch.bfloat16):  # computed in float32 all the same
        found = merged(*half, 0.3)
    assert found.dtype == torch.float32
    assert torch.equal(found, merged(*(tensor.float() for tensor in half), 0.3))


def test_no_gradient_goes_through_the_length_of_rows():
    """DoRA §4.3: for the gradient the rows' lengths are constants."""
    layer, x = layer_of("none"), torch.randn(8, IN)
    lora = hang(layer, dora=True)
    layer(x).sum().backward()
    A, B = lora.lora_A.weight.detach().requires_grad_(), lora.lora_B.weight.detach().requires_grad_()
    m, lengths = lora.lora_magnitude_vector.detach().requires_grad_(), row_lengths(layer.weight + 0.5 * (B @ A))
    F.linear(x, (m / lengths)[:, None] * (layer.weight + 0.5 * B @ A)).sum().backward()
    for ours, theirs in ((lora.lora_A.weight, A), (lora.lora_B.weight, B), (lora.lora_magnitude_vector, m)):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-4)


def test_dropout_is_for_the_adapter_and_for_training():
    layer, x = layer_of("none"), torch.ones(2000, IN)
    hang(layer, dropout=0.5)
    plain, whole = F.linear(x, layer.weight), layer.eval()(x)
    dropped = layer.train()(x)
    assert not torch.equal(dropped[0], dropped[1])  # each row another part
    torch.testing.assert_close((dropped - plain).mean(0), (whole - plain)[0], rtol=0, atol=1.0)
    assert (dropped - whole).abs().max() > 5  # and it is not small by itself
    torch.testing.assert_close(layer.eval()(x), F.linear(x, layer.dense()), rtol=0, atol=1e-4)


def test_embedding_adapter_is_its_merged_table():
    torch.manual_seed(0)
    table, tokens = Embedding(30, 16), torch.randint(30, (2, 9))
    plain = F.embedding(tokens, table.weight)
    assert torch.equal(table(tokens), plain)
    table.adapters.append(EmbeddingLoRA(30, 16, 4, 0.5))
    nn.init.normal_(table.adapters[0].lora_embedding_B)
    assert torch.equal(table(tokens), plain)  # A is 0
    nn.init.normal_(table.adapters[0].lora_embedding_A)
    A, B = table.adapters[0].lora_embedding_A, table.adapters[0].lora_embedding_B
    torch.testing.assert_close(table(tokens), F.embedding(tokens, merged(table.weight.T, A, B, 0.5).T))


# ----------------------------------------------------------------------------------------------------------------------
# Packed layers


def rounded(storage: str, weight: torch.Tensor) -> torch.Tensor:
    if storage == "int8":
        scales = weight.abs().amax(1, keepdim=True) / 127
        return (weight / scales).round() * scales
    return nf4.dequantise(nf4.quantise(weight, storage == "nf4-double"), torch.float32)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("storage", PACKED)
def test_a_packed_layer_computes_with_the_rounded_weight(storage, bias):
    """And so does its gradient; the base has none, and is no parameter."""
    weight = torch.randn(OUT, IN)
    layer, x, direction = layer_of(storage, bias, weight), torch.randn(3, 5, IN, requires_grad=True), torch.randn(3, 5, OUT)
    dense = nn.Linear(IN, OUT, bias)
    dense.load_state_dict({"weight": rounded(storage, weight)} | ({"bias": layer.bias} if bias else {}))
    torch.testing.assert_close(layer(x), dense(x), rtol=0, atol=2e-5)
    torch.testing.assert_close(*(torch.autograd.grad(of(x), x, direction)[0] for of in (layer, dense)), rtol=0, atol=2e-5)
    assert [name for name, _ in layer.named_parameters()] == ["bias"] * bias
    lora = hang(layer)
    layer(x).sum().backward()
    assert lora.lora_A.weight.grad.abs().sum() > 0 and lora.lora_B.weight.grad.abs().sum() > 0
    assert not bias or layer.bias.grad is None


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("storage", PACKED)
def test_nothing_of_the_weight_is_kept_for_backward(storage, dora):
    """Without an adapter nothing at all; an adapter keeps what it is made of, its input and what it has between A and B."""
    layer, x, kept = layer_of(storage), torch.randn(4, 8, IN, requires_grad=True), []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.numel()) or tensor, lambda tensor: tensor):
        layer(x)
        assert not kept
        hang(layer, rank=4, dora=dora)
        kept.clear()
        layer(x).sum().backward()
    assert OUT * IN not in kept
    if not dora:
        assert sorted(kept) == sorted([4 * 8 * IN, 4 * IN, 4 * 8 * 4, 4 * OUT])


@pytest.mark.parametrize("cast", ["bfloat16", "half", "double"])
@pytest.mark.parametrize("storage", PACKED)
def test_casting_a_model_leaves_codes_and_scales(storage, cast):
    layer = layer_of(storage)
    before = {name: buffer.clone() for name, buffer in layer.named_buffers()}
    weight = layer.dense()
    getattr(layer, cast)()
    assert all(torch.equal(buffer, before[name]) and buffer.dtype == before[name].dtype for name, buffer in layer.named_buffers())
    assert torch.equal(layer.dense(), weight)
    x = torch.randn(2, IN, dtype=getattr(torch, cast))
    assert layer(x).dtype == x.dtype


@pytest.mark.parametrize("storage", PACKED)
def test_under_autocast_products_are_in_bf16(storage):
    layer, x = layer_of(storage), torch.randn(4, IN, requires_grad=True)
    exact, gradient = layer(x), torch.autograd.grad(layer(x).sum(), x)[0]
    hang(layer, fresh=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    found = torch.autograd.grad(y.float().sum(), x)[0]
    assert found.dtype == torch.float32
    torch.testing.assert_close(y.float(), exact, rtol=0.02, atol=0.3)  # sums of 96 products of about 1
    torch.testing.assert_close(found, gradient, rtol=0.02, atol=0.3)


@pytest.mark.parametrize("storage", PACKED)
def test_made_on_the_meta_device_filled_later(storage):
    with torch.device("meta"):
        layer = STORAGES[storage](IN, OUT)
        hang_on = LoRA(IN, OUT, 4, 1.0)
    assert all(buffer.is_meta for buffer in layer.buffers()) and hang_on.lora_A.weight.is_meta
    weight = torch.randn(OUT, IN, dtype=torch.bfloat16)
    layer.to_empty(device="cpu").store(weight, "w")
    assert torch.equal(layer.dense(), layer_of(storage, weight=weight).dense())
    parts = {name: getattr(layer, name) for name in layer.layout()}
    other = STORAGES[storage](IN, OUT)
    other.load_state_dict(layer.state_dict())  # codes travel as any buffer
    assert torch.equal(other.dense(), layer.dense()) and parts.keys() == dict(other.named_buffers()).keys()


def test_int8_is_half_a_step_off_at_most():
    weight = torch.randn(OUT, IN) * torch.logspace(-30, 5, OUT)[:, None]
    weight[3] = 0
    weight[4] = torch.linspace(-1, 1, IN) * 2.6e-43  # of numbers so small few can be told apart, and no quotient is exact
    layer = layer_of("int8", weight=weight)
    step = weight.abs().amax(1, keepdim=True) / 127
    assert layer.codes.abs().amax() == 127 and layer.codes.min() >= -127
    rows = [row for row in range(OUT) if row != 4]
    assert ((layer.dense() - weight).abs() <= step * 0.5001)[rows].all()
    assert (layer.dense()[4] - weight[4]).abs().max() < 1e-43
    assert torch.equal(layer.dense()[3], weight[3])


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("storage", PACKED)
def test_weights_that_are_not_finite_are_named(storage, bad):
    weight = torch.randn(OUT, IN)
    weight[7, 9] = bad
    with pytest.raises(UserError, match=r"^model.x.weight: weight holds values that are not finite$"):
        STORAGES[storage](IN, OUT).store(weight, "model.x.weight")


# ----------------------------------------------------------------------------------------------------------------------
# Whole models


# Preset, storage -> bytes of the packed projections: 4 bits a weight, 32 bits for 64 of them, or 8 and 32 more for 256 of these.
FOOTPRINTS = {("llama2-7b", "nf4-double"): 3.34, ("llama2-13b", "nf4-double"): 6.55, ("llama-65b", "nf4-double"): 33.41,
              ("llama2-7b", "nf4"): 3.64, ("llama2-13b", "nf4"): 7.14, ("llama-65b", "nf4"): 36.43,
              ("llama2-7b", "int8"): 6.48}  # fmt: skip
OUTSIDE = {"llama2-7b": 0.52, "llama2-13b": 0.66, "llama-65b": 1.05}  # embedding and head in bf16


@pytest.mark.parametrize(("preset", "storage"), FOOTPRINTS)
def test_footprints_of_qlora(preset, storage):
    """Everything but embedding, head and norms is packed; gigabytes of 10^9."""
    config, L = dataclasses.replace(PRESETS[preset], num_hidden_layers=1), PRESETS[preset].num_hidden_layers
    with torch.device("meta"):
        model = pack(Llama(config), storage)
    layers = packed_layers(model)
    assert len(layers) == 7 and layers.keys() < model.parameter_shapes().keys()
    bytes_ = L * sum(buffer.nbytes for layer in layers.values() for buffer in layer.buffers())
    assert bytes_ / 1e9 == pytest.approx(FOOTPRINTS[preset, storage], abs=0.0051)
    rest = {name: p.numel() for name, p in model.named_parameters() if "norm" not in name}
    assert list(rest) == ["model.embed_tokens.weight", "lm_head.weight"]
    assert 2 * sum(rest.values()) / 1e9 == pytest.approx(OUTSIDE[preset], abs=0.0051)
    if storage != "int8":
        weights = L * sum(layer.in_features * layer.out_features for layer in layers.values())
        assert 8 * bytes_ / weights == pytest.approx(nf4.bits_per_parameter(storage == "nf4-double"), abs=1e-5)


def test_packing_keeps_the_model_and_its_names():
    config = PRESETS["tiny"]
    torch.manual_seed(1)
    model = Llama(config)
    packed = pack(Llama(config, init=False), "int8")
    assert pack(model, "none") is model and not packed_layers(model)
    for name, tensor in model.state_dict().items():
        packed_layers(packed)[name].store(tensor, name) if name in packed_layers(packed) else packed.get_parameter(name).data.copy_(tensor)
    assert packed.parameter_shapes() == model.parameter_shapes() and type(packed.lm_head) is nn.Linear
    assert all(type(layer) is Int8Linear for layer in packed_layers(packed).values())
    tokens = torch.randint(config.vocab_size, (2, 16))
    torch.testing.assert_close(packed(tokens), model(tokens), rtol=0, atol=0.05)
    cached = list(packed.generate([[1, 2, 3]], 6, temperature=0)), list(packed.generate([[1, 2, 3]], 6, temperature=0, use_cache=False))
    assert cached[0] == cached[1]
