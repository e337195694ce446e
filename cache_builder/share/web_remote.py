"""A cache on any web server that serves its folder: `https://…`, `http://…`. It can only be read from.

Ranges are used if the server has them. It may redirect, but to http(s) alone, never from https to http, and never from the open
network into a private one. A transfer below a stated speed ends (`kd.common.strangers.web`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from urllib.parse import quote

import requests
import urllib3

from kd.cache_builder.share.remotes import PIECE, Remote, Transient
from kd.common.errors import CacheError
from kd.common.strangers.watched_connections import TooSlow
from kd.common.strangers.web import Web, WebAnswer


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
        self._web = Web()

    def read(self, name: str, start: int, stop: int) -> Iterator[bytes]:
        """As `Remote.read`."""
        headers = self._headers | {"Range": f"bytes={start}-{stop - 1}"}
        try:
            with self._web.get(self._address(name), headers) as answer:
                self._check(answer, name, start)
                if answer.status == 416:  # the file ends before `start`
                    return
                skip = start if answer.status == 200 else 0  # a server without ranges sends the whole file
                left = stop - start
                for piece in answer.pieces(PIECE):
                    kept = piece[skip : skip + left]
                    skip -= min(skip, len(piece))
                    left -= len(kept)
                    if kept:
                        yield kept
                    if not left:
                        return
        except TooSlow as error:
            raise Transient(str(error), slow=True) from error
        except (requests.ConnectionError, requests.Timeout, urllib3.exceptions.HTTPError) as error:
            raise Transient(f"{type(error).__name__}: {error}") from error
        except (requests.RequestException, ValueError) as error:  # no such scheme, too many redirects, not an address
            raise CacheError("the address cannot be read", where=self._address(name), found=error) from error

    def _check(self, answer: WebAnswer, name: str, start: int) -> None:
        where, status = self._address(name), answer.status
        if status in (404, 410):
            raise FileNotFoundError(where)
        if status in (408, 425, 429) or status >= 500:
            after = answer.headers.get("Retry-After", "")
            raise Transient(f"HTTP {status}", float(after) if re.fullmatch("[0-9]{1,6}", after) else None)
        if status in (401, 403):
            raise CacheError(
                "the server refuses access",
                where=where,
                found=f"HTTP {status}",
                try_="hf auth login (hub), ~/.netrc (web)",
            )
        if status == 206 and not answer.headers.get("Content-Range", "").startswith(f"bytes {start}-"):
            raise CacheError(
                "the server sent another range than requested",
                where=where,
                found=answer.headers.get("Content-Range"),
                expected=f"bytes {start}-…",
            )
        if status not in (200, 206, 416):
            raise CacheError("the server sent an unexpected answer", where=where, found=f"HTTP {status}")
