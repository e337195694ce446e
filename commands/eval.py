"""kd eval and kd report: scores, and runs side by side."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from kd.commands.console import emit, emit_json, follow, quiet_libraries
from kd.commands.options import PATH, corpus_options, json_option, unescaped
from kd.common.extras import require

if TYPE_CHECKING:
    from kd.evaluation.results import EvalReport


def run_evaluation(model: str, tasks: list[str], **options: Any) -> EvalReport:
    """Drive an evaluation and its progress bar to the end."""
    from kd.evaluation.evaluator import run_tasks

    last = follow(f"evaluating {model}", run_tasks(model, tasks, **options), lambda p: (p.done, p.total, p.task))
    assert last.report is not None
    return last.report


@click.command("eval")
@click.argument("models", nargs=-1, required=True)
@click.option(
    "--tasks",
    default="perplexity",
    show_default=True,
    help="Comma-separated: perplexity, agreement, choices, generation, hellaswag, samples.",
)
@click.option(
    "--data",
    "spec",
    help="Data spec for perplexity, choices (examples with choices), generation (prompt and target) and --teacher.",
)
@click.option(
    "--cache", metavar="PATH_OR_URL", help="Cache for agreement: KL and JSD to its teacher, top-1, calibration."
)
@click.option(
    "--teacher", help="Model for agreement on --data, instead of a cache: hub id, folder, demo, or random:NAME."
)
@click.option(
    "--prompts", type=PATH, help="Of samples: .txt, a prompt a line to be continued, or .jsonl, prompts to be answered."
)
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
    "--sample-temperature",
    type=float,
    default=0.0,
    show_default=True,
    help="Sample generated answers at this temperature, with --seed; 0 = greedy.",
)
@click.option(
    "--metrics",
    help="Further metrics of generation, comma-separated: rouge1, rougeL, rougeLsum, squad_em, squad_f1, "
    "coverage, bleu, bertscore. By default those that the tasks' files name.",
)
@click.option("--rouge-stemmer", is_flag=True, help="Stem the words that ROUGE compares (Porter).")
@click.option("--bertscore-model", help="Encoder of BERTScore, a folder or hub id; without one it is not computed.")
@click.option("--bertscore-layer", type=int, help="Whose states are compared; bert-score's choice by default.")
@click.option(
    "--encoding",
    default="apart",
    show_default=True,
    help="Of choices: prompt and option tokenised apart (as in training) or together (as lm-eval).",
)
@click.option(
    "--protocol", default="nanogpt", show_default=True, help="Of hellaswag: nanogpt (0.2955) or harness (lm-eval)."
)
@click.option("--temperature", type=float, default=1.0, show_default=True, help="Of the agreement's KL and JSD.")
@click.option("--dtype", default="auto", show_default=True, help="auto, float32, bfloat16 or float16.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu or cuda.")
@click.option("--load-in-4bit", is_flag=True, help="Load the models in nf4 with double quantisation (bitsandbytes).")
@click.option("--revision", help="Branch, tag or commit of a hub model.")
@click.option("--tokenizer", help="Tokenizer of a random model.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of random weights and of sampling.")
@click.option(
    "--allow-contaminated", is_flag=True, help="Score a model on what it was trained on; the result is marked."
)
@click.option(
    "--out", type=PATH, help="Folder for eval.json (a sub-folder per model, numbered, when there are several)."
)
@json_option
def evaluate(
    models: tuple[str, ...],
    tasks: str,
    spec: str | None,
    cache: str | None,
    out: Path | None,
    as_json: bool,
    separator: str,
    stop: str | None,
    metrics: str | None,
    rouge_stemmer: bool,
    bertscore_model: str | None,
    bertscore_layer: int | None,
    **options: Any,
) -> None:
    """Score one or more models.

    Example: kd eval demo --tasks perplexity --data demo --split heldout
    """
    quiet_libraries()
    require("eval", "kd eval")
    from kd.evaluation.answers.answer_metrics import MetricSettings
    from kd.evaluation.report.comparison import with_error
    from kd.evaluation.results import folders_of, refuse_other_scores

    options |= {"separator": unescaped(separator), "stop": stop and unescaped(stop)}
    options["metrics"] = None if metrics is None else [m.strip() for m in metrics.split(",") if m.strip()]
    options["metric_settings"] = MetricSettings(rouge_stemmer, bertscore_model, bertscore_layer, options["device"])
    names = [t.strip() for t in tasks.split(",")]
    if out is not None:
        refuse_other_scores(out, models, names)
    reports: list[EvalReport] = []
    for number, model in enumerate(models):
        report = run_evaluation(model, names, data=spec, cache=cache, **options)
        if out is not None:
            report.save(folders_of(out, models)[number])
        reports.append(report)
    if as_json:
        emit_json([r.to_dict() for r in reports])
        return
    for report in reports:
        click.echo(f"{report.model} ({report.parameters:,} parameters)")
        width = max(22, *(len(name) + 2 for found in report.tasks.values() for name in found))
        for task, found in report.tasks.items():
            for name, metric in without_repeats(found).items():
                click.echo(
                    f"  {task:<12}{name:<{width}}{with_error(metric)} {metric['unit']}, {metric['n']:,} {metric['over']}s"
                )
            click.echo(f"  {task:<12}{conditions(report, task)}")


def without_repeats(metrics: dict[str, Any]) -> dict[str, Any]:
    """Metrics without the part and the mean of tasks of those that are measured on one task alone."""
    parts = Counter(name.partition("/")[0] for name in metrics if "/" in name)
    return {
        name: figure
        for name, figure in metrics.items()
        if parts[name.partition("/")[0].removesuffix("_mean_of_tasks")] != 1
        or not ("/" in name or name.endswith("_mean_of_tasks"))
    }


def conditions(report: EvalReport, task: str) -> str:
    """Under which settings a task was measured, without digests: what belongs beside its scores."""
    used = report.settings[task]
    return ", ".join(
        f"{key.replace('_', ' ')} {json.dumps(value) if isinstance(value, str) else value}"
        for key, value in used.items()
        if value is not None and not key.endswith(("_digest", "_fingerprint"))
    )


@click.command()
@click.argument("runs", nargs=-1, required=True, type=PATH)
@click.option("--out", required=True, type=PATH, help="Folder of the report.")
@click.option("--baseline", help="Student that the others are compared with; those trained with ce by default.")
@json_option
def report(runs: tuple[Path, ...], out: Path, baseline: str | None, as_json: bool) -> None:
    """Compare runs and evaluations: tables, gains, loss curves and bars as PNG, Markdown, CSV, JSON and one HTML page.

    Students that differ in the seed alone are one line, a fine-tuned and a distilled one of the same start and cache a pair.

    Example: kd report demo-out/distilled demo-out/finetuned --out runs/report
    """
    require("eval", "kd report")
    from kd.evaluation.report.writing import write_report

    files = write_report(list(runs), out, baseline=baseline)
    if not as_json:
        click.echo(files.markdown.read_text(encoding="utf-8"))
    emit({name: str(path) for name, path in asdict(files).items() if path is not None}, as_json)
