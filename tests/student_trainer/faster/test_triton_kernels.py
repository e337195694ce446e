"""The Triton kernel against the losses' definitions in float64. Without a GPU it runs in Triton's interpreter.

Torch for CUDA brings Triton, and so does the extra `triton`, a gigabyte that `make test` does without. `make test-kernels` installs
it and runs these tests on a CPU, with TRITON_INTERPRET=1 for the whole process, because Triton reads that once.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor

from kd.models.families.logit_transform import PLAIN, LogitTransform
from kd.student_trainer.faster.fused_loss import FusedLoss, alike, starts_of, torch_gradient_, triton_gradient_
from kd.student_trainer.faster.triton_launch import BLOCK, KeptIds, gradient_rows_
from kd.student_trainer.head import chunked_head_loss
from kd.student_trainer.losses.loss_registry import Objective
from kd.student_trainer.losses.loss_targets import LossTargets

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if find_spec("triton") is None or (DEVICE == "cpu" and os.environ.get("TRITON_INTERPRET") != "1"):
    pytest.skip(
        "triton is not installed, or there is no GPU and no TRITON_INTERPRET=1: make test-kernels",
        allow_module_level=True,
    )
# Triton's interpreter evaluates both sides of a `where`, also the logarithm of 0 that the other side stands for
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

N = 5
OBJECTIVES = [
    pytest.param(Objective(loss, tail, alpha, temperature), id=f"{loss}-{tail}-alpha{alpha:g}-T{temperature:g}")
    for loss, tail in (("kl", "ghost"), ("kl", "renorm"), ("ce", "none"))
    for alpha in ((0.0,) if loss == "ce" else (0.6, 1.0))
    for temperature in ((1.0,) if loss == "ce" else (0.5, 1.0, 1.7, 4.0))
]
TRANSFORMS = [
    pytest.param(transform, id=name)
    for name, transform in {
        "plain": PLAIN,
        "scale": LogitTransform(0.25),
        "cap": LogitTransform(cap=2.0),
        "both": LogitTransform(1.5, 3.0),
    }.items()
]
MIXED = (1, 4, 7, 2, 6)
"""Kept ids of each row, where rows differ"""


def targets_of(width: int, kept: int | tuple[int, ...], temperature: float = 1.0, rows: int = N) -> LossTargets:
    """The teacher's side of `rows` rows of one length or of many; gold ids are kept ones, others, and the last column."""
    generator = torch.Generator().manual_seed(2)
    log_p = (3 * torch.randn(rows, width, generator=generator, dtype=torch.float64) / temperature).log_softmax(1)
    values, ids = log_p.sort(1, descending=True)
    gold = torch.randint(width, (rows,), generator=generator)
    gold[0], gold[-1] = ids[0, 0], width - 1
    lengths = torch.tensor([kept] * rows if isinstance(kept, int) else kept)
    inside = torch.arange(width) < lengths[:, None]
    tail = torch.where(inside, 0.0, values.exp()).sum(1)
    if isinstance(kept, int):
        return LossTargets(gold, ids[:, :kept], values[:, :kept], tail)
    return LossTargets(gold, ids[inside], values[inside], tail, kept=lengths)


def products_of(width: int, dtype: torch.dtype = torch.float64, rows: int = N) -> Tensor:
    return (3 * torch.randn(rows, width, generator=torch.Generator().manual_seed(1), dtype=torch.float64)).to(dtype)


