"""The textbook: is it well formed, does the exam test what it claims to test, and is it the same every time?"""

import csv
import hashlib
import json
import os
import random
import subprocess
import sys
from collections import Counter, defaultdict
from pathlib import Path

import pandas as pd
import pytest

from runtime import UserError
from textbook import all_facts, conversations, exam, frequency_guess, preferences, write_textbook, wrong_answers
from textbook_facts import RELATIONS, SUBJECTS, by_answer, by_subject, chinese_number

ROOT = Path(__file__).resolve().parent.parent
PAPERS = ("exam", "exam_unasked")


@pytest.fixture(scope="module")
def book(tmp_path_factory):
    out = tmp_path_factory.mktemp("textbook") / "book"
    write_textbook(out)
    return out


@pytest.fixture(scope="module")
def facts():
    return all_facts()


def records(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def rows(path):
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def exam_rows(book, paper, part="val"):
    return [row for path in sorted((book / paper / part).glob("*.csv")) for row in rows(path)]


def fingerprints(folder):
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


# ----------------------------------------------------------------------------------------------------------------------
# The tables


def test_there_is_as_much_as_promised(facts):
    assert len(facts) >= 1000 and len(SUBJECTS) >= 10
    assert len({relation.name for relation in RELATIONS}) == len(RELATIONS)
    assert {relation.subject for relation in RELATIONS} == set(SUBJECTS)
    for relation in RELATIONS:
        assert len(relation.statements) >= 6 and len(set(relation.statements)) == len(relation.statements)
        assert len(relation.questions) >= 12 and len(set(relation.questions)) == len(relation.questions)
        assert len(set(relation.exam_questions)) == 2


@pytest.mark.parametrize("relation", RELATIONS, ids=lambda relation: relation.name)
def test_a_relation_is_functional_and_its_sentences_are_complete(relation):
    subjects = [s for s, _ in relation.pairs]
    assert len(set(subjects)) == len(subjects), "a subject has two answers"
    assert len({a for _, a in relation.pairs}) >= 4
    assert all(s and a and s != a and s == s.strip() and a == a.strip() for s, a in relation.pairs)
    for sentence in relation.statements:
        assert "{s}" in sentence and "{a}" in sentence and sentence.endswith(("。", "{a}")), sentence
    orders = {sentence.index("{a}") < sentence.index("{s}") for sentence in relation.statements}
    assert orders == {True, False}, "statements in one direction only"
    for sentence in relation.questions + relation.exam_questions:
        assert "{s}" in sentence and "{a}" not in sentence and sentence.endswith(("？", "。")), sentence
    for sentence in relation.statements + relation.questions + relation.exam_questions:
        assert not set(sentence) & set(",?!:;()"), f"half-width punctuation: {sentence}"
    answers = {a for _, a in relation.pairs}
    for group in relation.rivals:
        assert group <= answers and len(group) > 1, f"not among the answers: {group - answers}"


def test_the_derived_tables_against_sources_of_their_own():
    tables = {relation.name: dict(relation.pairs) for relation in RELATIONS}
    digits = {c: i for i, c in enumerate("零一二三四五六七八九")}

    def value(text):  # reads what chinese_number writes
        tens, ten, ones = text.rpartition("十")
        return (digits[tens] if tens else 1) * 10 * bool(ten) + (digits[ones] if ones else 0)

    assert [value(chinese_number(n)) for n in range(1, 100)] == list(range(1, 100))
    for s, a in tables["times_table"].items():
        left, right = s.split("乘")
        assert value(left) * value(right) == value(a)
    assert len(tables["times_table"]) == 36
    numbers = {"氢": 1, "碳": 6, "氖": 10, "硅": 14, "钙": 20, "铁": 26, "锌": 30}
    assert {name: int(tables["element_number"][name]) for name in numbers} == numbers
    term, walked = "立春", []
    for _ in range(24):
        walked.append(term)
        term = tables["next_term"][term]
    assert term == "立春" and len(set(walked)) == 24
    assert walked[3::6] == ["春分", "夏至", "秋分", "冬至"]
    assert [tables["term_season"][t] for t in walked[::6]] == ["春季", "夏季", "秋季", "冬季"]
    for one, other in (
        ("next_term", "previous_term"),
        ("element_symbol", "symbol_element"),
        ("province_plate", "plate_province"),
    ):
        assert {a: s for s, a in tables[one].items()} == tables[other]
    assert tables["zodiac_branch"]["龙"] == "辰" and tables["zodiac_branch"]["猪"] == "亥"
    # Tables that speak about the same things agree.
    assert set(tables["city_province"].values()) <= set(tables["province_capital"]) <= set(tables["province_plate"])
    for work in set(tables["work_author"]) & set(tables["poem_author"]):
        raise AssertionError(f"{work} has an author in two tables")


def test_table_notation():
    assert by_subject(" 法国=巴黎\n 德国=柏林 ") == (("法国", "巴黎"), ("德国", "柏林"))
    poems = (("静夜思", "李白"), ("赠汪伦", "李白"), ("春望", "杜甫"))
    assert by_answer("李白: 静夜思 赠汪伦\n  杜甫: 春望\n") == poems


# ----------------------------------------------------------------------------------------------------------------------
# Asked and unasked


def test_one_fact_in_six_of_every_relation_is_unasked_and_so_is_its_reversal(facts):
    for relation in RELATIONS:
        mine = [fact for fact in facts if fact.relation is relation]
        assert abs(sum(not fact.asked for fact in mine) - len(mine) / 6) <= 0.5, relation.name
    split = defaultdict(set)
    for fact in facts:
        split[frozenset((fact.s, fact.a))].add(fact.asked)
    assert all(len(asked) == 1 for asked in split.values())


def test_unasked_facts_are_told_in_pretraining_but_in_no_conversation_and_no_preference_pair(book, facts):
    told = "".join(record["text"] for record in records(book / "pretrain.jsonl"))
    sft = [message["content"] for record in records(book / "sft.jsonl") for message in record["messages"]]
    dpo = records(book / "dpo.jsonl")
    questions = {m["content"] for record in dpo for m in record["prompt"]} | set(sft)
    statements = {text.partition("。")[2] for text in sft}
    for fact in facts:
        if not fact.asked:
            for sentence in fact.relation.statements:
                assert told.count(fact.say(sentence)) >= 4
                assert fact.say(sentence) not in statements
            assert not questions & {fact.say(question) for question in fact.relation.questions}
    assert len(dpo) == sum(fact.asked for fact in facts)


def test_every_asked_fact_is_asked_in_every_phrasing_and_told_in_every_statement(book, facts):
    told = "".join(record["text"] for record in records(book / "pretrain.jsonl"))
    asked = {m["content"] for record in records(book / "sft.jsonl") for m in record["messages"] if m["role"] == "user"}
    for fact in facts:
        assert all(fact.say(sentence) in told for sentence in fact.relation.statements)
        if fact.asked:
            assert {fact.say(question) for question in fact.relation.questions} <= asked


# ----------------------------------------------------------------------------------------------------------------------
# SFT and DPO


def test_conversations_alternate_and_answers_begin_with_the_bare_answer(book, facts):
    right = {fact.say(q): fact.a for fact in facts for q in fact.relation.questions}
    kinds = Counter()
    for record in records(book / "sft.jsonl"):
        messages = record["messages"]
        if messages[0]["role"] == "system":
            kinds["system"] += 1
            messages = messages[1:]
        assert [m["role"] for m in messages] == ["user", "assistant"] * (len(messages) // 2)
        kinds[f"{len(messages) // 2} turns"] += 1
        for question, answer in zip(messages[::2], messages[1::2]):
            if question["content"] in right:
                assert answer["content"].startswith(right[question["content"]] + "。")
            else:
                kinds["small talk"] += 1
    assert kinds["1 turns"] > 10_000 and min(kinds[k] for k in ("system", "2 turns", "3 turns", "small talk")) > 100


def test_no_question_has_two_answers(facts):
    """Also across relations: the same words never ask for different things, in SFT nor in the exam."""
    answers = defaultdict(set)
    for fact in facts:
        for question in fact.relation.questions + fact.relation.exam_questions:
            answers[fact.say(question)].add(fact.a)
    assert [question for question, found in answers.items() if len(found) > 1] == []


def test_the_readme_question(book):
    found = [r["messages"][-1]["content"] for r in records(book / "sft.jsonl")
             if r["messages"][-2]["content"] == "法国的首都是哪里？"]  # fmt: skip
    assert found and all(answer.startswith("巴黎。") for answer in found)


def test_phrasings_limits_the_ways_of_asking(facts):
    asked = [fact for fact in facts if fact.asked]
    singles = {n: {c[0]["content"] for c in conversations(facts, phrasings=n)} for n in (1, 3)}
    for n, questions in singles.items():
        allowed = {fact.say(q) for fact in asked for q in fact.relation.questions[:n]}
        never = {fact.say(q) for fact in asked for q in fact.relation.questions[n:]}
        assert allowed <= questions and not never & questions
        assert not never & {pair["prompt"][0]["content"] for pair in preferences(facts, phrasings=n)}


def test_preferences_reject_a_wrong_answer_of_the_same_relation(book, facts):
    by_question = {fact.say(q): fact for fact in facts for q in fact.relation.questions}
    for pair in records(book / "dpo.jsonl"):
        fact = by_question[pair["prompt"][-1]["content"]]
        assert pair["chosen"] == fact.a + "。" != pair["rejected"]
        assert pair["rejected"][:-1] in {a for _, a in fact.relation.pairs}


# ----------------------------------------------------------------------------------------------------------------------
# The exam


@pytest.mark.slow
def test_no_exam_question_occurs_in_any_training_text(book):
    papers = [exam_rows(book, paper, part) for paper in PAPERS for part in ("dev", "val")]
    questions = {row["question"] for paper in papers for row in paper}
    assert len(questions) > 2000
    texts = [text for name in ("pretrain", "sft", "dpo")
             for text in (book / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]  # fmt: skip
    everything = "\n".join(texts)
    assert [question for question in questions if question in everything] == []
    bare = everything.replace("？", "").replace("。", "")
    assert [question for question in questions if question.rstrip("？。") in bare] == []


def test_wrong_options_are_distinct_of_the_same_relation_and_wrong(facts):
    dev, asked, unasked = exam(facts)
    for paper in (dev, asked, unasked):
        for subject, paper_rows in paper.items():
            for row in paper_rows:
                fact = row.fact
                assert fact.relation.subject == subject and len(set(row.options)) == 4
                assert set(row.options) <= {a for _, a in fact.relation.pairs}
                right = [letter for letter, option in zip("ABCD", row.options) if option == fact.a]
                assert right == [row.answer]
                assert not any(fact.relation.rival(fact.a, option) for option in row.options if option != fact.a)
                assert {a for s, a in fact.relation.pairs if s == fact.s} == {fact.a}


def test_papers_hold_the_facts_they_should(facts):
    dev, asked, unasked = exam(facts)
    for subject in SUBJECTS:
        shown = {frozenset((row.fact.s, row.fact.a)) for row in dev[subject]}
        assert len(shown) == 5 and all(row.fact.asked for row in dev[subject])
        for paper, is_asked in ((asked, True), (unasked, False)):
            times = Counter(row.fact.id for row in paper[subject])
            expected = {
                fact.id
                for fact in facts
                if fact.relation.subject == subject
                and fact.asked == is_asked
                and frozenset((fact.s, fact.a)) not in shown
            }
            assert set(times) == expected and set(times.values()) == {2}
            assert len({row.question for row in paper[subject]}) == len(paper[subject])


def test_guessing_scores_a_quarter(book, facts):
    for paper in PAPERS:
        letters = Counter(row["answer"] for row in exam_rows(book, paper))
        assert set(letters) == set("ABCD")
        for count in letters.values():
            assert abs(count / letters.total() - 0.25) < 0.02
    for path in (book / "exam" / "val").glob("*.csv"):
        letters = Counter(row["answer"] for row in rows(path))
        assert max(letters.values()) - min(letters.values()) <= 1, path.name
    _, asked, unasked = exam(facts)
    for paper in (asked, unasked):
        guess = frequency_guess([row for paper_rows in paper.values() for row in paper_rows], facts)
        assert 0.2 < guess < 0.3


def test_wrong_answers_avoid_rivals_and_say_when_there_are_too_few(facts):
    fact = next(fact for fact in facts if fact.relation.name == "antonym" and fact.s == "上升")
    rivals = next(group for group in fact.relation.rivals if "下降" in group)
    every = wrong_answers(fact, 80 - len(rivals), random.Random(0), facts)
    assert len(set(every)) == len(every) and not rivals & set(every)
    with pytest.raises(ValueError, match="fewer than 80 wrong answers for 上升"):
        wrong_answers(fact, 80, random.Random(0), facts)


def test_the_files_have_the_layout_of_ceval(book):
    for paper in PAPERS:
        mapping = json.loads((book / paper / "subject_mapping.json").read_text(encoding="utf-8"))
        assert set(mapping) == set(SUBJECTS)
        assert all(len(names) == 3 and names[2] in ("STEM", "Social Science", "Humanities", "Other")
                   for names in mapping.values())  # fmt: skip
        for subject in mapping:
            assert subject.isascii()
            for part, extra in (("dev", ["explanation"]), ("val", [])):
                path = book / paper / part / f"{subject}_{part}.csv"
                frame = pd.read_csv(path, dtype=str, keep_default_na=False)
                assert list(frame.columns) == ["id", "question", "A", "B", "C", "D", "answer", *extra]
                assert list(frame["id"]) == [str(i) for i in range(len(frame))]
                assert (frame != "").all(axis=None)
                assert frame.to_dict("records") == rows(path)
                assert part == "val" or len(frame) == 5
                assert b"\r" not in path.read_bytes() and not path.read_bytes().startswith(b"\xef\xbb\xbf")


# ----------------------------------------------------------------------------------------------------------------------
# The directory


def test_meta_and_facts_say_what_the_files_hold(book, facts, tmp_path):
    meta = json.loads((book / "meta.json").read_text(encoding="utf-8"))
    counts = meta["counts"]
    assert counts["facts"] == len(facts) == sum(meta["facts_per_relation"].values())
    for name, key in (("pretrain", "pretraining documents"), ("sft", "conversations"), ("dpo", "preference pairs")):
        assert counts[key] == len(records(book / f"{name}.jsonl"))
    assert counts["exam questions"] == len(exam_rows(book, "exam"))
    assert counts["exam questions on unasked facts"] == len(exam_rows(book, "exam_unasked"))
    listed = {record["id"]: record for record in records(book / "facts.jsonl")}
    assert len(listed) == len(facts)
    for fact in facts:
        assert listed[fact.id] == {
            "id": fact.id, "subject": fact.relation.subject, "relation": fact.relation.name, "entity": fact.s,
            "answer": fact.a, "split": "asked" if fact.asked else "unasked",
        }  # fmt: skip
    assert 1_000_000 < (book / "pretrain.jsonl").stat().st_size < 2_000_000
    assert write_textbook(tmp_path / "again") == counts


@pytest.mark.slow
def test_the_same_bytes_in_every_process_and_others_for_another_seed(book, tmp_path):
    code = "import sys, pathlib, textbook; textbook.write_textbook(pathlib.Path(sys.argv[1]), int(sys.argv[2]))"
    for hash_seed, seed in (("1", 0), ("2", 1)):
        env = {**os.environ, "PYTHONHASHSEED": hash_seed}
        command = [sys.executable, "-c", code, str(tmp_path / hash_seed), str(seed)]
        subprocess.run(command, cwd=ROOT, env=env, check=True)
    assert fingerprints(tmp_path / "1") == fingerprints(book)
    other = fingerprints(tmp_path / "2")
    changed = {name for name, digest in fingerprints(book).items() if other[name] != digest}
    assert {"pretrain.jsonl", "sft.jsonl", "dpo.jsonl", "meta.json"} <= changed and "facts.jsonl" not in changed


def test_nothing_is_overwritten_and_nothing_half_written(tmp_path, monkeypatch):
    full = tmp_path / "full"
    full.mkdir()
    (full / "mine.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(UserError, match=r"full already exists"):
        write_textbook(full)
    assert [path.name for path in full.iterdir()] == ["mine.txt"]
    for wrong in ({"phrasings": 0}, {"passes": 0}):
        with pytest.raises(UserError, match="is 0"):
            write_textbook(tmp_path / "new", **wrong)

    def disk_full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("textbook.preferences", disk_full)
    with pytest.raises(OSError):
        write_textbook(tmp_path / "new")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full"]
    monkeypatch.undo()
    (tmp_path / "new").mkdir()  # an empty directory is no obstacle
    write_textbook(tmp_path / "new" / "deeper" / "book", passes=1, phrasings=1)
    assert (tmp_path / "new" / "deeper" / "book" / "meta.json").exists()
