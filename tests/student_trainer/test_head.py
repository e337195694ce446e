"""The chunked output layer against logits made at once; float64, so that 1e-10 leaves only a wrong sum to fail."""

from __future__ import annotations

import itertools
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from outcome_targets import outcome_targets
from torch import Tensor

from kd.models.families.logit_transform import PLAIN, LogitTransform
from kd.student_trainer.head import chunked_head_loss
from kd.student_trainer.losses import row_kernels as gradients_module
from kd.student_trainer.losses.loss_registry import LOSSES, Objective
from kd.student_trainer.losses.loss_settings import GroupSettings
from kd.student_trainer.losses.loss_targets import GroupTargets, LossTargets

N, D, V, PADDED, K = 11, 5, 13, 16, 4
EDGES = (K, 6, 9, 17)
"""Of the teacher's rank bands; it has more ids than the student."""
OBJECTIVES = [
    pytest.param(
        Objective(
            loss, tail, alpha, temperature, settings=GroupSettings(edges=EDGES, overlap=0.3, beta=0.4, ranking=ranking)
        ),
        id=f"{loss}-{tail}-{ranking}-alpha{alpha:g}-T{temperature:g}",
    )
    for loss in LOSSES
    for tail in LOSSES[loss].variants
    for ranking in (("exact", "fast") if loss == "uld" else ("exact",))
    for alpha in ((0.0,) if loss == "ce" else (0.6, 1.0))
    for temperature in ((1.0,) if loss in ("ce", "alm") or tail == "sampled" else (1.0, 2.0))
]
GHOST = Objective("kl", "ghost", 0.6, 2.0)


