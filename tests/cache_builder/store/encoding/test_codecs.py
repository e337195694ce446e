"""Every codec: sorted, close, and with kept mass plus tail mass 1 at each temperature for what a reader decodes."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kd.cache_builder.store.encoding.arrays import id_dtype
from kd.cache_builder.store.encoding.codecs import array_specs, decode, encode
from kd.cache_builder.store.encoding.logprob_codecs import CODECS, Graded, graded_scale, power_sums
from kd.cache_builder.store.profiles import CODEC_NAMES, PROFILES
from kd.cache_builder.store.targets import RawTargets, TargetConfig
from kd.cache_builder.store.vocabulary import pack_rows, unpack_rows

GOLDEN_SCALES = {"graded": "55baec5e9bdea2ce", "graded-fine": "a1e6dba53e190588", "graded-coarse": "1a112be35ff8d33d"}
GRID = (1.0, 1.5, 2.0, 4.0)


def make_raw(logits: np.ndarray, k: int, *, ids: bool = True) -> RawTargets:
    """The slow way from float64 logits `[n, V]` to raw targets; gold is token 0."""
    logits = logits.astype(np.float64)
    order = np.argsort(-logits, axis=1, kind="stable")
    relative = np.take_along_axis(logits, order, 1)
    relative = relative - relative[:, :1]
    log_z = np.stack([np.log(np.exp(relative / t).sum(1)) for t in GRID], axis=1)
    rank = (order == 0).argmax(axis=1)
    return RawTargets(
        gold_ids=np.zeros(len(logits), dtype=np.int64),
        log_z=log_z.astype(np.float32),
        gold_logprob=(logits[:, 0] - logits.max(1) - log_z[:, 0]).astype(np.float32),
        gold_rank=rank,
        byte_end=np.arange(1, len(logits) + 1),
        token_ids=order[:, :k] if ids else None,
        relative=relative[:, :k].astype(np.float32),
    )


def test_the_names_that_the_command_line_lists_are_those_of_the_codecs():
    assert tuple(CODECS) == CODEC_NAMES
    assert {profile.logprob_codec for profile in PROFILES.values()} <= set(CODEC_NAMES)


def config_of(codec: str, k: int, **rest) -> TargetConfig:
    return TargetConfig(top_k=k, temperatures=GRID, logprob_codec=codec, **rest)


def store(stored: dict, config: TargetConfig, vocabulary: int) -> dict:
    """What comes back from the store: packed, cast to the arrays' dtypes with no value out of range, unpacked."""
    specs, starts = array_specs(config, vocabulary), np.array([0])
    ids = np.random.default_rng(0).permutation(vocabulary)
    packed, cast = pack_rows(stored, specs, starts, np.argsort(ids)), {}
    for spec in specs:
        with np.errstate(over="raise", invalid="raise"):
            cast[spec.name] = packed[spec.name].astype(spec.dtype)
        if spec.dtype.startswith("uint"):
            assert (cast[spec.name] == packed[spec.name]).all(), spec.name
        columns = () if spec.columns is None else (spec.columns,)
        assert cast[spec.name].shape[1:] == columns, spec.name
    return unpack_rows(cast, specs, starts, ids)


@st.composite
def cases(draw):
    """Logits of any size and spread (0 to 10^5 nats), ties among them, and any k up to V."""
    v = draw(st.integers(1, 40))
    k = draw(st.integers(1, v))
    scale = 10 ** draw(st.floats(-6, 5))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    logits = rng.normal(0, scale, (draw(st.integers(1, 6)), v))
    if draw(st.booleans()):
        logits = np.round(logits, 1)
    return logits, k


@pytest.mark.parametrize("codec", CODECS)
@settings(max_examples=80)
@given(case=cases())
def test_kept_plus_tail_is_one_at_every_temperature(codec: str, case):
    logits, k = case
    config = config_of(codec, k)
    raw = make_raw(logits, k)
    targets = decode(store(encode(raw, config)[0], config, logits.shape[1]), config)
    for t, temperature in enumerate(GRID):
        kept = np.exp(targets.logprobs_at(temperature)).sum(1)
        # log_z is float32 of size up to log V, so mass carries about 4e-7; logprobs of size up to 1e5 nats carry
        # 1e-2 of their own, but weigh nothing then: what weighs is within 20 nats of the top
        assert (kept <= 1 + 1e-5).all()
        exact_head = np.exp(raw.relative.astype(np.float64) / temperature).sum(1)
        exact_tail = np.maximum(np.exp(raw.log_z[:, t].astype(np.float64)) - exact_head, 0)
        decoded_head = np.exp(CODECS[codec].decode(store_head(raw, codec)).astype(np.float64) / temperature).sum(1)
        # log(tail / head) x in float16 is off by at most |x| 2^-11, and m (1 - m) |x| is at most 0.225
        atol = 1e-5 if codec == "float32" else 1.2e-4
        np.testing.assert_allclose(kept, decoded_head / (decoded_head + exact_tail), atol=atol)
        np.testing.assert_allclose(kept + targets.tail_mass_at(temperature), 1, atol=1e-5)


