"""Examples from a local file or folder: `.txt`, `.tokens`, and the tables of `kd.data.rows.tables`.

A `.txt` file is one document, or several separated by `<|endoftext|>`; a `.tokens` file holds WikiText's articles. The files
of a folder are read in the order of their paths.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from kd.common.errors import DataError, unknown_name
from kd.data.rows.example import Example
from kd.data.rows.row_examples import Columns, rows_to_examples
from kd.data.rows.tables import ENCODING, TABLE_READERS, read_table, unreadable
from kd.data.rows.wikitext import wikitext_articles

FileExamples = tuple[str, list[Example]]
"""Kind of the examples (`documents` or `pairs`), and the examples in the file's order."""
FileReader = Callable[[Path, str, Columns, str], FileExamples]
"""(file, prefix of ids, columns, split) -> its examples."""


def read_local(path: Path, columns: Columns, split: str) -> FileExamples:
    """The examples of a file, or of all files of a folder. Raises DataError."""
    files = [path] if not path.is_dir() else _files_in(path)
    kinds: set[str] = set()
    examples: list[Example] = []
    for file in files:
        prefix = file.relative_to(path).as_posix() if path.is_dir() else file.name
        kind, of_file = read_examples(file, prefix, columns, split)
        kinds.add(kind)
        examples += of_file
    if len(kinds) > 1:
        raise DataError(
            "the folder mixes plain text and prompt/target files",
            where=str(path),
            try_="one folder for each, or --columns",
        )
    return kinds.pop(), examples


def read_examples(file: Path, prefix: str, columns: Columns, split: str) -> FileExamples:
    """The examples of one file. Raises DataError for an unknown suffix or unreadable content."""
    if file.suffix not in FILE_READERS:
        raise unknown_name("file type", file.suffix or file.name, FILE_READERS, where=str(file))
    try:
        return FILE_READERS[file.suffix](file, prefix, columns, split)
    except DataError:
        raise
    except (OSError, ValueError) as error:  # bad UTF-8 is a ValueError
        raise unreadable(file, error) from error


def _files_in(folder: Path) -> list[Path]:
    files = sorted(p for p in folder.rglob("*") if p.suffix in FILE_READERS and p.is_file())
    if not files:
        raise DataError("no readable files in the folder", where=str(folder), expected=", ".join(FILE_READERS))
    return files


def _read_text(file: Path, prefix: str, columns: Columns, split: str) -> FileExamples:
    documents = re.split(r"(?m)^[ \t]*<\|endoftext\|>[ \t]*$\n?|<\|endoftext\|>", file.read_text(ENCODING))
    texts = [d.strip("\n") for d in documents if d.strip()]
    ids = [prefix] if len(texts) == 1 else [f"{prefix}:{i}" for i in range(len(texts))]
    return "documents", [Example(i, t, split=split) for i, t in zip(ids, texts, strict=True)]


def _read_tokens(file: Path, prefix: str, columns: Columns, split: str) -> FileExamples:
    with file.open(encoding=ENCODING) as lines:
        articles = list(wikitext_articles(lines, "wikitext", split))
    return "documents", [Example(f"{prefix}:{i}", a.target, task=a.task, split=split) for i, a in enumerate(articles)]


def _read_rows(file: Path, prefix: str, columns: Columns, split: str) -> FileExamples:
    names, rows = read_table(file)
    kind, examples = rows_to_examples(rows, names, columns, where=str(file), prefix=prefix, split=split)
    return kind, list(examples)


FILE_READERS: dict[str, FileReader] = {
    ".txt": _read_text,
    ".tokens": _read_tokens,
    **dict.fromkeys(TABLE_READERS, _read_rows),
}
"""Suffix -> reader."""
