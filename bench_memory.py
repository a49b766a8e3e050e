"""What one training step holds on each device, under every way to share the work: the formulas behind `bench.py plan`.

They count what model.py, layers.py, loss.py, pretrain.py and parallel.py allocate; docs/scale.md compares them with measured peaks.
Memory can be highest at six moments of a step. `peak` finds the highest; its parts add up to its total.

    lengths      DoRA alone: the last block's forward pass measures the rows of its largest weight
    loss         all activations, and the buffers of the loss
    last block   backward begins: all activations, and what flows back through a block
    first block  backward ends: one block's activations, most gradients
    embedding    all gradients, the embedding's fresh one beside them
    step         the optimizer

bench_activations.py has what grows with the tokens. An adapter takes away nearly all that does not: what is frozen has neither
gradient nor optimizer state, and may be packed (layers.py). A packed weight is unpacked for its product, forward and backward, one
at a time.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from bench_activations import DDP, FSDP, OFFLOAD, STRATEGIES, ZERO1, ZERO2, ZERO3, Counts, Strategy, Tokens, count

__all__ = ["DDP", "FSDP", "GIB", "OFFLOAD", "OVERHEAD", "STRATEGIES", "ZERO1", "ZERO2", "ZERO3", "Counts", "Parts", "Step", "Strategy",
           "count"]  # fmt: skip

GIB = 2**30
# DeepSpeed's defaults, in elements. parallel.py leaves them alone; a --deepspeed FILE.json may say otherwise.
REDUCE_BUCKET = 5e8  # reduce_bucket_size: gradients on their way
LIVE_PARAMETERS = 1e9  # stage3_max_live_parameters: weights kept gathered
SUB_GROUP = 1e9  # sub_group_size: what stage 3's optimizer updates at a time
SLICE = (2**23, 2**19)  # weights that nf4.py unpacks at a time: on a device, on a CPU
# GiB that the driver and the libraries take: alone, and more for talking to other devices. The CPU's is measured (what the first
# steps of a tiny model add to a process); the others are assumptions.
OVERHEAD = {"cuda": (0.75, 0.5), "npu": (1.5, 0.5), "cpu": (0.03, 0.005)}


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


@dataclass(frozen=True, kw_only=True)
class Step(Tokens):
    """One way to run a step. The methods give bytes per device, by moment where it matters."""

    devices: int  # N
    accumulates: bool = True  # several micro-batches per step
    offload_optimizer: bool = False

    def states(self) -> tuple[float, float, float]:
        """Weights and optimizer on the device, and all on the host. AdamW keeps two fp32 moments; DeepSpeed fp32 masters too. What is
        frozen has neither. Beside an adapter it has the dtype of the products; else fp32, and where it computes in bf16, parallel.py
        keeps it in fp32 on the host, unless the files hold bf16."""
        n, N, e = self.counts, self.devices, self.e
        t, low = n.trained, n.packed + e * (n.trained + n.frozen)
        as_it_is = n.packed + 4 * t + (e if n.adapter else 4) * n.frozen
        exact = 0 if n.adapter else 4 * n.frozen / N * (e < 4)
        away = self.offload_optimizer and self.kind != "cpu"  # there the host is the device
        # host: masters, moments, the sum of gradients, what the optimizer reads of it; the weights
        return {DDP: (as_it_is, 8 * t * (not away), 8 * t * away), FSDP: (as_it_is / N, 8 * t / N, 0), ZERO1: (as_it_is, 12 * t / N, 0),
                ZERO2: (low, 12 * t / N, exact), ZERO3: (low / N, 12 * t / N, exact),
                OFFLOAD: (0, 0, ((12 + 4 + 4) * t + low) / N + exact)}[self.strategy]  # fmt: skip

    def gradients(self) -> dict[str, float]:
        """Those of earlier micro-batches are there from the start when the step accumulates."""
        n, N, t = self.counts, self.devices, self.counts.trained
        head, embedding = n.head * n.head_learns, n.head * n.embedding_learns
        down = n.llama.hidden_size * n.llama.intermediate_size * ("down_proj" in n.learned)  # the first that a block makes
        nearly = t - n.trained_block - (n.trained_root - head) + down  # all but the first block's and the embedding's
        made = {"lengths": head * self.checkpointing, "loss": 0, "last block": head + down, "first block": nearly, "embedding": t,
                "step": t}  # fmt: skip
        if self.strategy in (ZERO3, OFFLOAD):
            return dict.fromkeys(made, 4 * t / N if self.strategy is ZERO3 else 0)
        if self.strategy is FSDP:
            return {moment: 4 * (t if self.accumulates else count) / N for moment, count in made.items()}
        # DeepSpeed's step: its own part summed up, and that once more as one vector, or the largest gradient in fp64 for the norm
        stepping = {"step": 4 * t / N + max(4 * t / N, 8 * min(n.largest, t / N))}
        if self.strategy is ZERO2:  # its own part waits in e until the backward pass ends, and is then added up
            held = {moment: 4 * t / N * self.accumulates + self.e * count / N for moment, count in made.items()}
            return held | {"embedding": held["embedding"] + 4 * t / N} | stepping
        # DDP's gradients live in its buckets, which are never freed. Where gradients are there, a fresh one stands beside them.
        there = self.accumulates or (self.strategy is DDP and N > 1)
        held = {moment: 4 * t if there else 4 * count for moment, count in made.items()}
        fresh = {"last block": down * there, "first block": down * there, "embedding": embedding * there}
        if n.llama.tie_word_embeddings and embedding:  # the head's gradient waits for the embedding's, to be added to it
            fresh = {moment: elements + n.head * (there or moment == "embedding") for moment, elements in fresh.items()}
        held |= {moment: held[moment] + 4 * elements for moment, elements in fresh.items()}
        return held | stepping if self.strategy is ZERO1 else held

    def dense(self) -> tuple[float, float]:
        """Bytes that the largest weight of a block takes while its layer computes: as it is unpacked for the product, and while DoRA
        adds the adapter's product to it and measures the rows, in fp32. int8 is unpacked by way of fp32, NF4 slice by slice."""
        c, n, e = self.counts.llama, self.counts, self.e
        largest = c.hidden_size * max(c.intermediate_size, c.num_attention_heads * c.head_dim)
        sliced = 6 * min(largest, SLICE[self.kind == "cpu"])  # of two codes, an int32 and two fp32
        unpacked = {"none": 0, "int8": (4 + e * (e < 4)) * largest, "nf4": e * largest + sliced,
                    "nf4-double": (e + 12 / 64) * largest + sliced}[n.storage]  # fmt: skip
        return unpacked, 12 * largest if n.adapter and n.adapter.dora else 0

    def working(self) -> dict[str, float]:
        """Weights that are cast, unpacked or gathered for a while, and the buffers of communication."""
        n, e, N, t = self.counts, self.e, self.devices, self.counts.trained
        unpacked, lengths = self.dense()
        bucket = min(REDUCE_BUCKET, t)  # as much of a bucket as ever fills
        # The plain AdamW, which is all an NPU has, makes the root of a whole moment at once. With --offload-optimizer one tensor at
        # a time has both its moments on the device, and the root and a quotient.
        share = {DDP: t, OFFLOAD: 0, ZERO3: min(t / N, SUB_GROUP)}.get(self.strategy, t / N)
        stepping = 4 * share if self.kind == "npu" else 0
        if self.offload_optimizer:
            stepping = (8 if self.kind == "cpu" else 16) * n.largest
        if self.strategy is FSDP:
            # Gathered: the root from the loss to the end, a block and the next one. A block's gradients, if it has any, stand beside
            # the fp32 buffer they are reduced from, which stays until the next block's. The root's go last.
            reducing = (e + 4 * (1 + 1 / N)) * n.trained_block
            blocks = e * n.root + e * n.head * n.head_learns + 2 * e * n.block + reducing
            gloo = 4 * n.root if self.kind == "cpu" else 0  # it copies what it reduces
            last = max(e * n.root + 2 * e * n.head, (e + 4) * n.root, e * (n.root - n.head) + 4 * n.root * (1 + 1 / N) + gloo)
            return {"lengths": blocks + lengths, "loss": e * (n.root + n.block), "last block": blocks, "first block": blocks,
                    "embedding": last if n.trained_root else e * n.root, "step": stepping}  # fmt: skip
        if self.strategy in (ZERO3, OFFLOAD):
            gathered = e * max(min(n.all, LIVE_PARAMETERS), n.head + n.block) + e * REDUCE_BUCKET
            reducing = gathered + e * bucket * (1 + 1 / N) + 4 * bucket / N
            masters = 4 * min(t / N, SUB_GROUP) if self.strategy is ZERO3 else 0  # the gradients as the optimizer reads them
            return {"lengths": reducing + lengths, "loss": gathered, "last block": reducing, "first block": reducing,
                    "embedding": reducing + e * n.head, "step": e * REDUCE_BUCKET + masters + stepping}  # fmt: skip
        reducing = {ZERO1: 4, ZERO2: e}.get(self.strategy, 0) * (REDUCE_BUCKET + bucket)  # the bucket, and it once more as it is sent
        casts = 0
        if e < 4 and not self.strategy.casts_weights:  # autocast keeps them until forward ends, autograd until they are used
            norms = 2 * n.llama.hidden_size * (not n.adapter or "norm" in n.learned)
            casts = e * ((n.trained_block if n.adapter else n.block) - norms)
        L = n.llama.num_hidden_layers
        # Autocast keeps none of what is frozen, autograd none to compute again.
        kept = L if n.trained_block or not self.checkpointing else 0
        computing = (1 if self.checkpointing else L) * casts + reducing
        return {"lengths": computing + lengths, "loss": kept * casts, "last block": computing + unpacked,
                "first block": casts + reducing + unpacked, "embedding": reducing, "step": stepping}  # fmt: skip

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
