"""Evaluation: a task under conditions, scored item by item.

Metrics: `first_token` (the model's most likely next token is the first token of an accepted answer; argmax over the
whole vocabulary), `exact_match` (greedy generation, whole normalised string) and `prefix_match` (the rule of SITE's
released code, lenient: read it beside the echo baseline).
"""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pandas as pd
import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from sitelens.conditions import Condition, Patch, ZeroShot
from sitelens.defaults import SitelensError, settings
from sitelens.fingerprints import unchanged
from sitelens.forward import HeadEdit, LastToken, decode, full_logits, last_logits
from sitelens.memory import (
    MAX_ROWS,
    MAX_TOKENS,
    chunks,
    crossed,
    forward_bytes,
    logits_bytes,
    prefix_bytes,
    step_cost,
)  # fmt: skip
from sitelens.metrics import SCORERS, Output, check_answers, checked_metrics
from sitelens.models import Model, context_length, own_tokenizer, resolve_model
from sitelens.prefix import PrefixCache
from sitelens.progress import tracked
from sitelens.prompts import Prompt, PromptBatch, few_shot_prompts, tokenize
from sitelens.summary import ECHO
from sitelens.tasks import Example, Task, load_task

COLUMNS = ("task", "condition", "seed", "item", "input", "answer", "predicted", "metric", "score", "logprob", "rank")


def evaluate(
    task: Task | str,
    conditions: Mapping[str, Condition],
    model: Model | str | None = None,
    *,
    split: str = "test",
    n_items: int | None = None,
    metrics: Sequence[str] = ("first_token",),
    seed: int = 0,
    max_new_tokens: int = 20,
    memory_budget: int | str | None = None,
    progress: bool | None = None,
) -> pd.DataFrame:
    """Scores of a task under each condition: one row per item, condition and metric.

    Columns: task, condition, seed, item (its index in the split), input, answer, predicted, metric, score (0 or 1),
    logprob (nats) and rank (1 is the most likely) of the preferred answer's first token. `n_items` takes a sample
    that depends on seed and task only; `seed` also decides the demonstrations. The split is never filtered. With
    prefix_match, rows of the condition "echo" (answering with the query itself) stand beside the others.

    Raises:
        SitelensError: for unknown metrics or splits, no items, an answer that is empty after normalisation, or a
            condition made for another model.
    """
    task, model = load_task(task), resolve_model(model)
    metrics = checked_metrics(metrics)
    if ECHO in conditions and "prefix_match" in metrics:
        raise SitelensError(f"no condition may be called {ECHO!r}: the echo baseline stands beside prefix_match")
    if not conditions:
        raise SitelensError("give at least one condition, for example {'zero-shot': sl.ZeroShot()}")
    chosen = sample_items(task, split, n_items, seed)
    items = [task.split(split)[i] for i in chosen]
    budget = settings.budget(memory_budget)
    generating = any(metric != "first_token" for metric in metrics)
    if generating:
        if max_new_tokens < 1:
            raise SitelensError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
        check_answers(task, items)
    answers = _Answers(model, own_tokenizer(model), max_new_tokens if generating else 0, budget)
    groups: dict[int, tuple[dict[str, Patch], dict[str, Condition]]] = {}  # by the number of demonstrations
    bar = tracked(range(len(conditions) * len(items)), f"evaluate {task.name}", progress=progress)
    with unchanged(model):  # each condition asks whether it fits
        for name, condition in conditions.items():
            patched, hooked = groups.setdefault(condition.n_shots, ({}, {}))
            patch = condition.patch(model)
            if patch is None or (generating and condition.steps == "every"):
                hooked[name] = condition
            else:
                patched[name] = patch
        outputs: dict[str, list[Output]] = {}
        for n_shots, (patched, hooked) in groups.items():
            prompts = _prompts(task, split, chosen, n_shots, model, seed)
            batch = tokenize(
                prompts,
                answers.tokenizer,
                context_length(model),
                f"task {task.name!r}, {n_shots} shots",
                answers.max_new_tokens,
            )
            outputs |= answers.patched(batch, patched, lambda rows: _advance(bar, rows))
            outputs |= answers.hooked(batch, hooked, lambda rows: _advance(bar, rows))
    next(bar, None)
    frames = []
    for metric in metrics:
        scorer = SCORERS[metric]
        for name in conditions:
            for place, item, out in zip(chosen, items, outputs[name], strict=True):
                predicted = out.token_text if metric == "first_token" else out.text
                frames.append((task.name, name, seed, place, item.input, item.output, predicted, metric,
                               int(scorer(task, item, out)), out.logprob, out.rank))  # fmt: skip
    frame = pd.DataFrame(frames, columns=list(COLUMNS))
    if "prefix_match" in metrics:
        frame = pd.concat(
            [frame, echo(task, model, split=split, n_items=n_items, metrics=("prefix_match",), seed=seed)]
        )
    return frame.reset_index(drop=True)


