"""From text to what the trainers read: token files for pretraining, conversations and preference pairs for fine-tuning.

    python data_process.py textbook --out data/textbook                      # the built-in corpus; nothing to download
    python data_process.py pretrain --corpus textbook=data/textbook          # trains a tokenizer first, if there is none
    python data_process.py pretrain --corpus wudao=WuDao/ c4:0.5=c4-zh/ --tokenizer chatglm2/ --dedup minhash --out data/pretrain
    python data_process.py sft      --dataset alpaca=alpaca_zh.json sharegpt=sharegpt.jsonl --out data/sft
    python data_process.py preferences --dataset medical=train.json --out data/preferences
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

from settings import UserError, command_line, flag, read_json, too_small

import dataclasses
import filecmp
import functools
import json
import os
import re
import shutil
import tempfile
import time
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

from chunks import CHUNK_CHARACTERS, CHUNK_RECORDS, chunks
from cleaning import MAX_CHARS, MIN_CHARS, RULES, Cleaner
from data_look import LookConfig, look
from data_report import print_report
from decontamination import SHARE, Questions
from dedup import BANDS, NGRAM, PERMUTATIONS, THRESHOLD
from dedup import MIN_CHARS as SHORTEST
from download import DownloadConfig, fetch
from encoders import LeftOut, Recipe, cleaned_text, results
from files import copy_files, locked
from readers import INSTRUCTIONS, PREFERENCES, PRETRAINING, Corpus
from selection import FORMATS, finish, progress_bar, shard_folders, shard_settings
from spool import CHUNKS_PER_SAVE, VERSION, Spool, join_shards
from tables import print_table
from token_files import finished, refuse_foreign, refuse_other_settings
from tokenizer import Tokenizer, load_tokenizer, train

TABLES = {"pretrain": PRETRAINING, "sft": INSTRUCTIONS, "preferences": PREFERENCES}
TRAINING_BYTES = 64 << 20  # of text, for a tokenizer of our own
LARGEST_WEIGHT = 1000
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
    mask_pii: bool = flag(False, "replace phone numbers, id cards and e-mail addresses by placeholders")
    simplify: bool = flag(False, "traditional to simplified characters (needs the package opencc)")
    decontaminate: Path | None = flag(None, "folder of evaluation questions: take out the lines, conversations and pairs that hold them")
    decontaminate_share: float = flag(SHARE, "share of a question's wording that must be there for that")
    limit: int | None = flag(None, "take only the first so many records of each corpus")
    seed: int = flag(0, "of the choice that a weight below 1 makes (NAME:0.3=PATH)")
    strict: bool = flag(False, "stop at the first record that cannot be read")
    shard: str | None = flag(None, "i/n: do only the i-th of n parts, for `merge`")

    def problems(self) -> list[str]:
        found = too_small(self, "workers", "seed", least=0) + too_small(self, "memory", "dedup_permutations", "limit", least=1)
        found += [f"--seed {self.seed} is too large"] if self.seed >= 1 << 63 else []
        found += [] if 0 <= self.val_fraction < 1 else [f"--val-fraction {self.val_fraction}: needs 0 or more and less than 1"]
        shares = ("dedup_threshold", "decontaminate_share")
        found += [f"--{name.replace('_', '-')} {value}: needs a share above 0, up to 1" for name in shares
                  if not 0 < (value := getattr(self, name)) <= 1]  # fmt: skip
        if self.dedup_permutations % BANDS:
            found.append(f"--dedup-permutations {self.dedup_permutations}: needs a multiple of {BANDS}, the number of bands")
        found += [] if self.out.name not in ("", "..") else [f"--out {self.out}: name a new directory"]
        found += [f"--without {rule} and --{name}: one or the other" for rule, name, asked in
                  (("personal", "mask-pii", self.mask_pii), ("simplify", "simplify", self.simplify)) if asked and rule in self.without]
        for check in (lambda: self.part, lambda: Cleaner(**self.cleaner())):
            try:
                check()
            except UserError as error:
                found.append(str(error))
        return found + self.sources[1]

    @property
    def part(self) -> tuple[int, int]:
        """--shard i/n as (i - 1, n)."""
        match = re.fullmatch(r"(\d+)/(\d+)", self.shard or "1/1")
        if not match or not 1 <= int(match[1]) <= int(match[2]):
            raise UserError(f"--shard {self.shard}: write i/n with i from 1 to n, such as 2/4")
        return int(match[1]) - 1, int(match[2])

    @functools.cached_property
    def sources(self) -> tuple[list[Corpus], list[str]]:
        """What every NAME=PATH names, and everything that is wrong with them."""
        name = "corpus" if self.kind == "pretrain" else "dataset"
        corpora, problems = [], []
        for argument in getattr(self, name):
            try:
                corpora.append(Corpus.from_argument(argument, TABLES[self.kind], strict=self.strict))
            except UserError as error:
                problems.append(f"--{name}: {error}")
        problems += [f"--{name}: the weight {corpus.weight:g} is more than {LARGEST_WEIGHT}" for corpus in corpora
                     if corpus.weight > LARGEST_WEIGHT]  # fmt: skip
        out = self.out.resolve()
        problems += [f"--out {self.out} lies within {corpus.path}, which is read" for corpus in corpora
                     if corpus.path.is_dir() and out.is_relative_to(corpus.path.resolve())]  # fmt: skip
        return corpora, problems

    def cleaner(self) -> dict:
        asked = {"personal": self.mask_pii, "simplify": self.simplify}
        without = tuple(rule for rule in RULES if not asked.get(rule)) if "all" in self.without else self.without
        return {"without": without, "mask_pii": self.mask_pii, "simplify": self.simplify}


@dataclass(frozen=True, kw_only=True)
class PretrainConfig(DataConfig):
    corpus: tuple[str, ...] = flag(help="NAME=PATH …, or NAME:0.3=PATH for a share: a reader (see `list`) and a file or folder")
    tokenizer: Path | None = flag(None, "directory with tokenizer.model or tokenizer.json, or such a file; default: "
                                  "`tokenizer` beside --out, trained on this text if there is none")  # fmt: skip
    out: Path = flag(Path("data/pretrain"), "directory to write")
    val_fraction: float = flag(0.01, "share of the documents for validation, chosen by their hash; 0: no val.bin")
    vocab_size: int = flag(6400, "size of the tokenizer that is trained where none is given")
    min_chars: int = flag(MIN_CHARS, "drop texts with fewer characters than this, spaces not counted")
    max_chars: int = flag(MAX_CHARS, "drop texts with more characters than this")
    kind = "pretrain"

    def problems(self) -> list[str]:
        return too_small(self, "min_chars", least=0) + too_small(self, "max_chars", "vocab_size", least=1) + super().problems()

    def cleaner(self) -> dict:
        return {**super().cleaner(), "min_chars": self.min_chars, "max_chars": self.max_chars}


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


# ----------------------------------------------------------------------------------------------------------------------
# The pipeline: corpora -> spool -> train, val, meta.json, report.md


def prepare(config: DataConfig) -> dict:
    """`pretrain`, `sft` and `preferences`. Returns the report (report.json's content)."""
    part, parts = config.part
    target = config.out if config.shard is None else config.out.with_name(f"{config.out.name}.shard-{part + 1}-of-{parts}")
    busy = f"another process is writing {target}; wait for it, or choose another --out"
    with locked(target.with_name(f".{target.name}.lock"), busy):
        started = time.perf_counter()
        refuse_foreign(config.out, FORMATS[config.kind])
        corpora, _ = config.sources
        questions = Questions.from_folder(config.decontaminate) if config.decontaminate else None
        tokenizer = None
        if config.kind == "pretrain":
            config = dataclasses.replace(config, tokenizer=config.tokenizer or own_tokenizer(corpora, config))
            tokenizer = load_tokenizer(config.tokenizer)
        settings = run_settings(config, corpora, questions, tokenizer)
        if config.shard is None and finished(config.out, settings, FORMATS[config.kind]):
            print_next(config.kind, config.out)
            return read_json(config.out / "report.json")
        folder = target if config.shard else target.with_name(target.name + ".partial")
        refuse_foreign_partial(folder)
        if not folder.exists():
            for corpus in corpora:  # a wrong layout of the last corpus is noticed now, not when all others are encoded
                next(corpus.records(), None)
        spool = Spool(folder if config.shard else folder / "spool", settings, [str(corpus.path) for corpus in corpora])
        resumed = spool.chunks > 0
        try:
            with spool:
                workers = fill(spool, config, corpora, questions, tokenizer)
            if config.shard is None:
                report = finish(spool, folder, config.out, tokenizer, config.memory << 20)
                print_report(report, config.out, time.perf_counter() - started, workers, resumed)
                print_next(config.kind, config.out)
                return report
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
        "version": VERSION,
        "chunk": f"{CHUNK_CHARACTERS} characters, {CHUNK_RECORDS} records",
        "corpora": [corpus.identity() for corpus in corpora],
        "val_fraction": config.val_fraction,
        "dedup": config.dedup,
        "rules": dict.fromkeys(Cleaner(**config.cleaner()).names, "on"),
        "limit": config.limit,
        "seed": config.seed,
        "shard": config.shard,
        "questions": {**questions.identity(), "share": config.decontaminate_share} if questions else None,
    }
    if config.dedup == "minhash":
        settings |= {"threshold": config.dedup_threshold, "permutations": config.dedup_permutations, "ngram": NGRAM, "shortest": SHORTEST,
                     "bands": BANDS}  # fmt: skip
    if tokenizer:
        if tokenizer.eos_id is None:
            raise UserError(f"{config.tokenizer} has no eos token, which ends every document")
        settings |= {"tokenizer_sha256": tokenizer.fingerprint, "add_bos": tokenizer.add_bos, "min_chars": config.min_chars,
                     "max_chars": config.max_chars}  # fmt: skip
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
    recipe = Recipe(
        config.kind, tuple(corpus.weight for corpus in corpora), config.seed, config.cleaner(),
        tokenizer=config.tokenizer if tokenizer else None,
        minhash={"permutations": config.dedup_permutations} if config.dedup == "minhash" else None,
        questions=spool.folder / "questions.npz" if questions else None, questions_share=config.decontaminate_share)  # fmt: skip
    part, parts = config.part
    with progress_bar("reading", size) as bar:
        work = (chunk for chunk in chunks(corpora, bar.update, spool.end, config.limit) if chunk.index % parts == part)
        with results(work, recipe, tokenizer, workers) as made:
            if tokenizer:
                tokenizer.save(spool.folder / "tokenizer")
            for result in made:
                spool.append(result)
    spool.complete = True
    spool.save()
    return workers


