"""The proof that hidden states, output layer and a transform read from the model are its own logits.

Four tokens are compared with the model's own forward pass. Where they differ, the model is refused: logits in chunks would be
silently wrong. Each comparison replaces the output layer's logits by ours times a gain, and leaves what follows to the model:

    gain 1          logits as they are may differ by OWN_TOLERANCE
    at the bend     the largest logit is the soft cap itself, where the cap takes a quarter of it
    amplified       the largest logit is 1000: what hardly changes the small logits of an untrained model shows here
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kd.common.errors import TeacherError
from kd.models.families.logit_transform import LogitTransform, named_transforms
from kd.models.families.output_columns import NEVER, final_bias

if TYPE_CHECKING:
    import torch

    Rows = Callable[[torch.Tensor], torch.Tensor]

OWN_TOLERANCE = (0.02, 1e-4)
"""Largest difference between a model's own logits and ours in nats, and as a share of the largest logit. The output layer is
float32 on both sides, so sums are rounded at the seventh digit. A bias of one nat is far above it."""
READS_PADDING = ("cpmant",)
"""Model types whose tokens look at padding after the text, so that a batch gives other numbers than a text alone (0.2 nats)."""
INT8_SHARE = 0.05
"""How far states may change with the token after them in LLM.int8, as a share of the largest state. A column with one large number
is computed in 16 bits for all tokens of a batch, so that rounding depends on later tokens: 1 % was measured in trained Llamas."""
AMPLIFIED_TOLERANCE = (1e-6, 0.02)
"""The same where the largest logit is 1000."""


def require_own_logits(
    model: Any, weight: torch.Tensor, hidden: Rows, logits: Rows, *, decoder: bool
) -> LogitTransform:
    """The transform by which hidden states and output layer give the model's own logits on four tokens, or TeacherError.

    weight   `[V, d]` of the model's output layer, in memory
    hidden   ids `[1, T]` -> the states `[T, d]` that enter the output layer
    logits   states `[N, d]` -> logits `[N, V]` in float32, without the model's final bias and transform
    decoder  whether the model is an encoder-decoder

    Both sides compute the output layer in float32, so that only the hidden states, which they share, are rounded to 16 bits.
    """
    import torch

    if model.config.model_type in READS_PADDING:
        raise TeacherError(
            "the model reads the padding after a text, so that texts cannot be batched",
            where=type(model).__name__,
            found=f"model type {model.config.model_type}",
            expected="a model that looks at what comes before a token alone",
        )
    ids = torch.arange(1, 5, device=weight.device).unsqueeze(0) % weight.shape[0]
    states = hidden(ids)
    if not decoder:
        require_causal(model, hidden, ids)
    if states.shape[-1] != weight.shape[1]:
        raise _other_states(model, f"{states.shape[-1]} numbers per token, and an output layer of {weight.shape[1]}")
    product, readings = logits(states).unsqueeze(0), named_transforms(model)
    compared = [
        _Compared(
            product * gain, _own_logits(model, ids, logits, gain, device=weight.device, decoder=decoder), *tolerance
        )
        for gain, tolerance in _gains(product, readings, weight.dtype).items()
    ]
    if any(not bool(torch.isfinite(c.models_own.logits).all()) for c in compared):
        raise TeacherError(
            "the model's logits are not finite",
            where=type(model).__name__,
            found="NaN or infinity on four tokens",
            try_="--dtype float32 or bfloat16, and check the weights",
        )
    bias, faults = final_bias(model), []
    bias = None if bias is None else bias.to(weight.device)
    for reading in readings:
        fault = next((reason for c in compared if (reason := c.fault(reading, bias))), None)
        if fault is None:
            return reading
        faults.append(fault)
    raise _refusal(model, states, compared[0].models_own.states, faults[0])


def require_causal(model: Any, hidden: Rows, ids: torch.Tensor) -> None:
    """Raise TeacherError where the states of a text change with its last token: they would know what they are to predict.

    hidden   ids `[1, T]` -> states `[T, d]`
    """
    import torch

    other = ids.clone()
    other[0, -1] = ids[0, 0]
    before, after = (hidden(text)[:-1] for text in (ids, other))
    difference, largest = float((before - after).abs().max()), float(before.abs().max())
    # the same sums over the same numbers; a mixture of experts may add them in another order
    share = INT8_SHARE if getattr(model, "is_loaded_in_8bit", False) else 1e-3
    if difference > max(share, 4 * torch.finfo(before.dtype).eps) * largest:
        raise TeacherError(
            "the model reads the tokens that it is to predict",
            where=type(model).__name__,
            found=f"states that change by {difference:.3g} with the token after them",
            expected="a model that looks at what comes before a token alone",
        )


@dataclass(frozen=True)
class _Own:
    """The model's own forward pass over four tokens."""

    logits: torch.Tensor
    """[1, T, V'] float32"""
    states: torch.Tensor | None
    """[T, d]: what entered the output layer; None where the model did not call it."""


