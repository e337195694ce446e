"""What `kd eval` can measure, by name; `kd.evaluation.evaluator` does it.

    perplexity   needs a text                             perplexity, bits per byte, calibration
    agreement    needs a cache, or a teacher and a text   KL and JSD to the teacher, top-1 agreement, calibration
    choices      needs a text with choices                accuracy of rank classification
    generation   needs a text of prompts and targets      exact match, token F1, ROUGE, BLEU, … of answers
    hellaswag    has rows of its own                      accuracy under one of two protocols
    samples      needs a file of prompts                  what the model writes, to be read side by side
    lm_eval:…    has rows of its own                      a task of lm-evaluation-harness, run by it

Add a task: a module with its options and a subclass of `Task`, an entry in `TASKS`, and, if it has options, a field of the
task's name in `EvalSettings`. A metric `NAME/TASK` is the metric NAME over the examples of one task of the text.
"""

from __future__ import annotations

import math
from typing import Any

from kd.evaluation.tasks.agreement_task import AgreementTask
from kd.evaluation.tasks.choices_task import ChoicesTask
from kd.evaluation.tasks.eval_task import Task, TaskResult
from kd.evaluation.tasks.generation_task import GenerationTask
from kd.evaluation.tasks.hellaswag_task import HellaSwagTask
from kd.evaluation.tasks.lm_eval_task import NAME, PREFIX, LmEvalTask
from kd.evaluation.tasks.perplexity_task import PerplexityTask
from kd.evaluation.tasks.samples_task import SamplesTask
from kd.evaluation.tasks.template_scores import BEST

TASKS: dict[str, Task[Any, Any]] = {
    "perplexity": PerplexityTask(),
    "agreement": AgreementTask(),
    "choices": ChoicesTask(),
    "generation": GenerationTask(),
    "hellaswag": HellaSwagTask(),
    "samples": SamplesTask(),
    NAME: LmEvalTask(),
}


def named_task(name: str) -> Task[Any, Any]:
    """The task of a name that is checked; `lm_eval:NAME` is the harness's NAME."""
    return LmEvalTask(name.removeprefix(PREFIX)) if name.startswith(PREFIX) else TASKS[name]


def figures_of(task: str, result: TaskResult) -> dict[str, dict[str, Any]]:
    """Metric -> value (None where it is not finite), stderr, n, over, unit, better, title."""
    metrics = named_task(task).metrics if result.metrics is None else result.metrics
    figures: dict[str, dict[str, Any]] = {}
    for name, estimate in result.estimates.items():
        base, _, part = name.partition("/")
        metric = metrics[base.replace(BEST, "")]
        title = f"{metric.title}, best template" if BEST in base else metric.title
        figures[name] = {
            "value": estimate.value if math.isfinite(estimate.value) else None,
            "stderr": estimate.stderr,
            "n": estimate.n,
            "over": metric.over,
            "unit": metric.unit,
            "better": metric.better,
            "title": f"{title}: {part}" if part else title,
        }
    return figures
