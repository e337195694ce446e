"""The teacher pass: token rows in, kept targets out, one shard at a time.

Hidden states are computed for whole batches, the output layer only for the scored rows, `head_chunk` rows at a
time (see `kd.models.heads`). Batches are made inside a shard by length and token budget, so that a resumed build
makes the same batches; results go back to the original order. Out of memory ends the lanes, halves the batch, then the
chunk, and carries on; nothing of it is remembered for the next shard, or a resumed build would make other batches.

On a CPU several batches are scored at once, see `lanes`. On a GPU nothing waits: a batch is launched before the one
before it is read (see `host_copies`), so that there are the chunks of two batches at most. What needs a wait to be right,
many equal logits at the k-th place, is noticed when a batch is read; it is scored again with that wait.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, fields
from functools import partial

import numpy as np
import torch

from kd.cache_builder.store.targets import RawTargets
from kd.cache_builder.teacher.host_copies import Arrival, HostCopies, Laps
from kd.cache_builder.teacher.lanes import Lanes, lane_count, leaves_no_trace
from kd.cache_builder.teacher.sparsify import NOT_FINITE, Chunk, NonFiniteRow, Sparsifier, uniforms_for
from kd.common.errors import TeacherError
from kd.data.blocks import TokenRows
from kd.models.heads import LanguageModelHead
from kd.models.padded_batches import batches_by_length, even_rows, head_rows, on_device, padded_tokens


@dataclass
class PassTimes:
    """Seconds spent in the parts of the teacher pass, by the clock or of the GPU; with several lanes, the mean of them."""

    forward: float = 0.0
    head: float = 0.0
    select: float = 0.0


@dataclass(frozen=True)
class Scored:
    """A batch whose chunks are on their way to the host."""

    chunks: list[Arrival]
    laps: Laps


class Teacher:
    """A loaded model, its output layer apart, and what to keep of its predictions."""

    def __init__(
        self,
        head: LanguageModelHead,
        sparsifier: Sparsifier,
        *,
        tokens_per_batch: int | None = None,
        head_chunk: int | None = None,
    ) -> None:
        """`tokens_per_batch`, `head_chunk`: tokens of a forward pass, rows of the output layer; None: what suits the device."""
        self.head = head
        self.sparsifier = sparsifier
        self.device = head.weight.device
        self._budget = tokens_per_batch or head.forward_tokens(threads=1)  # whatever the threads: batches decide bits
        self.head_chunk = head_chunk or head_rows(sparsifier.vocabulary_size, self.device.type)
        self.copies = HostCopies(self.device)
        self.times = PassTimes()
        self.tokens = self.padded = 0
        """Tokens the model has read, without and with padding."""
        self._tried = [0, 0, 0]
        """Longest context, target and both together that the model was tried with, see `prepare`."""
        self._alone = self.device.type != "cpu"
        self._sparsifiers = [sparsifier]

    def run(
        self, rows: Sequence[TokenRows], first_example: int
    ) -> Generator[tuple[list[int], list[Chunk]], None, None]:
        """Score `rows`, which are examples `first_example`, …: yields `(numbers into rows, chunks)` per batch.

        The chunks hold the batch's rows one example after another. Raises TeacherError naming the example
        when logits are not finite. On a CPU torch has fewer threads of its own until this is at its end.
        """
        with self._lanes(rows) as lanes:
            yield from self._run(rows, first_example, lanes)

    def prepare(self, rows: Sequence[TokenRows]) -> None:
        """Find out with the longest of `rows` whether several threads may run the model; where there is but one, nothing.

        Of all rows that will ever be given to `run`: what is found here decides how sums are rounded, and a resumed build
        must not know less than one that was never stopped.
        """
        if self._alone or torch.get_num_threads() == 1:
            return
        sizes = np.array([(len(r.context_ids), len(r.target_ids)) for r in rows])
        sizes = np.column_stack([sizes, sizes.sum(axis=1)])
        widest, lengths = [rows[i] for i in sizes.argmax(axis=0)], sizes.max(axis=0).tolist()
        if any(n > tried for n, tried in zip(lengths, self._tried, strict=True)):
            self._tried = [max(pair) for pair in zip(lengths, self._tried, strict=True)]
            shortest = rows[int(sizes[:, 2].argmin())]
            self._alone = not self._stands_several([shortest, *sorted(widest, key=lambda r: len(r.input_ids))])

    def _lanes(self, rows: Sequence[TokenRows]) -> Lanes[Sparsifier]:
        """As many as threads and memory allow, and one for a model that could not stand several."""
        self.prepare(rows)
        count = 1
        if not self._alone:
            longest = max(len(r.context_ids) + len(r.target_ids) for r in rows)
            count = lane_count(torch.get_num_threads(), max(self._budget, longest))
        while len(self._sparsifiers) < count:
            self._sparsifiers.append(self.sparsifier.twin())
        return Lanes(self._sparsifiers[:count])

    def _stands_several(self, rows: Sequence[TokenRows]) -> bool:
        """Whether the model may be run by several threads: tried with a short row first, which resets what has grown,
        and with the longest last, so that what grows stays so."""

        @torch.inference_mode()
        def run() -> None:
            for row in rows:
                hidden = self.head.scored_hidden([row.context_ids], [row.target_ids])
            self.head.logits(hidden[:1])  # which may make another copy of its weight, once

        try:
            return leaves_no_trace(self.head.bodies, run)
        except RuntimeError as error:
            if not _out_of_memory(error):
                raise
            return False

    def _run(
        self, rows: Sequence[TokenRows], first_example: int, lanes: Lanes[Sparsifier]
    ) -> Iterator[tuple[list[int], list[Chunk]]]:
        lengths = [self.head.size(len(r.context_ids), len(r.target_ids)) for r in rows]
        budget, head_chunk = self._budget, self.head_chunk
        ahead = self.copies.ahead if lanes.count == 1 else lanes.count
        pending = batches_by_length(lengths, budget)
        # batch, may others be under way beside it, its result
        launched: deque[tuple[list[int], bool, Callable[[], Scored]]] = deque()
        doubtful: list[int] | None = None  # a batch that is to be scored again
        while pending or launched:
            full, chunks, crowded = None, None, False
            launching = bool(pending) and len(launched) <= ahead
            try:
                if launching:
                    batch = pending.pop(0)
                    waits = self.copies.ahead == 0 or batch is doubtful
                    work = partial(
                        self._score,
                        batch=batch,
                        rows=rows,
                        first_example=first_example,
                        head_chunk=head_chunk,
                        waits=waits,
                    )
                    launched.append((batch, lanes.count > 1 and ahead > 0, lanes.start(work)))
                else:
                    batch, crowded, scored = launched.popleft()
                    chunks = self._arrived(scored(), batch, rows, lanes.count)
                    del scored  # or its chunks would still be there while the next batch is scored
            except (torch.OutOfMemoryError, RuntimeError) as error:
                if not _out_of_memory(error):
                    raise
                full = str(error).splitlines()[0]
            if full is not None:
                if self.device.type == "cuda":  # here, where no traceback holds the tensors any more
                    torch.cuda.empty_cache()
                if crowded:
                    ahead = 0  # from here on one batch at a time
                    pending.insert(0, batch)
                elif len(batch) > 1:
                    budget = padded_tokens([lengths[i] for i in batch]) // 2
                    left = sorted(i for waiting in [batch, *pending] for i in waiting)
                    pending = [[left[i] for i in b] for b in batches_by_length([lengths[i] for i in left], budget)]
                elif head_chunk > 16:
                    head_chunk //= 2
                    pending.insert(0, batch)
                else:
                    raise TeacherError(
                        "not enough memory for a single example",
                        where=rows[batch[0]].example.id,
                        found=full,
                        try_="a smaller --seq-len",
                    )
            elif chunks is not None:
                sizes = [lengths[i] for i in batch]
                self.tokens += sum(sum(size) if isinstance(size, tuple) else size for size in sizes)
                self.padded += padded_tokens(sizes)
                yield batch, chunks
            elif not launching:
                doubtful = batch
                pending.insert(0, doubtful)

    @property
    def padding_share(self) -> float:
        """Of the positions the model has computed, the share that was padding."""
        return 1 - self.tokens / self.padded if self.padded else 0.0

    @torch.inference_mode()
    def _score(
        self,
        sparsifier: Sparsifier,
        *,
        batch: list[int],
        rows: Sequence[TokenRows],
        first_example: int,
        head_chunk: int,
        waits: bool,
    ) -> Scored:
        """Launch one batch. `waits`: equal logits and rows that are not finite are seen to here."""
        laps = Laps(self.device)
        own = [rows[i] for i in batch]
        hidden = self.head.scored_hidden([r.context_ids for r in own], [r.target_ids for r in own])
        gold = on_device(torch.from_numpy(np.concatenate([r.target_ids for r in own]).astype(np.int64)), self.device)
        config = sparsifier.config
        uniforms = None
        if config.samples:
            draws = [
                uniforms_for(config.seed, first_example + i, len(rows[i].target_ids), config.samples) for i in batch
            ]
            uniforms = on_device(torch.from_numpy(np.concatenate(draws)), self.device)
        laps.mark("forward")
        chunks, step = [], even_rows(len(hidden), head_chunk)
        for start in range(0, len(hidden), step):
            part = slice(start, start + step)
            logits = self.head.logits(hidden[part])
            laps.mark("head")
            select = sparsifier if waits else sparsifier.marked
            try:
                chunk = select(logits, gold[part], None if uniforms is None else uniforms[part])
            except NonFiniteRow as error:
                raise self._not_finite(own, start + error.row) from None
            del logits  # or it would still be there while the next chunk's are made
            laps.mark("select")
            chunks.append(self.copies.start({f.name: getattr(chunk, f.name) for f in fields(Chunk)}))
        return Scored(chunks, laps)

    def _arrived(self, scored: Scored, batch: list[int], rows: Sequence[TokenRows], lanes: int) -> list[Chunk] | None:
        """A launched batch on the host; None where it has to be scored again, with waits."""
        found = [arrival.wait() for arrival in scored.chunks]
        for part, seconds in scored.laps.seconds():
            setattr(self.times, part, getattr(self.times, part) + seconds / lanes)
        doubts = [chunk.pop("doubt") for chunk in found if "doubt" in chunk]
        if doubts:
            doubt = torch.cat(doubts)
            if bool((doubt == NOT_FINITE).any()):
                raise self._not_finite([rows[i] for i in batch], int((doubt == NOT_FINITE).nonzero()[0]))
            if bool(doubt.any()):
                return None
        return [Chunk(**chunk) for chunk in found]

    def _not_finite(self, rows: list[TokenRows], position: int) -> TeacherError:
        for row in rows:
            if position < len(row.target_ids):
                return TeacherError(
                    "the teacher's logits are not finite",
                    where=f"example {row.example.id}",
                    found=f"NaN or infinity at target token {position}",
                    try_="--dtype float32 or bfloat16, and check the weights",
                )
            position -= len(row.target_ids)
        raise AssertionError("position beyond the batch")


def collect(
    rows: Sequence[TokenRows], results: Iterator[tuple[list[int], list[Chunk]]]
) -> Iterator[tuple[int, RawTargets | None]]:
    """Put batches back into the order of `rows`: yields `(rows done so far, None)`, at last `(all, RawTargets)`."""
    lengths = [len(r.target_ids) for r in rows]
    starts = np.cumsum([0, *lengths])
    total = int(starts[-1])
    arrays: dict[str, np.ndarray] = {}
    done = 0
    for batch, chunks in results:
        places = np.concatenate([np.arange(starts[i], starts[i + 1]) for i in batch])
        offset = 0
        for chunk in chunks:
            n = len(chunk.gold_rank)
            for f in fields(Chunk):
                value = getattr(chunk, f.name)
                if value is not None:
                    if f.name not in arrays:
                        dtype = (
                            np.int32 if f.name == "token_ids" else value.numpy().dtype
                        )  # of a shard they are the most
                        arrays[f.name] = np.empty((total, *value.shape[1:]), dtype=dtype)
                    arrays[f.name][places[offset : offset + n]] = value.numpy()
            offset += n
        done += offset
        yield done, None
    arrays["gold_ids"] = np.concatenate([r.target_ids for r in rows]).astype(np.int64)
    arrays["byte_end"] = np.concatenate([r.byte_end for r in rows])
    yield done, RawTargets(**arrays)


def _out_of_memory(error: BaseException) -> bool:
    text = str(error).lower()
    return isinstance(error, torch.OutOfMemoryError) or "out of memory" in text or "can't allocate memory" in text
