"""Multiple choice: questions with lettered options, in CSV files, answered by whichever option the model finds likeliest.

A benchmark is a declaration, a `MultipleChoice`: where its files lie, how its official prompt is written. The rest, from
reading the files to confidence intervals, is shared. EXAM, at the end, is C-Eval's.

Of eval.py's settings `score`, `shots`, `normalize` and `option_end` count here.
"""

from __future__ import annotations

from settings import UserError, read_json

import csv
import math
import time
from dataclasses import dataclass, replace
from pathlib import Path

from examinee import Examinee, Report, Request


@dataclass(frozen=True)
class Question:
    where: str  # file:line
    subject: str
    text: str
    options: dict[str, str]  # letter -> text
    answer: str  # a letter


@dataclass(frozen=True)
class MultipleChoice:
    """A benchmark as data: where its files lie and how its official prompt is written.

    `{subject}` in a path is the file's subject, in the header its Chinese name; `{question}`, `{A}` … are a question's.
    """

    questions: str = "val/{subject}_val.csv"
    examples: str = "dev/{subject}_dev.csv"
    columns: tuple[str, ...] = ("question", "A", "B", "C", "D", "answer")  # the question, its options, the answer
    header: str = "以下是中国关于{subject}考试的单项选择题，请选出其中的正确答案。\n\n"
    item: str = "{question}\nA. {A}\nB. {B}\nC. {C}\nD. {D}\n答案："
    letter: str = "{letter}"  # as it follows the item
    gap: str = "\n\n"  # between an example and what follows

    def __call__(self, examinee: Examinee, path: Path) -> Report:
        config, clock = examinee.config, time.perf_counter()
        root, files = self.files(path)
        names = subject_names(root)
        questions = [question for subject, file in files.items() for question in self.read(file, subject)]
        examples = {subject: self.read_examples(root, subject, config.shots) for subject in files}

        fitted = [self.fit(examinee, q, examples[q.subject], names.get(q.subject, (q.subject,))[0]) for q in questions]
        requests, shots = [request for request, _ in fitted], [shots for _, shots in fitted]
        too_long = [i for i, request in enumerate(requests) if request.length > examinee.context]
        if too_long:
            worst = max(too_long, key=lambda i: requests[i].length)
            raise UserError(f"{len(too_long)} questions are longer than the {examinee.context} tokens that this model reads; the "
                            f"longest, {questions[worst].where}, takes {requests[worst].length}: allow that with --context "
                            f"{requests[worst].length}, or with --rope-scaling yarn")  # fmt: skip
        scores = self.normalize(examinee, questions, requests, examinee.score(requests, "exam"))
        records = []
        for question, used, values in zip(questions, shots, scores):
            guess = list(question.options)[max(range(len(values)), key=values.__getitem__)]  # the first wins a tie
            records.append({"subject": question.subject, "where": question.where, "question": question.text,
                            "answer": question.answer, "prediction": guess, "correct": guess == question.answer,
                            "shots": used, "scores": dict(zip(question.options, values))})  # fmt: skip
        seconds = time.perf_counter() - clock

        shortened = sum(used < config.shots for used in shots)
        result = summarize(records, names, chance=sum(1 / len(q.options) for q in questions) / len(questions))
        result |= {"score": config.score, "normalize": config.normalize, "template": examinee.template or "none",
                   "shots": config.shots, "shortened": shortened, "seconds": round(seconds, 3)}  # fmt: skip
        how = "the letter" if config.score == "letter" else f"the options' text (normalize: {config.normalize})"
        headline = (f"{path}: {len(questions):,} questions, {config.shots}-shot, by {how}, template {result['template']}; "
                    f"{seconds:.1f} s, {len(questions) / seconds:.0f} questions/s")  # fmt: skip
        dropped = f"{shortened:,} questions had to drop examples to fit into {examinee.context} tokens"
        return Report(headline, result, [dropped] if shortened else [], accuracy_table(result, names), records)

    def files(self, path: Path) -> tuple[Path, dict[str, Path]]:
        """The benchmark's folder, and the file of every subject. Raises UserError if there is none."""
        folder, _, ending = self.questions.rpartition("{subject}")
        if path.is_file():
            root = path.parent.parent if path.parent.name == Path(folder).name else path.parent
            return root, {path.name.removesuffix(ending).removesuffix(".csv"): path}
        found = {file.name.removesuffix(ending): file for file in sorted((path / folder).glob("*" + ending))}
        if not found:
            raise UserError(f"{path} holds no {self.questions.format(subject='SUBJECT')}, where the questions should be")
        return path, found

    def read(self, file: Path, subject: str) -> list[Question]:
        """The questions of one CSV. Raises UserError naming file and line for whatever is not as declared."""
        text, *letters, answer = self.columns
        questions, line = [], 1
        try:
            with open(file, encoding="utf-8-sig", newline="") as stream:  # newline="": cells may hold line breaks
                reader = csv.DictReader(stream, strict=True)
                found = [name for name in reader.fieldnames or [] if name]
                missing = [name for name in self.columns if name not in found]
                if missing:
                    raise UserError(f"{file}:1: the columns {', '.join(missing)} are missing; expected "
                                    f"{','.join(self.columns)}, found {','.join(found) or 'an empty file'}")  # fmt: skip
                line = reader.line_num + 1
                for row in reader:
                    where, line = f"{file}:{line}", reader.line_num + 1
                    if None in row or None in row.values():
                        raise UserError(f"{where}: not {len(found)} cells as in the header; is a comma or a quote missing?")
                    row = {name: row[name].replace("\r\n", "\n") for name in self.columns}
                    empty = [name for name, cell in row.items() if not cell.strip()]
                    if empty:
                        raise UserError(f"{where}: the cell {', '.join(empty)} is empty")
                    right = row[answer].strip()
                    if right not in letters:
                        raise UserError(f"{where}: the answer is {right!r}, not one of {', '.join(letters)}")
                    questions.append(Question(where, subject, row[text], {x: row[x] for x in letters}, right))
        except (UnicodeDecodeError, csv.Error) as error:
            raise UserError(f"{file}:{line}: cannot be read as CSV in UTF-8 ({error})") from None
        if not questions:
            raise UserError(f"{file} holds no question, only a header")
        return questions

    def read_examples(self, root: Path, subject: str, shots: int) -> list[Question]:
        if not shots:
            return []
        file = root / self.examples.format(subject=subject)
        if not file.is_file():
            raise UserError(f"--shots {shots}: {file}, which should hold the examples, does not exist")
        examples = self.read(file, subject)
        if len(examples) < shots:
            raise UserError(f"--shots {shots}: {file} holds only {len(examples)} examples")
        return examples[:shots]

    def fit(self, examinee: Examinee, question: Question, examples: list[Question], name: str) -> tuple[Request, int]:
        """The request, and how many examples stand in it: whole ones fall off the end until it fits (C-Eval's rule)."""
        for shots in range(len(examples), -1, -1):
            request = examinee.request(*self.ask(examinee, question, examples[:shots], name))
            if request.length <= examinee.context:
                break
        return request, shots

    def ask(self, examinee: Examinee, question: Question, examples: list[Question], name: str):
        """-> (prompt, possible answers). The prompt is text, or messages for a model with a chat template.

        letter: the official prompt, which a chat model gets as one message. text: the bare question; examples are
        earlier turns of the conversation, or lines before it.
        """
        if examinee.config.score == "letter":
            prompt = self.header.format(subject=name)
            for q in examples:
                prompt += self.item.format(question=q.text, **q.options) + self.letter.format(letter=q.answer) + self.gap
            prompt += self.item.format(question=question.text, **question.options)
            answers = [self.letter.format(letter=letter) for letter in question.options]
            return [{"role": "user", "content": prompt}] if examinee.template else prompt, answers
        end = examinee.config.option_end
        closed = lambda option: option if option.endswith(end) else option + end  # noqa: E731
        turns = [(q.text, closed(q.options[q.answer])) for q in examples]
        answers = [closed(option) for option in question.options.values()]
        if not examinee.template:
            return "".join(f"{asked}{answer}\n" for asked, answer in turns) + question.text, answers
        roles = ("user", "assistant")
        messages = [{"role": role, "content": text} for turn in turns for role, text in zip(roles, turn)]
        return [*messages, {"role": "user", "content": question.text}], answers

    def normalize(self, examinee: Examinee, questions: list[Question], requests: list[Request], scores: list):
        """A long text is less likely than a short one, a rare word than a common one: three ways to make up for it."""
        kind = examinee.config.normalize
        if kind == "tokens":
            return [[s / len(ids) for s, ids in zip(row, r.answers)] for row, r in zip(scores, requests)]
        if kind == "bytes":
            sizes = [[len(text.encode()) for text in q.options.values()] for q in questions]
            return [[s / size for s, size in zip(row, its)] for row, its in zip(scores, sizes)]
        if kind == "unconditional":  # pointwise mutual information (Holtzman et al. 2021, 2104.08315)
            bare = [self.fit(examinee, replace(q, text="答案："), [], "")[0] for q in questions]
            alone = examinee.score(bare, "options alone")
            return [[s - u for s, u in zip(row, its)] for row, its in zip(scores, alone)]
        return scores


