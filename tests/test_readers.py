"""readers/: every layout on a small fixture with its quirks, what is left out and why, and the real samples."""

from __future__ import annotations

from settings import UserError

import csv
import datetime
import json
import os
from collections import Counter
from pathlib import Path

import pytest

from readers import INSTRUCTIONS, PREFERENCES, PRETRAINING, Corpus, tidy
from readers.instructions import tidy_conversation
from readers.preferences import tidy_preference

SHARED = Path(os.environ.get("CRIA_SHARED_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))
TABLES = {"pretrain": PRETRAINING, "sft": INSTRUCTIONS, "preferences": PREFERENCES}


def read(name: str, path: Path, table=PRETRAINING) -> tuple[list, dict[str, int]]:
    """-> (what the reader yields, how many records it left out by reason)"""
    skipped: Counter = Counter()
    corpus = Corpus.from_argument(f"{name}={path}", table)
    records = corpus.records(on_skip=lambda reason, where, *more: skipped.update([reason]))
    return [record for _, record in records], dict(skipped)


def read_json(name: str, tmp_path: Path, records: list, table=PRETRAINING, file: str = "x.jsonl"):
    return read(name, write_lines(tmp_path / file, records), table)


def write_lines(path: Path, records: list) -> Path:
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
    return path


def write_array(path: Path, records: list) -> Path:
    path.write_text(json.dumps(records, ensure_ascii=False, indent=2), encoding="utf-8")
    return path


def write_parquet(path: Path, columns: dict) -> Path:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.table(columns), path)
    return path


def turns(*contents: str) -> list[dict]:
    return [{"role": ("user", "assistant")[at % 2], "content": content} for at, content in enumerate(contents)]


SYSTEM = [{"role": "system", "content": "你是助手"}]

# ----------------------------------------------------------------------------------------------------------------------
# Pretraining


def test_txt_and_markdown(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "two.txt").write_bytes("第二\r\n篇\r\n".encode("utf-8-sig"))
    (tmp_path / "a.md").write_text("---\ntitle: x\n---\n# 题\n\n文", encoding="utf-8")
    (tmp_path / "c.md").write_text("---\nbookCollapseSection: true\n---\n", encoding="utf-8")
    (tmp_path / "d.md").write_text("一\n---\n二\n---\n三", encoding="utf-8")  # rules, not a header
    (tmp_path / ".hidden.txt").write_text("no")
    (tmp_path / "e.csv").write_text("no")
    (tmp_path / "f.md").write_text("---\n第一段正文。\n\n---\n第二段", encoding="utf-8")
    pages = ["\n# 题\n\n文", "\n", "一\n---\n二\n---\n三", "---\n第一段正文。\n\n---\n第二段"]
    found, skipped = read("txt", tmp_path)
    assert [tidy(text) for text in found] == ["# 题\n\n文", "第二\n篇", "", *pages[2:]] and not skipped
    assert [tidy(text) for text in read("markdown", tmp_path)[0]] == [tidy(page) for page in pages]


def test_lines(tmp_path):
    (tmp_path / "x.txt").write_text("一\n\n二二\n 三\u2028四 \n", encoding="utf-8")
    assert read("lines", tmp_path)[0] == ["一\n", "二二\n", " 三\u2028四 \n"]


@pytest.mark.parametrize("name", ["jsonl", "c4", "medical-encyclopedia", "medical-book"])
def test_the_field_text(name, tmp_path):
    file = {"medical-encyclopedia": "train_encyclopedia.json", "medical-book": "medical_book_zh.json"}.get(
        name, "x.json"
    )
    records = [{"text": "一\n二", "url": "http://x"}, {"text": None}, {"other": 1}, 7, {"text": "三"}]
    (tmp_path / "notes.md").write_text("not one of its files")
    write_lines(tmp_path / file, records)
    expected = ["一\n二", None, "三"], {"without the field text": 1, "not a JSON object": 1}
    assert read(name, tmp_path) == expected
    write_array(tmp_path / file, records)
    assert read(name, tmp_path) == expected


def test_csv(tmp_path):
    rows = 'id,text\r\n1,NA\r\n2,"两\r\n行, ""引号"""\r\n3,null\r\n4,\r\n5,"x" y\r\n6,好\r\n'
    (tmp_path / "x.csv").write_bytes(rows.encode("utf-8-sig"))
    found, skipped = read("csv", tmp_path)
    assert [tidy(text) for text in found] == ["NA", '两\n行, "引号"', "null", "", "好"]
    assert skipped == {"not valid CSV": 1}


def test_parquet(tmp_path):
    write_parquet(tmp_path / "x.parquet", {"text": ["一", None, "NA"], "id": [1, 2, 3]})
    assert read("parquet", tmp_path) == (["一", None, "NA"], {})
    write_parquet(tmp_path / "x.parquet", {"content": ["一"]})
    with pytest.raises(UserError, match="expected the fields text; found content"):
        read("parquet", tmp_path)
    columns = {"text": [b"\xe4\xb8\x80", None], "at": [datetime.date(2024, 1, 1)] * 2}
    write_parquet(tmp_path / "x.parquet", columns)
    assert read("parquet", tmp_path) == ([None], {"not a text": 1})
    write_parquet(tmp_path / "x.parquet", {"prompt": ["问"], "answer": columns["at"][:1]})
    assert read("prompt-answer", tmp_path, INSTRUCTIONS) == ([], {"not a text": 1})


def test_wikipedia_cn(tmp_path):
    records = [{"completion": "昭通机场\n* 在云南", "source": "wikipedia.zh2307"}, {"completion": "二", "source": "x"}]
    write_array(tmp_path / "wikipedia-cn-20230720-filtered.json", records)
    assert read("wikipedia-cn", tmp_path) == (["昭通机场\n* 在云南", "二"], {})


@pytest.mark.parametrize(
    ("article", "expected"),
    [
        (
            {"title": "桂花", "summary": "木犀属植物[1]。", "sections": [{"title": "形态", "content": "高三米。"}]},
            "桂花：木犀属植物[1]。\n形态：高三米。",
        ),
        ({"title": "桂花", "summary": "桂花是植物。", "sections": []}, "桂花是植物。"),
        (
            {"title": "桂花", "summary": None, "sections": [{"title": "形态", "content": "高三米"}]},
            "桂花\n形态：高三米",
        ),
        ({"title": "桂花", "summary": "", "sections": None}, "桂花"),
        ({"title": "桂花", "sections": []}, "桂花"),
        (
            {
                "title": "A",
                "summary": " A，甲。\r\n乙。\n",
                "sections": [{"title": None, "content": "丙。"}, {"title": "丁"}],
            },
            "A，甲。\n乙。\n丙。",
        ),
        ({"title": "A", "summary": "甲", "sections": [{"title": "史", "content": "史上有"}, "x"]}, "A：甲\n史上有"),
    ],
)
def test_baidubaike(article, expected, tmp_path):
    found, skipped = read_json(
        "baidubaike", tmp_path, [{**article, "tags": ["x"], "url": "u"}], file="563w_baidubaike.json"
    )
    assert (found, skipped) == ([expected], {})
    assert "。。" not in expected


def test_wudao(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "readme.json").write_text("{}")
    page = {"id": 1, "uniqueKey": "k", "titleUkey": "t", "dataType": "科技", "title": "题", "content": " 文\r\n章 "}
    write_array(tmp_path / "a" / "part-02.json", [page, {**page, "content": "题：文"}])
    write_array(tmp_path / "part-1.json", [{**page, "title": None}, {**page, "title": " "}])
    assert read("wudao", tmp_path) == (["题\n文\n章", "题：文", "文\n章", "文\n章"], {})


ENGLISH = "If you are a doctor, please answer the medical questions based on the patient's description."
MEDICAL = [
    {"instruction": "血热的临床表现?", "input": "", "output": "发热。"},
    {"instruction": "头痛", "input": "三天了", "output": "休息。"},
    {"instruction": ENGLISH, "input": "I cough.", "output": "Drink."},
]


def test_medical_qa_and_medical(tmp_path):
    (tmp_path / "finetune").mkdir()
    (tmp_path / "pretrain").mkdir()
    write_lines(tmp_path / "finetune" / "train_zh_0.json", MEDICAL[:2])
    write_lines(tmp_path / "finetune" / "train_en_1.json", MEDICAL[2:])
    write_lines(tmp_path / "finetune" / "test_zh_0.json", [{"instruction": "考", "input": "", "output": "题"}])
    write_lines(tmp_path / "pretrain" / "train_encyclopedia.json", [{"text": "百科"}])
    texts = ["I cough.\nDrink.", "血热的临床表现?\n发热。", "头痛\n三天了\n休息。"]
    assert read("medical-qa", tmp_path) == (texts, {})
    chats = [turns("I cough.", "Drink."), turns("血热的临床表现?", "发热。"), turns("头痛\n三天了", "休息。")]
    assert read("medical", tmp_path, INSTRUCTIONS) == (chats, {})
    assert read("medical-encyclopedia", tmp_path) == (["百科"], {})


ROLE_TEXT = [
    [{"role": "user", "text": "问"}, {"role": "assistant", "text": "答"}],
    [{"text": "一段文字"}],
    [{"role": "user", "text": "又一段"}],
    [],
    {"no": "list"},
]


def test_role_text(tmp_path):
    path = write_lines(tmp_path / "train.jsonl", ROLE_TEXT)
    missing = {"without the field text": 2}
    plain, dialogue = "a plain text, not a dialogue (pretrain reads it)", "a dialogue, not a plain text (sft reads it)"
    assert read("role-text", path, INSTRUCTIONS) == ([turns("问", "答")], {**missing, plain: 2})
    assert read("role-text", path) == (["一段文字", "又一段"], {**missing, dialogue: 1})
    write_lines(path, ROLE_TEXT[:1])  # one line alone is one record too
    assert read("role-text", path, INSTRUCTIONS) == ([turns("问", "答")], {})
    write_lines(path, [ROLE_TEXT[:2]])  # unless it is an array of records
    assert read("role-text", path, INSTRUCTIONS) == ([turns("问", "答")], {plain: 1})


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
def test_chinese_poetry(name, tmp_path):
    content, expected = POEMS[name]
    path = tmp_path / name
    path.parent.mkdir()
    text = json.dumps(content, ensure_ascii=False, indent=4)
    path.write_bytes(text.replace("\n", "\r\n").encode("utf-8") if "论语" in name else text.encode("utf-8"))
    assert read("chinese-poetry", tmp_path)[0] == expected


# ----------------------------------------------------------------------------------------------------------------------
# Instructions

ALPACA = [
    {"instruction": "翻译\n", "input": " 你好 ", "output": "hello"},
    {"instruction": "问", "input": None, "output": "NA"},
    {"instruction": "反转", "input": "输入：\n甲乙", "output": "输出: 乙甲"},
    {"instruction": "分类", "input": "输入:苹果", "output": "水果"},
    {"instruction": "输入：一段话", "input": "", "output": "结果的输出：无"},
    {"instruction": "把下面的数加一", "input": 41, "output": 42},
    {"instruction": "三", "output": "答", "history": [["一", "1"], ["二", "2"]], "system": "你是助手"},
]
ALPACA_TURNS = [
    turns("翻译\n你好", "hello"),
    turns("问", "NA"),
    turns("反转\n甲乙", "乙甲"),
    turns("分类\n苹果", "水果"),
    turns("输入：一段话", "结果的输出：无"),
    turns("把下面的数加一\n41", "42"),
    [*SYSTEM, *turns("一", "1", "二", "2", "三", "答")],
]


def test_alpaca(tmp_path):
    assert read("alpaca", write_array(tmp_path / "x.json", ALPACA), INSTRUCTIONS) == (ALPACA_TURNS, {})
    assert read("alpaca", write_lines(tmp_path / "x.json", ALPACA), INSTRUCTIONS) == (ALPACA_TURNS, {})


def test_alpaca_parquet_has_a_column_text_that_is_not_used(tmp_path):
    columns = {"instruction": ["Add", "Say"], "input": ["1, 2", ""], "output": ["3", "null"], "text": ["Below is", "B"]}
    path = write_parquet(tmp_path / "train-00000.parquet", columns)
    assert read("alpaca", path, INSTRUCTIONS) == ([turns("Add\n1, 2", "3"), turns("Say", "null")], {})


def test_oasst(tmp_path):
    records = [
        {"instruction": "一", "input": "", "output": "1", "history": []},
        {"instruction": "二", "input": "", "output": "2", "history": [["一", "1"]]},
    ]
    expected = [turns("一", "1"), turns("一", "1", "二", "2")], {}
    assert read("oasst", write_array(tmp_path / "x.json", records), INSTRUCTIONS) == expected


def test_belle_in_all_its_namings(tmp_path):
    records = [
        {"instruction": "写同义句。\nHi.\n", "input": "", "output": "\nHello."},
        {"input": "0.5M 的问\n", "target": "答"},
        {
            "id": "seed_task_1",
            "instruction": "写诗",
            "instances": [{"input": "夏", "output": "诗一"}, {"input": "冬", "output": "诗二"}],
        },
        {"instruction": "没有答案"},
    ]
    found, skipped = read_json("belle", tmp_path, records, INSTRUCTIONS, "Belle_open_source_1M.json")
    expected = [
        turns("写同义句。\nHi.", "\nHello."),
        turns("0.5M 的问", "答"),
        turns("写诗\n夏", "诗一"),
        turns("写诗\n冬", "诗二"),
    ]
    assert found == expected and skipped == {"without the field output": 1}


def test_chatmed(tmp_path):
    record = {"query": "牙痛", "response": "1. 刷牙\n2. 就医"}
    assert read_json("chatmed", tmp_path, [record], INSTRUCTIONS) == ([turns("牙痛", "1. 刷牙\n2. 就医")], {})


def test_prompt_answer(tmp_path):
    rows = [("钠的符号", "NA"), ("空值", "null"), ("没有", "None"), ('两\r\n行,"引"', "1,5")]
    with open(tmp_path / "sft_data.csv", "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("prompt", "answer"), *rows])
    expected = [turns(prompt, answer) for prompt, answer in rows]
    assert read("prompt-answer", tmp_path, INSTRUCTIONS) == (expected, {})
    assert [tidy_conversation(messages)[0] for messages in expected[:3]] == expected[:3]  # the words are answers


def test_prompt_answer_parquet(tmp_path):
    path = write_parquet(tmp_path / "x.parquet", {"prompt": ["问\n", "NA"], "response": ["答", None]})
    assert read("prompt-answer", path, INSTRUCTIONS) == ([turns("问\n", "答"), turns("NA", None)], {})
    assert tidy_conversation(turns("NA", None)) == ([], "empty answer")


def test_messages(tmp_path):
    records = [
        {"messages": turns("问", "答")},
        {"conversations": [{"from": "human", "value": "问"}, {"from": "gpt", "value": "答"}], "system": "你是助手"},
        {"conversations": [{"role": "user", "content": "问"}, {"role": "assistant", "content": "答", "tools": None}]},
        {"messages": "not a list"},
        {"messages": None},
        {"messages": [*turns("几点"), {"role": "tool", "content": "12:00"}, {"role": "assistant", "content": "中午"}]},
    ]
    found, skipped = read_json("messages", tmp_path, records, INSTRUCTIONS)
    assert found == [turns("问", "答"), [*SYSTEM, *turns("问", "答")], turns("问", "答"), [], []]
    assert skipped == {"calls a tool": 1}


def test_sharegpt(tmp_path):
    human, gpt = {"from": "human", "value": "问"}, {"from": "gpt", "value": "答"}
    records = [
        {"id": "x", "conversations": [{"from": "system", "value": "你是助手"}, human, gpt]},
        {"conversations": [human, gpt, human], "system": "", "tools": "[]"},
        {
            "conversations": [
                human,
                {"from": "function_call", "value": "{}"},
                {"from": "observation", "value": "1"},
                gpt,
            ]
        },
    ]
    found, skipped = read_json("sharegpt", tmp_path, records, INSTRUCTIONS)
    assert found == [[*SYSTEM, *turns("问", "答")], turns("问", "答", "问")] and skipped == {"calls a tool": 1}
    assert tidy_conversation(found[1]) == (turns("问", "答"), "last question without an answer")


def test_minimind(tmp_path):
    answer = {"role": "assistant", "content": "答", "reasoning_content": "想"}
    call = {"role": "assistant", "content": "", "tool_calls": '[{"name": "clock"}]'}
    records = [
        {"conversations": [{"role": "system", "content": "你是助手", "tools": "[]"}, *turns("问"), answer]},
        {"conversations": [*turns("问"), {**answer, "tool_calls": ""}]},
        {"conversations": [*turns("几点"), call, {"role": "tool", "content": "12:00"}, answer]},
        {"conversations": [*turns("几点"), call]},
    ]
    write_lines(tmp_path / "pretrain_t2t_mini.jsonl", [{"text": "不是对话"}])
    found, skipped = read_json("minimind", tmp_path, records, INSTRUCTIONS, "sft_mini_512.jsonl")
    assert (found, skipped) == ([[*SYSTEM, *turns("问", "答")], turns("问", "答")], {"calls a tool": 2})
    assert read("minimind", tmp_path, INSTRUCTIONS) == (found, skipped)  # of the folder only its own files


def test_disc_med(tmp_path):
    records = [
        {"_id": "01", "source": "meddial", "conversation": turns("痛", "查")},
        {"conversation": turns("痛", "查", "谢")},
    ]
    assert read_json("disc-med", tmp_path, records, INSTRUCTIONS) == ([turns("痛", "查"), turns("痛", "查", "谢")], {})


def test_huatuogpt(tmp_path):
    records = [
        {"data": ["问：咳嗽\n三天", "答：喝水：多喝", "问:还有呢", "答: 休息"]},
        {"data": ["问：咳嗽", "答：喝水", "问：谢谢"]},
        {"data": ["答案是什么", "问题在此"]},  # no marks: the turns alternate, and the texts stay whole
        {"data": None},
        {"data": ["问：一", None]},
    ]
    found, skipped = read_json("huatuogpt", tmp_path, records, INSTRUCTIONS)
    assert found[0] == turns("咳嗽\n三天", "喝水：多喝", "还有呢", " 休息")
    assert [tidy_conversation(messages) for messages in found[1:]] == [
        (turns("咳嗽", "喝水"), "last question without an answer"),
        (turns("答案是什么", "问题在此"), ""),
        ([], "no assistant turn"),
        ([], "empty answer"),
    ]
    assert not skipped


def moss_turn(number: int, command: str = "None") -> dict:
    return {
        "Human": f"<|Human|>: 问{number}<eoh>\n",
        "Inner Thoughts": "<|Inner Thoughts|>: 想<eot>\n",
        "Commands": f"<|Commands|>: {command}<eoc>\n",
        "Tool Responses": "<|Results|>:\nSECRET<eor>\n",
        "MOSS": f"<|MOSS|>: 答{number}\n用 <|1|> 标记<eom>\n",
    }


def test_moss(tmp_path):
    order = [1, 10, 11, 2, 3, 4, 5, 6, 7, 8, 9]  # as a dict sorted by its keys has them
    chat = {f"turn_{number}": moss_turn(number) for number in order}
    record = {
        "conversation_id": "1",
        "meta_instruction": "你是助手\n",
        "num_turns": 11,
        "chat": chat,
        "category": "code",
    }
    (tmp_path / "conversation_1.json").write_text(json.dumps(record, indent=2), encoding="utf-8")
    with_tool = {"turn_1": moss_turn(1), "turn_2": moss_turn(2, 'Search("x")')}
    unmarked = {"turn_1": {"Human": "问", "MOSS": "答"}}
    records = [{**record, "chat": with_tool}, {"conversation_id": 2, "chat": unmarked}, {"chat": None}]
    write_lines(tmp_path / "more.jsonl", records)
    found, skipped = read("moss", tmp_path, INSTRUCTIONS)
    texts = [text for number in range(1, 12) for text in (f"问{number}", f"答{number}\n用 <|1|> 标记")]
    system = [{"role": "system", "content": "你是助手\n"}]
    assert found == [[*system, *turns(*texts)], turns("问", "答"), []] and skipped == {"calls a tool": 1}


@pytest.mark.parametrize(
    ("messages", "kept", "problem"),
    [
        (turns(" 问\r\n ", "答\n"), turns("问", "答"), ""),
        (turns("问", "答", "再问"), turns("问", "答"), "last question without an answer"),
        (turns("问", "答", "再问", " "), turns("问", "答"), "empty answer"),
        (turns("问", "答", "", "答"), turns("问", "答"), "empty question"),
        (turns("问", None), [], "empty answer"),
        (turns(41, 0), turns("41", "0"), ""),
        (turns("问", 0.5), turns("问", "0.5"), ""),
        (turns("问", True), [], "empty answer"),
        (turns("问", float("nan")), [], "empty answer"),
        (turns([{"type": "text", "text": "问"}], "答"), [], "empty question"),
        ([{"role": "user"}, *turns("问", "答")[1:]], [], "empty question"),
        ([{"content": "问"}], [], "a role other than system, user, assistant"),
        ([{"role": ["user"], "content": "问"}], [], "a role other than system, user, assistant"),
        (turns("", "答"), [], "empty question"),
        (turns("问"), [], "no assistant turn"),
        ([], [], "no assistant turn"),
        (turns("a", "b", "c")[1:] + turns("d")[:1], [], "roles out of order"),
        (turns("a", "b", "c", "d")[1:], turns("c", "d"), "began with an answer"),
        (turns("a", "b") + turns("c", "d")[1:], turns("a", "b"), "roles out of order"),
        ([*turns("a", "b"), *SYSTEM, *turns("c", "d")], turns("a", "b"), "roles out of order"),
        ([*SYSTEM, *turns("问", "答")], [*SYSTEM, *turns("问", "答")], ""),
        ([*SYSTEM, *turns("问", "答")[1:]], [], "roles out of order"),
        ([{"role": "system", "content": ""}, *turns("问", "答")], turns("问", "答"), ""),
        ([*turns("问", "答"), {"role": "tool", "content": "x"}], [], "a role other than system, user, assistant"),
    ],
)
def test_tidy_conversation(messages, kept, problem):
    assert tidy_conversation(messages) == (kept, problem)


# ----------------------------------------------------------------------------------------------------------------------
# Preferences


def pair(prompt: list[dict], chosen: str = "好", rejected: str = "坏") -> dict:
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


HUMAN = {"from": "human", "value": "问"}
ANSWERS = {"chosen": "好", "rejected": "坏"}


@pytest.mark.parametrize(
    ("name", "record", "expected"),
    [
        ("alpaca", {"instruction": "问", "input": "", **ANSWERS}, pair(turns("问"))),
        (
            "alpaca",
            {"instruction": "二", "input": "3", "history": [["一", "1"]], **ANSWERS},
            pair(turns("一", "1", "二\n3")),
        ),
        ("sharegpt", {"conversations": [HUMAN], **ANSWERS}, pair(turns("问"))),
        (
            "sharegpt",
            {
                "conversations": [{"from": "system", "value": "你是助手"}, HUMAN],
                "chosen": {"from": "gpt", "value": "好\n"},
                "rejected": {"role": "assistant", "content": "坏"},
            },
            pair([*SYSTEM, *turns("问")]),
        ),
        ("medical", {"question": "问", "response_chosen": "好", "response_rejected": "坏"}, pair(turns("问"))),
        (
            "oasst",
            {"instruction": "二", "input": "", "output": ["好", "中", "差", "坏"], "history": [["一", "1"]]},
            pair(turns("一", "1", "二")),
        ),
        ("oasst", {"instruction": "问", "output": ["只有一个"]}, "fewer than two answers"),
        ("oasst", {"instruction": "问", "output": "好"}, "fewer than two answers"),
        (
            "minimind",
            {"chosen": turns("一", "1", "二", "好"), "rejected": turns("一", "1", "二", "坏")},
            pair(turns("一", "1", "二")),
        ),
        (
            "minimind",
            {"chosen": turns("一", "好"), "rejected": turns("二", "坏")},
            "the two dialogues differ before the last answer",
        ),
        ("messages", pair([*SYSTEM, *turns("问")]), pair([*SYSTEM, *turns("问")])),
        ("messages", pair("问", turns("问", "好")[1:], turns("问", "坏")[1:]), pair(turns("问"))),
        ("textbook", pair(turns("问")), pair(turns("问"))),
    ],
)
def test_preferences(name, record, expected, tmp_path):
    file = "dpo.jsonl"
    if isinstance(expected, str):
        assert read_json(name, tmp_path, [record], PREFERENCES, file) == ([], {expected: 1})
    else:
        assert read_json(name, tmp_path, [record], PREFERENCES, file) == ([expected], {})
        assert tidy_preference(expected) == (expected, "")


@pytest.mark.parametrize(
    ("record", "problem"),
    [
        (pair(turns("问"), "好", " 好\r\n"), "chosen and rejected are the same"),
        (pair(turns("问"), ""), "empty chosen answer"),
        (pair(turns("问"), None), "empty chosen answer"),
        (pair(turns("问"), rejected=" \n"), "empty rejected answer"),
        (pair([]), "the prompt does not end on a question"),
        (pair(SYSTEM), "the prompt does not end on a question"),
        (pair(turns("问", "答")), "the prompt does not end on a question"),
        (pair([{"content": "问"}]), "the prompt does not end on a question"),
        (pair(turns("")), "prompt: empty question"),
        (pair(turns("一", "", "二")), "prompt: empty answer"),
        (pair(turns("零", "一", "二")[1:]), "prompt: began with an answer"),
        (pair(turns("一") + turns("二")), "prompt: roles out of order"),
        (pair([{"role": "tool", "content": "1"}, *turns("问")]), "prompt: a role other than system, user, assistant"),
    ],
)
def test_tidy_preference_says_what_is_wrong(record, problem):
    assert tidy_preference(record) == (None, problem)


def test_tidy_preference_tidies_all_texts():
    record = pair([*SYSTEM, *turns(" 一\r\n", "1 ", "二\n")], " 好\n", "\r\n坏")
    assert tidy_preference(record) == (pair([*SYSTEM, *turns("一", "1", "二")]), "")


# ----------------------------------------------------------------------------------------------------------------------
# What holds for every reader


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, table in TABLES.items() for name in table])
def test_every_reader_is_described_and_refuses_another_layout(kind, name, tmp_path):
    reader = TABLES[kind][name]
    assert reader.layout and len(reader.layout) <= 125 and reader.source and reader.files
    for download in reader.downloads:
        assert download.path and "/" not in download.path and len(download.urls) == 2
        hubs = ["https://huggingface.co", "https://hf-mirror.com"]
        assert [url.partition("/datasets/")[0] for url in download.urls] == hubs
        assert all(url.endswith(f"/{download.path}") and "/resolve/main/" in url for url in download.urls)
    if (kind, name) in {
        ("pretrain", "txt"),
        ("pretrain", "lines"),
        ("pretrain", "markdown"),
        ("pretrain", "chinese-poetry"),
    }:
        return  # these read any text, or pass over what is no poem
    path = write_parquet(tmp_path / "x", {"foo": [1]}) if name == "parquet" else tmp_path / "x"
    if name == "csv":
        path.write_text("foo\n1\n")
    elif name != "parquet":
        write_lines(path, [{"foo": 1}, {"foo": 2}])
    with pytest.raises(UserError, match=f"not the layout of '{name}': expected the fields .*; found foo"):
        read(name, path, TABLES[kind])


