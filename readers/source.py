"""One input file of a corpus, opened by its content; every complaint names the file and the line."""

from __future__ import annotations

from settings import UserError

import codecs
import csv
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path

BLOCK = 1 << 20  # bytes per read of a JSON array; it grows only while one record is longer than that
LARGEST_TEXT = 64 << 20  # bytes of a file that is one document: more is nearly always one document per line
_SPACE = re.compile(r"[ \t\r\n]*")


def tidy(text) -> str:
    """What happens to every text of every reader: line ends become \\n, white space at both ends goes; None is ''."""
    return text.replace("\r\n", "\n").replace("\r", "\n").strip() if isinstance(text, str) else ""


class SourceFile:
    """One input file of a corpus. All ways to read it are streaming but `text()`, and accept a UTF-8 byte-order mark.

    Raises UserError with file and line where the file is binary, in another encoding, or a JSON array cut off.
    """

    def __init__(self, path: Path, reader_name: str, count_skipped: Callable[[str, str], None]):
        self.path, self._reader_name, self._count_skipped = path, reader_name, count_skipped
        self.line = 0  # of the current record, from 1; 0: the file as a whole
        self.first_broken = ""  # "file:line: what" of the first record that could not be parsed
        self._matched = False  # whether some record had the fields that the reader expects

    def __enter__(self) -> SourceFile:
        self._stream = open(self.path, "rb")
        self.size = self.path.stat().st_size
        head = self._stream.read(1 << 13)
        if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            raise UserError(f"{self.path} is UTF-16; convert it: iconv -f utf-16 -t utf-8")
        if 0 in head:
            raise UserError(f"{self.path} is binary (a zero byte at offset {head.index(0)}); a text file is needed")
        self._start = len(codecs.BOM_UTF8) if head.startswith(codecs.BOM_UTF8) else 0
        self._stream.seek(self._start)
        return self

    def __exit__(self, *exception) -> None:
        self._stream.close()

    def bytes_read(self) -> int:
        return self._stream.tell()

    def where(self) -> str:
        return f"{self.path}:{self.line}" if self.line else str(self.path)

    def skip(self, reason: str) -> None:
        """Count the current record as left out, and why."""
        self._count_skipped(reason, self.where())

    def has(self, record: dict, *fields: str) -> bool:
        """Whether the record has these fields. UserError if the first of the file has not: the layout is another."""
        missing = [name for name in fields if name not in record]
        if not missing:
            self._matched = True
        elif not self._matched:
            raise UserError(
                f"{self.where()}: not the layout of {self._reader_name!r}: expected the fields {', '.join(fields)}; "
                f"found {', '.join(map(str, record)) or 'none'} (`python data_process.py list` shows all layouts)"
            )
        else:
            self.skip(f"without the field {missing[0]}")
        return not missing

    def text(self) -> str:
        """The whole file, line ends as \\n."""
        if self.size > LARGEST_TEXT:
            raise UserError(
                f"{self.path} has {self.size / 1e6:,.0f} MB, too much for one document; "
                f"if each of its lines is a document, use lines={self.path}, otherwise split it"
            )
        return self._decoded(self._stream.read(), offset=self._start, line=1).replace("\r\n", "\n").replace("\r", "\n")

    def lines(self) -> Iterator[str]:
        """The lines, each with its line end."""
        offset = self._start
        for number, data in enumerate(self._stream, 1):
            self.line = number
            yield self._decoded(data, offset, number)
            offset += len(data)

    def csv_rows(self) -> Iterator[dict[str, str]]:
        """Rows of a CSV file as {column: cell}. Cells are text as it stands: 'NA' and 'null' stay 'NA' and 'null'."""
        csv.field_size_limit(LARGEST_TEXT)
        rows = csv.reader(self.lines(), strict=True)  # strict, to notice a file that was cut off inside a quoted cell
        header = None
        while True:
            start = rows.line_num + 1  # a row may span several lines; it is named by its first one
            try:
                row = next(rows, None)
            except csv.Error as error:
                self.line = start
                if "unexpected end" in str(error):
                    raise UserError(f"{self.where()}: the file is cut off inside a quoted cell of this row") from None
                self._broken(f"not valid CSV: {error}", "not valid CSV")
                continue
            self.line = start
            if row is None:
                return
            if header is None:
                header = row
            elif row:
                yield dict(zip(header, row))

    def json_objects(self) -> Iterator[dict]:
        """Objects of a JSON array, of JSON lines, or the one object that is the file: told apart by content."""
        array = self._first_byte() == b"["
        for record in _JsonArray(self) if array else self._json_lines():
            if isinstance(record, dict):
                yield record
            else:
                self.skip("not a JSON object")

    def _json_lines(self) -> Iterator:
        """JSON lines; one that does not parse is skipped and counted, unless the file is one object over many lines."""
        first = True
        for line in self.lines():
            if line.isspace():
                continue
            try:
                yield json.loads(line)
            except json.JSONDecodeError as error:
                whole = self._one_object() if first and self.size <= LARGEST_TEXT else None
                if whole is not None:
                    yield whole
                    return
                self._broken(f"not valid JSON: {error.msg} at column {error.colno}", "not valid JSON")
            first = False

    def _one_object(self):
        """The file as one JSON value, or None if it is not one."""
        here = self._stream.tell()
        self._stream.seek(self._start)
        try:
            return json.loads(self._stream.read())
        except ValueError:  # neither JSON nor UTF-8 are errors here: the lines say better what is wrong
            return None
        finally:
            self._stream.seek(here)

    def _first_byte(self) -> bytes:
        """The first byte that is no white space; the position stays where it is."""
        here = self._stream.tell()
        byte = next((byte for byte in iter(lambda: self._stream.read(1), b"") if not byte.isspace()), b"")
        self._stream.seek(here)
        return byte

    def _broken(self, message: str, reason: str) -> None:
        self.first_broken = self.first_broken or f"{self.where()}: {message}"
        self.skip(reason)

    def _decoded(self, data: bytes, offset: int, line: int, decoder=None, final: bool = True) -> str:
        """UTF-8 bytes -> text. `offset` and `line` say where in the file `data` starts."""
        held = len(decoder.getstate()[0]) if decoder else 0  # bytes of a character that the block before cut in two
        try:
            return decoder.decode(data, final) if decoder else data.decode("utf-8")
        except UnicodeDecodeError as error:
            line += error.object.count(b"\n", 0, error.start)
            raise UserError(
                f"{self.path}:{line}: not UTF-8 (byte 0x{error.object[error.start]:02x} at offset "
                f"{offset - held + error.start}); convert the file, for example: iconv -f gb18030 -t utf-8"
            ) from None


class _JsonArray:
    """The elements of one JSON array of any size, through a sliding buffer of about BLOCK bytes.

    Raises UserError with file and line where it is not JSON, is cut off, or goes on after its end.
    """

    def __init__(self, file: SourceFile):
        self._file, self._utf8, self._json = file, codecs.getincrementaldecoder("utf-8")(), json.JSONDecoder()
        self._offset = file._start  # bytes of the file decoded so far
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
        rest = (self._text[self._at :] + self._file._stream.read(BLOCK).decode("utf-8", "replace")).strip()
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
        block = self._file._stream.read(max(BLOCK, len(rest)))
        line = self._file.line + rest.count("\n")
        self._text = rest + self._file._decoded(block, self._offset, line, self._utf8, final=not block)
        self._at = self._counted = 0
        self._offset += len(block)
        return bool(block)

    def _cut_off(self) -> UserError:
        return UserError(f"{self._file.where()}: the JSON array is cut off: the file ends at byte {self._offset:,}")
