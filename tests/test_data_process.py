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

import data_process
import readers.source
import token_files
from data_process import PretrainConfig, SftConfig, TextbookConfig, pretrain, sft
from readers import INSTRUCTIONS, PRETRAINING, Corpus
from readers.instructions import tidy_conversation
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
        "".join(sentence(rng, rng.randrange(3, 30)) for _ in range(rng.randrange(1, 8))).strip() for _ in range(count)
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
    monkeypatch.setattr(data_process, "CHUNK_BYTES", 2000)
    monkeypatch.setattr(token_files, "CHUNKS_PER_SAVE", 3)


def prepare(corpus: Path, tokenizer: Path, out: Path, name: str = "jsonl", **settings) -> dict:
    settings = {"workers": 1, "val_fraction": 0.1, **settings}
    return pretrain(PretrainConfig(corpus=(f"{name}={corpus}",), tokenizer=tokenizer, out=out, **settings))


def read_all(name: str, path: Path, table=PRETRAINING) -> tuple[list, dict]:
    corpus = Corpus.from_argument(f"{name}={path}", table)
    return [record for _, record in corpus.records()], corpus.skipped


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def command(*words, **options) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, str(REPOSITORY / "data_process.py"), *map(str, words)],
        capture_output=True, text=True, encoding="utf-8", **options,
    )  # fmt: skip


# ----------------------------------------------------------------------------------------------------------------------
# Token files


def test_token_file_decodes_to_the_documents(corpus_file, tokenizer_file, tmp_path):
    meta = prepare(corpus_file, tokenizer_file, tmp_path / "out")
    tokenizer = load_tokenizer(tmp_path / "out")  # the copy beside the data
    assert tokenizer.fingerprint == meta["tokenizer_sha256"] == load_tokenizer(tokenizer_file).fingerprint
    found = {}
    for split in ("train", "val"):
        tokens = open_tokens(tmp_path / "out", split)
        tokens.verify()
        assert tokens.tokens.dtype == np.dtype("<u2") and not tokens.tokens.flags.writeable
        ends = np.flatnonzero(tokens.tokens == tokenizer.eos_id)
        assert ends[-1] == len(tokens) - 1  # every document ends with eos, and nothing follows
        parts = np.split(tokens.tokens, ends + 1)[:-1]
        found[split] = [tokenizer.decode(part[:-1].tolist()) for part in parts]
        counts = meta["splits"][split]
        assert counts["tokens"] == len(tokens)
        assert counts["documents"] == len(found[split])
        assert counts["bytes"] == sum(len(text.encode("utf-8")) for text in found[split])
        assert counts["characters"] == sum(map(len, found[split]))
        assert counts["max_id"] == tokens.tokens.max() == tokens.max_id
    assert 20 <= len(found["val"]) <= 60  # 10% of 400, chosen by hash
    wanted = texts(400)
    assert sorted(found["train"] + found["val"]) == sorted(wanted)
    validation = set(found["val"])
    assert found["train"] == [text for text in wanted if text not in validation]  # the order is kept


def test_same_bytes_for_any_number_of_workers(corpus_file, tokenizer_file, tmp_path, small_chunks):
    for workers in (1, 2):
        prepare(corpus_file, tokenizer_file, tmp_path / f"{workers}", workers=workers)
    one, two = files_of(tmp_path / "1"), files_of(tmp_path / "2")
    assert set(one) >= {"train.bin", "val.bin", "meta.json", "tokenizer.model"}
    assert one == two
    assert not list(tmp_path.glob("*.partial"))


def test_adding_data_never_moves_a_document(corpus_file, tokenizer_file, tmp_path):
    more = write_lines(tmp_path / "more.jsonl", [{"text": text} for text in texts(200, seed=7)])
    prepare(corpus_file, tokenizer_file, tmp_path / "one")
    both = PretrainConfig((f"jsonl={more}", f"jsonl={corpus_file}"), tokenizer_file, tmp_path / "two", 1, 0.1)
    meta = pretrain(both)
    for split in ("train", "val"):
        alone = (tmp_path / "one" / f"{split}.bin").read_bytes()
        assert (tmp_path / "two" / f"{split}.bin").read_bytes().endswith(alone)
    assert sum(source["train"]["documents"] + source["val"]["documents"] for source in meta["sources"]) == 600


