"""Runs: what lies in a run directory, what of it is whole, and whether this command may go on with it.

    out/pretrain/step-000200/    complete or absent: written beside as .step-000200.partial, fsynced, renamed
    …/manifest.json              size and sha256 of every file in it; whatever does not match is named and passed over

Everything here is files and decisions: what is in the tensors is checkpoint.py's.
"""

from __future__ import annotations

from settings import UserError, config_to_dict, read_json

import contextlib
import dataclasses
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
LAST_WRITTEN = ("config.json", "adapter_config.json")  # one of them, of a run that is finished

# ----------------------------------------------------------------------------------------------------------------------
# Steps


def steps(out: Path) -> list[Path]:
    """The step directories of a run, oldest first."""
    return sorted((p for p in Path(out).glob("step-*") if STEP_NAME.search(p.name)), key=lambda p: int(p.name[5:]))


def newest_step(out: Path) -> Path | None:
    """The newest step whose files are all there and unchanged; a broken one is named on stderr and passed over.

    None where there is no step. Raises UserError where there are some and none is intact: to begin anew would lose them.
    """
    for step in reversed(found := steps(out)):
        if not (problem := damage(step)):
            return step
        print(f"warning: {step} is incomplete or damaged ({problem})", file=sys.stderr)
    if found:
        raise UserError(f"{out} has {len(found)} checkpoint{'s' * (len(found) > 1)} and none is intact: look at the disk they are on; "
                        "copy them back if they were copied, or delete them to begin anew")  # fmt: skip
    return None


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
    """An empty hidden directory to write a step into."""
    remove_leftovers(out)
    partial = Path(out) / f".step-{step:06d}.partial"
    partial.mkdir()
    return partial


def remove_leftovers(out: Path) -> None:
    """What a killed process was writing or deleting."""
    for left in [*Path(out).glob(".step-*.partial"), *Path(out).glob(".step-*.going")]:
        shutil.rmtree(left, ignore_errors=True)


def remove_step(step: Path) -> None:
    """Hide it first: a kill in the middle must not leave half a step under its name. What a network disk does not let go now,
    because somebody is reading it, remove_leftovers() takes later."""
    going = step.with_name(f".{step.name}.going")
    shutil.rmtree(going, ignore_errors=True)
    os.replace(step, going)
    shutil.rmtree(going, ignore_errors=True)


def finish_step(partial: Path, entries: dict[str, dict]) -> Path:
    """Add the manifest and give the step its name: from now on it exists."""
    target = partial.with_name(partial.name.removeprefix(".").removesuffix(".partial"))
    write_json(partial / "manifest.json", {"files": entries})
    fsync_directory(partial)
    if target.exists():  # a damaged one, or one that another run left
        remove_step(target)
    os.replace(partial, target)
    fsync_directory(target.parent)
    return target


def prune(saved: Path, keep: int, best: int | None) -> None:
    """After a save: keep the newest `keep` steps up to it, and the one with the best validation loss. Steps beyond it are of the
    past that was given up when the run went back to an earlier one."""
    number = lambda step: int(step.name[5:])  # noqa: E731
    found = steps(saved.parent)
    kept = [step for step in found if number(step) <= number(saved)][-keep:]
    for step in found:
        if step not in kept and number(step) != best:
            remove_step(step)


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


def claim_run(machine, config, *, identity: dict) -> Path | None:
    """open_run() for all ranks, and the lock that keeps other processes out of the run until this one ends.

    Raises UserError where ranks were started with other flags or other files, or do not see the same directory.
    """
    flags = {f"--{key.replace('_', '-')}": value for key, value in config_to_dict(config).items()
             if not isinstance(getattr(config, key), Path)}  # fmt: skip
    machine.check_equal(flags | identity)

    def decide() -> Path | None:
        # An existing run is locked before it is looked at; elsewhere not even a lock is left before we know that it is ours.
        held = lock_run(config.out) if (config.out / "args.json").exists() else None
        resume_from = open_run(config.out, config, identity=identity)
        if held is None:
            held = lock_run(config.out)
            if (config.out / "args.json").exists():
                raise UserError(f"--out {config.out}: another process has begun a run there this moment; start again")
        machine.hold(held)
        return resume_from

    resume_from = machine.on_main(decide)
    machine.together(lambda: check_shared(resume_from))
    return resume_from


