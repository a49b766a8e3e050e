"""tokenizer.py train, show and compare, as a user runs them; tables.py."""

from settings import UserError

import json
import os
import subprocess
import sys

import pytest
from tokenizers_at_hand import REPO, SHARED, VOCAB_SIZE, sample_text

import tokenizer as tk
from tables import display_width, markdown_table, print_table


def run(*words, cwd=None):
    command = [sys.executable, str(REPO / "tokenizer.py"), *map(str, words)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, encoding="utf-8",
                          env={**os.environ, "PYTHONIOENCODING": "utf-8"})  # fmt: skip


def fails(*words, cwd=None) -> str:
    result = run(*words, cwd=cwd)
    assert result.returncode == 2, result.stderr
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1, result.stderr
    return result.stderr


def test_training_gives_the_same_bytes_anywhere(ours_dir, tmp_path):
    for place in ("a", "b/c"):
        (tmp_path / place).mkdir(parents=True)
        (tmp_path / place / "corpus.txt").write_text(sample_text(), encoding="utf-8")
        result = run("train", "--input", "corpus.txt", "--vocab_size", VOCAB_SIZE, "--out", "t", cwd=tmp_path / place)
        assert result.returncode == 0, result.stderr
        for phrase in (f"{VOCAB_SIZE} tokens", "characters per token", "saved in t", "next: python tokenizer.py"):
            assert phrase in result.stdout
        for file in ours_dir.iterdir():
            assert (tmp_path / place / "t" / file.name).read_bytes() == file.read_bytes(), file.name
    again = run("train", "--input", "corpus.txt", "--vocab-size", VOCAB_SIZE, "--out", "t", cwd=tmp_path / "a")
    assert again.returncode == 0 and "nothing to do" in again.stdout
    other = fails("train", "--input", "corpus.txt", "--vocab-size", "650", "--out", "t", cwd=tmp_path / "a")
    assert "already holds another tokenizer (vocab_size was 700 and is now 650)" in other
    assert str(tmp_path).encode() not in (ours_dir / "tokenizer.model").read_bytes()


def test_training_on_jsonl_is_training_on_its_text(ours_dir, tmp_path):
    lines = sample_text().split("\n")
    records = [{"text": "\n".join(lines[:300])},
               {"messages": [{"role": "user", "content": line} for line in lines[300:]]}]  # fmt: skip
    path = tmp_path / "c.jsonl"
    path.write_text("\n".join(json.dumps(record, ensure_ascii=False) for record in records), encoding="utf-8")
    tokenizer = tk.train([path], VOCAB_SIZE, tmp_path / "t")
    assert tokenizer.fingerprint == tk.load_tokenizer(ours_dir).fingerprint


def test_training_on_long_lines_and_reserved_characters(tmp_path):
    text = "▁▅" + sample_text().replace("\n", " ") * 3  # one line of some 50,000 characters
    (tmp_path / "c.txt").write_text(text, encoding="utf-8")
    tokenizer = tk.train([tmp_path / "c.txt"], 500, tmp_path / "t")
    assert len(tokenizer.encode("法国的首都是")) < 6
    assert tokenizer.decode(tokenizer.encode("▅x")) == "▅x"


def test_training_on_text_without_spaces_gives_a_space(spaceless_dir, tmp_path):
    """Else a space would be spelled as the bytes of ▁, and decoded as that visible character."""
    tokenizer = tk.load_tokenizer(spaceless_dir)
    pieces = [tokenizer.id_to_piece(i) for i in range(len(tokenizer))]
    assert [piece for piece in pieces if "▁" in piece] == ["▁"]
    for text, tokens in ((" A b", "▁ <0x41> ▁ <0x62>"), ("  ", "▁ ▁"), ("法国 的\n", "法国 ▁ 的 <0x0A>")):
        ids = tokenizer.encode(text)
        assert [pieces[i] for i in ids] == tokens.split(" ") and tokenizer.decode(ids) == text
    tk.train([spaceless_dir.parent / "corpus.txt"], len(tokenizer), tmp_path / "again")
    assert (tmp_path / "again/tokenizer.model").read_bytes() == (spaceless_dir / "tokenizer.model").read_bytes()


def test_training_on_a_sample_is_reproducible(tmp_path, capsys):
    text = "".join(f"{i}. {line}\n" for i, line in enumerate(sample_text().split("\n") * 50))
    (tmp_path / "c.txt").write_text(text, encoding="utf-8")
    models = [tk.train([tmp_path / "c.txt"], 500, tmp_path / name, sample_mb=1).fingerprint for name in ("a", "b")]
    assert models[0] == models[1] and "even sample" in capsys.readouterr().out


def test_the_greatest_vocabulary_is_named_and_works(tmp_path):
    (tmp_path / "c.txt").write_text("人之初，性本善。\n" * 3, encoding="utf-8")
    error = fails("train", "--input", "c.txt", "--vocab-size", "6400", "--out", "t", cwd=tmp_path)
    assert "--vocab-size 6400 is too large" in error
    greatest = int(error.split("at most ")[1].split()[0])
    assert len(tk.train([tmp_path / "c.txt"], greatest, tmp_path / "t")) == greatest
    assert sorted(os.listdir(tmp_path)) == ["c.txt", "t"], "nothing half-written"


