"""readers/: opening files by content, streaming them, and naming every record that is left out."""

from __future__ import annotations

from settings import UserError

import bz2
import gzip
import json
import lzma
import os
import random
import sys
import tracemalloc
import zipfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import readers.json_array
import readers.source
from readers import INSTRUCTIONS, PREFERENCES, PRETRAINING, Corpus, Reader
from readers.opening import plain_name, text_encoding

SHARED = Path(os.environ.get("CRIA_SHARED_DATA", Path(__file__).resolve().parent.parent.parent / "shared" / "data"))
REST = "the rest of a file that cannot be read (an unknown number of records)"
TEXTS = ["春眠不觉晓\n", 'a"\\b', "\U0001f999", "x" * 50]


def read(name: str, path: Path, table=PRETRAINING, **options) -> tuple[list, list[tuple[str, str]]]:
    """(records, [(reason, "line" or "name of the file")] of what was skipped)."""
    skipped = []
    start = options.pop("start", (0, 0))
    corpus = Corpus.from_argument(f"{name}={path}", table, **options)
    found = [record for _, record in corpus.records(on_skip=lambda *event: skipped.append(event), start=start)]
    return found, [(reason, where.rpartition(":")[2].rpartition("/")[2]) for reason, where in skipped]


def values(path: Path, method: str = "json_values") -> tuple[list, list[tuple[str, str]]]:
    """What one method of SourceFile yields."""
    table = {"any": Reader("any", lambda file: getattr(file, method)(), "", ("*",), "")}
    return read("any", path, table)


def write(path: Path, content: bytes | str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)
    return path


def as_lines(records) -> str:
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


JSON_LINES = as_lines({"text": text} for text in TEXTS)

# ----------------------------------------------------------------------------------------------------------------------
# Text, lines, tables


def test_text_and_lines(tmp_path):
    write(tmp_path / "b" / "two.txt", "第二\r\n篇\r\n".encode("utf-8-sig"))
    write(tmp_path / "c.txt", "一\n\n二二\n 三\u2028四 \n")
    write(tmp_path / "d.txt", b"")
    write(tmp_path / ".hidden.txt", "no")
    write(tmp_path / "e.csv", "no")
    assert read("txt", tmp_path) == (["第二\n篇\n", "一\n\n二二\n 三\u2028四 \n"], [("empty file", "d.txt")])
    assert read("lines", tmp_path / "c.txt") == (["一\n", "二二\n", " 三\u2028四 \n"], [])


def test_csv(tmp_path):
    rows = 'id,text\r\n1,NA\r\n2,"两\r\n行, ""引号"""\r\n3,null\r\n4,\r\n5,"x" y\r\n6,好\r\n'
    write(tmp_path / "x.csv", rows.encode("utf-8-sig"))
    found = ["NA", '两\r\n行, "引号"', "null", "", "好"]
    assert read("csv", tmp_path) == (found, [("not valid CSV", "7")])


# ----------------------------------------------------------------------------------------------------------------------
# JSON: one array, lines, or one object


@pytest.mark.parametrize("layout", ["lines", "array", "array on one line", "one object"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "gb18030"])
def test_json_layout_is_told_by_content(layout, encoding, tmp_path, monkeypatch):
    monkeypatch.setattr(readers.json_array, "BLOCK", 7)  # blocks end inside characters, escapes and numbers
    records = [{"id": 12345, "text": text} for text in ["春\n眠", "", *TEXTS]]
    if layout == "one object":
        records = records[:1]
    content = {
        "lines": "\n" + as_lines(records).rstrip(),
        "array": "\n" + json.dumps(records, ensure_ascii=False, indent=2),
        "array on one line": json.dumps(records, ensure_ascii=False),
        "one object": json.dumps(records[0], ensure_ascii=False, indent=4),
    }[layout]
    write(tmp_path / "named.json", content.encode(encoding))
    assert values(tmp_path / "named.json", "json_objects") == (records, [])


@given(st.recursive(st.none() | st.integers() | st.text(), lambda some: st.lists(some) | st.dictionaries(st.text(), some)))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_array_of_any_values(tmp_path, monkeypatch, value):
    monkeypatch.setattr(readers.json_array, "BLOCK", 5)
    path = write(tmp_path / "x", json.dumps([value, [value], 7], indent=1))
    assert values(path) == ([value, [value], 7], [])


