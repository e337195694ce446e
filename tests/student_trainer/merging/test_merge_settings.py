"""Settings of a merge: their names, their bounds, and how they are saved."""

from __future__ import annotations

from typing import Any, get_args

import pytest

from kd.common.errors import DataError
from kd.common.settings import make, saved
from kd.student_trainer.merging.merge_methods import ELECTIONS
from kd.student_trainer.merging.merge_settings import ElectionName, MergeMethodName, MergeSettings
from kd.student_trainer.merging.method_registry import MERGE_METHODS


def test_the_choices_are_the_keys_of_the_registries() -> None:
    assert get_args(MergeMethodName) == tuple(MERGE_METHODS)
    assert get_args(ElectionName) == tuple(ELECTIONS)


def test_settings_are_saved_flat_under_the_names_of_the_options() -> None:
    settings = make(MergeSettings, {"method": "ties", "ties": {"elect": "mean"}, "exclude": ("wte",)})
    assert saved(settings) == {
        "method": "ties",
        "scaling": None,
        "threshold": 20.0,
        "elect": "mean",
        "density": 0.5,
        "normalize": True,
        "minimal": 1e-6,
        "off_diagonal": 0.6,
        "mask_pads": False,
        "exclude": ["wte"],
        "seed": 0,
    }
    assert make(MergeSettings, saved(settings)) == settings


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "simple-averge"}, "unknown method"),
        ({"method": "ties", "scaling": float("nan")}, "not a finite number"),
        ({"method": "ties", "threshold": 0.0}, "out of bounds"),
        ({"method": "ties", "threshold": 101.0}, "out of bounds"),
        ({"method": "ties", "elect": "median"}, "unknown elect"),
        ({"method": "dare", "density": 0.0}, "out of bounds"),
        ({"method": "regmean", "off_diagonal": 1.1}, "out of bounds"),
        ({"method": "ties", "exclude": ("[",)}, "regular expression"),
    ],
)
def test_values_that_cannot_be_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        make(MergeSettings, settings)


def test_a_threshold_above_one_is_a_percentage() -> None:
    shares = [make(MergeSettings, {"method": "ties", "threshold": t}).ties.kept_share for t in (20, 0.2, 1, 100)]
    assert shares == [0.2, 0.2, 1.0, 1.0]
