"""Runs: what lies in a run directory, what of it is whole, and whether this command may go on with it.

    out/pretrain/step-000200/    complete or absent: written beside as .step-000200.partial, fsynced, renamed
    …/manifest.json              size and sha256 of every file in it; whatever does not match is named and passed over

Everything here is files and decisions: what is in the tensors is checkpoint.py's.
"""

from __future__ import annotations

from settings import UserError, config_to_dict, read_json

import json
import os
import re
import shutil
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from files import file_sha256, fsync_directory, lock, write_json

STEP_NAME = re.compile(r"step-(\d{6,})$")
STATE_FORMAT = 2  # of state.json and the files beside it

# ----------------------------------------------------------------------------------------------------------------------
# Steps


def steps(out: Path) -> list[Path]:
    """The step directories of a run, oldest first."""
    return sorted((p for p in Path(out).glob("step-*") if STEP_NAME.search(p.name)), key=lambda p: int(p.name[5:]))


def newest_step(out: Path) -> Path | None:
    """The newest step whose files are all there and unchanged; a broken one is named on stderr and passed over."""
    for step in reversed(steps(out)):
        if not (problem := damage(step)):
            return step
        print(f"warning: {step} is incomplete or damaged ({problem}); using the one before it", file=sys.stderr)
    return None


def is_intact(step: Path) -> bool:
    return damage(step) == ""


def damage(step: Path, without: tuple[str, ...] = ()) -> str:
    """What is wrong with a step, or ''. Files whose names begin with one of `without` are not looked at."""
    try:
        files = json.loads((step / "manifest.json").read_text(encoding="utf-8"))["files"]
        names = [name for name in files if not name.startswith(without)] if without else list(files)
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # hashing releases the interpreter
            found = pool.map(lambda name: _file_damage(step / name, files[name]), names)
            return next((problem for problem in found if problem), "")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"manifest.json: {type(error).__name__} {error}"


def _file_damage(file: Path, entry: dict) -> str:
    if not file.is_file():
        return f"{file.name} is missing"
    if file.stat().st_size != entry["size"]:
        return f"{file.name} has {file.stat().st_size:,} bytes instead of {entry['size']:,}"
    return "" if file_sha256(file) == entry["sha256"] else f"{file.name} has changed"


def manifest_entries(directory: Path, names: Iterable[str]) -> dict[str, dict]:
    return {name: {"size": (directory / name).stat().st_size, "sha256": file_sha256(directory / name)} for name in names}


def begin_step(out: Path, step: int) -> Path:
    """An empty hidden directory to write a step into; what killed runs left there goes."""
    for left in Path(out).glob(".step-*.partial"):
        shutil.rmtree(left)
    partial = Path(out) / f".step-{step:06d}.partial"
    partial.mkdir()
    return partial


def finish_step(partial: Path, entries: dict[str, dict]) -> Path:
    """Add the manifest and give the step its name: from now on it exists."""
    target = partial.with_name(partial.name.removeprefix(".").removesuffix(".partial"))
    write_json(partial / "manifest.json", {"files": entries})
    fsync_directory(partial)
    shutil.rmtree(target, ignore_errors=True)
    os.replace(partial, target)
    fsync_directory(target.parent)
    return target


def prune(out: Path, keep: int, best: int | None) -> None:
    """Keep the newest steps, and the one with the best validation loss."""
    for old in steps(out)[:-keep]:
        if int(old.name[5:]) != best:
            shutil.rmtree(old)


def note_best(state: dict, val_loss: float, saved: Path | None) -> None:
    """Remember in a run's state which of the steps that were saved has the lowest validation loss."""
    best = state.get("best")
    if saved is not None and saved.name == f"step-{state['step']:06d}" and (best is None or val_loss < best["val_loss"]):
        state["best"] = {"step": state["step"], "val_loss": val_loss}


