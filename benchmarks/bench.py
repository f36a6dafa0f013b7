"""`python -m benchmarks.bench [SECTION ...]`: speed-up over a plain implementation, on the packaged default model.

Every speed-up is a ratio of run times in the same run, with the same items and seeds and with results that are checked
to be equal. Results are printed and written to benchmarks/results/.
"""

from __future__ import annotations

import argparse
import platform
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import pandas as pd
import torch

import sitelens as sl
from benchmarks.plain import Plain
from sitelens.conditions.embedding import embedding_prompts
from sitelens.engine.batches import tokenize
from sitelens.engine.decoding import end_tokens
from sitelens.engine.prompts import few_shot_prompts
from sitelens.methods.site.loop import Run
from sitelens.models.model import Bridge, Model
from sitelens.settings import settings

RESULTS = Path(__file__).parent / "results"
NAMES = (
    "antonym", "country-capital", "capitalize", "synonym", "present-past", "singular-plural", "english-french",
    "english-german", "english-spanish", "landmark-country", "person-occupation", "person-sport",
    "lowercase_first_letter", "product-company", "word_length", "next_item",
)  # fmt: skip
# A short training with two validation prompts per step, as in 400 steps with 8 validations on 100 items.
CONFIG = sl.TrainConfig(n_steps=60, eval_every=15, n_valid=30)
SHORTER = sl.TrainConfig(n_steps=32, eval_every=4, n_valid=8)  # for long prompts; 8 validations, as by default


@dataclass(frozen=True)
class Figure:
    """One row of the table: the run times of the same work in two implementations.

    Attributes:
        work: description of the work.
        target: speed-up that should be reached.
        plain: seconds of the plain implementation.
        ours: seconds of sitelens.
    """

    work: str
    target: float
    plain: float
    ours: float

    @property
    def ratio(self) -> float:
        """The speed-up over the plain implementation."""
        return self.plain / self.ours


@dataclass(frozen=True, eq=False)
class Ground:
    """The models of all benchmarks: the same weights as a TransformerBridge and in a plain implementation."""

    model: Bridge
    plain: Plain

    @staticmethod
    def load() -> Ground:
        from transformers import AutoModelForCausalLM

        from sitelens.models.gguf.converted import packaged_folder

        model = sl.load_model()
        raw = AutoModelForCausalLM.from_pretrained(packaged_folder("smollm2-135m"), dtype=torch.float32).eval()
        return Ground(model, Plain(raw.requires_grad_(False)))

    def prompts(self, task: sl.Task, split: str, n: int) -> list[tuple[list[int], int, Collection[int]]]:
        """Token ids, first token of the answer and first tokens of all accepted answers, for the first `n` items."""
        tokenizer = Model.of(self.model).tokenizer
        drawn = few_shot_prompts(task, task.split(split)[:n], 0, tokenizer)
        batch = tokenize(drawn, tokenizer, Model.of(self.model).context_length)
        ids = [row[-length:].tolist() for row, length in zip(batch.tokens, batch.lengths, strict=True)]
        return list(zip(ids, batch.answer.tolist(), batch.accepted, strict=True))


def seconds(work: Callable[[], Any]) -> tuple[float, Any]:
    """The seconds that one call takes with an empty cache, and its result."""
    with tempfile.TemporaryDirectory() as folder, settings.using(cache_dir=Path(folder)):
        started = time.perf_counter()
        result = work()
        return time.perf_counter() - started, result


def padded(task: sl.Task, words: int) -> sl.Task:
    """The task with `words` filler words before each input."""
    from dataclasses import replace

    filler = " ".join(["and"] * words)
    parts = {
        split: tuple(replace(item, input=f"{filler} {item.input}") for item in task.split(split))
        for split in ("train", "valid", "test")
    }
    return replace(task, **parts)


def vectors(ground: Ground, tasks: Sequence[sl.Task]) -> dict[str, sl.TaskEmbedding]:
    """Embeddings of the tasks without filler words, from 5 prompts each."""
    return {task.name: sl.embed_task(sl.load_task(task.name), ground.model, n_prompts=5) for task in tasks}


