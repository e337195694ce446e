"""`build_cache`: a cache in one call, of a model and texts in memory, or of a teacher by name.

    reader = build_cache(model, tokenizer, ["Once upon a time …", …], out="runs/cache", top_k=16)
    reader = build_cache("Qwen/Qwen3-8B", data="wikitext-2", out="runs/qwen", device_map="auto")

The cache is like any other: it can be verified, sliced, shared and trained from. Its fingerprint covers a digest of the
parameters of a model in memory, so a model that was trained further, even in place, makes another cache. The digest reads all
weights once per call (docs/log.md has the speed). `kd cache repair` cannot load such a teacher by name, nor texts in memory:
after damage, call `build_cache` again in the same way, and the missing shards are built.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

from kd.cache_builder.build.build_settings import RECORDED, BuildSettings, PlacementSettings, TeacherSettings
from kd.cache_builder.build.builder import require_finished
from kd.cache_builder.build.from_settings import (
    assembled,
    build_in_groups,
    build_request,
    model_request,
    request_of,
)
from kd.cache_builder.build.request import BuildRequest, GivenTeacher
from kd.cache_builder.opening import open_files
from kd.cache_builder.served.served_settings import ServedSettings
from kd.cache_builder.store.readers.reader import CacheReader
from kd.common.errors import DataError, KdError
from kd.common.paths import StoreAddress, build_output
from kd.common.progress import AnyStep, ProgressRecord
from kd.common.setting_fields import settings_of
from kd.common.setting_values import as_text
from kd.common.settings import flat, flattened, make
from kd.data.conversations.conversation_rows import LAYOUTS
from kd.data.corpus import Corpus, corpus_of_rows
from kd.data.data_settings import InstructionConfig, RowSettings
from kd.data.rows.row_examples import DatasetTexts
from kd.data.rows.row_reading import ID, RowReading
from kd.data.text_stream import TextStream
from kd.models.families.text_model import text_config
from kd.models.identity import parameters_digest
from kd.models.loading import Model
from kd.models.model_config import is_classifier, load_config
from kd.models.model_request import ModelRequest
from kd.models.tokenizer import Tokenizer
from kd.models.weights.quantised_checkpoints import unpack

SOURCE = "texts"
"""What errors, and the ids of examples, call the texts."""
OF_OTHER_TEXTS = {*settings_of(InstructionConfig), *settings_of(RowSettings), "spec", "split", "streaming"}
"""Settings of `kd cache build` that say nothing about texts in memory."""
OF_NAMED_TEACHERS = {
    *(settings_of(TeacherSettings).keys() - {"tokens_per_batch"}),
    *settings_of(ServedSettings),
    *settings_of(PlacementSettings),
    "tokens_in_flight",
    "patience",
    "workers",
    "engine",
} | OF_OTHER_TEXTS
"""Settings of `kd cache build` that say nothing about a model and texts in memory."""
SECONDS_FOR_THE_LEADER = 3
"""How long a process of a tensor-parallel group waits before it fails too, so that its leader can say why."""
Text = str | tuple[str, str] | Mapping[str, Any]
"""A document, a (prompt, target) pair, or a mapping with the fields `text`, `prompt` and `target`, or `messages`."""


def build_cache(
    model: str | os.PathLike[str] | Model,
    tokenizer: Tokenizer | str | None = None,
    texts: Iterable[Text] | None = None,
    *,
    out: str | os.PathLike[str],
    on_progress: Callable[[ProgressRecord], object] | None = None,
    **settings: Any,
) -> CacheReader:
    """Score texts with a teacher, write the soft targets to `out`, and open the cache.

    model        a transformers model, causal or encoder-decoder, with or without adapters, which is scored in evaluation mode and
                 left as it was; or the name of a teacher, as `kd cache build --teacher` takes it
    tokenizer    the model's fast tokenizer; beside a name, the name of another one than the teacher's own
    texts        documents, (prompt, target) pairs, mappings with `text`, `prompt` and `target`, or `messages`: in a list, or from a
                 generator; or a `datasets.Dataset` or `datasets.IterableDataset`. What is no list is never held in memory. Beside
                 the name of a teacher, `data="wikitext-2"` or the like may stand in their place
    out          folder of the cache, or s3://BUCKET/PATH; the same call again continues, or finds that the cache is complete
    on_progress  called with every progress record, which has `done`, `total` and `note`
    settings     settings of `kd cache build` by their names in Python: top_k, profile, seq_len, columns, limit, …; beside a
                 name all of them, among them device_map, load_in_8bit, teacher_adapter, teacher_url and tensor_parallel

    With `tensor_parallel`, torchrun starts the script that makes this call, and the call returns in every process.

    Raises DataError for texts or settings that cannot be used, TeacherError for a model that cannot be scored, and
    CacheMismatchError, with the difference, where `out` holds a cache of another model or other texts, and UnfinishedBuildError
    where other builders hold shards of it.

    >>> import kd
    >>> model, tokenizer = kd.load_teacher("demo")
    >>> texts = ["The fox went down to the river.", "The keeper counted seven ships."]
    >>> cache = kd.build_cache(model, tokenizer, texts, out="own-cache", top_k=16)
    >>> len(cache), cache[1].target
    (2, 'The keeper counted seven ships.')
    >>> by_name = kd.build_cache("demo", texts=texts, out="by-name", top_k=16)
    >>> bool((by_name[1].targets.token_ids == cache[1].targets.token_ids).all())
    True
    """
    if isinstance(model, str | os.PathLike):
        return _of_named_teacher(
            os.fspath(model), tokenizer, texts, build_output(os.fspath(out)), on_progress, settings
        )
    require_objects(model, tokenizer)
    if texts is None:
        raise DataError("a model in memory needs texts", expected="build_cache(model, tokenizer, texts, out=…)")
    assert tokenizer is not None
    assert not isinstance(tokenizer, str)
    model = without_wrapper(model)
    given = flattened(BuildSettings, settings)
    refused = sorted(given.keys() & OF_NAMED_TEACHERS)
    if refused:
        raise DataError(
            "these settings do not apply to a model in memory",
            found=", ".join(refused),
            try_="build_cache(NAME, …), which loads the teacher by name",
        )
    name = type(model).__name__
    chosen = make(BuildSettings, {**given, "teacher": name, "spec": SOURCE, "out": build_output(os.fspath(out))})
    request = assembled(chosen, ModelRequest(name), text_config(model.config), lambda: corpus_of_texts(chosen, texts))
    with evaluating(model):
        unpack(model)
        teacher = GivenTeacher(model, tokenizer, parameters_digest(model))
        last = build_request(replace(request, given=teacher), chosen.running, watch=_watching(on_progress))
    require_finished(last, chosen.out)
    return _opened(chosen.out)


def _of_named_teacher(
    name: str,
    tokenizer: Tokenizer | str | None,
    texts: Iterable[Text] | None,
    out: Path | StoreAddress,
    on_progress: Callable[[ProgressRecord], object] | None,
    settings: Mapping[str, Any],
) -> CacheReader:
    """`build_cache` for a teacher that is loaded by its name; one of torchrun's processes where several hold it together."""
    chosen = _named_settings(name, tokenizer, texts, out, settings)
    typed = {*flattened(BuildSettings, settings), "teacher", "tokenizer"} & RECORDED - {"tensor_parallel"}
    recorded = {key: as_text(value) for key, value in flat(chosen).items() if key in typed and value is not None}

    def build(builder_settings: BuildSettings, first: bool) -> CacheReader:
        request = request_of(builder_settings) if texts is None else request_of_texts(builder_settings, texts)
        request = replace(request, options=recorded if texts is None else None)
        last = build_request(request, builder_settings.running, watch=_watching(on_progress if first else None))
        require_finished(last, builder_settings.out)
        return _opened(builder_settings.out)

    if chosen.served.processes == 1:
        return build(chosen, True)
    led = build_in_groups(chosen, build)
    return _after_the_leader(chosen.out) if led is None else led


