"""Losses over groups against the formulas written out, in float64: 1e-12 is a thousand roundings of values up to 2."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from kd.cache_builder.store.readers.reader import CacheReader
from kd.cache_builder.store.targets import band_edges
from kd.models.loading import load_model
from kd.models.model_config import load_request_tokenizer
from kd.models.model_request import ModelRequest
from kd.student_trainer.batches.collate import Collator, loss_targets
from kd.student_trainer.batches.student_text import StudentText
from kd.student_trainer.losses.by_group import (
    ALM_TEMPERATURE,
    FAST_HEAD,
    alm,
    generalised_jsd,
    hybrid,
    sorted_distance,
    uld,
)
from kd.student_trainer.losses.loss_registry import Objective
from kd.student_trainer.losses.loss_settings import GroupSettings
from kd.student_trainer.losses.loss_targets import GroupTargets, LossTargets

N, V, TEACHER_V = 6, 40, 53


def logits_of(seed: int, v: int = V, rows: int = N, scale: float = 2.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(rows, v, generator=generator, dtype=torch.float64)


def targets_of(
    teacher: Tensor,
    ranges: list[tuple[int, int]] | None = None,
    *,
    k: int | None = None,
    bands: int = 0,
    temperature: float = 1.0,
    **rest: Any,
) -> tuple[GroupTargets, tuple[int, ...]]:
    """One group per row of `teacher [G, V_t]` (or student rows `ranges`), top-k and bands as a cache would have them."""
    log_p = (teacher / temperature).log_softmax(dim=1).sort(dim=1, descending=True).values
    g, v = log_p.shape
    ranges = [(i, i + 1) for i in range(g)] if ranges is None else ranges
    rows = max(stop for _, stop in ranges)
    k = v if k is None else k
    edges = tuple(band_edges(k, v, bands)) if bands else ()
    mass = [log_p[:, low:high].logsumexp(dim=1) for low, high in itertools.pairwise(edges)]
    fields: dict[str, Any] = {
        "gold_ids": torch.arange(rows) % 7,
        "log_scale": torch.zeros(g, dtype=torch.float64),
        "chunk_logprob": -torch.linspace(0.1, 5.0, g, dtype=torch.float64),
        "weight": torch.full((g,), 1 / g, dtype=torch.float64),
        "logprobs": log_p[:, :k],
        "bands": torch.stack(mass, dim=1) if bands else None,
    }
    first, stop = (torch.tensor(side) for side in zip(*ranges, strict=True))
    return GroupTargets(first=first, stop=stop, **fields | rest), edges


def dense_uld(teacher: Tensor, student: Tensor, temperature: float = 1.0) -> Tensor:
    """Sum over ranks of the difference of the sorted softmaxes, padded with zeros: the slow twin."""
    rows = [torch.softmax(z / temperature, dim=1).sort(dim=1, descending=True).values for z in (teacher, student)]
    width = max(r.shape[1] for r in rows)
    p, q = (torch.nn.functional.pad(r, (0, width - r.shape[1])) for r in rows)
    return (p - q).abs().sum(dim=1)


def gradient(loss, logits: Tensor, groups: GroupTargets, settings: GroupSettings) -> Tensor:
    leaf = logits.clone().requires_grad_()
    return torch.autograd.grad(loss(leaf, groups, settings).sum(), leaf)[0]


# ULD


@pytest.mark.parametrize("ranking", ["exact", "fast"])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_uld_of_equal_distributions_is_zero(temperature: float, ranking: str) -> None:
    teacher = logits_of(1)
    groups, edges = targets_of(teacher, temperature=temperature)
    value = uld(teacher, groups, GroupSettings(temperature, edges, ranking))
    assert value.shape == (N,)
    assert value.abs().max() < 1e-12


@pytest.mark.parametrize("ranking", ["exact", "fast"])
def test_a_certain_teacher_against_a_student_that_knows_nothing(ranking: str) -> None:
    certain = torch.full((1, V), -800.0, dtype=torch.float64)
    certain[0, 3] = 0.0
    groups, _ = targets_of(certain)
    value = uld(torch.zeros(1, V, dtype=torch.float64), groups, GroupSettings(ranking=ranking))
    assert float(value) == pytest.approx(2 * (1 - 1 / V), abs=1e-12)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("teacher_v", [V, TEACHER_V, 17])
def test_uld_with_every_rank_is_the_dense_one_for_any_two_vocabularies(teacher_v: int, temperature: float) -> None:
    teacher, student = logits_of(1, teacher_v), logits_of(2)
    groups, _ = targets_of(teacher, temperature=temperature)
    expected = dense_uld(teacher, student, temperature)
    value = uld(student, groups, GroupSettings(temperature))
    assert torch.allclose(value, expected, rtol=0, atol=1e-12)
    assert (value > 0).all()
    assert (value < 2).all()


@pytest.mark.parametrize("ranking", ["exact", "fast"])
def test_uld_does_not_depend_on_ids(ranking: str) -> None:
    student, settings = logits_of(2), GroupSettings(ranking=ranking)
    groups, _ = targets_of(logits_of(1, TEACHER_V))
    order = torch.randperm(V, generator=torch.Generator().manual_seed(0))
    moved = uld(student[:, order], groups, settings)
    assert torch.allclose(moved, uld(student, groups, settings), rtol=0, atol=1e-12)
    there = gradient(uld, student, groups, settings)[:, order]
    assert torch.allclose(gradient(uld, student[:, order], groups, settings), there, rtol=0, atol=1e-12)


@pytest.mark.parametrize("ranking", ["exact", "fast"])
def test_ids_of_no_probability_on_either_side_change_nothing(ranking: str) -> None:
    teacher, student, settings = logits_of(1, TEACHER_V), logits_of(2), GroupSettings(ranking=ranking)
    plain = uld(student, targets_of(teacher)[0], settings)
    nothing = torch.full((N, 30), -900.0, dtype=torch.float64)
    for t, s in ((torch.cat([teacher, nothing], 1), student), (teacher, torch.cat([student, nothing], 1))):
        assert torch.allclose(uld(s, targets_of(t)[0], settings), plain, rtol=0, atol=1e-12)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("ranking", ["exact", "fast"])
@pytest.mark.parametrize(("k", "bands"), [(None, 0), (8, 4)])
def test_uld_gradients_equal_finite_differences(k: int | None, bands: int, ranking: str, temperature: float) -> None:
    # random rows: no two values as near one another as gradcheck's step of 1e-6, so no order changes, and no bin
    groups, edges = targets_of(
        logits_of(1, TEACHER_V),
        [(0, 1), (1, 4), (4, 5), (5, 8), (8, 9), (9, 10)],
        k=k,
        bands=bands,
        temperature=temperature,
        log_scale=-torch.linspace(0, 3, N, dtype=torch.float64),
    )
    student = logits_of(2, rows=10).requires_grad_()
    settings = GroupSettings(temperature, edges, ranking)
    assert torch.autograd.gradcheck(lambda z: uld(z, groups, settings), (student,))


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_a_group_of_many_tokens_is_its_first_distribution_times_the_further_tokens(temperature: float) -> None:
    teacher, student = logits_of(1, TEACHER_V, rows=5), logits_of(2, rows=7)
    gold_t, gold_s = [3, 0, 11, 52, 7], [2, 39, 5, 5, 0, 17, 8]
    teacher_groups, student_groups = [(0, 1), (1, 4), (4, 5)], [(0, 2), (2, 3), (3, 7)]
    p, q = (torch.softmax(z / temperature, dim=1) for z in (teacher, student))

    def row(probabilities: Tensor, gold: list[int], first: int, stop: int) -> Tensor:
        product = probabilities[first].sort(descending=True).values.clone()
        for t in range(first + 1, stop):
            product = product * probabilities[t, gold[t]]
        return product

    expected = []
    for (a, b), (c, d) in zip(teacher_groups, student_groups, strict=True):
        left, right = row(p, gold_t, a, b), row(q, gold_s, c, d)
        padded = torch.nn.functional.pad(right, (0, TEACHER_V - V))
        expected.append((left - padded).abs().sum())
    further = [sum((p[t, gold_t[t]].log() for t in range(a + 1, b)), torch.tensor(0.0)) for a, b in teacher_groups]
    groups, _ = targets_of(
        teacher[[a for a, _ in teacher_groups]],
        student_groups,
        temperature=temperature,
        gold_ids=torch.tensor(gold_s),
        log_scale=torch.stack(further).double(),
    )
    # the factor was summed in float32 where it is zero alone
    assert torch.allclose(uld(student, groups, GroupSettings(temperature)), torch.stack(expected), rtol=0, atol=1e-12)


@pytest.mark.parametrize("ranking", ["exact", "fast"])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_exactly_merged_groups_compare_joint_probabilities_of_the_beginning_and_the_last_token(
    temperature: float, ranking: str
) -> None:
    teacher, student = logits_of(1, TEACHER_V, rows=5), logits_of(2, rows=7)
    gold_t, gold_s = torch.tensor([3, 0, 11, 52, 7]), torch.tensor([2, 39, 5, 5, 0, 17, 8])
    ranges_t, ranges_s = [(0, 1), (1, 4), (4, 5)], [(0, 2), (2, 3), (3, 7)]
    p, q = (torch.softmax(z / temperature, dim=1) for z in (teacher, student))
    left = [p[b - 1] * p[range(a, b - 1), gold_t[a : b - 1]].prod() for a, b in ranges_t]
    right = [q[b - 1] * q[range(a, b - 1), gold_s[a : b - 1]].prod() for a, b in ranges_s]
    expected = torch.stack(
        [
            (x.sort(descending=True).values - torch.nn.functional.pad(y.sort(descending=True).values, (0, 13)))
            .abs()
            .sum()
            for x, y in zip(left, right, strict=True)
        ]
    )
    groups, _ = targets_of(
        teacher[[b - 1 for _, b in ranges_t]],
        ranges_s,
        temperature=temperature,
        gold_ids=gold_s,
        log_scale=torch.stack(
            [x.sum().log() for x in left]
        ),  # a joint distribution sums to its beginning's probability
    )
    settings = GroupSettings(temperature, ranking=ranking, merge="exact")
    value = uld(student, groups, settings)
    # `fast` is a lower bound, and exact where every rank has a bin of its own
    assert torch.allclose(value, expected, rtol=0, atol=1e-12 if V <= FAST_HEAD or ranking == "exact" else 0.05)
    objective = Objective("uld", "bands", temperature=temperature, settings=settings)
    logits, targets = student.clone(), LossTargets(gold_s, groups=groups)
    leaf = student.clone().requires_grad_()
    objective.gradient_(logits, targets)
    (expected_gradient,) = torch.autograd.grad((uld(leaf, groups, settings) * groups.weight).sum(), leaf)
    assert torch.allclose(logits, expected_gradient, rtol=0, atol=1e-12)


def test_groups_of_one_token_are_merged_alike() -> None:
    student = logits_of(2)
    groups, _ = targets_of(logits_of(1, TEACHER_V))
    one, other = (uld(student, groups, GroupSettings(merge=merge)) for merge in ("observed", "exact"))
    assert torch.equal(one, other)


@pytest.mark.parametrize("scale", [0.3, 2.0, 6.0])
@pytest.mark.parametrize(("teacher_v", "v"), [(2000, 1500), (1500, 2000), (600, 600)])
def test_fast_is_a_lower_bound_of_exact_and_close_to_it(teacher_v: int, v: int, scale: float) -> None:
    teacher, student = logits_of(1, teacher_v, scale=scale), logits_of(2, v, scale=1.2 * scale)
    groups, _ = targets_of(teacher)
    exact, fast = (uld(student, groups, GroupSettings(ranking=r)) for r in ("exact", "fast"))
    assert (fast <= exact + 1e-12).all()
    # what is lost are bins of at most 1/16 nat in which the two curves cross; two random flat rows, whose curves run
    # side by side, are the worst: 0.34 % of the value, and a gradient made of signs
    assert ((exact - fast) / exact).max() < 5e-3
    if scale > 1:
        a, b = (gradient(uld, student, groups, GroupSettings(ranking=r)) for r in ("exact", "fast"))
        assert (a - b).norm() < 0.05 * a.norm()


@pytest.mark.parametrize("scale", [0.5, 2.0, 5.0])
def test_fast_stays_close_to_exact_with_bands(scale: float) -> None:
    groups, edges = targets_of(logits_of(1, 2000, scale=scale), k=16, bands=16)
    student = logits_of(2, 1500, scale=1.2 * scale)
    exact, fast = (uld(student, groups, GroupSettings(1.0, edges, r)) for r in ("exact", "fast"))
    # besides, eight steps a band stand for its shape
    assert ((exact - fast).abs() / exact).max() < 5e-3


def test_uld_from_sixteen_values_and_sixteen_bands_is_close_to_the_dense_one() -> None:
    teacher, student = logits_of(1, 2000, rows=20, scale=3.0), logits_of(2, 1500, rows=20, scale=1.5)
    groups, edges = targets_of(teacher, k=16, bands=16)
    value = uld(student, groups, GroupSettings(edges=edges))
    # the 0.5 % that is aimed at with k=16 and 16 bands; for real rows see benchmarks/uld.py
    assert (value - dense_uld(teacher, student)).abs().mean() < 0.005 * value.mean()


@pytest.mark.parametrize("ranking", ["exact", "fast"])
def test_real_rows_from_sixteen_values_and_sixteen_bands_are_close_to_the_dense_ones(shared, ranking: str) -> None:
    folder, text = (
        shared / "weights",
        "Once upon a time there was a fox who had a red ball. The fox liked to play with it all day.",
    )
    tokenizer = load_request_tokenizer(ModelRequest(str(folder / "stories260K")))
    ids = torch.tensor([tokenizer(text)["input_ids"]])
    with torch.no_grad():
        teacher, student = (
            load_model(ModelRequest(str(folder / name), device="cpu"))(ids).logits[0].double()
            for name in ("stories260K", "llama2xs-279K")
        )
    groups, edges = targets_of(teacher, k=16, bands=16)
    settings = GroupSettings(edges=edges, ranking=ranking)
    leaf = student.clone().requires_grad_()
    dense = dense_uld(teacher, leaf)
    assert (uld(student, groups, settings) - dense.detach()).abs().mean() < 0.005 * dense.detach().mean()
    (expected,) = torch.autograd.grad(dense.sum(), leaf)
    # 2.5 % over all logits of 1,024 positions (docs/log.md): a sign, where both models nearly agree; here are 30
    assert (gradient(uld, student, groups, settings) - expected).norm() < 0.05 * expected.norm()


@pytest.mark.parametrize("ranking", ["exact", "fast"])
@pytest.mark.parametrize("loss", [uld, hybrid, alm])
def test_certain_sides_give_finite_values_and_gradients_in_float32(loss, ranking: str) -> None:
    peaked = torch.full((N, V), -60.0)
    peaked[torch.arange(N), torch.arange(N)] = 60.0
    groups, edges = targets_of(
        2 * peaked.double(), k=8, bands=4, student_ids=torch.arange(8).expand(N, 8), gold_ids=torch.arange(N)
    )
    narrow = replace(
        groups, **{n: getattr(groups, n).float() for n in ("logprobs", "bands", "log_scale", "chunk_logprob")}
    )
    settings = GroupSettings(edges=edges, ranking=ranking, overlap=0.5)
    for student in (peaked, -peaked, torch.zeros(N, V)):
        assert loss(student, narrow, settings).isfinite().all()
        assert gradient(loss, student, narrow, settings).isfinite().all()


@pytest.mark.parametrize("ranking", ["exact", "fast"])
@pytest.mark.parametrize("loss", [uld, hybrid, alm])
def test_no_groups_give_no_values_and_a_gradient_of_zero(loss, ranking: str) -> None:
    groups, edges = targets_of(logits_of(1), k=8, bands=4, student_ids=torch.arange(8).expand(N, 8))
    none = groups.within(slice(0, N), slice(0, 0))
    settings = GroupSettings(edges=edges, ranking=ranking)
    assert loss(logits_of(2), none, settings).shape == (0,)
    assert not gradient(loss, logits_of(2), none, settings).any()


@pytest.mark.parametrize("loss", [uld, hybrid])
def test_targets_without_what_a_group_loss_needs_are_refused(loss) -> None:
    groups, _ = targets_of(logits_of(1))
    with pytest.raises(ValueError, match="no such field"):
        loss(logits_of(2), replace(groups, logprobs=None), GroupSettings())


# The reference's sum over a batch: protocols of arXiv:2402.12030's code


def reference_uld(model, texts, reader: CacheReader, teacher, temperature: float) -> float:
    """Answers position by position to the shorter one, softmax, sort, pad, mean over positions, mean over examples."""
    means = []
    for example in reader.read(range(len(reader))):
        student = texts[example.index]
        sides = []
        for network, context, answer in (
            (teacher, example.context_ids, example.input_ids[len(example.context_ids) :]),
            (model, student.context_ids, student.target_ids),
        ):
            ids = torch.from_numpy(np.concatenate([context, answer]).astype(np.int64))[None]
            start, size = len(context) - 1, len(answer)  # the last prompt token predicts the first of the answer
            with torch.no_grad():
                logits = network(ids).logits[0, start : start + size].double()
            sides.append(torch.softmax(logits / temperature, dim=1).sort(dim=1, descending=True).values)
        size = min(len(side) for side in sides)
        width = max(side.shape[1] for side in sides)
        p, q = (torch.nn.functional.pad(side[:size], (0, width - side.shape[1])) for side in sides)
        means.append(float((p - q).abs().sum(dim=1).mean()))
    return sum(means) / len(means)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_a_collated_batch_sums_to_the_reference_s_loss(
    tmp_path, build_request, run_build, pairs_file, model_dir, make_student, temperature: float
) -> None:
    run_build(
        build_request(
            tmp_path / "cache",
            text=pairs_file,
            profile="uld",
            top_k=400,
            tail_bands=1,
            seq_len=64,
            logprob_codec="float32",
            temperatures=(1.0, 2.0),
            band_temperatures=(1.0, 2.0),
        )
    )
    reader = CacheReader(tmp_path / "cache")
    requests = [ModelRequest(str(folder), device="cpu") for folder in (make_student(seed=5), model_dir)]
    model, teacher = (load_model(request) for request in requests)
    texts = StudentText(reader, load_request_tokenizer(requests[0]), window=64)
    settings = GroupSettings(temperature, tuple(band_edges(400, 400, 1)))
    objective = Objective("uld", "bands", 1.0, temperature, settings=settings)
    batch = Collator(objective, texts, "positional")(reader.read(range(len(reader))))
    with torch.no_grad():
        logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits.flatten(0, 1)
        _, kd, _ = objective(logits[batch["positions"]], loss_targets(batch))
    expected = reference_uld(model, texts, reader, teacher, temperature)
    assert expected > 0.1
    # float32: rows of 400 probabilities on both sides
    assert float(kd.sum()) / int(batch["units"]) == pytest.approx(expected, rel=1e-5)


# Hybrid


def shared_ids(teacher: Tensor, k: int, missing: list[int]) -> Tensor:
    """Of a teacher whose ids are the student's, but for `missing`, which the student does not have."""
    ids = teacher.argsort(dim=1, descending=True)[:, :k]
    return torch.where(torch.isin(ids, torch.tensor(missing, dtype=torch.long)), -1, ids)


