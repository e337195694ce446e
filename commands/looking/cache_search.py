"""kd cache search: find caches that others have shared."""

from __future__ import annotations

import re
from dataclasses import asdict

import click

from kd.commands.terminal.console import emit_json, say
from kd.commands.terminal.options import json_option


@click.command("search")
@click.argument("where", type=click.Choice(("hf",)))
@click.option("--teacher", metavar="TEXT", help="A part of the teacher's name, in any case of letters.")
@click.option(
    "--tokenizer",
    metavar="TEXT",
    help="The beginning of a tokenizer's fingerprint, as this command lists it; or a folder or hub id of a tokenizer, which "
    "needs the extra train.",
)
@click.option("--limit", type=click.IntRange(min=1), default=50, show_default=True, help="Most caches to list.")
@json_option
def cache_search(where: str, teacher: str | None, tokenizer: str | None, limit: int, as_json: bool) -> None:
    """List caches on the Hugging Face hub (hf), by the tags of their dataset cards.

    Example: kd cache search hf --teacher llama
    """
    from kd.cache_builder.share.hub_search import search_caches

    caches = search_caches(teacher=teacher, tokenizer=_digits(tokenizer), limit=limit)
    if as_json:
        emit_json({"caches": [asdict(one) for one in caches]})
        return
    for one in caches:
        say(f"{one.url}: {one.teacher or 'unknown teacher'}, tokenizer {one.tokenizer or 'unknown'}")
    if not caches:
        say("no cache on the hub fits")


def _digits(tokenizer: str | None) -> str | None:
    """A tokenizer as the beginning of its fingerprint."""
    if tokenizer is None or re.fullmatch("[0-9a-fA-F]{4,64}", tokenizer):
        return tokenizer
    from kd.models.tokenizer import load_tokenizer, tokenizer_fingerprint

    return tokenizer_fingerprint(load_tokenizer(tokenizer))
