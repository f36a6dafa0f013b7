"""Heads of a model: parsing their names, listing them, and tables with one row per head."""

from __future__ import annotations

import operator
import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sitelens.errors import SitelensError
from sitelens.models.model import Model

if TYPE_CHECKING:
    Head = tuple[int, int] | str  # (10, 6), "L10H6" or "10.6"
    Heads = Iterable[Head] | Head | Bool[Tensor, "layer head"] | pd.DataFrame
else:
    Head = Heads = Any  # checked by the functions below, which also accept numpy numbers
HEAD = re.compile(r"L?(\d+)(?:H|\.)(\d+)", re.IGNORECASE)


def checked_heads(heads: Heads, model: Model) -> list[tuple[int, int]]:
    """Heads of `model` as (layer, head), in the order given.

    Raises:
        SitelensError: as `head_pairs`.
    """
    return head_pairs(heads, *model.shape[:2])


def all_heads(model: Model) -> list[tuple[int, int]]:
    """Every head of a model as (layer, head), layer by layer."""
    return _grid(*model.shape[:2])


def per_head(values: Float[Tensor, "layer head"], name: str) -> pd.DataFrame:
    """A DataFrame with one row per head: layer, head, and its value in the column `name`."""
    return pd.DataFrame(_grid(*values.shape), columns=["layer", "head"]).assign(**{name: values.flatten().tolist()})


def _grid(layers: int, heads: int) -> list[tuple[int, int]]:
    return [(layer, head) for layer in range(layers) for head in range(heads)]


def head_pairs(heads: Heads, layers: int, width: int) -> list[tuple[int, int]]:
    """Heads as (layer, head), in the order given, checked against a model's shape.

    Args:
        heads: as for `parsed_heads`.
        layers: number of layers.
        width: number of heads per layer.

    Raises:
        SitelensError: as `parsed_heads`, or if there is no such head.
    """
    mask = _as_mask(heads)
    if mask is not None and (mask.dtype != torch.bool or tuple(mask.shape) != (layers, width)):
        raise SitelensError(
            f"a mask of heads must be boolean of shape {(layers, width)}, not {mask.dtype} {tuple(mask.shape)}"
        )
    pairs = parsed_heads(heads)
    for layer, head in pairs:
        if not (0 <= layer < layers and 0 <= head < width):
            raise SitelensError(f"there is no head ({layer}, {head}): layers 0 to {layers - 1}, heads 0 to {width - 1}")
    return pairs


def parsed_heads(heads: Heads) -> list[tuple[int, int]]:
    """Heads as (layer, head), in the order given.

    Args:
        heads: one head, written (10, 6), "L10H6" or "10.6"; several heads, in a sequence or in one text separated by
            commas or spaces; a boolean mask `[layer head]`; or a DataFrame with the columns layer and head.

    Raises:
        SitelensError: for anything else.
    """
    given: Any = heads
    if (mask := _as_mask(heads)) is not None:
        if mask.dtype != torch.bool or mask.ndim != 2:
            raise SitelensError(f"a mask of heads must be boolean [layer head], not {mask.dtype} {tuple(mask.shape)}")
        given = mask.nonzero().tolist()
    elif isinstance(heads, pd.DataFrame):
        if not {"layer", "head"} <= set(heads.columns):
            columns = ", ".join(map(str, heads.columns))
            raise SitelensError(f"a table of heads needs the columns layer and head, it has {columns}")
        given = list(zip(heads["layer"], heads["head"], strict=True))
    elif isinstance(heads, Tensor | np.ndarray):
        given = heads.tolist()
    elif isinstance(heads, str):
        given = heads.replace(",", " ").split()
    elif isinstance(heads, tuple) and len(heads) == 2 and all(map(_is_number, heads)):
        given = [heads]
    if not isinstance(given, Iterable):
        raise SitelensError(f"heads are pairs (layer, head) or names such as L10H6, not {heads!r}")
    return [_pair(head) for head in given]


def _as_mask(heads: Any) -> Tensor | None:
    """Heads given as a mask (or as an array that is meant to be one), as a tensor; else None."""
    if not isinstance(heads, Tensor | np.ndarray):
        return None
    mask = torch.as_tensor(heads)
    return mask if mask.dtype == torch.bool or mask.ndim != 2 or mask.shape[1] != 2 else None


def _pair(head: Any) -> tuple[int, int]:
    """One head as (layer, head), in any notation."""
    match = HEAD.fullmatch(head.strip()) if isinstance(head, str) else None
    if match:
        return int(match[1]), int(match[2])
    try:
        if isinstance(head, str):
            raise ValueError
        layer, place = head
        if _is_number(layer) and _is_number(place) and int(layer) == layer and int(place) == place:
            return int(layer), int(place)
    except (TypeError, ValueError):
        pass
    raise SitelensError(f"a head is a pair (layer, head) or a name such as L10H6, not {head!r}")


def _is_number(value: Any) -> bool:
    """Whether a value is a number, also of numpy or torch; floats count, as DataFrames may hold heads as floats."""
    if isinstance(value, (bool, np.bool_)):
        return False
    try:
        operator.index(value)
    except (TypeError, ValueError, RuntimeError):
        return isinstance(value, (float, np.floating)) and bool(np.isfinite(value))
    return True
