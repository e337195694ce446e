"""Caches whose rows differ in length: what a row keeps, and that everything that reads, copies or trains from a cache takes it."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import tensorstore
import torch

from kd.cache_builder.store.encoding.codecs import array_specs, decode, encode
from kd.cache_builder.store.readers.reader import CacheReader, quality_means
from kd.cache_builder.store.soft_targets import SoftTargets, concatenate, take_rows
from kd.cache_builder.store.targets import RawTargets, TargetConfig
from kd.cache_builder.upkeep.merge_caches import merge_caches
from kd.cache_builder.upkeep.slice_cache import slice_cache
from kd.cache_builder.upkeep.verify import verify
from kd.common.errors import CacheError, DataError
from kd.evaluation.measures.agreement import teacher_outcomes
from kd.student_trainer.batches.collate import Collator, loss_targets
from kd.student_trainer.losses.loss_registry import Objective

LEAST = 0.01


@pytest.fixture(scope="module")
def adaptive(tmp_path_factory: pytest.TempPathFactory, build_request, run_build) -> Path:
    out = tmp_path_factory.mktemp("adaptive") / "cache"
    run_build(build_request(out, profile="adaptive", top_k=40, min_probability=LEAST, min_k=2))
    return out


@pytest.fixture(scope="module")
def fixed(tmp_path_factory: pytest.TempPathFactory, build_request, run_build) -> Path:
    """The same text and teacher with forty tokens in every row."""
    out = tmp_path_factory.mktemp("fixed") / "cache"
    run_build(build_request(out, profile="kl", top_k=40))
    return out


def all_rows(root: Path, **options: Any) -> SoftTargets:
    reader = CacheReader(root, **options)
    return reader.read_rows(range(len(reader)))


def array(root: Path, name: str) -> np.ndarray:
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(root / "targets.zarr" / name)}}
    return np.asarray(tensorstore.open(spec, open=True).result().read().result())


def attributes(root: Path, name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((root / "targets.zarr" / name / "zarr.json").read_text())["attributes"]
    return found


def whole_rows(logits: np.ndarray, grid: tuple[float, ...]) -> RawTargets:
    """Every token of rows of logits `[n, V]`; the text's token is token 0."""
    order = np.argsort(-logits, axis=1, kind="stable")
    relative = np.take_along_axis(logits, order, 1) - logits.max(1, keepdims=True)
    log_z = np.stack([np.log(np.exp(relative / t).sum(1)) for t in grid], axis=1)
    return RawTargets(
        gold_ids=np.zeros(len(logits), dtype=np.int64),
        log_z=log_z.astype(np.float32),
        gold_logprob=(logits[:, 0] - logits.max(1) - log_z[:, 0]).astype(np.float32),
        gold_rank=(order == 0).argmax(axis=1),
        byte_end=np.arange(1, len(logits) + 1),
        token_ids=order,
        relative=relative.astype(np.float32),
    )


def rows_of(values: np.ndarray | None, targets: SoftTargets) -> list[np.ndarray]:
    assert values is not None
    assert targets.kept is not None
    return np.split(values, np.cumsum(targets.kept)[:-1])


def test_a_row_keeps_the_tokens_above_the_probability(adaptive: Path, fixed: Path):
    found, whole = all_rows(adaptive), all_rows(fixed)
    assert found.kept is not None
    assert len(set(found.kept.tolist())) > 5  # rows do differ
    probabilities = np.exp(whole.logprobs_at(1.0))
    # the build compares exact probabilities, this test decoded ones: points of `graded` are 5 % apart there
    surely, perhaps = (probabilities >= LEAST * factor for factor in (1.04, 0.96))
    lengths = np.clip(found.kept, 2, 40)
    assert np.array_equal(lengths, found.kept)
    assert (np.maximum(surely.sum(1), 2) <= lengths).all()
    assert (lengths <= np.maximum(perhaps.sum(1), 2)).all()
    for ids, logprobs, row in zip(
        rows_of(found.token_ids, found), rows_of(found.logprobs, found), range(len(found)), strict=True
    ):
        assert whole.token_ids is not None
        assert whole.logprobs is not None
        assert np.array_equal(ids, whole.token_ids[row, : len(ids)])
        # the same steps; the normaliser is worked out from another tail, in float16: 2^-11 of a logarithm of a few nats
        np.testing.assert_allclose(logprobs, whole.logprobs[row, : len(ids)], rtol=0, atol=2e-3)


