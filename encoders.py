"""What the workers of data_process.py do: a chunk of records -> what goes to the spool, in this process or in several.

Every record takes the same road, whether it is a text for pretraining, a conversation or a preference pair:

    tidy -> clean -> holds an evaluation question? -> digest -> sampled? -> encode, MinHash

A record that ends on the way is counted, with the reason and the place where it stood. A chunk's result depends on the chunk
and the recipe alone, so it is the same whichever process makes it.
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
import json
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import dedup
from cleaning import Cleaner
from decontamination import Questions
from dedup import MinHash
from readers import tidy
from readers.instructions import tidy_conversation
from readers.preferences import tidy_preference
from spool import DOCUMENT, Chunk, Result, count, new_counts
from token_files import pack_ids
from tokenizer import Tokenizer, load_tokenizer

CHUNKS_IN_FLIGHT = 4  # per worker: this bounds the memory


@dataclass(frozen=True)
class Recipe:
    """Everything that a worker needs to know; sent to each once."""

    kind: str  # a key of ENCODERS
    weights: tuple[float, ...]  # per corpus: how often its documents are written; a fraction is the share that is
    seed: int  # of the choice that a fractional weight makes
    cleaner: dict  # Cleaner's arguments
    tokenizer: Path | None = None  # from which a worker process loads it
    minhash: dict | None = None  # MinHash's arguments
    questions: Path | None = None  # what Questions.save wrote
    questions_share: float = 0.5  # of a question, from which on a text counts as holding it


class LeftOut(Exception):
    """This record goes no further; the text is the reason under which it is counted."""


@dataclass
class Document:
    """A record on its way."""

    text: str  # what decontamination, deduplication and the counts look at
    content: object  # what is encoded
    changed: tuple[str, ...]  # the rules that mended it
    group: str | None = None  # what decides the split, where that is not the whole text
    key: str = ""  # what decides whether it is a copy, likewise


# ----------------------------------------------------------------------------------------------------------------------
# Three kinds of records: how each is tidied, and what bytes it becomes


class TextEncoder:
    """Texts -> token ids: [bos +] ids + eos, little-endian, as token_files.py wants them."""

    def __init__(self, cleaner: Cleaner, tokenizer: Tokenizer):
        self.cleaner, self.tokenizer = cleaner, tokenizer

    def tidy(self, record: str) -> Document:
        return cleaned_text(record, self.cleaner)

    def without(self, document: Document, remaining: str) -> Document:
        """The document without the lines that hold evaluation questions. Raises LeftOut if little else is in it."""
        if 2 * len(remaining) < len(document.text):
            raise LeftOut("evaluation question")
        return cleaned_text(remaining, self.cleaner)

    def digests(self, documents: list[Document]) -> list[bytes]:
        return dedup.digests([document.text for document in documents])

    def encode(self, documents: list[Document]) -> tuple[bytes, list[int], list[int]]:
        """-> payload, bytes of it and units of each document."""
        tokenizer, ids, lengths = self.tokenizer, [], []
        bos = [tokenizer.bos_id] if tokenizer.add_bos else []
        for document in documents:
            before = len(ids)
            ids += bos
            ids += tokenizer.encode_segment(document.text)
            ids.append(tokenizer.eos_id)
            lengths.append(len(ids) - before)
        packed = pack_ids(ids, len(tokenizer))
        return packed.tobytes(), [length * packed.itemsize for length in lengths], lengths


class _LineEncoder:
    """Records that become one line of JSON each."""

    def __init__(self, cleaner: Cleaner, tokenizer: None):
        self.cleaner = cleaner

    def encode(self, documents: list[Document]) -> tuple[bytes, list[int], list[int]]:
        lines = [(json.dumps(document.content, ensure_ascii=False) + "\n").encode("utf-8") for document in documents]
        return b"".join(lines), list(map(len, lines)), [self.units(document.content) for document in documents]

    def without(self, document: Document, remaining: str) -> Document:
        raise LeftOut("evaluation question")

    def digests(self, documents: list[Document]) -> list[bytes]:
        return [hashlib.blake2b(document.key.encode("utf-8"), digest_size=16).digest() for document in documents]

    def mend(self, messages: list[dict], changed: set) -> list[dict]:
        """The messages with the cleaning rules that are safe inside a conversation applied to their contents."""
        mended = []
        for message in messages:
            content = message["content"]
            if isinstance(content, str):
                content, rules = self.cleaner.mend(content)
                changed.update(rules)
            mended.append({**message, "content": content})
        return mended


def exact_key(texts: list[str]) -> str:
    """Equal for equal lists of texts, but for white space and capitals. Every sign counts: 1.5 + 2 and 15 - 2 are two exercises."""
    return "\0".join(" ".join(text.lower().split()) for text in texts)


class ConversationEncoder(_LineEncoder):
    """Conversations -> lines of {"messages": […]}. A unit is an answer."""

    def tidy(self, record: list[dict]) -> Document:
        changed: set[str] = set()
        messages, problem = tidy_conversation(self.mend(record, changed))
        if not messages:
            raise LeftOut(problem)
        # The first question decides the split, so that another answer to it is not on the other side.
        question = next(message["content"] for message in messages if message["role"] == "user")
        texts = [message["content"] for message in messages]
        refuse_half_characters("".join(texts))
        return Document("\n".join(texts), {"messages": messages}, (*sorted(changed), *filter(None, [problem])), question,
                        exact_key([messages[0]["role"], *texts]))  # fmt: skip

    @staticmethod
    def units(content: dict) -> int:
        return sum(message["role"] == "assistant" for message in content["messages"])


class PreferenceEncoder(_LineEncoder):
    """Preference pairs -> lines of {"prompt": [messages], "chosen": …, "rejected": …}. A unit is a pair."""

    def tidy(self, record: dict) -> Document:
        changed: set[str] = set()
        prompt = self.mend(record["prompt"], changed)
        chosen, rejected = (answer["content"] for answer in self.mend([{"content": record[n]} for n in ("chosen", "rejected")], changed))
        pair, problem = tidy_preference({"prompt": prompt, "chosen": chosen, "rejected": rejected})
        if pair is None:
            raise LeftOut(problem)
        prompt = [message["content"] for message in pair["prompt"]]
        texts = [*prompt, pair["chosen"], pair["rejected"]]
        refuse_half_characters("".join(texts))
        return Document("\n".join(texts), pair, (*sorted(changed), *filter(None, [problem])), "\n".join(prompt), exact_key(texts))

    @staticmethod
    def units(content: dict) -> int:
        return 1


ENCODERS = {"pretrain": TextEncoder, "sft": ConversationEncoder, "preferences": PreferenceEncoder}


def cleaned_text(record: str, cleaner: Cleaner) -> Document:
    """A reader's text, tidied and cleaned. Raises LeftOut with the reason."""
    text = tidy(record)
    if not text:
        raise LeftOut("empty text")
    refuse_half_characters(text)
    text, dropped_by, changed = cleaner(text)
    if dropped_by or not text:
        raise LeftOut(dropped_by or "empty text")
    return Document(text, text, changed)


