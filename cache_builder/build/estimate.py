"""What a build would cost: rows, bytes and time, estimated without loading the model."""

from __future__ import annotations

import time
from typing import Any

import torch

from kd.cache_builder.build.plan import BuildPlan
from kd.cache_builder.store.records.commits import committed
from kd.data.tokenizing.block_config import BlockConfig
from kd.models.loading import parameter_count, resolve_device, resolve_dtype


def _bound(most: int, blocks: BlockConfig) -> str:
    """The limit that gives the counts of a plan without answers."""
    if most == blocks.target_len:
        return f"target length: {most} tokens per answer"
    return f"generation limit: {most} new tokens per answer; tokenised again, a text may have a few more"


def estimate(plan: BuildPlan) -> dict[str, Any]:
    """The cost of a build: rows, bytes, seconds. Multiplies matrices for a fraction of a second; runs no model.

    Bytes: the stored arrays before compression, plus the text. This is an upper bound; real caches are 25-45 % smaller.
    Seconds: 2 * parameters * tokens floating-point operations at the measured matrix speed of this device.

    While the teacher has not answered (`targets_known` is false), the counts assume the longest possible answers. Their
    names say so (`rows_at_most`), and `bound` names the limit. The seconds are those of scoring; answering comes on top.
    The fingerprint covers the answers, so it is None.
    """
    parameters = parameter_count(plan.request.teacher)
    device, dtype = resolve_device(plan.request.teacher.device), resolve_dtype(plan.request.teacher)
    a = torch.ones(1024, 2048, device=device, dtype=dtype)
    b = torch.ones(2048, 2048, device=device, dtype=dtype)
    (a @ b).sum().item()
    started = time.perf_counter()
    for _ in range(4):
        (a @ b).sum().item()
    speed = 4 * 2 * 1024 * 2048 * 2048 / (time.perf_counter() - started)
    rows = plan.manifest.rows
    counts = {
        "examples": plan.manifest.examples,
        "rows": rows,
        "shards": len(plan.manifest.shards),
        "teacher_tokens": plan.tokens,
    }
    # the speed of a server is not known here
    seconds = None if plan.request.serving is not None else 2 * parameters * plan.tokens / speed
    if plan.targets_known:
        text = plan.text.text_bytes
        more: dict[str, Any] = {}
    else:
        text = rows * max(len(piece) for i, piece in enumerate(plan.vocabulary) if i not in plan.special_ids)
        counts = {f"{name}_at_most": count for name, count in counts.items()}
        more = {"bound": _bound(len(plan.rows[0].target_ids), plan.request.blocks)}
    return {
        "fingerprint": plan.manifest.fingerprint if plan.targets_known else None,
        "targets_known": plan.targets_known,
        **counts,
        "teacher_parameters": parameters,
        "bytes_per_token_before_compression": plan.raw_bytes_per_token,
        "bytes_at_most": rows * plan.raw_bytes_per_token + text,
        "seconds_estimated" if plan.targets_known else "scoring_seconds_at_most": seconds,
        "device": device,
        **({"quantised": quantised} if (quantised := plan.manifest.provenance.get("quantised")) else {}),
        **more,
        "left_out": plan.left_out.document(),
        "token_notes": plan.notes.document(),
        "committed_shards": len(committed(plan.request.out, len(plan.manifest.shards))),
    }
