"""`kd cache build` and `repair` with a teacher that is larger than one device, as a user types them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from kd.cli import cli

PLACED = {"transformer.wte": "cpu", "transformer.wpe": "cpu", "lm_head": "cpu", "transformer.h": "disk"}


@pytest.fixture
def build(model_dir: Path, text_file: Path, tmp_path: Path):
    """`build(name, *options)`: the answer of a small `kd cache build --json`."""

    def run(name: str, *options: object, code: int = 0) -> Any:
        given = ["--teacher", model_dir, "--data", text_file, "--seq-len", 32, "--top-k", 8, "--shard-rows", 128]
        command = ["cache", "build", *given, "--no-reuse", "--out", tmp_path / name, "--json", *options]
        result = CliRunner().invoke(cli, [str(part) for part in command])
        if code:
            assert result.exit_code != 0
            return str(result.exception) + result.output
        assert result.exit_code == 0, result.output + repr(result.exception)
        return json.loads(result.stdout)

    return run


@pytest.fixture
def mapped(tmp_path: Path) -> Path:
    path = tmp_path / "map.json"
    path.write_text(json.dumps({**PLACED, "transformer.ln_f": "disk"}))
    return path


def test_a_build_with_a_map_has_the_same_bytes_and_says_where_the_weights_lie(build, mapped, tmp_path: Path, tree):
    whole, spread = build("whole", "--device", "cpu"), build("spread", "--device-map", mapped)
    assert "weights_on" not in whole
    assert set(spread["weights_on"]) == {"cpu", "disk"}
    assert spread["fingerprint"] == whole["fingerprint"]
    ours, theirs = tree(tmp_path / "spread"), tree(tmp_path / "whole")
    assert {n for n in ours if ours[n] != theirs.get(n)} == {
        "manifest.json"
    }  # which holds `--device cpu` as it was typed
    assert ours.keys() == theirs.keys()


def test_a_repair_may_spread_the_teacher(build, mapped, tmp_path: Path, tree):
    build("c")
    before = tree(tmp_path / "c")
    damaged = next((tmp_path / "c" / "targets.zarr").rglob("c.0.0"))
    damaged.write_bytes(b"damage")
    repaired = CliRunner().invoke(cli, ["cache", "repair", str(tmp_path / "c"), "--device-map", str(mapped)])
    assert repaired.exit_code == 0, repaired.output
    assert tree(tmp_path / "c") == before


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--device-map", "spread"], "no such device map"),
        (["--device-map", "auto", "--device", "cpu"], "exclude each other"),
        (["--max-memory", "cpu=1GB"], "without a device map"),
        (["--device-map", "auto", "--max-memory", "cpu"], "DEVICE=SIZE"),
        (["--device-map", "auto", "--max-memory", "cpu=much"], "number of bytes"),
        (["--device-map", "auto", "--max-memory", "9=1GB"], "GPU that this machine lacks"),
        (["--max_memory", "cpu=1GB"], "--max-memory"),
    ],
)
def test_wrong_maps_stop_before_anything_is_written(options: list[str], words: str, build, tmp_path: Path):
    assert words in build("c", *options, code=1)
    assert not (tmp_path / "c").exists()
