"""data_look.py: exact output for every kind of data, with colours and without, and what the keys do."""

from __future__ import annotations

from settings import UserError, parse_config

import io
import json
import random
from pathlib import Path

import numpy as np
import pytest

import data_look
from data_look import CODES, Documents, LookConfig, Records, look
from data_report import _cut
from token_files import FORMAT

DOCUMENTS = ["人之初，性本善。\n性相近，习相远。", "", "法国的首都是巴黎", "a\x1b[31mb", "龘"]
CHAT = [{"role": "user", "content": "首都？"}, {"role": "assistant", "content": "巴黎\n北京"}]
PREFERENCE = {"prompt": [{"role": "user", "content": "首都？"}], "chosen": "巴黎\n北京", "rejected": "不知道"}
WIDTH = 60


@pytest.fixture(autouse=True)
def terminal(monkeypatch):
    """80 columns would make long rulers; NO_COLOR as in the tests' surroundings must not count."""
    monkeypatch.setenv("COLUMNS", str(WIDTH))
    monkeypatch.delenv("NO_COLOR", raising=False)


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """The current directory, so that paths in the output are short."""
    monkeypatch.chdir(tmp_path)
    return Path()


@pytest.fixture
def token_data(here, ours) -> Path:
    return write_tokens(here / "tok", ours, [ours.encode(text, eos=True) for text in DOCUMENTS])


def write_tokens(folder: Path, tokenizer, documents: list[list[int]]) -> Path:
    """A token directory, as open_tokens reads it."""
    ids = np.array([token for document in documents for token in document], dtype="<u2")
    tokenizer.save(folder)
    (folder / "train.bin").write_bytes(ids.tobytes())
    meta = {"format": FORMAT, "dtype": "uint16", "vocab_size": len(tokenizer), "tokenizer_sha256": tokenizer.fingerprint,
            "eos_id": tokenizer.eos_id,
            "splits": {"train": {"tokens": len(ids), "documents": len(documents), "max_id": int(ids.max())}}}  # fmt: skip
    (folder / "meta.json").write_text(json.dumps(meta), encoding="utf-8")
    return folder


def write_lines(path: Path, *records) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
    return path


def output(capsys, *words: str) -> str:
    result = look(parse_config(LookConfig, list(words)))
    text = capsys.readouterr().out
    assert result == {"shown": text.count("── ")}
    return text


def title(text: str) -> str:
    return f"── {text} " + "─" * max(2, WIDTH - 4 - sum(1 + ("一" <= char <= "龥") for char in text)) + "\n"


def coloured(text: str, *styles: str) -> str:
    start = "\x1b[" + ";".join(CODES[style] for style in styles) + "m"
    return "\n".join(start + line + "\x1b[0m" for line in text.split("\n"))


# ----------------------------------------------------------------------------------------------------------------------
# Without a terminal


def test_documents(token_data, ours, capsys):
    counts = [len(ours.encode(text)) + 1 for text in DOCUMENTS]
    assert output(capsys, "tok", "--count", "9") == "".join(
        title(f"tok/train.bin: {i} · {count} tokens") + shown + ours.special_texts[ours.eos_id] + "\n\n"
        for i, (count, shown) in enumerate(zip(counts, [*DOCUMENTS[:3], "a\\u001b[31mb", DOCUMENTS[4]]))
    )
    assert output(capsys, "tok/train.bin", "--start", "3", "--count", "1").startswith(title(f"tok/train.bin: 3 · {counts[3]} tokens"))


def test_a_chinese_path_in_the_title(here, capsys):
    write_lines(here / "数据" / "train.jsonl", {"messages": CHAT})
    first = output(capsys, "数据").split("\n")[0] + "\n"
    assert first == title("数据/train.jsonl: 0 · 2 messages") and len(first) == WIDTH - 1


def test_token_borders(token_data, ours, capsys):
    text = output(capsys, "tok", "--tokens", "--start", "4", "--count", "1").split("\n")[1]
    assert text == "·│·│龘│" + ours.special_texts[ours.eos_id]  # a character of three bytes, which the vocabulary lacks
    text = output(capsys, "tok", "--tokens", "--count", "1").split("\n", 1)[1]
    pieces = [ours.decode([token]) for token in ours.encode(DOCUMENTS[0])]
    assert "".join(pieces) == DOCUMENTS[0]
    assert text == "│".join(pieces).replace("\n", "↵\n") + "│" + ours.special_texts[ours.eos_id] + "\n\n"


