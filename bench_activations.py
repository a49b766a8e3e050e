"""What the tokens of a micro-batch leave behind on one device: the activations, and the buffers of the loss.

bench_memory.py adds what does not depend on the tokens: weights, gradients, optimizer.

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

Where the projections are frozen, backward makes no gradients of weights and needs less: no inputs of q, k, v, o, gate and up, no
product (the input of down), and of a composed RMSNorm that is frozen too only its input. gate, up and silu(gate) stay: it computes
through them. ZeRO-3 has a Linear of its own, which keeps its input all the same.

An adapter reads its layer's input and learns from it, so it keeps that input again, and has something of its own (r: its rank):

    x Aᵀ                             r         e
    with dropout: its own input      in        e, and which were dropped: fused (CUDA) 1, elsewhere as many as an element has
    DoRA: y, before it is lengthened out       e

With checkpointing it is the block's input alone, and one block's table while that block is computed again. The residual
stream has the embedding's dtype: that of the products where the embedding is frozen beside an adapter, or cast (FSDP, ZeRO-2 and
3); else fp32. Attention is taken to be fused (flash). CUDA has no such kernel for fp32 with grouped heads, nor before Ampere: there
H·T scores per token come on top.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import torch

from adapters import ATTENTION, EMBEDDING, HEAD, MLP, AdapterConfig, attach
from config import LlamaConfig
from layers import packed_layers
from loss import CHUNK_ELEMENTS
from model import Llama
from parallel import freeze


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
class Counts:
    """Numbers of parameters of a model, and of those beside it that an adapter brings."""

    llama: LlamaConfig
    all: int  # P, of the architecture
    block: int  # in one block, with its adapters, without what is packed
    root: int  # outside the blocks: embedding, last norm, head
    packed: int  # bytes of the packed weights
    trained: int  # those that learn
    trained_block: int  # of them in one block
    largest: int  # of the tensors that learn
    learned: frozenset[str]  # modules that learn themselves, by the last part of their names
    forward_flops: int  # per token at this length
    flops_per_token: int  # forward and backward
    adapter: AdapterConfig | None
    ranks: dict[str, int]  # of the adapters, by the last part of their modules' names
    storage: str

    @property
    def head(self) -> int:
        return self.llama.vocab_size * self.llama.hidden_size

    @property
    def frozen(self) -> int:
        """Parameters that are there and do not learn; the packed ones are none."""
        return self.root + self.llama.num_hidden_layers * self.block - self.trained

    @property
    def trained_root(self) -> int:
        return self.trained - self.llama.num_hidden_layers * self.trained_block

    @property
    def head_learns(self) -> bool:
        return HEAD in self.learned or (self.llama.tie_word_embeddings and self.embedding_learns)

    @property
    def embedding_learns(self) -> bool:
        return EMBEDDING in self.learned


def count(llama: LlamaConfig, T: int, train: str = "all", adapter: AdapterConfig | None = None, storage: str = "none") -> Counts:
    """`train` as pretrain.py has it: all, or embeddings, which leaves the blocks and the last norm frozen. With an adapter that
    says what learns, and `storage` how the frozen projections are kept."""

    def built(layers: int) -> Llama:
        with torch.device("meta"):
            model = Llama(dataclasses.replace(llama, num_hidden_layers=layers))
            if adapter:
                attach(model, adapter, storage)
            else:
                freeze(model, None if train == "all" else (f"model.{EMBEDDING}.weight", f"{HEAD}.weight"))
        return model

    one, two = built(1), built(2)

    def whole(number: Callable[[Llama], int]) -> int:
        """All blocks are alike: what a model with one of them has, and one with two, tell what it has with all."""
        return number(one) + (llama.num_hidden_layers - 1) * (number(two) - number(one))

    def forward_flops(model: Llama) -> int:
        return Llama(model.config).flops_per_token(T) // 3 + 2 * sum(s.numel() for s in model.adapter_shapes.values())

    block = list(one.model.layers[0].parameters())
    learning = {name: p for name, p in one.named_parameters() if p.requires_grad}
    with torch.device("meta"):
        return Counts(
            llama=llama, all=whole(Llama.num_parameters), block=sum(p.numel() for p in block),
            root=sum(p.numel() for p in one.parameters()) - sum(p.numel() for p in block),
            packed=whole(lambda model: sum(part.nbytes for layer in packed_layers(model).values() for part in layer.buffers())),
            trained=whole(lambda model: sum(p.numel() for p in model.parameters() if p.requires_grad)),
            trained_block=sum(p.numel() for p in block if p.requires_grad), largest=max(p.numel() for p in learning.values()),
            learned=frozenset(name.split(".")[-2] for name in learning if ".adapters." not in name), forward_flops=whole(forward_flops),
            flops_per_token=whole(lambda model: model.flops_per_token(T)), adapter=adapter, storage=storage,
            ranks={name.rpartition(".")[2]: adapter.at(name)[0] for name in adapter.modules(one.config)} if adapter else {})  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """The tokens of one micro-batch on one device. The methods give bytes, by moment where it matters."""

    counts: Counts
    strategy: Strategy
    tokens: int
    checkpointing: bool
    e: int = 2  # bytes of the dtype of the matrix products
    kind: str = "cuda"

    @property
    def stream(self) -> int:
        """Bytes per element of the residual stream: the embedding's, which it begins with."""
        low = self.strategy.casts_weights or (self.counts.adapter is not None and not self.counts.embedding_learns)
        return self.e if low else 4

    @property
    def norm(self) -> tuple[int, int]:
        """Bytes per element of what RMSNorm keeps, and of what it returns. CUDA's kernel is fused, and autocast has it
        compute in fp32. Elsewhere it is made of smaller operations, which autocast leaves alone."""
        if self.kind != "cuda":
            return 8 if "norm" in self.counts.learned else 4, self.stream
        computes = 4 if self.strategy.autocast else self.stream
        return computes, computes

    def keeps_input(self, name: str) -> bool:
        """Whether autograd keeps what this Linear of a block has read, for the gradient of its weight or of its adapter's."""
        zero3 = self.strategy.name.startswith("ZeRO-3")
        return zero3 or name in self.counts.learned or (name in self.counts.ranks and not self.counts.adapter.dropout)

    def saved_per_token(self) -> dict[str, int]:
        """Bytes that autograd keeps of one token in one block; see the tables at the top."""
        c, e, (kept, returned) = self.counts.llama, self.e, self.norm
        D, I, q, k = c.hidden_size, c.intermediate_size, *(n * c.head_dim for n in (c.num_attention_heads, c.num_key_value_heads))
        readers = [sum(map(self.keeps_input, names)) for names in (ATTENTION[:3], MLP[:2])]  # of what each of the norms returns
        if returned == e:
            readers = [min(1, number) for number in readers]
        saved = {"two RMSNorms' input": 2 * kept * D, "1 / rms": 2 * 4, "inputs of q, k, v, gate, up": sum(readers) * e * D,
                 "q, k, v, attention's output": e * (2 * q + 2 * k), "log-sum-exp": 4 * c.num_attention_heads,
                 "input of o": e * q * self.keeps_input("o_proj"), "gate, up, silu(gate)": 3 * e * I,
                 "product": e * I * self.keeps_input("down_proj")}  # fmt: skip
        if a := self.counts.adapter:
            sizes = dict(zip(ATTENTION + MLP, [(D, q), (D, k), (D, k), (q, D), (D, I), (D, I), (I, D)]))
            adapted = [(*sizes[name], rank) for name, rank in self.counts.ranks.items() if name in sizes]
            saved["x Aᵀ"] = e * sum(rank for _, _, rank in adapted)
            if a.dropout:
                for name in sizes.keys() & self.counts.ranks.keys():
                    read = e if name in ("o_proj", "down_proj") else returned
                    saved[f"dropout before {name}"] = sizes[name][0] * (e + (1 if self.kind == "cuda" else read))
            if a.dora:
                saved["y, before it is lengthened"] = e * sum(out for _, out, _ in adapted)
        return saved

    def activations(self) -> dict[str, float]:
        c, (kept, returned) = self.counts.llama, self.norm
        L, D, I, block = c.num_hidden_layers, c.hidden_size, c.intermediate_size, sum(self.saved_per_token().values())
        kept_by_all = L * self.stream * D if self.checkpointing else L * block
        recomputed = block - self.stream * D if self.checkpointing else 0  # the block's input is there already
        # What flows back: the stream's gradient, and at the widest point of a block two of I (a third replaces the product, which
        # is free by then, unless it was not kept at all). The last norm, where it is composed, holds six fp32 tensors of D at once.
        # DoRA's factors are fp32, so the gradient of what they lengthen is that for a while, and beside it the factors' own.
        dora = self.counts.adapter is not None and self.counts.adapter.dora
        back = self.stream * D + (2 if self.keeps_input("down_proj") else 3) * self.e * I + (10 if self.e < 4 else 8) * I * dora
        norm_back = (kept + returned + self.stream) * D if self.kind == "cuda" else 24 * D
        return {"lengths": self.tokens * (kept_by_all + recomputed) if dora else 0,
                "loss": self.tokens * (kept_by_all + kept * D + 4 + 16),  # the last norm's input and 1 / rms; tokens and targets
                "last block": self.tokens * (kept_by_all + max(recomputed + back, norm_back)),
                "first block": self.tokens * (block + back),
                "embedding": self.tokens * self.stream * D * self.counts.embedding_learns, "step": 0}  # fmt: skip

    def loss(self) -> float:
        """linear_cross_entropy: the hidden states and their gradient, a chunk of logits, the head's gradient if it learns."""
        c, e, head = self.counts.llama, self.e, self.counts.head
        low, adapted = e < 4, HEAD in self.counts.ranks
        chunk = max(1, min(CHUNK_ELEMENTS // c.vocab_size, self.tokens))
        logits = chunk * c.vocab_size * (e + 4 * low) + chunk * 2 * e * c.hidden_size  # and fp32 z; the chunk's hidden, its gradient
        head_gradient = 0
        if self.counts.head_learns or adapted:
            head_gradient = (4 + e) * head + e * head * (low and not self.strategy.casts_weights)  # sum, product; the head itself, cast
            if low and self.kind == "cpu":
                head_gradient += 4 * head  # a CPU makes an fp32 copy of the bf16 product to add it; a GPU converts as it reads
        merged = 4 * head * adapted  # the head and its adapter, one matrix for the loss
        return 2 * self.norm[1] * self.tokens * c.hidden_size + logits + head_gradient + merged
