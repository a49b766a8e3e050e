"""What a run of data_process.py did with every record: on the terminal, and as report.md beside the data.

    checked(report)           the same report, if its numbers add up
    print_report(report)      the terminal: tables, and one line per problem with its first example
    report_markdown(report)   report.md: the same at length, with examples and bar charts

The report is a dict; report.json holds it. Every record that was read is in one of these places, for every source:

    records == unreadable + dropped + exact and near duplicates + not_sampled + kept

`kept` counts distinct documents, `written` what is in the files, where a source of weight 2 stands twice.
"""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path

from tables import display_width, markdown_table, print_table

UNITS = {"pretrain": "documents", "sft": "conversations", "preferences": "pairs"}
KINDS = {"unreadable": "Unreadable records", "dropped": "Dropped records", "changed": "Mended records"}
BAR = 40  # columns of the longest bar
EXAMPLES = 3  # in report.md, of each rule of each source
EIGHTHS = " ▏▎▍▌▋▊▉"  # a column is eight steps wide

# ----------------------------------------------------------------------------------------------------------------------
# The numbers


def checked(report: dict) -> dict:
    """`report` itself. Raises AssertionError if a record is unaccounted for, or more or fewer were written than are there."""
    for source in report["sources"]:
        parts = {**_left_out(source), "kept": source["kept"]}
        if source["records"] != sum(parts.values()):
            said = " + ".join(f"{count:,} {part}" for part, count in parts.items())
            raise AssertionError(f"{source_name(source)}: {source['records']:,} records, but {said} = {sum(parts.values()):,}")
    written = sum(source["written"] for source in report["sources"])
    stored = sum(split["documents"] for split in report["splits"].values())
    if written != stored:
        raise AssertionError(f"{written:,} {UNITS[report['command']]} written, but {stored:,} in the splits")
    return report


def source_name(source: dict) -> str:
    """baidubaike=563w_baidubaike.json, with the weight as it stands on the command line."""
    weight = "" if source["weight"] == 1 else f":{source['weight']:g}"
    return f"{source['name']}{weight}={source['path']}"


def _short_name(source: dict, width: int) -> str:
    """source_name in at most `width` columns: of a long path the end tells more than the beginning."""
    name, path = source_name(source).split("=", 1)
    room = width - display_width(name) - 1
    if display_width(path) > room:
        while display_width(path) > max(room - 1, 8):
            path = path[1:]
        path = "…" + path
    return _cut(f"{name}={path}", width)


def _count(rules: dict) -> int:
    return sum(rule["count"] for rule in rules.values())


def _left_out(source: dict) -> dict[str, int]:
    """What became of the records that were not kept."""
    duplicates = source["duplicates"]
    return {"unreadable": _count(source["unreadable"]), "dropped": _count(source["dropped"]),
            "exact duplicates": duplicates["exact"], "near duplicates": duplicates["near"],
            "not sampled": source["not_sampled"]}  # fmt: skip


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.2%}" if whole else "–"


def _tables(report: dict, width: int) -> tuple[tuple, tuple]:
    """(header, rows) of what happened to the records of each source, and of what is in each split. Empty columns go."""
    rows = [{"source": _short_name(source, width), "files": source["files"], "MB": source["input_bytes"] / 1e6,
             "records": source["records"], **_left_out(source), "kept": source["kept"], "written": source["written"]}
            for source in report["sources"]]  # fmt: skip
    if len(rows) > 1:
        rows.append({name: "together" if name == "source" else sum(row[name] for row in rows) for name in rows[0]})
    if all(row["written"] == row["kept"] for row in rows):
        for row in rows:
            del row["written"]
    always = ("source", "files", "MB", "records", "kept")
    names = [name for name in rows[0] if name in always or any(row[name] for row in rows)]
    records = names, [[_number(row[name]) for name in names] for row in rows]

    unit = UNITS[report["command"]]
    rows = [{"split": name, unit: split["documents"], "tokens": split.get("tokens"), "MB of text": split["bytes"] / 1e6,
             "characters": split["characters"], "characters per token": _ratio(split["characters"], split.get("tokens"))}
            for name, split in report["splits"].items()]  # fmt: skip
    names = [name for name in rows[0] if any(row[name] is not None for row in rows)] if rows else []
    return records, (names, [[_number(row[name]) for name in names] for row in rows])


