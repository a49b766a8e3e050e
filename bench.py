"""Measure speed and memory, side by side and in interleaved repeats, because machines are noisy.

    python bench.py train  --model 92m --against transformers --markdown    # training steps: tokens/s, MFU, peak memory
    python bench.py loss   --model 92m                                      # our loss, torch's fused one, the plain one
    python bench.py decode --model 92m --against transformers               # reading a prompt, writing an answer
    python bench.py data   --tokenizer out/tokenizer --input big.txt --sides sentencepiece 1 2 1+clean 2+clean

Every measurement is a process of its own, so that neither memory nor caches carry over, and the sides take turns:
A B A B … A slow minute of the machine then hits both. What is printed is the median over repeats, the spread between
them, and the ratio of the sides, taken pair by pair. Both sides get the same weights and tokens, and their losses are
compared: a benchmark of two different computations would say nothing.
"""

from __future__ import annotations

from settings import UserError, command_line, config_to_dict, flag

import contextlib
import dataclasses
import importlib.util
import json
import multiprocessing
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
import zlib
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from checkpoint import resolve_model_dir
from files import write_json
from model import IGNORE, PRESETS, Llama, LlamaConfig, linear_cross_entropy
from progress import human
from runtime import Machine
from tables import markdown_table, print_table

GIB = 2**30
DATA_SIDE = re.compile(r"(?P<bare>sentencepiece)(\*(?P<processes>[1-9]\d*))?|(?P<workers>[1-9]\d*)(\+(?P<extra>clean|minhash))?")
DATA_RUN = """
import json, sys, time
from pathlib import Path
import data_process
order = json.loads(sys.argv[1])
order |= {"corpus": tuple(order["corpus"]), "without": tuple(order.get("without", ())), "tokenizer": Path(order["tokenizer"]),
          "out": Path(order["out"])}
config, start = data_process.PretrainConfig(**order), time.perf_counter()
data_process.prepare(config)
print(time.perf_counter() - start)
"""
MAY_BE_ZERO = ("seed", "warmup", "peak_tflops")


@dataclass(frozen=True, kw_only=True)
class Config:
    """What all commands share."""

    repeats: int = flag(3, "processes per side, taking turns")
    out: Path | None = flag(None, "also write every single measurement to this JSON file")
    markdown: bool = flag(False, "print the table as Markdown")

    def problems(self) -> list[str]:
        numbers = {name: value for name, value in vars(self).items() if type(value) in (int, float)}
        found = [f"--{name.replace('_', '-')} must be at least {least}, not {value}" for name, value in numbers.items()
                 if value < (least := int(name not in MAY_BE_ZERO))]  # fmt: skip
        if self.out and self.out.exists():
            found.append(f"--out {self.out} exists already; choose another file")
        return found


@dataclass(frozen=True, kw_only=True)
class ModelConfig(Config):
    """What the commands that run a model share."""

    model: str = flag("92m", f"architecture: {', '.join(PRESETS)}, a config.json, or a model directory's")
    vocab_size: int | None = flag(None, "default: the model's own")
    tied: bool | None = flag(None, "one matrix for embedding and output head; default: as the model has it")
    device: str = flag("auto", "where to compute", choices=("auto", "cpu", "cuda", "mps"))
    dtype: str = flag("auto", "arithmetic of the matrix products", choices=("auto", "bf16", "fp16", "fp32"))
    seed: int = flag(1234, "decides the random tokens")

    def problems(self) -> list[str]:
        found = super().problems()
        if self.model not in PRESETS and not Path(self.model).exists():
            found.append(f"--model {self.model} is neither a preset ({', '.join(PRESETS)}) nor a file or directory")
        against = getattr(self, "against", None)
        if against and importlib.util.find_spec(against) is None:
            found.append(f"--against {against} needs that package: pip install {against}")
        return found

    def llama(self) -> LlamaConfig:
        """The architecture, with the vocabulary and tying that were asked for."""
        path = Path(self.model)
        config = PRESETS.get(self.model) or LlamaConfig.from_json(resolve_model_dir(path) if path.is_dir() else path)
        changes = {"vocab_size": self.vocab_size, "tie_word_embeddings": self.tied}
        return dataclasses.replace(config, **{key: value for key, value in changes.items() if value is not None})


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
class TrainConfig(LossConfig):
    against: str | None = flag(None, "put another library's model beside ours", choices=("transformers",))
    compile: bool = flag(False, "torch.compile both models")
    checkpointing: bool = flag(False, "recompute activations in backward")
    peak_tflops: float | None = flag(None, "the device's data-sheet peak, for MFU, where it is not in our table")


