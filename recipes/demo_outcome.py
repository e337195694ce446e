"""The outcome of `kd demo`: what its two experiments measured, as a report, as a document, and for a terminal.

The experiments are `recipes/experiments/demo-prose.yaml` and `demo-text.yaml`, each over three seeds. A teacher runs once
over English prose. Two students begin with the same weights and see the same text in the same order for the same number of
steps; one learns from the text only, the other from the teacher's cached predictions too. In the first they have the
teacher's tokenizer (KL), in the second another one (text-kl). All models are scored on text that none of them was trained on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from kd.common.errors import DataError
from kd.common.files import canonical_json, write_atomic
from kd.evaluation.report.comparison import compare, short_name, value_with_error
from kd.evaluation.report.page import Section, Table
from kd.evaluation.report.pairs import arms_of, pairs_of
from kd.evaluation.report.reference import Reference, reference_of
from kd.evaluation.report.runs import collect_runs
from kd.evaluation.report.writing import write_report
from kd.recipes.experiment_file import Experiment, load_experiment
from kd.recipes.steps import Step
from kd.student_trainer.run_folder import read_run

if TYPE_CHECKING:
    from kd.evaluation.results import EvalReport

NAMES = ("demo-prose", "demo-text")
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
        return self.experiment.recipe.fill(self.out, {})

    @property
    def models(self) -> list[Path]:
        """Folders of the scores of the teacher and of all students."""
        return [self.out / name for name in (self.teacher, *self.experiment.runs)]

    def name_of(self, arm: str) -> str:
        """Name of an arm in the report."""
        return self.experiment.folders.student.replace("{arm}", arm).replace("-seed{seed}", "")


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

    part: DemoPart
    cache: Mapping[str, Any]
    """The result of `kd cache info`."""
    build_speed: float
    """Teacher rows per second."""

    @property
    def title(self) -> str:
        """The experiment's line `about`."""
        return self.part.title

    @property
    def names(self) -> dict[str, str]:
        """Name as it is shown -> name in the report: the teacher, then the kinds of students."""
        arms = {arm: self.part.name_of(arm) for arm in self.part.experiment.arms}
        return {"teacher": short_name(str(self.part.experiment.cache["teacher"])), **arms}

    @cached_property
    def trainings(self) -> dict[str, list[dict[str, Any]]]:
        """Kind of student -> the result in `run.json` of each seed."""
        chosen = self.part.experiment
        return {
            arm: [read_run(self.part.out / chosen.run_of(arm, seed))["result"] for seed in chosen.seeds]
            for arm in chosen.arms
        }

    def facts(self) -> Table:
        """Sizes and speeds."""
        speeds = {arm: fmean(t["tokens_per_second"] for t in runs) for arm, runs in self.trainings.items()}
        shown = [
            ["cached tokens", f"{self.cache['rows']:,}"],
            ["cache size", f"{self.cache['bytes'] / 1e6:.1f} MB"],
            ["bytes per token, everything counted", f"{self.cache['bytes_per_token']:.1f}"],
            [f"teacher's mass in the top {self.cache['top_k']}", f"{self.cache['mass_kept_mean']:.4f}"],
            ["KL(teacher || decoded)", f"{self.cache['head_kl_mean']:.1e} nats"],
            ["teacher pass", f"{self.build_speed:,.0f} tokens/s"],
            *([f"training, {arm}", f"{speed:,.0f} tokens/s"] for arm, speed in speeds.items()),
        ]
        shares = [
            t["aligned_share"] for runs in self.trainings.values() for t in runs if t["aligned_share"] is not None
        ]
        if shares:
            shown.insert(5, ["target text aligned between the tokenizers", f"{fmean(shares):.1%}"])
        return Table(["", "measured"], shown)

    def document(self, reference: Reference) -> dict[str, Any]:
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
        arms = {arm.name: arm for arm in reference.arms}
        return {
            "cache": {k: self.cache[k] for k in facts},
            "build_tokens_per_second": self.build_speed,
            "train_tokens_per_second": {n: [t["tokens_per_second"] for t in r] for n, r in self.trainings.items()},
            "steps": {n: [t["steps"] for t in r] for n, r in self.trainings.items()},
            "parameters": {shown: arms[name].parameters for shown, name in self.names.items()},
            "scores": {
                shown: {
                    c.title: f.document()
                    for c in reference.columns
                    if (f := reference.figure(arms[name], c)) is not None
                }
                for shown, name in self.names.items()
            },
            "differences": {
                p.other.name: {d.column.title: d.document() for d in reference.differences(p)}
                for p in reference.pairs
                if p.other.name in self.names.values()
            },
        }

    def lines(self, reference: Reference) -> list[str]:
        """The scores as lines for a terminal: a line per figure, with the difference between the students."""
        arms = {arm.name: arm for arm in reference.arms}
        (pair,) = (p for p in reference.pairs if p.other.name in self.names.values())
        count = len(pair.seeds)
        lines = [self.title, f"  {'held out':<28}" + "".join(f"{n:>13}" for n in self.names) + f"{'difference':>20}"]
        for difference in reference.differences(pair):
            figures = [reference.figure(arms[name], difference.column) for name in self.names.values()]
            shown = ["–" if f is None else value_with_error(f.value, f.error).partition(" ")[0] for f in figures]
            gap = value_with_error(difference.test.mean, difference.error, signed=True)
            cells = "".join(f"{cell:>13}" for cell in shown)
            lines.append(f"  {difference.column.title:<28}{cells}{gap:>20}  {difference.verdict}")
        mean = f"mean of {count} seeds" if count > 1 else "one seed"
        parameters = ", ".join(f"{shown} {arms[name].parameters:,}" for shown, name in self.names.items())
        return [*lines, f"  students: {mean}; ± is one standard error, paired. Parameters: {parameters}"]


