"""What a task of `kd eval` is: its metrics, what it needs, and what it gives back.

A task is a value of a subclass of `Task`, listed in `kd.evaluation.tasks.task_registry`. Its module holds its options too.
Like all task modules, this one imports nothing heavy: the command line reads them to print its help. What measures
(`kd.evaluation.measures`) is imported when the task runs.
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Literal, TypeVar

from kd.common.errors import DataError
from kd.common.progress import Progress, Result
from kd.evaluation.tasks.shared_options import SharedOptions

if TYPE_CHECKING:
    from kd.data.corpus import Corpus
    from kd.evaluation.measures.hellaswag import Scenes
    from kd.evaluation.statistics.estimates import Documents, Estimate
    from kd.models.loading import Model
    from kd.models.tokenizer import Tokenizer

Options = TypeVar("Options")
"""The settings class of a task; None for a task that has no settings of its own."""
Material = TypeVar("Material")
"""What a task measures on."""
SAMPLES = 20
"""Number of examples of which a report keeps what the model did."""


@dataclass(frozen=True)
class Metric:
    """One figure of a task."""

    title: str
    """Name of the figure in a table."""
    unit: str
    better: Literal["lower", "higher"] | None
    """Which direction is better; None where the figure is not a merit of the model."""
    over: str
    """What `n` counts: token, byte, row or example. Averages over tokens compare only with the same tokenizer."""


@dataclass(frozen=True)
class TaskResult:
    """Estimates of one task by metric name, and what two results must share to be compared."""

    estimates: Mapping[str, Estimate]
    """Metric of the task, or `METRIC/TASK` for a part of the text, to its estimate."""
    documents: Documents
    settings: Mapping[str, Any]
    """What the task measured on and how, by name, as the report saves it."""
    samples: Sequence[Mapping[str, str]] = ()
    """What the model did with the first examples, to be read by people."""
    cache: Mapping[str, Any] | None = None
    """Description of the cache that the task used; None where it used none."""
    metrics: Mapping[str, Metric] | None = None
    """The figures, of a task that learns what they are when it runs; None = the task's own `metrics`."""


class Task(ABC, Generic[Options, Material]):
    """A way to measure a model. `Options` are its own settings, `Material` is what it measures on."""

    has_own_rows: ClassVar[bool] = False
    """Whether the task's rows come from the hub or `--task-root` and not from `--data`."""

    @property
    @abstractmethod
    def metrics(self) -> Mapping[str, Metric]:
        """Name -> every figure that the task can give."""

    def reads_text(self, options: Options) -> bool:
        """Whether the task measures on the text of `--data`."""
        return False

    def check(self, name: str, options: Options, shared: SharedOptions) -> None:
        """Raise DataError where something that the task needs was not given. Nothing is loaded."""
        if self.reads_text(options) and shared.data.spec is None:
            raise DataError(f"the task {name} needs a text that was not given", try_="--data SPEC, e.g. demo:heldout")

    @abstractmethod
    def load(self, options: Options, shared: SharedOptions, tokenizer: Tokenizer, corpus: Corpus | None) -> Material:
        """What the task measures on, checked. No weights are loaded. Raises KdError.

        corpus   the text of `--data`, where any task reads one
        """

    def load_weights(self, material: Material, shared: SharedOptions) -> Material:
        """The material with the weights that it needs besides the model's own."""
        return material

    def may_be_known(self, material: Material) -> Corpus | Scenes | None:
        """The text or rows that the model must not have been trained on; None where there are none."""
        return None

    @abstractmethod
    def run(
        self, model: Model, tokenizer: Tokenizer, options: Options, shared: SharedOptions, material: Material
    ) -> Iterator[Progress[TaskResult]]:
        """Measure the model; the last record carries the result."""


class TextTask(Task[Options, "Corpus"]):
    """A task that measures on the text of `--data`."""

    def reads_text(self, options: Options) -> bool:
        """Always."""
        return True

    def load(self, options: Options, shared: SharedOptions, tokenizer: Tokenizer, corpus: Corpus | None) -> Corpus:
        """The text, which is loaded already."""
        assert corpus is not None, "the text was checked to be given"
        return corpus

    def may_be_known(self, material: Corpus) -> Corpus:
        """The text."""
        return material


def task_progress(
    steps: Iterator[Progress[Result]], task_result: Callable[[Result], TaskResult]
) -> Iterator[Progress[TaskResult]]:
    """The steps of a measurement, with its result as a task's."""
    for step in steps:
        yield Progress(step.done, step.total, None if step.result is None else task_result(step.result))


def question_settings(corpus: Corpus, shared: SharedOptions, tokenizer: Tokenizer) -> dict[str, Any]:
    """What was asked of every model, whatever window, tokenizer and chat template it has; its effect is counted beside it."""
    from kd.evaluation.scoring.chat_asking import asks_chat, chat_conditions

    source, chat = corpus.source, asks_chat(corpus)
    between = {"separator": shared.reading.between, "bos": shared.reading.opens_with_bos}
    worded = {"template": source.get("template"), "labels": source.get("labels"), "data_seed": source.get("seed")}
    worded |= {name: source.get(name) for name in ("shots", "shots_seed")}
    return {
        "text_digest": corpus.digest,
        "seq_len": shared.reading.seq_len,
        **({"chat": chat_conditions(shared.reading, tokenizer)} if chat else between),
        **{k: v for k, v in worded.items() if v is not None},
    }


def rows_digest(rows: Iterable[Any]) -> str:
    """Hex digest of what `text_digest` leaves out."""
    text = json.dumps(list(rows), separators=(",", ":"))
    return hashlib.blake2b(text.encode("ascii"), digest_size=32).hexdigest()
