"""A text whose tokens are shaded, as HTML for notebooks: no script, no style sheet, and readable on a light and a dark page.

The full page, with each token's distribution, is `kd.cache_builder.look.token_page`.
"""

from __future__ import annotations

from html import escape

import numpy as np

from kd.cache_builder.store.row_figures import LEVEL_EDGES, beyond_kept, character_ends, entropy_bounds, shade_levels
from kd.cache_builder.store.soft_targets import SoftTargets
from kd.common.shown_text import for_terminal, masked

OPACITY = (0.0, 0.12, 0.22, 0.34, 0.46, 0.58, 0.7)
"""Of each shade."""
MOST_TOKENS = 600
"""Tokens of an example that are shown; a longer one ends in a word that says how many are left."""
_BOX = "white-space:pre-wrap;overflow-wrap:anywhere;line-height:1.7;max-width:60em"


def example_html(
    name: str, prompt: str, target: str, targets: SoftTargets, turns: np.ndarray, *, gold_known: bool = True
) -> str:
    """One example: a caption, the prompt, and the target's tokens shaded by the teacher's entropy. Everything is escaped.

    turns        `[G + 1, 2]` rows of each turn, with a mark between two of them
    gold_known   False where the probability of a token that is not among the kept ones is an upper bound
    """
    known = targets.logprobs is not None or bool(targets.temperatures)
    nats = entropy_bounds(targets, 2**31)[0] if known else np.zeros(len(targets))
    bounds = np.zeros(len(targets), dtype=bool) if gold_known else beyond_kept(targets)
    words = token_texts(target, targets.byte_end)
    first_rows = {int(start) for start, _ in turns[1:]}
    spans = []
    for row, word in enumerate(words[:MOST_TOKENS]):
        mark = "<br>⋯<br>" if row in first_rows else ""
        entropy = f"entropy at least {nats[row]:.2f} nats, " if known else ""
        title = f"token {row}: {entropy}{_probability(targets, row, bool(bounds[row]))}"
        spans.append(mark + _span(word, int(shade_levels(nats[row])), title))
    left = f"<br><i>and {len(words) - MOST_TOKENS:,} tokens more</i>" if len(words) > MOST_TOKENS else ""
    figures = f", entropy at least {nats.mean():.2f} nats on average" if known and len(nats) else ""
    caption = escape(for_terminal(f"{name}, {len(words):,} tokens{figures}"))
    before = f'<span style="opacity:.6">{_text(masked(prompt))}</span>{_gap(prompt)}' if prompt else ""
    return f'<div><small>{caption}</small><div style="{_BOX}">{before}{"".join(spans)}{left}</div></div>'


def token_texts(text: str, byte_end: np.ndarray) -> list[str]:
    """The characters that each token ends, `[N]`, without secrets; a token that ends none, such as a control token, has ""."""
    hidden = masked(text)
    ends = character_ends(text, byte_end)
    starts = np.concatenate([[0], ends])[: len(ends)]
    return [hidden[start:stop] for start, stop in zip(starts, ends, strict=True)]


def _probability(targets: SoftTargets, row: int, bound: bool) -> str:
    probability, rank = float(np.exp(np.float64(targets.gold_logprob[row]))), int(targets.gold_rank[row]) + 1
    return f"probability {'at most ' if bound else ''}{probability:.2g}, rank {'at least ' if bound else ''}{rank:,}"


def _span(word: str, level: int, title: str) -> str:
    look = f' style="background:rgba(217,95,2,{OPACITY[level]})"' if level else ""
    return f'<span title="{escape(title)}"{look}>{_text(word) or "<small>▪</small>"}</span>'


def _text(text: str) -> str:
    return escape(for_terminal(text))


def _gap(prompt: str) -> str:
    return "" if prompt[-1:].isspace() else " "


assert len(OPACITY) == len(LEVEL_EDGES) + 1
