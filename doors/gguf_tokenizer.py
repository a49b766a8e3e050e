"""A tokenizer as GGUF metadata, as the Modelfile that Ollama wants beside it, and back.

llama.cpp has its own tokenizer programs, and the metadata chooses one and feeds it:

    tokenizer.ggml.model   "llama": sentencepiece's byte pair encoding, by scores; "gpt2": byte-level, by a list of merges
    tokenizer.ggml.pre     for "gpt2": the name of the expressions that cut a text into words (PRE_TOKENIZERS)
    tokenizer.ggml.tokens, .token_type, .scores or .merges
    tokenizer.ggml.{bos,eos,eot,unknown,padding}_token_id; eot: what ends a turn of a chat, where that is not EOS
    tokenizer.ggml.add_bos_token, .add_eos_token, .add_space_prefix: is something put before or behind every text?
    tokenizer.chat_template    Jinja

Traps. The token types are sentencepiece's numbers. Special tokens must be CONTROL: what is USER_DEFINED is found in plain text too.
Two tokens of the same text make llama.cpp abort. It takes as many tokens as the embedding has rows, so a padded embedding needs
padded tokens. Its "llama" program knows no normalisation. Where a vocabulary has pieces like "<s" it can merge the plain text
"<s>" into the control token, which sentencepiece never does.
"""

from __future__ import annotations

from settings import UserError

import collections
import json
import tempfile
from pathlib import Path

from chat_template import BOS, EOS, Special, fitted, jinja_text
from sentencepiece_model import BYTE, CONTROL, NORMAL, SPACE, UNKNOWN, UNUSED, USER_DEFINED, sentencepiece_bytes
from tokenizer import SentencePieceTokenizer, Tokenizer, load_tokenizer

# How byte-level tokenizers cut a text into words before anything is merged; a word is a match. GPT-2's is built into ByteLevel.
_CASELESS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3, QWEN2 = _CASELESS + _WORDS % "{1,3}", _CASELESS + _WORDS % ""
GPT2, DIGITS = "ByteLevel", "Digits"
# llama.cpp's name -> (the cuts in their order, whether a word that is a token as it stands is taken without merging)
PRE_TOKENIZERS = {
    "llama-bpe": ((LLAMA3,), True),
    "smaug-bpe": ((LLAMA3,), False),
    "qwen2": ((QWEN2,), False),
    "gpt-2": ((GPT2,), False),
    "smollm": ((DIGITS, GPT2), False),
}
PADDING = "[PAD{}]"  # llama.cpp's name for a row of the embedding that no token has
PADDING_SCORE = -10000.0

# ----------------------------------------------------------------------------------------------------------------------
# To GGUF


def tokenizer_problems(tokenizer: Tokenizer, rows: int) -> list[str]:
    """Why llama.cpp's tokenizers would not give this one's ids; `rows`: how many the embedding has."""
    found = []
    if len(tokenizer) > rows:
        found.append(f"its tokenizer has {len(tokenizer)} tokens, its embedding only {rows} rows")
    twice = [text for text, count in collections.Counter(tokenizer.pieces).items() if count > 1]
    if twice or "" in tokenizer.pieces:
        found.append(f"its tokenizer has {twice[0]!r} twice" if twice else "its tokenizer has a token without a text")
    if isinstance(tokenizer, SentencePieceTokenizer):
        if not tokenizer.model.is_bpe:
            found.append("its tokenizer is a unigram model; llama.cpp would merge by scores and give other ids")
        return found
    content = _json(tokenizer)
    if "byte_fallback" in content["model"] and content["model"]["byte_fallback"]:
        return [*found, "its tokenizer.json is a converted sentencepiece model, without the scores that llama.cpp merges by; "
                        "put the tokenizer.model it was made from beside it"]  # fmt: skip
    if content.get("normalizer"):
        found.append("its tokenizer.json normalises text, which llama.cpp does not")
    if _pre_tokenizer_name(content) is None:
        known = ", ".join(PRE_TOKENIZERS)
        found.append(f"its tokenizer.json cuts text into words in a way that has no name here (there are {known})")
    return found


def tokenizer_remarks(tokenizer: Tokenizer) -> list[str]:
    found = []
    if isinstance(tokenizer, SentencePieceTokenizer):
        model = tokenizer.model
        if model.charsmap or model.remove_extra_whitespaces:
            found.append("its tokenizer changes the text before it splits it (normalisation); llama.cpp does not")
        if not model.add_dummy_prefix:
            found.append("a tokenizer that transformers takes from a GGUF file puts a space before every text, and this one does not: "
                         "there, take the tokenizer of the model directory")  # fmt: skip
        pieces = set(tokenizer.pieces)
        mergeable = [text for text in tokenizer.special_tokens if _can_be_merged(text, pieces)]
        if mergeable:
            found.append(f"llama.cpp may read the plain text {', '.join(mergeable[:3])} as the special token: "
                         "the vocabulary has the parts to merge it from")  # fmt: skip
    if tokenizer.template is None:
        found.append("its tokenizer names no chat template: the file gets none, and llama.cpp takes chatml")
    return found


