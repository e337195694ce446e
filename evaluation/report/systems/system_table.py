"""A system's own table, filled with measured figures: a block per split, a row per model, the pairs of students together.

The better figure of a pair is bold, as in the reference systems. A star says that the difference leaves the error: that its
95 % interval leaves zero after Holm's correction over the block. Published figures have rows of their own, below the row of the
model that they belong to, and are marked as published.

A column of which nothing was measured is empty, and so is a mean that lacks a column: no mean is over fewer columns than its
title says.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from kd.evaluation.report.columns import Column
from kd.evaluation.report.comparison import short_name
from kd.evaluation.report.differences import Figure
from kd.evaluation.report.page import Section, Table
from kd.evaluation.report.pairs import Arm, Pair
from kd.evaluation.report.reference import Reference
from kd.evaluation.report.systems.table_file import FT, KD, PublishedRow, TableFile

STAR = "*"
MILLION = 1e6


@dataclass(frozen=True)
class ShownColumn:
    """A column as it is shown, and its figures."""

    title: str
    scale: float
    digits: int
    column: Column | None
    """None where nothing was measured."""
    others: tuple[str, ...] = ()
    """Models that were measured on another reading of the text, and are not in the column."""

    @property
    def header(self) -> str:
        """The title, with an arrow where less is better."""
        return f"{self.title} ↓" if self.column is not None and self.column.better == "lower" else self.title

    def words(self, figure: Figure | None) -> str:
        """A figure with its error, in the table's own unit."""
        if figure is None or not math.isfinite(figure.value):
            return "–"
        shown = f"{self.scale * figure.value:.{self.digits}f}"
        return shown if figure.error is None else f"{shown} ± {self.scale * figure.error:.{self.digits}f}"


@dataclass(frozen=True)
class TableRow:
    """One row: a measured model, or what was published."""

    label: str
    parameters: int | None
    """None for a published row."""
    cells: tuple[str, ...]
    values: tuple[float | None, ...]
    """The figures in the table's own unit; None where there is none."""
    errors: tuple[float | None, ...]
    bold: frozenset[int] = frozenset()
    """Numbers of the cells that are the better of a pair."""

    @property
    def published(self) -> bool:
        """Whether the row was not measured here."""
        return self.parameters is None


