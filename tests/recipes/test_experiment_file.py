"""Experiment files: what they spell out, and what they refuse."""

from __future__ import annotations

from pathlib import Path

import pytest

from kd.common.errors import DataError
from kd.recipes.experiment_file import FOLDER, experiment_names, load_experiment, out_of, refuse_other_commands

SMALL = """
seeds: [3, 5]
variables: {text: T}
before: [{command: train, options: {out: "{out}/first", loss: ce}}]
cache: {teacher: "{out}/first", data: "{text}", device: cpu}
train: {student: demo, max-steps: 4}
arms: {plain: {loss: ce}, taught: {loss: kl, max-steps: 5}}
evaluate: [{tasks: perplexity, data: "{text}"}, {tasks: choices, data: mini}]
"""


def written(tmp_path: Path, text: str) -> str:
    path = tmp_path / "small.yaml"
    path.write_text(text)
    return str(path)


def test_an_experiment_is_a_recipe_written_out(tmp_path: Path):
    found = load_experiment(written(tmp_path, SMALL))
    commands = [" ".join(c) for c in found.recipe.commands(Path("o"), {"text": "U"})]
    assert commands[0] == "train --out o/first --loss ce"
    assert commands[1] == "cache build --teacher o/first --data U --device cpu --out o/cache"
    assert commands[2] == "eval o/first --tasks perplexity --data U --device cpu --out o/teacher/eval"
    assert commands[3].endswith("--out o/teacher/eval-2")
    assert commands[4] == "train --student demo --max-steps 4 --loss ce --cache o/cache --seed 3 --out o/plain-seed3"
    assert commands[7] == "train --student demo --max-steps 5 --loss kl --cache o/cache --seed 3 --out o/taught-seed3"
    assert [out_of(c.split()) for c in commands if c.startswith("train")] == [
        "o/first",
        "o/plain-seed3",
        "o/taught-seed3",
        "o/plain-seed5",
        "o/taught-seed5",
    ]
    assert len({out_of(c.split()) for c in commands}) == len(commands)
    assert found.baseline == "plain"
    assert found.with_seeds([7]).runs == ["plain-seed7", "taught-seed7"]


def test_the_experiments_of_the_package_load():
    assert {"kl-prose", "uld-mini", "kl-wikitext", "uld-tasks"} == set(experiment_names())
    for name in experiment_names():
        found = load_experiment(name)
        assert found.about
        assert len(found.seeds) >= 3
        assert found.arms[found.baseline] == {"loss": "ce"}
        for arm, own in found.arms.items():  # equal steps: an arm differs in what it learns from alone
            assert set(own) <= {"loss", "alpha", "temperature"}, arm
    assert sorted(p.stem for p in FOLDER.glob("*.yaml")) == experiment_names()


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("arms:", "arm:", "unknown key"),
        ("cache: {teacher", "cache: {out: x, teacher", "sets this option itself"),
        ("{loss: ce}, taught", "{loss: ce, seed: 4}, taught", "sets this option itself"),
        (", taught: {loss: kl, max-steps: 5}", "", "at least two arms"),
        ("{student: demo, max-steps: 4}", "5", "not a mapping"),
        ("{student: demo, max-steps: 4}", "", "no train"),
        ("[3, 5]", "[3, 3]", "each once"),
        ("[3, 5]", "many", "each once"),
        ("command: train", "command: tain", "unknown command"),
        ('out: "{out}/first", ', "", "no folder of its own"),
        ('teacher: "{out}/first", ', "", "no teacher"),
        ("seeds:", "seeds: [", "cannot read"),
    ],
)
def test_a_wrong_file_is_one_clear_error(tmp_path: Path, old: str, new: str, words: str):
    assert old in SMALL
    with pytest.raises(DataError) as caught:
        load_experiment(written(tmp_path, SMALL.replace(old, new)))
    assert words in str(caught.value)


def test_an_unknown_name_suggests_the_nearest():
    with pytest.raises(DataError) as caught:
        load_experiment("kl-pros")
    assert caught.value.details["did you mean"] == "kl-prose"


def test_a_folder_of_other_commands_is_refused_with_the_difference():
    before = {"a": ["train", "--lr", "1"], "b": ["eval"]}
    refuse_other_commands(before, {"a": ["train", "--lr", "1"], "c": ["eval", "x"]}, Path("o"))
    with pytest.raises(DataError) as caught:
        refuse_other_commands(before, {"a": ["train", "--lr", "2"]}, Path("o"))
    assert (caught.value.details["before"], caught.value.details["now"]) == ('["1"]', '["2"]')
