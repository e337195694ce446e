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
from safetensors.numpy import load_file, save_file
from transformers import AutoConfig
from transformers.pytorch_utils import Conv1D

from kd.common.errors import DataError, KdError
from kd.models.classifiers import load_classifier
from kd.models.loading import ModelRequest
from kd.student_trainer.merging import stored_weights as weights_module
from kd.student_trainer.merging.merge_methods import MERGE_METHODS
from kd.student_trainer.merging.merger import Merger, MergeSettings, kth_magnitude, prepare
from kd.student_trainer.merging.pool import ModelPool, PoolModel
from kd.student_trainer.merging.stored_weights import StoredPool, row_blocks, skeleton
from kd.student_trainer.merging.training_rows import RowSampler

Whole = dict[str, np.ndarray]
"""A backbone's tensors, float64."""


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of 300 numbers: no tensor of the tiny models but the smallest is read in one."""
    monkeypatch.setattr(weights_module, "BLOCK_ELEMENTS", 300)


def ready(pool: ModelPool, settings: MergeSettings, folder: Path, measure: Any = None) -> Merger:
    merger = [step.merger for step in prepare(pool, settings, folder=folder, measure=measure)][-1]
    assert merger is not None
    return merger


def merged(pool: ModelPool, settings: MergeSettings, folder: Path, measure: Any = None) -> Whole:
    merger = ready(pool, settings, folder, measure)
    model = skeleton(pool, device="cpu")
    for parameter in model.parameters():
        torch.nn.init.constant_(parameter, float("nan"))  # whatever is not written shows
    merger.apply(model)
    return {name: model.state_dict()[name].double().numpy() for name in merger.stored.names}


def read(model: PoolModel, names: list[str]) -> Whole:
    """The same tensors straight from the file, by the end of their name."""
    found = load_file(Path(model.path) / "model.safetensors")
    return {n: next(v for k, v in found.items() if k == n or k.endswith(f".{n}")).astype(np.float64) for n in names}


@pytest.fixture
def wholes(pool: ModelPool) -> tuple[list[Whole], Whole]:
    names = StoredPool.of(pool, skeleton(pool), with_base=False).names
    assert pool.base is not None
    return [read(m, names) for m in pool.models], read(pool.base, names)


def assert_same(found: Whole, expected: Whole) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        # stored in float32: half a unit in the last place, and one more where float64 sums sit on a rounding boundary
        np.testing.assert_allclose(found[name], value, rtol=2**-23, atol=1e-9, err_msg=name)


def sampler(glue_root: Path, **changes: Any) -> RowSampler:
    settings: dict[str, Any] = {
        "classifiers": True,
        "examples": 20,
        "batch_size": 6,
        "max_length": 64,
        "task_root": glue_root,
        "device": "cpu",
        "seed": 4,
    } | changes
    return RowSampler(**settings)


def test_simple_average_and_task_arithmetic_equal_numpy(pool: ModelPool, wholes: Any, tmp_path: Path) -> None:
    models, base = wholes
    mean = {n: sum(m[n] for m in models) / 3 for n in base}
    assert_same(merged(pool, MergeSettings("simple-average"), tmp_path), mean)
    moved = {n: base[n] + 0.4 * sum(m[n] - base[n] for m in models) for n in base}
    assert_same(merged(pool, MergeSettings("task-arithmetic", 0.4), tmp_path), moved)


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
    assert_same(merged(pool, MergeSettings("ties", 0.5, elect=elect), tmp_path), expected)


def test_the_threshold_keeps_a_share_and_one_entry_more(pool: ModelPool, wholes: Any) -> None:
    models, base = wholes
    stored = StoredPool.of(pool, skeleton(pool), with_base=True)
    size = sum(v.size for v in base.values())
    for share in (0.05, 0.2, 0.999):
        found = kth_magnitude(stored, 1, share)
        vector = np.concatenate([(models[1][n] - base[n]).ravel() for n in base]).astype(np.float32)
        assert (np.abs(vector) >= found).sum() == int(size * share) + 1
    assert kth_magnitude(stored, 1, 1.0) == 0.0


@pytest.mark.parametrize("batch_size", [6, 1])
def test_fisher_equals_float64_gradients_and_numpy(
    gpt2_pool: ModelPool, glue_root: Path, tmp_path: Path, batch_size: int
) -> None:
    """Batches of one are `--per-example`; batches of six mix their rows, as in the reference."""
    measure = sampler(glue_root, batch_size=batch_size)
    found = merged(gpt2_pool, MergeSettings("fisher"), tmp_path, measure)
    information: list[Whole] = []
    for model in gpt2_pool.models:
        whole = load_classifier(ModelRequest(model.path, device="cpu"), pad_id=0).double()
        sums = {n: np.zeros(p.shape) for n, p in whole.base_model.named_parameters()}
        rows = 0
        for batch in measure(model)[2]:
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
    models = [read(m, list(found)) for m in gpt2_pool.models]
    for n, value in found.items():
        weights = [w * (one[n] + 1e-6) for w, one in zip(shares, information, strict=True)]
        expected = sum(w * m[n] for w, m in zip(weights, models, strict=True)) / sum(weights)
        # F comes from float32 gradients here: relative errors of 1e-3 in the smallest, weighing parameters 0.1 apart
        np.testing.assert_allclose(value, expected, atol=2e-5, err_msg=n)


@pytest.mark.parametrize("masked", [False, True])
def test_regmean_equals_numpy_on_recorded_inputs(
    pool: ModelPool, glue_root: Path, tmp_path: Path, masked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Conv1D in the GPT-2 layout, Linear in the others; padding to the limit counts unless it is masked."""
    measure = sampler(glue_root, pad_to=None if masked else 64)
    found = merged(pool, MergeSettings("regmean", mask_pads=masked), tmp_path, measure)
    seen: dict[int, list[np.ndarray]] = {}
    for cls in (Conv1D, torch.nn.Linear):
        original = cls.forward

        def recorded(self: Any, x: torch.Tensor, original: Callable[..., Any] = original) -> Any:
            seen.setdefault(id(self), []).append(x.detach().double().numpy())
            return original(self, x)

        monkeypatch.setattr(cls, "forward", recorded)
    grams: list[Whole] = []
    for model in pool.models:
        part, _, batches = measure(model)
        totals: Whole = {}
        tokens = 0
        for batch in batches:
            seen.clear()
            with torch.no_grad():
                part(**batch)
            keep = (
                batch["attention_mask"].numpy().astype(bool)
                if masked
                else np.ones(batch["input_ids"].shape, dtype=bool)
            )
            tokens += int(keep.sum())
            for name, module in part.named_modules():
                for x in seen.get(id(module), []):
                    totals[f"{name}.weight"] = totals.get(f"{name}.weight", 0.0) + x[keep].T @ x[keep]
        grams.append({n: g / tokens for n, g in totals.items()})
    models = [read(m, list(found)) for m in pool.models]
    assert len(grams[0]) == {"gpt2": 8, "gpt_neox": 8, "llama": 14}[part.config.model_type]
    for n, value in found.items():
        if n not in grams[0]:
            np.testing.assert_allclose(value, sum(m[n] for m in models) / 3, rtol=2**-23, atol=1e-9)
            continue
        flip = part.config.model_type != "gpt2"
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
    found = merged(twice, MergeSettings(method), tmp_path, sampler(glue_root))
    for name, value in read(gpt2_pool.models[1], list(found)).items():
        # fisher divides two sums that float64 rounds apart by 1e-16: the same float32
        assert np.array_equal(found[name], value), name


