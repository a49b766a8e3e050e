"""extension.py: old ids and encodings stay, dead pieces are exactly those, and every other program reads the same."""

from settings import UserError

import itertools
import json

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers_at_hand import ENGLISH, NASTY, SHARED, copy_with_config, messages, parity_texts, real, sample_text

import extension as ex
import sentencepiece_model as sp
import tokenizer as tk

PRETRAIN = SHARED.parent / "pretrain"

@pytest.fixture(scope="session")
def real_extended(tmp_path_factory):
    """name -> tokenizer: Llama-2's, and the Chinese-LLaMA project's added to it, with the defaults and every piece."""
    base, new = real("llama2"), SHARED / "chinese_sp_20k" / "chinese_sp.model"
    if not new.is_file():
        pytest.skip("the real Chinese sentencepiece model is not here")
    root = tmp_path_factory.mktemp("real")
    pieces = tk.load_tokenizer(new).model.pieces
    (root / "all.model").write_bytes(ex.extend_model(base._data, pieces, keep="all", keep_dead=True).data)
    return {"base": base, "cjk": tk.extend(SHARED / "llama2", new, root / "cjk"),
            "all": tk.load_tokenizer(root / "all.model")}  # fmt: skip


def real_lines(*names: str, lines: int) -> list[str]:
    found = []
    for name in names:
        files = sorted(PRETRAIN.glob(name))
        if not files:
            pytest.skip(f"the real text {name} is not here")
        texts = (file.read_text(encoding="utf-8") for file in files)
        found += list(itertools.islice((line for text in texts for line in text.split("\n") if line.strip()), lines))
    return found


def borders(tokenizer, text: str) -> set[int]:
    """Where tokens end, in bytes."""
    return {*itertools.accumulate(len(tokenizer.token_bytes[i]) for i in tokenizer.encode(text))}


# ----------------------------------------------------------------------------------------------------------------------
# What stays.


def test_old_pieces_stay_byte_for_byte(english_dir, extended_dir, english, extended):
    before = (english_dir / "tokenizer.model").read_bytes()
    after = (extended_dir / "tokenizer.model").read_bytes()
    assert after.startswith(before)
    old, new = sp.read_sentencepiece(before).pieces, sp.read_sentencepiece(after).pieces
    assert new[: len(old)] == old
    *learned, start, end = new[len(old) :]
    assert [start, end] == [("<|im_start|>", 0.0, sp.CONTROL), ("<|im_end|>", 0.0, sp.CONTROL)]
    scores = [score for _, score, _ in learned]
    assert min(score for _, score, kind in old if kind == sp.NORMAL) > scores[0]
    assert all(a > b for a, b in itertools.pairwise(scores)), "no two are equally urgent, also not in float32"
    assert "首都" in extended.pieces and "巴黎" in extended.pieces
    assert (extended.bos_id, extended.eos_id, extended.add_bos) == (english.bos_id, english.eos_id, True)


mixed_text = st.one_of(
    st.text(st.sampled_from("法国的首都是巴黎，。 the dog12\nof"), max_size=40),
    st.lists(st.sampled_from([*NASTY, "法国", "首都", " the", "的首"]), max_size=6).map("".join),
)


@settings(max_examples=200)
@given(text=mixed_text)
def test_new_tokens_are_old_ones_joined(english, extended, text):
    assert borders(extended, text) <= borders(english, text)
    assert extended.decode(extended.encode(text)) == text
    assert not {*extended.encode(text)} & {*extended.special_tokens.values()}


@settings(max_examples=200)
@given(text=st.one_of(st.text(st.characters(codec="utf-8", exclude_characters="\u2581"), max_size=40), st.sampled_from(NASTY)))
def test_text_without_chinese_is_encoded_as_before(english, extended, text):
    text = "".join(char for char in text if not ex.is_cjk(char))
    assert extended.encode(text) == english.encode(text)
    assert extended.encode_segment(text, continued=True) == english.encode_segment(text, continued=True)


def test_chinese_is_encoded_as_by_the_chinese_model(extended, ours):
    """The order of merging among new pieces is that of the model which they come from."""
    for line in sample_text().split("\n")[:200]:
        chinese = "".join(filter(ex.is_cjk, line))
        theirs = [ours.pieces[i] for i in ours.encode(chinese)]
        assert [extended.pieces[i] for i in extended.encode_segment(chinese, continued=True)] == theirs


