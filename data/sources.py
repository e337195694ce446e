"""Where text comes from: a `--data` spec becomes an ordered list of `Example`.

    demo[:heldout]                        the English of Python's standard library; no network
    mini[:heldout]                        seven small instruction tasks made up by rules; no network
    wikitext-2[:validation|test]          WikiText-2 from the hub, at a pinned revision
    FILE or FOLDER                        .txt .tokens .jsonl .json .csv .tsv .parquet, also .gz and .zst; --columns for other names
    'FOLDER/*.jsonl', FILE,FILE           a glob, or several files, folders and globs (kd.data.rows.file_list)
    hub-id[:config][@revision]            any data set on the hub that loads without code
    flan[:MIXTURE]                        instruction tasks: flan:four, flan:ten, flan:TASK, flan:all-but=CLUSTER
    glue/TASK                             a GLUE task, the label's word as target (kd.data.instruction_tasks.glue); also a folder
    FILE.yaml                             your own instruction task (kd.data.instruction_tasks.task_files)

A *documents* source gives whole texts, which are later cut into blocks. A *pairs* source (columns prompt and target) gives
examples that stay whole. Hub data sets load through `datasets`; scripts are never run.
To add a source, write one function and add a line to `kd.data.named_sources.SOURCES`; to add a task, write a YAML file
(docs/extending.md).
"""

from __future__ import annotations

import os
import re
from dataclasses import fields
from pathlib import Path

from kd.common.errors import DataError, unknown_name
from kd.common.paths import as_path
from kd.data.corpus import Corpus, usable_corpus
from kd.data.data_settings import InstructionConfig
from kd.data.instruction_tasks.glue import CLASSES, glue_tasks, is_glue, load_glue
from kd.data.instruction_tasks.task_rows import SAME
from kd.data.left_out import LeftOut
from kd.data.named_sources import SOURCES, TASK_SOURCES, own_task
from kd.data.rows.compressed import COMPRESSIONS
from kd.data.rows.file_list import FileList, list_files, refuse_address, refuse_split
from kd.data.rows.hub import load_hub
from kd.data.rows.local_files import FILE_READERS, read_local
from kd.data.rows.row_examples import Columns, rows_to_examples
from kd.data.rows.tables import rows_in

TASK_SUFFIXES = (".yaml", ".yml")
"""Suffixes of task files."""


def load_corpus(
    spec: str,
    *,
    split: str | None = None,
    columns: Columns | None = None,
    limit: int | None = None,
    instructions: InstructionConfig | None = None,
) -> Corpus:
    """Load `spec` (see the module's head). Raises DataError.

    split          None is the one in the spec, else `train`
    columns        columns of a table that are not called as their field is
    limit          number of examples to keep, from the first; drawn where they are in the order of their labels
    instructions   how tasks become text; for other sources only the defaults are accepted
    """
    instructions = instructions or InstructionConfig()
    _refuse_useless(spec, columns, instructions)
    corpus = _corpus_of(spec, split, columns or {}, instructions)
    return usable_corpus(corpus, limit)


def load_classes(
    spec: str,
    *,
    split: str | None = None,
    columns: Columns | None = None,
    limit: int | None = None,
    instructions: InstructionConfig | None = None,
) -> Corpus:
    """A GLUE task as texts to classify: from the hub, a folder, or the settings' `task_root`. Raises DataError."""
    instructions = instructions or InstructionConfig()
    refuse_address(spec)
    unused = [name for name in _changed(instructions) if name != "task_root"]
    if columns:
        unused.append("columns")
    if unused:
        raise DataError(
            "a classification data set takes no templates and no --columns",
            where=spec,
            found=", ".join(unused) + " given",
        )
    if not is_glue(spec):
        raise DataError(
            "a classifier needs labelled rows",
            where=spec,
            expected="glue/TASK: " + ", ".join(glue_tasks()),
            try_="--data glue/sst2, with --task-root DIR for local rows",
        )
    rows = load_glue(spec, split=split or "train", task_root=instructions.task_root)
    return usable_corpus(Corpus(spec, rows.split, CLASSES, rows.labelled, dict(rows.source)), limit)


