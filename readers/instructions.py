"""Readers of instruction sets. Each yields one conversation after the other: [{"role": …, "content": …}, …].

Roles are system, user and assistant. A reader only brings a record into this form; `tidy_conversation` then drops what
is empty or has no answer, for all of them.
"""

from __future__ import annotations

from collections.abc import Iterator

from readers import SourceFile, instruction_reader, tidy

JSON_FILES = ("*.json", "*.jsonl")
ROLES = {"human": "user", "gpt": "assistant"}  # ShareGPT's names; all other names stay as they are


@instruction_reader("alpaca", files=JSON_FILES, source="alpaca-zh, BELLE, ruozhiba, shibing624/medical, oasst …")
def alpaca(file: SourceFile) -> Iterator[list[dict]]:
    """{"instruction": "…", "input": "…", "output": "…"}, a JSON array or one per line

    `input` is empty, null or missing in most records; where it is not, it follows the instruction on a new line (as in
    Stanford's template and LLaMA-Factory; Baby-Llama2-Chinese joined them with nothing between). `history`, where
    there is one, is [[question, answer], …] of the turns before; `system` a system text.
    """
    for record in file.json_objects():
        if file.has(record, "instruction", "output"):
            history = [pair for pair in record.get("history") or [] if isinstance(pair, list)]
            turns = [turn for pair in history for turn in zip(("user", "assistant"), pair)]
            prompt = "\n".join(filter(None, (tidy(record["instruction"]), tidy(record.get("input")))))
            turns += [("user", prompt), ("assistant", record["output"])]
            system = [("system", record["system"])] if record.get("system") else []
            yield [{"role": role, "content": content} for role, content in system + turns]


@instruction_reader("messages", files=JSON_FILES, source="OpenAI's layout, ShareGPT, minimind …")
def messages(file: SourceFile) -> Iterator[list[dict]]:
    """{"messages": [{"role": "user", "content": "…"}, …]}, or `conversations`, or `from` and `value`

    A JSON array or one per line. ShareGPT calls the roles human and gpt; `system` may be a field beside the turns.
    """
    for record in file.json_objects():
        field = "conversations" if "conversations" in record else "messages"
        if not file.has(record, field):
            continue
        turns = [turn for turn in record[field] or [] if isinstance(turn, dict)]
        if isinstance(record.get("system"), str) and record["system"]:
            turns = [{"role": "system", "content": record["system"]}, *turns]
        yield [
            {"role": ROLES.get(role, role), "content": turn.get("content", turn.get("value"))}
            for turn in turns
            for role in [turn.get("role", turn.get("from"))]
        ]


@instruction_reader("textbook", files=("sft.jsonl",), source="python data_process.py textbook --out data/textbook")
def textbook(file: SourceFile) -> Iterator[list[dict]]:
    """the folder of the built-in textbook: sft.jsonl with {"messages": […]} per line"""
    yield from messages(file)


def tidy_conversation(messages: list[dict]) -> tuple[list[dict], str]:
    """-> (the usable part, what was wrong). The usable part is [system,] then user, assistant, user, assistant …

    It ends before the first turn that is empty or out of order, and with an answer; if there is none it is empty.
    """
    turns = [(message["role"], tidy(message["content"])) for message in messages]
    if any(role not in ("system", "user", "assistant") for role, _ in turns):
        return [], "a role other than system, user, assistant"
    if not any(role == "assistant" for role, _ in turns):
        return [], "no assistant turn"
    problem = ""
    kept = []
    if turns[0][0] == "system":
        kept = turns[:1] if turns[0][1] else []
        turns = turns[1:]
    while turns[0][0] == "assistant" and len(turns) > 1:  # ShareGPT's parts of long dialogues may begin with an answer
        turns, problem = turns[1:], "began with an answer"
    start = len(kept)
    for role, content in turns:
        expected = "assistant" if (len(kept) - start) % 2 else "user"
        if role != expected or not content:
            empty = "empty answer" if role == "assistant" else "empty question"
            problem = "roles out of order" if content else empty
            break
        kept.append((role, content))
    if (len(kept) - start) % 2:
        kept.pop()
        problem = problem or "last question without an answer"
    if len(kept) == start:
        return [], problem
    return [{"role": role, "content": content} for role, content in kept], problem
