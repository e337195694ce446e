"""`kd report`: evaluations and training runs become tables, pictures and one page that can be mailed.

    report.md  report.html   the same content; the page holds its pictures and asks for nothing else
    report.csv               one line per model and metric, for a spreadsheet
    reference.csv            the reference table: models down, metrics across
    report.json              everything, for a program
    metrics.png  loss.png    where there were evaluations, and where there were training runs
    deltas.png               where a fine-tuned and a distilled student make a pair

What may lie in an input folder is said in `runs.py`, which students make a pair in `pairs.py`. Students over several seeds
are one line of the reference table, one curve and one bar; each by itself is in the tables below.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kd.common.disk.disk_errors import clear_write_errors
from kd.common.files import canonical_json, sweep, write_atomic
from kd.common.shown_text import for_markdown, for_spreadsheet, redacted
from kd.evaluation.report.columns import Column
from kd.evaluation.report.comparison import Comparison, Entry, compare, short_name
from kd.evaluation.report.figures import Bar, Delta, Series, draw_bars, draw_deltas, draw_losses
from kd.evaluation.report.page import Sample, Section, Table, markdown_samples, markdown_table, render_page
from kd.evaluation.report.pairs import Arm, Pair, arms_of, pairs_of
from kd.evaluation.report.reference import Reference, reference_of
from kd.evaluation.report.runs import Run, collect_runs, is_number
from kd.evaluation.report.score_curves import progress_sections

LOSSES = {"ce": "cross-entropy (nats per token)", "kd": "distillation loss (nats per token)"}
"""Key of a step record -> label of its axis; `loss` is drawn only where a run has neither."""
BARS = ("perplexity", "kl", "top1_agreement", "accuracy", "exact_match", "acc_norm_nanogpt", "acc_norm_harness")
"""Metrics that get a panel of bars."""
SIDE_BY_SIDE = ("samples", "generation")
"""Tasks whose answers are shown side by side, at most MOST_SAMPLES of each."""
MOST_SAMPLES = 12
MARK = (
    "A figure is marked best only when it beats every other by more than the standard error of the difference, "
    "paired over documents where both models saw the same; ± is one standard error, clustered by document."
)
MARK_PAIRS = (
    "A student is marked only when it differs from the one it is paired with by more than the standard error of the "
    "difference, paired over documents and seeds where both saw the same; ± is one standard error, clustered by document, "
    "and over seeds where there are several."
)


@dataclass(frozen=True)
class ReportFiles:
    """What `write_report` wrote."""

    markdown: Path
    page: Path
    csv: Path
    reference_csv: Path
    json: Path
    loss_png: Path | None
    """Loss curves; None without training runs."""
    metrics_png: Path | None
    """Bars; None without evaluations."""
    deltas_png: Path | None
    """Gains; None without pairs."""


def write_report(
    inputs: Sequence[Path],
    out: Path,
    *,
    title: str = "Distillation report",
    lead: Sequence[Section] = (),
    after: Sequence[Section] = (),
    baseline: str | None = None,
) -> ReportFiles:
    """Read every input directory and write the report under `out`.

    lead, after   sections of the caller's, at the top and after the results
    baseline      name of the arm that the others are compared with; None = those trained with `ce`
    Raises DataError, naming what cannot be read; then nothing is written. Raises WriteError where `out` cannot be written.
    """
    with clear_write_errors(out, "make room or name another --out, then run the same command again"):
        return _written(inputs, out, title, lead, after, baseline)


def _written(
    inputs: Sequence[Path],
    out: Path,
    title: str,
    lead: Sequence[Section],
    after: Sequence[Section],
    baseline: str | None,
) -> ReportFiles:
    sweep(out)
    runs, entries = collect_runs(inputs)
    comparisons = compare(entries)
    arms = arms_of(entries)
    pairs = pairs_of(arms, baseline)
    reference = reference_of(comparisons, arms, pairs)
    files = ReportFiles(
        out / "report.md",
        out / "report.html",
        out / "report.csv",
        out / "reference.csv",
        out / "report.json",
        _draw_losses(out / "loss.png", runs, reference),
        _draw_metrics(out / "metrics.png", comparisons, reference),
        _draw_deltas(out / "deltas.png", reference),
    )
    sections = [*lead, *_results(reference, comparisons, files), *after, *_side_by_side(comparisons, arms)]
    sections += _details(comparisons, pairs)
    if runs:
        sections.append(
            Section(
                "Training",
                table=_run_table(runs),
                note="Losses at the end, smoothed, in nats per token.",
                folded=len(runs) > 4,
            )
        )
    if files.loss_png is not None:
        note = "Faint: every logged step; solid: two-sided exponential mean, half-life 1 % of the run. Students over "
        note += "several seeds: their mean, and the range of the seeds."
        sections.append(Section("Loss curves", image=files.loss_png, note=note))
    sections += progress_sections(inputs, out)
    models = len({e.name for e in entries})
    intro = [
        f"{_count(len(entries), 'evaluation')} of {_count(models, 'model')} and {_count(len(runs), 'training run')}."
    ]
    intro += [MARK_PAIRS if pairs else MARK] if comparisons else []
    write_atomic(files.markdown, _markdown(title, intro, sections))
    write_atomic(files.csv, _csv(comparisons))
    write_atomic(files.reference_csv, _lines(reference.csv_rows()))
    write_atomic(files.json, canonical_json(redacted(_document(runs, entries, comparisons, reference))))
    write_atomic(files.page, render_page(title, intro, sections))
    return files


def _results(reference: Reference, comparisons: Sequence[Comparison], files: ReportFiles) -> list[Section]:
    """The reference table, each pair's differences, and the pictures of both."""
    sections = []
    if reference.columns:
        mean = next((c for c in reference.columns if len(c.parts) > 1), None)
        note = "Parameters are counted in the weights, tied ones once. "
        if mean is not None:
            note += f"The mean is that of the {len(mean.parts)} columns that are shares, each counted alike. "
        note += " ".join(dict.fromkeys(f"{c.title}." for c in comparisons))
        sections.append(Section("Models and metrics", table=reference.table(), note=note.strip()))
    for pair in reference.pairs:
        if reference.differences(pair):
            heading = f"{pair.other.name} against {pair.baseline.name}"
            sections.append(Section(heading, table=reference.pair_table(pair), note=reference.pair_note(pair)))
    if files.deltas_png is not None:
        note = "What each kind of distilled student gained on its fine-tuned partner, right of 0 is better; whiskers are one "
        note += "standard error of the paired difference, strokes the seeds."
        sections.append(Section("Gains", image=files.deltas_png, note=note))
    if files.metrics_png is not None:
        note = "Bars start at zero; whiskers are one standard error."
        sections.append(Section("Figures", image=files.metrics_png, note=note))
    return sections


