"""Names from outside in figures and pages: shown literally, never executed or interpreted as markup."""

from __future__ import annotations

import html
import inspect
import re
import shutil
import subprocess
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy.cluster.hierarchy import linkage
from scipy.spatial.distance import squareform

from sitelens import figures
from sitelens.files.escaping import visible
from tests.test_figures import BINS, leaves, rows

RUN = "document.title='run'"
NAMES = (
    f'x"><img src=q onerror="{RUN}">',
    f"<b>bold</b><a href=\"javascript:{RUN}\">a<b</a></script><script>{RUN}</script>",
    "&lt;i&gt; %{x} %{customdata[0]} </extra> $x^2$ $$", "a\u2028b\n\u202e<sub>|`*[x](y)",
)  # fmt: skip
OURS = re.compile(r"</?(br|sub|sup|extra)>")
PLACEHOLDER = re.compile(r"%\{(x|y|z|text|customdata(\[\d\])?)(:\.\df)?\}")
Frame = pd.DataFrame


def attended() -> Frame:
    return Frame({"position": range(4), "token": NAMES, "role": NAMES, NAMES[0]: 0.5, NAMES[1]: 0.2})


def square() -> Frame:
    return Frame(np.arange(16).reshape(4, 4) / 16, list(NAMES), list(NAMES))


def compared() -> Frame:
    numbers = {"accuracy": 0.5, "trained": 9, "forward_tokens": 5, "backward_tokens": 6}
    return Frame([{"task": task, "method": method, **numbers} for task in NAMES for method in NAMES])


def paired() -> Frame:
    pairs = rows(task_a=NAMES[:2], task_b=NAMES[2:], layer=(0, 1), head=(0, 1))
    return pairs.assign(distance=pairs["mean"], group="both")


TREE = linkage(squareform([[0, 9, 1, 5], [9, 0, 8, 3], [1, 8, 0, 6], [5, 3, 6, 0]]), "average")
LABELS = {"mean": NAMES[0], "x": NAMES[1]}
DRAWN: dict[str, Callable[[str], Any]] = {
    "alpha_heatmap": lambda title: figures.alpha_heatmap(np.eye(3), title),
    "head_heatmap": lambda title: figures.head_heatmap(np.eye(3), title, NAMES[2]),
    "transfer_heatmap": lambda title: figures.transfer_heatmap(
        square(), title, NAMES[0], groups=dict(zip(NAMES, reversed(NAMES), strict=True)), tree=TREE,
        hover={NAMES[2]: square()}, axes=(NAMES[0], NAMES[1]), between=NAMES[3],
    ),
    "lines": lambda title: figures.lines(
        rows(task=NAMES, kind=NAMES, dash=NAMES[:2], x=NAMES), "x", color="kind", dash="dash", facet="task",
        labels=LABELS, title=title, interval=NAMES[2],
    ),
    "dots": lambda title: figures.dots(rows(task=NAMES, condition=NAMES), labels=LABELS, title=title),
    "histogram": lambda title: figures.histogram(
        rows(task=NAMES, x=NAMES), "x", "mean", facet="task", labels=LABELS, title=title
    ),
    "soft_hard": lambda title: figures.soft_hard(rows(task=NAMES, threshold=(0.1, 0.5)).assign(soft=0.5), title),
    "random_heads": lambda title: figures.random_heads(
        rows(task=NAMES, heads=("random", "high-alpha"), k=(1, 2), draw=(0, 1)), title
    ),
    "head_counts": lambda title: figures.head_counts(rows(task=NAMES, order=NAMES, change=NAMES, k=(1, 2)), title),
    "task_agnostic": lambda title: figures.task_agnostic(rows(task=NAMES, condition=NAMES), title),
    "mixing": lambda title: figures.mixing(rows(task=NAMES, mixing=NAMES, hard=(False, True)), title),
    "prompt_counts": lambda title: figures.prompt_counts(rows(task=NAMES, n_prompts=(1, 3), n_shots=(1, 2)), title),
    "seed_variance": lambda title: figures.seed_variance(
        rows(task=NAMES, prompt_seed=NAMES, training_seed=(0, 1)), title
    ),
    "initializations": lambda title: figures.initializations(rows(task=NAMES, init=NAMES, seed=(0, 1)), title),
    "initialization_distances": lambda title: figures.initialization_distances(
        rows(task=NAMES, pair=NAMES).assign(distance=0.5), title
    ),
    "loss_path": lambda title: figures.loss_path(rows(path=NAMES, position=(0.0, 1.0)), title),
    "checkpoints": lambda title: figures.checkpoints(rows(task=NAMES, checkpoint=NAMES), title),
    "alpha_distribution": lambda title: figures.alpha_distribution(
        rows(task=NAMES, alpha=BINS).assign(share=0.1), title
    ),
    "training_curves": lambda title: figures.training_curves(
        rows(task=NAMES, step=(1, 2)).assign(valid_loss=1.0), title
    ),
    "costs": lambda title: figures.costs(rows(method=NAMES, prompts=(1, 10)).assign(seconds=1.0), title),
    "head_overlap": lambda title: figures.head_overlap(rows(task=NAMES, kind=NAMES).assign(auc=0.5), title),
    "shared_attention": lambda title: figures.shared_attention(paired(), title),
    "attention_roles": lambda title: figures.attention_roles(
        rows(layer=(0,), head=(0, 1), role=NAMES).assign(share=0.2), title
    ),
    "attention_example": lambda title: figures.attention_example(attended(), title),
    "similarity_against_transfer": lambda title: figures.similarity_against_transfer(square(), square(), title),
    "comparison": lambda title: figures.comparison(compared(), title),
    "suite": lambda title: figures.suite(rows(task=NAMES, condition=NAMES).assign(
        group=lambda frame: frame["task"], metric=NAMES[0]), title),
}  # fmt: skip