@pytest.mark.parametrize("overlap", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("missing", [[], [0, 7, 20]])
def test_hybrid_of_equal_models_is_zero(missing: list[int], overlap: float) -> None:
    teacher = logits_of(1)
    groups, _ = targets_of(teacher, student_ids=shared_ids(teacher, V, missing))
    assert hybrid(teacher, groups, GroupSettings(overlap=overlap)).abs().max() < 1e-12


@pytest.mark.parametrize("beta", [0.3, 0.5])
def test_the_matched_part_is_the_jsd_over_pieces_and_the_rest_of_each_side(beta: float) -> None:
    teacher, student, k = logits_of(1, TEACHER_V, rows=1), logits_of(2, rows=3), 5
    teacher[0, 45:] -= 50  # what the student lacks is not among the kept
    ids = shared_ids(teacher, k, [int(teacher[0].argmax())])
    groups, edges = targets_of(
        teacher,
        [(0, 3)],
        k=k,
        bands=6,
        student_ids=ids,
        gold_ids=torch.tensor([1, 2, 3]),
        log_scale=torch.tensor([-0.7], dtype=torch.float64),
    )
    p, q = teacher.softmax(dim=1)[0], student.softmax(dim=1)
    factor_p, factor_q = math.exp(-0.7), float(q[1, 2] * q[2, 3])
    kept = [int(i) for i in ids[0] if i >= 0]
    assert len(kept) == 4
    a = [float(p[i]) * factor_p for i in kept]
    b = [float(q[0, i]) * factor_q for i in kept]
    expected = 0.0
    for x, y in [*zip(a, b, strict=True), (1 - sum(a), 1 - sum(b))]:
        m = beta * x + (1 - beta) * y
        expected += beta * x * math.log(x / m) + (1 - beta) * y * math.log(y / m)
    value = hybrid(student, groups, GroupSettings(edges=edges, beta=beta, overlap=1.0))
    assert float(value) == pytest.approx(expected, abs=1e-12)


def test_without_a_shared_piece_hybrid_is_uld() -> None:
    teacher, student = logits_of(1, TEACHER_V), logits_of(2)
    groups, edges = targets_of(teacher, k=8, bands=4, student_ids=torch.full((N, 8), -1))
    settings = GroupSettings(edges=edges, overlap=0.0)
    row = uld(student, groups, settings)
    # hybrid sorts the teacher's row again; where the bands leave it a little out of order, that can only come closer
    assert (hybrid(student, groups, settings) <= row + 1e-12).all()
    assert torch.allclose(hybrid(student, groups, settings), row, rtol=1e-2, atol=0)
    whole, _ = targets_of(teacher, student_ids=torch.full((N, TEACHER_V), -1))
    settings = GroupSettings(overlap=0.0)
    assert torch.allclose(hybrid(student, whole, settings), uld(student, whole, settings), rtol=0, atol=1e-12)


def test_the_unmatched_part_is_the_sorted_distance_of_what_has_no_partner() -> None:
    teacher, student = logits_of(1), logits_of(2)
    missing = [1, 2, 30]
    groups, _ = targets_of(teacher, student_ids=shared_ids(teacher, V, missing))
    p, q = teacher.softmax(dim=1)[:, missing], student.softmax(dim=1)[:, missing]
    expected = sorted_distance(p.sort(dim=1, descending=True).values, q)
    found = hybrid(student, groups, GroupSettings(overlap=0.0))
    assert torch.allclose(found, expected, rtol=0, atol=1e-12)


def test_the_weight_of_the_two_parts_is_the_overlap() -> None:
    teacher, student = logits_of(1), logits_of(2)
    groups, _ = targets_of(teacher, student_ids=shared_ids(teacher, V, [3, 4, 5]))
    none, half, whole = (hybrid(student, groups, GroupSettings(overlap=share)) for share in (0.0, 0.25, 1.0))
    assert torch.allclose(half, 0.75 * none + 0.25 * whole, rtol=0, atol=1e-12)


def test_hybrid_gradients_equal_finite_differences() -> None:
    teacher = logits_of(1)
    groups, edges = targets_of(
        teacher,
        [(0, 1), (1, 4), (4, 5), (5, 8), (8, 9), (9, 10)],
        k=8,
        bands=4,
        student_ids=shared_ids(teacher, 8, [0, 7, 20]),
        log_scale=-torch.linspace(0, 3, N, dtype=torch.float64),
    )
    student = logits_of(2, rows=10).requires_grad_()
    settings = GroupSettings(1.0, edges, overlap=0.4)
    assert torch.autograd.gradcheck(lambda z: hybrid(z, groups, settings), (student,))


def test_a_confident_student_still_learns_what_it_leaves_out() -> None:
    """1 - Σq would be 0 in float32, without a gradient: the rest is summed instead."""
    student = torch.full((1, V), -20.0)
    student[0, 0] = 0.0
    groups, edges = targets_of(torch.zeros(1, V, dtype=torch.float64), k=1, bands=4, student_ids=torch.tensor([[0]]))
    settings = GroupSettings(edges=edges, overlap=1.0)
    exact, single = (
        gradient(hybrid, z, g, settings)
        for z, g in ((student.double(), groups), (student, replace(groups, log_scale=groups.log_scale.float())))
    )
    assert exact[0, 1:].abs().min() > 0
    # of id 0 the gradient is a small difference of large parts
    assert torch.allclose(single[0, 1:].double(), exact[0, 1:], rtol=1e-4, atol=0)


# The divergence itself


def rows_of(seed: int) -> Tensor:
    return logits_of(seed).softmax(dim=1)


def test_jsd_at_one_half_is_symmetric_and_at_most_ln_two() -> None:
    p, q = rows_of(1), rows_of(2)
    assert torch.allclose(generalised_jsd(p, q, 0.5), generalised_jsd(q, p, 0.5), rtol=0, atol=1e-12)
    far = torch.eye(2, dtype=torch.float64)
    assert torch.allclose(generalised_jsd(far, far.flip(0), 0.5), torch.full((2,), math.log(2.0), dtype=torch.float64))
    assert (generalised_jsd(p, q, 0.5) < math.log(2)).all()
    assert generalised_jsd(p, p, 0.3).abs().max() < 1e-12


@pytest.mark.parametrize("forward", [True, False])
def test_jsd_over_its_weight_tends_to_a_kl(forward: bool) -> None:
    p, q = rows_of(1), rows_of(2)
    beta = 1e-6 if forward else 1 - 1e-6
    limit = (p * (p / q).log()).sum(1) if forward else (q * (q / p).log()).sum(1)
    # what is left is of order beta times a KL of 4 nats and a ratio of p to q of up to some thousand
    assert torch.allclose(generalised_jsd(p, q, beta) / 1e-6, limit, rtol=1e-3, atol=0)


# ALM


def chunk(log_p: float, log_q: float) -> tuple[Tensor, GroupTargets]:
    """One group of one token of student log-probability `log_q`."""
    logits = torch.tensor([[log_q, math.log(-math.expm1(log_q))]], dtype=torch.float64)
    groups, _ = targets_of(
        torch.zeros(1, 2, dtype=torch.float64),
        chunk_logprob=torch.tensor([log_p], dtype=torch.float64),
        gold_ids=torch.zeros(1, dtype=torch.long),
    )
    return logits, groups


@pytest.mark.parametrize("log_p", [-1e-3, -0.7, -30.0])
def test_alm_is_zero_where_both_find_the_text_equally_probable(log_p: float) -> None:
    logits, groups = chunk(log_p, log_p)
    assert alm(logits, groups, GroupSettings()).abs().max() < 1e-12
    assert gradient(alm, logits, groups, GroupSettings()).abs().max() < 1e-10


@pytest.mark.parametrize(("log_p", "log_q"), [(-0.5, -2.0), (-4.0, -0.3), (-0.01, -3.0)])
def test_alm_is_nearly_its_limit_at_infinite_temperature(log_p: float, log_q: float) -> None:
    a, b = -log_p, -log_q
    limit = a * math.log(a / b) - a + b
    value = float(alm(*chunk(log_p, log_q), GroupSettings()))
    assert limit > 0
    # the next term of the expansion is (a - b)² / 2 tau times a number of order 1
    assert value == pytest.approx(limit, abs=2 * (a - b) ** 2 / (2 * ALM_TEMPERATURE))
    p, q = math.exp(log_p / ALM_TEMPERATURE), math.exp(log_q / ALM_TEMPERATURE)
    written_out = ALM_TEMPERATURE * (p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q)))
    assert value == pytest.approx(written_out, rel=1e-9)


