"""`TokenRows`: one cached example as token ids. A *row* predicts one target token."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from kd.data.rows.example import Example
from kd.models.batching.gaps import NO_GAPS, Gaps


@dataclass(frozen=True)
class TokenRows:
    """One cached example: models read `context_ids`, and each of `target_ids` is one scored row."""

    example: Example
    context_ids: np.ndarray
    """[C] int32, C >= 1."""
    target_ids: np.ndarray
    """[n] int32, n >= 1; without gaps, row t is predicted at position C - 1 + t."""
    byte_end: np.ndarray
    """[n] int64: the end of each target token in the UTF-8 bytes of `example.target`."""
    gaps: Gaps = NO_GAPS
    """Tokens between target tokens, which are read and not scored."""
    ended: tuple[bool, ...] = ()
    """Whether the last token of each turn of a conversation is the control token that ends it."""
    messages: tuple[int, ...] = ()
    """The number of the message that each turn of a conversation comes from."""

    @property
    def input_ids(self) -> np.ndarray:
        """`[T]`: context and target, as a model reads them. The last position predicts nothing that is cached."""
        return self.gaps.sequence(self.context_ids, self.target_ids)

    @property
    def read_only(self) -> int:
        """Tokens that are read and not scored."""
        return len(self.context_ids) + self.gaps.tokens