def test_real_ids_and_english_stay(real_extended):
    base, cjk, everything = (real_extended[name] for name in ("base", "cjk", "all"))
    assert len(everything) == 49_953, "Chinese-LLaMA's vocabulary"
    assert len(cjk) == 48_721
    for tokenizer in (cjk, everything):
        assert tokenizer.pieces[:32000] == base.pieces
        assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.add_bos, tokenizer.template) == (1, 2, True, None)
    english = real_lines("format_samples/c4_demo.jsonl", lines=60) + real_lines("format_samples/wiki_demo.txt", lines=2)
    english = ["".join(char for char in line if not ex.is_cjk(char)) for line in english]
    assert [cjk.encode(line) for line in english] == [base.encode(line) for line in english]
    pieces = [data.decode() for text, data in zip(base.pieces[259:], base.token_bytes[259:])]
    assert [cjk.encode(text) for text in pieces] == [base.encode(text) for text in pieces]


def test_real_chinese_takes_less_than_half_the_tokens(real_extended):
    lines = real_lines("laws/**/*.md", "niutrans-classics/**/text.txt", lines=200)
    base, cjk = real_extended["base"], real_extended["cjk"]
    before, after = (sum(len(tokenizer.encode(line)) for line in lines) for tokenizer in (base, cjk))
    assert 0.4 < after / before < 0.6
    for line in lines:
        assert borders(cjk, line) <= borders(base, line) and cjk.decode(cjk.encode(line)) == line


# ----------------------------------------------------------------------------------------------------------------------
# Other programs.


def test_protobufs_merge_is_the_same(english_dir, ours_dir, extended_dir):
    proto = pytest.importorskip("sentencepiece.sentencepiece_model_pb2")
    theirs, ours = proto.ModelProto(), proto.ModelProto()
    theirs.ParseFromString((english_dir / "tokenizer.model").read_bytes())
    ours.ParseFromString((extended_dir / "tokenizer.model").read_bytes())
    known = len(theirs.pieces)
    for piece in ours.pieces[known:]:
        theirs.pieces.add(piece=piece.piece, score=piece.score, type=piece.type)
    assert ours == theirs
    chinese = proto.ModelProto()
    chinese.ParseFromString((ours_dir / "tokenizer.model").read_bytes())
    order = [piece.piece for piece in chinese.pieces]
    added = [piece.piece for piece in ours.pieces[known:-2]]
    assert added == sorted(added, key=order.index), "in the order of the Chinese model"


def test_sentencepiece_and_transformers_give_the_same_ids(extended, extended_dir, transformers):
    reference = sentencepiece.SentencePieceProcessor(model_file=str(extended_dir / "tokenizer.model"))
    theirs = transformers.AutoTokenizer.from_pretrained(extended_dir)
    assert len(theirs) == len(extended) == len(reference)
    for text in parity_texts():
        ids = extended.encode(text)
        assert reference.encode(text) == ids and theirs.encode(text, add_special_tokens=False) == ids, repr(text)
    assert theirs.encode("a") == extended.encode("a", bos=True)
    assert theirs.encode("<|im_end|>", add_special_tokens=False) == [extended.special_tokens["<|im_end|>"]]


def test_tokenizers_gives_the_same_ids_on_real_text(real_extended):
    tokenizers = pytest.importorskip("tokenizers")
    lines = real_lines("laws/**/*.md", "niutrans-classics/**/text.txt", lines=300)
    for name in ("cjk", "all"):
        ours = real_extended[name]
        theirs = tokenizers.Tokenizer.from_str(ours._tokenizers_json.decode())
        assert [theirs.encode(line, add_special_tokens=False).ids for line in lines] == [ours.encode(line) for line in lines]


def test_why_the_new_scores_fall(english_dir):
    """With scores of 0, as in Chinese-LLaMA, sentencepiece takes the leftmost piece and tokenizers the first merge."""
    tokenizers = pytest.importorskip("tokenizers")
    base = (english_dir / "tokenizer.model").read_bytes()
    texts = ["国", "家", "人", "家人", "国家"]

    def ids(pieces):
        model = sp.read_sentencepiece(base + sp.piece_records(pieces))
        as_json = sp.tokenizers_json(model, [text for text, _, _ in model.pieces], [], "<unk>", None)
        processor = sentencepiece.SentencePieceProcessor(model_proto=base + sp.piece_records(pieces))
        return processor.encode("国家人"), tokenizers.Tokenizer.from_str(as_json.decode()).encode("国家人").ids

    ours, theirs = ids([(text, 0.0, sp.NORMAL) for text in texts])
    assert ours != theirs
    ours, theirs = ids(ex.extend_model(base, [(text, 0.0, sp.NORMAL) for text in texts]).added)
    assert ours == theirs


