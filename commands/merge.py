"""kd merge: one model out of several."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from kd.commands.console import emit_json, follow, quiet_libraries
from kd.commands.options import PATH, json_option


def parse_sweep(_: click.Context, __: click.Parameter, value: str | None) -> tuple[float, ...]:
    """`0:1:0.1` -> 0, 0.1, … 1, free of rounding; or values separated by commas."""
    from decimal import Decimal, InvalidOperation

    if value is None:
        return ()
    try:
        parts = [Decimal(part) for part in value.replace(":", ",").split(",")]
        if ":" not in value:
            return tuple(float(part) for part in parts)
        first, last, step = parts
        if step <= 0 or last < first:
            raise ValueError
        return tuple(float(first + step * i) for i in range(int((last - first) / step) + 1))
    except (ValueError, InvalidOperation) as error:
        raise click.BadParameter("expected FIRST:LAST:STEP, e.g. 0:1:0.1, or values separated by commas") from error


@click.command()
@click.option(
    "--method",
    required=True,
    help="simple-average, task-arithmetic, ties, fisher, regmean, dare, or ensemble (live, no weights).",
)
@click.option("--pool", required=True, type=PATH, help="YAML file of the models (docs/merging.md).")
@click.option("--out", required=True, type=PATH, help="Folder of the merged model, tables and figure.")
@click.option(
    "--scaling", type=float, help="Factor of the task vectors of task-arithmetic, ties and dare. Default: 0.3."
)
@click.option(
    "--sweep",
    callback=parse_sweep,
    metavar="A:B:STEP",
    help="Try these scalings and write the model of the best average, e.g. 0:1:0.1.",
)
@click.option(
    "--select-on",
    default="dev",
    show_default=True,
    help="Rows a scaling is chosen on: dev (those it is scored on), or dev-half (even rows; odd score).",
)
@click.option("--task-root", type=PATH, help="Folder of local GLUE rows, DIR/TASK/SPLIT.jsonl; the hub by default.")
@click.option("--limit", type=click.IntRange(min=1), help="First dev rows of each task alone.")
@click.option("--score/--no-score", default=True, show_default=True, help="Score classifiers on GLUE's dev rows.")
@click.option("--classifiers", is_flag=True, help="Write a whole classifier per task too, to OUT/classifiers/TASK.")
@click.option(
    "--threshold", type=float, default=20.0, show_default=True, help="Of ties: percent of each task vector kept."
)
@click.option(
    "--elect",
    default="sum",
    show_default=True,
    help="Of ties: sum (the reference), mean (the paper) or max of what agrees in sign.",
)
@click.option("--density", type=float, default=0.5, show_default=True, help="Of dare: share of each task vector drawn.")
@click.option(
    "--examples",
    type=click.IntRange(min=1),
    help="Training rows measured per model. Default: 512 for fisher, 256 for regmean.",
)
@click.option("--batch-size", type=click.IntRange(min=1), help="Of those rows. Default: 8 for fisher, 32 for regmean.")
@click.option(
    "--per-example", is_flag=True, help="Of fisher: square the gradient of each row, not of a batch (the reference)."
)
@click.option(
    "--normalize/--no-normalize", default=True, show_default=True, help="Of fisher: weigh models by 1/norm of F."
)
@click.option("--minimal", type=float, default=1e-6, show_default=True, help="Of fisher: added to the information.")
@click.option(
    "--off-diagonal", type=float, default=0.6, show_default=True, help="Of regmean: factor off the Gram diagonal."
)
@click.option(
    "--mask-pads", is_flag=True, help="Of regmean: leave padding out; the reference pads to 512 and counts it."
)
@click.option("--exclude", multiple=True, metavar="REGEX", help="Tensors whose name begins so keep the base's values.")
@click.option("--max-length", type=int, default=512, show_default=True, help="Tokens of a row.")
@click.option("--tokens-per-batch", type=click.IntRange(min=1), default=4096, show_default=True, help="Of scoring.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu or cuda: of measuring and scoring.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of drawn rows and of dare.")
@json_option
def merge(
    method: str,
    pool: Path,
    out: Path,
    scaling: float | None,
    sweep: tuple[float, ...],
    select_on: str,
    task_root: Path | None,
    limit: int | None,
    score: bool,
    classifiers: bool,
    threshold: float,
    elect: str,
    density: float,
    examples: int | None,
    batch_size: int | None,
    per_example: bool,
    normalize: bool,
    minimal: float,
    off_diagonal: float,
    mask_pads: bool,
    exclude: tuple[str, ...],
    max_length: int,
    tokens_per_batch: int,
    device: str,
    seed: int,
    as_json: bool,
) -> None:
    """Merge models of one architecture: classifiers keep a head per task, language models are merged whole.

    Example: kd merge --method task-arithmetic --pool pool.yaml --sweep 0:1:0.1 --select-on dev-half --out runs/merged
    """
    quiet_libraries()
    from kd.evaluation.merged.glue_scores import load_heads
    from kd.evaluation.merged.sweep import run_merge
    from kd.models.loading import resolve_device
    from kd.student_trainer.merging.merge_methods import MERGE_METHODS
    from kd.student_trainer.merging.merger import MergeSettings
    from kd.student_trainer.merging.pool import read_pool
    from kd.student_trainer.merging.training_rows import RowSampler, is_classifier_pool

    settings = MergeSettings(
        method, scaling, threshold, elect, density, normalize, minimal, off_diagonal, mask_pads, exclude, seed
    )
    found = read_pool(pool)
    heads: list[Any] = []
    named = is_classifier_pool(found)
    if named and score:
        heads = load_heads(found, task_root=task_root, limit=limit, max_length=max_length, device=device)
    fisher = MERGE_METHODS[method].statistics == "fisher"
    measure = RowSampler(
        classifiers=named,
        examples=examples or (512 if fisher else 256),
        max_length=max_length,
        task_root=task_root,
        batch_size=1 if fisher and per_example else batch_size or (8 if fisher else 32),
        device=device,
        seed=seed,
        pad_to=None if fisher or mask_pads else max_length,
    )
    steps = run_merge(
        found,
        settings,
        out,
        sweep=sweep,
        select_on=select_on,
        heads=heads,
        measure=measure,
        tokens_per_batch=tokens_per_batch,
        device=resolve_device(device),
        classifiers=classifiers,
    )
    result = follow(f"merging ({method})", steps, lambda s: (s.done, s.total, s.note)).result
    assert result is not None
    if as_json:
        emit_json(result.to_dict())
    else:
        kind = "scored, no weights" if result.parameters is None else f"merged {result.parameters:,} parameters"
        click.echo(f"{out}: {method} of {', '.join(result.models)}; {kind}")
        if result.table is not None:
            click.echo(f"\n{result.table.markdown()}")
        if result.even is not None and result.odd is not None:
            click.echo(f"\nscaling {result.scaling:g}, chosen on the even rows:\n\n{result.even.markdown()}")
            click.echo(f"\nand scored on the odd ones:\n\n{result.odd.markdown()}")
    if result.warning:
        click.echo(f"warning: {result.warning}", err=True)
