"""data_process.py and readers/: the same bytes whatever the workers and the interruptions, and one line per mistake."""

from __future__ import annotations

from settings import UserError

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

import chunks
import data_process
import encoders
import readers.source
import spool
from cleaning import Cleaner
from data_look import LookConfig, look
from data_process import PretrainConfig, SftConfig, TextbookConfig
from dedup import digest
from files import lock
from readers import INSTRUCTIONS, PREFERENCES, PRETRAINING, Corpus
from token_files import open_tokens, pack_ids
from tokenizer import load_tokenizer

REPOSITORY = Path(__file__).resolve().parent.parent
SHARED = Path(os.environ.get("CRIA_SHARED_DATA", REPOSITORY.parent / "shared" / "data"))
WORDS = "春眠不觉晓处闻啼鸟夜来风雨声花落知多少床前明月光疑是地上霜举头望低思故乡白日依山尽黄河入海流欲穷千里目更一层楼"


def sentence(rng: random.Random, length: int) -> str:
    return "".join(rng.choice(WORDS) for _ in range(length)) + rng.choice(["。", "？\n", " abc 12\n"])


def texts(count: int, seed: int = 0) -> list[str]:
    rng = random.Random(seed)
    return [
        "".join(sentence(rng, rng.randrange(12, 30)) for _ in range(rng.randrange(1, 8))).strip() for _ in range(count)
    ]


def write_lines(path: Path, records) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def tokenizer_file(tmp_path_factory) -> Path:
    """A small sentencepiece BPE, made by sentencepiece itself."""
    folder = tmp_path_factory.mktemp("tokenizer")
    corpus = folder / "corpus.txt"
    corpus.write_text("\n".join(texts(300, seed=1)), encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(corpus), model_prefix=str(folder / "tokenizer"), vocab_size=460, model_type="bpe", byte_fallback=True,
        normalization_rule_name="identity", remove_extra_whitespaces=False, add_dummy_prefix=False,
        character_coverage=1.0, minloglevel=2, user_defined_symbols=["\n"],
    )  # fmt: skip
    return folder / "tokenizer.model"


@pytest.fixture(scope="session")
def other_tokenizer_file(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("other")
    corpus = folder / "corpus.txt"
    corpus.write_text("\n".join(texts(300, seed=2)), encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(corpus), model_prefix=str(folder / "tokenizer"), vocab_size=400, model_type="bpe", byte_fallback=True,
        character_coverage=1.0, minloglevel=2,
    )  # fmt: skip
    return folder / "tokenizer.model"


@pytest.fixture(scope="session")
def corpus_file(tmp_path_factory) -> Path:
    """400 documents, 70 kB of text."""
    return write_lines(tmp_path_factory.mktemp("corpus") / "corpus.jsonl", [{"text": text} for text in texts(400)])


@pytest.fixture
def small_chunks(monkeypatch):
    """About 35 chunks of the 70 kB corpus, and progress saved after every third."""
    for module in (chunks, data_process):
        monkeypatch.setattr(module, "CHUNK_CHARACTERS", 700)
    monkeypatch.setattr(spool, "CHUNKS_PER_SAVE", 3)
    monkeypatch.setattr(data_process, "CHUNKS_PER_SAVE", 3)


def prepare(corpus: Path, tokenizer: Path, out: Path, name: str = "jsonl", **settings) -> dict:
    settings = {"workers": 1, "val_fraction": 0.1, **settings}
    return data_process.prepare(PretrainConfig(corpus=(f"{name}={corpus}",), tokenizer=tokenizer, out=out, **settings))


def sft(*datasets, out: Path, **settings) -> dict:
    return data_process.prepare(SftConfig(dataset=tuple(datasets), out=out, workers=1, **settings))


def read_all(name: str, path: Path, table=PRETRAINING) -> tuple[list, dict]:
    skipped = []
    corpus = Corpus.from_argument(f"{name}={path}", table)
    return [record for _, record in corpus.records(on_skip=lambda *event: skipped.append(event))], skipped


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def meta_of(folder: Path) -> dict:
    return json.loads((folder / "meta.json").read_text(encoding="utf-8"))


def documents_of(folder: Path, split: str) -> list[str]:
    """The documents of a token directory, decoded."""
    tokens, tokenizer = open_tokens(folder, split), load_tokenizer(folder)
    if tokens is None:
        return []
    ends = np.flatnonzero(tokens.tokens == tokenizer.eos_id)
    assert ends[-1] == len(tokens) - 1  # every document ends with eos, and nothing follows
    return [tokenizer.decode(part[:-1].tolist()) for part in np.split(tokens.tokens, ends + 1)[:-1]]


def lines_of(folder: Path, split: str) -> list[dict]:
    path = folder / f"{split}.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def balanced(report: dict) -> bool:
    """Whether every record is accounted for, in every source."""
    return all(
        source["records"] == sum(entry["count"] for part in ("unreadable", "dropped") for entry in source[part].values())
        + source["duplicates"]["exact"] + source["duplicates"]["near"] + source["not_sampled"] + source["kept"]
        for source in report["sources"])  # fmt: skip


def turns(*contents: str) -> list[dict]:
    return [{"role": ("user", "assistant")[at % 2], "content": content} for at, content in enumerate(contents)]


def command(*words, **options) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, str(REPOSITORY / "data_process.py"), *map(str, words)],
        capture_output=True, text=True, encoding="utf-8", **options,
    )  # fmt: skip


# ----------------------------------------------------------------------------------------------------------------------
# Token files


