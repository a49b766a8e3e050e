"""eval.py: every number equals the plain computation, one text at a time, with transformers' model where it matters."""

from __future__ import annotations

from settings import UserError, parse_config

import dataclasses
import json
import math
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from examinees_at_hand import CONTEXT, next_log_probs
from processes_at_hand import ended
from tokenizers_at_hand import REPO, poem
from torch import nn

import eval as evaluation
from checkpoint import load_model, save_model
from eval import Config, continuation, main, perplexity, split_windows
from model import Llama, LlamaConfig
from tokenizer import load_tokenizer


def run_main(model_dir, **settings) -> dict:
    return main(Config(model=model_dir, device="cpu", dtype="fp32", **settings))


# ---- perplexity ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stride", [None, 5, 1])
def test_perplexity_equals_one_token_at_a_time_in_transformers(examinee, theirs, tokenizer, tmp_path, stride):
    L, text = 16, poem(random.Random(1), 9)
    file = tmp_path / "poem.txt"
    file.write_text(text, encoding="utf-8")
    ids = tokenizer.encode(text)
    assert len(ids) > 3 * L and len(ids) % L  # several windows, the last one shorter
    sequence, nats, s = [tokenizer.eos_id, *ids], 0.0, stride or L
    for t, token in enumerate(ids):
        end = L if t < L else min(len(ids), L + ((t - L) // s + 1) * s)
        nats -= next_log_probs(theirs, sequence[end - L : t + 1])[token].item()

    result = perplexity(examinee(context=L, stride=stride), file).result
    assert result["tokens"] == len(ids)
    assert result["nats_per_token"] == pytest.approx(nats / len(ids), rel=1e-5)
    assert result["perplexity"] == pytest.approx(math.exp(nats / len(ids)), rel=1e-4)
    assert result["bytes"] == len(text.encode())
    assert result["bits_per_byte"] == pytest.approx(nats / math.log(2) / len(text.encode()), rel=1e-5)


@pytest.mark.parametrize("tokens, length, stride", [(1, 8, 8), (8, 8, 8), (9, 8, 8), (50, 8, 3), (50, 8, 8), (7, 8, 1)])
def test_windows_score_every_token_once(tokens, length, stride):
    windows = list(split_windows(tokens, length, stride))
    assert [t for _, first, end in windows for t in range(first, end)] == list(range(tokens))
    assert all(end - low <= length and low <= first for low, first, end in windows)
    assert all(end - first == stride for _, first, end in windows[1:-1])


def test_perplexity_of_documents_does_not_depend_on_the_batch(examinee, tmp_path):
    """Documents of very different lengths, alone (one token of budget) and together; and each in a file of its own."""
    rng = random.Random(2)
    texts = [poem(rng, lines) for lines in (1, 12, 2, 1, 5)]
    file = tmp_path / "documents.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    alone = perplexity(examinee(batch_tokens=1), file).result
    together = perplexity(examinee(batch_tokens=10_000), file).result
    assert alone["nats_per_token"] == pytest.approx(together["nats_per_token"], rel=1e-6)
    nats = 0.0
    for i, text in enumerate(texts):
        (tmp_path / f"{i}.txt").write_text(text, encoding="utf-8")
        one = perplexity(examinee(), tmp_path / f"{i}.txt").result
        nats += one["nats_per_token"] * one["tokens"]
    assert nats / together["tokens"] == pytest.approx(together["nats_per_token"], rel=1e-6)
    assert together["documents"] == 5 and together["bytes"] == sum(len(text.encode()) for text in texts)


def test_perplexity_of_token_files(examinee, theirs, data_dir):
    """One window over the beginning of the validation split; bytes as meta.json has them."""
    from token_files import open_tokens

    val = open_tokens(data_dir, "val")
    ids = val.tokens[:40].tolist()
    with torch.no_grad():
        logits = theirs(torch.tensor([[val.meta["eos_id"], *ids[:-1]]])).logits[0]
    loss = torch.nn.functional.cross_entropy(logits, torch.tensor(ids)).item()
    part = perplexity(examinee(max_tokens=40), data_dir).result
    assert part["nats_per_token"] == pytest.approx(loss, rel=1e-5)
    assert part["bytes"] == pytest.approx(val.meta["splits"]["val"]["bytes"] * 40 / len(val))
    whole = perplexity(examinee(), data_dir).result
    assert whole["tokens"] == len(val) and whole["bytes"] == val.meta["splits"]["val"]["bytes"]
    assert perplexity(examinee(), data_dir / "train.bin").result["tokens"] == val.meta["splits"]["train"]["tokens"]


def test_limit_counts_the_bytes_of_what_was_scored(examinee, tokenizer, tmp_path):
    text = poem(random.Random(4), 30) + "😀龘" * 20  # whose ids are bytes: a cut between them would split a character
    (tmp_path / "a.txt").write_text("春眠不觉晓", encoding="utf-8")
    (tmp_path / "b.txt").write_text(text, encoding="utf-8")
    first = len(tokenizer.encode("春眠不觉晓"))
    for limit in (first, first + 1, 100, 230):
        result = perplexity(examinee(max_tokens=limit), tmp_path).result
        assert limit - 8 <= result["tokens"] <= limit
        rest = result["bytes"] - 15
        part = text.encode()[:rest].decode()  # strict: whole characters
        assert len(tokenizer.encode(part)) == result["tokens"] - first if part else result["tokens"] == first


def test_longer_context_and_rope_scaling(model_dir, tokenizer, tmp_path, capsys):
    """--context beyond the model's is allowed and said; --rope-scaling acts as in LlamaConfig."""
    file = tmp_path / "poem.txt"
    file.write_text(poem(random.Random(5), 30), encoding="utf-8")
    ids = tokenizer.encode(file.read_text(encoding="utf-8"))[:150]
    plain = run_main(model_dir, tasks=("ppl",), data=(str(file),), context=150, max_tokens=150)["ppl"]
    assert f"more than the {CONTEXT} tokens" in capsys.readouterr().out
    yarn = run_main(model_dir, tasks=("ppl",), data=(str(file),), max_tokens=150, rope_scaling="yarn", rope_factor=4)["ppl"]
    assert "note" not in capsys.readouterr().out
    assert yarn["context"] == 4 * CONTEXT
    for result, config in ((plain, None), (yarn, LlamaConfig.from_json(model_dir).with_rope_scaling("yarn", 4))):
        ids = tokenizer.encode(file.read_text(encoding="utf-8"))[: result["tokens"]]
        with torch.no_grad():
            logits = load_model(model_dir, config=config)(torch.tensor([[tokenizer.eos_id, *ids[:-1]]]))[0]
        loss = torch.nn.functional.cross_entropy(logits, torch.tensor(ids)).item()
        assert result["nats_per_token"] == pytest.approx(loss, rel=1e-5)
    assert abs(plain["nats_per_token"] - yarn["nats_per_token"]) > 1e-3


def test_dynamic_rope_does_not_depend_on_the_batch(examinee, model_dir, tmp_path):
    """Its angles depend on the length of the text: a short text must not be turned by a long neighbour's."""
    config = LlamaConfig.from_json(model_dir).with_rope_scaling("dynamic", 4)
    rng = random.Random(6)
    file = tmp_path / "documents.jsonl"
    texts = [poem(rng, lines) for lines in (6, 11, 17, 23, 1)]
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    model = load_model(model_dir, config=config)
    alone = perplexity(examinee(model, batch_tokens=1), file).result
    assert perplexity(examinee(model), file).result["nats_per_token"] == pytest.approx(alone["nats_per_token"], rel=1e-6)


# ---- continuation ----------------------------------------------------------------------------------------------------


def test_continuations_equal_those_of_each_prompt_alone(examinee, model_dir, tokenizer, tmp_path):
    """Greedy, prompts of unequal length, some of which fill the window: each goes on as if alone."""
    prompts = ["春", poem(random.Random(9), 2), "白日依山尽", poem(random.Random(10), 4)]
    file = tmp_path / "prompts.txt"
    file.write_text("\n\n".join(p.replace("\n", "") for p in prompts) + "\n", encoding="utf-8")
    prompts = [p.replace("\n", "") for p in prompts]
    context = len(tokenizer.encode(prompts[3])) + 3
    records = continuation(examinee(temperature=0, max_new_tokens=10, context=context), file).records
    model = load_model(model_dir)
    for record, prompt in zip(records, prompts):
        ids = tokenizer.encode(prompt)
        room = min(10, context - len(ids))
        alone = [step[0] for step in model.generate([ids], room, temperature=0, stop_ids=[tokenizer.eos_id])]
        assert record == {"prompt": prompt, "completion": tokenizer.decode(alone), "tokens": len(alone), "stopped": len(alone) < room}
    assert records[3]["tokens"] <= 3


def test_continuation_stops_answers_messages_and_obeys_the_seed(examinee, model_dir, tokenizer, tmp_path):
    file = tmp_path / "prompts.jsonl"
    talk = [{"role": "user", "content": "春眠？"}]
    file.write_text(json.dumps({"messages": talk}) + "\n" + json.dumps({"prompt": "花落"}) + "\n", encoding="utf-8")
    model = load_model(model_dir)
    greedy = [step[0] for step in model.generate([tokenizer.render(talk, "chatml", add_generation_prompt=True)[0]], 4, temperature=0)]
    report = continuation(examinee(template="chatml", temperature=0, max_new_tokens=4), file)
    assert report.records[0]["completion"] == tokenizer.decode(greedy)

    def sampled(seed: int) -> list[str]:
        records = continuation(examinee(template="chatml", temperature=2.0, max_new_tokens=20, seed=seed), file).records
        return [record["completion"] for record in records]

    assert sampled(1) == sampled(1) != sampled(2)
    stopping = load_model(model_dir)  # the final state is constant, and EOS is what it says
    nn.init.zeros_(stopping.model.norm.weight)
    stub = examinee(stopping, temperature=0, template="chatml")
    stub.model.generate = lambda prompts, *_, stop_ids, **__: iter([[5, None], [6, None]]) if tokenizer.eos_id in stop_ids else None
    order = continuation(stub, file)
    assert sorted((r["tokens"], r["stopped"]) for r in order.records) == [(0, True), (2, True)]
    assert order.result["stopped"] == 2


@pytest.mark.parametrize("content, message", [
    ('{"text": "x"}\n', r'p.jsonl:1: needs a "prompt" \(text\) or "messages"; its keys are text'),
    ('{"prompt": "x"}\n{"prompt": \n', r"p.jsonl:2: not valid JSON"),
    ('["x"]\n', r"p.jsonl:1: not a JSON object but a list"),
    ('{"messages": [{"role": "king", "content": "x"}]}\n', r"p.jsonl:1: message 1 of 1 has the unknown role 'king'"),
    (json.dumps({"prompt": "春眠" * 60}) + "\n", r"p.jsonl:1: the prompt takes \d+ tokens, and the model reads 64"),
    ("\n", "holds no prompt"),
])  # fmt: skip
def test_bad_prompts(examinee, tmp_path, content, message):
    file = tmp_path / "p.jsonl"
    file.write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=message):
        continuation(examinee(), file)


# ---- the command -----------------------------------------------------------------------------------------------------


def test_reports_are_complete_and_never_overwritten(model_dir, exam_dir, data_dir, tmp_path, capsys):
    prompts, out = tmp_path / "prompts.txt", tmp_path / "out"
    prompts.write_text("春\n", encoding="utf-8")
    settings = dict(tasks=("ppl,exam", "continue"), data=(f"exam={exam_dir}", f"ppl={data_dir}", f"continue={prompts}"),
                    context=500, max_new_tokens=5)  # fmt: skip
    result = run_main(model_dir, out=out, **settings)
    shown = capsys.readouterr().out
    assert list(result) == ["ppl", "exam", "continue"]
    stored = json.loads((out / "results.json").read_text(encoding="utf-8"))
    assert stored["results"] == result and stored["settings"]["context"] == 500
    records = [json.loads(line) for line in (out / "predictions.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(records) == 11 and sum(r["correct"] for r in records) == result["exam"]["correct"]
    assert json.loads((out / "samples.jsonl").read_text(encoding="utf-8"))["prompt"] == "春"
    table = [line for line in (out / "results.md").read_text(encoding="utf-8").splitlines() if line.startswith("|")]
    assert len(table) == 1 + 1 + 3 + 2 + 2
    wide = [sum(2 if ord(c) > 0x2E7F else 1 for c in line) for line in table]
    assert len(set(wide)) == 1  # aligned although the names are Chinese
    rows = [line for line in shown.splitlines() if line.startswith(("moon", "river", "all", "chance"))]
    ends = {sum(2 if ord(c) > 0x2E7F else 1 for c in line[: line.index("%")]) for line in rows}
    assert len(rows) == 4 and len(ends) == 1
    with pytest.raises(UserError, match="already exists"):
        run_main(model_dir, out=out, **settings)
    assert not list(tmp_path.glob(".*partial"))


def test_nothing_half_written(model_dir, exam_dir, tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(evaluation, "write_json", fail)
    with pytest.raises(OSError, match="No space left"):
        run_main(model_dir, data=(str(exam_dir),), context=500, out=tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["exam"]


def test_where_data_is_looked_for(exam_dir, tmp_path):
    def paths(*words: str, tasks: str = "exam") -> dict:
        return Config(model=Path("m"), tasks=(tasks,), data=words).data_paths()

    root = exam_dir.parent
    assert paths(str(root)) == paths(str(exam_dir)) == paths(f"exam={exam_dir}") == {"exam": exam_dir}
    assert paths(str(root), f"ppl={tmp_path}", tasks="exam,ppl") == {"exam": exam_dir, "ppl": tmp_path}
    for words, tasks, message in (
        ([str(root)], "exam,ppl", "ppl does not exist"),
        ([f"exam={exam_dir}"], "exam,ppl", "--data says nothing about ppl; add ppl=PATH"),
        ([f"mmlu={exam_dir}"], "exam", "mmlu is not among the --tasks exam"),
        ([str(root), str(exam_dir)], "exam", "two roots"),
        (["nowhere"], "exam", "nowhere does not exist"),
    ):
        with pytest.raises(UserError, match=message):
            paths(*words, tasks=tasks)


def test_torchrun_is_refused(model_dir, exam_dir, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="not torchrun"):
        run_main(model_dir, data=(str(exam_dir),))


def test_bad_flags_are_named_together():
    argv = ["--model", "m", "--data", "d", "--tasks", "ppl,exma", "--stride", "0", "--shots", "-1", "--top-p", "0",
            "--min-p", "2", "--normalize", "bytes"]  # fmt: skip
    with pytest.raises(UserError) as error:
        parse_config(Config, argv)
    for part in ("no task 'exma' (meant exam?); known: ppl, exam, continue", "--stride must be at least 1, not 0",
                 "--shots must not be negative, not -1", "--top-p must be above 0", "--min-p must be between 0 and 1, not 2.0",
                 "--normalize bytes is for --score text"):  # fmt: skip
        assert part in str(error.value)


def test_bad_models_and_texts(model_dir, data_dir, examinee, tmp_path):
    file = tmp_path / "t.txt"
    for content, message in ((b"", "t.txt is empty"), ("春".encode("gb18030"), "t.txt:1: not UTF-8"), (b"a\0b", "t.txt:1: .*NUL")):
        file.write_bytes(content)
        with pytest.raises(UserError, match=message):
            perplexity(examinee(), file)
    with pytest.raises(UserError, match="holds neither token files"):
        (tmp_path / "empty").mkdir()
        perplexity(examinee(), tmp_path / "empty")
    with pytest.raises(UserError, match="--stride 65 is more than the 64 tokens"):
        perplexity(examinee(stride=65), data_dir)
    model = load_model(model_dir)
    nn.init.constant_(model.model.norm.weight, math.nan)
    with pytest.raises(UserError, match="not a finite number"):
        perplexity(examinee(model), data_dir)
    other = dataclasses.replace(load_model(model_dir).config, vocab_size=300)
    save_model(Llama(other), tmp_path / "small", load_tokenizer(model_dir))
    with pytest.raises(UserError, match="its model only 300"):
        run_main(tmp_path / "small", tasks=("ppl",), data=(str(data_dir),))


@pytest.mark.slow
def test_the_command_itself(model_dir, exam_dir):
    """One good run, one mistake: a table and exit 0, one line and exit 2."""
    words = ["--model", model_dir, "--device", "cpu", "--tasks", "exam"]
    good = subprocess.run([sys.executable, REPO / "eval.py", *words, "--data", exam_dir, "--score", "text", "--dtype", "fp32"],
                          cwd=exam_dir, capture_output=True, text=True, encoding="utf-8", env={**os.environ, "PYTHONPATH": ""})  # fmt: skip
    assert good.returncode == 0, good.stderr
    assert "all" in good.stdout and "chance" in good.stdout and "25.00%" in good.stdout
    statuses, out, err = ended("eval.py", *words, "--data", exam_dir / "nowhere")
    assert (statuses, out) == ([2], "")
    assert err.startswith("error: --data: ") and err.count("\n") == 1
