"""The rivals of SITE, each fitted to a task and handed back as a condition: `METHODS[name].fit(task, model)`.

Every method sees the same splits and template and at most 200 training items; layers, strengths, numbers of heads and
learning rates are chosen on at most 50 validation items. SITE's checkpoint is chosen on at most 100, as in its paper,
and function vectors take their queries from valid. Of test items nothing is looked at, but that many-shot prompting
asks how long the longest input is and how many training items share one, for that many demonstrations fewer fit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from sitelens.checks.arguments import arguments_of
from sitelens.conditions.base import Condition
from sitelens.errors import SitelensError
from sitelens.methods import function_vector, i2cl, icv, lofit, lora, ltv, many_shot, mtv, task_vector
from sitelens.methods.site import method as site


@dataclass(frozen=True)
class Method:
    """How a method is fitted, and how many numbers it trains for a condition that it gave.

    algorithm: to be raised when the numbers or costs of its fits change, so that those on disk are made anew.
    """

    fit: Callable[..., Condition]
    trained: Callable[[Any], int]
    algorithm: int = 1


def _both_steps(condition: lofit.HeadOffsets) -> int:
    """A scale for every entry of z, then offsets on the chosen heads."""
    return condition.offsets.numel() + int((condition.offsets != 0).any(-1).sum()) * condition.offsets.shape[-1]


METHODS: dict[str, Method] = {
    "many-shot": Method(many_shot.fit, lambda condition: 0),
    "FV": Method(function_vector.fit, lambda condition: 0, algorithm=3),
    "TV": Method(task_vector.fit, lambda condition: 0),
    "ICV": Method(icv.fit, lambda condition: 0, algorithm=2),
    "MTV": Method(mtv.fit, lambda condition: condition.selection.alpha.numel(), algorithm=2),
    "I2CL": Method(i2cl.fit, lambda condition: condition.a.numel() + condition.b.numel(), algorithm=4),
    "LTV": Method(ltv.fit, lambda condition: condition.n_trained, algorithm=2),
    "LoFiT": Method(lofit.fit, _both_steps, algorithm=2),
    "LoRA": Method(lora.fit, lambda condition: sum(weights.numel() for weights in condition.weights.values())),
    "SITE": Method(site.fit, lambda condition: condition.selection.alpha.numel()),
}


def checked_options(options: Mapping[str, Mapping[str, Any]] | None) -> dict[str, dict[str, Any]]:
    """Options of methods' fits, by the methods' names, as plain values; nothing is fitted.

    Raises:
        SitelensError: for an unknown method or option, with the nearest names, or a value that cannot be used.
    """
    unknown = sorted(str(name) for name in options or {} if name not in METHODS)
    if unknown:
        raise SitelensError(f"options are given for {', '.join(unknown)}; methods are {', '.join(METHODS)}")
    for name, values in (options or {}).items():
        if not isinstance(values, Mapping):
            raise SitelensError(f"the options of {name} must be a dict such as {{'n_shots': 5}}, not {values!r}")
    return {
        name: arguments_of(METHODS[name].fit).options(name, values, reserved=("task", "model", "seed"))
        for name, values in (options or {}).items()
    }
