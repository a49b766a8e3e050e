"""data_report.py: exact output, on a report with everything that could break a table."""

from __future__ import annotations

import settings  # noqa: F401

import copy
import re
from pathlib import Path

import pytest

from data_report import _cut, bars, checked, print_report, report_markdown, source_name
from tables import display_width

POEMS = {
    "name": "chinese-poetry", "path": "诗词", "weight": 2.0, "files": 2, "input_bytes": 1_500_000,
    "encodings": {"gb18030": 1, "utf-8": 1}, "records": 1200, "unreadable": {},
    "dropped": {"too short": {"count": 90, "examples": [{"where": "诗词/宋词.json:3", "text": "春眠|不觉`晓`\n*处处*"}]}},
    "changed": {"spaces": {"count": 7, "examples": []}},
    "duplicates": {"exact": 10, "near": 100, "examples": [
        {"kind": "near", "text": "白日依山尽", "original": "白日依山盡"}, {"kind": "exact", "text": "黄河", "original": "黄河"},
    ]},
    "not_sampled": 0, "kept": 1000, "written": 2000,
}  # fmt: skip
PAGES = {
    "name": "jsonl", "path": "pages", "weight": 1.0, "files": 1, "input_bytes": 2_000_000, "encodings": {}, "records": 400,
    "unreadable": {"not valid JSON": {"count": 2, "examples": [
        {"where": "pages/a.jsonl:7", "text": ""}, {"where": "pages/a.jsonl:9", "text": "\x1b[31m<b>"}]}},
    "dropped": {"evaluation question": {"count": 1, "examples": [{"where": "pages/a.jsonl:8", "text": "问" * 100}]},
                "never": {"count": 0, "examples": []}},
    "changed": {}, "duplicates": {"exact": 0, "near": 0, "examples": []}, "not_sampled": 0, "kept": 397, "written": 397,
}  # fmt: skip
REPORT = {
    "command": "pretrain", "settings": {"val_fraction": 0.1, "sha256": "a" * 200},
    "sources": [POEMS, PAGES],
    "splits": {
        "train": {"documents": 2300, "tokens": 230_000, "bytes": 1_200_000, "characters": 400_000,
                  "sources": [200_000, 30_000]},
        "val": {"documents": 97, "tokens": 9_700, "bytes": 60_000, "characters": 20_000, "sources": [0, 9_700]},
    },
    "lengths": {"unit": "tokens", "edges": [0, 16, 32, 64, 128], "counts": [0, 16, 0, 8, 1]},
    "questions": {"count": 1540, "unused": 55},
}  # fmt: skip


def changed(**values) -> dict:
    return {**copy.deepcopy(REPORT), **values}


TERMINAL = """\
source                 files    MB  records  unreadable  dropped  exact duplicates  near duplicates   kept  written
chinese-poetry:2=诗词      2  1.50    1,200           0       90                10              100  1,000    2,000
jsonl=pages                1  2.00      400           2        1                 0                0    397      397
together                   3  3.50    1,600           2       91                10              100  1,397    2,397

split  documents   tokens  MB of text  characters  characters per token
train      2,300  230,000        1.20     400,000                  1.74
val           97    9,700        0.06      20,000                  2.06

            why                  source                 records         first example
dropped     too short            chinese-poetry:2=诗词       90  7.50%  宋词.json:3 春眠|不觉`晓` *处处*
changed     spaces               chinese-poetry:2=诗词        7  0.58%
dropped     exact duplicate      chinese-poetry:2=诗词       10  0.83%  黄河
dropped     near duplicate       chinese-poetry:2=诗词      100  8.33%  白日依山尽
unreadable  not valid JSON       jsonl=pages                  2  0.50%  a.jsonl:7
dropped     evaluation question  jsonl=pages                  1  0.25%  a.jsonl:8 问问问问问问问问问问问问问问问问问问…

3.5 MB of input, 2.0 s with 2 workers, 1.8 MB/s
the full report: data/pretrain/report.md
"""


def test_the_terminal(capsys):
    print_report(REPORT, Path("data/pretrain"), seconds=2.0, workers=2, resumed=False)
    assert capsys.readouterr().out == TERMINAL


def test_the_terminal_with_nothing_to_tell(capsys):
    """One clean source of instructions: no empty columns, no problems, no sum of one row, no tokens."""
    source = {**PAGES, "unreadable": {}, "dropped": {}, "records": 397}
    train = {"documents": 397, "bytes": 1_000_000, "characters": 300_000, "sources": [397]}
    report = changed(command="sft", sources=[source], splits={"train": train}, questions=None)
    print_report(report, Path("data/sft"), seconds=2.0, workers=1, resumed=True)
    assert capsys.readouterr().out == """\
source       files    MB  records  kept
jsonl=pages      1  2.00      397   397

split  conversations  MB of text  characters
train            397        1.00     300,000

2.0 MB of input, 2.0 s with 1 worker; it went on with an earlier run
the full report: data/sft/report.md
"""


