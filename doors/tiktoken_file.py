"""Llama-3's tokenizer.model: a tiktoken rank file, read as the tokenizer.json that says the same.

The file is text: a line for each token, its bytes in base64, a space, its rank. The rank is the token's id and, the lower the
sooner, the order in which byte pair encoding makes it: of all neighbours in a word whose bytes together are a token, tiktoken
merges the pair of the lowest rank. All else stands in Meta's code (llama-models, models/llama3/tokenizer.py) and here:

    words       a regular expression cuts the text; nothing merges across a cut, and a word that is a token is that token
    specials    256 names, whose ids follow the ranks: `special_names`

tokenizer.json instead lists pairs, the most urgent first: every way to cut a token into two tokens, by the rank of the whole.
(Where one token could arise at two overlapping places from different pairs, tiktoken takes the left one and tokenizers the pair
that is listed first. Hugging Face's own Llama-3 files are made so too, and no text is known where it matters.)
"""

from __future__ import annotations

from settings import UserError, read_json

import base64
import binascii
import json
import re
import tempfile
from pathlib import Path

from chat_template import TEMPLATES, jinja_text
from tokenizer import Tokenizer, load_tokenizer

SPECIALS = 256
# Contractions; a word with one character before it; up to three digits; other signs; line ends; space, that before a word apart.
WORDS = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
BOS, EOS = "<|begin_of_text|>", "<|end_of_text|>"

# GPT-2's spelling of bytes as characters: printable ones stand for themselves, the others for 256, 257, … in order.
_PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_SPELLED = {byte: chr(byte) for byte in _PRINTABLE}
_SPELLED |= {byte: chr(256 + i) for i, byte in enumerate(sorted({*range(256)} - {*_PRINTABLE}))}


def is_ranks(path: Path) -> bool:
    """Whether a file looks like tiktoken ranks: its first line is base64 and a number."""
    with Path(path).open("rb") as file:
        return re.fullmatch(rb"[A-Za-z0-9+/]+={0,2} \d+\r?\n?", file.readline(400)) is not None


def read_ranks(path: Path) -> list[bytes]:
    """The bytes of every token, by rank. Raises UserError naming the line that is no token, and ranks missing or given twice."""
    ranks: dict[int, bytes] = {}
    for number, line in enumerate(Path(path).read_bytes().splitlines(), 1):
        try:
            word, rank = line.split()
            token, rank = base64.b64decode(word, validate=True), int(rank)
        except (ValueError, binascii.Error):
            raise UserError(f"{path}:{number}: not a token in base64 and its rank; the file is damaged: copy it again") from None
        if rank in ranks or not token:
            raise UserError(f"{path}:{number}: {'rank ' + str(rank) + ' for the second time' if token else 'an empty token'}")
        ranks[rank] = token
    missing = next((rank for rank in range(len(ranks)) if rank not in ranks), None)
    if missing is not None:
        raise UserError(f"{path}: no token has rank {missing} and {len(ranks)} have others; it may be truncated: copy it again")
    tokens = [ranks[rank] for rank in range(len(ranks))]
    if len(set(tokens)) < len(tokens):
        raise UserError(f"{path}: some token has two ranks")
    return tokens


def special_names(release: str) -> list[str]:
    """The texts of the 256 special tokens, in the order of their ids. release: "3", or "3.1" for all that came after."""
    reserved = "<|reserved_special_token_{}|>".format
    header = ["<|start_header_id|>", "<|end_header_id|>"]
    if release == "3":
        named = [BOS, EOS, *map(reserved, range(4)), *header, reserved(4), "<|eot_id|>"]
        following = 5
    else:
        named = [BOS, EOS, reserved(0), reserved(1), "<|finetune_right_pad_id|>", reserved(2), *header, "<|eom_id|>", "<|eot_id|>",
                 "<|python_tag|>"]  # fmt: skip
        following = 3
    return named + [reserved(following + i) for i in range(SPECIALS - len(named))]


