"""How closely a model follows the teacher whose soft targets a cache holds, without that teacher.

Per row, over the teacher's kept tokens and everything else as one more outcome (the rest bucket):

    KL(teacher || model) = Σ_k p_k (ln p_k - ln q_k) + p_rest (ln p_rest - ln q_rest)        nats, >= 0

A lower bound of the full divergence (merging outcomes never raises it), tight where little mass is beyond k. Over the
same outcomes the divergence that is symmetric and bounded (Lin 1991), with m = (p + q)/2:

    JSD(teacher, model) = ½ KL(p || m) + ½ KL(q || m)                                             nats, 0..ln 2

p_rest comes from the cache's exact normaliser. ln q_rest is a logsumexp over the ids that are not kept, never
1 - Σ q: with 99.99 % of the mass kept, that difference has lost half of float32's digits. At temperature T both
sides are softened by T and the figure is not scaled by T².

Cached rows name tokens by the teacher's ids, so the model must share its tokenizer (`kd.evaluation.tokenizer_check`).
The teacher's own figures carry the cache's quantisation: about 1e-5 nats of KL with 8-bit log-probabilities, three
digits in its gold NLL (float16). How well either is calibrated on the rows:
`kd.evaluation.statistics.calibration`. A teacher that is at hand needs no cache: `kd.evaluation.measures.live_agreement`.
Top-1 agreement as in Stanton et al. 2021, arXiv:2106.05945.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from kd.cache_builder.store.records.teacher_record import WHY_ONE
from kd.common.errors import CacheError
from kd.common.progress import Progress
from kd.evaluation.scoring.scored_text import LogitChunk, ScoredText, chunk_scores, logit_chunks
from kd.evaluation.scoring.windows import require_positions
from kd.evaluation.statistics.calibration import calibration_error
from kd.evaluation.statistics.estimates import Documents, Estimate, per_example
from kd.models.heads import split_head
from kd.models.loading import Model
from kd.models.model_config import is_encoder_decoder

if TYPE_CHECKING:
    from kd.cache_builder.store.readers.reading import Reader
    from kd.cache_builder.store.soft_targets import SoftTargets


@dataclass(frozen=True)
class AgreementResult:
    """A model against its teacher. Standard errors are clustered by document."""

    kl: Estimate
    """KL(teacher || model) in nats per row, at `temperature`; rest bucket."""
    jsd: Estimate
    """JSD(teacher, model) in nats per row, at `temperature`; rest bucket."""
    top1_agreement: Estimate
    """Share of rows whose most probable token is the teacher's."""
    nll_per_token: Estimate
    """The model's NLL of the gold token, in nats per row, at temperature 1."""
    teacher_nll_per_token: Estimate
    """The teacher's NLL of the gold token, in nats per row; from a cache with the digits that it stores (float16)."""
    ece: Estimate
    """Expected calibration error of the model against the gold tokens, at temperature 1."""
    teacher_ece: Estimate
    """Expected calibration error of the teacher, at temperature 1."""
    rows: int
    """Number of rows that were scored."""
    temperature: float
    documents: Documents
    pairs_cut: int = 0
    """Number of examples that were longer than the window; 0 for a cache."""
    row_kl: np.ndarray = field(default_factory=lambda: np.zeros(0), repr=False)
    """`[rows]` float64 nats: KL of each row, in the order of the examples."""


FIGURES = ("kl", "jsd", "same", "nll", "confidence", "right", "teacher_nll", "teacher_confidence", "teacher_right")
"""Figures of every row: two divergences in nats, a share, an NLL in nats, a probability and a share; the last three are the
teacher's."""


