"""Caches whose tails are drawn beside their heads: everything that builds, reads, copies or trains from a cache takes them."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kd.cache_builder.look.token_views import token_views
from kd.cache_builder.store.readers.reader import CacheReader, quality_means
from kd.cache_builder.store.records.part import part_of
from kd.cache_builder.store.soft_targets import SoftTargets
from kd.cache_builder.store.targets import TargetConfig
from kd.cache_builder.upkeep.merge_caches import merge_caches
from kd.cache_builder.upkeep.redrawn_tails import StoredTail, redrawn, row_uniforms
from kd.cache_builder.upkeep.slice_cache import slice_cache
from kd.cache_builder.upkeep.verify import broken_promises, verify
from kd.common.errors import DataError
from kd.common.progress import final
from kd.student_trainer.batches.collate import Collator, loss_targets
from kd.student_trainer.batches.compatibility import as_read, needed_arrays, resolve_objective
from kd.student_trainer.configuration.learning_settings import LossSettings
from kd.student_trainer.losses.loss_registry import Objective

R = 30
KINDS: dict[str, dict[str, Any]] = {
    "kl": {"profile": "kl", "top_k": 6},
    "adaptive": {"profile": "adaptive", "top_k": 40, "min_probability": 0.02},
    "certain, in lists": {
        "profile": "adaptive",
        "top_k": 40,
        "min_probability": 0.02,
        "certain_below": 2.0,
        "min_k": 2,
        "id_codec": "followers",
    },
}


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory, text_file: Path) -> Path:
    """The beginning of the stories: two shards."""
    path = tmp_path_factory.mktemp("few") / "text.txt"
    path.write_text(text_file.read_text(encoding="utf-8")[:450], encoding="utf-8")
    return path


@pytest.fixture(scope="module", params=KINDS)
def drawn(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, few: Path, build_request, run_build
) -> Path:
    out = tmp_path_factory.mktemp("drawn") / "cache"
    run_build(build_request(out, text=few, tail_samples=R, **KINDS[request.param]))
    assert len(CacheReader(out).shards) == 2, "two builders need two"
    return out


def kind_of(root: Path) -> dict[str, Any]:
    config = CacheReader(root).config
    return KINDS["certain, in lists" if config.certain_below else config.profile]


def all_rows(root: Path, **options: Any) -> SoftTargets:
    reader = CacheReader(root, **options)
    return reader.read_rows(range(len(reader)))


def estimate(targets: SoftTargets, size: int) -> np.ndarray:
    """The rows that kept tokens and draws stand for, `[N, size]`."""
    assert targets.token_ids is not None
    assert targets.tail_ids is not None
    assert targets.tail_draws is not None
    p = np.zeros((len(targets), size))
    rows = np.arange(len(p))[:, None]
    kept = targets.padded(np.exp(targets.logprobs_at(1.0)), 0.0)
    np.add.at(p, (rows, targets.padded(targets.token_ids, 0.0)), kept)
    used = np.arange(targets.tail_ids.shape[1]) < targets.tail_draws[:, None]
    share = targets.tail_mass_at(1.0) / np.maximum(targets.tail_draws, 1)
    np.add.at(p, (rows, targets.tail_ids), used * share[:, None])
    return p


def sound(root: Path) -> bool:
    return final(verify(root)) == ()


def test_rows_of_one_token_are_there_where_rows_may_be_certain(drawn: Path):
    kept = all_rows(drawn).kept
    single = kept is not None and bool((kept == 1).any())
    assert single == bool(CacheReader(drawn).config.certain_below)


def test_a_row_draws_as_many_tokens_as_its_tail_asks_for(drawn: Path):
    reader, targets = CacheReader(drawn), all_rows(drawn)
    assert targets.tail_draws is not None
    mass = targets.tail_mass_at(1.0)
    asked = np.ceil(R * mass)
    border = np.abs(R * mass - np.round(R * mass)) < 0.05  # the mass is stored in float16, and counted before
    assert np.array_equal(targets.tail_draws[~border], asked[~border])
    assert np.abs(targets.tail_draws - asked).max() <= 1
    np.testing.assert_allclose(estimate(targets, reader.manifest.vocabulary_size).sum(1), 1.0, rtol=0, atol=1e-5)
    assert quality_means(reader.manifest)["tail_draws"] == pytest.approx(targets.tail_draws.mean())
    assert sound(drawn)


def test_the_head_is_that_of_a_cache_without_draws(drawn: Path, tmp_path: Path, few: Path, build_request, run_build):
    kind = kind_of(drawn)
    run_build(build_request(tmp_path / "plain", text=few, **kind))
    run_build(build_request(tmp_path / "none", text=few, tail_samples=0, **kind))
    for name in ("token_ids", "logprobs", "tail_odds", "gold_rank", "gold_logprob"):
        plain = (tmp_path / "plain" / "targets.zarr" / name).rglob("c.*")
        for path in plain:
            assert path.read_bytes() == (drawn / path.relative_to(tmp_path / "plain")).read_bytes(), name
    identities = [CacheReader(tmp_path / name).manifest for name in ("plain", "none")]
    assert identities[0].fingerprint == identities[1].fingerprint != CacheReader(drawn).manifest.fingerprint
    assert "tail_samples" not in identities[0].identity["targets"]


def test_two_builders_and_one_give_the_same_bytes(
    drawn: Path, tmp_path: Path, few: Path, build_request, run_build, tree
):
    kind = kind_of(drawn)
    for part in ((2, 2), (1, 2)):
        run_build(build_request(tmp_path / "c", text=few, tail_samples=R, shard=part, tokens_per_batch=128, **kind))
    assert tree(tmp_path / "c") == tree(drawn)


def test_fewer_tokens_than_are_stored_have_no_draws(drawn: Path):
    assert all_rows(drawn, top_k=2).tail_ids is None
    config = CacheReader(drawn).config
    assert as_read(config, 2).tail_samples == 0
    assert as_read(config, config.top_k) == as_read(config, None) == config
    with pytest.raises(DataError, match="cannot serve"):
        resolve_objective(as_read(config, 2), LossSettings("kl", "sampled"))


def test_damaged_draws_are_named(drawn: Path, tmp_path: Path):
    copy = shutil.copytree(drawn, tmp_path / "copy")
    for name in ("tail_ids", "tail_draws"):
        path = copy / "targets.zarr" / name / "c.0"
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    assert {finding.array for finding in final(verify(copy))} == {"tail_ids", "tail_draws"}


@pytest.mark.parametrize(
    ("broken", "problem"),
    [
        (lambda t: {"tail_ids": np.repeat(t.token_ids.reshape(-1)[t.most_probable][:, None], R, 1)}, "a kept token"),
        (lambda t: {"tail_ids": np.full_like(t.tail_ids, 10**6)}, "beyond the vocabulary"),
        (lambda t: {"tail_draws": np.zeros_like(t.tail_draws)}, "without a draw"),
    ],
)
def test_rows_that_no_teacher_draws_are_found(drawn: Path, broken: Any, problem: str):
    targets, size = all_rows(drawn), CacheReader(drawn).manifest.vocabulary_size
    assert not any(bad.any() for _, _, bad in broken_promises(targets, size))
    found = [text for text, _, bad in broken_promises(replace(targets, **broken(targets)), size) if bad.any()]
    assert len(found) == 1
    assert problem in found[0]


def test_a_slice_with_the_same_tokens_has_the_same_draws(drawn: Path, tmp_path: Path):
    whole, count = all_rows(drawn), len(CacheReader(drawn))
    list(slice_cache(drawn, tmp_path / "codec", logprob_codec="float16"))
    list(slice_cache(drawn, tmp_path / "a", examples=(0, 3)))
    list(slice_cache(drawn, tmp_path / "b", examples=(3, count)))
    list(merge_caches([tmp_path / "a", tmp_path / "b"], tmp_path / "both"))
    for name in ("codec", "both"):
        found = all_rows(tmp_path / name)
        for array in ("tail_ids", "tail_draws"):
            assert np.array_equal(getattr(found, array), getattr(whole, array))
        assert sound(tmp_path / name)


def test_a_slice_with_fewer_tokens_draws_again_from_the_stored_row(drawn: Path, tmp_path: Path, tree):
    options: dict[str, Any] = {"top_k": 2}
    steps = slice_cache(drawn, tmp_path / "slice", **options)
    next(steps)
    steps.close()
    list(slice_cache(drawn, tmp_path / "slice", **options))
    list(slice_cache(drawn, tmp_path / "again", **options))
    assert tree(tmp_path / "slice") == tree(tmp_path / "again")
    assert sound(tmp_path / "slice")
    whole, found, size = all_rows(drawn), all_rows(tmp_path / "slice"), CacheReader(drawn).manifest.vocabulary_size
    assert found.tail_draws is not None
    assert found.tail_draws.max() <= R
    before, after = estimate(whole, size), estimate(found, size)
    assert not after[before == 0].any()  # nothing that the cache did not have
    # each token is rounded to one draw more or less, of at most 1/R; the masses were stored again in float16
    assert np.abs(after - before).max() < 1.01 / R


def test_a_slice_may_hold_fewer_draws_and_none_and_not_more(drawn: Path, tmp_path: Path):
    list(slice_cache(drawn, tmp_path / "fewer", tail_samples=10))
    fewer = all_rows(tmp_path / "fewer")
    assert fewer.tail_draws is not None
    assert fewer.tail_draws.max() <= 10
    assert sound(tmp_path / "fewer")
    list(slice_cache(drawn, tmp_path / "none", tail_samples=0))
    assert all_rows(tmp_path / "none").tail_ids is None
    assert sound(tmp_path / "none")
    with pytest.raises(DataError, match="no more draws"):
        list(slice_cache(drawn, tmp_path / "more", tail_samples=R + 1))


def test_what_is_drawn_again_has_the_stored_row_as_its_mean():
    """Over m evenly spaced random numbers, as in `test_tail_draws`."""
    rng, m = np.random.default_rng(0), 4000
    ids, mass = np.arange(12), rng.dirichlet(np.full(12, 0.5)) * 0.4
    tail = StoredTail(np.broadcast_to(ids, (m, 12)), np.broadcast_to(mass, (m, 12)))
    found, counts = redrawn(tail, R, (np.arange(m) + 0.5) / m)
    assert set(counts.tolist()) == {12}
    mean = np.bincount(found[:, :12].ravel(), minlength=12) * 0.4 / 12 / m
    np.testing.assert_allclose(mean, mass, rtol=0, atol=2 / R / m)
    one, other = "1" * 64, "2" * 64
    assert np.array_equal(row_uniforms(one, 2, 0, 9)[4:], row_uniforms(one, 2, 4, 9))
    assert not np.isin(row_uniforms(one, 2, 0, 9), row_uniforms(other, 2, 0, 9)).any()


def test_kl_at_temperature_one_trains_from_the_draws_and_other_losses_from_the_head(drawn: Path):
    reader = CacheReader(drawn)
    config, manifest = reader.config, reader.manifest
    assert resolve_objective(config, LossSettings("kl")).tail == "sampled"
    for settings in (LossSettings("kl", temperature=2.0), LossSettings("reverse-kl"), LossSettings("jsd")):
        objective = resolve_objective(config, settings)
        assert objective.tail == "ghost"
        assert "tail_ids" not in needed_arrays(objective, manifest)
    assert {"tail_ids", "tail_draws", "token_ids"} <= set(needed_arrays(Objective("kl", "sampled"), manifest))
    assert "tail_draws" in part_of(manifest, arrays=["tail_ids"]).arrays
    examples = reader.read([2, 0, 1])
    targets = loss_targets(Collator(Objective("kl", "sampled"))(examples))
    logits = torch.randn(len(targets.gold_ids), manifest.vocabulary_size, dtype=torch.float64)
    gradient = logits.clone()
    Objective("kl", "sampled").gradient_(gradient, targets)
    p = np.concatenate([estimate(example.targets, manifest.vocabulary_size) for example in examples])
    # the stored probabilities are float32
    np.testing.assert_allclose(gradient, logits.softmax(1).numpy() - p, rtol=0, atol=1e-5)


def test_the_draws_of_a_token_are_shown(drawn: Path):
    reader = CacheReader(drawn)
    views = token_views(reader[0], reader.manifest, reader.vocabulary(), 3)
    draws = all_rows(drawn).tail_draws
    assert draws is not None
    assert [sum(one.draws or 0 for one in view.draws) for view in views] == draws[: len(views)].tolist()


@pytest.mark.parametrize(
    ("profile", "settings"),
    [("uld", {}), ("sampled", {}), ("full", {}), ("kl", {"samples": 3}), ("kl", {"tail_samples": -1})],
)
def test_settings_that_contradict_each_other_are_refused(profile: str, settings: dict[str, Any]):
    with pytest.raises(DataError):
        TargetConfig.of_profile(profile, **{"tail_samples": 5, **settings})
    assert TargetConfig.of_profile("full", samples=0, tail_samples=5).uniforms == 1
