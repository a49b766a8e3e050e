"""Text to token ids and back.

    python tokenizer.py train   --input corpus.txt more.jsonl --vocab-size 6400 --out out/tokenizer
    python tokenizer.py extend  --base path/to/llama2 --new out/tokenizer --out out/extended --specials "<|im_end|>"
    python tokenizer.py show    --tokenizer out/tokenizer --text "你好，世界"
    python tokenizer.py compare --tokenizer out/tokenizer path/to/chatglm2 --input corpus.txt

Two engines stand behind one interface. `tokenizer.model` is sentencepiece (our own, Llama-2, ChatGLM2);
`tokenizer.json` is Hugging Face tokenizers (Llama-3 and others; optional package). Two promises hold for both:

  * decode(encode(text)) == text for any Unicode text, U+2581 excepted (sentencepiece writes a space as that character).
    A foreign model that normalises its input or lacks bytes cannot keep it; `compare` says which do.
  * encode() reads its argument as plain text: "</s>" in a user's message is four characters, never the end of a turn.

How conversations become ids stands in chat_template.py; training and comparing in tokenizer_tools.py; adding pieces to a
vocabulary in extension.py.
"""

from __future__ import annotations

from settings import UserError, command_line, read_json

import codecs
import functools
import hashlib
import json
import os
import re
import shutil
import time
from pathlib import Path

import sentencepiece

import chat_template
import tokenizer_tools as tools
from chat_template import TEMPLATES
from extension import ExtendConfig, check_base, extend_model, report_extension
from files import utf8_lines, write_json, written_beside
from sentencepiece_model import CONTROL, SPACE, UNKNOWN, read_sentencepiece, tokenizers_json
from tokenizer_tools import CompareConfig, ShowConfig, TrainConfig, compare, show

__all__ = ["TEMPLATES", "TokenStream", "Tokenizer", "extend", "load_tokenizer", "train", "utf8_lines"]

# ----------------------------------------------------------------------------------------------------------------------
# The interface.


