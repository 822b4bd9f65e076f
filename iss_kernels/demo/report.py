# SPDX-License-Identifier: Apache-2.0
"""Writes the report: one HTML file that needs nothing else, with its pictures inside."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jinja2

from iss_kernels.demo import figures
from iss_kernels.demo.show import HEADINGS, NOISY, TITLES, rows, sooner, units


@dataclass(frozen=True)
class Pictures:
    """What the figures show beyond the result: norms by layer, and the weights after ISS."""

    start: list[list[float]]
    baseline: list[list[float]]
    iss: list[list[float]]
    weights: list[figures.WeightPicture]


def html(result: dict[str, Any], pictures: Pictures, shrink_report: str) -> str:
    """The whole page. result: what result.json holds."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("iss_kernels.demo", "."),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    drawings = {
        "norms": figures.norms(pictures.start, pictures.baseline, pictures.iss),
        "weights": figures.weights(pictures.weights),
        "learning": figures.learning(result["history"]),
        "timings": figures.timings(result),
    }
    return environment.get_template("report.html").render(
        result=result,
        headings=HEADINGS,
        rows=rows(result),
        noisy=NOISY,
        sooner=sooner(result),
        units=units,
        titles=TITLES,
        shrink_report=shrink_report,
        stages=[(name, result["recipe"][name]) for name in TITLES],
        **drawings,
    )
