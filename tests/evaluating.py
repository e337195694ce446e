"""Evaluations by flat settings, as tests spell them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from kd.cache_builder.weighted_caches import as_caches
from kd.common.progress import Progress, final
from kd.common.settings import flat, make
from kd.data.data_settings import InstructionConfig
from kd.evaluation.eval_settings import EvalSettings
from kd.evaluation.evaluator import evaluate_model
from kd.evaluation.results import EvalReport


def run_tasks(
    model: str, tasks: Sequence[str], instructions: InstructionConfig | None = None, **settings: Any
) -> Iterator[Progress[EvalReport]]:
    """The steps of an evaluation; `settings` by the names of `EvalSettings`."""
    if "cache" in settings:
        settings["cache"] = as_caches(settings["cache"])
    how = {} if instructions is None else flat(instructions)
    return evaluate_model(model, make(EvalSettings, {"tasks": tuple(tasks), **how, **settings}))


def evaluated(model: str, tasks: Sequence[str], **settings: Any) -> EvalReport:
    """The report of an evaluation."""
    return final(run_tasks(model, tasks, **settings))
