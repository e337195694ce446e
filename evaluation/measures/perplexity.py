"""Perplexity and bits per byte of a causal model on any text, of an encoder-decoder on pairs.

Sliding window: a document is read in windows of at most `seq_len` tokens, each moved on by `stride`; a window
scores only the tokens no earlier window has scored, so every token counts once (all but the document's first
where there is no BOS token). The first window scores all it holds, with little context at its start; later ones
give every token at least `seq_len - stride` tokens of context. The default stride, seq_len - 1, reads the text
about once; half of seq_len costs twice as much and is the usual compromise; 1 is the exact value of a
model with that context and costs seq_len times as much. Smaller strides give lower perplexities: compare
only numbers with equal seq_len and stride. (transformers documentation, "Perplexity of fixed-length models".)

Perplexity is per token and depends on the tokenizer; bits per byte does not (Gao et al. 2020, arXiv:2101.00027):

    nll = Σ -ln q(token) / tokens      perplexity = exp(nll)      bits per byte = Σ -ln q(token) / (ln 2 · bytes)

Bytes are the UTF-8 bytes of the scored tokens; a scored EOS token (pairs) adds nats and no bytes. q is normalised
over the ids the tokenizer knows: padded columns of the output layer are left out, as in the teacher's pass.

A pair that is longer than the window is cut as in training: its prompt loses its beginning, a target longer than the
window its end; such pairs are counted. Whether the model is as often right as it says: `kd.evaluation.statistics.calibration`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import numpy as np

from kd.common.errors import DataError
from kd.common.progress import Progress
from kd.data.corpus import Corpus
from kd.data.left_out import LeftOut
from kd.data.tokenizing.block_config import BlockConfig
from kd.data.tokenizing.token_rows import TokenRows
from kd.evaluation.scoring.reading_options import READING, ReadingOptions
from kd.evaluation.scoring.scored_text import ScoredText, TokenScores, model_ids, token_scores
from kd.evaluation.scoring.windows import text_blocks, token_rows, window
from kd.evaluation.statistics.calibration import calibration_error
from kd.evaluation.statistics.estimates import Documents, Estimate, per_example
from kd.models.loading import Model
from kd.models.tokenizer import Tokenizer


@dataclass(frozen=True)
class PerplexityResult:
    """What a model thinks of a text. Standard errors are clustered by document."""

    nll_per_token: Estimate
    """Mean NLL, in nats per token."""
    perplexity: Estimate
    """exp(NLL per token)."""
    bits_per_byte: Estimate
    """NLL in bits per UTF-8 byte."""
    tokens: int
    """Number of tokens that were scored."""
    bytes: int
    """Number of UTF-8 bytes of the scored tokens."""
    ece: Estimate
    """Expected calibration error, 0..1."""
    documents: Documents
    blocks: BlockConfig
    """Window and stride as used."""
    pairs_cut: int
    """Number of examples that were longer than the window."""
    too_short: int
    """Number of documents that have no token to score and were left out."""


def evaluate_perplexity(
    model: Model,
    tokenizer: Tokenizer,
    corpus: Corpus,
    *,
    reading: ReadingOptions = READING,
) -> Iterator[Progress[PerplexityResult]]:
    """Score `corpus`; the last record carries the result.

    Raises DataError when the model has fewer positions than the window or fewer logits than the tokenizer has
    entries, TeacherError when its output layer cannot be taken apart (see `kd.models.heads.split_head`).
    """
    blocks = text_blocks(reading, window(model, reading.seq_len), model, tokenizer)
    left_out = LeftOut()
    rows = list(first_tokens(token_rows(corpus, tokenizer, blocks, reading, left_out), reading.limit_tokens))
    texts = [ScoredText(r.example.id, r.context_ids, r.target_ids, r.gaps) for r in rows]
    lengths = [len(t.target_ids) for t in texts]
    scores = yield from token_scores(
        model,
        texts,
        vocabulary_size=model_ids(model, tokenizer),
        tokens_per_batch=reading.tokens_per_batch,
        forced=blocks.forced,
    )
    documents = Documents.of_examples([t.id for t in texts], corpus.kind)
    byte_counts = np.array([int(r.byte_end[-1]) for r in rows])
    total = len(scores.nll_N)
    counted = left_out.count("shortened"), left_out.count("too_short")
    yield Progress(total, total, perplexity_of(scores, lengths, byte_counts, documents, blocks, *counted))


def perplexity_of(
    scores: TokenScores,
    lengths: list[int],
    byte_counts: np.ndarray,
    documents: Documents,
    blocks: BlockConfig,
    pairs_cut: int = 0,
    too_short: int = 0,
) -> PerplexityResult:
    """The figures from the scores of every token, and `[examples]` tokens and bytes of each example."""
    sums = per_example(scores.nll_N, lengths)
    nll = documents.ratio(sums, np.array(lengths))
    bits = documents.ratio(sums / math.log(2), byte_counts)
    ece = calibration_error(documents, scores.confidence_N, scores.right_N, lengths)
    exponential = nll.exponential()
    return PerplexityResult(nll, exponential, bits, nll.n, bits.n, ece, documents, blocks, pairs_cut, too_short)


def first_tokens(rows: Iterable[TokenRows], limit: int | None) -> Iterator[TokenRows]:
    """`rows` up to exactly `limit` target tokens; the last example is cut short. None = all."""
    if limit is not None and limit < 1:
        raise DataError("there is nothing to score", found=f"a limit of {limit} tokens", expected="at least 1")
    left = math.inf if limit is None else limit
    for row in rows:
        size = len(row.target_ids)
        if size > left:
            keep = int(left)
            gaps = row.gaps.head(keep)
            row = replace(row, target_ids=row.target_ids[:keep], byte_end=row.byte_end[:keep], gaps=gaps)
        yield row
        left -= len(row.target_ids)
        if left <= 0:
            return
