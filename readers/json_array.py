"""One JSON array of any size, element by element, through a sliding buffer of about BLOCK bytes."""

from __future__ import annotations

from settings import UserError

import codecs
import json
import re
from collections.abc import Iterator

BLOCK = 1 << 20  # bytes per read; it grows only while one record is longer than that
_SPACE = re.compile(r"[ \t\r\n]*")


class JsonArray:
    """The elements of the one JSON array that is a `SourceFile`.

    Takes the file's stream, its codec and the offset at which the text starts, and keeps its `line` up to date.

    Raises UserError with file and line where it is not JSON, is cut off, or goes on after its end.
    """

    def __init__(self, file):
        self._file, self._json = file, json.JSONDecoder()
        self._decoder = codecs.getincrementaldecoder(file.codec)()
        self._offset = file.start  # bytes of the file decoded so far
        self._text, self._at = "", 0  # the buffer, and where in it the next character to look at is
        self._counted = 0  # up to where in the buffer the line ends are counted in file.line

    def __iter__(self) -> Iterator:
        self._file.line = 1
        self._skip_mark("[")
        if self._next_character() != "]":
            yield self._element()
            while self._next_character() == ",":
                self._at += 1
                yield self._element()
        self._skip_mark("]")
        rest = (self._text[self._at :] + self._file.stream.read(BLOCK).decode(self._file.codec, "replace")).strip()
        if rest:
            raise UserError(f"{self._file.where()}: text after the end of the JSON array: {rest[:40]!r}")

    def _element(self):
        while True:
            self._next_character()
            try:
                element, end = self._json.raw_decode(self._text, self._at)
            except json.JSONDecodeError as error:
                # Is the JSON wrong, or does it just go on in the next block? Words and escapes are shorter than 16.
                open_string = error.msg.startswith("Unterminated string")
                if (open_string or error.pos >= len(self._text) - 16) and self._refill():
                    continue
                if open_string or error.pos == len(self._text):
                    raise self._cut_off() from None
                self._file.line += self._text.count("\n", self._at, error.pos)
                raise UserError(f"{self._file.where()}: not valid JSON: {error.msg}") from None
            except (ValueError, RecursionError) as error:
                what = "brackets nested too deeply" if isinstance(error, RecursionError) else "a number of thousands of digits"
                raise UserError(f"{self._file.where()}: not valid JSON: {what}") from None
            if end == len(self._text) and self._refill():
                continue  # a number at the end of the block may go on in the next
            self._at = end
            return element

    def _skip_mark(self, mark: str) -> None:
        found = self._next_character()
        if found != mark:
            raise UserError(f"{self._file.where()}: not valid JSON: expected {mark!r} or a comma, found {found!r}")
        self._at += 1

    def _next_character(self) -> str:
        """The next character that is no white space; it stays the next one. Keeps file.line up to date."""
        while True:
            self._at = _SPACE.match(self._text, self._at).end()
            self._file.line += self._text.count("\n", self._counted, self._at)
            self._counted = self._at
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._refill():
                raise self._cut_off()

    def _refill(self) -> bool:
        """Drop what is behind us, append the next block; False at the end of the file.

        A block is as long as what is still unread, so a long record costs a number of attempts that is logarithmic.
        """
        rest = self._text[self._at :]
        block = self._file.stream.read(max(BLOCK, len(rest)))
        held = len(self._decoder.getstate()[0])  # bytes of a character that the block before cut in two
        try:
            text = self._decoder.decode(block, not block)
        except UnicodeDecodeError as error:
            line = self._file.line + rest.count("\n")
            raise self._file.not_decoded(error, self._offset - held, line) from None
        self._text, self._at, self._counted = rest + text, 0, 0
        self._offset += len(block)
        return bool(block)

    def _cut_off(self) -> UserError:
        return UserError(f"{self._file.where()}: the JSON array is cut off: the file ends at byte {self._offset:,}")
