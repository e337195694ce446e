"""The folder of a build that holds its text in tokens while it runs: one builder fills it, the others wait and read it.

It is hidden and counts as unfinished (`kd.common.files.unfinished`), so it is in no list of a cache's files, and neither pushed nor
verified. The builder that finishes the cache removes it: a finished cache is as large as it always was.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from kd.cache_builder.store.records.manifest import BUILDING, MANIFEST
from kd.cache_builder.store.writers.claims import Claims, all_claims
from kd.cache_builder.tokens.tokenised_text import TokenisedText
from kd.common.errors import KdError
from kd.common.files import TOKENS, write_error
from kd.common.progress import Progress

POLL_SECONDS = 0.5
"""Time between two looks at a pass of another builder."""


def token_folder(out: Path) -> Path:
    """The folder for the tokens of a build, with an absolute path: builders may run in other folders."""
    return out.absolute() / TOKENS


def shared_pass(out: Path, steps: Iterator[Progress[TokenisedText]]) -> Iterator[Progress[TokenisedText]]:
    """The steps of a pass over the text of a build, once no other builder is at it: what that one has made is then there.

    Where the pass is interrupted, its parts stay.
    """
    claims = Claims(token_folder(out))
    try:
        while (other := claims.take(0)) is not None:
            yield Progress(0, 0, note=f"{other} tokenises the text")
            time.sleep(POLL_SECONDS)
        for step in steps:
            claims.touch()
            yield step
    except OSError as error:
        raise write_error(out, error) from error
    finally:
        claims.release_all()


def remove_tokens(out: Path) -> None:
    """Remove the tokens of a build that is finished or was refused, and the folder itself where nothing else is in it."""
    folder = token_folder(out)
    if folder.is_dir():
        shutil.rmtree(folder, ignore_errors=True)
        with suppress(OSError):  # there is a cache in it
            out.rmdir()


@contextmanager
def no_tokens_of_refused(out: Path) -> Iterator[None]:
    """Remove the tokens where what is done here is refused and no cache came of it, unless another builder is at them."""
    try:
        yield
    except KdError:
        held = any(claim.void is None for claim in all_claims(token_folder(out)))
        if not held and not any((out / name).exists() for name in (MANIFEST, BUILDING)):
            remove_tokens(out)
        raise