def refuse_foreign_partial(partial: Path) -> None:
    """Raise UserError if OUT.partial, or a shard's folder, is there but none that this program left."""
    ours = (partial / "progress.json", partial / "spool" / "progress.json")
    files = (path for path in partial.rglob("*") if path.is_file() and path.name != ".progress.json.partial")
    if not any(path.is_file() for path in ours) and any(files):
        raise UserError(f"{partial} already exists and holds something else; choose another --out or remove it")


def print_next(kind: str, out: Path) -> None:
    trainer = {"pretrain": f"python pretrain.py --data {out}", "sft": f"python sft.py --init-from out/pretrain --data {out}"}
    if kind in trainer:
        print(f"\nnext:  {trainer[kind]}")
    print(f"look:  python data_process.py look {out}")


def own_tokenizer(corpora: list[Corpus], config: PretrainConfig) -> Path:
    """The directory `tokenizer` beside OUT; where there is none, one is trained on the first TRAINING_BYTES of clean text."""
    folder = config.out.parent / "tokenizer"
    with locked(folder.with_name(".tokenizer.lock"), f"another process is training {folder}; wait for it, then run the same again"):
        if folder.exists():
            print(f"tokenizer: {folder}, which is already there (--vocab-size is for a new one)")
        else:
            _train_tokenizer(folder, corpora, config)
    return folder