@dataclass(frozen=True, kw_only=True)
class DecodeConfig(ModelConfig):
    batch_size: int = flag(1, "prompts at a time")
    prompt_tokens: int = flag(64, "tokens of each prompt")
    new_tokens: int = flag(128, "tokens to write after it")
    against: str | None = flag(None, "put another library's generate() beside ours", choices=("transformers",))


@dataclass(frozen=True, kw_only=True)
class DataConfig(Config):
    tokenizer: Path = flag(help="directory with tokenizer.model or tokenizer.json, or such a file")
    input: tuple[str, ...] = flag(help='text files, one document per line; .jsonl: {"text": "…"} per line')
    sides: tuple[str, ...] = flag(("sentencepiece", "1", "1+clean"), "what to compare: `2`, the whole of data_process.py pretrain "
                                  "with 2 workers (a small input is encoded by fewer); `2+clean`, with cleaning and exact "
                                  "deduplication; `2+minhash`, with near deduplication too; `sentencepiece`, a bare loop over "
                                  "the texts in memory, `sentencepiece*2` in two processes")  # fmt: skip

    def problems(self) -> list[str]:
        found = super().problems() + [f"--input {path} is no file" for path in self.input if not Path(path).is_file()]
        return found + [f"--sides {side}: sentencepiece[*N] or N[+clean|+minhash] is needed" for side in self.sides
                        if not DATA_SIDE.fullmatch(side)]  # fmt: skip


# ----------------------------------------------------------------------------------------------------------------------
# Workers: what runs in a process of its own. Each takes (config, side) and returns numbers.


def build(llama: LlamaConfig, side: str, machine: Machine, dtype: torch.dtype) -> nn.Module:
    """Our model or transformers', with the same random weights: each matrix is seeded by its name, which both share."""
    torch.set_default_dtype(dtype)
    with machine.device:
        if side == "cria":
            model = Llama(llama)
        else:
            from transformers import LlamaConfig as TheirConfig
            from transformers import LlamaForCausalLM

            theirs = {k: v for k, v in llama.to_dict().items() if k not in ("architectures", "model_type")}
            model = LlamaForCausalLM(TheirConfig(**theirs, attn_implementation="sdpa"))
    torch.set_default_dtype(torch.float32)
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            dice = torch.Generator(machine.device).manual_seed(zlib.crc32(name.encode()))
            nn.init.normal_(parameter, std=llama.initializer_range, generator=dice)
    return model


def memory_before(machine: Machine, side: str = "") -> int:
    """Bytes in use before the measurement: what the imports take on a CPU, what is allocated on a GPU."""
    if side == "transformers":
        from transformers import LlamaForCausalLM  # noqa: F401 - imports are no work of the model's
    if machine.device.type != "cuda":
        return machine.peak_memory()
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


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
    machine, llama = Machine(config), config.llama()
    before = memory_before(machine, side)
    with machine.explain_out_of_memory("lower --micro-batch or --seq-len, or add --checkpointing"):
        model = build(llama, side, machine, torch.float32).train()
        if config.checkpointing and side == "cria":
            model.checkpointing = True
        elif config.checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        if config.compile:
            model.compile()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=machine.device.type in ("cpu", "cuda"))
        shape = (config.micro_batch, config.length(llama))
        tokens = torch.randint(0, llama.vocab_size, shape, generator=torch.Generator().manual_seed(config.seed))
        tokens = tokens.to(machine.device)  # [B, T]
        targets = F.pad(tokens[:, 1:], (0, 1), value=IGNORE)  # transformers shifts its labels so by itself

        def step() -> torch.Tensor:
            with machine.autocast():
                if side == "cria":
                    loss = model(tokens, targets)
                else:
                    loss = model(tokens, labels=tokens, use_cache=False).loss
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
    machine, llama = Machine(config), config.llama()
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
    machine, llama = Machine(config), config.llama()
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


