"""How closely a model follows a teacher that is at hand: both read the text, and whole distributions are compared.

    KL(teacher || model) = Σ_k p_k (ln p_k - ln q_k)        over all ids of the tokenizer, float64, nats

The same figures as those of `kd.evaluation.measures.agreement`, without a cache's top k, rest bucket and codec, but with the
teacher's forward pass. Text becomes rows as for perplexity. Both models must share a tokenizer and be of one kind.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from kd.common.errors import DataError
from kd.common.progress import Progress
from kd.data.corpus import Corpus
from kd.data.left_out import LeftOut
from kd.evaluation.measures.agreement import FIGURES, AgreementResult, agreement_of, jensen_shannon
from kd.evaluation.measures.perplexity import first_tokens
from kd.evaluation.scoring.reading_options import READING, ReadingOptions
from kd.evaluation.scoring.scored_text import LogitChunk, ScoredText, chunk_scores, logit_chunks, model_ids
from kd.evaluation.scoring.windows import text_blocks, token_rows, window
from kd.evaluation.statistics.estimates import Documents
from kd.models.heads import split_head
from kd.models.loading import Model
from kd.models.model_config import is_encoder_decoder
from kd.models.tokenizer import Tokenizer


def evaluate_live_agreement(
    model: Model,
    teacher: Model,
    tokenizer: Tokenizer,
    corpus: Corpus,
    *,
    reading: ReadingOptions = READING,
    temperature: float = 1.0,
) -> Iterator[Progress[AgreementResult]]:
    """Score `model` against `teacher` on the rows of `corpus`; the last record carries the result.

    The caller has checked that both use `tokenizer`. Other arguments as in `evaluate_perplexity`; the window is by default
    what both have positions for. Raises DataError where one of the two alone has an encoder.
    """
    encoder = is_encoder_decoder(model.config)
    if encoder != is_encoder_decoder(teacher.config):
        raise DataError("one of model and teacher has an encoder", expected="two causal models, or two with an encoder")
    if temperature <= 0:
        raise DataError("temperature must be positive", found=temperature)
    blocks = text_blocks(reading, shared_window(model, teacher, reading.seq_len), model, tokenizer)
    left_out = LeftOut()
    rows = list(first_tokens(token_rows(corpus, tokenizer, blocks, reading, left_out), reading.limit_tokens))
    texts = [ScoredText(r.example.id, r.context_ids, r.target_ids, r.gaps) for r in rows]
    lengths = [len(t.target_ids) for t in texts]
    total, done = sum(lengths), 0
    figures = np.empty((len(FIGURES), total))
    yield Progress(0, total)
    size = min(model_ids(m, tokenizer) for m in (model, teacher))
    both = (
        logit_chunks(
            split_head(m, blocks.forced), texts, vocabulary_size=size, tokens_per_batch=reading.tokens_per_batch
        )
        for m in (model, teacher)
    )
    for ours, theirs in zip(*both, strict=True):
        assert np.array_equal(ours.rows, theirs.rows), "both models' batches depend on the texts alone"
        figures[:, ours.rows] = _compare(ours, theirs, temperature)
        done += len(ours.rows)
        yield Progress(done, total)
    documents = Documents.of_examples([t.id for t in texts], corpus.kind)
    yield Progress(total, total, agreement_of(figures, lengths, documents, temperature, left_out.count("shortened")))


def shared_window(model: Model, teacher: Model, seq_len: int | None) -> int:
    """`seq_len`, or by default what both models have positions for, at most 1024. Raises DataError as `window`."""
    return min(window(m, seq_len) for m in (model, teacher))


def _compare(ours: LogitChunk, theirs: LogitChunk, temperature: float) -> np.ndarray:
    """`[FIGURES, m]` float64."""
    log_q, log_p = ((c.logits.double() / temperature).log_softmax(dim=1).cpu().numpy() for c in (ours, theirs))
    kl = (np.exp(log_p) * (log_p - log_q)).sum(axis=1)
    same = (ours.logits.argmax(dim=1).cpu() == theirs.logits.argmax(dim=1).cpu()).numpy()
    return np.stack([kl, jensen_shannon(log_p, log_q), same, *chunk_scores(ours), *chunk_scores(theirs)])
