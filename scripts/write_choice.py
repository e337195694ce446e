"""Write a table of docs/choosing.md from a finished experiment: `python scripts/write_choice.py RUNS/bytes-prose docs`.

The page has a table for each experiment that it names in a comment, `<!-- table NAME -->`. The first one, of bytes-prose, has a
figure too.

The differences are those of `kd report` with the arm `dense` as the baseline: the same rows of the same teacher, kept whole. Bytes
count every file of a cache.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from kd.cache_builder.store.records.manifest import load_manifest
from kd.evaluation.report.figures import COLOURS, panels_of, save_figure
from kd.evaluation.report.writing import write_report
from kd.student_trainer.run_folder import read_run

BEGIN, END = "<!-- table -->\n", "<!-- end of table -->\n"
OTHERS = "<!-- table {} -->\n"
"""Before the table of an experiment that is not `FIRST`."""
FIRST = "bytes-prose"
COLUMN = "bits per byte"
BESIDE = {"adaptive": ((4, 22), "left"), "compact": ((11, -12), "left")}
"""Arm -> where its name stands beside its point, in points, and on which side, where the usual place is taken."""


def bytes_per_token(cache: Path) -> float:
    """All files of a cache over its rows."""
    return sum(p.stat().st_size for p in cache.rglob("*") if p.is_file()) / load_manifest(cache).rows


def outcomes(folder: Path) -> dict[str, tuple[float, dict[str, Any]]]:
    """Arm -> bytes per token of its cache, and its difference from `dense` in bits per byte."""
    runs = sorted(run for run in folder.glob("*-seed*") if (run / "eval").is_dir())
    with tempfile.TemporaryDirectory() as out:
        written = write_report([folder / "teacher", *runs], Path(out) / "report", baseline="dense")
        pairs = json.loads(written.json.read_text(encoding="utf-8"))["reference"]["pairs"]
    caches = {run.name.partition("-seed")[0]: folder / Path(read_run(run)["settings"]["cache"]).name for run in runs}
    differences = {
        pair["other"]: next(d for d in pair["differences"] if d["column"].startswith(COLUMN)) | {"seeds": pair["seeds"]}
        for pair in pairs
    }
    sizes = {arm: 0.0 if arm == "finetuned" else bytes_per_token(caches[arm]) for arm in (*differences, "dense")}
    rows = {arm: (sizes[arm], differences.get(arm, {})) for arm in sizes}
    return dict(sorted(rows.items(), key=lambda item: item[1][0]))


def table(rows: dict[str, tuple[float, dict[str, Any]]]) -> str:
    """One line per arm."""
    lines = [
        "| arm | bytes per token | bits per byte above `dense` | verdict | seeds above `dense` |",
        "|---|--:|--:|---|--:|",
    ]
    for arm, (size, d) in rows.items():
        if not d:
            lines.append(f"| `{arm}` | {size:,.0f} | | | |")
            continue
        above = f"{len(d['seeds']) - d['seeds_better']} of {len(d['seeds'])}"
        lines.append(
            f"| `{arm}` | {size:,.1f} | {d['difference']:+.3f} ± {d['error']:.3f} | {d['verdict']} | {above} |"
        )
    return "\n".join(lines) + "\n"


def draw(rows: dict[str, tuple[float, dict[str, Any]]], path: Path) -> None:
    """Outcome against bytes, on a logarithmic axis; cross-entropy as a line."""

    def on(figure: Any) -> None:
        (axes,) = panels_of(figure, 1)
        for number, (arm, (size, d)) in enumerate(rows.items()):
            value, error = d.get("difference", 0.0), d.get("error", 0.0)
            if arm == "finetuned":
                axes.axhline(value, color="#5b6472", linestyle="--", linewidth=1)
                axes.text(18, value, "cross-entropy, no teacher", va="bottom")
                continue
            axes.errorbar(size, value, yerr=error, fmt="o", color=COLOURS[number % len(COLOURS)], capsize=3)
            offset, side = BESIDE.get(arm, ((5, 5), "left"))
            axes.annotate(arm, (size, value), xytext=offset, ha=side, textcoords="offset points")
        axes.set_xscale("log")
        axes.set_xlim(12, 6000)
        axes.set_xlabel("bytes per token of the cache")
        axes.set_ylabel("bits per byte above the whole distribution")

    save_figure(path, on, 4.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", type=Path)
    parser.add_argument("docs", type=Path)
    args = parser.parse_args()
    rows = outcomes(args.experiment)
    page = args.docs / "choosing.md"
    name = args.experiment.name
    begin = BEGIN if name == FIRST else OTHERS.format(name)
    before, there, rest = page.read_text(encoding="utf-8").partition(begin)
    if not there:
        raise SystemExit(f"{page} has no table of {name}: a line {begin.strip()}")
    page.write_text(before + begin + table(rows) + END + rest.partition(END)[2], encoding="utf-8")
    if name == FIRST:
        draw(rows, args.docs / "figures" / "choice.png")


if __name__ == "__main__":
    main()
