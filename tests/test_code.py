"""The digest of a user's code: equal for equal computations, different for any change of the computation."""

from __future__ import annotations

import functools
import re
import threading
import types
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from sitelens.store.code import code_digest

BEFORE = """
import math
import re
LIMIT = 3
WORDS = {"a": [1, 2]}
PATTERN = re.compile("x+")
def helper(x):
    return x + LIMIT
def target(x, scale=2, *, shift=1):
    '''What it does.'''
    def inner(y):
        return helper(y) * scale + len(WORDS) + math.floor(y)
    return inner(x) + shift + bool(PATTERN.match("x"))
class Kind:
    width = 3
    def __init__(self, a): self.a = a
    @property
    def half(self): return helper(self.a) / 2
    @staticmethod
    def again(x): return Kind(x)
"""


def module(text: str) -> Any:
    made = types.ModuleType("mine")
    exec(compile(text, "mine.py", "exec"), vars(made))
    return made


CHANGES = {
    "a constant of the module": ("LIMIT = 3", "LIMIT = 4"),
    "a value within a dict": ("[1, 2]", "[1, 3]"),
    "a pattern": ('"x+"', '"x*"'),
    "a function that it calls": ("return x + LIMIT", "return x - LIMIT"),
}
OF_TARGET = {
    "its own code": ("+ shift", "- shift"),
    "a default": ("scale=2", "scale=3"),
    "a default by keyword": ("shift=1", "shift=2"),
    "a function within it": ("* scale", "/ scale"),
    "what it calls of a library": ("math.floor", "math.ceil"),
}
OF_KIND = {
    "an attribute": ("width = 3", "width = 4"),
    "a property": ("/ 2", "/ 3"),
    "a static method": ("return Kind(x)", "return Kind(-x)"),
}


@pytest.mark.parametrize("name", ["target", "Kind"])
def test_the_same_text_has_the_same_digest(name: str) -> None:
    first = code_digest(getattr(module(BEFORE), name))
    assert first is not None and first == code_digest(getattr(module("\n\n" + BEFORE), name))


@pytest.mark.parametrize("change", [*CHANGES, *OF_TARGET])
def test_whatever_changes_a_function_changes_its_digest(change: str) -> None:
    old, new = (CHANGES | OF_TARGET)[change]
    assert BEFORE.count(old) == 1
    assert code_digest(module(BEFORE).target) != code_digest(module(BEFORE.replace(old, new)).target)


@pytest.mark.parametrize("change", ["a constant of the module", "a function that it calls", *OF_KIND])
def test_whatever_changes_a_class_changes_its_digest(change: str) -> None:
    old, new = (CHANGES | OF_KIND)[change]
    assert code_digest(module(BEFORE).Kind) != code_digest(module(BEFORE.replace(old, new)).Kind)


def test_what_is_not_referred_to_does_not_matter() -> None:
    assert code_digest(module(BEFORE).target) == code_digest(module(BEFORE + "OTHER = open\n").target)


def above(limit: Any) -> Any:
    return lambda x: x > limit


@dataclass(frozen=True)
class Rule:
    """A callable with a field."""

    limit: float

    def __call__(self, x: float) -> bool:
        return x > self.limit


def test_functions_of_one_text_are_told_apart_by_what_they_hold() -> None:
    for make in (above, Rule, lambda limit: functools.partial(max, limit), lambda limit: Rule(limit).__call__):
        assert code_digest(make(3)) == code_digest(make(3)) is not None
        assert code_digest(make(3)) != code_digest(make(4))
    assert code_digest(above(torch.tensor([1.0]))) != code_digest(above(torch.tensor([2.0])))
    assert code_digest(above(re.compile("a"))) != code_digest(above(re.compile("b")))
    assert code_digest(above(True)) != code_digest(above(1))


def test_what_cannot_be_told_has_no_digest() -> None:
    for held in (threading.Lock(), object(), iter([1])):
        assert code_digest(above(held)) is None
