"""sitelens finds the attention heads in which a language model keeps a task, and injects the task there.

The public names are loaded when they are first used: importing TransformerLens takes seconds, `import sitelens`
does not.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from sitelens.version import __version__

if TYPE_CHECKING:
    from sitelens import figures as figures
    from sitelens import heads as heads
    from sitelens import methods as methods
    from sitelens import studies as studies
    from sitelens.ablation import Ablate as Ablate
    from sitelens.catalogue import list_models as list_models
    from sitelens.comparison import by_method as by_method
    from sitelens.comparison import compare as compare
    from sitelens.comparison import comparison_scores as comparison_scores
    from sitelens.comparison import comparison_table as comparison_table
    from sitelens.conditions import Condition as Condition
    from sitelens.conditions import FewShot as FewShot
    from sitelens.conditions import PatchHeads as PatchHeads
    from sitelens.conditions import ZeroShot as ZeroShot
    from sitelens.config import TrainConfig as TrainConfig
    from sitelens.defaults import SitelensError as SitelensError
    from sitelens.defaults import SitelensWarning as SitelensWarning
    from sitelens.defaults import settings as settings
    from sitelens.embedding import TaskEmbedding as TaskEmbedding
    from sitelens.embedding import embed_task as embed_task
    from sitelens.evaluation import echo as echo
    from sitelens.evaluation import evaluate as evaluate
    from sitelens.evaluation import generate as generate
    from sitelens.fingerprints import fingerprint as fingerprint
    from sitelens.metrics import METRICS as METRICS
    from sitelens.metrics import Metric as Metric
    from sitelens.models import Model as Model
    from sitelens.models import load_model as load_model
    from sitelens.report import RunConfig as RunConfig
    from sitelens.report import RunReport as RunReport
    from sitelens.report import run as run
    from sitelens.selection import HeadSelection as HeadSelection
    from sitelens.similarity import HeadSimilarity as HeadSimilarity
    from sitelens.similarity import head_similarity as head_similarity
    from sitelens.similarity import similarity_predicts_transfer as similarity_predicts_transfer
    from sitelens.suites import SuiteResult as SuiteResult
    from sitelens.suites import run_suite as run_suite
    from sitelens.summary import summarize as summarize
    from sitelens.tasks import Example as Example
    from sitelens.tasks import Task as Task
    from sitelens.tasks import list_tasks as list_tasks
    from sitelens.tasks import load_task as load_task
    from sitelens.tasks import load_tasks as load_tasks
    from sitelens.training import TrainResult as TrainResult
    from sitelens.training import train_selection as train_selection
    from sitelens.training import train_selections as train_selections
    from sitelens.transfer import TransferMatrix as TransferMatrix
    from sitelens.transfer import transfer_matrix as transfer_matrix
    from sitelens.verification import Verification as Verification
    from sitelens.verification import verify as verify

_HOMES = {
    "ablation": ("Ablate",),
    "comparison": ("by_method", "compare", "comparison_scores", "comparison_table"),
    "conditions": ("Condition", "FewShot", "PatchHeads", "ZeroShot"),
    "config": ("TrainConfig",),
    "catalogue": ("list_models",),
    "embedding": ("TaskEmbedding", "embed_task"),
    "evaluation": ("echo", "evaluate", "generate"),
    "fingerprints": ("fingerprint",),
    "metrics": ("METRICS", "Metric"),
    "models": ("Model", "load_model"),
    "report": ("RunConfig", "RunReport", "run"),
    "selection": ("HeadSelection",),
    "defaults": ("SitelensError", "SitelensWarning", "settings"),
    "suites": ("SuiteResult", "run_suite"),
    "summary": ("summarize",),
    "tasks": ("Example", "Task", "list_tasks", "load_task", "load_tasks"),
    "training": ("TrainResult", "train_selection", "train_selections"),
    "similarity": ("HeadSimilarity", "head_similarity", "similarity_predicts_transfer"),
    "transfer": ("TransferMatrix", "transfer_matrix"),
    "verification": ("Verification", "verify"),
}
_HOME_OF: dict[str, str] = {name: home for home, names in _HOMES.items() for name in names}

# Modules whose functions are called by their names: sl.studies.costs.
_ROOMS = ("figures", "heads", "methods", "studies")

__all__ = ["__version__", *_ROOMS, *sorted(_HOME_OF)]


def __getattr__(name: str) -> Any:
    if name in _ROOMS:
        return importlib.import_module(f"sitelens.{name}")
    if name not in _HOME_OF:
        raise AttributeError(f"module 'sitelens' has no attribute {name!r}")
    return getattr(importlib.import_module(f"sitelens.{_HOME_OF[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
