"""Layers between a model's body and its output layer, which the decoders of ModernBERT and BERT have: a dense layer and a norm."""

from __future__ import annotations

from functools import wraps
from operator import attrgetter
from typing import Any

OF_MODERNBERT = {"modernbert-decoder": "lm_head"}
"""Model type -> where the layers are. A head of this name is the output layer itself in most other models."""
OF_BERT = "cls.predictions.transform"
"""Where BERT and its kin (MegatronBERT, ERNIE, RoFormer, BigBird) have them."""


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
    path = OF_MODERNBERT.get(model.config.model_type, OF_BERT)
    try:
        neck = attrgetter(path)(model)
    except AttributeError:
        return body
    return BodyWithNeck(body, neck)
