"""Which objects a spec names: an object, what lies below an address, a glob, or several of them between commas.

    s3://bucket/texts                          every file below the address, in the order of the paths
    's3://bucket/texts/*.jsonl'                what the glob matches; ** stands for any number of folders
    s3://bucket/a.jsonl,s3://bucket/b.jsonl    several, in this order

The rules are those of files on this disk (`kd.data.rows.file_list`), so the same texts have the same ids in either place.
"""

from __future__ import annotations

import glob
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from kd.common.errors import DataError
from kd.data.left_out import LeftOut
from kd.data.object_texts.s3_files import SCHEME, S3File, asked, s3_store

Wanted = Callable[[S3File], bool]
PAGE_KEYS = 1000
"""Keys in one answer of a store, which is the most that there may be."""


@dataclass(frozen=True)
class ListedObjects:
    """What a spec names, in the order in which it is read."""

    files: tuple[S3File, ...]
    named: frozenset[S3File]
    """Objects that the spec names one by one."""
    base: tuple[str, ...]
    """Bucket and folders that the names of the files begin in."""


def list_objects(spec: str, wanted: Wanted, left_out: LeftOut) -> ListedObjects:
    """The objects that a spec names. Raises DataError where an address names nothing, or the store cannot be asked.

    wanted     whether a file is read from a folder, or where a glob matches more than one
    left_out   receives what is there besides
    """
    files: list[S3File] = []
    named: set[S3File] = set()
    bases: list[tuple[str, ...]] = []
    for part in re.split(rf",\s*(?={SCHEME})", spec):
        address = part.strip().removeprefix(SCHEME)
        bucket = address.partition("/")[0]
        if not bucket or glob.has_magic(bucket):
            raise DataError("this address names no bucket", where=spec, found=part, expected=f"{SCHEME}BUCKET/PATH")
        here = _of_address(address, wanted, left_out)
        files += here.files
        named |= here.named
        bases.append(here.base)
    several = len(files) > 1 and glob.has_magic(spec)
    return ListedObjects(tuple(files), frozenset() if several else frozenset(named), _common(bases))


def _of_address(address: str, wanted: Wanted, left_out: LeftOut) -> ListedObjects:
    """What one address names."""
    whole = _object(address)
    if whole is not None:
        return ListedObjects((whole,), frozenset([whole]), _parts(whole)[:-1])
    if glob.has_magic(address):
        return _matched(address, wanted, left_out)
    below = list(_listed(f"{address.rstrip('/')}/"))
    if not below:
        raise DataError(
            "there is no such object, and nothing below this address",
            where=SCHEME + address,
            expected="an object, an address above some, or a glob in quotes that matches one",
            try_="for several, a comma and the whole address of each",
        )
    base = tuple(address.rstrip("/").split("/"))
    return ListedObjects(tuple(_readable(below, len(base), wanted, left_out)), frozenset(), base)


def _matched(address: str, wanted: Wanted, left_out: LeftOut) -> ListedObjects:
    """What a glob matches: objects, and all that is below a folder."""
    pattern = address.split("/")
    literal = re.split(r"[*?[]", address)[0]
    direct: list[S3File] = []
    below: list[tuple[S3File, int]] = []
    for file in _listed(literal):
        parts = _parts(file)
        deep = next((n for n in range(len(parts), 0, -1) if _matches(parts[:n], pattern)), 0)
        if deep == len(parts):
            direct.append(file)
        elif deep:
            below.append((file, deep))
    several = len({_parts(f) for f in direct} | {_parts(f)[:n] for f, n in below}) > 1
    files = [f for f in direct if not several or wanted(f)]
    for file in direct:
        if file not in files:
            left_out.add("other_files", file.name)
    for file, deep in below:
        files += _readable([file], deep, wanted, left_out)
    if not direct and not below:
        raise DataError("no object matches", where=SCHEME + address, expected="a glob that matches one")
    files.sort(key=_parts)
    return ListedObjects(
        tuple(files),
        frozenset(direct),
        _common([*(_parts(f)[:-1] for f in direct), *(_parts(f)[:n] for f, n in below)]),
    )


def _matches(parts: Sequence[str], pattern: Sequence[str]) -> bool:
    """Whether a path matches a glob, as Python's own `glob` says for files: no wildcard stands for a dot in front."""
    if not pattern:
        return not parts
    if pattern[0] == "**":
        deeper = bool(parts) and not parts[0].startswith(".") and _matches(parts[1:], pattern)
        return deeper or _matches(parts, pattern[1:])
    if not parts or (parts[0].startswith(".") and not pattern[0].startswith(".")):
        return False
    return fnmatchcase(parts[0], pattern[0]) and _matches(parts[1:], pattern[1:])


def _readable(files: Sequence[S3File], base: int, wanted: Wanted, left_out: LeftOut) -> Iterator[S3File]:
    """The wanted files below a folder, in the order of their paths. `base` is the number of its parts."""
    for file in sorted(files, key=_parts):
        parts = _parts(file)[base:]
        if any(part.startswith(".") for part in parts):
            left_out.add("hidden_files", "/".join(parts))
        elif not wanted(file):
            left_out.add("other_files", "/".join(parts))
        else:
            yield file


def _parts(file: S3File) -> tuple[str, ...]:
    return tuple(file.key.split("/"))


def _common(bases: Sequence[tuple[str, ...]]) -> tuple[str, ...]:
    """The parts that all paths begin with."""
    shared = 0
    while all(len(base) > shared and base[shared] == bases[0][shared] for base in bases):
        shared += 1
    return bases[0][:shared]


def _object(address: str) -> S3File | None:
    """The object at an address; None where there is none."""
    bucket, _, key = address.partition("/")
    if not key or key.endswith("/"):
        return None
    store = s3_store()
    with asked(SCHEME + address):
        try:
            head = store.call_s3("head_object", Bucket=bucket, Key=key)
        except FileNotFoundError:
            return None
    return S3File(address, int(head["ContentLength"]), str(head["ETag"]))


def _listed(prefix: str) -> Iterator[S3File]:
    """All objects whose addresses begin so, but for the empty ones that stand for folders."""
    bucket, _, key = prefix.partition("/")
    more: dict[str, Any] = {}
    store = s3_store()
    while True:
        with asked(SCHEME + prefix):
            page = store.call_s3("list_objects_v2", Bucket=bucket, Prefix=key, MaxKeys=PAGE_KEYS, **more)
        for entry in page.get("Contents", ()):
            if not entry["Key"].endswith("/"):
                yield S3File(f"{bucket}/{entry['Key']}", int(entry["Size"]), str(entry["ETag"]))
        if not page.get("IsTruncated"):
            return
        more = {"ContinuationToken": page["NextContinuationToken"]}
