"""From text to what the trainers read: token files for pretraining, conversations for fine-tuning.

    python data_process.py textbook --out data/textbook                      # the built-in corpus; nothing to download
    python data_process.py pretrain --corpus textbook=data/textbook          # trains a tokenizer first, if there is none
    python data_process.py pretrain --corpus jsonl=c4/ chinese-poetry=poems/ --tokenizer chatglm2/ --out data/pretrain
    python data_process.py sft      --dataset alpaca=alpaca_zh.json messages=sharegpt.jsonl --out data/sft
    python data_process.py list                                              # the readers: name, layout, where from

`pretrain` streams: one process reads and cuts the corpus into chunks, the workers turn chunks into token bytes, and the
bytes are appended in the order of the chunks. So memory does not grow with the corpus, and the files are the same for
any number of workers. After a kill the same command goes on where it was.

The layout of the token directory: token_files.py.
"""

from __future__ import annotations

from settings import UserError, command_line, flag

import contextlib
import dataclasses
import filecmp
import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import tempfile
import threading
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from files import file_sha256, write_json
from readers import INSTRUCTIONS, PRETRAINING, Corpus, Reader, tidy
from readers.instructions import tidy_conversation
from tables import print_table
from token_files import FORMAT, SPLITS, TokenWriter, finished, pack_ids, token_dtype
from tokenizer import Tokenizer, load_tokenizer, train

SFT_FORMAT = "cria-messages-1"
TRAINING_BYTES = 64 << 20  # of text, for a tokenizer of our own
CHUNK_BYTES = 1 << 20  # UTF-8 bytes of text that a worker gets at a time
CHUNKS_IN_FLIGHT = 4  # per worker: this bounds the memory
CHUNKS_WORTH_A_WORKER = 16  # starting a process takes as long as encoding about so many

# ----------------------------------------------------------------------------------------------------------------------
# Reading: corpora -> documents -> chunks


def documents(corpus: Corpus, on_progress) -> Iterator[bytes]:
    """The texts of a corpus as UTF-8, each not empty. What is left out is counted in corpus.skipped.

    Cleaning and deduplication have their place here, between the reader and the chunks.
    """
    for file, text in corpus.records(on_progress):
        try:
            data = tidy(text).encode("utf-8")
        except UnicodeEncodeError:  # half of a surrogate pair, from a \ud83d in JSON that was cut in two
            file.skip("broken Unicode")
            continue
        if data:
            yield data
        else:
            file.skip("empty text")


def chunks(corpora: list[Corpus], on_progress) -> Iterator[tuple[int, list[bytes]]]:
    """(index of the corpus, documents of together about CHUNK_BYTES). Depends on nothing but the input."""
    for index, corpus in enumerate(corpora):
        chunk, size, empty = [], 0, True
        for document in documents(corpus, on_progress):
            chunk.append(document)
            size, empty = size + len(document), False
            if size >= CHUNK_BYTES:
                yield index, chunk
                chunk, size = [], 0
        if chunk:
            yield index, chunk
        if empty:
            raise UserError(f"{corpus.path} holds no document: {corpus.skipped_text() or 'it is empty'}")


def progress_bar(title: str, corpora: list[Corpus]) -> tqdm:
    """Counts the bytes of all input files; shows nothing where stderr is not a terminal."""
    return tqdm(total=sum(sum(corpus.sizes) for corpus in corpora), unit="B", unit_scale=True, desc=title, disable=None)


def is_validation(content: bytes, fraction: float) -> bool:
    """Whether a document belongs to the validation split: decided by its content alone.

    So copies of a text never end up on both sides, and adding data never moves a document.
    """
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "big") < fraction * 2**64


# ----------------------------------------------------------------------------------------------------------------------
# Encoding: chunk -> token bytes, in this process or in several


class Encoder:
    """What a worker does with a chunk. The result is small: token bytes and counts per split."""

    def __init__(self, tokenizer: Tokenizer, val_fraction: float):
        self.tokenizer, self.val_fraction = tokenizer, val_fraction

    def __call__(self, chunk: tuple[int, list[bytes]]) -> tuple[int, dict[str, tuple[bytes, dict]]]:
        index, texts = chunk
        parts = {split: [] for split in SPLITS}
        for data in texts:
            parts["val" if is_validation(data, self.val_fraction) else "train"].append(data)
        return index, {split: self._encode(part) for split, part in parts.items() if part}

    def _encode(self, texts: list[bytes]) -> tuple[bytes, dict]:
        tokenizer, ids, characters = self.tokenizer, [], 0
        for data in texts:
            text = data.decode("utf-8")
            characters += len(text)
            ids += tokenizer.encode(text, bos=tokenizer.add_bos, eos=True)
        packed = pack_ids(ids, len(tokenizer))
        counts = {"tokens": len(ids), "documents": len(texts), "bytes": sum(map(len, texts)), "characters": characters}
        return packed.tobytes(), {**counts, "max_id": int(packed.max())}


