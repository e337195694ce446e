"""`S3Objects`: the objects below `s3://BUCKET/PATH`, with the one operation that builders need of a store: put, unless it is there.

Endpoint, region and credentials are configured as for every AWS tool (AWS_ENDPOINT_URL, AWS_PROFILE, AWS_ACCESS_KEY_ID, …).
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any

from kd.common.errors import CacheError
from kd.common.extras import needed
from kd.common.files import sha256_of

AT_ONCE = 8
"""Requests of one builder that run at once."""
CREDENTIALS = "AWS_PROFILE or AWS_ACCESS_KEY_ID; AWS_ENDPOINT_URL for a store that is not Amazon's"
TRIAL = ".trial-"
"""Beginning of the names of objects by which a store is tried; a killed builder may leave one."""


@dataclass(frozen=True)
class StoreEntry:
    """An object as a listing shows it."""

    bytes: int
    put_at: float
    """When it was put, by the store's clock."""


class S3Objects:
    """Objects by their names below one address. Requests that fail for a moment are repeated by botocore."""

    def __init__(self, url: str) -> None:
        """Raises CacheError for an address that names no place for a cache."""
        with needed("s3fs", "s3://"):
            import s3fs
        self.url = url.rstrip("/")
        self.bucket, _, self.prefix = self.url.removeprefix("s3://").partition("/")
        if not self.bucket or not self.prefix or "//" in self.prefix:
            raise CacheError("this is not a place for a cache", found=url, expected="s3://BUCKET/PATH")
        retries = {"retries": {"mode": "standard", "max_attempts": 8}}
        self._files = s3fs.S3FileSystem(skip_instance_cache=True, use_listings_cache=False, config_kwargs=retries)

    def put_first(self, name: str, data: bytes) -> bool:
        """Put an object, unless there is one of that name. Returns whether it was put."""
        with self._asked(name):
            try:
                self._call("put_object", name, Body=data, IfNoneMatch="*")
            except FileExistsError:
                return False
            except OSError as error:
                if "PreconditionFailed" in repr(error.__cause__) or "ConditionalRequestConflict" in repr(
                    error.__cause__
                ):
                    return False
                raise
        return True

    def put(self, name: str, data: bytes) -> None:
        """Put an object in the place of any that is there."""
        with self._asked(name):
            self._call("put_object", name, Body=data)

    def put_file(self, name: str, path: Path) -> None:
        """Put a file, with its SHA-256 as metadata, so that a copy of the cache knows what is there."""
        with self._asked(name):
            self._call("put_object", name, Body=path.read_bytes(), Metadata={"sha256": sha256_of(path)})

    def copy(self, source: str, name: str) -> None:
        """Copy an object within the store. Raises FileNotFoundError where there is none."""
        with self._asked(source):
            self._call("copy_object", name, CopySource={"Bucket": self.bucket, "Key": f"{self.prefix}/{source}"})

    def get(self, name: str) -> bytes | None:
        """The bytes of an object; None where there is none."""
        with self._asked(name):
            try:
                return bytes(self._files.cat_file(f"{self.bucket}/{self.prefix}/{name}"))
            except FileNotFoundError:
                return None

    def age(self, name: str) -> float | None:
        """How many seconds ago an object was put, by the store's own clock; None where there is none."""
        with self._asked(name):
            try:
                head = self._call("head_object", name)
            except FileNotFoundError:
                return None
        now = parsedate_to_datetime(head["ResponseMetadata"]["HTTPHeaders"]["date"])
        return float((now - head["LastModified"]).total_seconds())

    def exists(self, name: str) -> bool:
        """Whether there is an object of that name."""
        with self._asked(name):
            try:
                self._call("head_object", name)
            except FileNotFoundError:
                return False
        return True

    def remove(self, names: Sequence[str]) -> None:
        """Remove objects; those that are gone already are none."""

        def one(name: str) -> None:
            with self._asked(name):
                self._call("delete_object", name)

        self._each(one, names)

    def sizes(self, below: str = "") -> dict[str, int]:
        """Name -> bytes of all objects whose names begin with `below`."""
        return {name: entry.bytes for name, entry in self.entries(below).items()}

    def clock(self, name: str) -> float | None:
        """The time by the store's own clock, asked at an object; None where there is none of that name."""
        with self._asked(name):
            try:
                head = self._call("head_object", name)
            except FileNotFoundError:
                return None
        return parsedate_to_datetime(head["ResponseMetadata"]["HTTPHeaders"]["date"]).timestamp()

    def entries(self, below: str = "") -> dict[str, StoreEntry]:
        """Name -> what a listing says, of all objects whose names begin with `below`."""
        entries: dict[str, StoreEntry] = {}
        more: dict[str, str] = {}
        while True:
            with self._asked(below):
                page = self._files.call_s3(
                    "list_objects_v2", Bucket=self.bucket, Prefix=f"{self.prefix}/{below}", **more
                )
            for entry in page.get("Contents", ()):
                name = entry["Key"].removeprefix(f"{self.prefix}/")
                entries[name] = StoreEntry(entry["Size"], entry["LastModified"].timestamp())
            if not page.get("IsTruncated"):
                return entries
            more = {"ContinuationToken": page["NextContinuationToken"]}

    def top_names(self) -> list[str]:
        """Names of the objects that lie in no folder below the address: at most the first thousand."""
        with self._asked(""):
            page = self._files.call_s3("list_objects_v2", Bucket=self.bucket, Prefix=f"{self.prefix}/", Delimiter="/")
        return [entry["Key"].removeprefix(f"{self.prefix}/") for entry in page.get("Contents", ())]

    def put_files(self, files: Sequence[tuple[str, Path]]) -> None:
        """Put several files at once."""
        self._each(lambda item: self.put_file(*item), files)

    def copy_all(self, pairs: Sequence[tuple[str, str]]) -> None:
        """Copy several objects at once, each from the first name to the second."""
        self._each(lambda pair: self.copy(*pair), pairs)

    def refuse_unconditional(self) -> None:
        """Raise CacheError where the store cannot be written to, or puts an object although there is one of that name.

        It is tried twice, because a builder that finishes the cache removes what trials have left, and may come between.
        """
        if not any(self._keeps_the_first() for _ in range(2)):
            raise CacheError(
                "this store does not keep two builders apart",
                where=self.url,
                found="a write with If-None-Match: * replaced an object that was there",
                expected="a store with conditional writes, as Amazon S3, MinIO and Cloudflare R2 have them",
                try_="build into a folder, then kd cache push",
            )

    def _keeps_the_first(self) -> bool:
        """Whether the first of two objects of one name stays."""
        name = f"{TRIAL}{secrets.token_hex(8)}"
        try:
            return self.put_first(name, b"1") and not self.put_first(name, b"2")
        finally:
            with suppress(CacheError):
                self.remove([name])

    def _call(self, method: str, name: str, **words: Any) -> Any:
        return self._files.call_s3(method, Bucket=self.bucket, Key=f"{self.prefix}/{name}", **words)

    @staticmethod
    def _each(function: Any, items: Sequence[Any]) -> None:
        with ThreadPoolExecutor(AT_ONCE) as pool:
            for _ in pool.map(function, items):
                pass

    @contextmanager
    def _asked(self, name: str) -> Iterator[None]:
        """Errors of the store as errors of ours, but for FileNotFoundError and FileExistsError."""
        from aiohttp import ClientError as ConnectionCut
        from botocore.exceptions import BotoCoreError, ClientError

        where = f"{self.url}/{name}"
        try:
            yield
        except FileNotFoundError as error:
            if "NoSuchBucket" in repr(error.__cause__):
                raise CacheError("there is no such bucket", where=where, found=error) from error
            raise
        except FileExistsError:
            raise
        except PermissionError as error:
            raise CacheError("the object store refuses", where=where, found=error, try_=CREDENTIALS) from error
        except (BotoCoreError, OSError, ClientError, ConnectionCut, TimeoutError) as error:
            raise CacheError(
                "the object store cannot be used",
                where=where,
                found=f"{type(error).__name__}: {error}",
                try_=f"{CREDENTIALS}; then the same command again: it continues",
            ) from error
