"""The example scripts run, and all of them train the student that `kd train` trains."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file

EXAMPLES = Path(__file__).parents[1] / "examples"
NOT_OURS = [  # Lightning 2.6 asks newer libraries for what they call by another name now
    pytest.mark.filterwarnings("ignore::DeprecationWarning:lightning"),
    pytest.mark.filterwarnings("ignore::FutureWarning:lightning"),
    pytest.mark.filterwarnings("ignore::UserWarning:lightning"),
]
SCRIPTS = [
    pytest.param(path.stem, marks=NOT_OURS if path.stem == "lightning_module" else [])
    for path in sorted(EXAMPLES.glob("*.py"))
    if path.stem != "dataloader"  # has a test of its own
]


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch, demo_cache: Path, tmp_path: Path) -> Callable[..., Path]:
    """`example(name, …)`: run a script of examples/ on the embedded models; the folder of its student."""

    def run(name: str, *options: str) -> Path:
        out = tmp_path / name
        arguments = ["--cache", str(demo_cache), "--student", "demo", "--out", str(out), *options]
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *arguments])
        load(name).main()
        return out

    return run


def weights(folder: Path) -> torch.Tensor:
    return torch.cat([w.flatten() for _, w in sorted(load_file(folder / "model.safetensors").items())])


@pytest.fixture(scope="session")
def start() -> torch.Tensor:
    """The weights of the student before it is trained."""
    from kd.student_trainer.student_model import load_student

    model, _ = load_student("demo")
    named = {name: w.detach() for name, w in model.named_parameters()}
    return torch.cat([w.flatten() for _, w in sorted(named.items())])


@pytest.fixture(scope="session")
def trained(demo_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> torch.Tensor:
    """The weights after `kd train` with the settings of the examples."""
    from click.testing import CliRunner

    from kd.cli import cli

    out = tmp_path_factory.mktemp("trained") / "student"
    options = ["--temperature", "2", "--tokens-per-batch", "1024", "--schedule", "constant", "--weight-decay", "0"]
    command = ["train", "--cache", str(demo_cache), "--student", "demo", "--out", str(out), "--device", "cpu", *options]
    done = CliRunner().invoke(cli, command, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return weights(out)


def difference(ours: torch.Tensor, theirs: torch.Tensor, start: torch.Tensor) -> float:
    """Distance between two students, as a share of the way that training went."""
    return float((ours - theirs).norm() / (theirs - start).norm())


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_example_trains_the_student_of_kd_train(name: str, example, trained, start) -> None:
    # Adam's first steps are as long where a gradient is next to nothing: rounding alone moves a few weights apart
    assert difference(weights(example(name)), trained, start) < 0.01


def test_the_interrupted_example_continues_with_the_very_next_batch(example, trained, start, capsys) -> None:
    out = example("dataloader", "--stop-after", "2")
    assert not (out / "model.safetensors").exists()
    example("dataloader")
    steps = [line.partition(":")[0] for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
    total = int(steps[-1].split()[-1])
    assert total > 2
    assert steps == [f"step {number} of {total}" for number in range(1, total + 1)]
    assert difference(weights(out), trained, start) < 0.01


def test_without_lightning_its_example_says_what_to_install(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "lightning", None)
    with pytest.raises(SystemExit, match="pip install lightning"):
        load("lightning_module")


@pytest.mark.parametrize("name", [path.stem for path in sorted(EXAMPLES.glob("*.py"))])
def test_every_example_opens_with_the_command_that_runs_it(name: str) -> None:
    text = (EXAMPLES / f"{name}.py").read_text(encoding="utf-8")
    assert f"python examples/{name}.py --cache runs/cache --student demo --out runs/student" in text