class Tokenizer:
    """What both engines share. An engine fills in `_encode`, `_files`, pieces, bytes and special tokens.

    pieces, token_bytes      each token as the vocabulary spells it, and the bytes of text that it stands for
    bos_id, eos_id, pad_id   int or None
    special_tokens           text of each special token -> id; special_texts: the reverse
    named_specials           {"bos_token": "<s>", …}, as tokenizer_config.json and Jinja templates name them
    add_bos                  documents start with BOS (Llama-2, Llama-3), or not (ours, ChatGLM2)
    template                 name of the chat template that the directory names, "jinja" for a foreign one, or None
    fingerprint              sha256 over pieces, scores or merges, and specials: the same wherever the files lie
    """

    def __init__(self, config: dict, jinja: str | None):
        self.config = config  # tokenizer_config.json as read; {} if there was none
        self.jinja = jinja  # its chat template
        self.pieces: list[str] = []
        self.token_bytes: list[bytes] = []
        self.special_tokens: dict[str, int] = {}
        self.bos_id = self.eos_id = self.pad_id = None
        self.add_bos = False
        self.fingerprint = ""

    def _finish(self) -> None:
        """Derive the rest, once the engine has set pieces and specials."""
        self.special_texts = {token_id: text for text, token_id in self.special_tokens.items()}
        # Llama-2 and ChatGLM2 encode "a" as "▁a": a space that was never in the text, to be taken off again.
        first = self._encode("a")[:1]
        self.dummy_prefix = bool(first) and self.token_bytes[first[0]][:1] == b" "
        self._newline_ids = self._encode("\n")
        ids = {"bos_token": self.bos_id, "eos_token": self.eos_id, "pad_token": self.pad_id}
        given = {key: _token_text(self.config.get(key)) for key in (*ids, "unk_token")}
        self.named_specials = {key: self.special_texts[i] for key, i in ids.items() if i in self.special_texts}
        self.named_specials |= {key: text for key, text in given.items() if text in self.pieces}
        self.template = chat_template.recognise(self)

    def __len__(self) -> int:
        return len(self.pieces)

    def id_to_piece(self, token_id: int) -> str:
        return self.pieces[token_id] if 0 <= token_id < len(self) else f"<no token {token_id}>"

    def encode(self, text: str, bos: bool = False, eos: bool = False) -> list[int]:
        """Ids of `text` as plain text, with BOS before and EOS after it where asked for."""
        for wanted, token_id, name in ((bos, self.bos_id, "BOS"), (eos, self.eos_id, "EOS")):
            if wanted and token_id is None:
                raise UserError(f"this tokenizer has no {name} token")
        return [self.bos_id] * bos + self.encode_segment(text) + [self.eos_id] * eos

    def encode_segment(self, text: str, continued: bool = False) -> list[int]:
        """Ids of a stretch of text. `continued`: it follows other text, so it goes without the space that some models
        put at the start. No model merges across a newline that it spells as a byte, so what stands behind one is
        encoded as if behind any text."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise UserError(f"the text holds half a character ({text[error.start]!r}, a lone surrogate), which UTF-8 "
                            "cannot store; remove it") from None
        if continued and self.dummy_prefix:
            ids, newline = self._encode("\n" + text), self._newline_ids
            if ids[: len(newline)] == newline:
                return ids[len(newline) :]
        return self._encode(text)

    def decode(self, ids, skip_special: bool = True) -> str:
        """The text of `ids`. Bytes that are no UTF-8 (a sampled half character) become U+FFFD."""
        stream = self.stream(skip_special)
        return "".join(map(stream.push, ids)) + stream.flush()

    def stream(self, skip_special: bool = True) -> TokenStream:
        """decode() one token at a time, for printing while the model writes."""
        return TokenStream(self, skip_special)

    def render(self, messages, template: str | None = None, add_generation_prompt: bool = False):
        """(ids, mask) of a conversation; mask[i] is 1 where token i belongs to an answer, its end of turn included.

        messages: [{"role": "system" | "user" | "assistant", "content": str}, …]
        template: a name in TEMPLATES, or "jinja" for the directory's own. None takes default_template().
        add_generation_prompt: stop where the next answer starts. What comes back then is a prefix of the whole
            conversation's ids.
        Raises UserError for malformed messages and unknown templates.
        """
        return chat_template.render(self, messages, self._template_name(template), add_generation_prompt)

    def stop_ids(self, template: str | None = None) -> list[int]:
        """The ids that end an answer: EOS and the template's end of turn."""
        return chat_template.stop_ids(self, self._template_name(template))

    def default_template(self) -> str:
        """What the directory names, else `chatml` where the tokenizer has its special tokens, else `baby`."""
        return self.template or ("chatml" if "<|im_start|>" in self.special_tokens else "baby")

    def _template_name(self, template: str | None) -> str:
        return chat_template.check_name(self, self.default_template() if template is None else template)

    def save(self, directory, template: str | None = None) -> None:
        """Write tokenizer files that load_tokenizer and transformers' AutoTokenizer read, with the same ids.

        template: the chat template to name in tokenizer_config.json; None keeps the present one.
        """
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        name = self._template_name(template) if template else self.template
        files, config = self._files()
        config.pop("chat_template", None)
        if name:
            config["chat_template"] = (self.jinja if name == "jinja" else
                                       chat_template.jinja_text(chat_template.fitted(self, name)))
        for stale in ("tokenizer.model", "tokenizer.json", "chat_template.jinja", "added_tokens.json"):
            if stale not in files:
                (directory / stale).unlink(missing_ok=True)
        for file_name, data in files.items():
            with written_beside(directory / file_name) as temporary:
                temporary.write_bytes(data)
        write_json(directory / "tokenizer_config.json", config)


class TokenStream:
    """push(id) gives the text that has become complete, flush() the rest. A character may need several tokens."""

    def __init__(self, tokenizer: Tokenizer, skip_special: bool = True):
        self.tokenizer, self.skip_special = tokenizer, skip_special
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._at_start = True

    def push(self, token_id: int) -> str:
        tokenizer, at_start = self.tokenizer, self._at_start
        self._at_start = token_id in tokenizer.special_texts
        if self._at_start:
            return self._utf8.decode(b"" if self.skip_special else tokenizer.special_texts[token_id].encode())
        if not 0 <= token_id < len(tokenizer):  # a model's vocabulary may be padded beyond the tokenizer's
            return self._utf8.decode("\ufffd".encode())
        data = tokenizer.token_bytes[token_id]
        # Every run between special tokens was encoded by itself; the space that the model put at its start comes off.
        return self._utf8.decode(data[1:] if at_start and tokenizer.dummy_prefix and data[:1] == b" " else data)

    def flush(self) -> str:
        return self._utf8.decode(b"", final=True)