def evaluate_agreement(
    model: Model,
    reader: Reader,
    *,
    temperature: float = 1.0,
    limit: int | None = None,
    tokens_per_batch: int | None = None,
) -> Iterator[Progress[AgreementResult]]:
    """Score `model` on the rows of a cache; the last record carries the result.

    temperature  one of the cache's grid
    limit        use the first so many examples (blocks) of the cache

    The caller has checked that the model shares the cache's tokenizer. Raises CacheError for a cache without ids
    and log-probabilities or without that temperature, CacheMismatchError when one of teacher and model has an encoder,
    DataError when the model has too few positions or logits.
    """
    from kd.student_trainer.batches.compatibility import refuse_other_layout

    _require_head(reader, temperature)
    refuse_other_layout(reader, "agreement", encoder=is_encoder_decoder(model.config))
    count = len(reader) if limit is None else min(limit, len(reader))
    if count < 1:
        raise CacheError("there is nothing to score", found=f"a limit of {limit} examples", expected="at least 1")
    tokens_E, rows_E = reader.lengths()
    blocks = reader.manifest.blocks
    require_positions(model, int((tokens_E - rows_E if blocks.encoder else tokens_E)[:count].max()))
    if blocks.encoder:
        require_positions(model, int(rows_E[:count].max()) + len(blocks.forced), decoder=True)
    lengths = [int(n) for n in rows_E[:count]]
    total, done = sum(lengths), 0
    figures = np.empty((len(FIGURES), total), dtype=np.float64)
    head, size = split_head(model, blocks.forced), reader.manifest.vocabulary_size
    ids: list[str] = []
    yield Progress(0, total)
    for first, stop, _ in reader.manifest.shards:  # a shard at a time: its decoded targets are what memory must hold
        if first >= count:
            break
        from kd.cache_builder.store.soft_targets import concatenate

        examples = reader.read(range(first, min(stop, count)))
        ids += [e.id for e in examples]
        texts = [ScoredText(e.id, e.context_ids, e.targets.gold_ids, e.gaps) for e in examples]
        targets = concatenate([e.targets for e in examples])
        before = done
        log_p, rest = teacher_outcomes(targets, temperature, size)
        kept_ids = targets.padded(targets.token_ids)  # type: ignore[arg-type]
        figures[6:, before : before + len(targets)] = _teacher_scores(targets)
        for chunk in logit_chunks(head, texts, vocabulary_size=size, tokens_per_batch=tokens_per_batch):
            figures[:6, before + chunk.rows] = _compare(
                chunk, kept_ids[chunk.rows], log_p[chunk.rows], rest[chunk.rows], temperature
            )
            done += len(chunk.rows)
            yield Progress(done, total)
    documents = Documents.of_examples(ids, reader.manifest.identity["corpus"]["kind"])
    yield Progress(total, total, agreement_of(figures, lengths, documents, temperature))


def agreement_of(
    figures: np.ndarray, lengths: Sequence[int], documents: Documents, temperature: float, pairs_cut: int = 0
) -> AgreementResult:
    """The result from `figures [FIGURES, N]` of consecutive examples of `lengths` rows."""
    by_name = dict(zip(FIGURES, figures, strict=True))

    def mean(name: str) -> Estimate:
        return documents.ratio(per_example(by_name[name], lengths), np.array(lengths))

    return AgreementResult(
        mean("kl"),
        mean("jsd"),
        mean("same"),
        mean("nll"),
        mean("teacher_nll"),
        calibration_error(documents, by_name["confidence"], by_name["right"], lengths),
        calibration_error(documents, by_name["teacher_confidence"], by_name["teacher_right"], lengths),
        figures.shape[1],
        temperature,
        documents,
        pairs_cut,
        by_name["kl"],
    )


