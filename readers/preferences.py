"""Readers of preference data. Each yields {"prompt": [messages], "chosen": "…", "rejected": "…"}, for DPO and rewards.

A reader only brings a record into this form; `tidy_preference` then drops what cannot be learnt from, for all of them.
"""

from __future__ import annotations

from collections.abc import Iterator

from readers import SourceFile, hugging_face, preference_reader, tidy
from readers.instructions import JSON_FILES, alpaca_prompt, dialogue, message, tidy_conversation


@preference_reader("alpaca", files=JSON_FILES, source="the layout of many sets; your own", licence="yours")
def alpaca(file: SourceFile) -> Iterator[dict]:
    """{"instruction": "…", "input": "…", "chosen": "…", "rejected": "…"}; also `system`, `history` as in sft's alpaca"""
    for record in file.json_objects():
        if file.has(record, "instruction", "chosen", "rejected"):
            yield _pair(alpaca_prompt(record), record["chosen"], record["rejected"])


@preference_reader(
    "sharegpt", files=JSON_FILES, source="https://huggingface.co/datasets/hiyouga/DPO-En-Zh-20k", licence="Apache-2.0",
    size="10,000 Chinese pairs", downloads=hugging_face("hiyouga/DPO-En-Zh-20k", "dpo_zh.json"),
)  # fmt: skip
def sharegpt(file: SourceFile) -> Iterator[dict]:
    """{"conversations": [{"from": "human", "value": "…"}], "chosen": …, "rejected": …}; array or one per line

    The answers are strings, or turns {"from": "gpt", "value": "…"}. The conversation may begin with a system turn.
    """
    for record in file.json_objects():
        if file.has(record, "conversations", "chosen", "rejected"):
            yield _pair(dialogue(record["conversations"]), record["chosen"], record["rejected"])


@preference_reader(
    "medical", files=("train.json",), source="https://huggingface.co/datasets/shibing624/medical, the folder reward",
    licence="Apache-2.0", size="3,800 pairs", downloads=hugging_face("shibing624/medical", "reward/train.json"),
)  # fmt: skip
def medical(file: SourceFile) -> Iterator[dict]:
    """{"question": "…", "response_chosen": "…", "response_rejected": "…"} per line; some chosen answers are the worse"""
    for record in file.json_objects():
        if file.has(record, "question", "response_chosen", "response_rejected"):
            prompt = [message("user", record["question"])]
            yield _pair(prompt, record["response_chosen"], record["response_rejected"])


@preference_reader("oasst", files=JSON_FILES, source="OASST1 as LLaMA-Factory ranks it", licence="Apache-2.0")
def oasst(file: SourceFile) -> Iterator[dict]:
    """{"instruction": "…", "input": "", "output": ["best", …, "worst"], "history": [["question", "answer"], …]}

    Of the ranked answers the first is chosen and the last rejected: the pair that people were surest of. One pair per
    question keeps a question with ten answers from counting forty-five times.
    """
    for record in file.json_objects():
        if file.has(record, "instruction", "output"):
            answers = record["output"] if isinstance(record["output"], list) else []
            if len(answers) < 2:
                file.skip("fewer than two answers")
            else:
                yield _pair(alpaca_prompt(record), answers[0], answers[-1])


@preference_reader(
    "minimind", files=("dpo*.jsonl",), source="https://huggingface.co/datasets/jingyaogong/minimind_dataset",
    licence="Apache-2.0", downloads=hugging_face("jingyaogong/minimind_dataset", "dpo.jsonl"),
)  # fmt: skip
def minimind(file: SourceFile) -> Iterator[dict]:
    """{"chosen": [{"role": "user", "content": "…"}, …], "rejected": […]}: two whole dialogues that differ at the end"""
    for record in file.json_objects():
        if file.has(record, "chosen", "rejected"):
            chosen, rejected = dialogue(record["chosen"]), dialogue(record["rejected"])
            if chosen[:-1] != rejected[:-1]:
                file.skip("the two dialogues differ before the last answer")
            else:
                yield _pair(chosen[:-1], chosen[-1:], rejected[-1:])


@preference_reader("messages", files=JSON_FILES, source="Cria's own layout", licence="yours")
def messages(file: SourceFile) -> Iterator[dict]:
    """{"prompt": [{"role": "user", "content": "…"}, …], "chosen": "…", "rejected": "…"}; prompt may be one string"""
    for record in file.json_objects():
        if file.has(record, "prompt", "chosen", "rejected"):
            prompt = record["prompt"]
            prompt = [message("user", prompt)] if isinstance(prompt, str) else dialogue(prompt)
            yield _pair(prompt, record["chosen"], record["rejected"])


@preference_reader(
    "textbook", files=("dpo.jsonl",), source="python data_process.py textbook", licence="this repository's", size="as you ask"
)  # fmt: skip
def textbook(file: SourceFile) -> Iterator[dict]:
    """the folder of the built-in textbook: dpo.jsonl with {"prompt": […], "chosen": "…", "rejected": "…"} per line"""
    yield from messages(file)


def _pair(prompt: list[dict], chosen, rejected) -> dict:
    """An answer is a string, or one turn of a dialogue, or a list of one turn."""
    return {"prompt": prompt, "chosen": _answer(chosen), "rejected": _answer(rejected)}


def _answer(answer) -> str:
    turns = dialogue([answer] if isinstance(answer, dict) else answer)
    return tidy(turns[-1]["content"] if turns else answer)


def tidy_preference(record: dict) -> tuple[dict | None, str]:
    """-> (the record with all texts tidy, "") or (None, what is wrong with it).

    The prompt has to be [system,] user, assistant, …, user, nothing of it empty; the answers not empty and not equal.
    """
    chosen, rejected = tidy(record["chosen"]), tidy(record["rejected"])
    if not record["prompt"] or record["prompt"][-1].get("role") != "user":
        return None, "the prompt does not end on a question"
    if not chosen or not rejected:
        return None, "empty chosen answer" if not chosen else "empty rejected answer"
    if chosen == rejected:
        return None, "chosen and rejected are the same"
    turns, problem = tidy_conversation([*record["prompt"], message("assistant", chosen)])
    if problem:
        return None, f"prompt: {problem}"
    return {"prompt": turns[:-1], "chosen": chosen, "rejected": rejected}, ""
