"""Files that say what a system's own table looks like: its blocks, its columns and the figures that were published.

    about: System 001, …                 heading of the table
    blocks: {train: Train, test: Test}   split of the text -> heading; left out, all texts are in one block
    scale: 100                           what figures are multiplied with; 1 by default
    digits: 1                            digits after the point; 3 by default
    columns:
      - {title: BoolQ, metric: accuracy/boolq}
      - {title: PPL, metric: perplexity, scale: 1, digits: 2}
    means: [metrics, tasks]              further columns: the mean over the columns, the mean over the tasks
    published:
      source: where the figures are from
      remarks: [what else was published]
      rows:
        - {label: GPT-2-Med KD, model: openai-community/gpt2-medium, trained: KD, figures: {test: {BoolQ: 77.9}}}

A metric is named as in eval.json: METRIC, or METRIC/TASK for one task of a text. `trained` is FT, KD, or left out for a
model as it is. To add a table, put a file beside this module, or pass any path.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kd.common.errors import DataError, unknown_name
from kd.common.paths import as_path
from kd.common.strangers.yaml_file import read_mapping

FOLDER = Path(__file__).parent
ALL = ""
"""Name of the one block of a table that has none."""
FT, KD = "FT", "KD"
"""Students that were fine-tuned on the text, and those that learned from a teacher too."""
MEANS = ("metrics", "tasks")
KEYS = ("about", "blocks", "scale", "digits", "columns", "means", "published")
MAX_DIGITS = 9


@dataclass(frozen=True)
class TableColumn:
    """A column: one metric of one task."""

    title: str
    metric: str
    scale: float
    digits: int

    @property
    def task(self) -> str:
        """The task of the text that the metric belongs to; the metric itself where it names none."""
        return self.metric.partition("/")[2] or self.metric


@dataclass(frozen=True)
class PublishedRow:
    """A row of the table as it was published."""

    label: str
    model: str
    """The model, or what the student began as."""
    trained: str = ""
    """`FT`, `KD`, or nothing for a model as it is."""
    figures: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """Block -> title of a column -> the figure as it was printed."""


@dataclass(frozen=True)
class TableFile:
    """A table as written."""

    name: str
    about: str
    blocks: Mapping[str, str]
    columns: tuple[TableColumn, ...]
    means: tuple[str, ...]
    scale: float = 1.0
    digits: int = 3
    source: str = ""
    """Where the published figures are from."""
    remarks: tuple[str, ...] = ()
    """What else was published, in sentences."""
    published: tuple[PublishedRow, ...] = ()

    @property
    def tasks(self) -> dict[str, list[TableColumn]]:
        """Task -> its columns."""
        tasks: dict[str, list[TableColumn]] = {}
        for column in self.columns:
            tasks.setdefault(column.task, []).append(column)
        return tasks

    @property
    def mean_titles(self) -> dict[str, str]:
        """Kind of a mean -> its title."""
        counts = {"metrics": len(self.columns), "tasks": len(self.tasks)}
        return {kind: f"mean of {counts[kind]} {kind}" for kind in self.means}


def table_names() -> list[str]:
    """Names of the tables that come with the package."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def load_table(name: str) -> TableFile:
    """A table by name or path. Raises DataError, naming the key that is wrong."""
    path = as_path(name)
    if path.suffix not in (".yaml", ".yml"):
        path = FOLDER / f"{name}.yaml"
        if name not in table_names():
            raise unknown_name("table", name, table_names(), try_="the path of a .yaml file")
    document = read_mapping(path, "table")
    _refuse_other_keys(document, KEYS, path)
    columns = _listed(document, "columns", path)
    if not columns:
        raise DataError("a table has no columns", where=path, expected="columns: [{title: …, metric: …}]")
    scale, digits = _number(document, "scale", 1.0, path), _digits(document, 3, path)
    published = document.get("published") or {}
    _refuse_other_keys(published, ("source", "remarks", "rows"), f"{path}: published")
    table = TableFile(
        path.stem,
        str(document.get("about", path.stem)),
        _texts(document.get("blocks") or {ALL: ""}, f"{path}: blocks"),
        tuple(_column(one, scale, digits, f"{path}: columns") for one in columns),
        _means(document, path),
        scale,
        digits,
        str(published.get("source", "")),
        tuple(map(str, _listed(published, "remarks", path))),
        tuple(_published(one, f"{path}: published") for one in _listed(published, "rows", path)),
    )
    _refuse_strange_figures(table, path)
    return table


