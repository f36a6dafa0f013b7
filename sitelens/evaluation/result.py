"""Results: what every experiment returns, a tidy frame with its summary, tables, figure and record."""

from __future__ import annotations

import functools
import glob
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import pandas as pd

from sitelens import figures
from sitelens.checks.schema import packed
from sitelens.errors import SitelensError
from sitelens.evaluation.tables import Table
from sitelens.files.escaping import html_text
from sitelens.files.writing import Outputs, check_file_name, write_csv, write_text
from sitelens.store.artifact import Artifact

if TYPE_CHECKING:
    import plotly.graph_objects as go

Loaded = TypeVar("Loaded", bound="Result")


class Result(ABC):
    """What an experiment returns. Subclasses are dataclasses (frozen, without a repr of their own).

    Attributes:
        frame: tidy data, one row per measurement.
        record: how it was made, as plain JSON (`experiment_record`).
        kind: the kind of its saved artifact, and the default name of its files.
        columns: columns that a saved frame must have.
    """

    kind: ClassVar[str]
    columns: ClassVar[tuple[str, ...]] = ()
    frame: pd.DataFrame
    record: Mapping[str, Any]

    @abstractmethod
    def summary(self) -> pd.DataFrame:
        """A short DataFrame of what to report from the frame."""

    @abstractmethod
    def tables(self) -> list[Table]:
        """The tables that `markdown`, `latex` and a notebook show."""

    @abstractmethod
    def figure(self, title: str | None = None) -> go.Figure:
        """The figure of the result, with its usual title (or none) unless a title is given."""

    @abstractmethod
    def description(self) -> dict[str, Any]:
        """Short facts for its repr, such as the model and the number of tasks."""

    def frames(self) -> dict[str, pd.DataFrame]:
        """The frames to write as CSV, by the suffix of their file names ("" for `frame`)."""
        return {"": self.frame, "-summary": self.summary()}

    def markdown(self) -> str:
        """The tables in Markdown."""
        return "\n\n".join(table.markdown() for table in self.tables())

    def latex(self) -> str:
        r"""The tables in LaTeX; the document needs `\usepackage{booktabs}`."""
        tables = self.tables()
        ends = [""] if len(tables) == 1 else [f"-{number}" for number in range(1, len(tables) + 1)]
        labels = [f"tab:{self.default_name}{end}" for end in ends]
        return "\n\n".join(table.latex(label) for table, label in zip(tables, labels, strict=True))

    @property
    def default_name(self) -> str:
        """The name of its files, unless another one is given."""
        return self.kind

    def save(
        self,
        folder: str | Path,
        formats: Sequence[str] = ("html",),
        *,
        name: str | None = None,
        command: str | None = None,
        facts: Mapping[str, Any] | None = None,
    ) -> list[Path]:
        """Write everything to a folder and return the paths of the files.

        These are NAME.csv (the frame), NAME-summary.csv, NAME.md and NAME.tex (the tables), NAME.json (how it was
        made), NAME.safetensors (for `load`) and the figure. If a file cannot be written, the others still are, and a
        `MissingOutputWarning` names it at the end.

        Args:
            folder: where to write.
            formats: file formats of the figure: "html", "png", "svg", "pdf".
            name: name of the files, without extension (default: `default_name`).
            command: the command that made the result, for NAME.json (default: the function that did).
            facts: further entries of NAME.json, as plain JSON.

        Raises:
            SitelensError: for an invalid file name or an unknown format, before anything is written; or if nothing
                could be written.
        """
        name, formats = check_file_name(name or self.default_name, "name"), figures.check_formats(formats)
        record = {"figure": name, **self.saved_record(), **(facts or {})}
        record |= {"made_by": command} if command else {}
        with Outputs(folder) as outputs:
            for ending, frame in self.frames().items():
                outputs.write(f"{name}{ending}.csv", functools.partial(write_csv, frame=frame, float_format="%.6g"))
            outputs.write(f"{name}.md", lambda path: write_text(path, self.markdown() + "\n"))
            outputs.write(f"{name}.tex", lambda path: write_text(path, self.latex() + "\n"))
            outputs.write(f"{name}.json", lambda path: write_text(path, json.dumps(record, indent=1) + "\n"))
            outputs.write(f"{name}.safetensors", self.artifact().save)
            figure = self.figure()
            for ending in formats:
                outputs.write(f"{name}.{ending}", functools.partial(figures.save, figure))
        return outputs.paths

    def saved_record(self) -> dict[str, Any]:
        """The contents of NAME.json, apart from the command: the record, and what a subclass adds."""
        return dict(self.record)

    @property
    def model_name(self) -> str | None:
        """The model's name, or None if it is not in the record."""
        facts = self.record.get("model")
        return facts.get("name") if isinstance(facts, Mapping) else None

    def artifact(self) -> Artifact:
        """The contents of NAME.safetensors: the fields of the dataclass."""
        return Artifact(self.kind, {}, *packed(self))

    @classmethod
    def load(cls: type[Loaded], path: str | Path, name: str | None = None) -> Loaded:
        """The result saved in a folder or file.

        Args:
            path: the folder that it was saved in, or its file NAME.safetensors.
            name: name of the files, needed if the folder holds several results.

        Raises:
            SitelensError: if there is no such file, there are several, or it is damaged or holds something else.
        """
        result = cls.from_artifact(Artifact.load(_file(Path(path), name, cls.kind), cls.kind))
        missing = set(cls.columns) - set(result.frame.columns)
        if missing:
            raise SitelensError(f"{path}: the frame has no column {', '.join(sorted(missing))}")
        return result

    @classmethod
    def from_artifact(cls: type[Loaded], artifact: Artifact) -> Loaded:
        """The result in an artifact.

        Raises:
            SitelensError: if a field does not match its declared type; the message names the field.
        """
        return artifact.made(cls)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{key}={value!r}' for key, value in self.description().items())})"

    def _repr_html_(self) -> str:
        """HTML for notebooks: the repr and the tables."""
        return f"<div><p>{html_text(repr(self))}</p>{''.join(table.html() for table in self.tables())}</div>"


def _file(path: Path, name: str | None, kind: str) -> Path:
    """The file of a saved result in a folder, or the path itself if it is not a folder."""
    if not path.is_dir():
        return path
    pattern = f"{glob.escape(name) if name else f'{kind}*'}.safetensors"
    parts = (".selection", ".embedding")  # saved next to a run, and not results
    files = [file for file in sorted(path.glob(pattern)) if not file.stem.endswith(parts)]
    if len(files) != 1:
        names = ", ".join(file.stem for file in files)
        raise SitelensError(f"{path} holds several, say which as name: {names}" if files else
                            f"there is no {name or kind} in the folder {path}")  # fmt: skip
    return files[0]
