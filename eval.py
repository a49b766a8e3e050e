"""Evaluation: what does a model know, how well does it predict text, how does it go on?

    in     a model directory, and for every task its data: `--data TASK=PATH`, or a root with one folder per task
    out    tables on the screen; with --out DIR also results.json, results.md and the raw predictions (JSON lines)

    python eval.py --model out/sft --tasks exam --data data/textbook --score text
    python eval.py --model out/pretrain --tasks ppl,exam --data ppl=data/pretrain exam=path/to/ceval --shots 5
    python eval.py --model out/pretrain --adapter out/lora --tasks exam --data data/textbook --score text
    python eval.py --model out/pretrain --tasks ppl --data novel.txt --context 1024 --rope-scaling yarn --rope-factor 4
    python eval.py --model out/sft --tasks continue --data prompts.jsonl --temperature 0.7 --out out/samples

ppl        perplexity, nats per token, bits per byte, of token files (validation split), .txt or .jsonl
exam       multiple choice in C-Eval's layout: val/SUBJECT_val.csv [dev/, subject_mapping.json], or one .csv
continue   samples for a file of prompts: lines of .txt, or .jsonl with {"prompt": …} or {"messages": […]}

Here stand perplexity, continuation and the command. Multiple choice is in multiple_choice.py; how a model is asked for
the likelihood of an answer, in examinee.py. A random guesser scores the chance level: read no exam without it.
"""

from __future__ import annotations

from settings import UserError, command_line, config_to_dict, flag

import bisect
import difflib
import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from checkpoint import Adapted, load_model, open_model_dir
from devices import DTYPE_NAMES, KINDS, pick_device, pick_dtype
from examinee import Examinee, Report
from files import utf8_lines, write_json, write_text
from model import IGNORE
from multiple_choice import EXAM
from progress import human
from tables import markdown_table, print_table
from token_files import open_tokens
from tokenizer import TEMPLATES, Tokenizer


