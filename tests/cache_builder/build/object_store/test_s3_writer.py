"""Builds into an S3 store have the bytes of a build in a folder, with two builders too, killed and continued."""

from __future__ import annotations

import os
import signal
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from kd.cache_builder.build.build_settings import RunningSettings
from kd.cache_builder.build.from_settings import build_request as build_of_request
from kd.cache_builder.build.object_store import s3_claims
from kd.cache_builder.build.object_store.s3_claims import S3Claims, all_s3_claims, claim_name
from kd.cache_builder.build.object_store.s3_objects import S3Objects
from kd.cache_builder.build.object_store.staged_output import staged
from kd.cache_builder.build.plan import plan_build
from kd.cache_builder.build.together.engines import build_together
from kd.cache_builder.store.writers.claims import STALE_SECONDS
from kd.cli import cli
from kd.common.errors import CacheError, CacheMismatchError, KdError

URL = "s3://shared/runs/c"
ALONE = RunningSettings(reuse=False)


@pytest.fixture
def objects(s3, home) -> S3Objects:
    return S3Objects(URL)


@pytest.fixture
def request_(build_request, tmp_path: Path):
    return replace(build_request(tmp_path / "unused"), url=URL)


@pytest.fixture(scope="module")
def local_tree(tmp_path_factory, build_request, run_build, tree) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("local") / "c"
    run_build(build_request(out))
    return tree(out)


def stored(objects: S3Objects) -> dict[str, bytes]:
    return {name: objects.get(name) or b"" for name in objects.sizes()}


def test_a_build_into_a_store_has_the_bytes_of_one_in_a_folder(objects, request_, local_tree, home: Path) -> None:
    last = build_of_request(request_, ALONE)
    assert (last.complete, last.left) == (True, 0)
    assert stored(objects) == local_tree
    again = build_of_request(request_, ALONE)
    assert (again.complete, again.reused) == (True, True)
    assert stored(objects) == local_tree
    assert not [p for p in home.rglob("*") if p.is_file()]  # nothing is left on this disk


def test_a_build_that_stopped_anywhere_is_continued_to_the_same_bytes(
    objects, request_, local_tree, monkeypatch
) -> None:
    """Every request that changes the store fails in turn; after each failure the same call continues."""
    failed = 0

    class Stop(Exception):
        pass

    original = S3Objects._call
    for allowed in [2, 16, 30, 47]:
        left = [allowed]

        def call(self, method, name, left=left, **words):
            if method in ("put_object", "copy_object", "delete_object"):
                left[0] -= 1
                if left[0] < 0:
                    raise Stop(name)
            return original(self, method, name, **words)

        with monkeypatch.context() as patch:
            patch.setattr(S3Objects, "_call", call)
            with suppress(Stop):
                build_of_request(request_, ALONE)
                continue
            failed += 1
        for claim in all_s3_claims(objects):  # of this process, which still lives
            objects.remove([claim_name(claim.shard)])
    assert failed >= 3
    assert build_of_request(request_, ALONE).complete
    assert stored(objects) == local_tree


@pytest.mark.slow
def test_two_builders_one_of_which_is_killed_write_the_bytes_of_one(objects, request_, local_tree) -> None:
    killed, said = list[int](), list[str]()
    with staged(request_) as here:
        for last in build_together(plan_build(here), workers=2, say=said.append):  # noqa: B007 - the last one counts
            for claim in all_s3_claims(objects) if not killed else []:
                killed.append(int(claim.builder.split()[1]))
                os.kill(killed[0], signal.SIGKILL)
                break
    assert len(killed) == 1
    assert (last.complete, last.restarted) == (True, 1)
    assert "at shard" in said[0]
    assert stored(objects) == local_tree


