"""What one does with tokenizers besides encoding: train one on text, look at its tokens, compare several.

The commands stand in tokenizer.py; this is how they work.

Training is byte pair encoding by sentencepiece. Starting from characters, it merges the most frequent pair of neighbours
into a new token, again and again, until the vocabulary is full. Rare characters (beyond `coverage` of all) and newlines
are spelled as bytes, so nothing is ever unknown; digits stay single, so that numbers look alike to the model.
"""

from __future__ import annotations

from settings import UserError, flag, read_json

import io
import itertools
import json
import re
import time
import zlib
from dataclasses import dataclass
from pathlib import Path

import sentencepiece

from files import file_sha256, utf8_lines
from sentencepiece_model import SPACE
from tables import print_table

SPARE_SPECIALS = 12  # ids kept free, so that a later stage can add a special token without resizing the model
OUR_SPECIALS = ["<|im_start|>", "<|im_end|>", *(f"<|spare_{i}|>" for i in range(SPARE_SPECIALS))]
NOT_LEARNED = 256 + 3 + len(OUR_SPECIALS)  # bytes; <unk>, <s>, </s>; ours
LINE_CHARS = 4096  # longer lines are trained on in stretches of this many characters
RESERVED = {0x2581: " ", 0x2585: " "}  # sentencepiece skips whole lines that hold its marks for space and unknown
MEASURE_CHARS = 2_000_000  # characters per token are measured on the first so many characters

# ----------------------------------------------------------------------------------------------------------------------
# Training.


@dataclass(frozen=True)
class TrainConfig:
    input: tuple[str, ...] = flag(help="plain text, or .jsonl with text or messages")
    out: Path = flag(help="new directory for the tokenizer")
    vocab_size: int = flag(6400, "tokens, special ones and bytes included")
    coverage: float = flag(0.9995, "share of the characters that get a token; rarer ones are spelled as bytes")
    max_piece_length: int = flag(16, "characters in the longest token")
    sample_mb: int = flag(256, "of larger inputs, train on a sample this big: memory grows with it")

    def problems(self) -> list[str]:
        checks = {
            f"--vocab-size {self.vocab_size} leaves no room beside 256 bytes, {NOT_LEARNED - 256} specials":
                self.vocab_size > NOT_LEARNED,
            f"--coverage {self.coverage} is not between 0.9 and 1": 0.9 <= self.coverage <= 1,
            f"--max-piece-length {self.max_piece_length} is not between 1 and 512": 1 <= self.max_piece_length <= 512,
            f"--sample-mb {self.sample_mb} is less than 1": self.sample_mb >= 1,
        }  # fmt: skip
        return [problem for problem, fine in checks.items() if not fine]


def training_settings(config: TrainConfig) -> dict:
    """What the result depends on, for args.json; under "run" what is not a setting."""
    files = [{"name": Path(path).name, "sha256": file_sha256(path)} for path in config.input]
    return {"vocab_size": config.vocab_size, "coverage": config.coverage, "max_piece_length": config.max_piece_length,
            "sample_mb": config.sample_mb, "run": {"files": files}}  # fmt: skip


def already_made(out: Path, settings: dict, sources: str) -> bool:
    """Whether `out` holds the result of these very settings. Raises UserError if it holds anything else.

    sources: what settings["run"] tells of, as the message calls it.
    """
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    if not (out / "args.json").is_file() or not (out / "tokenizer.model").is_file():
        raise UserError(f"{out} already exists and holds something else; choose another --out or remove it")
    stored = read_json(out / "args.json")
    different = [f"the {sources} differs" if key == "run" else f"{key} was {stored.get(key)} and is now {value}"
                 for key, value in settings.items() if stored.get(key) != value]  # fmt: skip
    if different:
        raise UserError(f"{out} already holds another tokenizer ({'; '.join(different)}); choose another --out or "
                        "remove it")
    print(f"{out} already holds this tokenizer (same input, same settings); nothing to do")
    return True


def text_size(inputs) -> tuple[int, int]:
    """(characters, UTF-8 bytes) of the training text. Reads all of it: every mistake in the input is found here."""
    characters = size = 0
    for path in inputs:
        before = characters
        for line in training_lines(path):
            characters += len(line)
            size += len(line.encode())
        if characters == before:
            raise UserError(f"{path} holds no text")
    return characters, size


