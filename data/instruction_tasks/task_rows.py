"""Load the rows of a task's split from a folder of local files, from files that the task names, or from the hub.

With `--task-root DIR`, the split's files are looked for in DIR/TASK, in this order of names:

    SPLIT.*                 train, dev or test; then the hub's name (train_r1) and its other names (validation, valid and val
                            are dev)
    SPLIT_*.* or SPLIT-*.*  parts, in the order of their names (train_part.jsonl, train-00000-of-00002.parquet)
    sample*.*               used for dev and test, never for train

A part of a split (`train[90%:]`) is cut from the hub's split, from the local files where these are called as the splits at the
source are, from a local train file where the folder has no separate file for dev or test, and from the file that a task names for
that split under `files`.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, TypeVar

from kd.common.errors import DataError, unknown_name
from kd.common.paths import as_path
from kd.common.strangers.plain_files import is_inside
from kd.data.demo.mini_flan import made_rows
from kd.data.instruction_tasks.row_reading.row_order import one_row_per_item, seeded_order
from kd.data.instruction_tasks.task import SPLITS, SplitPart, TaskFile
from kd.data.rows.compressed import plain_name
from kd.data.rows.hub import HubRows, is_url, load_url
from kd.data.rows.tables import RowLocation, RowTable, read_table, rows_in, table_files

SAME = ("dev", "validation", "valid", "val")
"""Names of the dev split."""

Loaded = TypeVar("Loaded")
LoadHub = Callable[..., HubRows]
"""(id, config, revision, split) -> rows in order, and a fifth argument where the task names files of the repository; see
`kd.data.rows.hub.load_hub`."""


class MissingRowsError(DataError):
    """The rows of a task's split are not where they are looked for, or cannot be fetched."""


@dataclass(frozen=True)
class TaskRows:
    """Rows of one split in the source's order, or in the task's own, and where they came from."""

    rows: Sequence[Mapping[str, Any]]
    first: int
    """Number of the first row in the source's split."""
    where: str
    """File or data set, for errors."""
    location: RowLocation
    """Number of a row in the source's split -> where it is, for errors."""
    source: str
    """Hub id, revision and split, or file names, for provenance."""
    numbers: Sequence[int] | None = None
    """Numbers of the rows in the source's split, where they do not follow each other."""


def load_task_rows(task: TaskFile, split: str, task_root: Path | None, load_hub: LoadHub) -> TaskRows:
    """Rows of `split` (train, dev, test). Raises DataError where the task has no such split; MissingRowsError where its rows cannot
    be loaded.
    """
    split = "dev" if split in SAME else split
    if split not in SPLITS:
        raise unknown_name("split", split, SPLITS, where=task.name)
    if split not in task.splits:
        raise DataError("the task has no such split", where=task.path, found=split, expected=", ".join(task.splits))
    if task_root is not None:
        return _from_folder(task, split, task_root)
    if task.files:
        return _from_named_file(task, split)
    if task.made is not None:
        return _made(task, split, task.made)
    if task.hub is None:
        get = f"; the files are at {task.url}" if task.url else ""
        raise MissingRowsError(
            "the task has no data set on the hub that loads without code",
            where=task.name,
            try_=f"--task-root DIR with DIR/{task.name}/{split}.jsonl (or .csv, .parquet){get}",
        )
    part = task.splits[split]
    hub = task.hub
    if hub.files and part.name not in hub.files:
        raise MissingRowsError(
            "the task names no file of its repository for this split",
            where=f"{task.path} hub.files",
            found=", ".join(hub.files),
            expected=part.name,
        )
    files = [{part.name: list(hub.files[part.name])}] if hub.files else []
    hub_rows = _or_local_files(task, split, lambda: load_hub(hub.id, hub.config, hub.revision, part.name, *files))
    where = f"{task.hub.id} split {part.name}"
    _check_columns(task, list(hub_rows.data.column_names), where)
    config = f":{task.hub.config}" if task.hub.config else ""
    source = f"{task.hub.id}{config}@{hub_rows.revision} {part}"
    return _part_of(task, hub_rows.data, part, where, rows_in(where), source)


