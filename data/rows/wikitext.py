"""WikiText: the pinned data set on the hub, and how its lines are joined into articles."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from kd.data.rows.example import Example

WIKITEXT_ID = "Salesforce/wikitext"
WIKITEXT_CONFIG = "wikitext-2-raw-v1"
WIKITEXT_REVISION = "b08601e04326c79dfdd32d625aee71d232d685c3"
TITLE = re.compile(r"\s*= [^=](.*[^=])? =\s*")
"""A line ` = Title = `, which opens an article; ` = = Section = = ` does not."""


def wikitext_articles(lines: Iterable[str], task: str, split: str) -> Iterator[Example]:
    """Join WikiText's lines into articles. A title after an empty line begins a new one; ids are `split/number`."""
    article: list[str] = []
    count, previous_empty = 0, True
    for line in lines:
        line = line.removesuffix("\n")
        begins = previous_empty and TITLE.fullmatch(line) is not None
        if begins and any(kept.strip() for kept in article):
            yield Example(f"{split}/{count}", "\n".join(article).strip() + "\n", task=task, split=split)
            article, count = [], count + 1
        article.append(line)
        previous_empty = not line.strip()
    if article:
        yield Example(f"{split}/{count}", "\n".join(article).strip() + "\n", task=task, split=split)
