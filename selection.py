"""From the spool to what the trainers read: find the duplicates, copy what stays to train and val, count everything.

Nothing here costs much: the texts are encoded already, and the copying runs at the speed of the disk. So a run that is
killed here begins this part again.
"""

from __future__ import annotations

from settings import UserError, read_json

import hashlib
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from tqdm import tqdm

from data_report import checked, report_markdown
from dedup import DUPLICATE, find_duplicates
from files import copy_files, write_json, write_text
from spool import DOCUMENT, EXAMPLES, Spool, copy_bytes, excerpt, read_rows
from token_files import FORMAT, SPLITS, token_dtype
from tokenizer import Tokenizer

FORMATS = {"pretrain": FORMAT, "sft": "cria-messages-1", "preferences": "cria-preferences-1"}
NOUNS = {"pretrain": "document", "sft": "conversation", "preferences": "pair"}
UNITS = {"pretrain": "tokens", "sft": "answers", "preferences": "pairs"}
DROP, TRAIN, VAL = 0, 1, 2
LENGTH_EDGES = (0, *(1 << power for power in range(4, 24)))  # of the histogram: 0-15, 16-31, 32-63 … 8,388,608 and more


def finish(spool: Spool, partial: Path, out: Path, tokenizer: Tokenizer | None, memory: int) -> dict:
    """Select from a complete spool in PARTIAL/spool, write the reports and meta.json, rename PARTIAL to OUT.

    `memory` in bytes is for the duplicates. Returns the report, which tells of the data alone, not of where and how fast it was
    made: the same run leaves the same bytes. Raises UserError if there is nothing to write, or nothing in a split.
    """
    settings, folder, kind = spool.settings, spool.folder, spool.settings["command"]
    dtype = token_dtype(len(tokenizer)) if tokenizer else None
    refuse_nothing(spool)
    with tqdm(total=1.0, desc="duplicates", disable=None, bar_format="{desc}: {percentage:3.0f}%|{bar}| {elapsed}<{remaining}") as bar:
        duplicates = duplicates_of(folder, settings, memory, lambda fraction: bar.update(fraction - bar.n))
    with progress_bar("writing", (folder / "payload.bin").stat().st_size) as bar:
        chosen = select(folder, partial, settings, duplicates, dtype, bar.update)
    refuse_empty_split(chosen["splits"], kind, settings["val_fraction"])
    examples = duplicate_examples(folder, duplicates, len(settings["corpora"]), _reader_of_payload(tokenizer, dtype))
    sources = source_reports(settings, spool.totals, chosen, examples)
    lengths = {"unit": "tokens" if tokenizer else "characters", **chosen["lengths"]}
    report = checked({"command": kind, "settings": settings, "sources": sources, "splits": chosen["splits"], "lengths": lengths,
                      "questions": settings["questions"]})  # fmt: skip
    meta = {"format": FORMATS[kind], "splits": chosen["splits"], "settings": settings}
    if tokenizer:
        meta |= {"dtype": dtype.name, "vocab_size": len(tokenizer), "tokenizer_sha256": tokenizer.fingerprint,
                 "add_bos": tokenizer.add_bos, "eos_id": tokenizer.eos_id}  # fmt: skip
        copy_files(folder / "tokenizer", partial)
    write_json(partial / "report.json", report)
    write_text(partial / "report.md", report_markdown(report))
    write_json(partial / "meta.json", meta)
    os.rename(partial, out)
    shutil.rmtree(out / "spool")  # last: until here the same command would still go on from it
    return report


def progress_bar(title: str, total: int) -> tqdm:
    """Counts bytes; shows nothing where stderr is not a terminal."""
    return tqdm(total=total, unit="B", unit_scale=True, desc=title, disable=None)


