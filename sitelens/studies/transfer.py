"""Transfer between tasks: how well one task's heads, or embedding, serve another task (paper: inter-task patching)."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from scipy.cluster.hierarchy import fcluster, leaves_list, linkage
from scipy.spatial.distance import squareform
from torch import Tensor

from sitelens import figures
from sitelens.checks.arguments import checked
from sitelens.checks.schema import packed
from sitelens.checks.values import Count, CountOrZero, Seed, Share
from sitelens.conditions.base import Condition
from sitelens.conditions.embedding import TaskEmbedding, embedded
from sitelens.conditions.patching import PatchHeads
from sitelens.conditions.prompting import ZeroShot
from sitelens.conditions.selection import HeadSelection
from sitelens.errors import SitelensError, warned_once
from sitelens.evaluation.cached import score_conditions
from sitelens.evaluation.labels import warn_of_shared_first_tokens
from sitelens.evaluation.record import experiment_record
from sitelens.evaluation.result import Result
from sitelens.evaluation.tables import Table
from sitelens.figures.style import accuracy_label
from sitelens.methods.site.config import TrainConfig
from sitelens.methods.site.train import train_selections
from sitelens.methods.site.workload import total, workload
from sitelens.metrics import METRICS, checked_metrics
from sitelens.models.fingerprints import unchanged
from sitelens.models.loading import resolve_model
from sitelens.models.model import Model, model_name
from sitelens.models.provenance import Origin
from sitelens.progress import Job, portions
from sitelens.store.artifact import Artifact
from sitelens.store.kinds import Kind
from sitelens.tasks import Task, groups_of, load_tasks

if TYPE_CHECKING:
    import plotly.graph_objects as go

Swap = Literal["heads", "embedding", "both"]
SWAPPED: dict[Swap, str] = {"heads": "heads", "embedding": "embedding", "both": "heads and the embedding"}
SMALLEST_GAIN = 0.05  # of a task's own heads; below it a share of the gain means nothing


@dataclass(frozen=True, eq=False, repr=False)
class TransferMatrix(Result):
    """Accuracy of every target task with what was swapped in from every source task.

    Attributes:
        matrix: accuracy (shares), sources down, targets across.
        zero_shot: each target's accuracy without a patch. n: its test items.
        swap: what comes from the source: "heads" (alpha), "embedding", or "both". metric, model: as evaluated.
        groups: each task's kind, for figures. origin: the model and the prompts behind it, where they are known.
        record: how it was made.
    """

    kind: ClassVar[str] = str(Kind.TRANSFER)
    matrix: pd.DataFrame
    zero_shot: pd.Series
    n: pd.Series
    swap: Swap
    metric: str
    model: str
    groups: Mapping[str, str] = field(default_factory=dict)
    origin: Origin | None = None
    record: Mapping[str, Any] = field(default_factory=dict)

    @functools.cached_property
    def frame(self) -> pd.DataFrame:  # type: ignore[override]
        """One row per cell: source, target, accuracy, zero_shot, own, n."""
        rows = self.matrix.rename_axis("source").reset_index().melt("source", var_name="target", value_name="accuracy")
        facts = {"zero_shot": self.zero_shot, "own": self.own, "n": self.n}
        return rows.assign(**{name: rows["target"].map(values) for name, values in facts.items()})

    @property
    def own(self) -> pd.Series:
        """Each target's accuracy with its own heads and embedding (the diagonal)."""
        return pd.Series({name: self.matrix.loc[name, name] for name in self.matrix.columns}, dtype=float)

    def normalized(self) -> pd.DataFrame:
        """Each cell as a share of the target's own gain over zero-shot; NaN where that gain is under 5 points."""
        gain = self.own - self.zero_shot
        return self.matrix.sub(self.zero_shot, axis=1).div(gain.where(gain >= SMALLEST_GAIN), axis=1)

    def clustered(self) -> TransferMatrix:
        """Rows and columns in one order in which similar tasks stand together: the leaves of `tree()`."""
        names = [self.matrix.columns[i] for i in leaves_list(self.tree())]
        return replace(self, matrix=self.matrix.loc[names, names], zero_shot=self.zero_shot[names], n=self.n[names])

    def tree(self) -> np.ndarray:
        """A scipy linkage of the tasks: average linkage on 1 - the mean of both directions' normalized transfer.

        Transfer that is not known, because the target's own gain is under 5 points, counts as none.
        """
        share = self.normalized().fillna(0).clip(0, 1).to_numpy()
        distance = 1 - (share + share.T) / 2
        np.fill_diagonal(distance, 0)
        return linkage(squareform(distance), "average")

    @checked
    def clusters(self, share: Share = 0.5) -> list[list[str]]:
        """Tasks that share what was swapped: the branches of `tree()` cut where tasks keep this share of the gain.

        Each task is in one cluster, maybe alone; the largest come first, tasks and equals in the tree's order.

        Raises:
            SitelensError: for a share outside [0, 1].
        """
        if not 0 <= share <= 1:
            raise SitelensError(f"share must lie in [0, 1], got {share}")
        labels = fcluster(self.tree(), 1 - share, "distance")
        found: dict[int, list[str]] = {}
        for i in leaves_list(self.tree()):
            found.setdefault(int(labels[i]), []).append(str(self.matrix.columns[i]))
        return sorted(found.values(), key=len, reverse=True)

    def summary(self) -> pd.DataFrame:
        """One row per task: how well it is served by the others, and how well it serves them.

        Columns: task, n, zero_shot, own (accuracy with its own heads and embedding), as_target (share of its own gain
        that the other tasks' heads reach, mean over them), as_source (share of the other tasks' gains that its heads
        reach). Shares that are not known are left out of the means.
        """
        share = self.normalized()
        others = share.mask(np.eye(len(share), dtype=bool))
        facts = {"n": self.n, "zero_shot": self.zero_shot, "own": self.own, "as_target": others.mean(axis=0),
                 "as_source": others.mean(axis=1)}  # fmt: skip
        names = list(self.matrix.columns)
        return pd.DataFrame({"task": names, **{name: values[names].to_list() for name, values in facts.items()}})

    def tables(self) -> list[Table]:
        """Accuracy in per cent, sources down and targets across, zero-shot accuracy in the last row."""
        rows = pd.concat([self.matrix, self.zero_shot.rename("zero-shot").to_frame().T])
        cells = rows.map(lambda share: f"{100 * share:.0f}").rename_axis(f"{self.swap} of")
        metric, least, most = self.metric.replace("_", " ").capitalize(), int(self.n.min()), int(self.n.max())
        caption = (
            f"{metric} accuracy in per cent of each target task (columns) with the {SWAPPED[self.swap]} of each source "
            f"task (rows); model {self.model}."
        )
        return [Table(cells, caption, f"Test items per target: {least if least == most else f'{least} to {most}'}.")]

    def figure(self, title: str | None = None) -> go.Figure:
        """The heatmap, clustered."""
        return self.heatmap(title)

    def description(self) -> dict[str, Any]:
        return {"tasks": len(self.matrix), "swap": self.swap, "metric": self.metric, "model": self.model}

    @checked
    def heatmap(
        self,
        title: str | None = None,
        *,
        values: Literal["accuracy", "share"] = "accuracy",
        order: Literal["clustered", "given"] = "clustered",
    ) -> go.Figure:
        """Sources by targets, colors fixed to [0, 1], kinds of tasks at the side, the numbers in the hover.

        values: accuracy, or `normalized()`, in which targets that are hard even with their own heads show as well as
        easy ones (empty where it is not known). order: clustered, with the dendrogram above; or as given.
        """
        title = f"Transfer of {self.swap}: {self.model}" if title is None else title
        shown = self.clustered() if order == "clustered" else self
        flat = shown.matrix * 0
        hover = {
            "share of own gain": shown.normalized(),
            "zero-shot": flat + shown.zero_shot,
            "own heads": flat + shown.own,
        }
        known = [name for name in shown.matrix.columns if name in self.groups]
        axes = {"heads": "Source of the heads", "embedding": "Source of the embedding"}
        cells, label = shown.matrix, accuracy_label(self.metric)
        if values == "share":
            cells, label = hover.pop("share of own gain"), "share of the target's own gain"
            hover = {"accuracy": shown.matrix, **hover}
        return figures.transfer_heatmap(
            cells, title, label, groups=self.groups if known else None,
            tree=self.tree() if order == "clustered" else None, hover=hover,
            axes=(axes.get(self.swap, "Source of heads and embedding"), "Target task"),
        )  # fmt: skip

    def artifact(self) -> Artifact:
        saved = _Saved(
            torch.tensor(self.matrix.to_numpy(float)), torch.tensor(self.zero_shot.to_numpy(float)),
            torch.tensor(self.n.to_numpy(int)), tuple(self.matrix.columns), self.swap, self.metric, self.model,
            dict(self.groups), self.origin, dict(self.record) or None,
        )  # fmt: skip
        return Artifact(self.kind, {}, *packed(saved))

    @classmethod
    def from_artifact(cls, artifact: Artifact) -> TransferMatrix:
        saved = artifact.made(_Saved)
        names = list(saved.tasks)
        matrix = pd.DataFrame(saved.accuracy.numpy(), index=names, columns=names)
        facts = {name: getattr(saved, name) for name in ("swap", "metric", "model", "groups", "origin")}
        return TransferMatrix(
            matrix, pd.Series(saved.zero_shot.numpy(), names), pd.Series(saved.n.numpy(), names), **facts,
            record=saved.record or {},
        )  # fmt: skip


