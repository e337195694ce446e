"""What a plan refuses before a weight is loaded: teachers, texts and settings that do not go together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kd.cache_builder.build.request import BuildRequest
from kd.cache_builder.store.records.teacher_record import refuse_beyond_logprobs
from kd.common.errors import DataError
from kd.data.conversations.conversation import CONVERSATIONS
from kd.data.corpus import Corpus
from kd.data.instruction_tasks.glue import CLASSES
from kd.data.text_stream import Text
from kd.models.classifiers import refuse_other_classes, refuse_other_heads
from kd.models.families.positions import max_positions
from kd.models.model_config import is_classifier
from kd.models.tokenizer import Tokenizer, usable_ids

PADDED_COLUMNS = 128
"""Fewer logit columns than this beyond the tokenizer's entries are padding."""


def refuse_long_sequences(request: BuildRequest, config: Any) -> None:
    """Raise DataError where a sequence may be longer than the teacher's positions."""
    limit = max_positions(config)
    written = max_positions(config, decoder=True)
    written = written if written is None else written - len(request.blocks.forced)
    for option, length, most in (
        ("--seq-len", request.blocks.seq_len, limit),
        ("--target-len", request.blocks.target_len, written),
    ):
        if most is not None and length is not None and length > most:
            raise DataError(
                "the sequence length is longer than the teacher's positions",
                found=f"{option} {length}",
                expected=f"at most {most}",
                try_=f"{option} {most}",
            )


def refuse_other_kind(request: BuildRequest, config: Any) -> None:
    """Raise DataError for a classifier over text, or a language model over labelled rows."""
    classes = request.corpus.kind == CLASSES
    if classes != is_classifier(config):
        raise DataError(
            "only a classifier can score labelled rows"
            if classes
            else "a classifier can only score a classification data set (glue/TASK)",
            where=request.teacher.name,
            found=f"{(config.architectures or [type(config).__name__])[0]} over {request.corpus.spec}",
            expected="a classifier over glue/TASK, or a language model over text",
        )
    if classes:
        refuse_other_heads(request.teacher, config)
    if request.corpus.kind == CONVERSATIONS:
        _refuse_what_chats_lack(request)


def _refuse_what_chats_lack(request: BuildRequest) -> None:
    """Raise DataError where a teacher cannot score conversations."""
    if request.blocks.encoder:
        raise DataError(
            "an encoder-decoder has no chat template",
            where=request.teacher.name,
            found=f"conversations in {request.corpus.spec}",
            expected="prompt and target",
            try_="--columns prompt=…,target=…",
        )


def refuse_unserved(request: BuildRequest) -> None:
    """Raise DataError where an engine that gives log-probabilities cannot give what is to be kept."""
    if request.serving is not None:
        refuse_beyond_logprobs(request.targets, request.teacher.name)


def predicted_ids(request: BuildRequest, config: Any, tokenizer: Tokenizer) -> int:
    """How many ids the teacher predicts: the vocabulary that sums run over. Raises DataError where it has too few.

    Padded logit columns (T5 has 28, Pythia 27) cannot be emitted and are left out of every sum. Random weights with the
    tokenizer of another model keep their real width.
    """
    width = int(config.vocab_size)
    entries = usable_ids(tokenizer, width, what="the teacher")
    padded = request.teacher.random_shape is None or width - entries < PADDED_COLUMNS
    return entries if padded else width


def class_labels(corpus: Text) -> tuple[str, ...]:
    """The labels of texts to classify; none for other texts."""
    return corpus.examples[0].choices if isinstance(corpus, Corpus) and corpus.kind == CLASSES else ()


def class_count(request: BuildRequest, labels: Sequence[str], config: Any) -> int:
    """The classes of a teacher, all of which are kept. Raises DataError where they are not those of the text."""
    refuse_other_classes(request.teacher, config, labels)
    classes = len(labels)
    if request.teacher.bits is not None:
        raise DataError(
            f"classifiers are not loaded in {request.teacher.bits} bits",
            where=request.teacher.name,
            found=f"--load-in-{request.teacher.bits}bit",
            try_="--dtype bfloat16",
        )
    for option, given in (
        ("--teacher-adapter", request.teacher.adapter is not None),
        ("--device-map", request.teacher.placement.spread),
    ):
        if given:
            raise DataError("this setting is for language models", where=request.teacher.name, found=option)
    if request.generation is not None:
        raise DataError("a classifier writes no text", where=request.teacher.name, found="--targets teacher")
    targets = request.targets
    if targets.profile != "kl" or targets.top_k != classes or targets.uniforms or targets.tail_bands:
        raise DataError(
            "a cache of classes keeps all of them",
            where=request.teacher.name,
            found=f"profile {targets.profile}, top-k {targets.top_k}",
            expected=f"profile kl, top-k {classes}",
            try_="neither --profile nor --top-k",
        )
    return classes


def refuse_no_such_part(part: tuple[int, int]) -> None:
    """Raise DataError for a part I/N of the build with I outside 1..N."""
    index, count = part
    if not 1 <= index <= count:
        raise DataError("no such part of the build", found=f"--shard {index}/{count}", expected="I/N with 1 <= I <= N")
