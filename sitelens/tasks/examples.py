"""Examples (the items of a task), and their construction from pairs and objects."""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from numbers import Rational, Real
from typing import Any

import numpy as np
import pandas as pd

from sitelens.errors import SitelensError, SitelensWarning


@dataclass(frozen=True)
class Example:
    """One item of a task.

    Args:
        input: text of the input, without template.
        output: the preferred answer.
        also: other accepted answers.

    Example:
        >>> sl.Example("color of the sky", "blue", also=("azure",)).answers
        ('blue', 'azure')
    """

    input: str
    output: str
    also: tuple[str, ...] = ()

    @property
    def answers(self) -> tuple[str, ...]:
        """All accepted answers, the preferred one first."""
        return (self.output, *self.also)


def parse_examples(items: Any, where: str) -> list[Example]:
    """Examples from pairs, triples (with further answers), objects or Examples.

    Args:
        items: the items.
        where: beginning of messages.

    Raises:
        SitelensError: naming the invalid item (counted from 1) and the reason.
    """
    return [_example(item, f"{where}item {number}") for number, item in enumerate(items, start=1)]


def check_text(text: object, what: str) -> None:
    """Raise SitelensError unless `text` is a non-empty text that can be encoded and has no NUL character."""
    if not isinstance(text, str) or not text.strip():
        raise SitelensError(f"{what} must be text and not empty, not {text!r}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise SitelensError(
            f"{what}, {text!r}, is not Unicode: it has half of a surrogate pair at {error.start}"
        ) from None
    if "\0" in text:
        raise SitelensError(f"{what}, {text!r}, has a NUL character: was a file read in the wrong encoding?")


def warn_about_repeats(name: str, examples: Sequence[Example]) -> None:
    """Issue warnings about exact copies, and about inputs that occur with different outputs."""
    repeats = [example for example, count in Counter(examples).items() if count > 1]
    if repeats:
        text = (
            f"task {name!r}: {len(repeats)} items occur more than once, for example {repeats[0].input!r}; "
            "copies may fall into different splits"
        )
        warnings.warn(text, SitelensWarning, stacklevel=3)
    outputs: dict[str, set[str]] = {}
    for example in examples:
        outputs.setdefault(example.input, set()).add(example.output)
    clashes = [f"{source!r}: {', '.join(sorted(answers))}" for source, answers in outputs.items() if len(answers) > 1]
    if clashes:
        more = f" and {len(clashes) - 5} more" if len(clashes) > 5 else ""
        text = f"task {name!r}: the same input with different outputs: {'; '.join(clashes[:5])}{more}"
        warnings.warn(text, SitelensWarning, stacklevel=3)


def note_on_shared_inputs(train: Sequence[Example], test: Sequence[Example]) -> str:
    """A note on the number of inputs that occur in both splits; empty if there are none."""
    n_shared = len({example.input for example in train} & {example.input for example in test})
    return f"{n_shared} inputs of train also stand in test" if n_shared else ""


def _example(item: Any, where: str) -> Example:
    if isinstance(item, Example):
        source, output, also = item.input, item.output, item.also
    elif isinstance(item, Mapping):
        missing = [key for key in ("input", "output") if item.get(key) is None]
        if missing:
            raise SitelensError(f"{where}: no {' and no '.join(missing)} in {dict(item)!r}")
        source, output, also = item["input"], item["output"], item.get("also")
    elif isinstance(item, Sequence) and not isinstance(item, str | bytes) and len(item) in (2, 3):
        source, output, also = (*item, None) if len(item) == 2 else item
    else:
        raise SitelensError(f"{where}: {item!r} is neither a pair (input, output) nor an object with these fields")
    further = _listed(also, where)
    if isinstance(output, list | tuple):  # several accepted answers, the preferred one first
        further = [*output[1:], *further]
        output = output[0] if output else ""
    source, output, *further = (_as_text(value, where).strip() for value in (source, output, *further))
    if not source:
        raise SitelensError(f"{where}: the input is empty")
    if not output:
        raise SitelensError(f"{where}: the output of {source!r} is empty")
    return Example(source, output, tuple(dict.fromkeys(text for text in further if text and text != output)))


def _listed(also: Any, where: str) -> list[Any]:
    if isinstance(also, str):
        return also.split("|")
    if isinstance(also, list | tuple | np.ndarray):
        return list(also)
    if also is None or (not isinstance(also, Mapping) and pd.isna(also)):  # an empty cell
        return []
    raise SitelensError(f"{where}: also must be a list of text, or text with | between answers, not {also!r}")


def _as_text(value: Any, where: str) -> str:
    """A text unchanged; a number in plain decimal notation (2.0 as "2", 0.1 as "0.1" in any precision, no exponent)."""
    if isinstance(value, str):
        return str(value)
    if not isinstance(value, Real | Decimal) or isinstance(value, bool | np.bool_):
        raise SitelensError(f"{where}: input, output and also must be text or numbers, not {value!r}")
    number: Any = value
    if isinstance(number, Rational):
        return str(number)
    if not math.isfinite(number):
        raise SitelensError(f"{where}: {number!r} is no finite number; give every item a value")
    if isinstance(number, Decimal):  # all its digits are significant
        return format(number, "f")
    return str(int(number)) if number == int(number) else np.format_float_positional(number, trim="-")
