"""Losses against dense softmaxes in float64, and the laws each of them keeps.

Unless a test says otherwise, tolerances are those of float64: values of a few nats, sums of up to 40 terms, so
1e-12 is a thousand roundings.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from kd.cache_builder.store.targets import TargetConfig
from kd.cache_builder.teacher.selection import draw
from kd.cache_builder.teacher.sparsify import Sparsifier
from kd.student_trainer.losses.by_row import cross_entropy, jsd, kl_ghost, kl_renorm, kl_reverse, kl_sampled
from kd.student_trainer.losses.loss_registry import LOSSES, TAILS
from kd.student_trainer.losses.loss_targets import LossTargets, need

N, V, K, R = 7, 40, 6, 12
GRID = (1.0, 2.0, 4.0)

EVERY_LOSS = [
    pytest.param(function, id=f"{name}-{tail}")
    for name, loss in LOSSES.items()
    if not loss.any_tokenizer  # those are in test_by_group.py and test_by_text.py
    for tail, function in loss.variants.items()
]
WITH_TEMPERATURE = [
    pytest.param(function, t, id=f"{tail}-T{t:g}")
    for tail, function in TAILS.items()
    for t in GRID
    if tail != "sampled" or t == 1.0
]


def random_logits(seed: int, scale: float = 3.0, rows: int = N, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(rows, V, generator=generator, dtype=torch.float64)).to(dtype)


def targets_of(teacher: Tensor, *, k: int = K, temperature: float = 1.0, seed: int = 5) -> LossTargets:
    """What a perfect cache says about `teacher [N, V]`: top-k of the real softmax, the tail summed, R draws."""
    wide = teacher.double()
    log_p, ids = (wide / temperature).log_softmax(dim=1).sort(dim=1, descending=True)
    rng = np.random.default_rng(seed)
    shifted = wide - wide.amax(dim=1, keepdim=True)
    sample_ids, counts = draw(shifted, rng.random((len(teacher), R)))
    return LossTargets(
        gold_ids=torch.from_numpy(rng.integers(0, V, len(teacher))),
        token_ids=ids[:, :k],
        logprobs=log_p[:, :k].to(teacher.dtype),
        tail_mass=log_p[:, k:].exp().sum(dim=1).to(teacher.dtype),
        sample_ids=sample_ids,
        sample_counts=counts,
    )


def dense_kl(teacher: Tensor, student: Tensor, temperature: float = 1.0) -> Tensor:
    """KL(teacher || student) over the whole vocabulary, float64: the slow twin."""
    log_p = (teacher.double() / temperature).log_softmax(dim=1)
    log_q = (student.double() / temperature).log_softmax(dim=1)
    return (log_p.exp() * (log_p - log_q)).sum(dim=1)


def gradient(loss: Callable[..., Tensor], logits: Tensor, targets: LossTargets, **settings: float) -> Tensor:
    leaf = logits.clone().requires_grad_()
    (grad,) = torch.autograd.grad(loss(leaf, targets, **settings).sum(), leaf)
    return grad


# Laws of every loss in the registry


@pytest.mark.parametrize("loss", EVERY_LOSS)
def test_a_row_s_loss_depends_on_that_row_alone(loss) -> None:
    logits, targets = random_logits(1), targets_of(random_logits(2))
    whole = loss(logits, targets)
    assert whole.shape == (N,)
    assert torch.equal(loss(logits[2:5], targets[2:5]), whole[2:5])


@pytest.mark.parametrize("loss", EVERY_LOSS)
def test_gradients_equal_finite_differences(loss) -> None:
    logits, targets = random_logits(1).requires_grad_(), targets_of(random_logits(2))
    assert torch.autograd.gradcheck(lambda x: loss(x, targets), (logits,))


@pytest.mark.parametrize(("loss", "temperature"), WITH_TEMPERATURE)
def test_gradients_equal_finite_differences_at_every_temperature(loss, temperature) -> None:
    targets = targets_of(random_logits(2), temperature=temperature)
    logits = random_logits(1).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: loss(x, targets, temperature=temperature), (logits,))


@pytest.mark.parametrize("loss", EVERY_LOSS)
def test_a_constant_added_to_the_logits_changes_nothing(loss) -> None:
    logits, targets = random_logits(1), targets_of(random_logits(2))
    constants = torch.linspace(-30.0, 30.0, N, dtype=torch.float64).unsqueeze(1)
    assert torch.allclose(loss(logits + constants, targets), loss(logits, targets), rtol=0, atol=1e-12)
    # the same law, differentiated: the gradient of a row sums to zero
    assert gradient(loss, logits, targets).sum(dim=1).abs().max() < 1e-12


@pytest.mark.parametrize("loss", EVERY_LOSS)
def test_renumbering_the_vocabulary_changes_nothing(loss) -> None:
    logits, targets = random_logits(1), targets_of(random_logits(2))
    new_id = torch.randperm(V, generator=torch.Generator().manual_seed(3))
    renumbered = torch.empty_like(logits).index_copy_(1, new_id, logits)
    assert targets.token_ids is not None
    assert targets.sample_ids is not None
    moved = LossTargets(
        new_id[targets.gold_ids],
        new_id[targets.token_ids],
        targets.logprobs,
        targets.tail_mass,
        new_id[targets.sample_ids],
        targets.sample_counts,
    )
    assert torch.allclose(loss(renumbered, moved), loss(logits, targets), rtol=0, atol=1e-12)


@pytest.mark.parametrize("loss", EVERY_LOSS)
def test_float32_agrees_with_float64(loss) -> None:
    logits, teacher = random_logits(1), random_logits(2)
    wide, narrow = loss(logits, targets_of(teacher)), loss(logits.float(), targets_of(teacher.float()))
    # logits of size 10 carry 1e-6 in float32, and losses sum a few of them
    assert torch.allclose(narrow.double(), wide, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("loss", EVERY_LOSS)
def test_a_certain_student_gives_finite_losses_and_gradients_in_float32(loss) -> None:
    logits = torch.full((N, V), -60.0)
    logits[torch.arange(N), torch.arange(N)] = 60.0
    targets = targets_of(random_logits(2, dtype=torch.float32))
    assert loss(logits, targets).isfinite().all()
    assert gradient(loss, logits, targets).isfinite().all()


@pytest.mark.parametrize("loss", TAILS.values(), ids=TAILS)
def test_targets_without_what_a_loss_needs_are_refused(loss) -> None:
    with pytest.raises(ValueError, match="no such field"):
        loss(random_logits(1), LossTargets(torch.zeros(N, dtype=torch.long)))


# The rest bucket


@pytest.mark.parametrize("temperature", GRID)
@pytest.mark.parametrize("k", [1, K, V - 1, V])
def test_ghost_is_zero_at_every_position_when_the_student_is_the_teacher(k: int, temperature: float) -> None:
    teacher = random_logits(2)
    targets = targets_of(teacher, k=k, temperature=temperature)
    assert kl_ghost(teacher, targets, temperature=temperature).abs().max() < 1e-12
    assert gradient(kl_ghost, teacher, targets, temperature=temperature).abs().max() < 1e-12


@pytest.mark.parametrize("temperature", GRID)
def test_ghost_with_every_token_kept_is_the_dense_kl(temperature: float) -> None:
    teacher, student = random_logits(2), random_logits(1)
    whole = kl_ghost(student, targets_of(teacher, k=V, temperature=temperature), temperature=temperature)
    assert torch.allclose(whole, dense_kl(teacher, student, temperature), rtol=0, atol=1e-12)
    single = kl_ghost(
        student.float(), targets_of(teacher.float(), k=V, temperature=temperature), temperature=temperature
    )
    # float32: relative, for a KL of several nats; logits of size 10 carry 1e-6
    assert torch.allclose(single.double(), dense_kl(teacher, student, temperature), rtol=1e-6, atol=1e-6)


def test_ghost_never_exceeds_the_dense_kl_and_grows_with_k() -> None:
    teacher, student = random_logits(2), random_logits(1)
    by_k = torch.stack([kl_ghost(student, targets_of(teacher, k=k)) for k in range(1, V + 1)])
    # lumping outcomes together cannot raise a KL (data processing inequality)
    assert (by_k.diff(dim=0) >= -1e-12).all()
    assert torch.allclose(by_k[-1], dense_kl(teacher, student), rtol=0, atol=1e-12)


@pytest.mark.parametrize("temperature", GRID)
def test_ghost_gradient_is_q_minus_p_on_kept_ids_and_scales_q_by_the_tails_elsewhere(temperature: float) -> None:
    teacher, student = random_logits(2), random_logits(1)
    targets = targets_of(teacher, temperature=temperature)
    q = (student / temperature).softmax(dim=1)
    assert targets.token_ids is not None
    assert targets.logprobs is not None
    assert targets.tail_mass is not None
    kept = torch.zeros(N, V, dtype=torch.bool).scatter_(1, targets.token_ids, True)
    p = torch.zeros(N, V, dtype=torch.float64).scatter_(1, targets.token_ids, targets.logprobs.exp())
    q_tail = q.masked_fill(kept, 0.0).sum(dim=1)
    expected = torch.where(kept, q - p, q * (1 - targets.tail_mass / q_tail).unsqueeze(1)) / temperature
    got = gradient(kl_ghost, student, targets, temperature=temperature)
    assert torch.allclose(got, expected, rtol=0, atol=1e-12)


def test_ghost_keeps_its_digits_where_one_minus_the_kept_sum_has_none() -> None:
    teacher = random_logits(2, dtype=torch.float32)
    targets = targets_of(teacher)
    assert targets.token_ids is not None
    student = torch.full((N, V), -60.0).scatter_(1, targets.token_ids, 60.0)
    q = student.softmax(dim=1)
    naive_tail = (1 - q.gather(1, targets.token_ids).double().sum(dim=1)).clamp(min=0).float()
    assert (naive_tail == 0).any()  # what 1 - Σq makes of a tail of e^-116
    exact = kl_ghost(student.double(), targets_of(teacher.double()))
    # tails of 5-50 % at 116 nats below: losses of 5-60 nats, of which float32 keeps seven digits
    assert torch.allclose(kl_ghost(student, targets).double(), exact, rtol=1e-6, atol=0)
    assert exact.min() > 1


def test_ghost_with_an_empty_teacher_tail_is_finite_and_has_finite_gradients() -> None:
    teacher = random_logits(2)
    targets = targets_of(teacher)
    assert targets.logprobs is not None
    log_p = targets.logprobs.log_softmax(dim=1)
    empty = LossTargets(targets.gold_ids, targets.token_ids, log_p, torch.zeros(N, dtype=torch.float64))
    # nothing beyond the kept ids is what renormalising asserts: the two modes meet
    assert torch.allclose(kl_ghost(random_logits(1), empty), kl_renorm(random_logits(1), empty), rtol=0, atol=1e-12)
    assert gradient(kl_ghost, random_logits(1), empty).isfinite().all()


# Renormalised top-k


@pytest.mark.parametrize("temperature", GRID)
def test_renorm_of_the_teacher_itself_is_minus_the_logarithm_of_the_kept_mass(temperature: float) -> None:
    teacher = random_logits(2)
    targets = targets_of(teacher, temperature=temperature)
    assert targets.tail_mass is not None
    expected = -torch.log1p(-targets.tail_mass)
    assert expected.min() > 0.01  # there is a bias to see
    assert torch.allclose(kl_renorm(teacher, targets, temperature=temperature), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("temperature", GRID)
def test_renorm_with_every_token_kept_is_the_dense_kl(temperature: float) -> None:
    teacher, student = random_logits(2), random_logits(1)
    got = kl_renorm(student, targets_of(teacher, k=V, temperature=temperature), temperature=temperature)
    assert torch.allclose(got, dense_kl(teacher, student, temperature), rtol=0, atol=1e-12)


# Reverse KL and Jensen-Shannon


def dense_jsd(teacher: Tensor, student: Tensor, temperature: float, beta: float) -> Tensor:
    """Over the whole vocabulary, written out: the slow twin."""
    p, q = ((z / temperature).softmax(dim=1) for z in (teacher, student))
    m = beta * p + (1 - beta) * q
    return beta * (p * (p / m).log()).sum(dim=1) + (1 - beta) * (q * (q / m).log()).sum(dim=1)


@pytest.mark.parametrize("temperature", GRID)
@pytest.mark.parametrize("k", [1, K, V - 1, V])
@pytest.mark.parametrize("loss", [kl_reverse, jsd])
def test_divergences_are_zero_when_the_student_is_the_teacher(loss, k: int, temperature: float) -> None:
    teacher = random_logits(2, 2.0)
    targets = targets_of(teacher, k=k, temperature=temperature)
    assert targets.tail_mass is not None
    assert k == V or targets.tail_mass.min() > 1e-7  # below TAIL_FLOOR the teacher's tail is not its own
    assert loss(teacher, targets, temperature=temperature).abs().max() < 1e-12
    assert gradient(loss, teacher, targets, temperature=temperature).abs().max() < 1e-12


@pytest.mark.parametrize("temperature", GRID)
def test_with_every_token_kept_divergences_are_the_dense_ones(temperature: float) -> None:
    teacher, student = random_logits(2), random_logits(1)
    targets = targets_of(teacher, k=V, temperature=temperature)
    reverse = kl_reverse(student, targets, temperature=temperature)
    assert torch.allclose(reverse, dense_kl(student, teacher, temperature), rtol=0, atol=1e-12)
    for beta in (0.1, 0.5, 0.9):
        found = jsd(student, targets, temperature=temperature, beta=beta)
        assert torch.allclose(found, dense_jsd(teacher, student, temperature, beta), rtol=0, atol=1e-12)


@pytest.mark.parametrize("loss", [kl_reverse, jsd])
def test_divergences_grow_with_k_to_the_dense_ones(loss) -> None:
    teacher, student = random_logits(2, 2.0), random_logits(1, 2.0)
    by_k = torch.stack([loss(student, targets_of(teacher, k=k)) for k in range(1, V + 1)])
    # lumping outcomes together cannot raise an f-divergence; TAIL_FLOOR is not reached
    assert (by_k.diff(dim=0) >= -1e-12).all()


@pytest.mark.parametrize("temperature", [2.0, 4.0])
@pytest.mark.parametrize("loss", [kl_reverse, jsd])
def test_divergences_have_the_gradients_of_finite_differences_at_every_temperature(loss, temperature: float) -> None:
    targets, logits = targets_of(random_logits(2), temperature=temperature), random_logits(1).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: loss(x, targets, temperature=temperature), (logits,))


def test_jsd_is_symmetric_at_one_half_and_at_most_ln_two() -> None:
    a, b = random_logits(1), random_logits(2)
    there, back = jsd(a, targets_of(b, k=V)), jsd(b, targets_of(a, k=V))
    assert torch.allclose(there, back, rtol=0, atol=1e-12)
    far = torch.full((N, V), -400.0, dtype=torch.float64)
    far[:, 0] = 0.0
    other = far.roll(1, dims=1)
    assert torch.allclose(
        jsd(other, targets_of(far, k=2)), torch.full((N,), math.log(2.0), dtype=torch.float64), atol=1e-6
    )
    assert (jsd(a, targets_of(b)) < math.log(2.0)).all()


@pytest.mark.parametrize("loss", [kl_reverse, jsd])
def test_a_student_that_leaves_the_kept_ids_is_punished(loss) -> None:
    """On the bare support its q would be small everywhere, and so would a reverse KL over it."""
    teacher = random_logits(2)
    targets = targets_of(teacher)
    assert targets.token_ids is not None
    gone = teacher.scatter(1, targets.token_ids, -30.0)
    away = loss(gone, targets)
    assert (away > 10 * loss(teacher + 0.1 * random_logits(3), targets)).all()
    assert (away > 0.25).all()  # of a JSD of at most 0.69; rows keep 50-90 % of their mass
    downhill = gone - gradient(loss, gone, targets)
    kept = [logits.softmax(dim=1).gather(1, targets.token_ids).sum(dim=1) for logits in (gone, downhill)]
    assert (kept[1] > kept[0]).all()


# Draws


def test_the_mean_gradient_of_many_draws_is_the_gradient_of_the_dense_kl() -> None:
    draws = 20_000
    teacher, student = random_logits(2, 1.5, rows=1), random_logits(1, 1.5, rows=1)
    shifted = (teacher - teacher.amax()).expand(draws, V)
    ids, counts = draw(shifted, np.random.default_rng(11).random((draws, R)))
    targets = LossTargets(torch.zeros(draws, dtype=torch.long), sample_ids=ids, sample_counts=counts)
    mean = gradient(kl_sampled, student.expand(draws, V), targets).mean(dim=0)
    leaf = student.clone().requires_grad_()
    (dense,) = torch.autograd.grad(dense_kl(teacher, leaf).sum(), leaf)
    p = teacher.softmax(dim=1)[0]
    standard_error = (p * (1 - p) / (R * draws)).sqrt()
    z = (mean - dense[0]) / standard_error
    assert (p * R * draws).min() > 50  # enough draws of every id for z to be normal
    # 40 ids: one |z| beyond 4 has a chance of 40 * 6e-5 = 0.3 %, and the seed is fixed; a wrong divisor gives z > 20
    assert z.abs().max() < 4
    # and they do scatter: 40 squared z values average 1 +- 0.22
    assert 0.4 < z.square().mean() < 1.9


def test_draws_as_frequent_as_the_student_says_give_zero() -> None:
    ids = torch.tensor([[3, 7, 1, 0]])
    counts = torch.tensor([[6, 4, 2, 0]])
    logits = torch.full((1, V), -torch.inf, dtype=torch.float64)
    logits[0, [3, 7, 1]] = torch.tensor([0.5, 1 / 3, 1 / 6], dtype=torch.float64).log()
    logits[0, 0] = -800.0  # an unused slot names id 0; e^-800 is 0, its logarithm is not infinite
    targets = LossTargets(torch.zeros(1, dtype=torch.long), sample_ids=ids, sample_counts=counts)
    assert kl_sampled(logits, targets).abs().max() < 1e-12


@pytest.mark.parametrize("adaptive", [False, True], ids=["top-k", "adaptive"])
def test_kept_tokens_and_draws_from_their_tail_have_the_dense_gradient_on_average(adaptive: bool) -> None:
    """Over all values of the random number: the estimate is a step function of it, so that m evenly spaced ones miss at most one of
    its steps per id, which is 1 / (draws m)."""
    count, m = 20, 4000
    rule = {"top_k": V, "min_probability": 0.05} if adaptive else {"top_k": 3}
    config = TargetConfig.of_profile("adaptive" if adaptive else "kl", tail_samples=count, **rule)  # type: ignore[arg-type]
    teacher, student = random_logits(2, 1.5, rows=1).float(), random_logits(1, 1.5, rows=1)
    uniforms = (np.arange(m)[:, None] + 0.5) / m
    rows = Sparsifier(config, V)(teacher.expand(m, V), torch.zeros(m, dtype=torch.long), uniforms)
    assert rows.kept is not None
    assert rows.relative is not None
    kept = int(rows.kept[0])
    log_p = rows.relative[:, :kept].double() - rows.log_z[:, :1].double()
    targets = LossTargets(
        gold_ids=torch.zeros(m, dtype=torch.long),
        token_ids=need(rows.token_ids)[:, :kept],
        logprobs=log_p,
        tail_mass=1 - log_p.exp().sum(1),
        tail_ids=need(rows.tail_ids).long(),
        tail_draws=rows.tail_draws,
    )
    gradients = gradient(kl_sampled, student.expand(m, V), targets)
    leaf = student.clone().requires_grad_()
    (dense,) = torch.autograd.grad(dense_kl(teacher, leaf).sum(), leaf)
    assert (gradients.mean(dim=0) - dense[0]).abs().max() < 2 / (count * m) + 1e-6  # log_z is in float32
    spread = (gradients - dense).square().sum(1).mean()
    p = teacher.double().softmax(1)[0]
    assert spread < 0.5 * (p * (1 - p)).sum() / need(rows.tail_draws)[0].add(
        kept
    )  # of as many draws from the whole row


def test_a_tail_that_is_drawn_as_it_is_gives_the_dense_kl() -> None:
    """Four tokens of equal probability beyond the head, each drawn twice: nothing is left to chance."""
    logits = torch.full((1, V), -torch.inf, dtype=torch.float64)
    logits[0, :6] = torch.tensor([0.5, 0.3, 0.05, 0.05, 0.05, 0.05], dtype=torch.float64).log()
    student = random_logits(1, rows=1)
    targets = LossTargets(
        torch.zeros(1, dtype=torch.long),
        torch.tensor([[0, 1]]),
        torch.tensor([[0.5, 0.3]], dtype=torch.float64).log(),
        torch.tensor([0.2], dtype=torch.float64),
        tail_ids=torch.tensor([[2, 2, 3, 3, 4, 4, 5, 5, 9]]),
        tail_draws=torch.tensor([8]),
    )
    p = logits.exp()
    dense = (torch.xlogy(p, p) - p * student.log_softmax(1)).sum(1)
    assert torch.allclose(kl_sampled(student, targets), dense, rtol=0, atol=1e-12)


@pytest.mark.parametrize("temperature", [2.0, 4.0])
def test_draws_refuse_any_temperature_but_one(temperature: float) -> None:
    with pytest.raises(ValueError, match="temperature 1"):
        kl_sampled(random_logits(1), targets_of(random_logits(2)), temperature=temperature)


# Cross-entropy


def test_cross_entropy_is_minus_log_q_of_the_gold_token() -> None:
    logits, targets = random_logits(1), targets_of(random_logits(2))
    expected = [-float(logits[n].log_softmax(dim=0)[targets.gold_ids[n]]) for n in range(N)]
    assert torch.allclose(cross_entropy(logits, targets), torch.tensor(expected, dtype=torch.float64), atol=1e-12)
