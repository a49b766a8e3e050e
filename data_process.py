"""From text to what the trainers read: token files for pretraining, conversations and preference pairs for fine-tuning.

    python data_process.py textbook --out data/textbook                      # the built-in corpus; nothing to download
    python data_process.py pretrain --corpus textbook=data/textbook          # trains a tokenizer first, if there is none
    python data_process.py pretrain --corpus wudao=WuDao/ c4:0.5=c4-zh/ --tokenizer chatglm2/ --dedup minhash --out data/pretrain
    python data_process.py sft      --dataset alpaca=alpaca_zh.json sharegpt=sharegpt.jsonl --out data/sft
    python data_process.py preferences --dataset medical-reward=train.json --out data/preferences
    python data_process.py list                                              # the readers: name, layout, where from
    python data_process.py look data/sft --tokenizer out/tokenizer           # page through what was made

One process reads the corpora and cuts them into chunks; the workers clean and encode (encoders.py); the results are appended
to a spool on the disk in the order of the chunks (spool.py); when all are there, duplicates are found (dedup.py) and the rest
is copied to train and val (selection.py). So memory does not grow with the corpus, the result is the same for any number of
workers, and after a kill the same command goes on where it was. report.md says what happened to every record.

On several machines: `--shard 1/4` … `--shard 4/4`, the same command otherwise, then `merge`. The layout of the token directory:
token_files.py.
"""

from __future__ import annotations

from settings import UserError, command_line, flag

import dataclasses
import filecmp
import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from cleaning import RULES, Cleaner
from data_look import LookConfig, look
from data_report import checked, print_report, report_markdown
from decontamination import SHARE, Questions
from dedup import BANDS, MIN_CHARS, NGRAM, PERMUTATIONS, THRESHOLD
from download import DownloadConfig, fetch
from encoders import LeftOut, Recipe, cleaned_text, results
from files import lock, write_json, write_text
from readers import INSTRUCTIONS, PREFERENCES, PRETRAINING, Corpus
from selection import duplicate_examples, duplicates_of, select, shard_folders, shard_settings, source_reports
from spool import CHUNKS_PER_SAVE, START, Chunk, Spool, join_shards
from tables import print_table
from token_files import FORMAT, SPLITS, finished, token_dtype
from tokenizer import Tokenizer, load_tokenizer, train

FORMATS = {"pretrain": FORMAT, "sft": "cria-messages-1", "preferences": "cria-preferences-1"}
TABLES = {"pretrain": PRETRAINING, "sft": INSTRUCTIONS, "preferences": PREFERENCES}
NOUNS = {"pretrain": "document", "sft": "conversation", "preferences": "pair"}
UNITS = {"pretrain": "tokens", "sft": "answers", "preferences": "pairs"}
TRAINING_BYTES = 64 << 20  # of text, for a tokenizer of our own
CHUNK_CHARACTERS = 1 << 18  # of text that a worker gets at a time
CHUNK_RECORDS = 1 << 12
CHUNKS_WORTH_A_WORKER = 16  # starting a process takes as long as encoding about so many

