"""Examples of a cache become the tensors of a batch: the student's tokens, which of them are scored, and the targets."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kd.cache_builder.store.ragged import columns_of_entries
from kd.cache_builder.store.readers.reading import CachedBatch, CachedExample
from kd.cache_builder.store.soft_targets import SoftTargets, concatenate
from kd.models.batching.packing import Size, lay_out, pack_sequences
from kd.student_trainer.batches.alignment import Alignment, first_token_pairs, single_token_pairs
from kd.student_trainer.batches.pieces import SharedPieces
from kd.student_trainer.batches.student_chat import StudentChat
from kd.student_trainer.batches.student_text import StudentExample, StudentText
from kd.student_trainer.expected.outcome_rows import Starts, joined_starts, text_rows
from kd.student_trainer.expected.piece_paths import AS_IT_IS, PiecePaths
from kd.student_trainer.losses.loss_registry import LOSSES, Objective
from kd.student_trainer.losses.loss_targets import GroupTargets, LossTargets


@dataclass(frozen=True)
class Collator:
    """Examples -> tensors: padded `input_ids [B, T]`, `attention_mask [B, T]`, `positions [N]` and the targets.

    `positions` are flat indices into `[B * T]` of the tokens that *predict* the rows: the row for token t of an
    example sits at the position before it. The tokens are the teacher's, or, with `text`, the student's own.

    For a student with an encoder, `input_ids` are what the encoder reads. Its decoder reads `decoder_input_ids [B, T]`: for
    every example `start_ids` and all target tokens but the last; `positions` count there. Where examples are packed,
    `segment_ids` and `position_ids [B, T]` replace the mask, as `kd.models.batching.packing` makes them.
    """

    objective: Objective
    """The loss, which decides what of the targets is needed."""
    text: StudentText | StudentChat | None = None
    """The text in the student's own tokens; None = the cached tokens."""
    alignment: str = "bytes"
    """How groups are found: `bytes` or `positional`, see `alignment`."""
    align_eos: bool = True
    """Whether the ends of text make a group of their own."""
    prompt_loss: bool = False
    """Whether the prompt's tokens are scored too (by the cross-entropy alone)."""
    pieces: SharedPieces | None = None
    """Pieces that both vocabularies have, for `hybrid`."""
    start_ids: tuple[int, ...] = ()
    """Ids that the student's decoder reads before the target: its start token, then what is forced; () = a causal student."""
    capacity: Size | None = None
    """Tokens of a packed sequence on each side; None = one example per sequence."""
    paths: PiecePaths | None = None
    """The student's tokens as the teacher's pieces, for `text-kl`."""

    def __call__(self, examples: Sequence[CachedExample]) -> dict[str, Tensor]:
        tokens: Sequence[CachedExample | StudentExample] = examples
        if self.text is not None:
            tokens = [self.text[e.index] for e in examples]
        batch = self._tokens(tokens)
        if self.objective.groups:
            batch |= self._groups(examples)
        elif self.paths is not None:
            batch |= self._expected(examples, batch["gold_ids"], self.paths)
        else:
            batch |= self._rows(examples)
        return {name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in batch.items()}

    def _scored(self, example: CachedExample | StudentExample) -> np.ndarray:
        """`[n]` positions of the scored tokens of an example."""
        ids = example.input_ids
        if self.prompt_loss:
            return np.arange(1, len(ids))
        rows = len(ids) - len(example.context_ids) - example.gaps.tokens
        return example.gaps.positions(len(example.context_ids), rows) + 1

    def _places(self, example: StudentExample) -> tuple[np.ndarray, int]:
        """`[n + 1]` number of each target token among the example's scored tokens, and one past the last; how many those are."""
        rows = len(example.target_ids)
        if not self.prompt_loss:
            return np.arange(rows + 1), rows
        places = example.gaps.positions(len(example.context_ids), rows)
        count = len(example.input_ids) - 1
        return np.append(places, count), count

    def _tokens(self, examples: Sequence[CachedExample | StudentExample]) -> dict[str, np.ndarray]:
        ids = [e.input_ids for e in examples]
        scored = [self._scored(e) for e in examples]
        gold = [i[places] for i, places in zip(ids, scored, strict=True)]
        sides, predicting = [ids], [places - 1 for places in scored]
        if self.start_ids:
            forced = len(self.start_ids) - 1
            shifted = [np.concatenate([self.start_ids, g])[: forced + len(g)] for g in gold]
            sides, predicting = [[e.context_ids for e in examples], shifted], [forced + np.arange(len(g)) for g in gold]
        sequences = pack_sequences([tuple(len(side[e]) for side in sides) for e in range(len(ids))], self.capacity)
        layouts = [lay_out(side, sequences) for side in sides]
        batch = {
            "input_ids": layouts[0]["input_ids"],
            "positions": np.concatenate([s + p for s, p in zip(layouts[-1]["starts"], predicting, strict=True)]),
            "gold_ids": np.concatenate(gold).astype(np.int64),
        }
        if self.start_ids:
            batch["decoder_input_ids"] = layouts[1]["input_ids"]
        if self.capacity is None:
            return batch | {"attention_mask": (layouts[0]["segment_ids"] > 0).astype(np.int64)}
        if self.start_ids:
            return batch | {"segment_ids": layouts[0]["segment_ids"], "decoder_segment_ids": layouts[1]["segment_ids"]}
        return batch | {name: layouts[0][name] for name in ("segment_ids", "position_ids")}

    def _rows(self, examples: Sequence[CachedExample]) -> dict[str, np.ndarray]:
        kind, temperature = self.objective.tail, self.objective.temperature
        batch: dict[str, np.ndarray] = {}
        # rows that were decoded together lie one after another already: not taken apart and joined again
        rows = examples.rows if isinstance(examples, CachedBatch) else concatenate([e.targets for e in examples])
        if kind in ("ghost", "renorm") or (kind == "sampled" and rows.sample_ids is None):
            assert rows.token_ids is not None
            batch["token_ids"] = rows.token_ids
            logprobs = rows.logprobs if temperature == 1.0 else rows.logprobs_at(temperature)
            assert logprobs is not None
            batch["logprobs"] = logprobs.astype(np.float32, copy=False)
            batch["tail_mass"] = rows.tail_mass_at(temperature).astype(np.float32)
            if rows.kept is not None:
                batch["kept"] = rows.kept
        if kind == "sampled" and rows.sample_ids is None:
            assert rows.tail_ids is not None
            assert rows.tail_draws is not None
            most = max(int(rows.tail_draws.max(initial=0)), 1)
            batch["tail_ids"], batch["tail_draws"] = rows.tail_ids[:, :most], rows.tail_draws
        elif kind == "sampled":
            assert rows.sample_ids is not None
            assert rows.sample_counts is not None
            batch["sample_ids"], batch["sample_counts"] = rows.sample_ids, rows.sample_counts
        return batch

    def _expected(
        self, examples: Sequence[CachedExample], gold_ids: np.ndarray, paths: PiecePaths
    ) -> dict[str, np.ndarray]:
        """What the teacher expects of the text, at every scored position; `aligned_bytes` as `_groups` counts them."""
        assert self.text is not None
        parts: list[Starts] = []
        position = row = 0
        aligned = np.zeros(2, dtype=np.int64)
        for example in examples:
            student, targets = self.text[example.index], example.targets
            places, scored = self._places(student)
            pairs = self.text.aligned(example, mode="bytes", eos=self.align_eos)
            aligned += pairs.bytes_aligned, len(example.target.encode("utf-8"))
            (first, stop), (token, last) = pairs.teacher.T, pairs.student.T
            goes_on = np.append((stop[:-1] == first[1:]) & (last[:-1] == token[1:]), False) & (last - token == 1)
            follows = np.append(False, goes_on[:-1])[: len(first)]
            reading = np.full(len(first), AS_IT_IS)
            if len(first) and first[0] == 0:
                reading[0] = paths.reading(
                    int(targets.gold_ids[0]),
                    int(targets.byte_end[0]),
                    int(student.target_ids[token[0]]),
                    int(student.side.byte_end[token[0]]),
                )
            parts.append(
                Starts(
                    places[token] + position,
                    student.target_ids[token].astype(np.int64),
                    first + row,
                    stop + row,
                    np.where(goes_on, stop + row, -1),
                    reading,
                    np.where(follows, student.target_ids[token - 1], -1),
                )
            )
            position, row = position + scored, row + len(targets)
        rows = examples.rows if isinstance(examples, CachedBatch) else concatenate([e.targets for e in examples])
        expected = text_rows(paths, rows, joined_starts(parts), gold_ids, self.objective.temperature)
        return expected | {"places": paths.position, "aligned_bytes": aligned}

    def _groups(self, examples: Sequence[CachedExample]) -> dict[str, np.ndarray]:
        """Fields of `GroupTargets`, named `group_…`, whose rows count over the whole batch; `units` examples with groups;
        `aligned_bytes [2]` bytes of targets in groups, and in all.
        """
        assert self.text is not None
        temperature, needs = self.objective.temperature, set(LOSSES[self.objective.loss].needs)
        if not self.objective.settings.edges:  # nothing lies beyond the top-k
            needs -= {"bands"}
        parts: dict[str, list[np.ndarray]] = {}
        offset, aligned = 0, np.zeros(2, dtype=np.int64)
        for example in examples:
            student, targets = self.text[example.index], example.targets
            places, scored = self._places(student)
            pairs = self.text.aligned(example, mode=self.alignment, eos=self.align_eos)
            pairs = _compared(pairs, self.objective.settings.merge, student)
            aligned += pairs.bytes_aligned, len(example.target.encode("utf-8"))
            groups = teacher_groups(targets, pairs.teacher, temperature, needs, merge=self.objective.settings.merge)
            if self.pieces is not None and targets.token_ids is not None:
                groups["student_ids"] = _matched(self.pieces, targets, student, pairs.teacher[:, 0])
            values = groups | {
                "first": places[pairs.student[:, 0]] + offset,
                "stop": places[pairs.student[:, 1] - 1] + 1 + offset,
                "weight": np.full(len(pairs), 1.0 / max(len(pairs), 1), dtype=np.float32),
            }
            for name, value in values.items():
                parts.setdefault(name, []).append(value)
            offset += scored
        units = sum(len(w) > 0 for w in parts["weight"])
        counts = {"units": np.array(units), "aligned_bytes": aligned}
        return {f"group_{n}": np.concatenate(v) for n, v in parts.items()} | counts


