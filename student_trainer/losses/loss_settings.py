"""Plain values that a loss and its kernel take besides logits and targets."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class GroupSettings:
    """Settings of the losses over groups; `beta` is also that of `jsd`."""

    temperature: float = 1.0
    """Temperature of both softmaxes."""
    edges: tuple[int, ...] = ()
    """Ranks between the teacher's bands; the last is V_t. See `kd.cache_builder.store.targets.band_edges`."""
    ranking: str = "exact"
    """How the student's probabilities are sorted: `exact` or `fast`."""
    beta: float = 0.5
    """Weight of KL(teacher || mixture) in the generalised JSD."""
    merge: str = "observed"
    """What stands for a group of several tokens: `observed`, `exact`, `first` or `single`, see
    `kd.student_trainer.losses.by_group`."""
    overlap: float = 1.0
    """Share of the teacher's vocabulary that the student has too: the weight of the matched part in `hybrid`."""


@dataclass(frozen=True)
class LossWeights:
    """What a kernel needs to know of an objective: total = kd * distillation loss + ce * cross-entropy."""

    kd: float = 1.0
    """Weight of the distillation loss, T² included where the loss is multiplied by it."""
    ce: float = 0.0
    """Weight of the cross-entropy."""
    temperature: float = 1.0
    """Temperature of the distillation loss; the cross-entropy is always taken at 1."""
    settings: GroupSettings = field(default_factory=GroupSettings)
    """Settings of group losses, at the same temperature."""
