"""multiple_choice.py: prompts as the benchmarks prescribe them, scores as transformers computes them, exact statistics."""

from __future__ import annotations

from settings import UserError

import csv
from pathlib import Path

import pytest
import torch
from examinees_at_hand import answer_log_prob
from tokenizers_at_hand import SHARED
from torch import nn

from examinee import Examinee
from model import LlamaConfig
from multiple_choice import EXAM, wilson

CEVAL = SHARED.parent / "eval/ceval-exam"


def rows_of(file: Path) -> list[dict]:
    with open(file, encoding="utf-8", newline="") as stream:
        return list(csv.DictReader(stream))


def official(row: dict, letter: str = "") -> str:
    return f"{row['question']}\nA. {row['A']}\nB. {row['B']}\nC. {row['C']}\nD. {row['D']}\n答案：{letter}"


@pytest.mark.parametrize("shots", [0, 2])
@pytest.mark.parametrize("template", ["none", "baby", "chatml"])
def test_letters_equal_the_plain_computation(examinee, theirs, tokenizer, exam_dir, shots, template):
    """The official prompt of C-Eval's README, built here by hand; a chat model gets it as one message."""
    records = EXAM(examinee(shots=shots, context=1000, template=template), exam_dir).records
    assert [r["subject"] for r in records] == ["moon"] * 2 + ["river"] * 6 + ["wind"] * 3
    names = {"river": "河流学", "moon": "月亮学", "wind": "风声学"}
    for record in records[:3] + records[-1:]:
        subject, line = record["subject"], int(record["where"].rpartition(":")[2])
        row, dev = rows_of(exam_dir / f"val/{subject}_val.csv")[line - 2], rows_of(exam_dir / f"dev/{subject}_dev.csv")
        prompt = f"以下是中国关于{names[subject]}考试的单项选择题，请选出其中的正确答案。\n\n"
        prompt += "".join(official(demo, demo["answer"]) + "\n\n" for demo in dev[:shots]) + official(row)
        if template == "none":
            context, wholes = tokenizer.encode(prompt), [tokenizer.encode(prompt + letter) for letter in "ABCD"]
        else:
            context = tokenizer.render([{"role": "user", "content": prompt}], template, add_generation_prompt=True)[0]
            wholes = [context + tokenizer.encode("\n" + letter)[len(tokenizer.encode("\n")) :] for letter in "ABCD"]
        assert all(whole[: len(context)] == context for whole in wholes)
        expected = {x: answer_log_prob(theirs, context, whole[len(context) :]) for x, whole in zip("ABCD", wholes)}
        assert record["scores"] == pytest.approx(expected, abs=5e-4)
        assert record["prediction"] == max("ABCD", key=expected.get) and record["answer"] == row["answer"]
        assert record["correct"] == (record["prediction"] == row["answer"]) and record["shots"] == shots


@pytest.mark.parametrize("normalize", ["none", "tokens", "bytes", "unconditional"])
@pytest.mark.parametrize("template, shots, end", [("none", 0, "。"), ("none", 2, ""), ("baby", 0, "。"), ("chatml", 2, "。")])
def test_texts_equal_the_plain_computation(examinee, theirs, tokenizer, exam_dir, template, shots, end, normalize):
    """The bare question and the option's text behind it; examples are lines, or turns of the conversation."""
    settings = dict(score="text", context=1000, option_end=end, normalize=normalize, template=template, shots=shots)
    records = EXAM(examinee(**settings), exam_dir / "val" / "moon_val.csv").records
    demos = rows_of(exam_dir / "dev/moon_dev.csv")[:shots]

    def closed(option: str) -> str:
        return option if end and option.endswith(end) else option + end

    def ids(question: str, examples: list, answer: str) -> tuple[list[int], list[int]]:
        if template == "none":
            prompt = "".join(f"{d['question']}{closed(d[d['answer']])}\n" for d in examples) + question
            context = tokenizer.encode(prompt)
            return context, tokenizer.encode(prompt + answer)[len(context) :]
        turns = [turn for d in examples for turn in ((d["question"]), closed(d[d["answer"]]))] + [question, answer]
        talk = [{"role": ("user", "assistant")[i % 2], "content": turn} for i, turn in enumerate(turns)]
        context = tokenizer.render(talk[:-1], template, add_generation_prompt=True)[0]
        whole, mask = tokenizer.render(talk, template)
        new = [token for token, learned in zip(whole[len(context) :], mask[len(context) :]) if learned]
        assert new[-1] in tokenizer.stop_ids(template)
        return context, new[:-1]

    for record, row in zip(records, rows_of(exam_dir / "val/moon_val.csv")):
        for letter in "ABCD":
            context, answer = ids(row["question"], demos, closed(row[letter]))
            assert tokenizer.decode(answer) == closed(row[letter])
            value = answer_log_prob(theirs, context, answer)
            value /= {"tokens": len(answer), "bytes": len(row[letter].encode())}.get(normalize, 1)
            if normalize == "unconditional":
                value -= answer_log_prob(theirs, *ids("答案：", [], closed(row[letter])))
            assert record["scores"][letter] == pytest.approx(value, abs=5e-4)


