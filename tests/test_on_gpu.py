"""What `elsewhere.py` cannot see, the numbers: on a GPU they are the CPU's, and nothing waits. Skipped where there is none."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
import torch

from kd.cache_builder.store.targets import TargetConfig
from kd.cache_builder.teacher.sparsify import Sparsifier
from kd.cache_builder.teacher.teacher_pass import Teacher, collect
from kd.data.rows.example import Example
from kd.data.tokenizing.token_rows import TokenRows
from kd.models.heads import LanguageModelHead, split_head
from kd.models.loading import ModelRequest, load_model
from kd.student_trainer.head import chunked_head_loss
from kd.student_trainer.losses.loss_registry import LOSSES, Objective
from kd.student_trainer.losses.loss_settings import GroupSettings
from kd.student_trainer.losses.loss_targets import GroupTargets, LossTargets

DEVICE = "cuda"
pytestmark = pytest.mark.skipif(DEVICE == "cuda" and not torch.cuda.is_available(), reason="no GPU here")
V, K = 2048, 8
EDGES = (K, 20, 200, 2100)


@contextmanager
def no_waits() -> Iterator[None]:
    with sync_debug_mode("error"):
        yield


@contextmanager
def sync_debug_mode(mode: str | int) -> Iterator[None]:
    before = torch.cuda.get_sync_debug_mode()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch says once that the mode is a prototype
            torch.cuda.set_sync_debug_mode(mode)
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


class MayWait:
    """A model's body, which asks what its mask hides and whether positions are those of several sequences (transformers 5)."""

    def __init__(self, body: Any) -> None:
        self.body, self.config = body, body.config

    def __call__(self, **inputs: Any) -> Any:
        with sync_debug_mode("default"):
            return self.body(**inputs)


def rows() -> list[TokenRows]:
    """Of equal length, so that there is no mask."""
    rng = np.random.default_rng(0)
    parts = [[rng.integers(1, V, n).astype(np.int32) for n in (4, 28)] for _ in range(12)]
    return [TokenRows(Example(f"e{i}", "x"), c, t, np.arange(1, 29)) for i, (c, t) in enumerate(parts)]


def scored(head: LanguageModelHead, config: TargetConfig, **options: Any) -> dict[str, np.ndarray]:
    teacher = Teacher(
        head, Sparsifier(config, V, torch.arange(0, V, 3).to(head.weight.device)), tokens_per_batch=96, **options
    )
    *_, (_, raw) = collect(rows(), teacher.run(rows(), 0))
    return {name: value for name, value in vars(raw).items() if value is not None}


def head_on(device: str, dtype: str = "float32") -> LanguageModelHead:
    """The same weights on either device: random ones would be drawn by another generator."""
    return split_head(load_model(ModelRequest("random:demo-student", device="cpu", dtype=dtype)).to(device))


@pytest.mark.parametrize("profile", ["kl", "full", "sampled"])
def test_the_teacher_pass_gives_the_cpu_s_targets(profile: str) -> None:
    config = TargetConfig.of_profile(profile)
    here, there = (scored(head_on(device), config, head_chunk=37) for device in ("cpu", DEVICE))
    for name, value in here.items():
        if value.dtype.kind == "f":  # float32 sums over 96 numbers and 3 layers, in another order
            np.testing.assert_allclose(there[name], value, atol=1e-3, err_msg=name)
        else:  # neighbours closer than that may change places: a rank by one, hardly any id
            assert (there[name] != value).mean() < 0.02, name


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_teacher_pass_waits_for_nothing_but_its_copies(dtype: str) -> None:
    head, config = head_on(DEVICE, dtype), TargetConfig.of_profile("full")
    expected = scored(head, config)
    with no_waits():
        again = scored(replace(head, backbone=MayWait(head.backbone)), config)
    for name, value in expected.items():
        np.testing.assert_array_equal(again[name], value, err_msg=name)


def targets(count: int) -> LossTargets:
    generator = torch.Generator().manual_seed(1)
    log_p, ids = torch.randn(count, V, generator=generator, dtype=torch.float64).log_softmax(1).topk(K, dim=1)
    gold, first = torch.randint(V, (count,), generator=generator), torch.arange(0, count - 2, 3)
    mass = torch.rand(len(first), K + 3, generator=generator, dtype=torch.float64).sort(1, descending=True).values
    log_mass, few = (mass / mass.sum(1, keepdim=True)).log(), mass[:, 0]
    groups = GroupTargets(first, first + 2, gold, -few, -3 * few, few, log_mass[:, :K], log_mass[:, K:], ids[first])
    counts = torch.randint(1, 5, (count, K), generator=generator)
    return LossTargets(gold, ids, log_p, 1 - log_p.exp().sum(1), ids, counts, groups, torch.tensor(2.5))


def moved(data: Any) -> Any:
    values = {f.name: getattr(data, f.name) for f in fields(data)}
    return replace(
        data,
        **{n: moved(v) if isinstance(v, GroupTargets) else v.to(DEVICE) for n, v in values.items() if v is not None},
    )


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("ranking", ["exact", "fast"])
@pytest.mark.parametrize(("loss", "tail"), [(loss, tail) for loss in LOSSES for tail in LOSSES[loss].variants])
def test_every_loss_and_its_gradients_are_the_cpu_s(loss: str, tail: str, ranking: str, temperature: float) -> None:
    settings = GroupSettings(edges=EDGES, ranking=ranking, overlap=0.3)
    temperature = 1.0 if tail == "sampled" or loss in ("ce", "alm") else temperature
    objective = Objective(loss, tail, 0.0 if loss == "ce" else 0.6, temperature, settings=settings)
    data, found = targets(23), []
    generator = torch.Generator().manual_seed(0)
    leaves = [torch.randn(s, generator=generator, dtype=torch.float64) for s in ((23, 16), (V + 4, 16), (V + 4,))]
    for device in ("cpu", DEVICE):
        hidden, weight, bias = (leaf.to(device).requires_grad_() for leaf in leaves)
        own = moved(data) if device == DEVICE else data
        total, kd, ce = chunked_head_loss(hidden, weight, bias, objective, own, vocabulary_size=V, chunk=10)
        total.backward()
        found.append([x.detach().cpu() for x in (total, kd, ce, hidden.grad, weight.grad, bias.grad)])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)  # float64: only a wrong sum is that far off


def test_a_step_of_a_loss_over_rows_waits_for_nothing() -> None:
    data = moved(targets(23))
    hidden, weight = (
        torch.randn(s, dtype=torch.float64, device=DEVICE, requires_grad=True) for s in ((23, 16), (V, 16))
    )
    with no_waits():
        chunked_head_loss(hidden, weight, None, Objective(), replace(data, groups=None), vocabulary_size=V, chunk=10)[
            0
        ].backward()
