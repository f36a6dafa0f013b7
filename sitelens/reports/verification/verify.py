"""verify: compares this library's computations on a model with the raw Hugging Face network.

The raw network runs one whole prompt at a time, without padding, cache or hook points; heads are edited by a pre-hook
on the attention output projection. In float32, numbers agree if they differ by at most 1e-4 of the scale of the logits.
Narrower dtypes round differently if sums are computed in another order. For them the limit is four times the difference
that padding a prompt in a batch makes in the raw network itself, at least four times the spacing of the dtype at 1
(0.03 in bfloat16), and at most 0.1 in bfloat16 and 0.02 in float16.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import pandas as pd

from sitelens import figures
from sitelens.errors import SitelensError
from sitelens.evaluation.record import task_record
from sitelens.evaluation.result import Result
from sitelens.evaluation.tables import Table
from sitelens.models.loading import resolve_model
from sitelens.models.model import ModelSource
from sitelens.models.provenance import provenance
from sitelens.reports.verification.checks import CHECKS
from sitelens.reports.verification.subject import Subject
from sitelens.tasks import Task, load_task

if TYPE_CHECKING:
    import plotly.graph_objects as go

OK, FAILS, UNSUPPORTED = "ok", "fails", "not supported"


@dataclass(frozen=True, eq=False, repr=False)
class Verification(Result):
    """The outcome of all checks on a model; `print` shows it as a table.

    Attributes:
        model: name and dtype of the model.
        frame: one row per check: check, result ("ok", "fails", or "not supported" by the architecture), error (the
            largest difference, relative to the scale of what is compared), limit (of the error), and detail (in words).
        record: how it was made, as plain JSON.
    """

    kind: ClassVar[str] = "verification"
    columns: ClassVar[tuple[str, ...]] = ("check", "result", "error", "limit", "detail")
    model: str
    frame: pd.DataFrame
    record: Mapping[str, Any] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        """Whether no check fails. Unsupported computations do not count; using them raises the error in `detail`."""
        return not (self.frame["result"] == FAILS).any()

    @property
    def failures(self) -> list[str]:
        """The names of the checks that fail."""
        return self.frame.loc[self.frame["result"] == FAILS, "check"].tolist()

    def __str__(self) -> str:
        verdict = "everything supported holds" if self.ok else f"FAILS: {', '.join(self.failures)}"
        lines = [f"{self.model}: {verdict}", ""]
        width = max(map(len, self.frame["check"]))
        for row in self.frame.to_dict("records"):
            error = "" if math.isnan(row["error"]) else f"{row['error']:.0e} of {row['limit']:.0e}"
            lines.append(f"{row['check']:<{width}}  {row['result']:<13}  {error:<16}  {row['detail']}".rstrip())
        return "\n".join(lines)

    def summary(self) -> pd.DataFrame:
        """The number of checks per result; columns: result, checks."""
        counts = self.frame["result"].value_counts(sort=False)
        return counts.rename_axis("result").rename("checks").reset_index()

    def tables(self) -> list[Table]:
        """One table with one row per check."""
        numbers = {
            name: ["" if math.isnan(value) else f"{value:.0e}" for value in self.frame[name]]
            for name in ("error", "limit")
        }
        cells = self.frame[list(self.columns)].assign(**numbers).set_index("check")
        note = "Error: the largest difference, as a share of the scale of what is compared."
        return [Table(cells, f"What holds on {self.model}.", note)]

    def figure(self, title: str | None = None) -> go.Figure:
        """The error of each check divided by its limit; a dashed line marks 1."""
        rows = self.frame.assign(share=self.frame["error"] / self.frame["limit"])
        labels = {"share": "Largest difference, as a share of its limit"}
        title = title or ""
        return figures.dots(
            rows, "share", y="check", color="result", labels=labels, title=title, share=False, reference=1.0
        )

    def description(self) -> dict[str, Any]:
        """The entries of its repr."""
        return {"model": self.model, "checks": len(self.frame), "failures": self.failures}

    def __repr__(self) -> str:
        counts = ", ".join(
            f"{count} {result}" for result, count in self.frame["result"].value_counts(sort=False).items()
        )
        return f"Verification({self.model!r}, {counts})"


def verify(model: ModelSource | None = None, *, task: Task | str = "antonym", seed: int = 0) -> Verification:
    """Check on a model that this library's fast paths are exact, and which methods the architecture supports.

    Compares with the raw Hugging Face network, on three few-shot prompts: the logits of the bridge, prefixes and
    padding, an edit of all heads and its gradient, generated text, edits of the residual stream and of the outputs of
    attention and MLP (which the methods use), attention patterns, and direct logit attribution. Also checks how the
    tokenizer begins a text, and whether query and value projections exist for LoRA. Nothing is cached.

    Args:
        model: a model or its name; the default model if None.
        task: the task of the prompts, whose queries are validation items.
        seed: decides demonstrations and random edits.

    Raises:
        SitelensError: if the model cannot be used at all.

    Example:
        >>> sl.verify("smollm2-135m")  # doctest: +SKIP
        smollm2-135m (float32): everything supported holds
        ...
    """
    model, task = resolve_model(model), load_task(task)
    subject = Subject(model, task, seed)
    rows = []
    for name, check in CHECKS.items():
        result, error, limit, detail = OK, float("nan"), float("nan"), ""
        try:
            found = check(subject)
            error, limit, detail = found.error, found.limit, found.detail
            result = OK if found.holds else FAILS
        except SitelensError as problem:
            result, detail = UNSUPPORTED, str(problem)
        except Exception as problem:  # any error of an underlying library is a failed check
            result, detail = FAILS, f"{type(problem).__name__}: {problem}".splitlines()[0]
        rows.append((name, result, error, limit, detail))
    frame = pd.DataFrame(rows, columns=["check", "result", "error", "limit", "detail"])
    record = {"task": task_record(task), "seed": seed, **provenance("sl.verify", model)}
    name = f"{model.name} ({str(model.dtype).removeprefix('torch.')})"
    return Verification(name, frame, json.loads(json.dumps(record)))
