"""States that classification heads read, and adapters of a classifier added in."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from kd.models.classifiers import last_states
from kd.student_trainer.classify.encoding import EncodedRows, length_batches


@torch.no_grad()
def pooled_states(backbone: Any, rows: EncodedRows, *, tokens_per_batch: int = 4096) -> Tensor:
    """What heads read, `[n, d]` float32 on the CPU, in the rows' order."""
    device = next(backbone.parameters()).device
    states = torch.empty((len(rows), backbone.config.hidden_size))
    for numbers, batch in length_batches(rows, tokens_per_batch):
        found = last_states(backbone, {k: v.to(device) for k, v in batch.items()}, rows.pad_id)
        states[numbers] = found.float().cpu()
    return states


def merged_adapters(model: Any) -> Any:
    """The plain model with its adapters added in."""
    with warnings.catch_warnings():  # peft warns of tied weights in configurations that have none
        warnings.filterwarnings("ignore", message="Input and output embeddings are no longer tied")
        return model.merge_and_unload()
