"""Students whose layers torch has compiled: the same losses, plain names, and nothing uncompiled in silence."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from kd.common.errors import DataError
from kd.student_trainer.faster import compiled_layers
from kd.student_trainer.faster.compiled_layers import UncompiledParts, compile_layers, uncompiled
from kd.student_trainer.midway import Midway

ROUNDINGS = 2e-5
"""Relative difference of losses: the same products in another order, over a few steps."""


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch records what the layers compute, and runs the record as it is: no C++ is compiled, which takes a minute."""
    torch._dynamo.reset()
    monkeypatch.setattr(compiled_layers, "BACKEND", "eager")


def test_a_compiled_student_learns_the_same_under_the_same_names(run, traced, tmp_path: Path) -> None:
    plain, compiled = run("plain"), run("compiled", compile=True)
    assert [r.loss for r in compiled.records] == pytest.approx([r.loss for r in plain.records], rel=ROUNDINGS)
    assert compiled.weights.keys() == plain.weights.keys()
    assert compiled.said == []


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # torch's compiler uses what torch deprecates
def test_torch_s_own_compiler_gives_the_losses_of_plain_layers(run) -> None:
    plain, compiled = run("plain"), run("compiled", compile=True)
    assert [r.loss for r in compiled.records] == pytest.approx([r.loss for r in plain.records], rel=ROUNDINGS)
    assert compiled.weights.keys() == plain.weights.keys()


def test_scores_during_the_training_are_of_uncompiled_layers(run, traced) -> None:
    seen: list[int] = []

    def score(model: nn.Module, _: object) -> dict[str, object]:
        seen.append(sum(module._compiled_call_impl is not None for module in model.modules()))
        return {}

    scored, plain = run("scored", compile=True, midway=Midway(score, 2)), run("plain", compile=True)
    assert set(seen) == {0}
    assert all(torch.equal(tensor, plain.weights[name]) for name, tensor in scored.weights.items())


class Broken(nn.Module):
    """A layer that torch cannot record whole."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        torch._dynamo.graph_break()
        return x + 1


def test_a_part_that_is_not_compiled_is_named_once(traced) -> None:
    said: list[str] = []
    watch, layer = UncompiledParts(said.append), Broken()
    compile_layers([layer])
    for _ in range(2):
        layer(torch.ones(2))
        watch.on_step_end(None, None, None)
    assert len(said) == 1
    assert said[0].startswith("torch runs a part of the student uncompiled: ")


class Growing(nn.Module):
    """A layer that computes something else at every call, so that torch compiles it again each time."""

    calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.calls


def test_a_layer_that_is_recompiled_too_often_is_said_to_run_uncompiled(traced) -> None:
    said: list[str] = []
    watch, layer = UncompiledParts(said.append), Growing()
    compile_layers([layer])
    with torch._dynamo.config.patch(recompile_limit=2, allow_unspec_int_on_nn_module=False):
        for layer.calls in range(5):
            layer(torch.ones(2))
    watch.on_step_end(None, None, None)
    assert said
    assert all(line.startswith("torch runs a part of the student uncompiled") for line in said)


def test_what_the_compiler_refuses_is_an_error_that_says_how_to_go_on(run, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(graph: object, inputs: object) -> object:
        raise OSError("no C++ compiler")

    torch._dynamo.reset()
    monkeypatch.setattr(compiled_layers, "BACKEND", refuse)
    with pytest.raises(DataError, match="cannot compile this student") as error:
        run("refused", compile=True)
    assert "no C++ compiler" in error.value.details["found"]


def test_the_code_comes_back_after_scores(traced) -> None:
    layer = nn.Linear(2, 2)
    compile_layers([layer])
    code = layer._compiled_call_impl
    with uncompiled(layer):
        assert layer._compiled_call_impl is None
    assert layer._compiled_call_impl is code
