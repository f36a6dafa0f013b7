"""Methods: SITE and its baselines, each a value whose fields are its hyperparameters: `LTV(n_steps=9).fit(task)`.

Every baseline sees the same splits and template and at most 200 training items. Layers, strengths, head counts and
learning rates are chosen on at most 50 validation items; SITE's checkpoint on at most 100, as in its paper; function
vectors also take their queries from valid. No method uses test items, except that many-shot prompting needs the length
of the longest query and how many training items repeat a query's input, because both limit how many demonstrations fit.
"""

from sitelens.methods.base import Method as Method
from sitelens.methods.function_vector import FV as FV
from sitelens.methods.i2cl import I2CL as I2CL
from sitelens.methods.icv import ICV as ICV
from sitelens.methods.lofit import LoFiT as LoFiT
from sitelens.methods.lora import LoRA as LoRA
from sitelens.methods.ltv import LTV as LTV
from sitelens.methods.mtv import MTV as MTV
from sitelens.methods.prompting import FewShot as FewShot
from sitelens.methods.prompting import ManyShot as ManyShot
from sitelens.methods.prompting import ZeroShot as ZeroShot
from sitelens.methods.registry import method_named as method_named
from sitelens.methods.site.method import SITE as SITE
from sitelens.methods.task_vector import TV as TV
