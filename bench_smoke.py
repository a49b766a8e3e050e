"""Does everything that training needs compute the right numbers on this device? One line per check, within a minute.

    python bench.py smoke --device npu

Each check compares with the same computation on the CPU, in float64 or float32. One that fails does not keep the others
from running: on a device that nobody has tried yet, the list of what fails is the result.
"""

from __future__ import annotations

from settings import UserError, flag

import dataclasses
import tempfile
import textwrap
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

import devices
from checkpoint import load_model, save_model
from devices import DTYPE_NAMES, KINDS
from model import PRESETS, Llama, RMSNorm, apply_rope, linear_cross_entropy

TINY = dataclasses.replace(PRESETS["tiny"], vocab_size=512, hidden_size=128, intermediate_size=256, num_hidden_layers=2,
                           num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128)  # fmt: skip
# The largest error allowed, as a part of the largest value: several times what rounding makes of these sums, and far below
# what a wrong mask, scale or head makes.
LIMITS = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 4e-2}
STEPS = 20


@dataclass(frozen=True, kw_only=True)
class SmokeConfig:
    device: str = flag("auto", "what to test", choices=("auto", *KINDS))
    dtype: str = flag("auto", "arithmetic to test beside fp32", choices=("auto", *DTYPE_NAMES.values()))


@dataclass(frozen=True)
class Place:
    """Where the checks compute: a device, and the dtypes to try there (fp32 and the one that training would use)."""

    device: torch.device
    dtypes: tuple[torch.dtype, ...]


CPU = Place(torch.device("cpu"), ())


class Skipped(Exception):
    """A check that has no meaning on this device."""


def smoke(config: SmokeConfig) -> dict[str, str]:
    """Run all checks; returns {check: "ok", "failed" or "skipped"}. If one failed, exits with status 1 after the verdict."""
    kind, start, results = devices.pick_device(config.device), time.perf_counter(), {}
    device, dtype = devices.set_device(kind, 0), devices.pick_dtype(config.dtype, kind)
    place = Place(device, tuple(dict.fromkeys((torch.float32, dtype))))
    devices.reset_peak_memory(device)
    for name, check in CHECKS.items():
        torch.manual_seed(0)
        try:
            results[name], measured = "ok", check(place)
        except Skipped as reason:
            results[name], measured = "skipped", str(reason)
        except Exception as error:  # whatever an untried device raises belongs into this table
            results[name], measured = "failed", f"{type(error).__name__}: {str(error).strip()}"
        first_line = textwrap.shorten(measured.partition("\n")[0], 160, placeholder=" …")
        print(f"{name:<{max(map(len, CHECKS))}}  {results[name]:<7}  {first_line}", flush=True)
    counts = [f"{count} {word}" for word in ("ok", "failed", "skipped") if (count := [*results.values()].count(word))]
    print(f"{', '.join(counts)} on {kind} in {time.perf_counter() - start:.0f} s, torch {torch.__version__}")
    if "failed" in results.values():
        raise SystemExit(1)
    return results


# ----------------------------------------------------------------------------------------------------------------------
# Comparing


def compare(place: Place, ours: Callable, reference: Callable, *inputs: Tensor) -> str:
    """`ours` on the device in each dtype against `reference` on the CPU in float64, from the same rounded inputs: the output
    and the gradient of each input."""
    errors = {}
    for dtype in place.dtypes:
        rounded = [x.to(dtype) for x in inputs]
        found = forward_backward(ours, [x.to(place.device) for x in rounded])
        errors[dtype] = largest_error(found, forward_backward(reference, [x.double() for x in rounded]))
    return judged(errors)


def forward_backward(function: Callable, inputs: list[Tensor]) -> list[Tensor]:
    """The output of a function, and the gradients that its inputs get from a weighted sum of it."""
    inputs = [x.detach().requires_grad_() for x in inputs]
    output = function(*inputs)
    weights = (torch.arange(output.numel()) % 7 - 2) / 4  # exact in bf16 too
    output.backward(weights.view(output.shape).to(output))
    return [output, *(x.grad for x in inputs)]


def largest_error(found: list[Tensor], wanted: list[Tensor]) -> float:
    """max |found - wanted| / max |wanted|, of the worst tensor; nan if there is a nan."""
    pairs = [(a.detach().cpu().double(), b.detach().double()) for a, b in zip(found, wanted, strict=True)]
    return torch.stack([(a - b).abs().max() / b.abs().max() for a, b in pairs]).max().item()