def data_worker(config: DataConfig, side: str) -> dict:
    """The whole of `data_process.py pretrain` (reading, encoding, writing, checksums), or the bare loop that it is measured by."""
    side = DATA_SIDE.fullmatch(side)
    if side["bare"]:
        return bare_worker(config, int(side["processes"] or 1))
    corpora = [f"{'jsonl' if Path(path).suffix == '.jsonl' else 'lines'}={path}" for path in config.input]
    steps = {None: {"dedup": "none", "without": ["all"]}, "clean": {"dedup": "exact"}, "minhash": {"dedup": "minhash"}}
    with tempfile.TemporaryDirectory() as folder:
        order = {"corpus": corpora, "tokenizer": str(config.tokenizer), "out": f"{folder}/data", "workers": int(side["workers"]),
                 "val_fraction": 0.0, **steps[side["extra"]]}  # fmt: skip
        # In a process that holds no torch, because its workers would import it too.
        here = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parent)}
        done = subprocess.run([sys.executable, "-c", DATA_RUN, json.dumps(order)], env=here, capture_output=True, encoding="utf-8",
                              errors="replace")  # fmt: skip
        if done.returncode:
            raise UserError(done.stderr.strip().rpartition("\n")[2].removeprefix("settings.UserError: "))
        report = json.loads(Path(folder, "data", "report.json").read_text(encoding="utf-8"))
    size = sum(source["input_bytes"] for source in report["sources"])
    return {"seconds": float(done.stdout.splitlines()[-1]), "bytes": size, "tokens": report["splits"]["train"]["tokens"],
            "device": "", "versions": ""}  # fmt: skip


def bare_worker(config: DataConfig, processes: int) -> dict:
    """sentencepiece's own encode() over the same texts, which are in memory before the clock starts."""
    texts = []
    for path in config.input:
        with open(path, encoding="utf-8") as file:
            texts += [json.loads(line)["text"] if path.endswith(".jsonl") else line.strip() for line in file if not line.isspace()]
    model = next(Path(config.tokenizer).glob("*.model"), None) if Path(config.tokenizer).is_dir() else Path(config.tokenizer)
    if model is None:
        raise UserError(f"{config.tokenizer} holds no sentencepiece model to compare with")
    share = len(texts) // processes + 1
    parts = [texts[at * share : (at + 1) * share] for at in range(processes)]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, mp_context=context, initializer=_bare_start, initargs=(str(model),)) as pool:
        list(pool.map(_bare_loop, [["begin"]] * processes))
        start = time.perf_counter()
        tokens = sum(pool.map(_bare_loop, parts))
        seconds = time.perf_counter() - start
    return {"seconds": seconds, "bytes": sum(os.path.getsize(path) for path in config.input), "tokens": tokens,
            "device": "", "versions": ""}  # fmt: skip


def _bare_start(model: str) -> None:
    global _processor
    import sentencepiece

    _processor = sentencepiece.SentencePieceProcessor(model_file=model)


def _bare_loop(texts: list[str]) -> int:
    return sum(len(_processor.encode(text)) for text in texts)


# ----------------------------------------------------------------------------------------------------------------------
# Taking turns


def run_worker(command: str, config: Config, side: str) -> dict:
    """One measurement in a process of its own. A user's mistake there is one here; a bug there keeps its traceback."""
    order = json.dumps({"command": command, "side": side, "config": config_to_dict(config)})
    done = subprocess.run([sys.executable, str(Path(__file__).resolve()), "worker", order], capture_output=True,
                          encoding="utf-8", errors="replace")  # fmt: skip
    if done.returncode == 0:
        return json.loads(done.stdout.splitlines()[-1])
    if done.returncode == 2 and "error: " in done.stderr:
        raise UserError(done.stderr.rpartition("error: ")[2].strip())
    if done.returncode == -9 or "can't allocate memory" in done.stderr:
        raise UserError(f"there is too little memory for {side} (status {done.returncode}); measure something smaller")
    raise RuntimeError(f"the process of {side} ended with status {done.returncode}:\n{done.stderr}")


