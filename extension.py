"""A larger vocabulary for a tokenizer: the pieces of a Chinese sentencepiece model behind those of Llama's.

Llama-2 has pieces for 700 Chinese characters; it spells the others as three bytes each, so that a Chinese text takes more
tokens than it has characters. `python tokenizer.py extend` appends what a model trained on Chinese has learned. A
tokenizer.model is a list of pieces in a protobuf message, and appending to a list there is appending bytes to the file
(sentencepiece_model.piece_records): every old piece keeps its id, its score, and even its bytes.

Byte pair encoding merges, again and again, the neighbours that make the piece of the best score, the leftmost of equals.
So the scores of the new pieces decide what happens to old text. Here they lie below all old ones, each below the one
before. Three things follow, of which tests/test_extension.py checks each on the real models:

  * The old merges all come first. A text's new segmentation is its old one with some neighbours joined; a text that holds
    no new piece is encoded as before. With `--keep cjk` that is every text without a Chinese character.
  * No two pieces are equally urgent, so a tokenizer.json, a list of merges that knows no ties, gives the same ids. (The
    scores of 0 that Chinese-LLaMA gave let new pieces go before every old one, and the leftmost of all first: of the same
    pieces with those scores, transformers encodes three lines in ten of real text unlike sentencepiece.)
  * A model trained as BPE keeps its own order of merging among the new pieces.

A piece that cannot be produced is a row of the embedding that is never read. Which ones these are is found by encoding
each piece alone, and that is exact:

    In any run, look at the characters of one stretch until they become the one symbol p. No merge crosses the borders of
    the stretch, or p would not come about. Each merge inside it was the best (or leftmost best) of all pairs, so also of
    those inside; hence the run on p alone merges the same pairs in the same order, and ends with p. Conversely, p alone
    is a text. So p ever appears, even in the course of a merge, if and only if p alone is encoded as p.

    And what never appears even in passing is never merged with anything: without it, all runs are the same. So dead
    pieces are left out (--keep-dead keeps them), and no other piece dies of that.

"Alone" means behind other text, without the space that Llama puts before a text. sentencepiece splits a text into
characters first, whether or not it knows them; a tokenizer.json splits unknown ones into bytes. So a piece is added only
if each of its characters is a piece too.
"""

from __future__ import annotations

from settings import UserError, flag

import struct
from dataclasses import dataclass, field
from pathlib import Path

import sentencepiece

from sentencepiece_model import CONTROL, NORMAL, SPACE, USER_DEFINED, piece_records, read_sentencepiece
from tables import print_table
from tokenizer_tools import training_lines

# Unicode blocks: radicals, punctuation, kana, ideographs; compatibility ideographs; forms for vertical text; full width;
# the two planes of rare ideographs.
CJK_BLOCKS = ((0x2E80, 0x9FFF), (0xF900, 0xFAFF), (0xFE30, 0xFE4F), (0xFF00, 0xFFEF), (0x20000, 0x3FFFF))
SHARED_PUNCTUATION = "·—‘’“”…"  # Chinese marks that have no code point of their own

ALREADY = "already there"
SPECIAL = "special pieces and bytes"
NO_CHARACTER = "a character in it has no piece"
DEAD = "can never be produced"


@dataclass(frozen=True)
class ExtendConfig:
    base: Path = flag(help="the tokenizer to extend: a directory with tokenizer.model, or such a file")
    out: Path = flag(help="new directory for the tokenizer")
    new: Path | None = flag(None, "the sentencepiece model whose pieces are added: a directory or a file")
    specials: tuple[str, ...] = flag((), 'special tokens to add, such as "<|im_start|>" "<|im_end|>"')
    keep: str = flag("cjk", "which new pieces: Chinese throughout, or also those with spaces, Latin letters, digits …",
                     choices=("cjk", "all"))  # fmt: skip
    keep_dead: bool = flag(False, "also add pieces that can never be produced")
    text: Path | None = flag(None, "measure tokens per character before and after on this text (.txt or .jsonl)")

    def problems(self) -> list[str]:
        problems = [f"--specials {text!r} is no usable token: it {mistake}" for text in self.specials
                    if (mistake := _special_mistake(text))]  # fmt: skip
        twice = {text for text in self.specials if self.specials.count(text) > 1}
        problems += [f"--specials names {text!r} twice" for text in sorted(twice)]
        if self.new is None and not self.specials:
            problems.append("nothing to add: give --new, --specials or both")
        return problems


