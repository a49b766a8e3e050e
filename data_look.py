"""What was prepared, as the model will read it: page through token files, conversations and preferences.

    python data_process.py look data/pretrain                                     # documents, decoded; Enter shows the next
    python data_process.py look data/pretrain --tokens --random                   # where tokens begin and end; drawn by chance
    python data_process.py look data/sft --tokenizer data/tokenizer               # what is trained (green) and what is not
    python data_process.py look data/dpo/val.jsonl --start 10 --count 2 | less    # no terminal: prints and ends

Nothing is read whole: token files are mapped into memory, JSON lines are read one by one.
"""

from __future__ import annotations

from settings import UserError, flag, read_json

import itertools
import json
import os
import random
import re
import shutil
import sys
from array import array
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from chat_template import TEMPLATES, check_name
from tables import display_width
from token_files import FORMAT, SPLITS, open_tokens
from tokenizer import Tokenizer, load_tokenizer

LONGEST = 1 << 14  # tokens of a document that are shown
BLOCK = 1 << 20  # tokens that are searched for the end of a document at a time


@dataclass(frozen=True)
class LookConfig:
    data: Path = flag(positional=True, help="what `pretrain`, `sft` or `preferences` wrote, or one file of it")
    split: str = flag("train", "which half of it", choices=SPLITS)
    start: int = flag(0, "number of the first to show, from 0")
    count: int = flag(3, "how many to print where the output is no terminal")
    tokenizer: Path | None = flag(None, "tokenizer directory: show conversations as tokens, with the loss mask")
    template: str | None = flag(None, "chat template; default: the tokenizer's own", choices=(*TEMPLATES, "jinja"))
    tokens: bool = flag(False, "show where each token ends")
    random: bool = flag(False, "draw by chance; --start and numbers then name a draw")
    seed: int = flag(0, "of the draws")

    def problems(self) -> list[str]:
        wrong = [f"--{name} {getattr(self, name)}: needs 0 or more" for name in ("start", "count") if getattr(self, name) < 0]
        return wrong + (["--template needs --tokenizer"] if self.template and not self.tokenizer else [])


# ----------------------------------------------------------------------------------------------------------------------
# Two kinds of files. Both give positions (of tokens, of bytes), and read what starts at one.


class Documents:
    """The documents of a token file: each ends with eos."""

    def __init__(self, path: Path, config: LookConfig):
        self.data = open_tokens(path, config.split)
        if self.data is None:
            raise UserError(f"{path} has no {config.split} split")
        folder = config.tokenizer or (self.data.path.parent if "eos_id" in self.data.meta else None)
        if folder is None:
            raise UserError(f"{path} is a bare token file: name its tokenizer with --tokenizer")
        if config.template:
            raise UserError(f"{path} is token data: --template is for conversations")
        self.tokenizer = load_tokenizer(folder)
        self.data.check_model(self.tokenizer.fingerprint, len(self.tokenizer))
        self.eos, self.size, self.path = self.data.meta.get("eos_id", self.tokenizer.eos_id), len(self.data), self.data.path
        if self.eos is None:
            raise UserError(f"{folder} has no eos token, so there is no telling where documents end")
        self.starts, self.unit = array("q", [0]), "token"
        self.searched = 0  # up to which token `starts` is complete

    def position(self, number: int) -> int | None:
        """Where document `number` starts; None if there are fewer. Reads on from where it has searched so far."""
        while len(self.starts) <= number and self.searched < self.size:
            starts = self.searched + 1 + np.flatnonzero(self.data.tokens[self.searched : self.searched + BLOCK] == self.eos)
            self.starts.extend(starts[starts < self.size].tolist())
            self.searched += BLOCK
        return self.starts[number] if number < len(self.starts) else None

    def after(self, position: int) -> int | None:
        """Where the first document behind a position starts."""
        for at in range(position, self.size, BLOCK):
            ends = np.flatnonzero(self.data.tokens[at : at + BLOCK] == self.eos)
            if ends.size:
                start = at + int(ends[0]) + 1
                return start if start < self.size else None
        return None

    def show(self, position: int, paint: Paint, config: LookConfig) -> tuple[str, str]:
        """(what it is, text) of the document that starts at a position."""
        end = self.after(position) or self.size
        ids = self.data.tokens[position : min(end, position + LONGEST)].tolist()
        cut = end - position - len(ids)
        text = painted_tokens(self.tokenizer, ids, [0] * len(ids), paint, config.tokens)
        return f"{end - position:,} tokens", text + (f"\n… and {cut:,} more tokens" if cut else "")


