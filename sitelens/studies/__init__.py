"""The paper's analyses, and those its reviewers asked for: each one function that returns a tidy DataFrame.

`sl.figures` has a function of the same name for each, which draws what it returns.
"""

from sitelens.studies.common import Options as Options
from sitelens.studies.costs import costs as costs
from sitelens.studies.heads import head_overlap as head_overlap
from sitelens.studies.heads import shared_attention as shared_attention
from sitelens.studies.patching import head_counts as head_counts
from sitelens.studies.patching import mixing as mixing
from sitelens.studies.patching import random_heads as random_heads
from sitelens.studies.patching import soft_hard as soft_hard
from sitelens.studies.patching import task_agnostic as task_agnostic
from sitelens.studies.seeds import seed_variance as seed_variance
from sitelens.studies.seeds import variance_components as variance_components
from sitelens.studies.training import alpha_distribution as alpha_distribution
from sitelens.studies.training import checkpoints as checkpoints
from sitelens.studies.training import initialization_distances as initialization_distances
from sitelens.studies.training import initialization_runs as initialization_runs
from sitelens.studies.training import initializations as initializations
from sitelens.studies.training import loss_path as loss_path
from sitelens.studies.training import prompt_counts as prompt_counts
