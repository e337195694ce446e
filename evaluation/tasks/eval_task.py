"""What a way to measure a model is: its metrics, what it is told, and what it gives back."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from kd.data.sources import Corpus
from kd.evaluation.scoring.scored_text import Progress
from kd.evaluation.statistics.estimates import Documents, Estimate
from kd.models.loading import Model
from kd.models.tokenizer import Tokenizer

if TYPE_CHECKING:
    from kd.cache_builder.store.readers.reading import Reader
    from kd.evaluation.answers.answer_metrics import MetricSettings
    from kd.evaluation.tasks.hellaswag import Scenes
    from kd.evaluation.tasks.samples import Prompts


@dataclass(frozen=True)
class Metric:
    """One figure of a task."""

    title: str
    """As a table spells it."""
    unit: str
    better: Literal["lower", "higher"] | None
    """None: not a merit of the model."""
    over: str
    """What `n` counts: token, byte, row or example. Averages over tokens compare only with the same tokenizer."""


@dataclass(frozen=True)
class LiveTeacher:
    """A teacher in memory."""

    name: str
    identity: Mapping[str, Any]
    model: Model


@dataclass(frozen=True)
class Settings:
    """What tasks are told; each uses its own part."""

    corpus: Corpus | None = None
    reader: Reader | None = None
    teacher: LiveTeacher | None = None
    """Of agreement, instead of a cache."""
    limit: int | None = None
    """First examples of the text (applied when it was loaded) and of the cache."""
    limit_tokens: int | None = None
    """First tokens of the text."""
    seq_len: int | None = None
    stride: int | None = None
    bos: bool = True
    temperature: float = 1.0
    tokens_per_batch: int | None = None
    separator: str = "\n"
    """Between the prompt and what follows it; an encoder-decoder needs none."""
    max_new_tokens: int | None = None
    """Of a generated answer, EOS included; None = as the longest reference needs."""
    stop: str | None = None
    """Text at which a generated answer is cut as well as at EOS."""
    sample_temperature: float = 0.0
    """Of generated answers: 0 = greedy."""
    sample_seed: int = 0
    metrics: tuple[str, ...] | None = None
    """Of generated answers, for every task of the text; None = as the tasks' files name them."""
    metric_settings: MetricSettings | None = None
    encoding: str = "apart"
    """Of choices: `apart` as in training, `together` as lm-eval."""
    other_wording: Corpus | None = None
    """Of choices: the same examples with the other wording of fixed labels."""
    protocol: str = "nanogpt"
    """Of hellaswag: `nanogpt` or `harness`."""
    scenes: Scenes | None = None
    """Of hellaswag: its rows."""
    prompts: Prompts | None = None
    """Of samples."""


@dataclass(frozen=True)
class TaskResult:
    """Estimates of one task by metric name, and what two results must share to be compared."""

    estimates: Mapping[str, Estimate]
    """Metric of the task, or `METRIC/TASK` for a part of the text."""
    documents: Documents
    settings: Mapping[str, Any]
    samples: Sequence[Mapping[str, str]] = ()
    """What the model did with the first examples, to be read by people."""


@dataclass(frozen=True)
class Task:
    """A way to measure a model."""

    about: str
    needs: Literal["data", "cache", "rows", "prompts"]
    """`rows`: its own, from the hub or from files under `--task-root`; `prompts`: a file of the user's."""
    metrics: Mapping[str, Metric]
    run: Callable[[Model, Tokenizer, Settings], Iterator[Progress[TaskResult]]]
