"""GLUE's seven classification tasks: rows of one or two texts with a label.

    glue/sst2                 the hub's nyu-mll/glue (bare `glue` is refused by hub 1.0)
    FOLDER/sst2               local files of the hub's columns, where FOLDER is called glue, or a task was named
    TASK with --task-root     ROOT/TASK, as for instruction tasks

Files of a folder are told apart by the words of their names: `train.jsonl` or `subset_train.jsonl` is train,
`validation`, `valid`, `val` or `dev` is dev, and `sample` stands for dev where there is no other. `glue.yaml` holds the table:
columns, label words, split, metrics. Labels are GLUE's own numbers (MNLI 0 entailment, 1 neutral, 2 contradiction; RTE and
QNLI 0 entailment); the hub's test rows have none (-1) and are refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from kd.common.errors import DataError, unknown_name
from kd.data.rows.example import Example, text_digest
from kd.data.rows.hub import load_hub
from kd.data.rows.tables import TABLE_READERS, read_table
from kd.data.tasks.task_rows import SAME

GLUE_ID = "nyu-mll/glue"
GLUE_SPLITS = ("train", "dev")
CLASSES = "classes"
"""Kind of a corpus whose examples are texts to classify: the target is the label's word, and one row its number."""
PAIR = "\x1f"
"""ASCII's unit separator, between the two texts of a pair in such an example's prompt."""


@dataclass(frozen=True)
class GlueTask:
    """One line of the table."""

    name: str
    texts: tuple[str, ...]
    """Columns: one, or the two of a pair."""
    labels: tuple[str, ...]
    """A word for each label number."""
    dev: str
    """Name of the scored split on the hub."""
    metrics: tuple[str, ...]
    """What GLUE reports besides accuracy: `mcc`, `f1`."""


@dataclass(frozen=True)
class LabelledRow:
    """A text or a pair, and what it is."""

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
    """Hub id and commit, or `local` and the files' names."""

    @property
    def examples(self) -> tuple[Example, ...]:
        """The rows as examples of rank classification: the texts on lines of their own, then the label's word."""
        words = self.task.labels
        return tuple(
            Example(row.id, words[row.label], "\n".join(row.texts), self.task.name, self.split, words, row.label)
            for row in self.rows
        )

    @property
    def labelled(self) -> tuple[Example, ...]:
        """The rows as examples of a corpus of classes, see `CLASSES`: a pair's texts are told apart by PAIR."""
        words = self.task.labels
        for row in self.rows:
            if any(PAIR in text for text in row.texts):
                raise DataError(
                    "a text holds the character that separates pairs",
                    where=f"glue/{self.task.name} {row.id}",
                    found="U+001F",
                    try_="rows without it",
                )
        return tuple(
            Example(row.id, words[row.label], PAIR.join(row.texts), self.task.name, self.split, words, row.label)
            for row in self.rows
        )

    @property
    def digest(self) -> str:
        """Digest of ids, texts and labels in their order."""
        return text_digest(self.examples)


@lru_cache(maxsize=1)
def glue_tasks() -> Mapping[str, GlueTask]:
    """The table by name."""
    import yaml

    table = yaml.safe_load(Path(__file__).with_name("glue.yaml").read_text(encoding="utf-8"))
    return {
        name: GlueTask(name, tuple(entry["texts"]), tuple(entry["labels"]), entry["dev"], tuple(entry["metrics"]))
        for name, entry in table.items()
    }


def glue_task(name: str) -> GlueTask:
    """A task by name; raises DataError listing all."""
    if name not in glue_tasks():
        raise unknown_name("GLUE task", name, glue_tasks())
    return glue_tasks()[name]


def is_glue(spec: str) -> bool:
    """Does a data spec end in glue/TASK?"""
    path = Path(spec)
    return path.parent.name == "glue" and path.name in glue_tasks()


