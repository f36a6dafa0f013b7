"""What a single head does: what it writes and attends to, its indirect effect, and scores of known kinds of heads."""

from sitelens.heads.attention import ROLES as ROLES
from sitelens.heads.attention import SINK as SINK
from sitelens.heads.attention import attention as attention
from sitelens.heads.attention import attention_example as attention_example
from sitelens.heads.attention import attention_roles as attention_roles
from sitelens.heads.attention import induction_scores as induction_scores
from sitelens.heads.attribution import head_attribution as head_attribution
from sitelens.heads.attribution import promoted_tokens as promoted_tokens
from sitelens.heads.effects import indirect_effects as indirect_effects