def _details(comparisons: Sequence[Comparison], pairs: Sequence[Pair]) -> list[Section]:
    """Every task with all its metrics, model by model."""
    named = [names for pair in pairs for names in pair.models]
    return [
        Section(c.title, table=c.table(named), note=c.note(), folded=len(c.entries) > 8) for c in comparisons if c.shown
    ]


def _side_by_side(comparisons: Sequence[Comparison], arms: Sequence[Arm]) -> list[Section]:
    """What models wrote after the same prompts; of several seeds the first."""
    shown = {next(iter(arm.models.values())): arm.name for arm in arms}
    sections = []
    for comparison in comparisons:
        kept = {
            shown[e.name]: e.report.documents.get(comparison.task, {}).get("samples", [])[:MOST_SAMPLES]
            for e in comparison.entries
            if e.name in shown and comparison.task in SIDE_BY_SIDE
        }
        places: dict[tuple[str, str | None], list[tuple[str, str]]] = {}
        for name, samples in kept.items():
            for sample in samples:
                places.setdefault((sample["prompt"], sample.get("expected")), []).append((name, sample["got"]))
        if places:
            samples_shown = [Sample(prompt, expected, answers) for (prompt, expected), answers in places.items()]
            note = "Of students over several seeds the first." if any(len(a.models) > 1 for a in arms) else None
            sections.append(Section(f"Side by side, {comparison.title}", samples=samples_shown, note=note))
    return sections


def _draw_losses(path: Path, runs: Sequence[Run], reference: Reference) -> Path | None:
    arms = reference.arms
    panels = {label: _curves(runs, arms, key) for key, label in LOSSES.items()}
    plain = [run for run in runs if all(run.series(key) is None for key in LOSSES)]
    panels["training loss (nats per token)"] = _curves(plain, arms, "loss")
    drawn = {label: series for label, series in panels.items() if series}
    return draw_losses(path, drawn, _order(reference)) if drawn else None


def _curves(runs: Sequence[Run], arms: Sequence[Arm], key: str) -> list[Series]:
    """One curve per arm where its seeds logged the same steps, else one per run."""
    arm_of = {model: arm.name for arm in arms for model in arm.models.values() if len(arm.models) > 1}
    groups: dict[str, list[Series]] = {}
    for run in runs:
        if (series := run.series(key)) is not None:
            groups.setdefault(arm_of.get(run.name, run.name), []).append(series)
    curves = []
    for name, group in groups.items():
        if len(group) > 1 and all(np.array_equal(s.steps, group[0].steps) for s in group):
            values = tuple(s.values for s in group)
            curves.append(Series(name, group[0].steps, np.mean(values, axis=0), values))
        else:
            curves += group
    return curves