def load_glue(
    spec: str | None = None,
    *,
    task: str | None = None,
    split: str = "train",
    limit: int | None = None,
    task_root: Path | None = None,
) -> LabelledRows:
    """Rows of one split (`train`, or `dev`, also called validation); `limit` keeps the first.

    One of `spec` and `task` may be left out: a task alone is the hub's, or `task_root`'s folder of that name; a spec's
    last part names its task. Raises DataError for an unknown task or split, missing files or columns, and rows without a label.
    """
    known = glue_task(task or (Path(spec).name if spec else ""))
    name = "dev" if split in (*SAME, known.dev) else split
    if name not in GLUE_SPLITS:
        raise unknown_name("split", split, GLUE_SPLITS, where=f"glue/{known.name}", note="the test rows have no labels")
    folder = (
        task_root.expanduser() / known.name
        if task_root is not None
        else Path(spec or f"glue/{known.name}").expanduser()
    )
    if folder.exists() or task_root is not None:
        rows, source = _local(folder, known, name)
    elif spec is None or spec == f"glue/{known.name}":
        found = load_hub(GLUE_ID, known.name, None, known.dev if name == "dev" else "train")
        where = f"{GLUE_ID}:{known.name} {name}"
        rows = _labelled(known, found.data.column_names, found.data, where, name)
        source = {"source": GLUE_ID, "config": known.name, "revision": found.revision}
    else:
        raise DataError(
            "no such file or folder",
            where=spec,
            expected=f"glue/{known.name}, or a folder of its rows",
            try_="--task-root DIR with DIR/TASK/train.jsonl",
        )
    if not rows:
        raise DataError("no rows found", where=folder, expected=f"rows of {known.name}, split {name}")
    return LabelledRows(known, name, rows if limit is None else rows[:limit], source)


def _local(path: Path, task: GlueTask, split: str) -> tuple[tuple[LabelledRow, ...], dict[str, str]]:
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
        names, found = read_table(file)
        rows += _labelled(task, names, found, str(file), split, prefix="" if len(files) == 1 else f"{file.stem}/")
    return tuple(rows), {"source": "local", "files": ", ".join(f.name for f in files)}


def _files_of(folder: Path, split: str) -> list[Path]:
    """The files whose name says the split, in order of name."""
    there = sorted(p for p in folder.iterdir() if p.suffix in TABLE_READERS and p.is_file())
    for names in ({split, *(SAME if split == "dev" else ())}, {"sample"} if split == "dev" else set()):
        found = [f for f in there if names & set(re.findall(r"[a-z]+", f.stem.lower()))]
        if found:
            return found
    raise DataError(
        "no file of the split",
        where=folder,
        found=", ".join(f.name for f in there) or "no table files",
        expected=f"{split}.jsonl (or .csv, .tsv, .parquet)",
    )


def _labelled(
    task: GlueTask, names: Sequence[str], rows: Iterable[Mapping[str, Any]], where: str, split: str, prefix: str = ""
) -> tuple[LabelledRow, ...]:
    missing = [c for c in (*task.texts, "label") if c not in names]
    if missing:
        raise DataError(
            "columns are missing",
            where=where,
            found=", ".join(names) or "none",
            expected=", ".join((*task.texts, "label")),
        )
    found = []
    for number, row in enumerate(rows):
        texts = tuple(row[c] for c in task.texts)
        if not all(isinstance(t, str) for t in texts):
            raise DataError("a value is not text", where=f"{where} row {number}", expected=", ".join(task.texts))
        label = str(row["label"]).strip()  # CSV holds text
        if not (label.isdigit() and int(label) < len(task.labels)):
            raise DataError(
                "a label is out of bounds",
                where=f"{where} row {number}",
                found=row["label"],
                expected=f"0 to {len(task.labels) - 1}: {', '.join(task.labels)}",
            )
        found.append(LabelledRow(f"{split}/{prefix}{number}", texts, int(label)))
    return tuple(found)
