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
from checkpoint import load_model, load_state, resolve_model_dir, save_model, save_state, weights_identity
from model import Llama, LlamaConfig
from parallel import make_parallel
from runs import damage, newest_step, steps
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


CPU = MachineConfig(device="cpu", dtype="fp32")


def trained(model: Llama, steps_: int = 2):
    """What a stage holds: the model in one process, its optimizer after a few steps."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
    for _ in range(steps_):
        model(TOKENS, TOKENS).backward()
        optimizer.step()
        optimizer.zero_grad()
    parallel = make_parallel(Machine(CPU), CPU)
    parallel.wrap(model, optimizer, clip=1.0, micro_batch=1, micro_batches=1)
    return parallel


def test_state_comes_back_exactly(tmp_path, model, tokenizer_dir):
    parallel, tokenizer = trained(model), load_tokenizer(tokenizer_dir)
    torch.rand(3)
    save_state(tmp_path, parallel=parallel, tokenizer=tokenizer, state={"stage": "sft", "step": 2, "x": 5})
    expected_random = torch.rand(4)
    other = trained(Llama(SMALL), 0)
    step = newest_step(tmp_path)
    assert step.name == "step-000002"
    with pytest.raises(UserError, match=r"a step of sft\.py"):
        load_state(step, stage="pretrain", parallel=other, tokenizer=tokenizer)
    assert load_state(step, stage="sft", parallel=other, tokenizer=tokenizer) == {"stage": "sft", "step": 2, "x": 5}
    assert torch.equal(torch.rand(4), expected_random)
    for continued in (parallel, other):
        continued.model(TOKENS, TOKENS).backward()
        continued.optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.model.parameters(), strict=True))
    assert transformers.AutoModelForCausalLM.from_pretrained(step).num_parameters() == model.num_parameters()


def test_a_step_of_another_model_or_format_is_refused(tmp_path, model, tokenizer_dir):
    tokenizer = load_tokenizer(tokenizer_dir)
    step = save_state(tmp_path, parallel=trained(model), tokenizer=tokenizer, state={"stage": "sft", "step": 2})
    larger = trained(Llama(dataclasses.replace(SMALL, num_hidden_layers=3, intermediate_size=40)), 0)
    with pytest.raises(UserError, match=r"another model: intermediate_size 48 instead of 40, num_hidden_layers 2 instead of 3"):
        load_state(step, stage="sft", parallel=larger, tokenizer=tokenizer)
    (step / "state.json").write_text(json.dumps({"stage": "sft", "step": 2}))
    with pytest.raises(UserError, match=r"an older Cria wrote this .* --init-from"):
        load_state(step, stage="sft", parallel=trained(model, 0), tokenizer=tokenizer)


def test_tensors_may_lie_in_many_files(tmp_path, model, tokenizer_dir, monkeypatch):
    monkeypatch.setattr(checkpoint, "SHARD_BYTES", 30_000)
    parallel, other, tokenizer = trained(model), trained(Llama(SMALL), 0), load_tokenizer(tokenizer_dir)
    step = save_state(tmp_path, parallel=parallel, tokenizer=tokenizer, state={"stage": "sft", "step": 2})
    assert len(list(step.glob("model-*.safetensors"))) > 2 and len(list(step.glob("optimizer-*.safetensors"))) > 4
    load_state(step, stage="sft", parallel=other, tokenizer=tokenizer)
    for parameter, same in zip(model.parameters(), other.model.parameters(), strict=True):
        assert torch.equal(parameter, same)
        for key, value in parallel.optimizer.state[parameter].items():
            assert torch.equal(value, other.optimizer.state[same][key])


def test_no_flipped_or_cut_byte_is_ever_loaded(tmp_path, model, tokenizer_dir, capsys):
    """Every file of a checkpoint in turn: a flipped bit at either end and in the middle, a cut, the file gone."""
    parallel, tokenizer = trained(model), load_tokenizer(tokenizer_dir)
    for number in (1, 2):
        save_state(tmp_path, parallel=parallel, tokenizer=tokenizer, state={"stage": "sft", "step": number})
    older, step = steps(tmp_path)
    files = [*json.loads((step / "manifest.json").read_text())["files"], "manifest.json"]
    assert {"model.safetensors", "optimizer.safetensors", "random.safetensors", "state.json", "config.json"} < set(files)
    for name in files:
        whole = (step / name).read_bytes()

        def flipped(at: int, whole: bytes = whole) -> bytes:
            return whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :]

        for damaged in (flipped(0), flipped(len(whole) // 2), flipped(len(whole) - 2), whole[:-3], b"", None):
            if damaged is None:
                (step / name).unlink()
            else:
                (step / name).write_bytes(damaged)
            if name == "manifest.json" and not damage(step):  # a flip in its white space says nothing else than before
                assert json.loads(damaged) == json.loads(whole)
            else:
                assert newest_step(tmp_path) == older and f"{step} is incomplete or damaged" in capsys.readouterr().err, name
                if damaged is not None and not name.startswith(("optimizer", "random", "state", "manifest")):
                    with pytest.raises(UserError, match="is damaged"):
                        resolve_model_dir(step)
        (step / name).write_bytes(whole)
    assert newest_step(tmp_path) == step


def test_only_the_newest_steps_and_the_best_stay(tmp_path, model, tokenizer_dir, capsys):
    parallel, tokenizer = trained(model), load_tokenizer(tokenizer_dir)
    for step in range(1, 6):
        state = {"stage": "sft", "step": step, "best": {"step": 2, "val_loss": 1.0} if step > 2 else None}
        save_state(tmp_path, parallel=parallel, tokenizer=tokenizer, state=state, keep=2)
    assert [step.name for step in steps(tmp_path)] == ["step-000002", "step-000004", "step-000005"]
    (tmp_path / "step-000005" / "optimizer.safetensors").unlink()
    (tmp_path / ".step-000007.partial").mkdir()  # a kill left it there
    assert newest_step(tmp_path).name == "step-000004"
    save_state(tmp_path, parallel=parallel, tokenizer=tokenizer, state={"stage": "sft", "step": 5}, keep=2)
    assert newest_step(tmp_path).name == "step-000005"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000004", "step-000005"]


def test_full_disk_leaves_the_last_step_whole(tmp_path, model, tokenizer_dir, monkeypatch, capsys):
    """On a real full disk: a 1 MiB tmpfs, where the user may mount one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if os.name != "posix" or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("needs the right to mount a tmpfs")
    try:
        parallel, tokenizer = trained(model), load_tokenizer(tokenizer_dir)
        monkeypatch.setattr(checkpoint, "SMALL_FILES", 0)
        save_state(disk, parallel=parallel, tokenizer=tokenizer, state={"stage": "sft", "step": 1})
        (disk / "ballast").write_bytes(b"x" * (shutil.disk_usage(disk).free - 150_000))
        second = dict(parallel=parallel, tokenizer=tokenizer, state={"stage": "sft", "step": 2})
        assert save_state(disk, **second) is None  # noticed before anything is written
        assert "a checkpoint takes 0.00 GB: step 2 is not saved" in capsys.readouterr().out
        with pytest.raises(UserError, match=r"free some space\. The newest checkpoint is .*step-000001"):
            save_state(disk, **second, needed=True)
        monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 0, 10**9))
        with pytest.raises(OSError) as error:  # it fills up while the step is being written
            save_state(disk, **second)
        assert error.value.errno == errno.ENOSPC
        assert newest_step(disk).name == "step-000001"
        assert sorted(p.name for p in disk.iterdir()) == ["ballast", "step-000001"]
    finally:
        subprocess.run(["umount", disk], check=True)


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
        with pytest.raises(UserError, match=r"holds code beside them \(print\), which is never run"):
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
