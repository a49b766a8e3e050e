"""The memory planner: which way to share the work fits these devices, and with what micro-batch.

    python bench.py plan --model llama3-8b --gpus 8 --gpu-memory 80 --gpu a100
    python bench.py plan --model llama3-8b --gpus 8 --gpu-memory 24 --deepspeed 3 --offload --host-memory 256
    python bench.py plan --model llama2-7b --gpu-memory 12 --seq-len 512 --lora-rank 64 --base-quant nf4-double    # QLoRA

Prints what a step holds on each device under every strategy (bench_memory.py and bench_activations.py have the formulas,
docs/scale.md explains the columns), the strategy to take with its command, the time for --tokens, and the disk that
checkpoints need. Nothing is run.
"""

from __future__ import annotations

from settings import UserError, flag, too_small

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path

from adapters import AdapterFlags
from bench_memory import DDP, GIB, OFFLOAD, OVERHEAD, STRATEGIES, ZERO1, ZERO2, Counts, Parts, Step, Strategy, count
from checkpoint import resolve_model_dir
from config import PRESETS, LlamaConfig
from devices import PEAK_TFLOPS
from progress import human
from tables import markdown_table, print_table

ENOUGH_TOKENS = 4096  # a GPU waits for its own kernels with much smaller micro-batches
TOKENS_PER_STEP = 2**19  # of the batch that is proposed
ROWS_PER_STEP = 16  # the same for an adapter: sft.py's own default, and QLoRA's


