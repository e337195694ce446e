"""`kd report`: evaluations and training runs become tables, pictures and one page that can be mailed.

    report.md  report.html   the same content; the page holds its pictures and asks for nothing else
    report.csv               one line per model and metric, for a spreadsheet
    report.json              everything, for a program
    loss.png  metrics.png    where there were training runs, and where there were evaluations

An input is a directory that holds an evaluation (`eval.json`), a training run (`run.json` and `metrics.jsonl`,
one JSON object per step), or both; a run's own evaluation may lie in its folder `eval`. Runs that are still going or
were killed can be reported: a last line that was cut off is left out, and a step logged twice counts once, the later.
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kd.cache_builder.files import canonical_json, write_atomic
from kd.data.errors import DataError
from kd.evaluation.comparison import Comparison, Entry, compare, short_name
from kd.evaluation.figures import Bar, Series, draw_bars, draw_losses, smooth
from kd.evaluation.page import Section, Table, markdown_table, render_page
from kd.evaluation.progress import progress_sections
from kd.evaluation.results import EVAL, load_report, read_object

RUN, METRICS = "run.json", "metrics.jsonl"
LOSSES = {"ce": "cross-entropy (nats per token)", "kd": "distillation loss (nats per token)"}
"""Key of a step record -> label of its axis; `loss` is drawn only where a run has neither."""
BARS = ("perplexity", "kl", "top1_agreement", "accuracy", "exact_match", "acc_norm_nanogpt", "acc_norm_harness")
"""Metrics that get a panel of bars."""
MARK = (
    "A figure is marked best only when it beats every other by more than the standard error of the difference, "
    "paired over documents where both models saw the same; ± is one standard error, clustered by document."
)


@dataclass(frozen=True)
class ReportFiles:
    """What `write_report` wrote."""

    markdown: Path
    page: Path
    csv: Path
    json: Path
    loss_png: Path | None
    """None without training runs."""
    metrics_png: Path | None
    """None without evaluations."""


@dataclass(frozen=True)
class Run:
    """One training run."""

    name: str
    facts: dict[str, Any]
    """`run.json`: student, loss, teacher, cache_fingerprint, settings; of an unfinished run only what it was told."""
    records: tuple[dict[str, Any], ...]
    """`metrics.jsonl`, ascending steps."""

    def fact(self, key: str) -> Any:
        """A fact of `run.json`, or of its `identity` while the run is unfinished; None where it says nothing."""
        return self.facts.get(key, (self.facts.get("identity") or {}).get(key))

    def series(self, key: str) -> Series | None:
        """Finite values of one key over the steps; None where there are none."""
        points = [(r["step"], r[key]) for r in self.records if _number(r.get(key))]
        if not points:
            return None
        steps, values = zip(*points, strict=True)
        return Series(self.name, np.array(steps), np.array(values, dtype=np.float64))

    def last(self, key: str) -> float | None:
        """Smoothed value at the end, in nats per token."""
        series = self.series(key)
        return None if series is None else float(smooth(series.values)[-1])


def write_report(
    inputs: Sequence[Path], out: Path, *, title: str = "Distillation report", lead: Sequence[Section] = ()
) -> ReportFiles:
    """Read every input directory and write the report under `out`; the caller's own sections `lead` come first.

    Raises DataError, naming what cannot be read; then nothing is written.
    """
    runs, entries = collect(inputs)
    comparisons = compare(entries)
    loss_png = _draw_losses(out / "loss.png", runs)
    metrics_png = _draw_metrics(out / "metrics.png", comparisons)
    sections = [*lead]
    sections += [Section(c.title, table=c.table(), note=c.note()) for c in comparisons]
    if metrics_png is not None:
        sections.append(
            Section("Figures", image=metrics_png, note="Bars start at zero; whiskers are one standard error.")
        )
    if runs:
        sections.append(
            Section("Training", table=_run_table(runs), note="Losses at the end, smoothed, in nats per token.")
        )
    if loss_png is not None:
        note = "Faint: every logged step; solid: two-sided exponential mean, half-life 1 % of the run."
        sections.append(Section("Loss curves", image=loss_png, note=note))
    sections += progress_sections(inputs, out)
    intro = [f"{_count(len(entries), 'evaluation')} and {_count(len(runs), 'training run')}."]
    intro += [MARK] if comparisons else []
    files = ReportFiles(
        out / "report.md", out / "report.html", out / "report.csv", out / "report.json", loss_png, metrics_png
    )
    write_atomic(files.markdown, _markdown(title, intro, sections))
    write_atomic(files.csv, _csv(comparisons))
    write_atomic(files.json, canonical_json(_document(runs, entries, comparisons)))
    write_atomic(files.page, render_page(title, intro, sections))
    return files


def collect(inputs: Sequence[Path]) -> tuple[list[Run], list[Entry]]:
    """Runs and evaluations of the input directories, in their order, under names that differ."""
    runs: list[Run] = []
    entries: list[Entry] = []
    names: dict[str, int] = {}
    for folder in inputs:
        is_run = (folder / RUN).is_file() and (folder / METRICS).is_file()
        nested = next((f for f in (folder, folder / "eval") if (f / EVAL).is_file()), None)
        if not is_run and nested is None:
            found = "no such directory" if not folder.is_dir() else f"no {EVAL}, no {RUN} with {METRICS}"
            raise DataError("neither an evaluation nor a training run", where=folder, found=found,
                            expected="a directory written by kd eval --out or kd train --out")  # fmt: skip
        facts = read_object(folder / RUN) if is_run else {}
        report = None if nested is None else load_report(nested)
        wanted = facts.get("name") or (short_name(report.model) if report is not None else None) or folder.name
        names[wanted] = names.get(wanted, 0) + 1
        name = wanted if names[wanted] == 1 else f"{wanted} ({names[wanted]})"
        if is_run:
            runs.append(Run(name, facts, read_steps(folder / METRICS)))
        if report is not None:
            entries.append(Entry(name, report))
    if not runs and not entries:
        raise DataError("there is nothing to report", expected="at least one evaluation or training run")
    return runs, entries


def read_steps(path: Path) -> tuple[dict[str, Any], ...]:
    """Step records by ascending step; a torn last line is left out. Raises DataError for any other bad line."""
    lines = path.read_bytes().split(b"\n")
    records: dict[int, dict[str, Any]] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            step = record["step"]
        except (ValueError, KeyError, TypeError) as error:
            if number == len(lines):  # no newline after it: the run was stopped while writing
                continue
            found = f"{type(error).__name__}: {error}"
            raise DataError("a step record cannot be read", where=f"{path} line {number}", found=found,
                            expected='{"step": …, "loss": …}') from error  # fmt: skip
        if not isinstance(step, int) or isinstance(step, bool):
            raise DataError("a step record has no step number", where=f"{path} line {number}", found=repr(step)[:40])
        records[step] = record
    return tuple(records[step] for step in sorted(records))


def _draw_losses(path: Path, runs: Sequence[Run]) -> Path | None:
    panels = {label: [s for run in runs if (s := run.series(key)) is not None] for key, label in LOSSES.items()}
    plain = [run for run in runs if all(run.series(key) is None for key in LOSSES)]
    panels["training loss (nats per token)"] = [s for run in plain if (s := run.series("loss")) is not None]
    drawn = {label: series for label, series in panels.items() if series}
    return draw_losses(path, drawn) if drawn else None


def _draw_metrics(path: Path, comparisons: Sequence[Comparison]) -> Path | None:
    panels: dict[str, list[Bar]] = {}
    for comparison in comparisons:
        for metric in BARS:
            figures = [(e.name, comparison.figure(e, metric)) for e in comparison.entries]
            bars = [Bar(name, f["value"], f["stderr"]) for name, f in figures if f and f["value"] is not None]
            if bars:
                about = next(f for _, f in figures if f)
                panels[f"{about['title']} [{about['unit']}]  {comparison.title.partition(': ')[2]}"] = bars
    return draw_bars(path, panels) if panels else None


def _run_table(runs: Sequence[Run]) -> Table:
    rows = []
    for run in runs:
        ends = [run.last(key) for key in ("loss", "ce", "kd")]
        final = run.records[-1] if run.records else {}
        rows.append([run.name, short_name(str(run.fact("student") or "–")), str(run.fact("loss") or "–"),
                     f"{final.get('step', 0):,}", f"{final['tokens']:,}" if _number(final.get("tokens")) else "–",
                     *("–" if end is None else f"{end:.4f}" for end in ends)])  # fmt: skip
    return Table(["run", "student", "trained with", "steps", "tokens", "loss", "cross-entropy", "distillation"], rows)


def _markdown(title: str, intro: Sequence[str], sections: Sequence[Section]) -> str:
    parts = [f"# {title}", *intro]
    for section in sections:
        parts.append(f"## {section.heading}")
        if section.text is not None:
            parts.append(section.text)
        if section.table is not None:
            parts.append(markdown_table(section.table).rstrip())
        if section.image is not None:
            parts.append(f"![{section.heading}]({section.image.name})")
        if section.note is not None:
            parts.append(section.note)
    return "\n\n".join(parts) + "\n"


def _csv(comparisons: Sequence[Comparison]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(
        ["model", "parameters", "task", "subject", "metric", "value", "stderr", "n", "over", "unit", "better", "best"]
    )
    for c in comparisons:
        for metric in c.metrics:
            best = c.best(metric)
            for number, entry in enumerate(c.entries):
                if figure := c.figure(entry, metric):
                    numbers = [figure[k] for k in ("value", "stderr", "n", "over", "unit", "better")]
                    writer.writerow(
                        [entry.name, entry.report.parameters, c.task, c.title, metric, *numbers, int(number == best)]
                    )
    return text.getvalue()


def _document(runs: Sequence[Run], entries: Sequence[Entry], comparisons: Sequence[Comparison]) -> dict[str, Any]:
    return {
        "format": "kd-report", "format_version": 1,
        "models": [{"name": e.name, "parameters": e.report.parameters, "tasks": e.report.tasks,
                    "settings": e.report.settings, "versions": e.report.versions} for e in entries],
        "comparisons": [{"task": c.task, "title": c.title, "models": [e.name for e in c.entries], "note": c.note(),
                         "best": {m: None if (i := c.best(m)) is None else c.entries[i].name for m in c.metrics}}
                        for c in comparisons],
        "runs": [{"name": r.name, "steps": r.records[-1]["step"] if r.records else 0,
                  "last": {key: r.last(key) for key in ("loss", "ce", "kd")},
                  **{k: r.fact(k) for k in ("student", "loss", "teacher", "cache_fingerprint", "settings")}}
                 for r in runs],
    }  # fmt: skip


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
