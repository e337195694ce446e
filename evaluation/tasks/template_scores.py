"""Scores over templates, as FLAN reports them: the mean over a task's templates, and the score in the best of them.

With `--template each` every row is asked in every template of its task. A measurement then sees one task per template, called
`TASK in template K`, and `over_templates` makes of their figures those of the task (Wei et al. 2022, arXiv:2109.01652).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

from kd.data.data_settings import EACH
from kd.data.rows.example import IN_TEMPLATE, row_and_template
from kd.evaluation.tasks.shared_options import SharedOptions

if TYPE_CHECKING:
    from kd.data.corpus import Corpus
    from kd.evaluation.statistics.estimates import Estimate

BEST = "_best_template"
"""End of the name of a metric in the templates that were chosen on another split."""
DEV = "dev"
"""Key of the text that templates are chosen on."""


def text_to_choose_on(shared: SharedOptions, labels: Literal["original", "flan"] | None = None) -> Corpus | None:
    """The text that each task's best template is chosen on; None where none is to be chosen. Raises DataError."""
    split = shared.templates.best_template_on
    if split is None:
        return None
    from kd.data.sources import load_corpus

    data = shared.data
    instructions = data.instructions if labels is None else replace(data.instructions, labels=labels)
    return load_corpus(str(data.spec), split=split, instructions=instructions)


def by_template(corpus: Corpus) -> Corpus:
    """The text with one task per template; the text itself where its rows are not asked in several."""
    if corpus.source.get("template") != EACH:
        return corpus
    examples, metrics = [], dict(corpus.metrics)
    for example in corpus.examples:
        name = f"{example.task}{IN_TEMPLATE}{row_and_template(example.id)[1]}"
        examples.append(replace(example, task=name))
        if example.task in metrics:
            metrics[name] = metrics[example.task]
    return replace(corpus, examples=tuple(examples), metrics=metrics)


def over_templates(test: Mapping[str, Estimate], dev: Mapping[str, Estimate] | None = None) -> dict[str, Estimate]:
    """The figures of tasks from those of their templates; other figures stay.

    dev   figures of the same tasks and templates that say which template is best; of equal ones the first
    """
    from kd.evaluation.statistics.estimates import mean_of

    figures = {name: figure for name, figure in test.items() if _template_of(name) is None}
    parts: dict[str, dict[str, dict[int, Estimate]]] = {}
    for name, figure in test.items():
        metric, _, label = name.partition("/")
        task, number = row_and_template(label)
        if number is not None:
            parts.setdefault(metric, {}).setdefault(task, {})[number] = figure
    for metric, tasks in parts.items():
        means = {f"{metric}/{task}": mean_of({str(k): each[k] for k in sorted(each)}) for task, each in tasks.items()}
        figures |= means
        if f"{metric}_mean_of_tasks" in test:
            figures[f"{metric}_mean_of_tasks"] = mean_of(means)
        if dev is not None:
            best = {f"{metric}{BEST}/{task}": each[_best(dev, metric, task, each)] for task, each in tasks.items()}
            figures |= {f"{metric}{BEST}": mean_of(best), **best}
    return figures


def _template_of(name: str) -> int | None:
    return row_and_template(name)[1]


def _best(dev: Mapping[str, Estimate], metric: str, task: str, templates: Mapping[int, Estimate]) -> int:
    """The template with the highest figure; more is better in every metric that is given by task."""
    return max(sorted(templates), key=lambda number: dev[f"{metric}/{task}{IN_TEMPLATE}{number}"].value)
