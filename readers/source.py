"""One input file of a corpus, opened by its content; every complaint names the file and the line."""

from __future__ import annotations

from settings import UserError

import codecs
import csv
import json
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

from readers.json_array import JsonArray
from readers.opening import Content, damage, plain_name, text_encoding

HEAD = 1 << 20  # bytes that decide the encoding
LONGEST_LINE = 16 << 20  # bytes looked through for the first line of a JSON file
LARGEST_TEXT = 64 << 20  # bytes of a file that is one document: more is nearly always one document per line
_JSON_TYPES = (str, int, float, list, dict, type(None))  # a bool is an int


def tidy(text) -> str:
    """What happens to every text of every reader: line ends become \\n, white space at both ends goes.

    A number is the text of its digits. What is no text, None or NaN (a missing cell, as pandas writes it), is ''.
    """
    if isinstance(text, (int, float)) and not isinstance(text, bool) and text == text:
        return str(text)
    return text.replace("\r\n", "\n").replace("\r", "\n").strip() if isinstance(text, str) else ""


class SourceFile:
    """One input file of a corpus, or one member of a zip archive. All ways to read it are streaming but `text()`.

    `path` names it (archive.zip!member), `line` is where the current record begins, `encoding` how its text is stored.
    A record that cannot be read is skipped and counted. Raises UserError where the file as a whole cannot be read:
    binary, UTF-16, a JSON array with an error in it, compressed data that are damaged.
    """

    def __init__(
        self,
        path: Path,
        reader_name: str,
        on_skip: Callable[[str, str, str], None],  # reason, "file:line", details
        *,
        index: int = 0,
        member: str = "",
        archive: zipfile.ZipFile | None = None,
    ):
        self.path = Path(f"{path}!{member}") if member else path
        self.name = plain_name(Path(member or path).name)  # readme.md, also where the path ends in readme.md.gz
        self.index = index  # among the files of the corpus
        self.line = 0  # of the current record, from 1; 0: the file as a whole
        self.first_broken = ""  # "file:line: what" of the first record that could not be read
        self._reader_name, self._on_skip = reader_name, on_skip
        self._matched = False  # whether some record had the fields that the reader expects
        self._content = Content(path, member, archive)

    def __enter__(self) -> SourceFile:
        try:
            self._content.rewind()
            head = self._content.stream.read(HEAD)
            self._refuse_no_text(head)
        except BaseException as error:
            self.__exit__(type(error), error, None)
            raise
        self.empty, self._parquet, self.encoding = not head, head.startswith(b"PAR1"), text_encoding(head)
        self.start = len(codecs.BOM_UTF8) if self.encoding == "utf-8-sig" else 0
        self._first = head[self.start :].lstrip()[:1]  # the first byte that is no white space
        self.codec = self.encoding.removesuffix("-sig")
        self._rows_read = 0.0  # of a Parquet file, as a share of all
        self._rewind()
        return self

    def __exit__(self, kind, error, traceback) -> None:
        self._content.close()
        if damage(error):
            raise UserError(f"{self.where()}: {damage(error)}; download the file again") from None

    def _refuse_no_text(self, head: bytes) -> None:
        if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            raise UserError(f"{self.path} is UTF-16; convert it: iconv -f utf-16 -t utf-8")
        zero = head.find(0, 0, 1 << 13)
        if zero >= 0 and not head.startswith(b"PAR1"):
            raise UserError(f"{self.path} is binary (a zero byte at offset {zero}); a text file is needed")

    def _rewind(self) -> None:
        self._content.rewind()
        self.stream = self._content.stream
        self.stream.read(self.start)

    @property
    def size(self) -> int:
        """Bytes on the disk, compressed or not."""
        return self._content.size

    def bytes_read(self) -> int:
        """How many of `size` were read. Of a Parquet file: an estimate from its rows."""
        return int(self._rows_read * self.size) if self._parquet else self._content.bytes_read()

    def where(self) -> str:
        return f"{self.path}:{self.line}" if self.line else str(self.path)

    def skip(self, reason: str) -> None:
        """Count the current record as left out, and why."""
        self._on_skip(reason, self.where(), "")

    def _skip_broken(self, reason: str, details: str) -> None:
        self.first_broken = self.first_broken or f"{self.where()}: {reason}{details}"
        self._on_skip(reason, self.where(), details)

    def has(self, record: dict, *fields: str) -> bool:
        """Whether the record has these fields. UserError if the first of the file has not: the layout is another.

        The columns of a Parquet file may hold bytes or dates instead: such a record is skipped.
        """
        missing = [name for name in fields if name not in record]
        if not missing:
            self._matched = True
            if all(isinstance(record[name], _JSON_TYPES) for name in fields):
                return True
            self.skip("not a text")
        elif not self._matched:
            raise UserError(
                f"{self.where()}: not the layout of {self._reader_name!r}: expected the fields {', '.join(fields)}; "
                f"found {', '.join(map(str, record)) or 'none'} (`python data_process.py list` shows all layouts)"
            )
        else:
            self.skip(f"without the field {missing[0]}")
        return False

    # ------------------------------------------------------------------------------------------------------------------
    # Text, lines and tables

    def text(self) -> str:
        """The whole file, line ends as \\n."""
        self._need_text()
        data = self.stream.read(LARGEST_TEXT + 1)
        if len(data) > LARGEST_TEXT:
            raise UserError(
                f"{self.path} has more than {LARGEST_TEXT / 1e6:,.0f} MB of text, too much for one document; "
                f"if each of its lines is a document, use lines={self.path}, otherwise split it"
            )
        try:
            return data.decode(self.codec).replace("\r\n", "\n").replace("\r", "\n")
        except UnicodeDecodeError as error:
            raise self.not_decoded(error, offset=self.start, line=1) from None

    def lines(self) -> Iterator[str]:
        """The lines, each with its line end. One that is not valid in the file's encoding is skipped and counted."""
        self._need_text()
        codec = self.codec
        for number, data in enumerate(self.stream, 1):
            self.line = number
            try:
                line = data.decode(codec)
            except UnicodeDecodeError as error:
                self._skip_broken(self._not_valid, f" (byte 0x{data[error.start]:02x} at {error.start} of the line)")
                continue
            yield line

    def csv_rows(self) -> Iterator[dict[str, str]]:
        """Rows of a CSV file as {column: cell}. Cells are text as it stands: 'NA' and 'null' stay 'NA' and 'null'."""
        self._need_text()
        csv.field_size_limit(LARGEST_TEXT)
        self._last_bad_line = 0
        rows = csv.reader(self._csv_lines(), strict=True)  # strict, to notice a file cut off inside a quoted cell
        header = None
        while True:
            start = rows.line_num + 1  # a row may span several lines; it is named by its first one
            try:
                row = next(rows, None)
            except csv.Error as error:
                self.line = start
                if "unexpected end" in str(error):
                    raise UserError(f"{self.where()}: the file is cut off inside a quoted cell of this row") from None
                lone = "a carriage return alone does not end a line (tr '\\r' '\\n' converts them)"
                self._skip_broken("not valid CSV", f": {lone if 'new-line character' in str(error) else error}")
                continue
            self.line = start
            if row is None:
                return
            if header is None:
                header = row
            elif self._last_bad_line >= start:
                self._skip_broken(self._not_valid, f" (line {self._last_bad_line})")
            elif row:
                yield dict(zip(header, row))

    def _csv_lines(self) -> Iterator[str]:
        """Like lines(), but a bad line stays, as it may be the middle of a row; _last_bad_line tells of it."""
        for number, data in enumerate(self.stream, 1):
            try:
                line = data.decode(self.codec)
            except UnicodeDecodeError:
                self._last_bad_line, line = number, data.decode(self.codec, "replace")
            yield line

    # ------------------------------------------------------------------------------------------------------------------
    # JSON

    def json_objects(self) -> Iterator[dict]:
        """The objects among json_values(); what is something else is skipped and counted."""
        for record in self.json_values():
            if isinstance(record, dict):
                yield record
            else:
                self.skip("not a JSON object")

    def json_values(self, lists: bool = False) -> Iterator:
        """The elements of a JSON array, the values of JSON lines, or the one object that is the file.

        They are told apart by content. A file that begins with `[` is one array, unless its first line is a complete
        list and the next line begins with `[` too: then it is JSON lines, and each of its records is a list.
        `lists`: all records of the layout are lists, so a first line is one already if it is a list of other values.
        """
        self._need_text()
        lines = (line for line in iter(lambda: self.stream.readline(LONGEST_LINE), b"") if not line.isspace())
        first, second = next(lines, b""), next(lines, b"")
        more = second.lstrip()[:1] == b"["
        value = self._json(first) if self._first == b"[" and (lists or more) else None
        by_line = isinstance(value, list) and (more or (value and not isinstance(value[0], list)))
        self._rewind()
        if self._first == b"[" and not by_line:
            yield from JsonArray(self)
            return
        if self._first == b"{" and self._json(first) is None:  # perhaps one object over many lines
            whole = self.stream.read(LARGEST_TEXT + 1)
            value = self._json(whole) if len(whole) <= LARGEST_TEXT else None
            self._rewind()
            if value is not None:
                self.line = 1
                yield value
                return
        yield from self._json_lines()

    def _json_lines(self) -> Iterator:
        for line in self.lines():
            try:
                value = json.loads(line)
            except json.JSONDecodeError as error:
                if not line.isspace():
                    self._skip_broken("not valid JSON", f": {error.msg} at column {error.colno}")
                continue
            except (ValueError, RecursionError) as error:  # a number of thousands of digits, thousands of brackets
                self._skip_broken("not valid JSON", f": {error}")
                continue
            yield value

    def _json(self, data: bytes):
        """The value, or None if this is no JSON."""
        try:
            return json.loads(data.decode(self.codec))
        except (ValueError, RecursionError):  # UnicodeDecodeError is a ValueError too
            return None

    # ------------------------------------------------------------------------------------------------------------------
    # Parquet, and whatever there is

    def parquet_rows(self) -> Iterator[dict]:
        """Rows of a Parquet file as {column: value}; `line` is the row's number. Streams batches; needs pyarrow."""
        if not self._parquet:
            raise UserError(f"{self.path} is no Parquet file (it does not begin with PAR1)")
        try:
            from pyarrow import ArrowException
            from pyarrow.parquet import ParquetFile
        except ImportError:
            raise UserError(f"{self.path} is a Parquet file, which needs a package: pip install pyarrow") from None
        try:
            table = ParquetFile(self.stream)
            for batch in table.iter_batches(batch_size=256):
                for row in batch.to_pylist():
                    self.line += 1
                    yield row
                self._rows_read = self.line / table.metadata.num_rows
        except (ArrowException, OSError) as error:
            raise UserError(f"{self.where()}: damaged Parquet file ({error}); download it again") from None

    def rows(self) -> Iterator[dict]:
        """The rows of a Parquet file, the objects of JSON or JSON lines, or the rows of a CSV file, by content."""
        if self._parquet:
            return self.parquet_rows()
        return self.json_objects() if self._first in (b"[", b"{") else self.csv_rows()

    # ------------------------------------------------------------------------------------------------------------------
    # Errors

    @property
    def _not_valid(self) -> str:
        return f"not {self.codec.upper()}"

    def _need_text(self) -> None:
        if self._parquet:
            raise UserError(f"{self.path} is a Parquet file; {self._reader_name!r} reads text (see data_process.py list)")

    def not_decoded(self, error: UnicodeDecodeError, offset: int, line: int) -> UserError:
        """`offset` and `line` say where in the file the bytes begin that could not be decoded."""
        line += error.object.count(b"\n", 0, error.start)
        return UserError(
            f"{self.path}:{line}: {self._not_valid} (byte 0x{error.object[error.start]:02x} at offset "
            f"{offset + error.start}); mend or convert the file (iconv -f … -t utf-8)"
        )
