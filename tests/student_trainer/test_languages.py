"""Students of encoder-decoder teachers that write languages: the same template, or another loss, or an error."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny_families import FAMILIES, family_folder
from transformers import AutoModelForSeq2SeqLM

from kd.cache_builder.build.build_settings import BuildSettings
from kd.cache_builder.build.from_settings import build_of
from kd.common.errors import CacheMismatchError, DataError
from kd.common.settings import make
from kd.models.families.encoder_layout import encoder_layout
from kd.models.model_config import load_config, load_request_tokenizer
from kd.models.model_request import ModelRequest

LANGUAGES = FAMILIES["mbart50"][2]


@pytest.fixture(scope="session")
def mbart_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return family_folder("mbart50", tmp_path_factory.mktemp("mbart50"))


@pytest.fixture(scope="session")
def french_cache(tmp_path_factory: pytest.TempPathFactory, mbart_dir: Path) -> str:
    folder = tmp_path_factory.mktemp("french")
    spec, out = folder / "pairs.jsonl", folder / "cache"
    rows = [("a cat", "the bananas"), ("a hat and a cat", "than"), ("the cat", "a"), ("hats", "the cat and a hat")]
    spec.write_text("".join(json.dumps({"prompt": p, "target": t}) + "\n" for p, t in rows))
    values = {"teacher": str(mbart_dir), "spec": str(spec), "out": str(out), "device": "cpu", "top_k": 88}
    build_of(make(BuildSettings, values | LANGUAGES | {"profile": "full", "reuse": False, "logprob_codec": "float32"}))
    return str(out)


def test_the_teacher_itself_has_nothing_to_learn(run, french_cache: str, mbart_dir: Path) -> None:
    finished = run(cache=french_cache, student=str(mbart_dir), loss="kl", max_steps=1, **LANGUAGES)
    assert abs(finished.records[0].kd) < 1e-5  # float32
    assert finished.records[0].ce > 0.5


def test_a_student_of_another_template_is_refused(run, french_cache: str, mbart_dir: Path) -> None:
    german = {"source_lang": "de_DE", "target_lang": "de_DE"}
    with pytest.raises(CacheMismatchError, match="special tokens"):
        run(cache=french_cache, student=str(mbart_dir), loss="kl", max_steps=1, **german)
    with pytest.raises(DataError, match="was not named"):
        run(cache=french_cache, student=str(mbart_dir), loss="kl", max_steps=1)


def test_a_run_s_model_knows_its_languages_and_its_forced_beginning(run, french_cache: str, mbart_dir: Path) -> None:
    finished = run(cache=french_cache, student=str(mbart_dir), loss="kl", max_steps=2, packing=False, **LANGUAGES)
    request = ModelRequest(str(finished.out), device="cpu")
    tokenizer = load_request_tokenizer(request)
    assert (tokenizer.src_lang, tokenizer.tgt_lang) == ("fr_XX", "de_DE")
    layout = encoder_layout(load_config(request), tokenizer)
    assert layout is not None
    generation = AutoModelForSeq2SeqLM.from_pretrained(finished.out).generation_config
    assert (generation.forced_bos_token_id,) == layout.target_before
    assert generation.decoder_start_token_id == 2


@pytest.mark.parametrize("loss", ["uld", "alm", "ce"])
def test_a_causal_student_and_one_with_other_languages_learn_from_the_text(
    run, french_cache: str, mbart_dir: Path, student_dir: Path, loss: str
) -> None:
    causal = run("causal", cache=french_cache, student=str(student_dir), loss=loss, max_steps=2)
    other = {"source_lang": "de_DE", "target_lang": "fr_XX"}
    german = run("german", cache=french_cache, student=str(mbart_dir), loss=loss, max_steps=2, **other)
    for finished in (causal, german):
        assert finished.records[-1].loss > 0


@pytest.mark.parametrize("loss", ["uld", "alm"])
def test_groups_of_the_teacher_s_own_text_are_its_rows(run, french_cache: str, mbart_dir: Path, loss: str) -> None:
    finished = run(cache=french_cache, student=str(mbart_dir), loss=loss, max_steps=1, alpha=1.0, **LANGUAGES)
    assert abs(finished.records[0].kd) < 1e-4
