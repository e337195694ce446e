"""Where a run's folder can no longer be written, the run goes on in another one, and nothing that was trained is lost."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from crashing import child
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from kd.common.disk.disk_errors import WriteError
from kd.student_trainer.run_folder import METRICS, read_run, read_steps
from kd.student_trainer.saving import rescue
from kd.student_trainer.saving.rescue import RunPlace, refuse_moved_run


class Disk:
    """Folders that can be written, and all others, whose disk is full."""

    def __init__(self, *open_: Path) -> None:
        self.open = {*open_}
        self.written: list[Path] = []

    def write(self, folder: Path) -> str:
        if folder not in self.open:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self.written.append(folder)
        return folder.name


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def place(tmp_path: Path, said: list[str]) -> RunPlace:
    (tmp_path / "run").mkdir()
    return RunPlace(tmp_path / "run", tmp_path / "rescue", say=said.append, records=(METRICS,))


def test_a_folder_that_can_be_written_is_kept(place: RunPlace, tmp_path: Path, said: list[str]) -> None:
    disk = Disk(tmp_path / "run")
    assert place.write(disk.write) == "run"
    assert (place.moved, said) == (False, [])


def test_a_run_moves_once_and_takes_its_whole_lines_along(place: RunPlace, tmp_path: Path, said: list[str]) -> None:
    (tmp_path / "run" / METRICS).write_text('{"step": 1}\n{"step": 2}\n{"st')
    disk = Disk(tmp_path / "rescue" / "run")
    assert place.write(disk.write) == place.write(disk.write) == "run"
    assert disk.written == [tmp_path / "rescue" / "run"] * 2
    assert (tmp_path / "rescue" / "run" / METRICS).read_text() == '{"step": 1}\n{"step": 2}\n'
    assert said == [f"{tmp_path / 'run'} can no longer be written: the run goes on in {tmp_path / 'rescue' / 'run'}"]
    with pytest.raises(WriteError, match="complete, but not in --out"):
        refuse_moved_run(tmp_path / "run", place.folder)


def test_a_folder_of_an_earlier_run_is_not_used(place: RunPlace, tmp_path: Path) -> None:
    for name in ("run", "run-2"):
        (tmp_path / "rescue" / name).mkdir(parents=True)
        (tmp_path / "rescue" / name / "file").write_text("")
    assert place.write(Disk(tmp_path / "rescue" / "run-3").write) == "run-3"


def test_where_there_is_no_room_at_all_the_run_waits_for_some(place, tmp_path: Path, said, monkeypatch) -> None:
    disk = Disk()
    naps: list[float] = []

    def sleep(seconds: float) -> None:
        naps.append(seconds)
        if len(naps) == 3:
            disk.open.add(tmp_path / "run")

    monkeypatch.setattr("time.sleep", sleep)
    assert place.write(disk.write) == "run"
    assert naps == [rescue.RETRY_SECONDS] * 3
    assert not place.moved
    assert len(said) == 1
    assert "trying again every 10 seconds" in said[0]


def test_patience_ends(place, monkeypatch) -> None:
    monkeypatch.setattr(rescue, "PATIENCE_SECONDS", -1.0)
    with pytest.raises(WriteError, match="the disk is full"):
        place.write(Disk().write)
    monkeypatch.undo()
    with pytest.raises(WriteError, match="the disk is full"):
        place.write(Disk().write, patient=False)


def test_a_run_of_several_processes_stays(tmp_path: Path) -> None:
    with pytest.raises(WriteError, match="the disk is full"):
        RunPlace(tmp_path / "run", tmp_path / "rescue", say=print, moves=False).write(Disk().write)
    assert not (tmp_path / "rescue").exists()


def test_errors_that_are_about_something_else_pass(place) -> None:
    def wrong(folder: Path) -> None:
        raise ValueError("not about a disk")

    with pytest.raises(ValueError, match="not about a disk"):
        place.write(wrong)


LIMITS = {
    "full": "size=120k",
    "no inodes": "nr_inodes=5",
    "read-only": "",
}
"""Kind of limit -> how the disk is mounted. Records fit on each, and weights do not."""


@pytest.mark.parametrize("every", [0, 2], ids=["at-the-end", "at-a-checkpoint"])
@pytest.mark.parametrize("kind", LIMITS)
def test_the_weights_of_a_run_whose_disk_refuses_are_those_of_any_other(
    run, mounted: Callable[[str], Path], tmp_path: Path, kind: str, every: int
) -> None:
    whole = run("whole", max_steps=4)
    disk = mounted(LIMITS[kind])
    settings = {"out": str(disk / "run"), "rescue_dir": str(tmp_path / "rescue"), "max_steps": 4, "save_every": every}
    if kind == "read-only":
        remount = Remount(disk, at=2)
        done = run("moved", midway=remount.midway, **settings)
    else:
        done = run("moved", **settings)
    moved = tmp_path / "rescue" / "run"
    assert done.result.out == str(moved)
    assert done.said == [f"{disk / 'run'} can no longer be written: the run goes on in {moved}"]
    assert all((load_file(moved / "model.safetensors")[n] == w).all() for n, w in whole.weights.items())
    assert [step.step for step in read_steps(moved)] == [1, 2, 3, 4]
    assert read_run(moved)["complete"]
    assert not list(disk.rglob("*.safetensors"))
    assert not list((disk / "run").glob("checkpoint-*")) or kind == "read-only"
    AutoModelForCausalLM.from_pretrained(moved)


class Remount:
    """Makes a disk read-only when the student is scored after some step."""

    def __init__(self, disk: Path, *, at: int) -> None:
        from kd.student_trainer.midway import Midway

        self.disk, self.at, self.seen = disk, at, 0
        self.midway = Midway(self.score, every=1)

    def score(self, *_: object) -> dict[str, object]:
        if self.seen == self.at:
            subprocess.run(["mount", "-o", "remount,ro", str(self.disk)], check=True)
        self.seen += 1
        return {"tasks": {}}


def test_a_run_that_moved_continues_where_it_is(run, mounted, tmp_path: Path) -> None:
    whole = run("whole", max_steps=6)
    disk = mounted("size=120k")
    settings = {"rescue_dir": str(tmp_path / "rescue"), "max_steps": 6, "save_every": 2}
    with pytest.raises(KeyboardInterrupt):
        run("moved", out=str(disk / "run"), stop_after=5, **settings)
    resumed = run("moved", out=str(tmp_path / "rescue" / "run"), resume=True, **settings)
    assert [r.step for r in resumed.records] == [5, 6]
    weights = load_file(tmp_path / "rescue" / "run" / "model.safetensors")
    assert all((weights[n] == w).all() for n, w in whole.weights.items())


def test_where_files_may_not_grow_the_weights_are_written_in_several(run, tmp_path: Path) -> None:
    whole = run("whole", max_steps=3)

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))
        result = run("limited", max_steps=3, save_every=2)
        assert [text.partition(" (")[0] for text in result.said] == [f"no checkpoint after step {n}" for n in (2, 3)]

    assert child(limited) == (0, "")
    out = tmp_path / "limited"
    assert len(list(out.glob("model-*.safetensors"))) > 1
    loaded = AutoModelForCausalLM.from_pretrained(out).state_dict()
    assert all((loaded[n] == w).all() for n, w in whole.weights.items())
    assert read_run(out)["complete"]


def test_a_disk_that_is_full_from_the_start_is_a_clear_error(run, mounted) -> None:
    disk = mounted("size=4k")
    (disk / "fill").write_bytes(b"0" * 4096)
    with pytest.raises(WriteError, match="the disk is full"):
        run("moved", out=str(disk / "run"))
    shutil.rmtree(disk / "run", ignore_errors=True)
