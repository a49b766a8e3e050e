"""Readers of pretraining corpora. Each yields the text of one document after the other.

A reader's docstring begins with the layout in one line (the table of `data_process.py list`), then the quirks.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from readers import INSTRUCTIONS, SourceFile, hugging_face, instructions, pretraining_reader, tidy
from readers.instructions import JSON_FILES, dicts

# ----------------------------------------------------------------------------------------------------------------------
# Your own texts


@pretraining_reader("txt", files=("*.txt", "*.md"), source="your own texts, one file per document", licence="yours")
def txt(file: SourceFile) -> Iterator[str]:
    """a text or Markdown file, or a folder of them: each file is one document"""
    if file.name.endswith(".md"):
        yield from markdown(file)
    else:
        yield file.text()


@pretraining_reader("markdown", files=("*.md", "*.markdown"), source="your own texts, notes, wikis", licence="yours")
def markdown(file: SourceFile) -> Iterator[str]:
    """a Markdown file, or a folder of them: each file is one document, without its YAML header

    The header (`---`, `name: value` and so on, `---`) is about the page, not part of it.
    """
    yield re.sub(r"\A---\n(?=[\w-]+:\s).*?^---\s*$", "", file.text(), flags=re.DOTALL | re.MULTILINE)


@pretraining_reader("lines", files=("*.txt",), source="your own texts, one line per document", licence="yours")
def lines(file: SourceFile) -> Iterator[str]:
    """a text file, or a folder of them: each line is one document (empty lines part them)"""
    for line in file.lines():
        if not line.isspace():
            yield line


@pretraining_reader(
    "jsonl", files=JSON_FILES, source="the common layout (minimind, SkyPile); your own", licence="yours"
)
def jsonl(file: SourceFile) -> Iterator[str]:
    """{"text": "…"} per line, or a JSON array of such objects; other fields are not used"""
    for record in file.json_objects():
        if file.has(record, "text"):
            yield record["text"]


@pretraining_reader("csv", files=("*.csv",), source="your own tables", licence="yours")
def csv(file: SourceFile) -> Iterator[str]:
    """a table with the column text; a header line is needed, other columns are not used"""
    for row in file.csv_rows():
        if file.has(row, "text"):
            yield row["text"]


@pretraining_reader("parquet", files=("*.parquet",), source="your own; many sets on the Hugging Face hub")
def parquet(file: SourceFile) -> Iterator[str]:
    """Parquet files with the column text; other columns are not used"""
    for row in file.parquet_rows():
        if file.has(row, "text"):
            yield row["text"]


@pretraining_reader(
    "textbook", files=("pretrain.jsonl",), source="python data_process.py textbook", licence="this repository's", size="as you ask"
)  # fmt: skip
def textbook(file: SourceFile) -> Iterator[str]:
    """the folder of the built-in textbook: pretrain.jsonl with {"text": "…"} per line"""
    yield from jsonl(file)


# ----------------------------------------------------------------------------------------------------------------------
# Encyclopedias and the web


@pretraining_reader(
    "wikipedia-cn", files=JSON_FILES, licence="CC BY-SA 3.0", size="524 MB, about 250,000 articles",
    source="https://huggingface.co/datasets/pleisto/wikipedia-cn-20230720-filtered",
    downloads=hugging_face("pleisto/wikipedia-cn-20230720-filtered", "wikipedia-cn-20230720-filtered.json"),
)  # fmt: skip
def wikipedia_cn(file: SourceFile) -> Iterator[str]:
    """[{"completion": "…", "source": "wikipedia.zh2307"}, …], one JSON array"""
    for record in file.json_objects():
        if file.has(record, "completion"):
            yield record["completion"]


@pretraining_reader(
    "baidubaike", files=JSON_FILES, licence="none stated", size="16 GB, 5,634,898 articles",
    source="https://huggingface.co/datasets/xuqinyang/BaiduBaike-5.63M",
    downloads=hugging_face("xuqinyang/BaiduBaike-5.63M", "563w_baidubaike.json"),
)  # fmt: skip
def baidubaike(file: SourceFile) -> Iterator[str]:
    """{"title": "…", "summary": "…" or null, "sections": [{"title": "…", "content": "…"}], …} per line

    The text is 标题：摘要 and then, each on a new line, 小标题：内容. A summary that is null leaves the title (others lost
    both); a summary or content that begins with its title does not get it once more; a section without content goes.
    Parts are separated by line ends, so none gets a second 。 at its end. Citation marks such as [1] are left to
    cleaning.py.
    """
    for record in file.json_objects():
        if file.has(record, "title", "sections"):
            sections = [part for part in dicts(record["sections"]) if tidy(part.get("content"))]
            parts = [_titled(part.get("title"), "：", part["content"]) for part in sections]
            yield "\n".join(filter(None, [_titled(record["title"], "：", record.get("summary")), *parts]))


def _titled(title, mark: str, text) -> str:
    """title + mark + text; only the text if it begins with the title, only the one that is there if one is missing."""
    title, text = tidy(title), tidy(text)
    return text if text.startswith(title) else f"{title}{mark}{text}" if text else title


@pretraining_reader(
    "wudao", files=("part-*.json",), source="https://data.baai.ac.cn/details/WuDaoCorporaText",
    licence="the publisher's agreement", size="200 GB (64 GB packed)",
)  # fmt: skip
def wudao(file: SourceFile) -> Iterator[str]:
    """a folder of files part-*.json, each an array of {"title": "…", "content": "…", "dataType": "…"}: WuDao 2.0

    The title stands on a line of its own, unless the content begins with it. The files are sorted by category.
    """
    for record in file.json_objects():
        if file.has(record, "title", "content"):
            yield _titled(record["title"], "\n", record["content"])


@pretraining_reader(
    "c4", files=JSON_FILES, source="https://huggingface.co/datasets/allenai/c4, multilingual/c4-zh.*", licence="ODC-BY",
)  # fmt: skip
def c4(file: SourceFile) -> Iterator[str]:
    """a folder of JSON lines (also .gz): {"text": "…", "timestamp": "…", "url": "…"}; web pages, many of them noise"""
    yield from jsonl(file)


# ----------------------------------------------------------------------------------------------------------------------
# Medicine: the parts of shibing624/medical. Each reader finds its own files in the folder of the whole set.

MEDICAL = "https://huggingface.co/datasets/shibing624/medical"


@pretraining_reader(
    "medical-encyclopedia", files=("train_encyclopedia.json",), source=f"{MEDICAL}, the folder pretrain",
    licence="Apache-2.0", size="361,420 entries",
    downloads=hugging_face("shibing624/medical", "pretrain/train_encyclopedia.json"),
)  # fmt: skip
def medical_encyclopedia(file: SourceFile) -> Iterator[str]:
    """{"text": "…"} per line; the file is named .json"""
    yield from jsonl(file)


@pretraining_reader(
    "medical-book", files=("medical_book*.json",), source=f"{MEDICAL}, the folder pretrain", licence="Apache-2.0",
    size="8,475 pieces of books", downloads=hugging_face("shibing624/medical", "pretrain/medical_book_zh.json"),
)  # fmt: skip
def medical_book(file: SourceFile) -> Iterator[str]:
    """{"text": "…"} per line; the books were cut every 2048 characters, so a piece may begin within a sentence"""
    yield from jsonl(file)


@pretraining_reader(
    "medical-qa", files=INSTRUCTIONS["medical"].files, source=f"{MEDICAL}, the folder finetune",
    licence="Apache-2.0", size=INSTRUCTIONS["medical"].size,
    downloads=INSTRUCTIONS["medical"].downloads,
)  # fmt: skip
def medical_qa(file: SourceFile) -> Iterator[str]:
    """{"instruction": "…", "input": "…", "output": "…"} per line; question and answer are one document"""
    for turns in instructions.medical(file):
        yield "\n".join(tidy(turn["content"]) for turn in turns)


# ----------------------------------------------------------------------------------------------------------------------
# Others


@pretraining_reader(
    "role-text", files=JSON_FILES, source="https://github.com/nilboy/chinese-llama-65b", licence="none stated",
)  # fmt: skip
def role_text(file: SourceFile) -> Iterator[str]:
    """[{"text": "…"}] per line: the lists of one element in the layout of sft's role-text; dialogues are left out"""
    for turns in instructions.role_text_lists(file):
        if len(turns) == 1:
            yield turns[0]["text"]
        else:
            file.skip("a dialogue, not a plain text (sft reads it)")