LIST_FILES = {  # content -> values
    "lines of lists": ('[{"a": 1}, {"a": 2}]\n[{"a": 3}]\n', [[{"a": 1}, {"a": 2}], [{"a": 3}]]),
    "with empty lines": ("\n[1]\n\n [2]\n", [[1], [2]]),
    "with another value later": ('[1]\n[2]\n{"a": 3}\n', [[1], [2], {"a": 3}]),
    "one line is one array": ('[{"a": 1}, {"a": 2}]\n', [{"a": 1}, {"a": 2}]),
    "one line of lists is one array": ("[[1], [2]]", [[1], [2]]),
    "array of lists, indented": ("[[1],\n[2]]", [[1], [2]]),
    "array of lists, one per line": ("[\n[1],\n[2]\n]", [[1], [2]]),
    "the first line is no complete list": ("[1,\n[2]]", [1, [2]]),
}


@pytest.mark.parametrize("case", LIST_FILES)
def test_lines_of_lists_or_one_array(case, tmp_path):
    content, expected = LIST_FILES[case]
    assert values(write(tmp_path / "x.json", content)) == (expected, [])
    objects, skipped = values(tmp_path / "x.json", "json_objects")
    assert objects == [value for value in expected if isinstance(value, dict)]
    assert [reason for reason, _ in skipped] == ["not a JSON object"] * (len(expected) - len(objects))


def test_first_line_is_not_looked_at_without_end(tmp_path, monkeypatch):
    """A long array on one line must not be held in memory to find out that it is one."""
    path = write(tmp_path / "x.json", json.dumps([{"text": "x" * 1000}] * 40_000))  # 40 MB
    monkeypatch.setattr(readers.source, "LONGEST_LINE", 1 << 20)
    corpus = Corpus.from_argument(f"jsonl={path}", PRETRAINING)
    tracemalloc.start()
    try:
        count = sum(1 for _ in corpus.records())
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert count == 40_000 and peak < 12e6


def test_lines_of_array_elements(tmp_path):
    write(tmp_path / "x.json", '[\n {"text": "一"},\n {"text":\n  null}, 7,\n {"texts": "三"}\n]\n')
    assert read("jsonl", tmp_path) == (["一", None], [("not a JSON object", "4"), ("without the field text", "5")])


def test_bad_lines_are_skipped_and_named(tmp_path):
    lines = ['{"text": "一"}', "{oops", "[1]", '{"other": 1}', '{"n": ' + "1" * 5000 + "}", "[" * 100_000, '{"text": "二"}']
    write(tmp_path / "x.jsonl", "\n".join([*lines, '{"text": "cut o']))
    bad = "not valid JSON"
    skipped = [(bad, "2"), ("not a JSON object", "3"), ("without the field text", "4"), (bad, "5"), (bad, "6"), (bad, "8")]
    assert read("jsonl", tmp_path / "x.jsonl") == (["一", "二"], skipped)


# ----------------------------------------------------------------------------------------------------------------------
# Encodings


def test_encoding_by_the_first_bytes():
    text = "春眠不觉晓，处处闻啼鸟。夜来风雨声，花落知多少。"
    assert text_encoding(b"") == text_encoding(b"plain") == "utf-8"
    assert text_encoding(text.encode("utf-8-sig")) == "utf-8-sig"
    assert text_encoding("a\ufffd\ufffdb".encode()) == "utf-8"  # valid, though these bytes are the 锟斤拷 of gb18030
    assert text_encoding(b"\xff\xfe\xfd" + text.encode("utf-8")) == "utf-8"  # neither
    for encoding in ("utf-8", "gb18030"):
        data = text.encode(encoding)
        for end in range(30, len(data) + 1):  # wherever the head ends, also inside a character
            assert text_encoding(data[:end]) == encoding
        for at in range(len(data)):  # whichever byte is lost or wrong
            assert text_encoding(data[:at] + data[at + 1 :]) == text_encoding(data[:at] + b"\xff" + data[at + 1 :]) == encoding


@pytest.mark.parametrize("encoding", ["utf-8", "gb18030"])
def test_one_bad_byte_costs_one_line(encoding, tmp_path):
    lines = [f"第{number}行：春眠不觉晓\n" for number in range(100)]
    data = "".join(lines).encode(encoding)
    path = write(tmp_path / "x.txt", b"\xff" + data)
    assert read("lines", path) == (lines[1:], [(f"not {encoding.upper()}", "1")])


