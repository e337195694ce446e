"""Opinions for the sentiment tasks of `mini-flan`: one or two remarks on a film, a hotel, a meal, or on the day."""

from __future__ import annotations

from kd.data.demo.mini_world import Draw

GOOD = ("great", "lovely", "wonderful", "perfect", "charming", "excellent")
BAD = ("awful", "boring", "dreadful", "terrible", "poor", "horrible")
PARTS = {
    "films": ("film", "story", "music", "ending", "cast"),
    "hotels": ("hotel", "room", "bed", "view", "staff"),
    "meals": ("meal", "soup", "bread", "cake", "wine"),
    "messages": ("day", "trip", "news", "party", "lesson"),
}
"""Subject -> what is spoken of."""
FORMS = ("The {p} was {w}.", "I found the {p} {w}.", "The {p}? Simply {w}.", "We all said that the {p} was {w}.")


def opinion(draw: Draw, subject: str, *, good: bool) -> str:
    """Two remarks on the subject, both good or both bad."""
    words, parts = draw.shuffled(GOOD if good else BAD)[:2], draw.shuffled(PARTS[subject])[:2]
    forms = draw.shuffled(FORMS)[:2]
    return " ".join(form.format(p=part, w=word) for form, part, word in zip(forms, parts, words, strict=True))
