"""bench.py data: it measures the real road from text to token files, and all sides make the same tokens."""

from __future__ import annotations

from settings import UserError

import json
from pathlib import Path

import pytest

import bench_data
import bench_turns
import tokenizer
from bench_data import DataConfig


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("\n".join(f"第{i}行，法国的首都是巴黎。" for i in range(300)), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def small_tokenizer(text):
    tokenizer.train([text], 300, text.parent / "tokenizer")
    return text.parent / "tokenizer"


def test_data_is_the_real_pretraining_path(text, small_tokenizer, tmp_path, capsys):
    trained = tokenizer.load_tokenizer(small_tokenizer)
    lines = text.read_text(encoding="utf-8").splitlines()
    capsys.readouterr()
    result = bench_data.data_worker(DataConfig(tokenizer=small_tokenizer, input=(str(text),)), "1")
    assert result["bytes"] == text.stat().st_size and result["seconds"] > 0
    assert result["tokens"] == sum(len(trained.encode(line)) + 1 for line in lines)
    assert capsys.readouterr().out == ""  # what data_process.py says must not mix with the JSON
    with pytest.raises(UserError, match="no-tokenizer"):
        bench_data.data_worker(DataConfig(tokenizer=tmp_path / "no-tokenizer", input=(str(text),)), "1")


@pytest.mark.slow
def test_the_table_shows_every_side_beside_the_first(monkeypatch, text, small_tokenizer, capsys):
    """Measured in this process: the same worker and the same JSON in between, without waiting for imports."""
    monkeypatch.setattr(bench_turns, "run_worker",
                        lambda command, config, side: json.loads(json.dumps(bench_data.data_worker(config, side))))
    sides = ("sentencepiece", "1", "1+clean")
    speeds = bench_data.data(DataConfig(tokenizer=small_tokenizer, input=(str(text),), sides=sides, repeats=1))
    assert speeds["1"]["mb_per_s"] > 0 and speeds["1"]["tokens"] == speeds["1+clean"]["tokens"] == speeds["sentencepiece"]["tokens"] + 300
    assert speeds["sentencepiece"]["relative"] == 1
    assert "speed / sentencepiece, pair by pair" in capsys.readouterr().out


def test_problems_are_named_before_anything_runs():
    problems = DataConfig(tokenizer=Path("x"), input=("no.txt",), sides=("two",)).problems()
    assert problems[0] == "--input no.txt is no file" and problems[1].startswith("--sides two") and len(problems) == 2


@pytest.mark.slow
def test_a_mistake_in_a_worker_comes_back_as_one_line(text, tmp_path):
    with pytest.raises(UserError, match="no tokenizer does not exist"):
        bench_turns.run_worker("data", DataConfig(tokenizer=tmp_path / "no tokenizer", input=(str(text),)), "1")