def test_gb18030(tmp_path):
    for name, content, expected in (
        ("txt", "春眠\r\n不觉晓", ["春眠\n不觉晓"]),
        ("lines", "春眠\n不觉晓\n", ["春眠\n", "不觉晓\n"]),
        ("csv", 'text\n"春眠\n不觉晓"\n好\n', ["春眠\n不觉晓", "好"]),
        ("jsonl", JSON_LINES, TEXTS),
        ("jsonl", json.dumps([{"text": text} for text in TEXTS], ensure_ascii=False), TEXTS),
    ):
        path = write(tmp_path / "x", content.encode("gb18030"))
        corpus = Corpus.from_argument(f"{name}={path}", PRETRAINING)
        assert [(file.encoding, record) for file, record in corpus.records()] == [("gb18030", text) for text in expected]


@pytest.mark.parametrize(("encoding", "reason"), [("utf-8", "not UTF-8"), ("gb18030", "not GB18030")])
def test_a_line_in_another_encoding_is_one_bad_record(encoding, reason, tmp_path, monkeypatch):
    monkeypatch.setattr(readers.source, "HEAD", 30)  # else the bad lines would decide the encoding

    def mixed(*lines: str) -> bytes:
        return b"".join(line.encode(encoding).replace(b"?", b"\xff") for line in lines)

    head = "春眠不觉晓" * 5 + "\n"
    write(tmp_path / "x.txt", mixed(head, "?\n", "处处\n", "闻?啼鸟\n"))
    assert read("lines", tmp_path / "x.txt") == ([head, "处处\n"], [(reason, "2"), (reason, "4")])
    good = [as_lines([{"text": text}]) for text in (head, "处处")]
    write(tmp_path / "x.jsonl", mixed(good[0], '{"text": "?"}\n', good[1]))
    assert read("jsonl", tmp_path / "x.jsonl") == ([head, "处处"], [(reason, "2")])
    rows = mixed("text,b\n", f'"{head}",1\n', "?,2\n", '"处处\n', "闻?\n", '啼鸟",3\n', "夜来,4\n")
    write(tmp_path / "x.csv", rows)
    assert read("csv", tmp_path / "x.csv") == ([head, "夜来"], [(reason, "4"), (reason, "5")])


# ----------------------------------------------------------------------------------------------------------------------
# Compressed files and archives


def zstd(data: bytes) -> bytes:
    return pytest.importorskip("zstandard").ZstdCompressor().compress(data)


COMPRESSORS = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": zstd}


@pytest.mark.parametrize("ending", COMPRESSORS)
def test_compressed_files(ending, tmp_path):
    compress = COMPRESSORS[ending]
    halves = [compress(JSON_LINES[:9].encode()), compress(JSON_LINES[9:].encode())]
    write(tmp_path / f"x.jsonl{ending}", b"".join(halves))  # several streams in one file, as parallel compressors write
    assert read("jsonl", tmp_path) == (TEXTS, [])  # found in a folder
    write(tmp_path / "no-ending", compress(b"\xef\xbb\xbf" + json.dumps([{"text": "a"}], indent=1).encode()))
    assert read("jsonl", tmp_path / "no-ending") == (["a"], [])
    write(tmp_path / "named.jsonl", compress(json.dumps({"text": "a"}, indent=1).encode()))
    assert read("jsonl", tmp_path / "named.jsonl") == (["a"], [])
    write(tmp_path / "x.txt", compress("春".encode("gb18030")))
    assert read("txt", tmp_path / "x.txt") == (["春"], [])
    write(tmp_path / "empty.jsonl", compress(b""))
    assert read("jsonl", tmp_path / "empty.jsonl") == ([], [("empty file", "empty.jsonl")])


