"""A cache on the Hugging Face hub: `hf://datasets/OWNER/NAME[@REVISION][/SUB/PATH]`.

Written by the hub's own client (uploads that are deduplicated and checked by SHA-256, in commits of a few hundred
files; what a cut push left behind is not sent again). Read from one commit: a branch or tag is resolved when it is
opened, so a push in between cannot mix two caches. Files come over the hub's download addresses, with ranges.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from kd.cache_builder.share.remotes import Entry, Remote, Transient, Web
from kd.common.errors import CacheError

ADDRESS = re.compile(r"hf://datasets/([\w.-]+/[\w.-]+)(?:@(refs/[\w-]+/[^/@]+|[^/@]+))?(?:/(.*))?")
BATCH = 200
"""Files per commit: the hub wants few commits, and one request to hold what a commit adds."""


class Hub(Remote):
    """A data set repository, or a folder in one."""

    batch = BATCH
    writers = 1  # a branch takes one commit after another; inside a commit the client uploads in parallel

    def __init__(self, url: str) -> None:
        super().__init__(url)
        match = ADDRESS.fullmatch(url.rstrip("/"))
        if match is None or any(part in ("", ".", "..") for part in (match[3] or "x").split("/")):
            raise CacheError(
                "this is not the address of a cache on the hub",
                found=url,
                expected="hf://datasets/OWNER/NAME[@REVISION][/SUB/PATH]",
            )
        from huggingface_hub import HfApi

        self.repo, self.revision, sub = match[1], unquote(match[2]) if match[2] else None, match[3]
        self.folder = f"{sub}/" if sub else ""
        self.private = False
        """Make a new repository private?"""
        self._api = HfApi()
        self._web: Web | None = None

    @contextmanager
    def _asked(self) -> Iterator[None]:
        """Turn the client's errors into ours."""
        from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

        try:
            yield
        except OfflineModeIsEnabled as error:
            raise CacheError("the hub may not be asked", where=self.url, found="HF_HUB_OFFLINE is set") from error
        except HfHubHTTPError as error:
            status = error.response.status_code
            if status in (408, 429) or status >= 500:
                raise Transient(f"HTTP {status} from the hub") from error
            raise CacheError(
                "the hub refuses",
                where=self.url,
                found=str(error).splitlines()[0],
                try_="the right OWNER/NAME and revision; hf auth login",
            ) from error
        except ValueError as error:
            raise CacheError("the hub's client refuses", where=self.url, found=error) from error
        except (OSError, RuntimeError) as error:
            raise Transient(f"{type(error).__name__}: {error} {error.__cause__ or ''}") from error
        except Exception as error:  # the client's HTTP library is its own affair
            if type(error).__module__.split(".")[0] in ("httpx", "httpx2", "httpcore", "httpcore2"):
                raise Transient(f"{type(error).__name__}: {error}") from error
            raise

    def read(self, name: str, start: int, stop: int) -> Iterator[bytes]:
        """As `Remote.read`, from the commit the revision stood for when it was first asked."""
        if self._web is None:
            self._web = self._opened()
        yield from self._web.read(name, start, stop)

    def _opened(self) -> Web:
        from huggingface_hub import hf_hub_url
        from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

        with self._asked():
            commit = self._api.dataset_info(self.repo, revision=self.revision).sha

        def address(name: str) -> str:
            return hf_hub_url(
                self.repo, self.folder + name, repo_type="dataset", revision=commit, endpoint=self._api.endpoint
            )

        return Web(self.url, address, build_hf_headers())

    def prepare(self) -> None:
        """As `Remote.prepare`: the repository and the branch are made where there are none."""
        with self._asked():
            self._api.create_repo(self.repo, repo_type="dataset", private=self.private or None, exist_ok=True)
            if self.revision is not None and not self.revision.startswith("refs/"):
                self._api.create_branch(self.repo, branch=self.revision, repo_type="dataset", exist_ok=True)

    def held(self, root: Path, entries: Mapping[str, Entry]) -> set[str]:
        """As `Remote.held`: the SHA-256 of a large file, git's own digest of a small one."""
        there: dict[str, Any] = {}
        with self._asked():
            for item in self._api.list_repo_tree(
                self.repo, recursive=True, revision=self.revision, repo_type="dataset"
            ):
                if hasattr(item, "blob_id") and item.path.startswith(self.folder):
                    there[item.path.removeprefix(self.folder)] = item
        return {
            name
            for name, entry in entries.items()
            if name in there and there[name].size == entry["bytes"] and _same(there[name], root / name, entry)
        }

    def write(self, root: Path, names: Sequence[str]) -> None:
        """As `Remote.write`, in one commit."""
        from huggingface_hub import CommitOperationAdd

        adds = [CommitOperationAdd(path_in_repo=self.folder + n, path_or_fileobj=str(root / n)) for n in names]
        message = f"Add {names[0]}" + (f" and {len(names) - 1} more files" if len(names) > 1 else "")
        with self._asked():
            self._api.create_commit(
                self.repo, adds, commit_message=message, repo_type="dataset", revision=self.revision
            )


def _same(item: Any, path: Path, entry: Entry) -> bool:
    if item.lfs is not None:
        return bool(item.lfs.sha256 == entry["sha256"])
    data = path.read_bytes()
    return bool(hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest() == item.blob_id)
