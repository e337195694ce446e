"""Command-line options made from a settings class: one per setting, and `--config` for a file of them.

    @click.command(cls=SettingsCommand)
    @settings_options(TrainSettings)
    def train(settings: TrainSettings) -> None: ...

Names, types, choices, defaults and help texts are those of `kd.common.settings`. An option that is given overrides the
file; a setting that neither names keeps its default.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Collection
from functools import wraps
from pathlib import Path
from typing import Any, TypeVar, get_origin

import click

from kd.commands.terminal.options import PATH
from kd.commands.terminal.output_options import NAMES
from kd.common.errors import DataError
from kd.common.setting_fields import group_headings, settings_of
from kd.common.setting_values import Setting, as_text
from kd.common.settings import MissingSettings, flat, flattened, make

T = TypeVar("T")
GIVEN = "kd.given"
"""In a `RecordingCommand`'s context: option -> the text that was typed, or true or false for a switch.

Settings of a `--config` file are among them, as one would type them."""


class SettingsCommand(click.Command):
    """A command whose help lists its options under headings, by the group of settings that they belong to."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Called by click."""
        under: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None:
                under.setdefault(getattr(parameter, "heading", "Other options"), []).append(record)
        for heading, records in under.items():
            with formatter.section(heading):
                formatter.write_dl(records)


