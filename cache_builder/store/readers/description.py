"""A cache in one line, and as a small HTML table for notebooks: teacher, text, rows, bytes, profile."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape

from kd.cache_builder.store.records.manifest import CacheManifest

Facts = Mapping[str, str | int]
"""Name -> value of what is shown of a cache."""


def facts(manifest: CacheManifest, size: int, top_k: int | None = None) -> Facts:
    """What identifies a cache to a person; `size` is its bytes on this disk.

    `top_k` is what a reader hands out per row, where that is fewer than the stored tokens.
    """
    targets, provenance = manifest.targets, manifest.provenance
    at_most = " at most" if targets.ragged else ""
    kept = f", top-k{at_most} {top_k or targets.top_k}" if targets.top_k else ""
    one = f", one token below {targets.certain_below:g} nats" if targets.certain_below else ""
    of = f" of {targets.top_k}" if top_k is not None and top_k < targets.top_k else ""
    return {
        "teacher": str(provenance.get("teacher")),
        "text": str(provenance.get("corpus")),
        "examples": manifest.examples,
        "rows": manifest.rows,
        "bytes": size,
        "profile": f"{targets.profile}{kept}{of}{one}",
        "fingerprint": manifest.fingerprint[:12],
    }


def one_line(kind: str, title: str, named: Facts) -> str:
    """`Kind('title', teacher='…', rows=1,234, …)`."""
    texts = [f"{name}={value:,}" if isinstance(value, int) else f"{name}={value!r}" for name, value in named.items()]
    return f"{kind}({title!r}, {', '.join(texts)})"


def html_table(title: str, named: Facts) -> str:
    """A table with a row per fact. Every text is escaped: names come from whoever built the cache."""
    texts = {name: f"{value:,}" if isinstance(value, int) else value for name, value in named.items()}
    rows = "".join(f"<tr><th>{escape(name)}</th><td>{escape(text)}</td></tr>" for name, text in texts.items())
    return f"<table><caption>{escape(title)}</caption>{rows}</table>"
