"""Histograms and calibration are those of numpy over all rows, and of the evaluation's own calibration error."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from kd.cache_builder.look.row_statistics import Histogram, histogram, row_statistics
from kd.cache_builder.store.readers.reader import CacheReader
from kd.cache_builder.store.row_figures import entropy_bounds
from kd.common.progress import final
from kd.evaluation.statistics.calibration import calibration_gaps


def counted(one: Histogram, values: np.ndarray) -> list[int]:
    """numpy's own histogram, with what lies outside in the outer bins."""
    return np.histogram(np.clip(values, one.edges[0], one.edges[-1]), one.edges)[0].tolist()


def test_the_figures_are_those_of_all_rows(cache: Path) -> None:
    reader = CacheReader(cache)
    rows = reader.read_rows(range(len(reader)))
    found = final(row_statistics(reader))
    assert found.rows == len(rows) == reader.manifest.rows
    for one, values in (
        (found.entropy, entropy_bounds(rows, 400)[0]),
        (found.kept_mass, 1 - rows.tail_mass_at(1.0)),
        (found.rank, rows.gold_rank + 1),
        (found.probability, np.exp(rows.gold_logprob.astype(np.float64))),
    ):
        assert one.counts.tolist() == counted(one, values)
        assert one.counts.sum() == len(rows)


def test_calibration_is_that_of_the_evaluation(cache: Path) -> None:
    reader = CacheReader(cache)
    rows = reader.read_rows(range(len(reader)))
    assert rows.logprobs is not None
    confidence, right = np.exp(rows.logprobs[:, 0].astype(np.float64)), rows.gold_rank == 0
    found = final(row_statistics(reader))
    assert found.calibration_error == pytest.approx(calibration_gaps(confidence, right).mean(), rel=1e-12)
    assert sum(one["rows"] for one in found.calibration) == len(rows)
    for one in found.calibration:
        inside = (confidence > one["from"]) & (confidence <= one["to"])
        assert one["rows"] == inside.sum()
        assert one["confidence"] == pytest.approx(confidence[inside].mean())
        assert one["accuracy"] == pytest.approx(right[inside].mean())


def test_a_cache_of_draws_has_what_follows_from_its_normaliser(of_profile) -> None:
    reader = of_profile("sampled", samples=6)
    document = final(row_statistics(reader)).document
    assert document["kept_mass"] is None
    assert sum(one["rows"] for one in document["calibration"]) == reader.manifest.rows


def test_rows_of_different_lengths_are_counted_by_their_own_head(of_profile) -> None:
    reader = of_profile("adaptive", top_k=40, min_probability=0.01)
    rows = reader.read_rows(range(len(reader)))
    assert rows.logprobs is not None
    first = np.exp(rows.logprobs[rows.offsets[:-1]].astype(np.float64))
    found = final(row_statistics(reader))
    assert found.confidence.sum() == pytest.approx(first.sum())
    assert found.entropy.counts.tolist() == counted(found.entropy, entropy_bounds(rows, 400)[0])


def test_nothing_is_said_of_what_nobody_knows(renormalised: CacheReader) -> None:
    document = final(row_statistics(renormalised)).document
    assert (document["kept_mass"], document["calibration"], document["calibration_error"]) == (None, None, None)
    assert document["rank"]["lower_bounds"]
    assert document["probability"]["upper_bounds"]


def test_values_on_an_edge_and_outside_have_a_bin() -> None:
    one = histogram([0, 1, 2])
    one.add(np.array([-1.0, 0.0, 1.0, 2.0, 3.0]))
    assert one.counts.tolist() == [2, 3]