def shown_texts(figure: Any) -> list[str]:
    """Every text of a figure that Plotly interprets, without our own tags and placeholders."""
    content = figure.to_plotly_json()
    texts = [str(text) for path, text in leaves([content["data"], content["layout"]]) if isinstance(text, str)]
    for trace in figure.data:  # arrays of texts
        for name in ("text", "customdata", "x", "y"):
            texts += [str(text) for text in np.asarray(getattr(trace, name, None), object).ravel()
                      if isinstance(text, str)]  # fmt: skip
    return [PLACEHOLDER.sub("", OURS.sub("", text)) for text in texts]


def test_every_public_figure_function_is_tried() -> None:
    functions = {name for name, value in vars(figures).items() if inspect.isfunction(value)}
    assert set(DRAWN) == functions - {"save", "show_static_too", "check_formats", "missing_tool"}


@pytest.mark.parametrize("name", DRAWN)
def test_no_markup_from_outside_reaches_a_figure(name: str) -> None:
    figure = DRAWN[name](NAMES[1])
    assert type(figure) is figures.Figure
    texts = shown_texts(figure)
    assert not [text for text in texts if "<" in text or "$" in text or "%{" in text or not text.isprintable()]
    layout: Any = figure.layout
    title = html.unescape(layout.title.text.replace("<br>", ""))
    assert "".join(title.split()) == "".join(visible(NAMES[1]).split())


class Page(HTMLParser):
    """The tags and the title of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.title = ""
        self.texts: list[str] = []  # of the image
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data: str) -> None:
        if self.tags and self.tags[-1] == "title" and not self.title:
            self.title = data
        if self.tags and self.tags[-1] in ("text", "tspan"):
            self.texts.append(data.replace("\u00a0", " "))


@pytest.mark.parametrize("name", ["transfer_heatmap", "dots", "attention_example"])
def test_a_page_has_our_tags_only(name: str, tmp_path: Path) -> None:
    path = figures.save(DRAWN[name](NAMES[0]), tmp_path / f"{NAMES[0].replace('/', '')}.html")
    page = Page(path.read_text("utf-8"))
    assert page.tags == ["html", "head", "meta", "title", "body", "div", "script", "script", "div", "script"]
    assert page.title == NAMES[0] and ("id", "figure") in page.attributes
    assert {key for key, _ in page.attributes} <= {"lang", "charset", "style", "src", "id", "class", "type"}


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("chromium") is None, reason="no Chromium is installed")
def test_a_browser_runs_nothing_of_a_name_and_shows_all_of_it(tmp_path: Path) -> None:
    for name in ("dots", "lines"):
        path = figures.save(DRAWN[name](NAMES[0]), tmp_path / f"{name}.html")
        command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}",
                   "--virtual-time-budget=8000", "--dump-dom", path.as_uri()]  # fmt: skip
        page = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        tags = Page(page)
        assert tags.title == NAMES[0]
        assert not {"img", "b", "i"} & set(tags.tags) and tags.tags.count("script") == 3
        assert {value for key, value in tags.attributes if key == "href"} <= {"https://plotly.com/"}
        assert set(map(visible, NAMES)) <= set(tags.texts)
