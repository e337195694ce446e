"""The picture of a sweep: accuracy over the scaling, a line per task and a thick one for their average.

It is drawn through matplotlib's object API like the figures of the report (`kd.evaluation.report.figures`), in the same colours.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np

from kd.common.files import publish
from kd.common.shown_text import for_figure
from kd.evaluation.merged.glue_table import GlueTable
from kd.evaluation.report.figures import COLOURS, DPI, WIDTH

MARKERS = "osD^vP*X"
BLACK, GREY = "#000000", "#777777"


def draw_sweep(path: Path, table: GlueTable, *, method: str, chosen: float | None) -> Path:
    """Write the picture of a sweep and mark the `chosen` scaling in it. Returns `path`."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, 4.6), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#e3e6ea")
    axes.set_axisbelow(True)
    _draw_lines(axes, table)
    if chosen is not None:
        _mark(axes, chosen)
    axes.set_xlabel(for_figure(f"scaling of {method}"))
    axes.set_ylabel("accuracy, percent")
    figure.legend(loc="outside right upper", frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    figure.savefig(temporary, dpi=DPI, format="png")
    publish(temporary, path)
    return path


def _draw_lines(axes: Any, table: GlueTable) -> None:
    """A line per task, and the average with its standard errors. Black is kept for the average."""
    scalings = np.array([float(label) for label in table.rows])
    for number, task in enumerate(table.tasks):
        colour = COLOURS[number % len(COLOURS)]
        axes.plot(
            scalings,
            [100 * tasks[task]["accuracy"].value for tasks in table.rows.values()],
            color=GREY if colour == BLACK else colour,
            marker=MARKERS[number % len(MARKERS)],
            markersize=4,
            linewidth=1,
            label=for_figure(task),
        )
    averages = [table.average(label) for label in table.rows]
    axes.errorbar(
        scalings,
        [100 * average.value for average in averages],
        yerr=[100 * (average.stderr or 0.0) for average in averages],
        color="black",
        linewidth=2.5,
        capsize=3,
        label="average",
    )


def _mark(axes: Any, scaling: float) -> None:
    axes.axvline(scaling, color="black", linewidth=0.8, linestyle=":")
    axes.annotate(
        f"chosen: {scaling:g}",
        (scaling, 1),
        xycoords=("data", "axes fraction"),
        xytext=(3, -10),
        textcoords="offset points",
    )
