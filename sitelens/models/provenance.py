"""Where a number came from: the command, the model's weights, the machine, and the versions of everything below us."""

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
    """Where a selection, an embedding or a condition came from. What is not known is None.

    model, revision, dtype, quantize: the model's name, its commit on the hub, the dtype of its activations, and "nf4"
        or None. weights: a digest of its parameters.
    task_digest, template, instruction, template_arguments: of the task, as its fields.
    n_prompts, n_shots, seed: the prompts behind the task embedding.
    created: the day (UTC). sitelens: the version.
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
        """Of what is made now with a model, for a task, from prompts (n_prompts, n_shots, seed)."""
        model = Model.of(model)
        about: dict[str, Any] = {}
        if task is not None:
            about = {
                "task_digest": task.digest, "template": task.template, "instruction": task.instruction,
                "template_arguments": tuple(task.template_arguments),
            }  # fmt: skip
        with model.unchanged():  # which reads the weights once
            facts, weights = model_facts(model), model.weights_digest()
        return Origin(
            model=facts["name"], revision=facts["revision"], dtype=facts["dtype"], quantize=facts["quantize"],
            weights=weights,
            created=datetime.datetime.now(datetime.UTC).date().isoformat(), sitelens=__version__, **about, **prompts,
        )  # fmt: skip

    @staticmethod
    def shared(origins: Iterable[Origin | None]) -> Origin | None:
        """What several have in common; None in all else."""
        known = [origin for origin in origins if origin is not None]
        if not known:
            return None
        values = {field.name: [getattr(origin, field.name) for origin in known] for field in fields(Origin)}
        return Origin(**{name: of[0] for name, of in values.items() if all(one == of[0] for one in of)})

    def other_precision(self, model: ModelLike) -> str | None:
        """The recorded precision, if `model` is the same model by name and revision in another one; else None."""
        now = model_facts(model)
        same = self.model is not None and (self.model, self.revision) == (now["name"], now["revision"])
        if not same or (self.dtype, self.quantize) == (now["dtype"], now["quantize"]):
            return None
        return (f"{self.model} in {self.quantize or self.dtype} "
                f"(not in {now['quantize'] or now['dtype']}, as it is loaded now)")  # fmt: skip

    def same_model(self, other: Origin | None) -> bool:
        """Whether two come from one model by name and revision, in whichever precision."""
        return (
            other is not None
            and self.model is not None
            and (self.model, self.revision) == (other.model, other.revision)
        )


def model_label(origin: Origin | None, fingerprint: str | None) -> str:
    """A few words for a repr: "model='smollm2-135m'", or the fingerprint's first digits where the name is not known."""
    name = origin.model if origin is not None and origin.model is not None else (fingerprint or "")[:8]
    return f"model={name!r}" if name else "any model"


def model_facts(model: ModelLike) -> dict[str, Any]:
    """Name, revision (the commit on the hub, where it is known), fingerprint, heads, dtype and quantize, as plain JSON.

    The name of a folder or file comes without the path that leads there.
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
    """Whether a model's name is that of a folder or file of this machine."""
    return name.endswith(".gguf") or name.startswith(("/", ".", "~")) or "\\" in name or Path(name).is_dir()


def provenance(command: str, model: ModelLike, name: str | None = None) -> dict[str, Any]:
    """As plain JSON: made_by, created (UTC), model (`model_facts`), versions, python, machine.

    The machine is its processor, its GPU where the model lies on one, and the number of threads; it is not named.
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
    """The versions of sitelens and of the libraries that it rests on."""
    found = {name: metadata.version(name) for name in (*RECORDED, *filter(find_spec, IF_INSTALLED))}
    return dict(sorted(found.items())) | {"sitelens": __version__}


def machine(model: Model) -> dict[str, Any]:
    """What a model is computed on: processor, threads, and the GPU where it lies on one."""
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
