"""Compare the identities of caches: the differences between two, and the error that prints them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kd.cache_builder.store.records.manifest import OLDEST_CONTINUED, CacheManifest
from kd.common.errors import CacheMismatchError

TEXT_RULES_NAMES = ("text_rules", "control_tokens")
"""Entries of an identity's `tokenizer` that say how texts became ids."""


def refuse_mismatch(root: Path | str, wanted: dict[str, Any], existing: CacheManifest) -> None:
    """Raise CacheMismatchError with the difference, unless `existing` was made from exactly `wanted`."""
    if existing.format_version < OLDEST_CONTINUED:
        raise CacheMismatchError(
            "the directory holds a cache of an older format",
            cache=root,
            found=f"format version {existing.format_version}",
            expected=f"{OLDEST_CONTINUED} or newer",
            try_="another --out; the old cache can still be read and trained from",
        )
    differences = identity_difference(wanted, existing.identity)
    if differences:
        details = {f"differs {key}": f"asked for {_short(a)}, the cache has {_short(b)}" for key, a, b in differences}
        raise CacheMismatchError(
            "the directory holds a cache made from something else",
            cache=root,
            **details,
            try_="another --out, or the options that cache was built with (kd cache info)",
        )


def without_text_rules(identity: dict[str, Any]) -> dict[str, Any]:
    """An identity without the rules by which its text became ids, which are named only where they make a difference."""
    words = {name: value for name, value in identity["tokenizer"].items() if name not in TEXT_RULES_NAMES}
    return identity | {"tokenizer": words}


def identity_difference(expected: dict[str, Any], actual: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    """`(dotted key, expected, found)` of everything that differs between two identities."""
    left, right = _flatten(expected), _flatten(actual)
    return [
        (key, left.get(key), right.get(key))
        for key in sorted(left.keys() | right.keys())
        if left.get(key) != right.get(key)
    ]


def _flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {prefix: value}
    return {
        k: v for key, item in value.items() for k, v in _flatten(item, f"{prefix}.{key}" if prefix else key).items()
    }


def _short(value: Any) -> str:
    text = "nothing" if value is None else str(value)
    return text if len(text) <= 40 else text[:16] + "…" + text[-8:]