def test_an_offer_is_settled_by_whoever_finds_it_and_a_late_one_changes_nothing(
    objects, request_, local_tree, monkeypatch
) -> None:
    from kd.cache_builder.build.object_store import s3_writer
    from kd.cache_builder.build.object_store.s3_writer import S3Writer

    class Stop(Exception):
        pass

    def stop(self, pairs) -> None:
        raise Stop

    with monkeypatch.context() as patch:
        patch.setattr(S3Objects, "copy_all", stop)
        with pytest.raises(Stop):
            build_of_request(request_, ALONE)
    offer = next(name for name in objects.sizes(".ready-"))
    late = {name: objects.get(name) for name in [offer, *objects.sizes(s3_writer.STAGING)]}
    for claim in all_s3_claims(objects):
        objects.remove([claim_name(claim.shard)])
    assert build_of_request(request_, ALONE).complete
    assert stored(objects) == local_tree
    for name, data in late.items():  # the builder wakes up and offers its shard, with other bytes
        objects.put(name, (data or b"") if name == offer else b"other bytes")
    writer = S3Writer(Path("unused"), plan_build(replace(request_, url=None)).manifest, objects)
    writer._settle(int(offer.removeprefix(".ready-").removesuffix(".json")))
    assert stored(objects) == local_tree


def test_claims_in_a_store_are_those_of_one_builder(objects, monkeypatch) -> None:
    monkeypatch.setattr(s3_claims, "TOUCH_SECONDS", 0.0)
    one, two = S3Claims(objects, "one"), S3Claims(objects, "two")
    assert one.take(3) is None
    assert f"process {os.getpid()}" in str(two.take(3))
    one.touch(3, 17)
    (claim,) = all_s3_claims(objects)
    assert (claim.shard, claim.rows, claim.name, claim.void) == (3, 17, "one", None)
    assert one.holds(3)
    assert not two.holds(3)
    one.release_all()
    assert two.take(3) is None
    objects.put(claim_name(4), b"elsewhere-4026-77-0a1b.s3-0\n")
    assert "process 77 on elsewhere" in str(two.take(4))
    monkeypatch.setattr(S3Objects, "age", lambda self, name: STALE_SECONDS + 1.0)
    assert two.take(4) is None  # nobody touched it for long


def test_another_text_in_the_same_place_is_refused(
    objects, request_, text_file: Path, tmp_path: Path, build_request
) -> None:
    build_of_request(request_, ALONE)
    (tmp_path / "other.txt").write_text(text_file.read_text()[:2000])
    other = replace(build_request(tmp_path / "unused", text=tmp_path / "other.txt"), url=URL)
    with pytest.raises(CacheMismatchError, match="made from something else") as caught:
        build_of_request(other, ALONE)
    assert caught.value.details["cache"] == URL  # and not the folder that the build goes through


def test_a_store_that_ignores_the_condition_is_refused(objects, request_, monkeypatch) -> None:
    original = S3Objects._call

    def call(self, method, name, IfNoneMatch=None, **words):
        return original(self, method, name, **words)

    monkeypatch.setattr(S3Objects, "_call", call)
    with pytest.raises(CacheError, match="does not keep two builders apart"):
        build_of_request(request_, ALONE)
    assert objects.sizes() == {}


def test_what_a_store_cannot_do_is_refused(objects, request_) -> None:
    with pytest.raises(CacheError, match="there is no such bucket"):
        build_of_request(replace(request_, url="s3://no-such-bucket/c"), ALONE)


@pytest.mark.parametrize("out", ["hf://datasets/us/cache", "https://host/c", "gs://b/c", "s3://bucket", "s3:/bucket/c"])
def test_an_address_that_no_cache_can_be_built_at_is_refused_with_what_to_do(out: str) -> None:
    done = CliRunner().invoke(cli, ["cache", "build", "--teacher", "demo", "--data", "demo", "--out", out])
    assert isinstance(done.exception, KdError)
    assert "then kd cache push" in str(done.exception)
    assert not Path(out.split("/")[0]).exists()


def test_the_command_builds_into_a_store_and_says_what_is_there(objects, text_file: Path, model_dir: Path) -> None:
    words = [
        "--teacher",
        model_dir,
        "--data",
        text_file,
        "--out",
        URL,
        "--seq-len",
        32,
        "--top-k",
        8,
        "--device",
        "cpu",
    ]
    done = CliRunner().invoke(cli, ["cache", "build", *map(str, words), "--no-reuse"])
    assert done.exit_code == 0, (done.output, done.exception)
    assert f"{URL}: complete (built)" in done.stdout
    assert objects.exists("manifest.json")
