"""Many-shot prompting: as many demonstrations as the context holds."""

from __future__ import annotations

from collections import Counter

from sitelens.checks.arguments import checked
from sitelens.checks.values import CountOrZero, Seed
from sitelens.conditions.prompting import FewShot
from sitelens.engine.prompts import few_shot_prompt, item_sizes
from sitelens.methods.items import MAX_TRAIN, fitting
from sitelens.models.loading import resolve_model
from sitelens.models.model import Model, context_length, own_tokenizer
from sitelens.tasks import Task, load_task

ROOM = 32  # tokens kept for the answer


@checked
def fit(
    task: Task | str, model: Model | str | None = None, *, limit: CountOrZero | None = None, seed: Seed = 0
) -> FewShot:
    """Few-shot prompting with as many training items (at most 200) as fit into the context with any query, or `limit`.

    The longest items and the longest query are counted, so that whichever are drawn fit. Items with the query's own
    input are never shown, so that as many are left out of the count. Nothing else of test items is looked at. Which 200
    of more items are shown is decided where the condition is evaluated: `compare` draws from the same 200 that every
    method is fitted to.

    Raises:
        SitelensError: for a task without training or validation items, or a limit below 0.
    """
    model, task = resolve_model(model), load_task(task)
    fitting(task)  # is it a task to fit anything to?
    tokenizer = own_tokenizer(model)
    queries = [few_shot_prompt(task, [], item, tokenizer).text for item in (*task.valid, *task.test)]
    sizes = sorted(item_sizes(task.train, task, tokenizer), reverse=True)
    left = (context_length(model) or 2**31) - max(map(len, tokenizer(queries)["input_ids"])) - ROOM
    alike = Counter(item.input for item in task.train)
    own = max(alike[item.input] for item in (*task.valid, *task.test))
    count, most = 0, min(MAX_TRAIN, len(sizes)) - max(1, own)
    for size in sizes[: max(0, most if limit is None else min(limit, most))]:
        left -= size
        if left < 0:
            break
        count += 1
    return FewShot(count)
