"""What a build would cost, before a weight is loaded."""

from __future__ import annotations

import time
from typing import Any

import torch

from kd.cache_builder.build.plan import BuildPlan
from kd.cache_builder.store.commits import committed
from kd.data.blocks import BlockConfig
from kd.models.loading import parameter_count, resolve_device, resolve_dtype


def _bound(most: int, blocks: BlockConfig) -> str:
    """What the counts of a plan without answers rest on."""
    if most == blocks.target_len:
        return f"target length: {most} tokens per answer"
    return f"generation limit: {most} new tokens per answer; tokenised again, a text may have a few more"


def estimate(plan: BuildPlan) -> dict[str, Any]:
    """What a build would cost: rows, bytes, seconds. Runs a fraction of a second of matrix products, no model.

    Bytes: stored arrays before compression plus the text (an upper bound; real caches end 25-45 % below).
    Seconds: 2 * parameters * tokens floating-point operations at this device's measured matrix speed.

    While the teacher has not answered (`targets_known` false), the counts are those of answers as long as they may get,
    under names that say so (`rows_at_most`), and `bound` says what they rest on; the seconds are of scoring them,
    answering comes on top; and the fingerprint, which covers the answers, is None.
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
    known, rows = plan.targets_known, plan.manifest.rows
    counts = {
        "examples": plan.manifest.examples,
        "rows": rows,
        "shards": len(plan.manifest.shards),
        "teacher_tokens": plan.tokens,
    }
    seconds = 2 * parameters * plan.tokens / speed
    if known:
        text = sum(len(r.example.target.encode()) for r in plan.rows)
        overlong = plan.manifest.provenance["overlong"]
        own = {
            "left_out_without_text": plan.request.corpus.without_text,
            "pairs_dropped": overlong["dropped"],
            "pairs_truncated": overlong["truncated"],
        }
    else:
        text = rows * max(len(piece) for i, piece in enumerate(plan.vocabulary) if i not in plan.special_ids)
        counts = {f"{name}_at_most": count for name, count in counts.items()}
        own = {"bound": _bound(len(plan.rows[0].target_ids), plan.request.blocks)}
    return {
        "fingerprint": plan.manifest.fingerprint if known else None,
        "targets_known": known,
        **counts,
        "teacher_parameters": parameters,
        "bytes_per_token_before_compression": plan.raw_bytes_per_token,
        "bytes_at_most": rows * plan.raw_bytes_per_token + text,
        "seconds_estimated" if known else "scoring_seconds_at_most": seconds,
        "device": device,
        **own,
        "committed_shards": len(committed(plan.request.out, len(plan.manifest.shards))),
    }
