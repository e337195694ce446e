"""A run continues from the newest checkpoint that is whole, whatever happened to the others, and says so."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file

from kd.common.disk.digests import DIGESTS
from kd.common.errors import DamagedFilesError
from kd.student_trainer.run_folder import RUN, read_run, read_steps, write_run
from kd.student_trainer.saving.checkpoints import (
    DIGESTS_KEY,
    checkpoints_of,
    newest_whole_checkpoint,
    remove_old_checkpoints,
    seal_checkpoint,
)

STATES = ("optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "model.safetensors")


def flip(path: Path) -> None:
    """One bit, in the middle."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def add_a_byte(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


DAMAGES: dict[str, Callable[[Path], None]] = {
    "flipped": flip,
    "missing": Path.unlink,
    "cut": cut,
    "empty": empty,
    "longer": add_a_byte,
}


@pytest.fixture
def stopped(run, make_student) -> Callable[[], Path]:
    """A run of six steps with checkpoints after 2 and 4, stopped in step 5; each call makes a copy of it."""
    settings = {"student": str(make_student(dropout=0.1)), "max_steps": 6, "save_every": 2}
    whole = run("whole", **settings)
    with pytest.raises(KeyboardInterrupt):
        run("stopped", stop_after=5, **settings)
    first = whole.out.parent / "stopped"
    count = 0

    def copy() -> Path:
        nonlocal count
        count += 1
        return shutil.copytree(first, first.parent / f"copy{count}")

    copy.settings = settings  # type: ignore[attr-defined]
    copy.whole = whole  # type: ignore[attr-defined]
    return copy


def test_a_damaged_checkpoint_is_left_out_by_name_and_the_weights_are_those_of_an_unbroken_run(run, stopped) -> None:
    for kind, damage in DAMAGES.items():
        for name in STATES:
            out = stopped()
            damage(out / "checkpoint-4" / name)
            resumed = run(out.name, resume=True, **stopped.settings)
            assert [r.step for r in resumed.records] == [3, 4, 5, 6], (kind, name)
            assert len(resumed.said) == 2, (kind, name)
            assert resumed.said[0].startswith(f"checkpoint-4 is damaged: {name} ")
            assert resumed.said[1] == "training continues from checkpoint-2 instead"
            assert all((resumed.weights[n] == w).all() for n, w in stopped.whole.weights.items()), (kind, name)
            assert [r.step for r in read_steps(out)] == [1, 2, 3, 4, 5, 6]
            shutil.rmtree(out)


def test_a_whole_checkpoint_is_used_without_a_word_and_one_that_was_cut_short_is_passed_over(run, stopped) -> None:
    resumed = run(stopped().name, resume=True, **stopped.settings)
    assert ([r.step for r in resumed.records], resumed.said) == ([5, 6], [])
    out = stopped()
    (out / "checkpoint-4" / DIGESTS).unlink()
    resumed = run(out.name, resume=True, **stopped.settings)
    assert ([r.step for r in resumed.records], resumed.said) == ([3, 4, 5, 6], [])
    assert all((resumed.weights[n] == w).all() for n, w in stopped.whole.weights.items())


def test_where_every_checkpoint_is_damaged_the_run_stops_and_touches_nothing(run, stopped, tree) -> None:
    out = stopped()
    flip(out / "checkpoint-4" / "optimizer.pt")
    empty(out / "checkpoint-2" / DIGESTS)
    before = tree(out)
    with pytest.raises(DamagedFilesError, match="no checkpoint of this run is whole") as caught:
        run(out.name, resume=True, **stopped.settings)
    assert caught.value.exit_code == 3
    assert caught.value.details["checkpoint-4"] == "optimizer.pt has other bytes than were written"
    assert caught.value.details["checkpoint-2"] == f"{DIGESTS} cannot be read"
    assert tree(out) == before
    for damaged in checkpoints_of(out):  # what the error says to try
        shutil.rmtree(damaged)
    resumed = run(out.name, resume=True, **stopped.settings)
    assert resumed.said == [f"{out} holds no checkpoint: training starts from the first step"]
    assert all((resumed.weights[n] == w).all() for n, w in stopped.whole.weights.items())


def test_a_damaged_run_document_is_restored_from_a_checkpoint(run, stopped) -> None:
    out = stopped()
    text = (out / RUN).read_text()
    (out / RUN).write_text(text.replace('"seed": 0', '"seed": 1'))
    with pytest.raises(DamagedFilesError, match="cannot read the run") as caught:
        run(out.name, resume=True, **stopped.settings)
    assert "each checkpoint of an unfinished run holds one" in str(caught.value)
    shutil.copyfile(out / "checkpoint-4" / RUN, out / RUN)
    assert [r.step for r in run(out.name, resume=True, **stopped.settings).records] == [5, 6]


def older(out: Path) -> Path:
    """The run as a release without digests would have left it."""
    write_run(out, {key: value for key, value in read_run(out).items() if key != DIGESTS_KEY})
    for checkpoint in checkpoints_of(out):
        for name in (DIGESTS, RUN, "metrics.jsonl"):
            (checkpoint / name).unlink()
    return out


def test_a_run_of_an_earlier_release_continues_and_says_that_only_the_form_was_checked(run, stopped) -> None:
    out = older(stopped())
    resumed = run(out.name, resume=True, **stopped.settings)
    assert [r.step for r in resumed.records] == [5, 6]
    assert resumed.said == [
        "checkpoint-4 was written by an earlier release and has no digests: only its form was checked"
    ]
    assert all((resumed.weights[n] == w).all() for n, w in stopped.whole.weights.items())
    assert [r.step for r in read_steps(out)] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("kind", ["missing", "cut", "empty", "flipped"])
def test_visible_damage_to_a_checkpoint_without_digests_is_seen(stopped, kind: str) -> None:
    out = older(stopped())
    for name in STATES:
        if name == "trainer_state.json" and kind != "empty":
            continue  # without it the checkpoint was cut short; JSON has no checksum
        if kind == "flipped" and name != "optimizer.pt":
            continue  # safetensors has no checksum, and in the small archives the bit lies between two entries
        path = out / "checkpoint-4" / name
        before = path.read_bytes()
        DAMAGES[kind](path)
        start = newest_whole_checkpoint(out, have_digests=False)
        assert start.checkpoint == out / "checkpoint-2", (name, kind)
        assert start.sentences[0].startswith("checkpoint-4 is damaged: ")
        path.write_bytes(before)


def test_only_the_newest_checkpoints_stay(tmp_path: Path) -> None:
    for step in (2, 10, 9):
        (tmp_path / f"checkpoint-{step}").mkdir()
        seal_checkpoint(tmp_path / f"checkpoint-{step}", [])
    (tmp_path / "checkpoint-old").mkdir()
    remove_old_checkpoints(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint-10", "checkpoint-9", "checkpoint-old"]


def test_a_changed_file_of_a_finished_run_is_noticed_when_it_is_read(run) -> None:
    from kd.models.loading import load_model
    from kd.models.model_request import ModelRequest

    out = run("run").out
    weights = load_file(out / "model.safetensors")
    assert load_model(ModelRequest(str(out))).num_parameters() <= sum(w.numel() for w in weights.values())
    flip(out / "model.safetensors")
    with pytest.raises(DamagedFilesError, match="not what was written"):
        load_model(ModelRequest(str(out)))
    flip(out / "model.safetensors")
    load_model(ModelRequest(str(out)))
    (out / "metrics.jsonl").write_text((out / "metrics.jsonl").read_text().replace("loss", "lass"))
    with pytest.raises(DamagedFilesError, match="not what was written"):
        read_steps(out)
