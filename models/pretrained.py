"""A model and its tokenizer by name: as a teacher that is to be cached, or as a student that is to be trained."""

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
    return _loaded(ModelRequest(name, revision=revision, dtype=dtype, device=device, tokenizer=tokenizer))


def load_student(
    name: str,
    *,
    revision: str | None = None,
    tokenizer: str | None = None,
    seed: int = 0,
) -> tuple[Model, Tokenizer]:
    """The model that `kd.train(student=NAME)` begins with, and its tokenizer: float32 weights on the CPU.

    name        `demo` (a small model with random weights), `random:NAME`, a folder, or a hub id
    revision    branch, tag or commit of a hub model
    tokenizer   folder or hub id of the tokenizer of a random student
    seed        seed of random weights

    Raises TeacherError for a model that cannot be loaded.

    >>> import kd
    >>> model, tokenizer = kd.load_student("demo")
    >>> model.num_parameters()
    1149696
    """
    return _loaded(student_request(name, revision=revision, tokenizer=tokenizer, seed=seed))


def student_request(
    name: str, *, revision: str | None = None, tokenizer: str | None = None, seed: int = 0
) -> ModelRequest:
    """What is loaded for a student of this name: `demo` is the embedded teacher's little sister, with random weights."""
    name = "random:demo-student" if name == "demo" else name
    return ModelRequest(name, revision=revision, device="cpu", dtype="float32", tokenizer=tokenizer, seed=seed)


def _loaded(request: ModelRequest) -> tuple[Model, Tokenizer]:
    return load_model(request), load_request_tokenizer(request)
