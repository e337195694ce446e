"""Was a model trained on what it is about to be asked?

A run directory names the cache that it was trained from (`run.json`), and a cache holds its text. These are found:

    hellaswag        a cache whose source is HellaSwag, or WikiHow or ActivityNet's captions, where its text is from; and
                     rows of which 13 words in a row stand in the cache's text (the overlap of Brown et al. 2020)
    any other task   examples whose prompt and target are those of a cached one (white space and case aside), rows of an
                     instruction task with the same place at the source, whatever template words them (BoolQ's dev and
                     test are one split), and documents that begin with the same 200 characters

A student that started from another run is known to have read that run's text too. Where a cache is no longer there, the
text's name still counts. `agreement` is asked about the training text on purpose and is never called contaminated.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kd.cache_builder.weighted_caches import CacheSpec, as_caches
from kd.common.errors import DataError, KdError
from kd.common.paths import as_path
from kd.common.setting_values import as_text
from kd.data.conversations.conversation import CONVERSATIONS, conversation_from_json
from kd.data.corpus import HELLASWAG_SOURCES, Corpus
from kd.data.instruction_tasks.task_files import load_task, task_names
from kd.data.rows.example import Example, row_and_template
from kd.student_trainer.run_folder import is_run, read_run

if TYPE_CHECKING:
    from kd.evaluation.measures.hellaswag import Scenes

SHINGLE = 13
"""Number of words in a row that make a row of HellaSwag known."""
OPENING = 200
"""Number of characters at the beginning of a document that identify it."""
END_TOKEN = re.compile(r"(<[^<>\s]{1,40}>|\[[A-Z]{1,10}\])*\s*$")
"""What an end token at the end of a target looks like."""


@dataclass(frozen=True)
class TrainingText:
    """A text that a run was trained on."""

    run: str
    """Folder of the run."""
    spec: str
    """Name of the text, as `--data` spells it."""
    split: str
    source: str
    """What identifies the source besides its name, as JSON."""
    digest: str | None
    """Digest of the text; None where the cache is no longer there."""
    examples: tuple[Example, ...]
    """Examples of the cache in order; blocks of a document. Empty where the cache is no longer there."""


def trained_on(model: str, *, whole: bool = True) -> list[TrainingText]:
    """The texts a model was trained on, as the runs say that made it; empty for a model that no run made here.

    whole   whether the examples of the caches are read, besides what their manifests say
    """
    texts: list[TrainingText] = []
    seen: set[Path] = set()
    folder = as_path(model)
    while is_run(folder) and folder.resolve() not in seen:
        seen.add(folder.resolve())
        try:
            run = read_run(folder)
        except DataError:
            break
        settings = run.get("settings")
        if not isinstance(settings, dict) or not isinstance(settings.get("cache"), str):
            break
        texts += _training_texts(folder, run, settings["cache"], whole)
        folder = as_path(str(settings.get("student")))
    return texts


def _training_texts(folder: Path, run: Mapping[str, Any], cache: str, whole: bool) -> list[TrainingText]:
    corpus = run.get("corpus") or {}
    try:
        if "://" not in cache:  # what lies elsewhere is not fetched to score a model
            return cache_texts(cache, run=str(folder), whole=whole)
    except (KdError, OSError):
        pass
    return [TrainingText(str(folder), str(corpus.get("corpus")), str(corpus.get("split")), "", None, ())]


def cache_texts(cache: CacheSpec, *, run: str = "", whole: bool = True) -> list[TrainingText]:
    """The text of a cache, or of each cache of a mixture, without its targets; its name alone where not `whole`.

    `cache` as `kd train --cache` takes it. Raises CacheError.
    """
    from kd.cache_builder.opening import open_files
    from kd.cache_builder.store.records.manifest import load_manifest
    from kd.cache_builder.store.records.part import load_part
    from kd.cache_builder.store.shard_store import read_example_table

    texts = []
    for one in as_caches(cache):
        files = open_files(one.location)
        manifest = load_manifest(files.root)
        provenance, part = manifest.provenance, load_part(files.root, manifest)
        shards = range(len(manifest.shards)) if part is None else part.shards
        examples: list[Example] = []
        for index in shards if whole else ():
            chats = ["conversation"] if manifest.identity["corpus"]["kind"] == CONVERSATIONS else []
            table = read_example_table(files, manifest, index, ["id", "prompt", "target", *chats])
            if chats:
                talks = map(conversation_from_json, table["id"], table["conversation"])
                examples += [Example(talk.id, talk.answered, talk.asked) for talk in talks]
                continue
            examples += [
                Example(i, target, prompt)
                for i, prompt, target in zip(table["id"], table["prompt"], table["target"], strict=True)
            ]
        texts.append(
            TrainingText(
                run,
                str(provenance.get("corpus")),
                str(provenance.get("split")),
                json.dumps(provenance.get("source")),
                str(manifest.identity["corpus"]["text_digest"]),
                tuple(examples),
            )
        )
    return texts


def benchmark_text(text: TrainingText) -> str | None:
    """Why a text is a benchmark's own, by the names of its source; None where nothing says so."""
    name = HELLASWAG_SOURCES.search(f"{text.spec} {text.source}")
    return None if name is None else f"its source names {name[0]!r}, where HellaSwag's text is from"