def _draw_metrics(path: Path, comparisons: Sequence[Comparison], reference: Reference) -> Path | None:
    panels: dict[str, list[Bar]] = {}
    for comparison in comparisons:
        for metric in BARS:
            if metric not in comparison.metrics:
                continue
            column = Column(metric, ((comparison, metric),))
            figures = [(arm.name, reference.figure(arm, column)) for arm in reference.rows]
            bars = [Bar(name, f.value, f.error) for name, f in figures if f is not None]
            if bars:
                about = next(f for e in comparison.entries if (f := comparison.figure(e, metric)))
                panels[f"{about['title']} [{about['unit']}]  {comparison.title.partition(': ')[2]}"] = bars
    return draw_bars(path, panels, _order(reference)) if panels else None


def _draw_deltas(path: Path, reference: Reference) -> Path | None:
    """Shares in one panel, in percentage points; every other metric in one of its own."""
    panels: dict[str, list[Delta]] = {}
    for pair in reference.pairs:
        for d in reference.differences(pair):
            share = d.column.is_share
            scale = 100.0 if share else 1.0
            title = "gain [percentage points]" if share else f"gain in {d.column.title} [{d.column.unit}]"
            gains = tuple(scale * d.column.sign * x for x in d.by_seed)
            error = None if d.error is None else scale * d.error
            panels.setdefault(title, []).append(
                Delta(d.column.title, pair.other.name, pair.baseline.name, scale * d.gain, error, gains)
            )
    return draw_deltas(path, panels, _order(reference)) if panels else None


def _order(reference: Reference) -> list[str]:
    """Names in the order of their colours: the same in all pictures."""
    return [arm.name for arm in reference.rows]


def _run_table(runs: Sequence[Run]) -> Table:
    rows = []
    for run in runs:
        ends = [run.last(key) for key in ("loss", "ce", "kd")]
        final = run.records[-1] if run.records else {}
        rows.append(
            [
                run.name,
                short_name(str(run.fact("student") or "–")),
                str(run.fact("loss") or "–"),
                f"{final.get('step', 0):,}",
                f"{final['tokens']:,}" if is_number(final.get("tokens")) else "–",
                *("–" if end is None else f"{end:.4f}" for end in ends),
            ]
        )
    return Table(["run", "student", "trained with", "steps", "tokens", "loss", "cross-entropy", "distillation"], rows)


def _markdown(title: str, intro: Sequence[str], sections: Sequence[Section]) -> str:
    parts = [f"# {for_markdown(title)}", *map(_paragraphs, intro)]
    for section in sections:
        parts.append(f"## {for_markdown(section.heading)}")
        if section.text is not None:
            parts.append(_paragraphs(section.text))
        if section.table is not None:
            parts.append(markdown_table(section.table).rstrip())
        if section.samples:
            parts.append(markdown_samples(section.samples))
        if section.image is not None:
            parts.append(f"![{for_markdown(section.heading)}]({section.image.name})")
        if section.note is not None:
            parts.append(_paragraphs(section.note))
    return "\n\n".join(parts) + "\n"


def _paragraphs(text: str) -> str:
    return "\n\n".join(map(for_markdown, text.split("\n\n")))


def _csv(comparisons: Sequence[Comparison]) -> str:
    rows: list[list[Any]] = [
        ["model", "parameters", "task", "subject", "metric", "value", "stderr", "n", "over", "unit", "better", "best"]
    ]
    for c in comparisons:
        for metric in c.metrics:
            best = c.best(metric)
            for number, entry in enumerate(c.entries):
                if figure := c.figure(entry, metric):
                    numbers = [figure[k] for k in ("value", "stderr", "n", "over", "unit", "better")]
                    rows.append(
                        [entry.name, entry.report.parameters, c.task, c.title, metric, *numbers, int(number == best)]
                    )
    return _lines(rows)


def _lines(rows: Sequence[Sequence[Any]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([for_spreadsheet(cell) for cell in row] for row in rows)
    return text.getvalue()


def _document(
    runs: Sequence[Run], entries: Sequence[Entry], comparisons: Sequence[Comparison], reference: Reference
) -> dict[str, Any]:
    return {
        "format": "kd-report",
        "format_version": 1,
        "models": [
            {
                "name": e.name,
                "parameters": e.report.parameters,
                "tasks": e.report.tasks,
                "settings": e.report.settings,
                "versions": e.report.versions,
            }
            for e in entries
        ],
        "comparisons": [
            {
                "task": c.task,
                "title": c.title,
                "models": [e.name for e in c.entries],
                "note": c.note(),
                "best": {m: None if (i := c.best(m)) is None else c.entries[i].name for m in c.metrics},
            }
            for c in comparisons
        ],
        "reference": reference.document(),
        "runs": [
            {
                "name": r.name,
                "steps": r.records[-1]["step"] if r.records else 0,
                "last": {key: r.last(key) for key in ("loss", "ce", "kd")},
                **{k: r.fact(k) for k in ("student", "loss", "teacher", "cache_fingerprint", "settings")},
            }
            for r in runs
        ],
    }


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
