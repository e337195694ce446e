"""What can be measured, by name: `run_tasks` loads a model once and gives an `EvalReport`.

    perplexity   needs a text                             perplexity, bits per byte, calibration
    agreement    needs a cache, or a teacher and a text   KL and JSD to the teacher, top-1 agreement, calibration
    choices      needs a text with choices                accuracy of rank classification
    generation   needs a text of prompts and targets      exact match, token F1, ROUGE, BLEU, … of answers
    hellaswag    has rows of its own                      accuracy under one of two protocols
    samples      needs a file of prompts                  what the model writes, to be read side by side

Several tasks share one load of the weights; names, text, cache and tokenizer are checked before it.

Add a task: a function in `kd.evaluation.runners` that yields `Progress[TaskResult]`, and an entry in `TASKS`. A metric
`NAME/TASK` is the metric NAME over the examples of one task of the text. numpy is the heaviest thing this module
imports; torch and zarr come when a task runs.
"""

from __future__ import annotations

import math
import platform
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kd.data.errors import DataError, unknown_name
from kd.data.identity import model_identity, pinned
from kd.data.models import Model, ModelRequest, load_model, load_request_tokenizer
from kd.data.rendering import InstructionConfig
from kd.data.sources import Columns, Corpus, load_corpus, takes_instructions
from kd.data.task import WORDINGS
from kd.data.tokenizer import Tokenizer, token_bytes, tokenizer_fingerprint
from kd.evaluation.answer_metrics import ANSWER_METRICS, MetricSettings
from kd.evaluation.contamination import cache_texts, contamination, refuse_contaminated, trained_on
from kd.evaluation.results import EvalReport
from kd.evaluation.runners import run_agreement, run_choices, run_generation, run_hellaswag, run_perplexity, run_samples
from kd.evaluation.task import LiveTeacher, Metric, Settings, Task, TaskResult

if TYPE_CHECKING:
    from kd.cache_builder.reader import CacheReader


@dataclass(frozen=True)
class EvalProgress:
    """One step of `run_tasks`."""

    task: str
    done: int
    """Rows (target tokens) scored, or examples answered, in this task."""
    total: int
    report: EvalReport | None = None
    """On the last record."""


def run_tasks(model_name: str, names: Sequence[str], *, data: str | None = None, cache: Path | str | None = None,
              split: str | None = None, columns: Columns | None = None, limit: int | None = None,
              instructions: InstructionConfig | None = None, limit_tokens: int | None = None,
              seq_len: int | None = None, stride: int | None = None, bos: bool = True,
              temperature: float = 1.0, tokens_per_batch: int = 4096, device: str = "auto", dtype: str = "auto",
              revision: str | None = None, tokenizer: str | None = None, load_in_4bit: bool = False,
              seed: int = 0, separator: str = "\n", max_new_tokens: int | None = None,
              stop: str | None = None, encoding: str = "apart", protocol: str = "nanogpt",
              teacher: str | None = None, sample_temperature: float = 0.0, metrics: Sequence[str] | None = None,
              metric_settings: MetricSettings | None = None,
              allow_contaminated: bool = False, prompts: Path | None = None) -> Iterator[EvalProgress]:  # fmt: skip
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
        limit=limit, limit_tokens=limit_tokens, seq_len=seq_len, stride=stride, bos=bos, temperature=temperature,
        tokens_per_batch=tokens_per_batch, separator=separator, max_new_tokens=max_new_tokens, stop=stop,
        encoding=encoding, protocol=protocol, sample_temperature=sample_temperature, sample_seed=seed,
        metrics=None if metrics is None else tuple(metrics), metric_settings=metric_settings,
    )  # fmt: skip
    settings = with_texts(settings, names, loaded, data=data, cache=cache, split=split, columns=columns,
                          instructions=instructions, whole_text=teacher is not None, prompts=prompts)  # fmt: skip
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
        settings={name: dict(result.settings) | ({"contaminated": contaminated[name]} if name in contaminated else {})
                  for name, result in results.items()},
        data=None if settings.corpus is None else _describe_corpus(settings.corpus),
        cache=None if settings.reader is None else _describe_cache(settings.reader),
        versions={"python": platform.python_version()}
        | {p: version(p) for p in ("kd-logit-cache", "torch", "transformers")},
        documents={name: _influences(result) for name, result in results.items()},
    )  # fmt: skip
    last = list(results)[-1]
    yield EvalProgress(last, 1, 1, report)


