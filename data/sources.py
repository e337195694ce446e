"""Where text comes from: a `--data` spec becomes an ordered list of `Example`.

    demo[:heldout]                        the English of Python's standard library; no network
    mini[:heldout]                        seven small instruction tasks made up by rules; no network
    mini-open[:heldout]                   questions with several right answers, made up by rules; no network
    mini-chat[:heldout]                   small conversations with a system text and a call of a tool, made up by rules; no network
    wikitext-2[:validation|test]          WikiText-2 from the hub, at a pinned revision
    FILE or FOLDER                        .txt .tokens .jsonl .json .csv .tsv .parquet, also .gz and .zst; --columns for other names
    FOLDER                                also one that `Dataset.save_to_disk` has written
    'FOLDER/*.jsonl', FILE,FILE           a glob, or several files, folders and globs (kd.data.rows.file_list)
    s3://BUCKET/PATH                      the same in an S3 store: an object, all below the address, a glob, several between commas
    hub-id[:config][@revision]            any data set on the hub that loads without code
    flan[:MIXTURE]                        instruction tasks: flan:four, flan:ten, flan:TASK, flan:all-but=CLUSTER
    mini-flan[:MIXTURE]                   thirty small tasks in clusters of FLAN, made up by rules; no network
    glue/TASK                             a GLUE task, the label's word as target (kd.data.instruction_tasks.glue); also a folder
    FILE.yaml                             your own instruction task (kd.data.instruction_tasks.task_files)

A *documents* source gives whole texts, which are later cut into blocks. A *pairs* source (columns prompt and target) gives
examples that stay whole; a *conversations* source gives messages (`kd.data.rows.row_reading`). Hub data sets load through
`datasets`; scripts are never run.
To add a source, write one function and add a line to `kd.data.named_sources.SOURCES`; to add a task, write a YAML file
(docs/extending.md).
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Collection, Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import ParamSpec

from kd.common.errors import DataError, unknown_name
from kd.common.paths import as_path
from kd.data.corpus import Corpus, usable_corpus
from kd.data.data_settings import InstructionConfig, RowSettings
from kd.data.instruction_tasks.glue import CLASSES, glue_tasks, is_glue, load_glue, refuse_other_tasks
from kd.data.instruction_tasks.mixing.rendered_mixture import USED, columns_read, rendered_mixture
from kd.data.instruction_tasks.task_rows import SAME
from kd.data.left_out import LeftOut
from kd.data.named_sources import SOURCES, TASK_SOURCES, own_task
from kd.data.rows.compressed import COMPRESSIONS
from kd.data.rows.file_list import FileList, list_files, no_such_path, refuse_address, refuse_split
from kd.data.rows.hub import is_saved, load_hub, load_saved, stream_hub
from kd.data.rows.local_files import FILE_READERS, LocalTexts
from kd.data.rows.row_examples import DatasetTexts
from kd.data.rows.row_reading import AUTO, ID, Columns, RowReading
from kd.data.rows.row_streams import StreamedRow, numbered_rows, stream_rows
from kd.data.rows.tables import TABLE_READERS
from kd.data.text_stream import Text, TextStream, in_memory

P = ParamSpec("P")

TASK_SUFFIXES = (".yaml", ".yml")
"""Suffixes of task files."""


def stream_text(
    spec: str,
    *,
    split: str | None = None,
    columns: Columns | None = None,
    form: str = AUTO,
    bad_rows: str = "error",
    prompts: bool = False,
    choices: bool = False,
    limit: int | None = None,
    instructions: InstructionConfig | None = None,
    rows: RowSettings | None = None,
    streaming: bool = False,
) -> Text:
    """The text that `spec` names (see the module's head): a stream, or in memory where it is shuffled whole. Raises DataError.

    split          None is the one in the spec, else `train`
    columns        columns of a table that are not called as their field is
    form           what the rows of a table are, one of `row_reading.FORMATS`; `auto` is seen by the columns
    bad_rows       `skip` leaves out and counts rows that cannot be read; `error` raises the first of them
    prompts        whether a teacher is going to answer, so that conversations need no turn of the assistant
    choices        whether the columns `choices` and `answer` are read, for an evaluation
    limit          number of examples to keep, from the first; drawn where they are in the order of their labels
    instructions   how tasks become text; for other sources only the defaults are accepted, and what limits a task where a
                   column names it
    rows           which rows of a file or hub data set are used
    streaming      whether a data set of the hub is read over the network, and not stored on this disk first
    """
    instructions, rows = instructions or InstructionConfig(), rows or RowSettings()
    if rows != RowSettings() or "task" in (columns or {}):
        useless = RowReading({}, form, bad_rows == "skip")
        return usable_corpus(_rendered(spec, split or "train", columns or {}, useless, instructions, rows), limit)
    reading = RowReading(columns or {}, form, bad_rows == "skip", prompts, choices)
    _refuse_useless(spec, reading, instructions)
    text = replace(_text_of(spec, split, reading, instructions, streaming), skip_bad=reading.skip)
    return replace(text, limit=limit) if isinstance(text, TextStream) else usable_corpus(text, limit)


def _held_in_memory(stream: Callable[P, Text]) -> Callable[P, Corpus]:
    """`stream`, whose text is read whole."""

    def load(*args: P.args, **options: P.kwargs) -> Corpus:
        return in_memory(stream(*args, **options))

    return load


load_corpus = _held_in_memory(stream_text)
"""Load the text that a spec names into memory. Raises DataError. The parameters are those of `stream_text`."""


def load_classes(
    spec: str,
    *,
    split: str | None = None,
    columns: Columns | None = None,
    form: str = AUTO,
    bad_rows: str = "error",
    limit: int | None = None,
    instructions: InstructionConfig | None = None,
    rows: RowSettings | None = None,
) -> Corpus:
    """A GLUE task as texts to classify: from the hub, a folder, or the settings' `task_root`. Raises DataError."""
    instructions = instructions or InstructionConfig()
    refuse_address(spec)
    unused = [name for name in _changed(instructions) if name != "task_root"]
    unused += _of_rows(RowReading(columns or {}, form, bad_rows == "skip"))
    if rows not in (None, RowSettings()):
        unused.append("rows of a file")
    if unused:
        raise DataError(
            "a classification data set takes no templates and no --columns",
            where=spec,
            found=", ".join(unused) + " given",
        )
    refuse_other_tasks(spec)
    if not is_glue(spec):
        raise DataError(
            "a classifier needs labelled rows",
            where=spec,
            expected="glue/TASK: " + ", ".join(glue_tasks()),
            try_="--data glue/sst2, with --task-root DIR for local rows",
        )
    labelled = load_glue(spec, split=split or "train", task_root=instructions.task_root)
    return usable_corpus(Corpus(spec, labelled.split, CLASSES, labelled.labelled, dict(labelled.source)), limit)


def takes_instructions(spec: str) -> bool:
    """Whether the source renders templates, so that an `InstructionConfig` changes its examples."""
    path = as_path(spec)
    return spec.partition(":")[0] in TASK_SOURCES or (path.suffix.lower() in TASK_SUFFIXES and os.path.exists(path))


def _of_rows(reading: RowReading) -> list[str]:
    """Names of the settings of rows that were given."""
    given = {"columns": bool(reading.columns), "format": reading.chosen, "bad-rows": reading.skip}
    return [name for name, used in given.items() if used]


def _refuse_useless(spec: str, reading: RowReading, instructions: InstructionConfig) -> None:
    """Raise DataError for settings that would have no effect on this source."""
    is_task, of_rows = takes_instructions(spec), _of_rows(reading)
    if is_task and of_rows:
        raise DataError(
            f"instruction tasks take no --{of_rows[0]}, because a task file names its columns",
            where=spec,
            found=f"--{of_rows[0]}",
            try_="a task file of your own: docs/extending.md",
        )
    if spec.partition(":")[0] in SOURCES and reading.chosen:
        raise DataError("the source has no rows of several formats", where=spec, found=f"--format {reading.form}")
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


def _text_of(
    spec: str, split: str | None, reading: RowReading, instructions: InstructionConfig, streaming: bool
) -> Text:
    """The text as its source gives it: with examples that have no text, and ids unchecked."""
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
    if is_saved(path):
        saved = DatasetTexts(spec, load_saved(path, split), path.name, split or "train", reading)
        return _stream(spec, saved, split or "train", {"source": "local"}, reading)
    left_out = LeftOut()
    files = list_files(spec, FILE_READERS, left_out)
    if files is not None:
        return _local(files, split or "train", reading, left_out)
    refuse_other_tasks(spec)
    if _is_hub_id(spec):
        return _hub(spec, split or "train", reading, streaming)
    names = (*SOURCES, *TASK_SOURCES)
    if "/" in spec or path.suffix:
        raise no_such_path(spec, f"a path, {', '.join(names)}, or a hub id")
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


def _hub(spec: str, split: str, reading: RowReading, streaming: bool) -> TextStream:
    name, _, revision = spec.partition("@")
    name, _, config = name.partition(":")
    rows = load_hub(name, config or None, revision or None, split, streaming=streaming)
    source = {"source": name, "config": config or "default", "revision": rows.revision}
    text = _stream(spec, DatasetTexts(spec, rows.data, name, split, reading), split, source, reading)
    return replace(text, endless=streaming)


def _stream(
    spec: str, texts: LocalTexts | DatasetTexts, split: str, source: dict[str, str], reading: RowReading
) -> TextStream:
    return TextStream(spec, split, texts.kind(), source, texts, ids_given=ID in reading.columns)


def _rendered(
    spec: str,
    split: str,
    columns: Columns,
    reading: RowReading,
    instructions: InstructionConfig,
    rows: RowSettings,
) -> Corpus:
    """Rows of a file or hub data set whose prompts are written already; read one after the other."""
    refuse_address(spec)
    if useless := _of_rows(reading):
        raise DataError("rows of tasks are pairs, and each is read", where=spec, found=", ".join(useless) + " given")
    if takes_instructions(spec) or spec.partition(":")[0] in SOURCES or (is_glue(spec) and not os.path.isfile(spec)):
        raise DataError(
            "this source has no column of tasks and no rows to choose",
            where=spec,
            found="--columns task=, --only, --held-out or --task-map",
            expected="a file, a folder or a hub data set",
            try_="flan:all-but=CLUSTER" if takes_instructions(spec) else None,
        )
    unused = [name for name in _changed(instructions) if name not in USED]
    if "task" not in columns:
        unused = [*_changed(instructions), *(["held_out"] if rows.held_out else [])]
    if unused:
        raise DataError(
            "the rows have no templates" if "task" in columns else "no column names the tasks of the rows",
            where=spec,
            found=", ".join(unused) + " given",
            expected=", ".join(USED) if "task" in columns else "--columns …,task=COLUMN",
        )
    left_out = LeftOut()
    streams, source = _streams(spec, split, columns_read(columns, rows), left_out)
    mixed = rendered_mixture(streams, columns, rows, instructions, split, left_out)
    return Corpus(spec, split, "pairs", mixed.examples, source | mixed.source, left_out=mixed.left_out)


def _streams(
    spec: str, split: str, columns: Collection[str], left_out: LeftOut
) -> tuple[dict[str, Iterator[StreamedRow]], dict[str, str]]:
    """Beginning of the ids -> rows, and what identifies the source."""
    files = list_files(spec, TABLE_READERS, left_out)
    if files is not None:
        refuse_split(files, split, SAME if split in SAME else (split,))
        return {files.name(file): stream_rows(file, columns) for file in files.files}, {"source": "local"}
    if not _is_hub_id(spec):
        raise no_such_path(spec, "a path, or a hub id")
    name, _, revision = spec.partition("@")
    name, _, config = name.partition(":")
    streams, commit = stream_hub(name, config or None, revision or None, split)
    return {name: numbered_rows(streams, spec)}, {"source": name, "config": config or "default", "revision": commit}


def _local(files: FileList, split: str, reading: RowReading, left_out: LeftOut) -> TextStream:
    refuse_split(files, split, SAME if split in SAME else (split,))
    return _stream(files.spec, LocalTexts(files, reading, split, left_out), split, {"source": "local"}, reading)