def _train_tokenizer(folder: Path, corpora: list[Corpus], config: PretrainConfig) -> None:
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
        if not size:
            raise UserError(f"{', '.join(str(corpus.path) for corpus in corpora)}: no text to train a tokenizer on is left after "
                            "cleaning; give a --tokenizer to see in the report what became of each record")
        train([text], config.vocab_size, folder)


# ----------------------------------------------------------------------------------------------------------------------
# merge: the shards of several machines


@dataclass(frozen=True)
class MergeConfig:
    out: Path = flag(Path("data/pretrain"), "the --out of the shards: OUT.shard-1-of-n … must lie beside it")
    memory: int = flag(1024, "MiB that finding duplicates may take; beyond, it works on the disk")

    def problems(self) -> list[str]:
        return too_small(self, "memory", least=1) + ([] if self.out.name else [f"--out {self.out}: name the directory"])


def merge(config: MergeConfig) -> dict:
    """OUT.shard-*-of-n -> OUT: the data that one machine alone would have written. The shards stay."""
    started = time.perf_counter()
    with locked(config.out.with_name(f".{config.out.name}.lock"), f"another process is writing {config.out}; wait for it"):
        folders = shard_folders(config.out)
        found = [shard_settings(folder) for folder in folders]
        unfinished = [str(folder) for folder, settings in zip(folders, found) if settings is None]
        if unfinished:
            raise UserError(f"not finished: {', '.join(unfinished)}; run its command again")
        settings = {**found[0], "shard": None}
        for folder, other in zip(folders, found):
            refuse_other_settings(folder, {**other, "shard": None}, settings)
        kind = settings["command"]
        if finished(config.out, settings, FORMATS[kind]):
            print_next(kind, config.out)
            return read_json(config.out / "report.json")
        tokenizer = load_tokenizer(folders[0] / "tokenizer") if kind == "pretrain" else None
        partial = config.out.with_name(config.out.name + ".partial")
        refuse_foreign_partial(partial)
        if partial.exists():  # of a merge that was interrupted; another run's is refused
            refuse_other_settings(partial, read_json(partial / "spool" / "progress.json")["settings"], settings)
            shutil.rmtree(partial)
        with Spool(partial / "spool", settings, [""] * len(settings["corpora"])) as spool:
            if tokenizer:
                copy_files(folders[0] / "tokenizer", partial / "spool" / "tokenizer")
            join_shards(folders, spool)
        report = finish(spool, partial, config.out, tokenizer, config.memory << 20)
    print_report(report, config.out, time.perf_counter() - started)
    print_next(kind, config.out)
    return report


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