def step_of(codec: str) -> float:
    """Spacing of a graded codec's scale."""
    graded: Any = CODECS[codec]
    return float(graded.step)


def store_head(raw: RawTargets, codec: str) -> dict:
    assert raw.relative is not None
    return CODECS[codec].encode(raw.relative)


@pytest.mark.parametrize("temperatures", [(1.0, 2.0, 4.0), (0.5, 1.0, 3.0)])
@pytest.mark.parametrize("codec", CODECS)
@settings(max_examples=40)
@given(case=cases())
def test_sums_of_powers_are_those_of_the_decoded_values(codec: str, temperatures, case):
    logits, k = case
    stored = store_head(make_raw(logits, k), codec)
    relative = CODECS[codec].decode(stored)
    found = power_sums(CODECS[codec], stored, relative, temperatures)
    exact = np.stack([np.exp(relative.astype(np.float64) / t).sum(axis=1) for t in temperatures], axis=1)
    # float32: a power squared twice is off by 4 half units, a sum of at most 8 terms or more by the same again
    np.testing.assert_allclose(found, exact, rtol=2e-6)


def test_the_tail_s_mass_is_the_stored_odds_and_keeps_its_digits_where_kept_mass_is_one():
    """One minus the kept sum has no digits left of a tail of 1e-9; its odds do."""
    odds = np.array([[-20.0], [-4.0], [3.0]], dtype=np.float16)
    config = TargetConfig(top_k=2, temperatures=(1.0,))
    stored: dict[str, Any] = {"logprobs": np.zeros((3, 2), dtype=np.uint8), "tail_odds": odds}
    rest = {name: np.zeros(3, dtype=np.float16) for name in ("gold_ids", "gold_logprob", "gold_rank", "byte_end")}
    found = decode(stored | rest, config).tail_mass_at(1.0)
    np.testing.assert_allclose(found, 1 / (1 + np.exp(-odds[:, 0].astype(np.float64))), rtol=2e-7)  # float32


@pytest.mark.parametrize("codec", CODECS)
@settings(max_examples=80)
@given(case=cases())
def test_decoded_rows_are_sorted_from_zero_and_close(codec: str, case):
    logits, k = case
    raw = make_raw(logits, k)
    assert raw.relative is not None
    decoded = CODECS[codec].decode(store_head(raw, codec))
    assert decoded.shape == raw.relative.shape
    assert np.isfinite(decoded).all()
    assert (decoded[:, 0] == 0).all()
    assert (np.diff(decoded, axis=1) <= 0).all()
    span = np.minimum(-raw.relative[:, -1:].astype(np.float64), 65504)
    clipped = np.maximum(raw.relative, -65504)
    bound: Any = {
        # half a step of span/255, and the span's own float16 rounding (2^-11 relative, 2^-25 absolute, steps of 1e-6)
        "linear8": span * (0.5 / 255 + 2**-10) + 1e-6,
        "float16": np.abs(clipped) * 2**-11 + 2**-24,
        "float32": 0,
    }.get(codec)
    if isinstance(CODECS[codec], Graded):
        bound = spacing(step_of(codec), -clipped.astype(np.float64)) / 2
    assert (np.abs(decoded - (clipped if codec != "float32" else raw.relative)) <= bound).all()


def spacing(step: float, y: np.ndarray) -> np.ndarray:
    """Most that two neighbours of the scale lie apart around y nats: the rule as it is documented, and float32's own.

    A place beyond y may be the neighbour's: half a spacing further the rule allows e^(1/5 of it) more.
    """
    apart = np.minimum(step * np.exp(np.minimum(y, 100) / 5), np.maximum(y / 2, step))
    return apart * 1.02 + 2**-22 * y + 1e-7


@pytest.mark.parametrize("codec", [c for c in CODECS if isinstance(CODECS[c], Graded)])
def test_a_graded_value_is_the_nearest_point_wherever_it_stands_in_the_row(codec: str):
    scale = graded_scale(step_of(codec)).astype(np.float64)
    rng = np.random.default_rng(0)
    # rows that end in one value, after many or few others: errors would add up along the long ones
    value = -rng.uniform(0, 30, 500)
    rows = np.sort(rng.uniform(0, 1, (500, 63)) * value[:, None])[:, ::-1]
    long = np.concatenate([np.zeros((500, 1)), rows, value[:, None]], axis=1).astype(np.float32)
    nearest = -scale[np.abs(scale[None] + value[:, None]).argmin(axis=1)]
    for relative in (long, long[:, [0, -1]]):
        found = CODECS[codec].decode(CODECS[codec].encode(relative))[:, -1]
        np.testing.assert_allclose(found, nearest, rtol=1e-6)


