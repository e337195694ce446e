"""Score classifiers on GLUE: one classifier, every backbone of a pool under every head, or all backbones as an ensemble.

Heads are linear and a backbone runs once per task, so any backbone can be scored under any head.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kd.common.errors import DataError
from kd.common.paths import as_path
from kd.common.progress import Progress
from kd.data.instruction_tasks.glue import GlueTask, glue_task, load_glue
from kd.evaluation.merged.glue_figures import Score, Scores, glue_figures
from kd.evaluation.merged.glue_table import GlueTable
from kd.evaluation.merged.merged_settings import ClassifierEvaluation, GlueRowSettings
from kd.models.classifiers import HEAD, load_classifier, refuse_other_classes
from kd.models.families.positions import max_positions
from kd.models.model_config import load_config, load_request_tokenizer
from kd.models.model_request import ModelRequest, resolve_device
from kd.models.tokenizer import pad_token_id
from kd.student_trainer.classify.encoding import EncodedRows, encode_rows
from kd.student_trainer.classify.pooling import pooled_states
from kd.student_trainer.merging.pool import ModelPool, PoolModel
from kd.student_trainer.merging.stored_weights import read_whole, stored_model
from kd.student_trainer.run_folder import read_classifier_run


@dataclass(frozen=True)
class ClassifierResult:
    """Figures of one classifier on the rows of one task."""

    task: str
    split: str
    rows: int
    digest: str
    """Digest of the rows."""
    scores: Scores

    def to_dict(self) -> dict[str, Any]:
        """The figures as JSON holds them."""
        return {
            "task": self.task,
            "split": self.split,
            "rows": self.rows,
            "rows_digest": self.digest,
            "scores": {name: vars(score) for name, score in self.scores.items()},
        }

    def lines(self) -> Iterator[str]:
        """Aligned lines for people."""
        for name, score in self.scores.items():
            error = "" if score.stderr is None else f" ± {score.stderr:.4f}"
            yield f"{name:<10}{score.value:.4f}{error}"


def evaluate_classifier(name: str, settings: ClassifierEvaluation) -> Iterator[Progress[ClassifierResult]]:
    """Score one classifier. Raises DataError where its task is unknown, or its classes are not those of the task."""
    rows = settings.rows
    task = settings.task or (Path(settings.data).name if settings.data else _task_of_model(name))
    labelled = load_glue(settings.data, task=task, split=settings.split, limit=rows.limit, task_root=rows.task_root)
    yield Progress(0, len(labelled.rows))
    request = ModelRequest(name, settings.revision, settings.dtype, rows.device)
    tokenizer = load_request_tokenizer(request)
    encoded = encode_rows(tokenizer, labelled.rows, max_length=_longest(request, rows.max_length))
    model = load_classifier(request, pad_id=encoded.pad_id)
    refuse_other_classes(request, model.config, labelled.task.labels)
    states = pooled_states(model.base_model, encoded, tokens_per_batch=rows.tokens_per_batch)
    scores = glue_figures(labelled.task, states @ model.score.weight.detach().float().cpu().T, encoded.labels)
    result = ClassifierResult(labelled.task.name, labelled.split, len(encoded), labelled.digest, scores)
    yield Progress(len(encoded), len(encoded), result)


def _task_of_model(name: str) -> str:
    """The task in `classify.json` beside the weights, else the last part of the name after `_`, as in gpt2_sst2."""
    run = read_classifier_run(as_path(name))
    if run is not None:
        return str(run["task"])
    return glue_task(name.rstrip("/").rpartition("/")[2].rpartition("_")[2]).name


def _longest(request: ModelRequest, max_length: int) -> int:
    """`max_length`, or the positions of the model where they are fewer."""
    return min(max_length, max_positions(load_config(request)) or max_length)


@dataclass(frozen=True)
class DevScores:
    """Figures of one task on its dev rows."""

    whole: Scores
    """Figures of all rows."""
    even: Scores | None = None
    """Figures of the rows 0, 2, 4, …; None where halves are not scored."""
    odd: Scores | None = None
    """Figures of the rows 1, 3, 5, …"""


BackboneScores = Mapping[str, DevScores]
"""Task -> figures of one backbone under the head of that task."""


@dataclass(frozen=True)
class TaskHead:
    """The head of one task and the rows it is scored on."""

    task: GlueTask
    weight: Tensor
    """[C, d] float32"""
    rows: EncodedRows

    def score(self, states: Tensor, numbers: np.ndarray | None = None) -> dict[str, Score]:
        """Figures of pooled states `[n, d]`: of all rows, or of the rows `numbers`."""
        chosen = np.arange(len(self.rows)) if numbers is None else numbers
        return glue_figures(self.task, states[chosen] @ self.weight.T, self.rows.labels[chosen])

    def dev_scores(self, states: Tensor, *, halves: bool = False) -> DevScores:
        """Figures of pooled states `[n, d]` of all rows, and with `halves` of the even and of the odd rows."""
        if not halves:
            return DevScores(self.score(states))
        numbers = np.arange(len(self.rows))
        return DevScores(self.score(states), self.score(states, numbers[::2]), self.score(states, numbers[1::2]))


def load_heads(pool: ModelPool, rows: GlueRowSettings) -> list[TaskHead]:
    """The head of each model and the dev rows of its task; reads no backbone. Raises DataError for a name that is no task."""
    resolve_device(rows.device)
    return [_load_head(model, rows) for model in pool.models]


def _load_head(model: PoolModel, rows: GlueRowSettings) -> TaskHead:
    task = glue_task(model.name)
    labelled = load_glue(model.data, task=task.name, split="dev", limit=rows.limit, task_root=rows.task_root)
    request = ModelRequest(model.path, model.revision)
    refuse_other_classes(request, load_config(request), task.labels)
    tokenizer = load_request_tokenizer(request)
    pad_token_id(tokenizer)
    encoded = encode_rows(tokenizer, labelled.rows, max_length=_longest(request, rows.max_length))
    weight = read_whole(stored_model(model, [f"{HEAD}.weight"], HEAD).places[f"{HEAD}.weight"]).float()
    if len(weight) != len(task.labels):
        raise DataError(
            "the classifier has another number of classes",
            where=f"{model.name}: {model.path}",
            found=len(weight),
            expected=f"{len(task.labels)}: {', '.join(task.labels)}",
        )
    return TaskHead(task, weight, encoded)


MOST_FREQUENT = "most frequent class"


def most_frequent(head: TaskHead) -> dict[str, Score]:
    """Figures of predicting the shares of the classes for every row: a model that knows the task must be better."""
    shares = np.bincount(head.rows.labels, minlength=len(head.task.labels)) / len(head.rows)
    constant = torch.from_numpy(np.log(np.maximum(shares, 1e-9))).expand(len(head.rows), -1)
    return glue_figures(head.task, constant, head.rows.labels)


def load_backbone(model: PoolModel, device: str) -> Any:
    """A model of the pool without its head, in float32."""
    import transformers

    request = ModelRequest(model.path, model.revision, "float32", device)
    load_config(request)
    backbone = transformers.AutoModel.from_pretrained(request.path, revision=model.revision, dtype=torch.float32)
    return backbone.to(resolve_device(device)).eval()


def score_backbone(
    backbone: Any, heads: Sequence[TaskHead], *, tokens_per_batch: int, halves: bool = False
) -> BackboneScores:
    """One backbone under every head; with `halves` also the figures of the even and of the odd rows."""
    return {
        head.task.name: head.dev_scores(
            pooled_states(backbone, head.rows, tokens_per_batch=tokens_per_batch), halves=halves
        )
        for head in heads
    }


def score_ensemble(
    pool: ModelPool, heads: Sequence[TaskHead], rows: GlueRowSettings
) -> Iterator[Progress[BackboneScores]]:
    """The mean of the states of all backbones under every head, one backbone in memory at a time.

    Heads are linear: this is the mean of the logits of the backbones under one head.
    """
    sums: list[Tensor | float] = [0.0] * len(heads)
    count = len(pool.models)
    for number, model in enumerate(pool.models):
        yield Progress(number, count, note=f"model {number + 1}")
        backbone = load_backbone(model, rows.device)
        for i, head in enumerate(heads):
            sums[i] = sums[i] + pooled_states(backbone, head.rows, tokens_per_batch=rows.tokens_per_batch)
    scores = {h.task.name: h.dev_scores(torch.as_tensor(s) / count) for h, s in zip(heads, sums, strict=True)}
    yield Progress(count, count, scores, f"model {count}")


def cross_task_matrix(
    pool: ModelPool, heads: Sequence[TaskHead], rows: GlueRowSettings
) -> Iterator[Progress[GlueTable]]:
    """Every backbone under the head of every task. The first row is the most frequent class, then the base if there is one."""
    models = [*([pool.base] if pool.base else []), *pool.models]
    total = len(models) * len(heads)
    table: dict[str, Mapping[str, Scores]] = {MOST_FREQUENT: {head.task.name: most_frequent(head) for head in heads}}
    for number, model in enumerate(models):
        yield Progress(number * len(heads), total, note=model.name)
        scores = score_backbone(load_backbone(model, rows.device), heads, tokens_per_batch=rows.tokens_per_batch)
        table[model.name] = {task: dev.whole for task, dev in scores.items()}
    yield Progress(total, total, GlueTable("backbone", tuple(h.task.name for h in heads), table))
