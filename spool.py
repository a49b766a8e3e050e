"""The spool: what the workers of data_process.py made of the corpus, in its order, until it is known which documents stay.

Whether a document is a duplicate is known only when all have been seen, and all do not fit into memory. So everything that
costs time is done once, written to the spool, and later copied from there:

    payload.bin       the documents one after the other: token ids, or lines of JSON
    documents.bin     one DOCUMENT per document: digest, sizes, source
    signatures.bin    one row of MinHash per document, where near duplicates are looked for
    chunks.bin        one CHUNK per chunk, by which `merge` puts the shards of several machines into order again
    progress.json     how far the files are valid, and where in the corpus the next chunk begins

progress.json is replaced after the bytes that it speaks of are on the disk; what lies behind them is cut off again. So a
run that was killed anywhere goes on from there, and ends with the same bytes.
"""

from __future__ import annotations

from settings import UserError, read_json

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from files import write_json
from token_files import refuse_other_settings

DOCUMENT = np.dtype([
    ("digest", "V16"),  # equal for equal texts (dedup.digest)
    ("group", "<u8"),  # decides the split: equal texts, and answers to one question, have the same
    ("payload", "<u4"),  # bytes in payload.bin
    ("units", "<u4"),  # tokens of a text, answers of a conversation, 1 for a preference pair
    ("bytes", "<u4"),  # of UTF-8 text
    ("characters", "<u4"),
    ("source", "<u2"),  # which of the corpora
    ("copies", "<u2"),  # how often it is to be written: its corpus' weight
])  # fmt: skip
CHUNK = np.dtype([("index", "<i8"), ("payload", "<i8"), ("documents", "<i8")])
CHUNKS_PER_SAVE = 64
START = (0, 0, 0, 0, 0)  # a place between two chunks: corpus, file, records of that file, records of that corpus, next chunk
EXAMPLES = 3  # of each kind of problem, for the report
VERSION = 1  # of what the workers make of a record: to be raised when a cleaning rule, a digest or a signature changes


@dataclass
class Chunk:
    """Part of a corpus, as the reader leaves it: the unit of work, and of resuming."""

    index: int  # among all chunks of all corpora
    source: int
    records: list = field(default_factory=list)  # texts, conversations or preference pairs
    places: list[str] = field(default_factory=list)  # "file:line" of each
    unreadable: dict = field(default_factory=dict)  # what the reader could not use: see `count`
    encodings: list[str] = field(default_factory=list)  # of the files that begin in this chunk, other than UTF-8
    end: tuple[int, ...] = START  # where the next chunk begins


@dataclass
class Result:
    """What a worker made of a chunk."""

    chunk: int
    source: int
    end: tuple[int, ...]
    payload: bytes
    documents: np.ndarray  # [N] DOCUMENT
    signatures: np.ndarray | None  # [N, permutations] uint32
    counts: dict  # what happened to the records: see new_counts


def new_counts() -> dict:
    """records == unreadable + dropped + not_sampled + documents; each reason is {"count": 3, "examples": [{where, text}]}."""
    return {"records": 0, "documents": 0, "not_sampled": 0, "encodings": {}, "unreadable": {}, "dropped": {},
            "changed": {}}  # fmt: skip


def count(reasons: dict, reason: str, where: str, text: str = "") -> None:
    """Add one record to reasons[reason]; the first few are kept as examples, with the head of their text."""
    entry = reasons.setdefault(reason, {"count": 0, "examples": []})
    entry["count"] += 1
    if len(entry["examples"]) < EXAMPLES:
        entry["examples"].append({"where": printable(where), "text": excerpt(text)})


def excerpt(text: str) -> str:
    """The head of a text, on one line."""
    return printable(" ".join(text[:200].split())[:80])