def _special_mistake(text: str) -> str:
    if not text.strip():
        return "is empty"
    if any(char.isspace() or not char.isprintable() for char in text):
        return "holds a space, a newline or another sign that nobody sees, where programs disagree"
    return f"holds a {SPACE}, which stands for a space" if SPACE in text else ""


@dataclass(frozen=True)
class Extension:
    """A tokenizer.model with pieces added, and what became of the others."""

    data: bytes
    added: list  # (text, score, type), in the order of their ids
    skipped: dict[str, list[str]] = field(default_factory=dict)  # reason -> pieces


def is_cjk(char: str) -> bool:
    return any(first <= ord(char) <= last for first, last in CJK_BLOCKS)


def extend_model(base: bytes, new_pieces=(), *, specials=(), outside=(), keep: str = "cjk",
                 keep_dead: bool = False) -> Extension:  # fmt: skip
    """Append to the bytes of a tokenizer.model the pieces that it lacks, then `specials` as control pieces.

    new_pieces: (text, score, type), the most urgent first.
    outside: texts of the tokens that the tokenizer already has behind those of its model, by id. They move into it first,
    so that their ids stay.
    """
    old = read_sentencepiece(base)
    skipped = {}
    base += piece_records((text, 0.0, CONTROL) for text in outside)
    known = {text for text, _, _ in old.pieces} | {*outside, *specials}
    alphabet = {text for text, _, kind in old.pieces if kind == NORMAL and len(text) == 1}
    candidates = []
    for text, _, kind in new_pieces:
        usable = kind in (NORMAL, USER_DEFINED)
        reason = SPECIAL if not usable else ALREADY if text in known else _foreign(text) if keep == "cjk" else ""
        if reason:
            skipped.setdefault(reason, []).append(text)
        else:
            candidates.append(text)
            known.add(text)
    alphabet |= {text for text in candidates if len(text) == 1}
    alphabet.discard("\n")  # dead_pieces relies on it
    if spelled := [text for text in candidates if not alphabet.issuperset(text)]:
        skipped[NO_CHARACTER] = spelled
        candidates = [text for text in candidates if alphabet.issuperset(text)]

    lowest = min((score for _, score, kind in old.pieces if kind == NORMAL), default=0.0)
    first_id = len(old.pieces) + len(outside)
    dead = dead_pieces(base + piece_records(_scored(candidates, lowest)), range(first_id, first_id + len(candidates)))
    if candidates:
        skipped[DEAD] = dead
    if not keep_dead:
        gone = set(dead)
        candidates = [text for text in candidates if text not in gone]
    added = _scored(candidates, lowest) + [(text, 0.0, CONTROL) for text in specials]
    return Extension(base + piece_records(added), added, skipped)


def _foreign(text: str) -> str:
    """Why a piece is not Chinese throughout, or ''."""
    if SPACE in text:
        return f"holds {SPACE}"
    if any(char.isdigit() for char in text if not is_cjk(char)):
        return "holds a digit"
    if any(char.isalpha() for char in text if not is_cjk(char)):
        return "holds letters of another script"
    if not any(map(is_cjk, text)) or not all(is_cjk(char) or char in SHARED_PUNCTUATION for char in text):
        return "holds other signs"
    return ""


def _scored(texts: list[str], lowest: float) -> list[tuple[str, float, int]]:
    """Pieces with scores below `lowest` and falling: the next float32, and the next. (Llama-2's lowest is -1e9, that of
    long runs of spaces, where float32 no longer tells whole numbers apart.)"""
    bits = struct.unpack("<I", struct.pack("<f", min(lowest, -1.0)))[0]  # of negative floats, the next bits are lower
    return [(text, struct.unpack("<f", struct.pack("<I", bits + i))[0], NORMAL) for i, text in enumerate(texts, 1)]


