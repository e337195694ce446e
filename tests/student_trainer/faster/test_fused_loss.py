"""Which kernels a run's loss gets, and that Triton's are proven before use. The kernel itself: test_triton_kernels.py."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from kd.common.errors import DataError
from kd.models.families.logit_transform import PLAIN, LogitTransform
from kd.student_trainer.faster import fused_loss
from kd.student_trainer.faster.fused_loss import FusedLoss, alike, covers, torch_gradient_, with_kernels
from kd.student_trainer.head import chunked_head_loss, rows_at_once
from kd.student_trainer.loss_functions import chunked_distillation_loss
from kd.student_trainer.losses.loss_registry import LOSSES, Objective
from kd.student_trainer.losses.loss_targets import LossTargets

N, V = 20, 30
KL = Objective("kl", "ghost", 0.6, 2.0)


@pytest.fixture(autouse=True)
def outside_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    yield
    fused_loss._shared.cache_clear()


def installed(monkeypatch: pytest.MonkeyPatch, is_there: bool) -> None:
    monkeypatch.setattr(fused_loss, "is_installed", lambda package: is_there and package == "triton")


def targets_of(rows: int = N) -> LossTargets:
    generator = torch.Generator().manual_seed(0)
    log_p, ids = torch.randn(rows, V, generator=generator, dtype=torch.float64).log_softmax(1).topk(4)
    return LossTargets(ids[:, 1], ids, log_p, 1 - log_p.exp().sum(1))


def leaves(dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(s, generator=generator, dtype=dtype).requires_grad_() for s in ((N, 6), (V + 2, 6), (V + 2,))]


def outcome(loss: Any, transform: LogitTransform = PLAIN) -> list[Tensor]:
    hidden, weight, bias = leaves()
    total, kd, ce = chunked_head_loss(
        hidden, weight, bias, loss, targets_of(), vocabulary_size=V, chunk=9, transform=transform
    )
    return [total.detach(), kd, ce, *torch.autograd.grad(total, [hidden, weight, bias])]


def correct(objective: Objective, products: Tensor, *arguments: Any) -> Tensor:
    """A Triton kernel that computes what it should."""
    return torch_gradient_(objective, products, *arguments)


def last_column_missed(objective: Objective, products: Tensor, *arguments: Any) -> Tensor:
    sums = torch_gradient_(objective, products, *arguments)
    products[:, -1] = 0
    return sums


def loss_off(objective: Objective, products: Tensor, *arguments: Any) -> Tensor:
    return torch_gradient_(objective, products, *arguments) * 1.01


def no_numbers(objective: Objective, products: Tensor, *arguments: Any) -> Tensor:
    return torch_gradient_(objective, products.mul_(torch.nan), *arguments)


def fails(objective: Objective, products: Tensor, *arguments: Any) -> Tensor:
    products.zero_()
    raise RuntimeError("PassManager::run failed\nmore")


WRONG = pytest.mark.parametrize("kernel", [last_column_missed, loss_off, no_numbers, fails])


def test_the_losses_with_a_kernel_are_kl_and_cross_entropy() -> None:
    covered = {(loss, tail) for loss in LOSSES for tail in LOSSES[loss].variants if covers(Objective(loss, tail))}
    assert covered == {("kl", "ghost"), ("kl", "renorm"), ("ce", "none")}


def test_on_a_gpu_triton_is_taken_where_it_can_be(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    installed(monkeypatch, True)
    chosen = with_kernels(KL, "auto", "cuda", said.append)
    assert isinstance(chosen, FusedLoss)
    assert not chosen.required
    assert with_kernels(KL, "torch", "cuda", said.append) is KL
    assert with_kernels(KL, "auto", "cpu", said.append) is KL
    uld = Objective("uld", "bands", 0.5)
    assert with_kernels(uld, "auto", "cuda", said.append) is uld
    assert not said
    installed(monkeypatch, False)
    assert with_kernels(KL, "auto", "cuda", said.append) is KL
    assert said == [
        "the loss uses torch's kernels: Triton is not installed; torch for CUDA brings it on Linux, and the extra triton"
    ]


def test_asking_for_triton_where_it_cannot_run_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch, True)
    for objective, device, reason in (
        (KL, "cpu", "device cpu"),
        (Objective("uld", "bands"), "cuda", "loss uld"),
        (Objective("kl", "sampled"), "cuda", "tail sampled"),
    ):
        with pytest.raises(DataError, match="no Triton kernel here") as error:
            with_kernels(objective, "triton", device, print)
        assert str(error.value.details["found"]).startswith(reason) or reason in str(error.value.details["found"])
        assert error.value.details["try"] == "--kernels auto, or --kernels torch"
    installed(monkeypatch, False)
    with pytest.raises(DataError) as error:
        with_kernels(KL, "triton", "cuda", print)
    assert "not installed" in str(error.value.details["found"])


def test_training_with_it_is_refused_without_a_gpu_before_the_student_is_loaded(run) -> None:
    with pytest.raises(DataError, match="no Triton kernel here"):
        run(kernels="triton")
    with pytest.raises(DataError, match="kernels"):
        run(kernels="cuda")


def test_the_interpreter_stands_in_for_a_gpu_where_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch, True)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert isinstance(with_kernels(KL, "triton", "cpu", print), FusedLoss)
    assert with_kernels(KL, "auto", "cpu", print) is KL


@pytest.mark.parametrize("transform", [PLAIN, LogitTransform(0.5), LogitTransform(1.5, 3.0)])
def test_a_kernel_that_computes_the_same_is_taken_for_every_chunk(
    transform: LogitTransform, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []

    def counted(objective: Objective, products: Tensor, *arguments: Any) -> Tensor:
        calls.append(len(products))
        return correct(objective, products, *arguments)

    monkeypatch.setattr(fused_loss, "triton_gradient_", counted)
    loss = FusedLoss(KL, pytest.fail, required=True)
    for found, expected in zip(outcome(loss, transform), outcome(KL, transform), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    assert calls == [9, 9, 9, 2]  # the first 9 rows are the proof
    outcome(loss, transform)
    assert calls[4:] == [9, 9, 2]


@WRONG
def test_a_kernel_that_does_not_is_left_for_torch_s_and_it_is_said_once(kernel: Any, monkeypatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(fused_loss, "triton_gradient_", kernel)
    loss = FusedLoss(KL, said.append)
    for _ in range(2):
        for found, expected in zip(outcome(loss), outcome(KL), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    assert len(said) == 1
    assert said[0].startswith("the loss uses torch's kernels, because Triton's do not run here as they should: ")
    if kernel is fails:
        assert said[0].endswith("RuntimeError: PassManager::run failed")


@WRONG
def test_a_kernel_that_does_not_is_an_error_where_it_is_asked_for(kernel: Any, monkeypatch) -> None:
    monkeypatch.setattr(fused_loss, "triton_gradient_", kernel)
    with pytest.raises(DataError, match="do not compute here what") as error:
        outcome(FusedLoss(KL, pytest.fail, required=True))
    assert error.value.details["try"] == "--kernels torch"


def test_every_kind_of_rows_is_proven(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel is compiled for each type, with a bias or without, for each transform and for rows that differ."""
    proofs: list[torch.dtype] = []

    def counted(objective: Objective, products: Tensor, *arguments: Any) -> Tensor:
        assert products.stride() == (64, 1)  # the proof's too: another stride is another kernel
        proofs.append(products.dtype)
        return correct(objective, products, *arguments)

    monkeypatch.setattr(fused_loss, "triton_gradient_", counted)
    loss = FusedLoss(Objective("ce", "none", 0.0), pytest.fail)
    targets = LossTargets(torch.arange(N) % V)
    kinds = [(torch.float32, None, PLAIN), (torch.bfloat16, None, PLAIN), (torch.float32, torch.zeros(V), PLAIN)]
    kinds += [(torch.float32, None, LogitTransform(2.0))]
    for count in (2, 1):
        proofs.clear()
        for dtype, bias, transform in kinds:
            loss.product_gradient_(torch.randn(N, 64).to(dtype)[:, :V], bias, transform, targets)
        assert len(proofs) == count * len(kinds)
    assert loss.product_gradient_(torch.randn(0, 64)[:, :V], None, PLAIN, targets[:0]).tolist() == [0.0] * 3


