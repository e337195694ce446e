"""A student beside its teacher as a page: the tokens at which they differ most, with both distributions.

The rows are those with the largest KL(teacher || student) of an agreement that was measured from a cache. The student reads their
examples once more, so that its own distribution is at hand. Nothing else of an evaluation is kept in memory.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from kd.cache_builder.look.shown_lines import quoted
from kd.cache_builder.look.token_page import PageSide, PageToken, Passage, render_token_page
from kd.cache_builder.look.token_views import TokenView, piece_text, token_views
from kd.cache_builder.look.view_page import side_of
from kd.cache_builder.store.readers.reading import CachedExample, Reader
from kd.common.disk.disk_errors import clear_write_errors
from kd.common.files import write_atomic
from kd.common.shown_text import public_place
from kd.evaluation.scoring.scored_text import ScoredText, logit_chunks
from kd.models.heads import split_head
from kd.models.loading import Model

MARKED = 30
"""Tokens that are marked."""
AROUND, TOP = 24, 10
"""Tokens to either side of a marked one, and candidates of each model."""
KL_EDGES = (0.05, 0.2, 0.5, 1.0, 2.0, 4.0)
"""Nats at which a token gets the next darker shade."""
LEGEND = "Each token is shaded by KL(teacher || student), at least, in nats:"


@dataclass(frozen=True)
class StudentRow:
    """What the student says at one row, at temperature 1."""

    said: Sequence[tuple[str, str]]
    top: Sequence[tuple[int, float]]
    """Id and probability, the most probable first."""


def write_agreement_page(
    model: Model,
    reader: Reader,
    row_kl: np.ndarray,
    path: Path,
    *,
    temperature: float = 1.0,
    tokens_per_batch: int | None = None,
) -> None:
    """Write the page, whole or not at all. Raises WriteError.

    row_kl   `[N]` nats of each row of the first examples of the cache, as `evaluate_agreement` has measured them
    """
    _, lengths = reader.lengths()
    starts = np.concatenate([[0], np.cumsum(lengths)])
    marked = np.argsort(-row_kl, kind="stable")[:MARKED]
    numbers = sorted({int(np.searchsorted(starts, row, side="right")) - 1 for row in marked})
    examples = {number: reader[number] for number in numbers}
    said = _student_rows(model, reader, list(examples.values()), tokens_per_batch)
    vocabulary = reader.vocabulary()
    passages = []
    for row in marked:
        number = int(np.searchsorted(starts, row, side="right")) - 1
        kl = row_kl[starts[number] : starts[number + 1]]
        passages.append(_passage(examples[number], reader, vocabulary, said[number], kl, int(row - starts[number])))
    teacher = public_place(str(reader.manifest.provenance.get("teacher")))
    intro = [
        f"The {len(marked)} of {len(row_kl):,} tokens at which student and teacher ({teacher}) differ most; KL is "
        f"{row_kl.mean():.4f} nats on average, at temperature {temperature:g}. Distributions are those at temperature 1."
    ]
    page = render_token_page("A student beside its teacher", intro, passages, legend=LEGEND, edges=KL_EDGES)
    with clear_write_errors(path, "another --html FILE"):
        write_atomic(path, page)


def _passage(
    example: CachedExample,
    reader: Reader,
    vocabulary: Sequence[bytes],
    student: Sequence[StudentRow],
    kl: np.ndarray,
    row: int,
) -> Passage:
    """The marked token among those around it."""
    first = max(0, row - AROUND)
    window = range(first, min(len(kl), row + AROUND + 1))
    views = token_views(example, reader.manifest, vocabulary, TOP, window)
    tokens = [_token(view, student[view.number], float(kl[view.number]), vocabulary) for view in views]
    title = f"example {example.index}: {example.id}, token {row}"
    return Passage(title, [("", "".join(token.text for token in tokens), tokens)], {row - first})


def _token(view: TokenView, student: StudentRow, kl: float, vocabulary: Sequence[bytes]) -> PageToken:
    candidates = [(quoted(piece_text(vocabulary, i)), p, i == view.id) for i, p in student.top]
    heading = f"token {view.number}: {quoted(view.piece)}, {kl:.3f} nats apart"
    return PageToken(
        view.text,
        bisect_right(KL_EDGES, kl),
        heading,
        [side_of(view, "teacher"), PageSide("student", student.said, candidates)],
    )


def _student_rows(
    model: Model, reader: Reader, examples: Sequence[CachedExample], tokens_per_batch: int | None
) -> dict[int, list[StudentRow]]:
    """Number of an example -> the student's row at each of its scored tokens."""
    texts = [ScoredText(e.id, e.context_ids, e.targets.gold_ids, e.gaps) for e in examples]
    rows: list[StudentRow | None] = [None] * sum(len(t.target_ids) for t in texts)
    head, size = split_head(model, reader.manifest.blocks.forced), reader.manifest.vocabulary_size
    for chunk in logit_chunks(head, texts, vocabulary_size=size, tokens_per_batch=tokens_per_batch):
        log_q = chunk.logits.double().log_softmax(dim=1)
        values, ids = log_q.topk(min(TOP, size), dim=1)
        gold = log_q.gather(1, chunk.gold_ids.unsqueeze(1))
        ranks = 1 + (log_q > gold).sum(dim=1)
        entropy = -(log_q.exp() * log_q).sum(dim=1)
        for index, row in enumerate(chunk.rows):
            said = [
                ("entropy", f"{float(entropy[index]):.3f} nats"),
                ("in the text", f"probability {float(gold[index, 0].exp()):.3g}, rank {int(ranks[index]):,}"),
            ]
            top = zip(ids[index].tolist(), values[index].exp().tolist(), strict=True)
            rows[row] = StudentRow(said, list(top))
    complete = [row for row in rows if row is not None]
    assert len(complete) == len(rows), "every scored position is in one chunk"
    starts = np.cumsum([0, *(len(t.target_ids) for t in texts)])
    return {e.index: complete[starts[n] : starts[n + 1]] for n, e in enumerate(examples)}