def _can_be_merged(text: str, pieces: set[str]) -> bool:
    """Whether merging can end in this text: cut in two somewhere, both parts are pieces or single characters."""
    return any(all(len(part) == 1 or part in pieces for part in (text[:i], text[i:])) for i in range(1, len(text)))


def tokenizer_metadata(tokenizer: Tokenizer, rows: int) -> dict:
    """key -> value of everything that GGUF says of a tokenizer; whole numbers are uint32, in lists int32.

    rows: of the embedding; tokens are made up to that number. Call tokenizer_problems first.
    """
    unknown, merges = None, None
    if isinstance(tokenizer, SentencePieceTokenizer):
        pieces = tokenizer.model.pieces
        # A user's own pieces are looked for in the text before its spaces are spelled as ▁.
        tokens = [text.replace(SPACE, " ") if kind == USER_DEFINED else text for text, _, kind in pieces]
        scores, types = [score for _, score, _ in pieces], [kind for _, _, kind in pieces]
        for i in range(len(pieces), len(tokenizer)):  # added outside the model file
            tokens.append(tokenizer.pieces[i])
            scores.append(0.0)
            types.append(CONTROL if i in tokenizer.special_texts else UNUSED)
        unknown = types.index(UNKNOWN)
        engine, pre, space = "llama", "default", tokenizer.model.add_dummy_prefix
    else:
        content = _json(tokenizer)
        plain = {token["id"] for token in content.get("added_tokens") or [] if not token.get("special")}
        named = {*content["model"]["vocab"].values(), *(token["id"] for token in content.get("added_tokens") or [])}
        tokens, scores = list(tokenizer.pieces), None
        types = [CONTROL if i in tokenizer.special_texts else USER_DEFINED if i in plain else NORMAL if i in named else UNUSED
                 for i in range(len(tokens))]  # fmt: skip
        merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in content["model"]["merges"]]
        engine, pre, space = "gpt2", _pre_tokenizer_name(content), False
    padding = range(len(tokens), rows)
    ids = {"bos": tokenizer.bos_id, "eos": tokenizer.eos_id, "eot": end_of_turn(tokenizer), "unknown": unknown, "padding": tokenizer.pad_id}
    data = {
        "tokenizer.ggml.model": engine,
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens + [PADDING.format(i) for i in padding],
        "tokenizer.ggml.scores": None if scores is None else scores + [PADDING_SCORE] * len(padding),
        "tokenizer.ggml.token_type": types + [UNUSED] * len(padding),
        "tokenizer.ggml.merges": merges,
        **{f"tokenizer.ggml.{name}_token_id": token_id for name, token_id in ids.items()},
        "tokenizer.ggml.add_bos_token": tokenizer.add_bos,
        "tokenizer.ggml.add_eos_token": False,
        "tokenizer.ggml.add_space_prefix": space,
        "tokenizer.chat_template": chat_template_text(tokenizer),
    }
    return {key: value for key, value in data.items() if value not in (None, [])}


def chat_template_text(tokenizer: Tokenizer) -> str | None:
    """The Jinja text that our model directories name, or None."""
    if tokenizer.template in (None, "jinja"):
        return tokenizer.jinja if tokenizer.template else None
    return jinja_text(fitted(tokenizer, tokenizer.template))


def end_of_turn(tokenizer: Tokenizer) -> int | None:
    """The token that ends an answer in a chat, if that is not EOS."""
    if tokenizer.template is None:
        return None
    return next((token_id for token_id in tokenizer.stop_ids() if token_id != tokenizer.eos_id), None)


def _json(tokenizer: Tokenizer) -> dict:
    return json.loads(tokenizer._data.decode("utf-8-sig"))


def _pre_tokenizer_name(content: dict) -> str | None:
    """llama.cpp's name for how a tokenizer.json cuts text into words, None if it has none or adds a space."""
    stages = content.get("pre_tokenizer") or {}
    cuts, byte_level = [], False
    for stage in stages.get("pretokenizers", [stages]):
        kind = stage.get("type")
        if kind == "Split" and (stage.get("behavior"), stage.get("invert")) in (("Isolated", False), ("Removed", True)):
            cuts.append(stage["pattern"].get("Regex"))
        elif kind == "Digits" and stage.get("individual_digits"):
            cuts.append(DIGITS)
        elif kind == "ByteLevel" and not stage.get("add_prefix_space"):
            byte_level = True
            cuts += [GPT2] if stage.get("use_regex", True) else []
        else:
            return None
    wanted = (tuple(cuts), bool(content["model"].get("ignore_merges")))
    return next((name for name, entry in PRE_TOKENIZERS.items() if entry == wanted), None) if byte_level else None


