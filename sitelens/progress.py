"""Progress: one bar for a whole job in a terminal or a notebook, otherwise one line per stage.

A job has stages of known relative cost. Loops and smaller jobs inside a stage move the bar of the job around them.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, TypeVar

from sitelens.contexts import bound
from sitelens.settings import settings

Item = TypeVar("Item")
BEFORE_THE_PLAN = 0.05  # fraction of the bar for stages that end before the costs are known
ESTIMATE_AFTER = 10.0  # seconds after which a job without a bar estimates, once, how long it will take
_log = logging.getLogger("sitelens")


@dataclass(frozen=True)
class _Watcher:
    """What loops and jobs inside a stage call with the fraction that is done, and with a description of the work."""

    advance: Callable[[float], None]
    describe: Callable[[str], None]


_watcher: ContextVar[_Watcher | None] = ContextVar("watcher", default=None)


@dataclass
class Bar:
    """The progress of one loop, which calls `update`.

    Attributes:
        total: number of steps of the loop.
        move: called by `update` with the number of steps done since the previous call.
        done: number of steps done.
    """

    total: int
    move: Callable[[int], object]
    done: int = 0

    def update(self, n: int = 1) -> None:
        """Count `n` more steps as done."""
        self.done += n
        self.move(n)


@contextmanager
def progress(total: int, label: str) -> Iterator[Bar]:
    """A progress bar for one loop, on standard error if `shows_bars()`.

        with progress(len(batches), "embed antonym") as bar:
            for batch in batches:
                ...
                bar.update()

    Inside a job, no new bar is drawn; the job's bar moves instead. Use it for innermost loops; outer loops divide
    their stage with `portion`.

    Args:
        total: number of steps.
        label: text next to the bar.
    """
    watcher = _watcher.get()
    if watcher is not None:
        bar = Bar(total, lambda _: watcher.advance(bar.done / max(total, 1)))
        yield bar
        return
    from tqdm.auto import tqdm

    with tqdm(total=total, desc=label, disable=not shows_bars(), leave=False) as line:
        yield Bar(total, line.update)


def no_progress() -> AbstractContextManager[None]:
    """A context manager in which loops and jobs neither draw nor move a bar; for many short loops inside one stage."""
    return bound(_watcher, _Watcher(lambda share: None, lambda text: None))


@contextmanager
def portion(start: float, stop: float) -> Iterator[None]:
    """A context manager in which loops move the bar from `start` to `stop`, fractions (0 to 1) of the current stage."""
    watcher = _watcher.get()
    if watcher is None:
        yield
        return
    inside = _Watcher(lambda share: watcher.advance(start + (stop - start) * share), watcher.describe)
    with bound(_watcher, inside):
        yield
    watcher.advance(stop)


def portions(items: Sequence[Item]) -> Iterator[tuple[Item, AbstractContextManager[None]]]:
    """Pairs of an item and a context manager: its `portion`, an equal part of the current stage."""
    for i, item in enumerate(items):
        yield item, portion(i / len(items), (i + 1) / len(items))


class Job:
    """Progress of a job over its stages, to be used as a context manager.

        with Job("run", ["load the model", "train", "evaluate"]) as job:
            with job.stage("load the model"):
                ...
            job.plan({"train": 3000, "evaluate": 500})  # relative costs, as soon as they are known
            with job.stage("train"):
                ...

    In a terminal or a notebook it draws a bar. Otherwise it writes lines with the time left to standard error, or to
    the logger "sitelens" if that is enabled for INFO. `settings.progress` overrides this: True draws a bar, False shows
    nothing. A job inside a stage of another job moves the other job's bar.

    Args:
        label: text next to the bar, and at the beginning of each line.
        stages: names of the stages, in order.
    """

    def __init__(self, label: str, stages: Sequence[str]) -> None:
        self.label, self.stages = label, list(stages)
        self._outer = _watcher.get()
        self._progress = settings.progress
        self._costs: dict[str, float] = {}
        self._finished = 0.0  # total cost of the finished stages
        self._base = self._share = 0.0  # fractions of the bar: at the last `plan`, and now
        self._started = self._planned = time.monotonic()
        self._estimated = False
        self._bar: Any = None

    def __enter__(self) -> Job:
        if self._outer is None and shows_bars():
            from tqdm.auto import tqdm

            form = "{desc}: {percentage:3.0f}%|{bar}| {elapsed}<{remaining}"
            self._bar = tqdm(total=1000, desc=self.label, leave=False, smoothing=0, bar_format=form)
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()
        elif kind is None and self._outer is None:
            self._say(f"done in {duration(time.monotonic() - self._started)}")

    def plan(self, costs: Mapping[str, float]) -> None:
        """Set the relative costs of the remaining stages, by name; the bar stays where it is."""
        self._costs, self._finished, self._base = dict(costs), 0.0, self._share
        self._planned = time.monotonic()

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """A context manager for one stage; loops and jobs inside it move this job's bar."""
        if name:
            number = f"{self.stages.index(name) + 1}/{len(self.stages)} " if len(self.stages) > 1 else ""
            self._describe(f"{number}{name}")
        with bound(_watcher, _Watcher(lambda share: self._advance(name, share), self._describe)):
            yield
        self.finish(name)

    def rest(self) -> AbstractContextManager[None]:
        """A context manager for all remaining work as one stage, described by the jobs inside it."""
        self.plan({"": 1.0})
        return self.stage("")

    def finish(self, name: str) -> None:
        """Count a stage as done, even if it was skipped."""
        self._advance(name, 1.0)
        self._finished += self._costs.pop(name, 0.0)

    def _advance(self, name: str, share: float) -> None:
        done = self._finished + self._costs.get(name, 0.0) * min(share, 1.0)
        total = self._finished + sum(self._costs.values())
        reached = self._base + (1 - self._base) * done / total if total else BEFORE_THE_PLAN * min(share, 1.0)
        self._share = max(self._share, reached)
        if self._outer is not None:
            self._outer.advance(self._share)
        elif self._bar is not None:
            self._bar.update(int(1000 * self._share) - self._bar.n)
        elif not self._estimated and time.monotonic() - self._planned > ESTIMATE_AFTER and (left := self._time_left()):
            self._estimated = True
            self._say(f"{100 * self._share:.0f}% done{left}")

    def _time_left(self) -> str:
        """The estimated time left as text, from the pace since the last `plan`; empty while it is too early to tell."""
        done, elapsed = self._share - self._base, time.monotonic() - self._planned
        if not self._finished + sum(self._costs.values()) or done < 0.02 or elapsed < 1:
            return ""
        return f", about {duration(elapsed * (1 - self._share) / done)} left"

    def _describe(self, text: str) -> None:
        if self._outer is not None:
            self._outer.describe(text)
        elif self._bar is not None:
            self._bar.set_description(f"{self.label}: {text}")
        else:
            self._say(f"{text}{self._time_left()}")

    def _say(self, text: str) -> None:
        if self._progress is False:
            return
        if _log.isEnabledFor(logging.INFO):
            _log.info("%s: %s", self.label, text)
        else:
            print(f"sitelens: {self.label}: {text}", file=sys.stderr, flush=True)


def shows_bars() -> bool:
    """Whether loops and jobs draw bars: `settings.progress`, or `is_watched()` if that is None."""
    return is_watched() if settings.progress is None else settings.progress


def is_watched() -> bool:
    """Whether standard error is shown to a person, in a terminal or a notebook."""
    return "ipykernel" in sys.modules or bool(getattr(sys.stderr, "isatty", lambda: False)())


def duration(seconds: float) -> str:
    """A duration as text: "40 s", "6 min", "2 h 10 min"."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