def texts_in(value) -> list:
    """All leaves of nested dicts, lists and tuples; None (no preference pair) is no leaf."""
    if isinstance(value, (dict, list, tuple)):
        return [text for part in (value.values() if isinstance(value, dict) else value) for text in texts_in(part)]
    return [] if value is None else [value]


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, table in TABLES.items() for name in table])
def test_no_reader_falls_over_odd_values(kind, name, tmp_path):
    """The fields are those of the layout, but hold something else: a record is left out or yielded, never a crash."""
    if name in ("txt", "lines", "markdown", "csv", "parquet"):
        return
    fields = """text title completion summary sections content instruction input output history system target instances
        query response prompt answer messages conversations conversation data chat meta_instruction question chosen
        rejected response_chosen response_rejected paragraphs author"""
    values = [
        None,
        7,
        "x",
        [],
        {},
        [None],
        [[]],
        [7, "x"],
        {"turn_1": None},
        {"a": 1},
        [{"role": [], "content": {}}],
        [{}],
    ]
    path = write_lines(tmp_path / "x", [dict.fromkeys(fields.split(), value) for value in values])
    records = read(name, path, TABLES[kind])[0]
    usable = {"sft": tidy_conversation, "preferences": tidy_preference, "pretrain": tidy}[kind]
    assert all(isinstance(text, str) for text in texts_in([usable(record) for record in records]))