@dataclass(frozen=True, kw_only=True)
class Config(Adapted):
    model: Path = flag(help="model directory, or a run (then its newest step)")
    tasks: tuple[str, ...] = flag(("exam",), "what to measure: ppl, exam, continue; several with commas or spaces")
    data: tuple[str, ...] = flag(help="a root with one folder per task, or TASK=PATH …; for a single task also just PATH")
    out: Path | None = flag(None, "write results.json, results.md and the raw predictions to this new directory")
    device: str = flag("auto", "where to compute", choices=("auto", *KINDS))
    dtype: str = flag("auto", "of weights and arithmetic; log-probabilities are always taken in fp32",
                      choices=("auto", "bf16", "fp16", "fp32"))  # fmt: skip
    batch_tokens: int = flag(4096, "tokens computed at a time, padding included; more suits a GPU, less saves memory")
    context: int | None = flag(None, "most tokens read at once; default: what the model was made for. More is allowed")
    rope_scaling: str = flag("none", "read further than the model was trained",
                             choices=("none", "linear", "dynamic", "yarn"))  # fmt: skip
    rope_factor: float = flag(4.0, "how many times as far, with --rope-scaling")
    template: str = flag("auto", "chat template for exam and messages; auto: the model's own if any, none: plain text",
                         choices=("auto", "none", *TEMPLATES, "jinja"))  # fmt: skip

    stride: int | None = flag(None, "ppl: new tokens scored per window; default: all of it, so that none overlap")
    max_tokens: int | None = flag(None, "ppl: score only the first so many tokens")

    score: str = flag("letter", "exam: compare the letters after the official prompt, or the options' texts as answers "
                                "to the bare question", choices=("letter", "text"))  # fmt: skip
    shots: int = flag(0, "exam: solved examples from dev/ before every question; those that do not fit fall off the end")
    normalize: str = flag("none", "exam, text: divide an option's log-probability by its tokens or UTF-8 bytes, or take "
                                  "off what it has after a bare 答案：",
                          choices=("none", "tokens", "bytes", "unconditional"))  # fmt: skip
    option_end: str = flag("。", "exam, text: ends an option, unless it already does; without it 六十四 never beats 六")

    max_new_tokens: int = flag(128, "continue: length of a sample")
    temperature: float = flag(0.8, "continue: 0 takes the likeliest token always")
    top_p: float = flag(0.95, "continue: sample from the fewest tokens that hold this probability")
    top_k: int = flag(0, "continue: sample from so many likeliest tokens; 0: all")
    min_p: float = flag(0.0, "continue: leave out tokens less likely than this times the likeliest")
    repetition_penalty: float = flag(1.0, "continue: above 1 makes tokens that were already used less likely")
    seed: int = flag(1234, "continue: decides the samples, together with the prompts that share a batch")

    def problems(self) -> list[str]:
        def wrong(names: str, fine: Callable, rule: str) -> list[str]:
            return [f"--{name.replace('_', '-')} must {rule}, not {getattr(self, name)}" for name in names.split()
                    if getattr(self, name) is not None and not fine(getattr(self, name))]  # fmt: skip

        found = wrong("batch_tokens context stride max_tokens max_new_tokens", lambda v: v >= 1, "be at least 1")
        found += wrong("shots temperature top_k", lambda v: v >= 0, "not be negative")
        found += wrong("top_p repetition_penalty rope_factor", lambda v: v > 0, "be above 0")
        found += wrong("min_p", lambda v: 0 <= v <= 1, "be between 0 and 1")
        if self.score == "letter" and self.normalize != "none":
            found.append(f"--normalize {self.normalize} is for --score text; letters are equally long")
        for name in self.task_names():
            if name not in TASKS:
                close = difflib.get_close_matches(name, TASKS, 1)
                meant = f" (meant {close[0]}?)" if close else ""
                found.append(f"there is no task {name!r}{meant}; known: {', '.join(TASKS)}")
        return found if self.task_names() else [*found, f"--tasks names none; known: {', '.join(TASKS)}"]

    def task_names(self) -> list[str]:
        return list(dict.fromkeys(name for word in self.tasks for name in word.split(",") if name))

    def data_paths(self) -> dict[str, Path]:
        """Where each task finds its data. Raises UserError for a missing path."""
        names, root, paths = self.task_names(), None, {}
        for word in self.data:
            name, equals, path = word.partition("=")
            if equals and name.isidentifier() and not Path(word).exists():
                if name not in names:
                    raise UserError(f"--data {word}: {name} is not among the --tasks {', '.join(names)}")
                paths[name] = Path(path)
            elif root is not None:
                raise UserError(f"--data has two roots, {root} and {word}; name the tasks: --data TASK=PATH …")
            else:
                root = Path(word)
        for name in names:
            if name not in paths and root is None:
                raise UserError(f"--data says nothing about {name}; add {name}=PATH")
            if name not in paths:
                paths[name] = root if len(names) == 1 and not (root / name).exists() else root / name
            if not paths[name].exists():
                raise UserError(f"--data: {paths[name]} does not exist, where the task {name} looks for its data")
        return {name: paths[name] for name in names}


# ----------------------------------------------------------------------------------------------------------------------
# Perplexity


@dataclass(frozen=True)
class Document:
    """A text that is read with nothing before it but `start`."""

    start: int
    tokens: np.ndarray
    bytes: float | None  # of the text in UTF-8; None: not known


