"""Classifiers on GLUE: figures with standard errors, one classifier, and every backbone under every task's head.

    accuracy   share of rows predicted right: what the reference reports for all seven tasks
    loss       mean cross-entropy, nats per row
    mcc        Matthews' correlation, of CoLA; f1 of the class 1 (duplicate, equivalent), of MRPC and QQP: what GLUE reports

F1 = 2 TP / (2 TP + FP + FN) is a ratio of sums over rows; Matthews' correlation a smooth function of the four cells'
shares p, in which a row of cell c has the influence (df/dp_c - sum_k p_k df/dp_k) / n. Either is 0 where it is undefined
(no such prediction or row), as in scikit-learn, and its error unknown. The average over tasks is
unweighted, as in the reference; tasks share no rows, so errors add in squares.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kd.common.errors import DataError
from kd.common.files import canonical_json, write_atomic
from kd.common.progress import Progress
from kd.data.tasks.glue import GlueTask, glue_task, load_glue
from kd.evaluation.statistics.estimates import standard_error
from kd.models.classifiers import HEAD, load_classifier, refuse_other_classes
from kd.models.loading import ModelRequest, load_config, load_request_tokenizer, max_positions, resolve_device
from kd.models.tokenizer import pad_token_id
from kd.student_trainer.classify.classifier_training import RUN
from kd.student_trainer.classify.encoding import EncodedRows, encode_rows
from kd.student_trainer.classify.pooling import pooled_states
from kd.student_trainer.merging.pool import ModelPool, PoolModel
from kd.student_trainer.merging.stored_weights import read_whole, stored_model


@dataclass(frozen=True)
class Score:
    """A figure of one task."""

    value: float
    stderr: float | None
    """None where it is unknown."""
    n: int
    """Rows."""

    def percent(self) -> str:
        """`85.2 ± 2.5`."""
        return f"{100 * self.value:.1f}" + ("" if self.stderr is None else f" ± {100 * self.stderr:.1f}")


Scores = Mapping[str, Score]
"""Figures of one task by name."""


def score_rows(task: GlueTask, logits: Tensor, labels: np.ndarray) -> dict[str, Score]:
    """Accuracy, loss and GLUE's own figures; `logits [n, C]`, `labels [n]`."""
    log_p = torch.log_softmax(logits.double(), dim=-1).numpy()
    predicted = logits.argmax(dim=-1).numpy()
    found = {
        "accuracy": _mean((predicted == labels).astype(np.float64)),
        "loss": _mean(-log_p[np.arange(len(labels)), labels]),
    }
    return found | {name: METRICS[name](predicted == 1, labels == 1) for name in task.metrics}


def _mean(values: np.ndarray) -> Score:
    return Score(float(values.mean()), standard_error((values - values.mean()) / len(values)), len(values))


def f1(predicted: np.ndarray, true: np.ndarray) -> Score:
    """Of the class that both arrays `[n]` are about."""
    hits = 2.0 * (predicted & true)
    counts = hits + (predicted ^ true)
    if not counts.sum():
        return Score(0.0, None, len(true))
    value = float(hits.sum() / counts.sum())
    return Score(value, standard_error((hits - value * counts) / counts.sum()), len(true))


def matthews(predicted: np.ndarray, true: np.ndarray) -> Score:
    """Matthews' correlation of two classes, `[n]` each."""
    cells = (~predicted).astype(int) * 2 + (~true).astype(int)  # 0 both, 1 predicted alone, 2 true alone, 3 neither
    a, b, c, d = np.bincount(cells, minlength=4) / len(true)
    sides = (a + b, a + c, d + b, d + c)
    if min(sides) == 0:
        return Score(0.0, None, len(true))
    root = math.sqrt(math.prod(sides))
    value = (a * d - b * c) / root
    inverse = [1 / side for side in sides]
    slope = np.array([d, -c, -b, a]) / root - value / 2 * np.array(
        [inverse[0] + inverse[1], inverse[0] + inverse[2], inverse[1] + inverse[3], inverse[2] + inverse[3]]
    )
    influence = (slope[cells] - (np.array([a, b, c, d]) * slope).sum()) / len(true)
    return Score(float(value), standard_error(influence), len(true))


METRICS: dict[str, Callable[[np.ndarray, np.ndarray], Score]] = {"mcc": matthews, "f1": f1}


@dataclass(frozen=True)
class ClassifierResult:
    """One classifier on one task's rows."""

    task: str
    split: str
    rows: int
    digest: str
    """Of the rows."""
    scores: Scores

    def to_dict(self) -> dict[str, Any]:
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