def training(
    ground: Ground,
    work: str,
    target: float,
    tasks: Sequence[sl.Task],
    seeds: Sequence[int],
    sample: int = 0,
    config: sl.TrainConfig = CONFIG,
) -> Figure:
    """Training all tasks and seeds together, against training them one after the other.

    If `sample` is not 0, only that many of the separate trainings are timed, and their mean is multiplied.
    """
    embeddings = vectors(ground, tasks)
    ours, results = seconds(
        lambda: sl.train_selections(tasks, ground.model, embeddings=embeddings, seeds=seeds, config=config)
    )
    runs = [(task, seed) for task in tasks for seed in seeds]
    chosen = runs[:: max(1, len(runs) // sample)][:sample] if sample else runs
    total = 0.0
    for task, seed in chosen:
        draws = [step[0] for step in Run(((0, 0),), seed).draws(task, config)]
        prompts, valid = (
            [(ids, answer) for ids, answer, _ in ground.prompts(task, split, n)]
            for split, n in (("train", len(task.train)), ("valid", config.n_valid))
        )
        mean_z = embeddings[task.name].mean_z
        took, (alpha, losses) = seconds(
            lambda p=prompts, v=valid, d=draws, m=mean_z: ground.plain.train(p, v, d, m, config.eval_every)
        )
        total += took
        check_equal(work, results[task.name, seed], alpha, losses)
    return Figure(work, target, total * len(runs) / len(chosen), ours)


def check_equal(work: str, ours: sl.TrainResult, alpha: torch.Tensor, losses: list[float]) -> None:
    """Assert that the first losses and the alphas agree; rounding errors grow tenfold in about five steps of Adam."""
    apart = max(abs(a - b) for a, b in zip(ours.history["loss"][:8], losses[:8], strict=True))
    assert apart < 2e-3 * max(losses[:8]), f"{work}: losses of the first steps differ by up to {apart}"
    difference = float((alpha - ours.selection.alpha).abs().mean())
    assert difference < 0.02, f"{work}: alphas differ by {difference} on average"


def one_task(ground: Ground) -> Iterator[Figure]:
    """Training of one task with short prompts."""
    task = sl.load_task("antonym")
    training(ground, "", 0, [task], (1,))  # warm-up
    yield training(ground, "train_selection, one task, about 10 tokens", 1.3, [task], (0,))


def together(ground: Ground, tokens: int, target: float, sample: int, config: sl.TrainConfig) -> Iterator[Figure]:
    """Training of sixteen tasks together, with prompts of about `tokens` tokens."""
    tasks = [sl.load_task(name) for name in NAMES]
    if tokens > 10:
        tasks = [padded(task, tokens - 10) for task in tasks]
    work = f"train_selections, 16 tasks, about {tokens} tokens"
    yield training(ground, work, target, tasks, (0,), sample, config)


def many_seeds(ground: Ground) -> Iterator[Figure]:
    """Training of four tasks with five seeds each."""
    tasks = [sl.load_task(name) for name in NAMES[:4]]
    yield training(ground, "5 seeds of 4 tasks together against 20 runs", 8, tasks, range(5), sample=5)


def grid(ground: Ground) -> Iterator[Figure]:
    """A transfer matrix of sixteen tasks."""
    tasks = [sl.load_task(name) for name in NAMES]
    embeddings = vectors(ground, tasks)
    shape = (ground.model.cfg.n_layers, ground.model.cfg.n_heads)
    alphas = {
        task.name: sl.HeadSelection((torch.rand(shape, generator=torch.Generator().manual_seed(i)) > 0.5).float())
        for i, task in enumerate(tasks)
    }
    ours, matrix = seconds(
        lambda: sl.transfer_matrix(tasks, ground.model, n_items=50, embeddings=embeddings, selections=alphas)
    )
    total, cells = 0.0, [(0, 1), (3, 2), (9, 5), (12, 12), (6, 14), (15, 8)]
    for source, target in cells:
        task = tasks[target]
        items = sample(ground, task, 50)
        alpha, mean_z = alphas[tasks[source].name].alpha, embeddings[task.name].mean_z
        took, hits = seconds(lambda i=items, a=alpha, m=mean_z: ground.plain.hits(i, a, m))
        total += took
        assert abs(sum(hits) / len(hits) - matrix.frame.loc[tasks[source].name, task.name]) < 1e-9
    yield Figure("transfer matrix, 16 x 16, 50 items per target", 8, total / len(cells) * len(tasks) ** 2, ours)


def sample(ground: Ground, task: sl.Task, n: int) -> list[tuple[list[int], Collection[int]]]:
    """Token ids and first tokens of accepted answers of the `n` test items that `evaluate` samples."""
    from sitelens.evaluation.evaluate import sample_items

    every = ground.prompts(task, "test", len(task.test))
    return [(every[i][0], every[i][2]) for i in sample_items(task, "test", n, 0)]


def variants(ground: Ground) -> Iterator[Figure]:
    """Evaluation of twelve patching variants of one task."""
    task = sl.load_task("capitalize")
    mean_z = vectors(ground, [task])["capitalize"]
    shape = (ground.model.cfg.n_layers, ground.model.cfg.n_heads)
    alpha = sl.HeadSelection(torch.rand(shape, generator=torch.Generator().manual_seed(0)))
    chosen = [alpha, alpha.hard(), alpha.top(64), alpha.bottom(64), *(alpha.random(64, seed=i) for i in range(8))]
    conditions = {str(i): sl.PatchHeads(selection, mean_z) for i, selection in enumerate(chosen)}
    ours, scores = seconds(lambda: sl.evaluate(task, conditions, ground.model, n_items=100))
    items = sample(ground, task, 100)
    total = 0.0
    for name in list(conditions)[::3]:
        took, hits = seconds(lambda a=chosen[int(name)].alpha: ground.plain.hits(items, a, mean_z.mean_z))
        total += 3 * took
        assert scores.loc[scores["condition"] == name, "score"].tolist() == [int(hit) for hit in hits]
    yield Figure("evaluation of 12 patching variants, 100 items", 7, total, ours)


def generation(ground: Ground) -> Iterator[Figure]:
    """Evaluation of exact match, which requires generation."""
    task, tokenizer = sl.load_task("capitalize"), Model.of(ground.model).tokenizer
    mean_z = vectors(ground, [task])["capitalize"]
    shape = (ground.model.cfg.n_layers, ground.model.cfg.n_heads)
    alpha = sl.HeadSelection(torch.rand(shape, generator=torch.Generator().manual_seed(0)) * 0.3)
    site = {"": sl.PatchHeads(alpha, mean_z)}
    ours, scores = seconds(lambda: sl.evaluate(task, site, ground.model, n_items=100, metrics=("exact_match",)))
    items = sample(ground, task, 100)
    newlines = {i for i in range(len(tokenizer)) if "\n" in tokenizer.decode([i])}
    stops = newlines | end_tokens(Model.of(ground.model), tokenizer)

    def plain() -> list[list[int]]:
        return [ground.plain.generate(ids, alpha.alpha, mean_z.mean_z, stops) for ids, _ in items]

    took, written = seconds(plain)
    texts = [tokenizer.decode(ids, skip_special_tokens=True).split("\n")[0].strip() for ids in written]
    same = sum(a == b for a, b in zip(texts, scores["predicted"], strict=True))
    assert same >= 0.97 * len(texts), f"generation: only {same} texts are the same"  # near-ties may differ
    yield Figure("exact-match evaluation by generation, 100 items", 5, took, ours)


def embedding(ground: Ground) -> Iterator[Figure]:
    """embed_task against bare forward passes over as many tokens without padding, which are a lower bound."""
    task = sl.load_task("antonym")
    tokenizer = Model.of(ground.model).tokenizer
    batch = tokenize(embedding_prompts(task, tokenizer, 50, 10, 0), tokenizer, Model.of(ground.model).context_length)
    flat = torch.cat([row[-length:] for row, length in zip(batch.tokens, batch.lengths, strict=True)])
    length = sum(batch.lengths) // len(batch)
    rows = flat[: len(flat) // length * length].reshape(-1, length)

    @torch.no_grad()
    def bare() -> None:
        for part in rows.split(max(1, 2048 // length)):
            ground.plain.network.model(part, use_cache=False)

    bare()
    plain, _ = seconds(bare)
    ours, _ = seconds(lambda: sl.embed_task(task, ground.model))
    yield Figure("embed_task (M=50, N=10) against a bare forward", 1 / 1.25, plain, ours)


def cached(ground: Ground) -> Iterator[Figure]:
    """Second calls, whose results are cached; the ratio is relative to 0.1 s."""
    task = sl.load_task("antonym")
    tasks = [task, sl.load_task("capitalize")]
    config = sl.TrainConfig(n_steps=2, n_valid=2)
    with tempfile.TemporaryDirectory() as folder, settings.using(cache_dir=Path(folder)):
        calls: dict[str, Callable[[], Any]] = {
            "embed_task": lambda: sl.embed_task(task, ground.model, n_prompts=2),
            "train_selection": lambda: sl.train_selection(
                task, ground.model, embedding=vectors(ground, [task])["antonym"], config=config
            ),
            "transfer_matrix": lambda: sl.transfer_matrix(tasks, ground.model, n_items=4, n_prompts=2, config=config),
        }
        for name, call in calls.items():
            call()
            started = time.perf_counter()
            call()
            yield Figure(f"second call of {name}, within 0.1 s", 1, 0.1, time.perf_counter() - started)


SECTIONS: dict[str, Callable[[Ground], Iterator[Figure]]] = {
    "one-task": one_task,
    "many-tasks": lambda ground: together(ground, 10, 7, 3, CONFIG),
    "60-tokens": lambda ground: together(ground, 60, 3.5, 2, CONFIG),
    "200-tokens": lambda ground: together(ground, 200, 3.5, 1, SHORTER),
    "many-seeds": many_seeds, "grid": grid, "variants": variants,
    "generation": generation, "embedding": embedding, "cached": cached,
}  # fmt: skip


def machine() -> str:
    """Processor, number of threads, operating system and versions."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [
            line.split(":")[1].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")
        ]
        name = names[0] if names else name
    versions = f"Python {platform.python_version()}, torch {torch.__version__}"
    return f"{name}, {torch.get_num_threads()} threads, {platform.system()}, {versions}"


def main() -> None:
    """Run the sections given on the command line, or all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("sections", nargs="*", choices=[*SECTIONS, []], metavar="SECTION", help=", ".join(SECTIONS))
    options = parser.parse_args()
    ground = Ground.load()
    sl.settings.progress = False
    for name in options.sections or SECTIONS:
        for figure in SECTIONS[name](ground):
            verdict = "met" if figure.ratio >= figure.target else "MISSED"
            print(f"{figure.work:<52} plain {figure.plain:8.2f} s  ours {figure.ours:8.2f} s  "
                  f"{figure.ratio:6.2f}x  target {figure.target:.2f}x  {verdict}", flush=True)  # fmt: skip
            keep(name, figure)


def keep(section: str, figure: Figure) -> None:
    """Write one row to benchmarks/results/against-plain.csv, replacing an older row for the same work."""
    path = RESULTS / "against-plain.csv"
    row = {
        "section": section, "work": figure.work, "plain_seconds": round(figure.plain, 2),
        "our_seconds": round(figure.ours, 3), "ratio": round(figure.ratio, 2), "target": round(figure.target, 2),
        "met": figure.ratio >= figure.target, "date": f"{date.today()}", "machine": machine(),
    }  # fmt: skip
    former = pd.read_csv(path) if path.exists() else pd.DataFrame(columns=list(row))
    rows: list[dict[Any, Any]] = [*former[former["work"] != figure.work].to_dict("records"), row]
    RESULTS.mkdir(exist_ok=True)
    rows.sort(key=lambda line: list(SECTIONS).index(line["section"]))
    pd.DataFrame(rows).to_csv(path, index=False)


if __name__ == "__main__":
    main()