def test_scaling_zero_is_the_base_and_one_model_at_one_is_that_model(gpt2_pool: ModelPool, tmp_path: Path) -> None:
    assert gpt2_pool.base is not None
    for method in ("task-arithmetic", "ties", "dare"):
        found = merged(gpt2_pool, MergeSettings(method, 0.0), tmp_path)
        assert all(np.array_equal(found[n], v) for n, v in read(gpt2_pool.base, list(found)).items())
    one = copies(gpt2_pool, tmp_path, [2])
    found = merged(one, MergeSettings("ties", 1.0, threshold=100), tmp_path)
    assert all(np.array_equal(found[n], v) for n, v in read(gpt2_pool.models[2], list(found)).items())


@pytest.mark.parametrize("method", [m for m in MERGE_METHODS if m not in ("ensemble", "dare")])
def test_the_order_of_models_does_not_matter(
    gpt2_pool: ModelPool, glue_root: Path, tmp_path: Path, method: str
) -> None:
    forward = merged(gpt2_pool, MergeSettings(method), tmp_path / "a", sampler(glue_root))
    backward = merged(copies(gpt2_pool, tmp_path, [2, 1, 0]), MergeSettings(method), tmp_path / "b", sampler(glue_root))
    for n, value in forward.items():
        # float64 sums in another order may round to the neighbouring float32
        np.testing.assert_allclose(value, backward[n], rtol=2**-22, atol=1e-9)


def test_simple_average_is_task_arithmetic_at_one_third(gpt2_pool: ModelPool, tmp_path: Path) -> None:
    assert_same(
        merged(gpt2_pool, MergeSettings("simple-average"), tmp_path),
        merged(gpt2_pool, MergeSettings("task-arithmetic", 1 / 3), tmp_path),
    )


def test_excluded_tensors_keep_the_bases_values(gpt2_pool: ModelPool, tmp_path: Path) -> None:
    found = merged(gpt2_pool, MergeSettings("simple-average", exclude=("wte", r"h\.0\.")), tmp_path)
    assert gpt2_pool.base is not None
    base = read(gpt2_pool.base, list(found))
    kept = {n for n in found if np.array_equal(found[n], base[n])}
    assert kept == {n for n in found if n.startswith(("wte", "h.0."))}


