"""The bill of a cache: what it says of a real one, and the page that was made from it."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest
from click.testing import CliRunner

from kd.cache_builder.build.bill import MEASURED, bill_of
from kd.cache_builder.build.build_settings import BillSettings
from kd.cli import cli
from kd.common.errors import DataError
from kd.common.settings import make

ROOT = Path(__file__).parents[3]


def bill(**settings) -> dict:
    return bill_of(make(BillSettings, settings))


def test_the_bill_counts_the_files_of_a_real_cache(cache: Path) -> None:
    commits = list((cache / "commits").glob("*.json"))
    files = [*commits, *(cache / "examples").glob("*"), *(cache / "targets.zarr").rglob("c.*")]
    rows = json.loads((cache / "manifest.json").read_text())["rows"]
    found = bill(rows=rows, profile="full", top_k=8, samples=4, tail_bands=4, shard_rows=-(-rows // len(commits)))
    assert found["shards"] == len(commits)
    assert found["files"] == len(files)


def test_cost_grows_with_rows_and_falls_with_speed() -> None:
    one, ten = bill(rows=10**6), bill(rows=10**7)
    assert ten["bytes"] == pytest.approx(10 * one["bytes"])
    assert ten["gpu_hours"] == pytest.approx(10 * one["gpu_hours"])
    assert bill(rows=10**6, gpu_rate=10000)["gpu_hours"] == pytest.approx(one["gpu_hours"] / 2)
    assert bill(rows=10**6, top_k=16)["bytes"] < one["bytes"] < bill(rows=10**6, vocabulary=150_000)["bytes"]
    with pytest.raises(DataError):
        bill(rows=0)


def test_the_measured_constants_are_those_of_the_page() -> None:
    page = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    assert f"| kd cache build | {MEASURED.bytes_per_row} | 2.9e-05 | {MEASURED.read_microseconds} |" in page
    assert bill(rows=1000, vocabulary=MEASURED.vocabulary)["bytes"] == pytest.approx(1000 * MEASURED.bytes_per_row)


def test_the_page_has_the_table_of_today() -> None:
    writer = runpy.run_path(str(ROOT / "scripts" / "write_scale.py"))
    page = writer["PAGE"].read_text(encoding="utf-8")
    assert writer["with_table"](page) == page, "python scripts/write_scale.py"


def test_the_command_prints_the_bill() -> None:
    done = CliRunner().invoke(cli, ["cache", "bill", "--rows", "10000000000", "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout) == bill(rows=10**10)
