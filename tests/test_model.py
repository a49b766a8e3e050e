"""model.py against transformers, and against itself: cached = uncached, packed = alone, chunked loss = plain loss."""

from __future__ import annotations

from settings import UserError

import dataclasses
import json

import pytest
import torch
import torch.nn.functional as F

import loss as loss_module
from model import (
    IGNORE,
    PRESETS,
    KVCache,
    Llama,
    LlamaConfig,
    linear_cross_entropy,
    rope_frequencies,
    sample,
    token_log_probs,
)

transformers = pytest.importorskip("transformers")

SMALL = LlamaConfig(vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                    num_key_value_heads=4, max_position_embeddings=24)  # fmt: skip
ROPES = {
    "default": None,
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 4.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 24},
    "llama3": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
               "original_max_position_embeddings": 24},
}  # fmt: skip
SHAPES = {
    "mha": {},
    "gqa": {"num_key_value_heads": 2},
    "tied": {"tie_word_embeddings": True},
    "head_dim": {"head_dim": 16, "num_key_value_heads": 1},
    "biases": {"attention_bias": True, "mlp_bias": True},
}


def random_model(config: LlamaConfig, seed: int = 0) -> Llama:
    """Weights large enough that attention and every rotary pair matter."""
    torch.manual_seed(seed)
    model = Llama(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(1.0 if parameter.dim() == 1 else 0.0, 0.15)
    return model.eval()


def theirs(ours: Llama):
    """The same weights in transformers' code, through the dictionary that we would write."""
    data = json.loads(json.dumps(ours.config.to_dict()))
    data = {key: value for key, value in data.items() if key not in ("architectures", "model_type")}
    other = transformers.LlamaForCausalLM(transformers.LlamaConfig(**data, attn_implementation="eager"))
    other.load_state_dict(ours.state_dict(), strict=True)
    return other.eval()


@pytest.mark.parametrize("name, millions", [("92m", 91.653632), ("218m", 218.155008), ("500m", 502.22592), ("1b", 1105.842176),
                                            ("llama2-7b", 6738.415616), ("llama3-8b", 8030.261248),
                                            ("llama3-70b", 70553.706496)])  # fmt: skip
def test_preset_parameter_counts(name, millions):
    with torch.device("meta"):
        assert Llama(PRESETS[name]).num_parameters() == round(millions * 1e6)


# ---- RoPE ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config, length, attention, values", [
    (dict(head_dim=128, rope_scaling={"rope_type": "yarn", "factor": 16, "original_max_position_embeddings": 4096}), 8192, 1.2772588722,
     {0: 1, 1: 0.865964353, 8: 0.316227764, 20: 0.0562341288, 32: 0.00567307696, 40: 0.000881788961, 63: 7.21738706e-06}),
    (dict(head_dim=128, rope_theta=5e5, rope_scaling={"rope_type": "llama3", "factor": 8, "low_freq_factor": 1, "high_freq_factor": 4,
                                                     "original_max_position_embeddings": 8192}), 8192, 1.0,
     {0: 1, 1: 0.814617217, 24: 0.00729266508, 32: 0.000524846022, 40: 3.42810235e-05, 63: 3.06892588e-07}),
    (dict(head_dim=128, max_position_embeddings=4096, rope_scaling={"rope_type": "dynamic", "factor": 2}), 8192, 1.0,
     {1: 0.850994289, 8: 0.275050968, 16: 0.0756530315, 63: 3.84927334e-05}),
])  # fmt: skip
def test_rope_published_values(config, length, attention, values):
    frequencies, factor = rope_frequencies(dataclasses.replace(SMALL, **config), length)
    assert factor == pytest.approx(attention, rel=1e-9)
    for index, value in values.items():
        assert frequencies[index].item() == pytest.approx(value, rel=2e-6)


@pytest.mark.parametrize("rope", ROPES.values(), ids=ROPES)
@pytest.mark.parametrize("length", [8, 60])
def test_rope_equals_transformers(rope, length):
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    config = dataclasses.replace(SMALL, rope_scaling=rope, head_dim=16)
    data = {k: v for k, v in config.to_dict().items() if k not in ("architectures", "model_type")}
    hf = transformers.LlamaConfig(**json.loads(json.dumps(data)))
    if rope is None:
        inverse, factor = LlamaRotaryEmbedding(hf).inv_freq, 1.0
    else:
        inverse, factor = ROPE_INIT_FUNCTIONS[rope["rope_type"]](hf, torch.device("cpu"), seq_len=length)
    ours, our_factor = rope_frequencies(config, length)
    torch.testing.assert_close(ours, inverse, rtol=1e-6, atol=0)
    assert our_factor == pytest.approx(factor)


