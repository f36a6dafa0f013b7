"""Method: a way of adapting a model to a task, as a value whose fields are its hyperparameters and its cache key."""

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

FIT_TOKENS = 50_000.0  # a guess of what a fit costs, for progress bars: prompt tokens that take as long


@dataclass(frozen=True, kw_only=True)
class Method(ABC):
    """A way of adapting a model to a task. A subclass is a frozen dataclass; its fields are its hyperparameters.

        @dataclass(frozen=True, kw_only=True)
        class Mine(sl.Method):
            width: int = 3

            def fit(self, task, model, *, seed=0):
                return sl.PatchHeads(...)

        sl.compare(tasks, [sl.methods.SITE(), Mine(width=5)])

    Fields are checked against their annotations when a method is made. Fits are cached on disk by the class, its
    `version`, its fields and, for a class of your own, what its code computes.

    name: what tables call it (default: the name of the class).
    version: part of the cache key, to be raised when the numbers of its fits change.
    max_train: training items that it may see at most; None for all of them.
    """

    name: ClassVar[str] = "Method"
    key: ClassVar[str] = ""
    version: ClassVar[int] = 1
    max_train: ClassVar[int | None] = MAX_TRAIN

    def __init_subclass__(cls, **options: Any) -> None:
        """Registers the class, so that its name can be used in its place."""
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
        """The condition that this method gives for a task on a model.

        Raises:
            SitelensError: if it cannot be fitted.
        """

    def fit_all(self, tasks: Sequence[Task], model: ModelLike, *, seed: int = 0) -> Iterator[Condition | SitelensError]:
        """One by one, in the order of the tasks, each task's condition, or the error that kept it from being fitted.

        Conditions are taken from the cache where they are known.
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
        """How many numbers were trained for a condition that this method gave."""
        return 0

    def work(self, tasks: Sequence[Task], model: ModelLike) -> float:
        """Roughly what fitting all tasks costs, as a number of prompt tokens, for progress bars."""
        return FIT_TOKENS * len(tasks)

    @property
    def label(self) -> str:
        """What tables call this method."""
        return self.name

    @property
    def full_label(self) -> str:
        """The label with the fields that differ from their defaults."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        changed = [f"{name}={values[name]!r}" for name, usual in _defaults(self).items() if values[name] != usual]
        return f"{self.label}({', '.join(changed)})" if changed else self.label

    @classmethod
    def accepts(cls, name: str) -> bool:
        """Whether a name, as in `sl.compare(tasks, ["LTV"])`, means a method of this class."""
        return name == cls.name

    @classmethod
    def from_name(cls, name: str, **values: Any) -> Method:
        """The method that a name means, with the defaults of all fields that `values` does not set."""
        return cls(**values)

    def capped(self, task: Task) -> Task:
        """The task with the training items that this method may see.

        Raises:
            SitelensError: if there are no training or no validation items.
        """
        return task if self.max_train is None else cap_training_items(task)

    def record(self) -> dict[str, Any]:
        """What a record says of this method, as JSON as far as its fields are: its key and its fields."""
        return {"method": self.key, **{name: str(value) if not _is_plain(value) else value
                                       for name, value in asdict(self).items()}}  # fmt: skip

    def spec(self, task: Task, key: Mapping[str, str], seed: int) -> dict[str, Any] | None:
        """All that decides a fit, as plain JSON; None if that cannot be said, so that nothing may be kept.

        `key` is that of the model. Fits rest on embeddings and evaluation, whose algorithms' numbers are part of it.
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
        """The condition and what fitting it cost, cached; fitted with an empty cache, so that its cost is its own.

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
    """A method's condition for a task, and what fitting it cost.

    trained: numbers that were trained; forward_tokens, backward_tokens: tokens that went through the model, choices on
    valid and padding included; fit_seconds: on this machine.
    """

    condition: Condition
    trained: int
    forward_tokens: int
    backward_tokens: int
    fit_seconds: float


@dataclass(frozen=True)
class _Cost:
    """What a fit cost, as it is kept."""

    trained: int
    forward_tokens: int
    backward_tokens: int
    fit_seconds: float

    def __post_init__(self) -> None:
        if any(value < 0 for value in vars(self).values()):
            raise SitelensError("costs are not negative")


_NO_COST = _Cost(0, 0, 0, 0.0)


class _NotSavedError(Exception):
    """A fit whose condition cannot be saved."""

    def __init__(self, fitted: Fitted, reason: Exception) -> None:
        super().__init__(str(reason))
        self.fitted = fitted


def _fitted(artifact: Artifact) -> Fitted:
    """The fit that an artifact holds.

    Raises:
        SitelensError: if it holds something else.
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
    """The fields' defaults; MISSING where there is none."""
    makers = {field.name: (field.default, field.default_factory) for field in fields(method)}
    return {name: usual if make is MISSING else make() for name, (usual, make) in makers.items()}