class Records:
    """Conversations or preferences, one JSON object per line."""

    def __init__(self, path: Path, config: LookConfig):
        self.path, self.size, self.unit = path, path.stat().st_size, "byte"
        self.stream = open(path, "rb")  # noqa: SIM115 (it is open as long as we look)
        self.starts = array("q")
        self.tokenizer = load_tokenizer(config.tokenizer) if config.tokenizer else None
        if config.tokens and not self.tokenizer:
            raise UserError(f"{path} holds text: --tokens needs --tokenizer")
        if self.tokenizer:
            self.template = check_name(self.tokenizer, config.template or self.tokenizer.default_template())

    def position(self, number: int) -> int | None:
        """Where line `number` starts (blank lines do not count); None if there are fewer."""
        while len(self.starts) <= number:
            start = self._filled(self.after(self.starts[-1]) if self.starts else 0)
            if start is None:
                return None
            self.starts.append(start)
        return self.starts[number]

    def after(self, position: int) -> int | None:
        """Where the first line behind a position starts."""
        self.stream.seek(position)
        self.stream.readline()
        return self._filled(self.stream.tell())

    def _filled(self, position: int | None) -> int | None:
        """The position itself, or of the next line that is not blank."""
        if position is None:
            return None
        self.stream.seek(position)
        while line := self.stream.readline():
            if not line.isspace():
                return self.stream.tell() - len(line)
        return None

    def show(self, position: int, paint: Paint, config: LookConfig) -> tuple[str, str]:
        """(what it is, text) of the record that starts at a position; of a bad one, what is wrong with it."""
        self.stream.seek(position)
        what = f"bad record at byte {position:,}"
        try:
            record = json.loads(self.stream.readline().decode("utf-8-sig"))
        except (ValueError, RecursionError):
            return what, paint("not a line of JSON in UTF-8", "red")
        try:
            return self._shown(record, paint, config)
        except UserError as error:  # the template's
            return what, paint(plain(str(error)), "red")
        except (KeyError, TypeError):
            fields = plain(f"; its fields are {', '.join(record)}") if isinstance(record, dict) else ""
            return what, paint(f"neither messages nor a preference as `sft` and `preferences` write them{fields}", "red")

    def _shown(self, record: dict, paint: Paint, config: LookConfig) -> tuple[str, str]:
        """KeyError or TypeError if the record has another layout."""
        if "chosen" in record:
            answers = [paint(name, "bold") + "\n" + paint(plain(record[name]), colour)
                       for name, colour in (("chosen", "green"), ("rejected", "red"))]  # fmt: skip
            return "", "\n\n".join([turns(record["prompt"], paint), *answers])
        if self.tokenizer is None:
            return f"{len(record['messages'])} messages", turns(record["messages"], paint)
        ids, mask = self.tokenizer.render(record["messages"], self.template)
        text = painted_tokens(self.tokenizer, ids, mask, paint, config.tokens)
        return f"{len(ids):,} tokens, {sum(mask):,} trained, template {self.template}", text


def opened(config: LookConfig) -> Documents | Records:
    """What the path holds. UserError that names what is there, if it is no prepared data."""
    path = config.data
    if path.is_file():
        return Documents(path, config) if path.suffix == ".bin" else Records(path, config)
    if not path.exists():
        raise UserError(f"{path} does not exist")
    meta = read_json(path / "meta.json") if (path / "meta.json").is_file() else {}
    lines = path / f"{config.split}.jsonl"
    if meta.get("format") == FORMAT:
        return Documents(path, config)
    if lines.is_file():
        return Records(lines, config)
    if any((path / f"{split}.jsonl").is_file() for split in SPLITS):
        raise UserError(f"{path} has no {config.split} split")
    there = sorted(child.name for child in path.iterdir())
    names = ", ".join(there[:8]) + (f" and {len(there) - 8} more" if len(there) > 8 else "")
    raise UserError(f"{path} is no prepared data (train.bin or train.jsonl): it holds {names or 'nothing'}")


# ----------------------------------------------------------------------------------------------------------------------
# Colours, and what stands for them where there are none

CODES = {"bold": "1", "dim": "2", "inverse": "7", "red": "31", "green": "32", "shade": "48;5;236"}