def test_token_file_decodes_to_the_documents(corpus_file, tokenizer_file, tmp_path):
    report = prepare(corpus_file, tokenizer_file, tmp_path / "out")
    meta = meta_of(tmp_path / "out")
    tokenizer = load_tokenizer(tmp_path / "out")  # the copy beside the data
    assert tokenizer.fingerprint == meta["tokenizer_sha256"] == load_tokenizer(tokenizer_file).fingerprint
    found = {}
    for split in ("train", "val"):
        tokens = open_tokens(tmp_path / "out", split)
        tokens.verify()
        assert tokens.tokens.dtype == np.dtype("<u2") and not tokens.tokens.flags.writeable
        found[split] = documents_of(tmp_path / "out", split)
        counts = meta["splits"][split]
        assert counts == report["splits"][split]
        assert counts["tokens"] == len(tokens) == sum(counts["sources"])
        assert counts["documents"] == len(found[split])
        assert counts["bytes"] == sum(len(text.encode("utf-8")) for text in found[split])
        assert counts["characters"] == sum(map(len, found[split]))
        assert counts["max_id"] == tokens.tokens.max() == tokens.max_id
    assert 20 <= len(found["val"]) <= 60  # 10% of 400, chosen by hash
    wanted = texts(400)
    assert sorted(found["train"] + found["val"]) == sorted(wanted)
    validation = set(found["val"])
    assert found["train"] == [text for text in wanted if text not in validation]  # the order is kept
    assert balanced(report) and report["sources"][0]["kept"] == 400


@pytest.mark.parametrize("name", ["chatglm2", "llama2"])
def test_real_tokenizers_give_the_cleaned_texts_back(name, tmp_path):
    """Readers and rules run on the real samples; what is written decodes to what they made, text by text."""
    folder = SHARED / "tokenizers" / name
    if not folder.is_dir():
        pytest.skip("the sample data is not here")
    corpora = tuple(f"{reader}={SHARED / 'pretrain' / path}" for reader, path in
                    (("txt", "laws/刑法"), ("chinese-poetry", "chinese-poetry/论语"), ("c4", "format_samples/c4_demo.jsonl")))  # fmt: skip
    config = PretrainConfig(corpus=corpora, tokenizer=folder, out=tmp_path / "out", workers=1, val_fraction=0.1)
    report = data_process.prepare(config)
    wanted, cleaner, seen = [], Cleaner(**config.cleaner()), set()
    for argument in corpora:
        for _, record in Corpus.from_argument(argument, PRETRAINING).records():
            try:
                text = encoders.cleaned_text(record, cleaner).text
            except encoders.LeftOut:
                continue
            if (key := digest(text)) not in seen:
                seen.add(key)
                wanted.append(text)
    assert sorted(documents_of(tmp_path / "out", "train") + documents_of(tmp_path / "out", "val")) == sorted(wanted)
    assert len(wanted) > 300 and balanced(report)


RECORDS = st.one_of(
    st.fixed_dictionaries({"text": st.one_of(
        st.text(max_size=30),
        st.sampled_from(["春眠不觉晓，处处闻啼鸟。", "春眠不觉晓  处处闻啼鸟", "", None, 7, "\ud83d", "a" * 40, "锟斤拷" * 9]),
        st.text(alphabet="春眠不觉晓<>&。！ \n\u200b", max_size=60))}),
    st.just({"title": "no text"}), st.just(3), st.just("{broken"))  # fmt: skip


@settings(max_examples=40, deadline=None)
@given(records=st.lists(RECORDS, max_size=25), dedup=st.sampled_from(["none", "exact", "minhash"]),
       weight=st.sampled_from([1, 0.5, 2, 2.5]), limit=st.sampled_from([None, 5]))  # fmt: skip
def test_no_record_is_lost_without_being_counted(records, dedup, weight, limit, tokenizer_file, tmp_path_factory):
    folder = tmp_path_factory.mktemp("random")
    good = [{"text": text} for text in texts(3, seed=5)]
    lines = [record if isinstance(record, str) else json.dumps(record) for record in [*good, *records]]
    (folder / "x.jsonl").write_text("\n".join(lines), encoding="utf-8")
    config = PretrainConfig(corpus=(f"jsonl:{weight}={folder / 'x.jsonl'}",), tokenizer=tokenizer_file, out=folder / "out",
                            workers=1, val_fraction=0.0, dedup=dedup, limit=limit)  # fmt: skip
    report = data_process.prepare(config)
    source = report["sources"][0]
    assert balanced(report) and source["records"] == min(len(lines), limit or len(lines))
    written = documents_of(folder / "out", "train")
    assert len(written) == source["written"] == report["splits"]["train"]["documents"]
    assert len(set(map(digest, written))) == source["kept"] or dedup == "none"
    repeats = {written.count(text) for text in written} if dedup != "none" else set()
    assert repeats <= {1: {1}, 0.5: {1}, 2: {2}, 2.5: {2, 3}}[weight]


def test_same_bytes_for_any_number_of_workers(corpus_file, tokenizer_file, tmp_path, small_chunks, capsys):
    for workers in (1, 2):
        prepare(corpus_file, tokenizer_file, tmp_path / f"{workers}", workers=workers)
        assert f"s with {workers} worker" in capsys.readouterr().out
    one, two = files_of(tmp_path / "1"), files_of(tmp_path / "2")
    assert set(one) >= {"train.bin", "val.bin", "meta.json", "report.json", "report.md", "tokenizer.model"}
    assert one == two
    assert not list(tmp_path.glob("*.partial"))


def test_adding_data_never_moves_a_document(corpus_file, tokenizer_file, tmp_path):
    more = write_lines(tmp_path / "more.jsonl", [{"text": text} for text in texts(200, seed=7)])
    prepare(corpus_file, tokenizer_file, tmp_path / "one")
    both = PretrainConfig(corpus=(f"jsonl={more}", f"jsonl={corpus_file}"), tokenizer=tokenizer_file, out=tmp_path / "two",
                          workers=1, val_fraction=0.1)  # fmt: skip
    report = data_process.prepare(both)
    for split in ("train", "val"):
        alone = (tmp_path / "one" / f"{split}.bin").read_bytes()
        assert (tmp_path / "two" / f"{split}.bin").read_bytes().endswith(alone)
    assert [source["kept"] for source in report["sources"]] == [200, 400]


def test_bos_where_the_tokenizer_wants_it(corpus_file, tokenizer_file, tmp_path, monkeypatch):
    tokenizer = load_tokenizer(tokenizer_file)
    tokenizer.add_bos = True
    for module in (data_process, encoders):
        monkeypatch.setattr(module, "load_tokenizer", lambda path: tokenizer)
    prepare(corpus_file, tokenizer_file, tmp_path / "out")
    meta = meta_of(tmp_path / "out")
    tokens = open_tokens(tmp_path / "out").tokens
    starts = np.concatenate([[0], np.flatnonzero(tokens == tokenizer.eos_id)[:-1] + 1])
    assert meta["add_bos"] is True
    assert (tokens[starts] == tokenizer.bos_id).all() and (tokens == tokenizer.bos_id).sum() == len(starts)


