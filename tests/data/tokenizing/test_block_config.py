"""Settings of token rows that cannot be are refused."""

from __future__ import annotations

import pytest

from kd.common.errors import DataError
from kd.data.tokenizing.block_config import BlockConfig


@pytest.mark.parametrize("settings_", [{"seq_len": 1}, {"seq_len": 8, "stride": 8}, {"seq_len": 8, "stride": 0}])
def test_impossible_lengths_are_refused(settings_: dict):
    with pytest.raises(DataError):
        BlockConfig(**settings_)
