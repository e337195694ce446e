"""`--tasks generation`: answers compared with the references; see `kd.evaluation.measures.generation`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from kd.common.progress import Progress
from kd.common.setting_values import unescaped
from kd.common.settings import check, setting
from kd.evaluation.tasks.eval_task import (
    SAMPLES,
    Metric,
    Task,
    TaskResult,
    question_settings,
    rows_digest,
)
from kd.evaluation.tasks.shared_options import SharedOptions
from kd.evaluation.tasks.template_scores import DEV, by_template, over_templates, text_to_choose_on

if TYPE_CHECKING:
    from kd.data.corpus import Corpus
    from kd.evaluation.answers.answer_metrics import MetricSettings
    from kd.evaluation.measures.generation import GenerationResult
    from kd.models.loading import Model
    from kd.models.tokenizer import Tokenizer

EXACT_MATCH = Metric("exact match", "share of examples", "higher", "example")
F1 = Metric("token F1", "mean over examples", "higher", "example")
METRICS = {
    "exact_match": EXACT_MATCH,
    "exact_match_mean_of_tasks": replace(EXACT_MATCH, title="exact match, mean of tasks", unit="mean of shares"),
    "f1": F1,
    "f1_mean_of_tasks": replace(F1, title="token F1, mean of tasks", unit="mean of means"),
    "choice_match": Metric("right choice named", "share of examples", "higher", "example"),
    "choice_none": Metric("no choice named", "share of examples", None, "example"),
    "unfinished": Metric("unfinished", "share of examples", None, "example"),
}
"""Metrics of every text; `further_metrics` has those that a task of the text or --metrics names."""


def further_metrics() -> dict[str, Metric]:
    """The metrics of `kd.evaluation.answers.answer_metrics`, each over all examples and as a mean of tasks."""
    from kd.evaluation.answers.answer_metrics import ANSWER_METRICS

    return {
        f"{name}{suffix}": Metric(f"{metric.title}{about}", metric.unit, "higher", "example")
        for name, metric in ANSWER_METRICS.items()
        for suffix, about in (("", ""), ("_mean_of_tasks", ", mean of tasks"))
    }


@dataclass(frozen=True)
class GenerationOptions:
    """Options of generation."""

    stop: str | None = setting(None, typed=unescaped)
    """Text at which a generated answer is cut too, e.g. \\n, unless a reference holds it."""
    sample_temperature: float = 0.0
    """Temperature at which generated answers are sampled, with --seed; 0 is greedy."""
    metrics: tuple[str, ...] | None = setting(None, metavar="NAME,…")
    """Further metrics of generated answers: rouge1, rougeL, rougeLsum, squad_em, squad_f1, coverage, bleu, bertscore. By
    default those that the tasks' files name."""
    rouge_stemmer: bool = False
    """Stem the words that ROUGE compares (Porter)."""
    bertscore_model: str | None = None
    """Encoder of BERTScore, a folder or hub id. Without one, BERTScore is not computed."""
    bertscore_layer: int | None = None
    """Layer of that encoder whose states are compared, counted from 1. By default bert-score's choice."""

    def __post_init__(self) -> None:
        check(self)

    def metric_settings(self, device: str) -> MetricSettings:
        """What the metrics are computed with."""
        from kd.evaluation.answers.answer_metrics import MetricSettings

        return MetricSettings(self.rouge_stemmer, self.bertscore_model, self.bertscore_layer, device)

    def decoding(self, seed: int) -> str:
        """How tokens are chosen, in words."""
        if not self.sample_temperature:
            return "greedy"
        return f"sampled at temperature {self.sample_temperature:g}, seed {seed}"


class GenerationTask(Task[GenerationOptions, "dict[str, Corpus]"]):
    """What a model answers to the prompts of a text, greedy or sampled. It measures on the text, and on one
    to choose templates on.
    """

    @property
    def metrics(self) -> Mapping[str, Metric]:
        return METRICS | further_metrics()

    def reads_text(self, options: GenerationOptions) -> bool:
        """Always."""
        return True

    def may_be_known(self, material: dict[str, Corpus]) -> Corpus:
        """The text."""
        return material[""]

    def load(
        self, options: GenerationOptions, shared: SharedOptions, tokenizer: Tokenizer, corpus: Corpus | None
    ) -> dict[str, Corpus]:
        """The texts; metrics and temperature are checked too."""
        from kd.evaluation.answers.answer_decoding import Sampling
        from kd.evaluation.answers.answer_metrics import metrics_by_task

        assert corpus is not None, "the text was checked to be given"
        metrics_by_task(
            corpus.examples, corpus.metrics, options.metrics, options.metric_settings(shared.loading.device)
        )
        Sampling(options.sample_temperature)
        dev = text_to_choose_on(shared)
        return {"": corpus} | ({} if dev is None else {DEV: dev})

    def run(
        self,
        model: Model,
        tokenizer: Tokenizer,
        options: GenerationOptions,
        shared: SharedOptions,
        material: Mapping[str, Corpus],
    ) -> Iterator[Progress[TaskResult]]:
        from kd.evaluation.answers.answer_decoding import Sampling
        from kd.evaluation.measures.generation import evaluate_generation

        results: dict[str, GenerationResult] = {}
        done = total = 0
        for name, corpus in material.items():
            for step in evaluate_generation(
                model,
                tokenizer,
                by_template(corpus),
                reading=shared.reading,
                max_new_tokens=shared.answers.max_new_tokens,
                stop=options.stop,
                sampling=Sampling(options.sample_temperature, shared.loading.seed),
                metrics=options.metrics,
                metric_settings=options.metric_settings(shared.loading.device),
            ):
                yield Progress(done + step.done, max(total, done + step.total))
            assert step.result is not None
            results[name] = step.result
            done = total = done + step.total
        yield Progress(done, done, _task_result(options, shared, tokenizer, material[""], results))


def _task_result(
    options: GenerationOptions,
    shared: SharedOptions,
    tokenizer: Tokenizer,
    corpus: Corpus,
    results: Mapping[str, GenerationResult],
) -> TaskResult:
    """The result on the text; `results` also has the one that templates are chosen by."""
    from kd.evaluation.answers.accepted import references

    scores = results[""]
    settings = question_settings(corpus, shared, tokenizer) | {
        "references_digest": rows_digest([e.id, references(e)] for e in scores.examples),
        "max_new_tokens": shared.answers.max_new_tokens or "as the longest reference needs",
        "stop": options.stop,
        "decoding": options.decoding(shared.loading.seed),
        "prompts_cut": scores.prompts_cut,
        "turns_skipped": scores.turns_skipped or None,
        **scores.made_by,
    }
    samples = [
        {"prompt": e.prompt, "expected": references(e)[0], "got": answer}
        for e, answer in zip(scores.examples[:SAMPLES], scores.answers, strict=False)
    ]
    estimates = over_templates(scores.estimates, results[DEV].estimates if DEV in results else None)
    return TaskResult(estimates, scores.documents, settings, samples)
