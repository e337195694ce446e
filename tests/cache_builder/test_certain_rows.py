"""Rows whose teacher is certain keep one token and the tail; and rank bands of rows that differ in length."""

from __future__ import annotations

import itertools
import shutil
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kd.cache_builder.served.logprob_rows import TokenLogprobs, raw_targets
from kd.cache_builder.share.dataset_card import dataset_card
from kd.cache_builder.share.pull import pull
from kd.cache_builder.store.encoding.codecs import array_specs, decode, encode
from kd.cache_builder.store.readers.reader import CacheReader
from kd.cache_builder.store.row_figures import entropy_bounds, most_entropy
from kd.cache_builder.store.soft_targets import SoftTargets, take_rows
from kd.cache_builder.store.targets import TargetConfig, band_edges
from kd.cache_builder.upkeep.merge_caches import merge_caches
from kd.cache_builder.upkeep.promised_lengths import broken_lengths
from kd.cache_builder.upkeep.slice_cache import slice_cache
from kd.cache_builder.upkeep.summary import cache_summary
from kd.cache_builder.upkeep.verify import verify
from kd.common.errors import DataError
from kd.common.progress import final
from kd.student_trainer.batches.collate import loss_targets
from kd.student_trainer.batches.compatibility import resolve_objective
from kd.student_trainer.cache_dataset import CacheDataset
from kd.student_trainer.configuration.learning_settings import LossSettings
from kd.student_trainer.losses.loss_registry import LOSSES

LEAST = 0.01
VOCABULARY = 400
"""Entries of the vocabulary of the tests' teacher."""


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, build_request, run_build) -> Path:
    """Every token of every row, in float32."""
    out = tmp_path_factory.mktemp("whole") / "cache"
    run_build(build_request(out, top_k=VOCABULARY, logprob_codec="float32", layout=None))
    assert CacheReader(out).manifest.vocabulary_size == VOCABULARY
    return out


@pytest.fixture(scope="module")
def bound(whole: Path) -> float:
    """Nats below which a third of the rows lie."""
    return float(np.quantile(entropies(whole), 1 / 3))


@pytest.fixture(scope="module")
def by_position(tmp_path_factory: pytest.TempPathFactory, build_request, run_build, bound: float) -> Path:
    """Certain rows of one token, and rank bands."""
    out = tmp_path_factory.mktemp("certain") / "cache"
    settings = {"min_probability": LEAST, "certain_below": bound, "tail_bands": 6, "band_temperatures": (1.0, 2.0)}
    run_build(build_request(out, profile="adaptive", top_k=40, **settings))
    return out


