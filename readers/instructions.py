"""Readers of instruction sets. Each yields one conversation after the other: [{"role": …, "content": …}, …].

Roles are system, user and assistant. A reader only brings a record into this form; `tidy_conversation` then drops what
is empty or has no answer, for all of them. A reader's docstring begins with the layout, then the quirks.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from readers import SourceFile, hugging_face, instruction_reader, tidy

JSON_FILES = ("*.json", "*.jsonl")
ROLES = {"human": "user", "gpt": "assistant"}  # ShareGPT's names; all other names stay as they are
TOOL_ROLES = ("tool", "function", "function_call", "observation")
CALLS_A_TOOL = "calls a tool"  # the answers rest on what the tool said, which the conversation would not show


def message(role: str, content) -> dict:
    return {"role": role, "content": content}


def dicts(value) -> list[dict]:
    """The dicts of a list; of anything else none."""
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []


# ----------------------------------------------------------------------------------------------------------------------
# Question and answer in two or three fields


@instruction_reader(
    "alpaca", files=(*JSON_FILES, "*.parquet"), source="https://huggingface.co/datasets/shibing624/alpaca-zh",
    licence="CC BY-NC 4.0", size="about 50,000 records",
    downloads=hugging_face("shibing624/alpaca-zh", "alpaca_gpt4_data_zh.json"),
)  # fmt: skip
def alpaca(file: SourceFile) -> Iterator[list[dict]]:
    """{"instruction": "…", "input": "…", "output": "…"}: JSON array, JSON lines or Parquet (Stanford's alpaca)

    `input` is empty, null or missing in most records; where it is not, it follows the instruction on a new line (as in
    Stanford's template and LLaMA-Factory; Baby-Llama2-Chinese joined them with nothing between). In alpaca-zh some
    inputs and outputs begin with the literal words 输入： and 输出：, which are left out. `history`, where there is one,
    is [[question, answer], …] of the turns before; `system` a system text. Parquet files also have a column `text`,
    the whole prompt composed once more: not used.
    """
    for record in file.rows():
        if file.has(record, "instruction", "output"):
            answer = re.sub(r"\A输出[：:]\s*", "", tidy(record["output"]))
            yield [*alpaca_prompt(record), message("assistant", answer)]


def alpaca_prompt(record: dict) -> list[dict]:
    """The messages before the answer: system, the turns of `history`, and instruction and input as the last question."""
    history = record.get("history") if isinstance(record.get("history"), list) else []
    pairs = [pair for pair in history if isinstance(pair, list)]
    turns = [message(role, text) for pair in pairs for role, text in zip(("user", "assistant"), pair)]
    given = re.sub(r"\A输入[：:]\s*", "", tidy(record.get("input")))
    question = "\n".join(filter(None, (tidy(record.get("instruction")), given)))
    return [*_system(record.get("system")), *turns, message("user", question)]


def _system(text) -> list[dict]:
    return [message("system", text)] if tidy(text) else []


@instruction_reader(
    "oasst", files=JSON_FILES, source="https://huggingface.co/datasets/OpenAssistant/oasst1 as LLaMA-Factory has it",
    licence="Apache-2.0", size="689 Chinese conversations",
)  # fmt: skip
def oasst(file: SourceFile) -> Iterator[list[dict]]:
    """{"instruction": "…", "input": "", "output": "…", "history": [["question", "answer"], …]}; history comes first"""
    yield from alpaca(file)


@instruction_reader(
    "belle", files=JSON_FILES, source="https://huggingface.co/datasets/BelleGroup/train_1M_CN (also 0.5M and 2M)",
    licence="research only", size="1 million records (0.5 and 2 million in the sisters)",
    downloads=hugging_face("BelleGroup/train_1M_CN", "Belle_open_source_1M.json"),
)  # fmt: skip
def belle(file: SourceFile) -> Iterator[list[dict]]:
    """{"instruction": "…", "input": "", "output": "…"} or {"input": "…", "target": "…"} per line

    The files are named .json but hold JSON lines. `input` is always empty, the instruction has it already. One copy of
    the 0.5M set renamed the fields to `input` and `target`. The seed tasks have their inputs and outputs in a list
    `instances`: each is a conversation.
    """
    for record in file.json_objects():
        for instance in dicts(record.get("instances")) or [{}]:
            task = {**record, **instance}
            if "target" in task:
                task = {"instruction": task.get("input"), "output": task["target"]}
            if file.has(task, "instruction", "output"):
                yield [*alpaca_prompt(task), message("assistant", task["output"])]


@instruction_reader(
    "medical", files=("train_zh_*.json", "train_en_*.json"), licence="Apache-2.0", size="1,949,972 Chinese, 116,617 English",
    source="https://huggingface.co/datasets/shibing624/medical, the folder finetune",
    downloads=hugging_face("shibing624/medical", "finetune/train_zh_0.json", "finetune/train_en_1.json"),
)  # fmt: skip
def medical(file: SourceFile) -> Iterator[list[dict]]:
    """{"instruction": "…", "input": "…", "output": "…"} per line; of English records only the input is the question

    In Chinese records the question is the instruction, with the input (mostly empty) on a new line. English ones come
    from ChatDoctor: all have the same instruction, "If you are a doctor, please answer …", which says nothing.
    Of a folder only the training files are read, not valid_* and test_*.
    """
    for record in file.json_objects():
        if file.has(record, "instruction", "output"):
            fixed = tidy(record["instruction"]).startswith("If you are a doctor")
            question = {"instruction": record.get("input")} if fixed else record
            yield [*alpaca_prompt(question), message("assistant", record["output"])]


@instruction_reader(
    "chatmed", files=JSON_FILES, source="https://huggingface.co/datasets/michaelwzhu/ChatMed_Consult_Dataset",
    licence="CC BY 4.0; the answers are GPT-3.5's", size="549,000 records",
    downloads=hugging_face("michaelwzhu/ChatMed_Consult_Dataset", "ChatMed_Consult-v0.3.json"),
)  # fmt: skip
def chatmed(file: SourceFile) -> Iterator[list[dict]]:
    """{"query": "…", "response": "…"} per line"""
    for record in file.json_objects():
        if file.has(record, "query", "response"):
            yield [message("user", record["query"]), message("assistant", record["response"])]


@instruction_reader(
    "prompt-answer", files=("*.csv", "*.parquet", *JSON_FILES),
    source="sft_data.csv of Baby-Llama2-Chinese; https://github.com/charent/ChatLM-mini-Chinese", licence="none stated",
)  # fmt: skip
def prompt_answer(file: SourceFile) -> Iterator[list[dict]]:
    """a table with the columns prompt and answer (or response): CSV, Parquet or JSON

    An answer may be the word NA, null or None; it stays a word (pandas would make it a missing number).
    """
    for row in file.rows():
        answer = "answer" if "answer" in row else "response"
        if file.has(row, "prompt", answer):
            yield [message("user", row["prompt"]), message("assistant", row[answer])]


# ----------------------------------------------------------------------------------------------------------------------
# Dialogues: a list of turns


@instruction_reader("messages", files=JSON_FILES, source="OpenAI's layout; your own chats", licence="yours")
def messages(file: SourceFile) -> Iterator[list[dict]]:
    """{"messages": [{"role": "user", "content": "…"}, …]}, a JSON array or one per line; also `conversations`

    `system` may be a field beside the turns. A dialogue that calls a tool is left out, and counted.
    """
    yield from _dialogues(file, "messages", "conversations")


@instruction_reader(
    "sharegpt", files=JSON_FILES, source="https://huggingface.co/datasets/shibing624/sharegpt_gpt4",
    licence="none stated; GPT's answers", downloads=hugging_face("shibing624/sharegpt_gpt4", "sharegpt_gpt4.jsonl"),
)  # fmt: skip
def sharegpt(file: SourceFile) -> Iterator[list[dict]]:
    """{"conversations": [{"from": "human", "value": "…"}, {"from": "gpt", "value": "…"}]}, array or one per line

    `from` may be system, `system` may be a field of its own. Parts of long dialogues begin with an answer, end with a
    question or have empty turns: `tidy_conversation` cuts them. `function_call` and `observation` are tool turns.
    """
    yield from _dialogues(file, "conversations")


@instruction_reader(
    "minimind", files=("sft_*.jsonl", "lora_*.jsonl"),
    source="https://huggingface.co/datasets/jingyaogong/minimind_dataset", licence="Apache-2.0", size="1.7 GB (mini)",
    downloads=hugging_face("jingyaogong/minimind_dataset", "sft_t2t_mini.jsonl"),
)  # fmt: skip
def minimind(file: SourceFile) -> Iterator[list[dict]]:
    """{"conversations": [{"role": "user", "content": "…"}, …]} per line

    `reasoning_content` is not used, nor are the `tools` of a system turn. `tool_calls` is JSON inside a string, beside
    an empty content; a dialogue with such a turn, or with one of the role tool, is left out, and counted.
    """
    yield from _dialogues(file, "conversations")


@instruction_reader(
    "disc-med", files=JSON_FILES, source="https://huggingface.co/datasets/Flmc/DISC-Med-SFT", licence="Apache-2.0",
    size="about 465,000 dialogues", downloads=hugging_face("Flmc/DISC-Med-SFT", "DISC-Med-SFT_released.jsonl"),
)  # fmt: skip
def disc_med(file: SourceFile) -> Iterator[list[dict]]:
    """{"conversation": [{"role": "user", "content": "…"}, …]} per line; some end on a question"""
    yield from _dialogues(file, "conversation")


def _dialogues(file: SourceFile, *fields: str) -> Iterator[list[dict]]:
    """The conversations in the first of these fields that a record has, without those that call a tool."""
    for record in file.json_objects():
        field = next((name for name in fields if name in record), fields[0])
        if not file.has(record, field):
            continue
        turns = dialogue(record[field])
        calls = any(turn.get("tool_calls") not in (None, "", "[]", []) for turn in dicts(record[field]))
        if calls or any(turn["role"] in TOOL_ROLES for turn in turns):
            file.skip(CALLS_A_TOOL)
            continue
        yield [*_system(record.get("system")), *turns]


def dialogue(turns) -> list[dict]:
    """[{"from" or "role": …, "value" or "content": …}, …] -> messages. What is no dict is left out."""
    found = [(str(turn.get("role", turn.get("from"))), turn.get("content", turn.get("value"))) for turn in dicts(turns)]
    return [message(ROLES.get(role, role), content) for role, content in found]


@instruction_reader(
    "huatuogpt", files=JSON_FILES, source="https://huggingface.co/datasets/FreedomIntelligence/HuatuoGPT-sft-data-v1",
    licence="Apache-2.0", size="226,042 dialogues",
    downloads=hugging_face("FreedomIntelligence/HuatuoGPT-sft-data-v1", "HuatuoGPT_sft_data_v1.jsonl"),
)  # fmt: skip
def huatuogpt(file: SourceFile) -> Iterator[list[dict]]:
    """{"data": ["问：…", "答：…", …]} per line

    The first two characters say whose turn it is (the colon may be an ASCII one); without them turns alternate.
    An odd last question is cut by `tidy_conversation`.
    """
    for record in file.json_objects():
        if not file.has(record, "data"):
            continue
        turns = []
        for at, text in enumerate(record["data"] if isinstance(record["data"], list) else []):
            mark, content = re.match(r"(?:([问答])[：:])?(.*)", tidy(text), re.DOTALL).groups()
            turns.append(message("assistant" if (mark or "问答"[at % 2]) == "答" else "user", content))
        yield turns


@instruction_reader(
    "moss", files=JSON_FILES, source="https://github.com/OpenMOSS/MOSS, https://huggingface.co/datasets/fnlp/moss-003-sft-data",
    licence="CC BY-NC 4.0", size="1.1 million dialogues without tools",
    downloads=hugging_face("fnlp/moss-003-sft-data", "moss-003-sft-no-tools.jsonl.zip"),
)  # fmt: skip
def moss(file: SourceFile) -> Iterator[list[dict]]:
    """{"meta_instruction": "…", "chat": {"turn_1": {"Human": "<|Human|>: …<eoh>", "MOSS": "…"}, …}}: MOSS-003

    One JSON file per dialogue, or JSON lines. The turns are a dict, ordered by their number (turn_10 after turn_9).
    The marks <|Human|>: and <eoh>, <|MOSS|>: and <eom> around the values are taken off. Inner thoughts, commands and
    tool responses are no part of the answer; a dialogue in which a command is given is left out, and counted.
    `meta_instruction` becomes the system message, as MOSS was trained: the answers speak of the role it describes.
    """
    for record in file.json_objects():
        if not file.has(record, "chat"):
            continue
        chat = record["chat"] if isinstance(record["chat"], dict) else {}
        turns = dicts([chat[name] for name in sorted(chat, key=lambda name: int(re.sub(r"\D", "", name) or 0))])
        if any(_unmarked(turn.get("Commands")) not in ("", "None") for turn in turns):
            file.skip(CALLS_A_TOOL)
            continue
        speakers = [(turn, *speaker) for turn in turns for speaker in (("user", "Human"), ("assistant", "MOSS"))]
        texts = [message(role, _unmarked(turn.get(name))) for turn, role, name in speakers]
        yield [*_system(record.get("meta_instruction")), *texts]


def _unmarked(text) -> str:
    """'<|Human|>: 你好<eoh>\\n' -> '你好'"""
    return re.sub(r"\A<\|[^|]*\|>:?\s*|\s*<eo[a-z]>\Z", "", tidy(text))


@instruction_reader(
    "role-text", files=JSON_FILES, source="https://github.com/nilboy/chinese-llama-65b", licence="none stated",
    size="8,000 sampled from OASST, ShareGPT and BELLE",
)  # fmt: skip
def role_text(file: SourceFile) -> Iterator[list[dict]]:
    """[{"role": "user", "text": "…"}, {"role": "assistant", "text": "…"}, …], one such list per line

    A list of one element is a plain text, which has no question: it is left out here, counted, and read by the
    pretraining reader of the same name.
    """
    for turns in role_text_lists(file):
        if len(turns) == 1:
            file.skip("a plain text, not a dialogue (pretrain reads it)")
        else:
            yield [message(turn.get("role"), turn.get("text")) for turn in turns]


def role_text_lists(file: SourceFile) -> Iterator[list[dict]]:
    """The lists of the layout role-text, with their elements that are no dict left out."""
    for record in file.json_values(lists=True):
        turns = dicts(record)
        if file.has(turns[0] if turns else record if isinstance(record, dict) else {}, "text"):
            yield turns


@instruction_reader(
    "textbook", files=("sft.jsonl",), source="python data_process.py textbook", licence="this repository's", size="as you ask"
)  # fmt: skip
def textbook(file: SourceFile) -> Iterator[list[dict]]:
    """the folder of the built-in textbook: sft.jsonl with {"messages": […]} per line"""
    yield from messages(file)


# ----------------------------------------------------------------------------------------------------------------------
# What happens to every conversation of every reader


def tidy_conversation(messages: list[dict]) -> tuple[list[dict], str]:
    """-> (the usable part, what was wrong). The usable part is [system,] then user, assistant, user, assistant …

    It ends before the first turn that is empty or out of order, and with an answer; if there is none it is empty.
    A content that is null or a list counts as empty.
    """
    turns = [(turn.get("role"), tidy(turn.get("content"))) for turn in messages]
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
    return [message(role, content) for role, content in kept], problem
