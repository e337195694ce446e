"""Experiment files: what they spell out, and what they refuse."""

from __future__ import annotations

from itertools import pairwise
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
    assert chosen.is_sweep or {**chosen.arms[chosen.baseline], "cache": ""} == {"loss": "ce", "cache": ""}
    known = {"loss", "alpha", "ce-weight", "temperature", "cache", "merge", "tail"}
    known = {"student", "cache"} if chosen.is_sweep else known
    for (
        arm,
        options,
    ) in chosen.arms.items():  # equal steps: arms differ in what they learn from, those of scale in the student
        assert set(options) <= known, arm
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


SWEEP = """
seeds: [0]
variables: {world: mini-flan}
cache: {teacher: demo, data: "{world}"}
train: {student: demo, max-steps: 4}
sweep: {arm: "{value}-templates", values: [1, 2], cache: {first-templates: "{value}"}}
evaluate: {tasks: choices, data: "{world}"}
"""


def test_the_arms_of_a_sweep_have_a_cache_each_and_all_are_built_first(tmp_path: Path):
    chosen = load_experiment(written(tmp_path, SWEEP))
    commands = [" ".join(step.words) for step in chosen.recipe.fill(Path("o"), {})]
    assert [c.split(" --")[0] for c in commands] == [
        *["cache build"] * 2,
        "eval demo",
        *("train", "eval o/1-templates-seed0", "train", "eval o/2-templates-seed0"),
    ]
    assert commands[0].endswith("--first-templates 1 --out o/cache-1-templates")
    assert "--cache o/cache-2-templates" in commands[5]
    assert chosen.baseline == "1-templates"


def test_a_sweep_over_students_shares_one_cache_and_scores_each_before_its_training(tmp_path: Path):
    text = SWEEP.replace("cache: {first-templates: ", "train: {student: ").replace(
        'arm: "{value}-templates", values: [1, 2]', "values: {a: demo, b: gpt2}"
    )
    chosen = load_experiment(written(tmp_path, f"{text}untrained: true\n"))
    steps = chosen.recipe.fill(Path("o"), {})
    assert [str(step.out) for step in steps][:4] == [
        "o/cache",
        "o/teacher/eval",
        "o/untrained-a/eval",
        "o/untrained-b/eval",
    ]
    assert [step.arguments for step in steps[2:4]] == [("demo",), ("gpt2",)]
    assert [step.options["student"] for step in steps if step.command == "train"] == ["demo", "gpt2"]


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("sweep:", "arms: {a: {}, b: {}}\nsweep:", "makes the arms"),
        ("values: [1, 2]", "values: [1]", "at least two values"),
        ("values: [1, 2]", "values: [1, 1]", "at least two values"),
        ("values: [1, 2]", "values: {a: 1, b: 2}", "at least two values"),
        ('arm: "{value}-templates"', "arm: x", "at least two values"),
        ('first-templates: "{value}"', "first-templates: 3", "uses its value"),
        ("values: [1, 2],", "values: [1, 2], train: {cache: x},", "sets this option itself"),
        ("first-templates", "out", "sets this option itself"),
        ("sweep: {", "sweep: {over: 1, ", "unknown key of a sweep"),
        ("evaluate:", "untrained: many\nevaluate:", "true or false"),
        ('{arm: "{value}-templates", values: [1, 2], cache: {first-templates: "{value}"}}', "7", "not a mapping"),
        ('arm: "{value}-templates"', 'arm: "../{value}"', "leaves the experiment's"),
    ],
)
def test_a_wrong_sweep_is_one_clear_error(tmp_path: Path, old: str, new: str, words: str):
    assert old in SWEEP
    with pytest.raises(DataError) as caught:
        load_experiment(written(tmp_path, SWEEP.replace(old, new)))
    assert words in str(caught.value)


def test_the_clusters_of_flans_ablation_are_added_in_its_order():
    chosen = load_experiment("flan-clusters")
    clusters = [str(chosen.caches[arm]["data"]).partition("=")[2].split(",") for arm in chosen.arms]
    assert [len(c) for c in clusters] == [1, 2, 3, 4, 5, 6, 7]
    assert all(longer[:-1] == shorter for shorter, longer in pairwise(clusters))
    assert clusters[-1] == [
        *("summarization", "translation", "reading_comprehension", "sentiment", "struct_to_text", "coreference"),
        "conversational_qa",
    ]
    assert [dict(load_experiment("flan-tasks").caches[f"{n}-per-cluster"]) for n in (1, 4)] == [
        {"tasks-per-cluster": 1},
        {"tasks-per-cluster": 4},
    ]
    assert list(load_experiment("flan-templates").arms) == [f"{n}-templates" for n in (1, 2, 4, 7, 10)]


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
