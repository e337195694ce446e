"""Recipes say what they would run, refuse what they do not know, and every one of them runs."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import click
import pytest
from teacher_server import TeacherServer
from terminal import kd

from kd.cli import cli
from kd.common.errors import DataError
from kd.recipes.recipe_file import FOLDER, Recipe, load_recipe, recipe_names
from kd.recipes.run_steps import check_steps
from kd.recipes.steps import Step

NAMES = recipe_names()


def test_the_reference_systems_are_there():
    assert {"oscarnav-four", "oscarnav-ten", "uld-paper", "neo-wikitext"} <= set(NAMES)
    assert sorted(p.stem for p in FOLDER.glob("*.yaml")) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_every_word_of_a_recipe_is_one_that_its_command_knows(name: str, tmp_path: Path):
    recipe = load_recipe(name)
    assert recipe.about
    steps = recipe.fill(tmp_path, {})
    check_steps(steps)
    for words in [step.words for step in steps]:
        command: click.Command = cli
        while isinstance(command, click.Group):
            command, words = command.commands[words[0]], words[1:]
        command.make_context(
            "kd", words, help_option_names=["-h", "--help"]
        )  # raises on an unknown option or a value of the wrong type


def test_variables_are_filled_in_and_an_empty_one_takes_its_option_away(tmp_path: Path):
    recipe = load_recipe("oscarnav-four")
    words = [shlex.join(step.words) for step in recipe.fill(tmp_path, {"student": "MINE"})]
    assert "--student MINE" in words[1]
    assert "--task-root" not in words[0]
    assert "--task-root T" in shlex.join(recipe.fill(tmp_path, {"task-root": "T"})[0].words)
    assert "--load-in-4bit --data flan:four" in words[0]


@pytest.mark.parametrize(("value", "words"), [("true", ["--eos"]), ("false", ["--no-eos"]), ("", [])])
def test_a_variable_may_hold_a_switch(tmp_path: Path, value: str, words: list[str]):
    (tmp_path / "r.yaml").write_text("variables: {end: true}\nsteps: [{command: cache build, options: {eos: '{end}'}}]")
    (step,) = load_recipe(str(tmp_path / "r.yaml")).fill(tmp_path, {"end": value})
    assert step.words == ["cache", "build", *words]
    assert load_recipe(str(tmp_path / "r.yaml")).fill(tmp_path, {})[0].words[2:] == ["--eos"]


def test_unknown_names_suggest_the_nearest(tmp_path: Path):
    with pytest.raises(DataError) as caught:
        load_recipe("oscarnav-for")
    assert caught.value.details["did you mean"] == "oscarnav-four"
    with pytest.raises(DataError) as caught:
        load_recipe("oscarnav-four").fill(tmp_path, {"studnt": "x"})
    assert caught.value.details["did you mean"] == "student"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("steps: []", "not a recipe"),
        ("- a", "not a mapping"),
        ("steps: [{command: train, options: [x]}]", "step of the recipe cannot be read"),
        ("steps: [{command: train, arguments: x}]", "step of the recipe cannot be read"),
        ("steps: [{command: train, opts: {}}]", "unknown key of a step"),
        ("{variables: [x], steps: [{command: train}]}", "variables are not a mapping"),
        ("{variables: {x: {y: z}}, steps: [{command: train}]}", "variables are not a mapping"),
        ("a: [", "cannot read"),
        ("steps: [{command: cache bild}]", "unknown command"),
        ("steps: [run]", "unknown command"),
    ],
)
def test_a_file_that_is_no_recipe_says_so(tmp_path: Path, text: str, words: str):
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(DataError, match=words):
        load_recipe(str(tmp_path / "r.yaml"))


def test_a_variable_that_is_not_there_is_named(tmp_path: Path):
    (tmp_path / "r.yaml").write_text("steps: [{command: train, options: {student: '{who}'}}]")
    with pytest.raises(DataError, match="does not have") as caught:
        load_recipe(str(tmp_path / "r.yaml")).fill(tmp_path, {})
    assert "{who}" in str(caught.value)


@pytest.mark.parametrize("value", ["{out.__class__}", "{out!r}", "{out:>9999999999}", "{}", "{out[0]}"])
def test_formats_and_attributes_are_no_variables(tmp_path: Path, value: str):
    (tmp_path / "r.yaml").write_text(f"steps: [{{command: train, options: {{student: '{value}'}}}}]")
    with pytest.raises(DataError, match="plain field names"):
        load_recipe(str(tmp_path / "r.yaml")).fill(tmp_path, {})


def test_a_variable_that_is_repeated_does_not_fill_the_memory(tmp_path: Path):
    (tmp_path / "r.yaml").write_text(
        f"variables: {{a: {'x' * 9000}}}\nsteps: [{{command: train, options: {{student: '{{a}}'}}}}]"
    )
    with pytest.raises(DataError, match="too long"):
        load_recipe(str(tmp_path / "r.yaml")).fill(tmp_path, {})


@pytest.mark.parametrize("place", ["{out}/../../x", "/etc/kd", "runs/x", "~/x", "{out}-more", "{out}/link/x"])
def test_a_recipe_writes_below_its_folder_alone(tmp_path: Path, place: str):
    out = tmp_path / "run"
    out.mkdir()
    (out / "link").symlink_to(tmp_path)
    (tmp_path / "c.yaml").write_text(f"out: '{place.format(out=out)}'")
    for options in (f"out: '{place}'", f"config: '{tmp_path}/c.yaml'"):
        (tmp_path / "r.yaml").write_text(
            f"steps: [{{command: train, options: {{student: demo, cache: '{{out}}/cache', {options}}}}}]"
        )
        with pytest.raises(DataError, match="outside of the recipe's folder"):
            check_steps(load_recipe(str(tmp_path / "r.yaml")).fill(out, {}))
    check_steps(load_recipe("oscarnav-four").fill(out, {}))


def test_show_prints_what_run_would_do(tmp_path: Path):
    shown = json.loads(kd("recipe", "show", "uld-paper", "--out", tmp_path, "--set", "student=S", "--json"))
    assert [" ".join(c[:2]) if c[0] == "cache" else c[0] for c in shown["commands"]] == [
        "cache build",
        "train",
        "train",
        "eval",
        "eval",
        "report",
    ]
    assert f"--out {tmp_path}/cache" in kd("recipe", "show", "uld-paper", "--out", tmp_path)
    assert set(NAMES) == set(json.loads(kd("recipe", "ls", "--json")))


@pytest.fixture(scope="module")
def served(model_dir: Path) -> Iterator[str]:
    """Address of a server that runs the tiny teacher."""
    server = TeacherServer(model_dir)
    yield server.url
    server.close()


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory, save_student, t5_dir: Path, model_dir: Path, served: str) -> dict[str, dict[str, str]]:
    """A tiny teacher, student and data set for each recipe."""
    folder = tmp_path_factory.mktemp("stand-ins")
    save_student(folder / "student", n_positions=512, n_embd=16, n_layer=1)
    text = "".join(f"The keeper counted {n} ships in the fog. " * 8 + "\n<|endoftext|>\n" for n in range(12))
    (folder / "text.txt").write_text(text)
    (folder / "held.txt").write_text("The baker sold bread to the keeper. " * 12)  # what was trained on is refused
    root = folder / "tasks" / "boolq"
    root.mkdir(parents=True)
    for split in ("train", "validation"):
        lines = [
            {"question": f"are there {n} ships", "passage": f"There are {n} ships.", "answer": n % 2 == 0}
            for n in range(70)
        ]
        (root / f"{split}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in lines))
    student = str(folder / "student")
    tasks = {
        "teacher": str(t5_dir),
        "student": student,
        "data": "flan:boolq",
        "eval-data": "flan:boolq",
        "task-root": str(folder / "tasks"),
        "eval-split": "dev",
        "eval-limit": "3",
    }
    return {
        "oscarnav-four": tasks,
        "oscarnav-ten": tasks,
        "uld-paper": tasks | {"teacher": str(model_dir)},
        "neo-wikitext": {
            "teacher": str(model_dir),
            "student": student,
            "data": str(folder / "text.txt"),
            "eval-data": str(folder / "held.txt"),
            "eval-split": "train",
        },
        "served-teacher": {
            "teacher": str(model_dir),
            "teacher-url": f"{served}/v1",
            "student": student,
            "data": str(folder / "text.txt"),
            "eval-data": str(folder / "held.txt"),
            "eval-split": "train",
        },
    }


@pytest.mark.parametrize("name", NAMES)
def test_every_recipe_runs_with_small_stand_ins(name: str, tmp_path: Path, stand_ins, monkeypatch: pytest.MonkeyPatch):
    """The recipe's own commands, but for what is too large for a tiny model: 4 bits, lengths beyond its positions."""
    smaller = {"seq-len": "64", "target-len": "16", "epochs": "0.5", "dtype": "float32", "precision": "fp32"}

    original = Recipe.fill

    def shortened(recipe: Recipe, out: Path, variables: dict[str, str]) -> list[Step]:
        steps = []
        for step in original(recipe, out, variables):
            options = {k: smaller.get(k, v) for k, v in step.options.items() if k != "load-in-4bit"}
            if step.command == "train":
                options["device"] = "cpu"
            steps.append(replace(step, options=options))
        return steps

    monkeypatch.setattr(Recipe, "fill", shortened)
    words = [f"--set={k}={v}" for k, v in stand_ins[name].items()]
    kd("recipe", "run", name, "--out", tmp_path / "run", *words)
    assert (tmp_path / "run" / "report" / "report.html").exists()
    for run in ("distilled", "finetuned"):
        assert json.loads((tmp_path / "run" / run / "run.json").read_text())["complete"]
    assert "done" in kd("recipe", "run", name, "--out", tmp_path / "run", *words)  # again: nothing is trained twice
