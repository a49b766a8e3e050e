"""parallel.py: however a model is shared out, the losses are DDP's, and any other way can go on from what was saved."""

from __future__ import annotations

from settings import UserError

import dataclasses
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from processes_at_hand import ended, finished, free_port
from safetensors.torch import load_file
from test_pretrain import REPOSITORY, changed, flags, losses, run, same_weights, settings, tiny_config, validation  # noqa: F401  fixtures

import checkpoint
from checkpoint import load_model, save_model
from model import PRESETS, Llama, LlamaConfig
from parallel import DeepSpeed, Replicated, freeze, make_parallel, strategy_problems
from pretrain import EMBEDDINGS, Config, main, make_optimizer
from progress import read_metrics
from runs import damage, newest_step
from runtime import Machine, MachineConfig
from tokenizer import load_tokenizer

needs_deepspeed = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed")
WAYS = {"fsdp": ["--fsdp"], **{f"zero-{stage}": ["--deepspeed", str(stage)] for stage in (1, 2, 3)}}


def hashes(out: Path) -> dict[int, str]:
    return {line["step"]: line["batch_hash"] for line in read_metrics(out / "metrics.jsonl") if "batch_hash" in line}


@pytest.fixture(scope="module")
def ddp(tmp_path_factory, tiny_config, data_dir):  # noqa: F811
    """Ten steps of two processes under DDP, each step in two micro-batches per process, saved half-way and at the end."""
    base = dict(data=data_dir, model=tiny_config, steps=10, batch_size=8, micro_batch=2, lr=5e-3, dtype="fp32", device="cpu",
                log_every=1, eval_every=10, save_every=5)  # fmt: skip
    out = tmp_path_factory.mktemp("ddp") / "run"
    finished("pretrain.py", *flags({**base, "out": out}))
    return base, out


