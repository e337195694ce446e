"""A dense layer and a norm between a model's body and its output layer, as the decoders of ModernBERT, BERT and RoBERTa have."""

from __future__ import annotations

from contextlib import suppress
from functools import wraps
from operator import attrgetter
from typing import Any

OF_MODERNBERT = {"modernbert-decoder": "lm_head"}
"""Model type -> where the layers are. A head of this name is the output layer itself in most other models."""
MODULES = ("cls.predictions.transform", "generator_predictions")
"""Where one module has them: in BERT and its kin (MegatronBERT, ERNIE, RoFormer, BigBird), and in ELECTRA."""
BESIDE_THE_OUTPUT_LAYER = {"lm_head": "layer_norm", "cls.predictions": "LayerNorm"}
"""A module with the dense layer, the norm of this name and the output layer: in RoBERTa and its kin, and in RemBERT."""


class BodyWithNeck:
    """A body and the layers after it as one body, which takes the same inputs."""

    def __init__(self, body: Any, neck: Any) -> None:
        self.body, self.neck, self.config = body, neck, body.config
        self.forward = wraps(body.forward)(lambda **inputs: self(**inputs))
        """It shows the inputs that the body takes."""

    @property
    def modules(self) -> tuple[Any, Any]:
        """The modules that compute the states."""
        return self.body, self.neck

    def __call__(self, **inputs: Any) -> Any:
        """The body's output, with the states that enter the output layer as `last_hidden_state`."""
        output = self.body(**inputs)
        output.last_hidden_state = self.neck(output.last_hidden_state)
        return output


def with_neck(model: Any, body: Any) -> Any:
    """The body of a causal model; with the layers after it where the model has some."""
    neck = _neck(model)
    return body if neck is None else BodyWithNeck(body, neck)


def _neck(model: Any) -> Any | None:
    """The layers between the body and the output layer as one module, or None."""
    from torch import nn

    of_its_type = OF_MODERNBERT.get(model.config.model_type)
    for path in MODULES if of_its_type is None else (of_its_type,):
        with suppress(AttributeError):
            return attrgetter(path)(model)
    for path, norm in BESIDE_THE_OUTPUT_LAYER.items():
        with suppress(AttributeError):
            holder = attrgetter(path)(model)
            return nn.Sequential(holder.dense, getattr(holder, "activation", nn.GELU()), getattr(holder, norm))
    return None
