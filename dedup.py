"""Deduplication: which documents of a corpus repeat an earlier one, word for word or nearly so.

    digests(texts)               16 bytes that are equal for texts with the same letters and digits     (exact copies)
    MinHash().signature(text)    128 numbers; the share that two texts have in common estimates their similarity (near)
    find_duplicates(...)         reads both from files and writes which documents to drop; memory is bounded

The similarity of two texts is the Jaccard index of their sets of character n-grams: the n-grams in both, divided by those
in either. MinHash (Broder, "On the resemblance and containment of documents", 1997) numbers all possible n-grams in
a random order; the smallest number in a set is the same for two sets with probability J. So the share of K such orders
in which the smallest numbers are equal estimates J, with standard error sqrt(J (1 - J) / K).

Nobody can compare all pairs. Locality-sensitive hashing (Leskovec, Rajaraman, Ullman, "Mining of Massive Datasets",
section 3.4) cuts the K numbers into `bands` of `rows`; only documents that agree in all rows of some band are compared.
A pair of similarity J becomes a candidate with probability 1 - (1 - J^rows)^bands.

How the defaults were chosen, and what they find and miss: docs/dedup.md.
"""

from __future__ import annotations

from settings import UserError

import functools
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from files import written_beside

# The defaults. Measured: docs/dedup.md.
NGRAM = 5  # characters
PERMUTATIONS = 128  # numbers of a signature
BANDS = 32  # so 4 rows each
THRESHOLD = 0.5  # of the estimate, from which on two documents are near duplicates
MIN_CHARS = 50  # letters and digits; shorter texts are compared exactly only

DUPLICATE = np.dtype([("document", "<i8"), ("original", "<i8"), ("kind", "u1")])  # a row of the result
EXACT, NEAR = 0, 1  # its kind
LEAST_MEMORY = 1 << 20  # bytes
NEVER = 0xFFFFFFFF  # a signature of nothing but this is of a text that is too short


# ----------------------------------------------------------------------------------------------------------------------
# One document: digest and signature. Both are part of the format of a spool: another constant means another spool.


LAST = 0x33480  # behind the last character of Unicode that is a letter or digit


@functools.cache
def letter_table() -> np.ndarray:
    """[LAST + 1] uint32: code point -> that of its lower case if it is a letter or digit of any script, else 0."""
    lower = (chr(code).lower()[:1] for code in range(LAST))
    return np.array([ord(letter) if letter.isalnum() else 0 for letter in lower] + [0], np.uint32)


def letters(texts: list[str]) -> tuple[np.ndarray, list[int]]:
    """The letters and digits of texts, in lower case: code points [N] uint32 of all, and where each text begins, and N.

    What is compared when texts are: copies that differ in spaces, punctuation or capitals are equal. Many texts at a time,
    because numpy takes as long for one sentence as for a page.
    """
    points = np.frombuffer("".join(texts).encode("utf-32-le", "surrogatepass"), "<u4")
    found = letter_table().take(points, mode="clip")
    kept = found > 0
    bounds, start, count = [0], 0, 0
    for text in texts:
        count += int(np.count_nonzero(kept[start : start + len(text)]))
        start += len(text)
        bounds.append(count)
    return found[kept], bounds


def normalised(text: str) -> str:
    """The letters and digits of one text."""
    return letters([text])[0].tobytes().decode("utf-32-le")


def digests(texts: list[str]) -> list[bytes]:
    """16 bytes (of SHA-256, which processors compute fastest) of each text's letters; of the text itself if it has none."""
    points, bounds = letters(texts)
    data = points.tobytes()
    return [hashlib.sha256(data[4 * start : 4 * end] or text.encode("utf-8", "surrogatepass")).digest()[:16]
            for text, start, end in zip(texts, bounds, bounds[1:])]  # fmt: skip


def digest(text: str) -> bytes:
    return digests([text])[0]


