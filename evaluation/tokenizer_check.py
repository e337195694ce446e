"""Whether a model's tokenizer is its teacher's: what agreement needs, because it compares token by token."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kd.common.errors import DataError
from kd.models.model_config import load_request_tokenizer
from kd.models.model_request import ModelRequest
from kd.models.tokenizer import Tokenizer, token_bytes

if TYPE_CHECKING:
    from kd.cache_builder.store.readers.reading import Reader

ADVICE = "--tasks perplexity: its bits per byte compare any two tokenizers"


def refuse_cache_of_other_tokenizer(reader: Reader, tokenizer: Tokenizer) -> None:
    """Raise CacheMismatchError unless the cache was made with `tokenizer`."""
    from kd.student_trainer.batches.compatibility import refuse_other_tokenizer

    refuse_other_tokenizer(reader, tokenizer, purpose="agreement", advice=ADVICE)


def refuse_teacher_of_other_tokenizer(teacher: ModelRequest, tokenizer: Tokenizer) -> None:
    """Raise DataError unless the teacher has `tokenizer`. No weights are loaded."""
    theirs, ours = token_bytes(load_request_tokenizer(teacher)), token_bytes(tokenizer)
    if theirs != ours:
        differing = sum(a != b for a, b in zip(theirs, ours, strict=False)) + abs(len(theirs) - len(ours))
        raise DataError(
            "the model's tokenizer is not the teacher's, and agreement compares token by token",
            where=f"--teacher {teacher.name}",
            found=f"{differing} of {len(theirs)} ids differ",
            try_=ADVICE,
        )
