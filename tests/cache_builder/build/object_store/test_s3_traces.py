"""The status of a build in an object store is that of the same build in a folder, and void claims are removed there too."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from kd.cache_builder.build.build_settings import RunningSettings
from kd.cache_builder.build.from_settings import build_request as build_of_request
from kd.cache_builder.build.object_store.s3_claims import S3Claims, all_s3_claims, claim_name
from kd.cache_builder.build.object_store.s3_objects import S3Objects
from kd.cache_builder.build.object_store.s3_traces import existing_in_store, s3_build_status
from kd.cache_builder.upkeep.build_status import build_status
from kd.cli import cli
from kd.common.errors import CacheError, CacheMismatchError, DataError

URL = "s3://shared/runs/c"


@pytest.fixture
def half(s3, home, build_request, run_build, tmp_path: Path) -> tuple[Path, S3Objects]:
    """A build of which every second shard is committed, in a folder and copied to a store, object by object."""
    out = tmp_path / "half"
    run_build(build_request(out, shard=(1, 2)))
    objects = S3Objects(URL)
    files = [path for path in sorted(out.rglob("*")) if path.is_file()]
    objects.put_files([(path.relative_to(out).as_posix(), path) for path in files])
    return out, objects


def test_the_status_of_a_stopped_build_is_that_of_a_folder(half: tuple[Path, S3Objects]) -> None:
    folder, _ = half
    here, there = asdict(build_status(folder)), asdict(s3_build_status(URL))
    assert (there["state"], there["shards"], there["shards_total"]) == ("stopped", 3, 5)
    for changing in ("last_commit_seconds",):
        assert there.pop(changing) >= 0.0
        here.pop(changing)
    assert there == here


def test_a_builder_at_work_is_shown_with_its_rows(half: tuple[Path, S3Objects], monkeypatch) -> None:
    _, objects = half
    monkeypatch.setattr("kd.cache_builder.build.object_store.s3_claims.TOUCH_SECONDS", 0.0)
    claims = S3Claims(objects, "me")
    assert claims.take(1) is None
    claims.touch(1, 17)
    status = s3_build_status(URL)
    (holder,) = status.holders
    assert (status.state, holder.shard, holder.rows, holder.void) == ("running", 1, 17, None)
    assert status.rows_under_way == 17
    shown = CliRunner().invoke(cli, ["cache", "status", URL])
    assert shown.exit_code == 0, shown.output
    assert shown.stdout.startswith(f"{URL}: running")
    assert "17 of 106 rows" in shown.stdout


def test_claims_in_a_store_are_unlocked(half: tuple[Path, S3Objects]) -> None:
    _, objects = half
    assert S3Claims(objects, "lives").take(1) is None
    objects.put(claim_name(3), b"elsewhere-4026-77-0a1b.s3-0\n")
    for options, left in ((["--json"], 2), (["--json", "--force"], 0)):
        done = CliRunner().invoke(cli, ["cache", "unlock", URL, *options])
        assert done.exit_code == 0, done.output
        assert len(json.loads(done.stdout)["claims"]) == 2
        assert len(all_s3_claims(objects)) == left


def test_a_finished_cache_says_so_and_a_plan_knows_what_is_committed(
    s3, home, build_request, text_file: Path, model_dir: Path, tmp_path: Path
) -> None:
    assert existing_in_store(URL) is None
    build_of_request(replace(build_request(tmp_path / "unused"), url=URL), RunningSettings(reuse=False))
    status = s3_build_status(URL)
    assert (status.state, status.rows, status.holders) == ("finished", status.rows_total, ())
    asked = ["cache", "plan", "--teacher", model_dir, "--data", text_file, "--out", URL, "--device", "cpu", "--json"]
    planned = CliRunner().invoke(cli, [*map(str, asked), "--seq-len", "64"])
    assert isinstance(planned.exception, CacheMismatchError)
    assert "seq_len" in str(planned.exception)


@pytest.mark.parametrize("command", ["status", "unlock"])
def test_an_address_without_a_build_is_refused(s3, home, command: str) -> None:
    none = CliRunner().invoke(cli, ["cache", command, "s3://shared/nothing"]).exception
    assert isinstance(none, CacheError)
    assert "no cache was begun" in str(none)
    missing = CliRunner().invoke(cli, ["cache", command, "s3://no-such-bucket/c"]).exception
    assert "there is no such bucket" in str(missing)
    other = CliRunner().invoke(cli, ["cache", command, "hf://datasets/a/b"]).exception
    assert isinstance(other, DataError)
