"""examinee.py: the log-probability of an answer is what transformers' model gives, one token after the other."""

from __future__ import annotations

import random

import pytest
import torch
from examinees_at_hand import answer_log_prob
from tokenizers_at_hand import SHARED

from checkpoint import load_model
from examinee import Request
from model import LlamaConfig
from tokenizer import load_tokenizer


def test_scores_equal_one_token_at_a_time_in_transformers(examinee, theirs):
    """Contexts and answers of unequal lengths and numbers, in one batch, in small batches, and in any order."""
    rng = random.Random(7)
    ids = lambda n: [rng.randrange(5, 300) for _ in range(n)]  # noqa: E731
    requests = [Request(ids(rng.randint(1, 30)), [ids(rng.randint(1, 6)) for _ in range(rng.randint(2, 4))]) for _ in range(9)]
    requests.append(Request(ids(12), [[7], [8], [9], [7]]))
    expected = [[answer_log_prob(theirs, r.context, a) for a in r.answers] for r in requests]
    for budget in (1, 150, 100_000):
        for row, wanted in zip(examinee(batch_tokens=budget).score(requests, ""), expected):
            assert row == pytest.approx(wanted, abs=2e-4)
    assert examinee().score(requests[::-1], "")[0] == pytest.approx(expected[-1], abs=2e-4)


def test_batches_keep_to_the_budget(examinee):
    rng = random.Random(12)
    lengths, rows = [rng.randint(1, 60) for _ in range(200)], [rng.choice((1, 4)) for _ in range(200)]
    batches = list(examinee(batch_tokens=300).batches(lengths, "", rows))
    assert sorted(i for batch in batches for i in batch) == list(range(200))
    sizes = [max(lengths[i] for i in batch) * sum(rows[i] for i in batch) for batch in batches]
    assert max(sizes) <= 300 and sum(sizes[:-1]) > 0.7 * 300 * len(sizes[:-1])


def test_scores_with_dynamic_rope_are_those_of_one_length(examinee, model_dir):
    """All answers of a request are turned as if the text were as long as the longest of them, whoever shares the batch."""
    model = load_model(model_dir, config=LlamaConfig.from_json(model_dir).with_rope_scaling("dynamic", 4))
    rng = random.Random(11)
    ids = lambda n: [rng.randrange(5, 300) for _ in range(n)]  # noqa: E731
    requests = [Request(ids(length), [ids(3), ids(5)]) for length in (20, 66, 90, 90, 140)] + [Request(ids(62), [ids(3)] * 3)]
    scores = examinee(model, batch_tokens=100_000).score(requests, "")
    for request, row in zip(requests, scores):
        for answer, value in zip(request.answers, row):
            with torch.no_grad():
                logits = model(torch.tensor([request.context + answer]), rope_length=request.length)[0].log_softmax(-1)
            first = len(request.context) - 1
            wanted = sum(logits[first + i, token].item() for i, token in enumerate(answer))
            assert value == pytest.approx(wanted, abs=2e-4)


def test_scores_in_bf16_are_not_rounded_to_ties(examinee, model_dir):
    """The letters of a bf16 model would tie if their logits were rounded to 8 bits."""
    model = load_model(model_dir, dtype=torch.bfloat16)
    scores = examinee(model).score([Request([5, 9, 30], [[i] for i in range(5, 300)])], "")[0]
    assert len(set(scores)) > 250


def test_end_of_turn_does_not_count(examinee, tokenizer):
    """In every template the answer's ids are its text alone."""
    for template in ("baby", "chatml"):
        request = examinee(template=template).request([{"role": "user", "content": "春眠？"}], ["花落。", "A"])
        assert [tokenizer.decode(ids) for ids in request.answers] == ["花落。", "A"]
        assert not {token for ids in request.answers for token in ids} & set(tokenizer.special_tokens.values())


@pytest.mark.parametrize("name, letters", [("chatglm2", [30938, 30949, 30942, 30952]), ("llama2", [29909, 29933, 29907, 29928])])
def test_letters_of_real_tokenizers(examinee, name, letters):
    """Behind 答案：stands "A", where encode("A") gives "▁A"; Llama-2's chat answers begin with a space and end with one."""
    file = SHARED / name / "tokenizer.model"
    if not file.exists():
        pytest.skip(f"the tokenizer of {name} is not at hand")
    real = load_tokenizer(file)
    request = examinee(tokenizer=real, template="none").request("正确的是\n答案：", "ABCD")
    assert request.answers == [[letter] for letter in letters] and request.answers[0] != real.encode("A")
    if name == "llama2":
        request = examinee(tokenizer=real, template="llama2").request([{"role": "user", "content": "选？"}], "ABCD")
        assert request.answers == [[319], [350], [315], [360]]


def test_a_tokenizer_that_merges_across_the_border(examinee, tokenizer):
    """What a piece spanning prompt and answer costs counts for all answers alike: the border moves to the left."""
    merging = object.__new__(type(tokenizer))
    merging.__dict__.update(tokenizer.__dict__)
    merging._encode = lambda text: [999 if c == "\0" else ord(c) for c in text.replace("xA", "\0")]
    for answers in ("AB", "BA"):
        request = examinee(tokenizer=merging, template="none").request("qx", answers)
        assert request.context == [ord("q")]
        assert sorted(request.answers) == [[ord("x"), ord("B")], [999]]
    alone = examinee(tokenizer=merging, template="none").request("x", ["A", "B"])
    assert alone.context == [tokenizer.eos_id] and alone.answers == [[999], [ord("x"), ord("B")]]