def test_kept_mass_and_tail_are_one_at_every_temperature(adaptive: Path):
    targets = all_rows(adaptive)
    for temperature in targets.temperatures:
        kept = targets.row_sums(np.exp(targets.logprobs_at(temperature)))
        np.testing.assert_allclose(kept + targets.tail_mass_at(temperature), 1.0, rtol=0, atol=1e-5)  # float32 sums


def test_the_tail_is_that_of_the_teacher(adaptive: Path, fixed: Path):
    """What the longer rows keep beyond the shorter ones is in the tail of these, at every temperature."""
    found, whole = all_rows(adaptive), all_rows(fixed)
    assert found.kept is not None
    for temperature in found.temperatures:
        mass = np.exp(whole.logprobs_at(temperature))
        beyond = np.where(np.arange(mass.shape[1]) >= found.kept[:, None], mass, 0.0).sum(1)
        expected = beyond + whole.tail_mass_at(temperature)
        # `graded` moves a value by up to 3 %
        np.testing.assert_allclose(found.tail_mass_at(temperature), expected, rtol=0.02, atol=1e-4)


@pytest.mark.parametrize("codec", ["graded", "graded-fine", "graded-coarse", "float16", "float32"])
def test_a_threshold_below_every_token_is_the_whole_row(codec: str):
    """With K = V and next to no threshold, an adaptive row is stored as a fixed one, to the last bit."""
    logits = np.random.default_rng(0).normal(0, 2, (50, 12))
    grid = (1.0, 1.5, 2.0, 4.0)
    even = TargetConfig(top_k=12, temperatures=grid, logprob_codec=codec)
    flat = TargetConfig("adaptive", 12, temperatures=grid, logprob_codec=codec, min_probability=1e-30)
    raw = whole_rows(logits, grid)
    stored = [encode(raw, config)[0] for config in (even, flat)]
    assert set(stored[1]["kept"].tolist()) == {12}
    for name in ("token_ids", "logprobs"):
        assert np.array_equal(stored[1][name].reshape(50, 12), stored[0][name])
    expected, found = (decode(arrays, config) for arrays, config in zip(stored, (even, flat), strict=True))
    # in float32 the sum of twelve powers is taken in another order
    np.testing.assert_allclose(found.log_z, expected.log_z, rtol=0, atol=1e-6)
    np.testing.assert_allclose(found.logprobs_at(1.0).reshape(50, 12), expected.logprobs_at(1.0), rtol=0, atol=1e-6)


def test_fewer_tokens_can_be_handed_out_than_are_stored(adaptive: Path):
    whole, cut = all_rows(adaptive), all_rows(adaptive, top_k=3)
    assert whole.kept is not None
    assert cut.kept is not None
    assert np.array_equal(cut.kept, np.minimum(whole.kept, 3))
    for few, many in zip(rows_of(cut.token_ids, cut), rows_of(whole.token_ids, whole), strict=True):
        assert np.array_equal(few, many[:3])
    kept = cut.row_sums(np.exp(cut.logprobs_at(1.0)))
    np.testing.assert_allclose(kept + cut.tail_mass_at(1.0), 1.0, rtol=0, atol=1e-6)


def test_ranges_of_rows_are_cut_and_joined(adaptive: Path):
    reader = CacheReader(adaptive)
    whole = all_rows(adaptive)
    joined = concatenate([take_rows(whole, slice(0, 7)), take_rows(whole, slice(7, len(whole)))])
    examples = concatenate([example.targets for example in reader.read(range(len(reader)))])
    for part in (joined, examples):
        for name in ("token_ids", "logprobs", "kept", "log_z", "gold_ids"):
            assert np.array_equal(getattr(part, name), getattr(whole, name))
    assert "kept=[" in repr(whole)


