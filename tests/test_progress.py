"""Progress: bars in a terminal, lines elsewhere, nothing if it is switched off."""

from __future__ import annotations

import io
import logging
import sys
from collections.abc import Iterator

import pytest

from sitelens import progress
from sitelens.progress import Job, duration, portion, portions
from sitelens.settings import settings


class Clock:
    """A replacement for the module `time`, set by tests."""

    now = 0.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture(autouse=True)
def usual_settings() -> Iterator[None]:
    """Progress with default settings."""
    with settings.using(progress=None):
        yield


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    return clock


def shares(job: Job, done: list[float]) -> list[float]:
    """The job's fraction done after each of these fractions of the current stage."""
    seen = []
    for share in done:
        with portion(0.0, share):
            pass
        seen.append(job._share)
    return seen


def test_stages_take_their_share_of_the_cost():
    with Job("job", ["load", "a", "b"]) as job:
        with job.stage("load"):
            assert shares(job, [0.5, 1.0]) == [0.025, 0.05]
        job.plan({"a": 300.0, "b": 100.0})
        with job.stage("a"):
            assert shares(job, [0.5, 1.0]) == pytest.approx([0.05 + 0.95 * 0.375, 0.05 + 0.95 * 0.75])
        with job.stage("b"):
            assert shares(job, [0.5, 1.0]) == pytest.approx([0.05 + 0.95 * 0.875, 1])


def test_a_skipped_stage_counts_as_done():
    with Job("job", ["a", "b"]) as job:
        job.plan({"a": 1.0, "b": 1.0})
        job.finish("a")
        assert job._share == 0.5


def test_loops_and_jobs_inside_a_stage_move_its_bar_and_never_back():
    with Job("job", ["a"]) as job:
        job.plan({"a": 1.0})
        seen = []
        with job.stage("a"):
            for letters, part in portions([["a", "b", "c", "d"], ["x", "y"]]):
                with part, progress.progress(len(letters), "letters") as bar:
                    for _ in letters:
                        seen.append(job._share)
                        bar.update()
            assert seen == [0, 0.125, 0.25, 0.375, 0.5, 0.75]
            with Job("inner", ["u", "v"]) as inner:
                inner.plan({"u": 1.0, "v": 1.0})
                with inner.stage("u"):
                    pass
            assert inner._share == 0.5 and job._share == 1


def test_without_a_terminal_each_stage_is_a_line_with_the_time_left(clock: Clock, capsys: pytest.CaptureFixture[str]):
    with Job("run", ["load", "train", "score"]) as job:
        with job.stage("load"):
            clock.now = 5.0
        job.plan({"train": 300.0, "score": 100.0})
        with job.stage("train"):
            clock.now = 16.0
            with portion(0.0, 1 / 3):
                pass
            clock.now = 35.0
            with portion(0.0, 2 / 3):  # written once
                pass
            clock.now = 65.0
        with job.stage("score"):
            clock.now = 85.0
    assert capsys.readouterr().err.splitlines() == [
        "sitelens: run: 1/3 load",
        "sitelens: run: 2/3 train",
        "sitelens: run: 29% done, about 33 s left",
        "sitelens: run: 3/3 score, about 20 s left",
        "sitelens: run: done in 85 s",
    ]


def test_the_lines_of_an_inner_job_are_the_outer_ones(capsys: pytest.CaptureFixture[str]):
    with Job("outer", ["load"]) as outer:
        with outer.stage("load"):
            pass
        with outer.rest(), Job("inner", ["a", "b"]) as inner:
            inner.plan({"a": 1.0, "b": 1.0})
            for name in "ab":
                with inner.stage(name):
                    pass
        assert outer._share == pytest.approx(1)
    lines = capsys.readouterr().err.splitlines()
    assert lines[:3] == ["sitelens: outer: load", "sitelens: outer: 1/2 a", "sitelens: outer: 2/2 b"]
    assert len(lines) == 4


def test_lines_go_to_the_logger_that_somebody_set_up(
    caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
):
    with caplog.at_level(logging.INFO, "sitelens"), Job("run", ["a"]) as job, job.stage("a"):
        pass
    assert caplog.records[0].getMessage() == "run: a"


def test_a_failed_job_does_not_say_that_it_is_done(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(ZeroDivisionError), Job("run", ["a"]) as job, job.stage("a"):
        _ = 1 / 0
    assert capsys.readouterr().err == "sitelens: run: a\n"
    with progress.progress(2, "letters") as bar:  # the job no longer receives progress
        bar.update(2)
    assert bar.done == 2 and job._share == 0


def test_in_a_terminal_the_bar_is_there_from_the_start(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(progress, "is_watched", lambda: True)
    with Job("run", ["load the model", "train"]) as job:
        assert "run:   0%" in capsys.readouterr().err
        with job.stage("load the model"):
            assert "run: 1/2 load the model" in capsys.readouterr().err
        job.plan({"train": 1.0})
        with job.stage("train"), portion(0.0, 0.5):
            pass
        job._bar.refresh()
        assert "100%" in capsys.readouterr().err
    assert "sitelens:" not in capsys.readouterr().err


@pytest.mark.parametrize("watched", [True, False])
@pytest.mark.parametrize("asked", [True, None])
def test_a_loop_alone_draws_its_bar_where_a_person_looks_or_asked_for_it(
    watched: bool, asked: bool | None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(progress, "is_watched", lambda: watched)
    with settings.using(progress=asked), progress.progress(4, "letters") as bar:
        bar.update(3)
    assert ("letters:" in capsys.readouterr().err) is (watched or asked is True) and bar.done == 3


def test_loops_and_jobs_without_progress_leave_the_stage_alone(capsys: pytest.CaptureFixture[str]):
    with Job("job", ["a"]) as job:
        job.plan({"a": 1.0})
        with job.stage("a"), progress.no_progress():
            with progress.progress(1, "letters") as bar:
                bar.update()
            with Job("inner", ["u"]) as inner, inner.stage("u"):
                pass
            assert job._share == 0
        assert job._share == 1
    assert capsys.readouterr().err.splitlines() == ["sitelens: job: a", "sitelens: job: done in 0 s"]


@pytest.mark.parametrize("watched", [True, False])
def test_switched_off_nothing_is_written(
    watched: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(progress, "is_watched", lambda: watched)
    with settings.using(progress=False):
        with Job("run", ["a"]) as job, job.stage("a"), progress.progress(2, "letters") as bar:
            bar.update(2)
        with progress.progress(2, "letters") as bar:
            bar.update(2)
    assert capsys.readouterr().err == ""


def test_a_person_watches_a_terminal(monkeypatch: pytest.MonkeyPatch):
    for is_terminal in (True, False):
        screen = io.StringIO()
        monkeypatch.setattr(screen, "isatty", lambda answer=is_terminal: answer)
        monkeypatch.setattr(sys, "stderr", screen)
        assert progress.is_watched() is is_terminal


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (89.0, "89 s"), (90.0, "2 min"), (3540.0, "59 min"), (3599.0, "1 h 0 min"), (7800.0, "2 h 10 min")],
)
def test_a_duration_is_said_in_words(seconds: float, text: str):
    assert duration(seconds) == text