def with_texts(settings: Settings, names: Sequence[str], tokenizer: Tokenizer, *, data: str | None = None,
               cache: Path | str | None = None, split: str | None = None, columns: Columns | None = None,
               instructions: InstructionConfig | None = None, whole_text: bool = False,
               prompts: Path | None = None) -> Settings:  # fmt: skip
    """`settings` with what the named tasks are measured on, loaded and checked; `whole_text`: agreement needs one too."""
    needs = {TASKS[name].needs for name in names}
    if whole_text and "cache" in needs:
        needs = needs - {"cache"} | {"data"}
    corpus = reader = None
    scenes = other = None
    if "rows" in needs:
        from kd.evaluation.hellaswag import load_scenes

        scenes = load_scenes(None if instructions is None else instructions.task_root, settings.limit)
    asked = None
    if "prompts" in needs and prompts is not None:
        from kd.evaluation.samples import load_prompts

        asked = load_prompts(prompts, settings.limit)
    if "data" in needs and data is not None:
        corpus, other = _both_wordings(data, split, columns, settings.limit, instructions, own_rows="rows" in needs)
        if "generation" in names:
            from kd.evaluation.generation import check_answering

            check_answering(corpus, settings)
    if "cache" in needs and cache is not None:
        from kd.cache_builder.mixture import open_cache
        from kd.student_trainer.compatibility import refuse_other_tokenizer

        reader = open_cache(str(cache))
        refuse_other_tokenizer(
            reader,
            tokenizer,
            purpose="agreement",
            advice="--tasks perplexity: its bits per byte compare any two tokenizers",
        )
    return replace(settings, corpus=corpus, other_wording=other, reader=reader, scenes=scenes, prompts=asked)


def score_model(model: Model, tokenizer: Tokenizer, names: Sequence[str],
                settings: Settings) -> Generator[EvalProgress, None, dict[str, TaskResult]]:  # fmt: skip
    """Run the named tasks on a model in memory: yields progress, returns the results."""
    results: dict[str, TaskResult] = {}
    for name in dict.fromkeys(names):
        for step in TASKS[name].run(model, tokenizer, settings):
            yield EvalProgress(name, step.done, step.total)
        assert step.result is not None
        results[name] = step.result
    return results


def contaminated_tasks(names: Sequence[str], settings: Settings, model: str, *, cache: str | Path | None = None,
                       allow: bool) -> dict[str, str]:  # fmt: skip
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
        raise DataError("the model's tokenizer is not the teacher's, and agreement compares token by token",
                        where=f"--teacher {teacher.name}", found=f"{differing} of {len(theirs)} ids differ",
                        try_="--tasks perplexity: its bits per byte compare any two tokenizers")  # fmt: skip


def check_tasks(
    names: Sequence[str], *, data: str | None, cache: Path | str | None, teacher: str | None = None,
    prompts: Path | None = None,
) -> None:  # fmt: skip
    """Raise DataError for an unknown task, for none at all, or for one whose text, cache, teacher or prompts were not given."""
    if not names:
        raise DataError("no task was named", expected=", ".join(TASKS), try_="--tasks perplexity")
    for name in names:
        if name not in TASKS:
            raise unknown_name("task", name, TASKS)
        needs = TASKS[name].needs
        if needs == "data" and data is None:
            raise DataError(f"the task {name} needs a text that was not given", try_="--data SPEC, e.g. demo:heldout")
        if needs == "prompts" and prompts is None:
            raise DataError(f"the task {name} needs prompts that were not given", try_="--prompts FILE")
        if needs == "cache" and cache is None and teacher is None:
            raise DataError(f"the task {name} needs a teacher that was not given",
                            try_="--cache DIR, or --teacher MODEL with --data SPEC")  # fmt: skip
        if needs == "cache" and teacher is not None and (cache is not None or data is None):
            raise DataError(f"the task {name} follows one teacher on one text",
                            found="a cache and a live teacher" if cache is not None else "a live teacher without a text",
                            try_="--cache DIR alone, or --teacher MODEL with --data SPEC")  # fmt: skip
    if teacher is not None and not any(TASKS[name].needs == "cache" for name in names):
        raise DataError("no task asks for a teacher", found=f"--teacher {teacher}", try_="--tasks agreement")


