"""A build copies the shards that another cache holds already, and no others."""

from __future__ import annotations

import dataclasses
import shutil

import pytest
from terminal import kd, run_kd

from kd.cache_builder.store.records.manifest import Layout, load_manifest
from kd.common.errors import CacheMismatchError


def test_more_text_after_the_same_beginning_is_built_without_computing_it_again(
    tmp_path, text_file, build_request, run_build, tree, monkeypatch
):
    from kd.cache_builder.teacher.teacher_pass import Teacher

    documents = text_file.read_text()
    (tmp_path / "more.txt").write_text(documents + documents[::-1][:400])
    request = build_request(tmp_path / "old", layout=Layout(64, 32))
    run_build(request)
    longer = build_request(tmp_path / "direct", text=tmp_path / "more.txt", layout=Layout(64, 32))
    run_build(longer)
    scored, run = [], Teacher.run
    monkeypatch.setattr(Teacher, "run", lambda self, rows, first: scored.append(first) or run(self, rows, first))
    steps = run_build(dataclasses.replace(longer, out=tmp_path / "extended", extend=tmp_path / "old"))
    old, new = load_manifest(tmp_path / "old"), load_manifest(tmp_path / "extended")
    assert steps[-1].copied >= len(old.shards) - 2 > 2
    assert len(scored) == len(new.shards) - steps[-1].copied
    assert tree(tmp_path / "extended") == tree(tmp_path / "direct")


def test_a_cache_of_another_teacher_is_not_extended(tmp_path, build_request, run_build, save_model, tokenizer_dir):
    save_model(tmp_path / "other", seed=9)
    shutil.copytree(tokenizer_dir, tmp_path / "other", dirs_exist_ok=True)
    run_build(build_request(tmp_path / "old", model=tmp_path / "other"))
    with pytest.raises(CacheMismatchError, match="made from something else") as caught:
        run_build(dataclasses.replace(build_request(tmp_path / "new"), extend=tmp_path / "old"))
    assert "weights" in str(caught.value)


def test_a_build_of_a_known_fingerprint_is_copied_and_says_so(tmp_path, model_dir, text_file, tree, monkeypatch):
    build = (
        "cache",
        "build",
        "--teacher",
        model_dir,
        "--data",
        text_file,
        "--seq-len",
        32,
        "--top-k",
        8,
        "--shard-rows",
        128,
        "--device",
        "cpu",
    )
    kd(*build, "--out", tmp_path / "one")
    monkeypatch.setattr(
        "kd.cache_builder.build.builder.teacher_of_plan", lambda plan: pytest.fail("loaded the teacher")
    )
    done = run_kd(*build, "--out", tmp_path / "two")
    assert f"built at {tmp_path / 'one'}" in done.stderr
    assert tree(tmp_path / "two") == tree(tmp_path / "one")
    monkeypatch.undo()
