"""convert.py: from every door to every other and back, bit for bit; nothing is lost, half written or overwritten."""

from __future__ import annotations

from settings import UserError

import dataclasses
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from processes_at_hand import ended
from tokenizers_at_hand import REPO

import convert as cv
from checkpoint import load_model, save_model, save_state
from config import LlamaConfig
from doors import huggingface, llama2c, megatron, meta
from model import Llama
from parallel import make_parallel
from runtime import Machine, MachineConfig
from tokenizer import ExtendConfig, extend_from, load_tokenizer
from weights import Lazy, open_weights

GQA = LlamaConfig(400, 32, 64, 4, 4, 2, max_position_embeddings=64)
SHAPES = {"MHA": dataclasses.replace(GQA, num_key_value_heads=4), "GQA": GQA, "tied": dataclasses.replace(GQA, tie_word_embeddings=True),
          "odd vocabulary": dataclasses.replace(GQA, vocab_size=403)}  # fmt: skip


def saved(tmp_path, tokenizer_dir, config=GQA, dtype=torch.float32) -> Path:
    """A model directory with shards and a tokenizer."""
    torch.manual_seed(0)
    tokenizer = load_tokenizer(tokenizer_dir)
    config = dataclasses.replace(config, bos_token_id=tokenizer.bos_id, eos_token_id=tokenizer.eos_id, pad_token_id=tokenizer.pad_id)
    save_model(Llama(config).to(dtype), tmp_path / "model", tokenizer, shard_bytes=60_000)
    return tmp_path / "model"


def digest(path: Path) -> str:
    """Of all names and bytes below a path."""
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    return hashlib.sha256(b"".join(str(file.relative_to(path)).encode() + file.read_bytes() for file in files)).hexdigest()


def same(a: Path, b: Path) -> bool:
    one, other = load_model(a), load_model(b)
    pairs = zip(one.state_dict().items(), other.state_dict().items(), strict=True)
    return one.config == other.config and all(x == y and torch.equal(a, b) and a.dtype == b.dtype for (x, a), (y, b) in pairs)


EXPORTS = {
    "meta": (cv.export_meta, cv.ExportMeta, {"shards": 2}, cv.import_meta, cv.ImportMeta, {"max_position": 64}),
    "megatron": (cv.export_megatron, cv.ExportMegatron, {"tp": 2, "pp": 2}, cv.import_megatron, cv.ImportMegatron, {}),
    "mcore": (cv.export_megatron, cv.ExportMegatron, {"pp": 2, "layers": "1,3", "names": "mcore"}, cv.import_megatron, cv.ImportMegatron,
              {}),
    "llama2c": (cv.export_llama2c, cv.ExportLlama2c, {}, cv.import_llama2c, cv.ImportLlama2c, {"tokenizer": True}),
    "gguf": (cv.export_gguf, cv.ExportGguf, {"type": "f32"}, cv.import_gguf, cv.Convert, {}),
}  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", EXPORTS)
def test_there_and_back(tmp_path, tokenizer_dir, name, shape):
    export, export_config, there, bring, bring_config, back = EXPORTS[name]
    if name == "gguf":
        pytest.importorskip("gguf")
    model = saved(tmp_path, tokenizer_dir, SHAPES[shape])
    before, back = digest(model), dict(back)
    if back.pop("tokenizer", False):
        back["tokenizer"] = tokenizer_dir
    export(export_config(model=model, out=tmp_path / "out.gguf", **there))
    bring(bring_config(model=tmp_path / "out.gguf", out=tmp_path / "back", **back))
    assert digest(model) == before
    assert same(model, tmp_path / "back")
    assert load_tokenizer(tmp_path / "back").encode("春眠不觉晓 a1") == load_tokenizer(model).encode("春眠不觉晓 a1")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["back", "model", "out.gguf"]  # no lock, nothing partial


def test_any_door_leads_to_any_other(tmp_path, tokenizer_dir, capsys):
    model = saved(tmp_path, tokenizer_dir, dtype=torch.bfloat16)
    cv.export_megatron(cv.ExportMegatron(model=model, out=tmp_path / "a", tp=2, pp=2))
    cv.export_meta(cv.ExportMeta(model=tmp_path / "a", out=tmp_path / "b", shards=2))
    cv.export_megatron(cv.ExportMegatron(model=tmp_path / "b", out=tmp_path / "c", tp=1, pp=4, names="mcore"))
    assert "max-position" in capsys.readouterr().out  # params.json cannot hold it
    result = cv.import_megatron(cv.ImportMegatron(model=tmp_path / "c", out=tmp_path / "d"))
    assert result["parameters"] == Llama(GQA).num_parameters()
    one, other = load_model(model).state_dict(), load_model(tmp_path / "d").state_dict()
    assert all(torch.equal(one[name], other[name]) and other[name].dtype == torch.bfloat16 for name in one)
    with pytest.raises(UserError, match=r"--model .*c is of the kind Megatron.*, not Meta"):
        cv.import_meta(cv.ImportMeta(model=tmp_path / "c", out=tmp_path / "e"))


