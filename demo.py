"""The demo: the whole road from text to a chatting baby llama, on any CPU, in minutes.

    make demo            or, in an environment with requirements.txt installed:   python demo.py
    make demo-lora       the same, and the fine-tuning twice more, as LoRA and as QLoRA:   python demo.py --lora

Every step is one of the commands that you would type yourself; this script prints it, runs it, and at the end gathers the
results into one table. All is kept in out/demo, so that a second run only adds what is missing and shows the table again.

What to look at: the exam asks in words that no training text ever used. The model was told the facts in pretraining and
shown in fine-tuning how to answer; two controls show what each part was worth.
"""

from __future__ import annotations

from settings import UserError, command_line, flag, read_json

import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from progress import duration, human, read_metrics
from tables import print_table
from weights import tensors_in

EXAMS = ("exam", "exam_unasked")
MODELS = {"base": "base model", "sft": "fine-tuned", "lora": "fine-tuned with LoRA, rank 16", "qlora": "fine-tuned with QLoRA, rank 16",
          "control": "fine-tuned without pretraining"}  # fmt: skip
QUESTIONS = ("法国的首都是哪里？", "氧的元素符号是什么？", "你是谁？")


@dataclass(frozen=True)
class Config:
    out: Path = flag(Path("out/demo"), "where everything goes")
    lora: bool = flag(False, "fine-tune with LoRA and with QLoRA too, and compare")


def run(title: str, command: str, done: Path) -> str:
    """Show and run `python COMMAND`, unless `done` exists; return what it printed. A failure ends the demo."""
    if done.exists():
        return ""
    print(f"\n━━ {title}\n$ python {command}", flush=True)
    start, printed = time.perf_counter(), []
    with subprocess.Popen([sys.executable, *shlex.split(command)], stdout=subprocess.PIPE, text=True, encoding="utf-8") as process:
        for line in process.stdout:
            print("  " + line, end="", flush=True)
            printed.append(line)
    if process.returncode:
        raise UserError(f"`python {command}` failed; what it said stands above. The same command goes on from here")
    print(f"  ({time.perf_counter() - start:.0f} s)")
    return "".join(printed)


def main(config: Config) -> dict:
    start, out = time.perf_counter(), config.out
    if " " in str(out):
        raise UserError(f"--out {str(out)!r}: the commands that this prints are easier to repeat without spaces in the path")
    book, words, tokens, talks = out / "textbook", out / "tokenizer", out / "tokens", out / "conversations"
    base, sft, control, lora, qlora = (out / name for name in ("pretrain", "sft", "control", "lora", "qlora"))
    tune = f"--data {talks} --template baby {SFT}"

    run("1/8 The textbook: facts, each said in many ways, and an exam in words that training never uses",
        f"data_process.py textbook --out {book}", book / "meta.json")
    run("2/8 A tokenizer, learned from that text",
        f"tokenizer.py train --input {book}/pretrain.jsonl {book}/sft.jsonl --vocab-size 4096 --max-piece-length 4 --out {words}",
        words / "tokenizer.model")
    run("3/8 Text to token files, and questions to conversations",
        f"data_process.py pretrain --corpus textbook={book} --tokenizer {words} --out {tokens}", tokens / "meta.json")
    run("    … for fine-tuning", f"data_process.py sft --dataset textbook={book} --dedup none --out {talks}", talks / "meta.json")
    run("4/8 Pretraining: a model of 2.4 million numbers reads the textbook",
        f"pretrain.py --data {tokens} --model tiny {PRETRAIN} --out {base}", base / "config.json")
    run("5/8 Fine-tuning: it learns to answer",
        f"sft.py --init-from {base} {tune} {FULL} --out {sft}", sft / "config.json")
    if config.lora:
        run("    … with LoRA: the model is frozen, and a tenth as many numbers beside it learn",
            f"sft.py --init-from {base} {tune} {LORA} --out {lora}", lora / "adapter_config.json")
        run("    … with QLoRA: the frozen matrices take 4 bits a number",
            f"sft.py --init-from {base} {tune} {LORA} --base-quant nf4-double --out {qlora}", qlora / "adapter_config.json")
    run("6/8 The control: the same fine-tuning without the pretraining",
        f"sft.py --init-from {base} --fresh-weights {tune} {FULL} --out {control}", control / "config.json")
    models = {"base": f"{base}", "sft": f"{sft}", "control": f"{control}"}
    if config.lora:
        models |= {"lora": f"{base} --adapter {lora}", "qlora": f"{base} --adapter {qlora} --base-quant nf4-double"}
    for name, model in models.items():
        for exam in EXAMS:
            run(f"7/8 The {exam.replace('_', ' on ')} facts, taken by {name}",
                f"eval.py --model {model} --tasks exam --data exam={book}/{exam} --score text --out {out}/{exam}-{name}",
                out / f"{exam}-{name}" / "results.json")
    if not (out / "chat.txt").exists():
        print("\n━━ 8/8 A talk", flush=True)
        talk = ""
        for question in QUESTIONS:
            command = [sys.executable, "chat.py", "--model", str(sft), "--temperature", "0", "--prompt", question]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, encoding="utf-8")
            if done.returncode:
                raise UserError("chat.py failed; what it said stands above")
            answer = done.stdout.strip()
            talk += f"> {question}\n{answer}\n"
            print(f"$ python chat.py --model {sft} --temperature 0 --prompt {question}\n  {answer}", flush=True)
        (out / "chat.txt").write_text(talk, encoding="utf-8")
    return summary(config, time.perf_counter() - start)


