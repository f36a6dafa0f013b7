"""The paper's analyses and those that its reviewers asked for: each is a function that returns a tidy DataFrame.

For most of them, `sl.figures` has a function of the same name that draws the result. The decorator `sl.study` gives a
function its caption and its figure; `sl.make_figures` and the command `sitelens figures` produce all figures.
"""

from sitelens.studies.common import Options as Options
from sitelens.studies.costs import costs as costs
from sitelens.studies.curves import loss_path as loss_path
from sitelens.studies.curves import loss_paths as loss_paths
from sitelens.studies.curves import training_curves as training_curves
from sitelens.studies.heads import head_overlap as head_overlap
from sitelens.studies.heads import shared_attention as shared_attention
from sitelens.studies.patching import head_counts as head_counts
from sitelens.studies.patching import mixing as mixing
from sitelens.studies.patching import random_heads as random_heads
from sitelens.studies.patching import soft_hard as soft_hard
from sitelens.studies.patching import task_agnostic as task_agnostic
from sitelens.studies.prediction import similarity_transfer as similarity_transfer
from sitelens.studies.registry import STUDIES as STUDIES
from sitelens.studies.seeds import seed_variance as seed_variance
from sitelens.studies.seeds import variance_components as variance_components
from sitelens.studies.training import alpha_distribution as alpha_distribution
from sitelens.studies.training import checkpoints as checkpoints
from sitelens.studies.training import initialization_distances as initialization_distances
from sitelens.studies.training import initialization_runs as initialization_runs
from sitelens.studies.training import initializations as initializations
from sitelens.studies.training import prompt_counts as prompt_counts