_encoder: Encoder | None = None  # in a worker process: loaded once, when it starts


def _start_worker(tokenizer_path: Path, val_fraction: float) -> None:
    global _encoder
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _encoder = Encoder(load_tokenizer(tokenizer_path), val_fraction)


def _end_with_parent() -> None:
    """A killed parent cannot tell its workers; without this they would wait for work forever."""
    multiprocessing.parent_process().join()
    os._exit(1)


def _encode_in_worker(chunk):
    return _encoder(chunk)


@contextlib.contextmanager
def encoded(work: Iterator, tokenizer: Tokenizer, config: PretrainConfig, workers: int):
    """An iterator over the encoded chunks of `work`, in its order, made by one or more processes."""
    if workers == 1:
        yield map(Encoder(tokenizer, config.val_fraction), work)
        return
    # spawn, because fork copies threads' locks in a bad state, and because it is the same on every system
    context = multiprocessing.get_context("spawn")
    start = (config.tokenizer, config.val_fraction)
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker, initargs=start)
    try:
        yield _in_order(pool, work, window=workers * CHUNKS_IN_FLIGHT)
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


def _in_order(pool: ProcessPoolExecutor, work: Iterator, window: int) -> Iterator:
    """Like pool.map, but at most `window` chunks are read ahead (pool.map would read the whole corpus)."""
    pending = deque()
    for chunk in work:
        with _interrupts_held():  # submit() also starts the processes
            pending.append(pool.submit(_encode_in_worker, chunk))
        if len(pending) >= window:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()


# ----------------------------------------------------------------------------------------------------------------------
# pretrain: corpora -> token files


def _sources(arguments: tuple[str, ...], table: dict[str, Reader], flag_name: str) -> tuple[list[Corpus], list[str]]:
    """Parse all NAME=PATH; the second list names everything that is wrong with them."""
    corpora, problems = [], []
    for argument in arguments:
        try:
            corpora.append(Corpus.from_argument(argument, table))
        except UserError as error:
            problems.append(f"{flag_name}: {error}")
    return corpora, problems


def _fraction_problems(fraction: float) -> list[str]:
    return [] if 0 <= fraction < 1 else [f"--val-fraction {fraction}: needs 0 or more and less than 1"]


@dataclass(frozen=True)
class PretrainConfig:
    corpus: tuple[str, ...] = flag(help="NAME=PATH …: a reader (see `list`) and a file or folder")
    tokenizer: Path | None = flag(None, "directory with tokenizer.model or tokenizer.json, or such a file; default: "
                                  "`tokenizer` beside --out, trained on this text if there is none")  # fmt: skip
    out: Path = flag(Path("data/pretrain"), "directory to write")
    workers: int = flag(0, "processes that encode; 0: one per core. The result does not depend on it")
    val_fraction: float = flag(0.01, "share of the documents for validation, chosen by their hash; 0: no val.bin")
    vocab_size: int = flag(6400, "size of the tokenizer that is trained where none is given")

    def problems(self) -> list[str]:
        workers = [] if self.workers >= 0 else [f"--workers {self.workers}: needs 0 or more"]
        return _sources(self.corpus, PRETRAINING, "--corpus")[1] + _fraction_problems(self.val_fraction) + workers


def pretrain(config: PretrainConfig) -> dict:
    """Text -> token files. Returns meta.json's content."""
    corpora, _ = _sources(config.corpus, PRETRAINING, "--corpus")
    if config.tokenizer is None:
        config = dataclasses.replace(config, tokenizer=own_tokenizer(corpora, config))
    tokenizer = load_tokenizer(config.tokenizer)
    if tokenizer.eos_id is None:
        raise UserError(f"{config.tokenizer} has no eos token, which ends every document")
    settings = {
        "corpora": [corpus.identity() for corpus in corpora],
        "tokenizer_sha256": tokenizer.fingerprint,
        "add_bos": tokenizer.add_bos,
        "val_fraction": config.val_fraction,
    }
    meta = finished(config.out, settings, FORMAT)
    if meta is None:
        start = time.perf_counter()
        meta, resumed = _prepare(config, corpora, tokenizer, settings)
        _print_pretrain_report(meta, corpora, seconds=time.perf_counter() - start, resumed=resumed)
    print(f"\nnext:  python pretrain.py --data {config.out}")
    return meta


