"""The one exception tree of `kd`.

    KdError                    any error that a user can cause; the CLI prints it and exits 1
    ├── DataError              text, columns, tokenizer, model files
    │   └── DamagedFilesError  files of a run or a model are not what was written; the CLI exits 3
    ├── CacheError             a directory that is not a cache, a disk that is full, a locked store
    │   ├── CacheMismatchError this cache was made from something else (prints the difference)
    │   ├── CacheDamageError   bytes are not what was committed; the CLI exits 3
    │   └── UnfinishedBuildError  other builders hold shards of this build; the CLI exits 4
    ├── TeacherError           the teacher cannot be loaded, or returned NaN
    └── MissingPackageError    a package of an extra is not installed (`kd.common.extras`)

Every message says where the error is, what was found, what was expected, and what to try.
"""

from __future__ import annotations

from collections.abc import Iterable

from kd.common.shown_text import for_terminal, without_secrets
from kd.common.synonyms import nearest_name


class KdError(Exception):
    """An error for the user: a headline, then lines of `name  value` in the order given. Details that are None are left out.

    It is the base of every error that a user can cause. `exit_code` is what the command line ends with.

    >>> import kd
    >>> try:
    ...     kd.open_cache("nowhere")
    ... except kd.KdError as error:
    ...     print(type(error).__name__, error.exit_code, error.headline, sep=" | ")
    CacheError | 1 | this is not a cache
    """

    exit_code = 1
    page = "docs/errors.md"
    """Page of the documentation that explains errors of this kind."""

    def __init__(self, headline: str, **details: object) -> None:
        self.headline = headline
        self.details = {_label(key): value for key, value in details.items() if value is not None}
        super().__init__(headline)

    def __str__(self) -> str:
        width = max((len(key) for key in self.details), default=0) + 2
        lines = [_shown(self.headline, 2)]
        return "\n".join(lines + [f"  {key:<{width}}{_shown(value, width + 2)}" for key, value in self.details.items()])


def _shown(value: object, indent: int) -> str:
    """A value as text without secrets and control characters; its further lines are indented, so that they pose as no detail."""
    return for_terminal(without_secrets(str(value))).replace("\n", "\n" + " " * indent)


def _label(key: str) -> str:
    """`try_` -> `try`, `did_you_mean` -> `did you mean`; a dotted key (`differs blocks.seq_len`) stays as it is."""
    return key.replace("_", " ").strip() if key.isidentifier() else key


class DataError(KdError):
    """Text, columns, tokenizer, model files or settings are not usable.

    >>> import kd
    >>> issubclass(kd.DataError, kd.KdError)
    True
    """

    page = "docs/cli.md"


class DamagedFilesError(DataError):
    """Files of a run, a checkpoint or a model differ from what was written. The command line ends with exit code 3.

    >>> import kd
    >>> kd.DamagedFilesError.exit_code, issubclass(kd.DamagedFilesError, kd.DataError)
    (3, True)
    """

    page = "docs/reliability.md"
    exit_code = 3


class CacheError(KdError):
    """A cache directory cannot be read or written.

    >>> import kd
    >>> issubclass(kd.CacheMismatchError, kd.CacheError), issubclass(kd.CacheDamageError, kd.CacheError)
    (True, True)
    """

    page = "docs/building.md"


class CacheMismatchError(CacheError):
    """The cache was made from something else than what was asked for.

    >>> import kd
    >>> model, tokenizer = kd.load_teacher("demo")
    >>> try:
    ...     kd.build_cache(model, tokenizer, ["A text that is not in that cache."], out="cache")
    ... except kd.CacheMismatchError as error:
    ...     print(error.headline)
    the directory holds a cache made from something else
    """

    page = "docs/footguns.md"


class CacheDamageError(CacheError):
    """Bytes on disk differ from what was committed. The command line ends with exit code 3.

    >>> import kd
    >>> kd.CacheDamageError.exit_code
    3
    """

    page = "docs/reliability.md"
    exit_code = 3


class UnfinishedBuildError(CacheError):
    """Shards of a build are left that other builders hold. The command line ends with exit code 4.

    >>> import kd
    >>> kd.UnfinishedBuildError.exit_code
    4
    """

    exit_code = 4


class TeacherError(KdError):
    """The teacher cannot be loaded or gives unusable numbers.

    >>> import kd
    >>> try:
    ...     kd.load_teacher("no/such-model")
    ... except kd.TeacherError as error:
    ...     print(error.headline)
    cannot load the model
    """

    page = "docs/models.md"


PARTS = {
    "data": "docs/building.md",
    "data.instruction_tasks": "docs/how-to/flan.md",
    "models": "docs/models.md",
    "cache_builder": "docs/building.md",
    "cache_builder.exchange": "docs/how-to/caches-from-elsewhere.md",
    "cache_builder.look": "docs/how-to/look-into-a-cache.md",
    "cache_builder.served": "docs/how-to/served-teacher.md",
    "cache_builder.share": "docs/sharing.md",
    "student_trainer": "docs/training.md",
    "student_trainer.merging": "docs/merging.md",
    "evaluation": "docs/evaluation.md",
    "evaluation.merged": "docs/merging.md",
    "recipes": "docs/experiments.md",
}
"""Part of kd -> the page of its faults, for the kinds that every part raises: `DataError` and `CacheError`.

No page has an anchor, because the fragments of addresses are not shown."""


def page_of(error: KdError) -> str:
    """The page that explains an error: of its kind, or of the part that raised it where its kind is that of every part."""
    if type(error) not in (DataError, CacheError):
        return error.page
    raised, trace = [], error.__traceback__
    while trace is not None:
        raised.append(str(trace.tb_frame.f_globals.get("__name__", "")).removeprefix("kd."))
        trace = trace.tb_next
    for module in reversed(raised):  # what is raised in `common` is the fault of what called it
        parts = [part for part in PARTS if f"{module}.".startswith(f"{part}.")]
        if parts:
            return PARTS[max(parts, key=len)]
    return error.page


def unknown_name(kind: str, name: str, choices: Iterable[str], **details: object) -> DataError:
    """The error for a name that no registry holds: lists all names and suggests the one that is meant, or the nearest."""
    names = sorted(choices)
    return DataError(
        f"unknown {kind} {name!r}",
        did_you_mean=nearest_name(name, names),
        known=", ".join(names),
        **details,
    )
