"""Settings: process-wide by assignment, for one context by `using`; errors are raised immediately."""

from __future__ import annotations

import asyncio
import io
import sys
import threading
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from sitelens import cli
from sitelens.contexts import bound
from sitelens.errors import SitelensError
from sitelens.settings import settings
from tests import interruption


def seen_by_a_thread(name: str) -> Any:
    seen: list[Any] = []
    thread = threading.Thread(target=lambda: seen.append(getattr(settings, name)))
    thread.start()
    thread.join()
    return seen[0]


def test_a_block_changes_its_own_thread_only() -> None:
    settings.memory_budget = "1GiB"
    try:
        with settings.using(memory_budget="2MB"):
            assert settings.memory_budget == "2MB" and settings.budget() == 2_000_000
            assert seen_by_a_thread("memory_budget") == "1GiB"
            settings.memory_budget = "3GiB"  # for the process; the block wins here
            assert settings.memory_budget == "2MB" and seen_by_a_thread("memory_budget") == "3GiB"
        assert settings.memory_budget == "3GiB"
    finally:
        settings.memory_budget = "2GiB"


def test_blocks_nest_and_leave_other_settings_alone(tmp_path: Path) -> None:
    outside = settings.cache_dir, settings.progress
    with settings.using(cache_dir=tmp_path):
        with settings.using(progress=True):
            assert (settings.cache_dir, settings.progress) == (tmp_path, True)
        assert (settings.cache_dir, settings.progress) == (tmp_path, outside[1])
    assert (settings.cache_dir, settings.progress) == outside


def test_a_dtype_is_kept_by_its_name() -> None:
    for dtype in ("bfloat16", torch.bfloat16):
        with settings.using(dtype=dtype):
            assert settings.dtype == "bfloat16"
    assert settings.dtype is None


def test_async_tasks_do_not_see_each_others_blocks(tmp_path: Path) -> None:
    async def task(name: str) -> Path:
        with settings.using(cache_dir=tmp_path / name):
            await asyncio.sleep(0.001)
            return settings.cache()

    async def both() -> list[Path]:
        return list(await asyncio.gather(task("a"), task("b")))

    assert asyncio.run(both()) == [tmp_path / "a", tmp_path / "b"]


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("memory_bugdet", 1, "there is no setting 'memory_bugdet': did you mean 'memory_budget'?"),
        ("threads", 1, "they are memory_budget, dtype, progress, cache_dir, data_dir"),
        ("memory_budget", 0, "memory_budget must be a positive number of bytes, got 0"),
        ("memory_budget", True, "got True"),
        ("memory_budget", 1.5, "got 1.5"),
        ("memory_budget", None, "got None"),
        ("memory_budget", "much", "cannot read 'much' as a size"),
        ("dtype", "float33", "unknown dtype 'float33'; write for example 'float32' or 'bfloat16'"),
        ("dtype", 16, "unknown dtype 16"),
        ("progress", "no", "progress must be True, False or None, got 'no'"),
        ("cache_dir", 3, r"cache_dir must be a folder \(a text or a Path\) or None, got 3"),
        ("data_dir", "", "data_dir must be a folder"),
    ],
)
def test_unknown_names_and_bad_values_are_refused_at_once(name: str, value: Any, message: str) -> None:
    before = repr(settings)
    with pytest.raises(SitelensError, match=message):
        settings.using(**{name: value})
    with pytest.raises(SitelensError, match=message):
        setattr(settings, name, value)
    assert repr(settings) == before


def test_an_interrupt_at_any_line_puts_the_setting_back(tmp_path: Path) -> None:
    outside = repr(settings)

    def work() -> None:
        with settings.using(cache_dir=tmp_path):
            assert settings.cache_dir == tmp_path

    for _ in interruption.at_every_line(work, [bound, settings.using]):
        assert repr(settings) == outside


def test_the_command_leaves_output_and_warnings_as_they_were(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.TextIOWrapper(io.BytesIO(), "ascii", "strict")
    monkeypatch.setattr(sys, "stdout", screen)
    before = warnings.showwarning, list(warnings.filters)
    assert cli.main(["tasks", "--names", "--built-in", "--cache", str(tmp_path)]) == 0
    assert screen.errors == "strict" and (warnings.showwarning, list(warnings.filters)) == before


def test_the_command_leaves_no_setting_behind(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = repr(settings)
    assert cli.main(["cache", "--cache", str(tmp_path), "--data", str(tmp_path), "--progress"]) == 0
    assert cli.main(["run", "no-such-task", "--cache", str(tmp_path), "--out", str(tmp_path / "o")]) == 1
    assert cli.main(["run", "no-such-task", "--memory-budget", "1GiB", "--out", str(tmp_path / "o")]) == 1
    assert cli.main(["run", "no-such-task", "--memory-budget", "lots", "--out", str(tmp_path / "o")]) == 1
    assert repr(settings) == before and str(tmp_path) in capsys.readouterr().out
