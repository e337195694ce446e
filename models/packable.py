"""Check that a model keeps packed examples apart, by a forward pass over a few tokens before any training."""

from __future__ import annotations

import inspect

import numpy as np

from kd.common.errors import DataError
from kd.models.batching.packing import lay_out
from kd.models.families.positions import RELATIVE_POSITIONS
from kd.models.heads import EncoderDecoderHead, split_head
from kd.models.loading import Model


def require_packable(model: Model) -> None:
    """Raise DataError, naming the model's class, if packed examples would see each other.

    The model must accept positions (they restart in every segment) or have relative ones. Only attention under the mask
    may carry information between tokens; recurrent layers fail the check.
    """
    import torch

    parts = split_head(model)
    two_sides = isinstance(parts, EncoderDecoderHead)
    advice = "train without --packing"
    takes = "position_ids" in inspect.signature(parts.backbone.forward).parameters
    if not (model.config.model_type in RELATIVE_POSITIONS if two_sides else takes):
        raise DataError(
            "packed examples need positions of their own, and this model accepts none",
            where=type(model).__name__,
            found=f"model type {model.config.model_type}",
            expected="relative positions" if two_sides else "a forward that takes position_ids",
            try_=advice,
        )
    if two_sides and not parts.takes_masks:
        raise DataError(
            "packed examples need an attention mask on both sides, and this attention takes none",
            where=type(model).__name__,
            found=model.config._attn_implementation,
            expected="sdpa or eager",
            try_=advice,
        )
    ids = np.arange(1, 15) % len(parts.weight)
    examples = [ids[:5], ids[5:9][::-1], ids[9:]]
    batch = {name: torch.from_numpy(v).to(parts.weight.device) for name, v in lay_out(examples, [[0, 1], [2]]).items()}
    batch |= {f"decoder_{name}": batch[name] for name in ("input_ids", "segment_ids")}
    spans = [(0, slice(5)), (0, slice(5, 9)), (1, slice(5))]
    training = model.training
    model.eval()
    with torch.no_grad():
        packed = parts.batch_hidden(batch)
        together = torch.cat([packed[span] for span in spans]).float()
        alone = torch.cat([parts.example_hidden(batch["input_ids"][b : b + 1, part])[0] for b, part in spans]).float()
    model.train(training)
    # float32 sums differ by rounding alone; a token that sees its neighbour changes by a large part of its size
    difference = float((together - alone).abs().max())
    if difference > 1e-3 * float(alone.abs().max()):
        raise DataError(
            "packed examples do not score as they do alone in this model",
            where=type(model).__name__,
            found=f"largest difference {difference:.3g}",
            expected="a model in which only attention connects tokens, and whose positions start at 0",
            try_=advice,
        )
