"""Writing of figures: pages complete with plotly.min.js; one clear message for missing or crashing tools."""

from __future__ import annotations

import errno
import importlib.util
import os
import tomllib
import webbrowser
from pathlib import Path
from typing import Any

import numpy as np
import plotly.io as pio
import pytest
from plotly.offline import get_plotlyjs

import sitelens as sl
from sitelens import figures
from sitelens.figures import saving
from sitelens.files import writing

FIGURE = figures.alpha_heatmap(np.eye(2), "a < b")


def fake_chrome(folder: Path, script: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = folder / "chrome"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    monkeypatch.setenv("BROWSER_PATH", str(path))
    monkeypatch.setattr(saving, "_tried", {})
    return path


@pytest.mark.parametrize("content", [None, b"", b"half", b"// another version\n"], ids=ascii)
def test_a_library_that_is_not_whole_or_not_ours_is_written_again(content: bytes | None, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "plotly.min.js").write_bytes(content)
    figures.save(FIGURE, tmp_path / "a.html")
    assert (tmp_path / "plotly.min.js").read_text("utf-8") == get_plotlyjs()
    before = (tmp_path / "plotly.min.js").stat().st_ino
    figures.save(FIGURE, tmp_path / "b.html")
    assert (tmp_path / "plotly.min.js").stat().st_ino == before


def test_a_failed_page_is_one_error_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(writing.os, "fsync", fail)
    with pytest.raises(sl.SitelensError, match=r"^a\.html cannot be written: No space left on device$"):
        figures.save(FIGURE, tmp_path / "a.html")
    assert list(tmp_path.iterdir()) == []


def test_endings_may_be_capitals(tmp_path: Path) -> None:
    assert figures.save(FIGURE, tmp_path / "a.HTML").exists()


def test_formats_are_checked() -> None:
    assert figures.check_formats(["png", "html", "png"]) == ["png", "html"] and figures.check_formats([]) == []
    with pytest.raises(sl.SitelensError, match="unknown format 'bmp'; figures are written as html, png, svg, pdf"):
        figures.check_formats(["html", "bmp"])
    with pytest.raises(sl.SitelensError, match=r"write \['png'\]"):
        figures.check_formats("png")


# Tools


def test_pages_need_no_tool() -> None:
    assert figures.missing_tool(["html"]) is None


def test_a_missing_kaleido_is_named_with_what_brings_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "kaleido" else find(name))
    problem = "needs kaleido, which is not installed: pip install 'sitelens[static]'"
    assert str(figures.missing_tool(["svg"])).startswith(problem)
    with pytest.raises(sl.SitelensError) as caught:
        figures.save(FIGURE, tmp_path / "a.pdf")
    assert str(caught.value).startswith(f"a.pdf {problem}") and list(tmp_path.iterdir()) == []


def test_a_chrome_that_is_not_there_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BROWSER_PATH", str(tmp_path / "none"))
    with pytest.raises(
        sl.SitelensError, match=r"a\.png needs Chrome.*not found at .*none \(BROWSER_PATH\): install it"
    ):
        figures.save(FIGURE, tmp_path / "a.png")


@pytest.mark.parametrize(
    ("script", "why"),
    [("echo 'libnss3.so: cannot open' >&2; exit 127", r"exit status 127: libnss3\.so: cannot open"),
     ("kill -9 $$", "exit status -9"), ("exec sleep 60", "no answer in 0.2 seconds")],
)  # fmt: skip
def test_a_chrome_that_does_not_start_is_named_with_its_reason(
    script: str, why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_chrome(tmp_path, f"echo >> {tmp_path}/starts\n{script}", monkeypatch)
    monkeypatch.setattr(saving, "START_SECONDS", 0.2 if "sleep" in script else 20)
    for name in ("a.png", "b.svg"):
        with pytest.raises(
            sl.SitelensError, match=rf"{name} needs Chrome or Chromium, and .* does not start \({why}\)"
        ):
            figures.save(FIGURE, tmp_path / name)
    assert (tmp_path / "starts").read_text() == "\n"  # the second time it is known
    assert not list(tmp_path.glob("?.???"))


def test_a_chrome_that_dies_while_drawing_is_one_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_chrome(tmp_path, 'case "$*" in *dump-dom*) exit 0;; esac; exit 1', monkeypatch)
    with pytest.raises(
        sl.SitelensError, match=r"a\.png needs Chrome or Chromium, which failed to draw it \(.*write \.html"
    ):
        figures.save(FIGURE, tmp_path / "a.png")
    assert [path.name for path in tmp_path.iterdir()] == ["chrome"]


# Showing


@pytest.mark.parametrize("browser", [None, "no-such-browser"])
def test_without_a_browser_show_says_what_to_do(browser: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    def get() -> Any:
        if browser is None:
            raise webbrowser.Error("could not locate runnable browser")
        return webbrowser.GenericBrowser(browser)

    monkeypatch.setattr(webbrowser, "get", get)
    for options in ({"renderer": "browser"}, {}):
        monkeypatch.setattr(pio.renderers, "default", "browser")
        with pytest.raises(
            sl.SitelensError, match=r"no browser to show .* sl\.figures\.save\(figure, 'figure\.html'\)"
        ):
            FIGURE.show(**options)


def test_a_kernel_has_what_shows_figures() -> None:
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text("utf-8"))["project"]
    assert any(name.startswith("nbformat") for name in project["dependencies"])
