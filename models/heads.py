"""A model run over examples, taken apart at the output layer: hidden states, and logits of a few rows of them.

Shared by the teacher pass, the student's loss and the evaluation, so that all of them see the same positions.
`[batch, T, V]` logits are never formed: hidden states come for whole batches, the output layer is applied to a few
rows at a time (at V = 50k and 8,192 tokens the full tensor would be 1.6 GB per copy); how many: `kd.models.padded_batches`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from kd.common.errors import TeacherError
from kd.models.loading import Model, decoder_start, is_encoder_decoder
from kd.models.packing import segment_mask
from kd.models.padded_batches import Size, forward_tokens, padded_ids

if TYPE_CHECKING:
    import torch


SCALED_WHERE_TIED = ("umt5", "switch_transformers")
"""Model types that scale the decoder's output by d^-0.5 where the output layer is tied to the embedding."""


@cache
def _onednn_linear() -> Any | None:
    """torch's operator for a product by oneDNN; None where this build has no MKL to go around, or this release no such operator."""
    import torch

    try:
        return torch.ops.mkldnn._linear_pointwise if torch._C.has_mkl and torch._C._has_mkldnn else None
    except AttributeError:  # both are torch's own business
        return None


@dataclass(frozen=True)
class LanguageModelHead:
    """A causal model taken apart: `hidden = backbone(...)`, `logits = hidden @ weight.T + bias`."""

    backbone: Any
    weight: torch.Tensor
    """[V, d]"""
    bias: torch.Tensor | None
    """[V] or None"""

    @property
    def bodies(self) -> tuple[Any, ...]:
        """The modules that hidden states come from."""
        return (self.backbone,)

    def forward_tokens(self, threads: int | None = None) -> int:
        """Tokens of a forward pass where nobody asks for another number; `threads` of a CPU, None: as many as torch has."""
        return forward_tokens(self.weight.device.type, threads)

    def size(self, context: int, target: int) -> Size:
        """What an example costs a forward pass, for `batches_by_length`."""
        return context + target

    def hidden(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None, **positions: torch.Tensor
    ) -> torch.Tensor:
        """`[B, T] -> [B, T, d]` after the final norm; `position_ids` where they are not counted from the mask."""
        return self.backbone(  # type: ignore[no-any-return]
            input_ids=input_ids, attention_mask=attention_mask, use_cache=False, **positions
        ).last_hidden_state

    def batch_hidden(self, batch: Mapping[str, Any]) -> torch.Tensor:
        """`[B, T, d]` of a collated batch, with gradients.

        `input_ids` and `attention_mask [B, T]`; where examples are packed, `segment_ids` and `position_ids` instead.
        """
        segments = batch.get("segment_ids")
        if segments is None:
            return self.hidden(batch["input_ids"], batch["attention_mask"])
        ids, positions = batch["input_ids"], batch["position_ids"]
        if self.takes_masks:
            return self.hidden(ids, self._mask(segment_mask(segments, segments, causal=True)), position_ids=positions)
        if self.backbone.config._attn_implementation not in ("sdpa", "eager", "flex_attention"):
            # flash attention looks for segments in one row alone; every row begins with position 0
            return self.hidden(ids.view(1, -1), None, position_ids=positions.view(1, -1)).view(*ids.shape, -1)
        return self.hidden(ids, None, position_ids=positions)

    @cached_property
    def takes_masks(self) -> bool:
        """Is a mask of our own the whole truth? Else transformers finds the segments by their positions.

        Kernels such as flash attention take no mask, and where some layers look at a window alone, one mask for all
        layers would widen it.
        """
        config = self.backbone.config
        kinds = getattr(config, "layer_types", None) or ()
        windows = getattr(config, "sliding_window", None) or any(kind != "full_attention" for kind in kinds)
        return config._attn_implementation in ("sdpa", "eager") and not windows

    def _mask(self, allowed: torch.Tensor) -> torch.Tensor:
        """`[B, Q, K] -> [B, 1, Q, K]` as attention wants it: bool for sdpa, numbers to add for eager."""
        import torch

        allowed = allowed.unsqueeze(1)
        if self.backbone.config._attn_implementation == "sdpa":
            return allowed
        nothing = torch.zeros(allowed.shape, dtype=self.weight.dtype, device=allowed.device)
        return nothing.masked_fill_(~allowed, torch.finfo(self.weight.dtype).min)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """`[N, d] -> [N, V]` float32, whatever the model's dtype.

        A product of 16-bit numbers is exact in float32 and is summed there; only its rounding back to 16 bits, a loss
        that nothing measured later could see, is left out. No gradients: the training loss has its own output layer.

        On a CPU by oneDNN, which torch keeps for other shapes and formats: MKL packs the whole weight again for every few
        rows, and takes 1.6 (Zen 4) times as long for them (benchmarks/chunks.py).
        """
        import torch

        if hidden.device.type == "cuda" and hidden.dtype == self.weight.dtype != torch.float32:
            # tensor cores, float32 out
            product = torch.mm(hidden, self.weight.t(), out_dtype=torch.float32)
            return product if self.bias is None else product.add_(self.bias)
        bias = None if self.bias is None else self.bias.float()
        onednn = _onednn_linear() if hidden.device.type == "cpu" else None
        if onednn is not None:
            return onednn(hidden.float(), self._weight32, bias, "none", [], "")  # type: ignore[no-any-return]
        return torch.nn.functional.linear(hidden.float(), self._weight32, bias)

    @cached_property
    def _weight32(self) -> torch.Tensor:
        return self.weight.detach().float()

    def scored_hidden(self, contexts: Sequence[np.ndarray], targets: Sequence[np.ndarray]) -> torch.Tensor:
        """`[N, d]` hidden states that predict the tokens of `targets`, one example after another.

        `contexts[b] [C >= 1]` and `targets[b] [n]` are token ids; one forward pass over all examples, padded on
        the right: a causal model never looks there.
        """
        import torch

        lengths = [len(c) + len(t) for c, t in zip(contexts, targets, strict=True)]
        joined = [np.concatenate(pair) for pair in zip(contexts, targets, strict=True)]
        hidden = self.hidden(*padded_ids(joined, self.weight.device))
        return torch.cat([hidden[b, len(c) - 1 : lengths[b] - 1] for b, c in enumerate(contexts)])

    def example_hidden(self, ids: torch.Tensor) -> torch.Tensor:
        """`[1, T] -> [1, T, d]` of a whole sequence: what `split_head` compares with the model's own logits."""
        return self.hidden(ids, None)