def section(text: str, title: str) -> str:
    return text.partition(f"## {title}\n\n")[2].partition("\n\n## ")[0].rstrip()


def test_the_markdown():
    text = report_markdown(REPORT)
    assert text.startswith("# What `data_process.py pretrain` made of 3.5 MB of input\n\n## ")
    assert [line[3:] for line in text.splitlines() if line.startswith("## ")] == [
        "What was written", "What happened to the records", "Encodings other than UTF-8", "Unreadable records", "Dropped records",
        "Mended records", "Duplicates", "Questions of the evaluation set", "Lengths in tokens", "Sources of train, by tokens",
        "Settings",
    ]  # fmt: skip
    full = "█" * 40
    assert section(text, "Encodings other than UTF-8") == (
        "| source                | encoding | files |\n"
        "| --------------------- | -------- | ----: |\n"
        "| chinese-poetry:2=诗词 | gb18030  |     1 |"
    )
    assert section(text, "Unreadable records") == (
        "| why            | source      | records | share | where           | text        |\n"
        "| -------------- | ----------- | ------: | ----: | --------------- | ----------- |\n"
        "| not valid JSON | jsonl=pages |       2 | 0.50% | pages/a.jsonl:7 |             |\n"
        "|                |             |         |       | pages/a.jsonl:9 | �\\[31m\\<b\\> |"
    )
    dropped = section(text, "Dropped records").split("\n")
    assert dropped[:4] == [
        "```text", f"too short            {full}  90   98.90%", f"evaluation question  ▌{' ' * 39}   1    1.10%", "```"
    ]  # fmt: skip
    assert "春眠\\|不觉\\`晓\\` \\*处处\\*" in dropped[7] and "问" * 39 + "… |" in dropped[8] and len(dropped) == 9
    assert section(text, "Lengths in tokens") == (
        f"```text\n16 – 31   {full}  16   64.00%\n32 – 63   {' ' * 40}   0    0.00%\n"
        f"64 – 127  {'█' * 20}{' ' * 20}   8   32.00%\n128 –     ██▌{' ' * 37}   1    4.00%\n```"
    )
    assert section(text, "Questions of the evaluation set") == (
        "1,540 questions were looked for, and found in 1 records: 1 were dropped, 0 go on without the lines that held them. "
        "55 more are too short or too common to be recognised."
    )
    assert section(text, "Settings") == '```json\n{\n  "val_fraction": 0.1,\n  "sha256": "' + "a" * 99 + '…"\n}\n```'


@pytest.mark.parametrize("nasty", ["a|b", "a\\|b", "| --- |", "一\n二\r\n三", "```", "\u2028", "\ud800", "\0", "``` | \n|"])
def test_no_text_breaks_a_table(nasty):
    rule = {"count": 3, "examples": [{"where": nasty, "text": nasty}]}
    source = {**PAGES, "path": nasty, "unreadable": {}, "dropped": {nasty: rule}}
    source["duplicates"] = {"exact": 1, "near": 0, "examples": [{"kind": "exact", "text": nasty, "original": nasty}]}
    text = report_markdown(changed(sources=[source, PAGES], settings={nasty: nasty}))
    text.encode("utf-8")
    text = re.sub(r"^```(text|json)\n.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)
    tables = [line for line in text.split("\n") if line.startswith("|")]
    cells = {len(line.replace("\\\\", "").replace("\\|", "").split("|")) - 2 for line in tables}
    assert cells == {4, 6, 8} and len(tables) == 20  # with the number of columns of each of the five tables


def test_accounts():
    assert checked(REPORT) is REPORT
    for place in ("records", "kept", "not_sampled", "written"):
        wrong = changed()
        wrong["sources"][1][place] += 1
        with pytest.raises(AssertionError):
            checked(wrong)
    wrong["sources"][1]["written"] -= 1
    wrong["sources"][1]["duplicates"]["near"] += 1
    with pytest.raises(AssertionError) as error:
        checked(wrong)
    assert str(error.value) == (
        "jsonl=pages: 400 records, but 2 unreadable + 1 dropped + 0 exact duplicates + 1 near duplicates + 0 not sampled "
        "+ 397 kept = 401"
    )


def test_cut_and_bars():
    assert _cut("  春 \n\t眠 ", 10) == "春 眠" and _cut("春眠不觉晓", 10) == "春眠不觉晓" and _cut("春眠不觉晓", 9) == "春眠不觉…"
    assert _cut("春眠不觉晓", 8) == "春眠不…" and _cut("abcdefgh", 4) == "abc…"
    assert bars([("诗", 8), ("ab", 0), ("c", 1)]) == [
        f"诗  {'█' * 40}  8   88.89%", f"ab  {' ' * 40}  0    0.00%", f"c   {'█' * 5}{' ' * 35}  1   11.11%"
    ]  # fmt: skip
    assert len({display_width(line) for line in bars([("一二三", 5), ("x", 3)])}) == 1
    assert source_name(POEMS) == "chinese-poetry:2=诗词" and source_name({**POEMS, "weight": 0.25}) == "chinese-poetry:0.25=诗词"
