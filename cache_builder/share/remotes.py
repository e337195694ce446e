"""Where caches are shared: one class per kind of place, behind four methods.

    file://…, a path    a directory                                   read, write
    s3://BUCKET/KEY     an object store, through s3fs                 read, write      pip install 'kd-logit-cache[s3]'
    https://, http://   any web server; ranges are used if it has them     read
    hf://datasets/…     the hub, see `hub`                            read, write

A place is not trusted: names are made here, never taken from it; no more bytes are taken than were asked for; whoever
reads compares digests. A web server may redirect, but to http(s) alone, and never from https to http.
"""

from __future__ import annotations

import os
import shutil
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote, urlsplit

import requests
import urllib3

from kd.common.errors import CacheError
from kd.common.extras import needed
from kd.common.files import process_tag, publish, sha256_of, write_error

Entry = Mapping[str, Any]
"""`bytes` and `sha256` of a file, as commits record them."""
PIECE = 2**18
BLOCK = 8 * 2**20
"""Bytes of one request to an object store, which hands them over all at once."""
CREDENTIALS = "AWS_PROFILE or AWS_ACCESS_KEY_ID; FSSPEC_S3_ANON=true for a public bucket"
TIMEOUT = (10.0, 30.0)
"""Seconds to connect, and between two pieces."""


class Transient(Exception):
    """A failure that another try may mend: a cut connection, a server that is too busy."""

    def __init__(self, reason: str, wait: float | None = None) -> None:
        super().__init__(reason)
        self.wait = wait
        """Seconds the server asked for."""


class Remote(ABC):
    """A place that holds (or will hold) the files of one cache, by their paths in it."""

    batch = 1
    """Files that one `write` should be given."""
    writers = 8
    """Writes that may run at once."""

    def __init__(self, url: str) -> None:
        self.url = url

    @abstractmethod
    def read(self, name: str, start: int, stop: int) -> Iterator[bytes]:
        """Bytes `[start, stop)` of a file, in pieces; fewer where it ends before.

        Raises FileNotFoundError, Transient, or CacheError for what no second try will mend.
        """

    def prepare(self) -> None:
        """Make the place ready to be written to. Raises CacheError where it cannot be."""
        raise self._read_only()

    def held(self, root: Path, entries: Mapping[str, Entry]) -> set[str]:
        """Names of those files that are there already, with just these contents; `root` has them too."""
        raise self._read_only()

    def write(self, root: Path, names: Sequence[str]) -> None:
        """Put files of `root` there, each whole or not at all. Raises Transient or CacheError."""
        raise self._read_only()

    def _read_only(self) -> CacheError:
        return CacheError(
            "this place can only be read from",
            where=self.url,
            expected="hf://datasets/OWNER/NAME, s3://BUCKET/PATH or a directory",
        )


class Folder(Remote):
    """A directory of this machine, or one that is mounted."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.root = local_path(url)

    def read(self, name: str, start: int, stop: int) -> Iterator[bytes]:
        """As `Remote.read`."""
        with (self.root / name).open("rb") as file:
            file.seek(start)
            while start < stop and (piece := file.read(min(PIECE, stop - start))):
                start += len(piece)
                yield piece

    def prepare(self) -> None:
        """As `Remote.prepare`."""
        try:
            self.root.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise write_error(self.root, error) from error

    def held(self, root: Path, entries: Mapping[str, Entry]) -> set[str]:
        """As `Remote.held`: size and SHA-256."""
        return {name for name, entry in entries.items() if holds(self.root / name, entry)}

    def write(self, root: Path, names: Sequence[str]) -> None:
        """As `Remote.write`: another name, flush, rename."""
        for name in names:
            staged = self.root / f".staging-{process_tag()}" / name
            try:
                staged.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(root / name, staged)
                publish(staged, self.root / name)
            except OSError as error:
                raise write_error(self.root / name, error) from error

    def close(self) -> None:
        """Remove what was staged."""
        shutil.rmtree(self.root / f".staging-{process_tag()}", ignore_errors=True)


class Web(Remote):
    """Any web server that serves the cache's directory."""

    def __init__(
        self, url: str, address: Callable[[str], str] | None = None, headers: Mapping[str, str] | None = None
    ) -> None:
        """`address` says where a file is, where that is not simply below the URL."""
        super().__init__(url)
        base = url.split("?")[0].split("#")[0].rstrip("/")
        self._address = address or (lambda name: f"{base}/{quote(name)}")
        # as it is stored: no server should spend time on compression, and no reader can be sent a bomb
        self._headers = {**(headers or {}), "Accept-Encoding": "identity"}
        self._local = threading.local()

    def read(self, name: str, start: int, stop: int) -> Iterator[bytes]:
        """As `Remote.read`."""
        headers = self._headers | {"Range": f"bytes={start}-{stop - 1}"}
        try:
            with self._session().get(self._address(name), headers=headers, stream=True, timeout=TIMEOUT) as response:
                self._check(response, name, start)
                if response.status_code == 416:  # the file ends before `start`
                    return
                skip = start if response.status_code == 200 else 0  # a server without ranges sends all of it
                left = stop - start
                for piece in response.raw.stream(PIECE, decode_content=False):
                    kept = piece[skip : skip + left]
                    skip -= min(skip, len(piece))
                    left -= len(kept)
                    if kept:
                        yield kept
                    if not left:
                        return
        except (requests.ConnectionError, requests.Timeout, urllib3.exceptions.HTTPError) as error:
            raise Transient(f"{type(error).__name__}: {error}") from error
        except requests.RequestException as error:  # no such scheme, too many redirects, not an address
            raise CacheError("the address cannot be read", where=self._address(name), found=error) from error

    def _session(self) -> requests.Session:
        if not hasattr(self._local, "session"):
            self._local.session = requests.Session()
        session: requests.Session = self._local.session
        return session

    def _check(self, response: requests.Response, name: str, start: int) -> None:
        where, status = self._address(name), response.status_code
        chain = [*(r.url for r in response.history), response.url]
        if any(a.startswith("https://") and b.startswith("http://") for a, b in pairwise(chain)):
            raise CacheError("the server redirects from https to http", where=where, found=response.url)
        if status in (404, 410):
            raise FileNotFoundError(where)
        if status in (408, 425, 429) or status >= 500:
            after = response.headers.get("Retry-After", "")
            raise Transient(f"HTTP {status}", float(after) if after.isdigit() else None)
        if status in (401, 403):
            raise CacheError(
                "the server refuses to hand this out",
                where=where,
                found=f"HTTP {status}",
                try_="hf auth login (hub), ~/.netrc (web)",
            )
        if status == 206 and not response.headers.get("Content-Range", "").startswith(f"bytes {start}-"):
            raise CacheError(
                "the server sends another range than asked for",
                where=where,
                found=response.headers.get("Content-Range"),
                expected=f"bytes {start}-…",
            )
        if status not in (200, 206, 416):
            raise CacheError("the server's answer is of no use", where=where, found=f"HTTP {status}")


