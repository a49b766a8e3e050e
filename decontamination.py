"""Questions of an evaluation set that stand in the training text: a model that has seen them is not being tested.

    questions = Questions.from_folder(Path("eval/ceval-exam"))      # every CSV and JSON-lines file below it
    questions.find_all(["……下列关于法律推理的表述，能够成立的是……"])      # [Finding("ceval-exam/val/law_val.csv:2", 1.0, "")]

As in GPT-3 (Brown et al. 2020, appendix C) a question is found by its n-grams. There they are 13 words; here they are
characters, because Chinese has no spaces: 13 for Chinese, 40 for scripts that need some letters per word. A text holds a
question if at least half of the question's grams are in it. Spaces, punctuation and case do not count
(dedup.normalised). Grams that very many questions share (下列关于…的说法正确的是) say nothing and are left out.

A stem shorter than n letters (公平理论注重的是____) is what any page on its subject says. It is searched for together with
its options, as exams print them: "A. 报酬 B. …". What is still too short is not searched for.

GPT-3 removed a gram with 200 characters on either side and kept the rest of the document. Here the lines go that hold
a part of a question: a book is not lost for one quotation.
"""

from __future__ import annotations

from settings import UserError

import csv
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dedup import LAST, letter_table, normalised
from files import utf8_lines

DENSE = 0x2E80  # from this code point on, a character says about as much as a word: Chinese, Japanese, Korean
CHINESE, LATIN = 13, 40  # n of the n-grams, by the script
COMMON = 20  # a gram that stands in more questions is common wording
SHARE = 0.5  # of a question's grams

# ----------------------------------------------------------------------------------------------------------------------
# Reading evaluation sets


def read_questions(file: Path) -> Iterator[tuple[int, str]]:
    """(line, wording) of the questions of one file; none if it is no evaluation set. UserError if it cannot be read.

    CSV with a column `question` (C-Eval, CMMLU) or without a header (MMLU: question, four options, the answer's
    letter); JSON lines with `question` (GSM8K) or `input` (LongBench).
    """
    lines, start, columns = (line for _, line in utf8_lines(file)), 1, None
    csv.field_size_limit(1 << 30)  # the module's own limit is shorter than some chapters
    try:
        if file.suffix == ".jsonl":
            for start, line in enumerate(lines, 1):
                record = json.loads(line) if line.strip() else {}
                question = record.get("question", record.get("input")) if isinstance(record, dict) else None
                if isinstance(question, str):
                    yield start, question
            return
        rows = csv.reader(lines, strict=True)
        for row in rows:
            if columns is None:
                names = [name.strip().lower() for name in row]
                header = "question" in names
                if not header and (len(row) != 6 or row[-1] not in set("ABCD")):
                    return
                columns = [names.index(name) for name in ("question", *"abcd") if name in names] if header else range(5)
            if not header and len(row) > max(columns):
                yield start, wording(*(row[column] for column in columns))
            header, start = False, rows.line_num + 1  # a row may span several lines; it is named by its first one
    except (csv.Error, ValueError, RecursionError) as error:  # of JSON: no JSON, thousands of digits or of brackets
        raise UserError(f"{file}:{start}: cannot be read: {error}") from None


def wording(stem: str, *options: str) -> str:
    """What is searched for: the stem, or if that is too short, stem and options as exams print them.

    Too short is less than one and a half grams: then a sentence of an encyclopedia that begins like the question is one with it.
    """
    letters = normalised(stem)
    labelled = (f"{label}. {option}" for label, option in zip("ABCD", options))
    return stem if 2 * len(letters) >= 3 * gram_size(letters) else "\n".join([stem, *labelled])


def gram_size(letters: str) -> int:
    return CHINESE if 2 * sum(letter >= chr(DENSE) for letter in letters) >= len(letters) else LATIN


# ----------------------------------------------------------------------------------------------------------------------
# Hashing all n-grams of a text

BLOCK = 1 << 14  # letters that are hashed at a time: their arrays stay in the cache
BASE = 0x9E3779B97F4A7C15  # any large odd number: it has an inverse modulo 2^64
_POWERS = np.cumprod(np.full(BLOCK, BASE, dtype=np.uint64))
_INVERSES = np.cumprod(np.array([1] + [pow(BASE, -1, 1 << 64)] * (BLOCK - 1), dtype=np.uint64))
PREFIX = np.uint64(64 - 24)  # by so many bits a hash is shifted, to leave its first ones
BETWEEN = 1  # stands for the border of two texts that are searched together; no gram of a question has it


