"""nf4.py: the codes, scales and files of bitsandbytes, matrices of any size, and what four bits cost."""

from __future__ import annotations

from settings import UserError

import json
import statistics

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import nf4

SHAPES = [(96, 512), (3, 65), (2, 10), (1, 1)]  # the last block full, and not; an odd number of weights
STATE = "w.quant_state.bitsandbytes__nf4"
DAMAGE = {  # what a file may hold -> part of the message
    "no codes": (lambda part, state: part.pop("w"), "w is missing"),
    "no state": (lambda part, state: part.pop(STATE), f"{STATE} is missing"),
    "no absmax": (lambda part, state: part.pop("w.absmax"), "w.absmax is missing"),
    "no nested absmax": (lambda part, state: part.pop("w.nested_absmax"), "w.nested_absmax is missing"),
    "another type": (lambda part, state: part.update({STATE.replace("nf4", "fp4"): part.pop(STATE)}), "w is quantised to fp4"),
    "another block": (lambda part, state: state.update(blocksize=128), "w is quantised with a blocksize of 128; only 64"),
    "another nested block": (lambda part, state: state.update(nested_blocksize=64), "nested_blocksize of 64; only 256"),
    "no shape": (lambda part, state: state.update(shape=None), f"{STATE} is damaged"),
    "no JSON": (lambda part, state: part.update({STATE: torch.zeros(3, dtype=torch.uint8)}), f"{STATE} is damaged"),
    "another table": (lambda part, state: part["w.quant_map"].mul_(0.9), "w.quant_map is not the table of nf4"),
    "another nested table": (lambda part, state: part.update({"w.nested_quant_map": torch.zeros(16)}), "w.nested_quant_map is not"),
    "too few codes": (lambda part, state: part.update(w=part["w"][:-1]), r"w is \(24575,\) .* should be \(24576,\) torch.uint8"),
    "scales of another type": (lambda part, state: part.update({"w.absmax": part["w.absmax"].half()}), "w.absmax is .* torch.float16"),
}  # fmt: skip


def weights(shape: tuple[int, int], kind: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    weight = torch.randn(shape, generator=generator) * 0.02
    if kind == "uniform":
        weight = torch.rand(shape, generator=generator) * 2 - 1
    if kind == "tiny":
        weight *= 1e-30
    if kind == "half-way" and weight.numel() > 64:  # 0.292… of the largest: below the middle of two levels, or above as a quotient
        weight.view(-1)[:64] = 0
        weight.view(-1)[:2] = torch.tensor([0.060505274683237076, 0.01766837388277054])
    if kind == "zero blocks":
        weight.view(-1)[:128] = 0
    return weight.to({"bfloat16": torch.bfloat16, "float16": torch.float16}.get(kind, torch.float32))


@pytest.fixture
def bnb():
    functional = pytest.importorskip("bitsandbytes").functional
    with torch.compiler.set_stance("force_eager"):  # it compiles what it does with matrices of odd width, for seconds
        yield functional


# ----------------------------------------------------------------------------------------------------------------------
# The tables


def test_the_levels_are_quantiles_of_the_normal_distribution():
    """Built as bitsandbytes' create_normal_map builds them."""
    offset, quantile = (1 - 1 / 30 + 1 - 1 / 32) / 2, statistics.NormalDist().inv_cdf
    above, below = ([quantile(offset + (0.5 - offset) * i / steps) for i in range(steps)] for steps in (8, 7))
    levels = torch.tensor(sorted([*above, 0.0, *(-level for level in below)])) / max(above)
    torch.testing.assert_close(nf4.CODEBOOK, levels, rtol=0, atol=2e-7)


def test_tables_are_those_of_bitsandbytes(bnb):
    assert torch.equal(nf4.CODEBOOK, bnb.get_4bit_type("nf4", device="cpu"))
    assert torch.equal(nf4.DYNAMIC, bnb.create_dynamic_map())


# ----------------------------------------------------------------------------------------------------------------------
# Codes and values


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", ["normal", "uniform", "tiny", "half-way", "zero blocks", "bfloat16", "float16"])
def test_codes_and_values_of_bitsandbytes(shape, kind, bnb):
    weight = weights(shape, kind)
    theirs, state = bnb.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    ours = nf4.quantise(weight, double=False)
    assert torch.equal(ours.codes, theirs.view(-1))
    torch.testing.assert_close(ours.scales, state.absmax, rtol=0, atol=2e-38)  # its last block of zeros has a scale of 1e-38
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        state.dtype = dtype
        torch.testing.assert_close(nf4.dequantise(ours, dtype), bnb.dequantize_4bit(theirs, state), rtol=1e-6, atol=2e-38)


@pytest.mark.parametrize("kind", ["normal", "uniform", "bfloat16"])
def test_double_quantisation_of_bitsandbytes(kind, bnb):
    weight = weights((1000, 1024), kind)  # 15,625 scales: 61 blocks and a part of one
    theirs, state = bnb.quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=True)
    ours = nf4.quantise(weight, double=True)
    assert torch.equal(ours.codes, theirs.view(-1))
    assert torch.equal(ours.nested_scales, state.state2.absmax) and torch.equal(ours.offset, state.offset)
    # Its CPU kernel takes the neighbour now and then where a scale lies almost half-way between two levels; ours is the nearest.
    exact = nf4.quantise(weight, double=False).scales - ours.offset
    nested = ours.nested_scales.repeat_interleave(256)[: len(exact)]
    our_error, their_error = ((nf4.DYNAMIC[codes.int()] * nested - exact).abs() for codes in (ours.scales, state.absmax))
    assert (our_error <= their_error + 1e-9).all()
    assert (ours.scales == state.absmax).float().mean() > 0.995
    same = nf4.Packed(ours.codes, state.absmax, ours.shape, ours.nested_scales, ours.offset)
    state.dtype = torch.float32
    torch.testing.assert_close(nf4.dequantise(same, torch.float32), bnb.dequantize_4bit(theirs, state), rtol=0, atol=1e-6)


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_slices_change_nothing(shape, double, monkeypatch):
    weight = weights(shape, "normal")
    whole = nf4.quantise(weight, double)
    values = nf4.dequantise(whole, torch.float32)
    monkeypatch.setattr(nf4, "_slice", lambda device: 128)
    sliced = nf4.quantise(weight, double)
    assert sliced.shape == whole.shape and sliced.tensors().keys() == whole.tensors().keys()
    assert all(torch.equal(tensor, sliced.tensors()[name]) for name, tensor in whole.tensors().items())
    assert torch.equal(nf4.dequantise(sliced, torch.float32), values)