def takes_instructions(spec: str) -> bool:
    """Whether the source renders templates, so that an `InstructionConfig` changes its examples."""
    path = as_path(spec)
    return spec.partition(":")[0] in TASK_SOURCES or (path.suffix.lower() in TASK_SUFFIXES and os.path.exists(path))


def _refuse_useless(spec: str, columns: Columns | None, instructions: InstructionConfig) -> None:
    """Raise DataError for settings that would have no effect on this source."""
    is_task = takes_instructions(spec)
    if is_task and columns:
        raise DataError(
            "instruction tasks take no --columns, because a task file names its columns",
            where=spec,
            found="--columns",
            try_="a task file of your own: docs/extending.md",
        )
    if not is_task and instructions != InstructionConfig():
        raise DataError(
            "the source has no templates",
            where=spec,
            found=", ".join(_changed(instructions)) + " given",
            expected="flan:… or a task's .yaml file",
        )


def _changed(instructions: InstructionConfig) -> list[str]:
    """Names of the settings that differ from the defaults."""
    return [f.name for f in fields(instructions) if getattr(instructions, f.name) != f.default]


def _corpus_of(spec: str, split: str | None, columns: Columns, instructions: InstructionConfig) -> Corpus:
    """The corpus as its source gives it: with examples that have no text, and ids unchecked."""
    refuse_address(spec)
    name, _, suffix = spec.partition(":")
    path = as_path(spec)
    if name in TASK_SOURCES:
        return TASK_SOURCES[name](spec, split or "train", instructions)
    if takes_instructions(spec):
        return own_task(spec, split or "train", instructions)
    if name in SOURCES:
        return SOURCES[name](spec, split or suffix or "train")
    if is_glue(spec) and not os.path.isfile(path):
        return _glue(spec, split or "train")
    left_out = LeftOut()
    files = list_files(spec, FILE_READERS, left_out)
    if files is not None:
        return _local(files, split or "train", columns, left_out)
    if _is_hub_id(spec):
        return _hub(spec, split or "train", columns)
    names = (*SOURCES, *TASK_SOURCES)
    if "/" in spec or path.suffix:
        raise DataError("no such file or folder", where=spec, expected=f"a path, {', '.join(names)}, or a hub id")
    raise unknown_name("data source", spec, names, try_="a local file or folder, or a hub id like owner/name")


def _is_hub_id(spec: str) -> bool:
    """Whether `spec` is `owner/name[:config][@revision]`. Dots are common in hub names: only a data file's suffix rules it out."""
    name = re.split("[:@]", spec)[0]
    files = {*FILE_READERS, *TASK_SUFFIXES, *COMPRESSIONS, ".zip", ".arrow", ".md"}
    return (
        re.fullmatch(r"[\w.-]+/[\w.-]+(:[\w.-]+)?(@[\w./-]+)?", spec) is not None
        and not spec.startswith(".")
        and Path(name).suffix.lower() not in files
    )


def _glue(spec: str, split: str) -> Corpus:
    rows = load_glue(spec, split=split)
    return Corpus(spec, rows.split, "pairs", rows.examples, dict(rows.source))


def _hub(spec: str, split: str, columns: Columns) -> Corpus:
    name, _, revision = spec.partition("@")
    name, _, config = name.partition(":")
    rows = load_hub(name, config or None, revision or None, split)
    left_out = LeftOut()
    kind, examples = rows_to_examples(
        rows.data,
        list(rows.data.column_names),
        columns,
        where=spec,
        place=rows_in(spec),
        prefix=name,
        split=split,
        left_out=left_out,
    )
    source = {"source": name, "config": config or "default", "revision": rows.revision}
    return Corpus(spec, split, kind, tuple(examples), source, left_out=left_out)


def _local(files: FileList, split: str, columns: Columns, left_out: LeftOut) -> Corpus:
    refuse_split(files, split, SAME if split in SAME else (split,))
    kind, examples = read_local(files, columns, split, left_out)
    return Corpus(files.spec, split, kind, tuple(examples), {"source": "local"}, left_out=left_out)
