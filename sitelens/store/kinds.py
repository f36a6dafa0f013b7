"""The kinds of artifacts."""

from __future__ import annotations

from enum import StrEnum


class Kind(StrEnum):
    """The kind of an artifact: those in `cached_kinds` are cached results, the others are files that users save."""

    EMBEDDING = "embedding"
    SELECTION = "selection"
    TRAINING = "training"  # state of an unfinished training
    SCORES = "scores"
    METHOD = "method"
    COMPARISON = "comparison"
    CONDITION = "condition"
    TRANSFER = "transfer"

    @staticmethod
    def cached_kinds() -> list[Kind]:
        """The kinds that the cache holds."""
        return [kind for kind in Kind if kind not in (Kind.CONDITION, Kind.TRANSFER)]
