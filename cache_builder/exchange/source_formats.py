"""The formats of sources by name: which files each reads, and how a file becomes sequences."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from kd.cache_builder.exchange.column_source import jsonl_sequences, parquet_sequences
from kd.cache_builder.exchange.distillkit_source import RECORD, distillkit_sequences
from kd.cache_builder.exchange.npz_source import npz_sequences
from kd.cache_builder.exchange.source_sequences import SourceSequence, checked_sequences, source_files, without_padding
from kd.common.disk.digests import file_sha256
from kd.common.errors import unknown_name


@dataclass(frozen=True)
class SourceFormat:
    """How a format is read."""

    suffixes: tuple[str, ...]
    """Ends of the names of its files."""
    read: Callable[[Path, int], Iterator[SourceSequence]]
    """(file, its number) -> its sequences"""
    record: str | None = None
    """Name of a file beside them that says how they are read."""
    padded: bool = False
    """Whether sequences may end with a padding token that was no part of the text."""


FORMATS = {
    "distillkit": SourceFormat((".parquet",), distillkit_sequences, record=RECORD, padded=True),
    "jsonl": SourceFormat((".jsonl",), jsonl_sequences),
    "parquet": SourceFormat((".parquet",), parquet_sequences),
    "npz": SourceFormat((".npz",), npz_sequences),
}


@dataclass(frozen=True)
class CacheSource:
    """Files of one format. They can be read again and again."""

    format: str
    path: Path
    files: tuple[Path, ...]
    pad_id: int | None = None
    """The tokenizer's padding token, where it is not the end token too."""

    @classmethod
    def at(cls, name: str, path: Path, pad_id: int | None = None) -> CacheSource:
        """The source at a path. Raises DataError."""
        if name not in FORMATS:
            raise unknown_name("format of a source", name, FORMATS)
        return cls(name, path, tuple(source_files(path, FORMATS[name].suffixes)), pad_id)

    def sequences(self) -> Iterator[SourceSequence]:
        """All sequences in order. Raises DataError."""
        known = FORMATS[self.format]
        read = (s for number, path in enumerate(self.files) for s in known.read(path, number))
        for sequence in checked_sequences(read):
            padded = known.padded and self.pad_id is not None
            yield without_padding(sequence, int(self.pad_id or 0)) if padded else sequence

    def digests(self) -> list[str]:
        """SHA-256 of each file: the part of a cache's identity that says which values it holds."""
        record = FORMATS[self.format].record
        records = sorted({path.parent / record for path in self.files}) if record is not None else []
        return [file_sha256(path) for path in (*self.files, *records)]
