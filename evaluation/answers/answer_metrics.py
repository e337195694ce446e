"""Further metrics of generated answers, by the libraries that published figures were made with.

    rouge1, rougeL, rougeLsum   F1 of words, of the longest common subsequence, and of that line by line (rouge-score; Lin
                                2004). Words are runs of a-z and 0-9 after lower case: not for texts with accents. No
                                stemmer unless asked for (`--rouge-stemmer`, Porter's). Lines are what Lsum takes for
                                sentences, as the library does: without line ends it equals rougeL
    squad_em, squad_f1          SQuAD's own normalisation (`kd.evaluation.answers.accepted`)
    coverage                    share of the words an answer had to use that it uses in any inflection (CommonGen)
    bleu                        corpus BLEU, 0..100, mixed case, tokenizer 13a (sacrebleu; Post 2018, arXiv:1804.08771)
    bertscore                   F1 of tokens matched greedily by the cosine of an encoder's states (bert-score; Zhang et
                                al. 2020, arXiv:1904.09675); no idf, no rescaling; the encoder is `--bertscore-model`

The best of several references counts, except in BLEU, which matches n-grams with all of them. Which of these a text gets,
its tasks' files say (`metrics`), or `--metrics` for all. Means have the standard error of a mean of clustered examples;
BLEU is no mean, and has the bootstrap's. Every library is named with version and settings beside its figures.

coverage: a word is used where a word of the answer equals it as it stands, in its lemma (simplemma, English, no download) or in
its Porter stem, all in lower case. Only together they find 99.85 % of the words in CommonGen's own
references; lemmas alone 98.2 % ("sitting" is not "sit" to simplemma), stems 97.2 % (scripts/lemma_coverage.py).
The reference systems ask spaCy's en_core_web_sm, which has to be downloaded and judges by the part of speech.

Add a metric: a function and a line in `ANSWER_METRICS`. Shapes: E examples, S summed statistics.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import version
from itertools import zip_longest
from typing import Any

import numpy as np

from kd.common.errors import DataError, unknown_name
from kd.data.rows.example import Example
from kd.evaluation.answers.accepted import best_over, references, squad_exact_match, token_f1
from kd.evaluation.statistics.estimates import Documents, Estimate, figures_by_task, with_tasks

BOOTSTRAP_SEED = 0


@dataclass(frozen=True)
class MetricSettings:
    """What metrics are told."""

    rouge_stemmer: bool = False
    bertscore_model: str | None = None
    """Folder or hub id of BERTScore's encoder. None: BERTScore is not computed."""
    bertscore_layer: int | None = None
    """Layer of the encoder whose states are compared, counted from 1. None: the layer that bert-score recommends for it."""
    device: str = "auto"


@dataclass(frozen=True)
class AnswerMetric:
    """A score of answers against what was accepted."""

    title: str
    unit: str
    score: Callable[[Sequence[str], Sequence[Example], MetricSettings], np.ndarray]
    """`[E]` score of each example, NaN for an example without one; for a corpus metric `[E, S]` statistics to be summed."""
    made_by: Callable[[Sequence[Example], MetricSettings], str]
    """Function that names the library, its version and its settings."""
    of_sums: Callable[[np.ndarray], float] | None = None
    """Function that makes the score of a corpus from its summed statistics `[S]`. None: the score is the mean over
    examples."""


def metrics_by_task(
    examples: Sequence[Example],
    named: Mapping[str, Sequence[str]],
    wanted: Sequence[str] | None,
    settings: MetricSettings,
) -> dict[str, list[str]]:
    """Metric -> tasks it is computed for, in the registry's order.

    named    task -> metrics its file names
    wanted   metrics for every task instead; None = as named, BERTScore only where an encoder is given

    Raises DataError for an unknown metric, and for BERTScore that was asked for without an encoder.
    """
    tasks = sorted({e.task for e in examples})
    if wanted is not None:
        named = dict.fromkeys(tasks, wanted)
        if "bertscore" in wanted and settings.bertscore_model is None:
            raise DataError(
                "BERTScore needs an encoder",
                found="--metrics bertscore",
                try_="--bertscore-model FOLDER_OR_ID (system 001: roberta-large for English, "
                "bert-base-multilingual-cased for Spanish)",
            )
    for task in tasks:
        for name in named.get(task, ()):
            if name not in ANSWER_METRICS and name not in CHOICES_METRICS:
                raise unknown_name("metric of an answer", name, ANSWER_METRICS, where=f"task {task}")
    if settings.bertscore_model is not None:
        from kd.evaluation.answers.bertscore import encoder_layer

        encoder_layer(settings.bertscore_model, settings.bertscore_layer)
    chosen = {name: [t for t in tasks if name in named.get(t, ())] for name in ANSWER_METRICS}
    if settings.bertscore_model is None:
        chosen["bertscore"] = []
    return {name: tasks for name, tasks in chosen.items() if tasks}


