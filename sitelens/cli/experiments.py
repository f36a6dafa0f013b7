"""Commands that compute: run, transfer, compare, suite, verify, figures."""

from __future__ import annotations

import argparse
import sys
import warnings
from typing import TYPE_CHECKING

from sitelens.cli.options import run_options
from sitelens.cli.outputs import kept, look_first
from sitelens.cli.parser import Parser
from sitelens.cli.reading import methods_of, number, tasks_of, template_options, typed_command
from sitelens.errors import SitelensError, SitelensWarning
from sitelens.files.escaping import visible
from sitelens.progress import Job

if TYPE_CHECKING:
    from sitelens.methods.site.config import TrainConfig
    from sitelens.models.model import Bridge
    from sitelens.reports.run import RunConfig


LOAD = "load the model"
# Options of `run` that a run.json does not record; they may be combined with --again.
_NOT_RECORDED = (
    "again",
    "out",
    "formats",
    "dtype",
    "device",
    "device_map",
    "quantize",
    "trust_remote_code",
    "memory_budget",
    "cache",
    "data",
    "progress",
    "command",
)


def run(options: argparse.Namespace) -> None:
    look_first(options)
    with _job("run") as job:
        with job.stage(LOAD):
            config = run_config(options)
            from sitelens.tasks import load_tasks, rewritten

            with warnings.catch_warnings():  # the run itself issues them
                warnings.simplefilter("ignore", SitelensWarning)
                rendering = config.template, config.instruction, config.template_arguments
                tasks = [rewritten(task, *rendering) for task in load_tasks(config.tasks)]  # errors before a model
            from sitelens.reports.records import read_record, recorded_precision, warn_of_changes
            from sitelens.reports.run import run

            if options.again is not None:
                for name, value in recorded_precision(read_record(options.again), vars(options)).items():
                    setattr(options, name, value)
            model = _load_model(options, config.model)
            if options.again is not None:
                warn_of_changes(options.again, model, tasks)
        with job.rest():
            report = run(config, model)
    for metric in config.metrics:
        print(f"{metric.replace('_', ' ')}, percent, 95% intervals, at most {config.n_items or 'all'} test items per "
              f"task, model {config.model}\n")  # fmt: skip
        print(report.text(metric) + "\n")
    print(f"random: mean of {config.draws} draws, ± their standard deviation; echo: answering with the query itself")
    if options.out is not None:
        with kept(options):
            report.save(options.out, options.formats)
        print(f"heatmaps, selections, embeddings, scores and run.json are in {options.out}")


def _job(label: str) -> Job:
    """The progress of a command; slow imports belong inside its first stage, so that progress shows at once."""
    return Job(label, [LOAD])


def _load_model(options: argparse.Namespace, name: str | None = None) -> Bridge:
    from sitelens.models.loading import load_model

    return load_model(
        name or options.model, dtype=options.dtype, device=options.device, device_map=options.device_map,
        quantize=options.quantize, trust_remote_code=options.trust_remote_code,
    )  # fmt: skip


def run_config(options: argparse.Namespace) -> RunConfig:
    from sitelens.reports.run import RunConfig

    if options.again is not None:
        plain = Parser()
        run_options(plain)
        usual = vars(plain.parse_args([]))
        changed = [name for name, value in usual.items() if name not in _NOT_RECORDED and value != vars(options)[name]]
        if changed:
            raise SitelensError(f"give tasks and options or --again run.json, not both: {', '.join(changed)}")
        return RunConfig.load(options.again)
    if not options.tasks:
        raise SitelensError("name at least one task; `sitelens tasks` lists them")
    return RunConfig(
        tasks=tuple(options.tasks), **template_options(options), model=options.model, n_prompts=options.n_prompts,
        n_shots=options.n_shots, train=_train_config(options), k=options.k, draws=options.draws,
        n_items=options.n_items or None, metrics=tuple(dict.fromkeys(options.metrics)), seed=options.seed,
    )  # fmt: skip


def _train_config(options: argparse.Namespace) -> TrainConfig:
    from sitelens.methods.site.config import TrainConfig

    return TrainConfig(
        n_steps=options.n_steps, lr=options.lr, batch_size=options.batch_size, eval_every=options.eval_every,
        n_valid=options.n_valid, checkpoint=options.checkpoint, mixing=options.mixing, seed=options.train_seed,
        init=options.init if options.init == "random" else number(options.init, "--init"),
    )  # fmt: skip


