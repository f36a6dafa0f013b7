"""Evaluation: a task under conditions, scored item by item. `sitelens.metrics` defines what each metric compares."""

from __future__ import annotations

import functools
import random
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pandas as pd

from sitelens.checks.arguments import checked
from sitelens.checks.values import Count, Seed
from sitelens.conditions.base import Condition, checked_conditions
from sitelens.conditions.prompting import ZeroShot
from sitelens.engine.batches import PromptBatch, tokenize
from sitelens.engine.decoding import end_tokens
from sitelens.engine.prompts import Prompt, after_answer, few_shot_prompts
from sitelens.errors import SitelensError, warned_once
from sitelens.evaluation.labels import label_tokens, warn_of_shared_first_tokens
from sitelens.evaluation.predictions import Predictor, as_patches
from sitelens.evaluation.summary import ECHO
from sitelens.metrics import Metric, Output, Target, answer_end, check_answers, checked_metrics
from sitelens.models.loading import resolve_model
from sitelens.models.model import Model, ModelSource
from sitelens.progress import progress
from sitelens.settings import settings
from sitelens.tasks import Example, Task, load_task

COLUMNS = ("task", "condition", "seed", "item", "input", "answer", "predicted", "metric", "score", "logprob", "rank")


@checked
@warned_once()
def evaluate(
    task: Task | str,
    conditions: Mapping[str, Condition] | Condition,
    model: ModelSource | None = None,
    *,
    split: str = "test",
    n_items: Count | None = None,
    metrics: Sequence[str | Metric] = ("first_token",),
    seed: Seed = 0,
    max_new_tokens: Count = 20,
    with_echo: bool | None = None,
) -> pd.DataFrame:
    """Scores of a task under each condition: one row per item, condition and metric.

    Args:
        task: a task, or the name of one.
        conditions: conditions by name; a single condition is named after its class ("ZeroShot").
        model: a bridge, or the name or path of a model (default: the packaged model).
        split: "train", "valid" or "test"; it is never filtered.
        n_items: size of a random sample of the split, which depends only on seed, task and split (default: all items).
        metrics: names in `sitelens.metrics.METRICS`, or your own `Metric`s.
        seed: seed of the sample and of the demonstrations.
        max_new_tokens: most tokens to generate, for metrics that need generated text.
        with_echo: whether to add rows of the condition "echo" (answering with the query itself); default: for
            prefix_match only.

    Returns:
        A frame with the columns task, condition, seed, item (index in the split), input, answer, predicted, metric,
        score (0 or 1), and logprob (in nats) and rank (1 is the most likely) of the preferred answer's first token.

    Raises:
        SitelensError: for unknown metrics or splits, no items, an answer that a metric cannot score, a condition made
            for another model, or logits that are not finite.

    Example:
        >>> conditions = {"zero-shot": sl.ZeroShot(), "SITE": sl.PatchHeads(alpha, embedding)}
        >>> scores = sl.evaluate(task, conditions, model, n_items=4)
        >>> scores.groupby("condition")["score"].count().to_dict()
        {'SITE': 4, 'zero-shot': 4}
    """
    task, conditions, model = load_task(task), checked_conditions(conditions), resolve_model(model)
    chosen_metrics = checked_metrics(metrics)
    echoed = [m for m in chosen_metrics if (m.name == "prefix_match" if with_echo is None else with_echo)]
    if ECHO in conditions and echoed:
        raise SitelensError(f"no condition may be called {ECHO!r}: rows of the echo baseline have that name")
    chosen = sample_items(task, split, n_items, seed)
    items = [task.split(split)[i] for i in chosen]
    generating = any(metric.generates for metric in chosen_metrics)
    scoring = _Scoring(task, items, chosen, chosen_metrics, model, seed)
    budget, new_tokens = settings.budget(), max_new_tokens if generating else 0
    groups: dict[int, dict[str, Condition]] = {}  # by the number of demonstrations
    for name, condition in conditions.items():
        groups.setdefault(condition.n_shots, {})[name] = condition
    rows: dict[tuple[str, str], list[tuple[Any, ...]]] = {}  # by metric and condition
    n_answers = len(conditions) * len(items)
    with model.unchanged(), progress(n_answers, f"evaluate {task.name}") as bar:  # one fingerprint for all conditions
        parts = {n_shots: as_patches(group, model, generating) for n_shots, group in groups.items()}
        for n_shots, (patches, others) in parts.items():
            prompts = few_shot_prompts(task, items, n_shots, scoring.tokenizer, seed, split, chosen)
            where = f"task {task.name!r}, {n_shots} shots"
            batch = tokenize(prompts, scoring.tokenizer, model.context_length, where, new_tokens)
            targets = scoring.targets(batch)
            complete = functools.partial(scoring.complete, targets)
            predictor = Predictor(
                model, batch, budget, scoring.where, new_tokens, scoring.ends, complete, scoring.labels
            )
            outputs = predictor.patched(patches, bar.update)
            outputs |= predictor.hooked(others, bar.update)
            for name, found in outputs.items():
                rows |= {(metric.name, name): scoring.rows(name, metric, found, targets) for metric in chosen_metrics}
    frames = [row for metric in chosen_metrics for name in conditions for row in rows[metric.name, name]]
    frames += scoring.echo(echoed)
    return pd.DataFrame(frames, columns=list(COLUMNS))