def test_bos_where_the_tokenizer_wants_it(corpus_file, tokenizer_file, tmp_path, monkeypatch):
    tokenizer = load_tokenizer(tokenizer_file)
    tokenizer.add_bos = True
    monkeypatch.setattr(data_process, "load_tokenizer", lambda path: tokenizer)
    meta = prepare(corpus_file, tokenizer_file, tmp_path / "out")
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
    append, calls = token_files.TokenWriter.append, []

    def failing(self, *arguments):
        append(self, *arguments)
        calls.append(1)
        if len(calls) > stop_after:
            for stream in self.files.values():
                stream.flush()  # what was written behind the last saved progress has to be cut off again
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(token_files.TokenWriter, "append", failing)
        with pytest.raises(KeyboardInterrupt):
            prepare(corpus_file, tokenizer_file, tmp_path / "parts")
    assert not (tmp_path / "parts").exists()
    saved = json.loads((tmp_path / "parts.partial" / "progress.json").read_text(encoding="utf-8"))
    assert saved["chunks"] == (stop_after + 1) // 3 * 3
    with pytest.raises(UserError, match=r"val_fraction was 0.1, is 0.2"):
        prepare(corpus_file, tokenizer_file, tmp_path / "parts", val_fraction=0.2)
    prepare(corpus_file, tokenizer_file, tmp_path / "parts", workers=2 if stop_after == 7 else 1)
    assert files_of(tmp_path / "parts") == files_of(tmp_path / "whole")
    assert not (tmp_path / "parts.partial").exists()


SLOW_RUN = """
import sys, time
sys.path.insert(0, {repository!r})
import data_process, token_files
from settings import command_line
data_process.CHUNK_BYTES, token_files.CHUNKS_PER_SAVE = 2000, 2
append = token_files.TokenWriter.append
def slow(self, *arguments):
    time.sleep(0.02)
    append(self, *arguments)
token_files.TokenWriter.append = slow
if __name__ == "__main__":
    command_line(None, None, commands=data_process.COMMANDS)
"""


def test_without_a_tokenizer_one_is_trained_beside_the_data(corpus_file, tmp_path, capsys):
    config = PretrainConfig(corpus=(f"jsonl={corpus_file}",), out=tmp_path / "data", vocab_size=400, workers=1, val_fraction=0.2)
    meta = pretrain(config)
    assert len(load_tokenizer(tmp_path / "tokenizer")) == meta["vocab_size"] == 400
    assert "no --tokenizer: training one" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "tokenizer"]
    assert pretrain(config) == meta
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
    progress = tmp_path / "killed.partial" / "progress.json"
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


def _group_is_alive(group: int) -> bool:
    """Whether a process of the group runs; one that has ended and waits to be reaped (a zombie) does not count."""
    table = subprocess.run(["ps", "-A", "-o", "pgid=,stat="], capture_output=True, text=True, check=True).stdout
    rows = [line.split() for line in table.splitlines()]
    return any(row[0] == str(group) and not row[1].startswith("Z") for row in rows)


def test_finished_run_says_so_and_others_are_refused(corpus_file, tokenizer_file, tmp_path, capsys):
    out = tmp_path / "out"
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
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("keep")
    with pytest.raises(UserError, match="already exists and holds something else"):
        prepare(corpus_file, tokenizer_file, tmp_path / "mine")
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

    for done in data_process._in_order(Pool(), work(), window=8):
        assert len(read) <= done + 8
    assert read == list(range(100))


# ----------------------------------------------------------------------------------------------------------------------
# Readers: each on a small sample of the true layout


def test_reader_txt(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "two.txt").write_bytes("第二\r\n篇\r\n".encode("utf-8-sig"))
    (tmp_path / "a.md").write_text("---\ntitle: x\n---\n# 题\n\n文", encoding="utf-8")
    (tmp_path / "c.md").write_text("---\nbookCollapseSection: true\n---\n", encoding="utf-8")
    (tmp_path / "d.txt").write_bytes(b"")
    (tmp_path / ".hidden.txt").write_text("no")
    (tmp_path / "e.csv").write_text("no")
    corpus = Corpus.from_argument(f"txt={tmp_path}", PRETRAINING)
    found = [data.decode() for data in data_process.documents(corpus, lambda count: None)]
    assert found == ["# 题\n\n文", "第二\n篇"]
    assert {reason: entry["count"] for reason, entry in corpus.skipped.items()} == {"empty text": 1, "empty file": 1}
    assert corpus.skipped["empty file"]["first"] == str(tmp_path / "d.txt")


