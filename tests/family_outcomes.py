"""What happens to one row of docs/models.md: its teacher, and a first step of its student under KL and under ULD."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from family_rows import VOCABULARY, Row
from torch import Tensor

from kd.cache_builder.store.targets import TargetConfig
from kd.cache_builder.teacher.sparsify import Sparsifier
from kd.cache_builder.teacher.teacher_pass import Teacher, collect
from kd.common.errors import KdError
from kd.data.rows.example import Example
from kd.data.tokenizing.token_rows import TokenRows
from kd.models.families.logit_transform import LogitTransform
from kd.models.heads import EncoderDecoderHead, LanguageModelHead, split_head
from kd.student_trainer.batches.collate import loss_targets
from kd.student_trainer.head import attach_loss, detach_loss
from kd.student_trainer.losses.loss_registry import Objective
from kd.student_trainer.losses.loss_settings import GroupSettings

PAIRS = [
    (np.arange(4, 13), np.arange(20, 31)),
    (np.arange(5, 9), np.arange(40, 43)),
    (np.arange(4, 20), np.arange(9, 16)),
]
"""Texts of several lengths, so that two of them are padded."""
LOSSES = {"kl": Objective("kl"), "uld": Objective("uld", "bands", settings=GroupSettings(edges=(8, 16, VOCABULARY)))}


@dataclass(frozen=True)
class Outcome:
    """Differences between our numbers and those of the model's own forward pass, or why the row is refused."""

    refusal: str = ""
    """The error's headline."""
    transform: LogitTransform | None = None
    bias: bool = False
    """Whether the model adds a `final_logits_bias`."""
    width: int = VOCABULARY
    """Columns that the model's logits have."""
    dtype: torch.dtype | None = None
    """What the hidden states were computed in: float64, or float32 where the family knows no float64."""
    teacher: float = 0.0
    """Largest difference of the top-8 log-probabilities in nats."""
    other_ids: int = 0
    """Top-8 ids that are not the model's own, where these are more than the rounding apart."""
    students: tuple[tuple[str, float, float], ...] = ()
    """(loss, relative error of the loss, largest error of a gradient as a share of the largest gradient)."""


def outcome_of(row: Row) -> Outcome:
    """Try one row. What is no refusal of ours is raised: it would reach a user as a crash."""
    try:
        head = split_head(row.model())
    except KdError as error:
        return Outcome(refusal=error.headline)
    model, dtype = _widest(row)
    head = split_head(model)
    teacher, other = _teacher(model, head)
    students = tuple((name, *_step(model, head, loss)) for name, loss in LOSSES.items())
    biased = getattr(model, "final_logits_bias", None) is not None
    return Outcome("", head.transform, biased, int(head.weight.shape[0]), dtype, teacher, other, students)


def require_right(outcome: Outcome) -> None:
    """Fail where a row is neither refused nor right."""
    if outcome.refusal:
        return
    # the output layer is float32 on our side: 2^-24 of logits of up to a hundred nats, a few times
    assert outcome.teacher < 5e-5
    assert outcome.other_ids == 0
    for loss, value, gradient in outcome.students:
        # sums and norms in float32, where a family has some; a wrong factor moves the first digit
        assert value < 1e-6, loss
        assert gradient < 1e-5, loss


def _widest(row: Row) -> tuple[Any, torch.dtype]:
    """The model in float64, or in float32 where its operators know no float64."""
    model = row.model().double()
    try:
        with torch.no_grad():
            _own_logits(model, *PAIRS[1])
    except (RuntimeError, NotImplementedError):
        return row.model(), torch.float32
    return model, torch.float64


def _own_logits(model: Any, context: np.ndarray, target: np.ndarray) -> Tensor:
    """`[n, V]` by the model's own forward pass over one text without padding."""
    if model.config.is_encoder_decoder:
        start = model.config.decoder_start_token_id
        decoder = torch.from_numpy(np.concatenate([[start], target[:-1]]))[None]
        read = torch.from_numpy(context)[None]
        decoded: Tensor = model(input_ids=read, decoder_input_ids=decoder, use_cache=False).logits
        return decoded[0]
    ids = torch.from_numpy(np.concatenate([context, target]))[None]
    logits: Tensor = model(input_ids=ids, use_cache=False).logits
    return logits[0, len(context) - 1 : -1]


