"""The folder of a training run: everything that writes and reads its files.

    run.json             identity, cache and state of the run; settings and result once it is complete
    metrics.jsonl        one line per logged step
    evaluations.jsonl    one line per scoring of the student while it learned (`kd.student_trainer.midway`)
    classify.json        of `kd classify train`, in place of run.json: settings, rows and result; written last
    digests.json         size and SHA-256 of the weights, the tokenizer and the records, once the run is complete
    checkpoint-N         what transformers' Trainer needs to continue after step N, and the records up to there

`run.json` is written first and last, and holds its own digest. `digests.json` lists the weights and the records of a finished
run. A line that was cut short when a run was killed is left out when the file is read. A run that continues takes its records
from the checkpoint (`kd.student_trainer.saving.checkpoints`): lines after it are written again.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from kd.common.disk.digests import DIGESTS, checked_digest, refuse_damage, with_digest, write_digests
from kd.common.errors import CacheMismatchError, DamagedFilesError, DataError
from kd.common.files import canonical_json, read_object, sweep, unfinished, write_atomic
from kd.common.shown_text import redacted
from kd.common.strangers.plain_files import read_plain
from kd.student_trainer.saving.checkpoints import (
    DIGESTS_KEY,
    Continuation,
    checkpoints_of,
    newest_whole_checkpoint,
    remove_checkpoint,
    step_of,
)
from kd.student_trainer.saving.whole_models import ADAPTER_FOLDER

RUN, METRICS, EVALUATIONS = "run.json", "metrics.jsonl", "evaluations.jsonl"
CLASSIFIER_RUN = "classify.json"
RECORDS = (RUN, METRICS, EVALUATIONS)
"""What a checkpoint holds of its run besides weights and states."""
UNLISTED = (RUN, "README.md", DIGESTS)
"""Files of a finished run that `digests.json` does not list: they are written after it, or say themselves that they are whole."""
MAX_RECORD_BYTES = 2**30
"""Most bytes of a file of records: some five million steps."""


@dataclass(frozen=True)
class StepRecord:
    """One line of `metrics.jsonl`; losses are means per position over the steps since the last line, in nats."""

    step: int
    """Optimizer steps so far."""
    steps_total: int
    """Optimizer steps of the whole run."""
    epoch: float
    """Passes over the cache so far."""
    loss: float
    """alpha * kd + ce_weight * ce; kd times T^2 for divergences."""
    kd: float | None
    """Distillation loss without T^2: mean over positions, or over groups and then examples; None for --loss ce."""
    ce: float
    """Cross-entropy."""
    lr: float
    """Learning rate of the last step."""
    grad_norm: float
    """Norm of the last step's gradient before clipping."""
    tokens: int
    """Target positions trained on so far, on all devices."""
    tokens_per_second: float
    """Target positions per second since the last line."""
    wait_share: float
    """Share of the time since the last line that training waited for data."""


@dataclass(frozen=True)
class ClassifyRecord:
    """One line of `metrics.jsonl` of a classifier. Losses are means since the last line, in nats per row."""

    step: int
    """Optimizer steps so far."""
    steps_total: int
    """Optimizer steps of the whole run."""
    epoch: float
    """Passes over the rows so far."""
    loss: float
    """Cross-entropy. From a cache: alpha * kd * T^2 + ce_weight * ce."""
    lr: float
    """Learning rate of the last step."""
    grad_norm: float
    """Norm of the last step's gradient before clipping."""
    kd: float | None = None
    """Distillation loss of this process, without weight and T^2; None without a cache or with `ce`."""
    ce: float | None = None
    """Cross-entropy with the labels, of this process; None without a cache."""


def is_run(folder: Path) -> bool:
    """Whether a training was started in this folder; what lies there instead of its file is refused when it is read."""
    return os.path.lexists(folder / RUN)


def read_run(folder: Path) -> dict[str, Any]:
    """`run.json`. Raises DataError where there is none or it is not a JSON object, DamagedFilesError where it was changed."""
    path = folder / RUN
    if not os.path.lexists(path):
        raise DataError("not a training run", where=folder, expected=RUN)
    return _read_checked(path)


