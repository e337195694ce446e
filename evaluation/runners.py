"""The tasks of the registry, run: each hands `Settings` to its module and turns what comes back into a `TaskResult`.

A module that measures (`perplexity`, `choices`, …) knows nothing of reports; what two results must share to be compared
(`settings`), and what people want to read of them (`samples`), is written here.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from kd.data.models import Model
from kd.data.sources import Corpus
from kd.data.tokenizer import Tokenizer
from kd.evaluation.estimates import Documents, Estimate
from kd.evaluation.scoring import Progress
from kd.evaluation.task import Settings, TaskResult

if TYPE_CHECKING:
    from kd.evaluation.choices import ChoicesResult

SAMPLES = 20
"""Examples of which a report keeps what the model did."""


def run_perplexity(model: Model, tokenizer: Tokenizer, settings: Settings) -> Iterator[Progress[TaskResult]]:
    from kd.evaluation.perplexity import evaluate_perplexity

    assert settings.corpus is not None
    steps = evaluate_perplexity(
        model, tokenizer, settings.corpus, seq_len=settings.seq_len, stride=settings.stride, bos=settings.bos,
        separator=settings.separator, tokens_per_batch=settings.tokens_per_batch, limit_tokens=settings.limit_tokens,
    )  # fmt: skip
    for step in steps:
        result = None
        if step.result is not None:
            found = step.result
            estimates = {name: getattr(found, name) for name in ("perplexity", "bits_per_byte", "nll_per_token")}
            used = {
                "text_digest": settings.corpus.digest,
                "seq_len": found.blocks.seq_len,
                "stride": found.blocks.stride,
                "bos": found.blocks.bos,
                "limit_tokens": settings.limit_tokens,
            }
            if settings.corpus.kind == "pairs":
                used["separator"] = settings.separator
            result = TaskResult(estimates, found.documents, used)
        yield Progress(step.done, step.total, result)


def run_agreement(model: Model, tokenizer: Tokenizer, settings: Settings) -> Iterator[Progress[TaskResult]]:
    from kd.evaluation.agreement import evaluate_agreement

    assert settings.reader is not None
    reader, temperature = settings.reader, settings.temperature
    steps = evaluate_agreement(
        model, reader, temperature=temperature, limit=settings.limit, tokens_per_batch=settings.tokens_per_batch
    )
    for step in steps:
        result = None
        if step.result is not None:
            found = step.result
            estimates = {
                name: getattr(found, name)
                for name in ("kl", "top1_agreement", "nll_per_token", "teacher_nll_per_token")
            }
            used = {
                "cache_fingerprint": reader.manifest.fingerprint,
                "temperature": temperature,
                "limit": settings.limit,
                "top_k": reader.top_k or reader.config.top_k,
            }
            result = TaskResult(estimates, found.documents, used)
        yield Progress(step.done, step.total, result)


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
    from kd.evaluation.choices import evaluate_choices

    return evaluate_choices(
        model, tokenizer, corpus, seq_len=settings.seq_len, separator=settings.separator, bos=settings.bos,
        encoding=settings.encoding, tokens_per_batch=settings.tokens_per_batch,
    )  # fmt: skip


def run_generation(model: Model, tokenizer: Tokenizer, settings: Settings) -> Iterator[Progress[TaskResult]]:
    from kd.evaluation.generation import evaluate_generation, references

    assert settings.corpus is not None
    steps = evaluate_generation(
        model, tokenizer, settings.corpus, seq_len=settings.seq_len, separator=settings.separator, bos=settings.bos,
        max_new_tokens=settings.max_new_tokens, stop=settings.stop, tokens_per_batch=settings.tokens_per_batch,
    )  # fmt: skip
    for step in steps:
        result = None
        if step.result is not None:
            found = step.result
            used = _asked(settings) | {
                "references_digest": _digest([e.id, references(e)] for e in settings.corpus.examples),
                "max_new_tokens": settings.max_new_tokens or "as the longest reference needs",
                "stop": settings.stop,
                "prompts_cut": found.prompts_cut,
            }
            samples = [
                {"prompt": e.prompt, "expected": references(e)[0], "got": answer}
                for e, answer in zip(settings.corpus.examples[:SAMPLES], found.answers, strict=False)
            ]
            result = TaskResult(found.estimates, found.documents, used, samples)
        yield Progress(step.done, step.total, result)


def run_hellaswag(model: Model, tokenizer: Tokenizer, settings: Settings) -> Iterator[Progress[TaskResult]]:
    from kd.evaluation.hellaswag import evaluate_hellaswag

    assert settings.scenes is not None
    scenes = settings.scenes
    steps = evaluate_hellaswag(model, tokenizer, scenes, protocol=settings.protocol, seq_len=settings.seq_len,
                               tokens_per_batch=settings.tokens_per_batch)  # fmt: skip
    for step in steps:
        result = None
        if step.result is not None:
            found = step.result
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
            result = TaskResult(found.estimates, found.documents, used, samples)
        yield Progress(step.done, step.total, result)


def _asked(settings: Settings) -> dict[str, Any]:
    """What was asked of every model, whatever window and tokenizer it has; its effect is counted beside it."""
    assert settings.corpus is not None
    return {"text_digest": settings.corpus.digest, "seq_len": settings.seq_len, "separator": settings.separator,
            "bos": settings.bos}  # fmt: skip


def _digest(rows: Iterable[Any]) -> str:
    """Hex digest of what `text_digest` leaves out."""
    text = json.dumps(list(rows), separators=(",", ":"))
    return hashlib.blake2b(text.encode("ascii"), digest_size=32).hexdigest()
