"""bench.py faults: kill a training run at random moments, again and again, and see whether it ends as if nothing had happened.

    python bench.py faults --kills 30                                # one process, and two under torchrun
    python bench.py faults --kills 10 --ranks 2 --strategy fsdp deepspeed-3

A small model with dropout trains on the built-in textbook, undisturbed: the reference. A copy of that run then gets
SIGKILL, all its processes at once, and is started again, until all kills are spent and it may finish. Of ten kills five
are aimed into a save, four between saves and one before the first step. What is counted:

    after every kill    checkpoints that look complete and are torn
    at every start      whether it goes on from the newest intact checkpoint, and from no other
    at the end          tensors (weights, optimizer, random numbers) and lines of metrics.jsonl unlike the reference's
"""

from __future__ import annotations

from settings import flag, too_small

import contextlib
import io
import itertools
import os
import random
import re
import shutil
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from safetensors.numpy import load_file
from tqdm import tqdm

import data_process
import textbook
from bench_process import Run
from model import LlamaConfig
from progress import read_metrics
from runs import damage, steps
from tables import print_table

STRATEGIES = {"ddp": [], "fsdp": ["--fsdp"], **{f"deepspeed-{stage}": ["--deepspeed", str(stage)] for stage in (1, 2, 3)}}
MODEL = LlamaConfig(2048, 128, 344, 4, 4, 2, max_position_embeddings=64, tie_word_embeddings=True)  # a million parameters
SAVE_EVERY = 2
OF_THE_MACHINE = ("tokens_per_s", "mfu", "memory")  # what metrics.jsonl says about speed, not about training
COLUMNS = ("kills", "in a save", "between", "before step 1", "runs",
           "torn, looks complete", "torn, left at the end", "wrong resumes", "differing tensors", "differing losses")  # fmt: skip
WRONG = COLUMNS[5:]


@dataclass(frozen=True, kw_only=True)
class FaultsConfig:
    kills: int = flag(30, "how many, shared equally by all strategies and numbers of ranks")
    ranks: tuple[str, ...] = flag(("1", "2"), "processes per run, one drill for each number")
    strategy: tuple[str, ...] = flag(("ddp",), f"how ranks work together, one drill for each: {', '.join(STRATEGIES)}")
    steps: int = flag(40, "optimizer steps per run; a run that ends before its kills are spent is followed by another")
    seed: int = flag(1, "decides the moments of the kills")
    keep_files: bool = flag(False, "leave the runs where they were made; so it is anyway where something differs")

    def problems(self) -> list[str]:
        found = too_small(self, "kills", least=len(self.ranks) * len(self.strategy)) + too_small(self, "seed", least=0)  # one per drill
        found += too_small(self, "steps", least=10)  # a run must reach the moments at which it is to be killed
        found += [f"--ranks {ranks}: a number of processes is needed" for ranks in self.ranks if not re.fullmatch(r"[1-9]\d*", ranks)]
        found += [f"--strategy {name}: there are {', '.join(STRATEGIES)}" for name in self.strategy if name not in STRATEGIES]
        if not Path(f"/proc/self/task/{os.getpid()}/children").exists():
            found.append("the drill finds the processes of a run under /proc/PID/task, where this system has nothing: run it on Linux")
        return found


