"""The sparsifier against a slow float64 twin that forms the full softmax."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch

from kd.cache_builder.store.encoding.rank_bands import LOG_MASS_FLOOR
from kd.cache_builder.store.targets import TargetConfig, band_edges
from kd.cache_builder.teacher.selection import draw
from kd.cache_builder.teacher.sparsify import (
    NOT_FINITE,
    TIED,
    Chunk,
    NonFiniteRow,
    Sparsifier,
    boundary_token_ids,
    uniforms_for,
)

V, N = 200, 24
GRIDS = [(1.0, 2.0, 4.0), (1.0, 1.5, 3.0), (0.5, 1.0), (1.0,), (0.25, 0.5, 1.0, 2.0, 8.0)]

CONFIGS = [
    TargetConfig(profile="full", top_k=10, samples=6, tail_bands=5),
    TargetConfig(top_k=10),
    TargetConfig.of_profile("sampled", samples=4),
    TargetConfig(top_k=10, tail_samples=30),
]

# float32 logits of size 10 carry 1e-6; sums of 200 terms and exp add a few of those
TOLERANCE = 1e-5


def logits_of(seed: int = 0, *, scale: float = 3.0, n: int = N, v: int = V) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, scale, (n, v)).astype(np.float32)


def full(**settings) -> TargetConfig:
    return TargetConfig(**{"profile": "full", "top_k": 10, "samples": 6, "tail_bands": 5, **settings})


def sparsify(
    logits: np.ndarray, config: TargetConfig, gold: np.ndarray | None = None, v: int = V, boundary=None
) -> Chunk:
    gold = np.arange(len(logits)) * 7 % v if gold is None else gold
    uniforms = uniforms_for(0, 0, len(logits), config.samples) if config.samples else None
    return Sparsifier(config, v, boundary)(torch.from_numpy(logits), torch.from_numpy(gold), uniforms)


def log_softmax(logits: np.ndarray, temperature: float = 1.0) -> np.ndarray:
    """The twin: float64, all of the vocabulary."""
    z = logits.astype(np.float64) / temperature
    z = z - z.max(axis=1, keepdims=True)
    return z - np.log(np.exp(z).sum(axis=1, keepdims=True))


@pytest.mark.parametrize("grid", GRIDS)
def test_log_z_is_the_log_normaliser_relative_to_the_top_at_every_temperature(grid):
    logits = logits_of()
    chunk = sparsify(logits, full(temperatures=grid))
    expected = np.stack([-log_softmax(logits, t).max(axis=1) for t in grid], axis=1)
    np.testing.assert_allclose(chunk.log_z.numpy(), expected, atol=TOLERANCE)


def test_doubling_and_other_grids_agree_where_they_meet():
    logits = logits_of(scale=20.0)
    a = sparsify(logits, full(temperatures=(1.0, 2.0, 4.0))).log_z.numpy()
    b = sparsify(logits, full(temperatures=(1.0, 4.0))).log_z.numpy()
    np.testing.assert_allclose(a[:, [0, 2]], b, atol=TOLERANCE)


def test_the_top_k_are_the_most_probable_tokens_in_order():
    logits = logits_of()
    chunk = sparsify(logits, full())
    order = np.argsort(-logits, axis=1)[:, :10]
    assert (chunk.token_ids.numpy() == order).all()
    expected = np.take_along_axis(logits.astype(np.float64), order, 1) - logits.max(1, keepdims=True)
    np.testing.assert_allclose(chunk.relative.numpy(), expected, atol=TOLERANCE)
    assert (chunk.relative.numpy()[:, 0] == 0).all()


@pytest.mark.parametrize("config", CONFIGS)
def test_marked_rows_are_those_that_need_a_wait_and_all_others_are_the_same(config: TargetConfig):
    logits, gold = logits_of(v=999), np.arange(N) * 40
    logits[3, 500], logits[8] = math.nan, -math.inf
    logits[11, gold[11]] = -math.inf
    logits[5, :30], logits[6, :10] = 50.0, 50.0  # too many equal at the k-th place; equal in front of it
    logits[7, :9], logits[7, [100, 200, 300]] = 60.0, 50.0  # three equal at the tenth
    uniforms = uniforms_for(0, 0, N, config.uniforms) if config.uniforms else None
    sparsifier = Sparsifier(config, 999)
    got = sparsifier.marked(torch.from_numpy(logits), torch.from_numpy(gold), uniforms)
    doubt = got.doubt.tolist()
    assert {r: d for r, d in enumerate(doubt) if d} == {3: NOT_FINITE, 8: NOT_FINITE, 11: NOT_FINITE} | (
        {5: TIED} if config.top_k else {}
    )
    for row in range(N):
        one = (torch.from_numpy(logits[[row]]), torch.from_numpy(gold[[row]]))
        part = None if uniforms is None else uniforms[[row]]
        if doubt[row] == NOT_FINITE:
            with pytest.raises(NonFiniteRow):
                sparsifier(*one, part)
        elif not doubt[row]:
            alone = sparsifier(*one, part)
            for name in (
                "log_z",
                "gold_rank",
                "token_ids",
                "relative",
                "tail_bands",
                "sample_ids",
                "sample_counts",
                "tail_draws",
            ):
                x, y = getattr(got, name), getattr(alone, name)
                assert (x is None) == (y is None)
                if x is not None:  # sums over a row taken in another order for another shape
                    torch.testing.assert_close(x[[row]], y, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("block_rows", [1, 5, N])
@pytest.mark.parametrize("config", CONFIGS)
def test_the_blocks_of_rows_change_nothing(config: TargetConfig, block_rows: int):
    logits = torch.from_numpy(np.round(logits_of(v=999)))  # ties in every row
    gold, uniforms = torch.arange(N) * 40, uniforms_for(0, 0, N, config.uniforms)
    a = Sparsifier(config, 999)(logits, gold, uniforms)
    b = Sparsifier(config, 999, block_rows=block_rows)(logits, gold, uniforms)
    for name in Chunk.__dataclass_fields__:
        x, y = getattr(a, name), getattr(b, name)
        # a sum may be taken in another order for another shape
        assert (x is None) == (y is None), name
        if x is not None:
            torch.testing.assert_close(x, y, rtol=0, atol=1e-6 if x.is_floating_point() else 0, msg=name)


@pytest.fixture
def three_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("config", CONFIGS)
def test_the_number_of_threads_changes_no_bit(config: TargetConfig, three_threads):
    logits, gold, uniforms = (
        torch.from_numpy(logits_of(v=999)),
        torch.arange(N) * 40,
        uniforms_for(0, 0, N, config.uniforms),
    )
    many = Sparsifier(config, 999, block_rows=5)(logits, gold, uniforms)
    torch.set_num_threads(1)
    one = Sparsifier(config, 999, block_rows=5)(logits, gold, uniforms)
    for name in Chunk.__dataclass_fields__:
        x, y = getattr(many, name), getattr(one, name)
        assert (x is None and y is None) or torch.equal(x, y), name


def test_of_several_bad_rows_the_first_is_reported_whichever_thread_sees_it_first(three_threads):
    logits = logits_of(v=999)
    for first, second in ((3, 20), (9, 13), (11, 12)):
        bad = logits.copy()
        bad[[first, second], 7] = math.nan
        with pytest.raises(NonFiniteRow) as caught:
            Sparsifier(TargetConfig(top_k=10), 999, block_rows=2)(
                torch.from_numpy(bad), torch.zeros(N, dtype=torch.long)
            )
        assert caught.value.row == first


@pytest.mark.parametrize("scale", [0.5, 3.0, 20.0])
def test_normalisers_of_a_real_vocabulary_are_those_of_float64(scale: float):
    logits = logits_of(n=6, v=50257, scale=scale)
    log_z = sparsify(logits, TargetConfig(top_k=10), v=50257).log_z.numpy()
    exact = np.stack([-log_softmax(logits, t).max(axis=1) for t in (1.0, 2.0, 4.0)], axis=1)
    # measured 6e-7 with torch's exp and numpy's alike; float32 holds a number up to 11 to within 4.8e-7
    np.testing.assert_allclose(log_z, exact, rtol=0, atol=1.5e-6)


def test_the_logits_are_left_as_they_were():
    logits = logits_of(v=999)
    before = logits.copy()
    sparsify(logits, TargetConfig(top_k=10), v=999)
    assert (logits == before).all()


@pytest.mark.parametrize("scale", [0.1, 20.0])
def test_ranks_within_and_beyond_the_kept_tokens_count_the_larger_logits(scale: float):
    logits = np.round(logits_of(v=999) * 8) / 8 * np.float32(scale)
    order = np.argsort(-logits, axis=1)
    for place in (0, 9, 10, 500, 998):
        gold = order[:, place]
        ranks = sparsify(logits, TargetConfig(top_k=10), gold, v=999).gold_rank.numpy()
        assert (ranks == (logits > logits[np.arange(N), gold][:, None]).sum(1)).all()


def test_gold_logprob_and_rank_are_those_of_the_full_softmax():
    logits, gold = logits_of(), np.arange(N) * 7 % V
    chunk = sparsify(logits, full(), gold)
    log_p = log_softmax(logits)
    rows = np.arange(N)
    np.testing.assert_allclose(chunk.gold_logprob.numpy(), log_p[rows, gold], atol=TOLERANCE)
    assert (chunk.gold_rank.numpy() == [(log_p[r] > log_p[r, gold[r]]).sum() for r in rows]).all()


def test_the_rank_of_the_most_probable_token_is_zero_even_when_tied():
    logits = np.zeros((1, V), dtype=np.float32)
    assert sparsify(logits, full(), np.array([17])).gold_rank.tolist() == [0]


def test_bands_hold_the_mass_of_their_ranks_at_each_temperature():
    logits = logits_of()
    config = full(band_temperatures=(1.0, 4.0))
    bands = sparsify(logits, config).tail_bands.numpy()
    edges = band_edges(10, V, 5)
    expected = []
    for t in (1.0, 4.0):
        p = -np.sort(-np.exp(log_softmax(logits, t)), axis=1)
        expected += [np.log(p[:, a:b].sum(1)) for a, b in pairwise(edges)]
    np.testing.assert_allclose(bands, np.stack(expected, axis=1), atol=TOLERANCE)


def test_top_k_and_bands_together_are_all_of_the_mass():
    logits = logits_of()
    chunk = sparsify(logits, full())
    kept = np.exp(chunk.relative.numpy() - chunk.log_z.numpy()[:, :1]).sum(1)
    np.testing.assert_allclose(kept + np.exp(chunk.tail_bands.numpy()).sum(1), 1, atol=TOLERANCE)


def test_empty_bands_are_at_the_floor():
    chunk = sparsify(logits_of(v=12), full(top_k=10, tail_bands=5), v=12)
    assert (chunk.tail_bands.numpy()[:, 2:] == LOG_MASS_FLOOR).all()
    assert (chunk.tail_bands.numpy()[:, :2] > LOG_MASS_FLOOR).all()


def test_the_boundary_is_the_mass_of_its_ids():
    logits = logits_of()
    ids = [0, 3, 5, 150]
    chunk = sparsify(logits, full(), boundary=torch.tensor(ids))
    expected = np.log(np.exp(log_softmax(logits))[:, ids].sum(1))
    np.testing.assert_allclose(chunk.boundary_logprob.numpy(), expected, atol=TOLERANCE)


def test_boundary_ids_start_with_white_space_or_are_special():
    vocabulary = [b"<s>", b"a", b" a", b"\n", b"a ", b"", b"\t\tb", "\u00e9".encode()]
    assert boundary_token_ids(vocabulary, {0}, torch.device("cpu")).tolist() == [0, 2, 3, 6]


def test_no_boundary_ids_is_no_mass():
    none = boundary_token_ids([b"a"] * V, set(), torch.device("cpu"))
    assert (sparsify(logits_of(), full(), boundary=none).boundary_logprob == LOG_MASS_FLOOR).all()


@pytest.mark.parametrize("shift", [1e4, -1e4])
def test_a_constant_added_to_all_logits_changes_nothing(shift: float):
    exact = np.round(logits_of() * 64) / 64  # so that adding 1e4 loses no bit in float32
    a, b = sparsify(exact, full()), sparsify((exact + np.float32(shift)).astype(np.float32), full())
    for name in ("log_z", "relative", "token_ids", "gold_logprob", "gold_rank", "sample_ids", "sample_counts"):
        assert torch.equal(getattr(a, name), getattr(b, name)), name


def test_padded_columns_are_ignored():
    logits = logits_of()
    padded = np.concatenate([logits, np.full((N, 56), 99.0, dtype=np.float32)], axis=1)
    a, b = sparsify(logits, full()), sparsify(padded, full())
    for name in Chunk.__dataclass_fields__:
        if getattr(a, name) is not None:
            assert torch.equal(getattr(a, name), getattr(b, name)), name


def test_rows_do_not_depend_on_their_neighbours():
    logits, gold = logits_of(), np.arange(N) * 7 % V
    whole = sparsify(logits, full(samples=0), gold)
    for r in range(0, N, 5):
        alone = sparsify(logits[r : r + 1], full(samples=0), gold[r : r + 1])
        assert torch.equal(alone.token_ids[0], whole.token_ids[r])
        # a sum may be taken in another order for another shape
        torch.testing.assert_close(alone.log_z[0], whole.log_z[r], rtol=0, atol=1e-6)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("column", [0, 3, V - 1])
def test_nan_and_infinity_are_reported_with_their_row(bad: float, column: int):
    logits = logits_of()
    logits[5, column] = bad
    with pytest.raises(NonFiniteRow) as caught:
        sparsify(logits, full())
    assert caught.value.row == 5


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("columns", [slice(0, 1), slice(996, 999), slice(None)])
def test_bad_rows_of_a_large_vocabulary_are_reported_whatever_their_block(bad: float, columns: slice):
    logits = logits_of(v=999)
    logits[[13, 20], columns] = bad
    for block_rows in (None, 1, 4):
        sparsifier = Sparsifier(TargetConfig(top_k=10), 999, block_rows=block_rows)
        gold = torch.full((N,), 500)
        if bad == -math.inf and columns != slice(None):  # padding that a model masks is no error
            sparsifier(torch.from_numpy(logits), gold)
            continue
        with pytest.raises(NonFiniteRow) as caught:
            sparsifier(torch.from_numpy(logits), gold)
        assert caught.value.row == 13


def test_a_kept_or_gold_token_at_minus_infinity_is_reported_and_others_are_not():
    logits, gold = logits_of(), np.zeros(N, dtype=np.int64)
    logits[:, 0] = 5.0
    logits[4, 100] = -math.inf
    sparsify(logits, full(), gold)
    gold[4] = 100
    with pytest.raises(NonFiniteRow) as caught:
        sparsify(logits, full(), gold)
    assert caught.value.row == 4
    logits[7, 5:] = -math.inf  # five finite logits, ten wanted
    with pytest.raises(NonFiniteRow) as caught:
        sparsify(logits, full(), np.zeros(N, dtype=np.int64))
    assert caught.value.row == 7


def test_half_precision_logits_are_computed_in_float32():
    logits = torch.from_numpy(logits_of()).bfloat16()
    gold = torch.zeros(N, dtype=torch.long)
    config = TargetConfig(top_k=10)
    a, b = Sparsifier(config, V)(logits, gold), Sparsifier(config, V)(logits.float(), gold)
    assert torch.equal(a.log_z, b.log_z)
    assert a.log_z.dtype == torch.float32


# draws


def test_each_draw_is_the_inverse_of_the_cumulative_sum():
    p = np.array([0.5, 0.25, 0.125, 0.125])
    uniforms = np.array([[0.0, 0.49, 0.51, 0.74, 0.76, 0.999]])
    ids, counts = draw(torch.from_numpy(np.log(p / 0.5))[None].float(), uniforms)
    # 0, 0 | 1, 1 | 2 | 3
    assert ids.tolist() == [[0, 1, 2, 3, 0, 0]]
    assert counts.tolist() == [[2, 2, 1, 1, 0, 0]]


def test_drawn_ids_are_unique_most_drawn_first_and_counts_sum_to_r():
    logits = logits_of(scale=1.0)
    chunk = sparsify(logits, full(samples=40))
    ids, counts = chunk.sample_ids.numpy(), chunk.sample_counts.numpy()
    assert (counts.sum(1) == 40).all()
    assert (np.diff(counts, axis=1) <= 0).all()
    for row_ids, row_counts in zip(ids, counts, strict=True):
        used = row_ids[row_counts > 0]
        assert len(set(used.tolist())) == len(used)
        assert (row_ids[row_counts == 0] == 0).all()


def test_draws_follow_the_distribution():
    logits = logits_of(n=1, v=8, scale=1.0)
    draws = 20_000
    ids, counts = draw(torch.from_numpy(logits - logits.max()), uniforms_for(3, 0, 1, draws))
    p = np.exp(log_softmax(logits))[0]
    seen = np.zeros(8)
    np.add.at(seen, ids[0].numpy(), counts[0].numpy())
    # five standard deviations of a binomial
    assert (np.abs(seen / draws - p) < 5 * np.sqrt(p * (1 - p) / draws)).all()


def test_impossible_tokens_are_never_drawn():
    logits = torch.full((1, 6), -torch.inf)
    logits[0, 2] = 0.0
    ids, counts = draw(logits, np.array([[0.0, 0.3, np.nextafter(1, 0)]]))
    assert (int(ids[0, 0]), int(counts[0, 0])) == (2, 3)


def test_uniforms_are_a_function_of_seed_and_example():
    a = uniforms_for(1, 7, 5, 3)
    assert (a == uniforms_for(1, 7, 5, 3)).all()
    assert (a[:2] == uniforms_for(1, 7, 2, 3)).all()  # a longer example begins alike
    assert not (a == uniforms_for(2, 7, 5, 3)).any()
    assert not (a == uniforms_for(1, 8, 5, 3)).any()
    assert a.min() >= 0
    assert a.max() < 1
