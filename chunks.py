"""Reading: the records of all corpora, cut into the chunks that data_process.py's workers get, and that a killed run counts by."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from readers import Corpus
from spool import START, Chunk, count

CHUNK_CHARACTERS = 1 << 18  # of text that a worker gets at a time
CHUNK_RECORDS = 1 << 12


def chunks(corpora: list[Corpus], on_progress, start: tuple = START, limit: int | None = None) -> Iterator[Chunk]:
    """The records of all corpora in order, cut into chunks; where they are cut depends on the input alone.

    `start` is the `end` of a chunk: reading goes on behind it. What the reader could not use travels with the chunk.
    """
    source, first_file, done, seen, index = start
    for number in range(source, len(corpora)):
        corpus = corpora[number]
        chunk, size, current = Chunk(index, number), 0, first_file if done else -1

        def skipped(reason: str, where: str) -> None:
            nonlocal seen
            if seen == limit:
                raise _Enough
            seen += 1
            count(chunk.unreadable, reason, where)  # noqa: B023 (the chunk of the moment is meant)

        with contextlib.suppress(_Enough):
            for file, record in corpus.records(on_progress, on_skip=skipped, start=(first_file, done)):
                if seen == limit:
                    break
                if file.index != current:
                    current, done = file.index, 0
                    chunk.encodings += [file.encoding] if file.encoding != "utf-8" else []
                chunk.records.append(record)
                chunk.places.append(file.where())
                done, seen, size = done + 1, seen + 1, size + _characters(record)
                if size >= CHUNK_CHARACTERS or len(chunk.records) >= CHUNK_RECORDS:
                    chunk.end = (number, current, done, seen, index + 1)
                    yield chunk
                    index += 1
                    chunk, size = Chunk(index, number), 0
        chunk.end = (number + 1, 0, 0, 0, index + 1)
        yield chunk  # the rest of the corpus; it may be empty
        first_file, done, seen, index = 0, 0, 0, index + 1


class _Enough(Exception):
    """--limit is reached."""


def _characters(record) -> int:
    """About how much text there is in a record."""
    if isinstance(record, str):
        return len(record)
    if isinstance(record, dict):
        return sum(map(_characters, record.values()))
    return sum(map(_characters, record)) if isinstance(record, list) else 0