def test_a_student_without_numbers_is_not_called_a_wrong_kernel() -> None:
    """Its loss is NaN with either; training says so."""
    gradient = torch.full((2, 3), torch.nan)
    assert alike(gradient, gradient.clone(), torch.full((3,), torch.nan), torch.full((3,), torch.nan))
    assert not alike(gradient, torch.zeros(2, 3), torch.zeros(3), torch.zeros(3))


def test_chunks_of_narrow_products_have_more_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    fused, vocabulary = FusedLoss(KL, pytest.fail), 50257
    weight, bias = torch.empty(8, 2), torch.empty(8)
    plain = rows_at_once(weight, None, KL, vocabulary)
    assert rows_at_once(weight, None, fused, vocabulary) == plain
    assert rows_at_once(weight.bfloat16(), None, fused, vocabulary) == 2 * plain
    assert rows_at_once(weight.bfloat16(), bias, fused, vocabulary) == 2 * plain
    assert rows_at_once(weight.bfloat16(), bias.requires_grad_(), fused, vocabulary) == plain
    assert rows_at_once(weight.bfloat16(), None, KL, vocabulary) == plain
    with torch.autocast("cpu", torch.bfloat16):
        assert rows_at_once(weight, None, fused, vocabulary) == 2 * plain


def test_a_loop_of_one_s_own_chooses_them_too(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = {name: value for name, value in vars(targets_of()).items() if value is not None}
    hidden, weight, _ = leaves()
    expected = chunked_distillation_loss(hidden, (weight[:V], None), batch, KL, kernels="torch")
    assert chunked_distillation_loss(hidden, (weight[:V], None), batch, KL) == expected
    for kernels, message in (("triton", "no Triton kernel here"), ("cuda", "unknown kind of kernels")):
        with pytest.raises(DataError, match=message):
            chunked_distillation_loss(hidden, (weight[:V], None), batch, KL, kernels=kernels)
    calls: list[int] = []

    def counted(objective: Objective, products: Tensor, *arguments: Any) -> Tensor:
        calls.append(len(products))
        return correct(objective, products, *arguments)

    installed(monkeypatch, True)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(fused_loss, "triton_gradient_", counted)
    for _ in range(2):
        found = chunked_distillation_loss(hidden, (weight[:V], None), batch, KL, kernels="triton", chunk=50)
        torch.testing.assert_close(found.loss, expected.loss)
    assert calls == [16, N, N]  # proven once
