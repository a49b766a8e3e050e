"""A stand-in for Huawei's torch_npu, on machines without an NPU: PyTorch's hook for devices from outside.

    env = stand_in(tmp_path)                    environment of a subprocess in which `import torch_npu` finds the stand-in
    calls(tmp_path) -> [["set_device", [1]], …] what that subprocess asked of torch.npu, in order
    env = stand_in(tmp_path, kernels=build_kernels(tmp_path))      with tensors too (npu_at_hand.cpp: half a minute of g++)

Without kernels there are no tensors on `npu`: device selection, process group, memory and random numbers can be tested,
arithmetic cannot. Tests run in subprocesses, because a process can name its outside device only once.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import types
from pathlib import Path

GIB = 2**30


def stand_in(directory: Path, *, count: int = 2, bf16: bool = True, kernels: Path | None = None) -> dict[str, str]:
    """Write torch_npu.py into a directory; the environment with it on the path: `count` NPUs, with or without bf16."""
    (directory / "torch_npu.py").write_text("import npu_at_hand\nnpu_at_hand.register()\n")
    tests = Path(__file__).parent
    return {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (directory, tests, tests.parent))), "OMP_NUM_THREADS": "1",
            "NPU_COUNT": str(count), "NPU_BF16": str(int(bf16)), "NPU_CALLS": str(directory / "calls.jsonl"),
            "NPU_KERNELS": str(kernels or "")}  # fmt: skip


def calls(directory: Path) -> list:
    path = directory / "calls.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def build_kernels(directory: Path) -> Path:
    """Compile npu_at_hand.cpp, which gives the device the host's memory and the CPU's kernels."""
    import torch
    from torch.utils.cpp_extension import include_paths

    library, lib = directory / "npu_at_hand.so", Path(torch.__file__).parent / "lib"
    subprocess.run(["g++", "-O0", "-w", "-shared", "-fPIC", "-std=c++20", *(f"-I{path}" for path in include_paths()),
                    Path(__file__).with_suffix(".cpp"), "-o", library, f"-L{lib}", "-ltorch_cpu", "-lc10"],
                   check=True, timeout=600)  # fmt: skip
    return library


def register() -> None:
    """What `import torch_npu` does: give the outside device its name and its module torch.npu, and bring hccl."""
    import torch
    import torch.distributed as dist

    torch.utils.rename_privateuse1_backend("npu")
    npu = npu_module(torch)
    torch._register_device_module("npu", npu)
    if os.environ["NPU_KERNELS"]:
        torch.ops.load_library(os.environ["NPU_KERNELS"])

    def hccl(store, rank, size, timeout):  # gloo under its name
        return dist.ProcessGroupGloo(store, rank, size, timeout=timeout)

    dist.Backend.register_backend("hccl", hccl, devices=["npu", "cpu"])


def npu_module(torch) -> types.ModuleType:
    """torch.npu: functions that note their call in the file NPU_CALLS and answer like Ascend 910Bs of 64 GB."""
    npu, count = types.ModuleType("torch.npu"), int(os.environ["NPU_COUNT"])
    state = {"device": 0, "random": torch.arange(16, dtype=torch.uint8)}
    dtypes = [torch.float16, torch.float32] + [torch.bfloat16] * int(os.environ["NPU_BF16"])
    properties = types.SimpleNamespace(name="Ascend910B3", total_memory=64 * GIB)

    def set_device(index):
        state.update(device=index)
        if os.environ["NPU_KERNELS"]:
            torch.accelerator.set_device_index(index)

    answers = {
        "is_available": lambda: count > 0, "device_count": lambda: count, "current_device": lambda: state["device"],
        "set_device": set_device, "synchronize": lambda device=None: None,
        "get_device_name": lambda device=None: properties.name, "get_device_properties": lambda device=None: properties,
        "memory_allocated": lambda device=None: 1 * GIB, "max_memory_allocated": lambda device=None: 3 * GIB,
        "reset_peak_memory_stats": lambda device=None: None, "get_amp_supported_dtype": lambda: dtypes,
        "manual_seed_all": lambda seed: None, "_is_in_bad_fork": lambda: False,
        "get_rng_state": lambda device=None: state["random"], "set_rng_state": lambda new, device=None: state.update(random=new),
    }  # fmt: skip

    def noting(name, answer):
        def call(*values):
            with open(os.environ["NPU_CALLS"], "a") as file:
                plain = [value if isinstance(value, int) else str(value) for value in values]
                file.write(json.dumps([name, plain]) + "\n")
            return answer(*values)

        return call

    for name, answer in answers.items():
        setattr(npu, name, noting(name, answer))
    for name in ("Stream", "Event", "stream", "current_stream", "is_initialized"):  # fully_shard asks for these
        setattr(npu, name, getattr(torch.cpu, name))
    sys.modules["torch.npu"] = npu
    return npu