def teacher_outcomes(targets: SoftTargets, temperature: float, vocabulary_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Log-probabilities of the kept tokens `[N, K]` and mass of the rest `[N]` at a temperature, float64.

    The rest is exactly 0 where every id is kept; otherwise rounding of the normaliser would pass for mass. Rows that keep
    fewer tokens than the longest have -inf behind them.
    """
    log_p = targets.padded(targets.logprobs_at(temperature), -np.inf)
    kept = np.full(len(log_p), log_p.shape[1]) if targets.kept is None else targets.kept
    rest = np.where(kept < vocabulary_size, targets.tail_mass_at(temperature), 0.0)
    return log_p, rest


def rest_bucket_kl(log_p: np.ndarray, rest: np.ndarray, log_q: np.ndarray, log_q_rest: np.ndarray) -> np.ndarray:
    """KL over K kept tokens and the rest as one outcome: `[N, K], [N], [N, K], [N] -> [N]` nats, float64.

    A rest of mass 0 adds nothing, whatever the model puts there. Hinton et al. 2015, arXiv:1503.02531.
    """
    held = log_p > -np.inf  # a row that keeps fewer tokens than the longest has -inf behind them
    head = (np.exp(log_p) * np.where(held, log_p - log_q, 0.0)).sum(axis=1)
    tail = np.zeros_like(rest)
    held = rest > 0
    tail[held] = rest[held] * (np.log(rest[held]) - log_q_rest[held])
    return np.asarray(head + tail)


def rest_bucket_jsd(log_p: np.ndarray, rest: np.ndarray, log_q: np.ndarray, log_q_rest: np.ndarray) -> np.ndarray:
    """JSD over K kept tokens and the rest as one outcome: `[N, K], [N], [N, K], [N] -> [N]` nats, 0..ln 2, float64.

    Lin 1991, Divergence measures based on the Shannon entropy.
    """
    with np.errstate(divide="ignore"):
        log_p = np.concatenate([log_p, np.log(rest)[:, None]], axis=1)
    return jensen_shannon(log_p, np.concatenate([log_q, log_q_rest[:, None]], axis=1))


def jensen_shannon(log_p: np.ndarray, log_q: np.ndarray) -> np.ndarray:
    """JSD of two distributions given as log-probabilities: `[N, K], [N, K] -> [N]` nats, float64; -inf is no mass."""
    with np.errstate(invalid="ignore"):  # -inf - -inf: an outcome that neither has
        # as logaddexp, but exactly log_p where both are equal: a model has no divergence from itself, not 1e-18
        log_m = np.maximum(log_p, log_q) + (np.log1p(np.exp(-np.abs(log_p - log_q))) - np.log1p(1.0))
        sides = [np.where(np.isneginf(log_a), 0.0, np.exp(log_a) * (log_a - log_m)) for log_a in (log_p, log_q)]
    return np.asarray(np.clip(0.5 * (sides[0] + sides[1]).sum(axis=1), 0.0, np.log(2)))  # rounding may leave the range


def _teacher_scores(targets: SoftTargets) -> np.ndarray:
    """`[3, m]` float64: NLL of the gold token in nats, the largest probability, 1 where that is the gold token."""
    assert targets.token_ids is not None
    assert targets.logprobs is not None
    top = targets.most_probable
    largest = np.exp(targets.logprobs.reshape(-1)[top].astype(np.float64))
    first = targets.token_ids.reshape(-1)[top] == targets.gold_ids
    return np.stack([-targets.gold_logprob.astype(np.float64), largest, first])


def _compare(
    chunk: LogitChunk, token_ids: np.ndarray, log_p: np.ndarray, rest: np.ndarray, temperature: float
) -> np.ndarray:
    """`[6, m]` float64: the first six of FIGURES."""
    import torch

    ids = torch.from_numpy(token_ids).to(chunk.logits.device).long()
    soft = chunk.logits / temperature
    log_z = soft.logsumexp(dim=1, keepdim=True)
    log_q = (soft.gather(1, ids) - log_z).cpu().double().numpy()
    log_q[np.isneginf(log_p)] = -np.inf
    log_q_rest = (soft.scatter(1, ids, -torch.inf).logsumexp(dim=1) - log_z.squeeze(1)).cpu().double().numpy()
    same = (chunk.logits.argmax(dim=1) == ids[:, 0]).cpu().numpy()
    outcomes = (log_p, rest, log_q, log_q_rest)
    return np.stack([rest_bucket_kl(*outcomes), rest_bucket_jsd(*outcomes), same, *chunk_scores(chunk)])


def _require_head(reader: Reader, temperature: float) -> None:
    """Refuse a cache whose rows do not say which tokens the teacher preferred, or not at this temperature."""
    names = {a.name for a in reader.manifest.arrays}
    if not {"token_ids", "logprobs"} <= names:
        raise CacheError(
            "this cache cannot be compared with token by token",
            cache=reader.root,
            found=f"profile {reader.config.profile}",
            expected="ids and log-probabilities of the top k",
            try_="a cache built with --profile kl, compact, adaptive or full",
        )
    unknown = {
        "the probability beyond the kept tokens": reader.manifest.tail_unknown,
        "the log-probability of tokens of the text that are not among the kept ones": reader.manifest.gold_in_top_k,
    }
    if any(unknown.values()):
        raise CacheError(
            "this cache cannot be compared with token by token",
            cache=reader.root,
            found="an imported cache whose source did not say "
            + ", ".join(what for what, is_so in unknown.items() if is_so),
            try_="perplexity and tasks, which need no cache; or a cache whose source says it",
        )
    grid = reader.config.temperatures
    if temperature not in grid:
        raise CacheError(
            "this cache does not hold that temperature",
            cache=reader.root,
            found=f"temperature {temperature:g}",
            expected=f"one of {', '.join(f'{t:g}' for t in grid)}",
            why=WHY_ONE if reader.manifest.logprobs_only else None,
        )
