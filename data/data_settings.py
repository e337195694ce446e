"""Settings of a text: which source, which part of it, and how instruction tasks become prompts and targets.

`kd data`, `kd cache` and `kd eval` have these options in common. This module imports nothing heavy, because the command
line reads it to print its help.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from kd.common.errors import DataError, unknown_name
from kd.common.settings import check, setting
from kd.data.rows.row_reading import AUTO, FORMATS

EACH = "each"
"""Template choice that asks a row in every template that asks for its answer."""
TEMPLATE_CHOICES = ("random", "round-robin", EACH)
BOTH = "both"
"""Value of `labels` that asks an evaluation to score each wording."""


def columns_from(text: str) -> dict[str, str]:
    """`prompt=question,target=answer` as a mapping. Raises ValueError."""
    pairs = [item.partition("=") for item in text.split(",")] if text else []
    if any(not name or not sign or not column for name, sign, column in pairs):
        raise ValueError("FIELD=COLUMN,…, e.g. prompt=question,target=answer")
    return {name.strip(): column.strip() for name, _, column in pairs}


def limits_from(text: str) -> dict[str, int]:
    """`xsum=200,coqa=200` as a mapping. Raises ValueError."""
    items = [item.partition("=") for item in text.split(",") if item.strip()]
    pairs = [(name.strip(), number.strip()) for name, _, number in items]
    if not pairs or any(not name or not number.isdigit() for name, number in pairs):
        raise ValueError("TASK=N,…, e.g. xsum=200,coqa=200")
    if len(dict(pairs)) < len(pairs):
        raise ValueError("each task once")
    return {name: int(number) for name, number in pairs}


def template_from(text: str) -> str | int:
    """A template choice or a template number; an unknown choice is refused by `InstructionConfig`."""
    return int(text) if text.lstrip("-").isdigit() else text


@dataclass(frozen=True)
class InstructionConfig:
    """How rows of instruction tasks become text; whatever changes a text shows in the corpus digest."""

    template: Literal["random", "round-robin", "each"] | int = setting(
        "random", metavar="random|round-robin|each|INDEX", parse=template_from
    )
    """Template for each example of an instruction task: random (seeded), round-robin, or a template number from 0. With each, every
    row is asked in each of its task's templates but the inverted ones, and scores are means over templates."""
    options: bool | None = None
    """Whether instruction tasks list the choices after the prompt. By default, those that have choices list them."""
    labels: Literal["original", "flan", "both"] = "original"
    """Wording of an instruction task's fixed labels: original (the reference systems') or flan. Only the task choices of
    kd eval accepts both, and scores each."""
    task_root: Path | None = setting(None, metavar="DIR")
    """Folder with the rows of instruction tasks as TASK/SPLIT.jsonl, .csv, .tsv or .parquet. By default they are read
    from the hub."""
    max_per_task: int | None = setting(None, metavar="N", minimum=1)
    """Number of rows kept of each instruction task: the first N, or drawn ones where the first N have other labels than all rows,
    because these are in the order of their labels. By default a mixture's own number in the split train, and all rows in
    other splits."""
    mix_maximum: int | None = setting(None, metavar="N", minimum=1)
    """Draw from each instruction task in proportion to min(rows, N); FLAN uses 3000. By default every example is used
    once."""
    mix_draws: int | None = setting(None, metavar="N", minimum=1)
    """Number of examples drawn from a mixture with --mix-maximum. By default the sum of min(rows, maximum) over the
    tasks."""
    data_seed: int = 0
    """Seed of the instruction tasks' templates, order and draws."""
    first_templates: int | None = setting(None, metavar="N", minimum=1)
    """Number of templates that are used of each instruction task, from the first. By default all."""
    tasks_per_cluster: int | None = setting(None, metavar="N", minimum=1)
    """Number of tasks that are used of each cluster of flan:all, flan:clusters=… or flan:all-but=…: the first ones in the order of
    FLAN's code. By default all."""
    task_prompt: Literal["template", "name", "bare"] = "template"
    """What stands around the inputs of an instruction task: template, name (only the task's cluster and name), or
    bare (nothing). FLAN's ablation of the role of instructions compares them."""
    skip_missing: bool = False
    """Go on without the instruction tasks of a mixture whose rows cannot be loaded, and say which they are. By default, all of them
    are named in one error."""
    task_limits: Mapping[str, int] | None = setting(None, metavar="TASK=N,…", parse=limits_from)
    """Number of rows kept of single tasks, in place of --max-per-task: xsum=200,coqa=200."""

    def __post_init__(self) -> None:
        template: object = self.template
        if isinstance(template, str) and template not in TEMPLATE_CHOICES:
            raise unknown_name("template choice", template, TEMPLATE_CHOICES, try_="an index from 0")
        check(self)
        if self.mix_draws is not None and self.mix_maximum is None:
            raise DataError("draws need a rate maximum", try_="--mix-maximum 3000")
        for task, limit in (self.task_limits or {}).items():
            if type(limit) is not int or limit < 1:
                raise DataError("the limit of a task must be at least 1", found=f"--task-limits {task}={limit}")

    def limit_of(self, task: str) -> int | None:
        """Rows kept of one task by the user's numbers; None where they say nothing of it."""
        return (self.task_limits or {}).get(task, self.max_per_task)

    def provenance(self) -> dict[str, str]:
        """The settings as text, for `Corpus.source`; the folder's path is left out."""
        return {
            "template": str(self.template),
            "options": {None: "where there are choices", True: "yes", False: "no"}[self.options],
            "labels": self.labels,
            "max_per_task": "default" if self.max_per_task is None else str(self.max_per_task),
            "mix_maximum": "none" if self.mix_maximum is None else str(self.mix_maximum),
            "mix_draws": "default" if self.mix_draws is None else str(self.mix_draws),
            "seed": str(self.data_seed),
        } | {name: str(value) for name, value in self._newer().items()}

    def _newer(self) -> dict[str, object]:
        """Settings that older caches do not name: they are named where they are not what they always were."""
        set_values: dict[str, object] = {}
        if self.first_templates is not None:
            set_values["first_templates"] = self.first_templates
        if self.tasks_per_cluster is not None:
            set_values["tasks_per_cluster"] = self.tasks_per_cluster
        if self.task_prompt != "template":
            set_values["task_prompt"] = self.task_prompt
        if self.task_limits:
            set_values["task_limits"] = ", ".join(f"{task} {n}" for task, n in sorted(self.task_limits.items()))
        return set_values


