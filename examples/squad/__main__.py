# SPDX-License-Identifier: Apache-2.0
"""`python -m examples.squad`: command.py says what it does."""

from examples.launch import launch

if __name__ == "__main__":
    launch("examples.squad")