def test_dtypes_are_kept_unless_asked(tmp_path, tokenizer_dir):
    model = saved(tmp_path, tokenizer_dir)
    cv.export_meta(cv.ExportMeta(model=model, out=tmp_path / "meta", dtype="bf16"))
    cv.import_meta(cv.ImportMeta(model=tmp_path / "meta", out=tmp_path / "back"))
    cv.import_meta(cv.ImportMeta(model=tmp_path / "meta", out=tmp_path / "wide", dtype="fp32"))
    half, wide, state = (load_model(path).state_dict() for path in (tmp_path / "back", tmp_path / "wide", model))
    for name, tensor in state.items():
        assert torch.equal(half[name], tensor.bfloat16()) and torch.equal(wide[name], tensor.bfloat16().float())


def test_a_cast_that_would_overflow_is_refused(tmp_path, tokenizer_dir):
    model = Llama(GQA)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = 1e6
    save_model(model, tmp_path / "model", load_tokenizer(tokenizer_dir))
    with pytest.raises(UserError, match=r"model\.layers\.1\.mlp\.up_proj\.weight has values up to 1e\+06, more than float16 holds"):
        cv.export_meta(cv.ExportMeta(model=tmp_path / "model", out=tmp_path / "out", dtype="fp16"))
    assert nothing_left(tmp_path)


def test_version_2_of_llama2c_reads_back_with_groups_that_had_to_be_smaller(tmp_path, tokenizer_dir):
    model = saved(tmp_path, tokenizer_dir, dataclasses.replace(GQA, intermediate_size=96))
    cv.export_llama2c(cv.ExportLlama2c(model=model, out=tmp_path / "out", version=2))
    written = llama2c.open_weights(tmp_path / "out")
    source = open_weights(model)
    for name, lazy in written.tensors.items():
        assert torch.allclose(lazy.read(), source.tensors[name].read(), atol=2e-3)


# ---- what goes wrong -------------------------------------------------------------------------------------------------


def nothing_left(tmp_path) -> bool:
    return sorted(path.name for path in tmp_path.iterdir()) == ["model"]


def test_a_target_in_use_is_not_touched(tmp_path, tokenizer_dir):
    model, out = saved(tmp_path, tokenizer_dir), tmp_path / "out"
    out.mkdir()
    (out / "mine").write_text("x")
    with pytest.raises(UserError, match=r"--out .*out exists already"):
        cv.export_meta(cv.ExportMeta(model=model, out=out))
    assert [path.name for path in out.iterdir()] == ["mine"]


def test_a_full_disk_is_seen_before_anything_is_begun(tmp_path, tokenizer_dir, monkeypatch):
    model = saved(tmp_path, tokenizer_dir)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: namedtuple("usage", "free")(free=50_000))
    monkeypatch.setattr(meta, "write", lambda *args, **options: pytest.fail("it began"))
    with pytest.raises(UserError, match=r"will take 0\.0\d GB and .* has 0\.00 GB free; nothing was begun"):
        cv.export_meta(cv.ExportMeta(model=model, out=tmp_path / "deep" / "er"))
    assert nothing_left(tmp_path)


