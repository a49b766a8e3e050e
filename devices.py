"""Devices: the one place that knows how a CPU, an NVIDIA GPU, Apple's GPU and an Ascend NPU are called and what each can do.

    kind = pick_device("auto")            "cpu", "cuda", "mps" or "npu"
    device = set_device(kind, local_rank) this process's own torch.device
    dtype = pick_dtype("auto", kind)      bf16 where the hardware has it

What differs between kinds lies behind the functions here; no other file says torch.cuda, torch.mps or torch.npu. The package
torch_npu is imported only when `--device npu` asks for it.
"""

from __future__ import annotations

from settings import UserError

import importlib
import importlib.util
import os
import re
import sys

import torch
from torch import Tensor

KINDS = ("cpu", "cuda", "mps", "npu")
# Dense tensor-core TFLOP/s in bf16 / fp16 with fp32 accumulation, from the vendors' data sheets. Ascend NPUs are not here: we know
# none that lists them under the names that torch_npu reports.
PEAK_TFLOPS = {
    "h200": 989, "h100 pcie": 756, "h100": 989, "a100": 312, "l40s": 362, "l4": 121, "a10": 125, "v100": 125, "t4": 65,
    "rtx 5090": 209.5, "rtx 4090": 165.2, "rtx 4080": 97.5, "rtx 3090": 71, "rtx 3080": 59.5,
}  # fmt: skip
DTYPE_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
# What is used where. CPU and CUDA: tried. torch_npu's users report both as unsupported; on MPS neither was tried.
FEATURES = {"fused_adamw": ("cpu", "cuda"), "compile": ("cpu", "cuda")}
OUT_OF_MEMORY = re.compile(r"out of memory|can't allocate memory|not enough memory|CUBLAS_STATUS_ALLOC_FAILED")


# ----------------------------------------------------------------------------------------------------------------------
# Which device


def pick_device(wanted: str = "auto") -> str:
    """The kind of device to compute on. auto: the first of cuda, npu, mps that is there, else cpu; npu only where torch has
    loaded torch_npu by itself, as it does since 2.5. Raises UserError for a kind that is not there."""
    if wanted == "npu":
        _import_torch_npu()
    available = {kind: _is_available(kind) for kind in KINDS}
    if wanted == "auto":
        return next(kind for kind in ("cuda", "npu", "mps", "cpu") if available[kind])
    if not available[wanted]:
        advice = "; `npu-smi info` and ASCEND_RT_VISIBLE_DEVICES tell which are visible" if wanted == "npu" else ""
        raise UserError(f"--device {wanted}: torch {torch.__version__} finds no such device here{advice}")
    return wanted


def _is_available(kind: str) -> bool:
    return kind == "cpu" or (hasattr(torch, kind) and accelerator(kind).is_available())


def _import_torch_npu() -> None:
    if importlib.util.find_spec("torch_npu") is None:
        version = torch.__version__.partition("+")[0]
        raise UserError(f"--device npu needs Huawei's torch_npu of torch's own version and CANN: pip install torch-npu=={version}, "
                        "install CANN, `source …/set_env.sh` (docs/ascend.md)")  # fmt: skip
    try:
        importlib.import_module("torch_npu")
    except ImportError as error:  # its libraries link against CANN's
        reason = str(error).strip().partition("\n")[0]
        raise UserError(f"--device npu: torch_npu is installed but does not load ({reason}); install CANN and "
                        "`source …/set_env.sh` before this command (docs/ascend.md)") from None  # fmt: skip


def accelerator(kind: str):
    """The module that drives devices of this kind, torch.cuda, torch.mps or torch.npu; None for cpu."""
    return None if kind == "cpu" else getattr(torch, kind)


def device_count(kind: str) -> int:
    return 1 if kind == "cpu" else accelerator(kind).device_count()


def set_device(kind: str, index: int) -> torch.device:
    """Make the index-th device of this machine the one that this process uses. Any number of processes share a CPU; of
    other devices each needs its own, else UserError."""
    if kind == "cpu":
        return torch.device("cpu")
    if index >= (count := device_count(kind)):
        raise UserError(f"process {index} has no {'NPU' if kind == 'npu' else 'GPU'} of its own: this machine has {count}; "
                        f"start torchrun with --nproc_per_node={count}")  # fmt: skip
    if kind == "mps":  # there is never more than one
        return torch.device("mps")
    accelerator(kind).set_device(index)
    return torch.device(kind, index)


def backend(kind: str) -> str:
    """The library behind torch.distributed for this kind."""
    return {"cuda": "nccl", "npu": "hccl"}.get(kind, "gloo")


