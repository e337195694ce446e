"""`SourceSequence`: one sequence as every format of a source gives it, whatever the source calls its parts.

Shapes: T tokens of a sequence, of which the first C are only read; n = T - C rows, each of which predicts one token; K tokens
that the longest row lists. A row that lists fewer has id -1 and log-probability -inf behind them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from kd.common.errors import DataError
from kd.common.strangers.plain_files import NotPlainError, open_plain

NO_ID = -1
"""Id in the places behind a row that lists fewer tokens than the longest."""


@dataclass(frozen=True)
class SourceText:
    """The text of a sequence, where the source has it."""

    prompt: str
    target: str
    byte_end: np.ndarray
    """[n] int64: end of each predicted token in the target's UTF-8 bytes"""


@dataclass(frozen=True)
class SourceSequence:
    """One sequence of a source."""

    name: str
    """Its identifier in the source, or its number there."""
    input_ids: np.ndarray
    """[T] int64"""
    context: int
    """C: tokens that are read and not predicted; at least 1"""
    token_ids: np.ndarray
    """[n, K] int64, in any order; row r predicts token C + r"""
    logprobs: np.ndarray
    """[n, K] float64 nats"""
    gold_logprobs: np.ndarray | None = None
    """[n] float64 nats of the token that is there; None where the source does not say it"""
    gold_ranks: np.ndarray | None = None
    """[n] int64 tokens more probable than that one; None where the source does not say it"""
    text: SourceText | None = None
    """None where the source holds token ids alone"""
    rescaled: int = 0
    """Rows whose probabilities summed to a little more than 1, because they were rounded, and were divided by their sum"""

    @property
    def gold_ids(self) -> np.ndarray:
        """`[n]` the predicted tokens."""
        return self.input_ids[self.context :]


def without_padding(sequence: SourceSequence, pad_id: int) -> SourceSequence:
    """The sequence without the token `pad_id` that some captures add at its end, and without the row that predicts it."""
    if sequence.input_ids[-1] != pad_id or len(sequence.gold_ids) < 2:
        return sequence
    return replace(
        sequence,
        input_ids=sequence.input_ids[:-1],
        token_ids=sequence.token_ids[:-1],
        logprobs=sequence.logprobs[:-1],
    )


def source_files(source: Path, suffixes: Iterable[str]) -> list[Path]:
    """The file `source`, or the files with one of these suffixes in the folder `source`, by name. Raises DataError."""
    wanted = tuple(suffixes)
    files = [source]
    if source.is_dir():
        files = sorted(p for p in source.iterdir() if p.suffix in wanted and not p.name.startswith("."))
    if not files or not source.exists():
        raise DataError(
            "there is nothing to import",
            where=source,
            found="no such file or folder" if not source.exists() else "a folder without such files",
            expected=f"a file, or a folder of files *{', *'.join(wanted)}",
        )
    for path in files:
        try:
            open_plain(path).close()
        except NotPlainError as error:
            raise DataError("a file of the source cannot be read", where=path, found=error.strerror) from error
        except OSError as error:
            raise DataError("a file of the source cannot be read", where=path, found=error.strerror) from error
    return files


def checked_sequences(sequences: Iterable[SourceSequence]) -> Iterator[SourceSequence]:
    """The sequences; raises DataError where two have one name, or where one predicts nothing."""
    seen: set[str] = set()
    for sequence in sequences:
        if sequence.name in seen:
            raise DataError("two sequences have the same id", where=sequence.name)
        seen.add(sequence.name)
        if not 1 <= sequence.context < len(sequence.input_ids):
            raise DataError(
                "a sequence has no token to predict, or nothing to predict it from",
                where=sequence.name,
                found=f"{len(sequence.input_ids)} tokens, {sequence.context} of them context",
                expected="at least one token of context and one after it",
            )
        yield sequence
