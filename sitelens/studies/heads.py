"""What the selected heads are: known kinds of heads, and whether a shared head does the same in both tasks."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Unpack

import numpy as np
import pandas as pd
from scipy.stats import hypergeom, mannwhitneyu, rankdata

from sitelens import figures
from sitelens.checks.arguments import checked
from sitelens.checks.values import Count, CountOrZero
from sitelens.errors import warned_once
from sitelens.heads import attention_roles, indirect_effects, induction_scores
from sitelens.methods.site.config import TrainConfig
from sitelens.models.loading import resolve_model
from sitelens.models.model import ModelSource
from sitelens.studies.common import Options, Sample, checked_counts, prepare
from sitelens.studies.registry import study
from sitelens.tasks import Task


@study(caption="Known kinds of heads among the selected.", figure=figures.head_overlap)
@checked
@warned_once()
def head_overlap(
    tasks: Iterable[Task | str],
    model: ModelSource | None = None,
    *,
    k: CountOrZero | None = None,
    n_prompts: Count = 25,
    n_shots: CountOrZero = 10,
    config: TrainConfig | None = None,
    **options: Unpack[Options],
) -> pd.DataFrame:
    """Overlap of the selected heads with induction, previous-token and function-vector heads (asked for by reviewers).

    One row per task and kind of head: kind, k, shared (how many of the kind's top k heads have alpha > 0.5), share
    (shared / k), expected (share by chance), p (one-sided, hypergeometric), auc (how well the kind's score separates
    selected heads from the others), spearman (of alpha and score). Induction and previous-token scores come from
    repeated random tokens, function-vector heads from the indirect effects on this task.

    Args:
        tasks: the tasks.
        model: the model (default: the packaged one).
        k: top heads per kind (default: a tenth of all heads).
        n_prompts: prompts for the indirect effects.
        n_shots: demonstrations per prompt.
        config: training of alpha (default: the paper's).
        options: only `seed` has an effect; see `Options`.

    Raises:
        SitelensError: for a k larger than the number of heads, and as `train_selections`.

    Example:
        >>> frame = sl.studies.head_overlap([task], model, k=2, config=config)
        >>> frame["kind"].tolist()
        ['induction', 'previous token', 'function vector']
    """
    model, sample = resolve_model(model), Sample(**options)
    layers, heads, _ = model.shape
    k = checked_counts((max(1, layers * heads // 10) if k is None else k,), model)[0]
    prepared = prepare(tasks, model, config, sample)
    known = induction_scores(model, seed=sample.seed)
    rows: list[dict[str, Any]] = []
    for item in prepared:
        effects = indirect_effects(
            item.task, model, embedding=item.embedding, n_prompts=n_prompts, n_shots=n_shots, seed=sample.seed,
        )  # fmt: skip
        alpha = item.selection.alpha.flatten().double().numpy()
        selected = alpha > 0.5
        kinds = {"induction": known["induction"], "previous token": known["previous_token"],
                 "function vector": effects["effect"]}  # fmt: skip
        for kind, scores in kinds.items():
            score = scores.to_numpy(float)
            spearman = float(np.corrcoef(rankdata(alpha), rankdata(score))[0, 1])
            top = np.argsort(-score, kind="stable")[:k]
            shared = int(selected[top].sum())
            split = 0 < selected.sum() < len(selected)
            auc = mannwhitneyu(score[selected], score[~selected]).statistic if split else float("nan")
            pairs = int(selected.sum()) * int((~selected).sum())
            rows.append({
                "task": item.task.name, "kind": kind, "k": k, "shared": shared, "share": shared / k if k else np.nan,
                "expected": selected.mean(), "p": float(hypergeom.sf(shared - 1, len(alpha), int(selected.sum()), k)),
                "auc": auc / pairs if split else float("nan"), "spearman": spearman,
            })  # fmt: skip
    return pd.DataFrame(rows)


@study(caption="Attention of shared heads.", figure=figures.shared_attention)
@checked
@warned_once()
def shared_attention(
    tasks: Iterable[Task | str],
    model: ModelSource | None = None,
    *,
    n_prompts: Count = 20,
    n_shots: CountOrZero = 10,
    config: TrainConfig | None = None,
    **options: Unpack[Options],
) -> pd.DataFrame:
    """Whether a head shared by two tasks attends to the same roles in both: one row per pair of tasks, head and role.

    Columns: task_a, task_b, layer, head, group (alpha > 0.5 in "both", "only a", "only b" or "neither"), role, share_a
    and share_b (of the last token's attention, on prompts of a and of b), distance (total variation distance of the two
    distributions over roles; the same in all rows of a head). If sharing a head means sharing its computation,
    distances are smaller in "both" than in the other groups.

    Args:
        tasks: the tasks.
        model: the model (default: the packaged one).
        n_prompts: prompts per task over which attention is averaged.
        n_shots: demonstrations per prompt.
        config: training of alpha (default: the paper's).
        options: only `seed` has an effect; see `Options`.

    Raises:
        SitelensError: for fewer than two tasks, and as `train_selections`.

    Example:
        >>> frame = sl.studies.shared_attention([task, "antonym"], model, n_prompts=2, n_shots=2, config=config)
        >>> sorted(set(frame["role"]))
        ['demonstration answer', 'demonstration input', 'first token', 'query', 'template']
    """
    model, sample = resolve_model(model), Sample(**options)
    prepared = prepare(tasks, model, config, sample, at_least=2)
    key = ["layer", "head", "role"]
    shares = {
        item.task.name: attention_roles(
            item.task, None, model, n_prompts=n_prompts, n_shots=n_shots, seed=sample.seed
        ).set_index(key)["share"]
        for item in prepared
    }
    frames = []
    for i, a in enumerate(prepared):
        for b in prepared[i + 1 :]:
            frame = pd.DataFrame({"share_a": shares[a.task.name], "share_b": shares[b.task.name]})
            difference = (frame["share_a"] - frame["share_b"]).abs() / 2
            frame["distance"] = difference.groupby(["layer", "head"]).transform("sum")
            frame = frame.reset_index()
            on_a, on_b = (
                item.selection.alpha.numpy()[frame["layer"], frame["head"]] > 0.5 for item in (a, b)
            )  # fmt: skip
            group = np.select([on_a & on_b, on_a, on_b], ["both", "only a", "only b"], "neither")
            frame.insert(2, "group", group)
            frame.insert(0, "task_b", b.task.name)
            frame.insert(0, "task_a", a.task.name)
            frames.append(frame)
    return pd.concat(frames, ignore_index=True)
