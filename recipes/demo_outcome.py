"""The outcome of `kd demo`: what its two experiments measured, as a report, as a document, and for a terminal.

The experiments are `recipes/experiments/demo-prose.yaml` and `demo-instructions.yaml`, alike in form. A teacher runs once over
a text. Two students start from the same weights and see the same text in the same order for the same number of steps; one
learns from the text only, the other from the teacher's cached predictions too. The first is on English prose, with a student
that has the teacher's tokenizer, and KL. The second is on instructions, with an encoder-decoder teacher (in 4 bits where
bitsandbytes is installed), a student with another tokenizer, and ULD. All models are scored on text that none of them was
trained on.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kd.common.errors import DataError
from kd.common.files import canonical_json, write_atomic
from kd.evaluation.report.comparison import Entry, compare
from kd.evaluation.report.page import Section, Table
from kd.evaluation.report.writing import write_report
from kd.evaluation.results import load_report
from kd.recipes.experiment_file import Experiment, load_experiment
from kd.recipes.steps import Step
from kd.student_trainer.run_folder import read_run

if TYPE_CHECKING:
    from kd.evaluation.results import EvalReport

NAMES = ("demo-prose", "demo-instructions")
"""The demo's experiments."""


@dataclass(frozen=True)
class DemoPart:
    """One experiment of the demo, in the demo's folder."""

    experiment: Experiment
    out: Path

    @property
    def title(self) -> str:
        """The experiment's line `about`."""
        return self.experiment.about

    @property
    def cache(self) -> Path:
        """Folder of the cache."""
        return self.out / self.experiment.folders.cache

    @property
    def teacher(self) -> str:
        """Name of the teacher in the outcome, and of its folder."""
        return self.experiment.folders.teacher

    @property
    def steps(self) -> list[Step]:
        """The commands to run."""
        variables = {"four-bit": "true"} if "four-bit" in self.experiment.variables and has_bitsandbytes() else {}
        return self.experiment.recipe.fill(self.out, variables)

    @property
    def trainings(self) -> dict[str, dict[str, Any]]:
        """Student -> the result in its `run.json`, once the steps have run."""
        return {run: read_run(self.out / run)["result"] for run in self.experiment.runs}

    @property
    def reports(self) -> dict[str, EvalReport]:
        """Name -> scores of the teacher and the students, once the steps have run."""
        return {name: load_report(self.out / name) for name in (self.teacher, *self.experiment.runs)}


def has_bitsandbytes() -> bool:
    """Whether the teacher of the second experiment can be loaded in 4 bits."""
    return find_spec("bitsandbytes") is not None


def demo_parts(out: Path) -> list[DemoPart]:
    """The demo's experiments, in the folder `out`."""
    return [DemoPart(load_experiment(name), out) for name in NAMES]


def require_fresh(out: Path, parts: list[DemoPart]) -> None:
    """Make the folder. Raises DataError where it holds a student of an earlier demo."""
    students = [run for part in parts for run in part.experiment.runs if (out / run).exists()]
    if students:
        raise DataError(
            "the demo was run here before",
            where=out,
            found=", ".join(students),
            try_="another --out, or remove the folder",
        )
    out.mkdir(parents=True, exist_ok=True)


@dataclass(frozen=True)
class PartResult:
    """The measurements of one experiment of the demo."""

    title: str
    cache: Mapping[str, Any]
    """The result of `kd cache info`."""
    build_speed: float
    """Teacher rows per second."""
    trainings: Mapping[str, Mapping[str, Any]]
    """Student -> the result in its `run.json`: the fine-tuned student, then the distilled one."""
    reports: Mapping[str, EvalReport]
    """Model -> its scores: the teacher, then the students."""

    @property
    def names(self) -> tuple[str, str]:
        """Names of the fine-tuned and the distilled student."""
        first, second = self.trainings
        return first, second

    def difference(self, task: str, metric: str) -> tuple[float, float | None]:
        """Distilled minus fine-tuned, and the standard error of the difference (paired over documents)."""
        entries = [Entry(name, report) for name, report in self.reports.items()]
        comparison = next(c for c in compare(entries) if c.task == task)
        left, right = (list(self.reports).index(name) for name in self.names)
        values = [float(self.reports[name].tasks[task][metric]["value"]) for name in self.names]
        return values[1] - values[0], comparison.difference_error(left, right, metric)

    def facts(self) -> Table:
        """Sizes and speeds."""
        finetuned, distilled = (self.trainings[name]["tokens_per_second"] for name in self.names)
        shown = [
            ["cached tokens", f"{self.cache['rows']:,}"],
            ["cache size", f"{self.cache['bytes'] / 1e6:.1f} MB"],
            ["bytes per token, everything counted", f"{self.cache['bytes_per_token']:.1f}"],
            [f"teacher's mass in the top {self.cache['top_k']}", f"{self.cache['mass_kept_mean']:.4f}"],
            ["KL(teacher || decoded)", f"{self.cache['head_kl_mean']:.1e} nats"],
            ["teacher's weights", str(self.cache["dtype"]) if self.cache["quantization"] == "none" else "4 bits (nf4)"],
            ["teacher pass", f"{self.build_speed:,.0f} tokens/s"],
            ["training without teacher", f"{finetuned:,.0f} tokens/s"],
            ["training from the cache", f"{distilled:,.0f} tokens/s"],
        ]
        share = self.trainings[self.names[1]]["aligned_share"]
        if share is not None:
            shown.insert(5, ["target text aligned between the tokenizers", f"{share:.1%}"])
        return Table(["", "measured"], shown)

    def document(self) -> dict[str, Any]:
        """The measurements as JSON, for programs."""
        facts = (
            "fingerprint",
            "rows",
            "bytes",
            "bytes_per_token",
            "top_k",
            "mass_kept_mean",
            "head_kl_mean",
            "quantization",
        )
        return {
            "cache": {k: self.cache[k] for k in facts},
            "build_tokens_per_second": self.build_speed,
            "train_tokens_per_second": {n: t["tokens_per_second"] for n, t in self.trainings.items()},
            "steps": {n: t["steps"] for n, t in self.trainings.items()},
            "parameters": {n: r.parameters for n, r in self.reports.items()},
            "scores": {
                n: {
                    t: {m: {"value": f["value"], "stderr": f["stderr"]} for m, f in metrics.items()}
                    for t, metrics in r.tasks.items()
                }
                for n, r in self.reports.items()
            },
        }


