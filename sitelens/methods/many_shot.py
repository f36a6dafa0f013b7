"""Many-shot prompting: as many demonstrations as the context holds."""

from __future__ import annotations

from sitelens.conditions import FewShot
from sitelens.methods.common import fitting
from sitelens.models import Model, context_length, own_tokenizer, resolve_model
from sitelens.prompts import few_shot_prompt, item_sizes
from sitelens.tasks import Task, load_task

ROOM = 32  # tokens kept for the answer


def fit(task: Task | str, model: Model | str | None = None, *, limit: int | None = None, seed: int = 0) -> FewShot:
    """Few-shot prompting with as many training items as fit into the context with the longest query, or `limit`.

    The longest items are counted, so that whichever are drawn fit.

    Raises:
        SitelensError: for a task without training items.
    """
    model, task = resolve_model(model), fitting(load_task(task))
    tokenizer = own_tokenizer(model)
    queries = [few_shot_prompt(task.template, [], item, tokenizer).text for item in (*task.valid, *task.test)]
    sizes = sorted(item_sizes(task.train, task.template, tokenizer), reverse=True)
    left = (context_length(model) or 2**31) - max(map(len, tokenizer(queries)["input_ids"])) - ROOM
    count = 0
    for size in sizes[: min(limit or len(sizes), len(sizes) - 1)]:
        left -= size
        if left < 0:
            break
        count += 1
    return FewShot(count)