def refuse_nothing(spool: Spool) -> None:
    """Raise UserError if no document came out at all, and say what became of the records."""
    if any(total["documents"] for total in spool.totals):
        return
    reasons = [f"{entry['count']:,} {reason} (first: {entry['examples'][0]['where']})" for total in spool.totals
               for reason, entry in {**total["unreadable"], **total["dropped"]}.items()]  # fmt: skip
    reasons += [f"{total['not_sampled']:,} not in the share that the weight takes" for total in spool.totals if total["not_sampled"]]
    paths = ", ".join(total["path"] for total in spool.totals)
    raise UserError(f"{paths} holds no {NOUNS[spool.settings['command']]} to write: {', '.join(reasons) or 'it is empty'}")


def refuse_empty_split(splits: dict[str, dict], kind: str, val_fraction: float) -> None:
    """Raise UserError if a split that was asked for got nothing."""
    total = sum(counts["documents"] for counts in splits.values())
    for split in SPLITS if val_fraction else SPLITS[:1]:
        if split not in splits:
            example = max(0.001, min(0.5, round(3 / total, 3)))
            advice = f"use {example:g}, say" if total > 1 else "use a text that makes more documents (reader lines?)"
            raise UserError(
                f"none of the {total:,} {NOUNS[kind]}s fell into the {split} split with --val-fraction {val_fraction:g}: "
                f"{advice}, or 0 for no validation split"
            )


def _reader_of_payload(tokenizer: Tokenizer | None, dtype: np.dtype | None) -> Callable[[bytes], str]:
    """The head of a document's payload -> its text."""
    if tokenizer is None:
        return lambda payload: payload.decode("utf-8", "replace")
    return lambda payload: tokenizer.decode(np.frombuffer(payload, dtype).tolist())


def duplicates_of(spool: Path, settings: dict, memory: int, on_progress) -> Path | None:
    """Find the duplicates among the spool's documents, by the run's settings. None if they are to stay."""
    if settings["dedup"] == "none":
        return None
    out, near = spool / "duplicates.bin", settings["dedup"] == "minhash"
    minhash = {name: settings[name] for name in ("permutations", "threshold", "bands")} if near else {}
    find_duplicates(spool / "documents.bin", spool / "signatures.bin" if near else None, out, record=DOCUMENT, memory=memory,
                    on_progress=on_progress, **minhash)  # fmt: skip
    return out


def select(spool: Path, out: Path, settings: dict, duplicates: Path | None, dtype: np.dtype | None, on_progress) -> dict:
    """Write OUT/train and OUT/val: token files of `dtype`, or JSON lines where that is None.

    Returns {"splits": {split: counts}, "sources": [counts per source], "lengths": histogram of the kept documents' units}.
    on_progress(n): n more bytes of payload were gone through.
    """
    sources = len(settings["corpora"])
    splits = {name: Split(out / f"{name}{'.jsonl' if dtype is None else '.bin'}", dtype, sources) for name in SPLITS}
    tally = {"kept": np.zeros(sources, np.int64), "written": np.zeros(sources, np.int64), "exact": np.zeros(sources, np.int64),
             "near": np.zeros(sources, np.int64)}  # fmt: skip
    lengths = np.zeros(len(LENGTH_EDGES), np.int64)
    rounds = max(1, max(int(np.ceil(corpus["weight"])) for corpus in settings["corpora"]))
    for number in range(rounds):  # a weight of 2 means: the corpus, and later the corpus again, never a text twice in a row
        with open(spool / "payload.bin", "rb") as payload:
            for documents, kind in _with_marks(spool / "documents.bin", duplicates):
                stays = kind < 0
                goal = np.where(stays & (documents["copies"] > number), TRAIN, DROP)
                if settings["val_fraction"]:
                    chosen = stays & (documents["group"] < np.uint64(settings["val_fraction"] * 2.0**64))
                    goal[chosen] = DROP if number else VAL
                if number == 0:
                    size = documents["units" if dtype is not None else "characters"][stays]
                    lengths += np.histogram(size, (*LENGTH_EDGES, np.inf))[0]
                    for name, rows in (("kept", stays), ("exact", kind == 0), ("near", kind == 1)):
                        tally[name] += np.bincount(documents["source"][rows], minlength=sources)
                tally["written"] += np.bincount(documents["source"][goal != DROP], minlength=sources)
                _copy_runs(documents, goal, payload, splits, on_progress)
    for split in splits.values():
        split.close()
    return {
        "splits": {name: split.counts(UNITS[settings["command"]]) for name, split in splits.items() if split.documents},
        "sources": [{name: int(column[source]) for name, column in tally.items()} for source in range(sources)],
        "lengths": {"edges": list(LENGTH_EDGES), "counts": lengths.tolist()},
    }