# ----------------------------------------------------------------------------------------------------------------------
# From GGUF


def read_tokenizer(metadata: dict) -> Tokenizer:
    """The tokenizer that the metadata describes. Raises UserError if it is damaged or of a kind that Cria does not know."""
    tokens = metadata.get("tokenizer.ggml.tokens") or []
    types = metadata.get("tokenizer.ggml.token_type") or [NORMAL] * len(tokens)
    scores = metadata.get("tokenizer.ggml.scores") or [0.0] * len(tokens)
    for name, entries, of in (("tokens", tokens, str), ("types", types, int), ("scores", scores, (int, float))):
        if not isinstance(entries, list) or not entries or not all(isinstance(entry, of) for entry in entries):
            raise UserError(f"its list of {name} is missing or damaged")
    if not len(tokens) == len(types) == len(scores):
        raise UserError(f"it has {len(tokens)} tokens, {len(types)} types and {len(scores)} scores")
    count = len(tokens)
    while count and types[count - 1] == UNUSED and tokens[count - 1] == PADDING.format(count - 1):
        count -= 1
    tokens, types, scores = tokens[:count], types[:count], scores[:count]

    ids = {name: metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("bos", "eos", "unknown", "padding")}
    if wrong := [f"{name} {token_id}" for name, token_id in ids.items() if token_id is not None and token_id not in range(count)]:
        raise UserError(f"it has {count} tokens and names {', '.join(wrong)}")
    engine = metadata.get("tokenizer.ggml.model")
    config = {
        "add_bos_token": metadata.get("tokenizer.ggml.add_bos_token", engine == "llama"),
        "chat_template": metadata.get("tokenizer.chat_template"),
        **{f"{key}_token": None if ids[name] is None else tokens[ids[name]]
           for key, name in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"))},
    }  # fmt: skip
    if engine == "llama":
        file = "tokenizer.model"
        data = _sentencepiece(tokens, scores, types, ids, metadata.get("tokenizer.ggml.add_space_prefix", True))
    elif engine == "gpt2":
        file = "tokenizer.json"
        data = _byte_level(tokens, types, metadata, config["bos_token"] if config["add_bos_token"] else None)
    else:
        raise UserError(f"it is of the kind {engine!r}; known are 'llama' (sentencepiece) and 'gpt2' (byte-level)")
    with tempfile.TemporaryDirectory() as directory:
        (Path(directory) / file).write_bytes(data)
        given = {key: value for key, value in config.items() if value is not None}
        (Path(directory) / "tokenizer_config.json").write_text(json.dumps(given), encoding="utf-8")
        try:
            tokenizer = load_tokenizer(directory)
        except UserError as error:
            raise UserError(str(error).replace(directory, "its metadata")) from None
    wrong = [i for i, text in enumerate(tokens) if types[i] not in (UNUSED, USER_DEFINED) and tokenizer.id_to_piece(i) != text]
    if wrong:
        raise UserError(f"token {wrong[0]} is {tokens[wrong[0]]!r}, and would become {tokenizer.id_to_piece(wrong[0])!r}")
    return tokenizer


def _sentencepiece(tokens: list[str], scores: list[float], types: list[int], ids: dict, dummy_prefix: bool) -> bytes:
    """A tokenizer.model with these pieces."""
    types = list(types)
    if UNKNOWN not in types:
        types[ids["unknown"] or 0] = UNKNOWN  # sentencepiece needs one
    texts = [text.replace(" ", SPACE) if kind == USER_DEFINED else text for text, kind in zip(tokens, types)]
    return sentencepiece_bytes(
        list(zip(texts, scores, types)), add_dummy_prefix=dummy_prefix, unk_id=types.index(UNKNOWN), bos_id=ids["bos"],
        eos_id=ids["eos"], pad_id=ids["padding"], byte_fallback=types.count(BYTE) == 256)  # fmt: skip


def _byte_level(tokens: list[str], types: list[int], metadata: dict, bos: str | None) -> bytes:
    """A tokenizer.json with these tokens and merges; `bos` goes before every text."""
    pre = metadata.get("tokenizer.ggml.pre", "default")
    if pre not in PRE_TOKENIZERS:
        raise UserError(f"its text is cut into words as {pre!r} does, which is not known here ({', '.join(PRE_TOKENIZERS)} are)")
    cuts, ignore_merges = PRE_TOKENIZERS[pre]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": cuts[-1] == GPT2}
    stages = [{"type": "Digits", "individual_digits": True} if cut == DIGITS else
              {"type": "Split", "pattern": {"Regex": cut}, "behavior": "Isolated", "invert": False}
              for cut in cuts if cut != GPT2]  # fmt: skip
    added = [i for i, kind in enumerate(types) if kind in (CONTROL, USER_DEFINED, UNKNOWN)]
    vocabulary = {text: i for i, text in enumerate(tokens) if types[i] != UNUSED}
    # As in Llama-3's own file, tokens behind all others stand only among the added ones: no word of a text can be one of them.
    # Elsewhere they keep their ids only if they are in the vocabulary as well.
    if added == list(range(len(tokens) - len(added), len(tokens))) and len(vocabulary) == len(tokens):
        vocabulary = {text: i for text, i in vocabulary.items() if i < len(tokens) - len(added)}

    def template(sequence: str, type_id: int) -> list[dict]:
        start = [{"SpecialToken": {"id": bos, "type_id": type_id}}] if bos else []
        return [*start, {"Sequence": {"id": sequence, "type_id": type_id}}]

    return json.dumps({
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i, "content": tokens[i], "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
                          "special": types[i] != USER_DEFINED} for i in added],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*stages, byte_level]},
        "post_processor": {
            "type": "TemplateProcessing", "single": template("A", 0), "pair": template("A", 0) + template("B", 1),
            "special_tokens": {bos: {"id": bos, "ids": [tokens.index(bos)], "tokens": [bos]}} if bos else {},
        },
        "decoder": byte_level,
        "model": {
            "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None, "end_of_word_suffix": None,
            "fuse_unk": False, "byte_fallback": False, "ignore_merges": ignore_merges, "vocab": vocabulary,
            "merges": metadata.get("tokenizer.ggml.merges") or [],
        },
    }, ensure_ascii=False).encode()  # fmt: skip