def refuse_benchmark_text(cache: CacheSpec, *, allow: bool) -> str | None:
    """Why a cache's text is a benchmark's own; raises DataError where it is, unless `allow`."""
    reason = next(filter(None, map(benchmark_text, cache_texts(cache, whole=False))), None)
    if reason is not None and not allow:
        raise DataError(
            "this cache holds a benchmark's own text",
            where=as_text(as_caches(cache)),
            found=reason,
            expected="text that the student will not be measured on",
            try_="--allow-contaminated: the run and its scores are then marked",
        )
    return reason


def why_known(texts: Sequence[TrainingText], asked: Corpus | Scenes) -> str | None:
    """Why a model that was trained on `texts` knows what it is asked; None where nothing says so."""
    for text in texts:
        reason = _examples_known(asked, text) if isinstance(asked, Corpus) else _rows_known(asked, text)
        if reason is not None:
            return f"trained on {text.spec} ({text.split}): {reason}"
    return None


def _examples_known(corpus: Corpus, text: TrainingText) -> str | None:
    count = shared_examples(corpus, text)
    return f"{count} of {len(corpus.examples)} examples are among its text" if count else None


def _rows_known(scenes: Scenes, text: TrainingText) -> str | None:
    if (reason := benchmark_text(text)) is not None:
        return reason
    count = shared_rows(scenes, text)
    return f"{count} of {len(scenes.rows)} rows share {SHINGLE} words in a row with its text" if count else None


def refuse_contaminated(reasons: Mapping[str, str]) -> None:
    """Raise DataError where there is a task (the key) whose text is known to the model (why: the value)."""
    for task, reason in reasons.items():
        raise DataError(
            "the model was trained on what it would be asked",
            where=f"task {task}",
            found=reason,
            expected="text it has not seen",
            try_="--allow-contaminated: the result is then marked",
        )


def shared_examples(corpus: Corpus, text: TrainingText) -> int:
    """Examples of `corpus` that are in the text a model was trained on."""
    if text.digest == corpus.digest:
        return len(corpus.examples)
    if corpus.kind == "documents":
        openings_read = {opening for opening in openings(text.examples) if len(opening) == OPENING}
        return sum(_plain(e.target)[:OPENING] in openings_read for e in corpus.examples)
    keys = {_key(e) for e in text.examples} | {p for e in text.examples if (p := source_place(e.id)) is not None}
    return sum(_key(e) in keys or source_place(e.id) in keys for e in corpus.examples)


def openings(blocks: Sequence[Example]) -> Iterator[str]:
    """The first characters of each document that was cut into `blocks`."""
    beginnings: dict[str, str] = {}
    for block in blocks:
        name, _, number = block.id.rpartition("#")
        begun = beginnings.get(name, block.prompt if number == "0" else "")
        if len(begun) < 2 * OPENING:  # white space is still to go
            beginnings[name] = begun + block.target
    return (_plain(text)[:OPENING] for text in beginnings.values())


def shared_rows(scenes: Scenes, text: TrainingText) -> int:
    """Rows of which SHINGLE words in a row, of the context and the right ending, stand in the text."""
    rows = [set(_shingles(f"{s.context} {s.endings[s.answer]}")) for s in scenes.rows]
    wanted = set().union(*rows)
    shared: set[tuple[str, ...]] = set()
    for example in text.examples:
        shared |= wanted.intersection(_shingles(f"{example.prompt} {example.target}"))
    return sum(bool(row & shared) for row in rows)


def _shingles(text: str) -> Iterator[tuple[str, ...]]:
    words = re.findall(r"\w+", text.lower())
    return zip(*(words[i:] for i in range(SHINGLE)), strict=False)


def source_place(identity: str) -> tuple[str, str, str] | None:
    """Task, split at the source and row of an instruction example's id `task/split/row`; None for other ids.

    The split is train, dev or test, or in FLAN's mixtures that of the source.
    """
    task, _, rest = row_and_template(identity)[0].partition("/")
    split, _, row = rest.partition("/")
    if task not in task_names() or not row.isdigit():
        return None
    file = load_task(task)
    part = file.splits.get(split)
    name = part.name if part is not None else split
    known = {one.name for one in (*file.splits.values(), *file.flan_splits.values())}
    return (task, name, row) if name in known else None


def _plain(text: str) -> str:
    return " ".join(text.split()).casefold()


def _key(example: Example) -> str:
    """Prompt and target without white space and without an end token: a cache may have the border elsewhere, and none."""
    return "".join((example.prompt + END_TOKEN.sub("", example.target)).split()).casefold()
