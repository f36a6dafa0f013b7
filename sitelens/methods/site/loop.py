"""The training loop of alpha: all runs train together, one batch row per run and item, over cached prefixes.

Losses are summed and Adam works element by element, so a run's numbers do not depend on the other runs. The prefix of
an item is computed once for all steps that draw it, as far as the memory budget allows.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import cross_entropy

from sitelens.conditions.embedding import TaskEmbedding
from sitelens.engine.batches import PromptBatch, zero_shot_batch
from sitelens.engine.forward import HeadEdit, LastToken, Mixing
from sitelens.engine.memory import MAX_ROWS, chunks, prefix_bytes, step_cost
from sitelens.engine.prefix import PrefixCache
from sitelens.errors import SitelensError
from sitelens.methods.site.config import TrainConfig
from sitelens.methods.site.state import Record, State
from sitelens.models.model import Model
from sitelens.progress import Bar, progress
from sitelens.settings import settings
from sitelens.tasks import Task


@dataclass(frozen=True)
class Run:
    """One alpha to train: on a task with its embedding or, for a shared alpha, on several.

    Attributes:
        members: (task index, embedding index) pairs.
        seed, init: as in `TrainConfig`.
        key: digest of all that determines the numbers, by which an interrupted training is resumed ("": never).
    """

    members: tuple[tuple[int, int], ...]
    seed: int
    init: float | Literal["random"] = 0.5
    key: str = ""

    @property
    def tasks(self) -> tuple[int, ...]:
        """Task indices of the members."""
        return tuple(task for task, _ in self.members)

    def draws(self, task: Task, config: TrainConfig) -> list[list[int]]:
        """Indices of the training items of a task in each step; they depend on the task's name and the seed only."""
        rng = random.Random(f"sitelens/training/{task.name}/{self.seed}")
        return [[rng.randrange(len(task.train)) for _ in range(config.batch_size)] for _ in range(config.n_steps)]


@dataclass(frozen=True, eq=False)
class _Rows:
    """The rows of a batch: index of each row's prompt, run (whose alpha it uses), task and embedding."""

    prompt: Int[Tensor, "*steps row"]
    run: Int[Tensor, " row"]
    task: Int[Tensor, " row"]
    embedding: Int[Tensor, " row"]


