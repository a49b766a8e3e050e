"""Readers: one small generator per corpus, from a file as found in the wild to plain records.

To add your corpus, copy the function that is nearest to it, and change its name, its docstring and its body:

    pretraining.py    yields one text (str) per document
    instructions.py   yields one list of messages [{"role", "content"}] per conversation
    preferences.py    yields {"prompt": [messages], "chosen": str, "rejected": str}

Nothing else has to know: the decorator enters it into the table that `python data_process.py list` prints.

A reader gets one open `SourceFile` and asks it for `text()`, `lines()`, `json_objects()`, `json_values()`, `csv_rows()`,
`parquet_rows()`, or `rows()` where all of them occur. These open by content, not by suffix, compressed or not; they know
which line they are at, so every complaint names it; and a record that is skipped is told to the caller with its reason.
A reader never strips or filters: what comes after it does that for all of them.
"""

from __future__ import annotations

from settings import UserError

import difflib
import hashlib
import math
import os
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from readers.opening import matches, open_zip, zip_members
from readers.source import SourceFile, tidy  # noqa: F401 (for those who import from here)

# ----------------------------------------------------------------------------------------------------------------------
# The tables of readers


@dataclass(frozen=True)
class Download:
    """One file that a reader's corpus consists of, and where it can be fetched."""

    path: str  # file name below the folder of the corpus
    urls: tuple[str, ...]  # mirrors, tried in this order
    sha256: str | None = None  # 64 hex digits; None: the registry does not know it
    size: int | None = None  # bytes


@dataclass(frozen=True)
class Reader:
    """One entry of the table. `read(file)` yields its records; `layout` is its docstring's first line."""

    name: str
    read: Callable[[SourceFile], Iterator]
    layout: str
    files: tuple[str, ...]  # which files of a folder belong to the corpus
    source: str  # where people get it
    licence: str = ""
    size: str = ""  # as people say it: "16 GB, 5.6 million articles"
    downloads: tuple[Download, ...] = ()  # what `data_process.py download NAME` fetches


HUBS = ("https://huggingface.co", "https://hf-mirror.com")


def hugging_face(repository: str, *paths: str) -> tuple[Download, ...]:
    """Files of a data set on the Hugging Face hub and on its mirror in China; sizes and checksums are not known."""
    return tuple(
        Download(path.rpartition("/")[2], tuple(f"{hub}/datasets/{repository}/resolve/main/{path}" for hub in HUBS))
        for path in paths
    )


PRETRAINING: dict[str, Reader] = {}
INSTRUCTIONS: dict[str, Reader] = {}
PREFERENCES: dict[str, Reader] = {}


def pretraining_reader(name: str, **entry):
    """Decorator: enter a generator of texts under `name`. The other arguments are the fields of `Reader`."""
    return _enter(PRETRAINING, name, entry)


def instruction_reader(name: str, **entry):
    """Decorator: enter a generator of conversations (lists of {"role", "content"}) under `name`."""
    return _enter(INSTRUCTIONS, name, entry)


def preference_reader(name: str, **entry):
    """Decorator: enter a generator of {"prompt": [messages], "chosen": str, "rejected": str} under `name`."""
    return _enter(PREFERENCES, name, entry)


def _enter(table: dict[str, Reader], name: str, entry: dict):
    def enter(read):
        table[name] = Reader(name, read, read.__doc__.strip().splitlines()[0], **entry)
        return read

    return enter


# ----------------------------------------------------------------------------------------------------------------------
# NAME=PATH: one corpus of the command line

ARCHIVES = ("*.zip", "*.rar", "*.7z", "*.tar", "*.tar.*", "*.tgz")  # zip is read, if it is not inside another one
_KINDS = {
    "data_process.py pretrain": ("a pretraining reader", PRETRAINING),
    "data_process.py sft": ("an instruction reader", INSTRUCTIONS),
    "data_process.py preferences": ("a preference reader", PREFERENCES),
}


