"""Which measured figures go into a system's table: the blocks that were asked for, and the columns of each.

A text that was read twice (with another limit, say) has one column, that of the reading with more models. The others are named
below the block.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from kd.common.errors import DataError
from kd.evaluation.report.columns import Column
from kd.evaluation.report.comparison import Comparison, Entry
from kd.evaluation.report.pairs import Arm, Pair
from kd.evaluation.report.reference import Reference
from kd.evaluation.report.systems.report_settings import ReportSettings
from kd.evaluation.report.systems.system_table import ShownColumn, TableBlock
from kd.evaluation.report.systems.table_file import ALL, TableFile, load_table


def asked_blocks(
    settings: ReportSettings,
    entries: Sequence[Entry],
    comparisons: Sequence[Comparison],
    arms: Sequence[Arm],
    pairs: Sequence[Pair],
) -> list[TableBlock]:
    """The blocks of the table that was asked for. Raises DataError where nothing of it was measured."""
    if settings.table is None:
        return []
    file = load_table(settings.table)
    blocks = blocks_of(file, entries, comparisons, arms, pairs)
    if not blocks:
        there = dict.fromkeys(f"{m} ({_split_of(c) or 'no split'})" for c in comparisons for m in c.metrics)
        raise DataError(
            "nothing of the table was measured",
            where=f"--table {settings.table}",
            found=", ".join(there)[:400] or "no evaluation",
            expected=", ".join(c.metric for c in file.columns)
            + (f"; of the splits {', '.join(file.blocks)}" if ALL not in file.blocks else ""),
        )
    return blocks


def blocks_of(
    file: TableFile,
    entries: Sequence[Entry],
    comparisons: Sequence[Comparison],
    arms: Sequence[Arm],
    pairs: Sequence[Pair],
) -> list[TableBlock]:
    """The blocks of a table in which anything was measured."""
    quantised = {arm.name: words for arm in arms if (words := _quantisation(arm, entries))}
    blocks = []
    for split in file.blocks:
        columns = _columns(file, [c for c in comparisons if split in (ALL, _split_of(c))])
        measured = {name for c in columns if c.column is not None for name in _models(c.column)}
        inside = tuple(arm for arm in arms if measured & set(arm.models.values()))
        names = {arm.name for arm in inside}
        paired = tuple(p for p in pairs if {p.baseline.name, p.other.name} <= names)
        if inside:
            reference = Reference(inside, paired, tuple(c.column for c in columns if c.column is not None))
            blocks.append(TableBlock(file, split, columns, reference, quantised))
    return blocks


def _columns(file: TableFile, comparisons: Sequence[Comparison]) -> tuple[ShownColumn, ...]:
    """The columns of one block, and its means."""
    shown: dict[str, ShownColumn] = {}
    for spec in file.columns:
        measured = [c for c in comparisons if spec.metric in c.metrics]
        chosen = max(measured, key=lambda c: len(c.entries), default=None)
        others = {e.name for c in measured for e in c.entries} - {e.name for e in chosen.entries} if chosen else set()
        column = None if chosen is None else Column(spec.title, ((chosen, spec.metric),))
        shown[spec.title] = ShownColumn(spec.title, spec.scale, spec.digits, column, tuple(sorted(others)))
    most = math.lcm(*map(len, file.tasks.values()))
    for kind, title in file.mean_titles.items():
        repeats = {
            spec.title: 1 if kind == "metrics" else most // len(file.tasks[spec.task]) for spec in file.columns
        }  # a task's metrics share the weight of the task
        parts = [
            part
            for spec in file.columns
            if (column := shown[spec.title].column) is not None
            for part in column.parts * repeats[spec.title]
        ]
        whole = all(shown[spec.title].column is not None for spec in file.columns)
        mean = Column(title, tuple(parts)) if whole else None
        shown[title] = ShownColumn(title, file.scale, file.digits, mean)
    return tuple(shown.values())


def _models(column: Column) -> set[str]:
    return {e.name for comparison, metric in column.parts for e in comparison.entries if comparison.figure(e, metric)}


def _split_of(comparison: Comparison) -> str | None:
    data = comparison.entries[0].report.data
    return None if data is None else str(data.get("split"))


def _quantisation(arm: Arm, entries: Sequence[Entry]) -> str:
    """How the weights of an arm were quantised when it was scored, in words; nothing where they were not."""
    names = set(arm.models.values())
    kinds = {str(e.report.identity.get("quantization", "none")) for e in entries if e.name in names} - {"none"}
    return ", ".join("4 bits" if "nf4" in kind else kind for kind in sorted(kinds))
