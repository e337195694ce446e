"""What a build would cost: rows, bytes and time, estimated without loading the model. What to keep, from a pilot that loads it."""

from __future__ import annotations

import os
import time
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from kd.cache_builder.build.build_settings import BuildSettings, PlanSettings
from kd.cache_builder.build.builder import loaded_teacher
from kd.cache_builder.build.from_settings import Watch, in_silence, pilot_plan_of, plan_of, sampled_plan_of
from kd.cache_builder.build.object_store.s3_objects import S3Objects
from kd.cache_builder.build.object_store.s3_writer import committed_objects
from kd.cache_builder.build.plan import BuildPlan
from kd.cache_builder.store.profiles import PROFILES
from kd.cache_builder.store.ragged import KEPT
from kd.cache_builder.store.records.commits import committed
from kd.cache_builder.store.records.manifest import Layout
from kd.cache_builder.store.targets import TargetConfig
from kd.cache_builder.teacher.fidelity import (
    Pilot,
    error_of_drawn_tails,
    error_of_draws,
    error_of_first,
    largest_probability,
    lengths_kept,
    sizes_up_to,
    smallest_k,
)
from kd.common.errors import DataError
from kd.common.paths import as_path
from kd.common.settings import flattened, make
from kd.data.tokenizing.block_config import BlockConfig
from kd.models.loading import parameter_count
from kd.models.model_config import resolve_dtype
from kd.models.model_request import ModelRequest, resolve_device


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
    parameters, (device, speed) = parameter_count(plan.request.teacher), matrix_speed(plan.request.teacher)
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
        "committed_shards": _committed(plan),
    }


def _committed(plan: BuildPlan) -> int:
    """Shards that are committed where the cache is built."""
    shards = len(plan.manifest.shards)
    if plan.request.url is None:
        return len(committed(plan.request.out, shards))
    return len(committed_objects(S3Objects(plan.request.url), shards))


def matrix_speed(teacher: ModelRequest) -> tuple[str, float]:
    """The device of a teacher, and how many floating-point operations a second it makes there in a product of matrices."""
    device, dtype = resolve_device(teacher.device), resolve_dtype(teacher)
    a = torch.ones(1024, 2048, device=device, dtype=dtype)
    b = torch.ones(2048, 2048, device=device, dtype=dtype)
    (a @ b).sum().item()
    started = time.perf_counter()
    for _ in range(4):
        (a @ b).sum().item()
    return device, 4 * 2 * 1024 * 2048 * 2048 / (time.perf_counter() - started)


def sampled_estimate(settings: BuildSettings, count: int) -> dict[str, Any]:
    """The cost of a build as `estimate` says it, from `count` examples of the text that were drawn; loads no model.

    What is counted, not estimated: `text_examples` and `text_characters`, for which the whole text is read, and what reading left
    out. Every estimate has its `_error`, half of its 95 % interval. What tokenising leaves out and notices is that of the sample.
    The fingerprint covers all tokens, so it is None.
    """
    plan, sample, left_out = sampled_plan_of(settings, count)
    values = {
        n: np.zeros(len(sample.drawn), dtype=np.int64) for n in ("examples", "rows", "teacher_tokens", "text_bytes")
    }
    for number, row in sample.by_example(plan.rows, plan.request.corpus.kind):
        rows, text = len(row.target_ids), len(row.example.target.encode())
        for name, value in zip(values, (1, rows, rows + row.read_only, text), strict=True):
            values[name][number] += value
    totals = {name: sample.estimate(of_name) for name, of_name in values.items()}
    layout = plan.request.layout or Layout.for_rows(round(totals["rows"][0]))
    parameters, (device, speed) = parameter_count(plan.request.teacher), matrix_speed(plan.request.teacher)
    each = None if plan.request.serving is not None else 2 * parameters / speed
    raw = plan.raw_bytes_per_token
    estimates: dict[str, tuple[float, float]] = {
        **{name: totals[name] for name in ("examples", "rows", "teacher_tokens")},
        "shards": (max(totals["rows"][0] / layout.shard_rows + 0.5, 1.0), totals["rows"][1] / layout.shard_rows),
        "bytes_at_most": (
            raw * totals["rows"][0] + totals["text_bytes"][0],
            raw * totals["rows"][1] + totals["text_bytes"][1],
        ),
    }
    result: dict[str, Any] = {
        "fingerprint": None,
        "targets_known": True,
        "text_examples": sample.examples,
        "text_characters": sample.prompts + sample.targets,
        "sampled_examples": len(sample.drawn),
        "sample_seed": settings.seed,
    }
    for name, (total, half) in estimates.items():
        result |= {name: round(total), f"{name}_error": round(half) if np.isfinite(half) else None}
    tokens, error = totals["teacher_tokens"]
    return result | {
        "seconds_estimated": None if each is None else each * tokens,
        "seconds_error": None if each is None or not np.isfinite(error) else each * error,
        "teacher_parameters": parameters,
        "bytes_per_token_before_compression": raw,
        "device": device,
        "left_out": left_out.document(),
        "left_out_of_sample": plan.left_out.document(),
        "token_notes_of_sample": plan.notes.document(),
    }


