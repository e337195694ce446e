"""`evaluate`: a model's scores in one call, of a model by name or in memory."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from kd.common.errors import DataError
from kd.common.progress import final
from kd.common.setting_fields import settings_of
from kd.common.settings import flattened, make
from kd.evaluation.eval_settings import EvalSettings
from kd.evaluation.evaluator import check_tasks, evaluate_model, load_tasks, report_of, score_model
from kd.evaluation.results import EvalReport
from kd.evaluation.tasks.shared_options import LoadingOptions
from kd.models.identity import in_memory_identity, parameters_digest
from kd.models.loading import Model
from kd.models.tokenizer import Tokenizer

OF_LOADING = settings_of(LoadingOptions).keys() - {"device", "seed", "source_lang", "target_lang"}
"""Settings that say how a model is loaded, and nothing about one that is in memory."""


def evaluate(
    model: str | os.PathLike[str] | Model,
    tasks: str | Sequence[str] = "perplexity",
    *,
    tokenizer: Tokenizer | None = None,
    **settings: Any,
) -> EvalReport:
    """Score a model by the named tasks.

    model       `demo`, `random:NAME`, a folder, a hub id, or a model in memory, which is left as it was
    tasks       one task or several: perplexity, agreement, choices, generation, hellaswag, samples, lm_eval:NAME
    tokenizer   the tokenizer of a model in memory
    settings    the options of `kd eval`, spelled with underscores: data, split, cache, limit, …

    Raises DataError for a task whose text or cache was not given, and for a text that the model was trained on. What a
    model in memory was trained on is not known.

    >>> import kd
    >>> report = kd.evaluate("demo", "perplexity", data="demo", split="heldout", limit=1)
    >>> 5 < report.tasks["perplexity"]["perplexity"]["value"] < 500
    True
    >>> model, tokenizer = kd.load_teacher("demo")
    >>> in_memory = kd.evaluate(model, "perplexity", tokenizer=tokenizer, data="demo", split="heldout", limit=1)
    >>> in_memory.tasks == report.tasks
    True
    """
    if not isinstance(tasks, str | Sequence):
        raise DataError("these are no tasks", found=type(tasks).__name__, expected="a name, or a list of names")
    chosen = make(EvalSettings, {"tasks": tasks if isinstance(tasks, str) else tuple(tasks), **settings})
    if isinstance(model, str | os.PathLike):
        return final(evaluate_model(os.fspath(model), chosen))
    if tokenizer is None:
        raise DataError("a model in memory needs its tokenizer", expected="evaluate(model, tasks, tokenizer=tokenizer)")
    useless = sorted(flattened(EvalSettings, settings).keys() & OF_LOADING)
    if useless and chosen.agreement.teacher is None:
        raise DataError(
            "these settings do not apply to a model in memory",
            found=", ".join(useless),
            try_="evaluate(NAME, …), which loads the model by name",
        )
    return _evaluate_in_memory(model, tokenizer, chosen)


def _evaluate_in_memory(model: Model, tokenizer: Tokenizer, settings: EvalSettings) -> EvalReport:
    from kd.student_trainer.midway import undisturbed

    check_tasks(settings)
    loaded = load_tasks(settings, tokenizer).with_weights()
    with undisturbed(model):
        steps = score_model(model, tokenizer, loaded)
        while True:
            try:
                next(steps)
            except StopIteration as end:
                results = end.value
                break
    identity = in_memory_identity(model, parameters_digest(model))
    return report_of(type(model).__name__, model, tokenizer, identity, loaded, results, {})
