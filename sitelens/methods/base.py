"""Base class of methods: a method adapts a model to a task; its fields are its hyperparameters and its cache key."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, fields
from typing import Any, ClassVar

import torch

from sitelens.checks.arguments import arguments_of
from sitelens.checks.schema import check_names, unpacked
from sitelens.checks.values import converted
from sitelens.conditions import embedding
from sitelens.conditions.base import Condition
from sitelens.engine.keys import ResultStore
from sitelens.engine.network import metered
from sitelens.errors import SitelensError, SitelensWarning
from sitelens.evaluation import cached as scoring
from sitelens.methods import registry
from sitelens.methods.items import MAX_TRAIN, cap_training_items
from sitelens.models.model import Bridge, Model, ModelLike
from sitelens.progress import portions
from sitelens.store.artifact import Artifact
from sitelens.store.code import code_digest
from sitelens.store.digests import canonical_json
from sitelens.store.folder import Contents, empty_cache
from sitelens.store.kinds import Kind
from sitelens.tasks import Task

FIT_TOKENS = 50_000.0  # default estimate of the cost of one fit in prompt tokens, for progress bars


@dataclass(frozen=True, kw_only=True)
class Method(ABC):
    """A way of adapting a model to a task: a frozen dataclass whose fields are its hyperparameters.

        @dataclass(frozen=True, kw_only=True)
        class Mine(sl.Method):
            width: int = 3

            def fit(self, task, model, *, seed=0):
                return sl.PatchHeads(...)

        sl.compare(tasks, [sl.methods.SITE(), Mine(width=5)])

    Fields are checked against their annotations at construction. Fits are cached on disk, keyed by the class, its
    `version`, its fields and, for a class outside sitelens, the code that it runs.

    Attributes:
        name: name in tables (default: the name of the class).
        key: name in the registry, set by it: `name` for methods of sitelens, "MODULE:CLASS" for others.
        version: part of the cache key; raise it whenever the numbers of a fit change.
        max_train: None to use all training items of a task; otherwise it is capped at the 200 that methods share.
    """

    name: ClassVar[str] = "Method"
    key: ClassVar[str] = ""
    version: ClassVar[int] = 1
    max_train: ClassVar[int | None] = MAX_TRAIN

    def __init_subclass__(cls, **options: Any) -> None:
        """Registers the class, so that its name can be used in place of an instance."""
        super().__init_subclass__(**options)
        if "name" not in vars(cls):
            cls.name = cls.__name__
        cls.key = registry.register(cls)

    def __post_init__(self) -> None:
        hints = arguments_of(type(self)).hints
        for field in fields(self):
            value = converted(f"{self.name}.{field.name}", getattr(self, field.name), hints.get(field.name, Any))
            object.__setattr__(self, field.name, value)

    @abstractmethod
    def fit(self, task: Task, model: Bridge, *, seed: int = 0) -> Condition:
        """The condition that adapts a model to a task.

        Args:
            task: the task to fit to.
            model: the model's TransformerLens bridge.
            seed: fixes every random choice of the fit.

        Raises:
            SitelensError: if the method cannot be fitted to this task.
        """

    def fit_all(self, tasks: Sequence[Task], model: ModelLike, *, seed: int = 0) -> Iterator[Condition | SitelensError]:
        """Yields each task's condition, or the error that prevented its fit, in the order of the tasks.

        Fits that are in the cache are read from it.
        """
        for task, part in portions(tasks):
            outcome: Condition | SitelensError
            with part:
                try:
                    outcome = self.measured_fit(task, Model.of(model), seed=seed).condition
                except SitelensError as error:
                    outcome = error
            yield outcome

    def n_trained(self, condition: Condition) -> int:
        """Number of parameters that were trained for a condition of this method."""
        return 0

    def work(self, tasks: Sequence[Task], model: ModelLike) -> float:
        """Estimated cost of fitting all tasks in prompt tokens, for progress bars."""
        return FIT_TOKENS * len(tasks)

    @property
    def label(self) -> str:
        """Name of this method in tables."""
        return self.name

    @property
    def full_label(self) -> str:
        """The label, followed by the fields that differ from their defaults."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        changed = [f"{name}={values[name]!r}" for name, usual in _defaults(self).items() if values[name] != usual]
        return f"{self.label}({', '.join(changed)})" if changed else self.label

    @classmethod
    def accepts(cls, name: str) -> bool:
        """Whether `name`, as in `sl.compare(tasks, ["LTV"])`, refers to a method of this class."""
        return name == cls.name

    @classmethod
    def from_name(cls, name: str, **values: Any) -> Method:
        """The method that `name` refers to; fields that are not in `values` keep their defaults."""
        return cls(**values)

    def capped(self, task: Task) -> Task:
        """The task, restricted to the training items that this method may use.

        Raises:
            SitelensError: if the training items are capped and there are no training or no validation items.
        """
        return task if self.max_train is None else cap_training_items(task)

    def record(self) -> dict[str, Any]:
        """Registry key and fields for an experiment's record; values that are not JSON are converted to text."""
        return {"method": self.key, **{name: str(value) if not _is_plain(value) else value
                                       for name, value in asdict(self).items()}}  # fmt: skip

    def spec(self, task: Task, key: Mapping[str, str], seed: int) -> dict[str, Any] | None:
        """Everything that determines a fit, as plain JSON (its cache key); None if the fit cannot be cached.

        A fit cannot be cached if a field is not JSON, or if the code of a class outside sitelens cannot be hashed. The
        algorithm versions of embedding and evaluation are included, because fits depend on both.

        Args:
            task: the task to fit to.
            key: the model's part of the cache key.
            seed: the seed of the fit.
        """
        spec: dict[str, Any] = {
            "algorithm": [self.version, embedding.ALGORITHM, scoring.ALGORITHM], "method": self.key,
            "fields": asdict(self), "task": task.name, "items": task.digest,
            **key, "seed": seed,
        }  # fmt: skip
        if not registry.is_own(type(self)):
            if (code := code_digest([type(self)])) is None:
                return None
            spec["code"] = code
        try:
            canonical_json(spec)
        except (TypeError, ValueError):
            return None
        return spec

    def measured_fit(self, task: Task, model: Model, *, seed: int = 0) -> Fitted:
        """The fitted condition and the cost of fitting it, cached on disk.

        The fit runs with an empty cache, so its cost does not depend on what was cached before.

        Raises:
            SitelensError: as `fit`.
        """
        store = ResultStore(model, [task])
        spec = self.spec(task, store.key, seed)
        if spec is None:
            return self._measured(task, model, seed)

        def make() -> Contents:
            fitted = self._measured(task, model, seed)
            tensors, meta = fitted.condition.state()
            try:
                canonical_json(meta)
            except (TypeError, ValueError) as error:
                raise _NotSavedError(fitted, error) from error
            return tensors, {"state": meta, "cost": {name: getattr(fitted, name) for name in vars(_NO_COST)}}

        try:
            return store.cached(Kind.METHOD, spec, make, _fitted)
        except _NotSavedError as error:
            warnings.warn(
                f"{self.label}: a {type(error.fitted.condition).__name__} cannot be saved ({error}), so that each call "
                "fits it again; its fields must be tensors or plain JSON, or it must define state",
                SitelensWarning,
                stacklevel=2,
            )
            return error.fitted

    def _measured(self, task: Task, model: Model, seed: int) -> Fitted:
        with empty_cache(), metered() as spent, torch.inference_mode(False):
            condition = self.fit(task, model.bridge, seed=seed)
        if not isinstance(condition, Condition):
            raise SitelensError(f"{self.label}: fit must return a condition, not {type(condition).__name__}")
        return Fitted(condition, self.n_trained(condition), spent.forward, spent.backward, spent.seconds)