def test_language_models_merge_whole(make_student: Callable[..., Path], tmp_path: Path) -> None:
    for tied in (True, False):
        folders = [make_student(seed=s, tied=tied) for s in (1, 2)]
        pool = ModelPool(tmp_path / "pool.yaml", None, tuple(PoolModel(str(i), str(f)) for i, f in enumerate(folders)))
        found = merged(pool, MergeSettings("simple-average"), tmp_path)
        assert any("lm_head" in name for name in found) != tied
        left, right = (read(m, list(found)) for m in pool.models)
        assert_same(found, {n: (left[n] + right[n]) / 2 for n in found})


def test_language_models_with_texts_merge_by_fisher_and_regmean(
    make_student: Callable[..., Path], text_file: Path, tmp_path: Path
) -> None:
    models = tuple(PoolModel(str(s), str(make_student(seed=s)), data=str(text_file)) for s in (1, 2))
    pool = ModelPool(tmp_path / "pool.yaml", None, models)
    mean = merged(pool, MergeSettings("simple-average"), tmp_path)
    for method in ("fisher", "regmean"):
        found = merged(pool, MergeSettings(method), tmp_path, sampler(tmp_path, classifiers=False, batch_size=4))
        assert not np.array_equal(found["transformer.h.0.mlp.c_fc.weight"], mean["transformer.h.0.mlp.c_fc.weight"])
    with pytest.raises(DataError, match="no text is named"):
        merged(
            replace(pool, models=(replace(models[0], data=None),)),
            MergeSettings("fisher"),
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
        merged(pool, MergeSettings(method), tmp_path, sampler(glue_root, examples=2))
    assert caught.value.details["where"] == str(folder)
    assert caught.value.details["found"] == "acceptable, unacceptable"
    assert caught.value.details["expected"] == "unacceptable, acceptable"


def test_blocks_of_rows_cover_a_tensor_once() -> None:
    for shape in ((), (7,), (1000,), (70, 9), (3, 400), (5, 2, 3)):
        if not shape:
            assert list(row_blocks(shape)) == [slice(None)]
            continue
        covered = [i for rows in row_blocks(shape) for i in range(shape[0])[rows]]
        assert covered == list(range(shape[0]))


def test_models_that_do_not_fit_together_are_refused(
    gpt2_pool: ModelPool, tmp_path: Path, layouts: dict[str, Path]
) -> None:
    other = tmp_path / "other"
    other.mkdir()
    tensors = load_file(Path(gpt2_pool.models[0].path) / "model.safetensors")
    (other / "config.json").write_bytes((Path(gpt2_pool.models[0].path) / "config.json").read_bytes())
    wide = {k: np.concatenate([v, v]) if k.endswith("wpe.weight") else v for k, v in tensors.items()}
    save_file(wide, other / "model.safetensors", metadata={"format": "pt"})
    pool = replace(gpt2_pool, models=(gpt2_pool.models[0], PoolModel("mrpc", str(other))))
    with pytest.raises(DataError, match="not of one shape") as caught:
        ready(pool, MergeSettings("simple-average"), tmp_path)
    assert "wpe" in str(caught.value)
    save_file(
        {k: v for k, v in tensors.items() if "wpe" not in k}, other / "model.safetensors", metadata={"format": "pt"}
    )
    with pytest.raises(DataError, match="lacks a tensor"):
        ready(pool, MergeSettings("simple-average"), tmp_path)
    (other / "model.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{broken}")
    with pytest.raises(DataError, match="cannot read the weights"):
        ready(pool, MergeSettings("simple-average"), tmp_path)
    with pytest.raises(DataError, match="starts from a base"):
        ready(replace(gpt2_pool, base=None), MergeSettings("ties"), tmp_path)
    with pytest.raises(KdError):
        ready(
            replace(gpt2_pool, models=(PoolModel("cola", str(tmp_path / "nowhere")),)),
            MergeSettings("simple-average"),
            tmp_path,
        )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "simple-averge"}, "unknown merge method"),
        ({"method": "fisher", "scaling": 0.3}, "no scaling"),
        ({"method": "ties", "scaling": float("nan")}, "no number"),
        ({"method": "ties", "threshold": 0.0}, "out of bounds"),
        ({"method": "ties", "threshold": 101.0}, "out of bounds"),
        ({"method": "ties", "elect": "median"}, "what agrees"),
        ({"method": "dare", "density": 0.0}, "out of bounds"),
        ({"method": "regmean", "off_diagonal": 1.1}, "out of bounds"),
        ({"method": "ties", "exclude": ("[",)}, "regular expression"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        MergeSettings(**settings)
