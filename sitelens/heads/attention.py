"""What heads attend to at the last prompt token, and the scores of induction and previous-token heads.

In a model with attention sinks (GPT-OSS) a head's weights sum to less than one: a sink logit of the head itself, which
belongs to no token, takes the rest. Here it is a role of its own, distinct from the first token. Induction and
previous-token heads (Olsson et al. 2022) are scored on repeated random tokens.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from sitelens.checks.arguments import checked
from sitelens.checks.values import Count, CountOrZero, Seed
from sitelens.engine.batches import PromptBatch, task_batch
from sitelens.engine.capture import run_with_callbacks, same_length_chunks
from sitelens.engine.memory import MAX_TOKENS
from sitelens.engine.prompts import draw_demonstrations, few_shot_prompt, prompt_parts
from sitelens.errors import SitelensError
from sitelens.heads.inputs import task_or_texts, text_batch
from sitelens.models.heads import Heads, all_heads, checked_heads, per_head
from sitelens.models.loading import resolve_model
from sitelens.models.model import Model, ModelSource
from sitelens.models.tokenizers import added, spans
from sitelens.tasks import Example, Task

FIRST = "first token"  # a role of its own: idle heads attend to it
ROLES = (FIRST, "demonstration input", "demonstration answer", "query", "template")
SINK = "attention sink"  # attention that falls on no token, in models with sinks
TEXT = "text"  # in the user's own prompts, every token but the first


@checked
def attention(
    prompts: PromptBatch | str | Sequence[str], heads: Heads, model: ModelSource | None = None
) -> Float[Tensor, "row head pos"]:
    """Attention of each head from the last prompt token to all positions; 0 on padding.

    Rows sum to one, except in models with attention sinks, which take the rest.

    Args:
        prompts: one text, a list of texts, or a PromptBatch; shorter prompts are padded on the left.
        heads: one or several of (10, 6), "L10H6" or "10.6", or a boolean mask `[layer head]`.
        model: the model (default: the packaged one).

    Returns:
        `[prompt head pos]`, heads in the order given.

    Raises:
        SitelensError: if there is no such head, or the model's bridge does not expose its attention.

    Example:
        >>> sl.heads.attention("Q: France\\nA:", ["L1H3"], model).shape  # prompts, heads, positions
        torch.Size([1, 1, 6])
    """
    model = resolve_model(model)
    chosen = checked_heads(heads, model)
    texts = [prompts] if isinstance(prompts, str) else prompts
    batch = texts if isinstance(texts, PromptBatch) else text_batch(texts, model)
    found = torch.zeros(len(batch), len(chosen), batch.tokens.shape[1])
    for index in same_length_chunks(batch, model):
        part = batch.rows(index)
        kept: dict[int, Tensor] = {}

        def keep(pattern: Tensor, layer: int, kept: dict[int, Tensor] = kept) -> None:
            kept[layer] = pattern[:, :, -1].float().cpu()

        _watch_patterns(part.tokens, model, {layer for layer, _ in chosen}, keep)
        for place, (layer, head) in enumerate(chosen):
            found[index, place, -part.tokens.shape[1] :] = kept[layer][:, head]
    return found


@checked
def attention_example(
    task: Task | str | Sequence[str], heads: Heads, model: ModelSource | None = None, *, n_shots: CountOrZero = 3,
    item: CountOrZero = 0, seed: Seed = 0,
) -> pd.DataFrame:  # fmt: skip
    """Attention from the last token of one few-shot prompt: one row per token, one column per head.

    Columns: position, token, role, and one per head, such as "10.6". In models with attention sinks, the last row, at
    position -1, is their share.

    Args:
        task: the task, or one prompt of your own; `n_shots`, `item` and `seed` then have no effect.
        heads: one or several of (10, 6), "L10H6" or "10.6", or a boolean mask `[layer head]`.
        model: the model (default: the packaged one).
        n_shots: demonstrations in the prompt.
        item: index of the validation item that is the query.
        seed: fixes the demonstrations.

    Raises:
        SitelensError: if there is no such head or item, and as `attention_roles`.

    Example:
        >>> frame = sl.heads.attention_example(task, ["L1H3"], model, n_shots=1)
        >>> list(frame.columns)
        ['position', 'token', 'role', '1.3']
    """
    model = resolve_model(model)
    chosen = checked_heads(heads, model)
    task = task_or_texts(task)
    if isinstance(task, list):
        if len(task) > 1:
            raise SitelensError(f"attention_example shows one prompt, not {len(task)}")
        batch = text_batch(task, model)
        return _by_token(batch, [FIRST, *[TEXT] * (batch.tokens.shape[1] - 1)], chosen, model)
    if not 0 <= item < len(task.nonempty("valid")):
        raise SitelensError(f"there is no valid item {item} of task {task.name!r}: items 0 to {len(task.valid) - 1}")
    demonstrations = draw_demonstrations(task, n_shots, task.valid[item], seed, "valid", item)
    batch, roles = _with_roles(task, [(demonstrations, task.valid[item])], model)
    return _by_token(batch, roles[0], chosen, model)


@checked
def attention_roles(
    task: Task | str | Sequence[str], heads: Heads | None = None, model: ModelSource | None = None, *,
    n_prompts: Count = 20, n_shots: CountOrZero = 10, seed: Seed = 0,
) -> pd.DataFrame:  # fmt: skip
    """Share of the last token's attention by role: one row per head and role, columns layer, head, role, share.

    Shares are means over few-shot prompts. Roles: the prompt's first token, the demonstrations' inputs and answers, the
    query, the template's own words and, in models that have them, attention sinks.

    Args:
        task: the task; its prompts are drawn as for `embed_task`.
        heads: one or several of (10, 6), "L10H6" or "10.6", or a boolean mask `[layer head]` (default: all heads).
        model: the model (default: the packaged one).
        n_prompts: prompts to average over.
        n_shots: demonstrations per prompt.
        seed: fixes the prompts.

    Raises:
        SitelensError: as `embed_task`; if there is no such head; for prompts of your own, a chat template, a tokenizer
            that does not report the text spans of its tokens, or a bridge that does not expose the model's attention.

    Example:
        >>> frame = sl.heads.attention_roles(task, ["L1H3"], model, n_prompts=2, n_shots=1)
        >>> round(float(frame["share"].sum()), 3)
        1.0
    """
    task, model = task_or_texts(task), resolve_model(model)
    if isinstance(task, list):
        raise SitelensError("roles are known in a task's prompts only; for your own see attention, attention_example")
    chosen = all_heads(model) if heads is None else checked_heads(heads, model)
    drawn = []
    for i in range(n_prompts):
        *demonstrations, query = draw_demonstrations(task, n_shots + 1, None, seed, "embedding", i)
        drawn.append((demonstrations, query))
    batch, roles = _with_roles(task, drawn, model)
    weights = attention(batch, chosen, model)
    rows = []
    width = batch.tokens.shape[1]
    for role in ROLES:
        mask = torch.tensor([[False] * (width - len(own)) + [kind == role for kind in own] for own in roles])
        shares = (weights * mask[:, None]).sum(-1).mean(0)
        rows += [(*head, role, share) for head, share in zip(chosen, shares.tolist(), strict=True)]
    if _has_sinks(weights, model):
        shares = 1 - weights.sum(-1).mean(0)
        rows += [(*head, SINK, share) for head, share in zip(chosen, shares.tolist(), strict=True)]
    return pd.DataFrame(rows, columns=["layer", "head", "role", "share"])


@checked
def induction_scores(
    model: ModelSource | None = None, *, n_rows: Count = 8, length: Count = 40, seed: Seed = 0
) -> pd.DataFrame:
    """Induction and previous-token scores: one row per head, columns layer, head, induction, previous_token.

    Each sequence of random tokens is shown twice in a row. Both scores are mean attention weights from a token's second
    occurrence: induction to the token after its first occurrence (prefix matching), previous_token to the position just
    before.

    Args:
        model: the model (default: the packaged one).
        n_rows: number of random sequences.
        length: tokens per sequence.
        seed: fixes the tokens.

    Raises:
        SitelensError: if `length` is below 2 or the repeated sequence exceeds the context, or if the model's bridge
            does not expose its attention.

    Source:
        Olsson et al. 2022.

    Example:
        >>> sl.heads.induction_scores(model, n_rows=2, length=8).columns.tolist()
        ['layer', 'head', 'induction', 'previous_token']
    """
    model = resolve_model(model)
    limit = model.context_length
    if length < 2 or (limit is not None and 2 * length + 1 > limit):
        most = "" if limit is None else f" and at most {(limit - 1) // 2}"
        raise SitelensError(f"length must be at least 2{most}, got {length}")
    tokenizer, rng = model.tokenizer, random.Random(f"sitelens/induction/{seed}")
    special = set(tokenizer.all_special_ids)
    words = [i for i in range(min(len(tokenizer), model.d_vocab)) if i not in special]
    once = torch.tensor([rng.choices(words, k=length) for _ in range(n_rows)])
    start, _ = added(tokenizer)
    tokens = torch.cat([torch.tensor(start).long().expand(n_rows, -1), once, once], dim=1)
    at = torch.arange(tokens.shape[1] - length, tokens.shape[1])
    found = torch.zeros(2, *model.shape[:2])

    def keep(pattern: Tensor, layer: int) -> None:
        weights = pattern.float().mean(0).cpu()
        found[0, layer] += weights[:, at, at - length + 1].mean(-1) * len(pattern) / n_rows
        found[1, layer] += weights[:, at, at - 1].mean(-1) * len(pattern) / n_rows

    for rows in tokens.split(max(1, MAX_TOKENS // tokens.shape[1])):
        _watch_patterns(rows, model, range(model.shape.layers), keep)
    return per_head(found[0], "induction").assign(previous_token=found[1].flatten().tolist())


def _with_roles(
    task: Task, drawn: Sequence[tuple[Sequence[Example], Example]], model: Model
) -> tuple[PromptBatch, list[list[str]]]:
    """Few-shot prompts, and the role of each of their tokens: that of the character at which the token ends."""
    tokenizer = model.tokenizer
    if not tokenizer.is_fast:
        raise SitelensError("roles need a tokenizer that tells where in the text a token stands (a fast one)")
    prompts = [few_shot_prompt(task, shown, query, tokenizer) for shown, query in drawn]
    batch = task_batch(task, prompts, model)
    roles = []
    for prompt, length, (shown, query) in zip(prompts, batch.lengths, drawn, strict=True):
        of_character = [role for role, text in prompt_parts(task, shown, query) for _ in text]
        places = spans(prompt.text, tokenizer, prompt.special_tokens)
        if len(places) != length:  # trailing white space was tokenized as if a word followed
            places = spans(prompt.text + "a", tokenizer, prompt.special_tokens)[:length]
        roles.append([FIRST, *(of_character[end - 1] if end else FIRST for _, end in places[1:])])
    return batch, roles


def _by_token(
    batch: PromptBatch, roles: list[str], heads: list[tuple[int, int]], model: Model
) -> pd.DataFrame:  # fmt: skip
    """Attention from the last token of one prompt, as a frame with one row per token."""
    weights, tokenizer = attention(batch, heads, model), model.tokenizer
    tokens = [tokenizer.decode([i]) for i in batch.tokens[0].tolist()]
    frame = pd.DataFrame({"position": range(len(roles)), "token": tokens, "role": roles})
    columns = {f"{layer}.{head}": row.tolist() for (layer, head), row in zip(heads, weights[0], strict=True)}
    frame = frame.assign(**columns)
    if _has_sinks(weights, model):
        rest = {name: 1 - sum(column) for name, column in columns.items()}
        frame = pd.concat([frame, pd.DataFrame([{"position": -1, "token": "", "role": SINK, **rest}])])
    return frame.reset_index(drop=True)


def _watch_patterns(
    tokens: Int[Tensor, "row pos"], model: Model, layers: Iterable[int], see: Callable[[Tensor, int], None]
) -> None:
    """Calls `see(pattern, layer)` with the attention pattern `[row head pos pos]` of each layer.

    Raises:
        SitelensError: if the bridge of this architecture does not expose the pattern, or exposes something else.
    """
    points = {layer: f"blocks.{layer}.attn.hook_pattern" for layer in layers}
    seen: set[int] = set()

    def look(pattern: Tensor, layer: int) -> None:
        most = float(pattern.sum(-1).max())
        if pattern.min() < 0 or most > 1 + _slack(pattern):
            raise SitelensError(f"{points[layer]} of {model.name} is no attention pattern: a row adds up to {most:.3f}")
        seen.add(layer)
        see(pattern, layer)

    shown = {layer: name for layer, name in points.items() if name in model.bridge.hook_dict}
    run_with_callbacks(tokens, model, {name: functools.partial(look, layer=layer) for layer, name in shown.items()})
    if missing := sorted(set(points) - seen):
        raise SitelensError(
            f"the TransformerLens bridge of {model.name} does not show the attention of layer"
            f"{'s' if len(missing) > 1 else ''} {', '.join(map(str, missing))}: {points[missing[0]]} never fires, so "
            "what its heads attend to cannot be told"
        )


def _slack(pattern: Tensor) -> float:
    """Tolerance for rounding in the sum of a row."""
    return 1e-3 if pattern.dtype in (torch.float32, torch.float64) else 2e-2


def _has_sinks(weights: Float[Tensor, "row head pos"], model: Model) -> bool:
    """Whether some attention falls on no token: the model has sink logits, or rows sum to less than one."""
    blocks: Any = model.bridge.blocks
    kept = any(hasattr(getattr(block.attn, "original_component", None), "sinks") for block in blocks)
    return kept or bool((1 - weights.sum(-1)).max() > _slack(torch.empty(0, dtype=model.dtype)))
