"""Measure speed and memory, side by side and in interleaved repeats, because machines are noisy.

    python bench.py train  --model 92m --against transformers --markdown    # training steps: tokens/s, MFU, peak memory
    python bench.py train  --model 218m --lora-rank 64 --base-quant nf4-double --against full     # an adapter, beside all of the model
    python bench.py loss   --model 92m                                      # our loss, torch's fused one, the plain one
    python bench.py decode --model 92m --against transformers               # reading a prompt, writing an answer
    python bench.py data   --tokenizer out/tokenizer --input big.txt --sides sentencepiece 1 2 1+clean 2+clean
    python bench.py faults --kills 30                                       # is a run that is killed again and again the same?
    python bench.py plan   --model llama3-8b --gpus 8 --gpu-memory 80       # which way to share a model out fits?
    python bench.py smoke  --device npu                                     # does a device compute the right numbers?
    python bench.py convert --model llama2-7b                               # what memory does convert.py take for a 7B checkpoint?

Every measurement is a process of its own, so that neither memory nor caches carry over, and the sides take turns
(bench_turns.py). What is printed is the median over repeats, the spread between them, and the ratio of the sides, taken
pair by pair. Both sides get the same weights and tokens, and their losses are compared: a benchmark of two different
computations would say nothing.
"""

from __future__ import annotations

from settings import UserError, command_line, flag

import dataclasses
import importlib.util
import json
import sys
import time
import zlib
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
from torch import nn

import devices
from adapters import AdapterFlags, attach, first_values
from bench_convert import ConvertConfig, convert
from bench_data import DataConfig, data, data_worker
from bench_faults import FaultsConfig, faults
from bench_plan import PlanConfig, plan
from bench_smoke import SmokeConfig, smoke
from bench_turns import GIB, Config, compare, each, gib, middle, report, spread, take_turns
from checkpoint import resolve_model_dir
from model import IGNORE, PRESETS, Llama, LlamaConfig, linear_cross_entropy
from offload import HostAdamW
from parallel import Replicated
from progress import human
from runtime import Machine, MachineConfig
from sparse_attention import check_groups


@dataclass(frozen=True, kw_only=True)
class ModelConfig(Config):
    """What the commands that run a model share."""

    model: str = flag("92m", f"architecture: {', '.join(PRESETS)}, a config.json, or a model directory's")
    vocab_size: int | None = flag(None, "default: the model's own")
    tied: bool | None = flag(None, "one matrix for embedding and output head; default: as the model has it")
    device: str = flag("auto", "where to compute", choices=("auto", *devices.KINDS))
    dtype: str = flag("auto", "arithmetic of the matrix products", choices=("auto", "bf16", "fp16", "fp32"))
    seed: int = flag(1234, "decides the random tokens")

    def problems(self) -> list[str]:
        found = super().problems()
        if self.model not in PRESETS and not Path(self.model).exists():
            found.append(f"--model {self.model} is neither a preset ({', '.join(PRESETS)}) nor a file or directory")
        against = getattr(self, "against", None)
        if against not in (None, "full") and importlib.util.find_spec(against) is None:
            found.append(f"--against {against} needs that package: pip install {against}")
        return found

    def llama(self) -> LlamaConfig:
        """The architecture, with the vocabulary and tying that were asked for."""
        path = Path(self.model)
        config = PRESETS.get(self.model) or LlamaConfig.from_json(resolve_model_dir(path) if path.is_dir() else path)
        changes = {"vocab_size": self.vocab_size, "tie_word_embeddings": self.tied}
        return dataclasses.replace(config, **{key: value for key, value in changes.items() if value is not None})

    def machine(self) -> Machine:
        return Machine(MachineConfig(device=self.device, dtype=self.dtype, seed=self.seed))


@dataclass(frozen=True, kw_only=True)
class LossConfig(ModelConfig):
    micro_batch: int = flag(8, "sequences per step")
    seq_len: int | None = flag(None, "tokens per sequence; default: all that the model reads")
    steps: int = flag(3, "timed steps per process")
    warmup: int = flag(1, "steps before the clock starts: allocation and compilation fall there")

    def length(self, llama: LlamaConfig) -> int:
        """T, the tokens per sequence."""
        if self.seq_len and self.seq_len > llama.context_length:
            raise UserError(f"--seq-len {self.seq_len} is longer than the {llama.context_length} tokens that "
                            f"{self.model} reads")
        return self.seq_len or llama.context_length


