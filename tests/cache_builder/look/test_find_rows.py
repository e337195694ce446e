"""The rows that stand out are found by one pass, which reads no array that the question does not need."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from kd.cache_builder.look import find_rows
from kd.cache_builder.look.find_rows import FoundRow, examples_with, surprising_rows, uncertain_rows
from kd.cache_builder.store.readers.reader import CacheReader
from kd.cache_builder.store.row_figures import entropy_bounds
from kd.common.errors import CacheError
from kd.common.progress import final

Places = tuple[np.ndarray, np.ndarray]


@pytest.mark.parametrize("block", [1, 50, 8192])
def test_the_rows_are_those_of_a_sort_of_all(
    cache: Path, every_row: Places, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(find_rows, "ROWS_AT_ONCE", block)
    reader = CacheReader(cache)
    targets = reader.read_rows(range(len(reader)))
    for find, values in (
        (uncertain_rows, entropy_bounds(targets, 400)[0]),
        (surprising_rows, -targets.gold_logprob.astype(np.float64)),
    ):
        order = np.argsort(-values, kind="stable")[:7]
        expected = [FoundRow(int(every_row[0][r]), int(every_row[1][r]), float(values[r])) for r in order]
        assert final(find(reader, 7)) == expected
    assert len(final(surprising_rows(reader, 10**6))) == len(targets)


def test_only_the_arrays_that_are_needed_are_read(cache: Path, tmp_path: Path) -> None:
    """The others are damaged: a reader that touched them would stop."""
    for find, needed in (
        (uncertain_rows, {"gold_ids", "gold_logprob", "gold_rank", "byte_length", "logprobs", "tail_odds"}),
        (surprising_rows, {"gold_ids", "gold_logprob", "gold_rank", "byte_length"}),
    ):
        copy = tmp_path / find.__name__
        shutil.copytree(cache, copy)
        for folder in (copy / "targets.zarr").iterdir():
            if folder.is_dir() and folder.name not in needed:
                for file in (f for f in folder.rglob("*") if f.is_file() and f.name != "zarr.json"):
                    file.write_bytes(b"not what was committed")
        assert final(find(CacheReader(copy), 3)) == final(find(CacheReader(cache), 3))


def test_progress_counts_rows(cache: Path) -> None:
    steps = list(uncertain_rows(CacheReader(cache), 3))
    assert [s.done for s in steps] == sorted(s.done for s in steps)
    assert steps[-1].done == steps[-1].total == CacheReader(cache).manifest.rows


def test_rows_that_keep_draws_are_ranked_by_their_normaliser(of_profile) -> None:
    reader = of_profile("sampled", samples=6)
    (found,) = final(uncertain_rows(reader, 1))
    everything = entropy_bounds(reader.read_rows(range(len(reader))), 400)[0]
    assert found.nats == everything.max()


def test_a_text_is_found_in_any_case(cache: Path) -> None:
    reader = CacheReader(cache)
    texts = [(e.prompt + "\0" + e.target).casefold() for e in reader.read(range(len(reader)))]
    expected = [n for n, text in enumerate(texts) if "fox" in text]
    found = final(examples_with(reader, "FOX", 2))
    assert found.total == len(expected) > 2
    assert found.examples == tuple(expected[:2])
    assert final(examples_with(reader, "no such words", 2)).total == 0


def test_a_copy_without_the_arrays_says_so(cache: Path, tmp_path: Path) -> None:
    from kd.cache_builder.share.pull import pull

    final(pull(str(cache), tmp_path / "part", arrays=lambda _: []))
    reader = CacheReader(tmp_path / "part")
    assert len(final(surprising_rows(reader, 2))) == 2
    with pytest.raises(CacheError, match="does not hold those arrays"):
        final(uncertain_rows(reader, 2))