def device_name(device: torch.device) -> str:
    return accelerator(device.type).get_device_name(device) if device.type in ("cuda", "npu") else device.type


# ----------------------------------------------------------------------------------------------------------------------
# What it can do


def pick_dtype(wanted: str, kind: str) -> torch.dtype:
    """The arithmetic of the matrix products. auto: bf16 where the hardware has it, else fp16 with a loss scaler on GPUs and
    NPUs, else fp32; Apple's GPU too computes in fp32 unless asked. Raises UserError for what the device cannot do."""
    if wanted == "auto":
        fast = _cpu_has_fast_bf16() if kind == "cpu" else kind != "mps" and _has_bf16(kind)
        return torch.bfloat16 if fast else torch.float16 if kind in ("cuda", "npu") else torch.float32
    if wanted == "bf16" and not _has_bf16(kind):
        where = "Apple's GPU before macOS 14" if kind == "mps" else device_name(torch.device(kind))
        raise UserError(f"--dtype bf16: {where} has no bf16 arithmetic; use --dtype fp16")
    return next(dtype for dtype, name in DTYPE_NAMES.items() if name == wanted)


def _has_bf16(kind: str) -> bool:
    if kind == "cuda":  # older ones only imitate it, slowly
        return torch.cuda.get_device_capability() >= (8, 0)
    if kind == "npu":  # the 910A has none
        return torch.bfloat16 in accelerator(kind).get_amp_supported_dtype()
    return kind == "cpu" or torch.backends.mps.is_macos_or_newer(14, 0)


def _cpu_has_fast_bf16() -> bool:
    """Any CPU computes bf16; these instructions make it faster than fp32."""
    return any(getattr(torch.cpu, test, bool)() for test in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))


def supports(kind: str, feature: str) -> bool:
    """Whether a feature of torch, "fused_adamw" or "compile", is used on this kind of device."""
    return kind in FEATURES[feature]


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """FLOP/s of one device in this dtype, where the data sheet is known; for MFU."""
    if device.type != "cuda" or dtype == torch.float32:
        return None
    name = device_name(device).lower()
    return next((tflops * 1e12 for key, tflops in PEAK_TFLOPS.items() if re.search(rf"\b{key}\b", name)), None)


# ----------------------------------------------------------------------------------------------------------------------
# Time, memory, random numbers


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was told."""
    if device.type != "cpu":
        accelerator(device.type).synchronize()


def peak_memory(device: torch.device) -> int:
    """Bytes: the most that was allocated on the device since the start or reset_peak_memory. On a CPU the most the process
    ever held; on Apple's GPU, which keeps no peak, what the driver holds now."""
    if device.type == "mps":
        return torch.mps.driver_allocated_memory()
    return peak_rss() if device.type == "cpu" else accelerator(device.type).max_memory_allocated(device)


def reset_peak_memory(device: torch.device) -> None:
    if device.type in ("cuda", "npu"):
        accelerator(device.type).reset_peak_memory_stats(device)


def allocated_memory(device: torch.device) -> int:
    """Bytes of live tensors on the device; on a CPU, which does not count them, the most the process ever held."""
    if device.type == "mps":
        return torch.mps.current_allocated_memory()
    return peak_rss() if device.type == "cpu" else accelerator(device.type).memory_allocated(device)


def total_memory(device: torch.device) -> int | None:
    """Bytes that the device has, or on Apple's GPU may use; None where the system does not tell."""
    if device.type == "mps":
        return torch.mps.recommended_max_memory()
    if device.type != "cpu":
        return accelerator(device.type).get_device_properties(device).total_memory
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # Windows has no sysconf
        return None


def peak_rss() -> int:
    """The most memory this process ever held, in bytes."""
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def is_out_of_memory(error: BaseException) -> bool:
    """Whether this is a lack of memory: on a GPU, in the CPU allocator (a plain RuntimeError), or in an NPU of any age."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        isinstance(error, RuntimeError) and OUT_OF_MEMORY.search(str(error)) is not None)  # fmt: skip


def random_state(device: torch.device) -> dict[str, Tensor]:
    """The states of the generators that decide dropout, by kind: the CPU's, and the device's own."""
    own = {} if device.type == "cpu" else {device.type: accelerator(device.type).get_rng_state()}
    return {"cpu": torch.get_rng_state(), **own}


def set_random_state(device: torch.device, states: dict[str, Tensor]) -> None:
    """Put random_state() back, as far as it was saved on a device of this kind."""
    torch.set_rng_state(states["cpu"])
    if device.type != "cpu" and device.type in states:
        accelerator(device.type).set_rng_state(states[device.type])
