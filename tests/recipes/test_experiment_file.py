"""Experiment files: what they spell out, and what they refuse."""

from __future__ import annotations

from pathlib import Path

import pytest

from kd.common.errors import DataError
from kd.recipes.demo_outcome import NAMES
from kd.recipes.experiment_file import experiment_names, load_experiment, refuse_other_commands
from kd.recipes.run_steps import check_steps

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
    chosen = load_experiment(written(tmp_path, SMALL))
    steps = chosen.recipe.fill(Path("o"), {"text": "U"})
    commands = [" ".join(step.words) for step in steps]
    assert commands[0] == "train --out o/first --loss ce"
    assert commands[1] == "cache build --teacher o/first --data U --device cpu --out o/cache"
    assert commands[2] == "eval o/first --tasks perplexity --data U --device cpu --out o/teacher/eval"
    assert commands[3].endswith("--out o/teacher/eval-2")
    assert commands[4] == "train --student demo --max-steps 4 --loss ce --cache o/cache --seed 3 --out o/plain-seed3"
    assert commands[7] == "train --student demo --max-steps 5 --loss kl --cache o/cache --seed 3 --out o/taught-seed3"
    assert [str(step.out) for step in steps if step.command == "train"] == [
        "o/first",
        "o/plain-seed3",
        "o/taught-seed3",
        "o/plain-seed5",
        "o/taught-seed5",
    ]
    assert len({step.out for step in steps}) == len(steps)
    assert chosen.baseline == "plain"
    assert chosen.with_seeds([7]).runs == ["plain-seed7", "taught-seed7"]


def test_an_arm_may_read_a_cache_of_the_same_text_that_keeps_something_else(tmp_path: Path):
    text = SMALL.replace("{loss: kl, max-steps: 5}", "{loss: kl, cache: narrow}")
    chosen = load_experiment(written(tmp_path, text + "caches: {narrow: {top-k: 4, device: cpu}}"))
    commands = [" ".join(step.words) for step in chosen.recipe.fill(Path("o"), {})]
    assert commands[2] == "cache build --teacher o/first --data T --device cpu --top-k 4 --out o/cache-narrow"
    trained = [c for c in commands if c.startswith("train --student")]
    assert ["--cache o/cache-narrow" in c for c in trained] == [False, True, False, True]


def test_folders_may_have_other_names(tmp_path: Path):
    text = SMALL.replace("[3, 5]", "[3]") + "folders: {cache: soft, teacher: big, student: '{arm}', scores: scored}"
    chosen = load_experiment(written(tmp_path, text))
    outs = [str(step.out) for step in chosen.recipe.fill(Path("o"), {})]
    assert outs[1:7] == ["o/soft", "o/big/scored", "o/big/scored-2", "o/plain", "o/plain/scored", "o/plain/scored-2"]
    with pytest.raises(DataError, match="would share a folder"):
        chosen.with_seeds([3, 5])


@pytest.mark.parametrize("name", experiment_names())
def test_the_experiments_of_the_package_load_and_their_settings_are_valid(name: str, tmp_path: Path):
    chosen = load_experiment(name)
    assert chosen.about
    assert len(chosen.seeds) >= (1 if name in (*NAMES, "demo-chat") else 3)  # demos show one run of each student
    assert {**chosen.arms[chosen.baseline], "cache": ""} == {"loss": "ce", "cache": ""}
    for arm, options in chosen.arms.items():  # equal steps: arms differ in what they learn from alone
        assert set(options) <= {"loss", "alpha", "temperature", "cache", "merge"}, arm
    check_steps(chosen.recipe.fill(tmp_path, {}))


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
        ("seeds:", "folders: {cash: x}\nseeds:", "unknown folder"),
        ("seeds:", "folders: {cache: 1}\nseeds:", "not a mapping of names"),
        ("seeds:", "folders: {student: x}\nseeds:", "would share a folder"),
        ("seeds:", "folders: {scores: .}\nseeds:", "evaluations would share a folder"),
        ('out: "{out}/first", ', "", "no folder of its own"),
        ('teacher: "{out}/first", ', "", "no teacher"),
        ("seeds:", "seeds: [", "cannot read"),
        ("seeds:", "folders: {cache: ../x}\nseeds:", "leaves the experiment's"),
        ("seeds:", "folders: {student: '/x/{arm}{seed}'}\nseeds:", "leaves the experiment's"),
        ("taught:", "../../taught:", "leaves the experiment's"),
        ("[3, 5]", str(list(range(501))), "too many students"),
        ("{loss: kl, max-steps: 5}", "{loss: kl, cache: narow}", "unknown cache of the arm taught"),
        ("seeds:", "caches: {narrow: {data: x}}\nseeds:", "sets this option itself"),
        ("seeds:", "caches: {narrow: {seq_len: 3}}\nseeds:", "sets this option itself"),
        ("seeds:", "caches: [narrow]\nseeds:", "not a mapping"),
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
