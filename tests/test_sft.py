"""sft.py: what is learned and what is not, packed = alone, two processes = one, resumed = uninterrupted."""

from __future__ import annotations

from settings import UserError

import json
import math
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from test_pretrain import flags, losses, run, same_weights, terminating
from tokenizers_at_hand import poem

import sft
from checkpoint import load_model, save_model
from model import IGNORE, Llama, LlamaConfig
from parallel import make_parallel
from progress import read_metrics
from runtime import Machine
from sft import Batches, Config, Conversations, main, pack, truncate
from tokenizer import load_tokenizer


def talk(*turns: str) -> dict:
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[i % 2], "content": turn} for i, turn in enumerate(turns)]}


def role_text(*turns: str) -> list:
    """chinese-llama-65b's layout of the same."""
    return [{"role": turn["role"], "text": turn["content"]} for turn in talk(*turns)["messages"]]


def write(path: Path, records) -> Path:
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def base_dir(tokenizer_dir, tmp_path_factory) -> Path:
    """A model directory with random weights."""
    tokenizer = load_tokenizer(tokenizer_dir)
    torch.manual_seed(0)
    model = Llama(LlamaConfig(vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                              num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64))  # fmt: skip
    path = tmp_path_factory.mktemp("base") / "model"
    save_model(model, path, tokenizer)
    return path


@pytest.fixture(scope="session")
def chats(tmp_path_factory) -> Path:
    """60 conversations of one or two turns: the answer repeats the first character of the question five times."""
    rng, folder = random.Random(3), tmp_path_factory.mktemp("chats")
    records = []
    for i in range(60):
        questions = [poem(rng, 1) for _ in range(1 + i % 2)]
        records.append(talk(*[word for q in questions for word in (q, q[0] * 5)]))
    write(folder / "train.jsonl", records[:52])
    write(folder / "val.jsonl", records[52:])
    return folder


@pytest.fixture
def settings(base_dir, chats, tmp_path) -> dict:
    return dict(init_from=base_dir, data=chats, out=tmp_path / "run", steps=10, batch_size=4, micro_batch=2, lr=3e-3, template="baby",
                dtype="fp32", device="cpu", log_every=1, eval_every=5, save_every=4)  # fmt: skip


# ---- what is learned -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("template", ["baby", "chatml"])
def test_targets_are_the_answers_and_their_end(base_dir, tmp_path, template):
    tokenizer = load_tokenizer(base_dir)
    path = write(tmp_path / "one.jsonl", [talk("春眠", "不觉", "夜来", "风雨")])
    data = Conversations(path, tokenizer, template, 64)
    batch = Batches(data, 64, 1, 1, True, None, 0).tensors([[0]])
    tokens, targets = batch["tokens"][0].tolist(), batch["targets"][0].tolist()
    ids, mask = tokenizer.render(talk("春眠", "不觉", "夜来", "风雨")["messages"], template=template)
    learned = [target for target in targets if target != IGNORE]
    assert learned == [i for i, m in zip(ids, mask) if m]
    text = tokenizer.decode(learned)
    assert text == "不觉风雨" and sum(i in tokenizer.stop_ids(template) for i in learned) == 2
    first = next(i for i, target in enumerate(targets) if target != IGNORE)
    assert tokens[first + 1] == targets[first]  # what a position predicts is the next token


@pytest.mark.parametrize("template", ["baby", "chatml-65b"])
def test_loss_on_all_learns_every_token_but_the_first(base_dir, tmp_path, template):
    """And role/text lines are the same conversations; a line of one element is a plain text, with EOS as in pretraining."""
    tokenizer, turns = load_tokenizer(base_dir), ("春眠", "不觉", "夜来", "风雨")
    one = write(tmp_path / "one.jsonl", [talk(*turns)])
    lists = write(tmp_path / "lists.jsonl", [role_text(*turns), role_text("花落知多少")])
    for loss_on, lengths, empty in (("all", 2, 0), ("answers", 1, 1)):
        data, listed = (Conversations(path, tokenizer, template, 96, loss_on) for path in (one, lists))
        assert (data[0][0] == listed[0][0]).all() and (data[0][1] == listed[0][1]).all()
        assert (len(listed), listed.empty) == (lengths, empty)
        assert data.questions == listed.questions == [talk(*turns)["messages"][:1]]
    data = Conversations(lists, tokenizer, template, 96, "all")
    assert data[1][0].tolist() == [*tokenizer.encode("花落知多少"), tokenizer.eos_id]
    assert data.learned.tolist() == data.lengths.tolist() == [len(data[i][0]) - 1 for i in range(2)]
    batch = Batches(data, 128, 1, 1, True, None, 0).tensors([[0, 1]])
    learned = batch["targets"][0][batch["targets"][0] != IGNORE].tolist()
    assert learned == [*data[0][0][1:], *data[1][0][1:]], "neither the first token nor padding"
    short = Conversations(lists, tokenizer, template, 8, "all")  # cut: the end goes, whatever an answer is
    assert short.truncated == 1 + (len(data[1][0]) > 9) and (short[0][0] == data[0][0][:9]).all() and short.learned[0] == 8