@pytest.mark.slow
@pytest.mark.parametrize("way", [pytest.param(way, marks=needs_deepspeed if "zero" in way else ()) for way in WAYS])
def test_the_losses_are_those_of_ddp_and_a_run_goes_on_bit_for_bit(way, ddp, tmp_path):
    base, reference = ddp
    transformers = pytest.importorskip("transformers")
    whole, rest = tmp_path / "whole", tmp_path / "rest"
    finished("pretrain.py", *flags({**base, "out": whole}), *WAYS[way])
    assert losses(whole) == pytest.approx(losses(reference), abs=2e-5) and hashes(whole) == hashes(reference)
    assert [loss for _, loss in validation(whole)] == pytest.approx([loss for _, loss in validation(reference)], abs=2e-5)

    half = whole / "step-000005"
    finished("pretrain.py", *flags({**base, "out": rest, "resume": half}), *WAYS[way])
    assert losses(rest) == losses(whole)[5:] and same_weights(rest, whole)

    takers = [tmp_path / "alone"]
    main(Config(**{**base, "model": str(base["model"]), "out": takers[0], "resume": str(half)}))  # one process takes over
    if way in ("fsdp", "zero-2"):  # and this way takes over from DDP
        takers.append(tmp_path / "switched")
        finished("pretrain.py", *flags({**base, "out": takers[1], "resume": reference / "step-000005"}), *WAYS[way])
    for out in takers:
        assert losses(out) == pytest.approx(losses(reference)[5:], abs=1e-4)
        assert hashes(out).items() <= hashes(reference).items()

    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(whole, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    tokens = torch.arange(20)[None]
    torch.testing.assert_close(theirs(tokens).logits, load_model(reference)(tokens), atol=1e-3, rtol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("way", ["fsdp", pytest.param("zero-3", marks=needs_deepspeed)])
def test_checkpointing_tied_weights_offloading_and_bf16_when_shared_out(way, ddp, tmp_path):
    base, _ = ddp
    tied = tmp_path / "tied.json"
    dataclasses.replace(LlamaConfig.from_json(base["model"]), tie_word_embeddings=True).to_json(tied)
    base = {**base, "model": tied, "steps": 6, "eval_every": 6, "save_every": 6}
    main(Config(**{**base, "model": str(tied), "out": tmp_path / "one"}))
    finished("pretrain.py", *flags({**base, "out": tmp_path / "tied"}), *WAYS[way], "--checkpointing", *["--offload"] * (way == "zero-3"))
    assert losses(tmp_path / "tied") == pytest.approx(losses(tmp_path / "one"), abs=2e-5)
    if way == "fsdp":
        return
    finished("pretrain.py", *flags({**base, "out": tmp_path / "bf16", "dtype": "bf16"}), *WAYS[way])
    assert losses(tmp_path / "bf16") == pytest.approx(losses(tmp_path / "one"), abs=0.02)


@pytest.mark.slow
def test_embeddings_alone_are_trained_however_the_model_is_shared_out(data_dir, tmp_path):
    """Two processes take over from one, in three ways one after the other: starting them is most of the time."""
    torch.manual_seed(3)
    llama = LlamaConfig(400, 32, 48, 2, 4, 2, max_position_embeddings=32)
    save_model(Llama(llama), tmp_path / "base", load_tokenizer(data_dir))
    base = dict(data=data_dir, init_from=tmp_path / "base", train="embeddings", steps=8, batch_size=8, micro_batch=2, lr=5e-3,
                device="cpu", log_every=1, eval_every=8, save_every=4)  # fmt: skip
    main(Config(**{**base, "dtype": "fp32", "out": tmp_path / "one"}))
    ways = {"ddp": ["--dtype", "fp32"], "fsdp": ["--dtype", "fp32", "--fsdp"]}
    if importlib.util.find_spec("deepspeed"):
        ways["zero"] = ["--dtype", "bf16", "--deepspeed", "3", "--offload"]  # bf16 cannot hold the frozen weights
    base["resume"] = tmp_path / "one" / "step-000004"
    commands = [[*flags({**base, "out": tmp_path / way}), *words] for way, words in ways.items()]
    driver = tmp_path / "in_turns.py"
    driver.write_text(f"import sys\nsys.path.insert(0, {str(REPOSITORY)!r})\n" + IN_TURNS)
    process = run(driver, json.dumps([[free_port(), command] for command in commands]), torchrun=2)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    for way in ways:
        assert losses(tmp_path / way) == pytest.approx(losses(tmp_path / "one")[4:], abs=2e-5 if way != "zero" else 0.02)
        assert changed(tmp_path / "base", tmp_path / way) == list(EMBEDDINGS)
        kept = load_file(tmp_path / way / "step-000008" / "optimizer.safetensors")
        assert {key.rpartition(":")[0] for key in kept} == set(EMBEDDINGS)


IN_TURNS = """
from settings import parse_config
import json, os
import pretrain

for port, words in json.loads(sys.argv[1]):
    os.environ.update(MASTER_PORT=str(port), TORCHELASTIC_USE_AGENT_STORE="False")  # each needs a meeting place of its own
    pretrain.main(parse_config(pretrain.Config, words))
"""


@pytest.mark.slow
def test_three_processes_go_on_bit_for_bit_and_reduce_once_per_step(ddp, tmp_path):
    """Three or more add up in an order that depends on DDP's buckets, which two do not show."""
    base, _ = ddp
    base = {**base, "batch_size": 12, "steps": 6, "save_every": 3}
    driver = tmp_path / "counted.py"
    driver.write_text(f"import sys\nsys.path.insert(0, {str(REPOSITORY)!r})\n" + COUNTED)
    out = finished(driver, *flags({**base, "out": tmp_path / "whole"}), processes=3)
    assert "reductions: 6" in out  # of a model that fits one bucket, in six steps of two micro-batches
    finished(driver, *flags({**base, "out": tmp_path / "rest", "resume": tmp_path / "whole" / "step-000003"}), processes=3)
    assert losses(tmp_path / "rest") == losses(tmp_path / "whole")[3:] and same_weights(tmp_path / "rest", tmp_path / "whole")


COUNTED = """
from settings import command_line
import parallel, pretrain
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

wrap, count = parallel.Replicated.wrap, [0]

def hook(group, bucket):
    count[0] += 1
    return allreduce_hook(group, bucket)

def counted(self, *arguments, **numbers):
    network = wrap(self, *arguments, **numbers)
    network.register_comm_hook(None, hook)
    return network

parallel.Replicated.wrap = counted
def main(config):
    pretrain.main(config)
    print("reductions:", count[0])
command_line(main, pretrain.Config)
"""


@pytest.mark.slow
@needs_deepspeed
def test_deepspeeds_own_launcher(ddp, tmp_path):
    base, reference = ddp
    command = [Path(sys.executable).with_name("deepspeed"), "--num_gpus", "2", "--master_port", str(free_port()), "pretrain.py",
               *flags({**base, "out": tmp_path / "run"}), "--deepspeed", "2"]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu",
                   "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}  # fmt: skip
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert losses(tmp_path / "run") == pytest.approx(losses(reference), abs=2e-5)


@pytest.mark.slow
def test_killed_on_two_processes_goes_on_on_one_and_back(settings, tmp_path):  # noqa: F811
    """The same batches in the same order, the same losses up to the order of additions."""
    settings |= dict(dropout=0.0, steps=30, save_every=3, eval_every=100)
    main(Config(**settings))
    other = {**settings, "out": tmp_path / "moved"}
    driver = tmp_path / "mortal.py"
    driver.write_text(f"import sys\nsys.path.insert(0, {str(REPOSITORY)!r})\n" + MORTAL)
    for processes, last in ((2, 11), (1, 20)):
        statuses, _, err = ended(driver, last, *flags(other), processes=processes)
        assert statuses == [-signal.SIGKILL] * processes, err
        assert len(losses(other["out"])) == last  # two more than the newest checkpoint knows
    assert "resuming at step" in finished("pretrain.py", *flags(other))
    assert losses(other["out"]) == pytest.approx(losses(settings["out"]), abs=1e-4) and len(losses(other["out"])) == 30
    assert hashes(other["out"]) == hashes(settings["out"])


MORTAL = """
from settings import command_line
import os, signal
import pretrain

rate, last = pretrain.learning_rate, int(sys.argv.pop(1))

def mortal(step, *rest):
    if step == last:
        os.kill(os.getpid(), signal.SIGKILL)
    return rate(step, *rest)

pretrain.learning_rate = mortal
command_line(pretrain.main, pretrain.Config)
"""


# ---- the 8B, in small and on paper -----------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("way", ["fsdp", pytest.param("zero-3", marks=needs_deepspeed)])
def test_a_small_twin_of_llama3_8b_is_written_by_both_ranks_in_many_files(way, data_dir, tmp_path):
    eight = PRESETS["llama3-8b"]
    twin = dataclasses.replace(eight, vocab_size=2004, hidden_size=128, intermediate_size=448, num_hidden_layers=2,
                               num_attention_heads=4, num_key_value_heads=1, head_dim=32, max_position_embeddings=64)  # fmt: skip
    assert twin.num_attention_heads // twin.num_key_value_heads == eight.num_attention_heads // eight.num_key_value_heads
    twin.to_json(tmp_path / "twin.json")
    base = dict(data=data_dir, model=tmp_path / "twin.json", steps=4, batch_size=4, micro_batch=1, lr=1e-3, dtype="fp32", device="cpu",
                log_every=1, eval_every=4, save_every=2)  # fmt: skip
    driver = tmp_path / "small_files.py"
    driver.write_text(f"import sys\nsys.path.insert(0, {str(REPOSITORY)!r})\n"
                      "from settings import command_line\nimport checkpoint, pretrain\n"
                      "checkpoint.SHARD_BYTES = 400_000\ncommand_line(pretrain.main, pretrain.Config)\n")
    finished(driver, *flags({**base, "out": tmp_path / "whole"}), *WAYS[way])
    half = tmp_path / "whole" / "step-000002"
    assert not damage(half) and len(list(half.glob("model-0*.safetensors"))) > 3 and len(list(half.glob("optimizer-0*.safetensors"))) > 3
    if way != "fsdp":
        finished(driver, *flags({**base, "out": tmp_path / "rest", "resume": half}), *WAYS[way])
        assert same_weights(tmp_path / "rest", tmp_path / "whole") and losses(tmp_path / "rest") == losses(tmp_path / "whole")[2:]
        return
    shutil.copytree(tmp_path / "whole" / "step-000004", tmp_path / "given", ignore=shutil.ignore_patterns("manifest.json"))
    again = {**base, "init_from": tmp_path / "given", "steps": 1, "lr": 1e-9, "out": tmp_path / "next"}
    finished("pretrain.py", *flags(again), *WAYS[way])
    assert validation(tmp_path / "next")[0][1] == pytest.approx(validation(tmp_path / "whole")[-1][1], abs=1e-4)


def test_llama3_8b_on_paper():
    """Its optimizer groups and the files of a checkpoint, without a byte of its memory."""
    with torch.device("meta"):
        model = Llama(PRESETS["llama3-8b"])
    assert model.num_parameters() == 8_030_261_248
    machine = Machine(Config(device="cpu", dtype="bf16"))
    matrices, vectors = make_optimizer(model, Config(weight_decay=0.1), machine).param_groups
    assert len(matrices["params"]) == 2 + 32 * 7 and matrices["weight_decay"] == 0.1
    assert len(vectors["params"]) == 1 + 32 * 2 and vectors["weight_decay"] == 0.0
    (alone,) = make_optimizer(freeze(model, EMBEDDINGS), Config(weight_decay=0.1), machine).param_groups
    assert [p.shape for p in alone["params"]] == [(128256, 4096)] * 2 and alone["weight_decay"] == 0.1
    plan = checkpoint._weights_plan(model, None, torch.float32, checkpoint.SHARD_BYTES)
    sizes = [sum(lazy.nbytes for lazy in tensors.values()) for tensors in plan.values()]
    assert sum(sizes) == 4 * 8_030_261_248 and max(sizes) <= 5e9 and next(iter(plan)) == f"model-00001-of-{len(plan):05d}.safetensors"


# ---- flags and files -------------------------------------------------------------------------------------------------


def zero(stage: int, *, given: dict | None = None, dtype=torch.bfloat16, world: int = 8, **flags_) -> DeepSpeed:
    """A DeepSpeed strategy that only knows its settings: eight bf16 devices, without the package."""
    way = DeepSpeed.__new__(DeepSpeed)
    Replicated.__init__(way, Machine(MachineConfig(device="cpu")), MachineConfig(deepspeed="mine.json", **flags_))
    way.machine.dtype, way.machine.world, way.stage, way.given = dtype, world, stage, given or {}
    return way


NUMBERS = dict(clip=1.0, micro_batch=2, micro_batches=4)


def test_deepspeeds_settings_come_from_our_flags():
    made = zero(3, offload=True)._settings(**NUMBERS)
    assert (made["train_batch_size"], made["train_micro_batch_size_per_gpu"], made["gradient_accumulation_steps"]) == (64, 2, 4)
    assert made["gradient_clipping"] == 1.0 and made["bf16"]["enabled"] and made["data_types"] == {"grad_accum_dtype": "fp32"}
    assert made["zero_optimization"]["stage"] == 3
    assert made["zero_optimization"]["offload_optimizer"]["device"] == made["zero_optimization"]["offload_param"]["device"] == "cpu"
    assert "offload_param" not in zero(2, offload=True)._settings(**NUMBERS)["zero_optimization"]
    assert "bf16" not in zero(1)._settings(**NUMBERS) and zero(1)._settings(**NUMBERS)["torch_autocast"]["enabled"]
    assert not {"bf16", "torch_autocast"} & set(zero(2, dtype=torch.float32)._settings(**NUMBERS))


def test_a_deepspeed_file_adds_what_it_likes_and_may_not_contradict():
    given = {"zero_optimization": {"stage": 2, "reduce_bucket_size": 5}, "train_batch_size": "auto", "gradient_clipping": 1.0,
             "bf16": {"enabled": True}, "wall_clock_breakdown": True}  # fmt: skip
    made = zero(2, given=given)._settings(**NUMBERS)
    assert made["zero_optimization"]["reduce_bucket_size"] == 5 and made["wall_clock_breakdown"] and made["train_batch_size"] == 64
    assert zero(3, given={**given, "train_batch_size": 64})._settings(**NUMBERS | {"micro_batch": 1}, check=False)["train_batch_size"] == 32
    for key, value in (("gradient_clipping", 2.0), ("optimizer", {"type": "Adam"}), ("train_batch_size", 63), ("fp16", {"enabled": True})):
        with pytest.raises(UserError, match=f"mine.json sets {key}, which Cria's own flags decide"):
            zero(2, given={**given, key: value})._settings(**NUMBERS)


def test_flags_that_contradict_or_lead_nowhere(tmp_path):
    (tmp_path / "zero.json").write_text("{}")
    for settings_, message in (
        (dict(deepspeed="4"), "--deepspeed takes 1, 2, 3 or a FILE.json, not 4"),
        (dict(deepspeed=str(tmp_path / "none.json")), "none.json does not exist"),
        (dict(deepspeed="2", fsdp=True), "--fsdp and --deepspeed are two ways"),
        (dict(offload=True), "--offload needs --deepspeed"),
    ):
        assert message in "; ".join(strategy_problems(MachineConfig(**settings_)))
    assert strategy_problems(MachineConfig(deepspeed=str(tmp_path / "zero.json"), offload=True)) == []


def test_fp16_and_a_missing_package_are_one_line(monkeypatch):
    config = MachineConfig(device="cpu", dtype="fp16", deepspeed="2")
    with pytest.raises(UserError, match=r"--deepspeed computes in bf16 or fp32; for fp16 .* use --fsdp"):
        make_parallel(Machine(MachineConfig(device="cpu", dtype="fp16")), config)
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    with pytest.raises(UserError, match=r"--deepspeed needs that package .*pip install deepspeed, or use --fsdp"):
        make_parallel(Machine(MachineConfig(device="cpu", dtype="fp32")), config)


def test_a_branch_takes_the_data_position_along_with_another_batch_size(settings, tmp_path):  # noqa: F811
    """After 5 steps of 8, steps of 4 go on at sequence 40, not at 20."""
    settings |= dict(steps=5, dropout=0.0)
    main(Config(**settings))
    first = read_metrics(settings["out"] / "metrics.jsonl")[-1]["tokens"]
    branch = {**settings, "out": tmp_path / "branch", "steps": 7, "batch_size": 4, "resume": str(newest_step(settings["out"]))}
    main(Config(**branch))
    tokens = [line["tokens"] for line in read_metrics(branch["out"] / "metrics.jsonl") if "loss" in line]
    assert tokens == [first + 4 * 32, first + 8 * 32]