def printable(text: str) -> str:
    """Without what no UTF-8 file can hold: half characters, and bytes in file names that are in another encoding."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def add_counts(total: dict, more: dict) -> None:
    for name, value in more.items():
        if name == "path":
            total[name] = value
        elif isinstance(value, int):
            total[name] += value
        elif name == "encodings":
            for encoding, files in value.items():
                total[name][encoding] = total[name].get(encoding, 0) + files
        else:
            for reason, entry in value.items():
                mine = total[name].setdefault(reason, {"count": 0, "examples": []})
                mine["count"] += entry["count"]
                mine["examples"] = (mine["examples"] + entry["examples"])[:EXAMPLES]


class Spool:
    """The spool in one folder, open for appending. `settings` are those of the run: a folder of another run is refused."""

    def __init__(self, folder: Path, settings: dict, paths: list[str]):
        self.folder, self.settings = folder, settings
        self.names = ["payload", "documents", "chunks"] + ["signatures"] * (settings["dedup"] == "minhash")
        self.chunks, self.end, self.complete = 0, START, False
        self.totals = [new_counts() for _ in paths]  # per corpus
        sizes = dict.fromkeys(self.names, 0)
        if (folder / "progress.json").is_file():
            saved = read_json(folder / "progress.json")
            home = folder.parent if folder.name == "spool" else folder
            refuse_other_settings(home, saved["settings"], settings)
            self.chunks, self.end, self.complete = saved["chunks"], tuple(saved["end"]), saved["complete"]
            self.totals, sizes = saved["totals"], saved["sizes"]
        for total, path in zip(self.totals, paths):
            total["path"] = printable(path)
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / "progress.json").is_file():  # first, because by it a later run knows that the folder is ours
            self._write_progress(sizes)
        self.files = {}
        for name in self.names:
            self.files[name] = stream = open(folder / f"{name}.bin", "ab")  # noqa: SIM115 (closed in close)
            if stream.tell() < sizes[name]:
                raise UserError(f"{stream.name} is shorter than progress.json says; remove {folder} and start again")
            stream.truncate(sizes[name])

    def __enter__(self) -> Spool:
        return self

    def __exit__(self, *exception) -> None:
        for stream in self.files.values():
            stream.close()

    def append(self, result: Result) -> None:
        rows = np.array([(result.chunk, len(result.payload), len(result.documents))], CHUNK)
        self.files["payload"].write(result.payload)
        self.files["documents"].write(result.documents.tobytes())
        self.files["chunks"].write(rows.tobytes())
        if "signatures" in self.files:
            self.files["signatures"].write(result.signatures.tobytes())
        add_counts(self.totals[result.source], result.counts)
        self.chunks, self.end = self.chunks + 1, result.end
        if self.chunks % CHUNKS_PER_SAVE == 0:
            self.save()

    def save(self) -> None:
        for stream in self.files.values():
            stream.flush()
            os.fsync(stream.fileno())
        self._write_progress({name: stream.tell() for name, stream in self.files.items()})

    def _write_progress(self, sizes: dict[str, int]) -> None:
        write_json(self.folder / "progress.json", {
            "settings": self.settings, "chunks": self.chunks, "end": self.end, "complete": self.complete, "sizes": sizes,
            "totals": self.totals})  # fmt: skip


def read_rows(path: Path, dtype: np.dtype, rows: int = 1 << 14) -> Iterator[np.ndarray]:
    """A file of fixed-size rows, `rows` of them at a time: [<= rows] of `dtype`."""
    with open(path, "rb") as stream:
        while data := stream.read(rows * dtype.itemsize):
            yield np.frombuffer(data, dtype)


def copy_bytes(source, target, count: int) -> None:
    """Append the next `count` bytes of an open file to another."""
    while count:
        data = source.read(min(count, 1 << 20))
        if not data:
            raise UserError(f"{source.name} is shorter than it should be; remove its folder and start again")
        target.write(data)
        count -= len(data)


def join_shards(shards: list[Path], target: Spool) -> None:
    """Fill an empty spool with those of all shards, chunk by chunk in the order of the corpus: as if one machine had made it."""
    tables = [np.fromfile(folder / "chunks.bin", CHUNK) for folder in shards]  # 24 bytes per chunk, 30 MB for a terabyte of text
    chunks, owners = np.concatenate(tables), np.repeat(np.arange(len(shards)), list(map(len, tables)))
    order = np.argsort(chunks["index"], kind="stable")
    if not np.array_equal(chunks["index"][order], np.arange(len(chunks))):
        raise UserError(f"the shards beside {target.folder.parent} do not belong together: chunks are missing or there twice")
    width = {"documents": DOCUMENT.itemsize}
    if "signatures" in target.files:
        width["signatures"] = 4 * target.settings["permutations"]
    for name, stream in target.files.items():
        with contextlib.ExitStack() as stack:
            opened = [stack.enter_context(open(folder / f"{name}.bin", "rb")) for folder in shards]
            for number in order:
                fixed = {"payload": chunks["payload"][number], "chunks": CHUNK.itemsize}
                size = fixed[name] if name in fixed else chunks["documents"][number] * width[name]
                copy_bytes(opened[owners[number]], stream, int(size))
    for folder in shards:
        for total, more in zip(target.totals, read_json(folder / "progress.json")["totals"]):
            add_counts(total, more)
    target.chunks, target.complete = len(order), True
    target.save()
