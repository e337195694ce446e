"""A language model split at its output layer: hidden states of a batch, and logits of a few rows at a time.

The teacher pass, the student's loss and the evaluation share this code, so that all of them see the same positions.
`[batch, T, V]` logits are never formed. Hidden states come for whole batches, and the output layer is applied to a few
rows at a time: at V = 50k and 8,192 tokens the full tensor would take 1.6 GB. `padded_batches` says how many rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import numpy as np

from kd.common.errors import TeacherError
from kd.models.batching.gaps import NO_GAPS, Gaps
from kd.models.batching.packing import segment_mask
from kd.models.batching.padded_batches import Size, forward_tokens, on_device, padded_ids
from kd.models.families.body_with_neck import BodyWithNeck, with_neck
from kd.models.families.logit_transform import PLAIN, LogitTransform, named_transforms
from kd.models.families.output_columns import counted_columns, with_final_bias
from kd.models.families.own_logits import require_own_logits
from kd.models.loading import Model
from kd.models.model_config import decoder_start, is_encoder_decoder
from kd.models.placement.spread_models import spread_body, whole_weight
from kd.models.weights.quantised_checkpoints import unpack

if TYPE_CHECKING:
    import torch


SCALED_WHERE_TIED = ("umt5", "switch_transformers")
"""Model types that scale the decoder's output by d^-0.5 where the output layer is tied to the embedding."""
OF_TWO_MODELS = ("encoder-decoder",)
"""Model types that are made of two whole models, such as BERT twice. The decoder is a language model with a head of its own."""


@cache
def _onednn_linear() -> Any | None:
    """torch's operator for a matrix product by oneDNN, or None where torch has no such operator or would not use MKL anyway."""
    import torch

    try:
        return torch.ops.mkldnn._linear_pointwise if torch._C.has_mkl and torch._C._has_mkldnn else None
    except AttributeError:  # private names of torch, which may change
        return None


@dataclass(frozen=True)
class LanguageModelHead:
    """A causal model in two parts: `hidden = backbone(...)`, `logits = transform(hidden @ weight.T + bias)`."""

    backbone: Any
    weight: torch.Tensor
    """[V, d]"""
    bias: torch.Tensor | None
    """[V] or None"""
    transform: LogitTransform = field(default=PLAIN, kw_only=True)
    """What the model does to its logits: nothing in most families."""

    @property
    def bodies(self) -> tuple[Any, ...]:
        """The modules that compute hidden states."""
        return self.backbone.modules if isinstance(self.backbone, BodyWithNeck) else (self.backbone,)

    def forward_tokens(self, threads: int | None = None) -> int:
        """Default token budget of a forward pass on `threads` threads of a CPU; None is torch's number of threads."""
        return forward_tokens(self.weight.device.type, threads)

    def size(self, context: int, target: int) -> Size:
        """Tokens of an example as `batches_by_length` counts them."""
        return context + target

    def hidden(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None, **positions: torch.Tensor
    ) -> torch.Tensor:
        """`[B, T] -> [B, T, d]` after the final norm. Without `position_ids`, positions are counted from the mask."""
        return self.backbone(  # type: ignore[no-any-return]
            input_ids=input_ids, attention_mask=attention_mask, use_cache=False, **positions
        ).last_hidden_state

    def batch_hidden(self, batch: Mapping[str, Any]) -> torch.Tensor:
        """Hidden states `[B, T, d]` of a collated batch, with gradients.

        The batch has `input_ids` and `attention_mask [B, T]`; packed examples have `segment_ids` and `position_ids` instead of
        the mask.
        """
        segments = batch.get("segment_ids")
        if segments is None:
            return self.hidden(batch["input_ids"], batch["attention_mask"])
        ids, positions = batch["input_ids"], batch["position_ids"]
        if self.takes_masks:
            return self.hidden(ids, self._mask(segment_mask(segments, segments, causal=True)), position_ids=positions)
        if self.backbone.config._attn_implementation not in ("sdpa", "eager", "flex_attention"):
            # flash attention finds segments in a single row only, by the positions that are 0
            return self.hidden(ids.view(1, -1), None, position_ids=positions.view(1, -1)).view(*ids.shape, -1)
        return self.hidden(ids, None, position_ids=positions)

    @cached_property
    def takes_masks(self) -> bool:
        """Whether packed examples can be kept apart by a mask of ours; else transformers finds segments by their positions.

        Kernels such as flash attention take no mask. In a model with sliding windows, one mask for all layers would widen
        the windows.
        """
        config = self.backbone.config.get_text_config()
        kinds = getattr(config, "layer_types", None) or ()
        windows = getattr(config, "sliding_window", None) or any(kind != "full_attention" for kind in kinds)
        return config._attn_implementation in ("sdpa", "eager") and not windows

    def _mask(self, allowed: torch.Tensor) -> torch.Tensor:
        """`[B, Q, K] -> [B, 1, Q, K]`: booleans for sdpa, numbers that are added to the scores for eager attention."""
        import torch

        allowed = allowed.unsqueeze(1)
        if self.backbone.config._attn_implementation == "sdpa":
            return allowed
        nothing = torch.zeros(allowed.shape, dtype=self.weight.dtype, device=allowed.device)
        return nothing.masked_fill_(~allowed, torch.finfo(self.weight.dtype).min)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """`[N, d] -> [N, V]` float32, whatever the model's dtype. No gradients: the training loss has its own output layer."""
        return self.transform.apply_(self._product(hidden))

    def _product(self, hidden: torch.Tensor) -> torch.Tensor:
        """`hidden @ weight.T + bias` in float32.

        A product of 16-bit numbers is exact in float32 and is summed in float32. Only the rounding of the sum back to 16
        bits is left out.

        On a CPU the product is computed by oneDNN instead of MKL, torch's default. MKL packs the whole weight again for
        every chunk of rows and takes 1.6 times as long on a Zen 4 (benchmarks/chunks.py).
        """
        import torch

        if self.weight.dtype in (
            torch.bfloat16,
            torch.float16,
        ):  # Mamba's states stay in float32, and it rounds them here
            hidden = hidden.to(self.weight.dtype)
        if hidden.device.type == "cuda" and hidden.dtype == self.weight.dtype != torch.float32:
            # on tensor cores, with a float32 result
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

    def scored_hidden(
        self,
        contexts: Sequence[np.ndarray],
        targets: Sequence[np.ndarray],
        gaps: Sequence[Gaps] | None = None,
    ) -> torch.Tensor:
        """`[N, d]` hidden states that predict the tokens of `targets`, one example after another.

        `contexts[b] [C >= 1]` and `targets[b] [n]` are token ids; `gaps` are the tokens between them, None where no example
        has any. All examples go through one forward pass, padded on the right, where a causal model never looks.
        """
        import torch

        parts = list(zip(contexts, targets, [NO_GAPS] * len(targets) if gaps is None else gaps, strict=True))
        hidden = self.hidden(*padded_ids([g.sequence(c, t) for c, t, g in parts], self.weight.device))
        return torch.cat([hidden[b, _predicting(c, t, g, hidden.device)] for b, (c, t, g) in enumerate(parts)])

    def example_hidden(self, ids: torch.Tensor) -> torch.Tensor:
        """`[1, T] -> [1, T, d]` for one sequence; `split_head` compares its logits with the model's own."""
        return self.hidden(ids, None)


