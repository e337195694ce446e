"""`CacheView`: what `kd cache show` has found in a cache: one example, or the rows that answer a question."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from kd.cache_builder.look.example_view import ExampleView, view_example
from kd.cache_builder.look.find_rows import FoundRow, FoundText, examples_with, surprising_rows, uncertain_rows
from kd.cache_builder.look.show_settings import ShowSettings
from kd.cache_builder.look.shown_lines import plain_text
from kd.cache_builder.look.token_views import TokenView, token_views
from kd.cache_builder.look.viewed import FoundView, ViewedCache
from kd.cache_builder.store.cache_files import bytes_below
from kd.cache_builder.store.profiles import PROFILES
from kd.cache_builder.store.readers.description import facts
from kd.cache_builder.store.readers.reader import CacheReader
from kd.common.errors import DataError
from kd.common.progress import Progress
from kd.common.shown_text import masked

PICKED = 3
"""Tokens of an example that are shown in detail, where none was asked for."""
AROUND = 24
"""Tokens before and after a found one that are shown with it."""
CHARACTERS = 60
"""Characters before and after a searched text that are shown with it."""


class CacheView(ViewedCache):
    """What was found in a cache. It prints as text; `document` holds the same for programs."""

    def __repr__(self) -> str:
        return plain_text(self)


def view_cache(reader: CacheReader, number: int | None, settings: ShowSettings) -> Iterator[Progress[CacheView]]:
    """Look into a cache; the last record carries what was found. Raises KdError.

    number   the example; None for the whole cache
    """
    manifest = reader.manifest
    shown: dict[str, Any] = {
        "path": str(reader.root),
        "facts": facts(manifest, bytes_below(reader.root), reader.top_k),
        "notes": notes_on(reader),
        "question": settings.question,
    }
    if number is not None and settings.search is not None:
        raise DataError("a text is searched in the whole cache", found=f"--search and example {number}")
    if number is None and settings.question is None:
        first = manifest.shards[reader.shards[0]][0]
        example = view_example(reader, first, reader.vocabulary(), settings.top)
        yield Progress(1, 1, CacheView(**shown, example=example, picked=_picked(example, settings), first_view=True))
    elif number is not None:
        example = view_example(reader, number, reader.vocabulary(), settings.top)
        yield Progress(1, 1, CacheView(**shown, example=example, picked=_picked(example, settings)))
    elif settings.search is not None:
        for step in examples_with(reader, settings.search, settings.limit):
            yield Progress(step.done, step.total)
        assert step.result is not None
        hits = _places(reader, settings.search, step.result)
        yield Progress(step.total, step.total, CacheView(**shown, found=hits, total=step.result.total))
    else:
        asked = settings.uncertain or settings.surprising or 0
        look = surprising_rows if settings.uncertain is None else uncertain_rows
        for one in look(reader, asked):
            yield Progress(one.done, one.total)
        rows = _rows_around(reader, one.result or [], settings.top)
        yield Progress(one.total, one.total, CacheView(**shown, found=rows, total=one.total))


def notes_on(reader: CacheReader) -> list[str]:
    """What this cache, or this copy of it, cannot say."""
    manifest, kept = reader.manifest, PROFILES[reader.config.profile]
    held = {a.name for a in manifest.arrays} if reader.part is None else {*reader.part.arrays}
    unknown = (manifest.provenance.get("imported") or {}).get("unknown", [])
    said = {
        "This copy holds a part of the cache: other examples, or other arrays, are not here.": reader.part is not None,
        "The log-probabilities of the kept tokens are not in this copy.": bool(kept.top_k) and "logprobs" not in held,
        f"Profile {reader.config.profile} holds no ids of the most probable tokens, so they have no names.": not kept.ids,
        "Draws are kept in place of the most probable tokens. The bounds of the entropy follow from the probability of the "
        "most probable token alone.": not kept.top_k,
        "The teacher gave log-probabilities at temperature 1, and no logits: there is no other temperature.": (
            manifest.logprobs_only
        ),
        "Nobody knows the probability beyond the kept tokens: theirs sum to 1, and the entropy is that of the kept ones "
        "alone.": manifest.tail_unknown,
        "Of a token of the text that is not among the kept ones, the probability is an upper bound and the rank a lower "
        "one.": manifest.gold_in_top_k,
        "The source did not say the text. It is spelled from the token ids.": any(
            str(one).startswith("text ") for one in unknown
        ),
    }
    return [sentence for sentence, is_so in said.items() if is_so]


def _picked(example: ExampleView, settings: ShowSettings) -> list[TokenView]:
    if settings.token is not None:
        return [example.token(settings.token)]
    if settings.surprising is not None:
        return example.surprising(settings.surprising)
    return example.uncertain(settings.uncertain or PICKED)


def _rows_around(reader: CacheReader, rows: Sequence[FoundRow], top: int) -> list[FoundView]:
    """The found rows with the tokens around them. Examples are read in their order, each shard once."""
    vocabulary, views = reader.vocabulary(), dict[FoundRow, FoundView]()
    for row in sorted(rows, key=lambda one: (one.example, one.token)):
        example = reader[row.example]
        first = max(0, row.token - AROUND)
        window = range(first, min(len(example.targets), row.token + AROUND + 1))
        around = token_views(example, reader.manifest, vocabulary, top, window)
        offset = row.token - first
        before, after = ("".join(t.text for t in part) for part in (around[:offset], around[offset + 1 :]))
        if first == 0 and not before:
            before = masked(example.prompt)[-CHARACTERS:]
        token = around[offset]
        views[row] = FoundView(row.example, example.id, before, token.text, after, token, around)
    return [views[row] for row in rows]


def _places(reader: CacheReader, wanted: str, hits: FoundText) -> list[FoundView]:
    """The first place of the text in each example."""
    views = []
    for number in hits.examples:
        example = reader[number]
        text = next(t for t in (example.target, example.prompt) if wanted.casefold() in t.casefold())
        start = text.casefold().find(wanted.casefold())
        if len(text.casefold()) != len(text):  # letters that fold to several, such as ß: places differ
            start = next(i for i in range(len(text)) if text[i:].casefold().startswith(wanted.casefold()))
        hidden, stop = masked(text), start + len(wanted)
        before, after = hidden[max(0, start - CHARACTERS) : start], hidden[stop : stop + CHARACTERS]
        views.append(FoundView(number, example.id, before, hidden[start:stop], after))
    return views