@pytest.mark.parametrize("ending", COMPRESSORS)
def test_damaged_compressed_file(ending, tmp_path, monkeypatch):
    monkeypatch.setattr(readers.source, "HEAD", 1000)  # else the damage is found before the first line
    noise = "".join(random.Random(0).choices("abcdefghijklmnop", k=400_000))  # more than one buffer
    data = COMPRESSORS[ending](as_lines([{"text": noise[at : at + 100]} for at in range(0, len(noise), 100)]).encode())
    path = write(tmp_path / "x.jsonl", data[:-20])
    with pytest.raises(UserError, match=r"x.jsonl(:\d+)?: the compressed data is cut off; download the file again"):
        read("jsonl", path, strict=True)
    write(path, data[: len(data) // 2] + bytes(40) + data[len(data) // 2 + 40 :])
    if ending in (".gz", ".zst"):  # they notice only after lines of nonsense
        records, skipped = read("jsonl", path)
        assert 0 < len(records) < 4000 and skipped[-1][0] == REST
    else:
        with pytest.raises(UserError, match=r"x.jsonl(:\d+)?: damaged \(.+\); download the file again"):
            read("jsonl", path)


def make_zip(path: Path, **members: str) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


def test_zip_archive(tmp_path):
    members = {"b/2.jsonl": '{"text": "二"}\n', "a.json": '[{"text": "一"},\n{"texts": 0}]', "b/readme.md": "#", "c/": "",
               "__MACOSX/a.json": "no", ".x.json": "no", "d.jsonl.gz": gzip.compress(b'{"text": "d"}')}  # fmt: skip
    archive = make_zip(tmp_path / "data.zip", **members)
    for path in (archive, tmp_path):
        corpus = Corpus.from_argument(f"jsonl={path}", PRETRAINING)
        progress = []
        assert [(file.where(), file.name, file.index, record) for file, record in corpus.records(progress.append)] == [
            (f"{archive}!a.json:1", "a.json", 0, "一"),
            (f"{archive}!b/2.jsonl:1", "2.jsonl", 1, "二"),
            (f"{archive}!d.jsonl.gz:1", "d.jsonl", 2, "d"),
        ]
        assert read("jsonl", path) == (["一", "二", "d"], [("without the field text", "2")])
        assert sum(progress) == sum(corpus.sizes) < archive.stat().st_size
    with pytest.raises(UserError, match=r"data.zip holds no file that csv reads \(\*.csv\)"):
        Corpus.from_argument(f"csv={archive}", PRETRAINING)


def test_the_only_member_of_an_archive_may_have_any_name(tmp_path):
    archive = make_zip(tmp_path / "no-ending", train=JSON_LINES)
    assert read("jsonl", archive) == (TEXTS, [])


def test_the_same_from_every_wrapping(tmp_path):
    plain = write(tmp_path / "plain" / "x.jsonl", JSON_LINES)
    write(tmp_path / "gz" / "x.jsonl.gz", gzip.compress(JSON_LINES.encode()))
    make_zip(write(tmp_path / "zip" / "x.zip", ""), **{"x.jsonl": JSON_LINES})
    for folder in ("plain", "gz", "zip"):
        assert read("jsonl", tmp_path / folder) == read("jsonl", plain)


def test_damaged_and_encrypted_archives(tmp_path):
    archive = make_zip(tmp_path / "x.zip", **{"a.jsonl": JSON_LINES * 100})
    data = archive.read_bytes()
    write(tmp_path / "cut.zip", data[:-30])
    with pytest.raises(UserError, match=r"cut.zip is a damaged zip archive"):
        read("jsonl", tmp_path / "cut.zip")
    write(tmp_path / "bad.zip", data[:60] + bytes(20) + data[80:])
    with pytest.raises(UserError, match=r"bad.zip!a.jsonl.*: damaged \(.*\); download the file again"):
        read("jsonl", tmp_path / "bad.zip")
    locked = bytearray(data)
    locked[data.index(b"PK\1\2") + 8] |= 1
    with pytest.raises(UserError, match=r"locked.zip!a.jsonl is encrypted"):
        read("jsonl", write(tmp_path / "locked.zip", bytes(locked)))


TAR = b"a.json".ljust(257, b"\0") + b"ustar\x0000".ljust(255, b"\0")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"Rar!\x1a\x07\x01\x00...", "is a RAR archive; unpack it first (unrar x …) and name the folder"),
        (b"7z\xbc\xaf\x27\x1c...", "is a 7z archive; unpack it first (7z x …)"),
        (TAR, "is a tar archive; unpack it first (tar -xf …)"),
        (gzip.compress(TAR), "is a tar archive; unpack it first (tar -xf …)"),
        (gzip.compress(b"PK\x03\x04"), "is a zip archive inside another file; unpack it first (unzip …)"),
    ],
    ids=["rar", "7z", "tar", "tar.gz", "zip.gz"],
)
def test_archives_to_unpack_first(content, message, tmp_path):
    path = write(tmp_path / "WuDao.bin", content)
    with pytest.raises(UserError) as error:
        read("jsonl", path)
    assert f"{path} {message}" in str(error.value)