def _made(task: TaskFile, split: str, maker: str) -> TaskRows:
    """The rows that a rule of this package makes."""
    where = f"made rows of {maker}"
    return _part_of(
        task,
        made_rows(maker, task.splits[split].name),
        task.splits[split],
        where,
        rows_in(where),
        f"made by the rule {maker}",
    )


def _part_of(task: TaskFile, rows: Any, part: SplitPart, where: str, location: RowLocation, source: str) -> TaskRows:
    """A part of the rows: after one is made of each item of their lists, and after they are put into the task's order.

    rows   a list, or a `datasets.Dataset`
    """
    if task.explode:
        rows, location = one_row_per_item(rows, task.explode, location)
    start, stop = part.cut(len(rows))
    if task.shuffle is None:
        if not part.whole:
            rows = rows.select(range(start, stop)) if hasattr(rows, "select") else rows[start:stop]
        return TaskRows(rows, start, where, location, source)
    numbers = seeded_order(len(rows), task.shuffle)[start:stop]
    chosen = rows.select(numbers) if hasattr(rows, "select") else [rows[number] for number in numbers]
    first = numbers[0] if numbers else 0
    return TaskRows(chosen, first, where, location, f"{source} shuffled by {task.shuffle}", numbers)


def _or_local_files(task: TaskFile, split: str, load: Callable[[], Loaded]) -> Loaded:
    """The result of `load`. Where it fails, the error also says how to provide the rows as local files."""
    try:
        return load()
    except DataError as error:
        get = f", from {task.url}" if task.url else ""
        advice = (
            f"the network, or --task-root DIR with DIR/{task.name}/{split}.jsonl (.csv, .tsv, .parquet){get}, columns "
        )
        details = {key: value for key, value in error.details.items() if key != "try"}
        raise MissingRowsError(
            f"{error.headline} (task {task.name})", **details, try_=advice + ", ".join(task.columns)
        ) from error


def _from_named_file(task: TaskFile, split: str) -> TaskRows:
    """The rows of a split from the file that the task names for it, or from the part of a file that `splits` names."""
    part = task.splits[split]
    of = next((name for name in _names_of(part.name) if name in task.files), split)
    if of != split and split in task.files:
        if not part.whole and task.files[split] != task.files[of]:
            raise DataError(
                "a split has a file of its own and is also a part of another",
                where=f"{task.path} splits.{split}",
                found=f"{part}, and files.{split}: {', '.join(task.files[split])}",
                expected="one of the two",
            )
        of = split
    if of not in task.files:
        raise MissingRowsError(
            "the task names no file for this split", where=task.path, found=split, expected=", ".join(task.files)
        )
    named = task.files[of]
    if any(map(is_url, named)):
        return _or_local_files(
            task,
            split,
            lambda: _from_tables(task, [_table_at(task, of, name) for name in named], part, ", ".join(named)),
        )
    files = [_file_beside(task, of, name) for name in named]
    return _from_files(task, files, part if not part.whole else SplitPart(split))


def _table_at(task: TaskFile, split: str, name: str) -> RowTable:
    return load_url(name) if is_url(name) else read_table(_file_beside(task, split, name))


def _file_beside(task: TaskFile, split: str, name: str) -> Path:
    """A file beside the YAML file, or below. Raises DataError for one elsewhere, MissingRowsError where there is none."""
    file = Path(task.path).parent / name
    if not is_inside(file, Path(task.path).parent):
        raise DataError(
            "a task's file lies outside of its folder",
            where=f"{task.path} files.{split}",
            found=name,
            expected="a file beside the YAML file, or below",
            try_="--task-root DIR, which may be anywhere",
        )
    if not file.is_file():
        raise MissingRowsError("a task's file is missing", where=f"{task.path} files.{split}", expected=str(file))
    return file


def _names_of(split: str) -> tuple[str, ...]:
    """The split's own name, and its other ones."""
    return (split, *SAME) if split in SAME else (split,)