def _read_checked(path: Path) -> dict[str, Any]:
    document = read_object(path)
    try:
        return checked_digest(document)
    except ValueError as error:
        raise DamagedFilesError(
            "cannot read the run",
            where=path,
            found=str(error),
            try_="a copy of the file: each checkpoint of an unfinished run holds one",
        ) from error


def write_run(folder: Path, document: Mapping[str, Any]) -> None:
    """Write `run.json`, with its own digest."""
    write_atomic(folder / RUN, canonical_json(with_digest(redacted(document))))


def seal_run(folder: Path) -> None:
    """Force the files of a finished run to disk and list them with their digests. Raises OSError."""
    files = [path for path in folder.iterdir() if path.name not in UNLISTED]
    files += (folder / ADAPTER_FOLDER).glob("*")
    write_digests(folder, [str(p.relative_to(folder)) for p in files if p.is_file() and not unfinished(p.name)])


def write_classifier_run(folder: Path, document: Mapping[str, Any]) -> None:
    """Write `classify.json`, with its own digest, after the digests of the other files."""
    write_digests(folder)
    write_atomic(folder / CLASSIFIER_RUN, canonical_json(with_digest(redacted(document))))


def read_classifier_run(folder: Path) -> dict[str, Any] | None:
    """`classify.json`; None where there is none. Raises DataError where it is not a JSON object."""
    path = folder / CLASSIFIER_RUN
    return _read_checked(path) if os.path.lexists(path) else None


def append_step(folder: Path, record: StepRecord | ClassifyRecord) -> None:
    """Add a line to `metrics.jsonl`."""
    append_record(folder / METRICS, asdict(record))


def append_evaluation(folder: Path, record: Mapping[str, Any]) -> None:
    """Add a line to `evaluations.jsonl`. Raises ValueError for NaN and infinity."""
    append_record(folder / EVALUATIONS, record, allow_nan=False)


def append_record(path: Path, record: Mapping[str, Any], *, allow_nan: bool = True) -> None:
    """Add a line to a file of JSON objects; `read_records` reads it."""
    line = json.dumps(record, allow_nan=allow_nan)
    with path.open("a", encoding="utf-8") as file:
        file.write(line + "\n")


def read_steps(folder: Path) -> list[StepRecord]:
    """The lines of `metrics.jsonl` of a run of `kd train`. Raises DataError."""
    return [StepRecord(**record) for record in read_log(folder)]


def read_log(folder: Path) -> list[dict[str, Any]]:
    """The lines of `metrics.jsonl` as they are. Raises DataError, DamagedFilesError where a finished run's file was changed."""
    return _read_whole(folder, METRICS)


def read_evaluations(folder: Path) -> list[dict[str, Any]]:
    """The lines of `evaluations.jsonl`. Raises as `read_log` does."""
    return _read_whole(folder, EVALUATIONS)


def _read_whole(folder: Path, name: str) -> list[dict[str, Any]]:
    refuse_damage(folder, lambda listed: listed == name)
    return read_records(folder / name)


def read_records(path: Path) -> list[dict[str, Any]]:
    """The JSON objects of a file of lines, without a last line that was cut short; empty where there is no such file.

    Raises DataError for any other line that is not an object with a whole number of steps under `step`.
    """
    try:
        lines = read_plain(path, MAX_RECORD_BYTES).decode(errors="replace").split("\n")
    except FileNotFoundError:
        return []
    except OSError as error:
        raise DataError("the step records cannot be read", where=path, found=error.strerror) from error
    records = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            whole = isinstance(record["step"], int) and not isinstance(record["step"], bool)
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            if number == len(lines):  # no line end after it: the run was stopped while writing
                continue
            raise DataError(
                "a step record cannot be read",
                where=f"{path} line {number}",
                found=f"{type(error).__name__}: {error}",
                expected='{"step": …, …}',
            ) from error
        if not whole:
            step = repr(record["step"])[:40]
            raise DataError("a step record has no step number", where=f"{path} line {number}", found=step)
        records.append(record)
    return records


def restore_records(folder: Path, checkpoint: Path | None) -> None:
    """Take the records back to what they were at a checkpoint (None: at the start of the run)."""
    for name in (METRICS, EVALUATIONS):
        path = folder / name
        if checkpoint is not None and (checkpoint / name).is_file():
            write_atomic(path, read_plain(checkpoint / name, MAX_RECORD_BYTES).decode())
        elif checkpoint is None or (checkpoint / RUN).is_file():  # nothing of this kind had been written by then
            if path.is_dir():
                raise DataError("the step records cannot be read", where=path, found="a folder, not a plain file")
            path.unlink(missing_ok=True)
        else:
            keep_records(path, step_of(checkpoint))


