"""tokenizer.py against sentencepiece, tokenizers, transformers and hand-written expectations."""

from settings import UserError

import hashlib
import json
import pickle
import shutil
import sys

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers_at_hand import CHAT, NASTY, REAL, SHARED, VOCAB_SIZE, copy_with_config, messages, parity_texts, real

import sentencepiece_model as sp
import tokenizer as tk

# ----------------------------------------------------------------------------------------------------------------------
# Plain text.

unicode_text = st.one_of(
    st.text(st.characters(codec="utf-8", exclude_characters="\u2581"), max_size=60),
    st.text(st.sampled_from(" \n\t\0ab1，。的\u0301😀<|>s▅"), max_size=40),
    st.lists(st.sampled_from([*NASTY, "你好", " the"]), max_size=6).map("".join),
)


@settings(max_examples=150, deadline=None)
@given(text=unicode_text)
def test_round_trip(any_tokenizer, text):
    ids = any_tokenizer.encode(text)
    assert any_tokenizer.decode(ids) == text
    assert not set(ids) & set(any_tokenizer.special_tokens.values()), "plain text must not become special tokens"
    stream = any_tokenizer.stream()
    assert "".join([stream.push(token_id) for token_id in ids] + [stream.flush()]) == text


@pytest.mark.parametrize("text", NASTY)
def test_round_trip_of_nasty_texts(any_tokenizer, text):
    ids = any_tokenizer.encode(text)
    assert any_tokenizer.decode(ids) == text
    assert not set(ids) & set(any_tokenizer.special_tokens.values())


@pytest.mark.parametrize("name", ["ours", "chatglm2", "llama2"])
@settings(max_examples=150, deadline=None)
@given(text=unicode_text)
def test_ids_are_sentencepieces(request, name, text):
    tokenizer = request.getfixturevalue("ours") if name == "ours" else real(name)
    directory = request.getfixturevalue("ours_dir") if name == "ours" else SHARED / name
    if not hasattr(tokenizer, "reference"):
        tokenizer.reference = sentencepiece.SentencePieceProcessor(model_file=str(directory / "tokenizer.model"))
    assert tokenizer.encode(text) == tokenizer.reference.encode(text)


def test_ids_of_tokenizer_json_are_the_packages(llama3_dir):
    import tokenizers

    tokenizer = tk.load_tokenizer(llama3_dir)
    reference = tokenizers.Tokenizer.from_file(str(llama3_dir / "tokenizer.json"))
    for text in ["你好 world", *(text for text in NASTY if "<|" not in text)]:
        assert tokenizer.encode(text) == reference.encode(text, add_special_tokens=False).ids
        assert tokenizer.encode(text, bos=True) == reference.encode(text).ids


def test_ours_is_as_described(ours):
    assert len(ours) == VOCAB_SIZE
    assert (ours.bos_id, ours.eos_id, ours.pad_id, ours.add_bos, ours.template) == (1, 2, None, False, None)
    assert list(ours.special_tokens.items())[:5] == [
        ("<unk>", 0), ("<s>", 1), ("</s>", 2), ("<|im_start|>", 3), ("<|im_end|>", 4),
    ]  # fmt: skip
    assert len(ours.special_tokens) == 17
    assert [ours.id_to_piece(i) for i in ours.encode("2024")] == ["2", "0", "2", "4"], "digits are split"
    assert ours.encode("a\nb")[1] == ours.encode("\n")[0], "a newline is one token"
    assert len(ours.encode("法国的首都是")) < 6
    assert ours.encode("a", bos=True, eos=True) == [1, *ours.encode("a"), 2]


def test_chatglm2_is_as_described(tmp_path):
    tokenizer = real("chatglm2")
    assert len(tokenizer) == 64794
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, tokenizer.add_bos) == (1, 2, 0, False)
    names = ["[MASK]", "[gMASK]", "[sMASK]", "sop", "eop"]
    assert [tokenizer.special_tokens[name] for name in names] == [64789, 64790, 64791, 64792, 64793]
    assert [tokenizer.id_to_piece(i) for i in (64788, 64789, 64793)] == ["▁attr", "[MASK]", "eop"]
    assert tokenizer.decode([64790, 64792, *tokenizer.encode("你好"), 2]) == "你好"
    shutil.copy(SHARED / "chatglm2" / "tokenizer.model", tmp_path / "any-name.model")  # recognised by itself
    assert tk.load_tokenizer(tmp_path / "any-name.model").fingerprint == tokenizer.fingerprint


def test_llama2_is_as_described():
    tokenizer = real("llama2")
    assert len(tokenizer) == 32000
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, tokenizer.add_bos) == (1, 2, None, True)


