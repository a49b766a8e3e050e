"""settings.py: one dataclass -> flags; all mistakes in one line; exit status 2."""

from __future__ import annotations

from settings import UserError, clean_exit, command_line, config_to_dict, flag, parse_config, read_json, too_small

import errno
import json
import os
from dataclasses import dataclass
from pathlib import Path

import pytest


@dataclass(frozen=True, kw_only=True)
class Config:
    data: Path = flag(help="where the data is")
    batch_size: int = flag(64, "sequences per step")
    lr: float = flag(1e-3, "learning rate")
    steps: int | None = flag(None, "steps")
    compile: bool = flag(False, "compile")
    names: tuple[str, ...] = flag(("a",), "names")
    mode: str = flag("x", "a choice", choices=("x", "y"))

    def problems(self) -> list[str]:
        return too_small(self, "lr") + too_small(self, "steps", least=1)


def test_both_spellings_types_and_defaults():
    config = parse_config(Config, ["--data", "d", "--batch_size", "1e3", "--compile", "--names", "p", "q", "--lr=2e-4"])
    assert config == Config(data=Path("d"), batch_size=1000, compile=True, names=("p", "q"), lr=2e-4)
    assert parse_config(Config, ["--data", "d", "--no-compile"]) == Config(data=Path("d"))


def test_a_positional_word():
    @dataclass(frozen=True)
    class Look:
        data: Path = flag(positional=True, help="a directory")
        count: int = flag(3, "how many")

    for argv in (["d", "--count", "5"], ["--count", "5", "d"]):
        assert parse_config(Look, argv) == Look(Path("d"), 5)
    with pytest.raises(UserError, match=r"^DATA is required: a directory"):
        parse_config(Look, [])
    with pytest.raises(UserError, match="unexpected word 'e'"):
        parse_config(Look, ["d", "e"])


def test_a_config_file_repeats_a_run_and_flags_win(tmp_path):
    config = Config(data=Path("d"), lr=1.0, names=("p",), steps=7)
    (tmp_path / "args.json").write_text(json.dumps({**config_to_dict(config), "run": {"device": "cpu"}}))
    assert parse_config(Config, ["--config", str(tmp_path / "args.json")]) == config
    assert parse_config(Config, ["--config", str(tmp_path / "args.json"), "--steps", "9"]).steps == 9
    (tmp_path / "other.json").write_text('{"colour": 3}')
    with pytest.raises(UserError, match="sets colour, which is no setting here"):
        parse_config(Config, ["--config", str(tmp_path / "other.json"), "--data", "d"])


def test_all_mistakes_are_named_at_once():
    with pytest.raises(UserError) as error:
        parse_config(Config, ["--data", "d", "--batch-size", "many", "--lr", "-1", "--steps", "0", "--colour", "red", "--mode", "z"])
    for part in ("--batch-size", "'many'", "--lr must be above 0, not -1.0", "--steps must be at least 1, not 0",
                 "unknown flag --colour", "invalid choice: 'z'"):  # fmt: skip
        assert part in str(error.value), part
    with pytest.raises(UserError, match="--data is required: where the data is"):
        parse_config(Config, [])
    with pytest.raises(UserError, match="unexpected word 'oops'"):
        parse_config(Config, ["--data", "d", "oops"])


def test_help_shows_every_flag_with_its_default(capsys):
    with pytest.raises(SystemExit) as status:
        parse_config(Config, ["--help"])
    printed = " ".join(capsys.readouterr().out.split())
    assert status.value.code == 0
    for part in ("--batch-size N sequences per step [64]", "learning rate [0.001]", "compile [off]", "names [a]", "{x,y} a choice [x]"):
        assert part in printed


@pytest.mark.parametrize("error, code, text", [
    (UserError("two\nlines"), 2, "error: two lines"),
    (OSError(errno.ENOSPC, "No space left", "out/x"), 2, "error: the disk is full while writing out/x"),
    (KeyboardInterrupt(), 130, "interrupted"),
])  # fmt: skip
def test_mistakes_end_with_one_line(capsys, error, code, text):
    with pytest.raises(SystemExit) as status, clean_exit():
        raise error
    assert status.value.code == code
    printed = capsys.readouterr().err
    assert printed.startswith(text) and printed.count("\n") == 1


def test_a_bug_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError), clean_exit():
        raise ZeroDivisionError


def test_commands(capsys):
    seen = []
    commands = {"go": (seen.append, Config, "goes"), "stop": (seen.append, Config, "stops")}
    command_line(None, None, ["go", "--data", "d"], commands=commands)
    assert seen == [Config(data=Path("d"))]
    command_line(None, None, [], description="A tool.", commands=commands)
    assert "A tool." in (printed := capsys.readouterr().out) and "go    goes" in printed
    with pytest.raises(SystemExit) as status:
        command_line(None, None, ["run"], commands=commands)
    assert status.value.code == 2 and "unknown command 'run'; There are go, stop" in capsys.readouterr().err


@pytest.mark.parametrize("content, message", [
    (None, "does not exist"), (b"{\n 'a': 1}", r"x\.json:2: not valid JSON"), (b"\xff\xfe{", "not UTF-8"),
])  # fmt: skip
def test_json_errors_name_file_and_line(tmp_path, content, message):
    if content is not None:
        (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_json(tmp_path / "x.json")
    with pytest.raises(UserError, match="is a directory"):
        read_json(tmp_path)


def test_waiting_threads_sleep():
    assert os.environ["OMP_WAIT_POLICY"]  # set by importing settings, unless the user has chosen
