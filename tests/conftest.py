"""What all tests share: one thread per process (the suite runs in parallel), a small tokenizer, small models."""

from __future__ import annotations

import os
import random
import signal

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("MPLBACKEND", "Agg")

import hypothesis
import pytest
import torch
from examinees_at_hand import exam_dir, examinee, model_dir, theirs, tokenizer  # noqa: F401  fixtures
from tokenizers_at_hand import (  # noqa: F401
    any_tokenizer,
    english,
    english_dir,
    extended,
    extended_dir,
    llama3_dir,
    ours,
    ours_dir,
    poem,
    spaceless_dir,
    transformers,
)

torch.set_num_threads(1)
# A shell starts background jobs deaf to Ctrl-C, and their children inherit it; tests send it.
signal.signal(signal.SIGINT, signal.default_int_handler)
# The same examples every time, however slow the machine: a failure is then about the change that is tested.
hypothesis.settings.register_profile("same", derandomize=True, deadline=None)
hypothesis.settings.load_profile("same")


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> str:
    """A text file of 400 short poems in random words, one JSON document each."""
    import json

    rng = random.Random(0)
    path = tmp_path_factory.mktemp("corpus") / "poems.jsonl"
    lines = (json.dumps({"text": poem(rng, 6)}, ensure_ascii=False) for _ in range(400))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def tokenizer_dir(corpus, tmp_path_factory):
    """A tokenizer of 400 tokens trained on the corpus."""
    from tokenizer import train

    out = tmp_path_factory.mktemp("tokenizer") / "tok"
    train([corpus], vocab_size=400, out=out)
    return out


@pytest.fixture(scope="session")
def data_dir(corpus, tokenizer_dir, tmp_path_factory):
    """Token files of the corpus."""
    import data_process

    out = tmp_path_factory.mktemp("data") / "pretrain"
    data_process.prepare(data_process.PretrainConfig(
        corpus=(f"jsonl={corpus}",), tokenizer=tokenizer_dir, out=out, workers=1, val_fraction=0.05))  # fmt: skip
    return out
