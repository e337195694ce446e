"""How a run's student read its text: whether BOS opened it, what stood between prompt and target, and how its chats were written.

A student is scored as it was trained: `kd train --eval-data` and `kd eval RUN` take this from here. With another separator, or
without the BOS that it was trained on, its perplexity would say how well it copes with strange text. The chat template itself
lies in the run's folder, with the tokenizer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kd.cache_builder.opening import open_cache
from kd.cache_builder.store.readers.reading import Reader
from kd.common.errors import KdError
from kd.common.paths import as_path
from kd.models.model_config import is_encoder_decoder, load_config, load_request_tokenizer
from kd.models.model_request import ModelRequest
from kd.models.tokenizer import Tokenizer
from kd.student_trainer.batches.compatibility import same_tokenizer
from kd.student_trainer.run_folder import is_run, read_run

READING = "reading"
"""Key of `run.json`."""


@dataclass(frozen=True)
class TrainedReading:
    """What a student was used to in training."""

    bos: bool
    """Whether documents and prompts opened with the BOS token, where the tokenizer has one."""
    separator: str
    """Text between prompt and target."""
    control_tokens: str = "auto"
    """How control tokens that are spelled in a text were read, see `kd.data.tokenizing.text_tokens`."""
    template_kwargs: Mapping[str, Any] | None = None
    """Further variables of the chat template; None where there are none."""
    system: str | None = None
    """System text of conversations that had none of their own."""


def trained_reading(
    reader: Reader,
    config: Any,
    tokenizer: Tokenizer,
    separator: str | None,
    *,
    own_template: bool = False,
    template_kwargs: Mapping[str, Any] | None = None,
) -> TrainedReading:
    """The reading of a student of a cache: the cache's tokens as they are, or tokens of its own, which BOS opens.

    config           the student's configuration
    separator        the run's own; None = as in the cache
    own_template     whether the run names a chat template or its variables, and so does not use the cache's
    template_kwargs  the variables of the chat template that the run names
    """
    blocks, own_tokens = reader.manifest.blocks, not same_tokenizer(reader, tokenizer)
    alike = separator is None and blocks.encoder == is_encoder_decoder(config) and not own_tokens
    chat = reader.manifest.identity.get("chat") or {}
    if chat and not own_template and not own_tokens:
        template_kwargs = reader.manifest.provenance.get("template_kwargs")
    return TrainedReading(
        blocks.bos if alike else True,
        blocks.separator if separator is None else separator,
        blocks.control_tokens,
        template_kwargs or None,
        chat.get("system"),
    )


def reading_of_run(model: str) -> TrainedReading | None:
    """How the student of a run was trained to read; None for a model that is no run, or where nothing says so any more.

    Runs of earlier releases do not say it themselves: their cache does, as long as it is on this machine.
    """
    folder = as_path(model)
    if not is_run(folder):
        return None
    run = read_run(folder)
    said = run.get(READING)
    if isinstance(said, Mapping):
        return TrainedReading(
            bool(said["bos"]),
            str(said["separator"]),
            str(said.get("control_tokens", "auto")),
            said.get("template_kwargs"),
            said.get("system"),
        )
    return _reading_by_cache(folder, run.get("settings") or {})


def _reading_by_cache(folder: Path, settings: Mapping[str, Any]) -> TrainedReading | None:
    cache = settings.get("cache")
    if not isinstance(cache, str) or "://" in cache:  # what lies elsewhere is not fetched to score a model
        return None
    student = ModelRequest(str(folder), device="cpu")
    try:
        reader, config = open_cache(cache), load_config(student)
        return trained_reading(
            reader,
            config,
            load_request_tokenizer(student),
            settings.get("separator"),
            own_template=settings.get("chat_template") is not None or settings.get("template_kwargs") is not None,
            template_kwargs=settings.get("template_kwargs"),
        )
    except (KdError, OSError):
        return None
