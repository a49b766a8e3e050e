"""What one training step holds on each device, under every way to share the work: the formulas behind `bench.py plan`.

They count what model.py, loss.py, pretrain.py and parallel.py allocate; docs/scale.md compares them with measured peaks.
Memory can be highest at five moments of a step. `peak` finds the highest; its parts add up to its total.

    loss         all activations, and the buffers of the loss
    last block   backward begins: all activations, and what flows back through a block
    first block  backward ends: one block's activations, most gradients
    embedding    all gradients, the embedding's fresh one beside them
    step         the optimizer

What autograd keeps of one token in one block (`saved_per_token`; e: bytes of the matrix products' dtype, 2 or 4; q = H·hd,
k = K·hd; the tests count the same with autograd's own hooks):

    tensor                           elements  bytes of each
    two RMSNorms' input              D each    fused (CUDA): 4, without autocast the stream's; elsewhere 8: input and x / rms in fp32
    their 1 / rms                    1 each    4
    inputs of q, k, v, gate, up      D         e, once per norm; once per Linear where each has to cast it
    q, k, v, attention's output      2q + 2k   e
    log-sum-exp of the scores        H         4
    input of o (heads side by side)  q         e
    gate, up, silu(gate), product    I each    e

Of a block that is frozen (--train embeddings) backward needs less, because it makes no gradients of weights: no inputs of q, k, v, o,
gate and up, no product, and of a composed RMSNorm only the input. gate, up and silu(gate) stay: it computes through them.
ZeRO-3 has a Linear of its own, which keeps its input all the same.

With checkpointing it is the block's input alone, and one block's table while that block is computed again. The residual
stream is fp32 where the blocks see fp32 weights, else of the weights' dtype (FSDP, ZeRO-2 and 3). Attention is taken to be
fused (flash). CUDA has no such kernel for fp32 with grouped heads, nor before Ampere: there H·T scores per token come on top.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch

from config import LlamaConfig
from loss import CHUNK_ELEMENTS
from model import Llama

GIB = 2**30
# DeepSpeed's defaults, in elements. parallel.py leaves them alone; a --deepspeed FILE.json may say otherwise.
REDUCE_BUCKET = 5e8  # reduce_bucket_size: gradients on their way
LIVE_PARAMETERS = 1e9  # stage3_max_live_parameters: weights kept gathered
SUB_GROUP = 1e9  # sub_group_size: what stage 3's optimizer updates at a time
# GiB that the driver and the libraries take: alone, and more for talking to other devices. The CPU's is measured (what the first
# steps of a tiny model add to a process); the others are assumptions.
OVERHEAD = {"cuda": (0.75, 0.5), "npu": (1.5, 0.5), "cpu": (0.03, 0.005)}


@dataclass(frozen=True)
class Strategy:
    """A way to share the work: its flags, and how the blocks see the weights."""

    name: str
    flags: str
    casts_weights: bool  # in the dtype of the products; else in fp32, and autocast makes copies
    autocast: bool = True


DDP = Strategy("DDP", "", False)
FSDP = Strategy("FSDP", "--fsdp", True)
ZERO1 = Strategy("ZeRO-1", "--deepspeed 1", False)
ZERO2 = Strategy("ZeRO-2", "--deepspeed 2", True, autocast=False)
ZERO3 = Strategy("ZeRO-3", "--deepspeed 3", True, autocast=False)
OFFLOAD = Strategy("ZeRO-3 + offload", "--deepspeed 3 --offload", True, autocast=False)
STRATEGIES = (DDP, FSDP, ZERO1, ZERO2, ZERO3, OFFLOAD)


@dataclass(frozen=True)
class Parts:
    """Bytes on one device at one moment."""

    weights: float = 0
    gradients: float = 0
    optimizer: float = 0
    working: float = 0  # weights cast or gathered for a while, and the buffers of communication
    activations: float = 0
    loss: float = 0
    overhead: float = 0

    @property
    def total(self) -> float:
        return sum(dataclasses.astuple(self))


@dataclass(frozen=True)
class Counts:
    """Numbers of parameters of a model."""

    llama: LlamaConfig
    all: int  # P
    block: int  # in one block
    trained: int  # those that learn: all, or embedding and head
    forward_flops: int  # per token at this length
    flops_per_token: int  # forward and backward

    @property
    def head(self) -> int:
        return self.llama.vocab_size * self.llama.hidden_size

    @property
    def frozen(self) -> int:
        return self.all - self.trained

    @property
    def root(self) -> int:
        """Outside the blocks: embedding, last norm, head."""
        return self.all - self.llama.num_hidden_layers * self.block


def count(llama: LlamaConfig, T: int, train: str = "all") -> Counts:
    """`train` as pretrain.py has it: all, or embeddings, which leaves the blocks and the last norm frozen."""
    with torch.device("meta"):
        model = Llama(llama)
    block = sum(parameter.numel() for parameter in model.model.layers[0].parameters())
    total, flops = model.num_parameters(), model.flops_per_token(T)
    embeddings = llama.vocab_size * llama.hidden_size * (1 if llama.tie_word_embeddings else 2)
    trained = total if train == "all" else embeddings
    return Counts(llama, total, block, trained, flops // 3, flops - 2 * (total - trained))  # no gradient of a frozen weight


@dataclass(frozen=True, kw_only=True)
class Step:
    """One way to run a step. The methods give bytes per device, by moment where it matters."""

    counts: Counts
    strategy: Strategy
    devices: int  # N
    tokens: int  # of one micro-batch
    checkpointing: bool
    e: int = 2  # bytes of the dtype of the matrix products
    accumulates: bool = True  # several micro-batches per step
    kind: str = "cuda"

    # ---- activations -----------------------------------------------------------------------------------------------

    @property
    def stream(self) -> int:
        """Bytes per element of the residual stream: the embedding's, which it begins with."""
        return self.e if self.strategy.casts_weights else 4

    @property
    def norm(self) -> tuple[int, int]:
        """Bytes per element of what RMSNorm keeps, and of what it returns. CUDA's kernel is fused, and autocast has it
        compute in fp32. Elsewhere it is made of smaller operations, which autocast leaves alone."""
        if self.kind != "cuda":
            return 4 if self.counts.frozen else 8, self.stream
        computes = 4 if self.strategy.autocast else self.stream
        return computes, computes

    @property
    def keeps_inputs(self) -> bool:
        """Whether autograd keeps what each Linear of a block has read, for the gradient of its weight."""
        return not self.counts.frozen or self.strategy in (ZERO3, OFFLOAD)

    def saved_per_token(self) -> dict[str, int]:
        """Bytes that autograd keeps of one token in one block; see the table at the top."""
        c, e, (kept, returned) = self.counts.llama, self.e, self.norm
        q, k = (heads * c.head_dim for heads in (c.num_attention_heads, c.num_key_value_heads))
        through = {"two RMSNorms' input": 2 * kept * c.hidden_size, "1 / rms": 2 * 4, "q, k, v, attention's output": e * (2 * q + 2 * k),
                   "log-sum-exp": 4 * c.num_attention_heads, "gate, up, silu(gate)": 3 * e * c.intermediate_size}  # fmt: skip
        if not self.keeps_inputs:
            return through
        return through | {"inputs of q, k, v, gate, up": (2 if returned == e else 5) * e * c.hidden_size, "input of o": e * q,
                          "product": e * c.intermediate_size}  # fmt: skip

    def activations(self) -> dict[str, float]:
        c, (kept, returned) = self.counts.llama, self.norm
        L, D, block = c.num_hidden_layers, c.hidden_size, sum(self.saved_per_token().values())
        kept_by_all = L * self.stream * D if self.checkpointing else L * block
        recomputed = block - self.stream * D if self.checkpointing else 0  # the block's input is there already
        # What flows back: the stream's gradient, and at the widest point of a block two of I (a third replaces the product, which
        # is free by then, unless it was not kept at all). The last norm, where it is composed, holds six fp32 tensors of D at once.
        back = self.stream * D + (2 if self.keeps_inputs else 3) * self.e * c.intermediate_size
        norm_back = (kept + returned + self.stream) * D if self.kind == "cuda" else 24 * D
        return {"loss": self.tokens * (kept_by_all + kept * D + 4 + 16),  # the last norm's input and 1 / rms; tokens and targets
                "last block": self.tokens * (kept_by_all + max(recomputed + back, norm_back)),
                "first block": self.tokens * (block + back), "embedding": self.tokens * self.stream * D, "step": 0}  # fmt: skip

    def loss(self) -> float:
        """linear_cross_entropy: the hidden states and their gradient, a chunk of logits, the head's gradient."""
        c, e, head = self.counts.llama, self.e, self.counts.head
        low = e < 4
        chunk = max(1, min(CHUNK_ELEMENTS // c.vocab_size, self.tokens))
        logits = chunk * c.vocab_size * (e + 4 * low) + chunk * 2 * e * c.hidden_size  # and fp32 z; the chunk's hidden, its gradient
        head_gradient = (4 + e) * head + e * head * (low and not self.strategy.casts_weights)  # sum, product; the head itself, cast
        if low and self.kind == "cpu":
            head_gradient += 4 * head  # a CPU makes an fp32 copy of the bf16 product to add it; a GPU converts as it reads
        return 2 * self.norm[1] * self.tokens * c.hidden_size + logits + head_gradient

    # ---- what stays from step to step ------------------------------------------------------------------------------

    def states(self) -> tuple[float, float, float]:
        """Weights and optimizer on the device, and all on the host. AdamW keeps two fp32 moments; DeepSpeed fp32 masters too. What is
        frozen has neither; where it computes in bf16, parallel.py keeps it in fp32 on the host, unless the files hold bf16."""
        P, t, N, e = self.counts.all, self.counts.trained, self.devices, self.e
        exact = 4 * self.counts.frozen / N * (e < 4)
        # host: masters, moments, the sum of gradients, what the optimizer reads of it; the weights
        return {DDP: (4 * P, 8 * t, 0), FSDP: (4 * P / N, 8 * t / N, 0), ZERO1: (4 * P, 12 * t / N, 0), ZERO2: (e * P, 12 * t / N, exact),
                ZERO3: (e * P / N, 12 * t / N, exact), OFFLOAD: (0, 0, ((12 + 4 + 4) * t + e * P) / N + exact)}[self.strategy]  # fmt: skip

    def gradients(self) -> dict[str, float]:
        """Those of earlier micro-batches are there from the start when the step accumulates."""
        n, N, t = self.counts, self.devices, self.counts.trained
        down = 0 if n.frozen else n.llama.hidden_size * n.llama.intermediate_size  # the first that a block makes
        nearly = n.head if n.frozen else t - n.block - (n.root - n.head) + down  # all but the first block's and the embedding's
        made = {"loss": 0, "last block": n.head + down, "first block": nearly, "embedding": t, "step": t}
        if self.strategy in (ZERO3, OFFLOAD):
            return dict.fromkeys(made, 4 * t / N if self.strategy is ZERO3 else 0)
        if self.strategy is FSDP:
            return {moment: 4 * (t if self.accumulates else count) / N for moment, count in made.items()}
        # DeepSpeed's step: its own part summed up, and that once more as one vector, or the largest gradient in fp64 for the norm
        stepping = {"step": 4 * t / N + max(4 * t / N, 8 * min(n.head, t / N))}
        if self.strategy is ZERO2:  # its own part waits in e until the backward pass ends, and is then added up
            held = {moment: 4 * t / N * self.accumulates + self.e * count / N for moment, count in made.items()}
            return held | {"embedding": held["embedding"] + 4 * t / N} | stepping
        # DDP's gradients live in its buckets, which are never freed. Where gradients are there, a fresh one stands beside them.
        there = self.accumulates or (self.strategy is DDP and N > 1)
        held = {moment: 4 * t if there else 4 * count for moment, count in made.items()}
        fresh = {"last block": down * there, "first block": down * there, "embedding": n.head * there}
        if n.llama.tie_word_embeddings:  # the head's gradient waits for the embedding's, to be added to it
            fresh = {moment: elements + n.head * (there or moment == "embedding") for moment, elements in fresh.items()}
        held |= {moment: held[moment] + 4 * elements for moment, elements in fresh.items()}
        return held | stepping if self.strategy is ZERO1 else held

    def working(self) -> dict[str, float]:
        """Weights that are cast or gathered for a while, and the buffers of communication."""
        n, e, N, t = self.counts, self.e, self.devices, self.counts.trained
        bucket = min(REDUCE_BUCKET, t)  # as much of a bucket as ever fills
        # The plain AdamW, which is all an NPU has, makes the root of a whole moment at once.
        share = {DDP: t, OFFLOAD: 0, ZERO3: min(t / N, SUB_GROUP)}.get(self.strategy, t / N)
        stepping = 4 * share if self.kind == "npu" else 0
        if self.strategy is FSDP:
            # Gathered: the root from the loss to the end, a block and the next one. A block's gradients, if it has any, stand beside
            # the fp32 buffer they are reduced from, which stays until the next block's. The root's go last.
            reducing = 0 if n.frozen else e * n.block + 4 * n.block * (1 + 1 / N)
            blocks = e * n.root + e * n.head + 2 * e * n.block + reducing
            gloo = 4 * n.root if self.kind == "cpu" else 0  # it copies what it reduces
            last = max(e * n.root + 2 * e * n.head, (e + 4) * n.root, e * (n.root - n.head) + 4 * n.root * (1 + 1 / N) + gloo)
            return {"loss": e * (n.root + n.block), "last block": blocks, "first block": blocks, "embedding": last, "step": stepping}
        if self.strategy in (ZERO3, OFFLOAD):
            gathered = e * max(min(n.all, LIVE_PARAMETERS), n.head + n.block) + e * REDUCE_BUCKET
            reducing = gathered + e * bucket * (1 + 1 / N) + 4 * bucket / N
            masters = 4 * min(t / N, SUB_GROUP) if self.strategy is ZERO3 else 0  # the gradients as the optimizer reads them
            return {"loss": gathered, "last block": reducing, "first block": reducing, "embedding": reducing + e * n.head,
                    "step": e * REDUCE_BUCKET + masters + stepping}  # fmt: skip
        reducing = {ZERO1: 4, ZERO2: e}.get(self.strategy, 0) * (REDUCE_BUCKET + bucket)  # the bucket, and it once more as it is sent
        casts = 0
        if e < 4 and not self.strategy.casts_weights:  # autocast keeps them until forward ends, autograd until they are used
            casts = e * (n.block - 2 * n.llama.hidden_size)
        L = n.llama.num_hidden_layers
        kept = 0 if n.frozen and self.checkpointing else L  # autocast keeps none of what is frozen, autograd none to compute again
        return {"loss": kept * casts, "last block": (1 if self.checkpointing else L) * casts + reducing, "first block": casts + reducing,
                "embedding": reducing, "step": stepping}  # fmt: skip

    def peak(self) -> tuple[str, Parts]:
        """The moment at which a device holds most, and what it holds then."""
        weights, optimizer, _ = self.states()
        alone, together = OVERHEAD[self.kind]
        overhead = (alone + together * (self.devices > 1)) * GIB
        gradients, working, activations = self.gradients(), self.working(), self.activations()
        moments = {moment: Parts(weights, gradients[moment], optimizer, working[moment], activations[moment],
                                 self.loss() if moment == "loss" else 0, overhead) for moment in activations}  # fmt: skip
        highest = max(moments, key=lambda moment: moments[moment].total)
        return highest, moments[highest]