@pytest.mark.parametrize("codec", [c for c in CODECS if isinstance(CODECS[c], Graded)])
def test_a_scale_is_strictly_ascending_and_said_in_the_attributes(codec: str):
    scale = graded_scale(step_of(codec))
    assert scale[0] == 0
    assert scale[-1] == 65504
    assert (np.diff(scale) > 0).all()
    (spec,) = CODECS[codec].arrays(4)
    assert np.float32(spec.attributes["scale"]).tolist() == scale.tolist()
    assert len(scale) - 1 <= np.iinfo(spec.dtype).max  # any sum of steps, so any step


def test_scales_do_not_move():
    # a cache holds places on a scale: other points would be other values (fine, kl and compact profiles)
    points = {
        name: hashlib.sha256(graded_scale(step_of(name)).tobytes()).hexdigest()[:16]
        for name in ("graded", "graded-fine", "graded-coarse")
    }
    assert points == GOLDEN_SCALES


@pytest.mark.parametrize("codec", CODECS)
def test_no_gap_is_too_large(codec: str):
    least = np.finfo(np.float32).min
    relative = np.array([[0, -70000, -1e30, least], [0, -1e-30, -65503, -65505], [0, 0, 0, 0]], dtype=np.float32)
    decoded = CODECS[codec].decode(
        {
            n: v.astype(d.dtype)
            for d in CODECS[codec].arrays(4)
            for n, v in CODECS[codec].encode(relative).items()
            if n == d.name
        }
    )
    assert np.isfinite(decoded).all()
    assert (np.diff(decoded, axis=1) <= 0).all()
    assert (decoded[0, 1:] <= -40000).all()
    assert (decoded[2] == 0).all()


@pytest.mark.parametrize("codec", ["graded", "graded-fine", "float16", "float32"])
def test_the_odds_of_the_tail_cost_less_than_the_head(codec: str):
    """Half precision of log(tail / head): with the head as it is, less than 5e-8 nats, at any tail."""
    rng = np.random.default_rng(0)
    odds = np.concatenate([rng.uniform(-40, 12, 10_000), [-65504.0, 0.0]])
    stored = odds.astype(CODECS[codec].tail).astype(np.float64)
    head, found = 1 / (1 + np.exp(odds)), 1 / (1 + np.exp(stored))
    tail, tail_found = np.exp(odds) * head, np.exp(stored) * found
    kl = head * np.log(head / found) + np.where(tail > 0, tail * (odds - stored + np.log(head / found)), 0)
    assert tail_found[-2] == 0
    assert kl.max() < 5e-8
    assert CODECS[codec].tail == ("float32" if codec == "float32" else "float16")