def _ratio(one: float, other: float | None) -> float | None:
    return one / other if other else None


def _number(value) -> str:
    return f"{value:,.2f}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value or "–")


# ----------------------------------------------------------------------------------------------------------------------
# Text that breaks neither a terminal nor a table


def _cut(text, width: int) -> str:
    """On one line, without control characters and half surrogate pairs, at most `width` columns wide."""
    text = re.sub(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]", "�", " ".join(str(text).split()))
    if display_width(text) <= width:
        return text
    room, end = width - 1, 0
    while (room := room - display_width(text[end])) >= 0:
        end += 1
    return text[:end].rstrip() + "…"


def _escaped(text: str) -> str:
    """Text as one cell of a Markdown table."""
    return re.sub(r"([\\`*_\[\]<>|~$&#])", r"\\\1", text)


def _padded(text: str, width: int) -> str:
    return text + " " * (width - display_width(text))


def bars(rows: list[tuple[str, int]]) -> list[str]:
    """A bar chart: (label, count) -> lines. The largest count has BAR columns; labels may be Chinese."""
    largest, total = max(count for _, count in rows), sum(count for _, count in rows)
    label_width = max(display_width(label) for label, _ in rows)
    count_width = max(len(f"{count:,}") for _, count in rows)
    lines = []
    for label, count in rows:
        full, part = divmod(round(count / largest * BAR * 8) if largest else 0, 8)
        bar = "█" * full + EIGHTHS[part].strip()
        lines.append(f"{_padded(label, label_width)}  {bar:<{BAR}}  {count:>{count_width},}  {_share(count, total):>7}")
    return lines


# ----------------------------------------------------------------------------------------------------------------------
# The terminal


def print_report(report: dict, out: Path, seconds: float, workers: int = 0, resumed: bool = False) -> None:
    """Print the tables, then every reason why records were left out or changed, with its first example.

    Without workers the input was not read in this run, but joined from shards.
    """
    records, splits = _tables(report, width=48)
    for header, rows in (records, splits):
        print_table(header, rows, right=range(1, len(header)))
        print()
    problems = []  # (kind, why, source, count, first example)
    for source in report["sources"]:
        for kind in KINDS:
            problems += [(kind, why, source, rule["count"], _example(rule)) for why, rule in source[kind].items()]
        for kind in ("exact", "near"):
            texts = [example["text"] for example in source["duplicates"]["examples"] if example["kind"] == kind]
            problems.append(("dropped", f"{kind} duplicate", source, source["duplicates"][kind], "".join(texts[:1])))
    rows = [(kind, _cut(why, 40), _short_name(source, 24), f"{count:,}", _share(count, source["records"]), _cut(text, 48))
            for kind, why, source, count, text in problems if count]  # fmt: skip
    if rows:
        print_table(("", "why", "source", "records", "", "first example"), rows, right=(3, 4))
        print()
    size = sum(source["input_bytes"] for source in report["sources"]) / 1e6
    speed = "; it went on with an earlier run" if resumed else f", {size / seconds:.1f} MB/s"
    how = f" with {workers} worker{'s' * (workers != 1)}{speed}" if workers else " to merge the shards"
    print(f"{size:,.1f} MB of input, {seconds:.1f} s{how}")
    print(f"the full report: {out / 'report.md'}")


def _example(rule: dict) -> str:
    """The first example of a rule: its place without the folders, and its text if there is one."""
    return next((f"{re.sub(r'^[^ ]*/', '', e['where'])}  {e['text']}".rstrip() for e in rule["examples"]), "")


# ----------------------------------------------------------------------------------------------------------------------
# report.md


