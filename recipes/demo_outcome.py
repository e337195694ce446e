"""The demo's settings and its outcome: what `kd demo` builds, trains, compares and draws.

Two acts, alike in form: a teacher runs once over a text, and two students start from the same weights and see the same
text in the same order for the same number of steps; one learns from the text alone, one from the teacher's cached
predictions too. Act one: English prose, a student with the teacher's tokenizer, KL. Act two: instructions, an
encoder-decoder teacher (in 4 bits where bitsandbytes is installed), a student with another tokenizer, ULD.
Both are scored on what neither students nor teachers were trained on. Every number in the outcome is measured in
that run. The composition itself (build, train, evaluate) is `commands/demo.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kd.common.errors import DataError
from kd.common.files import canonical_json, write_atomic
from kd.common.settings import make
from kd.evaluation.report.comparison import Entry, compare
from kd.evaluation.report.page import Section, Table
from kd.evaluation.report.writing import write_report
from kd.models.tokenizer import EMBEDDED

if TYPE_CHECKING:
    from kd.cache_builder.build.build_settings import BuildSettings
    from kd.evaluation.results import EvalReport
    from kd.student_trainer.config import TrainConfig
    from kd.student_trainer.training import TrainResult

SEQ_LEN = 128


@dataclass(frozen=True)
class Act:
    """One teacher, its cache, and students that differ in the loss alone."""

    title: str
    teacher: str
    cache: str
    """Folder under the demo's."""
    build: Mapping[str, Any]
    """Options of `kd cache build` that are not its defaults."""
    losses: Mapping[str, Mapping[str, Any]]
    """Run -> what only it is told; the first is plain fine-tuning."""
    training: Mapping[str, Any]
    """What all runs are told."""
    tasks: tuple[str, ...]
    evaluation: Mapping[str, Any]
    """Options of `kd eval`."""
    prefix: str = ""
    """Of the names of its models in the report."""
    load_in_4bit: bool = field(default=False)
    """Of the teacher, in the build and when it is scored."""

    @property
    def teacher_name(self) -> str:
        """The teacher's name in the report."""
        return f"{self.prefix}teacher"

    def build_settings(self, out: Path) -> BuildSettings:
        """Settings of its build, as `kd cache build` has them."""
        from kd.cache_builder.build.build_settings import BuildSettings

        values = {
            "teacher": self.teacher,
            "spec": "demo",
            "split": "train",
            "out": out / self.cache,
            "load_in_4bit": self.load_in_4bit,
            "device": "cpu",
            "reuse": False,  # the demo measures the teacher pass
            **self.build,
        }
        return make(BuildSettings, values)

    def train_configs(self, out: Path, seed: int = 0) -> list[TrainConfig]:
        """One run per entry of `losses`."""
        from kd.student_trainer.config import TrainConfig

        common = {
            "cache": str(out / self.cache),
            "seed": seed,
            "device": "cpu",
            "schedule": "cosine",
            "warmup": 0.05,
            "weight_decay": 0.1,
            **self.training,
        }
        return [make(TrainConfig, {**common, **own, "out": str(out / name)}) for name, own in self.losses.items()]

    def models(self, out: Path) -> dict[str, str]:
        """Name in the report -> model to evaluate."""
        return {self.teacher_name: self.teacher} | {name: str(out / name) for name in self.losses}


def acts() -> list[Act]:
    """The demo's two acts."""
    prose = Act(
        "Prose, the teacher's tokenizer: KL",
        teacher="demo",
        cache="cache",
        build={"limit": 160, "seq_len": SEQ_LEN},  # about 300,000 tokens
        losses={"finetuned": {"loss": "ce"}, "distilled": {"loss": "kl"}},
        training={"student": "demo", "max_steps": 600, "tokens_per_batch": 2048, "lr": 2e-3},
        tasks=("perplexity",),
        evaluation={"data": "demo", "split": "heldout", "seq_len": SEQ_LEN, "device": "cpu"},
    )
    instructions = Act(
        "Instructions, an encoder-decoder teacher, another tokenizer: ULD",
        teacher="demo-t5",
        cache="t5-cache",
        build={"spec": "mini", "profile": "uld"},
        losses={"t5-finetuned": {"loss": "ce"}, "t5-distilled": {"loss": "uld", "alpha": 0.2}},
        training={"student": str(EMBEDDED["demo"]), "max_steps": 300, "tokens_per_batch": 2048, "lr": 1e-3},
        tasks=("choices", "generation"),
        evaluation={"data": "mini", "split": "heldout", "device": "cpu"},
        prefix="t5-",
        load_in_4bit=find_spec("bitsandbytes") is not None,
    )
    return [prose, instructions]


