"""Rows of one or two texts as token ids, and batches of them.

A pair is encoded as `tokenizer(first, second)`. For GPT-2 that is one list of ids after the other, without a separator or a space.
Padding is on the right and as short as the batch allows. Causal attention never looks to the right and the head reads the last
token that is not padding, so the logits equal those of padding to 512 (`tests/student_trainer/classify/test_classifiers.py`
compares them). Rows of GLUE are far shorter than 512 tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kd.data.instruction_tasks.glue import LabelledRow
from kd.models.batching.padded_batches import batches_by_length
from kd.models.tokenizer import Tokenizer, encode_texts, pad_token_id
from kd.student_trainer.classify.classify_settings import MAX_LENGTH

Batch = dict[str, Tensor]
"""`input_ids` and `attention_mask` `[B, T]`; for training also `labels` `[B]`, and `teacher` `[B, C]` log-probabilities."""


@dataclass(frozen=True)
class EncodedRows:
    """Token ids and labels, in the rows' order."""

    ids: tuple[tuple[int, ...], ...]
    """Token ids of each row, at least one: an empty text is one padding token."""
    labels: np.ndarray
    """[n] int64"""
    pad_id: int
    teacher: np.ndarray | None = None
    """[n, C] float32 log-probabilities of a teacher, nats; None without a teacher"""

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, number: int) -> dict[str, object]:
        row = {"ids": self.ids[number], "label": int(self.labels[number])}
        return row if self.teacher is None else row | {"teacher": self.teacher[number]}

    def take(self, numbers: Sequence[int] | np.ndarray) -> EncodedRows:
        """The rows of these numbers, in this order."""
        chosen = np.asarray(numbers, dtype=np.int64)
        teacher = None if self.teacher is None else self.teacher[chosen]
        return EncodedRows(tuple(self.ids[i] for i in numbers), self.labels[chosen], self.pad_id, teacher)


def encode_rows(tokenizer: Tokenizer, rows: Sequence[LabelledRow], *, max_length: int = MAX_LENGTH) -> EncodedRows:
    """Tokenise rows; each is cut to `max_length` tokens (see `encode_texts`)."""
    ids = encode_texts(tokenizer, [row.texts for row in rows], max_length)
    labels = np.array([row.label for row in rows], dtype=np.int64)
    return EncodedRows(tuple(map(tuple, ids)), labels, pad_token_id(tokenizer))


def pad_rows(ids: Sequence[Sequence[int]], pad_id: int, *, length: int | None = None) -> Batch:
    """`input_ids`, `attention_mask` `[B, T]`; T is the longest row, or `length`."""
    width = length or max(map(len, ids))
    padded = torch.full((len(ids), width), pad_id, dtype=torch.int64)
    mask = torch.zeros((len(ids), width), dtype=torch.int64)
    for number, row in enumerate(ids):
        padded[number, : len(row)] = torch.tensor(row, dtype=torch.int64)
        mask[number, : len(row)] = 1
    return {"input_ids": padded, "attention_mask": mask}


@dataclass(frozen=True)
class PadBatch:
    """Makes a batch with labels of rows of `EncodedRows`: the collator of the Trainer."""

    pad_id: int
    length: int | None = None
    """Tokens that every row is padded to; None = the longest row of the batch."""

    def __call__(self, rows: Sequence[dict[str, object]]) -> Batch:
        batch = pad_rows([row["ids"] for row in rows], self.pad_id, length=self.length)  # type: ignore[misc]
        batch["labels"] = torch.tensor([row["label"] for row in rows], dtype=torch.int64)
        if "teacher" in rows[0]:
            batch["teacher"] = torch.from_numpy(np.stack([row["teacher"] for row in rows]))  # type: ignore[misc]
        return batch


def length_batches(rows: EncodedRows, tokens_per_batch: int) -> Iterator[tuple[list[int], Batch]]:
    """(row numbers, batch), the longest rows first: at most `tokens_per_batch` tokens with padding, at least one row."""
    for numbers in batches_by_length([len(row) for row in rows.ids], tokens_per_batch):
        yield numbers, pad_rows([rows.ids[i] for i in numbers], rows.pad_id)
