"""Pictures of a cache: how uncertain the teacher was, how much was kept, what the text's own tokens got, and what it weighs.

    kd.plot_cache("runs/cache", out="plots")        # {'entropy': PosixPath('plots/entropy.png'), …}

`kd cache info --plots` writes them too. The figures are those of `kd.cache_builder.look.row_statistics`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kd.cache_builder.look.row_statistics import Histogram, RowStatistics, row_statistics
from kd.cache_builder.opening import open_cache
from kd.cache_builder.store.readers.reader import CacheReader
from kd.cache_builder.upkeep.summary import cache_summary
from kd.common.disk.disk_errors import clear_write_errors
from kd.common.errors import DataError
from kd.common.extras import require_package
from kd.common.paths import output_folder
from kd.common.progress import Progress, final
from kd.evaluation.report.figures import COLOURS, panels_of, save_figure

HEIGHT = 3.0
"""Inches of one picture."""


@dataclass(frozen=True)
class CachePlots:
    """What was drawn of a cache."""

    files: Mapping[str, Path]
    """Name of a picture -> its file. A picture is left out where the cache does not say what it shows."""
    figures: RowStatistics
    array_bytes: Mapping[str, float | None]
    """Array -> bytes per token."""

    @property
    def document(self) -> dict[str, Any]:
        """As `kd cache info --plots --json` prints it."""
        files = {name: str(path) for name, path in self.files.items()}
        return {"plots": files, "figures": self.figures.document | {"array_bytes_per_token": dict(self.array_bytes)}}


def plot_cache(cache: str | os.PathLike[str], *, out: str | os.PathLike[str]) -> dict[str, Path]:
    """Draw what a cache holds as PNG files; returns the file of each picture.

    cache   a path, a URL, or the beginning of a fingerprint
    out     folder of the pictures

    Raises MissingPackageError without matplotlib, which is in the extra `eval`, and CacheError where the arrays are not here.

    >>> import kd
    >>> sorted(kd.plot_cache("cache", out="plots"))
    ['bytes', 'calibration', 'entropy', 'kept-mass', 'overview', 'probability', 'rank']
    """
    return dict(final(plot_steps(cache, output_folder(out))).files)


def plot_steps(cache: str | os.PathLike[str], out: Path) -> Iterator[Progress[CachePlots]]:
    """Count and draw; yields progress in rows, at last with the files. Raises KdError."""
    require_package("matplotlib", "drawing a cache")
    reader = open_cache(cache)
    if not isinstance(reader, CacheReader):
        raise DataError("several caches are read as one here", where=reader.root, try_="one of them")
    figures: RowStatistics | None = None
    for step in row_statistics(reader):
        figures = step.result
        yield Progress(step.done, step.total)
    assert figures is not None, "the last record carries them"
    array_bytes = cache_summary(reader.files)["array_bytes_per_token"]
    with clear_write_errors(out, "another --plots DIR"):
        files = draw_cache(out, figures, array_bytes)
    yield Progress(figures.rows, figures.rows, CachePlots(files, figures, array_bytes))


def draw_cache(out: Path, figures: RowStatistics, array_bytes: Mapping[str, float | None]) -> dict[str, Path]:
    """Draw each picture, and `overview` with all of them; returns their files."""
    pictures: dict[str, Callable[[Any], None]] = {
        "entropy": lambda axes: _entropy(axes, figures),
        "kept-mass": lambda axes: _kept_mass(axes, figures),
        "rank": lambda axes: _rank(axes, figures),
        "probability": lambda axes: _probability(axes, figures),
        "calibration": lambda axes: _calibration(axes, figures),
        "bytes": lambda axes: _bytes(axes, array_bytes),
    }
    if not figures.kept_mass.counts.any():
        del pictures["kept-mass"]
    if not figures.tail_known:
        del pictures["calibration"]

    def draw(chosen: Sequence[str]) -> Callable[[Any], None]:
        def on(figure: Any) -> None:
            for axes, name in zip(panels_of(figure, len(chosen)), chosen, strict=True):
                pictures[name](axes)

        return on

    files = {name: save_figure(out / f"{name}.png", draw([name]), HEIGHT) for name in pictures}
    return files | {
        "overview": save_figure(out / "overview.png", _overview(list(pictures.values())), 2.2 * HEIGHT, width=11)
    }


def _overview(pictures: Sequence[Callable[[Any], None]]) -> Callable[[Any], None]:
    """All pictures in two rows."""

    def draw(figure: Any) -> None:
        columns = -(-len(pictures) // 2)
        for number, picture in enumerate(pictures):
            axes = figure.add_subplot(2, columns, number + 1)
            axes.spines[["top", "right"]].set_visible(False)
            axes.grid(color="#e3e6ea")
            axes.set_axisbelow(True)
            picture(axes)

    return draw


def draw_entropy(path: Path, figures: RowStatistics) -> Path:
    """The histogram of the entropy alone."""
    return save_figure(path, lambda figure: _entropy(panels_of(figure, 1)[0], figures), HEIGHT)


def _bars(axes: Any, one: Histogram, edges: np.ndarray, label: str, rows: int) -> None:
    """Shares of rows by value, with bars as wide as their bins."""
    axes.bar(edges[:-1], one.counts / rows, width=np.diff(edges), align="edge", color=COLOURS[0], alpha=0.85)
    axes.set_xlabel(label)
    axes.set_ylabel(f"share of {rows:,} rows")


def _entropy(axes: Any, figures: RowStatistics) -> None:
    used = np.flatnonzero(figures.entropy.counts)
    _bars(axes, figures.entropy, figures.entropy.edges, "entropy, at least (nats)", figures.rows)
    axes.set_xlim(0, figures.entropy.edges[used[-1] + 1])


def _kept_mass(axes: Any, figures: RowStatistics) -> None:
    _bars(axes, figures.kept_mass, figures.kept_mass.edges, "probability of the kept tokens", figures.rows)
    axes.set_xlim(0, 1)


def _rank(axes: Any, figures: RowStatistics) -> None:
    used = np.flatnonzero(figures.rank.counts)[-1] + 1
    one = Histogram(figures.rank.edges[: used + 1], figures.rank.counts[:used])
    bound = "" if figures.ranks_known else ", at least"
    _bars(axes, one, np.arange(used + 1), f"rank of the text's token{bound}", figures.rows)
    names = [
        f"{int(low)}" if high == low + 1 else f"{int(low)}–{int(high) - 1}"
        for low, high in zip(one.edges, one.edges[1:], strict=False)
    ]
    axes.set_xticks(np.arange(used) + 0.5, names, rotation=45, ha="right", fontsize="small")


def _probability(axes: Any, figures: RowStatistics) -> None:
    powers = np.concatenate([[-6.5], np.log10(figures.probability.edges[1:])])  # the first bin begins at 0
    bound = "" if figures.ranks_known else ", at most"
    _bars(axes, figures.probability, powers, f"probability of the text's token{bound}", figures.rows)
    axes.set_xticks([-6, -4, -2, 0], ["≤ 10⁻⁶", "10⁻⁴", "10⁻²", "1"])


def _calibration(axes: Any, figures: RowStatistics) -> None:
    """Accuracy over confidence; dots grow with the logarithm of the rows they stand for."""
    bins = figures.calibration
    axes.plot([0, 1], [0, 1], color="#5b6472", linewidth=1, linestyle="--")
    sizes = [12 + 14 * np.log10(one["rows"]) for one in bins]
    places = [one["confidence"] for one in bins], [one["accuracy"] for one in bins]
    axes.plot(*places, color=COLOURS[0], linewidth=1.2)
    axes.scatter(*places, s=sizes, color=COLOURS[0], zorder=3)
    for one in bins:  # beside the line, and inside the picture
        offset, side = ((6, -10), "left") if one["confidence"] < 0.85 else ((-8, 1), "right")
        spot = (one["confidence"], one["accuracy"])
        axes.annotate(
            f"{one['rows']:,}", spot, offset, textcoords="offset points", fontsize=6, ha=side, color="#5b6472"
        )
    axes.set_xlabel("largest probability (numbers: rows)")
    axes.set_ylabel("share in which it was there")
    axes.set_xlim(0, 1.04)
    axes.set_ylim(0, 1.04)


def _bytes(axes: Any, array_bytes: Mapping[str, float | None]) -> None:
    known = {name: value for name, value in array_bytes.items() if value is not None}
    axes.barh(range(len(known)), list(known.values()), color=COLOURS[0], alpha=0.85)
    for row, value in enumerate(known.values()):
        axes.text(value, row, f" {value:.3g}", va="center", fontsize="small")
    axes.set_yticks(range(len(known)), list(known), fontsize="small")
    axes.invert_yaxis()
    axes.set_xlim(0, 1.2 * max(known.values(), default=1.0))
    axes.set_xlabel("bytes per token")
