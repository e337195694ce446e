"""What `kd cache show` prints: pieces of text, each with the shade that a terminal gives it.

Shade 0 is plain. In a pipe the pieces are printed one after another, and the texts are as they are.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from kd.cache_builder.look.example_view import ExampleView
from kd.cache_builder.look.token_views import Candidate, TokenView
from kd.cache_builder.look.viewed import FoundView, ViewedCache
from kd.cache_builder.store.row_figures import LEVEL_EDGES, shade_levels

Piece = tuple[str, int]
"""A text and its shade, from 0 to `len(LEVEL_EDGES)`."""
FIRST_VIEW_TOKENS = 150
"""Tokens that the first view of a cache shows."""
BAR = 20
"""Characters of the bar of a probability of 1."""
QUESTIONS = {"uncertain": "most uncertain", "surprising": "least expected", "compare": "where they differ"}
"""Question -> what the tokens that answer it are."""


def plain_text(view: ViewedCache) -> str:
    """The whole as plain text."""
    return "".join(text for text, _ in pieces_of(view, shaded=False)).rstrip("\n")


def pieces_of(view: ViewedCache, *, shaded: bool) -> Iterator[Piece]:
    """The whole, piece by piece; `shaded`: shades can be seen, so they are explained."""
    named = view.facts
    yield f"{view.path}: {named['teacher']} over {named['text']}\n", 0
    yield f"{named['examples']:,} examples, {named['rows']:,} rows, profile {named['profile']}\n", 0
    for note in view.notes:
        yield f"  {note}\n", 0
    if view.example is not None:
        most = FIRST_VIEW_TOKENS if view.first_view else None
        yield from _example(view.example, int(named["examples"]), most, shaded)
        for token in view.picked:
            yield from ((line, 0) for line in token_lines(token))
    elif view.question == "search":
        yield f"\n{view.total:,} examples hold the text; {len(view.found)} of them:\n", 0
        yield from ((f"  {hit.example:>8,}  {_around(hit)}\n", 0) for hit in view.found)
    elif view.compared is not None:
        yield from ((line, 0) for line in _compared_lines(view, view.compared))
    else:
        yield from _found(view)
    if view.first_view:
        assert view.example is not None
        cache = shlex.quote(view.path)
        last = len(view.example.tokens) - 1
        yield f"\nMore: kd cache show {cache} {view.example.number} --token {min(5, last)}\n", 0
        yield f"      kd cache show {cache} --uncertain 20 (or --surprising 20, --search TEXT, --html page.html)\n", 0


def _example(example: ExampleView, count: int, most: int | None, shaded: bool) -> Iterator[Piece]:
    tokens = example.tokens
    known = [token.entropy_at_least for token in tokens if token.entropy_at_least is not None]
    mean = f", entropy at least {sum(known) / len(known):.2f} nats on average" if known else ""
    yield f"\nexample {example.number} of {count:,}: {example.id}, {len(tokens):,} tokens{mean}\n", 0
    if known and shaded:
        yield "shades of entropy in nats: ", 0
        for level, edge in enumerate(LEVEL_EDGES, 1):
            yield f" {edge:g}+ ", level
        yield "\n", 0
    left = len(tokens) if most is None else most
    for part in example.parts:
        if left <= 0:
            break
        yield f"\n[{part.role}]\n", 0
        if not part.tokens:
            yield part.text + "\n", 0
            continue
        shown = part.tokens[:left]
        yield from ((token.text, level_of(token)) for token in shown)
        whole = "".join(token.text for token in part.tokens)
        if len(shown) == len(part.tokens):
            yield part.text[len(whole) :] + "\n", 0
        left -= len(shown)
    if len(tokens) > (most or len(tokens)):
        yield f"\n… and {len(tokens) - (most or 0):,} tokens more\n", 0


def level_of(token: TokenView) -> int:
    """The shade of a token: by its entropy, or none where that is unknown."""
    return 0 if token.entropy_at_least is None else int(shade_levels(token.entropy_at_least))  # type: ignore[arg-type]


def token_lines(token: TokenView) -> list[str]:
    """One token in detail."""
    lines = [
        f"\ntoken {token.number}: {quoted(token.piece)}\n",
        *(f"  {name:<15}{text}\n" for name, text in said_of(token)),
    ]
    if token.top:
        lines += ["  most probable\n", *(f"    {candidate_line(one, token.id)}\n" for one in token.top)]
    return lines


def said_of(token: TokenView) -> list[tuple[str, str]]:
    """`(name, words)` of the figures of one token."""
    most = "at most " if token.is_bound else ""
    least = "at least " if token.is_bound else ""
    said = [
        ("entropy", entropy_words(token)),
        ("in the text", f"probability {most}{token.probability:.3g}, rank {least}{token.rank:,}"),
    ]
    if token.tail_mass is not None:
        masses = ", ".join(f"{mass:.3g} at T={name}" for name, mass in token.tail_mass.items())
        said.append(("tail", f"{masses} (beyond the {token.kept:,} kept tokens)"))
    if token.draws:
        said.append(("drawn", ", ".join(f"{one.draws} × {quoted(one.text or '')}" for one in token.draws)))
    return said


def entropy_words(token: TokenView) -> str:
    """The bounds of a token's entropy in words."""
    least, most = token.entropy_at_least, token.entropy_at_most
    if least is None:
        return "unknown"
    if most is None:
        return f"{least:.3f} nats among the kept tokens"
    return f"{least:.3f} nats" if most - least < 5e-4 else f"{least:.3f} to {most:.3f} nats"