def test_llama3_like_is_as_described(llama3_dir):
    tokenizer = tk.load_tokenizer(llama3_dir)
    assert tokenizer.add_bos and tokenizer.bos_id == tokenizer.special_tokens["<|begin_of_text|>"]
    assert tokenizer.eos_id == tokenizer.special_tokens["<|eot_id|>"]
    assert tokenizer.pad_id is None


def test_added_tokens_beyond_the_model(ours_dir, tmp_path):
    """As Chinese-Alpaca adds [PAD] behind the pieces of its sentencepiece model."""
    added = {str(VOCAB_SIZE): {"content": "[PAD]", "special": True}}
    directory = copy_with_config(ours_dir, tmp_path / "t", added_tokens_decoder=added, pad_token="[PAD]")
    tokenizer = tk.load_tokenizer(directory)
    assert len(tokenizer) == VOCAB_SIZE + 1 and tokenizer.pad_id == VOCAB_SIZE
    assert tokenizer.decode([VOCAB_SIZE, *tokenizer.encode("[PAD]")]) == "[PAD]"


def test_stream_holds_back_half_characters(ours):
    pieces = ours.encode("龘")
    assert len(pieces) == 3, "not in the corpus, so three bytes"
    stream = ours.stream()
    assert [stream.push(token_id) for token_id in pieces] == ["", "", "龘"]
    stream.push(pieces[0])
    assert stream.flush() == "\ufffd"
    assert ours.decode(pieces[:2]) == "\ufffd"


def test_decode_of_special_and_unknown_ids(ours):
    assert ours.decode([1, *ours.encode("你好"), 4]) == "你好"
    assert ours.decode([1, *ours.encode("你好"), 4], skip_special=False) == "<s>你好<|im_end|>"
    assert ours.decode([VOCAB_SIZE + 5]) == "\ufffd", "a model's vocabulary may be padded"


def test_lone_surrogates_are_refused(any_tokenizer):
    for call in (any_tokenizer.encode, lambda text: any_tokenizer.render(messages("a", text), "baby")):
        with pytest.raises(UserError, match="surrogate"):
            call("a\ud800b")


def test_pickles_for_worker_processes(any_tokenizer):
    copy = pickle.loads(pickle.dumps(any_tokenizer))
    assert copy.encode("你好 x") == any_tokenizer.encode("你好 x") and copy.fingerprint == any_tokenizer.fingerprint


# ----------------------------------------------------------------------------------------------------------------------
# Saving; transformers reads what we save.


@pytest.mark.parametrize("template", tk.TEMPLATES)
def test_transformers_gives_the_same_ids(any_tokenizer, template, transformers, tmp_path):
    """No differences are known for texts without special-token text: leading spaces included, also for ChatGLM2 and
    Llama-2, because save() writes a tokenizer.json with sentencepiece's rule for them. The exceptions:
      * "<s>" and the like in a text become special tokens there and stay text here (by design, on both sides);
      * in a byte-level vocabulary, newlines at the start of an answer may merge there with the template's own newlines;
        here no token straddles the start of an answer.
    """
    tokenizer = any_tokenizer
    tokenizer.save(tmp_path, template)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert len(theirs) == len(tokenizer)
    assert (theirs.bos_token_id, theirs.eos_token_id) == (tokenizer.bos_id, tokenizer.eos_id)
    for text in parity_texts():
        assert theirs.encode(text, add_special_tokens=False) == tokenizer.encode(text), repr(text)
        assert theirs.encode(text) == tokenizer.encode(text, bos=tokenizer.add_bos)
        assert theirs.decode(tokenizer.encode(text), clean_up_tokenization_spaces=False) == text
    for upto in range(2, len(CHAT) + 1):
        chat, asks = CHAT[:upto], CHAT[upto - 1]["role"] == "user"
        ids = theirs.apply_chat_template(chat, tokenize=True, return_dict=False, add_generation_prompt=asks)
        assert ids == tokenizer.render(chat, template, add_generation_prompt=asks)[0]
    without_system = theirs.apply_chat_template(CHAT[1:], tokenize=True, return_dict=False)
    assert without_system == tokenizer.render(CHAT[1:], template)[0]


