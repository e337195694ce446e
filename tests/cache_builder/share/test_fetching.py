"""Files arrive whole or not at all: retried, bounded, and named when they are wrong."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from servers import Answer

from kd.cache_builder.share.pull import pull
from kd.cache_builder.store.records import commits
from kd.cache_builder.store.records.manifest import load_manifest
from kd.common.errors import CacheDamageError, CacheError
from kd.common.progress import final

pytestmark = pytest.mark.usefixtures("hasty")
Tree = Callable[[Path], dict[str, bytes]]


def flip(answer: Answer) -> None:
    middle = len(answer.body) // 2
    answer.body = answer.body[:middle] + bytes([answer.body[middle] ^ 1]) + answer.body[middle + 1 :]


def test_a_slow_link_is_only_slow(cache: Path, tmp_path: Path, tree: Tree, serve):
    server = serve(cache)

    def slow(path: str, before: int, answer: Answer) -> None:
        answer.pause = 0.02

    server.fault = slow
    steps = list(pull(server.url, tmp_path / "copy", workers=32))
    assert tree(tmp_path / "copy") == tree(cache)
    assert len(steps) > 1  # somebody watching sees it move
    assert [s.done for s in steps] == sorted(s.done for s in steps)


def test_a_server_that_never_works_is_an_error_and_the_next_pull_goes_on(
    cache: Path, tmp_path: Path, tree: Tree, serve
):
    server = serve(cache)
    gold = commits.shard_files(load_manifest(cache).arrays, 1)["gold_ids"]

    def broken(path: str, before: int, answer: Answer) -> None:
        if path == f"/{gold}":
            answer.status, answer.body = 502, b""

    server.fault = broken
    with pytest.raises(CacheError, match="failed again and again") as error:
        final(pull(server.url, tmp_path / "copy", workers=1))
    assert error.value.details["file"] == gold
    assert error.value.exit_code == 1
    with pytest.raises(CacheError, match="this is not a cache"):
        load_manifest(tmp_path / "copy")
    server.fault, before = None, len(server.log)
    final(pull(server.url, tmp_path / "copy"))
    assert tree(tmp_path / "copy") == tree(cache)
    first = set(commits.shard_files(load_manifest(cache).arrays, 0).values())
    assert not first & {path[1:] for _, path, _ in server.log[before:]}  # what had arrived is not fetched again


def test_a_byte_that_was_wrong_once_is_fetched_again(cache: Path, tmp_path: Path, tree: Tree, serve):
    server = serve(cache)
    server.fault = lambda path, before, answer: flip(answer) if before == 0 and path.startswith("/targets") else None
    final(pull(server.url, tmp_path / "copy"))
    assert tree(tmp_path / "copy") == tree(cache)


@pytest.mark.parametrize(
    "name", ["vocabulary.parquet", "commits/00001.json", "examples/00000.parquet", "token_ids", "manifest.json"]
)
def test_a_wrong_byte_is_damage_and_names_the_file(name: str, cache: Path, tmp_path: Path, serve):
    server = serve(cache)
    if name == "token_ids":
        name = commits.shard_files(load_manifest(cache).arrays, 2)[name]
    server.fault = lambda path, before, answer: flip(answer) if path == f"/{name}" else None
    with pytest.raises(CacheDamageError) as error:
        final(pull(server.url, tmp_path / "copy"))
    if name != "manifest.json":
        assert error.value.details["file"] == name
    assert str(error.value.details["where"]).startswith(server.url)
    assert error.value.exit_code == 3
    assert not (tmp_path / "copy" / "manifest.json").exists()
    assert len(server.gets(name)) == (1 if name == "manifest.json" else 2)


def test_a_file_of_another_length_is_damage(cache: Path, tmp_path: Path, serve):
    for change in (lambda body: body[:-5], lambda body: b""):
        server = serve(cache)

        def short(path: str, before: int, answer: Answer, change=change) -> None:
            if path == "/vocabulary.parquet":
                answer.status, answer.body = 200, change((cache / "vocabulary.parquet").read_bytes())
                answer.headers.clear()

        server.fault = short
        with pytest.raises((CacheDamageError, CacheError)) as error:
            final(pull(server.url, tmp_path / "copy"))
        assert error.value.details["file"] == "vocabulary.parquet"
        shutil.rmtree(tmp_path / "copy")


def test_a_missing_file_is_damage_and_a_missing_manifest_no_cache(cache: Path, tmp_path: Path, serve):
    for name, kind, words in (
        ("commits/00000.json", CacheDamageError, "missing"),
        ("manifest.json", CacheError, "no cache"),
    ):
        server = serve(cache)

        def gone(path: str, before: int, answer: Answer, name=name) -> None:
            if path == f"/{name}":
                answer.status, answer.body = 404, b""
                answer.headers.clear()

        server.fault = gone
        with pytest.raises(kind, match=words):
            final(pull(server.url, tmp_path / name.split(".")[0]))


def test_no_more_is_taken_than_was_promised(cache: Path, tmp_path: Path, serve, monkeypatch: pytest.MonkeyPatch):
    server = serve(cache, ranges=False)
    server.fault = lambda path, before, answer: setattr(answer, "endless", path == "/vocabulary.parquet")
    final(pull(server.url, tmp_path / "copy"))  # the right bytes, then zeros for ever
    assert server.sent < 64 * 2**20
    monkeypatch.setattr("kd.cache_builder.share.transfer.MAX_JSON_BYTES", 10**6)
    server.fault = lambda path, before, answer: setattr(answer, "endless", path == "/manifest.json")
    with pytest.raises(CacheDamageError, match="too large"):
        final(pull(server.url, tmp_path / "other"))
    assert server.sent < 128 * 2**20