def letters_of(texts: list[str]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The letters and digits of "\\n".join(texts), lower case, with BETWEEN for the borders.

    letters [N] uint32, the places [N] int64 where they stand, and the numbers [S] int64 of those where a gram may start:
    every Chinese character, and where a word or number begins. That other letters are no starts makes English five times
    as fast and loses nothing: questions are cut at the same places.
    """
    codes = np.frombuffer("\n".join(texts).encode("utf-32-le", "surrogatepass"), dtype="<u4")
    letters = letter_table()[np.minimum(codes, LAST)]
    letters[np.cumsum([len(text) + 1 for text in texts[:-1]], dtype=np.int64) - 1] = BETWEEN
    kept, chinese = letters > 0, letters >= DENSE
    starts = kept.copy()
    starts[1:] &= chinese[1:] | chinese[:-1] | ~kept[:-1] | (letters[:-1] == BETWEEN)
    return letters[kept], np.flatnonzero(kept), np.flatnonzero(starts[kept])


def prefix_sums(letters: np.ndarray) -> np.ndarray:
    """[N + 1] uint64: P(i) = sum over j < i of letters(j) * BASE^(j+1), modulo 2^64. N is at most BLOCK."""
    sums = np.zeros(len(letters) + 1, dtype=np.uint64)
    np.cumsum(letters * _POWERS[: len(letters)], out=sums[1:])
    return sums


def gram_hashes(sums: np.ndarray, starts: np.ndarray, n: int) -> np.ndarray:
    """uint64: the hash of the n-gram at each start where one fits: (P(i+n) - P(i)) / BASE^i, the polynomial of Karp and
    Rabin (1987)."""
    starts = starts[: np.searchsorted(starts, len(sums) - n)]
    return (sums[starts + n] - sums[starts]) * _INVERSES[starts]


# ----------------------------------------------------------------------------------------------------------------------
# The questions


class Finding(NamedTuple):
    where: str  # "ceval-exam/val/law_val.csv:17": the question of which most is in the text
    share: float  # of its grams
    text_without: str  # the text without the lines that hold grams of any question found in it


class Questions:
    """An index of grams -> questions. Workers `load` it from the file that the main process has `save`d.

    names [Q] str        "ceval-exam/val/law_val.csv:17" of every question in use
    totals [Q] int64     how many grams it has
    grams [G] uint64     sorted; owners [G] int32: the question. A gram of k questions stands k times
    unused int           questions too short, or of common wording only; sha256: of all questions' texts
    """

    ARRAYS = ("names", "totals", "grams", "owners", "unused", "sha256")

    def __init__(self, names, totals, grams, owners, unused, sha256):
        self.names, self.totals, self.grams, self.owners = names, totals, grams, owners
        self.unused, self.sha256 = int(unused), str(sha256)
        self._prefixes = np.zeros(1 << 24, dtype=bool)
        self._prefixes[grams >> PREFIX] = True

    @classmethod
    def from_folder(cls, folder: Path) -> Questions:
        """All questions in the CSV and JSON-lines files below a folder. UserError if there is none."""
        folder = Path(folder)
        if not folder.is_dir():
            raise UserError(f"--decontaminate {folder} is no directory; name the one with the evaluation set's files")
        files = [path for path in sorted(folder.rglob("*")) if path.suffix in (".csv", ".jsonl") and path.name[0] != "."]
        questions, without = {}, []
        for file in filter(Path.is_file, files):
            name, found = f"{folder.resolve().name}/{file.relative_to(folder).as_posix()}", []
            try:
                for line, text in read_questions(file):
                    found.append((text, f"{name}:{line}"))
                without += [] if found else [name]
            except UserError as error:
                if found:
                    raise  # an evaluation set of which we would miss a part
                without.insert(0, str(error))
            for text, where in found:
                questions.setdefault(normalised(text), (text, where))
        without[5:] = [f"and {len(without) - 5} more"] if len(without) > 5 else []
        nothing = f"no questions in {', '.join(without)}" if without else "no .csv or .jsonl file"
        if not questions:
            raise UserError(f"--decontaminate {folder}: {nothing}; C-Eval, CMMLU, MMLU, GSM8K and LongBench are understood")
        if without:
            print(f"--decontaminate: {nothing}")
        index = cls._index(questions)
        if not len(index.names):
            raise UserError(f"--decontaminate {folder}: all {len(questions):,} questions are too short to be recognised")
        return index

    @classmethod
    def _index(cls, questions: dict[str, tuple[str, str]]) -> Questions:
        """{normalised text: (text, where it stands)} -> the index."""
        own = []
        for key, (text, _) in questions.items():
            letters, _, starts = letters_of([text])
            n, letters, starts = gram_size(key), letters[:BLOCK], starts[starts < BLOCK]
            starts = starts[(letters[starts] >= DENSE) == (n == CHINESE)]  # as in _ours_in
            own.append(np.unique(gram_hashes(prefix_sums(letters), starts, n)))
        grams, counts = np.unique(np.concatenate(own), return_counts=True)
        common = grams[counts > COMMON]
        own = [grams[~np.isin(grams, common)] for grams in own]
        totals = np.array([len(grams) for grams in own])
        used = totals > 0
        names = np.array([name for _, name in questions.values()])[used]
        owners = np.repeat(np.arange(len(names), dtype=np.int32), totals[used])
        grams = np.concatenate(own)
        order = np.argsort(grams, kind="stable")
        sha256 = hashlib.sha256("\n".join(sorted(questions)).encode("utf-8", "surrogatepass")).hexdigest()
        return cls(names, totals[used], grams[order], owners[order], np.count_nonzero(~used), sha256)

    def find_all(self, texts: list[str], share: float = SHARE) -> list[Finding | None]:
        """For every text, None if it holds that share of no question. Texts go several times as fast together."""
        letters, places, starts = letters_of(texts)
        firsts, grams = self._ours_in(letters, starts)
        lasts = firsts + np.where(letters[firsts] >= DENSE, CHINESE, LATIN) - 1
        ends = np.cumsum([len(text) + 1 for text in texts], dtype=np.int64)
        documents = np.searchsorted(ends, places[firsts], side="right")
        found = [None] * len(texts)
        for document in np.unique(documents):
            here, text = documents == document, texts[document]
            spans = places[np.stack([firsts[here], lasts[here]])] - (ends[document] - len(text) - 1)
            found[document] = self._finding(text, grams[here], spans, share)
        return found

    def _finding(self, text: str, grams: np.ndarray, spans: np.ndarray, share: float) -> Finding | None:
        """grams [H]: those of ours in the text; spans [2, H]: their first and their last character there."""
        ranges = (np.searchsorted(self.grams, grams, side=side) for side in ("left", "right"))
        owners = {gram: self.owners[a:b] for gram, a, b in zip(grams, *ranges)}
        candidates, counts = np.unique(np.concatenate([*owners.values()]), return_counts=True)
        shares = counts / self.totals[candidates]
        best, held = np.argmax(shares), set(candidates[shares >= share])
        if not held:
            return None
        lines, gone = text.split("\n"), set()
        ends = np.cumsum([len(line) + 1 for line in lines])
        for gram, first, last in zip(grams, *np.searchsorted(ends, spans, side="right")):
            if not held.isdisjoint(owners[gram]):
                gone.update(range(first, last + 1))
        rest = "\n".join(line for number, line in enumerate(lines) if number not in gone)
        return Finding(str(self.names[candidates[best]]), float(shares[best]), rest)

    def _ours_in(self, letters: np.ndarray, starts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Our grams in a text: the numbers of the letters where they begin, and their hashes."""
        firsts, found = [starts[:0]], [self.grams[:0]]
        for block in range(0, len(letters), BLOCK - LATIN):
            here = letters[block : block + BLOCK]
            first, last = np.searchsorted(starts, (block, block + BLOCK))
            at, sums = starts[first:last] - block, prefix_sums(here)
            chinese = here[at] >= DENSE
            for n, some in ((CHINESE, at[chinese]), (LATIN, at[~chinese])):
                grams = gram_hashes(sums, some, n)
                ours = self._ours(grams)
                firsts.append(some[ours] + block)
                found.append(grams[ours])
        return np.concatenate(firsts), np.concatenate(found)

    def _ours(self, grams: np.ndarray) -> np.ndarray:
        """The indices of those grams that are ours. A table of their first 24 bits refuses most others at once."""
        maybe = np.flatnonzero(self._prefixes[(grams >> PREFIX).view(np.int64)])
        places = np.searchsorted(self.grams[:-1], grams[maybe])  # at most the last one
        return maybe[self.grams[places] == grams[maybe]]

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