# ----------------------------------------------------------------------------------------------------------------------
# Ollama


def ollama_modelfile(out: Path, tokenizer: Tokenizer | None) -> str:
    """A Modelfile for `ollama create NAME -f Modelfile`: the file, the chat template, and where an answer ends. Three lines.

    Ollama renders chats with Go's templates, not with Jinja, and guesses one from the Jinja text only where that is one of a few
    famous ones; so ours is spelled out. (A foreign template cannot be, and its line is left to that guess.) BOS is left out where
    Ollama's runner puts it: before the text, if the metadata says so.
    """
    lines = [f"FROM ./{Path(out).name}"]
    if tokenizer is not None and tokenizer.template:
        if tokenizer.template != "jinja":
            lines.append(f'TEMPLATE """{go_template(tokenizer)}"""')
        end = end_of_turn(tokenizer)
        lines.append(f'PARAMETER stop "{tokenizer.id_to_piece(tokenizer.eos_id if end is None else end)}"')
    return "\n".join(lines)


def go_template(tokenizer: Tokenizer) -> str:
    """The tokenizer's chat template (one of chat_template.TEMPLATES) in Go's template language, on one line."""
    template = fitted(tokenizer, tokenizer.template)
    own = {BOS: tokenizer.bos_id, EOS: tokenizer.eos_id}

    def word(item) -> str:
        text = tokenizer.id_to_piece(own[item]) if item in own else item.name if isinstance(item, Special) else item
        return text.replace("\n", '{{ "\\n" }}')

    def put(items) -> str:
        first_bos = bool(items) and items[0] == BOS and tokenizer.add_bos
        return ("{{ if $i }}" + word(BOS) + "{{ end }}" if first_bos else "") + "".join(map(word, items[first_bos:]))

    content, lead = "{{ .Content }}", template.answer_lead
    user_prefix = put(template.user.prefix)
    if template.system_in_user:
        user_prefix = '{{ if ne $before "system" }}' + user_prefix + "{{ end }}"
    start = template.start[1:] if tokenizer.add_bos and template.start[:1] == (BOS,) else template.start
    # $before: the role of the message before; $i: 0 for the first
    return (
        "".join(map(word, start)) + ('{{ $before := "" }}' if template.system_in_user else "")
        + "{{ range $i, $_ := .Messages }}"
        + '{{ if eq .Role "system" }}' + put(template.system.prefix) + content + put(template.system.suffix)
        + '{{ else if eq .Role "user" }}' + user_prefix + content + put(template.user.suffix)
        + '{{ else if eq .Role "assistant" }}' + put(template.assistant.prefix) + lead + content + put(template.assistant.suffix)
        + "{{ end }}" + ("{{ $before = .Role }}" if template.system_in_user else "") + "{{ end }}"
        + "".join(map(word, template.assistant.prefix))
    )  # fmt: skip
