"""What heads write: direct logit attribution, with every norm's scale held at its value in the prompt."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import pandas as pd
import torch
from einops import repeat
from jaxtyping import Float
from torch import Tensor

from sitelens.checks.arguments import checked
from sitelens.checks.values import Count, CountOrZero, Seed
from sitelens.conditions.embedding import TaskEmbedding, embedding_prompts
from sitelens.engine.batches import PromptBatch, task_batch
from sitelens.engine.capture import same_length_chunks
from sitelens.engine.prompts import few_shot_prompts
from sitelens.errors import SitelensError, SitelensWarning
from sitelens.evaluation.labels import warn_of_shared_first_tokens
from sitelens.heads.direct import DirectPath
from sitelens.heads.inputs import task_or_texts, text_batch
from sitelens.models.heads import Head, checked_heads, per_head
from sitelens.models.loading import resolve_model
from sitelens.models.model import Model, ModelSource
from sitelens.tasks import Task


@checked
def head_attribution(
    task: Task | str | Sequence[str],
    model: ModelSource | None = None,
    *,
    embedding: TaskEmbedding | None = None,
    answer: str | Sequence[str] | None = None,
    n_items: Count = 20,
    n_shots: CountOrZero = 10,
    seed: Seed = 0,
) -> pd.DataFrame:
    """Direct logit attribution of every head to the answer: one row per head, columns layer, head, attribution.

    attribution (in logits) is what the head's output at the last prompt token adds to the logit of the answer's first
    token, relative to the mean logit over the vocabulary; later layers are ignored, and every norm's scale is held at
    its value in that prompt. It is a mean over prompts. In a model that caps its logits (Gemma 2) it refers to the
    logit before the cap.

    Args:
        task: the task, or one or several prompts of your own; `n_items`, `n_shots` and `seed` then have no effect.
        model: the model (default: the packaged one).
        embedding: a task embedding whose head outputs replace each prompt's own.
        answer: only with prompts of your own: one for all or one per prompt, as it continues the text (" cold"); by
            default the model's most likely next token.
        n_items: validation items to average over, the first of the split.
        n_shots: demonstrations per prompt.
        seed: fixes the demonstrations.

    Raises:
        SitelensError: for an unknown task, no validation items, an `answer` in addition to a task, an embedding of
            another model, or an architecture in which the heads' contributions do not add up to the logit (see
            `DirectPath.check`).

    Example:
        >>> frame = sl.heads.head_attribution(task, model, n_items=2, n_shots=1)
        >>> len(frame)  # one row per head
        8
    """
    task, model = task_or_texts(task), resolve_model(model)
    if isinstance(task, list):
        batch = text_batch(task, model, answer)
    elif answer is not None:
        raise SitelensError("a task's items have their own answers: answer is for prompts of your own")
    else:
        warn_of_shared_first_tokens([task], model)
        batch = _few_shot_batch(task, model, n_items, n_shots, seed)
    if embedding is not None:
        embedding.check_fits(model)
    total = torch.zeros(model.shape[:2], dtype=model.computing_dtype)
    for index in same_length_chunks(batch, model):
        part = batch.rows(index)
        path = DirectPath.of(part, model)
        path.check()
        z = None if embedding is None else repeat(embedding.mean_z, "layer head d -> row layer head d", row=len(part))
        tokens = part.answer if (part.answer >= 0).all() else path.unembedded.argmax(-1)
        total += path.attribution(tokens, z).sum(0).cpu()
    return per_head(total / len(batch), "attribution")


def _few_shot_batch(task: Task, model: Model, n_items: int, n_shots: int, seed: int) -> PromptBatch:
    items = task.nonempty("valid")[:n_items]
    prompts = few_shot_prompts(task, items, n_shots, model.tokenizer, seed, "valid", range(len(items)))
    return task_batch(task, prompts, model)


@checked
def promoted_tokens(
    embedding: TaskEmbedding,
    head: Head,
    task: Task | str | Sequence[str],
    model: ModelSource | None = None,
    *,
    n: Count = 10,
) -> pd.DataFrame:
    """The tokens that a head's part of the task embedding promotes and suppresses most: columns token, logit.

    logit is what the head adds directly (later layers ignored) to the token's logit, relative to the mean logit over
    the vocabulary. It is a mean over prompts, which determine the norms' scales.

    Args:
        embedding: the task embedding.
        head: (10, 6), "L10H6" or "10.6".
        task: the task of the embedding, whose prompts (at most 8) are used, or prompts of your own.
        model: the model (default: the packaged one).
        n: number of highest and of lowest tokens.

    Returns:
        The n highest, then the n lowest.

    Raises:
        SitelensError: if there is no such head, for an embedding of another model or, as `head_attribution`, an
            unsupported architecture.

    Example:
        >>> frame = sl.heads.promoted_tokens(embedding, "L1H3", task, model, n=2)
        >>> len(frame)  # the two highest and the two lowest
        4
    """
    task, model = task_or_texts(task), resolve_model(model)
    embedding.check_fits(model)
    layer, place = checked_heads([head], model)[0]
    tokenizer = model.tokenizer
    if isinstance(task, list):
        batch = text_batch(task, model)
    else:
        measured_on = embedding.origin.task_digest if embedding.origin is not None else None
        if measured_on not in (None, task.digest) or embedding.task != task.name:
            warnings.warn(f"the embedding is of the task {embedding.task!r} as it was then, the prompts are of "
                          f"{task.name!r} as it is now", SitelensWarning, stacklevel=2)  # fmt: skip
        prompts = embedding_prompts(task, tokenizer, min(8, embedding.n_prompts), embedding.n_shots, embedding.seed)
        batch = task_batch(task, prompts, model)
    rows = []
    for index in same_length_chunks(batch, model):
        path = DirectPath.of(batch.rows(index), model)
        path.check()
        rows.append(path.promoted_logits(layer, place, embedding.mean_z[layer, place]))
    logits = torch.cat(rows).mean(0)
    order = logits.argsort(descending=True).tolist()
    chosen = [*order[:n], *order[len(order) - n :]]
    return pd.DataFrame({"token": [tokenizer.decode([i]) for i in chosen], "logit": logits[chosen].tolist()})


def head_outputs(
    z: Float[Tensor, "layer head d_head"], model: Model, prompts: PromptBatch | None = None
) -> Float[Tensor, "layer head d_model"]:
    """What each head's z adds to the residual stream, without the output bias, on the CPU.

    In most models that is z @ W_O, times the residual multiplier if there is one (Granite). If a norm follows (Gemma 2
    and 3, OLMo 2, GLM-4), it is the mean over `prompts` (at most 8), with the norm's scale held at its value in each.

    Args:
        z: head outputs before the output projection.
        model: the model.
        prompts: prompts that determine the scales of norms; not needed for other models.

    Raises:
        SitelensError: if there is such a norm but no prompts are given or, as `head_attribution`, for an unsupported
            architecture.
    """
    passes_norm = any(f"blocks.{layer}.ln1_post.hook_in" in model.bridge.hook_dict for layer in range(len(z)))
    if passes_norm and prompts is None:
        raise SitelensError(
            "what a head of this model writes passes a norm whose scale depends on the prompt: give prompts"
        )
    chosen = prompts.rows(range(min(8, len(prompts)))) if passes_norm and prompts is not None else _any_prompt(model)
    total = torch.zeros(*z.shape[:2], model.d_model, dtype=model.computing_dtype)
    for index in same_length_chunks(chosen, model):
        path = DirectPath.of(chosen.rows(index), model)
        path.check()
        for row in range(len(index)):
            total += path.writes(z, row).cpu()
    return total / len(chosen)


def _any_prompt(model: Model) -> PromptBatch:
    """A prompt of two arbitrary tokens, for models in which the prompt makes no difference."""
    tokens = torch.tensor([[0, min(1, model.d_vocab - 1)]])
    return PromptBatch(tokens, torch.ones_like(tokens, dtype=torch.bool), torch.tensor([-1]), ((),), ("",), ((),))
