"""devices.py: which device, which arithmetic, and every call that an NPU would get (a stand-in takes them: npu_at_hand.py)."""

from __future__ import annotations

from settings import UserError

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from npu_at_hand import GIB, build_kernels, calls, stand_in
from processes_at_hand import ended, finished

import devices
from devices import pick_device, pick_dtype

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")


def run(script: str, environment: dict, *words) -> subprocess.CompletedProcess:
    """A Python program in a process of its own."""
    return subprocess.run([sys.executable, *words, "-c", script], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)


# ----------------------------------------------------------------------------------------------------------------------
# CPU, CUDA, MPS


def test_devices_and_dtypes(monkeypatch):
    assert pick_device("cpu") == "cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=r"--device cuda: torch .* finds no such device"):
        pick_device("cuda")
    for capability, dtype in (((9, 0), torch.bfloat16), ((8, 0), torch.bfloat16), ((7, 0), torch.float16)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda capability=capability: capability)
        assert pick_dtype("auto", "cuda") == dtype
    assert pick_dtype("auto", "mps") == torch.float32 and pick_dtype("fp16", "cpu") == torch.float16
    for has, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        for test in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
            monkeypatch.setattr(torch.cpu, test, lambda has=has: has, raising=False)
        assert pick_dtype("auto", "cpu") == dtype


def test_auto_takes_the_first_that_is_there(monkeypatch):
    there = {"mps"}
    for kind in ("cuda", "mps"):
        monkeypatch.setattr(getattr(torch, kind), "is_available", lambda kind=kind: kind in there)
    assert pick_device() == "mps"
    there.add("cuda")
    assert pick_device() == "cuda" and pick_device("mps") == "mps"
    there.clear()
    assert pick_device() == "cpu"


