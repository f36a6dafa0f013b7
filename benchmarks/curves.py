"""`python -m benchmarks.curves`: time and extra memory against the number of tasks, prompt tokens, and alphas.

Writes benchmarks/results/curves.csv and curves.png. Time is per task (or per alpha), so that a flat line means constant
cost per task. Extra memory is the peak memory of the process minus its memory before, under a fixed memory budget.
"""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import pandas as pd
import plotly.graph_objects as go
import torch
from plotly.subplots import make_subplots

import sitelens as sl
from benchmarks.bench import RESULTS, machine, padded, seconds
from sitelens.engine.batches import tokenize
from sitelens.engine.prompts import few_shot_prompts
from sitelens.figures.style import COLORS, DOUBLE, styled
from sitelens.models.model import Bridge, Model
from sitelens.settings import parse_bytes

BUDGET = "512MiB"
CONFIG = sl.TrainConfig(n_steps=20, eval_every=10, n_valid=16)
TASKS, TOKENS, ALPHAS = (1, 2, 4, 8, 16, 32, 57), (10, 30, 60, 120, 250, 500), (1, 2, 4, 16, 64, 256)


def kibibytes(field: str) -> float:
    """A memory field of this process in /proc/self/status, in KiB (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(float(line.split()[1]) for line in lines if line.startswith(field))


def measured(work: Callable[[], Any]) -> tuple[float, float]:
    """Seconds, and peak resident memory minus resident memory before, in MiB (Linux)."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # reset the peak
    before = kibibytes("VmRSS")
    took, _ = seconds(work)
    return took, (kibibytes("VmHWM") - before) / 1024


def embeddings(model: Bridge, tasks: list[sl.Task]) -> dict[str, sl.TaskEmbedding]:
    """Random embeddings of a realistic scale; run time does not depend on their values."""
    generator = torch.Generator().manual_seed(0)
    shape = Model.of(model).shape
    return {
        t.name: sl.TaskEmbedding(torch.randn(shape, generator=generator) * 0.05, t.name, None, 1, 1, 0) for t in tasks
    }


def train(model: Bridge, tasks: list[sl.Task]) -> Callable[[], Any]:
    """A function that trains all tasks together for a few steps."""
    vectors = embeddings(model, tasks)
    return lambda: sl.train_selections(tasks, model, embeddings=vectors, config=CONFIG)


def points(model: Bridge) -> Iterator[dict[str, Any]]:
    """The measured points of the three curves, as rows of curves.csv."""
    names = sl.list_tasks().query("source == 'built in'")["name"]
    built_in = [sl.load_task(name) for name in names]
    many = [built_in[i % len(built_in)] for i in range(max(TASKS))]
    many = [replace(task, name=f"{task.name} {i}") for i, task in enumerate(many)]
    for n in TASKS:
        took, extra = measured(train(model, many[:n]))
        yield {"against": "tasks trained together", "x": n, "seconds": took / n, "mib": extra}
    for n in TOKENS:
        tasks = [padded(task, n - 8) for task in built_in[:4]] if n > 10 else built_in[:4]
        took, extra = measured(train(model, tasks))
        prompts = few_shot_prompts(tasks[0], tasks[0].train[:20], 0, Model.of(model).tokenizer)
        length = sum(tokenize(prompts, Model.of(model).tokenizer).lengths) / len(prompts)
        yield {"against": "prompt tokens", "x": round(length), "seconds": took / len(tasks), "mib": extra}
    task = sl.load_task("capitalize")
    vector = embeddings(model, [task])[task.name]
    selection = sl.HeadSelection(torch.rand(Model.of(model).shape[:2], generator=torch.Generator().manual_seed(0)))
    for n in ALPHAS:
        grid = {str(i): sl.PatchHeads(selection.random(64, seed=i), vector) for i in range(n)}
        took, extra = measured(lambda g=grid: sl.evaluate(task, g, model, n_items=16))
        yield {"against": "alphas in a grid", "x": n, "seconds": took / n, "mib": extra}


def main() -> None:
    """Measure, print, and write the table and the figure."""
    sl.settings.progress, sl.settings.memory_budget = False, BUDGET
    model = sl.load_model()
    measured(train(model, [sl.load_task("antonym")]))  # warm-up
    rows = []
    for point in points(model):
        rows.append(point)
        print("{against:<24} {x:>4}  {seconds:8.3f} s each  {mib:7.0f} MiB".format(**point), flush=True)
    frame = pd.DataFrame(rows).round({"seconds": 4, "mib": 1}).assign(date=f"{date.today()}", machine=machine())
    RESULTS.mkdir(exist_ok=True)
    frame.to_csv(RESULTS / "curves.csv", index=False)
    draw(frame)


def draw(frame: pd.DataFrame) -> None:
    """Seconds per task or alpha above, extra memory and the budget below; one column per quantity varied."""
    names = list(dict.fromkeys(frame["against"]))
    shared: Any = "columns"  # plotly annotates it as bool, but accepts text
    figure: Any = make_subplots(
        rows=2, cols=len(names), shared_xaxes=shared, horizontal_spacing=0.07, vertical_spacing=0.06
    )
    for column, name in enumerate(names, start=1):
        part = frame[frame["against"] == name]
        for row, (y, title) in enumerate(
            (("seconds", "Seconds per task or alpha"), ("mib", "Extra memory (MiB)")), start=1
        ):
            line = go.Scatter(x=part["x"], y=part[y], mode="lines+markers", line={"color": COLORS[0], "width": 1.5})
            figure.add_trace(line, row, column)
            figure.update_yaxes(title=title if column == 1 else None, rangemode="tozero", row=row, col=column)
        figure.add_hline(y=parse_bytes(BUDGET) / 2**20, row=2, col=column, line={"dash": "dash", "width": 1})
        ticks = sorted(set(part["x"]))
        figure.update_xaxes(type="log", tickvals=ticks, ticktext=[str(x) for x in ticks], tickangle=0, col=column)
        figure.update_xaxes(title=f"Number of {name}", row=2, col=column)
    figure.update_layout(showlegend=False)
    sl.figures.save(styled(figure, "", DOUBLE, 330, margin={"l": 60, "b": 50}), RESULTS / "curves.png")


if __name__ == "__main__":
    main()