@dataclass(frozen=True, eq=False)
class Fitted:
    """A method's condition for a task and the cost of fitting it.

    Attributes:
        condition: the condition to evaluate.
        trained: number of trained parameters.
        forward_tokens, backward_tokens: tokens that passed through the model forward and backward, including padding
            and selection on valid.
        fit_seconds: wall-clock seconds on this machine.
    """

    condition: Condition
    trained: int
    forward_tokens: int
    backward_tokens: int
    fit_seconds: float


@dataclass(frozen=True)
class _Cost:
    """The cost of a fit, as stored in the cache."""

    trained: int
    forward_tokens: int
    backward_tokens: int
    fit_seconds: float

    def __post_init__(self) -> None:
        if any(value < 0 for value in vars(self).values()):
            raise SitelensError("costs are not negative")


_NO_COST = _Cost(0, 0, 0, 0.0)


class _NotSavedError(Exception):
    """Raised when the condition of a fit cannot be saved; carries the fit."""

    def __init__(self, fitted: Fitted, reason: Exception) -> None:
        super().__init__(str(reason))
        self.fitted = fitted


def _fitted(artifact: Artifact) -> Fitted:
    """The fit that an artifact holds.

    Raises:
        SitelensError: if the artifact holds anything else.
    """
    check_names(artifact.meta, ("state", "cost"), artifact.where)
    condition = Condition.from_saved(artifact.tensors, artifact.meta.get("state"), artifact.where)
    cost = unpacked(_Cost, artifact.meta.get("cost"), {}, f"{artifact.where}: cost")
    return Fitted(condition, **vars(cost))


def _is_plain(value: Any) -> bool:
    try:
        canonical_json(value)
    except (TypeError, ValueError):
        return False
    return True


def _defaults(method: Method) -> dict[str, Any]:
    """Default value of each field; MISSING for a field that has none."""
    makers = {field.name: (field.default, field.default_factory) for field in fields(method)}
    return {name: usual if make is MISSING else make() for name, (usual, make) in makers.items()}
