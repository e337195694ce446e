"""Settings of a report are the same for every door."""

from __future__ import annotations

from pathlib import Path

import pytest

from kd.common.errors import DataError
from kd.common.settings import make
from kd.evaluation.report.systems.report_settings import ReportSettings


def test_published_figures_need_a_table() -> None:
    assert make(ReportSettings, {"out": "x", "table": "oscarnav-ten", "published": True}).out == Path("x")
    with pytest.raises(DataError, match="no table"):
        make(ReportSettings, {"out": "x", "published": True})
