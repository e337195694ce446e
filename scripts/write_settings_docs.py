"""Write docs/settings.md from the settings classes: `python scripts/write_settings_docs.py`, or with the API."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kd.cache_builder.build.build_settings import BuildSettings
from kd.cache_builder.exchange.import_settings import ImportSettings
from kd.commands.eval import EvalCommand
from kd.commands.train import TrainCommand
from kd.common.setting_fields import group_headings, settings_of
from kd.common.setting_values import Setting
from kd.evaluation.merged.merged_settings import ClassifierEvaluation, MatrixSettings, MergeRun
from kd.evaluation.report.systems.report_settings import ReportSettings
from kd.student_trainer.classify.classify_settings import ClassifyConfig

HEAD = """# Settings

Every setting has one name. It is an option of a command, a line of a YAML or JSON file (`--config FILE`), and an argument in
Python:

| where | spelling |
|---|---|
| command line | `--top-k 32`; for a switch that is on, `--no-bos` |
| file | `top-k: 32` or `top_k: 32`; `bos: false` |
| Python | `top_k=32`; `bos=False` |

A setting that is not given keeps its default. Where the default below is `None`, the text says what that means, or the data and the
model decide. An option overrides the file. An unknown name stops the program, and the error names the nearest one. [Settings in a
file](training.md#settings-in-a-file) has examples, and [the command reference](cli.md) the same texts by command.

This page is made from the classes of settings by `scripts/write_settings_docs.py`.
"""
SECTIONS: dict[str, tuple[Any, str]] = {
    "kd cache build": (BuildSettings, "`kd cache plan` takes the same settings, and in Python `kd.build_cache`."),
    "kd cache import": (ImportSettings, "In Python `kd.import_cache`."),
    "kd train": (TrainCommand, "In Python `kd.train`, without the scores during training."),
    "kd eval": (EvalCommand, "In Python `kd.evaluate`."),
    "kd report": (ReportSettings, "In Python `kd.make_report`."),
    "kd merge": (MergeRun, ""),
    "kd classify train": (ClassifyConfig, ""),
    "kd classify eval": (ClassifierEvaluation, ""),
    "kd classify matrix": (MatrixSettings, ""),
}
"""Command -> the class of its settings, and where else they are taken."""


def name_of(one: Setting) -> str:
    """What files and Python call a setting: its option, as a name."""
    return one.option.removeprefix("--").replace("-", "_")


def row(one: Setting) -> str:
    """A line of a table."""
    default = "required" if one.required else f"`{one.default!r}`"
    choices = f" One of {', '.join(f'`{choice}`' for choice in one.choices)}." if one.choices else ""
    meaning = re.sub(r"([|\[*])", r"\\\1", one.doc + choices).replace("<", "&lt;")
    return f"| `{name_of(one)}` | {default} | {meaning} |"


def tables(cls: Any) -> Iterator[str]:
    """A table for each group of settings, under the group's own heading; those of `cls` itself come first, without one."""
    headings, groups = group_headings(cls), dict[tuple[str, ...], list[Setting]]({(): []})
    for one in settings_of(cls).values():
        if not one.hidden:
            groups.setdefault(one.path[:-1], []).append(one)
    for path, group in groups.items():
        if path:
            yield f"**{headings[path]}**"
        if group:
            yield "\n".join(["| setting | default | meaning |", "|---|---|---|", *map(row, group)])


def render() -> str:
    """The whole page."""
    parts = [HEAD]
    for command, (cls, also) in SECTIONS.items():
        parts += ["\n\n".join(filter(None, [f"## `{command}`", also, *tables(cls)])) + "\n"]
    return "\n".join(parts)


if __name__ == "__main__":
    (Path(__file__).parents[1] / "docs" / "settings.md").write_text(render(), encoding="utf-8")