@pytest.mark.parametrize("codec", CODECS)
def test_head_kl_is_that_of_a_slow_twin(codec: str):
    logits = np.random.default_rng(0).normal(0, 3, (50, 100))
    k = 12
    config = config_of(codec, k)
    raw = make_raw(logits, k)
    stored, quality = encode(raw, config)
    targets = decode(stored, config)
    p = np.exp(np.sort(logits)[:, ::-1] - logits.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    teacher = np.concatenate([p[:, :k], p[:, k:].sum(1, keepdims=True)], axis=1)
    log_q = targets.logprobs_at(1.0)
    reader = np.concatenate([np.exp(log_q), targets.tail_mass_at(1.0)[:, None]], axis=1)
    kl = (teacher * np.log(teacher / reader)).sum(1)
    # the sums are of differences of float32 numbers: 1e-7 per row
    assert quality["head_kl"] == pytest.approx(kl.sum(), abs=50 * 5e-7)
    assert quality["mass_kept"] == pytest.approx(p[:, :k].sum(), abs=1e-5)
    assert quality["rows"] == 50


def test_quality_orders_the_codecs_as_documented():
    raw = make_raw(np.random.default_rng(0).normal(0, 3, (200, 1000)), 64)
    kl = {name: encode(raw, config_of(name, 64))[1]["head_kl"] / 200 for name in CODECS}
    assert kl["linear8"] < 1e-4
    assert kl["float32"] < kl["float16"] < kl["graded-fine"] < kl["graded"] < kl["graded-coarse"] < 2e-4
    assert kl["graded-fine"] < 2e-7
    assert kl["graded"] < 4e-5  # of these peaked random rows; of text see docs/cache-format.md
    assert kl["float16"] < 1e-6
    assert kl["float32"] < 1e-9


def test_quality_counts_gold_figures():
    logits = np.log(np.array([[0.5, 0.3, 0.2], [0.2, 0.5, 0.3]]))  # gold is token 0: first, then third
    quality = encode(make_raw(logits, 2), config_of("float32", 2))[1]
    assert quality["top1"] == 1
    assert quality["gold_nll"] == pytest.approx(-np.log(0.5) - np.log(0.2), abs=1e-6)


def test_the_whole_vocabulary_in_float32_is_exact():
    logits = np.random.default_rng(1).normal(0, 4, (30, 60))
    config = config_of("float32", 60)
    targets = decode(store(encode(make_raw(logits, 60), config)[0], config, 60), config)
    for temperature in GRID:
        z = -np.sort(-logits, axis=1) / temperature
        expected = z - np.log(np.exp(z).sum(1, keepdims=True))
        # float32 logits of size 20 carry 2e-6
        np.testing.assert_allclose(targets.logprobs_at(temperature), expected, atol=4e-6)
        np.testing.assert_allclose(targets.tail_mass_at(temperature), 0, atol=1e-5)


@pytest.mark.parametrize("codec", CODECS)
def test_a_slice_keeps_the_first_tokens_and_gives_the_rest_to_the_tail(codec: str):
    config = config_of(codec, 16)
    stored = store(encode(make_raw(np.random.default_rng(2).normal(0, 3, (20, 80)), 16), config)[0], config, 80)
    whole, sliced = decode(stored, config), decode(stored, config, top_k=5)
    assert (sliced.token_ids == whole.token_ids[:, :5]).all()
    assert (sliced.logprobs == whole.logprobs[:, :5]).all()
    for temperature in GRID:
        moved = np.exp(whole.logprobs_at(temperature))[:, 5:].sum(1)
        np.testing.assert_allclose(sliced.tail_mass_at(temperature), whole.tail_mass_at(temperature) + moved, atol=1e-6)


def test_ids_gold_and_spans_come_back_as_they_were():
    raw = make_raw(np.random.default_rng(3).normal(0, 3, (20, 70_000)), 6)
    config = config_of("linear8", 6)
    targets = decode(store(encode(raw, config)[0], config, 70_000), config)
    assert (targets.token_ids == raw.token_ids).all()
    assert raw.token_ids.max() > 2**16  # 16 bits would not do
    assert (targets.gold_rank == raw.gold_rank).all()
    assert (targets.byte_end == raw.byte_end).all()
    np.testing.assert_allclose(targets.gold_logprob, raw.gold_logprob, rtol=2**-11)  # float16


@pytest.mark.parametrize(("size", "dtype"), [(2, "uint16"), (2**16, "uint16"), (2**16 + 1, "uint32")])
def test_ids_take_the_smallest_dtype_that_holds_them(size: int, dtype: str):
    assert id_dtype(size) == dtype
    assert np.iinfo(dtype).max >= size - 1


@pytest.mark.parametrize("profile", PROFILES)
def test_a_profile_stores_what_it_says(profile: str):
    kept = PROFILES[profile]
    names = {s.name for s in array_specs(TargetConfig.of_profile(profile), 1000)}
    assert {"gold_ids", "gold_logprob", "gold_rank", "byte_length"} <= names
    assert ("tail_odds" in names) == bool(kept.top_k) == ("log_z" not in names)
    assert ("logprobs" in names) == bool(kept.top_k)
    assert ("token_ids" in names) == bool(kept.top_k and kept.ids)
    assert ("sample_ids" in names) == ("sample_counts" in names) == bool(kept.samples)
    assert ("tail_bands" in names) == bool(kept.tail_bands)
    assert ("boundary_logprob" in names) == kept.boundary


def test_bands_come_back_by_temperature_and_band():
    config = config_of("linear8", 4, tail_bands=3, band_temperatures=(1.0, 4.0))
    raw = make_raw(np.random.default_rng(4).normal(0, 3, (5, 50)), 4)
    raw.tail_bands = -np.arange(30, dtype=np.float32).reshape(5, 6)
    targets = decode(store(encode(raw, config)[0], config, 50), config)
    assert targets.tail_bands.shape == (5, 2, 3)
    assert targets.tail_bands[2, 1].tolist() == [-15.0, -16.0, -17.0]


def test_a_gold_token_far_below_float16_stays_finite():
    logits = np.array([[-1e5, 0.0, -1.0]])
    config = config_of("linear8", 2)
    targets = decode(store(encode(make_raw(logits, 2), config)[0], config, 3), config)
    assert targets.gold_logprob.tolist() == [-65504.0]
