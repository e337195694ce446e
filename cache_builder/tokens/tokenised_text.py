"""`TokenisedText`: a whole text in tokens, of which the parts are opened when their rows are asked for.

text.rows[first:stop]        # the rows of a shard
text.row_lengths()           # tokens and scored tokens of every row, a pair of arrays for each part
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import overload

import numpy as np

from kd.cache_builder.store.lengths import Lengths
from kd.cache_builder.tokens.part_rows import PartRows, added
from kd.cache_builder.tokens.token_part import read_part_rows
from kd.common.errors import CacheError
from kd.data.left_out import LeftOut
from kd.data.tokenizing.token_notes import TokenNotes
from kd.data.tokenizing.token_rows import TokenRows

OPEN = 4
"""Batches that are kept open."""


class StoredRows(Sequence[TokenRows]):
    """The rows of all parts, of which some are open at a time. It can be sent to another process if the parts are in files."""

    def __init__(
        self, batches: Sequence[Sequence[int]], keys: Sequence[str], folder: Path | None, held: Sequence[PartRows] = ()
    ) -> None:
        """Parts with these rows by batch, and these keys: in files of `folder`, or their batches `held` in memory."""
        self._bounds = np.concatenate([[0], np.cumsum([n for part in batches for n in part], dtype=np.int64)])
        self._places = [(part, batch) for part, sizes in enumerate(batches) for batch in range(len(sizes))]
        self._keys, self._folder, self._held = list(keys), folder, list(held)
        self._open: dict[int, PartRows] = {}

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_open": {}}

    def __len__(self) -> int:
        return int(self._bounds[-1])

    @overload
    def __getitem__(self, index: int) -> TokenRows: ...
    @overload
    def __getitem__(self, index: slice) -> list[TokenRows]: ...
    def __getitem__(self, index: int | slice) -> TokenRows | list[TokenRows]:
        if isinstance(index, slice):
            first, stop, step = index.indices(len(self))
            return self._between(first, stop) if step == 1 else [self[i] for i in range(first, stop, step)]
        if not -len(self) <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        index %= len(self)
        return self._between(index, index + 1)[0]

    def __iter__(self) -> Iterator[TokenRows]:
        for batch in self.batches():
            yield from batch.rows(0, len(batch))

    def _between(self, first: int, stop: int) -> list[TokenRows]:
        rows: list[TokenRows] = []
        while first < stop:
            number = int(np.searchsorted(self._bounds, first, side="right")) - 1
            start, end = int(self._bounds[number]), min(stop, int(self._bounds[number + 1]))
            rows += self._batch(number).rows(first - start, end - start)
            first = end
        return rows

    def batches(self) -> Iterator[PartRows]:
        """The batches of all parts in their order."""
        return map(self._batch, range(len(self._places)))

    def _batch(self, number: int) -> PartRows:
        """One batch. Raises CacheError where its file is not there any more, or is another one."""
        if self._folder is None:
            assert self._held, "only counts were kept"
            return self._held[number]
        if number not in self._open:
            part, batch = self._places[number]
            stored = read_part_rows(self._folder, part, self._keys[part], batch)
            if stored is None:
                raise CacheError(
                    "the tokens of the text are not there any more",
                    where=self._folder,
                    found=f"part {part} is missing, or of another text",
                    try_="the same command again: it makes them anew",
                )
            self._open[number] = stored
            while len(self._open) > OPEN:
                del self._open[next(iter(self._open))]
        return self._open[number]


def tokenised_in_memory(
    rows: Sequence[TokenRows], examples: int, digest: str, left_out: LeftOut, notes: TokenNotes
) -> TokenisedText:
    """The same of rows that are in memory already."""
    targets, read_only = np.array([len(r.target_ids) for r in rows]), np.array([r.read_only for r in rows])
    together = targets + read_only
    extremes = {int(read_only.argmax()), int(targets.argmax()), int(together.argmax()), int(together.argmin())}
    counts = np.zeros(0, dtype=np.int64)
    for row in rows:
        counts = added(counts, np.bincount(row.input_ids))
    return TokenisedText(
        rows=rows,
        digest=digest,
        examples=examples,
        targets=int(targets.sum()),
        read_only=int(read_only.sum()),
        text_bytes=sum(len(r.example.target.encode()) for r in rows),
        left_out=left_out,
        notes=notes,
        counts=counts,
        extremes=tuple(sorted(extremes)),
        longest=int(together.max()),
        most_targets=(int(targets.max()), rows[int(targets.argmax())].example.id),
    )


@dataclass(frozen=True)
class TokenisedText:
    """What a plan needs of a text in tokens."""

    rows: Sequence[TokenRows]
    """All rows in their order; where only counts were kept, its rows cannot be read."""
    digest: str
    """Digest of the text, see `text_digest`."""
    examples: int
    """Examples of the text."""
    targets: int
    """Scored tokens."""
    read_only: int
    """Tokens that are read and not scored."""
    text_bytes: int
    """Bytes of the scored texts."""
    left_out: LeftOut
    """What of the text is not in the rows, and why."""
    notes: TokenNotes
    """What was found in the texts while they were tokenised."""
    counts: np.ndarray
    """[largest id + 1] how often each id occurs."""
    extremes: tuple[int, ...]
    """Numbers of the rows that a teacher is tried with: the longest in each way, and the shortest; ascending."""
    longest: int
    """Tokens of the longest row, read and scored."""
    most_targets: tuple[int, str] = (0, "")
    """Scored tokens of the row that has most of them, and its id."""
    lengths: tuple[Lengths, ...] = field(default=(), repr=False)
    """Where only counts were kept: tokens and scored tokens of every row, by part."""

    def row_lengths(self) -> Iterator[Lengths]:
        """Tokens and scored tokens of every row, one pair of arrays after another."""
        if self.lengths:
            return iter(self.lengths)
        if isinstance(self.rows, StoredRows):
            return ((batch.targets + batch.read_only, batch.targets) for batch in self.rows.batches())
        targets, read_only = np.array([(len(row.target_ids), row.read_only) for row in self.rows]).T
        return iter([(targets + read_only, targets)])
