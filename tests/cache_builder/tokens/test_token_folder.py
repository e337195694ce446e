"""The tokens of a build lie in its folder while it runs, and nowhere when it is finished or refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from kd.cache_builder.build.build_settings import RunningSettings
from kd.cache_builder.build.builder import build
from kd.cache_builder.build.from_settings import build_request as build_of_request
from kd.cache_builder.build.from_settings import planned
from kd.cache_builder.build.plan import plan_build
from kd.cache_builder.build.request import BuildRequest
from kd.cache_builder.store.cache_files import files_below
from kd.cache_builder.tokens.token_folder import token_folder
from kd.cache_builder.tokens.token_part import write_part
from kd.cache_builder.tokens.token_pass import Keep
from kd.common.errors import CacheMismatchError, DataError
from kd.data.text_rows import RowMaker

RUNNING = RunningSettings(reuse=False)


def silent(stage, steps):
    *_, last = steps
    return last


def stored_plan(request: BuildRequest):
    return planned(request, Keep(token_folder(request.out)), silent)


@pytest.fixture
def no_tokenising(monkeypatch: pytest.MonkeyPatch):
    """A function after which nothing may be tokenised."""
    return lambda: monkeypatch.setattr(RowMaker, "rows", lambda *_: pytest.fail("tokenised again"))


def test_a_build_from_the_disk_has_the_bytes_of_one_from_memory(build_request, tree, tmp_path: Path):
    list(build(plan_build(build_request(tmp_path / "memory"))))
    last = build_of_request(build_request(tmp_path / "disk"), RUNNING)
    assert last.complete
    assert tree(tmp_path / "disk") == tree(tmp_path / "memory")


def test_builders_read_the_tokens_of_the_first_and_the_finished_cache_has_none(
    build_request, tree, tmp_path: Path, no_tokenising
):
    request = build_request(tmp_path / "cache")
    steps = build(stored_plan(request))
    next(steps)
    steps.close()  # stopped
    folder = token_folder(request.out)
    assert folder.is_dir()
    assert not [path for path in files_below(request.out) if folder in path.parents]
    no_tokenising()
    assert build_of_request(build_request(tmp_path / "cache"), RUNNING).complete
    assert not folder.exists()
    before = tree(request.out)
    assert build_of_request(build_request(tmp_path / "cache"), RUNNING).reused
    assert tree(request.out) == before


def test_another_text_is_refused_and_the_tokens_of_the_build_stay(build_request, tree, tmp_path: Path, text_file: Path):
    request = build_request(tmp_path / "cache")
    steps = build(stored_plan(request))
    next(steps)
    steps.close()
    before = tree(token_folder(request.out))
    (tmp_path / "other.txt").write_text(text_file.read_text().replace("the", "teh", 1))
    other = build_request(tmp_path / "cache", text=tmp_path / "other.txt")
    with pytest.raises(CacheMismatchError, match="text_digest") as caught:
        build_of_request(other, RUNNING)
    assert "text_digest" in str(caught.value)
    assert tree(token_folder(request.out)) == before
    build_of_request(request, RUNNING)
    with pytest.raises(CacheMismatchError):
        build_of_request(other, RUNNING)
    assert not token_folder(request.out).exists()


def test_a_refused_text_leaves_no_folder(build_request, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def refuse(*given):
        write_part(*given)
        raise DataError("refused")

    monkeypatch.setattr("kd.cache_builder.tokens.token_pass.write_part", refuse)
    with pytest.raises(DataError, match="refused"):
        build_of_request(build_request(tmp_path / "cache"), RUNNING)
    assert not (tmp_path / "cache").exists()