# ----------------------------------------------------------------------------------------------------------------------
# The real samples, where they are at hand: (reader, path, records kept, left out by the reader or by tidying, shortened)


SHAREGPT_CUTS = {"empty question": 1, "last question without an answer": 1}
SAMPLES = [
    ("pretrain", "txt", "pretrain/laws", 166, {"empty text": 5}, {}),
    ("pretrain", "txt", "pretrain/niutrans-classics", 120, {}, {}),
    ("pretrain", "chinese-poetry", "pretrain/chinese-poetry", 15_755, {}, {}),
    ("pretrain", "c4", "pretrain/format_samples/c4_demo.jsonl", 300, {}, {}),
    ("pretrain", "lines", "pretrain/format_samples", 30, {}, {}),
    ("pretrain", "role-text", "sft/chinese-llama-65b", 0, {"a dialogue, not a plain text (sft reads it)": 130}, {}),
    ("sft", "alpaca", "sft/alpaca_zh_demo.json", 1000, {}, {}),
    ("sft", "alpaca", "sft/identity.json", 91, {}, {}),
    ("sft", "alpaca", "sft/ruozhiba_qa2449_gpt4t.json", 2449, {}, {}),
    ("sft", "belle", "sft/Belle_open_source_1k.json", 1000, {}, {}),
    ("sft", "belle", "sft/belle_zh_seed_tasks.json", 175, {}, {}),
    ("sft", "oasst", "sft/oaast_sft_zh.json", 689, {}, {}),
    ("sft", "sharegpt", "sft/medical_sft_1K_format.jsonl", 1000, {}, {}),
    ("sft", "sharegpt", "sft/sharegpt_zh_1K_format.first300.jsonl", 300, {}, SHAREGPT_CUTS),
    ("sft", "messages", "sft/sharegpt_zh_1K_format.first300.jsonl", 300, {}, SHAREGPT_CUTS),
    ("sft", "prompt-answer", "sft/chatlm-parquet/my_train_dataset_3k.parquet", 3000, {}, {}),
    ("sft", "prompt-answer", "sft/chatlm-parquet/my_valid_dataset_1k.parquet", 1000, {}, {}),
    ("sft", "role-text", "sft/chinese-llama-65b", 130, {}, {}),
    ("sft", "disc-med", "sft/disc_med_test_examples.jsonl", 163, {}, {"last question without an answer": 3}),
    ("sft", "moss", "sft/moss003", 40, {"calls a tool": 20}, {}),
    ("preferences", "sharegpt", "dpo/dpo_zh_demo.json", 300, {}, {}),
    ("preferences", "sharegpt", "dpo/dpo_zh_500.jsonl", 500, {}, {}),
    ("preferences", "medical", "dpo/medical_reward_test.json", 100, {}, {}),
    ("preferences", "oasst", "dpo/oaast_rm_zh.json", 772, {"chosen and rejected are the same": 3}, {}),
]


