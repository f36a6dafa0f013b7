"""What heads attend to at the last prompt token, and the attention that names them.

Induction and previous-token heads (Olsson et al. 2022) are scored on repeated random tokens.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Iterable, Sequence

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from sitelens.defaults import SitelensError
from sitelens.heads.common import all_heads, checked_heads, like_prompts, per_head, valid_items, watch
from sitelens.memory import MAX_TOKENS
from sitelens.models import Model, context_length, head_shape, own_tokenizer, resolve_model
from sitelens.prompts import PromptBatch, draw_demonstrations, few_shot_prompt, prompt_parts, tokenize
from sitelens.tasks import Example, Task, load_task
from sitelens.tokenizers import added, spans

FIRST = "first token"  # where a head looks that looks at nothing: a role of its own
ROLES = (FIRST, "demonstration input", "demonstration answer", "query", "template")


def attention(
    batch: PromptBatch, heads: Iterable[tuple[int, int]], model: Model | str | None = None
) -> Float[Tensor, "row head pos"]:
    """Each head's attention at the last prompt token over all positions (0 on padding), heads in the order given.

    Raises:
        SitelensError: if there is no such head.
    """
    model = resolve_model(model)
    chosen = checked_heads(heads, model)
    found = torch.zeros(len(batch), len(chosen), batch.tokens.shape[1])
    for index in like_prompts(batch, model):
        part = batch.rows(index)
        kept: dict[int, Tensor] = {}

        def keep(pattern: Tensor, layer: int, kept: dict[int, Tensor] = kept) -> None:
            kept[layer] = pattern[:, :, -1].float().cpu()

        layers = {layer for layer, _ in chosen}
        watch(part.tokens, model, {_pattern(layer): functools.partial(keep, layer=layer) for layer in layers})
        for place, (layer, head) in enumerate(chosen):
            found[index, place, -part.tokens.shape[1] :] = kept[layer][:, head]
    return found


def attention_example(
    task: Task | str, heads: Iterable[tuple[int, int]], model: Model | str | None = None, *, n_shots: int = 3,
    item: int = 0, seed: int = 0,
) -> pd.DataFrame:  # fmt: skip
    """One few-shot prompt, token by token: columns position, token, role, and one of attention for each head.

    The attention is that of the last token; the query is the validation item with this index.

    Raises:
        SitelensError: if there is no such head or item, and as `attention_roles`.
    """
    task, model = load_task(task), resolve_model(model)
    chosen = checked_heads(heads, model)
    if not 0 <= item < len(valid_items(task)):
        raise SitelensError(f"there is no valid item {item} of task {task.name!r}: items 0 to {len(task.valid) - 1}")
    demonstrations = draw_demonstrations(task, n_shots, task.valid[item], seed, "valid", item)
    batch, roles = _with_roles(task, [(demonstrations, task.valid[item])], model)
    weights = attention(batch, chosen, model)[0]
    tokenizer = own_tokenizer(model)
    frame = pd.DataFrame({
        "position": range(len(roles[0])), "token": [tokenizer.decode([i]) for i in batch.tokens[0].tolist()],
        "role": roles[0],
    })  # fmt: skip
    return frame.assign(**{
        f"{layer}.{head}": row.tolist() for (layer, head), row in zip(chosen, weights, strict=True)
    })  # fmt: skip


def attention_roles(
    task: Task | str, heads: Iterable[tuple[int, int]] | None = None, model: Model | str | None = None, *,
    n_prompts: int = 20, n_shots: int = 10, seed: int = 0,
) -> pd.DataFrame:  # fmt: skip
    """On what the last token's attention falls, by role: one row a head (default: all) and role, columns layer,
    head, role, share.

    Means over few-shot prompts of the task, drawn as those of `embed_task`. Roles: the prompt's first token, the
    demonstrations' inputs and answers, the query, and the template's own words.

    Raises:
        SitelensError: as `embed_task`, if there is no such head, for a chat template, or a tokenizer that cannot tell
            where in a text its tokens stand.
    """
    task, model = load_task(task), resolve_model(model)
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
    return pd.DataFrame(rows, columns=["layer", "head", "role", "share"])


def induction_scores(
    model: Model | str | None = None, *, n_rows: int = 8, length: int = 40, seed: int = 0
) -> pd.DataFrame:
    """Induction and previous-token scores: one row a head, columns layer, head, induction, previous_token.

    Random tokens are shown twice in a row. induction: the mean attention from a token's second occurrence to the
    token behind its first (prefix matching, Olsson et al. 2022); previous_token: that to the position before.

    Raises:
        SitelensError: if twice `length`, and a token before, is longer than the context.
    """
    model = resolve_model(model)
    limit = context_length(model)
    if length < 2 or (limit is not None and 2 * length + 1 > limit):
        most = "" if limit is None else f" and at most {(limit - 1) // 2}"
        raise SitelensError(f"length must be at least 2{most}, got {length}")
    tokenizer, rng = own_tokenizer(model), random.Random(f"sitelens/induction/{seed}")
    special = set(tokenizer.all_special_ids)
    words = [i for i in range(min(len(tokenizer), model.cfg.d_vocab)) if i not in special]
    once = torch.tensor([rng.choices(words, k=length) for _ in range(n_rows)])
    start, _ = added(tokenizer)
    tokens = torch.cat([torch.tensor(start).long().expand(n_rows, -1), once, once], dim=1)
    at = torch.arange(tokens.shape[1] - length, tokens.shape[1])
    found = torch.zeros(2, *head_shape(model)[:2])

    def keep(pattern: Tensor, layer: int) -> None:
        weights = pattern.float().mean(0).cpu()
        found[0, layer] += weights[:, at, at - length + 1].mean(-1) * len(pattern) / n_rows
        found[1, layer] += weights[:, at, at - 1].mean(-1) * len(pattern) / n_rows

    for rows in tokens.split(max(1, MAX_TOKENS // tokens.shape[1])):
        layers = range(model.cfg.n_layers)
        watch(rows, model, {_pattern(layer): functools.partial(keep, layer=layer) for layer in layers})
    return per_head(found[0], "induction").assign(previous_token=found[1].flatten().tolist())


def _with_roles(
    task: Task, drawn: Sequence[tuple[Sequence[Example], Example]], model: Model
) -> tuple[PromptBatch, list[list[str]]]:
    """Few-shot prompts, and the role of each of their tokens: that of the text where the token ends."""
    tokenizer = own_tokenizer(model)
    if not tokenizer.is_fast:
        raise SitelensError("roles need a tokenizer that tells where in the text a token stands (a fast one)")
    prompts = [few_shot_prompt(task, shown, query, tokenizer) for shown, query in drawn]
    batch = tokenize(prompts, tokenizer, context_length(model), f"task {task.name!r}")
    roles = []
    for prompt, length, (shown, query) in zip(prompts, batch.lengths, drawn, strict=True):
        of_character = [role for role, text in prompt_parts(task, shown, query) for _ in text]
        places = spans(prompt.text, tokenizer, prompt.special_tokens)
        if len(places) != length:  # white space at the end is written as before a word
            places = spans(prompt.text + "a", tokenizer, prompt.special_tokens)[:length]
        roles.append([FIRST, *(of_character[end - 1] if end else FIRST for _, end in places[1:])])
    return batch, roles


def _pattern(layer: int) -> str:
    return f"blocks.{layer}.attn.hook_pattern"