@pytest.mark.parametrize("trouble", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_an_interrupted_conversion_leaves_nothing(tmp_path, tokenizer_dir, monkeypatch, trouble):
    model, write = saved(tmp_path, tokenizer_dir), megatron.write

    def stop(source, out, **options):
        write(source, out, **options)
        raise trouble

    monkeypatch.setattr(megatron, "write", stop)
    with pytest.raises((KeyboardInterrupt, OSError)):
        cv.export_megatron(cv.ExportMegatron(model=model, out=tmp_path / "out", tp=2))
    assert nothing_left(tmp_path)


def test_what_does_not_read_back_equal_is_not_kept(tmp_path, tokenizer_dir, monkeypatch):
    model, write = saved(tmp_path, tokenizer_dir), meta.write

    def flipped(source, out, **options):
        lazy = source.tensors["model.norm.weight"]
        source.tensors["model.norm.weight"] = Lazy(lazy.shape, lazy.dtype, lambda: lazy.read().mul_(1 + 2**-20))
        write(source, out, **options)

    monkeypatch.setattr(meta, "write", flipped)
    with pytest.raises(UserError, match=r"does not read back as it was: model\.norm\.weight differs"):
        cv.export_meta(cv.ExportMeta(model=model, out=tmp_path / "out"))
    assert nothing_left(tmp_path)


def test_values_that_are_not_finite_are_reported_and_kept(tmp_path, tokenizer_dir, capsys):
    model = Llama(GQA)
    with torch.no_grad():
        model.model.norm.weight[3] = float("nan")
        model.lm_head.weight[1, :2] = float("inf")
    save_model(model, tmp_path / "model", load_tokenizer(tokenizer_dir))
    cv.export_megatron(cv.ExportMegatron(model=tmp_path / "model", out=tmp_path / "out", tp=2))
    out = capsys.readouterr().out
    assert "model.norm.weight holds 1 values that are NaN or infinite" in out and "lm_head.weight holds 2 values" in out
    found = cv.inspect(cv.Inspect(path=tmp_path / "out"))
    assert found["not finite"] == 2 and "lm_head.weight: 2 values are NaN or infinite" in capsys.readouterr().out


def test_a_tokenizer_larger_than_the_embedding_is_refused(tmp_path, tokenizer_dir):
    save_model(Llama(dataclasses.replace(GQA, vocab_size=200)), tmp_path / "model")
    with pytest.raises(UserError, match=r"the tokenizer has 400 entries and the embedding of .*model only 200 rows"):
        cv.export_meta(cv.ExportMeta(model=tmp_path / "model", out=tmp_path / "out", tokenizer=tokenizer_dir))
    assert nothing_left(tmp_path)


def test_what_a_format_cannot_hold_is_said_all_at_once(tmp_path, tokenizer_dir):
    model = saved(tmp_path, tokenizer_dir, dataclasses.replace(GQA, rope_theta=5e5, attention_bias=True))
    with pytest.raises(UserError, match=r"^llama2\.c cannot hold this model: .*theta.*bias|bias.*theta"):
        cv.export_llama2c(cv.ExportLlama2c(model=model, out=tmp_path / "out"))
    with pytest.raises(UserError, match=r"Megatron.* cannot hold this model: .*3.*heads"):
        cv.export_megatron(cv.ExportMegatron(model=model, out=tmp_path / "out", tp=3))


# ---- inspect -----------------------------------------------------------------------------------------------------------


def test_inspect_tells_what_everything_is(tmp_path, tokenizer_dir, capsys):
    model = saved(tmp_path, tokenizer_dir, dtype=torch.bfloat16)
    cv.export_meta(cv.ExportMeta(model=model, out=tmp_path / "meta", shards=2))
    cv.export_megatron(cv.ExportMegatron(model=model, out=tmp_path / "megatron", tp=2, pp=4))
    cv.export_llama2c(cv.ExportLlama2c(model=model, out=tmp_path / "llama2c"))
    pytest.importorskip("gguf")
    cv.export_gguf(cv.ExportGguf(model=model, out=tmp_path / "gguf"))
    capsys.readouterr()
    for path, kind in (("gguf", "GGUF"), (model, "Hugging Face"), ("meta", "Meta"), ("megatron", "Megatron"), ("llama2c", "llama2.c")):
        found = cv.inspect(cv.Inspect(path=tmp_path / path))
        out = re.sub(r" +", " ", capsys.readouterr().out)
        assert kind in found["kind"] and found["parameters"] == Llama(GQA).num_parameters()
        for part in ("4 layers, hidden 32, feed-forward 64, 4 heads of 8, 2 key/value heads", "tokenizer 400 entries",
                     "vocabulary 400, embedding and head separate", "values all finite", "would load yes"):  # fmt: skip
            assert part in out, (kind, out)
        assert ("bfloat16 100%" in out) == (kind != "llama2.c")


def test_inspect_says_why_something_would_not_load(tmp_path, tokenizer_dir, capsys):
    model = saved(tmp_path, tokenizer_dir)
    shard = sorted(model.glob("model-*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-50])
    with pytest.raises(UserError, match=f"{shard.name} cannot be read"):
        cv.inspect(cv.Inspect(path=model))
    assert "kind          Hugging Face" in (out := capsys.readouterr().out) and f"would load    no: {shard} cannot be read" in out
    (tmp_path / "text.txt").write_text("hello")
    with pytest.raises(UserError, match=r"text\.txt is nothing that is known here"):
        cv.inspect(cv.Inspect(path=tmp_path / "text.txt"))
    with pytest.raises(UserError, match="nowhere does not exist"):
        cv.inspect(cv.Inspect(path=tmp_path / "nowhere"))


def run_with_steps(tmp_path, tokenizer_dir) -> tuple[Path, list[Llama]]:
    """A run directory with two steps, and their models."""
    tokenizer, models = load_tokenizer(tokenizer_dir), []
    (tmp_path / "run").mkdir()
    for step in (1, 2):
        torch.manual_seed(step)
        machine_config = MachineConfig(device="cpu", dtype="fp32")
        parallel = make_parallel(Machine(machine_config), machine_config)
        model = Llama(GQA)
        parallel.wrap(model, torch.optim.AdamW(model.parameters()), clip=1.0, micro_batch=1, micro_batches=1)
        save_state(tmp_path / "run", parallel=parallel, tokenizer=tokenizer, state={"stage": "pretrain", "step": step})
        models.append(model)
    return tmp_path / "run", models


def test_a_run_is_its_newest_intact_step_and_one_of_its_steps_can_be_named(tmp_path, tokenizer_dir, capsys):
    run, models = run_with_steps(tmp_path, tokenizer_dir)
    for path, model in ((run, models[1]), (run / "step-000001", models[0])):
        assert cv.located(path)[1] is huggingface
        read = cv.open_source(path).tensors
        assert all(torch.equal(read[name].read(), parameter) for name, parameter in model.named_parameters())
        for bring, config in ((cv.import_meta, cv.ImportMeta), (cv.import_megatron, cv.ImportMegatron), (cv.import_gguf, cv.Convert),
                              (cv.import_llama2c, cv.ImportLlama2c)):  # fmt: skip
            with pytest.raises(UserError, match=r"--model .* is of the kind Hugging Face, not"):
                bring(config(model=path, out=tmp_path / "out"))
    (run / "step-000002" / "model.safetensors").write_bytes(b"x")
    read = cv.open_source(run).tensors
    assert torch.equal(read["lm_head.weight"].read(), models[0].lm_head.weight)
    (run / "step-000001" / "model.safetensors").write_bytes(b"x")
    with pytest.raises(UserError, match=r"run has 2 checkpoints and none is intact|no complete step"):
        cv.open_source(run)


def test_a_given_tokenizer_replaces_a_broken_one_and_the_ids_in_the_config(tmp_path, tokenizer_dir, capsys):
    model = saved(tmp_path, tokenizer_dir, SHAPES["odd vocabulary"])
    (model / "tokenizer.model").write_bytes(b"junk")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"bos_token_id": 7, "eos_token_id": 8}))
    with pytest.raises(UserError, match="not a sentencepiece model"):
        cv.export_meta(cv.ExportMeta(model=model, out=tmp_path / "out"))
    cv.export_megatron(cv.ExportMegatron(model=model, out=tmp_path / "out", tokenizer=tokenizer_dir))
    cv.import_megatron(cv.ImportMegatron(model=tmp_path / "out", out=tmp_path / "back"))
    given, ids = load_tokenizer(tokenizer_dir), json.loads((tmp_path / "back" / "config.json").read_text())
    assert (ids["bos_token_id"], ids["eos_token_id"]) == (given.bos_id, given.eos_id)
    assert "the embedding has 403 rows and the tokenizer 400 entries" in capsys.readouterr().out


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, torch.complex64])
def test_weights_that_are_no_plain_numbers_are_refused(tmp_path, dtype):
    state = dict(Llama(GQA).state_dict())
    state["model.norm.weight"] = state["model.norm.weight"].to(dtype)
    GQA.to_json(tmp_path / "config.json")
    torch.save(state, tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match=rf"holds model\.norm\.weight \({str(dtype).removeprefix('torch.')}\); weights are read as fp32"):
        cv.inspect(cv.Inspect(path=tmp_path))


