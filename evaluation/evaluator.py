"""A model loaded once, the named tasks run on it, an `EvalReport`.

Several tasks share one load of the weights. Names, text, cache and tokenizer are checked before it. `score_model` does the
same for a model in memory (`midway_scores`). numpy is the heaviest thing this module imports; torch and zarr come when a
task runs.
"""

from __future__ import annotations

import math
import platform
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from typing import Any

from kd.cache_builder.weighted_caches import CacheSpec
from kd.common.errors import DataError, unknown_name
from kd.common.progress import Progress
from kd.data.corpus import Corpus
from kd.data.data_settings import BOTH
from kd.data.rows.example import Example
from kd.data.sources import load_corpus, takes_instructions
from kd.evaluation.contamination import cache_texts, refuse_contaminated, trained_on, why_known
from kd.evaluation.eval_settings import EvalSettings
from kd.evaluation.results import EvalReport
from kd.evaluation.tasks.eval_task import TaskResult
from kd.evaluation.tasks.lm_eval_task import PREFIX
from kd.evaluation.tasks.shared_options import EvalDataSettings, SharedOptions
from kd.evaluation.tasks.task_registry import TASKS, figures_of, named_task
from kd.evaluation.unseen_tasks import marked, seen_or_unseen
from kd.models.identity import model_identity, pinned
from kd.models.loading import Model, load_model, refuse_unusable_map
from kd.models.model_config import load_request_tokenizer, refuse_adapter
from kd.models.tokenizer import Tokenizer, tokenizer_fingerprint


@dataclass(frozen=True)
class LoadedTasks:
    """Tasks to run and what each measures on, checked."""

    settings: EvalSettings
    corpus: Corpus | None
    """The text of `--data`; None where no task reads one."""
    materials: Mapping[str, Any]
    """Task -> what it measures on, in the order in which the tasks run."""
    plain: Corpus | None = None
    """The text of `--data` without examples before its prompts: what a model may have been trained on."""

    def with_weights(self) -> LoadedTasks:
        """The same with the weights that tasks need besides the model's."""
        shared = self.settings.shared
        return replace(self, materials={n: named_task(n).load_weights(m, shared) for n, m in self.materials.items()})


def evaluate_model(model_name: str, settings: EvalSettings) -> Iterator[Progress[EvalReport]]:
    """Load a model and run the tasks of `settings`; the last record carries the report. Nothing is written.

    A record counts the rows or examples of one task, which its note names. Names, text, cache and tokenizer are checked
    before weights are loaded: raises DataError for an unknown task, a missing text or cache, or a text the model was
    trained on (unless `allow_contaminated`, which marks the result), CacheError for an unusable cache, CacheMismatchError
    for another tokenizer than the cache's.
    """
    check_tasks(settings)
    settings = as_trained(settings, model_name)
    request = settings.shared.loading.model_request(model_name)
    refuse_adapter(request)
    request = pinned(request)
    tokenizer = load_request_tokenizer(request)
    loaded = load_tasks(settings, tokenizer)
    contaminated = contaminated_tasks(loaded, model_name)
    refuse_unusable_map(request)
    model = load_model(request)
    results = yield from score_model(model, tokenizer, loaded.with_weights())
    report = report_of(model_name, model, tokenizer, model_identity(request), loaded, results, contaminated)
    yield Progress(1, 1, report, note=list(results)[-1])


def as_trained(settings: EvalSettings, model: str) -> EvalSettings:
    """The settings with the reading of the run that made `model`, where they do not name it."""
    from kd.student_trainer.batches.trained_reading import reading_of_run

    reading = settings.shared.reading
    names = ("bos", "separator", "control_tokens", "template_kwargs", "system")
    missing = [name for name in names if getattr(reading, name) is None]
    trained = reading_of_run(model) if missing else None
    if trained is None:
        return settings
    filled = replace(reading, **{name: getattr(trained, name) for name in missing})
    return replace(settings, shared=replace(settings.shared, reading=filled))


