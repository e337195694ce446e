"""What was found in a cache as a page: the example, or a passage for each token that was found."""

from __future__ import annotations

from pathlib import Path

from kd.cache_builder.look.shown_lines import QUESTIONS, level_of, quoted, said_of
from kd.cache_builder.look.token_page import PageSide, PageToken, Passage, render_token_page
from kd.cache_builder.look.token_views import Candidate, TokenView
from kd.cache_builder.look.viewed import FoundView, ViewedCache
from kd.common.disk.disk_errors import clear_write_errors
from kd.common.files import write_atomic
from kd.common.shown_text import public_place

LEGEND = "Each token is shaded by the entropy of the teacher's distribution, at least, in nats:"


def write_view_page(view: ViewedCache, path: Path) -> None:
    """Write the page, whole or not at all. Raises WriteError where it cannot be written."""
    with clear_write_errors(path, "another --html FILE"):
        write_atomic(path, view_page(view))


def view_page(view: ViewedCache) -> str:
    """The page's text."""
    named = view.facts
    intro = [
        f"{named['examples']:,} examples, {named['rows']:,} rows, profile {named['profile']}, from {public_place(view.place)}."
    ]
    title = f"{named['teacher']} over {named['text']}"
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
    return [_found(view, found) for found in view.found]


def _found(view: ViewedCache, found: FoundView) -> Passage:
    heading = f"example {found.example}: {found.id}"
    if found.token is None:
        return Passage(heading, [("", f"…{found.before}{found.text}{found.after}…", ())])
    title = f"{heading}, token {found.token.number}: {QUESTIONS.get(view.question or '', '')}"
    tokens = [page_token(token) for token in found.around]
    place = found.token.number - found.around[0].number
    before = [("", found.before, ())] if place == 0 and found.before else []
    return Passage(title, [*before, ("", "".join(t.text for t in tokens), tokens)], {place})
