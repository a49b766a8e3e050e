"""The textbook (课本): a Chinese corpus made of about 1,150 true facts, and an exam on them. Nothing is downloaded.

    write_textbook(Path("data/textbook"))      or      python data_process.py textbook --out data/textbook

    pretrain.jsonl     {"text": "…"}                    every fact in all its statements, in many mixed documents
    sft.jsonl          {"messages": [user, assistant]}  questions about the asked facts, small talk, several turns
    dpo.jsonl          {"prompt": [...], "chosen", "rejected"}   the right answer and a wrong one of the same relation
    exam/              dev/SUBJECT_dev.csv, val/SUBJECT_val.csv in C-Eval's layout: the asked facts
    exam_unasked/      the same for the facts that SFT never asks
    facts.jsonl        what is known: id, subject, relation, entity, answer, split (asked | unasked)
    meta.json          counts, settings, what guessing scores

Why it is built this way. With real corpora nobody can tell what a small model knew before, or only looked up. Here
the truth is known, and so is chance (four options: 25%): a mark in the exam measures learning. Three lessons:

* Many phrasings. A model that has seen "法国的首都是哪里？" a thousand times has learned a string; one that has seen a
  dozen ways to say it learns what is said. `write_textbook(out, phrasings=3)` asks in three ways only: docs/phrasings.md.
* Two phrasings per relation are kept for the exam. No training text contains such a question, so a right answer is
  never a remembered one.
* One sixth of the facts are told in pretraining but never asked in SFT. They show whether fine-tuning teaches how to
  answer (then these are answered too) or only teaches the answers. Knowledge told often, in varied words, in both
  directions and in changing company can be asked for; told in one form it cannot (Allen-Zhu and Li, "Physics of
  Language Models: Part 3.1, Knowledge Storage and Extraction", 2023).

The facts and all sentences are in textbook_facts.py. The same seed gives the same bytes, on any machine.
"""

from __future__ import annotations

import csv
import hashlib
import json
import os
import random
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from runtime import UserError
from textbook_facts import RELATIONS, SUBJECTS, Relation

FORMAT = "cria-textbook-1"
LETTERS = "ABCD"
DEV_ROWS = 5  # per subject, as in C-Eval: the examples of a five-shot prompt
UNASKED = 6  # one fact in six is never asked


# ----------------------------------------------------------------------------------------------------------------------
# Facts


@dataclass(frozen=True)
class Fact:
    relation: Relation
    number: int  # place in relation.pairs
    s: str
    a: str
    asked: bool  # False: told in pretraining only

    @property
    def id(self) -> str:
        return f"{self.relation.name}-{self.number:03d}"

    @property
    def key(self) -> str:
        """The same for a fact and its reversal (氢=H, H=氢), so that neither gives the other away."""
        return "|".join(sorted((self.s, self.a)))

    def say(self, sentence: str) -> str:
        return sentence.format(s=self.s, a=self.a)


def all_facts() -> list[Fact]:
    """Every fact, in the order of the tables. The unasked ones are those whose hash is lowest in their relation."""
    facts = []
    for relation in RELATIONS:
        told = [Fact(relation, i, s, a, asked=True) for i, (s, a) in enumerate(relation.pairs)]
        unasked = {fact.key for fact in sorted(told, key=_hash)[: round(len(told) / UNASKED)]}
        facts += [Fact(relation, f.number, f.s, f.a, asked=f.key not in unasked) for f in told]
    return facts


def _hash(fact: Fact) -> str:
    return hashlib.sha256(fact.key.encode()).hexdigest()


def _dice(seed: int, purpose: str) -> random.Random:
    """Every part has dice of its own, so that a change in one leaves the bytes of the others as they are."""
    return random.Random(f"{seed}/{purpose}")  # a str is hashed with SHA-512: the same in every process


