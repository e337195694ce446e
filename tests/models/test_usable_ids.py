"""A tokenizer with added tokens beyond a model's ids: the ids that texts use decide."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from evaluating import evaluated
from transformers import AutoTokenizer

from kd.cache_builder.build.build_settings import BuildSettings
from kd.cache_builder.build.from_settings import build_of
from kd.cache_builder.store.readers.reader import CacheReader
from kd.common.errors import DataError
from kd.common.settings import make
from kd.models.tokenizer import load_tokenizer, usable_ids, vocabulary_size
from kd.student_trainer.configuration.train_config import TrainConfig
from kd.student_trainer.training import train

EXTRA = "<|extra|>"


@pytest.fixture(scope="session")
def wide_dir(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny teacher with a token that it has no logit for."""
    folder = tmp_path_factory.mktemp("wide")
    shutil.copytree(model_dir, folder, dirs_exist_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"pad_token": EXTRA})
    tokenizer.save_pretrained(folder)
    return folder


def built(folder: Path, texts: list[str], out: Path, **settings: object) -> CacheReader:
    spec = out.with_suffix(".jsonl")
    spec.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    values = {"teacher": str(folder), "spec": str(spec), "out": str(out), "device": "cpu", "top_k": 8, "seq_len": 32}
    build_of(make(BuildSettings, values | {"reuse": False, "profile": "full"} | settings))
    return CacheReader(out)


TEXTS = ["The fox went down to the river and came back.", "The keeper counted seven ships on the sea."]


def test_ids_that_no_text_uses_do_no_harm(wide_dir: Path, model_dir: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(str(wide_dir))
    assert vocabulary_size(tokenizer) == 401
    assert usable_ids(tokenizer, 400, what="the teacher") == 400
    wide, plain = built(wide_dir, TEXTS, tmp_path / "wide"), built(model_dir, TEXTS, tmp_path / "plain")
    assert wide.manifest.vocabulary_size == len(wide.vocabulary()) == 400
    for ours, theirs in zip(wide.read(range(2)), plain.read(range(2)), strict=True):
        assert ours.input_ids.tolist() == theirs.input_ids.tolist()
        assert ours.targets.logprobs.tolist() == theirs.targets.logprobs.tolist()
    text = tmp_path / "wide.jsonl"
    reports = [evaluated(str(f), ["perplexity"], data=str(text), device="cpu") for f in (wide_dir, model_dir)]
    assert reports[0].tasks["perplexity"] == reports[1].tasks["perplexity"]
    for loss in ("kl", "uld", "hybrid"):
        values = {"cache": str(tmp_path / "plain"), "student": str(wide_dir), "out": str(tmp_path / loss)}
        result = train(make(TrainConfig, values | {"loss": loss, "max_steps": 1, "device": "cpu", "batch_size": 2}))
        assert result.steps == 1


def test_a_text_with_such_an_id_is_named(wide_dir: Path, tmp_path: Path) -> None:
    texts = [*TEXTS, f"{EXTRA} once more"]  # a control token at the beginning is read as one
    with pytest.raises(DataError, match="token that the model does not have") as caught:
        built(wide_dir, texts, tmp_path / "cache")
    assert "wide" not in str(caught.value)
    assert "id 400" in str(caught.value)
    text = tmp_path / "cache.jsonl"
    with pytest.raises(DataError, match="token that the model does not have"):
        evaluated(str(wide_dir), ["perplexity"], data=str(text), device="cpu")


def test_a_tokenizer_of_another_model_is_refused_as_before(model_dir: Path) -> None:
    with pytest.raises(DataError, match="fewer logits than its tokenizer has entries"):
        usable_ids(load_tokenizer(str(model_dir)), 399, what="the teacher")
