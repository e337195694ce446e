"""A missing package is an error that names its extra."""

from __future__ import annotations

import sys

import pytest

from kd.common.extras import EXTRAS, MissingPackageError, missing_package, needed, require, require_package


@pytest.mark.parametrize(("extra", "package"), [(e, p) for e, packages in EXTRAS.items() for p in packages])
def test_each_package_names_its_extra(extra: str, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingPackageError, match=f"this needs {package}\n") as caught:
        require_package(package, "this")
    assert f"pip install 'kd-logit-cache[{extra}]'" in str(caught.value)


def test_an_extra_is_complete_when_every_package_of_it_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    require("train", "training")
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(MissingPackageError, match="training needs accelerate"):
        require("train", "training")


def test_a_failed_import_at_a_door_says_what_needs_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(MissingPackageError) as caught, needed("peft", "LoRA", where="runs/a", instead="--lora 0"):
        import peft  # noqa: F401
    assert str(caught.value).splitlines() == [
        "LoRA needs peft",
        "  where  runs/a",
        "  found  not installed",
        "  try    pip install 'kd-logit-cache[lora]', or --lora 0",
    ]


def test_a_package_that_is_there_and_broken_says_how() -> None:
    with pytest.raises(MissingPackageError, match="no such part"), needed("peft", "LoRA"):
        raise ImportError("no such part")


def test_only_a_package_of_an_extra_is_blamed_on_an_extra() -> None:
    found = missing_package(ModuleNotFoundError("no torch", name="torch.nn"))
    assert found is not None
    assert found.headline == "this command needs torch"
    assert missing_package(ModuleNotFoundError("no such module", name="nothing_of_the_kind")) is None
    assert missing_package(ImportError("broken", name="torch")) is None