@pytest.fixture(scope="module")
def adaptive_rows(by_position: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same without bands."""
    out = tmp_path_factory.mktemp("plain") / "cache"
    list(slice_cache(by_position, out, tail_bands=0))
    return out


def all_rows(root: Path, **options: Any) -> SoftTargets:
    reader = CacheReader(root, **options)
    return reader.read_rows(range(len(reader)))


def entropies(whole: Path) -> np.ndarray:
    """`[N]` float64, from every token: the slow twin."""
    log_p = all_rows(whole).logprobs_at(1.0)
    return np.asarray(-(np.exp(log_p) * log_p).sum(axis=1))


def test_the_rows_below_the_bound_keep_one_token_and_all_others_more(by_position: Path, whole: Path, bound: float):
    found, exact = all_rows(by_position), entropies(whole)
    assert found.kept is not None
    near = np.abs(exact - bound) < 1e-4  # float32 sums over the vocabulary
    assert near.sum() < 3
    assert np.array_equal((found.kept == 1)[~near], (exact < bound)[~near])
    assert 0.3 < (found.kept == 1).mean() < 0.36
    assert (found.kept[exact > bound + 1e-4] >= 2).all()


def test_their_tail_is_that_of_the_teacher_at_every_temperature(by_position: Path, whole: Path):
    found, every = all_rows(by_position), all_rows(whole)
    assert found.kept is not None
    assert found.token_ids is not None
    assert every.token_ids is not None
    top = found.most_probable
    assert np.array_equal(found.token_ids[top], every.token_ids[:, 0])
    certain = found.kept == 1
    for temperature in found.temperatures:
        expected = -np.expm1(every.logprobs_at(temperature)[certain, 0])
        # the odds are float16 logarithms, off by 2^-11 of a few nats
        np.testing.assert_allclose(found.tail_mass_at(temperature)[certain], expected, rtol=3e-3, atol=1e-6)
        kept = found.row_sums(np.exp(found.logprobs_at(temperature)))
        np.testing.assert_allclose(kept + found.tail_mass_at(temperature), 1.0, rtol=0, atol=1e-5)  # float32 sums


def test_bands_hold_the_ranks_beyond_what_each_row_keeps(by_position: Path, whole: Path):
    """The slow twin is every token of the row, in float64."""
    found, every = all_rows(by_position), all_rows(whole)
    assert found.kept is not None
    assert found.tail_bands is not None
    edges = band_edges(1, VOCABULARY, 6)
    assert CacheReader(by_position).config.edges(VOCABULARY) == edges
    for temperature in (1.0, 2.0):
        p = np.exp(every.logprobs_at(temperature))
        p[np.arange(VOCABULARY) < found.kept[:, None]] = 0.0
        expected = np.stack([p[:, low:high].sum(1) for low, high in itertools.pairwise(edges)], axis=1)
        bands = np.exp(found.tail_bands[:, found.band_index(temperature)].astype(np.float64))
        # float16 logarithms of up to 16 nats
        np.testing.assert_allclose(bands, expected, rtol=8e-3, atol=1e-6)
        np.testing.assert_allclose(bands.sum(1), found.tail_mass_at(temperature), rtol=8e-3, atol=1e-6)


def test_it_is_sound_and_wrong_lengths_and_bands_are_found(by_position: Path):
    *_, last = verify(by_position)
    assert last.result == ()
    targets, config = all_rows(by_position), CacheReader(by_position).config

    def broken(targets: SoftTargets, config: TargetConfig) -> dict[str, int]:
        return {name: int(bad.sum()) for name, _, bad in broken_lengths(targets, config, VOCABULARY)}

    assert set(broken(targets, config).values()) == {0}
    certain = int((targets.kept == 1).sum())  # type: ignore[union-attr]
    stricter = broken(targets, replace(config, certain_below=config.certain_below / 4))
    assert certain / 2 < sum(stricter.values()) <= certain
    assert broken(targets, replace(config, certain_below=0.0))["rows of fewer tokens than 2"] == certain
    assert targets.tail_bands is not None
    moved = replace(targets, tail_bands=targets.tail_bands + np.float32(0.5))
    assert broken(moved, config)["bands that do not hold the mass of the tail"] > len(targets) / 2


def test_how_many_rows_were_certain_is_said(by_position: Path, tmp_path: Path, bound: float):
    kept = all_rows(by_position).kept
    assert kept is not None
    summary = cache_summary(by_position)
    assert summary["certain_below"] == bound
    assert summary["rows_of_one_token"] == pytest.approx((kept == 1).mean())
    assert f"an entropy below {bound:g} nats: 33" in dataset_card(by_position, "hub://a/b")
    assert "one token below" in repr(CacheReader(by_position))
    for first, stop in ((0, 3), (3, len(CacheReader(by_position)))):
        list(slice_cache(by_position, tmp_path / str(first), examples=(first, stop)))
    list(merge_caches([tmp_path / "0", tmp_path / "3"], tmp_path / "both"))
    assert cache_summary(tmp_path / "both")["rows_of_one_token"] == pytest.approx((kept == 1).mean())
    whole, both = all_rows(by_position), all_rows(tmp_path / "both")
    for name in ("token_ids", "logprobs", "kept", "log_z", "tail_bands"):
        assert np.array_equal(getattr(both, name), getattr(whole, name))


@pytest.mark.parametrize("top_k", [VOCABULARY, 24])
def test_a_slice_calls_a_row_certain_only_where_it_surely_is(
    whole: Path, tmp_path: Path, by_position: Path, bound: float, top_k: int
):
    """With every token kept the bound is the entropy itself; otherwise fewer rows are certain, and never a wrong one."""
    list(slice_cache(whole, tmp_path / "few", top_k=top_k, logprob_codec="graded-fine"))
    list(
        slice_cache(tmp_path / "few", tmp_path / "cut", profile="adaptive", min_probability=LEAST, certain_below=bound)
    )
    found, exact, built = all_rows(tmp_path / "cut"), entropies(whole), all_rows(by_position)
    assert found.kept is not None
    assert built.kept is not None
    certain = found.kept == 1
    assert (exact[certain] < bound + 1e-3).all()  # `graded-fine` moves a log-probability by less than a thousandth
    assert certain.sum() > 5
    assert (certain.sum() - (built.kept == 1).sum() > -3) == (top_k == VOCABULARY)
    *_, last = verify(tmp_path / "cut")
    assert last.result == ()


def test_bands_can_be_left_out(adaptive_rows: Path, by_position: Path):
    plain, banded = all_rows(adaptive_rows), all_rows(by_position)
    assert plain.tail_bands is None
    assert plain.logprobs is not None
    assert np.array_equal(plain.logprobs, banded.logprobs)  # type: ignore[arg-type]


def test_a_slice_of_rows_with_bands_is_what_a_build_would_keep(by_position: Path, whole: Path, tmp_path: Path):
    """What a slice cuts goes into the bands of its rank."""
    list(slice_cache(by_position, tmp_path / "cut", min_probability=0.05, top_k=5))
    found, every = all_rows(tmp_path / "cut"), all_rows(whole)
    assert found.kept is not None
    assert found.kept.max() == 5
    assert found.tail_bands is not None
    p = np.exp(every.logprobs_at(1.0))
    p[np.arange(VOCABULARY) < found.kept[:, None]] = 0.0
    expected = np.stack([p[:, low:high].sum(1) for low, high in itertools.pairwise(band_edges(1, VOCABULARY, 6))], 1)
    # rounded twice, and `graded` moves a cut token by up to 3 %
    np.testing.assert_allclose(np.exp(found.tail_bands[:, 0].astype(np.float64)), expected, rtol=0.04, atol=1e-5)
    *_, last = verify(tmp_path / "cut")
    assert last.result == ()


@pytest.mark.parametrize(
    "options",
    [
        {"certain_below": 1e-3},  # fewer certain rows than the cache has
        {"tail_bands": 3},
        {"profile": "kl"},
        {"min_k": 3},
    ],
)
def test_slices_that_the_cache_does_not_hold_are_refused(by_position: Path, tmp_path: Path, options: dict[str, Any]):
    with pytest.raises(DataError):
        list(slice_cache(by_position, tmp_path / "never", **options))
    assert not (tmp_path / "never").exists()


def test_bands_keep_their_ranks_or_are_left_out(cache: Path, tmp_path: Path):
    """A cache of eight tokens and bands beyond them cannot tell the ranks from one to eight."""
    wanted: dict[str, Any] = {"profile": "adaptive", "min_probability": LEAST}
    with pytest.raises(DataError, match="rank bands begin where the shortest row ends"):
        list(slice_cache(cache, tmp_path / "never", tail_bands=4, **wanted))
    list(slice_cache(cache, tmp_path / "same", tail_bands=4, min_k=8, **wanted))  # then every row keeps eight
    assert np.array_equal(all_rows(tmp_path / "same").tail_bands, all_rows(cache).tail_bands)  # type: ignore[arg-type]
    list(slice_cache(cache, tmp_path / "plain", **wanted))
    assert all_rows(tmp_path / "plain").tail_bands is None


def test_with_every_rank_kept_there_is_nothing_in_the_bands():
    raw, config = (
        rows_of_logits(np.random.default_rng(0).normal(0, 2, (30, 12)), 12),
        TargetConfig.of_profile("adaptive", top_k=12, min_k=12, min_probability=0.5, tail_bands=3, temperatures=(1.0,)),
    )
    stored, _ = encode(raw, config, vocabulary_size=12)
    assert set(stored["kept"].tolist()) == {12}
    assert (stored["tail_bands"] == -60).all()
    assert decode(stored, config).tail_mass_at(1.0).max() < 1e-6


def rows_of_logits(logits: np.ndarray, k: int) -> Any:
    """The k most probable tokens of rows, as a served teacher gives them."""
    log_p = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    order = np.argsort(-log_p, axis=1)
    values = np.take_along_axis(log_p, order, 1)
    rows = TokenLogprobs(order[:, :k].astype(np.int32), values[:, :k], log_p[:, 0], (order == 0).argmax(1))
    config = TargetConfig.of_profile("adaptive", top_k=k, certain_below=0.5, temperatures=(1.0,))
    raw = raw_targets(
        [rows], np.zeros(len(logits), dtype=np.int64), np.arange(1, len(logits) + 1), config, logits.shape[1]
    )
    bands = np.full((len(logits), 3), -60.0, dtype=np.float32)
    return replace(raw, tail_bands=bands)


def test_of_a_served_teacher_the_most_that_the_entropy_can_be_decides():
    logits = np.random.default_rng(1).normal(0, 1, (400, 60))
    logits[:, 7] += np.linspace(2, 12, 400)  # more and more certain
    log_p = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    exact = -(np.exp(log_p) * log_p).sum(1)
    top = -np.sort(-log_p, axis=1)[:, :10]
    most = most_entropy(top, 60)
    assert (most >= exact - 1e-12).all()
    assert (most - exact).max() < 0.5
    assert np.allclose(most_entropy(-np.sort(-log_p, axis=1), 60), exact, rtol=0, atol=1e-12)
    config = TargetConfig.of_profile("adaptive", top_k=10, certain_below=0.5, temperatures=(1.0,), tail_bands=0)
    stored, quality = encode(replace(rows_of_logits(logits, 10), tail_bands=None), config)
    assert np.array_equal(stored["kept"] == 1, most < 0.5)
    assert quality["one_token"] == (most < 0.5).sum()
    least, _ = entropy_bounds(decode(stored, config), 60)
    assert (least[stored["kept"] == 1] < 0.5).all()


def test_the_bound_is_part_of_the_identity_only_where_it_is_set():
    plain, certain = (TargetConfig.of_profile("adaptive", certain_below=nats) for nats in (None, 0.1))
    assert "certain_below" not in plain.identity
    assert certain.identity == plain.identity | {"certain_below": 0.1, "min_k": 2}
    kept = next(spec for spec in array_specs(certain, 100) if spec.name == "kept")
    assert "1 where the entropy is below 0.1 nats" in str(kept.attributes["quantity"])


@pytest.mark.parametrize("loss", sorted(set(LOSSES) - {"ce"}))
def test_every_loss_takes_them_in_any_order_and_any_number(by_position: Path, model_dir: Path, loss: str):
    """The loss of a batch is the sum of those of its examples, each by itself; kernel and definition agree."""
    datasets = [CacheDataset(by_position, str(model_dir), loss=loss, batch_size=size, seed=1) for size in (4, 1)]
    many, single = (list(islice(dataset, 4 // size)) for dataset, size in zip(datasets, (4, 1), strict=True))
    vocabulary, objective = datasets[0].vocabulary_size, datasets[0].objective
    rows = len(many[0]["gold_ids"])
    logits = torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found, row, parts = logits.clone(), 0, []
    sums = objective.gradient_(found, loss_targets(many[0]))
    for batch in single:
        count = len(batch["gold_ids"])
        alone = logits[row : row + count].clone()
        parts.append(objective.gradient_(alone, loss_targets(batch)))
        # batches hold float32, and sums are taken in another order
        torch.testing.assert_close(found[row : row + count], alone, rtol=1e-6, atol=1e-9)
        row += count
    assert row == rows
    torch.testing.assert_close(torch.stack(parts).sum(0), sums, rtol=1e-6, atol=0)
    expected = logits.clone()
    torch.testing.assert_close(objective.autograd_gradient_(expected, loss_targets(many[0])), sums, rtol=1e-6, atol=0)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("loss", ["uld", "hybrid"])
def test_without_bands_a_loss_over_ranks_says_how_to_get_them(adaptive_rows: Path, model_dir: Path, loss: str):
    with pytest.raises(DataError, match="kd cache build --profile adaptive --tail-bands 16"):
        CacheDataset(adaptive_rows, str(model_dir), loss=loss)


def test_a_served_teacher_s_rows_have_one_band_each():
    """Everything beyond what a row keeps is one band, which begins at that row's end."""
    config = TargetConfig.of_profile("adaptive", temperatures=(1.0,), certain_below=0.1)
    found = resolve_objective(config, LossSettings(loss="uld"), edges=(1, VOCABULARY), logprobs_only=True)
    assert found.settings.edges == (1, VOCABULARY)
    with pytest.raises(DataError, match="cannot serve --loss uld"):
        resolve_objective(config, LossSettings(loss="uld"))


def test_a_copy_of_a_part_has_its_rows(by_position: Path, tmp_path: Path):
    """Lengths go with every copy; ids may stay away, as ranks do without them."""
    copy = tmp_path / "copy"
    final(pull(str(by_position), copy, examples=(2, 4), arrays=lambda manifest: ["logprobs", "tail_bands"]))
    *_, last = verify(copy)
    assert last.result == ()
    part, whole = (CacheReader(root).read_rows([2, 3]) for root in (copy, by_position))
    assert part.token_ids is None
    for name in ("kept", "logprobs", "tail_bands", "log_z"):
        assert np.array_equal(getattr(part, name), getattr(whole, name))
    nothing = take_rows(part, slice(3, 3))
    assert (len(nothing), nothing.kept.tolist(), nothing.logprobs.tolist()) == (0, [], [])  # type: ignore[union-attr]


def test_a_copy_of_it_without_its_lengths_is_refused(by_position: Path, tmp_path: Path):
    copy = shutil.copytree(by_position, tmp_path / "copy")
    for path in (copy / "targets.zarr" / "kept").glob("c.*"):
        path.unlink()
    *_, last = verify(copy)
    assert {finding.array for finding in last.result} == {"kept"}