def card_scores(report: EvalReport) -> list[tuple[str, str]]:
    """A student's scores as lines (what, value) of its model card."""
    metric_of = {
        "perplexity": "perplexity",
        "choices": "accuracy_mean_of_tasks",
        "generation": "exact_match_mean_of_tasks",
    }
    figures = [(task, metrics[metric_of[task]]) for task, metrics in report.tasks.items()]
    return [(f"{task}, held out: {figure['title']}", f"{figure['value']:.4g}") for task, figure in figures]


def reference_of_demo(results: Sequence[PartResult]) -> Reference:
    """The figures and differences of both experiments, as the report has them."""
    _, entries = collect_runs([folder for r in results for folder in r.part.models])
    arms = arms_of(entries)
    return reference_of(compare(entries), arms, pairs_of(arms, _baselines(results)))


def _baselines(results: Sequence[PartResult]) -> list[str]:
    return [r.part.name_of(r.part.experiment.baseline) for r in results]


def write_demo_outcome(
    out: Path, results: Sequence[PartResult], reference: Reference, *, seconds: float
) -> dict[str, Any]:
    """Write `report/` and `outcome.json`; returns the document in `outcome.json`, all figures of the run.

    seconds   duration of the demo
    """
    outcome: dict[str, Any] = {
        "acts": {r.title: r.document(reference) for r in results},
        "seconds": seconds,
        "report": str(out / "report" / "report.html"),
    }
    lead = [Section(r.title, table=r.facts()) for r in results]
    folders = [folder for r in results for folder in r.part.models]
    write_report(folders, out / "report", title="kd demo", lead=lead, baseline=_baselines(results))
    write_atomic(out / "outcome.json", canonical_json(outcome))
    return outcome


def outcome_lines(results: Sequence[PartResult], reference: Reference, outcome: Mapping[str, Any]) -> list[str]:
    """The outcome as lines for a terminal."""
    lines: list[str] = []
    for result in results:
        facts = [f"  {row[0]:<44}{row[1]}" for row in result.facts().rows]
        lines += [*result.lines(reference), "", *facts, ""]
    return [*lines, f"report: {outcome['report']}   ({outcome['seconds']:.0f} s in all)"]
