"""`ArraySpec`: name, dtype and columns of a stored array, and how its chunks are laid out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from kd.cache_builder.store.ragged import KEPT

Arrays = dict[str, np.ndarray]
"""Stored arrays of some rows, by name."""


@dataclass(frozen=True)
class ArraySpec:
    """One stored array: `[rows]` or `[rows, columns]`."""

    name: str
    dtype: str
    columns: int | None
    attributes: Mapping[str, Any]
    """Zarr attributes for a reader without our code: quantity, unit, decoding rule."""
    ids: bool = False
    """True for token ids: the array holds their codes, see `vocabulary.codes_by_count`."""
    steps: bool = False
    """True if the array holds the differences between neighbours of a row; in memory, a row holds their sums."""
    by_column: bool = False
    """True if a chunk holds one column after another (the `transpose` codec), because values of equal rank are similar."""
    shuffle: Literal["shuffle", "bitshuffle"] = "bitshuffle"
    """What blosc reorders before zstd: single bits (`bitshuffle`) or whole bytes (`shuffle`)."""
    ragged: bool = False
    """True if rows differ in length: `columns` is then the most entries of a row. In the file, the array has one dimension, and
    each chunk of rows holds their entries one after another, with zeros behind. See `ragged`."""
    counts: str = KEPT
    """Name of the array with each row's number of entries, where rows differ in length."""

    separator: Literal["/", "."] = "/"
    """Between the numbers in the name of a shard's file. With a slash, each shard of an array with columns has its own folder."""

    @property
    def document(self) -> dict[str, Any]:
        """How the manifest lists the array."""
        listed = {"name": self.name, "dtype": self.dtype, "columns": self.columns}
        listed |= {"ragged": True} if self.ragged else {}
        return listed | ({"counts": self.counts} if self.counts != KEPT else {})

    @property
    def row_bytes(self) -> int:
        """Bytes of one row before compression; the most there may be, where rows differ."""
        return int(np.dtype(self.dtype).itemsize) * (1 if self.columns is None else self.columns)


def id_dtype(vocabulary_size: int) -> str:
    """Smallest unsigned dtype that holds every id."""
    return "uint16" if vocabulary_size <= 2**16 else "uint32"