def test_an_id_beyond_the_vocabulary_cannot_be_written():
    assert pack_ids([0, 65_535], 65_536).dtype == np.dtype("<u2")
    assert pack_ids([0, 65_536], 65_537).tolist() == [0, 65_536] and pack_ids([1], 65_537).dtype == np.dtype("<u4")
    for bad in (65_536, 70_000, -1):
        with pytest.raises(ValueError, match=str(bad)):
            pack_ids([5, bad], 65_536)
    with pytest.raises(ValueError, match="300"):
        pack_ids([300], 300)


def test_data_of_another_tokenizer_is_refused(corpus_file, tokenizer_file, other_tokenizer_file, tmp_path):
    prepare(corpus_file, tokenizer_file, tmp_path / "out")
    mine, other = load_tokenizer(tokenizer_file), load_tokenizer(other_tokenizer_file)
    tokens = open_tokens(tmp_path / "out")
    tokens.check_model(mine.fingerprint, len(mine))
    with pytest.raises(UserError, match="another tokenizer"):
        tokens.check_model(other.fingerprint, len(mine))
    with pytest.raises(
        UserError, match=rf"the id {tokens.max_id}, but the model's vocabulary has only {tokens.max_id} "
    ):
        tokens.check_model(mine.fingerprint, tokens.max_id)
    tokens.check_model(mine.fingerprint, tokens.max_id + 1)


def test_bare_file_of_baby_llama2_chinese(tmp_path):
    ids = np.array([5, 64_792, 2, 7], dtype="<u2")
    ids.tofile(tmp_path / "baidubaike_563w_1.bin")
    tokens = open_tokens(tmp_path / "baidubaike_563w_1.bin")
    assert tokens.tokens.tolist() == ids.tolist() and tokens.max_id == 64_792 and len(tokens) == 4
    assert open_tokens(tmp_path / "baidubaike_563w_1.bin", "val") is None
    tokens.verify()
    tokens.check_model("any tokenizer", 64_793)
    with pytest.raises(UserError, match="64792"):
        tokens.check_model("any tokenizer", 64_792)
    (tmp_path / "odd.bin").write_bytes(b"\1\2\3")
    with pytest.raises(UserError, match="3 bytes"):
        open_tokens(tmp_path / "odd.bin")


def test_damaged_token_data_is_noticed(corpus_file, tokenizer_file, tmp_path):
    out = tmp_path / "out"
    prepare(corpus_file, tokenizer_file, out, val_fraction=0.0)
    assert not (out / "val.bin").exists() and open_tokens(out, "val") is None
    assert len(open_tokens(out / "train.bin")) == len(open_tokens(out))  # the file's name leads to its meta.json
    data = bytearray((out / "train.bin").read_bytes())
    data[100] ^= 1
    (out / "train.bin").write_bytes(data)
    with pytest.raises(UserError, match="damaged"):
        open_tokens(out).verify()
    (out / "train.bin").write_bytes(data[:-2])
    with pytest.raises(UserError, match="cut off"):
        open_tokens(out)
    with pytest.raises(UserError, match=r"does not exist; make it: python data_process\.py pretrain"):
        open_tokens(tmp_path / "nothing")
    (out / "meta.json").write_text('{"format": "cria-messages-1"}')
    with pytest.raises(UserError, match="cria-messages-1"):
        open_tokens(out)


# ----------------------------------------------------------------------------------------------------------------------
# Interrupted, repeated, other settings


@pytest.mark.parametrize("stop_after", [0, 1, 3, 7, 20, 33])
def test_interrupted_anywhere_gives_the_same_bytes(
    stop_after, corpus_file, tokenizer_file, tmp_path, small_chunks, monkeypatch
):
    prepare(corpus_file, tokenizer_file, tmp_path / "whole")
    append, calls = spool.Spool.append, []

    def failing(self, *arguments):
        append(self, *arguments)
        calls.append(1)
        if len(calls) > stop_after:
            for stream in self.files.values():
                stream.flush()  # what was written behind the last saved progress has to be cut off again
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(spool.Spool, "append", failing)
        with pytest.raises(KeyboardInterrupt):
            prepare(corpus_file, tokenizer_file, tmp_path / "parts")
    assert not (tmp_path / "parts").exists()
    saved = json.loads((tmp_path / "parts.partial" / "spool" / "progress.json").read_text(encoding="utf-8"))
    assert saved["chunks"] == (stop_after + 1) // 3 * 3
    with pytest.raises(UserError, match=r"val_fraction was 0.1, is 0.2"):
        prepare(corpus_file, tokenizer_file, tmp_path / "parts", val_fraction=0.2)
    prepare(corpus_file, tokenizer_file, tmp_path / "parts", workers=2 if stop_after == 7 else 1)
    assert files_of(tmp_path / "parts") == files_of(tmp_path / "whole")
    assert not (tmp_path / "parts.partial").exists()


SLOW_RUN = """
import sys, time
sys.path.insert(0, {repository!r})
import chunks, data_process, spool
from settings import command_line
chunks.CHUNK_CHARACTERS = data_process.CHUNK_CHARACTERS = 700
spool.CHUNKS_PER_SAVE = 2
append = spool.Spool.append
def slow(self, *arguments):
    time.sleep(0.02)
    append(self, *arguments)
spool.Spool.append = slow
if __name__ == "__main__":
    command_line(None, None, commands=data_process.COMMANDS)
"""


def test_without_a_tokenizer_one_is_trained_beside_the_data(corpus_file, tmp_path, capsys):
    config = PretrainConfig(corpus=(f"jsonl={corpus_file}",), out=tmp_path / "data", vocab_size=400, workers=1, val_fraction=0.2)
    report = data_process.prepare(config)
    assert len(load_tokenizer(tmp_path / "tokenizer")) == meta_of(tmp_path / "data")["vocab_size"] == 400
    assert "no --tokenizer: training one" in capsys.readouterr().out
    assert sorted(documents_of(tmp_path / "data", "train") + documents_of(tmp_path / "data", "val")) == sorted(texts(400))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "tokenizer"]
    assert data_process.prepare(config) == report
    assert "which is already there" in capsys.readouterr().out