def test_every_code_goes_to_its_level():
    """0x01, 0x23, …: the first weight in the high half of the byte."""
    codes = torch.tensor([2 * i << 4 | 2 * i + 1 for i in range(8)] * 4, dtype=torch.uint8)
    packed = nf4.Packed(codes, torch.tensor([3.0]), torch.Size([4, 16]))
    assert torch.equal(nf4.dequantise(packed, torch.float32), 3 * nf4.CODEBOOK.expand(4, 16))
    assert torch.equal(nf4.quantise(3 * nf4.CODEBOOK.expand(4, 16), double=False).codes, codes)


@pytest.mark.parametrize("double", [False, True])
def test_zeros_stay_zeros(double):
    packed = nf4.quantise(torch.zeros(8, 64), double)
    assert torch.equal(nf4.dequantise(packed, torch.bfloat16), torch.zeros(8, 64, dtype=torch.bfloat16))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_is_refused(value):
    weight = torch.zeros(3, 100)
    weight[2, 99] = value
    with pytest.raises(UserError, match=r"^weight holds values that are not finite$"):
        nf4.quantise(weight, double=True)


def test_quantising_again_changes_nothing():
    packed = nf4.quantise(weights((96, 512), "normal"), double=False)
    again = nf4.quantise(nf4.dequantise(packed, torch.float32), double=False)
    assert torch.equal(again.codes, packed.codes) and torch.equal(again.scales, packed.scales)


# ----------------------------------------------------------------------------------------------------------------------
# What it costs


def test_bits_are_counted_from_the_bytes():
    for double, bits in [(False, 4.5), (True, 4.127)]:
        packed = nf4.quantise(weights((4096, 1024), "bfloat16"), double)
        stored = 8 * sum(tensor.nbytes for name, tensor in packed.tensors().items() if name != "offset") / (4096 * 1024)
        assert stored == nf4.bits_per_parameter(double) == pytest.approx(bits, abs=5e-4)


class Largest(TorchDispatchMode):
    """.bytes: of the largest tensor that was made, views aside."""

    bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and function._schema.returns[0].alias_info is None:
            self.bytes = max(self.bytes, result.nbytes)
        return result


def test_a_slice_at_a_time_is_in_memory(monkeypatch):
    monkeypatch.setattr(nf4, "_slice", lambda device: 512)
    weight = weights((96, 512), "bfloat16")
    with Largest() as made:
        packed = nf4.quantise(weight, double=True)
    assert made.bytes == packed.codes.nbytes == weight.numel() / 2
    with Largest() as made:
        nf4.dequantise_into(weight, packed)
    assert made.bytes == packed.scales.numel() * 4 < weight.nbytes / 10


def test_error_is_smaller_than_that_of_even_steps():
    weight = weights((96, 512), "normal")
    error = (nf4.dequantise(nf4.quantise(weight, double=True), torch.float32) - weight).square().mean()
    step = weight.view(-1, 64).abs().amax(1, keepdim=True) / 7
    even = ((weight.view(-1, 64) / step).round() * step).view_as(weight)
    assert error < 0.85 * (even - weight).square().mean()