def subject_names(root: Path) -> dict[str, tuple[str, str]]:
    """subject_mapping.json as {subject: (Chinese name, category)}; {} where there is none."""
    file = root / "subject_mapping.json"
    mapping = read_json(file) if file.exists() else {}
    try:
        return {subject: (chinese, category) for subject, (_, chinese, category) in mapping.items()}
    except (ValueError, TypeError, AttributeError):
        raise UserError(f'{file}: not of the form {{"subject": ["English", "Chinese", "category"], …}}') from None


def summarize(records: list[dict], names: dict, chance: float) -> dict:
    """Per subject, per category and overall: micro pools the questions, macro averages the subjects (C-Eval's way)."""
    subjects: dict[str, list[bool]] = {}
    for record in records:
        subjects.setdefault(record["subject"], []).append(record["correct"])
    category = {subject: names.get(subject, ("", ""))[1] for subject in subjects}

    def counted(members: list[str]) -> dict:
        marks = [mark for subject in members for mark in subjects[subject]]
        macro = sum(sum(subjects[s]) / len(subjects[s]) for s in members) / len(members)
        return {"micro": sum(marks) / len(marks), "macro": macro, "interval": wilson(sum(marks), len(marks)),
                "correct": sum(marks), "questions": len(marks)}  # fmt: skip

    groups = {name: [s for s in subjects if category[s] == name] for name in sorted(set(category.values()))}
    return {**counted(list(subjects)), "chance": chance,
            "categories": {name: counted(members) for name, members in groups.items()},
            "subjects": {s: {"category": category[s], **counted([s])} for s in subjects}}  # fmt: skip


