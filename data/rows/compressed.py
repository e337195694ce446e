"""Open text files, plain or compressed: the type of a file is its suffix without `.gz` or `.zst`, in lower case.

gzip is read by the standard library, Zstandard by pyarrow's codec. Both read several members or frames in one file, and say
where a file ends too early. A file lies on this disk or in an S3 store.
"""

from __future__ import annotations

import gzip
import io
import zlib
from pathlib import Path, PurePath
from typing import BinaryIO, TextIO, cast

from kd.data.object_texts.s3_files import S3File

TextFile = Path | S3File
"""A file that text is read from."""

ENCODING = "utf-8-sig"
"""UTF-8. A byte order mark, which spreadsheets write first, is dropped."""
COMPRESSIONS = (".gz", ".zst")
"""Suffixes of compressed files."""
UNREADABLE = (OSError, EOFError, ValueError, zlib.error)
"""What reading raises for a file that is cut short, damaged, not there, or not UTF-8."""


def file_type(file: PurePath | S3File) -> str:
    """The suffix that says what is in a file: `.csv` for `Rows.CSV.gz`; empty where there is none."""
    suffixes = [suffix.lower() for suffix in file.suffixes]
    if suffixes and suffixes[-1] in COMPRESSIONS:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def plain_name(file: PurePath) -> str:
    """The name without the suffixes of its type and its compression: `train` for `train.jsonl.gz`."""
    name = file.with_suffix("") if file.suffix.lower() in COMPRESSIONS else file
    return name.stem


def open_bytes(file: TextFile) -> BinaryIO:
    """The bytes of a file, decompressed where its suffix says so."""
    compression = file.suffix.lower()
    if compression == ".gz":
        return cast(BinaryIO, gzip.open(file if isinstance(file, Path) else file.open(), "rb"))
    if compression == ".zst":
        import pyarrow as pa

        stored = pa.OSFile(str(file)) if isinstance(file, Path) else pa.PythonFile(file.open(), "r")
        return io.BufferedReader(pa.CompressedInputStream(stored, "zstd"))
    return file.open("rb") if isinstance(file, Path) else file.open()


def parquet_source(file: TextFile) -> Path | BinaryIO:
    """What pyarrow opens a Parquet file by."""
    return file if isinstance(file, Path) else file.open()


def size_of(file: TextFile) -> int:
    """Bytes of a file."""
    return file.stat().st_size if isinstance(file, Path) else file.size


def open_text(file: TextFile, newline: str | None = None) -> TextIO:
    """The text of a file, decompressed where its suffix says so. `newline` as for the built-in `open`."""
    return io.TextIOWrapper(open_bytes(file), encoding=ENCODING, newline=newline)