def _compared(pairs: Alignment, merge: str, student: StudentExample) -> Alignment:
    """The part of the groups that a way of merging compares."""
    if merge == "first":
        return first_token_pairs(pairs)
    return single_token_pairs(pairs, student.side) if merge == "single" else pairs


def _matched(pieces: SharedPieces, targets: SoftTargets, student: StudentExample, rows: np.ndarray) -> np.ndarray:
    """`[G, K]` the student's ids of the teacher's kept pieces at `rows [G]`; `[E]` where rows differ in length."""
    assert targets.token_ids is not None
    kept = _of_rows(targets, targets.token_ids, rows)
    ids: np.ndarray = pieces.ids[kept]
    if len(rows) and rows[0] == 0 and student.side.start == 0 and len(student.side.byte_end):
        first = pieces.at_start(
            int(targets.gold_ids[0]),
            int(targets.byte_end[0]),
            int(student.target_ids[0]),
            int(student.side.byte_end[0]),
        )
        its_entries = 0 if targets.kept is None else slice(0, targets.kept[0])
        ids[its_entries] = first[kept[its_entries]]
    return ids


def teacher_groups(
    targets: SoftTargets, ranges: np.ndarray, temperature: float, needs: Collection[str], *, merge: str = "observed"
) -> dict[str, np.ndarray]:
    """Arrays `[G, …]` for groups of rows `ranges [G, 2]`: chain-rule log-probabilities, and those of the compared row: the first,
    or the last where groups are merged exactly."""
    gold = targets.gold_logprob.astype(np.float64)
    at_one, at_t = (targets.log_z[:, targets.grid_index(t)].astype(np.float64) for t in (1.0, temperature))
    tempered = (gold + at_one) / temperature - at_t if temperature != 1.0 else gold
    first, stop = ranges[:, 0], ranges[:, 1]
    totals = [np.concatenate([[0.0], np.cumsum(v)]) for v in (tempered, gold)]
    exact = merge == "exact"
    compared, (begin, end) = (stop - 1, (first, stop - 1)) if exact else (first, (first + 1, stop))
    arrays = {
        "log_scale": np.where(stop - first > 1, totals[0][end] - totals[0][begin], 0.0).astype(np.float32),
        "chunk_logprob": (totals[1][stop] - totals[1][first]).astype(np.float32),
    }
    if "logprobs" in needs:
        arrays["logprobs"] = _of_rows(targets, targets.logprobs_at(temperature), compared).astype(np.float32)
        if targets.kept is not None:
            arrays["kept"] = targets.kept[compared]
    if "bands" in needs:
        arrays["bands"] = _bands(targets, temperature)[compared]
    return arrays


