"""The tasks of the registry, run: each hands `Settings` to its module and turns what comes back into a `TaskResult`.

A module that measures (`perplexity`, `choices`, …) knows nothing of reports; what two results must share to be compared
(`settings`), and what people want to read of them (`samples`), is written here.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

from kd.data.sources import Corpus
from kd.evaluation.scoring.scored_text import Progress, Result
from kd.evaluation.statistics.estimates import Documents, Estimate
from kd.evaluation.tasks.eval_task import LiveTeacher, Settings, TaskResult
from kd.models.loading import Model
from kd.models.tokenizer import Tokenizer

if TYPE_CHECKING:
    from kd.evaluation.tasks.agreement import AgreementResult
    from kd.evaluation.tasks.choices import ChoicesResult
    from kd.evaluation.tasks.generation import GenerationResult
    from kd.evaluation.tasks.hellaswag import HellaSwagResult
    from kd.evaluation.tasks.perplexity import PerplexityResult
    from kd.evaluation.tasks.samples import SamplesResult

AGREEMENT = ("kl", "jsd", "top1_agreement", "nll_per_token", "teacher_nll_per_token", "ece", "teacher_ece")
SAMPLES = 20
"""Examples of which a report keeps what the model did."""


def run_perplexity(model: Model, tokenizer: Tokenizer, settings: Settings) -> Iterator[Progress[TaskResult]]:
    from kd.evaluation.tasks.perplexity import evaluate_perplexity

    assert settings.corpus is not None
    corpus = settings.corpus
    steps = evaluate_perplexity(
        model,
        tokenizer,
        corpus,
        seq_len=settings.seq_len,
        stride=settings.stride,
        bos=settings.bos,
        separator=settings.separator,
        tokens_per_batch=settings.tokens_per_batch,
        limit_tokens=settings.limit_tokens,
    )

    def told(found: PerplexityResult) -> TaskResult:
        estimates = {name: getattr(found, name) for name in ("perplexity", "bits_per_byte", "nll_per_token", "ece")}
        used = {
            "text_digest": corpus.digest,
            "seq_len": found.blocks.seq_len,
            "stride": found.blocks.stride,
            "bos": found.blocks.bos,
            "limit_tokens": settings.limit_tokens,
            "pairs_cut": found.pairs_cut or None,
        }
        if corpus.kind == "pairs":
            used["separator"] = settings.separator
        return TaskResult(estimates, found.documents, used)

    return _progress(steps, told)


def run_agreement(model: Model, tokenizer: Tokenizer, settings: Settings) -> Iterator[Progress[TaskResult]]:
    from kd.evaluation.tasks.agreement import evaluate_agreement

    if settings.teacher is not None:
        return _live_agreement(model, tokenizer, settings, settings.teacher)
    assert settings.reader is not None
    reader, temperature = settings.reader, settings.temperature
    steps = evaluate_agreement(
        model, reader, temperature=temperature, limit=settings.limit, tokens_per_batch=settings.tokens_per_batch
    )

    def told(found: AgreementResult) -> TaskResult:
        estimates = {name: getattr(found, name) for name in AGREEMENT}
        used = {
            "cache_fingerprint": reader.manifest.fingerprint,
            "temperature": temperature,
            "limit": settings.limit,
            "top_k": reader.top_k or reader.config.top_k,
        }
        return TaskResult(estimates, found.documents, used)

    return _progress(steps, told)


def _live_agreement(
    model: Model, tokenizer: Tokenizer, settings: Settings, teacher: LiveTeacher
) -> Iterator[Progress[TaskResult]]:
    from kd.evaluation.scoring.scored_text import window
    from kd.evaluation.tasks.live_agreement import evaluate_live_agreement

    assert settings.corpus is not None
    steps = evaluate_live_agreement(
        model,
        teacher.model,
        tokenizer,
        settings.corpus,
        temperature=settings.temperature,
        seq_len=settings.seq_len,
        stride=settings.stride,
        bos=settings.bos,
        separator=settings.separator,
        tokens_per_batch=settings.tokens_per_batch,
        limit_tokens=settings.limit_tokens,
    )

    def told(found: AgreementResult) -> TaskResult:
        used = _asked(settings) | {
            "seq_len": min(window(m, settings.seq_len) for m in (model, teacher.model)),
            "teacher": teacher.name,
            "teacher_fingerprint": _digest([dict(teacher.identity)]),
            "temperature": settings.temperature,
            "stride": settings.stride,
            "limit_tokens": settings.limit_tokens,
            "pairs_cut": found.pairs_cut or None,
        }
        return TaskResult({name: getattr(found, name) for name in AGREEMENT}, found.documents, used)

    return _progress(steps, told)


def run_choices(model: Model, tokenizer: Tokenizer, settings: Settings) -> Iterator[Progress[TaskResult]]:
    """One wording under the plain names; both under `METRIC_original` and `METRIC_flan`."""
    corpora = {"": settings.corpus}
    if settings.other_wording is not None:
        corpora = {"_original": settings.corpus, "_flan": settings.other_wording}
    estimates: dict[str, Estimate] = {}
    used: dict[str, Any] = _asked(settings) | {"encoding": settings.encoding}
    samples: list[dict[str, str]] = []
    documents: Documents | None = None
    done = total = 0
    for name, corpus in corpora.items():
        assert corpus is not None
        found: ChoicesResult | None = None
        for step in _one_wording(model, tokenizer, corpus, settings):
            yield Progress(done + step.done, max(total, done + step.total))
            found = step.result
        assert found is not None
        done = total = done + step.total
        for metric, estimate in found.estimates.items():
            base, slash, part = metric.partition("/")
            estimates[f"{base}{name}{slash}{part}"] = estimate
        if corpus.source.get("labels"):
            used["labels"] = "both" if name else corpus.source["labels"]
        used |= {
            f"choices{name}_digest": _digest([e.id, e.choices, e.answer] for e in corpus.examples),
            f"examples_skipped{name}": found.skipped,
            f"prompts_cut{name}": found.prompts_cut,
        }
        if documents is None:
            documents = found.documents
            samples = [
                {"prompt": q.example.prompt, "expected": q.example.choices[q.answer], "got": q.example.choices[chosen]}
                for q, chosen in zip(found.questions[:SAMPLES], found.predictions.tolist(), strict=False)
            ]
    assert documents is not None
    yield Progress(done, done, TaskResult(estimates, documents, used, samples))


def _one_wording(
    model: Model, tokenizer: Tokenizer, corpus: Corpus, settings: Settings
) -> Iterator[Progress[ChoicesResult]]:
    from kd.evaluation.tasks.choices import evaluate_choices

    return evaluate_choices(
        model,
        tokenizer,
        corpus,
        seq_len=settings.seq_len,
        separator=settings.separator,
        bos=settings.bos,
        encoding=settings.encoding,
        tokens_per_batch=settings.tokens_per_batch,
    )


def run_generation(model: Model, tokenizer: Tokenizer, settings: Settings) -> Iterator[Progress[TaskResult]]:
    from kd.evaluation.answers.accepted import references
    from kd.evaluation.tasks.generation import Sampling, evaluate_generation

    assert settings.corpus is not None
    corpus = settings.corpus
    steps = evaluate_generation(
        model,
        tokenizer,
        corpus,
        seq_len=settings.seq_len,
        separator=settings.separator,
        bos=settings.bos,
        max_new_tokens=settings.max_new_tokens,
        stop=settings.stop,
        tokens_per_batch=settings.tokens_per_batch,
        sampling=Sampling(settings.sample_temperature, settings.sample_seed),
        metrics=settings.metrics,
        metric_settings=settings.metric_settings,
    )

    def told(found: GenerationResult) -> TaskResult:
        used = _asked(settings) | {
            "references_digest": _digest([e.id, references(e)] for e in corpus.examples),
            "max_new_tokens": settings.max_new_tokens or "as the longest reference needs",
            "stop": settings.stop,
            "decoding": _decoding(settings),
            "prompts_cut": found.prompts_cut,
            **found.made_by,
        }
        samples = [
            {"prompt": e.prompt, "expected": references(e)[0], "got": answer}
            for e, answer in zip(corpus.examples[:SAMPLES], found.answers, strict=False)
        ]
        return TaskResult(found.estimates, found.documents, used, samples)

    return _progress(steps, told)


def run_hellaswag(model: Model, tokenizer: Tokenizer, settings: Settings) -> Iterator[Progress[TaskResult]]:
    from kd.evaluation.tasks.hellaswag import evaluate_hellaswag

    assert settings.scenes is not None
    scenes = settings.scenes
    steps = evaluate_hellaswag(
        model,
        tokenizer,
        scenes,
        protocol=settings.protocol,
        seq_len=settings.seq_len,
        tokens_per_batch=settings.tokens_per_batch,
    )

    def told(found: HellaSwagResult) -> TaskResult:
        used = {
            "protocol": settings.protocol,
            "protocol_digest": _digest([settings.protocol]),
            "source": scenes.source,
            "rows_digest": _digest([s.activity, s.context, s.parts, s.endings, s.answer] for s in scenes.rows),
            "seq_len": settings.seq_len,
            "contexts_cut": found.contexts_cut,
            "rows_joined": found.rows_joined or None,
            "rows_unlabelled": scenes.unlabelled or None,
        }
        chosen = found.chosen[f"acc_norm_{settings.protocol}"].tolist()
        samples = [
            {"prompt": a.context, "expected": a.endings[a.scene.answer], "got": a.endings[c]}
            for a, c in zip(found.asked[:SAMPLES], chosen, strict=False)
        ]
        return TaskResult(found.estimates, found.documents, used, samples)

    return _progress(steps, told)


def run_samples(model: Model, tokenizer: Tokenizer, settings: Settings) -> Iterator[Progress[TaskResult]]:
    from kd.evaluation.tasks.samples import write_samples

    assert settings.prompts is not None
    prompts = settings.prompts
    steps = write_samples(
        model,
        tokenizer,
        prompts,
        seq_len=settings.seq_len,
        separator=settings.separator,
        bos=settings.bos,
        max_new_tokens=settings.max_new_tokens,
        tokens_per_batch=settings.tokens_per_batch,
    )

    def told(found: SamplesResult) -> TaskResult:
        used = {
            "source": prompts.name,
            "prompts_digest": _digest(zip(prompts.texts, prompts.expected, strict=True)),
            "max_new_tokens": found.max_new_tokens,
            "prompts_cut": found.prompts_cut,
        }
        samples = [
            {"prompt": prompt, "got": answer} | ({} if expected is None else {"expected": expected})
            for prompt, expected, answer in zip(prompts.texts, prompts.expected, found.answers, strict=True)
        ]
        return TaskResult(found.estimates, found.documents, used, samples)

    return _progress(steps, told)


def _progress(
    steps: Iterator[Progress[Result]], told: Callable[[Result], TaskResult]
) -> Iterator[Progress[TaskResult]]:
    """The same steps, with what is `told` of the result."""
    for step in steps:
        yield Progress(step.done, step.total, None if step.result is None else told(step.result))


def _decoding(settings: Settings) -> str:
    if not settings.sample_temperature:
        return "greedy"
    return f"sampled at temperature {settings.sample_temperature:g}, seed {settings.sample_seed}"


def _asked(settings: Settings) -> dict[str, Any]:
    """What was asked of every model, whatever window and tokenizer it has; its effect is counted beside it."""
    assert settings.corpus is not None
    source = settings.corpus.source
    worded = {"template": source.get("template"), "labels": source.get("labels"), "data_seed": source.get("seed")}
    return {
        "text_digest": settings.corpus.digest,
        "seq_len": settings.seq_len,
        "separator": settings.separator,
        "bos": settings.bos,
        **{k: v for k, v in worded.items() if v is not None},
    }


def _digest(rows: Iterable[Any]) -> str:
    """Hex digest of what `text_digest` leaves out."""
    text = json.dumps(list(rows), separators=(",", ":"))
    return hashlib.blake2b(text.encode("ascii"), digest_size=32).hexdigest()
