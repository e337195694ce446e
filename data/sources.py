"""Where text comes from: a `--data` spec becomes an ordered list of `Example`.

    demo[:heldout]                        the standard library's own English; no network
    mini[:heldout]                        seven small instruction tasks made up by rule; no network
    wikitext-2[:validation|test]          hub id Salesforce/wikitext, wikitext-2-raw-v1, pinned revision
    FILE or FOLDER                        .txt .tokens .jsonl .csv .tsv .parquet, with --columns where names differ
    hub-id[:config][@revision]            any data set on the hub that loads without code
    flan[:MIXTURE]                        instruction tasks: flan:four, flan:ten, flan:TASK, flan:all-but=CLUSTER
    glue/TASK                             GLUE's rows with their label's word as target (kd.data.tasks.glue); a folder too
    FILE.yaml                             a task of your own (kd.data.tasks.task_files)

A *document* source yields whole texts that are later cut into blocks; a *pairs* source (columns prompt and
target) yields examples that stay whole. Hub data sets load through `datasets`; scripts are never trusted.
Add a source: one function and one line in `SOURCES`; a task: one YAML file (docs/extending.md).
"""

from __future__ import annotations

import dataclasses
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from kd.common.errors import DataError, unknown_name
from kd.data.data_settings import InstructionConfig
from kd.data.demo import mini_mixture, stdlib_text
from kd.data.rows.example import Example, text_digest
from kd.data.rows.hub import load_hub
from kd.data.rows.tables import ENCODING, TABLE_READERS, read_table, unreadable
from kd.data.tasks.glue import CLASSES, glue_tasks, is_glue, load_glue
from kd.data.tasks.mixtures import load_mixture, mix, select
from kd.data.tasks.task import SPLITS, TaskFile
from kd.data.tasks.task_files import load_task
from kd.data.tasks.task_rows import SAME

WIKITEXT_ID = "Salesforce/wikitext"
WIKITEXT_CONFIG = "wikitext-2-raw-v1"
WIKITEXT_REVISION = "b08601e04326c79dfdd32d625aee71d232d685c3"

Columns = Mapping[str, str]
"""Our field (`text`, `prompt`, `target`, `id`) -> the column that holds it."""


