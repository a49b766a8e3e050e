"""The machine: processes, devices and precision behind one small object that works alone as well as under torchrun.

    python X.py                               one process, no process group
    torchrun --nproc_per_node=N X.py          N processes that work as one: see parallel.py for what they share
    deepspeed --num_gpus N X.py --deepspeed 2 the same, started by DeepSpeed's launcher

Whatever one process finds out alone (a signal, a mistake, a lost connection) becomes known to all, because a process that
leaves while the others wait for it is a run that hangs.
"""

from __future__ import annotations

import settings
from settings import LostContact, UserError, flag

import contextlib
import dataclasses
import datetime
import os
import re
import signal
import sys
import time

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

import devices
from devices import DTYPE_NAMES

# What gloo, NCCL and torch's store say when another process is gone. (Not our words: whatever matches is shown as well.)
LOST = re.compile(r"connection (was )?(closed|reset|refused)|broken pipe|timed? ?out|socket|remote process|peer|ncclRemoteError"
                  r"|failed to recv|no route to host|HCCL.*(remote|timeout)", re.IGNORECASE)  # fmt: skip
TORCHRUN_SETS = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MachineConfig:
    """Flags that every training stage inherits."""

    device: str = flag("auto", "where to compute", choices=("auto", *devices.KINDS))
    dtype: str = flag("auto", "arithmetic of the matrix products; master weights stay fp32",
                      choices=("auto", "bf16", "fp16", "fp32"))  # fmt: skip
    compile: bool = flag(False, "torch.compile the model: slower start, faster steps on GPUs")
    seed: int = flag(1234, "decides initial weights, order of the data and dropout")
    deterministic: bool = flag(False, "only kernels that repeat bit for bit, also on GPUs: slower")
    fsdp: bool = flag(False, "share weights, gradients and optimizer out among the devices: for a model that one cannot hold")
    deepspeed: str | None = flag(None, "the same with DeepSpeed ZeRO: stage 1, 2 or 3, or a DeepSpeed config FILE.json")
    offload: bool = flag(False, "with --deepspeed: keep the optimizer, at stage 3 also the weights, in the host's memory")
    offload_optimizer: bool = flag(False, "keep AdamW's two numbers per trained parameter in the host's memory; slower")
    timeout: float = flag(10.0, "minutes to wait for another process before it counts as lost")

    # What decides how fast a result comes, not what it is: a resumed run may have it otherwise.
    HARMLESS = frozenset({"device", "compile", "deterministic", "fsdp", "deepspeed", "offload", "offload_optimizer", "timeout"})


