"""How figures are saved: HTML pages that share one plotly.min.js, and images drawn by Chrome through kaleido."""

from __future__ import annotations

import html
import importlib.util
import io
import os
import re
import subprocess
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
import plotly.io as pio
from plotly.offline import get_plotlyjs

from sitelens.errors import SitelensError
from sitelens.files.escaping import visible
from sitelens.files.writing import why_not_written, write_bytes, write_text

STATIC = ("png", "svg", "pdf")
FORMATS = ("html", *STATIC)
PNG_SCALE = 3  # 288 pixels per inch
LIBRARY = "plotly.min.js"
START_SECONDS = 20  # that Chrome may take to start
ASK_AGAIN_SECONDS = 60  # after which a Chrome that did not start is tried again
INSTALL = "install it (for example `apt-get install chromium`, or `plotly_get_chrome`), or write .html instead"
_tried: dict[str, tuple[float, str | None]] = {}  # Chrome's path -> when it was tried, and what was wrong


def save(figure: go.Figure, path: str | Path) -> Path:
    """Write a figure as .html (plotly.js once per folder), .png (288 dpi), .svg or .pdf. Returns the path.

    The file is written whole or not at all.

    Args:
        figure: any Plotly figure.
        path: its ending decides the format.

    Raises:
        SitelensError: for another ending, if kaleido or Chrome (which draw .png, .svg and .pdf) is missing or fails, or
            if the file cannot be written.

    Example:
        >>> figure = sl.figures.alpha_heatmap(np.eye(2))
        >>> sl.figures.save(figure, "alpha.html").name
        'alpha.html'
    """
    path = Path(path)
    ending = path.suffix.lower().removeprefix(".")
    if ending not in FORMATS:
        raise SitelensError(f"cannot write {path.name}: end it in {', '.join(f'.{name}' for name in FORMATS)}")
    try:
        if ending != "html":
            return write_bytes(path, _picture(figure, path.name, ending))
        _write_library(path.parent)
        return write_text(path, _page(figure, path.stem))
    except (OSError, ValueError) as error:
        if isinstance(error, SitelensError):
            raise
        raise SitelensError(f"{path.name} cannot be written: {why_not_written(error)}") from error


def check_formats(formats: Iterable[str]) -> list[str]:
    """The formats as a list, each once.

    Raises:
        SitelensError: for a format that figures cannot be written in.

    Example:
        >>> sl.figures.check_formats(["html", "png", "html"])
        ['html', 'png']
    """
    if isinstance(formats, str):
        raise SitelensError(f"formats must be a list: write [{formats!r}]")
    names = list(dict.fromkeys(formats))
    for name in names:
        if name not in FORMATS:
            raise SitelensError(f"unknown format {name!r}; figures are written as {', '.join(FORMATS)}")
    return names


def missing_tool(formats: Iterable[str] = STATIC) -> str | None:
    """What is missing to write figures in these formats and how to get it ("needs kaleido: ..."); None if nothing is.

    Chrome is started once to check that it runs; that takes up to a second.

    Example:
        >>> sl.figures.missing_tool(["html"]) is None
        True
    """
    if not set(formats) & set(STATIC):
        return None
    if importlib.util.find_spec("kaleido") is None or importlib.util.find_spec("choreographer") is None:
        return "needs kaleido, which is not installed: pip install 'sitelens[static]', or write .html instead"
    from choreographer.browsers.chromium import Chromium

    path = Chromium.find_browser(skip_local=False)
    if not path or not Path(path).is_file():
        place = f" at {path} (BROWSER_PATH)" if path and os.environ.get("BROWSER_PATH") == path else ""
        return f"needs Chrome or Chromium, which was not found{place}: {INSTALL}"
    tried, problem = _tried.get(path, (0.0, "not tried"))
    if problem is not None and (problem == "not tried" or time.monotonic() - tried > ASK_AGAIN_SECONDS):
        problem = _start(path)
        _tried[path] = time.monotonic(), problem
    return problem and f"needs Chrome or Chromium, and {path} does not start ({problem}): {INSTALL}"


def show_static_too() -> bool:
    """In a notebook, show a PNG along with every figure from here on, for viewers that run no scripts.

    Returns:
        Whether Chrome is available to draw them; otherwise figures are interactive only.

    Example:
        >>> sl.figures.show_static_too()  # doctest: +SKIP
        True
    """
    pio.renderers["png"].scale = 2  # type: ignore[index]
    try:
        _picture(go.Figure(), "a figure", "png")
    except SitelensError:
        pio.renderers.default = "plotly_mimetype"
        return False
    pio.renderers.default = "plotly_mimetype+png"
    return True


def _start(path: str) -> str | None:
    """What is wrong with a Chrome that cannot load an empty page, or None."""
    if os.name == "nt":  # it answers nothing on a console
        return None
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        options = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"]
        command = [path, *options, f"--user-data-dir={folder}", "--dump-dom", "about:blank"]
        try:
            done = subprocess.run(
                command, capture_output=True, stdin=subprocess.DEVNULL, timeout=START_SECONDS, check=False
            )
        except subprocess.TimeoutExpired:
            return f"no answer in {START_SECONDS} seconds"
        except OSError as error:
            return why_not_written(error)
    if done.returncode == 0:
        return None
    said = done.stderr.decode("utf-8", "replace").strip().splitlines()
    return f"exit status {done.returncode}{f': {visible(said[-1][:200])}' if said else ''}"


def _picture(figure: go.Figure, name: str, ending: str) -> bytes:
    """The figure drawn by Chrome."""
    problem = missing_tool([ending])
    if problem is not None:
        raise SitelensError(f"{name} {problem}")
    buffer = io.BytesIO()
    try:
        figure.write_image(buffer, format=ending, scale=PNG_SCALE if ending == "png" else 1)
    except Exception as error:  # kaleido and choreographer each raise their own kinds
        said = visible(" ".join(str(error).split())[:200]) or type(error).__name__
        raise SitelensError(
            f"{name} needs Chrome or Chromium, which failed to draw it ({said}): try again, {INSTALL}"
        ) from error
    return buffer.getvalue()


def _page(figure: go.Figure, name: str) -> str:
    """A whole HTML page; nothing in it comes from outside unescaped (Plotly escapes "<", ">" and "/" in its JSON)."""
    layout: Any = figure.layout
    text = html.unescape(re.sub(r"<[^<>]*>", " ", layout.title.text or ""))
    title = html.escape(visible(" ".join(text.split()) or name))
    body = figure.to_html(full_html=False, include_plotlyjs="directory", div_id="figure")
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head><meta charset="utf-8"><title>{title}</title></head>\n'
        f"<body>\n{body}\n</body>\n</html>\n"
    )


def _write_library(folder: Path) -> None:
    """Put this version's plotly.js into a folder, replacing another version or a damaged file."""
    content = get_plotlyjs().encode()
    path = folder / LIBRARY
    try:
        same = path.read_bytes() == content
    except OSError:
        same = False
    if not same:
        write_bytes(path, content)