def candidate_line(one: Candidate, id: int) -> str:
    """A kept token as one line with a bar; the token that is there has an arrow."""
    name = "" if one.text is None else quoted(one.text)
    here = "  ← in the text" if one.id == id else ""
    assert one.probability is not None, "a kept token has one"
    bar = "█" * round(BAR * one.probability)
    return f"{one.probability:>9.4f}  {bar:<{BAR}}  {name}{here}".rstrip()


def quoted(text: str) -> str:
    """A text in quotes on one line, with line ends and tabs spelled."""
    return "'" + text.replace("\n", "\\n").replace("\t", "\\t").replace("\r", "\\r") + "'"


def _found(view: ViewedCache) -> Iterator[Piece]:
    title = QUESTIONS.get(view.question or "", "")
    yield f"\nThe {len(view.found)} {title} of {view.total:,} tokens:\n", 0
    for hit in view.found:
        token = hit.token
        assert token is not None
        yield f"\n  example {hit.example:,}, token {token.number:,}: {_around(hit)}\n", 0
        yield f"    entropy {entropy_words(token)}; {said_of(token)[1][1]}\n", 0
        yield f"    {_likely(token.top)}\n", 0


def _compared_lines(view: ViewedCache, other: Mapping[str, Any]) -> Iterator[str]:
    names = str(view.facts["teacher"]), str(other["teacher"])
    yield f"\ncompared with {other['path']}: {names[1]}\n"
    yield f"{other['rows']:,} rows are in both, with a divergence (JSD, at least) of {other['mean']:.4f} nats on average\n"
    if other["left_out"]:
        yield f"{other['left_out']:,} rows are left out: the other cache does not have their examples\n"
    yield f"\nThe {len(view.found)} tokens where they differ most:\n"
    wide = max(map(len, names))
    for hit in view.found:
        assert hit.token is not None
        assert hit.other is not None
        yield f"\n  example {hit.example:,}, token {hit.token.number:,}: {_around(hit)}\n"
        yield f"    {hit.divergence:.4f} nats\n"
        for name, token in zip(names, (hit.token, hit.other), strict=True):
            yield f"    {name:<{wide}}  rank {token.rank:,}; {_likely(token.top)}\n"


def _likely(candidates: Sequence[Candidate]) -> str:
    words = [
        f"{one.probability:.3f}" + ("" if one.text is None else f" {quoted(one.text)}")
        for one in candidates[:5]
        if one.probability is not None
    ]
    return "most probable: " + ", ".join(words) if words else "most probable: not kept"


def _around(hit: FoundView) -> str:
    """The token in brackets among the text around it, on one line."""
    before, after = " ".join(hit.before[-60:].split(" ")), " ".join(hit.after[:60].split(" "))
    text = f"…{before}[{hit.text}]{after}…"
    return text.replace("\n", "⏎").replace("\t", " ").replace("\r", "")
