"""DistillKit's captures: Parquet with packed ids and compressed log-probabilities, and `compression_config.yaml` beside it.

Columns, one row for each sequence of T tokens:

    input_ids            the tokens; its capture adds a padding token at the end, so that the last real one has a row after it
    bytepacked_indices   T - 1 rows of k ids of ceil(log2 d) bits, the highest bit first
    compressed_logprobs  T - 1 rows of bytes: `exact_k` values, the coefficients of a polynomial over the ranks after them, and
                         for each residual bin a scale and its integers

The YAML is the only record of d, k and the codec. Every row must have the number of bytes that it implies, so one that belongs to
another capture is refused. Entry r is about token r + 1. What rounding pushes above a mass of 1 is divided by its sum, and counted.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from kd.cache_builder.exchange.source_sequences import SourceSequence
from kd.common.errors import DataError
from kd.common.strangers.plain_files import open_plain
from kd.common.strangers.yaml_file import read_settings

RECORD = "compression_config.yaml"
COLUMNS = ("input_ids", "bytepacked_indices", "compressed_logprobs")
FLOATS = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}
"""Kind of number -> its bytes."""
ROUNDED = 0.05
"""Most mass above 1 that rounding explains: bfloat16 moves a log-probability of -4 by 0.016, and a fit moves it further."""
PARQUET_ROWS = 16


@dataclass(frozen=True)
class Bin:
    """Residuals of some ranks as integers of few bits."""

    scale_dtype: str
    element_bits: int
    num_elements: int


@dataclass(frozen=True)
class Codec:
    """What the YAML beside a capture says."""

    d: int
    k: int
    exact_k: int
    exact_dtype: str = "float32"
    polynomial_terms: tuple[int | str, ...] = ()
    term_dtype: str = "float32"
    residual_bins: tuple[Bin, ...] = ()
    delta_encoding: bool = True
    normalize_t: bool = False

    @property
    def id_bits(self) -> int:
        """Bits of an id."""
        return max(int(self.d - 1).bit_length(), 1)

    @property
    def row_bytes(self) -> tuple[int, int]:
        """Bytes of the ids of a row, and of its log-probabilities."""
        values = self.exact_k * FLOATS[self.exact_dtype] + len(self.polynomial_terms) * FLOATS[self.term_dtype]
        bins = sum(FLOATS[b.scale_dtype] + (b.element_bits * b.num_elements + 7) // 8 for b in self.residual_bins)
        return (self.k * self.id_bits + 7) // 8, values + bins


def read_codec(path: Path) -> Codec:
    """The codec of a capture. Raises DataError."""
    if not path.exists():
        raise DataError(
            "the record of the capture is missing", where=path, try_=f"the {RECORD} that DistillKit wrote beside it"
        )
    entries = dict(read_settings(path))
    entries.pop("error_diffusion", None)  # it changes how values are rounded, and not how they are read
    try:
        bins = tuple(Bin(**one) for one in entries.pop("residual_bins", None) or ())
        terms = tuple(entries.pop("polynomial_terms", None) or ())
        codec = Codec(**entries, polynomial_terms=terms, residual_bins=bins)
        names = {codec.exact_dtype, codec.term_dtype, *(b.scale_dtype for b in bins)}
        sound = 0 < codec.k <= codec.d and 0 <= codec.exact_k <= codec.k and names <= FLOATS.keys()
        sound &= all(isinstance(term, int) or term in ("sqrt", "exp") for term in terms)
        sound &= sum(b.num_elements for b in bins) <= codec.k - codec.exact_k
        sound &= all(0 < b.element_bits <= 32 and b.num_elements > 0 for b in bins)
    except TypeError as error:
        raise DataError("the record of the capture cannot be read", where=path, found=error) from error
    if not sound:
        raise DataError("the record of the capture cannot be read", where=path, found=codec)
    return codec


def distillkit_sequences(path: Path, number: int) -> Iterator[SourceSequence]:
    """The sequences of one file of a capture. Raises DataError."""
    codec = read_codec(path.parent / RECORD)
    try:
        with open_plain(path) as file:
            parquet, row = pq.ParquetFile(file), 0
            missing = sorted(set(COLUMNS) - set(parquet.schema_arrow.names))
            if missing:
                old = "packed_indices" in parquet.schema_arrow.names
                raise DataError(
                    "columns are missing",
                    where=path,
                    found=", ".join(parquet.schema_arrow.names) + (": DistillKit's older format" if old else ""),
                    expected=", ".join(missing),
                )
            for batch in parquet.iter_batches(batch_size=PARQUET_ROWS, columns=list(COLUMNS)):
                for one in batch.to_pylist():
                    yield _sequence_of(one, codec, f"{number}/{row}", f"{path}, row {row}")
                    row += 1
    except pa.ArrowException as error:
        raise DataError("a file cannot be read as Parquet", where=path, found=str(error).splitlines()[0]) from error


def _sequence_of(row: Mapping[str, Any], codec: Codec, name: str, where: str) -> SourceSequence:
    input_ids = np.array(row["input_ids"], dtype=np.int64)
    packed, compressed = (_bytes(row[column]) for column in COLUMNS[1:])
    expected = tuple((len(input_ids) - 1, size) for size in codec.row_bytes)
    if (packed.shape, compressed.shape) != expected:
        raise DataError(
            "a row has another number of bytes than its record implies",
            where=where,
            found=f"ids {packed.shape}, log-probabilities {compressed.shape}",
            expected=f"{expected[0]} and {expected[1]}: rows for all tokens but the first, and their bytes",
            try_=f"the {RECORD} of this capture",
        )
    values = decoded_logprobs(compressed, codec)
    mass = np.exp(np.minimum(values, 1.0)).sum(axis=1)
    above = (mass > 1) & (mass <= 1 + ROUNDED)
    values = np.where(above[:, None], values - np.log(mass)[:, None], values)
    ids = unpacked(packed, codec.id_bits, codec.k)
    return SourceSequence(name, input_ids, 1, ids, values, rescaled=int(above.sum()))


def _bytes(rows: Sequence[Sequence[int]]) -> np.ndarray:
    """`[n, bytes]`; rows that differ in length give a shape that no record implies."""
    lengths = {len(row) for row in rows}
    return np.array(rows, dtype=np.uint8) if len(lengths) == 1 else np.empty((len(rows), 0), dtype=np.uint8)


def unpacked(packed: np.ndarray, bits: int, count: int) -> np.ndarray:
    """`[n, count]` int64 of `bits` bits each, the highest first, from `[n, bytes]`."""
    flat = np.unpackbits(packed, axis=1)[:, : count * bits].reshape(len(packed), count, bits)
    return flat.astype(np.int64) @ (1 << np.arange(bits - 1, -1, -1, dtype=np.int64))


def decoded_logprobs(data: np.ndarray, codec: Codec) -> np.ndarray:
    """`[n, k]` float64 from `[n, bytes]`."""
    exact, data = _floats(data, codec.exact_dtype, codec.exact_k)
    terms, data = _floats(data, codec.term_dtype, len(codec.polynomial_terms))
    ranks = codec.k - codec.exact_k
    points = np.linspace(0, 1, ranks) if codec.normalize_t else np.arange(ranks, dtype=np.float64)
    functions = [getattr(np, t)(points) if isinstance(t, str) else points**t for t in codec.polynomial_terms]
    rest = terms @ np.stack(functions) if functions else np.zeros((len(data), ranks))
    first = 0
    for one in codec.residual_bins:
        scale, data = _floats(data, one.scale_dtype, 1)
        size = (one.element_bits * one.num_elements + 7) // 8
        steps = unpacked(data[:, :size], one.element_bits, one.num_elements).astype(np.float64)
        steps = 2 * steps - 1 if one.element_bits == 1 else steps - 2 ** (one.element_bits - 1)
        rest[:, first : first + one.num_elements] += steps * scale
        first, data = first + one.num_elements, data[:, size:]
    values = np.concatenate([exact, rest], axis=1)
    return np.cumsum(values, axis=1) if codec.delta_encoding else values


def _floats(data: np.ndarray, kind: str, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The first `count` numbers of each row as float64, and the bytes after them. The bytes are little-endian."""
    size = FLOATS[kind] * count
    part = np.ascontiguousarray(data[:, :size])
    if kind == "bfloat16":
        numbers = (part.view("<u2").astype(np.uint32) << 16).view(np.float32)
    else:
        numbers = part.view({"float16": "<f2", "float32": "<f4", "float64": "<f8"}[kind])
    return numbers.astype(np.float64).reshape(len(data), count), data[:, size:]
