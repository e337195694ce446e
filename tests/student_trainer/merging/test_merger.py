"""Merging from files: every method against a whole-model re-computation in numpy float64, laws through files, refusals."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from glue_fixtures import Tensors, read_tensors
from transformers import AutoConfig
from transformers.pytorch_utils import Conv1D

from kd.common.errors import DataError
from kd.common.progress import final
from kd.common.settings import make
from kd.models.classifiers import load_classifier
from kd.models.model_request import ModelRequest
from kd.student_trainer.merging import stored_weights as weights_module
from kd.student_trainer.merging.merge_settings import MergeSettings
from kd.student_trainer.merging.merger import Merger, prepared_merger
from kd.student_trainer.merging.method_registry import MERGE_METHODS
from kd.student_trainer.merging.pool import ModelPool, PoolModel
from kd.student_trainer.merging.stored_weights import skeleton
from kd.student_trainer.merging.training_rows import RowSampler


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of 300 numbers: no tensor of the tiny models but the smallest is read in one."""
    monkeypatch.setattr(weights_module, "BLOCK_ELEMENTS", 300)


def prepared(pool: ModelPool, settings: dict[str, Any], folder: Path, load_rows: Any = None) -> Merger:
    return final(prepared_merger(pool, make(MergeSettings, settings), folder=folder, load_rows=load_rows))


def merged(pool: ModelPool, method: str, folder: Path, load_rows: Any = None, **settings: Any) -> Tensors:
    merger = prepared(pool, {"method": method, **settings}, folder, load_rows)
    model = skeleton(pool, device="cpu")
    for parameter in model.parameters():
        torch.nn.init.constant_(parameter, float("nan"))  # a tensor that is not written shows
    merger.apply(model)
    return {name: model.state_dict()[name].double().numpy() for name in merger.stored.names}


def assert_same(result: Tensors, expected: Tensors) -> None:
    assert result.keys() == expected.keys()
    for name, value in expected.items():
        # stored in float32: half a unit in the last place, and one more where float64 sums sit on a rounding boundary
        np.testing.assert_allclose(result[name], value, rtol=2**-23, atol=1e-9, err_msg=name)


def sampler(glue_root: Path, **changes: Any) -> RowSampler:
    settings: dict[str, Any] = {
        "classifiers": True,
        "examples": 20,
        "batch_size": 6,
        "pad_to": None,
        "max_length": 64,
        "task_root": glue_root,
        "device": "cpu",
        "seed": 4,
    } | changes
    return RowSampler(**settings)


def test_simple_average_and_task_arithmetic_equal_numpy(pool: ModelPool, wholes: Any, tmp_path: Path) -> None:
    models, base = wholes
    mean = {n: sum(m[n] for m in models) / 3 for n in base}
    assert_same(merged(pool, "simple-average", tmp_path), mean)
    moved = {n: base[n] + 0.4 * sum(m[n] - base[n] for m in models) for n in base}
    assert_same(merged(pool, "task-arithmetic", tmp_path, scaling=0.4), moved)


@pytest.mark.parametrize("elect", ["sum", "mean", "max"])
def test_ties_equals_numpy_on_flat_vectors(pool: ModelPool, wholes: Any, tmp_path: Path, elect: str) -> None:
    models, base = wholes
    flat = np.stack([np.concatenate([(m[n] - base[n]).ravel() for n in sorted(base)]) for m in models])
    size = flat.shape[1]
    sizes = np.abs(flat).astype(np.float32)
    thresholds = np.sort(sizes, axis=1)[:, size - int(size * 0.2) - 1]
    kept = np.where(sizes >= thresholds[:, None], flat, 0.0)
    signs = np.sign(kept.sum(axis=0))
    signs[signs == 0] = np.sign(signs.sum())
    agreeing = np.where(np.where(signs > 0, kept > 0, kept < 0), kept, 0.0)
    change = {
        "sum": agreeing.sum(axis=0),
        "mean": agreeing.sum(axis=0) / np.maximum((agreeing != 0).sum(axis=0), 1),
        "max": np.abs(agreeing).max(axis=0) * signs * (agreeing != 0).any(axis=0),
    }[elect]
    expected, start = {}, 0
    for n in sorted(base):
        part = change[start : start + base[n].size].reshape(base[n].shape)
        expected[n], start = base[n] + 0.5 * part, start + base[n].size
    assert_same(merged(pool, "ties", tmp_path, scaling=0.5, elect=elect), expected)


