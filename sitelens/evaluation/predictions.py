"""Prompts under conditions: the most likely next tokens and, if requested, greedy continuations."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Mapping, Sequence

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from sitelens.conditions.base import Condition, Patch, in_effect
from sitelens.engine.batches import PromptBatch
from sitelens.engine.decoding import decode, end_tokens
from sitelens.engine.forward import HeadEdit, LastToken, check_finite, full_logits, last_logits
from sitelens.engine.memory import (
    MAX_ROWS,
    MAX_TOKENS,
    chunk_grid,
    chunks,
    forward_bytes,
    logits_bytes,
    prefix_bytes,
    step_cost,
)
from sitelens.engine.network import Passes
from sitelens.engine.prefix import PrefixCache
from sitelens.engine.twins import is_user_hooked
from sitelens.metrics import Output
from sitelens.models.model import Model


def as_patches(
    conditions: Mapping[str, Condition], model: Model, generating: bool
) -> tuple[dict[str, Patch], dict[str, Condition]]:
    """The conditions that can run as rows over a shared prefix (as last-token edits), and the others.

    If the user has hooks on the model, prompts run whole, under one condition after the other.

    Args:
        conditions: conditions by name.
        model: the model to run.
        generating: whether text is generated: then conditions that act at decoding steps are among the others.

    Raises:
        SitelensError: if a condition was made for another model.
    """
    user_hooked = is_user_hooked(model.bridge)
    patches: dict[str, Patch] = {}
    others: dict[str, Condition] = {}
    for name, condition in conditions.items():
        patch = condition.patch(model.bridge)
        if patch is None or user_hooked or (generating and condition.scope == "generation"):
            others[name] = condition
        else:
            patches[name] = patch
    return patches, others


class Predictor:
    """Runs a batch of prompts under conditions.

    Args:
        model: the model to run.
        batch: the prompts.
        budget: bytes to use.
        where: `where(condition, place)` describes a condition and the prompt at this index of the batch, for messages.
        max_new_tokens: most tokens to generate; 0 for next tokens only.
        ends: token ids that end a text (None: the model's own).
        complete: `complete(place, text)` is True if a text needs no more tokens.
        labels: token ids among which the most likely one is reported as well.
    """

    def __init__(
        self, model: Model, batch: PromptBatch, budget: int, where: Callable[[str, int], str], max_new_tokens: int = 0,
        ends: Collection[int] | None = None, complete: Callable[[int, str], bool] = lambda place, text: False,
        labels: Sequence[int] = (),
    ) -> None:  # fmt: skip
        self.model, self.batch, self.budget, self.where, self.complete = model, batch, budget, where, complete
        self.tokenizer, self.max_new_tokens = model.tokenizer, max_new_tokens
        self.ends = end_tokens(model, self.tokenizer) if ends is None else ends
        self.labels = torch.tensor(labels, dtype=torch.long)
        self.user_hooked = is_user_hooked(model.bridge)  # if so, `hooked` runs all conditions, on whole prompts

    def patched(self, patches: Mapping[str, Patch], advance: Callable[[int], None]) -> dict[str, list[Output]]:
        """Outputs by condition, for last-token edits, run as rows of one batch over a shared prefix.

        Args:
            patches: last-token edits by name, from `as_patches`.
            advance: called with the number of rows that are done, for a progress bar.
        """
        if not patches:
            return {}
        names = list(patches)
        edits = HeadEdit.stack([patch.edit(self.model) for patch in patches.values()])
        outputs_of: list[list[Output | None]] = [[None] * len(self.batch) for _ in patches]
        share = self.budget // 3  # a third each for prefixes, activations and decoding
        with torch.no_grad(), LastToken(self.model) as last_token:
            for index in chunks(self.batch.lengths, functools.partial(prefix_bytes, self.model), share):
                part = self.batch.rows(index)
                prefix = PrefixCache.of(part, self.model, share)
                for items, which in chunk_grid(part.lengths, len(patches), self._step_cost(), share):
                    prefix_rows = prefix.rows(torch.tensor(items), repeats=len(which))
                    edit = edits.rows(torch.tensor(which * len(items), device=edits.keep.device))
                    cache = None
                    if self.max_new_tokens:
                        logits, cache = last_token.step(prefix_rows, edit)
                    else:
                        logits = last_token(prefix_rows, edit)
                    pairs = [(i, c) for i in items for c in which]
                    labels = [(names[c], index[i]) for i, c in pairs]
                    rows = part.rows([i for i, _ in pairs])
                    outputs = self._outputs(logits, rows, cache, prefix_rows.mask, labels, last_token.passes)
                    for (i, c), out in zip(pairs, outputs, strict=True):
                        outputs_of[c][index[i]] = out
                    advance(len(pairs))
        return {name: [out for out in row if out] for name, row in zip(patches, outputs_of, strict=True)}

    def hooked(self, conditions: Mapping[str, Condition], advance: Callable[[int], None]) -> dict[str, list[Output]]:
        """Outputs by condition, for any conditions, run one after the other.

        Conditions that edit only the last token share a cached prefix and run that token; others run whole prompts.

        Args:
            conditions: conditions by name.
            advance: called with the number of rows that are done, for a progress bar.
        """
        outputs_of: dict[str, list[Output | None]] = {name: [None] * len(self.batch) for name in conditions}
        share = self.budget // 2  # the other half is for decoding
        for index in chunks(
            self.batch.lengths, self._full_cost, share, max_rows=MAX_ROWS, max_tokens=MAX_TOKENS, same_length=True
        ):
            part = self.batch.rows(index)
            prefix: PrefixCache | None = None
            for name, condition in conditions.items():
                shared = condition.positions == "last" and not self.user_hooked
                if shared and prefix is None:
                    prefix = PrefixCache.of(part, self.model, share)
                with torch.no_grad(), in_effect(condition, self.model) as passes:
                    if shared and prefix is not None:
                        logits, cache = last_logits(prefix, passes)
                    else:
                        cache = DynamicCache()
                        logits = full_logits(part, passes, cache)
                    labels = [(name, i) for i in index]
                    outputs = self._outputs(logits, part, cache, part.mask.to(logits.device), labels, passes)
                for i, out in zip(index, outputs, strict=True):
                    outputs_of[name][i] = out
                advance(len(index))
        return {name: [out for out in row if out] for name, row in outputs_of.items()}

    def _full_cost(self, length: int) -> int:
        """Bytes that a whole prompt of this length needs, with its logits."""
        return forward_bytes(self.model, length) + logits_bytes(self.model)

    def _step_cost(self) -> Callable[[int], int]:
        """Bytes that one row needs, by length: its step, and a copy of its prefix that grows during decoding."""
        step, new = step_cost(self.model, gradient=False), self.max_new_tokens
        return lambda length: step(length) + (3 * prefix_bytes(self.model, length + new) if new else 0)

    def _outputs(
        self, logits: Tensor, batch: PromptBatch, cache: DynamicCache | None, mask: Tensor,
        rows: Sequence[tuple[str, int]], passes: Passes,
    ) -> list[Output]:  # fmt: skip
        """The outputs of a batch; `rows` gives each row's condition and the index of its prompt."""

        def where(row: int) -> str:
            return self.where(*rows[row])

        check_finite(logits, where)
        likeliest = logits.argmax(-1).tolist()
        if (batch.answer >= 0).all():
            answer = batch.answer.to(logits.device)[:, None]
            said = logits.gather(1, answer)
            ranks = (1 + (logits > said).sum(-1)).tolist()
            wide = torch.promote_types(logits.dtype, torch.float32)
            logprobs = (said[:, 0].to(wide) - logits.to(wide).logsumexp(-1)).tolist()
        else:  # prompts without known answers
            logprobs = ranks = [float("nan")] * len(batch)
        labels = [-1] * len(batch)
        if len(self.labels):
            labels = self.labels[logits[:, self.labels.to(logits.device)].argmax(-1).cpu()].tolist()
        texts = [""] * len(batch)
        if cache is not None and self.max_new_tokens:
            whole = batch.tokens.to(mask.device) if self.user_hooked else None
            texts = decode(
                passes, logits, cache, mask, self.tokenizer, self.max_new_tokens, self.ends,
                lambda row, text: self.complete(rows[row][1], text), where, whole,
            )  # fmt: skip
        words = {token: self.tokenizer.decode([token]) for token in {*likeliest, *labels} if token >= 0}
        return [
            Output(token=token, token_text=words[token], label=label, label_text=words.get(label, ""), text=text,
                   logprob=logprob, rank=rank)
            for token, label, text, logprob, rank in zip(likeliest, labels, texts, logprobs, ranks, strict=True)
        ]  # fmt: skip
