"""What a loss compares the student with: the teacher's side, by row or over groups of tokens.

Shapes: N positions, K kept tokens (E in all, where rows differ in length), R draws; n student positions (rows of logits), G
groups, B rank bands.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

Field = TypeVar("Field")

ENTRIES = ("token_ids", "logprobs", "student_ids", "range_starts", "range_stops")
"""Fields of `LossTargets` and `GroupTargets` that hold entries of one row after another, where rows differ in length."""
SHARED = ("groups", "kd_scale", "places")
"""Fields of `LossTargets` that are not cut by rows."""

TAIL_FLOOR = 1e-7
"""Probability given to a teacher's tail that rounding left with none (float32 sums to 1 no better than this)."""


def need(field: Field | None) -> Field:
    """`field`, unless it is None. Raises ValueError where the cache's profile left out what a loss compares."""
    if field is None:
        raise ValueError("the targets hold no such field for this loss")
    return field


def drawn_tail(targets: LossTargets) -> tuple[Tensor, Tensor, Tensor]:
    """Draws from the tails of N rows: their ids `[N, D]`, the probability that each stands for (0 in unused slots), and how often
    each id was drawn in its row."""
    ids, draws, mass = need(targets.tail_ids), need(targets.tail_draws), need(targets.tail_mass)
    used = torch.arange(ids.shape[1], device=ids.device) < draws.unsqueeze(1)
    ordered = torch.where(used, ids, -1).sort(dim=1).values
    times = torch.searchsorted(ordered, ids, right=True) - torch.searchsorted(ordered, ids)
    return ids, used * (mass / draws.clamp(min=1)).unsqueeze(1), times


@dataclass(frozen=True)
class GroupTargets:
    """The teacher's side of G groups, and which rows of logits are the student's side."""

    first: Tensor
    """[G] int64: row of logits at the group's first student token"""
    stop: Tensor
    """[G] int64: one past the row of its last student token"""
    gold_ids: Tensor
    """[n] int64: the student's own tokens, per row of logits"""
    log_scale: Tensor
    """[G] nats: teacher log-probability of the tokens but the compared one, at the loss's temperature. Compared is the first
    token of a group, or the last where groups are merged exactly"""
    chunk_logprob: Tensor
    """[G] nats: teacher log-probability of all of the group's text, at temperature 1"""
    weight: Tensor
    """[G]: 1 / groups of the example"""
    logprobs: Tensor | None = None
    """[G, K] teacher log-probabilities at the compared token, descending, at the loss's temperature; or [E], one group's after
    another's"""
    bands: Tensor | None = None
    """[G, B] log-mass of the rank bands beyond the kept tokens, at the loss's temperature"""
    student_ids: Tensor | None = None
    """[G, K] or [E] int64: the student's id of each kept piece, -1 where it has none"""
    kept: Tensor | None = None
    """[G] int64: tokens that the compared row of each group keeps; None where all keep K"""

    def __len__(self) -> int:
        return len(self.first)

    @cached_property
    def on_host(self) -> np.ndarray:
        """`[2, G]` first and stop on the host, or `[3, G]` with `kept`: one wait for a GPU, then none for all ranges of rows."""
        columns = [self.first, self.stop] if self.kept is None else [self.first, self.stop, self.kept]
        return torch.stack(columns).cpu().numpy()

    @property
    def bounds(self) -> np.ndarray:
        """`[2, G]` first and stop on the host."""
        return self.on_host[:2]

    @cached_property
    def offsets(self) -> np.ndarray:
        """`[G + 1]` where the entries of each group begin, on the host, where rows differ in length."""
        return np.pad(self.on_host[2].cumsum(), (1, 0))

    def __getitem__(self, groups: slice) -> GroupTargets:
        """A range of groups; rows stay as they are."""
        part = replace(self, **self._cut(groups))
        vars(part)["on_host"] = self.on_host[:, groups]
        return part

    def within(self, rows: slice, groups: slice) -> GroupTargets:
        """A range of groups, whose rows are all in `rows`."""
        cut = self._cut(groups)
        cut["first"], cut["stop"] = cut["first"] - rows.start, cut["stop"] - rows.start
        part = replace(self, gold_ids=self.gold_ids[rows], **cut)
        host = self.on_host[:, groups].copy()
        host[:2] -= rows.start
        vars(part)["on_host"] = host
        return part

    def _cut(self, groups: slice) -> dict[str, Tensor]:
        """A range of groups of every field but `gold_ids`."""
        groups = slice(*groups.indices(len(self))[:2])
        entries = groups if self.kept is None else slice(self.offsets[groups.start], self.offsets[groups.stop])
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "gold_ids"}
        return {name: v[entries if name in ENTRIES else groups] for name, v in values.items() if v is not None}

    def wide(self) -> GroupTargets:
        """The same with `[G, K]` entries, as many as the longest row has: for the few groups whose logits are at hand.

        Unused places hold a log-probability of minus infinity, and no student's id.
        """
        if self.kept is None:
            return self
        count, longest = int(self.offsets[-1]), int(self.on_host[2].max(initial=1))
        group = torch.arange(len(self), device=self.kept.device).repeat_interleave(self.kept, output_size=count)
        column = torch.arange(count, device=group.device) - (self.kept.cumsum(0) - self.kept)[group]
        wide = {}
        for name, filling in (("logprobs", -torch.inf), ("student_ids", -1)):
            values = getattr(self, name)
            if values is not None:
                wide[name] = values.new_full((len(self), longest), filling)
                wide[name][group, column] = values
        part = replace(self, **wide)
        vars(part)["on_host"] = self.on_host
        return part


