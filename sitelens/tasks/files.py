"""Reading of task files: CSV, TSV, JSON and JSON Lines."""

from __future__ import annotations

import codecs
import csv
import io
import json
import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from sitelens.errors import SitelensError
from sitelens.suggestions import nearest

TABLES = {".csv": None, ".tsv": "\t", ".tab": "\t"}  # separator implied by the suffix; None: detected
LINES = (".jsonl", ".ndjson")
ENDINGS = (*TABLES, *LINES, ".json")
SPLIT_SEED = 32  # the seed of the Function Vectors tasks
SEPARATORS = ",;\t|"  # tried in this order if neither `sep` nor the suffix decides
SPLIT_NAMES = {"train": "train", "training": "train", "valid": "valid", "validation": "valid", "val": "valid",
               "dev": "valid", "test": "test", "testing": "test"}  # fmt: skip
OPTIONAL = {("also", "also"), ("split", "split")}
FIELD_LIMIT = 2**31 - 1  # characters in a cell; Python's own limit is 131072


@dataclass(frozen=True)
class Columns:
    """Names of the columns of a task file, matched exactly, or else ignoring case and surrounding spaces.

    Attributes:
        input, output: columns of the input and its preferred answer; required.
        also, split: columns of further answers and of the split; optional unless they have another name than the
            default. None ignores the column.
    """

    input: Hashable = "input"
    output: Hashable = "output"
    also: Hashable | None = "also"
    split: Hashable | None = "split"

    def places(self, header: Sequence[Hashable], where: str) -> dict[str, int]:
        """Index in the header of the columns for input, output, also and split, as far as they exist.

        Raises:
            SitelensError: if a required column is missing, or two columns have the same name.
        """
        names = {"input": self.input, "output": self.output, "also": self.also, "split": self.split}
        names = {part: name for part, name in names.items() if name is not None}
        places = {part: _find(name, header, where) for part, name in names.items()}
        missing = [part for part, index in places.items() if index is None and (names[part], part) not in OPTIONAL]
        if missing:
            raise SitelensError(self._explain(missing, names, places, header, where))
        return {part: index for part, index in places.items() if index is not None}

    def _explain(
        self,
        missing: Sequence[str],
        names: Mapping[str, Hashable],
        places: Mapping[str, int | None],
        header: Sequence[Hashable],
        where: str,
    ) -> str:
        labels = [str(label) for label in header]
        taken = [labels[index] for index in places.values() if index is not None]
        others = [label for label in labels if label not in taken]
        near = {part: nearest(names[part], others, n=1) for part in missing}
        hints = [f"{part}={names[0]!r}" for part, names in near.items() if names]
        hint = ", ".join(hints) or ", ".join(f"{part}=..." for part in missing)
        columns = ", ".join(labels) or "none"
        return (f"{where}: no column {' or '.join(str(names[part]) for part in missing)}; there are: {columns} "
                f"(name the columns with {hint})")  # fmt: skip


def read_file(path: Path, columns: Columns | None = None, sep: str | None = None) -> dict[str, Any]:
    """The content of a task file: items under "examples", or under "train", "valid" and "test" if it has splits.

    If a JSON file holds an object, its other keys are returned as well.

    Args:
        path: a file with the suffix .csv, .tsv, .tab, .json, .jsonl or .ndjson.
        columns: names of the columns or keys.
        sep: separator of a table (default: from the suffix or the header).

    Raises:
        SitelensError: if the file is missing, cannot be read, or is not in the format of its suffix.
    """
    ending = path.suffix.lower()
    if sep is not None and ending not in TABLES:
        raise SitelensError(f"{path}: sep is for .csv and .tsv files")
    text = _text(path)
    columns = columns or Columns()
    if ending in TABLES:
        return by_split(_table(text, path, columns, sep or TABLES[ending]), str(path))
    if ending in LINES:
        numbered = [(number, line) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]
        items = [_json(line, f"{path}, line {number}") for number, line in numbered]
        return by_split(_renamed(items, columns, path), str(path))
    content = _json(text, str(path))
    if isinstance(content, list):
        return by_split(_renamed(content, columns, path), str(path))
    if not isinstance(content, dict):
        raise SitelensError(f"{path} must hold a list of items or an object, not {type(content).__name__}")
    named: dict[str, Any] = {SPLIT_NAMES.get(key) or str(key): value for key, value in content.items()}
    lists = {key: value for key, value in named.items() if key in ("examples", "train", "valid", "test")}
    return named | {
        key: _renamed(items, columns, path) if isinstance(items, list) else items for key, items in lists.items()
    }


def frame_rows(frame: pd.DataFrame, columns: Columns, where: str) -> list[dict[str, Any]]:
    """The rows of a DataFrame as items with the keys input, output, also and split.

    Raises:
        SitelensError: if a column is missing.
    """
    places = columns.places(list(frame.columns), where)
    # Not .tolist(), which turns a 32-bit 0.1 into 0.10000000149011612.
    cells = {part: list(frame.iloc[:, index].array) for part, index in places.items()}
    return [dict(zip(cells, row, strict=True)) for row in zip(*cells.values(), strict=True)]


