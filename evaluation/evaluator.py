"""A model loaded once, the named tasks run on it, an `EvalReport`.

Several tasks share one load of the weights; names, text, cache and tokenizer are checked before it. `score_model` is the
same for a model in memory (`midway_scores`). numpy is the heaviest thing this module imports; torch and zarr come when a
task runs.
"""

from __future__ import annotations

import math
import platform
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kd.cache_builder.weighted_caches import CacheSpec
from kd.common.errors import DataError
from kd.data.data_settings import InstructionConfig
from kd.data.rows.row_examples import Columns
from kd.data.sources import Corpus, load_corpus, takes_instructions
from kd.evaluation.answers.answer_metrics import MetricSettings
from kd.evaluation.contamination import cache_texts, contamination, refuse_contaminated, trained_on
from kd.evaluation.results import EvalReport
from kd.evaluation.tasks.eval_task import LiveTeacher, Settings, TaskResult
from kd.evaluation.tasks.task_registry import TASKS, check_tasks, check_ways, figures_of
from kd.models.identity import model_identity, pinned
from kd.models.loading import Model, ModelRequest, load_model, load_request_tokenizer
from kd.models.tokenizer import Tokenizer, token_bytes, tokenizer_fingerprint

if TYPE_CHECKING:
    from kd.cache_builder.store.readers.reading import Reader


@dataclass(frozen=True)
class EvalProgress:
    """One step of `run_tasks`."""

    task: str
    done: int
    """Rows (target tokens) scored, or examples answered, in this task."""
    total: int
    report: EvalReport | None = None
    """On the last record."""


def run_tasks(
    model_name: str,
    names: Sequence[str],
    *,
    data: str | None = None,
    cache: CacheSpec | None = None,
    split: str | None = None,
    columns: Columns | None = None,
    limit: int | None = None,
    instructions: InstructionConfig | None = None,
    limit_tokens: int | None = None,
    seq_len: int | None = None,
    stride: int | None = None,
    bos: bool = True,
    temperature: float = 1.0,
    tokens_per_batch: int | None = None,
    device: str = "auto",
    dtype: str = "auto",
    revision: str | None = None,
    tokenizer: str | None = None,
    load_in_4bit: bool = False,
    seed: int = 0,
    separator: str = "\n",
    max_new_tokens: int | None = None,
    stop: str | None = None,
    encoding: str = "apart",
    protocol: str = "nanogpt",
    teacher: str | None = None,
    sample_temperature: float = 0.0,
    metrics: Sequence[str] | None = None,
    metric_settings: MetricSettings | None = None,
    allow_contaminated: bool = False,
    prompts: Path | None = None,
) -> Iterator[EvalProgress]:
    """Load a model and run the named tasks; the last record carries the report. Nothing is written.

    Names, text, cache and tokenizer are checked before weights are loaded: raises DataError for an unknown task, a
    missing text or cache, or a text the model was trained on (unless `allow_contaminated`, which marks the result),
    CacheError for an unusable cache, CacheMismatchError for another tokenizer than the cache's.
    """
    check_tasks(names, data=data, cache=cache, teacher=teacher, prompts=prompts)
    check_ways(names, encoding, protocol)
    request = pinned(ModelRequest(model_name, revision, dtype, device, load_in_4bit, tokenizer, seed))
    loaded = load_request_tokenizer(request)
    settings = Settings(
        limit=limit,
        limit_tokens=limit_tokens,
        seq_len=seq_len,
        stride=stride,
        bos=bos,
        temperature=temperature,
        tokens_per_batch=tokens_per_batch,
        separator=separator,
        max_new_tokens=max_new_tokens,
        stop=stop,
        encoding=encoding,
        protocol=protocol,
        sample_temperature=sample_temperature,
        sample_seed=seed,
        metrics=None if metrics is None else tuple(metrics),
        metric_settings=metric_settings,
    )
    settings = with_texts(
        settings,
        names,
        loaded,
        data=data,
        cache=cache,
        split=split,
        columns=columns,
        instructions=instructions,
        whole_text=teacher is not None,
        prompts=prompts,
    )
    contaminated = contaminated_tasks(names, settings, model_name, allow=allow_contaminated)
    teacher_request = None
    if teacher is not None:
        teacher_request = pinned(ModelRequest(teacher, None, dtype, device, load_in_4bit, None, seed))
        _refuse_other_teacher(teacher_request, loaded)
    model = load_model(request)
    if teacher_request is not None:
        live = LiveTeacher(teacher_request.name, model_identity(teacher_request), load_model(teacher_request))
        settings = replace(settings, teacher=live)
    results = yield from score_model(model, loaded, names, settings)
    report = EvalReport(
        model=model_name,
        parameters=int(model.num_parameters()),
        identity=model_identity(request),
        tokenizer=tokenizer_fingerprint(loaded),
        tasks={name: figures_of(name, result) for name, result in results.items()},
        settings={
            name: dict(result.settings) | ({"contaminated": contaminated[name]} if name in contaminated else {})
            for name, result in results.items()
        },
        data=None if settings.corpus is None else _describe_corpus(settings.corpus),
        cache=None if settings.reader is None else _describe_cache(settings.reader),
        versions={"python": platform.python_version()}
        | {p: version(p) for p in ("kd-logit-cache", "torch", "transformers")},
        documents={name: _influences(result) for name, result in results.items()},
    )
    last = list(results)[-1]
    yield EvalProgress(last, 1, 1, report)


