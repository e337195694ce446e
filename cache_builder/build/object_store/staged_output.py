"""The folder of this disk through which a build into an object store goes."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from kd.cache_builder.build.object_store.s3_objects import S3Objects
from kd.cache_builder.build.request import BuildRequest
from kd.common.disk.home import kd_home
from kd.common.errors import CacheMismatchError
from kd.common.files import process_tag, sweep, unfinished, write_error


@contextmanager
def staged(request: BuildRequest, *, writes: bool = True) -> Iterator[BuildRequest]:
    """The request with a folder of this process to build in, where its output is in an object store; else as it is.

    writes   whether anything will be put: then a store that cannot keep two builders apart is refused

    The folder is removed at the end: what counts is in the store. Folders of killed builders are removed at the next start.
    """
    if request.url is None:
        yield request
        return
    objects = S3Objects(request.url)
    if writes:
        objects.refuse_unconditional()
    outputs = kd_home() / "outputs" / hashlib.sha256(objects.url.encode()).hexdigest()[:16]
    folder = outputs / f".staging-{process_tag()}"
    try:
        sweep(outputs)
        folder.mkdir(parents=True, exist_ok=True)
        for name in fetched_names(objects):
            data = objects.get(name)
            if data is not None:
                (folder / name).write_bytes(data)
    except OSError as error:
        raise write_error(folder, error) from error
    try:
        yield replace(request, out=folder)
    except CacheMismatchError as error:  # it is about what lies in the store; a full disk is about this folder
        error.details = {name: request.url if value == folder else value for name, value in error.details.items()}
        raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def fetched_names(objects: S3Objects) -> list[str]:
    """The small files that a build continues from: those beside the manifest. The rest is in folders."""
    page = objects.top_names()
    return [name for name in page if not unfinished(name) and Path(name).suffix in (".json", ".parquet")]