def train_bpe(config: TrainConfig, characters: int, size: int) -> bytes:
    """Learn a vocabulary; returns the content of a tokenizer.model. The same text and settings give the same bytes.

    characters, size: of the text, as `text_size` measures it. Memory grows with the text up to `sample_mb` MB; of more
    text an even, reproducible sample of lines is used. Raises UserError if the text is too small for the vocabulary.
    """
    print(f"training on {characters:,} characters ({size / 1e6:.2f} MB) of {len(config.input)} "
          f"file{'s' if len(config.input) > 1 else ''}", flush=True)
    share = config.sample_mb * 1e6 / size
    if share < 1:
        print(f"using an even sample of the lines, {config.sample_mb} MB (--sample-mb)")

    def sentences():
        for line in itertools.chain.from_iterable(map(training_lines, config.input)):
            if share >= 1 or zlib.crc32(line.encode()) < share * 2**32:
                for start in range(0, len(line), LINE_CHARS):
                    yield line[start : start + LINE_CHARS].translate(RESERVED)

    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=sentences(), model_writer=model, model_type="bpe", vocab_size=config.vocab_size,
            character_coverage=config.coverage, max_sentencepiece_length=config.max_piece_length, byte_fallback=True,
            split_digits=True, control_symbols=OUR_SPECIALS,  # "control": plain text never maps to them
            required_chars=SPACE,  # Chinese text may hold no space; spelled as bytes it would decode to a visible ▁
            normalization_rule_name="identity", add_dummy_prefix=False, remove_extra_whitespaces=False,  # lossless
            shuffle_input_sentence=False, max_sentence_length=8 * LINE_CHARS,
            num_threads=1,  # more gain nothing in BPE, and the number is stored in the file
            minloglevel=2,
        )  # fmt: skip
    except RuntimeError as error:
        raise UserError(_training_mistake(str(error), config.vocab_size)) from None
    return model.getvalue()


def _training_mistake(message: str, vocab_size: int) -> str:
    """sentencepiece's complaint in the terms of our flags."""
    if match := re.search(r"value <= (\d+)", message):
        return (f"--vocab-size {vocab_size} is too large for this text: it yields at most {match[1]} tokens; give a "
                f"smaller size (at most {match[1]}) or more text")
    if match := re.search(r"required_chars\. \d+ vs (\d+)", message):
        return (f"--vocab-size {vocab_size} is too small: the text's characters, 256 bytes and the special tokens need "
                f"{match[1]}; give at least that, or a lower --coverage to spell rare characters as bytes")
    return f"sentencepiece could not train: {message}"


def training_lines(path):
    """The lines that hold text in a text file, or in the records of a .jsonl file: their "text", or the contents of
    their "messages". sentencepiece learns from lines; a newline itself is always spelled as a byte."""
    for number, line in utf8_lines(path):
        for text in _record_texts(path, number, line) if str(path).endswith(".jsonl") else [line]:
            for part in text.split("\n"):
                if part.strip():
                    yield part.rstrip("\r")


def _record_texts(path, number: int, line: str) -> list[str]:
    if not line.strip():
        return []
    try:
        record = json.loads(line)
        texts = [record["text"]] if "text" in record else [message["content"] for message in record["messages"]]
        "".join(texts).encode()
        return texts
    except json.JSONDecodeError as error:
        problem = f"not valid JSON: {error.msg}"
    except UnicodeEncodeError:
        problem = "holds half a character (a lone surrogate such as \\ud800)"
    except (KeyError, TypeError):
        problem = f'needs a "text", or "messages" with their "content"; the record is {line.strip():.60}'
    raise UserError(f"{path}:{number}: {problem}")


def report_training(tokenizer, config: TrainConfig, seconds: float) -> None:
    print(f"trained in {seconds:.1f} s: {len(tokenizer):,} tokens ({NOT_LEARNED - 256} special, 256 bytes, "
          f"{len(tokenizer) - NOT_LEARNED:,} learned)")
    characters = tokens = 0
    for line in itertools.chain.from_iterable(map(training_lines, config.input)):
        characters += len(line)
        tokens += len(tokenizer.encode(line))
        if characters > MEASURE_CHARS:
            break
    longest = sorted(range(len(tokenizer)), key=lambda token_id: len(tokenizer.decode([token_id])))[-6:]
    print(f"{characters / tokens:.2f} characters per token on this text; longest pieces: "
          f"{' '.join(map(tokenizer.id_to_piece, longest))}")
    print(f"saved in {config.out}\nnext: python tokenizer.py show --tokenizer {config.out} --text \"…\"")