class Machine:
    """Rank, device and precision. Raises UserError for what this machine does not have."""

    def __init__(self, config: MachineConfig):
        missing = [name for name in TORCHRUN_SETS if name not in os.environ]
        if missing and int(os.environ.get("WORLD_SIZE", 1)) > 1:
            raise UserError(f"WORLD_SIZE={os.environ['WORLD_SIZE']} is set but {', '.join(missing)} is not: start several processes with "
                            "torchrun --nproc_per_node=N, or `unset WORLD_SIZE` for one")  # fmt: skip
        self.distributed = not missing
        self.rank, self.world, local_rank = (
            int(os.environ.get(name, default)) if self.distributed else default
            for name, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))  # fmt: skip
        self.main = self.rank == 0
        kind = devices.pick_device(config.device)
        self.device = devices.set_device(kind, local_rank)
        self.dtype = devices.pick_dtype(config.dtype, kind)
        self.compile = config.compile and devices.supports(kind, "compile")
        if config.compile and not self.compile:
            self.print(f"notice: --compile is left out: torch.compile is not used on {kind}")
        if kind == "cuda":
            torch.backends.cuda.matmul.fp32_precision = "tf32"
        if config.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS repeats itself only with a workspace of its own
            torch.use_deterministic_algorithms(True, warn_only=True)
        self._launcher = os.getppid()
        if self.distributed or config.fsdp or config.deepspeed:
            self._join(kind, config.timeout)
        torch.manual_seed(config.seed)  # the same initial weights on every rank
        self.scaler = torch.amp.GradScaler(kind, enabled=self.dtype == torch.float16)
        self._stop, self._interrupted, self._held = False, 0.0, []

    def _join(self, kind: str, timeout: float) -> None:
        """Make the process group. Tensors on the CPU always travel by gloo: signals and messages do not wait for the device."""
        backend = devices.backend(kind)
        alone = {} if self.distributed else {"store": dist.HashStore(), "rank": 0, "world_size": 1}
        _die_with_launcher()
        try:
            dist.init_process_group(backend if backend == "gloo" else f"cpu:gloo,{kind}:{backend}",
                                    timeout=datetime.timedelta(minutes=timeout), **alone)  # fmt: skip
        except (RuntimeError, ValueError) as error:  # DistNetworkError and DistStoreError are RuntimeErrors
            place = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
            if "EADDRINUSE" in str(error) or "address already in use" in str(error):
                raise UserError(f"port {place} is taken, by another run perhaps; choose one with --master-port, or use "
                                "torchrun --standalone") from None  # fmt: skip
            raise UserError(f"the {self.world} processes did not find each other at {place} ({_first_line(error)}); start all of them, "
                            "with torchrun, and check that every machine reaches that address") from None  # fmt: skip
        self.distributed = True

    def __enter__(self) -> Machine:
        self._old_handlers = {}
        with contextlib.suppress(ValueError):  # only the main thread may set handlers; a test may not be in it
            for name in ("SIGTERM", "SIGINT", "SIGHUP"):
                number = getattr(signal, name, None)
                if number is not None and signal.getsignal(number) is not signal.SIG_IGN:  # nohup has a run ignore SIGHUP
                    self._old_handlers[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, kind, error, traceback) -> None:
        for file in self._held:
            file.close()
        if self.distributed:
            settings.process_groups.append(dist.group.WORLD)
            if error is None:
                dist.destroy_process_group()
        if error is None or self.world == 1:  # else this process is about to end, and how is for clean_exit to say
            for number, handler in self._old_handlers.items():
                signal.signal(number, handler)
        if self.world > 1 and isinstance(error, RuntimeError) and LOST.search(str(error)):
            raise LostContact(f"lost the connection to another process ({_first_line(error)}): it died, was killed, or its machine or the "
                              "network went down; its own message, if it left one, says why. The same command on all machines goes "
                              "on from the last checkpoint") from error  # fmt: skip

    def hold(self, file) -> None:
        """Keep something open until the stage ends, however it ends: a lock, a progress bar."""
        self._held.append(file)

    # ---- stopping --------------------------------------------------------------------------------------------------

    def _on_signal(self, number, frame) -> None:
        # One Ctrl-C may arrive twice, from the terminal and from a launcher; a second one is meant a moment later, and comes
        # through torchrun as SIGTERM.
        if self._interrupted and time.monotonic() - self._interrupted > 1:
            raise KeyboardInterrupt
        if number == signal.SIGINT:
            self._interrupted = self._interrupted or time.monotonic()
        if not self._stop and self.main:
            print("\nfinishing this step and saving; Ctrl-C again quits at once", file=sys.stderr, flush=True)
        self._stop = settings.being_ended = True

    def should_stop(self) -> bool:
        """True on every rank once any rank has got SIGTERM, SIGINT or SIGHUP: they must agree, or they would hang."""
        return self.any(self._stop)

    def stopped(self, step: int, saved) -> None:
        """Say how to go on. Raises UserError if it was the death of a launcher that stopped the run."""
        how = f"stopped at step {step:,}; the same command goes on from {saved or 'the start'}"
        orphans = [rank for rank, orphan in enumerate(self.gather(os.getppid() != self._launcher)) if orphan]
        if orphans:
            settings.being_ended = False
            raise UserError(f"torchrun died and left rank {', '.join(map(str, orphans))} behind: {how}")
        self.print(how)

    def check_batch_size(self, batch_size: int) -> None:
        """Raises UserError for a batch that the processes cannot share equally, naming the nearest that they can."""
        if batch_size % self.world:
            below, above = batch_size - batch_size % self.world, batch_size - batch_size % self.world + self.world
            fitting = f"{below} or {above}" if below else above
            raise UserError(f"--batch-size {batch_size} cannot be shared equally by {self.world} processes: it must be a multiple of "
                            f"{self.world}, {fitting} for example")  # fmt: skip

    # ---- agreeing --------------------------------------------------------------------------------------------------

    def together(self, work):
        """work() on every rank. Where it fails on one, all raise that error: none waits for those that left."""
        if not self.distributed:
            return work()
        result, error = _attempt(work)
        errors = self.gather(error)
        first = next((rank for rank, other in enumerate(errors) if other is not None), None)
        if first is not None:
            raise errors[self.rank] or errors[first]
        return result

    def on_main(self, work):
        """work() on rank 0; its result, or its exception, on every rank."""
        if not self.distributed:
            return work()
        box = [_attempt(work) if self.main else None]
        dist.broadcast_object_list(box, device=torch.device("cpu"))
        result, error = box[0]
        if error is not None:
            raise error
        return result

    def check_equal(self, facts: dict) -> None:
        """Raises UserError that names what is not the same on all ranks: machines may have other flags, or other copies of files."""
        everyone = self.gather(facts)
        for key in facts:
            odd = next((rank for rank, theirs in enumerate(everyone) if theirs[key] != everyone[0][key]), None)
            if odd is not None:
                raise UserError(f"{key} is {everyone[0][key]} on rank 0 and {everyone[odd][key]} on rank {odd}: all must be started alike, "
                                "with the same files")  # fmt: skip

    def any(self, value: bool) -> bool:
        return bool(self.sum(torch.tensor(float(value))) > 0) if self.distributed else value

    def sum(self, value: Tensor) -> Tensor:
        """The sum of a tensor over all ranks, where the tensor is."""
        value = value.detach()
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
            self.any(False)

    # ---- computing -------------------------------------------------------------------------------------------------

    def autocast(self):
        return torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32)

    def synchronize(self) -> None:
        devices.synchronize(self.device)

    def peak_memory(self) -> int:
        return devices.peak_memory(self.device)

    def peak_flops(self) -> float | None:
        return devices.peak_flops(self.device, self.dtype)

    def describe(self) -> str:
        threads = f", {torch.get_num_threads()} threads" if self.device.type == "cpu" else ""
        ranks = f", {self.world} processes" if self.world > 1 else ""
        return f"{devices.device_name(self.device)}{threads}{ranks}, {DTYPE_NAMES[self.dtype]}"

    def print(self, *values) -> None:
        if self.main:
            tqdm.write(" ".join(map(str, values)), file=sys.stdout)
            sys.stdout.flush()

    @contextlib.contextmanager
    def explain_out_of_memory(self, advice: str):
        """Out of memory -> one message with what was allocated and which flag to lower."""
        try:
            yield
        except (RuntimeError, MemoryError) as error:
            if not devices.is_out_of_memory(error):
                raise
            total = devices.total_memory(self.device)
            of = f" of {total / 2**30:.1f} GiB" if total else ""
            raise UserError(f"out of memory on {devices.device_name(self.device)}: {self.peak_memory() / 2**30:.1f} GiB{of} were in use; "
                            f"{advice}") from None  # fmt: skip


def _attempt(work) -> tuple:
    """(result, None) or (None, exception) of work()."""
    try:
        return work(), None
    except Exception as error:
        return None, error


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0][:200]


def _die_with_launcher() -> None:
    """Linux: SIGTERM for this process when the one that started it dies. torchrun's workers would live on alone otherwise,
    in the way of the next run."""
    if "TORCHELASTIC_RUN_ID" in os.environ and sys.platform == "linux":
        import ctypes

        PR_SET_PDEATHSIG = 1
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