# ----------------------------------------------------------------------------------------------------------------------
# Dead pieces.

LETTERS = "甲乙丙"
ALL_TEXTS = ["".join(text) for size in range(1, 7) for text in itertools.product(LETTERS, repeat=size)]


@settings(max_examples=60)
@given(st.data())
def test_dead_pieces_are_exactly_those(data):
    """Against all texts of up to six letters: what the top of extension.py proves, also for scores that tie."""
    texts = data.draw(st.lists(st.text(LETTERS, min_size=2, max_size=5), unique=True, max_size=14))
    scores = data.draw(st.lists(st.integers(-6, -1), min_size=len(texts), max_size=len(texts)))
    pieces = [("<unk>", 0.0, sp.UNKNOWN), ("▁", -9.0, sp.NORMAL), *((letter, -9.0, sp.NORMAL) for letter in LETTERS)]
    prefix = data.draw(st.booleans())

    def model(added):
        options = dict(add_dummy_prefix=prefix, unk_id=0, bos_id=None, eos_id=None, byte_fallback=False)
        return sp.sentencepiece_bytes([*pieces, *added], **options)

    def encode(model_bytes):
        processor = sentencepiece.SentencePieceProcessor(model_proto=model_bytes)
        return [[processor.id_to_piece(i) for i in ids] for ids in processor.encode(ALL_TEXTS)]

    added = [(text, float(score), sp.NORMAL) for text, score in zip(texts, scores)]
    dead = ex.dead_pieces(model(added), range(len(pieces), len(pieces) + len(added)))
    encoded = encode(model(added))
    assert {*dead} == {*texts} - {piece for found in encoded for piece in found}
    assert encode(model([entry for entry in added if entry[0] not in dead])) == encoded, "without them nothing changes"


def test_dead_pieces_are_left_out_or_kept(english_dir, tmp_path, capsys):
    texts = ["意", "大", "利", "大家", "家", "意大利"]  # nothing makes 意大 or 大利, so 意大利 never comes about
    data = sp.sentencepiece_bytes([("<unk>", 0.0, sp.UNKNOWN), *((text, 0.0, sp.NORMAL) for text in texts)],
                                  add_dummy_prefix=False, unk_id=0, bos_id=None, eos_id=None, byte_fallback=False)  # fmt: skip
    (tmp_path / "x.model").write_bytes(data)
    without = tk.extend(english_dir, tmp_path / "x.model", tmp_path / "without")
    assert "can never be produced" in capsys.readouterr().out
    kept = tk.extend(english_dir, tmp_path / "x.model", tmp_path / "kept", keep_dead=True)
    assert {*kept.pieces} - {*without.pieces} == {"意大利"}
    for text in ("意大利", "大家", "在意大利人"):
        assert [kept.pieces[i] for i in kept.encode(text)] == [without.pieces[i] for i in without.encode(text)]


def test_real_dead_pieces(real_extended):
    base, everything, cjk = (real_extended[name] for name in ("base", "all", "cjk"))
    dead = ex.dead_pieces(everything._data, range(len(base), len(everything)))
    assert len(dead) == 344 and {"意大利", "国务院", "越来越"} <= {*dead}
    assert ex.dead_pieces(cjk._data, range(len(base), len(cjk))) == [], "no other piece dies of their absence"
    assert ex.dead_pieces(base._data, range(259, 32000)) == [], "and all of Llama-2's are alive"


# ----------------------------------------------------------------------------------------------------------------------
# Which pieces.


@pytest.mark.parametrize(("text", "reason"), [
    ("法国", ""), ("，但", ""), ("……。", ""), ("约翰·", ""), ("１２", ""), ("の", ""), ("𠀀", ""), ("▁法国", "holds ▁"),
    ("3月", "holds a digit"), ("QQ群", "holds letters of another script"), ("——", "holds other signs"),
    ("。<", "holds other signs"), ("가", "holds letters of another script"), ("é", "holds letters of another script"),
])  # fmt: skip
def test_chinese_throughout(text, reason):
    assert ex._foreign(text) == reason


