"""What `kd train --eval-tasks` measures while a student learns: the tasks of `kd eval`, on a model in memory.

    plan = plan_scores(request, "runs/cache", ["hellaswag", "choices"], data="flan:boolq", split="dev", limit=200)
    train(config, midway=Midway(plan.score, every=500))

Texts are loaded and checked once, before the first step. Instruction tasks are asked in template 0, agreement on the
training cache itself. A task on text that is in the cache is refused, or marked in every line (`contaminated`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kd.cache_builder.weighted_caches import CacheSpec, as_caches
from kd.common.settings import make
from kd.data.sources import takes_instructions
from kd.evaluation.eval_settings import EvalSettings
from kd.evaluation.evaluator import LoadedTasks, check_tasks, contaminated_tasks, load_tasks, score_model
from kd.evaluation.tasks.task_registry import figures_of
from kd.models.loading import Model
from kd.models.model_config import load_request_tokenizer
from kd.models.model_request import ModelRequest
from kd.models.tokenizer import Tokenizer


@dataclass(frozen=True)
class ScorePlan:
    """Tasks and what they are measured on, checked."""

    loaded: LoadedTasks
    contaminated: Mapping[str, str]
    """Task -> why its text is known to the student; empty unless that was allowed."""
    on_progress: Callable[[str, int, int], None] | None = None
    """Called with a task's name, and how many of its rows are done and there are."""

    def score(self, model: Model, tokenizer: Tokenizer) -> dict[str, Any]:
        """`tasks` (task -> metric -> value, stderr, n, …), `settings`, and `contaminated` where something is."""
        steps = score_model(model, tokenizer, self.loaded)
        while True:
            try:
                step = next(steps)
            except StopIteration as end:
                results = end.value
                break
            if self.on_progress is not None:
                self.on_progress(step.note, step.done, step.total)
        record = {
            "tasks": {name: figures_of(name, result) for name, result in results.items()},
            "settings": {name: dict(result.settings) for name, result in results.items()},
        }
        return record | ({"contaminated": dict(self.contaminated)} if self.contaminated else {})


def plan_scores(
    student: ModelRequest,
    cache: CacheSpec,
    tasks: Sequence[str],
    *,
    on_progress: Callable[[str, int, int], None] | None = None,
    **settings: Any,
) -> ScorePlan:
    """Check tasks and load their texts.

    settings   further settings of `EvalSettings` by name (data, split, limit, task_root, protocol, allow_contaminated, …);
               None means the default

    Raises KdError as `evaluate_model`, and DataError for text that is in the cache.
    """
    given = {name: value for name, value in settings.items() if value is not None}
    if given.get("data") is not None and takes_instructions(given["data"]):
        given.setdefault("template", 0)
    planned = make(EvalSettings, given | {"tasks": tuple(tasks), "cache": as_caches(cache)})
    check_tasks(planned)
    loaded = load_tasks(planned, load_request_tokenizer(student))
    return ScorePlan(loaded, contaminated_tasks(loaded, student.name, cache=cache), on_progress)


def headline(record: Mapping[str, Any]) -> str:
    """A line for people: of each task the first two metrics."""
    shown = []
    for task, metrics in record["tasks"].items():
        for name, figure in list(metrics.items())[:2]:
            value = "not finite" if figure["value"] is None else f"{figure['value']:.4g}"
            label = task if name == task else f"{task} {name}"
            shown.append(f"{label} {value}" + (f" ± {figure['stderr']:.2g}" if figure["stderr"] else ""))
    return f"step {record['step']:,}: {', '.join(shown)}"
