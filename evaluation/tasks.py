"""What can be measured, by name: `run_tasks` loads a model once and gives an `EvalReport`.

    perplexity   needs a text                             perplexity, bits per byte
    agreement    needs a cache                            KL to its teacher, top-1 agreement
    choices      needs a text with choices                accuracy of rank classification
    generation   needs a text of prompts and targets      exact match and token F1 of greedy answers
    hellaswag    has rows of its own                      accuracy under one of two protocols
    samples      needs a file of prompts                  what the model writes, to be read side by side

Several tasks share one load of the weights; names, text, cache and tokenizer are checked before it.

Add a task: a function that yields `Progress[TaskResult]`, and an entry in `TASKS`. A metric `NAME/TASK` is the metric
NAME over the examples of one task of the text. numpy is the heaviest thing this module imports; torch and zarr come
when a task runs.
"""

from __future__ import annotations

import hashlib
import json
import math
import platform
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from kd.data.errors import DataError, unknown_name
from kd.data.identity import model_identity, pinned
from kd.data.models import Model, ModelRequest, load_model, load_request_tokenizer
from kd.data.rendering import InstructionConfig
from kd.data.sources import Columns, Corpus, load_corpus, takes_instructions
from kd.data.task import WORDINGS
from kd.data.tokenizer import Tokenizer, tokenizer_fingerprint
from kd.evaluation.estimates import Documents, Estimate
from kd.evaluation.results import EvalReport
from kd.evaluation.scoring import Progress

if TYPE_CHECKING:
    from kd.cache_builder.reader import CacheReader
    from kd.evaluation.choices import ChoicesResult
    from kd.evaluation.hellaswag import Scenes
    from kd.evaluation.samples import Prompts


@dataclass(frozen=True)
class Metric:
    """One figure of a task."""

    title: str
    """As a table spells it."""
    unit: str
    better: Literal["lower", "higher"] | None
    """None: not a merit of the model."""
    over: str
    """What `n` counts: token, byte, row or example. Averages over tokens compare only with the same tokenizer."""


@dataclass(frozen=True)
class Settings:
    """What tasks are told; each uses its own part."""

    corpus: Corpus | None = None
    reader: CacheReader | None = None
    limit: int | None = None
    """First examples of the text (applied when it was loaded) and of the cache."""
    limit_tokens: int | None = None
    """First tokens of the text."""
    seq_len: int | None = None
    stride: int | None = None
    bos: bool = True
    temperature: float = 1.0
    tokens_per_batch: int = 4096
    separator: str = "\n"
    """Between the prompt and what follows it; an encoder-decoder needs none."""
    max_new_tokens: int | None = None
    """Of a generated answer, EOS included; None = as the longest reference needs."""
    stop: str | None = None
    """Text at which a generated answer is cut as well as at EOS."""
    encoding: str = "apart"
    """Of choices: `apart` as in training, `together` as lm-eval."""
    other_wording: Corpus | None = None
    """Of choices: the same examples with the other wording of fixed labels."""
    protocol: str = "nanogpt"
    """Of hellaswag: `nanogpt` or `harness`."""
    scenes: Scenes | None = None
    """Of hellaswag: its rows."""
    prompts: Prompts | None = None
    """Of samples."""


@dataclass(frozen=True)
class TaskResult:
    """Estimates of one task by metric name, and what two results must share to be compared."""

    estimates: Mapping[str, Estimate]
    """Metric of the task, or `METRIC/TASK` for a part of the text."""
    documents: Documents
    settings: Mapping[str, Any]
    samples: Sequence[Mapping[str, str]] = ()
    """What the model did with the first examples, to be read by people."""