def own_tokenizer(corpora: list[Corpus], config: PretrainConfig) -> Path:
    """The directory `tokenizer` beside OUT; where there is none, one is trained on the first TRAINING_BYTES of text."""
    folder = config.out.parent / "tokenizer"
    if folder.exists():
        print(f"tokenizer: {folder}, which is already there")
        return folder
    print(f"no --tokenizer: training one of {config.vocab_size:,} tokens on this text, into {folder}")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".sample-") as sample:
        text = Path(sample, "sample.jsonl")
        with open(text, "w", encoding="utf-8") as stream:
            size = 0
            for _, chunk in chunks(corpora, lambda count: None):
                stream.writelines(json.dumps({"text": document.decode()}, ensure_ascii=False) + "\n" for document in chunk)
                size += sum(map(len, chunk))
                if size > TRAINING_BYTES:
                    break
        train([text], config.vocab_size, folder)
    return folder


def _prepare(config: PretrainConfig, corpora: list[Corpus], tokenizer: Tokenizer, settings: dict) -> tuple[dict, bool]:
    """Fill OUT.partial, rename it to OUT. A user's mistake removes OUT.partial; a kill or a full disk leaves it."""
    partial = config.out.with_name(config.out.name + ".partial")
    writer = TokenWriter(partial, settings, len(corpora))
    resumed = writer.chunks_done
    try:
        _encode_all(config, corpora, tokenizer, writer)
        meta = _finish(partial, writer, corpora, tokenizer, settings)
    except UserError:
        writer.close()
        shutil.rmtree(partial)
        raise
    except BrokenProcessPool:
        raise UserError(
            "a worker process was killed, perhaps for lack of memory: run the same command again with fewer --workers; "
            "it goes on from here"
        ) from None
    os.rename(partial, config.out)
    (config.out / "progress.json").unlink()  # last: until here the same command would still go on from it
    return meta, bool(resumed)


def _encode_all(config: PretrainConfig, corpora: list[Corpus], tokenizer: Tokenizer, writer: TokenWriter) -> None:
    enough = sum(sum(corpus.sizes) for corpus in corpora) // (CHUNKS_WORTH_A_WORKER * CHUNK_BYTES) + 1
    workers = min(config.workers or os.cpu_count() or 1, enough)
    if writer.chunks_done:
        print(f"going on in {writer.folder} after {writer.chunks_done:,} chunks")
    with progress_bar("tokens", corpora) as bar:
        work = chunks(corpora, bar.update)
        for _ in range(writer.chunks_done):  # read again, but not encoded again
            next(work)
        with encoded(work, tokenizer, config, workers) as results:
            for source, parts in results:
                writer.append(source, parts)


def _finish(partial: Path, writer: TokenWriter, corpora: list[Corpus], tokenizer: Tokenizer, settings: dict) -> dict:
    """Check what came out, and write meta.json and the tokenizer beside the token files."""
    splits = writer.split_totals()
    wanted = SPLITS if settings["val_fraction"] else SPLITS[:1]
    counts = {split: splits[split]["documents"] if split in splits else 0 for split in wanted}
    refuse_empty_split(counts, "documents", settings["val_fraction"])
    writer.save()
    writer.close()
    for split in SPLITS:
        if split in splits:
            splits[split]["sha256"] = file_sha256(partial / f"{split}.bin")
        else:
            (partial / f"{split}.bin").unlink()
    meta = {
        "format": FORMAT,
        "dtype": token_dtype(len(tokenizer)).name,
        "vocab_size": len(tokenizer),
        "tokenizer_sha256": tokenizer.fingerprint,
        "add_bos": tokenizer.add_bos,
        "eos_id": tokenizer.eos_id,
        "splits": splits,
        "sources": [
            {"name": corpus.reader.name, "path": str(corpus.path), **total, "skipped": corpus.skipped}
            for corpus, total in zip(corpora, writer.totals)
        ],
        "settings": settings,
    }
    tokenizer.save(partial)
    write_json(partial / "meta.json", meta)
    return meta


