"""kd experiment as a user runs it: once, again, with more seeds, and with what is wrong."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import pytest
from terminal import kd

from kd.cli import cli
from kd.commands import experiment as module
from kd.commands import recipe as recipe_module
from kd.common.errors import DataError
from kd.evaluation.results import load_report
from kd.recipes.experiment_file import FOLDER, experiment_names, load_experiment
from kd.recipes.steps import Step

TEXT = "The fox went down to the river to look at the fish, and came home with a story. There were {} ships.\n"


@pytest.fixture(scope="module")
def file(tmp_path_factory, model_dir: Path) -> Path:
    """Two arms of two steps on six short documents."""
    folder = tmp_path_factory.mktemp("experiment")
    (folder / "text.txt").write_text("<|endoftext|>\n".join(TEXT.format(n) for n in range(6)))
    (folder / "small.yaml").write_text(f"""
about: Small & <quick>
seeds: [0, 1]
cache: {{teacher: "{model_dir}", data: "{folder}/text.txt", top-k: 4, seq-len: 32, device: cpu}}
train: {{student: "{model_dir}", max-steps: 2, batch-size: 2, log-every: 1, device: cpu}}
arms: {{plain: {{loss: ce}}, taught: {{loss: kl}}}}
evaluate: {{tasks: "perplexity", data: "{folder}/text.txt", seq-len: 32, device: cpu, allow-contaminated: true}}
""")
    return folder / "small.yaml"


def test_it_runs_continues_and_takes_more_seeds(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    out = tmp_path / "run"
    planned = kd("experiment", file, "--out", out, "--plan")
    assert not out.exists()
    assert planned.count("kd train ") == 4
    # stopped after the first pair: the next run must not do again what is done
    done: list[str] = []

    def counted(command: str, runner: Callable[[Step], object]) -> Callable[[Step], object]:
        def run(step: Step) -> object:
            if len(done) == 6:
                raise KeyboardInterrupt("stopped", "continue this step")
            done.append(command)
            return runner(step)

        return run

    original = recipe_module.RUNNERS
    monkeypatch.setattr(recipe_module, "RUNNERS", {c: counted(c, runner) for c, runner in original.items()})
    with pytest.raises(click.exceptions.Abort) as stopped:
        cli.main(["experiment", str(file), "--out", str(out)], standalone_mode=False)
    assert isinstance(stopped.value.__cause__, KeyboardInterrupt)
    assert stopped.value.__cause__.args == ()  # how to continue the experiment is not how to continue the step
    assert done == ["cache build", "eval", "train", "eval", "train", "eval"]
    kept = (out / "plain-seed0" / "run.json").read_bytes()
    monkeypatch.setattr(recipe_module, "RUNNERS", original)
    document = json.loads(kd("experiment", file, "--out", out, "--json"))
    assert (out / "plain-seed0" / "run.json").read_bytes() == kept
    (pair,) = document["reference"]["pairs"]
    assert (pair["baseline"], pair["other"], pair["seeds"]) == ("plain", "taught", [0, 1])
    assert [d["column"] for d in pair["differences"]] == ["perplexity", "bits per byte"]
    assert pair["differences"][0]["p_permutation"] in (0.5, 1.0)
    text = (out / "report" / "report.md").read_text()
    assert "What the cache holds" in text
    assert "# Small &amp; &lt;quick&gt;" in text
    more = json.loads(kd("experiment", file, "--out", out, "--seeds", "0,1,2", "--json"))
    assert more["reference"]["pairs"][0]["seeds"] == [0, 1, 2]
    assert (out / "plain-seed0" / "run.json").read_bytes() == kept
    other = file.with_name("other.yaml")
    other.write_text(file.read_text().replace("max-steps: 2", "max-steps: 3"))
    with pytest.raises(DataError, match="other settings") as caught:
        kd("experiment", other, "--out", out)
    assert caught.value.details["now"] == '["3"]'


@pytest.mark.parametrize(
    ("old", "new", "error", "words"),
    [
        ("loss: kl", "loss: klx", DataError, "unknown loss"),
        ("max-steps", "max-step", DataError, "did you mean  max-steps"),
        ("seq-len: 32, device", "seq-length: 32, device", DataError, "did you mean  seq-len"),
        ("allow-contaminated", "alow-contaminated", DataError, "did you mean  allow-contaminated"),
        ('tasks: "perplexity"', "tasks: perplexty", DataError, "unknown task"),
        ("batch-size: 2", "batch-size: x", DataError, "batch_size 'x'"),
    ],
)
def test_what_is_wrong_in_a_late_step_is_said_before_the_first(
    file: Path, tmp_path: Path, old: str, new: str, error, words: str
):
    other = tmp_path / "wrong.yaml"
    assert old in file.read_text()
    other.write_text(file.read_text().replace(old, new))
    with pytest.raises(error, match=words):
        cli.main(["experiment", str(other), "--out", str(tmp_path / "run")], standalone_mode=False)
    assert not (tmp_path / "run").exists()


def test_a_step_that_wrote_nothing_may_be_mended(file: Path, tmp_path: Path):
    chosen = load_experiment(str(file))
    first = chosen.recipe.fill(tmp_path / "run", {})
    mended = replace(chosen, train={**chosen.train, "max-steps": 3}).recipe.fill(tmp_path / "run", {})
    module.open_folder(chosen, tmp_path / "run", first)
    module.open_folder(chosen, tmp_path / "run", mended)
    (tmp_path / "run" / "plain-seed0").mkdir()
    with pytest.raises(DataError, match="other settings"):
        module.open_folder(chosen, tmp_path / "run", first)


@pytest.mark.parametrize("name", experiment_names())
def test_every_word_of_the_packages_experiments_is_one_that_its_command_knows(name: str):
    planned = kd("experiment", name, "--plan")
    chosen = load_experiment(name)
    trainings = len(chosen.runs) + sum(step["command"] == "train" for step in chosen.before)
    assert planned.count("kd train ") == trainings
    assert name in str(module.experiment.help)


def test_a_folder_of_something_else_is_left_alone(file: Path, tmp_path: Path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(DataError, match="not empty"):
        kd("experiment", file, "--out", tmp_path)


def test_the_chat_experiment_runs_offline(tmp_path: Path) -> None:
    """At a hundredth of its size: teacher, cache, two students, and held-out figures with their errors."""
    text = (FOLDER / "demo-chat.yaml").read_text(encoding="utf-8")
    for pattern, short in (
        (r"max-steps: \d+", "max-steps: 2"),
        (r"limit: \d+", "limit: 3"),
        (r"-batch: \d+", "-batch: 512"),
    ):
        text = re.sub(pattern, short, text)
    (tmp_path / "demo-chat.yaml").write_text(text, encoding="utf-8")
    kd("experiment", tmp_path / "demo-chat.yaml", "--out", tmp_path / "run")
    for name in ("teacher", "finetuned-seed0", "distilled-seed0"):
        report = load_report(tmp_path / "run" / name / "eval")
        assert report.tasks["perplexity"]["perplexity"]["stderr"] > 0
        assert report.tasks["generation"]["exact_match"]["n"] == 12  # four turns of three conversations
        assert report.documents["generation"]["count"] == 3


def test_the_demo_of_chats_is_this_experiment(tmp_path: Path, monkeypatch) -> None:
    shown: list[Any] = []
    monkeypatch.setattr(
        module, "run_and_show", lambda chosen, folder, steps, as_json: shown.append((chosen, folder, steps))
    )
    kd("demo", "--chat", "--out", tmp_path / "chat")
    ((chosen, folder, steps),) = shown
    assert (chosen, folder) == (load_experiment("demo-chat"), tmp_path / "chat")
    assert [step.words for step in steps] == [step.words for step in chosen.recipe.fill(folder, {})]
