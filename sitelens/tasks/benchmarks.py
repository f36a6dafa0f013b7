"""Benchmarks as suites: ANLI (one task per round), MMLU-Pro (per category), BIG-Bench Hard (BBH; per task).

Files come from `SITELENS_DATA` (`anli`, `mmlu_pro`, `bbh`) or are downloaded: ANLI and MMLU-Pro by the `datasets`
library, BBH from its authors' repository at a pinned commit with known SHA-256 checksums.

These benchmarks are usually posed with instructions. Here they use the question-and-answer template of all other tasks,
so that heads are compared under one format; the choice of each item's input and output is this library's own. Outputs
differ in their first token wherever the benchmark allows it, because SITE is trained on the first token.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from string import ascii_uppercase
from typing import Any

from sitelens.errors import SitelensError, SitelensWarning
from sitelens.files.writing import write_text
from sitelens.settings import settings
from sitelens.tasks.examples import Example, note_on_shared_inputs
from sitelens.tasks.pinned import PinnedFiles
from sitelens.tasks.rows import file_rows, hub_rows, local_file
from sitelens.tasks.suite import Suite
from sitelens.tasks.task import Task, check_number, random_split

Parts = dict[str, tuple[Example, ...]]
"""Items by the name that upstream gives a split: train, development and test, or the only one."""

LABELS = ("entailment", "neutral", "contradiction")
LEAST_TRAIN = 11  # ten demonstrations and a query
HYPOTHESIS = "\nHypothesis: "  # between the premise and the hypothesis of an ANLI input
ANLI, MMLU_PRO = "facebook/anli", "TIGER-Lab/MMLU-Pro"  # names on the Hugging Face hub

_COMMIT = "9ee07bd481feebf959a6b59d61ea57bdcf30964d"
BBH_FILES = PinnedFiles(
    suite="bbh",
    repository="suzgunmirac/BIG-Bench-Hard",
    commit=_COMMIT,
    address=f"https://raw.githubusercontent.com/suzgunmirac/BIG-Bench-Hard/{_COMMIT}/bbh/",
    folder="bbh",
    fields=("input", "target"),
    key="examples",
)

ROUNDS: dict[str, int | None] = {"r1": None, "r2": None, "r3": None}  # items: depends on the available splits
CATEGORIES: dict[str, int | None] = {
    "biology": 717, "business": 789, "chemistry": 1132, "computer science": 410, "economics": 844, "engineering": 969,
    "health": 818, "history": 381, "law": 1101, "math": 1351, "other": 924, "philosophy": 499, "physics": 1299,
    "psychology": 798,
}  # fmt: skip


def anli(round_: str) -> Parts:
    """The items of one round ("r1", "r2" or "r3") of Adversarial NLI, by split.

    Input: the premise and, on a new line after "Hypothesis:", the hypothesis. Output: the name of the label in the data
    set, an English word; the three labels begin with different tokens.

    Uses all three official splits if they are available and large enough, otherwise only the development set. (A local
    folder may hold only the development set; the hub has all three.)

    Source:
        Nie et al. 2020, arXiv:1910.14599 (CC BY-NC 4.0).

    Raises:
        SitelensError: if the data can neither be found nor loaded, or for an item that cannot be used.
    """
    train, dev, test = splits = [f"{split}_{round_}" for split in ("train", "dev", "test")]
    local = {split: path for split in splits if (path := local_file(f"anli/{split}.jsonl"))}
    if dev in local:
        chosen = splits if len(local) == 3 else [dev]
        rows = {split: file_rows(local[split]) for split in chosen}
    else:
        files = f"anli/{dev}.jsonl (and anli/{train}.jsonl and anli/{test}.jsonl for the official splits)"
        rows = {split: hub_rows(f"anli/{round_}", ANLI, split, files) for split in splits}
    parts = {split: tuple(_inference(row, where) for where, row in found) for split, found in rows.items()}
    for split, found in rows.items():
        content = [[row["premise"], row["hypothesis"], row["label"]] for _, row in found]
        _check_content(f"anli/{split}", content, local[split] if dev in local else None, ANLI)
    enough = len(parts) == 3 and len(parts[train]) >= LEAST_TRAIN and parts[dev] and parts[test]
    return parts if enough else {dev: parts[dev]}


def premise(text: str) -> str:
    """The premise in the input of an ANLI item."""
    return text.rpartition(HYPOTHESIS)[0]


def mmlu_pro(slug: str) -> Parts:
    """The items of one category in MMLU-Pro's test split.

    Input: the question and below it the options, one per line after a letter ("A. ..."), as MMLU is usually shown.
    Output: the letter of the correct option, because options are long and often share their first token.
    Most questions have ten options, some have fewer (seven questions have one or two); all are kept. The five questions
    per category in the hub's validation split are not used.

    Args:
        slug: name of the category, with hyphens instead of spaces.

    Source:
        Wang et al. 2024, arXiv:2406.01574 (Apache-2.0).

    Raises:
        SitelensError: if the data can neither be found nor loaded, have no such category, or for an item that cannot
            be used.
    """
    category, path = slug.replace("-", " "), local_file("mmlu_pro/test.jsonl")
    rows = file_rows(path) if path else hub_rows(f"mmlu-pro/{slug}", MMLU_PRO, "test", "mmlu_pro/test.jsonl")
    categories = [_text(row, "category", where) for where, row in rows]
    if category not in categories:
        known = ", ".join(sorted(set(categories))) or "none"
        raise SitelensError(f"mmlu-pro/{slug}: {path or MMLU_PRO} has no category {category!r}; there are: {known}")
    chosen = [(at, row) for (at, row), one in zip(rows, categories, strict=True) if one == category]
    items = tuple(_choice(row, at) for at, row in chosen)
    content = [[row["question"], row["options"], row["answer"]] for _, row in chosen]
    _check_content(f"mmlu-pro/{slug}", content, path, MMLU_PRO)
    return {"test": items}


def bbh(name: str) -> Parts:
    """The items of one of the 27 tasks of BIG-Bench Hard.

    Input and output are those of BBH, except that an answer such as "(B)" becomes "B", because all options would begin
    with the same token otherwise. The single answer in `movie_recommendation` that is not an option is unchanged. First
    tokens do not distinguish all answers that are numbers (`object_counting`, `multistep_arithmetic_two`) or lists of
    words (`word_sorting`).

    The upstream files contain a canary string to keep them out of training corpora. It is not removed, and this package
    contains no copy of the data.

    Source:
        Suzgun et al. 2022, arXiv:2210.09261; repository suzgunmirac/BIG-Bench-Hard (MIT).

    Raises:
        SitelensError: if the file can neither be found nor downloaded, or is not the expected one.
    """
    where = f"bbh/{name}, item"
    items = enumerate(BBH_FILES.items(name), start=1)
    return {"examples": tuple(_reasoning(item, f"{where} {number}") for number, item in items)}


@dataclass(frozen=True, kw_only=True)
class Benchmark(Suite):
    """A benchmark as a suite; its tasks are named NAME/TASK.

    Attributes:
        name, title: name of the suite; group of its tasks in result tables.
        source, description: where its data come from; the paper.
        tasks: returns the names TASK and the number of items of each (None if it depends on the available data).
        read: returns the items of a task by split, given the name TASK.
        context: a part of the input that several items share: what it is called, and a function that extracts it from
            an input; None if there is none.
    """

    name: str
    title: str
    source: str
    description: str
    tasks: Callable[[], Mapping[str, int | None]]
    read: Callable[[str], Parts]
    context: tuple[str, Callable[[str], str]] | None = None

    def names(self) -> list[str]:
        """The names of its tasks."""
        return [f"{self.name}/{own}" for own in self.tasks()]

    def load(self, name: str) -> Task:
        """A task in its three official splits, if there are three; otherwise split like the Function Vectors tasks."""
        parts = self.read(self._own(name))
        if len(parts) == 3:
            train, valid, test = parts.values()
            notes = [f"the official splits {', '.join(parts)}"]
        else:
            [(split, examples)] = parts.items()
            check_number(name, examples)
            train, valid, test = random_split(examples)
            notes = [f"70/9/21 of {split} (seed 32)"]
        notes += [self._shared_context(train, test), note_on_shared_inputs(train, test)]
        note = "; ".join(filter(None, notes))
        return Task(name, self.source, train, valid, test, published_metric="exact_match", note=note)

    def describe(self, name: str) -> str:
        """The paper it comes from."""
        return self.description

    def group(self, name: str) -> str:
        """The title of the benchmark."""
        return self.title

    def n_items(self, name: str) -> int | None:
        """The number of items of a task upstream; None if it depends on the available data."""
        return self.tasks()[self._own(name)]

    def _own(self, name: str) -> str:
        return name.removeprefix(f"{self.name}/")

    def _shared_context(self, train: Sequence[Example], test: Sequence[Example]) -> str:
        """A note on the number of test items whose context also occurs in train; empty if there are none."""
        if self.context is None:
            return ""
        name, context_of = self.context
        known = {context_of(item.input) for item in train}
        count = sum(context_of(item.input) in known for item in test)
        return f"{count} of {len(test)} test items have a {name} that also stands in train" if count else ""


BENCHMARKS = (
    Benchmark(
        name="anli", title="ANLI", source=ANLI, description="Nie et al. 2020", tasks=lambda: ROUNDS, read=anli,
        context=("premise", premise),
    ),
    Benchmark(
        name="mmlu-pro", title="MMLU-Pro", source=MMLU_PRO, description="Wang et al. 2024", read=mmlu_pro,
        tasks=lambda: {category.replace(" ", "-"): n for category, n in CATEGORIES.items()},
    ),
    Benchmark(
        name="bbh", title="BBH", source=BBH_FILES.source, description="Suzgun et al. 2022", read=bbh,
        tasks=lambda: {name: row["examples"] for name, row in sorted(BBH_FILES.registry.items())},
    ),
)  # fmt: skip


# Checksums


@functools.cache
def _pins() -> dict[str, tuple[int, str | None]]:
    """By part: number of items upstream, and SHA-256 of the fields that are used (None if unknown)."""
    text = resources.files("sitelens.tasks").joinpath("data/benchmarks.json").read_text("utf-8")
    return {row["name"]: (row["items"], row["sha256"]) for row in json.loads(text)}


def _check_content(name: str, content: list[Any], path: Path | None, address: str) -> None:
    """Compare items with the known checksum: a local file that differs is an error, changed data on the hub a warning.

    If no checksum is known (ANLI's official train and test sets), the one of the first use is stored and then expected.
    `content` has one list of the used fields per item; `path` is None for data from the hub.
    """
    if name not in _pins():
        return
    n, expected = _pins()[name]
    text = json.dumps(content, separators=(",", ":"), ensure_ascii=False)
    found = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
    if expected is None and len(content) == n:
        expected = _first_seen(name, found)
    if (len(content), found) == (n, expected):
        return
    here, there = f"{len(content)} items with SHA-256 {found}", f"{n} items" + (f" with {expected}" if expected else "")
    if path is None:
        warnings.warn(
            f"{name} is another on the hub now ({address}) than the one known here: {here}, expected {there}. Its "
            "results do not compare with others'", SitelensWarning, stacklevel=3,
        )  # fmt: skip
        return
    raise SitelensError(
        f"{path} does not hold the items of {name}: {here}, expected {there}. Get it anew, or remove it, so that the "
        "hub's is loaded; other items make a task under another name (Task.from_pairs, or a file of inputs and outputs)"
    )


def _first_seen(name: str, found: str) -> str:
    recorded = settings.cache() / "data" / f"{name}.sha256"
    with contextlib.suppress(OSError):
        if recorded.exists():
            return recorded.read_text("utf-8").strip()
        write_text(recorded, found)
    return found


# Items


def _inference(row: Any, where: str) -> Example:
    label = row.get("label") if isinstance(row, Mapping) else None
    text, hypothesis = _text(row, "premise", where), _text(row, "hypothesis", where)
    if not isinstance(label, int) or label not in range(len(LABELS)):
        raise SitelensError(f"{where}: 'label' must be 0 ({LABELS[0]}), 1 or 2 ({LABELS[2]}), not {label!r}")
    return Example(f"{text}{HYPOTHESIS}{hypothesis}", LABELS[label])


def _choice(row: Any, where: str) -> Example:
    question, answer, options = _text(row, "question", where), _text(row, "answer", where), row.get("options")
    if not isinstance(options, list) or not all(isinstance(option, str) for option in options):
        raise SitelensError(f"{where}: 'options' must be a list of texts, not {options!r}")
    if len(options) > len(ascii_uppercase):
        raise SitelensError(f"{where}: {len(options)} options, more than there are letters")
    letters = ascii_uppercase[: len(options)]
    if answer not in tuple(letters):
        raise SitelensError(f"{where}: the answer {answer!r} is none of the options' letters, {letters or 'none'}")
    lines = [f"{letter}. {option.strip()}" for letter, option in zip(letters, options, strict=True)]
    return Example("\n".join([question, *lines]), answer)


def _reasoning(row: Any, where: str) -> Example:
    target = _text(row, "target", where)
    option = re.fullmatch(r"\(([A-Z])\)", target)
    return Example(_text(row, "input", where), option[1] if option else target)


def _text(row: Any, field: str, where: str) -> str:
    value = row.get(field) if isinstance(row, Mapping) else None
    if not isinstance(value, str) or not value.strip():
        raise SitelensError(f"{where}: {field!r} must be text that is not empty, not {value!r}")
    return value.strip()