def test_a_piece_with_an_unknown_character_is_left_out(english_dir):
    """sentencepiece would merge it all the same, and a tokenizer.json could not."""
    base = (english_dir / "tokenizer.model").read_bytes()
    found = ex.extend_model(base, [("国", 0.0, sp.NORMAL), ("国家", 0.0, sp.NORMAL), ("\n", 0.0, sp.NORMAL)], keep="all")
    assert [text for text, _, _ in found.added] == ["国"]
    assert found.skipped[ex.NO_CHARACTER] == ["国家", "\n"]


def test_all_kinds_of_pieces(english_dir, ours_dir, ours, english, tmp_path):
    tokenizer = tk.extend(english_dir, ours_dir, tmp_path / "out", keep="all", keep_dead=True)
    learned = [text for text, _, kind in ours.model.pieces if kind == sp.NORMAL and text not in english.pieces]
    assert tokenizer.pieces[len(english) :] == learned
    assert any("▁" in text for text in learned) and any(text.isascii() for text in learned)


# ----------------------------------------------------------------------------------------------------------------------
# Special tokens, and tokens outside the model.


def test_special_tokens(english_dir, english, extended, tmp_path):
    tokenizer = tk.extend(english_dir, None, tmp_path / "only", specials=("<|im_start|>", "<|im_end|>", "</s>"))
    assert len(tokenizer) == len(english) + 2
    assert tokenizer.encode("<|im_end|>") == english.encode("<|im_end|>"), "plain text stays plain text"
    for one in (tokenizer, extended):
        ids, mask = one.render(messages("你好", "<|im_end|>"), "chatml")
        assert ids.count(one.special_tokens["<|im_end|>"]) == 2 and sum(mask) > 1
        assert one.default_template() == "chatml"


def test_chat_template_stays(english_dir, ours_dir, tmp_path):
    for name in ("llama2", "chatml"):
        tk.load_tokenizer(english_dir).save(tmp_path / f"{name}-base", name)
        specials = ("<|im_start|>", "<|im_end|>")
        assert tk.extend(tmp_path / f"{name}-base", ours_dir, tmp_path / name, specials=specials).template == name


def test_tokens_outside_the_model_keep_their_ids(english_dir, english, ours_dir, tmp_path):
    """As Chinese-Alpaca adds [PAD]; the new pieces must not take its id."""
    added = {str(len(english)): {"content": "[PAD]", "special": True}}
    base = copy_with_config(english_dir, tmp_path / "base", added_tokens_decoder=added, pad_token="[PAD]")
    tokenizer = tk.extend(base, ours_dir, tmp_path / "out")
    assert tokenizer.pad_id == tokenizer.special_tokens["[PAD]"] == len(english)
    assert "[PAD]" not in [tokenizer.pieces[i] for i in tokenizer.encode("[PAD]")]
    gap = {str(len(english) + 1): {"content": "[PAD]", "special": True}}
    base = copy_with_config(english_dir, tmp_path / "gap", added_tokens_decoder=gap)
    with pytest.raises(UserError, match="ids without a token"):
        tk.extend(base, ours_dir, tmp_path / "no")


# ----------------------------------------------------------------------------------------------------------------------
# The command.


def test_command(english_dir, ours_dir, extended_dir, tmp_path, capsys):
    (tmp_path / "t.txt").write_text(ENGLISH + "法国的首都是巴黎。\n", encoding="utf-8")
    out = tmp_path / "deep" / "out"
    specials = ("<|im_start|>", "<|im_end|>")
    tokenizer = tk.extend(english_dir, ours_dir, out, specials=specials, text=tmp_path / "t.txt")
    printed = capsys.readouterr().out
    for phrase in (f"{len(tokenizer):,} (", "2 special tokens", "already there", "holds ▁", "can never be produced",
                   "1 lines without a Chinese character, 1 are encoded as before", "next: python convert.py resize-vocab",
                   "--multiple-of 64"):  # fmt: skip
        assert phrase in printed, phrase
    for file in extended_dir.iterdir():
        assert (out / file.name).read_bytes() == file.read_bytes(), "the same bytes anywhere"
    tk.extend(english_dir, ours_dir, out, specials=specials)
    assert "nothing to do" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"already holds another tokenizer .*keep was cjk and is now all"):
        tk.extend(english_dir, ours_dir, out, specials=specials, keep="all")
    with pytest.raises(UserError, match="the base or new model differs"):
        tk.extend(english_dir, extended_dir, out, specials=specials)
    assert [path.name for path in out.parent.iterdir()] == ["out"], "nothing half-written"