def report_of(
    model_name: str,
    model: Model,
    tokenizer: Tokenizer,
    identity: dict[str, Any],
    loaded: LoadedTasks,
    results: Mapping[str, TaskResult],
    contaminated: Mapping[str, str],
) -> EvalReport:
    """The report of a model's results; `identity` as `kd.models.identity` gives it, `contaminated` as `contaminated_tasks`."""
    caches = [result.cache for result in results.values() if result.cache is not None]
    corpus = loaded.corpus
    marks = {} if corpus is None else seen_or_unseen(trained_on(model_name, whole=False), corpus)
    reads = {name for name in results if named_task(name).reads_text(loaded.settings.options_of(name))}
    return EvalReport(
        model=model_name,
        parameters=int(model.num_parameters()),
        identity=identity | _chat_template(loaded.settings, tokenizer, results),
        tokenizer=tokenizer_fingerprint(tokenizer),
        tasks={
            name: marked(figures_of(name, result), marks if name in reads else {}) for name, result in results.items()
        },
        settings={
            name: dict(result.settings) | ({"contaminated": contaminated[name]} if name in contaminated else {})
            for name, result in results.items()
        },
        data=None if loaded.corpus is None else _described_corpus(loaded.corpus),
        cache=dict(caches[0]) if caches else None,
        versions={"python": platform.python_version()}
        | {p: version(p) for p in ("kd-logit-cache", "torch", "transformers")},
        documents={name: _influences(result) for name, result in results.items()},
    )


def _chat_template(settings: EvalSettings, tokenizer: Tokenizer, results: Mapping[str, TaskResult]) -> dict[str, str]:
    """The digest of the chat template that a task has used, with its variables; nothing where none was used."""
    if not any("chat" in result.settings for result in results.values()):
        return {}
    from kd.data.chat_rows import chat_template
    from kd.evaluation.scoring.windows import chat_settings

    return {"chat_template": chat_template(tokenizer, chat_settings(settings.shared.reading)).digest}


def check_tasks(settings: EvalSettings) -> None:
    """Raise DataError for an unknown task, for none at all, or for one whose text, cache, teacher or prompts were not given."""
    if not settings.tasks:
        raise DataError("no task was named", expected=", ".join(TASKS), try_="--tasks perplexity")
    for name in settings.tasks:
        if name.partition(":")[0] not in TASKS or (":" in name and not name.startswith(PREFIX)):
            raise unknown_name("task", name, TASKS)
        named_task(name).check(name, settings.options_of(name), settings.shared)
    teacher = settings.agreement.teacher
    if teacher is not None and "agreement" not in settings.tasks:
        raise DataError("no task asks for a teacher", found=f"--teacher {teacher}", try_="--tasks agreement")


def load_tasks(settings: EvalSettings, tokenizer: Tokenizer) -> LoadedTasks:
    """The text and what each task measures on, loaded and checked. No weights are loaded. Raises KdError."""
    names, shared = list(dict.fromkeys(settings.tasks)), settings.shared
    corpus = plain = None
    if any(named_task(name).reads_text(settings.options_of(name)) for name in names):
        own_rows = any(named_task(name).has_own_rows for name in names)
        plain = load_text(shared.data, for_text=not own_rows, choices="choices" in names)
        corpus = with_examples(plain, shared)
    materials = {name: named_task(name).load(settings.options_of(name), shared, tokenizer, corpus) for name in names}
    return LoadedTasks(settings, corpus, materials, plain)


def with_examples(corpus: Corpus, shared: SharedOptions) -> Corpus:
    """The text as models are asked it: with `--shots` before each prompt, and with `--chat` as turns. Raises DataError."""
    from kd.evaluation.scoring.chat_asking import with_chat
    from kd.evaluation.scoring.few_shot import drawn_shots, with_shots

    count, chat = shared.data.shots, shared.reading.chat
    if not count:
        return with_chat(corpus) if chat else corpus
    if corpus.kind != "pairs" or shared.data.instructions.labels == BOTH:
        raise DataError(
            "these examples have no examples before them",
            where=corpus.spec,
            found=f"--shots {count} with " + (corpus.kind if corpus.kind != "pairs" else "--labels both"),
            expected="prompts and targets, in one wording",
        )
    seed = shared.data.instructions.data_seed
    shots = drawn_shots(corpus, training_rows(shared.data), count, seed=seed)
    source = corpus.source | {"shots": str(count), "shots_seed": str(seed)}
    corpus = replace(corpus, source=source)
    return with_chat(corpus, shots) if chat else with_shots(corpus, shots, shared.reading.between)


