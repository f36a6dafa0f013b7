"""Registry of studies: a study is a function that returns a tidy frame, with its caption and its figure."""

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
    """An analysis with its caption and its figure.

    Attributes:
        name: name of the figure's files, and of the study in commands.
        caption: what the figure shows, in one sentence.
        function: called with tasks and a model, and with those of n_items, seed and config that it accepts. If its
            first parameter is called `task`, it is given the first task only. It returns a tidy DataFrame, or a result
            that has a frame and a figure.
        figure: draws the frame; None if the result draws itself.
        tasks: names of the tasks that `sl.make_figures` uses.
        most_items: largest number of test items per task, whatever the caller asks for.
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
        """Test items per task, given that the caller asks for `n_items`."""
        return n_items if self.most_items is None else min(n_items, self.most_items)

    def make(
        self, tasks: Sequence[Task], model: ModelLike, *, n_items: int = 100, seed: int = 0,
        config: TrainConfig | None = None,
    ) -> tuple[pd.DataFrame, Figure]:  # fmt: skip
        """The study's frame and figure.

        Args:
            tasks: the tasks.
            model: the model.
            n_items: test items per task, at most `most_items`.
            seed: fixes prompts and items.
            config: training of alpha (default: the paper's).

        Raises:
            SitelensError: if function or figure return something else, and as the function.
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
    """A decorator that registers a function as a study, so that `sl.make_figures` can run and draw it by name.

    The function itself is unchanged. An installed package names the module with its studies in the entry-point group
    "sitelens.studies".

    Args:
        name: name of the study (default: that of the function, with dashes).
        caption, figure, tasks, most_items: as in `Study`.
        arguments: further arguments of the function.

    Raises:
        SitelensError: if another study has the name, or it cannot be a file name.

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
