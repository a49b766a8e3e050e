"""Talk to a model in the terminal: it answers word by word and remembers the conversation.

    python chat.py --model out/sft                                  # a conversation; /help lists the commands
    python chat.py --model out/sft --prompt 法国的首都是哪里？       # one answer on stdout, nothing else
    python chat.py --model out/sft < questions.txt                  # every line is a turn
    python chat.py --model out/pretrain --prompt 春眠不觉晓，        # a base model continues the text
    python chat.py --model out/pretrain --adapter out/lora          # with what `sft.py --lora-rank` trained beside it

Any Hugging Face Llama directory will do. The conversation is rendered by the same function that made the training data
(tokenizer.render), with the template that the directory names, or the adapter's. Ctrl-C stops an answer; at the prompt it quits, as
Ctrl-D does. Answers go to stdout, all else to stderr.
"""

from __future__ import annotations

from settings import UserError, command_line, flag

import contextlib
import math
import secrets
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from chat_template import TEMPLATES, closing_text
from checkpoint import Adapted, load_model, open_model_dir
from devices import DTYPE_NAMES, KINDS, pick_device, pick_dtype
from model import Llama
from progress import human
from tokenizer import Tokenizer

# What --NAME and /set NAME accept: kind, test, and the same in words.
SAMPLING = {
    "temperature": (float, lambda x: 0 <= x < math.inf, "a number of at least 0 (0: always the likeliest token)"),
    "top_p": (float, lambda x: 0 < x <= 1, "a number above 0 and at most 1 (1: off)"),
    "top_k": (int, lambda x: x >= 0, "a whole number of at least 0 (0: off)"),
    "min_p": (float, lambda x: 0 <= x <= 1, "a number from 0 to 1 (0: off)"),
    "repetition_penalty": (float, lambda x: 0 < x < math.inf, "a number above 0 (1: off)"),
    "max_new_tokens": (int, lambda x: x >= 1, "a whole number of at least 1"),
    "seed": (int, lambda x: 0 <= x < 2**63, "a whole number of at least 0, or none"),
}
COMMANDS = {
    "/reset": "forget the conversation; the system text stays",
    "/system TEXT": "tell the model this before the conversation; without TEXT: no system text",
    "/set NAME VALUE": f"change {', '.join(SAMPLING)}; /set alone shows them",
    "/help": "show this list",
    "/quit": "leave, as Ctrl-D does; Ctrl-C while the model writes stops its answer",
    "//TEXT": "send a message that begins with /",
}


@dataclass(frozen=True)
class Config(Adapted):
    model: Path = flag(Path("out/sft"), "model directory: a run, one of its steps, or any Hugging Face Llama")
    prompt: str | None = flag(None, "answer this once: only the answer goes to stdout")
    system: str = flag("", "system text, told to the model before the conversation")
    template: str = flag("auto", "auto: the chat template that the directory names; none: continue the text",
                         choices=("auto", "none", *TEMPLATES))  # fmt: skip

    # A small model's second choice is seldom a good one, so the defaults stay near the likeliest token.
    temperature: float = flag(0.3, "0: always the likeliest token; higher: more varied")
    top_p: float = flag(0.9, "sample from the fewest tokens that together have this probability; 1: off")
    top_k: int = flag(0, "sample from so many likeliest tokens; 0: off")
    min_p: float = flag(0.0, "leave out tokens below this share of the likeliest one's probability; 0: off")
    repetition_penalty: float = flag(1.0, "above 1: make tokens that were there already less likely; 1: off")
    max_new_tokens: int = flag(512, "longest answer, in tokens")
    seed: int | None = flag(None, "the same seed and the same words give the same answer; default: chance")

    rope_scaling: str = flag("none", "read further than the model was trained",
                             choices=("none", "linear", "dynamic", "yarn"))  # fmt: skip
    rope_factor: float = flag(4.0, "how many times as far, with --rope-scaling")
    device: str = flag("auto", "where to compute", choices=("auto", *KINDS))
    dtype: str = flag("auto", "dtype of the weights and the arithmetic", choices=("auto", "bf16", "fp16", "fp32"))

    def problems(self) -> list[str]:
        found = []
        for name, (_, fine, meaning) in SAMPLING.items():
            value = getattr(self, name)
            if value is not None and not fine(value):
                found.append(f"--{name.replace('_', '-')} must be {meaning}, not {value}")
        if self.prompt is not None and not self.prompt.strip():
            found.append("--prompt is empty")
        return found


# ----------------------------------------------------------------------------------------------------------------------
# The conversation


