"""What a model does to its output layer's logits: a scale (Cohere, Granite, MiniCPM, Falcon-H1), then a soft cap (Gemma).

    logits = cap * tanh(scale * (hidden @ W.T + b) / cap)

Both numbers are read from the model by the names that families give to them, and are proven before use
(`kd.models.families.own_logits`). A name alone proves nothing: MPT's configuration has a `logit_scale` that its model ignores,
and `logits_scaling` divides in Granite and multiplies in HyperCLOVA X. So every reading is tried, plain logits included.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class LogitTransform:
    """A function of one logit. Plain models have `PLAIN`, which costs nothing."""

    scale: float = 1.0
    """What the product of hidden states and output layer is multiplied by."""
    cap: float | None = None
    """The value that logits approach and never reach, or None."""

    @property
    def plain(self) -> bool:
        """Whether logits stay as they are."""
        return self.scale == 1.0 and self.cap is None

    def apply_(self, logits: torch.Tensor) -> torch.Tensor:
        """`[N, V]` products -> the model's logits, written over them."""
        if self.scale != 1.0:
            logits.mul_(self.scale)
        return logits if self.cap is None else logits.div_(self.cap).tanh_().mul_(self.cap)

    def slope(self, logits: torch.Tensor, buffer: torch.Tensor | None = None) -> torch.Tensor | None:
        """`[N, V]`: how the cap bends at the model's logits, 1 - tanh^2; None without a cap.

        buffer   where to write it, `[M >= N, V]`; None = new memory
        """
        if self.cap is None:
            return None
        slope = logits.clone() if buffer is None else buffer[: len(logits)].copy_(logits)
        return slope.div_(self.cap).square_().neg_().add_(1.0)

    def chain_(self, gradient: torch.Tensor, slope: torch.Tensor | None) -> torch.Tensor:
        """Gradient of the model's logits -> gradient of the products, written over it. `slope` is that of the same logits."""
        if slope is not None:
            gradient.mul_(slope)
        return gradient if self.scale == 1.0 else gradient.mul_(self.scale)

    def __call__(self, logits: torch.Tensor) -> torch.Tensor:
        """The definition, by autograd's rules: what `apply_`, `slope` and `chain_` are compared with."""
        scaled = logits * self.scale
        return scaled if self.cap is None else self.cap * (scaled / self.cap).tanh()


PLAIN = LogitTransform()

SCALES: dict[str, Callable[[float], float]] = {
    "logit_scale": lambda value: value,
    "logits_scaling": lambda value: 1.0 / value,
    "lm_head_multiplier": lambda value: value,
    "output_multiplier": lambda value: value,
    "logits_mup_width_multiplier": lambda value: 1.0 / value,
}
"""Names of scales -> the factor that they mean. Where it turns out to be the other way round, its inverse is tried."""
CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
"""Names of soft caps."""


def named_transforms(model: Any) -> tuple[LogitTransform, ...]:
    """Every reading of the numbers that a model names, the likeliest first; the last one is `PLAIN`."""
    scales = [read(value) for name, read in SCALES.items() if (value := _number(model, name)) is not None]
    caps = [value for name in CAPS if (value := _number(model, name)) is not None]
    readings = [
        LogitTransform(scale, cap) for cap in (*caps, None) for factor in scales for scale in (factor, 1.0 / factor)
    ]
    readings += [LogitTransform(cap=cap) for cap in caps]
    return tuple(dict.fromkeys([*readings, PLAIN]))


def changed_numbers(model: Any) -> dict[str, float]:
    """Scales and caps that a model holds beside its configuration, and that differ from it: its digest does not show them."""
    config = model.config.get_text_config(decoder=True)
    numbers = {name: _number(model, name) for name in (*SCALES, *CAPS)}
    return {n: value for n, value in numbers.items() if value is not None and value != _positive(config, n)}


def _number(model: Any, name: str) -> float | None:
    """What the model, its body or its text model's configuration calls `name`; None where there is no such number.

    The model comes first: Cohere copies the number from its configuration, and later reads its copy.
    """
    for holder in (model, getattr(model, "model", None), model.config.get_text_config(decoder=True)):
        value = _positive(holder, name)
        if value is not None:
            return value
    return None


def _positive(holder: Any, name: str) -> float | None:
    value = getattr(holder, name, None)
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) and value > 0 else None
