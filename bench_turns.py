"""Taking turns: what the commands of bench.py share.

Every measurement is a process of its own (`bench.py worker ORDER`), so that neither memory nor caches carry over, and the
sides take turns: A B A B … A slow minute of the machine then hits both.

    runs = take_turns("train", config, ["cria", "transformers"])    # side -> one result per repeat
    report(config, title, header, rows, runs, summary)              # the table, and all numbers into --out
"""

from __future__ import annotations

from settings import UserError, config_to_dict, flag

import contextlib
import json
import os
import platform
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
from tqdm import tqdm

from files import write_json
from tables import markdown_table, print_table

GIB = 2**30
MAY_BE_ZERO = ("seed", "warmup", "peak_tflops", "lora_rank", "lora_alpha", "lora_dropout")  # AdapterFlags have checks of their own


@dataclass(frozen=True, kw_only=True)
class Config:
    """What all commands share."""

    repeats: int = flag(3, "processes per side, taking turns")
    out: Path | None = flag(None, "also write every single measurement to this JSON file")
    markdown: bool = flag(False, "print the table as Markdown")

    def problems(self) -> list[str]:
        numbers = {name: value for name, value in vars(self).items() if type(value) in (int, float)}
        found = [f"--{name.replace('_', '-')} must be at least {least}, not {value}" for name, value in numbers.items()
                 if value < (least := int(name not in MAY_BE_ZERO))]  # fmt: skip
        if self.out and self.out.exists():
            found.append(f"--out {self.out} exists already; choose another file")
        return found


# ----------------------------------------------------------------------------------------------------------------------
# Taking turns


def run_worker(command: str, config: Config, side: str) -> dict:
    """One measurement in a process of its own. A user's mistake there is one here; a bug there keeps its traceback."""
    order = json.dumps({"command": command, "side": side, "config": config_to_dict(config)})
    done = subprocess.run([sys.executable, str(Path(__file__).resolve().with_name("bench.py")), "worker", order], capture_output=True,
                          encoding="utf-8", errors="replace")  # fmt: skip
    if done.returncode == 0:
        return json.loads(done.stdout.splitlines()[-1])
    if done.returncode == 2 and "error: " in done.stderr:
        raise UserError(done.stderr.rpartition("error: ")[2].strip())
    if done.returncode == -9 or "can't allocate memory" in done.stderr:
        raise UserError(f"there is too little memory for {side} (status {done.returncode}); measure something smaller")
    raise RuntimeError(f"the process of {side} ended with status {done.returncode}:\n{done.stderr}")


def take_turns(command: str, config: Config, sides: list[str]) -> dict[str, list[dict]]:
    """side -> its results, one per repeat; A B A B …"""
    runs = {side: [] for side in sides}
    with tqdm(total=config.repeats * len(sides), unit="run", disable=None) as bar:
        for _ in range(config.repeats):
            for side in sides:
                bar.set_description(side)
                runs[side].append(run_worker(command, config, side))
                bar.update()
    return runs


def each(runs: list[dict], key: str) -> list[float]:
    """One number per repeat; of a list of steps, the median."""
    return [median(run[key]) if isinstance(run[key], list) else run[key] for run in runs]


def middle(runs: list[dict], key: str) -> float:
    return median(each(runs, key))


def spread(runs: list[dict], key: str = "seconds") -> str:
    """(slowest - fastest repeat) / median."""
    values = each(runs, key)
    return f"{(max(values) - min(values)) / median(values):.0%}"


# ----------------------------------------------------------------------------------------------------------------------
# What people read


def gib(results: list[dict]) -> tuple[str, str]:
    return tuple(f"{middle(results, key) / GIB:.2f}" for key in ("peak_memory", "memory_before"))


def compare(runs: dict, summary: dict, keys: dict[str, str]) -> None:
    """Add to the summary how many times as fast ours is and what share of the other's peak memory it takes:
    (median, least, most) of the pairs."""
    ours, theirs = runs.values()
    pairs = {name: (theirs, ours, key) for name, key in keys.items()} | {"peak memory": (ours, theirs, "peak_memory")}
    summary["ratio"] = {}
    for name, (upper, lower, key) in pairs.items():
        ratios = [a / b for a, b in zip(each(upper, key), each(lower, key))]
        summary["ratio"][name] = (median(ratios), min(ratios), max(ratios))


def report(config: Config, title: str, header: tuple, rows: list[tuple], runs: dict, summary: dict) -> dict:
    """Print the table, the ratios and the machine; write all numbers to --out. Returns the summary."""
    last = [results[-1] for results in runs.values()]
    parts = (last[0]["device"], cpu(), last[-1]["versions"], f"Python {platform.python_version()}, {platform.system()}")
    foot = [f"Median of {config.repeats} processes per row, taking turns. {', '.join(filter(None, parts))}."]
    if "ratio" in summary:
        ratios = [f"{name} {m:.2f} ({least:.2f} to {most:.2f})" for name, (m, least, most) in summary["ratio"].items()]
        foot.insert(0, f"{' : '.join(runs)} = {', '.join(ratios)}")
    numbers = range(1, len(header))
    if config.markdown:
        print(title, "", *markdown_table(header, rows, numbers), "", "\n\n".join(foot), sep="\n")
    else:
        print(title)
        print_table(header, rows, numbers)
        print("\n".join(foot))
    if config.out:
        config.out.parent.mkdir(parents=True, exist_ok=True)
        content = {"title": title, "notes": foot, "settings": config_to_dict(config), "summary": summary, "runs": runs}
        write_json(config.out, content)
    return summary


def cpu() -> str:
    """The processor's name, vector units, cores and memory, as far as the system tells."""
    name, memory = platform.processor() or platform.machine(), ""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                name = line.partition(":")[2].strip()
    with contextlib.suppress(OSError, ValueError, AttributeError):
        memory = f", {os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / GIB:.0f} GiB"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{name} ({torch.backends.cpu.get_cpu_capability()}, {cores} cores{memory})"
