"""Rows of one or two texts as token ids, and batches of them.

A pair is what the tokenizer makes of `tokenizer(first, second)`: for GPT-2 the two lists of ids one after the other, no
separator and no space between. Padding is on the right and as short as the batch allows: causal attention never looks
right, and the head reads the last token that is not padding, so the logits are those of padding to 512
(`tests/student_trainer/classify/test_classifiers.py` holds one against the other), and rows of GLUE are far shorter.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kd.data.tasks.glue import LabelledRow
from kd.models.padded_batches import batches_by_length
from kd.models.tokenizer import Tokenizer, encode_texts, pad_token_id

Batch = dict[str, Tensor]
"""`input_ids` and `attention_mask` `[B, T]`; `labels` `[B]` and a teacher's log-probabilities `[B, C]` where they are known."""


@dataclass(frozen=True)
class EncodedRows:
    """Token ids and labels, in the rows' order."""

    ids: tuple[tuple[int, ...], ...]
    """Each at least one token: an empty text is one padding token."""
    labels: np.ndarray
    """[n] int64"""
    pad_id: int
    teacher: np.ndarray | None = None
    """[n, C] float32 log-probabilities of a teacher, nats, where there is one"""

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, number: int) -> dict[str, object]:
        row = {"ids": self.ids[number], "label": int(self.labels[number])}
        return row if self.teacher is None else row | {"teacher": self.teacher[number]}

    def take(self, numbers: Sequence[int] | np.ndarray) -> EncodedRows:
        """The rows of these numbers, in this order."""
        places = np.asarray(numbers, dtype=np.int64)
        teacher = None if self.teacher is None else self.teacher[places]
        return EncodedRows(tuple(self.ids[i] for i in numbers), self.labels[places], self.pad_id, teacher)


def encode_rows(tokenizer: Tokenizer, rows: Sequence[LabelledRow], *, max_length: int = 512) -> EncodedRows:
    """Tokenise, see `encode_texts`."""
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
    """Rows of `EncodedRows` to a batch with labels: the Trainer's collator."""

    pad_id: int
    length: int | None = None
    """Pad to this many tokens; None = to the longest of the batch."""

    def __call__(self, rows: Sequence[dict[str, object]]) -> Batch:
        batch = pad_rows([row["ids"] for row in rows], self.pad_id, length=self.length)  # type: ignore[misc]
        batch["labels"] = torch.tensor([row["label"] for row in rows], dtype=torch.int64)
        if "teacher" in rows[0]:
            batch["teacher"] = torch.from_numpy(np.stack([row["teacher"] for row in rows]))  # type: ignore[misc]
        return batch


def length_batches(rows: EncodedRows, tokens_per_batch: int) -> Iterator[tuple[list[int], Batch]]:
    """(row numbers, batch) by length, the longest first: at most `tokens_per_batch` with padding, at least one row."""
    for numbers in batches_by_length([len(row) for row in rows.ids], tokens_per_batch):
        yield numbers, pad_rows([rows.ids[i] for i in numbers], rows.pad_id)