def _token_text(entry) -> str | None:
    """tokenizer_config.json writes a special token as a string or as {"content": …}."""
    return entry.get("content") if isinstance(entry, dict) else entry


# ----------------------------------------------------------------------------------------------------------------------
# Engine 1: sentencepiece.

CHATGLM2_PIECES = 64789
CHATGLM2_SPECIALS = ("[MASK]", "[gMASK]", "[sMASK]", "sop", "eop")  # THUDM's tokenization_chatglm.py adds them in code


class SentencePieceTokenizer(Tokenizer):
    """`tokenizer.model`. sentencepiece's own ids are the truth: encode(text) == SentencePieceProcessor.encode(text).

    model: what the file holds, a SentencePieceModel.
    """

    def __init__(self, path: Path, config: dict, added: dict[int, str], jinja: str | None):
        super().__init__(config, jinja)
        self._data = _read_bytes(path)
        try:
            self.model = model = read_sentencepiece(self._data)
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=self._data)
        except (ValueError, RuntimeError, OSError):
            raise UserError(f"{path} ({len(self._data)} bytes) is not a sentencepiece model, or is damaged or "
                            "incomplete; copy it again (Llama-3's original/tokenizer.model is another format: use its "
                            "tokenizer.json)") from None
        added = {token_id: text for token_id, text in added.items() if token_id >= len(model.pieces)}
        is_chatglm = len(model.pieces) == CHATGLM2_PIECES
        if is_chatglm and not added:
            added = dict(enumerate(CHATGLM2_SPECIALS, CHATGLM2_PIECES))
        self.pieces = [text for text, _, _ in model.pieces]
        self.pieces += [added.get(i, f"<no token {i}>") for i in range(len(self.pieces), max(added, default=-1) + 1)]
        self.special_tokens = {text: i for i, (text, _, kind) in enumerate(model.pieces) if kind in (CONTROL, UNKNOWN)}
        self.special_tokens |= {text: i for i, text in added.items()}
        self.token_bytes = [_piece_bytes(text) for text in self.pieces]

        self.bos_id = self._named("bos_token", self._processor.bos_id())
        self.eos_id = self._named("eos_token", self._processor.eos_id())
        self.pad_id = self._named("pad_token", 0 if is_chatglm else self._processor.pad_id())  # ChatGLM2: <unk>
        # transformers adds BOS to every sentencepiece Llama; ChatGLM2 and the ones trained here go without.
        no_bos = is_chatglm or "<|im_start|>" in self.pieces
        self.add_bos = bool(config.get("add_bos_token", not no_bos)) and self.bos_id is not None
        self.fingerprint = _sha256([
            model.pieces, model.is_bpe, model.charsmap.hex(), model.add_dummy_prefix, model.remove_extra_whitespaces,
            sorted(self.special_tokens.items()),
        ])  # fmt: skip
        self._finish()

    def _named(self, key: str, default: int) -> int | None:
        token_id = self.special_tokens.get(_token_text(self.config.get(key)), default)
        return token_id if token_id >= 0 else None

    def _encode(self, text: str) -> list[int]:
        return self._processor.encode(text)

    def _files(self) -> tuple[dict[str, bytes], dict]:
        as_json = self._tokenizers_json
        config = {
            # With tokenizer.json beside it, the class that takes that file as it is. LlamaTokenizer would rebuild it
            # with its own rules for leading spaces.
            "tokenizer_class": "PreTrainedTokenizerFast" if as_json else "LlamaTokenizer",
            "unk_token": self.special_texts.get(self._processor.unk_id()),
            **self.named_specials,
            "add_bos_token": self.add_bos,
            "add_eos_token": False,
            "clean_up_tokenization_spaces": False,
            "model_max_length": self.config.get("model_max_length", 10**30),
            "added_tokens_decoder": {str(token.pop("id")): token for token in self._added_tokens()},
        }
        return {"tokenizer.model": self._data, **({"tokenizer.json": as_json} if as_json else {})}, config

    def _added_tokens(self) -> list[dict]:
        return [{"id": token_id, "content": text, "single_word": False, "lstrip": False, "rstrip": False,
                 "normalized": False, "special": True} for token_id, text in sorted(self.special_texts.items())]

    @functools.cached_property  # half a second for ChatGLM2's, and every checkpoint saves it
    def _tokenizers_json(self) -> bytes | None:
        unk = self.special_texts.get(self._processor.unk_id())
        bos = (self.special_texts[self.bos_id], self.bos_id) if self.add_bos else None
        return tokenizers_json(self.model, self.pieces, self._added_tokens(), unk, bos)