def test_loads_what_transformers_saves(any_tokenizer, transformers, tmp_path):
    any_tokenizer.save(tmp_path / "ours", "llama2")
    transformers.AutoTokenizer.from_pretrained(tmp_path / "ours").save_pretrained(tmp_path / "theirs")
    again = tk.load_tokenizer(tmp_path / "theirs")
    assert (again.bos_id, again.eos_id, again.pad_id, again.add_bos, again.template, len(again)) == (
        any_tokenizer.bos_id, any_tokenizer.eos_id, any_tokenizer.pad_id, any_tokenizer.add_bos, "llama2",
        len(any_tokenizer))  # fmt: skip
    for text in parity_texts()[::5]:
        assert again.encode(text) == any_tokenizer.encode(text) and again.decode(again.encode(text)) == text
    assert again.render(CHAT) == any_tokenizer.render(CHAT, "llama2")


def test_save_keeps_everything(any_tokenizer, tmp_path):
    (tmp_path / "chat_template.jinja").write_text("stale")
    for template in [*tk.TEMPLATES, None]:
        any_tokenizer.save(tmp_path, template)
        again = tk.load_tokenizer(tmp_path)
        assert again.fingerprint == any_tokenizer.fingerprint
        assert again.special_tokens == any_tokenizer.special_tokens
        assert again.template == (template or any_tokenizer.template)
        for name in ("bos_id", "eos_id", "pad_id", "add_bos"):
            assert getattr(again, name) == getattr(any_tokenizer, name)
        assert again.encode("你好") == any_tokenizer.encode("你好")
    assert not list(tmp_path.glob(".*")), "nothing half-written is left"


# ----------------------------------------------------------------------------------------------------------------------
# The fingerprint, and damaged files.


def test_fingerprint(ours, ours_dir, tmp_path):
    proto = pytest.importorskip("sentencepiece.sentencepiece_model_pb2")
    original = proto.ModelProto()
    original.ParseFromString((ours_dir / "tokenizer.model").read_bytes())

    def fingerprint(change) -> str:
        model = proto.ModelProto()
        model.CopyFrom(original)
        change(model)
        (tmp_path / "x.model").write_bytes(model.SerializeToString())
        return tk.load_tokenizer(tmp_path / "x.model").fingerprint

    def change(**values):
        def apply(model):
            for key, value in values.items():
                setattr(model.pieces[400], key, value)
        return apply

    assert fingerprint(lambda model: None) == ours.fingerprint, "wherever the file lies"
    assert fingerprint(lambda model: setattr(model.trainer_spec, "input_sentence_size", 5)) == ours.fingerprint
    changed = [fingerprint(change(piece="新的")), fingerprint(change(score=-1234.5)), fingerprint(change(type=5)),
               fingerprint(lambda model: setattr(model.pieces[16], "piece", "<|other|>")),
               fingerprint(lambda model: setattr(model.normalizer_spec, "add_dummy_prefix", True))]  # fmt: skip
    assert len({ours.fingerprint, *changed}) == 6


def test_fingerprint_of_tokenizer_json(llama3_dir, tmp_path):
    tokenizer = tk.load_tokenizer(llama3_dir)
    content = json.loads((llama3_dir / "tokenizer.json").read_text(encoding="utf-8"))

    def fingerprint(**kwargs) -> str:
        (tmp_path / "x.json").write_text(json.dumps(content, **kwargs), encoding="utf-8")
        return tk.load_tokenizer(tmp_path / "x.json").fingerprint

    assert fingerprint(indent=1) == tokenizer.fingerprint, "spacing does not count"
    content["model"]["merges"] = [m if isinstance(m, str) else " ".join(m) for m in content["model"]["merges"]]
    assert fingerprint() == tokenizer.fingerprint, "the old spelling of merges is the same"
    content["model"]["merges"][:2] = content["model"]["merges"][1::-1]
    assert fingerprint() != tokenizer.fingerprint


def test_proto_reader_agrees_with_sentencepiece(ours_dir):
    paths = [ours_dir, *(SHARED / name for name in ("chatglm2", "llama2") if (SHARED / name).is_dir())]
    for path in paths:
        file = path / "tokenizer.model"
        reference = sentencepiece.SentencePieceProcessor(model_file=str(file))
        pieces = sp.read_sentencepiece(file.read_bytes()).pieces
        assert len(pieces) == len(reference)
        for i, (text, score, kind) in enumerate(pieces):
            assert (text, score) == (reference.id_to_piece(i), reference.get_score(i))
            assert (kind == sp.CONTROL, kind == sp.BYTE) == (reference.is_control(i), reference.is_byte(i))