def test_a_reader_without_our_code_agrees(adaptive: Path):
    """tensorstore, JSON, and docs/cache-format.md."""
    manifest = json.loads((adaptive / "manifest.json").read_text())
    chunk_rows, width = manifest["layout"]["chunk_rows"], 40
    kept = array(adaptive, "kept").astype(np.int64)
    steps = array(adaptive, "logprobs").astype(np.int64).reshape(-1, chunk_rows * width)
    scale = np.array(attributes(adaptive, "logprobs")["scale"])
    odds = array(adaptive, "tail_odds").astype(np.float64)[:, 0]
    expected = []
    for shard, rows in enumerate(pq.read_table(adaptive / "shards.parquet")["rows"].to_pylist()):
        first = shard * manifest["layout"]["shard_rows"]
        for row in range(first, first + rows):
            chunk = row // chunk_rows
            start = int(kept[chunk * chunk_rows : row].sum())
            values = -scale[np.cumsum(steps[chunk, start : start + kept[row]])]
            expected.append(values - np.log(np.exp(values).sum()) - np.log1p(np.exp(odds[row])))
    found = all_rows(adaptive)
    for ours, theirs in zip(rows_of(found.logprobs, found), expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=4e-6)  # ours is computed in float32


def test_it_is_sound_and_its_damage_is_found(adaptive: Path, tmp_path: Path):
    *_, last = verify(adaptive)
    assert last.result == ()
    copy = shutil.copytree(adaptive, tmp_path / "copy")
    for name in ("kept", "token_ids", "logprobs"):
        path = copy / "targets.zarr" / name / "c.0"
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    *_, last = verify(copy)
    assert {finding.array for finding in last.result} == {"kept", "token_ids", "logprobs"}


def test_slices_of_it_and_into_it(adaptive: Path, fixed: Path, tmp_path: Path):
    """A slice of the fixed cache keeps what the build keeps, but for probabilities that rounding moves over the border."""
    made = tmp_path / "slice"
    list(slice_cache(fixed, made, profile="adaptive", min_probability=LEAST, min_k=2))
    found, built = all_rows(made), all_rows(adaptive)
    assert found.kept is not None
    assert built.kept is not None
    assert (found.kept != built.kept).mean() < 0.2
    same = found.kept == built.kept
    np.testing.assert_allclose(found.log_z[same], built.log_z[same], rtol=0, atol=0.02)
    list(slice_cache(adaptive, tmp_path / "higher", min_probability=0.05, top_k=5, logprob_codec="float16"))
    higher = all_rows(tmp_path / "higher")
    assert higher.kept is not None
    assert (higher.kept <= np.minimum(built.kept, 5)).all()
    kept = higher.row_sums(np.exp(higher.logprobs_at(1.0)))
    np.testing.assert_allclose(kept + higher.tail_mass_at(1.0), 1.0, rtol=0, atol=1e-5)
    for folder in ("slice", "higher"):
        *_, last = verify(tmp_path / folder)
        assert last.result == ()
    for options in ({"profile": "kl"}, {"min_probability": 0.001}, {"min_k": 3}):
        with pytest.raises(DataError):
            list(slice_cache(adaptive, tmp_path / "never", **options))


@pytest.mark.parametrize("options", [{"top_k": 20}, {"top_k": 1}, {"logprob_codec": "float32"}])
def test_a_slice_with_its_threshold_keeps_every_token_that_fits(
    adaptive: Path, tmp_path: Path, options: dict[str, Any]
):
    """Decoded probabilities lie on both sides of the threshold of the exact ones; that must not move tokens out."""
    whole = all_rows(adaptive)
    assert whole.kept is not None
    assert whole.row_sums(np.exp(whole.logprobs_at(1.0)) < LEAST).sum() > len(whole) / 20  # there are such tokens
    list(slice_cache(adaptive, tmp_path / "slice", **options))
    found = all_rows(tmp_path / "slice")
    assert found.kept is not None
    assert np.array_equal(found.kept, np.minimum(whole.kept, options.get("top_k", 40)))


