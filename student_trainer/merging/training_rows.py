"""The rows that fisher and regmean read: a classifier's own GLUE task, or the text that a pool names for a language model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from kd.common.errors import DataError
from kd.data.instruction_tasks.glue import load_glue
from kd.data.sources import load_corpus
from kd.models.classifiers import load_classifier, refuse_other_classes
from kd.models.families.positions import max_positions
from kd.models.loading import load_model
from kd.models.model_config import load_config, load_request_tokenizer
from kd.models.model_request import ModelRequest
from kd.models.tokenizer import Tokenizer, pad_token_id
from kd.student_trainer.classify.encoding import encode_rows, pad_rows
from kd.student_trainer.merging.merge_statistics import RowModel
from kd.student_trainer.merging.pool import ModelPool, PoolModel

TokenRows = Sequence[Sequence[int]]
"""Token ids of each row."""


def is_classifier_pool(pool: ModelPool) -> bool:
    """Whether the models are sequence classifiers (else they are language models). Raises DataError for a mixture."""
    kinds = {}
    for model in pool.models:
        config = load_config(ModelRequest(model.path, revision=model.revision))
        kinds[model.name] = any(n.endswith("ForSequenceClassification") for n in config.architectures or ())
    if len(set(kinds.values())) > 1:
        raise DataError(
            "the pool mixes classifiers and language models",
            where=pool.file,
            found=f"classifiers: {', '.join(name for name, is_classifier in kinds.items() if is_classifier)}",
        )
    return next(iter(kinds.values()))


@dataclass(frozen=True)
class RowSampler:
    """Loads a model of the pool with batches of its own training rows (`merge_statistics.LoadRows`)."""

    classifiers: bool
    """The models are classifiers: their rows are those of their GLUE tasks."""
    examples: int
    """Rows drawn from the training split, without replacement."""
    batch_size: int
    """Rows per batch."""
    pad_to: int | None
    """Tokens that every row is padded to, as in the reference; None = the longest row of the batch."""
    max_length: int
    """Tokens of a row; longer rows are cut."""
    task_root: Path | None
    """Folder of local GLUE rows; None = the hub."""
    device: str
    seed: int
    """Seed of the draw."""

    def __call__(self, model: PoolModel) -> RowModel:
        """Raises DataError where the rows are missing or do not belong to the model."""
        request = ModelRequest(model.path, revision=model.revision, device=self.device, dtype="float32")
        limit = min(self.max_length, max_positions(load_config(request)) or self.max_length)
        tokenizer = load_request_tokenizer(request)
        load = self._classifier if self.classifiers else self._language_model
        return load(model, request, tokenizer, limit)

    def _classifier(self, model: PoolModel, request: ModelRequest, tokenizer: Tokenizer, limit: int) -> RowModel:
        labelled = load_glue(model.data, task=model.name, split="train", task_root=self.task_root)
        sample = [labelled.rows[i] for i in self._draw(len(labelled.rows))]
        ids = encode_rows(tokenizer, sample, max_length=limit).ids
        pad_id = pad_token_id(tokenizer)
        classifier = load_classifier(request, pad_id=pad_id)
        refuse_other_classes(request, classifier.config, labelled.task.labels)
        backbone = classifier.base_model
        classifier.requires_grad_(False)
        backbone.requires_grad_(True)
        batches = self._batches(ids, pad_id, limit, classifier.device)
        return RowModel(backbone, lambda batch: classifier(**batch).logits, batches)

    def _language_model(self, model: PoolModel, request: ModelRequest, tokenizer: Tokenizer, limit: int) -> RowModel:
        if model.data is None:
            raise DataError(
                "the pool names no text for a language model", where=model.name, expected="data: SPEC in the pool"
            )
        texts = [f"{e.prompt}\n{e.target}" if e.prompt else e.target for e in load_corpus(model.data).examples]
        sample = [texts[i] for i in self._draw(len(texts))]
        pad_id = pad_token_id(tokenizer)
        ids = [row or [pad_id] for row in tokenizer(sample, truncation=True, max_length=limit)["input_ids"]]
        language_model = load_model(request)

        def logits(batch: dict[str, Tensor]) -> Tensor:
            return language_model(**batch).logits[batch["attention_mask"].bool()]  # type: ignore[no-any-return]

        return RowModel(language_model, logits, self._batches(ids, pad_id, limit, language_model.device))

    def _draw(self, count: int) -> np.ndarray:
        """Numbers of the drawn rows, of `count`."""
        return np.random.default_rng(self.seed).permutation(count)[: self.examples]

    def _batches(self, ids: TokenRows, pad_id: int, limit: int, device: Any) -> PaddedBatches:
        length = None if self.pad_to is None else min(self.pad_to, limit)
        return PaddedBatches(ids, self.batch_size, pad_id, length, device)


@dataclass(frozen=True)
class PaddedBatches:
    """Rows in their order, a batch at a time; the same at every pass."""

    ids: TokenRows
    batch_size: int
    pad_id: int
    length: int | None
    """Tokens of every padded row; None = the longest row of the batch."""
    device: Any

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for start in range(0, len(self.ids), self.batch_size):
            batch = pad_rows(self.ids[start : start + self.batch_size], self.pad_id, length=self.length)
            yield {name: value.to(self.device) for name, value in batch.items()}
