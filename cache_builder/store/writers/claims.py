"""Claims: which builder works on which shard. Any number of builders share one directory; a dead one's claim is taken over.

A builder claims a shard with the file `commits/.00003.claim`, created once (hard link), which names host and process. It keeps the
file locked, and while it works it writes there how many rows it has scored. A claim is void

- when nobody holds its lock, on the machine it was made on: its builder has ended, be it in another container;
- when its process is dead, on this host, where the file system has no locks;
- when nothing touched it for `STALE_SECONDS`, or it is that far in the future, on any host;
- when it is empty.

A lock alone would not do: it does not say who holds it, and not every shared file system keeps locks across hosts. Claims only
save work: if two builders make one shard all the same, the first whole one stays (`shard_publishing`).
"""

from __future__ import annotations

import os
import time
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path

from kd.common.files import holder, made_here, process_tag, publish_first
from kd.common.processes import is_free, lock_of
from kd.common.strangers.plain_files import NotPlainError, read_plain

STALE_SECONDS = 15 * 60
"""A builder touches its claims with every batch. After this time without a touch it counts as dead."""
TOUCH_SECONDS = 5.0
"""Least time between two touches."""
LOCKED, UNLOCKED = "locked", "unlocked"
"""Second line of a claim: whether its builder keeps it locked. The lines after it are `builder NAME`, `since SECONDS`, `rows N`."""
ROWS_DIGITS = 12
"""The number of rows has a fixed width: it is written over in place, so that no reader finds an empty claim."""
ENDED = "its builder has ended"
MAX_CLAIM_BYTES = 4096
"""Most bytes of a claim; a larger file is void."""
_BUILDERS = count()


@dataclass(frozen=True)
class Claim:
    """A claim that somebody has made, and whether it still counts."""

    shard: int
    builder: str
    """The builder, in words."""
    idle_seconds: float
    """Time since the claim was touched; negative where its time lies in the future."""
    void: str | None
    """Why the claim is void, in words; None where a builder holds it."""
    rows: int = 0
    """Rows of the shard that the builder had scored when it touched the claim."""
    since: float | None = None
    """When the claim was made, in seconds since 1970 by the builder's clock; None where the claim does not say."""
    name: str = ""
    """The builder's name among several that were started together; empty for one that was started alone."""


class Claims:
    """The claims of one builder on the shards of one cache."""

    def __init__(self, root: Path, name: str = "") -> None:
        self.folder = root / "commits"
        self.name = name
        self.tag = f"{process_tag()}.{next(_BUILDERS)}"
        self._held: dict[int, int] = {}
        """Shard -> descriptor of the claim, which keeps it locked where the file system has locks."""
        self._touched = 0.0

    def take(self, index: int) -> str | None:
        """Claim shard `index`. Returns None when the claim is ours now, else who holds it, in words."""
        path = claim_path(self.folder, index)
        self.folder.mkdir(parents=True, exist_ok=True)
        for _ in range(2):
            staged = path.with_name(f"{path.name}.{self.tag}.tmp")
            try:
                if self._published(staged, path, index):
                    return None
            finally:
                staged.unlink(missing_ok=True)
            other = read_claim(path, clock_of(self.folder))
            if other is not None and other.void is None:
                return other.builder
            if other is not None:
                path.unlink(missing_ok=True)
        return "another builder, just now"

    def _published(self, staged: Path, path: Path, index: int) -> bool:
        staged.write_text(self.tag, encoding="utf-8")
        lock = lock_of(staged)  # before the claim can be seen
        staged.write_text(claim_text(self.tag, self.name, time.time(), locked=lock is not None), encoding="utf-8")
        handle = os.open(staged, os.O_RDWR | os.O_CLOEXEC) if lock is None else lock
        if publish_first(staged, path):
            self._held[index] = handle
            return True
        os.close(handle)
        return False

    def holds(self, index: int) -> bool:
        """Whether the claim on shard `index` is still ours; another builder may have taken it over."""
        return index in self._held and _first_line(claim_path(self.folder, index)) == self.tag

    def touch(self, index: int | None = None, rows: int = 0) -> None:
        """Show that this builder is alive: touch its claims, at most every `TOUCH_SECONDS`.

        index, rows   the shard that is being scored, and how many of its rows are
        """
        if time.monotonic() - self._touched > TOUCH_SECONDS:
            self._touched = time.monotonic()
            for held in list(self._held):
                if self.holds(held):
                    with suppress(FileNotFoundError):  # another builder took it over just now
                        os.utime(claim_path(self.folder, held))
                        if held == index:
                            self._write_rows(held, rows)

    def _write_rows(self, index: int, rows: int) -> None:
        """Write the number of rows over the one that our claim has, even where its name is another builder's claim by now."""
        line = _rows_line(rows).encode()
        os.pwrite(self._held[index], line, os.fstat(self._held[index]).st_size - len(line))

    def release(self, index: int) -> None:
        """Give up the claim on a shard, committed or not."""
        if index not in self._held:
            return
        if self.holds(index):
            claim_path(self.folder, index).unlink(missing_ok=True)
        os.close(self._held.pop(index))

    def release_all(self) -> None:
        """Give up all claims."""
        for index in list(self._held):
            self.release(index)


