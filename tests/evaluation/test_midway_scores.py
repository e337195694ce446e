"""`kd train --eval-tasks`: its lines are what `kd eval` finds, its refusals come first, and the report draws them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from evaluating import evaluated

from kd import cli
from kd.common.errors import DataError
from kd.evaluation.midway_scores import headline, plan_scores
from kd.evaluation.report.figures import Curve, draw_progress
from kd.evaluation.report.pairs import Arm
from kd.evaluation.report.score_curves import curves_of, over_seeds, progress_sections
from kd.models.model_request import ModelRequest
from kd.student_trainer.run_folder import EVALUATIONS, read_evaluations

SCENE = {
    "activity_label": "Fog",
    "ctx": "It rained.",
    "endings": ["It stopped.", "the fox", "bells", "a bridge"],
    "label": 0,
}
QUESTIONS = [
    {"premise": f"The fox went to the river {i} times.", "hypothesis": "It rained.", "label": i % 3} for i in range(5)
]


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> Path:
    """HellaSwag and ANLI rows of our own."""
    root = tmp_path_factory.mktemp("rows")
    for task, file, found in (("hellaswag", "dev", [SCENE] * 3), ("anli_r1", "test", QUESTIONS)):
        (root / task).mkdir()
        (root / task / f"{file}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found))
    return root


@pytest.fixture(scope="module")
def trained(tmp_path_factory, student_dirs, exact_cache, rows) -> tuple[Path, str]:
    """A run that was scored at every second step, and what the command said on stderr."""
    out = tmp_path_factory.mktemp("runs") / "student"
    command = [
        "train",
        "--cache",
        str(exact_cache),
        "--student",
        str(student_dirs[0]),
        "--out",
        str(out),
        "--device",
        "cpu",
        "--max-steps",
        "3",
        "--batch-size",
        "4",
        "--lr",
        "0.01",
        "--eval-tasks",
        "hellaswag,choices,agreement",
        "--eval-every",
        "2",
        "--eval-limit",
        "3",
        "--eval-data",
        "flan:anli_r1",
        "--eval-split",
        "test",
        "--eval-task-root",
        str(rows),
        "--json",
    ]
    done = CliRunner().invoke(cli.cli, command, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["evaluations"] == read_evaluations(out)
    return out, done.stderr


def test_lines_are_what_kd_eval_finds_before_and_after(trained, student_dirs, exact_cache, rows):
    from kd.data.data_settings import InstructionConfig

    out, _ = trained
    records = read_evaluations(out)
    assert [r["step"] for r in records] == [0, 2, 3]
    for record, model in ((records[0], student_dirs[0]), (records[-1], out)):
        report = evaluated(
            str(model),
            ["hellaswag", "choices", "agreement"],
            data="flan:anli_r1",
            split="test",
            cache=exact_cache,
            limit=3,
            device="cpu",
            instructions=InstructionConfig(0, task_root=rows),
        )
        for task, metrics in report.tasks.items():
            for name, figure in metrics.items():
                found = record["tasks"][task][name]
                assert found["n"] == figure["n"]
                assert found["value"] == pytest.approx(figure["value"], rel=1e-5), (task, name)
        assert record["settings"]["choices"]["template"] == "0"
    assert records[0]["tasks"]["agreement"]["kl_kept"]["value"] != records[-1]["tasks"]["agreement"]["kl_kept"]["value"]


def test_the_command_says_each_line_and_the_card_the_change(trained):
    out, stderr = trained
    assert "step 0: hellaswag acc_nanogpt" in stderr
    assert "step 3: hellaswag" in stderr
    assert " → " in (out / "README.md").read_text("utf-8")
    assert (
        headline({"step": 1000, "tasks": {"t": {"m": {"value": None, "stderr": None}}}}) == "step 1,000: t m not finite"
    )


def test_the_report_draws_the_scores_with_their_baseline(trained, tmp_path):
    out, _ = trained
    panels = curves_of([out, tmp_path])
    assert set(panels) == {
        "hellaswag: acc_norm (nanogpt) [share of examples]",
        "choices: accuracy [share of examples]",
        "agreement: KL to teacher, kept tokens and rest [nats per token]",
        "agreement: top-1 agreement [share of tokens]",
    }
    curve = panels["agreement: KL to teacher, kept tokens and rest [nats per token]"][0]
    assert curve.label == "student"
    assert curve.steps.tolist() == [0, 2, 3]
    assert curve.baseline == read_evaluations(out)[0]["tasks"]["agreement"]["kl_kept"]["value"]
    done = CliRunner().invoke(cli.cli, ["report", str(out), "--out", str(tmp_path / "report")], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    assert (tmp_path / "report" / "progress.png").read_bytes().startswith(b"\x89PNG")
    page = (tmp_path / "report" / "report.md").read_text("utf-8")
    assert "before the first step" in page
    table = page.partition("## Progress, agreement: top-1 agreement")[2].partition("## ")[0]
    assert [line.split("|")[1].strip() for line in table.splitlines() if line.startswith("|")] == [
        "step",
        ":--",
        "0",
        "2",
        "3",
    ]


def test_the_baseline_is_drawn_as_a_line_over_the_whole_width(tmp_path, monkeypatch):
    from matplotlib.axes import Axes

    drawn: list[float] = []
    line = Axes.axhline
    monkeypatch.setattr(Axes, "axhline", lambda self, y, **k: (drawn.append(y), line(self, y, **k))[1])
    known = Curve("a", np.array([0.0, 5.0]), np.array([0.25, 0.5]), np.array([0.1, np.nan]))
    late = Curve("b", np.array([5.0]), np.array([0.5]), np.array([0.1]))  # its start was not scored
    assert draw_progress(tmp_path / "p.png", {"m": [known, late]}).read_bytes().startswith(b"\x89PNG")
    assert drawn == [0.25]


def test_students_over_several_seeds_are_one_curve():
    steps = np.array([0.0, 5.0])
    names = ["kl-seed0", "kl-seed1", "kl-seed2"]
    seeds = [
        Curve(n, steps, np.array([4.0, v]), np.array([0.1, 0.1])) for n, v in zip(names, (1.0, 2.0, 3.0), strict=True)
    ]
    arm = Arm("kl", dict(enumerate(names)), 0, {})
    alike = [
        Curve(n, steps, np.array([4.0, v]), np.array([0.1, 0.1])) for n, v in (("steps100", 1.0), ("steps200", 2.0))
    ]
    mean, *alone = over_seeds([*seeds, *alike], [arm])
    assert mean.label == "kl"
    assert mean.values.tolist() == [4.0, 2.0]
    assert mean.errors == pytest.approx([0.0, 1 / 3**0.5])
    assert alone == alike, "names that end alike are not seeds"
    late = Curve("kl-seed2", steps[1:], np.array([9.0]), np.array([0.1]))
    assert over_seeds([*seeds[:2], late], [arm]) == [*seeds[:2], late], "they were scored at different steps"


def test_runs_that_were_not_scored_make_no_section_and_a_torn_line_no_trouble(tmp_path, trained):
    assert progress_sections([tmp_path], [], tmp_path / "out") == []
    torn = tmp_path / "torn"
    torn.mkdir()
    (torn / EVALUATIONS).write_text((trained[0] / EVALUATIONS).read_text() + '{"step": 9')
    assert len(next(iter(curves_of([torn]).values()))[0].steps) == 3
    (torn / EVALUATIONS).write_text('{"step": 9}\n')
    with pytest.raises(DataError, match="cannot be read"):
        curves_of([torn])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--eval-tasks", "helaswag"], "unknown task"),
        (["--eval-tasks", "choices"], "needs a text"),
        (["--eval-tasks", "hellaswag", "--eval-task-root", "nowhere"], "no files of the task"),
        (["--eval-tasks", "perplexity", "--eval-data", "PROSE"], "was trained on what it would be asked"),
        (["--eval-data", "PROSE"], "was trained on what it would be asked"),
    ],
)
def test_what_cannot_be_scored_is_refused_before_the_first_step(
    options, message, exact_cache, student_dirs, prose_file, tmp_path
):
    options = [str(prose_file) if o == "PROSE" else o for o in options]
    command = [
        "train",
        "--cache",
        str(exact_cache),
        "--student",
        str(student_dirs[0]),
        "--out",
        str(tmp_path / "run"),
        "--device",
        "cpu",
        "--max-steps",
        "1",
        *options,
    ]
    done = CliRunner().invoke(cli.cli, command)
    assert done.exit_code == (2 if "--eval-protocol" in options else 1)
    assert message in str(done.exception) or message in done.output
    assert not (tmp_path / "run").exists()


def test_a_distance_that_is_no_number_is_wrong_usage(exact_cache, student_dirs, tmp_path):
    command = [
        "train",
        "--cache",
        str(exact_cache),
        "--student",
        str(student_dirs[0]),
        "--out",
        str(tmp_path / "run"),
        "--eval-tasks",
        "agreement",
        "--eval-every",
        "often",
    ]
    assert CliRunner().invoke(cli.cli, command).exit_code == 2


def test_lines_of_known_text_are_marked(exact_cache, student_dirs, prose_file, student, tokenizer):
    request = ModelRequest(str(student_dirs[0]))
    plan = plan_scores(
        request, exact_cache, ["perplexity", "agreement"], data=str(prose_file), limit=2, allow_contaminated=True
    )
    record = plan.score(student, tokenizer)
    assert set(record["contaminated"]) == {"perplexity"}
    assert record["tasks"]["perplexity"]["perplexity"]["value"] > 1
