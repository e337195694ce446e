"""What a spec names: a source, a file, a data set of the hub, or nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

from kd.common.errors import DataError
from kd.data.sources import load_classes, load_corpus


@pytest.mark.parametrize(("typo", "meant"), [("wikitext2", "wikitext-2"), ("demmo", "demo")])
def test_an_unknown_source_suggests_the_nearest(typo: str, meant: str):
    with pytest.raises(DataError) as caught:
        load_corpus(typo)
    assert caught.value.details["did you mean"] == meant


@pytest.mark.parametrize(
    "spec", ["texts/missing.jsonl", "./missing", "../missing", "missing.txt", "a/b/c", "my/task.yaml"]
)
def test_a_missing_path_is_not_looked_up_on_the_hub(spec: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("kd.data.sources.load_hub", lambda *a: pytest.fail("asked the hub"))
    with pytest.raises(DataError, match="no such file or folder"):
        load_corpus(spec)


@pytest.mark.parametrize("spec", ["hf://bucket/a.jsonl", "https://me:secret@host/glue/sst2?key=secret", "gs://b/x"])
def test_text_at_an_address_is_refused_without_its_secrets(spec: str):
    for load in (load_corpus, load_classes):
        with pytest.raises(DataError, match="not from this address") as caught:
            load(spec)
        assert "secret" not in str(caught.value)
        assert str(caught.value.details["where"]).startswith(spec.partition("://")[0] + "://")


@pytest.mark.parametrize(
    "spec", ["x" * 300, ",".join("flan" * 30 + str(i) for i in range(3)), "a/" + "x" * 300 + ".jsonl"]
)
def test_a_spec_longer_than_a_file_name_is_an_error_in_words(spec: str) -> None:
    with pytest.raises(DataError):
        load_corpus(spec)


@pytest.mark.parametrize(("typo", "meant"), [("glue/sts2", "sst2"), ("glue/mrcp", "mrpc")])
def test_an_unknown_glue_task_suggests_the_nearest_and_asks_no_hub(
    typo: str, meant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("kd.data.sources.load_hub", lambda *a, **o: pytest.fail("asked the hub"))
    for load in (load_corpus, load_classes):
        with pytest.raises(DataError, match="unknown GLUE task") as caught:
            load(typo)
        assert caught.value.details["did you mean"] == meant
        assert caught.value.details["where"] == typo


def test_a_folder_below_glue_is_read_whatever_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "glue" / "sts2").mkdir(parents=True)
    (tmp_path / "glue" / "sts2" / "one.txt").write_text("A fox ran.\n", encoding="utf-8")
    assert [e.target.strip() for e in load_corpus("glue/sts2").examples] == ["A fox ran."]
