"""What follows where a teacher gave log-probabilities alone: one temperature, the tail as one band, unknown weights."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kd.cache_builder.build.request import GivenTeacher
from kd.cache_builder.share.dataset_card import dataset_card
from kd.cache_builder.store.readers.reader import CacheReader
from kd.cache_builder.store.records.manifest import MANIFEST, fingerprint_of, load_manifest
from kd.cache_builder.store.records.teacher_record import GIVEN, LOGPROBS, UNKNOWN, WEIGHTS, refuse_beyond_logprobs
from kd.cache_builder.store.targets import TargetConfig
from kd.cache_builder.upkeep.summary import cache_summary
from kd.common.errors import CacheDamageError, DataError
from kd.common.files import canonical_json, digest_of
from kd.common.settings import make
from kd.models.loading import load_model
from kd.models.model_config import load_request_tokenizer
from kd.student_trainer.batches.collate import teacher_groups
from kd.student_trainer.batches.compatibility import resolve_objective
from kd.student_trainer.configuration.learning_settings import LossSettings
from kd.student_trainer.configuration.train_config import TrainConfig
from kd.student_trainer.prepare import prepare

ALONE = TargetConfig(top_k=8, temperatures=(1.0,))


@dataclass(frozen=True)
class Reticent(GivenTeacher):
    """A teacher of which only log-probabilities are known."""

    def identity(self) -> dict[str, Any]:
        return super().identity() | {GIVEN: LOGPROBS, WEIGHTS: UNKNOWN, "id": "v1"}


@pytest.fixture(scope="module")
def reticent(tmp_path_factory: pytest.TempPathFactory, build_request, run_build) -> Path:
    out = tmp_path_factory.mktemp("caches") / "reticent"
    request = build_request(out, temperatures=(1.0,))
    given = Reticent(load_model(request.teacher), load_request_tokenizer(request.teacher), "digest")
    run_build(replace(request, given=given))
    return out


@pytest.fixture(scope="module")
def banded(tmp_path_factory: pytest.TempPathFactory, build_request, run_build) -> Path:
    """The same rows from a teacher that gave its logits, with one band for all of the tail."""
    out = tmp_path_factory.mktemp("caches") / "banded"
    run_build(build_request(out, profile="full", tail_bands=1, samples=1, temperatures=(1.0,)))
    return out


def losses(loss: str, temperature: float) -> LossSettings:
    return make(LossSettings, {"loss": loss, "temperature": temperature})


@pytest.mark.parametrize("loss", ["kl", "reverse-kl", "jsd", "uld", "hybrid", "alm"])
def test_every_loss_serves_temperature_1_and_no_other(loss: str):
    objective = resolve_objective(ALONE, losses(loss, 1.0), logprobs_only=True)
    assert objective.temperature == 1.0
    with pytest.raises(DataError, match="only be used at temperature 1") as error:
        resolve_objective(ALONE, losses(loss, 2.0), logprobs_only=True)
    assert "all of its logits" in str(error.value)


def test_rows_that_end_at_different_ranks_have_one_tail_band_too():
    config = TargetConfig.of_profile("adaptive", temperatures=(1.0,))
    assert resolve_objective(config, losses("uld", 1.0), logprobs_only=True).loss == "uld"


def test_a_teacher_with_logits_still_needs_stored_bands():
    with pytest.raises(DataError, match="cannot serve --loss uld"):
        resolve_objective(ALONE, losses("uld", 1.0))


@pytest.mark.parametrize(
    ("targets", "found"),
    [
        ({"temperatures": (1.0, 2.0)}, "--temperatures 1,2"),
        ({"profile": "uld", "tail_bands": 2, "temperatures": (1.0,)}, "--tail-bands 2"),
        ({"profile": "full", "samples": 3, "temperatures": (1.0,)}, "--samples 3"),
        ({"profile": "sampled", "top_k": 0, "samples": 3, "temperatures": (1.0,)}, "--profile sampled"),
    ],
)
def test_what_does_not_follow_from_log_probabilities_is_refused(targets: dict[str, Any], found: str):
    with pytest.raises(DataError, match="and no logits") as error:
        refuse_beyond_logprobs(TargetConfig(**targets), "teacher")
    assert found in str(error.value)


def test_profile_uld_without_bands_is_allowed():
    refuse_beyond_logprobs(TargetConfig(profile="uld", temperatures=(1.0,)), "teacher")


def test_summary_and_card_say_what_is_not_known(reticent: Path, cache: Path):
    summary = cache_summary(reticent)
    assert (summary["logprobs_only"], summary["weights_unknown"], summary["teacher_id"]) == (True, True, "v1")
    card = dataset_card(reticent, "hf://someone/cache")
    assert "could not be digested; v1, as stated" in card
    assert "1 only (the teacher gave log-probabilities" in card
    assert "could not be digested" not in dataset_card(cache, "hf://someone/cache")


def test_a_manifest_that_claims_another_temperature_is_damaged(reticent: Path, tmp_path: Path):
    document = json.loads((reticent / MANIFEST).read_text())
    document["identity"]["targets"]["temperatures"] = [1.0, 2.0]
    document["fingerprint"] = fingerprint_of(document["identity"])
    del document["checksum"]
    text = canonical_json(document | {"checksum": digest_of(document)})
    (tmp_path / MANIFEST).write_text(text)
    with pytest.raises(CacheDamageError, match="manifest"):
        load_manifest(tmp_path)


def test_the_tail_as_one_band_is_the_band_that_logits_give(reticent: Path, banded: Path):
    ours, theirs = (CacheReader(path)[0].targets for path in (reticent, banded))
    ranges = np.stack([np.arange(len(ours)), np.arange(len(ours)) + 1], axis=1)
    needs = ("logprobs", "bands")
    ours_at, theirs_at = (teacher_groups(t, ranges, 1.0, needs)["bands"] for t in (ours, theirs))
    # both sides keep the mass of the tail as float16 logarithms, of about 1e-3 relative
    np.testing.assert_allclose(np.exp(ours_at), np.exp(theirs_at), rtol=5e-3, atol=1e-6)


def test_training_with_uld_makes_the_whole_tail_one_band(reticent: Path, tmp_path: Path):
    settings = {"student": "demo", "cache": str(reticent), "out": str(tmp_path / "run"), "loss": "uld"}
    prepared = prepare(make(TrainConfig, settings))
    size = prepared.reader.manifest.vocabulary_size
    assert prepared.collator.objective.settings.edges == (8, size)
    batch = prepared.collator(prepared.reader.read([0, 1]))
    assert batch["group_bands"].shape == (len(batch["group_first"]), 1)
    with pytest.raises(DataError, match="rank bands begin where the stored top-k ends"):
        prepare(make(TrainConfig, settings | {"top_k": 4}))
