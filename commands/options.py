"""Options that several commands share, and the parsers of their values."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any, TypeVar, cast

import click

Function = TypeVar("Function", bound=Callable[..., Any])
PATH = click.Path(path_type=Path)

json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")


def parse_columns(_: click.Context, __: click.Parameter, value: str | None) -> dict[str, str]:
    pairs = [item.partition("=") for item in value.split(",")] if value else []
    if any(not field or not sign or not column for field, sign, column in pairs):
        raise click.BadParameter("expected FIELD=COLUMN,…, e.g. prompt=question,target=answer")
    return {field.strip(): column.strip() for field, _, column in pairs}


def parse_bytes(_: click.Context, __: click.Parameter, value: str | None) -> int | None:
    from kd.common.byte_sizes import byte_count
    from kd.common.errors import DataError

    try:
        return None if value is None else byte_count(value)
    except DataError as error:
        raise click.BadParameter("expected a size, e.g. 20GB or 512MiB") from error


def parse_range(_: click.Context, __: click.Parameter, value: str | None) -> tuple[int, int] | None:
    if value is None:
        return None
    first, sign, stop = value.partition(":")
    if not (sign and first.isdigit() and stop.isdigit()):
        raise click.BadParameter("expected A:B, e.g. 0:1000")
    return int(first), int(stop)


def unescaped(text: str) -> str:
    return text.replace("\\n", "\n").replace("\\t", "\t")


def parse_template(_: click.Context, __: click.Parameter, value: str) -> str | int:
    return int(value) if value.lstrip("-").isdigit() else value


def instruction_options(function: Function) -> Function:
    """How tasks become text; the function gets one `instructions`, an `InstructionConfig`."""

    @wraps(function)
    def gathered(
        *arguments: Any,
        template: str | int,
        options: bool | None,
        labels: str,
        task_root: Path | None,
        max_per_task: int | None,
        mix_maximum: int | None,
        mix_draws: int | None,
        data_seed: int,
        **rest: Any,
    ) -> Any:
        from kd.common.settings import make
        from kd.data.data_settings import InstructionConfig

        given = {"template": template, "options": options, "labels": labels, "task_root": task_root}
        mixing = {"max_per_task": max_per_task, "mix_maximum": mix_maximum, "mix_draws": mix_draws}
        config = make(InstructionConfig, given | mixing | {"data_seed": data_seed})
        return function(*arguments, instructions=config, **rest)

    decorated: Any = gathered
    for option in (
        click.option(
            "--data-seed", type=int, default=0, show_default=True, help="Tasks: of templates, order and draws."
        ),
        click.option(
            "--mix-draws",
            type=click.IntRange(min=1),
            metavar="N",
            help="Tasks: draws of a mixture with a maximum; sum of min(rows, maximum) by default.",
        ),
        click.option(
            "--mix-maximum",
            type=click.IntRange(min=1),
            metavar="N",
            help="Tasks: draw in proportion to min(rows, N) (FLAN: 3000), instead of every example once.",
        ),
        click.option(
            "--max-per-task",
            type=click.IntRange(min=1),
            metavar="N",
            help="Tasks: first N rows of each; for train the mixture's own number by default.",
        ),
        click.option(
            "--task-root",
            type=PATH,
            metavar="DIR",
            help="Tasks: DIR/TASK/SPLIT.jsonl, .csv, .parquet, instead of the hub.",
        ),
        click.option(
            "--labels",
            default="original",
            show_default=True,
            help="Tasks: wording of fixed labels, original or flan; for kd eval --tasks choices also both, each scored.",
        ),
        click.option(
            "--options/--no-options",
            default=None,
            help="Tasks: list the choices after the prompt; by default where there are any.",
        ),
        click.option(
            "--template",
            default="random",
            show_default=True,
            callback=parse_template,
            metavar="random|round-robin|INDEX",
            help="Tasks: which wording an example gets; random (seeded), round-robin, or one of them.",
        ),
    ):
        decorated = option(decorated)
    return cast(Function, decorated)


def corpus_options(function: Function) -> Function:
    """--data and what belongs to it."""
    function = instruction_options(function)
    for option in (
        click.option("--limit", type=click.IntRange(min=1), help="Use the first N documents or pairs."),
        click.option(
            "--columns", callback=parse_columns, help="Where names differ: text=…, or prompt=…,target=…, and id=…."
        ),
        click.option("--split", help="Split of the source; train by default. Tasks: train, dev or test."),
    ):
        function = option(function)
    return function