def bias_of(width: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(width, generator=torch.Generator().manual_seed(3), dtype=dtype)


def there(value: Any) -> Any:
    """A tensor, or targets, where the kernel runs."""
    if isinstance(value, LossTargets):
        return replace(value, **{name: there(field) for name, field in vars(value).items() if field is not None})
    return None if value is None else value.to(DEVICE)


def defined(
    objective: Objective,
    products: Tensor,
    targets: LossTargets,
    bias: Tensor | None = None,
    transform: LogitTransform = PLAIN,
) -> tuple[Tensor, Tensor]:
    """Sums and gradient by autograd on the definition, in float64."""
    leaf = products.double().requires_grad_()
    logits = transform(leaf if bias is None else leaf + bias.double())
    sums = torch.stack([part.sum() for part in objective(logits, targets)])
    (gradient,) = torch.autograd.grad(sums[0], leaf)
    return sums.detach(), gradient


def by_kernel(
    objective: Objective,
    products: Tensor,
    targets: LossTargets,
    bias: Tensor | None = None,
    transform: LogitTransform = PLAIN,
) -> tuple[Tensor, Tensor]:
    written = there(products).clone() if products.is_contiguous() else there(products)
    sums = triton_gradient_(objective, written, there(bias), transform, there(targets))
    return sums.cpu(), written.cpu()


def rounding(dtype: torch.dtype) -> float:
    """Half a step of a type; the interpreter cuts float32 to bfloat16 where a GPU rounds it."""
    step = torch.finfo(dtype).eps
    return step if dtype == torch.bfloat16 and DEVICE == "cpu" else step / 2


def assert_exact(found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)  # float64: sums of thousands of terms in another order


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_sums_and_gradients_are_those_of_the_definition(objective: Objective, transform: LogitTransform) -> None:
    """With a bias and without, for rows of one length and of many."""
    width = 37
    for kept, bias in ((4, None), (MIXED, bias_of(width))):
        arguments = (objective, products_of(width), targets_of(width, kept, objective.temperature), bias, transform)
        assert_exact(by_kernel(*arguments), defined(*arguments))


@pytest.mark.parametrize("width", [1, 2, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK, 50257])
def test_vocabularies_that_are_no_multiple_of_a_block(width: int) -> None:
    for objective in (Objective(), Objective(alpha=0.6, temperature=4.0), Objective("ce", "none", 0.0)):
        kept = min(600, width - 1) if objective.temperature == 1.0 else 1  # 600: more than are read at once
        arguments = (objective, products_of(width, rows=2), targets_of(width, max(kept, 1), objective.temperature, 2))
        assert_exact(by_kernel(*arguments), defined(*arguments))


@pytest.mark.parametrize("kept", [1, 37, (37, 1, 37, 36, 2)], ids=["k=1", "k=V", "rows up to V"])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_rows_that_keep_one_id_or_all(objective: Objective, kept: int | tuple[int, ...]) -> None:
    """Where all are kept there is nothing else, and nothing of it is NaN."""
    arguments = (objective, products_of(37), targets_of(37, kept, objective.temperature))
    assert_exact(by_kernel(*arguments), defined(*arguments))


@pytest.mark.parametrize("kept", [8, (64, 1, 3, 64, 30)], ids=["one length", "many"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_narrow_products_get_the_gradient_rounded_once(
    dtype: torch.dtype, transform: LogitTransform, kept: Any
) -> None:
    width = BLOCK + 103
    for objective in (Objective(), Objective(alpha=0.5, temperature=2.0), Objective("ce", "none", 0.0)):
        targets = targets_of(width, kept, objective.temperature)
        arguments = (objective, products_of(width, dtype), targets, bias_of(width, torch.float32), transform)
        sums, gradient = by_kernel(*arguments)
        expected_sums, expected = defined(*arguments)
        assert gradient.dtype == dtype
        torch.testing.assert_close(sums.double(), expected_sums, rtol=1e-5, atol=1e-4)  # float32 over 4,199 columns
        # one rounding; and float32 of values up to 20, whose differences may be as small
        slack = (
            2e-6 * expected.abs().amax(1, keepdim=True) + torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
        )
        assert ((gradient.double() - expected).abs() <= (rounding(dtype) + 2e-5) * expected.abs() + slack).all()


@pytest.mark.parametrize("kept", [64, MIXED], ids=["one length", "many"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_they_are_torch_s_kernels_on_gpt_2_s_vocabulary(dtype: torch.dtype, kept: Any) -> None:
    for objective in (Objective(), Objective("ce", "none", 0.0)):
        products, targets = products_of(50257, dtype), there(targets_of(50257, kept))
        targets = replace(targets, logprobs=targets.logprobs.float(), tail_mass=targets.tail_mass.float())
        found, expected = there(products).clone(), there(products).clone()
        sums = triton_gradient_(objective, found, None, PLAIN, targets)
        twin = torch_gradient_(objective, expected, None, PLAIN, targets)
        assert alike(found, expected, sums, twin)
        assert not alike(found, expected, sums * 1.001, twin)
        found[3, 50256] += found[3, 50256] / 8  # a gradient of a millionth or so
        assert not alike(found, expected, sums, twin) or found[3, 50256].abs() < 1e-5 * expected[3].abs().max()


def test_rows_without_kept_ids_learn_cross_entropy_alone() -> None:
    """Everything is one outcome then, whose divergence is 0."""
    products, gold = products_of(37), torch.arange(N)
    empty = torch.zeros(0, dtype=torch.float64)
    kept = KeptIds(there(empty.long()), there(empty), there(torch.ones(N)), there(torch.zeros(N + 1, dtype=torch.long)))
    weights: dict[str, Any] = {"kd_weight": 0.7, "ce_weight": 0.3, "temperature": 1.0, "transform": PLAIN}
    written = there(products).clone()
    divergence, _ = gradient_rows_(written, None, there(gold), kept, **weights)
    assert float(divergence.abs().max()) < 1e-12
    _, expected = defined(Objective("ce", "none", 0.0), products, LossTargets(gold))
    torch.testing.assert_close(written.cpu(), 0.3 * expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_columns_without_probability_are_as_if_they_were_not_there(objective: Objective) -> None:
    """A model masks them by -inf, or by a bias of -10,000."""
    width, more = 37, 50
    targets = targets_of(width, 4, objective.temperature)
    expected = by_kernel(objective, products_of(width), targets)
    wide = torch.full((N, more), -torch.inf, dtype=torch.float64)
    wide[:, :width] = products_of(width)
    masked, bias = wide.nan_to_num(neginf=1.0), torch.zeros(more, dtype=torch.float64)
    bias[width:] = -1e4
    for sums, gradient in (by_kernel(objective, wide, targets), by_kernel(objective, masked, targets, bias)):
        assert not gradient[:, width:].any()
        assert_exact((sums, gradient[:, :width]), expected)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_constant_added_to_a_row_changes_nothing_and_its_gradient_sums_to_zero(objective: Objective) -> None:
    targets = targets_of(37, 4, objective.temperature)
    sums, gradient = by_kernel(objective, products_of(37), targets)
    torch.testing.assert_close(gradient.sum(1), torch.zeros(N, dtype=torch.float64), rtol=0, atol=1e-12)
    for found, expected in zip(by_kernel(objective, products_of(37) + 40.0, targets), (sums, gradient), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)  # 40 takes 5 bits of the logits


def test_a_student_like_the_teacher_has_no_loss_and_no_gradient() -> None:
    width, generator = 37, torch.Generator().manual_seed(2)
    teacher = 3 * torch.randn(N, width, generator=generator, dtype=torch.float64)
    for temperature in (0.5, 1.0, 4.0):
        sums, gradient = by_kernel(Objective(temperature=temperature), teacher, targets_of(width, MIXED, temperature))
        assert abs(float(sums[1])) < 1e-12
        assert float(gradient.abs().max()) < 1e-12


def test_a_sure_student_s_tail_keeps_its_digits() -> None:
    """The tail has e^-60 of the student's probability in float32: 1 minus the kept ones would be 0, and the loss infinite."""
    products = torch.zeros(N, 37)
    targets = targets_of(37, 4)
    products.scatter_(1, targets.token_ids, 60.0)  # type: ignore[arg-type]
    sums, gradient = by_kernel(Objective(), products, targets)
    expected_sums, expected = defined(Objective(), products, targets)
    torch.testing.assert_close(sums.double(), expected_sums, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradient.double(), expected, rtol=1e-5, atol=1e-6)


def test_an_id_outside_the_vocabulary_makes_the_loss_no_number_and_writes_nowhere() -> None:
    for field in ("token_ids", "gold_ids"):
        for wrong in (37, -1, 2**40):
            targets = targets_of(37, 4)
            getattr(targets, field)[1] = wrong
            storage = torch.full((N, 64), 7.0, dtype=torch.float64, device=DEVICE)
            storage[:, 7:44] = there(products_of(37))
            sums = triton_gradient_(Objective(alpha=0.5), storage[:, 7:44], None, PLAIN, there(targets))
            assert sums[0].isnan()
            assert (storage[:, :7] == 7.0).all()
            assert (storage[:, 44:] == 7.0).all()


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_strides_of_any_kind(objective: Objective) -> None:
    """Rows in a wider buffer, as the output layer makes them; every second column; columns that lie one after another."""
    targets = targets_of(37, 4, objective.temperature)
    expected = by_kernel(objective, products_of(37), targets)
    apart = replace(targets, gold_ids=targets.gold_ids.repeat_interleave(2)[::2])
    if targets.token_ids is not None:
        apart = replace(apart, token_ids=targets.token_ids.T.contiguous().T)
    for storage in (torch.empty(N, 64)[:, :37], torch.empty(N, 74)[:, ::2], torch.empty(37, N).T):
        products = storage.double()
        base = torch.empty_strided(storage.shape, storage.stride(), dtype=torch.float64, device=DEVICE)
        base.copy_(products_of(37))
        assert base.stride() == storage.stride()
        assert products.shape == base.shape
        sums = triton_gradient_(objective, base, None, PLAIN, there(apart))
        assert_exact((sums.cpu(), base.cpu()), expected)


def test_more_than_two_to_the_31_products() -> None:
    """Row 2 begins 2^31 products after row 0; no memory is touched between the rows."""
    width = 37
    if DEVICE == "cuda" and torch.cuda.mem_get_info()[0] < 6 * 2**30:
        pytest.skip("less than 6 GB free on the GPU")
    far = torch.empty(2**31 + width, dtype=torch.bfloat16, device=DEVICE).as_strided((3, width), (2**30, 1))
    products, targets = products_of(width, torch.bfloat16, 3), targets_of(width, 4, rows=3)
    far.copy_(products)
    sums = triton_gradient_(Objective(), far, None, PLAIN, there(targets))
    expected_sums, expected = by_kernel(Objective(), products, targets)
    assert torch.equal(far.cpu(), expected)
    assert torch.equal(sums.cpu(), expected_sums)


def test_no_rows_have_no_loss() -> None:
    for kept in (4, MIXED):
        targets = targets_of(37, kept)
        for objective in (Objective(), Objective("ce", "none", 0.0)):
            sums = triton_gradient_(objective, there(products_of(37))[:0], None, PLAIN, there(targets)[:0])
            assert sums.tolist() == [0.0, 0.0, 0.0]


def test_where_rows_begin_is_known_without_waiting() -> None:
    for kept in (4, MIXED):
        targets = targets_of(37, kept)
        lengths = [4] * N if kept == 4 else list(MIXED)
        assert starts_of(targets).tolist() == [sum(lengths[:row]) for row in range(N + 1)]
        assert starts_of(targets[2:4]).tolist() == [0, lengths[2], lengths[2] + lengths[3]]


def leaves(dtype: torch.dtype) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((11, 6), (140, 6), (140,))
    return tuple(torch.randn(s, generator=generator, dtype=dtype).to(DEVICE).requires_grad_() for s in shapes)


@pytest.mark.parametrize("kept", [4, (1, 130, 7, 2, 6, 9, 1, 4, 4, 4, 12)], ids=["one length", "many"])
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_the_output_layer_has_the_gradients_it_has_with_torch_s_kernels(transform: LogitTransform, kept: Any) -> None:
    """Weight, bias and hidden states; 130 of 140 columns count, and chunks of 4 rows."""
    targets = there(targets_of(130, kept, 2.0, 11))
    for objective in (Objective(alpha=0.6, temperature=2.0), Objective("ce", "none", 0.0)):
        for with_bias in (True, False):
            outcomes = []
            for loss in (objective, FusedLoss(objective, pytest.fail, required=True)):
                hidden, weight, bias = leaves(torch.float64)
                used = bias if with_bias else None
                total, kd, ce = chunked_head_loss(
                    hidden, weight, used, loss, targets, vocabulary_size=130, chunk=4, transform=transform
                )
                gradients = torch.autograd.grad(total, [hidden, weight, bias] if with_bias else [hidden, weight])
                outcomes.append([total.detach(), kd, ce, *gradients])
            for found, expected in zip(*outcomes, strict=True):
                torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "no bias"])
def test_in_bfloat16_they_are_as_near_to_float64_as_torch_s_kernels(with_bias: bool) -> None:
    objective, targets = Objective(alpha=0.6), targets_of(130, 4, 1.0, 11)
    layer = [leaf.float().detach().double().requires_grad_() for leaf in leaves(torch.float32)]
    narrow_targets = replace(targets, logprobs=targets.logprobs.float(), tail_mass=targets.tail_mass.float())

    def gradients(loss: Any, tensors: list[Tensor], narrow: bool) -> list[Tensor]:
        hidden, weight, bias = tensors
        own = there(narrow_targets if narrow else targets)
        with torch.autocast(DEVICE, torch.bfloat16, enabled=narrow):
            total, *_ = chunked_head_loss(
                hidden, weight, bias if with_bias else None, loss, own, vocabulary_size=130, chunk=4
            )
        wanted = [hidden, weight, bias] if with_bias else [hidden, weight]
        return [total.detach(), *torch.autograd.grad(total, wanted)]

    exact = gradients(objective, layer, narrow=False)
    torch_s = gradients(objective, list(leaves(torch.float32)), narrow=True)
    triton_s = gradients(FusedLoss(objective, pytest.fail, required=True), list(leaves(torch.float32)), narrow=True)
    for reference, one, other in zip(exact, torch_s, triton_s, strict=True):
        errors = [float((found - reference).norm() / reference.norm()) for found in (one, other)]
        # the same roundings, and float32 sums in another order; twice the error where bfloat16 is cut and not rounded
        assert errors[1] <= (1.02 if DEVICE == "cuda" else 2.0) * errors[0] + 1e-6


def test_a_run_trains_as_it_does_with_torch_s_kernels(run: Any) -> None:
    """Float32 from the first step to the last; the run is continued with the other kernels."""
    plain = run("torch", device=DEVICE, kernels="torch")
    fused = run("triton", device=DEVICE, kernels="triton")
    assert not [sentence for sentence in fused.said if "kernels" in sentence]
    for one, other in zip(plain.records, fused.records, strict=True):
        assert other.loss == pytest.approx(one.loss, rel=1e-5)
    for name, weight in plain.weights.items():  # AdamW moves by 1e-3 a step, whatever the size of a gradient
        assert (fused.weights[name] - weight).abs().mean() < 1e-5, name


@pytest.mark.slow
@pytest.mark.parametrize("architecture", [80, 90, 100])
def test_the_kernel_compiles_for_gpus_that_are_not_here(architecture: int) -> None:
    """To machine code, in a process without the interpreter: whole blocks are read 16 bytes at a time."""
    code = COMPILE.format(architecture=architecture)
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == ["2", "1", "True"]


COMPILE = """
import triton, triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from kd.student_trainer.faster.triton_kernels import gradient_rows
from kd.student_trainer.faster.triton_launch import BLOCK, ENTRIES, WARPS
fixed = dict(column_stride=1, bias=None, WIDE=tl.float32, KD_WEIGHT=1.0, CE_WEIGHT=0.0, TEMPERATURE=1.0, SCALE=1.0, CAP=None)
fixed |= dict(BLOCK=BLOCK, ENTRIES=ENTRIES)
types = dict(products="*bf16", row_stride="i32", gold_ids="*i64", ids="*i64", starts="*i64", columns_in_all="i32")
names = gradient_rows.arg_names
signature = {{n: "constexpr" if n in fixed else types.get(n, "*fp32") for n in names}}
aligned = {{(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if signature[n][0] == "*" or n == "row_stride"}}
constants = {{(i,): fixed[n] for i, n in enumerate(names) if n in fixed}}
source = ASTSource(fn=gradient_rows, signature=signature, constexprs=constants, attrs=aligned)
options = dict(num_warps=WARPS, enable_fp_fusion=True)
made = triton.compile(source, target=GPUTarget("cuda", {architecture}, 32), options=options)
assert made.asm["cubin"]
code = made.asm["ptx"]
print(code.count("ld.global.v4"), code.count("st.global.v4"), "cvt.rn.bf16" in code)
"""
