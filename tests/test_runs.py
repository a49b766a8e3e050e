"""runs.py: a run directory is fresh, to be gone on with, finished, or somebody else's; steps are whole or passed over."""

from __future__ import annotations

from settings import UserError

import dataclasses
import json

import pytest

from runs import (
    Finished,
    begin_step,
    best_step,
    damage,
    finish_step,
    is_intact,
    lock_run,
    manifest_entries,
    note_best,
    open_run,
    prune,
    start_run,
    steps,
)


def make_step(out, number: int):
    folder = begin_step(out, number)
    (folder / "weights").write_bytes(b"abc" * number)
    assert not steps(out) or steps(out)[-1].name != folder.name  # hidden until it is finished
    return finish_step(folder, manifest_entries(folder, ["weights"]))


def test_a_step_exists_when_it_is_finished_and_is_whole_until_it_is_touched(tmp_path):
    step = make_step(tmp_path, 7)
    assert step.name == "step-000007" and is_intact(step) and damage(step) == ""
    (step / "weights").write_bytes(b"x" * 21)
    assert damage(step) == "weights has changed" and damage(step, without=("weights",)) == ""
    (step / "weights").write_bytes(b"x")
    assert damage(step) == "weights has 1 bytes instead of 21"
    (step / "weights").unlink()
    assert damage(step) == "weights is missing"
    (step / "manifest.json").write_text("{}")
    assert "manifest.json" in damage(step)


def test_the_best_step_is_kept_and_named(tmp_path):
    state = {"best": None, "step": 0}
    for number, loss in ((1, 3.0), (2, 2.0), (3, 2.5), (4, 2.6)):
        state["step"] = number
        saved = make_step(tmp_path, number)
        prune(tmp_path, keep=1, best=(state["best"] or {}).get("step"))
        note_best(state, loss, saved)
    note_best(state | {"step": 9}, 0.1, saved)  # step 9 was not saved: nothing to keep
    assert [step.name for step in steps(tmp_path)] == ["step-000002", "step-000004"]
    assert state["best"] == {"step": 2, "val_loss": 2.0}
    assert "2.000 at step 2, before the end" in best_step(tmp_path, state)
    assert best_step(tmp_path, state | {"step": 2}) is None and best_step(tmp_path / "elsewhere", state) is None


def test_a_change_can_be_forced_and_a_finished_run_be_gone_on_with(tmp_path, capsys):
    out = tmp_path / "run"
    start_run(out, Settings(), {"data": "abc"}, {})
    step = make_step(out, 3)
    (out / "config.json").write_text("{}")
    with pytest.raises(Finished):
        open_run(out, Settings(), identity={"data": "abc"})
    with pytest.raises(Finished):
        open_run(out, Settings(resume_anyway=True), identity={"data": "abc"})
    with pytest.raises(UserError, match=r"--lr was 1.0 and is 2.0; data has changed\..*--resume-anyway"):
        open_run(out, Settings(lr=2.0), identity={"data": "xyz"})
    assert open_run(out, Settings(lr=2.0, resume_anyway=True), identity={"data": "xyz"}) == step
    assert "goes on with other settings: --lr was 1.0 and is 2.0; data has changed" in capsys.readouterr().err
    start_run(out, Settings(lr=2.0), {"data": "xyz"}, {})
    assert open_run(out, Settings(lr=2.0), identity={"data": "xyz"}) == step  # no longer finished


@dataclasses.dataclass(frozen=True)
class Settings:
    lr: float = 1.0
    keep: int = 2
    resume: str = "auto"
    resume_anyway: bool = False

    HARMLESS = frozenset({"keep", "resume", "resume_anyway"})


def test_open_run_refuses_what_is_not_this_run(tmp_path):
    arguments = dict(identity={"data": "abc"})
    assert open_run(tmp_path / "new", Settings(), **arguments) is None
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="not a run of ours"):
        open_run(tmp_path, Settings(), **arguments)
    (tmp_path / "args.json").write_text(json.dumps({"lr": 1.0, "keep": 2, "run": {"identity": {"data": "abc"}}}))
    assert open_run(tmp_path, Settings(lr=2.0), **arguments) is None  # it ended before there was anything to keep
    (tmp_path / "step-000001").mkdir()  # from here on there is something to lose, if only a torn step
    assert open_run(tmp_path, Settings(keep=9), **arguments) is None
    with pytest.raises(UserError, match=r"--lr was 1.0 and is 2.0"):
        open_run(tmp_path, Settings(lr=2.0), **arguments)
    with pytest.raises(UserError, match="data has changed"):
        open_run(tmp_path, Settings(), identity={"data": "xyz"})
    with pytest.raises(UserError, match="already holds a run"):
        open_run(tmp_path, Settings(resume="never"), **arguments)
    with pytest.raises(UserError, match="is no intact step"):
        open_run(tmp_path, Settings(resume=str(tmp_path / "step-000009")), **arguments)
    for out in (tmp_path / "notes.txt", tmp_path / "notes.txt" / "deeper"):
        with pytest.raises(UserError, match=r"notes\.txt is not a directory"):
            open_run(out, Settings(), **arguments)


def test_a_run_belongs_to_one_process_at_a_time(tmp_path):
    held = lock_run(tmp_path / "run")
    with pytest.raises(UserError, match="another process is training in"):
        lock_run(tmp_path / "run")
    held.close()
    lock_run(tmp_path / "run").close()
