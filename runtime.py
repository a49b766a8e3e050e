"""The machine: everything a training stage needs that is not its lesson.

    device       --device auto|cpu|cuda|mps, --dtype auto|bf16|fp16|fp32, the process group under torchrun
    the loop     signals -> one agreed stop, memory and peak-FLOPS tables
    for people   metrics.jsonl, loss.png

Plain `python X.py` is one process with no process group. `torchrun --nproc_per_node=N X.py` is DDP.
"""

from __future__ import annotations

from settings import UserError, flag

import contextlib
import dataclasses
import datetime
import os
import re
import signal
import sys

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from devices import DTYPE_NAMES, PEAK_TFLOPS, peak_rss, pick_device, pick_dtype

# ----------------------------------------------------------------------------------------------------------------------
# The machine


@dataclasses.dataclass(frozen=True, kw_only=True)
class MachineConfig:
    """Flags that every training stage inherits."""

    device: str = flag("auto", "where to compute", choices=("auto", "cpu", "cuda", "mps"))
    dtype: str = flag("auto", "arithmetic of the matrix products; master weights stay fp32",
                      choices=("auto", "bf16", "fp16", "fp32"))  # fmt: skip
    compile: bool = flag(False, "torch.compile the model: slower start, faster steps on GPUs")
    seed: int = flag(1234, "decides initial weights, order of the data and dropout")


class Machine:
    """Rank, device and precision behind one small object that works alone as well as under torchrun."""

    def __init__(self, config: MachineConfig):
        self.distributed = all(name in os.environ for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR"))  # torchrun sets them
        self.rank, self.world, local_rank = (
            int(os.environ[name]) if self.distributed else default
            for name, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))  # fmt: skip
        self.main = self.rank == 0
        kind = pick_device(config.device)
        if kind == "cuda":
            if local_rank >= torch.cuda.device_count():
                raise UserError(f"process {local_rank} has no GPU of its own: this machine has {torch.cuda.device_count()}; "
                                f"start torchrun with --nproc_per_node={torch.cuda.device_count()}")
            torch.cuda.set_device(local_rank)
            torch.backends.cuda.matmul.fp32_precision = "tf32"
            self.device = torch.device("cuda", local_rank)
        else:
            self.device = torch.device(kind)
        self.dtype = pick_dtype(config.dtype, kind)
        if self.distributed:
            dist.init_process_group("nccl" if kind == "cuda" else "gloo", timeout=datetime.timedelta(minutes=10))
        torch.manual_seed(config.seed)  # the same initial weights on every rank
        self.scaler = torch.amp.GradScaler(kind, enabled=self.dtype == torch.float16)
        self._stop, self._held = False, []

    def __enter__(self) -> Machine:
        self._old_handlers = {}
        with contextlib.suppress(ValueError):  # only the main thread may set handlers; a test may not be in it
            for name in ("SIGTERM", "SIGINT", "SIGHUP"):
                number = getattr(signal, name, None)
                if number is not None:
                    self._old_handlers[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *exception) -> None:
        for number, handler in self._old_handlers.items():
            signal.signal(number, handler)
        for file in self._held:
            file.close()
        if self.distributed:
            dist.destroy_process_group()

    def hold(self, file) -> None:
        """Keep a file open (a lock, say) until the stage ends."""
        self._held.append(file)

    def _on_signal(self, number, frame) -> None:
        if self._stop and number == signal.SIGINT:
            raise KeyboardInterrupt  # a second Ctrl-C does not wait
        self._stop = True
        if self.main:
            print("\nfinishing this step and saving; Ctrl-C again quits at once", file=sys.stderr, flush=True)

    def should_stop(self) -> bool:
        """True on every rank once any rank has got SIGTERM, SIGINT or SIGHUP: they must agree, or they would hang."""
        return self.any(self._stop)

    def any(self, value: bool) -> bool:
        return bool(self.sum(torch.tensor(float(value))).item() > 0) if self.distributed else value

    def sum(self, value: Tensor) -> Tensor:
        """The sum of a tensor over all ranks."""
        value = value.detach().to(self.device)
        if self.distributed:
            value = value.clone()
            dist.all_reduce(value)
        return value

    def gather(self, value) -> list:
        """Python objects of all ranks, in order, on every rank."""
        if not self.distributed:
            return [value]
        values = [None] * self.world
        dist.all_gather_object(values, value)
        return values

    def barrier(self) -> None:
        if self.distributed:
            dist.barrier()

    def autocast(self):
        return torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32)

    def wrap(self, model):
        """The model as the loop calls it: DDP under torchrun, else itself. `no_sync` works on both."""
        if not self.distributed:
            return model
        ids = [self.device.index] if self.device.type == "cuda" else None
        return torch.nn.parallel.DistributedDataParallel(model, device_ids=ids, gradient_as_bucket_view=True)

    def no_sync(self, model, active: bool):
        """Leave gradients local while accumulating: one all-reduce per optimizer step."""
        return model.no_sync() if active and self.distributed else contextlib.nullcontext()

    def synchronize(self) -> None:
        if self.device.type != "cpu":
            getattr(torch, self.device.type).synchronize()

    def peak_memory(self) -> int:
        """Bytes: the most that was allocated on the device; on a CPU the most the process ever held."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated()
        if self.device.type == "mps":
            return torch.mps.driver_allocated_memory()
        return peak_rss()

    def peak_flops(self) -> float | None:
        """FLOP/s of one device in the dtype in use, where the data sheet is known; for MFU."""
        if self.device.type != "cuda" or self.dtype == torch.float32:
            return None
        name = torch.cuda.get_device_name().lower()
        return next((tflops * 1e12 for key, tflops in PEAK_TFLOPS.items() if re.search(rf"\b{key}\b", name)), None)

    def describe(self) -> str:
        name = torch.cuda.get_device_name() if self.device.type == "cuda" else self.device.type
        threads = f", {torch.get_num_threads()} threads" if self.device.type == "cpu" else ""
        ranks = f", {self.world} processes" if self.world > 1 else ""
        return f"{name}{threads}{ranks}, {DTYPE_NAMES[self.dtype]}"

    def print(self, *values) -> None:
        if self.main:
            tqdm.write(" ".join(map(str, values)), file=sys.stdout)
            sys.stdout.flush()

    @contextlib.contextmanager
    def explain_out_of_memory(self, advice: str):
        """Out of device memory -> one message with what was allocated and which flag to lower."""
        try:
            yield
        except torch.OutOfMemoryError:
            used, total = torch.cuda.max_memory_allocated(), torch.cuda.get_device_properties(self.device).total_memory
            raise UserError(f"out of GPU memory: {used / 2**30:.1f} GiB of {total / 2**30:.1f} GiB were allocated; {advice}") from None
