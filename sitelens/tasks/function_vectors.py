"""The 57 tasks of Todd et al., "Function Vectors in Large Language Models", ICLR 2024 (MIT license).

Files come from the authors' repository at a pinned commit and are checked against known SHA-256 sums, or from
`SITELENS_DATA/function_vectors` in the same layout.
"""

from __future__ import annotations

from typing import Any

from sitelens.tasks.pinned import PinnedFiles

COMMIT = "fb9eac7b6dc707ea1475a717379916007fe448d5"
FILES = PinnedFiles(
    suite="fv",
    repository="ericwtodd/function_vectors",
    commit=COMMIT,
    address=f"https://raw.githubusercontent.com/ericwtodd/function_vectors/{COMMIT}/dataset_files/",
    folder="function_vectors",
    fields=("input", "output"),
)


def names() -> list[str]:
    """The names of the 57 tasks, as `load_task` knows them, sorted."""
    return [f"fv/{name}" for name in sorted(registry())]


def registry() -> dict[str, dict[str, Any]]:
    """name -> category, sha256 (None: not known), bytes, examples, of every task."""
    return FILES.registry


def items(name: str) -> list[dict[str, Any]]:
    """The task's examples as upstream wrote them.

    Raises:
        SitelensError: if the file can neither be found nor downloaded, or is not the expected one.
    """
    return FILES.items(name)


def about_case(name: str) -> bool:
    """Whether a task of this name tells upper case from lower case, by the rule of SITE's released code."""
    return "capitalize" in name or "lowercase" in name