def _mixed(values: np.ndarray) -> np.ndarray:
    """uint64 -> uint64, in place: every bit of the input moves every bit of the output.

    The last steps of splitmix64 (Steele, Lea, Flood, "Fast splittable pseudorandom number generators", 2014).
    """
    values ^= values >> np.uint64(30)
    values *= np.uint64(0xBF58476D1CE4E5B9)
    values ^= values >> np.uint64(27)
    values *= np.uint64(0x94D049BB133111EB)
    values ^= values >> np.uint64(31)
    return values


_ODD = np.uint64(0x9E3779B97F4A7C15)  # 2^64 divided by the golden ratio: far from any pattern in code points


class MinHash:
    """Signatures of texts: the smallest of a_k h + b_k mod 2^32 over the hashes h of a text's n-grams, for k = 1 … K.

    Two n-grams with near code points have near polynomial hashes, which linear maps alone keep near: hence `_mixed`.
    32 bits are computed nearly twice as fast as 64, and two n-grams of one text hardly ever share them.
    """

    BLOCK = 2048  # n-grams at a time: the products of one block stay in the second-level cache, for texts of any length

    def __init__(self, ngram: int = NGRAM, permutations: int = PERMUTATIONS, min_chars: int = MIN_CHARS):
        if not 1 <= ngram <= min_chars:
            raise UserError(f"n-grams of {ngram} characters: needs 1 to the {min_chars} of the shortest text to compare")
        self.ngram, self.permutations, self.min_chars = ngram, permutations, min_chars
        constants = _mixed(np.arange(1, 2 * permutations + 1, dtype=np.uint64) * _ODD)[:, None]
        constants = (constants >> np.uint64(32)).astype(np.uint32)
        self.a, self.b = constants[:permutations] | np.uint32(1), constants[permutations:]  # [K, 1]
        self._products = np.empty(permutations * self.BLOCK, np.uint32)  # used again: new memory costs a third of the time

    def signature(self, text: str) -> np.ndarray:
        """[permutations] uint32 of a text."""
        return self.of_letters(letters([text])[0])

    def of_letters(self, points: np.ndarray) -> np.ndarray:
        """[permutations] uint32 of a text's letters [N] uint32. All NEVER if they are too few."""
        smallest = np.full(self.permutations, NEVER, np.uint32)
        if len(points) >= self.min_chars:
            for start in range(0, len(points) - self.ngram + 1, self.BLOCK):
                hashes = self._hashes(points[start : start + self.BLOCK + self.ngram - 1])
                products = self._products[: self.permutations * len(hashes)].reshape(self.permutations, -1)
                np.multiply(self.a, hashes, out=products)
                products += self.b
                np.minimum(smallest, products.min(axis=1), out=smallest)
        return smallest

    def _hashes(self, points: np.ndarray) -> np.ndarray:
        """[letters - ngram + 1] uint32: a hash of every n-gram, a polynomial in its code points."""
        points = points.astype(np.uint64)
        count = len(points) - self.ngram + 1
        hashes = points[:count].copy()
        for k in range(1, self.ngram):
            hashes *= _ODD
            hashes += points[k : k + count]
        return (_mixed(hashes) >> np.uint64(32)).astype(np.uint32)


# ----------------------------------------------------------------------------------------------------------------------
# All documents: external grouping by hash


