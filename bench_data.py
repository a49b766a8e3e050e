"""bench.py data: text to token files, MB/s by number of workers, beside a bare loop over the same texts.

A side is the whole of data_process.py pretrain (reading, encoding, writing, checksums), with or without cleaning and
deduplication, or sentencepiece's own encode() over texts that are in memory already.
"""

from __future__ import annotations

from settings import UserError, flag

import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from bench_turns import Config, each, middle, report, spread, take_turns
from progress import human

DATA_SIDE = re.compile(r"(?P<bare>sentencepiece)(\*(?P<processes>[1-9]\d*))?|(?P<workers>[1-9]\d*)(\+(?P<extra>clean|minhash))?")
DATA_RUN = """
import json, sys, time
from pathlib import Path
import data_process
order = json.loads(sys.argv[1])
order |= {"corpus": tuple(order["corpus"]), "without": tuple(order.get("without", ())), "tokenizer": Path(order["tokenizer"]),
          "out": Path(order["out"])}
config, start = data_process.PretrainConfig(**order), time.perf_counter()
data_process.prepare(config)
print(time.perf_counter() - start)
"""


@dataclass(frozen=True, kw_only=True)
class DataConfig(Config):
    tokenizer: Path = flag(help="directory with tokenizer.model or tokenizer.json, or such a file")
    input: tuple[str, ...] = flag(help='text files, one document per line; .jsonl: {"text": "…"} per line')
    sides: tuple[str, ...] = flag(("sentencepiece", "1", "1+clean"), "what to compare: `2`, the whole of data_process.py pretrain "
                                  "with 2 workers (a small input is encoded by fewer); `2+clean`, with cleaning and exact "
                                  "deduplication; `2+minhash`, with near deduplication too; `sentencepiece`, a bare loop over "
                                  "the texts in memory, `sentencepiece*2` in two processes")  # fmt: skip

    def problems(self) -> list[str]:
        found = super().problems() + [f"--input {path} is no file" for path in self.input if not Path(path).is_file()]
        return found + [f"--sides {side}: sentencepiece[*N] or N[+clean|+minhash] is needed" for side in self.sides
                        if not DATA_SIDE.fullmatch(side)]  # fmt: skip


def data_worker(config: DataConfig, side: str) -> dict:
    """The whole of `data_process.py pretrain` (reading, encoding, writing, checksums), or the bare loop that it is measured by."""
    side = DATA_SIDE.fullmatch(side)
    if side["bare"]:
        return bare_worker(config, int(side["processes"] or 1))
    corpora = [f"{'jsonl' if Path(path).suffix == '.jsonl' else 'lines'}={path}" for path in config.input]
    steps = {None: {"dedup": "none", "without": ["all"]}, "clean": {"dedup": "exact"}, "minhash": {"dedup": "minhash"}}
    with tempfile.TemporaryDirectory() as folder:
        order = {"corpus": corpora, "tokenizer": str(config.tokenizer), "out": f"{folder}/data", "workers": int(side["workers"]),
                 "val_fraction": 0.0, **steps[side["extra"]]}  # fmt: skip
        # In a process that holds no torch, because its workers would import it too.
        here = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parent)}
        done = subprocess.run([sys.executable, "-c", DATA_RUN, json.dumps(order)], env=here, capture_output=True, encoding="utf-8",
                              errors="replace")  # fmt: skip
        if done.returncode:
            raise UserError(done.stderr.strip().rpartition("\n")[2].removeprefix("settings.UserError: "))
        report = json.loads(Path(folder, "data", "report.json").read_text(encoding="utf-8"))
    size = sum(source["input_bytes"] for source in report["sources"])
    return {"seconds": float(done.stdout.splitlines()[-1]), "bytes": size, "tokens": report["splits"]["train"]["tokens"],
            "device": "", "versions": ""}  # fmt: skip


def bare_worker(config: DataConfig, processes: int) -> dict:
    """sentencepiece's own encode() over the same texts, which are in memory before the clock starts."""
    texts = []
    for path in config.input:
        with open(path, encoding="utf-8") as file:
            texts += [json.loads(line)["text"] if path.endswith(".jsonl") else line.strip() for line in file if not line.isspace()]
    model = next(Path(config.tokenizer).glob("*.model"), None) if Path(config.tokenizer).is_dir() else Path(config.tokenizer)
    if model is None:
        raise UserError(f"{config.tokenizer} holds no sentencepiece model to compare with")
    share = len(texts) // processes + 1
    parts = [texts[at * share : (at + 1) * share] for at in range(processes)]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, mp_context=context, initializer=_bare_start, initargs=(str(model),)) as pool:
        list(pool.map(_bare_loop, [["begin"]] * processes))
        start = time.perf_counter()
        tokens = sum(pool.map(_bare_loop, parts))
        seconds = time.perf_counter() - start
    return {"seconds": seconds, "bytes": sum(os.path.getsize(path) for path in config.input), "tokens": tokens,
            "device": "", "versions": ""}  # fmt: skip


def _bare_start(model: str) -> None:
    global _processor
    import sentencepiece

    _processor = sentencepiece.SentencePieceProcessor(model_file=model)


def _bare_loop(texts: list[str]) -> int:
    return sum(len(_processor.encode(text)) for text in texts)


def data(config: DataConfig) -> dict:
    runs = take_turns("data", config, list(config.sides))
    rows, summary = [], {}
    for side, results in runs.items():
        seconds = middle(results, "seconds")
        megabytes, tokens = results[0]["bytes"] / 1e6, results[0]["tokens"]
        summary[side] = {"mb_per_s": megabytes / seconds, "tokens_per_s": tokens / seconds, "tokens": tokens}
        rows.append((side, f"{seconds:.2f}", spread(results), f"{megabytes / seconds:.2f}", human(tokens / seconds)))
    title = f"{megabytes:,.1f} MB of text to {tokens:,} tokens, tokenizer {config.tokenizer}"
    header = ("side", "seconds", "spread", "MB/s", "tokens/s")
    first = config.sides[0]
    for number, (side, results) in enumerate(runs.items()):
        summary[side]["relative"] = median(a / b for a, b in zip(each(runs[first], "seconds"), each(results, "seconds")))
        rows[number] = (*rows[number], f"{summary[side]['relative']:.2f}")
    header = (*header, f"speed / {first}, pair by pair")
    return report(config, title, header, rows, runs, summary)