@dataclass(frozen=True)
class EncoderDecoderHead(LanguageModelHead):
    """An encoder-decoder model taken apart; `backbone` is its decoder."""

    encoder: Any
    start_id: int
    """Token the decoder starts from; the row of the first target token is predicted there."""
    scale: float
    """Of the decoder's output before the output layer: d^-0.5 in T5 with tied embeddings, else 1."""

    @property
    def bodies(self) -> tuple[Any, ...]:
        return self.backbone, self.encoder

    def forward_tokens(self, threads: int | None = None) -> int:
        return forward_tokens(self.weight.device.type, threads, two_sides=True)

    def size(self, context: int, target: int) -> Size:
        """Both sides are padded on their own."""
        return context, target

    def decode(
        self,
        encoder_ids: torch.Tensor,
        encoder_mask: torch.Tensor | None,
        decoder_ids: torch.Tensor,
        decoder_mask: torch.Tensor | None = None,
        cross_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """`[B, S], [B, T] -> [B, T, d]`: teacher forcing; padding at the end of the decoder's side is not looked at.

        `cross_mask` says what the decoder sees of the encoder's side; None = `encoder_mask`.
        """
        memory = self.encoder(input_ids=encoder_ids, attention_mask=encoder_mask).last_hidden_state
        hidden = self.backbone(
            input_ids=decoder_ids,
            attention_mask=decoder_mask,
            encoder_hidden_states=memory,
            encoder_attention_mask=encoder_mask if cross_mask is None else cross_mask,
            use_cache=False,
        ).last_hidden_state
        return hidden if self.scale == 1.0 else hidden * self.scale  # type: ignore[no-any-return]

    def scored_hidden(self, contexts: Sequence[np.ndarray], targets: Sequence[np.ndarray]) -> torch.Tensor:
        """`[N, d]`: the encoder reads `contexts`, the decoder is forced along `targets`, one row per target token."""
        import torch

        shifted = [np.concatenate([[self.start_id], t[:-1]]) for t in targets]
        encoder_ids, mask = padded_ids(contexts, self.weight.device)
        hidden = self.decode(encoder_ids, mask, padded_ids(shifted, self.weight.device)[0])
        return torch.cat([hidden[b, : len(t)] for b, t in enumerate(targets)])

    def batch_hidden(self, batch: Mapping[str, Any]) -> torch.Tensor:
        """`[B, T, d]` of the decoder's side of a collated batch, with gradients.

        As above for the encoder, and `decoder_input_ids [B, T]`; where examples are packed, `decoder_segment_ids` too.
        """
        segments, own = batch.get("segment_ids"), batch.get("decoder_segment_ids")
        if segments is None or own is None:
            return self.decode(batch["input_ids"], batch["attention_mask"], batch["decoder_input_ids"])
        both = segment_mask(own, segments) | (own == 0).unsqueeze(2)  # padding looks anywhere: nothing at all is NaN
        return self.decode(
            batch["input_ids"],
            self._mask(segment_mask(segments, segments)),
            batch["decoder_input_ids"],
            self._mask(segment_mask(own, own, causal=True)),
            self._mask(both),
        )

    def example_hidden(self, ids: torch.Tensor) -> torch.Tensor:
        """The same ids on both sides."""
        return self.decode(ids, None, ids)


def split_head(model: Model) -> LanguageModelHead:
    """Take a model apart, and prove on a few tokens that the parts give the model's own logits.

    Raises TeacherError for architectures that do something between the last hidden state and the logits
    (soft-capping, scaling): chunked heads would be silently wrong for them. The proof amplifies the output layer
    until its largest value is 1000: a soft cap at 30 hardly bends the small logits of a small or untrained model.
    """
    import torch

    head = model.get_output_embeddings()
    whole = model.base_model is model and not is_encoder_decoder(model.config)
    if not isinstance(head, torch.nn.Linear) or whole:
        raise TeacherError(
            "the model's output layer is not a plain linear layer",
            where=type(model).__name__,
            found=type(head).__name__,
            expected="torch.nn.Linear",
            try_="without adapters or quantisation on lm_head",
        )
    parts = _parts(model, head)
    training = model.training
    model.eval()
    with torch.no_grad():
        ids = torch.arange(1, 5, device=head.weight.device).unsqueeze(0) % head.weight.shape[0]
        got = torch.nn.functional.linear(parts.example_hidden(ids), head.weight, head.bias).float()
        both = {"decoder_input_ids": ids} if isinstance(parts, EncoderDecoderHead) else {}
        gain = 1000 / max(float(got.abs().max()), 1e-6)
        got *= gain
        hook = head.register_forward_hook(lambda module, inputs, output: output * gain)
        try:
            expected = model(input_ids=ids, use_cache=False, **both).logits.float()
        finally:
            hook.remove()
            model.train(training)
    if not bool(torch.isfinite(expected).all()):
        raise TeacherError(
            "the model's logits are not finite",
            where=type(model).__name__,
            found="NaN or infinity on four tokens",
            try_="--dtype float32 or bfloat16, and check the weights",
        )
    # the same product twice; bfloat16 carries 8 bits, so 2 % of the largest logit is far above rounding
    if got.shape != expected.shape or not torch.allclose(got, expected, atol=0.02 * float(expected.abs().max()) + 1e-6):
        raise TeacherError(
            "the model changes its logits after the output layer",
            where=type(model).__name__,
            found=f"largest difference {float((got - expected).abs().max()):.3g}",
            expected="logits = lm_head(last hidden state)",
        )
    return parts


def _parts(model: Model, head: Any) -> LanguageModelHead:
    if not is_encoder_decoder(model.config):
        return LanguageModelHead(model.base_model, head.weight, head.bias)
    config = model.config
    # UMT5 and Switch Transformers have no entry of their own for it
    scales = getattr(
        config, "scale_decoder_outputs", config.tie_word_embeddings and config.model_type in SCALED_WHERE_TIED
    )
    scale = config.d_model**-0.5 if scales else 1.0
    return EncoderDecoderHead(
        model.get_decoder(), head.weight, head.bias, model.get_encoder(), decoder_start(config), scale
    )