def _column(entry: Any, scale: float, digits: int, where: str) -> TableColumn:
    _refuse_other_keys(entry, ("title", "metric", "scale", "digits"), where)
    title, metric = (_text(entry, key, where) for key in ("title", "metric"))
    return TableColumn(title, metric, _number(entry, "scale", scale, where), _digits(entry, digits, where))


def _published(entry: Any, where: str) -> PublishedRow:
    _refuse_other_keys(entry, ("label", "model", "trained", "figures"), where)
    trained = str(entry.get("trained", ""))
    if trained not in ("", FT, KD):
        raise unknown_name("kind of training", trained, (FT, KD), where=where)
    figures: dict[str, dict[str, float]] = {}
    for block, values in (entry.get("figures") or {}).items():
        _refuse_other_keys(values, values, where)
        figures[str(block)] = {str(title): _number(values, title, 0.0, where) for title in values}
    return PublishedRow(_text(entry, "label", where), _text(entry, "model", where), trained, figures)


def _refuse_strange_figures(table: TableFile, path: Path) -> None:
    """Raise DataError for two columns of one title, and for a published figure that belongs to no block or column."""
    titles = [column.title for column in table.columns] + list(table.mean_titles.values())
    twice = [title for title in titles if titles.count(title) > 1]
    if twice:
        raise DataError("two columns of a table have the same title", where=path, found=twice[0])
    for row in table.published:
        for block, figures in row.figures.items():
            if block not in table.blocks:
                raise unknown_name("block", block, list(table.blocks), where=f"{path}: {row.label}")
            for title in figures:
                if title not in titles:
                    raise unknown_name("column", title, titles, where=f"{path}: {row.label}")


def _means(document: Mapping[str, Any], path: Path) -> tuple[str, ...]:
    means = _listed(document, "means", path)
    for kind in means:
        if kind not in MEANS:
            raise unknown_name("mean", str(kind), MEANS, where=path)
    return tuple(means)


def _refuse_other_keys(entry: Any, keys: Any, where: object) -> None:
    if not isinstance(entry, dict):
        raise DataError("a part of a table is not a mapping", where=where, found=f"{entry!r:.60}")
    for key in entry:
        if key not in keys:
            raise unknown_name("key of a table", str(key), keys, where=where)


def _listed(document: Mapping[str, Any], key: str, where: object) -> list[Any]:
    value = document.get(key) or []
    if not isinstance(value, list):
        raise DataError("a part of a table is not a list", where=f"{where}: {key}", found=f"{value!r:.60}")
    return value


def _texts(value: Any, where: object) -> dict[str, str]:
    _refuse_other_keys(value, value, where)
    return {str(key): str(text) for key, text in value.items()}


def _text(entry: Mapping[str, Any], key: str, where: object) -> str:
    value = entry.get(key)
    if not isinstance(value, str) or not value:
        raise DataError("a part of a table is missing", where=where, found=f"{key}: {value!r:.60}", expected="a text")
    return value


def _number(entry: Mapping[str, Any], key: str, default: float, where: object) -> float:
    value = entry.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise DataError("a figure of a table is no number", where=where, found=f"{key}: {value!r:.60}")
    return float(value)


def _digits(entry: Mapping[str, Any], default: int, where: object) -> int:
    value = _number(entry, "digits", default, where)
    if value not in range(MAX_DIGITS + 1):
        raise DataError("a number of digits is out of bounds", where=where, found=value, expected=f"0 to {MAX_DIGITS}")
    return int(value)
