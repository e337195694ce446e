"""Ways to train a student on one batch, for `gpu.py`: ours, plain fine-tuning, and others'.

    plain                      transformers' own cross-entropy
    ce, kl, kl_ragged          ours, as `kd train` runs them: by the fused Triton kernel (k=64; rows of 1 to 64 ids)
    ce_torch, kl_torch, kl_ragged_torch   the same with `--kernels torch`
    uld, uld_exact             ours, as `kd train` runs them (k=16 and 16 bands, ranks by bins or by sorting)
    kl_compiled, uld_compiled  the same with the loss's kernel through torch.compile
    sparse_kl                  KL over the kept ids by autograd on materialised logits, as DistillKit's
    liger_ce, liger_jsd        Liger-Kernel's fused output layer with cross-entropy; with forward KL, teacher in memory
    dense_kl, dense_uld        teacher in memory: KL of all logits; both rows sorted, their distance
    trl_gkd, trl_gold          teacher in memory: TRL's own functions for the loss of GKD (beta=0) and of GOLD (ULD, everything
                               else as it comes), without its trainer

A method is a function of a `Case` that returns a step: a collated batch -> the mean loss per position, with gradients.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from heads import Compiled
from torch import Tensor

from kd.student_trainer.faster.fused_loss import with_kernels
from kd.student_trainer.head import attach_loss
from kd.student_trainer.losses.loss_registry import Objective
from kd.student_trainer.losses.loss_settings import GroupSettings

Step = Callable[[dict[str, Tensor]], Tensor]


@dataclass
class Case:
    """A student, and what it learns from."""

    model: Any
    vocabulary: int
    edges: tuple[int, ...]
    """Of the rank bands"""
    teacher: Any = None
    """A model with the student's vocabulary, for methods that keep one in memory"""


@dataclass(frozen=True)
class Method:
    make: Callable[[Case], Step]
    targets: str = "kl"
    """What the batch holds: `kl`, `kl_ragged` or `uld`"""
    teacher: bool = False
    """Is a teacher in memory?"""


def ours(loss: str, *, compiled: bool = False, kernels: str = "auto", **settings: Any) -> Callable[[Case], Step]:
    def make(case: Case) -> Step:
        objective = {
            "ce": Objective("ce", "none", 0.0),
            "kl": Objective(),
            "uld": Objective("uld", "bands", 0.5, settings=GroupSettings(edges=case.edges, ranking="fast")),
        }[loss]
        objective = replace(objective, settings=replace(objective.settings, **settings))
        device = next(case.model.parameters()).device.type
        chosen = Compiled(objective) if compiled else with_kernels(objective, kernels, device, refuse)
        attach_loss(case.model, chosen, case.vocabulary)
        return lambda batch: case.model(**batch)["loss"] / len(batch["gold_ids"])

    return make


def refuse(sentence: str) -> None:
    """Figures of torch's kernels must not go by the name of Triton's."""
    raise RuntimeError(sentence)


def plain(case: Case) -> Step:
    return lambda batch: (
        case.model(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            labels=batch["input_ids"],
            use_cache=False,
        ).loss
    )


def logits_of(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """`[B, T, V]` as the model gives them."""
    return model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits  # type: ignore[no-any-return]


def states_of(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """`[N, d]` hidden states that predict the tokens of the batch."""
    output = model.base_model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)
    return output.last_hidden_state[:, :-1].flatten(0, 1)  # type: ignore[no-any-return]


def sparse_kl(case: Case) -> Step:
    def step(batch: dict[str, Tensor]) -> Tensor:
        log_q = logits_of(case.model, batch)[:, :-1].flatten(0, 1).float().log_softmax(dim=1)
        log_p = batch["logprobs"]
        return (log_p.exp() * (log_p - log_q.gather(1, batch["token_ids"]))).sum(dim=1).mean()

    return step


def taught(loss: Callable[[Tensor, Tensor, dict[str, Tensor]], Tensor]) -> Callable[[Case], Step]:
    """A step on all logits of both models, `[B, T, V]`."""

    def make(case: Case) -> Step:
        def step(batch: dict[str, Tensor]) -> Tensor:
            with torch.no_grad():
                teacher = logits_of(case.teacher, batch)
            return loss(logits_of(case.model, batch), teacher, batch)

        return step

    return make


def dense_kl(student: Tensor, teacher: Tensor, batch: dict[str, Tensor]) -> Tensor:
    log_p, log_q = (x[:, :-1].flatten(0, 1).float().log_softmax(dim=1) for x in (teacher, student))
    return F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)


