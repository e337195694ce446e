"""Two caches of one text side by side: the tokens at which their teachers disagree most, with both distributions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from kd.cache_builder.look.cache_view import AROUND, CHARACTERS, CacheView, notes_on
from kd.cache_builder.look.find_rows import FoundRow
from kd.cache_builder.look.show_settings import ShowSettings
from kd.cache_builder.look.token_views import token_views
from kd.cache_builder.look.two_teachers import disagreement, divergences
from kd.cache_builder.look.viewed import FoundView
from kd.cache_builder.store.cache_files import bytes_below
from kd.cache_builder.store.readers.description import facts
from kd.cache_builder.store.readers.reader import CacheReader
from kd.common.errors import DataError
from kd.common.progress import Progress
from kd.common.shown_text import masked


def compare_caches(
    ours: CacheReader, theirs: CacheReader, number: int | None, settings: ShowSettings
) -> Iterator[Progress[CacheView]]:
    """The `settings.limit` tokens that differ most, of one example or of all; the last record carries them. Raises KdError."""
    if number is not None and not 0 <= number < len(ours):
        raise DataError(
            "the cache has no such example", where=ours.root, found=f"example {number}", expected=f"0..{len(ours) - 1}"
        )
    for step in disagreement(ours, theirs, settings.limit, number):
        yield Progress(step.done, step.total)
    differences = step.result
    assert differences is not None, "the last record carries it"
    compared: dict[str, Any] = {
        "path": str(theirs.root),
        "teacher": str(theirs.manifest.provenance.get("teacher")),
        "rows": differences.compared,
        "mean": differences.mean,
        "left_out": differences.left_out,
    }
    view = CacheView(
        str(ours.root),
        facts(ours.manifest, bytes_below(ours.root), ours.top_k),
        list(dict.fromkeys([*notes_on(ours), *notes_on(theirs)])),
        question="compare",
        found=_side_by_side(ours, theirs, differences.rows, differences.partners, settings.top),
        total=differences.compared,
        compared=compared,
    )
    yield Progress(step.total, step.total, view)


def _side_by_side(
    ours: CacheReader, theirs: CacheReader, rows: Sequence[FoundRow], partners: dict[int, int], top: int
) -> list[FoundView]:
    """The found rows with what both say of the tokens around them."""
    words, views = [reader.vocabulary() for reader in (ours, theirs)], dict[FoundRow, FoundView]()
    for row in sorted(rows, key=lambda one: (one.example, one.token)):
        mine, other = ours[row.example], theirs[partners[row.example]]
        first = max(0, row.token - AROUND)
        window = range(first, min(len(mine.targets), row.token + AROUND + 1))
        around = token_views(mine, ours.manifest, words[0], top, window)
        around_other = token_views(other, theirs.manifest, words[1], top, window)
        nats = divergences(mine.targets, other.targets)[window.start : window.stop]
        offset = row.token - first
        before, after = ("".join(t.text for t in part) for part in (around[:offset], around[offset + 1 :]))
        views[row] = FoundView(
            row.example,
            mine.id,
            before or masked(mine.prompt)[-CHARACTERS:],
            around[offset].text,
            after,
            around[offset],
            around,
            around_other[offset],
            around_other,
            [float(value) for value in nats],
        )
    return [views[row] for row in rows]