@dataclass(frozen=True)
class Corpus:
    """An ordered list of examples and where it came from."""

    spec: str
    """As the user wrote it."""
    split: str
    kind: str
    """`documents` (cut into blocks), `pairs` (prompt and target, kept whole), or `classes` (see `glue.CLASSES`)."""
    examples: tuple[Example, ...]
    source: dict[str, str]
    """What identifies the source besides its text, e.g. hub id, config, revision."""
    metrics: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    """Task -> metrics that its file names; empty where there are no task files."""
    without_text: int = 0
    """Rows of the source that were left out: empty, or white space alone."""

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
    """Load `spec` (see the module's head); `limit` keeps the first examples. Raises DataError on anything unusable.

    instructions   how tasks become text (flan and .yaml); other sources refuse settings that are not the defaults
    """
    name, _, suffix = spec.partition(":")
    path = Path(spec).expanduser()
    instructions = instructions or InstructionConfig()
    is_task = takes_instructions(spec)
    if is_task and columns:
        raise DataError(
            "tasks name their columns themselves",
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
    if name in TASK_SOURCES:
        corpus = TASK_SOURCES[name](spec, split or "train", instructions)
    elif is_task:
        corpus = _task_file(spec, split or "train", instructions)
    elif name in SOURCES:
        corpus = SOURCES[name](spec, split or suffix or "train")
    elif is_glue(spec) and not path.is_file():
        corpus = _glue(spec, split or "train")
    elif path.exists():
        corpus = _local(spec, path, split or "train", columns or {})
    elif _is_hub_id(spec):
        corpus = _hub(spec, split or "train", columns or {})
    elif "/" in spec or path.suffix:
        raise DataError(
            "no such file or folder",
            where=spec,
            expected=f"a path, {', '.join((*SOURCES, *TASK_SOURCES))}, or a hub id",
        )
    else:
        raise unknown_name(
            "data source", spec, (*SOURCES, *TASK_SOURCES), try_="a local file or folder, or a hub id like owner/name"
        )
    examples = tuple(e for e in corpus.examples if e.target.strip())
    without_text = len(corpus.examples) - len(examples)
    if limit is not None:
        examples = examples[:limit]
    if not examples:
        raise DataError(
            "no text found",
            where=f"{spec} (split {corpus.split})",
            found="0 non-empty examples",
            try_="kd data show SPEC",
        )
    _check_ids(spec, examples)
    return replace(corpus, examples=examples, without_text=without_text)


def load_classes(
    spec: str,
    *,
    split: str | None = None,
    columns: Columns | None = None,
    limit: int | None = None,
    instructions: InstructionConfig | None = None,
) -> Corpus:
    """`glue/TASK`, of the hub, of a folder, or of the settings' `task_root`, as texts to classify. Raises DataError."""
    settings = instructions or InstructionConfig()
    given = [name for name in _changed(settings) if name != "task_root"]
    if given or columns:
        raise DataError(
            "labelled rows have no templates, and GLUE's own columns",
            where=spec,
            found=", ".join([*given, *(["columns"] if columns else [])]) + " given",
        )
    if not is_glue(spec):
        raise DataError(
            "a classifier needs labelled rows",
            where=spec,
            expected="glue/TASK: " + ", ".join(glue_tasks()),
            try_="--data glue/sst2, with --task-root DIR for local rows",
        )
    rows = load_glue(spec, split=split or "train", limit=limit, task_root=settings.task_root)
    examples = rows.labelled
    _check_ids(spec, examples)
    return Corpus(spec, rows.split, CLASSES, examples, dict(rows.source))


def takes_instructions(spec: str) -> bool:
    """Are its examples made by templates, so that an `InstructionConfig` says how?"""
    path = Path(spec).expanduser()
    return spec.partition(":")[0] in TASK_SOURCES or (path.suffix in TASK_SUFFIXES and path.exists())


def _is_hub_id(spec: str) -> bool:
    """`owner/name[:config][@revision]`; dots are common in hub names, so only suffixes of data files rule it out."""
    name = re.split("[:@]", spec)[0]
    files = {*FILE_READERS, *TASK_SUFFIXES, ".json", ".gz", ".zip", ".zst", ".arrow", ".md"}
    return (
        re.fullmatch(r"[\w.-]+/[\w.-]+(:[\w.-]+)?(@[\w./-]+)?", spec) is not None
        and not spec.startswith(".")
        and Path(name).suffix not in files
    )


def _check_ids(spec: str, examples: tuple[Example, ...]) -> None:
    seen: set[str] = set()
    for example in examples:
        for text in (example.prompt, example.target):
            try:
                text.encode("utf-8")
            except UnicodeEncodeError as error:  # JSON may spell half a surrogate pair; no tokenizer takes it
                raise DataError(
                    "a text is not valid Unicode",
                    where=f"{spec} example {example.id}",
                    found=str(error),
                    expected="text without lone surrogates",
                ) from error
        if example.id in seen:
            raise DataError(
                "two examples have the same id",
                where=spec,
                found=example.id,
                try_="another column for --columns id=…, or none",
            )
        seen.add(example.id)


@lru_cache(maxsize=4)
def _demo(spec: str, split: str) -> Corpus:
    split = {"test": "heldout", "validation": "heldout", "dev": "heldout"}.get(split, split)
    if split not in ("train", "heldout", "all"):
        raise unknown_name("split", split, ("train", "heldout", "all"), where="the demo source")
    examples = tuple(Example(name, text, task="demo", split=split) for name, text in stdlib_text.documents(split))
    python = ".".join(map(str, sys.version_info[:2]))
    return Corpus(spec, split, "documents", examples, {"source": "demo", "python": python})


@lru_cache(maxsize=4)
def _mini(spec: str, split: str) -> Corpus:
    split = {"test": "heldout", "validation": "heldout", "dev": "heldout"}.get(split, split)
    return Corpus(spec, split, "pairs", tuple(mini_mixture.examples(split)), {"source": "mini"})


def _wikitext(spec: str, split: str) -> Corpus:
    lines = load_hub(WIKITEXT_ID, WIKITEXT_CONFIG, WIKITEXT_REVISION, split).data["text"]
    source = {"source": WIKITEXT_ID, "config": WIKITEXT_CONFIG, "revision": WIKITEXT_REVISION}
    return Corpus(spec, split, "documents", tuple(wikitext_articles(lines, "wikitext-2", split)), source)


def wikitext_articles(lines: Iterator[str] | list[str], task: str, split: str) -> Iterator[Example]:
    """Join WikiText's lines into articles: a line ` = Title = ` after an empty line opens a new one."""
    article: list[str] = []
    count, previous_empty = 0, True
    for line in lines:
        line = line.removesuffix("\n")
        opens = previous_empty and re.fullmatch(r"\s*= [^=](.*[^=])? =\s*", line) is not None
        if opens and any(kept.strip() for kept in article):
            yield Example(f"{split}/{count}", "\n".join(article).strip() + "\n", task=task, split=split)
            article, count = [], count + 1
        article.append(line)
        previous_empty = not line.strip()
    if article:
        yield Example(f"{split}/{count}", "\n".join(article).strip() + "\n", task=task, split=split)


def _changed(instructions: InstructionConfig) -> list[str]:
    """Names of the settings that differ from the defaults."""
    return [f.name for f in fields(instructions) if getattr(instructions, f.name) != f.default]


def _flan(spec: str, split: str, instructions: InstructionConfig) -> Corpus:
    mixture = spec.partition(":")[2] or "ten"
    selection = select(mixture)
    examples, source = load_mixture(selection, _task_split(split), instructions, load_hub)
    return Corpus(spec, _task_split(split), "pairs", examples, source, _metrics(map(load_task, selection.tasks)))


def _task_file(spec: str, split: str, instructions: InstructionConfig) -> Corpus:
    task = load_task(spec)
    examples, source = mix([task], _task_split(split), instructions, load_hub)
    return Corpus(spec, _task_split(split), "pairs", examples, source, _metrics([task]))


def _metrics(tasks: Iterable[TaskFile]) -> dict[str, tuple[str, ...]]:
    return {task.name: task.metrics for task in tasks}


def _task_split(split: str) -> str:
    """Tasks have train, dev and test; other names for dev are understood."""
    split = "dev" if split in SAME else split
    if split not in SPLITS:
        raise unknown_name("split", split, SPLITS, where="tasks")
    return split


def _glue(spec: str, split: str) -> Corpus:
    found = load_glue(spec, split=split)
    return Corpus(spec, found.split, "pairs", found.examples, dict(found.source))


def _hub(spec: str, split: str, columns: Columns) -> Corpus:
    name, _, revision = spec.partition("@")
    name, _, config = name.partition(":")
    found = load_hub(name, config or None, revision or None, split)
    kind, examples = _rows_to_examples(spec, list(found.data.column_names), found.data, columns, name, split)
    source = {"source": name, "config": config or "default", "revision": found.revision}
    return Corpus(spec, split, kind, tuple(examples), source)


def _local(spec: str, path: Path, split: str, columns: Columns) -> Corpus:
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.suffix in FILE_READERS and p.is_file())
        if not files:
            raise DataError("no readable files in the folder", where=str(path), expected=", ".join(FILE_READERS))
    else:
        files = [path]
    kinds, examples = set(), []
    for file in files:
        if file.suffix not in FILE_READERS:
            raise unknown_name("file type", file.suffix or file.name, FILE_READERS, where=str(file))
        prefix = file.relative_to(path).as_posix() if path.is_dir() else file.name
        try:
            kind, found = FILE_READERS[file.suffix](file, prefix, columns, split)
            examples += found
        except DataError:
            raise
        except (OSError, ValueError) as error:  # bad UTF-8
            raise unreadable(file, error) from error
        kinds.add(kind)
    if len(kinds) > 1:
        raise DataError(
            "the folder mixes plain text and prompt/target files",
            where=str(path),
            try_="one folder for each, or --columns",
        )
    return Corpus(spec, split, kinds.pop(), tuple(examples), {"source": "local"})


