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
To add a source, write one function and add a line to `SOURCES`; to add a task, write a YAML file (docs/extending.md).
"""

from __future__ import annotations

import dataclasses
import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from kd.common.errors import DataError, unknown_name
from kd.common.paths import as_path
from kd.data.data_settings import InstructionConfig
from kd.data.demo import mini_mixture, stdlib_text
from kd.data.instruction_tasks.draws import kept_rows
from kd.data.instruction_tasks.glue import CLASSES, glue_tasks, is_glue, load_glue
from kd.data.instruction_tasks.mixtures import Mixed, load_mixture, mix, select
from kd.data.instruction_tasks.task import SPLITS, TaskFile
from kd.data.instruction_tasks.task_files import load_task
from kd.data.instruction_tasks.task_rows import SAME
from kd.data.left_out import LeftOut, joined
from kd.data.rows.compressed import COMPRESSIONS
from kd.data.rows.example import Example, check_examples, text_digest
from kd.data.rows.file_list import FileList, list_files, refuse_address, refuse_split
from kd.data.rows.hub import load_hub
from kd.data.rows.local_files import FILE_READERS, read_local
from kd.data.rows.row_examples import Columns, rows_to_examples
from kd.data.rows.tables import rows_in
from kd.data.rows.wikitext import WIKITEXT_CONFIG, WIKITEXT_ID, WIKITEXT_REVISION, wikitext_articles

HELD_OUT = {"test": "heldout", "validation": "heldout", "dev": "heldout"}
"""Other names of the held-out split of `demo` and `mini`."""

HELLASWAG_SOURCES = re.compile(r"hella.?swag|wiki.?how|activity.?net", re.IGNORECASE)
"""Names of the benchmark HellaSwag, and of where its text is from."""


@dataclass(frozen=True)
class Corpus:
    """An ordered list of examples and where it came from."""

    spec: str
    """The spec as the user wrote it."""
    split: str
    kind: str
    """`documents` (cut into blocks), `pairs` (prompt and target, kept whole), `conversations` (see `chat_rows`), or
    `classes` (see `glue.CLASSES`)."""
    examples: tuple[Example, ...]
    source: dict[str, str]
    """Facts that identify the source besides its text, e.g. hub id, configuration and revision."""
    metrics: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    """Task -> metrics that its file names; empty where there are no task files."""
    left_out: LeftOut = dataclasses.field(default_factory=LeftOut)
    """What of the source did not become an example, and why."""

    @property
    def digest(self) -> str:
        """Digest of the ordered text."""
        return text_digest(self.examples)


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
    return _usable(corpus, limit)


def corpus_of_rows(
    name: str,
    rows: Iterable[Mapping[str, Any]],
    names: Sequence[str],
    *,
    columns: Columns | None = None,
    limit: int | None = None,
) -> Corpus:
    """Rows in memory as a corpus: `text` makes documents, `prompt` and `target` make pairs. Raises DataError.

    name     what errors and the ids of the examples (`name:0`, …) call the source
    names    columns of the rows
    columns  columns that are not called as their field is
    limit    number of examples to keep, from the first
    """
    left_out = LeftOut()
    kind, examples = rows_to_examples(
        rows,
        names,
        columns or {},
        where=name,
        place=rows_in(name),
        prefix=name,
        split="train",
        left_out=left_out,
    )
    source = {"source": "memory"}
    return _usable(Corpus(name, "train", kind, tuple(examples), source, left_out=left_out), limit)


def _usable(corpus: Corpus, limit: int | None) -> Corpus:
    """The corpus with `limit` of its examples that have text (see `draws`). Raises DataError where none are left."""
    examples = tuple(e for e in corpus.examples if e.target.strip())
    left_out = joined([corpus.left_out])
    for example in corpus.examples:
        if not example.target.strip():
            left_out.add("without_text", example.id)
    if limit is not None and limit < len(examples):
        kept = dict.fromkeys(kept_rows([e.answer for e in examples], [e.id for e in examples], limit))
        first = next(e.id for number, e in enumerate(examples) if number not in kept)
        left_out.add("beyond_limit", first, len(examples) - limit)
        examples = tuple(examples[number] for number in kept)
    if not examples:
        raise DataError(
            "no text found",
            where=f"{corpus.spec} (split {corpus.split})",
            found=f"0 examples; left out: {left_out}",
            try_="kd data show SPEC",
        )
    check_examples(corpus.spec, examples)
    return replace(corpus, examples=examples, left_out=left_out)


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
    return _usable(Corpus(spec, rows.split, CLASSES, rows.labelled, dict(rows.source)), limit)


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
        return _task_file(spec, split or "train", instructions)
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


@lru_cache(maxsize=4)
def _demo(spec: str, split: str) -> Corpus:
    split = HELD_OUT.get(split, split)
    if split not in ("train", "heldout", "all"):
        raise unknown_name("split", split, ("train", "heldout", "all"), where="the demo source")
    examples = tuple(Example(name, text, task="demo", split=split) for name, text in stdlib_text.documents(split))
    python = ".".join(map(str, sys.version_info[:2]))
    return Corpus(spec, split, "documents", examples, {"source": "demo", "python": python})


@lru_cache(maxsize=4)
def _mini(spec: str, split: str) -> Corpus:
    split = HELD_OUT.get(split, split)
    return Corpus(spec, split, "pairs", tuple(mini_mixture.examples(split)), {"source": "mini"})


def _wikitext(spec: str, split: str) -> Corpus:
    lines = load_hub(WIKITEXT_ID, WIKITEXT_CONFIG, WIKITEXT_REVISION, split).data["text"]
    source = {"source": WIKITEXT_ID, "config": WIKITEXT_CONFIG, "revision": WIKITEXT_REVISION}
    return Corpus(spec, split, "documents", tuple(wikitext_articles(lines, "wikitext-2", split)), source)


def _flan(spec: str, split: str, instructions: InstructionConfig) -> Corpus:
    mixture = spec.partition(":")[2] or "ten"
    selection = select(mixture)
    mixed = load_mixture(selection, _task_split(split), instructions, load_hub)
    return _of_tasks(spec, split, mixed, map(load_task, selection.tasks))


def _task_file(spec: str, split: str, instructions: InstructionConfig) -> Corpus:
    task = load_task(spec)
    return _of_tasks(spec, split, mix([task], _task_split(split), instructions, load_hub), [task])


def _of_tasks(spec: str, split: str, mixed: Mixed, tasks: Iterable[TaskFile]) -> Corpus:
    metrics = {task.name: task.metrics for task in tasks}
    return Corpus(spec, _task_split(split), "pairs", mixed.examples, mixed.source, metrics, mixed.left_out)


def _task_split(split: str) -> str:
    """`train`, `dev` or `test`; other names of dev, such as validation, become `dev`. Raises DataError."""
    split = "dev" if split in SAME else split
    if split not in SPLITS:
        raise unknown_name("split", split, SPLITS, where="tasks")
    return split


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


SOURCES: dict[str, Callable[[str, str], Corpus]] = {
    "demo": _demo,
    "mini": _mini,
    "wikitext-2": _wikitext,
}
"""Name -> source."""

TASK_SOURCES: dict[str, Callable[[str, str, InstructionConfig], Corpus]] = {
    "flan": _flan,
}
"""Name -> source that renders templates."""

TASK_SUFFIXES = (".yaml", ".yml")
"""Suffixes of task files."""
