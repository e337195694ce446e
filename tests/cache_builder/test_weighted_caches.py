"""Which caches `--cache` names, in which proportion."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kd.cache_builder.weighted_caches import WeightedCache, as_caches, parse_caches, shares_of
from kd.common.errors import DataError
from kd.common.setting_values import as_text
from kd.common.settings import make
from kd.student_trainer.configuration.train_config import TrainConfig

places = st.text("abc/._-", min_size=1).filter(lambda text: not Path(text).exists())
weights = st.floats(min_value=1e-6, max_value=1e6) | st.integers(1, 9).map(float)


@pytest.mark.parametrize(
    ("text", "shares"),
    [
        ("a=0.7,b=0.3", [("a", 0.7), ("b", 0.3)]),
        ("a=7,b=3", [("a", 0.7), ("b", 0.3)]),
        ("a", [("a", 1.0)]),
        ("x=y/a=1,b=1", [("x=y/a", 0.5), ("b", 0.5)]),
    ],
)
def test_weights_are_read_and_normalised(text: str, shares: list[tuple[str, float]]) -> None:
    caches = parse_caches(text)
    assert [one.location for one in caches] == [place for place, _ in shares]
    assert shares_of(caches) == pytest.approx([share for _, share in shares])


@given(st.lists(st.builds(WeightedCache, places, weights), min_size=2) | st.tuples(st.builds(WeightedCache, places)))
def test_a_value_is_spelled_as_it_is_read(caches: list[WeightedCache]) -> None:
    assert parse_caches(str(as_text(caches))) == tuple(caches)
    assert as_caches(caches) == tuple(caches)
    assert sum(shares_of(caches)) == pytest.approx(1)


def test_a_mapping_a_path_and_a_text_name_caches_too(tmp_path: Path) -> None:
    assert as_caches({"a": 7, "b": 0.5}) == (WeightedCache("a", 7.0), WeightedCache("b", 0.5))
    assert as_caches(tmp_path) == as_caches(str(tmp_path)) == (WeightedCache(str(tmp_path)),)


@pytest.mark.parametrize("text", ["a=0.7,b", "a=0.7,b=0", "a=0.7,b=-1", "a=x,b=1", "=1,b=1", "a=1,b=inf", "a=nan,b=1"])
def test_what_is_no_mixture_is_refused(text: str) -> None:
    with pytest.raises(DataError, match="not a mixture"):
        parse_caches(text)


def test_several_caches_without_weights_are_refused(tmp_path: Path) -> None:
    several = [WeightedCache("a"), WeightedCache("b", 1.0)]
    for refused in (lambda: parse_caches(f"{tmp_path},{tmp_path}"), lambda: as_caches(several)):
        with pytest.raises(DataError, match="mixed by weights"):
            refused()
    with pytest.raises(DataError, match="no cache was given"):
        as_caches([])


def test_one_name_with_a_comma_that_is_not_there_is_one_cache(tmp_path: Path) -> None:
    assert parse_caches(f"{tmp_path}/a,b") == (WeightedCache(f"{tmp_path}/a,b"),)


def test_a_folder_whose_name_looks_like_a_mixture_is_one_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a=1,b=2").mkdir()
    monkeypatch.chdir(tmp_path)
    assert parse_caches("a=1,b=2") == (WeightedCache("a=1,b=2"),)


@pytest.mark.parametrize("value", [None, 3, "", " ", object(), [4], [("a", "b", "c")], [("a", "much")], {"a": -1}, []])
def test_what_names_no_cache_is_an_error_of_ours(value: Any) -> None:
    with pytest.raises(DataError):
        as_caches(value)


def test_a_list_of_one_path_is_that_cache_and_several_need_weights() -> None:
    assert as_caches(["a"]) == (WeightedCache("a"),)  # type: ignore[list-item]
    with pytest.raises(DataError, match="mixed by weights"):
        as_caches(["a", "b"])  # type: ignore[list-item]


def test_a_file_may_map_caches_to_weights() -> None:
    settings = make(TrainConfig, {"cache": {"a": 0.7, "b": 0.3}, "student": "demo", "out": "o"})
    assert settings.data.cache == (WeightedCache("a", 0.7), WeightedCache("b", 0.3))