@checked
def echo(
    task: Task | str,
    model: ModelSource | None = None,
    *,
    split: str = "test",
    n_items: Count | None = None,
    metrics: Sequence[str | Metric] = ("prefix_match",),
    seed: Seed = 0,
) -> pd.DataFrame:
    """Scores of the echo baseline, which answers with the query itself; rows as of `evaluate`.

    logprob and rank are missing, because the model is not run (first_token compares the first tokens of query and
    answer). The arguments are those of `evaluate`.

    Example:
        >>> scores = sl.echo(task, model, n_items=4)
        >>> (scores["predicted"] == scores["input"]).all()
        np.True_
    """
    task, model = load_task(task), resolve_model(model)
    chosen_metrics = checked_metrics(metrics)
    chosen = sample_items(task, split, n_items, seed)
    items = [task.split(split)[i] for i in chosen]
    scoring = _Scoring(task, items, chosen, chosen_metrics, model, seed, warn=False)
    return pd.DataFrame(scoring.echo(chosen_metrics), columns=list(COLUMNS))


@checked
def generate(
    prompts: Sequence[str] | str,
    condition: Condition | None = None,
    model: ModelSource | None = None,
    *,
    max_new_tokens: Count = 20,
    stop: str | Sequence[str] | None = "\n",
) -> list[str]:
    """Greedy continuations of prompts, without special tokens and without white space at either end.

    Args:
        prompts: complete prompts; no template is applied.
        condition: a condition in effect during generation; its `n_shots` is ignored (default: the unedited model).
        model: a bridge, or the name or path of a model (default: the packaged model).
        max_new_tokens: most tokens per continuation.
        stop: a text, or several, before which a continuation ends, such as the template's text after an answer (white
            space before the first word does not count). It also ends at the model's end-of-text tokens.

    Raises:
        SitelensError: if a prompt is empty or too long, the condition was made for another model, or logits are not
            finite.

    Example:
        >>> texts = sl.generate(["Q: France\\nA:"], sl.PatchHeads(alpha, embedding), model, max_new_tokens=2)
        >>> len(texts)
        1
    """
    model = resolve_model(model)
    if isinstance(prompts, str):
        raise SitelensError(f"prompts must be a list of texts: write generate([{prompts!r}])")
    stops = [stop] if isinstance(stop, str) else list(stop or ())
    if not all(isinstance(text, str) and text for text in stops):
        raise SitelensError(f"stop must be a text, a list of texts that are not empty, or None, not {stop!r}")
    if not prompts:
        return []
    (condition,) = checked_conditions(condition or ZeroShot()).values()
    tokenizer = model.tokenizer
    end = re.compile("|".join(map(re.escape, stops))) if stops else None
    texts = [Prompt(text, ()) for text in prompts]
    predictor = Predictor(
        model,
        tokenize(texts, tokenizer, model.context_length, new_tokens=max_new_tokens),
        settings.budget(),
        lambda _, row: f"prompt {row + 1} ({prompts[row][:60]!r})",
        max_new_tokens,
        complete=lambda _, text: end is not None and end.search(text.lstrip()) is not None,
    )
    patches, others = as_patches({"": condition}, model, generating=True)
    outputs = predictor.patched(patches, lambda _: None) | predictor.hooked(others, lambda _: None)
    continuations = [out.text.lstrip() for out in outputs[""]]
    return [(end.split(text, maxsplit=1)[0] if end else text).strip() for text in continuations]


