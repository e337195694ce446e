"""Sizes are read as people write them."""

from __future__ import annotations

import pytest

from kd.common.byte_sizes import byte_count
from kd.common.errors import DataError


@pytest.mark.parametrize(
    ("text", "count"),
    [("20GB", 20 * 10**9), ("512MiB", 2**29), ("1.5k", 1500), ("7", 7), ("3 tb", 3 * 10**12)],
)
def test_a_size_is_a_number_with_or_without_a_unit(text: str, count: int):
    assert byte_count(text) == count


@pytest.mark.parametrize("text", ["", "many", "GB", "-1", "1e9", "5 potatoes"])
def test_other_text_is_refused(text: str):
    with pytest.raises(DataError, match="number of bytes"):
        byte_count(text)
