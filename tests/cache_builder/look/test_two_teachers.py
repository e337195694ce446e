"""The divergence of two teachers is symmetric, bounded, 0 for equal rows, and never above that of whole rows."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
from terminal import kd

from kd.cache_builder.look.find_rows import FoundRow
from kd.cache_builder.look.two_teachers import disagreement, divergences
from kd.cache_builder.look.view_page import view_page
from kd.cache_builder.showing import show_cache
from kd.cache_builder.store.readers.reader import CacheReader
from kd.cache_builder.store.soft_targets import SoftTargets
from kd.common.errors import CacheError, CacheMismatchError, DataError
from kd.common.progress import final

V = 30


def rows(seed: int, kept: int | np.ndarray) -> tuple[SoftTargets, np.ndarray]:
    """40 random rows that keep some tokens, and their whole distributions `[40, V]` by id."""
    rng = np.random.default_rng(seed)
    p = rng.dirichlet(np.full(V, 0.3), size=40)
    p = (p + 1e-9) / (p + 1e-9).sum(axis=1, keepdims=True)
    order = np.argsort(-p, axis=1)
    log_p = np.log(np.take_along_axis(p, order, axis=1))
    zeros = np.zeros(40, dtype=np.int64)
    if isinstance(kept, int):
        head = {"token_ids": order[:, :kept].astype(np.int32), "logprobs": log_p[:, :kept]}
    else:
        inside = np.arange(V) < kept[:, None]
        head = {"token_ids": order[inside].astype(np.int32), "logprobs": log_p[inside], "kept": kept}
    return SoftTargets(zeros, np.zeros((40, 1)), (1.0,), np.zeros(40), zeros, zeros, **head), p


def jsd(p: list[float], q: list[float]) -> float:
    terms = [0.5 * x * math.log(x / ((a + b) / 2)) for a, b in zip(p, q, strict=True) for x in (a, b) if x > 0]
    return math.fsum(terms)


def slow(ours: SoftTargets, theirs: SoftTargets, row: int) -> float:
    """The definition, row by row, with dictionaries."""

    def kept(targets: SoftTargets) -> dict[int, float]:
        at = slice(None) if targets.kept is None else slice(targets.offsets[row], targets.offsets[row + 1])
        ids, values = (x[row] if targets.kept is None else x[at] for x in (targets.token_ids, targets.logprobs))
        return {int(i): math.exp(v) for i, v in zip(ids, values, strict=True)}

    p, q = kept(ours), kept(theirs)
    shared = sorted(p.keys() & q.keys())
    both = [[x[i] for i in shared] for x in (p, q)]
    return jsd(*([*x, max(0.0, 1 - math.fsum(x))] for x in both))


KEPT = [5, V, np.random.default_rng(9).integers(1, V + 1, 40)]


@pytest.mark.parametrize("ours", KEPT, ids=["5", "all", "rows"])
@pytest.mark.parametrize("theirs", KEPT, ids=["5", "all", "rows"])
def test_the_divergence_is_that_of_the_definition_and_a_lower_bound(ours, theirs) -> None:
    (a, p), (b, q) = rows(1, ours), rows(2, theirs)
    found = divergences(a, b)
    np.testing.assert_allclose(found, [slow(a, b, row) for row in range(40)], rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(found, divergences(b, a), rtol=1e-12, atol=1e-14)
    whole = np.array([jsd(x, y) for x, y in zip(p.tolist(), q.tolist(), strict=True)])
    assert (found <= whole + 1e-12).all()
    assert (found >= 0).all()
    assert (found <= math.log(2)).all()
    if isinstance(ours, int) and ours == V and isinstance(theirs, int) and theirs == V:
        np.testing.assert_allclose(found, whole, rtol=1e-9)
    assert (divergences(a, a) == 0).all()


def test_rows_without_a_shared_token_are_one_outcome() -> None:
    one, _ = rows(1, 1)
    other, _ = rows(2, 1)
    assert one.token_ids is not None
    assert other.token_ids is not None
    apart = (one.token_ids != other.token_ids)[:, 0]
    assert (divergences(one, other)[apart] == 0).all()


@pytest.fixture(scope="module")
def other_cache(
    tmp_path_factory: pytest.TempPathFactory, save_model, tokenizer_dir: Path, build_request, run_build
) -> Path:
    """The same stories through another teacher."""
    folder = tmp_path_factory.mktemp("other")
    save_model(folder / "model", seed=5)
    shutil.copytree(tokenizer_dir, folder / "model", dirs_exist_ok=True)
    run_build(build_request(folder / "cache", model=folder / "model"))
    return folder / "cache"


def test_the_rows_that_differ_most_are_found(cache: Path, other_cache: Path, every_row) -> None:
    ours, theirs = CacheReader(cache), CacheReader(other_cache)
    values = divergences(ours.read_rows(range(len(ours))), theirs.read_rows(range(len(theirs))))
    found = final(disagreement(ours, theirs, 6))
    order = np.argsort(-values, kind="stable")[:6]
    assert list(found.rows) == [FoundRow(int(every_row[0][r]), int(every_row[1][r]), float(values[r])) for r in order]
    assert found.mean == pytest.approx(values.mean())
    assert (found.compared, found.left_out) == (len(values), 0)
    one = final(disagreement(ours, theirs, 3, 2))
    assert {row.example for row in one.rows} == {2}
    assert one.compared == len(ours[2].targets)


def test_examples_are_matched_by_their_tokens_and_the_rest_is_counted(
    cache: Path, other_cache: Path, tmp_path: Path
) -> None:
    from kd.cache_builder.upkeep.slice_cache import slice_cache

    final(slice_cache(other_cache, tmp_path / "slice", examples=(3, 8)))
    ours, theirs = CacheReader(cache), CacheReader(tmp_path / "slice")
    found = final(disagreement(ours, theirs, 4))
    assert found.compared == theirs.manifest.rows
    assert found.left_out == ours.manifest.rows - theirs.manifest.rows
    assert {found.partners[row.example] for row in found.rows} <= set(range(5))
    assert all(found.partners[row.example] == row.example - 3 for row in found.rows)
    with pytest.raises(CacheMismatchError, match="share no example"):
        final(disagreement(ours, theirs, 4, 0))


def test_a_cache_has_no_divergence_from_itself(cache: Path) -> None:
    view = show_cache(cache, compare=str(cache), limit=2)
    assert view.compared is not None
    assert view.compared["mean"] == 0
    assert [one.divergence for one in view.found] == [0, 0]


def test_both_sides_are_shown_in_every_form(cache: Path, other_cache: Path) -> None:
    document = json.loads(kd("cache", "show", cache, "--compare", other_cache, "--limit", 2, "--json"))
    assert document["question"] == "compare"
    assert set(document["compared"]) == {"path", "teacher", "rows", "mean", "left_out"}
    reader = CacheReader(other_cache)
    for one in document["found"]:
        targets = reader[one["example"]].targets
        assert one["other"]["logprob"] == pytest.approx(float(targets.gold_logprob[one["token"]["token"]]))
        assert one["divergence"] > 0
    view = show_cache(cache, compare=str(other_cache), limit=2)
    assert f"compared with {other_cache}" in str(view)
    assert str(view).count("most probable:") == 4
    page = view_page(view)
    assert "nats apart" in page
    assert page.count('class="t picked') == 2


def test_what_cannot_be_compared_is_refused_with_the_reason(cache: Path, of_profile, chat, renormalised) -> None:
    with pytest.raises(CacheError, match="cannot be compared token by token"):
        show_cache(cache, compare=str(of_profile("uld", tail_bands=4).root))
    with pytest.raises(CacheError, match="cannot be compared token by token") as refused:
        show_cache(cache, compare=str(renormalised.root))
    assert "beyond the kept tokens" in str(refused.value)
    with pytest.raises(CacheMismatchError, match="different tokenizers"):
        show_cache(cache, compare=str(chat.root))
    with pytest.raises(DataError, match="no such example"):
        show_cache(cache, 10**6, compare=str(cache))
