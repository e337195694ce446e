"""A build whose shards others hold ends with exit code 4, says who they are, and `kd cache unlock` removes their claims."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from click.testing import CliRunner

from kd.cli import cli

ELSEWHERE = "elsewhere-4026-77-0a1b.0"


def kd(*words: object, code: int = 0) -> str:
    done = CliRunner().invoke(cli, [str(word) for word in words])
    found = getattr(done.exception, "exit_code", done.exit_code)  # `main` makes an exit code of an error
    assert found == code, (done.output, done.exception)
    return done.stdout if done.exception is None or code == 0 else f"{done.stdout}{done.exception}"


@pytest.fixture
def build(model_dir: Path, text_file: Path, tmp_path: Path) -> list[object]:
    words = ["cache", "build", "--teacher", model_dir, "--data", text_file, "--out", tmp_path / "c"]
    return [*words, "--seq-len", 32, "--top-k", 8, "--shard-rows", 128, "--device", "cpu", "--no-reuse"]


def claim(root: Path, index: int, tag: str) -> Path:
    path = root / "commits" / f".{index:05d}.claim"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(tag)
    return path


def test_an_unfinished_build_has_an_exit_code_of_its_own(build, tmp_path: Path):
    claim(tmp_path / "c", 1, ELSEWHERE)
    text = kd(*build, code=4)
    assert "not complete (1 shards left)" in text
    assert "process 77 on elsewhere holds shards 1" in text
    assert "--wait" in text
    again = kd(*build, "--json", code=4)
    document = json.loads(again[: again.rindex("}") + 1])
    assert (document["complete"], document["elsewhere"]) == (False, {"1": "process 77 on elsewhere"})


def test_unlock_shows_claims_and_removes_those_that_nobody_holds(build, tmp_path: Path):
    held, empty = claim(tmp_path / "c", 1, ELSEWHERE), claim(tmp_path / "c", 2, ELSEWHERE)
    kd(*build, code=4)
    empty.write_text("")
    shown = kd("cache", "unlock", tmp_path / "c")
    assert "shard 1: process 77 on elsewhere: held" in shown
    assert "shard 2: nobody: the claim is empty; removed" in shown
    assert (held.exists(), empty.exists()) == (True, False)
    forced = json.loads(kd("cache", "unlock", tmp_path / "c", "--force", "--json"))
    assert [(c["shard"], c["removed"]) for c in forced["claims"]] == [(1, True)]
    assert not held.exists()
    assert "complete (built)" in kd(*build)
    assert json.loads(kd("cache", "unlock", tmp_path / "c", "--json"))["claims"] == []


def test_unlock_wants_a_cache(tmp_path: Path):
    assert "this is not a cache" in kd("cache", "unlock", tmp_path, code=1)


def test_a_part_that_is_finished_is_no_unfinished_build(build, tmp_path: Path):
    assert "not complete (built)" in kd(*build, "--shard", "1/2")
    assert "complete (built)" in kd(*build, "--shard", "2/2")


def test_a_repair_whose_shard_another_builder_holds_is_not_called_sound(build, tmp_path: Path):
    kd(*build)
    (tmp_path / "c" / "examples" / "00001.parquet").write_bytes(b"")
    claim(tmp_path / "c", 1, ELSEWHERE)
    assert "not finished" in kd("cache", "repair", tmp_path / "c", code=4)
    assert not (tmp_path / "c" / "manifest.json").exists()


IN_A_CONTAINER = """
import os, sys
sys.path.insert(0, {path!r})
sys.argv = ["kd", *{words!r}]
from kd.cache_builder.store.writers.shard_writer import ShardWriter
write = ShardWriter.write
def deadly(self, index, *rest, **ours):
    if index == 2 and {dies}:
        os._exit(137)  # the first process of a container is deaf to SIGKILL from inside it
    return write(self, index, *rest, **ours)
ShardWriter.write = deadly
from kd.cli import main
main()
"""


@pytest.mark.slow
def test_a_container_that_was_restarted_continues_at_once(build, tmp_path: Path):
    """The second has other process ids, in which the first's mean nothing, and the lock of its claim is free."""
    if shutil.which("unshare") is None:
        pytest.skip("unshare is not installed")
    path = str(Path(__file__).parents[2] / ".typing")
    for dies, code in ((True, 137), (False, 0)):
        text = textwrap.dedent(IN_A_CONTAINER).format(path=path, words=[str(w) for w in build], dies=dies)
        command = ["unshare", "--pid", "--fork", "--mount-proc", sys.executable, "-c", text]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if "Operation not permitted" in done.stderr:
            pytest.skip("namespaces cannot be made here")
        assert done.returncode == code, done.stderr
        assert bool(list((tmp_path / "c" / "commits").glob(".*.claim"))) == dies
        assert bool(list((tmp_path / "c").glob(".staging-*"))) == dies
    assert "complete" in done.stdout