@pytest.mark.parametrize("name", ["ours", "spaceless", "llama2"])
def test_a_model_written_by_hand_is_sentencepieces(name, request):
    """The pieces of a model, written again by us: the package gives the same ids, our reader the same content."""
    path = SHARED / name if name in REAL else request.getfixturevalue(f"{name}_dir")
    if not path.is_dir():
        pytest.skip(f"the real {name} tokenizer is not here")
    original = (path / "tokenizer.model").read_bytes()
    reference, model = sentencepiece.SentencePieceProcessor(model_proto=original), sp.read_sentencepiece(original)
    data = sp.sentencepiece_bytes(model.pieces, add_dummy_prefix=model.add_dummy_prefix, unk_id=0, bos_id=1, eos_id=2)
    assert sp.read_sentencepiece(data) == model
    rebuilt = sentencepiece.SentencePieceProcessor(model_proto=data)
    texts = [*NASTY, *parity_texts(), "".join(NASTY)]
    assert [rebuilt.encode(text) for text in texts] == [reference.encode(text) for text in texts]
    for processor in (reference, rebuilt):
        ids = processor.unk_id(), processor.bos_id(), processor.eos_id(), processor.pad_id()
        assert ids == (0, 1, 2, -1)


def test_special_ids_of_a_model_written_by_hand():
    pieces = [("[gap]", 0, sp.CONTROL), ("[?]", 0, sp.UNKNOWN), ("[end]", 0, sp.CONTROL), ("a", -1, sp.NORMAL)]
    data = sp.sentencepiece_bytes(pieces, add_dummy_prefix=False, unk_id=1, bos_id=None, eos_id=2, pad_id=0,
                                  byte_fallback=False)  # fmt: skip
    processor = sentencepiece.SentencePieceProcessor(model_proto=data)
    assert (processor.unk_id(), processor.bos_id(), processor.eos_id(), processor.pad_id()) == (1, -1, 2, 0)
    assert processor.encode("ab") == [3, 1]


def test_protobuf_writer_agrees_with_protobuf():
    proto = pytest.importorskip("sentencepiece.sentencepiece_model_pb2")
    spec = proto.TrainerSpec(vocab_size=300, pad_id=-1, character_coverage=0.5, byte_fallback=True, unk_piece="▁x")
    spec.input_sentence_size = 2**40
    fields = [(4, 300), (10, 0.5), (11, 2**40), (35, True), (43, -1), (45, "▁x")]
    assert sp.protobuf_message(*fields) == spec.SerializeToString()


def test_truncated_models(ours_dir, tmp_path):
    data = (ours_dir / "tokenizer.model").read_bytes()
    path = tmp_path / "tokenizer.model"
    for size in [1, 2, 10, 100, *range(500, len(data), 487), len(data) - 1]:
        path.write_bytes(data[:size])
        with pytest.raises(UserError, match=r"tokenizer\.model .*damaged or incomplete"):
            tk.load_tokenizer(tmp_path)


def test_other_bad_files(ours_dir, llama3_dir, tmp_path):
    def load(name, data):
        directory = tmp_path / hashlib.sha256(data + name.encode()).hexdigest()[:8]
        directory.mkdir()
        (directory / name).write_bytes(data)
        return tk.load_tokenizer(directory)

    for data in ["床前明月光，疑是地上霜。".encode(), b"IQ== 0\nIg== 1\n" * 50, bytes(1000), b"\x89PNG\r\n\x1a\n"]:
        with pytest.raises(UserError, match="not a sentencepiece model"):
            load("tokenizer.model", data)
    for name in ("tokenizer.model", "tokenizer.json"):
        with pytest.raises(UserError, match="is empty"):
            load(name, b"")
    whole = (llama3_dir / "tokenizer.json").read_bytes()
    with pytest.raises(UserError, match=r"tokenizer\.json:\d+: not valid JSON"):
        load("tokenizer.json", whole[:2000])
    for data in (b"{}", b"[1]", b'{"model": {"type": "WordPiece", "vocab": {}}}'):
        with pytest.raises(UserError, match="BPE"):
            load("tokenizer.json", data)
    with pytest.raises(UserError, match="cannot be read by the tokenizers package"):
        load("tokenizer.json", b'{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": ["a b"]}}')
    (tmp_path / "nothing").mkdir()
    with pytest.raises(UserError, match=r"looked for tokenizer\.model and tokenizer\.json"):
        tk.load_tokenizer(tmp_path / "nothing")
    with pytest.raises(UserError, match="does not exist"):
        tk.load_tokenizer(tmp_path / "no such place")
    broken = copy_with_config(ours_dir, tmp_path / "config")
    (broken / "tokenizer_config.json").write_text("{\n,")
    with pytest.raises(UserError, match=r"tokenizer_config\.json:2: not valid JSON"):
        tk.load_tokenizer(broken)


def test_missing_optional_package(llama3_dir, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(UserError, match="pip install tokenizers"):
        tk.load_tokenizer(llama3_dir)