class Paint:
    """paint("text", "bold", "green") -> the text in escape codes of a terminal; as it is where colour is off."""

    def __init__(self, colour: bool):
        self.colour = colour

    def __call__(self, text: str, *styles: str) -> str:
        if not (self.colour and styles):
            return text
        start = f"\x1b[{';'.join(CODES[style] for style in styles)}m"
        return "\n".join(f"{start}{line}\x1b[0m" if line else "" for line in text.split("\n"))


def plain(text: str) -> str:
    """Text that cannot drive the terminal: control characters and half surrogate pairs are spelt out."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]", lambda match: f"\\u{ord(match[0]):04x}", text)


def turns(messages: list[dict], paint: Paint) -> str:
    """A conversation as text under the names of its roles."""
    return "\n\n".join(paint(plain(message["role"]), "bold") + "\n" + plain(message["content"]) for message in messages)


def painted_tokens(tokenizer: Tokenizer, ids: list[int], mask: list[int], paint: Paint, tokens: bool) -> str:
    """Tokens decoded one by one. Trained ones are green, or in ⟦…⟧; others of a conversation dim; special ones inverse.

    tokens: every other one has a shade, or │ stands between them; · is a token that only begins a character.
    """
    stream = tokenizer.stream(skip_special=False)
    texts = [stream.push(token) for token in ids]
    if texts:
        texts[-1] += stream.flush()
    if tokens:
        texts = [text.replace("\n", "↵\n") or "·" for text in texts]
    special = [token in tokenizer.special_texts for token in ids]
    pieces = list(zip(map(plain, texts), mask, special))
    parts, index = [], 0
    for trained, run in itertools.groupby(pieces, key=lambda piece: piece[1]):
        painted = []
        for is_special, group in itertools.groupby(run, key=lambda piece: piece[2]):
            styles = ("bold", "green") if trained else ("dim",) if any(mask) else ()
            styles += ("inverse",) if is_special else ()
            group = [text for text, _, _ in group]
            for text in group if tokens else ["".join(group)]:
                painted.append(paint(text, *styles, *(("shade",) if tokens and index % 2 else ())))
                index += 1
        text = ("│" if tokens and not paint.colour else "").join(painted)
        parts.append(f"⟦{text}⟧" if trained and not paint.colour else text)
    return ("│" if tokens and not paint.colour else "").join(parts)


# ----------------------------------------------------------------------------------------------------------------------
# Paging


def look(config: LookConfig) -> dict:
    """Show what was prepared. Returns {"shown": how many}."""
    collection = opened(config)
    interactive = sys.stdout.isatty()
    paint = Paint(interactive and not os.environ.get("NO_COLOR"))  # https://no-color.org
    shown, number = 0, config.start
    while interactive or shown < config.count:
        position = find(collection, config, number)
        if position is not None:
            show(collection, config, number, position, paint)
            shown += 1
        elif not shown:
            raise UserError(f"{collection.path} has no number {number:,}: there are {len(collection.starts):,}, counted from 0")
        elif interactive:
            print(f"there is no number {number:,}: the last is {len(collection.starts) - 1:,}")
            number = len(collection.starts) - 1
        else:
            break
        if (number := ask(number) if interactive else number + 1) is None:
            break
    return {"shown": shown}


def find(collection: Documents | Records, config: LookConfig, number: int) -> int | None:
    """Where number `number` starts; with --random, the start behind a position that depends on seed and number alone."""
    if not config.random or not collection.size:
        return collection.position(number)
    position = random.Random(f"{config.seed} {number}").randrange(collection.size)
    return collection.after(position) or collection.position(0)


def show(collection: Documents | Records, config: LookConfig, number: int, position: int, paint: Paint) -> None:
    what, text = collection.show(position, paint, config)
    name = f"draw {number:,}, {collection.unit} {position:,}" if config.random else f"{number:,}"
    title = f"── {collection.path}: {name}" + (f" · {what}" if what else "") + " "
    print(paint(title + "─" * max(2, shutil.get_terminal_size().columns - display_width(title)), "bold"))
    print(text + "\n")


def ask(number: int) -> int | None:
    """What to show next: a number, or None to end."""
    while True:
        try:
            answer = input("Enter: next, p: previous, a number, q: quit > ").strip().lower()
        except (EOFError, KeyboardInterrupt):
            print()
            return None
        if answer == "q":
            return None
        if answer in ("", "p") or answer.isdecimal():
            return number + 1 if not answer else max(0, number - 1) if answer == "p" else int(answer)
