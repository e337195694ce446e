"""Laws of draws from the tail: unbiased, as many as the tail's mass says, never a kept token, a function of row and seed alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kd.cache_builder.store.targets import TargetConfig
from kd.cache_builder.teacher.normalisers import padded_width
from kd.cache_builder.teacher.sparsify import Chunk, Sparsifier
from kd.cache_builder.teacher.tail_draws import draw_tail

V = 1300  # two blocks and a half
CONFIGS = {
    "kl": TargetConfig(top_k=5, tail_samples=40),
    "adaptive": TargetConfig.of_profile("adaptive", top_k=60, min_probability=0.01, tail_samples=40),
}


def logits(rows: int, size: int = V, seed: int = 0, scale: float = 2.0) -> torch.Tensor:
    return torch.randn(rows, size, generator=torch.Generator().manual_seed(seed)) * scale


def drawn(config: TargetConfig, z: torch.Tensor, uniforms: np.ndarray) -> Chunk:
    return Sparsifier(config, z.shape[1])(z, torch.zeros(len(z), dtype=torch.long), uniforms[:, None])


def estimate(chunk: Chunk, size: int) -> torch.Tensor:
    """The row that kept tokens and draws stand for, `[n, V]` float64."""
    assert chunk.token_ids is not None
    assert chunk.relative is not None
    assert chunk.kept is not None
    assert chunk.tail_ids is not None
    assert chunk.tail_draws is not None
    p = (chunk.relative.double() - chunk.log_z[:, :1].double()).exp()
    p = p * (torch.arange(p.shape[1]) < chunk.kept.unsqueeze(1))
    share = (1 - p.sum(1, keepdim=True)) / chunk.tail_draws.clamp(min=1).unsqueeze(1)
    used = torch.arange(chunk.tail_ids.shape[1]) < chunk.tail_draws.unsqueeze(1)
    whole = torch.zeros(len(p), size, dtype=torch.float64).scatter_add_(1, chunk.token_ids, p)
    return whole.scatter_add_(1, chunk.tail_ids.long(), share * used)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_the_mean_over_all_uniforms_is_the_teacher(config: TargetConfig):
    """The estimate is a step function of the uniform: its mean over m evenly spaced ones is off by at most the largest step / m."""
    z, m = logits(1), 4000
    rows = drawn(config, z.expand(m, V), (np.arange(m) + 0.5) / m)
    mean = estimate(rows, V).mean(0)
    p = z[0].double().softmax(0)
    assert rows.tail_draws is not None
    step = 1.0 / config.tail_samples / m
    assert (mean - p).abs().max() < 2 * step + 1e-6  # 1e-6: sums of float32
    assert len(set(rows.tail_draws.tolist())) == 1


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_an_id_is_drawn_as_often_as_expected_up_or_down(config: TargetConfig):
    z = logits(50)
    rows = drawn(config, z, np.random.default_rng(0).random(50))
    assert rows.tail_draws is not None
    assert rows.kept is not None
    p, whole = z.double().softmax(1), estimate(rows, V)
    order = p.argsort(1, descending=True)
    beyond = torch.arange(V) >= rows.kept.unsqueeze(1)
    tail = torch.where(beyond, p.gather(1, order), 0.0)
    mass = tail.sum(1, keepdim=True)
    draws = rows.tail_draws.unsqueeze(1)
    assert torch.equal(rows.tail_draws, (config.tail_samples * mass.squeeze(1)).ceil().long())
    found = torch.where(beyond, whole.gather(1, order), 0.0) / mass * draws
    assert ((found - tail / mass * draws).abs() < 1 + 1e-4).all()
    assert torch.allclose(found, found.round(), atol=1e-4)
    assert torch.allclose(found.sum(1), draws.squeeze(1).double(), atol=1e-4)


def test_draws_are_those_of_a_plain_cumulative_sum():
    """A slow twin in float64, row by row. A point within 1e-6 of a border may go to either side."""
    z, uniforms = logits(40, seed=3), np.random.default_rng(1).random(40)
    rows = drawn(CONFIGS["kl"], z, uniforms)
    assert rows.tail_ids is not None
    assert rows.tail_draws is not None
    for row in range(40):
        p = z[row].double().softmax(0).numpy()
        tail = p.copy()
        tail[np.argsort(-p)[:5]] = 0
        sums, n = tail.cumsum(), int(rows.tail_draws[row])
        for j in range(n):
            point = (uniforms[row] + j) / n * sums[-1]
            expected = {int(np.searchsorted(sums, point + shift, side="right")) for shift in (-1e-6, 0.0, 1e-6)}
            assert int(rows.tail_ids[row, j]) in expected


def test_rows_do_not_depend_on_their_neighbours_nor_on_blocks():
    z, uniforms = logits(30, seed=2), np.random.default_rng(2).random(30)
    config = CONFIGS["adaptive"]
    together = drawn(config, z, uniforms)
    alone = [drawn(config, z[i : i + 1], uniforms[i : i + 1]) for i in range(30)]
    blocks = Sparsifier(config, V, block_rows=7)(z, torch.zeros(30, dtype=torch.long), uniforms[:, None])
    for name in ("tail_ids", "tail_draws", "kept"):
        assert torch.equal(getattr(together, name), torch.cat([getattr(one, name) for one in alone]))
        assert torch.equal(getattr(together, name), getattr(blocks, name))


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_what_is_kept_beside_draws_is_what_is_kept_without_them(config: TargetConfig):
    z = logits(20)
    plain = Sparsifier(TargetConfig(top_k=config.top_k), V)(z, torch.zeros(20, dtype=torch.long))
    rows = drawn(config, z, np.zeros(20))
    for name in ("token_ids", "relative", "log_z", "gold_rank", "gold_logprob"):
        assert torch.equal(getattr(plain, name), getattr(rows, name)), name
    assert plain.tail_ids is None
    assert plain.kept is None


def test_a_row_that_keeps_every_token_draws_none():
    z = logits(4, size=8)
    rows = drawn(TargetConfig(top_k=8, tail_samples=10), z, np.full(4, 0.5))
    assert rows.tail_draws is not None
    assert rows.tail_draws.tolist() == [0] * 4
    assert torch.allclose(estimate(rows, 8), z.double().softmax(1), atol=1e-6)


def test_a_certain_row_draws_once_and_an_impossible_token_is_never_drawn():
    z = torch.full((3, V), -torch.inf)
    z[:, :6] = torch.tensor([10.0, -2.0, -2.5, -3.0, -4.0, -5.0])
    rows = drawn(TargetConfig(top_k=2, tail_samples=50), z, np.array([0.0, 0.5, 1 - 1e-16]))
    assert rows.tail_draws is not None
    assert rows.tail_ids is not None
    assert rows.tail_draws.tolist() == [1] * 3
    assert set(rows.tail_ids[:, 0].tolist()) <= {2, 3, 4, 5}


def test_a_device_that_is_not_waited_for_draws_the_same(monkeypatch: pytest.MonkeyPatch):
    """All slots are drawn there, and those that are not used are cleared."""
    z, uniforms = logits(10), torch.rand(10, 1, dtype=torch.float64)
    config = CONFIGS["kl"]
    expected = drawn(config, z, uniforms[:, 0].numpy())
    top = z.topk(5)
    shifted = z - top.values[:, :1]
    powers = torch.zeros(10, padded_width(V, "cpu"))
    kept = torch.full((10,), 5)
    monkeypatch.setattr(
        "kd.cache_builder.teacher.tail_draws._slots", lambda used: torch.ones_like(used).nonzero(as_tuple=True)
    )
    ids, draws = draw_tail(shifted, expected.log_z[:, 0], top.indices, kept, 40, uniforms, powers)
    assert expected.tail_draws is not None
    assert draws.tolist() == expected.tail_draws.tolist()
    assert expected.tail_ids is not None
    assert ids.tolist() == expected.tail_ids.tolist()