def worker(order: str) -> None:
    """The other end of run_worker: one JSON line on stdout."""
    order = json.loads(order)
    _, config_class, _, work = COMMANDS[order["command"]]
    values = {key: tuple(v) if isinstance(v, list) else v for key, v in order["config"].items()}
    print(json.dumps(work(config_class(**values), order["side"])))


def take_turns(command: str, config: Config, sides: list[str]) -> dict[str, list[dict]]:
    """side -> its results, one per repeat; A B A B …"""
    runs = {side: [] for side in sides}
    with tqdm(total=config.repeats * len(sides), unit="run", disable=None) as bar:
        for _ in range(config.repeats):
            for side in sides:
                bar.set_description(side)
                runs[side].append(run_worker(command, config, side))
                bar.update()
    return runs


def each(runs: list[dict], key: str) -> list[float]:
    """One number per repeat; of a list of steps, the median."""
    return [median(run[key]) if isinstance(run[key], list) else run[key] for run in runs]


def middle(runs: list[dict], key: str) -> float:
    return median(each(runs, key))


def spread(runs: list[dict], key: str = "seconds") -> str:
    """(slowest - fastest repeat) / median."""
    values = each(runs, key)
    return f"{(max(values) - min(values)) / median(values):.0%}"


# ----------------------------------------------------------------------------------------------------------------------
# The commands


def train(config: TrainConfig) -> dict:
    llama = config.llama()
    T = config.length(llama)
    runs = take_turns("train", config, ["cria"] + [config.against] * bool(config.against))
    with torch.device("meta"):
        model = Llama(llama)
    rows, summary = [], {}
    for side, results in runs.items():
        seconds, loss = middle(results, "seconds"), results[0]["loss"]
        speed = config.micro_batch * T / seconds
        flops = speed * model.flops_per_token(T)
        peak = config.peak_tflops * 1e12 if config.peak_tflops else results[0]["peak_flops"]
        mfu = flops / peak if peak else None
        summary[side] = {"seconds": seconds, "tokens_per_s": speed, "mfu": mfu, "loss": loss,
                         "peak_memory": middle(results, "peak_memory")}  # fmt: skip
        rows.append((side, f"{seconds:.3f}", spread(results), f"{speed:,.0f}", f"{flops / 1e12:.3g}",
                     f"{mfu:.1%}" if mfu else "–", *gib(results), f"{loss:.4f}"))  # fmt: skip
    title = (f"{config.model}, {human(model.num_parameters())} parameters, vocabulary {llama.vocab_size:,} "
             f"{'tied' if llama.tie_word_embeddings else 'untied'}, {config.micro_batch} x {T} tokens, AdamW"
             + ", compiled" * config.compile + ", checkpointing" * config.checkpointing)  # fmt: skip
    header = ("side", "s/step", "spread", "tokens/s", "TFLOP/s", "MFU", "peak GiB", "GiB before", "loss")
    if config.against:
        compare(runs, summary, {"speed": "seconds"})
        ours, theirs = (summary[side]["loss"] for side in runs)
        if abs(ours - theirs) > 0.01 * abs(theirs):
            raise RuntimeError(f"the sides do not compute the same: loss {ours:.4f} and {theirs:.4f}")
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


