"""Options that several commands share, and the parsers of their values."""

from __future__ import annotations

from collections.abc import Callable, Mapping
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


def parse_floats(_: click.Context, __: click.Parameter, value: str | None) -> tuple[float, ...] | None:
    try:
        return None if value is None else tuple(float(v) for v in value.split(","))
    except ValueError as error:
        raise click.BadParameter("expected numbers separated by commas, e.g. 1,2,4") from error


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


def parse_part(_: click.Context, __: click.Parameter, value: str) -> tuple[int, int]:
    index, _sign, count = value.partition("/")
    if not (index.isdigit() and count.isdigit()):
        raise click.BadParameter("expected I/N, e.g. 2/8")
    return int(index), int(count)


def parse_template(_: click.Context, __: click.Parameter, value: str) -> str | int:
    return int(value) if value.lstrip("-").isdigit() else value


RECORDED = "kd.options"
"""In a context's meta: the options that were given, as they were spelled."""


class RecordedCommand(click.Command):
    """A command that knows which options it was given, so that it can be given them again."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        values, _, _ = self.make_parser(ctx).parse_args(list(args))
        ctx.meta[RECORDED] = {str(name): value for name, value in values.items() if isinstance(value, str | bool)}
        return super().parse_args(ctx, args)

    def spelled(self, options: Mapping[str, Any]) -> list[str]:
        """What was recorded, as arguments."""
        words = []
        for param in self.params:
            value = options.get(param.name or "")
            if value is None:
                continue
            word = param.secondary_opts[0] if value is False else param.opts[0]
            words.append(word if isinstance(value, bool) else f"{word}={value}")
        return words


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


def build_options(function: Function) -> Function:
    """Options that `plan` and `build` share."""
    options = (
        click.option(
            "--teacher",
            required=True,
            help="Hub id, folder, demo, demo-t5, or random:NAME; a classifier with --data glue/TASK.",
        ),
        click.option(
            "--data",
            "spec",
            required=True,
            help="demo, wikitext-2, flan[:MIXTURE], glue/TASK, a file or folder, or hub id[:config][@revision].",
        ),
        click.option("--out", required=True, type=PATH, help="Directory of the cache."),
        corpus_options,
        click.option(
            "--profile", default="kl", show_default=True, help="What is kept: kl, compact, uld, sampled or full."
        ),
        click.option("--top-k", type=int, help="Tokens kept per row; the profile's own number by default."),
        click.option("--samples", type=int, help="Draws from p per row (profiles sampled, full)."),
        click.option("--tail-bands", type=int, help="Rank bands beyond k (profiles uld, full)."),
        click.option(
            "--temperatures",
            callback=parse_floats,
            default="1,2,4",
            show_default=True,
            help="Temperatures whose exact normaliser is stored.",
        ),
        click.option(
            "--band-temperatures", callback=parse_floats, help="Temperatures whose rank bands are stored; 1 by default."
        ),
        click.option(
            "--logprob-codec",
            help="graded, graded-fine, graded-coarse, linear8, float16 or float32; the profile's own by default.",
        ),
        click.option(
            "--seq-len",
            type=int,
            help="Tokens per block, context included; 512, or the teacher's window if smaller. Of an encoder: 1024.",
        ),
        click.option(
            "--targets",
            "target_source",
            default="data",
            show_default=True,
            help="data, or teacher: it answers the prompts (--columns prompt=… is enough), and its answers are scored.",
        ),
        click.option(
            "--sample-temperature",
            type=float,
            default=0.0,
            show_default=True,
            help="Sample the teacher's answers at this temperature; 0 = greedy.",
        ),
        click.option(
            "--target-len", type=int, help="Most tokens of a target, EOS included; 256 for an encoder-decoder."
        ),
        click.option(
            "--overlong",
            default="error",
            show_default=True,
            help="error, drop or truncate: prompt/target pairs that are too long.",
        ),
        click.option("--stride", type=int, help="New tokens scored per block; seq-len - 1 by default."),
        click.option("--bos/--no-bos", default=True, show_default=True, help="Open documents and prompts with BOS."),
        click.option(
            "--eos/--no-eos", default=False, show_default=True, help="Score an EOS token after each document."
        ),
        click.option("--separator", default="\\n", show_default=True, help="Text between prompt and target of a pair."),
        click.option(
            "--load-in-4bit", is_flag=True, help="Load the teacher in nf4 with double quantisation (bitsandbytes)."
        ),
        click.option("--dtype", default="auto", show_default=True, help="auto, float32, bfloat16 or float16."),
        click.option("--device", default="auto", show_default=True, help="auto, cpu or cuda."),
        click.option("--revision", help="Branch, tag or commit of a hub teacher."),
        click.option("--tokenizer", help="Folder or hub id, where the tokenizer is not beside the teacher."),
        click.option(
            "--tokens-per-batch",
            type=click.IntRange(min=1),
            help="Tokens per forward pass, padding included; halved on out-of-memory. Default: 4096; on a CPU 512 "
            "per side, with a batch on each thread.",
        ),
        click.option("--shard-rows", type=click.IntRange(min=1), help="Rows per shard; 32768 by default."),
        click.option(
            "--shard",
            callback=parse_part,
            default="1/1",
            show_default=True,
            metavar="I/N",
            help="Build every N-th shard, starting with the I-th; all parts into one --out, which all machines see.",
        ),
        click.option("--seed", type=int, default=0, show_default=True, help="Of draws and of random weights."),
        json_option,
    )
    for option in reversed(options):
        function = option(function)
    return function


def running_options(function: Function) -> Function:
    """How a build runs: what else may fill it, who does it, what is told of it. None of these changes a value."""
    options = (
        click.option(
            "--extend",
            type=PATH,
            metavar="CACHE",
            help="A cache of the beginning of this text: its shards are copied, the teacher runs over the rest.",
        ),
        click.option(
            "--reuse/--no-reuse",
            default=True,
            show_default=True,
            help="Copy a cache of this fingerprint where one was finished on this machine (kd cache ls).",
        ),
        click.option(
            "--workers",
            type=click.IntRange(min=1),
            default=1,
            show_default=True,
            help="Builders at once: a GPU each, or a share of the processors.",
        ),
        click.option(
            "--engine",
            default="local",
            show_default=True,
            help="local: processes of this machine; ray: tasks of the cluster that RAY_ADDRESS names.",
        ),
        click.option("--profile-build", is_flag=True, help="Say where the time went."),
    )
    for option in reversed(options):
        function = option(function)
    return function