class Split:
    """train or val while it is written: the open file, its checksum and its counts."""

    def __init__(self, path: Path, dtype: np.dtype | None, sources: int):
        self.path, self.dtype, self.stream, self.sha256 = path, dtype, open(path, "wb"), hashlib.sha256()  # noqa: SIM115
        self.documents = self.max_id = 0
        self.sums = dict.fromkeys(("units", "bytes", "characters"), 0)
        self.by_source = np.zeros(sources, np.int64)  # units

    def write(self, data: bytes) -> None:
        """Called by copy_bytes with pieces of a size that is a multiple of 4: no id is cut in two."""
        self.stream.write(data)
        self.sha256.update(data)
        if self.dtype is not None:
            self.max_id = max(self.max_id, int(np.frombuffer(data, self.dtype).max()))

    def add(self, documents: np.ndarray) -> None:
        self.documents += len(documents)
        for name in self.sums:
            self.sums[name] += int(documents[name].sum(dtype=np.int64))
        self.by_source += np.bincount(documents["source"], documents["units"], len(self.by_source)).astype(np.int64)

    def close(self) -> None:
        self.stream.flush()
        os.fsync(self.stream.fileno())
        self.stream.close()
        if not self.documents:
            self.path.unlink()

    def counts(self, unit: str) -> dict:
        """What meta.json and the report say of it. `sources`: the units of each corpus."""
        counts = {"documents": self.documents, unit: self.sums["units"], "bytes": self.sums["bytes"],
                  "characters": self.sums["characters"], "sources": self.by_source.tolist(), "sha256": self.sha256.hexdigest()}  # fmt: skip
        return counts if self.dtype is None else {**counts, "max_id": self.max_id}


def _copy_runs(documents: np.ndarray, goal: np.ndarray, payload, splits: dict[str, Split], on_progress) -> None:
    """Copy neighbours that go to the same place in one piece."""
    starts = np.flatnonzero(np.diff(goal, prepend=-1))
    for start, end in zip(starts, [*starts[1:], len(goal)]):
        size = int(documents["payload"][start:end].sum(dtype=np.int64))
        if goal[start] == DROP:
            payload.seek(size, os.SEEK_CUR)
        else:
            split = splits["train" if goal[start] == TRAIN else "val"]
            copy_bytes(payload, split, size)
            split.add(documents[start:end])
        on_progress(size)


