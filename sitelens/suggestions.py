"""Which known names are near an unknown one: every "did you mean" of an error message comes from here."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

CUTOFF = 0.6  # of difflib's ratio, 2 x matching characters / all characters of both names


def nearest(name: object, known: Iterable[object], n: int = 2) -> list[str]:
    """The n known names most like `name`, without regard to case, the nearest first; fewer where few are near."""
    names = {text.lower(): text for text in reversed([str(other) for other in known])}
    return [names[match] for match in difflib.get_close_matches(str(name).lower(), names, n=n, cutoff=CUTOFF)]


def did_you_mean(name: object, known: Iterable[object], n: int = 2) -> str:
    """The question "did you mean a, b or c?"; empty where no known name is near."""
    names = nearest(name, known, n)
    if not names:
        return ""
    return f"did you mean {' or '.join([', '.join(names[:-1]), names[-1]] if names[1:] else names)}?"
