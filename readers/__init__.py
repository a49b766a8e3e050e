"""Readers: one small generator per corpus, from a file as found in the wild to plain texts or conversations.

To add your corpus, copy the function that is nearest to it, in `pretraining.py` (yields one text per document) or in
`instructions.py` (yields one list of messages per conversation), and change its name, its docstring and its body.
Nothing else has to know: the decorator enters it into the table that `python data_process.py list` prints.

A reader gets one open `SourceFile` and asks it for `text()`, `lines()`, `json_objects()` or `csv_rows()`. These open by
content, not by suffix; they know which line they are at, so every complaint names it; and a record that is skipped
is counted with its reason. A reader never strips or filters: `tidy` and `tidy_conversation` do that for all of them.
"""

from __future__ import annotations

from settings import UserError

import difflib
import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from readers.source import SourceFile, tidy  # noqa: F401 (for those who import from here)

# ----------------------------------------------------------------------------------------------------------------------
# The two tables of readers


@dataclass(frozen=True)
class Reader:
    """One entry of the table. `read(file)` yields texts or conversations; `layout` is its docstring's first line."""

    name: str
    read: Callable[[SourceFile], Iterator]
    layout: str
    files: tuple[str, ...]  # which files of a folder belong to the corpus
    source: str  # where people get it


PRETRAINING: dict[str, Reader] = {}
INSTRUCTIONS: dict[str, Reader] = {}


def pretraining_reader(name: str, *, files: tuple[str, ...], source: str):
    """Decorator: enter a generator of texts under `name`."""
    return _enter(PRETRAINING, name, files, source)


def instruction_reader(name: str, *, files: tuple[str, ...], source: str):
    """Decorator: enter a generator of conversations (lists of {"role", "content"}) under `name`."""
    return _enter(INSTRUCTIONS, name, files, source)


def _enter(table, name, files, source):
    def enter(read):
        table[name] = Reader(name, read, read.__doc__.strip().splitlines()[0], files, source)
        return read

    return enter


# ----------------------------------------------------------------------------------------------------------------------
# NAME=PATH: one corpus of the command line


@dataclass
class Corpus:
    """What the user named: a reader and the files it shall read, in an order that is the same on every machine."""

    reader: Reader
    path: Path
    files: list[Path]
    sizes: list[int]  # bytes
    skipped: dict[str, dict] = field(default_factory=dict)  # reason -> {"count": 3, "first": "file:line"}

    @classmethod
    def from_argument(cls, argument: str, table: dict[str, Reader]) -> Corpus:
        """Parse "NAME=PATH". Raises UserError for an unknown name (with the nearest) and for a path without files."""
        name, equals, where = argument.partition("=")
        if not equals or not where:
            example = f"{next(iter(table))}={argument}"
            raise UserError(f"{argument!r} names no reader: write NAME=PATH, for example {example}")
        if name not in table:
            near = difflib.get_close_matches(name, table, n=1)
            hint = f"did you mean {near[0]}? " if near else ""
            raise UserError(f"unknown reader {name!r} in {argument!r}; {hint}There are {', '.join(table)}")
        reader, path = table[name], Path(where)
        if not path.exists():
            raise UserError(f"{path} does not exist (given as {argument!r})")
        files = [path] if path.is_file() else _files_below(path, reader.files)
        if not files:
            raise UserError(f"{path} holds no file that {name} reads ({' '.join(reader.files)})")
        return cls(reader, path, files, [file.stat().st_size for file in files])

    def identity(self) -> dict:
        """What decides whether a later run has the same input: names, sizes, and the head and tail of every file."""
        digest = hashlib.sha256()
        for file, size in zip(self.files, self.sizes):
            with open(file, "rb") as stream:
                head = stream.read(1 << 16)
                stream.seek(max(0, size - (1 << 16)))
                tail = stream.read(1 << 16)
            name = file.relative_to(self.path).as_posix() if file != self.path else file.name
            digest.update(f"{name}\n{size}\n".encode("utf-8", "surrogateescape"))
            digest.update(hashlib.sha256(head + tail).digest())
        counts = {"files": len(self.files), "bytes": sum(self.sizes)}
        return {"name": self.reader.name, **counts, "sha256": digest.hexdigest()}

    def records(self, on_progress: Callable[[int], None] = lambda count: None) -> Iterator[tuple[SourceFile, object]]:
        """Every (file, text or conversation) in order; the caller may `file.skip(reason)` it.

        on_progress(n) is told now and then that n more bytes were read. Raises UserError if a file has no valid record.
        """
        self.skipped.clear()
        for path in self.files:
            with SourceFile(path, self.reader.name, self._count_skipped) as file:
                if file.size == 0:
                    file.skip("empty file")
                    continue
                count = reported = 0
                for record in self.reader.read(file):
                    yield file, record
                    count += 1
                    if count % 64 == 0:
                        on_progress(file.bytes_read() - reported)
                        reported = file.bytes_read()
                on_progress(file.size - reported)
                if not count and file.first_broken:
                    raise UserError(f"{file.first_broken}; {path} has no valid record at all")

    def _count_skipped(self, reason: str, where: str) -> None:
        self.skipped.setdefault(reason, {"count": 0, "first": where})["count"] += 1

    def skipped_text(self) -> str:
        """'3 not valid JSON (first: a.jsonl:7), 1 empty file (first: b.jsonl)', or ''."""
        return ", ".join(f"{entry['count']:,} {why} (first: {entry['first']})" for why, entry in self.skipped.items())


def _files_below(folder: Path, patterns: tuple[str, ...]) -> list[Path]:
    """All files of a folder and its subfolders that match; hidden ones (.git …) are left out; sorted by path."""
    found = {path for pattern in patterns for path in folder.rglob(pattern) if path.is_file()}
    visible = [path for path in found if not any(part.startswith(".") for part in path.relative_to(folder).parts)]
    return sorted(visible, key=lambda path: path.relative_to(folder).as_posix())


from readers import instructions, pretraining  # noqa: E402, F401 (importing them fills the two tables above)
