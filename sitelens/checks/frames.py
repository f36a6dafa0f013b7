"""Lossless conversion of DataFrames to tensors and plain JSON and back, with checks when they are read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import pandas as pd
import torch
from torch import Tensor

from sitelens.errors import SitelensError

ColumnType = Literal["float64", "int64", "Int64", "bool", "text"]
IN_TENSORS: dict[str, torch.dtype] = {"float64": torch.float64, "int64": torch.int64}
IN_LISTS: dict[str, tuple[type, ...]] = {"Int64": (int, type(None)), "bool": (bool,), "text": (str, type(None))}


@dataclass(frozen=True)
class Column:
    """A DataFrame column in a file; float64 and int64 values are in a tensor named by the column's index ("0")"""

    name: str
    type: ColumnType
    values: list[Any] | None = None


def packed_frame(frame: pd.DataFrame) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    """The tensors and the JSON list from which `unpacked_frame` restores a DataFrame, except its index."""
    tensors: dict[str, Tensor] = {}
    columns: list[dict[str, Any]] = []
    for place, name in enumerate(frame.columns):
        column = frame.iloc[:, place]
        kind = _type(column)
        columns.append({"name": str(name), "type": kind})
        if kind in IN_TENSORS:
            tensors[str(place)] = torch.tensor(column.to_numpy(kind), dtype=IN_TENSORS[kind])
        else:
            make = {"Int64": int, "bool": bool, "text": str}[kind]
            columns[-1]["values"] = [None if pd.isna(value) else make(value) for value in column]
    return tensors, columns


def unpacked_frame(columns: list[Column], tensors: Mapping[str, Tensor], where: str) -> pd.DataFrame:
    """The DataFrame that `packed_frame` packed.

    Args:
        columns: the columns in order.
        tensors: values of numeric columns, by index of the column as text.
        where: what messages call the frame.

    Raises:
        SitelensError: naming the invalid column.
    """
    series: dict[str, pd.Series] = {}
    for place, column in enumerate(columns):
        what = f"{where}: the column {column.name[:60]!r}"
        if column.name in series:
            raise SitelensError(f"{what} stands twice")
        values, tensor = column.values, tensors.get(str(place))
        if column.type in IN_TENSORS:
            if values is not None or tensor is None or tensor.ndim != 1 or tensor.dtype != IN_TENSORS[column.type]:
                raise SitelensError(f"{what} must be a tensor of {column.type}")
            series[column.name] = pd.Series(tensor.numpy())
        else:
            if tensor is not None or values is None or any(type(v) not in IN_LISTS[column.type] for v in values):
                raise SitelensError(f"{what} must be a list of {column.type}")
            if column.type == "Int64" and any(v is not None and not -(2**63) <= v < 2**63 for v in values):
                raise SitelensError(f"{what} holds an integer that is too large")
            series[column.name] = pd.Series(values, dtype=_dtype(column))
    if not set(tensors) <= set(map(str, range(len(columns)))) or len(set(map(len, series.values()))) > 1:
        raise SitelensError(f"{where}: the columns must have one length, and no tensor stands alone")
    return pd.DataFrame(series)


def _type(column: pd.Series) -> ColumnType:
    if pd.api.types.is_bool_dtype(column.dtype) and not column.isna().any():
        return "bool"
    if pd.api.types.is_integer_dtype(column.dtype):
        return "Int64" if pd.api.types.is_extension_array_dtype(column.dtype) else "int64"
    return "float64" if pd.api.types.is_float_dtype(column.dtype) else "text"


def _dtype(column: Column) -> Any:
    """The dtype for pandas; None lets pandas choose how it stores texts."""
    if column.type != "text":
        return column.type
    return None if any(value is not None for value in column.values or ()) else object