def by_split(rows: Sequence[Any], where: str) -> dict[str, Any]:
    """Items grouped by their key "split" under "train", "valid" and "test"; without that key, all under "examples".

    Raises:
        SitelensError: for an unknown split, an item without one, or a split without items.
    """
    if not any(isinstance(row, Mapping) and "split" in row for row in rows):
        return {"examples": list(rows)}
    parts: dict[str, list[Any]] = {"train": [], "valid": [], "test": []}
    for number, row in enumerate(rows, start=1):
        value = row.get("split") if isinstance(row, Mapping) else None
        split = SPLIT_NAMES.get(value.strip().lower()) if isinstance(value, str) else None
        if split is None:
            raise SitelensError(f"{where}, item {number}: the split must be train, valid or test, not {value!r} "
                                "(split=None ignores the column)")  # fmt: skip
        parts[split].append({key: cell for key, cell in row.items() if key != "split"})
    for split, items in parts.items():
        if not items:
            raise SitelensError(f"{where}: the {split} split is empty (split=None ignores the split column)")
    return parts


def _text(path: Path) -> str:
    if not path.is_file():
        raise SitelensError(f"there is no task file {path}")
    try:
        data = path.read_bytes()
    except OSError as error:
        raise SitelensError(f"{path} cannot be read: {error.strerror or error}") from error
    wide = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        return data.decode("utf-16" if wide else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise SitelensError(f"{path} is not UTF-8 text: {error}; save it as UTF-8") from error


def _json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:  # also raised for numbers with thousands of digits
        raise SitelensError(f"{where} is not JSON: {error}") from error
    except RecursionError as error:
        raise SitelensError(f"{where} is nested too deeply") from error


def _renamed(items: list[Any], columns: Columns, path: Path) -> list[Any]:
    """Objects with their columns renamed to input, output, also and split."""
    if columns == Columns():
        return items
    renamed: list[Any] = []
    for number, item in enumerate(items, start=1):
        if not isinstance(item, Mapping):
            raise SitelensError(
                f"{path}, item {number}: columns are named, so each item must be an object, not {item!r}"
            )
        keys = list(item)
        places = columns.places(keys, f"{path}, item {number}")
        renamed.append({part: item[keys[index]] for part, index in places.items()})
    return renamed


def _table(text: str, path: Path, columns: Columns, sep: str | None) -> list[dict[str, Any]]:
    """The non-empty rows of a table."""
    lines = io.StringIO(text, newline="")
    first = lines.readline()
    if first.lower().startswith("sep=") and len(first.strip()) == 5:  # how Excel declares the separator
        sep = sep or first.strip()[-1]
        skipped = 1
    else:
        lines.seek(0)
        skipped = 0
    if sep is not None and len(sep) != 1:
        raise SitelensError(f"{path}: sep must be one character, not {sep!r}")
    sep = sep or _separator(text[lines.tell() :], columns, path)
    limit = csv.field_size_limit(FIELD_LIMIT)
    reader = csv.reader(lines, delimiter=sep, strict=True)
    try:
        header = next((row for row in reader if any(cell.strip() for cell in row)), [])
        places = columns.places(header, str(path))
        rows = []
        for cells in reader:
            if any(cell.strip() for cell in cells):
                rows.append(_row(cells, header, places, f"{path}, item {len(rows) + 1}"))
    except csv.Error as error:
        raise SitelensError(
            f"{path}, line {reader.line_num + skipped}: {error}; is a quotation mark not closed?"
        ) from error
    finally:
        csv.field_size_limit(limit)
    return rows


def _row(cells: Sequence[str], header: Sequence[str], places: Mapping[str, int], where: str) -> dict[str, Any]:
    if any(cell.strip() for cell in cells[len(header) :]):
        raise SitelensError(f"{where}: {len(cells)} fields, but the header has {len(header)}; quote a text that "
                            "contains the separator")  # fmt: skip
    return {part: cells[index] if index < len(cells) else None for part, index in places.items()}


def _separator(text: str, columns: Columns, path: Path) -> str:
    """The first separator for which the header contains all required columns; a comma if there is none."""
    header = next((line for line in text.splitlines() if line.strip()), "")
    for sep in SEPARATORS:
        try:
            columns.places(next(csv.reader([header], delimiter=sep), []), str(path))
        except (SitelensError, csv.Error):
            continue
        return sep
    return ","


def _find(name: Hashable, header: Iterable[Hashable], where: str) -> int | None:
    exact, close = [], []
    for index, label in enumerate(header):
        if label == name:
            exact.append(index)
        elif isinstance(label, str) and isinstance(name, str) and label.strip().lower() == name.strip().lower():
            close.append(index)
    matches = exact or close
    if len(matches) > 1:
        raise SitelensError(f"{where}: {len(matches)} columns are named {name!r}; names must differ")
    return matches[0] if matches else None


def function_vectors_split(n: int, seed: int = SPLIT_SEED) -> tuple[list[int], list[int], list[int]]:
    """Indices of train, valid and test (70%, 9%, 21%), split like the Function Vectors tasks.

    Todd et al. call scikit-learn's train_test_split twice with seed 32. For a test size t, it takes the first ceil(t n)
    indices of `RandomState(seed).permutation(n)` as the test part and the following ones as the train part.

    Args:
        n: number of items.
        seed: seed of both permutations.

    Source:
        Todd et al., "Function Vectors in Large Language Models", ICLR 2024; repository ericwtodd/function_vectors.
    """

    def halves(indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        order = np.random.RandomState(seed).permutation(len(indices))
        cut = math.ceil(0.3 * len(indices))
        return indices[order[cut:]], indices[order[:cut]]

    train, rest = halves(np.arange(n))
    test, valid = halves(rest)
    return train.tolist(), valid.tolist(), test.tolist()