def test_documents_longer_than_a_block_or_a_screen(here, ours, capsys, monkeypatch):
    monkeypatch.setattr(data_look, "BLOCK", 7)
    monkeypatch.setattr(data_look, "LONGEST", 10)
    rng = random.Random(0)
    ids = [i for i in range(len(ours)) if i not in ours.special_texts]
    documents = [[*rng.choices(ids, k=rng.randrange(30)), ours.eos_id] for _ in range(40)]
    write_tokens(here / "tok", ours, [*documents, ids[:5]])  # the last was cut off: it has no eos
    starts = np.cumsum([0, *map(len, documents)]).tolist()
    collection = Documents(here / "tok", LookConfig(here / "tok"))
    assert [collection.position(i) for i in (7, 3, 40, 41)] == [starts[7], starts[3], starts[40], None]
    assert [collection.after(place) for place in range(starts[-1])] == [
        next(start for start in starts if start > place) for place in range(starts[-1])
    ]
    long = next(i for i, document in enumerate(documents) if len(document) > 12)
    text = output(capsys, "tok", "--start", str(long), "--count", "1")
    assert text.endswith(f"\n… and {len(documents[long]) - 10} more tokens\n\n") and f"{len(documents[long])} tokens" in text
    assert "40 · 5 tokens" in output(capsys, "tok", "--start", "40")


@pytest.mark.parametrize("rest", [[], [5]])
def test_each_block_is_searched_once(rest, here, ours, monkeypatch):
    """However many documents a block holds; the last token of the file may or may not be an eos."""
    searched, real = [], np.flatnonzero
    monkeypatch.setattr(data_look, "BLOCK", 100)
    monkeypatch.setattr(data_look.np, "flatnonzero", lambda found: searched.append(len(found)) or real(found))
    write_tokens(here / "tok", ours, [*[[5, ours.eos_id]] * 250, rest])
    collection = Documents(here / "tok", LookConfig(here / "tok"))
    assert collection.position(240) == 480 and searched == [100] * 5
    assert collection.position(250) == (500 if rest else None) and collection.position(251) is None
    assert searched == [100] * 5 + [1] * len(rest) and len(collection.starts) == 250 + len(rest)


def test_one_line_of_the_report():
    """data_report._cut: an emoji of several signs and a space of no width stay; only control signs are replaced."""
    text = "👨\u200d👩\u200d👧 a\u200bb\u00ad"
    assert _cut(text, 40) == text
    assert _cut("a\x00\x1b\x7f\x9b\ud83db\u2028c\x85d", 40) == "a\ufffd\ufffd\ufffd\ufffd\ufffdb c d"


def test_bare_token_file(token_data, ours, capsys):
    Path("bare.bin").write_bytes(Path("tok/train.bin").read_bytes())
    with pytest.raises(UserError, match=r"bare\.bin is a bare token file: name its tokenizer"):
        look(LookConfig(Path("bare.bin")))
    texts = [part.split("\n", 1)[1] for part in output(capsys, "tok", "--count", "9").split("── ")[1:]]
    bare = output(capsys, "bare.bin", "--count", "9", "--tokenizer", "tok").split("── ")[1:]
    assert [part.split("\n", 1)[1] for part in bare] == texts and bare[2].startswith("bare.bin: 2 · ")


def test_conversations(here, ours_dir, ours, capsys):
    write_lines(here / "sft" / "train.jsonl", {"messages": CHAT}, {"messages": CHAT[:0]})
    write_lines(here / "sft" / "val.jsonl", {"messages": CHAT[::-1]})
    first = title("sft/train.jsonl: 0 · 2 messages") + "user\n首都？\n\nassistant\n巴黎\n北京\n\n"
    assert output(capsys, "sft", "--count", "1") == first
    assert output(capsys, "sft") == first + title("sft/train.jsonl: 1 · 0 messages") + "\n\n"
    assert output(capsys, "sft", "--split", "val").startswith(title("sft/val.jsonl: 0 · 2 messages") + "assistant\n巴黎")
    assert output(capsys, "sft/train.jsonl", "--count", "0") == ""


