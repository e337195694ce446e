"""Settings of merging and scoring classifiers: sweeps, choices."""

from __future__ import annotations

from typing import get_args

import pytest

from kd.common.settings import make
from kd.evaluation.merged.merged_settings import DtypeName, MergeRun, parse_sweep
from kd.models.model_request import DTYPES


def test_the_data_types_are_those_of_a_model_request() -> None:
    assert get_args(DtypeName) == DTYPES


def test_sweeps_are_exact_decimals() -> None:
    assert parse_sweep("0:1:0.1") == (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
    assert parse_sweep("0.2,0.5") == (0.2, 0.5)


@pytest.mark.parametrize("text", ["0:1", "1:0:0.1", "0:1:0", "a:b:c", "0:1:0.1:2", ""])
def test_what_is_no_sweep_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="FIRST:LAST:STEP"):
        parse_sweep(text)


@pytest.mark.parametrize("sweep", ["0:1:0.5", [0, 0.5, 1], "0,0.5,1"])
def test_a_file_may_spell_a_sweep_as_text_or_as_a_list(sweep: object) -> None:
    settings = {"pool": "p", "out": "o", "method": "ties", "sweep": sweep}
    assert make(MergeRun, settings).scalings.sweep == (0.0, 0.5, 1.0)
