"""kd experiment as a user runs it: once, again, with more seeds, and with what is wrong."""

from __future__ import annotations

import json
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from kd.cli import cli
from kd.commands import experiment as module
from kd.common.errors import DataError
from kd.recipes.experiment_file import experiment_names, load_experiment

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


def kd(*words: object) -> str:
    result = CliRunner().invoke(cli, [str(w) for w in words], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def test_it_runs_continues_and_takes_more_seeds(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    out = tmp_path / "run"
    planned = kd("experiment", file, "--out", out, "--plan")
    assert not out.exists()
    assert planned.count("kd train ") == 4
    # stopped after the first pair: the next run must not do again what is done
    done: list[str] = []
    original = module.run_step  # type: ignore[attr-defined]

    def counted(command: list[str]) -> None:
        if len(done) == 6:
            raise KeyboardInterrupt
        done.append(command[0])
        original(command)

    monkeypatch.setattr(module, "run_step", counted)
    with pytest.raises(click.exceptions.Abort):
        cli.main(["experiment", str(file), "--out", str(out)], standalone_mode=False)
    assert done == ["cache", "eval", "train", "eval", "train", "eval"]
    kept = (out / "plain-seed0" / "run.json").read_bytes()
    monkeypatch.setattr(module, "run_step", original)
    document = json.loads(kd("experiment", file, "--out", out, "--json"))
    assert (out / "plain-seed0" / "run.json").read_bytes() == kept
    (pair,) = document["reference"]["pairs"]
    assert (pair["baseline"], pair["other"], pair["seeds"]) == ("plain", "taught", [0, 1])
    assert [d["column"] for d in pair["differences"]] == ["perplexity", "bits per byte"]
    assert pair["differences"][0]["p_permutation"] in (0.5, 1.0)
    text = (out / "report" / "report.md").read_text()
    assert "What the cache holds" in text
    assert "Small & <quick>" in text
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
        ("loss: kl", "loss: klx", click.UsageError, "'klx' is not one of"),
        ("max-steps", "max-step", click.UsageError, "--max-step"),
        ('tasks: "perplexity"', "tasks: perplexty", DataError, "unknown task"),
        ("batch-size: 2", "batch-size: x", click.UsageError, "'x'"),
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
    found = load_experiment(str(file))
    first = found.recipe.commands(tmp_path / "run", {})
    mended = [["3" if word == "2" else word for word in words] for words in first]
    module.open_folder(found, tmp_path / "run", first)
    module.open_folder(found, tmp_path / "run", mended)
    (tmp_path / "run" / "plain-seed0").mkdir()
    with pytest.raises(DataError, match="other settings"):
        module.open_folder(found, tmp_path / "run", first)


@pytest.mark.parametrize("name", experiment_names())
def test_every_word_of_the_packages_experiments_is_one_that_its_command_knows(name: str):
    assert kd("experiment", name, "--plan").count("kd train ") >= 6


def test_a_folder_of_something_else_is_left_alone(file: Path, tmp_path: Path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(DataError, match="not empty"):
        kd("experiment", file, "--out", tmp_path)
