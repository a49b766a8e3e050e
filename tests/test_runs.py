"""runs.py: a run directory is fresh, to be gone on with, finished, or somebody else's; steps are whole or passed over."""

from __future__ import annotations

from settings import UserError

import dataclasses
import json
import shutil

import pytest

from runs import (
    Finished,
    begin_step,
    best_step,
    damage,
    finish_step,
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
    assert step.name == "step-000007" and damage(step) == ""
    (step / "weights").write_bytes(b"x" * 21)
    assert damage(step) == "weights has changed" and damage(step, without=("weights",)) == ""
    (step / "weights").write_bytes(b"x")
    assert damage(step) == "weights has 1 bytes instead of 21"
    (step / "weights").unlink()
    assert damage(step) == "weights is missing"
    (step / "manifest.json").write_text("{}")
    assert "manifest.json" in damage(step)


def test_a_kill_while_a_step_is_removed_leaves_nothing_under_its_name(tmp_path, monkeypatch):
    for number in (1, 2):
        make_step(tmp_path, number)
    real = shutil.rmtree

    def killed(path, ignore_errors):
        if path.exists():
            next(path.iterdir()).unlink()
            raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        prune(steps(tmp_path)[-1], keep=1, best=None)
    monkeypatch.setattr(shutil, "rmtree", real)
    assert [step.name for step in steps(tmp_path)] == ["step-000002"] and not damage(steps(tmp_path)[0])
    lock_run(tmp_path).close()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000002"]


def test_the_best_step_is_kept_and_named(tmp_path):
    state = {"best": None, "step": 0}
    for number, loss in ((1, 3.0), (2, 2.0), (3, 2.5), (4, 2.6)):
        state["step"] = number
        saved = make_step(tmp_path, number)
        prune(saved, keep=1, best=(state["best"] or {}).get("step"))
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


def test_a_setting_that_an_older_version_did_not_have_was_its_default(tmp_path):
    start_run(tmp_path, Settings(), {}, {})
    step = make_step(tmp_path, 1)
    stored = json.loads((tmp_path / "args.json").read_text())
    del stored["lr"]
    (tmp_path / "args.json").write_text(json.dumps(stored))
    assert open_run(tmp_path, Settings(), identity={}) == step
    with pytest.raises(UserError, match=r"--lr was 1.0 and is 2.0"):
        open_run(tmp_path, Settings(lr=2.0), identity={})


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
    make_step(tmp_path, 1)  # from here on there is something to lose
    assert open_run(tmp_path, Settings(keep=9), **arguments).name == "step-000001"
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


def test_no_intact_step_is_no_fresh_start(tmp_path, capsys):
    out = tmp_path / "run"
    start_run(out, Settings(), {}, {})
    for number in (8, 9):
        (make_step(out, number) / "weights").write_bytes(b"?")
    with pytest.raises(UserError, match="has 2 checkpoints and none is intact"):
        open_run(out, Settings(), identity={})
    assert capsys.readouterr().err.count("is incomplete or damaged (weights has 1 bytes") == 2
    saved = make_step(out, 5)  # a run that went back: what lies beyond is given up, what was just saved is not
    prune(saved, keep=2, best=None)
    assert steps(out) == [saved]


def test_a_branch_goes_on_by_the_same_command_until_it_has_steps_of_its_own(tmp_path):
    parent, out = tmp_path / "parent", tmp_path / "branch"
    start_run(parent, Settings(), {}, {})
    step = make_step(parent, 3)
    branch = Settings(resume=str(step))
    assert open_run(out, branch, identity={}) == step
    start_run(out, branch, {}, {})
    (out / ".step-000004.partial").mkdir()  # killed in its first save
    assert open_run(out, branch, identity={}) == step
    with pytest.raises(UserError, match=r"was begun with --resume .*step-000003 and has saved nothing yet"):
        open_run(out, Settings(), identity={})
    own = make_step(out, 4)
    assert open_run(out, branch, identity={}) == open_run(out, Settings(), identity={}) == own
    with pytest.raises(UserError, match="already holds another run"):
        open_run(out, Settings(resume=str(make_step(parent, 5))), identity={})


def test_a_finished_run_without_steps_cannot_be_extended(tmp_path):
    start_run(tmp_path, Settings(), {}, {})
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="is finished and its steps are gone"):
        open_run(tmp_path, Settings(lr=2.0, resume_anyway=True), identity={})


def test_a_lock_leaves_no_trace_where_no_run_began(tmp_path):
    lock_run(tmp_path / "run").close()
    assert not (tmp_path / "run").exists()


def test_a_run_belongs_to_one_process_at_a_time(tmp_path):
    held = lock_run(tmp_path / "run")
    with pytest.raises(UserError, match="another process is training in"):
        lock_run(tmp_path / "run")
    held.close()
    lock_run(tmp_path / "run").close()
