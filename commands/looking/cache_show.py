"""kd cache show: look into a cache."""

from __future__ import annotations

import click

from kd.cache_builder.look.show_settings import ShowSettings
from kd.commands.terminal.console import emit_json, outcome, say, say_shaded, shades_are_seen
from kd.commands.terminal.options import json_option
from kd.commands.terminal.settings_options import SettingsCommand, settings_options
from kd.common.progress import final


@click.command("show", cls=SettingsCommand)
@click.argument("path", metavar="CACHE")
@click.argument("example", type=click.IntRange(min=0), required=False)
@settings_options(ShowSettings)
@json_option
def cache_show(path: str, example: int | None, settings: ShowSettings, as_json: bool) -> None:
    """Show a cached text with every token shaded by the teacher's entropy, and what the teacher said of some tokens.

    CACHE is a path, a URL or the beginning of a fingerprint, EXAMPLE a number from 0. Without EXAMPLE the first one is
    shown, or the whole cache is asked: --uncertain, --surprising, --search, --compare.

    Example: kd cache show runs/cache 0 --token 5
    """
    from kd.cache_builder.look.shown_lines import pieces_of
    from kd.cache_builder.showing import show_steps

    steps = show_steps(path, example, settings)
    view = outcome("reading", steps) if settings.compare or (example is None and settings.question) else final(steps)
    if as_json:
        emit_json(view.document)
        return
    say_shaded(pieces_of(view, shaded=shades_are_seen()))
    if settings.html is not None:
        say(f"written: {settings.html}", err=True)
