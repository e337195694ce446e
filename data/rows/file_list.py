"""Which files a spec names: a file, a folder, a glob, or several of them between commas.

    texts                      every file of the folder and of the folders in it, in the order of the paths
    'texts/*.jsonl'            what the glob matches; ** stands for any number of folders
    a.jsonl,b.jsonl.gz         several files, folders or globs, in this order
    s3://bucket/texts          the same in an S3 store (kd.data.object_texts.s3_list)

Hidden files and folders (`.ipynb_checkpoints`, `._notes.txt`) are not text that somebody put there, and links to folders may lead
in a circle. Both are passed over, as are files of other types, and all of them are counted. A file that lies there twice, plain and
compressed, is an error, because one of the two is a copy.
"""

from __future__ import annotations

import difflib
import glob
import os
import re
from collections.abc import Collection, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePath, PurePosixPath

from kd.common.errors import DataError
from kd.common.paths import as_path
from kd.data.left_out import LeftOut
from kd.data.object_texts.s3_files import SCHEME, S3File, is_store
from kd.data.object_texts.s3_list import list_objects
from kd.data.rows.compressed import COMPRESSIONS, TextFile, file_type


@dataclass(frozen=True)
class FileList:
    """Files in the order in which they are read."""

    spec: str
    files: tuple[TextFile, ...]
    asked_for: frozenset[TextFile]
    """Files that the spec names one by one; a fault in one of these is always an error."""
    base: PurePath
    """The folder that the names of the files begin in."""

    def name(self, file: TextFile) -> str:
        """The file's path in the base folder, which the ids of its examples begin with."""
        if isinstance(file, S3File):
            return file.key.removeprefix(f"{self.base}/")
        return Path(os.path.abspath(file)).relative_to(self.base).as_posix()


def list_files(spec: str, types: Collection[str], left_out: LeftOut) -> FileList | None:
    """The files that a spec names, with those of folders in the order of their paths. None where it names nothing on this disk
    or in a store.

    types      types of files that are read from a folder, or where a glob matches more than one
    left_out   receives what is there besides

    Raises DataError where some of several are there and others are not, a glob matches nothing, nothing can be read, or a file
    would be read twice.
    """
    if is_store(spec):
        listed = list_objects(spec, lambda file: file_type(file) in types, left_out)
        return _checked(FileList(spec, listed.files, listed.named, PurePosixPath(*listed.base)), types, left_out)
    paths = _paths(spec)
    if paths is None:
        return None
    several = len(paths) > 1 and glob.has_magic(spec)
    files: list[TextFile] = []
    for path in paths:
        if os.path.isdir(path):
            files += _files_in(path, types, left_out)
        elif several and file_type(path) not in types:
            left_out.add("other_files", path.name)
        else:
            files.append(path)
    asked_for: frozenset[TextFile] = frozenset() if several else frozenset(paths)
    return _checked(FileList(spec, tuple(files), asked_for, _base(paths)), types, left_out)


def _checked(listed: FileList, types: Collection[str], left_out: LeftOut) -> FileList:
    """The list. Raises DataError where it is empty, or names a file twice."""
    if not listed.files:
        raise DataError(
            "no readable files in the folder",
            where=listed.spec,
            found=f"left out: {left_out}",
            expected=", ".join(types) + f", also with {' or '.join(COMPRESSIONS)} after it",
        )
    _refuse_twice(listed.spec, listed.files)
    return listed


def refuse_address(spec: str) -> None:
    """Raise DataError for a text that lies at an address of another kind than `s3://`, such as `https://host/text.jsonl`."""
    kind, sign, rest = spec.partition("://")
    if sign and f"{kind}{sign}" != SCHEME:
        raise DataError(
            "text is read from this disk, from the hub or from an S3 store, not from this address",
            where=f"{kind}://{rest.rpartition('@')[2].partition('?')[0]}",  # neither user and password nor a signature
            expected="a file, a folder, a glob, s3://BUCKET/PATH, or a hub id like owner/name",
            try_="download the text first, or name the address in a task file under files",
        )


def no_such_path(spec: str, expected: str) -> DataError:
    """The error for a path at which nothing is; it names what lies there under nearly the same name."""
    meant, path = None, as_path(spec)
    if spec.startswith("s3:"):
        meant = SCHEME + spec.removeprefix("s3:").lstrip("/")
    elif not glob.has_magic(spec):
        with suppress(OSError):
            beside = [entry.name for entry in os.scandir(path.parent) if not entry.name.startswith(".")]
            close = difflib.get_close_matches(path.name, sorted(beside), n=1, cutoff=0.8)
            meant = str(path.parent / close[0]) if close else None
    return DataError("no such file or folder", where=spec, did_you_mean=meant, expected=expected)


