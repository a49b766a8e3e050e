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
import json
import os
import re
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from files import write_text

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


# ----------------------------------------------------------------------------------------------------------------------
# What a run leaves behind for people: metrics.jsonl and loss.png


class Metrics:
    """metrics.jsonl: one JSON object per line with step, tokens, loss …

    `from_step` cuts a longer file back on resume: what follows is measured again, the evaluation of that step included.
    """

    def __init__(self, machine: Machine, path: Path, from_step: int = 0):
        self.machine, self.path, self.last = machine, Path(path), {}
        if not machine.main:
            return
        kept = [line for line in read_metrics(self.path) if (line["step"], "val_loss" in line) <= (from_step, False)]
        write_text(self.path, "".join(json.dumps(line) + "\n" for line in kept))

    def write(self, **values) -> None:
        values = {k: float(f"{v:.8g}") if isinstance(v, float) else v for k, v in values.items() if v is not None}
        self.last.update(values)
        if self.machine.main:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(values) + "\n")


class Progress:
    """The lines people watch: loss, speed, MFU, memory and time left; the same numbers go to metrics.jsonl.

    Time spent in `paused()` (saving, evaluating) does not count as training time.
    """

    def __init__(self, machine: Machine, metrics: Metrics, *, steps: int, first: int, flops_per_token: int):
        self.machine, self.metrics, self.steps = machine, metrics, steps
        self.flops_per_token = flops_per_token
        self.clock, self.tokens, self.since = time.perf_counter(), 0, first
        self.bar = tqdm(total=steps, initial=first, unit="step", disable=None if machine.main else True, dynamic_ncols=True)

    @contextlib.contextmanager
    def paused(self):
        start = time.perf_counter()
        yield
        self.clock += time.perf_counter() - start

    def step(self, tokens: int) -> None:
        self.tokens += tokens
        self.bar.update()

    def log(self, step: int, *, tokens: int, loss: Tensor, lr: float, norm: Tensor) -> None:
        """`tokens` read since the run began; `loss` is this rank's share of the step's loss. Call it on every rank."""
        machine = self.machine
        loss = machine.sum(loss).item() / machine.world
        machine.synchronize()
        now = time.perf_counter()
        speed, pace = self.tokens / (now - self.clock), (now - self.clock) / (step - self.since)
        peak, memory = machine.peak_flops(), machine.peak_memory()
        mfu = speed * self.flops_per_token / (peak * machine.world) if peak else None
        self.metrics.write(step=step, tokens=tokens, loss=loss, lr=lr, grad_norm=norm.item(), tokens_per_s=round(speed),
                           mfu=mfu, memory=memory)  # fmt: skip
        machine.print(f"{step:>{len(str(self.steps))}}/{self.steps}  loss {loss:7.4f}  lr {lr:.2e}  norm {norm.item():6.2f}  "
                      f"{human(speed):>5} tokens/s" + (f"  MFU {mfu:.0%}" if mfu else "")
                      + f"  {memory / 2**30:.2f} GiB  {duration((self.steps - step) * pace)} left")  # fmt: skip
        self.clock, self.tokens, self.since = time.perf_counter(), 0, step


def count_skipped(machine: Machine, state: dict, finite: bool, out: Path) -> None:
    """Keep count of steps without a finite gradient, in a row. The tenth raises UserError."""
    state["skipped"] = 0 if finite else state["skipped"] + 1
    if not finite:
        machine.print(f"step {state['step']:,}: loss or gradient is not finite: step skipped ({state['skipped']} in a row)")
    if state["skipped"] == 10:
        raise UserError("ten steps in a row had no finite gradient: lower --lr, or use --dtype bf16 or fp32; "
                        f"the last good checkpoint is the newest step in {out}")


def read_metrics(path) -> list[dict]:
    """The lines of a metrics.jsonl; a last line cut short by a crash is left out."""
    lines = []
    if Path(path).exists():
        for text in Path(path).read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(json.JSONDecodeError):
                lines.append(json.loads(text))
    return lines


def plot_loss(metrics: Path, out: Path, title: str) -> None:
    """Draw train and validation loss against tokens, and the learning rate, into a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import EngFormatter

    lines = read_metrics(metrics)
    train = [(line["tokens"], line["loss"]) for line in lines if "loss" in line]
    val = [(line["tokens"], line["val_loss"]) for line in lines if "val_loss" in line]
    rate = [(line["tokens"], line["lr"]) for line in lines if "lr" in line]
    figure, (top, bottom) = plt.subplots(2, 1, figsize=(8, 5.6), sharex=True, height_ratios=(4, 1), layout="constrained")
    if train:
        top.plot(*zip(*train), color="#4477aa", linewidth=1, label=f"train, last {train[-1][1]:.3f}")
    if val:
        top.plot(*zip(*val), color="#cc6677", marker="o", markersize=3.5, label=f"validation, last {val[-1][1]:.3f}")
    if train or val:
        top.legend(frameon=False)
    top.set(ylabel="loss (nats per token)", title=title)
    if rate:
        bottom.plot(*zip(*rate), color="#777777", linewidth=1)
    bottom.set(xlabel="tokens", ylabel="learning rate")
    bottom.xaxis.set_major_formatter(EngFormatter(sep=""))
    for axis in (top, bottom):
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(out, dpi=110)
    plt.close(figure)


def human(number: float) -> str:
    """1234567 -> '1.23M'."""
    for limit, suffix in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= limit:
            return f"{number / limit:.3g}{suffix}"
    return f"{number:.3g}" if isinstance(number, float) else str(number)


def duration(seconds: float) -> str:
    """3725 -> '1:02:05'."""
    minutes, seconds = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