def find_duplicates(documents: Path, signatures: Path | None, out: Path, *, record: np.dtype, permutations: int = PERMUTATIONS,
                    threshold: float = THRESHOLD, bands: int = BANDS, memory: int = 1 << 30,
                    on_progress: Callable[[float], None] = lambda fraction: None) -> None:  # fmt: skip
    """Write to `out` one DUPLICATE row per document to drop, sorted by document.

    documents: a file of `record`s, of which the field "digest" (16 bytes) is read. signatures: a file of
    [permutations] uint32 per document, or None to look for exact copies only. The result depends on these, `permutations`,
    `threshold` and `bands` alone.

    All but the first of the documents with one digest go: exact copies of the first. Of the others, a document goes if an
    earlier one that shares a band with it has an estimated similarity of `threshold` or more; `original` is the
    first such. The earlier one may itself go: A ~ B and B ~ C drop B and C. But C never goes because of A alone:
    closing the relation chains texts that have nothing in common, and would cost precision.
    Where many documents share a band, each is compared with the first and with the one before it only, because all pairs of
    such a group are quadratic in number; a boilerplate page can stand in a corpus a million times.

    Costs, with 128 permutations in 32 bands. Memory: at most `memory` bytes of arrays, whatever the number of documents.
    Disk, in a folder beside `out` that is removed at the end: 24 bytes per document for the digests, then 512 for its
    bands, which turn into the pairs to compare: nothing for a document like no other, at most 1,024 bytes. So 60 million
    documents need 31 to 62 GB beside their signatures of 31 GB. Passes: documents and signatures are read once, scratch
    files written once and read once (exact copies twice), and per pair two signatures, at random places.

    Raises OSError if the disk is full (nothing is left behind), UserError if a file is cut off or `memory` too small.
    """
    if bands < 1 or permutations % bands:
        raise UserError(f"{bands} bands: needs a divisor of the {permutations} permutations")
    total = _rows_in(documents, record.itemsize)
    if signatures and _rows_in(signatures, 4 * permutations) != total:
        raise UserError(f"{signatures} holds {_rows_in(signatures, 4 * permutations):,} rows for {total:,} documents")
    scratch = out.with_name(f".{out.name}.scratch")
    shutil.rmtree(scratch, ignore_errors=True)  # of a run that was killed
    scratch.mkdir()
    try:
        search = _Search(scratch, total, permutations, bands, memory, on_progress, phases=5 if signatures else 3)
        exact = search.exact_copies(documents, record)
        pairs = search.candidates(signatures, exact) if signatures else None
        with written_beside(out) as partial, open(partial, "wb") as stream:
            for rows in search.duplicates(exact, pairs, signatures, threshold):
                stream.write(rows.tobytes())
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _rows_in(path: Path, size: int) -> int:
    rows, rest = divmod(path.stat().st_size, size)
    if rest:
        raise UserError(f"{path} is cut off: {path.stat().st_size:,} bytes are not a multiple of {size}")
    return rows


class _Partitions:
    """Rows of uint64 spread over `count` files, each small enough to be sorted in memory; a file keeps their order."""

    def __init__(self, folder: Path, name: str, columns: int, count: int):
        self.columns, self.count = columns, count
        self._prefix = f"{folder / name}-"  # a string: pathlib keeps the name of every path for ever

    def append(self, rows: np.ndarray, part: np.ndarray) -> None:
        """Add rows [n, columns], each to the file that `part` [n] says."""
        part = part.astype(np.uint16)  # numpy sorts 16 bits in linear time
        order = np.argsort(part, kind="stable")
        rows, bounds = rows[order], np.searchsorted(part[order], np.arange(self.count + 1))
        for index in np.flatnonzero(np.diff(bounds)):
            with open(f"{self._prefix}{index}", "ab") as stream:
                stream.write(rows[bounds[index] : bounds[index + 1]])  # tofile() would hide that the disk is full

    def append_by_hash(self, rows: np.ndarray) -> None:
        """Add rows whose first column is a hash: each file gets a range of hashes, and about as many as the others."""
        self.append(rows, (rows[:, 0] >> np.uint64(32)) * np.uint64(self.count) >> np.uint64(32))

    def blocks(self, index: int, most: int) -> Iterator[np.ndarray]:
        """The rows of one file, at most so many at a time."""
        path = f"{self._prefix}{index}"
        if os.path.exists(path):
            with open(path, "rb") as stream:
                while len(block := np.fromfile(stream, np.uint64, most * self.columns)):
                    yield block.reshape(-1, self.columns)

    def all(self, index: int) -> np.ndarray:
        """The rows of one file, where it is known that they are few."""
        path = f"{self._prefix}{index}"
        rows = np.fromfile(path, np.uint64) if os.path.exists(path) else np.empty(0, np.uint64)
        return rows.reshape(-1, self.columns)

    def remove(self, index: int) -> None:
        if os.path.exists(f"{self._prefix}{index}"):
            os.remove(f"{self._prefix}{index}")


