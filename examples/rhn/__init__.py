# SPDX-License-Identifier: Apache-2.0
"""A recurrent highway network on the Penn Treebank: the paper's table 2 (Wen et al. 2018)."""
