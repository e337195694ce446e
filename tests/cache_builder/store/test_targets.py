"""Settings that cannot work are refused, and band edges are log-spaced."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kd.cache_builder.store.profiles import PROFILES
from kd.cache_builder.store.targets import TargetConfig, band_edges
from kd.common.errors import DataError


@given(top_k=st.integers(0, 300), more=st.integers(0, 60_000), bands=st.integers(1, 40))
def test_band_edges_ascend_from_k_to_the_vocabulary(top_k: int, more: int, bands: int):
    size = max(top_k + more, 1)
    edges = band_edges(top_k, size, bands)
    assert len(edges) == bands + 1
    assert (edges[0], edges[-1]) == (top_k, size)
    assert edges == sorted(edges)
    if size - top_k >= bands:  # ranks enough for every band
        assert edges[:-1] == sorted(set(edges[:-1]))


def test_band_edges_are_evenly_spaced_in_log_rank():
    # 4 * 10^(b/2) for b = 0..4, rounded
    assert band_edges(4, 400, 4) == [4, 13, 40, 126, 400]


def test_bands_without_ranks_are_empty_at_the_end():
    assert band_edges(8, 10, 4) == [8, 9, 10, 10, 10]
    assert band_edges(10, 10, 2) == [10, 10, 10]


@pytest.mark.parametrize(
    "settings",
    [
        {"profile": "kI"},
        {"top_k": 0},
        {"profile": "sampled", "top_k": 0, "samples": 0},
        {"samples": -1},
        {"samples": 2**16},  # a count of draws has at most 16 bits
        {"tail_bands": -1},
        {"seed": -1},
        {"temperatures": (2.0, 4.0)},
        {"temperatures": (1.0, 4.0, 2.0)},
        {"temperatures": (1.0, 1.0)},
        {"temperatures": (0.0, 1.0)},
        {"temperatures": (1.0, float("inf"))},
        {"temperatures": (1.0, float("nan"))},
        {"band_temperatures": (3.0,)},
    ],
)
def test_impossible_settings_are_refused(settings: dict):
    with pytest.raises(DataError):
        TargetConfig(**settings)


def test_a_profile_brings_its_own_numbers_except_where_given():
    config = TargetConfig.of_profile("full", top_k=5)
    assert (config.top_k, config.samples, config.tail_bands) == (5, PROFILES["full"].samples, 16)
    assert TargetConfig.of_profile("sampled").top_k == 0


def test_top_k_for_a_profile_without_one_is_refused():
    with pytest.raises(DataError, match="keeps no top-k"):
        TargetConfig.of_profile("sampled", top_k=5)


def test_an_unknown_profile_suggests_the_nearest():
    with pytest.raises(DataError) as caught:
        TargetConfig.of_profile("ulb")
    assert caught.value.details["did you mean"] == "uld"


def test_k_may_reach_the_vocabulary_and_not_exceed_it():
    TargetConfig(top_k=50).check_vocabulary(50)
    with pytest.raises(DataError, match="larger than the vocabulary"):
        TargetConfig(top_k=51).check_vocabulary(50)
