"""The examinee: a model with its tokenizer, asked what is likely. Every task of evaluation asks it here.

    batches     which texts to compute together, and the progress bar
    request     a prompt and its possible answers as token ids
    score       the log-probability of every answer
    Report      what a task hands back

The settings are eval.py's; here `context`, `template` and `batch_tokens` count.
"""

from __future__ import annotations

from settings import UserError

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import takewhile

import torch
from torch import Tensor
from tqdm import tqdm

from model import IGNORE, KVCache, Llama, token_log_probs
from tokenizer import Tokenizer


@dataclass(frozen=True)
class Request:
    """Which of these answers is likeliest after this context? All of them token ids."""

    context: list[int]
    answers: list[list[int]]

    @property
    def length(self) -> int:
        """Tokens that must be read: the last of an answer is only predicted."""
        return len(self.context) + max(map(len, self.answers)) - 1


class Examinee:
    def __init__(self, model: Llama, tokenizer: Tokenizer, config):
        self.model, self.tokenizer, self.config = model.eval(), tokenizer, config
        self.context = config.context or model.config.context_length
        self.template = {"auto": tokenizer.template, "none": None}.get(config.template, config.template)
        self.weight = model.lm_head.weight
        self.device = self.weight.device

    def batches(self, lengths: Sequence[int], title: str, rows: Sequence[int] | None = None) -> Iterator[list[int]]:
        """Numbers of the texts to compute together: longest first, so that memory trouble shows at once; neighbours of
        nearly equal length; no more than --batch-tokens with padding. `rows` that each takes: 1. Shows progress."""
        config, batch, height = self.model.config, [], 0
        dynamic = (config.rope_scaling or {}).get("rope_type") == "dynamic"
        with tqdm(total=len(lengths), desc=title, disable=None, dynamic_ncols=True) as bar:
            for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
                longest = lengths[batch[0]] if batch else 0
                # Dynamic NTK turns by the length of the text: unequal rows would change each other's result.
                alien = dynamic and longest > config.max_position_embeddings and lengths[i] != longest
                if batch and (alien or (height + (rows[i] if rows else 1)) * longest > self.config.batch_tokens):
                    yield batch
                    bar.update(len(batch))
                    batch, height = [], 0
                batch.append(i)
                height += rows[i] if rows else 1
            if batch:
                yield batch
                bar.update(len(batch))

    def log_probs(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """log p of targets, 0 where they are -100. The head works in float32: logits in bf16, with 8 bits, would tie."""
        result = token_log_probs(hidden.float(), self.weight, targets)
        if not result.isfinite().all():
            raise UserError("the model's output is not a finite number; its weights are damaged, or --dtype must be fp32")
        return result

    @torch.inference_mode()
    def score(self, requests: list[Request], title: str) -> list[list[float]]:
        """The log-probability of every answer of every request, in nats, summed over its tokens."""
        scores: list[list[float]] = [[] for _ in requests]
        # Answers of one token are read off the context's last place; longer ones need a row each.
        rows = [len(r.answers) if r.length > len(r.context) else 1 for r in requests]
        for batch in self.batches([r.length for r in requests], title, rows):
            for i, values in zip(batch, self._score_together([requests[i] for i in batch]).tolist()):
                scores[i] = values[: len(requests[i].answers)]
        return scores

    def _score_together(self, requests: list[Request]) -> Tensor:
        """[B, n]: the contexts are read once, then all their answers beside each other behind the cached context."""
        B, n = len(requests), max(len(r.answers) for r in requests)
        m = max(len(answer) for r in requests for answer in r.answers)
        width, reach = max(len(r.context) for r in requests), max(r.length for r in requests)
        contexts, answers = torch.zeros((B, width), dtype=torch.long), torch.full((B, n, m), IGNORE)
        for b, request in enumerate(requests):
            contexts[b, width - len(request.context) :] = torch.tensor(request.context)  # padding on the left
            for i, answer in enumerate(request.answers):
                answers[b, i, : len(answer)] = torch.tensor(answer)
        contexts, answers = contexts.to(self.device), answers.to(self.device)
        starts = torch.tensor([width - len(r.context) for r in requests], device=self.device)
        cache = KVCache(self.model.config, B, width + m - 1, self.device, self.weight.dtype,
                        starts if starts.any() else None)  # fmt: skip
        last = self.model.hidden_states(contexts, cache=cache, rope_length=reach)[:, -1:]  # [B, 1, D]
        scores = self.log_probs(last.expand(B, n, -1), answers[:, :, 0])
        if m > 1:
            cache.keys, cache.values = (x.repeat_interleave(n, dim=1) for x in (cache.keys, cache.values))
            cache.starts = None if cache.starts is None else cache.starts.repeat_interleave(n)
            answers = answers.view(B * n, m)
            hidden = self.model.hidden_states(answers[:, :-1].clamp(min=0), cache=cache, rope_length=reach)
            scores = scores + self.log_probs(hidden, answers[:, 1:]).sum(-1).view(B, n)
        return scores

    def request(self, prompt: str | list[dict], answers: Sequence[str]) -> Request:
        """Ids of answers as they follow the prompt: a text, or messages that the chat template renders.

        Behind text "A" is another token than alone (▁A in sentencepiece): what counts is the ids of prompt + answer
        beyond those of the prompt. Where a tokenizer merges across that border, the border moves left for all answers.
        """
        t = self.tokenizer
        if isinstance(prompt, str):
            prefix, *wholes = (t.encode(prompt + answer, bos=t.add_bos) for answer in ("", *answers))
        else:
            prefix = t.render(prompt, self.template, add_generation_prompt=True)[0]
            talks = [[*prompt, {"role": "assistant", "content": answer}] for answer in answers]
            wholes = [self._without_end(t.render(talk, self.template)[0]) for talk in talks]
        shared = min(sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(prefix, w[:-1]))) for w in wholes)
        start = [] if shared else [self.start_id]
        return Request(start + prefix[:shared], [whole[shared:] for whole in wholes])

    def _without_end(self, ids: list[int]) -> list[int]:
        """Take the end of the turn off: special tokens and the blanks around them."""
        while len(ids) > 1 and not self.tokenizer.decode(ids[-1:]).strip():
            ids = ids[:-1]
        return ids

    @property
    def start_id(self) -> int:
        """What stands before a text: BOS where documents start with it, else the EOS of the document before."""
        t = self.tokenizer
        found = [i for i in (t.bos_id if t.add_bos else None, t.eos_id, t.bos_id) if i is not None]
        if not found:
            raise UserError("the tokenizer has neither a BOS nor an EOS token to put before the first word")
        return found[0]


@dataclass
class Report:
    """What a task found: `result` for programs, `records` raw for both, the rest for people."""

    headline: str
    result: dict
    lines: list[str] = field(default_factory=list)
    table: list[tuple[str, ...]] = field(default_factory=list)  # the first row is the header
    records: list[dict] = field(default_factory=list)