def _of_rows(targets: SoftTargets, values: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """One value for each kept token of some rows: `[G, K]`, or `[E]` where rows differ in length."""
    if targets.kept is None:
        return np.asarray(values[rows])
    kept = targets.kept[rows]
    return np.asarray(values[np.repeat(targets.offsets[rows], kept) + columns_of_entries(kept)])


def _bands(targets: SoftTargets, temperature: float) -> np.ndarray:
    """`[N, B]` log-mass of the rank bands; where none are stored, the tail is one band (`prepare.rank_edges`)."""
    if targets.tail_bands is not None:
        return np.asarray(targets.tail_bands[:, targets.band_index(temperature)])
    mass = np.maximum(targets.tail_mass_at(temperature), EMPTY_BAND)
    return np.asarray(np.log(mass).astype(np.float32)[:, None])


EMPTY_BAND = 1e-26
"""Mass of a band that has none: e^-60, as it is in stored bands."""
ROW_FIELDS = (
    "gold_ids",
    "token_ids",
    "logprobs",
    "kept",
    "tail_mass",
    "sample_ids",
    "sample_counts",
    "tail_ids",
    "tail_draws",
    "range_starts",
    "range_stops",
    "places",
)
GROUP_FIELDS = ("first", "stop", "log_scale", "chunk_logprob", "weight", "logprobs", "bands", "student_ids", "kept")


def loss_targets(batch: dict[str, Tensor]) -> LossTargets:
    """The target tensors of a collated batch."""
    rows: dict[str, Any] = {name: batch[name] for name in ROW_FIELDS if name in batch}
    if "group_first" in batch:
        groups = {name: batch[f"group_{name}"] for name in GROUP_FIELDS if f"group_{name}" in batch}
        rows["groups"] = GroupTargets(gold_ids=batch["gold_ids"], **groups)
    if "token_ids" in rows:
        rows["token_ids"] = rows["token_ids"].long()  # widened on the model's device: half the bytes to copy
    if "tail_ids" in rows:
        rows["tail_ids"] = rows["tail_ids"].long()
    return LossTargets(kd_scale=batch.get("kd_scale"), **rows)
