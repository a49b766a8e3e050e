"""settings.py: one dataclass -> flags; all mistakes in one line, also of several processes; exit status 2."""

from __future__ import annotations

from settings import (
    LostContact,
    UserError,
    clean_exit,
    command_line,
    config_to_dict,
    flag,
    parse_config,
    read_json,
    too_small,
)

import errno
import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent


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
    (OSError(errno.EROFS, "", "out/x"), 2, "error: out/x: Read-only file system"),
    (PermissionError(errno.EACCES, "", "out/x"), 2, "error: out/x: Permission denied"),
    (OSError(errno.ENOSPC, ""), 2, "error: the disk is full; free"),
    (KeyboardInterrupt(), 130, "interrupted"),
])  # fmt: skip
def test_mistakes_end_with_one_line(capsys, error, code, text):
    with pytest.raises(SystemExit) as status, clean_exit():
        raise error
    assert status.value.code == code
    printed = capsys.readouterr().err
    assert printed.startswith(text) and printed.count("\n") == 1


@pytest.mark.parametrize("bug", [ZeroDivisionError(), OSError(errno.EIO, "Input/output error")])
def test_a_bug_keeps_its_traceback(bug):
    with pytest.raises(type(bug)), clean_exit():
        raise bug


# ---- several processes: one line per machine ---------------------------------------------------------------------------


def worker(error: str, rank: int, attempt: Path | None, patience: float = 60.0) -> subprocess.Popen:
    """A process that meets `error` as a worker of torchrun, or of another launcher when there is no `attempt` directory.
    It prints `waiting` once it waits for another one to speak."""
    script = f"""
import settings, time
sleep, settings.PATIENCE = time.sleep, {patience}
time.sleep = lambda seconds: (print("waiting", flush=True), sleep(seconds))
with settings.clean_exit():
    raise {error}
"""
    torchrun = {}
    if attempt:
        (attempt / str(rank)).mkdir(parents=True)
        torchrun = {"TORCHELASTIC_ERROR_FILE": str(attempt / str(rank) / "error.json")}
    return subprocess.Popen([sys.executable, "-c", script], cwd=REPOSITORY, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            env={**os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "3", **torchrun})  # fmt: skip


def said(process: subprocess.Popen) -> str:
    err = process.communicate(timeout=60)[1]
    assert process.returncode == 2, err
    return err


def ended_while_waiting(process: subprocess.Popen) -> str:
    assert process.stdout.readline() == "waiting\n"
    process.send_signal(signal.SIGTERM)
    return said(process)


def test_of_torchruns_workers_the_first_speaks_and_torchrun_repeats_it(tmp_path):
    workers = [worker("settings.UserError('no\\ndata')", rank, tmp_path) for rank in range(3)]
    lines = [said(process) for process in workers]
    (line,) = filter(None, lines)
    rank = lines.index(line)
    assert line == f"error: [rank {rank}] no data\n"
    (report,) = tmp_path.glob("*/error.json")
    assert report.parent.name == str(rank)
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

    failure = ProcessFailure(local_rank=rank, pid=1, exitcode=2, error_file=str(report))
    assert f"traceback : [rank {rank}] no data" in ChildFailedError("pretrain.py", {rank: failure}).format_msg()


def test_who_loses_contact_lets_the_cause_speak(tmp_path):
    lost = worker("settings.LostContact('rank 1 is gone')", 0, tmp_path)
    assert lost.stdout.readline() == "waiting\n"
    assert said(worker("OSError(28, '', 'out/x')", 1, tmp_path)).startswith("error: [rank 1] the disk is full while writing out/x")
    lost.send_signal(signal.SIGTERM)  # as torchrun does, now that rank 1 has failed
    assert said(lost) == ""


def test_who_loses_contact_speaks_when_nobody_else_does(tmp_path):
    killed = worker("settings.LostContact('rank 1 is gone')", 0, tmp_path / "killed")
    assert ended_while_waiting(killed) == "error: [rank 0] rank 1 is gone\n"  # SIGKILL left rank 1 no time for a word
    unplugged = worker("settings.LostContact('rank 1 is gone')", 0, tmp_path / "unplugged", patience=0.2)
    assert said(unplugged) == "error: [rank 0] rank 1 is gone\n"  # torchrun notices nothing: another machine is gone


def test_a_traceback_counts_as_having_spoken(tmp_path):
    bug = worker("ZeroDivisionError", 1, tmp_path)
    assert "Traceback" in bug.communicate(timeout=60)[1] and bug.returncode == 1
    assert ended_while_waiting(worker("settings.LostContact('rank 1 is gone')", 0, tmp_path)) == ""


def test_under_another_launcher_local_rank_0_speaks_at_once_and_the_others_unless_they_are_ended():
    assert said(worker("settings.UserError('no data')", 0, None)) == "error: [rank 0] no data\n"
    assert ended_while_waiting(worker("settings.UserError('no data')", 1, None)) == ""
    assert ended_while_waiting(worker("settings.LostContact('rank 1 is gone')", 0, None)) == ""
    assert said(worker("settings.UserError('my own data')", 1, None, patience=0.2)) == "error: [rank 1] my own data\n"


def test_a_process_alone_speaks_whatever_is_left_in_the_environment(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("WORLD_SIZE", "2")
    (tmp_path / "spoken").touch()
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "0" / "error.json"))
    with pytest.raises(SystemExit) as status, clean_exit():
        raise LostContact("no other process")
    assert status.value.code == 2 and capsys.readouterr().err == "error: no other process\n"


def test_the_flag_of_deepspeeds_launcher_is_ignored_where_its_variable_is_set(monkeypatch):
    for words in (["--local_rank=1"], ["--local-rank", "1"]):
        with pytest.raises(UserError, match="unknown flag --local-rank"):
            parse_config(Config, [*words, "--data", "d"])
        with monkeypatch.context() as environment:
            environment.setenv("LOCAL_RANK", "1")
            assert parse_config(Config, [*words, "--data", "d"]) == Config(data=Path("d"))


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
