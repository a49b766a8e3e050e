"""Devices: CPU, CUDA, Apple's MPS, and which arithmetic each of them does well."""

from __future__ import annotations

from settings import UserError

import sys

import torch

# Dense tensor-core TFLOP/s in bf16 / fp16 with fp32 accumulation, from the vendors' data sheets.
PEAK_TFLOPS = {
    "h200": 989, "h100 pcie": 756, "h100": 989, "a100": 312, "l40s": 362, "l4": 121, "a10": 125, "v100": 125, "t4": 65,
    "rtx 5090": 209.5, "rtx 4090": 165.2, "rtx 4080": 97.5, "rtx 3090": 71, "rtx 3080": 59.5,
}  # fmt: skip
DTYPE_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


def pick_device(wanted: str = "auto") -> str:
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if wanted == "auto":
        return next(kind for kind in ("cuda", "mps", "cpu") if available[kind])
    if not available.get(wanted):
        raise UserError(f"--device {wanted}: torch {torch.__version__} finds no such device here")
    return wanted


def pick_dtype(wanted: str, device: str) -> torch.dtype:
    """bf16 where the hardware has it, else fp16 with a loss scaler on GPUs, else fp32."""
    if wanted != "auto":
        return {name: dtype for dtype, name in DTYPE_NAMES.items()}[wanted]
    if device == "cuda":
        return torch.bfloat16 if torch.cuda.get_device_capability() >= (8, 0) else torch.float16
    has_bf16 = device == "cpu" and any(
        getattr(torch.cpu, test, bool)() for test in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))  # fmt: skip
    return torch.bfloat16 if has_bf16 else torch.float32


def peak_rss() -> int:
    """The most memory this process ever held, in bytes."""
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
