"""What a study is: one function to a tidy frame, with its caption and its figure. `sl.make_figures` makes them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import pandas as pd

from sitelens.errors import SitelensError
from sitelens.evaluation.result import Result
from sitelens.figures import Figure
from sitelens.files.writing import check_file_name
from sitelens.methods.site.config import TrainConfig
from sitelens.models.model import Model, ModelLike
from sitelens.registry import Registry
from sitelens.tasks import Task

FOUR = ("antonym", "country-capital", "capitalize", "choose_first_of_3")
TWO = FOUR[:2]
SIXTEEN = (
    *FOUR, "synonym", "present-past", "singular-plural", "english-french", "english-german", "english-spanish",
    "landmark-country", "person-occupation", "person-sport", "lowercase_first_letter", "choose_last_of_3",
    "concept_v_object_3",
)  # fmt: skip

Function = TypeVar("Function", bound=Callable[..., Any])


@dataclass(frozen=True)
class Study:
    """One analysis, with its figure.

    name: of the figure's files, and in commands.
    caption: what the figure shows, in one sentence.
    function: called with tasks and a model, and by name with n_items, seed and config where it takes them. A function
        whose first parameter is called `task` is given the first task. It returns a tidy DataFrame, or a result that
        has a frame and a figure.
    figure: draws the frame; None where the result draws itself.
    tasks: names of the tasks on which `sl.make_figures` makes it.
    most_items: test items per task at most, whatever is asked for.
    arguments: further arguments of the function.
    """

    name: str
    caption: str
    function: Callable[..., Any]
    figure: Callable[[pd.DataFrame], Figure] | None = None
    tasks: tuple[str, ...] = FOUR
    most_items: int | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)

    def items(self, n_items: int) -> int:
        """How many test items per task are used where `n_items` are asked for."""
        return n_items if self.most_items is None else min(n_items, self.most_items)

    def make(
        self, tasks: Sequence[Task], model: ModelLike, *, n_items: int = 100, seed: int = 0,
        config: TrainConfig | None = None,
    ) -> tuple[pd.DataFrame, Figure]:  # fmt: skip
        """The frame and the figure.

        Raises:
            SitelensError: if the function or the drawing returns something else, and as the function.
        """
        parameters = inspect.signature(self.function).parameters
        takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
        options: dict[str, Any] = {"n_items": self.items(n_items), "seed": seed, "config": config}
        options = {name: value for name, value in options.items() if takes_all or name in parameters}
        subject = tasks[0] if next(iter(parameters)) == "task" else tasks
        result = self.function(subject, Model.of(model).bridge, **options, **self.arguments)
        if isinstance(result, Result):
            frame, figure = result.frame, result.figure("")
        else:
            frame, figure = result, None
        if not isinstance(frame, pd.DataFrame):
            raise SitelensError(f"the study {self.name!r} must return a DataFrame, not {type(frame).__name__}")
        if self.figure is not None:
            figure = self.figure(frame)
        if not isinstance(figure, Figure):
            raise SitelensError(
                f"the study {self.name!r} must be drawn as a Plotly figure, not {type(figure).__name__}"
            )
        return frame, figure


STUDIES: Registry[Study] = Registry(
    "study", Study, plural="studies", definition=lambda study: study.function,
    check=lambda study: check_file_name(study.name, "the name of a study"),
)  # fmt: skip


def study(
    name: str | None = None,
    *,
    caption: str,
    figure: Callable[[pd.DataFrame], Figure] | None = None,
    tasks: Sequence[str] = FOUR,
    most_items: int | None = None,
    **arguments: Any,
) -> Callable[[Function], Function]:
    """A decorator that makes a function a study: it is listed, and made with its data and its origin by its name.

    The function stays as it is. Parameters are the fields of `Study`; the name is by default the function's, with
    dashes. An installed package names the module that holds its studies by an entry point of the group
    "sitelens.studies".

    Raises:
        SitelensError: for a name that another study has, or that is no file name.

    Example:
        >>> def dots(frame):
        ...     return sl.figures.dots(frame.assign(condition="zero-shot"), share=True)
        >>> @sl.study(caption="Accuracy without demonstrations.", figure=dots, tasks=["antonym"])
        ... def zero_shot_accuracy(tasks, model, *, n_items):
        ...     frames = [sl.evaluate(task, sl.ZeroShot(), model, n_items=n_items) for task in tasks]
        ...     return sl.summarize(pd.concat(frames))
        >>> paths = sl.make_figures(["zero-shot-accuracy"], "figures", model, n_items=4, formats=["html"])
        >>> [path.name for path in paths]
        ['zero-shot-accuracy.csv', 'zero-shot-accuracy.json', 'zero-shot-accuracy.html']
    """

    def decorated(function: Function) -> Function:
        made = Study(
            name or function.__name__.replace("_", "-"), caption, function, figure, tuple(tasks), most_items, arguments
        )
        if str(function.__module__).startswith("sitelens."):
            STUDIES.own[made.name] = made
        else:
            STUDIES.register(made)
        return function

    return decorated
