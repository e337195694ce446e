"""A small finished cache of profile `kl`, for tests that change copies of it."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def kl(tmp_path_factory, build_request, run_build) -> Path:
    out = tmp_path_factory.mktemp("upkeep") / "kl"
    run_build(build_request(out))
    return out
