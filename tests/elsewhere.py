"""What runs on a GPU, run on a device that is none: `python tests/elsewhere.py` prints one JSON object, case -> what failed.

torch lets a backend be registered from Python, and computes shapes, dtypes and devices without numbers. On such a device an
operation over tensors of two devices fails, and so does all that would have to wait for a GPU: a number or a truth asked
for, a shape that depends on values. The device is that of the whole process: hence one of its own.
"""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import fields, replace
from typing import Any

import numpy as np
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from kd.cache_builder.store.profiles import PROFILES
from kd.cache_builder.store.targets import TargetConfig, band_edges
from kd.cache_builder.teacher.sparsify import Sparsifier
from kd.cache_builder.teacher.teacher_pass import Teacher
from kd.data.rows.example import Example
from kd.data.tokenizing.token_rows import TokenRows
from kd.models.heads import EncoderDecoderHead, LanguageModelHead
from kd.models.loading import random_model
from kd.models.model_config import decoder_start
from kd.models.shapes import SHAPES
from kd.student_trainer.head import chunked_head_loss
from kd.student_trainer.losses.loss_registry import LOSSES, Objective
from kd.student_trainer.losses.loss_settings import GroupSettings
from kd.student_trainer.losses.loss_targets import GroupTargets, LossTargets

NAME = "elsewhere"
N, D, V, K = 24, 16, 900, 8
EDGES = tuple(band_edges(K, 1000, 4))
CASES: dict[str, Callable[[torch.device], None]] = {}


def here(value: Any, device: torch.device) -> None:
    """Every tensor of a dataclass is on the device."""
    for field in fields(value):
        tensor = getattr(value, field.name)
        assert tensor is None or tensor.device == device, f"{field.name} is on {tensor.device}"


def selection(profile: str, **settings: Any) -> Callable[[torch.device], None]:
    def case(device: torch.device) -> None:
        config = TargetConfig.of_profile(profile, **settings)
        logits, gold = torch.randn(N, V + 10, device=device), torch.zeros(N, dtype=torch.int64, device=device)
        uniforms = torch.rand(N, config.uniforms, dtype=torch.float64, device=device) if config.uniforms else None
        here(Sparsifier(config, V, torch.arange(0, V, 3, device=device)).marked(logits, gold, uniforms), device)

    return case


def moved(model: Any, device: torch.device) -> Any:
    """The model with its parameters and buffers there, one by one: such tensors cannot be swapped."""
    for module in model.modules():
        for name, tensor in module._parameters.items():
            if tensor is not None:
                module._parameters[name] = torch.nn.Parameter(tensor.detach().to(device))
        for name, tensor in module._buffers.items():
            module._buffers[name] = None if tensor is None else tensor.to(device)
    return model


def teacher_pass(shape: str) -> Callable[[torch.device], None]:
    def case(device: torch.device) -> None:
        model = moved(random_model(SHAPES[shape](), torch.float32).eval(), device)
        weight, two_sides = model.get_output_embeddings().weight, model.config.is_encoder_decoder
        head = LanguageModelHead(model.base_model, weight, None)
        if two_sides:
            head = EncoderDecoderHead(
                model.get_decoder(), weight, None, model.get_encoder(), decoder_start(model.config), 0.1
            )
        config = TargetConfig.of_profile("full")
        sparsifier = Sparsifier(config, V, torch.arange(0, V, 3, device=device))
        teacher = Teacher(head, sparsifier)
        rows = [TokenRows(Example("e", "x"), np.arange(c), np.arange(5), np.arange(5)) for c in (9, 9, 9)]
        scored = teacher._score(sparsifier, batch=[2, 0, 1], rows=rows, first_example=0, head_chunk=7, waits=False)
        for arrival in scored.chunks:
            assert {t.device for t in arrival.wait().values()} == {device}

    return case


