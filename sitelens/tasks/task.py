"""Task: pairs of an input and its accepted answers, in three splits (train, valid, test)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from typing import Any

import pandas as pd

from sitelens.checks.values import SplitSeed, converted
from sitelens.errors import SitelensError
from sitelens.metrics import METRICS
from sitelens.tasks.examples import Example, check_text, parse_examples, warn_about_repeats
from sitelens.tasks.files import SPLIT_SEED, Columns, by_split, frame_rows, function_vectors_split
from sitelens.tasks.templates import QA_TEMPLATE, Arguments, check_template, checked_arguments

SPLITS = ("train", "valid", "test")


RENDERING = 2  # version of the prompts made by `sitelens.models.chat`; increase it when their text changes


@dataclass(frozen=True)
class Task:
    """Items that follow one rule from input to output.

    Args:
        name: name in results and file names.
        source: where the items come from.
        train: items from which demonstrations and training items are drawn.
        valid: items on which choices such as the checkpoint are made.
        test: items on which results are computed.
        template: a text with {input} and {output}, or "chat" (see `sitelens.engine.prompts`).
        case_sensitive: whether exact_match and prefix_match distinguish "Paris" from "paris".
        published_metric: the metric that the authors of the task report; for information only, as
            `evaluate(metrics=...)` decides.
        note: information to keep with results (how the task was split, what was dropped).
        instruction: text that appears once before the demonstrations, followed by a blank line unless it ends in white
            space. With the template "chat" it is the system message, or precedes the first question if the chat
            template has no system message.
        template_arguments: variables of the chat template, such as {"enable_thinking": False}; stored as sorted pairs.

    Raises:
        SitelensError: for a field that cannot be used.

    Example:
        >>> pairs = [("hot", "cold"), ("big", "small"), ("new", "old"), ("up", "down"), ("wet", "dry"), ("in", "out")]
        >>> task = sl.Task.from_pairs("opposites", pairs)
        >>> len(task.train), len(task.valid), len(task.test)
        (4, 1, 1)
    """

    name: str
    source: str
    train: tuple[Example, ...]
    valid: tuple[Example, ...]
    test: tuple[Example, ...]
    template: str = QA_TEMPLATE
    case_sensitive: bool = False
    published_metric: str = "first_token"
    note: str = ""
    instruction: str = ""
    template_arguments: Arguments | Mapping[str, Any] = ()

    def __post_init__(self) -> None:
        check_text(self.name, "a task's name")
        for split in SPLITS:
            examples = tuple(getattr(self, split))
            for number, example in enumerate(examples, start=1):
                if not isinstance(example, Example):
                    raise SitelensError(f"task {self.name!r}, {split} item {number}: {example!r} is no Example; "
                                        "Task.from_pairs takes pairs")  # fmt: skip
                for text in (example.input, *example.answers):
                    check_text(text, f"task {self.name!r}, {split} item {number}: a text")
            object.__setattr__(self, split, examples)  # digests rely on tuples
        metric, case = self.published_metric, self.case_sensitive
        if metric not in METRICS:
            raise SitelensError(f"task {self.name!r}: unknown metric {metric!r}; one of {', '.join(METRICS)}")
        if not isinstance(case, bool):
            raise SitelensError(f"task {self.name!r}: case_sensitive must be true or false, not {case!r}")
        check_template(self.template)
        if not isinstance(self.instruction, str):
            raise SitelensError(f"task {self.name!r}: instruction must be text, not {self.instruction!r}")
        arguments = checked_arguments(self.template_arguments, self.template, f"task {self.name!r}")
        object.__setattr__(self, "template_arguments", arguments)

    def __repr__(self) -> str:
        chat = ", chat" if self.template == "chat" else ""
        return f"Task({self.name!r}, {', '.join(f'{len(self.split(name))} {name}' for name in SPLITS)}{chat})"

    @cached_property
    def digest(self) -> str:
        """SHA-256 of everything that decides a result: name, items, template, instruction, arguments, case."""
        content = asdict(self)
        del content["source"], content["note"], content["published_metric"]
        for name in ("instruction", "template_arguments"):  # omitted if empty, so that older digests stay valid
            if not content[name]:
                del content[name]
        if self.template == "chat":
            content["rendering"] = RENDERING
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def split(self, name: str) -> tuple[Example, ...]:
        """The items of "train", "valid" or "test".

        Raises:
            SitelensError: for another name.
        """
        if name not in SPLITS:
            raise SitelensError(f"unknown split {name!r}; one of {', '.join(SPLITS)}")
        return getattr(self, name)

    def nonempty(self, name: str) -> tuple[Example, ...]:
        """The items of "train", "valid" or "test", which must not be empty.

        Raises:
            SitelensError: for another name, or if the split has no items.
        """
        items = self.split(name)
        if not items:
            raise SitelensError(f"task {self.name!r} has no {name} items")
        return items

    @staticmethod
    def from_pairs(
        name: str, pairs: Iterable[Any] | Mapping[str, Any], *, seed: int = SPLIT_SEED, **options: Any
    ) -> Task:
        """A task from (input, output) pairs, split at random into 70% train, 9% valid and 21% test.

        Args:
            name: name of the task.
            pairs: at least 4 items: pairs (input, output), triples (input, output, further answers), dicts with the
                keys input, output and also, Examples; or one mapping from inputs to outputs.
            seed: seed of the split; the default is that of the Function Vectors tasks.
            options: further fields of Task.

        Raises:
            SitelensError: naming the item that cannot be used and why, or if there are fewer than 4 items.

        Example:
            >>> sl.Task.from_pairs("upper", {"a": "A", "b": "B", "c": "C", "d": "D"}, case_sensitive=True).source
            'own'
        """
        items = pairs.items() if isinstance(pairs, Mapping) else pairs
        if not isinstance(items, Iterable) or isinstance(items, str | bytes):
            raise SitelensError(f"pairs must be a list of (input, output) pairs or a dict, not {items!r}")
        return task_from_items(name, {"examples": list(items)}, f"task {name!r}", seed, {"source": "own", **options})

    @staticmethod
    def from_frame(
        name: str,
        frame: pd.DataFrame,
        *,
        input: Hashable = "input",
        output: Hashable = "output",
        also: Hashable | None = "also",
        split: Hashable | None = "split",
        seed: int = SPLIT_SEED,
        **options: Any,
    ) -> Task:
        """A task from a DataFrame, one row per item.

        Args:
            name: name of the task.
            frame: the items.
            input, output: columns of the input and its preferred answer.
            also: optional column of further accepted answers: lists, or text with "|" between answers.
            split: optional column with train, valid or test; without it (or with split=None) the rows are split at
                random, as by `from_pairs`.
            seed: seed of the random split.
            options: further fields of Task.

        Raises:
            SitelensError: if a column is missing, for an unknown or empty split, and as `from_pairs`.

        Example:
            >>> frame = pd.DataFrame({"country": ["France", "Italy", "Spain", "Peru"],
            ...                       "capital": ["Paris", "Rome", "Madrid", "Lima"]})
            >>> sl.Task.from_frame("capitals", frame, input="country", output="capital").name
            'capitals'
        """
        if not isinstance(frame, pd.DataFrame):
            raise SitelensError(f"from_frame takes a DataFrame, not {type(frame).__name__}; from_pairs takes pairs")
        where = f"task {name!r}"
        content = by_split(frame_rows(frame, Columns(input, output, also, split), where), where)
        return task_from_items(name, content, where, seed, {"source": "own", **options})


def task_from_items(name: str, content: dict[str, Any], where: str, seed: int, options: dict[str, Any]) -> Task:
    """A task from raw items.

    Args:
        name: name of the task.
        content: the items as lists under "examples", which are split at random, or under "train", "valid" and "test".
        where: beginning of messages.
        seed: seed of the random split.
        options: further fields of Task.

    Raises:
        SitelensError: for items, a seed or a field that cannot be used.
    """
    seed = converted("seed", seed, SplitSeed)
    if unknown := sorted(options.keys() - {field.name for field in fields(Task)}):
        raise SitelensError(f"{where}: a task has no field {unknown[0]!r}")
    if "examples" in content:
        examples = parse_examples(_listed(content["examples"], where), f"{where}, ")
        check_number(name, examples)
        warn_about_repeats(name, examples)
        train, valid, test = random_split(examples, seed)
        return Task(name, train=train, valid=valid, test=test, **options)
    if not set(SPLITS) <= content.keys():
        raise SitelensError(f'{where} must hold "examples", or "train", "valid" and "test"')
    parts = {split: tuple(parse_examples(_listed(content[split], where), f"{where}, {split} ")) for split in SPLITS}
    for split, part in parts.items():
        if not part:
            raise SitelensError(f"{where}: the {split} split is empty")
    warn_about_repeats(name, [example for part in parts.values() for example in part])
    return Task(name, **parts, **options)


def check_number(name: str, examples: Sequence[Example]) -> None:
    """Raise SitelensError if there are too few items to fill every split."""
    if len(examples) < 4:
        raise SitelensError(f"task {name!r} has {len(examples)} items: at least 4 are needed to fill every split")


def random_split(examples: Sequence[Example], seed: int = SPLIT_SEED) -> list[tuple[Example, ...]]:
    """The items of train, valid and test (70%, 9%, 21%), as `function_vectors_split` divides them."""
    return [tuple(examples[i] for i in part) for part in function_vectors_split(len(examples), seed)]


def _listed(items: Any, where: str) -> list[Any]:
    if not isinstance(items, list):
        raise SitelensError(f"{where}: the items must be a list, not {type(items).__name__}")
    return items
