"""Reading a run.json: its content, the command that repeats the run, and what has changed since then."""

from __future__ import annotations

import json
import shlex
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from sitelens.checks.schema import parsed_json
from sitelens.errors import SitelensError, SitelensWarning
from sitelens.evaluation.record import RENDERING, task_record
from sitelens.methods.site.config import TrainConfig
from sitelens.models.gguf.converted import PACKAGED
from sitelens.models.model import Model, ModelLike
from sitelens.models.provenance import model_facts, versions
from sitelens.tasks import Task

COMPUTING = ("sitelens", "torch", "transformers", "transformer-lens")
RENAMED = {"template_arguments": "template-arg"}  # fields of RunConfig whose option has another name
TRAIN_RENAMED = {"seed": "train-seed"}


def read_record(path: str | Path) -> dict[str, Any]:
    """The content of a run.json.

    Raises:
        SitelensError: if the file does not exist, cannot be read, or is not a run.json.
    """
    try:
        text = Path(path).read_bytes()
    except (FileNotFoundError, IsADirectoryError) as error:
        raise SitelensError(f"there is no file {path}") from error
    except OSError as error:
        raise SitelensError(f"{path} cannot be read: {error.strerror or error}") from error
    try:
        content = parsed_json(text, path)
    except SitelensError as error:
        raise SitelensError(f"{path} is no run.json of sitelens: {error}") from error
    if not isinstance(content, dict) or not isinstance(content.get("config"), dict):
        raise SitelensError(f"{path} is no run.json of sitelens: it has no object config")
    return content


def run_command(config: Any, model: ModelLike | None = None) -> str:
    """The `sitelens run` command for a RunConfig, quoted for a shell, with all options that differ from their defaults.

    Args:
        config: the RunConfig.
        model: the model that ran; if given, its dtype and quantization are added if its name alone would not imply
            them.
    """
    plain = type(config)(tasks=config.tasks)
    words = [] if any(task.startswith("-") for task in config.tasks) else list(config.tasks)
    for field in fields(config):
        name, value = field.name, getattr(config, field.name)
        option = f"--{RENAMED.get(name, name).replace('_', '-')}"
        if name == "train":
            words += train_options(value)
        elif name == "tasks" or (value == getattr(plain, name) and name != "model"):
            continue
        elif name == "template_arguments":
            words += [option, *(f"{key}={json.dumps(inner)}" for key, inner in dict(value).items())]
        elif name == "metrics":
            words += [option, *value]
        else:  # joined by "=", because a template may begin with a dash
            words.append(f"{option}={0 if name == 'n_items' and value is None else value}")
    words += _precision(config.model, model) if model is not None else []
    words += [] if words[: len(config.tasks)] == list(config.tasks) else ["--", *config.tasks]
    return f"sitelens run {shlex.join(words)}"


def train_options(config: TrainConfig) -> list[str]:
    """The command-line options for the fields of a TrainConfig that differ from their defaults."""
    plain, words = TrainConfig(), []
    for field in fields(config):
        value = getattr(config, field.name)
        if value != getattr(plain, field.name):
            words.append(f"--{TRAIN_RENAMED.get(field.name, field.name).replace('_', '-')}={value}")
    return words


def _precision(name: str, model: ModelLike) -> list[str]:
    facts = model_facts(model)
    usual = "float32" if name in PACKAGED or name.endswith(".gguf") else None
    usual = "bfloat16" if facts["quantize"] else usual
    words = [f"--quantize={facts['quantize']}"] if facts["quantize"] else []
    return words if facts["dtype"] == usual else [*words, f"--dtype={facts['dtype']}"]


def recorded_precision(record: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, str | None]:
    """The dtype and quantization with which to load the model of a run.json.

    Args:
        record: the content of the run.json.
        given: options of the user; if it has a dtype or quantization, these are used instead of the recorded ones.
    """
    names = ("dtype", "quantize")
    if any(given.get(name) is not None for name in names):
        return {name: given.get(name) for name in names}
    known = _object(record, "model")
    return {name: known[name] if isinstance(known.get(name), str) else None for name in names}


def warn_of_changes(path: str | Path, model: ModelLike, tasks: Iterable[Task] = ()) -> None:
    """Issue one SitelensWarning per change since a run.json was written that may change the numbers.

    Raises:
        SitelensError: if the file cannot be read or is not a run.json.
    """
    for line in changes(read_record(path), model, tasks):
        warnings.warn(f"{path} {line}", SitelensWarning, stacklevel=2)


def changes(record: Mapping[str, Any], model: ModelLike, tasks: Iterable[Task]) -> list[str]:
    """Differences between a run.json (`record`) and the present model, tokenizer, versions and tasks, one line each."""
    found: list[str] = []
    now = model_facts(model)
    before = _object(record, "model")
    known = {name: before[name] for name in ("name", "revision", "dtype", "quantize") if before.get(name) is not None}
    said = ", ".join(str(value) for name, value in known.items() if name != "revision")
    if before.get("fingerprint") not in (None, now["fingerprint"]):
        found.append(f"was made with other weights ({said}) than those loaded now: the numbers will differ")
    for name in ("name", "revision", "dtype", "quantize"):
        if name in before and before[name] != now[name]:
            found.append(f"was made with a model of {name} {before[name]}, now it is {now[name]}")
    if record.get("tokenizer") not in (None, Model.of(model).tokenization()):
        found.append("was made with another tokenizer or chat template")
    here = versions()
    there = _object(record, "versions")
    for name in COMPUTING:
        if name in there and there[name] != here.get(name):
            found.append(f"was made with {name} {there[name]}, now it is {here.get(name)}")
    recorded = _object(record, "tasks")
    for task in tasks:
        found += _task_changes(recorded.get(task.name), task)
    return found


def _task_changes(before: Any, task: Task) -> list[str]:
    if not isinstance(before, dict) or before.get("digest") in (None, task.digest):
        return []
    now = json.loads(json.dumps(task_record(task)))
    names = [name for name in (*RENDERING, "train", "valid", "test") if name in before and before[name] != now[name]]
    lines = []
    for name in names:
        what = name if name in RENDERING else f"number of {name} items"
        lines.append(f"was made with another {what} of the task {task.name!r}: {before[name]!r}, now {now[name]!r}")
    return lines or [f"was made with other items of the task {task.name!r}: its digest has changed"]


def _object(record: Mapping[str, Any], name: str) -> dict[str, Any]:
    value = record.get(name)
    return value if isinstance(value, dict) else {}