@pytest.mark.skipif(shutil.which("ps") is None, reason="needs ps to see whether the workers are gone")
def test_killed_and_run_again_gives_the_same_bytes(corpus_file, tokenizer_file, tmp_path, small_chunks):
    """SIGKILL to the real command, workers included: they do not outlive it."""
    script = tmp_path / "slow.py"
    script.write_text(SLOW_RUN.format(repository=str(REPOSITORY)), encoding="utf-8")
    words = [
        "pretrain",
        "--corpus",
        f"jsonl={corpus_file}",
        "--tokenizer",
        tokenizer_file,
        "--out",
        tmp_path / "killed",
        "--val-fraction",
        "0.1",
        "--workers",
        "2",
    ]
    process = subprocess.Popen([sys.executable, str(script), *map(str, words)], start_new_session=True)
    progress = tmp_path / "killed.partial" / "spool" / "progress.json"
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        if progress.exists() and json.loads(progress.read_text(encoding="utf-8"))["chunks"] >= 4:
            break
        time.sleep(0.01)
    assert process.poll() is None, "it ended before it could be killed"
    process.send_signal(signal.SIGKILL)
    process.wait()
    prepare(corpus_file, tokenizer_file, tmp_path / "whole")
    prepare(corpus_file, tokenizer_file, tmp_path / "killed")
    assert files_of(tmp_path / "killed") == files_of(tmp_path / "whole")
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline and _group_is_alive(process.pid):
        time.sleep(0.05)
    assert not _group_is_alive(process.pid), "a worker outlived the killed process"


MORTAL_RUN = """
import os, shutil, signal, sys
sys.path.insert(0, {repository!r})
import chunks, data_process, selection, spool
chunks.CHUNK_CHARACTERS = data_process.CHUNK_CHARACTERS = 700
spool.CHUNKS_PER_SAVE = data_process.CHUNKS_PER_SAVE = 2
left = int(sys.argv[1])
def mortal(function):
    def call(*arguments, **named):
        global left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments, **named)
    return call
spool.Spool.append, spool.Spool.save = mortal(spool.Spool.append), mortal(spool.Spool.save)
selection.copy_bytes = mortal(selection.copy_bytes)
selection.write_json, selection.write_text = mortal(selection.write_json), mortal(selection.write_text)
os.rename, os.replace, shutil.rmtree = mortal(os.rename), mortal(os.replace), mortal(shutil.rmtree)
data_process.command_line(None, None, sys.argv[2:], commands=data_process.COMMANDS)
"""


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="needs SIGKILL")
def test_killed_at_ten_random_moments_gives_the_same_bytes(corpus_file, tokenizer_file, tmp_path, small_chunks):
    """The process kills itself at a random one of the calls that write: in the spool, while selecting, at the last rename."""
    (tmp_path / "mortal.py").write_text(MORTAL_RUN.format(repository=str(REPOSITORY)), encoding="utf-8")
    rng, kills, early = random.Random(11), 0, [1, 2, 3]  # the first three calls, and then any

    def words(out: Path) -> list[str]:
        return ["pretrain", "--corpus", f"jsonl={corpus_file}", "--tokenizer", str(tokenizer_file), "--out", str(out),
                "--val-fraction", "0.1", "--workers", "1", "--dedup", "minhash"]  # fmt: skip

    prepare(corpus_file, tokenizer_file, tmp_path / "whole", dedup="minhash")
    while kills < 10:
        shutil.rmtree(tmp_path / "killed", ignore_errors=True)
        for _ in range(20):
            left = str(early.pop() if early else rng.randrange(1, 220))
            done = subprocess.run([sys.executable, str(tmp_path / "mortal.py"), left, *words(tmp_path / "killed")],
                                  capture_output=True, text=True, timeout=60)  # fmt: skip
            if done.returncode == 0:
                break
            assert done.returncode == -signal.SIGKILL, done.stderr
            kills += 1
        assert done.returncode == 0, "no end after 20 lives"
        assert files_of(tmp_path / "killed") == files_of(tmp_path / "whole")


def _group_is_alive(group: int) -> bool:
    """Whether a process of the group runs; one that has ended and waits to be reaped (a zombie) does not count."""
    table = subprocess.run(["ps", "-A", "-o", "pgid=,stat="], capture_output=True, text=True, check=True).stdout
    rows = [line.split() for line in table.splitlines()]
    return any(row[0] == str(group) and not row[1].startswith("Z") for row in rows)


def test_a_share_that_holds_nothing_says_so(tokenizer_file, tmp_path):
    path = write_lines(tmp_path / "x.jsonl", [{"text": text} for text in texts(3)])
    config = PretrainConfig(corpus=(f"jsonl:0.00001={path}",), tokenizer=tokenizer_file, out=tmp_path / "out", workers=1)
    with pytest.raises(UserError, match="holds no document to write: 3 not in the share that the weight takes"):
        data_process.prepare(config)
    assert [path.name for path in tmp_path.iterdir()] == ["x.jsonl"]


def test_finished_run_says_so_and_others_are_refused(corpus_file, tokenizer_file, tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()  # an empty directory is free
    first = prepare(corpus_file, tokenizer_file, out)
    before = files_of(out)
    capsys.readouterr()
    assert prepare(corpus_file, tokenizer_file, out) == first
    assert "nothing to do" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"val_fraction was 0.1, is 0.3"):
        prepare(corpus_file, tokenizer_file, out, val_fraction=0.3)
    edited = tmp_path / corpus_file.name  # same name, same size, one character changed
    edited.write_text(corpus_file.read_text(encoding="utf-8").replace("春", "冬", 1), encoding="utf-8")
    with pytest.raises(UserError, match=r"corpora.0.sha256 was "):
        prepare(edited, tokenizer_file, out)
    with pytest.raises(UserError, match=r"rules.width was on, is absent"):
        prepare(corpus_file, tokenizer_file, out, without=("width",))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("keep")
    with pytest.raises(UserError, match="already exists and holds something else"):
        prepare(corpus_file, tokenizer_file, tmp_path / "mine")
    (out / "train.bin").rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=r"is not complete any more: train\.bin is missing"):
        prepare(corpus_file, tokenizer_file, out)
    (tmp_path / "elsewhere").rename(out / "train.bin")
    assert files_of(out) == before and files_of(tmp_path / "mine") == {"thesis.txt": b"keep"}


