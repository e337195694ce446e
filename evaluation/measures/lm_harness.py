"""Tasks of lm-evaluation-harness, run by the harness itself on a model that kd has loaded.

The harness makes the prompts, asks them, and counts. From its samples kd takes every question's score, so that the report has
paired errors between models as for its own tasks. A metric over questions is one of these, whichever gives the harness's value:

    mean          Σ s_d / n                        acc, exact_match, …
    per byte      -Σ s_d / (Σ w_d ln 2)            bits_per_byte, over (s, w) of each text
    perplexity    exp(-Σ s_d / Σ w_d)              word_perplexity, byte_perplexity, and perplexity with w = 1

Any other metric (F1 over all answers, BLEU) has the harness's own standard error, where that has one.

Gao et al., The Language Model Evaluation Harness; written against lm_eval 0.4.13.
"""

from __future__ import annotations

import copy
import logging
import math
import os
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np

from kd.common.errors import DataError
from kd.common.extras import needed
from kd.common.progress import Progress
from kd.common.synonyms import nearest_name
from kd.evaluation.statistics.estimates import Documents, Estimate, mean_of
from kd.models.loading import Model
from kd.models.tokenizer import Tokenizer

SEEDS = {"random": 0, "others": 1234}
"""Seeds of Python's generator, and of numpy's, torch's and the few-shot examples': those of the harness's own command."""
SHOWN = 20
"""Questions that are kept to be read."""
BOOTSTRAPS = 1000
"""Resamples for the standard error of a metric that is no mean over questions."""
WITHOUT_FILTER = "none"
"""Name that the harness gives to answers as they were written."""
OVER = {
    "bits_per_byte": ("bits per byte", "byte"),
    "byte_perplexity": ("per byte", "byte"),
    "word_perplexity": ("per word", "word"),
}
"""Metric -> its unit, and what it is counted over, where that is not a question."""
PERPLEXITIES = ("perplexity", "word_perplexity", "byte_perplexity")


@dataclass(frozen=True)
class HarnessTask:
    """A task or group, with its rows."""

    name: str
    loaded: Mapping[str, Any]
    """What the harness's `TaskManager.load` gave: `tasks`, `groups`, `group_map`."""

    @property
    def is_group(self) -> bool:
        """Whether it is several tasks under one name."""
        return list(self.loaded["tasks"]) != [self.name]


def load_harness_task(name: str, *, include_path: Path | None, shots: int | None) -> HarnessTask:
    """The task with its rows, which come from the hub, from files that it names, or from the disk's copy of either.

    include_path   folder with further tasks
    shots          examples before each question; None = what the task says. A task that says 0 keeps it, as in the harness

    Raises DataError for a name that the harness does not know, and where the rows cannot be had.
    """
    with needed("lm_eval", f"the task lm_eval:{name}"), _quiet(), _seeded():
        manager = _task_manager(None if include_path is None else str(include_path.resolve()))
        if name not in manager.all_tasks:
            raise DataError(
                f"lm-evaluation-harness has no task {name!r}",
                did_you_mean=nearest_name(name, manager.all_tasks),
                known=f"{len(manager.all_tasks):,} tasks and groups: lm_eval ls tasks",
            )
        try:
            loaded = manager.load([name])
        except Exception as error:  # what its loaders raise, from a missing package to an address that does not answer
            raise DataError(
                "lm-evaluation-harness cannot load this task or its rows",
                where=f"lm_eval:{name}",
                found=f"{type(error).__name__}: {str(error).strip() or 'no message'}".splitlines()[0],
                try_="a connection to the hub, or HF_HUB_OFFLINE=1 with rows that were loaded before; "
                "rows of your own: a task in YAML under --include-path",
            ) from error
    for task in loaded["tasks"].values():
        said = task.get_config("num_fewshot")
        if said is None or (shots is not None and said != 0):
            task.set_config(key="num_fewshot", value=shots or 0)
        task.set_fewshot_seed(seed=SEEDS["others"])
    return HarnessTask(name, loaded)