def test_two_of_them_are_merged(adaptive: Path, tmp_path: Path):
    for first, stop in ((0, 3), (3, len(CacheReader(adaptive)))):
        list(slice_cache(adaptive, tmp_path / str(first), examples=(first, stop)))
    list(merge_caches([tmp_path / "0", tmp_path / "3"], tmp_path / "both"))
    whole, both = all_rows(adaptive), all_rows(tmp_path / "both")
    for name in ("token_ids", "logprobs", "kept", "log_z"):
        assert np.array_equal(getattr(both, name), getattr(whole, name))


def test_training_reads_flat_rows_and_weighs_them_as_padded_ones(adaptive: Path):
    """The loss of a batch equals that of the same rows given one by one."""
    reader = CacheReader(adaptive)
    batch = Collator(Objective("kl"))(reader.read([2, 0, 1]))
    assert batch["token_ids"].ndim == 1
    targets = loss_targets(batch)
    logits = torch.randn(len(targets.gold_ids), reader.manifest.vocabulary_size)
    total, *_ = Objective("kl")(logits, targets)
    rows = 0
    for number in (2, 0, 1):
        part = loss_targets(Collator(Objective("kl"))(reader.read([number])))
        alone, *_ = Objective("kl")(logits[rows : rows + len(part.gold_ids)], part)
        torch.testing.assert_close(total[rows : rows + len(part.gold_ids)], alone)
        rows += len(part.gold_ids)


def test_what_its_rows_hold_is_summed_up(adaptive: Path):
    targets, means = all_rows(adaptive), quality_means(CacheReader(adaptive).manifest)
    assert targets.kept is not None
    assert means["tokens_kept"] == pytest.approx(targets.kept.mean())
    assert targets.logprobs is not None
    assert means["mass_kept"] == pytest.approx(targets.row_sums(np.exp(targets.logprobs)).mean(), abs=1e-3)
    log_p, rest = teacher_outcomes(targets, 1.0, 10**6)
    assert np.exp(log_p).sum(1) + rest == pytest.approx(1.0, abs=1e-5)


def test_lengths_that_no_row_can_have_are_refused(adaptive: Path, tmp_path: Path):
    from kd.cache_builder.store.chunks import decode_entries
    from kd.cache_builder.store.records.manifest import load_manifest

    manifest = load_manifest(adaptive)
    spec = next(a for a in manifest.arrays if a.name == "token_ids")
    data = (adaptive / "targets.zarr" / "token_ids" / "c.0").read_bytes()
    for kept in (0, 41):
        with pytest.raises(CacheError, match="length is out of bounds"):
            decode_entries(data, spec, manifest.layout, np.array([3, kept]))


@pytest.mark.parametrize(
    ("profile", "settings"),
    [
        ("kl", {"min_probability": 0.1}),
        ("kl", {"min_k": 3}),
        ("adaptive", {"min_probability": 0.0}),
        ("adaptive", {"min_probability": 1.0}),
        ("adaptive", {"min_k": 0}),
        ("adaptive", {"min_k": 129}),
        ("kl", {"certain_below": 0.1}),
        ("adaptive", {"certain_below": -0.1}),
        ("adaptive", {"certain_below": math.inf}),
        ("adaptive", {"logprob_codec": "linear8"}),
    ],
)
def test_settings_that_contradict_each_other_are_refused(profile: str, settings: dict[str, Any]):
    with pytest.raises(DataError):
        TargetConfig.of_profile(profile, **settings)


def test_other_profiles_have_the_identity_they_had():
    assert not {"min_probability", "min_k"} & set(TargetConfig.of_profile("kl").identity)
    assert TargetConfig.of_profile("adaptive").identity["min_probability"] == 0.002
    names = [spec.name for spec in array_specs(TargetConfig.of_profile("adaptive"), 100, 3) if spec.ragged]
    assert names == ["token_ids", "logprobs"]