def evaluate_classifier(
    name: str,
    *,
    task: str | None = None,
    data: str | None = None,
    task_root: Path | None = None,
    split: str = "dev",
    limit: int | None = None,
    max_length: int = 512,
    tokens_per_batch: int = 4096,
    dtype: str = "auto",
    device: str = "auto",
    revision: str | None = None,
) -> Iterator[Progress[ClassifierResult]]:
    """Score one classifier. Raises DataError where its task is unknown, or its classes are not the task's."""
    task = task or (Path(data).name if data else _own_task(name))
    rows = load_glue(data, task=task, split=split, limit=limit, task_root=task_root)
    yield Progress(0, len(rows.rows))
    request = ModelRequest(name, revision, dtype, device)
    tokenizer = load_request_tokenizer(request)
    encoded = encode_rows(tokenizer, rows.rows, max_length=_longest(request, max_length))
    model = load_classifier(request, pad_id=encoded.pad_id)
    refuse_other_classes(request, model.config, rows.task.labels)
    states = pooled_states(model.base_model, encoded, tokens_per_batch=tokens_per_batch)
    scores = score_rows(rows.task, states @ model.score.weight.detach().float().cpu().T, encoded.labels)
    result = ClassifierResult(rows.task.name, rows.split, len(encoded), rows.digest, scores)
    yield Progress(len(encoded), len(encoded), result)


def _own_task(name: str) -> str:
    """What `kd classify train` wrote beside the weights, else the last part of the name after `_`, as in gpt2_sst2."""
    state = Path(name) / RUN
    if state.is_file():
        return str(json.loads(state.read_text(encoding="utf-8"))["task"])
    return glue_task(name.rstrip("/").rpartition("/")[2].rpartition("_")[2]).name


def _longest(request: ModelRequest, max_length: int) -> int:
    return min(max_length, max_positions(load_config(request)) or max_length)


@dataclass(frozen=True)
class TaskHead:
    """A task's head and the rows it is scored on."""

    task: GlueTask
    weight: Tensor
    """[C, d] float32"""
    rows: EncodedRows

    def score(self, states: Tensor, numbers: np.ndarray | None = None) -> dict[str, Score]:
        """Figures under pooled states `[n, d]`, of all rows or of some."""
        chosen = np.arange(len(self.rows)) if numbers is None else numbers
        return score_rows(self.task, states[chosen] @ self.weight.T, self.rows.labels[chosen])


def load_heads(
    pool: ModelPool,
    *,
    task_root: Path | None = None,
    limit: int | None = None,
    max_length: int = 512,
    device: str = "auto",
) -> list[TaskHead]:
    """Each model's head and its task's dev rows; reads no backbone. Raises DataError for a name that is no task."""
    resolve_device(device)
    heads = []
    for model in pool.models:
        task = glue_task(model.name)
        rows = load_glue(model.data, task=task.name, split="dev", limit=limit, task_root=task_root)
        request = ModelRequest(model.path, model.revision)
        refuse_other_classes(request, load_config(request), task.labels)
        tokenizer = load_request_tokenizer(request)
        pad_token_id(tokenizer)
        encoded = encode_rows(tokenizer, rows.rows, max_length=_longest(request, max_length))
        weight = read_whole(stored_model(model, [f"{HEAD}.weight"], HEAD).places[f"{HEAD}.weight"]).float()
        if len(weight) != len(task.labels):
            raise DataError(
                "the classifier has another number of classes",
                where=f"{model.name}: {model.path}",
                found=len(weight),
                expected=f"{len(task.labels)}: {', '.join(task.labels)}",
            )
        heads.append(TaskHead(task, weight, encoded))
    return heads


@dataclass(frozen=True)
class GlueTable:
    """Figures of several backbones on several tasks."""

    title: str
    """What a row is."""
    tasks: tuple[str, ...]
    rows: Mapping[str, Mapping[str, Scores]]
    """label -> task -> figures"""

    def average(self, label: str, metric: str = "accuracy") -> Score:
        """The unweighted mean over tasks."""
        scores = [self.rows[label][task][metric] for task in self.tasks]
        errors = [s.stderr for s in scores]
        known = [e for e in errors if e is not None]
        error = math.sqrt(sum(e * e for e in known)) / len(scores) if len(known) == len(scores) else None
        return Score(sum(s.value for s in scores) / len(scores), error, sum(s.n for s in scores))

    @property
    def best(self) -> str:
        """The label with the highest average accuracy; of equal ones the first."""
        return max(self.rows, key=lambda label: self.average(label).value)

    def report(self, label: str) -> dict[str, Any]:
        """One row in the shape of the reference's reports, with what they lack."""
        tasks = {
            task: {name: s.value for name, s in self.rows[label][task].items()}
            | {f"{name}_stderr": s.stderr for name, s in self.rows[label][task].items()}
            | {"n": self.rows[label][task]["accuracy"].n}
            for task in self.tasks
        }
        accuracy = self.average(label)
        average = {
            "accuracy": accuracy.value,
            "loss": self.average(label, "loss").value,
            "accuracy_stderr": accuracy.stderr,
        }
        return tasks | {"average": average}

    def to_dict(self) -> dict[str, Any]:
        return {
            "title": self.title,
            "tasks": list(self.tasks),
            "best": self.best,
            "rows": {label: self.report(label) for label in self.rows},
        }

    def markdown(self) -> str:
        """Accuracy in percent, the best average in bold; below it GLUE's own figures of the tasks that have one."""
        lines = [f"| {self.title} | {' | '.join(self.tasks)} | average |", "|---" * (len(self.tasks) + 2) + "|"]
        for label, tasks in self.rows.items():
            average = self.average(label).percent()
            average = f"**{average}**" if label == self.best and len(self.rows) > 1 else average
            lines.append(f"| {label} | {' | '.join(tasks[t]['accuracy'].percent() for t in self.tasks)} | {average} |")
        others = [(t, m) for t in self.tasks for m in METRICS if all(m in tasks[t] for tasks in self.rows.values())]
        if others:
            lines += [
                "",
                f"| {self.title} | {' | '.join(f'{t} {m}' for t, m in others)} |",
                "|---" * (len(others) + 1) + "|",
            ]
            lines += [
                f"| {label} | {' | '.join(tasks[t][m].percent() for t, m in others)} |"
                for label, tasks in self.rows.items()
            ]
        counts = ", ".join(f"{t} {next(iter(self.rows.values()))[t]['accuracy'].n:,}" for t in self.tasks)
        return "\n".join([*lines, "", f"Accuracy in percent ± standard error; rows: {counts}."])

    def save(self, folder: Path, name: str) -> None:
        """Write `NAME.json` and `NAME.md`."""
        write_atomic(folder / f"{name}.json", canonical_json(self.to_dict()))
        write_atomic(folder / f"{name}.md", self.markdown() + "\n")