def training_rows(data: EvalDataSettings) -> Sequence[Example]:
    """The rows that examples are drawn from: the split train of the same source, in the same wording. Raises DataError."""
    from kd.evaluation.scoring.few_shot import POOL

    assert data.spec is not None, "the text was checked to be given"
    instructions = data.instructions
    if takes_instructions(data.spec):
        instructions = replace(instructions, max_per_task=POOL, mix_maximum=None, mix_draws=None)
    pool = load_text(replace(data, split="train", limit=None, instructions=instructions))
    if pool.split != "train":
        raise DataError(
            "there is no split train to draw examples from", where=data.spec, found=pool.split, try_="--shots 0"
        )
    return pool.examples


def load_text(data: EvalDataSettings, *, for_text: bool = True, choices: bool = False) -> Corpus:
    """The text of `--data`; under `--labels both` in the original wording. Raises DataError.

    choices    whether the columns `choices` and `answer` of a table are read
    for_text   whether `--task-root` is meant for this text, and not for a task that has rows of its own
    """
    assert data.spec is not None, "the text was checked to be given"
    instructions = data.instructions
    if not takes_instructions(data.spec):
        if instructions.labels == BOTH:
            raise DataError(
                "the source has no templates",
                where=data.spec,
                found="--labels both",
                expected="flan:… or a task's .yaml file",
            )
        if not for_text:
            instructions = replace(instructions, task_root=None)
    if instructions.labels == BOTH:
        instructions = replace(instructions, labels="original")
    return load_corpus(
        data.spec,
        split=data.split,
        columns=data.columns,
        form=data.format,
        bad_rows=data.bad_rows,
        choices=choices,
        limit=data.limit,
        instructions=instructions,
        rows=data.rows,
    )


def score_model(
    model: Model, tokenizer: Tokenizer, loaded: LoadedTasks
) -> Generator[Progress[Any], None, dict[str, TaskResult]]:
    """Run the tasks on a model in memory: yields progress, whose note is the task's name, and returns the results."""
    results: dict[str, TaskResult] = {}
    settings = loaded.settings
    for name, material in loaded.materials.items():
        for step in named_task(name).run(model, tokenizer, settings.options_of(name), settings.shared, material):
            yield Progress(step.done, step.total, note=name)
        assert step.result is not None
        results[name] = step.result
    return results


def contaminated_tasks(loaded: LoadedTasks, model: str, *, cache: CacheSpec | None = None) -> dict[str, str]:
    """Task -> why its text is known to the model, by the runs that made it and the `cache` it is about to learn from.

    Raises DataError where there is one, unless `allow_contaminated`.
    """
    texts_asked = {name: named_task(name).may_be_known(material) for name, material in loaded.materials.items()}
    texts_asked = {name: loaded.plain if text is loaded.corpus else text for name, text in texts_asked.items()}
    if all(text is None for text in texts_asked.values()):
        return {}
    texts = trained_on(model) + ([] if cache is None else cache_texts(cache, run="this run"))
    reasons = {
        name: reason for name, text in texts_asked.items() if text is not None and (reason := why_known(texts, text))
    }
    if not loaded.settings.allow_contaminated:
        refuse_contaminated(reasons)
    return reasons


def _influences(result: TaskResult) -> dict[str, Any]:
    """How far each document moves each figure, to six digits: far below the standard error they add up to."""
    rounded = {
        name: [float(f"{u:.6g}") for u in e.influence]
        for name, e in result.estimates.items()
        if math.isfinite(e.value) and all(map(math.isfinite, e.influence))
    }
    kept = {"digest": result.documents.digest, "count": len(result.documents.names), "influence": rounded}
    return kept | ({"samples": [dict(s) for s in result.samples]} if result.samples else {})


def _described_corpus(corpus: Corpus) -> dict[str, Any]:
    return {
        "spec": corpus.spec,
        "split": corpus.split,
        "kind": corpus.kind,
        "examples": len(corpus.examples),
        "text_digest": corpus.digest,
        "source": corpus.source,
        "left_out": corpus.left_out.document(),
    }