def wrong_answers(fact: Fact, count: int, dice: random.Random, facts: list[Fact]) -> list[str]:
    """Different answers of the same relation, none of them right for this fact nor too close to what is right.

    They are drawn from facts, not from the list of answers, so that an answer is a wrong option as often as it is right
    elsewhere; and from the same split as far as it reaches, because fine-tuning makes the answers of asked facts more
    likely whatever the question. Who picks the most frequent answer gains nothing from either.
    """
    others = [other for other in facts if other.relation is fact.relation]
    others = sorted(dice.sample(others, len(others)), key=lambda other: other.asked != fact.asked)  # a stable sort
    wrong = []
    for other in others:
        if other.a not in wrong and not fact.relation.rival(fact.a, other.a):
            wrong.append(other.a)
        if len(wrong) == count:
            return wrong
    raise ValueError(f"relation {fact.relation.name} has fewer than {count} wrong answers for {fact.s}")


# ----------------------------------------------------------------------------------------------------------------------
# Pretraining: statements only, no questions


def pretraining_documents(facts: list[Fact], seed: int = 0, passes: int = 4) -> Iterator[str]:
    """Documents of three to nine sentences. Each pass says every statement of every fact once, in new company: in even
    passes a page holds one relation under its heading, in odd passes sentences of all relations stand together."""
    for number in range(passes):
        dice = _dice(seed, f"pretrain/{number}")
        sentences = [(fact, sentence) for fact in facts for sentence in fact.relation.statements]
        dice.shuffle(sentences)
        if number % 2:
            documents = ["".join(page) for page in _pages(sentences, dice)]
        else:
            by_relation = {relation: [] for relation in RELATIONS}
            for fact, sentence in sentences:
                by_relation[fact.relation].append((fact, sentence))
            documents = [
                f"{relation.title}\n{''.join(page)}"
                for relation, its_sentences in by_relation.items()
                for page in _pages(its_sentences, dice)
            ]
        dice.shuffle(documents)
        yield from documents


def _pages(sentences: list[tuple[Fact, str]], dice: random.Random) -> Iterator[list[str]]:
    start = 0
    while start < len(sentences):
        size = dice.randint(3, 9)
        yield [fact.say(sentence) for fact, sentence in sentences[start : start + size]]
        start += size


# ----------------------------------------------------------------------------------------------------------------------
# SFT: questions and short answers that begin with the bare answer

SYSTEMS = (
    "你是小羊驼Cria，请简短回答问题。",
    "你是一个有用的助手。",
    "请用一句话回答。",
    "你是一位耐心的老师。",
    "请直接说出答案。",
)

# Small talk: any of the questions on the left gets the answer on the right.
SMALL_TALK = (
    ("你好 你好！ 您好 嗨 哈喽 早上好 下午好 晚上好", "你好！我是小羊驼Cria，可以问我课本里的知识。"),
    ("你是谁？ 请问你是谁？ 你叫什么？ 你叫什么名字？ 介绍一下你自己。", "我是小羊驼Cria，读课本长大的小语言模型。"),
    ("你是人吗？ 你是真人吗？ 你是机器人吗？", "我不是人，我是小羊驼Cria，一个小语言模型。"),
    ("你会什么？ 你能做什么？ 你知道些什么？ 你学过什么？", "我读过一本小课本，可以回答地理、化学、诗歌这些问题。"),
    ("谁训练了你？ 你是谁训练的？ 你是怎么来的？", "我是读小课本训练出来的，训练我的就是运行这些程序的人。"),
    ("谢谢 谢谢！ 谢谢你 多谢 太感谢了", "不客气！"),
    ("再见 再见！ 拜拜 明天见 我走了", "再见！"),
    ("你真棒 你真聪明！ 答得好 说得对", "谢谢夸奖！"),
    ("在吗 在吗？ 你在吗？", "在的，请问吧。"),
)