@dataclass
class Corpus:
    """What the user named: a reader and the files it shall read, in an order that is the same on every machine."""

    reader: Reader
    path: Path
    files: list[Path]  # on the disk; an archive stands here once per member
    members: list[str]  # of a zip archive; "" where the file is none
    sizes: list[int]  # bytes on the disk, compressed or not
    weight: float = 1.0
    strict: bool = False
    _archive: zipfile.ZipFile | None = None  # the last one that was opened

    @classmethod
    def from_argument(cls, argument: str, table: dict[str, Reader], *, strict: bool = False) -> Corpus:
        """Parse "NAME=PATH" or "NAME:0.3=PATH", where 0.3 is the weight.

        With `strict` the first bad record is a UserError. Raises UserError for an unknown name (with the nearest), a
        weight that is not above 0, and a path without files.
        """
        name, equals, where = argument.partition("=")
        if not equals or not where:
            example = f"{next(iter(table))}={argument}"
            raise UserError(f"{argument!r} names no reader: write NAME=PATH, for example {example}")
        name, colon, weight = name.partition(":")
        if name not in table:
            raise UserError(f"unknown reader {name!r} in {argument!r}; {_nearest(name, table)}")
        try:
            weight = float(weight) if colon else 1.0
        except ValueError:
            weight = math.nan
        if not 0 < weight < math.inf:
            raise UserError(f"{argument!r}: the weight must be a number above 0, as in {name}:0.3={where}")
        reader, path = table[name], Path(where)
        found = _find(path, reader)
        return cls(reader, path, *map(list, zip(*found)), weight=weight, strict=strict)

    def identity(self) -> dict:
        """What decides whether a later run has the same input: names, sizes, and the head and tail of every file."""
        digest, before = hashlib.sha256(), None
        for file, member, size in zip(self.files, self.members, self.sizes):
            name = file.relative_to(self.path).as_posix() if file != self.path else file.name
            digest.update(f"{name}{'!' * bool(member)}{member}\n{size}\n".encode("utf-8", "surrogateescape"))
            if file == before:  # another member of the same archive
                continue
            before = file
            with open(file, "rb") as stream:
                head = stream.read(1 << 16)
                stream.seek(max(0, file.stat().st_size - (1 << 16)))
                tail = stream.read(1 << 16)
            digest.update(hashlib.sha256(head + tail).digest())
        counts = {"files": len(self.files), "bytes": sum(self.sizes), "weight": self.weight}
        return {"name": self.reader.name, **counts, "sha256": digest.hexdigest()}

    def records(
        self,
        on_progress: Callable[[int], None] = lambda count: None,
        on_skip: Callable[[str, str], None] = lambda reason, where: None,
        start: tuple[int, int] = (0, 0),
    ) -> Iterator[tuple[SourceFile, object]]:
        """Every (file, text, conversation or preference) in order.

        on_progress(n) is told now and then that n more bytes were read; on_skip(reason, "file:line") of every record
        that is left out. `start` = (index of a file, its records that a run before has dealt with): these are passed
        over, with all that was skipped up to there, and the files before are not even opened.

        A file that is damaged, cut off or of another layout is left out from there on, and on_skip is told. With
        `strict` it is a UserError; without, the first such file is one at the end if no file held any record.
        """
        first, done = start
        found, silent, first_error = any(start), False, None

        def skip(reason: str, where: str, details: str) -> None:
            if self.strict:
                raise UserError(f"{where}: {reason}{details} (without --strict such records are left out and counted)")
            if not silent:
                on_skip(reason, where)

        for index, size in enumerate(self.sizes):
            if index < first:
                on_progress(size)
                continue
            passed_over = done if index == first else 0
            count = reported = 0
            silent = passed_over > 0
            try:
                with self._open(index, skip) as file:
                    if file.empty:
                        file.skip("empty file")
                        continue
                    for record in self.reader.read(file):
                        found, count = True, count + 1
                        silent = count < passed_over
                        if count > passed_over:
                            yield file, record
                        if count % 64 == 0:
                            on_progress(file.bytes_read() - reported)
                            reported = file.bytes_read()
                    if not count and file.first_broken:
                        raise UserError(f"{file.first_broken}; {file.path} has no valid record at all")
            except UserError as error:
                if self.strict:
                    raise
                first_error = first_error or error
                on_skip("the rest of a file that cannot be read (an unknown number of records)", str(error))
            on_progress(size - reported)
        if first_error and not found:
            raise first_error

    def _open(self, index: int, skip) -> SourceFile:
        path, member = self.files[index], self.members[index]
        if member and (self._archive is None or self._archive.filename != str(path)):
            self._archive = open_zip(path)  # stays open: an archive may have 100,000 members, all listed in its tail
        return SourceFile(path, self.reader.name, skip, index=index, member=member, archive=self._archive)


def _nearest(name: str, table: dict[str, Reader]) -> str:
    """What to say of a name that is not in the table: it is in another one, it is nearly one of these, or the list."""
    for command, (kind, other) in _KINDS.items():
        if name in other:
            return f"{name} is {kind}: use it with `{command}`"
    near = difflib.get_close_matches(name, table, n=1)
    return (f"did you mean {near[0]}? " if near else "") + f"There are {', '.join(table)}"


def _find(path: Path, reader: Reader) -> list[tuple[Path, str, int]]:
    """(file, member of the zip archive or "", size on the disk in bytes) of what the reader reads below `path`, sorted.

    A file that the user names is read whatever its name, and so is the only member of an archive. Archives inside
    archives, and those of other kinds, are not opened: a line says so.
    """
    if not path.exists():
        raise UserError(f"{path} does not exist")
    found, packed, named = [], [], path.is_file()
    for file in [path] if named else _files_below(path):
        name = file.relative_to(path)
        if not named and not matches(name, (*reader.files, *ARCHIVES)):
            continue
        members = zip_members(file)
        if members is None:
            if named or matches(name, reader.files):
                found.append((file, "", file.stat().st_size))
            else:
                packed.append(str(file))
        for member, size in members or ():
            if matches(PurePosixPath(member), reader.files) or (named and len(members) == 1):
                found.append((file, member, size))
            elif matches(PurePosixPath(member), ARCHIVES):
                packed.append(f"{file}!{member}")
    if not found:
        nothing = f"no file that {reader.name} reads ({' '.join(reader.files)})"
        raise UserError(f"{packed[0]} has to be unpacked first; beside it there is {nothing}" if packed else f"{path} holds {nothing}")
    if packed:
        more = f" and {len(packed) - 3} more" if len(packed) > 3 else ""
        print(f"passed over, as they have to be unpacked first: {', '.join(packed[:3])}{more}")
    return found


def _files_below(folder: Path) -> list[Path]:
    """All files of a folder and its subfolders, by path. Links to folders are followed, each folder once."""
    files, seen = [], set()
    for place, folders, names in os.walk(folder, followlinks=True):
        if os.path.realpath(place) in seen:  # a link to a folder above it, or to one that is here anyway
            folders.clear()
            continue
        seen.add(os.path.realpath(place))
        folders.sort()  # so that it does not depend on the disk by which of two ways a folder is found
        files += [path for name in names if (path := Path(place, name)).is_file()]
    return sorted(files, key=lambda path: path.relative_to(folder).as_posix())


from readers import instructions, preferences, pretraining  # noqa: E402, F401 (importing them fills the tables above)
