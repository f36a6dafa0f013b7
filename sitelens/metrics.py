"""Metrics: how a prediction is compared with the accepted answers of an item."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from sitelens.defaults import SitelensError
from sitelens.tasks import METRICS, Example, Task


@dataclass(frozen=True, slots=True)
class Output:
    """What a model said about one item."""

    first_right: bool
    token_text: str
    text: str
    logprob: float
    rank: int | float  # not a number where no model was asked


def _exact(task: Task, item: Example, out: Output) -> bool:
    return normalize(out.text, task.name) in {normalize(answer, task.name) for answer in item.answers}


def _prefix(task: Task, item: Example, out: Output) -> bool:
    said = normalize(out.text, task.name)
    return any(said.startswith(normalize(answer, task.name)) for answer in item.answers)


SCORERS: dict[str, Callable[[Task, Example, Output], bool]] = {
    "first_token": lambda task, item, out: out.first_right,
    "exact_match": _exact,
    "prefix_match": _prefix,
}


def normalize(text: str, task_name: str) -> str:
    """A prediction or answer as it is compared: one line, no "(...", no surrounding space, "Saint" for "St.".

    Lower-cased unless the task's name contains "capitalize" or "lowercase" (SITE's released code).
    """
    text = text.replace("St.", "Saint").split("\n")[0].split("(")[0].strip()
    return text if "capitalize" in task_name or "lowercase" in task_name else text.lower()


def checked_metrics(metrics: Sequence[str]) -> tuple[str, ...]:
    """Names of metrics as a tuple; raises SitelensError for an unknown one."""
    metrics = (metrics,) if isinstance(metrics, str) else tuple(metrics)
    unknown = [metric for metric in metrics if metric not in METRICS]
    if unknown or not metrics:
        raise SitelensError(
            f"unknown metric {', '.join(map(repr, unknown)) or '(none given)'}; one of {', '.join(METRICS)}"
        )
    return metrics


def check_answers(task: Task, items: Sequence[Example]) -> None:
    """Raise SitelensError for an answer that is empty after normalisation: it would be a prefix of everything."""
    for item, answer in ((one, answer) for one in items for answer in one.answers):
        if not normalize(answer, task.name):
            raise SitelensError(f"task {task.name!r}: the answer {answer!r} of {item.input!r} is empty after "
                                "normalisation: it can be scored by first_token only")  # fmt: skip
