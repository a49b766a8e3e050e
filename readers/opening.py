"""From a path to bytes: compressed files and zip archives are read in place, told by their first bytes, not by name.

Also which encoding those bytes are in. What can only be read after unpacking (tar, 7z, rar) is refused with a hint.
"""

from __future__ import annotations

from settings import UserError

import bz2
import codecs
import gzip
import io
import lzma
import re
import zipfile
import zlib
from pathlib import Path, PurePath

BUFFER = 1 << 18  # bytes that are decompressed at a time
COMPRESSED = (".gz", ".bz2", ".xz", ".zst")  # endings that a file pattern need not name: *.json finds a.json.gz
_ZIP = (b"PK\x03\x04", b"PK\x05\x06")  # the second is an archive without members
_UNPACK = {b"Rar!\x1a\x07": "a RAR archive: unrar x", b"7z\xbc\xaf\x27\x1c": "a 7z archive: 7z x"}

# ----------------------------------------------------------------------------------------------------------------------
# Which files, and which members of zip archives


def plain_name(name: str) -> str:
    """'poems.json.gz' -> 'poems.json'."""
    return name.removesuffix(next(filter(name.endswith, COMPRESSED), ""))


def matches(path: PurePath, patterns: tuple[str, ...]) -> bool:
    """Whether a file or an archive's member belongs to a corpus by its name; hidden ones (.git, __MACOSX) do not."""
    if any(part.startswith((".", "__MACOSX")) for part in path.parts):
        return False
    names = (path, path.with_name(plain_name(path.name)))
    return any(name.match(pattern) for name in names for pattern in patterns)


def zip_members(path: Path) -> list[tuple[str, int]] | None:
    """(name, compressed size in bytes) of each file in a zip archive, by name; None if `path` is no such archive."""
    with open(path, "rb") as stream:
        if not stream.read(4).startswith(_ZIP):
            return None
    with open_zip(path) as archive:
        files = [info for info in archive.infolist() if not info.is_dir()]
        locked = [info.filename for info in files if info.flag_bits & 1]
        if locked:
            raise UserError(f"{path}!{locked[0]} is encrypted; unpack the archive first")
        return sorted((info.filename, info.compress_size) for info in files)


def open_zip(path: Path) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(path)
    except zipfile.BadZipFile as error:
        raise UserError(f"{path} is a damaged zip archive ({error}); download it again") from None


# ----------------------------------------------------------------------------------------------------------------------
# Bytes


class Content:
    """The decompressed bytes of a file, or of one member of an open zip archive: `stream`, after each rewind()."""

    def __init__(self, path: Path, member: str = "", archive: zipfile.ZipFile | None = None):
        self._name, self._member, self._archive = f"{path}!{member}" if member else str(path), member, archive
        self._raw = archive.fp if member else open(path, "rb")  # noqa: SIM115 (close() does it)
        self.size = archive.getinfo(member).compress_size if member else path.stat().st_size  # bytes on the disk
        self.stream = self._raw

    def rewind(self) -> None:
        if self._member:
            base = io.BufferedReader(self._archive.open(self._member), BUFFER)
            self._start = self._raw.tell()
        else:
            self._raw.seek(0)
            base, self._start = self._raw, 0
        self.stream = self._decompressed(base)

    def bytes_read(self) -> int:
        """Of the file on the disk: compressed bytes."""
        return min(self.size, self._raw.tell() - self._start)

    def close(self) -> None:
        if self.stream is not self._raw:
            self.stream.close()
        if not self._member:
            self._raw.close()

    def _decompressed(self, base: io.BufferedReader) -> io.BufferedReader:
        head = base.peek(512)[:512]
        if head.startswith(b"\x1f\x8b"):
            opened = gzip.GzipFile(fileobj=base)
        elif re.match(rb"BZh[1-9](1AY&SY|\x17rE8P\x90)", head):
            opened = bz2.BZ2File(base)
        elif head.startswith(b"\xfd7zXZ\x00"):
            opened = lzma.LZMAFile(base)  # noqa: SIM115
        elif head.startswith(b"\x28\xb5\x2f\xfd"):
            opened = _open_zstd(base, self._name)
        else:
            self._refuse_archive(head)
            return base
        stream = io.BufferedReader(opened, BUFFER)
        self._refuse_archive(stream.peek(512)[:512])
        return stream

    def _refuse_archive(self, head: bytes) -> None:
        kinds = [kind for magic, kind in _UNPACK.items() if head.startswith(magic)]
        kinds += ["a tar archive: tar -xf"] * (head[257:262] == b"ustar")
        kinds += ["a zip archive inside another file: unzip"] * head.startswith(_ZIP)
        if kinds:
            kind, _, command = kinds[0].partition(": ")
            raise UserError(f"{self._name} is {kind}; unpack it first ({command} …) and name the folder")


def damage(error: BaseException | None) -> str:
    """What an exception that was raised while reading says about compressed data, or ''."""
    if isinstance(error, EOFError):
        return "the compressed data is cut off"
    damaged = isinstance(error, (zlib.error, lzma.LZMAError, zipfile.BadZipFile))
    # bz2 and gzip raise an OSError; one of the operating system has a number.
    return f"damaged ({error})" if damaged or (isinstance(error, OSError) and error.errno is None) else ""


def _open_zstd(base: io.BufferedReader, name: str):
    try:
        from compression import zstd  # Python 3.14

        return zstd.ZstdFile(base)
    except ImportError:
        pass
    try:
        import zstandard
    except ImportError:
        raise UserError(f"{name} is compressed with zstd, which needs a package: pip install zstandard") from None
    return _ZstdFile(base, zstandard)


class _ZstdFile(io.RawIOBase):
    """zstandard's own stream reader takes a file that was cut off for one that ends; this one raises EOFError."""

    def __init__(self, base: io.BufferedReader, zstandard):
        self._base, self._zstandard, self._frame, self._ready = base, zstandard, None, memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        while not self._ready:
            data = self._frame.unused_data if self._frame and self._frame.eof else b""
            data = data or self._base.read(1 << 14)
            if not data:
                if self._frame and not self._frame.eof:
                    raise EOFError
                return 0
            if not self._frame or self._frame.eof:  # a file may consist of several frames
                self._frame = self._zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj()
            try:
                self._ready = memoryview(self._frame.decompress(data))
            except self._zstandard.ZstdError as error:
                raise OSError(str(error)) from None
        count = min(len(buffer), len(self._ready))
        buffer[:count], self._ready = self._ready[:count], self._ready[count:]
        return count


# ----------------------------------------------------------------------------------------------------------------------
# Encoding


def text_encoding(head: bytes) -> str:
    """'utf-8', 'utf-8-sig' or 'gb18030', by the first bytes of a file; they may end inside a character.

    What is not valid UTF-8 is gb18030 or damaged. In damaged UTF-8 most characters are still whole; bytes of gb18030
    hardly ever look like a character of three bytes, as Chinese ones are in UTF-8, though by chance UTF-8 may well be
    valid gb18030. Where neither fits, it is called UTF-8: its broken lines are then counted as such.
    """
    if head.startswith(codecs.BOM_UTF8):
        return "utf-8-sig"
    try:
        codecs.getincrementaldecoder("utf-8")().decode(head)
        return "utf-8"
    except UnicodeDecodeError:
        text, other = (head.decode(encoding, "replace") for encoding in ("utf-8", "gb18030"))
    broken, whole = text.count("\ufffd"), len(re.findall("[\u0800-\ufffc]", text))
    return "gb18030" if broken > whole and broken > other.count("\ufffd") else "utf-8"
