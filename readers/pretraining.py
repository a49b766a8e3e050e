"""Readers of pretraining corpora. Each yields the text of one document after the other.

A reader's docstring begins with the layout in one line (the table of `data_process.py list`), then the quirks.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from readers import SourceFile, pretraining_reader

JSON_FILES = ("*.json", "*.jsonl")


@pretraining_reader("txt", files=("*.txt", "*.md"), source="your own texts, one file per document")
def txt(file: SourceFile) -> Iterator[str]:
    """a text or Markdown file, or a folder of them: each file is one document

    The YAML header of a Markdown file (`---` … `---`) is about the page, not part of it, and left out.
    """
    text = file.text()
    if file.path.suffix == ".md":
        text = re.sub(r"\A---\n.*?^---\s*$", "", text, flags=re.DOTALL | re.MULTILINE)
    yield text


@pretraining_reader("lines", files=("*.txt",), source="your own texts, one line per document")
def lines(file: SourceFile) -> Iterator[str]:
    """a text file, or a folder of them: each line is one document (empty lines part them)"""
    for line in file.lines():
        if not line.isspace():
            yield line


@pretraining_reader("jsonl", files=JSON_FILES, source="the common layout: C4, minimind, shibing624/medical …")
def jsonl(file: SourceFile) -> Iterator[str]:
    """{"text": "…"} per line, or a JSON array of such objects; other fields are not used"""
    for record in file.json_objects():
        if file.has(record, "text"):
            yield record["text"]


@pretraining_reader("csv", files=("*.csv",), source="your own tables")
def csv(file: SourceFile) -> Iterator[str]:
    """a table with the column text; a header line is needed, other columns are not used"""
    for row in file.csv_rows():
        if file.has(row, "text"):
            yield row["text"]


@pretraining_reader("textbook", files=("pretrain.jsonl",), source="python data_process.py textbook --out data/textbook")
def textbook(file: SourceFile) -> Iterator[str]:
    """the folder of the built-in textbook: pretrain.jsonl with {"text": "…"} per line"""
    yield from jsonl(file)


@pretraining_reader("chinese-poetry", files=("*.json",), source="https://github.com/chinese-poetry/chinese-poetry")
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
    body = _first(work, "paragraphs", "content", "para", "desc")
    body = body if isinstance(body, list) else [body] if body else []
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
        lines += [_first(part, "subchapter"), *(_first(part, "paragraphs") or [])]
    yield "\n".join(line for line in [title, _first(work, "subchapter"), author, *lines] if line) if lines else ""


def _first(record: dict, *names: str):
    """The first of these fields that is there and not empty; '' if none is."""
    return next((record[name] for name in names if record.get(name)), "")
