"""Rows for new tokens: a model's embedding and output head, made to fit a larger tokenizer.

    RowMaker        which rows stay, which are new, and what a new one starts as
    row_report      whether new rows coincide with others, and how long they are

A row of the embedding (`model.embed_tokens.weight` [V, D]) is what the model reads for a token; a row of the head
(`lm_head.weight` [V, D]) is what it compares its hidden state with to write the token. Tied models have one matrix for
both. `tokenizer.py extend` keeps every old id, so the old rows stay bit for bit, and so do the logits over old tokens for
text without new ones. For a row that is new:

    normal    N(0, initializer_range), what training starts from: knows nothing. (Chinese-LLaMA)
    mean      the mean of the old rows and a little noise: a token of which nothing is known but that it is one. Its logit
              is the average one, so it takes little probability from the others (Hewitt 2021, "Initializing New Word
              Embeddings for Pretrained Language Models"). (Stanford Alpaca, QLoRA, transformers)
    subword   the average of the rows that the old tokenizer would have taken for this piece, as long as old rows are on
              average. The model has read 法国 as 法, 国 before; this is the nearest thing to it in one row.

Three traps of `subword`, met in published conversions:

  * A plain mean is blind to order. Llama-2 spells a rare character as three bytes of which only the order may differ from
    another's: of 20,292 characters added so, 18,988 got the same row as some other one. So the average is weighted by
    position. Pieces such as 哈哈 and 哈哈哈 are one row repeated, whatever the weights; a noise of a hundredth keeps them
    apart. (Rows that are the same and are used alike differ only once training tells them apart.)
  * The old tokenizer must read the piece as text behind other text. Encoded alone, it starts with Llama's additional ▁;
    taking the first token off instead loses the "<" of "<|im_end|>", which is part of the token "▁<".
  * An average is shorter than what it averages: in the head, all logits of new tokens would start out small.
"""

from __future__ import annotations

from settings import UserError

import hashlib

import torch
from torch import Tensor

METHODS = ("subword", "mean", "normal")
NOISE = 0.01  # of the old rows' standard deviation: rows differ, also in bf16, and mean the same
CHUNK = 1024  # rows that are computed at a time, in fp32