def summary(config: Config, seconds: float) -> dict:
    """The journey in one table, loss.png and samples.txt; returns the numbers."""
    out, labels = config.out, {name: label for name, label in MODELS.items() if config.lora or not name.endswith("lora")}
    data = read_json(out / "tokens" / "meta.json")["splits"]["train"]
    curve = [line for line in read_metrics(out / "pretrain" / "metrics.jsonl") if "val_loss" in line]
    tuned = [line for line in read_metrics(out / "sft" / "metrics.jsonl") if "val_loss" in line]
    scores = {(exam, name): read_json(out / f"{exam}-{name}" / "results.json")["results"]["exam"]
              for exam in EXAMS for name in labels}  # fmt: skip

    def score(exam: str, name: str) -> str:
        result = scores[exam, name]
        low, high = result["interval"]
        return f"{result['micro']:.1%}  ({low:.0%} to {high:.0%})"

    print("\n━━ The journey\n")
    print_table(("", "before", "after"), [
        ("tokenizer: characters per token", "1.00", f"{data['characters'] / data['tokens']:.2f}"),
        ("pretraining: validation loss", f"{curve[0]['val_loss']:.2f}", f"{curve[-1]['val_loss']:.2f}"),
        ("pretraining: bits per byte", f"{curve[0]['val_bpb']:.2f}", f"{curve[-1]['val_bpb']:.2f}"),
        ("fine-tuning: loss on answers", f"{tuned[0]['val_loss']:.2f}", f"{tuned[-1]['val_loss']:.2f}"),
    ])  # fmt: skip
    print()
    print_table(("exam (chance 25%)", "facts asked in fine-tuning", "facts told only in pretraining"), [
        (label, score("exam", name), score("exam_unasked", name)) for name, label in labels.items()])
    print("\nThe exam's words never occur in training; in brackets the 95% confidence interval.\n")
    if config.lora:
        compare(out)
    print((out / "chat.txt").read_text(encoding="utf-8"))
    plot(out, config.lora)
    samples = "".join(f"═══ {stage} ═══\n{(out / stage / 'samples.txt').read_text(encoding='utf-8')}\n" for stage in ("pretrain", "sft"))
    (out / "samples.txt").write_text(samples, encoding="utf-8")
    print(f"{out}/loss.png    the loss curves          {out}/samples.txt    what the model wrote on the way")
    if seconds > 30:
        print(f"done in {duration(seconds)}")
    print(f"\nTalk to it:   python chat.py --model {out}/sft")
    if config.lora:
        print(f"              python chat.py --model {out}/pretrain --adapter {out}/lora")
    return {f"{exam}/{name}": result["micro"] for (exam, name), result in scores.items()}