MOST_FREQUENT = "most frequent class"


def most_frequent(head: TaskHead) -> dict[str, Score]:
    """Figures of the shares of the classes, predicted for every row: what a model must beat to know anything."""
    shares = np.bincount(head.rows.labels, minlength=len(head.task.labels)) / len(head.rows)
    constant = torch.from_numpy(np.log(np.maximum(shares, 1e-9))).expand(len(head.rows), -1)
    return score_rows(head.task, constant, head.rows.labels)


def load_backbone(model: PoolModel, device: str = "auto") -> Any:
    """A model of the pool without its head, float32."""
    import transformers

    request = ModelRequest(model.path, model.revision, "float32", device)
    load_config(request)
    backbone = transformers.AutoModel.from_pretrained(request.path, revision=model.revision, dtype=torch.float32)
    return backbone.to(resolve_device(device)).eval()


def score_backbone(
    backbone: Any, heads: Sequence[TaskHead], *, tokens_per_batch: int = 4096, halves: bool = False
) -> dict[str, list[dict[str, Score]]]:
    """One backbone under every head: task -> figures of all rows; with `halves` then of the even ones and the odd ones."""
    found = {}
    for head in heads:
        states = pooled_states(backbone, head.rows, tokens_per_batch=tokens_per_batch)
        found[head.task.name] = _scored(head, states, halves)
    return found


def _scored(head: TaskHead, states: Tensor, halves: bool) -> list[dict[str, Score]]:
    numbers = np.arange(len(head.rows))
    return [head.score(states, part) for part in ((numbers, numbers[::2], numbers[1::2]) if halves else (numbers,))]


def score_ensemble(
    pool: ModelPool, heads: Sequence[TaskHead], *, tokens_per_batch: int = 4096, device: str = "auto"
) -> Iterator[Progress[dict[str, list[dict[str, Score]]]]]:
    """The mean of all backbones' states under every head, one backbone in memory at a time.

    Heads are linear: this is the mean of the backbones' logits under one head.
    """
    sums: list[Tensor | float] = [0.0] * len(heads)
    for number, model in enumerate(pool.models):
        yield Progress(number, len(pool.models))
        backbone = load_backbone(model, device)
        for place, head in enumerate(heads):
            sums[place] = sums[place] + pooled_states(backbone, head.rows, tokens_per_batch=tokens_per_batch)
    count = len(pool.models)
    result = {
        h.task.name: _scored(h, torch.as_tensor(total) / count, False) for h, total in zip(heads, sums, strict=True)
    }
    yield Progress(count, count, result)


def cross_task_matrix(
    pool: ModelPool, heads: Sequence[TaskHead], *, tokens_per_batch: int = 4096, device: str = "auto"
) -> Iterator[Progress[GlueTable]]:
    """Every backbone, the base first where there is one, with every task's head; above them what needs no model."""
    models = [*([pool.base] if pool.base else []), *pool.models]
    rows: dict[str, Mapping[str, Scores]] = {MOST_FREQUENT: {head.task.name: most_frequent(head) for head in heads}}
    for number, model in enumerate(models):
        yield Progress(number * len(heads), len(models) * len(heads))
        found = score_backbone(load_backbone(model, device), heads, tokens_per_batch=tokens_per_batch)
        rows[model.name] = {task: scores[0] for task, scores in found.items()}
    total = len(models) * len(heads)
    yield Progress(total, total, GlueTable("backbone", tuple(h.task.name for h in heads), rows))