def echo(
    task: Task | str,
    model: Model | str | None = None,
    *,
    split: str = "test",
    n_items: int | None = None,
    metrics: Sequence[str] = ("prefix_match",),
    seed: int = 0,
) -> pd.DataFrame:
    """The echo baseline: the scores of answering with the query itself, as `evaluate` gives them.

    logprob and rank are missing: no model is run (first_token compares the first tokens of query and answer).
    """
    task, model = load_task(task), resolve_model(model)
    metrics = checked_metrics(metrics)
    chosen = sample_items(task, split, n_items, seed)
    items = [task.split(split)[i] for i in chosen]
    if any(metric != "first_token" for metric in metrics):
        check_answers(task, items)
    tokenizer = own_tokenizer(model)
    echoes = [Example(item.input, item.input) for item in items]
    where = f"task {task.name!r}"
    prompts = few_shot_prompts(task, items, 0, tokenizer)
    accepted = tokenize(prompts, tokenizer, None, where).accepted
    said = tokenize(few_shot_prompts(task, echoes, 0, tokenizer), tokenizer, None, where).answer.tolist()
    rows = []
    for metric in metrics:
        for place, item, first, right in zip(chosen, items, said, accepted, strict=True):
            out = Output(first in right, tokenizer.decode([first]), item.input, float("nan"), float("nan"))
            predicted = out.token_text if metric == "first_token" else out.text
            score = int(SCORERS[metric](task, item, out))
            rows.append((task.name, ECHO, seed, place, item.input, item.output, predicted, metric, score,
                         out.logprob, out.rank))  # fmt: skip
    return pd.DataFrame(rows, columns=list(COLUMNS))


def generate(
    prompts: Sequence[str],
    condition: Condition | None = None,
    model: Model | str | None = None,
    *,
    max_new_tokens: int = 20,
    memory_budget: int | str | None = None,
) -> list[str]:
    """Greedy continuations of prompts as they stand, up to a newline or the end of text, white space stripped.

    `condition` says what is patched (its `n_shots` plays no part here).

    Raises:
        SitelensError: if a prompt is empty or too long, or the condition was made for another model.
    """
    model = resolve_model(model)
    if isinstance(prompts, str):
        raise SitelensError(f"prompts must be a list of texts: write generate([{prompts!r}])")
    if max_new_tokens < 1:
        raise SitelensError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    if not prompts:
        return []
    tokenizer, condition = own_tokenizer(model), condition or ZeroShot()
    texts = [Prompt(text, ()) for text in prompts]
    batch = tokenize(texts, tokenizer, context_length(model), new_tokens=max_new_tokens)
    answers = _Answers(model, tokenizer, max_new_tokens, settings.budget(memory_budget))
    patch = condition.patch(model)
    if patch is None or condition.steps == "every":
        outputs = answers.hooked(batch, {"": condition}, lambda rows: None)
    else:
        outputs = answers.patched(batch, {"": patch}, lambda rows: None)
    return [out.text for out in outputs[""]]


def sample_items(task: Task, split: str, n_items: int | None, seed: int) -> list[int]:
    """Indices of a split's items: all of them, or a sample of `n_items` in rising order."""
    total = len(task.split(split))
    if total == 0:
        raise SitelensError(f"task {task.name!r} has no {split} items")
    if n_items is None or n_items >= total:
        return list(range(total))
    if n_items < 1:
        raise SitelensError(f"n_items must be at least 1, got {n_items}")
    return sorted(random.Random(f"sitelens/items/{task.name}/{split}/{seed}").sample(range(total), n_items))