@pytest.mark.parametrize(("kind", "name", "path", "kept", "left_out", "shortened"), SAMPLES)
def test_real_samples(kind, name, path, kept, left_out, shortened):
    if not (SHARED / path).exists():
        pytest.skip("the real samples are not here")
    if path.endswith("parquet"):
        pytest.importorskip("pyarrow")
    assert outcome(kind, name, SHARED / path) == (kept, left_out, shortened)


def test_real_samples_leave_no_marks():
    """<|Human|> and <eoh> of MOSS are gone, and so are 输入： and 输出： of alpaca-zh."""
    if not (SHARED / "sft").exists():
        pytest.skip("the real samples are not here")
    moss, _ = read("moss", SHARED / "sft" / "moss003", INSTRUCTIONS)
    assert sum(len(messages) - 1 for messages in moss) == 398  # questions and answers, beside the system message
    assert not [turn for messages in moss for turn in messages if "<|" in turn["content"] or "<eo" in turn["content"]]
    alpaca, _ = read("alpaca", SHARED / "sft" / "alpaca_zh_demo.json", INSTRUCTIONS)
    marked = [turn["content"] for messages in alpaca for turn in messages if "\n输入：" in turn["content"]]
    assert not marked and not [
        messages for messages in alpaca if messages[-1]["content"].startswith(("输出：", "输出:"))
    ]


def outcome(kind: str, name: str, path: Path) -> tuple[int, dict, dict]:
    """-> (records kept, left out by reason, shortened by reason)"""
    records, skipped = read(name, path, TABLES[kind])
    kept, left_out, shortened = 0, Counter(skipped), Counter()
    for record in records:
        if kind == "pretrain":
            usable, problem = tidy(record), "empty text"
        else:
            usable, problem = (tidy_conversation if kind == "sft" else tidy_preference)(record)
        kept += bool(usable)
        if not usable:
            left_out[problem] += 1
        elif kind == "sft" and problem:
            shortened[problem] += 1
    return kept, dict(left_out), dict(shortened)