def faults(config: FaultsConfig) -> list[Counter]:
    """Run all drills and print one table. Exit status 1 if anything differed. Returns what was counted, per drill."""
    folder = Path(tempfile.mkdtemp(prefix="cria-faults-"))
    with tqdm(total=config.kills, unit="kill", disable=None) as bar:
        make_data(folder)
        kinds = list(itertools.product(config.strategy, map(int, config.ranks)))
        shares = [config.kills // len(kinds) + (number < config.kills % len(kinds)) for number in range(len(kinds))]
        counts = [Drill(folder, *kind, share, config, bar).run() for kind, share in zip(kinds, shares)]
    wrong = [sum(count[name] for name in WRONG) for count in counts]
    rows = [(*kind, *(count[name] for name in COLUMNS), "DIFFERENT" if bad else "the same")
            for kind, count, bad in zip(kinds, counts, wrong)]  # fmt: skip
    print_table(("strategy", "ranks", *COLUMNS, "result"), rows, range(1, len(COLUMNS) + 2))
    if config.keep_files or any(wrong):
        print(f"the runs are in {folder}")
    else:
        shutil.rmtree(folder)
    if any(wrong):
        sys.exit(1)
    return counts


def make_data(folder: Path) -> None:
    """Token files, a tokenizer and a config.json, in a second."""
    (folder / "tmp").mkdir()
    with contextlib.redirect_stdout(io.StringIO()):
        textbook.write_textbook(folder / "book", passes=1)
        data_process.prepare(data_process.PretrainConfig(corpus=(f"textbook={folder / 'book'}",), out=folder / "data", workers=1,
                                                         vocab_size=MODEL.vocab_size))  # fmt: skip
    MODEL.to_json(folder / "config.json")


# ----------------------------------------------------------------------------------------------------------------------
# One drill


class Drill:
    """The runs of one strategy with one number of ranks, and what was counted."""

    def __init__(self, folder: Path, strategy: str, ranks: int, kills: int, config: FaultsConfig, bar: tqdm):
        self.folder, self.name, self.steps, self.bar = folder, f"{strategy}-{ranks}", config.steps, bar
        self.dice, self.count, self.broken = random.Random(f"{config.seed} {self.name}"), Counter(), set()
        aims = ["before step 1" if i % 10 == 9 else "between" if i % 2 else "in a save" for i in range(kills)]
        self.aims = self.dice.sample(aims, kills)
        alone = ranks == 1 and strategy == "ddp"
        torchrun = [] if alone else ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
        settings = (f"--data data --model config.json --steps {config.steps} --batch-size {4 * ranks} --micro-batch 2 --dropout 0.1 "
                    f"--save-every {SAVE_EVERY} --log-every 1 --eval-every 20 --dtype fp32 --device cpu --out")  # fmt: skip
        self.command = [sys.executable, *torchrun, str(Path(__file__).resolve().with_name("pretrain.py")), *STRATEGIES[strategy],
                        *settings.split()]  # fmt: skip

    def run(self) -> Counter:
        """The reference, then as many disturbed runs as it takes to spend all kills; each is compared with the reference."""
        self.bar.set_description(self.name)
        reference = self.folder / f"{self.name}-reference"
        self.undisturbed(reference)
        while left := len(self.aims):
            out = self.folder / f"{self.name}-{self.count['runs']}"
            self.count["runs"] += 1
            self.disturb(out)
            self.count.update(compare(reference, out))
            if len(self.aims) == left:
                raise RuntimeError(f"{out}: a whole run had no moment of the kind {self.aims[-1]!r}; the drill does not fit pretrain.py")
        return self.count

    def start(self, out: Path) -> Run:
        """Start pretrain.py, or go on with it, as a user would: the same command, however often."""
        # TMPDIR: what killed processes leave there goes away with the drill's own files
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": str(self.folder / "tmp")}
        return Run([*self.command, str(out)], environment, self.folder)

    def undisturbed(self, out: Path) -> None:
        """The reference run; and the seconds that its start, the time from save to save, and its last save took."""
        begin = time.perf_counter()
        with self.start(out) as run:
            run.wait(run.moving)
            self.start_time = time.perf_counter() - begin
            run.end()
        self.interval = (time.perf_counter() - begin - self.start_time) / self.steps * SAVE_EVERY
        written = [file.stat().st_mtime for file in steps(out)[-1].iterdir()]
        self.save_time = max(written) - min(written)

    def disturb(self, out: Path) -> None:
        """Start the run, kill it at the next moment that is aimed at, start it again …, until it is finished."""
        finished = False
        while not finished:
            newest = max((int(step.name[5:]) for step in steps(out) if not damage(step)), default=0)
            stale = torn(out)
            with self.start(out) as run:
                if self.strike(run, out, newest, stale) and run.kill():
                    self.aims.pop()
                    self.bar.update()
                    self.count.update(["kills", "in a save" if torn(out) - stale else "between" if run.steps else "before step 1"])
                    self.look(out)
                else:
                    run.end()
                    finished = True
            if run.steps or run.resumed:
                self.count["wrong resumes"] += run.resumed != newest
        self.count["torn, left at the end"] += len(torn(out))

    def look(self, out: Path) -> None:
        """Name and count every checkpoint that has its final name and is not whole."""
        for step in steps(out):
            if step not in self.broken and (problem := damage(step)):
                self.broken.add(step)
                self.bar.write(f"{step} is torn: {problem}", file=sys.stderr)
                self.count["torn, looks complete"] += 1

    def strike(self, run: Run, out: Path, newest: int, stale: set) -> bool:
        """Wait for a random moment of the kind that is next to be hit. False if there is none, or the run is over before it."""
        if not self.aims:
            return False
        if self.aims[-1] == "before step 1":
            return not run.over.wait(self.dice.uniform(0, self.start_time))
        run.wait(run.moving)
        if self.aims[-1] == "between":
            return not run.over.wait(self.dice.uniform(0, 2 * self.interval))
        begun, which = set(), self.dice.randint(1, 2)  # the first or the second save of this process
        while len(begun) < which:
            if run.over.wait(0.001):
                return False
            begun |= {path for path, _ in torn(out) - stale if int(path.name[6:-8]) > newest}  # smaller ones are being removed
        return not run.over.wait(self.dice.uniform(0, self.save_time))


def torn(out: Path) -> set[tuple[Path, int]]:
    """Checkpoints in the making or left behind, still hidden, with the time of their last change."""
    found = set()
    for path in out.glob(".step-*.partial"):
        with contextlib.suppress(FileNotFoundError):  # renamed meanwhile
            found.add((path, path.stat().st_mtime_ns))
    return found


def compare(reference: Path, out: Path) -> Counter:
    """How many tensors and how many lines of metrics.jsonl are not exactly the reference's."""
    ours, theirs = tensors(out), tensors(reference)
    return Counter({"differing tensors": sum(ours.get(key) != theirs.get(key) for key in ours | theirs),
                    "differing losses": sum(a != b for a, b in itertools.zip_longest(curve(out), curve(reference)))})  # fmt: skip


def tensors(out: Path) -> dict[tuple, tuple]:
    """Every tensor of the final model and of the checkpoints kept: (file, name) -> dtype, shape, bytes."""
    files = [*out.glob("*.safetensors"), *out.glob("step-*/*.safetensors")]
    return {(file.relative_to(out), name): (array.dtype, array.shape, array.tobytes())
            for file in files for name, array in load_file(file).items()}  # fmt: skip


def curve(out: Path) -> list[dict]:
    """metrics.jsonl without what depends on the speed of the machine."""
    return [{key: value for key, value in line.items() if key not in OF_THE_MACHINE} for line in read_metrics(out / "metrics.jsonl")]