class _Answers:
    """Runs prompts under conditions: last-token logits and, where wanted, greedy continuations."""

    def __init__(self, model: Model, tokenizer: Any, max_new_tokens: int, budget: int) -> None:
        self.model, self.tokenizer, self.max_new_tokens, self.budget = model, tokenizer, max_new_tokens, budget

    def patched(
        self, batch: PromptBatch, patches: Mapping[str, Patch], advance: Callable[[int], None]
    ) -> dict[str, list[Output]]:
        """Conditions that touch the last token only, as rows of one batch over a shared prefix."""
        if not patches:
            return {}
        edits = HeadEdit.stack([patch.edit(self.model) for patch in patches.values()])
        found: list[list[Output | None]] = [[None] * len(batch) for _ in patches]
        share = self.budget // 3  # the prefixes, what is computed, and what decoding keeps
        with torch.no_grad(), LastToken(self.model) as last_token:
            for index in chunks(batch.lengths, functools.partial(prefix_bytes, self.model), share):
                part = batch.rows(index)
                prefix = PrefixCache.of(part, self.model, share)
                for items, which in crossed(part.lengths, len(patches), self._step_cost(), share):
                    some = prefix.rows(torch.tensor(items), repeats=len(which))
                    edit = edits.rows(torch.tensor(which * len(items), device=edits.keep.device))
                    cache = None
                    if self.max_new_tokens:
                        logits, cache = last_token.step(some, edit)
                    else:
                        logits = last_token(some, edit)
                    pairs = [(i, c) for i in items for c in which]
                    outputs = self._outputs(logits, part.rows([i for i, _ in pairs]), cache, some.mask)
                    for (i, c), out in zip(pairs, outputs, strict=True):
                        found[c][index[i]] = out
                    advance(len(pairs))
        return {name: [out for out in row if out] for name, row in zip(patches, found, strict=True)}

    def hooked(
        self, batch: PromptBatch, conditions: Mapping[str, Condition], advance: Callable[[int], None]
    ) -> dict[str, list[Output]]:
        """Any condition: whole prompts run, and decoded, while it is applied.

        Those that leave all but the last token alone share its prefix and run that token only.
        """
        found: dict[str, list[Output | None]] = {name: [None] * len(batch) for name in conditions}
        share = self.budget // 2  # the other half is for what decoding keeps
        for index in chunks(
            batch.lengths, self._full_cost, share, max_rows=MAX_ROWS, max_tokens=MAX_TOKENS, same_length=True
        ):
            part = batch.rows(index)
            prefix: PrefixCache | None = None
            for name, condition in conditions.items():
                if condition.positions == "last" and prefix is None:
                    prefix = PrefixCache.of(part, self.model, share)
                with torch.no_grad(), condition.applied(self.model):
                    if condition.positions == "last" and prefix is not None:
                        logits, cache = last_logits(prefix, self.model)
                    else:
                        cache = DynamicCache()
                        logits = full_logits(part, self.model, cache)
                    outputs = self._outputs(logits, part, cache, part.mask.to(logits.device))
                for i, out in zip(index, outputs, strict=True):
                    found[name][i] = out
                advance(len(index))
        return {name: [out for out in row if out] for name, row in found.items()}

    def _full_cost(self, length: int) -> int:
        """Bytes of one row of whole prompts with its logits."""
        return forward_bytes(self.model, length) + logits_bytes(self.model)

    def _step_cost(self) -> Callable[[int], int]:
        """Bytes of one row: its step, and a copy of its prefix that grows while it is decoded."""
        step, new = step_cost(self.model, gradient=False), self.max_new_tokens
        return lambda length: step(length) + (3 * prefix_bytes(self.model, length + new) if new else 0)

    def _outputs(self, logits: Tensor, batch: PromptBatch, cache: DynamicCache | None, mask: Tensor) -> list[Output]:
        if not torch.isfinite(logits).all():
            raise SitelensError(
                "the model's logits are not finite: is an embedding infinite, or the dtype too narrow (try 'float32')?"
            )
        likeliest = logits.argmax(-1).tolist()
        if (batch.answer >= 0).all():
            answer = batch.answer.to(logits.device)[:, None]
            said = logits.gather(1, answer)
            ranks = (1 + (logits > said).sum(-1)).tolist()
            wide = torch.promote_types(logits.dtype, torch.float32)
            logprobs = (said[:, 0].to(wide) - logits.to(wide).logsumexp(-1)).tolist()
        else:  # prompts without known answers
            logprobs = ranks = [float("nan")] * len(batch)
        texts = [""] * len(batch)
        if cache is not None and self.max_new_tokens:
            texts = decode(self.model, logits, cache, mask, self.tokenizer, self.max_new_tokens)
        return [
            Output(token in accepted, self.tokenizer.decode([token]), text, logprob, rank)
            for token, accepted, text, logprob, rank in zip(
                likeliest, batch.accepted, texts, logprobs, ranks, strict=True
            )
        ]


def _prompts(task: Task, split: str, chosen: Sequence[int], n_shots: int, model: Model, seed: int) -> list[Prompt]:
    items = [task.split(split)[i] for i in chosen]
    return few_shot_prompts(task, items, n_shots, own_tokenizer(model), seed, split, chosen)


def _advance(bar: Any, rows: int) -> None:
    for _ in range(rows):
        next(bar, None)