@dataclass(frozen=True)
class TableBlock:
    """The models on the texts of one split."""

    file: TableFile
    split: str
    columns: tuple[ShownColumn, ...]
    reference: Reference
    quantised: Mapping[str, str] = field(default_factory=dict)
    """Name of an arm -> how its weights were quantised, where they were."""

    @property
    def heading(self) -> str:
        """Title of the table, and which rows the block is about."""
        return ": ".join(filter(None, (self.file.about, self.file.blocks[self.split])))

    def rows(self, *, published: bool) -> list[TableRow]:
        """Measured rows in the order of the reference table; published ones below those that they belong to, or at the end."""
        left = [r for r in self.file.published if self.split in r.figures] if published else []
        rows: list[TableRow] = []
        labels, bold = self._labels(), self._bold()
        for arm in self.reference.rows:
            rows.append(self._measured(arm, labels[arm.name], bold[arm.name]))
            of_arm = [r for r in left if _is_of(r, arm)]
            rows += [self._published(r) for r in of_arm]
            left = [r for r in left if r not in of_arm]
        return rows + [self._published(r) for r in left]

    def table(self, *, published: bool) -> Table:
        """The rows as cells."""
        rows = self.rows(published=published)
        headers = ["model", "parameters (M)", *(c.header for c in self.columns)]
        cells = [[r.label, "" if r.parameters is None else millions(r.parameters), *r.cells] for r in rows]
        best = {(number, cell + 2) for number, r in enumerate(rows) for cell in r.bold}
        return Table(headers, cells, frozenset(best))

    def section(self, *, published: bool) -> Section:
        """The block with what has to be said of it."""
        return Section(self.heading, table=self.table(published=published), note=self.note(published=published))

    def note(self, *, published: bool) -> str:
        """What is counted, who is ahead and by how much it is sure, and where published figures are from."""
        lines = [self._counted(), *(self._ahead(pair) for pair in self.reference.pairs)]
        if self.reference.pairs:
            lines.append(
                f"Bold: the better of a pair. {STAR}: the difference leaves zero with its 95 % interval, corrected (Holm) over "
                "this block."
            )
        empty = [c.title for c in self.columns if c.column is None]
        lines += [f"Not measured: {', '.join(empty)}."] if empty else []
        others = dict.fromkeys(name for c in self.columns for name in c.others)
        lines += [f"Measured on another reading of the text, and left out: {', '.join(others)}."] if others else []
        if published and self.file.published:
            lines += [f"Published rows: {self.file.source}.", *self.file.remarks]
        return "\n\n".join(line for line in lines if line)

    def document(self, *, published: bool) -> dict[str, Any]:
        """The block as JSON."""
        return {
            "split": self.split or None,
            "columns": [c.title for c in self.columns],
            "rows": [
                {
                    "label": r.label,
                    "published": r.published,
                    "parameters": r.parameters,
                    "values": list(r.values),
                    "errors": list(r.errors),
                    "better_of_pair": [self.columns[i].title for i in sorted(r.bold)],
                }
                for r in self.rows(published=published)
            ],
        }

    def _measured(self, arm: Arm, label: str, bold: Mapping[int, bool]) -> TableRow:
        figures = [None if c.column is None else self.reference.figure(arm, c.column) for c in self.columns]
        cells = [c.words(f) for c, f in zip(self.columns, figures, strict=True)]
        cells = [f"{cell}{STAR}" if bold.get(i) else cell for i, cell in enumerate(cells)]
        values, errors = [], []
        for column, figure in zip(self.columns, figures, strict=True):
            values.append(None if figure is None else column.scale * figure.value)
            errors.append(None if figure is None or figure.error is None else column.scale * figure.error)
        return TableRow(label, arm.parameters, tuple(cells), tuple(values), tuple(errors), frozenset(bold))

    def _published(self, row: PublishedRow) -> TableRow:
        figures = row.figures[self.split]
        values = tuple(figures.get(c.title) for c in self.columns)
        cells = tuple("–" if v is None else as_printed(v, c.digits) for c, v in zip(self.columns, values, strict=True))
        return TableRow(f"published: {row.label}", None, cells, values, (None,) * len(values))

    def _labels(self) -> dict[str, str]:
        """Name of an arm -> what its row is called: the student with FT or KD, or the model."""
        plain = {arm.name: row_label(arm) for arm in self.reference.arms}
        labels = {}
        for arm in self.reference.arms:
            label = plain[arm.name]
            more = [arm.name] if list(plain.values()).count(label) > 1 else []
            more += [f"{len(arm.models)} seeds"] if len(arm.models) > 1 else []
            more += [self.quantised[arm.name]] if arm.name in self.quantised else []
            labels[arm.name] = f"{label} ({', '.join(more)})" if more else label
        return labels

    def _bold(self) -> dict[str, dict[int, bool]]:
        """Name of an arm -> number of a column in which it is the better one -> whether the difference leaves the error."""
        bold: dict[str, dict[int, bool]] = {arm.name: {} for arm in self.reference.arms}
        groups: dict[str, list[Pair]] = {}
        for pair in self.reference.pairs:
            groups.setdefault(pair.baseline.name, []).append(pair)
        for number, shown in enumerate(self.columns):
            for pairs in groups.values():
                for name, sure in self._better(shown, pairs).items():
                    bold[name][number] = sure
        return bold

    def _better(self, shown: ShownColumn, pairs: Sequence[Pair]) -> dict[str, bool]:
        """Names of the best of a baseline and those compared with it, and whether that is beyond the error."""
        if shown.column is None:
            return {}
        gains = {p.other.name: d for p in pairs if (d := self.reference.difference(p, shown.column)) is not None}
        if len(gains) < len(pairs):
            return {}
        most = max(0.0, *(d.gain for d in gains.values()))
        leaders = {name: d.verdict == "better" for name, d in gains.items() if d.gain == most}
        if most == 0.0:
            leaders[pairs[0].baseline.name] = all(d.verdict == "worse" for d in gains.values())
        return leaders

    def _counted(self) -> str:
        """How many examples the columns are over."""
        by_count: dict[str, list[str]] = {}
        for shown in self.columns:
            if shown.column is not None and len(shown.column.parts) == 1:
                comparison, metric = shown.column.parts[0]
                figures = [f for e in comparison.entries if (f := comparison.figure(e, metric))]
                counts = sorted({f"{f['n']:,} {f['over']}s" for f in figures})
                by_count.setdefault(" or ".join(counts), []).append(shown.title)
        parts = [f"{count}: {', '.join(titles)}" for count, titles in by_count.items()]
        return f"Figures are over {'; '.join(parts)}. ± is one standard error." if parts else ""

    def _ahead(self, pair: Pair) -> str:
        """In how many columns the one is ahead of the other, the means aside."""
        labels = self._labels()
        single = [c.column for c in self.columns if c.column is not None and len(c.column.parts) == 1]
        differences = [d for column in single if (d := self.reference.difference(pair, column)) is not None]
        ahead, behind = [d for d in differences if d.gain > 0], [d for d in differences if d.gain < 0]
        sure = [sum(d.verdict == word for d in differences) for word in ("better", "worse")]
        return (
            f"{labels[pair.other.name]} against {labels[pair.baseline.name]}: ahead in {len(ahead)} of {len(differences)} columns "
            f"({sure[0]} beyond the error), behind in {len(behind)} ({sure[1]} beyond the error)."
        )


