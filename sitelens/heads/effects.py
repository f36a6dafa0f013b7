"""Function-vector heads: the causal indirect effect of every head (Todd et al. 2024)."""

from __future__ import annotations

import functools
import random
from collections.abc import Sequence

import pandas as pd
import torch
from einops import rearrange

from sitelens.defaults import settings
from sitelens.embedding import TaskEmbedding
from sitelens.forward import HeadEdit, LastToken, check_finite
from sitelens.heads.common import per_head, valid_items
from sitelens.labels import warn_of_shared_first_tokens
from sitelens.memory import chunks, crossed, prefix_bytes, step_cost
from sitelens.models import Model, computing_dtype, context_length, head_shape, own_tokenizer, resolve_model
from sitelens.prefix import PrefixCache
from sitelens.progress import tracked
from sitelens.prompts import draw_demonstrations, few_shot_prompt, tokenize
from sitelens.tasks import Example, Task, load_task


def indirect_effects(
    task: Task | str,
    model: Model | str | None = None,
    *,
    embedding: TaskEmbedding,
    n_prompts: int = 25,
    n_shots: int = 10,
    seed: int = 0,
    memory_budget: int | str | None = None,
    progress: bool | None = None,
) -> pd.DataFrame:
    """Causal indirect effect of every head (Todd et al. 2024): columns layer, head, effect, error.

    Few-shot prompts of training items, whose answers are shuffled among the demonstrations, with validation items as
    queries; one head's z at the last token is replaced by its task embedding; effect is the mean gain of the
    probability of the answer's first token, error its standard error over prompts.

    Raises:
        SitelensError: as `embed_task`, for no validation items, or an embedding of another model.
    """
    task, model = load_task(task), resolve_model(model)
    embedding.check_fits(model)
    warn_of_shared_first_tokens([task], model)
    tokenizer, budget = own_tokenizer(model), settings.budget(memory_budget)
    queries, prompts = valid_items(task), []
    for i in range(n_prompts):
        query = queries[i % len(queries)]
        shown = shuffled_labels(
            draw_demonstrations(task, n_shots, query, seed, "effects", i), f"{task.name}/{seed}/{i}"
        )
        prompts.append(few_shot_prompt(task, shown, query, tokenizer))

    def where(prompt: int) -> str:
        return f"task {task.name!r}, prompt {prompt} with shuffled answers, query {prompts[prompt].text[-60:]!r}"

    batch = tokenize(prompts, tokenizer, context_length(model), f"task {task.name!r}")
    layers, heads, _ = head_shape(model)
    dtype, device = computing_dtype(model), model.cfg.device
    one_each = torch.eye(layers * heads, dtype=dtype, device=device)
    alphas = rearrange(one_each, "row (layer head) -> row layer head", layer=layers)
    alphas = torch.cat([torch.zeros_like(alphas[:1]), alphas])  # the first row changes nothing
    vectors = embedding.mean_z.to(device, dtype)
    chance = torch.zeros(n_prompts, len(alphas), dtype=torch.float64)
    share = budget // 3
    bar = tracked(range(chance.numel()), f"indirect effects {task.name}", progress=progress)
    with torch.no_grad(), LastToken(model) as last_token:
        for index in chunks(batch.lengths, functools.partial(prefix_bytes, model), share):
            part = batch.rows(index)
            prefix = PrefixCache.of(part, model, share)
            for items, some in crossed(part.lengths, len(alphas), step_cost(model, gradient=False), share):
                which = some * len(items)
                edit = HeadEdit.mix(alphas[which], vectors.expand(len(which), -1, -1, -1))
                logits = last_token(prefix.rows(torch.tensor(items), repeats=len(some)), edit)
                rows = [index[i] for i in items for _ in some]
                check_finite(logits, lambda row, rows=rows: where(rows[row]))
                answer = part.answer[items].repeat_interleave(len(some)).to(device)
                found = logits.to(dtype).softmax(-1).gather(1, answer[:, None])
                places = torch.tensor([index[i] for i in items])
                chance[places[:, None], torch.tensor(some)] = found.reshape(len(items), -1).double().cpu()
                for _ in which:
                    next(bar, None)
    next(bar, None)
    gains = chance[:, 1:] - chance[:, :1]
    error = gains.std(0) / n_prompts**0.5 if n_prompts > 1 else torch.full_like(gains[0], torch.nan)
    return per_head(rearrange(gains.mean(0), "(layer head) -> layer head", head=heads), "effect").assign(
        error=error.tolist()
    )


def shuffled_labels(demonstrations: Sequence[Example], key: str) -> list[Example]:
    """The demonstrations with their answers permuted: none keeps its own, where a few attempts find such an order."""
    rng = random.Random(f"sitelens/shuffled/{key}")
    order = list(range(len(demonstrations)))
    for _ in range(20):
        rng.shuffle(order)
        if all(shown.output != demonstrations[i].output for shown, i in zip(demonstrations, order, strict=True)):
            break
    return [Example(shown.input, demonstrations[i].output) for shown, i in zip(demonstrations, order, strict=True)]