@dataclass(frozen=True, kw_only=True)
class TrainConfig(AdapterFlags, LossConfig):
    against: str | None = flag(None, "put another library's model beside ours; full: beside an adapter, all of the model learns",
                               choices=("transformers", "full"))  # fmt: skip
    compile: bool = flag(False, "torch.compile both models")
    checkpointing: bool = flag(False, "recompute activations in backward")
    s2_attn: bool = flag(False, "train with LongLoRA's shifted sparse attention: groups of a quarter of a sequence")
    offload_optimizer: bool = flag(False, "keep AdamW's two numbers per trained parameter in the host's memory")
    peak_tflops: float | None = flag(None, "the device's data-sheet peak, for MFU, where it is not in our table")

    fsdp, deepspeed = False, None  # what AdapterFlags looks at beside: here is one device

    def problems(self) -> list[str]:
        found = super().problems() + self.adapter_problems()
        if self.against == "full" and self.lora_rank is None:
            found.append("--against full is for an adapter: it needs --lora-rank")
        if self.against == "transformers" and (self.lora_rank or self.s2_attn or self.offload_optimizer):
            found.append("--against transformers has no counterpart of --lora-rank, --s2-attn and --offload-optimizer")
        return found

    @property
    def side(self) -> str:
        """What our side is called."""
        return "lora" if self.lora_rank else "cria"


@dataclass(frozen=True, kw_only=True)
class DecodeConfig(ModelConfig):
    batch_size: int = flag(1, "prompts at a time")
    prompt_tokens: int = flag(64, "tokens of each prompt")
    new_tokens: int = flag(128, "tokens to write after it")
    against: str | None = flag(None, "put another library's generate() beside ours", choices=("transformers",))


# ----------------------------------------------------------------------------------------------------------------------
# Workers: what runs in a process of its own. Each takes (config, side) and returns numbers.


def build(llama: LlamaConfig, side: str, machine: Machine, dtype: torch.dtype) -> nn.Module:
    """Our model or transformers', with the same random weights: each matrix is seeded by its name, which both share."""
    torch.set_default_dtype(dtype)
    with machine.device:
        if side != "transformers":
            model = Llama(llama)
        else:
            from transformers import LlamaConfig as TheirConfig
            from transformers import LlamaForCausalLM

            theirs = {k: v for k, v in llama.to_dict().items() if k not in ("architectures", "model_type")}
            model = LlamaForCausalLM(TheirConfig(**theirs, attn_implementation="sdpa"))
    torch.set_default_dtype(torch.float32)
    for name, parameter in model.named_parameters():
        first_weights(name, parameter.data, llama)
    return model


def first_weights(name: str, tensor: torch.Tensor, llama: LlamaConfig) -> torch.Tensor:
    """Fill a matrix with random numbers, seeded by its name; a vector with ones."""
    if tensor.dim() == 1:
        return tensor.fill_(1)
    dice = torch.Generator(tensor.device).manual_seed(zlib.crc32(name.encode()))
    return tensor.normal_(std=llama.initializer_range, generator=dice)


def build_adapted(config: TrainConfig, llama: LlamaConfig, machine: Machine) -> Llama:
    """Our model with the same weights, frozen and stored as --base-quant says, and an adapter: as sft.py makes it. Its memory is
    filled tensor by tensor; the model as it was is never there."""
    parallel = Replicated(machine, MachineConfig())
    model = parallel.build(llama, lambda model: attach(model, config.adapter(llama), config.base_quant, machine.dtype))
    parallel.wrap(model, None, clip=0, micro_batch=config.micro_batch, micro_batches=1)
    empty = ((name, torch.empty(shape, device=machine.device)) for name, shape in model.parameter_shapes().items())
    parallel.fill(first_values(((name, first_weights(name, tensor, llama)) for name, tensor in empty), model, config.seed))
    return model


def memory_before(machine: Machine, side: str = "") -> int:
    """Bytes in use before the measurement: what the imports take on a CPU, what is allocated on another device."""
    if side == "transformers":
        from transformers import LlamaForCausalLM  # noqa: F401 - imports are no work of the model's
    devices.reset_peak_memory(machine.device)
    return devices.allocated_memory(machine.device)


def facts(machine: Machine, side: str = "") -> dict:
    """What every result says about where and with what it was measured."""
    versions = [f"{name} {sys.modules[name].__version__}" for name in ("torch", side) if name in sys.modules]
    return {"peak_memory": machine.peak_memory(), "device": machine.describe(), "versions": ", ".join(versions)}


