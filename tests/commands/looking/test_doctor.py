"""kd doctor: what it says is true of this process."""

from __future__ import annotations

import json
from importlib import metadata

import pytest
from click.testing import CliRunner
from huggingface_hub import constants

from kd.commands.looking import doctor as module
from kd.commands.looking.doctor import USES, doctor
from kd.common.extras import EXTRAS


def report(*words: str) -> dict[str, dict[str, object]]:
    found = CliRunner().invoke(doctor, ["--json", *words])
    assert found.exit_code == 0, found.output
    return json.loads(found.stdout)


def test_versions_extras_and_disk_are_those_of_this_machine() -> None:
    found = report("--no-network")
    assert found["versions"]["numpy"] == metadata.version("numpy")
    assert found["extras"]["train"] == []
    assert all(isinstance(free, int) and free > 0 for free in found["disk"].values())
    assert found["devices"]["processors"] >= 1


def test_a_missing_package_is_named_with_its_extra_and_its_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "is_installed", lambda package: package != "peft")
    assert report("--no-network")["extras"]["lora"] == ["peft"]
    text = CliRunner().invoke(doctor, ["--no-network"]).output
    assert "missing peft     (adapters): pip install 'kd-logit-cache[lora]'" in text


def test_every_extra_says_what_needs_it() -> None:
    assert USES.keys() == EXTRAS.keys()


def test_a_hub_that_does_not_answer_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert "cannot be reached" in str(report()["hub"]["access"])
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE" in str(report()["hub"]["access"])
