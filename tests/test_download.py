"""download.py against a web server on this machine: mirrors, resuming, checksums."""

from __future__ import annotations

from settings import UserError, clean_exit, parse_config

import hashlib
import http.server
import socket
import threading
from pathlib import Path

import pytest

import download as module
from download import DownloadConfig, download, fetch
from readers import INSTRUCTIONS, PREFERENCES, Download, Reader

CONTENT = bytes(range(256)) * 400  # 102,400 bytes
SHA256 = hashlib.sha256(CONTENT).hexdigest()


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers as `server.files[path]` says; keeps what it was asked for in `server.asked`."""

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        file = dict(self.server.files.get(self.path, {"status": 404}))
        self.server.asked.append((self.path, self.headers.get("Range"), self.headers.get("If-Range")))
        if "to" in file:
            return self.answer(302, b"", {"Location": file["to"], **file.get("headers", {})})
        if file.get("status", 200) >= 400:
            return self.answer(file["status"], b"sorry", {})
        content, etag, ranged = file.get("content", CONTENT), file.get("etag", '"one"'), self.headers.get("Range")
        headers = {**({"ETag": etag} if etag else {}), **file.get("headers", {})}
        if ranged and file.get("ranges", True) and self.headers.get("If-Range") == etag:
            begin = int(ranged.removeprefix("bytes=").removesuffix("-"))
            if begin >= len(content):
                return self.answer(416, b"", {"Content-Range": f"bytes */{len(content)}"})
            span = file.get("span", f"bytes {begin}-{len(content) - 1}/{len(content)}")
            return self.answer(206, content[begin:], {**headers, "Content-Range": span})
        self.answer(200, content, headers)

    def answer(self, status, content, headers):
        self.send_response(status)
        for name, value in {"Content-Length": len(content), **headers}.items():
            if value is not None:
                self.send_header(name, str(value))
        self.end_headers()
        self.close_connection = not str(headers.get("Content-Length", "1")).isdecimal()
        cut = self.server.cuts.get(self.path)
        if cut and status in (200, 206):  # the connection ends after the first of these many bytes, next time after the second …
            content = content[: cut.pop(0)]
            self.close_connection = True
        self.wfile.write(content)

    def log_message(self, *arguments):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(module, "BACKOFF", 0.0)
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.files, server.cuts, server.asked = {}, {}, []
    server.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def closed_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{free.getsockname()[1]}/a.json"


def reader(*downloads: Download, **entry) -> Reader:
    entry = {"name": "mine", "read": iter, "layout": "", "files": ("*",), "source": "https://example.org/mine", **entry}
    return Reader(**entry, downloads=downloads)


def get(server, out: Path, *paths: str, **item) -> bytes:
    """Download one file whose mirrors are `paths`; its content. Nothing else is left in the folder."""
    urls = tuple(path if "://" in path else server.url + path for path in paths)
    found = download(reader(Download("a.json", urls, **item)), out)
    assert found == [out / "a.json"]
    assert {path.name for path in out.iterdir()} <= {"a.json", "a.json.damaged"}
    return found[0].read_bytes()


def test_whole_file_and_not_again(server, tmp_path, capsys):
    server.files["/a"] = {}
    assert get(server, tmp_path / "new" / "folder", "/a", sha256=SHA256, size=len(CONTENT)) == CONTENT
    assert "102,400 bytes, as long as the registry said; the sha256 is right" in capsys.readouterr().out
    assert get(server, tmp_path / "new" / "folder", "/a", sha256=SHA256) == CONTENT
    assert "already there" in capsys.readouterr().out
    assert server.asked == [("/a", None, None)]


def test_says_what_it_could_not_verify(server, tmp_path, capsys):
    server.files["/a"] = {"etag": f'"{SHA256}"'}  # any server may call anything so: only Hugging Face's header counts
    get(server, tmp_path, "/a")
    assert "102,400 bytes, as long as the server said; no sha256 is known" in capsys.readouterr().out


@pytest.mark.parametrize("length", [None, "abc", "-1"])
def test_server_that_does_not_say_how_long_the_file_is(length, server, tmp_path, capsys):
    server.files["/a"] = {"headers": {"Content-Length": length}}
    assert get(server, tmp_path, "/a") == CONTENT
    assert "102,400 bytes, the server did not say how long it is; no sha256 is known" in capsys.readouterr().out


def test_a_web_page_is_not_the_file(server, tmp_path):
    page = {"content": b"<html>log in</html>", "etag": None, "headers": {"Content-Type": "text/html; charset=utf-8"}}
    server.files.update({"/login": page, "/a": {}})
    (tmp_path / "a.json.part").write_bytes(CONTENT[:1000])
    (tmp_path / "a.json.part.etag").write_text('"one"')
    assert get(server, tmp_path, "/login", "/a", sha256=SHA256) == CONTENT  # and what was there is not lost
    assert server.asked[1] == ("/a", "bytes=1000-", '"one"')
    (tmp_path / "a.json").unlink()
    with pytest.raises(UserError, match=r"/login: a web page instead of the file; perhaps one has to log in"):
        get(server, tmp_path, "/login")
    item = Download("page.html", (server.url + "/login",))
    assert download(reader(item), tmp_path)[0].read_bytes() == page["content"]


def test_an_empty_file_and_a_folder_are_not_the_file(server, tmp_path):
    server.files.update({"/empty": {"content": b""}, "/a": {}})
    (tmp_path / "a.json").write_bytes(b"")
    assert get(server, tmp_path, "/empty", "/a") == CONTENT
    (tmp_path / "a.json").unlink()
    with pytest.raises(UserError, match=r"/empty: it is empty \(kept as a.json.damaged\)"):
        get(server, tmp_path, "/empty")
    (tmp_path / "a.json").mkdir()
    with pytest.raises(UserError, match=r"a.json is a folder, and a file is to stand there"):
        get(server, tmp_path, "/a")


def test_several_files_in_subfolders(server, tmp_path):
    server.files.update({"/a": {"content": b"A"}, "/b": {"content": b"B"}})
    items = [Download("sub/a.json", (server.url + "/a",)), Download("b.json", (server.url + "/b",))]
    assert [path.read_bytes() for path in download(reader(*items), tmp_path)] == [b"A", b"B"]
    assert (tmp_path / "sub" / "a.json").exists()


def test_connection_that_is_cut_goes_on_where_it_was(server, tmp_path):
    server.files["/a"], server.cuts["/a"] = {}, [1000, 500]
    assert get(server, tmp_path, "/a", sha256=SHA256) == CONTENT
    assert server.asked == [("/a", None, None), ("/a", "bytes=1000-", '"one"'), ("/a", "bytes=1500-", '"one"')]


def test_many_cuts_are_no_failure_as_long_as_each_brings_something(server, tmp_path):
    server.files["/a"], server.cuts["/a"] = {}, [1000] * 20
    assert get(server, tmp_path, "/a", sha256=SHA256) == CONTENT
    assert len(server.asked) == 21


def test_next_run_goes_on(server, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "ATTEMPTS", 1)
    server.files["/a"], server.cuts["/a"] = {}, [1000]
    with pytest.raises(UserError, match=r"a.json could not be fetched: .*/a: cut off after 1,000 of 102,400 bytes"):
        get(server, tmp_path, "/a", sha256=SHA256)
    assert (tmp_path / "a.json.part").read_bytes() == CONTENT[:1000]
    assert get(server, tmp_path, "/a", sha256=SHA256) == CONTENT
    assert server.asked[1] == ("/a", "bytes=1000-", '"one"')


def test_stopped_just_before_the_end(server, tmp_path):
    server.files["/a"] = {}
    (tmp_path / "a.json.part").write_bytes(CONTENT)
    (tmp_path / "a.json.part.etag").write_text('"one"')
    assert get(server, tmp_path, "/a", sha256=SHA256) == CONTENT
    assert server.asked == [("/a", "bytes=102400-", '"one"')]


@pytest.mark.parametrize(
    "file",
    [
        {"ranges": False},
        {"etag": '"two"'},
        {"etag": 'W/"one"'},
        {"etag": None},
        {"span": "bytes 7-9/10"},
        {"span": "bytes 1000-102399/*"},
    ],
    ids=["ignores Range", "another file now", "weak ETag", "no ETag", "another range", "unknown length"],
)
def test_begins_again_where_it_cannot_go_on(file, server, tmp_path):
    server.files["/a"] = file
    (tmp_path / "a.json.part").write_bytes(b"x" * 1000)
    (tmp_path / "a.json.part.etag").write_text('"one"')
    assert get(server, tmp_path, "/a", sha256=SHA256) == CONTENT
    assert server.asked[0] == ("/a", "bytes=1000-", '"one"')


def test_a_file_that_became_shorter(server, tmp_path):
    server.files["/a"] = {"content": b"short"}
    (tmp_path / "a.json.part").write_bytes(b"x" * 1000)
    (tmp_path / "a.json.part.etag").write_text('"one"')
    assert get(server, tmp_path, "/a") == b"short"


@pytest.mark.parametrize("first", ["closed port", "/404", "/500"])
def test_next_mirror_where_the_first_is_dead(first, server, tmp_path):
    server.files.update({"/a": {}, "/404": {"status": 404}, "/500": {"status": 500}})
    dead = closed_port() if first == "closed port" else first
    assert get(server, tmp_path, dead, "/a", sha256=SHA256) == CONTENT
    asked = [path for path, _, _ in server.asked]
    assert asked == {"closed port": ["/a"], "/404": ["/404", "/a"], "/500": ["/500"] * 4 + ["/a"]}[first]


def test_wrong_checksum_goes_to_the_next_mirror_and_is_kept(server, tmp_path):
    wrong = CONTENT[:-1] + b"!"
    server.files.update({"/wrong": {"content": wrong}, "/a": {}})
    assert get(server, tmp_path, "/wrong", "/a", sha256=SHA256) == CONTENT
    assert (tmp_path / "a.json.damaged").read_bytes() == wrong
    assert server.asked[1] == ("/a", None, None)  # begins anew


def test_wrong_size_is_noticed(server, tmp_path):
    server.files["/a"] = {}
    with pytest.raises(UserError, match=r"it has 102,400 bytes instead of 7 \(kept as a.json.damaged\)"):
        get(server, tmp_path, "/a", size=7)
    assert [path.name for path in tmp_path.iterdir()] == ["a.json.damaged"]


def test_complete_file_that_is_not_what_the_registry_says(server, tmp_path, capsys):
    server.files["/a"] = {}
    (tmp_path / "a.json").write_bytes(b"something else")
    assert get(server, tmp_path, "/a", sha256=SHA256) == CONTENT
    assert (tmp_path / "a.json.damaged").read_bytes() == b"something else"
    assert "renamed to a.json.damaged" in capsys.readouterr().out


def test_checksum_that_hugging_face_states_on_the_redirect(server, tmp_path, capsys):
    linked = {"X-Linked-Etag": f'"{SHA256}"', "X-Linked-Size": str(len(CONTENT))}
    server.files.update({"/hub": {"to": "/cdn", "headers": linked}, "/cdn": {}, "/bad": {"content": CONTENT[::-1]}})
    server.cuts["/cdn"] = [1000]
    assert get(server, tmp_path, "/hub", size=len(CONTENT)) == CONTENT
    assert "the sha256 is right" in capsys.readouterr().out
    assert server.asked[2:] == [("/hub", "bytes=1000-", '"one"'), ("/cdn", "bytes=1000-", '"one"')]
    (tmp_path / "a.json").unlink()
    server.files["/hub"]["to"] = "/bad"
    with pytest.raises(UserError, match=f"its sha256 is [0-9a-f]{{64}} instead of {SHA256}"):
        get(server, tmp_path, "/hub")


def test_git_ids_are_no_sha256(server, tmp_path, capsys):
    server.files.update({"/hub": {"to": "/a", "headers": {"X-Linked-Etag": '"' + "0" * 40 + '"'}}, "/a": {}})
    assert get(server, tmp_path, "/hub") == CONTENT
    assert "no sha256 is known" in capsys.readouterr().out


def test_all_mirrors_fail(server, tmp_path):
    server.files.update({"/500": {"status": 503}, "/wrong": {"content": b"no"}})
    with pytest.raises(UserError) as error:
        get(server, tmp_path, closed_port(), "/404", "/500", "/wrong", sha256=SHA256)
    for part in ("Connection refused", "/404: HTTP 404 Not Found", "/500: HTTP 503", "/wrong: its sha256 is"):
        assert part in str(error.value)


def test_only_one_mirror(server, tmp_path):
    server.files.update({"/a": {"content": b"1"}, "/b": {"content": b"2"}})
    corpus = reader(Download("a.json", (server.url + "/a", server.url + "/b")))
    assert download(corpus, tmp_path, mirror=2)[0].read_bytes() == b"2"
    assert server.asked == [("/b", None, None)]
    for mirror in (0, 3):
        with pytest.raises(UserError, match=f"--mirror {mirror}: mine has the mirrors 1 to 2"):
            download(corpus, tmp_path, mirror=mirror)


def test_full_disk_is_not_the_mirrors_fault(server, tmp_path, monkeypatch, capsys):
    server.files.update({"/a": {}, "/b": {}})

    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module.os, "fsync", full)
    with pytest.raises(SystemExit), clean_exit():
        get(server, tmp_path, "/a", "/b")
    assert capsys.readouterr().err.startswith("error: the disk is full")
    assert len(server.asked) == 1
    monkeypatch.undo()
    assert get(server, tmp_path, "/a") == CONTENT


def test_fetch(server, tmp_path, monkeypatch, capsys):
    server.files.update({"/a": {}, "/b": {"content": b"{}"}})
    one, two = (Download("a.json", (server.url + path,)) for path in ("/a", "/b"))
    monkeypatch.setitem(INSTRUCTIONS, "mine", reader(one, licence="CC0"))
    config = parse_config(DownloadConfig, ["mine", "--out", str(tmp_path)])
    assert fetch(config) == {"name": "mine", "files": [str(tmp_path / "a.json")]}
    assert "licence: CC0" in capsys.readouterr().out
    monkeypatch.setitem(PREFERENCES, "mine", reader())
    assert fetch(config)["files"]  # the other has nothing to download
    monkeypatch.setitem(PREFERENCES, "mine", reader(two))
    with pytest.raises(UserError, match="mine is the name of several corpora: add --table sft or --table preferences"):
        fetch(config)
    assert fetch(DownloadConfig("mine", tmp_path / "b", table="preferences"))["files"] == [str(tmp_path / "b" / "a.json")]
    assert (tmp_path / "b" / "a.json").read_bytes() == b"{}"
    monkeypatch.chdir(tmp_path)  # corpora of one name do not share a folder: each would read the other's files
    assert fetch(DownloadConfig("mine", table="sft"))["files"] == [str(Path("data/mine-sft/a.json"))]
    assert fetch(DownloadConfig("mine", table="preferences"))["files"] == [str(Path("data/mine-preferences/a.json"))]
    monkeypatch.delitem(PREFERENCES, "mine")
    assert fetch(DownloadConfig("mine"))["files"] == [str(Path("data/mine/a.json"))]
    monkeypatch.setitem(INSTRUCTIONS, "bare", reader(name="bare"))
    with pytest.raises(UserError, match=r"bare cannot be fetched by a program; get it here: https://example.org/mine"):
        fetch(DownloadConfig("bare"))
    with pytest.raises(UserError, match="there is no corpus 'nobody'"):
        fetch(DownloadConfig("nobody"))