def timed(config: LossConfig, machine: Machine, step) -> tuple[list[float], torch.Tensor]:
    """Seconds of each call of step(), warmup left out; and what the last call returned."""
    seconds = []
    for _ in range(config.warmup + config.steps):
        machine.synchronize()
        start = time.perf_counter()
        result = step()
        machine.synchronize()
        seconds.append(time.perf_counter() - start)
    return seconds[config.warmup :], result


def train_worker(config: TrainConfig, side: str) -> dict:
    """Forward, backward and AdamW step on one batch of random tokens, in the precision that pretrain.py uses."""
    machine, llama = config.machine(), config.llama()
    before = memory_before(machine, side)
    with machine.explain_out_of_memory("lower --micro-batch or --seq-len, or add --checkpointing"):
        model = build_adapted(config, llama, machine) if side == "lora" else build(llama, side, machine, torch.float32)
        model.train()
        if side != "transformers":
            model.checkpointing = config.checkpointing
            model.group_size = check_groups(llama, config.length(llama)) if config.s2_attn else 0
        elif config.checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        if config.compile:
            model.compile()
        adamw = HostAdamW if config.offload_optimizer else torch.optim.AdamW
        learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = adamw(learning, lr=1e-4, fused=devices.supports(machine.device.type, "fused_adamw"))
        shape = (config.micro_batch, config.length(llama))
        tokens = torch.randint(0, llama.vocab_size, shape, generator=torch.Generator().manual_seed(config.seed))
        tokens = tokens.to(machine.device)  # [B, T]
        targets = F.pad(tokens[:, 1:], (0, 1), value=IGNORE)  # transformers shifts its labels so by itself

        def step() -> torch.Tensor:
            with machine.autocast():
                if side == "transformers":
                    loss = model(tokens, labels=tokens, use_cache=False).loss
                else:
                    loss = model(tokens, targets)
            machine.scaler.scale(loss).backward()
            machine.scaler.step(optimizer)
            machine.scaler.update()
            optimizer.zero_grad(set_to_none=True)
            return loss.detach()

        seconds, loss = timed(config, machine, step)
    return {"seconds": seconds, "memory_before": before, "loss": loss.item(), "peak_flops": machine.peak_flops(),
            **facts(machine, side)}  # fmt: skip


def losses() -> dict:
    """name -> loss(hidden [N, D], weight [V, D], targets [N]). torch's own needs a recent torch."""
    found = {
        "ours": linear_cross_entropy,
        "plain": lambda hidden, weight, targets: F.cross_entropy(F.linear(hidden, weight).float(), targets),
    }
    if hasattr(F, "linear_cross_entropy") and hasattr(nn, "LinearCrossEntropyOptions"):
        chunks = nn.LinearCrossEntropyOptions(batch_chunk_size=256, chunking_method=None)
        found |= {"torch": F.linear_cross_entropy,
                  "torch, its options": partial(F.linear_cross_entropy, options=nn.LinearCrossEntropyOptions()),
                  "torch, chunks of 256": partial(F.linear_cross_entropy, options=chunks)}  # fmt: skip
    return found


def loss_worker(config: LossConfig, side: str) -> dict:
    """Forward and backward of the loss alone: from the last hidden states to their gradient and the head's."""
    machine, llama = config.machine(), config.llama()
    N, D, V = config.micro_batch * config.length(llama), llama.hidden_size, llama.vocab_size
    dice = torch.Generator().manual_seed(config.seed)
    hidden = torch.randn(N, D, generator=dice).to(machine.device, machine.dtype).requires_grad_()
    weight = torch.empty(V, D).normal_(std=0.02, generator=dice).to(machine.device).requires_grad_()
    targets = torch.randint(0, V, (N,), generator=dice).to(machine.device)
    before, compute = memory_before(machine), losses()[side]

    def step() -> torch.Tensor:
        hidden.grad = weight.grad = None
        with machine.autocast():
            loss = compute(hidden, weight, targets)
        loss.backward()
        return loss.detach()

    with machine.explain_out_of_memory("lower --micro-batch or --seq-len"):
        seconds, loss = timed(config, machine, step)
    result = {"seconds": seconds, "memory_before": before, "loss": loss.item(), **facts(machine)}
    return {**result, "gradient_norms": [x.grad.float().norm().item() for x in (hidden, weight)]}