def _read_txt(file: Path, prefix: str, columns: Columns, split: str) -> tuple[str, list[Example]]:
    """One document per file, or several separated by lines that hold only `<|endoftext|>`."""
    documents = re.split(r"(?m)^[ \t]*<\|endoftext\|>[ \t]*$\n?|<\|endoftext\|>", file.read_text(ENCODING))
    texts = [d.strip("\n") for d in documents if d.strip()]
    ids = [prefix] if len(texts) == 1 else [f"{prefix}:{i}" for i in range(len(texts))]
    return "documents", [Example(i, t, split=split) for i, t in zip(ids, texts, strict=True)]


def _read_tokens(file: Path, prefix: str, columns: Columns, split: str) -> tuple[str, list[Example]]:
    with file.open(encoding=ENCODING) as lines:
        articles = list(wikitext_articles(lines, "wikitext", split))
    return "documents", [Example(f"{prefix}:{i}", a.target, task=a.task, split=split) for i, a in enumerate(articles)]


def _read_table(file: Path, prefix: str, columns: Columns, split: str) -> tuple[str, list[Example]]:
    names, rows = read_table(file)
    kind, examples = _rows_to_examples(str(file), names, rows, columns, prefix, split)
    return kind, list(examples)


def _rows_to_examples(
    where: str, names: list[str], rows: Any, columns: Columns, prefix: str, split: str
) -> tuple[str, Iterator[Example]]:
    """Map columns to fields: `text` alone makes documents, `prompt` + `target` make pairs."""
    allowed = ("text", "prompt", "target", "id")
    for field in columns:
        if field not in allowed:
            raise unknown_name("field in --columns", field, allowed)
    chosen = {field: columns.get(field, field) for field in allowed}
    missing = [c for f, c in chosen.items() if f in columns and c not in names]
    pairs = chosen["prompt"] in names and chosen["target"] in names and "text" not in columns
    if missing or not (pairs or chosen["text"] in names):
        raise DataError(
            "columns are missing",
            where=where,
            found=", ".join(names) or "none",
            expected=", ".join(missing) or "text, or prompt and target",
            try_="--columns text=NAME or --columns prompt=NAME,target=NAME",
        )
    present = {"prompt": chosen["prompt"], "target": chosen["target"]} if pairs else {"target": chosen["text"]}
    id_column = columns.get("id")

    def examples() -> Iterator[Example]:
        for number, row in enumerate(rows):
            values: dict[str, Any] = {
                field: row[column] if row.get(column) is not None else "" for field, column in present.items()
            }
            for field, value in values.items():
                if not isinstance(value, str):
                    raise DataError(
                        "a value is not text",
                        where=f"{where} row {number} column {present[field]}",
                        found=type(value).__name__,
                        expected="a string",
                    )
            identity = row.get(id_column) if id_column else f"{prefix}:{number}"
            if identity is None:
                raise DataError("an id is missing", where=f"{where} row {number} column {id_column}")
            task = prefix.rpartition("/")[2].partition(".")[0]
            yield Example(str(identity), values["target"], values.get("prompt", ""), task=task, split=split)

    return ("pairs" if pairs else "documents"), examples()


FileReader = Callable[[Path, str, Columns, str], tuple[str, list[Example]]]

FILE_READERS: dict[str, FileReader] = {
    ".txt": _read_txt,
    ".tokens": _read_tokens,
    **dict.fromkeys(TABLE_READERS, _read_table),
}

SOURCES: dict[str, Callable[[str, str], Corpus]] = {
    "demo": _demo,
    "mini": _mini,
    "wikitext-2": _wikitext,
}

TASK_SOURCES: dict[str, Callable[[str, str, InstructionConfig], Corpus]] = {
    "flan": _flan,
}
"""Sources that render templates."""

TASK_SUFFIXES = (".yaml", ".yml")