def test_memory_window_is_bounded():
    """With results slower than the reading, no more than the window is read ahead."""
    read = []

    def work():
        for number in range(100):
            read.append(number)
            yield number

    class Pool:
        def submit(self, function, chunk):
            class Done:
                def result(self):
                    return chunk

            return Done()

    for done in encoders._in_order(Pool(), work(), window=8):
        assert len(read) <= done + 8
    assert read == list(range(100))


# ----------------------------------------------------------------------------------------------------------------------
# sft, textbook, list


def test_sft(tmp_path, capsys):
    alpaca = [{"instruction": text, "input": "", "output": f"答{at}"} for at, text in enumerate(texts(200))]
    alpaca += [
        {"instruction": alpaca[3]["instruction"], "input": "", "output": "另一个回答"},
        {"instruction": "x", "output": ""},
        alpaca[5],
    ]
    write_lines(tmp_path / "alpaca.jsonl", alpaca)
    chat = write_lines(tmp_path / "chat.jsonl", [{"messages": turns("问", "答", "再问")}])
    datasets = (f"alpaca={tmp_path / 'alpaca.jsonl'}", f"messages={chat}")
    report = sft(*datasets, out=tmp_path / "out", val_fraction=0.1)
    lines = {split: lines_of(tmp_path / "out", split) for split in ("train", "val")}
    assert {split: part["documents"] for split, part in report["splits"].items()} == {k: len(v) for k, v in lines.items()}
    assert len(lines["train"]) + len(lines["val"]) == 202 and 8 <= len(lines["val"]) <= 40
    first = {split: {record["messages"][0]["content"] for record in records} for split, records in lines.items()}
    assert not first["train"] & first["val"]  # two answers to one question are on the same side
    assert {"messages": turns("问", "答")} in lines["train"] + lines["val"]
    one, two = report["sources"]
    assert balanced(report) and (one["kept"], one["duplicates"]["exact"], two["kept"]) == (201, 1, 1)
    assert list(one["dropped"]) == ["empty answer"]
    assert one["dropped"]["empty answer"]["examples"][0]["where"] == f"{tmp_path / 'alpaca.jsonl'}:202"
    assert two["changed"]["last question without an answer"]["count"] == 1
    assert sum(part["answers"] for part in report["splits"].values()) == 202
    before = files_of(tmp_path / "out")
    capsys.readouterr()
    assert sft(*datasets, out=tmp_path / "out", val_fraction=0.1) == report and "nothing to do" in capsys.readouterr().out
    sft(*datasets, out=tmp_path / "again", val_fraction=0.1)
    assert files_of(tmp_path / "again") == before


def test_preferences(tmp_path):
    records = [{"prompt": turns(text), "chosen": f"好{at}", "rejected": "坏"} for at, text in enumerate(texts(60))]
    records += [{**records[2], "chosen": "更好"}, {"prompt": turns("问"), "chosen": "同", "rejected": "同"}]
    path = write_lines(tmp_path / "dpo.jsonl", records)
    report = data_process.prepare(data_process.PreferencesConfig(
        dataset=(f"textbook={path}",), out=tmp_path / "out", val_fraction=0.2, workers=1))  # fmt: skip
    lines = {split: lines_of(tmp_path / "out", split) for split in ("train", "val")}
    assert sorted(map(str, lines["train"] + lines["val"])) == sorted(map(str, records[:-1]))
    assert balanced(report) and report["sources"][0]["kept"] == 61 and meta_of(tmp_path / "out")["format"] == "cria-preferences-1"
    prompts = {split: {str(line["prompt"]) for line in part} for split, part in lines.items()}
    assert not prompts["train"] & prompts["val"]


def test_look_shows_what_was_prepared(corpus_file, tokenizer_file, tmp_path, capsys):
    prepare(corpus_file, tokenizer_file, tmp_path / "tokens", val_fraction=0.0)
    talk = write_lines(tmp_path / "talk.jsonl", [{"messages": turns("春眠不觉晓？", "处处闻啼鸟。")}])
    sft(f"messages={talk}", out=tmp_path / "sft", val_fraction=0.0)
    capsys.readouterr()
    assert look(LookConfig(data=tmp_path / "tokens", start=7, count=1)) == {"shown": 1}
    assert texts(400)[7] in capsys.readouterr().out
    look(LookConfig(data=tmp_path / "sft", tokenizer=tokenizer_file, template="baby"))
    assert "春眠不觉晓？<s>⟦处处闻啼鸟。</s>⟧" in capsys.readouterr().out


# ----------------------------------------------------------------------------------------------------------------------
# Weights, limits, shards, questions


def test_a_weight_takes_a_share_or_repeats(corpus_file, tokenizer_file, tmp_path):
    def written(weight: str, **settings) -> list[str]:
        out = tmp_path / f"{weight}{settings}"
        report = data_process.prepare(PretrainConfig(
            corpus=(f"jsonl:{weight}={corpus_file}",), tokenizer=tokenizer_file, out=out, workers=1, val_fraction=0.1,
            **settings))  # fmt: skip
        assert balanced(report)
        return documents_of(out, "train")

    whole, third, half, other = written("1"), written("0.3"), written("0.5"), written("0.3", seed=1)
    assert 0.2 * len(whole) < len(third) < 0.4 * len(whole) and set(third) < set(half) < set(whole)  # more only adds
    assert set(third) != set(other) and abs(len(other) - len(third)) < 60
    assert written("2") == whole + whole  # never a text beside its copy
    twice = written("1.5")
    assert twice[: len(whole)] == whole and twice[len(whole) :] == [text for text in whole if text in half]


