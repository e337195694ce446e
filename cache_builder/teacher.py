"""The teacher pass: token rows in, kept targets out, one shard at a time.

Hidden states are computed for whole batches, the output layer only for the scored rows, `head_chunk` rows at a
time (see `kd.data.forward`). Batches are made inside a shard by length and token budget, so that a resumed build
makes the same batches; results go back to the original order. Out of memory halves the batch, then the chunk, and
carries on; nothing of it is remembered for the next shard, or a resumed build would make other batches.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch

from kd.cache_builder.sparsify import Chunk, NonFiniteRow, Sparsifier, uniforms_for
from kd.cache_builder.targets import RawTargets
from kd.data.blocks import TokenRows
from kd.data.errors import TeacherError
from kd.data.forward import LanguageModelHead, batches_by_length, head_rows, padded_tokens


@dataclass
class PassTimes:
    """Seconds spent in the parts of the teacher pass (wall clock of the thread that drives the model)."""

    forward: float = 0.0
    head: float = 0.0
    select: float = 0.0


class Teacher:
    """A loaded model, its output layer apart, and what to keep of its predictions."""

    def __init__(self, head: LanguageModelHead, sparsifier: Sparsifier, *, tokens_per_batch: int = 4096,
                 head_chunk: int | None = None) -> None:  # fmt: skip
        self.head = head
        self.sparsifier = sparsifier
        self.tokens_per_batch = tokens_per_batch
        self.device = head.weight.device
        self.head_chunk = head_chunk or head_rows(sparsifier.vocabulary_size, self.device.type)
        self.times = PassTimes()
        self.tokens = self.padded = 0
        """Tokens the model has read, without and with padding."""

    def run(self, rows: Sequence[TokenRows], first_example: int) -> Iterator[tuple[list[int], list[Chunk]]]:
        """Score `rows`, which are examples `first_example`, …: yields `(numbers into rows, chunks)` per batch.

        The chunks hold the batch's rows one example after another. Raises TeacherError naming the example
        when logits are not finite.
        """
        lengths = [self.head.size(len(r.context_ids), len(r.target_ids)) for r in rows]
        budget, head_chunk = self.tokens_per_batch, self.head_chunk
        pending = batches_by_length(lengths, budget)
        while pending:
            batch = pending.pop(0)
            chunks, full = None, ""
            try:
                chunks = self._score([rows[i] for i in batch], [first_example + i for i in batch], head_chunk)
            except (torch.OutOfMemoryError, RuntimeError) as error:
                if not _out_of_memory(error):
                    raise
                full = str(error).splitlines()[0]
            if chunks is not None:
                sizes = [lengths[i] for i in batch]
                self.tokens += sum(sum(size) if isinstance(size, tuple) else size for size in sizes)
                self.padded += padded_tokens(sizes)
                yield batch, chunks
                continue
            if self.device.type == "cuda":  # here, where no traceback holds the tensors any more
                torch.cuda.empty_cache()
            if len(batch) > 1:
                budget = padded_tokens([lengths[i] for i in batch]) // 2
                left = sorted(i for waiting in [batch, *pending] for i in waiting)
                pending = [[left[i] for i in b] for b in batches_by_length([lengths[i] for i in left], budget)]
            elif head_chunk > 16:
                head_chunk //= 2
                pending.insert(0, batch)
            else:
                raise TeacherError("not enough memory for a single example", where=rows[batch[0]].example.id,
                                   found=full, try_="a smaller --seq-len")  # fmt: skip

    @property
    def padding_share(self) -> float:
        """Of the positions the model has computed, the share that was padding."""
        return 1 - self.tokens / self.padded if self.padded else 0.0

    @torch.inference_mode()
    def _score(self, rows: list[TokenRows], examples: list[int], head_chunk: int) -> list[Chunk]:
        started = time.perf_counter()
        scored = self.head.scored_hidden([r.context_ids for r in rows], [r.target_ids for r in rows])
        gold = torch.from_numpy(np.concatenate([r.target_ids for r in rows]).astype(np.int64)).to(self.device)
        config = self.sparsifier.config
        uniforms = None
        if config.samples:
            draws = [uniforms_for(config.seed, e, len(r.target_ids), config.samples)
                     for e, r in zip(examples, rows, strict=True)]  # fmt: skip
            uniforms = np.concatenate(draws)
        self._lap("forward", started)
        chunks = []
        for start in range(0, len(scored), head_chunk):
            part = slice(start, start + head_chunk)
            started = time.perf_counter()
            logits = self.head.logits(scored[part])
            started = self._lap("head", started)
            try:
                chunk = self.sparsifier(logits, gold[part], None if uniforms is None else uniforms[part])
            except NonFiniteRow as error:
                raise self._not_finite(rows, start + error.row) from None
            del logits  # before the next are made: one chunk of them at a time
            on_host: dict[str, Any] = {f.name: _to_host(getattr(chunk, f.name)) for f in fields(Chunk)}
            chunks.append(Chunk(**on_host))
            self._lap("select", started)
        return chunks

    def _lap(self, name: str, started: float) -> float:
        now = time.perf_counter()
        setattr(self.times, name, getattr(self.times, name) + now - started)
        return now

    def _not_finite(self, rows: list[TokenRows], position: int) -> TeacherError:
        for row in rows:
            if position < len(row.target_ids):
                return TeacherError("the teacher's logits are not finite", where=f"example {row.example.id}",
                                    found=f"NaN or infinity at target token {position}",
                                    try_="--dtype float32 or bfloat16, and check the weights")  # fmt: skip
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
                        arrays[f.name] = np.empty((total, *value.shape[1:]), dtype=value.numpy().dtype)
                    arrays[f.name][places[offset : offset + n]] = value.numpy()
            offset += n
        done += offset
        yield done, None
    arrays["gold_ids"] = np.concatenate([r.target_ids for r in rows]).astype(np.int64)
    arrays["byte_end"] = np.concatenate([r.byte_end for r in rows])
    yield done, RawTargets(**arrays)


def _to_host(tensor: torch.Tensor | None) -> torch.Tensor | None:
    return None if tensor is None else tensor.cpu()


def _out_of_memory(error: BaseException) -> bool:
    text = str(error).lower()
    return isinstance(error, torch.OutOfMemoryError) or "out of memory" in text or "can't allocate memory" in text
