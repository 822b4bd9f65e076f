# SPDX-License-Identifier: Apache-2.0
"""Word-level Penn Treebank: the paper's table 1 (Wen et al. 2018, section 4.1)."""
