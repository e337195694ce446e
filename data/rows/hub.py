"""Load data sets through the `datasets` library: hub ids at one commit, files at an address, and folders that it has saved.

A branch or tag is replaced by its commit before anything is loaded, so that all splits come from one commit, and the
commit that a cache records can be loaded again.
"""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import unquote, urlparse

from kd.common.errors import DataError, unknown_name
from kd.common.extras import needed
from kd.common.strangers.hub_cache import nearest_cached
from kd.common.strangers.web import refuse_private_redirect
from kd.data.rows.compressed import file_type
from kd.data.rows.tables import TABLE_READERS, RowTable, read_table

COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class HubRows:
    """Rows of one split."""

    data: Any
    """The rows, a `datasets.Dataset`, or a `datasets.IterableDataset`."""
    revision: str
    """Commit of the data set on the hub; `main` where it is unknown."""


def load_hub(
    name: str,
    config: str | None,
    revision: str | None,
    split: str,
    files: Mapping[str, Sequence[str]] | None = None,
    *,
    streaming: bool = False,
) -> HubRows:
    """One split of a data set on the hub; scripts are never run. Raises DataError.

    files       split -> paths or globs in the repository, where its own settings do not say which files are which
    streaming   whether rows are fetched when they are read; else the data set is stored on this disk and read from there
    """
    with needed("datasets", "reading a data set of the hub"):
        import datasets

    commit = commit_of(name, revision)
    try:
        given: dict[str, Any] = {"data_files": {key: list(paths) for key, paths in files.items()}} if files else {}
        if streaming:
            given["streaming"] = True
        return HubRows(datasets.load_dataset(name, config, revision=commit, split=split, **given), commit or "main")
    except Exception as error:  # datasets raises a dozen unrelated types; its message is what the user needs
        raise _unreachable(
            "cannot load the data set from the hub",
            f"{name} config {config or 'default'} revision {revision or 'main'} split {split}",
            error,
            "check the id, the split and the network, or give a local file (.jsonl, .parquet, …)",
            nearest_cached("datasets", name),
        ) from error


def stream_hub(name: str, config: str | None, revision: str | None, split: str) -> tuple[Iterator[dict[str, Any]], str]:
    """The rows of one split of a data set on the hub, one after the other, and its commit; nothing is kept. Raises DataError."""
    with needed("datasets", "reading a data set of the hub"):
        import datasets

    commit = commit_of(name, revision)
    where = f"{name} config {config or 'default'} revision {revision or 'main'} split {split}"

    def rows() -> Iterator[dict[str, Any]]:
        try:
            yield from datasets.load_dataset(name, config, revision=commit, split=split, streaming=True)
        except Exception as error:  # as in load_hub
            advice = "check the id, the split and the network, or give a local file (.jsonl, .parquet, …)"
            near = nearest_cached("datasets", name)
            raise _unreachable("cannot load the data set from the hub", where, error, advice, near) from error

    return rows(), commit or "main"


def commit_of(name: str, revision: str | None) -> str | None:
    """The commit that a branch or tag of a hub id points to now; `revision` itself where the hub does not answer."""
    if revision is not None and COMMIT.fullmatch(revision):
        return revision
    from huggingface_hub import HfApi

    try:
        return str(HfApi().dataset_info(name, revision=revision).sha)
    except Exception:  # offline, or no such id: loading then finds the data on this disk or says what failed
        return revision


def is_saved(folder: Path) -> bool:
    """Whether `Dataset.save_to_disk` or `DatasetDict.save_to_disk` has written this folder."""
    return os.path.isfile(folder / "dataset_dict.json") or (
        os.path.isfile(folder / "state.json") and os.path.isfile(folder / "dataset_info.json")
    )


def load_saved(folder: Path, split: str | None) -> Any:
    """A saved data set, or one split of several. `split` None is `train`. Raises DataError."""
    with needed("datasets", "reading a saved data set"):
        import datasets

    try:
        data_set = datasets.load_from_disk(str(folder))
    except Exception as error:  # datasets raises a dozen unrelated types
        raise _unreachable(
            "cannot read the saved data set", str(folder), error, "save it again, or as .parquet files"
        ) from error
    if isinstance(data_set, datasets.DatasetDict):
        if (split or "train") not in data_set:
            raise unknown_name("split", split or "train", list(data_set), where=str(folder))
        return data_set[split or "train"]
    if split not in (None, "train", str(data_set.split)):
        raise DataError(
            "the saved data set has no splits", where=str(folder), found=f"--split {split}", try_="leave --split out"
        )
    return data_set


def is_url(text: str) -> bool:
    """Whether `text` is the address of a file, not a path."""
    return text.startswith(("https://", "http://"))


def load_url(url: str) -> RowTable:
    """The rows of a table file at an address, as `read_table` reads them. Raises DataError; CacheError as `Web`."""
    with needed("datasets", "reading a file at an address"):
        import datasets

    name = PurePosixPath(unquote(urlparse(url).path))
    if file_type(name) not in TABLE_READERS:
        raise DataError(
            "the file at this address has an unknown type",
            where=url,
            found=name.suffix or "no suffix",
            expected=", ".join(TABLE_READERS),
        )
    refuse_private_redirect(url)
    try:
        file = Path(datasets.DownloadManager().download(url))
    except Exception as error:
        advice = "check the network, or download the file and use --task-root DIR"
        raise _unreachable("cannot load the file", url, error, advice) from error
    with tempfile.TemporaryDirectory() as folder:  # the download has a digest for a name
        named = Path(folder) / name.name
        named.symlink_to(file.absolute())
        return replace(read_table(named), file=url)


def _unreachable(what: str, where: str, error: Exception, advice: str, near: str | None = None) -> DataError:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    return DataError(what, where=where, did_you_mean=near, found=f"{type(error).__name__}: {reason}", try_=advice)