def refuse_half_characters(text: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:  # half of a surrogate pair, from a \ud83d in JSON that was cut in two
        raise LeftOut("broken Unicode") from None


# ----------------------------------------------------------------------------------------------------------------------
# One chunk


class Worker:
    """Chunk -> Result."""

    def __init__(self, recipe: Recipe, tokenizer: Tokenizer | None):
        self.recipe, self.encoder = recipe, ENCODERS[recipe.kind](Cleaner(**recipe.cleaner), tokenizer)
        gc.freeze()  # the garbage collector need not look at a vocabulary again and again: 5% of the time
        self.minhash = MinHash(**recipe.minhash) if recipe.minhash else None
        self.questions = Questions.load(recipe.questions) if recipe.questions else None

    def __call__(self, chunk: Chunk) -> Result:
        counts = new_counts()
        counts["records"] = len(chunk.records) + sum(entry["count"] for entry in chunk.unreadable.values())
        counts["unreadable"] = chunk.unreadable
        for encoding in chunk.encodings:
            counts["encodings"][encoding] = counts["encodings"].get(encoding, 0) + 1
        documents, rows = [], []
        for document, row in self._sampled(self._without_questions(self._tidied(chunk, counts), counts), chunk.source, counts):
            documents.append(document)
            rows.append(row)
        counts["documents"] = len(documents)
        payload, sizes, units = self.encoder.encode(documents) if documents else (b"", [], [])
        table = np.array(rows, DOCUMENT)
        table["payload"], table["units"] = sizes, units
        signatures = None
        if self.minhash:
            signatures = np.array([self.minhash.signature(document.text) for document in documents], np.uint32)
        return Result(chunk.index, chunk.source, chunk.end, payload, table, signatures, counts)

    def _tidied(self, chunk: Chunk, counts: dict) -> list[tuple[Document, str]]:
        """(document, file:line) of the records that are clean enough."""
        kept = []
        for record, where in zip(chunk.records, chunk.places):
            try:
                document = self.encoder.tidy(record)
            except LeftOut as reason:
                text = record if isinstance(record, str) else json.dumps(record, ensure_ascii=False, default=str)
                count(counts["dropped"], str(reason), where, text)
                continue
            for rule in document.changed:
                count(counts["changed"], rule, where, document.text)
            kept.append((document, where))
        return kept

    def _without_questions(self, kept: list[tuple[Document, str]], counts: dict) -> list[Document]:
        """The documents without the questions of the evaluation set."""
        if self.questions is None:
            return [document for document, _ in kept]
        documents = []
        findings = self.questions.find_all([document.text for document, _ in kept], self.recipe.questions_share)
        for (document, where), finding in zip(kept, findings):
            if finding is None:
                documents.append(document)
                continue
            name, share, remaining = finding
            remark = f"{share:.0%} of {name}: {document.text}"
            try:
                documents.append(self.encoder.without(document, remaining))
                count(counts["changed"], "evaluation question", where, remark)
            except LeftOut as reason:
                count(counts["dropped"], str(reason), where, remark)
        return documents

    def _sampled(self, documents: list[Document], source: int, counts: dict) -> Iterator[tuple[Document, tuple]]:
        """(document, its row of DOCUMENT but for the two columns that encoding knows) of those that the weight lets through."""
        if not documents:
            return
        fingerprints = self.encoder.digests(documents)
        groups = fingerprints if documents[0].group is None else dedup.digests([document.group for document in documents])
        for document, fingerprint, group in zip(documents, fingerprints, groups):
            group = int.from_bytes(group[:8], "big")
            copies = self.copies(group, self.recipe.weights[source])
            if copies:
                size = len(document.text.encode("utf-8"))
                yield document, (fingerprint, group, 0, 0, size, len(document.text), source, copies)
            else:
                counts["not_sampled"] += 1

    def copies(self, group: int, weight: float) -> int:
        """How often a document is written, 2.3 times on average, say. Decided by its content: more data moves none."""
        whole = int(weight)
        if whole == weight:
            return whole
        number = hashlib.blake2b(group.to_bytes(8, "big"), digest_size=8, key=self.recipe.seed.to_bytes(8, "big")).digest()
        return whole + (int.from_bytes(number, "big") < (weight - whole) * 2**64)


# ----------------------------------------------------------------------------------------------------------------------
# In this process, or in several

_worker: Worker | None = None  # in a worker process: loaded once, when it starts


def _start_worker(recipe: Recipe) -> None:
    global _worker
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _worker = Worker(recipe, load_tokenizer(recipe.tokenizer) if recipe.tokenizer else None)


def _end_with_parent() -> None:
    """A killed parent cannot tell its workers; without this they would wait for work forever."""
    multiprocessing.parent_process().join()
    os._exit(1)


def _work(chunk: Chunk) -> Result:
    return _worker(chunk)


@contextlib.contextmanager
def results(chunks: Iterator[Chunk], recipe: Recipe, tokenizer: Tokenizer | None, workers: int):
    """An iterator over the results of the chunks, in their order, made by one or more processes."""
    if workers == 1:
        yield map(Worker(recipe, tokenizer), chunks)
        return
    # spawn, because fork copies threads' locks in a bad state, and because it is the same on every system
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker, initargs=(recipe,))
    try:
        with _interrupts_held():
            for _ in range(workers):
                pool.submit(int)  # nothing, but the pool starts its processes with the work: so they load while we read
        yield _in_order(pool, chunks, window=workers * CHUNKS_IN_FLIGHT)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


@contextlib.contextmanager
def _interrupts_held():
    """Ctrl-C waits for the end of the block, and processes that start in it never see one: the parent decides.

    The terminal sends Ctrl-C to all of them, and each worker would print a traceback. Windows has no such mask.
    """
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _in_order(pool: ProcessPoolExecutor, chunks: Iterator[Chunk], window: int) -> Iterator[Result]:
    """Like pool.map, but at most `window` chunks are read ahead (pool.map would read the whole corpus)."""
    pending = deque()
    for chunk in chunks:
        with _interrupts_held():  # submit() also starts the processes
            pending.append(pool.submit(_work, chunk))
        if len(pending) >= window:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()