class Bucket(Remote):
    """An S3 object store, through s3fs: endpoint, region and credentials as every AWS tool takes them.

    AWS_ENDPOINT_URL, AWS_PROFILE, AWS_ACCESS_KEY_ID, …, and FSSPEC_S3_ANON=true for a public bucket without a login.
    Every object carries its SHA-256 as metadata: how a push that was cut knows what is there.
    """

    def __init__(self, url: str) -> None:
        super().__init__(url)
        with needed("s3fs", "s3://"):
            import s3fs
        self._root = url.removeprefix("s3://").rstrip("/")
        if not self._root or "//" in self._root:
            raise CacheError("this is not the address of a cache", found=url, expected="s3://BUCKET/PATH")
        once = {"retries": {"max_attempts": 0}}  # whoever calls has patience; three layers of it would take hours
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

    def prepare(self) -> None:
        """As `Remote.prepare`."""
        with self._asked(""):
            try:
                self._files.ls(self._root.split("/")[0])
            except FileNotFoundError as error:
                raise CacheError("there is no such bucket", where=f"s3://{self._root}", found=error) from error

    def held(self, root: Path, entries: Mapping[str, Entry]) -> set[str]:
        """As `Remote.held`: size, and the SHA-256 in the object's metadata."""
        with self._asked(""):
            found = {
                key.removeprefix(f"{self._root}/"): info["size"]
                for key, info in self._files.find(self._root, detail=True).items()
            }

        def same(name: str) -> bool:
            with self._asked(name):
                return bool(self._files.metadata(f"{self._root}/{name}").get("sha256") == entries[name]["sha256"])

        alike = [name for name, entry in entries.items() if found.get(name) == entry["bytes"]]
        with ThreadPoolExecutor(self.writers) as pool:  # one request each
            return {name for name, answer in zip(alike, pool.map(same, alike), strict=True) if answer}

    def write(self, root: Path, names: Sequence[str]) -> None:
        """As `Remote.write`: an object is there when it is whole."""
        for name in names:
            with self._asked(name):
                digest = sha256_of(root / name)
                self._files.put_file(str(root / name), f"{self._root}/{name}", Metadata={"sha256": digest})


def holds(path: Path, entry: Entry) -> bool:
    """Is this file there, with the recorded size and SHA-256?"""
    return path.is_file() and path.stat().st_size == entry["bytes"] and sha256_of(path) == entry["sha256"]


def local_path(place: str | os.PathLike[str]) -> Path:
    """The path that a path or a file:// address names. Raises CacheError for another machine's."""
    text = str(place)
    if not text.startswith("file://"):
        return Path(place)
    parts = urlsplit(text)
    if parts.netloc not in ("", "localhost"):
        raise CacheError("a file:// address names a file of this machine", found=text, expected="file:///PATH")
    return Path(unquote(parts.path))
