"""Questions of an evaluation set that stand in the training text: a model that has seen them is not being tested.

    questions = Questions.from_folder(Path("eval/ceval-exam"))      # every CSV and JSON-lines file below it
    questions.find("……下列关于法律推理的表述，能够成立的是……")              # ("ceval-exam/val/law_val.csv:2", 1.0), or None

As in GPT-3 (Brown et al. 2020, appendix C) a question is found by its n-grams. There they are 13 words; here they are
characters, because Chinese has no spaces: 13 for Chinese, 40 for scripts that need some letters per word. A text holds a
question if at least half of the question's grams are in it. A question shorter than that is cut into smaller grams, and
all of them must be there. Spaces, punctuation and case do not count (dedup.normalised). Grams that very many questions
share (下列关于…的说法正确的是) say nothing and are left out.
"""

from __future__ import annotations

from settings import UserError

import csv
import functools
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from dedup import normalised
from files import utf8_lines

DENSE = 0x2E80  # from this code point on, a character says about as much as a word: Chinese, Japanese, Korean
CHINESE, LATIN = (13, 8), (40, 24)  # by the script: n of the n-grams, and n for questions shorter than that
COMMON = 20  # a gram that stands more often in the questions is common wording
SHARE = 0.5  # of a question's grams

# ----------------------------------------------------------------------------------------------------------------------
# Reading evaluation sets


def read_questions(file: Path) -> Iterator[tuple[int, str]]:
    """(line, question) of one file; none if it is no evaluation set. UserError with file and line if it is broken.

    CSV with a column `question` (C-Eval, CMMLU) or without a header (MMLU: question, four options, the answer's
    letter); JSON lines with `question` (GSM8K) or `input` (LongBench).
    """
    lines = (line for _, line in utf8_lines(file))
    line = 0
    try:
        if file.suffix == ".jsonl":
            for line, text in enumerate(lines, 1):
                record = json.loads(text) if text.strip() else {}
                question = record.get("question", record.get("input")) if isinstance(record, dict) else None
                if isinstance(question, str):
                    yield line, question
            return
        rows, column = csv.reader(lines, strict=True), None
        for row in rows:
            start, line = line + 1, rows.line_num  # a row may span several lines; it is named by its first one
            if column is None:
                names = [name.strip().lower() for name in row]
                column = names.index("question") if "question" in names else 0
                if names[column] == "question":
                    continue
                if len(row) != 6 or row[-1] not in set("ABCD"):
                    return
            if len(row) > column:
                yield start, row[column]
    except csv.Error as error:
        raise UserError(f"{file}:{line + 1}: not valid CSV: {error}") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{file}:{line}: not valid JSON: {error.msg} at column {error.colno}") from None


# ----------------------------------------------------------------------------------------------------------------------
# Hashing all n-grams of a text

BLOCK = 1 << 14  # characters that are hashed at a time: their arrays stay in the cache
BASE = 0x9E3779B97F4A7C15  # any large odd number: it has an inverse modulo 2^64
_POWERS = np.cumprod(np.full(BLOCK, BASE, dtype=np.uint64))
_INVERSES = np.cumprod(np.array([1] + [pow(BASE, -1, 1 << 64)] * (BLOCK - 1), dtype=np.uint64))
BETWEEN = 1  # stands between documents that are searched together; no gram of a question has it
_LAST = 0x33480  # behind the last Chinese character of Unicode; no letter or digit has a higher number


@functools.cache
def _letter_table() -> np.ndarray:
    """[_LAST + 1] uint32: code point -> what dedup.normalised makes of it, 0 for nothing. NUL becomes BETWEEN."""
    letters = (normalised(chr(code))[:1] for code in range(_LAST))
    table = np.array([ord(letter) if letter else 0 for letter in letters] + [0], dtype=np.uint32)
    table[0] = BETWEEN
    return table


