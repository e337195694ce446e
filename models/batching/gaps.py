"""Tokens between the scored tokens of a sequence: a conversation has what others say between the assistant's turns.

    context | scored … | gap | scored … | gap | scored …

A model reads everything. Rows exist for the scored tokens only. A sequence without gaps is a context and a target.

Shapes: C context tokens, n scored tokens, G gaps, T tokens in all.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np


def _none() -> np.ndarray:
    return np.zeros(0, dtype=np.int32)


@dataclass(frozen=True, eq=False)
class Gaps:
    """The gaps of one sequence."""

    rows: np.ndarray = field(default_factory=_none)
    """[G] int32, ascending: the scored token, counted from 0, before which each gap stands; from 1 to n - 1."""
    lengths: np.ndarray = field(default_factory=_none)
    """[G] int32: tokens of each gap; 0 where a turn follows another one at once."""
    ids: np.ndarray = field(default_factory=_none)
    """[sum of lengths] int32: the tokens of all gaps, one gap after another."""

    def __len__(self) -> int:
        return len(self.rows)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Gaps) and all(
            np.array_equal(getattr(self, name), getattr(other, name)) for name in ("rows", "lengths", "ids")
        )

    def __hash__(self) -> int:
        return hash((self.rows.tobytes(), self.lengths.tobytes(), self.ids.tobytes()))

    @property
    def tokens(self) -> int:
        """Tokens of all gaps."""
        return len(self.ids)

    def sequence(self, context: np.ndarray, target: np.ndarray) -> np.ndarray:
        """`[C], [n] -> [T]` everything in the order in which a model reads it."""
        if not len(self.rows):
            return np.concatenate([context, target])
        after: np.ndarray = np.insert(target, np.repeat(self.rows, self.lengths), self.ids)
        return np.concatenate([context, after])

    def positions(self, context: int, rows: int) -> np.ndarray:
        """`[n]` int64 positions in the sequence of the tokens that predict each scored token.

        context   C, at least 1
        rows      n
        """
        before = np.zeros(rows + 1, dtype=np.int64)
        np.add.at(before, self.rows, self.lengths)
        return np.arange(context - 1, context - 1 + rows) + np.cumsum(before)[:rows]

    def turns(self, rows: int) -> np.ndarray:
        """`[G + 1, 2]` int64: rows [start, stop) of each turn: a run of scored tokens between two gaps."""
        edges = np.concatenate([[0], self.rows, [rows]]).astype(np.int64)
        return np.stack([edges[:-1], edges[1:]], axis=1)

    def head(self, rows: int) -> Gaps:
        """The gaps before the first `rows` scored tokens."""
        kept = int(np.searchsorted(self.rows, rows, side="left"))
        return Gaps(self.rows[:kept], self.lengths[:kept], self.ids[: int(self.lengths[:kept].sum())])

    def check(self, rows: int) -> None:
        """Raise ValueError where these cannot be the gaps of a sequence of n = `rows` scored tokens."""
        if len(self.rows) != len(self.lengths) or int(self.lengths.sum()) != len(self.ids):
            raise ValueError("rows, lengths and ids of gaps do not belong together")
        if len(self.rows) and not (self.rows[0] > 0 and self.rows[-1] < rows and (np.diff(self.rows) > 0).all()):
            raise ValueError("a gap does not stand between scored tokens")
        if len(self.lengths) and self.lengths.min() < 0:
            raise ValueError("a gap has fewer than no tokens")


NO_GAPS = Gaps()
"""The gaps of a context and a target."""