def plan_cache(teacher: str, *, out: str | os.PathLike[str], **settings: Any) -> dict[str, Any]:
    """What a build would cost, as `kd cache plan --json` says it. Writes nothing, and loads no weights without `fidelity`.

    teacher    name of the teacher, as `kd cache build --teacher` takes it
    out        folder of the cache that would be built; what is committed in it is counted
    settings   settings of `kd cache plan` by their names in Python: data, top_k, plan_sample, fidelity, …

    Raises KdError for what could not be built.

    >>> import kd
    >>> whole, sampled = (kd.plan_cache("demo", data="demo", out="runs/new", plan_sample=n) for n in (None, 100))
    >>> sampled["text_examples"], sampled["sampled_examples"], abs(sampled["rows"] - whole["rows"]) < 2 * sampled["rows_error"]
    (438, 100, True)
    """
    given = {"teacher": teacher, "out": as_path(out), **flattened(PlanSettings, settings)}
    return planned_cost(make(PlanSettings, given))


def planned_cost(settings: PlanSettings, watch: Watch = in_silence) -> dict[str, Any]:
    """What `kd cache plan` says. `watch` drives the pass over the text."""
    if settings.plan_sample is None:
        cost = estimate(plan_of(settings.build, watch=watch))
    else:
        cost = sampled_estimate(settings.build, settings.plan_sample)
    if settings.pilot.fidelity is not None:
        pilot = pilot_plan_of(settings.build)
        cost["fidelity"] = fidelity(pilot, settings.pilot.fidelity, settings.pilot.fidelity_rows)
    return cost


LEASTS = (0.05, 0.02, 0.01, 0.005, 0.003, 0.002, 0.0015, 0.001, 0.0005, 0.0002, 0.0001)
"""Least probabilities that a proposal for the profile adaptive chooses from."""
TAIL_SAMPLES = 50
"""Draws that a proposal of draws from the tail has: docs/choosing.md has what students gain from them."""
SURE, UNSURE = 0.1, 1.0
"""Nats of mean entropy below which a teacher says hardly more than the text, and above which it says much more."""
GAIN = {
    "sure": "next to nothing. The teacher is nearly certain of every token, so its soft targets are the text. With 0.012 nats "
    "(kd experiment uld-mini) nothing was gained beyond the error",
    "between": "little. Compare with --loss ce over several seeds (kd experiment) before you pay for the whole text",
    "unsure": "something. The teacher says more than the text does. With 2.0 nats on prose (docs/demo.md) the "
    "student's perplexity fell by a fifth, against cross-entropy at equal steps",
}
"""What the teacher's entropy means for the gain to expect; measured with small models."""


