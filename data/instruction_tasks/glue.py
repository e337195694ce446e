"""GLUE's seven classification tasks: rows of one or two texts with a label.

    glue/sst2                 the hub's nyu-mll/glue (hub 1.0 refuses the bare name `glue`)
    FOLDER/sst2               local files with the columns of the hub, where FOLDER is called glue or a task is named
    TASK with --task-root     ROOT/TASK, as for instruction tasks

The words of a file's name tell its split: `train.jsonl` and `subset_train.jsonl` are train; `validation`, `valid`, `val` and
`dev` are dev, and `sample` stands for dev where no other file does. `glue.yaml` is the table of tasks: columns, label words, split,
metrics. Labels are numbered as in GLUE (MNLI 0 entailment, 1 neutral, 2 contradiction; RTE and QNLI 0 entailment). The test rows
of the hub have no labels (-1) and are refused.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from kd.common.errors import DataError, unknown_name
from kd.common.paths import as_path
from kd.common.strangers.yaml_file import read_mapping
from kd.data.instruction_tasks.draws import kept_rows
from kd.data.instruction_tasks.task_rows import SAME
from kd.data.rows.compressed import plain_name
from kd.data.rows.example import Example, text_digest
from kd.data.rows.hub import load_hub
from kd.data.rows.tables import RowLocation, read_table, rows_in, table_files

GLUE_ID = "nyu-mll/glue"
GLUE_SPLITS = ("train", "dev")
CLASSES = "classes"
"""Kind of a corpus whose examples are texts to classify: the target is the word of the label, and the one row is its number."""
PAIR = "\x1f"
"""Separator of the two texts of a pair in the prompt of such an example: ASCII's unit separator."""


@dataclass(frozen=True)
class GlueTask:
    """A task, as the table describes it."""

    name: str
    texts: tuple[str, ...]
    """Columns of the texts: one, or two for a pair."""
    labels: tuple[str, ...]
    """A word for each label number."""
    dev: str
    """Name of the dev split on the hub."""
    metrics: tuple[str, ...]
    """Metrics that GLUE reports besides accuracy: `mcc`, `f1`."""


@dataclass(frozen=True)
class LabelledRow:
    """A text or a pair of texts, and the number of its label."""

    id: str
    texts: tuple[str, ...]
    label: int


@dataclass(frozen=True)
class LabelledRows:
    """Rows of one split, in the source's order."""

    task: GlueTask
    split: str
    rows: tuple[LabelledRow, ...]
    source: Mapping[str, str]
    """Where the rows come from: hub id and commit, or `local` and the names of the files."""

    @property
    def examples(self) -> tuple[Example, ...]:
        """The rows as examples of rank classification: a line per text, and the word of the label as target."""
        return self._examples("\n")

    @property
    def labelled(self) -> tuple[Example, ...]:
        """The rows as examples of a corpus of classes (see `CLASSES`), with PAIR between the texts of a pair.

        Raises DataError for a text that holds PAIR.
        """
        for row in self.rows:
            if any(PAIR in text for text in row.texts):
                raise DataError(
                    "a text holds the character that separates pairs",
                    where=f"glue/{self.task.name} {row.id}",
                    found="U+001F",
                    try_="rows without it",
                )
        return self._examples(PAIR)

    def _examples(self, separator: str) -> tuple[Example, ...]:
        words = self.task.labels
        return tuple(
            Example(row.id, words[row.label], separator.join(row.texts), self.task.name, self.split, words, row.label)
            for row in self.rows
        )

    @property
    def digest(self) -> str:
        """Digest of ids, texts and labels, in order."""
        return text_digest(self.examples)


@lru_cache(maxsize=1)
def glue_tasks() -> Mapping[str, GlueTask]:
    """The tasks by name, in the order of the table."""
    table = read_mapping(Path(__file__).with_name("glue.yaml"), "table of GLUE's tasks")
    return {
        name: GlueTask(name, tuple(entry["texts"]), tuple(entry["labels"]), entry["dev"], tuple(entry["metrics"]))
        for name, entry in table.items()
    }


def glue_task(name: str) -> GlueTask:
    """A task by name. Raises DataError with all names for one that is unknown."""
    if name not in glue_tasks():
        raise unknown_name("GLUE task", name, glue_tasks())
    return glue_tasks()[name]


def is_glue(spec: str) -> bool:
    """Whether a data spec ends in glue/TASK."""
    path = Path(spec)
    return path.parent.name == "glue" and path.name in glue_tasks()


def refuse_other_tasks(spec: str) -> None:
    """Raise DataError for a spec glue/NAME where GLUE has no such task here, and this machine no such folder."""
    name = spec.removeprefix("glue/")
    if spec != name and name not in glue_tasks() and not as_path(spec).exists() and re.fullmatch(r"[\w-]+", name):
        advice = f"for rows of the hub that are no task here, {GLUE_ID}:CONFIG with --columns"
        raise unknown_name("GLUE task", name, glue_tasks(), where=spec, try_=advice)