class Clock:
    """Notes when each token came, and which: transformers calls put() and end() of its `streamer`."""

    def __init__(self):
        self.times, self.tokens = [], []

    def put(self, tokens: torch.Tensor) -> None:
        self.tokens.append(tokens.flatten().tolist())
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


def decode_worker(config: DecodeConfig, side: str) -> dict:
    """Greedy generation from random prompts, weights in the arithmetic's dtype; nothing stops it early."""
    machine, llama = config.machine(), config.llama()
    before = memory_before(machine, side)
    with machine.explain_out_of_memory("lower --batch-size, --prompt-tokens or --new-tokens"):
        model = build(llama, side, machine, machine.dtype).eval()
        shape = (config.batch_size, config.prompt_tokens)
        prompts = torch.randint(0, llama.vocab_size, shape, generator=torch.Generator().manual_seed(config.seed))
        ids = prompts.to(machine.device)

        def generate(count: int) -> Clock:
            clock = Clock()
            if side == "cria":
                for step in model.generate(prompts.tolist(), count, temperature=0):
                    clock.put(torch.tensor(step))
                return clock
            model.generation_config.eos_token_id = None
            model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=count,
                           pad_token_id=0, streamer=clock)  # fmt: skip
            del clock.times[0], clock.tokens[0]  # the prompt
            return clock

        generate(2)  # the first calls allocate
        start = time.perf_counter()
        clock = generate(config.new_tokens)
    return {"prefill_seconds": clock.times[0] - start, "decode_seconds": clock.times[-1] - clock.times[0],
            "tokens": clock.tokens, "memory_before": before, **facts(machine, side)}  # fmt: skip


# ----------------------------------------------------------------------------------------------------------------------
# The commands


def train(config: TrainConfig) -> dict:
    llama = config.llama()
    adapter, T = config.adapter(llama), config.length(llama)
    runs = take_turns("train", config, [config.side] + [config.against] * bool(config.against))
    with torch.device("meta"):
        whole = Llama(llama)
        ours = Llama(llama)
        if adapter:
            attach(ours, adapter, config.base_quant)
    rows, summary = [], {}
    for side, results in runs.items():
        seconds, loss = middle(results, "seconds"), results[0]["loss"]
        speed = config.micro_batch * T / seconds
        flops = speed * (ours if side == config.side else whole).flops_per_token(T)
        peak = config.peak_tflops * 1e12 if config.peak_tflops else results[0]["peak_flops"]
        mfu = flops / peak if peak else None
        summary[side] = {"seconds": seconds, "tokens_per_s": speed, "mfu": mfu, "loss": loss,
                         "peak_memory": middle(results, "peak_memory")}  # fmt: skip
        rows.append((side, f"{seconds:.3f}", spread(results), f"{speed:,.0f}", f"{flops / 1e12:.3g}",
                     f"{mfu:.1%}" if mfu else "–", *gib(results), f"{loss:.4f}"))  # fmt: skip
    title = (f"{config.model}, {human(whole.num_parameters())} parameters, vocabulary {llama.vocab_size:,} "
             f"{'tied' if llama.tie_word_embeddings else 'untied'}, {config.micro_batch} x {T} tokens, AdamW"
             + ", compiled" * config.compile + ", checkpointing" * config.checkpointing + ", shifted sparse attention" * config.s2_attn
             + ", optimizer on the host" * config.offload_optimizer)  # fmt: skip
    if adapter:
        learning = sum(shape.numel() for shape in ours.trained_shapes().values())
        title += f"\nlora: {adapter.describe(llama, config.base_quant)}; {human(learning)} parameters learn"
    header = ("side", "s/step", "spread", "tokens/s", "TFLOP/s", "MFU", "peak GiB", "GiB before", "loss")
    if config.against:
        compare(runs, summary, {"speed": "seconds"})
        loss, other = (summary[side]["loss"] for side in runs)
        if config.against == "transformers" and abs(loss - other) > 0.01 * abs(other):
            raise RuntimeError(f"the sides do not compute the same: loss {loss:.4f} and {other:.4f}")
    return report(config, title, header, rows, runs, summary)


