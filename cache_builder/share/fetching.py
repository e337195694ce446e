"""Fetch files from a remote: within bounds, resumed, retried, verified on arrival, several at once.

A file is appended to under a staging name; each attempt continues where the last one stopped. It counts as fetched only when
size and SHA-256 are the recorded ones. Wrong bytes from two whole attempts are reported as damage.
"""

from __future__ import annotations

import hashlib
import random
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from itertools import islice
from pathlib import Path

from kd.cache_builder.share.remotes import Entry, Remote, Transient
from kd.common.errors import CacheDamageError, CacheError
from kd.common.files import sha256_of, write_error

ATTEMPTS = 6
"""Failures in a row without progress before giving up: about a minute, and ten where each takes its full time."""
ENOUGH = 2**16
"""Least bytes of an attempt that count as progress: a server that sends one byte at a time ends too."""
BACKOFF = 1.0
"""Seconds before the second attempt. It doubles each time, up to MAX_WAIT, and a random part of up to a half is added."""
MAX_WAIT = 30.0
"""Most seconds between two attempts."""


class Stopped(Exception):
    """The transfer was stopped."""


class Patience:
    """Counts the failures of one transfer, and waits between attempts."""

    def __init__(self, remote: Remote, name: str, stop: threading.Event | None = None) -> None:
        self.remote, self.name = remote, name
        self.stop = stop or threading.Event()
        self.failures = 0

    def after(self, error: Transient, progress: bool) -> None:
        """Wait before the next attempt. Raises CacheError after too many failures, Stopped when the transfer is stopped."""
        self.failures = 1 if progress and not error.slow else self.failures + 1
        if self.failures >= ATTEMPTS:
            raise CacheError(
                "the connection failed again and again",
                where=self.remote.url,
                file=self.name,
                found=error,
                try_="the same command again: it continues",
            ) from error
        pause = BACKOFF * 2 ** (self.failures - 1) * random.uniform(1.0, 1.5)
        if self.stop.wait(min(max(pause, error.wait or 0.0), MAX_WAIT)):
            raise Stopped


def fetch(
    remote: Remote,
    name: str,
    staged: Path,
    entry: Entry,
    *,
    stop: threading.Event | None = None,
    arrived: Callable[[int], None] = lambda n: None,
) -> None:
    """Fetch a file to `staged`, where the beginning of it may lie already.

    entry     recorded size and SHA-256
    stop      set to end the transfer
    arrived   called with the number of bytes that have arrived; a negative number takes wrong bytes back

    Raises CacheDamageError for a file that is missing or wrong at the remote, CacheError when the network or the disk fails.
    """
    patience, size = Patience(remote, name, stop), int(entry["bytes"])
    wrong, resumed = 0, staged.exists()
    staged.parent.mkdir(parents=True, exist_ok=True)
    while True:
        before = have = staged.stat().st_size if staged.exists() else 0
        try:
            if have < size:
                have = _append(remote, name, staged, have, size, patience.stop, arrived)
        except Transient as error:
            patience.after(error, staged.stat().st_size - before >= ENOUGH)
            continue
        except FileNotFoundError as error:
            raise CacheDamageError("a file is missing from the cache", where=remote.url, file=name) from error
        if have == size and sha256_of(staged) == entry["sha256"]:
            return
        if size > have > before:  # it ended early without an error, as a cut connection does
            patience.after(Transient(f"the answer ended after {have - before} bytes"), have - before >= ENOUGH)
            continue
        staged.unlink()
        arrived(-have)
        wrong += not resumed
        resumed = False
        if wrong == 2:
            short = f"{have} bytes" if have != size else "another SHA-256, twice"
            raise CacheDamageError(
                "a file arrived with other bytes than committed",
                where=remote.url,
                file=name,
                found=short,
                expected=f"{size} bytes, SHA-256 {entry['sha256'][:16]}…",
                try_="another copy of the cache",
            )


def _append(
    remote: Remote, name: str, staged: Path, have: int, size: int, stop: threading.Event, arrived: Callable[[int], None]
) -> int:
    """Append the missing bytes; returns the new size. An OSError while writing is the disk's, and becomes a CacheError."""
    pieces = remote.read(name, have, size)
    with staged.open("ab") as file:
        for piece in pieces:
            try:
                file.write(piece)
            except OSError as error:
                raise write_error(staged, error) from error
            have += len(piece)
            arrived(len(piece))
            if stop.is_set():
                raise Stopped
    return have


def fetch_small(
    remote: Remote, name: str, limit: int, *, sha256: str | None = None, stop: threading.Event | None = None
) -> bytes:
    """The bytes of a small file of unknown size, at most `limit`. Raises FileNotFoundError, CacheDamageError, CacheError."""
    patience, wrong = Patience(remote, name, stop), 0
    while True:
        try:
            data = b"".join(remote.read(name, 0, limit + 1))
        except Transient as error:
            patience.after(error, progress=False)
            continue
        if len(data) > limit:
            raise CacheDamageError(
                "a file of the cache is too large", where=remote.url, file=name, expected=f"at most {limit} bytes"
            )
        if sha256 is None or hashlib.sha256(data).hexdigest() == sha256:
            return data
        wrong += 1
        if wrong == 2:
            raise CacheDamageError(
                "a file arrived with other bytes than committed",
                where=remote.url,
                file=name,
                found="another SHA-256, twice",
                expected=f"SHA-256 {sha256[:16]}…",
                try_="another copy of the cache",
            )


def persist(action: Callable[[], None], remote: Remote, name: str, stop: threading.Event) -> None:
    """Run an action on a remote, and run it again after a failure that may pass."""
    patience = Patience(remote, name, stop)
    while True:
        try:
            return action()
        except Transient as error:
            patience.after(error, progress=False)


def in_parallel(jobs: Iterable[Callable[[], None]], workers: int, stop: threading.Event) -> Iterator[None]:
    """Run jobs on threads; yields a few times a second, and at the end. The first error stops the others and is raised.

    Jobs are taken from the iterable as they are needed: a cache may have hundreds of thousands of files.
    """
    waiting = iter(jobs)
    pending: set[Future[None]] = set()
    pool = ThreadPoolExecutor(workers, thread_name_prefix="kd-transfer")
    shown = time.monotonic()
    try:
        while True:
            pending |= {pool.submit(job) for job in islice(waiting, 2 * workers - len(pending))}
            if not pending:
                break
            done, pending = wait(pending, timeout=0.2, return_when=FIRST_COMPLETED)
            for future in done:
                future.result()
            if time.monotonic() - shown > 0.2:
                shown = time.monotonic()
                yield
    finally:
        if pending:
            stop.set()
        pool.shutdown(wait=True, cancel_futures=True)
    yield