@pytest.mark.parametrize("prompt, answer", [(10, 100), (70, 20), (200, 200), (0, 80)])
def test_truncation_leaves_some_answer(prompt, answer):
    tokens, mask = truncate(list(range(prompt + answer)), [0] * prompt + [1] * answer, 65)
    assert len(tokens) == len(mask) <= 65 and sum(mask[1:]) >= min(answer, 20)
    assert [t >= prompt for t in tokens] == [bool(m) for m in mask]  # tokens and mask are cut alike
    assert tokens == list(range(tokens[0], tokens[0] + len(tokens)))
    if prompt < 60:
        assert tokens[0] == 0  # the question stays where it can


def test_packing_puts_every_conversation_in_one_row_and_fills_them():
    rng = np.random.default_rng(0)
    lengths = rng.integers(3, 40, 500)
    rows = pack(lengths, rng.permutation(500), 64, True)
    assert sorted(i for row in rows for i in row) == list(range(500))
    assert all(lengths[row].sum() <= 64 for row in rows)
    assert lengths.sum() / (len(rows) * 64) > 0.9
    assert pack(lengths, np.arange(500), 64, False) == [[i] for i in range(500)]


@pytest.mark.parametrize("template, loss_on", [("baby", "answers"), ("chatml", "answers"), ("chatml-65b", "all")])
def test_packed_loss_equals_padded_loss_equals_each_alone(base_dir, chats, template, loss_on):
    tokenizer, model = load_tokenizer(base_dir), load_model(base_dir)
    data = Conversations(chats / "val.jsonl", tokenizer, template, 96, loss_on)
    config = Config(micro_batch=3, device="cpu", dtype="fp32")
    parallel = make_parallel(Machine(config), config)
    packed, padded = (sft.evaluate(model, Batches(data, 96, 4, 1, packing, None, 0), config, parallel)["val_loss"]
                      for packing in (True, False))  # fmt: skip
    nats = 0.0
    for _, messages in sft.read_messages(chats / "val.jsonl"):
        ids, mask = tokenizer.render(messages, template=template)
        logits = model(torch.tensor([ids]))[0].log_softmax(-1)
        nats -= sum(logits[i, ids[i + 1]].item() for i in range(len(ids) - 1) if mask[i + 1] or loss_on == "all")
    assert packed == pytest.approx(padded, rel=1e-5)
    assert packed == pytest.approx(nats / data.learned.sum(), rel=1e-5)


def test_every_conversation_is_read_once_per_epoch_and_the_last_batch_is_filled_with_nothing(base_dir, chats):
    data = Conversations(chats / "train.jsonl", load_tokenizer(base_dir), "baby", 64)
    batches = Batches(data, 64, 7, 2, True, 1, 0)
    read = [i for step in range(len(batches)) for row in batches.after(step * 7) for i in row]
    assert sorted(read) == sorted(list(range(52)) * 2)
    assert read[:52] != read[52:]
    last = batches.after((len(batches) - 1) * 7)
    assert len(last) == 7 and batches.tensors(last)["tokens"].shape == (7, 64)
    empty = batches.tensors([[], []])
    assert (empty["targets"] == IGNORE).all()
    assert len(Batches(data, 64, 7, 0.5, False, 1, 0).rows) == 26
    assert len(Batches(data, 64, 7, 0.001, False, 1, 0).rows) == 1
    for seed in range(5):  # epochs pack differently: enough of them, whatever the seed
        many = Batches(data, 64, 4, 1, True, seed, 0, steps=150)
        assert all(row for step in range(150) for row in many.after(step * 4))
        many.at_least(700)
        assert all(row for row in many.rows[:700]) and len(many.rows) >= 700


