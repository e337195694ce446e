"""The best scoring of a run: which it is, and that the run ends with the weights it had there."""

from __future__ import annotations

import itertools
import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from kd.common.errors import DataError
from kd.student_trainer.midway import Midway
from kd.student_trainer.run_folder import read_evaluations, read_run
from kd.student_trainer.saving.best_weights import BEST, BestSoFar, ChosenFigure


def record(step: int, value: float | None, better: str = "lower") -> dict[str, Any]:
    return {"step": step, "tasks": {"perplexity": {"perplexity": {"value": value, "better": better}}}}


@pytest.mark.parametrize("better", ["lower", "higher"])
def test_the_best_is_the_first_of_the_best_and_later_ones_are_counted(better: str) -> None:
    rng = random.Random(0)
    for _ in range(50):
        values = [rng.choice([None, math.nan, 1.0, 2.0, 3.0]) for _ in range(8)]
        best = BestSoFar.after(ChosenFigure("perplexity"), [record(i, v, better) for i, v in enumerate(values)])
        finite = [v for v in values if v is not None and math.isfinite(v)]
        if not finite:
            assert (best.step, best.since) == (None, 8)
            continue
        expected = values.index(min(finite) if better == "lower" else max(finite))
        assert (best.step, best.value, best.since) == (expected, values[expected], 7 - expected)


@pytest.mark.parametrize("figure", [ChosenFigure("choices"), ChosenFigure("perplexity", "nothing")])
def test_a_figure_that_is_not_there_is_refused_with_those_that_are(figure: ChosenFigure) -> None:
    with pytest.raises(DataError, match="cannot be chosen") as caught:
        figure.of(record(0, 1.0))
    assert "perplexity.perplexity" in str(caught.value)


class Scripted:
    """A scoring whose values are given, one after the other."""

    def __init__(self, *values: float) -> None:
        self.values = itertools.chain(values)

    def __call__(self, model: Any, tokenizer: Any) -> dict[str, Any]:
        return {"tasks": {"perplexity": {"perplexity": {"value": next(self.values), "better": "lower"}}}}


CONSTANT = {"schedule": "constant", "max_steps": 6}
"""Without decay of the learning rate, a run of fewer steps has the weights that a longer one had there."""


@pytest.mark.parametrize("settings", [{}, {"lora": 2}], ids=["plain", "lora"])
def test_a_run_ends_with_the_weights_of_its_best_scoring(run, settings: dict[str, Any]) -> None:
    settings = {**CONSTANT, **settings}
    chosen = run("chosen", midway=Midway(Scripted(9, 5, 3, 4, 8, 8, 8), 1, best=ChosenFigure("perplexity")), **settings)
    shorter = run("shorter", **settings | {"max_steps": 2})
    assert chosen.weights.keys() == shorter.weights.keys()
    assert all(torch.equal(chosen.weights[name], shorter.weights[name]) for name in shorter.weights)
    assert (chosen.result.best_step, chosen.result.steps) == (2, 6)
    assert read_run(chosen.out)["result"]["best_step"] == 2
    assert not (chosen.out / BEST).exists()


def test_a_run_that_no_longer_learns_ends_early(run) -> None:
    midway = Midway(Scripted(9, 5, 3, 4, 4, 4, 4), 1, best=ChosenFigure("perplexity"), patience=2)
    stopped, shorter = run("stopped", midway=midway, **CONSTANT), run("shorter", **CONSTANT | {"max_steps": 2})
    assert (stopped.result.steps, stopped.result.best_step) == (4, 2)
    assert [r["step"] for r in read_evaluations(stopped.out)] == [0, 1, 2, 3, 4]
    assert stopped.records[-1].step == 4  # the line of the log before the end
    assert all(torch.equal(stopped.weights[name], shorter.weights[name]) for name in shorter.weights)


@pytest.mark.parametrize(("values", "best"), [((9, 3, 5, 4, 4, 8, 8), 1), ((9, 5, 6, 7, 3, 8, 8), 4)])
def test_a_run_that_is_continued_ends_with_the_same_weights(run, values: tuple[float, ...], best: int) -> None:
    """The best scoring lies before the checkpoint at step 3, or between it and the interruption after step 5."""
    whole = run("whole", midway=Midway(Scripted(*values), 1, best=ChosenFigure("perplexity")), **CONSTANT)
    midway = Midway(Scripted(*values), 1, best=ChosenFigure("perplexity"))
    with pytest.raises(KeyboardInterrupt):
        run("cut", midway=midway, save_every=3, stop_after=5, **CONSTANT)
    after = Midway(Scripted(*values[4:]), 1, best=ChosenFigure("perplexity"))
    resumed = run("cut", midway=after, save_every=3, resume=True, **CONSTANT)
    assert whole.result.best_step == resumed.result.best_step == best
    assert all(torch.equal(whole.weights[name], resumed.weights[name]) for name in whole.weights)


def test_weights_that_somebody_removed_are_said_to_be_missing(run, tmp_path: Path) -> None:
    import shutil

    class Removing(Scripted):
        def __call__(self, model: Any, tokenizer: Any) -> dict[str, Any]:
            shutil.rmtree(tmp_path / "run" / BEST, ignore_errors=True)
            return super().__call__(model, tokenizer)

    found = run(midway=Midway(Removing(9, 3, 4, 5), 1, best=ChosenFigure("perplexity")))
    assert found.result.best_step is None
    assert found.said == ["the weights of step 1 are not there any more: the last ones are kept"]


def test_patience_needs_a_figure() -> None:
    with pytest.raises(DataError, match="which figure"):
        Midway(Scripted(), patience=2)
