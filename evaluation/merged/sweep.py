"""Merge, score, choose: one setting or a sweep of scalings, on GLUE's dev rows.

    OUT/                          the merged backbone (`AutoModel`) or language model, and a tokenizer
    OUT/merge.json                pool, settings, what was chosen and on which rows; written last
    OUT/METHOD_scaling_factor_S.json   figures of each point in the reference's shape: task -> accuracy, loss; average
    OUT/table.md .json, OUT/sweep.png       all dev rows; with dev-half also table-even and table-odd

A scaling chosen on the rows it is scored on flatters itself: the best of eleven noisy averages. `dev-half` chooses on the
even rows of every task and scores on the odd ones.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from kd.common.errors import DataError
from kd.common.files import canonical_json, write_atomic
from kd.evaluation.merged.glue_scores import GlueTable, Scores, TaskHead, score_backbone, score_ensemble
from kd.evaluation.merged.sweep_figure import draw_sweep
from kd.models.loading import ModelRequest, load_request_tokenizer
from kd.student_trainer.merging.merge_methods import MERGE_METHODS
from kd.student_trainer.merging.merger import Measure, Merger, MergeSettings, prepare
from kd.student_trainer.merging.pool import ModelPool
from kd.student_trainer.merging.stored_weights import skeleton

SELECTIONS = ("dev", "dev-half")
"""Rows a scaling is chosen on: all that are scored, or the even half, the odd half being scored."""


@dataclass(frozen=True)
class MergeResult:
    """What a merge reports."""

    out: str
    method: str
    models: list[str]
    parameters: int | None
    """None where there are no merged weights."""
    scaling: float | None
    """Of the weights in `out`: as asked for, or chosen."""
    table: GlueTable | None
    """A row per scaling over all dev rows, as in the reference; None where nothing was scored."""
    even: GlueTable | None
    """Of `dev-half`: the same over the half that the choice is made on."""
    odd: GlueTable | None
    """Of `dev-half`: the chosen scaling over the other half."""
    warning: str | None

    def to_dict(self) -> dict[str, Any]:
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


@dataclass(frozen=True)
class MergeProgress:
    """One step of `run_merge`."""

    done: int
    total: int
    note: str
    result: MergeResult | None = None
    """On the last record."""


def run_merge(
    pool: ModelPool,
    settings: MergeSettings,
    out: Path,
    *,
    sweep: Sequence[float] = (),
    select_on: str = "dev",
    heads: Sequence[TaskHead] = (),
    measure: Measure | None = None,
    tokens_per_batch: int = 4096,
    device: str = "auto",
    classifiers: bool = False,
) -> Iterator[MergeProgress]:
    """Merge `pool` into `out`; the last record carries the result.

    sweep        scalings to try; empty = the settings' own
    select_on    one of SELECTIONS
    heads        tasks to score; none = nothing is scored, and a sweep is refused
    measure      rows for fisher and regmean
    classifiers  also write a whole classifier per model to OUT/classifiers/NAME
    Raises DataError before anything is loaded for settings that do not go together.
    """
    method = MERGE_METHODS[settings.method]
    _check(settings, out, sweep, select_on, heads)
    if method.live:
        yield from _ensemble(pool, settings, out, heads, tokens_per_batch, device)
        return
    scalings: list[float | None] = [*sweep] or [settings.factor if method.scaling is not None else None]
    halves = select_on == "dev-half"
    steps = len(scalings) * (1 + bool(heads)) + 1
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".statistics-", dir=out) as folder:
        merger: Merger | None = None
        for step in prepare(pool, settings, folder=Path(folder), measure=measure):
            merger = step.merger
            yield MergeProgress(step.done, step.total + steps, step.note)
        assert merger is not None
        done, total = step.total, step.total + steps
        model = skeleton(pool, device="cpu")
        tables: list[dict[str, dict[str, Scores]]] = [{}, {}, {}]
        for scaling in scalings:
            label = f"{scaling:g}" if sweep else settings.method
            merger.apply(model, scaling)
            done += 1
            yield MergeProgress(done, total, f"merged {label}")
            if not heads:
                continue
            backbone = model.to(device) if device != "auto" else model
            for task, scores in score_backbone(
                backbone, heads, tokens_per_batch=tokens_per_batch, halves=halves
            ).items():
                for rows, score in zip(tables, scores, strict=False):
                    rows.setdefault(label, {})[task] = score
            done += 1
            yield MergeProgress(done, total, f"scored {label}")
        tasks = tuple(head.task.name for head in heads)
        whole, even, odd = (
            GlueTable("scaling" if sweep else "method", tasks, rows) if rows else None for rows in tables
        )
        choice = even or whole
        scaling = float(choice.best) if sweep and choice is not None else scalings[0]
        if sweep and scaling != scalings[-1]:
            merger.apply(model, scaling)
        model.to("cpu").save_pretrained(out)
    load_request_tokenizer(ModelRequest(pool.models[0].path, pool.models[0].revision)).save_pretrained(out)
    if classifiers:
        _write_classifiers(pool, model, out / "classifiers")
    odd = None if odd is None else replace(odd, rows={f"{scaling:g}": odd.rows[f"{scaling:g}"]})
    warning = None
    if sweep and not halves:
        warning = (
            f"scaling {scaling:g} was chosen on the rows it is scored on: its average is the best of {len(sweep)} and "
            "flatters itself; --select-on dev-half chooses on one half and scores on the other"
        )
    result = MergeResult(
        str(out), settings.method, pool.names, int(model.num_parameters()), scaling, whole, even, odd, warning
    )
    _write(result, pool, settings, out, select_on if sweep else None)
    yield MergeProgress(total, total, "written", result)


def _check(
    settings: MergeSettings, out: Path, sweep: Sequence[float], select_on: str, heads: Sequence[TaskHead]
) -> None:
    method = MERGE_METHODS[settings.method]
    if out.exists() and any(out.iterdir()):
        raise DataError("the output folder is not empty", where=out, try_="another --out")
    if sweep and method.scaling is None:
        raise DataError(
            f"{settings.method} has no scaling to sweep",
            found="--sweep",
            expected=", ".join(n for n, m in MERGE_METHODS.items() if m.scaling is not None),
        )
    if (sweep or method.live) and not heads:
        raise DataError(
            "there is nothing to score the models on",
            found="--sweep" if sweep else settings.method,
            expected="a pool of classifiers named by their GLUE tasks",
        )
    if select_on not in SELECTIONS:
        raise DataError("unknown choice of rows", found=f"--select-on {select_on}", expected=" or ".join(SELECTIONS))
    if select_on != "dev" and not sweep:
        raise DataError("there is nothing to choose", found=f"--select-on {select_on}", try_="--sweep 0:1:0.1")


def _ensemble(
    pool: ModelPool, settings: MergeSettings, out: Path, heads: Sequence[TaskHead], tokens_per_batch: int, device: str
) -> Iterator[MergeProgress]:
    scores = None
    for step in score_ensemble(pool, heads, tokens_per_batch=tokens_per_batch, device=device):
        scores = step.result
        yield MergeProgress(step.done, step.total + 1, f"model {min(step.done + 1, step.total)}")
    assert scores is not None
    rows = {settings.method: {task: found[0] for task, found in scores.items()}}
    table = GlueTable("method", tuple(h.task.name for h in heads), rows)
    result = MergeResult(str(out), settings.method, pool.names, None, None, table, None, None, None)
    _write(result, pool, settings, out, None)
    yield MergeProgress(len(pool.models) + 1, len(pool.models) + 1, "written", result)


def _write(result: MergeResult, pool: ModelPool, settings: MergeSettings, out: Path, select_on: str | None) -> None:
    table = result.table
    if table is not None:
        table.save(out, "table")
        for label in table.rows:
            name = f"{settings.method}_scaling_factor_{label}" if table.title == "scaling" else settings.method
            write_atomic(out / f"{name}.json", canonical_json(table.report(label)))
        if table.title == "scaling":
            draw_sweep(out / "sweep.png", table, method=settings.method, chosen=result.scaling)
    for name, half in (("even", result.even), ("odd", result.odd)):
        if half is not None:
            half.save(out, f"table-{name}")
    document = {
        "format": "kd-merge",
        "pool": {"base": pool.base and pool.base.path, "models": {m.name: m.path for m in pool.models}},
        "settings": asdict(settings),
        "select_on": select_on,
        "result": result.to_dict(),
    }
    write_atomic(out / "merge.json", canonical_json(document))


def _write_classifiers(pool: ModelPool, merged: Any, folder: Path) -> None:
    """The merged backbone under each model's own head, as `save_pretrained` writes classifiers."""
    from kd.models.classifiers import load_classifier
    from kd.models.tokenizer import pad_token_id

    for model in pool.models:
        request = ModelRequest(model.path, model.revision, device="cpu", dtype="float32")
        tokenizer = load_request_tokenizer(request)
        whole = load_classifier(request, pad_id=pad_token_id(tokenizer))
        whole.base_model.load_state_dict(merged.state_dict(), assign=True)
        whole.save_pretrained(folder / model.name)
        tokenizer.save_pretrained(folder / model.name)
