"""`--tasks choices`: rank classification; see `kd.evaluation.measures.choices`.

With `--labels both`, the examples are asked in each wording of their labels, and the metrics are called `METRIC_original` and
`METRIC_flan`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from kd.common.progress import Progress
from kd.common.settings import check
from kd.data.data_settings import BOTH
from kd.data.instruction_tasks.task import WORDINGS
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
    from kd.evaluation.measures.choices import ChoicesResult
    from kd.evaluation.statistics.estimates import Estimate
    from kd.models.loading import Model
    from kd.models.tokenizer import Tokenizer

ACCURACY = Metric("accuracy", "share of examples", "higher", "example")
RANKED = {
    "accuracy": ACCURACY,
    "accuracy_mean_of_tasks": replace(ACCURACY, title="accuracy, mean of tasks", unit="mean of shares"),
    "accuracy_sum": replace(ACCURACY, title="accuracy by sum"),
    "accuracy_chars": replace(ACCURACY, title="accuracy by character"),
}
"""Metrics of one wording."""


METRICS = RANKED | {
    f"{name}_{wording}": replace(metric, title=f"{metric.title}, {wording} labels")
    for wording in WORDINGS
    for name, metric in RANKED.items()
}


@dataclass(frozen=True)
class ChoicesOptions:
    """Options of choices."""

    encoding: Literal["training", "together"] = "training"
    """How choices tokenises prompt and option: as in training, or together as lm-evaluation-harness does."""

    def __post_init__(self) -> None:
        check(self)


class ChoicesTask(Task[ChoicesOptions, "dict[str, Corpus]"]):
    """Which of an example's choices a model finds most probable. It measures on a text per wording of the labels."""

    @property
    def metrics(self) -> Mapping[str, Metric]:
        return METRICS

    def reads_text(self, options: ChoicesOptions) -> bool:
        return True

    def load(
        self, options: ChoicesOptions, shared: SharedOptions, tokenizer: Tokenizer, corpus: Corpus | None
    ) -> dict[str, Corpus]:
        assert corpus is not None, "the text was checked to be given"
        both = shared.data.instructions.labels == BOTH
        dev = text_to_choose_on(shared, "original" if both else None)
        chosen_on = {} if dev is None else {DEV: dev}
        if not both:
            return {"": corpus} | chosen_on
        from kd.data.sources import load_corpus
        from kd.evaluation.scoring.chat_asking import with_chat

        flan = replace(shared.data.instructions, labels="flan")
        other = load_corpus(str(shared.data.spec), split=shared.data.split, limit=shared.data.limit, instructions=flan)
        same = [e.choices for e in other.examples] == [e.choices for e in corpus.examples]
        other = with_chat(other) if shared.reading.chat else other
        if same:
            return {"": corpus} | chosen_on
        dev_flan = text_to_choose_on(shared, "flan")
        return {"_original": corpus, "_flan": other} | (
            {} if dev is None or dev_flan is None else {f"{DEV}_original": dev, f"{DEV}_flan": dev_flan}
        )

    def may_be_known(self, material: Mapping[str, Corpus]) -> Corpus:
        return next(iter(material.values()))

    def run(
        self,
        model: Model,
        tokenizer: Tokenizer,
        options: ChoicesOptions,
        shared: SharedOptions,
        material: Mapping[str, Corpus],
    ) -> Iterator[Progress[TaskResult]]:
        from kd.evaluation.measures.choices import evaluate_choices

        results: dict[str, ChoicesResult] = {}
        done = total = 0
        for suffix, corpus in material.items():
            asked = by_template(corpus)
            for step in evaluate_choices(model, tokenizer, asked, reading=shared.reading, encoding=options.encoding):
                yield Progress(done + step.done, max(total, done + step.total))
            assert step.result is not None
            results[suffix] = step.result
            done = total = done + step.total
        yield Progress(done, done, _task_result(options, shared, tokenizer, material, results))


def _task_result(
    options: ChoicesOptions,
    shared: SharedOptions,
    tokenizer: Tokenizer,
    corpora: Mapping[str, Corpus],
    results: Mapping[str, ChoicesResult],
) -> TaskResult:
    """Both by the suffix of their wording; the first one's documents and samples stand for all."""
    first = next(iter(results.values()))
    chosen_on = {name.removeprefix(DEV): result for name, result in results.items() if name.startswith(DEV)}
    results = {name: result for name, result in results.items() if not name.startswith(DEV)}
    asked = question_settings(next(iter(corpora.values())), shared, tokenizer)
    settings: dict[str, Any] = asked | {"encoding": options.encoding}
    estimates: dict[str, Estimate] = {}
    for suffix, result in results.items():
        dev = chosen_on[suffix].estimates if suffix in chosen_on else None
        for metric, estimate in over_templates(result.estimates, dev).items():
            base, slash, part = metric.partition("/")
            estimates[f"{base}{suffix}{slash}{part}"] = estimate
        settings |= _wording_settings(suffix, corpora[suffix], result)
    samples = [
        {"prompt": q.example.prompt, "expected": q.example.choices[q.answer], "got": q.example.choices[chosen]}
        for q, chosen in zip(first.questions[:SAMPLES], first.predictions.tolist(), strict=False)
    ]
    return TaskResult(estimates, first.documents, settings, samples)


def _wording_settings(suffix: str, corpus: Corpus, result: ChoicesResult) -> dict[str, Any]:
    labels = corpus.source.get("labels")
    return ({"labels": BOTH if suffix else labels} if labels else {}) | {
        f"choices{suffix}_digest": rows_digest(
            [e.id, e.choices, e.answer, *([e.also_right] if e.also_right else [])] for e in corpus.examples
        ),
        f"examples_skipped{suffix}": result.skipped,
        f"prompts_cut{suffix}": result.prompts_cut,
    }