def test_evaluating_more_often_changes_nothing(settings):
    settings["dropout"] = 0.2
    main(Config(**settings))
    other = {**settings, "out": settings["out"].with_name("other"), "eval_every": 1}
    main(Config(**other))
    assert losses(other["out"]) == losses(settings["out"])


# ---- runs ------------------------------------------------------------------------------------------------------------


def test_a_run_learns_to_answer_and_leaves_a_chat_model(settings, capsys):
    result = main(Config(**{**settings, "steps": 60, "eval_every": 30}))
    out = settings["out"]
    assert losses(out)[0] == pytest.approx(math.log(400), rel=0.1) and losses(out)[-1] < 4 and result["val_loss"] < 5
    tokenizer = load_tokenizer(out)
    assert tokenizer.template == "baby"
    assert "▸" in (out / "samples.txt").read_text("utf-8") and (out / "loss.png").exists()
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(out)
    ids = tokenizer.render(talk("春眠")["messages"], add_generation_prompt=True)[0]
    with torch.no_grad():
        torch.testing.assert_close(theirs(torch.tensor([ids])).logits, load_model(out)(torch.tensor([ids])), atol=1e-4, rtol=1e-4)
    main(Config(**{**settings, "steps": 60}))
    assert "finished: nothing to do" in capsys.readouterr().out


@pytest.mark.parametrize("extra", [{"micro_batch": 4}, {"micro_batch": 3}, {"checkpointing": True}], ids=str)
def test_micro_batches_change_nothing(settings, extra):
    main(Config(**settings))
    other = {**settings, "out": settings["out"].with_name("other"), **extra}
    main(Config(**other))
    assert losses(other["out"]) == pytest.approx(losses(settings["out"]), abs=1e-5)


def test_stopped_and_resumed_equals_uninterrupted_bit_for_bit(settings, monkeypatch, capsys):
    settings["dropout"] = 0.1
    main(Config(**settings))
    other = {**settings, "out": settings["out"].with_name("other")}
    real = sft.learning_rate
    monkeypatch.setattr(sft, "learning_rate", terminating(real, 5))
    main(Config(**other))
    assert "stopped at step 6" in capsys.readouterr().out
    monkeypatch.setattr(sft, "learning_rate", real)
    main(Config(**other))
    assert losses(other["out"]) == losses(settings["out"])
    assert same_weights(settings["out"], other["out"])


def test_fresh_weights_are_the_control(settings):
    main(Config(**{**settings, "steps": 1, "fresh_weights": True, "seed": 77}))
    first = load_model(settings["out"] / "step-000001").lm_head.weight
    assert not torch.allclose(first, load_model(settings["init_from"]).lm_head.weight, atol=0.01)
    assert LlamaConfig.from_json(settings["out"]) == LlamaConfig.from_json(settings["init_from"])


@pytest.mark.slow
@pytest.mark.parametrize("way", [[], ["--fsdp"]], ids=str)
def test_two_processes_equal_one(settings, way):
    main(Config(**settings))
    other = {**settings, "out": settings["out"].with_name("two")}
    process = run("sft.py", *flags(other), *way, torchrun=2)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert losses(other["out"]) == pytest.approx(losses(settings["out"]), abs=1e-5)
    ours, theirs = (read_metrics(s["out"] / "metrics.jsonl") for s in (settings, other))
    assert ours[-1]["val_loss"] == pytest.approx(theirs[-1]["val_loss"], abs=1e-5)
    assert [line.get("batch_hash") for line in ours] == [line.get("batch_hash") for line in theirs]


def test_show_batch_prints_what_is_learned_and_writes_nothing(settings, capsys):
    main(Config(**{**settings, "show_batch": True}))
    lines = capsys.readouterr().out.splitlines()
    assert "learned" in lines[0] and any(" yes " in line for line in lines) and any(" · " in line for line in lines)
    assert not settings["out"].exists()