def refuse_empty_split(counts: dict[str, int], what: str, val_fraction: float) -> None:
    """Raise UserError if a split that was asked for got nothing. `counts` holds the documents of each such split."""
    total = sum(counts.values())
    for split, count in counts.items():
        if not count:
            example = max(0.001, min(0.5, round(3 / total, 3)))
            advice = f"use {example:g}, say" if total > 1 else "use a text that makes more documents (reader lines?)"
            raise UserError(
                f"none of the {total:,} {what} fell into the {split} split with --val-fraction {val_fraction:g}: "
                f"{advice}, or 0 for no validation split"
            )


def _print_pretrain_report(meta: dict, corpora: list[Corpus], seconds: float, resumed: bool) -> None:
    sums = {key: sum(split[key] for split in meta["splits"].values()) for key in ("bytes", "characters", "tokens")}
    print_table(
        ("", "documents", "MB of text", "characters", "tokens", "characters per token"),
        [
            (name, f"{part['documents']:,}", f"{part['bytes'] / 1e6:.2f}", f"{part['characters']:,}",
             f"{part['tokens']:,}", f"{part['characters'] / part['tokens']:.2f}")
            for name, part in meta["splits"].items()
        ],
    )
    speed = "" if resumed else f", {sums['bytes'] / 1e6 / seconds:.1f} MB/s"
    print(f"vocabulary {meta['vocab_size']:,}, {meta['dtype']}, {seconds:.1f} s{speed}")
    print_skipped(corpora)


def print_skipped(corpora: list[Corpus]) -> None:
    for corpus in corpora:
        if corpus.skipped:
            print(f"left out of {corpus.path}: {corpus.skipped_text()}")


# ----------------------------------------------------------------------------------------------------------------------
# sft: instruction sets -> conversations


@dataclass(frozen=True)
class SftConfig:
    dataset: tuple[str, ...] = flag(help="NAME=PATH …: a reader (see `list`) and a file or folder")
    out: Path = flag(Path("data/sft"), "directory to write")
    val_fraction: float = flag(0.02, "share for validation, chosen by the hash of the first question; 0: no val.jsonl")

    def problems(self) -> list[str]:
        return _sources(self.dataset, INSTRUCTIONS, "--dataset")[1] + _fraction_problems(self.val_fraction)


def sft(config: SftConfig) -> dict:
    """Instruction sets -> train.jsonl, val.jsonl, meta.json. Returns meta.json's content."""
    datasets, _ = _sources(config.dataset, INSTRUCTIONS, "--dataset")
    settings = {"datasets": [dataset.identity() for dataset in datasets], "val_fraction": config.val_fraction}
    meta = finished(config.out, settings, SFT_FORMAT)
    if meta is None:
        with written_beside(config.out) as partial:
            meta = _write_conversations(partial, datasets, config.val_fraction, settings)
        print_table(
            ("", "conversations", "answers", "left out", "shortened"),
            [(source["name"] + "=" + source["path"], f"{source['conversations']:,}", f"{source['answers']:,}",
              f"{sum(entry['count'] for entry in source['skipped'].values()):,}",
              f"{sum(source['shortened'].values()):,}") for source in meta["sources"]],
        )
        print("conversations: " + ", ".join(f"{part['conversations']:,} {key}" for key, part in meta["splits"].items()))
        print_skipped(datasets)
    print(f"\nnext:  python sft.py --init-from out/pretrain --data {config.out}")
    return meta


def conversations(dataset: Corpus, counts: dict, on_progress) -> Iterator[list[dict]]:
    """The usable conversations of a dataset. Fills `counts`; what is left out is counted in dataset.skipped."""
    counts |= {"conversations": 0, "answers": 0, "shortened": {}}
    for file, record in dataset.records(on_progress):
        messages, problem = tidy_conversation(record)
        try:
            json.dumps(messages, ensure_ascii=False).encode("utf-8")
        except UnicodeEncodeError:
            messages, problem = [], "broken Unicode"
        if not messages:
            file.skip(problem)
            continue
        if problem:
            counts["shortened"][problem] = counts["shortened"].get(problem, 0) + 1
        counts["conversations"] += 1
        counts["answers"] += sum(message["role"] == "assistant" for message in messages)
        yield messages
    if not counts["conversations"]:
        what = dataset.skipped_text() or "it is empty"
        raise UserError(f"{dataset.path} holds no conversation with an answer: {what}")


