"""The states that classification heads read, and classifiers with their adapters merged in."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from kd.models.classifiers import last_states
from kd.student_trainer.classify.encoding import EncodedRows, length_batches


@torch.no_grad()
def pooled_states(backbone: Any, rows: EncodedRows, *, tokens_per_batch: int) -> Tensor:
    """The state that a head reads of each row, `[n, d]` float32 on the CPU, in the order of the rows."""
    device = next(backbone.parameters()).device
    states = torch.empty((len(rows), backbone.config.get_text_config().hidden_size))
    for numbers, batch in length_batches(rows, tokens_per_batch):
        last = last_states(backbone, {k: v.to(device) for k, v in batch.items()}, rows.pad_id)
        states[numbers] = last.float().cpu()
    return states


def merged_adapters(model: Any) -> Any:
    """The plain model with its adapters merged into its weights."""
    with warnings.catch_warnings():  # peft warns of tied weights in configurations that have none
        warnings.filterwarnings("ignore", message="Input and output embeddings are no longer tied")
        return model.merge_and_unload()
