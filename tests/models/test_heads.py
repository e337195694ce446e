"""The output layer's product, by whatever library, is that of float64."""

from __future__ import annotations

import pytest
import torch

from kd.models import heads
from kd.models.heads import LanguageModelHead


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [0, 1, 7, 144])
@pytest.mark.parametrize("onednn", [True, False])
def test_logits_are_the_product_in_float64(
    monkeypatch: pytest.MonkeyPatch, onednn: bool, rows: int, bias: bool, dtype: torch.dtype
) -> None:
    if not onednn:
        monkeypatch.setattr(heads, "_onednn_linear", lambda: None)
    elif heads._onednn_linear() is None:
        pytest.skip("this torch has no such operator")
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 96, generator=generator).to(dtype) for n in (rows, 1000))
    head = LanguageModelHead(None, weight, torch.randn(1000, generator=generator).to(dtype) if bias else None)
    exact = hidden.double() @ weight.double().T
    if head.bias is not None:
        exact += head.bias.double()
    got = head.logits(hidden)
    assert got.dtype == torch.float32
    assert got.is_contiguous()
    # 97 terms of size 1 or so, each sum rounded by 2^-24 of its size of about 10: 6e-5 if all errors had one sign
    torch.testing.assert_close(got.double(), exact, rtol=0, atol=6e-5)


def test_logits_take_hidden_states_and_weights_in_any_memory_order() -> None:
    hidden, weight = torch.randn(96, 20).T, torch.randn(96, 200).T
    got = LanguageModelHead(None, weight, None).logits(hidden)
    torch.testing.assert_close(got, hidden.contiguous() @ weight.T, rtol=0, atol=6e-5)  # as above
