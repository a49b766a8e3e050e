"""Tables whose columns line up although a Chinese character takes two places, on the terminal and in Markdown."""

from __future__ import annotations

import unicodedata


def display_width(text: str) -> int:
    """Columns of a terminal: Chinese characters take two, combining marks none."""
    return sum(0 if unicodedata.combining(char) else 2 if unicodedata.east_asian_width(char) in "WF" else 1
               for char in text)  # fmt: skip


def _padded(rows, right, least: int = 0) -> list[list[str]]:
    """The cells of every row, as wide as the widest of their column, at least `least`."""
    lines = [[str(cell) for cell in row] for row in rows]
    widths = [max(least, *map(display_width, column)) for column in zip(*lines)]

    def pad(column: int, cell: str) -> str:
        space = " " * (widths[column] - display_width(cell))
        return space + cell if column in right else cell + space

    return [[pad(column, cell) for column, cell in enumerate(line)] for line in lines]


def print_table(header, rows, right=()) -> None:
    """Print `rows` under `header`, columns as wide as their widest cell; those numbered in `right` align to the right.

    Cells may be of any type; str() shows them.
    """
    for cells in _padded((header, *rows), right):
        print("  ".join(cells).rstrip())


def markdown_table(header, rows, right=()) -> list[str]:
    """The lines of the same table in Markdown, which lines up as text too."""
    header, *rows = _padded((header, *rows), right, least=3)
    rule = ["-" * (display_width(cell) - 1) + (":" if column in right else "-") for column, cell in enumerate(header)]
    return [f"| {' | '.join(cells)} |" for cells in (header, rule, *rows)]
