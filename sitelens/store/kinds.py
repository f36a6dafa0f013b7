"""The kinds of artifacts."""

from __future__ import annotations

from enum import StrEnum


class Kind(StrEnum):
    """What an artifact is. Those of `cached_kinds` are results in the cache, the others files that a user saves."""

    EMBEDDING = "embedding"
    SELECTION = "selection"
    TRAINING = "training"  # the state of a training that was interrupted
    SCORES = "scores"
    METHOD = "method"
    COMPARISON = "comparison"
    CONDITION = "condition"
    TRANSFER = "transfer"

    @staticmethod
    def cached_kinds() -> list[Kind]:
        """The kinds that the cache holds."""
        return [kind for kind in Kind if kind not in (Kind.CONDITION, Kind.TRANSFER)]
