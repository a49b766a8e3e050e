"""The loss: cross-entropy of a large vocabulary without its logits.

For 8 sequences of 512 tokens and V = 64,793 the logits alone are 1 GB in float32, their gradient another: most of a small
card. Here the head is applied to a chunk of tokens at a time, and the gradients of that chunk are made while its logits are
still there. Nothing is kept, and unlike checkpointing nothing is computed twice. Measured against torch's own fused function
in docs/benchmarks.md.
"""

from __future__ import annotations

import torch
from torch import Tensor

IGNORE = -100  # a target that does not count

# Elements of a chunk of logits. With V = 64,793 this is 517 tokens at a time: 134 MB of float32 instead of 1 GB for 8 x 512.
CHUNK_ELEMENTS = 2**25


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, denominator: float | Tensor | None = None) -> Tensor:
    """Sum of -log softmax(hidden · weightᵀ)[target] over targets that are not -100, divided by `denominator`.

    hidden [..., D], weight [V, D], targets [...] int64; the default denominator is the number of counted targets.
    Same value and gradients as F.cross_entropy(F.linear(hidden, weight).float(), …) in O(chunk · V) memory: the
    gradients are made while the chunk's logits are there, so nothing is kept and nothing is computed twice.
    """
    hidden, targets = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)
    if not torch.is_grad_enabled():
        nats = -token_log_probs(hidden, weight, targets).sum()
        return nats / ((targets != IGNORE).sum().clamp(min=1) if denominator is None else denominator)
    if denominator is None:
        denominator = (targets != IGNORE).sum().clamp(min=1)
    return _LinearCrossEntropy.apply(hidden, weight, targets, denominator)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    @torch.compiler.disable
    def forward(ctx, hidden, weight, targets, denominator):
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        (D, V), device, dtype = weight.T.shape, hidden.device, matmul_dtype(hidden)
        counted = (targets != IGNORE).nonzero().squeeze(1)
        loss = torch.zeros((), device=device)
        grad_hidden = torch.zeros_like(hidden) if need_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if need_weight else None
        w = weight.detach().to(dtype)
        chunk = max(1, min(CHUNK_ELEMENTS // V, len(targets)))  # one size for all steps: masks vary, and memory would fragment
        # Reserved once and written in place: on a CPU, touching fresh memory costs as much as the arithmetic.
        logits_buffer = torch.empty(chunk, V, dtype=dtype, device=device)
        z_buffer = logits_buffer if dtype == torch.float32 else torch.empty(chunk, V, device=device)
        product = torch.empty(V, D, dtype=dtype, device=device) if need_weight else None
        with torch.autocast(device.type, enabled=False):
            for rows in counted.split(chunk):
                h, t = hidden[rows].to(dtype), targets[rows, None]
                logits, z = logits_buffer[: len(rows)], z_buffer[: len(rows)]
                torch.mm(h, w.T, out=logits)
                z.copy_(logits)
                top, right = z.amax(-1, keepdim=True), z.gather(1, t)
                total = z.sub_(top).exp_().sum(-1, keepdim=True)
                loss += (total.log() + top - right).sum()
                # d loss / d logits = softmax - onehot. In [-1, 1]: safe in half precision, scaled only in backward.
                logits.copy_(z.div_(total).scatter_add_(1, t, torch.full_like(top, -1.0)))
                if need_hidden:
                    grad_hidden[rows] = (logits @ w).to(hidden.dtype)
                if need_weight:
                    grad_weight += torch.mm(logits.T, h, out=product)
        ctx.gradients, ctx.denominator, ctx.weight_dtype = (grad_hidden, grad_weight), denominator, weight.dtype
        return loss / denominator

    @staticmethod
    def backward(ctx, grad_output):
        (grad_hidden, grad_weight), ctx.gradients = ctx.gradients, None
        scale = grad_output / ctx.denominator
        if grad_hidden is not None:
            grad_hidden = grad_hidden.mul_(scale)
        if grad_weight is not None:
            grad_weight = grad_weight.mul_(scale).to(ctx.weight_dtype)
        return grad_hidden, grad_weight, None, None


def token_log_probs(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """log p(target) of every position, float32 in the shape of targets; 0 where the target is -100. No gradient."""
    flat, result = hidden.reshape(-1, hidden.shape[-1]), torch.zeros(targets.numel(), device=hidden.device)
    w, dtype = weight.detach(), matmul_dtype(hidden)
    with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
        w = w.to(dtype)
        for rows in (targets.reshape(-1) != IGNORE).nonzero().squeeze(1).split(max(1, CHUNK_ELEMENTS // w.shape[0])):
            logits = (flat[rows].to(dtype) @ w.T).float()
            result[rows] = logits.gather(1, targets.reshape(-1)[rows, None]).squeeze(1) - logits.logsumexp(-1)
    return result.view(targets.shape)


def matmul_dtype(x: Tensor) -> torch.dtype:
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
