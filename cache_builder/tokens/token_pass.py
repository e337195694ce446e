"""The pass that tokenises a text: examples are read once, in order, and become parts, each of which is made by one process.

    for step in tokenise(text, maker, width, keep=Keep(folder=out / TOKENS), workers=4): ...
    tokenised = step.result

The reader works out the digest of the text and hands out parts. A part that is in the folder already, made of the same examples by
the same rules, is not made again; so a pass that was interrupted continues, and a second builder only reads the text. What is kept:

    in files     columns of every part, and of no more than some parts in memory        a build
    in memory    columns of all parts                                                  a plan whose rows are used at once
    counts       4 bytes for each row (8 where one has more than 65,535 tokens)        a plan that is only looked at
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import pyarrow as pa

from kd.cache_builder.store.lengths import Lengths
from kd.cache_builder.tokens.part_rows import PartRows
from kd.cache_builder.tokens.token_part import (
    PartFigures,
    PartRecord,
    make_part,
    part_key,
    part_path,
    read_record,
    write_part,
)
from kd.cache_builder.tokens.tokenised_text import StoredRows, TokenisedText
from kd.common.errors import DataError
from kd.common.progress import Progress
from kd.data.left_out import LeftOut
from kd.data.rows.example import Example, TextDigest
from kd.data.text_rows import Found, RowMaker
from kd.data.text_stream import Text
from kd.data.tokenizing.corpus_rows import nothing_to_score

PART_CHARACTERS, PART_EXAMPLES = 1 << 21, 1 << 14
"""A part ends when it has so many characters of text, or so many examples. Both decide the parts, so they are never settings."""


@dataclass(frozen=True)
class Keep:
    """What is kept of the parts."""

    folder: Path | None = None
    """Folder for the files of the parts; None where there are none."""
    rows: bool = True
    """Whether the rows are kept at all."""


IN_MEMORY = Keep()
COUNTS = Keep(rows=False)


@dataclass(frozen=True)
class Done:
    """A part that is finished."""

    record: PartRecord
    lengths: tuple[Lengths, ...] = ()
    """Tokens and scored tokens of each row, by batch; none where the part is in a file."""
    rows: tuple[PartRows, ...] = ()
    """The rows by batch; none where they are in a file, or not kept."""


class Pool(Protocol):
    """What makes parts: this process, or several."""

    @property
    def ahead(self) -> int:
        """Parts that may be under way."""

    def submit(self, number: int, examples: list[Example]) -> Future[Done]:
        """Make a part, and write it where there is a folder for it."""


@dataclass(frozen=True)
class PartWork:
    """Everything that making a part needs besides its examples. It can be sent to another process."""

    maker: RowMaker
    rules: str
    """The digest of `maker`."""
    width: int
    """Ids that the model has."""
    keep: Keep

    def __call__(self, number: int, examples: list[Example]) -> Done:
        """Make part `number`. Raises DataError naming the example that cannot be scored."""
        if self.keep.folder is not None:
            return Done(write_part(self.keep.folder, number, self.maker, self.rules, examples, self.width))
        lengths, held = list[Lengths](), list[PartRows]()

        def put(columns: pa.RecordBatch) -> None:
            rows = PartRows(columns)
            lengths.append(_compact(rows))
            if self.keep.rows:
                held.append(rows)

        record = make_part(self.maker, self.rules, examples, self.width, put)
        return Done(record, tuple(lengths), tuple(held))


def _compact(rows: PartRows) -> Lengths:
    """Tokens and scored tokens of each row in few bytes."""
    targets = rows.targets
    tokens = targets + rows.read_only
    dtype = np.uint16 if tokens.max() < 1 << 16 else np.uint32
    return tokens.astype(dtype), targets.astype(dtype)


class Here:
    """Parts are made in this process, one by one."""

    ahead = 0

    def __init__(self, work: PartWork) -> None:
        self._work = work

    def submit(self, number: int, examples: list[Example]) -> Future[Done]:
        """Make the part now."""
        future: Future[Done] = Future()
        future.set_result(self._work(number, examples))
        return future


@contextmanager
def here(work: PartWork) -> Iterator[Pool]:
    """Parts are made in this process."""
    yield Here(work)


def tokenise(
    text: Text, maker: RowMaker, width: int, keep: Keep, pool: Callable[[PartWork], AbstractContextManager[Pool]] = here
) -> Generator[Progress[TokenisedText], None, None]:
    """Tokenise a text; yields a record after each part. The last one has the result.

    width   ids that the model has
    pool    what makes the parts

    Raises DataError for the first example in order that cannot be scored or read, and where nothing is to be scored.
    """
    left_out, digest = LeftOut(), TextDigest()
    total = _Total(keep)
    work = PartWork(maker, maker.digest(), width, keep)
    pending: deque[Future[Done]] = deque()
    with pool(work) as workers:
        for number, examples in enumerate(parts_of(_digested(text.reading(left_out), digest))):
            pending.append(_part(number, examples, work, workers))
            while pending and (len(pending) > workers.ahead or pending[0].done()):
                total.add(pending.popleft().result())
                yield Progress(total.found_examples, 0, note=total.note)
        while pending:
            total.add(pending.popleft().result())
            yield Progress(total.found_examples, 0, note=total.note)
    left_out.include(total.findings.left_out)
    total.findings.too_long.refuse(maker.kind, text.spec, total.found_examples, maker.blocks)
    result = total.result(text, maker.kind, left_out, digest.hexdigest())
    if total.unknown is not None:
        raise unknown_token(*total.unknown, width)
    yield Progress(total.found_examples, total.found_examples, result, total.note)


def nothing_left(spec: str, left_out: LeftOut) -> DataError:
    """The error for a text of which no example has a row."""
    advice = "--overlong truncate, or a larger --seq-len or --target-len"
    return DataError("no example is left", where=spec, found=f"left out: {left_out}", try_=advice)


def unknown_token(name: str, token: int, width: int) -> DataError:
    """The error for a text that has a token beyond the model's ids, as `refuse_unknown_ids` raises it."""
    return DataError(
        "a text has a token that the model does not have",
        where=f"example {name}",
        found=f"id {token}",
        expected=f"ids below {width}",
        try_="another --tokenizer, or a text without that token",
    )