@dataclass(frozen=True)
class _Compared:
    """Our logits before the transform, the model's own, and how far they may be apart."""

    product: torch.Tensor
    """[1, T, V]"""
    models_own: _Own
    absolute: float
    relative: float

    def fault(self, reading: LogitTransform, bias: torch.Tensor | None) -> str | None:
        """What is wrong with a reading of the transform, or None."""
        expected = self.models_own.logits
        ours = reading(self.product if bias is None else self.product + bias.float())[..., : expected.shape[-1]]
        if ours.shape != expected.shape:
            return f"logits of shape {tuple(expected.shape)}"
        if bias is not None:  # columns that are never predicted have no other number to compare
            never = (bias <= NEVER / 2)[: expected.shape[-1]]
            if bool((expected[..., never] > NEVER / 2).any()):
                return "a logit where none should be predicted"
            ours, expected = ours[..., ~never], expected[..., ~never]
        difference = float((ours - expected).abs().max())
        if difference <= self.absolute + self.relative * float(expected.abs().max()):
            return None
        return f"largest difference {difference:.3g}"


def _gains(
    product: torch.Tensor, readings: Sequence[LogitTransform], dtype: torch.dtype
) -> dict[float, tuple[float, float]]:
    """Gains of the output layer -> (absolute, relative) tolerance of the logits."""
    import torch

    largest = max(float(product.abs().max()), 1e-6)
    absolute, relative = OWN_TOLERANCE
    # a model may round its logits to the dtype of its weights before it returns them
    relative = max(relative, torch.finfo(dtype).eps / 2)
    bends = {r.cap / (r.scale * largest): (AMPLIFIED_TOLERANCE[0], relative) for r in readings if r.cap is not None}
    return {**bends, 1000 / largest: AMPLIFIED_TOLERANCE, 1.0: (absolute, relative)}


def _own_logits(
    model: Any, ids: torch.Tensor, logits: Rows, gain: float, *, device: torch.device, decoder: bool
) -> _Own:
    """The model's own forward pass, where the output layer is `logits` times `gain`."""
    entered: list[torch.Tensor] = []

    def replaced(module: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        entered.append(inputs[0].to(device).flatten(0, -2))
        return logits(entered[-1]).view(output.shape) * gain

    hook = model.get_output_embeddings().register_forward_hook(replaced)
    try:
        answered = model(input_ids=ids, use_cache=False, **({"decoder_input_ids": ids} if decoder else {})).logits
    except RuntimeError as error:
        if "dtype" not in str(error):
            raise
        raise _other_logits(model, "more layers after the output layer") from error
    finally:
        hook.remove()
    return _Own(answered.to(device).float(), entered[-1] if entered else None)


def _refusal(model: Any, states: torch.Tensor, entered: torch.Tensor | None, fault: str) -> TeacherError:
    """Why no reading of a model gives its logits: `states` are ours, `entered` are those that its output layer was given."""
    if entered is None:
        return _other_states(model, "an output layer that its forward pass does not call")
    if entered.shape != states.shape:
        return _other_states(model, f"states of shape {tuple(entered.shape)} enter the output layer")
    difference = float((entered - states).abs().max())
    if difference > 0.02 * float(states.abs().max()):
        return _other_states(model, f"largest difference of the states {difference:.3g}")
    return _other_logits(model, fault)


def _other_states(model: Any, description: str) -> TeacherError:
    return TeacherError(
        "the model's output layer is given something else than the last hidden states",
        where=type(model).__name__,
        found=description,
        expected="logits = lm_head(last hidden state)",
    )


def _other_logits(model: Any, description: str) -> TeacherError:
    return TeacherError(
        "the model changes its logits after the output layer in a way that is not known",
        where=type(model).__name__,
        found=description,
        expected="logits = lm_head(last hidden state), or these scaled, soft-capped or with a bias",
    )
