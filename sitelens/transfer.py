"""Transfer between tasks: how well one task's heads, or embedding, serve another task (paper: inter-task patching)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import pandas as pd
import torch
from scipy.cluster.hierarchy import leaves_list, linkage
from scipy.spatial.distance import squareform

from sitelens import figures
from sitelens.conditions import Condition, PatchHeads, ZeroShot
from sitelens.config import TrainConfig
from sitelens.defaults import SitelensError
from sitelens.embedding import embed_task
from sitelens.evaluation import evaluate
from sitelens.models import Model, model_name, resolve_model
from sitelens.store import Artifact
from sitelens.tasks import Task, load_tasks
from sitelens.training import train_selections

if TYPE_CHECKING:
    import plotly.graph_objects as go

Swap = Literal["heads", "embedding", "both"]
SMALLEST_GAIN = 0.05  # of a task's own heads; below it a share of the gain means nothing


@dataclass(frozen=True, eq=False)
class TransferMatrix:
    """Accuracy of every target task (columns) with what was swapped in from every source task (rows).

    frame: shares; zero_shot: each target's accuracy without a patch; n: its test items.
    swap: what comes from the source: "heads" (alpha), "embedding", or "both". metric, model: as evaluated.
    """

    frame: pd.DataFrame
    zero_shot: pd.Series
    n: pd.Series
    swap: Swap
    metric: str
    model: str

    @property
    def own(self) -> pd.Series:
        """Each target's accuracy with its own heads and embedding (the diagonal)."""
        return pd.Series({name: self.frame.loc[name, name] for name in self.frame.columns}, dtype=float)

    def normalized(self) -> pd.DataFrame:
        """Each cell as a share of the target's own gain over zero-shot; NaN where that gain is under 5 points."""
        gain = self.own - self.zero_shot
        return self.frame.sub(self.zero_shot, axis=1).div(gain.where(gain >= SMALLEST_GAIN), axis=1)

    def clustered(self) -> TransferMatrix:
        """Rows and columns in one order in which similar tasks stand together.

        Average linkage on 1 - the mean of both directions' normalised transfer (0 where it is not known).
        """
        share = self.normalized().fillna(0).clip(0, 1).to_numpy()
        distance = 1 - (share + share.T) / 2
        distance[range(len(distance)), range(len(distance))] = 0
        names = [self.frame.columns[i] for i in leaves_list(linkage(squareform(distance), "average"))]
        frame = self.frame.loc[names, names]
        return TransferMatrix(frame, self.zero_shot[names], self.n[names], self.swap, self.metric, self.model)

    def long(self) -> pd.DataFrame:
        """One row a cell: source, target, accuracy, zero_shot, own, n."""
        rows = self.frame.rename_axis("source").reset_index().melt("source", var_name="target", value_name="accuracy")
        facts = {"zero_shot": self.zero_shot, "own": self.own, "n": self.n}
        return rows.assign(**{name: rows["target"].map(values) for name, values in facts.items()})

    def heatmap(self, title: str | None = None) -> go.Figure:
        """Sources by targets, colours fixed to [0, 1], the numbers in the hover."""
        title = f"Transfer of {self.swap}, {self.model}" if title is None else title
        return figures.transfer_heatmap(self.frame, title, f"{self.metric.replace('_', ' ')} accuracy")

    def save(self, path: str | Path) -> Path:
        """Write to a safetensors file with its metadata."""
        tensors = {
            "accuracy": torch.tensor(self.frame.to_numpy(float)),
            "zero_shot": torch.tensor(self.zero_shot.to_numpy(float)),
            "n": torch.tensor(self.n.to_numpy()),
        }
        meta = {"tasks": list(self.frame.columns), "swap": self.swap, "metric": self.metric, "model": self.model}
        return Artifact("transfer", {}, tensors, meta).save(path)

    @staticmethod
    def load(path: str | Path) -> TransferMatrix:
        """Read a saved matrix.

        Raises:
            SitelensError: if there is no such file, or it is damaged or holds something else.
        """
        artifact = Artifact.load(path, "transfer")
        names = artifact.meta.pop("tasks")
        accuracy, zero_shot, n = (artifact.tensors[name].numpy() for name in ("accuracy", "zero_shot", "n"))
        frame = pd.DataFrame(accuracy, index=names, columns=names)
        return TransferMatrix(frame, pd.Series(zero_shot, names), pd.Series(n, names), **artifact.meta)


def transfer_matrix(
    tasks: Iterable[Task | str],
    model: Model | str | None = None,
    *,
    swap: Swap = "heads",
    n_items: int | None = 100,
    split: str = "test",
    metric: str = "first_token",
    n_prompts: int = 50,
    n_shots: int = 10,
    config: TrainConfig | None = None,
    seed: int = 0,
    memory_budget: int | str | None = None,
    progress: bool | None = None,
) -> TransferMatrix:
    """Every task's heads (or embedding, or both) on every task. Missing embeddings and selections are made first.

    "heads" keeps the target's embedding and takes the source's alpha (paper: inter-task patching), "embedding" the
    other way round. All sources of a target share its prefixes. `seed` decides prompts and items, `config.seed`
    the training.

    Raises:
        SitelensError: for fewer than two tasks, an unknown swap, and as the functions it calls.
    """
    if swap not in get_args(Swap):
        raise SitelensError(f"unknown swap {swap!r}; one of {', '.join(get_args(Swap))}")
    loaded, model, config = load_tasks(tasks), resolve_model(model), config or TrainConfig()
    if len(loaded) < 2:
        raise SitelensError(f"a transfer matrix needs at least two tasks, got {len(loaded)}")
    shared: dict[str, Any] = {"memory_budget": memory_budget, "progress": progress}
    vectors = {
        task.name: embed_task(task, model, n_prompts=n_prompts, n_shots=n_shots, seed=seed, **shared) for task in loaded
    }
    runs = train_selections(loaded, model, embeddings=vectors, seeds=(config.seed,), config=config, **shared)
    alphas = {task.name: runs[task.name, config.seed].selection for task in loaded}
    names = list(alphas)
    options: dict[str, Any] = {"split": split, "n_items": n_items, "metrics": (metric,), "seed": seed}
    columns: dict[str, pd.Series] = {}
    zero_shot: dict[str, float] = {}
    n: dict[str, int] = {}
    for target in loaded:
        conditions: dict[str, Condition] = {
            f"from {source}": PatchHeads(
                alphas[source if swap != "embedding" else target.name],
                vectors[source if swap != "heads" else target.name],
                config.mixing,
            )
            for source in names
        }
        scores = evaluate(target, conditions | {"zero-shot": ZeroShot()}, model, **options, **shared)
        means = scores.groupby("condition")["score"].mean()
        columns[target.name] = means[[f"from {source}" for source in names]].set_axis(names)
        zero_shot[target.name], n[target.name] = float(means["zero-shot"]), int(scores["item"].nunique())
    frame = pd.DataFrame(columns)
    return TransferMatrix(frame, pd.Series(zero_shot), pd.Series(n), swap, metric, model_name(model))