def _named_settings(
    name: str,
    tokenizer: Tokenizer | str | None,
    texts: Iterable[Text] | None,
    out: Path | StoreAddress,
    settings: Mapping[str, Any],
) -> BuildSettings:
    """The settings of a build with a teacher by name. Raises DataError."""
    given = flattened(BuildSettings, settings)
    if tokenizer is not None:
        if not isinstance(tokenizer, str | os.PathLike):
            raise DataError(
                "a teacher by name takes a tokenizer by name",
                found=type(tokenizer).__name__,
                expected="none, which is the teacher's own, or a folder or hub id",
                try_="texts=[…] for texts",
            )
        given = {"tokenizer": os.fspath(tokenizer), **given}
    if texts is None and "spec" not in given:
        raise DataError("there is no text", expected='texts=[…], or data="wikitext-2" or the like')
    refused = sorted(given.keys() & OF_OTHER_TEXTS) if texts is not None else []
    if refused:
        raise DataError(
            "these settings do not apply to texts in memory", found=", ".join(refused), try_="data=… in place of texts"
        )
    return make(BuildSettings, {"spec": SOURCE, **given, "teacher": name, "out": out})


def request_of_texts(settings: BuildSettings, texts: Iterable[Text]) -> BuildRequest:
    """The request for texts in memory and a teacher by name. Raises KdError."""
    teacher = model_request(settings)
    config = load_config(teacher)
    if is_classifier(config):
        raise DataError(
            "texts in memory have no labels for a classifier", where=settings.model.teacher, try_='data="glue/rte"'
        )
    return assembled(settings, teacher, config, lambda: corpus_of_texts(settings, texts))


def _opened(out: Path | StoreAddress) -> CacheReader:
    """The finished cache, in its folder or through the mirror of its address."""
    return CacheReader(open_files(out) if isinstance(out, StoreAddress) else out)


def _after_the_leader(out: Path | StoreAddress) -> CacheReader:
    """The cache that this process's leader has built. Raises CacheError where it has stopped before the end."""
    try:
        return _opened(out)
    except KdError:
        time.sleep(SECONDS_FOR_THE_LEADER)
        raise


