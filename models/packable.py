"""Does a model keep packed examples apart? Tried on a few tokens before any training."""

from __future__ import annotations

import inspect

import numpy as np

from kd.common.errors import DataError
from kd.models.heads import EncoderDecoderHead, split_head
from kd.models.loading import RELATIVE_POSITIONS, Model
from kd.models.packing import lay_out


def require_packable(model: Model) -> None:
    """Prove on a few tokens that a model keeps packed examples apart. Raises DataError naming its class.

    Positions must be given (they restart in every segment) or be relative, and nothing but attention under the mask
    may carry one token's state to another: recurrent layers do.
    """
    import torch

    parts = split_head(model)
    two_sides = isinstance(parts, EncoderDecoderHead)
    advice = "without --packing"
    takes = "position_ids" in inspect.signature(parts.backbone.forward).parameters
    if not (model.config.model_type in RELATIVE_POSITIONS if two_sides else takes):
        raise DataError(
            "the model's positions cannot be passed, and packed examples need their own",
            where=type(model).__name__,
            found=f"model type {model.config.model_type}",
            expected="relative positions" if two_sides else "a forward that takes position_ids",
            try_=advice,
        )
    if two_sides and not parts.takes_masks:
        raise DataError(
            "this attention takes no mask, and packed examples need one on either side",
            where=type(model).__name__,
            found=model.config._attn_implementation,
            expected="sdpa or eager",
            try_=advice,
        )
    ids = np.arange(1, 15) % len(parts.weight)
    examples = [ids[:5], ids[5:9][::-1], ids[9:]]
    batch = {name: torch.from_numpy(v).to(parts.weight.device) for name, v in lay_out(examples, [[0, 1], [2]]).items()}
    batch |= {f"decoder_{name}": batch[name] for name in ("input_ids", "segment_ids")}
    places = [(0, slice(5)), (0, slice(5, 9)), (1, slice(5))]
    training = model.training
    model.eval()
    with torch.no_grad():
        packed = parts.batch_hidden(batch)
        together = torch.cat([packed[place] for place in places]).float()
        alone = torch.cat([parts.example_hidden(batch["input_ids"][b : b + 1, part])[0] for b, part in places]).float()
    model.train(training)
    # rounding of float32 sums; one token that sees its neighbour moves by a share of its own size
    difference = float((together - alone).abs().max())
    if difference > 1e-3 * float(alone.abs().max()):
        raise DataError(
            "packed examples see each other in this model",
            where=type(model).__name__,
            found=f"largest difference {difference:.3g}",
            expected="attention alone between tokens",
            try_=advice,
        )
