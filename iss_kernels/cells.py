# SPDX-License-Identifier: Apache-2.0
"""The registry: one row for each recurrent cell that there are kernels for.

Everything that differs between cells, and that more than one file asks about, stands here. The
equations are in reference.py (plain torch) and csrc/cells/ (kernels).
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Cell:
    """What the rest of the package knows of a cell.

    name: what the ops take. gates: G, rows of w_ih and of each w_hh for one unit. states: names of
    what goes from step to step, h first. saved_gates, saved_states: what the forward keeps for the
    gradient, see `saved`. projects: whether it may have a w_hr. deep: whether w_hh and b_hh hold
    the micro-steps of a step one below the other. carries: the state of which a part stays from
    step to step whatever the weights are; "" for none.
    bias_parts: whether b_ih and b_hh have gradients of their own.
    """

    name: str
    gates: int
    states: tuple[str, ...] = ("h",)
    saved_gates: int = 0
    saved_states: int = 0
    projects: bool = False
    deep: bool = False
    carries: str = "h"
    bias_parts: bool = False

    def saved(self, depth: int = 1) -> tuple[int, int]:
        """How many times [N, H] the outputs `gates` and `cells` of a forward hold.

        depth: D, the micro-steps of a deep cell, which keeps the gates of each and the states
        between them.
        """
        return self.saved_gates * depth, self.saved_states * (depth - 1 if self.deep else 1)


CELLS: dict[str, Cell] = {
    cell.name: cell
    for cell in (
        Cell(
            "lstm", 4, states=("h", "c"), carries="c", saved_gates=4, saved_states=1, projects=True
        ),
        Cell("gru", 3, saved_gates=3, saved_states=1, bias_parts=True),
        Cell("rnn_tanh", 1, carries=""),
        Cell("rnn_relu", 1, carries=""),
        Cell("rhn", 2, saved_gates=2, saved_states=1, deep=True, bias_parts=True),
        Cell("rhn_carry", 3, saved_gates=3, saved_states=1, deep=True, bias_parts=True),
    )
}


def cell_of(name: str) -> Cell:
    """The row of a cell; ValueError for a name that is none of them."""
    if name not in CELLS:
        raise ValueError(f"expected cell to be one of {', '.join(CELLS)}, got {name!r}")
    return CELLS[name]
