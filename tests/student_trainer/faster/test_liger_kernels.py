"""Liger's kernels: proven before use, and refused where they cannot run. The kernels themselves need a GPU (test_on_gpu.py)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny_models import tiny_model
from torch import Tensor

from kd.common.errors import DataError
from kd.student_trainer.faster.liger_kernels import compare_kernels, use_liger_kernels


@pytest.fixture(params=["llama", "t5"])
def model(request: pytest.FixtureRequest) -> Any:
    return tiny_model(request.param, "eager", 60, window=8).float()


def norms(model: Any) -> list[Any]:
    return [module for module in model.modules() if "Norm" in type(module).__name__]


def other_norm(offset: float) -> Callable[[Any, Tensor], Tensor]:
    """A norm in other words; with an offset that of Gemma, which these models do not have."""

    def forward(norm: Any, x: Tensor) -> Tensor:
        wide = x.double()
        return ((norm.weight + offset) * (wide / (wide.square().mean(-1, keepdim=True) + 1e-6).sqrt())).to(x.dtype)

    return forward


def replaced(model: Any, forward: Callable[[Any, Tensor], Tensor]) -> Callable[[], None]:
    def replace() -> None:
        for norm in norms(model):
            norm.forward = forward.__get__(norm)

    return replace


def test_kernels_that_compute_the_same_are_taken(model: Any) -> None:
    model.train()
    compare_kernels(model, replaced(model, other_norm(0.0)))
    assert all("forward" in vars(norm) for norm in norms(model))
    assert model.training
    assert all(weight.grad is None for weight in model.parameters())


def test_kernels_that_compute_something_else_are_refused(model: Any) -> None:
    with pytest.raises(DataError, match="something else"):
        compare_kernels(model, replaced(model, other_norm(1.0)))


def test_kernels_whose_gradients_are_wrong_are_refused(model: Any) -> None:
    def forward(norm: Any, x: Tensor) -> Tensor:
        return other_norm(0.0)(norm, x.detach()) + 0 * x

    with pytest.raises(DataError, match="something else") as error:
        compare_kernels(model, replaced(model, forward))
    assert str(error.value.details["found"]).startswith("gradients")


def test_kernels_that_give_no_numbers_are_refused(model: Any) -> None:
    with pytest.raises(DataError, match="do not run here"):
        compare_kernels(model, replaced(model, lambda norm, x: x * torch.nan))


def test_kernels_that_fail_are_an_error_that_says_how_to_go_on(model: Any) -> None:
    def forward(norm: Any, x: Tensor) -> Tensor:
        raise AttributeError("'float' object has no attribute 'to'")  # Triton's interpreter on Liger 0.8.5

    with pytest.raises(DataError, match="do not run here") as error:
        compare_kernels(model, replaced(model, forward))
    assert error.value.details["try"] == "--no-liger"


def test_without_a_gpu_they_are_refused_before_anything_changes(model: Any) -> None:
    with pytest.raises(DataError, match="run on a GPU"):
        use_liger_kernels(model, device="cpu")
    assert all("forward" not in vars(norm) for norm in norms(model))


def test_training_with_them_is_refused_without_a_gpu(run) -> None:
    with pytest.raises(DataError, match="run on a GPU"):
        run(liger=True)
