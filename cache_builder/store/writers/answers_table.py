"""Parquet files of the teacher's answers, one per block of prompts, for a cache whose targets the teacher wrote."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from kd.common.errors import CacheDamageError
from kd.common.strangers.plain_files import open_plain


def write_answers(path: Path, ids: Sequence[str], answers: Sequence[tuple[str, bool]]) -> None:
    """Write a block of the teacher's answers: for each, its text and whether it came to an end (see `generate`)."""
    columns = {
        "id": pa.array(ids, pa.string()),
        "target": pa.array([a for a, _ in answers], pa.string()),
        "complete": pa.array([c for _, c in answers], pa.bool_()),
    }
    pq.write_table(pa.table(columns), path, compression="zstd")


def read_answers(path: Path, ids: Sequence[str]) -> list[tuple[str, bool]]:
    """The answers of a block. Raises CacheDamageError when they are not those of `ids`."""
    try:
        with open_plain(path) as file:
            table = pq.read_table(file)
        stored_ids = table["id"].to_pylist()
        answers = list(zip(table["target"].to_pylist(), table["complete"].to_pylist(), strict=True))
    except Exception as error:  # a damaged file can break pyarrow in any way
        raise CacheDamageError(
            "the teacher's answers cannot be read",
            file=path,
            found=f"{type(error).__name__}: {error}",
            try_="remove the file and build again",
        ) from error
    if stored_ids != list(ids):
        raise CacheDamageError("the teacher's answers belong to other prompts", file=path)
    return answers