@dataclass(frozen=True, eq=False)
class _Saved:
    """A matrix as it is saved."""

    accuracy: Float[Tensor, "source target"]
    zero_shot: Float[Tensor, " target"]
    n: Int[Tensor, " target"]
    tasks: tuple[str, ...]
    swap: Swap
    metric: str
    model: str
    groups: dict[str, str]
    origin: Origin | None = None
    record: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        if tuple(self.accuracy.shape) != (len(self.tasks),) * 2 or len(set(self.tasks)) < len(self.tasks):
            raise SitelensError(
                f"accuracy {tuple(self.accuracy.shape)} is not that of {len(self.tasks)} different tasks"
            )
        for name in ("accuracy", "zero_shot"):
            if getattr(self, name).dtype != torch.float64:
                raise SitelensError(f"{name} must be float64, not {getattr(self, name).dtype}")
            if not bool(((getattr(self, name) >= 0) & (getattr(self, name) <= 1)).all()):
                raise SitelensError(f"{name} must lie between 0 and 1")
        if bool((self.n < 1).any()):
            raise SitelensError("n must be at least 1")


@checked
@warned_once()
def transfer_matrix(
    tasks: Iterable[Task | str],
    model: Model | str | None = None,
    *,
    swap: Swap = "heads",
    n_items: Count | None = 100,
    split: str = "test",
    metric: str = "first_token",
    n_prompts: Count = 50,
    n_shots: CountOrZero = 10,
    config: TrainConfig | None = None,
    seed: Seed = 0,
    embeddings: Mapping[str, TaskEmbedding] | None = None,
    selections: Mapping[str, HeadSelection] | None = None,
) -> TransferMatrix:
    """Every task's heads (or embedding, or both) on every task. Missing embeddings and selections are made first.

    "heads" keeps the target's embedding and takes the source's alpha (paper: inter-task patching), "embedding" the
    other way round. All sources of a target share its prefixes, and a finished target is kept in the cache. `seed`
    decides prompts and items, `config.seed` the training. `embeddings` and `selections` stand in for those that
    would be made, by task name.

    Raises:
        SitelensError: for fewer than two tasks, an unknown swap, an artifact of another model, and as the functions
            it calls.
    """
    if swap not in get_args(Swap):
        raise SitelensError(f"unknown swap {swap!r}; one of {', '.join(get_args(Swap))}")
    loaded, model, config = load_tasks(tasks), resolve_model(model), config or TrainConfig()
    checked_metrics(metric)
    if len(loaded) < 2:
        raise SitelensError(f"a transfer matrix needs at least two tasks, got {len(loaded)}")
    if not METRICS[metric].generates:
        warn_of_shared_first_tokens(loaded, model)
    work = workload(loaded, model, n_prompts=n_prompts, n_shots=n_shots, n_items=n_items, config=config)
    with unchanged(model), Job(f"transfer of {swap}", ["embed", "train", "evaluate"]) as job:
        job.plan({"embed": total(work, "embed"), "train": total(work, "train"),
                  "evaluate": total(work, "patch") * (1 + len(loaded) / 4)})  # fmt: skip
        with job.stage("embed"):
            settled = embedded(loaded, model, embeddings, n_prompts=n_prompts, n_shots=n_shots, seed=seed)
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
        options: dict[str, Any] = {"split": split, "n_items": n_items, "metrics": (metric,), "seed": seed}
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
        "sl.transfer_matrix", model, loaded, n_items, split, swap=swap, metric=metric, n_prompts=n_prompts,
        n_shots=n_shots, seed=seed, train=asdict(config),
    )  # fmt: skip
    origin = Origin.of(model, n_prompts=n_prompts, n_shots=n_shots, seed=seed)
    name = model_name(model)
    return TransferMatrix(
        matrix, pd.Series(zero_shot), pd.Series(n), swap, metric, name, groups_of(names), origin, record
    )
