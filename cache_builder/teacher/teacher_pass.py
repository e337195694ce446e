"""The teacher pass: token rows in, kept targets out, one shard at a time.

Hidden states are computed for whole batches, the output layer only for the scored rows, `head_chunk` rows at a time (see
`kd.models.heads`). Results are put back into the original order by `collect`. When memory runs out, batches are scored one at
a time, then in halves, then with smaller chunks (`batch_queue`). How a CPU and a GPU run batches: `execution`.

On a GPU the pass never waits for the device. Ties at rank k need a device sync to resolve; they are detected when the batch
is read, and that batch is scored again with the sync.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from kd.cache_builder.store.targets import RawTargets, TargetConfig
from kd.cache_builder.teacher.batch_queue import Batch, BatchQueue
from kd.cache_builder.teacher.execution import Execution, Flight, OutOfMemory
from kd.cache_builder.teacher.host_copies import Arrival, Laps
from kd.cache_builder.teacher.sparsify import NOT_FINITE, Chunk, NonFiniteRow, Sparsifier, uniforms_for
from kd.common.errors import TeacherError
from kd.data.tokenizing.token_rows import TokenRows
from kd.models.batching.padded_batches import Size, even_rows, head_rows, on_device, padded_tokens
from kd.models.heads import LanguageModelHead


@dataclass
class PassTimes:
    """Seconds spent in the parts of the teacher pass, on the clock or on the GPU; with several lanes, their mean."""

    forward: float = 0.0
    head: float = 0.0
    select: float = 0.0


@dataclass(frozen=True)
class Scored:
    """A batch whose chunks are being copied to the host."""

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
        """`tokens_per_batch`: tokens of a forward pass; `head_chunk`: rows of the output layer; None = what suits the device."""
        self.head = head
        self.device = head.weight.device
        # whatever the number of threads, because batches decide how sums are rounded
        self._token_budget = tokens_per_batch or head.forward_tokens(threads=1)
        self.head_chunk = head_chunk or head_rows(sparsifier.vocabulary_size, self.device.type)
        self.execution = Execution(head, sparsifier, self._token_budget)
        self.times = PassTimes()
        self.tokens = 0
        """Tokens that the model has read."""
        self.padded = 0
        """Positions that the model has computed, padding included."""
        self.placed: dict[str, int] = {}
        """Device -> bytes of weights there, of a model that lies on several."""

    def prepare(self, rows: Sequence[TokenRows]) -> None:
        """Try the model with the longest of all rows of a build, see `Execution.prepare`."""
        self.execution.prepare(rows)

    def run(
        self, rows: Sequence[TokenRows], first_example: int
    ) -> Generator[tuple[list[int], list[Chunk]], None, None]:
        """Score `rows`, which are examples `first_example`, …: yields `(numbers into rows, chunks)` per batch.

        The chunks hold the batch's rows one example after another. Raises TeacherError naming the example when logits are
        not finite, or when a single example does not fit into memory.
        """
        sizes = [self.head.size(r.read_only, len(r.target_ids)) for r in rows]
        queue = BatchQueue(sizes, self._token_budget, self.head_chunk)
        flight: Flight[Scored]
        with self.execution.over(rows) as flight:
            while queue or flight:
                outcome: list[Chunk] | OutOfMemory | None
                if queue and flight.has_room:
                    batch = queue.take()
                    outcome = flight.start(batch, self._work(batch, rows, first_example, queue.head_chunk))
                    if outcome is None:
                        continue
                else:
                    batch, outcome = flight.finish(partial(self._read, rows=rows, lanes=flight.lanes.count))
                if isinstance(outcome, OutOfMemory):
                    self._make_room(outcome, batch, queue, flight, rows)
                elif outcome is None:
                    queue.put_back(replace(batch, ties_need_a_sync=True))
                else:
                    self._count([sizes[i] for i in batch.numbers])
                    yield batch.numbers, outcome

    def shard(self, rows: Sequence[TokenRows], first_example: int) -> Iterator[tuple[int, RawTargets | None]]:
        """Score `rows` as `run` does: yields `(rows done so far, None)`, at last `(all, RawTargets)`."""
        return collect(rows, self.run(rows, first_example))

    def close(self) -> None:
        """Nothing: the threads of a shard end with it."""

    @property
    def seconds(self) -> dict[str, float]:
        """`times` by name."""
        return asdict(self.times)

    @property
    def padding_share(self) -> float:
        """Share of the positions the model has computed that was padding."""
        return 1 - self.tokens / self.padded if self.padded else 0.0

    def _count(self, sizes: Sequence[Size]) -> None:
        self.tokens += sum(sum(size) if isinstance(size, tuple) else size for size in sizes)
        self.padded += padded_tokens(sizes)

    def _make_room(
        self, full: OutOfMemory, batch: Batch, queue: BatchQueue, flight: Flight[Scored], rows: Sequence[TokenRows]
    ) -> None:
        """Go on after a lack of memory: first without other batches beside it, then with smaller batches, then chunks."""
        self.execution.release()
        if full.beside_others:
            flight.one_at_a_time()
            queue.put_back(batch)
        elif not queue.cut(batch):
            raise TeacherError(
                "not enough memory for a single example",
                where=rows[batch.numbers[0]].example.id,
                found=full.message,
                try_="a smaller --seq-len",
            )

    def _work(
        self, batch: Batch, rows: Sequence[TokenRows], first_example: int, head_chunk: int
    ) -> Callable[[Sparsifier], Scored]:
        return partial(
            self._score,
            batch=batch.numbers,
            rows=rows,
            first_example=first_example,
            head_chunk=head_chunk,
            waits=self.execution.syncs or batch.ties_need_a_sync,
        )

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
        """Score one batch: hidden states of all rows, then logits and what is kept of them, `head_chunk` rows at a time.

        waits  whether ties at rank k, and rows that are not finite, are seen to here; that takes a device sync
        """
        laps = Laps(self.device)
        scored = [rows[i] for i in batch]
        gaps = [r.gaps for r in scored] if any(len(r.gaps) for r in scored) else None
        hidden = self.head.scored_hidden([r.context_ids for r in scored], [r.target_ids for r in scored], gaps)
        gold = on_device(torch.from_numpy(np.concatenate([r.target_ids for r in scored]).astype(np.int64)), self.device)
        uniforms = self._uniforms(sparsifier.config, scored, [first_example + i for i in batch])
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
                raise _not_finite(scored, start + error.row) from None
            del logits  # otherwise they would be held while the next chunk's are computed
            laps.mark("select")
            chunks.append(self.execution.copies.start({f.name: getattr(chunk, f.name) for f in fields(Chunk)}))
        return Scored(chunks, laps)

    def _uniforms(self, config: TargetConfig, rows: Sequence[TokenRows], examples: Sequence[int]) -> Tensor | None:
        """`[rows of the batch, uniforms]` numbers to draw with; None where nothing is drawn."""
        if not config.uniforms:
            return None
        draws = [
            uniforms_for(config.seed, example, len(row.target_ids), config.uniforms)
            for row, example in zip(rows, examples, strict=True)
        ]
        return on_device(torch.from_numpy(np.concatenate(draws)), self.device)

    def _read(self, batch: Batch, scored: Scored, *, rows: Sequence[TokenRows], lanes: int) -> list[Chunk] | None:
        """A started batch on the host; None where ties at rank k have to be resolved with a device sync."""
        columns = [arrival.wait() for arrival in scored.chunks]
        for part, seconds in scored.laps.seconds():
            setattr(self.times, part, getattr(self.times, part) + seconds / lanes)
        doubts = [chunk.pop("doubt") for chunk in columns if "doubt" in chunk]
        if doubts:
            doubt = torch.cat(doubts)
            if bool((doubt == NOT_FINITE).any()):
                raise _not_finite([rows[i] for i in batch.numbers], int((doubt == NOT_FINITE).nonzero()[0]))
            if bool(doubt.any()):
                return None
        return [Chunk(**chunk) for chunk in columns]


def _not_finite(rows: Sequence[TokenRows], position: int) -> TeacherError:
    """The error for row `position` of a batch of `rows`."""
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
