"""What a sentencepiece `tokenizer.model` holds, how to write one, and the same vocabulary as a `tokenizer.json`.

sentencepiece's Python package encodes and decodes, but tells little of what is in the file. The file is a protobuf
message, a format simple enough to read and to write in a page of code (`protobuf_fields`, `protobuf_message`).
"""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # sentencepiece's piece types
SPACE = "\u2581"  # ▁, how a piece spells a space


@dataclass(frozen=True)
class SentencePieceModel:
    """What we need of a tokenizer.model. pieces: (text, score, type); the rest decides how text is normalised."""

    pieces: list
    is_bpe: bool
    charsmap: bytes  # a compiled normalisation table such as NFKC's; empty for the identity
    add_dummy_prefix: bool  # "a" is encoded as " a"
    remove_extra_whitespaces: bool


def read_sentencepiece(data: bytes) -> SentencePieceModel:
    """Parse a tokenizer.model (sentencepiece_model.proto: 1 pieces, 2 trainer_spec, 3 normalizer_spec).

    Raises ValueError if it is not one, or not a whole one.
    """
    pieces, trainer, normalizer = [], None, None
    try:
        for number, value in protobuf_fields(data):
            if number == 1:
                piece = {1: b"", 2: bytes(4), 3: NORMAL, **dict(protobuf_fields(value))}
                pieces.append((piece[1].decode(), struct.unpack("<f", piece[2])[0], piece[3]))
            elif number == 2:
                trainer = dict(protobuf_fields(value))
            elif number == 3:
                normalizer = dict(protobuf_fields(value))
    except (AttributeError, TypeError, struct.error):  # a field of another type than the format has
        raise ValueError("not a sentencepiece model") from None
    if not pieces or trainer is None or normalizer is None:
        raise ValueError("truncated" if pieces else "no pieces")
    return SentencePieceModel(
        pieces=pieces,
        is_bpe=trainer.get(3, 1) == 2,
        charsmap=normalizer.get(2, b""),
        add_dummy_prefix=bool(normalizer.get(3, 1)),
        remove_extra_whitespaces=bool(normalizer.get(4, 1)),
    )


def protobuf_fields(data: bytes):
    """(field number, value) of one protobuf message: int for varints, bytes for everything else.

    The format: every field is a varint key, number * 8 + wire type, then the value: 0 a varint, 1 eight bytes,
    2 a varint length and that many bytes, 5 four bytes. Raises ValueError where the bytes do not fit that.
    """
    at = 0

    def varint() -> int:  # seven bits to a byte, the lowest first; the eighth says that more follow
        nonlocal at
        value = shift = 0
        while True:
            if at >= len(data) or shift > 63:
                raise ValueError("truncated")
            byte = data[at]
            at += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value

    while at < len(data):
        key = varint()
        number, wire = key >> 3, key & 7
        if wire == 0:
            yield number, varint()
            continue
        if wire not in (1, 2, 5):
            raise ValueError(f"wire type {wire}")
        size = varint() if wire == 2 else {1: 8, 5: 4}[wire]
        if at + size > len(data):
            raise ValueError("truncated")
        yield number, data[at : at + size]
        at += size


def protobuf_message(*fields: tuple[int, int | float | bool | str | bytes]) -> bytes:
    """The bytes of a message with these (number, value) fields: what protobuf_fields reads. Floats take four bytes."""

    def varint(value: int) -> bytes:
        value &= 2**64 - 1  # a negative number is written as if unsigned, in ten bytes
        low = []
        while value > 0x7F:
            low.append(value & 0x7F | 0x80)
            value >>= 7
        return bytes([*low, value])

    message = []
    for number, value in fields:
        if isinstance(value, float):
            message += [varint(number << 3 | 5), struct.pack("<f", value)]
        elif isinstance(value, int):
            message += [varint(number << 3), varint(value)]
        else:
            data = value.encode() if isinstance(value, str) else value
            message += [varint(number << 3 | 2), varint(len(data)), data]
    return b"".join(message)


def piece_records(pieces) -> bytes:
    """(text, score, type) of every piece as the model file spells them: its field 1, once for each.

    A repeated field may stand anywhere in a message, so these bytes behind those of a whole tokenizer.model are that
    model with pieces added to it, and every old byte is as it was.
    """
    return b"".join(protobuf_message((1, protobuf_message((1, text), (2, float(score)), (3, kind))))
                    for text, score, kind in pieces)  # fmt: skip