@dataclass(frozen=True)
class Task:
    """A way to measure a model."""

    about: str
    needs: Literal["data", "cache", "rows", "prompts"]
    """`rows`: its own, from the hub or from files under `--task-root`; `prompts`: a file of the user's."""
    metrics: Mapping[str, Metric]
    run: Callable[[Model, Tokenizer, Settings], Iterator[Progress[TaskResult]]]


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
              stop: str | None = None, encoding: str = "apart",
              protocol: str = "nanogpt", prompts: Path | None = None) -> Iterator[EvalProgress]:  # fmt: skip
    """Load a model and run the named tasks; the last record carries the report. Nothing is written.

    Names, text, cache and tokenizer are checked before weights are loaded: raises DataError for an unknown task or a
    missing text or cache, CacheError for an unusable cache, CacheMismatchError for another tokenizer than the cache's.
    """
    check_tasks(names, data=data, cache=cache, prompts=prompts)
    _check_ways(names, encoding, protocol)
    needs = {TASKS[name].needs for name in names}
    request = pinned(ModelRequest(model_name, revision, dtype, device, load_in_4bit, tokenizer, seed))
    loaded = load_request_tokenizer(request)
    corpus = reader = None
    scenes = other = None
    if "rows" in needs:
        from kd.evaluation.hellaswag import load_scenes

        scenes = load_scenes(None if instructions is None else instructions.task_root, limit)
    asked = None
    if "prompts" in needs and prompts is not None:
        from kd.evaluation.samples import load_prompts

        asked = load_prompts(prompts, limit)
    if "data" in needs and data is not None:
        corpus, other = _both_wordings(data, split, columns, limit, instructions, own_rows="rows" in needs)
    if "cache" in needs and cache is not None:
        from kd.cache_builder.reader import CacheReader
        from kd.student_trainer.compatibility import refuse_other_tokenizer

        reader = CacheReader(cache)
        refuse_other_tokenizer(
            reader,
            loaded,
            purpose="agreement",
            advice="--tasks perplexity: its bits per byte compare any two tokenizers",
        )
    settings = Settings(corpus, reader, limit, limit_tokens, seq_len, stride, bos, temperature, tokens_per_batch,
                        separator, max_new_tokens, stop, encoding, other, protocol, scenes, asked)  # fmt: skip
    model = load_model(request)
    results: dict[str, TaskResult] = {}
    last = Progress[TaskResult](0, 0)
    for name in dict.fromkeys(names):
        for last in TASKS[name].run(model, loaded, settings):
            yield EvalProgress(name, last.done, last.total)
        assert last.result is not None
        results[name] = last.result
    report = EvalReport(
        model=model_name,
        parameters=int(model.num_parameters()),
        identity=model_identity(request),
        tokenizer=tokenizer_fingerprint(loaded),
        tasks={name: _figures(TASKS[name], result) for name, result in results.items()},
        settings={name: dict(result.settings) for name, result in results.items()},
        data=None if corpus is None else _describe_corpus(corpus),
        cache=None if reader is None else _describe_cache(reader),
        versions={"python": platform.python_version()}
        | {p: version(p) for p in ("kd-logit-cache", "torch", "transformers")},
        documents={name: _influences(result) for name, result in results.items()},
    )
    yield EvalProgress(list(results)[-1], last.done, last.total, report)


def check_tasks(
    names: Sequence[str], *, data: str | None, cache: Path | str | None, prompts: Path | None = None
) -> None:
    """Raise DataError for an unknown task, for none at all, or for one whose text, cache or prompts were not given."""
    if not names:
        raise DataError("no task was named", expected=", ".join(TASKS), try_="--tasks perplexity")
    given = {"data": data, "cache": cache, "prompts": prompts}
    options = {"data": "--data SPEC, e.g. demo:heldout", "cache": "--cache DIR", "prompts": "--prompts FILE"}
    for name in names:
        if name not in TASKS:
            raise unknown_name("task", name, TASKS)
        needs = TASKS[name].needs
        if needs != "rows" and given[needs] is None:
            article = "" if needs == "prompts" else "a "
            raise DataError(f"the task {name} needs {article}{needs} that was not given", try_=options[needs])


def _check_ways(names: Sequence[str], encoding: str, protocol: str) -> None:
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


def _figures(task: Task, result: TaskResult) -> dict[str, dict[str, Any]]:
    figures: dict[str, dict[str, Any]] = {}
    for name, estimate in result.estimates.items():
        base, _, part = name.partition("/")
        metric = task.metrics[base]
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


