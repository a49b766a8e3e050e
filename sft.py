"""Supervised fine-tuning: learn to answer, from conversations; only the answers count in the loss (--loss-on all: every token does).

    in     a model directory (--init-from) and train.jsonl, val.jsonl of {"messages": [{"role": …, "content": …}]}, or of
           [{"role": …, "text": …}], chinese-llama-65b's layout
    out    out/sft    a Hugging Face model directory with the chat template, metrics.jsonl, loss.png, samples.txt

    python sft.py --init-from out/pretrain --data data/sft
    torchrun --nproc_per_node=4 sft.py --init-from out/pretrain --data data/sft --epochs 2
    python sft.py --init-from out/pretrain --data data/sft --show-batch      # token by token: what is read, what is learned

Several conversations share a row (packing); a mask keeps each from seeing its neighbours, so that a packed conversation
gives the same loss as one alone. The same command again resumes. A diff with pretrain.py shows the lesson of this stage.
"""

from __future__ import annotations

from settings import UserError, command_line, flag, too_small

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from adapter_files import with_base
from adapters import AdapterFlags, attach, first_values
from checkpoint import (
    DTYPES,
    load_state,
    model_tensors,
    open_model_dir,
    resolve_model_dir,
    save_model,
    save_state,
    weights_identity,
)
from devices import DTYPE_NAMES, supports
from files import file_sha256
from model import IGNORE, Llama
from offload import HostAdamW
from parallel import make_parallel, strategy_problems
from progress import BatchHash, Metrics, Progress, count_skipped, human, plot_loss, read_metrics
from runs import Finished, best_step, check_shared, claim_run, note_best, start_run
from runtime import Machine, MachineConfig
from sparse_attention import check_groups
from tokenizer import TEMPLATES, Tokenizer


@dataclass(frozen=True, kw_only=True)
class Config(AdapterFlags, MachineConfig):
    init_from: Path = flag(Path("out/pretrain"), "model directory to fine-tune")
    data: Path = flag(Path("data/sft"), "directory with train.jsonl and val.jsonl, or one .jsonl file")
    out: Path = flag(Path("out/sft"), "run directory")
    template: str = flag("auto", "chat template; auto: the model directory's own, else chatml, else baby",
                         choices=("auto", *TEMPLATES))  # fmt: skip
    loss_on: str = flag("answers", "what is learned: the answers and their ends, or every token of a conversation but its first",
                        choices=("answers", "all"))  # fmt: skip
    fresh_weights: bool = flag(False, "the control: random weights in place of those of --init-from")
    rope_scaling: str = flag("none", "read further than the model was trained", choices=("none", "linear", "dynamic", "yarn"))
    rope_factor: float = flag(4.0, "how many times as far, with --rope-scaling")

    steps: int | None = flag(None, "optimizer steps; default: --epochs over the data")
    epochs: float = flag(3.0, "passes over the data, when --steps is not given")
    batch_size: int = flag(16, "rows per optimizer step, over all processes")
    micro_batch: int = flag(8, "rows that one device holds at a time")
    seq_len: int | None = flag(None, "tokens per row; default: all that the model reads")
    packing: bool = flag(True, "several conversations in a row; off: one, padded")

    lr: float = flag(1e-4, "peak learning rate")
    min_lr: float | None = flag(None, "learning rate at the end; default: a tenth of the peak")
    warmup: float = flag(0.03, "steps of linear warmup; below 1: that part of all steps")
    weight_decay: float = flag(0.01, "AdamW's, on matrices only")
    beta2: float = flag(0.95, "AdamW's memory of squared gradients")
    clip: float = flag(1.0, "largest gradient norm")
    dropout: float = flag(0.0, "against learning few conversations by heart")
    checkpointing: bool = flag(False, "recompute activations in backward: less memory, about a third more time")
    s2_attn: bool = flag(False, "train with LongLoRA's shifted sparse attention: groups of a quarter of a row")

    log_every: int = flag(10, "steps between log lines")
    eval_every: int = flag(200, "steps between evaluations (loss, plot, samples)")
    sample_tokens: int = flag(96, "longest answer in samples.txt; 0: none are written, where a large model is slow at it")
    save_every: int = flag(200, "steps between checkpoints")
    keep: int = flag(2, "checkpoints kept: the newest, and besides the one with the best validation loss")
    save_dtype: str = flag("fp32", "dtype of the final weights", choices=tuple(DTYPES))
    resume: str = flag("auto", "auto: go on where --out stopped; never; or another run, or one of its steps")
    resume_anyway: bool = flag(False, "go on although settings have changed that alter the run")
    show_batch: bool = flag(False, "print the first batch token by token and stop")

    # Settings that cannot change the result: a resumed run may have others. What lies behind the paths is compared itself.
    HARMLESS = MachineConfig.HARMLESS | {"out", "data", "init_from", "resume", "resume_anyway", "micro_batch", "checkpointing", "log_every",
                                         "eval_every", "sample_tokens", "save_every", "keep", "show_batch"}  # fmt: skip

    def problems(self) -> list[str]:
        found = too_small(self, "epochs", "batch_size", "micro_batch", "lr", "clip", "log_every", "eval_every", "save_every", "keep",
                          "rope_factor")  # fmt: skip
        found += too_small(self, "min_lr", "warmup", "weight_decay", "beta2", "seed", "dropout", least=0)
        found += [f"--{name} must be below 1, not {getattr(self, name)}" for name in ("beta2", "dropout") if getattr(self, name) >= 1]
        found += too_small(self, "steps", least=1) + too_small(self, "seq_len", least=8) + too_small(self, "sample_tokens", least=0)
        if self.s2_attn and not self.packing:
            found.append("--s2-attn needs --packing: rows of one length, which groups divide")
        if self.fresh_weights and self.lora_rank is not None:
            found.append("--fresh-weights is for training the model itself: an adapter beside random numbers learns nothing")
        return found + self.adapter_problems() + strategy_problems(self)