def loss(config: LossConfig) -> dict:
    llama = config.llama()
    N, ways = config.micro_batch * config.length(llama), list(losses())
    if "torch" not in ways:
        print(f"torch {torch.__version__} has no F.linear_cross_entropy: it is not measured", file=sys.stderr)
    runs = take_turns("loss", config, ways)
    rows, summary = [], {}
    for side, results in runs.items():
        seconds, value, norms = middle(results, "seconds"), results[0]["loss"], results[0]["gradient_norms"]
        memory = median(a - b for a, b in zip(each(results, "peak_memory"), each(results, "memory_before")))
        summary[side] = {"seconds": seconds, "memory": memory, "loss": value, "gradient_norms": norms}
        rows.append((side, f"{seconds:.3f}", spread(results), f"{memory / GIB:.2f}", f"{value:.5f}",
                     *(f"{norm:.5f}" for norm in norms)))  # fmt: skip
    title = f"loss, forward and backward: {N:,} tokens, width {llama.hidden_size}, vocabulary {llama.vocab_size:,}"
    header = ("loss", "s/step", "spread", "GiB above its input", "value", "hidden gradient", "weight gradient")
    return report(config, title, header, rows, runs, summary)


def decode(config: DecodeConfig) -> dict:
    llama = config.llama()
    if config.prompt_tokens + config.new_tokens > llama.context_length:
        raise UserError(f"--prompt-tokens {config.prompt_tokens} and --new-tokens {config.new_tokens} are more than "
                        f"the {llama.context_length} tokens that {config.model} reads")
    if config.new_tokens < 2:
        raise UserError(f"--new-tokens {config.new_tokens}: at least 2 are needed; the first belongs to the prompt")
    runs = take_turns("decode", config, ["cria"] + [config.against] * bool(config.against))
    rows, summary = [], {}
    for side, results in runs.items():
        read = config.batch_size * config.prompt_tokens / middle(results, "prefill_seconds")
        write = config.batch_size * (config.new_tokens - 1) / middle(results, "decode_seconds")
        same = sum(a == b for a, b in zip(results[0]["tokens"], runs["cria"][0]["tokens"]))
        summary[side] = {"prefill_tokens_per_s": read, "decode_tokens_per_s": write, "same_tokens": same,
                         "peak_memory": middle(results, "peak_memory")}  # fmt: skip
        rows.append((side, f"{read:,.0f}", spread(results, "prefill_seconds"), f"{write:,.1f}",
                     spread(results, "decode_seconds"), *gib(results), f"{same} of {config.new_tokens}"))  # fmt: skip
    title = (f"{config.model}, vocabulary {llama.vocab_size:,}, {config.batch_size} x {config.prompt_tokens} prompt "
             f"tokens, {config.new_tokens} new tokens, greedy")
    header = ("side", "prefill tokens/s", "spread", "decode tokens/s", "spread", "peak GiB", "GiB before", "same steps")
    if config.against:
        compare(runs, summary, {"prefill": "prefill_seconds", "decode": "decode_seconds"})
    return report(config, title, header, rows, runs, summary)


# ----------------------------------------------------------------------------------------------------------------------
# The command line


COMMANDS = {
    "train": (train, TrainConfig, "training steps: tokens/s, MFU, peak memory; --against transformers or full", train_worker),
    "loss": (loss, LossConfig, "the loss alone: ours, torch's fused one, the plain one", loss_worker),
    "decode": (decode, DecodeConfig, "generation: reading and writing speed; --against transformers", decode_worker),
    "data": (data, DataConfig, "text to token files: MB/s by number of workers", data_worker),
    "faults": (faults, FaultsConfig, "kill a training run again and again: does it end as if nothing had happened?", None),
    "plan": (plan, PlanConfig, "what a training needs in memory on each device, and how long it takes", None),
    "smoke": (smoke, SmokeConfig, "a minute's self-test of a device: what computes the right numbers", None),
    "convert": (convert, ConvertConfig, "memory and time of format conversions on a random checkpoint of a real size", None),
}


def worker(order: str) -> None:
    """The other end of run_worker: one JSON line on stdout."""
    order = json.loads(order)
    _, config_class, _, work = COMMANDS[order["command"]]
    values = {key: tuple(v) if isinstance(v, list) else v for key, v in order["config"].items()}
    print(json.dumps(work(config_class(**values), order["side"])))


if __name__ == "__main__":
    if sys.argv[1:2] == ["worker"]:  # one measurement, started by run_worker; not for people
        command_line(lambda _: worker(sys.argv[2]), Config, [])
    else:
        command_line(None, None, description=__doc__, commands={name: entry[:3] for name, entry in COMMANDS.items()})
