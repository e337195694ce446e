"""The teacher pass gives the model's own predictions, whatever the batches, the padding or the memory."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from stand_ins import OutOfMemory, Poisoned, make_rows

from kd.cache_builder.store.targets import RawTargets, TargetConfig
from kd.cache_builder.teacher.sparsify import Sparsifier
from kd.cache_builder.teacher.teacher_pass import Teacher, collect
from kd.common.errors import TeacherError
from kd.data.rows.example import Example
from kd.data.tokenizing.token_rows import TokenRows
from kd.models.heads import LanguageModelHead, split_head
from kd.models.loading import load_model
from kd.models.model_request import ModelRequest

V = 400
CONFIG = TargetConfig(profile="full", top_k=8, samples=5, tail_bands=4)

# a matrix product over 32 numbers and 2 layers in float32, its sums taken in another order for another shape;
# logits here reach 60
ROUNDING = 1e-4


@pytest.fixture(scope="module")
def head(model_dir: Path) -> LanguageModelHead:
    return split_head(load_model(ModelRequest(str(model_dir), device="cpu")))


ROWS = make_rows([(1, 7), (3, 20), (1, 1), (5, 5), (2, 40), (1, 20), (10, 2), (1, 7), (4, 33)])


def teacher_of(head: LanguageModelHead, config: TargetConfig = CONFIG, **options) -> Teacher:
    boundary = torch.arange(0, V, 3) if config.profile == "full" else None
    return Teacher(head, Sparsifier(config, V, boundary), **options)


def score(teacher: Teacher, rows: list[TokenRows] = ROWS, first: int = 0) -> RawTargets:
    *_, (_, last) = collect(rows, teacher.run(rows, first))
    assert last is not None
    return last


def assert_same(a: RawTargets, b: RawTargets) -> None:
    """Equal but for float rounding; ids and draws exactly (no two logits here are closer than rounding)."""
    for field in dataclasses.fields(RawTargets):
        x, y = getattr(a, field.name), getattr(b, field.name)
        assert (x is None) == (y is None), field.name
        if x is not None and x.dtype.kind == "f":
            np.testing.assert_allclose(x, y, atol=ROUNDING, err_msg=field.name)
        elif x is not None:
            np.testing.assert_array_equal(x, y, err_msg=field.name)


@pytest.fixture(scope="module")
def reference(head: LanguageModelHead) -> RawTargets:
    """One example at a time: no padding, no neighbours."""
    return score(teacher_of(head, tokens_per_batch=1))


def test_hidden_states_times_the_head_are_the_models_logits(model_dir: Path, reference: RawTargets):
    model = load_model(ModelRequest(str(model_dir), device="cpu"))
    start = 0
    for row in ROWS:
        with torch.no_grad():
            logits = model(torch.from_numpy(row.input_ids.astype(np.int64))[None]).logits[0]
        c, n = len(row.context_ids), len(row.target_ids)
        log_p = logits[c - 1 : c + n - 1].double().log_softmax(-1).numpy()
        part = slice(start, start + n)
        np.testing.assert_allclose(reference.gold_logprob[part], log_p[np.arange(n), row.target_ids], atol=ROUNDING)
        order = np.argsort(-log_p, axis=1)[:, :8]
        np.testing.assert_array_equal(reference.token_ids[part], order)
        np.testing.assert_allclose(
            reference.relative[part] - reference.log_z[part, :1], np.take_along_axis(log_p, order, 1), atol=ROUNDING
        )
        start += n


@pytest.mark.parametrize("tokens_per_batch", [30, 64, 100, 4096])
@pytest.mark.parametrize("head_chunk", [1, 7, 256])
def test_results_do_not_depend_on_batches_or_head_chunks(head, reference, tokens_per_batch: int, head_chunk: int):
    assert_same(score(teacher_of(head, tokens_per_batch=tokens_per_batch, head_chunk=head_chunk)), reference)


def test_right_padded_batches_equal_singles(head, reference):
    teacher = teacher_of(head, tokens_per_batch=10_000)
    assert len(list(teacher.run(ROWS, 0))) == 1  # all lengths together, most of them padded
    assert_same(score(teacher), reference)


def test_the_order_of_the_examples_is_restored(head, reference):
    order = [4, 8, 0, 2, 6, 1, 3, 5, 7]
    config = TargetConfig(top_k=8)  # draws follow an example's number, so they would rightly change
    shuffled = score(teacher_of(head, config, tokens_per_batch=64), [ROWS[i] for i in order])
    starts = np.cumsum([0, *(len(r.target_ids) for r in ROWS)])
    rows = np.concatenate([np.arange(starts[i], starts[i + 1]) for i in order])
    np.testing.assert_array_equal(shuffled.token_ids, reference.token_ids[rows])
    np.testing.assert_array_equal(shuffled.gold_ids, reference.gold_ids[rows])
    np.testing.assert_allclose(shuffled.log_z, reference.log_z[rows], atol=ROUNDING)


def test_draws_depend_on_seed_and_example_number_only(head, reference):
    for batch in (1, 200):
        part = score(teacher_of(head, tokens_per_batch=batch), ROWS[3:6], first=3)
        start = sum(len(r.target_ids) for r in ROWS[:3])
        same = slice(start, start + len(part.gold_ids))
        np.testing.assert_array_equal(part.sample_ids, reference.sample_ids[same])
        np.testing.assert_array_equal(part.sample_counts, reference.sample_counts[same])
    for changed in (
        score(teacher_of(head), ROWS[3:6], first=4),
        score(teacher_of(head, dataclasses.replace(CONFIG, seed=1)), ROWS[3:6], first=3),
    ):
        assert changed.sample_ids is not None
        assert not np.array_equal(changed.sample_ids, reference.sample_ids[same])


def test_padded_vocabulary_columns_are_ignored(head, reference):
    extra = torch.full((48, head.weight.shape[1]), 3.0)  # would win many rows if it were looked at
    padded = LanguageModelHead(head.backbone, torch.cat([head.weight, extra]), None)
    assert_same(score(teacher_of(padded)), reference)


def test_gold_ids_and_byte_ends_are_those_of_the_rows(reference):
    np.testing.assert_array_equal(reference.gold_ids, np.concatenate([r.target_ids for r in ROWS]))
    np.testing.assert_array_equal(reference.byte_end, np.concatenate([r.byte_end for r in ROWS]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_16_bit_models_output_layer_is_computed_in_float32(model_dir: Path, dtype: torch.dtype):
    """Rounding logits near 60 to bfloat16 would move them by up to 0.13, unseen by the measured decoding error."""
    name = str(dtype).removeprefix("torch.")
    parts = split_head(load_model(ModelRequest(str(model_dir), device="cpu", dtype=name)))
    row = make_rows([(2, 30)])[0]
    got = score(teacher_of(parts, dataclasses.replace(CONFIG, top_k=V, tail_bands=0)), [row])
    with torch.no_grad():
        hidden = parts.scored_hidden([row.context_ids], [row.target_ids]).double()
        exact = (hidden @ parts.weight.double().T).log_softmax(1)
        rounded = torch.nn.functional.linear(hidden.to(dtype), parts.weight).double().log_softmax(1)
    expected, found = exact.gather(1, torch.from_numpy(got.token_ids)), got.relative - got.log_z[:, :1]
    # 32 products of magnitude up to 60 summed in float32
    np.testing.assert_allclose(found, expected.numpy(), atol=5e-5)
    assert float((rounded - exact).abs().max()) > 2e-3  # the rounding that is left out would be seen


def test_progress_counts_rows_to_the_end(head):
    steps = [done for done, _ in collect(ROWS, teacher_of(head, tokens_per_batch=64).run(ROWS, 0))]
    assert steps == sorted(steps)
    assert steps[-1] == sum(len(r.target_ids) for r in ROWS)


@pytest.mark.parametrize(("tokens_per_batch", "head_chunk"), [(1, 256), (4096, 5), (4096, 256)])
def test_nan_names_the_example_and_the_token(head, tokens_per_batch: int, head_chunk: int):
    rows = make_rows([(1, 7), (3, 9), (2, 30)], seed=1)
    rows[1].target_ids[3] = 399
    for other in (rows[0].input_ids, rows[2].input_ids):
        assert 399 not in other
    poisoned = LanguageModelHead(Poisoned(head.backbone, 399), head.weight, head.bias)
    with pytest.raises(TeacherError, match="not finite") as caught:
        score(teacher_of(poisoned, tokens_per_batch=tokens_per_batch, head_chunk=head_chunk), rows)
    assert caught.value.details["where"] == "example e1"
    assert str(caught.value.details["found"]).endswith(
        "target token 4"
    )  # the first token predicted from the poisoned one


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, RuntimeError])
def test_out_of_memory_halves_the_batch_and_gives_the_same_targets(head, reference, error):
    small = OutOfMemory(head.backbone, 60, error)
    teacher = teacher_of(LanguageModelHead(small, head.weight, head.bias), tokens_per_batch=10_000)
    assert_same(score(teacher), reference)
    assert 1 < small.failures < 12  # what is left is batched anew, not halved batch by batch


def test_out_of_memory_in_one_shard_leaves_the_batches_of_the_next_alone(head):
    """Or a build resumed at the second shard would batch it, and round it, another way."""
    small = OutOfMemory(head.backbone, 60)
    teacher = teacher_of(LanguageModelHead(small, head.weight, head.bias), tokens_per_batch=10_000)
    first, second = ([batch for batch, _ in teacher.run(ROWS, 0)] for _ in range(2))
    assert first == second


def test_out_of_memory_in_the_head_halves_its_chunk_and_gives_the_same_targets(head, reference, monkeypatch):
    product = LanguageModelHead.logits
    calls = []

    def bounded(self, hidden):
        calls.append(len(hidden))
        if len(hidden) > 32:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return product(self, hidden)

    monkeypatch.setattr(LanguageModelHead, "logits", bounded)
    teacher = teacher_of(head)
    assert_same(score(teacher), reference)
    assert max(calls) > 32
    assert 32 in calls


def test_a_single_example_that_does_not_fit_names_itself(head):
    teacher = teacher_of(LanguageModelHead(OutOfMemory(head.backbone, 41), head.weight, head.bias))
    with pytest.raises(TeacherError, match="not enough memory") as caught:
        score(teacher)
    assert caught.value.details["where"] == "e4"


def test_other_runtime_errors_are_not_mistaken_for_memory(head):
    class Broken:
        def __call__(self, **options):
            raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        score(teacher_of(LanguageModelHead(Broken(), head.weight, head.bias)))


def test_real_models_in_padded_batches_equal_singles(shared: Path):
    """A rotary Llama layout: positions and masks of padded batches are right there too."""
    model = load_model(ModelRequest(str(shared / "weights" / "stories260K"), device="cpu"))
    llama = split_head(model)
    rng = np.random.default_rng(0)
    rows = [
        TokenRows(
            Example(f"e{n}", "x"),
            rng.integers(3, 512, 2).astype(np.int32),
            rng.integers(3, 512, n).astype(np.int32),
            np.arange(n),
        )
        for n in (3, 30, 12, 25)
    ]
    config = TargetConfig(top_k=8)
    alone, padded = (score(Teacher(llama, Sparsifier(config, 512), tokens_per_batch=b), rows) for b in (1, 4096))
    np.testing.assert_array_equal(alone.token_ids, padded.token_ids)
    for name in ("log_z", "relative", "gold_logprob"):  # not ranks: at 400 of 512, logits are closer than rounding
        np.testing.assert_allclose(getattr(alone, name), getattr(padded, name), atol=ROUNDING, err_msg=name)


# encoder-decoder teachers


@pytest.fixture(scope="module")
def t5(t5_dir: Path):
    return load_model(ModelRequest(str(t5_dir), device="cpu"))


def test_an_encoder_decoder_s_rows_are_its_own_teacher_forced_predictions(t5):
    rows = make_rows([(5, 7), (3, 20), (1, 1), (30, 4)])
    rows = [dataclasses.replace(r, context_ids=r.context_ids % 300, target_ids=r.target_ids % 300) for r in rows]
    teacher = Teacher(split_head(t5), Sparsifier(TargetConfig(top_k=20), 300), tokens_per_batch=4096)
    got = score(teacher, rows)
    expected = []
    for row in rows:  # one at a time, unpadded, by the model's own way of shifting labels
        ids, labels = (torch.from_numpy(x.astype(np.int64))[None] for x in (row.context_ids, row.target_ids))
        with torch.no_grad():
            logits = t5(input_ids=ids, labels=labels).logits[0, :, :300]
        expected.append(logits.log_softmax(1).gather(1, labels[0, :, None])[:, 0])
    np.testing.assert_allclose(got.gold_logprob, torch.cat(expected).numpy(), atol=ROUNDING)
    alone = score(Teacher(split_head(t5), Sparsifier(TargetConfig(top_k=20), 300), tokens_per_batch=1), rows)
    np.testing.assert_allclose(got.log_z, alone.log_z, atol=ROUNDING)
    assert got.token_ids is not None
    assert got.token_ids.max() < 300  # the model has 320 logits


def test_the_share_of_padding_is_counted_on_both_sides(t5):
    rows = [
        dataclasses.replace(r, context_ids=r.context_ids % 300, target_ids=r.target_ids % 300)
        for r in make_rows([(10, 3), (10, 2), (8, 3)])
    ]
    teacher = Teacher(split_head(t5), Sparsifier(TargetConfig(top_k=20), 300), tokens_per_batch=4096)
    assert teacher.padding_share == 0.0
    score(teacher, rows)
    assert teacher.padding_share == pytest.approx(1 - 36 / 39)  # 3 * (10 + 3) positions, one batch
