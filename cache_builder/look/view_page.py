"""What was found in a cache as a page: the example, or a passage for each token that was found."""

from __future__ import annotations

from bisect import bisect_right
from pathlib import Path

from kd.cache_builder.look.shown_lines import QUESTIONS, level_of, quoted, said_of
from kd.cache_builder.look.token_page import PageSide, PageToken, Passage, render_token_page
from kd.cache_builder.look.token_views import Candidate, TokenView
from kd.cache_builder.look.viewed import FoundView, ViewedCache
from kd.common.disk.disk_errors import clear_write_errors
from kd.common.files import write_atomic
from kd.common.shown_text import public_place

DIVERGENCE_EDGES = (0.01, 0.03, 0.08, 0.15, 0.3, 0.5)
"""Nats of a divergence at which a token gets the next darker shade; the largest possible one is ln 2 = 0.693."""
COMPARED_LEGEND = (
    "Each token is shaded by the divergence of the two teachers (Jensen and Shannon's), at least, in nats:"
)
LEGEND = "Each token is shaded by the entropy of the teacher's distribution, at least, in nats:"


def write_view_page(view: ViewedCache, path: Path) -> None:
    """Write the page, whole or not at all. Raises WriteError where it cannot be written."""
    with clear_write_errors(path, "another --html FILE"):
        write_atomic(path, view_page(view))


def view_page(view: ViewedCache) -> str:
    """The page's text."""
    named = view.facts
    intro = [
        f"{named['examples']:,} examples, {named['rows']:,} rows, profile {named['profile']}, from {public_place(view.path)}."
    ]
    title = f"{named['teacher']} over {named['text']}"
    if view.compared is not None:
        other = view.compared
        intro.append(
            f"{other['rows']:,} rows are in both caches; their divergence is {other['mean']:.4f} nats on average."
        )
        if other["left_out"]:
            intro.append(f"{other['left_out']:,} rows are left out: the other cache does not have their examples.")
        title = f"{named['teacher']} and {other['teacher']} over {named['text']}"
        lines = [*intro, *view.notes]
        return render_token_page(title, lines, _passages(view), legend=COMPARED_LEGEND, edges=DIVERGENCE_EDGES)
    return render_token_page(title, [*intro, *view.notes], _passages(view), legend=LEGEND)


def page_token(token: TokenView) -> PageToken:
    """One token with the teacher's distribution."""
    return PageToken(token.text, level_of(token), f"token {token.number}: {quoted(token.piece)}", [side_of(token)])


def side_of(token: TokenView, name: str = "") -> PageSide:
    """What the teacher says in place of a token."""
    return PageSide(name, said_of(token), [_candidate(one, token) for one in token.top])


def _candidate(one: Candidate, token: TokenView) -> tuple[str, float, bool]:
    return "" if one.text is None else quoted(one.text), one.probability or 0.0, one.id == token.id


def _passages(view: ViewedCache) -> list[Passage]:
    if view.example is not None:
        parts = [(part.role, part.text, [page_token(t) for t in part.tokens]) for part in view.example.parts]
        heading = f"example {view.example.number}: {view.example.id}"
        return [Passage(heading, parts, {token.number for token in view.picked})]
    return [_found(view, hit) for hit in view.found]


def _found(view: ViewedCache, hit: FoundView) -> Passage:
    heading = f"example {hit.example}: {hit.id}"
    if hit.token is None:
        return Passage(heading, [("", f"…{hit.before}{hit.text}{hit.after}…", ())])
    title = f"{heading}, token {hit.token.number}: {QUESTIONS.get(view.question or '', '')}"
    tokens = _compared(view, hit) if view.compared else [page_token(token) for token in hit.around]
    picked = hit.token.number - hit.around[0].number
    before = [("", hit.before, ())] if picked == 0 and hit.before else []
    return Passage(title, [*before, ("", "".join(t.text for t in tokens), tokens)], {picked})


def _compared(view: ViewedCache, hit: FoundView) -> list[PageToken]:
    """The tokens around a found one with what both teachers say."""
    assert view.compared is not None
    names = str(view.facts["teacher"]), str(view.compared["teacher"])
    tokens = []
    for mine, other, nats in zip(hit.around, hit.around_other, hit.divergences, strict=True):
        sides = [side_of(token, name) for token, name in zip((mine, other), names, strict=True)]
        heading = f"token {mine.number}: {quoted(mine.piece)}, {nats:.4f} nats apart"
        tokens.append(PageToken(mine.text, bisect_right(DIVERGENCE_EDGES, nats), heading, sides))
    return tokens
