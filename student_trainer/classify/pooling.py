"""The states that classification heads read, row by row."""

from __future__ import annotations

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
