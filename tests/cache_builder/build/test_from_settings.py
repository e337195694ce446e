"""From settings to a cache, without the command line."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from kd.cache_builder.build import from_settings
from kd.cache_builder.build.build_settings import BuildSettings
from kd.cache_builder.build.from_settings import build_of, plan_of, request_of
from kd.cache_builder.build.plan import plan_build
from kd.cache_builder.store.readers.reader import CacheReader
from kd.cache_builder.store.records.manifest import Layout, load_manifest
from kd.common.errors import CacheMismatchError, DataError
from kd.common.settings import changed, make
from kd.data.sources import stream_text


@pytest.fixture
def settings(model_dir: Path, text_file: Path, tmp_path: Path) -> BuildSettings:
    """The small build of `build_request`, as settings."""
    values = {"teacher": str(model_dir), "device": "cpu", "spec": str(text_file), "seq_len": 32, "top_k": 8}
    return make(BuildSettings, values | {"tokens_per_batch": 128, "out": tmp_path / "c"})


def test_settings_make_the_request_that_names_them(settings: BuildSettings, build_request, tmp_path: Path):
    expected = dataclasses.replace(build_request(tmp_path / "c"), layout=None, corpus=stream_text(settings.data.spec))
    assert request_of(settings) == expected
    assert request_of(changed(settings, shard_rows=128)).layout == Layout(128, 128)
    assert request_of(changed(settings, shard_rows=8192)).layout == Layout(8192, 4096)


@pytest.mark.parametrize(
    ("teacher", "expected"),
    [
        ("model_dir", (64, None, False)),
        ("t5_dir", (1024, 256, True)),
    ],
)
def test_lengths_that_nobody_gave_follow_the_teacher(settings, teacher: str, expected: Any, request, tmp_path: Path):
    (tmp_path / "pairs.jsonl").write_text('{"prompt": "a", "target": "b"}\n')
    values = {"teacher": str(request.getfixturevalue(teacher)), "seq_len": None, "spec": str(tmp_path / "pairs.jsonl")}
    blocks = request_of(changed(settings, **values)).blocks
    assert (blocks.seq_len, blocks.target_len, blocks.encoder) == expected


def test_a_build_says_complete_and_again_that_nothing_was_left(settings: BuildSettings):
    stages: list[str] = []
    notes: list[str] = []

    def watch(stage, steps):
        for last in steps:
            stages.append(stage)
            notes.append(last.note)
            assert 0 <= last.done <= last.total
        return last

    first = build_of(settings, watch=watch, recorded={"teacher": "told"})
    assert (first.complete, first.reused, set(stages)) == (True, False, {"building"})
    assert "shard 1/1" in notes[-1]
    assert load_manifest(settings.out).provenance["options"] == {"teacher": "told"}
    assert build_of(settings).reused
    assert len(CacheReader(settings.out)) == load_manifest(settings.out).examples
    with pytest.raises(CacheMismatchError, match=r"targets\.top_k"):
        build_of(changed(settings, top_k=7))


def test_an_equal_cache_of_this_machine_is_copied_and_said(settings: BuildSettings, tmp_path: Path):
    build_of(settings)
    said: list[str] = []
    last = build_of(changed(settings, out=tmp_path / "again"), say=said.append)
    assert (last.copied, len(said)) == (1, 1)
    assert str(settings.out) in said[0]
    alone = build_of(changed(settings, out=tmp_path / "alone", reuse=False), say=said.append)
    assert (alone.copied, len(said)) == (0, 1)


def test_a_plan_is_a_bound_until_the_teacher_has_answered(settings: BuildSettings, tmp_path: Path):
    (tmp_path / "q.jsonl").write_text('{"question": "The fox"}\n{"question": "It rained"}\n')
    asking = changed(
        settings,
        spec=str(tmp_path / "q.jsonl"),
        columns={"prompt": "question"},
        target_source="teacher",
        target_len=6,
        overlong="truncate",
    )
    bound = plan_of(asking)
    assert (bound.targets_known, bound.manifest.rows) == (False, 12)
    assert not asking.out.exists()
    stages: list[str] = []

    def watch(stage, steps):
        stages.append(stage)
        *_, last = steps
        return last

    built = build_of(asking, watch=watch)
    assert (built.complete, stages) == (True, ["generating", "building"])
    known = plan_of(asking)
    assert (known.targets_known, known.manifest.rows) == (True, built.rows_done)


def test_unknown_settings_are_refused_with_the_nearest_name():
    with pytest.raises(DataError, match="unknown setting") as error:
        make(BuildSettings, {"teacher": "demo", "spec": "demo", "out": "x", "topk": 4})
    assert "top" in str(error.value)


def test_a_build_says_beforehand_that_its_disk_may_be_too_small(tmp_path, build_request, monkeypatch) -> None:
    plan, said = plan_build(build_request(tmp_path / "c")), list[str]()
    most = plan.manifest.rows * plan.raw_bytes_per_token
    for free in (most, most - 1):
        monkeypatch.setattr(from_settings, "free_bytes", lambda path, free=free: free)
        from_settings.say_where_room_is_short(plan, said.append)
    assert len(said) == 1
    assert said[0].startswith(f"the disk has {(most - 1) / 1e9:.1f} GB free")
    from_settings.say_where_room_is_short(
        dataclasses.replace(plan, request=dataclasses.replace(plan.request, url="s3://b/c")), said.append
    )
    assert len(said) == 1
