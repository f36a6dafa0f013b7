"""Find attention heads that carry an in-context task, inject task embeddings at those heads, and compare heads.

sitelens implements SITE: Jungwon Park, Jimyeong Kim, Changin Choi and Wonjong Rhee, "Soft Head Selection for Injecting
ICL-Derived Task Embeddings", Findings of ACL 2026, arXiv 2507.20906 (first versions: "Soft Injection of Task Embeddings
Outperforms Prompt-Based In-Context Learning").

Public names are loaded when they are first used: importing TransformerLens takes seconds, `import sitelens` does not.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from sitelens.settings import settings as settings  # not lazy: its module has the same name
from sitelens.version import __version__

if TYPE_CHECKING:
    from sitelens import figures as figures
    from sitelens import heads as heads
    from sitelens import methods as methods
    from sitelens import studies as studies
    from sitelens.conditions.ablation import Ablate as Ablate
    from sitelens.conditions.base import Condition as Condition
    from sitelens.conditions.embedding import TaskEmbedding as TaskEmbedding
    from sitelens.conditions.embedding import embed_task as embed_task
    from sitelens.conditions.patching import PatchHeads as PatchHeads
    from sitelens.conditions.prompting import FewShot as FewShot
    from sitelens.conditions.prompting import ZeroShot as ZeroShot
    from sitelens.conditions.selection import HeadSelection as HeadSelection
    from sitelens.errors import SitelensError as SitelensError
    from sitelens.errors import SitelensWarning as SitelensWarning
    from sitelens.evaluation.evaluate import echo as echo
    from sitelens.evaluation.evaluate import evaluate as evaluate
    from sitelens.evaluation.evaluate import generate as generate
    from sitelens.evaluation.summary import summarize as summarize
    from sitelens.methods.base import Method as Method
    from sitelens.methods.site.config import TrainConfig as TrainConfig
    from sitelens.methods.site.train import TrainResult as TrainResult
    from sitelens.methods.site.train import train_selection as train_selection
    from sitelens.methods.site.train import train_selections as train_selections
    from sitelens.metrics import METRICS as METRICS
    from sitelens.metrics import Metric as Metric
    from sitelens.metrics import register_metric as register_metric
    from sitelens.models.catalogue import list_models as list_models
    from sitelens.models.fingerprints import fingerprint as fingerprint
    from sitelens.models.loading import load_model as load_model
    from sitelens.models.model import Model as Model
    from sitelens.reports.comparison import compare as compare
    from sitelens.reports.comparison_result import Comparison as Comparison
    from sitelens.reports.gallery import make_figures as make_figures
    from sitelens.reports.run import RunConfig as RunConfig
    from sitelens.reports.run import RunReport as RunReport
    from sitelens.reports.run import run as run
    from sitelens.reports.suite import SuiteResult as SuiteResult
    from sitelens.reports.suite import run_suite as run_suite
    from sitelens.reports.verification.verify import Verification as Verification
    from sitelens.reports.verification.verify import verify as verify
    from sitelens.studies.registry import STUDIES as STUDIES
    from sitelens.studies.registry import Study as Study
    from sitelens.studies.registry import study as study
    from sitelens.studies.similarity import HeadSimilarity as HeadSimilarity
    from sitelens.studies.similarity import head_similarity as head_similarity
    from sitelens.studies.similarity import similarity_predicts_transfer as similarity_predicts_transfer
    from sitelens.studies.transfer import transfer_matrix as transfer_matrix
    from sitelens.studies.transfer_result import TransferMatrix as TransferMatrix
    from sitelens.tasks import Example as Example
    from sitelens.tasks import Suite as Suite
    from sitelens.tasks import Task as Task
    from sitelens.tasks import list_tasks as list_tasks
    from sitelens.tasks import load_task as load_task
    from sitelens.tasks import load_tasks as load_tasks
    from sitelens.tasks import register_suite as register_suite

_EXPORTS = {
    "conditions.ablation": ("Ablate",),
    "conditions.base": ("Condition",),
    "conditions.embedding": ("TaskEmbedding", "embed_task"),
    "conditions.patching": ("PatchHeads",),
    "conditions.prompting": ("FewShot", "ZeroShot"),
    "conditions.selection": ("HeadSelection",),
    "errors": ("SitelensError", "SitelensWarning"),
    "evaluation.evaluate": ("echo", "evaluate", "generate"),
    "evaluation.summary": ("summarize",),
    "methods.base": ("Method",),
    "methods.site.config": ("TrainConfig",),
    "methods.site.train": ("TrainResult", "train_selection", "train_selections"),
    "metrics": ("METRICS", "Metric", "register_metric"),
    "models.catalogue": ("list_models",),
    "models.fingerprints": ("fingerprint",),
    "models.loading": ("load_model",),
    "models.model": ("Model",),
    "reports.comparison": ("compare",),
    "reports.comparison_result": ("Comparison",),
    "reports.gallery": ("make_figures",),
    "reports.run": ("RunConfig", "RunReport", "run"),
    "reports.suite": ("SuiteResult", "run_suite"),
    "reports.verification.verify": ("Verification", "verify"),
    "studies.registry": ("STUDIES", "Study", "study"),
    "studies.similarity": ("HeadSimilarity", "head_similarity", "similarity_predicts_transfer"),
    "studies.transfer": ("transfer_matrix",),
    "studies.transfer_result": ("TransferMatrix",),
    "tasks": ("Example", "Suite", "Task", "list_tasks", "load_task", "load_tasks", "register_suite"),
}
_MODULE_OF: dict[str, str] = {name: home for home, names in _EXPORTS.items() for name in names}

# Subpackages that are part of the public interface, as in sl.studies.costs.
_SUBPACKAGES = ("figures", "heads", "methods", "studies")

__all__ = ["__version__", "settings", *_SUBPACKAGES, *sorted(_MODULE_OF)]  # pyright: ignore[reportUnsupportedDunderAll]


if not TYPE_CHECKING:  # so that type checkers report a misspelled name

    def __getattr__(name: str) -> Any:
        if name in _SUBPACKAGES:
            return importlib.import_module(f"sitelens.{name}")
        if name not in _MODULE_OF:
            raise AttributeError(f"module 'sitelens' has no attribute {name!r}")
        return getattr(importlib.import_module(f"sitelens.{_MODULE_OF[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