@dataclass(frozen=True, kw_only=True)
class PlanConfig(AdapterFlags):
    model: str = flag("92m", f"architecture: {', '.join(PRESETS)}, a config.json, or a model directory")
    vocab_size: int | None = flag(None, "default: the model's own")
    tied: bool | None = flag(None, "one matrix for embedding and output head; default: as the model has it")
    gpus: int = flag(1, "devices of the whole job")
    per_machine: int = flag(8, "devices of one machine")
    gpu_memory: float = flag(help="GiB of one device: the total that nvidia-smi or npu-smi shows")
    reserve: float = flag(0.05, "part of it to leave free, because allocators waste some")
    host_memory: float | None = flag(None, "GiB of one machine, for --offload; default: not checked")
    device: str = flag("cuda", "whose kernels to count", choices=tuple(OVERHEAD))
    dtype: str = flag("bf16", "arithmetic of the matrix products", choices=("bf16", "fp16", "fp32"))
    seq_len: int | None = flag(None, "tokens per sequence; default: all that the model reads")
    micro_batch: int | None = flag(None, "sequences that one device holds at a time; default: as many as fit")
    batch_size: int | None = flag(None, "sequences per optimizer step, over all devices; default: half a million tokens, adapters: 16")
    checkpointing: bool | None = flag(None, "recompute activations in backward; default: show both")
    train: str = flag("all", "what learns: all, or the embedding and the head alone", choices=("all", "embeddings"))
    fsdp: bool = flag(False, "show this strategy (default: all)")
    deepspeed: str | None = flag(None, "show this stage of DeepSpeed ZeRO", choices=("1", "2", "3"))
    offload: bool = flag(False, "show ZeRO-3 with weights and optimizer in the host's memory")
    offload_optimizer: bool = flag(False, "AdamW's two numbers per trained parameter in the host's memory")
    tokens: float = flag(10e9, "tokens to train on, for the time")
    gpu: str | None = flag(None, "the device, for the time", choices=tuple(PEAK_TFLOPS))
    peak_tflops: float | None = flag(None, "its data-sheet peak in --dtype, where --gpu does not know it")
    mfu: float = flag(0.4, "part of that peak which the model's own arithmetic reaches without checkpointing")
    markdown: bool = flag(False, "print the table as Markdown")

    def problems(self) -> list[str]:
        found = too_small(self, "gpu_memory", "host_memory", "tokens", "peak_tflops", "mfu")
        found += too_small(self, "vocab_size", "gpus", "per_machine", "seq_len", "micro_batch", "batch_size", least=1)
        if not 0 <= self.reserve < 1:
            found.append(f"--reserve must be at least 0 and below 1, not {self.reserve}")
        if self.mfu > 1:
            found.append(f"--mfu must be at most 1, not {self.mfu}")
        if self.offload and self.deepspeed in ("1", "2"):
            found.append(f"--offload is planned for --deepspeed 3, not {self.deepspeed}")
        if self.offload and self.base_quant != "none":
            found.append(f"--offload is planned for ZeRO-3, which cannot share out the packed weights of --base-quant {self.base_quant}")
        if self.offload_optimizer and (self.fsdp or self.deepspeed or self.offload):
            found.append("--offload-optimizer is for one device and for DDP; with DeepSpeed there is --offload")
        if self.lora_rank is not None and self.train != "all":
            found.append("--lora-rank goes beside --train-also, not --train")
        found += self.adapter_problems()
        if self.model not in PRESETS and not Path(self.model).exists():
            found.append(f"--model {self.model} is neither a preset ({', '.join(PRESETS)}) nor a file or directory")
        if found:
            return found
        if self.gpus > self.per_machine and self.gpus % self.per_machine:
            found.append(f"--gpus {self.gpus} do not fill machines of --per-machine {self.per_machine}")
        if self.batch_size and self.batch_size % self.gpus:
            found.append(f"--batch-size {self.batch_size} cannot be shared equally by --gpus {self.gpus}")
        elif self.batch_size and self.micro_batch and self.micro_batch * self.gpus > self.batch_size:
            found.append(f"--micro-batch {self.micro_batch} on --gpus {self.gpus} is more than --batch-size {self.batch_size}")
        return found

    def llama(self) -> LlamaConfig:
        """The architecture, with the vocabulary and tying that were asked for."""
        path = Path(self.model)
        config = PRESETS.get(self.model) or LlamaConfig.from_json(resolve_model_dir(path) if path.is_dir() else path)
        changes = {"vocab_size": self.vocab_size, "tie_word_embeddings": self.tied}
        return dataclasses.replace(config, **{key: value for key, value in changes.items() if value is not None})

    def length(self, llama: LlamaConfig) -> int:
        """T, the tokens per sequence."""
        if self.seq_len and self.seq_len > llama.context_length:
            raise UserError(f"--seq-len {self.seq_len} is longer than the {llama.context_length} tokens that {self.model} reads")
        return self.seq_len or llama.context_length

    def strategies(self) -> tuple[Strategy, ...]:
        """Those that were asked for; else all that make sense on so many devices."""
        if self.offload_optimizer:
            return (DDP,)
        wanted = {"--fsdp" if self.fsdp else None, OFFLOAD.flags if self.offload else f"--deepspeed {self.deepspeed}"}
        asked = tuple(strategy for strategy in STRATEGIES if strategy.flags in wanted)
        sensible = STRATEGIES if self.gpus > 1 else (DDP, OFFLOAD)
        packable = (DDP, ZERO1, ZERO2) if self.base_quant != "none" else STRATEGIES
        return asked or tuple(strategy for strategy in sensible if strategy in packable)