@pytest.mark.parametrize("spelling", ["type", "rope_type", "rope_parameters"])
def test_config_reads_every_spelling(spelling):
    base = {"vocab_size": 10, "hidden_size": 32, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    if spelling == "rope_parameters":
        data = {**base, "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5}}
    else:
        data = {**base, "rope_theta": 5e5, "rope_scaling": {spelling: "linear", "factor": 2.0}}
    config = LlamaConfig.from_dict(data)
    assert config.rope_theta == 5e5 and config.rope_scaling == {"rope_type": "linear", "factor": 2.0}
    assert config.num_key_value_heads == 2 and config.rms_norm_eps == 1e-6


def test_config_of_llama3_families_round_trips(tmp_path):
    data = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 128256, "hidden_size": 2048,
            "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64,
            "max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "tie_word_embeddings": True,
            "bos_token_id": 128000, "eos_token_id": [128001, 128008, 128009], "rope_scaling": {
                "factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0, "original_max_position_embeddings": 8192,
                "rope_type": "llama3"}}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(data))
    config = LlamaConfig.from_json(tmp_path)
    frequencies, _ = rope_frequencies(config, 1)
    assert frequencies[31].item() == pytest.approx(9.41830649e-08, rel=1e-6)  # Llama-3.2-1B's slowest pair
    config.to_json(tmp_path / "again.json")
    assert LlamaConfig.from_json(tmp_path / "again.json") == config


@pytest.mark.parametrize("change, message", [
    ({"rope_scaling": {"rope_type": "longrope", "factor": 2}}, "longrope"),
    ({"rope_scaling": {"type": "yarn"}}, "needs factor"),
    ({"rope_scaling": {"type": "linear", "factor": 0.5}}, "at least 1"),
    ({"num_attention_heads": 3}, "multiple of num_attention_heads 3"),
    ({"num_attention_heads": 4, "num_key_value_heads": 3}, "multiple of num_key_value_heads 3"),
    ({"hidden_size": 0}, "hidden_size"),
    ({"rms_norm_eps": "1e-5"}, "rms_norm_eps"),
    ({"rope_theta": "abc"}, "rope_theta"),
    ({"rope_scaling": "yarn"}, "rope_scaling must be an object"),
    ({"rope_scaling": {"type": "yarn", "factor": 2, "original_max_position_embeddings": "x"}}, "original_max_position_embeddings"),
    ({"tie_word_embeddings": "false"}, "must be true or false"),
    ({"model_type": "qwen2"}, "qwen2"),
    ({"hidden_act": "gelu"}, "gelu"),
])  # fmt: skip
def test_config_refuses(tmp_path, change, message):
    base = {"vocab_size": 10, "hidden_size": 32, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**base, **change}))
    with pytest.raises(UserError, match=message) as error:
        LlamaConfig.from_json(path)
    assert str(path) in str(error.value)


def test_config_broken_json_names_the_line(tmp_path):
    (tmp_path / "config.json").write_text('{"vocab_size": 3,\n oops}')
    with pytest.raises(UserError, match=r"config\.json:2: not valid JSON"):
        LlamaConfig.from_json(tmp_path)


def test_rope_scaling_takes_the_original_length_from_the_model():
    longer = SMALL.with_rope_scaling("yarn", 4)
    assert longer.max_position_embeddings == 96 and longer.rope_scaling["original_max_position_embeddings"] == 24
    assert longer.with_rope_scaling("yarn", 8).rope_scaling["original_max_position_embeddings"] == 24
    assert longer.with_rope_scaling("yarn", 8).max_position_embeddings == 192
    dynamic = SMALL.with_rope_scaling("dynamic", 4)
    assert dynamic.max_position_embeddings == 24 and dynamic.context_length == 96
    with pytest.raises(UserError, match="already scaled"):
        longer.with_rope_scaling("linear", 2)


