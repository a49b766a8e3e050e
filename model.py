"""The model: a Llama, written by hand.

    LlamaConfig, PRESETS    the architecture (config.py)
    rope_frequencies        rotary embedding with linear, dynamic-NTK, YaRN and llama3 scaling: one pure function
    Attention, MLP, Block   grouped-query attention, SwiGLU, pre-norm residual blocks
    linear_cross_entropy    the training loss, which never holds the [B·T, V] logits (loss.py)
    KVCache, generate       streaming text generation

Shapes are written with B batch, T tokens, D hidden size, H query heads, K key/value heads, hd head size, F feed-forward
size, V vocabulary, L layers, S cache capacity. Parameter names are Hugging Face's, so a state dict is a checkpoint.

    >>> model = Llama(PRESETS["tiny"])
    >>> logits = model(tokens)                         # [B, T] -> [B, T, V]
    >>> loss = model(tokens, targets)                  # mean over targets that are not -100
"""

from __future__ import annotations

from settings import UserError

import math
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from config import PRESETS, LlamaConfig
from layers import Linear
from loss import IGNORE, linear_cross_entropy, matmul_dtype, token_log_probs
from sparse_attention import Groups, shifted_sparse_attention

__all__ = ["IGNORE", "PRESETS", "KVCache", "Llama", "LlamaConfig", "rope_frequencies", "sample", "token_log_probs"]

# ----------------------------------------------------------------------------------------------------------------------
# Rotary position embedding


