"""A cache on any web server that serves its folder: `https://…`, `http://…`. It can only be read from.

Ranges are used if the server has them. It may redirect, but to http(s) alone, and never from https to http.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from itertools import pairwise
from urllib.parse import quote

import requests
import urllib3

from kd.cache_builder.share.remotes import PIECE, Remote, Transient
from kd.common.errors import CacheError

TIMEOUT = (10.0, 30.0)
"""Seconds to connect, and between two pieces."""


class WebRemote(Remote):
    """Any web server that serves the cache's directory."""

    def __init__(
        self, url: str, address: Callable[[str], str] | None = None, headers: Mapping[str, str] | None = None
    ) -> None:
        """`address` maps a file's name to its URL, where that is not simply below `url`; `headers` are sent with each request."""
        super().__init__(url)
        base = url.split("?")[0].split("#")[0].rstrip("/")
        self._address = address or (lambda name: f"{base}/{quote(name)}")
        # no compression: it costs the server time, and a small answer could decompress to a huge one
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
                skip = start if response.status_code == 200 else 0  # a server without ranges sends the whole file
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
                "the server refuses access",
                where=where,
                found=f"HTTP {status}",
                try_="hf auth login (hub), ~/.netrc (web)",
            )
        if status == 206 and not response.headers.get("Content-Range", "").startswith(f"bytes {start}-"):
            raise CacheError(
                "the server sent another range than requested",
                where=where,
                found=response.headers.get("Content-Range"),
                expected=f"bytes {start}-…",
            )
        if status not in (200, 206, 416):
            raise CacheError("the server sent an unexpected answer", where=where, found=f"HTTP {status}")
