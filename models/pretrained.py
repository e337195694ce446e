"""A teacher and its tokenizer by name, as a cache build loads them."""

from __future__ import annotations

from kd.models.loading import Model, ModelRequest, load_model, load_request_tokenizer
from kd.models.tokenizer import Tokenizer


def load_teacher(
    name: str,
    *,
    revision: str | None = None,
    tokenizer: str | None = None,
    dtype: str = "auto",
    device: str = "auto",
) -> tuple[Model, Tokenizer]:
    """The model that `kd cache build --teacher NAME` would run, and its tokenizer.

    name        `demo` or `demo-t5` (embedded), `random:NAME`, a folder, or a hub id
    revision    branch, tag or commit of a hub model
    tokenizer   folder or hub id of the tokenizer, where it is not beside the model
    dtype       auto, float32, bfloat16 or float16; auto = as stored, and float32 on a CPU
    device      auto, cpu or cuda

    Raises TeacherError for a model that cannot be loaded.

    >>> import kd
    >>> model, tokenizer = kd.load_teacher("demo")
    >>> tokenizer.decode(tokenizer.encode("import sys"))
    'import sys'
    """
    request = ModelRequest(name, revision=revision, dtype=dtype, device=device, tokenizer=tokenizer)
    return load_model(request), load_request_tokenizer(request)