def score_answers(
    answers: Sequence[str],
    examples: Sequence[Example],
    documents: Documents,
    chosen: Mapping[str, Sequence[str]],
    settings: MetricSettings,
) -> tuple[dict[str, Estimate], dict[str, str]]:
    """Estimates by name (`METRIC`, `METRIC_mean_of_tasks`, `METRIC/TASK`), and what made them by the metrics' names.

    chosen   metric -> tasks it is computed for
    """
    estimates: dict[str, Estimate] = {}
    made_by: dict[str, list[str]] = {}
    tasks = [e.task for e in examples]
    for name, wanted in chosen.items():
        metric = ANSWER_METRICS[name]
        inside = np.array([task in wanted for task in tasks])
        scored = [e for e, held in zip(examples, inside, strict=True) if held]
        scores = metric.score([a for a, held in zip(answers, inside, strict=True) if held], scored, settings)
        has_score = ~np.isnan(scores).reshape(len(scores), -1).any(axis=1)
        if not has_score.any():
            continue
        inside[inside] = has_score
        made_by.setdefault(metric.made_by(scored, settings), []).append(name)
        part, kept = documents.part(inside), [task for task, held in zip(tasks, inside, strict=True) if held]
        if metric.of_sums is None:
            figures = {name: part.ratio(scores[has_score], np.ones(len(kept)))}
            figures |= figures_by_task(name, part, scores[has_score], kept)
        else:
            figures = with_tasks(name, part, scores[has_score], kept, metric.of_sums, seed=BOOTSTRAP_SEED)
        estimates |= {key: documents.spread(estimate, part) for key, estimate in figures.items()}
    return estimates, {", ".join(names): made for made, names in made_by.items()}


def _rouge(kind: str) -> Callable[[Sequence[str], Sequence[Example], MetricSettings], np.ndarray]:
    def score(answers: Sequence[str], examples: Sequence[Example], settings: MetricSettings) -> np.ndarray:
        from rouge_score.rouge_scorer import RougeScorer

        scorer = RougeScorer([kind], use_stemmer=settings.rouge_stemmer)
        return np.array(
            [
                scorer.score_multi(references(e), answer)[kind].fmeasure
                for answer, e in zip(answers, examples, strict=True)
            ],
            dtype=np.float64,
        )

    return score


def _rouge_made_by(examples: Sequence[Example], settings: MetricSettings) -> str:
    stemmer = "Porter's stemmer" if settings.rouge_stemmer else "no stemmer"
    return f"rouge-score {version('rouge-score')}, {stemmer}, F1, sentences of Lsum are lines"


def _squad(metric: Callable[[str, str], float]) -> Callable[[Sequence[str], Sequence[Example], Any], np.ndarray]:
    def score(answers: Sequence[str], examples: Sequence[Example], settings: MetricSettings) -> np.ndarray:
        return np.array([best_over(metric, a, references(e)) for a, e in zip(answers, examples, strict=True)])

    return score


def _squad_made_by(examples: Sequence[Example], settings: MetricSettings) -> str:
    return "SQuAD's normalisation, best reference"


def _coverage(answers: Sequence[str], examples: Sequence[Example], settings: MetricSettings) -> np.ndarray:
    return np.array(
        [
            np.nan if not e.keywords else covered_share(answer, e.keywords)
            for answer, e in zip(answers, examples, strict=True)
        ]
    )


def covered_share(answer: str, keywords: Sequence[str]) -> float:
    """Share of `keywords` (at least one) of which a form stands in `answer`."""
    used = frozenset().union(*(word_forms(word) for word in re.findall(r"\w+(?:['’-]\w+)*", answer.lower())))
    return sum(bool(word_forms(keyword.lower()) & used) for keyword in keywords) / len(keywords)


