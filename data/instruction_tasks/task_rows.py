"""Load the rows of a task's split from a folder of local files, from files that the task names, or from the hub.

With `--task-root DIR`, the split's files are looked for in DIR/TASK, in this order of names:

    SPLIT.*                 train, dev or test; then the hub's name (train_r1) and its other names (validation, valid and val
                            are dev)
    SPLIT_*.* or SPLIT-*.*  parts, in the order of their names (train_part.jsonl, train-00000-of-00002.parquet)
    sample*.*               used for dev and test, never for train

A part of a split (`train[90%:]`) is cut from the hub's split, and from a local train file where the folder has no separate
file for dev or test.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from kd.common.errors import DataError, unknown_name
from kd.data.instruction_tasks.task import SPLITS, SplitPart, TaskFile
from kd.data.rows.hub import HubRows, is_url, load_url
from kd.data.rows.tables import TABLE_READERS, Row, read_table

SAME = ("dev", "validation", "valid", "val")
"""Names of the dev split."""

Loaded = TypeVar("Loaded")
LoadHub = Callable[[str, str | None, str | None, str], HubRows]
"""(id, config, revision, split) -> rows in order; see `kd.data.rows.hub.load_hub`."""


@dataclass(frozen=True)
class TaskRows:
    """Rows of one split in the source's order, and where they came from."""

    rows: Sequence[Mapping[str, Any]]
    first: int
    """Number of the first row in the source's split."""
    where: str
    """File or data set, for errors."""
    source: str
    """Hub id, revision and split, or file names, for provenance."""


def load_task_rows(task: TaskFile, split: str, task_root: Path | None, load_hub: LoadHub) -> TaskRows:
    """Rows of `split` (train, dev, test). Raises DataError where the task has no such split or its rows cannot be loaded."""
    split = "dev" if split in SAME else split
    if split not in SPLITS:
        raise unknown_name("split", split, SPLITS, where=task.name)
    if split not in task.splits:
        raise DataError("the task has no such split", where=task.path, found=split, expected=", ".join(task.splits))
    if task_root is not None:
        return _from_folder(task, split, task_root)
    if task.files:
        if split not in task.files:
            raise DataError(
                "the task names no file for this split", where=task.path, found=split, expected=", ".join(task.files)
            )
        if is_url(task.files[split]):
            return _or_local_files(task, split, lambda: _from_url(task, task.files[split]))
        file = Path(task.path).parent / Path(task.files[split]).expanduser()
        if not file.is_file():
            raise DataError("a task's file is missing", where=f"{task.path} files.{split}", expected=str(file))
        return _from_files(task, [file], SplitPart(split))
    if task.hub is None:
        get = f"; the files are at {task.url}" if task.url else ""
        raise DataError(
            "the task has no data set on the hub that loads without code",
            where=task.name,
            try_=f"--task-root DIR with DIR/{task.name}/{split}.jsonl (or .csv, .parquet){get}",
        )
    part = task.splits[split]
    hub = task.hub
    hub_rows = _or_local_files(task, split, lambda: load_hub(hub.id, hub.config, hub.revision, part.name))
    data = hub_rows.data
    _check_columns(task, list(data.column_names), f"{task.hub.id} split {part.name}")
    start, stop = part.cut(len(data))
    rows = data if part.whole else data.select(range(start, stop))
    config = f":{task.hub.config}" if task.hub.config else ""
    source = f"{task.hub.id}{config}@{hub_rows.revision} {part}"
    return TaskRows(rows, start, f"{task.hub.id} split {part.name}", source)


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
        raise DataError(
            f"{error.headline} (task {task.name})", **details, try_=advice + ", ".join(task.columns)
        ) from error


def _from_url(task: TaskFile, url: str) -> TaskRows:
    data = load_url(url)
    _check_columns(task, list(data.column_names), url)
    return TaskRows(data, 0, url, url)


def _from_folder(task: TaskFile, split: str, root: Path) -> TaskRows:
    folder = root.expanduser() / task.name
    files = sorted(p for p in folder.glob("*") if p.suffix in TABLE_READERS and p.is_file()) if folder.is_dir() else []
    if not files:
        raise DataError(
            "no files of the task",
            where=str(folder),
            expected=f"{split}.jsonl, .csv, .tsv or .parquet",
            try_="a --task-root DIR that holds DIR/TASK/SPLIT.jsonl",
        )
    part = task.splits[split]
    if not part.whole and any(_named(files, s) for s in ("dev", "test")):
        part = SplitPart(split)
    of_split = _named(files, split) or _named(files, part.name)
    if not of_split and split != "train":
        of_split = [f for f in files if f.stem.startswith("sample")]
    if not of_split:
        raise DataError(
            "no file of the split",
            where=str(folder),
            found=", ".join(f.name for f in files),
            expected=", ".join(f"{n}.jsonl" for n in dict.fromkeys((split, part.name))) + " (or .csv, .tsv, .parquet)",
            try_="another --split: " + ", ".join(s for s in SPLITS if s != split),
        )
    return _from_files(task, of_split, part)


def _named(files: Sequence[Path], split: str) -> list[Path]:
    """The file called `split` or by one of its other names; else the files of its parts."""
    names = SAME if split in SAME else (split,)
    for name in (split, *names):
        exact = [f for f in files if f.stem == name]
        if len(exact) > 1:
            raise DataError(
                "two files for one split",
                where=str(exact[0].parent),
                found=", ".join(f.name for f in exact),
                expected="one of them",
            )
        if exact:
            return exact
    return [f for f in files if any(f.stem.startswith((f"{name}_", f"{name}-")) for name in names)]


def _from_files(task: TaskFile, files: Sequence[Path], part: SplitPart) -> TaskRows:
    rows: list[Row] = []
    for file in files:
        names, file_rows = read_table(file)
        _check_columns(task, names, str(file))
        rows += file_rows
    start, stop = part.cut(len(rows))
    listed = ", ".join(f.name for f in files)
    where = str(files[0]) if len(files) == 1 else f"{files[0].parent} ({listed})"
    return TaskRows(rows[start:stop], start, where, f"local {listed}" + ("" if part.whole else f" {part}"))


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