def layer(dtype: torch.dtype = torch.float64, rows: int = PADDED, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """`hidden [N, D]`, `weight [rows, D]`, `bias [rows]`, all leaves."""
    generator = torch.Generator().manual_seed(seed)
    shapes = ((N, D), (rows, D), (rows,))
    return tuple(torch.randn(s, generator=generator, dtype=dtype).requires_grad_() for s in shapes)  # type: ignore[return-value]


def targets(rows: int = N, dtype: torch.dtype = torch.float64, seed: int = 1) -> LossTargets:
    generator = torch.Generator().manual_seed(seed)
    log_p, ids = torch.randn(rows, V, generator=generator, dtype=dtype).log_softmax(dim=1).topk(K, dim=1)
    gold = torch.randint(V, (rows,), generator=generator)
    return LossTargets(
        gold_ids=gold,
        token_ids=ids,
        logprobs=log_p,
        tail_mass=1 - log_p.exp().sum(dim=1),
        sample_ids=ids,
        sample_counts=torch.randint(1, 5, (rows, K), generator=generator),
        groups=groups(gold, dtype, generator),
        kd_scale=torch.tensor(2.5),
    )


def targets_for(loss: Objective, dtype: torch.dtype = torch.float64) -> LossTargets:
    """Targets of the kind that a loss compares."""
    data = targets(dtype=dtype)
    return outcome_targets(data.gold_ids, V, dtype=dtype) if LOSSES[loss.loss].text else data


def narrowed(data: Any) -> Any:
    """The same targets in float32."""
    values = {f.name: getattr(data, f.name) for f in fields(data)}
    return replace(
        data,
        **{
            name: narrowed(v) if isinstance(v, GroupTargets) else v.float()
            for name, v in values.items()
            if isinstance(v, GroupTargets) or (v is not None and v.is_floating_point())
        },
    )


def groups(gold: Tensor, dtype: torch.dtype, generator: torch.Generator) -> GroupTargets:
    """Groups of 1, 3, 1, 2, … rows; row 7 of 11 belongs to none."""
    rows = len(gold)
    first, stop = ([e for e in side if e <= rows] for side in ((0, 1, 4, 5, 8), (1, 4, 5, 7, 11)))
    first, count = first[: len(stop)], len(stop)
    mass = torch.rand(count, K + 3, generator=generator, dtype=dtype).sort(dim=1, descending=True).values
    log_mass = (mass / mass.sum(dim=1, keepdim=True)).log()
    return GroupTargets(
        first=torch.tensor(first),
        stop=torch.tensor(stop),
        gold_ids=gold,
        log_scale=-torch.rand(count, generator=generator, dtype=dtype),
        chunk_logprob=-3 * torch.rand(count, generator=generator, dtype=dtype),
        weight=torch.rand(count, generator=generator, dtype=dtype),
        logprobs=log_mass[:, :K],
        bands=log_mass[:, K:],
        student_ids=torch.stack([torch.randperm(V, generator=generator)[:K] for _ in first]).where(
            torch.rand(count, K, generator=generator) < 0.6, torch.tensor(-1)
        ),
    )


def materialised(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, loss, targets: LossTargets, transform: LogitTransform = PLAIN
) -> Tensor:
    """All `[N, V]` logits at once, and torch's own backward pass: the slow twin. Sums of (total, kd, ce)."""
    logits = transform(F.linear(hidden, weight, bias)[:, :V])
    return torch.stack([part.sum() for part in loss(logits, targets)])


def gradients(value: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    return list(torch.autograd.grad(value, leaves))


def assert_same(got: list[Tensor], expected: list[Tensor], tolerance: float = 1e-10) -> None:
    for a, b in zip(got, expected, strict=True):
        assert torch.allclose(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("chunk", [1, 2, 4, N - 1, N, N + 1, 256])
@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_values_and_gradients_equal_the_materialised_ones_for_any_chunk(objective, with_bias: bool, chunk: int) -> None:
    hidden, weight, bias = layer()
    leaves = [hidden, weight, *([bias] if with_bias else [])]
    arguments = (hidden, weight, bias if with_bias else None, objective, targets_for(objective))
    total, kd, ce = chunked_head_loss(*arguments, vocabulary_size=V, chunk=chunk)
    expected = materialised(*arguments)
    assert_same([total, kd, ce], list(expected))
    assert_same(gradients(total, leaves), gradients(expected[0], leaves))


@pytest.mark.parametrize(
    "transform", [LogitTransform(0.25), LogitTransform(cap=2.0), LogitTransform(1.5, 3.0)], ids=["scale", "cap", "both"]
)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_values_and_gradients_of_transformed_logits_equal_the_materialised_ones(objective, transform) -> None:
    for with_bias, chunk in ((True, 4), (False, N)):
        hidden, weight, bias = layer()  # logits reach twice the cap of 2, where its slope is below 0.1
        leaves, b = ([hidden, weight, bias], bias) if with_bias else ([hidden, weight], None)
        expected = materialised(hidden, weight, b, objective, targets_for(objective), transform)
        got = chunked_head_loss(
            hidden, weight, b, objective, targets_for(objective), vocabulary_size=V, chunk=chunk, transform=transform
        )
        assert_same(list(got), list(expected))
        assert_same(gradients(got[0], leaves), gradients(expected[0], leaves))


@pytest.mark.parametrize("rows", [1, 2, 3])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_tiles_of_any_size_change_nothing(objective, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Groups reach across them."""
    hidden, weight, _ = layer()
    with torch.no_grad():
        logits = F.linear(hidden, weight)[:, :V]
    whole, cut = logits.clone(), logits.clone()
    expected = objective.gradient_(whole, targets_for(objective))
    monkeypatch.setattr(gradients_module, "TILE_BYTES", rows * V * logits.element_size())
    assert [s.stop - s.start for s in gradients_module.tiles(logits)][:2] == [rows, rows]
    assert_same([objective.gradient_(cut, targets_for(objective)), cut], [expected, whole], 1e-12)


@pytest.mark.parametrize("objective", [o for o in OBJECTIVES if o.values[0].groups])
def test_a_tile_in_which_no_group_begins_is_like_any_other(objective, monkeypatch: pytest.MonkeyPatch) -> None:
    """In float32 and with a vocabulary whose largest logits are found by a threshold."""
    wide, data = 50257, narrowed(targets_for(objective))
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(N, wide, generator=generator) * 3
    whole, cut = logits.clone(), logits.clone()
    expected = objective.gradient_(whole, data)
    monkeypatch.setattr(
        gradients_module, "TILE_BYTES", wide * logits.element_size()
    )  # a row a tile; groups begin in five
    assert len(list(gradients_module.tiles(logits))) == N > len(data.groups.first)
    # rows are worked through alone or together: float32's sums over 50,257 numbers in another order
    assert_same([objective.gradient_(cut, data), cut], [expected, whole], 1e-5)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_kernels_in_float32_and_on_extreme_logits_agree_with_autograd_in_float64(objective) -> None:
    hidden, weight, _ = layer()
    with torch.no_grad():
        logits = F.linear(hidden, weight)[:, :V]
        logits[0], logits[1] = 0.0, torch.linspace(-70, 70, V)  # knows nothing; is certain
    leaf = logits.clone().requires_grad_()
    sums = torch.stack([part.sum() for part in objective(leaf, targets_for(objective))])
    (expected,) = torch.autograd.grad(sums[0], leaf)
    narrow = logits.float()
    got = objective.gradient_(narrow, narrowed(targets_for(objective)))
    # float32 carries 1e-7 of values up to 140; the equal values of row 0 have no order, so that signs may be dealt otherwise
    assert torch.allclose(got.double(), sums.detach(), rtol=1e-5, atol=1e-4)
    assert narrow.isfinite().all()
    assert torch.allclose(narrow[1:].double(), expected[1:], rtol=1e-4, atol=1e-5)


def test_a_loss_without_a_kernel_runs_by_autograd(monkeypatch: pytest.MonkeyPatch) -> None:
    with_kernel = chunked_head_loss(*layer(), GHOST, targets(), vocabulary_size=V, chunk=4)
    monkeypatch.setitem(LOSSES, "kl", replace(LOSSES["kl"], kernels={}))
    assert_same(list(chunked_head_loss(*layer(), GHOST, targets(), vocabulary_size=V, chunk=4)), list(with_kernel))


def test_gradients_equal_finite_differences() -> None:
    hidden, weight, bias = layer()
    data = targets()
    assert torch.autograd.gradcheck(
        lambda h, w, b: chunked_head_loss(h, w, b, GHOST, data, vocabulary_size=V, chunk=4)[0], (hidden, weight, bias)
    )


@pytest.mark.parametrize("wanted", list(itertools.product([True, False], repeat=3))[:-1])
def test_frozen_tensors_get_no_gradient_and_leave_the_others_theirs(wanted: tuple[bool, bool, bool]) -> None:
    hidden, weight, bias = layer()
    expected = gradients(materialised(hidden, weight, bias, GHOST, targets())[0], [hidden, weight, bias])
    tensors = [t.detach().requires_grad_(w) for t, w in zip((hidden, weight, bias), wanted, strict=True)]
    h, w, b = tensors
    chunked_head_loss(h, w, b, GHOST, targets(), vocabulary_size=V, chunk=4)[0].backward()
    for tensor, gradient, wants in zip(tensors, expected, wanted, strict=True):
        assert (tensor.grad is not None) == wants
        if tensor.grad is not None:
            assert_same([tensor.grad], [gradient])


def test_a_tied_weight_adds_its_gradients_as_embedding_and_as_output_layer() -> None:
    _, weight, _ = layer()
    ids = torch.randint(V, (N,), generator=torch.Generator().manual_seed(2))
    mixed = torch.tanh(weight[ids])
    got = gradients(chunked_head_loss(mixed, weight, None, GHOST, targets(), vocabulary_size=V, chunk=4)[0], [weight])
    mixed = torch.tanh(weight[ids])
    assert_same(got, gradients(materialised(mixed, weight, None, GHOST, targets())[0], [weight]))


def test_padded_rows_change_no_loss_and_get_zero_gradient() -> None:
    hidden, weight, bias = layer()
    outcomes = []
    for padding in (0.0, 1e6):
        w, b = weight.detach().clone(), bias.detach().clone()
        w[V:] += padding
        b[V:] += padding
        w.requires_grad_()
        b.requires_grad_()
        total = chunked_head_loss(hidden, w, b, GHOST, targets(), vocabulary_size=V, chunk=4)[0]
        grads = gradients(total, [w, b])
        assert not grads[0][V:].any()
        assert not grads[1][V:].any()
        assert grads[0][:V].abs().min() > 0
        outcomes.append([total, *grads])
    for a, b in zip(*outcomes, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("scale", [3.0, -0.5, 0.0])
def test_what_comes_from_above_scales_the_gradients(scale: float) -> None:
    leaves = layer()
    total = chunked_head_loss(*leaves, GHOST, targets(), vocabulary_size=V, chunk=4)[0]
    plain = gradients(materialised(*leaves, GHOST, targets())[0], list(leaves))
    assert_same(gradients(total * scale, list(leaves)), [scale * g for g in plain])


def test_two_halves_accumulate_to_the_whole() -> None:
    hidden, weight, bias = layer()
    whole = gradients(materialised(hidden, weight, bias, GHOST, targets())[0], [hidden, weight, bias])
    for rows in (slice(0, 4), slice(4, N)):
        half = chunked_head_loss(hidden[rows], weight, bias, GHOST, targets()[rows], vocabulary_size=V, chunk=3)
        half[0].backward()
    assert_same([hidden.grad, weight.grad, bias.grad], whole)  # type: ignore[list-item]


def test_a_retained_graph_gives_the_same_gradients_again() -> None:
    leaves = layer()
    total = chunked_head_loss(*leaves, GHOST, targets(), vocabulary_size=V, chunk=4)[0]
    first = torch.autograd.grad(total, leaves, retain_graph=True)
    second = torch.autograd.grad(total, leaves)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_only_the_total_carries_a_gradient() -> None:
    total, kd, ce = chunked_head_loss(*layer(), GHOST, targets(), vocabulary_size=V, chunk=4)
    assert total.requires_grad
    assert not kd.requires_grad
    assert not ce.requires_grad


def test_no_rows_give_zero_and_zero_gradients() -> None:
    hidden, weight, bias = layer()
    none = chunked_head_loss(hidden[:0], weight, bias, GHOST, targets()[:0], vocabulary_size=V, chunk=4)
    assert [part.item() for part in none] == [0.0, 0.0, 0.0]
    assert not any(g.any() for g in gradients(none[0], [weight, bias]))


def test_the_loss_never_sees_more_rows_than_a_chunk() -> None:
    sizes: list[int] = []

    class Spy:
        def gradient_(self, logits: Tensor, data: LossTargets) -> Tensor:
            sizes.append(len(logits))
            return GHOST.gradient_(logits, data)

    chunked_head_loss(*layer(), Spy(), targets(), vocabulary_size=V, chunk=4)
    assert sizes == [4, 4, 3]


@pytest.mark.parametrize("transform", [PLAIN, LogitTransform(1.5, 3.0)], ids=["plain", "scale and cap"])
def test_under_bfloat16_autocast_values_and_gradients_stay_close_to_float32(transform: LogitTransform) -> None:
    leaves = layer(torch.float32)
    data = targets(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        total, kd, ce = chunked_head_loss(*leaves, GHOST, data, vocabulary_size=V, chunk=4, transform=transform)
    narrow = [total, kd, ce, *gradients(total, list(leaves))]
    expected = materialised(*leaves, GHOST, data, transform)
    wide = [*expected, *gradients(expected[0], list(leaves))]
    for got, exact in zip(narrow, wide, strict=True):
        assert got.dtype == torch.float32
        # bfloat16 has 8 significant bits: 0.4 % per rounding of inputs and gradients, a few of them per product
        assert (got - exact).norm() < 0.02 * exact.norm()
    assert not torch.equal(total, expected[0])  # the products were made in bfloat16


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_have_the_dtype_of_what_they_belong_to(dtype: torch.dtype) -> None:
    leaves = layer(dtype)
    total = chunked_head_loss(*leaves, GHOST, targets(dtype=torch.float32), vocabulary_size=V, chunk=4)[0]
    assert total.dtype == torch.float32  # sums over many positions do not fit 8 or 11 bits
    assert [g.dtype for g in gradients(total, list(leaves))] == [dtype] * 3
