"""The settings of a build: what the command line, files, saved options and Python call them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import get_args, get_type_hints

import click
import pytest
from click.testing import CliRunner

from kd.cache_builder.build.build_settings import AnswerSettings, BlockSettings, BuildSettings, RunningSettings
from kd.cache_builder.build.together.engines import ENGINES
from kd.cache_builder.store.encoding.logprob_codecs import CODECS
from kd.cache_builder.store.profiles import PROFILES
from kd.cache_builder.store.records.manifest import load_manifest
from kd.cli import cli
from kd.common.errors import DataError
from kd.common.setting_fields import settings_of
from kd.common.setting_values import as_text
from kd.common.settings import flat, make
from kd.data.tokenizing.block_config import OVERLONG
from kd.models.model_request import DTYPES

LEAST = {"teacher": "demo", "spec": "demo", "out": "runs/cache"}


def option(command: str, name: str) -> click.Parameter:
    group = cli.get_command(click.Context(cli), "cache")
    assert isinstance(group, click.Group)
    found = group.get_command(click.Context(group), command)
    assert found is not None
    return next(parameter for parameter in found.params if parameter.name == name)


def test_a_build_needs_a_teacher_a_text_and_a_folder():
    with pytest.raises(DataError, match="settings are missing") as error:
        make(BuildSettings, {})
    assert str(error.value.details["expected"]) == "--teacher, --data, --out"
    settings = make(BuildSettings, LEAST)
    assert (settings.model.teacher, settings.data.spec, settings.out) == ("demo", "demo", Path("runs/cache"))


@pytest.mark.parametrize("command", ["build", "plan"])
@pytest.mark.parametrize(
    ("name", "registry"),
    [
        ("profile", PROFILES),
        ("logprob_codec", CODECS),
        ("dtype", DTYPES),
        ("overlong", OVERLONG),
        ("engine", ENGINES),
        ("target_source", ("data", "teacher")),
    ],
)
def test_fixed_choices_are_those_of_the_code_and_refused_by_the_command_line(command, name, registry, tmp_path):
    assert set(settings_of(BuildSettings)[name].choices) == set(registry)
    assert isinstance(option(command, name).type, click.Choice)
    words = ["--teacher", "demo", "--data", "demo", "--out", str(tmp_path / "c")]
    flag = settings_of(BuildSettings)[name].option
    refused = CliRunner().invoke(cli, ["cache", command, *words, flag, "nonsense"])
    assert refused.exit_code == 2
    assert all(choice in refused.output for choice in registry)
    with pytest.raises(DataError):
        make(BuildSettings, LEAST | {name: "nonsense"})


def test_every_setting_is_an_option_of_both_commands_with_a_help_text():
    for command in ("build", "plan"):
        for name, one in settings_of(BuildSettings).items():
            parameter = option(command, name)
            assert one.option in [*parameter.opts, *parameter.secondary_opts]
            assert isinstance(parameter, click.Option)
            assert parameter.help
            assert parameter.help.startswith(one.doc.rstrip("."))


def test_settings_survive_being_typed():
    """What a cache records of a file's settings is text; read back it must be the same settings."""
    given = LEAST | {
        "columns": {"prompt": "question", "target": "answer"},
        "temperatures": [1, 2.5],
        "separator": "\n\t",
        "bos": False,
        "template": 3,
        "sample_temperature": 0.1,
        "target_source": "teacher",
        "task_root": "rows",
        "load_in_4bit": True,
        "seed": 7,
    }
    settings = make(BuildSettings, given)
    typed = {name: as_text(flat(settings)[name]) for name in given}
    assert all(isinstance(value, str | bool) for value in typed.values())
    assert make(BuildSettings, typed) == settings


@pytest.mark.parametrize("text", ["x", "1", "1/", "/2", "1/2/3", "a/b"])
def test_a_part_is_two_numbers(text: str):
    with pytest.raises(DataError, match="shard"):
        make(BuildSettings, LEAST | {"shard": text})
    assert make(BuildSettings, LEAST | {"shard": "2/8"}).running.shard == (2, 8)


def test_sampling_without_answers_of_the_teacher_is_refused():
    with pytest.raises(DataError, match="nothing is sampled"):
        AnswerSettings(sample_temperature=0.5)


def test_a_group_of_the_wrong_types_is_refused():
    with pytest.raises(DataError):
        BlockSettings(seq_len="many")  # type: ignore[arg-type]
    with pytest.raises(DataError):
        RunningSettings(workers=0)


def test_no_two_groups_share_the_name_of_a_setting_or_of_each_other():
    groups = get_type_hints(BuildSettings)
    assert not {name for name in groups if name in settings_of(BuildSettings)} - {"out", "seed", "shard_rows"}
    assert not get_args(groups["model"])


@pytest.mark.parametrize("command", ["build", "plan"])
def test_help_imports_neither_torch_nor_transformers(command: str):
    code = (
        "import sys\nfrom kd.cli import cli\n"
        f"cli.main(['cache', '{command}', '--help'], standalone_mode=False)\n"
        "assert not {'torch', 'transformers', 'datasets', 'zarr'} & set(sys.modules), 'slow'"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "--tokens-per-batch" in done.stdout


# a file of settings


@pytest.fixture
def file(tmp_path: Path, model_dir: Path, text_file: Path) -> Path:
    path = tmp_path / "build.yaml"
    path.write_text(
        f"""
model: {{teacher: {model_dir}, device: cpu}}
data: {{data: {text_file}}}
kept: {{top-k: 8, temperatures: [1, 2]}}
blocks: {{seq-len: 32, bos: false}}
shard-rows: 128
""",
        encoding="utf-8",
    )
    return path


def test_a_file_and_options_make_the_same_cache(file: Path, tmp_path: Path, model_dir: Path, text_file: Path, tree):
    def built(name: str, *words: object) -> Path:
        arguments = ["cache", "build", *map(str, words), "--no-reuse", "--out", str(tmp_path / name)]
        done = CliRunner().invoke(cli, arguments, catch_exceptions=False)
        assert done.exit_code == 0, done.output
        return tmp_path / name

    words = ("--teacher", model_dir, "--data", text_file, "--seq-len", 32, "--device", "cpu", "--shard-rows", 128)
    of_options = built("options", *words, "--temperatures", "1,2", "--no-bos", "--top-k", 4)
    of_file = built("file", "--config", file, "--top-k", 4)
    recorded = [load_manifest(folder).provenance["options"] for folder in (of_options, of_file)]
    assert recorded[1] == recorded[0] | {"temperatures": "1.0,2.0"}
    assert {n: b for n, b in tree(of_file).items() if n != "manifest.json"} == {
        n: b for n, b in tree(of_options).items() if n != "manifest.json"
    }
    assert load_manifest(of_file).fingerprint == load_manifest(of_options).fingerprint


def test_a_plan_of_a_file_and_a_typo_in_one(file: Path, tmp_path: Path):
    words = ["cache", "plan", "--config", str(file), "--out", str(tmp_path / "c"), "--json"]
    planned = CliRunner().invoke(cli, words, catch_exceptions=False)
    assert json.loads(planned.stdout)["rows"] > 0
    file.write_text(file.read_text().replace("seq-len", "seq-lenn"))
    with pytest.raises(DataError, match="seq-len"):
        CliRunner().invoke(cli, words, catch_exceptions=False, standalone_mode=False)
