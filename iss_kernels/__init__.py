# SPDX-License-Identifier: Apache-2.0
"""Learn which units an LSTM does not need, take them out for good, run what is left fast.

Three verbs: regularise (`find_groups`, `GroupLasso`), `shrink`, run (`ISSLSTM`). Method: Wen et
al., Learning Intrinsic Sparse Structures within Long Short-Term Memory, ICLR 2018.
"""

__version__ = "0.1.0"

from iss_kernels.backend import build_info, use_backend
from iss_kernels.lstm import ISSLSTM, accelerate

__all__ = ["ISSLSTM", "accelerate", "build_info", "use_backend"]