def require_fresh(out: Path) -> None:
    """Make the folder; raise DataError when a finished or half-finished demo lies there."""
    taken = [name for act in acts() for name in act.losses if (out / name).exists()]
    if taken:
        raise DataError(
            "the demo was run here before",
            where=out,
            found=", ".join(taken),
            try_="another --out, or remove the folder",
        )
    out.mkdir(parents=True, exist_ok=True)


@dataclass(frozen=True)
class ActResult:
    """What one act measured."""

    act: Act
    cache: Mapping[str, Any]
    """`kd cache info`"""
    build_speed: float
    """teacher rows per second"""
    results: Mapping[str, TrainResult]
    reports: Mapping[str, EvalReport]
    """Of teacher and students."""

    @property
    def names(self) -> tuple[str, str]:
        """The fine-tuned run and the distilled one."""
        first, second = self.act.losses
        return first, second

    def difference(self, task: str, metric: str) -> tuple[float, float | None]:
        """Distilled minus fine-tuned, and its standard error (paired over documents)."""
        entries = [Entry(name, report) for name, report in self.reports.items()]
        comparison = next(c for c in compare(entries) if c.task == task)
        left, right = (list(self.reports).index(name) for name in self.names)
        values = [float(self.reports[name].tasks[task][metric]["value"]) for name in self.names]
        return values[1] - values[0], comparison.difference_error(left, right, metric)

    def facts(self) -> Table:
        """Sizes and speeds."""
        finetuned, distilled = (self.results[name].tokens_per_second for name in self.names)
        shown = [
            ["cached tokens", f"{self.cache['rows']:,}"],
            ["cache size", f"{self.cache['bytes'] / 1e6:.1f} MB"],
            ["bytes per token, everything counted", f"{self.cache['bytes_per_token']:.1f}"],
            [f"teacher's mass in the top {self.cache['top_k']}", f"{self.cache['mass_kept_mean']:.4f}"],
            ["KL(teacher || decoded)", f"{self.cache['head_kl_mean']:.1e} nats"],
            ["teacher's weights", "4 bits (nf4)" if self.act.load_in_4bit else str(self.cache["dtype"])],
            ["teacher pass", f"{self.build_speed:,.0f} tokens/s"],
            ["training without teacher", f"{finetuned:,.0f} tokens/s"],
            ["training from the cache", f"{distilled:,.0f} tokens/s"],
        ]
        share = self.results[self.names[1]].aligned_share
        if share is not None:
            shown.insert(5, ["target text aligned between the tokenizers", f"{share:.1%}"])
        return Table(["", "measured"], shown)

    def document(self) -> dict[str, Any]:
        """For a program."""
        kept = (
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
            "cache": {k: self.cache[k] for k in kept},
            "build_tokens_per_second": self.build_speed,
            "train_tokens_per_second": {n: r.tokens_per_second for n, r in self.results.items()},
            "steps": {n: r.steps for n, r in self.results.items()},
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
    """Lines of a student's model card."""
    wanted = {
        "perplexity": "perplexity",
        "choices": "accuracy_mean_of_tasks",
        "generation": "exact_match_mean_of_tasks",
    }
    found = [(task, metrics[wanted[task]]) for task, metrics in report.tasks.items()]
    return [(f"{task}, held out: {figure['title']}", f"{figure['value']:.4g}") for task, figure in found]


def write_outcome(out: Path, results: list[ActResult], *, seconds: float) -> dict[str, Any]:
    """Write `report/` and `outcome.json`; returns the latter's document: all figures of this run."""
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
        "acts": {r.act.title: r.document() for r in results},
        "seconds": seconds,
        "report": str(out / "report" / "report.html"),
    }
    lead = [
        Section(
            r.act.title,
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


def outcome_lines(results: list[ActResult], outcome: Mapping[str, Any]) -> list[str]:
    """The outcome for a terminal."""
    prose, instructions = results
    lines = [prose.act.title, f"  {'':<14}{'parameters':>12}{'held-out perplexity':>24}{'bits per byte':>16}"]
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
        instructions.act.title,
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


def _exact_match_lines(result: ActResult) -> list[str]:
    names = list(result.reports)
    lines = [f"  {'held-out exact match':<24}" + "".join(f"{name:>16}" for name in names)]
    first = result.reports[names[0]].tasks["generation"]
    rows = [m for m in first if m.startswith("exact_match/")] + ["exact_match_mean_of_tasks"]
    for metric in rows:
        label = metric.partition("/")[2] or "mean of tasks"
        values = [result.reports[n].tasks["generation"][metric]["value"] for n in names]
        lines.append(f"  {label:<24}" + "".join(f"{value:>16.3f}" for value in values))
    return lines


def _fact_lines(result: ActResult) -> list[str]:
    return [f"  {row[0]:<44}{row[1]}" for row in result.facts().rows]
