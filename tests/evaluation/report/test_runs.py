"""What may lie in an input folder: runs that are torn, unfinished or logged twice."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from reported import HARD, evaluation, save_run

from kd.common.errors import DataError
from kd.evaluation.report.runs import collect_runs, commands_of, versions_of
from kd.evaluation.report.writing import write_report
from kd.evaluation.results import folders_of, refuse_other_scores


def test_an_unfinished_run_is_reported_from_its_configuration(tmp_path):
    folder = save_run(tmp_path / "r", kd=True)
    (folder / "run.json").write_text(json.dumps({"identity": {"student": "tiny", "loss": "kl"}, "complete": False}))
    (run,), _ = collect_runs([folder])
    assert (run.name, run.fact("student"), run.fact("loss"), run.fact("teacher")) == ("r", "tiny", "kl", None)


def test_a_torn_last_line_is_left_out_and_a_torn_middle_line_is_an_error(tmp_path):
    folder = save_run(tmp_path / "r", kd=False)
    path = folder / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 3.0}\n{"step": 2, "loss": 2.0}\n{"step": 3, "lo')
    (run,), _ = collect_runs([folder])
    assert [r["step"] for r in run.records] == [1, 2]
    path.write_text('{"step": 1, "loss": 3.0}\n{"step": 2, "lo\n{"step": 3, "loss": 1.0}\n')
    with pytest.raises(DataError, match="step record") as error:
        collect_runs([folder])
    assert str(error.value.details["where"]).endswith("line 2")


def test_a_step_logged_twice_counts_once_the_later(tmp_path):
    folder = save_run(tmp_path / "r", kd=False)
    (folder / "metrics.jsonl").write_text(
        '{"step": 2, "loss": 9.0}\n{"step": 1, "loss": 3.0}\n{"step": 2, "loss": 2.0}\n'
    )
    (run,), _ = collect_runs([folder])
    assert [(r["step"], r["loss"]) for r in run.records] == [(1, 3.0), (2, 2.0)]


def test_losses_that_are_not_finite_are_left_out_of_the_curve(tmp_path):
    folder = save_run(tmp_path / "r", kd=False, steps=3)
    (folder / "metrics.jsonl").write_text('{"step": 1, "loss": NaN}\n{"step": 2, "loss": 2.0}\n')
    (run,), _ = collect_runs([folder])
    assert run.series("loss").values.tolist() == [2.0]
    assert write_report([folder], tmp_path / "out").loss_png.exists()


def test_an_evaluation_in_the_folder_of_its_run_is_found_whatever_its_name(tmp_path):
    folder = save_run(tmp_path / "r", kd=True)
    evaluation("r", HARD, 8.0).save(folder / "held-out")
    _, entries = collect_runs([folder])
    assert [e.name for e in entries] == ["r"]
    for name in "ab":
        evaluation(name, HARD, 8.0).save(tmp_path / "scores" / name)
    _, entries = collect_runs([tmp_path / "scores"])
    assert [e.name for e in entries] == ["a", "b"], "a folder that is no run holds models, not evaluations of one"


def test_the_folder_of_several_models_evaluations_stands_for_them_in_their_order(tmp_path):
    models = [f"m{i}" for i in range(11)]
    for model, folder in zip(models, folders_of(tmp_path, models), strict=True):
        evaluation(model, HARD, 8.0).save(folder)
    _, entries = collect_runs([tmp_path])
    assert [e.name for e in entries] == models  # 10 after 9
    assert folders_of(tmp_path, ["one"]) == [tmp_path]


def test_scores_of_other_models_or_tasks_are_not_overwritten_or_mixed(tmp_path):
    alone, both = tmp_path / "alone", tmp_path / "both"
    evaluation("a", HARD, 8.0).save(alone)
    for model, folder in zip("ab", folders_of(both, ["a", "b"]), strict=True):
        evaluation(model, HARD, 8.0).save(folder)
    refuse_other_scores(alone, ["a"], ["perplexity", "hellaswag"])  # the same again
    refuse_other_scores(both, ["a", "b"], ["perplexity"])
    refuse_other_scores(tmp_path / "new", ["a", "b"], ["perplexity"])
    for out, models, tasks in (
        (alone, ["b"], ["perplexity"]),
        (alone, ["a"], ["samples"]),
        (alone, ["a", "b"], ["perplexity"]),
        (both, ["a"], ["perplexity"]),
        (both, ["a", "c"], ["perplexity"]),
        (both, ["c", "b"], ["perplexity"]),
    ):
        with pytest.raises(DataError, match="other scores"):
            refuse_other_scores(out, models, tasks)
    report = evaluation("a", HARD, 8.0)
    replace(report, tasks=report.tasks | {"hellaswag": report.tasks["perplexity"]}).save(alone)
    with pytest.raises(DataError, match="hellaswag"):  # it would be lost
        refuse_other_scores(alone, ["a"], ["perplexity"])
    refuse_other_scores(alone, ["a"], ["hellaswag", "perplexity"])


@pytest.mark.parametrize("make", [lambda p: p / "absent", lambda p: p])
def test_a_directory_that_is_neither_is_refused(tmp_path, make):
    with pytest.raises(DataError, match="neither an evaluation nor a training run"):
        write_report([make(tmp_path)], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_model_that_was_scored_on_two_texts_is_one_model(tmp_path):
    other = {"perplexity": {"text_digest": "d2", "seq_len": 24}}
    for folder, changes in (
        ("a", {"identity": {"weights": "w"}}),
        ("b", {"identity": {"weights": "w"}, "settings": other}),
        ("c", {"identity": {"weights": "v"}, "settings": other}),
        ("d", {"identity": {"weights": "w"}, "settings": other}),
    ):
        evaluation("owner/m", HARD, 8.0, **changes).save(tmp_path / folder)
    _, entries = collect_runs([tmp_path / name for name in "abcd"])
    assert [e.name for e in entries] == [
        "owner/m",
        "owner/m",
        "owner/m (2)",
        "owner/m (3)",
    ]  # other weights; the same text again


def test_a_folder_of_runs_stands_for_what_is_in_it(tmp_path):
    save_run(tmp_path / "runs" / "b", kd=True)
    evaluation("m", HARD, 8.0).save(tmp_path / "runs" / "a")
    for model, folder in zip(("x", "y"), folders_of(tmp_path / "runs" / "c", ["x", "y"]), strict=True):
        evaluation(model, HARD, 8.0).save(folder)
    (tmp_path / "runs" / "cache").mkdir()
    runs, entries = collect_runs([tmp_path / "runs"])
    assert ([r.name for r in runs], [e.name for e in entries]) == (["b"], ["m", "x", "y"])
    with pytest.raises(DataError, match="neither an evaluation"):
        collect_runs([tmp_path / "runs" / "cache"])


def test_scores_elsewhere_are_those_of_the_run_that_was_given(tmp_path):
    run = save_run(tmp_path / "r", kd=True)
    evaluation(str(run), HARD, 8.0).save(tmp_path / "scores")
    runs, entries = collect_runs([run, tmp_path / "scores"])
    assert ([r.name for r in runs], [e.name for e in entries]) == (["r"], ["r"])


def test_the_commands_behind_a_report_name_no_folder_of_the_machine(tmp_path):
    settings = {
        "cache": str(tmp_path / "cache"),
        "student": "demo",
        "loss": "kl",
        "lr": 1e-3,
        "seed": 0,
        "packing": True,
    }
    folder = tmp_path / "kl-seed0"
    folder.mkdir()
    facts = {"identity": {}, "complete": True, "settings": settings, "versions": {"torch": "2.1"}}
    (folder / "run.json").write_text(json.dumps(facts))
    (folder / "metrics.jsonl").write_text(json.dumps({"step": 1, "loss": 1.0}) + "\n")
    (run,), _ = collect_runs([folder])
    assert commands_of([run], [folder]) == ["kd train --cache …/cache --student demo --packing --lr 0.001"]
    assert versions_of([run, run], []) == "torch 2.1"
    cache, first = str(tmp_path / "cache"), str(tmp_path / "a-seed0")
    steps = {  # by name, as the file has them
        "a-seed0": ["train", "--cache", cache, "--out", first],
        "a-seed0/eval": ["eval", first, "--out", f"{first}/eval"],
        "cache": ["cache", "build", "--out", cache],
        "kl-seed0": ["train", "--seed", "0"],
        "kl-seed1/eval": ["eval", "x"],
    }
    (tmp_path / "experiment.json").write_text(json.dumps({"name": "mine", "seeds": [0, 1], "steps": steps}))
    assert commands_of([run], [folder]) == [
        "# kd experiment mine --seeds 0,1; seed 0:",
        "kd cache build --out …/cache",
        "kd train --cache …/cache --out …/a-seed0",
        "kd eval …/a-seed0 --out …/eval",
        "kd train --seed 0",
    ]
