"""Transfer between tasks: how well one task's heads or embedding serve another (paper: inter-task patching)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Any, get_args

import pandas as pd

from sitelens.checks.arguments import checked
from sitelens.checks.values import Count, CountOrZero, Seed
from sitelens.conditions.base import Condition
from sitelens.conditions.embedding import TaskEmbedding, embed_tasks
from sitelens.conditions.patching import PatchHeads
from sitelens.conditions.prompting import ZeroShot
from sitelens.conditions.selection import HeadSelection
from sitelens.errors import SitelensError, warned_once
from sitelens.evaluation.cached import score_conditions
from sitelens.evaluation.labels import warn_of_shared_first_tokens
from sitelens.evaluation.record import experiment_record
from sitelens.methods.site.config import TrainConfig
from sitelens.methods.site.train import train_selections
from sitelens.methods.site.workload import total, workload
from sitelens.metrics import Metric, checked_metrics
from sitelens.models.loading import resolve_model
from sitelens.models.model import ModelSource
from sitelens.models.provenance import Origin
from sitelens.progress import Job, portions
from sitelens.studies.registry import SIXTEEN, study
from sitelens.studies.transfer_result import Swap, TransferMatrix
from sitelens.tasks import Task, groups_of, load_tasks


@study("transfer", caption="Heads of every task on every task.", tasks=SIXTEEN, most_items=50)
@checked
@warned_once()
def transfer_matrix(
    tasks: Iterable[Task | str],
    model: ModelSource | None = None,
    *,
    swap: Swap = "heads",
    n_items: Count | None = 100,
    split: str = "test",
    metric: str | Metric = "first_token",
    n_prompts: Count = 50,
    n_shots: CountOrZero = 10,
    config: TrainConfig | None = None,
    seed: Seed = 0,
    embeddings: Mapping[str, TaskEmbedding] | None = None,
    selections: Mapping[str, HeadSelection] | None = None,
) -> TransferMatrix:
    """Accuracy of every task with the heads (or embedding, or both) of every other task.

    Every source is evaluated on every target. All sources of a target share its cached prefixes, and each finished
    target is stored in the cache.

    Args:
        tasks: the tasks.
        model: the model (default: the packaged one).
        swap: what comes from the source: "heads" keeps the target's embedding and uses the source's alpha (paper:
            inter-task patching), "embedding" does the reverse, "both" uses both.
        n_items: test items per target (None for all).
        split: "test" or "valid".
        metric: name of a metric, or a `Metric`.
        n_prompts: prompts per embedding.
        n_shots: demonstrations per prompt.
        config: training of alpha, with its seed (default: the paper's).
        seed: fixes prompts and items.
        embeddings: embeddings by task name; missing ones are computed.
        selections: selections by task name; missing ones are trained.

    Raises:
        SitelensError: for fewer than two tasks, an unknown swap, an embedding or selection of another model, and as the
            functions it calls.

    Example:
        >>> grid = sl.transfer_matrix([task, "antonym"], model, n_prompts=2, n_shots=2, config=config, n_items=4)
        >>> grid.matrix.shape
        (2, 2)
    """
    if swap not in get_args(Swap):
        raise SitelensError(f"unknown swap {swap!r}; one of {', '.join(get_args(Swap))}")
    loaded, model, config = load_tasks(tasks), resolve_model(model), config or TrainConfig()
    (scored,) = checked_metrics(metric)
    if len(loaded) < 2:
        raise SitelensError(f"a transfer matrix needs at least two tasks, got {len(loaded)}")
    if not scored.generates:
        warn_of_shared_first_tokens(loaded, model)
    work = workload(loaded, model, n_prompts=n_prompts, n_shots=n_shots, n_items=n_items, config=config)
    with model.unchanged(), Job(f"transfer of {swap}", ["embed", "train", "evaluate"]) as job:
        job.plan({"embed": total(work, "embed"), "train": total(work, "train"),
                  "evaluate": total(work, "patch") * (1 + len(loaded) / 4)})  # fmt: skip
        with job.stage("embed"):
            settled = embed_tasks(loaded, model, embeddings, n_prompts=n_prompts, n_shots=n_shots, seed=seed)
        alphas = dict(selections or {})
        missing = [task for task in loaded if task.name not in alphas]
        with job.stage("train"):
            if missing:
                seeds = (config.seed,)
                runs = train_selections(missing, model, embeddings=settled, seeds=seeds, config=config)
                alphas |= {task.name: runs[task.name, config.seed].selection for task in missing}
        names = [task.name for task in loaded]
        for name in names:
            alphas[name].check_fits(model)
        options: dict[str, Any] = {"split": split, "n_items": n_items, "metrics": (scored,), "seed": seed}
        columns: dict[str, pd.Series] = {}
        zero_shot: dict[str, float] = {}
        n: dict[str, int] = {}
        with job.stage("evaluate"):
            for target, part in portions(loaded):
                with part:
                    conditions: dict[str, Condition] = {
                        f"from {source}": PatchHeads(
                            alphas[source if swap != "embedding" else target.name],
                            settled[source if swap != "heads" else target.name],
                            config.mixing,
                        )
                        for source in names
                    }
                    scores = score_conditions(target, conditions | {"zero-shot": ZeroShot()}, model, **options)
                    means = scores.groupby("condition")["score"].mean()
                    columns[target.name] = means[[f"from {source}" for source in names]].set_axis(names)
                    zero_shot[target.name], n[target.name] = float(means["zero-shot"]), int(scores["item"].nunique())
    matrix = pd.DataFrame(columns)
    record = experiment_record(
        "sl.transfer_matrix", model, loaded, n_items, split, swap=swap, metric=scored.name, n_prompts=n_prompts,
        n_shots=n_shots, seed=seed, train=asdict(config),
    )  # fmt: skip
    origin = Origin.of(model, n_prompts=n_prompts, n_shots=n_shots, seed=seed)
    name = model.name
    return TransferMatrix(
        matrix, pd.Series(zero_shot), pd.Series(n), swap, scored.name, name, groups_of(names), origin, record
    )
