"""Tables as Markdown, LaTeX and HTML, and the common format of a number with its interval."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from sitelens.files.escaping import html_text, latex_text, markdown_text

INTERVALS = (
    "95% intervals: over items of these tasks; where there are two, the second is over tasks like these as well."
)
WIDE = 6  # with more columns of numbers, a LaTeX table spans both columns of a page


def format_interval(row: Mapping[Any, Any], digits: int = 0, mean: str = "mean") -> str:
    """A summary row's mean and 95% interval in percent, for example "41 [38, 44]".

    The interval over tasks follows, if the row has one ("41 [38, 44] [29, 53]"), then the standard deviation over
    draws, if it has one ("41 [38, 44] ±3").

    Args:
        row: a row of `summarize`: mean, low, high and, if known, tasks_low, tasks_high and spread (shares from 0 to 1).
        digits: number of decimals.
        mean: the column that holds the mean.
    """

    def known(name: str) -> bool:
        return not pd.isna(row.get(name, np.nan))

    def number(name: str) -> str:
        return f"{100 * row[name]:.{digits}f}"

    tasks = f" [{number('tasks_low')}, {number('tasks_high')}]" if known("tasks_low") else ""
    spread = f" ±{number('spread')}" if known("spread") else ""
    return f"{number(mean)} [{number('low')}, {number('high')}]{tasks}{spread}"


@dataclass(frozen=True, eq=False)
class Table:
    """A table of texts, for output as Markdown, LaTeX or HTML.

    Cells are escaped, so Markdown, HTML or LaTeX in them is shown literally.

    Attributes:
        cells: one text per cell; missing cells are empty. The index labels the rows; its name is the corner cell.
        caption: what the table shows, in one sentence.
        note: text below the table.
        heading: text above the table in Markdown, to distinguish several tables.
    """

    cells: pd.DataFrame
    caption: str = ""
    note: str = ""
    heading: str = ""

    def markdown(self) -> str:
        """The table in Markdown, with its heading above and its note below."""
        first, *rest = [f"| {' | '.join(map(markdown_text, line))} |" for line in self._lines()]
        table = "\n".join([first, f"| {' | '.join(['---'] * (1 + self.cells.shape[1]))} |", *rest])
        return "\n\n".join(filter(None, [self.heading, table, self.note]))

    def latex(self, label: str = "") -> str:
        r"""The table in LaTeX; the document needs `\usepackage{booktabs}`.

        Args:
            label: label for `\ref`; only letters, digits, "-" and ":" are kept.
        """
        first, *rest = [rf"  {' & '.join(map(latex_text, line))} \\" for line in self._lines()]
        float_name = "table*" if self.cells.shape[1] > WIDE else "table"
        plain = "".join(letter for letter in label if letter.isascii() and (letter.isalnum() or letter in "-:"))
        lines = [
            rf"\begin{{{float_name}}}",
            r"  \centering",
            rf"  \caption{{{latex_text(self.caption)}}}" if self.caption else "",
            rf"  \label{{{plain}}}" if plain else "",
            rf"  \begin{{tabular}}{{l{'r' * self.cells.shape[1]}}}",
            r"  \toprule",
            first,
            r"  \midrule",
            *rest,
            r"  \bottomrule",
            r"  \end{tabular}",
            rf"  \par\smallskip{{\footnotesize {latex_text(self.note)}\par}}" if self.note else "",
            rf"\end{{{float_name}}}",
        ]
        return "\n".join(filter(None, lines))

    def html(self) -> str:
        """The table in HTML, with its caption above and its note below."""
        (corner, *names), *rest = [list(map(html_text, line)) for line in self._lines()]
        head = "".join(f"<th>{name}</th>" for name in [corner, *names])
        rows = [f"<tr><th>{name}</th>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for name, *row in rest]
        caption = f"<caption>{html_text(self.caption)}</caption>" if self.caption else ""
        note = f"<p>{html_text(self.note)}</p>" if self.note else ""
        return f"<table>{caption}<thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>{note}"

    def _lines(self) -> list[list[Any]]:
        """The header and the rows."""
        rows = [[name, *row.fillna("")] for name, row in self.cells.iterrows()]
        return [[self.cells.index.name or "", *self.cells.columns], *rows]
