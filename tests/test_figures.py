"""Figures: what they show, and how they are written."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

import sitelens as sl
from sitelens import figures

needs_chrome = pytest.mark.skipif(
    not any(map(shutil.which, ("chromium", "google-chrome", "chrome"))), reason="no Chrome or Chromium is installed"
)


@pytest.mark.parametrize("shape", [(2, 4), (30, 9), (80, 64)])
def test_heatmap_cells_stand_where_they_belong(shape: tuple[int, int]) -> None:
    alpha = np.random.default_rng(0).random(shape)
    figure = figures.alpha_heatmap(alpha, "title")
    (trace,) = figure.data
    assert np.array_equal(trace.z, alpha) and (trace.zmin, trace.zmax) == (0, 1)
    assert (figure.layout.xaxis.title.text, figure.layout.yaxis.title.text) == ("Head", "Layer")
    assert max(figure.layout.width, figure.layout.height) < 1200
    for word in ("layer", "head", "alpha"):
        assert word in trace.hovertemplate


def test_html_shares_one_plotly_js_a_directory(tmp_path: Path) -> None:
    for name in ("a.html", "b.html"):
        sl.figures.save(figures.alpha_heatmap(np.zeros((2, 2))), tmp_path / "new" / name)
    assert {path.name for path in (tmp_path / "new").iterdir()} == {"a.html", "b.html", "plotly.min.js"}
    assert (tmp_path / "new" / "a.html").stat().st_size < 50_000


def test_unknown_endings_are_refused(tmp_path: Path) -> None:
    with pytest.raises(sl.SitelensError, match=r"end it in .html, .png, .svg, .pdf"):
        figures.save(figures.alpha_heatmap(np.zeros((2, 2))), tmp_path / "a.bmp")


def test_a_missing_chrome_is_named_with_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figure = figures.alpha_heatmap(np.zeros((2, 2)))

    class ChromeNotFoundError(RuntimeError):
        pass

    def fail(*_: object, **__: object) -> None:
        raise ChromeNotFoundError("not here")

    monkeypatch.setattr(type(figure), "write_image", fail)
    with pytest.raises(sl.SitelensError, match=r"needs Chrome or Chromium.*write .html instead"):
        figures.save(figure, tmp_path / "a.png")


@needs_chrome
@pytest.mark.parametrize(("ending", "start"), [("png", b"\x89PNG"), ("svg", b"<svg"), ("pdf", b"%PDF")])
def test_static_files_are_written(ending: str, start: bytes, tmp_path: Path) -> None:
    path = figures.save(figures.alpha_heatmap(np.eye(3)), tmp_path / f"a.{ending}")
    assert path.read_bytes().startswith(start)
