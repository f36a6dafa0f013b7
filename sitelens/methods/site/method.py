"""SITE (arXiv 2507.20906) as a method: task embeddings with trained soft head selections."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar

from sitelens.checks.arguments import checked
from sitelens.checks.values import Count, CountOrZero, Seed
from sitelens.conditions.base import Condition
from sitelens.conditions.embedding import TaskEmbedding, embed_task
from sitelens.conditions.patching import PatchHeads
from sitelens.errors import SitelensError
from sitelens.methods.base import Method
from sitelens.methods.site.config import TrainConfig, Training
from sitelens.methods.site.state import ALGORITHM
from sitelens.methods.site.train import train_selections
from sitelens.methods.site.workload import total, workload
from sitelens.models.loading import resolve_model
from sitelens.models.model import Model, ModelLike, ModelSource
from sitelens.progress import portion, portions
from sitelens.tasks import Task, load_task

TASKS_PER_BATCH = 16  # tasks trained together; with more, the time per task no longer falls


@checked
@dataclass(frozen=True, kw_only=True)
class SITE(Training, Method):
    """Soft head selection (SITE): alpha, one number per head, trained for the task's own embedding.

    It trains on all training items of a task; in `compare`, on the 200 that every method is fitted to.

    Attributes:
        n_prompts: few-shot prompts behind the task embedding (M).
        n_shots: demonstrations per prompt (N).
        steps, lr, batch_size, eval_every, n_valid, checkpoint, init, mixing: as in `TrainConfig`.

    Source:
        Park, Kim, Choi and Rhee, Soft Head Selection for Injecting ICL-Derived Task Embeddings, Findings of ACL 2026,
        arXiv 2507.20906.
    """

    name = "SITE"
    version = ALGORITHM
    max_train: ClassVar[int | None] = None
    n_prompts: Count = 50
    n_shots: CountOrZero = 10

    @checked
    def fit(self, task: Task | str, model: ModelSource | None = None, *, seed: Seed = 0) -> PatchHeads:
        """The task's embedding, injected with the trained selection.

        Args:
            task: the task.
            model: the model (default: the packaged one).
            seed: fixes the prompts of the embedding and the training.

        Raises:
            SitelensError: as `embed_task` and `train_selections`.
        """
        model, task = resolve_model(model), load_task(task)
        outcome = next(iter(self._fit_batch([task], model, seed)))
        if isinstance(outcome, SitelensError):
            raise outcome
        return outcome

    def fit_all(self, tasks: Sequence[Task], model: ModelLike, *, seed: int = 0) -> Iterator[Condition | SitelensError]:
        """Yields each task's fitted condition, or the error that prevented its fit, in the order of the tasks.

        Up to 16 tasks train in one batch, with the same results as training them separately.
        """
        tasks = list(tasks)
        for start in range(0, len(tasks), TASKS_PER_BATCH):
            batch = tasks[start : start + TASKS_PER_BATCH]
            with portion(start / len(tasks), (start + len(batch)) / len(tasks)):
                outcomes = self._fit_batch(batch, Model.of(model), seed)
            yield from outcomes

    def n_trained(self, condition: Condition) -> int:
        """Number of trained parameters: one alpha per head."""
        assert isinstance(condition, PatchHeads)
        return condition.selection.alpha.numel()

    def work(self, tasks: Sequence[Task], model: ModelLike) -> float:
        """Prompt tokens of the embeddings, plus the cost of the training steps in prompt tokens."""
        return total(self._workload(tasks, Model.of(model)), "embed", "train")

    def _workload(self, tasks: Sequence[Task], model: Model) -> dict[str, dict[str, float]]:
        prompts: Any = {"n_prompts": self.n_prompts, "n_shots": self.n_shots, "n_items": None}
        return workload(tasks, model, config=self._config(0), **prompts)

    def _config(self, seed: int) -> TrainConfig:
        return TrainConfig(**{field.name: getattr(self, field.name) for field in fields(Training)}, seed=seed)

    def _fit_batch(self, tasks: Sequence[Task], model: Model, seed: int) -> list[PatchHeads | SitelensError]:
        work = self._workload(tasks, model)
        embed, train = (total(work, part) for part in ("embed", "train"))
        outcomes: dict[str, PatchHeads | SitelensError] = {}
        embeddings: dict[str, TaskEmbedding] = {}
        with portion(0.0, embed / (embed + train)):
            for task, part in portions(tasks):
                try:
                    with part:
                        embeddings[task.name] = embed_task(
                            task, model, n_prompts=self.n_prompts, n_shots=self.n_shots, seed=seed
                        )
                except SitelensError as error:
                    outcomes[task.name] = error
        with portion(embed / (embed + train), 1.0):
            embedded = [task for task in tasks if task.name in embeddings]
            outcomes |= self._train(embedded, embeddings, model, self._config(seed))
        return [outcomes[task.name] for task in tasks]

    def _train(
        self, tasks: Sequence[Task], embeddings: dict[str, TaskEmbedding], model: Model, config: TrainConfig
    ) -> dict[str, PatchHeads | SitelensError]:
        """Trains all tasks in one batch; if that fails, one by one, so that each error belongs to its task."""
        if not tasks:
            return {}
        try:
            results = train_selections(tasks, model, embeddings=embeddings, seeds=(config.seed,), config=config)
        except SitelensError as error:
            if len(tasks) == 1:
                return {tasks[0].name: error}
            singles = [self._train([task], embeddings, model, config) for task in tasks]
            return {name: outcome for single in singles for name, outcome in single.items()}
        return {
            name: PatchHeads(result.selection, embeddings[name], self.mixing) for (name, _), result in results.items()
        }
