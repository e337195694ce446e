"""`--tasks agreement`: how closely a model follows a teacher, whose soft targets a cache holds or that is loaded beside it.

See `kd.evaluation.measures.agreement` and `kd.evaluation.measures.live_agreement`. Both compare token by token, so model and
teacher must share a tokenizer: `kd.evaluation.tokenizer_check`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kd.cache_builder.weighted_caches import WeightedCache, parse_caches
from kd.common.errors import DataError
from kd.common.progress import Progress
from kd.common.settings import check, setting
from kd.evaluation.tasks.eval_task import Metric, Task, TaskResult, question_settings, rows_digest, task_progress
from kd.evaluation.tasks.shared_options import SharedOptions

if TYPE_CHECKING:
    from kd.cache_builder.store.readers.reading import Reader
    from kd.data.corpus import Corpus
    from kd.evaluation.measures.agreement import AgreementResult
    from kd.models.loading import Model
    from kd.models.model_request import ModelRequest
    from kd.models.tokenizer import Tokenizer


METRICS = {
    "kl_kept": Metric("KL to teacher, kept tokens and rest", "nats per token", "lower", "row"),
    "jsd_kept": Metric("JSD to teacher, kept tokens and rest", "nats per token", "lower", "row"),
    "kl": Metric("KL to teacher, all tokens", "nats per token", "lower", "row"),
    "jsd": Metric("JSD to teacher, all tokens", "nats per token", "lower", "row"),
    "top1_agreement": Metric("top-1 agreement", "share of tokens", "higher", "row"),
    "nll_per_token": Metric("NLL", "nats per token", "lower", "row"),
    "teacher_nll_per_token": Metric("teacher's NLL", "nats per token", None, "row"),
    "ece": Metric("calibration error", "ECE, 15 bins", "lower", "row"),
    "teacher_ece": Metric("teacher's calibration error", "ECE, 15 bins", None, "row"),
}


KEPT = {"kl": "kl_kept", "jsd": "jsd_kept"}
"""Divergence over all tokens, which needs the teacher at hand -> the one that a cache gives: over the tokens that it keeps, and all
others as one outcome. That one is never above the first."""


@dataclass(frozen=True)
class AgreementOptions:
    """Options of agreement."""

    cache: tuple[WeightedCache, ...] | None = setting(None, metavar="PATH_OR_URL", parse=parse_caches)
    """Cache whose teacher the model is compared with in agreement: KL and JSD over the tokens that it keeps and all others as one
    outcome (kl_kept, jsd_kept), top-1 agreement and calibration."""
    teacher: str | None = None
    """Model to compare with in agreement on --data, instead of a cache: a hub id, a folder, demo, or random:NAME. KL and JSD are
    then over all tokens (kl, jsd)."""
    teacher_adapter: str | None = setting(None, metavar="FOLDER|HUB_ID")
    """Adapter (LoRA) to merge into the weights of --teacher."""
    temperature: float = 1.0
    """Temperature of the softmaxes that agreement's KL and JSD compare."""
    html: Path | None = setting(None, metavar="FILE")
    """Write the tokens at which the model differs most from the teacher of --cache as one HTML page, with both
    distributions (agreement)."""

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True)
class LiveTeacher:
    """A teacher that is loaded beside the model."""

    request: ModelRequest
    """The teacher that is loaded, with its revision pinned."""
    corpus: Corpus
    """Text on which the two are compared."""
    model: Model | None = None
    """The teacher's weights; None before they are loaded."""