def claim_path(folder: Path, index: int) -> Path:
    """Path of the claim on shard `index`, in the folder of the commits."""
    return folder / f".{index:05d}.claim"


def clock_of(folder: Path) -> float:
    """The time now by the clock that dates a folder's files: of a shared folder that is another machine's."""
    path = folder / f".clock.claim.{process_tag()}.tmp"
    try:
        path.touch()
        now = path.stat().st_mtime
        path.unlink()
    except OSError:  # it may not be written; then nobody builds there
        return time.time()
    return now


def read_claim(path: Path, now: float) -> Claim | None:
    """What a claim says, and whether it still counts at the time `now`. None where there is none."""
    try:
        idle = now - path.lstat().st_mtime
        lines = read_plain(path, MAX_CLAIM_BYTES).decode(errors="replace").splitlines()
    except FileNotFoundError:
        if not path.is_symlink():
            return None
        lines, problem = [], "a link that leads nowhere"
    except NotPlainError as error:  # a stranger's pipe or device
        lines, problem = [], str(error.strerror)
    else:
        problem = "empty"
    shard = int(path.name.strip(".").partition(".")[0])
    claim = claim_of_text(shard, "\n".join(lines), idle, problem)
    tag = lines[0].rpartition(".")[0] if lines else ""
    if claim.void is None and LOCKED in lines and made_here(tag) and is_free(path):
        return replace(claim, void=ENDED)
    return claim


def claim_text(tag: str, name: str, since: float, rows: int = 0, *, locked: bool = False) -> str:
    """The text of a claim."""
    head = (tag, LOCKED if locked else UNLOCKED, f"builder {name}", f"since {since:.0f}")
    return "\n".join([*head, _rows_line(rows)])


def claim_of_text(shard: int, text: str, idle: float, problem: str = "empty") -> Claim:
    """What the text of a claim says. `idle`: seconds since it was touched; `problem`: what is wrong with a claim without text."""
    lines = text.splitlines()
    tag, details = lines[0] if lines else "", dict(line.partition(" ")[::2] for line in lines[2:])
    alive, builder = holder(tag.rpartition(".")[0])
    void = None
    if not tag:
        builder, void = "nobody", f"the claim is {problem}"
    elif idle > STALE_SECONDS:
        void = f"not touched for {idle:,.0f} seconds"
    elif idle < -STALE_SECONDS:
        void = f"its time is {-idle:,.0f} seconds in the future"
    elif alive is False:
        void = ENDED
    rows, since = details.get("rows", ""), details.get("since", "")
    return Claim(
        shard,
        builder,
        idle,
        void,
        int(rows) if rows.isdecimal() else 0,
        float(since) if since.isdecimal() else None,
        details.get("builder", ""),
    )


def all_claims(root: Path) -> list[Claim]:
    """The claims on a cache's shards, by shard."""
    paths = sorted(p for p in (root / "commits").glob(".*.claim") if p.name.strip(".").partition(".")[0].isdigit())
    now = clock_of(root / "commits") if paths else 0.0
    return [claim for path in paths if (claim := read_claim(path, now)) is not None]


def void_claims(root: Path) -> None:
    """Remove the claims that are void."""
    for claim in all_claims(root):
        if claim.void is not None:
            claim_path(root / "commits", claim.shard).unlink(missing_ok=True)


def release_claims_of(root: Path, name: str) -> list[int]:
    """Remove the claims of the builder of this name, which is known to have ended. Returns their shards."""
    shards = [claim.shard for claim in all_claims(root) if name and claim.name == name]
    for shard in shards:
        claim_path(root / "commits", shard).unlink(missing_ok=True)
    return shards


def _rows_line(rows: int) -> str:
    return f"rows {rows:0{ROWS_DIGITS}}\n"


def _first_line(path: Path) -> str | None:
    try:
        return read_plain(path, MAX_CLAIM_BYTES).decode(errors="replace").partition("\n")[0]
    except (FileNotFoundError, NotPlainError):
        return None