@pytest.mark.parametrize("batch_size", [6, 1])
def test_fisher_equals_float64_gradients_and_numpy(
    gpt2_pool: ModelPool, glue_root: Path, tmp_path: Path, batch_size: int
) -> None:
    """Batches of one are `--per-example`; batches of six mix their rows, as in the reference."""
    load_rows = sampler(glue_root, batch_size=batch_size)
    result = merged(gpt2_pool, "fisher", tmp_path, load_rows)
    information: list[Tensors] = []
    for model in gpt2_pool.models:
        whole = load_classifier(ModelRequest(model.path, device="cpu"), pad_id=0).double()
        sums = {n: np.zeros(p.shape) for n, p in whole.base_model.named_parameters()}
        rows = 0
        for batch in load_rows(model).batches:
            whole.zero_grad()
            p = torch.softmax(whole(**batch).logits, dim=1)
            (p.detach().sqrt() * p.log()).sum().backward()
            rows += len(p)
            for n, parameter in whole.base_model.named_parameters():
                assert parameter.grad is not None
                sums[n] += parameter.grad.numpy() ** 2
        information.append({n: v / rows for n, v in sums.items()})
    assert rows == 20
    norms = np.array([np.sqrt(sum((v**2).sum() for v in one.values())) for one in information])
    shares = 1 / (norms + 1e-6)
    shares /= shares.sum() * 3
    models = [read_tensors(m, list(result)) for m in gpt2_pool.models]
    for n, value in result.items():
        weights = [w * (one[n] + 1e-6) for w, one in zip(shares, information, strict=True)]
        expected = sum(w * m[n] for w, m in zip(weights, models, strict=True)) / sum(weights)
        # F comes from float32 gradients here: relative errors of 1e-3 in the smallest, weighing parameters 0.1 apart
        np.testing.assert_allclose(value, expected, atol=2e-5, err_msg=n)