def load_glue(
    spec: str | None = None,
    *,
    task: str | None = None,
    split: str = "train",
    limit: int | None = None,
    task_root: Path | None = None,
) -> LabelledRows:
    """Rows of one split (`train`, or `dev`, also called validation); `limit` keeps so many (see `draws`).

    One of `spec` and `task` may be left out: a task alone means the rows of the hub, or of the folder with its name in
    `task_root`; the last part of a spec names its task. Raises DataError for an unknown task or split, missing files or columns,
    and rows without a label.
    """
    glue = glue_task(task or (Path(spec).name if spec else ""))
    split = _split_name(glue, split)
    folder = as_path(spec or f"glue/{glue.name}") if task_root is None else as_path(task_root) / glue.name
    if folder.exists() or task_root is not None:
        rows, source = _local_rows(folder, glue, split)
    elif spec is None or spec == f"glue/{glue.name}":
        rows, source = _hub_rows(glue, split)
    else:
        raise DataError(
            "no such file or folder",
            where=spec,
            expected=f"glue/{glue.name}, or a folder of its rows",
            try_="--task-root DIR with DIR/TASK/train.jsonl",
        )
    if not rows:
        raise DataError("no rows found", where=folder, expected=f"rows of {glue.name}, split {split}")
    if limit is not None:
        rows = tuple(rows[n] for n in kept_rows([row.label for row in rows], [row.id for row in rows], limit))
    return LabelledRows(glue, split, rows, source)


def _split_name(task: GlueTask, split: str) -> str:
    """`train` or `dev`, for any name of a split."""
    name = "dev" if split in (*SAME, task.dev) else split
    if name not in GLUE_SPLITS:
        raise unknown_name("split", split, GLUE_SPLITS, where=f"glue/{task.name}", note="the test rows have no labels")
    return name


def _hub_rows(task: GlueTask, split: str) -> tuple[tuple[LabelledRow, ...], dict[str, str]]:
    table = load_hub(GLUE_ID, task.name, None, task.dev if split == "dev" else "train")
    where = f"{GLUE_ID}:{task.name} {split}"
    rows = _labelled(task, table.data.column_names, table.data, where, rows_in(where), split)
    return rows, {"source": GLUE_ID, "config": task.name, "revision": table.revision}


def _local_rows(path: Path, task: GlueTask, split: str) -> tuple[tuple[LabelledRow, ...], dict[str, str]]:
    if not path.exists():
        raise DataError(
            "no files of the task",
            where=path,
            expected=f"{split}.jsonl, .csv, .tsv or .parquet",
            try_="a --task-root DIR that holds DIR/TASK/SPLIT.jsonl",
        )
    files = [path] if path.is_file() else _files_of(path, split)
    rows: list[LabelledRow] = []
    for file in files:
        table = read_table(file)
        prefix = "" if len(files) == 1 else f"{plain_name(file)}/"
        rows += _labelled(task, table.names, table.rows, table.file, table.location, split, prefix)
    return tuple(rows), {"source": "local", "files": ", ".join(f.name for f in files)}


def _files_of(folder: Path, split: str) -> list[Path]:
    """The files whose names tell the split, in the order of their names."""
    tables = table_files(folder)
    for names in ({split, *(SAME if split == "dev" else ())}, {"sample"} if split == "dev" else set()):
        files = [f for f in tables if names & set(re.findall(r"[a-z]+", plain_name(f).lower()))]
        if len({plain_name(f) for f in files}) < len(files):
            raise DataError(
                "two files hold the same rows",
                where=folder,
                found=", ".join(f.name for f in files),
                expected="one of each name",
            )
        if files:
            return files
    raise DataError(
        "no file of the split",
        where=folder,
        found=", ".join(f.name for f in tables) or "no table files",
        expected=f"{split}.jsonl (or .csv, .tsv, .parquet)",
    )


def _labelled(
    task: GlueTask,
    columns: Sequence[str],
    table: Iterable[Mapping[str, Any]],
    where: str,
    location: RowLocation,
    split: str,
    prefix: str = "",
) -> tuple[LabelledRow, ...]:
    _check_columns(task, columns, where)
    rows = []
    for number, row in enumerate(table):
        _check_columns(task, row, location(number))
        texts = tuple(row[c] for c in task.texts)
        if not all(isinstance(t, str) for t in texts):
            raise DataError("a value is not text", where=location(number), expected=", ".join(task.texts))
        label = str(row["label"]).strip()  # CSV holds text
        if not (label.isdigit() and int(label) < len(task.labels)):
            raise DataError(
                "a label is out of bounds",
                where=location(number),
                found=row["label"],
                expected=f"0 to {len(task.labels) - 1}: {', '.join(task.labels)}",
            )
        rows.append(LabelledRow(f"{split}/{prefix}{number}", texts, int(label)))
    return tuple(rows)


def _check_columns(task: GlueTask, columns: Collection[str], where: str) -> None:
    needed = (*task.texts, "label")
    if any(column not in columns for column in needed):
        raise DataError(
            "columns are missing", where=where, found=", ".join(columns) or "none", expected=", ".join(needed)
        )
