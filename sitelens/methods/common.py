"""What the methods share: training items, mean states, gradients through prompts and answers, the choice on valid."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import cross_entropy

from sitelens.conditions import Condition
from sitelens.defaults import SitelensError
from sitelens.evaluation import evaluate
from sitelens.heads.common import like_prompts, watch
from sitelens.labels import warn_of_shared_first_tokens
from sitelens.models import Model, context_length, own_tokenizer
from sitelens.network import Passes, all_positions, run_tokens
from sitelens.prompts import PromptBatch, answer_tokens, few_shot_prompt, few_shot_prompts, tokenize
from sitelens.tasks import Example, Task

Key = TypeVar("Key")

MAX_TRAIN = 200  # training items that any method may see
MAX_VALID = 50  # validation items on which layers, coefficients and learning rates are chosen


def fitting(task: Task) -> Task:
    """The task with at most 200 training items, the same for every method.

    Raises:
        SitelensError: if there are no training or no validation items.
    """
    for split in ("train", "valid"):
        if not task.split(split):
            raise SitelensError(f"task {task.name!r} has no {split} items")
    if len(task.train) <= MAX_TRAIN:
        return task
    rng = random.Random(f"sitelens/fitting/{task.name}")
    return replace(task, train=tuple(task.train[i] for i in sorted(rng.sample(range(len(task.train)), MAX_TRAIN))))


def zero_shot(task: Task, items: Sequence[Example], model: Model) -> PromptBatch:
    """Prompts without demonstrations; warns where first tokens cannot tell the task's answers apart."""
    warn_of_shared_first_tokens([task], model)
    return prompts_of(few_shot_prompts(task, items, 0, own_tokenizer(model)), task, model)


def prompts_of(prompts: Sequence[Any], task: Task, model: Model) -> PromptBatch:
    """Prompts as tokens, checked against the model's context."""
    return tokenize(prompts, own_tokenizer(model), context_length(model), f"task {task.name!r}")


def accuracy_on_valid(task: Task, conditions: Mapping[Any, Condition], model: Model) -> dict[Any, float]:
    """First-token accuracy of each condition on at most 50 validation items."""
    named = {str(i): condition for i, condition in enumerate(conditions.values())}
    scores = evaluate(task, named, model, split="valid", n_items=MAX_VALID, progress=False)
    means = scores.groupby("condition")["score"].mean()
    return {key: float(means[str(i)]) for i, key in enumerate(conditions)}


def best_on_valid(task: Task, conditions: Mapping[Key, Condition], model: Model) -> Key:
    """The key of the condition with the highest accuracy on valid; of equals the first."""
    found = accuracy_on_valid(task, conditions, model)
    return max(found, key=found.__getitem__)


def mean_states(batch: PromptBatch, points: Sequence[str], model: Model) -> Float[Tensor, "point d_model"]:
    """Means over prompts of what passes some hook points at the last token."""
    return states(batch, points, model).mean(0).to(torch.float32)


def states(batch: PromptBatch, points: Sequence[str], model: Model) -> Float[Tensor, "prompt point d_model"]:
    """What passes some hook points at the last token of each prompt, in float64."""
    found = torch.zeros(len(batch), len(points), model.cfg.d_model, dtype=torch.float64)
    for index in like_prompts(batch, model):

        def keep(place: int, rows: list[int] = index) -> Callable[[Tensor], None]:
            def see(x: Tensor) -> None:
                found[rows, place] = x[:, -1].double().cpu()

            return see

        watch(batch.rows(index).tokens, model, {point: keep(place) for place, point in enumerate(points)})
    return found


def drawn(items: Sequence[Any], steps: int, size: int, key: str) -> Iterator[list[int]]:
    """Places of the items in each of `steps` batches, every item once before any comes again."""
    rng = random.Random(f"sitelens/batches/{key}")
    queue: list[int] = []
    for _ in range(steps):
        while len(queue) < size:
            more = list(range(len(items)))
            rng.shuffle(more)
            queue += more
        yield queue[:size]
        del queue[:size]


def answered(task: Task, items: Sequence[Example], model: Model) -> list[tuple[list[int], int]]:
    """Token ids of each zero-shot prompt with its whole answer behind it, and how many of them are the answer's."""
    tokenizer = own_tokenizer(model)
    prompts = [few_shot_prompt(task, [], item, tokenizer) for item in items]
    batch = prompts_of(prompts, task, model)
    ids = [tokens[mask].tolist() for tokens, mask in zip(batch.tokens, batch.mask, strict=True)]
    first = [(i, prompt.answers[0]) for i, prompt in enumerate(prompts)]
    answers = [answer for answer, _ in answer_tokens(prompts, ids, first, tokenizer)]
    return [(asked + answer, len(answer)) for asked, answer in zip(ids, answers, strict=True)]


def answer_loss(rows: Sequence[tuple[list[int], int]], model: Model | Passes) -> Float[Tensor, ""]:
    """Mean cross-entropy of all answer tokens of some rows of `answered`, with gradient."""
    return next_loss([(ids, len(ids) - n - 1, ids[len(ids) - n :]) for ids, n in rows], model)


def next_loss(rows: Sequence[tuple[list[int], int, list[int]]], model: Model | Passes) -> Float[Tensor, ""]:
    """Mean cross-entropy over rows (tokens, place of the first of them whose next is wanted, what is wanted there on).

    With gradient, over the whole vocabulary. Rows are padded behind their end, where causal attention never sees it;
    where the user listens, each text is run alone, up to the token whose next is wanted.

    Raises:
        SitelensError: if the loss is not finite.
    """
    passes = Passes.of(model)
    if passes.listened:
        texts = [(ids[: start + i + 1], token) for ids, start, wanted in rows for i, token in enumerate(wanted)]
        loss = torch.stack([_padded_loss([(ids, len(ids) - 1, [token])], passes) for ids, token in texts]).mean()
    else:
        loss = _padded_loss(rows, passes)
    if not torch.isfinite(loss):
        dtype = passes.model.cfg.dtype
        raise SitelensError(f"the loss is not finite (dtype {dtype}): try a lower learning rate or float32")
    return loss


def _padded_loss(rows: Sequence[tuple[list[int], int, list[int]]], passes: Passes) -> Float[Tensor, ""]:
    device, width = passes.model.cfg.device, max(len(ids) for ids, _, _ in rows)
    places = sorted({start + i for _, start, wanted in rows for i in range(len(wanted))} | {width - 1})
    # The last place stands among them, wanted or not: so a lone row keeps the shapes, and the bits, it always had.
    column = {place: i for i, place in enumerate(places)}
    tokens = torch.zeros(len(rows), width, dtype=torch.long)
    targets = torch.full((len(rows), len(places)), -100)
    for row, (ids, start, wanted) in enumerate(rows):
        tokens[row, : len(ids)] = torch.tensor(ids)
        targets[row, [column[start + i] for i in range(len(wanted))]] = torch.tensor(wanted)
    tokens = tokens.to(device)
    mask = torch.ones_like(tokens, dtype=torch.bool)
    logits = run_tokens(passes, tokens, mask, all_positions(mask), kept=torch.tensor(places))
    return cross_entropy(logits.flatten(0, 1).float(), targets.flatten().to(logits.device))