# ---- parity with transformers ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("rope", ROPES.values(), ids=ROPES)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@torch.no_grad()
def test_logits_equal_transformers(shape, rope):
    ours = random_model(dataclasses.replace(SMALL, rope_scaling=rope, **shape))
    tokens = torch.randint(0, 97, (2, 60), generator=torch.Generator().manual_seed(1))  # beyond the trained 24
    torch.testing.assert_close(ours(tokens), theirs(ours)(tokens).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("rope", [r for name, r in ROPES.items() if name != "dynamic"], ids=[n for n in ROPES if n != "dynamic"])
@pytest.mark.parametrize("shape", ["mha", "gqa", "tied", "head_dim"])
@torch.no_grad()
def test_greedy_tokens_equal_transformers(shape, rope):
    ours = random_model(dataclasses.replace(SMALL, rope_scaling=rope, **SHAPES[shape]))
    prompt = [5, 17, 33, 60, 2, 9]
    mine = [step[0] for step in ours.generate([prompt], 64, temperature=0)]
    other = theirs(ours).generate(torch.tensor([prompt]), max_new_tokens=64, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert mine == other[0, len(prompt) :].tolist() and (len(set(mine)) > 3 or shape == "tied")  # tied random weights repeat


@pytest.mark.parametrize("rope", ROPES.values(), ids=ROPES)
def test_cached_generation_equals_uncached(rope):
    ours = random_model(dataclasses.replace(SMALL, rope_scaling=rope, num_key_value_heads=2))
    prompt = list(range(3, 33))
    wanted = list(ours.generate([prompt], 40, temperature=0, use_cache=False))
    assert list(ours.generate([prompt], 40, temperature=0)) == wanted
    assert list(ours.generate([prompt], 40, temperature=0, prefill_chunk=7)) == wanted


@pytest.mark.parametrize("rope", ROPES.values(), ids=ROPES)
@torch.no_grad()
def test_cached_logits_equal_full_forward_at_every_step(rope):
    ours = random_model(dataclasses.replace(SMALL, rope_scaling=rope, num_key_value_heads=2))
    tokens = torch.randint(0, 97, (2, 50))
    full, cache = ours(tokens), KVCache(ours.config, 2, 50)
    parts = [ours(chunk, cache=cache) for chunk in tokens.split([9, 1, 1, 20, 1, 18], dim=1)]
    torch.testing.assert_close(torch.cat(parts, 1), full, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_mixed_lengths_in_a_batch_equal_each_alone():
    ours = random_model(SMALL)
    prompts = [[4, 5, 6, 7, 8, 9, 10], [11], [12, 13, 14]]
    together = list(zip(*ours.generate(prompts, 12, temperature=0)))
    for prompt, tokens in zip(prompts, together):
        assert list(tokens) == [step[0] for step in ours.generate([prompt], 12, temperature=0)]


@torch.no_grad()
def test_last_only_is_the_last_position():
    ours, tokens = random_model(SMALL), torch.randint(0, 97, (2, 9))
    torch.testing.assert_close(ours(tokens, last_only=True), ours(tokens)[:, -1:])


@torch.no_grad()
def test_documents_in_a_row_do_not_see_each_other():
    ours = random_model(SMALL)
    a, b = torch.randint(0, 97, (1, 7)), torch.randint(0, 97, (1, 11))
    packed = ours(torch.cat((a, b), 1), doc_ids=torch.tensor([[0] * 7 + [1] * 11]),
                  positions=torch.cat((torch.arange(7), torch.arange(11)))[None])  # fmt: skip
    torch.testing.assert_close(packed, torch.cat((ours(a), ours(b)), 1), atol=1e-5, rtol=1e-5)


# ---- the loss --------------------------------------------------------------------------------------------------------


def plain_loss(hidden, weight, targets, denominator):
    logits = F.linear(hidden, weight).float().flatten(0, -2)
    return F.cross_entropy(logits, targets.flatten(), ignore_index=IGNORE, reduction="sum") / denominator


@pytest.mark.parametrize("denominator", [None, 7.5])
def test_loss_and_gradients_equal_the_plain_ones(monkeypatch, denominator):
    monkeypatch.setattr(loss_module, "CHUNK_ELEMENTS", 97 * 5)  # several chunks, the last one short
    torch.manual_seed(0)
    hidden, weight = torch.randn(2, 9, 16, requires_grad=True), torch.randn(97, 16, requires_grad=True)
    targets = torch.randint(0, 97, (2, 9))
    targets[0, :4] = IGNORE
    wanted = plain_loss(hidden, weight, targets, denominator or 14)
    ours = linear_cross_entropy(hidden, weight, targets, denominator)
    torch.testing.assert_close(ours, wanted)
    for mine, reference in zip(torch.autograd.grad(ours * 3, (hidden, weight)), torch.autograd.grad(wanted * 3, (hidden, weight))):
        torch.testing.assert_close(mine, reference, atol=1e-6, rtol=1e-4)
    with torch.no_grad():
        torch.testing.assert_close(linear_cross_entropy(hidden, weight, targets, denominator), wanted.detach())
    counted = targets != IGNORE
    scores = F.linear(hidden, weight).log_softmax(-1).gather(-1, targets.clamp(min=0)[..., None]).squeeze(-1) * counted
    torch.testing.assert_close(token_log_probs(hidden.detach(), weight, targets), scores.detach(), atol=1e-5, rtol=1e-5)


def test_loss_under_autocast_stays_near_and_never_materialises_all_logits(monkeypatch):
    monkeypatch.setattr(loss_module, "CHUNK_ELEMENTS", 97 * 16)
    torch.manual_seed(0)
    hidden, weight, targets = torch.randn(64, 32), torch.randn(97, 32) * 0.1, torch.randint(0, 97, (64,))
    hidden.requires_grad_(), weight.requires_grad_()
    biggest = []
    real_empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: biggest.append((t := real_empty(*a, **k)).numel()) or t)
    with torch.autocast("cpu", torch.bfloat16):
        ours = linear_cross_entropy(hidden, weight, targets)
    assert max(biggest) <= max(97 * 16, 97 * 32)
    wanted = plain_loss(hidden, weight, targets, 64)
    assert ours.item() == pytest.approx(wanted.item(), rel=2e-3)
    mine, reference = torch.autograd.grad(ours, weight)[0], torch.autograd.grad(wanted, weight)[0]
    assert F.cosine_similarity(mine.flatten(), reference.flatten(), dim=0) > 0.999


def test_no_counted_target_is_zero_loss_and_zero_gradient():
    hidden, weight = torch.randn(3, 4, requires_grad=True), torch.randn(9, 4, requires_grad=True)
    loss = linear_cross_entropy(hidden, weight, torch.full((3,), IGNORE), 5)
    loss.backward()
    assert loss.item() == 0 and hidden.grad.abs().sum() == 0 and weight.grad.abs().sum() == 0


@pytest.mark.parametrize("tied", [False, True])
def test_model_loss_equals_transformers_loss(tied):
    ours = random_model(dataclasses.replace(SMALL, tie_word_embeddings=tied)).train()
    other = theirs(ours).train()
    tokens = torch.randint(0, 97, (2, 20))
    reference = other(tokens, labels=tokens).loss
    loss = ours(tokens[:, :-1], tokens[:, 1:])
    assert loss.item() == pytest.approx(reference.item(), rel=1e-5)
    loss.backward(), reference.backward()
    gradients = {name: parameter.grad for name, parameter in other.named_parameters()}
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], atol=1e-5, rtol=1e-3)