def parts_of(examples: Iterable[Example]) -> Iterator[list[Example]]:
    """The examples of each part. Where a part ends depends on the examples alone."""
    part: list[Example] = []
    size = 0
    for example in examples:
        part.append(example)
        size += len(example.prompt) + len(example.target)
        if size >= PART_CHARACTERS or len(part) == PART_EXAMPLES:
            yield part
            part, size = [], 0
    if part:
        yield part


def _digested(examples: Iterable[Example], digest: TextDigest) -> Iterator[Example]:
    for example in examples:
        digest.add(example)
        yield example


def _part(number: int, examples: list[Example], work: PartWork, pool: Pool) -> Future[Done]:
    """The part of these examples: from its file, or to be made."""
    folder = work.keep.folder
    record = None
    if folder is not None and part_path(folder, number).exists():
        record = read_record(folder, number, part_key(work.rules, examples))
    if record is None:
        return pool.submit(number, examples)
    done: Future[Done] = Future()
    done.set_result(Done(record))
    return done


class _Total:
    """What is known of all parts so far."""

    def __init__(self, keep: Keep) -> None:
        self._keep = keep
        self.findings, self.found_examples = Found(), 0
        self.unknown: tuple[str, int] | None = None
        self._rows = 0
        self._figures = PartFigures()
        self._batches: list[tuple[int, ...]] = []
        self._keys: list[str] = []
        self._held: list[PartRows] = []
        self._lengths: list[Lengths] = []

    @property
    def note(self) -> str:
        """Progress in words."""
        return f"{self.found_examples:,} examples, {self._figures.targets + self._figures.read_only:,} tokens"

    def add(self, done: Done) -> None:
        """Go on with the next part."""
        record = done.record
        self._figures.add(record.figures, self._rows)
        self.findings.include(record.findings)
        self.unknown = self.unknown or record.unknown
        self.found_examples += record.examples
        self._rows += record.rows
        self._batches.append(record.batches)
        self._keys.append(record.key)
        if self._keep.rows:
            self._held += done.rows
        else:
            self._lengths += done.lengths

    def result(self, text: Text, kind: str, left_out: LeftOut, digest: str) -> TokenisedText:
        """The whole text in tokens. Raises DataError where it has no row."""
        if not self._rows and kind == "documents":
            raise nothing_to_score(text.spec, self.found_examples)
        if not self._rows:
            raise nothing_left(text.spec, left_out)
        rows, figures = StoredRows(self._batches, self._keys, self._keep.folder, self._held), self._figures
        return TokenisedText(
            rows=rows,
            digest=digest,
            examples=self.found_examples,
            targets=figures.targets,
            read_only=figures.read_only,
            text_bytes=figures.text_bytes,
            left_out=left_out,
            notes=self.findings.notes,
            counts=figures.counts,
            extremes=tuple(sorted({row for _, row in figures.shapes.values()})),
            longest=figures.shapes["together"][0],
            most_targets=(figures.shapes["targets"][0], figures.longest),
            lengths=tuple(self._lengths),
        )