@pytest.mark.parametrize(
    ("log_p", "log_q"), [(0.0, -1e-300), (0.0, -2.0), (-2.0, -1e-12), (-100.0, -0.1), (-0.1, -700.0)]
)
def test_alm_of_certain_and_of_hopeless_texts_is_finite(log_p: float, log_q: float) -> None:
    logits, groups = chunk(log_p, log_q)
    logits = logits.clamp(min=-800)
    assert alm(logits, groups, GroupSettings()).isfinite().all()
    assert gradient(alm, logits, groups, GroupSettings()).isfinite().all()


def test_alm_multiplies_over_a_group_s_tokens_and_has_the_gradient_of_finite_differences() -> None:
    groups, _ = targets_of(logits_of(1, rows=3), [(0, 2), (2, 3), (3, 6)], gold_ids=torch.tensor([1, 2, 3, 4, 5, 6]))
    student = logits_of(2)
    log_q = student.log_softmax(dim=1)[torch.arange(6), groups.gold_ids]
    for g, sum_q in enumerate((log_q[:2].sum(), log_q[2], log_q[3:].sum())):
        single = chunk(float(groups.chunk_logprob[g]), float(sum_q))
        assert float(alm(student, groups, GroupSettings())[g]) == pytest.approx(
            float(alm(*single, GroupSettings())), abs=1e-12
        )
    assert torch.autograd.gradcheck(lambda z: alm(z, groups, GroupSettings()), (student.requires_grad_(),))


