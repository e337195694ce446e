"""The picture of a sweep: accuracy over the scaling, a line per task and a thick one for their average.

Drawn through matplotlib's object API like the report's figures (`kd.evaluation.report.figures`), in the same colours.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from kd.common.files import publish
from kd.evaluation.merged.glue_scores import GlueTable
from kd.evaluation.report.figures import COLOURS, DPI, WIDTH

MARKERS = "osD^vP*X"


def draw_sweep(path: Path, table: GlueTable, *, method: str, chosen: float | None) -> Path:
    """Write the sweep's picture; `chosen` is marked. Returns `path`."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    scalings = np.array([float(label) for label in table.rows])
    figure = Figure(figsize=(WIDTH, 4.6), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#e3e6ea")
    axes.set_axisbelow(True)
    for number, task in enumerate(table.tasks):
        values = [100 * table.rows[label][task]["accuracy"].value for label in table.rows]
        colour = "#777777" if COLOURS[number % len(COLOURS)] == "#000000" else COLOURS[number % len(COLOURS)]
        axes.plot(
            scalings, values, color=colour, marker=MARKERS[number % len(MARKERS)], markersize=4, linewidth=1, label=task
        )
    averages = [table.average(label) for label in table.rows]
    axes.errorbar(
        scalings,
        [100 * a.value for a in averages],
        yerr=[100 * (a.stderr or 0.0) for a in averages],
        color="black",
        linewidth=2.5,
        capsize=3,
        label="average",
    )
    if chosen is not None:
        axes.axvline(chosen, color="black", linewidth=0.8, linestyle=":")
        axes.annotate(
            f"chosen: {chosen:g}",
            (chosen, 1),
            xycoords=("data", "axes fraction"),
            xytext=(3, -10),
            textcoords="offset points",
        )
    axes.set_xlabel(f"scaling of {method}")
    axes.set_ylabel("accuracy, percent")
    figure.legend(loc="outside right upper", frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    figure.savefig(temporary, dpi=DPI, format="png")
    publish(temporary, path)
    return path
