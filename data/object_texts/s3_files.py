"""`S3File`: an object of an S3 store that is read as a file, a piece at a time.

    with asked("s3://bucket/texts"): ...        # what the store answers becomes an error of ours
    S3File("bucket/texts/a.jsonl", 1234, '"9f3c…"').open()

Endpoint, region and credentials are those of every AWS tool (AWS_ENDPOINT_URL, AWS_PROFILE, AWS_ACCESS_KEY_ID, …). Pieces grow
from 64 KiB, so that the beginnings of many files cost little, to 8 MiB, so that a large file takes few requests. Each request
names the version that was listed, so an object that is replaced while it is read is an error.
"""

from __future__ import annotations

import io
import os
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import PurePosixPath
from typing import Any, BinaryIO

from kd.common.errors import DataError
from kd.common.extras import needed

SCHEME = "s3://"
FIRST_BYTES, MOST_BYTES = 2**16, 2**23
REPEATS = 4
"""How often botocore makes a request that is refused for a moment. s3fs repeats it a few times more."""
ATTEMPTS = 5
"""How often a piece is asked for whose bytes do not arrive."""
CREDENTIALS = (
    "AWS_PROFILE or AWS_ACCESS_KEY_ID; FSSPEC_S3_ANON=true for a public bucket; AWS_ENDPOINT_URL for another store"
)


def is_store(spec: str) -> bool:
    """Whether a spec names objects of an S3 store."""
    return spec.startswith(SCHEME)


@dataclass(frozen=True)
class S3File:
    """An object with the attributes of a path that readers of files use."""

    key: str
    """BUCKET/KEY"""
    size: int
    """Bytes"""
    etag: str
    """The version that was listed."""

    def __str__(self) -> str:
        return SCHEME + self.key

    @property
    def name(self) -> str:
        """What follows the last slash."""
        return self.key.rpartition("/")[2]

    @property
    def suffix(self) -> str:
        """As of a path."""
        return PurePosixPath(self.name).suffix

    @property
    def suffixes(self) -> list[str]:
        """As of a path."""
        return PurePosixPath(self.name).suffixes

    def open(self) -> BinaryIO:
        """Its bytes. Reading raises DataError where the store does not give them."""
        return io.BufferedReader(_Pieces(self), FIRST_BYTES)

    def piece(self, start: int, stop: int) -> bytes:
        """The bytes from `start` up to `stop`. Raises DataError."""
        if start == 0 and stop <= FIRST_BYTES:
            return _beginning(self)[:stop]
        return _fetched(self, start, stop)


class _Pieces(io.RawIOBase):
    """An object's bytes by pieces, each twice as long as the one before while they are read in order."""

    def __init__(self, file: S3File) -> None:
        self._file, self._at, self._next = file, 0, FIRST_BYTES
        self._start, self._held = 0, b""
        """Where the piece in memory begins, and its bytes."""

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = max(0, offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._file.size}[whence])
        return self._at

    def readinto(self, buffer: Any) -> int:
        wanted = memoryview(buffer).cast("B")
        if self._at >= self._file.size or not len(wanted):
            return 0
        if not self._start <= self._at < self._start + len(self._held):
            self._fetch(len(wanted))
        first = self._at - self._start
        given = self._held[first : first + len(wanted)]
        wanted[: len(given)] = given
        self._at += len(given)
        return len(given)

    def _fetch(self, wanted: int) -> None:
        in_order = self._held and self._at == self._start + len(self._held)
        self._next = min(2 * self._next, MOST_BYTES) if in_order else FIRST_BYTES
        stop = min(self._at + max(self._next, wanted), self._file.size)
        self._held = b""  # not two pieces at once
        self._held, self._start = self._file.piece(self._at, stop), self._at


@lru_cache(maxsize=4)
def _beginning(file: S3File) -> bytes:
    """The first piece, which is read once to see what the file is, and again for its rows."""
    return _fetched(file, 0, min(FIRST_BYTES, file.size))


def _fetched(file: S3File, start: int, stop: int) -> bytes:
    from aiohttp import ClientError as ConnectionCut
    from botocore.exceptions import HTTPClientError
    from fsspec.asyn import sync

    store, (bucket, _, key) = s3_store(), file.key.partition("/")
    for attempt in range(ATTEMPTS):
        with asked(str(file)):
            try:
                words = {"Range": f"bytes={start}-{stop - 1}", "IfMatch": file.etag}
                answer = store.call_s3("get_object", Bucket=bucket, Key=key, **words)
                with closing(answer["Body"]) as body:
                    data = bytes(sync(store.loop, body.read))
            except (ConnectionCut, HTTPClientError, TimeoutError):
                if attempt == ATTEMPTS - 1:
                    raise
                time.sleep(0.1 * 2**attempt)
                continue
        if len(data) == stop - start:
            return data
    raise DataError("the object store gives too few bytes", where=file, found=len(data), expected=stop - start)


def s3_store() -> Any:
    """s3fs's file system for this process and what its environment says now. Raises MissingPackageError."""
    return _store(
        os.getpid(), tuple(sorted(item for item in os.environ.items() if item[0].startswith(("AWS_", "FSSPEC_"))))
    )


@lru_cache(maxsize=1)
def _store(process: int, environment: tuple[tuple[str, str], ...]) -> Any:
    with needed("s3fs", SCHEME):
        import s3fs
    retries = {"retries": {"mode": "standard", "max_attempts": REPEATS}}
    return s3fs.S3FileSystem(skip_instance_cache=True, use_listings_cache=False, config_kwargs=retries)


@contextmanager
def asked(where: str) -> Iterator[None]:
    """Errors of the store as DataError, but for FileNotFoundError where there is no such object.

    where   the address that is asked about
    """
    from aiohttp import ClientError as ConnectionCut
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        yield
    except FileNotFoundError as error:
        if "NoSuchBucket" in repr(error.__cause__):
            bucket = SCHEME + where.removeprefix(SCHEME).partition("/")[0]
            raise DataError("there is no such bucket", where=where, found=bucket) from error
        raise
    except PermissionError as error:
        raise DataError("the object store refuses", where=where, found=error, try_=CREDENTIALS) from error
    except (BotoCoreError, OSError, ClientError, ConnectionCut, TimeoutError) as error:
        raise _refusal(where, error) from error


def _refusal(where: str, error: Exception) -> DataError:
    if "pre-conditions" in str(error) or "PreconditionFailed" in repr(error.__cause__):
        return DataError(
            "the object was replaced while it was read",
            where=where,
            expected="the version that was there when the command began",
            try_="the same command again, when nothing writes there any more",
        )
    if "redential" in str(error) or "config profile" in str(error):
        return DataError("no credentials for the object store", where=where, found=error, try_=CREDENTIALS)
    return DataError(
        "the object store cannot be read", where=where, found=f"{type(error).__name__}: {error}", try_=CREDENTIALS
    )
