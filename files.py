"""Files that are complete or absent: whatever interrupts the writing, a reader sees the old one, the new one, or none.

And text files, read so that a mistake in one is named with its line.
"""

from __future__ import annotations

from settings import UserError

import contextlib
import errno
import hashlib
import json
import os
import shutil
from pathlib import Path


@contextlib.contextmanager
def written_beside(path: Path):
    """Yield a temporary path to write to; on success it is fsynced and takes the place of `path`, else it is removed.

    A full disk is an OSError(ENOSPC) here, whichever library wrote the file.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.partial")
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if type(error).__name__ == "SafetensorError" and any(
            text in str(error) for text in ("No space left", "code: 28", "code: 122")):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from None
        raise


def lock(path: Path, refusal: str):
    """Reserve what a lock file stands for: the lock is the returned open file, and ends with it or with the process.

    Raises UserError(refusal) if another process holds it. Where there is no flock (Windows) nothing is locked.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        file = path.open("w")
        if os.name != "posix":
            return file
        import fcntl

        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            raise UserError(refusal) from None
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                return file
        file.close()  # the process before us removed this file between our open and our lock: it would lock nobody out


@contextlib.contextmanager
def locked(path: Path, refusal: str):
    """Hold lock(path, refusal) during the block, and remove the file after it."""
    file = lock(path, refusal)
    try:
        yield
    finally:
        if os.name != "posix":  # Windows removes no open file
            file.close()
        path.unlink(missing_ok=True)
        file.close()


def write_text(path: Path, text: str) -> None:
    with written_beside(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, data) -> None:
    write_text(path, json.dumps(data, indent=2, ensure_ascii=False) + "\n")


def copy_files(source: Path, target: Path) -> None:
    """Copy the files of one directory into another. (A full disk keeps its error number here; shutil.copytree hides it.)"""
    target.mkdir(parents=True, exist_ok=True)
    for file in sorted(source.iterdir()):
        shutil.copyfile(file, target / file.name)


def file_sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        while block := stream.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def utf8_lines(path):
    """(line number, line with its end) of a text file. Raises UserError with file and line for anything else."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path} {'is a directory; name its files' if path.is_dir() else 'does not exist'}")
    if path.stat().st_size == 0:
        raise UserError(f"{path} is empty")
    with open(path, "rb") as file:
        for number, raw in enumerate(file, 1):
            if b"\0" in raw:
                raise UserError(f"{path}:{number}: holds a NUL byte, so this is not a UTF-8 text file")
            try:
                yield number, raw.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise UserError(f"{path}:{number}: not UTF-8 text ({error.reason} at byte {error.start} of the line); "
                                "convert the file to UTF-8") from None


def fsync_directory(path: Path) -> None:
    """Make the renames inside a directory last through a power cut."""
    if os.name == "posix":
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
