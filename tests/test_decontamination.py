"""decontamination.py: a question in a page is found however it is printed; what only resembles it is not."""

from __future__ import annotations

from settings import UserError

import json
import os
import random
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import decontamination
from decontamination import BETWEEN, BLOCK, Finding, Questions, gram_hashes, letters_of, prefix_sums, read_questions
from dedup import normalised

SHARED = Path(os.environ.get("CRIA_SHARED_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))
FILLER = "天地玄黄宇宙洪荒日月盈昃辰宿列张寒来暑往秋收冬藏闰余成岁律吕调阳云腾致雨露结为霜金生丽水玉出昆冈剑号巨阙珠称夜光果珍李柰菜重芥姜"
BRIDGE = "某座拱桥的跨度为二十四米、拱高为八米，则这座拱桥所在圆的半径是____。"
SLEEPERS = "一列货车以每秒十五米的速度通过一条长六百米的隧道\n共用五十秒，求这列货车的车身长度____。"
RIVER = "A ferry needs twelve minutes to cross the river with the current and twenty against it; how wide is the river?"
SHOPS = "Mei sold 17 baskets of pears in the morning and half as many in the afternoon. How many baskets did she sell?"
SHORT, PARTS = "桥梁的主要承重结构是____。", ("桥面铺装与栏杆", "伸缩缝", "主梁或者拱圈", "支座垫石")
PRINTED = SHORT + "".join(f"\n{label}. {part}" for label, part in zip("ABCD", PARTS))
OPTIONS = ("十三米的拱桥半径", "二十六米的拱桥半径", "三十九米的拱桥半径", "五十二米的拱桥半径")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """An evaluation set in each layout."""
    root = tmp_path_factory.mktemp("eval") / "exams"
    for name in ("ceval-exam/val", "cmmlu/test", "mmlu/test", "gsm8k", ".hidden"):
        (root / name).mkdir(parents=True)
    write(root / "ceval-exam/val/bridges_val.csv",
          f'id,question,A,B,C,D,answer\r\n0,{BRIDGE},{",".join(OPTIONS)},A\r\n1,"{SLEEPERS}",1,2,3,4,B\r\n'
          f"2,马有几条腿,1,2,3,4,D\r\n3,{SHORT},{','.join(PARTS)},D\r\n")  # fmt: skip
    write(root / "cmmlu/test/rivers.csv", f"\ufeff,Question,A,B,C,D,Answer\n0,{BRIDGE},1,2,3,4,C\n")
    write(root / "mmlu/test/rivers_test.csv", f'"{RIVER}",50 m,60 m,70 m,80 m,C\n')
    write(root / "gsm8k/test.jsonl", json.dumps({"question": SHOPS, "answer": "#### 25"}) + "\n\n")
    write(root / "gsm8k/scores.jsonl", '{"score": 1}\n')
    write(root / "notes.csv", "name,value\na,1\n")
    return root


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8", newline="")
    return path


@pytest.fixture(scope="module")
def questions(folder) -> Questions:
    return Questions.from_folder(folder)


def page(*parts: str, length: int = 400, seed: int = 0) -> str:
    """The parts, each on lines of its own, between lines of filler."""
    rng = random.Random(seed)
    return "\n".join("".join(rng.choices(FILLER, k=length)) + "\n" + part for part in parts) + "\n" + "".join(rng.choices(FILLER, k=length))


def find(questions: Questions, text: str, **options) -> tuple[str, float] | None:
    """(where, share) of the finding in one text."""
    finding = questions.find_all([text], **options)[0]
    return finding and (finding.where, finding.share)


# ----------------------------------------------------------------------------------------------------------------------
# What is found


def test_the_layouts(questions, folder, capsys):
    # BRIDGE stands twice and counts once; "马有几条腿" is too short.
    assert list(questions.names) == [
        "exams/ceval-exam/val/bridges_val.csv:2", "exams/ceval-exam/val/bridges_val.csv:3",
        "exams/ceval-exam/val/bridges_val.csv:6", "exams/gsm8k/test.jsonl:1", "exams/mmlu/test/rivers_test.csv:1",
    ]  # fmt: skip
    assert {key: questions.identity()[key] for key in ("count", "unused")} == {"count": 5, "unused": 1}
    Questions.from_folder(folder)
    assert capsys.readouterr().out == "--decontaminate: no questions in exams/gsm8k/scores.jsonl, exams/notes.csv\n"
    assert list(read_questions(folder / "cmmlu/test/rivers.csv")) == [(2, BRIDGE)]
    read = dict(read_questions(folder / "ceval-exam/val/bridges_val.csv"))
    assert list(read) == [2, 3, 5, 6] and read[6] == PRINTED  # a row of two lines; a stem that needs its options


@pytest.mark.parametrize(
    ("text", "where"),
    [
        (BRIDGE, "ceval-exam/val/bridges_val.csv:2"),
        (SLEEPERS, "ceval-exam/val/bridges_val.csv:3"),
        (PRINTED, "ceval-exam/val/bridges_val.csv:6"),
        (PRINTED.replace("____。", "（　）").replace(". ", "、").replace("\n", "　"), "ceval-exam/val/bridges_val.csv:6"),
        (RIVER, "mmlu/test/rivers_test.csv:1"),
        (SHOPS, "gsm8k/test.jsonl:1"),
        (SHOPS.upper(), "gsm8k/test.jsonl:1"),
        (RIVER.replace(" ", "\n  ").replace("?", "？"), "mmlu/test/rivers_test.csv:1"),
        (BRIDGE.replace("、", " , ").replace("，", "\n").replace("____。", "（　　）"), "ceval-exam/val/bridges_val.csv:2"),
        (" ".join(SLEEPERS), "ceval-exam/val/bridges_val.csv:3"),
        (BRIDGE.replace("____", "十三米"), "ceval-exam/val/bridges_val.csv:2"),
    ],
)
def test_a_question_in_a_page(questions, text, where):
    """However it is printed, it is found, and its lines go and no others."""
    assert questions.find_all([page(text)]) == [Finding(f"exams/{where}", 1.0, "\n".join(page("x").split("\nx\n")))]


def test_a_short_question_with_its_blank_filled_in(questions):
    """The letter breaks the grams across the blank; most are in the options."""
    where, share = find(questions, page(PRINTED.replace("____", "（C）")))
    assert where == "exams/ceval-exam/val/bridges_val.csv:6" and 0.5 <= share < 1


@pytest.mark.parametrize(
    "text",
    [
        "",
        "。",
        " ".join(OPTIONS),
        "某座石塔的底面周长为二十四米、塔高为八米，则这座石塔所在圆的面积是____。",  # the same template
        "A ferry needs nine litres to cross the lake with a full load and seven without it; how heavy is the load?",
        SHORT,  # of a short question its stem, with an answer, with options in another order, and the options alone
        "桥梁的主要承重结构是主梁或者拱圈。",
        "桥梁的主要承重结构是哪一个？A. 主梁或者拱圈 B. 桥面铺装与栏杆 C. 支座垫石 D. 伸缩缝",
        " ".join(PARTS),
        "拱桥是以拱圈为主要承重结构的桥梁。赵州桥的跨度为三十七米、拱高为七米，桥面铺装与栏杆都是石头的。",
        "桥梁由上部结构、下部结构、支座和附属设施组成，附属设施包括伸缩缝、桥面铺装与栏杆。",
        "一列货车以每秒十五米的速度通过隧道时，司机鸣笛示意；这条隧道是铁路上最长的。",
        "The ferry across the river needs twelve minutes with the current; the river is wide at this place.",
        "In the morning Mei sold pears at the market, and in the afternoon she went home with her baskets.",
        "马有几条腿",
    ],
)
def test_what_only_resembles_a_question(questions, text):
    assert questions.find_all([page(text), text]) == [None, None]


def test_share_of_the_grams(questions):
    letters = normalised(BRIDGE)
    total = len(letters) - 12
    for found in (total // 2, -(-total // 2), total):
        part = letters[: found + 12]
        expected = ("exams/ceval-exam/val/bridges_val.csv:2", found / total)
        assert find(questions, page(part)) == (expected if found / total >= 0.5 else None)
        assert find(questions, page(part), share=0.2) == expected
    assert find(questions, page(letters[:-1]), share=1.0) is None


def test_many_texts_at_once_and_borders(questions):
    cut = len(BRIDGE) // 2
    texts = [page(SHOPS), "", BRIDGE[:cut], BRIDGE[cut:], "a\0b" + page(RIVER), page(), page(SLEEPERS, BRIDGE), RIVER, SHOPS]
    found = questions.find_all(texts)
    assert found == [questions.find_all([text])[0] for text in texts]
    assert [finding and finding.where.rpartition("/")[2] for finding in found] == [
        "test.jsonl:1", None, None, None, "rivers_test.csv:1", None, "bridges_val.csv:2", "rivers_test.csv:1", "test.jsonl:1",
    ]  # fmt: skip
    assert found[-1].share == found[-2].share == 1.0  # also where the text begins with the question
    for start in range(BLOCK - 60, BLOCK + 10, 7):  # over the border of two blocks
        assert find(questions, page("", length=start // 2)[:start] + BRIDGE)[1] == 1.0
    assert questions.find_all([]) == []


def test_the_lines_of_all_questions_go(questions):
    """Also those of a question that is not the best covered one, of each of its copies, and of a part of it."""
    part = BRIDGE[:24]
    text = f"甲\n{BRIDGE}\n\n乙，{SLEEPERS}丙\n𝒂́\n前言。{RIVER.replace(' ', chr(10))} And so on.\n丁\n{part}。\n戊\n{BRIDGE} "
    finding = questions.find_all(["\n\n", text, BRIDGE])[1]
    assert finding == ("exams/ceval-exam/val/bridges_val.csv:2", 1.0, "甲\n\n𝒂́\n丁\n戊")
    sold = "In the morning Mei sold 17 baskets of pears in the morning and half as many."  # too little of SHOPS
    assert questions.find_all([f"{sold}\n{BRIDGE}"])[0].text_without == sold


def test_common_wording_is_left_out(tmp_path):
    stem = "下列关于古代建筑的说法中完全正确的一项是"
    rows = "".join(f"{i},{stem}{i:03}号建筑群里面的第{i}座,1,2,3,4,A\n" for i in range(decontamination.COMMON + 1))
    write(tmp_path / "a.csv", f"id,question,A,B,C,D,answer\n{rows}99,{stem},1,2,3,4,A\n")
    questions = Questions.from_folder(tmp_path)
    assert questions.identity()["count"] == decontamination.COMMON + 1 and questions.unused == 1
    assert find(questions, page(stem)) is None
    assert find(questions, page(f"{stem}007号建筑群里面的第7座")) == (f"{tmp_path.name}/a.csv:9", 1.0)


# ----------------------------------------------------------------------------------------------------------------------
# The index


def test_save_and_load(questions, tmp_path):
    questions.save(tmp_path / "questions.npz")
    loaded = Questions.load(tmp_path / "questions.npz")
    assert loaded.identity() == questions.identity() and loaded.find_all([page(SHOPS)]) == questions.find_all([page(SHOPS)]) != [None]
    assert all(np.array_equal(getattr(loaded, name), getattr(questions, name)) for name in Questions.ARRAYS)


def test_identity_is_of_the_content(folder, questions, tmp_path):
    one = write(tmp_path / "q.jsonl", json.dumps({"question": SHOPS}) + "\n")
    first = Questions.from_folder(tmp_path).identity()
    one.rename(tmp_path / "renamed.jsonl")
    assert Questions.from_folder(tmp_path).identity() == first
    write(tmp_path / "renamed.jsonl", json.dumps({"input": SHOPS.replace("17", "18")}) + "\n")
    assert Questions.from_folder(tmp_path).identity()["sha256"] != first["sha256"]


@given(st.lists(st.text(alphabet="ab1 ，中文_\n\0", max_size=9), max_size=5))
def test_where_the_letters_stand(texts):
    expected, begin = [], 0
    for text in texts:
        expected += [(normalised(char), begin + i) for i, char in enumerate(text) if normalised(char)]
        begin += len(text) + 1
        expected.append((chr(BETWEEN), begin - 1))
    letters, places, _ = letters_of(texts)
    assert [(chr(letter), place) for letter, place in zip(letters, places)] == expected[:-1]


@given(st.text(alphabet="ab1 ，中文_\n", max_size=40), st.integers(1, 6))
def test_grams_are_equal_just_where_their_letters_are(text, n):
    codes, _, starts = letters_of([text])
    letters = normalised(text)
    assert "".join(map(chr, codes)) == letters and BETWEEN not in codes
    before, follows = {}, 0  # what stands before each letter of the text as it was written
    for place, char in enumerate(text):
        if normalised(char):
            before[follows] = text[place - 1] if place else " "
            follows += 1
    expected = [i for i in range(len(letters)) if letters[i] in "中文" or not normalised(before[i]) or before[i] in "中文"]
    assert starts.tolist() == expected
    fitting = [i for i in expected if i + n <= len(letters)]
    hashes = gram_hashes(prefix_sums(codes), starts, n).tolist()
    assert len(hashes) == len(fitting)
    assert len(set(hashes)) == len({letters[i : i + n] for i in fitting})


# ----------------------------------------------------------------------------------------------------------------------
# Mistakes


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "no .csv or .jsonl file"),
        ({"a.csv": "name,value\n1,2\n"}, "no questions in {name}/a.csv;"),
        ({"a.csv": "question,answer\n马有几条腿,四\n"}, "all 1 questions are too short"),
        ({"a.csv": 'question\n一\n"二\n'}, "a.csv:3: cannot be read: unexpected end of data"),
        ({"a.jsonl": '{"question": "一"}\n{"question\n'}, "a.jsonl:2: cannot be read: Invalid control character"),
        ({"a.jsonl": '{"question": "一"}\n' + "[" * 100_000}, "a.jsonl:2: cannot be read: maximum recursion depth"),
        ({"a.jsonl": '{"question": "一"}\n' + "9" * 5000}, "a.jsonl:2: cannot be read: Exceeds the limit"),
        ({"a.jsonl": ""}, "no questions in {folder}/a.jsonl is empty; "),
    ],
)
def test_mistakes_are_named(tmp_path, files, message):
    for name, text in files.items():
        write(tmp_path / name, text)
    with pytest.raises(UserError) as error:
        Questions.from_folder(tmp_path)
    assert message.format(name=tmp_path.name, folder=tmp_path) in str(error.value)


def test_files_that_are_no_evaluation_set(folder, tmp_path, capsys):
    """They are named, first those that cannot be read, and the questions of the others are used."""
    write(tmp_path / "q.csv", f"question\n{BRIDGE}\n{RIVER} {'x' * 200_000}\n")
    write(tmp_path / "empty.csv", "")
    (tmp_path / "folder.csv").mkdir()
    (tmp_path / "gbk.csv").write_bytes("题目\n一\n".encode("gbk"))
    for number in range(5):
        write(tmp_path / f"{number}.csv", "name,value\na,1\n")
    assert Questions.from_folder(tmp_path).identity()["count"] == 2
    out = capsys.readouterr().out
    assert out.startswith(f"--decontaminate: no questions in {tmp_path}/gbk.csv:1: not UTF-8 text")
    assert f", {tmp_path}/empty.csv is empty, {tmp_path.name}/0.csv, {tmp_path.name}/1.csv, {tmp_path.name}/2.csv, and 2 more\n" in out


def test_a_file_instead_of_a_folder(tmp_path):
    with pytest.raises(UserError, match="is no directory"):
        Questions.from_folder(tmp_path / "absent")


# ----------------------------------------------------------------------------------------------------------------------
# The real samples, where they are at hand


def test_the_real_sets():
    if not (SHARED / "eval").is_dir():
        pytest.skip("the real samples are not here")
    exam = Questions.from_folder(SHARED / "eval" / "ceval-exam")
    assert exam.identity()["count"] + exam.unused == 1604 and exam.unused < 40  # 1,661 rows; 57 stand twice, options included
    # Article 265, which a question quotes word for word.
    law = (SHARED / "pretrain/laws/刑法/刑法.md").read_text(encoding="utf-8")
    where, share, rest = exam.find_all([law])[0]
    assert where == "ceval-exam/val/law_val.csv:12" and share < 0.95
    assert "第二百六十五条" in law and "第二百六十五条" not in rest and len(rest) > 0.95 * len(law)