def test_the_loss_mask(here, ours_dir, ours, capsys):
    write_lines(here / "train.jsonl", {"messages": CHAT})
    flags = ("train.jsonl", "--tokenizer", str(ours_dir))
    for template, text in (
        ("chatml", "<|im_start|>user\n首都？<|im_end|>\n<|im_start|>assistant\n⟦巴黎\n北京<|im_end|>⟧\n"),
        ("baby", "首都？<s>⟦巴黎\n北京</s>⟧"),
    ):
        ids, mask = ours.render(CHAT, template)
        what = f"{len(ids)} tokens, {sum(mask)} trained, template {template}"
        assert output(capsys, *flags, "--template", template) == title(f"train.jsonl: 0 · {what}") + text + "\n\n"
    assert "template chatml" in output(capsys, *flags)
    marked = output(capsys, *flags, "--tokens").split("\n", 1)[1]
    assert marked.replace("│", "").replace("↵", "") == (
        "<|im_start|>user\n首都？<|im_end|>\n<|im_start|>assistant\n⟦巴黎\n北京<|im_end|>⟧\n\n\n"
    )
    assert marked.count("│") == len(ours.render(CHAT)[0]) - 1


def test_preferences(here, capsys):
    write_lines(here / "dpo.jsonl", PREFERENCE)
    assert output(capsys, "dpo.jsonl") == (
        title("dpo.jsonl: 0") + "user\n首都？\n\nchosen\n巴黎\n北京\n\nrejected\n不知道\n\n"
    )


def test_bad_records_are_shown_as_such(here, typed, ours_dir):
    lines = ["[]", "{", "[" * 100_000, json.dumps({"text\u001b": 1}), json.dumps({"messages": [{"role": 5, "content": "a"}]}),
             json.dumps({"messages": CHAT[1:]})]  # fmt: skip
    path = (here / "bad.jsonl").resolve()
    path.write_text("\n".join(lines), encoding="utf-8")
    text, shown = typed(*[""] * 5)(str(path))
    layout = "neither messages nor a preference as `sft` and `preferences` write them"
    messages = [layout, *["not a line of JSON in UTF-8"] * 2, f"{layout}; its fields are text\\u001b", f"{layout}; its fields are messages"]
    assert shown == 6 and text.count("\x1b[31m") == 5
    for number, message in enumerate(messages):
        at = len("\n".join(lines[:number])) + bool(number)
        assert f"bad.jsonl: {number} · bad record at byte {at:,} " in text and coloured(message, "red") in text
    text, _ = typed()(str(path), "--start", "5", "--tokenizer", str(ours_dir))
    assert coloured("message 1 of 1 is the assistant's, but no user message comes before it", "red") in text


def test_lines_are_found_lazily(here):
    write_lines(here / "a.jsonl", *({"messages": [{"role": "user", "content": str(i) * i}]} for i in range(50)))
    data = here.joinpath("a.jsonl").read_bytes()
    here.joinpath("a.jsonl").write_bytes(data.replace(b"\n", b"\n \n\n", 1))
    collection = Records(here / "a.jsonl", LookConfig(here / "a.jsonl"))
    assert json.loads(read(collection, 5)) == json.loads(data.split(b"\n")[5])
    assert len(collection.starts) == 6
    assert json.loads(read(collection, 1)) == json.loads(data.split(b"\n")[1])
    assert collection.position(49) is not None and collection.position(50) is None


def read(collection: Records, number: int) -> bytes:
    collection.stream.seek(collection.position(number))
    return collection.stream.readline()


def test_draws(token_data, capsys):
    draws = output(capsys, "tok", "--random", "--count", "300")
    collection = Documents(Path("tok"), LookConfig(Path("tok")))
    starts = {collection.position(i) for i in range(len(DOCUMENTS))}
    drawn = [int(line.split("token ")[1].split(" ")[0]) for line in draws.splitlines() if line.startswith("──")]
    assert set(drawn) == starts and len(drawn) == 300
    assert output(capsys, "tok", "--random", "--start", "7", "--count", "1") == (
        "── tok/train.bin: draw 7" + draws.split("── tok/train.bin: draw 7")[1].split("── ")[0]
    )
    assert output(capsys, "tok", "--random", "--count", "300", "--seed", "1") != draws


