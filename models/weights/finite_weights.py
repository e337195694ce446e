"""Weights that are no numbers: found when a model is loaded to learn, and not called a learning rate afterwards."""

from __future__ import annotations

from typing import Any

from kd.common.errors import TeacherError


def refuse_weights_without_value(model: Any, name: str) -> None:
    """Raise TeacherError for a model with NaN or infinity among its weights, naming the first tensor that has some.

    name   what the user calls the model

    One sum over every tensor: 0.1 s for a billion weights in memory. A sum is finite only if every weight is.
    """
    import torch

    for tensor_name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if not tensor.is_floating_point() or tensor.device.type == "meta":
            continue
        values = tensor.detach()
        if bool(values.sum(dtype=torch.promote_types(values.dtype, torch.float32)).isfinite()):
            continue
        count = int((~values.isfinite()).sum())  # a sum of huge numbers may overflow where each is finite
        if count:
            raise TeacherError(
                "the model's weights are not all numbers",
                where=name,
                found=f"{count:,} of {values.numel():,} values of {tensor_name} are NaN or infinite",
                expected="finite weights",
                try_="another copy of the model: training or saving it went wrong",
            )