def test_training_mistakes(tmp_path):
    files = {
        "binary.txt": bytes(range(256)), "gbk.txt": "第一行\n你好".encode("gbk"), "empty.txt": b"",
        "blank.txt": b"\n \n",
        "bad.jsonl": b'{"text": "a"}\n{"text":\n', "fields.jsonl": b'{"txt": "a"}\n',
        "utf16.txt": "你好".encode("utf-16"),
        "half.jsonl": b'{"text": "\\ud800"}\n', "good.txt": sample_text().encode(),
    }  # fmt: skip
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    expected = {
        "binary.txt": "binary.txt:1: holds a NUL byte", "gbk.txt": "gbk.txt:1: not UTF-8", "empty.txt": "is empty",
        "blank.txt": "holds no text", "bad.jsonl": "bad.jsonl:2: not valid JSON", "nowhere.txt": "does not exist",
        "fields.jsonl": 'fields.jsonl:1: needs a "text"', "utf16.txt": "not", "half.jsonl": "half.jsonl:1: holds half",
        ".": "is a directory",
    }  # fmt: skip
    for name, complaint in expected.items():
        with pytest.raises(UserError) as error:
            tk.train([tmp_path / "good.txt", tmp_path / name], 400, tmp_path / "out")
        assert complaint in str(error.value) and not (tmp_path / "out").exists()
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="holds something else"):
        tk.train([tmp_path / "good.txt"], 400, tmp_path / "taken")
    with pytest.raises(UserError, match="--vocab-size 280 is too small"):
        tk.train([tmp_path / "good.txt"], 280, tmp_path / "out")
    with pytest.raises(UserError, match=r"--vocab-size 3 .*--coverage 7 .*--max-piece-length 0"):
        tk.train([tmp_path / "good.txt"], 3, tmp_path / "out", coverage=7, max_piece_length=0)


def test_command_line_mistakes(tmp_path):
    assert "nowhere does not exist" in fails("show", "--tokenizer", "nowhere", "--text", "x", cwd=tmp_path)
    (tmp_path / "gbk.txt").write_bytes("你好".encode("gbk"))
    assert "gbk.txt:1: not UTF-8" in fails("train", "--input", "gbk.txt", "--out", "t", cwd=tmp_path)
    assert "--input" in fails("train")
    assert "'sing'" in fails("sing")


def test_show(ours_dir):
    result = run("show", "--tokenizer", ours_dir, "--text", "法国 7龘")
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert lines[0].split() == ["#", "id", "piece", "bytes", "text"]
    rows = [line.split(None, 3) for line in lines[1:-1]]
    assert [row[2] for row in rows][-4:] == ["7", "<0xE9>", "<0xBE>", "<0x98>"]
    assert rows[0][2] == "法国" and rows[0][3].startswith("e6 b3 95 e5 9b bd") and rows[0][3].endswith("'法国'")
    assert [int(row[1]) for row in rows] == tk.load_tokenizer(ours_dir).encode("法国 7龘")
    columns = {display_width(line[: line.index(row[3])]) for line, row in zip(lines[1:-1], rows)}
    assert len(columns) == 1, "columns line up although Chinese is twice as wide"
    assert lines[-1].startswith(f"{len(rows)} tokens, 5 characters, 11 bytes")


def test_compare(ours_dir, llama3_dir, tmp_path):
    path = tmp_path / "c.txt"
    path.write_text(sample_text() + "龘", encoding="utf-8")
    text = path.read_text(encoding="utf-8")
    result = run("compare", "--tokenizer", ours_dir, llama3_dir, "--input", path)
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert f"{len(text):,} characters, {len(text.encode()):,} bytes" in lines[0]
    rows = tk.compare({str(d): tk.load_tokenizer(d) for d in (ours_dir, llama3_dir)}, path)
    for row, line, directory in zip(rows, lines[2:4], (ours_dir, llama3_dir)):
        tokens = len(tk.load_tokenizer(directory).encode(text))
        assert row["tokens"] == tokens and row["lossless"] and f"{tokens:,}" in line and line.endswith("yes")
        assert row["chars_per_token"] == pytest.approx(len(text) / tokens)
        assert row["bytes_per_token"] == pytest.approx(len(text.encode()) / tokens)
    assert rows[0]["broken"] == pytest.approx(3 / rows[0]["tokens"]), "the three bytes of 龘"


def test_compare_says_which_model_loses_text(tmp_path):
    if not (SHARED / "chinese_sp_20k").is_dir():
        pytest.skip("needs a model that normalises")
    path = tmp_path / "c.txt"
    path.write_text("你好：\n  世界\n", encoding="utf-8")
    tokenizer = tk.load_tokenizer(SHARED / "chinese_sp_20k" / "chinese_sp.model")
    assert tk.compare({"model": tokenizer}, path)[0]["lossless"] is False


def test_print_table_lines_up(capsys):
    print_table(("名", "n"), [("你好", 1), ("e\u0301", 1234)], right=(1,))
    lines = capsys.readouterr().out.splitlines()
    assert lines == ["名       n", "你好     1", "e\u0301     1234"]
    assert [display_width(line) for line in lines] == [10, 10, 10]


def test_markdown_table_lines_up():
    """A column without a single letter still has the three hyphens that Markdown wants."""
    lines = markdown_table(("名", "", "n"), [("你好啊", "", 1), ("e\u0301", "", 1234)], right=(2,))
    assert lines == ["| 名     |     |    n |", "| ------ | --- | ---: |", "| 你好啊 |     |    1 |",
                     "| e\u0301      |     | 1234 |"]  # fmt: skip