def perplexity(examinee: Examinee, path: Path) -> Report:
    """Every token is predicted exactly once, the first of a text from the start token alone.

    Windows do not overlap in what they score. By default each reads one token before its own; with a --stride shorter
    than the window, more. The last, shorter window reads a full window (lm-evaluation-harness does the same). Means
    are over tokens, never over windows, whose lengths may differ.
    """
    config, clock = examinee.config, time.perf_counter()
    L = examinee.context
    stride = config.stride or L
    if stride > L:
        raise UserError(f"--stride {stride} is more than the {L} tokens of a window: tokens between would not be scored")
    documents, source = read_documents(examinee, path)
    windows = [(document, *window) for document in documents for window in split_windows(len(document.tokens), L, stride)]
    nats, tokens = 0.0, sum(len(document.tokens) for document in documents)
    with torch.inference_mode():
        for batch in examinee.batches([end - low for _, low, _, end in windows], "ppl"):
            rows = [windows[i] for i in batch]
            shape = (len(rows), max(end - low for _, low, _, end in rows))
            inputs, targets = np.zeros(shape, dtype=np.int64), np.full(shape, IGNORE)
            for row, (document, low, first, end) in enumerate(rows):
                # Place t predicts token t and reads token t - 1; place 0 reads the start token.
                before = [document.start] if low == 0 else []
                inputs[row, : end - low] = np.concatenate((before, document.tokens[max(low - 1, 0) : end - 1]))
                targets[row, first - low : end - low] = document.tokens[first:end]
            hidden = examinee.model.hidden_states(torch.from_numpy(inputs).to(examinee.device))
            values = examinee.log_probs(hidden, torch.from_numpy(targets).to(examinee.device))
            nats -= values.cpu().double().sum().item()
    loss, seconds = nats / tokens, time.perf_counter() - clock
    size = None if any(document.bytes is None for document in documents) else sum(d.bytes for d in documents)
    result = {"nats_per_token": loss, "perplexity": math.exp(min(loss, 700.0)),
              "bits_per_byte": nats / math.log(2) / size if size else None, "tokens": tokens, "bytes": size,
              "documents": len(documents), "windows": len(windows), "context": L, "stride": stride,
              "seconds": round(seconds, 3)}  # fmt: skip
    bits = f"{result['bits_per_byte']:.4f} bits per byte" if size else "bits per byte unknown (a bare token file)"
    headline = (f"{path}: perplexity {result['perplexity']:.3f}, {loss:.4f} nats per token, {bits}; {tokens:,} tokens, "
                f"{seconds:.1f} s, {human(tokens / seconds)} tokens/s")  # fmt: skip
    how = "without overlap" if stride == L else f"sliding, {stride} new tokens each"
    return Report(headline, result, [f"{len(windows):,} windows of up to {L} tokens, {how}", source])


