"""`--tasks lm_eval:NAME`: a task or group of lm-evaluation-harness, run by it on the loaded model, with its own data.

See `kd.evaluation.measures.lm_harness`. Every task named so is a task of its own in the report.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from kd.common.errors import DataError
from kd.common.extras import require_package
from kd.common.progress import Progress
from kd.common.settings import check, setting
from kd.evaluation.tasks.eval_task import Metric, Task, TaskResult, rows_digest, task_progress
from kd.evaluation.tasks.shared_options import SharedOptions

if TYPE_CHECKING:
    from kd.data.corpus import Corpus
    from kd.evaluation.measures.lm_harness import HarnessResult, HarnessTask
    from kd.models.loading import Model
    from kd.models.tokenizer import Tokenizer

NAME = "lm_eval"
PREFIX = f"{NAME}:"


@dataclass(frozen=True)
class LmEvalOptions:
    """Options of lm_eval."""

    include_path: Path | None = setting(None, metavar="DIR")
    """Folder with further tasks for lm_eval:NAME, as YAML files of lm-evaluation-harness."""
    lm_eval_batch: int = setting(8, minimum=1)
    """Requests of lm_eval:NAME that pass through the model together."""

    def __post_init__(self) -> None:
        check(self)


def full_names(tasks: Sequence[str], known: Sequence[str]) -> tuple[str, ...]:
    """Names of tasks with the prefix of those that stand behind one: `lm_eval:arc_easy,gsm8k` names two tasks of the harness.

    known   kd's own tasks, which never get the prefix
    """
    named: list[str] = []
    for name in tasks:
        follows = bool(named) and named[-1].startswith(PREFIX) and name not in known and not name.startswith(PREFIX)
        named.append(f"{PREFIX}{name}" if follows else name)
    return tuple(named)


class LmEvalTask(Task[LmEvalOptions, "HarnessTask"]):
    """One task or group of lm-evaluation-harness. Its metrics are known when it has run."""

    def __init__(self, name: str = "") -> None:
        self.name = name
        """The harness's name of the task; empty for the kind of task itself, which cannot be run."""

    @property
    def metrics(self) -> Mapping[str, Metric]:
        return {}

    def check(self, name: str, options: LmEvalOptions, shared: SharedOptions) -> None:
        if not self.name:
            raise DataError(
                "lm_eval needs the name of a task of lm-evaluation-harness", found=name, try_="--tasks lm_eval:arc_easy"
            )
        require_package("lm_eval", f"the task {name}")
        if options.include_path is not None and not options.include_path.is_dir():
            raise DataError(
                "there is no such folder of tasks", found=f"--include-path {options.include_path}", expected="a folder"
            )

    def load(
        self, options: LmEvalOptions, shared: SharedOptions, tokenizer: Tokenizer, corpus: Corpus | None
    ) -> HarnessTask:
        from kd.evaluation.measures.lm_harness import load_harness_task

        return load_harness_task(self.name, include_path=options.include_path, shots=shared.data.shots)

    def run(
        self,
        model: Model,
        tokenizer: Tokenizer,
        options: LmEvalOptions,
        shared: SharedOptions,
        material: HarnessTask,
    ) -> Iterator[Progress[TaskResult]]:
        from kd.evaluation.measures.lm_harness import run_harness_task
        from kd.evaluation.scoring.chat_asking import chat_conditions

        reading, limit = shared.reading, shared.data.limit
        steps = run_harness_task(
            model,
            tokenizer,
            material,
            limit=limit,
            batch=options.lm_eval_batch,
            chat=reading.chat,
            system=reading.system,
            variables=reading.template_kwargs,
        )

        def task_result(outcome: HarnessResult) -> TaskResult:
            settings = {
                "harness": version("lm_eval"),
                "version": outcome.version,
                "shots": outcome.shots,
                "limit": limit,
                "rows_digest": rows_digest(outcome.rows),
                **({"chat": chat_conditions(reading, tokenizer)} if reading.chat else {}),
            }
            metrics = {name: Metric(f.title, f.unit, f.better, f.over) for name, f in outcome.figures.items()}
            return TaskResult(outcome.estimates, outcome.documents, settings, outcome.shown, metrics=metrics)

        return task_progress(steps, task_result)
