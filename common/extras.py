"""Packages that are not part of the base install: which extra brings which, and the error when one is missing.

    with needed("peft", "LoRA"):
        import peft                  # MissingPackageError: LoRA needs peft; pip install 'kd-logit-cache[lora]'

The base install reads, checks and copies caches. `pyproject.toml` declares the extras; a test compares the two.
The command line turns every import that fails for want of an extra into this error (`missing_package`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec

from kd.common.errors import KdError

EXTRAS: dict[str, tuple[str, ...]] = {
    "train": ("torch", "transformers", "accelerate", "safetensors", "datasets", "regex"),
    "eval": ("jinja2", "matplotlib", "rouge_score", "sacrebleu", "bert_score", "simplemma", "nltk"),
    "quantization": ("bitsandbytes", "compressed_tensors"),
    "lora": ("peft",),
    "liger": ("liger_kernel",),
    "triton": ("triton",),
    "s3": ("s3fs", "fsspec", "aiohttp", "botocore"),
    "ray": ("ray",),
    "vllm": ("vllm",),
    "trackers": ("tensorboard", "wandb", "trackio"),
    "harness": ("lm_eval",),
}
"""Extra -> the packages that it adds, by the names they are imported under."""


class MissingPackageError(KdError):
    """A package is not installed; the error names the extra that brings it.

    >>> import kd
    >>> issubclass(kd.MissingPackageError, kd.KdError)
    True
    """

    page = "README.md"


@contextmanager
def needed(package: str, purpose: str, *, where: object = None, instead: str | None = None) -> Iterator[None]:
    """A context for imports of `package`, one of EXTRAS. Raises MissingPackageError when an import fails.

    purpose   what cannot be done without the package, the subject of the error's first line
    where     name of the model or place that needs it; None = no such line
    instead   what else the user can do; None = nothing
    """
    try:
        yield
    except ImportError as error:
        raise _error(package, f"{purpose} needs {package}", error, where=where, instead=instead) from error


def require(extra: str, purpose: str) -> None:
    """Raise MissingPackageError unless every package of `extra` is installed. Imports none of them."""
    for package in EXTRAS[extra]:
        require_package(package, purpose)


def require_package(package: str, purpose: str) -> None:
    """Raise MissingPackageError unless `package`, one of EXTRAS, is installed. Does not import it."""
    if not is_installed(package):
        raise _error(package, f"{purpose} needs {package}")


def missing_package(error: ImportError, user: str = "this command") -> MissingPackageError | None:
    """The error for the user when an import failed for want of an extra; None for every other failed import.

    user   what cannot be used, the subject of the error's first line
    """
    package = (error.name or "").partition(".")[0]
    if not isinstance(error, ModuleNotFoundError) or package not in _EXTRA_OF:
        return None
    return _error(package, f"{user} needs {package}", error)


def _error(
    package: str, headline: str, error: ImportError | None = None, *, where: object = None, instead: str | None = None
) -> MissingPackageError:
    install = f"pip install 'kd-logit-cache[{_EXTRA_OF[package]}]'"
    absent = error is None or isinstance(error, ModuleNotFoundError)
    return MissingPackageError(
        headline,
        where=where,
        found="not installed" if absent else str(error),
        try_=install if instead is None else f"{install}, or {instead}",
    )


def is_installed(package: str) -> bool:
    """Whether a package can be imported; it is not."""
    try:
        return find_spec(package) is not None
    except ValueError:  # the module is there without a spec, or None stands in its place
        return False


_EXTRA_OF = {package: extra for extra, packages in EXTRAS.items() for package in packages}
