# SPDX-License-Identifier: Apache-2.0
"""Learn which units an LSTM does not need, take them out for good, run what is left fast.

Three verbs: regularise (`find_groups`, `GroupLasso`), `shrink`, run (`ISSLSTM`). The method is that
of Wen et al., Learning Intrinsic Sparse Structures within Long Short-Term Memory, ICLR 2018.
"""

__version__ = "0.1.0"

from iss_kernels.accelerate import accelerate
from iss_kernels.backend import build_info, use_backend
from iss_kernels.export import export_onnx
from iss_kernels.find import find_groups
from iss_kernels.group_lasso import GroupLasso
from iss_kernels.groups import GroupError, Groups
from iss_kernels.gru import ISSGRU
from iss_kernels.lstm import ISSLSTM
from iss_kernels.plan import explain_plan
from iss_kernels.prepare import prepare
from iss_kernels.recurrent_cell import ISSGRUCell, ISSLSTMCell, ISSRNNCell
from iss_kernels.rhn import ISSRHN
from iss_kernels.rnn import ISSRNN
from iss_kernels.saving import load, save
from iss_kernels.shrink import ShrinkReport, shrink, shrink_
from iss_kernels.stream import Stream

__all__ = [
    "ISSGRU",
    "ISSGRUCell",
    "ISSLSTM",
    "ISSLSTMCell",
    "ISSRHN",
    "ISSRNN",
    "ISSRNNCell",
    "GroupError",
    "GroupLasso",
    "Groups",
    "ShrinkReport",
    "Stream",
    "accelerate",
    "build_info",
    "explain_plan",
    "export_onnx",
    "find_groups",
    "load",
    "prepare",
    "save",
    "shrink",
    "shrink_",
    "use_backend",
]