def best_step(out: Path, state: dict) -> str | None:
    """Which kept step has a lower validation loss than the last one, in words; None if that is the last one itself."""
    best = state.get("best")
    if best is None or best["step"] == state["step"] or not (step := Path(out) / f"step-{best['step']:06d}").exists():
        return None
    return f"validation loss {best['val_loss']:.3f} at step {best['step']:,}, before the end: {step}"


# ----------------------------------------------------------------------------------------------------------------------
# Run directories


def open_run(out: Path, config, *, identity: dict) -> Path | None:
    """Decide what a stage does with its output directory; writes nothing. Rank 0 decides for all: machine.on_main.

    Returns the step directory to go on from, or None for a fresh start. Raises `Finished` when the run is complete.
    Raises UserError when the directory holds something else, or the same run with other settings (those in config.HARMLESS
    cannot change the result) unless config.resume_anyway; `identity` is what the run's input was (data, tokenizer, first
    weights).
    """
    out, resume = Path(out), config.resume
    named = None
    if resume not in ("auto", "never"):
        named = Path(resume) if STEP_NAME.search(Path(resume).name) else newest_step(Path(resume))
        problem = damage(named) if named else "no step directory in it"
        if problem:
            raise UserError(f"--resume {resume} is no intact step ({problem}); it takes auto, never, a run or one of its steps")
    parent = next(path for path in (out, *out.absolute().parents) if path.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise UserError(f"--out {out}: {parent} is {'not writable' if parent.is_dir() else 'not a directory'}")
    newest = newest_step(out) if out.is_dir() else None
    if named and (newest is None or named.resolve() != newest.resolve()):  # a branch of another run: its settings may differ
        if out.exists() and any(out.iterdir()):
            raise UserError(f"--out {out} already holds something: to go on from {named}, choose another directory")
        return named
    if not out.is_dir() or not set(os.listdir(out)) - {".lock"}:
        return None
    if not (out / "args.json").exists():
        raise UserError(f"--out {out} holds something that is not a run of ours; choose another directory")
    if resume == "never":
        raise UserError(f"--out {out} already holds a run; choose another directory, delete it, or leave out --resume never")
    finished = (out / "config.json").exists()
    if not steps(out) and not finished:
        return None  # it ended before there was anything to keep
    stored = read_json(out / "args.json")
    before, now = stored.pop("run", {}).get("identity", {}), config_to_dict(config)
    different = [f"--{key.replace('_', '-')} was {stored.get(key)} and is {value}" for key, value in now.items()
                 if key not in config.HARMLESS and stored.get(key) != _as_json(value)]  # fmt: skip
    different += [f"{key} has changed" for key, value in identity.items() if before.get(key) != value]
    if different and not config.resume_anyway:
        raise UserError(f"--out {out} holds a run with other settings: {'; '.join(different)}. "
                        "Choose another --out, the same settings to go on, or --resume-anyway to change the run from here")  # fmt: skip
    if different:
        print(f"warning: the run in {out} goes on with other settings: {'; '.join(different)}", file=sys.stderr)
    elif finished:
        raise Finished(out)
    return newest


def check_shared(step: Path | None) -> None:
    """Raises UserError where this process does not see the step that rank 0 has found."""
    if step is not None and not step.exists():
        raise UserError(f"{step} is not to be seen on this machine: all machines must share the directory of --out")


class Finished(Exception):
    """The run in this directory is complete: nothing is left to do."""


def _as_json(value):
    return json.loads(json.dumps(value))


def lock_run(out: Path):
    """Reserve the run for this process: the lock is the returned open file, and ends with it. UserError if it is taken."""
    return lock(out / ".lock", f"another process is training in --out {out}; wait for it, or choose another directory")


def start_run(out: Path, config, identity: dict, facts: dict) -> None:
    """Create the run directory with args.json: the settings, and under "run" what they met (never read as settings)."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "config.json").unlink(missing_ok=True)  # a finished run that goes on is not finished
    write_json(out / "args.json", {**config_to_dict(config), "run": {"identity": identity, **facts}})