@cache
def _task_manager(include_path: str | None) -> Any:
    """The harness's list of tasks: to read it takes seconds."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=include_path)


def run_harness_task(
    model: Model,
    tokenizer: Tokenizer,
    task: HarnessTask,
    *,
    limit: int | None = None,
    batch: int = 8,
    chat: bool = False,
    system: str | None = None,
    variables: Mapping[str, Any] | None = None,
) -> Iterator[Progress[HarnessResult]]:
    """Ask the model; the last record carries the result.

    limit       ask the first so many questions of every task
    batch       requests that pass through the model together
    chat        ask through the tokenizer's chat template, as the harness's `--apply_chat_template`
    system      `--system_instruction`
    variables   of the chat template
    """
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    yield Progress(0, 1)
    with _quiet(), _seeded(), _as_only_process():
        lm = HFLM(
            pretrained=model,
            tokenizer=copy.deepcopy(tokenizer),  # the harness gives it a padding token
            batch_size=batch,
            chat_template_args=dict(variables or {}),
        )
        try:
            outcome = lm_eval.evaluate(
                lm,
                task_dict=dict(task.loaded),
                limit=limit,
                bootstrap_iters=BOOTSTRAPS,
                apply_chat_template=chat,
                system_instruction=system,
                fewshot_as_multiturn=chat,
            )
        except ValueError as error:  # more examples than the task has rows for, rows without a field
            raise DataError(
                "lm-evaluation-harness cannot ask this task", where=f"lm_eval:{task.name}", found=str(error)
            ) from error
    yield Progress(1, 1, result_of_harness(task, outcome))


def result_of_harness(task: HarnessTask, outcome: Mapping[str, Any]) -> HarnessResult:
    """What the harness found, with every question's influence."""
    parts = list(task.loaded["tasks"])
    samples = {name: sorted(outcome["samples"][name], key=lambda s: int(s["doc_id"])) for name in parts}
    ids = [f"{name}/{i}" for name in parts for i in dict.fromkeys(s["doc_id"] for s in samples[name])]
    documents = Documents.of_examples(ids, "pairs")
    estimates, figures = dict[str, Estimate](), dict[str, HarnessFigure]()
    for part in parts:
        for figure in figures_in(part, outcome):
            name = f"{figure.name}/{part}" if task.is_group else figure.name
            figures[figure.name] = figure
            estimates[name] = _estimate(part, figure.key, outcome, samples[part], documents)
    if task.is_group:
        for figure in figures_in(task.name, outcome):
            over = [name for name in estimates if name.startswith(f"{figure.name}/")]
            figures[figure.name] = figure
            estimates[figure.name] = _of_group(task.name, figure.key, outcome, [estimates[name] for name in over])
    return HarnessResult(
        estimates,
        figures,
        documents,
        version=", ".join(f"{name} {outcome['versions'].get(name)}" for name in parts),
        shots=_one({outcome["n-shot"].get(name) for name in parts}),
        rows=tuple((str(s["doc_hash"]), str(s["target_hash"])) for name in parts for s in samples[name]),
        shown=tuple(_shown(s) for name in parts for s in samples[name][:SHOWN])[:SHOWN],
    )


@dataclass(frozen=True)
class HarnessFigure:
    """One figure of a task or group in the harness's results."""

    key: str
    """`METRIC,FILTER`, as the harness names it."""
    title: str
    """The metric; of several filters of answers, with the filter."""
    unit: str
    over: str
    """What it is counted over: question, byte or word."""
    better: Literal["lower", "higher"] | None
    """Which direction is better; None where the harness does not say."""

    @property
    def name(self) -> str:
        """The name in kd's reports, where a stroke parts a metric from a task."""
        return self.title.replace("/", " ")


@dataclass(frozen=True)
class HarnessResult:
    """What the harness found of one task or group."""

    estimates: Mapping[str, Estimate]
    """Metric, or `METRIC/TASK` for a task of a group, to its estimate."""
    figures: Mapping[str, HarnessFigure]
    """Metric -> what it is."""
    documents: Documents
    """Questions, each for itself."""
    version: str
    """Each task with its version."""
    shots: Any
    """Examples before each question; a list where the tasks of a group differ."""
    rows: Sequence[tuple[str, str]]
    """The harness's digests of every question and its target."""
    shown: Sequence[Mapping[str, str]]
    """The first questions with what was expected and what came."""


def figures_in(name: str, outcome: Mapping[str, Any]) -> Iterator[HarnessFigure]:
    """The figures of one task or group, errors left out."""
    better = outcome["higher_is_better"].get(name, {})
    for key, value in outcome["results"].get(name, {}).items():
        metric, comma, chosen = key.partition(",")
        if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
            continue
        higher = better.get(metric)
        title = metric if chosen == WITHOUT_FILTER else f"{metric} ({chosen})"
        direction: Literal["lower", "higher"] | None = None if higher is None else "higher" if higher else "lower"
        unit, over = _measured(metric, value)

        yield HarnessFigure(key, title, unit, over, direction)


def _measured(metric: str, value: float) -> tuple[str, str]:
    """Unit of a figure, and what it is counted over."""
    if metric in OVER:
        return OVER[metric]
    share = metric.startswith(("acc", "exact_match", "em", "f1", "pass@")) and 0 <= value <= 1
    return "share of questions" if share else "points", "question"