def test_folder_with_nothing_but_an_archive_to_unpack(tmp_path):
    write(tmp_path / "WuDao.tar.gz", b"")
    with pytest.raises(UserError, match=r"WuDao.tar.gz has to be unpacked first"):
        read("jsonl", tmp_path)
    write(tmp_path / "x.json", '{"text": "a"}')
    assert read("jsonl", tmp_path) == (["a"], [])


def test_archives_that_are_passed_over_are_named(tmp_path, capsys):
    make_zip(tmp_path / "a.zip", **{"x.jsonl": '{"text": "a"}', "inner.zip": "", "notes.md": ""})
    for name in ("b.rar", "c.7z", "d.tgz", "e.md"):
        write(tmp_path / name, "x")
    assert read("jsonl", tmp_path) == (["a"], [])
    passed = f"{tmp_path}/a.zip!inner.zip, {tmp_path}/b.rar, {tmp_path}/c.7z and 1 more"
    assert capsys.readouterr().out == f"passed over, as they have to be unpacked first: {passed}\n"
    assert read("jsonl", tmp_path / "a.zip") == (["a"], [])
    assert "a.zip!inner.zip\n" in capsys.readouterr().out


def test_links_to_folders_are_followed_once(tmp_path):
    for name in ("data/b/x.txt", "elsewhere/y.txt", "elsewhere/deep/z.txt"):
        write(tmp_path / name, name)
    (tmp_path / "data" / "a").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data" / "c").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "loop").symlink_to(tmp_path / "data")
    corpus = Corpus.from_argument(f"txt={tmp_path / 'data'}", PRETRAINING)
    found = [path.relative_to(tmp_path / "data").as_posix() for path in corpus.files]
    assert found == ["a/deep/z.txt", "a/y.txt", "b/x.txt"] and corpus.identity()["files"] == 3


def test_zstd_without_a_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "zstandard", None)
    monkeypatch.setitem(sys.modules, "compression", None)
    path = write(tmp_path / "x.zst", b"\x28\xb5\x2f\xfd....")
    with pytest.raises(UserError, match=r"x.zst is compressed with zstd, which needs a package: pip install zstandard"):
        read("jsonl", path)


def test_bytes_read_are_those_on_the_disk(tmp_path):
    lines = as_lines({"text": f"{number:07}" * 20} for number in range(20_000))
    for path in (write(tmp_path / "x.jsonl", lines), write(tmp_path / "x.gz", gzip.compress(lines.encode()))):
        corpus, progress = Corpus.from_argument(f"jsonl={path}", PRETRAINING), []
        for _ in corpus.records(progress.append):
            pass
        assert sum(progress) == path.stat().st_size and min(progress) >= 0
        assert max(progress) < path.stat().st_size / 2  # it does move


def test_plain_name():
    assert [plain_name(name) for name in ("a.json.gz", "a.json", "a.gz.json", "x.zst")] == ["a.json", "a.json", "a.gz.json", "x"]


# ----------------------------------------------------------------------------------------------------------------------
# Parquet, and rows of whatever there is


def test_parquet(tmp_path):
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    rows = [{"text": f"春{number}", "turns": [{"role": "user"}], "n": None} for number in range(1000)]
    path = tmp_path / "train-00000.parquet"
    parquet.write_table(arrow.Table.from_pylist(rows), path, row_group_size=300)
    assert values(path, "parquet_rows") == values(path, "rows") == (rows, [])
    corpus, progress = Corpus.from_argument(f"parquet={tmp_path}", PRETRAINING), []
    places = [file.where() for file, _ in corpus.records(progress.append)]
    assert places == [f"{path}:{number}" for number in range(1, 1001)]
    assert sum(progress) == path.stat().st_size and len(progress) > 10
    make_zip(tmp_path / "x.zip", **{path.name: path.read_bytes()})
    assert values(tmp_path / "x.zip", "rows") == (rows, [])
    with pytest.raises(UserError, match=r"is a Parquet file; 'jsonl' reads text"):
        read("jsonl", path)
    write(path, path.read_bytes()[:-9])
    with pytest.raises(UserError, match=r"damaged Parquet file"):
        read("parquet", path)