def conversations(facts: list[Fact], seed: int = 0, phrasings: int | None = None) -> Iterator[list[dict]]:
    """SFT conversations, shuffled. `phrasings` limits the ways in which each relation's questions are asked."""
    dice = _dice(seed, "sft")
    asked = [fact for fact in facts if fact.asked]
    result = [_exchange(fact, question, dice) for fact in asked for question in fact.relation.questions[:phrasings]]
    for _ in range(len(asked) // 2):  # several questions in one conversation, some after a greeting
        turns = [] if dice.random() < 0.7 else _small_talk(*dice.choice(SMALL_TALK[:2]), dice)
        for fact in dice.sample(asked, dice.choice((2, 3))):
            turns += _exchange(fact, dice.choice(fact.relation.questions[:phrasings]), dice)
        result.append(turns)
    for _ in range(len(asked) // 2):
        fact = dice.choice(asked)
        system = {"role": "system", "content": dice.choice(SYSTEMS)}
        result.append([system, *_exchange(fact, dice.choice(fact.relation.questions[:phrasings]), dice)])
    for questions, answer in SMALL_TALK:
        for question in questions.split():
            result += [_turn(question, answer)] * 16
    dice.shuffle(result)
    yield from result


def _turn(question: str, answer: str) -> list[dict]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _small_talk(questions: str, answer: str, dice: random.Random) -> list[dict]:
    return _turn(dice.choice(questions.split()), answer)


def _exchange(fact: Fact, question: str, dice: random.Random) -> list[dict]:
    """A question and its answer: 巴黎。 or, one time in four, 巴黎。法国的首都是巴黎。"""
    more = fact.say(dice.choice(fact.relation.statements)) if dice.random() < 0.25 else ""
    return _turn(fact.say(question), f"{fact.a}。{more}")


def preferences(facts: list[Fact], seed: int = 0, phrasings: int | None = None) -> Iterator[dict]:
    """One DPO pair per asked fact, in one of its SFT questions."""
    dice = _dice(seed, "dpo")
    for fact in dice.sample(facts, len(facts)):
        if fact.asked:
            question = fact.say(dice.choice(fact.relation.questions[:phrasings]))
            yield {
                "prompt": [{"role": "user", "content": question}],
                "chosen": f"{fact.a}。",
                "rejected": f"{wrong_answers(fact, 1, dice, facts)[0]}。",
            }


# ----------------------------------------------------------------------------------------------------------------------
# The exam


@dataclass(frozen=True)
class ExamRow:
    fact: Fact
    question: str
    options: tuple[str, ...]  # for A, B, C, D
    answer: str  # a letter


def exam(facts: list[Fact], seed: int = 0) -> tuple[dict, dict, dict]:
    """-> (dev, asked, unasked), each subject -> rows. A fact is asked once in each of its two exam phrasings.

    The facts of dev, which a few-shot prompt shows with their answers, are in neither of the other two.
    """
    dev, asked, unasked = {}, {}, {}
    for subject in SUBJECTS:
        its_facts = [fact for fact in facts if fact.relation.subject == subject]
        by_key = {fact.key: fact for fact in sorted(its_facts, key=_hash) if fact.asked}  # a fact or its reversal
        shown = list(by_key.values())[-DEV_ROWS:]
        shown_keys = {fact.key for fact in shown}
        questions = [(fact, fact.relation.exam_questions[i % 2]) for i, fact in enumerate(shown)]
        dev[subject] = _exam_rows(questions, its_facts, seed, "dev")
        for paper, is_asked in ((asked, True), (unasked, False)):
            questions = [
                (fact, question)
                for fact in its_facts
                if fact.asked == is_asked and fact.key not in shown_keys
                for question in fact.relation.exam_questions
            ]
            paper[subject] = _exam_rows(questions, its_facts, seed, f"asked={is_asked}")
    return dev, asked, unasked


def _exam_rows(questions: list[tuple[Fact, str]], facts: list[Fact], seed: int, purpose: str) -> list[ExamRow]:
    """Shuffled rows of one paper, wrong options from `facts`. Every letter is right equally often, give or take one."""
    dice = _dice(seed, f"exam/{purpose}/{questions[0][0].relation.subject}")
    questions = dice.sample(questions, len(questions))
    order = dice.sample(LETTERS, 4)
    letters = [order[i % 4] for i in range(len(questions))]
    dice.shuffle(letters)
    rows = []
    for (fact, question), letter in zip(questions, letters):
        options = wrong_answers(fact, 3, dice, facts)
        options.insert(LETTERS.index(letter), fact.a)
        rows.append(ExamRow(fact, fact.say(question), tuple(options), letter))
    return rows


def frequency_guess(rows: list[ExamRow], facts: list[Fact]) -> float:
    """What somebody scores who knows no fact but picks the option that SFT gives most often in this relation.

    It should be near the chance of 0.25. Where several options are equally frequent, one of them is picked blindly.
    """
    how_often = Counter((fact.relation.name, fact.a) for fact in facts if fact.asked)
    score = 0.0
    for row in rows:
        counts = [how_often[row.fact.relation.name, option] for option in row.options]
        best = [option for option, count in zip(row.options, counts) if count == max(counts)]
        score += (row.fact.a in best) / len(best)
    return score / len(rows)


# ----------------------------------------------------------------------------------------------------------------------
# Writing


def write_textbook(out: Path, seed: int = 0, phrasings: int | None = None, passes: int = 4) -> dict:
    """Write the whole textbook into the directory `out` and return its counts.

    phrasings   how many ways of asking SFT uses for each relation; None: all of them
    passes      how often pretraining says each statement

    It is written beside and renamed, so `out` is complete or absent. Raises UserError if `out` is not empty.
    """
    out = Path(out)
    if phrasings is not None and phrasings < 1:
        raise UserError(f"phrasings is {phrasings}; at least one way of asking is needed")
    if passes < 1:
        raise UserError(f"passes is {passes}; at least 1 is needed")
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise UserError(f"{out} already exists; choose another directory or remove it")
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        counts = _write_all(partial, seed, phrasings, passes)
        if out.exists():
            out.rmdir()  # empty, as checked above
        os.replace(partial, out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return counts


def _write_all(out: Path, seed: int, phrasings: int | None, passes: int) -> dict:
    facts = all_facts()
    dev, asked, unasked = exam(facts, seed)
    asked_rows, unasked_rows = (list(chain.from_iterable(paper.values())) for paper in (asked, unasked))
    out.mkdir(parents=True)
    counts = {
        "facts": _write_lines(out / "facts.jsonl", map(_fact_record, facts)),
        "unasked facts": sum(not fact.asked for fact in facts),
        "relations": len(RELATIONS),
        "subjects": len(SUBJECTS),
        "pretraining documents": _write_lines(
            out / "pretrain.jsonl", ({"text": text} for text in pretraining_documents(facts, seed, passes))
        ),
        "conversations": _write_lines(
            out / "sft.jsonl", ({"messages": messages} for messages in conversations(facts, seed, phrasings))
        ),
        "preference pairs": _write_lines(out / "dpo.jsonl", preferences(facts, seed, phrasings)),
        "exam questions": len(asked_rows),
        "exam questions on unasked facts": len(unasked_rows),
    }
    for folder, papers in (("exam", asked), ("exam_unasked", unasked)):
        for subject in SUBJECTS:
            _write_paper(out / folder / "dev" / f"{subject}_dev.csv", dev[subject], explain=True)
            _write_paper(out / folder / "val" / f"{subject}_val.csv", papers[subject])
        _write_json(out / folder / "subject_mapping.json", SUBJECTS)
    _write_json(out / "meta.json", {
        "format": FORMAT,
        "settings": {"seed": seed, "phrasings": phrasings, "passes": passes},
        "counts": counts,
        "facts_per_relation": {relation.name: len(relation.pairs) for relation in RELATIONS},
        "chance": 1 / len(LETTERS),
        "frequency_guess": {
            "exam": round(frequency_guess(asked_rows, facts), 4),
            "exam_unasked": round(frequency_guess(unasked_rows, facts), 4),
        },
    })
    return counts


def _fact_record(fact: Fact) -> dict:
    return {
        "id": fact.id,
        "subject": fact.relation.subject,
        "relation": fact.relation.name,
        "entity": fact.s,
        "answer": fact.a,
        "split": "asked" if fact.asked else "unasked",
    }


def _write_lines(path: Path, records: Iterable[dict]) -> int:
    count = 0
    with open(path, "w", encoding="utf-8", newline="\n") as file:
        for record in records:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
            count += 1
    return count


def _write_json(path: Path, value: dict) -> None:
    with open(path, "w", encoding="utf-8", newline="\n") as file:
        file.write(json.dumps(value, ensure_ascii=False, indent=2) + "\n")


def _write_paper(path: Path, rows: list[ExamRow], explain: bool = False) -> None:
    """C-Eval's columns; dev has an explanation more, here the fact's first statement."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["id", "question", *LETTERS, "answer", *(["explanation"] if explain else [])])
        for number, row in enumerate(rows):
            explanation = [row.fact.say(row.fact.relation.statements[0])] if explain else []
            writer.writerow([number, row.question, *row.options, row.answer, *explanation])
