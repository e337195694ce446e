"""The proof that hidden states times the output layer are a model's own logits, and the bias that some families add to them.

Architectures that change the logits after the output layer (soft-capping, scaling, a bias of an unknown name) are found by
comparing four tokens with the model's own forward pass, and are refused: logits in chunks would be silently wrong for them.
The comparison is made twice. As they are, logits may differ by OWN_TOLERANCE. Then the output layer is amplified until its
largest logit is 1000: a soft cap at 30 would hardly change the small logits of a small or untrained model.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from kd.common.errors import TeacherError

if TYPE_CHECKING:
    import torch

    Rows = Callable[[torch.Tensor], torch.Tensor]

OWN_TOLERANCE = (0.02, 1e-4)
"""Largest difference between a model's own logits and ours in nats, and as a share of the largest logit. The output layer is
float32 on both sides, so sums are rounded at the seventh digit. A bias of one nat is far above it."""
READS_PADDING = ("cpmant",)
"""Model types whose tokens look at padding after the text, so that a batch gives other numbers than a text alone (0.2 nats)."""
AMPLIFIED_TOLERANCE = (1e-6, 0.02)
"""The same where the largest logit is 1000."""


def final_logits_bias(model: Any) -> torch.Tensor | None:
    """`[V]`: what BART, Marian, mBART, Pegasus and their like add to the output layer's logits; None for other models."""
    bias = getattr(model, "final_logits_bias", None)
    return None if bias is None else bias.view(-1)


def with_final_bias(model: Any, bias: torch.Tensor | None) -> torch.Tensor | None:
    """The bias `[V]` of the output layer, and the model's `final_logits_bias` added where it has one."""
    final = final_logits_bias(model)
    return bias if final is None else final if bias is None else bias + final.to(bias.device)


def require_own_logits(model: Any, weight: torch.Tensor, hidden: Rows, logits: Rows, *, decoder: bool) -> None:
    """Raise TeacherError unless hidden states and output layer give the model's own logits on four tokens.

    weight   `[V, d]` of the model's output layer, in memory
    hidden   ids `[1, T]` -> the states `[T, d]` that enter the output layer
    logits   states `[N, d]` -> logits `[N, V]` in float32, without the model's final bias
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
    states, final = hidden(ids), final_logits_bias(model)
    if states.shape[-1] != weight.shape[1]:
        raise _other_logits(model, f"an output layer of {weight.shape[1]} inputs for {states.shape[-1]} states")
    product = logits(states).unsqueeze(0)
    absolute, relative = OWN_TOLERANCE
    # a model may round its logits to the dtype of its weights before it returns them
    as_they_are = absolute, max(relative, torch.finfo(weight.dtype).eps / 2)
    amplified = 1000 / max(float(product.abs().max()), 1e-6)
    for gain, (absolute, relative) in ((1.0, as_they_are), (amplified, AMPLIFIED_TOLERANCE)):
        expected = _own_logits(model, ids, logits, gain, device=weight.device, decoder=decoder)
        ours = product * gain if final is None else product * gain + final.to(product.device).float()
        if not bool(torch.isfinite(expected).all()):
            raise TeacherError(
                "the model's logits are not finite",
                where=type(model).__name__,
                found="NaN or infinity on four tokens",
                try_="--dtype float32 or bfloat16, and check the weights",
            )
        if ours.shape != expected.shape:
            raise _other_logits(model, f"logits of shape {tuple(expected.shape)}")
        difference = float((ours - expected).abs().max())
        if difference > absolute + relative * float(expected.abs().max()):
            raise _other_logits(model, f"largest difference {difference:.3g}")


def _own_logits(
    model: Any, ids: torch.Tensor, logits: Rows, gain: float, *, device: torch.device, decoder: bool
) -> torch.Tensor:
    """`[1, T, V]` float32 logits of the model's own forward pass, where the output layer is `logits` times `gain`."""

    def replaced(module: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        return logits(inputs[0].to(device).flatten(0, -2)).view(output.shape) * gain

    hook = model.get_output_embeddings().register_forward_hook(replaced)
    try:
        own = model(input_ids=ids, use_cache=False, **({"decoder_input_ids": ids} if decoder else {})).logits
    except RuntimeError as error:
        if "dtype" not in str(error):
            raise
        raise _other_logits(model, "more layers after the output layer") from error
    finally:
        hook.remove()
    return own.to(device).float()  # type: ignore[no-any-return]


def _other_logits(model: Any, found: str) -> TeacherError:
    return TeacherError(
        "the model changes its logits after the output layer",
        where=type(model).__name__,
        found=found,
        expected="logits = lm_head(last hidden state)",
    )