def test_bf16_is_refused_where_the_hardware_has_none(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    with pytest.raises(UserError, match="--dtype bf16: Tesla T4 has no bf16 arithmetic; use --dtype fp16"):
        pick_dtype("bf16", "cuda")
    assert pick_dtype("fp16", "cuda") == torch.float16
    monkeypatch.setattr(torch.backends.mps, "is_macos_or_newer", lambda major, minor: (major, minor) <= (13, 6))
    with pytest.raises(UserError, match="before macOS 14 has no bf16"):
        pick_dtype("bf16", "mps")
    monkeypatch.setattr(torch.backends.mps, "is_macos_or_newer", lambda major, minor: (major, minor) <= (14, 0))
    assert pick_dtype("bf16", "mps") == torch.bfloat16
    assert pick_dtype("bf16", "cpu") == torch.bfloat16  # slow on most, right on all


def test_a_cpu_answers_everything():
    assert devices.accelerator("cpu") is None and devices.backend("cpu") == "gloo" and devices.device_count("cpu") == 1
    assert devices.set_device("cpu", 7) == CPU and devices.device_name(CPU) == "cpu"
    assert devices.total_memory(CPU) > devices.peak_memory(CPU) >= 10**7 and devices.allocated_memory(CPU) >= 10**7
    assert devices.peak_flops(CPU, torch.bfloat16) is None
    devices.synchronize(CPU)
    devices.reset_peak_memory(CPU)


def test_random_numbers_repeat_from_a_saved_state():
    state = devices.random_state(CPU)
    first = torch.rand(5)
    devices.set_random_state(CPU, state)
    assert torch.equal(first, torch.rand(5)) and set(state) == {"cpu"}


@pytest.mark.parametrize("kind, backend, fused", [("cpu", "gloo", True), ("cuda", "nccl", True), ("mps", "gloo", False),
                                                  ("npu", "hccl", False)])  # fmt: skip
def test_what_differs_between_kinds(kind, backend, fused):
    assert devices.backend(kind) == backend
    assert devices.supports(kind, "fused_adamw") == devices.supports(kind, "compile") == fused


@pytest.mark.parametrize("kind, called", [("cuda", "GPU"), ("mps", "GPU")])
def test_more_processes_than_devices(monkeypatch, kind, called):
    chosen = []
    monkeypatch.setattr(getattr(torch, kind), "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    assert devices.set_device(kind, 0).type == kind and chosen == [0] * (kind == "cuda")
    with pytest.raises(UserError, match=f"process 1 has no {called} of its own: this machine has 1; .*--nproc_per_node=1"):
        devices.set_device(kind, 1)


@pytest.mark.parametrize("kind", ["cuda", "mps"])
def test_memory_and_random_numbers_are_the_devices_own(monkeypatch, kind):
    noted, device, module = [], torch.device(kind, 0), getattr(torch, kind)
    answers = {"max_memory_allocated": 3, "memory_allocated": 2, "driver_allocated_memory": 3, "current_allocated_memory": 2,
               "recommended_max_memory": 9, "get_device_properties": SimpleNamespace(total_memory=9), "synchronize": None,
               "reset_peak_memory_stats": None, "set_rng_state": None, "get_rng_state": torch.arange(3)}  # fmt: skip
    for name, answer in answers.items():
        def call(*values, name=name, answer=answer):
            noted.append(name)
            return answer

        monkeypatch.setattr(module, name, call, raising=False)
    assert (devices.peak_memory(device), devices.allocated_memory(device), devices.total_memory(device)) == (3, 2, 9)
    devices.synchronize(device)
    state = devices.random_state(device)
    devices.set_random_state(device, state)
    assert set(state) == {"cpu", kind} and noted[-3:] == ["synchronize", "get_rng_state", "set_rng_state"]
    devices.reset_peak_memory(device)
    assert (noted[-1] == "reset_peak_memory_stats") == (kind == "cuda")
    devices.set_random_state(device, {"cpu": state["cpu"]})  # saved on a machine without this kind of device
    assert noted.count("set_rng_state") == 1


@pytest.mark.parametrize("name, tflops", [("NVIDIA H200", 989), ("NVIDIA H100 PCIe", 756), ("NVIDIA H100 80GB HBM3", 989),
                                          ("NVIDIA L40S", 362), ("NVIDIA L4", 121), ("NVIDIA GeForce RTX 4090", 165.2),
                                          ("NVIDIA GeForce GTX 1080", None)])  # fmt: skip
def test_peak_flops_come_from_the_data_sheet(monkeypatch, name, tflops):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert devices.peak_flops(torch.device("cuda", 0), torch.bfloat16) == (tflops and tflops * 1e12)
    assert devices.peak_flops(torch.device("cuda", 0), torch.float32) is None


def test_out_of_memory_is_recognised_on_every_device():
    with pytest.raises(RuntimeError) as too_much:
        torch.empty(2**50, dtype=torch.uint8)  # more than a process can address
    lacks = (torch.OutOfMemoryError("CUDA out of memory."), too_much.value, MemoryError(),
             RuntimeError("NPU out of memory. Tried to allocate 1.40 GiB"), RuntimeError("MPS backend out of memory"))  # fmt: skip
    assert all(map(devices.is_out_of_memory, lacks))
    assert not any(map(devices.is_out_of_memory, (RuntimeError("mat1 and mat2 shapes"), ValueError("out of memory"), KeyError(1))))


# ----------------------------------------------------------------------------------------------------------------------
# NPU


@pytest.mark.slow
def test_torch_npu_is_imported_only_when_asked_for_and_auto_takes_it_where_torch_has_loaded_it(tmp_path):
    done = run("""if True:
        import bench, chat, devices, eval, os, pretrain, sft, sys
        assert "torch_npu" not in sys.modules and devices.pick_device("auto") != "npu"
        assert not os.path.exists(os.environ["NPU_CALLS"])
        import torch_npu
        print(devices.pick_device())
    """, stand_in(tmp_path))  # fmt: skip
    assert done.stdout == "npu\n", done.stderr


def broken(directory: Path) -> dict:
    (directory / "torch_npu.py").write_text("raise ImportError('libhccl.so: cannot open shared object file')")
    return {"PYTHONPATH": str(directory)}


@pytest.mark.parametrize("environment, words", [
    (lambda directory: {}, f"pip install torch-npu=={torch.__version__.partition('+')[0]}, install CANN"),
    (broken, "does not load (libhccl.so: cannot open shared object file); install CANN and `source"),
    (lambda directory: stand_in(directory, count=0), "finds no such device here; `npu-smi info`"),
], ids=["no package", "no CANN", "no NPU"])  # fmt: skip
def test_a_missing_npu_is_one_line(tmp_path, environment, words):
    if "pip" in words and importlib.util.find_spec("torch_npu"):
        pytest.skip("torch_npu is installed here")
    statuses, _, err = ended("pretrain.py", "--device", "npu", "--out", tmp_path / "out", **environment(tmp_path))
    assert statuses == [2] and err.count("\n") == 1, err
    assert err.startswith("error: --device npu") and words in err
    assert not (tmp_path / "out").exists()


def test_every_call_goes_to_torch_npu(tmp_path):
    done = run("""if True:
        import json, torch, devices
        kind = devices.pick_device("npu")
        device = devices.set_device(kind, 1)
        devices.reset_peak_memory(device)
        numbers = devices.peak_memory(device), devices.allocated_memory(device), devices.total_memory(device)
        torch.manual_seed(5)
        state = devices.random_state(device)
        devices.set_random_state(device, state)
        devices.synchronize(device)
        with torch.autocast(kind, devices.pick_dtype("auto", kind)):
            fast = str(torch.get_autocast_dtype(kind))
        print(json.dumps([str(device), devices.device_name(device), fast, devices.peak_flops(device, torch.bfloat16), numbers,
                          sorted(state), state["npu"].tolist()]))
    """, stand_in(tmp_path))  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == ["npu:1", "Ascend910B3", "torch.bfloat16", None, [3 * GIB, GIB, 64 * GIB], ["cpu", "npu"],
                                       list(range(16))]  # fmt: skip
    noted = calls(tmp_path)
    for call in (["set_device", [1]], ["reset_peak_memory_stats", ["npu:1"]], ["max_memory_allocated", ["npu:1"]],
                 ["memory_allocated", ["npu:1"]], ["get_device_properties", ["npu:1"]], ["get_device_name", ["npu:1"]],
                 ["manual_seed_all", [5]], ["get_rng_state", []], ["synchronize", []]):  # fmt: skip
        assert call in noted, call
    assert "set_rng_state" in [name for name, _ in noted]


def test_an_npu_without_bf16_computes_in_fp16(tmp_path):
    done = run("import devices; kind = devices.pick_device('npu'); print(devices.pick_dtype('auto', kind))\n"
               "try: devices.pick_dtype('bf16', kind)\nexcept devices.UserError as error: print(error)",
               stand_in(tmp_path, bf16=False))  # fmt: skip
    assert done.stdout == "torch.float16\n--dtype bf16: Ascend910B3 has no bf16 arithmetic; use --dtype fp16\n", done.stderr


@pytest.mark.slow
def test_torchrun_gives_each_process_its_own_npu_and_hccl(tmp_path):
    """Collectives of tensors on an NPU cannot run here; the group, its backend and the choice of the device can."""
    script = tmp_path / "script.py"
    script.write_text("""if True:
        import os, torch, torch.distributed as dist, devices
        kind = devices.pick_device("npu")
        device = devices.set_device(kind, int(os.environ["LOCAL_RANK"]))
        dist.init_process_group(devices.backend(kind))
        total = torch.tensor([dist.get_rank() + 1.0])
        dist.all_reduce(total)
        if dist.get_rank() == 0:
            print(dist.get_backend(), total.item())
        dist.destroy_process_group()
    """)
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", script],
                          env=stand_in(tmp_path), capture_output=True, text=True, timeout=300)  # fmt: skip
    assert done.returncode == 0 and done.stdout.splitlines() == ["hccl 3.0"], done.stderr
    assert sorted(values for name, values in calls(tmp_path) if name == "set_device") == [[0], [1]]


# ----------------------------------------------------------------------------------------------------------------------
# An NPU that computes: the stand-in with the CPU's kernels


@pytest.fixture(scope="module")
def kernels(tmp_path_factory) -> Path:
    if shutil.which("g++") is None:
        pytest.skip("no g++ to build tests/npu_at_hand.cpp with")
    return build_kernels(tmp_path_factory.mktemp("kernels"))


@pytest.mark.slow
def test_the_smoke_test_passes_on_an_npu(tmp_path, kernels):
    script = tmp_path / "smoke.py"
    script.write_text("from bench_smoke import *; assert set(smoke(SmokeConfig(device='npu')).values()) == {'ok'}")
    said = finished(script, processes=1, **stand_in(tmp_path, kernels=kernels))
    assert "hccl, one process" in said and "Ascend910B3, 64 GiB, can do bf16 fp16 fp32" in said


@pytest.mark.slow
def test_pretraining_on_npus_equals_pretraining_on_a_cpu(tmp_path, kernels, data_dir):
    """One process, two with DDP, two with FSDP, hccl between them: the losses of a CPU."""
    flags = ["--data", data_dir, "--model", "tiny", "--seq-len", "32", "--batch-size", "4", "--micro-batch", "1", "--steps", "4",
             "--log-every", "1", "--eval-every", "4", "--eval-tokens", "256", "--save-every", "2", "--dtype", "fp32"]  # fmt: skip
    losses = {}
    runs = (("cpu", "cpu", 1, []), ("npu", "npu", 1, []), ("ddp", "npu", 2, []), ("fsdp", "npu", 2, ["--fsdp"]))
    for name, device, processes, more in runs:
        finished("pretrain.py", *flags, *more, "--device", device, "--out", tmp_path / name, processes=processes,
                 **stand_in(tmp_path, kernels=kernels))  # fmt: skip
        lines = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        losses[name] = [value for line in lines for key, value in line.items() if key in ("loss", "val_loss")]
    assert len(losses["cpu"]) == 6  # four steps, validation before and after
    for name in ("npu", "ddp", "fsdp"):
        assert losses[name] == pytest.approx(losses["cpu"], abs=1e-4), name
    assert sorted({values[0] for name, values in calls(tmp_path) if name == "set_device"}) == [0, 1]
