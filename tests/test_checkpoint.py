"""checkpoint.py: what we write transformers reads, what it writes we read; state that is complete or absent."""

from __future__ import annotations

from settings import UserError

import dataclasses
import errno
import json
import os
import shutil
import subprocess

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

import checkpoint
from checkpoint import (
    is_intact,
    load_model,
    load_state,
    lock_run,
    newest_step,
    open_run,
    save_model,
    save_state,
    steps,
    weights_identity,
)
from model import Llama, LlamaConfig
from runtime import Machine, MachineConfig
from tokenizer import load_tokenizer

transformers = pytest.importorskip("transformers")

SMALL = LlamaConfig(vocab_size=400, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                    num_key_value_heads=2, max_position_embeddings=64)  # fmt: skip
TOKENS = torch.arange(30)[None]


@pytest.fixture
def model() -> Llama:
    torch.manual_seed(0)
    return Llama(SMALL).eval()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("shard_bytes", [10**9, 30_000])
@torch.no_grad()
def test_what_we_save_opens_in_transformers(tmp_path, tokenizer_dir, tied, shard_bytes):
    torch.manual_seed(0)
    ours, tokenizer = Llama(dataclasses.replace(SMALL, tie_word_embeddings=tied)).eval(), load_tokenizer(tokenizer_dir)
    save_model(ours, tmp_path, tokenizer, template="chatml", shard_bytes=shard_bytes)
    assert (len(list(tmp_path.glob("model-*.safetensors"))) > 1) == (shard_bytes < 10**6)
    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    torch.testing.assert_close(theirs(TOKENS).logits, ours(TOKENS), atol=1e-4, rtol=1e-4)
    text = "春眠不觉晓，abc 123。\n"
    assert transformers.AutoTokenizer.from_pretrained(tmp_path)(text, add_special_tokens=False)["input_ids"] == tokenizer.encode(text)
    generation = json.loads((tmp_path / "generation_config.json").read_text())
    stops = generation["eos_token_id"]
    assert tokenizer.stop_ids("chatml") == (stops if isinstance(stops, list) else [stops])
    again = load_model(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), ours.parameters(), strict=True))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("shards", ["10GB", "20KB"])
