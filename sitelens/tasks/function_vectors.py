"""The 57 tasks of Todd et al., "Function Vectors in Large Language Models", ICLR 2024 (MIT license).

Files come from the authors' repository at a pinned commit, or from `SITELENS_DATA/function_vectors` in the same layout;
they are checked against known SHA-256 checksums.
"""

from __future__ import annotations

from sitelens.tasks.examples import Example, note_on_shared_inputs
from sitelens.tasks.pinned import PinnedFiles
from sitelens.tasks.suite import Suite
from sitelens.tasks.task import Task, random_split

COMMIT = "fb9eac7b6dc707ea1475a717379916007fe448d5"
FILES = PinnedFiles(
    suite="fv",
    repository="ericwtodd/function_vectors",
    commit=COMMIT,
    address=f"https://raw.githubusercontent.com/ericwtodd/function_vectors/{COMMIT}/dataset_files/",
    folder="function_vectors",
    fields=("input", "output"),
)


class FunctionVectors(Suite):
    """The suite of the 57 Function Vectors tasks, named "fv/NAME"."""

    name = "fv57"

    @property
    def source(self) -> str:  # type: ignore[override]
        """Repository and commit of the files."""
        return FILES.source

    def names(self) -> list[str]:
        """The names of the 57 tasks, sorted."""
        return [f"fv/{name}" for name in sorted(FILES.registry)]

    def load(self, name: str) -> Task:
        """A task, split as upstream splits it.

        Raises:
            SitelensError: if the file can neither be found nor downloaded, or is not the expected one.
        """
        items = FILES.items(_own(name))
        train, valid, test = random_split([Example(item["input"], item["output"]) for item in items])
        shared = note_on_shared_inputs(train, test)
        return Task(
            name, self.source, train, valid, test, published_metric="prefix_match", case_sensitive=is_about_case(name),
            note=f"{shared} (as upstream)" if shared else "",
        )  # fmt: skip

    def describe(self, name: str) -> str:
        """The paper it comes from."""
        return "Todd et al. 2024"

    def group(self, name: str) -> str:
        """Either "extractive" or "abstractive", as upstream classifies the task."""
        return FILES.registry[_own(name)]["category"]

    def n_items(self, name: str) -> int | None:
        """The number of items; None if it is not known."""
        return FILES.registry[_own(name)]["examples"]


def _own(name: str) -> str:
    return name.removeprefix("fv/")


def is_about_case(name: str) -> bool:
    """Whether a task of this name is case-sensitive, by the rule of SITE's released code."""
    return "capitalize" in name or "lowercase" in name