def keep_records(path: Path, step: int) -> None:
    """Drop the lines after a step; for checkpoints of earlier releases, which hold no records."""
    if os.path.lexists(path):
        kept = [record for record in read_records(path) if record["step"] <= step]
        write_atomic(path, "".join(json.dumps(record) + "\n" for record in kept))


def resume_point(folder: Path, identity: Mapping[str, Any], *, resume: bool) -> Continuation:
    """Where a run goes on. Refuses to overwrite a run, or to continue another one.

    Raises DamagedFilesError where there are checkpoints and none is whole.
    """
    if not is_run(folder):
        if folder.exists() and not all(unfinished(path.name) for path in folder.iterdir()):
            raise DataError("the output folder is not empty", where=folder, try_="another --out")
        return Continuation()
    before = read_run(folder)
    complete = bool(before.get("complete"))
    if not resume:
        advice = "another --out" if complete else "--resume to continue it, or another --out"
        state = "a finished run" if complete else "a run that was stopped"
        raise DataError("the output folder holds a run already", where=folder, found=state, try_=advice)
    refuse_other_settings(folder, before.get("identity") or {}, redacted(identity))
    if complete:
        raise DataError("the run to continue is finished", where=folder, try_="another --out")
    return newest_whole_checkpoint(folder, have_digests=DIGESTS_KEY in before)


def refuse_other_settings(folder: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raise CacheMismatchError where a run has other settings than when it was started.

    Processes and accumulation may change places: as many micro-batches make a step.
    """
    if "order" in now and "order" not in before and "cache" in before:
        raise CacheMismatchError(
            "the run to continue was begun by a release that read large caches in another order",
            where=folder,
            found="a checkpoint in the middle of that order",
            try_="another --out, or the release that began it",
        )
    same_step = _step_batches(before) is not None and _step_batches(before) == _step_batches(now)
    differing = {
        f"differs {name}": f"now {now.get(name)}, before {before.get(name)}"
        for name in sorted(before.keys() | now.keys())
        if before.get(name) != now.get(name) and not (same_step and name in STEP)
    }
    if differing:
        raise CacheMismatchError(
            "the run to continue has other settings",
            where=folder,
            **differing,
            try_=_same_step(before, now) or "the same options, or another --out",
        )


STEP = ("accumulate", "world_size")
"""Entries of a run's identity whose product is the number of micro-batches of a step."""


def _step_batches(identity: Mapping[str, Any]) -> int | None:
    """Micro-batches of a step over all processes; None for runs of another kind."""
    accumulate, processes = (identity.get(name) for name in STEP)
    return accumulate * processes if isinstance(accumulate, int) and isinstance(processes, int) else None


def _same_step(before: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    """What makes the steps of a run with another number of processes, where that is possible."""
    batches, processes = _step_batches(before), now.get("world_size")
    if batches is None or not processes or processes == before.get("world_size") or batches % processes:
        return None
    return f"--accumulate {batches // processes}: as many micro-batches to a step as before"


def start_run(folder: Path, identity: Mapping[str, Any], fingerprint: str, checkpoint: Path | None) -> None:
    """Write whose folder this is, and drop what comes after the checkpoint: its records, and checkpoints that are not whole."""
    folder.mkdir(parents=True, exist_ok=True)
    sweep(folder)
    for later in checkpoints_of(folder):
        if checkpoint is None or step_of(later) > step_of(checkpoint):
            remove_checkpoint(later)
    restore_records(folder, checkpoint)
    begun = {"identity": identity, "cache_fingerprint": fingerprint, "complete": False}
    write_run(folder, begun | ({DIGESTS_KEY: True} if checkpoint is None or (checkpoint / DIGESTS).is_file() else {}))


def leave_run(folder: Path) -> None:
    """Remove the folder of a run that failed before its first step, or the corrected command would be refused."""
    if [path.name for path in folder.glob("*")] == [RUN]:
        (folder / RUN).unlink()
        folder.rmdir()
