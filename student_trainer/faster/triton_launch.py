"""Run the Triton kernel of `triton_kernels` over rows of products.

Only CUDA runs it, or Triton's interpreter (TRITON_INTERPRET=1, before the first import of triton).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kd.models.families.logit_transform import LogitTransform

BLOCK = 4096
"""Columns of a row that are read at once."""
ENTRIES = 512
"""Kept ids of a row that are read at once."""
WARPS = 16
"""Per program. At 32 to 40 registers a thread three or four programs are on a multiprocessor. An H200 then has 400 to 500 rows
under way: in bfloat16 with 50,257 columns 40 to 50 MB, which its L2 can hold from the first pass to the second."""


@dataclass(frozen=True)
class KeptIds:
    """The teacher's side of n rows: kept ids, and everything else as one outcome."""

    ids: Tensor
    """[E] int64, one row after another"""
    p: Tensor
    """[E] the teacher's probabilities"""
    p_rest: Tensor
    """[n] and of everything else"""
    starts: Tensor
    """[n + 1] int64: where each row's ids begin"""


def gradient_rows_(
    products: Tensor,
    bias: Tensor | None,
    gold_ids: Tensor,
    kept: KeptIds | None,
    *,
    kd_weight: float,
    ce_weight: float,
    temperature: float,
    transform: LogitTransform,
) -> tuple[Tensor, Tensor]:
    """Values of the divergence and of the cross-entropy, `[n]` each; `products` become kd_weight dD + ce_weight dCE.

    products   [n, V]  hidden states times output layer, without bias, scale and cap; any strides
    bias       [V], or None
    kept       the teacher's side; None = cross-entropy alone, whose divergence is 0
    """
    import triton.language as tl

    from kd.student_trainer.faster.triton_kernels import gradient_rows

    count, width = products.shape
    wide = torch.promote_types(products.dtype, torch.float32)
    divergences, cross_entropies = (torch.zeros(count, dtype=wide, device=products.device) for _ in range(2))
    if count == 0:
        return divergences, cross_entropies
    sides: tuple[Any, ...] = (None, None, None, None, None)
    if kept is not None:
        scratch = torch.empty(len(kept.ids), dtype=wide, device=products.device)
        tensors = (kept.ids, kept.p, kept.p_rest, kept.starts)
        sides = (*(tensor.contiguous() for tensor in tensors), scratch)
    with torch.cuda.device(products.device.index if products.is_cuda else -1):  # Triton launches on the current device
        gradient_rows[(count,)](
            products,
            products.stride(0),
            products.stride(1),
            None if bias is None else bias.contiguous(),
            gold_ids.contiguous(),
            *sides,
            divergences,
            cross_entropies,
            width,
            WIDE=tl.float64 if wide == torch.float64 else tl.float32,
            KD_WEIGHT=kd_weight,
            CE_WEIGHT=ce_weight,
            TEMPERATURE=temperature,
            SCALE=transform.scale,
            CAP=transform.cap,
            BLOCK=BLOCK,
            ENTRIES=ENTRIES,
            num_warps=WARPS,
            enable_fp_fusion=True,  # a product and a sum rounded once; Triton 3.9 warns where nobody says so
        )
    return divergences, cross_entropies