@dataclass(frozen=True)
class LossTargets:
    """What a loss compares the student with; fields that a loss does not need are None."""

    gold_ids: Tensor
    """[N] int64"""
    token_ids: Tensor | None = None
    """[N, K] int64, unique within a row; or [E], one row after another"""
    logprobs: Tensor | None = None
    """[N, K] or [E] teacher log-probabilities at the loss's temperature, nats"""
    tail_mass: Tensor | None = None
    """[N] teacher probability outside the kept ids, at the loss's temperature"""
    sample_ids: Tensor | None = None
    """[N, R] int64"""
    sample_counts: Tensor | None = None
    """[N, R] draws of each id, 0 in unused slots"""
    groups: GroupTargets | None = None
    """Groups of aligned text, for losses over text; their rows count from 0 here"""
    kd_scale: Tensor | None = None
    """[] rows of the step / examples of the step: group losses are means over examples, and the sum is divided by rows"""
    kept: Tensor | None = None
    """[N] int64: tokens, or outcomes, that each row keeps; None where all rows keep K"""
    range_starts: Tensor | None = None
    """[E] where each outcome's student tokens begin in `places`; see `kd.student_trainer.expected.outcome_rows`"""
    range_stops: Tensor | None = None
    """[E] one past where they end"""
    places: Tensor | None = None
    """[V] where each of the student's ids is, in the order in which ranges count"""
    tail_ids: Tensor | None = None
    """[N, D] ids drawn from outside the kept ids, each as often as it was drawn"""
    tail_draws: Tensor | None = None
    """[N] slots of `tail_ids` that are used"""

    def __getitem__(self, rows: slice) -> LossTargets:
        """A range of rows of every field; only groups that lie in it as a whole stay (see `pieces`)."""
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in SHARED}
        rows = slice(*rows.indices(len(self.gold_ids))[:2])
        entries = rows if self.kept is None else slice(self.offsets[rows.start], self.offsets[rows.stop])
        cut = {name: v[entries if name in ENTRIES else rows] for name, v in values.items() if v is not None}
        if self.groups is not None:
            first, stop = self.groups.bounds
            chosen, last = int(first.searchsorted(rows.start)), int(stop.searchsorted(rows.stop, side="right"))
            cut["groups"] = self.groups.within(rows, slice(chosen, max(last, chosen)))
        part = replace(self, **cut)
        if self.kept is not None:
            vars(part)["offsets"] = self.offsets[rows.start : rows.stop + 1] - self.offsets[rows.start]
        return part

    @cached_property
    def offsets(self) -> np.ndarray:
        """`[N + 1]` where each row's entries begin, on the host: one wait for a GPU, then none for all ranges of rows."""
        return np.pad(need(self.kept).cpu().numpy().cumsum(), (1, 0))

    @property
    def lengths(self) -> np.ndarray:
        """`[N]` number of each row's entries, on the host."""
        return np.diff(self.offsets)

    def by_length(self) -> Iterator[tuple[Tensor, LossTargets]]:
        """Rows of one length after another, where they differ: their numbers `[n]`, and their targets `[n, K]`."""
        kept, starts = need(self.kept), torch.from_numpy(self.offsets[:-1]).to(self.gold_ids.device)
        for length in np.unique(np.diff(self.offsets)).tolist():
            rows = (kept == length).nonzero().squeeze(1)
            places = starts[rows].unsqueeze(1) + torch.arange(length, device=rows.device)
            values = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in (*SHARED, "kept")}
            taken = {name: v[places if name in ENTRIES else rows] for name, v in values.items() if v is not None}
            yield rows, replace(self, kept=None, **taken)

    def pieces(self, size: int) -> list[slice]:
        """Row ranges of about `size` rows that cut no group in two; a longer group stays whole."""
        total = len(self.gold_ids)
        if self.groups is None:
            return [slice(start, min(start + size, total)) for start in range(0, total, size)]
        inside = np.zeros(total + 1, dtype=np.int64)  # +1 where a group's second row begins, -1 where it stops
        first, stop = self.groups.bounds
        np.add.at(inside, first + 1, 1)
        np.add.at(inside, stop, -1)
        allowed = np.flatnonzero(inside.cumsum() == 0)  # borders that no group crosses
        ranges, start = [], 0
        while start < total:
            fitting = allowed[(allowed > start) & (allowed <= start + size)]
            end = int(fitting[-1]) if len(fitting) else int(allowed[allowed > start][0])
            ranges.append(slice(start, end))
            start = end
        return ranges
