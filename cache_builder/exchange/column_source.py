"""JSONL and Parquet with a row for each sequence, as programs around vLLM and axolotl write them.

    input_ids (or prompt_token_ids)     the tokens of the sequence
    logprobs (or prompt_logprobs)       for each of its last tokens, what the teacher found probable in its place
    target_token_ids                    the ids of `logprobs`, where its entries are plain numbers
    id, gold_logprobs, gold_ranks, prompt, target, byte_ends    optional, as in `npz_source`

An entry of `logprobs` is a list of numbers beside one of ids; a list of `{"token": "token_id:123", "logprob": -0.5}`; or
`{"123": {"logprob": -0.5, "rank": 1}}`, as vLLM's `prompt_logprobs` has it. Where there are n entries for T tokens, entry r is
about token T - n + r. Nothing predicts the first token, so where n is T, the first entry must be null or empty.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from kd.cache_builder.exchange.source_sequences import NO_ID, SourceSequence, SourceText
from kd.common.errors import DataError
from kd.common.strangers.plain_files import open_plain

TOKENS, VALUES = ("input_ids", "prompt_token_ids"), ("logprobs", "prompt_logprobs")
"""Names of the two columns that every source has."""
IDS = "target_token_ids"
PARQUET_ROWS = 16
"""Sequences of a Parquet file that are in memory at once."""


class _WrongRow(Exception):
    """A row cannot be read: the message says what was found."""


def jsonl_sequences(path: Path, number: int) -> Iterator[SourceSequence]:
    """The sequences of a file with a JSON object in each line. Raises DataError naming the line."""
    with open_plain(path) as file:
        for line, text in enumerate(file, 1):
            if not text.strip():
                continue
            try:
                row = json.loads(text)
            except (ValueError, RecursionError) as error:
                raise DataError("a line is not JSON", where=f"{path}, line {line}", found=error) from error
            yield _sequence(row, f"{number}/{line - 1}", f"{path}, line {line}")


def parquet_sequences(path: Path, number: int) -> Iterator[SourceSequence]:
    """The sequences of a Parquet file. Raises DataError naming the row."""
    try:
        with open_plain(path) as file:
            row_number = 0
            for batch in pq.ParquetFile(file).iter_batches(batch_size=PARQUET_ROWS):
                for row in batch.to_pylist():
                    yield _sequence(row, f"{number}/{row_number}", f"{path}, row {row_number}")
                    row_number += 1
    except pa.ArrowException as error:
        raise DataError("a file cannot be read as Parquet", where=path, found=str(error).splitlines()[0]) from error


def _sequence(row: Any, name: str, where: str) -> SourceSequence:
    """A row as a sequence. Raises DataError."""
    try:
        return _read(row, name)
    except (_WrongRow, TypeError, ValueError, OverflowError) as error:
        raise DataError(
            "a row cannot be read",
            where=where,
            found=error,
            expected=f"{' or '.join(TOKENS)}, and {' or '.join(VALUES)} with {IDS} or with ids of their own",
        ) from error


def _read(row: Any, name: str) -> SourceSequence:
    if not isinstance(row, Mapping):
        raise _WrongRow(f"{type(row).__name__}, where an object is wanted")
    tokens, values = (_column(row, names) for names in (TOKENS, VALUES))
    input_ids = np.array(tokens, dtype=np.int64)
    if input_ids.ndim != 1 or len(values) > len(input_ids):
        raise _WrongRow(f"{len(values)} entries for {input_ids.size} tokens")
    listed = row.get(IDS)
    if listed is not None and len(listed) != len(values):
        raise _WrongRow(f"{len(listed)} lists of ids beside {len(values)} of log-probabilities")
    entries = [_pairs(value, None if listed is None else listed[r]) for r, value in enumerate(values)]
    first = next((r for r, pairs in enumerate(entries) if pairs), len(entries))
    context = len(input_ids) - len(entries) + first
    if context == 0:
        raise _WrongRow("an entry for the first token, which nothing predicts: are the entries about the token after?")
    entries = entries[first:]
    if not entries or not all(entries):
        raise _WrongRow("no entry" if not entries else "an empty entry between others")
    gold_ids = input_ids[context:]
    gold_logprobs = _beside(entries, gold_ids)
    given = {column: row.get(column) for column in ("gold_logprobs", "gold_ranks", "byte_ends")}
    for column, values_of_column in given.items():
        if values_of_column is not None and len(values_of_column) != len(values):
            raise _WrongRow(f"{len(values_of_column)} {column} for {len(values)} entries")
    if given["gold_logprobs"] is not None:
        gold_logprobs = np.array(given["gold_logprobs"][first:], dtype=np.float64)
    text = None
    if row.get("target") is not None and given["byte_ends"] is not None:
        ends = np.array(given["byte_ends"][first:], dtype=np.int64)
        text = SourceText(str(row.get("prompt") or ""), str(row["target"]), ends)
    ids, logprobs = _arrays(entries)
    ranks = None if given["gold_ranks"] is None else np.array(given["gold_ranks"][first:], dtype=np.int64)
    return SourceSequence(
        str(row["id"]) if row.get("id") is not None else name,
        input_ids,
        context,
        ids,
        logprobs,
        None if gold_logprobs is None or np.isnan(gold_logprobs).all() else gold_logprobs,
        ranks,
        text,
    )


def _column(row: Mapping[str, Any], names: Sequence[str]) -> Any:
    value = next((row[name] for name in names if row.get(name) is not None), None)
    if value is None:
        raise _WrongRow(f"no column {' or '.join(names)}; there are {', '.join(map(str, row))}")
    return value


def _pairs(entry: Any, ids: Any) -> list[tuple[int, float]]:
    """Ids and log-probabilities of one entry; empty for none."""
    if entry is None or not len(entry):
        return []
    if isinstance(entry, Mapping):
        return [(int(token), _number(said)) for token, said in entry.items() if said is not None]
    if isinstance(entry[0], Mapping):
        return [(_token_id(said), _number(said)) for said in entry]
    if ids is None or len(ids) != len(entry):
        raise _WrongRow(f"{len(entry)} log-probabilities beside {0 if ids is None else len(ids)} ids")
    return [(int(token), float(value)) for token, value in zip(ids, entry, strict=True)]


def _number(said: Any) -> float:
    return float(said["logprob"] if isinstance(said, Mapping) else said)


def _token_id(said: Mapping[str, Any]) -> int:
    """The id that an entry is about. Raises _WrongRow for tokens that are named by their text: ids do not follow from it."""
    token = said.get("token_id", said.get("token"))
    word = str(token).removeprefix("token_id:")
    if not word.isdigit():
        raise _WrongRow(f"the token {token!r}, which is named by its text, where token_id:N is wanted")
    return int(word)


def _beside(entries: list[list[tuple[int, float]]], gold_ids: np.ndarray) -> np.ndarray | None:
    """`[n]` log-probability of the token that is there, where it stands beside the k most probable ones; it is taken out there.

    vLLM lists k tokens at a position, and k + 1 where the token that is there is not among the k. NaN elsewhere; None where
    no entry has one.
    """
    k = min(map(len, entries))
    gold_logprobs = np.full(len(entries), np.nan)
    for r, pairs in enumerate(entries):
        least = min(pairs, key=lambda pair: pair[1])
        if len(pairs) == k + 1 and least[0] == gold_ids[r]:
            gold_logprobs[r] = least[1]
            pairs.remove(least)
    return None if np.isnan(gold_logprobs).all() else gold_logprobs


def _arrays(entries: Sequence[Sequence[tuple[int, float]]]) -> tuple[np.ndarray, np.ndarray]:
    """Ids and log-probabilities `[n, K]` of entries that may differ in length."""
    widest = max(map(len, entries))
    ids = np.full((len(entries), widest), NO_ID, dtype=np.int64)
    values = np.full((len(entries), widest), -np.inf)
    for r, pairs in enumerate(entries):
        ids[r, : len(pairs)], values[r, : len(pairs)] = zip(*pairs, strict=True)
    return ids, values