def require_objects(model: Any, tokenizer: Any) -> None:
    """Raise DataError for what is no model of transformers, or no fast tokenizer."""
    for name, value, attribute, expected in (
        ("model", model, "get_output_embeddings", "a transformers model"),
        ("tokenizer", tokenizer, "backend_tokenizer", "a fast tokenizer of transformers"),
    ):
        if not hasattr(value, attribute):
            advice = "model, tokenizer = kd.load_teacher(name) loads both"
            raise DataError(f"the {name} cannot be used", found=type(value).__name__, expected=expected, try_=advice)


def without_wrapper(model: Any) -> Model:
    """The transformers model inside a PeftModel, which has the adapters in its layers. Raises DataError for soft prompts."""
    if not hasattr(model, "get_base_model"):
        return model
    if getattr(model.active_peft_config, "is_prompt_learning", False):
        raise DataError(
            "a model with soft prompts cannot be a teacher",
            found=type(model.active_peft_config).__name__,
            expected="a model without adapters, or with adapters in its layers, such as LoRA",
        )
    return model.get_base_model()


def corpus_of_texts(settings: BuildSettings, texts: Iterable[Text]) -> Corpus | TextStream:
    """The texts as a corpus, or as a stream where they are no list. Raises DataError naming the one that cannot be used."""
    fields, rows = fields_and_rows(texts)
    columns, data = dict(settings.data.columns or {}), settings.data
    answered, prompt = settings.answers.target_source == "teacher", columns.get("prompt", "prompt")
    if (
        answered and prompt in fields and "completion" not in fields
    ):  # prompts are enough: the answers replace these targets
        columns = {"prompt": prompt, "target": prompt} | columns
    if not isinstance(rows, list):
        reading = RowReading(columns, data.format, data.bad_rows == "skip", answered)
        read = DatasetTexts(SOURCE, rows, SOURCE, "train", reading, tuple(fields))
        once, source = isinstance(rows, Iterator), {"source": "memory"}
        return TextStream(
            SOURCE, "train", read.kind(), source, read, data.limit, reading.skip, ID in columns, once=once
        )
    return corpus_of_rows(
        SOURCE,
        rows,
        fields,
        columns=columns,
        form=data.format,
        bad_rows=data.bad_rows,
        prompts=answered,
        limit=data.limit,
    )


def fields_and_rows(texts: Iterable[Text]) -> tuple[list[str], Iterable[Mapping[str, Any]]]:
    """Names of the fields, and the rows. Raises DataError where the texts are of several kinds, or of none."""
    fields = getattr(texts, "column_names", None)
    if hasattr(texts, "column_names") and not isinstance(fields, Mapping):  # a `datasets.Dataset` or `IterableDataset`
        return fields or [*next(iter(texts), {})], texts  # type: ignore[return-value]
    if isinstance(texts, Iterator):
        first = next(texts, None)
        rows_of = _checked(chain([] if first is None else [first], texts))
        return ["text"] if first is None else [*map(str, _row(0, first))], rows_of
    if isinstance(texts, str | bytes) or isinstance(fields, Mapping):
        raise DataError(
            "a build needs a list of texts",
            found="one text" if fields is None else "several splits",
            expected="texts, (prompt, target) pairs, mappings, or one split of a data set",
        )
    rows = list(_checked(texts))
    return [str(field) for field in rows[0]] if rows else ["text"], rows


def _checked(texts: Iterable[Text]) -> Iterator[dict[str, Any]]:
    """The rows. Raises DataError for one of another kind than the first."""
    first: dict[str, Any] = {}
    for number, text in enumerate(texts):
        row = _row(number, text)
        first = row if number == 0 else first
        if row.keys() != first.keys() and not _are_chats(row, first):
            raise DataError(
                "the texts are of several kinds",
                where=f"{SOURCE} {number}",
                found=", ".join(map(str, row)),
                expected=", ".join(map(str, first)),
            )
        yield row


def _are_chats(row: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two rows are conversations of one layout, beside which `tools` may or may not stand."""
    return any({*layout.needed} <= row.keys() & other.keys() for layout in LAYOUTS.values())


def _row(number: int, text: Text) -> dict[str, Any]:
    if isinstance(text, str):
        return {"text": text}
    if isinstance(text, Mapping):
        return dict(text)
    if isinstance(text, tuple | list) and len(text) == 2:
        return {"prompt": text[0], "target": text[1]}
    raise DataError(
        "a text is of no known kind",
        where=f"{SOURCE} {number}",
        found=type(text).__name__,
        expected="a string, a (prompt, target) pair, or a mapping",
    )


@contextmanager
def evaluating(model: Model) -> Iterator[None]:
    """The model in evaluation mode; afterwards every module is in the mode it was in."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _watching(on_progress: Callable[[ProgressRecord], object] | None) -> Any:
    def watch(stage: str, steps: Iterator[AnyStep]) -> AnyStep:
        last: AnyStep | None = None
        for last in steps:
            if on_progress is not None:
                on_progress(last)
        assert last is not None
        return last

    return watch