# ----------------------------------------------------------------------------------------------------------------------
# Data: conversations -> rows of tokens, targets and document numbers


class Conversations:
    """All conversations of a file, tokenised: ids and the mask of what is learned, one after the other in flat arrays."""

    def __init__(self, path: Path, tokenizer: Tokenizer, template: str, seq_len: int, loss_on: str = "answers", quiet: bool = False):
        """Raises UserError naming the line of a broken record, or if there is nothing to learn."""
        ids, masks, self.truncated, self.empty = [], [], 0, 0
        self.questions: list[list[dict]] = []  # what comes before the first answer, for samples.txt
        records = tqdm(read_messages(path), desc=f"tokenising {path.name}", disable=True if quiet else None, leave=False)
        for line, messages in records:
            try:
                if isinstance(messages, str):  # a document, as pretraining reads it
                    tokens = tokenizer.encode(messages, bos=tokenizer.add_bos, eos=tokenizer.eos_id is not None)
                    mask = [0] * len(tokens)
                else:
                    tokens, mask = tokenizer.render(messages, template=template)
            except UserError as error:
                raise UserError(f"{path}:{line}: {error}") from None
            if any(mask) and len(self.questions) < 5:
                self.questions.append(messages[: [turn["role"] for turn in messages].index("assistant")])
            if loss_on == "all":
                mask = [0] + [1] * (len(tokens) - 1)  # nothing comes before the first token to predict it from
            if not any(mask):
                self.empty += 1
                continue
            if len(tokens) > seq_len + 1:
                tokens, mask = truncate(tokens, mask, seq_len + 1)
                self.truncated += 1
            ids.append(np.array(tokens, dtype=np.uint32))
            masks.append(np.array(mask, dtype=bool))
        if not ids:
            raise UserError(f"{path} has no conversation with an assistant turn: there is nothing to learn"
                            + (f"; --loss-on all learns all tokens of its {self.empty:,} other lines" if self.empty else ""))  # fmt: skip
        self.ends = np.cumsum([len(i) for i in ids])
        self.ids, self.masks = np.concatenate(ids), np.concatenate(masks)
        self.lengths = np.diff(self.ends, prepend=0) - 1  # positions that predict something: all but the last token
        # what row_of() will count: targets of one conversation, which begin at its second token
        self.learned = np.array([int(mask[1:].sum()) for mask in masks])

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        start = self.ends[i - 1] if i else 0
        return self.ids[start : self.ends[i]].astype(np.int64), self.masks[start : self.ends[i]]