def report_markdown(report: dict) -> str:
    """The whole report in Markdown."""
    records, splits = _tables(report, width=100)
    size = sum(source["input_bytes"] for source in report["sources"]) / 1e6
    lines = [f"# What `data_process.py {report['command']}` made of {size:,.1f} MB of input", ""]
    lines += _section("What was written", _table(*splits, right=range(1, 9)))
    lines += _section("What happened to the records", _table(*records, right=range(1, 20)))
    lines += _section("Encodings other than UTF-8", _encodings(report))
    for kind, title in KINDS.items():
        lines += _section(title, _rules(report, kind))
    lines += _section("Duplicates", _duplicates(report))
    lines += _section("Questions of the evaluation set", _questions(report))
    lines += _section(f"Lengths in {report['lengths']['unit']}", _chart(_histogram(report["lengths"])))
    for name, split in report["splits"].items():
        unit = {"pretrain": "tokens", "sft": "answers", "preferences": "pairs"}[report["command"]]
        shares = [(_short_name(source, 48), count) for source, count in zip(report["sources"], split["sources"]) if count]
        lines += _section(f"Sources of {name}, by {unit}", _chart(shares))
    settings = json.dumps(_short(report["settings"]), indent=2, ensure_ascii=False)
    lines += _section("Settings", ["```json", *settings.split("\n"), "```"])
    return "\n".join(lines).rstrip() + "\n"


def _section(title: str, body: list[str]) -> list[str]:
    return [f"## {title}", "", *body, ""] if body else []


def _table(header, rows, right=()) -> list[str]:
    return markdown_table(header, [[_escaped(str(cell)) for cell in row] for row in rows], right) if rows else []


def _chart(rows: list[tuple[str, int]]) -> list[str]:
    return ["```text", *bars(rows), "```"] if len(rows) > 1 else []


def _encodings(report: dict) -> list[str]:
    rows = [(_short_name(source, 100), encoding, f"{count:,}") for source in report["sources"]
            for encoding, count in source["encodings"].items() if encoding not in ("utf-8", "utf-8-sig")]  # fmt: skip
    return _table(("source", "encoding", "files"), rows, right=(2,))


def _rules(report: dict, kind: str) -> list[str]:
    """A chart of the rules over all sources, and a table of every rule of every source with its examples."""
    totals, rows = {}, []
    for source in report["sources"]:
        for reason, rule in source[kind].items():
            if not rule["count"]:
                continue
            totals[reason] = totals.get(reason, 0) + rule["count"]
            cells = [_cut(reason, 60), _short_name(source, 48), f"{rule['count']:,}", _share(rule["count"], source["records"])]
            examples = [(_cut(e["where"], 60), _cut(e["text"], 80)) for e in rule["examples"][:EXAMPLES]] or [("", "")]
            rows += [[*cells, *examples[0]], *(["", "", "", "", *example] for example in examples[1:])]
    chart = _chart(sorted(((_cut(reason, 60), count) for reason, count in totals.items()), key=lambda row: -row[1]))
    table = _table(("why", "source", "records", "share", "where", "text"), rows, right=(2, 3))
    return [*chart, "", *table] if chart else table


def _duplicates(report: dict) -> list[str]:
    rows = [(example["kind"], _short_name(source, 48), _cut(example["text"], 80), _cut(example["original"], 80))
            for source in report["sources"] for example in source["duplicates"]["examples"]]  # fmt: skip
    return _table(("kind", "source", "left out", "because of"), rows)


def _questions(report: dict) -> list[str]:
    questions = report["questions"]
    if not questions:
        return []
    dropped, shortened = (sum(source[kind].get("evaluation question", {"count": 0})["count"] for source in report["sources"])
                          for kind in ("dropped", "changed"))  # fmt: skip
    return [f"{questions['count']:,} questions were looked for, and found in {dropped + shortened:,} records: {dropped:,} were "
            f"dropped, {shortened:,} go on without the lines that held them. {questions['unused']:,} more are too short or too "
            "common to be recognised."]  # fmt: skip


def _histogram(lengths: dict) -> list[tuple[str, int]]:
    """(range, count) of every bin from the first to the last that is not empty; the last edge is open."""
    edges, counts = lengths["edges"], lengths["counts"]
    filled = [i for i, count in enumerate(counts) if count]
    labels = [f"{low:,} – {high - 1:,}" for low, high in itertools.pairwise(edges)] + [f"{edges[-1]:,} –"]
    return [(labels[i], counts[i]) for i in range(filled[0], filled[-1] + 1)] if filled else []


def _short(value):
    """Settings for people: long texts are cut, control characters gone."""
    if isinstance(value, dict):
        return {_cut(key, 100): _short(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_short(item) for item in value]
    return _cut(value, 100) if isinstance(value, str) else value