def wilson(correct: int, total: int, z: float = 1.959964) -> list[float]:
    """95% confidence interval of a proportion (Wilson 1927): inside [0, 1] also when all or none are right."""
    p, w = correct / total, z * z / total
    middle, half = (p + w / 2) / (1 + w), math.sqrt(w * p * (1 - p) + w * w / 4) / (1 + w)
    return [max(0.0, middle - half), min(1.0, middle + half)]


def accuracy_table(result: dict, names: dict) -> list[tuple[str, ...]]:
    def row(name: str, part: dict, label: str = "", macro: str = "") -> tuple[str, ...]:
        low, high = part["interval"]
        return name, label, f"{part['questions']:,}", f"{part['micro']:.2%}", f"{low:.1%} to {high:.1%}", macro

    rows = [("subject", "", "questions", "micro", "95% interval", "macro")]
    for category, part in result["categories"].items():
        for subject, marks in result["subjects"].items():
            if marks["category"] == category:
                rows.append(row(subject, marks, names.get(subject, ("",))[0]))
        if category:
            rows.append(row(f"= {category}", part, macro=f"{part['macro']:.2%}"))
    rows.append(row("all", result, macro=f"{result['macro']:.2%}"))
    return [*rows, ("chance", "", "", f"{result['chance']:.2%}", "", "")]


EXAM = MultipleChoice()  # the defaults are C-Eval's