# ----------------------------------------------------------------------------------------------------------------------
# Engine 2: Hugging Face tokenizers.


class JsonTokenizer(Tokenizer):
    """`tokenizer.json` with a BPE model: Llama-3's byte level kind, and sentencepiece models that were converted."""

    def __init__(self, path: Path, config: dict, jinja: str | None):
        super().__init__(config, jinja)
        try:
            import tokenizers
        except ImportError:
            raise UserError(f"{path} needs the tokenizers package: pip install tokenizers") from None
        self._data, content = _read_bytes(path), read_json(path)
        model = content.get("model") or {} if isinstance(content, dict) else {}
        if model.get("type", "BPE") != "BPE" or "merges" not in model:
            raise UserError(f"{path} does not hold a BPE tokenizer, the only kind that Llama models use")
        try:
            self._backend = tokenizers.Tokenizer.from_str(self._data.decode("utf-8-sig"))
        except Exception as error:  # the package raises nothing more specific
            raise UserError(f"{path} cannot be read by the tokenizers package: {error}") from None
        self._backend.no_truncation()
        self._backend.no_padding()
        self._backend.encode_special_tokens = True  # as plain text

        added = {token["id"]: token for token in content.get("added_tokens") or []}
        vocabulary = {token_id: text for text, token_id in self._backend.get_vocab(with_added_tokens=True).items()}
        self.pieces = [vocabulary.get(i, f"<no token {i}>") for i in range(max(vocabulary) + 1)]
        self.special_tokens = {token["content"]: i for i, token in added.items() if token.get("special")}
        is_byte_level = '"ByteLevel"' in json.dumps([content.get("decoder"), content.get("pre_tokenizer")])
        to_bytes = _byte_level_bytes if is_byte_level else _piece_bytes
        self.token_bytes = [text.encode() if i in added else to_bytes(text) for i, text in enumerate(self.pieces)]

        self.bos_id = self._special("bos_token", "<|begin_of_text|>", "<s>", "<bos>")
        self.eos_id = self._special("eos_token", "<|end_of_text|>", "</s>", "<eos>", "<|endoftext|>", "<|im_end|>")
        self.pad_id = self._special("pad_token", "<pad>", "[PAD]", "<|finetune_right_pad_id|>")
        with_specials = self._backend.encode("a", add_special_tokens=True).ids[:1]
        # Llama-3 says it in the post-processor, others in tokenizer_config.json.
        self.add_bos = self.bos_id is not None and bool(config.get("add_bos_token", with_specials == [self.bos_id]))
        merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
        self.fingerprint = _sha256([
            sorted(model["vocab"].items()), merges, sorted((i, t["content"]) for i, t in added.items()),
            sorted(self.special_tokens.items()), content.get("normalizer"), content.get("pre_tokenizer"),
        ])  # fmt: skip
        self._finish()

    def _special(self, key: str, *usual: str) -> int | None:
        """The id of a special token: what tokenizer_config.json names, else the first of the usual names."""
        if key in self.config:
            text = _token_text(self.config[key])
            return None if text is None else self._backend.token_to_id(text)
        return next((self.special_tokens[text] for text in usual if text in self.special_tokens), None)

    def _encode(self, text: str) -> list[int]:
        return self._backend.encode(text, add_special_tokens=False).ids

    def _files(self) -> tuple[dict[str, bytes], dict]:
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False,
                  "add_bos_token": self.add_bos}  # fmt: skip
        # transformers 5 takes special tokens as strings only; older files write {"content": …}.
        config |= {key: _token_text(value) if key.endswith("_token") else value for key, value in self.config.items()}
        return {"tokenizer.json": self._data}, config | self.named_specials