def test_parquet_without_pyarrow(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    path = write(tmp_path / "x", b"PAR1....\0\0")
    with pytest.raises(UserError, match=r"x is a Parquet file, which needs a package: pip install pyarrow"):
        values(path, "rows")
    with pytest.raises(UserError, match=r"x is no Parquet file"):
        values(write(path, "text"), "parquet_rows")


def test_rows_by_content(tmp_path):
    expected = [{"prompt": "问", "answer": "1"}, {"prompt": "二", "answer": "2"}]
    for content in ("prompt,answer\n问,1\n二,2\n", as_lines(expected), "\ufeff \n" + json.dumps(expected, indent=2)):
        assert values(write(tmp_path / "x", content), "rows") == (expected, [])


# ----------------------------------------------------------------------------------------------------------------------
# NAME:WEIGHT=PATH, identity, strict, start


def test_weight(tmp_path):
    path = write(tmp_path / "x", JSON_LINES)
    corpora = [Corpus.from_argument(f"{name}={path}", PRETRAINING) for name in ("jsonl", "jsonl:0.3", "jsonl:2")]
    assert [corpus.weight for corpus in corpora] == [1.0, 0.3, 2.0]
    for weight in ("0", "-1", "x", "", "nan", "inf"):
        with pytest.raises(UserError, match=r"the weight must be a number above 0, as in jsonl:0.3="):
            Corpus.from_argument(f"jsonl:{weight}={path}", PRETRAINING)


def test_names_and_paths(tmp_path):
    for argument, message in (
        ("chinese-poety=x", "unknown reader 'chinese-poety' in 'chinese-poety=x'; did you mean chinese-poetry?"),
        ("alpaca=x", "alpaca is an instruction reader: use it with `data_process.py sft`"),
        ("nobody=x", "There are txt, "),
        ("novel.txt", "names no reader: write NAME=PATH, for example txt=novel.txt"),
        ("txt=/no/such/file", "/no/such/file does not exist"),
        (f"csv={tmp_path}", f"{tmp_path} holds no file that csv reads (*.csv)"),
    ):
        with pytest.raises(UserError) as error:
            Corpus.from_argument(argument, PRETRAINING)
        assert message in str(error.value)
    for table in (INSTRUCTIONS, PREFERENCES):
        with pytest.raises(UserError, match=r"csv is a pretraining reader: use it with `data_process.py pretrain`"):
            Corpus.from_argument("csv=x", table)


def test_identity(tmp_path):
    write(tmp_path / "a" / "x.jsonl", JSON_LINES)
    archive = make_zip(tmp_path / "a" / "y.zip", **{"1.json": "[1]", "2.json": "[2]"})

    def identity(argument=f"jsonl={tmp_path / 'a'}", **options):
        return Corpus.from_argument(argument, PRETRAINING, **options).identity()

    first = identity()
    assert (first["name"], first["files"], first["weight"]) == ("jsonl", 3, 1.0)
    assert identity() == first and identity(strict=True) == first
    assert identity(f"jsonl:0.5={tmp_path / 'a'}") == {**first, "weight": 0.5}
    (tmp_path / "a").rename(tmp_path / "b")
    assert identity(f"jsonl={tmp_path / 'b'}") == first  # wherever it lies
    make_zip(tmp_path / "b" / archive.name, **{"1.json": "[1]", "2.json": "[3]"})
    assert identity(f"jsonl={tmp_path / 'b'}")["sha256"] != first["sha256"]


def events(path: Path, start=(0, 0)) -> list[tuple]:
    """All that happens, in order: records as (file, count in it, record), skips as (reason, where)."""
    corpus, found, counts = Corpus.from_argument(f"jsonl={path}", PRETRAINING), [], {}
    counts[start[0]] = start[1]
    for file, record in corpus.records(on_skip=lambda *event: found.append(event), start=start):
        counts[file.index] = counts.get(file.index, 0) + 1
        found.append((file.index, counts[file.index], record))
    return found


@pytest.fixture
def three_files(tmp_path) -> Path:
    for number in range(3):
        lines = [json.dumps({"text": f"{number}-{line}"}) if line % 3 else "{bad" for line in range(9)]
        write(tmp_path / "data" / f"{number}.jsonl", "\n".join([*lines, '{"none": 0}']))
    return tmp_path / "data"


def test_start_gives_the_rest_of_the_run(three_files):
    """From behind any record, the rest is what the whole run would have brought from there."""
    whole = events(three_files)
    assert len(whole) == 30
    for at, event in enumerate(whole):
        if isinstance(event[0], int):
            assert events(three_files, start=event[:2]) == whole[at + 1 :]


def test_start_does_not_open_the_files_before(three_files):
    whole = events(three_files)
    corpus = Corpus.from_argument(f"jsonl={three_files}", PRETRAINING)
    (three_files / "0.jsonl").unlink()
    progress = []
    found = [record for _, record in corpus.records(progress.append, start=(1, 2))]
    assert found == [event[2] for event in whole if event[0] in (1, 2)][2:]
    assert sum(progress) == sum(corpus.sizes)  # the progress bar still ends at the end


def test_a_file_without_a_valid_record_is_an_error(tmp_path):
    for reader, content, message in (("lines", b"\xff\xff\n", "0 of the line); {0} has no valid record at all"),
                                     ("jsonl", b"hi\nho\n", "at column 1; {0} has no valid record at all")):  # fmt: skip
        path = write(tmp_path / "x", content)
        with pytest.raises(UserError) as error:
            read(reader, path)
        assert message.format(path) in str(error.value)


def test_a_damaged_file_is_left_out_from_there_on(tmp_path):
    good = json.dumps([{"text": "a"}])
    for number, content in enumerate((good, '[{"text": "b"},\n{"te', good, '{"title": "c"}', "a\0b", '{"text": "d"}')):
        write(tmp_path / "data" / f"{number}.json", content)
    records, skipped = [], []
    corpus = Corpus.from_argument(f"jsonl={tmp_path / 'data'}", PRETRAINING)
    records = [record for _, record in corpus.records(on_skip=lambda *event: skipped.append(event))]
    assert records == ["a", "b", "a", "d"]
    assert {reason for reason, _ in skipped} == {REST}
    for (_, where), words in zip(skipped, ("1.json:2: the JSON array is cut off", "not the layout of 'jsonl'", "4.json is binary")):
        assert words in where
    with pytest.raises(UserError, match=r"1.json:2: the JSON array is cut off"):
        read("jsonl", tmp_path / "data", strict=True)
    (tmp_path / "data" / "0.json").unlink()
    (tmp_path / "data" / "1.json").unlink()
    (tmp_path / "data" / "2.json").unlink()
    assert read("jsonl", tmp_path / "data")[0] == ["d"]  # a bad file may just as well be the first
    (tmp_path / "data" / "5.json").unlink()
    with pytest.raises(UserError, match=r"3.json:1: not the layout of 'jsonl'"):  # none is good: the mistake is the user's
        read("jsonl", tmp_path / "data")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"text": "a"}\n{bad\n', "{0}:2: not valid JSON: Expecting property name enclosed in double quotes at column 2"),
        ('{"text": "a"}\n[1]\n', "{0}:2: not a JSON object"),
        ('{"text": "a"}\n{"x": 1}\n', "{0}:2: without the field text"),
        (b'{"text": "a"}\n{"text": "\xff"}\n', "{0}:2: not UTF-8 (byte 0xff at 10 of the line)"),
        ("", "{0}: empty file"),
    ],
)
def test_strict_stops_at_the_first_bad_record(content, message, tmp_path):
    path = write(tmp_path / "x.jsonl", content)
    with pytest.raises(UserError) as error:
        read("jsonl", path, strict=True)
    assert str(error.value) == message.format(path) + " (without --strict such records are left out and counted)"
    assert read("jsonl", write(path, JSON_LINES), strict=True) == (TEXTS, [])