def test_reader_lines(tmp_path):
    (tmp_path / "x.txt").write_text("一\n\n二二\n 三\u2028四 \n", encoding="utf-8")
    assert read_all("lines", tmp_path)[0] == ["一\n", "二二\n", " 三\u2028四 \n"]


@pytest.mark.parametrize("layout", ["lines", "array", "array on one line", "one object"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_reader_jsonl_decides_by_content(layout, mark, tmp_path, monkeypatch):
    monkeypatch.setattr(readers.source, "BLOCK", 7)  # blocks end inside characters, escapes and numbers
    records = [{"id": 12345, "text": text} for text in ["春\n眠", "", 'a"\\b', "\U0001f999", "x" * 50]]
    if layout == "one object":
        records = records[:1]
    content = {
        "lines": "\n".join(json.dumps(record, ensure_ascii=False) for record in records),
        "array": "\n" + json.dumps(records, ensure_ascii=False, indent=2),
        "array on one line": json.dumps(records),
        "one object": json.dumps(records[0], indent=4),
    }[layout]
    (tmp_path / "named.json").write_text(mark + content, encoding="utf-8")
    found, skipped = read_all("jsonl", tmp_path / "named.json")
    assert found == [record["text"] for record in records] and not skipped


def test_lines_of_array_elements(tmp_path):
    (tmp_path / "x.json").write_text(
        '[\n {"text": "一"},\n {"text":\n  null}, 7,\n {"texts": "三"}\n]\n', encoding="utf-8"
    )
    corpus = Corpus.from_argument(f"jsonl={tmp_path}", PRETRAINING)
    assert list(data_process.documents(corpus, lambda count: None)) == ["一".encode()]
    first = {reason: entry["first"].rpartition(":")[2] for reason, entry in corpus.skipped.items()}
    assert first == {"empty text": "3", "not a JSON object": "4", "without the field text": "5"}


def test_reader_jsonl_counts_bad_lines(tmp_path):
    lines = [
        '{"text": "一"}',
        "{oops",
        '{"text": null}',
        '{"text": "\\ud83d"}',
        '{"other": 1}',
        "[1]",
        '{"text": "二"}',
    ]
    (tmp_path / "x.jsonl").write_text("\n".join([*lines, '{"text": "cut o']), encoding="utf-8")
    corpus = Corpus.from_argument(f"jsonl={tmp_path / 'x.jsonl'}", PRETRAINING)
    assert list(data_process.documents(corpus, lambda count: None)) == ["一".encode(), "二".encode()]
    where = tmp_path / "x.jsonl"
    assert corpus.skipped == {
        "not valid JSON": {"count": 2, "first": f"{where}:2"},
        "empty text": {"count": 1, "first": f"{where}:3"},
        "broken Unicode": {"count": 1, "first": f"{where}:4"},
        "without the field text": {"count": 1, "first": f"{where}:5"},
        "not a JSON object": {"count": 1, "first": f"{where}:6"},
    }
    assert f"2 not valid JSON (first: {where}:2)" in corpus.skipped_text()


def test_reader_csv(tmp_path):
    rows = 'id,text\r\n1,NA\r\n2,"两\r\n行, ""引号"""\r\n3,null\r\n4,\r\n5,"x" y\r\n6,好\r\n'
    (tmp_path / "x.csv").write_bytes(rows.encode("utf-8-sig"))
    corpus = Corpus.from_argument(f"csv={tmp_path}", PRETRAINING)
    found = [data.decode() for data in data_process.documents(corpus, lambda count: None)]
    assert found == ["NA", '两\n行, "引号"', "null", "好"]
    lines = {reason: (entry["count"], entry["first"].rpartition(":")[2]) for reason, entry in corpus.skipped.items()}
    assert lines == {"empty text": (1, "6"), "not valid CSV": (1, "7")}


POEMS = {
    "全唐诗/poet.tang.0.json": (
        [
            {
                "author": "陳嘉言",
                "paragraphs": ["公子申敬愛，", "攜朋翫物華。"],
                "title": "晦日",
                "id": "x",
                "tags": ["a"],
            }
        ],
        ["晦日\n陳嘉言\n公子申敬愛，\n攜朋翫物華。"],
    ),
    "宋词/ci.song.0.json": (
        [{"author": "蔡伸", "paragraphs": ["十幅健帆风，"], "rhythmic": "好事近"}, {"author": "x", "rhythmic": "y"}],
        ["好事近\n蔡伸\n十幅健帆风，", ""],
    ),
    "论语/lunyu.json": ([{"chapter": "学而篇", "paragraphs": ["子曰：", "有子曰："]}], ["学而篇\n子曰：\n有子曰："]),
    "四书五经/daxue.json": ({"chapter": "大學", "paragraphs": ["大學之道"]}, ["大學\n大學之道"]),
    "纳兰性德/诗集.json": (
        [{"title": "长相思", "para": ["山一程"], "author": "纳兰性德"}],
        ["长相思\n纳兰性德\n山一程"],
    ),
    "诗经/shijing.json": (
        [{"title": "关雎", "chapter": "国风", "section": "周南", "content": ["关关"]}],
        ["关雎\n关关"],
    ),
    "幽梦影/youmengying.json": ([{"content": "读经宜冬", "comment": ["曹秋岳曰"]}], ["读经宜冬"]),
    "蒙学/baijiaxing.json": (
        {
            "title": "百家姓",
            "author": "佚名",
            "tags": "北宋",
            "paragraphs": ["趙錢孫李"],
            "origin": [{"surname": "趙"}],
        },
        ["百家姓\n佚名\n趙錢孫李"],
    ),
    "蒙学/shenglvqimeng.json": (
        {
            "title": "聲律啓蒙",
            "author": "車萬育",
            "abstract": "訓練",
            "content": [
                {
                    "title": "上卷",
                    "content": [
                        {"chapter": "一東", "paragraphs": ["雲對雨"]},
                        {"chapter": "二冬", "paragraphs": ["春對夏"]},
                    ],
                },
            ],
        },
        ["聲律啓蒙·一東\n車萬育\n雲對雨", "聲律啓蒙·二冬\n車萬育\n春對夏"],
    ),
    "蒙学/qianjiashi.json": (
        {
            "title": "千家詩",
            "author": "謝枋得",
            "content": [
                {
                    "type": "五言絕句",
                    "content": [
                        {"chapter": "春眠", "author": "孟浩然", "paragraphs": ["春眠不覺曉"]},
                        {
                            "chapter": "清平調",
                            "author": "李白",
                            "paragraphs": [{"subchapter": "其一", "paragraphs": ["雲想衣裳"]}],
                        },
                    ],
                },
            ],
        },
        ["春眠\n孟浩然\n春眠不覺曉", "清平調\n李白\n其一\n雲想衣裳"],
    ),
    "蒙学/tangshi.json": (
        {
            "title": "唐詩三百首",
            "content": [
                {
                    "type": "樂府",
                    "content": [
                        {"chapter": "清平調", "subchapter": "其二", "author": "李白", "paragraphs": ["一枝"]},
                        {"chapter": "相思", "subchapter": None, "author": "王維", "paragraphs": ["紅豆"]},
                    ],
                }
            ],
        },
        ["清平調\n其二\n李白\n一枝", "相思\n王維\n紅豆"],
    ),
    "rank/poet.json": ([{"author": "x", "title": "y", "baidu": 7}], [""]),
}


@pytest.mark.parametrize("name", POEMS)
def test_reader_chinese_poetry(name, tmp_path):
    content, expected = POEMS[name]
    path = tmp_path / name
    path.parent.mkdir()
    text = json.dumps(content, ensure_ascii=False, indent=4)
    path.write_bytes(text.replace("\n", "\r\n").encode("utf-8") if "论语" in name else text.encode("utf-8"))
    assert read_all("chinese-poetry", tmp_path)[0] == expected


def turns(*contents: str) -> list[dict]:
    return [{"role": ("user", "assistant")[at % 2], "content": content} for at, content in enumerate(contents)]


def test_reader_alpaca(tmp_path):
    records = [
        {"instruction": "翻译\n", "input": " 你好 ", "output": "hello"},
        {"instruction": "问", "input": None, "output": "NA"},
        {"instruction": "三", "output": "答", "history": [["一", "1"], ["二", "2"]], "system": "你是助手"},
    ]
    (tmp_path / "alpaca.json").write_text(json.dumps(records), encoding="utf-8")
    system = [{"role": "system", "content": "你是助手"}]
    expected = [turns("翻译\n你好", "hello"), turns("问", "NA"), [*system, *turns("一", "1", "二", "2", "三", "答")]]
    assert read_all("alpaca", tmp_path, INSTRUCTIONS)[0] == expected
    write_lines(tmp_path / "alpaca.json", records)
    assert read_all("alpaca", tmp_path, INSTRUCTIONS)[0] == expected


def test_reader_messages(tmp_path):
    records = [
        {"messages": turns("问", "答")},
        {"conversations": [{"from": "human", "value": "问"}, {"from": "gpt", "value": "答"}], "system": "你是助手"},
        {"conversations": [{"role": "user", "content": "问"}, {"role": "assistant", "content": "答", "tools": None}]},
        {"messages": "not a list"},
    ]
    system = [{"role": "system", "content": "你是助手"}]
    write_lines(tmp_path / "x.jsonl", records)
    found = read_all("messages", tmp_path / "x.jsonl", INSTRUCTIONS)[0]
    assert found == [turns("问", "答"), [*system, *turns("问", "答")], turns("问", "答"), []]


@pytest.mark.parametrize(
    ("messages", "kept", "problem"),
    [
        (turns(" 问\r\n ", "答\n"), turns("问", "答"), ""),
        (turns("问", "答", "再问"), turns("问", "答"), "last question without an answer"),
        (turns("问", "答", "再问", " "), turns("问", "答"), "empty answer"),
        (turns("问", "答", "", "答"), turns("问", "答"), "empty question"),
        (turns("问", None), [], "empty answer"),
        (turns("", "答"), [], "empty question"),
        (turns("问"), [], "no assistant turn"),
        ([], [], "no assistant turn"),
        (turns("a", "b", "c")[1:] + turns("d")[:1], [], "roles out of order"),
        (turns("a", "b", "c", "d")[1:], turns("c", "d"), "began with an answer"),
        (turns("a", "b") + turns("c", "d")[1:], turns("a", "b"), "roles out of order"),
        (
            [{"role": "system", "content": "s"}, *turns("问", "答")],
            [{"role": "system", "content": "s"}, *turns("问", "答")],
            "",
        ),
        ([{"role": "system", "content": ""}, *turns("问", "答")], turns("问", "答"), ""),
        ([*turns("问", "答"), {"role": "tool", "content": "x"}], [], "a role other than system, user, assistant"),
    ],
)
def test_tidy_conversation(messages, kept, problem):
    assert tidy_conversation(messages) == (kept, problem)


# ----------------------------------------------------------------------------------------------------------------------
# sft, textbook, list


def test_sft(tmp_path, capsys):
    alpaca = [{"instruction": text, "input": "", "output": f"答{at}"} for at, text in enumerate(texts(200))]
    alpaca += [
        {"instruction": alpaca[3]["instruction"], "input": "", "output": "另一个回答"},
        {"instruction": "x", "output": ""},
    ]
    write_lines(tmp_path / "alpaca.jsonl", alpaca)
    chat = write_lines(tmp_path / "chat.jsonl", [{"messages": turns("问", "答", "再问")}])
    config = SftConfig((f"alpaca={tmp_path / 'alpaca.jsonl'}", f"messages={chat}"), tmp_path / "out", 0.1)
    meta = sft(config)
    lines = {
        split: [
            json.loads(line) for line in (tmp_path / "out" / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
        ]
        for split in ("train", "val")
    }
    assert {split: part["conversations"] for split, part in meta["splits"].items()} == {
        k: len(v) for k, v in lines.items()
    }
    assert len(lines["train"]) + len(lines["val"]) == 202 and 8 <= len(lines["val"]) <= 40
    first = {split: {record["messages"][0]["content"] for record in records} for split, records in lines.items()}
    assert not first["train"] & first["val"]  # two answers to one question are on the same side
    assert {"messages": turns("问", "答")} in lines["train"] + lines["val"]
    source = meta["sources"][0]
    assert source["conversations"] == source["answers"] == 201
    assert source["skipped"] == {"empty answer": {"count": 1, "first": f"{tmp_path / 'alpaca.jsonl'}:202"}}
    assert meta["sources"][1]["shortened"] == {"last question without an answer": 1}
    before = files_of(tmp_path / "out")
    capsys.readouterr()
    assert sft(config) == meta and "nothing to do" in capsys.readouterr().out
    sft(SftConfig(config.dataset, tmp_path / "again", 0.1))
    assert files_of(tmp_path / "again") == before


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
    for reader in [*PRETRAINING.values(), *INSTRUCTIONS.values()]:
        assert reader.name in shown and reader.layout in shown and reader.source in shown


# ----------------------------------------------------------------------------------------------------------------------
# Bad input


GOOD = b'{"text": "\xe6\x98\xa5"}\n'
BAD_FILES = {
    # name of the case: (reader, content, what the error says; {0} is the file)
    "empty": ("jsonl", b"", "{0} holds no document: 1 empty file"),
    "only white space": ("lines", b" \n\n", "{0} holds no document"),
    "binary": ("txt", b"abc\x00def", "{0} is binary (a zero byte at offset 3)"),
    "utf-16": ("txt", "春".encode("utf-16"), "{0} is UTF-16"),
    "gb18030": ("txt", "第一行 ok\n".encode() + "春眠".encode("gb18030"), "{0}:2: not UTF-8 (byte 0xb4 at offset 13)"),
    "gb18030 lines": ("lines", b"ok\n" + "春眠".encode("gb18030") + b"\n", "{0}:2: not UTF-8 (byte 0xb4 at offset 3)"),
    "gb18030 json": ("jsonl", GOOD + b'{"text": "' + "春".encode("gb18030") + b'"}\n', "{0}:2: not UTF-8"),
    "gb18030 array": (
        "jsonl",
        b'[\n{"text": "' + "春".encode("gb18030") + b'"}]',
        "{0}:2: not UTF-8 (byte 0xb4 at offset 12)",
    ),
    "cut inside a character": ("txt", "春".encode()[:2], "{0}:1: not UTF-8"),
    "array cut off": (
        "jsonl",
        b'[\n{"text": "a"},\n{"text": "b',
        "{0}:3: the JSON array is cut off: the file ends at byte 28",
    ),
    "array cut between": ("jsonl", b'[{"text": "a"},\n', "{0}:2: the JSON array is cut off"),
    "array not JSON": ("jsonl", b'[{"text": "a"},\n{"text" "b"}]', "{0}:2: not valid JSON: Expecting ':' delimiter"),
    "array not JSON early": ("jsonl", b'[{"text": "a"},\n{text: 1},\n' + b" " * 99 + b"]", "{0}:2: not valid JSON"),
    "array without comma": (
        "jsonl",
        b'[{"text": "a"}\n{"text": "b"}]',
        "{0}:2: not valid JSON: expected ']' or a comma",
    ),
    "array goes on": ("jsonl", b'[{"text": "a"}]\n{"text": "b"}', "{0}:1: text after the end of the JSON array"),
    "no line is JSON": (
        "jsonl",
        b"hello\nworld\n",
        "{0}:1: not valid JSON: Expecting value at column 1; {0} has no valid",
    ),
    "other fields": (
        "jsonl",
        b'{"title": "a", "content": "b"}\n',
        "{0}:1: not the layout of 'jsonl': expected the fields text; found title, content",
    ),
    "other fields in an array": ("jsonl", b'[\n\n{"title": "a"}]', "{0}:3: not the layout of 'jsonl'"),
    "other columns": (
        "csv",
        b"title,content\na,b\n",
        "{0}:2: not the layout of 'csv': expected the fields text; found title",
    ),
    "csv cut off": ("csv", b'text\na\n"b\nc', "{0}:3: the file is cut off inside a quoted cell"),
    "only empty texts": (
        "jsonl",
        b'{"text": ""}\n{"text": null}\n',
        "{0} holds no document: 2 empty text (first: {0}:1)",
    ),
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


def test_bad_file_in_a_worker_run(tokenizer_file, corpus_file, tmp_path, small_chunks):
    """The error comes late, while two workers are busy: still one message, and nothing left."""
    bad = tmp_path / "bad.jsonl"
    bad.write_bytes(corpus_file.read_bytes() + b'{"text": "\xff"}\n')
    with pytest.raises(UserError, match=r"bad.jsonl:401: not UTF-8"):
        prepare(bad, tokenizer_file, tmp_path / "out", workers=2)
    assert [entry.name for entry in tmp_path.iterdir()] == ["bad.jsonl"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([{"messages": turns("问")}], "holds no conversation with an answer: 1 no assistant turn (first: {0}:1)"),
        (
            [{"messages": turns("问", "")}, {"messages": []}],
            "1 empty answer (first: {0}:1), 1 no assistant turn (first: {0}:2)",
        ),
        ([{"text": "x"}], "{0}:1: not the layout of 'messages': expected the fields messages; found text"),
        ([], "holds no conversation with an answer: 1 empty file"),
    ],
)
def test_bad_sft_file(content, message, tmp_path):
    path = write_lines(tmp_path / "x.jsonl", content)
    with pytest.raises(UserError) as error:
        sft(SftConfig((f"messages={path}",), tmp_path / "out"))
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
        "--workers -1",
        "--val-fraction 1.5",
    ):
        assert part in done.stderr
    done = command("pretrain")
    assert done.returncode == 2 and "--corpus is required" in done.stderr
    done = command("tokenise")
    assert done.returncode == 2 and "unknown command 'tokenise'" in done.stderr


def test_command_line_reports_a_bad_line_of_input(tmp_path, tokenizer_file):
    (tmp_path / "x.json").write_text('[{"text": "a"},\n{"te', encoding="utf-8")
    words = ["pretrain", "--corpus", "jsonl=x.json", "--tokenizer", tokenizer_file, "--out", "out"]
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
    append, calls = token_files.TokenWriter.append, []

    def full(self, *arguments):
        calls.append(1)
        if len(calls) == 20:
            raise OSError(28, "No space left on device", "train.bin")
        append(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(token_files.TokenWriter, "append", full)
        with pytest.raises(SystemExit) as stopped, clean_exit():
            prepare(corpus_file, tokenizer_file, tmp_path / "out")
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and error.startswith("error: the disk is full") and error.count("\n") == 1
    assert not (tmp_path / "out").exists()
    prepare(corpus_file, tokenizer_file, tmp_path / "out")
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")


# ----------------------------------------------------------------------------------------------------------------------
# The real samples, where they are at hand


@pytest.mark.parametrize(
    ("argument", "documents", "skipped"),
    [
        ("txt=pretrain/laws", 166, {"empty text": 5}),
        ("txt=pretrain/niutrans-classics", 120, {}),
        ("chinese-poetry=pretrain/chinese-poetry", 15_755, {}),
        ("jsonl=pretrain/format_samples", 300, {}),
        ("lines=pretrain/format_samples", 30, {}),
    ],
)
def test_real_pretraining_samples(argument, documents, skipped):
    name, _, path = argument.partition("=")
    if not (SHARED / path).exists():
        pytest.skip("the real samples are not here")
    corpus = Corpus.from_argument(f"{name}={SHARED / path}", PRETRAINING)
    assert len(list(data_process.documents(corpus, lambda count: None))) == documents
    assert {reason: entry["count"] for reason, entry in corpus.skipped.items()} == skipped


@pytest.mark.parametrize(
    ("argument", "kept", "shortened"),
    [
        ("alpaca=alpaca_zh_demo.json", 1000, {}),
        ("alpaca=Belle_open_source_1k.json", 1000, {}),
        ("alpaca=oaast_sft_zh.json", 689, {}),
        ("alpaca=ruozhiba_qa2449_gpt4t.json", 2449, {}),
        ("messages=medical_sft_1K_format.jsonl", 1000, {}),
        (
            "messages=sharegpt_zh_1K_format.first300.jsonl",
            300,
            {"empty question": 1, "last question without an answer": 1},
        ),
    ],
)
def test_real_instruction_samples(argument, kept, shortened):
    name, _, path = argument.partition("=")
    path = SHARED / "sft" / path
    if not path.exists():
        pytest.skip("the real samples are not here")
    counts = {}
    corpus = Corpus.from_argument(f"{name}={path}", INSTRUCTIONS)
    assert len(list(data_process.conversations(corpus, counts, lambda count: None))) == kept
    assert counts["shortened"] == shortened and not corpus.skipped