def letters_of(text: str) -> tuple[np.ndarray, np.ndarray]:
    """The code points [N] uint32 of dedup.normalised(text), several times as fast, and where in them a gram may start.

    Starts [S] int64: every Chinese character, and where a word or number begins. That other letters are no starts
    makes English five times as fast and loses nothing: questions are cut at the same places.
    """
    codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")
    letters = _letter_table()[np.minimum(codes, _LAST)]
    kept, chinese = letters > 0, letters >= DENSE
    starts = kept.copy()
    starts[1:] &= chinese[1:] | chinese[:-1] | ~kept[:-1]
    return letters[kept], np.flatnonzero(starts[kept])


def prefix_sums(codes: np.ndarray) -> np.ndarray:
    """[N + 1] uint64: P(i) = sum over j < i of codes(j) * BASE^(j+1), modulo 2^64. N is at most BLOCK."""
    sums = np.zeros(len(codes) + 1, dtype=np.uint64)
    np.cumsum(codes * _POWERS[: len(codes)], out=sums[1:])
    return sums


def gram_hashes(sums: np.ndarray, starts: np.ndarray, n: int) -> np.ndarray:
    """uint64: the hash of the n-gram at each start where one fits: (P(i+n) - P(i)) / BASE^i, the polynomial of Karp and
    Rabin (1987)."""
    starts = starts[: np.searchsorted(starts, len(sums) - n)]
    return (sums[starts + n] - sums[starts]) * _INVERSES[starts]


# ----------------------------------------------------------------------------------------------------------------------
# The questions