def test_compare_tokens(english, extended, tmp_path):
    lines = ["法国的首都是巴黎", "the fox"]
    (tmp_path / "t.txt").write_text("\n".join(lines), encoding="utf-8")
    found = ex.compare_tokens(english, extended, tmp_path / "t.txt")
    assert found["characters"] == 15 and (found["other_lines"], found["other_changed"]) == (1, 0)
    assert found["before"] == sum(len(english.encode(line)) for line in lines) / 15
    assert found["after"] == sum(len(extended.encode(line)) for line in lines) / 15 < found["before"]


def small_model(path, **options):
    lines = sample_text().split("\n") * 3
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_prefix=str(path), vocab_size=150, character_coverage=1.0, minloglevel=2,
        hard_vocab_limit=False, **options)  # fmt: skip
    return path.with_suffix(".model")


def test_mistakes(english_dir, english, ours_dir, llama3_dir, tmp_path):
    unigram = small_model(tmp_path / "unigram", model_type="unigram")
    normalising = small_model(tmp_path / "nfkc", model_type="bpe")
    newline = sp.sentencepiece_bytes([("<unk>", 0.0, sp.UNKNOWN), ("\n", 0.0, sp.NORMAL)], add_dummy_prefix=False,
                                     unk_id=0, bos_id=None, eos_id=None, byte_fallback=False)  # fmt: skip
    (tmp_path / "newline.model").write_bytes(newline)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "thesis.txt").write_text("mine")
    (tmp_path / "empty.txt").write_text("\n")
    cases = [
        (llama3_dir, ours_dir, {}, "is a tokenizer.json, and extend works on a sentencepiece"),
        (english_dir, llama3_dir, {}, "--new takes a sentencepiece model"),
        (unigram, ours_dir, {}, "is a unigram model"),
        (normalising, ours_dir, {}, "normalises its text"),
        (tmp_path / "newline.model", ours_dir, {}, "pieces with a newline"),
        (english_dir, None, {}, "nothing to add"),
        (english_dir, None, {"specials": ("a", "a", " ", "▁x")}, "' ' .*is empty; .*'▁x' .*holds a ▁.*; .*'a' twice"),
        (english_dir, None, {"specials": ("<a b>", "<c\nd>")}, "'<a b>' .*nobody sees.*'<c.nd>' .*nobody sees"),
        (english_dir, None, {"specials": (english.pieces[-1],)}, "of --specials is already an ordinary token"),
        (english_dir, tmp_path / "nowhere", {}, "does not exist"),
        (english_dir, ours_dir, {"out": tmp_path / "taken"}, "holds something else"),
        (english_dir, ours_dir, {"text": tmp_path / "nowhere.txt"}, "nowhere.txt does not exist"),
        (english_dir, ours_dir, {"text": tmp_path / "empty.txt"}, "holds no text"),
    ]
    for base, new, options, complaint in cases:
        out = options.pop("out", tmp_path / "out")
        with pytest.raises(UserError, match=complaint):
            tk.extend(base, new, out, **options)
        assert not (tmp_path / "out").exists()
    assert (tmp_path / "taken" / "thesis.txt").read_text() == "mine"


def test_extending_twice(english_dir, extended_dir, extended, tmp_path):
    """The pieces of the second step stand below those of the first."""
    data = sp.sentencepiece_bytes([("<unk>", 0.0, sp.UNKNOWN), ("龘", 0.0, sp.NORMAL), ("龘龘", -1.0, sp.NORMAL)],
                                  add_dummy_prefix=False, unk_id=0, bos_id=None, eos_id=None, byte_fallback=False)  # fmt: skip
    (tmp_path / "x.model").write_bytes(data)
    twice = tk.extend(extended_dir, tmp_path / "x.model", tmp_path / "out")
    assert twice.pieces == [*extended.pieces, "龘", "龘龘"] and twice.special_tokens == extended.special_tokens
    assert twice.decode(twice.encode("法国龘龘龘")) == "法国龘龘龘" and twice.encode("龘龘龘")[-2:] == [len(extended) + 1, len(extended)]
    assert json.loads((tmp_path / "out" / "args.json").read_text(encoding="utf-8"))["run"]["base"] == extended.fingerprint
