"""Text becomes a path of this machine, or an error."""

from __future__ import annotations

from pathlib import Path

import pytest

from kd.common.errors import DataError
from kd.common.paths import output_folder, path_of


def test_the_home_folder_is_spelled_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert path_of("~/runs") == path_of(Path("~/runs")) == tmp_path / "runs"
    assert output_folder("~/runs") == tmp_path / "runs"


@pytest.mark.parametrize("text", ["s3://bucket/key", "https://host/x", "hf://datasets/a/b", Path("s3://bucket")])
def test_an_address_is_no_path(text: str | Path) -> None:
    with pytest.raises(DataError, match="this is an address"):
        path_of(text)


def test_names_with_colons_are_paths() -> None:
    assert [str(path_of(t)) for t in ("a:b", "C:x", "./s3:/x", "12:30")] == ["a:b", "C:x", "s3:/x", "12:30"]


def test_a_folder_may_be_new_at_any_depth_or_a_link_to_one(tmp_path: Path) -> None:
    assert output_folder(tmp_path / "a" / "b") == tmp_path / "a" / "b"
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    assert output_folder(tmp_path / "link") == tmp_path / "link"
    assert not (tmp_path / "a").exists()
