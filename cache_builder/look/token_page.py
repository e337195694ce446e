"""A page of shaded texts: hover a token, touch it, or reach it with the arrow keys, and its distribution is shown beside it.

The page is one file. It asks for nothing, follows the reader's colour scheme, and is made for a phone and for a desk. All text
of the cache reaches it escaped: as text of the page, or as JSON that its script puts into text nodes. The page allows one
script, by its digest, so nothing else could run even if it got in.

The markup and the style are in `token_page.html`, the script in `token_page.js`. jinja2 is not used: the base install has none.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

from kd.cache_builder.store.row_figures import LEVEL_EDGES
from kd.common.shown_text import for_terminal, without_secrets

HERE = Path(__file__).parent


@dataclass(frozen=True)
class PageSide:
    """What one model says in place of a token."""

    name: str
    """Empty where there is one model."""
    said: Sequence[tuple[str, str]]
    """Name and words of each figure."""
    top: Sequence[tuple[str, float, bool]]
    """Most probable tokens: text, probability, and whether it is the token that is there."""


@dataclass(frozen=True)
class PageToken:
    """One token of a text."""

    text: str
    """Its characters; empty for a token that stands for none."""
    level: int
    """Its shade, from 0 to `len(LEVEL_EDGES)`."""
    heading: str
    sides: Sequence[PageSide]


@dataclass(frozen=True)
class Passage:
    """A text with a heading."""

    heading: str
    parts: Sequence[tuple[str, str, Sequence[PageToken]]]
    """Role (empty for none), text, and tokens, which are shown in place of the text where there are some. Characters of the
    text behind the last token follow them."""
    picked: Collection[int] = field(default_factory=tuple)
    """Numbers of the tokens, counted through all parts, that are marked."""


def render_token_page(
    title: str,
    intro_lines: Sequence[str],
    passages: Sequence[Passage],
    *,
    legend: str,
    edges: Sequence[float] = LEVEL_EDGES,
) -> str:
    """The whole document.

    legend   what the shades mean, before the list of their edges
    edges    where each shade begins
    """
    numbered: list[PageToken] = []
    bodies = [_passage(one, numbered) for one in passages]
    intro = [f"<p>{_text(intro_lines[0])}</p>"] if intro_lines else []
    intro += ["<ul>", *(f"<li>{_text(line)}</li>" for line in intro_lines[1:]), "</ul>"] if intro_lines[1:] else []
    script = (HERE / "token_page.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    values = {
        "title": _text(title),
        "intro": "\n".join([*intro, _legend(legend, edges)]),
        "passages": "\n".join(bodies),
        "data": _json([_document(token) for token in numbered]),
        "script": script,
        "script_digest": f"sha256-{digest}",
    }
    page = (HERE / "token_page.html").read_text(encoding="utf-8")
    return re.sub("%%([a-z_]+)%%", lambda match: values[match[1]], page)


def _legend(words: str, edges: Sequence[float]) -> str:
    shades = "".join(f' <span class="l{level}">{edge:g}+</span>' for level, edge in enumerate(edges, 1))
    keys = "Hover or touch a token; with a keyboard, Tab to the text and then the arrow keys."
    return f'<p class="soft legend">{_text(words)}{shades}. {keys}</p>'


def _passage(passage: Passage, numbered: list[PageToken]) -> str:
    lines, index = [f"<section><h2>{_text(passage.heading)}</h2>"], 0
    for role, text, tokens in passage.parts:
        if role:
            lines.append(f'<div class="role">{_text(role)}</div>')
        spans = []
        for token in tokens:
            marks = (["picked"] if index in passage.picked else []) + ([f"l{token.level}"] if token.level else [])
            spans.append(_span(token, len(numbered), marks))
            numbered.append(token)
            index += 1
        rest = text[sum(len(token.text) for token in tokens) :]
        name = "words" if tokens else "words read"
        lines.append(f'<div class="{name}">{"".join(spans)}{_text(rest)}</div>')
    return "\n".join([*lines, "</section>"])


def _span(token: PageToken, number: int, marks: list[str]) -> str:
    marks = ["t", *marks, *(["nl"] if token.text.startswith("\n") else []), *([] if token.text else ["none"])]
    tab = 0 if number == 0 else -1
    return f'<span class="{" ".join(marks)}" data-t="{number}" tabindex="{tab}">{_text(token.text)}</span>'


def _document(token: PageToken) -> Mapping[str, Any]:
    return {"heading": token.heading, "sides": [vars(side) for side in token.sides]}


def _json(document: Any) -> str:
    """JSON that holds no markup, whatever its texts are: `<` is spelled `\\u003c`."""
    text = for_terminal(json.dumps(document, ensure_ascii=False, separators=(",", ":")))
    return re.sub("[<>&]", lambda match: f"\\u{ord(match[0]):04x}", text)


def _text(text: str) -> str:
    return escape(for_terminal(without_secrets(text)))
