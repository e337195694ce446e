"""kd eval and kd report: scores, and runs side by side."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from kd.commands.console import emit, emit_json, follow, quiet_libraries
from kd.commands.options import PATH, corpus_options, json_option, unescaped

if TYPE_CHECKING:
    from kd.evaluation.results import EvalReport


def run_evaluation(model: str, tasks: list[str], **options: Any) -> EvalReport:
    """Drive an evaluation and its progress bar to the end."""
    from kd.evaluation.tasks import run_tasks

    last = follow(f"evaluating {model}", run_tasks(model, tasks, **options), lambda p: (p.done, p.total, p.task))
    assert last.report is not None
    return last.report


@click.command("eval")
@click.argument("models", nargs=-1, required=True)
@click.option(
    "--tasks",
    default="perplexity",
    show_default=True,
    help="Comma-separated: perplexity, agreement, choices, generation, hellaswag.",
)
@click.option(
    "--data",
    "spec",
    help="Data spec for perplexity, choices (examples with choices) and generation (prompt and target).",
)
@click.option("--cache", metavar="PATH_OR_URL", help="Cache for agreement: KL to the teacher and top-1.")
@corpus_options
@click.option("--seq-len", type=int, help="Window in tokens; the model's positions, at most 1024, by default.")
@click.option("--stride", type=int, help="New tokens scored per window; seq-len - 1 by default.")
@click.option("--bos/--no-bos", default=True, show_default=True, help="Open documents and prompts with BOS.")
@click.option("--separator", default="\\n", show_default=True, help="Text between prompt and target of a pair.")
@click.option(
    "--max-new-tokens",
    type=click.IntRange(min=1),
    help="Of a generated answer, EOS included; by default as the longest reference needs.",
)
@click.option("--stop", help="Cut a generated answer at this text too, e.g. \\n, where no reference holds it.")
@click.option(
    "--encoding",
    default="apart",
    show_default=True,
    help="Of choices: prompt and option tokenised apart (as in training) or together (as lm-eval).",
)
@click.option(
    "--protocol", default="nanogpt", show_default=True, help="Of hellaswag: nanogpt (0.2955) or harness (lm-eval)."
)
@click.option("--temperature", type=float, default=1.0, show_default=True, help="Of the agreement's KL.")
@click.option("--dtype", default="auto", show_default=True, help="auto, float32, bfloat16 or float16.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu or cuda.")
@click.option("--load-in-4bit", is_flag=True, help="Load the models in nf4 with double quantisation (bitsandbytes).")
@click.option("--revision", help="Branch, tag or commit of a hub model.")
@click.option("--tokenizer", help="Tokenizer of a random model.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of random weights.")
@click.option(
    "--out", type=PATH, help="Folder for eval.json (a sub-folder per model, numbered, when there are several)."
)
@json_option
def evaluate(models: tuple[str, ...], tasks: str, spec: str | None, cache: str | None, out: Path | None, as_json: bool,
             separator: str, stop: str | None, **options: Any) -> None:  # fmt: skip
    """Score one or more models.

    Example: kd eval demo --tasks perplexity --data demo --split heldout
    """
    quiet_libraries()
    from kd.evaluation.comparison import with_error

    options |= {"separator": unescaped(separator), "stop": stop and unescaped(stop)}
    reports: list[EvalReport] = []
    for model in models:
        report = run_evaluation(model, [t.strip() for t in tasks.split(",")], data=spec, cache=cache, **options)
        if out is not None:
            report.save(out if len(models) == 1 else out / f"{len(reports)}-{Path(model).name.replace(':', '-')}")
        reports.append(report)
    if as_json:
        emit_json([r.to_dict() for r in reports])
        return
    for report in reports:
        click.echo(f"{report.model} ({report.parameters:,} parameters)")
        width = max(22, *(len(name) + 2 for metrics in report.tasks.values() for name in metrics))
        for task, metrics in report.tasks.items():
            for name, metric in metrics.items():
                click.echo(
                    f"  {task:<12}{name:<{width}}{with_error(metric)} {metric['unit']}, {metric['n']:,} {metric['over']}s"
                )


@click.command()
@click.argument("runs", nargs=-1, required=True, type=PATH)
@click.option("--out", required=True, type=PATH, help="Folder of the report.")
@json_option
def report(runs: tuple[Path, ...], out: Path, as_json: bool) -> None:
    """Compare runs and evaluations: table, loss curves and bars as PNG, Markdown, CSV, JSON and one HTML page.

    Example: kd report demo-out/distilled demo-out/finetuned --out runs/report
    """
    from kd.evaluation.report import write_report

    files = write_report(list(runs), out)
    if not as_json:
        click.echo(files.markdown.read_text(encoding="utf-8"))
    emit({name: str(path) for name, path in asdict(files).items() if path is not None}, as_json)