@dataclass(frozen=True)
class RowSettings:
    """Which rows of a file or hub data set are used, where their prompts are written already and a column names their task."""

    only: Mapping[str, str] | None = setting(None, metavar="COLUMN=VALUE,…", parse=columns_from)
    """Use only the rows of a file or hub data set that hold this value in this column; several values have | between them."""
    held_out: str | None = setting(None, metavar="CLUSTER,…")
    """Clusters of FLAN whose rows are left out, with those that are excluded together with them. For --columns with task=COLUMN; in
    flan:… the mixture's name says it (flan:all-but=CLUSTER)."""
    task_map: Path | None = setting(None, metavar="FILE")
    """YAML file that tells what the names in the column of tasks are: name: task, data set of FLAN or cluster (none: of no
    cluster). FLAN's own names are known."""

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True)
class DataSettings:
    """A text, where a command can do without one; `RequiredDataSettings` where it cannot."""

    spec: str | None = setting(None, flag="--data", metavar="SPEC", multiple=True)
    """Text to use: demo, mini, mini-open, mini-chat, wikitext-2, flan[:MIXTURE], mini-flan[:MIXTURE], glue/TASK, a file,
    folder or glob, on this disk or at s3://BUCKET/PATH, several of these between commas, or hub-id[:config][@revision]. May
    be repeated for several files."""
    split: str | None = None
    """Split of the text. By default train. Instruction tasks have train, dev and test. Files have none but the one that their names
    tell."""
    columns: Mapping[str, str] | None = setting(None, metavar="FIELD=COLUMN,…", parse=columns_from)
    """Columns of a file or hub data set, where they are not called as their field is: text=COLUMN, or
    prompt=COLUMN,target=COLUMN, or messages=COLUMN, and id=COLUMN. With task=COLUMN, pairs belong to the task that the column
    names: --max-per-task, --mix-maximum and --held-out then work as for flan:…."""
    format: str = setting(AUTO, choices=(AUTO, *FORMATS))
    """What the rows of a file or hub data set are. auto sees it by the columns; text and pairs come before conversations."""
    bad_rows: Literal["error", "skip"] = "error"
    """What happens to rows that cannot be read, and in a build to conversations that the template refuses: error stops, skip
    leaves them out and counts them."""
    limit: int | None = setting(None, minimum=1)
    """Number of documents, pairs or conversations to use: the first N, or drawn ones where the first N have other labels
    than the whole text, because it is in the order of its labels. By default all."""
    instructions: InstructionConfig = field(default_factory=InstructionConfig)
    """How instruction tasks become text."""
    rows: RowSettings = field(default_factory=RowSettings)
    """Which rows of a file or hub data set are used."""

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True)
class RequiredDataSettings(DataSettings):
    """A text that must be given."""

    spec: str = setting(flag="--data", metavar="SPEC", multiple=True)
    """Text to use: demo, mini, mini-open, mini-chat, wikitext-2, flan[:MIXTURE], mini-flan[:MIXTURE], glue/TASK, a file,
    folder or glob, on this disk or at s3://BUCKET/PATH, several of these between commas, or hub-id[:config][@revision]. May
    be repeated for several files."""