def sample_items(task: Task, split: str, n_items: int | None, seed: int) -> list[int]:
    """Indices of a split's items in ascending order: all of them, or a random sample of `n_items`."""
    total = len(task.nonempty(split))
    if n_items is None or n_items >= total:
        return list(range(total))
    if n_items < 1:
        raise SitelensError(f"n_items must be at least 1, got {n_items}")
    return sorted(random.Random(f"sitelens/items/{task.name}/{split}/{seed}").sample(range(total), n_items))


class _Scoring:
    """Some items of a task and the metrics that score them."""

    def __init__(
        self, task: Task, items: Sequence[Example], places: Sequence[int], metrics: Sequence[Metric], model: Model,
        seed: int, warn: bool = True,
    ) -> None:  # fmt: skip
        self.task, self.items, self.places, self.metrics, self.seed = task, items, places, metrics, seed
        self.tokenizer = model.tokenizer
        for item in items:
            check_answers(metrics, item.answers, task.case_sensitive, f"task {task.name!r}, input {item.input!r}")
        if warn and not all(metric.generates for metric in metrics):
            warn_of_shared_first_tokens([task], model)
        uses_labels = any(metric.uses_labels for metric in metrics)
        self.labels = label_tokens(task, self.tokenizer) if uses_labels else []
        self.ends, self.end = end_tokens(model, self.tokenizer), None
        if any(metric.generates for metric in metrics):
            tail, opening = after_answer(task, self.tokenizer)
            one_line = not any("\n" in answer.strip() for item in _all_items(task) for answer in item.answers)
            special = self._special(tail) if task.template == "chat" else None
            if special is None:
                self.end = answer_end(tail, opening, one_line=one_line)
            else:
                self.ends.add(special)

    def _special(self, tail: str) -> int | None:
        """The special token that ends an answer in a chat template, whose text after an answer is `tail`; else None."""
        ids = self.tokenizer(tail.lstrip(), add_special_tokens=False)["input_ids"]
        known = getattr(self.tokenizer, "added_tokens_decoder", {})
        return ids[0] if ids and ids[0] in known and known[ids[0]].special else None

    def targets(self, batch: PromptBatch) -> list[Target]:
        """What counts as correct for each item, with the first tokens of its answers after these prompts."""
        texts = {token: self.tokenizer.decode([token]) for row in batch.accepted for token in row}
        return [
            Target(
                answers=item.answers, tokens=tokens, token_texts=tuple(texts[token] for token in tokens),
                case_sensitive=self.task.case_sensitive, end=self.end,
            )
            for item, tokens in zip(self.items, batch.accepted, strict=True)
        ]  # fmt: skip

    def complete(self, targets: Sequence[Target], place: int, text: str) -> bool:
        """Whether a partially generated text already determines every score."""
        return all(metric.complete(text, targets[place]) for metric in self.metrics if metric.generates)

    def where(self, condition: str, row: int) -> str:
        """A description of an item under a condition, for messages."""
        return (f"task {self.task.name!r}, condition {condition!r}, item {self.places[row]} "
                f"({self.items[row].input[:60]!r})")  # fmt: skip

    def rows(
        self, condition: str, metric: Metric, outputs: Iterable[Output], targets: Iterable[Target]
    ) -> list[tuple[Any, ...]]:
        """The rows of `evaluate` for one condition and metric."""
        return [
            (self.task.name, condition, self.seed, place, item.input, item.output, metric.predicted(out, target),
             metric.name, int(bool(metric.score(out, target))), out.logprob, out.rank)
            for place, item, out, target in zip(self.places, self.items, outputs, targets, strict=True)
        ]  # fmt: skip

    def echo(self, metrics: Sequence[Metric]) -> list[tuple[Any, ...]]:
        """The rows of the echo baseline."""
        if not metrics:
            return []
        where = f"task {self.task.name!r}"
        batch = tokenize(few_shot_prompts(self.task, self.items, 0, self.tokenizer), self.tokenizer, None, where)
        queries = [Example(item.input, item.input) for item in self.items]
        said = tokenize(few_shot_prompts(self.task, queries, 0, self.tokenizer), self.tokenizer, None, where)
        outputs = []
        for item, token in zip(self.items, said.answer.tolist(), strict=True):
            text, label = self.tokenizer.decode([token]), token if token in self.labels else -1
            outputs.append(Output(token=token, token_text=text, label=label, label_text=text, text=item.input))
        targets = self.targets(batch)
        return [row for metric in metrics for row in self.rows(ECHO, metric, outputs, targets)]


def _all_items(task: Task) -> Iterable[Example]:
    return (item for split in (task.train, task.valid, task.test) for item in split)