def test_examples_that_do_not_fit_fall_off_the_end(examinee, tokenizer, exam_dir):
    file = exam_dir / "val" / "river_val.csv"
    roomy = EXAM(examinee(shots=5, context=5000), file)
    assert roomy.result["shortened"] == 0 and {r["shots"] for r in roomy.records} == {5}
    rows, dev = rows_of(file), rows_of(exam_dir / "dev" / "river_dev.csv")
    header = "以下是中国关于河流学考试的单项选择题，请选出其中的正确答案。\n\n"
    lengths = [[len(tokenizer.encode(header + "".join(official(d, d["answer"]) + "\n\n" for d in dev[:k]) + official(row)))
                for k in range(6)] for row in rows]  # fmt: skip
    context = lengths[0][3]  # exactly three examples fit the first question: the answer is only predicted, not read
    tight = EXAM(examinee(shots=5, context=context), file)
    expected = [max(k for k in range(6) if row[k] <= context) for row in lengths]
    assert [r["shots"] for r in tight.records] == expected and expected[0] == 3
    assert tight.result["shortened"] == sum(k < 5 for k in expected) == int(tight.lines[0].split()[0])
    three = EXAM(examinee(shots=3, context=5000), file).records[0]
    assert tight.records[0]["scores"] == pytest.approx(three["scores"], abs=1e-4)  # the first three stayed
    with pytest.raises(UserError, match=rf"river_val.csv:\d+, takes {max(row[0] for row in lengths)}: allow .*--context"):
        EXAM(examinee(context=min(row[0] for row in lengths) - 1), file)


class AlwaysOneLetter(nn.Module):
    """A model that answers every question with the same letter."""

    def __init__(self, config: LlamaConfig, letter_id: int):
        super().__init__()
        self.config, self.lm_head = config, nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        nn.init.zeros_(self.lm_head.weight)
        nn.init.ones_(self.lm_head.weight.data[letter_id])

    def hidden_states(self, tokens, **_):
        return torch.ones(*tokens.shape, self.config.hidden_size)


def always(examinee, tokenizer, letter: str, **settings) -> Examinee:
    config = LlamaConfig(vocab_size=len(tokenizer), hidden_size=4, intermediate_size=4, num_hidden_layers=1,
                         num_attention_heads=1, num_key_value_heads=1, max_position_embeddings=4096)  # fmt: skip
    prompt = "答案："
    letter_id = tokenizer.encode(prompt + letter)[len(tokenizer.encode(prompt)) :]
    assert len(letter_id) == 1
    return examinee(AlwaysOneLetter(config, letter_id[0]), tokenizer, **settings)


@pytest.mark.parametrize("letter, correct, micro, macro", [
    ("A", 1, 1 / 11, (1 / 6 + 0 + 0) / 3), ("B", 2, 2 / 11, (1 / 6 + 1 / 2 + 0) / 3),
    ("C", 2, 2 / 11, (1 / 6 + 0 + 1 / 3) / 3), ("D", 6, 6 / 11, (3 / 6 + 1 / 2 + 2 / 3) / 3)])  # fmt: skip
def test_always_one_letter(examinee, tokenizer, exam_dir, letter, correct, micro, macro):
    result = EXAM(always(examinee, tokenizer, letter), exam_dir).result
    assert (result["correct"], result["questions"], result["chance"]) == (correct, 11, 0.25)
    assert result["micro"] == pytest.approx(micro) and result["macro"] == pytest.approx(macro)
    assert list(result["categories"]) == ["Other", "STEM"] and list(result["subjects"]) == ["moon", "river", "wind"]
    if letter == "D":
        assert result["categories"]["STEM"]["micro"] == pytest.approx(4 / 8)
        assert result["categories"]["STEM"]["macro"] == pytest.approx((3 / 6 + 1 / 2) / 2)
        assert result["subjects"]["wind"]["interval"] == wilson(2, 3)


def test_first_letter_wins_a_tie(examinee, tokenizer, exam_dir):
    stub = always(examinee, tokenizer, "A")
    nn.init.zeros_(stub.model.lm_head.weight)
    assert {record["prediction"] for record in EXAM(stub, exam_dir).records} == {"A"}


@pytest.mark.parametrize("letter, micro, macro", [("A", 23.0312, 22.2621), ("B", 25.1114, 24.7714), ("C", 25.5572, 26.3914),
                                                  ("D", 26.3001, 26.5751)])  # fmt: skip
