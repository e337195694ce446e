"""A cache in an object store: `s3://BUCKET/PATH`, through s3fs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from kd.cache_builder.share.remotes import Entry, Remote, Transient
from kd.common.errors import CacheError
from kd.common.extras import needed
from kd.common.files import sha256_of

BLOCK = 8 * 2**20
"""Bytes per request: an object store hands them over all at once."""
CREDENTIALS = "AWS_PROFILE or AWS_ACCESS_KEY_ID; FSSPEC_S3_ANON=true for a public bucket"


class S3Remote(Remote):
    """An S3 object store, through s3fs; endpoint, region and credentials are configured as for every AWS tool.

    These are AWS_ENDPOINT_URL, AWS_PROFILE, AWS_ACCESS_KEY_ID, …, and FSSPEC_S3_ANON=true for a public bucket without a login.
    Every object carries its SHA-256 as metadata, so a second push knows what is there.
    """

    def __init__(self, url: str) -> None:
        super().__init__(url)
        with needed("s3fs", "s3://"):
            import s3fs
        self._root = url.removeprefix("s3://").rstrip("/")
        if not self._root or "//" in self._root:
            raise CacheError("this is not the address of a cache", found=url, expected="s3://BUCKET/PATH")
        once = {"retries": {"max_attempts": 0}}  # the caller retries; three layers of retries would take hours
        self._files = s3fs.S3FileSystem(skip_instance_cache=True, use_listings_cache=False, config_kwargs=once)
        self._files.retries = 1

    @contextmanager
    def _asked(self, name: str) -> Iterator[None]:
        from aiohttp import ClientError as ConnectionCut
        from botocore.exceptions import BotoCoreError, ClientError

        where = f"s3://{self._root}/{name}".rstrip("/")
        try:
            yield
        except FileNotFoundError:
            raise
        except PermissionError as error:
            raise CacheError("the object store refuses", where=where, found=error, try_=CREDENTIALS) from error
        except BotoCoreError as error:
            if "redential" in str(error) or "rofile" in str(error):
                raise CacheError(
                    "no credentials for the object store", where=where, found=error, try_=CREDENTIALS
                ) from error
            raise Transient(f"{type(error).__name__}: {error}") from error
        except (OSError, ClientError, ConnectionCut, TimeoutError) as error:
            raise Transient(f"{type(error).__name__}: {error}") from error

    def read(self, name: str, start: int, stop: int) -> Iterator[bytes]:
        """As `Remote.read`."""
        while start < stop:
            with self._asked(name):
                try:
                    data = self._files.cat_file(f"{self._root}/{name}", start=start, end=min(start + BLOCK, stop))
                except OSError as error:
                    if "InvalidRange" in str(error) or "not satisfiable" in str(
                        error
                    ):  # the object ends before `start`
                        return
                    raise
            if not data:
                return
            yield data[: stop - start]
            if len(data) < min(BLOCK, stop - start):
                return
            start += len(data)

    def prepare(self, *, private: bool = False) -> None:
        """As `Remote.prepare`."""
        with self._asked(""):
            try:
                self._files.ls(self._root.split("/")[0])
            except FileNotFoundError as error:
                raise CacheError("there is no such bucket", where=f"s3://{self._root}", found=error) from error

    def exists(self) -> bool:
        """As `Remote.exists`: what is asked of a missing bucket says so itself."""
        return True

    def held(self, root: Path, entries: Mapping[str, Entry]) -> set[str]:
        """As `Remote.held`: compares the size, and the SHA-256 in the object's metadata."""
        with self._asked(""):
            sizes = {
                key.removeprefix(f"{self._root}/"): info["size"]
                for key, info in self._files.find(self._root, detail=True).items()
            }

        def same(name: str) -> bool:
            with self._asked(name):
                return bool(self._files.metadata(f"{self._root}/{name}").get("sha256") == entries[name]["sha256"])

        alike = [name for name, entry in entries.items() if sizes.get(name) == entry["bytes"]]
        with ThreadPoolExecutor(self.writers) as pool:  # one request each
            return {name for name, answer in zip(alike, pool.map(same, alike), strict=True) if answer}

    def write(self, root: Path, names: Sequence[str]) -> None:
        """As `Remote.write`: an object appears when it is whole."""
        for name in names:
            with self._asked(name):
                digest = sha256_of(root / name)
                self._files.put_file(str(root / name), f"{self._root}/{name}", Metadata={"sha256": digest})
