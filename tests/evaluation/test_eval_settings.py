"""The settings of an evaluation: every task finds its options, and names, texts and files mean the same."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from click.testing import CliRunner

from kd import cli
from kd.common.errors import DataError
from kd.common.setting_fields import settings_of
from kd.common.settings import flat, make
from kd.evaluation.eval_settings import EvalSettings
from kd.evaluation.evaluator import check_tasks
from kd.evaluation.tasks.task_registry import TASKS


def test_every_group_of_options_is_that_of_a_task_or_shared() -> None:
    groups = {one.path[0] for one in settings_of(EvalSettings).values() if len(one.path) > 1}
    assert groups - {"shared"} <= set(TASKS)
    options = {name: EvalSettings().options_of(name) for name in TASKS}
    assert {name for name, one in options.items() if one is not None} == groups - {"shared"}
    assert all(dataclasses.is_dataclass(one) for one in options.values() if one is not None)


def test_text_as_typed_and_values_make_the_same_settings() -> None:
    typed = {"tasks": "choices, hellaswag", "separator": "\\n", "metrics": "rougeL,bleu", "cache": "a=0.7,b=0.3"}
    settings = make(EvalSettings, typed, typed=True)
    assert settings.tasks == ("choices", "hellaswag")
    assert settings.shared.reading.separator == "\n"
    assert settings.generation.metrics == ("rougeL", "bleu")
    assert make(EvalSettings, flat(settings)) == settings


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"tasks": ()}, "no task was named"),
        ({"tasks": "perplexty", "data": "demo"}, "unknown task"),
        ({"tasks": "samples"}, "needs prompts"),
        ({"tasks": "agreement", "teacher": "demo"}, "follows one teacher on one text"),
        ({"tasks": "agreement", "teacher": "demo", "data": "demo", "cache": "x"}, "follows one teacher on one text"),
        ({"tasks": "perplexity", "teacher": "demo", "data": "demo"}, "no task asks for a teacher"),
    ],
)
def test_what_a_task_needs_is_checked_before_anything_is_loaded(values: dict[str, object], message: str) -> None:
    with pytest.raises(DataError, match=message):
        check_tasks(make(EvalSettings, values))


def test_a_file_gives_the_settings_and_options_override_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[EvalSettings] = []

    def evaluation_report(model: str, settings: EvalSettings) -> None:
        seen.append(settings)
        raise DataError("enough")

    monkeypatch.setattr("kd.commands.eval.evaluation_report", evaluation_report)
    file = tmp_path / "eval.yaml"
    file.write_text("tasks: hellaswag\nhellaswag: {protocol: harness}\nseq-len: 100\nlimit: 7\n")
    CliRunner().invoke(cli.cli, ["eval", "demo", "--config", str(file), "--limit", "9"])
    assert [(s.tasks, s.hellaswag.protocol) for s in seen] == [(("hellaswag",), "harness")]
    assert (seen[0].shared.reading.seq_len, seen[0].shared.data.limit) == (100, 9)
    file.write_text("protocl: harness\n")
    done = CliRunner().invoke(cli.cli, ["eval", "demo", "--config", str(file)])
    assert isinstance(done.exception, DataError)
    assert done.exception.details["did you mean"] == "protocol"


def test_no_further_metrics_can_be_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[EvalSettings] = []
    monkeypatch.setattr("kd.commands.eval.evaluation_report", lambda model, settings: seen.append(settings))
    CliRunner().invoke(cli.cli, ["eval", "demo", "--metrics", ""])
    CliRunner().invoke(cli.cli, ["eval", "demo"])
    assert [s.generation.metrics for s in seen] == [(), None]