def test_what_a_killed_conversion_left_is_in_nobodys_way(tmp_path, tokenizer_dir, monkeypatch):
    model, partial = saved(tmp_path, tokenizer_dir), tmp_path / ".out.partial"
    partial.mkdir()
    (partial / "consolidated.00.pth").write_bytes(bytes(30_000_000))
    needed = meta.size(open_weights(model))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: namedtuple("usage", "free")(free=needed))
    cv.export_meta(cv.ExportMeta(model=model, out=tmp_path / "out"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "out"]


def test_sigterm_leaves_nothing(tmp_path, tokenizer_dir, monkeypatch):
    model, write = saved(tmp_path, tokenizer_dir), meta.write

    def terminated(source, out, **options):
        write(source, out, **options)
        os.kill(os.getpid(), signal.SIGTERM)
        signal.pause()

    monkeypatch.setattr(meta, "write", terminated)
    with pytest.raises(KeyboardInterrupt):
        cv.export_meta(cv.ExportMeta(model=model, out=tmp_path / "out"))
    assert nothing_left(tmp_path) and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


@pytest.mark.parametrize("out", [".", "/", "model/config.json/x", "dangling"])
def test_places_where_nothing_can_be_written(tmp_path, tokenizer_dir, monkeypatch, out):
    saved(tmp_path, tokenizer_dir)
    (tmp_path / "dangling").symlink_to("nowhere")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"--out .* (exists already|is not a directory)"):
        cv.export_meta(cv.ExportMeta(model=Path("model"), out=Path(out)))


