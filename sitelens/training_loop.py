"""The loop that trains alpha: every run a row of every step, every prefix computed once.

Losses are summed and Adam works element by element, so a run's numbers are the same alone or among others. The
prefix of an item is computed once for all steps that draw it, as far as the memory budget allows.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import cross_entropy

from sitelens.defaults import SitelensError, progress
from sitelens.embedding import TaskEmbedding
from sitelens.forward import HeadEdit, LastToken, Mixing, PrefixCache
from sitelens.memory import MAX_ROWS, chunks, prefix_bytes, step_bytes
from sitelens.models import (
    Model,
    computing_dtype,
    context_length,
    head_shape,
    own_tokenizer,
)
from sitelens.prompts import PromptBatch, few_shot_prompt, tokenize
from sitelens.tasks import Task

HISTORY = ("step", "loss", "valid_loss", "mean_alpha", "share_binary")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How alpha is trained; the defaults are the paper's.

    steps, lr, batch_size: Adam steps, its learning rate, training items a step.
    eval_every, n_valid: validation loss after every so many steps, on the first so many validation items.
    checkpoint: keep the alpha of the "best" validation loss (the paper's text), or the "last" (its released code).
    init: alpha at the start, a number between 0 and 1, or "random" (uniform, drawn by seed).
    mixing: "convex", as published, or "additive".
    seed: decides which items are drawn, and a random init.
    """

    steps: int = 400
    lr: float = 0.2
    batch_size: int = 1
    eval_every: int = 50
    n_valid: int = 100
    checkpoint: Literal["best", "last"] = "best"
    init: float | Literal["random"] = 0.5
    mixing: Mixing = "convex"
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "eval_every", "n_valid"):
            if getattr(self, name) < 1:
                raise SitelensError(f"TrainConfig.{name} must be at least 1, got {getattr(self, name)}")
        if not self.lr > 0:
            raise SitelensError(f"TrainConfig.lr must be positive, got {self.lr}")
        if self.checkpoint not in ("best", "last"):
            raise SitelensError(f"TrainConfig.checkpoint must be 'best' or 'last', got {self.checkpoint!r}")
        if self.mixing not in get_args(Mixing):
            raise SitelensError(f"TrainConfig.mixing must be one of {', '.join(get_args(Mixing))}, got {self.mixing!r}")
        if self.init != "random" and not (isinstance(self.init, int | float) and 0 < self.init < 1):
            raise SitelensError(f"TrainConfig.init must be 'random' or lie between 0 and 1, got {self.init!r}")


@dataclass(frozen=True)
class Run:
    """What is trained as one alpha: one task's or, for a shared alpha, all tasks', under one seed."""

    members: tuple[int, ...]  # places in the list of tasks
    seed: int

    def draws(self, task: Task, config: TrainConfig) -> list[list[int]]:
        """Which training items of a member each step uses; depends on the task's name and the seed only."""
        rng = random.Random(f"sitelens/training/{task.name}/{self.seed}")
        return [[rng.randrange(len(task.train)) for _ in range(config.batch_size)] for _ in range(config.steps)]


@dataclass(frozen=True, eq=False)
class _Rows:
    """What each row of a batch is: a prompt, the run whose alpha it takes, and the task whose embedding."""

    prompt: Int[Tensor, "*steps row"]
    run: Int[Tensor, " row"]
    task: Int[Tensor, " row"]


