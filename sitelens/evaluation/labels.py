"""A task's answers as labels: their first tokens, and a warning about answers that share one."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any
from weakref import WeakKeyDictionary

from sitelens.engine.batches import answer_tokens, prompt_tokens
from sitelens.engine.prompts import few_shot_prompt
from sitelens.errors import SitelensError, not_yet_warned, warn_once
from sitelens.models.model import Model
from sitelens.tasks import Task

# Below this share of items, the effect of shared first tokens on a score is smaller than the interval of 100 items.
SHARED = 0.05
AT_ONCE = 3  # up to this many tasks get a warning each; more are summarized in one
OPEN = 0.5  # more different answers per item than this are not a closed set of labels

_known: WeakKeyDictionary[Any, dict[str, tuple[float, str] | None]] = WeakKeyDictionary()


def first_tokens(task: Task, tokenizer: Any) -> dict[str, int]:
    """The first token, after the zero-shot prompt, of every different answer (`output`) in all splits of a task."""
    items = {item.output: item for split in (task.train, task.valid, task.test) for item in split}
    prompts = [few_shot_prompt(task, [], item, tokenizer) for item in items.values()]
    ids = prompt_tokens(prompts, tokenizer)
    pairs = [(i, prompt.answers[0]) for i, prompt in enumerate(prompts)]
    tokens = (answer for answer, _ in answer_tokens(prompts, ids, pairs, tokenizer))
    return {output: answer[0] for output, answer in zip(items, tokens, strict=True) if answer}


def shared_first_tokens(task: Task, tokenizer: Any) -> set[str]:
    """The answers of a task that share their first token with another of its answers."""
    return {output for outputs in _sharing(first_tokens(task, tokenizer)) for output in outputs}


def label_tokens(task: Task, tokenizer: Any) -> list[int]:
    """The different first tokens of all answers of a task, sorted, for the metric label_token.

    Warns if the answers are not a closed set of labels.

    Raises:
        SitelensError: if all answers begin with the same token, so that it cannot tell them apart.
    """
    first = first_tokens(task, tokenizer)
    tokens = sorted(set(first.values()))
    labels = ", ".join(map(repr, list(first)[:3]))
    if len(tokens) < 2:
        text = f"task {task.name!r}: all answers ({labels}) begin with the token {tokenizer.decode(tokens)!r}"
        raise SitelensError(f"{text}: label_token cannot tell them apart; exact_match can")
    n_items = sum(len(task.split(split)) for split in ("train", "valid", "test"))
    if len(first) > OPEN * n_items:
        text = (f"task {task.name!r} has {len(first)} different answers in {n_items} items ({labels}, ...): "
              "label_token is for tasks with a few labels; here it chooses from the list of all answers")  # fmt: skip
        warn_once(text, f"labels of {task.name}")
    return tokens


def warn_of_shared_first_tokens(tasks: Iterable[Task], model: Model) -> None:
    """Warn if, in at least 5% of a task's items, the answer shares its first token with another answer.

    Within `warned_once`, each task gets one warning; more than three tasks get a common one. The threshold is low
    because scores can be too high by up to this share; it is not zero because among hundreds of words, a few always
    begin with the same token.
    """
    listed = list({task.name: task for task in tasks}.values())
    texts = {f"shared first tokens of {task.name}": _shared(task, model.tokenizer) for task in listed}
    affected = {key: found for key, found in texts.items() if found is not None and not_yet_warned(key)}
    if len(affected) <= AT_ONCE:
        for key, (_, text) in affected.items():
            warn_once(text, key)
        return
    worst = sorted(affected.items(), key=lambda entry: -entry[1][0])[:AT_ONCE]
    names = ", ".join(f"{key.removeprefix('shared first tokens of ')} {share:.0%}" for key, (share, _) in worst)
    warn_once(
        f"in {len(affected)} of {len(listed)} tasks, answers share their first token with another answer of the task "
        f"(most: {names} of items): first-token scores and training cannot tell these apart, exact_match can",
        *affected,
    )


def _shared(task: Task, tokenizer: Any) -> tuple[float, str] | None:
    """The share of items whose answers share a first token, and a warning about them; None if they are too few.

    Cached per tokenizer and task.
    """
    known = _known.setdefault(tokenizer, {})
    if task.digest not in known:
        known[task.digest] = None
        first = first_tokens(task, tokenizer)
        groups = _sharing(first)
        shared = {output for outputs in groups for output in outputs}
        items = [item for split in ("train", "valid", "test") for item in task.split(split)]
        n_shared = sum(item.output in shared for item in items)
        if shared and n_shared >= SHARED * len(items):
            one, other = max(groups, key=len)[:2]
            text = (
                f"task {task.name!r}: {len(shared)} of {len(first)} answers ({n_shared} of {len(items)} items) share "
                f"their first token with another answer, for example {one!r} and {other!r} "
                f"({tokenizer.decode([first[one]])!r}): first-token scores and training cannot tell these apart, "
                "exact_match can"
            )
            known[task.digest] = n_shared / len(items), text
    return known[task.digest]


def _sharing(first: dict[str, int]) -> list[list[str]]:
    """Groups of two or more answers with the same first token."""
    by_token: dict[int, list[str]] = {}
    for output, token in first.items():
        by_token.setdefault(token, []).append(output)
    return [outputs for outputs in by_token.values() if len(outputs) > 1]