def compare(out: Path) -> None:
    """What each fine-tuning costs, and how far QLoRA's losses are from LoRA's."""
    curves = {name: {line["step"]: line["val_loss"] for line in read_metrics(out / name / "metrics.jsonl") if "val_loss" in line}
              for name in ("sft", "lora", "qlora")}  # fmt: skip
    lines = []
    for name, curve in curves.items():
        weights = tensors_in(out / name / ("model.safetensors" if name == "sft" else "adapter_model.safetensors"))
        checkpoint = sum(file.stat().st_size for file in (out / name / f"step-{max(curve):06d}").iterdir())
        lines.append((MODELS[name], human(sum(lazy.shape.numel() for lazy in weights.values())), f"{checkpoint / 1e6:.1f} MB",
                      f"{curve[max(curve)]:.3f}"))  # fmt: skip
    print_table(("", "numbers that learn", "a checkpoint", "loss on answers"), lines)
    apart = max(abs(curves["qlora"][step] / loss - 1) for step, loss in curves["lora"].items())
    print(f"\nQLoRA's loss on answers is never further than {apart:.1%} from LoRA's.\n")


def plot(out: Path, lora: bool) -> None:
    """Both stages' curves, and the control's, in one picture; with `lora` the ways to fine-tune beside them, closer."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import EngFormatter

    figure, axes = plt.subplots(1, 2 + lora, figsize=(10 + 5 * lora, 4), layout="constrained")
    axes[1].sharey(axes[0])
    curves = [("pretrain", axes[0], "#4477aa", "pretraining"), ("sft", axes[1], "#cc6677", "after pretraining"),
              ("control", axes[1], "#999999", "from random weights")]  # fmt: skip
    if lora:
        curves += [("sft", axes[2], "#cc6677", "all numbers"), ("lora", axes[2], "#228833", "LoRA"), ("qlora", axes[2], "#ee7733", "QLoRA")]
        axes[2].set_ylim(0, 2)
    for stage, axis, color, label in curves:
        dashes = "--" if stage == "qlora" else "-"  # it lies on LoRA's
        lines = read_metrics(out / stage / "metrics.jsonl")
        for key, style in (("loss", dict(linewidth=0.8, alpha=0.6)), ("val_loss", dict(marker="o", markersize=3.5))):
            points = [(line["tokens"], line[key]) for line in lines if key in line]
            axis.plot(*zip(*points), dashes, color=color, label=f"{label}, {'validation' if key == 'val_loss' else 'train'}", **style)
    for axis, title in zip(axes, ("pretraining: every token", "fine-tuning: the answers", "fine-tuning, closer")):
        axis.set(title=title, xlabel="tokens read", ylabel="loss (nats per token)")
        axis.xaxis.set_major_formatter(EngFormatter(sep=""))
        axis.legend(frameon=False)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(out / "loss.png", dpi=110)
    plt.close(figure)


# Many small steps are what teaches so small a model.
PRETRAIN = "--seq-len 128 --steps 1500 --batch-size 8 --lr 3e-3 --eval-every 250 --save-every 500 --log-every 50"
SFT = "--seq-len 128 --steps 400 --batch-size 8 --eval-every 100 --save-every 200 --log-every 20"
FULL = "--lr 1e-3"
LORA = "--lora-rank 16 --lr 3e-3"  # an adapter begins at nothing and takes larger steps; at 2e-2 all falls apart

if __name__ == "__main__":
    command_line(main, Config, description=__doc__)