def check_ways(names: Sequence[str], encoding: str, protocol: str) -> None:
    """Raise DataError for an unknown encoding or protocol of a task that is to run."""
    from kd.evaluation.choices import ENCODINGS
    from kd.evaluation.hellaswag import PROTOCOLS

    for task, kind, name, known in (
        ("choices", "encoding", encoding, ENCODINGS),
        ("hellaswag", "protocol", protocol, PROTOCOLS),
    ):
        if task in names and name not in known:
            raise unknown_name(kind, name, known)


def _both_wordings(data: str, split: str | None, columns: Columns | None, limit: int | None,
                   instructions: InstructionConfig | None, *, own_rows: bool) -> tuple[Corpus, Corpus | None]:  # fmt: skip
    """The text, and under `labels="both"` its twin in FLAN's wording where that is another one."""
    instructions = instructions or InstructionConfig()
    both = instructions.labels == "both"
    first = replace(instructions, labels="original") if both else instructions
    if own_rows and not takes_instructions(data):  # --task-root was meant for the rows
        first = replace(first, task_root=None)
    if both and not takes_instructions(data):
        raise DataError("the source has no templates", where=data, found="--labels both",
                        expected="flan:… or a task's .yaml file")  # fmt: skip
    corpus = load_corpus(data, split=split, columns=columns, limit=limit, instructions=first)
    if not both:
        return corpus, None
    other = load_corpus(data, split=split, limit=limit, instructions=replace(first, labels="flan"))
    same = [e.choices for e in other.examples] == [e.choices for e in corpus.examples]
    return corpus, None if same else other


def figures_of(task: str, result: TaskResult) -> dict[str, dict[str, Any]]:
    """Metric -> value (None where it is not finite), stderr, n, over, unit, better, title."""
    figures: dict[str, dict[str, Any]] = {}
    for name, estimate in result.estimates.items():
        base, _, part = name.partition("/")
        metric = TASKS[task].metrics[base]
        figures[name] = {
            "value": estimate.value if math.isfinite(estimate.value) else None, "stderr": estimate.stderr,
            "n": estimate.n, "over": metric.over, "unit": metric.unit, "better": metric.better,
            "title": f"{metric.title}: {part}" if part else metric.title,
        }  # fmt: skip
    return figures


def _influences(result: TaskResult) -> dict[str, Any]:
    """Six digits are far below the standard error they add up to."""
    rounded = {name: [float(f"{u:.6g}") for u in e.influence] for name, e in result.estimates.items()
               if math.isfinite(e.value) and all(map(math.isfinite, e.influence))}  # fmt: skip
    kept = {"digest": result.documents.digest, "count": len(result.documents.names), "influence": rounded}
    return kept | ({"samples": [dict(s) for s in result.samples]} if result.samples else {})


def _describe_corpus(corpus: Corpus) -> dict[str, Any]:
    return {"spec": corpus.spec, "split": corpus.split, "kind": corpus.kind, "examples": len(corpus.examples),
            "text_digest": corpus.digest, "source": corpus.source}  # fmt: skip


def _describe_cache(reader: CacheReader) -> dict[str, Any]:
    manifest = reader.manifest
    return {"path": str(reader.root), "fingerprint": manifest.fingerprint, "examples": manifest.examples,
            "rows": manifest.rows, "teacher": manifest.provenance.get("teacher"),
            "corpus": manifest.provenance.get("corpus"), "split": manifest.provenance.get("split")}  # fmt: skip


