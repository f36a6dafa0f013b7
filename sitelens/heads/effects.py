"""Indirect effects of heads, which define function-vector heads (Todd et al. 2024)."""

from __future__ import annotations

import functools
import random
from collections.abc import Sequence

import pandas as pd
import torch
from einops import rearrange

from sitelens.checks.arguments import checked
from sitelens.checks.values import Count, CountOrZero, Seed
from sitelens.conditions.embedding import TaskEmbedding
from sitelens.engine.batches import PromptBatch, task_batch
from sitelens.engine.forward import HeadEdit, LastToken, check_finite
from sitelens.engine.memory import chunk_grid, chunks, prefix_bytes, step_cost
from sitelens.engine.prefix import PrefixCache
from sitelens.engine.prompts import draw_demonstrations, few_shot_prompt
from sitelens.errors import SitelensError
from sitelens.evaluation.labels import warn_of_shared_first_tokens
from sitelens.heads.inputs import task_or_texts, text_batch
from sitelens.models.heads import per_head
from sitelens.models.loading import resolve_model
from sitelens.models.model import Model, ModelSource
from sitelens.progress import progress
from sitelens.settings import settings
from sitelens.tasks import Example, Task


@checked
def indirect_effects(
    task: Task | str | Sequence[str],
    model: ModelSource | None = None,
    *,
    embedding: TaskEmbedding,
    answer: str | Sequence[str] | None = None,
    n_prompts: Count = 25,
    n_shots: CountOrZero = 10,
    seed: Seed = 0,
) -> pd.DataFrame:
    """Indirect effect of every head on the answer's probability: one row per head, columns layer, head, effect, error.

    The demonstrations of each few-shot prompt have shuffled answers. effect is the mean gain in the probability of the
    answer's first token when the head's z at the last token is replaced by the task embedding's; error is its standard
    error over prompts (NaN for one prompt).

    Args:
        task: the task (demonstrations from train, queries from valid), or one or several prompts of your own, which are
            run unchanged; `n_prompts`, `n_shots` and `seed` then have no effect.
        model: the model (default: the packaged one).
        embedding: the task embedding.
        answer: required with prompts of your own: one for all or one per prompt, as it continues the text (" cold").
        n_prompts: prompts to average over.
        n_shots: demonstrations per prompt.
        seed: fixes the demonstrations and the order of their answers.

    Raises:
        SitelensError: as `embed_task`, for no validation items, prompts of your own without answers, an `answer` in
            addition to a task, or an embedding of another model.

    Source:
        Todd et al. 2024, arXiv 2310.15213: the causal indirect effect.

    Example:
        >>> frame = sl.heads.indirect_effects(task, model, embedding=embedding, n_prompts=2, n_shots=1)
        >>> len(frame)  # one row per head
        8
    """
    task, model = task_or_texts(task), resolve_model(model)
    embedding.check_fits(model)
    budget = settings.budget()
    if isinstance(task, list):
        if answer is None:
            raise SitelensError("the effect on which answer? give answer=... beside prompts of your own")
        batch, name = text_batch(task, model, answer), "your prompts"
    elif answer is not None:
        raise SitelensError("a task's items have their own answers: answer is for prompts of your own")
    else:
        warn_of_shared_first_tokens([task], model)
        batch, name = _shuffled_batch(task, model, n_prompts, n_shots, seed), f"task {task.name!r}"

    def where(prompt: int) -> str:
        shuffled = "" if isinstance(task, list) else " with shuffled answers, ending in"
        return f"{name}, prompt {prompt}{shuffled} {batch.texts[prompt][-60:]!r}"

    layers, heads, _ = model.shape
    dtype, device = model.computing_dtype, model.device
    one_each = torch.eye(layers * heads, dtype=dtype, device=device)
    alphas = rearrange(one_each, "row (layer head) -> row layer head", layer=layers)
    alphas = torch.cat([torch.zeros_like(alphas[:1]), alphas])  # the first row patches no head
    vectors = embedding.mean_z.to(device, dtype)
    chance = torch.zeros(len(batch), len(alphas), dtype=torch.float64)
    share = budget // 3
    label = f"indirect effects, {name}"
    with torch.no_grad(), LastToken(model) as last_token, progress(chance.numel(), label) as bar:
        for index in chunks(batch.lengths, functools.partial(prefix_bytes, model), share):
            part = batch.rows(index)
            prefix = PrefixCache.of(part, model, share)
            for items, some in chunk_grid(part.lengths, len(alphas), step_cost(model, gradient=False), share):
                which = some * len(items)
                edit = HeadEdit.mix(alphas[which], vectors.expand(len(which), -1, -1, -1))
                logits = last_token(prefix.rows(torch.tensor(items), repeats=len(some)), edit)
                rows = [index[i] for i in items for _ in some]
                check_finite(logits, lambda row, rows=rows: where(rows[row]))
                tokens = part.answer[items].repeat_interleave(len(some)).to(device)
                found = logits.to(dtype).softmax(-1).gather(1, tokens[:, None])
                places = torch.tensor([index[i] for i in items])
                chance[places[:, None], torch.tensor(some)] = found.reshape(len(items), -1).double().cpu()
                bar.update(len(which))
    gains = chance[:, 1:] - chance[:, :1]
    error = gains.std(0) / len(batch) ** 0.5 if len(batch) > 1 else torch.full_like(gains[0], torch.nan)
    return per_head(rearrange(gains.mean(0), "(layer head) -> layer head", head=heads), "effect").assign(
        error=error.tolist()
    )


def _shuffled_batch(task: Task, model: Model, n_prompts: int, n_shots: int, seed: int) -> PromptBatch:
    tokenizer = model.tokenizer
    queries, prompts = task.nonempty("valid"), []
    for i in range(n_prompts):
        query = queries[i % len(queries)]
        shown = shuffled_labels(
            draw_demonstrations(task, n_shots, query, seed, "effects", i), f"{task.name}/{seed}/{i}"
        )
        prompts.append(few_shot_prompt(task, shown, query, tokenizer))
    return task_batch(task, prompts, model)


def shuffled_labels(demonstrations: Sequence[Example], key: str) -> list[Example]:
    """The demonstrations with permuted answers; none keeps its own, if up to 20 shuffles find such an order."""
    rng = random.Random(f"sitelens/shuffled/{key}")
    order = list(range(len(demonstrations)))
    for _ in range(20):
        rng.shuffle(order)
        if all(shown.output != demonstrations[i].output for shown, i in zip(demonstrations, order, strict=True)):
            break
    return [Example(shown.input, demonstrations[i].output) for shown, i in zip(demonstrations, order, strict=True)]