@pytest.mark.parametrize("dedup", ["none", "exact", "minhash"])
def test_shards_merge_to_what_one_machine_writes(dedup, corpus_file, tokenizer_file, tmp_path, small_chunks):
    doubled = write_lines(tmp_path / "doubled.jsonl", [{"text": text} for text in texts(400)[100:200]])
    corpora = (f"jsonl={corpus_file}", f"jsonl={doubled}")

    def run(out: str, **settings) -> dict:
        return data_process.prepare(PretrainConfig(corpus=corpora, tokenizer=tokenizer_file, out=tmp_path / out, workers=1,
                                                   val_fraction=0.1, dedup=dedup, **settings))  # fmt: skip

    def merge() -> dict:
        return data_process.merge(data_process.MergeConfig(tmp_path / "parts.of.it"))

    one = run("one")
    assert one["sources"][1]["duplicates"]["exact"] == (0 if dedup == "none" else 100)
    with pytest.raises(UserError, match=r"there is no .*parts\.of\.it\.shard-1-of"):
        merge()
    for part in (3, 1):
        run("parts.of.it", shard=f"{part}/3")
    with pytest.raises(UserError, match="missing the shards 2/3"):
        merge()
    run("parts.of.it", shard="2/3", seed=5)
    with pytest.raises(UserError, match=r"shard-2-of-3 was made with other settings \(seed was 5, is 0\)"):
        merge()
    shutil.rmtree(tmp_path / "parts.of.it.shard-2-of-3")
    run("parts.of.it", shard="2/3")
    merged = merge()
    assert balanced(merged) and [source["kept"] for source in merged["sources"]] == [400, 100 if dedup == "none" else 0]
    for name in ("train.bin", "val.bin", "meta.json"):
        assert (tmp_path / "parts.of.it" / name).read_bytes() == (tmp_path / "one" / name).read_bytes()
    assert merge() == merged  # again: nothing to do
    run("parts.of.it", shard="2/2")
    with pytest.raises(UserError, match="shards of 2 and of 3 beside"):
        merge()


def test_shards_of_conversations(tmp_path):
    records = [{"instruction": text, "output": "答"} for text in texts(50)]
    path = write_lines(tmp_path / "x.jsonl", records)
    sft(f"alpaca={path}", val_fraction=0.2, out=tmp_path / "one")
    for part in ("2/2", "1/2"):
        sft(f"alpaca={path}", val_fraction=0.2, out=tmp_path / "two", shard=part)
    data_process.merge(data_process.MergeConfig(tmp_path / "two"))
    assert (tmp_path / "two" / "train.jsonl").read_bytes() == (tmp_path / "one" / "train.jsonl").read_bytes()


def test_every_sign_of_a_conversation_counts(tmp_path):
    pairs = [("15 - 2", "好的：35"), ("1.5 + 2", "好的：3.5"), ("x>>1", "好"), ("x<<1", "好"), ("他是不", "好的"), ("他是", "不好的"),
             ("Hi  There", "ok"), ("hi there", "OK")]  # fmt: skip
    path = write_lines(tmp_path / "x.jsonl", [{"instruction": one, "output": other} for one, other in pairs])
    report = sft(f"alpaca={path}", out=tmp_path / "out", val_fraction=0.0)
    assert report["sources"][0]["duplicates"]["exact"] == 1 and report["sources"][0]["kept"] == 7


def test_many_bad_lines_do_not_fill_the_memory(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text('{"text": "春眠不觉晓，处处闻啼鸟。"}\n' + "{bad\n" * 5000, encoding="utf-8")
    corpus = Corpus.from_argument(f"jsonl={path}", PRETRAINING)
    [chunk] = chunks.chunks([corpus], lambda count: None)
    assert chunk.unreadable["not valid JSON"]["count"] == 5000 and len(chunk.unreadable["not valid JSON"]["examples"]) == 3


def test_folders_of_others_are_left_alone(corpus_file, tokenizer_file, tmp_path):
    for name in ("out.partial", "out.shard-1-of-2"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "thesis.txt").write_text("keep")
    with pytest.raises(UserError, match=r"out\.partial already exists and holds something else"):
        prepare(corpus_file, tokenizer_file, tmp_path / "out")
    with pytest.raises(UserError, match=r"out\.shard-1-of-2 already exists and holds something else"):
        prepare(corpus_file, tokenizer_file, tmp_path / "out", shard="1/2")
    assert all((tmp_path / name / "thesis.txt").exists() for name in ("out.partial", "out.shard-1-of-2"))


@pytest.mark.skipif(sys.platform != "linux", reason="needs a file system that takes any bytes as a name")
def test_a_file_name_in_another_encoding(tokenizer_file, tmp_path):
    name = os.path.join(os.fsencode(tmp_path), "水调歌头.jsonl".encode("gb18030"))
    with open(name, "wb") as stream:
        stream.write('{"text": "春眠不觉晓，处处闻啼鸟。"}\n{bad\n'.encode())
    report = prepare(Path(os.fsdecode(name)), tokenizer_file, tmp_path / "out", val_fraction=0.0)
    assert report["sources"][0]["kept"] == 1 and r"\udc" in report["sources"][0]["path"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"out": Path()}, "--out .: name a new directory"),
        ({"seed": 1 << 70}, "is too large"),
        ({"corpus": ("jsonl:5000={corpus}",)}, "the weight 5000 is more than 1000"),
        ({"shard": "3/2"}, "--shard 3/2: write i/n with i from 1 to n"),
        ({"dedup_permutations": 100}, "needs a multiple of 32"),
        ({"without": ("markdwon",)}, "did you mean markup"),
        ({"vocab_size": -5}, "--vocab-size must be at least 1, not -5"),
    ],
)
def test_mistakes_that_are_named_before_anything_is_read(settings, message, corpus_file, tmp_path):
    corpus = tuple(argument.format(corpus=corpus_file) for argument in settings.get("corpus", ("jsonl={corpus}",)))
    config = PretrainConfig(**{"out": tmp_path / "out", **settings, "corpus": corpus})
    assert message in "; ".join(config.problems())


