"""What fisher and regmean measure on the training rows of one model.

Diagonal Fisher information is the expected squared gradient of the log-probability of a class that is drawn from the model:

    F = 1/N sum_batches grad( sum_n sum_c sqrt(p_nc) log p_nc )^2          sqrt(p) held constant

The reference squares the gradient of a *batch*, which mixes its rows (the cross terms do not vanish). With batches of one row,
only the classes are mixed. Each gradient is squared and dropped as soon as it is computed: the model, its F and one gradient are
in memory at once.

Gram matrices X^T X hold the products of the inputs of a linear layer, divided by the number of tokens. The reference pads
to 512 tokens and counts the inputs of padding, which are most of the tokens of short rows; `masked` leaves them out.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from transformers.pytorch_utils import Conv1D

Logits = Callable[[dict[str, Tensor]], Tensor]
"""A batch -> unnormalised predictions `[N, C]`, with gradients."""
Batches = Iterable[dict[str, Tensor]]
"""`input_ids` and `attention_mask` `[B, T]`; the same at every pass."""


def fisher_information(part: Any, logits: Logits, batches: Batches) -> dict[str, Tensor]:
    """Parameter of `part` -> its diagonal Fisher information, on the CPU in float32; N is the number of rows."""
    sums = {name: torch.zeros_like(p, dtype=torch.float32) for name, p in part.named_parameters()}
    hooks = [p.register_post_accumulate_grad_hook(_square_into(sums[name])) for name, p in part.named_parameters()]
    rows = 0
    for batch in batches:
        log_p = torch.log_softmax(logits(batch).float(), dim=-1)
        (log_p.detach().exp().sqrt() * log_p).sum().backward()  # type: ignore[no-untyped-call]
        rows += len(batch["input_ids"])
    for hook in hooks:
        hook.remove()
    return {name: total.div_(rows).cpu() for name, total in sums.items()}


def _square_into(total: Tensor) -> Callable[[Tensor], None]:
    def hook(parameter: Tensor) -> None:
        assert parameter.grad is not None
        total.add_(parameter.grad.float().square())
        parameter.grad = None

    return hook


def linear_layers(part: Any, names: Collection[str]) -> dict[str, bool]:
    """Weight of each linear layer of `part` that is among `names` -> is it stored as [in, out] (GPT-2's Conv1D)?"""
    layers = {}
    for name, module in part.named_modules():
        if isinstance(module, torch.nn.Linear | Conv1D) and f"{name}.weight" in names:
            layers[f"{name}.weight"] = isinstance(module, Conv1D)
    return layers


def gram_matrices(part: Any, names: Collection[str], batches: Batches, *, masked: bool) -> Iterator[dict[str, Tensor]]:
    """Weight -> X^T X / tokens `[in, in]` of the inputs of its layer, on the CPU in float32, some layers at a time.

    The Gram matrices of all layers of GPT-2 are larger than the model. Each dictionary is at most half as large as the model (or
    holds one layer), and takes a pass over the batches of its own.
    """
    for layers in _layer_groups(part, names):
        yield _grams(part, layers, batches, masked=masked)


def _layer_groups(part: Any, names: Collection[str]) -> Iterator[list[str]]:
    """Linear layers whose Gram matrices together hold at most half as many numbers as the model, or one layer."""
    weights = dict(part.named_parameters())
    budget = sum(p.numel() for p in weights.values()) // 2
    group: list[str] = []
    numbers = 0
    for name, transposed in linear_layers(part, names).items():
        size = weights[name].shape[0 if transposed else 1] ** 2
        if group and numbers + size > budget:
            yield group
            group, numbers = [], 0
        group.append(name)
        numbers += size
    if group:
        yield group


@torch.no_grad()
def _grams(part: Any, layers: Collection[str], batches: Batches, *, masked: bool) -> dict[str, Tensor]:
    modules = dict(part.named_modules())
    sums: dict[str, Tensor] = {}
    counted: Tensor = torch.empty(0)

    def add_to(name: str) -> Callable[..., None]:
        def hook(module: Any, inputs: tuple[Tensor, ...]) -> None:
            rows = inputs[0].flatten(0, -2)[counted].float()
            gram = rows.T @ rows
            sums[name] = gram if name not in sums else sums[name].add_(gram)

        return hook

    hooks = [modules[name.removesuffix(".weight")].register_forward_pre_hook(add_to(name)) for name in layers]
    tokens = 0
    for batch in batches:
        mask = batch["attention_mask"].flatten().bool()
        counted = mask if masked else torch.ones_like(mask)
        tokens += int(counted.sum())
        part(**batch, use_cache=False)
    for hook in hooks:
        hook.remove()
    return {name: total.div_(tokens).cpu() for name, total in sums.items()}