def card_scores(report: EvalReport) -> list[tuple[str, str]]:
    """A student's scores as lines (what, value) of its model card."""
    metric_of = {
        "perplexity": "perplexity",
        "choices": "accuracy_mean_of_tasks",
        "generation": "exact_match_mean_of_tasks",
    }
    figures = [(task, metrics[metric_of[task]]) for task, metrics in report.tasks.items()]
    return [(f"{task}, held out: {figure['title']}", f"{figure['value']:.4g}") for task, figure in figures]


def write_demo_outcome(out: Path, results: list[PartResult], *, seconds: float) -> dict[str, Any]:
    """Write `report/` and `outcome.json`; returns the document in `outcome.json`, all figures of the run.

    seconds   duration of the demo
    """
    prose, instructions = results
    gap, gap_error = prose.difference("perplexity", "perplexity")
    change, change_error = instructions.difference("generation", "exact_match_mean_of_tasks")
    outcome: dict[str, Any] = {
        "perplexity": {n: r.tasks["perplexity"]["perplexity"]["value"] for n, r in prose.reports.items()},
        "gain": -gap,
        "gain_stderr": gap_error,
        "exact_match": {
            n: r.tasks["generation"]["exact_match_mean_of_tasks"]["value"] for n, r in instructions.reports.items()
        },
        "exact_match_gain": change,
        "exact_match_gain_stderr": change_error,
        "acts": {r.title: r.document() for r in results},
        "seconds": seconds,
        "report": str(out / "report" / "report.html"),
    }
    lead = [
        Section(
            r.title,
            text="One pass of the teacher made the cache; both students started from the same weights and saw the same "
            "text in the same order for the same number of steps.",
            table=r.facts(),
        )
        for r in results
    ]
    folders = [out / name for r in results for name in r.reports]
    write_report(folders, out / "report", title="kd demo", lead=lead)
    write_atomic(out / "outcome.json", canonical_json(outcome))
    return outcome


def outcome_lines(results: list[PartResult], outcome: Mapping[str, Any]) -> list[str]:
    """The outcome as lines for a terminal."""
    prose, instructions = results
    lines = [prose.title, f"  {'':<14}{'parameters':>12}{'held-out perplexity':>24}{'bits per byte':>16}"]
    for name, report in prose.reports.items():
        scores = report.tasks["perplexity"]
        figure = f"{scores['perplexity']['value']:.2f} ± {scores['perplexity']['stderr']:.2f}"
        lines.append(f"  {name:<14}{report.parameters:>12,}{figure:>24}{scores['bits_per_byte']['value']:>16.3f}")
    better = "lower" if outcome["gain"] > 0 else "HIGHER"
    lines += [
        f"  distilled is {abs(outcome['gain']):.2f} ± {outcome['gain_stderr']:.2f} {better} than fine-tuned "
        "(error: paired over documents)",
        "",
        *_fact_lines(prose),
        "",
        instructions.title,
    ]
    lines += _exact_match_lines(instructions)
    change, error = outcome["exact_match_gain"], outcome["exact_match_gain_stderr"]
    word = "higher" if change > 0 else "LOWER"
    lines += [
        f"  distilled is {abs(change):.3f} ± {error:.3f} {word} than fine-tuned (error: paired over examples)",
        "",
        *_fact_lines(instructions),
        "",
        f"report: {outcome['report']}   ({outcome['seconds']:.0f} s in all)",
    ]
    return lines


def _exact_match_lines(result: PartResult) -> list[str]:
    names = list(result.reports)
    lines = [f"  {'held-out exact match':<24}" + "".join(f"{name:>16}" for name in names)]
    first = result.reports[names[0]].tasks["generation"]
    rows = [m for m in first if m.startswith("exact_match/")] + ["exact_match_mean_of_tasks"]
    for metric in rows:
        label = metric.partition("/")[2] or "mean of tasks"
        values = [result.reports[n].tasks["generation"][metric]["value"] for n in names]
        lines.append(f"  {label:<24}" + "".join(f"{value:>16.3f}" for value in values))
    return lines


def _fact_lines(result: PartResult) -> list[str]:
    return [f"  {row[0]:<44}{row[1]}" for row in result.facts().rows]