def block_rows(blocks: Sequence[TableBlock], *, published: bool) -> list[list[Any]]:
    """One line per cell, header first, for a spreadsheet."""
    lines: list[list[Any]] = [
        ["block", "model", "parameters", "column", "value", "error", "published", "better of pair"]
    ]
    for block in blocks:
        for row in block.rows(published=published):
            for number, column in enumerate(block.columns):
                value, error = row.values[number], row.errors[number]
                if value is not None:
                    known = ["" if x is None else x for x in (row.parameters, value, error)]
                    marks = [int(row.published), int(number in row.bold)]
                    lines.append([block.split or "all", row.label, known[0], column.title, *known[1:], *marks])
    return lines


def row_label(arm: Arm) -> str:
    """`gpt2-medium KD` for a student, else the model's name."""
    if arm.loss is None:
        return short_name(arm.name)
    student = str(arm.settings.get("student") or arm.name)
    return f"{student.rstrip('/').rpartition('/')[2]} {FT if arm.loss == 'ce' else KD}"


def as_printed(value: float, digits: int) -> str:
    """A published figure with all the digits that it was given with, and at least `digits` of them."""
    given = f"{value:.10g}".partition(".")[2]
    return f"{value:.{max(digits, len(given))}f}"


def millions(parameters: int) -> str:
    """Parameters in millions: `783.2`, and `0.0123` of a tiny model."""
    return f"{parameters / MILLION:,.1f}" if parameters >= MILLION else f"{parameters / MILLION:.3g}"


def _is_of(row: PublishedRow, arm: Arm) -> bool:
    """Whether a published row is about the model of an arm: the last part of its name, and how it was trained."""
    trained = "" if arm.loss is None else FT if arm.loss == "ce" else KD
    name = arm.name if arm.loss is None else str(arm.settings.get("student"))
    last = [text.rstrip("/").rpartition("/")[2].lower() for text in (row.model, name)]
    return row.trained == trained and last[0] == last[1]