def test_checkpointing_changes_memory_not_numbers():
    ours, tokens = random_model(SMALL).train(), torch.randint(0, 97, (2, 20))
    plain = torch.autograd.grad(ours(tokens, tokens), list(ours.parameters()))
    ours.checkpointing = True
    for a, b in zip(plain, torch.autograd.grad(ours(tokens, tokens), list(ours.parameters()))):
        torch.testing.assert_close(a, b)


def test_dropout_acts_in_training_only():
    ours, tokens = random_model(dataclasses.replace(SMALL, dropout=0.5)), torch.randint(0, 97, (1, 20))
    with torch.no_grad():
        assert torch.equal(ours.eval()(tokens), ours(tokens))
        assert not torch.equal(ours.train()(tokens), ours(tokens))


def test_residual_projections_start_smaller():
    torch.manual_seed(0)
    ours = Llama(dataclasses.replace(SMALL, hidden_size=128, num_hidden_layers=8))
    assert ours.model.layers[0].mlp.down_proj.weight.std().item() == pytest.approx(0.02 / 4, rel=0.1)
    assert ours.model.layers[0].mlp.up_proj.weight.std().item() == pytest.approx(0.02, rel=0.1)


# ---- sampling --------------------------------------------------------------------------------------------------------


def frequencies_of(logits, n=20000, **settings) -> torch.Tensor:
    uniform = torch.rand(n, generator=torch.Generator().manual_seed(0))
    picks = sample(logits.expand(n, -1), uniform, **settings)
    return torch.bincount(picks, minlength=logits.shape[-1]) / n