def merges_of(tokens: list[bytes]) -> list[tuple[bytes, bytes]]:
    """The pairs to merge, the most urgent first: all cuts of a token into two, the cuts by the ranks of their parts."""
    rank_of = {token: rank for rank, token in enumerate(tokens)}
    merges = []
    for token in tokens:
        cuts = ((token[:i], token[i:]) for i in range(1, len(token)))
        merges += sorted(((left, right) for left, right in cuts if left in rank_of and right in rank_of),
                         key=lambda pair: (rank_of[pair[0]], rank_of[pair[1]]))  # fmt: skip
    return merges


def tokenizers_json(tokens: list[bytes], specials: list[str]) -> dict:
    """The content of a tokenizer.json that gives the same ids; BOS goes before every text, as in Hugging Face's Llama-3."""

    def spell(token: bytes) -> str:
        return "".join(_SPELLED[byte] for byte in token)

    def with_bos(sequence: str, type_id: int) -> list[dict]:
        return [{"SpecialToken": {"id": BOS, "type_id": type_id}}, {"Sequence": {"id": sequence, "type_id": type_id}}]

    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    added = [{"id": len(tokens) + i, "content": name, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
              "special": True} for i, name in enumerate(specials)]  # fmt: skip
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": WORDS}, "behavior": "Isolated", "invert": False}, byte_level]},
        "post_processor": {"type": "Sequence", "processors": [{**byte_level, "trim_offsets": False, "use_regex": True}, {
            "type": "TemplateProcessing", "single": with_bos("A", 0), "pair": with_bos("A", 0) + with_bos("B", 1),
            "special_tokens": {BOS: {"id": BOS, "ids": [len(tokens) + specials.index(BOS)], "tokens": [BOS]}}}]},
        "decoder": byte_level,
        "model": {
            "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None, "end_of_word_suffix": None,
            "fuse_unk": False, "byte_fallback": False, "ignore_merges": True,
            "vocab": {spell(token): rank for rank, token in enumerate(tokens)},
            "merges": [f"{spell(left)} {spell(right)}" for left, right in merges_of(tokens)],
        },
    }  # fmt: skip


def load_ranks(path: Path, release: str) -> Tokenizer:
    """A rank file as one of Cria's tokenizers, with the names of `release` ("3" or "3.1") and Llama-3's chat template.

    The file says nothing of either: the base model and Instruct share it, and so do all releases.
    """
    content = tokenizers_json(read_ranks(path), special_names(release))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": BOS, "eos_token": EOS,
              "chat_template": jinja_text(TEMPLATES["llama3"])}  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:  # load_tokenizer reads files, and keeps what it has read
        for name, data in (("tokenizer.json", content), ("tokenizer_config.json", config)):
            (Path(folder) / name).write_text(json.dumps(data, ensure_ascii=False), encoding="utf-8")
        return load_tokenizer(folder)


def write_ranks(folder: Path) -> None:
    """Beside a tokenizer.json that was made from a rank file, write that file again, tokenizer.model, for Meta's programs.

    Any other tokenizer.json is left alone: other special tokens, or merges that do not follow from ranks.
    """
    file, target = folder / "tokenizer.json", folder / "tokenizer.model"
    if target.exists() or not file.exists():
        return
    content = read_json(file)
    model, spelled = content["model"], {char: byte for byte, char in _SPELLED.items()}
    if not model.get("ignore_merges") or not all(set(piece) <= spelled.keys() for piece in model["vocab"]):
        return
    tokens = [bytes(spelled[char] for char in piece) for piece in sorted(model["vocab"], key=model["vocab"].get)]
    merges = [tuple(merge.split(" ") if isinstance(merge, str) else merge) for merge in model["merges"]]
    names = {token["id"]: token["content"] for token in content["added_tokens"]}
    same = ([tuple("".join(_SPELLED[byte] for byte in part) for part in pair) for pair in merges_of(tokens)] == merges
            and sorted(names) == list(range(len(tokens), len(tokens) + SPECIALS)))  # fmt: skip
    if same:
        target.write_bytes(b"".join(base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(tokens)))