class RowMaker:
    """Old rows to the rows for a larger tokenizer. One maker serves embedding and head: the pieces are encoded once.

    vocab_size: rows that the model has. More than tokens (a padded vocabulary): the rows behind the last token were
        never read, and become those of the new tokens. Fewer (a token was added, but no row): the missing ones are new.
    multiple_of: round the number of rows up. Rows that no token uses get `mean`, so that none is ever likely.
    kept: the first so many rows are the old tokens'; tokens: the ids of the new ones; new_ids: all rows that are made, padding
        too; size: all rows, never fewer than before

    Raises UserError if the new tokenizer is not the old one with tokens added.
    """

    def __init__(self, old, new, vocab_size: int, *, method: str = "subword", multiple_of: int = 1, seed: int = 0,
                 initializer_range: float = 0.02):  # fmt: skip
        if method not in METHODS:
            raise UserError(f"there is no method {method!r} for new rows; there are {', '.join(METHODS)}")
        self.kept = min(len(old), vocab_size)
        _check_extends(old, new, self.kept)
        self.vocab_size, self.method, self.seed, self.initializer_range = vocab_size, method, seed, initializer_range
        self.size = -(-max(len(new), vocab_size) // multiple_of) * multiple_of
        self.tokens = range(self.kept, len(new))
        self.new_ids = [*self.tokens, *range(max(len(new), vocab_size), self.size)]
        self._parts = []  # of each new token, its ids in the old tokenizer
        if method == "subword":
            self._parts = [[i for i in _old_ids(old, new.token_bytes[token_id]) if i < self.kept] for token_id in self.tokens]

    def resize(self, rows: Tensor, *, output: bool) -> Tensor:
        """[vocab_size, D] -> [size, D], of the same dtype: old rows bit for bit, and the new ones.

        output: these are the head's rows (of tied models: False). The same seed gives the same rows.
        Holds both matrices and a few MB.
        """
        if rows.shape[0] != self.vocab_size:
            raise ValueError(f"{rows.shape[0]} rows; this maker was made for {self.vocab_size}")
        result = rows.new_empty(self.size, rows.shape[1])
        result[: self.vocab_size] = rows
        mean, std, norm = statistics(rows[: self.kept])
        generator = torch.Generator().manual_seed(2 * self.seed + output)
        for start in range(0, len(self.new_ids), CHUNK):
            ids = self.new_ids[start : start + CHUNK]
            noise = torch.randn(len(ids), rows.shape[1], generator=generator)
            if self.method == "normal":
                made = noise * self.initializer_range
            else:
                made = mean + NOISE * std * noise
                parts = self._parts[start : start + CHUNK]  # one for each token; none for rows without a token
                weighted, some = _weighted_sums(rows, parts, output)
                weighted += NOISE * std * noise[: len(parts)]
                weighted *= norm / weighted.norm(dim=1, keepdim=True).clamp_min(1e-12)
                made[: len(parts)][some] = weighted[some]
            result[ids] = made.to(rows.dtype)
        return result


def _check_extends(old, new, kept: int) -> None:
    if len(new) < kept:
        raise UserError(f"the new tokenizer has {len(new):,} tokens and the model {kept:,}: taking rows away would take "
                        "away what was learned, and ids above would no longer exist; give a tokenizer that adds to the "
                        "model's (tokenizer.py extend)")  # fmt: skip
    different = next((i for i in range(kept) if old.pieces[i] != new.pieces[i]), None)
    if different is not None:
        raise UserError(f"token {different} is {old.pieces[different]!r} in the model's tokenizer and "
                        f"{new.pieces[different]!r} in the new one, so rows would change their meaning; give a tokenizer "
                        "that adds to the model's (tokenizer.py extend)")  # fmt: skip


def _old_ids(old, data: bytes) -> list[int]:
    """How the old tokenizer spells a new token, behind other text. Of part of a character: nothing."""
    try:
        return old.encode_segment(data.decode(), continued=True)
    except UnicodeDecodeError:
        return []


def _weighted_sums(rows: Tensor, parts: list[list[int]], output: bool) -> tuple[Tensor, Tensor]:
    """[n, D] sums of the rows of each part, weighted by position, in fp32; and [n], whether there was any row.

    To write a word, the model first has to write its first part; what it has read last tells most about what follows. So
    the weights of n parts fall in the head, n … 1, and rise in the embedding.
    """
    n, longest = len(parts), max(map(len, parts), default=0)
    lengths = torch.tensor([len(part) for part in parts], dtype=torch.long)
    ids = torch.tensor([part + [0] * (longest - len(part)) for part in parts], dtype=torch.long).view(n, longest)
    sums = torch.zeros(n, rows.shape[1])
    for k in range(longest):
        at = (lengths > k).nonzero()[:, 0]
        weights = (lengths[at] - k) if output else torch.full_like(at, k + 1)
        sums[at] += weights[:, None] * rows[ids[at, k]].float()
    return sums, lengths > 0


def statistics(rows: Tensor) -> tuple[Tensor, Tensor, float]:
    """Mean [D] and standard deviation [D] of the rows, and their mean norm: in fp32 whatever the dtype, in chunks."""
    total = torch.zeros(rows.shape[1], dtype=torch.float64)
    squares, norms = total.clone(), 0.0
    for chunk in rows.split(CHUNK):
        chunk = chunk.double()
        total += chunk.sum(0)
        squares += chunk.square().sum(0)
        norms += chunk.norm(dim=1).sum().item()
    mean = total / len(rows)
    std = (squares / len(rows) - mean.square()).clamp_min(0).sqrt()
    return mean.float(), std.float(), norms / len(rows)


def row_report(rows: Tensor, maker: RowMaker) -> dict:
    """rows [V, D] that this maker made -> {"new", "coinciding", "norm_old", "norm_new"}.

    coinciding: how many new rows, padding included, equal any other row, bit for bit. norms: the mean ones of old and new
    tokens; None where there are none.
    """
    new_ids = set(maker.new_ids)
    groups: dict[bytes, list[int]] = {}  # by hash: the rows themselves would be held in memory once more
    for i, row in enumerate(rows.contiguous().view(torch.uint8).numpy()):
        groups.setdefault(hashlib.blake2b(row, digest_size=16).digest(), []).append(i)
    coinciding = sum(i in new_ids for group in groups.values() if len(group) > 1 for i in group)
    norms = torch.cat([chunk.float().norm(dim=1) for chunk in rows.split(CHUNK)])
    old, new = norms[: maker.kept], norms[maker.tokens.start : maker.tokens.stop]
    return {"new": len(maker.tokens), "coinciding": coinciding, "norm_old": old.mean().item() if len(old) else None,
            "norm_new": new.mean().item() if len(new) else None}  # fmt: skip
