"""Which students belong together: arms over seeds, and the fine-tuned and distilled arms that make a pair.

An *arm* holds the students whose settings differ in the seed alone. A *pair* is a fine-tuned arm (`--loss ce`, or the
baseline of an experiment) and another arm that began with the same student and read the same cache, or one that keeps
something else of the same rows. Seed s of one is compared with seed s of the other: both began with the same weights and saw
the same examples in the same order. A baseline that is named may have read other rows, such as few labelled examples. If more
than the loss differs between them, the report names it beside the comparison. Models that were not trained here (teachers,
models of the hub) are arms of their own.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

from kd.common.errors import unknown_name
from kd.evaluation.report.comparison import Entry
from kd.evaluation.report.runs import fact

PLACE = (
    "out",
    "cache",
    "device",
    "save_every",
    "log_every",
    "report_to",
    "world_size",
    "cache_shard_rows",
    "head_chunk",
)
"""Settings that say where and how a training ran, and not what was trained."""
LOSS = (
    "loss",
    "alpha",
    "ce_weight",
    "temperature",
    "tail",
    "beta",
    "alignment",
    "align_eos",
    "ranking",
    "merge",
    "top_k",
    "objective",
)
"""Settings that may differ between a fine-tuned and a distilled student of one pair."""


@dataclass(frozen=True)
class Arm:
    """Students that were trained with the same settings but for the seed, or one model that was not trained here."""

    name: str
    models: Mapping[int | None, str]
    """Seed -> name in the report. The seed is None for a model that was not trained here."""
    parameters: int
    """Number of parameters in the weights."""
    facts: Mapping[str, Any]
    """`run.json` of one of the trainings; empty where there is none."""

    @property
    def settings(self) -> dict[str, Any]:
        """The settings of the students' training, without the seed."""
        settings = dict(fact(self.facts, "settings") or self.facts.get("identity") or {})
        return {k: v for k, v in settings.items() if k not in (*PLACE, "seed")}

    @property
    def loss(self) -> str | None:
        """The loss of their training; None for a model that was not trained here."""
        loss = fact(self.facts, "loss")
        return None if loss is None else str(loss)

    @property
    def cache(self) -> str | None:
        """Fingerprint of the cache that was read; None for a model that was not trained here."""
        fingerprint = fact(self.facts, "cache_fingerprint")
        return None if fingerprint is None else str(fingerprint)

    @property
    def cache_name(self) -> str:
        """Name of the folder of the cache that was read."""
        return PurePath(str((fact(self.facts, "settings") or {}).get("cache"))).name

    def begins_like(self, other: Arm) -> bool:
        """Whether both began with one student and tokenizer."""
        return all(self.settings.get(k) == other.settings.get(k) for k in ("student", "tokenizer", "revision"))

    def reads_like(self, other: Arm) -> bool:
        """Whether both read the same rows in the same order."""
        rows = fact(self.facts, "rows_digest")
        return self.cache == other.cache or (rows is not None and rows == fact(other.facts, "rows_digest"))


@dataclass(frozen=True)
class Pair:
    """A fine-tuned arm and a distilled one."""

    baseline: Arm
    other: Arm

    @property
    def seeds(self) -> list[int]:
        """The seeds that both arms have, ascending."""
        return sorted(s for s in self.baseline.models.keys() & self.other.models.keys() if s is not None)

    @property
    def models(self) -> list[tuple[str, str]]:
        """The names of both models in the report, for each seed."""
        return [(self.baseline.models[s], self.other.models[s]) for s in self.seeds]

    @property
    def differs(self) -> dict[str, tuple[Any, Any]]:
        """Settings other than the loss in which the arms differ. Whether the comparison is fair is for the reader to judge."""
        a, b = self.baseline.settings, self.other.settings
        other = {k: (a.get(k), b.get(k)) for k in sorted(a.keys() | b.keys()) if k not in LOSS and a.get(k) != b.get(k)}
        if self.baseline.cache == self.other.cache:
            return other
        return {"cache": (self.baseline.cache_name, self.other.cache_name)} | other


def arms_of(entries: Sequence[Entry]) -> list[Arm]:
    """The arms of evaluated models, in the order of their first one."""
    groups: dict[str, dict[int | None, Entry]] = {}
    seen: set[str] = set()
    for entry in entries:
        if entry.name in seen:  # another evaluation of the same model
            continue
        seen.add(entry.name)
        seed = _seed(entry)
        key = (
            entry.name
            if seed is None
            else json.dumps([_told(entry), fact(entry.facts, "cache_fingerprint")], sort_keys=True)
        )
        while seed in groups.get(key, {}):  # the same run twice: each for itself
            key += " "
        groups.setdefault(key, {})[seed] = entry
    arms = []
    taken: dict[str, int] = {}
    for group in groups.values():
        first = next(iter(group.values()))
        name = first.name if None in group else _common_name(group)
        taken[name] = taken.get(name, 0) + 1
        name = name if taken[name] == 1 else f"{name} ({taken[name]})"
        arms.append(Arm(name, {s: e.name for s, e in group.items()}, first.report.parameters, first.facts))
    return arms


def pairs_of(
    arms: Sequence[Arm], baseline: str | Sequence[str] | None = None, *, other_students: bool = False
) -> list[Pair]:
    """A pair for every arm that has a baseline: the arm and the baseline that fits it best.

    baseline         names of the arms to compare with, whatever rows they read; None = those trained with `ce` on the same rows
    other_students   compare arms that began with another student, too
    """
    named = [baseline] if isinstance(baseline, str) else baseline
    for name in named or ():
        if name not in {a.name for a in arms}:
            raise unknown_name("baseline", name, [a.name for a in arms])
    bases = [a for a in arms if (a.loss == "ce" if named is None else a.name in named)]
    pairs = []
    for arm in arms:
        begun_alike = [b for b in bases if b is not arm and (other_students or b.begins_like(arm))]
        alike = [b for b in begun_alike if named is not None or b.reads_like(arm)]
        candidates = [p for b in alike if (p := Pair(b, arm)).seeds]
        if candidates and arm not in bases:
            pairs.append(min(candidates, key=lambda p: len(p.differs)))
    return pairs


def _seed(entry: Entry) -> int | None:
    settings = fact(entry.facts, "settings") or entry.facts.get("identity") or {}
    seed = settings.get("seed")
    return seed if isinstance(seed, int) else None


def _told(entry: Entry) -> dict[str, Any]:
    return Arm("", {}, 0, entry.facts).settings


def _common_name(group: Mapping[int | None, Entry]) -> str:
    """`kl` for kl-seed0, kl-seed1; a single run keeps its name unless it ends so too."""
    stems = {re.sub(rf"[-_. ]?s(eed)?[-_ ]?{seed}$", "", entry.name) for seed, entry in group.items()}
    if len(stems) == 1 and (stem := stems.pop()):
        return stem
    return f"{next(iter(group.values())).name} and {len(group) - 1} more"