def test_loss_on_all_on_role_text_lines(settings, tmp_path, capsys):
    """A run on plain texts alone has no question to show; the setting alters the run."""
    settings |= {"data": tmp_path / "data", "template": "chatml-65b", "loss_on": "all", "steps": 2}
    settings["data"].mkdir()
    for part in ("train", "val"):
        write(settings["data"] / f"{part}.jsonl", [role_text("春眠不觉晓"), role_text("处处闻啼鸟")])
    assert main(Config(**settings))["val_loss"] > 0
    assert "100% of their tokens are learned" in capsys.readouterr().out and not (settings["out"] / "samples.txt").exists()
    with pytest.raises(UserError, match="--loss-on was all and is answers"):
        main(Config(**{**settings, "loss_on": "answers"}))
    with pytest.raises(UserError, match=r"nothing to learn; --loss-on all learns all tokens of its 2 other lines"):
        main(Config(**{**settings, "loss_on": "answers", "out": tmp_path / "other"}))
    main(Config(**{**settings, "show_batch": True}))
    shown = capsys.readouterr().out.splitlines()
    positions = [line for line in shown[1:] if "padding" not in line]
    assert len(positions) > 5 and all(" yes " in line for line in positions)


# ---- mistakes --------------------------------------------------------------------------------------------------------


def test_long_conversations_are_cut_and_counted(settings, tmp_path, capsys):
    data = write(tmp_path / "long.jsonl", [talk("春" * 300, "眠" * 300), talk("春", "眠")])
    main(Config(**{**settings, "data": data, "steps": 1}))
    assert "1 cut to 64 tokens" in capsys.readouterr().out


@pytest.mark.parametrize("text, message", [
    ('{"messages": [{"role": "user", "content": "x"}]}\n', "no conversation with an assistant turn"),
    ("", "no conversation with an assistant turn"),
    ('{"messages": [}\n', r"bad\.jsonl:1: not valid JSON"),
    ('{"messages": []}\n{"text": 3}\n', r'bad\.jsonl:2: no "messages"'),
    ('{"messages": [{"role": "wizard", "content": "x"}]}\n', r"bad\.jsonl:1: .*wizard"),
    ('{"messages": "x"}\n', r'bad\.jsonl:1: no "messages", nor a list'),
    ('[{"role": "user", "text": "x"}, {"role": "assistant", "content": "y"}]\n', r'bad\.jsonl:1: no "messages", nor a list'),
    ("[1, 2]\n", r'bad\.jsonl:1: no "messages", nor a list'),
    ("[]\n", r"bad\.jsonl:1: a conversation is a list of messages, not \[\]"),
    ('[{"text": 3}]\n', r"bad\.jsonl:1: a conversation is a list of messages, not 3"),
    ('[{"text": "x"}, {"role": "assistant", "text": "y"}]\n', r"bad\.jsonl:1: message 1 of 2 has the unknown role None"),
    ('[{"text": "x"}]\n\n{"messages": []}\n', r"bad\.jsonl:3: here the file changes"),
])  # fmt: skip
def test_bad_data_is_named(settings, tmp_path, text, message):
    (tmp_path / "bad.jsonl").write_text(text)
    with pytest.raises(UserError, match=message):
        main(Config(**{**settings, "data": tmp_path / "bad.jsonl"}))
    assert not settings["out"].exists()


def test_other_mistakes(settings, tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        main(Config(**{**settings, "init_from": tmp_path / "nothing"}))
    with pytest.raises(UserError, match=r"has no train\.jsonl"):
        main(Config(**{**settings, "data": tmp_path}))
    with pytest.raises(UserError, match="--seq-len 65 is longer than the 64"):
        main(Config(**{**settings, "seq_len": 65}))
    (tmp_path / "binary.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="cannot be read as UTF-8"):
        main(Config(**{**settings, "data": tmp_path / "binary.jsonl"}))
    assert "--lr must be above 0" in Config(lr=0).problems()[0]
    main(Config(**{**settings, "steps": 1}))
    with pytest.raises(UserError, match="--steps was 1 and is 2"):
        main(Config(**{**settings, "steps": 2}))
    process = run("sft.py", "--init-from", settings["init_from"], "--data", tmp_path / "binary.jsonl", "--out", tmp_path / "x",
                  "--template", "poem")  # fmt: skip
    out, err = process.communicate(timeout=100)
    assert process.returncode == 2 and out == "" and err.startswith("error: --template: invalid choice: 'poem'")
    assert err.count("\n") == 1


def test_an_empty_validation_file_is_no_validation(settings, chats, tmp_path):
    write(tmp_path / "train.jsonl", [talk("春", "眠")] * 4)
    (tmp_path / "val.jsonl").write_text("")
    assert "val_loss" not in main(Config(**{**settings, "data": tmp_path, "steps": 1}))
