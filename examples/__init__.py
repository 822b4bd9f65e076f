# SPDX-License-Identifier: Apache-2.0
"""The paper's experiments, run with this package: `python -m examples.ptb` and its neighbours."""
