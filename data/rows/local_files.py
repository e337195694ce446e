"""Examples from local files: `.txt`, `.tokens`, and the tables of `kd.data.rows.tables`, also compressed.

A `.txt` file is one document, or several separated by `<|endoftext|>`; a `.tokens` file holds WikiText's articles. Which files a
spec names, and in which order they are read, is in `kd.data.rows.file_list`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from kd.common.errors import DataError, unknown_name
from kd.data.left_out import LeftOut
from kd.data.rows.compressed import UNREADABLE, file_type, open_text
from kd.data.rows.example import Example
from kd.data.rows.file_list import FileList
from kd.data.rows.row_examples import rows_to_examples
from kd.data.rows.row_reading import MissingColumnsError, RowReading
from kd.data.rows.tables import TABLE_READERS, EmptyFileError, empty, read_table, unreadable
from kd.data.rows.wikitext import wikitext_articles

FileExamples = tuple[str, list[Example]]
"""Kind of the examples (`documents`, `pairs` or `conversations`), and the examples in the file's order."""
FileReader = Callable[[Path, str, RowReading, str, LeftOut], FileExamples]
"""(file, prefix of ids, how rows are read, split, record of what was left out) -> its examples."""


class NoRowsError(DataError):
    """A JSON file that is one object, which is not a row: settings, or facts about the other files."""


def read_local(files: FileList, reading: RowReading, split: str, left_out: LeftOut) -> FileExamples:
    """The examples of all files, in their order; `left_out` receives what is not read. Raises DataError."""
    kinds: dict[str, Path] = {}
    examples: list[Example] = []
    for file in files.files:
        try:
            kind, of_file = read_examples(file, files.name(file), reading, split, left_out)
        except (EmptyFileError, NoRowsError) as error:
            if file in files.asked_for:
                raise
            left_out.add("empty_files" if isinstance(error, EmptyFileError) else "other_files", files.name(file))
            continue
        kinds.setdefault(kind, file)
        examples += of_file
    if len(kinds) > 1:
        raise DataError(
            "the files mix texts of several kinds",
            where=files.spec,
            found="; ".join(f"{kind} in {files.name(file)}" for kind, file in kinds.items()),
            try_="one folder for each, a glob like 'texts/*.txt', or --columns",
        )
    if not kinds:
        raise DataError("no file holds any text", where=files.spec, found=f"left out: {left_out}")
    return next(iter(kinds)), examples


def read_examples(file: Path, prefix: str, reading: RowReading, split: str, left_out: LeftOut) -> FileExamples:
    """The examples of one file. Raises DataError for an unknown suffix or unreadable content."""
    if file_type(file) not in FILE_READERS:
        raise unknown_name("file type", file_type(file) or file.name, FILE_READERS, where=str(file))
    try:
        return FILE_READERS[file_type(file)](file, prefix, reading, split, left_out)
    except DataError:
        raise
    except UNREADABLE as error:  # bad UTF-8 is a ValueError
        raise unreadable(file, error) from error


def _refuse_format(file: Path, reading: RowReading) -> None:
    """Raise DataError where a plain text is to be read as rows."""
    if reading.chosen and reading.form != "text":
        raise DataError(
            "a plain text has no columns",
            where=str(file),
            found=f"--format {reading.form}",
            expected=f"a table: {', '.join(TABLE_READERS)}",
        )


def _read_text(file: Path, prefix: str, reading: RowReading, split: str, left_out: LeftOut) -> FileExamples:
    _refuse_format(file, reading)
    with open_text(file) as opened:
        text = opened.read()
    if not text:
        raise empty(file)
    documents = re.split(r"(?m)^[ \t]*<\|endoftext\|>[ \t]*$\n?|<\|endoftext\|>", text)
    texts = [d.strip("\n") for d in documents if d.strip()]
    if not texts:
        left_out.add("without_text", prefix)
    ids = [prefix] if len(texts) == 1 else [f"{prefix}:{i}" for i in range(len(texts))]
    return "documents", [Example(i, t, split=split) for i, t in zip(ids, texts, strict=True)]


def _read_tokens(file: Path, prefix: str, reading: RowReading, split: str, left_out: LeftOut) -> FileExamples:
    _refuse_format(file, reading)
    with open_text(file) as lines:
        articles = list(wikitext_articles(lines, "wikitext", split))
    if not articles:
        raise empty(file)
    return "documents", [Example(f"{prefix}:{i}", a.target, task=a.task, split=split) for i, a in enumerate(articles)]


def _read_rows(file: Path, prefix: str, reading: RowReading, split: str, left_out: LeftOut) -> FileExamples:
    table = read_table(file, keep_unread=reading.skip)
    try:
        kind, examples = rows_to_examples(
            table.rows,
            table.names,
            reading,
            where=table.file,
            place=table.place,
            prefix=prefix,
            split=split,
            left_out=left_out,
        )
    except MissingColumnsError as error:
        if table.whole_file:
            raise NoRowsError(error.headline, **error.details) from error
        raise
    return kind, list(examples)


FILE_READERS: dict[str, FileReader] = {
    ".txt": _read_text,
    ".tokens": _read_tokens,
    **dict.fromkeys(TABLE_READERS, _read_rows),
}
"""Type of a file -> its reader."""
