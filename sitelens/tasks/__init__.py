"""Tasks: pairs of an input and its answer, split into train, valid and test.

Built-in tasks (`antonym`) need no download; `fv/NAME` is one of the 57 Function Vectors tasks; `anli/ROUND`,
`mmlu-pro/CATEGORY` and `bbh/NAME` are benchmarks. Your own tasks come from a file (CSV, TSV, JSON, JSON Lines), a
DataFrame, a list of pairs, or a `Suite` of your own.
"""

from sitelens.tasks.examples import Example as Example
from sitelens.tasks.files import ENDINGS as ENDINGS
from sitelens.tasks.files import function_vectors_split as function_vectors_split
from sitelens.tasks.loading import load_task as load_task
from sitelens.tasks.loading import load_tasks as load_tasks
from sitelens.tasks.loading import task_of as task_of
from sitelens.tasks.suite import Suite as Suite
from sitelens.tasks.suites import SUITES as SUITES
from sitelens.tasks.suites import group_of as group_of
from sitelens.tasks.suites import groups_of as groups_of
from sitelens.tasks.suites import list_tasks as list_tasks
from sitelens.tasks.suites import register_suite as register_suite
from sitelens.tasks.suites import suite_names as suite_names
from sitelens.tasks.suites import suite_of as suite_of
from sitelens.tasks.suites import task_names as task_names
from sitelens.tasks.suites import the_suite as the_suite
from sitelens.tasks.task import SPLITS as SPLITS
from sitelens.tasks.task import Task as Task
from sitelens.tasks.templates import CLOCK as CLOCK
from sitelens.tasks.templates import QA_TEMPLATE as QA_TEMPLATE
from sitelens.tasks.templates import Arguments as Arguments
from sitelens.tasks.templates import check_template as check_template
from sitelens.tasks.templates import rewritten as rewritten
