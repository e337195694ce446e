"""The same report for other readers: Markdown, a CSV table for a spreadsheet, and a JSON document for a program."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from typing import Any

from kd.common.shown_text import for_markdown, for_spreadsheet, for_terminal
from kd.evaluation.report.comparison import Comparison, Entry
from kd.evaluation.report.page import Section, markdown_samples, markdown_table
from kd.evaluation.report.reference import Reference
from kd.evaluation.report.runs import Run


def report_markdown(title: str, intro: Sequence[str], sections: Sequence[Section]) -> str:
    """The report as Markdown; its pictures lie beside it."""
    parts = [f"# {for_markdown(title)}", *map(_paragraphs, intro)]
    for section in sections:
        parts.append(f"## {for_markdown(section.heading)}")
        if section.text is not None:
            parts.append(_paragraphs(section.text))
        if section.table is not None:
            parts.append(markdown_table(section.table).rstrip())
        if section.lines:
            parts.append("\n".join(f"    {for_terminal(line)}" for line in section.lines))
        if section.samples:
            parts.append(markdown_samples(section.samples))
        if section.image is not None:
            parts.append(f"![{for_markdown(section.heading)}]({section.image.name})")
        if section.note is not None:
            parts.append(_paragraphs(section.note))
    return "\n\n".join(parts) + "\n"


def metrics_csv(comparisons: Sequence[Comparison]) -> str:
    """One line per model and metric."""
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
    return csv_text(rows)


def csv_text(rows: Sequence[Sequence[Any]]) -> str:
    """Rows as CSV, with cells that a spreadsheet would read as formulas made harmless."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([for_spreadsheet(cell) for cell in row] for row in rows)
    return text.getvalue()


def report_document(
    runs: Sequence[Run], entries: Sequence[Entry], comparisons: Sequence[Comparison], reference: Reference
) -> dict[str, Any]:
    """Everything of the report, as JSON holds it."""
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


def _paragraphs(text: str) -> str:
    return "\n\n".join(map(for_markdown, text.split("\n\n")))