def dense_uld(student: Tensor, teacher: Tensor, batch: dict[str, Tensor]) -> Tensor:
    p, q = (x[:, :-1].flatten(0, 1).float().softmax(dim=1).sort(dim=1).values for x in (teacher, student))
    return (p - q).abs().sum(dim=1).mean()


def labels_of(batch: dict[str, Tensor]) -> Tensor:
    """All tokens but the first, in TRL's spelling."""
    labels = batch["input_ids"].clone()
    labels[:, 0] = -100
    return labels


def trl_gkd(student: Tensor, teacher: Tensor, batch: dict[str, Tensor]) -> Tensor:
    from trl.experimental.gkd import GKDTrainer

    return GKDTrainer.generalized_jsd_loss(  # type: ignore[no-any-return]
        student[:, :-1], teacher[:, :-1], labels=labels_of(batch)[:, 1:], beta=0.0
    )


def trl_gold(student: Tensor, teacher: Tensor, batch: dict[str, Tensor]) -> Tensor:
    from trl.experimental.gold import GOLDConfig
    from trl.experimental.gold.gold_trainer import ULDLoss

    settings = SimpleNamespace(**{name: f.default for name, f in GOLDConfig.__dataclass_fields__.items()})
    ids, labels = batch["input_ids"], labels_of(batch)
    ends = torch.arange(ids.shape[1]).expand(len(ids), -1)
    offsets = torch.stack([ends, ends + 1], dim=2)  # every token one byte, on either side
    return ULDLoss(settings, device=ids.device)(student, teacher, labels, labels, ids, ids, offsets, offsets)  # type: ignore[no-any-return]


def liger_ce(case: Case) -> Step:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    loss, head = LigerFusedLinearCrossEntropyLoss(), case.model.get_output_embeddings()
    return lambda batch: loss(head.weight, states_of(case.model, batch), batch["gold_ids"], head.bias)


def liger_jsd(case: Case) -> Step:
    from liger_kernel.transformers import LigerFusedLinearJSD

    loss, head, above = (
        LigerFusedLinearJSD(jsd_beta=0.0),
        *(m.get_output_embeddings() for m in (case.model, case.teacher)),
    )

    def step(batch: dict[str, Tensor]) -> Tensor:
        with torch.no_grad():
            teacher = states_of(case.teacher, batch)
        return loss(states_of(case.model, batch), head.weight, teacher, above.weight, batch["gold_ids"])  # type: ignore[no-any-return]

    return step


METHODS: dict[str, Method] = {
    "plain": Method(plain),
    "ce": Method(ours("ce")),
    "kl": Method(ours("kl")),
    "kl_compiled": Method(ours("kl", compiled=True)),
    "kl_ragged": Method(ours("kl"), "kl_ragged"),
    "ce_torch": Method(ours("ce", kernels="torch")),
    "kl_torch": Method(ours("kl", kernels="torch")),
    "kl_ragged_torch": Method(ours("kl", kernels="torch"), "kl_ragged"),
    "uld": Method(ours("uld"), "uld"),
    "uld_compiled": Method(ours("uld", compiled=True), "uld"),
    "uld_exact": Method(ours("uld", ranking="exact"), "uld"),
    "sparse_kl": Method(sparse_kl),
    "liger_ce": Method(liger_ce),
    "dense_kl": Method(taught(dense_kl), teacher=True),
    "trl_gkd": Method(taught(trl_gkd), teacher=True),
    "liger_jsd": Method(liger_jsd, teacher=True),
    "dense_uld": Method(taught(dense_uld), "uld", teacher=True),
    "trl_gold": Method(taught(trl_gold), "uld", teacher=True),
}
"""The first is what the others are compared with; those with a teacher come last, when it is loaded."""