def plan(config: PlanConfig) -> dict:
    """Print the table and the advice. Returns both: "rows", and "recommended", which is None where nothing fits."""
    llama = config.llama()
    T = config.length(llama)
    adapter = config.adapter(llama)
    counts = count(llama, T, config.train, adapter, config.base_quant)
    modes = (False, True) if config.checkpointing is None else (config.checkpointing,)
    rows = [plan_row(config, counts, T, strategy, checkpointing) for strategy in config.strategies() for checkpointing in modes]
    learning = f", of which {human(counts.trained)} are trained" * (counts.trained < counts.all and adapter is None)
    if adapter:
        print(f"{adapter.describe(llama, config.base_quant)}; {human(counts.trained)} parameters learn")
    print(f"{config.model}: {human(counts.all)} parameters{learning}, sequences of {T:,} tokens, {config.dtype}, {config.gpus} x "
          f"{config.gpu_memory:g} GiB ({config.device}), of which {config.reserve:.0%} stay free. GiB per device:\n")  # fmt: skip
    print_rows(rows, config.markdown)
    best = recommend([row for row in rows if row["fits"]], T)
    if best:
        best |= {"command": command(config, best, T), "seconds": seconds(config, counts, best)}
        total = best["parts"].total / GIB
        print(f"\nrecommended: {_title(best)}, {total:.1f} of {config.gpu_memory:g} GiB per device\n    {best['command']}")
        print(_time_line(config, counts, best))
    else:
        less = ("--offload-optimizer" if adapter and not config.offload_optimizer else "a lower --lora-rank" if adapter else
                "--lora-rank with --base-quant or --deepspeed 3 --offload (with enough --host-memory)")  # fmt: skip
        print(f"\nnothing fits; {_title(min(rows, key=lambda row: row['parts'].total))} comes closest. More --gpus, a shorter --seq-len, a "
              f"smaller --micro-batch, --checkpointing or {less} take less")  # fmt: skip
    saved, digits = (counts.trained, 2) if adapter else (counts.all, 1)  # beside an adapter no base
    print(f"disk: {(4 * saved + 8 * counts.trained) / GIB:.{digits}f} GiB per checkpoint (fp32 weights and two moments); "
          f"final weights {4 * saved / GIB:.{digits}f} GiB, with --save-dtype bf16 {2 * saved / GIB:.{digits}f}")  # fmt: skip
    return {"parameters": counts.all, "rows": rows, "recommended": best}