def test_ceval_scores_of_one_letter(examinee, tokenizer, letter, micro, macro):
    """C-Eval's validation set, counted by other means."""
    if not CEVAL.is_dir():
        pytest.skip("C-Eval is not at hand")
    result = EXAM(always(examinee, tokenizer, letter), CEVAL).result
    assert result["questions"] == 1346 and len(result["subjects"]) == 52
    assert (round(100 * result["micro"], 4), round(100 * result["macro"], 4)) == (micro, macro)
    if letter == "D":
        parts = {name: (part["questions"], round(100 * part["macro"], 4)) for name, part in result["categories"].items()}
        assert parts == {"STEM": (430, 26.8440), "Social Science": (275, 21.9644), "Humanities": (257, 29.4836),
                         "Other": (384, 27.3694)}  # fmt: skip


@pytest.mark.parametrize("correct, total, low, high", [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605),
                                                       (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)])  # fmt: skip
def test_wilson_interval(correct, total, low, high):
    """The published examples of Newcombe 1998 (Statistics in Medicine 17, table I, method 3)."""
    assert wilson(correct, total) == pytest.approx([low, high], abs=5e-5)
    assert wilson(total - correct, total) == pytest.approx([1 - high, 1 - low], abs=5e-5)


# ---- the CSV ---------------------------------------------------------------------------------------------------------


def test_cells_are_text(tmp_path):
    """NaN-like words, numbers, quotes, line breaks of two kinds and a byte-order mark come through as written."""
    file = tmp_path / "odd_val.csv"
    file.write_bytes("\ufeffid,question,A,B,C,D,answer\r\n"
                     '0,"第一行\r\n第二行，""引""",None,NA,1.0,007,B\r\n'
                     '1,又一题,nan,"a,b",null, x ,D\r\n'.encode())  # fmt: skip
    first, second = EXAM.read(file, "odd")
    assert first.text == '第一行\n第二行，"引"' and first.options == {"A": "None", "B": "NA", "C": "1.0", "D": "007"}
    assert second.options == {"A": "nan", "B": "a,b", "C": "null", "D": " x "}
    assert (first.where, second.where) == (f"{file}:2", f"{file}:4")
    assert (first.answer, second.answer) == ("B", "D")


HEADER = "id,question,A,B,C,D,answer\n"


@pytest.mark.parametrize("content, message", [
    ("", r"sea_val.csv:1: the columns question, A, B, C, D, answer are missing; expected .*, found an empty file"),
    ("id,题目,A,B,C,D,answer\n0,问,a,b,c,d,A\n", r":1: the columns question are missing; expected question,A.*found id,题目"),
    (HEADER, "holds no question, only a header"),
    (HEADER + "0,问,a,b,c,d,A\n1,问,a,b,c,d,E\n", r":3: the answer is 'E', not one of A, B, C, D"),
    (HEADER + '0,"问\n二",a,b,c,d,A\n1,问,a,b,c,d,\n', r":4: the cell answer is empty"),
    (HEADER + "0,问,a,b,c,d\n", r":2: not 7 cells as in the header"),
    (HEADER + "0,问,a,b,c,d,A,more\n", r":2: not 7 cells as in the header"),
    (HEADER + "0,问,a, ,c,d,A\n", r":2: the cell B is empty"),
    (HEADER + '0,"问,a,b,c,d,A\n', r":2: cannot be read as CSV"),
    ((HEADER + "0,问,a,b,c,d,A\n").encode("gb18030"), "cannot be read as CSV in UTF-8"),
])  # fmt: skip
def test_a_bad_csv_is_named_with_its_line(tmp_path, content, message):
    file = tmp_path / "sea_val.csv"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=message):
        EXAM.read(file, "sea")


def test_missing_parts_of_an_exam_are_named(examinee, exam_dir, tmp_path):
    with pytest.raises(UserError, match=r"holds no val/SUBJECT_val\.csv"):
        EXAM(examinee(), tmp_path)
    (exam_dir / "dev/moon_dev.csv").unlink()
    with pytest.raises(UserError, match=r"--shots 2: .*dev/moon_dev.csv, which should hold the examples, does not exist"):
        EXAM(examinee(shots=2, context=1000), exam_dir)
    with pytest.raises(UserError, match=r"--shots 9: .*river_dev.csv holds only 5 examples"):
        EXAM(examinee(shots=9, context=1000), exam_dir / "val/river_val.csv")
    (exam_dir / "subject_mapping.json").write_text('{"river": "STEM"}', encoding="utf-8")
    with pytest.raises(UserError, match=r"subject_mapping\.json: not of the form"):
        EXAM(examinee(context=1000), exam_dir)
