"""Pretraining: learn to predict the next token of plain text, from scratch or from any Llama (`--init-from`).

    in     data/pretrain    token files, with their tokenizer (data_process.py pretrain)
    out    out/pretrain     a Hugging Face model directory, metrics.jsonl, loss.png, samples.txt, step-*/ to resume from

    python pretrain.py --model tiny                                     # one process: CPU, one GPU or Apple's
    torchrun --nproc_per_node=4 pretrain.py --model 218m                # four GPUs, the same batches, DDP
    torchrun --nproc_per_node=8 pretrain.py --init-from path/to/Llama-3-8B --lr 2e-5 --fsdp      # continued, shared out
    python pretrain.py --init-from out/pretrain --rope-scaling yarn --rope-factor 4 --seq-len 2048 --out out/long
    python pretrain.py --init-from out/more-words --train embeddings --out out/words     # new words first, then all, from out/words

The same command again resumes an interrupted run, bit for bit. The batch of a step depends on the seed and the sequences read
before it alone: not on the number of processes, not on the micro-batch, not on where the run was interrupted.
"""

from __future__ import annotations

from settings import UserError, command_line, flag, too_small

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from adapter_files import with_base
from adapters import AdapterConfig, AdapterFlags, attach, first_values
from checkpoint import DTYPES, load_state, model_tensors, resolve_model_dir, save_model, save_state, weights_identity
from devices import DTYPE_NAMES, supports
from files import file_sha256
from model import IGNORE, PRESETS, Llama, LlamaConfig
from offload import HostAdamW
from parallel import freeze, make_parallel, strategy_problems
from progress import BatchHash, Metrics, Progress, count_skipped, human, plot_loss, read_metrics
from runs import Finished, best_step, check_shared, claim_run, note_best, start_run
from runtime import Machine, MachineConfig
from sparse_attention import check_groups
from token_files import Tokens, open_tokens
from tokenizer import Tokenizer, load_tokenizer

EMBEDDINGS = ("model.embed_tokens.weight", "lm_head.weight")  # where a model meets its vocabulary; tied, they are one