class Questions:
    """An index of grams -> questions. Workers `load` it from the file that the main process has `save`d.

    names [Q] str        "ceval-exam/val/law_val.csv:17" of every question in use
    totals [Q] int64     how many grams it has; short [Q] bool: all of them must be found
    grams [G] uint64     sorted; owners [G] int32: the question. A gram of k questions stands k times
    unused int           questions too short, or of common wording only; sha256: of all questions' texts
    """

    PROBES, PROBE = (np.uint64(40), np.uint64(16)), np.uint64((1 << 24) - 1)  # bits 40 to 63 of a gram, and 16 to 39
    ARRAYS = ("names", "totals", "short", "grams", "owners", "unused", "sha256")

    def __init__(self, names, totals, short, grams, owners, unused, sha256):
        self.names, self.totals, self.short, self.grams, self.owners = names, totals, short, grams, owners
        self.unused, self.sha256 = int(unused), str(sha256)
        bits = np.zeros(1 << 24, dtype=bool)
        for shift in self.PROBES:
            bits[grams >> shift & self.PROBE] = True
        self._bits = np.packbits(bits, bitorder="little")

    @classmethod
    def from_folder(cls, folder: Path) -> Questions:
        """All questions in the CSV and JSON-lines files below a folder. UserError if there is none."""
        folder = Path(folder)
        if not folder.is_dir():
            raise UserError(f"--decontaminate {folder} is no directory; name the one with the evaluation set's files")
        files = [path for path in sorted(folder.rglob("*")) if path.suffix in (".csv", ".jsonl") and path.name[0] != "."]
        questions, without = {}, []
        for file in files:
            name = f"{folder.resolve().name}/{file.relative_to(folder).as_posix()}"
            found = [(text, f"{name}:{line}") for line, text in read_questions(file)]
            for text, where in found:
                questions.setdefault(normalised(text), (text, where))
            without += [] if found else [name]
        if not questions:
            there = f"no questions in {', '.join(without[:5])}" if files else "no .csv or .jsonl file"
            raise UserError(f"--decontaminate {folder}: {there}; C-Eval, CMMLU, MMLU, GSM8K and LongBench are understood")
        if without:
            print(f"--decontaminate: no questions in {', '.join(without)}")
        index = cls._index(questions)
        if not len(index.names):
            raise UserError(f"--decontaminate {folder}: all {len(questions):,} questions are too short to be recognised")
        return index

    @classmethod
    def _index(cls, questions: dict[str, tuple[str, str]]) -> Questions:
        """{normalised text: (text, where it stands)} -> the index."""
        names, short, own, everything = [], [], [], []
        for text, name in questions.values():
            codes, starts = letters_of(text)
            sums, starts = prefix_sums(codes[:BLOCK]), starts[starts < BLOCK]
            is_chinese = 2 * np.count_nonzero(codes >= DENSE) >= len(codes)
            starts = starts[(codes[starts] >= DENSE) == is_chinese]
            n, small = CHINESE if is_chinese else LATIN
            own.append(np.unique(gram_hashes(sums, starts, n if len(codes) >= n else small)))
            everything += [np.unique(gram_hashes(sums, starts, size)) for size in (n, small)]
            names.append(name)
            short.append(len(codes) < n)
        grams, counts = np.unique(np.concatenate(everything), return_counts=True)
        common = grams[counts > COMMON]
        own = [grams[~np.isin(grams, common)] for grams in own]
        totals = np.array([len(grams) for grams in own])
        used = totals > 0
        owners = np.repeat(np.arange(np.count_nonzero(used), dtype=np.int32), totals[used])
        grams = np.concatenate(own)
        order = np.argsort(grams, kind="stable")
        sha256 = hashlib.sha256("\n".join(sorted(questions)).encode("utf-8", "surrogatepass")).hexdigest()
        return cls(np.array(names)[used], totals[used], np.array(short)[used], grams[order], owners[order],
                   np.count_nonzero(~used), sha256)  # fmt: skip

    def find(self, text: str, share: float = SHARE) -> tuple[str, float] | None:
        """(where the question stands, share of its grams that are in the text) of the best covered one, or None."""
        return self.find_all([text], share)[0]

    def find_all(self, texts: list[str], share: float = SHARE) -> list[tuple[str, float] | None]:
        """find() of every text. Short texts go several times as fast together."""
        codes, starts = letters_of("\0".join(text.replace("\0", " ") for text in texts))
        places, grams = self._ours_in(codes, starts)
        documents = np.searchsorted(np.flatnonzero(codes == BETWEEN), places)
        found = [None] * len(texts)
        for document in np.unique(documents):
            ours = np.unique(grams[documents == document])
            ranges = zip(*(np.searchsorted(self.grams, ours, side=side) for side in ("left", "right")))
            owners, counts = np.unique(np.concatenate([self.owners[a:b] for a, b in ranges]), return_counts=True)
            shares = counts / self.totals[owners]
            shares[self.short[owners] & (shares < 1)] = 0
            best = np.argmax(shares)
            if shares[best] >= share:
                found[document] = str(self.names[owners[best]]), float(shares[best])
        return found

    def _ours_in(self, codes: np.ndarray, starts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(where, which) of our grams in a text."""
        places, found = [starts[:0]], [self.grams[:0]]
        for block in range(0, len(codes), BLOCK - LATIN[0]):
            here = codes[block : block + BLOCK]
            first, last = np.searchsorted(starts, (block, block + BLOCK))
            at, sums = starts[first:last] - block, prefix_sums(here)
            chinese = here[at] >= DENSE
            for sizes, some in ((CHINESE, at[chinese]), (LATIN, at[~chinese])):
                for n in sizes if len(some) else ():
                    grams = gram_hashes(sums, some, n)
                    ours = self._ours(grams)
                    places.append(some[ours] + block)
                    found.append(grams[ours])
        return np.concatenate(places), np.concatenate(found)

    def _ours(self, grams: np.ndarray) -> np.ndarray:
        """The indices of those grams that are ours. A filter (Bloom 1970) that fits into the cache refuses most others."""
        left = np.arange(len(grams))
        for shift in self.PROBES:
            probe = grams[left] >> shift & self.PROBE
            byte, bit = (probe >> np.uint64(3)).view(np.int64), probe.astype(np.uint8) & 7
            left = left[(self._bits.take(byte) >> bit & 1).view(bool)]
        grams = grams[left]
        places = np.minimum(np.searchsorted(self.grams, grams), len(self.grams) - 1)
        return left[self.grams[places] == grams]

    def identity(self) -> dict:
        """What decides whether a later run drops the same documents, and what the report tells."""
        return {"count": len(self.names), "unused": self.unused, "sha256": self.sha256}

    def save(self, file: Path) -> None:
        with open(file, "wb") as stream:
            np.savez(stream, **{name: getattr(self, name) for name in self.ARRAYS})

    @classmethod
    def load(cls, file: Path) -> Questions:
        with np.load(file) as arrays:
            return cls(*(arrays[name] for name in cls.ARRAYS))
