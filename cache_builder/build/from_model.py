"""A cache from a model object: the teacher is in memory, and the texts are too.

    reader = build_cache(model, tokenizer, ["Once upon a time …", …], out="runs/cache", top_k=16)

The cache is like any other: it can be verified, sliced, shared and trained from. Its fingerprint covers a digest of the
model's parameters, so a model that was trained further, even in place, makes another cache. The digest reads all
weights once per call (docs/log.md has the speed). `kd cache repair` cannot load such a teacher by name: after damage,
call `build_cache` again with the same model, tokenizer and texts, and the missing shards are built.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from kd.cache_builder.build.build_settings import BuildSettings, PlacementSettings, TeacherSettings
from kd.cache_builder.build.builder import require_finished
from kd.cache_builder.build.from_settings import assembled, build_request
from kd.cache_builder.build.request import GivenTeacher
from kd.cache_builder.served.served_settings import ServedSettings
from kd.cache_builder.store.readers.reader import CacheReader
from kd.common.errors import DataError
from kd.common.paths import as_path
from kd.common.progress import AnyStep, ProgressRecord
from kd.common.setting_fields import settings_of
from kd.common.settings import flattened, make
from kd.data.conversations.conversation_rows import LAYOUTS
from kd.data.corpus import Corpus, corpus_of_rows
from kd.data.data_settings import InstructionConfig, RowSettings
from kd.models.families.text_model import text_config
from kd.models.identity import parameters_digest
from kd.models.loading import Model, ModelRequest
from kd.models.tokenizer import Tokenizer
from kd.models.weights.quantised_checkpoints import unpack

SOURCE = "texts"
"""What errors, and the ids of examples, call the texts."""
OF_NAMED_TEACHERS = {
    *(settings_of(TeacherSettings).keys() - {"tokens_per_batch"}),
    *settings_of(ServedSettings),
    *settings_of(InstructionConfig),
    *settings_of(RowSettings),
    *settings_of(PlacementSettings),
    "tokens_in_flight",
    "patience",
    "spec",
    "split",
    "workers",
    "engine",
}
"""Settings of `kd cache build` that say nothing about a model and texts in memory."""
Text = str | tuple[str, str] | Mapping[str, Any]
"""A document, a (prompt, target) pair, or a mapping with the fields `text`, `prompt` and `target`, or `messages`."""


def build_cache(
    model: Model,
    tokenizer: Tokenizer,
    texts: Iterable[Text],
    *,
    out: str | os.PathLike[str],
    on_progress: Callable[[ProgressRecord], object] | None = None,
    **settings: Any,
) -> CacheReader:
    """Score `texts` with a model in memory, write the soft targets to the folder `out`, and open the cache.

    model        a transformers model, causal or encoder-decoder, with or without adapters; it is scored in evaluation mode and
                 left as it was
    tokenizer    its fast tokenizer
    texts        documents, (prompt, target) pairs, mappings with `text`, `prompt` and `target`, or `messages`, or a
                 `datasets.Dataset`
    out          folder of the cache; the same call again continues, or finds that the cache is complete
    on_progress  called with every progress record, which has `done`, `total` and `note`
    settings     settings of `kd cache build` by their names in Python: top_k, profile, seq_len, columns, limit, …

    Raises DataError for texts or settings that cannot be used, TeacherError for a model that cannot be scored, and
    CacheMismatchError, with the difference, where `out` holds a cache of another model or other texts, and UnfinishedBuildError
    where other builders hold shards of it.

    >>> import kd
    >>> model, tokenizer = kd.load_teacher("demo")
    >>> texts = ["The fox went down to the river.", "The keeper counted seven ships."]
    >>> cache = kd.build_cache(model, tokenizer, texts, out="own-cache", top_k=16)
    >>> len(cache), cache[1].target
    (2, 'The keeper counted seven ships.')
    """
    require_objects(model, tokenizer)
    model = without_wrapper(model)
    given = flattened(BuildSettings, settings)
    refused = sorted(given.keys() & OF_NAMED_TEACHERS)
    if refused:
        raise DataError(
            "these settings do not apply to a model in memory",
            found=", ".join(refused),
            try_="kd cache build, which loads the teacher by name",
        )
    name = type(model).__name__
    chosen = make(BuildSettings, {**given, "teacher": name, "spec": SOURCE, "out": as_path(out)})
    request = assembled(chosen, ModelRequest(name), text_config(model.config), lambda: corpus_of_texts(chosen, texts))
    with evaluating(model):
        unpack(model)
        teacher = GivenTeacher(model, tokenizer, parameters_digest(model))
        last = build_request(replace(request, given=teacher), chosen.running, watch=_watching(on_progress))
    require_finished(last, chosen.out)
    return CacheReader(chosen.out)


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


def corpus_of_texts(settings: BuildSettings, texts: Iterable[Text]) -> Corpus:
    """The texts as a corpus. Raises DataError naming the one that cannot be used."""
    fields, rows = fields_and_rows(texts)
    columns, data = dict(settings.data.columns or {}), settings.data
    answered, prompt = settings.answers.target_source == "teacher", columns.get("prompt", "prompt")
    if (
        answered and prompt in fields and "completion" not in fields
    ):  # prompts are enough: the answers replace these targets
        columns = {"prompt": prompt, "target": prompt} | columns
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
    if isinstance(fields, list):  # a `datasets.Dataset`
        return fields, texts  # type: ignore[return-value]
    if isinstance(texts, str | bytes) or isinstance(fields, Mapping):
        raise DataError(
            "a build needs a list of texts",
            found="one text" if fields is None else "several splits",
            expected="texts, (prompt, target) pairs, mappings, or one split of a data set",
        )
    rows = [_row(number, text) for number, text in enumerate(texts)]
    for number, row in enumerate(rows):
        if row.keys() != rows[0].keys() and not _are_chats(row, rows[0]):
            raise DataError(
                "the texts are of several kinds",
                where=f"{SOURCE} {number}",
                found=", ".join(map(str, row)),
                expected=", ".join(map(str, rows[0])),
            )
    return [str(field) for field in rows[0]] if rows else ["text"], rows


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
