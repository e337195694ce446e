"""Merge, score, choose: one setting or a sweep of scalings, on GLUE's dev rows.

    OUT/                          the merged backbone (`AutoModel`) or language model, and a tokenizer
    OUT/merge.json                pool, settings, the chosen scaling and the rows it was chosen on; written last
    OUT/METHOD_scaling_factor_S.json   figures of each scaling in the reference's shape: task -> accuracy, loss; average
    OUT/table.md .json, OUT/sweep.png       all dev rows; with dev-half also table-even and table-odd

A scaling that is chosen on the rows it is scored on looks too good: it is the best of eleven noisy averages. `dev-half` chooses
on the even rows of every task and scores on the odd ones.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from kd.common.disk.digests import write_digests
from kd.common.disk.disk_errors import clear_write_errors
from kd.common.errors import DataError
from kd.common.files import canonical_json, write_atomic
from kd.common.progress import Progress
from kd.common.settings import saved
from kd.evaluation.merged.glue_figures import Scores
from kd.evaluation.merged.glue_scores import (
    BackboneScores,
    DevScores,
    TaskHead,
    load_heads,
    score_backbone,
    score_ensemble,
)
from kd.evaluation.merged.glue_table import GlueTable
from kd.evaluation.merged.merged_settings import MergeRun
from kd.evaluation.merged.sweep_figure import draw_sweep
from kd.models.classifiers import load_classifier
from kd.models.model_config import load_request_tokenizer
from kd.models.model_request import ModelRequest, resolve_device
from kd.models.tokenizer import pad_token_id
from kd.models.weights.finite_weights import refuse_weights_without_value
from kd.student_trainer.merging.merge_statistics import LoadRows
from kd.student_trainer.merging.merger import Merger, prepared_merger
from kd.student_trainer.merging.method_registry import MergeMethod, merge_method, scaled_methods
from kd.student_trainer.merging.pool import ModelPool, read_pool
from kd.student_trainer.merging.stored_weights import StoredPool, skeleton
from kd.student_trainer.merging.training_rows import RowSampler, is_classifier_pool
from kd.student_trainer.saving.whole_models import write_model


@dataclass(frozen=True)
class MergeResult:
    """Facts about a finished merge."""

    out: str
    method: str
    models: list[str]
    parameters: int | None
    """Parameters of the merged model; None where there are no merged weights."""
    scaling: float | None
    """Scaling of the weights in `out`, as given or chosen; None where the method has none."""
    table: GlueTable | None
    """A row per scaling, on all dev rows as in the reference; None where nothing was scored."""
    even: GlueTable | None
    """With --select-on dev-half, the table of the rows that choose: one row per scaling."""
    odd: GlueTable | None
    """With --select-on dev-half, the table of the other rows: the chosen scaling alone."""
    warning: str | None

    def to_dict(self) -> dict[str, Any]:
        """The result as JSON holds it."""
        return {
            "out": self.out,
            "method": self.method,
            "models": self.models,
            "parameters": self.parameters,
            "scaling": self.scaling,
            "table": self.table and self.table.to_dict(),
            "even": self.even and self.even.to_dict(),
            "odd": self.odd and self.odd.to_dict(),
            "warning": self.warning,
        }


def run_merge(run: MergeRun) -> Iterator[Progress[MergeResult]]:
    """Read the pool, merge and score it; the last record carries the result. Raises KdError for anything unusable."""
    merge_method(run.merge)  # a scaling that the method lacks is refused before anything is read
    pool = read_pool(run.pool)
    classifiers = is_classifier_pool(pool)
    heads = load_heads(pool, run.rows) if classifiers and run.score else []
    yield from merge_pool(pool, run, heads=heads, load_rows=row_sampler(run, classifiers=classifiers))


def merge_cost(run: MergeRun) -> dict[str, Any]:
    """What a merge would write, and how large it is. Nothing is written, and no weights are read.

    Raises KdError where the merge would refuse to start: models that do not fit together, rows that are not there, settings that
    contradict each other.
    """
    method, pool = merge_method(run.merge), read_pool(run.pool)
    job = _MergeJob(pool, run, tuple(load_heads(pool, run.rows)) if is_classifier_pool(pool) and run.score else ())
    job.check()
    model = skeleton(pool)
    stored = StoredPool.of(pool, model, with_base=method.needs_base or bool(run.merge.exclude))
    tensors = model.state_dict()
    size = 0 if method.live else sum(tensors[name].numel() * tensors[name].element_size() for name in stored.names)
    return {
        "out": str(run.out),
        "method": run.merge.method,
        "models": pool.names,
        "parameters": None if method.live else int(model.num_parameters()),
        "weights_bytes": size,
        # each has a head too, which is small beside its backbone
        "classifiers_bytes": size * len(pool.models) if run.classifiers else 0,
        "scalings": len(job.scalings),
        "scored_tasks": [head.task.name for head in job.heads],
    }


def row_sampler(run: MergeRun, *, classifiers: bool) -> RowSampler | None:
    """Loads the training rows that the method measures; None where it measures none."""
    method, rows = merge_method(run.merge), run.measured_rows
    if method.rows is None:
        return None
    one_row = method.by_example and rows.per_example
    return RowSampler(
        classifiers=classifiers,
        examples=rows.examples or method.rows.examples,
        batch_size=1 if one_row else rows.batch_size or method.rows.batch_size,
        pad_to=run.rows.max_length if method.counts_padding and not run.merge.regmean.mask_pads else None,
        max_length=run.rows.max_length,
        task_root=run.rows.task_root,
        device=run.rows.device,
        seed=run.merge.seed,
    )


def merge_pool(
    pool: ModelPool, run: MergeRun, *, heads: Sequence[TaskHead] = (), load_rows: LoadRows | None = None
) -> Iterator[Progress[MergeResult]]:
    """Merge `pool` into the output folder of `run`; the last record carries the result.

    heads       tasks to score; none = nothing is scored, and a sweep is refused
    load_rows   training rows for fisher and regmean

    Raises DataError before anything is loaded for settings that do not fit together.
    """
    job = _MergeJob(pool, run, tuple(heads))
    job.check()
    with clear_write_errors(run.out, "make room or name another --out, then run the same command again"):
        result = yield from _scored_ensemble(job) if job.method.live else _merged_weights(job, load_rows)
        _write(job, result)
    yield Progress(job.total, job.total, result, "written")


@dataclass(frozen=True)
class _MergeJob:
    """What is merged, how, and on which tasks it is scored."""

    pool: ModelPool
    run: MergeRun
    heads: tuple[TaskHead, ...]

    @property
    def method(self) -> MergeMethod[Any]:
        return merge_method(self.run.merge)

    @property
    def sweep(self) -> tuple[float, ...]:
        return self.run.scalings.sweep

    @property
    def scalings(self) -> tuple[float | None, ...]:
        """Scalings to try; None where the method has none."""
        if self.sweep:
            return self.sweep
        return (self.method.factor(self.run.merge.scaling) if self.method.scaling is not None else None,)

    @property
    def total(self) -> int:
        """Steps of progress: a model that is measured or run, a scaling that is merged, one that is scored, the files."""
        models = len(self.pool.models) if self.method.live or self.method.measure else 0
        points = 0 if self.method.live else len(self.scalings) * (1 + bool(self.heads))
        return models + points + 1

    def label(self, scaling: float | None) -> str:
        """Label of a scaling in the tables."""
        return f"{scaling:g}" if self.sweep else self.run.merge.method

    def check(self) -> None:
        """Raise DataError for settings that do not fit together."""
        name = self.run.merge.method
        if self.run.out.exists() and any(self.run.out.iterdir()):
            raise DataError("the output folder is not empty", where=self.run.out, try_="another --out")
        if self.sweep and self.method.scaling is None:
            raise DataError(f"{name} has no scaling to sweep", found="--sweep", expected=scaled_methods())
        if (self.sweep or self.method.live) and not self.heads:
            raise DataError(
                "there is nothing to score the models on",
                found="--sweep" if self.sweep else name,
                expected="a pool of classifiers named by their GLUE tasks",
            )
        if self.run.scalings.halves and not self.sweep:
            raise DataError(
                "there is nothing to choose",
                found=f"--select-on {self.run.scalings.select_on}",
                try_="--sweep 0:1:0.1",
            )


@dataclass(frozen=True)
class _MergeTables:
    """Figures of every scaling, on all dev rows and on their halves; None where nothing was scored."""

    whole: GlueTable | None = None
    even: GlueTable | None = None
    odd: GlueTable | None = None

    @classmethod
    def of(cls, job: _MergeJob, points: Mapping[str, BackboneScores]) -> _MergeTables:
        """Tables with a row per label of `points`."""
        if not points:
            return cls()
        tasks = tuple(head.task.name for head in job.heads)

        def table(part: Callable[[DevScores], Scores | None]) -> GlueTable:
            rows = {label: {task: part(dev) or {} for task, dev in scores.items()} for label, scores in points.items()}
            return GlueTable("scaling" if job.sweep else "method", tasks, rows)

        whole = table(lambda dev: dev.whole)
        if not job.run.scalings.halves:
            return cls(whole)
        return cls(whole, table(lambda dev: dev.even), table(lambda dev: dev.odd))

    def best_scaling(self, job: _MergeJob) -> float | None:
        """The scaling of the best average accuracy on the rows that choose."""
        table = self.even or self.whole
        return float(table.best) if job.sweep and table is not None else job.scalings[0]


def _scored_ensemble(job: _MergeJob) -> Generator[Progress[MergeResult], None, MergeResult]:
    scores: BackboneScores | None = None
    for step in score_ensemble(job.pool, job.heads, job.run.rows):
        scores = step.result
        yield Progress(step.done, job.total, note=step.note)
    assert scores is not None
    method = job.run.merge.method
    table = _MergeTables.of(job, {method: scores}).whole
    return MergeResult(str(job.run.out), method, job.pool.names, None, None, table, None, None, None)


def _merged_weights(job: _MergeJob, load_rows: LoadRows | None) -> Generator[Progress[MergeResult], None, MergeResult]:
    """Merge with every scaling, score each, and write the model of the best."""
    pool, out = job.pool, job.run.out
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".statistics-", dir=out) as folder:
        merger: Merger | None = None
        for step in prepared_merger(pool, job.run.merge, folder=Path(folder), load_rows=load_rows):
            merger = step.result
            yield Progress(step.done, job.total, note=step.note)
        assert merger is not None
        model = skeleton(pool, device="cpu")
        tables = _MergeTables.of(job, (yield from _scored_scalings(job, merger, model, step.done)))
        scaling = tables.best_scaling(job)
        if scaling != job.scalings[-1]:
            merger.apply(model, scaling)
        refuse_weights_without_value(model, f"merged of {', '.join(pool.names)}")
        first = pool.models[0]
        write_model(out, model.to("cpu"), load_request_tokenizer(ModelRequest(first.path, first.revision)))
    if job.run.classifiers:
        _write_classifiers(pool, model, out / "classifiers")
    odd = tables.odd and replace(tables.odd, rows={job.label(scaling): tables.odd.rows[job.label(scaling)]})
    return MergeResult(
        str(out),
        job.run.merge.method,
        pool.names,
        int(model.num_parameters()),
        scaling,
        tables.whole,
        tables.even,
        odd,
        _warning(job, scaling),
    )


def _scored_scalings(
    job: _MergeJob, merger: Merger, model: Any, done: int
) -> Generator[Progress[MergeResult], None, dict[str, BackboneScores]]:
    """Write every scaling into `model` in turn and score it: label -> figures, empty without heads."""
    rows, halves, points = job.run.rows, job.run.scalings.halves, {}
    device = resolve_device(rows.device)
    for scaling in job.scalings:
        label = job.label(scaling)
        merger.apply(model, scaling)
        done += 1
        yield Progress(done, job.total, note=f"merged {label}")
        if job.heads:
            backbone = model.to(device)
            points[label] = score_backbone(backbone, job.heads, tokens_per_batch=rows.tokens_per_batch, halves=halves)
            done += 1
            yield Progress(done, job.total, note=f"scored {label}")
    return points


def _warning(job: _MergeJob, scaling: float | None) -> str | None:
    if not job.sweep or job.run.scalings.halves:
        return None
    return (
        f"scaling {scaling:g} was chosen on the rows it is scored on: its average is the best of {len(job.sweep)}, "
        "so it looks too good; --select-on dev-half chooses on one half of the rows and scores on the other"
    )


def _write(job: _MergeJob, result: MergeResult) -> None:
    """Write the tables, the figure and, last, `merge.json`."""
    pool, settings, out, table = job.pool, job.run.merge, job.run.out, result.table
    if table is not None:
        table.save(out, "table")
        for label in table.rows:
            name = f"{settings.method}_scaling_factor_{label}" if job.sweep else settings.method
            write_atomic(out / f"{name}.json", canonical_json(table.report(label)))
        if job.sweep:
            draw_sweep(out / "sweep.png", table, method=settings.method, chosen=result.scaling)
    for name, half in (("even", result.even), ("odd", result.odd)):
        if half is not None:
            half.save(out, f"table-{name}")
    document = {
        "format": "kd-merge",
        "pool": {"base": pool.base and pool.base.path, "models": {m.name: m.path for m in pool.models}},
        "settings": saved(settings),
        "select_on": job.run.scalings.select_on if job.sweep else None,
        "result": result.to_dict(),
    }
    write_digests(out)
    write_atomic(out / "merge.json", canonical_json(document))


def _write_classifiers(pool: ModelPool, merged: Any, folder: Path) -> None:
    """The merged backbone under the head of each model, as `save_pretrained` writes classifiers."""
    for model in pool.models:
        request = ModelRequest(model.path, model.revision, device="cpu", dtype="float32")
        tokenizer = load_request_tokenizer(request)
        classifier = load_classifier(request, pad_id=pad_token_id(tokenizer))
        classifier.base_model.load_state_dict(merged.state_dict(), assign=True)
        write_model(folder / model.name, classifier, tokenizer)
        write_digests(folder / model.name)
