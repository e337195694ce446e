"""kd cache push, pull, info and verify with addresses, as scripts see them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner
from servers import Answer, FileServer, HubServer

from kd.cache_builder.share import fetching
from kd.cache_builder.share.mirror import mirrors
from kd.cache_builder.store.records import commits
from kd.cache_builder.store.records.manifest import load_manifest
from kd.cli import cli


@pytest.fixture
def served(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FileServer]:
    monkeypatch.setenv("KD_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(fetching, "BACKOFF", 0.01)
    server = FileServer(cache)
    yield server
    server.close()


def kd(*arguments: str | Path, code: int = 0) -> str:
    done = CliRunner().invoke(cli, [str(a) for a in arguments])
    assert done.exit_code == code, done.output
    return done.stdout


def test_push_and_pull_print_what_was_moved(cache: Path, tmp_path: Path, tree):
    sent = json.loads(kd("cache", "push", cache, tmp_path / "place", "--json"))
    assert sent["bytes_moved"] == sent["bytes_total"]
    got = json.loads(kd("cache", "pull", tmp_path / "place", tmp_path / "copy", "--json"))
    assert got["bytes_total"] > 0
    assert tree(tmp_path / "copy") == tree(cache)
    text = kd(
        "cache", "pull", tmp_path / "place", tmp_path / "part", "--examples", "0:2", "--for", "ce", "--for", "uld"
    )
    assert "a part of the cache" in text
    assert "token_ids" not in text
    assert "logprobs" in text
    found = json.loads(kd("cache", "verify", tmp_path / "part", "--json"))
    assert found["sound"]
    assert found["part"]["shards"] == 1
    assert "a part of a cache" in kd("cache", "verify", tmp_path / "part")


def test_what_looks_like_a_repository_of_the_hub_is_a_folder_and_says_so(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    said = CliRunner().invoke(cli, ["cache", "push", str(cache), "me/mine", "--dry-run"])
    assert "hf://datasets/me/mine is a dataset on the hub" in said.stderr
    (tmp_path / "me").mkdir()
    assert not CliRunner().invoke(cli, ["cache", "push", str(cache), "me/mine", "--dry-run"]).stderr


def test_info_and_verify_take_an_address(cache: Path, served: FileServer):
    there, here = (json.loads(kd("cache", "info", place, "--json")) for place in (served.url, cache))
    assert there["fingerprint"] == here["fingerprint"]
    assert json.loads(kd("cache", "verify", served.url, "--json"))["sound"]
    name = commits.shard_files(load_manifest(cache).arrays, 1)["gold_ids"]

    def wrong(path: str, before: int, answer: Answer) -> None:
        if path == f"/{name}":
            answer.body = bytes(len(answer.body))

    served.fault = wrong
    (mirror,) = (path for path in mirrors().iterdir() if path.is_dir())
    (mirror / name).unlink()
    found = json.loads(kd("cache", "verify", served.url, "--json", code=3))
    assert [(f["where"], f["shard"], f["array"]) for f in found["findings"]] == [(name, 1, "gold_ids")]


def test_wrong_usage_is_told(cache: Path, tmp_path: Path):
    for arguments in (("--examples", "5"), ("--examples", "a:b"), ("--workers", "0")):
        kd("cache", "pull", cache, tmp_path / "copy", *arguments, code=2)


def test_the_hub_is_found_by_its_environment_variable(cache: Path, tmp_path: Path, tree):
    """The client reads HF_ENDPOINT when it is imported: another process."""
    hub = HubServer()
    program = [sys.executable, "-c", "from kd.cli import main; main()", "cache"]
    environment = {
        **os.environ,
        "HF_ENDPOINT": hub.url,
        "HF_HUB_DISABLE_XET": "1",
        "HF_TOKEN": "hf_test",
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }
    try:
        for arguments in (("push", cache, "hf://datasets/us/it"), ("pull", "hf://datasets/us/it", tmp_path / "copy")):
            done = subprocess.run(
                [*program, *map(str, arguments)], env=environment, capture_output=True, text=True, check=False
            )
            assert done.returncode == 0, done.stderr
            assert "100%" in done.stderr
    finally:
        hub.close()
    assert tree(tmp_path / "copy") == tree(cache)