def train_runs(
    runs: Sequence[Run],
    tasks: Sequence[Task],
    embeddings: Sequence[TaskEmbedding],
    model: Model,
    config: TrainConfig,
    budget: int,
    show_progress: bool | None,
) -> Iterator[dict[str, Tensor]]:
    """Train all runs together; yields each one's alpha and history."""
    dtype, device = computing_dtype(model), model.cfg.device
    vectors = torch.stack([embedding.mean_z.to(device, dtype) for embedding in embeddings])
    train, rows = _training_rows(runs, tasks, model, config)
    valid, checks = _validation_rows(runs, tasks, model, config)
    share = budget // 3  # for the prefixes in training, for those in validation, and for what a step computes
    validation = _Prefixes(valid, model, share)
    logits = _initial_logits(runs, config, head_shape(model)[:2], dtype).to(device).requires_grad_(True)
    optimizer = torch.optim.Adam([logits], lr=config.lr)
    history = torch.full((config.steps, len(runs), len(HISTORY)), torch.nan, dtype=torch.float64)
    best = torch.full((len(runs),), torch.inf, dtype=torch.float64)
    kept = torch.zeros_like(logits)
    bar = progress(range(config.steps), _label(runs, tasks), show=show_progress)
    with LastToken(model) as last_token:
        step_losses = functools.partial(
            _losses, last_token=last_token, vectors=vectors, mixing=config.mixing, budget=share
        )
        for start, stop in _windows(rows.prompt, train.lengths, model, share):
            distinct, local = torch.unique(rows.prompt[start:stop], return_inverse=True)
            batch = train.rows(distinct.tolist())
            prefix = PrefixCache.of(batch, model, share)
            for step, index in zip(range(start, stop), local, strict=True):
                next(bar)
                alpha = torch.sigmoid(logits)
                losses, gradient = step_losses(
                    alpha.detach(), replace(rows, prompt=index), batch, prefix, gradient=True
                )
                _check_finite(losses, rows, runs, tasks, step)
                optimizer.zero_grad()
                alpha.backward(gradient)
                optimizer.step()
                now = torch.sigmoid(logits.detach())
                history[step, :, 0] = step + 1
                history[step, :, 1] = _mean_by_run(losses, rows.run, len(runs))
                history[step, :, 3] = now.mean((1, 2))
                history[step, :, 4] = ((now <= 0.1) | (now >= 0.9)).double().mean((1, 2))
                if (step + 1) % config.eval_every == 0 or step + 1 == config.steps:
                    measured = torch.zeros(len(checks.run), dtype=torch.float64)
                    for part, part_batch, part_prefix in validation.parts():
                        chosen = torch.isin(checks.prompt, part)
                        place = torch.searchsorted(part, checks.prompt[chosen])
                        some = _Rows(place, checks.run[chosen], checks.task[chosen])
                        measured[chosen], _ = step_losses(now, some, part_batch, part_prefix, gradient=False)
                    history[step, :, 2] = loss = _mean_by_run(measured, checks.run, len(runs))
                    better = torch.ones_like(best, dtype=torch.bool) if config.checkpoint == "last" else loss < best
                    best = torch.where(better, loss, best)
                    kept = torch.where(better.to(device)[:, None, None], now, kept)
    next(bar, None)
    if not torch.isfinite(best).all():
        raise SitelensError("the validation loss is not finite: nothing is kept; is the model's dtype wide enough?")
    for i in range(len(runs)):
        yield {"alpha": kept[i].cpu(), "history": history[:, i].clone()}


def _losses(
    alpha: Float[Tensor, "run layer head"],
    rows: _Rows,
    batch: PromptBatch,
    prefix: PrefixCache,
    *,
    last_token: LastToken,
    vectors: Float[Tensor, "task layer head d_head"],
    mixing: Mixing,
    budget: int,
    gradient: bool,
) -> tuple[Float[Tensor, " row"], Float[Tensor, "run layer head"]]:
    """Each row's cross-entropy of the answer's first token, and the gradient of their sum by alpha (or zeros)."""
    losses = torch.zeros(len(rows.run), dtype=torch.float64)
    total = torch.zeros_like(alpha)
    device = alpha.device
    lengths = [batch.lengths[i] for i in rows.prompt.tolist()]
    cost = functools.partial(step_bytes, last_token.model, gradient=gradient)
    for part in chunks(lengths, cost, budget, max_rows=MAX_ROWS):
        prompt, run, task = (which[part].to(device) for which in (rows.prompt, rows.run, rows.task))
        with torch.set_grad_enabled(gradient):
            weights = alpha[run].requires_grad_(gradient)
            logits = last_token(prefix.rows(prompt), HeadEdit.mix(weights, vectors[task], mixing))
            answers = batch.answer.to(logits.device)[prompt.to(logits.device)]
            loss = cross_entropy(logits.to(alpha.dtype), answers, reduction="none")
            if gradient:
                total.index_add_(0, run, torch.autograd.grad(loss.sum(), weights)[0])
        losses[part] = loss.detach().double().cpu()
    return losses, total


class _Prefixes:
    """Prefixes of a batch in parts that fit a budget, kept when all of them fit, computed anew each time when not."""

    def __init__(self, batch: PromptBatch, model: Model, budget: int) -> None:
        self.batch, self.model, self.budget = batch, model, budget
        cost = functools.partial(prefix_bytes, model)
        self.index = [sorted(part) for part in chunks(batch.lengths, cost, budget)]
        self.kept: list[tuple[Tensor, PromptBatch, PrefixCache]] = []

    def parts(self) -> Iterator[tuple[Int[Tensor, " chosen"], PromptBatch, PrefixCache]]:
        """(which rows, in rising order; these rows; their prefixes), part by part."""
        if self.kept:
            yield from self.kept
            return
        for index in self.index:
            batch = self.batch.rows(index)
            part = torch.tensor(index), batch, PrefixCache.of(batch, self.model, self.budget)
            if len(self.index) == 1:
                self.kept.append(part)
            yield part


