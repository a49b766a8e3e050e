"""bench_plan.py and bench_memory.py: what is predicted is what autograd, the allocator and the process really take.

Run as a program, this file is also the worker that trains a few steps and says how much its allocator held.
"""

from __future__ import annotations

from settings import UserError, parse_config

import dataclasses
import json
import os
import re
import shlex
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from processes_at_hand import finished

import bench_memory
import pretrain
from bench_memory import DDP, FSDP, GIB, OFFLOAD, STRATEGIES, ZERO2, ZERO3, Step, count
from bench_plan import PlanConfig, largest_that, plan
from model import PRESETS, Block, Llama, LlamaConfig
from parallel import freeze, make_parallel
from pretrain import EMBEDDINGS
from runtime import Machine, MachineConfig

ROOT = Path(pretrain.__file__).parent
MIB = 2**20
GROUPED = LlamaConfig(6000, 256, 700, 4, 8, 2, max_position_embeddings=512)
TIED = dataclasses.replace(GROUPED, tie_word_embeddings=True)
DEEP = LlamaConfig(500, 128, 352, 8, 4, 4, max_position_embeddings=512)
LLAMA3 = count(PRESETS["llama3-8b"], 8192)
NO_OVERHEAD = dict.fromkeys(bench_memory.OVERHEAD, (0, 0))


def step(strategy=DDP, devices=1, llama=GROUPED, tokens=1024, checkpointing=False, train="all", **more) -> Step:
    return Step(counts=more.pop("counts", None) or count(llama, 512, train), strategy=strategy, devices=devices, tokens=tokens,
                checkpointing=checkpointing, **more)  # fmt: skip


# ----------------------------------------------------------------------------------------------------------------------
# Against autograd


