"""The files of a run: what is written is read back, torn lines are left out, and other runs are not touched."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, fields
from pathlib import Path

import pytest
from hostile import NOT_PLAIN

from kd.common.errors import CacheMismatchError, DamagedFilesError, DataError
from kd.student_trainer.run_folder import (
    EVALUATIONS,
    METRICS,
    RECORDS,
    RUN,
    StepRecord,
    append_evaluation,
    append_step,
    is_run,
    keep_records,
    leave_run,
    read_evaluations,
    read_records,
    read_run,
    read_steps,
    resume_point,
    start_run,
    write_run,
)
from kd.student_trainer.saving.checkpoints import Continuation, seal_checkpoint

IDENTITY = {"lr": 1.0, "seed": 0}


def record(step: int, **values: float | None) -> StepRecord:
    numbers = {field.name: 0.5 for field in fields(StepRecord)} | {"step": step, "steps_total": 9, "tokens": 7}
    return StepRecord(**numbers | values)  # type: ignore[arg-type]


def checkpoint(folder: Path, step: int) -> Path:
    path = folder / f"checkpoint-{step}"
    path.mkdir(parents=True)
    (path / "trainer_state.json").write_text("{}")
    return path


def test_steps_and_scores_are_read_as_they_were_written(tmp_path: Path) -> None:
    steps = [record(1, kd=None), record(2, loss=1 / 3)]
    scores = [{"step": 0, "tasks": {}}, {"step": 2, "tasks": {"a": {}}}]
    for step, score in zip(steps, scores, strict=True):
        append_step(tmp_path, step)
        append_evaluation(tmp_path, score)
    assert read_steps(tmp_path) == steps
    assert read_evaluations(tmp_path) == scores
    assert (tmp_path / METRICS).read_text() == "".join(json.dumps(asdict(step)) + "\n" for step in steps)
    assert (tmp_path / EVALUATIONS).read_text() == "".join(json.dumps(score) + "\n" for score in scores)


def test_scores_that_json_has_no_number_for_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON compliant"):
        append_evaluation(tmp_path, {"step": 0, "value": float("nan")})


def test_without_a_file_there_are_no_lines(tmp_path: Path) -> None:
    assert read_steps(tmp_path) == read_evaluations(tmp_path) == []
    keep_records(tmp_path / METRICS, 1)
    assert not (tmp_path / METRICS).exists()


@pytest.mark.parametrize("cut", range(1, len('{"step": 2}')))
def test_a_last_line_that_was_cut_short_is_left_out(tmp_path: Path, cut: int) -> None:
    path = tmp_path / METRICS
    path.write_text('{"step": 1}\n' + '{"step": 2}'[:cut])
    assert read_records(path) == [{"step": 1}]


@pytest.mark.parametrize("line", ['{"step": 1', "[1]", "{}", '{"step": "1"}', '{"step": true}', "null", "text"])
def test_any_other_line_that_cannot_be_read_is_refused_with_its_number(tmp_path: Path, line: str) -> None:
    path = tmp_path / METRICS
    path.write_text(f'{{"step": 1}}\n{line}\n{{"step": 2}}\n')
    with pytest.raises(DataError, match="a step record") as caught:
        read_records(path)
    assert str(caught.value.details["where"]).endswith(f"{METRICS} line 2")


@pytest.mark.parametrize(("step", "kept"), [(0, []), (3, [1, 2]), (4, [1, 2, 4])])
def test_lines_after_a_checkpoint_without_records_are_dropped(tmp_path: Path, step: int, kept: list[int]) -> None:
    path = tmp_path / METRICS
    path.write_text("".join(f'{{"step": {n}, "x": 0.1}}\n' for n in (1, 2, 4)) + '{"step": 5')
    keep_records(path, step)
    assert path.read_text() == "".join(f'{{"step": {n}, "x": 0.1}}\n' for n in kept)


def test_records_come_from_the_checkpoint_whatever_became_of_those_beside_it(tmp_path: Path) -> None:
    start_run(tmp_path, IDENTITY, "fingerprint", None)
    append_step(tmp_path, record(1))
    sealed = checkpoint(tmp_path, 1)
    seal_checkpoint(sealed, RECORDS)
    append_step(tmp_path, record(2))
    append_evaluation(tmp_path, {"step": 2})
    (tmp_path / METRICS).write_text("not what was logged")
    start_run(tmp_path, IDENTITY, "fingerprint", sealed)
    assert read_steps(tmp_path) == [record(1)]
    assert read_evaluations(tmp_path) == []
    start_run(tmp_path, IDENTITY, "fingerprint", None)
    assert read_steps(tmp_path) == []
    assert not sealed.exists()


def test_a_run_is_what_has_a_document(tmp_path: Path) -> None:
    assert not is_run(tmp_path)
    with pytest.raises(DataError, match="not a training run"):
        read_run(tmp_path)
    write_run(tmp_path, {"complete": True})
    assert is_run(tmp_path)
    assert read_run(tmp_path) == {"complete": True}


@pytest.mark.parametrize("text", ["{", "[]", ""])
def test_a_document_that_cannot_be_read_is_refused_by_name(tmp_path: Path, text: str) -> None:
    (tmp_path / RUN).write_text(text)
    with pytest.raises(DataError, match="cannot be read") as caught:
        read_run(tmp_path)
    assert caught.value.details["where"] == tmp_path / RUN


def test_a_document_that_was_changed_is_refused(tmp_path: Path) -> None:
    write_run(tmp_path, {"complete": True, "result": {"loss": 2.5}})
    text = (tmp_path / RUN).read_text()
    (tmp_path / RUN).write_text(text.replace("2.5", "1.5"))
    with pytest.raises(DamagedFilesError, match="cannot read the run"):
        read_run(tmp_path)
    (tmp_path / RUN).write_text('{"complete": true}')  # a run of an earlier release has no digest
    assert read_run(tmp_path) == {"complete": True}


def test_a_run_continues_from_its_last_whole_checkpoint(tmp_path: Path) -> None:
    start_run(tmp_path, IDENTITY, "fingerprint", None)
    start = resume_point(tmp_path, IDENTITY, resume=True)
    assert start.checkpoint is None
    assert start.sentences == (f"{tmp_path} holds no checkpoint: training starts from the first step",)
    for step in (9, 10):
        seal_checkpoint(checkpoint(tmp_path, step), RECORDS)
    checkpoint(tmp_path, 11)
    assert resume_point(tmp_path, IDENTITY, resume=True) == Continuation(tmp_path / "checkpoint-10")


def test_a_new_run_may_only_start_in_an_empty_folder(tmp_path: Path) -> None:
    assert resume_point(tmp_path / "absent", IDENTITY, resume=False) == Continuation()
    assert resume_point(tmp_path, IDENTITY, resume=False) == Continuation()
    (tmp_path / "something").write_text("")
    with pytest.raises(DataError, match="not empty"):
        resume_point(tmp_path, IDENTITY, resume=True)
    start_run(tmp_path, IDENTITY, "fingerprint", None)
    with pytest.raises(DataError, match="a run already"):
        resume_point(tmp_path, IDENTITY, resume=False)


def test_another_run_or_a_finished_one_is_not_continued(tmp_path: Path) -> None:
    start_run(tmp_path, IDENTITY, "fingerprint", None)
    with pytest.raises(CacheMismatchError, match="other settings") as caught:
        resume_point(tmp_path, {"lr": 2.0, "seed": 0, "new": 1}, resume=True)
    assert caught.value.details == {
        "where": tmp_path,
        "differs lr": "now 2.0, before 1.0",
        "differs new": "now 1, before None",
        "try": "the same options, or another --out",
    }
    write_run(tmp_path, {"identity": IDENTITY, "complete": True})
    with pytest.raises(DataError, match="is finished"):
        resume_point(tmp_path, IDENTITY, resume=True)


def test_starting_writes_the_identity_and_drops_what_will_be_logged_again(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        append_step(tmp_path, record(step))
        append_evaluation(tmp_path, {"step": step})
    sealed = checkpoint(tmp_path, 2)
    seal_checkpoint(sealed, ())
    start_run(tmp_path, IDENTITY, "fingerprint", sealed)
    assert [r.step for r in read_steps(tmp_path)] == [r["step"] for r in read_evaluations(tmp_path)] == [1, 2]
    begun = {"identity": IDENTITY, "cache_fingerprint": "fingerprint", "complete": False, "checkpoint_digests": True}
    assert read_run(tmp_path) == begun


def test_a_run_that_came_to_nothing_leaves_no_folder_and_takes_nothing_else_with_it(tmp_path: Path) -> None:
    for name in ("empty", "logged"):
        start_run(tmp_path / name, IDENTITY, "fingerprint", None)
    append_step(tmp_path / "logged", record(1))
    for name in ("empty", "logged"):
        leave_run(tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == ["logged"]
    assert len(read_steps(tmp_path / "logged")) == 1


def continued(folder: Path) -> None:
    resume_point(folder, IDENTITY, resume=True)
    start_run(folder, IDENTITY, "0" * 64, None)


@pytest.mark.parametrize("make", NOT_PLAIN, ids=lambda make: make.__name__)
@pytest.mark.parametrize("name", [RUN, METRICS, EVALUATIONS])
def test_what_is_no_file_in_a_run_is_refused_at_once(name: str, make: Callable[[Path], None], tmp_path: Path) -> None:
    write_run(tmp_path, {"identity": IDENTITY, "complete": False})
    append_step(tmp_path, record(1))
    append_evaluation(tmp_path, {"step": 0, "tasks": {}})
    make(tmp_path / name)
    read = {RUN: read_run, METRICS: read_steps, EVALUATIONS: read_evaluations}[name]
    if "elsewhere" in make.__name__:  # a run belongs to the user, who may keep its files where there is room
        assert read(tmp_path)
    elif make.__name__ != "a_link_to_nothing" or name == RUN:
        with pytest.raises(DataError):
            read(tmp_path)
        try:
            continued(tmp_path)  # without a checkpoint, a run starts anew, and what it had written is removed
        except DataError:
            assert name == RUN or make.__name__ == "a_folder"
        else:
            assert not (tmp_path / METRICS).exists()


def test_a_run_holds_no_password_and_is_continued_all_the_same(tmp_path: Path) -> None:
    identity = IDENTITY | {"tokenizer": "https://u:p@host/t?sig=abc"}
    start_run(tmp_path, identity, "0" * 64, None)
    assert read_run(tmp_path)["identity"]["tokenizer"] == "https://***@host/t?sig=***"
    assert resume_point(tmp_path, identity, resume=True).checkpoint is None