# ----------------------------------------------------------------------------------------------------------------------
# On a terminal


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def typed(monkeypatch):
    """typed("", "p", "q")(words) -> the output of a session in which these were typed, and how many were shown."""

    def start(*keys):
        def run(*words):
            answers = iter(keys)

            def answer(prompt):
                key = next(answers, EOFError)
                if isinstance(key, type):
                    raise key
                return key

            screen = Terminal()
            monkeypatch.setattr("sys.stdout", screen)
            monkeypatch.setattr("builtins.input", answer)
            shown = look(parse_config(LookConfig, list(words)))["shown"]
            monkeypatch.undo()
            return screen.getvalue(), shown

        return run

    return start


@pytest.mark.parametrize(
    ("keys", "numbers"),
    [
        (("", "", "q", ""), [0, 1, 2]),
        (("3", "p", "p", "p", "p"), [0, 3, 2, 1, 0, 0]),
        (("nonsense", " 2 ", "Q"), [0, 2]),
        (("", KeyboardInterrupt), [0, 1]),
        ((), [0]),
    ],
)
def test_keys(token_data, typed, keys, numbers):
    text, shown = typed(*keys)(str(token_data.resolve()))
    assert [int(part.split(" ")[0]) for part in text.split("train.bin: ")[1:]] == numbers and shown == len(numbers)


def test_the_end_is_told(token_data, typed):
    text, shown = typed("9", "", "", "p")(str(token_data.resolve()))
    assert text.count("there is no number 9: the last is 4\n") == 1 and text.count("there is no number 5: the last is 4\n") == 2
    assert shown == 2 and "train.bin: 3 " in text


def test_colours(here, typed, ours_dir, ours):
    path = str(write_lines(here / "train.jsonl", {"messages": CHAT}, PREFERENCE).resolve())
    text, _ = typed("")(path)
    assert text.endswith(
        coloured("user", "bold") + "\n首都？\n\n" + coloured("chosen", "bold") + "\n" + coloured("巴黎\n北京", "green") + "\n\n"
        + coloured("rejected", "bold") + "\n" + coloured("不知道", "red") + "\n\n\n"
    )  # fmt: skip
    text, _ = typed()(path, "--tokenizer", str(ours_dir), "--template", "baby")
    assert text.split("\n", 1)[1] == (
        coloured("首都？", "dim") + coloured("<s>", "dim", "inverse") + coloured("巴黎\n北京", "bold", "green")
        + coloured("</s>", "bold", "green", "inverse") + "\n\n\n"
    )  # fmt: skip


def test_shaded_tokens(token_data, typed, ours):
    text, _ = typed()(str(token_data.resolve()), "--tokens", "--start", "4")
    assert text.split("\n")[1] == (
        "·" + coloured("·", "shade") + "龘" + coloured(ours.special_texts[ours.eos_id], "inverse", "shade")
    )


def test_no_color(here, typed, monkeypatch):
    path = str(write_lines(here / "train.jsonl", PREFERENCE).resolve())
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b" not in typed()(path)[0]
    monkeypatch.setenv("NO_COLOR", "")
    assert "\x1b" in typed()(path)[0]


# ----------------------------------------------------------------------------------------------------------------------
# Mistakes


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["absent"], "absent does not exist"),
        (["empty"], "empty is no prepared data (train.bin or train.jsonl): it holds nothing"),
        (["."], "it holds empty, sft, tok"),
        (["sft", "--split", "val"], "sft has no val split"),
        (["tok", "--split", "val"], "tok has no val split"),
        (["sft", "--start", "1"], "sft/train.jsonl has no number 1: there are 1, counted from 0"),
        (["sft", "--tokens"], "--tokens needs --tokenizer"),
        (["tok", "--template", "baby", "--tokenizer", "tok"], "tok is token data: --template is for conversations"),
        (["sft", "--tokenizer", "tok", "--template", "jinja"], "the chat template jinja was asked for"),
        (["tok", "--start", "-1", "--template", "baby"], "--start -1: needs 0 or more; --template needs --tokenizer"),
    ],
)
def test_mistakes_are_named(token_data, words, message):
    Path("empty").mkdir()
    write_lines(Path("sft/train.jsonl"), {"messages": CHAT})
    with pytest.raises(UserError) as error:
        look(parse_config(LookConfig, words))
    assert message in str(error.value)
