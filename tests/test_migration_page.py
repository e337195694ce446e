"""docs/migration.md: what it calls ours is ours, and names of others that it explains are understood where they are typed."""

from __future__ import annotations

import re
from pathlib import Path

import click

from kd.cli import cli
from kd.common.synonyms import nearest_name

PAGE = (Path(__file__).parents[1] / "docs" / "migration.md").read_text(encoding="utf-8")


def options(words: str) -> set[str]:
    """Options of a `kd` command."""
    command: click.Command = cli
    for word in words.split():
        assert isinstance(command, click.Group)
        command = command.commands[word]
    return {option for parameter in command.params for option in parameter.opts}


def test_every_option_of_the_page_is_one_of_building_importing_or_training() -> None:
    ours = " ".join(
        line.split(" | ", 1)[1] for line in PAGE.splitlines() if line.startswith("| ") and " | " in line[2:]
    )
    named = set(re.findall(r"--[a-z0-9][a-z0-9-]+", ours))
    known = options("cache build") | options("train") | options("cache import")
    assert named - known == set()
    assert len(named) > 25


def test_names_typed_out_of_habit_suggest_ours() -> None:
    known = [option.removeprefix("--").replace("-", "_") for option in options("train")]
    for theirs, ours in (
        ("per_device_train_batch_size", "batch_size"),
        ("gradient_accumulation_steps", "accumulate"),
        ("learning_rate", "lr"),
        ("kd_alpha", "alpha"),
        ("kd_temperature", "temperature"),
        ("hub_model_id", "push_to_hub"),
        ("max_length", "seq_len"),
        ("sequence_len", "seq_len"),
        ("sample_packing", "packing"),
        ("kd_ce_alpha", "ce_weight"),
        ("kd_beta", "beta"),
    ):
        assert nearest_name(theirs, known) == ours, theirs
