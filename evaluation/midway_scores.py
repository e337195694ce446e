"""What `kd train --eval-tasks` measures while a student learns: the tasks of `kd eval`, on a model in memory.

    plan = plan_scores(config, ["hellaswag", "choices"], data="flan:boolq", split="dev", limit=200)
    train(config, midway=Midway(plan.score, every=500))

Texts are loaded and checked once, before the first step. Instruction tasks are asked in template 0, agreement on the
training cache itself. A task on text that is in the cache is refused, or marked in every line (`contaminated`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from kd.cache_builder.weighted_caches import CacheSpec
from kd.data.data_settings import InstructionConfig
from kd.data.sources import takes_instructions
from kd.evaluation.evaluator import contaminated_tasks, score_model, with_texts
from kd.evaluation.tasks.eval_task import Settings
from kd.evaluation.tasks.task_registry import check_tasks, check_ways, figures_of
from kd.models.loading import Model, ModelRequest, load_request_tokenizer
from kd.models.tokenizer import Tokenizer


@dataclass(frozen=True)
class ScorePlan:
    """Tasks and what they are measured on, checked."""

    tasks: tuple[str, ...]
    settings: Settings
    contaminated: Mapping[str, str]
    """Task -> how its text is known to the student; only where that was allowed."""
    on_progress: Callable[[str, int, int], None] | None = None

    def score(self, model: Model, tokenizer: Tokenizer) -> dict[str, Any]:
        """`tasks` (task -> metric -> value, stderr, n, …), `settings`, and `contaminated` where something is."""
        steps = score_model(model, tokenizer, self.tasks, self.settings)
        while True:
            try:
                step = next(steps)
            except StopIteration as end:
                results = end.value
                break
            if self.on_progress is not None:
                self.on_progress(step.task, step.done, step.total)
        found = {
            "tasks": {name: figures_of(name, result) for name, result in results.items()},
            "settings": {name: dict(result.settings) for name, result in results.items()},
        }
        return found | ({"contaminated": dict(self.contaminated)} if self.contaminated else {})


def plan_scores(
    student: ModelRequest,
    cache: CacheSpec,
    tasks: Sequence[str],
    *,
    data: str | None = None,
    split: str | None = None,
    limit: int | None = None,
    task_root: Path | None = None,
    protocol: str = "nanogpt",
    allow_contaminated: bool = False,
    on_progress: Callable[[str, int, int], None] | None = None,
) -> ScorePlan:
    """Check tasks and load their texts. Raises KdError as `run_tasks`, and DataError for text that is in the cache."""
    check_tasks(tasks, data=data, cache=cache)
    check_ways(tasks, "apart", protocol)
    template: Literal["random"] | int = 0 if data is not None and takes_instructions(data) else "random"
    instructions = InstructionConfig(template, task_root=task_root)
    tokenizer = load_request_tokenizer(student)
    settings = with_texts(
        Settings(limit=limit, protocol=protocol),
        tasks,
        tokenizer,
        data=data,
        cache=cache,
        split=split,
        instructions=instructions,
    )
    found = contaminated_tasks(tasks, settings, student.name, cache=cache, allow=allow_contaminated)
    return ScorePlan(tuple(dict.fromkeys(tasks)), settings, found, on_progress)


def headline(record: Mapping[str, Any]) -> str:
    """A line for people: of each task the first two metrics."""
    shown = []
    for task, metrics in record["tasks"].items():
        for name, figure in list(metrics.items())[:2]:
            value = "not finite" if figure["value"] is None else f"{figure['value']:.4g}"
            shown.append(f"{task} {name} {value}" + (f" ± {figure['stderr']:.2g}" if figure["stderr"] else ""))
    return f"step {record['step']:,}: {', '.join(shown)}"