def test_masking_stays_on_when_all_rules_go(tmp_path):
    path = write_lines(tmp_path / "x.jsonl", [{"instruction": "打13812345678。。", "output": "好"}])
    sft(f"alpaca={path}", out=tmp_path / "out", val_fraction=0.0, without=("all",), mask_pii=True)
    assert lines_of(tmp_path / "out", "train")[0]["messages"][0]["content"] == "打<手机号>。。"
    config = SftConfig(dataset=(f"alpaca={path}",), out=tmp_path / "no", without=("personal",), mask_pii=True)
    assert "--without personal and --mask-pii: one or the other" in config.problems()


def test_a_wrong_corpus_is_noticed_before_the_others_are_encoded(corpus_file, tokenizer_file, tmp_path, monkeypatch):
    wrong = write_lines(tmp_path / "wrong.jsonl", [{"title": "x"}])
    monkeypatch.setattr(spool.Spool, "append", lambda *arguments: pytest.fail("encoded something"))
    config = PretrainConfig(corpus=(f"jsonl={corpus_file}", f"jsonl={wrong}"), tokenizer=tokenizer_file, out=tmp_path / "out", workers=1)
    with pytest.raises(UserError, match="not the layout of 'jsonl'"):
        data_process.prepare(config)


def test_the_output_within_the_input_is_refused(tmp_path):
    write_lines(tmp_path / "in" / "x.jsonl", [{"instruction": "问", "output": "答"}])
    config = SftConfig(dataset=(f"alpaca={tmp_path / 'in'}",), out=tmp_path / "in" / "out")
    assert f"lies within {tmp_path / 'in'}, which is read" in "; ".join(config.problems())


def test_limit_takes_the_first_records_of_each_corpus(corpus_file, tokenizer_file, tmp_path, small_chunks):
    report = data_process.prepare(PretrainConfig(corpus=(f"jsonl={corpus_file}",) * 2, tokenizer=tokenizer_file, out=tmp_path / "out",
                                                 workers=1, val_fraction=0.0, limit=30, dedup="none"))  # fmt: skip
    assert [source["records"] for source in report["sources"]] == [30, 30]
    assert documents_of(tmp_path / "out", "train") == texts(400)[:30] * 2


def test_evaluation_questions_are_taken_out(tokenizer_file, tmp_path):
    question = "下列诗句中描写的是庐山瀑布壮丽景色的一项是哪一个"
    (tmp_path / "exam").mkdir()
    (tmp_path / "exam" / "x_val.csv").write_text(f"id,question,A,B,C,D,answer\n0,{question},甲,乙,丙,丁,A\n", encoding="utf-8")
    some = texts(20)
    written = [*some[2:], f"{some[0]}\n3. {question}？\n{some[1]}", f"1. {question}？"]
    path = write_lines(tmp_path / "x.jsonl", [{"text": text} for text in written])
    report = prepare(path, tokenizer_file, tmp_path / "out", val_fraction=0.0, decontaminate=tmp_path / "exam", dedup="none")
    assert documents_of(tmp_path / "out", "train") == [*some[2:], f"{some[0]}\n{some[1]}"] and balanced(report)  # the line goes
    [source] = report["sources"]
    assert source["dropped"]["evaluation question"]["count"] == source["changed"]["evaluation question"]["count"] == 1
    assert "x_val.csv:2" in source["dropped"]["evaluation question"]["examples"][0]["text"]
    talk = write_lines(tmp_path / "sft.jsonl", [{"instruction": f"{question}？", "output": "答"}, {"instruction": some[0], "output": "答"}])
    report = sft(f"alpaca={talk}", out=tmp_path / "sft", val_fraction=0.0, decontaminate=tmp_path / "exam")
    assert lines_of(tmp_path / "sft", "train") == [{"messages": turns(some[0], "答")}] and balanced(report)


