"""Addresses of every kind, for the tests of push and pull."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(params=["folder", "file://", "s3", "hub"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An address to push to and pull from, of each kind."""
    if request.param == "s3":
        request.getfixturevalue("s3")
        return "s3://shared/some/cache"
    if request.param == "hub":
        request.getfixturevalue("hub")
        return "hf://datasets/us/cache"
    return f"{'file://' if request.param == 'file://' else ''}{tmp_path / 'a place'}".replace(
        " ", "%20" if request.param == "file://" else " "
    )