@dataclass(frozen=True, kw_only=True)
class Config(AdapterFlags, MachineConfig):
    data: Path = flag(Path("data/pretrain"), "token files: a directory of data_process.py pretrain, or a bare uint16 .bin")
    out: Path = flag(Path("out/pretrain"), "run directory")
    tokenizer: Path | None = flag(None, "default: the one in the data directory")
    model: str = flag("92m", f"architecture: {', '.join(PRESETS)}, or a config.json")
    init_from: Path | None = flag(None, "model directory to continue from, instead of --model")
    rope_scaling: str = flag("none", "read further than the model was trained", choices=("none", "linear", "dynamic", "yarn"))
    rope_factor: float = flag(4.0, "how many times as far, with --rope-scaling")
    train: str = flag("all", "what learns: all, or the embedding and the head alone, for a new vocabulary", choices=("all", "embeddings"))

    steps: int | None = flag(None, "optimizer steps; default: --epochs over the data")
    epochs: float = flag(1.0, "passes over the data, when --steps is not given")
    batch_size: int = flag(64, "sequences per optimizer step, over all processes")
    micro_batch: int = flag(8, "sequences that one device holds at a time")
    seq_len: int | None = flag(None, "tokens per sequence; default: all that the model reads")
    doc_mask: bool = flag(False, "attend only within a document, where several share a sequence")

    lr: float = flag(5e-4, "peak learning rate")
    min_lr: float | None = flag(None, "learning rate at the end; default: a tenth of the peak")
    schedule: str = flag("cosine", "after warmup: cosine, or wsd (stable, then a linear decay)", choices=("cosine", "wsd"))
    warmup: float = flag(0.02, "steps of linear warmup; below 1: that part of all steps")
    decay_part: float = flag(0.2, "wsd: the part of all steps that decays")
    weight_decay: float = flag(0.1, "AdamW's, on matrices only")
    beta2: float = flag(0.95, "AdamW's memory of squared gradients")
    clip: float = flag(1.0, "largest gradient norm")
    dropout: float = flag(0.0, "for many passes over little text")
    checkpointing: bool = flag(False, "recompute activations in backward: less memory, about a third more time")
    s2_attn: bool = flag(False, "train with LongLoRA's shifted sparse attention: groups of a quarter of a sequence")

    log_every: int = flag(10, "steps between log lines")
    eval_every: int = flag(200, "steps between evaluations (loss, plot, samples)")
    eval_tokens: int = flag(200_000, "validation tokens per evaluation")
    sample_tokens: int = flag(48, "length of the texts in samples.txt; 0: none are written, where a large model is slow at it")
    save_every: int = flag(200, "steps between checkpoints")
    keep: int = flag(2, "checkpoints kept: the newest, and besides the one with the best validation loss")
    save_dtype: str = flag("fp32", "dtype of the final weights", choices=tuple(DTYPES))
    resume: str = flag("auto", "auto: go on where --out stopped; never; or another run, or one of its steps")
    resume_anyway: bool = flag(False, "go on although settings have changed that alter the run")

    # Settings that cannot change the result: a resumed run may have others. What lies behind the paths is compared itself.
    HARMLESS = MachineConfig.HARMLESS | {"out", "data", "tokenizer", "init_from", "resume", "resume_anyway", "micro_batch", "checkpointing",
                                         "log_every", "eval_every", "eval_tokens", "sample_tokens", "save_every", "keep"}  # fmt: skip

    def problems(self) -> list[str]:
        found = too_small(self, "epochs", "batch_size", "micro_batch", "lr", "clip", "log_every", "eval_every", "eval_tokens",
                          "save_every", "keep", "rope_factor")  # fmt: skip
        found += too_small(self, "min_lr", "warmup", "weight_decay", "beta2", "seed", "dropout", "sample_tokens", least=0)
        found += [f"--{name} must be below 1, not {getattr(self, name)}" for name in ("beta2", "dropout") if getattr(self, name) >= 1]
        found += too_small(self, "steps", "seq_len", least=1)
        if self.init_from is None and self.model not in PRESETS and not Path(self.model).exists():
            found.append(f"--model {self.model} is neither a preset ({', '.join(PRESETS)}) nor a file")
        if self.train == "embeddings" and self.init_from is None and self.resume in ("auto", "never"):
            found.append("--train embeddings needs --init-from: the blocks of a new model are random numbers, and would stay so")
        if self.lora_rank is not None and (self.train != "all" or self.init_from is None):
            found.append("--lora-rank goes beside --train-also, not --train" if self.init_from else
                         "--lora-rank needs --init-from: beside random numbers an adapter learns nothing")  # fmt: skip
        return found + self.adapter_problems() + strategy_problems(self)


# ----------------------------------------------------------------------------------------------------------------------
# Data: which tokens a step reads


class Batches:
    """Windows of T + 1 tokens, without overlap, in an order that is shuffled anew every epoch."""

    def __init__(self, tokens: np.ndarray, seq_len: int, batch_size: int, seed: int):
        self.windows = len(tokens) // (seq_len + 1)
        self.rows = tokens[: self.windows * (seq_len + 1)].reshape(self.windows, seq_len + 1)
        self.batch_size, self.seed = batch_size, seed

    def after(self, read: int) -> np.ndarray:
        """The batch that follows when `read` sequences have been read: [batch_size, T + 1]."""
        which = read + np.arange(self.batch_size)
        epoch, place = which // self.windows, which % self.windows
        order = [shuffled(int(p), self.windows, self.seed + int(e)) for e, p in zip(epoch, place)]
        return self.rows[order].astype(np.int64)