# ----------------------------------------------------------------------------------------------------------------------
# Files that cannot be read

GOOD = b'{"text": "\xe6\x98\xa5"}\n'
BAD_FILES = {
    # name of the case: (reader, content, what the error says; {0} is the file)
    "binary": ("txt", b"abc\x00def", "{0} is binary (a zero byte at offset 3)"),
    "utf-16": ("txt", "春".encode("utf-16"), "{0} is UTF-16; convert it"),
    "two encodings": ("txt", "第一行字 ok\n".encode() + "春眠".encode("gb18030"), "{0}:2: not UTF-8 (byte 0xb4 at offset 16)"),
    "no line is UTF-8": ("lines", b"\xff\xff\n", "{0}:1: not UTF-8 (byte 0xff at 0 of the line)"),
    "two encodings in an array": ("jsonl", b'[\n{"text": "\xff"}]', "{0}:2: not UTF-8 (byte 0xff at offset 12)"),
    "cut inside a character": ("txt", "春".encode()[:2], "{0}:1: not UTF-8"),
    "array cut off": ("jsonl", b'[\n{"text": "a"},\n{"text": "b', "{0}:3: the JSON array is cut off: the file ends at byte 28"),
    "array cut between": ("jsonl", b'[{"text": "a"},\n', "{0}:2: the JSON array is cut off"),
    "array not JSON": ("jsonl", b'[{"text": "a"},\n{"text" "b"}]', "{0}:2: not valid JSON: Expecting ':' delimiter"),
    "array not JSON early": ("jsonl", b'[{"text": "a"},\n{text: 1},\n' + b" " * 99 + b"]", "{0}:2: not valid JSON"),
    "array without comma": ("jsonl", b'[{"text": "a"}\n{"text": "b"}]', "{0}:2: not valid JSON: expected ']' or a comma"),
    "array nested too deeply": ("jsonl", b'[{"text": "a"},\n' + b"[" * 100_000, "{0}:2: not valid JSON: brackets nested too deeply"),
    "array with a huge number": ("jsonl", b'[{"text": "a"},\n' + b"1" * 5000 + b"]", "{0}:2: not valid JSON: a number of thousands"),
    "array goes on": ("jsonl", b'[{"text": "a"}]\n{"text": "b"}', "{0}:1: text after the end of the JSON array"),
    "no line is JSON": ("jsonl", b"hi\nho\n", "{0}:1: not valid JSON: Expecting value at column 1"),
    "other fields": ("jsonl", b'{"title": "a", "content": "b"}\n',
                     "{0}:1: not the layout of 'jsonl': expected the fields text; found title, content"),
    "other fields in an array": ("jsonl", b'[\n\n{"title": "a"}]', "{0}:3: not the layout of 'jsonl'"),
    "other columns": ("csv", b"title,content\na,b\n", "{0}:2: not the layout of 'csv': expected the fields text; found title"),
    "csv with CR alone": ("csv", b"text\ra\rb\r", "{0}:1: not valid CSV: a carriage return alone does not end a line"),
    "csv cut off": ("csv", b'text\na\n"b\nc', "{0}:3: the file is cut off inside a quoted cell"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_file(case, tmp_path):
    reader, content, message = BAD_FILES[case]
    path = write(tmp_path / "input", content)
    with pytest.raises(UserError) as error:
        read(reader, path, strict=True)
    assert message.format(path) in str(error.value)
    write(path, gzip.compress(content))
    with pytest.raises(UserError) as error:
        read(reader, path, strict=True)
    assert message.format(path) in str(error.value)


def test_text_too_large_for_one_document(tmp_path, monkeypatch):
    monkeypatch.setattr(readers.source, "LARGEST_TEXT", 10)
    path = write(tmp_path / "x.txt", "0123456789")
    assert read("txt", path) == (["0123456789"], [])
    for content in (b"0123456789\n", gzip.compress(b"0123456789\n")):
        with pytest.raises(UserError, match=r"use lines="):
            read("txt", write(path, content))


# ----------------------------------------------------------------------------------------------------------------------
# The real samples, where they are at hand


@pytest.mark.parametrize(
    ("argument", "records", "skipped"),
    [
        ("markdown=pretrain/laws", 171, 0),
        ("txt=pretrain/niutrans-classics", 120, 0),
        ("lines=pretrain/format_samples", 30, 0),
    ],
)
def test_real_samples_in_both_encodings_and_compressed(argument, records, skipped, tmp_path):
    name, _, folder = argument.partition("=")
    if not (SHARED / folder).exists():
        pytest.skip("the real samples are not here")
    found = read(name, SHARED / folder)
    assert (len(found[0]), len(found[1])) == (records, skipped)
    original = Corpus.from_argument(f"{name}={SHARED / folder}", PRETRAINING)
    for path in original.files:
        data = path.read_text(encoding="utf-8-sig").encode("gb18030")
        write(tmp_path / (str(path.relative_to(SHARED / folder)) + ".gz"), gzip.compress(data, 1))
    assert read(name, tmp_path) == found