def training(objective: Objective, groups_of: int, *, uneven: bool = False) -> Callable[[torch.device], None]:
    def case(device: torch.device) -> None:
        def number(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
            return torch.ones(shape, dtype=dtype, device=device)

        def integer(*shape: int) -> torch.Tensor:
            return number(*shape, dtype=torch.int64)

        gold, count = integer(N), N // groups_of
        groups = GroupTargets(
            integer(count),
            integer(count),
            gold,
            number(count),
            number(count),
            number(count),
            number(count, K),
            number(count, 4),
            integer(count, K),
        )
        first = np.arange(0, N, groups_of)
        host = [first, first + groups_of]
        if uneven:  # as many entries, one row after another
            groups = replace(
                groups, logprobs=number(count * K), student_ids=integer(count * K), kept=K * integer(count)
            )
            host.append(np.full(count, K))
        vars(groups)["on_host"] = np.stack(host)  # of a real batch asked for once a step
        targets = LossTargets(
            gold,
            integer(N, K),
            number(N, K),
            number(N),
            integer(N, K),
            integer(N, K),
            groups if objective.groups else None,
            number(),
        )
        if uneven and not objective.groups:
            flat = integer(N * K)
            targets = LossTargets(gold, flat, number(N * K), number(N), kd_scale=number(), kept=K * integer(N))
            vars(targets)["offsets"] = np.arange(N + 1) * K
        if LOSSES[objective.loss].text:
            many = LossTargets(
                gold,
                logprobs=number(2 * N),
                tail_mass=number(N),
                kept=2 * integer(N),
                range_starts=integer(2 * N),
                range_stops=integer(2 * N),
                places=integer(V),
            )
            vars(many)["offsets"] = np.arange(N + 1) * 2
            targets = many
        for dtype in (torch.float32, *([torch.bfloat16] if objective.loss == "ce" else [])):
            hidden, weight, bias = (number(*s, dtype=dtype).requires_grad_() for s in ((N, D), (V + 4, D), (V + 4,)))
            total, kd, ce = chunked_head_loss(hidden, weight, bias, objective, targets, vocabulary_size=V, chunk=10)
            assert {t.device for t in (total, kd, ce)} == {device}
            total.backward()
            for leaf in (hidden, weight, bias):
                assert leaf.grad is not None
                assert (leaf.grad.device, leaf.grad.dtype) == (device, dtype)

    return case


def mixed(device: torch.device) -> None:
    torch.ones(3, device=device) + torch.ones(3)


def asked(device: torch.device) -> None:
    bool(torch.ones(3, device=device).any())


def counted(device: torch.device) -> None:
    torch.ones(3, device=device).nonzero()


def listed(device: torch.device) -> None:
    torch.tensor([1, 2], device=device)


CASES |= {
    "must fail: two devices": mixed,
    "must fail: a list": listed,
    "must fail: a truth": asked,
    "must fail: a shape": counted,
}
CASES |= {f"selection {profile}": selection(profile) for profile in PROFILES}
CASES["selection by position, with bands"] = selection("adaptive", certain_below=1.0, tail_bands=4)
CASES |= {f"selection {profile} with draws": selection(profile, tail_samples=40) for profile in ("kl", "adaptive")}
CASES["selection by position, with draws"] = selection("adaptive", certain_below=1.0, tail_samples=40)
CASES |= {f"teacher pass {shape}": teacher_pass(shape) for shape in ("demo-student", "demo-t5-student")}
for loss, kind in LOSSES.items():
    for tail in kind.variants:
        for ranking in ("exact", "fast") if loss == "uld" else ("exact",):
            for temperature in (1.0,) if loss in ("ce", "alm") or tail == "sampled" else (1.0, 2.0):
                for groups_of in (1, 3) if kind.groups else (1,):
                    settings = GroupSettings(edges=EDGES, ranking=ranking, overlap=0.3)
                    objective = Objective(loss, tail, 0.0 if loss == "ce" else 0.6, temperature, settings=settings)
                    name = f"training {loss} {tail} {ranking} T={temperature:g} groups of {groups_of}"
                    CASES[name] = training(objective, groups_of)
                    if kind.needs and not kind.text and tail != "sampled":
                        CASES[f"{name}, rows that differ in length"] = training(objective, groups_of, uneven=True)


def main() -> None:
    _setup_privateuseone_for_python_backend(NAME)
    getattr(torch, NAME).get_amp_supported_dtype = lambda: [torch.bfloat16]
    device = torch.device(NAME, 0)
    failures = {}
    make = torch.tensor
    with FakeTensorMode(allow_non_fake_inputs=True):
        for name, case in CASES.items():
            try:
                torch.tensor = lambda data, device=None, **rest: make(data, **rest).to(device or "cpu")
                with suppress(DataDependentOutputException, DynamicOutputShapeException):
                    case(device)  # what is made once per device is made now; a list that goes there again fails
                torch.tensor = make
                case(device)
            except Exception as error:
                frames = [f for f in traceback.extract_tb(error.__traceback__) if "/kd/" in f.filename]
                where = (
                    f"{frames[-1].filename.rpartition('/')[2]}:{frames[-1].lineno} {frames[-1].line}: "
                    if frames
                    else ""
                )
                failures[name] = f"{where}{type(error).__name__}: {str(error).splitlines()[0]}"
    sys.stdout.write(json.dumps({name: failures.get(name) for name in CASES}) + "\n")


if __name__ == "__main__":
    main()