def sentencepiece_bytes(pieces, *, add_dummy_prefix: bool, unk_id: int, bos_id: int | None, eos_id: int | None,
                        pad_id: int | None = None, byte_fallback: bool = True) -> bytes:  # fmt: skip
    """A whole tokenizer.model: byte pair encoding with these pieces, [(text, score, type)], and no normalisation.

    The sentencepiece package loads it, provided the pieces suit it: one of type UNKNOWN, all 256 of type BYTE if
    byte_fallback, none twice or empty. The ids are recorded by the texts of their pieces, as that package looks them
    up. Field numbers: sentencepiece_model.proto.
    """
    ids = {40: unk_id, 41: bos_id, 42: eos_id, 43: pad_id}
    trainer = [(3, 2), (4, len(pieces)), (35, byte_fallback)]  # model_type BPE, vocab_size, byte_fallback
    trainer += [(number, -1 if token_id is None else token_id) for number, token_id in ids.items()]
    trainer += [(number + 5, pieces[token_id][0]) for number, token_id in ids.items() if token_id is not None]
    normalizer = [(1, "identity"), (3, add_dummy_prefix), (4, False), (5, True)]  # 4: runs of spaces stay; 5: as ▁
    return piece_records(pieces) + protobuf_message(
        (2, protobuf_message(*trainer)), (3, protobuf_message(*normalizer)))  # fmt: skip


def merges_of(model: SentencePieceModel) -> list[tuple[str, str]]:
    """The pairs that byte pair encoding merges, first the most urgent.

    sentencepiece merges whichever neighbours make the piece of the best score; tokenizers wants the list of pairs in
    order: all splits of every piece into two others, by the score of the piece.
    """
    normal = {text: i for i, (text, _, kind) in enumerate(model.pieces) if kind == NORMAL}
    merges = []
    for text in sorted((text for text in normal if len(text) > 1), key=lambda text: -model.pieces[normal[text]][1]):
        splits = [(text[:i], text[i:]) for i in range(1, len(text)) if text[:i] in normal and text[i:] in normal]
        merges += sorted(splits, key=lambda pair: (normal[pair[0]], normal[pair[1]]))
    return merges


def tokenizers_json(model: SentencePieceModel, pieces: list[str], added_tokens: list[dict], unk: str | None,
                    bos: tuple[str, int] | None) -> bytes | None:  # fmt: skip
    """A `tokenizer.json` that gives the same ids, so that transformers needs no conversion of its own.

    pieces: those of the model and the tokens added to it; bos: text and id if BOS goes before every text.
    None for models whose normalisation or piece types that file cannot express.
    """
    if not model.is_bpe or model.charsmap or model.remove_extra_whitespaces \
            or any(kind == USER_DEFINED for _, _, kind in model.pieces):  # fmt: skip
        return None
    normalizers = [{"type": "Replace", "pattern": {"String": " "}, "content": SPACE}]
    decoders = [{"type": "Replace", "pattern": {"String": SPACE}, "content": " "}, {"type": "ByteFallback"},
                {"type": "Fuse"}]  # fmt: skip
    if model.add_dummy_prefix:
        normalizers.insert(0, {"type": "Prepend", "prepend": SPACE})
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})

    def post_processor(sequence: str, type_id: int) -> list[dict]:
        start = [{"SpecialToken": {"id": bos[0], "type_id": type_id}}] if bos else []
        return [*start, {"Sequence": {"id": sequence, "type_id": type_id}}]

    return (json.dumps({
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added_tokens,
        "normalizer": {"type": "Sequence", "normalizers": normalizers},
        "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing", "single": post_processor("A", 0),
            "pair": post_processor("A", 0) + post_processor("B", 1),
            "special_tokens": {bos[0]: {"id": bos[0], "ids": [bos[1]], "tokens": [bos[0]]}} if bos else {},
        },
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": {
            "type": "BPE", "dropout": None, "unk_token": unk, "continuing_subword_prefix": None,
            "end_of_word_suffix": None, "fuse_unk": True,
            "byte_fallback": any(kind == BYTE for _, _, kind in model.pieces), "ignore_merges": False,
            "vocab": {text: i for i, text in enumerate(pieces)},
            "merges": [f"{left} {right}" for left, right in merges_of(model)],
        },
    }, ensure_ascii=False) + "\n").encode()  # fmt: skip