@torch.no_grad()
def test_what_transformers_saves_opens_here(tmp_path, tied, shards):
    torch.manual_seed(0)
    data = dataclasses.replace(SMALL, tie_word_embeddings=tied).to_dict()
    del data["architectures"], data["model_type"]
    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(**data)).eval()
    theirs.save_pretrained(tmp_path, max_shard_size=shards)
    ours = load_model(tmp_path).eval()
    torch.testing.assert_close(ours(TOKENS), theirs(TOKENS).logits, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_old_bin_files_and_dtypes(tmp_path, model):
    save_model(model, tmp_path, dtype=torch.bfloat16)
    assert load_model(tmp_path).lm_head.weight.dtype == torch.bfloat16
    assert load_model(tmp_path, dtype=torch.float32).lm_head.weight.dtype == torch.float32
    assert json.loads((tmp_path / "config.json").read_text())["torch_dtype"] == "bfloat16"
    state = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    torch.save({**state, "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}, tmp_path / "pytorch_model.bin")
    assert torch.equal(load_model(tmp_path).lm_head.weight, model.lm_head.weight.bfloat16())


def test_misfits_are_named(tmp_path, model):
    save_model(model, tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    state["model.norm.weight"] = torch.ones(7)
    state["surprise"] = torch.ones(1)
    del state["lm_head.weight"]
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(UserError) as error:
        load_model(tmp_path)
    for part in ("model.norm.weight is (7,) and config.json says (32,)", "surprise is unknown", "lm_head.weight is missing"):
        assert part in str(error.value)


def test_broken_files_are_named(tmp_path, model):
    with pytest.raises(UserError, match="does not exist"):
        load_model(tmp_path / "nothing")
    with pytest.raises(UserError, match="no model directory"):
        load_model(tmp_path)
    save_model(model, tmp_path, shard_bytes=30_000)
    first, second = sorted(tmp_path.glob("model-*.safetensors"))[:2]
    second.write_bytes(second.read_bytes()[:-100])
    with pytest.raises(UserError, match=f"{second.name} cannot be read"):
        load_model(tmp_path)
    first.unlink()
    with pytest.raises(UserError, match=f"names {first.name}, which is missing"):
        load_model(tmp_path)


# ---- training state --------------------------------------------------------------------------------------------------


def trained(model: Llama, steps_: int = 2) -> torch.optim.AdamW:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
    for _ in range(steps_):
        model(TOKENS, TOKENS).backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


def test_state_comes_back_exactly(tmp_path, model, tokenizer_dir):
    tokenizer, machine = load_tokenizer(tokenizer_dir), Machine(MachineConfig(device="cpu", dtype="fp32"))
    optimizer = trained(model)
    torch.rand(3)
    save_state(tmp_path, 2, model=model, tokenizer=tokenizer, optimizer=optimizer, machine=machine,
               progress={"stage": "sft", "step": 2, "x": 5})  # fmt: skip
    expected_random = torch.rand(4)
    other = Llama(SMALL)
    fresh = torch.optim.AdamW(other.parameters(), lr=1e-2, fused=True)
    step = newest_step(tmp_path)
    assert step.name == "step-000002"
    with pytest.raises(UserError, match=r"a step of sft\.py"):
        load_state(step, stage="pretrain", model=other, optimizer=fresh, machine=machine)
    assert load_state(step, stage="sft", model=other, optimizer=fresh, machine=machine) == {"stage": "sft", "step": 2, "x": 5}
    assert torch.equal(torch.rand(4), expected_random)
    for continued in ((model, optimizer), (other, fresh)):
        continued[0](TOKENS, TOKENS).backward()
        continued[1].step()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    assert transformers.AutoModelForCausalLM.from_pretrained(step).num_parameters() == model.num_parameters()


def test_damaged_steps_are_passed_over_and_old_ones_go(tmp_path, model, tokenizer_dir, capsys):
    tokenizer, machine = load_tokenizer(tokenizer_dir), Machine(MachineConfig(device="cpu", dtype="fp32"))
    optimizer = trained(model)
    for step in (1, 2, 3):
        save_state(tmp_path, step, model=model, tokenizer=tokenizer, optimizer=optimizer, machine=machine, progress={"step": step}, keep=2)
    assert [step.name for step in steps(tmp_path)] == ["step-000002", "step-000003"]
    weights = tmp_path / "step-000003" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1  # one flipped bit, same size
    weights.write_bytes(data)
    assert not is_intact(tmp_path / "step-000003")
    assert newest_step(tmp_path).name == "step-000002"
    assert "step-000003 is incomplete or damaged" in capsys.readouterr().err
    (tmp_path / "step-000002" / "optimizer.safetensors").unlink()
    assert newest_step(tmp_path) is None


def test_full_disk_leaves_the_last_step_whole(tmp_path, model, tokenizer_dir):
    """On a real full disk: a 1 MiB tmpfs, where the user may mount one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if os.name != "posix" or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("needs the right to mount a tmpfs")
    try:
        tokenizer, machine = load_tokenizer(tokenizer_dir), Machine(MachineConfig(device="cpu", dtype="fp32"))
        optimizer = trained(model)
        save_state(disk, 1, model=model, tokenizer=tokenizer, optimizer=optimizer, machine=machine, progress={"step": 1})
        (disk / "ballast").write_bytes(b"x" * (shutil.disk_usage(disk).free - 150_000))
        with pytest.raises(OSError) as error:
            save_state(disk, 2, model=model, tokenizer=tokenizer, optimizer=optimizer, machine=machine, progress={"step": 2})
        assert error.value.errno == errno.ENOSPC
        assert newest_step(disk).name == "step-000001"
        assert sorted(p.name for p in disk.iterdir()) == ["ballast", "step-000001"]
    finally:
        subprocess.run(["umount", disk], check=True)


@dataclasses.dataclass(frozen=True)
class Settings:
    lr: float = 1.0
    keep: int = 2


def test_open_run_refuses_what_is_not_this_run(tmp_path):
    arguments = dict(resume="auto", harmless={"keep"}, identity={"data": "abc"})
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
        open_run(tmp_path, Settings(), **{**arguments, "identity": {"data": "xyz"}})
    with pytest.raises(UserError, match="already holds a run"):
        open_run(tmp_path, Settings(), **{**arguments, "resume": "never"})
    with pytest.raises(UserError, match="no intact step"):
        open_run(tmp_path, Settings(), **{**arguments, "resume": str(tmp_path / "step-000009")})
    for out in (tmp_path / "notes.txt", tmp_path / "notes.txt" / "deeper"):
        with pytest.raises(UserError, match=r"notes\.txt is not a directory"):
            open_run(out, Settings(), **arguments)


def test_a_run_belongs_to_one_process_at_a_time(tmp_path):
    held = lock_run(tmp_path / "run")
    with pytest.raises(UserError, match="another process is training in"):
        lock_run(tmp_path / "run")
    held.close()
    lock_run(tmp_path / "run").close()


def test_other_weights_have_another_identity(tmp_path, model):
    save_model(model, tmp_path)
    before = weights_identity(tmp_path)
    assert weights_identity(tmp_path) == before
    with torch.no_grad():
        model.model.embed_tokens.weight[0, 0] += 1
    save_model(model, tmp_path)
    assert weights_identity(tmp_path) != before


def test_code_in_a_bin_file_is_not_run(tmp_path, model):
    save_model(model, tmp_path)
    (tmp_path / "model.safetensors").unlink()
    for content, zipped in ((print, True), (print, False)):
        torch.save({"lm_head.weight": content}, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
        with pytest.raises(UserError, match="holds code beside them, which is never run"):
            load_model(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"garbage")
    with pytest.raises(UserError, match="pytorch_model"):
        load_model(tmp_path)


def test_a_full_disk_named_by_the_library_is_a_full_disk(tmp_path, model, monkeypatch):
    def full(*arguments, **keywords):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(OSError) as error:
        save_model(model, tmp_path / "out")
    assert error.value.errno == errno.ENOSPC and list((tmp_path / "out").iterdir()) == []