def read_messages(path: Path) -> list[tuple[int, list | str]]:
    """(line number, messages) of each line of a JSON-lines file in one of two layouts:

        {"messages": [{"role": …, "content": …}, …]}
        [{"role": …, "text": …}, …]                    chinese-llama-65b's; a list of one is a text by itself: a str

    Raises UserError naming file and line.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")  # not splitlines(): U+2028 may stand in a text
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read as UTF-8 text: {error}") from None
    conversations, kinds = [], set()
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            if isinstance(record, list):
                turns = [{"role": turn.get("role"), "content": turn["text"]} for turn in record]
                messages = turns[0]["content"] if len(turns) == 1 else turns
            elif isinstance(messages := record["messages"], str):
                raise TypeError
        except (ValueError, RecursionError) as error:  # what a number or a nesting without end brings, too
            raise UserError(f"{path}:{number}: not valid JSON: {getattr(error, 'msg', error)}") from None
        except (KeyError, TypeError, AttributeError):
            raise UserError(f'{path}:{number}: no "messages", nor a list of {{"role": …, "text": …}}; python data_process.py sft makes the '
                            "first of other formats") from None  # fmt: skip
        conversations.append((number, messages))
        kinds.add(type(record))
        if len(kinds) > 1:
            raise UserError(f'{path}:{number}: here the file changes between {{"messages": […]}} and lists of {{"role": …, "text": …}}; '
                            "give each a file of its own")  # fmt: skip
    return conversations


def truncate(tokens: list[int], mask: list[int], length: int) -> tuple[list[int], list[int]]:
    """Cut a conversation to `length` tokens such that some answer is left.

    The end goes first. If no answer begins within half the window's last token, the start of the prompt goes instead:
    what is kept is the second half of the window for the answer, the first half for the words right before it.
    """
    first = mask.index(1)
    start = 0 if first < length - 1 else max(0, first - length // 2)
    return tokens[start : start + length], mask[start : start + length]


def pack(lengths: np.ndarray, order: np.ndarray, seq_len: int, packing: bool, open_rows: int = 32) -> list[list[int]]:
    """Share rows of seq_len positions among conversations: each goes to the fullest of the last open rows it fits in."""
    if not packing:
        return [[int(i)] for i in order]
    rows, free = [], []  # free: (positions left, row) of the rows still open
    for i in map(int, order):
        fits = [entry for entry in free if entry[0] >= lengths[i]]
        if fits:
            entry = min(fits)
            free.remove(entry)
            rows[entry[1]].append(i)
            free.append((entry[0] - int(lengths[i]), entry[1]))
        else:
            rows.append([i])
            free.append((seq_len - int(lengths[i]), len(rows) - 1))
            if len(free) > open_rows:
                free.remove(min(free))
    return rows


class Batches:
    """Rows of conversations in an order shuffled anew every epoch. Step s depends on the seed and s alone."""

    def __init__(self, data: Conversations, seq_len: int, batch_size: int, epochs: float, packing: bool, seed: int | None,
                 pad: int, steps: int | None = None):  # fmt: skip
        """`steps`, where given, decides how many passes there are, in place of `epochs`. seed None keeps the file's order."""
        self.data, self.seq_len, self.batch_size, self.packing, self.seed, self.pad = data, seq_len, batch_size, packing, seed, pad
        self.rows: list[list[int]] = []
        self.epoch = 0
        if steps:
            self.at_least(steps * batch_size)
        while not steps and self.epoch < epochs:
            self._read(min(1.0, epochs - self.epoch))

    def at_least(self, rows: int) -> None:
        """Read on, epoch by epoch, until there are so many rows."""
        while len(self.rows) < rows:
            self._read(1.0)

    def _read(self, part: float) -> None:
        """Pack the conversations of an epoch, or the first part of them, into rows."""
        n = len(self.data)
        order = np.arange(n) if self.seed is None else np.random.default_rng([self.seed, self.epoch]).permutation(n)
        self.rows += pack(self.data.lengths, order[: max(1, round(n * part))], self.seq_len, self.packing)
        self.epoch += 1

    def __len__(self) -> int:
        return math.ceil(len(self.rows) / self.batch_size)

    def after(self, read: int) -> list[list[int]]:
        """The rows of the batch that follows when `read` rows have been read, each a list of conversations; past the end, and
        to fill up the last batch, empty rows."""
        rows = self.rows[read : read + self.batch_size]
        return rows + [[]] * (self.batch_size - len(rows))

    def learned(self, rows: list[list[int]]) -> int:
        return int(sum(self.data.learned[row].sum() for row in rows if row))

    def tensors(self, rows: list[list[int]]) -> dict[str, torch.Tensor]:
        """[B, T] each: tokens, targets (-100 where nothing is learned), doc_ids, positions (from 0 in every conversation)."""
        used = max([sum(int(self.data.lengths[i]) for i in row) for row in rows] + [1])
        width = self.seq_len if self.packing else min(self.seq_len, -(-used // 8) * 8)
        shape = (len(rows), width)
        tokens, targets = np.full(shape, self.pad), np.full(shape, IGNORE)
        doc_ids, positions = np.full(shape, -1), np.zeros(shape, dtype=np.int64)
        for r, row in enumerate(rows):
            at = 0
            for number, i in enumerate(row):
                ids, mask = self.data[i]
                end = at + len(ids) - 1
                tokens[r, at:end] = ids[:-1]
                targets[r, at:end] = np.where(mask[1:], ids[1:], IGNORE)
                doc_ids[r, at:end], positions[r, at:end] = number, np.arange(len(ids) - 1)
                at = end
        return {name: torch.from_numpy(array) for name, array in
                (("tokens", tokens), ("targets", targets), ("doc_ids", doc_ids), ("positions", positions))}  # fmt: skip


def show_batch(batch: dict, tokenizer: Tokenizer) -> None:
    """Print the first row: what is read, what it must predict, and whether that counts."""
    print(f"{'place':>5} {'conv':>4} {'pos':>4} {'id':>6}  {'token':<16} {'learned':<8} target")
    columns = (batch[name][0].tolist() for name in ("doc_ids", "positions", "tokens", "targets"))
    for place, (doc, position, token, target) in enumerate(zip(*columns)):
        if doc < 0:
            print(f"{place:>5} … padding up to {len(batch['tokens'][0])}")
            break
        learned, shown = ("yes", repr(tokenizer.id_to_piece(target))) if target != IGNORE else ("·", "")
        print(f"{place:>5} {doc:>4} {position:>4} {token:>6}  {tokenizer.id_to_piece(token)!r:<16} {learned:<8} {shown}")


# ----------------------------------------------------------------------------------------------------------------------


def learning_rate(step: int, steps: int, config: Config) -> float:
    """Linear warmup, then a cosine to min_lr."""
    low = config.lr / 10 if config.min_lr is None else config.min_lr
    warmup = config.warmup * steps if config.warmup < 1 else config.warmup
    if step < warmup:
        return config.lr * (step + 1) / (warmup + 1)
    done = (step - warmup) / max(1, steps - warmup)
    return low + (config.lr - low) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


@torch.no_grad()
def evaluate(model: Llama, batches: Batches, config: Config, parallel) -> dict:
    """Loss in nats per learned token over the whole validation file, its rows spread over all ranks."""
    model.eval()
    machine, rows, nats = parallel.machine, batches.rows, 0.0
    for start in range(0, len(rows), config.micro_batch * machine.world):  # all ranks go round equally often: a shared-out model needs all
        mine = rows[start : start + config.micro_batch * machine.world][machine.rank :: machine.world]
        batch = {k: v.to(machine.device) for k, v in batches.tensors(mine or [[]]).items()}
        with parallel.autocast():
            nats += model(batch["tokens"], batch["targets"], denominator=1, doc_ids=batch["doc_ids"],
                          positions=batch["positions"]).item()  # fmt: skip
    model.train()
    return {"val_loss": sum(machine.gather(nats)) / batches.data.learned.sum().item()}


def write_samples(model: Llama, tokenizer: Tokenizer, template: str, questions: list, most: int, path: Path, title: str,
                  parallel) -> str:  # fmt: skip
    """Answer the first questions of the validation conversations, in at most so many tokens; append to samples.txt."""
    prompts = [tokenizer.render(messages, template=template, add_generation_prompt=True)[0] for messages in questions]
    room = max(1, min(most, model.config.context_length - max(map(len, prompts))))
    answers: list[list[int]] = [[] for _ in prompts]
    with parallel.autocast():
        for step in model.generate(prompts, room, temperature=0, stop_ids=tokenizer.stop_ids(template), lockstep=parallel.sharded):
            for answer, token in zip(answers, step):
                answer += [] if token is None else [token]
    lines = [f"{messages[-1]['content']} ▸ {tokenizer.decode(answer)}" for messages, answer in zip(questions, answers)]
    if parallel.machine.main:
        with path.open("a", encoding="utf-8") as file:
            file.write("\n".join([f"── {title} " + "─" * 40, *lines, ""]) + "\n")
    return lines[0].replace("\n", "⏎")


def prepare(config: Config, machine: Machine, origin: Path):
    """Everything that can be wrong with the input is found here, before anything is allocated."""
    _, llama, tokenizer = open_model_dir(origin, config.rope_scaling, config.rope_factor)
    template = tokenizer.default_template() if config.template == "auto" else config.template
    if config.seq_len and config.seq_len > llama.context_length:
        raise UserError(f"--seq-len {config.seq_len} is longer than the {llama.context_length} tokens this model reads; lower it, "
                        "or read further with --rope-scaling yarn")
    machine.check_batch_size(config.batch_size)
    train, val = (config.data / "train.jsonl", config.data / "val.jsonl") if config.data.is_dir() else (config.data, None)
    if not train.exists():
        raise UserError(f"--data {config.data} has no train.jsonl; make it: "
                        f"python data_process.py sft --dataset NAME=PATH --out {config.data}")
    val = val if val and val.exists() and val.stat().st_size else None
    if config.s2_attn:
        check_groups(llama, config.seq_len or llama.context_length)
    return dataclasses.replace(llama, dropout=config.dropout), config.adapter(llama, machine.dtype), tokenizer, template, train, val


def main(config: Config) -> dict:
    with Machine(config) as machine, machine.explain_out_of_memory("lower --micro-batch or --seq-len, or add --checkpointing or --fsdp"):
        origin = machine.on_main(lambda: resolve_model_dir(config.init_from))
        llama, adapter, tokenizer, template, train_file, val_file = machine.together(lambda: prepare(config, machine, origin))
        seq_len = config.seq_len or llama.context_length
        quantised = f" --base-quant {config.base_quant}" if config.base_quant != "none" else ""
        talk = f"--model {config.init_from} --adapter {config.out}{quantised}" if adapter else f"--model {config.out}"
        identity = {"data": [file_sha256(file) for file in (train_file, val_file) if file], "tokenizer": tokenizer.fingerprint,
                    "dtype": DTYPE_NAMES[machine.dtype], "first weights": weights_identity(origin)}
        try:
            resume_from = None if config.show_batch else claim_run(machine, config, identity=identity)
        except Finished:
            machine.print(f"{config.out} is finished: nothing to do. Talk to it: python chat.py {talk}")
            return {key: value for line in read_metrics(config.out / "metrics.jsonl") for key, value in line.items()}
        train = machine.together(lambda: Conversations(train_file, tokenizer, template, seq_len, config.loss_on, quiet=not machine.main))
        val = machine.together(lambda: Conversations(val_file, tokenizer, template, seq_len, config.loss_on, quiet=True)
                               if val_file else None)  # fmt: skip
        pad = tokenizer.eos_id if tokenizer.pad_id is None else tokenizer.pad_id
        batches = Batches(train, seq_len, config.batch_size, config.epochs, config.packing, config.seed, pad, steps=config.steps)
        val_batches = Batches(val, seq_len, config.batch_size, 1, config.packing, None, pad) if val else None
        if config.show_batch:
            if machine.main:
                show_batch(batches.tensors(batches.after(0)), tokenizer)
            return {"rows": len(batches.rows)}

        parallel = make_parallel(machine, config)
        adapter = adapter and with_base(adapter, origin, llama, config, parallel)
        storage = adapter.base["storage"] if adapter else "none"
        if adapter:
            model = parallel.build(llama, lambda model: attach(model, adapter, storage, machine.dtype))
        else:
            model = parallel.build(llama)
        model.checkpointing = config.checkpointing
        shapes = model.trained_shapes()  # a shard's own shape does not tell what it is a part of
        learning = {name: parameter for name, parameter in model.named_parameters() if name in shapes}
        matrices, vectors = ([p for name, p in learning.items() if (len(shapes[name]) > 1) == wanted] for wanted in (True, False))
        groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
        groups = [group for group in groups if group["params"]]  # an adapter may have no vectors
        adamw = HostAdamW if config.offload_optimizer else torch.optim.AdamW
        optimizer = adamw(groups, lr=config.lr, betas=(0.9, config.beta2), fused=supports(machine.device.type, "fused_adamw"))
        per_rank = config.batch_size // machine.world
        network = parallel.wrap(model, optimizer, clip=config.clip, micro_batch=min(config.micro_batch, per_rank),
                                micro_batches=math.ceil(per_rank / config.micro_batch))  # fmt: skip
        trained = sum(shape.numel() for shape in shapes.values())
        state = {"stage": "sft", "step": 0, "rows": 0, "tokens": 0, "skipped": 0, "best": None}
        model.group_size = seq_len // 4 if config.s2_attn else 0  # not before DDP has warmed up, on two tokens
        torch.manual_seed(config.seed + machine.rank)  # the same weights everywhere, but each rank drops out on its own
        if adapter or not resume_from:
            first = model.initial_weights(config.seed) if config.fresh_weights else model_tensors(origin, llama, storage)
            parallel.fill(first_values(first, model, config.seed) if adapter else first)
        if resume_from:
            state = load_state(resume_from, stage="sft", parallel=parallel, tokenizer=tokenizer, adapter=adapter)
            if resume_from.parent != config.out or config.resume_anyway:
                state["best"] = None  # measured elsewhere, or on other data
        if resume_from is None or resume_from.parent != config.out or config.resume_anyway:
            facts = {"parameters": model.num_parameters(), "trained": trained, "device": machine.describe(), "torch": torch.__version__,
                     "template": template}  # fmt: skip
            machine.on_main(lambda: start_run(config.out, config, identity, facts))
        machine.together(lambda: check_shared(config.out / "args.json"))
        # Not all steps so far need have had this batch size.
        steps = config.steps or state["step"] + math.ceil((len(batches.rows) - state["rows"]) / config.batch_size)
        batches.at_least(state["rows"] + (steps - state["step"]) * config.batch_size if config.steps else 0)
        metrics = Metrics(machine, config.out / "metrics.jsonl", state["step"],
                          evaluate_again=state["step"] % config.eval_every == 0 or state["step"] >= steps)  # fmt: skip
        batch_hash = BatchHash(machine, state.get("batch_hash"))

        learned = batches.data.learned.sum() / batches.data.lengths.sum()
        weights = "random numbers" if config.fresh_weights else config.init_from
        machine.print(f"model     {human(model.num_parameters())} parameters from {weights}, template {template}")
        if adapter:
            machine.print(f"adapter   {adapter.describe(llama, storage)}; {human(trained)} parameters learn")
        machine.print(f"data      {len(train):,} conversations from {train_file}, {learned:.0%} of their tokens are learned; "
                      f"{train.truncated:,} cut to {seq_len} tokens, {train.empty:,} without an answer left out")
        filled = sum(int(train.lengths[i]) for row in batches.rows for i in row) / (len(batches.rows) * seq_len)
        machine.print(f"          {len(batches.rows):,} rows, {filled:.0%} filled; {steps:,} steps of {config.batch_size} rows")
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
                    saved = save_state(config.out, parallel=parallel, tokenizer=tokenizer, state=state, template=template,
                                       keep=config.keep, needed=last or stop, adapter=adapter) or saved  # fmt: skip
                if stop and not last:
                    machine.stopped(step, saved)
                    break
                if last or step % config.eval_every == 0:
                    title = f"step {step:,}"
                    if val_batches:
                        result = evaluate(model, val_batches, config, parallel)
                        metrics.write(step=step, tokens=state["tokens"], **result)
                        note_best(state, result["val_loss"], saved)
                        title += f", validation loss {result['val_loss']:.3f}"
                    questions = (val or train).questions
                    if questions and config.sample_tokens and (machine.main or parallel.sharded):
                        sample = write_samples(model, tokenizer, template, questions, config.sample_tokens, config.out / "samples.txt",
                                               title, parallel)  # fmt: skip
                        title += f" │ {sample[:60]}"
                    machine.print(f"   {title}")
                    if machine.main:
                        plot_loss(config.out / "metrics.jsonl", config.out / "loss.png", str(config.out))
            if last:
                break

            # ---- one optimizer step: the lesson --------------------------------------------------------------
            for group in optimizer.param_groups:
                group["lr"] = rate
            rows = batches.after(state["rows"])
            answers = max(1, batches.learned(rows))  # what counts in the whole step, known to every rank without asking
            mine = rows[machine.rank * per_rank : (machine.rank + 1) * per_rank]
            micro_batches = [mine[i : i + config.micro_batch] for i in range(0, per_rank, config.micro_batch)]
            loss = torch.zeros((), device=machine.device)
            for i, micro in enumerate(micro_batches):
                batch = batches.tensors(micro)
                batch_hash.add(step, (row[place] for row, place in zip(batch["tokens"].numpy(), (batch["doc_ids"] >= 0).numpy())))
                batch = {k: v.to(machine.device, non_blocking=True) for k, v in batch.items()}
                with parallel.micro_batch(network, last=i == len(micro_batches) - 1):
                    with parallel.autocast():
                        part = network(batch["tokens"], batch["targets"], denominator=answers / machine.world,
                                       doc_ids=batch["doc_ids"], positions=batch["positions"])  # fmt: skip
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

            tokens = sum(int(train.lengths[i]) for row in rows for i in row)
            state["step"], state["rows"], state["tokens"] = step + 1, state["rows"] + config.batch_size, state["tokens"] + tokens
            step += 1
            count_skipped(machine, state, finite, saved)
            progress.step(tokens)
            if step % config.log_every == 0 or step in (first + 1, steps):
                progress.log(step, tokens=state["tokens"], loss=loss, lr=rate, norm=norm, batch_hash=batch_hash.total())
        progress.bar.close()
        if last:
            save_model(model, config.out, tokenizer, dtype=DTYPES[config.save_dtype], template=template, parallel=parallel,
                       adapter=adapter)  # fmt: skip
            if (best := best_step(config.out, state)) is not None:
                machine.print(f"best      {best}")
            machine.print(f"done: {config.out}. Next: python chat.py {talk}")
        machine.barrier()
        return metrics.last


if __name__ == "__main__":
    command_line(main, Config, description=__doc__)