def _byte_level_bytes(text: str) -> bytes:
    """Undo GPT-2's spelling of bytes as printable characters: those that are printable stand for themselves, the others
    for 256, 257, … in order (gpt-2/src/encoder.py)."""
    return b"".join(_BYTE_LEVEL[char] if char in _BYTE_LEVEL else char.encode() for char in text)


_PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_BYTE_LEVEL = {chr(byte): bytes([byte]) for byte in _PRINTABLE}
_BYTE_LEVEL |= {chr(256 + i): bytes([byte]) for i, byte in enumerate(sorted({*range(256)} - {*_PRINTABLE}))}


def _piece_bytes(text: str) -> bytes:
    """What a sentencepiece piece stands for: "▁the" for " the", "<0x0A>" for the byte 10."""
    if re.fullmatch(r"<0x[0-9A-F]{2}>", text):
        return bytes([int(text[3:5], 16)])
    return text.replace(SPACE, " ").encode()


# ----------------------------------------------------------------------------------------------------------------------
# Loading.


def load_tokenizer(path) -> Tokenizer:
    """Read a tokenizer: a directory with tokenizer.model or tokenizer.json (and tokenizer_config.json), or such a file.

    Where both files are there, tokenizer.model counts. Raises UserError for what is missing or damaged.
    """
    path = Path(path)
    if path.is_dir():
        names = ("tokenizer.model", "tokenizer.json")
        file = next((path / name for name in names if (path / name).is_file()), None)
        if file is None:
            others = sorted(other.name for other in path.glob("*.model"))
            hint = f"; is {others[0]} one? Then name that file" if others else ""
            raise UserError(f"{path} holds no tokenizer; looked for {' and '.join(names)}{hint}")
    elif path.exists():
        file = path
    else:
        raise UserError(f"{path} does not exist; a tokenizer is a directory with tokenizer.model or tokenizer.json, or "
                        "such a file")
    config, jinja, added = {}, None, {}
    if file.name in ("tokenizer.model", "tokenizer.json"):  # files of any other name stand alone
        config, jinja, added = _read_config(file.parent)
    if file.suffix == ".json":
        return JsonTokenizer(file, config, jinja)
    return SentencePieceTokenizer(file, config, added, jinja)


def _read_config(directory: Path) -> tuple[dict, str | None, dict[int, str]]:
    """tokenizer_config.json, the Jinja chat template, and the tokens added outside the model file, by id."""
    config_path = directory / "tokenizer_config.json"
    config = read_json(config_path) if config_path.is_file() else {}
    if not isinstance(config, dict):
        raise UserError(f"{config_path} must hold a JSON object")
    jinja = config.get("chat_template")
    if isinstance(jinja, list):  # several templates by name
        jinja = {entry.get("name"): entry.get("template") for entry in jinja}.get("default")
    if (directory / "chat_template.jinja").is_file():
        jinja = (directory / "chat_template.jinja").read_text(encoding="utf-8", errors="replace")
    added = config.get("added_tokens_decoder") or {}
    added = {int(token_id): _token_text(token) for token_id, token in added.items()}
    if (directory / "added_tokens.json").is_file():
        added |= {token_id: text for text, token_id in read_json(directory / "added_tokens.json").items()}
    return config, jinja, added


def _read_bytes(path: Path) -> bytes:
    data = path.read_bytes()
    if not data:
        raise UserError(f"{path} is empty")
    return data


def _sha256(value) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


# ----------------------------------------------------------------------------------------------------------------------
# The commands.


def train(inputs, vocab_size: int, out, **options) -> Tokenizer:
    """Train a tokenizer on text files (.txt, or .jsonl with "text" or "messages") and write it to `out`.

    options: coverage, max_piece_length, sample_mb, as in TrainConfig. The same text and settings give the same bytes.
    Raises UserError if the text is unreadable or too small for the vocabulary, or `out` holds something else.
    """
    return train_from(TrainConfig(tuple(map(str, inputs)), Path(out), vocab_size, **options))


def train_from(config: TrainConfig) -> Tokenizer:
    if problems := config.problems():
        raise UserError("; ".join(problems))
    characters, size = tools.text_size(config.input)
    settings = tools.training_settings(config)
    if tools.already_made(config.out, settings, "input text"):
        return load_tokenizer(config.out)
    started, model = time.perf_counter(), tools.train_bpe(config, characters, size)
    tokenizer = _write_whole(config.out, model, settings)
    tools.report_training(tokenizer, config, time.perf_counter() - started)
    return tokenizer


