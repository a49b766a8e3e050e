"""vocabulary.py: old rows stay, new rows are what they say, and none is like another."""

from settings import UserError

from collections import Counter

import pytest
import torch
from tokenizers_at_hand import real

import sentencepiece_model as sp
import tokenizer as tk
import vocabulary as vo
from extension import extend_model
from model import Llama, LlamaConfig

D = 32


def random_rows(count: int, dtype=torch.float32, size: int = D) -> torch.Tensor:
    return (torch.randn(count, size, generator=torch.Generator().manual_seed(3)) * 0.05 + 0.01).to(dtype)


def with_pieces(base: tk.Tokenizer, texts, path) -> tk.Tokenizer:
    path.write_bytes(extend_model(base._data, [(text, 0.0, sp.NORMAL) for text in texts], keep="all", keep_dead=True).data)
    return tk.load_tokenizer(path)


@pytest.mark.parametrize("method", vo.METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_old_rows_stay_and_none_coincides(english, extended, method, dtype):
    rows = random_rows(len(english), dtype)
    maker = vo.RowMaker(english, extended, len(rows), method=method, multiple_of=64)
    for output in (False, True):
        made = maker.resize(rows, output=output)
        assert made.dtype == dtype and made.shape == (maker.size, D)
        assert maker.size % 64 == 0 and 0 <= maker.size - len(extended) < 64
        assert torch.equal(made[: len(rows)], rows) and made.isfinite().all()
        report = vo.row_report(made, maker)
        assert report["coinciding"] == 0 and report["new"] == len(extended) - len(rows)
        assert torch.equal(made, maker.resize(rows, output=output)), "the same seed, the same rows"
        other = vo.RowMaker(english, extended, len(rows), method=method, multiple_of=64, seed=1).resize(rows, output=output)
        assert not torch.equal(made, other)


def test_subword_rows_by_hand(english, tmp_path, monkeypatch):
    monkeypatch.setattr(vo, "NOISE", 0.0)
    new = with_pieces(english, ["龘", "龘the", "▁龘"], tmp_path / "x.model")
    rows = random_rows(len(english))
    parts = [english.pieces.index(piece) for piece in ("<0xE9>", "<0xBE>", "<0x98>")]
    norm = rows.norm(dim=1).mean()
    for output, weights in ((False, (1, 2, 3)), (True, (3, 2, 1))):
        expected = sum(weight * rows[i] for weight, i in zip(weights, parts))
        made = vo.RowMaker(english, new, len(rows)).resize(rows, output=output)
        torch.testing.assert_close(made[new.pieces.index("龘")], expected / expected.norm() * norm)
        spaced = [english.pieces.index("▁"), *parts]
        expected = sum((4 - k if output else k + 1) * rows[i] for k, i in enumerate(spaced))
        torch.testing.assert_close(made[new.pieces.index("▁龘")], expected / expected.norm() * norm)
    torch.testing.assert_close(made[len(english) :].norm(dim=1), norm.expand(3))


def test_subwords_are_read_as_text_behind_other_text(english, extended):
    """No ▁ that is not in the piece, and no "<" lost from "<|im_end|>"."""
    maker = vo.RowMaker(english, extended, len(english))
    for token_id, part in zip(maker.tokens, maker._parts):
        assert b"".join(english.token_bytes[i] for i in part) == extended.token_bytes[token_id]


def test_mean_and_normal_rows(english, extended):
    rows = random_rows(len(english), size=256)
    for method, mean, std in (("mean", rows.mean(0), 0.01 * 0.05), ("normal", torch.zeros(256), 0.02)):
        made = vo.RowMaker(english, extended, len(rows), method=method).resize(rows, output=True)[len(rows) :]
        assert (made - mean).std().item() == pytest.approx(std, rel=0.05)
    made = vo.RowMaker(english, extended, len(rows), method="normal", initializer_range=0.5).resize(rows, output=True)
    assert made[len(rows) :].std().item() == pytest.approx(0.5, rel=0.05)


def test_repetitions_differ(english, tmp_path):
    """哈哈 and 哈哈哈 are one old row repeated: the same for any weights."""
    base = with_pieces(english, ["哈"], tmp_path / "base.model")
    new = with_pieces(base, ["哈哈", "哈哈哈", "哈哈哈哈"], tmp_path / "x.model")
    for dtype in (torch.float32, torch.bfloat16):
        rows = random_rows(len(base), dtype)
        maker = vo.RowMaker(base, new, len(rows))
        made = maker.resize(rows, output=False)
        assert vo.row_report(made, maker)["coinciding"] == 0
        similar = torch.nn.functional.cosine_similarity(made[-1:].float(), made[len(base) - 1 :].float())
        assert similar.min() > 0.99, "but mean the same"


def test_all_chinese_characters(tmp_path):
    """One conversion added all of U+4E00 … U+9FFF to Llama-2, averaging bytes: nearly all rows had a twin."""
    base = real("llama2")
    known = {*base.pieces}
    texts = [chr(code) for code in range(0x4E00, 0xA000) if chr(code) not in known]
    assert len(texts) == 20_292
    new = with_pieces(base, texts, tmp_path / "x.model")
    assert len(new) == 52_292
    rows = random_rows(len(base))
    maker = vo.RowMaker(base, new, len(rows))
    without_order = Counter(tuple(sorted(part)) for part in maker._parts)
    assert sum(count for count in without_order.values() if count > 1) == 18_988
    for dtype, output in ((torch.float32, False), (torch.bfloat16, True)):
        made = maker.resize(rows.to(dtype), output=output)
        assert vo.row_report(made, maker)["coinciding"] == 0


# ----------------------------------------------------------------------------------------------------------------------
# How many rows.


def test_padded_rows_are_taken_first(english, extended):
    """The model has rows behind its last token; they become the new tokens', and those left over stay."""
    for padding in (3, len(extended) - len(english), len(extended) - len(english) + 10):
        rows = random_rows(len(english) + padding)
        maker = vo.RowMaker(english, extended, len(rows), method="mean")
        made = maker.resize(rows, output=False)
        assert maker.size == len(made) == max(len(extended), len(rows))
        assert torch.equal(made[: len(english)], rows[: len(english)])
        assert torch.equal(made[len(extended) :], rows[len(extended) :])
        changed = [i for i in range(len(rows)) if not torch.equal(made[i], rows[i])]
        assert changed == [*range(len(english), min(len(extended), len(rows)))]
        torch.testing.assert_close(made[len(english)], rows[: len(english)].mean(0), atol=0.003, rtol=0)
    assert vo.RowMaker(english, extended, 5000, multiple_of=64).size == 5056


def test_a_tokenizer_with_more_tokens_than_rows(english, extended):
    """Tokens were added to the tokenizer and not to the model, as happens with [PAD]: resizing mends that."""
    rows = random_rows(len(extended) - 2)
    maker = vo.RowMaker(extended, extended, len(rows))
    made = maker.resize(rows, output=True)
    assert len(made) == len(extended) and torch.equal(made[:-2], rows)
    assert maker.new_ids == [len(rows), len(rows) + 1] and made[-2:].norm(dim=1).min() > 0


def test_nothing_to_do(english):
    rows = random_rows(len(english))
    maker = vo.RowMaker(english, english, len(rows))
    assert maker.new_ids == [] and torch.equal(maker.resize(rows, output=True), rows)
    assert vo.row_report(rows, maker) == {"new": 0, "coinciding": 0, "norm_old": rows.norm(dim=1).mean().item(), "norm_new": None}


def test_added_token_of_a_tokenizer_json(llama3_dir, tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    backend = tokenizers.Tokenizer.from_file(str(llama3_dir / "tokenizer.json"))
    backend.add_special_tokens(["<|im_end|>"])
    backend.save(str(tmp_path / "tokenizer.json"))
    old, new = tk.load_tokenizer(llama3_dir), tk.load_tokenizer(tmp_path)
    rows = random_rows(len(old))
    maker = vo.RowMaker(old, new, len(rows))
    assert maker._parts == [old.encode("<|im_end|>")] and len(maker.resize(rows, output=False)) == len(rows) + 1


def test_mistakes(english, extended, ours):
    with pytest.raises(UserError, match=r"the new tokenizer has .* tokens and the model .* taking rows away"):
        vo.RowMaker(extended, english, len(extended))
    with pytest.raises(UserError, match=r"token 3 is '<0x00>' in the model's tokenizer and '<\|im_start\|>' in the new one"):
        vo.RowMaker(english, ours, len(english))
    with pytest.raises(UserError, match=r"no method 'zeros' .* subword, mean, normal"):
        vo.RowMaker(english, extended, len(english), method="zeros")


def test_row_report(english, extended):
    old, new = len(english), len(extended)
    maker = vo.RowMaker(english, extended, old, multiple_of=new + 3)  # three rows of padding
    rows = random_rows(new + 3, torch.bfloat16)
    rows[old + 1], rows[new + 2] = rows[2], rows[old]  # a token with an old row, padding with a token's
    report, norms = vo.row_report(rows, maker), rows.float().norm(dim=1)
    assert (report["new"], report["coinciding"]) == (new - old, 3)
    assert report["norm_new"] == pytest.approx(norms[old:new].mean().item())
    assert report["norm_old"] == pytest.approx(norms[:old].mean().item())


# ----------------------------------------------------------------------------------------------------------------------
# The whole model.


@pytest.mark.parametrize("tied", [False, True])
def test_logits_over_old_tokens_stay(english, extended, tied):
    shape = dict(hidden_size=D, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
                 tie_word_embeddings=tied)  # fmt: skip
    torch.manual_seed(0)
    before = Llama(LlamaConfig(vocab_size=len(english), **shape)).eval()
    maker = vo.RowMaker(english, extended, len(english))
    after = Llama(LlamaConfig(vocab_size=maker.size, **shape)).eval()
    state = before.state_dict()
    for name, output in (("model.embed_tokens.weight", False), ("lm_head.weight", not tied)):
        if name in state:
            state[name] = maker.resize(state[name], output=output)
    after.load_state_dict(state)
    text = "The quick brown fox jumps: 12 dogs"
    ids = torch.tensor([english.encode(text)])
    assert extended.encode(text) == ids[0].tolist()
    with torch.no_grad():
        torch.testing.assert_close(after(ids)[..., : len(english)], before(ids), rtol=0, atol=1e-6)
