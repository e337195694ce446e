"""Recipes say what they would run, refuse what they do not know, and every one of them runs."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import click
import pytest
from terminal import kd

from kd.cli import cli
from kd.common.errors import DataError
from kd.recipes.recipe_file import FOLDER, load_recipe, recipe_names
from kd.recipes.run_steps import check_steps
from kd.recipes.steps import COMMANDS, TYPED

NAMES = recipe_names()


def test_the_reference_systems_are_there():
    assert {"oscarnav-four", "oscarnav-ten", "uld-paper", "neo-wikitext", "glue-merging", "flan"} <= set(NAMES)
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
        ("steps: [{command: recipe run}]", "unknown command"),
        ("steps: [{command: train, each: x}]", "unknown list"),
        ("{lists: {x: [a]}, steps: [{command: train, each: [x]}]}", "unknown list"),
        ("{lists: {x: a}, steps: [{command: train}]}", "lists of a recipe cannot be read"),
        ("{lists: {x: [[a]]}, steps: [{command: train}]}", "lists of a recipe cannot be read"),
        ("{lists: {x: [{a: [b]}]}, steps: [{command: train}]}", "variables are not a mapping"),
        ("{lists: {x: [a]}, steps: [{command: eval, arguments: [{each: y}]}]}", "unknown list"),
        ("{lists: {x: [a]}, steps: [{command: eval, arguments: [{each: x, txt: z}]}]}", "argument cannot be read"),
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


LISTED = """
variables: {first: A, second: B}
lists:
  models: [{name: one, student: "{first}"}, {name: two, student: "{second}"}]
  words: [x, "{second}"]
steps:
  - {each: models, command: train, options: {student: "{student}", out: "{out}/{name}"}}
  - {command: eval, arguments: [{each: models, text: "{out}/{name}"}, {each: words}, last]}
  - {command: eval, arguments: ["{second}"]}
"""


def listed(tmp_path: Path, **variables: str) -> list[str]:
    (tmp_path / "r.yaml").write_text(LISTED)
    steps = load_recipe(str(tmp_path / "r.yaml")).fill(Path("o"), variables)
    return [shlex.join(step.words) for step in steps]


def test_a_step_and_an_argument_are_repeated_for_a_list(tmp_path: Path):
    assert listed(tmp_path) == [
        "train --student A --out o/one",
        "train --student B --out o/two",
        "eval o/one o/two x B last",
        "eval B",
    ]


def test_what_an_empty_variable_would_make_is_left_out(tmp_path: Path):
    assert listed(tmp_path, second="") == ["train --student A --out o/one", "eval o/one x last"]


def test_an_entry_of_a_list_does_not_move_the_folder(tmp_path: Path):
    (tmp_path / "r.yaml").write_text(
        "{lists: {5: [{out: /etc}]}, steps: [{command: train, each: 5, options: {out: '{out}/x'}}]}"
    )
    (step,) = load_recipe(str(tmp_path / "r.yaml")).fill(tmp_path / "run", {})
    assert (step.out, step.folder) == (tmp_path / "run" / "x", tmp_path / "run")


def test_lists_do_not_multiply_without_bound(tmp_path: Path):
    many = ", ".join(map(str, range(500)))
    step = "{command: doctor, each: x}"
    (tmp_path / "r.yaml").write_text(f"{{lists: {{x: [{many}]}}, steps: [{step}, {step}, {step}]}}")
    with pytest.raises(DataError, match="too many steps"):
        load_recipe(str(tmp_path / "r.yaml")).fill(tmp_path, {})


def test_a_list_as_a_value_is_typed_as_its_command_reads_it(tmp_path: Path):
    (tmp_path / "r.yaml").write_text(
        "steps: [{command: cache build, options: {temperatures: [1, 2]}},"
        " {command: experiment, arguments: [mine], options: {set: [a=1, b=2]}}]"
    )
    build, experiment = load_recipe(str(tmp_path / "r.yaml")).fill(tmp_path, {})
    assert build.words[2:] == ["--temperatures", "1,2"]
    assert experiment.words == ["experiment", "mine", "--set", "a=1", "--set", "b=2"]


def test_every_command_but_the_recipe_itself_may_be_a_step():
    def leaves(command: click.Command, name: str) -> list[str]:
        if not isinstance(command, click.Group):
            return [name]
        found = [
            (one, command.get_command(click.Context(command), one))
            for one in command.list_commands(click.Context(command))
        ]
        return [leaf for one, inner in found if inner for leaf in leaves(inner, f"{name} {one}".strip())]

    assert {name for name in leaves(cli, "") if not name.startswith("recipe ")} == set(COMMANDS)
    assert len(set(COMMANDS)) == len(COMMANDS)


@pytest.mark.parametrize(
    "step",
    [
        "{command: cache pull, arguments: ['https://h/c', /etc/x]}",
        "{command: cache push, arguments: ['{out}/c', 'file:///etc/x']}",
        "{command: cache repair, arguments: [/etc/x]}",
        "{command: cache unlock, arguments: [/etc/x]}",
        "{command: cache show, arguments: [c], options: {html: /etc/x.html}}",
        "{command: cache info, arguments: [c], options: {plots: /etc/x}}",
        "{command: eval, arguments: [demo], options: {html: /etc/x.html}}",
        "{command: merge, options: {method: ties, pool: p, out: /etc/x}}",
        "{command: data ls, options: {log-file: /etc/x}}",
    ],
)
def test_no_command_writes_outside_of_the_folder(tmp_path: Path, step: str):
    (tmp_path / "r.yaml").write_text(f"steps: [{step}]")
    with pytest.raises(DataError, match="outside of the recipe's folder"):
        check_steps(load_recipe(str(tmp_path / "r.yaml")).fill(tmp_path / "run", {}))


@pytest.mark.parametrize("name", ["demo", "experiment"])
def test_a_command_with_a_folder_of_its_own_is_given_one(tmp_path: Path, name: str):
    (tmp_path / "r.yaml").write_text(f"steps: [{{command: {name}, arguments: [x]}}]")
    with pytest.raises(DataError, match="no folder of its own"):
        check_steps(load_recipe(str(tmp_path / "r.yaml")).fill(tmp_path / "run", {}))


def test_the_other_commands_run_as_they_are_typed_and_are_checked_before_the_first_runs(tmp_path: Path):
    (tmp_path / "r.yaml").write_text(
        "steps: [{command: data ls, options: {json: true}}, {command: data templates, arguments: [boolq]}]"
    )
    shown = kd("recipe", "run", tmp_path / "r.yaml", "--out", tmp_path / "run")
    assert shown.startswith(kd("data", "ls", "--json"))
    assert kd("data", "templates", "boolq") in shown
    (tmp_path / "r.yaml").write_text("steps: [{command: data ls}, {command: data templates, options: {label: x}}]")
    with pytest.raises(DataError, match="a step cannot be run") as caught:
        kd("recipe", "run", tmp_path / "r.yaml", "--out", tmp_path / "run")
    assert caught.value.details["where"] == "r: kd data templates"
    assert "data templates" in TYPED
