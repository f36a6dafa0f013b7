"""`python -m benchmarks.limits`: the time of a training step compared with the limits of the machine.

With 16 and 64 rows: time of the step divided by the time of its matrix products alone (forward, and backward with
respect to the input), over weights too large for the processor's caches (should be at most 1 / 0.7). With one row: time
to read all weights twice divided by the time of the step (should be at least 0.5). Times are medians of interleaved
runs in one process.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from datetime import date

import pandas as pd
import torch

import sitelens as sl
from benchmarks.bench import RESULTS, machine
from sitelens.engine.batches import tokenize
from sitelens.engine.forward import HeadEdit, LastToken
from sitelens.engine.prefix import PrefixCache
from sitelens.engine.prompts import few_shot_prompts
from sitelens.models.model import Bridge, Model

REPEATS = 21
KINDS = {
    "products": ("aten::mm", "aten::addmm"),
    "attention": ("aten::bmm", "aten::_softmax", "aten::_softmax_backward_data", "aten::cat", "aten::index"),
    "norms, gates, mixing": ("aten::mul", "aten::add", "aten::add_", "aten::pow", "aten::mean", "aten::rsqrt",
                             "aten::silu", "aten::silu_backward", "aten::sum", "aten::div", "aten::neg",
                             "aten::addcmul"),
}  # fmt: skip


def timed(*works: Callable[[], object]) -> list[float]:
    """Median seconds of each function; the functions are run in turn."""
    found: list[list[float]] = [[] for _ in works]
    for _ in range(REPEATS + 2):
        for times, work in zip(found, works, strict=True):
            started = time.perf_counter()
            work()
            times.append(time.perf_counter() - started)
    return [statistics.median(times[2:]) for times in found]


def profiled(step: Callable[[], object]) -> dict[str, float]:
    """Fractions of the time of a step by kind of operator; the rest, including profiler overhead, counts as Python."""
    started = time.perf_counter()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        for _ in range(3):
            step()
    whole = 1e6 * (time.perf_counter() - started)
    shares = dict.fromkeys((*KINDS, "other operators"), 0.0)
    for event in profile.key_averages():
        kind = next((kind for kind, names in KINDS.items() if event.key in names), "other operators")
        shares[kind] += event.self_cpu_time_total / whole
    return shares | {"Python": 1 - sum(shares.values())}


def measured(rows: int, model: Bridge) -> dict[str, float]:
    """One row of the table: times in ms and their ratios for a step with `rows` rows."""
    weights = [p.detach() for p in model.original_model.parameters() if p.ndim == 2]
    task, tokenizer = sl.load_task("antonym"), Model.of(model).tokenizer
    layers, heads, d_head = model.cfg.n_layers, model.cfg.n_heads, model.cfg.d_head
    batch = tokenize(few_shot_prompts(task, task.train[:rows], 0, tokenizer), tokenizer)
    prefix = PrefixCache.of(batch, Model.of(model), 2**31)
    vectors = torch.randn(rows, layers, heads, d_head) * 0.2
    inputs = {size: torch.randn(rows, size) for weight in weights for size in weight.shape}
    last_token = LastToken(Model.of(model))

    def logits(alpha: torch.Tensor) -> torch.Tensor:
        return last_token(prefix.rows(torch.arange(rows)), HeadEdit.mix(alpha, vectors))

    def forward() -> None:
        with torch.no_grad():
            logits(torch.full((rows, layers, heads), 0.5))

    def step() -> None:
        alpha = torch.full((rows, layers, heads), 0.5, requires_grad=True)
        torch.nn.functional.cross_entropy(logits(alpha), batch.answer, reduction="sum").backward()

    def products() -> None:
        for weight in weights:
            torch.mm(inputs[weight.shape[1]], weight.T)
        for weight in reversed(weights):
            torch.mm(inputs[weight.shape[0]], weight)

    def read() -> None:
        for _ in range(2):
            for weight in weights:
                weight.sum()

    with last_token:
        whole, ahead, gemms, reading = timed(step, forward, products, read)
        parts = profiled(step)
    return {
        "rows": rows, "step_ms": 1e3 * whole, "forward_ms": 1e3 * ahead, "products_ms": 1e3 * gemms,
        "reading_ms": 1e3 * reading, "step_over_products": whole / gemms, "reading_over_step": reading / whole,
        "reading_over_products": reading / gemms, **parts,
    }  # fmt: skip


def main() -> None:
    """Measure, print, and write benchmarks/results/limits.csv."""
    model = sl.load_model()
    frame = pd.DataFrame([measured(rows, model) for rows in (1, 16, 64)]).round(2)
    frame = frame.assign(date=f"{date.today()}", machine=machine())
    print(frame.drop(columns=["date", "machine"]).to_string(index=False))
    RESULTS.mkdir(exist_ok=True)
    frame.to_csv(RESULTS / "limits.csv", index=False)


if __name__ == "__main__":
    main()
