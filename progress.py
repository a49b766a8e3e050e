"""What a run shows and leaves behind for people: metrics.jsonl, the log lines with their notices, loss.png.

Notices are for what a machine cannot decide: steps left out, a loss that jumps, data files that are slower than the training.
"""

from __future__ import annotations

from settings import UserError

import contextlib
import hashlib
import json
import time
from collections import deque
from collections.abc import Iterable
from pathlib import Path
from statistics import fmean, pstdev

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from files import write_text
from runtime import Machine


class Metrics:
    """metrics.jsonl: one JSON object per line with step, tokens, loss …

    `from_step` cuts a longer file back on resume: what follows is measured again, with `evaluate_again` that step's evaluation too.
    """

    def __init__(self, machine: Machine, path: Path, from_step: int = 0, evaluate_again: bool = True):
        self.machine, self.path, self.last = machine, Path(path), {}
        if not machine.main:
            return
        end = (from_step, not evaluate_again)
        kept = [line for line in read_metrics(self.path) if (line["step"], "val_loss" in line) <= end]
        write_text(self.path, "".join(json.dumps(line) + "\n" for line in kept))

    def write(self, **values) -> None:
        values = {k: float(f"{v:.8g}") if isinstance(v, float) else v for k, v in values.items() if v is not None}
        self.last.update(values)
        if self.machine.main:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(values) + "\n")


class BatchHash:
    """One number for all token ids that a run has read so far. Two runs that log the same have read the same batches at the
    same steps, however many processes shared them and wherever either was interrupted.

    It is the sum modulo 2^63 over rows of a hash of (step, ids): a sum does not care which rank read which row.
    """

    def __init__(self, machine: Machine, so_far: str | None = None):
        self.machine = machine
        self.value = int(so_far, 16) if so_far and machine.main else 0

    def add(self, step: int, rows: Iterable[np.ndarray]) -> None:
        """The rows of token ids that this rank reads at this step."""
        for row in rows:
            digest = hashlib.blake2b(row.astype("<i8").tobytes(), digest_size=8, salt=step.to_bytes(8, "little")).digest()
            self.value = (self.value + int.from_bytes(digest, "little")) % 2**63

    def total(self) -> str:
        """Over all ranks; call it on every rank."""
        return f"{self.machine.sum(torch.tensor(self.value)).item() % 2**63:016x}"


class Progress:
    """The lines people watch: loss, speed, MFU, memory and time left; the same numbers go to metrics.jsonl.

    Time spent in `paused()` (saving, evaluating) does not count as training time.
    """

    def __init__(self, machine: Machine, metrics: Metrics, *, steps: int, first: int, flops_per_token: int):
        self.machine, self.metrics, self.steps = machine, metrics, steps
        self.flops_per_token = flops_per_token
        self.clock, self.tokens, self.since = time.perf_counter(), 0, first
        self.waited, self.losses = 0.0, deque(maxlen=50)
        self.bar = tqdm(total=steps, initial=first, unit="step", disable=None if machine.main else True, dynamic_ncols=True)
        machine.hold(self.bar)

    @contextlib.contextmanager
    def paused(self):
        start = time.perf_counter()
        yield
        self.clock += time.perf_counter() - start

    @contextlib.contextmanager
    def reading(self):
        """Around what reads the data files."""
        start = time.perf_counter()
        yield
        self.waited += time.perf_counter() - start

    def step(self, tokens: int) -> None:
        self.tokens += tokens
        self.bar.update()

    def log(self, step: int, *, tokens: int, loss: Tensor, lr: float, norm: Tensor, **more) -> None:
        """`tokens` read since the run began; `loss` is this rank's share of the step's loss. Call it on every rank."""
        machine = self.machine
        loss = machine.sum(loss).item() / machine.world
        norm = norm.item()
        machine.synchronize()
        now = time.perf_counter()
        speed, pace = self.tokens / (now - self.clock), (now - self.clock) / (step - self.since)
        peak, memory = machine.peak_flops(), machine.peak_memory()
        mfu = speed * self.flops_per_token / (peak * machine.world) if peak else None
        self.metrics.write(step=step, tokens=tokens, loss=loss, lr=lr, grad_norm=norm, tokens_per_s=round(speed),
                           mfu=mfu, memory=memory, **more)  # fmt: skip
        machine.print(f"{step:>{len(str(self.steps))}}/{self.steps}  loss {loss:7.4f}  lr {lr:.2e}  norm {norm:6.2f}  "
                      f"{human(speed):>5} tokens/s" + (f"  MFU {mfu:.0%}" if mfu else "")
                      + f"  {memory / 2**30:.2f} GiB  {duration((self.steps - step) * pace)} left")  # fmt: skip
        self._notice(step, loss, now - self.clock)
        self.clock, self.tokens, self.since, self.waited = time.perf_counter(), 0, step, 0.0

    def _notice(self, step: int, loss: float, seconds: float) -> None:
        if len(self.losses) >= 10:
            usual, spread = fmean(self.losses), pstdev(self.losses)
            if loss > max(usual + 6 * spread, 1.1 * usual):
                self.machine.print(f"notice: the loss jumped to {loss:.3f} at step {step:,}; it was about {usual:.3f}. If it stays there, "
                                   "branch off from an earlier step: --resume RUN/step-NNNNNN --out ANOTHER --lr LOWER")  # fmt: skip
        self.losses.append(loss)
        if self.waited > max(1.0, 0.2 * seconds):
            self.machine.print(f"notice: {self.waited / seconds:.0%} of the time went into reading the data files: copy them to a local, "
                               "faster disk")  # fmt: skip


def count_skipped(machine: Machine, state: dict, finite: bool, saved: Path | None) -> None:
    """Keep count of steps without a finite gradient, in a row and in all. The tenth in a row raises UserError."""
    state["skipped"] = 0 if finite else state["skipped"] + 1
    state["skipped_in_all"] = state.get("skipped_in_all", 0) + (not finite)
    if not finite:
        machine.print(f"step {state['step']:,}: loss or gradient is not finite: step skipped ({state['skipped']} in a row)")
    if state["skipped"] == 10:
        raise UserError("ten steps in a row had no finite gradient: lower --lr, or use --dtype bf16 or fp32; "
                        f"the last good checkpoint is {saved or 'none yet'}")


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
