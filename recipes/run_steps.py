"""Run the steps of a recipe or an experiment in order; what is finished is skipped, what was begun is continued.

A cache knows which of its shards are missing. A training is finished when its `run.json` says so, that of a classifier when it
has `classify.json`, and a merge when it has `merge.json`. An evaluation of an experiment, which remembers its commands, is
finished when its folder holds the scores. A recipe scores again. Reports are always written again, and all other commands run
again.

The functions that run a step are given by the caller, because the command line shows progress and Python does not need it.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from kd.recipes.steps import Step

RUN = "run.json"
FINISHED = {
    "eval": "eval.json",
    "classify train": "classify.json",
    "classify matrix": "matrix.json",
    "merge": "merge.json",
}
"""Command -> the file that it writes last."""
SCORES = ("eval", "classify matrix")
"""Commands that score: a recipe does it again."""
Runner = Callable[[Step], Any]
"""Runs one step through the function that its command calls."""


def check_steps(steps: Sequence[Step]) -> None:
    """Raise DataError for an unknown option, a wrong value or an unknown task, before any step runs."""
    from kd.evaluation.eval_settings import EvalSettings
    from kd.evaluation.evaluator import check_tasks

    for step in steps:
        settings = step.settings
        if EvalSettings in settings:
            check_tasks(settings[EvalSettings])


def run_steps(
    steps: Sequence[Step],
    runners: Mapping[str, Runner],
    *,
    keep_scores: bool = False,
    say: Callable[[str], object] = lambda line: None,
) -> list[Any]:
    """Run steps in order; returns what each runner returned, None for a step that was finished already.

    runners   command of a step -> the function that runs it
    keep_scores  skip evaluations whose folder holds scores; only for callers that know them to be of the same command
    say       receives a line for every step: its number, and the command as it would be typed

    Raises DataError before the first step for options that cannot be used, KdError for a step that fails, and
    KeyboardInterrupt where a step is interrupted.
    """
    check_steps(steps)
    results: list[Any] = []
    for number, step in enumerate(steps, 1):
        say(f"{number}/{len(steps)}  kd {shlex.join(step.words)}")
        try:
            skipped = is_finished(step) and (keep_scores or step.command not in SCORES)
            results.append(None if skipped else runners[step.command](step))
        except KeyboardInterrupt:  # without the advice on how to continue that step alone
            raise KeyboardInterrupt from None
    return results


def is_finished(step: Step) -> bool:
    """Whether a training, an evaluation or a merge is complete on disk. Other commands find out for themselves."""
    from kd.student_trainer.run_folder import read_run

    if step.command in FINISHED:
        return "out" in step.options and (step.out / FINISHED[step.command]).exists()
    return step.command == "train" and is_begun(step) and bool(read_run(step.out).get("complete"))


def is_begun(step: Step) -> bool:
    """Whether a training was started in the step's folder, so that it has to be resumed."""
    return (step.out / RUN).exists()