def _perplexity(model: Model, tokenizer: Tokenizer, settings: Settings) -> Iterator[Progress[TaskResult]]:
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
            estimates = {name: getattr(found, name) for name in TASKS["perplexity"].metrics}
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


def _agreement(model: Model, tokenizer: Tokenizer, settings: Settings) -> Iterator[Progress[TaskResult]]:
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
            estimates = {name: getattr(found, name) for name in TASKS["agreement"].metrics}
            used = {
                "cache_fingerprint": reader.manifest.fingerprint,
                "temperature": temperature,
                "limit": settings.limit,
                "top_k": reader.top_k or reader.config.top_k,
            }
            result = TaskResult(estimates, found.documents, used)
        yield Progress(step.done, step.total, result)


SAMPLES = 20
"""Examples of which a report keeps what the model did."""


def _choices(model: Model, tokenizer: Tokenizer, settings: Settings) -> Iterator[Progress[TaskResult]]:
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


def _generation(model: Model, tokenizer: Tokenizer, settings: Settings) -> Iterator[Progress[TaskResult]]:
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


def _hellaswag(model: Model, tokenizer: Tokenizer, settings: Settings) -> Iterator[Progress[TaskResult]]:
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


def _samples(model: Model, tokenizer: Tokenizer, settings: Settings) -> Iterator[Progress[TaskResult]]:
    from kd.evaluation.samples import write_samples

    assert settings.prompts is not None
    prompts = settings.prompts
    steps = write_samples(
        model, tokenizer, prompts, seq_len=settings.seq_len, separator=settings.separator, bos=settings.bos,
        max_new_tokens=settings.max_new_tokens, tokens_per_batch=settings.tokens_per_batch,
    )  # fmt: skip
    for step in steps:
        result = None
        if step.result is not None:
            found = step.result
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


EXACT_MATCH = Metric("exact match", "share of examples", "higher", "example")
F1 = Metric("token F1", "mean over examples", "higher", "example")
ACCURACY = Metric("accuracy", "share of examples", "higher", "example")
RANKED = {
    "accuracy": ACCURACY,
    "accuracy_mean_of_tasks": replace(ACCURACY, title="accuracy, mean of tasks", unit="mean of shares"),
    "accuracy_sum": replace(ACCURACY, title="accuracy by sum"),
    "accuracy_chars": replace(ACCURACY, title="accuracy by character"),
}

TASKS: dict[str, Task] = {
    "perplexity": Task(
        about="perplexity and bits per byte of a text, sliding window",
        needs="data",
        metrics={
            "perplexity": Metric("perplexity", "per token", "lower", "token"),
            "bits_per_byte": Metric("bits per byte", "bits per byte", "lower", "byte"),
            "nll_per_token": Metric("NLL", "nats per token", "lower", "token"),
        },
        run=_perplexity,
    ),
    "agreement": Task(
        about="KL to the teacher of a cache and top-1 agreement with it",
        needs="cache",
        metrics={
            "kl": Metric("KL to teacher", "nats per token", "lower", "row"),
            "top1_agreement": Metric("top-1 agreement", "share of tokens", "higher", "row"),
            "nll_per_token": Metric("NLL", "nats per token", "lower", "row"),
            "teacher_nll_per_token": Metric("teacher's NLL", "nats per token", None, "row"),
        },
        run=_agreement,
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
        run=_choices,
    ),
    "generation": Task(
        about="greedy answers compared with the references: exact match and token F1",
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
        },
        run=_generation,
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
        run=_hellaswag,
    ),
    "samples": Task(
        about="what a model writes after the prompts of a file, to be read side by side",
        needs="prompts",
        metrics={
            "ended": Metric("ended", "share of answers", None, "prompt"),
            "length": Metric("length", "tokens", None, "prompt"),
            "repeated": Metric("repeated", "share of runs of 4 words", None, "prompt"),
        },
        run=_samples,
    ),
}