# rows that differ in length


def uneven_targets(temperature: float) -> tuple[GroupTargets, tuple[int, ...]]:
    """Groups whose compared rows keep 2 to 20 tokens; the bands begin at rank 2, and some pieces are the student's too."""
    kept = torch.tensor([2, 20, 5, 11, 2, 9])
    log_p, ids = (logits_of(1, TEACHER_V) / temperature).log_softmax(1).sort(dim=1, descending=True)
    edges = tuple(band_edges(2, TEACHER_V, 6))
    beyond = log_p.masked_fill(torch.arange(TEACHER_V) < kept[:, None], -torch.inf)
    mass = [beyond[:, low:high].logsumexp(dim=1).clamp(min=-60) for low, high in itertools.pairwise(edges)]
    inside = torch.arange(TEACHER_V) < kept[:, None]
    student_ids = torch.where(ids < V - 3, ids, -1)
    groups, _ = targets_of(
        logits_of(1, TEACHER_V),
        logprobs=log_p[inside],
        student_ids=student_ids[inside],
        kept=kept,
        log_scale=-torch.linspace(0.0, 1.0, N, dtype=torch.float64),
    )
    return replace(groups, bands=torch.stack(mass, dim=1)), edges


def one_group(groups: GroupTargets, n: int) -> GroupTargets:
    """Group n by itself, as of a cache whose fixed k is its row's length."""
    assert groups.kept is not None
    part = groups[n : n + 1]
    length = int(groups.kept[n])
    wide = {name: getattr(part, name).reshape(1, length) for name in ("logprobs", "student_ids")}
    return replace(
        part, gold_ids=groups.gold_ids[n : n + 1], first=torch.tensor([0]), stop=torch.tensor([1]), kept=None, **wide
    )


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize(("loss", "ranking"), [(uld, "exact"), (uld, "fast"), (hybrid, "exact")])
def test_a_row_of_any_length_has_the_loss_of_a_cache_with_this_k(loss, ranking: str, temperature: float) -> None:
    groups, edges = uneven_targets(temperature)
    assert groups.kept is not None
    settings = GroupSettings(temperature, edges, ranking, overlap=0.4)
    student = logits_of(2)
    found = loss(student, groups, settings)
    for n, length in enumerate(groups.kept.tolist()):
        clipped = replace(settings, edges=tuple(max(edge, length) for edge in edges))
        # exact but for rounding; the fast mode has one knot per rank up to the longest row, and steps in the twin
        bound = 1e-10 if ranking == "exact" else 1e-2
        assert float(found[n]) == pytest.approx(
            float(loss(student[n : n + 1], one_group(groups, n), clipped)), abs=bound
        )


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize(("name", "ranking"), [("uld", "exact"), ("uld", "fast"), ("hybrid", "exact")])
def test_kernels_of_rows_that_differ_in_length_equal_autograd(name: str, ranking: str, temperature: float) -> None:
    groups, edges = uneven_targets(temperature)
    objective = Objective(name, "bands", 0.6, temperature, settings=GroupSettings(1.0, edges, ranking, overlap=0.4))
    targets, logits = LossTargets(groups.gold_ids, groups=groups), logits_of(2)
    expected, found = logits.clone(), logits.clone()
    sums = objective.autograd_gradient_(expected, targets)
    torch.testing.assert_close(objective.gradient_(found, targets), sums, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def test_groups_of_rows_that_differ_in_length_are_cut_by_rows() -> None:
    groups, edges = uneven_targets(1.0)
    objective = Objective("uld", "bands", 1.0, settings=GroupSettings(1.0, edges, "exact"))
    targets, student = LossTargets(groups.gold_ids, groups=groups), logits_of(2)
    whole = objective(student, targets)[0].sum()
    parts = [objective(student[rows], targets[rows])[0].sum() for rows in targets.pieces(2)]
    assert len(parts) == 3
    torch.testing.assert_close(torch.stack(parts).sum(), whole, rtol=1e-12, atol=0)