def _estimate(
    task: str, key: str, outcome: Mapping[str, Any], samples: Sequence[Mapping[str, Any]], documents: Documents
) -> Estimate:
    """The figure with every question's influence, where it is a mean, a ratio, or a perplexity of one."""
    metric, _, chosen = key.partition(",")
    value = float(outcome["results"][task][key])
    places = {name: number for number, name in enumerate(documents.names)}
    scores = [(places[f"{task}/{s['doc_id']}"], s[metric]) for s in samples if s["filter"] == chosen and metric in s]
    pairs = [(d, *(score if isinstance(score, tuple | list) else (score, 1.0))) for d, score in scores]
    if pairs and all(isinstance(x, int | float) for _, *both in pairs for x in both) and len(pairs[0]) == 3:
        numbers, sums, weights = (np.array(column) for column in zip(*pairs, strict=True))
        part = Documents(tuple(documents.names[d] for d in numbers), np.arange(len(numbers)))
        ratio = part.ratio(sums.astype(np.float64), weights.astype(np.float64))
        negative = Estimate(-ratio.value, -ratio.influence, ratio.n)
        bits = Estimate(negative.value / math.log(2), negative.influence / math.log(2), ratio.n)
        candidates = [ratio, bits, *([negative.exponential()] if metric in PERPLEXITIES else [])]
        for estimate in candidates:
            if math.isclose(estimate.value, value, rel_tol=1e-9, abs_tol=1e-12):
                return documents.spread(estimate, part)
    return _as_reported(value, outcome["results"][task].get(f"{metric}_stderr,{chosen}"), len(scores), documents)


def _of_group(name: str, key: str, outcome: Mapping[str, Any], parts: Sequence[Estimate]) -> Estimate:
    """A group's figure: the mean over its tasks, or over their questions, whichever the group says."""
    metric, _, chosen = key.partition(",")
    value = float(outcome["results"][name][key])
    if parts:
        counts = np.array([e.n for e in parts], dtype=np.float64)
        share = counts / counts.sum()
        weighted = Estimate(
            float(sum(s * e.value for s, e in zip(share, parts, strict=True))),
            np.sum([s * e.influence for s, e in zip(share, parts, strict=True)], axis=0),
            int(counts.sum()),
        )
        for estimate in (weighted, mean_of({str(i): e for i, e in enumerate(parts)})):
            if math.isclose(estimate.value, value, rel_tol=1e-9, abs_tol=1e-12):
                return estimate
    size = len(parts[0].influence) if parts else 0
    return Estimate(
        value, np.full(size, np.nan), sum(e.n for e in parts), _error(outcome["results"][name], metric, chosen)
    )


def _as_reported(value: float, stderr: Any, count: int, documents: Documents) -> Estimate:
    """A figure with the harness's own standard error: how far each question moves it is not known."""
    error = float(stderr) if isinstance(stderr, int | float) and math.isfinite(stderr) else None
    return Estimate(value, np.full(len(documents.names), np.nan), count, error)


def _error(results: Mapping[str, Any], metric: str, chosen: str) -> float | None:
    stderr = results.get(f"{metric}_stderr,{chosen}")
    return float(stderr) if isinstance(stderr, int | float) and math.isfinite(stderr) else None


def _shown(sample: Mapping[str, Any]) -> dict[str, str]:
    """A question, what was expected, and what came, to be read by people."""
    prompt = str(sample["arguments"][0][0]) if sample["arguments"] else ""
    answers = sample["filtered_resps"]
    if answers and isinstance(answers[0], tuple | list):  # log-likelihoods of choices
        best = max(range(len(answers)), key=lambda i: float(answers[i][0]))
        choices = [str(a[1]) for a in sample["arguments"] if len(a) > 1]
        target = sample["target"]
        wanted = choices[target] if isinstance(target, int) and target < len(choices) else str(target)
        return {"prompt": prompt, "expected": wanted, "got": choices[best] if best < len(choices) else ""}
    return {"prompt": prompt, "expected": str(sample["target"]), "got": str(answers[0]) if answers else ""}


def _one(values: set[Any]) -> Any:
    """The value that all have; a sorted list where they differ."""
    return values.pop() if len(values) == 1 else sorted(values, key=str)


@contextmanager
def _quiet() -> Iterator[None]:
    """The harness's own log is not shown, but for errors."""
    logger = logging.getLogger("lm_eval")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


@contextmanager
def _seeded() -> Iterator[None]:
    """Generators seeded as by the harness's command; afterwards they are as they were."""
    import torch

    python, legacy = random.getstate(), np.random.get_state()  # noqa: NPY002
    random.seed(SEEDS["random"])
    np.random.seed(SEEDS["others"])  # noqa: NPY002
    try:
        with torch.random.fork_rng():
            torch.manual_seed(SEEDS["others"])
            yield
    finally:
        random.setstate(python)
        np.random.set_state(legacy)  # noqa: NPY002


@contextmanager
def _as_only_process() -> Iterator[None]:
    """Without LOCAL_RANK, by which the harness would take this process for one of several that share its work."""
    rank = os.environ.pop("LOCAL_RANK", None)
    try:
        yield
    finally:
        if rank is not None:
            os.environ["LOCAL_RANK"] = rank
