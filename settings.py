"""Settings and errors: what every command line in this repository shares.

    settings    one frozen dataclass per stage -> flags, --help, --config args.json, all mistakes named at once
    errors      UserError -> one line on stderr and exit status 2, however many processes share the mistake;
                a bug keeps its traceback

Imports nothing heavy, so that `tokenizer.py show` and the workers of data_process.py start fast.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import difflib
import errno
import json
import math
import os
import signal
import sys
import time
import types
import typing
from pathlib import Path

# Threads that wait for each other sleep rather than spin. With spinning threads a second busy process on the machine slows a
# small model down fifty-fold. It must be set before torch is imported, which is why every file imports settings first.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


class UserError(Exception):
    """A mistake the user can mend. Shown as one line, `error: …`, with exit status 2 and no traceback."""


class LostContact(UserError):
    """The connection to another process of the run broke: mostly the consequence of an error that the other one reports."""


# ----------------------------------------------------------------------------------------------------------------------
# Settings: a frozen dataclass is the only place where a default and its explanation stand.


def flag(default=dataclasses.MISSING, help: str = "", choices: tuple | None = None, positional: bool = False):
    """A dataclass field that is also a command-line flag. Without a default the flag is required.

    `positional`: given as a bare word, `look data/sft`, not as `--data data/sft`; at most one field of a class.

    The flag's type is the field's annotation: int, float, str, bool (`--x` / `--no-x`), Path, `T | None`,
    or `tuple[str, ...]` (one or more values).
    """
    return dataclasses.field(default=default, metadata={"help": help, "choices": choices, "positional": positional})


def parse_config(config_class, argv=None, *, description: str = "", prog: str | None = None):
    """Read flags into a `config_class`. `--batch-size` and `--batch_size` both work; `--config args.json` gives
    values that flags on the command line override.

    Raises UserError that names every unknown, missing or unreadable flag at once. If the class has a method
    `problems() -> list[str]`, what it returns is reported in the same way.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    argv = [_dashes(word) for word in argv]
    parser = _Parser(
        prog=prog, description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--config", metavar="FILE", help="take settings from an args.json; flags given here win")
    hints = typing.get_type_hints(config_class)
    fields = {field.name: field for field in dataclasses.fields(config_class)}
    for field in sorted(fields.values(), key=lambda field: field.default is not dataclasses.MISSING):  # required ones first
        _add_flag(parser, field, hints[field.name])

    if "LOCAL_RANK" in os.environ:  # the deepspeed launcher says it once more, as a flag
        parser.add_argument("--local-rank", help=argparse.SUPPRESS)

    values, unknown = parser.parse_known_args(argv)
    problems = parser.problems + [f"unknown flag {word}" for word in unknown if word.startswith("-")]
    if not problems:  # words after an unknown flag are its values
        problems = [f"unexpected word {word!r}" for word in unknown]
    settings = {}
    if values.config:
        stored = read_json(values.config)
        if not isinstance(stored, dict):
            raise UserError(f"{values.config} is not an args.json: it holds no settings by name")
        # args.json of a run also records what the run found out (device, versions …) under "run": not settings.
        stored.pop("run", None)
        problems += [f"{values.config} sets {key}, which is no setting here" for key in stored if key not in fields]
        for key, value in stored.items():
            if key in fields:
                mistake = _misfit(value, hints[key], fields[key].metadata.get("choices"))
                problems += [f"{values.config} sets {key} to {value!r}: {mistake}"] if mistake else []
                settings |= {} if mistake else {key: value}
    settings.update({key: value for key, value in vars(values).items() if key in fields and value is not _UNSET})
    for name, field in fields.items():
        if name not in settings and field.default is dataclasses.MISSING:
            shown = name.upper() if field.metadata.get("positional") else _flag_name(name)
            problems.append(f"{shown} is required: {field.metadata['help']}")
            settings[name] = None
    config = config_class(**{name: _from_json(value, hints[name]) for name, value in settings.items()})
    if hasattr(config, "problems") and None not in [settings.get(name, ()) for name, f in fields.items()
                                                    if f.default is dataclasses.MISSING]:  # fmt: skip
        problems += config.problems()
    if problems:
        raise UserError("; ".join(problems) + f" (see {Path(parser.prog).name} --help)")
    return config


def too_small(config, *names: str, least: float | None = None) -> list[str]:
    """What to say of each named setting that is not above 0 (or below `least`); settings that are None pass."""
    bound = "above 0" if least is None else f"at least {least}"
    return [f"{_flag_name(name)} must be {bound}, not {value}" for name in names if (value := getattr(config, name)) is not None
            and not (0 < value < math.inf if least is None else least <= value < math.inf)]  # fmt: skip


def config_to_dict(config) -> dict:
    """The settings as JSON can hold them; parse_config reads them back with --config."""
    return {k: str(v) if isinstance(v, Path) else v for k, v in dataclasses.asdict(config).items()}


def command_line(main, config_class, argv=None, *, description: str = "", commands: dict | None = None) -> None:
    """What stands under `if __name__ == "__main__"`: flags -> config -> main(config), with clean errors.

    `commands` maps sub-command names to (main, config_class, one-line help) for tools that have several.
    """
    with clean_exit():
        argv = list(sys.argv[1:] if argv is None else argv)
        prog = Path(sys.argv[0]).name
        if commands:
            name = argv[0] if argv else "--help"
            if name in ("-h", "--help"):
                width = max(map(len, commands))
                print(description.strip() + "\n\ncommands:")
                print("\n".join(f"  {key:<{width}}  {text}" for key, (_, _, text) in commands.items()))
                print(f"\n{prog} COMMAND --help lists a command's flags.")
                return
            if name not in commands:
                near = difflib.get_close_matches(name, commands, n=1)
                hint = f"did you mean {near[0]}? " if near else ""
                raise UserError(f"unknown command {name!r}; {hint}There are {', '.join(commands)} (see {prog} --help)")
            main, config_class, description = commands[name]
            argv, prog = argv[1:], f"{prog} {name}"
        main(parse_config(config_class, argv, description=description, prog=prog))
    if process_groups:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


# ----------------------------------------------------------------------------------------------------------------------
# Errors: one line per machine, though every process of torchrun meets the same mistake.
#
# What torchrun (torch 2.13) does, and the rules below rely on: it looks at its workers ten times a second; the first that
# ended with a status other than 0 makes it send SIGTERM to the rest, and SIGKILL 30 s later; then it prints a report of
# its own and exits 1. If it loses its store on another machine, it sends SIGTERM too. If it is itself killed, its workers
# are left running. Each worker is told of a file for its error, whose text the report repeats; the files of one machine
# and one attempt lie in one new directory: ATTEMPT/LOCAL_RANK/error.json.

PATIENCE = 5.0  # seconds that a process waits for another one to speak first
being_ended = False  # SIGTERM has come: set below while waiting, and by the signal handler of a stage
# torch's process groups, kept until this process ends so that their destructor never runs: it waits for a thread that may wait
# for the interpreter, which the destructor holds.
process_groups: list = []


@contextlib.contextmanager
def clean_exit():
    """UserError -> `error: …` on stderr and exit 2. A full disk and a missing optional package count as such."""
    try:
        yield
    except LostContact as error:
        _fail(str(error), patience=PATIENCE)
    except UserError as error:
        _fail(str(error))
    except BrokenPipeError:  # `… | head` closed our stdout
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except KeyboardInterrupt:
        if _first_to_speak():
            print("interrupted", file=sys.stderr, flush=True)
        sys.exit(130)
    except Exception as error:
        if isinstance(error, OSError) and (text := _explained(error)):
            _fail(text)
        _first_to_speak()  # this traceback tells more than the others can, who only lose contact
        raise


def _explained(error: OSError) -> str:
    """What to tell the user of a refusal by the operating system, or '' if it looks like a bug of ours."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        where = f" while writing {error.filename}" if error.filename else ""
        return f"the disk is full{where}; free some space and run the same command again (what was complete before is intact)"
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR):
        return f"{error.filename}: {os.strerror(error.errno)}" if error.filename else os.strerror(error.errno)
    return ""


def _fail(text: str, patience: float = 0.0) -> None:
    """End this process with status 2; one of the machine's processes says why.

    `patience`: seconds to give the process that knows the cause. SIGTERM cuts it short.
    """
    text = " ".join(text.split())
    if not _has_fellows():
        print(f"error: {text}", file=sys.stderr, flush=True)
        sys.exit(2)
    if _attempt() is None and os.environ.get("LOCAL_RANK", "0") != "0":
        patience += PATIENCE  # another launcher than torchrun: local rank 0 has most likely said the same
    _wait_for_the_end(patience)
    if _first_to_speak() if _attempt() else not (patience and being_ended):  # whoever ended it has had its say
        line = f"[rank {os.environ['RANK']}] {text}"
        sys.stderr.write(f"error: {line}\n")  # in one piece, which print() is not: all processes share this stderr
        _tell_torchrun(line)
    with contextlib.suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(2)  # sys.exit would tidy up first, and a torn process group can block that for minutes


def _has_fellows() -> bool:
    return "RANK" in os.environ and os.environ.get("WORLD_SIZE", "1") != "1"


def _attempt() -> Path | None:
    """The directory that torchrun's workers of this machine share. None alone, and under another launcher."""
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    return Path(file).parent.parent if file and _has_fellows() else None


def _wait_for_the_end(seconds: float) -> None:
    """Wait until the launcher or the user ends this process, for so long at most."""
    global being_ended

    def end(number, frame):
        global being_ended
        being_ended = True

    with contextlib.suppress(ValueError):  # only the main thread may set handlers
        for name in ("SIGTERM", "SIGINT", "SIGHUP"):
            if hasattr(signal, name):
                signal.signal(getattr(signal, name), end)
    until = time.monotonic() + seconds
    while not being_ended and time.monotonic() < until:
        time.sleep(0.05)


def _first_to_speak() -> bool:
    """True in the first process of this machine that asks, and in each where there is no telling."""
    if _attempt() is None:
        return True
    try:
        os.close(os.open(_attempt() / "spoken", os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        return True
    except OSError as error:
        return not isinstance(error, FileExistsError)


def _tell_torchrun(line: str) -> None:
    """Have torchrun repeat the line at the end of its report, in place of "To enable traceback see …"."""
    details = {"py_callstack": line, "timestamp": str(int(time.time()))}
    if _attempt() is not None:
        with contextlib.suppress(OSError):
            Path(os.environ["TORCHELASTIC_ERROR_FILE"]).write_text(json.dumps({"message": {"message": line, "extraInfo": details}}))


# ----------------------------------------------------------------------------------------------------------------------


def read_json(path) -> dict:
    """Parse one JSON file. Raises UserError naming the file, and the line of a syntax error."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except IsADirectoryError:
        raise UserError(f"{path} is a directory; a JSON file is needed") from None
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8 text") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{error.lineno}: not valid JSON: {error.msg}") from None
    except (ValueError, RecursionError) as error:  # a number or a nesting without end
        raise UserError(f"{path}: not valid JSON: {error}") from None


_UNSET = object()


class _Parser(argparse.ArgumentParser):
    """argparse stops at the first mistake; this one collects them, so that a user mends all at once."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.problems = []

    def error(self, message):
        raise UserError(f"{message} (see {Path(self.prog).name} --help)")

    def _get_values(self, action, arg_strings):
        try:
            return super()._get_values(action, arg_strings)
        except argparse.ArgumentError as error:
            self.problems.append(str(error).replace("argument ", ""))
            return _UNSET


def _flag_name(name: str) -> str:
    return "--" + name.replace("_", "-")


def _dashes(word: str) -> str:
    if not word.startswith("--"):
        return word
    name, equals, value = word.partition("=")
    return name.replace("_", "-") + equals + value


def _unwrap_optional(hint):
    """`int | None` -> (int, True); `int` -> (int, False)."""
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        return next(arg for arg in typing.get_args(hint) if arg is not type(None)), True
    return hint, False


def _add_flag(parser, field, hint):
    hint, _ = _unwrap_optional(hint)
    text = field.metadata.get("help", "").replace("%", "%%")
    if field.default not in (dataclasses.MISSING, None, "", ()):
        shown = " ".join(map(str, field.default)) if isinstance(field.default, tuple) else field.default
        text += f" [{ {True: 'on', False: 'off'}.get(shown, shown) if isinstance(shown, bool) else shown}]"
    options = dict(default=_UNSET, help=text, choices=field.metadata.get("choices"))
    if field.metadata.get("positional"):
        parser.add_argument(field.name, nargs="?", type=Path if hint is Path else str, metavar=field.name.upper(), **options)
    elif hint is bool:
        options.pop("choices")
        parser.add_argument(_flag_name(field.name), action=argparse.BooleanOptionalAction, **options)
    elif typing.get_origin(hint) is tuple:
        parser.add_argument(_flag_name(field.name), nargs="+", metavar=field.name.upper(), **options)
    else:
        kind = {int: _int, float: float, Path: Path}.get(hint, str)
        metavar = None if options["choices"] else {int: "N", float: "X", Path: "PATH"}.get(hint, "TEXT")
        parser.add_argument(_flag_name(field.name), type=kind, metavar=metavar, **options)


def _int(text: str) -> int:
    """Whole numbers, also as 2_000 or 1e9."""
    try:
        return int(text)
    except ValueError:
        number = float(text)
        if not math.isfinite(number) or number != int(number):
            raise
        return int(number)


_int.__name__ = "whole number"  # argparse prints this name


def _misfit(value, hint, choices: tuple | None) -> str:
    """What is wrong with a value from JSON, or ''."""
    hint, optional = _unwrap_optional(hint)
    kinds = {int: int, float: (int, float), bool: bool, Path: str}.get(hint, list if typing.get_origin(hint) is tuple else str)
    if value is None:
        return "" if optional else "it needs a value"
    if not isinstance(value, kinds) or (isinstance(value, bool) and hint is not bool):
        return f"it must be of type {getattr(hint, '__name__', hint)}"
    return f"it must be one of {', '.join(choices)}" if choices and value not in choices else ""


def _from_json(value, hint):
    hint, _ = _unwrap_optional(hint)
    if value is None:
        return None
    if typing.get_origin(hint) is tuple:
        return tuple(value)
    return Path(value) if hint is Path else float(value) if hint is float and isinstance(value, int) else value