# ----------------------------------------------------------------------------------------------------------------------
# In a layer


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_are_known_beforehand(shape, double):
    expected = nf4.packed_shapes(torch.Size(shape), double)
    packed = nf4.quantise(weights(shape, "normal"), double)
    assert {name: (tensor.shape, tensor.dtype) for name, tensor in packed.tensors().items()} == expected
    empty = {name: torch.empty(size, dtype=dtype, device="meta") for name, (size, dtype) in expected.items()}
    values = nf4.dequantise(nf4.Packed(shape=torch.Size(shape), **empty), torch.bfloat16)
    assert (values.shape, values.dtype, values.device.type) == (torch.Size(shape), torch.bfloat16, "meta")


def test_one_buffer_serves_all_matrices():
    buffer = torch.full((96 * 512,), 7.0)
    for shape in SHAPES:
        packed = nf4.quantise(weights(shape, "normal"), double=True)
        out = buffer[: packed.shape.numel()].view(shape)
        assert nf4.dequantise_into(out, packed) is out
        assert torch.equal(out, nf4.dequantise(packed, torch.float32))


def test_gradient_of_a_layer_that_keeps_the_codes_only():
    class Product(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, packed):
            ctx.packed = packed
            return x @ nf4.dequantise(packed, x.dtype).T

        @staticmethod
        def backward(ctx, gradient):
            return gradient @ nf4.dequantise(ctx.packed, gradient.dtype), None

    weight = torch.nn.Parameter(weights((96, 512), "normal"))
    packed = nf4.quantise(weight, double=True)
    with torch.inference_mode():  # tables made here must serve training as well
        nf4._tables.cache_clear()
        matrix = nf4.dequantise(packed, torch.float32)
    assert not packed.codes.requires_grad and not matrix.requires_grad
    x = torch.randn(5, 512, requires_grad=True)
    Product.apply(x, packed).square().sum().backward()
    with torch.no_grad():
        expected = 2 * x @ matrix.T @ matrix
    torch.testing.assert_close(x.grad, expected)


# ----------------------------------------------------------------------------------------------------------------------
# Checkpoints of bitsandbytes


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("shape", [(96, 512), (3, 65)])
def test_bitsandbytes_reads_ours(shape, double, bnb):
    packed = nf4.quantise(weights(shape, "normal"), double)
    parts = nf4.to_bitsandbytes("a.weight", packed, torch.float32)
    codes = parts.pop("a.weight")
    state = bnb.QuantState.from_dict({name.removeprefix("a.weight."): part for name, part in parts.items()}, device="cpu")
    assert (state.shape, state.dtype, state.nested) == (packed.shape, torch.float32, double)
    torch.testing.assert_close(bnb.dequantize_4bit(codes, state), nf4.dequantise(packed, torch.float32), rtol=0, atol=1e-6)


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16])
@pytest.mark.parametrize("double", [False, True])
def test_ours_reads_a_layer_of_bitsandbytes(double, storage, bnb):
    from bitsandbytes.nn import Linear4bit

    layer = Linear4bit(512, 96, bias=True, compress_statistics=double, quant_type="nf4", quant_storage=storage).to("cpu")
    parts = layer.state_dict()
    packed = nf4.from_bitsandbytes("weight", parts)
    expected = bnb.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    torch.testing.assert_close(nf4.dequantise(packed, expected.dtype), expected, rtol=0, atol=1e-6)
    if storage == torch.uint8:
        ours = nf4.to_bitsandbytes("weight", packed, torch.float32)
        assert ours.keys() == parts.keys() - {"bias"}
        assert all(torch.equal(part, parts[name]) for name, part in ours.items() if "quant_state" not in name)
        ours, theirs = (json.loads(bytes(some["weight.quant_state.bitsandbytes__nf4"].tolist())) for some in (ours, parts))
        assert ours == theirs


def test_round_trip():
    packed, other = (nf4.quantise(weights((96, columns), "normal"), double=True) for columns in (512, 64))
    parts = nf4.to_bitsandbytes("w", packed, torch.bfloat16) | nf4.to_bitsandbytes("w2", other, torch.bfloat16)
    assert len({part.data_ptr() for part in parts.values()}) == len(parts) == 12  # safetensors refuses tensors that share memory
    read = nf4.from_bitsandbytes("w", parts | {"w.bias": torch.zeros(1)})
    assert read.shape == packed.shape and all(torch.equal(part, read.tensors()[name]) for name, part in packed.tensors().items())


@pytest.mark.parametrize("case", DAMAGE)
def test_what_cannot_be_read_is_named(case):
    change, message = DAMAGE[case]
    parts = nf4.to_bitsandbytes("w", nf4.quantise(weights((96, 512), "normal"), double=True), torch.bfloat16)
    state = json.loads(bytes(parts[STATE].tolist()))
    change(parts, state)
    if STATE in parts and len(parts[STATE]) > 3:
        parts[STATE] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    with pytest.raises(UserError, match=message):
        nf4.from_bitsandbytes("w", parts)