def judged(errors: dict[torch.dtype, float]) -> str:
    """The errors in words. Raises ArithmeticError if one is above its limit, or nan."""
    text = "error " + ", ".join(f"{DTYPE_NAMES[dtype]} {error:.1e}" for dtype, error in errors.items())
    if not all(error <= LIMITS[dtype] for dtype, error in errors.items()):
        raise ArithmeticError(text + "; at most " + ", ".join(f"{DTYPE_NAMES[dtype]} {LIMITS[dtype]:.0e}" for dtype in errors))
    return text


# ----------------------------------------------------------------------------------------------------------------------
# The checks: kernels


def possible_dtypes(place: Place) -> dict[str, torch.dtype]:
    found = {}
    for name in DTYPE_NAMES.values():
        try:
            found[name] = devices.pick_dtype(name, place.device.type)
        except UserError:
            continue
    return found


def device(place: Place) -> str:
    torch.ones(1, device=place.device)
    devices.synchronize(place.device)
    total = devices.total_memory(place.device)
    memory = f"{total / 2**30:.0f} GiB" if total else "memory unknown"
    return f"{devices.device_name(place.device)}, {memory}, can do {' '.join(possible_dtypes(place))}"


def matmul(place: Place) -> str:
    everything = Place(place.device, tuple(possible_dtypes(place).values()))
    return compare(everything, torch.matmul, torch.matmul, torch.randn(64, 512), torch.randn(512, 96))


