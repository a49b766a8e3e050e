"""sparse_attention.py and the model with it, against dense masks; and that nobody sees the future."""

from __future__ import annotations

from settings import UserError

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from model import KVCache, Llama, LlamaConfig
from sparse_attention import Groups, check_groups, shifted_sparse_attention

SMALL = LlamaConfig(vocab_size=97, hidden_size=48, intermediate_size=48, num_hidden_layers=3, num_attention_heads=6,
                    num_key_value_heads=6, max_position_embeddings=64)  # fmt: skip
T, G = 32, 8
DOCS = torch.tensor([[0] * 3 + [1] * 14 + [2] * 15, [5] * 20 + [-1] * 12])  # borders within groups; -1 is padding


def random_model(**changes) -> Llama:
    """Weights large enough that attention matters."""
    torch.manual_seed(0)
    model = Llama(dataclasses.replace(SMALL, **changes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(1.0 if parameter.dim() == 1 else 0.0, 0.15)
    return model.train()


def dense_mask(T: int, g: int, heads: int, doc_ids: Tensor | None = None) -> Tensor:
    """bool [B or 1, heads, T, T], said in one line: same group, not later, same document."""
    i = torch.arange(T)
    group = torch.stack([i // g] * (heads // 2) + [(i + g // 2) // g] * (heads // 2))
    mask = ((group[:, :, None] == group[:, None, :]) & (i[:, None] >= i))[None]
    return mask if doc_ids is None else mask & (doc_ids[:, None, :, None] == doc_ids[:, None, None, :])


def dense(q: Tensor, k: Tensor, v: Tensor, g: int, doc_ids: Tensor | None = None) -> Tensor:
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    scores = q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5
    return scores.masked_fill(~dense_mask(q.shape[2], g, q.shape[1], doc_ids), -torch.inf).softmax(-1) @ v


def ours(q: Tensor, k: Tensor, v: Tensor, g: int, doc_ids: Tensor | None = None) -> Tensor:
    return shifted_sparse_attention(q, k, v, Groups.of(q.shape[2], g, q.shape[1], doc_ids), dropout=0.0)


def rolled(q: Tensor, k: Tensor, v: Tensor, g: int) -> Tensor:
    """What 2309.12307 prints as algorithm 1, with plain causal attention within the groups."""
    def shift(x: Tensor, by: int) -> Tensor:
        first, second = x.chunk(2, dim=1)
        return torch.cat((first, second.roll(by, dims=2)), dim=1)

    q, k, v = (shift(x, -g // 2).unflatten(2, (-1, g)) for x in (q, k, v))  # [B, H, groups, g, hd]
    return shift(F.scaled_dot_product_attention(q, k, v, is_causal=True).flatten(2, 3), g // 2)


def random_qkv(heads: int, keys: int) -> list[Tensor]:
    torch.manual_seed(1)
    return [torch.randn(2, n, T, 16, requires_grad=True) for n in (heads, keys, keys)]


@pytest.mark.parametrize("doc_ids", [None, DOCS], ids=["plain", "packed"])
@pytest.mark.parametrize("heads, keys", [(6, 6), (6, 2), (6, 3), (4, 1)])
@pytest.mark.parametrize("g", [2, G, T // 2, T])
def test_equals_dense_masks_and_so_do_gradients(heads, keys, g, doc_ids):
    qkv = random_qkv(heads, keys)
    found, expected = (attention(*qkv, g, doc_ids) for attention in (ours, dense))
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)
    weights = torch.randn_like(found)
    for a, b in zip(*(torch.autograd.grad((y * weights).sum(), qkv) for y in (found, expected))):
        torch.testing.assert_close(a, b, atol=2e-6, rtol=1e-5)


def seen_from_earlier(attention) -> Tensor:
    """bool [heads, T]: the positions whose output changes when only later tokens do."""
    qkv = [x.detach() for x in random_qkv(6, 6)]
    before, leaks = attention(*qkv, G), torch.zeros(6, T, dtype=torch.bool)
    for late in range(1, T):
        changed = [torch.cat((x[:, :, :late], torch.randn_like(x[:, :, late:])), dim=2) for x in qkv]
        leaks[:, :late] |= ((attention(*changed, G) - before).abs() > 1e-5).any(-1).any(0)[:, :late]
    return leaks


def test_no_head_sees_the_future():
    assert not seen_from_earlier(ours).any()
    leaks = seen_from_earlier(rolled)  # the authors' code: half the heads, the first half group
    expected = torch.zeros_like(leaks)
    expected[3:, : G // 2] = True
    assert torch.equal(leaks, expected)


def test_rolling_agrees_everywhere_else():
    qkv = random_qkv(6, 6)
    torch.testing.assert_close(ours(*qkv, G)[:, :, G // 2 : -G // 2], rolled(*qkv, G)[:, :, G // 2 : -G // 2], atol=1e-6, rtol=1e-5)


def test_dropout_falls_on_every_part():
    torch.manual_seed(0)
    q, ones = torch.randn(64, 4, T, 4), torch.ones(64, 4, T, 4)
    y = shifted_sparse_attention(q, q, ones, Groups.of(T, G, 4, None), dropout=0.25)[..., 0]  # the sum of the weights
    torch.testing.assert_close(y.mean(0), torch.ones(4, T), atol=0.4, rtol=0)
    assert (y.var(0) > 0.01).all()


def test_masks_are_of_groups():
    masks = Groups.of(T, G, 6, DOCS).masks
    assert sum(mask.numel() for mask in masks) == 2 * (2 * T * G - G * G // 2)
    assert all(mask.dtype == torch.bool for mask in masks)


# ---- In the model ----------------------------------------------------------------------------------------------------

TOKENS = torch.randint(0, 97, (2, T), generator=torch.Generator().manual_seed(2))


def gradients(model: Llama, **inputs) -> tuple[Tensor, ...]:
    return torch.autograd.grad(model(TOKENS, TOKENS, **inputs), list(model.parameters()))


@pytest.mark.parametrize("doc_ids", [None, DOCS], ids=["plain", "packed"])
@pytest.mark.parametrize("keys", [6, 2])
def test_model_equals_dense_masks(keys, doc_ids, monkeypatch):
    model = random_model(num_key_value_heads=keys)
    model.group_size = G
    found, slopes = model(TOKENS, doc_ids=doc_ids), gradients(model, doc_ids=doc_ids)
    model.checkpointing = True
    for a, b in zip(gradients(model, doc_ids=doc_ids), slopes):
        torch.testing.assert_close(a, b, atol=1e-7, rtol=1e-6)
    model.group_size, model.checkpointing = 0, False
    full = model(TOKENS, doc_ids=doc_ids)
    assert not torch.allclose(full, found, atol=1e-2)
    monkeypatch.setattr(model, "_mask", lambda T, start, device, doc_ids, starts: dense_mask(T, G, 6, doc_ids))
    torch.testing.assert_close(found, model(TOKENS, doc_ids=doc_ids), atol=1e-5, rtol=1e-5)
    for a, b in zip(slopes, gradients(model, doc_ids=doc_ids)):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)


def test_a_late_token_never_changes_an_earlier_logit():
    model = random_model()
    model.group_size = G
    with torch.no_grad():
        before = model(TOKENS)
        for late in range(T):
            changed = TOKENS.clone()
            changed[:, late] = (changed[:, late] + 1) % 97
            after = model(changed)
            torch.testing.assert_close(after[:, :late], before[:, :late], atol=1e-6, rtol=0)
            assert not torch.allclose(after[:, late], before[:, late], atol=1e-2)


def test_checkpointing_with_dropout_draws_the_same():
    model, found = random_model(dropout=0.3), []
    model.group_size = G
    for model.checkpointing in (False, True):
        torch.manual_seed(3)
        found.append(gradients(model, doc_ids=DOCS))
    for a, b in zip(*found):
        torch.testing.assert_close(a, b, atol=1e-7, rtol=1e-6)


def test_evaluation_and_generation_use_full_attention():
    model = random_model().eval()
    with torch.no_grad():
        full = [model(TOKENS), model(TOKENS, doc_ids=DOCS), model(TOKENS[:, :13])]  # of 13 tokens there are no groups
        answer = list(model.generate([[1, 2, 3]] * 2, 5, temperature=0))
        model.group_size = G
        for a, b in zip(full, (model(TOKENS), model(TOKENS, doc_ids=DOCS), model(TOKENS[:, :13]))):
            assert torch.equal(a, b)
        torch.testing.assert_close(model.train()(TOKENS, cache=KVCache(SMALL, 2, T)), full[0], atol=1e-5, rtol=1e-5)
        for use_cache in (True, False):
            assert list(model.train().generate([[1, 2, 3]] * 2, 5, temperature=0, use_cache=use_cache)) == answer
    assert model.training


# ---- Bad input -------------------------------------------------------------------------------------------------------


def test_check_groups():
    assert check_groups(SMALL, 64) == 16
    assert check_groups(SMALL, 8) == 2
    for length, named in ((60, "--seq-len 60 is not a multiple of 8; take 56 or 64"), (7, "--seq-len 7 is not a multiple of 8; take 8"),
                          (0, "take 8")):  # fmt: skip
        with pytest.raises(UserError, match=named) as error:
            check_groups(SMALL, length)
        assert "--s2-attn" in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(UserError, match="shifts half of the attention heads, and this model has 3;"):
        check_groups(dataclasses.replace(SMALL, num_attention_heads=3, num_key_value_heads=3), 64)


@pytest.mark.parametrize("length, size, heads", [(T, 6, 6), (T - 1, G, 6), (4, G, 6), (27, 9, 6), (T, 1, 6), (T, -8, 6), (T, G, 3)])
def test_what_cannot_be_cut(length, size, heads):
    model = random_model(num_attention_heads=heads, num_key_value_heads=heads)
    model.group_size = size
    with pytest.raises(UserError, match=f"cannot cut {length} tokens and {heads} heads into groups of {size}"):
        model(TOKENS[:, :length])