# ----------------------------------------------------------------------------------------------------------------------
# Looking at tokenizers.


@dataclass(frozen=True)
class ShowConfig:
    tokenizer: Path = flag(help="tokenizer directory or file")
    text: str = flag(help="the text")


@dataclass(frozen=True)
class CompareConfig:
    tokenizer: tuple[str, ...] = flag(help="tokenizer directories or files")
    input: Path = flag(help="text file")


def show(tokenizer, text: str) -> None:
    """Print one line per token: position, id, piece, bytes, decoded text."""
    ids, rows = tokenizer.encode(text), []
    for position, token_id in enumerate(ids):
        data = tokenizer.token_bytes[token_id]
        decoded = repr(data.decode()) if _is_utf8(data) else "(part of a character)"
        rows.append((position, token_id, _visible(tokenizer.id_to_piece(token_id)), data.hex(" "), decoded))
    print_table(("#", "id", "piece", "bytes", "text"), rows, right=(0, 1))
    print(f"{len(ids)} tokens, {len(text)} characters, {len(text.encode())} bytes"
          + (f": {len(text) / len(ids):.2f} characters per token" if ids else ""))
    if tokenizer.decode(ids) != text:
        print("decoding does not give the text back: this model normalises its input")


def compare(tokenizers: dict, text_file) -> list[dict]:
    """Print how several tokenizers (name -> Tokenizer) do on one file, and return the rows."""
    totals = [dict(tokens=0, broken=0, seconds=0.0, lossless=True) for _ in tokenizers]
    broken = [{i for i, data in enumerate(tokenizer.token_bytes) if not _is_utf8(data)}
              | {*tokenizer.special_tokens.values()} for tokenizer in tokenizers.values()]  # fmt: skip
    characters = size = 0
    for chunk in _chunks(text_file):
        characters += len(chunk)
        size += len(chunk.encode())
        for tokenizer, total, broken_ids in zip(tokenizers.values(), totals, broken):
            started = time.perf_counter()
            ids = tokenizer.encode(chunk)
            total["seconds"] += time.perf_counter() - started
            total["tokens"] += len(ids)
            total["broken"] += sum(token_id in broken_ids for token_id in ids)
            # U+2581 is how sentencepiece spells a space: the one character that cannot come back.
            total["lossless"] &= tokenizer.decode(ids) == chunk or SPACE in chunk
    results = []
    for (name, tokenizer), total in zip(tokenizers.items(), totals):
        tokens = max(1, total["tokens"])
        results.append(dict(
            tokenizer=name, vocabulary=len(tokenizer), tokens=total["tokens"], chars_per_token=characters / tokens,
            tokens_per_char=tokens / characters, bytes_per_token=size / tokens, broken=total["broken"] / tokens,
            mb_per_s=size / 1e6 / max(total["seconds"], 1e-9), lossless=total["lossless"],
        ))  # fmt: skip
    print(f"{text_file}: {characters:,} characters, {size:,} bytes")
    print_table(
        ("tokenizer", "vocabulary", "tokens", "chars/token", "tokens/char", "bytes/token", "broken", "MB/s",
         "lossless"),
        [(row["tokenizer"], f"{row['vocabulary']:,}", f"{row['tokens']:,}", f"{row['chars_per_token']:.3f}",
          f"{row['tokens_per_char']:.3f}", f"{row['bytes_per_token']:.3f}", f"{row['broken']:.2%}",
          f"{row['mb_per_s']:.1f}", "yes" if row["lossless"] else "no") for row in results],
        right=range(1, 8),
    )  # fmt: skip
    print("broken: tokens that are unknown or only part of a character")
    return results


def _chunks(path):
    """A text file in stretches of about 64 KiB, cut at line ends."""
    lines, length = [], 0
    for _, line in utf8_lines(path):
        lines.append(line)
        length += len(line)
        if length >= 1 << 16:
            yield "".join(lines)
            lines, length = [], 0
    if lines:
        yield "".join(lines)


def _is_utf8(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


def _visible(text: str) -> str:
    return "".join(char if char.isprintable() else f"\\u{ord(char):04x}" for char in text)