class HeadedOption(click.Option):
    """An option that knows under which heading it is listed."""

    def __init__(self, *arguments: Any, heading: str, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.heading = heading


class RecordingCommand(SettingsCommand):
    """A command that notes in its context, under `GIVEN`, which options were given and what was typed for them."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Called by click."""
        values, _, _ = self.make_parser(ctx).parse_args(list(args))
        given = {str(name): as_text(value) if isinstance(value, list) else value for name, value in values.items()}
        ctx.meta[GIVEN] = {
            name: value for name, value in given.items() if isinstance(value, str | bool) and name not in NAMES
        }
        return super().parse_args(ctx, args)


class NamedChoice(click.Choice[str]):
    """One of a setting's names. Another text is an error that names the nearest of them."""

    def __init__(self, one: Setting) -> None:
        super().__init__(one.choices)
        self.hint = one.hint

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Called by click."""
        if isinstance(value, str) and value not in self.choices:
            nearest = difflib.get_close_matches(value, self.choices, n=1, cutoff=0.5)
            advice = self.hint or (f"did you mean {nearest[0]!r}?" if nearest else "")
            expected = ", ".join(map(repr, self.choices))
            self.fail(f"{value!r} is not one of {expected}." + (f" {advice}" if advice else ""), param, ctx)
        return super().convert(value, param, ctx)


class Parsed(click.ParamType[Any]):
    """A value that the setting itself reads from text."""

    def __init__(self, one: Setting) -> None:
        self.one = one
        self.name = one.metavar or "text"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Called by click."""
        try:
            return self.one.checked(value, typed=True)
        except DataError as error:
            if (
                Path in self.one.kinds
            ):  # where to write is no matter of usage: the whole error is shown, as for other paths
                raise
            expected = error.details.get("expected") or error.details.get("known")
            nearest = error.details.get("did you mean")
            said = f"{value!r}: {error.headline}" + (f"; expected {expected}" if expected else "")
            self.fail(said + (f"; did you mean {nearest!r}?" if nearest else ""), param, ctx)


def settings_options(
    cls: type, *, leave_out: Collection[str] = (), config: bool = True, argument: str = "settings"
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Options for every setting of `cls`; the command gets one value of `cls`, as `argument`.

    leave_out   settings that the command sets itself; they must have defaults
    """
    shown = [one for one in settings_of(cls).values() if one.name not in leave_out and not one.hidden]
    headings = group_headings(cls)

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def gathered(*arguments: Any, **options: Any) -> Any:
            settings: Any = take_settings(cls, options, leave_out=leave_out)
            return function(*arguments, **{argument: settings}, **options)

        decorated: Callable[..., Any] = gathered
        if config:
            decorated = click.option(
                "--config",
                "config_file",
                type=PATH,
                metavar="FILE",
                help="YAML or JSON file with these settings; options override it.",
            )(decorated)
        for one in reversed(shown):
            heading = headings[one.path[:-1]]
            decorated = click.option(*declaration(one), cls=HeadedOption, heading=heading, **attributes(one))(decorated)
        return decorated

    return decorate


def take_settings(cls: type[T], options: dict[str, Any], *, leave_out: Collection[str] = ()) -> T:
    """Settings of a command's parsed options and its `--config` file; both are taken out of `options`.

    Raises DataError, and click.UsageError where a setting without a default is missing.
    """
    from kd.common.strangers.yaml_file import read_settings

    shown = [one for one in settings_of(cls).values() if one.name not in leave_out and not one.hidden]
    given = {one.name: value for one in shown if _is_given(one, value := options.pop(one.name))}
    file = options.pop("config_file", None)
    written = {} if file is None else flattened(cls, read_settings(file), where=file)
    for name in leave_out:
        if name in written:
            raise DataError("the command sets this itself", where=file, found=name)
    try:
        settings = make(cls, written | given, where=file)
    except MissingSettings as error:
        raise click.UsageError(f"Missing option: {error.details['expected']}") from error
    _note_settings_of_file(settings, written)
    return settings


def _is_given(one: Setting, value: Any) -> bool:
    """Whether the option was given: an option that may be repeated has an empty tuple where it was not."""
    return value is not None and not (one.multiple and value == ())


def _note_settings_of_file(settings: Any, names: Collection[str]) -> None:
    context = click.get_current_context(silent=True)
    if context is not None and GIVEN in context.meta:
        values = flat(settings)
        texts = {name: as_text(values[name]) for name in names if values[name] is not None}
        context.meta[GIVEN] = texts | context.meta[GIVEN]


def declaration(one: Setting) -> tuple[str, ...]:
    """How the option is spelled, and the name of its value."""
    if bool in one.kinds:
        return f"{one.option}/--no-{one.option.removeprefix('--')}", one.name
    return one.option, one.name


def attributes(one: Setting) -> dict[str, Any]:
    """What click is told about the option; without a default, so that what was given is known."""
    option_attributes: dict[str, Any] = {"default": None, "help": help_text(one), "metavar": one.metavar}
    if bool in one.kinds:
        return option_attributes
    if one.multiple:
        return option_attributes | {"multiple": True, "default": ()}
    return option_attributes | {"type": option_type(one)}


def option_type(one: Setting) -> click.ParamType[Any]:
    """The type of a setting's values, so that click refuses others before any work."""
    if one.choices and set(one.kinds) == {str}:
        return NamedChoice(one)
    plain = one.parse is None and one.typed is None and len(one.kinds) == 1 and get_origin(one.kinds[0]) is None
    bounded = one.minimum is not None or one.above is not None
    if plain and one.kinds[0] is int and one.above is None:
        return click.IntRange(min=int(one.minimum)) if one.minimum is not None else click.INT
    if plain and one.kinds[0] is float and bounded:
        return click.FloatRange(min=one.above if one.minimum is None else one.minimum, min_open=one.minimum is None)
    if plain and one.kinds[0] is float:
        return click.FLOAT
    if plain and one.kinds[0] is Path:
        return PATH  # the setting itself refuses a file where a folder is wanted
    if plain and one.kinds[0] is str:
        return click.STRING
    return Parsed(one)


def help_text(one: Setting) -> str:
    """The setting's docstring, and its default."""
    if one.required:
        return f"{one.doc} [required]"
    shown = one.shown
    if shown is None and one.default is not None and one.default != "" and one.default != ():
        shown = _spelled(one.default)
    return one.doc if not shown else f"{one.doc.rstrip('.')}. [default: {shown}]"


def _spelled(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, tuple | list):
        return ",".join(_spelled(v) for v in value)
    return str(value).encode("unicode_escape").decode() if isinstance(value, str) else str(value)