def test_the_same_directory_is_locked_for_others(corpus_file, tokenizer_file, tmp_path):
    held = lock(tmp_path / ".out.lock", "")
    with pytest.raises(UserError, match=r"another process is writing .*out"):
        prepare(corpus_file, tokenizer_file, tmp_path / "out")
    held.close()
    prepare(corpus_file, tokenizer_file, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_textbook_command_and_its_readers(tmp_path, tokenizer_file, capsys):
    pytest.importorskip("textbook")
    config = TextbookConfig(tmp_path / "textbook")
    data_process.textbook(config)
    data_process.textbook(config)
    assert "nothing to do" in capsys.readouterr().out
    with pytest.raises(UserError, match="holds something else"):
        data_process.textbook(TextbookConfig(tmp_path / "textbook", seed=1))
    for name, table in (("pretrain.jsonl", PRETRAINING), ("sft.jsonl", INSTRUCTIONS)):
        records, skipped = read_all("textbook", tmp_path / "textbook", table)
        count = len((tmp_path / "textbook" / name).read_text(encoding="utf-8").splitlines())
        assert len(records) == count > 800 and not skipped
    assert sorted(path.name for path in tmp_path.iterdir()) == ["textbook"]


def test_list_shows_every_reader(capsys):
    data_process.list_readers(data_process.ListConfig())
    shown = capsys.readouterr().out
    for reader in [*PRETRAINING.values(), *INSTRUCTIONS.values(), *PREFERENCES.values()]:
        assert reader.name in shown and reader.layout in shown and reader.source in shown


# ----------------------------------------------------------------------------------------------------------------------
# Bad input


BAD_FILES = {
    # name of the case: (reader, content, what the error says; {0} is the file). More of them: test_source.py
    "empty": ("jsonl", b"", "{0} holds no document to write: 1 empty file"),
    "only white space": ("lines", b" \n\n", "{0} holds no document to write: it is empty"),
    "only empty texts": ("jsonl", b'{"text": " "}\n{"text": null}\n', "{0} holds no document to write: 2 empty text (first: {0}:1)"),
    "only short texts": ("lines", b"ok\n", "{0} holds no document to write: 1 short (first: {0}:1)"),
    "binary": ("txt", b"abc\x00def", "{0} is binary (a zero byte at offset 3)"),
    "layout": ("jsonl", b'{"content": "x"}\n', "{0}:1: not the layout of 'jsonl': expected the fields text; found content"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_file(case, tokenizer_file, tmp_path):
    reader, content, message = BAD_FILES[case]
    path = tmp_path / "input"
    path.write_bytes(content)
    with pytest.raises(UserError) as error:
        prepare(path, tokenizer_file, tmp_path / "out", name=reader)
    assert message.format(path) in str(error.value)
    assert [entry.name for entry in tmp_path.iterdir()] == ["input"]  # nothing half-written


def test_a_late_error_in_a_worker_run(tokenizer_file, corpus_file, tmp_path, small_chunks):
    """--strict: the error comes while two workers are busy: still one message."""
    bad = tmp_path / "bad.jsonl"
    bad.write_bytes(corpus_file.read_bytes() + b'{"text": "\xff"}\n')
    with pytest.raises(UserError, match=r"bad.jsonl:401: not UTF-8"):
        prepare(bad, tokenizer_file, tmp_path / "out", workers=2, strict=True)
    assert not (tmp_path / "out").exists()
    report = prepare(bad, tokenizer_file, tmp_path / "out", workers=2)  # what was done before counts
    assert report["sources"][0]["unreadable"] == {"not UTF-8": {"count": 1, "examples": [{"where": f"{bad}:401", "text": ""}]}}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([{"messages": turns("问")}], "holds no conversation to write: 1 no assistant turn (first: {0}:1)"),
        (
            [{"messages": turns("问", "")}, {"messages": []}],
            "1 empty answer (first: {0}:1), 1 no assistant turn (first: {0}:2)",
        ),
        ([{"text": "x"}], "{0}:1: not the layout of 'messages': expected the fields messages; found text"),
        ([], "holds no conversation to write: 1 empty file"),
    ],
)
def test_bad_sft_file(content, message, tmp_path):
    path = write_lines(tmp_path / "x.jsonl", content)
    with pytest.raises(UserError) as error:
        sft(f"messages={path}", out=tmp_path / "out")
    assert message.format(path) in str(error.value)
    assert [entry.name for entry in tmp_path.iterdir()] == ["x.jsonl"]


def test_no_validation_document_is_an_error_with_a_way_out(tokenizer_file, tmp_path):
    path = write_lines(tmp_path / "x.jsonl", [{"text": text} for text in texts(3)])
    with pytest.raises(
        UserError, match=r"none of the 3 documents fell into the val split with --val-fraction 1e-06: use 0.5"
    ):
        prepare(path, tokenizer_file, tmp_path / "out", val_fraction=1e-6)
    assert [entry.name for entry in tmp_path.iterdir()] == ["x.jsonl"]
    assert prepare(path, tokenizer_file, tmp_path / "out", val_fraction=0.0)["splits"]["train"]["documents"] == 3
    with pytest.raises(UserError, match=r"none of the 3 documents fell into the train split"):
        prepare(path, tokenizer_file, tmp_path / "other", val_fraction=0.999999)


def test_text_too_large_for_one_document(tokenizer_file, tmp_path, monkeypatch):
    monkeypatch.setattr(readers.source, "LARGEST_TEXT", 10)
    (tmp_path / "x.txt").write_text("0123456789\n")
    with pytest.raises(UserError, match=r"use lines="):
        prepare(tmp_path / "x.txt", tokenizer_file, tmp_path / "out", name="txt")


def test_command_line_names_all_mistakes_in_one_line(tmp_path):
    (tmp_path / "empty").mkdir()
    corpora = ["chinese-poety=x", "txt=/no/such/file", "novel.txt", f"csv={tmp_path / 'empty'}"]
    done = command("pretrain", "--corpus", *corpora, "--workers", "-1", "--val-fraction", "1.5", "--tokenizer", "x")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    for part in (
        "did you mean chinese-poetry?",
        "/no/such/file does not exist",
        "txt=novel.txt",
        "no file that csv reads (*.csv)",
        "--workers must be at least 0, not -1",
        "--val-fraction 1.5",
    ):
        assert part in done.stderr
    done = command("pretrain")
    assert done.returncode == 2 and "--corpus is required" in done.stderr
    done = command("tokenise")
    assert done.returncode == 2 and "unknown command 'tokenise'" in done.stderr


def test_command_line_reports_a_bad_line_of_input(tmp_path, tokenizer_file):
    (tmp_path / "x.json").write_text('[{"text": "a"},\n{"te', encoding="utf-8")
    words = ["pretrain", "--strict", "--corpus", "jsonl=x.json", "--tokenizer", tokenizer_file, "--out", "out"]
    done = command(*words, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (
        2,
        "error: x.json:2: the JSON array is cut off: the file ends at byte 20\n",
    )
    assert [entry.name for entry in tmp_path.iterdir()] == ["x.json"]


def test_command_line_good_run_prints_table_and_next_command(tmp_path, tokenizer_file, corpus_file):
    words = [
        "pretrain",
        "--corpus",
        f"jsonl={corpus_file}",
        "--tokenizer",
        tokenizer_file,
        "--out",
        "out",
        "--workers",
        2,
    ]
    done = command(*words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "characters per token" in done.stdout and "next:  python pretrain.py --data out" in done.stdout
    assert len(open_tokens(tmp_path / "out")) > 10_000


def test_full_disk_is_one_line_and_goes_on_later(
    corpus_file, tokenizer_file, tmp_path, small_chunks, monkeypatch, capsys
):
    """The disk fills while bytes are appended; with space the same command continues to the same bytes."""
    from settings import clean_exit

    prepare(corpus_file, tokenizer_file, tmp_path / "whole")
    append, calls = spool.Spool.append, []

    def full(self, *arguments):
        calls.append(1)
        if len(calls) == 20:
            raise OSError(28, "No space left on device", "train.bin")
        append(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(spool.Spool, "append", full)
        with pytest.raises(SystemExit) as stopped, clean_exit():
            prepare(corpus_file, tokenizer_file, tmp_path / "out")
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and error.startswith("error: the disk is full") and error.count("\n") == 1
    assert not (tmp_path / "out").exists()
    prepare(corpus_file, tokenizer_file, tmp_path / "out")
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")


