"""Provenance: the command, the model's weights, the machine and the library versions behind a number."""

from __future__ import annotations

import datetime
import platform
from collections.abc import Iterable
from dataclasses import dataclass, fields
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from sitelens.models.model import Model, ModelLike
from sitelens.tasks import Task
from sitelens.version import __version__

RECORDED = ("torch", "transformers", "transformer-lens", "numpy", "pandas", "plotly", "safetensors", "gguf")
IF_INSTALLED = ("accelerate", "bitsandbytes", "datasets", "peft")
CPU_FACTS = Path("/proc/cpuinfo")


@dataclass(frozen=True, kw_only=True)
class Origin:
    """Where a selection, an embedding or a condition came from. Unknown entries are None.

    Attributes:
        model: the model's name.
        revision: its commit on the hub.
        dtype: dtype of its activations.
        quantize: "nf4" or None.
        weights: digest of its parameters.
        task_digest: digest of the task.
        template: of the task; likewise `instruction` and `template_arguments`.
        n_prompts: number of prompts behind the task embedding; likewise `n_shots` and `seed`.
        created: date (UTC).
        sitelens: version of sitelens.
    """

    model: str | None = None
    revision: str | None = None
    dtype: str | None = None
    quantize: str | None = None
    weights: str | None = None
    task_digest: str | None = None
    template: str | None = None
    instruction: str | None = None
    template_arguments: tuple[tuple[str, Any], ...] | None = None
    n_prompts: int | None = None
    n_shots: int | None = None
    seed: int | None = None
    created: str | None = None
    sitelens: str | None = None

    @staticmethod
    def of(model: ModelLike, task: Task | None = None, **prompts: Any) -> Origin:
        """The origin of something made now with a model, for a task; `prompts` are n_prompts, n_shots and seed."""
        model = Model.of(model)
        about: dict[str, Any] = {}
        if task is not None:
            about = {
                "task_digest": task.digest, "template": task.template, "instruction": task.instruction,
                "template_arguments": tuple(task.template_arguments),
            }  # fmt: skip
        with model.unchanged():  # reads the weights once
            facts, weights = model_facts(model), model.weights_digest()
        return Origin(
            model=facts["name"], revision=facts["revision"], dtype=facts["dtype"], quantize=facts["quantize"],
            weights=weights,
            created=datetime.datetime.now(datetime.UTC).date().isoformat(), sitelens=__version__, **about, **prompts,
        )  # fmt: skip

    @staticmethod
    def shared(origins: Iterable[Origin | None]) -> Origin | None:
        """The entries that all known origins have in common; the others are None. None if no origin is known."""
        known = [origin for origin in origins if origin is not None]
        if not known:
            return None
        values = {field.name: [getattr(origin, field.name) for origin in known] for field in fields(Origin)}
        return Origin(**{name: of[0] for name, of in values.items() if all(one == of[0] for one in of)})

    def other_precision(self, model: ModelLike) -> str | None:
        """The recorded precision, in words, if `model` is the same (name, revision) in another one; else None."""
        now = model_facts(model)
        same = self.model is not None and (self.model, self.revision) == (now["name"], now["revision"])
        if not same or (self.dtype, self.quantize) == (now["dtype"], now["quantize"]):
            return None
        return (f"{self.model} in {self.quantize or self.dtype} "
                f"(not in {now['quantize'] or now['dtype']}, as it is loaded now)")  # fmt: skip

    def same_model(self, other: Origin | None) -> bool:
        """Whether both come from the same model by name and revision, in any precision."""
        return (
            other is not None
            and self.model is not None
            and (self.model, self.revision) == (other.model, other.revision)
        )


def model_label(origin: Origin | None, fingerprint: str | None) -> str:
    """A short text for a repr: "model='smollm2-135m'", or the fingerprint's first digits if the name is unknown."""
    name = origin.model if origin is not None and origin.model is not None else (fingerprint or "")[:8]
    return f"model={name!r}" if name else "any model"


def model_facts(model: ModelLike) -> dict[str, Any]:
    """Plain JSON: name, revision (commit on the hub, if known), fingerprint, heads, dtype and quantize of a model.

    The name of a folder or file is given without its path.
    """
    model = Model.of(model)
    name, network = model.name, model.network
    return {
        "name": Path(name).name if is_path(name) else name, "revision": getattr(network.config, "_commit_hash", None),
        "fingerprint": model.fingerprint(), "heads": list(model.shape[:2]),
        "dtype": str(model.dtype).removeprefix("torch."),
        "quantize": "nf4" if getattr(network, "is_loaded_in_4bit", False) else None,
    }  # fmt: skip


def is_path(name: str) -> bool:
    """Whether a model's name is the path of a folder or file."""
    return name.endswith(".gguf") or name.startswith(("/", ".", "~")) or "\\" in name or Path(name).is_dir()


def provenance(command: str, model: ModelLike, name: str | None = None) -> dict[str, Any]:
    """How a result was made, as plain JSON: made_by, created (UTC), model (`model_facts`), versions, python, machine.

    The machine's own name is not recorded.

    Args:
        command: the command or function that made the result.
        model: the model that was used.
        name: a name for the model, instead of its own.
    """
    facts = model_facts(model)
    if name is not None:
        facts["name"] = Path(name).name if is_path(name) else name
    return {
        "made_by": command,
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "model": facts,
        "versions": versions(),
        "python": platform.python_version(),
        "machine": machine(Model.of(model)),
    }


def versions() -> dict[str, str]:
    """The versions of sitelens and of the libraries that it uses."""
    found = {name: metadata.version(name) for name in (*RECORDED, *filter(find_spec, IF_INSTALLED))}
    return dict(sorted(found.items())) | {"sitelens": __version__}


def machine(model: Model) -> dict[str, Any]:
    """The hardware that a model runs on: processor, number of threads, and the GPU if it is on one."""
    try:
        lines = CPU_FACTS.read_text("utf-8", "replace").splitlines()
    except OSError:
        lines = []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    found: dict[str, Any] = {"cpu": next(iter(named), "") or platform.processor() or platform.machine()}
    found["threads"] = torch.get_num_threads()
    device = torch.device(model.device or "cpu")
    if device.type == "cuda":
        found["gpu"] = torch.cuda.get_device_name(device)
    return found