EXACT_MATCH = Metric("exact match", "share of examples", "higher", "example")
F1 = Metric("token F1", "mean over examples", "higher", "example")
ACCURACY = Metric("accuracy", "share of examples", "higher", "example")
RANKED = {
    "accuracy": ACCURACY,
    "accuracy_mean_of_tasks": replace(ACCURACY, title="accuracy, mean of tasks", unit="mean of shares"),
    "accuracy_sum": replace(ACCURACY, title="accuracy by sum"),
    "accuracy_chars": replace(ACCURACY, title="accuracy by character"),
}

FURTHER = {
    f"{name}{suffix}": Metric(f"{metric.title}{about}", metric.unit, "higher", "example")
    for name, metric in ANSWER_METRICS.items()
    for suffix, about in (("", ""), ("_mean_of_tasks", ", mean of tasks"))
}
"""Of answers, where a task names them."""

TASKS: dict[str, Task] = {
    "perplexity": Task(
        about="perplexity and bits per byte of a text, sliding window",
        needs="data",
        metrics={
            "perplexity": Metric("perplexity", "per token", "lower", "token"),
            "bits_per_byte": Metric("bits per byte", "bits per byte", "lower", "byte"),
            "nll_per_token": Metric("NLL", "nats per token", "lower", "token"),
            "ece": Metric("calibration error", "ECE, 15 bins", "lower", "token"),
        },
        run=run_perplexity,
    ),
    "agreement": Task(
        about="KL and JSD to the teacher, of a cache or at hand, top-1 agreement with it, calibration",
        needs="cache",
        metrics={
            "kl": Metric("KL to teacher", "nats per token", "lower", "row"),
            "jsd": Metric("JSD to teacher", "nats per token", "lower", "row"),
            "top1_agreement": Metric("top-1 agreement", "share of tokens", "higher", "row"),
            "nll_per_token": Metric("NLL", "nats per token", "lower", "row"),
            "teacher_nll_per_token": Metric("teacher's NLL", "nats per token", None, "row"),
            "ece": Metric("calibration error", "ECE, 15 bins", "lower", "row"),
            "teacher_ece": Metric("teacher's calibration error", "ECE, 15 bins", None, "row"),
        },
        run=run_agreement,
    ),
    "choices": Task(
        about="rank classification: is the most probable of an example's choices the right one?",
        needs="data",
        metrics=RANKED
        | {
            f"{name}_{wording}": replace(metric, title=f"{metric.title}, {wording} labels")
            for wording in WORDINGS
            for name, metric in RANKED.items()
        },
        run=run_choices,
    ),
    "generation": Task(
        about="answers, greedy or sampled, compared with the references; further metrics as the tasks of the text name them",
        needs="data",
        metrics={
            "exact_match": EXACT_MATCH,
            "exact_match_mean_of_tasks": replace(
                EXACT_MATCH, title="exact match, mean of tasks", unit="mean of shares"
            ),
            "f1": F1,
            "f1_mean_of_tasks": replace(F1, title="token F1, mean of tasks", unit="mean of means"),
            "choice_match": Metric("right choice named", "share of examples", "higher", "example"),
            "choice_none": Metric("no choice named", "share of examples", None, "example"),
            "unfinished": Metric("unfinished", "share of examples", None, "example"),
        }
        | FURTHER,
        run=run_generation,
    ),
    "hellaswag": Task(
        about="HellaSwag's validation rows; nanogpt is the protocol in which GPT-2 (124M) reaches 0.2955",
        needs="rows",
        metrics={
            "acc_nanogpt": replace(ACCURACY, title="acc (nanogpt)"),
            "acc_norm_nanogpt": replace(ACCURACY, title="acc_norm (nanogpt)"),
            "acc_harness": replace(ACCURACY, title="acc (harness)"),
            "acc_norm_harness": replace(ACCURACY, title="acc_norm (harness)"),
            "acc_bytes_harness": replace(ACCURACY, title="acc_bytes (harness)"),
        },
        run=run_hellaswag,
    ),
    "samples": Task(
        about="what a model writes after the prompts of a file, to be read side by side",
        needs="prompts",
        metrics={
            "ended": Metric("ended", "share of answers", None, "prompt"),
            "length": Metric("length", "tokens", None, "prompt"),
            "repeated": Metric("repeated", "share of runs of 4 words", None, "prompt"),
        },
        run=run_samples,
    ),
}
