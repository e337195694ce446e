"""A teacher's answers in an object store: the bytes of a build in a folder, also after a stop and with two builders."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import kd
from kd.cache_builder.build import generate as generating
from kd.cache_builder.build.build_settings import RunningSettings
from kd.cache_builder.build.from_settings import build_request as build_of_request
from kd.cache_builder.build.object_store.s3_answers import S3AnswerFolder
from kd.cache_builder.build.object_store.s3_objects import S3Objects
from kd.cache_builder.build.request import GenerationConfig
from kd.common.errors import CacheMismatchError

URL = "s3://shared/runs/answers"
ALONE = RunningSettings(reuse=False)


@pytest.fixture
def asked(build_request, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Pairs that the teacher answers, in blocks of two."""
    pairs = tmp_path / "pairs.jsonl"
    rows = [f'{{"prompt": "The fox {word}", "target": "x"}}\n' for word in ("went", "saw", "ate", "had", "was")]
    pairs.write_text("".join(rows))
    monkeypatch.setattr(generating, "BLOCK", 2)
    return lambda out: replace(build_request(out, text=pairs), generation=GenerationConfig(max_new_tokens=6))


def stored() -> dict[str, bytes]:
    objects = S3Objects(URL)
    return {name: objects.get(name) or b"" for name in objects.sizes()}


def test_a_build_with_answers_that_stopped_has_the_bytes_of_one_in_a_folder(
    s3, home, asked, tree, tmp_path: Path, monkeypatch
) -> None:
    build_of_request(asked(tmp_path / "c"), ALONE)
    request = replace(asked(tmp_path / "unused"), url=URL)
    publish = S3AnswerFolder.publish

    def stop(self, number, ids, answers) -> None:
        if number == 1:
            raise KeyboardInterrupt
        publish(self, number, ids, answers)

    with monkeypatch.context() as patch:
        patch.setattr(S3AnswerFolder, "publish", stop)
        with pytest.raises(KeyboardInterrupt):
            build_of_request(request, ALONE)
    assert sorted(stored()) == ["generated/00000.parquet", "generated/request.json"]
    assert build_of_request(request, ALONE).complete
    assert stored() == tree(tmp_path / "c")
    with pytest.raises(CacheMismatchError, match="answers to something else"):
        build_of_request(replace(request, generation=GenerationConfig(max_new_tokens=5)), ALONE)


def test_the_answers_of_the_first_builder_are_those_of_all(s3, tmp_path: Path) -> None:
    one, two = (S3AnswerFolder(tmp_path / name, S3Objects(URL)) for name in ("one", "two"))
    for folder in (one, two):
        folder.path.mkdir()
        folder.claim({"prompts": "digest"})
    one.publish(0, ["a"], [("first", True)])
    two.publish(0, ["a"], [("second", True)])
    assert (two.path / "00000.parquet").read_bytes() == (one.path / "00000.parquet").read_bytes()


def test_build_cache_writes_to_a_store_and_opens_what_is_there(s3, home, model_dir: Path, tmp_path: Path) -> None:
    texts = ["The fox went down to the river.", "The keeper counted seven ships."]
    words: dict[str, Any] = {"texts": texts, "top_k": 8, "seq_len": 32, "device": "cpu", "reuse": False}
    there = kd.build_cache(str(model_dir), out=URL, **words)
    here = kd.build_cache(str(model_dir), out=tmp_path / "c", **words)
    assert there.manifest == here.manifest
    assert [there[n].target for n in range(2)] == texts
    assert there[1].targets.logprobs.tolist() == here[1].targets.logprobs.tolist()
