"""A misspelled hub id is named with the one that this machine has fetched, without a request."""

from __future__ import annotations

from pathlib import Path

import pytest
from huggingface_hub import constants

from kd.common.strangers.hub_cache import nearest_cached
from kd.models.model_config import nearest_model


@pytest.fixture(autouse=True)
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("datasets--roneneldan--TinyStories", "models--openai-community--gpt2", "models--gpt2"):
        (tmp_path / name).mkdir()
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))


def test_the_nearest_id_of_the_kind_is_named() -> None:
    assert nearest_cached("datasets", "roneneldan/TinyStorys") == "roneneldan/TinyStories"
    assert nearest_cached("models", "openai-comunity/gpt2") == "openai-community/gpt2"
    assert nearest_cached("models", "roneneldan/TinyStorys") is None


def test_an_id_of_the_same_owner_alone_is_not_near_and_one_that_is_there_is_not_misspelled() -> None:
    assert nearest_cached("datasets", "roneneldan/Other") is None
    assert nearest_cached("datasets", "roneneldan/TinyStories") is None


def test_a_cache_that_is_not_there_names_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "nowhere"))
    assert nearest_cached("models", "gpt3") is None


def test_models_that_were_fetched_come_before_the_embedded_ones() -> None:
    assert nearest_model("openai-comunity/gpt2") == "openai-community/gpt2"
    assert nearest_model("dmo") == "demo"
