"""Look into a cache from Python: `show_cache`, and the steps that the command line drives."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

from kd.cache_builder.look.cache_view import CacheView, view_cache
from kd.cache_builder.look.compared_view import compare_caches
from kd.cache_builder.look.show_settings import ShowSettings
from kd.cache_builder.look.view_page import write_view_page
from kd.cache_builder.opening import open_cache
from kd.cache_builder.store.readers.reader import CacheReader
from kd.common.errors import DataError
from kd.common.progress import Progress, final
from kd.common.settings import make


def show_cache(cache: str | os.PathLike[str] | CacheReader, example: int | None = None, **settings: Any) -> CacheView:
    """Look into a cache: an example with what the teacher said of each token, or the tokens that stand out.

    cache      a path, a URL, the beginning of a fingerprint, or what `kd.open_cache` gives for one cache
    example    number of the example; None shows the first one, or asks the whole cache
    settings   the options of `kd cache show`, spelled with underscores: token, top, uncertain, surprising, search, html, …

    What comes back prints as text. Its `document` holds the same as a JSON object. Raises CacheError and DataError.

    >>> import kd
    >>> view = kd.show_cache("cache", 0, top=3)
    >>> token = view.example.tokens[4]
    >>> token.text, len(token.top), token.entropy_at_least <= token.entropy_at_most
    (' a', 3, True)
    >>> least = kd.show_cache("cache", surprising=2).found
    >>> [found.token.rank > 100 for found in least]
    [True, True]
    """
    return final(show_steps(cache, example, make(ShowSettings, settings)))


def show_steps(
    cache: str | os.PathLike[str] | CacheReader, example: int | None, settings: ShowSettings
) -> Iterator[Progress[CacheView]]:
    """Look into a cache and write the page that the settings ask for; the last record carries what was found."""
    reader = _one_cache(cache)
    if settings.compare is None:
        steps = view_cache(reader, example, settings)
    else:
        steps = compare_caches(reader, _one_cache(settings.compare), example, settings)
    for step in steps:
        if step.result is not None and settings.html is not None:
            write_view_page(step.result, settings.html)
        yield step


def _one_cache(cache: str | os.PathLike[str] | CacheReader) -> CacheReader:
    reader = cache if isinstance(cache, CacheReader) else open_cache(cache)
    if not isinstance(reader, CacheReader):
        raise DataError("several caches are read as one here", where=reader.root, try_="one of them")
    return reader
