"""The types of a task file: fields of a row, the kind of answer, and templates; and pure functions on them.

`kd.data.instruction_tasks.task_files` reads and checks the YAML; `kd.data.instruction_tasks.rendering` turns rows into examples.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from kd.data.instruction_tasks.row_reading.row_field import Field

SPLITS = ("train", "dev", "test")
WORDINGS = ("original", "flan")
"""Wordings of fixed labels: the reference systems' and FLAN's."""
ANSWER = "answer"
"""The field that every template may use: the right choice, or a reference."""
MAX_INVERTED = 3
"""FLAN's limit of templates per task that turn it around (write the question for the answer)."""


@dataclass(frozen=True)
class Labels:
    """A fixed list of answers."""

    column: str
    """Column of the label."""
    words: Mapping[str, tuple[tuple[str, str], ...]]
    """Wording -> (row value, word) in the order of the choices."""
    round: bool = False
    """Whether the row's number is rounded to a whole one first; halves go to the even one."""
    skip: tuple[str, ...] = ()
    """Row values whose rows are left out."""


@dataclass(frozen=True)
class Choices:
    """Answers that are texts of the row."""

    texts: tuple[Field, ...]
    """Where the texts are: a field for each, or one whose column holds a list."""
    label: str | None
    """Column of the right text: its index, or its key. None where `right` says which texts are."""
    keys: str | None = None
    """Column that holds a list of keys of the texts, such as A, B, C; the label is then one of them."""
    first: int = 0
    """Index of the first text."""
    right: str | None = None
    """Column that holds the right texts themselves; there may be several."""
    beginning: Field | None = None
    """Text before each choice."""
    ending: Field | None = None
    """Text after each choice."""
    count: int | None = None
    """Number of choices of a row; rows with another number are left out."""

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that the choices are read from."""
        named = [c for f in (*self.texts, self.beginning, self.ending) if f is not None for c in f.columns]
        return (*named, *(c for c in (self.label, self.keys, self.right) if c is not None))


@dataclass(frozen=True)
class Template:
    """One wording of the task."""

    prompt: str
    target: str = "{answer}"
    inverted: bool = False
    """Whether the target is not the answer, but e.g. the question; there are no choices and references then."""
    options: bool = True
    """Whether choices are listed after the prompt, where there are any."""


@dataclass(frozen=True)
class HubDataset:
    """A data set on the hub that loads without code."""

    id: str
    config: str | None = None
    revision: str | None = None
    files: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Split at the source -> paths or globs in the repository, where its own settings do not say them."""


@dataclass(frozen=True)
class SplitPart:
    """A split at the source, or a part of it: `validation`, `train[:90%]`, `train[-200:]`."""

    name: str
    start: str = ""
    stop: str = ""

    @property
    def whole(self) -> bool:
        """Whether the part is the whole split."""
        return not (self.start or self.stop)

    def cut(self, rows: int) -> tuple[int, int]:
        """First row of the part and one past its last, of `rows` in the split; percentages round down."""

        def row_at(text: str, default: int) -> int:
            if not text:
                return default
            value = int(text.removesuffix("%"))
            value = rows * value // 100 if text.endswith("%") else value
            return min(max(value + rows if text.startswith("-") else value, 0), rows)

        return row_at(self.start, 0), row_at(self.stop, rows)

    def __str__(self) -> str:
        return self.name if self.whole else f"{self.name}[{self.start}:{self.stop}]"


@dataclass(frozen=True)
class TaskFile:
    """A task, read from its file and checked."""

    name: str
    about: str
    path: str
    """Path of the YAML file, for errors and for relative `files`."""
    clusters: tuple[str, ...]
    flan: str | None
    """Name among the 62 data sets of FLAN; None where it is not one of them."""
    hub: HubDataset | None
    files: Mapping[str, tuple[str, ...]]
    """Split -> files beside the YAML, or addresses; several are read one after the other."""
    url: str | None
    """Page to get the rows from, where no hub id or file can be loaded."""
    splits: Mapping[str, SplitPart]
    fields: Mapping[str, Field]
    labels: Labels | None
    choices: Choices | None
    references: Field | None
    keywords: Field | None
    """Field of the words that an answer has to use."""
    max_chars: Mapping[str, int]
    """Column -> characters; rows with a longer text are left out."""
    cap: int | None
    """Number of rows kept of the train split, from the first; None keeps all."""
    metrics: tuple[str, ...]
    """Metrics of generated answers (`kd.evaluation.answers.answer_metrics`), and `accuracy` where there are choices."""
    example: Mapping[str, Any]
    """A made-up row, which shows the templates."""
    templates: tuple[Template, ...]
    target: Field | None = None
    """The answer to learn, where it is in another column than the references."""
    where: Mapping[str, str] = field(default_factory=dict)
    """Column -> regular expression; rows in which it is not found are left out."""
    where_not: Mapping[str, str] = field(default_factory=dict)
    """Column -> regular expression; rows in which it is found are left out."""
    differs: tuple[str, ...] = ()
    """Fields that must differ from the answer; rows in which one is the answer are left out."""
    shuffle: int | None = None
    """Seed of the order of the rows, before parts are cut and the cap counts; None keeps the source's order."""
    explode: tuple[str, ...] = ()
    """Columns that hold lists of one length: each item becomes an example of its own."""
    flan_splits: Mapping[str, SplitPart] = field(default_factory=dict)
    """The splits of FLAN's mixtures, where they are others than `splits`."""
    flan_protocol: bool = False
    """Whether `splits` are those of FLAN; rows are then called by their split at the source."""
    rows: Mapping[str, int] = field(default_factory=dict)
    """Split at the source -> number of its rows, as its authors or the hub say."""
    licence: str | None = None
    """Licence of the rows, as far as it is known."""
    sure: str | None = None
    """How sure the facts about the source are: A seen in a public source, B seen once or indirectly, C not seen."""
    made: str | None = None
    """Name of the rule that makes the rows (`kd.data.demo.mini_flan`); None where they come from a file or the hub."""

    @property
    def has_choices(self) -> bool:
        """Whether the answer is one of several texts."""
        return self.labels is not None or self.choices is not None

    @property
    def title(self) -> str:
        """The task by cluster and name, e.g. `translation: wmt14_enfr`, for prompts that hold no instruction."""
        return ": ".join((*(c.replace("_", " ") for c in self.clusters[:1]), self.name))

    @property
    def choice_label(self) -> str | None:
        """The column that says which choice is right; None where the answer is free text or is given as text."""
        return self.labels.column if self.labels else self.choices.label if self.choices else None

    @property
    def columns(self) -> tuple[str, ...]:
        """The top-level columns a row must have, sorted."""
        names = {c for field in self.fields.values() for c in field.columns} | set(self.max_chars)
        if self.labels is not None:
            names.add(self.labels.column)
        if self.choices is not None:
            names |= set(self.choices.columns)
        names |= {*self.where, *self.where_not, *self.explode}
        for other in (self.keywords, self.target):
            names |= set(other.columns if other is not None else ())
        if self.references is not None:
            names |= {*self.references.columns, *([self.references.group] if self.references.group else [])}
        return tuple(sorted({name.partition(".")[0] for name in names}))