def rope_frequencies(config: LlamaConfig, length: int) -> tuple[Tensor, float]:
    """Angular frequencies of the rotary pairs, and the factor that multiplies cos and sin.

    `length` is the number of tokens being read; only dynamic NTK looks at it. Returns inv_freq [hd/2] float32 in radians
    per position, and the attention factor (1 except for YaRN). Sources: RoFormer (2104.09864); linear: 2306.15595;
    YaRN: 2309.00071 §3; llama3: the Llama 3.1 release. Values equal transformers' for every type (tests/test_model.py).
    """
    d, theta, rope = config.head_dim, config.rope_theta, config.rope_scaling or {"rope_type": "default"}
    exponent = torch.arange(0, d, 2, dtype=torch.float32) / d
    kind, s = rope["rope_type"], float(rope.get("factor", 1.0))
    if kind == "dynamic":  # a larger base stretches the slow pairs by what the text exceeds the trained length
        M = config.max_position_embeddings
        n = max(length, M)
        theta = theta * ((s * n / M) - (s - 1)) ** (d / (d - 2))
    f = 1.0 / (theta**exponent)
    if kind == "linear":
        return f / s, 1.0
    if kind == "yarn":  # fast pairs as they are, slow pairs interpolated, a ramp between
        L = rope["original_max_position_embeddings"]

        def pair_that_turns(b: float) -> float:  # the pair whose wavelength makes b turns within the trained length
            return d * math.log(L / (2 * math.pi * b)) / (2 * math.log(theta))

        low, high = pair_that_turns(rope.get("beta_fast") or 32), pair_that_turns(rope.get("beta_slow") or 1)
        if rope.get("truncate", True):
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, d - 1)
        high = high + 0.001 if low == high else high
        ramp = ((torch.arange(d // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)

        def temperature(mscale: float = 1.0) -> float:
            return 0.1 * mscale * math.log(s) + 1.0 if s > 1 else 1.0

        factor = rope.get("attention_factor")
        if factor is None and rope.get("mscale") and rope.get("mscale_all_dim"):
            factor = temperature(rope["mscale"]) / temperature(rope["mscale_all_dim"])
        return f * (1 - ramp) + (f / s) * ramp, temperature() if factor is None else factor
    if kind == "llama3":
        L, lo, hi = rope["original_max_position_embeddings"], rope["low_freq_factor"], rope["high_freq_factor"]
        wavelength = 2 * math.pi / f
        k = (L / wavelength - lo) / (hi - lo)
        middle = (1 - k) * f / s + k * f
        return torch.where(wavelength < L / hi, f, torch.where(wavelength > L / lo, f / s, middle)), 1.0
    return f, 1.0


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair (i, i + hd/2) of x [B, heads, T, hd] by its angle; cos, sin are float32 [B or 1, 1, T, hd/2].

    The rotation is computed in float32 (bf16 holds 8 bits: too few for the angle of a far position) and cast back.
    """
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), dim=-1).to(x.dtype)


# ----------------------------------------------------------------------------------------------------------------------
# Layers


class KVCache:
    """Keys and values of the tokens read so far, in memory reserved once: [L, B, K, S, hd].

    `starts` [B] counts the padding tokens on the left of every row, so that prompts of unequal length share a batch.
    """

    def __init__(self, config: LlamaConfig, batch_size: int, capacity: int, device=None, dtype=None, starts: Tensor | None = None):
        shape = (config.num_hidden_layers, batch_size, config.num_key_value_heads, capacity, config.head_dim)
        self.keys = torch.zeros(shape, device=device, dtype=dtype)
        self.values = torch.zeros(shape, device=device, dtype=dtype)
        self.capacity, self.starts, self.length = capacity, starts, 0

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store k, v [B, K, T, hd] behind what is there; return all keys and values [B, K, length + T, hd]."""
        end = self.length + k.shape[2]
        self.keys[layer, :, :, self.length : end] = k
        self.values[layer, :, :, self.length : end] = v
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]


class RMSNorm(nn.Module):
    """x / sqrt(mean(x²) + eps) · weight, over the last dimension (1910.07467)."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)


class Attention(nn.Module):
    """Grouped-query attention: H query heads share K key/value heads (2305.13245)."""

    def __init__(self, config: LlamaConfig, layer: int):
        super().__init__()
        D, H, K, hd, bias = (config.hidden_size, config.num_attention_heads, config.num_key_value_heads,
                             config.head_dim, config.attention_bias)  # fmt: skip
        self.layer, self.head_dim, self.dropout = layer, hd, config.dropout
        self.q_proj = nn.Linear(D, H * hd, bias=bias)
        self.k_proj = nn.Linear(D, K * hd, bias=bias)
        self.v_proj = nn.Linear(D, K * hd, bias=bias)
        self.o_proj = nn.Linear(H * hd, D, bias=bias)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | Groups | None, cache: KVCache | None) -> Tensor:
        B, T, _ = x.shape
        q = self.q_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # [B, H, T, hd]
        k = self.k_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # [B, K, T, hd]
        v = self.v_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)
        q, k = apply_rope(q, cos, sin), apply_rope(k, cos, sin)
        causal, grouped, dropout = mask is None and T > 1, q.shape[1] != k.shape[1], self.dropout if self.training else 0.0
        if cache is not None:
            k, v = cache.update(self.layer, k.to(cache.keys.dtype), v.to(cache.values.dtype))
            k, v = k.to(q.dtype), v.to(q.dtype)
        if grouped and mask is not None and q.is_cuda:  # there only flash attention shares heads, and it takes no mask
            k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
            grouped = False
        if isinstance(mask, Groups):
            y = shifted_sparse_attention(q, k, v, mask, dropout)
        else:
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, dropout_p=dropout, enable_gqa=grouped)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, -1))


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) · up(x)) (2002.05202)."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        D, I, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_proj = nn.Linear(D, I, bias=bias)
        self.up_proj = nn.Linear(D, I, bias=bias)
        self.down_proj = nn.Linear(I, D, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, config: LlamaConfig, layer: int):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | Groups | None, cache: KVCache | None) -> Tensor:
        x = x + self.dropout(self.self_attn(self.input_layernorm(x), cos, sin, mask, cache))
        return x + self.dropout(self.mlp(self.post_attention_layernorm(x)))


class Decoder(nn.Module):
    """The part that Hugging Face calls `model`: embedding, blocks, final norm."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.dropout = nn.Dropout(config.dropout)


# ----------------------------------------------------------------------------------------------------------------------
# The whole


class Llama(nn.Module):
    def __init__(self, config: LlamaConfig, init: bool = True):
        """On the meta device, or with init=False, the weights get no values: see `initial_weights`."""
        super().__init__()
        self.config = config
        self._frequencies: tuple | None = None  # (key, rotary frequencies, attention factor): see _rope
        self.adapter_shapes: dict[str, torch.Size] = {}  # of parameters that were added to the architecture's: adapters.py
        self.checkpointing = False  # recompute each block in backward: less memory, about a third more time
        self.group_size: int = 0  # tokens per group of shifted sparse attention, in training alone; 0: full attention
        self.model = Decoder(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.tie_weights()
        if init and not self.lm_head.weight.is_meta:
            self.init_weights()

    def tie_weights(self) -> None:
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def _apply(self, change, recurse: bool = True) -> Llama:
        """What .to(), .half() … do. On devices that come from outside torch (npu) it makes two parameters of a shared one."""
        super()._apply(change, recurse)
        self.tie_weights()
        return self

    @torch.no_grad()
    def init_weights(self) -> None:
        seed = int(torch.randint(2**62, (), device="cpu"))
        for (_, parameter), (_, weights) in zip(self.named_parameters(), self.initial_weights(seed), strict=True):
            parameter.copy_(weights)

    def initial_weights(self, seed: int) -> Iterator[tuple[str, Tensor]]:
        """(name, fp32 tensor on the CPU) of every parameter, one at a time: so that a model which no single device holds can
        be filled piece by piece. The same seed gives the same weights on every device and every rank.

        N(0, 0.02); what writes into the residual stream is scaled by 1/sqrt(2L), so that its variance does not grow with
        depth (GPT-2, §2.3). Norms are 1, biases 0.
        """
        std, residual_std = (self.config.initializer_range * scale for scale in (1, (2 * self.config.num_hidden_layers) ** -0.5))
        dice = torch.Generator("cpu").manual_seed(seed)
        for name, shape in self.parameter_shapes().items():
            if len(shape) > 1:
                to_residual = name.endswith(("o_proj.weight", "down_proj.weight"))
                yield name, torch.empty(shape, device="cpu").normal_(std=residual_std if to_residual else std, generator=dice)
            else:
                yield name, torch.full(shape, 0.0 if name.endswith("bias") else 1.0, device="cpu")

    def parameter_shapes(self) -> dict[str, torch.Size]:
        """name -> shape of the whole tensor of every parameter of the architecture, also where this process holds only a shard of
        it, and where it is packed."""
        with torch.device("meta"):
            return {name: parameter.shape for name, parameter in Llama(self.config).named_parameters()}

    def trained_shapes(self) -> dict[str, torch.Size]:
        """name -> whole shape of every parameter that learns, those of adapters too."""
        shapes = self.parameter_shapes() | self.adapter_shapes
        return {name: shapes[name] for name, parameter in self.named_parameters() if parameter.requires_grad}

    def num_parameters(self) -> int:
        return sum(shape.numel() for shape in self.parameter_shapes().values())

    def flops_per_token(self, length: int) -> int:
        """Floating-point operations of forward and backward per token: 6 per matrix weight, and attention's
        12 · L · H · hd · length (PaLM, 2204.02311, appendix B). Backward goes through a frozen weight, but not to a gradient of
        its own: 4 for each."""
        c, learning = self.config, self.trained_shapes()
        looked_up = () if c.tie_word_embeddings else ("model.embed_tokens",)
        shapes = self.parameter_shapes() | self.adapter_shapes
        weights = sum((6 if name in learning else 4) * shape.numel() for name, shape in shapes.items() if not name.startswith(looked_up))
        return weights + 12 * c.num_hidden_layers * c.num_attention_heads * c.head_dim * length

    def forward(
        self,
        tokens: Tensor,
        targets: Tensor | None = None,
        *,
        denominator: float | Tensor | None = None,
        cache: KVCache | None = None,
        positions: Tensor | None = None,
        doc_ids: Tensor | None = None,
        last_only: bool = False,
        rope_length: int | None = None,
    ) -> Tensor:
        """tokens [B, T] -> logits [B, T, V], or the loss when targets [B, T] are given (-100 does not count).

        denominator: what the summed loss is divided by; for the mean over an optimizer step, the counted tokens of all
        its micro-batches and ranks. doc_ids [B, T]: a token attends only to tokens of its own document.
        last_only: logits of the last position alone, [B, 1, V]. See `hidden_states` for the rest.
        """
        x = self.hidden_states(tokens, cache=cache, positions=positions, doc_ids=doc_ids, rope_length=rope_length)
        if targets is not None:
            head = self.lm_head.dense() if isinstance(self.lm_head, Linear) else self.lm_head.weight
            return linear_cross_entropy(x, head, targets, denominator)
        return self.lm_head(x[:, -1:] if last_only else x)

    def hidden_states(
        self,
        tokens: Tensor,
        *,
        cache: KVCache | None = None,
        positions: Tensor | None = None,
        doc_ids: Tensor | None = None,
        rope_length: int | None = None,
    ) -> Tensor:
        """tokens [B, T] -> the normed last hidden states [B, T, D], which the head turns into logits.

        positions [T] or [B, T]: default is counting on from the cache. rope_length: the text length that dynamic NTK
        scales for; default the cache's capacity, else T. One length for a whole generation, because keys in the cache
        keep the rotation they were given.
        """
        T = tokens.shape[1]
        start = cache.length if cache else 0
        if cache and start + T > cache.capacity:
            raise ValueError(f"{start} + {T} tokens do not fit a cache of {cache.capacity}")
        if positions is None:
            positions = torch.arange(start, start + T, device=tokens.device)
            if cache and cache.starts is not None:
                positions = (positions - cache.starts[:, None]).clamp(min=0)
        cos, sin = self._rope(positions, rope_length or (cache.capacity if cache else T))
        if self.group_size and self.training and cache is None:
            mask = Groups.of(T, self.group_size, self.config.num_attention_heads, doc_ids)
        else:
            mask = self._mask(T, start, tokens.device, doc_ids, cache.starts if cache else None)

        x = self.model.dropout(self.model.embed_tokens(tokens))
        for block in self.model.layers:
            if self.checkpointing and self.training:
                x = checkpoint(block, x, cos, sin, mask, cache, use_reentrant=False)
            else:
                x = block(x, cos, sin, mask, cache)
        if cache:
            cache.length += T
        return self.model.norm(x)

    def _rope(self, positions: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """cos and sin, float32 [B or 1, 1, T, hd/2]. The frequencies are kept until the length or the device changes."""
        dynamic = self.config.rope_scaling is not None and self.config.rope_scaling["rope_type"] == "dynamic"
        key = (length if dynamic else None, positions.device)
        if self._frequencies is None or self._frequencies[0] != key:
            frequencies, factor = rope_frequencies(self.config, length)
            self._frequencies = (key, frequencies.to(positions.device), factor)
        _, frequencies, factor = self._frequencies
        angles = positions[..., None].float() * frequencies
        angles = angles[:, None] if positions.dim() == 2 else angles[None, None]
        return angles.cos() * factor, angles.sin() * factor

    @staticmethod
    def _mask(T: int, start: int, device, doc_ids: Tensor | None, starts: Tensor | None) -> Tensor | None:
        """Who may look at whom: bool [B or 1, 1, T, start + T], or None where plain causal attention says it all."""
        if doc_ids is None and starts is None and (start == 0 or T == 1):
            return None
        query = torch.arange(start, start + T, device=device)[:, None]
        key = torch.arange(start + T, device=device)[None, :]
        mask = (key <= query)[None]
        if doc_ids is not None:
            mask = mask & (doc_ids[:, :, None] == doc_ids[:, None, :])
        if starts is not None:  # padding sees only itself: a row without any key would be NaN
            mask = mask & ((key >= starts[:, None, None]) | (key == query))
        return mask[:, None]

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        *,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        stop_ids: Sequence[int] = (),
        seed: int | None = None,
        use_cache: bool = True,
        prefill_chunk: int = 2048,
        lockstep: bool = False,
    ) -> Iterator[list[int | None]]:
        """Yield one list per step: the next token of every prompt, None for those that have stopped.

        Prompts may have unequal lengths. A stop id ends its prompt and is not yielded. temperature 0 is greedy.
        The same seed gives the same tokens on every device, as far as the logits agree. use_cache=False reads the
        whole text again at each step: slow, and equal. prefill_chunk bounds the memory of long prompts.
        lockstep: go on to max_new_tokens although all have stopped, as the ranks of a shared-out model must.
        """
        if not prompts or not all(len(prompt) for prompt in prompts):
            raise UserError("a prompt needs at least one token")
        was_training = self.training
        self.eval()
        try:
            yield from self._generate(prompts, max_new_tokens, temperature, top_k, top_p, min_p, repetition_penalty,
                                      set(stop_ids), seed, use_cache, prefill_chunk, lockstep)  # fmt: skip
        finally:
            self.train(was_training)

    def _generate(self, prompts, max_new_tokens, temperature, top_k, top_p, min_p, repetition_penalty, stop_ids, seed,
                  use_cache, prefill_chunk, lockstep):  # fmt: skip
        weight = self.model.embed_tokens.weight
        device, B, longest = weight.device, len(prompts), max(map(len, prompts))
        tokens = torch.zeros((B, longest), dtype=torch.long)
        for row, prompt in zip(tokens, prompts):
            row[longest - len(prompt) :] = torch.tensor(prompt)  # padding on the left: all rows end together
        tokens = tokens.to(device)
        starts = torch.tensor([longest - len(prompt) for prompt in prompts], device=device)
        starts = starts if starts.any() else None
        capacity = longest + max_new_tokens
        cache = KVCache(self.config, B, capacity, device, matmul_dtype(weight), starts) if use_cache else None
        seen = torch.zeros((B, self.config.vocab_size), dtype=torch.bool, device=device)
        for row, prompt in zip(seen, prompts):
            row[torch.tensor(prompt, device=device)] = True
        dice = torch.Generator()  # its own: drawing samples must not change the dropout of the training around it
        dice.seed() if seed is None else dice.manual_seed(seed)
        done = [False] * B
        for _ in range(max_new_tokens):
            if cache is None:
                fresh = KVCache(self.config, B, capacity, device, matmul_dtype(weight), starts)
                logits = self(tokens, cache=fresh, last_only=True)
            else:
                for chunk in tokens[:, cache.length :].split(prefill_chunk, dim=1):
                    logits = self(chunk, cache=cache, last_only=True)
            uniform = torch.rand(B, generator=dice).to(device)
            new = sample(logits[:, -1].float(), uniform, temperature=temperature, top_k=top_k, top_p=top_p,
                         min_p=min_p, repetition_penalty=repetition_penalty, seen=seen)  # fmt: skip
            seen.scatter_(1, new[:, None], True)
            tokens = torch.cat((tokens, new[:, None]), dim=1)
            step: list[int | None] = new.tolist()
            for i, token in enumerate(step):
                done[i] = done[i] or token in stop_ids
                step[i] = None if done[i] else token
            if all(done) and not lockstep:
                return
            yield step


def sample(
    logits: Tensor,
    uniform: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    seen: Tensor | None = None,
) -> Tensor:
    """Choose one token per row: logits [B, V] float32, uniform [B] random in [0, 1) -> [B] int64.

    In this order: repetition penalty on `seen` [B, V] tokens (1909.05858 §4.1), temperature, top-k, top-p (nucleus:
    the fewest tokens whose probability reaches p, 1904.09751), min-p (at least p times the likeliest, 2407.01082).
    """
    if repetition_penalty != 1.0 and seen is not None:
        punished = torch.where(logits > 0, logits / repetition_penalty, logits * repetition_penalty)
        logits = torch.where(seen, punished, logits)
    if temperature <= 0:
        return logits.argmax(-1)
    logits, order = (logits / temperature).sort(-1, descending=True)
    if 0 < top_k < logits.shape[-1]:
        logits[:, top_k:] = -math.inf
    probs = logits.softmax(-1)
    before = probs.cumsum(-1) - probs  # the mass of likelier tokens; the first token always stays
    keep = (before < top_p) | (torch.arange(probs.shape[-1], device=probs.device) == 0)
    probs = probs * (keep & (probs >= min_p * probs[:, :1]))
    cdf = probs.cumsum(-1)
    pick = torch.searchsorted(cdf, (uniform.to(cdf.dtype)[:, None] * cdf[:, -1:]), right=True)
    last = ((probs > 0).sum(-1, keepdim=True) - 1).clamp(min=0)  # logits that are not finite leave no token at all
    pick = torch.minimum(pick, last)  # rounding must not pick a token that was cut
    return order.gather(1, pick).squeeze(1)
