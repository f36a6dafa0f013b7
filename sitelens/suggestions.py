"""Suggestions for error messages: the known names that are most similar to an unknown one."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

CUTOFF = 0.6  # minimum similarity: difflib's ratio, 2 x matching characters / total characters of both names


def nearest(name: object, known: Iterable[object], n: int = 2) -> list[str]:
    """At most `n` known names that are similar to `name`, ignoring case; the most similar first."""
    names = {text.lower(): text for text in reversed([str(other) for other in known])}
    return [names[match] for match in difflib.get_close_matches(str(name).lower(), names, n=n, cutoff=CUTOFF)]


def did_you_mean(name: object, known: Iterable[object], n: int = 2) -> str:
    """The text "did you mean a, b or c?" with at most `n` known names; empty if none is similar."""
    names = nearest(name, known, n)
    if not names:
        return ""
    return f"did you mean {' or '.join([', '.join(names[:-1]), names[-1]] if names[1:] else names)}?"