def data(config: DataConfig) -> dict:
    runs = take_turns("data", config, list(config.sides))
    rows, summary = [], {}
    for side, results in runs.items():
        seconds = middle(results, "seconds")
        megabytes, tokens = results[0]["bytes"] / 1e6, results[0]["tokens"]
        summary[side] = {"mb_per_s": megabytes / seconds, "tokens_per_s": tokens / seconds, "tokens": tokens}
        rows.append((side, f"{seconds:.2f}", spread(results), f"{megabytes / seconds:.2f}", human(tokens / seconds)))
    title = f"{megabytes:,.1f} MB of text to {tokens:,} tokens, tokenizer {config.tokenizer}"
    header = ("side", "seconds", "spread", "MB/s", "tokens/s")
    first = config.sides[0]
    for number, (side, results) in enumerate(runs.items()):
        summary[side]["relative"] = median(a / b for a, b in zip(each(runs[first], "seconds"), each(results, "seconds")))
        rows[number] = (*rows[number], f"{summary[side]['relative']:.2f}")
    header = (*header, f"speed / {first}, pair by pair")
    return report(config, title, header, rows, runs, summary)


# ----------------------------------------------------------------------------------------------------------------------
# What people read


def gib(results: list[dict]) -> tuple[str, str]:
    return tuple(f"{middle(results, key) / GIB:.2f}" for key in ("peak_memory", "memory_before"))


def compare(runs: dict, summary: dict, keys: dict[str, str]) -> None:
    """Add to the summary how many times as fast ours is and what share of the other's peak memory it takes:
    (median, least, most) of the pairs."""
    ours, theirs = runs.values()
    pairs = {name: (theirs, ours, key) for name, key in keys.items()} | {"peak memory": (ours, theirs, "peak_memory")}
    summary["ratio"] = {}
    for name, (upper, lower, key) in pairs.items():
        ratios = [a / b for a, b in zip(each(upper, key), each(lower, key))]
        summary["ratio"][name] = (median(ratios), min(ratios), max(ratios))


def report(config: Config, title: str, header: tuple, rows: list[tuple], runs: dict, summary: dict) -> dict:
    """Print the table, the ratios and the machine; write all numbers to --out. Returns the summary."""
    last = [results[-1] for results in runs.values()]
    parts = (last[0]["device"], cpu(), last[-1]["versions"], f"Python {platform.python_version()}, {platform.system()}")
    foot = [f"Median of {config.repeats} processes per row, taking turns. {', '.join(filter(None, parts))}."]
    if "ratio" in summary:
        ratios = [f"{name} {m:.2f} ({least:.2f} to {most:.2f})" for name, (m, least, most) in summary["ratio"].items()]
        foot.insert(0, f"{' : '.join(runs)} = {', '.join(ratios)}")
    numbers = range(1, len(header))
    if config.markdown:
        print(title, "", *markdown_table(header, rows, numbers), "", "\n\n".join(foot), sep="\n")
    else:
        print(title)
        print_table(header, rows, numbers)
        print("\n".join(foot))
    if config.out:
        config.out.parent.mkdir(parents=True, exist_ok=True)
        content = {"title": title, "notes": foot, "settings": config_to_dict(config), "summary": summary, "runs": runs}
        write_json(config.out, content)
    return summary


def cpu() -> str:
    """The processor's name, vector units, cores and memory, as far as the system tells."""
    name, memory = platform.processor() or platform.machine(), ""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                name = line.partition(":")[2].strip()
    with contextlib.suppress(OSError, ValueError, AttributeError):
        memory = f", {os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / GIB:.0f} GiB"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{name} ({torch.backends.cpu.get_cpu_capability()}, {cores} cores{memory})"


COMMANDS = {
    "train": (train, TrainConfig, "training steps: tokens/s, MFU, peak memory; --against transformers", train_worker),
    "loss": (loss, LossConfig, "the loss alone: ours, torch's fused one, the plain one", loss_worker),
    "decode": (decode, DecodeConfig, "generation: reading and writing speed; --against transformers", decode_worker),
    "data": (data, DataConfig, "text to token files: MB/s by number of workers", data_worker),
}


if __name__ == "__main__":
    if sys.argv[1:2] == ["worker"]:  # one measurement, started by run_worker; not for people
        command_line(lambda _: worker(sys.argv[2]), Config, [])
    else:
        command_line(None, None, description=__doc__, commands={name: entry[:3] for name, entry in COMMANDS.items()})
