"""Mixtures whose prompts are written already, such as dumps of FLAN on the hub: a column names the task of each row.

    kd data show DUMP.jsonl --columns prompt=inputs,target=targets,task=task_name --only template_type=zs_opt \\
        --max-per-task 30000 --mix-maximum 3000 --held-out nli

Rows are read one after the other, and rows of a task beyond its cap are counted and not kept: memory follows the caps, not the
size of the file. The cluster of a task follows from its name: that of a task of this package, of a data set of FLAN, or FLAN's own
name for it with or without a version (`anli/r1:0.1.0`). `--task-map FILE` tells what other names are.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path

from kd.common.errors import DataError, unknown_name
from kd.common.setting_values import as_text
from kd.common.strangers.yaml_file import read_mapping
from kd.data.data_settings import InstructionConfig, RowSettings
from kd.data.instruction_tasks.clusters import flan_clusters
from kd.data.instruction_tasks.mixing.mixtures import Mixed, refuse_unknown_limits, sampled
from kd.data.instruction_tasks.task_files import load_task, mini_task_names, task_names
from kd.data.left_out import LeftOut
from kd.data.rows.example import Example
from kd.data.rows.row_reading import Columns
from kd.data.rows.row_streams import StreamedRow
from kd.data.rows.tables import is_nothing

FIELDS = ("prompt", "target", "id", "task")
"""Fields whose columns may be named."""
USED = ("max_per_task", "task_limits", "mix_maximum", "mix_draws", "data_seed")
"""Settings of instruction tasks that hold for rows that are rendered already."""


def columns_read(columns: Columns, rows: RowSettings) -> tuple[str, ...]:
    """The columns that are read of each row. Raises DataError for an unknown field."""
    for name in columns:
        if name not in FIELDS:
            raise unknown_name("field in --columns of rows with tasks", name, FIELDS)
    named = (columns.get("prompt", "prompt"), columns.get("target", "target"))
    others = (columns[name] for name in ("id", "task") if name in columns)
    return tuple(dict.fromkeys((*named, *others, *(rows.only or {}))))


def rendered_mixture(
    streams: Mapping[str, Iterable[StreamedRow]],
    columns: Columns,
    rows: RowSettings,
    config: InstructionConfig,
    split: str,
    left_out: LeftOut,
) -> Mixed:
    """Rows of several sources as examples: in their order, or drawn with `mix_maximum`.

    streams   beginning of the ids -> rows; it also names the task where no column does

    Raises DataError for a row without a column, and where the cluster of a task is not known although clusters are held out.
    """
    pools: dict[str, list[Example]] = {}
    order: list[Example] = []
    cluster_of = _Clusters(rows)
    for example in _examples(streams, columns, rows, split, left_out):
        if cluster_of.held_out(example.task):
            left_out.add("held_out", example.id)
            continue
        pool = pools.setdefault(example.task, [])
        if len(pool) == config.limit_of(example.task):
            left_out.add("beyond_limit", example.id)
            continue
        pool.append(example)
        if config.mix_maximum is None:
            order.append(example)
    cluster_of.refuse_unknown()
    refuse_unknown_limits(config, list(pools))
    if config.mix_maximum is not None:
        order = list(sampled(pools, maximum=config.mix_maximum, draws=config.mix_draws, seed=config.data_seed))
    return Mixed(tuple(order), _provenance(pools, rows, config), left_out)


def _examples(
    streams: Mapping[str, Iterable[StreamedRow]], columns: Columns, rows: RowSettings, split: str, left_out: LeftOut
) -> Iterator[Example]:
    """The rows that `only` keeps and that have a text to score; the others are counted."""
    needed = columns_read(columns, rows)
    wanted = {column: set(values.split("|")) for column, values in (rows.only or {}).items()}
    prompt, target = columns.get("prompt", "prompt"), columns.get("target", "target")
    for prefix, stream in streams.items():
        file_task = prefix.rpartition("/")[2].partition(".")[0]
        for one in stream:
            _check_columns(one, needed)
            identity = f"{prefix}:{one.number}" if "id" not in columns else _text(one, columns["id"])
            if any(str(one.row[column]) not in values for column, values in wanted.items()):
                left_out.add("filtered", identity)
                continue
            text = _text(one, target)
            if not text.strip():
                left_out.add("without_text", identity)
                continue
            task = _text(one, columns["task"]) if "task" in columns else file_task
            if not task:
                raise DataError(
                    "a row names no task", where=f"{one.location} column {columns['task']}", found="nothing"
                )
            asked = _text(one, prompt)
            if not asked:
                left_out.add("without_prompt", identity)
            yield Example(identity, text, asked, task, split)


def _check_columns(one: StreamedRow, needed: Collection[str]) -> None:
    missing = [name for name in needed if name not in one.row]
    if missing:
        raise DataError(
            "columns are missing",
            where=one.location,
            found=", ".join(map(str, one.row)) or "none",
            expected=", ".join(needed) + f" (missing: {', '.join(missing)})",
            try_="--columns prompt=NAME,target=NAME,task=NAME",
        )


def _text(one: StreamedRow, column: str) -> str:
    """The text of a column; nothing is the empty text. Raises DataError for what is no text."""
    value = one.row[column]
    if is_nothing(value):
        return ""
    if not isinstance(value, str | int):
        raise DataError(
            "a value is not text",
            where=f"{one.location} column {column}",
            found=type(value).__name__,
            expected="a string",
        )
    return str(value)


class _Clusters:
    """Which tasks belong to held-out clusters; names that are not known are collected."""

    def __init__(self, rows: RowSettings) -> None:
        """Raises DataError for an unknown cluster, an unreadable map, and a map that would have no effect."""
        registry = flan_clusters()
        self.excluded: frozenset[str] = frozenset()
        if rows.held_out is not None:
            self.excluded = registry.excluded(name.strip() for name in rows.held_out.split(",") if name.strip())
        elif rows.task_map is not None:
            raise DataError("a map of tasks is for held-out clusters", found="--task-map", try_="--held-out CLUSTER")
        self.names = {} if rows.task_map is None else _read_map(rows.task_map)
        self.known: dict[str, bool] = {}
        self.unknown: dict[str, None] = {}

    def held_out(self, task: str) -> bool:
        """Whether rows of this task are left out."""
        if not self.excluded:
            return False
        if task not in self.known:
            clusters = self.names.get(task, clusters_of_name(task))
            if clusters is None:
                self.unknown[task] = None
            self.known[task] = bool((clusters or frozenset()) & self.excluded)
        return self.known[task]

    def refuse_unknown(self) -> None:
        """Raise DataError for the names whose cluster is not known: their rows might be of a held-out one."""
        if self.unknown:
            raise DataError(
                "the cluster of tasks is not known, and clusters are held out",
                found=", ".join(self.unknown)[:400],
                expected="names of tasks or data sets of FLAN",
                try_="--task-map FILE with NAME: CLUSTER for each, or NAME: none",
            )


def clusters_of_name(name: str) -> frozenset[str] | None:
    """The clusters of a task by any of its names, with or without a version; None for an unknown one."""
    return _clusters_by_name().get(re.sub(r":\d+(\.\d+)*$", "", name.strip()).lower())


@cache
def _clusters_by_name() -> Mapping[str, frozenset[str]]:
    registry = flan_clusters()
    clusters = {dataset: registry.clusters_of(dataset) for dataset in registry.datasets}
    clusters |= {name: frozenset(load_task(name).clusters) for name in (*task_names(), *mini_task_names())}
    clusters |= {other.lower(): clusters[name] for name, others in registry.written_as.items() for other in others}
    return clusters


def _read_map(path: Path) -> dict[str, frozenset[str]]:
    """Name -> clusters, from a YAML file. Raises DataError for a value that is nothing known."""
    registry, clusters = flan_clusters(), {}
    for name, value in read_mapping(path, "map of tasks").items():
        text = str(value).strip()
        by_name = clusters_of_name(text)
        if text.lower() in ("none", ""):
            clusters[str(name)] = frozenset[str]()
        elif text in registry.clusters or text in registry.other_names:
            clusters[str(name)] = frozenset({registry.cluster(text)})
        elif by_name is not None:
            clusters[str(name)] = by_name
        else:
            raise unknown_name("task, data set or cluster", text, (*registry.clusters, "none"), where=f"{path} {name}")
    return clusters


def _provenance(pools: Mapping[str, list[Example]], rows: RowSettings, config: InstructionConfig) -> dict[str, str]:
    """What identifies the choice of rows besides their text."""
    settings = {name: getattr(config, name) for name in USED if getattr(config, name) not in (None, 0)}
    return {
        "tasks": ", ".join(sorted(pools)),
        **{f"task {name}": f"{len(pool):,} examples" for name, pool in sorted(pools.items())},
        **({"only": ",".join(f"{k}={v}" for k, v in rows.only.items())} if rows.only else {}),
        **({"held_out": rows.held_out} if rows.held_out else {}),
        **{name: str(as_text(value)) for name, value in settings.items()},
    }