def fidelity(plan: BuildPlan, error: float, rows: int) -> dict[str, Any]:
    """What to keep for a wanted error of the gradient of `kl`, from a pilot of `rows` rows through the teacher.

    The rows are spread over the text. Raises DataError for a teacher that an engine runs: it gives no whole rows.
    """
    if plan.request.serving is not None or not plan.targets_known:
        raise DataError(
            "a pilot needs a teacher in this process, and targets that are known",
            found="a teacher that an engine runs" if plan.request.serving is not None else "--targets teacher",
            try_="the same command without --fidelity",
        )
    pilot = _pilot(plan, rows)
    k = smallest_k(pilot, error)
    adaptive = largest_probability(pilot, error, LEASTS, PROFILES["adaptive"].top_k)
    softer = {t: smallest_k(pilot.tempered(t), error) for t in plan.manifest.targets.temperatures if t != 1.0}
    certain = "sure" if pilot.entropy < SURE else "unsure" if pilot.entropy > UNSURE else "between"
    return {
        "rows": len(pilot.ids),
        "entropy_nats": pilot.entropy,
        "rows_with_one_token_above_0.95": pilot.certain,
        "gain_to_expect": GAIN[certain],
        "error_wanted": error,
        "top_k": k,
        "top_k_by_temperature": softer,
        "adaptive": None
        if adaptive is None
        else dict(zip(("min_probability", "tokens", "error"), adaptive, strict=True)),
        "tail_samples": _drawn_tails(pilot, k),
        "as_set": _as_set(plan, pilot),
        "errors_by_top_k": {
            size: error_of_first(pilot, torch.full((len(pilot.ids),), size)) for size in sizes_up_to(pilot.ids.shape[1])
        },
        "bytes_by_top_k": {
            size: raw_bytes(plan, replace(plan.manifest.targets, **PLAIN, top_k=size))
            for size in sizes_up_to(pilot.ids.shape[1])
        },
        "error_of_50_draws_without_bias": error_of_draws(pilot, 50),
    }


def _drawn_tails(pilot: Pilot, k: int) -> dict[str, Any] | None:
    """What a row keeps of tokens above 1 / `TAIL_SAMPLES` and of draws from the rest; None where `k` tokens are no more."""
    kept = (pilot.probabilities >= 1 / TAIL_SAMPLES).sum(dim=1).clamp(min=1, max=PROFILES["adaptive"].top_k)
    tokens = float(kept.double().mean())
    draws, error = error_of_drawn_tails(pilot, kept, TAIL_SAMPLES)
    if tokens + draws >= k:
        return None
    return {
        "min_probability": 1 / TAIL_SAMPLES,
        "tail_samples": TAIL_SAMPLES,
        "tokens": tokens,
        "draws": draws,
        "error_without_bias": error,
    }


def _as_set(plan: BuildPlan, pilot: Pilot) -> dict[str, Any] | None:
    """What rows that differ in length would keep under the settings of the plan; None where all rows keep as many tokens."""
    config = plan.manifest.targets
    if not config.ragged:
        return None
    kept = lengths_kept(pilot, config)
    mean = float(kept.double().mean())
    unused = sum(
        np.dtype(a.dtype).itemsize * (config.top_k - mean)
        for a in plan.manifest.arrays
        if a.ragged and a.counts == KEPT
    )
    return {
        "tokens": mean,
        "rows_of_one_token": float((kept == 1).double().mean()),
        "error": error_of_first(pilot, kept),
        "bytes_before_compression": round(plan.raw_bytes_per_token - unused),
    }


PLAIN: dict[str, Any] = {
    "profile": "kl",
    "samples": 0,
    "tail_bands": 0,
    "min_probability": 0.0,
    "min_k": 1,
    "certain_below": 0.0,
    "tail_samples": 0,
}
"""The parts of a top-k cache besides its k."""


def raw_bytes(plan: BuildPlan, config: TargetConfig) -> int:
    """Bytes of a row before compression, were it kept so."""
    return keeping(plan, config).raw_bytes_per_token


def keeping(plan: BuildPlan, config: TargetConfig) -> BuildPlan:
    """The plan of a cache of the same rows that keeps something else."""
    identity = plan.manifest.identity | {"targets": config.identity}
    return replace(plan, manifest=replace(plan.manifest, identity=identity))


def _pilot(plan: BuildPlan, rows: int) -> Pilot:
    """So many rows of the plan, or all, with the teacher's whole distribution."""
    lengths = np.concatenate([targets for _, targets in plan.text.row_lengths()])
    order = np.random.default_rng(0).permutation(len(lengths))
    enough = int(np.searchsorted(lengths[order].cumsum(), rows)) + 1
    chosen = [plan.rows[int(number)] for number in sorted(order[:enough].tolist())]
    size = plan.manifest.vocabulary_size
    teacher = loaded_teacher(keeping(plan, replace(plan.manifest.targets, **PLAIN, top_k=size)))
    try:
        *_, (_, raw) = teacher.shard(chosen, 0)
    finally:
        teacher.close()
    assert raw is not None
    assert raw.token_ids is not None
    assert raw.relative is not None
    logits = torch.from_numpy(raw.relative[:rows]).double()
    return Pilot(logits.softmax(dim=1), torch.from_numpy(raw.token_ids[:rows].astype(np.int64)))