# ----------------------------------------------------------------------------------------------------------------------
# Settings


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Flags that pretrain, sft and preferences share."""

    workers: int = flag(0, "processes that clean and encode; 0: one per core. The result does not depend on it")
    dedup: str = flag("exact", "drop copies of a text: exact ones (but for spaces, punctuation, case), also near ones, or none",
                      choices=("exact", "minhash", "none"))  # fmt: skip
    dedup_threshold: float = flag(THRESHOLD, "minhash: Jaccard similarity from which on a text counts as a copy")
    dedup_permutations: int = flag(PERMUTATIONS, "minhash: length of a signature; more is more exact, and slower")
    memory: int = flag(1024, "MiB that finding duplicates may take; beyond, it works on the disk")
    without: tuple[str, ...] = flag((), f"cleaning rules to switch off: all, or some of {', '.join(RULES)}")
    min_chars: int = flag(10, "drop texts with fewer characters than this")
    max_chars: int = flag(10_000_000, "drop texts with more characters than this")
    mask_pii: bool = flag(False, "replace phone numbers, id cards and e-mail addresses by placeholders")
    simplify: bool = flag(False, "traditional to simplified characters (needs the package opencc)")
    decontaminate: Path | None = flag(None, "folder of evaluation questions: drop the texts that hold them")
    decontaminate_share: float = flag(SHARE, "share of a question's wording that a text must hold for that")
    limit: int | None = flag(None, "take only the first so many records of each corpus")
    seed: int = flag(0, "of the choice that a weight below 1 makes (NAME:0.3=PATH)")
    strict: bool = flag(False, "stop at the first record that cannot be read")
    shard: str | None = flag(None, "i/n: do only the i-th of n parts, for `merge`")

    def problems(self) -> list[str]:
        found = [f"--{name.replace('_', '-')} must be {least:g} or more, not {value}" for name, least in
                 (("workers", 0), ("memory", 1), ("dedup_permutations", 1), ("min_chars", 0), ("max_chars", 1), ("limit", 1), ("seed", 0))
                 if (value := getattr(self, name)) is not None and value < least]  # fmt: skip
        found += [] if 0 <= self.val_fraction < 1 else [f"--val-fraction {self.val_fraction}: needs 0 or more and less than 1"]
        shares = ("dedup_threshold", "decontaminate_share")
        found += [f"--{name.replace('_', '-')} {value}: needs a share above 0, up to 1" for name in shares
                  if not 0 < (value := getattr(self, name)) <= 1]  # fmt: skip
        if self.dedup_permutations % BANDS:
            found.append(f"--dedup-permutations {self.dedup_permutations}: needs a multiple of {BANDS}, the number of bands")
        for check in (lambda: self.part, lambda: Cleaner(**self.cleaner())):
            try:
                check()
            except UserError as error:
                found.append(str(error))
        return found + _sources(self)[1]

    @property
    def part(self) -> tuple[int, int]:
        """--shard i/n as (i - 1, n)."""
        match = re.fullmatch(r"(\d+)/(\d+)", self.shard or "1/1")
        if not match or not 1 <= int(match[1]) <= int(match[2]):
            raise UserError(f"--shard {self.shard}: write i/n with i from 1 to n, such as 2/4")
        return int(match[1]) - 1, int(match[2])

    def cleaner(self) -> dict:
        without = tuple(RULES) if "all" in self.without else self.without
        return {"without": without, "min_chars": self.min_chars, "max_chars": self.max_chars, "mask_pii": self.mask_pii,
                "simplify": self.simplify}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class PretrainConfig(DataConfig):
    corpus: tuple[str, ...] = flag(help="NAME=PATH …, or NAME:0.3=PATH for a share: a reader (see `list`) and a file or folder")
    tokenizer: Path | None = flag(None, "directory with tokenizer.model or tokenizer.json, or such a file; default: "
                                  "`tokenizer` beside --out, trained on this text if there is none")  # fmt: skip
    out: Path = flag(Path("data/pretrain"), "directory to write")
    val_fraction: float = flag(0.01, "share of the documents for validation, chosen by their hash; 0: no val.bin")
    vocab_size: int = flag(6400, "size of the tokenizer that is trained where none is given")
    kind = "pretrain"


@dataclass(frozen=True, kw_only=True)
class SftConfig(DataConfig):
    dataset: tuple[str, ...] = flag(help="NAME=PATH …, or NAME:0.3=PATH for a share: a reader (see `list`) and a file or folder")
    out: Path = flag(Path("data/sft"), "directory to write")
    val_fraction: float = flag(0.02, "share for validation, chosen by the hash of the first question; 0: no val.jsonl")
    kind = "sft"


@dataclass(frozen=True, kw_only=True)
class PreferencesConfig(SftConfig):
    out: Path = flag(Path("data/preferences"), "directory to write")
    kind = "preferences"


def _sources(config: DataConfig) -> tuple[list[Corpus], list[str]]:
    """Parse all NAME=PATH; the second list names everything that is wrong with them."""
    name = "corpus" if config.kind == "pretrain" else "dataset"
    corpora, problems = [], []
    for argument in getattr(config, name):
        try:
            corpora.append(Corpus.from_argument(argument, TABLES[config.kind], strict=config.strict))
        except UserError as error:
            problems.append(f"--{name}: {error}")
    return corpora, problems


# ----------------------------------------------------------------------------------------------------------------------
# Reading: corpora -> chunks


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
            if limit is None or seen < limit:
                seen += 1
                chunk.skipped.append((reason, where))  # noqa: B023 (the chunk of the moment is meant)

        for file, record in corpus.records(on_progress, on_skip=skipped, start=(first_file, done)):
            if limit is not None and seen >= limit:
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


def _characters(record) -> int:
    """About how much text there is in a record."""
    if isinstance(record, str):
        return len(record)
    if isinstance(record, dict):
        return sum(map(_characters, record.values()))
    return sum(map(_characters, record)) if isinstance(record, list) else 0


def progress_bar(title: str, total: int) -> tqdm:
    """Counts bytes; shows nothing where stderr is not a terminal."""
    return tqdm(total=total, unit="B", unit_scale=True, desc=title, disable=None)


# ----------------------------------------------------------------------------------------------------------------------
# The pipeline: corpora -> spool -> train, val, meta.json, report.md


def prepare(config: DataConfig) -> dict:
    """`pretrain`, `sft` and `preferences`. Returns the report (report.json's content)."""
    part, parts = config.part
    target = config.out if config.shard is None else config.out.with_name(f"{config.out.name}.shard-{part + 1}-of-{parts}")
    busy = lock(target.with_name(f".{target.name}.lock"), f"another process is writing {target}; wait for it, or choose another --out")
    try:
        corpora, _ = _sources(config)
        if config.kind == "pretrain" and config.tokenizer is None:
            config = dataclasses.replace(config, tokenizer=own_tokenizer(corpora, config))
        return _prepare(config, corpora, target)
    finally:
        Path(busy.name).unlink(missing_ok=True)
        busy.close()


def _prepare(config: DataConfig, corpora: list[Corpus], target: Path) -> dict:
    started = time.perf_counter()
    questions = Questions.from_folder(config.decontaminate) if config.decontaminate else None
    tokenizer = load_tokenizer(config.tokenizer) if config.kind == "pretrain" else None
    settings = run_settings(config, corpora, questions, tokenizer)
    if config.shard is None and (meta := finished(config.out, settings, FORMATS[config.kind])):
        print_next(config.kind, config.out)
        return json.loads((config.out / "report.json").read_text(encoding="utf-8")) if meta else {}
    folder = target if config.shard else target.with_name(target.name + ".partial")
    spooled = folder if config.shard else folder / "spool"
    spool = Spool(spooled, settings, [str(corpus.path) for corpus in corpora])
    resumed = spool.chunks > 0
    try:
        with spool:
            workers = fill(spool, config, corpora, questions, tokenizer)
        if config.shard is None:
            return finish(spool, folder, config.out, tokenizer, memory=config.memory << 20, started=started, workers=workers,
                          resumed=resumed)  # fmt: skip
    except UserError:
        if spool.chunks < CHUNKS_PER_SAVE:  # so little that a new start costs nothing
            shutil.rmtree(folder)
        raise
    except BrokenProcessPool:
        raise UserError("a worker process was killed, perhaps for lack of memory: run the same command again with fewer "
                        "--workers; it goes on from here") from None
    print(f"shard {config.shard} is complete: {folder}\n\nnext, when all are:  python data_process.py merge --out {config.out}")
    return {"shard": config.shard, "chunks": spool.chunks}


def run_settings(config: DataConfig, corpora: list[Corpus], questions: Questions | None, tokenizer: Tokenizer | None) -> dict:
    """Everything that decides the result, and nothing else: a run with the same settings goes on, or is the same run."""
    settings = {
        "command": config.kind,
        "corpora": [corpus.identity() for corpus in corpora],
        "val_fraction": config.val_fraction,
        "dedup": config.dedup,
        "rules": [rule for rule in RULES if rule not in config.cleaner()["without"]],
        **{name: getattr(config, name) for name in ("min_chars", "max_chars", "mask_pii", "simplify", "limit", "seed", "shard")},
        "questions": {**questions.identity(), "share": config.decontaminate_share} if questions else None,
    }
    if config.dedup == "minhash":
        settings |= {"threshold": config.dedup_threshold, "permutations": config.dedup_permutations, "ngram": NGRAM, "shortest": MIN_CHARS,
                     "bands": BANDS}  # fmt: skip
    if tokenizer:
        if tokenizer.eos_id is None:
            raise UserError(f"{config.tokenizer} has no eos token, which ends every document")
        settings |= {"tokenizer_sha256": tokenizer.fingerprint, "add_bos": tokenizer.add_bos}
    return settings


def fill(spool: Spool, config: DataConfig, corpora: list[Corpus], questions: Questions | None, tokenizer: Tokenizer | None) -> int:
    """Read what is not in the spool yet, let the workers encode it, append it. Returns the number of workers."""
    size = sum(sum(corpus.sizes) for corpus in corpora)
    workers = min(config.workers or os.cpu_count() or 1, size // (CHUNKS_WORTH_A_WORKER * 3 * CHUNK_CHARACTERS) + 1)
    if spool.complete:
        return workers
    if spool.chunks:
        print(f"going on in {spool.folder} after {spool.chunks:,} chunks")
    if questions:
        questions.save(spool.folder / "questions.npz")
    if tokenizer:
        tokenizer.save(spool.folder / "tokenizer")
    recipe = Recipe(
        config.kind, tuple(corpus.weight for corpus in corpora), config.seed, config.cleaner(),
        tokenizer=spool.folder / "tokenizer" if tokenizer else None,
        minhash={"permutations": config.dedup_permutations} if config.dedup == "minhash" else None,
        questions=spool.folder / "questions.npz" if questions else None, questions_share=config.decontaminate_share)  # fmt: skip
    part, parts = config.part
    with progress_bar("reading", size) as bar:
        work = (chunk for chunk in chunks(corpora, bar.update, spool.end, config.limit) if chunk.index % parts == part)
        with results(work, recipe, tokenizer, workers) as made:
            for result in made:
                spool.append(result)
    spool.complete = True
    spool.save()
    return workers


def finish(spool: Spool, partial: Path, out: Path, tokenizer: Tokenizer | None, *, memory: int, started: float, workers: int = 1,
           resumed: bool = False) -> dict:  # fmt: skip
    """Select from a complete spool, write meta.json and the reports, rename `partial` to `out`. Returns the report.

    The report tells of the data alone, not of where and how fast it was made: the same run leaves the same bytes.
    """
    settings, folder = spool.settings, spool.folder
    kind = settings["command"]
    dtype = token_dtype(len(tokenizer)) if tokenizer else None
    refuse_nothing(spool)
    with tqdm(total=1.0, desc="duplicates", disable=None, bar_format="{desc}: {percentage:3.0f}%|{bar}| {elapsed}<{remaining}") as bar:
        duplicates = duplicates_of(folder, settings, memory, lambda fraction: bar.update(fraction - bar.n))
    with progress_bar("writing", (folder / "payload.bin").stat().st_size) as bar:
        chosen = select(folder, partial, settings, duplicates, dtype, bar.update)
    wanted = SPLITS if settings["val_fraction"] else SPLITS[:1]
    counts = {split: chosen["splits"].get(split, {"documents": 0})["documents"] for split in wanted}
    refuse_empty_split(counts, NOUNS[kind] + "s", settings["val_fraction"])

    def as_text(payload: bytes) -> str:
        if tokenizer is None:
            return payload.decode("utf-8", "replace")
        import numpy as np

        return tokenizer.decode(np.frombuffer(payload[: len(payload) // dtype.itemsize * dtype.itemsize], dtype).tolist())

    examples = duplicate_examples(folder, duplicates, len(settings["corpora"]), as_text)
    sources = source_reports(settings, spool.totals, chosen, examples)
    meta = {"format": FORMATS[kind]}
    if tokenizer:
        meta |= {"dtype": dtype.name, "vocab_size": len(tokenizer), "tokenizer_sha256": tokenizer.fingerprint,
                 "add_bos": tokenizer.add_bos, "eos_id": tokenizer.eos_id}  # fmt: skip
        shutil.copytree(folder / "tokenizer", partial, dirs_exist_ok=True)
    splits = {name: {**counts, UNITS[kind]: counts["units"]} for name, counts in chosen["splits"].items()}
    for counts in splits.values():
        del counts["units"]
        counts["sources"] = counts.pop("by_source")
        if not tokenizer:
            del counts["max_id"]
    meta |= {"splits": splits, "sources": [{name: source[name] for name in ("name", "path", "records", "kept")} for source in sources],
             "settings": settings}  # fmt: skip
    lengths = {"unit": "tokens" if tokenizer else "characters", **chosen["lengths"]}
    report = checked({"command": kind, "settings": settings, "sources": sources, "splits": splits, "lengths": lengths,
                      "questions": settings["questions"]})  # fmt: skip
    write_json(partial / "report.json", report)
    write_text(partial / "report.md", report_markdown(report))
    write_json(partial / "meta.json", meta)
    os.rename(partial, out)
    shutil.rmtree(out / "spool")  # last: until here the same command would still go on from it
    print_report(report, out, time.perf_counter() - started, workers, resumed)
    print_next(kind, out)
    return report


def refuse_nothing(spool: Spool) -> None:
    """Raise UserError if no document came out at all, and say what became of the records."""
    if any(total["documents"] for total in spool.totals):
        return
    reasons = [f"{entry['count']:,} {reason} (first: {entry['examples'][0]['where']})" for total in spool.totals
               for reason, entry in {**total["unreadable"], **total["dropped"]}.items()]  # fmt: skip
    paths = ", ".join(total["path"] for total in spool.totals)
    raise UserError(f"{paths} holds no {NOUNS[spool.settings['command']]} to write: {', '.join(reasons) or 'it is empty'}")


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


def print_next(kind: str, out: Path) -> None:
    trainer = {"pretrain": f"python pretrain.py --data {out}", "sft": f"python sft.py --init-from out/pretrain --data {out}"}
    if kind in trainer:
        print(f"\nnext:  {trainer[kind]}")
    print(f"look:  python data_process.py look {out}")


def own_tokenizer(corpora: list[Corpus], config: PretrainConfig) -> Path:
    """The directory `tokenizer` beside OUT; where there is none, one is trained on the first TRAINING_BYTES of clean text."""
    folder = config.out.parent / "tokenizer"
    if folder.exists():
        print(f"tokenizer: {folder}, which is already there")
        return folder
    print(f"no --tokenizer: training one of {config.vocab_size:,} tokens on this text, into {folder}")
    folder.parent.mkdir(parents=True, exist_ok=True)
    cleaner, size = Cleaner(**config.cleaner()), 0
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".sample-") as sample:
        text = Path(sample, "sample.jsonl")
        with open(text, "w", encoding="utf-8") as stream:
            for chunk in chunks(corpora, lambda count: None, limit=config.limit):
                for record in chunk.records:
                    try:
                        document = cleaned_text(record, cleaner).text
                    except LeftOut:
                        continue
                    stream.write(json.dumps({"text": document}, ensure_ascii=False) + "\n")
                    size += len(document.encode("utf-8"))
                if size > TRAINING_BYTES:
                    break
        train([text], config.vocab_size, folder)
    return folder


# ----------------------------------------------------------------------------------------------------------------------
# merge: the shards of several machines


@dataclass(frozen=True)
class MergeConfig:
    out: Path = flag(Path("data/pretrain"), "the --out of the shards: OUT.shard-1-of-n … must lie beside it")
    memory: int = flag(1024, "MiB that finding duplicates may take")


def merge(config: MergeConfig) -> dict:
    """OUT.shard-*-of-n -> OUT: what one machine alone would have written. The shards stay."""
    started, folders = time.perf_counter(), shard_folders(config.out)
    if not folders:
        raise UserError(f"there is no {config.out}.shard-1-of-…; make the shards with --shard i/n --out {config.out}")
    busy = lock(config.out.with_name(f".{config.out.name}.lock"), f"another process is writing {config.out}; wait for it")
    try:
        found = {folder: shard_settings(folder) for folder in folders}
        unfinished = [str(folder) for folder, settings in found.items() if settings is None]
        if unfinished:
            raise UserError(f"not finished: {', '.join(unfinished)}; run its command again")
        settings = [{**settings, "shard": None} for settings in found.values()]
        parts = int(next(iter(found.values()))["shard"].split("/")[1])
        missing = [f"{part}/{parts}" for part in range(1, parts + 1) if f"{part}/{parts}" not in {s["shard"] for s in found.values()}]
        if missing:
            raise UserError(f"{config.out}: missing the shards {', '.join(missing)}")
        if len(folders) != parts or any(other != settings[0] for other in settings):
            raise UserError(f"the shards of {config.out} were made with different settings: {', '.join(map(str, folders))}")
        meta = finished(config.out, settings[0], FORMATS[settings[0]["command"]])
        if meta:
            return json.loads((config.out / "report.json").read_text(encoding="utf-8"))
        partial = config.out.with_name(config.out.name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)
        with Spool(partial / "spool", settings[0], [""] * len(settings[0]["corpora"])) as spool:
            join_shards(folders, spool)
        tokenizer = None
        if (folders[0] / "tokenizer").is_dir():
            shutil.copytree(folders[0] / "tokenizer", partial / "spool" / "tokenizer")
            tokenizer = load_tokenizer(folders[0] / "tokenizer")
        return finish(spool, partial, config.out, tokenizer, memory=config.memory << 20, started=started)
    finally:
        Path(busy.name).unlink(missing_ok=True)
        busy.close()


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
    """Print the readers: name and layout, and below it size, licence and where to get it."""
    flags = {"pretrain": "--corpus", "sft": "--dataset", "preferences": "--dataset"}
    width = max(len(name) for table in TABLES.values() for name in table) + 4
    for command, table in TABLES.items():
        print(f"{command} {flags[command]} NAME=PATH\n")
        for reader in table.values():
            print(f"  {reader.name + (' ↓' if reader.downloads else ''):<{width}}{reader.layout}")
            print(f"  {'':<{width}}    {' · '.join(filter(None, (reader.size, reader.licence, reader.source)))}")
        print()
    print("↓ can be fetched: python data_process.py download NAME")
    return {command: list(table) for command, table in TABLES.items()}


COMMANDS = {
    "textbook": (textbook, TextbookConfig, "write the built-in textbook: corpus, instructions, preferences, exam"),
    "pretrain": (prepare, PretrainConfig, "corpora -> token files for pretrain.py"),
    "sft": (prepare, SftConfig, "instruction sets -> conversations for sft.py"),
    "preferences": (prepare, PreferencesConfig, "preference sets -> pairs of a chosen and a rejected answer"),
    "merge": (merge, MergeConfig, "join what --shard i/n made on several machines"),
    "look": (look, LookConfig, "page through prepared data: documents, or conversations with what is learned in colour"),
    "list": (list_readers, ListConfig, "the readers: name, layout, size, licence, where from"),
    "download": (fetch, DownloadConfig, "fetch a corpus, with mirrors, checksum and resume"),
}

if __name__ == "__main__":
    command_line(None, None, description=__doc__, commands=COMMANDS)