class AgreementTask(Task[AgreementOptions, "Reader | LiveTeacher"]):
    """How closely a model follows its teacher. It is asked about the training text on purpose."""

    @property
    def metrics(self) -> Mapping[str, Metric]:
        return METRICS

    def reads_text(self, options: AgreementOptions) -> bool:
        return options.teacher is not None

    def check(self, name: str, options: AgreementOptions, shared: SharedOptions) -> None:
        if options.cache is None and options.teacher is None:
            raise DataError(
                f"the task {name} needs a teacher that was not given",
                try_="--cache DIR, or --teacher MODEL with --data SPEC",
            )
        if options.html is not None and (options.cache is None or options.html.is_dir()):
            raise DataError(
                "the page of agreement is a file, from a cache",
                found=f"--html {options.html}" + (" without --cache" if options.cache is None else ", a folder"),
                try_="--cache DIR --html FILE.html",
            )
        if options.teacher is not None and (options.cache is not None or shared.data.spec is None):
            raise DataError(
                f"the task {name} follows one teacher on one text",
                found="a live teacher without a text" if options.cache is None else "a cache and a live teacher",
                try_="--cache DIR alone, or --teacher MODEL with --data SPEC",
            )
        if options.teacher_adapter is not None and options.teacher is None:
            raise DataError(
                "there is no teacher for this adapter",
                found=f"--teacher-adapter {options.teacher_adapter}",
                try_="--teacher MODEL",
            )

    def load(
        self, options: AgreementOptions, shared: SharedOptions, tokenizer: Tokenizer, corpus: Corpus | None
    ) -> Reader | LiveTeacher:
        from kd.evaluation.tokenizer_check import refuse_cache_of_other_tokenizer, refuse_teacher_of_other_tokenizer

        if options.teacher is None:
            assert options.cache is not None, "one of the two was checked to be given"
            from kd.cache_builder.opening import open_cache

            reader = open_cache(options.cache)
            refuse_cache_of_other_tokenizer(reader, tokenizer)
            return reader
        from kd.models.identity import pinned

        assert corpus is not None, "the text was checked to be given"
        request = pinned(shared.loading.teacher_request(options.teacher, options.teacher_adapter))
        refuse_teacher_of_other_tokenizer(request, tokenizer)
        return LiveTeacher(request, corpus)

    def load_weights(self, material: Reader | LiveTeacher, shared: SharedOptions) -> Reader | LiveTeacher:
        from kd.models.loading import load_model

        return replace(material, model=load_model(material.request)) if isinstance(material, LiveTeacher) else material

    def run(
        self,
        model: Model,
        tokenizer: Tokenizer,
        options: AgreementOptions,
        shared: SharedOptions,
        material: Reader | LiveTeacher,
    ) -> Iterator[Progress[TaskResult]]:
        if isinstance(material, LiveTeacher):
            return self._with_live_teacher(model, tokenizer, options, shared, material)
        return self._with_cache(model, options, shared, material)

    def _with_cache(
        self, model: Model, options: AgreementOptions, shared: SharedOptions, reader: Reader
    ) -> Iterator[Progress[TaskResult]]:
        from kd.evaluation.measures.agreement import evaluate_agreement

        steps = evaluate_agreement(
            model,
            reader,
            temperature=options.temperature,
            limit=shared.data.limit,
            tokens_per_batch=shared.reading.tokens_per_batch,
        )
        settings = {
            "cache_fingerprint": reader.manifest.fingerprint,
            "temperature": options.temperature,
            "limit": shared.data.limit,
            "top_k": reader.top_k or reader.config.top_k,
        }
        cache = described_cache(reader)

        def task_result(scores: AgreementResult) -> TaskResult:
            if options.html is not None:
                from kd.evaluation.measures.agreement_page import write_agreement_page

                tokens = shared.reading.tokens_per_batch
                write_agreement_page(
                    model, reader, scores.row_kl, options.html, temperature=options.temperature, tokens_per_batch=tokens
                )
            return TaskResult(_estimates(scores, KEPT), scores.documents, settings, cache=cache)

        return task_progress(steps, task_result)

    def _with_live_teacher(
        self,
        model: Model,
        tokenizer: Tokenizer,
        options: AgreementOptions,
        shared: SharedOptions,
        teacher: LiveTeacher,
    ) -> Iterator[Progress[TaskResult]]:
        from kd.evaluation.measures.live_agreement import evaluate_live_agreement, shared_window
        from kd.models.identity import model_identity

        reading = shared.reading
        steps = evaluate_live_agreement(
            model, teacher.model, tokenizer, teacher.corpus, reading=reading, temperature=options.temperature
        )

        def task_result(scores: AgreementResult) -> TaskResult:
            settings = question_settings(teacher.corpus, shared, tokenizer) | {
                "seq_len": shared_window(model, teacher.model, reading.seq_len),
                "teacher": teacher.request.name,
                "teacher_fingerprint": rows_digest([dict(model_identity(teacher.request))]),
                "temperature": options.temperature,
                "stride": reading.stride,
                "limit_tokens": reading.limit_tokens,
                "pairs_cut": scores.pairs_cut or None,
            }
            return TaskResult(_estimates(scores, {}), scores.documents, settings)

        return task_progress(steps, task_result)


def _estimates(scores: AgreementResult, names: Mapping[str, str]) -> dict[str, Any]:
    """The figures by metric; `names` are those of figures that are called otherwise."""
    figures = (name for name in METRICS if name not in KEPT.values())
    return {names.get(name, name): getattr(scores, name) for name in figures}


def names_now(settings: Mapping[str, Any]) -> Mapping[str, str]:
    """Name of a divergence in scores of earlier releases -> its name now; `settings` are those of the task beside the scores."""
    return KEPT if "cache_fingerprint" in settings else {}


def figures_now(figures: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """The figures of agreement in scores of any release, by the names and with the titles that they have now."""
    names = names_now(settings)
    renamed = {names.get(metric, metric): figure for metric, figure in figures.items()}
    return {m: f | {"title": METRICS[m].title} if m in METRICS else f for m, f in renamed.items()}


def described_cache(reader: Reader) -> dict[str, Any]:
    """What a report says of a cache."""
    manifest = reader.manifest
    return {
        "path": str(reader.root),
        "fingerprint": manifest.fingerprint,
        "examples": manifest.examples,
        "rows": manifest.rows,
        "teacher": manifest.provenance.get("teacher"),
        "corpus": manifest.provenance.get("corpus"),
        "split": manifest.provenance.get("split"),
    }
