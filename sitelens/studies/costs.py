"""The cost of SITE compared with prompting, in seconds and tokens, as the number of prompts grows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Unpack

import pandas as pd

from sitelens import figures
from sitelens.checks.arguments import checked
from sitelens.checks.values import Count, CountOrZero
from sitelens.conditions.base import Condition
from sitelens.conditions.embedding import embed_task
from sitelens.conditions.patching import PatchHeads
from sitelens.conditions.prompting import FewShot, ZeroShot
from sitelens.engine.network import metered
from sitelens.errors import SitelensError, warned_once
from sitelens.evaluation.evaluate import evaluate
from sitelens.methods.site.config import TrainConfig
from sitelens.methods.site.train import train_selection
from sitelens.models.loading import resolve_model
from sitelens.models.model import ModelSource
from sitelens.store.folder import empty_cache
from sitelens.studies.common import Options, Sample
from sitelens.studies.registry import TWO, study
from sitelens.tasks import Task, load_task


@study(caption="Seconds over the number of prompts.", figure=figures.costs, tasks=TWO[:1])
@checked
@warned_once()
def costs(
    task: Task | str,
    model: ModelSource | None = None,
    *,
    counts: Sequence[Count] = (1, 10, 30, 100, 300),
    n_shots: CountOrZero = 10,
    n_prompts: Count = 50,
    config: TrainConfig | None = None,
    **options: Unpack[Options],
) -> pd.DataFrame:
    """Seconds and tokens of zero-shot prompting, N-shot prompting and SITE: one row per method and number of prompts.

    Columns: method ("zero-shot", "N-shot", "SITE" including embedding and training, "SITE, prepared" without them),
    prompts, seconds, tokens (passed forward through the model). Nothing is read from the cache. Times are single
    measurements on this machine.

    Args:
        task: the task; its items are repeated if there are fewer than a count.
        model: the model (default: the packaged one).
        counts: numbers of prompts to answer.
        n_shots: demonstrations in prompts of the embedding and in N-shot prompts.
        n_prompts: prompts of the embedding.
        config: training of alpha (default: the paper's).
        options: split and seed; see `Options`.

    Raises:
        SitelensError: for a count below 1, a split without items, and as `train_selection`.

    Example:
        >>> frame = sl.studies.costs("antonym", model, counts=[1, 4], config=config)
        >>> sorted(set(frame["method"]))
        ['10-shot', 'SITE', 'SITE, prepared', 'zero-shot']
    """
    if not counts or min(counts) < 1:
        raise SitelensError(f"counts must be at least 1, got {list(counts)}")
    task, model, sample = load_task(task), resolve_model(model), Sample(**options)
    items = task.nonempty(sample.split)
    with empty_cache():
        with metered() as prepared:
            vector = embed_task(task, model, n_prompts=n_prompts, n_shots=n_shots, seed=sample.seed)
            result = train_selection(task, model, embedding=vector, config=config)
        conditions: dict[str, Condition] = {
            "zero-shot": ZeroShot(), f"{n_shots}-shot": FewShot(n_shots),
            "SITE, prepared": PatchHeads(result.selection, vector, result.config.mixing),
        }  # fmt: skip
        rows: list[dict[str, Any]] = []
        for count in counts:
            repeated = replace(task, test=tuple(items[i % len(items)] for i in range(count)))
            for name, condition in conditions.items():
                with metered() as spent:
                    evaluate(repeated, {name: condition}, model, seed=sample.seed)
                rows.append({"method": name, "prompts": count, "seconds": spent.seconds, "tokens": spent.forward})
            injected = rows[-1]
            rows.append({"method": "SITE", "prompts": count, "seconds": prepared.seconds + injected["seconds"],
                         "tokens": prepared.forward + injected["tokens"]})  # fmt: skip
    return pd.DataFrame(rows)