def with_texts(
    settings: Settings,
    names: Sequence[str],
    tokenizer: Tokenizer,
    *,
    data: str | None = None,
    cache: CacheSpec | None = None,
    split: str | None = None,
    columns: Columns | None = None,
    instructions: InstructionConfig | None = None,
    whole_text: bool = False,
    prompts: Path | None = None,
) -> Settings:
    """`settings` with what the named tasks are measured on, loaded and checked; `whole_text`: agreement needs one too."""
    needs = {TASKS[name].needs for name in names}
    if whole_text and "cache" in needs:
        needs = needs - {"cache"} | {"data"}
    corpus = reader = None
    scenes = other = None
    if "rows" in needs:
        from kd.evaluation.tasks.hellaswag import load_scenes

        scenes = load_scenes(None if instructions is None else instructions.task_root, settings.limit)
    asked = None
    if "prompts" in needs and prompts is not None:
        from kd.evaluation.tasks.samples import load_prompts

        asked = load_prompts(prompts, settings.limit)
    if "data" in needs and data is not None:
        corpus, other = _both_wordings(data, split, columns, settings.limit, instructions, own_rows="rows" in needs)
        if "generation" in names:
            from kd.evaluation.tasks.generation import check_answering

            check_answering(corpus, settings)
    if "cache" in needs and cache is not None:
        from kd.cache_builder.opening import open_cache
        from kd.student_trainer.batches.compatibility import refuse_other_tokenizer

        reader = open_cache(cache)
        refuse_other_tokenizer(
            reader,
            tokenizer,
            purpose="agreement",
            advice="--tasks perplexity: its bits per byte compare any two tokenizers",
        )
    return replace(settings, corpus=corpus, other_wording=other, reader=reader, scenes=scenes, prompts=asked)


def score_model(
    model: Model, tokenizer: Tokenizer, names: Sequence[str], settings: Settings
) -> Generator[EvalProgress, None, dict[str, TaskResult]]:
    """Run the named tasks on a model in memory: yields progress, returns the results."""
    results: dict[str, TaskResult] = {}
    for name in dict.fromkeys(names):
        for step in TASKS[name].run(model, tokenizer, settings):
            yield EvalProgress(name, step.done, step.total)
        assert step.result is not None
        results[name] = step.result
    return results


def contaminated_tasks(
    names: Sequence[str], settings: Settings, model: str, *, cache: CacheSpec | None = None, allow: bool
) -> dict[str, str]:
    """Task -> why its text is known to the model, by the runs that made it and the `cache` it is about to learn from.

    Raises DataError where there is one, unless `allow`. Agreement is measured on the training text on purpose.
    """
    if settings.corpus is None and settings.scenes is None:
        return {}
    texts = trained_on(model) + ([] if cache is None else cache_texts(cache, run="this run"))
    found = contamination(texts, settings.corpus, settings.scenes)
    keys = {"rows": "hellaswag", "data": "data", "cache": "", "prompts": ""}
    tasks = {name: found[key] for name in names if (key := keys[TASKS[name].needs]) in found}
    if not allow:
        refuse_contaminated(tasks)
    return tasks


def _refuse_other_teacher(teacher: ModelRequest, tokenizer: Tokenizer) -> None:
    """Raise DataError unless a live teacher has the model's tokenizer."""
    theirs, ours = token_bytes(load_request_tokenizer(teacher)), token_bytes(tokenizer)
    if theirs != ours:
        differing = sum(a != b for a, b in zip(theirs, ours, strict=False)) + abs(len(theirs) - len(ours))
        raise DataError(
            "the model's tokenizer is not the teacher's, and agreement compares token by token",
            where=f"--teacher {teacher.name}",
            found=f"{differing} of {len(theirs)} ids differ",
            try_="--tasks perplexity: its bits per byte compare any two tokenizers",
        )


def _both_wordings(
    data: str,
    split: str | None,
    columns: Columns | None,
    limit: int | None,
    instructions: InstructionConfig | None,
    *,
    own_rows: bool,
) -> tuple[Corpus, Corpus | None]:
    """The text, and under `labels="both"` its twin in FLAN's wording where that is another one."""
    instructions = instructions or InstructionConfig()
    both = instructions.labels == "both"
    first = replace(instructions, labels="original") if both else instructions
    if own_rows and not takes_instructions(data):  # --task-root was meant for the rows
        first = replace(first, task_root=None)
    if both and not takes_instructions(data):
        raise DataError(
            "the source has no templates", where=data, found="--labels both", expected="flan:… or a task's .yaml file"
        )
    corpus = load_corpus(data, split=split, columns=columns, limit=limit, instructions=first)
    if not both:
        return corpus, None
    other = load_corpus(data, split=split, limit=limit, instructions=replace(first, labels="flan"))
    same = [e.choices for e in other.examples] == [e.choices for e in corpus.examples]
    return corpus, None if same else other


def _influences(result: TaskResult) -> dict[str, Any]:
    """Six digits are far below the standard error they add up to."""
    rounded = {
        name: [float(f"{u:.6g}") for u in e.influence]
        for name, e in result.estimates.items()
        if math.isfinite(e.value) and all(map(math.isfinite, e.influence))
    }
    kept = {"digest": result.documents.digest, "count": len(result.documents.names), "influence": rounded}
    return kept | ({"samples": [dict(s) for s in result.samples]} if result.samples else {})


def _describe_corpus(corpus: Corpus) -> dict[str, Any]:
    return {
        "spec": corpus.spec,
        "split": corpus.split,
        "kind": corpus.kind,
        "examples": len(corpus.examples),
        "text_digest": corpus.digest,
        "source": corpus.source,
    }


def _describe_cache(reader: Reader) -> dict[str, Any]:
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
