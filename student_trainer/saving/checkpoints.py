"""Checkpoints of a run: sealed with digests when they are whole, verified before a run continues from one.

    runs/student/checkpoint-200/
        model.safetensors  optimizer.pt  …      what transformers' Trainer writes
        run.json  metrics.jsonl  …              the records of the run up to here
        batches.json                            where in the epoch it is, where batches are cut by tokens
        digests.json                            size and SHA-256 of all of these; written last, when all are on disk

A checkpoint without `digests.json` was cut short and does not count. One that differs from its digests is damaged: the run
continues from the newest checkpoint that is whole, and says which it left out and why. Runs of earlier releases have no
digests (`DIGESTS_KEY` is not in their `run.json`): their checkpoints are used where the archives' own checksums agree.
"""

from __future__ import annotations

import shutil
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from kd.common.disk.digests import DIGESTS, damage_of, has_digests, write_digests
from kd.common.errors import DamagedFilesError
from kd.common.files import sync_folder

DIGESTS_KEY = "checkpoint_digests"
"""Key of `run.json` that says that the checkpoints of this run have digests."""
KEPT = 2
"""Number of checkpoints of a run that stay on disk."""
BATCHES = "batches.json"
"""What `BatchPlan.known` gives: a run that goes on need not walk along the epoch from its beginning."""
LAST_OF_TRAINER = "trainer_state.json"
"""The file that transformers' Trainer writes last."""


@dataclass(frozen=True)
class Continuation:
    """Where a run continues."""

    checkpoint: Path | None = None
    """None = at the first step."""
    sentences: tuple[str, ...] = ()
    """What the user should know of it."""


def step_of(checkpoint: Path) -> int:
    """The step after which a checkpoint was written."""
    return int(checkpoint.name.rpartition("-")[2])


def checkpoints_of(folder: Path) -> list[Path]:
    """The checkpoints of a run, whole or not, the newest first."""
    folders = [path for path in folder.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdigit()]
    return sorted(folders, key=step_of, reverse=True)


def seal_checkpoint(checkpoint: Path, records: Iterable[str]) -> None:
    """Make a checkpoint count: copy the records of its run into it, force all to disk, write the digests. Raises OSError."""
    for name in records:
        if (checkpoint.parent / name).is_file():
            shutil.copyfile(checkpoint.parent / name, checkpoint / name)
    write_digests(checkpoint)
    sync_folder(checkpoint.parent)


def remove_old_checkpoints(folder: Path, kept: int = KEPT) -> None:
    """Remove all checkpoints but the newest; the one that is being removed stops counting first."""
    for checkpoint in checkpoints_of(folder)[kept:]:
        remove_checkpoint(checkpoint)


def remove_checkpoint(checkpoint: Path) -> None:
    """Remove a checkpoint, digests first."""
    (checkpoint / DIGESTS).unlink(missing_ok=True)
    shutil.rmtree(checkpoint, ignore_errors=True)


def newest_whole_checkpoint(folder: Path, *, have_digests: bool) -> Continuation:
    """The newest checkpoint that is whole. Raises DamagedFilesError where there are checkpoints and all are damaged.

    have_digests   whether the run was begun by a release that writes digests
    """
    damaged: list[tuple[Path, str]] = []
    for checkpoint in checkpoints_of(folder):
        reason = _damage(checkpoint) if have_digests or has_digests(checkpoint) else _visible_damage(checkpoint)
        if reason is None:
            return Continuation(checkpoint, _said(checkpoint, damaged))
        if reason:
            damaged.append((checkpoint, reason))
    if damaged:
        raise DamagedFilesError(
            "no checkpoint of this run is whole",
            where=folder,
            **{path.name: reason for path, reason in damaged},
            try_=f"remove {', '.join(path.name for path, _ in damaged)}: --resume then trains from the first step",
        )
    return Continuation(None, (f"{folder} holds no checkpoint: training starts from the first step",))


def _damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint; empty where it was cut short, None where it is whole."""
    try:
        return damage_of(checkpoint)
    except FileNotFoundError:
        return ""


def _said(checkpoint: Path, damaged: list[tuple[Path, str]]) -> tuple[str, ...]:
    said = [f"{path.name} is damaged: {reason}" for path, reason in damaged]
    if damaged:
        said.append(f"training continues from {checkpoint.name} instead")
    if not has_digests(checkpoint):
        said.append(
            f"{checkpoint.name} was written by an earlier release and has no digests: only its form was checked"
        )
    return tuple(said)


def _visible_damage(checkpoint: Path) -> str | None:
    """As `_damage`, for a checkpoint without digests: what its form alone says."""
    if not (checkpoint / LAST_OF_TRAINER).is_file():
        return ""
    weights = [*checkpoint.glob("*.safetensors"), *checkpoint.glob("pytorch_model*")]
    if not weights:
        return "the weights are missing"
    for name in ("optimizer.pt", "scheduler.pt", "rng_state*.pth"):
        if not any(checkpoint.glob(name)) and not any(checkpoint.glob("*_0*")):  # FSDP keeps folders of parts
            return f"{name.replace('*', '')} is missing"
    for path in sorted(path for path in checkpoint.rglob("*") if path.is_file()):
        if path.stat().st_size == 0:
            return f"{path.name} has 0 bytes"
        if path.suffix in (".pt", ".pth") and not _sound_archive(path):
            return f"{path.name} is not a whole archive"
        if path.suffix == ".safetensors" and not _sound_tensors(path):
            return f"{path.name} is not a whole file of tensors"
    return None


def _sound_archive(path: Path) -> bool:
    """Whether a file of torch is an archive whose checksums agree."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is None
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, NotImplementedError):
        return False


def _sound_tensors(path: Path) -> bool:
    """Whether a file of safetensors has its header, and the length that the header says."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return bool(list(file.keys()))
    except (OSError, ValueError, SafetensorError):
        return False