def refuse_split(files: FileList, split: str, names: Collection[str]) -> None:
    """Raise DataError for a split that the files' names do not tell: all of it would be read, and dev would be train.

    names   names of the split
    """
    words_of = {f: re.findall(r"[a-z]+", f"{files.spec} {files.name(f)}".lower()) for f in files.files}
    of_others = [f for f in files.files if not {*names} & {*words_of[f]}]
    if split != "train" and of_others:
        raise DataError(
            "files have no splits",
            where=files.spec,
            found=f"--split {split}, and {files.name(of_others[0])} would be read whole",
            expected=f"files with {' or '.join(names)} in their names",
            try_="the files of this split as --data, without --split",
        )


def _paths(spec: str) -> list[Path] | None:
    """The files and folders that a spec names, globs expanded; None where it names none."""
    path = as_path(spec)
    if os.path.exists(path):
        return [path]
    if "://" in spec or not ("," in spec or glob.has_magic(spec)):
        return None
    parts = _between_commas(spec)
    if not any(glob.has_magic(part) or os.path.exists(as_path(part)) for part in parts):
        return None
    return [path for part in parts for path in _matched(part)]


def _between_commas(spec: str) -> list[str]:
    """The parts of a spec. A comma that belongs to the name of a file that exists does not separate."""
    parts: list[str] = []
    rest = spec.split(",")
    while rest:
        whole = next((n for n in range(len(rest), 1, -1) if os.path.exists(as_path(",".join(rest[:n])))), 1)
        parts.append(",".join(rest[:whole]).strip())
        rest = rest[whole:]
    return [part for part in parts if part]


def _matched(part: str) -> list[Path]:
    """What a glob matches, in the order of the paths; the path itself where it is none."""
    path = as_path(part)
    if os.path.exists(path) or not glob.has_magic(part):
        paths = [path] if os.path.exists(path) else []
    else:
        paths = sorted(map(Path, glob.glob(str(path), recursive=True)))
    if not paths:
        raise no_such_path(part, "a path, or a glob that matches one")
    return paths


def _base(paths: Sequence[Path]) -> Path:
    """The folder of one path, or the folder that all of them are in."""
    return Path(os.path.commonpath([os.path.abspath(path if os.path.isdir(path) else path.parent) for path in paths]))


def _files_in(folder: Path, types: Collection[str], left_out: LeftOut) -> list[Path]:
    """Files of the given types in a folder and below it, in the order of their paths."""
    paths = []
    for path in _walk(folder, left_out):
        name = path.relative_to(folder).as_posix()
        if path.name.startswith("."):
            left_out.add("hidden_files", name)
        elif file_type(path) not in types or (os.path.exists(path) and not os.path.isfile(path)):
            left_out.add("other_files", name)
        else:
            paths.append(path)
    return sorted(paths)


def _walk(folder: Path, left_out: LeftOut) -> Iterator[Path]:
    """Every file below a folder, and every hidden folder, which is not entered. Raises DataError for one that cannot be read."""

    def unreadable(error: OSError) -> None:
        raise DataError("cannot read a folder", where=error.filename, found=error.strerror) from error

    for root, folders, files in os.walk(folder, onerror=unreadable):
        here = Path(root)
        folders.sort()
        linked = [name for name in folders if (here / name).is_symlink() and not name.startswith(".")]
        for name in linked:
            left_out.add("linked_folders", (here / name).relative_to(folder).as_posix())
        yield from (here / name for name in folders if name.startswith("."))
        folders[:] = [name for name in folders if not name.startswith(".") and name not in linked]
        yield from (here / name for name in sorted(files))


def _refuse_twice(spec: str, files: Sequence[TextFile]) -> None:
    """Raise DataError for a file that is named twice, or lies there plain and compressed."""
    seen: dict[str, TextFile] = {}
    for file in files:
        whole = os.path.abspath(file) if isinstance(file, Path) else file.key
        plain = whole.removesuffix(file.suffix) if file.suffix.lower() in COMPRESSIONS else whole
        if plain in seen:
            raise DataError(
                "a file is read twice",
                where=spec,
                found=f"{seen[plain]} and {file}",
                expected="each text once",
                try_="remove one of the two, or name the files to read",
            )
        seen[plain] = file