@pytest.mark.parametrize("masked", [False, True])
def test_regmean_equals_numpy_on_recorded_inputs(
    pool: ModelPool, glue_root: Path, tmp_path: Path, masked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Conv1D in the GPT-2 layout, Linear in the others; padding to the limit counts unless it is masked."""
    load_rows = sampler(glue_root, pad_to=None if masked else 64)
    result = merged(pool, "regmean", tmp_path, load_rows, mask_pads=masked)
    seen: dict[int, list[np.ndarray]] = {}
    for cls in (Conv1D, torch.nn.Linear):
        original = cls.forward

        def recorded(self: Any, x: torch.Tensor, original: Callable[..., Any] = original) -> Any:
            seen.setdefault(id(self), []).append(x.detach().double().numpy())
            return original(self, x)

        monkeypatch.setattr(cls, "forward", recorded)
    grams: list[Tensors] = []
    for model in pool.models:
        row_model = load_rows(model)
        totals: Tensors = {}
        tokens = 0
        for batch in row_model.batches:
            seen.clear()
            with torch.no_grad():
                row_model.part(**batch)
            keep = (
                batch["attention_mask"].numpy().astype(bool)
                if masked
                else np.ones(batch["input_ids"].shape, dtype=bool)
            )
            tokens += int(keep.sum())
            for name, module in row_model.part.named_modules():
                for x in seen.get(id(module), []):
                    totals[f"{name}.weight"] = totals.get(f"{name}.weight", 0.0) + x[keep].T @ x[keep]
        grams.append({n: g / tokens for n, g in totals.items()})
    models = [read_tensors(m, list(result)) for m in pool.models]
    assert len(grams[0]) == {"gpt2": 8, "gpt_neox": 8, "llama": 14}[row_model.part.config.model_type]
    for n, value in result.items():
        if n not in grams[0]:
            np.testing.assert_allclose(value, sum(m[n] for m in models) / 3, rtol=2**-23, atol=1e-9)
            continue
        flip = row_model.part.config.model_type != "gpt2"
        shrunk = [g[n] * (0.6 + 0.4 * np.eye(len(g[n]))) for g in grams]
        pulled = sum(g @ (m[n].T if flip else m[n]) for g, m in zip(shrunk, models, strict=True))
        expected = np.linalg.solve(sum(shrunk), pulled)
        # Gram matrices are summed in float32 here: 1e-6 of them, times a condition number of about 100
        np.testing.assert_allclose(value, expected.T if flip else expected, atol=2e-4, err_msg=n)


def copies(pool: ModelPool, folder: Path, tensors: list[int]) -> ModelPool:
    """A pool of the given models of `pool`, repeated at will, under names of their own."""
    models = tuple(replace(pool.models[i], name=pool.models[i].name) for i in tensors)
    return replace(pool, models=models)


@pytest.mark.parametrize("method", ["simple-average", "fisher", "regmean"])
def test_a_model_merged_with_itself_is_the_model_exactly(
    gpt2_pool: ModelPool, glue_root: Path, tmp_path: Path, method: str
) -> None:
    twice = copies(gpt2_pool, tmp_path, [1, 1, 1])
    result = merged(twice, method, tmp_path, sampler(glue_root))
    for name, value in read_tensors(gpt2_pool.models[1], list(result)).items():
        # fisher divides two sums that float64 rounds apart by 1e-16: the same float32
        assert np.array_equal(result[name], value), name


def test_scaling_zero_is_the_base_and_one_model_at_one_is_that_model(gpt2_pool: ModelPool, tmp_path: Path) -> None:
    assert gpt2_pool.base is not None
    for method in ("task-arithmetic", "ties", "dare"):
        result = merged(gpt2_pool, method, tmp_path, scaling=0.0)
        assert all(np.array_equal(result[n], v) for n, v in read_tensors(gpt2_pool.base, list(result)).items())
    one = copies(gpt2_pool, tmp_path, [2])
    result = merged(one, "ties", tmp_path, scaling=1.0, threshold=100)
    assert all(np.array_equal(result[n], v) for n, v in read_tensors(gpt2_pool.models[2], list(result)).items())


@pytest.mark.parametrize("method", [m for m in MERGE_METHODS if m not in ("ensemble", "dare")])
def test_the_order_of_models_does_not_matter(
    gpt2_pool: ModelPool, glue_root: Path, tmp_path: Path, method: str
) -> None:
    forward = merged(gpt2_pool, method, tmp_path / "a", sampler(glue_root))
    backward = merged(copies(gpt2_pool, tmp_path, [2, 1, 0]), method, tmp_path / "b", sampler(glue_root))
    for n, value in forward.items():
        # float64 sums in another order may round to the neighbouring float32
        np.testing.assert_allclose(value, backward[n], rtol=2**-22, atol=1e-9)


def test_simple_average_is_task_arithmetic_at_one_third(gpt2_pool: ModelPool, tmp_path: Path) -> None:
    assert_same(
        merged(gpt2_pool, "simple-average", tmp_path),
        merged(gpt2_pool, "task-arithmetic", tmp_path, scaling=1 / 3),
    )


def test_excluded_tensors_keep_the_bases_values(gpt2_pool: ModelPool, tmp_path: Path) -> None:
    result = merged(gpt2_pool, "simple-average", tmp_path, exclude=("wte", r"h\.0\."))
    assert gpt2_pool.base is not None
    base = read_tensors(gpt2_pool.base, list(result))
    kept = {n for n in result if np.array_equal(result[n], base[n])}
    assert kept == {n for n in result if n.startswith(("wte", "h.0."))}


def test_language_models_merge_whole(make_student: Callable[..., Path], tmp_path: Path) -> None:
    for tied in (True, False):
        folders = [make_student(seed=s, tied=tied) for s in (1, 2)]
        pool = ModelPool(tmp_path / "pool.yaml", None, tuple(PoolModel(str(i), str(f)) for i, f in enumerate(folders)))
        result = merged(pool, "simple-average", tmp_path)
        assert any("lm_head" in name for name in result) != tied
        left, right = (read_tensors(m, list(result)) for m in pool.models)
        assert_same(result, {n: (left[n] + right[n]) / 2 for n in result})


def test_language_models_with_texts_merge_by_fisher_and_regmean(
    make_student: Callable[..., Path], text_file: Path, tmp_path: Path
) -> None:
    models = tuple(PoolModel(str(s), str(make_student(seed=s)), data=str(text_file)) for s in (1, 2))
    pool = ModelPool(tmp_path / "pool.yaml", None, models)
    mean = merged(pool, "simple-average", tmp_path)
    for method in ("fisher", "regmean"):
        result = merged(pool, method, tmp_path, sampler(tmp_path, classifiers=False, batch_size=4))
        assert not np.array_equal(result["transformer.h.0.mlp.c_fc.weight"], mean["transformer.h.0.mlp.c_fc.weight"])
    with pytest.raises(DataError, match="names no text"):
        merged(
            replace(pool, models=(replace(models[0], data=None),)),
            "fisher",
            tmp_path,
            sampler(tmp_path, classifiers=False),
        )


@pytest.mark.parametrize("method", ["fisher", "regmean"])
def test_a_classifier_that_numbers_its_classes_otherwise_is_not_measured(
    gpt2_pool: ModelPool, glue_root: Path, tmp_path: Path, method: str
) -> None:
    cola = gpt2_pool.models[0]
    folder = shutil.copytree(cola.path, tmp_path / "swapped")
    config = AutoConfig.from_pretrained(folder)
    config.id2label = {0: config.id2label[1], 1: config.id2label[0]}
    config.save_pretrained(folder)
    pool = replace(gpt2_pool, models=(replace(cola, path=str(folder)), *gpt2_pool.models[1:]))
    with pytest.raises(DataError, match="another order") as caught:
        merged(pool, method, tmp_path, sampler(glue_root, examples=2))
    assert caught.value.details["where"] == str(folder)
    assert caught.value.details["found"] == "acceptable, unacceptable"
    assert caught.value.details["expected"] == "unacceptable, acceptable"


def test_a_method_without_scaling_refuses_one(gpt2_pool: ModelPool, tmp_path: Path) -> None:
    for method in [name for name, method in MERGE_METHODS.items() if method.scaling is None]:
        with pytest.raises(DataError, match="no scaling") as caught:
            prepared(gpt2_pool, {"method": method, "scaling": 0.3}, tmp_path)
        assert caught.value.details["found"] == "--scaling 0.3"
