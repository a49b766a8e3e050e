"""From the spool to what the trainers read: find the duplicates, copy what stays to train and val, count everything.

Nothing here costs much: the texts are encoded already, and the copying runs at the speed of the disk. So a run that is
killed here begins this part again.
"""

from __future__ import annotations

from settings import read_json

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from dedup import DUPLICATE, find_duplicates
from spool import DOCUMENT, EXAMPLES, copy_bytes, excerpt, read_rows
from token_files import SPLITS

DROP, TRAIN, VAL = 0, 1, 2
LENGTH_EDGES = (0, *(1 << power for power in range(4, 24)))  # of the histogram: 0-15, 16-31, 32-63 …


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
    lengths = np.zeros(len(LENGTH_EDGES) - 1, np.int64)
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
                    lengths += np.histogram(size, LENGTH_EDGES)[0]
                    for name, rows in (("kept", stays), ("exact", kind == 0), ("near", kind == 1)):
                        tally[name] += np.bincount(documents["source"][rows], minlength=sources)
                tally["written"] += np.bincount(documents["source"][goal != DROP], minlength=sources)
                _copy_runs(documents, goal, payload, splits, on_progress)
    for split in splits.values():
        split.close()
    return {
        "splits": {name: split.counts() for name, split in splits.items() if split.documents},
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

    def counts(self) -> dict:
        return {"documents": self.documents, **self.sums, "max_id": self.max_id, "by_source": self.by_source.tolist(),
                "sha256": self.sha256.hexdigest()}  # fmt: skip


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
    """OUT.shard-1-of-n … OUT.shard-n-of-n, in this order; those that are there."""
    return sorted(out.parent.glob(f"{out.name}.shard-*-of-*"), key=lambda path: int(path.name.split(".shard-")[1].split("-")[0]))


def shard_settings(folder: Path) -> dict | None:
    """The settings of a finished shard; None if it is not finished."""
    if not (folder / "progress.json").is_file():
        return None
    progress = read_json(folder / "progress.json")
    return progress["settings"] if progress["complete"] else None