@pytest.mark.parametrize("shape", [(64, 176, 4, 2), (96, 250, 3, 3), (128, 352, 8, 1)])
@pytest.mark.parametrize("strategy, dtype", [(DDP, torch.bfloat16), (DDP, torch.float32), (ZERO2, torch.bfloat16), (ZERO2, torch.float32)])
@pytest.mark.parametrize("B, T, trained", [(3, 37, "all"), (1, 61, "all"), (3, 37, "embeddings")])
def test_a_block_saves_what_the_table_says(shape, strategy, dtype, B, T, trained):
    D, I, H, K = shape
    llama = LlamaConfig(100, D, I, 1, H, K)
    block = Block(llama, 0).to(dtype if strategy.casts_weights else torch.float32).requires_grad_(trained == "all")
    stream = dtype if strategy.casts_weights else torch.float32
    x = torch.randn(B, T, D, dtype=stream, requires_grad=True)
    cos, sin = torch.randn(2, 1, 1, T, llama.head_dim // 2)
    weights = {shape for p in block.parameters() for shape in (p.shape, p.shape[::-1])}
    not_counted = {t.untyped_storage().data_ptr() for t in (cos, sin)}
    saved = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in not_counted and tensor.shape not in weights:  # a weight's copy has its shape
            saved[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), \
            torch.autocast("cpu", dtype, enabled=strategy.autocast and dtype != torch.float32):  # fmt: skip
        output = block(x, cos, sin, None, None)
    assert output.dtype == stream
    predicted = step(strategy, llama=llama, train=trained, e=dtype.itemsize, kind="cpu").saved_per_token()
    assert sum(storage.nbytes() for storage in saved.values()) == B * T * sum(predicted.values())


# ----------------------------------------------------------------------------------------------------------------------
# Against the allocator


def most_allocated(work) -> int:
    """Bytes: the most that was alive at once while work() ran, of what was allocated since it began, as the allocator reports."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        work()
    events = sorted((event.start_ns(), event.nbytes()) for event in profile.profiler.kineto_results.events() if event.name() == "[memory]")
    alive = most = 0
    for _, size in events:
        alive += size
        most = max(most, alive)
    return most


def train(llama: LlamaConfig, config: MachineConfig, *, tokens: int, checkpointing: bool, micro_batches: int,
          trains: tuple[str, ...] = ("all",)) -> list[int]:  # fmt: skip
    """Two optimizer steps as pretrain.py makes them, for each --train; the most that was allocated."""

    def work(what: str) -> None:
        parallel = make_parallel(machine, config)
        model = parallel.build(llama, lambda model: freeze(model, EMBEDDINGS if what == "embeddings" else None))
        model.checkpointing = checkpointing
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=True)
        network = parallel.wrap(model, optimizer, clip=1.0, micro_batch=tokens // 256, micro_batches=micro_batches)
        parallel.fill(model.initial_weights(0))
        network.train()
        x, y = torch.randint(0, llama.vocab_size, (2, tokens // 256, 256))
        for _ in range(2):
            for i in range(micro_batches):
                with parallel.micro_batch(network, last=i == micro_batches - 1):
                    with parallel.autocast():
                        loss = network(x, y, denominator=tokens * micro_batches)
                    parallel.backward(loss)
            if parallel.engine:
                parallel.step()
            else:
                parallel.clip(1.0)
                optimizer.step()
                optimizer.zero_grad(set_to_none=parallel.frees_gradients)

    with Machine(config) as machine:
        return [most_allocated(partial(work, what)) for what in trains]


@pytest.mark.slow
@pytest.mark.parametrize("llama, tokens, dtype, checkpointing, micro_batches, moment", [
    (GROUPED, 1024, "bf16", False, 1, "loss"),
    (GROUPED, 512, "bf16", True, 2, "loss"),
    (GROUPED, 512, "fp32", False, 2, "loss"),
    (TIED, 512, "bf16", False, 2, "loss"),
    (TIED, 256, "fp32", True, 1, "embedding"),
    (DEEP, 2048, "bf16", True, 1, "last block"),
    (DEEP, 1024, "fp32", True, 2, "last block"),
    (DEEP, 512, "fp32", False, 1, "loss"),
])  # fmt: skip
def test_one_process_allocates_what_is_predicted(monkeypatch, llama, tokens, dtype, checkpointing, micro_batches, moment):
    monkeypatch.setattr(bench_memory, "OVERHEAD", NO_OVERHEAD)
    trains = ("all", "embeddings")
    took = train(llama, MachineConfig(device="cpu", dtype=dtype), tokens=tokens, checkpointing=checkpointing, micro_batches=micro_batches,
                 trains=trains)  # fmt: skip
    predicted = [step(llama=llama, tokens=tokens, checkpointing=checkpointing, train=what, e=4 if dtype == "fp32" else 2, kind="cpu",
                      accumulates=micro_batches > 1).peak() for what in trains]  # fmt: skip
    assert predicted[0][0] == moment
    assert [parts.total for _, parts in predicted] == pytest.approx(took, rel=0.03)


def two_processes(flags: dict) -> list[int]:
    """What two processes allocated, the larger of them; with --train all, with --train embeddings."""
    lines = finished(__file__, json.dumps(flags)).splitlines()
    said = [json.loads(line.removeprefix("allocated ")) for line in lines if line.startswith("allocated ")]
    return [max(both) for both in zip(*said, strict=True)]


@pytest.mark.slow
@pytest.mark.parametrize("strategy", (FSDP, ZERO2, OFFLOAD), ids=lambda strategy: strategy.name)
def test_two_processes_allocate_what_is_predicted(monkeypatch, tmp_path, strategy):
    flags = {"fsdp": strategy is FSDP, "offload": strategy is OFFLOAD}
    if strategy not in (DDP, FSDP):
        pytest.importorskip("deepspeed", reason="needs deepspeed")
        stage, small = int(strategy.flags.split()[1]), 10**6  # the default buckets are larger than this test may be
        (tmp_path / "ds.json").write_text(json.dumps({"zero_optimization": {"stage": stage, "reduce_bucket_size": small}}))
        flags["deepspeed"] = str(tmp_path / "ds.json")
        monkeypatch.setattr(bench_memory, "REDUCE_BUCKET", small)
    monkeypatch.setattr(bench_memory, "OVERHEAD", NO_OVERHEAD)
    runs = [step(strategy, devices=2, kind="cpu", tokens=2048, train=what) for what in ("all", "embeddings")]
    predicted = [run.peak()[1].total + run.states()[2] for run in runs]  # on a CPU the device's memory is the host's
    assert predicted == pytest.approx(two_processes(flags), rel=0.15)  # gloo lets go of its last buffers at a time of its own


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="how memory goes back to the system differs")
@pytest.mark.parametrize("dtype, checkpointing", [("bf16", False), ("fp32", True)])
def test_the_process_takes_what_is_predicted(tmp_path, dtype, checkpointing):
    """`bench.py train`, whose peak is the whole process's, with the C library told to give freed memory back at once."""
    llama = LlamaConfig(16000, 512, 1376, 4, 8, 2, max_position_embeddings=256)
    llama.to_json(tmp_path / "config.json")
    flags = ["--model", tmp_path / "config.json", "--micro-batch", 2, "--dtype", dtype, "--device", "cpu", "--steps", 1, "--repeats", 1]
    flags += ["--out", tmp_path / "r.json", *["--checkpointing"] * checkpointing]
    command = [sys.executable, str(ROOT / "bench.py"), "train", *map(str, flags)]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", timeout=300,
                          env={**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"})  # fmt: skip
    assert done.returncode == 0, done.stderr
    run = json.loads((tmp_path / "r.json").read_text(encoding="utf-8"))["runs"]["cria"][0]
    predicted = step(llama=llama, tokens=2 * 256, checkpointing=checkpointing, e=4 if dtype == "fp32" else 2, accumulates=False, kind="cpu")
    assert predicted.peak()[1].total == pytest.approx(run["peak_memory"] - run["memory_before"], rel=0.15)


# ----------------------------------------------------------------------------------------------------------------------
# Numbers by hand, and what must hold for all numbers


def test_llama3_8b_by_hand():
    P = 8_030_261_248
    assert LLAMA3.all == P and LLAMA3.head == 128256 * 4096 and LLAMA3.root == 2 * LLAMA3.head + 4096
    alone = step(counts=LLAMA3, kind="cuda")
    assert sum(alone.states()[:2]) + alone.gradients()["step"] == 16 * P == pytest.approx(119.66 * GIB, rel=1e-4)
    shared = step(FSDP, 8, counts=LLAMA3)
    assert sum(shared.states()[:2]) + shared.gradients()["step"] == 2 * P
    assert step(ZERO2, 8, counts=LLAMA3).states() == (2 * P, 1.5 * P, 0)
    assert step(ZERO3, 8, counts=LLAMA3).states() == (P / 4, 1.5 * P, 0)
    assert step(OFFLOAD, 8, counts=LLAMA3).states() == (0, 0, 22 * P / 8)
    # fused norms 2·4·D + 8, five casts 5·2·D, q k v and the output 2·(2·4096 + 2·1024), H·4, o's input 2·D, 4·2·I
    assert sum(alone.saved_per_token().values()) == 8 * 4096 + 8 + 10 * 4096 + 2 * (2 * 4096 + 2 * 1024) + 4 * 32 + 2 * 4096 + 8 * 14336
    # 8,192 hidden states and their gradients in fp32, 261 rows of logits in bf16 and fp32, the head in bf16, and its gradient in both
    assert dataclasses.replace(alone, tokens=8192).loss() == 8 * 8192 * 4096 + 261 * (6 * 128256 + 4 * 4096) + 8 * LLAMA3.head
    assert LLAMA3.flops_per_token == 6 * (P - LLAMA3.head) + 12 * 32 * 4096 * 8192
    checkpointed = step(FSDP, 8, counts=LLAMA3, tokens=8192, checkpointing=True).activations()["loss"]
    assert checkpointed == pytest.approx(32 * 8192 * 4096 * 2, rel=0.1)  # the inputs of 32 blocks in bf16


def test_llama3_8b_whose_embeddings_alone_are_trained_by_hand():
    P, trained = LLAMA3.all, 2 * 128256 * 4096
    counts = count(LLAMA3.llama, 8192, "embeddings")
    alone = step(counts=counts)
    assert sum(alone.states()[:2]) + alone.gradients()["step"] == 4 * P + 12 * trained
    shared = step(FSDP, 8, counts=counts)
    assert sum(shared.states()[:2]) + shared.gradients()["step"] == (4 * P + 12 * trained) / 8
    assert step(ZERO2, 8, counts=counts).states() == (2 * P, 1.5 * trained, (P - trained) / 2)  # what bf16 cannot hold: on the host
    assert step(ZERO2, 8, counts=counts, e=4).states() == (4 * P, 1.5 * trained, 0)
    assert step(OFFLOAD, 8, counts=counts).states() == (0, 0, (20 * trained + 2 * P + 4 * (P - trained)) / 8)
    # 6 for the head, 4 for all else but the embedding; attention as it was
    assert counts.flops_per_token == 6 * LLAMA3.head + 4 * (P - trained) + 12 * 32 * 4096 * 8192
    # fused norms 2·4·D + 8, q k v and the output 2·(2·4096 + 2·1024), H·4, 3·2·I
    assert sum(alone.saved_per_token().values()) == 8 * 4096 + 8 + 2 * (2 * 4096 + 2 * 1024) + 4 * 32 + 6 * 14336


@pytest.mark.parametrize("tied", [False, True])
def test_what_is_counted_as_trained_is_what_pretrain_trains(tied):
    llama = dataclasses.replace(GROUPED, tie_word_embeddings=tied)
    with torch.device("meta"):
        model = freeze(Llama(llama), EMBEDDINGS)
    assert count(llama, 512, "embeddings").trained == sum(p.numel() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("strategy", STRATEGIES, ids=lambda strategy: strategy.name)
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", ["cuda", "npu", "cpu"])
@pytest.mark.parametrize("e", [2, 4])
@pytest.mark.parametrize("counts", [LLAMA3, count(LLAMA3.llama, 8192, "embeddings")], ids=["all", "embeddings"])
def test_more_devices_need_less_and_more_tokens_more(strategy, checkpointing, kind, e, counts):
    def total(devices: int = 8, tokens: int = 8192, **more) -> float:
        return step(strategy, devices, counts=counts, tokens=tokens, checkpointing=checkpointing, kind=kind, e=e, **more).peak()[1].total

    by_devices = [total(devices) for devices in (2, 4, 8, 64, 1024)]
    assert by_devices == sorted(by_devices, reverse=True)
    by_tokens = [total(tokens=tokens) for tokens in (1, 512, 8192, 3 * 8192, 64 * 8192)]
    assert by_tokens == sorted(by_tokens) and by_tokens[-1] > 1.5 * by_tokens[0]
    assert total() >= total(accumulates=False)
    if not checkpointing:
        with_it = step(strategy, 8, counts=counts, tokens=8192, checkpointing=True, kind=kind, e=e).peak()[1].total
        assert with_it < total()
    assert counts is LLAMA3 or total() <= step(strategy, 8, counts=LLAMA3, tokens=8192, checkpointing=checkpointing, kind=kind,
                                              e=e).peak()[1].total  # fmt: skip


@pytest.mark.parametrize("strategy", [FSDP, ZERO3])
def test_what_is_shared_out_adds_up_to_one_copy(strategy):
    for devices in (2, 8, 64):
        one, many = (step(strategy, N, counts=LLAMA3) for N in (1, devices))
        assert devices * sum(many.states()) == pytest.approx(sum(one.states()))
        assert devices * many.gradients()["loss"] == pytest.approx(one.gradients()["loss"])


# ----------------------------------------------------------------------------------------------------------------------
# The command


def test_parts_add_up_and_the_largest_micro_batch_is_the_largest(capsys):
    config = PlanConfig(model="llama3-8b", gpus=8, gpu_memory=80, gpu="a100")
    rows = plan(config)["rows"]
    assert len(rows) == 12 and {row["strategy"] for row in rows} == set(STRATEGIES)
    assert len(capsys.readouterr().out.splitlines()) == 2 + 13 + 5
    usable = 80 * 0.95 * GIB
    for row in rows:
        assert row["parts"].total == sum(dataclasses.astuple(row["parts"]))
        assert row["fits"] == (row["parts"].total <= usable) == (row["largest"] > 0)
        if row["fits"]:
            assert row["micro_batch"] == row["largest"]
            (more,) = [other for other in plan(dataclasses.replace(config, micro_batch=row["largest"] + 1))["rows"]
                       if (other["strategy"], other["checkpointing"]) == (row["strategy"], row["checkpointing"])]  # fmt: skip
            assert not more["fits"] and more["parts"].total > usable and more["largest"] == row["largest"]
    assert {row["name"] for row in rows if row["fits"]} == {"FSDP", "ZeRO-2", "ZeRO-3", "ZeRO-3 + offload"}


@pytest.mark.parametrize("largest", [0, 1, 2, 3, 7, 8, 1000])
@pytest.mark.parametrize("limit", [1, 3, 7, 8, 5000])
def test_the_search_finds_the_border(largest, limit):
    assert largest_that(lambda number: number <= largest, limit) == min(largest, limit)


def test_the_batch_limits_the_micro_batch(capsys):
    rows = plan(PlanConfig(model="92m", gpus=4, gpu_memory=80, batch_size=24))["rows"]
    assert {row["largest"] for row in rows} == {6}


@pytest.mark.parametrize("flags, asked", [
    ({}, STRATEGIES),
    ({"fsdp": True}, (FSDP,)),
    ({"deepspeed": "2"}, (ZERO2,)),
    ({"offload": True}, (OFFLOAD,)),
    ({"deepspeed": "3", "offload": True}, (OFFLOAD,)),
    ({"fsdp": True, "deepspeed": "3"}, (FSDP, ZERO3)),
    ({"gpus": 1}, (DDP, OFFLOAD)),
    ({"gpus": 1, "fsdp": True}, (FSDP,)),
])  # fmt: skip
def test_which_strategies_are_shown(flags, asked):
    assert PlanConfig(**{"gpus": 2, "gpu_memory": 1, **flags}).strategies() == asked


@pytest.mark.parametrize("flags, name, words", [
    ({"model": "92m", "gpu_memory": 24}, "one device", ["python pretrain.py --model 92m"]),
    ({"model": "500m", "gpus": 4, "gpu_memory": 24, "dtype": "fp16"}, "DDP", ["torchrun --nproc_per_node=4", "--dtype fp16"]),
    ({"model": "llama3-8b", "gpus": 8, "gpu_memory": 64, "device": "npu", "batch_size": 64}, "FSDP",
     ["--fsdp", "--device npu", "--batch-size 64"]),
    ({"model": "llama3-8b", "gpus": 8, "gpu_memory": 24}, "ZeRO-3 + offload", ["--deepspeed 3 --offload --checkpointing"]),
    ({"model": "llama3-70b", "gpus": 64, "gpu_memory": 80}, "FSDP",
     ["torchrun --nnodes=8 --rdzv-backend=c10d --rdzv-endpoint=HOST:29400 --nproc_per_node=8 pretrain.py", "--checkpointing"]),
    ({"model": "llama3-8b", "gpus": 8, "gpu_memory": 24, "train": "embeddings"}, "FSDP",
     ["--init-from path/to/llama3-8b --train embeddings", "--fsdp --checkpointing"]),
])  # fmt: skip
def test_the_recommended_command_is_one_that_pretrain_takes(flags, name, words, capsys):
    best = plan(PlanConfig(**flags))["recommended"]
    assert best["name"] == name and best["fits"]
    assert all(word in best["command"] for word in words) and best["command"] in capsys.readouterr().out
    config = parse_config(pretrain.Config, best["command"].partition("pretrain.py ")[2].split())
    assert config.micro_batch == best["micro_batch"] and config.checkpointing == best["checkpointing"]
    assert config.batch_size % (flags.get("gpus", 1) * config.micro_batch) == 0 or config.batch_size == flags.get("batch_size")


def test_a_model_directory_is_continued(tmp_path):
    GROUPED.to_json(tmp_path / "config.json")
    torch.save({}, tmp_path / "pytorch_model.bin")  # only the name counts
    best = plan(PlanConfig(model=str(tmp_path), gpu_memory=8))["recommended"]
    assert f"pretrain.py --init-from {tmp_path} --seq-len 512" in best["command"]


def test_time_and_disk(capsys):
    config = PlanConfig(model="llama3-8b", gpus=8, gpu_memory=80, gpu="a100", tokens=1e9, fsdp=True, checkpointing=False)
    best = plan(config)["recommended"]
    assert best["seconds"] == pytest.approx(1e9 * LLAMA3.flops_per_token / (8 * 312e12 * 0.4))
    again = plan(dataclasses.replace(config, checkpointing=True))["recommended"]
    assert again["seconds"] == pytest.approx(best["seconds"] * 4 / 3)
    assert plan(dataclasses.replace(config, gpu=None))["recommended"]["seconds"] is None
    counts = count(LLAMA3.llama, 8192, "embeddings")
    frozen = plan(dataclasses.replace(config, checkpointing=True, train="embeddings"))["recommended"]
    assert frozen["seconds"] == pytest.approx(1e9 * (counts.flops_per_token + LLAMA3.flops_per_token / 3) / (8 * 312e12 * 0.4))
    printed = capsys.readouterr().out
    assert "disk: 37.7 GiB per checkpoint" in printed and "8.03B parameters, of which 1.05B are trained" in printed
    assert "33% for checkpointing on top" in printed and "44% for checkpointing on top" in printed
    assert "time: 16.1 hours for 1B tokens at 40% of the peak\n" in printed and "time: say which --gpu" in printed
    assert "disk: 89.7 GiB per checkpoint" in printed and "final weights 29.9 GiB, with --save-dtype bf16 15.0" in printed


def test_the_host_must_hold_what_is_offloaded(capsys):
    config = PlanConfig(model="llama3-8b", gpus=16, gpu_memory=24, offload=True, host_memory=83)
    (_, row) = plan(config)["rows"]
    assert row["host"] == 22 * LLAMA3.all / 2 and row["fits"]  # half of the model on each of two machines
    result = plan(dataclasses.replace(config, host_memory=82))
    assert result["recommended"] is None and "nothing fits" in capsys.readouterr().out


def test_markdown(capsys):
    plan(PlanConfig(model="tiny", gpu_memory=1, markdown=True))
    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len(table) == 6 and len({line.count("|") for line in table}) == 1


def test_the_documented_tables_and_commands_are_those_of_today(capsys):
    text = (ROOT / "docs" / "scale.md").read_text(encoding="utf-8")
    asked = [shlex.split(words) for words in re.findall(r"`python bench.py plan (--.*?)`", text)]
    assert len(asked) == 4
    for words in asked:
        plan(parse_config(PlanConfig, [*words, "--markdown"]))
    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len(table) == 3 * 14 + 4 and set(table) <= set(text.splitlines())
    commands = re.findall(r"^torchrun .*?pretrain\.py (.*)$", text.replace("\\\n", " "), re.MULTILINE)
    assert len(commands) == 5
    for words in commands:
        parse_config(pretrain.Config, words.split())


@pytest.mark.parametrize("flags, message", [
    ([], "--gpu-memory is required: GiB of one device"),
    (["--gpu-memory", "0", "--gpus", "0"], "--gpu-memory must be above 0, not 0.0; --gpus must be at least 1, not 0"),
    (["--gpu-memory", "24", "--model", "93m"], "--model 93m is neither a preset"),
    (["--gpu-memory", "24", "--reserve", "1"], "--reserve must be at least 0 and below 1, not 1.0"),
    (["--gpu-memory", "24", "--mfu", "40"], "--mfu must be at most 1, not 40.0"),
    (["--gpu-memory", "24", "--deepspeed", "2", "--offload"], "--offload is planned for --deepspeed 3, not 2"),
    (["--gpu-memory", "24", "--gpus", "12"], "--gpus 12 do not fill machines of --per-machine 8"),
    (["--gpu-memory", "24", "--gpus", "4", "--batch-size", "6"], "--batch-size 6 cannot be shared equally by --gpus 4"),
    (["--gpu-memory", "24", "--batch-size", "6", "--micro-batch", "7"], "--micro-batch 7 on --gpus 1 is more than --batch-size 6"),
    (["--gpu-memory", "24", "--gpu", "h1000"], "h1000"),
    (["--gpu-memory", "24", "--seq-len", "513"], "--seq-len 513 is longer than the 512 tokens that 92m reads"),
])  # fmt: skip
def test_mistakes_are_one_line(flags, message):
    with pytest.raises(UserError, match=message) as caught:
        plan(parse_config(PlanConfig, flags))
    assert "\n" not in str(caught.value)


if __name__ == "__main__":
    wanted = MachineConfig(device="cpu", dtype="bf16", **json.loads(sys.argv[1]))
    took = train(GROUPED, wanted, tokens=2048, checkpointing=False, micro_batches=2, trains=("all", "embeddings"))
    print(f"allocated {took}\n", end="", flush=True)