def _write_conversations(partial: Path, datasets: list[Corpus], val_fraction: float, settings: dict) -> dict:
    """Fill the directory; returns what it put into meta.json."""
    splits = SPLITS if val_fraction else SPLITS[:1]
    written, sources = dict.fromkeys(splits, 0), []
    with contextlib.ExitStack() as stack:
        files = {name: stack.enter_context(open(partial / f"{name}.jsonl", "w", encoding="utf-8")) for name in splits}
        bar = stack.enter_context(progress_bar("conversations", datasets))
        for dataset in datasets:
            counts = {}
            for messages in conversations(dataset, counts, bar.update):
                # By the first question, so that another answer to it is not in the other split.
                question = next(message["content"] for message in messages if message["role"] == "user")
                split = "val" if is_validation(question.encode("utf-8"), val_fraction) else "train"
                files[split].write(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")
                written[split] += 1
            source = {"name": dataset.reader.name, "path": str(dataset.path)}
            sources.append({**source, **counts, "skipped": dataset.skipped})
    refuse_empty_split(written, "conversations", val_fraction)
    meta = {
        "format": SFT_FORMAT,
        "splits": {
            split: {"conversations": count, "sha256": file_sha256(partial / f"{split}.jsonl")}
            for split, count in written.items()
        },
        "sources": sources,
        "settings": settings,
    }
    write_json(partial / "meta.json", meta)
    return meta


@contextlib.contextmanager
def written_beside(out: Path):
    """A new directory OUT.partial that becomes OUT when the block ends well, and is removed when it does not."""
    partial = out.with_name(out.name + ".partial")
    if (partial / "progress.json").exists():
        raise UserError(f"{partial} is an interrupted `data_process.py pretrain`: finish it, or remove it")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        os.rename(partial, out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


# ----------------------------------------------------------------------------------------------------------------------
# textbook, list


@dataclass(frozen=True)
class TextbookConfig:
    out: Path = flag(Path("data/textbook"), "directory to write")
    seed: int = flag(0, "of the random choices: distractors, order")
    phrasings: int | None = flag(None, "ways in which SFT asks for each fact; off: all")
    passes: int = flag(4, "how often the pretraining text says each statement")


def textbook(config: TextbookConfig) -> dict:
    """Write the built-in corpus. Returns its counts."""
    from textbook import write_textbook

    compare = config.out.with_name(config.out.name + ".again")
    shutil.rmtree(compare, ignore_errors=True)  # of an interrupted run
    target = compare if config.out.exists() else config.out
    summary = write_textbook(target, config.seed, config.phrasings, config.passes)
    if target is compare:
        same = _same_files(compare, config.out)
        shutil.rmtree(compare)
        if not same:
            raise UserError(f"{config.out} already exists and holds something else; choose another --out or remove it")
        print(f"{config.out} already holds exactly this textbook: nothing to do")
    rows = [(key, value) for key, value in summary.items() if not isinstance(value, (dict, list))]
    print_table(("textbook", ""), rows)
    print(f"\nnext:  python data_process.py pretrain --corpus textbook={config.out}")
    return summary


def _same_files(one: Path, other: Path) -> bool:
    names = [sorted(path.relative_to(root) for path in root.rglob("*") if path.is_file()) for root in (one, other)]
    return names[0] == names[1] and all(filecmp.cmp(one / name, other / name, shallow=False) for name in names[0])


@dataclass(frozen=True)
class ListConfig:
    pass


def list_readers(config: ListConfig) -> dict:
    """Print the table of readers."""
    for command, table in (("pretrain --corpus", PRETRAINING), ("sft --dataset", INSTRUCTIONS)):
        rows = [(name, " ".join(reader.files), reader.layout, reader.source) for name, reader in table.items()]
        print_table((command, "files of a folder", "layout", "where from"), rows)
        print()
    return {"pretraining": list(PRETRAINING), "instructions": list(INSTRUCTIONS)}


COMMANDS = {
    "textbook": (textbook, TextbookConfig, "write the built-in textbook: corpus, instructions, preferences, exam"),
    "pretrain": (pretrain, PretrainConfig, "corpora -> token files for pretrain.py"),
    "sft": (sft, SftConfig, "instruction sets -> conversations for sft.py"),
    "list": (list_readers, ListConfig, "the readers: name, layout, where from"),
}

if __name__ == "__main__":
    command_line(None, None, description=__doc__, commands=COMMANDS)
