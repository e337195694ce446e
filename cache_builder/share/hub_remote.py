"""A cache on the Hugging Face hub: `hf://datasets/OWNER/NAME[@REVISION][/SUB/PATH]`.

Files are written by the hub's own client: uploads are deduplicated and checked by SHA-256, in commits of a few hundred files,
and a second push does not send again what the first has left. They are read from one commit: a branch or tag is resolved when it
is first read, so a push in between cannot mix two caches. Reading uses the hub's download addresses with ranges, not the
client's: a cut file then continues where it stopped, in a folder of ours that stays within its bound.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from kd.cache_builder.share.remotes import Entry, Remote, Transient
from kd.cache_builder.share.web_remote import WebRemote
from kd.cache_builder.store.cache_files import LocalFiles
from kd.common.errors import CacheDamageError, CacheError

ADDRESS = re.compile(r"hf://datasets/([\w.-]+/[\w.-]+)(?:@(refs/[\w-]+/[^/@]+|[^/@]+))?(?:/(.*))?")
BATCH = 200
"""Files per commit. The hub asks for few commits, and one request must list all files of a commit."""


class HubRemote(Remote):
    """A data set repository, or a folder in one."""

    batch = BATCH
    shows_card = True
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
        self._api = HfApi()
        self._web: WebRemote | None = None

    @contextmanager
    def _asked(self) -> Iterator[None]:
        with hub_errors(self.url):
            yield

    def read(self, name: str, start: int, stop: int) -> Iterator[bytes]:
        """As `Remote.read`, from the commit that the revision stood for at the first read."""
        if self._web is None:
            self._web = self._opened()
        yield from self._web.read(name, start, stop)

    def _opened(self) -> WebRemote:
        from huggingface_hub import hf_hub_url
        from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

        with self._asked():
            commit = self._api.dataset_info(self.repo, revision=self.revision).sha

        def address(name: str) -> str:
            return hf_hub_url(
                self.repo, self.folder + name, repo_type="dataset", revision=commit, endpoint=self._api.endpoint
            )

        return WebRemote(self.url, address, build_hf_headers())

    def prepare(self, *, private: bool = False) -> None:
        """As `Remote.prepare`: creates the repository and the branch where there are none."""
        with self._asked():
            self._api.create_repo(self.repo, repo_type="dataset", private=private or None, exist_ok=True)
            if self.revision is not None and not self.revision.startswith("refs/"):
                self._api.create_branch(self.repo, branch=self.revision, repo_type="dataset", exist_ok=True)

    def exists(self) -> bool:
        """As `Remote.exists`: whether the hub has the repository, and its branch."""
        with self._asked():
            if self.revision is not None:
                return self._api.revision_exists(self.repo, self.revision, repo_type="dataset")
            return self._api.repo_exists(self.repo, repo_type="dataset")

    def held(self, root: Path, entries: Mapping[str, Entry]) -> set[str]:
        """As `Remote.held`: compares the SHA-256 of large files and git's own digest of small ones."""
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
            if name in there and there[name].size == entry["bytes"] and _same(there[name], root, name, entry)
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


@contextmanager
def hub_errors(repository: str) -> Iterator[None]:
    """A context for questions to the hub: the client's errors become `CacheError`, and `Transient` where asking again may help."""
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    try:
        yield
    except OfflineModeIsEnabled as error:
        raise CacheError(
            "the hub cannot be reached in offline mode", where=repository, found="HF_HUB_OFFLINE is set"
        ) from error
    except HfHubHTTPError as error:
        status = error.response.status_code
        if status in (408, 429) or status >= 500:
            raise Transient(f"HTTP {status} from the hub") from error
        raise CacheError(
            "the hub refused the request",
            where=repository,
            found=str(error).splitlines()[0],
            try_="the right OWNER/NAME and revision; hf auth login",
        ) from error
    except ValueError as error:
        raise CacheError("the hub's client refused the request", where=repository, found=error) from error
    except (OSError, RuntimeError) as error:
        raise Transient(f"{type(error).__name__}: {error} {error.__cause__ or ''}") from error
    except Exception as error:  # the errors of the client's HTTP library, whichever it uses
        if type(error).__module__.split(".")[0] in ("httpx", "httpx2", "httpcore", "httpcore2"):
            raise Transient(f"{type(error).__name__}: {error}") from error
        raise


def _same(item: Any, root: Path, name: str, entry: Entry) -> bool:
    from huggingface_hub.utils.sha import git_hash

    if item.lfs is not None:
        return bool(item.lfs.sha256 == entry["sha256"])
    try:
        return bool(git_hash(LocalFiles(root).verified_bytes(name, entry)) == item.blob_id)
    except CacheDamageError:  # whoever sends the file says so
        return False
