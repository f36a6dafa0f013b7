"""Progress: one bar over a whole job where a person is looking, a line per stage where nobody is.

A job has stages of known relative cost. What runs inside a stage, loops and smaller jobs alike, moves the same bar.
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
BEFORE_THE_PLAN = 0.05  # the share of the bar for stages whose costs are not known yet
ESTIMATE_AFTER = 10.0  # seconds after which a job without a bar says once how long it will take
_log = logging.getLogger("sitelens")


@dataclass(frozen=True)
class _Watcher:
    """Where loops and jobs inside a stage report to: the share that is done, and what is being done."""

    advance: Callable[[float], None]
    describe: Callable[[str], None]


_watcher: ContextVar[_Watcher | None] = ContextVar("watcher", default=None)


@dataclass
class Bar:
    """The number of steps that a loop has done; the loop calls `update`."""

    total: int
    move: Callable[[int], object]  # what `update` calls with the number of steps done since
    done: int = 0

    def update(self, n: int = 1) -> None:
        """Count `n` more steps as done."""
        self.done += n
        self.move(n)


@contextmanager
def progress(total: int, label: str) -> Iterator[Bar]:
    """A progress bar for one loop, drawn on standard error if `shows_bars`.

        with progress(len(batches), "embed antonym") as bar:
            for batch in batches:
                ...
                bar.update()

    Inside a job no bar of its own is drawn: the job's bar moves by the fraction of steps that are done. Use it for
    innermost loops; outer loops divide their stage by `portion`.

    Args:
        total: the number of steps.
        label: the text beside the bar.
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
    """A context manager in which loops and jobs draw no bar and move none, for many short loops inside one stage."""
    return bound(_watcher, _Watcher(lambda share: None, lambda text: None))


@contextmanager
def portion(start: float, stop: float) -> Iterator[None]:
    """Inside this block, loops move the bar from `start` to `stop`, fractions of the surrounding stage."""
    watcher = _watcher.get()
    if watcher is None:
        yield
        return
    inside = _Watcher(lambda share: watcher.advance(start + (stop - start) * share), watcher.describe)
    with bound(_watcher, inside):
        yield
    watcher.advance(stop)


def portions(items: Sequence[Item]) -> Iterator[tuple[Item, AbstractContextManager[None]]]:
    """Each item with its equal `portion` of the surrounding stage."""
    for i, item in enumerate(items):
        yield item, portion(i / len(items), (i + 1) / len(items))


class Job:
    """A job's progress over all its stages, from its first line on.

        with Job("run", ["load the model", "train", "evaluate"]) as job:
            with job.stage("load the model"):
                ...
            job.plan({"train": 3000, "evaluate": 500})  # relative costs, as soon as they are known
            with job.stage("train"):
                ...

    A bar in a terminal or a notebook; otherwise lines with the time left on standard error, or through the logger
    "sitelens" if its level is INFO. `settings.progress` True asks for a bar, False for nothing, None to decide by who
    looks. A job inside another one's stage moves that one's bar.
    """

    def __init__(self, label: str, stages: Sequence[str]) -> None:
        self.label, self.stages = label, list(stages)
        self._outer = _watcher.get()
        self._progress = settings.progress
        self._costs: dict[str, float] = {}
        self._finished = 0.0  # cost of the stages that are done
        self._base = self._share = 0.0  # shares of the bar: when the costs became known, and now
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
        """Set the relative costs of the stages to come; the bar keeps the share that it has reached."""
        self._costs, self._finished, self._base = dict(costs), 0.0, self._share
        self._planned = time.monotonic()

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """One stage; what runs inside it moves the job's bar."""
        if name:
            number = f"{self.stages.index(name) + 1}/{len(self.stages)} " if len(self.stages) > 1 else ""
            self._describe(f"{number}{name}")
        with bound(_watcher, _Watcher(lambda share: self._advance(name, share), self._describe)):
            yield
        self.finish(name)

    def rest(self) -> AbstractContextManager[None]:
        """All that is left as one stage, described by the jobs and loops inside it."""
        self.plan({"": 1.0})
        return self.stage("")

    def finish(self, name: str) -> None:
        """Count a stage as done, also one that was skipped."""
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
        """As text, by the pace since the costs became known; empty as long as that says little."""
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
    """Whether loops and jobs draw bars: `settings.progress` or, where that is None, `is_watched`."""
    return is_watched() if settings.progress is None else settings.progress


def is_watched() -> bool:
    """Whether a person sees standard error as it is written: in a terminal or a notebook."""
    return "ipykernel" in sys.modules or bool(getattr(sys.stderr, "isatty", lambda: False)())


def duration(seconds: float) -> str:
    """A length of time in words: "40 s", "6 min", "2 h 10 min"."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