# ---- resize-vocab -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("init", ["subword", "mean", "normal"])
def test_a_larger_vocabulary(tmp_path, ours_dir, tied, init, capsys):
    torch.manual_seed(0)
    base = load_tokenizer(ours_dir)
    config = dataclasses.replace(GQA, vocab_size=len(base), tie_word_embeddings=tied, bos_token_id=base.bos_id, eos_token_id=base.eos_id)
    base.save(tmp_path / "model", template="llama2")
    save_model(Llama(config), tmp_path / "model", load_tokenizer(tmp_path / "model"))
    extend_from(ExtendConfig(base=ours_dir, out=tmp_path / "larger", specials=("<|tool|>", "<|end_tool|>")))
    new = load_tokenizer(tmp_path / "larger")
    assert len(new) == len(base) + 2
    report = cv.resize_vocab(cv.ResizeVocab(model=tmp_path / "model", tokenizer=tmp_path / "larger", out=tmp_path / "out", init=init,
                                            multiple_of=64))  # fmt: skip
    assert report["rows"] == -(-len(new) // 64) * 64 and report["model.embed_tokens.weight"]["coinciding"] == 0
    assert ("lm_head.weight" in report) != tied and "0 rows coincide" in capsys.readouterr().out
    before, after = load_model(tmp_path / "model"), load_model(tmp_path / "out")
    tokens = torch.randint(3, len(base), (2, 20))
    with torch.no_grad():
        assert torch.equal(before(tokens), after(tokens)[..., : len(base)])
    made = load_tokenizer(tmp_path / "out")
    assert made.fingerprint == new.fingerprint and new.template is None and made.template == "llama2"  # the model's, kept
    with pytest.raises(UserError, match=r"nowhere\.txt does not exist"):  # before anything is written
        cv.resize_vocab(cv.ResizeVocab(model=tmp_path / "model", tokenizer=tmp_path / "larger", out=tmp_path / "late",
                                       text=tmp_path / "nowhere.txt"))  # fmt: skip
    assert not (tmp_path / "late").exists()
    with pytest.raises(UserError, match="taking rows away"):
        cv.resize_vocab(cv.ResizeVocab(model=tmp_path / "out", tokenizer=ours_dir, out=tmp_path / "smaller"))


def test_rows_that_stay_equal_are_told(tmp_path, ours_dir, capsys):
    base = load_tokenizer(ours_dir)
    model = Llama(dataclasses.replace(GQA, vocab_size=len(base)))
    with torch.no_grad():
        model.model.embed_tokens.weight.zero_()
    save_model(model, tmp_path / "model", base)
    extend_from(ExtendConfig(base=ours_dir, out=tmp_path / "larger", specials=("<|a|>", "<|b|>")))
    report = cv.resize_vocab(cv.ResizeVocab(model=tmp_path / "model", tokenizer=tmp_path / "larger", out=tmp_path / "out"))
    assert report["model.embed_tokens.weight"]["coinciding"] == 2 and report["lm_head.weight"]["coinciding"] == 0
    assert "notice: equal rows are equal to the model too: model.embed_tokens.weight" in capsys.readouterr().out


# ---- the command line ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_command_line(tmp_path, tokenizer_dir):
    model = saved(tmp_path, tokenizer_dir)
    words = ["export-megatron", "--model", model, "--tp", "2", "--out", tmp_path / "out"]
    done = subprocess.run([sys.executable, "convert.py", *words], cwd=REPO, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True,
                          text=True)  # fmt: skip
    assert done.returncode == 0 and "read back and equal" in done.stdout and "writing" in done.stderr
    statuses, _, err = ended("convert.py", "export-megatron", "--model", model, "--tp", 0, "--layers", "a,b", "--out", tmp_path / "other")
    assert statuses == [2] and "--tp must be at least 1, not 0" in err and "--layers must be numbers" in err
    assert len(err.splitlines()) == 1 and not (tmp_path / "other").exists()