@pretraining_reader(
    "chinese-poetry", files=("*.json",), source="https://github.com/chinese-poetry/chinese-poetry", licence="MIT",
    size="about 330,000 poems",
)  # fmt: skip
def chinese_poetry(file: SourceFile) -> Iterator[str]:
    """folders of poems: [{"title": "…", "author": "…", "paragraphs": ["…"]}], each folder with its own names

    The title is `title` (全唐诗), `rhythmic` (宋词), `chapter` (论语, 四书五经) or `name` (lives of the poets).
    The lines are `paragraphs`, `para` (纳兰性德), `content` (诗经, 楚辞; one string in 幽梦影) or `desc` (lives).
    Most files are arrays; 大学, 中庸 and 蒙学 are one object. In 蒙学 `content` nests: book → part → chapter, each with
    a title of its own; there every innermost chapter is a document. 论语 and 楚辞 have CRLF line ends.
    全唐诗 is in traditional characters, 宋词 in simplified. Files without verse (`rank/`, `strains/`) come out empty.
    """
    for record in file.json_objects():
        yield from _poems(record)


def _poems(work: dict, book: dict | None = None) -> Iterator[str]:
    """One document per innermost work: title, author and lines, each on a line of its own."""
    body = _list(_first(work, "paragraphs", "content", "para", "desc"))
    parts = [part for part in body if isinstance(part, dict)]
    if any(_first(part, "title", "chapter", "type") for part in parts):
        for part in parts:
            yield from _poems(part, book or work)
        return
    title, author = _first(work, "title", "rhythmic", "chapter", "name"), _first(work, "author")
    if book and not author:  # the chapter of one author's book, 一東 of 聲律啓蒙, not a poem in an anthology
        title, author = f"{_first(book, 'title')}·{title}", _first(book, "author")
    # A poem may be a cycle, whose parts have a `subchapter` each (千家詩).
    lines = [part for part in body if isinstance(part, str)]
    for part in parts:
        lines += [_first(part, "subchapter"), *_list(_first(part, "paragraphs"))]
    head = [title, _first(work, "subchapter"), author]
    yield "\n".join(line for line in [*head, *lines] if line and isinstance(line, str)) if lines else ""


def _first(record: dict, *names: str):
    """The first of these fields that is there and not empty; '' if none is."""
    return next((record[name] for name in names if record.get(name)), "")


def _list(value) -> list:
    return value if isinstance(value, list) else [value] if value else []