def _training_rows(
    runs: Sequence[Run], tasks: Sequence[Task], model: Model, config: TrainConfig
) -> tuple[PromptBatch, _Rows]:
    """The different prompts that are drawn, and which of them each step's rows are (`prompt` is [step row])."""
    places: dict[tuple[int, int], int] = {}
    columns: list[list[list[int]]] = []
    for run in runs:
        for member in run.members:
            draws = run.draws(tasks[member], config)
            columns.append([[places.setdefault((member, item), len(places)) for item in step] for step in draws])
    prompt = rearrange(torch.tensor(columns), "column step item -> step (column item)")
    batch = _zero_shot(list(places), "train", tasks, model)
    return batch, _Rows(prompt, *_owners(runs, [config.batch_size] * len(tasks)))


def _validation_rows(
    runs: Sequence[Run], tasks: Sequence[Task], model: Model, config: TrainConfig
) -> tuple[PromptBatch, _Rows]:
    """The first validation items of every task, and one row for each of them and each run that uses them."""
    counts = [min(config.n_valid, len(task.valid)) for task in tasks]
    items = [(member, item) for member, count in enumerate(counts) for item in range(count)]
    first = [sum(counts[:member]) for member in range(len(tasks))]
    prompt = [first[member] + item for run in runs for member in run.members for item in range(counts[member])]
    return _zero_shot(items, "valid", tasks, model), _Rows(torch.tensor(prompt), *_owners(runs, counts))


def _owners(runs: Sequence[Run], counts: Sequence[int]) -> tuple[Tensor, Tensor]:
    """The run and the task of every row, when each run has counts[member] rows for each member."""
    pairs = [(i, member) for i, run in enumerate(runs) for member in run.members for _ in range(counts[member])]
    run, task = zip(*pairs, strict=True)
    return torch.tensor(run), torch.tensor(task)


def _zero_shot(items: Sequence[tuple[int, int]], split: str, tasks: Sequence[Task], model: Model) -> PromptBatch:
    tokenizer = own_tokenizer(model)
    chosen = [(tasks[member], tasks[member].split(split)[item]) for member, item in items]
    prompts = [few_shot_prompt(task.template, [], example, tokenizer) for task, example in chosen]
    names = ", ".join(dict.fromkeys(task.name for task, _ in chosen))
    return tokenize(prompts, tokenizer, context_length(model), f"{split} items of {names}")


def _windows(
    prompt: Int[Tensor, "step row"], lengths: Sequence[int], model: Model, budget: int
) -> list[tuple[int, int]]:
    """Ranges of steps whose different prefixes fit the budget together (one step at least)."""
    windows: list[tuple[int, int]] = []
    seen: set[int] = set()
    start = 0
    for step, row in enumerate(prompt.tolist()):
        grown = seen | set(row)
        if step > start and len(grown) * prefix_bytes(model, max(lengths[i] for i in grown)) > budget:
            windows.append((start, step))
            start, grown = step, set(row)
        seen = grown
    return [*windows, (start, len(prompt))]


def _initial_logits(
    runs: Sequence[Run], config: TrainConfig, shape: tuple[int, ...], dtype: torch.dtype
) -> Float[Tensor, "run layer head"]:
    if config.init != "random":
        return torch.logit(torch.full((len(runs), *shape), float(config.init), dtype=dtype))
    alphas = []
    for run in runs:
        rng = random.Random(f"sitelens/init/{run.members if len(run.members) > 1 else ''}/{run.seed}")
        alphas.append([[rng.uniform(0.01, 0.99) for _ in range(shape[1])] for _ in range(shape[0])])
    return torch.logit(torch.tensor(alphas, dtype=dtype))


def _mean_by_run(losses: Float[Tensor, " row"], run: Int[Tensor, " row"], n: int) -> Float[Tensor, " run"]:
    totals = torch.zeros(n, dtype=losses.dtype).index_add_(0, run, losses)
    return totals / torch.bincount(run, minlength=n)


def _check_finite(losses: Tensor, rows: _Rows, runs: Sequence[Run], tasks: Sequence[Task], step: int) -> None:
    wrong = (~torch.isfinite(losses)).nonzero().flatten().tolist()
    if wrong:
        task, seed = tasks[int(rows.task[wrong[0]])].name, runs[int(rows.run[wrong[0]])].seed
        raise SitelensError(
            f"the loss of task {task!r}, seed {seed}, is {losses[wrong[0]].item()} at step {step + 1}: nothing is "
            "kept. Half-precision weights may overflow: try dtype='bfloat16' or 'float32', or a lower lr"
        )


def _label(runs: Sequence[Run], tasks: Sequence[Task]) -> str:
    return f"train {tasks[runs[0].members[0]].name}" if len(runs) == 1 else f"train {len(runs)} selections"