def train_runs(
    runs: Sequence[Run],
    tasks: Sequence[Task],
    embeddings: Sequence[TaskEmbedding],
    model: Model,
    config: TrainConfig,
) -> Iterator[dict[str, Tensor]]:
    """Yields "alpha" `[layer head]` and "history" `[step column]` of each run, in order.

    Runs train together in groups whose validation prefixes fit half of the memory budget, so that these are computed
    once; a group's results are yielded before the next group starts. The state is saved at validations, at most every
    KEEP_SECONDS; an interrupted training resumes from it with the same numbers.

    Args:
        runs: the runs; their seed and init replace those of `config`.
        tasks, embeddings: what the runs' members index.
        config: hyperparameters.
    """
    budget = settings.budget()
    groups = _groups(runs, tasks, model, config, budget // 2)
    with progress(len(groups) * config.n_steps, _label(runs, tasks)) as bar:
        for group in groups:
            yield from _train_group(group, tasks, embeddings, model, config, budget, bar)


def _train_group(
    runs: Sequence[Run],
    tasks: Sequence[Task],
    embeddings: Sequence[TaskEmbedding],
    model: Model,
    config: TrainConfig,
    budget: int,
    bar: Bar,
) -> Iterator[dict[str, Tensor]]:
    dtype, device = model.computing_dtype, model.device
    vectors = torch.stack([embedding.mean_z.to(device, dtype) for embedding in embeddings])
    share = budget // 4  # for training prefixes, and for a step's computation; validation has the other half
    train, rows = _training_rows(runs, tasks, model, config)
    logits = _initial_logits(runs, tasks, model.shape[:2], dtype).to(device).requires_grad_(True)
    optimizer = torch.optim.Adam([logits], lr=config.lr)
    record = Record(len(runs), config, torch.zeros_like(logits, requires_grad=False))
    state = State([run.key for run in runs], logits, optimizer, record)
    begin = state.restore()
    with LastToken(model) as last_token:
        losses_of = functools.partial(
            _losses, last_token=last_token, vectors=vectors, mixing=config.mixing, budget=share
        )
        valid, valid_rows = _validation_rows(runs, tasks, model, config)
        validation = _Prompts(valid, model, budget // 2, share)
        bar.update(begin)
        for start, stop in _windows(rows.prompt, train.lengths, model, share):
            if stop <= begin:
                continue
            distinct, local = torch.unique(rows.prompt[start:stop], return_inverse=True)
            window = _Prompts(train.rows(distinct.tolist()), model, share, share)
            for step, index in zip(range(start, stop), local, strict=True):
                if step < begin:
                    continue
                alpha = torch.sigmoid(logits)
                losses, gradient = window.losses(alpha.detach(), replace(rows, prompt=index), losses_of, gradient=True)
                _check_finite(losses, rows, runs, tasks, step)
                optimizer.zero_grad()
                alpha.backward(gradient)
                optimizer.step()
                alpha = torch.sigmoid(logits.detach())
                record.step(step, _mean_by_run(losses, rows.run, len(runs)), alpha)
                if (step + 1) % config.eval_every == 0 or step + 1 == config.n_steps:
                    measured, _ = validation.losses(alpha, valid_rows, losses_of, gradient=False)
                    _check_finite(measured, valid_rows, runs, tasks, step, "validation loss")
                    record.validation(step, _mean_by_run(measured, valid_rows.run, len(runs)), alpha)
                    state.keep(step + 1)
                bar.update()
    for i in range(len(runs)):
        yield {"alpha": record.alpha[i].cpu(), "history": record.history[:, i].clone()}
    state.forget()


def _losses(
    alpha: Float[Tensor, "run layer head"],
    rows: _Rows,
    batch: PromptBatch,
    prefix: PrefixCache,
    *,
    last_token: LastToken,
    vectors: Float[Tensor, "embedding layer head d_head"],
    mixing: Mixing,
    budget: int,
    gradient: bool,
) -> tuple[Float[Tensor, " row"], Float[Tensor, "run layer head"]]:
    """Cross-entropy of each row's first answer token, and the gradient of the sum with respect to alpha (or zeros)."""
    losses = torch.zeros(len(rows.run), dtype=torch.float64)
    total = torch.zeros_like(alpha)
    device = alpha.device
    order = rows.prompt.argsort(stable=True)  # rows of one prompt are consecutive and share its prefix
    lengths = [batch.lengths[i] for i in rows.prompt[order].tolist()]
    cost = step_cost(last_token.passes, gradient)
    _, repeats = rows.prompt.unique(return_counts=True)
    fill = MAX_ROWS // int(repeats[0]) * int(repeats[0])  # whole prompts per chunk, if all repeat equally often
    for chunk in chunks(lengths, cost, budget, max_rows=fill or MAX_ROWS):
        part = order[chunk]
        prompt, run, embedding = (which[part].to(device) for which in (rows.prompt, rows.run, rows.embedding))
        with torch.set_grad_enabled(gradient):
            weights = alpha[run].requires_grad_(gradient)
            logits = last_token(prefix.grouped_by_prompt(prompt), HeadEdit.mix(weights, vectors[embedding], mixing))
            answers = batch.answer.to(logits.device)[prompt.to(logits.device)]
            loss = cross_entropy(logits.to(alpha.dtype), answers, reduction="none")
            if gradient:
                total.index_add_(0, run, torch.autograd.grad(loss.sum(), weights)[0])
        losses[part] = loss.detach().double().cpu()
    return losses, total


class _Prompts:
    """Prompts and their prefixes, which are kept if they fit the budget and otherwise recomputed in parts."""

    def __init__(self, batch: PromptBatch, model: Model, budget: int, working: int) -> None:
        self.batch, self.model, self.working = batch, model, working
        self.parts = [sorted(p) for p in chunks(batch.lengths, functools.partial(prefix_bytes, model), budget)]
        self.kept: PrefixCache | None = None

    def losses(
        self, alpha: Float[Tensor, "run layer head"], rows: _Rows, losses_of: Callable[..., Any], gradient: bool
    ) -> tuple[Float[Tensor, " row"], Float[Tensor, "run layer head"]]:
        """Each row's loss under its run's alpha, and the gradient of their sum with respect to alpha (or zeros)."""
        measured = torch.zeros(len(rows.run), dtype=torch.float64)
        total = torch.zeros_like(alpha)
        for index in self.parts:
            batch = self.batch.rows(index)
            prefix = self.kept or PrefixCache.of(batch, self.model, self.working)
            self.kept = prefix if len(self.parts) == 1 else None
            part = torch.tensor(index)
            chosen = torch.isin(rows.prompt, part)
            place = torch.searchsorted(part, rows.prompt[chosen])
            some = _Rows(place, rows.run[chosen], rows.task[chosen], rows.embedding[chosen])
            measured[chosen], by_alpha = losses_of(alpha, some, batch, prefix, gradient=gradient)
            total += by_alpha
            del prefix  # free it before the next part
        return measured, total


def _training_rows(
    runs: Sequence[Run], tasks: Sequence[Task], model: Model, config: TrainConfig
) -> tuple[PromptBatch, _Rows]:
    """The distinct training prompts, and the rows of each step (`prompt` is `[step row]`)."""
    places: dict[tuple[int, int], int] = {}
    columns: list[list[list[int]]] = []
    for run in runs:
        for task in run.tasks:
            draws = run.draws(tasks[task], config)
            columns.append([[places.setdefault((task, item), len(places)) for item in step] for step in draws])
    prompt = rearrange(torch.tensor(columns), "column step item -> step (column item)")
    batch = _zero_shot(list(places), "train", tasks, model)
    return batch, _Rows(prompt, *_owners(runs, [config.batch_size] * len(tasks)))


def _validation_rows(
    runs: Sequence[Run], tasks: Sequence[Task], model: Model, config: TrainConfig
) -> tuple[PromptBatch, _Rows]:
    """The first validation items of every task in use, and one row for each item and each run that uses it."""
    used = {task for run in runs for task in run.tasks}
    counts = [min(config.n_valid, len(task.valid)) if i in used else 0 for i, task in enumerate(tasks)]
    items = [(task, item) for task, count in enumerate(counts) for item in range(count)]
    first = [sum(counts[:task]) for task in range(len(tasks))]
    prompt = [first[task] + item for run in runs for task in run.tasks for item in range(counts[task])]
    return _zero_shot(items, "valid", tasks, model), _Rows(torch.tensor(prompt), *_owners(runs, counts))


def _owners(runs: Sequence[Run], counts: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Run, task and embedding index of each row; a member has `counts[task]` rows."""
    owners = [(i, *member) for i, run in enumerate(runs) for member in run.members for _ in range(counts[member[0]])]
    run, task, embedding = torch.tensor(owners).unbind(1)
    return run, task, embedding


def _zero_shot(items: Sequence[tuple[int, int]], split: str, tasks: Sequence[Task], model: Model) -> PromptBatch:
    pairs = [(tasks[task], tasks[task].split(split)[item]) for task, item in items]
    names = ", ".join(dict.fromkeys(task.name for task, _ in pairs))
    return zero_shot_batch(pairs, model, f"{split} items of {names}")


def _groups(
    runs: Sequence[Run], tasks: Sequence[Task], model: Model, config: TrainConfig, budget: int
) -> list[list[Run]]:
    """Consecutive runs, grouped so that their tasks' validation prefixes fit the budget (at least one per group)."""
    lengths: dict[int, list[int]] = {}
    for task in {task for run in runs for task in run.tasks}:
        items = [(task, item) for item in range(min(config.n_valid, len(tasks[task].valid)))]
        lengths[task] = _zero_shot(items, "valid", tasks, model).lengths
    groups: list[list[Run]] = []
    for run in runs:
        if groups:
            together = {task for member in [*groups[-1], run] for task in member.tasks}
            longest = max(max(lengths[task]) for task in together)
            if sum(len(lengths[task]) for task in together) * prefix_bytes(model, longest) <= budget:
                groups[-1].append(run)
                continue
        groups.append([run])
    return groups


def _windows(
    prompt: Int[Tensor, "step row"], lengths: Sequence[int], model: Model, budget: int
) -> list[tuple[int, int]]:
    """Ranges of steps whose distinct prefixes fit the budget together (at least one step per range)."""
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
    runs: Sequence[Run], tasks: Sequence[Task], shape: tuple[int, ...], dtype: torch.dtype
) -> Float[Tensor, "run layer head"]:
    alphas = torch.empty(len(runs), *shape, dtype=dtype)
    for alpha, run in zip(alphas, runs, strict=True):
        if run.init == "random":
            names = "+".join(sorted(tasks[task].name for task in run.tasks))
            rng = random.Random(f"sitelens/init/{names}/{run.seed}")
            start = [[rng.uniform(0.01, 0.99) for _ in range(shape[1])] for _ in range(shape[0])]
            alpha.copy_(torch.tensor(start, dtype=dtype))
        else:
            alpha.fill_(float(run.init))
    return torch.logit(alphas)


def _mean_by_run(losses: Float[Tensor, " row"], run: Int[Tensor, " row"], n: int) -> Float[Tensor, " run"]:
    totals = torch.zeros(n, dtype=losses.dtype).index_add_(0, run, losses)
    return totals / torch.bincount(run, minlength=n)


def _check_finite(
    losses: Tensor, rows: _Rows, runs: Sequence[Run], tasks: Sequence[Task], step: int, what: str = "loss"
) -> None:
    wrong = (~torch.isfinite(losses)).nonzero().flatten().tolist()
    if wrong:
        task, seed = tasks[int(rows.task[wrong[0]])].name, runs[int(rows.run[wrong[0]])].seed
        raise SitelensError(
            f"the {what} of task {task!r}, seed {seed}, is {losses[wrong[0]].item()} at step {step + 1}: nothing is "
            "kept. Half-precision weights may overflow: try dtype='bfloat16' or 'float32', or a lower lr"
        )


def _label(runs: Sequence[Run], tasks: Sequence[Task]) -> str:
    return f"train {tasks[runs[0].tasks[0]].name}" if len(runs) == 1 else f"train {len(runs)} selections"