def _predicting(context: np.ndarray, target: np.ndarray, gaps: Gaps, device: torch.device) -> slice | torch.Tensor:
    """The positions of a sequence that predict its scored tokens."""
    if not len(gaps):
        return slice(len(context) - 1, len(context) + len(target) - 1)
    import torch

    return on_device(torch.from_numpy(gaps.positions(len(context), len(target))), device)


@dataclass(frozen=True)
class EncoderDecoderHead(LanguageModelHead):
    """An encoder-decoder model in parts; `backbone` is its decoder."""

    encoder: Any
    start_id: int
    """Id of the token that the decoder starts from. The first target token is predicted at its position."""
    scale: float
    """Factor of the decoder's output before the output layer: d^-0.5 in T5 with tied embeddings, else 1."""
    forced: tuple[int, ...] = ()
    """Ids that the decoder reads after its start token, before the first token is predicted."""

    @property
    def bodies(self) -> tuple[Any, ...]:
        """Decoder and encoder."""
        return self.backbone, self.encoder

    def forward_tokens(self, threads: int | None = None) -> int:
        """Default token budget of a forward pass, shared by encoder and decoder."""
        return forward_tokens(self.weight.device.type, threads, two_sides=True)

    def size(self, context: int, target: int) -> Size:
        """Tokens of the encoder and of the decoder, which are padded separately."""
        return context, target + len(self.forced)

    def decoder_inputs(self, target: np.ndarray) -> np.ndarray:
        """`[F + n]`: what the decoder reads to predict `target [n]` at its last n positions; F ids are forced."""
        return np.concatenate([[self.start_id, *self.forced], target[:-1]])

    def decode(
        self,
        encoder_ids: torch.Tensor,
        encoder_mask: torch.Tensor | None,
        decoder_ids: torch.Tensor,
        decoder_mask: torch.Tensor | None = None,
        cross_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """`[B, S], [B, T] -> [B, T, d]` by teacher forcing. The decoder is causal, so it does not look at padding at its end.

        `cross_mask` says what the decoder sees of the encoder's side; None is `encoder_mask`.
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

    def scored_hidden(
        self,
        contexts: Sequence[np.ndarray],
        targets: Sequence[np.ndarray],
        gaps: Sequence[Gaps] | None = None,
    ) -> torch.Tensor:
        """`[N, d]`, one row per target token: the encoder reads `contexts`, the decoder is fed `targets`."""
        import torch

        assert not any(map(len, gaps or ())), "a decoder is fed scored tokens alone"
        shifted = [self.decoder_inputs(t) for t in targets]
        encoder_ids, mask = padded_ids(contexts, self.weight.device)
        hidden = self.decode(encoder_ids, mask, padded_ids(shifted, self.weight.device)[0])
        first = len(self.forced)
        return torch.cat([hidden[b, first : first + len(t)] for b, t in enumerate(targets)])

    def batch_hidden(self, batch: Mapping[str, Any]) -> torch.Tensor:
        """Hidden states `[B, T, d]` of the decoder's side of a collated batch, with gradients.

        The batch has the encoder's entries as above, and `decoder_input_ids [B, T]`; packed examples have
        `decoder_segment_ids` too.
        """
        segments, decoder_segments = batch.get("segment_ids"), batch.get("decoder_segment_ids")
        if segments is None or decoder_segments is None:
            return self.decode(batch["input_ids"], batch["attention_mask"], batch["decoder_input_ids"])
        padding = (decoder_segments == 0).unsqueeze(2)  # it may look anywhere: attention to nothing at all gives NaN
        cross_mask = segment_mask(decoder_segments, segments) | padding
        return self.decode(
            batch["input_ids"],
            self._mask(segment_mask(segments, segments)),
            batch["decoder_input_ids"],
            self._mask(segment_mask(decoder_segments, decoder_segments, causal=True)),
            self._mask(cross_mask),
        )

    def example_hidden(self, ids: torch.Tensor) -> torch.Tensor:
        """`[1, T] -> [1, T, d]` with the same ids on both sides."""
        return self.decode(ids, None, ids)


def split_head(model: Model, forced: Sequence[int] = ()) -> LanguageModelHead:
    """Split a model at its output layer, and prove on four tokens that the parts give the model's own logits.

    forced  ids that an encoder-decoder's targets begin with and nobody predicts, see `kd.models.families.encoder_layout`

    Raises TeacherError for a model that cannot be taken apart, see `kd.models.families.own_logits`.
    """
    import torch

    if model.config.model_type in OF_TWO_MODELS:
        raise TeacherError(
            "a model that is made of two others cannot be split at its output layer",
            where=type(model).__name__,
            found=f"{model.config.encoder.model_type} and {model.config.decoder.model_type}",
            expected="an encoder-decoder of one family, such as T5 or BART",
        )
    unpack(model)
    head, backbone = model.get_output_embeddings(), _backbone(model)
    if isinstance(head, torch.nn.Embedding):
        raise TeacherError(
            "the model's body computes its logits itself",
            where=type(model).__name__,
            found="an embedding in place of an output layer",
            expected="logits = lm_head(last hidden state)",
        )
    if not isinstance(head, torch.nn.Linear) or backbone is model:
        raise TeacherError(
            "the model's output layer is not a plain linear layer",
            where=type(model).__name__,
            found=type(head).__name__,
            expected="torch.nn.Linear",
            try_="without adapters or quantisation on lm_head",
        )
    weight, bias = whole_weight(head), whole_weight(head, "bias")
    assert weight is not None
    parts = _parts(model, weight, bias, backbone, tuple(forced))
    plain, decoder = LanguageModelHead(backbone, weight, bias), isinstance(parts, EncoderDecoderHead)
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            transform = require_own_logits(
                model, weight, lambda ids: parts.example_hidden(ids)[0], plain.logits, decoder=decoder
            )
    finally:
        model.train(training)
    return parts if transform.plain else replace(parts, transform=transform)


_PROVEN: WeakKeyDictionary[Any, tuple[tuple[LogitTransform, ...], LogitTransform]] = WeakKeyDictionary()


def proven_transform(model: Model) -> LogitTransform:
    """What a model does to its logits. `split_head` proves it once per model, where the model names any number for it."""
    model = model.get_base_model() if hasattr(model, "get_base_model") else model
    readings = named_transforms(model)
    if readings == (PLAIN,):
        return PLAIN
    if _PROVEN.get(model, ((), PLAIN))[0] != readings:  # not seen yet, or one of its numbers was changed
        _PROVEN[model] = readings, split_head(model).transform
    return _PROVEN[model][1]


def _backbone(model: Model) -> Any:
    """The module that computes the hidden states of a causal model, or of a decoder; the model itself where none is found."""
    if is_encoder_decoder(model.config):
        return model.get_decoder()
    # `base_model` goes by a prefix, and Llama 4's text model has that of the model around it
    body = getattr(model, "model", model) if model.base_model is model else model.base_model
    return body if body is model else with_neck(model, body)


def _parts(
    model: Model, weight: torch.Tensor, bias: torch.Tensor | None, backbone: Any, forced: tuple[int, ...]
) -> LanguageModelHead:
    bias, backbone = with_final_bias(model, bias), spread_body(model, backbone, weight.device)
    bias = None if bias is None else bias.to(weight.device)
    weight, bias = counted_columns(model, weight, bias)
    if not is_encoder_decoder(model.config):
        return LanguageModelHead(backbone, weight, bias)
    config = model.config
    # the configurations of UMT5 and Switch Transformers have no entry for the scaling
    scales = getattr(
        config, "scale_decoder_outputs", config.tie_word_embeddings and config.model_type in SCALED_WHERE_TIED
    )
    scale = config.d_model**-0.5 if scales else 1.0
    encoder = spread_body(model, model.get_encoder(), weight.device)
    return EncoderDecoderHead(backbone, weight, bias, encoder, decoder_start(config), scale, forced)