def attention(place: Place, *, masked: bool = False, shared: bool = False) -> str:
    """As model.py calls it: causal or with a mask of documents, and with one key/value head for every query head or two."""
    T = 64
    q, k, v = torch.randn(2, 4, T, 32), *torch.randn(2, 2, 2 if shared else 4, T, 32)
    seen = torch.ones(T, T, dtype=torch.bool).tril()
    if masked:
        seen[T // 3 :, : T // 3] = False

    def ours(q, k, v):
        mask = seen.to(q.device) if masked else None
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=not masked, enable_gqa=shared)

    def reference(q, k, v):
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
        return (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(~seen, -torch.inf).softmax(-1) @ v

    return compare(place, ours, reference, q, k, v)


def rms_norm(place: Place) -> str:
    def ours(x, weight):
        return torch.func.functional_call(RMSNorm(256, 1e-5), {"weight": weight}, x)

    def reference(x, weight):
        return x * (x.pow(2).mean(-1, keepdim=True) + 1e-5).rsqrt() * weight

    return compare(place, ours, reference, torch.randn(8, 64, 256), 1 + torch.randn(256) / 4)


def rope(place: Place) -> str:
    angles = torch.arange(128)[:, None] * 10000.0 ** -(torch.arange(16) / 16)

    def ours(x):
        return apply_rope(x, angles.to(x.device).cos(), angles.to(x.device).sin())

    def reference(x):  # a pair is a complex number, its rotation a product
        turned = torch.complex(*x.chunk(2, dim=-1)) * torch.polar(torch.ones_like(angles.double()), angles.double())
        return torch.cat((turned.real, turned.imag), dim=-1)

    return compare(place, ours, reference, torch.randn(2, 4, 128, 32))


def loss(place: Place) -> str:
    targets = torch.randint(0, 1000, (256,))
    targets[::5] = -100
    return compare(place, lambda hidden, weight: linear_cross_entropy(hidden, weight, targets.to(hidden.device)),
                   lambda hidden, weight: F.cross_entropy(F.linear(hidden, weight), targets),
                   torch.randn(256, 128), torch.randn(1000, 128) / 8)  # fmt: skip


# ----------------------------------------------------------------------------------------------------------------------
# The checks: a whole model


def tiny(place: Place) -> Llama:
    """The same small model at every call."""
    torch.manual_seed(0)
    llama = Llama(TINY).to(place.device)
    llama.tie_weights()  # on devices from outside torch, such as NPUs, .to() makes two tensors of a shared one
    return llama


def batch(place: Place) -> tuple[Tensor, Tensor]:
    tokens = torch.randint(0, TINY.vocab_size, (4, 65), generator=torch.Generator().manual_seed(1)).to(place.device)
    return tokens[:, :-1], tokens[:, 1:]


def gradients(llama: Llama, place: Place, dtype: torch.dtype) -> list[Tensor]:
    """The loss of one batch, and the gradients, 1024-fold so that fp16 holds the small ones."""
    llama.zero_grad()
    with torch.autocast(place.device.type, dtype, enabled=dtype != torch.float32):
        value = llama(*batch(place))
    (1024 * value).backward()
    return [value, *(parameter.grad for parameter in llama.parameters())]


def model(place: Place) -> str:
    wanted = gradients(tiny(CPU), CPU, torch.float32)
    llama = tiny(place)
    return judged({dtype: largest_error(gradients(llama, place, dtype), wanted) for dtype in place.dtypes})


def training(place: Place) -> str:
    """AdamW on one batch, as a stage does it: autocast, and a loss scaler for fp16."""
    kind, seen = place.device.type, {}
    for dtype in place.dtypes:
        llama, losses = tiny(place), []
        optimizer = torch.optim.AdamW(llama.parameters(), lr=3e-3, fused=devices.supports(kind, "fused_adamw"))
        scaler = torch.amp.GradScaler(kind, enabled=dtype == torch.float16)
        for _ in range(STEPS):
            with torch.autocast(kind, dtype, enabled=dtype != torch.float32):
                value = llama(*batch(place))
            optimizer.zero_grad()
            scaler.scale(value).backward()
            scaler.step(optimizer)
            scaler.update()
            losses.append(value.item())
        seen[DTYPE_NAMES[dtype]] = losses[0], losses[-1]
    text = f"loss in {STEPS} steps " + ", ".join(f"{name} {first:.2f} to {last:.2f}" for name, (first, last) in seen.items())
    if not all(last < 0.8 * first for first, last in seen.values()):
        raise ArithmeticError(f"{text}: it should fall by a fifth at least")
    return text


def repeated_step(place: Place) -> str:
    """Some kernels add in any order: no failure, but a resumed run then equals an undisturbed one only roughly."""
    llama = tiny(place)
    first, second = ([x.clone() for x in gradients(llama, place, place.dtypes[-1])] for _ in range(2))
    return "the same bits: " + ("yes" if all(map(torch.equal, first, second)) else "no")


def save_and_load(place: Place) -> str:
    llama = tiny(place)
    with tempfile.TemporaryDirectory() as directory:
        save_model(llama, directory)
        loaded = load_model(directory, place.device).state_dict()
    different = [name for name, tensor in llama.state_dict().items() if not torch.equal(tensor, loaded[name])]
    if different:
        raise ArithmeticError(f"changed on the way: {', '.join(different)}")
    return f"{llama.num_parameters():,} parameters, bit by bit"


def random_numbers(place: Place) -> str:
    states, masks = devices.random_state(place.device), []
    for _ in range(2):
        devices.set_random_state(place.device, states)
        masks.append(F.dropout(torch.ones(10_000, device=place.device), 0.25).cpu())
    dropped, same = (masks[0] == 0).float().mean().item(), torch.equal(*masks)
    if not (same and 0.2 < dropped < 0.3):
        raise ArithmeticError(f"dropout of 0.25 drops {dropped:.3f}, and a saved state {'repeats' if same else 'does not repeat'} it")
    return f"dropout of 0.25 drops {dropped:.3f}, and again the same from a saved state"


def generation(place: Place) -> str:
    llama = tiny(place)
    cached, uncached = (list(llama.generate([[1, 2, 3, 4, 5], [7]], 24, temperature=0, use_cache=use)) for use in (True, False))
    if cached != uncached:
        raise ArithmeticError("greedy generation writes other tokens with the cache than without")
    return "24 greedy tokens, the same with and without the cache"


def process_group(place: Place) -> str:
    name = devices.backend(place.device.type)
    if place.device.type == "mps" or dist.is_initialized():
        raise Skipped("one device, no group" if place.device.type == "mps" else "a group is at work already")
    dist.init_process_group(name, store=dist.HashStore(), rank=0, world_size=1)
    try:
        tensor = torch.arange(4.0, device=place.device)
        dist.all_reduce(tensor)
    finally:
        dist.destroy_process_group()
    if tensor.tolist() != [0, 1, 2, 3]:
        raise ArithmeticError(f"{name}, one process: the sum of 0, 1, 2, 3 and nothing is {tensor.tolist()}")
    return f"{name}, one process"


def memory(place: Place) -> str:
    return f"peak {devices.peak_memory(place.device) / 2**20:,.0f} MiB"


CHECKS = {
    "device": device, "matrix product": matmul, "attention, causal": attention,
    "attention, masked": partial(attention, masked=True), "attention, shared heads": partial(attention, shared=True),
    "attention, both": partial(attention, masked=True, shared=True), "RMSNorm": rms_norm, "RoPE": rope, "loss": loss,
    "model": model, "training": training, "repeated step": repeated_step, "save and load": save_and_load,
    "random numbers": random_numbers, "generation": generation, "process group": process_group, "memory": memory,
}  # fmt: skip