def _from_folder(task: TaskFile, split: str, root: Path) -> TaskRows:
    folder = as_path(root) / task.name
    files = table_files(folder) if folder.is_dir() else []
    if not files:
        raise MissingRowsError(
            "no files of the task",
            where=str(folder),
            expected=f"{split}.jsonl, .csv, .tsv or .parquet",
            try_="a --task-root DIR that holds DIR/TASK/SPLIT.jsonl",
        )
    part = task.splits[split]
    if _as_at_the_source(task, files):
        return _from_files(task, _named(files, part.name), part)
    if not part.whole and any(_named(files, s) for s in ("dev", "test")):
        part = SplitPart(split)
    of_split = _named(files, split) or _named(files, part.name)
    if not of_split and split != "train":
        of_split = [f for f in files if plain_name(f).startswith("sample")]
    if not of_split:
        raise MissingRowsError(
            "no file of the split",
            where=str(folder),
            found=", ".join(f.name for f in files),
            expected=", ".join(f"{n}.jsonl" for n in dict.fromkeys((split, part.name))) + " (or .csv, .tsv, .parquet)",
            try_="another --split: " + ", ".join(s for s in SPLITS if s != split),
        )
    return _from_files(task, of_split, part)


def _as_at_the_source(task: TaskFile, files: Sequence[Path]) -> bool:
    """Whether parts are cut, and a folder holds the splits of the source under their own names and none of other names."""
    parts = task.splits.values()
    needed, names = {part.name for part in parts}, {plain_name(file) for file in files}
    at_the_source = needed | set(task.rows)
    return not all(part.whole for part in parts) and needed <= names and not names & ({*SPLITS, *SAME} - at_the_source)


def _named(files: Sequence[Path], split: str) -> list[Path]:
    """The file called `split` or by one of its other names; else the files of its parts."""
    names = _names_of(split)
    for name in names:
        exact = [f for f in files if plain_name(f) == name]
        if len(exact) > 1:
            raise DataError(
                "two files for one split",
                where=str(exact[0].parent),
                found=", ".join(f.name for f in exact),
                expected="one of them",
            )
        if exact:
            return exact
    return [f for f in files if any(plain_name(f).startswith((f"{name}_", f"{name}-")) for name in names)]


def _from_files(task: TaskFile, files: Sequence[Path], part: SplitPart) -> TaskRows:
    listed = ", ".join(f.name for f in files)
    return _from_tables(task, [read_table(file) for file in files], part, f"local {listed}")


def _from_tables(task: TaskFile, tables: Sequence[RowTable], part: SplitPart, source: str) -> TaskRows:
    """A part of the rows of several tables, one after the other. Raises DataError for a row that lacks a column of the task."""
    needed = set(task.columns)
    for table in tables:
        _check_columns(task, table.names, table.file)
        for number, row in enumerate(table.rows):
            if not needed <= row.keys():
                _check_columns(task, list(row), table.location(number))
    rows = [row for table in tables for row in table.rows]
    where = tables[0].file if len(tables) == 1 else ", ".join(table.file for table in tables)
    return _part_of(task, rows, part, where, _location_in(tables), source + ("" if part.whole else f" {part}"))


def _location_in(tables: Sequence[RowTable]) -> RowLocation:
    """Places of the rows of several tables, one after the other."""
    firsts = list(accumulate((len(table.rows) for table in tables), initial=0))

    def location(number: int) -> str:
        table = max(0, min(bisect_right(firsts, number) - 1, len(tables) - 1))
        return tables[table].location(number - firsts[table])

    return location


def _check_columns(task: TaskFile, names: Sequence[str], where: str) -> None:
    missing = [c for c in task.columns if c not in names]
    if missing:
        raise DataError(
            "columns are missing",
            where=where,
            found=", ".join(names) or "none",
            expected=", ".join(task.columns) + f" (missing: {', '.join(missing)})",
            try_=f"kd data templates {task.name} shows a row",
        )