@lru_cache(maxsize=100_000)
def word_forms(word: str) -> frozenset[str]:
    """A lower-case word as it stands, its lemma and its stem: two words that share one are forms of each other.

    A lemma never meets a stem: "pol" is the stem of "pole" and no lemma of a "pol".
    """
    return frozenset({word, f"lemma {word}", f"lemma {_lemma(word)}", f"stem {_stemmer().stem(word)}"})


def _lemma(word: str) -> str:
    import simplemma

    return simplemma.lemmatize(word, lang="en").lower()


@lru_cache(maxsize=1)
def _stemmer() -> Any:
    from nltk.stem.porter import PorterStemmer  # a part of nltk that needs no data; rouge-score stems with it too

    return PorterStemmer()


def _coverage_made_by(examples: Sequence[Example], settings: MetricSettings) -> str:
    return f"form, lemma (simplemma {version('simplemma')}, en) or stem (Porter, nltk {version('nltk')})"


def _bleu(answers: Sequence[str], examples: Sequence[Example], settings: MetricSettings) -> np.ndarray:
    """`[E, 10]`: n-grams matched and there are, of 1 to 4 words; words of the answer and of the reference."""
    from sacrebleu.metrics.bleu import BLEU

    scorer = BLEU(effective_order=True)  # of a sentence's statistics nothing but the score depends on it
    scores = [scorer.sentence_score(a, list(references(e))) for a, e in zip(answers, examples, strict=True)]
    return np.array([[*f.counts, *f.totals, f.sys_len, f.ref_len] for f in scores], dtype=np.float64)


def bleu_of_sums(sums: np.ndarray) -> float:
    """BLEU of summed statistics `[10]`, smoothed as sacrebleu does by default (exp)."""
    from sacrebleu.metrics.bleu import BLEU

    counts = [round(v) for v in sums.tolist()]
    return float(BLEU.compute_bleu(counts[:4], counts[4:8], counts[8], counts[9], smooth_method="exp").score)


def _bleu_made_by(examples: Sequence[Example], settings: MetricSettings) -> str:
    from sacrebleu.metrics.bleu import BLEU

    scorer = BLEU()
    streams: list[Any] = [list(stream) for stream in zip_longest(*(references(e) for e in examples))]
    scorer.corpus_score([""] * len(examples), streams)  # the signature counts references, and says so after a score
    return f"sacrebleu {scorer.get_signature()}; bootstrap of 1,000 draws, seed {BOOTSTRAP_SEED}"


def _bertscore(answers: Sequence[str], examples: Sequence[Example], settings: MetricSettings) -> np.ndarray:
    from kd.evaluation.answers.bertscore import encoder_f1

    assert settings.bertscore_model is not None
    return encoder_f1(
        answers,
        [references(e) for e in examples],
        settings.bertscore_model,
        layer=settings.bertscore_layer,
        device=settings.device,
    )


def _bertscore_made_by(examples: Sequence[Example], settings: MetricSettings) -> str:
    from kd.evaluation.answers.bertscore import described

    assert settings.bertscore_model is not None
    return described(settings.bertscore_model, settings.bertscore_layer)


SHARE = "mean over examples"
ANSWER_METRICS: dict[str, AnswerMetric] = {
    "rouge1": AnswerMetric("ROUGE-1", SHARE, _rouge("rouge1"), _rouge_made_by),
    "rougeL": AnswerMetric("ROUGE-L", SHARE, _rouge("rougeL"), _rouge_made_by),
    "rougeLsum": AnswerMetric("ROUGE-Lsum", SHARE, _rouge("rougeLsum"), _rouge_made_by),
    "squad_em": AnswerMetric("SQuAD EM", "share of examples", _squad(squad_exact_match), _squad_made_by),
    "squad_f1": AnswerMetric("SQuAD F1", SHARE, _squad(token_f1), _squad_made_by),
    "coverage": AnswerMetric("coverage", "share of words", _coverage, _coverage_made_by),
    "bleu": AnswerMetric("BLEU", "of 100, over the corpus", _bleu, _bleu_made_by, bleu_of_sums),
    "bertscore": AnswerMetric("BERTScore", SHARE, _bertscore, _bertscore_made_by),
}
CHOICES_METRICS = ("accuracy",)
"""Metrics that a task's file may name although they do not belong to generated answers: those of rank classification."""