def plan_row(config: PlanConfig, counts: Counts, T: int, strategy: Strategy, checkpointing: bool) -> dict:
    """One line of the table, with the micro-batch that was asked for, or the largest that fits, or 1."""
    N, usable = config.gpus, config.gpu_memory * (1 - config.reserve) * GIB
    accumulates = None in (config.batch_size, config.micro_batch) or config.micro_batch * N < config.batch_size

    def step(micro_batch: int) -> Step:
        return Step(counts=counts, strategy=strategy, devices=N, tokens=micro_batch * T, checkpointing=checkpointing,
                    e=4 if config.dtype == "fp32" else 2, accumulates=accumulates, kind=config.device,
                    offload_optimizer=config.offload_optimizer)  # fmt: skip

    host = step(1).states()[2] * min(N, config.per_machine)

    def fits(micro_batch: int) -> bool:
        return step(micro_batch).peak()[1].total <= usable and (config.host_memory is None or host <= config.host_memory * GIB)

    largest = largest_that(fits, config.batch_size // N if config.batch_size else 2**20)
    micro_batch = config.micro_batch or max(1, largest)
    moment, parts = step(micro_batch).peak()
    return {"name": "one device" if strategy is DDP and N == 1 else strategy.name, "strategy": strategy, "micro_batch": micro_batch,
            "checkpointing": checkpointing, "moment": moment, "parts": parts, "host": host, "fits": fits(micro_batch),
            "largest": largest}  # fmt: skip


def largest_that(fits, limit: int) -> int:
    """The largest number up to `limit` for which fits(number) holds; 0 if not even 1. What fits must fit when it is smaller."""
    low, high = 0, 1  # low fits, or is 0
    while high <= limit and fits(high):
        low, high = high, 2 * high
    high = min(high, limit + 1)  # does not fit, or is not allowed
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def print_rows(rows: list[dict], markdown: bool) -> None:
    """The table, in GiB; "host" is what one machine's own memory must hold."""
    parts = [field.name for field in dataclasses.fields(Parts)]
    digits = 1 if max(row["parts"].total for row in rows) > 10 * GIB else 2
    header = ("strategy", "checkpointing", "micro-batch", *parts, "total", "highest at", "fits", "largest micro-batch", "host")
    cells = [(row["name"], "yes" if row["checkpointing"] else "no", row["micro_batch"],
              *(f"{size / GIB:.{digits}f}" for size in (*dataclasses.astuple(row["parts"]), row["parts"].total)), row["moment"],
              "yes" if row["fits"] else "no", row["largest"] or "–", f"{row['host'] / GIB:.0f}" if row["host"] else "–")
             for row in rows]  # fmt: skip
    right = (*range(2, 11), 13, 14)
    if markdown:
        print("\n".join(markdown_table(header, cells, right)))
    else:
        print_table(header, cells, right)


# ----------------------------------------------------------------------------------------------------------------------
# Advice


def recommend(rows: list[dict], T: int) -> dict | None:
    """The simplest of what fits, without checkpointing rather than with, among those with enough tokens in a micro-batch; if none
    has, that with the most."""
    rows = sorted(rows, key=lambda row: (STRATEGIES.index(row["strategy"]), row["checkpointing"]))
    enough = [row for row in rows if row["micro_batch"] * T >= ENOUGH_TOKENS]
    return enough[0] if enough else max(rows, key=lambda row: row["micro_batch"], default=None)


def command(config: PlanConfig, row: dict, T: int) -> str:
    """What to type. Several machines: on each, with the first one's name for HOST."""
    machines, local = max(1, config.gpus // config.per_machine), min(config.gpus, config.per_machine)
    at_once = config.gpus * row["micro_batch"]
    rows = ROWS_PER_STEP if config.lora_rank else TOKENS_PER_STEP / T
    batch = config.batch_size or at_once * math.ceil(rows / at_once)
    several = f"--nnodes={machines} --rdzv-backend=c10d --rdzv-endpoint=HOST:29400" if machines > 1 else ""
    continued, frozen = Path(config.model).is_dir(), config.train != "all" or config.lora_rank is not None
    model = f"--init-from {config.model}" if continued else f"--init-from path/to/{config.model}" if frozen else f"--model {config.model}"
    words = ["python" if config.gpus == 1 else f"torchrun {several} --nproc_per_node={local}",
             "sft.py" if config.lora_rank else "pretrain.py", model, adapter_words(config),
             f"--train {config.train}" * (config.train != "all"), f"--seq-len {T}",
             row["strategy"].flags, "--checkpointing" * row["checkpointing"], "--offload-optimizer" * config.offload_optimizer,
             f"--micro-batch {row['micro_batch']} --batch-size {batch}", f"--device {config.device}" * (config.device != "cuda"),
             f"--dtype {config.dtype}" * (config.dtype != "bf16")]  # fmt: skip
    return " ".join(" ".join(words).split())


def adapter_words(config: PlanConfig) -> str:
    """The flags about adapters that were given."""
    words = []
    for field in dataclasses.fields(AdapterFlags):
        value, name = getattr(config, field.name), f"--{field.name.replace('_', '-')}"
        if value != field.default:
            words += [name] if value is True else [name, *map(str, value if isinstance(value, tuple) else (value,))]
    return " ".join(words)


def seconds(config: PlanConfig, counts: Counts, row: dict) -> float | None:
    """For --tokens at --mfu of the peak; checkpointing computes the forward pass once more."""
    peak = config.peak_tflops or (PEAK_TFLOPS.get(config.gpu) if config.dtype != "fp32" else None)
    if peak is None:
        return None
    flops = counts.flops_per_token + counts.forward_flops * row["checkpointing"]
    return config.tokens * flops / (config.gpus * peak * 1e12 * config.mfu)


def _title(row: dict) -> str:
    return row["name"] + " with checkpointing" * row["checkpointing"]


def _time_line(config: PlanConfig, counts: Counts, row: dict) -> str:
    if row["seconds"] is None:
        return "time: say which --gpu this is, or its --peak-tflops"
    hours = row["seconds"] / 3600
    shown = f"{hours / 24:,.1f} days" if hours > 48 else f"{hours:,.1f} hours"
    slower = "; offloading is slower than that: measure it" if row["strategy"] is OFFLOAD else ""
    recomputed = f", {counts.forward_flops / counts.flops_per_token:.0%} for checkpointing on top" * row["checkpointing"]
    return f"time: {shown} for {human(config.tokens)} tokens at {config.mfu:.0%} of the peak{recomputed}{slower}"