LOGITS = torch.log(torch.tensor([[0.05, 0.4, 0.3, 0.2, 0.05]]))


@pytest.mark.parametrize("settings, wanted", [
    ({}, [0.05, 0.4, 0.3, 0.2, 0.05]),
    ({"temperature": 0}, [0, 1, 0, 0, 0]),
    ({"temperature": 0.5}, [0.0025, 0.16, 0.09, 0.04, 0.0025]),
    ({"top_k": 2}, [0, 0.4, 0.3, 0, 0]),
    ({"top_p": 0.6}, [0, 0.4, 0.3, 0, 0]),
    ({"top_p": 0.0}, [0, 1, 0, 0, 0]),
    ({"min_p": 0.45}, [0, 0.4, 0.3, 0.2, 0]),
])  # fmt: skip
def test_sampling_follows_the_definition(settings, wanted):
    wanted = torch.tensor(wanted) / sum(wanted)
    torch.testing.assert_close(frequencies_of(LOGITS, **settings), wanted, atol=0.015, rtol=0)


def test_filters_keep_what_transformers_keeps():
    from transformers import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    logits = torch.randn(1, 50, generator=torch.Generator().manual_seed(3)) * 2
    for settings, warper in (({"top_k": 7}, TopKLogitsWarper(7)), ({"top_p": 0.7}, TopPLogitsWarper(0.7)),
                             ({"min_p": 0.1}, MinPLogitsWarper(0.1))):  # fmt: skip
        kept = torch.isfinite(warper(None, logits.clone())).squeeze(0)
        assert torch.equal(frequencies_of(logits, 200000, **settings) > 0, kept)


def test_repetition_penalty_equals_transformers():
    from transformers import RepetitionPenaltyLogitsProcessor

    logits, seen_ids = torch.tensor([[2.0, 1.9, -0.1, -0.2]]), torch.tensor([[0, 2]])
    wanted = RepetitionPenaltyLogitsProcessor(1.5)(seen_ids, logits.clone()).argmax(-1)
    seen = torch.tensor([[True, False, True, False]])
    ours = sample(logits, torch.zeros(1), temperature=0, repetition_penalty=1.5, seen=seen)
    assert ours.item() == wanted.item() == 1


def test_generate_stops_streams_and_repeats_with_a_seed():
    ours = random_model(SMALL)
    tokens = [step[0] for step in ours.generate([[1, 2, 3]], 20, seed=7)]
    assert tokens == [step[0] for step in ours.generate([[1, 2, 3]], 20, seed=7)]
    assert tokens != [step[0] for step in ours.generate([[1, 2, 3]], 20, seed=8)]
    stop = tokens[5]
    stopped = [step[0] for step in ours.generate([[1, 2, 3]], 20, seed=7, stop_ids=[stop])]
    assert stopped == tokens[: tokens.index(stop)]
    with pytest.raises(UserError, match="at least one token"):
        next(ours.generate([[]], 3))


def test_generation_leaves_the_random_numbers_of_training_alone():
    ours = random_model(SMALL)
    torch.manual_seed(5)
    wanted = torch.rand(3)
    for settings in ({"temperature": 0}, {"seed": 3}, {}):
        torch.manual_seed(5)
        list(ours.generate([[1, 2]], 4, **settings))
        assert torch.equal(torch.rand(3), wanted)


@pytest.mark.parametrize("bad", [float("nan"), float("-inf")])
def test_logits_that_are_not_finite_do_not_end_a_run(bad):
    assert 0 <= sample(torch.full((1, 7), bad), torch.tensor([0.5])).item() < 7


def test_cache_that_is_too_small_is_an_error():
    ours = random_model(SMALL)
    with pytest.raises(ValueError, match="do not fit"):
        ours(torch.zeros(1, 5, dtype=torch.long), cache=KVCache(SMALL, 1, 4))
