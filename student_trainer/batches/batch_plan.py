"""Which examples make which batch, in which order.

A plan is a function: any micro-batch of a run is worked out from (seed, epoch) and its number, epoch after epoch in the reader's
order, cut by token budget or by count (`epoch_cut`). So the number of steps is known before the first one, a resumed run begins
where it stopped, and the order does not depend on batch size or packing. Which micro-batches make a step depends on their number
per step alone, whether processes or accumulation make it.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from copy import copy
from functools import lru_cache
from itertools import islice
from math import ceil, gcd
from typing import Any, NamedTuple, Protocol, overload

import numpy as np

from kd.cache_builder.store.readers.epoch_order import EpochOrder, ListedOrder
from kd.common.errors import CacheMismatchError
from kd.models.batching.packing import Size
from kd.student_trainer.batches.epoch_cut import CutRule, EpochCut, Lengths, Mark, MicroBatch

CUTS_HELD = 4
"""Epochs whose order is held at once."""
FORWARD = 64
"""Micro-batches that are passed over, rather than begun anew, on the way from one that was asked for to the next."""
NOWHERE: tuple[int, Iterator[MicroBatch]] = -FORWARD, iter(())


class Ordered(Protocol):
    """As much of a reader as a plan needs."""

    def epoch_order(self, seed: int, epoch: int) -> EpochOrder | np.ndarray:
        """Every example once, in the order of this epoch."""


class _Seen(NamedTuple):
    """Sums over the micro-batches from the first one on."""

    batches: int = 0
    tokens: int = 0
    padded: int = 0


class BatchPlan(Sequence[MicroBatch]):
    """Every micro-batch of a run, in order; `plan_batches` makes one."""

    def __init__(
        self,
        reader: Ordered,
        lengths: Lengths,
        rule: CutRule,
        *,
        seed: int,
        first_epoch: int,
        epochs: float,
        count: int | None,
        multiple_of: int,
    ) -> None:
        self.rule, self.seed, self.first_epoch, self.epochs = rule, seed, first_epoch, epochs
        self.exactly, self.multiple_of = count, multiple_of
        self._reader: Ordered = reader
        self._lengths = lengths
        self._cut = lru_cache(CUTS_HELD)(self._make_cut)
        self._counts: dict[int, int] = {}
        """Micro-batches of epochs, where they are known."""
        self._whole: tuple[int, int] | None = None
        self._cursor: tuple[int, Iterator[MicroBatch]] = NOWHERE
        self._cursor_lock = threading.Lock()
        self._seen = _Seen()

    def __len__(self) -> int:
        return self._sizes[1]

    @property
    def layout(self) -> str:
        """`EpochOrder.layout` of the reader's order."""
        return self._cut(0).order.layout

    @property
    def settings(self) -> tuple[Any, ...]:
        """What decides the micro-batches, besides the cache and the lengths."""
        return (
            self.rule,
            self.seed,
            self.first_epoch,
            self.epochs,
            self.exactly,
            self.multiple_of,
            self._cut(0).order.lanes,
        )

    @property
    def _sizes(self) -> tuple[int, int]:
        """Micro-batches that are laid out, and those of the run: a multiple of a step's."""
        if self._whole is None:
            laid_out = self.exactly
            if laid_out is None:
                laid_out = sum(self._count_of(epoch) for epoch in range(ceil(self.epochs)))
            self._whole = laid_out, max(laid_out // self.multiple_of, 1) * self.multiple_of
        return self._whole

    @overload
    def __getitem__(self, number: int) -> MicroBatch: ...
    @overload
    def __getitem__(self, number: slice) -> list[MicroBatch]: ...
    def __getitem__(self, number: int | slice) -> MicroBatch | list[MicroBatch]:
        """One micro-batch, or several."""
        places = range(len(self))[number]
        if isinstance(places, range):
            between = list(islice(self.walk(min(places, default=0)), len(places) and max(places) - min(places) + 1))
            return between[:: places.step]
        with self._cursor_lock:  # two threads that go on with one walk would each miss what the other took
            at, batches = self._cursor
            if not at <= places < at + FORWARD:
                at, batches = places, self.walk(places)
            batch = next(islice(batches, places - at, None))
            self._cursor = places + 1, batches
        return batch

    def __iter__(self) -> Iterator[MicroBatch]:
        return self.walk(0)

    def walk(self, start: int) -> Iterator[MicroBatch]:
        """The micro-batches from number `start` on."""
        laid_out, whole = self._sizes
        for number, batch in enumerate(islice(self._repeated(start, laid_out), whole - start), start):
            seen = self._seen
            if number == seen.batches:
                self._seen = _Seen(number + 1, seen.tokens + batch.tokens, seen.padded + batch.padded)
            yield batch

    def _repeated(self, start: int, laid_out: int) -> Iterator[MicroBatch]:
        """From number `start` on, and again from the first, for runs with fewer micro-batches than one step needs."""
        while True:
            base, epoch = self._epoch_of(start % laid_out)
            left, first = laid_out - start % laid_out, start % laid_out - base
            while left:
                for batch in islice(self._cut(epoch).batches(first), left):
                    left -= 1
                    yield batch
                first, epoch = 0, epoch + 1
                assert not left or self.exactly is not None or epoch < self.epochs  # as many as were counted
            start = 0

    def _epoch_of(self, number: int) -> tuple[int, int]:
        """Number of the first micro-batch of the epoch that this one is in, and which epoch of the run that is."""
        base = epoch = 0
        while not (number - base < self._counts.get(epoch, 0) or self._cut(epoch).holds(number - base)):
            base, epoch = base + self._count_of(epoch), epoch + 1
        return base, epoch

    def _count_of(self, epoch: int) -> int:
        if epoch not in self._counts:
            self._counts[epoch] = len(self._cut(epoch))
        return self._counts[epoch]

    def _make_cut(self, epoch: int) -> EpochCut:
        order = self._reader.epoch_order(self.seed, self.first_epoch + epoch)
        if not isinstance(order, EpochOrder):
            order = ListedOrder(np.asarray(order))
        size = self._examples_of(epoch, len(order))
        shares = gcd(order.lanes, self.multiple_of)
        return EpochCut(
            order,
            self._lengths,
            self.rule,
            epoch=self.first_epoch + epoch,
            shares=shares,
            size=size,
            count=self._counts.get(epoch),
        )

    def _examples_of(self, epoch: int, examples: int) -> int:
        """How many of a cache's examples this epoch of the run has."""
        if self.exactly is not None:
            return examples
        part = max(0.0, min(1.0, self.epochs - epoch))
        return max(round(examples * part), 0 if epoch else 1)

    def epoch_ends(self) -> Iterator[int]:
        """Number of micro-batches after which each epoch ends, but the last."""
        base = epoch = 0
        limit = min(self._sizes)
        while not self._cut(epoch).holds(limit - base):
            base, epoch = base + self._count_of(epoch), epoch + 1
            if base == limit:
                return
            yield base

    def examples_before(self, number: int) -> int:
        """Number of examples in the first `number` micro-batches."""
        laid_out, _ = self._sizes
        if number > laid_out:
            return self.examples_before(laid_out) * (number // laid_out) + self.examples_before(number % laid_out)
        base, epoch = self._epoch_of(max(number - 1, 0))
        return sum(self._cut(e).size for e in range(epoch)) + self._cut(epoch).examples_before(number - base)

    @property
    def padding_share(self) -> float:
        """Share of the tokens a model reads that are padding. What was walked along already is not walked along again."""
        for _ in self.walk(self._seen.batches):
            pass
        return 1 - self._seen.tokens / self._seen.padded

    @property
    def to_count(self) -> int:
        """Number of examples that are looked at before the number of micro-batches is known; 0 where it is, or is given."""
        if self.rule.counted or self.exactly is not None or self._whole is not None:
            return 0
        examples = len(self._cut(0).order)
        epochs = range(ceil(self.epochs))
        return sum(self._examples_of(epoch, examples) for epoch in epochs if epoch not in self._counts)

    def count_batches(self) -> dict[int, int]:
        """The number of micro-batches of each epoch that had to be counted."""
        _ = self._sizes
        return dict(self._counts)

    def know_counts(self, counts: Mapping[int, int]) -> None:
        """Take over what `count_batches` of the same plan gave."""
        self._counts |= counts
        self._cut.cache_clear()

    def known(self, done: int) -> dict[str, Any] | None:
        """What a run that goes on after `done` micro-batches need not walk along again, as JSON takes it.

        None where a place in the epoch is found by arithmetic.
        """
        laid_out, _ = self._sizes
        if self.rule.counted or done >= laid_out:
            return None
        base, epoch = self._epoch_of(done)
        return {
            "settings": repr(self.settings),
            "counts": list(self._counts.items()),
            "seen": list(self._seen),
            "epoch": epoch,
            "mark": list(self._cut(epoch).mark_before(done - base)),
        }

    def know(self, known: Mapping[str, Any]) -> None:
        """Take over what `known` of the same plan gave. Raises CacheMismatchError for that of another plan."""
        if known.get("settings") != repr(self.settings):
            raise CacheMismatchError(
                "the checkpoint lies in other batches",
                found=known.get("settings"),
                expected=repr(self.settings),
                try_="the options that the run was begun with, or another --out",
            )
        self.know_counts({int(epoch): int(count) for epoch, count in known["counts"]})
        self._seen = _Seen(*known["seen"])
        batch, taken = known["mark"]
        self._cut(int(known["epoch"])).add_mark(Mark(int(batch), tuple(map(int, taken))))

    def __getstate__(self) -> dict[str, Any]:
        """What another process needs, which gives it a reader with `of`: the counts, so that they need not be made again."""
        dropped: dict[str, Any] = {"_reader": None, "_lengths": None, "_cut": None, "_cursor": NOWHERE}
        return vars(self) | dropped | {"_cursor_lock": None}

    def of(self, reader: Ordered, lengths: Lengths) -> BatchPlan:
        """The same plan over another reader of the same cache."""
        plan = copy(self)
        plan._lengths, plan._cursor_lock = lengths, threading.Lock()
        plan._reader, plan._cut = reader, lru_cache(CUTS_HELD)(plan._make_cut)
        return plan


def plan_batches(
    reader: Ordered,
    lengths: Lengths,
    *,
    seed: int,
    first_epoch: int = 0,
    epochs: float = 1.0,
    count: int | None = None,
    tokens_per_batch: int | None = None,
    batch_size: int | None = None,
    capacity: Size | None = None,
    multiple_of: int = 1,
) -> BatchPlan:
    """`epochs` epochs from `first_epoch` on (at least one example), or exactly `count` micro-batches.

    `lengths [E, sides]` tokens per example, `[E]` where there is one side. A batch holds `batch_size` sequences, or as
    many as fit `tokens_per_batch` with their padding; a sequence is one example, or, with a `capacity`, what
    `kd.models.batching.packing` puts into so many tokens. The number of batches is rounded down to a multiple of `multiple_of`
    (accumulation steps times world size), so that every step is whole. A run with fewer batches than one step needs repeats them.
    """
    return BatchPlan(
        reader,
        lengths,
        CutRule(tokens=tokens_per_batch, sequences=batch_size, capacity=capacity),
        seed=seed,
        first_epoch=first_epoch,
        epochs=epochs,
        count=count,
        multiple_of=multiple_of,
    )


class PlannedBatches:
    """A batch sampler for `torch.utils.data.DataLoader`: the plan, as it stands.

    The first `done` micro-batches come as empty ones: a loader that skips those that were trained on need not work them out.
    """

    batch_size = None
    drop_last = False

    def __init__(self, plan: BatchPlan, done: int = 0) -> None:
        self.plan, self.done = plan, done

    def __len__(self) -> int:
        return len(self.plan)

    def __iter__(self) -> Iterator[list[int]]:
        for _ in range(min(self.done, len(self.plan))):
            yield []
        for batch in self.plan.walk(self.done):
            yield list(batch.examples)
