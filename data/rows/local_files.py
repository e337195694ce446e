"""Examples from files, on this disk or in an S3 store: `.txt`, `.tokens`, and the tables of `kd.data.rows.tables`, also compressed.

A `.txt` file is one document, or several separated by `<|endoftext|>`; a `.tokens` file holds WikiText's articles. Which files a
spec names, and in which order they are read, is in `kd.data.rows.file_list`. Examples are read one after another: of a text
file, one document is in memory, and of a table some rows.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from kd.common.errors import DataError, unknown_name
from kd.data.left_out import LeftOut, joined
from kd.data.rows.compressed import UNREADABLE, TextFile, file_type, open_text
from kd.data.rows.example import Example
from kd.data.rows.file_list import FileList
from kd.data.rows.row_examples import rows_to_examples
from kd.data.rows.row_reading import MissingColumnsError, RowReading
from kd.data.rows.table_streams import open_table
from kd.data.rows.tables import TABLE_READERS, EmptyFileError, empty, unreadable
from kd.data.rows.wikitext import wikitext_articles

MARK = "<|endoftext|>"
"""What stands between two documents of a text file."""
FileExamples = tuple[str, Iterator[Example]]
"""Kind of the examples (`documents`, `pairs` or `conversations`), and the examples in the file's order."""
FileReader = Callable[[TextFile, str, RowReading, str, LeftOut], FileExamples]
"""(file, prefix of ids, how rows are read, split, record of what was left out) -> its examples."""


class NoRowsError(DataError):
    """A JSON file that is one object, which is not a row: settings, or facts about the other files."""


@dataclass(frozen=True)
class LocalTexts:
    """The examples of files, which are read from the beginning each time."""

    files: FileList
    reading: RowReading
    split: str
    listed: LeftOut
    """What lies beside the files and is not read."""

    def __call__(self, left_out: LeftOut) -> Iterator[Example]:
        """All examples of all files, in their order; `left_out` receives what is not read. Raises DataError."""
        left_out.include(self.listed)
        for file in self.files.files:
            opened = self._of_file(file, left_out)
            if opened is not None:
                yield from opened[1]

    def kind(self) -> str:
        """The kind of all the files, of which the beginning is read. Raises DataError where they mix several, or hold nothing."""
        left_out = joined([self.listed])
        kinds: dict[str, TextFile] = {}
        for file in self.files.files:
            opened = self._of_file(file, left_out)
            if opened is not None:
                kinds.setdefault(opened[0], file)
        if len(kinds) > 1:
            raise DataError(
                "the files mix texts of several kinds",
                where=self.files.spec,
                found="; ".join(f"{kind} in {self.files.name(file)}" for kind, file in kinds.items()),
                try_="one folder for each, a glob like 'texts/*.txt', or --columns",
            )
        if not kinds:
            raise DataError("no file holds any text", where=self.files.spec, found=f"left out: {left_out}")
        return next(iter(kinds))

    def _of_file(self, file: TextFile, left_out: LeftOut) -> FileExamples | None:
        """Kind and examples of one file; None where it holds nothing and nobody asked for it by its name."""
        name = self.files.name(file)
        try:
            return read_examples(file, name, self.reading, self.split, left_out)
        except (EmptyFileError, NoRowsError) as error:
            if file in self.files.asked_for:
                raise
            left_out.add("empty_files" if isinstance(error, EmptyFileError) else "other_files", name)
            return None


def read_examples(file: TextFile, prefix: str, reading: RowReading, split: str, left_out: LeftOut) -> FileExamples:
    """The examples of one file. Raises DataError for an unknown suffix or unreadable content."""
    if file_type(file) not in FILE_READERS:
        raise unknown_name("file type", file_type(file) or file.name, FILE_READERS, where=str(file))
    try:
        kind, examples = FILE_READERS[file_type(file)](file, prefix, reading, split, left_out)
    except DataError:
        raise
    except UNREADABLE as error:  # bad UTF-8 is a ValueError
        raise unreadable(file, error) from error
    return kind, _readable(file, examples)


def _readable(file: TextFile, examples: Iterator[Example]) -> Iterator[Example]:
    try:
        yield from examples
    except DataError:
        raise
    except UNREADABLE as error:
        raise unreadable(file, error) from error


def _refuse_format(file: TextFile, reading: RowReading) -> None:
    """Raise DataError where a plain text is to be read as rows."""
    if reading.chosen and reading.form != "text":
        raise DataError(
            "a plain text has no columns",
            where=str(file),
            found=f"--format {reading.form}",
            expected=f"a table: {', '.join(TABLE_READERS)}",
        )


def _read_text(file: TextFile, prefix: str, reading: RowReading, split: str, left_out: LeftOut) -> FileExamples:
    _refuse_format(file, reading)
    with open_text(file) as opened:
        if not opened.read(1):
            raise empty(file)
    return "documents", _documents(file, prefix, split, left_out)


def _documents(file: TextFile, prefix: str, split: str, left_out: LeftOut) -> Iterator[Example]:
    """The documents of a text file. The one that is held back is named after the file alone where no other follows."""
    number, held = 0, ""
    with open_text(file) as lines:
        for document in _between_marks(lines):
            if not document.strip():
                continue
            if held:
                yield Example(f"{prefix}:{number}", held, split=split)
                number += 1
            held = document.strip("\n")
    if not held:
        left_out.add("without_text", prefix)
    else:
        yield Example(f"{prefix}:{number}" if number else prefix, held, split=split)


def _between_marks(lines: Iterable[str]) -> Iterator[str]:
    """The texts between marks `<|endoftext|>`. A line that holds nothing but the mark belongs to no text."""
    parts: list[str] = []
    for line in lines:
        if MARK not in line:
            parts.append(line)
            continue
        first, *others = re.split(rf"^[ \t]*{re.escape(MARK)}[ \t]*$\n?|{re.escape(MARK)}", line)
        for other in others:
            yield "".join([*parts, first])
            parts, first = [], other
        parts.append(first)
    yield "".join(parts)


def _read_tokens(file: TextFile, prefix: str, reading: RowReading, split: str, left_out: LeftOut) -> FileExamples:
    _refuse_format(file, reading)
    with open_text(file) as opened:
        if not opened.read(1):
            raise empty(file)
    return "documents", _articles(file, prefix, split)


def _articles(file: TextFile, prefix: str, split: str) -> Iterator[Example]:
    with open_text(file) as lines:
        for number, article in enumerate(wikitext_articles(lines, "wikitext", split)):
            yield Example(f"{prefix}:{number}", article.target, task=article.task, split=split)


def _read_rows(file: TextFile, prefix: str, reading: RowReading, split: str, left_out: LeftOut) -> FileExamples:
    table = open_table(file)
    try:
        return rows_to_examples(
            table.rows,
            table.names,
            reading,
            where=str(file),
            location=table.location,
            prefix=prefix,
            split=split,
            left_out=left_out,
        )
    except MissingColumnsError as error:
        if table.whole_file:
            raise NoRowsError(error.headline, **error.details) from error
        raise


FILE_READERS: dict[str, FileReader] = {
    ".txt": _read_text,
    ".tokens": _read_tokens,
    **dict.fromkeys(TABLE_READERS, _read_rows),
}
"""Type of a file -> its reader."""
