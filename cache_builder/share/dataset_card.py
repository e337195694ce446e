"""The dataset card: the README.md of a cache on the hub, with what it was made from, what it holds and how to use it.

The layout is Hugging Face's: YAML front matter, then text. Every figure is from the manifest, as measured during the build. The
licence is the one that the user states when pushing; kd cannot know what teacher and text allow.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from kd.cache_builder.store.records.manifest import load_manifest
from kd.cache_builder.upkeep.summary import cache_summary
from kd.common.shown_text import for_markdown, public_place, without_secrets

CARD = "README.md"
PICTURE = "entropy.png"
"""The card's picture, beside it."""
CACHE_TAG, TEACHER_TAG, TOKENIZER_TAG = "kd-cache", "teacher:", "tokenizer:"
"""Tags by which caches are found (`hub_search`); the latter two are followed by a name and by a fingerprint."""
TOKENIZER_DIGITS = 16
"""Digits of the fingerprint in its tag."""
SIZES = (
    (10**3, "n<1K"),
    (10**4, "1K<n<10K"),
    (10**5, "10K<n<100K"),
    (10**6, "100K<n<1M"),
    (10**7, "1M<n<10M"),
    (10**8, "10M<n<100M"),
    (10**9, "100M<n<1B"),
)
"""Upper bound of the number of examples, and the hub's name for that size."""


def dataset_card(root: Path, url: str, license: str | None = None, *, picture: bool = False) -> str:
    """The card's text, for a cache at `root` that is shared at `url`.

    picture   whether PICTURE is sent with it
    """
    words = load_manifest(root).identity["tokenizer"]["fingerprint"][:TOKENIZER_DIGITS]
    summary = cache_summary(root)
    teacher, corpus = (public_place(str(summary[key])) for key in ("teacher", "corpus"))
    front: dict[str, Any] = {
        "pretty_name": " ".join(f"Soft targets of {teacher} on {corpus}".split()),
        "license": license or "other",
        **({} if license else {"license_name": "not-stated"}),
        "tags": [
            *("knowledge-distillation", "soft-targets", "teacher-logits", CACHE_TAG),
            f"{TEACHER_TAG}{' '.join(teacher.split())}",
            f"{TOKENIZER_TAG}{words}",
        ],
        "size_categories": [next((name for most, name in SIZES if summary["examples"] < most), "n>1T")],
        "configs": [{"config_name": "examples", "data_files": "examples/*.parquet"}],
    }
    stated = (
        f"`{for_markdown(license)}`, as stated by whoever pushed it"
        if license
        else "**not stated** by whoever pushed it"
    )
    facts = [
        ("teacher", teacher),
        ("class", summary["teacher_class"]),
        ("dtype", summary["dtype"]),
        ("quantisation", summary["quantization"] or "none"),
        *_unknown_weights(summary),
        ("tokenizer", words),
        ("vocabulary", f"{summary['vocabulary_size']:,}"),
        ("text", corpus),
        ("split", summary["split"]),
        ("examples", f"{summary['examples']:,}"),
        ("target tokens", f"{summary['rows']:,}"),
        ("tokens per block", summary["seq_len"]),
        ("profile", summary["profile"]),
        ("top-k", _top_k(summary)),
        ("draws per token", _draws(summary)),
        ("rank bands", summary["tail_bands"]),
        ("temperatures", ", ".join(f"{t:g}" for t in summary["temperatures"]) + _only_one(summary)),
        ("bytes", f"{summary['bytes']:,}"),
        ("bytes per token", _figure(summary["bytes_per_token"])),
        ("mass of the kept tokens", _figure(summary["mass_kept_mean"])),
        ("error of the stored head, nats", _figure(summary["head_kl_mean"])),
        ("teacher's cross-entropy, nats per token", _figure(summary["teacher_nll_mean"])),
        ("teacher's accuracy", _figure(summary["teacher_top1"])),
        ("fingerprint", summary["fingerprint"]),
    ]
    url = without_secrets(url)
    classes = summary["kind"] == "classes"
    train = f"kd classify train --cache {url} --model MODEL" if classes else f"kd train --cache {url} --student STUDENT"
    rows = "\n".join(f"| {name} | {for_markdown(value)} |" for name, value in facts)
    return f"""---
{yaml.safe_dump(front, sort_keys=False, allow_unicode=True).rstrip()}
---

# Soft targets of {for_markdown(teacher)} on {for_markdown(corpus)}

What a teacher model predicted at every target token of a text, stored once, so that students can be trained from it
without the teacher: a cache of `kd`, plain Zarr v3 and Parquet, every file with its SHA-256.

| | |
|---|---|
{rows}

{_shown(picture)}## Licence

{stated[0].upper() + stated[1:]}. The predictions derive from the teacher and the text; the terms of both apply.

## Use

```
pip install kd-logit-cache
kd cache show {url}             # what the teacher said, token by token
{train} --out runs/student      # streamed, files fetched as they are needed
kd cache pull {url} cache       # or a copy: resumable, verified
```
"""


def _shown(picture: bool) -> str:
    if not picture:
        return ""
    return f"""![How uncertain the teacher was: a histogram of its entropy over all rows]({PICTURE})

The entropy of the teacher's distribution at each target token, as its lower bound from what the cache keeps.

"""


def _unknown_weights(summary: dict[str, Any]) -> list[tuple[str, str]]:
    if not summary["weights_unknown"]:
        return []
    named = f"; {summary['teacher_id']}, as stated by whoever built it" if summary["teacher_id"] else ""
    return [("weights", f"unknown: they could not be digested{named}")]


def _only_one(summary: dict[str, Any]) -> str:
    return " only (the teacher gave log-probabilities, and no logits)" if summary["logprobs_only"] else ""


def _top_k(summary: dict[str, Any]) -> str:
    if not summary["min_probability"]:
        return str(summary["top_k"])
    mean = _figure(summary["tokens_kept_mean"])
    said = f"tokens of at least {summary['min_probability']:g}, at most {summary['top_k']}; {mean} per row on average"
    if summary["certain_below"]:
        share = "" if summary["rows_of_one_token"] is None else f": {summary['rows_of_one_token']:.1%} of them"
        said += f"; one token of rows with an entropy below {summary['certain_below']:g} nats{share}"
    return said


def _draws(summary: dict[str, Any]) -> str:
    if not summary["tail_samples"]:
        return str(summary["samples"])
    return f"{_figure(summary['tail_draws_mean'])} from the tail, each of at most 1/{summary['tail_samples']} of the probability"


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"