def transfer(options: argparse.Namespace) -> None:
    look_first(options)
    with _job("transfer") as job:
        with job.stage(LOAD):
            train = _train_config(options)
            tasks, left_out = tasks_of(options.tasks)  # reports a wrong name before the model is loaded
            from sitelens.studies.transfer import transfer_matrix
            from sitelens.tasks import rewritten

            tasks = [rewritten(task, **template_options(options)) for task in tasks]

            model = _load_model(options)
        with job.rest():
            grid = transfer_matrix(
                tasks, model, swap=options.swap, n_items=options.n_items or None, metric=options.metric,
                n_prompts=options.n_prompts, n_shots=options.n_shots, config=train, seed=options.seed,
            )  # fmt: skip
    print(f"{options.metric.replace('_', ' ')} accuracy in percent, model {options.model}: sources down, targets "
          f"across, {options.swap} of the source\n")  # fmt: skip
    print((100 * grid.matrix).round().astype(int).rename(visible, axis=0).rename(visible, axis=1).to_string() + "\n")
    print((100 * grid.zero_shot).round().astype(int).rename(visible).rename("zero-shot").to_frame().T.to_string())
    if options.out is not None:
        with kept(options):
            command, facts = typed_command(options), {"left_out": left_out}
            grid.save(options.out, options.formats, name=options.name, command=command, facts=facts)
        print(f"\ntables, heatmap, their numbers and their origin are in {options.out}")


def compare(options: argparse.Namespace) -> None:
    look_first(options)
    with _job("compare") as job:
        with job.stage(LOAD):
            tasks, left_out = tasks_of(options.tasks)  # reports a wrong name before the model is loaded
            from sitelens.reports.comparison import compare
            from sitelens.tasks import rewritten

            tasks = [rewritten(task, **template_options(options)) for task in tasks]
            methods = methods_of(options)
            model = _load_model(options)
            n_items = options.n_items or None
        with job.rest():
            comparison = compare(tasks, methods, model, n_items=n_items, seed=options.seed)
    print(f"first-token accuracy in percent with 95% intervals, at most {n_items or 'all'} test items per task, model "
          f"{options.model}; costs: means over tasks\n")  # fmt: skip
    print(comparison.markdown())
    if options.out is not None:
        with kept(options):
            facts = {"left_out": left_out}
            comparison.save(options.out, options.formats, command=typed_command(options), facts=facts)
        print(f"\ntables, figure, their numbers and their origin are in {options.out}")


def suite(options: argparse.Namespace) -> None:
    look_first(options)
    with _job("suite") as job:
        with job.stage(LOAD):
            methods, n_items = methods_of(options), options.n_items or None
            from sitelens.reports.suite import NOT_REQUESTED, check_suite, run_suite

            check_suite(options.suite, tasks=options.tasks, metric=options.metric, n_items=n_items)
            model = _load_model(options)
        with job.rest():
            found = run_suite(
                options.suite, model, methods=methods, tasks=options.tasks, metric=options.metric, n_items=n_items,
                n_shots=options.n_shots, seed=options.seed,
            )  # fmt: skip
    print(f"{options.metric.replace('_', ' ')}, percent, means over tasks with 95% intervals, "
          f"at most {n_items or 'all'} test items per task, model {options.model}\n")  # fmt: skip
    print(found.markdown())
    others = [task for task, reason in found.left_out.items() if reason == NOT_REQUESTED]
    if others:
        print(f"{len(others)} more tasks of the suite were not requested", file=sys.stderr)
    for task, reason in found.left_out.items():
        if reason != NOT_REQUESTED:
            print(f"left out: {visible(task)} ({visible(reason)})", file=sys.stderr)
    for row in found.tasks[found.tasks["dropped"] > 0].itertuples():
        print(f"{row.task}: {row.dropped} items are too long for the context and were dropped", file=sys.stderr)
    if options.out is not None:
        with kept(options):
            found.save(options.out, options.formats, name=options.name, command=typed_command(options))
        print(f"\ntables, figure, their numbers and their origin are in {options.out}")


def verify(options: argparse.Namespace) -> None:
    from sitelens.tasks import load_task

    task = load_task(options.task)  # reports a wrong name before the model is loaded
    from sitelens.reports.verification.verify import verify

    report = verify(_load_model(options), task=task)
    print("\n".join(map(visible, str(report).splitlines())))
    if not report.ok:
        raise SitelensError(f"{report.model}: these checks fail: {', '.join(report.failures)}")


def figures(options: argparse.Namespace) -> None:
    from sitelens.reports.gallery import make_figures
    from sitelens.studies import STUDIES

    if options.list:
        print("\n".join(f"{name:<26}{study.caption}" for name, study in STUDIES.items()))
        return
    look_first(options)
    written = make_figures(
        options.names or None, options.out, options.model, tasks=options.tasks, n_items=options.n_items,
        seed=options.seed, formats=options.formats, config=_train_config(options),
    )  # fmt: skip
    print("\n".join(map(str, written)))