def open_run(out: Path, config, *, identity: dict) -> Path | None:
    """Decide what a stage does with its output directory; writes nothing.

    Returns the step directory to go on from (one's own, or at first another run's that --resume names), or None for a fresh
    start. Raises `Finished` when the run is complete.
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
    if not out.is_dir() or all(name.startswith(".") for name in os.listdir(out)):  # nothing but a lock, or what a kill left
        return named
    if not (out / "args.json").exists():
        raise UserError(f"--out {out} holds something that is not a run of ours; choose another directory")
    if resume == "never":
        raise UserError(f"--out {out} already holds a run; choose another directory, delete it, or leave out --resume never")
    stored, newest, finished = read_json(out / "args.json"), newest_step(out), is_finished(out)
    if named and stored.get("resume") != resume and (newest is None or named.resolve() != newest.resolve()):
        raise UserError(f"--out {out} already holds another run: to go on from {named}, choose another directory")
    if newest is None and not finished:  # it ended before there was anything to keep
        if (source := stored.get("resume", "auto")) not in ("auto", "never", resume):
            raise UserError(f"--out {out} was begun with --resume {source} and has saved nothing yet: give that flag again, or "
                            "choose another directory")  # fmt: skip
        return named
    before, now = stored.pop("run", {}).get("identity", {}), config_to_dict(config)
    # What an older Cria could not be told, it did as today's default does.
    stored = {field.name: field.default for field in dataclasses.fields(config) if field.default is not dataclasses.MISSING} | stored
    different = [f"--{key.replace('_', '-')} was {stored.get(key)} and is {value}" for key, value in now.items()
                 if key not in config.HARMLESS and stored.get(key) != _as_json(value)]  # fmt: skip
    different += [f"{key} has changed" for key, value in identity.items() if before.get(key) != value]
    if different and not config.resume_anyway:
        raise UserError(f"--out {out} holds a run with other settings: {'; '.join(different)}. "
                        "Choose another --out, the same settings to go on, or --resume-anyway to change the run from here")  # fmt: skip
    if different and newest is None:
        raise UserError(f"--out {out} is finished and its steps are gone, so it cannot go on: --init-from {out} builds on its weights, in "
                        "another --out")  # fmt: skip
    if different:
        print(f"warning: the run in {out} goes on with other settings: {'; '.join(different)}", file=sys.stderr)
    elif finished:
        raise Finished(out)
    return newest


def is_finished(out: Path) -> bool:
    return any((out / name).exists() for name in LAST_WRITTEN)


def check_shared(path: Path | None) -> None:
    """Raises UserError where this process does not see what rank 0 has found or written."""
    if path is not None and not path.exists():
        raise UserError(f"{path} is not to be seen on this machine: all machines must share the directory of --out")


class Finished(Exception):
    """The run in this directory is complete: nothing is left to do."""


def _as_json(value):
    return json.loads(json.dumps(value))


class lock_run:
    """Reserve the run for this process until close(), or its end. UserError if another process has it.

    What a killed process left half-written or half-deleted goes.
    """

    def __init__(self, out: Path):
        self.out = out
        self.file = lock(out / ".lock", f"another process is training in --out {out}; wait for it, or choose another directory")
        remove_leftovers(out)

    def close(self) -> None:
        if not (self.out / "args.json").exists():  # a mistake was found before the run began: nothing is left of it
            (self.out / ".lock").unlink(missing_ok=True)
            with contextlib.suppress(OSError):
                self.out.rmdir()
        self.file.close()


def start_run(out: Path, config, identity: dict, facts: dict) -> None:
    """Create the run directory with args.json: the settings, and under "run" what they met (never read as settings)."""
    out.mkdir(parents=True, exist_ok=True)
    for name in LAST_WRITTEN:  # a finished run that goes on is not finished
        (out / name).unlink(missing_ok=True)
    write_json(out / "args.json", {**config_to_dict(config), "run": {"identity": identity, **facts}})
