"""Whatever stands at a place of a task, a recipe, an experiment, a pool or a configuration: it is read, or an error in words."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kd.common.errors import KdError
from kd.common.settings import flattened, make
from kd.common.strangers.yaml_file import parse_mapping, read_mapping, read_settings
from kd.data.data_settings import InstructionConfig
from kd.data.instruction_tasks.rendering import show_templates
from kd.data.instruction_tasks.task_files import task_of
from kd.recipes.experiment_file import load_experiment
from kd.recipes.recipe_file import load_recipe
from kd.recipes.run_steps import check_steps
from kd.student_trainer.configuration.train_config import TrainConfig
from kd.student_trainer.merging.pool import read_pool

ROOT = Path(__file__).parents[2]
LEAF = (
    st.none()
    | st.booleans()
    | st.integers(-(2**63) + 1, 2**63 - 1)
    | st.sampled_from([0, -1, 1, 1e308, float("nan"), float("inf"), 1e-320])
    | st.sampled_from(["", "..", "~", "/", "a/b", "{x}", "{answer}", "{out}", "{", "x" * 300, "0:1:2", "1e5", "nan"])
    | st.sampled_from(["\x1b[2J", "é\u202e", "train[:9%]", "(a+)+$", "random:x", "https://h/x.csv"])
)
VALUES = (
    LEAF
    | st.lists(LEAF, max_size=3)
    | st.dictionaries(st.sampled_from(["a", "column", "loss", "path"]), LEAF, max_size=3)
)


def changed(draw: Callable[..., Any], value: Any) -> Any:
    """A document with one place changed, taken away, doubled or renamed."""
    if isinstance(value, dict) and value and draw(st.integers(0, 5)):
        key = draw(st.sampled_from(sorted(value, key=str)))
        kind = draw(st.integers(0, 9))
        if kind == 0:
            return {k: v for k, v in value.items() if k != key}
        if kind == 1:
            return {(draw(LEAF) if k == key else k): v for k, v in value.items()}
        return value | {key: changed(draw, value[key])}
    if isinstance(value, list) and value and draw(st.integers(0, 5)):
        place = draw(st.integers(0, len(value) - 1))
        return [*value[:place], changed(draw, value[place]), *value[place + draw(st.integers(0, 1)) :]]
    return draw(VALUES)


def read_task(file: Path) -> None:
    task = task_of(read_mapping(file, "task file"), "mine", str(file))
    show_templates(task, InstructionConfig())


def read_recipe(file: Path) -> None:
    check_steps(load_recipe(str(file)).fill(file.parent / "run", {}))


def read_experiment(file: Path) -> None:
    check_steps(load_experiment(str(file)).recipe.fill(file.parent / "run", {}))


def read_config(file: Path) -> None:
    make(TrainConfig, flattened(TrainConfig, read_settings(file), where=file), where=file)


POOL = {
    "base": "a",
    "models": [{"name": "cola", "path": "x", "revision": "y", "data": "demo"}, {"name": "b", "path": "c"}],
}
CONFIG = {
    "cache": "c",
    "student": "demo",
    "out": "o",
    "lr": 5e-4,
    "objective": {"loss": "kl", "temperature": 2.0, "alpha": 0.5},
    "epochs": 1,
    "seed": 3,
    "logging": {"save_every": 3, "report_to": "none"},
    "adapters": {"lora": 4},
    "batches": {"batch_size": 4},
}
TASKS = [
    read_mapping(next(ROOT.glob(f"data/instruction_tasks/instructions/*/{name}.yaml")), "task file")
    for name in (
        *("boolq", "samsum", "cosmos_qa", "common_gen", "stsb", "arc_challenge"),
        *("winogrande", "record", "dart", "quac", "web_nlg", "sentiment140", "trivia_qa"),
    )
]
RECIPE = read_mapping(ROOT / "recipes" / "oscarnav-four.yaml", "recipe")
EXPERIMENT = read_mapping(ROOT / "recipes" / "experiments" / "uld-tasks.yaml", "experiment")
KINDS: dict[str, tuple[Callable[[Path], object], list[Any]]] = {
    "task": (read_task, TASKS),
    "recipe": (read_recipe, [RECIPE]),
    "experiment": (read_experiment, [EXPERIMENT]),
    "pool": (read_pool, [POOL]),
    "config": (read_config, [CONFIG]),
}
"""Kind of a file -> what reads it, and files that are right."""


def strange(kind: str, examples: int, folder: Path) -> None:
    read, documents = KINDS[kind]

    @settings(max_examples=examples, suppress_health_check=list(HealthCheck), derandomize=True)
    @given(st.data())
    def attempt(data: st.DataObject) -> None:
        document = changed(data.draw, data.draw(st.sampled_from(documents)))
        text = yaml.safe_dump(document, allow_unicode=False)
        (folder / "file.yaml").write_text(text, encoding="utf-8")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # re warns about sets that look nested
            with suppress(KdError):
                read(folder / "file.yaml")

    attempt()


@pytest.mark.parametrize("kind", KINDS)
def test_one_strange_place_is_an_error_in_words(kind: str, tmp_path: Path) -> None:
    read, documents = KINDS[kind]
    for number, document in enumerate(documents):
        text = yaml.safe_dump(document)
        (tmp_path / "file.yaml").write_text(text, encoding="utf-8")
        assert parse_mapping(text, kind, number) == document
        read(tmp_path / "file.yaml")  # the file itself is right
    strange(kind, 60, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_strange_places_for_long(kind: str, tmp_path: Path) -> None:
    strange(kind, 2000, tmp_path)