def _teacher(model: Any, head: LanguageModelHead) -> tuple[float, int]:
    width = int(head.weight.shape[0])
    rows = [TokenRows(Example(str(i), "p", "t"), c, t, np.arange(len(t))) for i, (c, t) in enumerate(PAIRS)]
    *_, (_, kept) = collect(rows, Teacher(head, Sparsifier(TargetConfig(top_k=8), width)).run(rows, 0))
    assert kept is not None
    assert kept.relative is not None
    assert kept.token_ids is not None
    with torch.no_grad():
        own = torch.cat([_own_logits(model, *pair).double().log_softmax(dim=-1) for pair in PAIRS])
    expected = own.topk(8, dim=1).values
    found = torch.from_numpy(kept.relative - kept.log_z[:, :1]).double()
    at = own.gather(1, torch.from_numpy(kept.token_ids.astype(np.int64)))
    difference = float((found - expected).abs().max())
    return difference, int(((at - expected).abs() > 2 * difference).sum())


def _batch(model: Any, head: LanguageModelHead) -> dict[str, Tensor]:
    """One text with made-up targets of both kinds; LED's own gradient is NaN where it pads."""
    context, target = PAIRS[2]
    generator, count, width = torch.Generator().manual_seed(0), len(PAIRS[2][1]), int(head.weight.shape[0])
    log_p, ids = torch.randn(count, width, generator=generator).log_softmax(dim=1).sort(dim=1, descending=True)
    first = torch.arange(count)
    batch = {
        "gold_ids": torch.from_numpy(target),
        "token_ids": ids[:, :8],
        "logprobs": log_p[:, :8],
        "tail_mass": log_p[:, 8:].exp().sum(dim=1),
        "group_first": first,
        "group_stop": first + 1,
        "group_log_scale": torch.zeros(count),
        "group_chunk_logprob": -torch.ones(count),
        "group_weight": torch.full((count,), 1 / count),
        "group_logprobs": log_p[:, :8],
        "group_bands": torch.stack([log_p[:, 8:16].logsumexp(1), log_p[:, 16:].logsumexp(1)], dim=1),
    }
    if isinstance(head, EncoderDecoderHead):
        read = torch.from_numpy(context)[None]
        started = torch.from_numpy(head.decoder_inputs(target))[None]
        return batch | {
            "input_ids": read,
            "attention_mask": torch.ones_like(read),
            "decoder_input_ids": started,
            "positions": first,
        }
    read = torch.from_numpy(np.concatenate([context, target]))[None]
    return batch | {"input_ids": read, "attention_mask": torch.ones_like(read), "positions": first + len(context) - 1}


def _step(model: Any, head: LanguageModelHead, objective: Objective) -> tuple[float, float]:
    """Relative error of the loss, and largest error of a gradient as a share of the largest gradient."""
    batch = _batch(model, head)
    logits = _own_logits(model, *PAIRS[2])
    wide = torch.promote_types(logits.dtype, torch.float32)
    expected = objective(logits.to(wide), loss_targets(batch))[0].sum()
    theirs = _gradients(model, expected)
    attach_loss(model, objective, int(head.weight.shape[0]), chunk=4)
    try:
        total = model(**batch)["loss"]
        ours = _gradients(model, total)
    finally:
        detach_loss(model)
    assert ours.keys() == theirs.keys(), "the same parameters learn"
    largest = max(float(g.abs().max()) for g in theirs.values())
    worst = max(float((ours[name] - theirs[name]).abs().max()) for name in theirs)
    value = float(expected.detach())
    return abs(float(total.detach()) - value) / max(abs(value), 1e-12), worst / largest


def _gradients(model: Any, total: Tensor) -> dict[str, Tensor]:
    model.zero_grad(set_to_none=True)
    total.backward()  # type: ignore[no-untyped-call]
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None and bool(p.grad.any())}
