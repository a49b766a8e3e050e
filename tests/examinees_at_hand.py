"""What the tests of evaluation share: a model with random weights, an exam, and the plain computation to compare with.

conftest.py makes the fixtures known to every test file; the rest is imported.
"""

from __future__ import annotations

import csv
import json
import random
from pathlib import Path

import pytest
import torch
from tokenizers_at_hand import poem

from checkpoint import load_model, save_model
from eval import Config
from examinee import Examinee
from model import Llama, LlamaConfig
from tokenizer import load_tokenizer

CONTEXT = 64


@pytest.fixture(scope="session")
def tokenizer(tokenizer_dir):
    return load_tokenizer(tokenizer_dir)


@pytest.fixture(scope="session")
def model_dir(tokenizer, tmp_path_factory) -> Path:
    """A model directory with random weights, large enough that every token matters."""
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                         num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=CONTEXT,
                         bos_token_id=tokenizer.bos_id, eos_token_id=tokenizer.eos_id)  # fmt: skip
    model = Llama(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(1.0 if parameter.dim() == 1 else 0.0, 0.2)
    path = tmp_path_factory.mktemp("evaluated") / "model"
    save_model(model, path, tokenizer)
    return path


@pytest.fixture
def examinee(model_dir, tokenizer):
    """A function: settings -> the model that takes the test."""
    def make(model=None, tokenizer=tokenizer, **settings) -> Examinee:
        model = load_model(model_dir) if model is None else model
        return Examinee(model, tokenizer, Config(model=model_dir, data=("unused",), **settings))

    return make


@pytest.fixture(scope="session")
def theirs(model_dir):
    transformers = pytest.importorskip("transformers")
    return transformers.AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()


@torch.no_grad()
def next_log_probs(theirs, ids: list[int]) -> torch.Tensor:
    return theirs(torch.tensor([ids])).logits[0, -1].log_softmax(-1)


def answer_log_prob(theirs, context: list[int], answer: list[int]) -> float:
    """One token after the other, the whole text anew each time."""
    return sum(next_log_probs(theirs, context + answer[:i])[token].item() for i, token in enumerate(answer))


COLUMNS = ["id", "question", "A", "B", "C", "D", "answer", "explanation"]


def write_exam(root: Path, papers: dict, mapping: dict | None = None) -> Path:
    """papers: "val/geography" -> rows of (question, A, B, C, D, answer)."""
    for name, rows in papers.items():
        split = name.split("/")[0]
        file = root / f"{name}_{split}.csv"
        file.parent.mkdir(parents=True, exist_ok=True)
        with open(file, "w", encoding="utf-8", newline="") as stream:
            csv.writer(stream).writerows([COLUMNS, *([i, *row, ""] for i, row in enumerate(rows))])
    if mapping:
        (root / "subject_mapping.json").write_text(json.dumps(mapping), encoding="utf-8")
    return root


@pytest.fixture
def exam_dir(tmp_path) -> Path:
    rng = random.Random(8)

    def rows(n: int, answers: str) -> list:
        return [(f"{poem(rng, 1)}是什么？", *(poem(rng, 1)[: rng.randint(1, 4)] for _ in "ABCD"), answers[i]) for i in range(n)]

    papers = {"val/river": rows(6, "ABCDDD"), "val/moon": rows(2, "DB"), "val/wind": rows(3, "DDC"),
              "dev/river": rows(5, "ABCDA"), "dev/moon": rows(5, "BBCDA"), "dev/wind": rows(5, "CBCDA")}  # fmt: skip
    mapping = {"river": ["River", "河流学", "STEM"], "moon": ["Moon", "月亮学", "STEM"], "wind": ["Wind", "风声学", "Other"]}
    return write_exam(tmp_path / "exam", papers, mapping)
