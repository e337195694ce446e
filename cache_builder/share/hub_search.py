"""Caches on the Hugging Face hub, found by the tags of their dataset cards.

    for found in search_caches(teacher="llama"): print(found.url)

A card has the tag `kd-cache`, and since this release `teacher:NAME` and `tokenizer:` with the first 16 digits of the tokenizer's
fingerprint. A repository without the last two is found where neither is asked for. Tags are what whoever pushed a cache wrote:
the manifest that is read when a cache is opened is what counts.
"""

from __future__ import annotations

from dataclasses import dataclass

from kd.cache_builder.share.dataset_card import CACHE_TAG, TEACHER_TAG, TOKENIZER_DIGITS, TOKENIZER_TAG
from kd.cache_builder.share.hub_remote import hub_errors
from kd.cache_builder.share.remotes import Transient
from kd.common.errors import CacheError


@dataclass(frozen=True)
class FoundCache:
    """A repository on the hub whose card says that it holds a cache."""

    url: str
    """`hf://datasets/OWNER/NAME`"""
    teacher: str | None
    """None where the card does not name it."""
    tokenizer: str | None
    """The first digits of the fingerprint; None where the card does not name it."""
    downloads: int | None
    """Downloads in the last month, as the hub counts them; None where it does not say."""


def search_caches(*, teacher: str | None = None, tokenizer: str | None = None, limit: int = 50) -> list[FoundCache]:
    """Caches on the hub, those first that are downloaded most.

    teacher     a part of the teacher's name, in any case of letters
    tokenizer   the beginning of the tokenizer's fingerprint, or all of it
    limit       most caches to list

    Raises CacheError where the hub cannot be reached.

    >>> import kd
    >>> try:
    ...     caches = kd.search_caches(teacher="llama")
    ... except kd.CacheError as error:  # where HF_HUB_OFFLINE is set
    ...     print(error.headline)
    the hub cannot be reached in offline mode
    """
    from huggingface_hub import HfApi

    caches: list[FoundCache] = []
    try:
        with hub_errors("hf"):
            for one in HfApi().list_datasets(filter=CACHE_TAG, sort="downloads"):
                cache = _of_tags(one.id, list(one.tags or ()), one.downloads)
                if _fits(cache.teacher, teacher) and _begins(cache.tokenizer, tokenizer):
                    caches.append(cache)
                if len(caches) == limit:
                    break
    except Transient as error:
        raise CacheError("the hub does not answer", found=str(error), try_="the same command again, later") from error
    return caches


def _of_tags(name: str, tags: list[str], downloads: int | None) -> FoundCache:
    def said(tag: str) -> str | None:
        return next((one.removeprefix(tag) for one in tags if one.startswith(tag)), None)

    return FoundCache(f"hf://datasets/{name}", said(TEACHER_TAG), said(TOKENIZER_TAG), downloads)


def _fits(name: str | None, wanted: str | None) -> bool:
    return wanted is None or (name is not None and wanted.casefold() in name.casefold())


def _begins(digits: str | None, wanted: str | None) -> bool:
    return wanted is None or (digits is not None and digits.startswith(wanted.lower()[:TOKENIZER_DIGITS]))