def extend(base, new, out, **options) -> Tokenizer:
    """Add the pieces of the sentencepiece model `new` (None: none) to the tokenizer `base`, and write it to `out`.

    options: specials, keep, keep_dead, text, as in ExtendConfig. Old ids, and the encoding of text that holds no new
    piece, stay as they are. Raises UserError for models where that cannot be, or if `out` holds something else.
    """
    return extend_from(ExtendConfig(Path(base), Path(out), Path(new) if new else None, **options))


def extend_from(config: ExtendConfig) -> Tokenizer:
    if problems := config.problems():
        raise UserError("; ".join(problems))
    base, new = load_tokenizer(config.base), load_tokenizer(config.new) if config.new else None
    if not isinstance(base, SentencePieceTokenizer):
        raise UserError(f"{config.base} is a tokenizer.json, and extend works on a sentencepiece tokenizer.model. Llama-3's "
                        "128,256 tokens hold Chinese words as they are (Llama-3-Chinese keeps them): train on with it; for "
                        "special tokens take some of its <|reserved_special_token_0|> and so on")
    check_base(config.base, base.model)
    if new and not isinstance(new, SentencePieceTokenizer):
        raise UserError(f"{config.new} is a tokenizer.json; --new takes a sentencepiece model, such as `python tokenizer.py "
                        "train` makes")
    outside = base.pieces[len(base.model.pieces) :]
    if gaps := [text for text in outside if text not in base.special_tokens]:
        raise UserError(f"{config.base} has ids without a token ({' '.join(gaps[:3])}); extend cannot number past them")
    specials = [text for text in config.specials if text not in base.special_tokens]
    if ordinary := [text for text in specials if text in base.pieces]:
        raise UserError(f"{', '.join(ordinary)} of --specials is already an ordinary token of {config.base}; name another")
    settings = {"specials": list(config.specials), "keep": config.keep, "keep_dead": config.keep_dead, "run": {
        "base": base.fingerprint, "new": new and new.fingerprint, "chat_template": base.jinja, "add_bos": base.add_bos,
        "named_specials": base.named_specials}}  # fmt: skip
    if tools.already_made(config.out, settings, "base or new model"):
        return load_tokenizer(config.out)
    if config.text:
        tools.text_size([config.text])  # finds every mistake in it before anything is written
    started = time.perf_counter()
    extension = extend_model(base._data, new.model.pieces if new else (), specials=specials, outside=outside,
                             keep=config.keep, keep_dead=config.keep_dead)  # fmt: skip
    # With <|im_start|> in it the new one might be taken for one of ours, which start no document with BOS.
    described = {**base.config, **base.named_specials, "chat_template": base.jinja, "add_bos_token": base.add_bos}
    tokenizer = _write_whole(config.out, extension.data, settings, described, base.template)
    report_extension(config, base, tokenizer, extension, time.perf_counter() - started)
    return tokenizer


def _write_whole(out: Path, model: bytes, settings: dict, config: dict | None = None, template: str | None = None):
    """A tokenizer directory that is whole or absent, and the tokenizer. config: the tokenizer_config.json to begin with."""
    out = out.resolve()
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # of an interrupted run
    partial.mkdir(parents=True)
    (partial / "tokenizer.model").write_bytes(model)
    if config:
        write_json(partial / "tokenizer_config.json", config)
    load_tokenizer(partial).save(partial, template)
    write_json(partial / "args.json", settings)
    os.replace(partial, out)
    return load_tokenizer(out)


COMMANDS = {
    "train": (train_from, TrainConfig, "train a byte pair encoding on text files"),
    "extend": (extend_from, ExtendConfig, "add the pieces of a Chinese model, and special tokens, to a Llama tokenizer"),
    "show": (lambda config: show(load_tokenizer(config.tokenizer), config.text), ShowConfig,
             "print the tokens of a text"),
    "compare": (lambda config: compare({path: load_tokenizer(path) for path in config.tokenizer}, config.input),
                CompareConfig, "print how well several tokenizers do on one file"),
}  # fmt: skip

if __name__ == "__main__":
    command_line(None, None, description=__doc__, commands=COMMANDS)