def dead_pieces(data: bytes, ids) -> list[str]:
    """Those of the pieces that no text is ever encoded to; the reasoning is at the top of this file."""
    processor = sentencepiece.SentencePieceProcessor(model_proto=data)
    before = processor.encode("\n")  # no piece holds a newline, so nothing merges across it
    texts = [processor.id_to_piece(i) for i in ids]
    encoded = processor.encode(["\n" + text.replace(SPACE, " ") for text in texts])
    return [text for text, token_id, found in zip(texts, ids, encoded) if found != [*before, token_id]]


def check_base(path: Path, model) -> None:
    """Raises UserError where a SentencePieceModel cannot keep the promises above."""
    if not model.is_bpe:
        raise UserError(f"{path} is a unigram model: its scores are probabilities of one another, so that added pieces "
                        "would change how every text is encoded; extend a BPE model, as those of Llama are")
    if model.charsmap or model.remove_extra_whitespaces:
        raise UserError(f"{path} normalises its text (its pieces do not say which texts they stand for); extend a model "
                        "that does not, as those of Llama")
    if any("\n" in text for text, _, kind in model.pieces if kind != CONTROL):
        raise UserError(f"{path} has pieces with a newline; what follows one then depends on what stands before it, and "
                        "extend cannot keep it as it is")


# ----------------------------------------------------------------------------------------------------------------------
# Measuring and reporting.


def compare_tokens(old, new, text_file) -> dict:
    """How two tokenizers do on the lines of a text (.txt, or .jsonl with "text" or "messages").

    Returns characters, tokens_before, tokens_after, before and after (tokens per character), and of the lines without
    a Chinese character: other_lines, and other_changed, those that are encoded differently now.
    """
    found = dict(characters=0, tokens_before=0, tokens_after=0, other_lines=0, other_changed=0)
    for line in training_lines(text_file):
        before, after = old.encode(line), new.encode(line)
        found["characters"] += len(line)
        found["tokens_before"] += len(before)
        found["tokens_after"] += len(after)
        if not any(map(is_cjk, line)):
            found["other_lines"] += 1
            found["other_changed"] += before != after
    if not found["characters"]:
        raise UserError(f"{text_file} holds no text")
    found["before"] = found["tokens_before"] / found["characters"]
    found["after"] = found["tokens_after"] / found["characters"]
    return found


def report_extension(config: ExtendConfig, old, new, extension: Extension, seconds: float) -> None:
    """Print what came of it. old, new: the tokenizers before and after."""
    learned = sum(kind == NORMAL for _, _, kind in extension.added)
    if plain := [text for text in config.specials if text.isalnum()]:
        print(f"notice: {', '.join(plain)} of --specials are plain words: transformers and llama.cpp will read them in plain text as the "
              "special tokens; brackets such as <|…|> keep the two apart")
    if not extension.added:
        print(f"notice: nothing was added; {config.out} is a copy of {config.base}")
    if there := [text for text in config.specials if text in old.special_tokens]:
        print(f"special tokens that {config.base} already has: {' '.join(there)}")
    print(f"{config.base}: {len(old):,} tokens; {config.out}: {len(new):,} ({learned:,} new pieces, "
          f"{len(extension.added) - learned} special tokens), in {seconds:.1f} s")
    rows = [("added" if reason == DEAD and config.keep_dead else "left out", reason, f"{len(pieces):,}",
             " ".join(pieces[:8])) for reason, pieces in extension.skipped.items()]  # fmt: skip
    if rows:
        print_table(("", "pieces of the new model", "number", "such as"), rows, right=(2,))
    if config.text:
        found = compare_tokens(old, new, config.text)
        print(f"{config.text}: {found['characters']:,} characters, {found['before']:.3f} tokens per character before, "
              f"{found['after']:.3f} after ({found['tokens_after'] / found['tokens_before'] - 1:+.1%} tokens)")
        same = found["other_lines"] - found["other_changed"]
        print(f"of {found['other_lines']:,} lines without a Chinese character, {same:,} are encoded as before")
    padded = -(-len(new) // 64) * 64
    hint = f" --multiple-of 64 (then {padded:,} rows: such matrices multiply faster)" if padded != len(new) else ""
    print(f"saved in {config.out}\nnext: python convert.py resize-vocab --model MODEL --tokenizer {config.out} --out NEW"
          f"{hint}")