class Conversation:
    """What was said, and the model that answers.

    template None is a base model: it continues each text by itself and remembers nothing.
    settings: the values of SAMPLING. turns: [(question, answer), …], oldest first.
    """

    def __init__(self, model: Llama, tokenizer: Tokenizer, template: str | None, settings: dict, system: str = ""):
        self.model, self.tokenizer, self.template = model, tokenizer, template
        self.settings, self.system = dict(settings), system
        self.turns: list[tuple[str, str]] = []
        self.forgetting = False  # whether the user knows that old turns had to go
        if template is None:
            self.stop_ids = [] if tokenizer.eos_id is None else [tokenizer.eos_id]
        else:
            self.stop_ids = tokenizer.stop_ids(template)
        self.tokens, self.seconds, self.cut = 0, 0.0, False  # of the last answer: length, time, whether room ran out

    @property
    def window(self) -> int:
        return self.model.config.context_length

    def ids(self, turns: list[tuple[str, str]], text: str) -> list[int]:
        """The token ids that the model reads before it answers `text`: exactly what training showed it."""
        if self.template is None:
            return self.tokenizer.encode(text, bos=self.tokenizer.add_bos)
        messages = [{"role": "system", "content": self.system}] if self.system else []
        for question, answer in turns:
            messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        messages.append({"role": "user", "content": text})
        return self.tokenizer.render(messages, template=self.template, add_generation_prompt=True)[0]

    def read(self, text: str) -> tuple[list[int], int]:
        """(ids to answer, number of old turns forgotten so that these and the answer fit the window).

        The answer is promised max_new_tokens, but never more than half the window, so that the question has the other
        half. Raises UserError, and forgets nothing, if `text` is too long even by itself.
        """
        promised = min(self.settings["max_new_tokens"], self.window // 2)
        turns = list(self.turns)
        ids = self.ids(turns, text)
        while turns and len(ids) + promised > self.window:
            del turns[0]
            ids = self.ids(turns, text)
        if len(ids) >= self.window:
            system = ", with the system text," if self.system and self.template else ""
            raise UserError(f"this message{system} takes {len(ids):,} tokens, but the model reads {self.window:,}, its "
                            "answer included; shorten it, or read further with --rope-scaling yarn")
        forgotten, self.turns = len(self.turns) - len(turns), turns
        return ids, forgotten

    def answer(self, text: str, ids: list[int]) -> Iterator[str]:
        """Yield the answer to `ids`, what read(text) gave, piece by piece: whole characters only.

        Whoever stops listening (Ctrl-C) stops the model; what was said until then is remembered as the answer.
        """
        sampling = {name: value for name, value in self.settings.items() if name != "max_new_tokens"}
        if sampling["seed"] is None:  # torch's own generator would start every process alike
            sampling["seed"] = secrets.randbits(63)
        room = min(self.settings["max_new_tokens"], self.window - len(ids))
        stream, said = self.tokenizer.stream(), []
        self.tokens, self.cut, start = 0, False, time.perf_counter()
        steps = self.model.generate([ids], room, stop_ids=self.stop_ids, **sampling)
        try:
            for (token,) in steps:
                self.tokens += 1
                said.append(stream.push(token))
                yield said[-1]
            said.append(stream.flush())
            yield said[-1]
            self.cut = self.tokens == room
        finally:
            steps.close()
            self.seconds = time.perf_counter() - start
            answer = "".join(said)
            if self.template is not None:
                answer = answer.removesuffix(closing_text(self.tokenizer, self.template))
                if answer.strip():  # a turn without an answer cannot be rendered
                    self.turns.append((text, answer))


# ----------------------------------------------------------------------------------------------------------------------
# Commands


def command(conversation: Conversation, line: str) -> str:
    """Carry out a line that begins with /. Returns what to tell the user; raises UserError for what is no command."""
    name, _, rest = line.partition(" ")
    name, rest = name.lower(), rest.strip()
    if name == "/reset":
        conversation.turns.clear()
        conversation.forgetting = False
        return "the conversation starts anew"
    if name == "/system":
        conversation.system = rest
        if conversation.template is None:
            return "this is a base model: it reads no system text"
        return f"system text: {rest}" if rest else "no system text"
    if name == "/set":
        return set_sampling(conversation.settings, rest.split())
    if name == "/help":
        return "\n".join(f"{usage:<16}  {text}" for usage, text in COMMANDS.items())
    raise UserError(f"unknown command {name}; there are {', '.join(usage.split()[0] for usage in COMMANDS)}")


def set_sampling(settings: dict, words: list[str]) -> str:
    """/set, /set NAME, /set NAME VALUE. Returns the settings in question as text."""
    if not words:
        return "\n".join(f"{name:<18}  {value if value is not None else 'none'}" for name, value in settings.items())
    name = words[0].lower().replace("-", "_")
    if name not in SAMPLING:
        raise UserError(f"there is no setting {words[0]}; there are {', '.join(SAMPLING)}")
    kind, fine, meaning = SAMPLING[name]
    if len(words) > 2:
        raise UserError(f"/set {name} takes one value: {meaning}")
    if len(words) == 2:
        try:
            value = None if name == "seed" and words[1].lower() == "none" else kind(words[1])
        except ValueError:
            raise UserError(f"{name} must be {meaning}, not {words[1]}") from None
        if value is not None and not fine(value):
            raise UserError(f"{name} must be {meaning}, not {words[1]}")
        settings[name] = value
    return f"{name} {settings[name] if settings[name] is not None else 'none'}"


# ----------------------------------------------------------------------------------------------------------------------
# The terminal

# A model that spells bytes can write the escape character, and so move our cursor or worse: show ␛ instead.
VISIBLE = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"}
VISIBLE |= dict.fromkeys(range(127, 160), "\ufffd")


def note(text: str) -> None:
    """Say something that is no answer: on stderr, dim where that is a terminal."""
    print(f"\033[2m{text}\033[0m" if sys.stderr.isatty() else text, file=sys.stderr, flush=True)


def reply(conversation: Conversation, text: str) -> str:
    """Print the answer to `text` as it comes, and return it. Raises UserError if it cannot be answered."""
    ids, forgotten = conversation.read(text)
    if forgotten and not conversation.forgetting:
        conversation.forgetting = True
        note(f"(the conversation no longer fits the {conversation.window:,} tokens that the model reads: from here on "
             "its oldest turns are forgotten)")
    table = VISIBLE if sys.stdout.isatty() else {}
    said = []
    try:
        with contextlib.closing(conversation.answer(text, ids)) as pieces:
            for piece in pieces:
                said.append(piece)
                print(piece.translate(table), end="", flush=True)
    except torch.OutOfMemoryError:
        raise UserError(f"out of GPU memory after {len(ids):,} tokens; /reset, or lower max_new_tokens") from None
    finally:
        print(flush=True)
    return "".join(said)


def lines(interactive: bool) -> Iterator[str]:
    """What the user types, or the lines of a file, until the end or Ctrl-C."""
    while True:
        try:
            yield input("> " if interactive else "")
        except (EOFError, KeyboardInterrupt):
            if interactive:
                print()
            return


def talk(conversation: Conversation, interactive: bool) -> dict:
    """Turns until the user leaves. Returns how many were answered, and with how many tokens."""
    done = {"turns": 0, "new_tokens": 0, "seconds": 0.0}
    for line in lines(interactive):
        line = line.strip()
        if line.lower() in ("/quit", "/exit"):
            break
        try:
            if line.startswith("/") and not line.startswith("//"):
                note(command(conversation, line))
            elif line:
                answer_turn(conversation, line[1:] if line.startswith("//") else line, interactive)
                done["turns"] += 1
                done["new_tokens"] += conversation.tokens
                done["seconds"] += conversation.seconds
        except UserError as error:  # a mistake in one line does not end the conversation
            print(f"error: {error}", file=sys.stderr, flush=True)
    return done


def answer_turn(conversation: Conversation, text: str, interactive: bool) -> None:
    """reply(), which Ctrl-C may stop, and a dim line about how it went."""
    try:
        said, stopped = reply(conversation, text), False
    except KeyboardInterrupt:
        said, stopped = "", True
    if not interactive:
        return
    speed = f"{conversation.tokens} tokens, {conversation.tokens / max(conversation.seconds, 1e-9):.1f} tokens/s"
    why = ("; stopped" if stopped else "; cut off: the answer had no more room" if conversation.cut
           else "; the model said nothing" if not said.strip() else "")  # fmt: skip
    note(f"({speed}{why})")


def load(config: Config) -> Conversation:
    """Read the model and its tokenizer. Everything that can be wrong with them is found before weights are read."""
    adapters = config.adapters()
    directory, llama, tokenizer = open_model_dir(config.model, config.rope_scaling, config.rope_factor, adapters)
    template = {"auto": tokenizer.template, "none": None}.get(config.template, config.template)
    device = pick_device(config.device)
    dtype = pick_dtype(config.dtype, device)
    model = load_model(directory, device, dtype, config=llama, adapters=adapters, base_quant=config.storage(directory)).eval()
    settings = {name: getattr(config, name) for name in SAMPLING}
    if template is None:
        note(f"{directory} is a base model (it names no chat template): it continues your text, and remembers nothing")
        if config.system:
            note("a base model reads no system text: --system is not used")
    return Conversation(model, tokenizer, template, settings, config.system)


def main(config: Config) -> dict:
    for stream in (sys.stdin, sys.stdout):
        if hasattr(stream, "reconfigure"):  # whatever the locale says; half a character becomes an error in its line
            stream.reconfigure(encoding="utf-8", errors="surrogateescape")
    conversation = load(config)
    if config.prompt is not None:
        said = reply(conversation, config.prompt)
        return {"answer": said, "turns": 1, "new_tokens": conversation.tokens, "seconds": conversation.seconds}
    interactive = sys.stdin.isatty() and sys.stdout.isatty()
    if interactive:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401 - gives input() editing and a history
        model, weight, name = conversation.model, conversation.model.lm_head.weight, config.with_adapters(config.model)
        note(f"{name}: {human(model.num_parameters())} parameters, {conversation.window:,} tokens of context, "
             f"{weight.device.type} {DTYPE_NAMES[weight.dtype]}; /help lists the commands")
    return talk(conversation, interactive)


if __name__ == "__main__":
    command_line(main, Config, description=__doc__)