def split_windows(tokens: int, length: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """(low, first, end): tokens first … end - 1 are scored, places low … end - 1 are read. The first window scores all
    that it reads, the next ones `stride` tokens, each in sight of the `length` places before its end."""
    first, end = 0, min(length, tokens)
    while first < tokens:
        yield max(0, end - length), first, end
        first, end = end, min(end + stride, tokens)


def read_documents(examinee: Examinee, path: Path) -> tuple[list[Document], str]:
    """The text to score, at most --max-tokens of it, and a line that says what was counted as a byte."""
    tokenizer, left = examinee.tokenizer, examinee.config.max_tokens or 1 << 62
    if (path / "meta.json").exists() or path.suffix == ".bin":
        data = open_tokens(path, "val") if path.is_dir() else open_tokens(path)
        if data is None or not len(data):
            raise UserError(f"{path} has no validation split; name the file itself, {path / 'train.bin'}, say")
        data.check_model(tokenizer.fingerprint, examinee.model.config.vocab_size)
        size = data.meta.get("splits", {}).get(data.split, {}).get("bytes")
        ids = data.tokens[:left]
        exact = "all its bytes" if len(ids) == len(data) else "bytes estimated from the whole split's bytes per token"
        start = examinee.start_id if tokenizer.eos_id is None else tokenizer.eos_id  # as between two documents
        size = size * len(ids) / len(data) if size else None
        return [Document(start, ids, size)], f"the {data.split} split as one stream, EOS tokens included; {exact}"
    documents: list[Document] = []
    for text in (text for file in text_files(path) for text in read_texts(file)):
        text, ids = cut_text(tokenizer, text, left)
        if not ids:  # the limit is reached
            break
        documents.append(Document(examinee.start_id, np.array(ids), len(text.encode())))
        left -= len(ids)
    if not documents:
        raise UserError(f"{path} holds no text")
    return documents, f"{len(documents):,} documents, each by itself; exactly the UTF-8 bytes of their text"


def cut_text(tokenizer: Tokenizer, text: str, limit: int) -> tuple[str, list[int]]:
    """The longest beginning of the text that takes at most `limit` tokens, and its ids.

    The text is cut, not its ids, so that its bytes can be counted. A long text is never encoded as a whole.
    """
    def cost(characters: int) -> int:
        return len(tokenizer.encode(text[:characters]))

    most = min(max(1, limit), len(text))
    while most < len(text) and cost(most) <= limit:
        most = min(2 * most, len(text))
    ids = tokenizer.encode(text[:most])
    if len(ids) > limit:
        text = text[: max(0, bisect.bisect_right(range(most), limit, key=cost) - 1)]
        ids = tokenizer.encode(text) if text else []
    return text, ids


def text_files(path: Path) -> list[Path]:
    """The .txt and .jsonl files of a folder, or the file itself."""
    files = sorted(p for p in path.iterdir() if p.suffix in (".txt", ".jsonl")) if path.is_dir() else [path]
    if not files:
        raise UserError(f"{path} holds neither token files (meta.json) nor .txt or .jsonl files")
    return files


def read_texts(file: Path) -> Iterator[str]:
    """A whole text file, or the "text" of every line of a .jsonl."""
    if file.suffix != ".jsonl":
        yield "".join(line for _, line in utf8_lines(file))
        return
    for where, record in read_jsonl(file):
        if not isinstance(record.get("text"), str):
            raise UserError(f'{where}: has no "text"; its keys are {", ".join(record) or "none"}')
        if record["text"]:
            yield record["text"]


def read_jsonl(file: Path) -> Iterator[tuple[str, dict]]:
    for number, line in utf8_lines(file):
        if line.strip():
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                raise UserError(f"{file}:{number}: not valid JSON: {error.msg}") from None
            if not isinstance(record, dict):
                raise UserError(f"{file}:{number}: not a JSON object but a {type(record).__name__}")
            yield f"{file}:{number}", record


# ----------------------------------------------------------------------------------------------------------------------
# Continuation


def continuation(examinee: Examinee, path: Path) -> Report:
    """Let the model go on from every prompt. Plain prompts are continued as they are, messages are answered."""
    config, tokenizer, clock = examinee.config, examinee.tokenizer, time.perf_counter()
    prompts = [prompt for file in text_files(path) for prompt in read_prompts(file)]
    if not prompts:
        raise UserError(f"{path} holds no prompt")
    template = None if config.template == "auto" else config.template
    ids, stops = [], {tokenizer.eos_id} - {None}
    for where, prompt in prompts:
        try:
            if isinstance(prompt, str):
                ids.append(tokenizer.encode(prompt, bos=tokenizer.add_bos))
            else:
                ids.append(tokenizer.render(prompt, template, add_generation_prompt=True)[0])
                stops.update(tokenizer.stop_ids(template))
        except UserError as error:
            raise UserError(f"{where}: {error}") from None
        if len(ids[-1]) >= examinee.context:
            raise UserError(f"{where}: the prompt takes {len(ids[-1])} tokens, and the model reads {examinee.context} with "
                            "the answer; shorten it, or allow more with --context")  # fmt: skip
    room = [min(config.max_new_tokens, examinee.context - len(prompt)) for prompt in ids]
    new: list[list[int]] = [[] for _ in ids]
    for batch in examinee.batches([len(prompt) + n for prompt, n in zip(ids, room)], "continue"):
        steps = examinee.model.generate(
            [ids[i] for i in batch], max(room[i] for i in batch), temperature=config.temperature, top_k=config.top_k,
            top_p=config.top_p, min_p=config.min_p, repetition_penalty=config.repetition_penalty,
            stop_ids=sorted(stops), seed=config.seed,
        )  # fmt: skip
        for step in steps:
            for i, token in zip(batch, step):
                new[i] += [] if token is None or len(new[i]) == room[i] else [token]
    records, lines = [], []
    for (_, prompt), tokens, most in zip(prompts, new, room):
        kind, completion = "prompt" if isinstance(prompt, str) else "messages", tokenizer.decode(tokens)
        records.append({kind: prompt, "completion": completion, "tokens": len(tokens), "stopped": len(tokens) < most})
        shown = prompt if isinstance(prompt, str) else prompt[-1]["content"]
        lines.append(f"{shown} ▸ {completion}".replace("\n", "⏎"))
    seconds, written = time.perf_counter() - clock, sum(map(len, new))
    result = {"prompts": len(records), "tokens": written, "stopped": sum(record["stopped"] for record in records),
              "seconds": round(seconds, 3)}  # fmt: skip
    headline = (f"{path}: {len(records):,} samples, {result['stopped']:,} ended by themselves; {written:,} tokens, "
                f"{seconds:.1f} s, {human(written / seconds)} tokens/s")  # fmt: skip
    return Report(headline, result, lines, records=records)


def read_prompts(file: Path) -> Iterator[tuple[str, str | list[dict]]]:
    """(file:line, text or messages): every line of a .txt that is not blank, every record of a .jsonl."""
    if file.suffix != ".jsonl":
        yield from ((f"{file}:{number}", line.rstrip("\r\n")) for number, line in utf8_lines(file) if line.strip())
        return
    for where, record in read_jsonl(file):
        prompt = record.get("prompt", record.get("messages"))
        if not isinstance(prompt, (str, list)) or not prompt:
            raise UserError(f'{where}: needs a "prompt" (text) or "messages"; its keys are {", ".join(record) or "none"}')
        yield where, prompt


# ----------------------------------------------------------------------------------------------------------------------
# The tasks: a further multiple-choice benchmark is one more declaration, anything else a function like the two above.

TASKS: dict[str, Callable[[Examinee, Path], Report]] = {"ppl": perplexity, "exam": EXAM, "continue": continuation}
NUMBERS = (2, 3, 4, 5)  # columns of a report's table that align to the right; the two before are names


def write_reports(out: Path, config: Config, reports: dict[str, Report], about: str) -> None:
    """results.json, results.md, predictions.jsonl (exam), samples.jsonl (continue): all of them or nothing."""
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        text, lines = [f"# {config.with_adapters(config.model)}", "", about, ""], {}
        for name, report in reports.items():
            text += [f"## {name}", "", report.headline, "", *(f"* {line}" for line in report.lines), ""]
            text += [*markdown_table(report.table[0], report.table[1:], NUMBERS), ""] if report.table else []
            for record in report.records:
                file = "samples.jsonl" if name == "continue" else "predictions.jsonl"
                lines.setdefault(file, []).append(json.dumps({"task": name, **record}, ensure_ascii=False) + "\n")
        for file, content in lines.items():
            write_text(partial / file, "".join(content))
        write_text(partial / "results.md", "\n".join(text))
        write_json(partial / "results.json", {"results": {name: report.result for name, report in reports.items()},
                                              "model": about, "settings": config_to_dict(config),
                                              "torch": torch.__version__})  # fmt: skip
        if out.exists():
            out.rmdir()  # empty, as was checked before the work began
        os.replace(partial, out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def main(config: Config) -> dict:
    """Returns {task: its results}; prints them, and writes them where --out says."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("eval.py is one process: start it with python, not torchrun")
    out = config.out
    if out and out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise UserError(f"--out {out} already exists; choose another directory, or remove it")
    paths = config.data_paths()
    adapters = config.adapters()
    directory, llama, tokenizer = open_model_dir(config.model, config.rope_scaling, config.rope_factor, adapters)
    device = pick_device(config.device)
    dtype = pick_dtype(config.dtype, device)
    storage = config.storage(directory)
    examinee = Examinee(load_model(directory, device, dtype, config=llama, adapters=adapters, base_quant=storage), tokenizer, config)
    scaled = f", rope {config.rope_scaling} x {config.rope_factor:g}" if config.rope_scaling != "none" else ""
    quantised = f", projections in {storage}" if storage != "none" else ""
    about = (f"{config.with_adapters(directory)}: {human(examinee.model.num_parameters())} parameters, {DTYPE_NAMES[dtype]} on {device}, "
             f"{examinee.context} tokens of context{scaled}{quantised}")  # fmt: skip
    print(f"model     {about}")
    if examinee.context > llama.context_length:
        print(f"note      that is more than the {llama.context_length} tokens that the model was made for")
    reports = {}
    try:
        for name, path in paths.items():
            reports[name] = report = TASKS[name](examinee, path)
            print("\n".join([f"\n{name:<8}  {report.headline}", *(f"          {line}" for line in report.lines)]))
            if report.table:
                print_table(report.table[0], report.table[1:], NUMBERS)
    except torch.OutOfMemoryError:
        raise UserError(f"out of memory on {device}; lower --batch-tokens (now {config.batch_tokens})") from None
    if out:
        write_reports(out, config, reports, about)
        print(f"\nwritten: {out}")
    return {name: report.result for name, report in reports.items()}


if __name__ == "__main__":
    command_line(main, Config, description=__doc__)
