# SPDX-License-Identifier: Apache-2.0
"""BiDAF on SQuAD: the paper's tables 3 and 4 (Wen et al. 2018, section 4.3)."""
