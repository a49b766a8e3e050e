"""Fetch the files of a corpus: from mirrors, verified, and after an interruption from where it was.

    python data_process.py download alpaca --out data/alpaca

A file grows as FILE.part, beside FILE.part.etag, which tells whether the server still has the same file; it gets its
name when it is complete and verified. What is wrong is kept as FILE.damaged. Standard library only.
"""

from __future__ import annotations

from settings import UserError, flag

import http.client
import os
import re
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from files import file_sha256
from readers import INSTRUCTIONS, PREFERENCES, PRETRAINING, Download, Reader

TABLES = {"pretrain": PRETRAINING, "sft": INSTRUCTIONS, "preferences": PREFERENCES}
ATTEMPTS = 4  # per mirror that bring nothing new, before the next mirror is tried
BACKOFF = 1.0  # seconds before the second attempt; doubled before each further one
TIMEOUT = 30  # seconds without an answer
BLOCK = 1 << 18  # bytes


@dataclass(frozen=True)
class DownloadConfig:
    name: str = flag(help="the corpus: a name from `data_process.py list`", positional=True)
    out: Path | None = flag(None, "folder to write; default: data/NAME, or data/NAME-TABLE if several tables have this name")
    table: str | None = flag(None, "which corpus of this name is meant, where there are several", choices=tuple(TABLES))
    mirror: int | None = flag(None, "use only this mirror, counted from 1; default: all, in their order")


def fetch(config: DownloadConfig) -> dict:
    """Download a corpus. Returns {"name", "files"}."""
    named = {key: table[config.name] for key, table in TABLES.items() if config.name in table}
    found = {key: reader for key, reader in named.items() if config.table in (None, key)}
    if not found:
        raise UserError(f"there is no corpus {config.name!r} to download; see `python data_process.py list`")
    offered = {key: reader for key, reader in found.items() if reader.downloads} or found
    if len({reader.downloads for reader in offered.values()}) > 1:
        raise UserError(f"{config.name} is the name of several corpora: add --table {' or --table '.join(offered)}")
    table, reader = next(iter(offered.items()))
    # sft's sharegpt would read the files of preferences' sharegpt as well, so they do not lie together.
    out = config.out or Path("data") / (f"{config.name}-{table}" if len(named) > 1 else config.name)
    files = download(reader, out, config.mirror)
    print(f"{len(files)} files in {out}; licence: {reader.licence or 'not known'}")
    return {"name": config.name, "files": [str(path) for path in files]}


def download(reader: Reader, out: Path, mirror: int | None = None) -> list[Path]:
    """Fetch those files of the reader's corpus that are not complete in `out`. `mirror`: only this one, from 1.

    Raises UserError where no program can fetch the corpus, and where all mirrors of a file fail, with every reason.
    """
    if not reader.downloads:
        raise UserError(f"{reader.name} cannot be fetched by a program; get it here: {reader.source}")
    mirrors = min(len(item.urls) for item in reader.downloads)
    if mirror is not None and not 1 <= mirror <= mirrors:
        raise UserError(f"--mirror {mirror}: {reader.name} has the mirrors 1 to {mirrors}")
    return [_fetch_file(item, out / item.path, mirror) for item in reader.downloads]


def _fetch_file(item: Download, path: Path, mirror: int | None) -> Path:
    part, damaged = (path.with_name(path.name + ending) for ending in (".part", ".damaged"))
    if path.is_dir():
        raise UserError(f"{path} is a folder, and a file is to stand there: move it away or choose another --out")
    if path.is_file():
        if not (wrong := _mismatch(path, item.size, item.sha256)):
            print(f"{path}: already there")
            return path
        os.replace(path, damaged)
        print(f"{path}: {wrong}; renamed to {damaged.name}, fetching it again")
    path.parent.mkdir(parents=True, exist_ok=True)
    failures = []
    for url in item.urls if mirror is None else [item.urls[mirror - 1]]:
        try:
            size, sha256 = _fetch_from(url, part, item)
        except _Failed as error:
            failures.append(f"{url}: {error}")
            continue
        _etag_path(part).unlink(missing_ok=True)
        if wrong := _mismatch(part, size, sha256):
            os.replace(part, damaged)
            failures.append(f"{url}: {wrong} (kept as {damaged.name})")
            continue
        os.replace(part, path)
        who = "registry" if item.size is not None else "server"
        long = f"the {who} did not say how long it is" if size is None else f"as long as the {who} said"
        print(f"{path}: {path.stat().st_size:,} bytes, {long}; {'the sha256 is right' if sha256 else 'no sha256 is known'}")
        return path
    raise UserError(f"{path.name} could not be fetched: " + "; ".join(failures))


def _mismatch(path: Path, size: int | None, sha256: str | None) -> str:
    """What is wrong with a file, or ''. What is not known (None) is not compared."""
    if not path.stat().st_size:
        return "it is empty"
    if size is not None and path.stat().st_size != size:
        return f"it has {path.stat().st_size:,} bytes instead of {size:,}"
    if sha256 is not None and (found := file_sha256(path)) != sha256.lower():
        return f"its sha256 is {found} instead of {sha256}"
    return ""