def shuffled(place: int, n: int, key: int) -> int:
    """Element `place` of a random permutation of range(n), in O(1) memory however large n is.

    A Feistel cipher of four rounds permutes the numbers below 4^k ≥ n; walking its cycle until the value is below n
    makes it a permutation of range(n) (Black & Rogaway 2002, "Ciphers with arbitrary finite domains").
    """
    bits = max(1, ((n - 1).bit_length() + 1) // 2)
    mask = (1 << bits) - 1
    while True:
        left, right = place >> bits, place & mask
        for round in range(4):
            mixed = (right * 0x9E3779B97F4A7C15 + key * 0xBF58476D1CE4E5B9 + round * 0x94D049BB133111EB) & (2**64 - 1)
            mixed = ((mixed ^ (mixed >> 29)) * 0xBF58476D1CE4E5B9) & (2**64 - 1)
            left, right = right, left ^ ((mixed >> 32) & mask)
        place = left << bits | right
        if place < n:
            return place


def document_ids(tokens: Tensor, eos_id: int) -> Tensor:
    """[B, T] tokens -> [B, T]: the number of the document each belongs to. eos is the last token of its document."""
    ends = (tokens == eos_id).long()
    return ends.cumsum(1) - ends


# ----------------------------------------------------------------------------------------------------------------------


def learning_rate(step: int, steps: int, config: Config) -> float:
    """Linear warmup, then a cosine to min_lr, or stable and a linear decay over the last part (wsd, 2404.06395)."""
    low = config.lr / 10 if config.min_lr is None else config.min_lr
    warmup = config.warmup * steps if config.warmup < 1 else config.warmup
    if step < warmup:
        return config.lr * (step + 1) / (warmup + 1)
    if config.schedule == "cosine":
        done = (step - warmup) / max(1, steps - warmup)
        return low + (config.lr - low) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
    decay = max(1.0, config.decay_part * steps)
    return low + (config.lr - low) * min(1.0, (steps - step) / decay)


def make_optimizer(model: Llama, config: Config, machine: Machine) -> torch.optim.AdamW:
    """AdamW for what is trained; weight decay pulls on matrices only, not on norms and biases."""
    shapes = model.trained_shapes()  # a shard's own shape does not tell what it is a part of
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    matrices, vectors = ([p for name, p in trained if (len(shapes[name]) > 1) == wanted] for wanted in (True, False))
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    groups = [group for group in groups if group["params"]]  # the embedding and the head have no vectors
    adamw = HostAdamW if config.offload_optimizer else torch.optim.AdamW
    return adamw(groups, lr=config.lr, betas=(0.9, config.beta2), fused=supports(machine.device.type, "fused_adamw"))


@torch.no_grad()
def evaluate(model: Llama, tokens: Tokens, seq_len: int, config: Config, parallel, eos_id: int) -> dict:
    """Validation loss in nats per token, and bits per byte of text; the windows are spread over all ranks."""
    model.eval()
    machine = parallel.machine
    seq_len = min(seq_len, len(tokens) - 1)
    rows = min(len(tokens) // (seq_len + 1), max(1, config.eval_tokens // seq_len))
    windows = tokens.tokens[: rows * (seq_len + 1)].reshape(rows, seq_len + 1)
    nats = 0.0
    for start in range(0, rows, config.micro_batch * machine.world):  # all ranks go round equally often: a shared-out model needs all
        mine = windows[start : start + config.micro_batch * machine.world][machine.rank :: machine.world].astype(np.int64)
        batch = torch.from_numpy(mine if len(mine) else windows[:1].astype(np.int64)).to(machine.device)
        x, y = batch[:, :-1], batch[:, 1:] if len(mine) else torch.full_like(batch[:, 1:], IGNORE)
        with parallel.autocast():
            nats += model(x, y, denominator=1, doc_ids=document_ids(x, eos_id) if config.doc_mask else None).item()
    model.train()
    loss = sum(machine.gather(nats)) / (rows * seq_len)
    text_bytes = tokens.meta.get("splits", {}).get("val", {}).get("bytes")
    return {"val_loss": loss, "val_bpb": loss / math.log(2) * len(tokens) / text_bytes if text_bytes else None}


def write_samples(model: Llama, tokenizer: Tokenizer, tokens: Tokens, most: int, path: Path, title: str, parallel) -> str:
    """Let the model go on from the first words of three validation documents, for so many tokens; append to samples.txt."""
    ends = np.flatnonzero(tokens.tokens[:100_000] == tokenizer.eos_id)[:3]
    starts = [0, *(int(end) + 1 for end in ends)][:3]
    prompts = [p for p in (tokens.tokens[start : start + 8].tolist() for start in starts) if p]
    answers = [list(prompt) for prompt in prompts]
    with parallel.autocast():
        for step in model.generate(prompts, most, temperature=0.8, top_p=0.9, stop_ids=[tokenizer.eos_id], seed=0,
                                   lockstep=parallel.sharded):  # fmt: skip
            for answer, token in zip(answers, step):
                answer += [] if token is None else [token]
    lines = [f"{tokenizer.decode(p)} ▸ {tokenizer.decode(a)[len(tokenizer.decode(p)):]}" for p, a in zip(prompts, answers)]
    if parallel.machine.main:
        with path.open("a", encoding="utf-8") as file:
            file.write("\n".join([f"── {title} " + "─" * 40, *lines, ""]) + "\n")
    return lines[0].replace("\n", "⏎")


def prepare(config: Config, machine: Machine,
            origin: Path | None) -> tuple[Tokens, Tokens | None, Tokenizer, LlamaConfig, AdapterConfig | None]:  # fmt: skip
    """Everything that can be wrong with the input is found here, before anything is allocated."""
    if not config.data.exists():
        raise UserError(
            f"--data {config.data} does not exist. Two commands make it from the built-in textbook: "
            "`python data_process.py textbook` and "
            f"`python data_process.py pretrain --corpus textbook=data/textbook --out {config.data}`; "
            "README.md shows how to bring your own text"
        )
    train = open_tokens(config.data, "train")
    val = open_tokens(config.data, "val") if config.data.is_dir() else None
    if config.tokenizer is None and not config.data.is_dir():
        raise UserError(f"--data {config.data} is a bare file: say which --tokenizer made it")
    if origin:
        llama = LlamaConfig.from_json(origin)
        own = any((origin / name).exists() for name in ("tokenizer.model", "tokenizer.json"))
        tokenizer = load_tokenizer(config.tokenizer or (origin if own else config.data))
    else:
        tokenizer = load_tokenizer(config.tokenizer or config.data)
        llama = PRESETS[config.model] if config.model in PRESETS else LlamaConfig.from_json(config.model)
        llama = dataclasses.replace(llama, vocab_size=len(tokenizer), bos_token_id=tokenizer.bos_id,
                                    eos_token_id=tokenizer.eos_id, pad_token_id=tokenizer.pad_id)  # fmt: skip
    if config.rope_scaling != "none":
        llama = llama.with_rope_scaling(config.rope_scaling, config.rope_factor)
    train.check_model(tokenizer.fingerprint, llama.vocab_size)
    if config.seq_len and config.seq_len > llama.context_length:
        raise UserError(f"--seq-len {config.seq_len} is longer than the {llama.context_length} tokens this model reads; lower it, or read "
                        "further with --rope-scaling yarn")
    seq_len = config.seq_len or llama.context_length
    if len(train) < seq_len + 1:
        raise UserError(f"{config.data} holds {len(train)} tokens, fewer than one sequence of {seq_len} + 1; lower --seq-len or add text")
    machine.check_batch_size(config.batch_size)
    if config.s2_attn:
        check_groups(llama, seq_len)
    return train, val, tokenizer, dataclasses.replace(llama, dropout=config.dropout), config.adapter(llama, machine.dtype)


def main(config: Config) -> dict:
    with Machine(config) as machine, machine.explain_out_of_memory("lower --micro-batch or --seq-len, or add --checkpointing or --fsdp"):
        origin = machine.on_main(lambda: config.init_from and resolve_model_dir(config.init_from))
        train, val, tokenizer, llama, adapter = machine.together(lambda: prepare(config, machine, origin))
        seq_len = config.seq_len or llama.context_length
        batches = Batches(train.tokens, seq_len, config.batch_size, config.seed)
        splits = train.meta.get("splits", {"train": {"sha256": file_sha256(train.path)}})
        identity = {"data": [split["sha256"] for split in splits.values()], "tokenizer": tokenizer.fingerprint,
                    "dtype": DTYPE_NAMES[machine.dtype],
                    "first weights": weights_identity(origin) if origin else None}  # fmt: skip
        quantised = f" --base-quant {config.base_quant}" if config.base_quant != "none" else ""
        talk = f"--model {config.init_from} --adapter {config.out}{quantised}" if adapter else f"--model {config.out}"
        try:
            resume_from = claim_run(machine, config, identity=identity)
        except Finished:
            machine.print(f"{config.out} is finished: nothing to do. Talk to it: python chat.py {talk}")
            return {key: value for line in read_metrics(config.out / "metrics.jsonl") for key, value in line.items()}
        parallel = make_parallel(machine, config)
        adapter = adapter and with_base(adapter, origin, llama, config, parallel)
        storage = adapter.base["storage"] if adapter else "none"
        if adapter:
            model = parallel.build(llama, lambda model: attach(model, adapter, storage, machine.dtype))
        else:
            model = parallel.build(llama, lambda model: freeze(model, EMBEDDINGS if config.train == "embeddings" else None))
        model.checkpointing = config.checkpointing
        optimizer = make_optimizer(model, config, machine)
        per_rank = config.batch_size // machine.world
        network = parallel.wrap(model, optimizer, clip=config.clip, micro_batch=min(config.micro_batch, per_rank),
                                micro_batches=math.ceil(per_rank / config.micro_batch))  # fmt: skip
        trained = sum(shape.numel() for shape in model.trained_shapes().values())
        state = {"stage": "pretrain", "step": 0, "sequences": 0, "skipped": 0, "best": None}
        model.group_size = seq_len // 4 if config.s2_attn else 0  # not before DDP has warmed up, on two tokens
        torch.manual_seed(config.seed + machine.rank)  # the same weights everywhere, but each rank drops out on its own
        if adapter or not resume_from:
            first = model_tensors(origin, llama, storage) if origin else model.initial_weights(config.seed)
            parallel.fill(first_values(first, model, config.seed) if adapter else first)
        if resume_from:
            state = load_state(resume_from, stage="pretrain", parallel=parallel, tokenizer=tokenizer, adapter=adapter)
            if resume_from.parent != config.out or config.resume_anyway:
                state["best"] = None  # measured elsewhere, or on other data
        if resume_from is None or resume_from.parent != config.out or config.resume_anyway:
            facts = {"parameters": model.num_parameters(), "trained": trained, "device": machine.describe(), "torch": torch.__version__}
            machine.on_main(lambda: start_run(config.out, config, identity, facts))
        machine.together(lambda: check_shared(config.out / "args.json"))
        left = config.epochs * batches.windows - state["sequences"]  # not all steps need have had this batch size
        steps = config.steps or max(1, state["step"] + round(left / config.batch_size))
        metrics = Metrics(machine, config.out / "metrics.jsonl", state["step"],
                          evaluate_again=state["step"] % config.eval_every == 0 or state["step"] >= steps)  # fmt: skip
        batch_hash = BatchHash(machine, state.get("batch_hash"))

        tokens_per_step = config.batch_size * seq_len
        machine.print(f"model     {human(model.num_parameters())} parameters, vocabulary {llama.vocab_size:,}, {seq_len} tokens of context")
        if adapter:
            machine.print(f"adapter   {adapter.describe(llama, storage)}; {human(trained)} parameters learn")
        elif config.train == "embeddings":
            machine.print(f"          {human(trained)} of them are trained: {', '.join(parallel.trained)}")
        machine.print(f"data      {human(len(train))} tokens from {config.data}; {steps:,} steps of {config.batch_size} x {seq_len} = "
                      f"{human(tokens_per_step)} tokens, {steps * tokens_per_step / len(train):.2f} epochs")  # fmt: skip
        machine.print(f"machine   {machine.describe()}{parallel.describe()}; micro-batches of {min(config.micro_batch, per_rank)}"
                      + (f"; resuming at step {state['step']:,} from {resume_from}" if resume_from else ""))  # fmt: skip
        network.train()

        flops = model.flops_per_token(model.group_size or seq_len)
        progress = Progress(machine, metrics, steps=steps, first=state["step"], flops_per_token=flops)
        first, saved = state["step"], resume_from
        while True:
            step, stop = state["step"], machine.should_stop()
            last = step >= steps
            rate = learning_rate(step, steps, config)
            with progress.paused():
                if step > first and (last or stop or step % config.save_every == 0):
                    state["batch_hash"] = batch_hash.total()
                    saved = save_state(config.out, parallel=parallel, tokenizer=tokenizer, state=state, keep=config.keep,
                                       needed=last or stop, adapter=adapter) or saved  # fmt: skip
                if stop and not last:
                    machine.stopped(step, saved)
                    break
                if last or step % config.eval_every == 0:
                    title = f"step {step:,}"
                    if val is not None and len(val) > 1:
                        result = evaluate(model, val, seq_len, config, parallel, tokenizer.eos_id)
                        metrics.write(step=step, tokens=state["sequences"] * seq_len, **result)
                        note_best(state, result["val_loss"], saved)
                        title += f", validation loss {result['val_loss']:.3f}"
                        title += f", {result['val_bpb']:.3f} bits per byte" if result["val_bpb"] else ""
                    if config.sample_tokens and (machine.main or parallel.sharded):
                        sample = write_samples(model, tokenizer, val or train, config.sample_tokens, config.out / "samples.txt", title,
                                               parallel)  # fmt: skip
                        title += f" │ {sample[:60]}"
                    machine.print(f"   {title}")
                    if machine.main:
                        plot_loss(config.out / "metrics.jsonl", config.out / "loss.png", str(config.out))
            if last:
                break

            # ---- one optimizer step: the lesson --------------------------------------------------------------
            for group in optimizer.param_groups:
                group["lr"] = rate
            with progress.reading():
                mine = batches.after(state["sequences"])[machine.rank * per_rank : (machine.rank + 1) * per_rank]
            batch_hash.add(step, mine)
            micro_batches = torch.from_numpy(mine).split(config.micro_batch)
            loss = torch.zeros((), device=machine.device)
            for i, micro in enumerate(micro_batches):
                micro = micro.to(machine.device, non_blocking=True)
                x, y = micro[:, :-1], micro[:, 1:]
                docs = document_ids(x, tokenizer.eos_id) if config.doc_mask else None
                with parallel.micro_batch(network, last=i == len(micro_batches) - 1):
                    with parallel.autocast():  # gradients are averaged over ranks, so each divides by its own share of the tokens
                        part = network(x, y, denominator=tokens_per_step / machine.world, doc_ids=docs)
                    parallel.backward(part)
                loss += part.detach()
            if parallel.engine:  # DeepSpeed's unscales, clips, steps and clears by itself
                norm, finite = parallel.step()
            else:
                machine.scaler.unscale_(optimizer)
                norm = parallel.clip(config.clip)
                finite = bool(torch.isfinite(norm))
                if finite:
                    machine.scaler.step(optimizer)
                machine.scaler.update()
                optimizer.zero_grad(set_to_none=parallel.frees_gradients)
            # ---------------------------------------------------------------------------------------------------

            state["step"], state["sequences"] = step + 1, state["sequences"] + config.batch_size
            step += 1
            count_skipped(machine, state, finite, saved)
            progress.step(tokens_per_step)
            if step % config.log_every == 0 or step in (first + 1, steps):
                progress.log(step, tokens=state["sequences"] * seq_len, loss=loss, lr=rate, norm=norm, batch_hash=batch_hash.total())
        progress.bar.close()
        if last:
            save_model(model, config.out, tokenizer, dtype=DTYPES[config.save_dtype], parallel=parallel, adapter=adapter)
            if (best := best_step(config.out, state)) is not None:
                machine.print(f"best      {best}")
            following = (f"chat.py {talk}" if adapter else "sft.py --init-from {} --data data/sft" if config.train == "all" else
                         "pretrain.py --init-from {}, which trains all parameters, with the same --data and another --out")  # fmt: skip
            machine.print(f"done: {config.out}. Next: python {following.format(config.out)}")
        machine.barrier()
        return metrics.last


if __name__ == "__main__":
    command_line(main, Config, description=__doc__)
