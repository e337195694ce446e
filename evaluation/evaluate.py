"""`evaluate`: a model's scores in one call, from Python."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from kd.evaluation.evaluator import run_tasks
from kd.evaluation.results import EvalReport


def evaluate(model: str | os.PathLike[str], tasks: str | Sequence[str] = "perplexity", **settings: Any) -> EvalReport:
    """Score a model by the named tasks.

    model      `demo`, `random:NAME`, a folder, or a hub id
    tasks      one task or several: perplexity, agreement, choices, generation, hellaswag, samples
    settings   the options of `kd eval`, spelled with underscores: data, split, cache, limit, …

    Raises DataError for a task whose text or cache was not given, or for a text that the model was trained on.

    >>> import kd
    >>> report = kd.evaluate("demo", tasks=["perplexity"], data="demo", split="heldout", limit=1)
    >>> perplexity = report.tasks["perplexity"]["perplexity"]
    >>> 5 < perplexity["value"] < 500
    True
    """
    names = [tasks] if isinstance(tasks, str) else list(tasks)
    for last in run_tasks(os.fspath(model), names, **settings):
        report = last.report
    assert report is not None
    return report
