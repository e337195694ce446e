"""The rows that fisher and regmean read: a classifier's own GLUE task, or the text a pool names for a language model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from kd.common.errors import DataError
from kd.data.sources import load_corpus
from kd.data.tasks.glue import load_glue
from kd.models.classifiers import load_classifier, refuse_other_classes
from kd.models.loading import ModelRequest, load_config, load_model, load_request_tokenizer, max_positions
from kd.models.tokenizer import pad_token_id
from kd.student_trainer.classify.encoding import encode_rows, pad_rows
from kd.student_trainer.merging.merger import Measured
from kd.student_trainer.merging.pool import ModelPool, PoolModel


def is_classifier_pool(pool: ModelPool) -> bool:
    """Are the models sequence classifiers (or else language models)? Raises DataError for a mixture."""
    kinds = {}
    for model in pool.models:
        config = load_config(ModelRequest(model.path, revision=model.revision))
        kinds[model.name] = any(n.endswith("ForSequenceClassification") for n in config.architectures or ())
    if len(set(kinds.values())) > 1:
        raise DataError(
            "the pool mixes classifiers and language models",
            where=pool.file,
            found=f"classifiers: {', '.join(name for name, yes in kinds.items() if yes)}",
        )
    return next(iter(kinds.values()))


@dataclass(frozen=True)
class RowSampler:
    """Gives a model of the pool and batches of its own rows: the `Measure` of `merge.prepare`."""

    classifiers: bool
    examples: int
    """Rows drawn of the training split."""
    batch_size: int
    pad_to: int | None = None
    """Pad every row to this many tokens, as the reference does; None = to the longest of the batch."""
    max_length: int = 512
    task_root: Path | None = None
    device: str = "auto"
    seed: int = 0
    """Of the drawing."""

    def __call__(self, model: PoolModel) -> Measured:
        request = ModelRequest(model.path, revision=model.revision, device=self.device, dtype="float32")
        tokenizer = load_request_tokenizer(request)
        pad = pad_token_id(tokenizer)
        limit = min(self.max_length, max_positions(load_config(request)) or self.max_length)
        if self.classifiers:
            found = load_glue(model.data, task=model.name, split="train", task_root=self.task_root)
            chosen = [found.rows[i] for i in self._drawn(len(found.rows))]
            ids: Sequence[Sequence[int]] = encode_rows(tokenizer, chosen, max_length=limit).ids
            whole = load_classifier(request, pad_id=pad)
            refuse_other_classes(request, whole.config, found.task.labels)
            part = whole.base_model
            for parameter in whole.parameters():
                parameter.requires_grad_(False)
            for parameter in part.parameters():
                parameter.requires_grad_(True)
            return part, lambda batch: whole(**batch).logits, self._batches(ids, pad, limit, whole.device)
        if model.data is None:
            raise DataError(
                "no text is named for a language model", where=model.name, expected="data: SPEC in the pool"
            )
        texts = [f"{e.prompt}\n{e.target}" if e.prompt else e.target for e in load_corpus(model.data).examples]
        chosen_texts = [texts[i] for i in self._drawn(len(texts))]
        ids = [row or [pad] for row in tokenizer(chosen_texts, truncation=True, max_length=limit)["input_ids"]]
        language = load_model(request)

        def logits(batch: dict[str, Tensor]) -> Tensor:
            return language(**batch).logits[batch["attention_mask"].bool()]  # type: ignore[no-any-return]

        return language, logits, self._batches(ids, pad, limit, language.device)

    def _drawn(self, count: int) -> np.ndarray:
        """Row numbers, without replacement."""
        return np.random.default_rng(self.seed).permutation(count)[: self.examples]

    def _batches(self, ids: Sequence[Sequence[int]], pad: int, limit: int, device: Any) -> PaddedBatches:
        width = None if self.pad_to is None else min(self.pad_to, limit)
        return PaddedBatches(ids, self.batch_size, pad, width, device)


@dataclass(frozen=True)
class PaddedBatches:
    """Rows in their order, a batch at a time; the same at every pass."""

    ids: Sequence[Sequence[int]]
    batch_size: int
    pad_id: int
    length: int | None
    """Of every row; None = the longest of the batch."""
    device: Any

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for start in range(0, len(self.ids), self.batch_size):
            batch = pad_rows(self.ids[start : start + self.batch_size], self.pad_id, length=self.length)
            yield {name: value.to(self.device) for name, value in batch.items()}
