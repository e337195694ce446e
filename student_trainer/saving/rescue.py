"""A run whose folder can no longer be written goes on in another one: what was trained is not lost to a full disk.

    place = RunPlace(Path("runs/student"), rescue=Path("/other/disk"), say=print)
    place.write(lambda folder: append_step(folder, record))     # in runs/student, or from now on in /other/disk/student

A write that fails is tried in a fresh folder under `rescue`, with the records of the run so far. Where that fails too, both
places are tried every ten seconds for an hour, because somebody may make room; the trained weights stay in memory meanwhile.
The run in the other folder is a run like any other: `--out` there with `--resume` continues it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from kd.common.disk.disk_errors import WriteError, is_size_limit, write_error_of, write_failure
from kd.common.files import write_atomic

T = TypeVar("T")
RETRY_SECONDS = 10.0
"""Seconds between two attempts while neither place can be written."""
PATIENCE_SECONDS = 3600.0
"""Seconds after which a run gives up."""


class RunPlace:
    """The folder that a run writes into."""

    def __init__(
        self,
        folder: Path,
        rescue: Path,
        *,
        say: Callable[[str], object],
        records: tuple[str, ...] = (),
        moves: bool = True,
    ) -> None:
        """`records` are the files that go along to another folder; `moves` is whether the run may go to one."""
        self.folder = self.begun_in = folder
        """Folder that is written now, and the one that the user named."""
        self._rescue, self._say, self._records, self._moves = rescue, say, records, moves
        self._chosen: Path | None = None

    @property
    def moved(self) -> bool:
        """Whether the run went on in another folder."""
        return self.folder != self.begun_in

    def write(self, action: Callable[[Path], T], *, patient: bool = True) -> T:
        """What `action` returns, given the folder. It may be called again, with another folder.

        patient   whether to wait for room where neither place can be written

        Raises WriteError where no place could be written, for an hour or at once, and where the run may not move.
        """
        try:
            return action(self.folder)
        except Exception as error:
            if write_failure(error, self.folder) is None:
                raise
            failed = error
        if not self._moves:
            raise self._error(failed) from failed
        return self._elsewhere(action, failed, patient)

    def _elsewhere(self, action: Callable[[Path], T], failed: Exception, patient: bool) -> T:
        started, waiting = time.monotonic(), False
        while True:
            for folder in (self._other(), self.begun_in):
                try:
                    self._bring_records(folder)
                    result = action(folder)
                except Exception as error:
                    if write_failure(error, folder) is None:
                        raise
                    failed = error
                    continue
                self._settle(folder)
                return result
            if not patient or is_size_limit(failed) or time.monotonic() - started > PATIENCE_SECONDS:
                raise self._error(failed) from failed
            if not waiting:
                self._say(
                    f"neither {self.begun_in} nor {self._rescue} can be written ({write_failure(failed, self._rescue)}): "
                    f"trying again every {RETRY_SECONDS:.0f} seconds for an hour; Ctrl-C twice gives up"
                )
                waiting = True
            time.sleep(RETRY_SECONDS)

    def _other(self) -> Path:
        """The folder under the rescue folder that this run uses: one that no run had used before."""
        number = 1
        while self._chosen is None:
            other = self._rescue / (self.begun_in.name + (f"-{number}" if number > 1 else ""))
            number += 1
            self._chosen = None if other.exists() and any(other.iterdir()) else other
        return self._chosen

    def _bring_records(self, folder: Path) -> None:
        """Copy the records of the run so far, without a last line that was cut short."""
        if folder == self.folder:
            return
        for name in self._records:
            if (self.folder / name).is_file():
                text = (self.folder / name).read_text(encoding="utf-8", errors="replace")
                write_atomic(folder / name, text[: text.rfind("\n") + 1])

    def _settle(self, folder: Path) -> None:
        if folder != self.folder:
            self._say(f"{self.folder} can no longer be written: the run goes on in {folder}")
            self.folder = folder

    def _error(self, failed: Exception) -> WriteError:
        advice = "make room, then the same command with --resume: it continues from the last checkpoint"
        return write_error_of(failed, self.folder, advice)


def refuse_moved_run(wanted: Path, folder: Path) -> None:
    """Raise WriteError for a finished run that is not where it was wanted."""
    if folder != wanted:
        raise WriteError(
            "the run is complete, but not in --out",
            where=wanted,
            found="it could no longer be written",
            saved=folder,
            try_=f"make room, then move {folder} to {wanted} in place of what is there",
        )