# ----------------------------------------------------------------------------------------------------------------------
# One file from one mirror


class _Failed(Exception):
    """The mirror's fault, not ours (a full disk is an OSError). `final`: another attempt would not help."""

    def __init__(self, reason, final: bool = False):
        super().__init__(str(getattr(reason, "reason", reason)) or type(reason).__name__)
        self.final = final


def _fetch_from(url: str, part: Path, item: Download) -> tuple[int | None, str | None]:
    """Fill `part`, in several attempts if need be. -> (size, sha256) as the registry or the server states them."""
    attempt = 0
    while True:
        before = _size(part)
        try:
            return _transfer(url, part, item)
        except _Failed as error:
            attempt = 1 if _size(part) > before else attempt + 1
            if error.final or attempt >= ATTEMPTS:
                raise
            time.sleep(BACKOFF * 2 ** (attempt - 1))


def _transfer(url: str, part: Path, item: Download) -> tuple[int | None, str | None]:
    """One attempt: append what `part` lacks, or begin again where the server cannot go on or has another file now."""
    have, etag = _size(part), _etag_path(part)
    validator = etag.read_text(encoding="utf-8") if etag.exists() else ""
    # If-Range (RFC 9110, 13.1.5): the rest if the file is still the same one, else the whole new file
    resume = {"Range": f"bytes={have}-", "If-Range": validator} if have and validator else {}
    redirects, request = _Redirects(), urllib.request.Request(url, headers={"User-Agent": "cria", **resume})
    try:
        response = urllib.request.build_opener(redirects).open(request, timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        whole = re.fullmatch(r"bytes \*/(\d+)", error.headers.get("Content-Range", ""))
        if error.code == 416 and whole and int(whole[1]) == have:  # nothing is lacking: we were stopped just before the end
            return redirects.stated(item, have)
        if error.code == 416:
            etag.unlink(missing_ok=True)  # without it the next attempt begins again
        wait = error.code in (408, 416, 429) or error.code >= 500
        raise _Failed(f"HTTP {error.code} {error.reason}", final=not wait) from None
    except (OSError, http.client.HTTPException) as error:
        raise _Failed(error) from None
    with response:
        headers = response.headers
        goes_on = re.fullmatch(rf"bytes {have}-\d+/(\d+)", headers.get("Content-Range", "")) if response.status == 206 else None
        if response.status not in (200, 206) or (response.status == 206 and not goes_on):
            etag.unlink(missing_ok=True)
            raise _Failed(f"unexpected answer {response.status}, Content-Range {headers.get('Content-Range')}")
        if headers.get_content_type() == "text/html" and not item.path.endswith((".html", ".htm")):
            raise _Failed("a web page instead of the file; perhaps one has to log in", final=True)
        have = have if goes_on else 0
        stated = goes_on[1] if goes_on else headers.get("Content-Length", "")
        length = int(stated) if stated.isdecimal() else None
        size, sha256 = redirects.stated(item, length)
        if not goes_on:
            part.unlink(missing_ok=True)
            strong = headers.get("ETag", "W/")
            etag.write_text("" if strong.startswith("W/") else strong, encoding="utf-8")
        with open(part, "ab") as file, tqdm(
            total=size, initial=have, unit="B", unit_scale=True, desc=item.path, disable=None) as bar:  # fmt: skip
            while True:
                try:
                    block = response.read(BLOCK)
                except (OSError, http.client.HTTPException) as error:
                    raise _Failed(error) from None
                if not block:
                    break
                file.write(block)
                bar.update(len(block))
            file.flush()
            os.fsync(file.fileno())
    if length and _size(part) < length:
        raise _Failed(f"cut off after {_size(part):,} of {length:,} bytes")
    return size, sha256


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects, and keeps what Hugging Face says on the first one about the file: its size and its sha256."""

    size, sha256 = None, None

    def redirect_request(self, request, file, code, message, headers, url):
        if re.fullmatch(r"\d+", headers.get("X-Linked-Size", "")):
            self.size = int(headers["X-Linked-Size"])
        if found := re.fullmatch(r'"?([0-9a-fA-F]{64})"?', headers.get("X-Linked-Etag", "")):
            self.sha256 = found[1]  # for small files it is a git object's id, which has 40 digits and is another hash
        return super().redirect_request(request, file, code, message, headers, url)

    def stated(self, item: Download, length: int | None) -> tuple[int | None, str | None]:
        """(size, sha256): the registry's, else the server's, else None."""
        sizes = [size for size in (item.size, self.size, length) if size is not None]
        return (sizes[0] if sizes else None), item.sha256 or self.sha256


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _etag_path(part: Path) -> Path:
    return part.with_name(part.name + ".etag")