class _Search:
    """The steps of find_duplicates. A "range" is a run of `step` documents: all that belongs to it fits into memory."""

    def __init__(self, folder, total, permutations, bands, memory, on_progress, phases):
        self.folder, self.total, self.permutations, self.bands = folder, total, permutations, bands
        self.on_progress, self.phases, self.phase = on_progress, phases, 0
        per_document = 12 * permutations + 200 * bands  # bytes at the peak: signature, band rows or pairs, and copies
        self.step = max(1, memory // per_document)
        self.batch = max(1, memory // (32 * permutations))  # pairs whose signatures are compared at a time
        self.block = max(1, memory // 400)  # rows of a partition at a time; as many may be carried over
        most_files = max(total // self.step, 2 * total * bands // self.block) + 1
        if memory < LEAST_MEMORY or most_files > 1 << 16:
            needed = max(LEAST_MEMORY, memory * most_files >> 15)
            raise UserError(f"{memory:,} bytes of memory are too little for {total:,} documents; {needed:,} are enough")

    def exact_copies(self, documents: Path, record: np.dtype) -> _Partitions:
        """Rows (document, original) of all exact copies, by range."""
        digests = self._by_hash("digests", columns=3, rows=self.total)
        with open(documents, "rb") as stream:
            for start in self._counted(self.total, self.step):
                block = np.fromfile(stream, record, self.step)["digest"]
                halves = np.ascontiguousarray(block).view("<u8").reshape(-1, 2)
                numbers = np.arange(start, start + len(block), dtype=np.uint64)
                digests.append_by_hash(np.column_stack([halves, numbers]))
        copies = self._by_range("exact")
        for index in self._counted(digests.count):
            firsts = np.empty((0, 3), np.uint64)  # of the blocks so far, one per digest: a digest may fill many blocks
            for block in digests.blocks(index, self.block):
                rows = np.concatenate([firsts, block])
                rows = rows[np.lexsort((rows[:, 1], rows[:, 0]))]  # stable: the earliest document stays first
                begins = _run_begins(rows[:, :2])
                firsts = rows[begins]
                original = firsts[np.cumsum(begins) - 1, 2]
                copies.append(np.column_stack([rows[:, 2], original])[~begins], rows[~begins, 2] // np.uint64(self.step))
            digests.remove(index)
        return copies

    def candidates(self, signatures: Path, exact: _Partitions) -> _Partitions:
        """Rows (document, earlier document) of the pairs to compare, by range; some more than once."""
        hashed = self._by_hash("bands", columns=2, rows=self.total * self.bands)
        with open(signatures, "rb") as stream:
            for start in self._counted(self.total, self.step):
                block = np.fromfile(stream, "<u4", self.step * self.permutations).reshape(-1, self.permutations)
                usable = (block != NEVER).any(axis=1)
                usable[exact.all(start // self.step)[:, 0].astype(np.int64) - start] = False
                numbers = np.repeat(np.flatnonzero(usable).astype(np.uint64) + np.uint64(start), self.bands)
                hashed.append_by_hash(np.column_stack([band_hashes(block[usable], self.bands).ravel(), numbers]))
        pairs = self._by_range("pairs")
        for index in self._counted(hashed.count):
            carried = np.empty((0, 2), np.uint64)  # of the blocks so far, the first and the last document of every hash
            for block in hashed.blocks(index, self.block):
                rows = np.concatenate([carried, block])
                order = np.argsort(rows[:, 0], kind="stable")
                rows, new = rows[order], order >= len(carried)
                begins = _run_begins(rows[:, :1])
                later = np.flatnonzero(new & ~begins)
                first = np.flatnonzero(begins)[np.cumsum(begins)[later] - 1]
                other = first != later - 1
                document, earlier = np.append(later, later[other]), np.append(first, later[other] - 1)
                found = np.column_stack([rows[document, 1], rows[earlier, 1]])
                pairs.append(found, found[:, 0] // np.uint64(self.step))
                carried = rows[begins | np.append(begins[1:], True)]
            hashed.remove(index)
        return pairs

    def duplicates(self, exact: _Partitions, pairs: _Partitions | None, signatures, threshold) -> Iterator[np.ndarray]:
        """DUPLICATE rows in the order of the documents. No document is in both: exact copies are in no pair."""
        for index in self._counted(exact.count):
            found = [(exact.all(index), EXACT)]
            if pairs:
                found.append((self._near(_sorted(pairs.all(index)), signatures, threshold), NEAR))
                pairs.remove(index)
            rows = np.empty(sum(len(marks) for marks, _ in found), DUPLICATE)
            rows["document"], rows["original"] = np.concatenate([marks for marks, _ in found]).T
            rows["kind"] = np.concatenate([np.full(len(marks), kind) for marks, kind in found])
            yield rows[np.argsort(rows["document"])]

    def _near(self, pairs: np.ndarray, signatures: Path, threshold: float) -> np.ndarray:
        """Of sorted rows (document, earlier document), the first one of each document that is similar enough."""
        similar = np.zeros(len(pairs), bool)
        with open(signatures, "rb", buffering=0) as stream:
            for start in range(0, len(pairs), self.batch):
                batch = pairs[start : start + self.batch]
                one, other = (self._signatures_at(stream, batch[:, column]) for column in (0, 1))
                similar[start : start + len(batch)] = (one == other).mean(axis=1) >= threshold
        pairs = pairs[similar]
        return pairs[_run_begins(pairs[:, :1])]

    def _signatures_at(self, stream, documents: np.ndarray) -> np.ndarray:
        """[n, permutations] uint32. One read each: a memory map would count towards the process's memory."""
        rows = np.empty((len(documents), self.permutations), "<u4")
        for row, document in zip(rows, documents.tolist()):
            stream.seek(document * 4 * self.permutations)
            stream.readinto(row)
        return rows

    def _by_hash(self, name: str, columns: int, rows: int) -> _Partitions:
        return _Partitions(self.folder, name, columns, 2 * rows // self.block + 1)  # nearly every one is a single block

    def _by_range(self, name: str) -> _Partitions:
        return _Partitions(self.folder, name, 2, self.total // self.step + 1)

    def _counted(self, stop: int, step: int = 1) -> Iterator[int]:
        """range(0, stop, step), telling the progress; every phase counts the same."""
        for at in range(0, stop, step):
            yield at
            self.on_progress((self.phase + min(1.0, (at + step) / stop)) / self.phases)
        self.phase += 1


def _run_begins(rows: np.ndarray) -> np.ndarray:
    """[n] bool: which of the sorted rows [n, columns] differ from the one before."""
    return np.append(np.ones(min(1, len(rows)), bool), (rows[1:] != rows[:-1]).any(axis=1))


def _sorted(pairs: np.ndarray) -> np.ndarray:
    """The rows [n, 2] in order, each once."""
    pairs = pairs[np.lexsort((pairs[:, 1], pairs[:, 0]))]
    return pairs[_run_begins(pairs)]


def band_hashes(signatures: np.ndarray, bands: int) -> np.ndarray:
    """[n, permutations] uint32 -> [n, bands] uint64: equal where the band and all its rows are equal."""
    parts = signatures.reshape(len(signatures), bands, signatures.shape[1] // bands)
    hashes = np.tile(np.arange(1, bands + 1, dtype=np.uint64), (len(signatures), 1))
    for row in range(parts.shape[2]):
        hashes *= _ODD
        hashes += parts[:, :, row]
        _mixed(hashes)
    return hashes
