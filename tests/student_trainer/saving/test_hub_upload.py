"""The finished student on a hub: whole, with its card, and without what names this machine."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from servers import HubServer

from kd.common.errors import DataError
from kd.student_trainer.saving.hub_upload import prepare_repository, refused_by_hub


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    from huggingface_hub import constants

    server = HubServer()
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_PROGRESS_BARS", True)
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    yield server
    server.close()


def test_a_student_is_uploaded_whole_and_without_paths_of_this_machine(run, hub: HubServer) -> None:
    found = run(push_to_hub="us/student", hub_private=True, save_every=2)
    repository = hub.repositories["us/student"]
    files = {name: data for name, (data, _) in (repository.files("main") or {}).items()}
    assert repository.private
    here = {p.name for p in found.out.iterdir() if p.is_file()}
    assert files.keys() == here - {"run.json"}
    assert all(files[name] == (found.out / name).read_bytes() for name in files)
    assert b"knowledge-distillation" in files["README.md"]
    listed = json.loads(files["digests.json"])["files"]
    assert listed.keys() <= files.keys()
    assert not [name for name, data in files.items() if str(found.out.parent).encode() in data]


def test_a_hub_that_refuses_is_noticed_before_the_training(run, tmp_path: Path, monkeypatch, hub: HubServer) -> None:
    monkeypatch.setattr(HubServer, "answer", lambda *_: __import__("servers").reply({"error": "no"}, 401))
    with pytest.raises(DataError, match="the hub refused the student") as caught:
        run(push_to_hub="others/student")
    assert "hf auth login" in str(caught.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["student", "a/b/c", "https://huggingface.co/a/b", "a b/c"])
def test_what_is_no_repository_is_refused(name: str) -> None:
    with pytest.raises(DataError, match="not the name of a repository"):
        prepare_repository(name, private=False)


def test_a_private_repository_without_an_upload_is_refused(run) -> None:
    with pytest.raises(DataError, match="nothing is uploaded"):
        run(hub_private=True)


def test_a_hub_that_does_not_answer_is_not_a_hub_that_refuses() -> None:
    with pytest.raises(DataError, match="the hub cannot be reached") as caught, refused_by_hub("us/student", "a token"):
        raise ConnectionError("Name or service not known")
    assert "the network" in str(caught.value)