def _with_marks(documents: Path, duplicates: Path | None) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Blocks of (DOCUMENT rows [N], kind [N]: -1 for a document that stays, else the kind of duplicate that it is)."""
    marks = read_rows(duplicates, DUPLICATE) if duplicates else iter(())
    pending, start = np.empty(0, DUPLICATE), 0
    for rows in read_rows(documents, DOCUMENT):
        kind = np.full(len(rows), -1)
        end = start + len(rows)
        while True:
            here = pending[: np.searchsorted(pending["document"], end)]
            kind[here["document"] - start] = here["kind"]
            pending = pending[len(here) :]
            if len(pending) or (more := next(marks, None)) is None:
                break
            pending = more
        yield rows, kind
        start = end


def duplicate_examples(spool: Path, duplicates: Path | None, sources: int, as_text) -> list[list[dict]]:
    """For each source the first few duplicates: [{"kind", "text", "original"}], as heads of the texts.

    as_text(payload bytes) -> str. Two runs over the documents' sizes, because the payload has no other index.
    """
    wanted: list[list[int]] = [[] for _ in range(sources)]
    start = 0
    for rows, kind in _with_marks(spool / "documents.bin", duplicates):
        for source, numbers in enumerate(wanted):
            if len(numbers) < EXAMPLES:
                found = np.flatnonzero((kind >= 0) & (rows["source"] == source))[: EXAMPLES - len(numbers)]
                numbers += (start + found).tolist()
        start += len(rows)
    chosen = {document for numbers in wanted for document in numbers}
    originals = {int(row["document"]): (int(row["original"]), int(row["kind"])) for rows in
                 (read_rows(duplicates, DUPLICATE) if duplicates else ()) for row in rows[np.isin(rows["document"], list(chosen))]}
    texts = _texts(spool, chosen | {original for original, _ in originals.values()}, as_text)
    return [[{"kind": ("exact", "near")[originals[document][1]], "text": texts[document], "original": texts[originals[document][0]]}
             for document in numbers] for numbers in wanted]


def _texts(spool: Path, numbers: set[int], as_text) -> dict[int, str]:
    texts, start, offset = {}, 0, 0
    with open(spool / "payload.bin", "rb") as payload:
        for rows in read_rows(spool / "documents.bin", DOCUMENT):
            ends = offset + np.cumsum(rows["payload"], dtype=np.int64)
            for number in sorted(n for n in numbers if start <= n < start + len(rows)):
                size = int(rows["payload"][number - start])
                payload.seek(int(ends[number - start]) - size)
                texts[number] = excerpt(as_text(payload.read(min(size, 4096))))
            start, offset = start + len(rows), int(ends[-1])
    return texts


def source_reports(settings: dict, totals: list[dict], chosen: dict, examples: list[list[dict]]) -> list[dict]:
    """What happened to every record of every corpus: the list `sources` of report.json."""
    reports = []
    for corpus, total, numbers, shown in zip(settings["corpora"], totals, chosen["sources"], examples):
        about = {"name": corpus["name"], "path": total.get("path", ""), "weight": corpus["weight"], "files": corpus["files"],
                 "input_bytes": corpus["bytes"]}  # fmt: skip
        reports.append({
            **about, **{name: total[name] for name in ("encodings", "records", "unreadable", "dropped", "changed", "not_sampled")},
            "duplicates": {"exact": numbers["exact"], "near": numbers["near"], "examples": shown},
            "kept": numbers["kept"], "written": numbers["written"]})  # fmt: skip
    return reports


def shard_folders(out: Path) -> list[Path]:
    """OUT.shard-1-of-n … OUT.shard-n-of-n, in this order. Raises UserError if they are not all there."""
    if not out.parent.is_dir():
        raise UserError(f"{out.parent} does not exist")
    named = {path: re.fullmatch(re.escape(out.name) + r"\.shard-(\d+)-of-(\d+)", path.name) for path in out.parent.iterdir()}
    found = {(int(match[2]), int(match[1])): path for path, match in named.items() if match and path.is_dir()}
    if not found:
        raise UserError(f"there is no {out}.shard-1-of-…; make the shards with --shard i/n --out {out}")
    counts = sorted({parts for parts, _ in found})
    if len(counts) > 1:
        raise UserError(f"there are shards of {' and of '.join(map(str, counts))} beside {out}: remove those that are not meant")
    missing = [f"{part}/{counts[0]}" for part in range(1, counts[0] + 1) if (counts[0], part) not in found]
    if missing:
        raise UserError(f"{out}: missing the shards {', '.join(missing)}")
    return [found[key] for key in sorted(found)]


def shard_settings(folder: Path) -> dict | None:
    """The settings of a finished shard; None if it is not finished."""
    if not (folder / "progress.json").is_file():
        return None
    progress = read_json(folder / "progress.json")
    return progress["settings"] if progress["complete"] else None
