"""kd eval and kd report: scores, and runs side by side."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from kd.commands.terminal.console import emit, emit_json, outcome, quiet_libraries, say, say_bold, terminal_width
from kd.commands.terminal.options import PATH, json_option
from kd.commands.terminal.report_text import report_lines_for
from kd.commands.terminal.settings_options import SettingsCommand, settings_options
from kd.common.disk.disk_errors import WriteError
from kd.common.errors import DataError
from kd.common.extras import require
from kd.common.settings import make, setting
from kd.evaluation.eval_settings import EvalSettings
from kd.evaluation.report.systems.report_settings import ReportSettings

if TYPE_CHECKING:
    from kd.evaluation.report.writing import ReportFiles
    from kd.evaluation.results import EvalReport


def run_evaluation(model: str, tasks: Sequence[str], **settings: Any) -> EvalReport:
    """Drive an evaluation and its progress bar to the end.

    settings   settings of `EvalSettings` by name; None means the default
    """
    given = {name: value for name, value in settings.items() if value is not None}
    return evaluation_report(model, make(EvalSettings, given | {"tasks": tuple(tasks)}))


def evaluation_report(model: str, settings: EvalSettings) -> EvalReport:
    """Drive an evaluation and its progress bar to the end."""
    from kd.evaluation.evaluator import evaluate_model

    return outcome(f"evaluating {model}", evaluate_model(model, settings))


@dataclass(frozen=True)
class EvalCommand:
    """All settings of `kd eval`: those of the evaluation, and where it is saved."""

    evaluation: EvalSettings = field(default_factory=EvalSettings)
    out: Path | None = setting(None, folder=True)
    """Folder for eval.json (a sub-folder per model, numbered, when there are several)."""


@click.command("eval", cls=SettingsCommand)
@click.argument("models", nargs=-1, required=True)
@settings_options(EvalCommand)
@json_option
def eval_command(models: tuple[str, ...], settings: EvalCommand, as_json: bool) -> None:
    """Score one or more models.

    Example: kd eval demo --tasks perplexity --data demo --split heldout
    """
    score_and_show(models, settings.evaluation, settings.out, as_json=as_json)


def score_and_show(models: Sequence[str], settings: EvalSettings, out: Path | None, *, as_json: bool = False) -> None:
    """Score models, save their reports under `out` and print them: all of `kd eval` after its options are read."""
    quiet_libraries()
    require("eval", "kd eval")
    from kd.evaluation.results import folders_of, refuse_other_scores

    if settings.agreement.html is not None and len(models) > 1:
        raise DataError(
            "the page shows one model", found=f"--html with {len(models)} models", try_="one model at a time"
        )
    if out is not None:
        refuse_other_scores(out, models, settings.tasks)
    reports: list[EvalReport] = []
    failed: WriteError | None = None
    for number, model in enumerate(models):
        report = evaluation_report(model, settings)
        try:
            if out is not None:
                report.save(folders_of(out, models)[number])
        except WriteError as error:  # the scores are shown, so that they are not lost
            failed = error
        reports.append(report)
    if as_json:
        emit_json([r.to_dict() for r in reports])
    else:
        for report in reports:
            say("\n".join(report_lines(report)))
    if failed is not None:
        raise failed


def report_lines(report: EvalReport) -> list[str]:
    """A report as text: a line for the model, for each figure, and for the settings of each task."""
    from kd.evaluation.report.comparison import with_error

    lines = [f"{report.model} ({report.parameters:,} parameters)"]
    width = max(22, *(len(name) + 2 for metrics in report.tasks.values() for name in metrics))
    column = max(12, *(len(task) + 2 for task in report.tasks))
    for task, metrics in report.tasks.items():
        for name, figure in without_repeats(metrics).items():
            score = f"{with_error(figure)} {figure['unit']}, {figure['n']:,} {figure['over']}s"
            lines.append(f"  {task:<{column}}{name:<{width}}{score}")
        lines.append(f"  {task:<{column}}{conditions(report, task)}")
    return lines


def without_repeats(metrics: dict[str, Any]) -> dict[str, Any]:
    """Metrics without the parts and means of tasks that repeat them, because one task alone was measured."""
    parts = Counter(name.partition("/")[0] for name in metrics if "/" in name)
    return {
        name: figure
        for name, figure in metrics.items()
        if parts[name.partition("/")[0].removesuffix("_mean_of_tasks")] != 1
        or not ("/" in name or name.endswith("_mean_of_tasks"))
    }


def conditions(report: EvalReport, task: str) -> str:
    """The settings under which a task was measured, without digests: what belongs beside its scores."""
    used = report.settings[task]
    return ", ".join(
        f"{key.replace('_', ' ')} {json.dumps(value) if isinstance(value, str) else value}"
        for key, value in used.items()
        if value is not None and not key.endswith(("_digest", "_fingerprint"))
    )


@click.command(cls=SettingsCommand)
@click.argument("runs", nargs=-1, required=True, type=PATH)
@settings_options(ReportSettings)
@json_option
def report(runs: tuple[Path, ...], settings: ReportSettings, as_json: bool) -> None:
    """Compare runs and evaluations: tables, gains, loss curves and bars as PNG, Markdown, CSV, JSON and one HTML page.

    Students that differ in the seed alone are one line, a fine-tuned and a distilled one of the same start and cache a pair.
    Folders of kd merge and kd classify matrix become the table of merged models. A folder of such folders stands for all of
    them.

    Example: kd report demo-out/distilled demo-out/finetuned --out runs/report
    """
    report_and_show(runs, settings, as_json=as_json)


def report_and_show(runs: Sequence[Path], settings: ReportSettings, *, as_json: bool = False) -> None:
    """Write the report and print it: all of `kd report` after its options are read."""
    require("eval", "kd report")
    from kd.evaluation.report.writing import write_report

    files = write_report(
        list(runs), settings.out, baseline=settings.baseline, table=settings.table, published=settings.published
    )
    if not as_json:
        say_report(files)
    emit(files.paths(), as_json)


def say_report(files: ReportFiles) -> None:
    """Print a report: as Markdown, and on a terminal with tables that are laid out for its width."""
    width = terminal_width()
    if width is None:
        say(files.markdown.read_text(encoding="utf-8"))
    else:
        say_bold(report_lines_for(files.content, width))
