"""What is shown of a token is what the teacher said, worked out again in float64 from the model itself."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from kd.cache_builder.look.token_views import piece_text, token_views
from kd.cache_builder.store.readers.reader import CacheReader


@pytest.fixture(scope="module")
def logits(cache: Path, model_dir: Path) -> np.ndarray:
    """`[n, V]` float64 logits of the teacher at the rows of the first example, by transformers' own forward pass."""
    import torch
    from transformers import GPT2LMHeadModel

    example = CacheReader(cache)[0]
    model = GPT2LMHeadModel.from_pretrained(model_dir).double().eval()
    with torch.no_grad():
        found = model(torch.from_numpy(example.input_ids.astype(np.int64))[None]).logits[0]
    return found[len(example.context_ids) - 1 : -1].numpy()


def test_every_figure_of_a_token_is_the_teachers(cache: Path, logits: np.ndarray, tokenizer) -> None:
    reader = CacheReader(cache)
    views = token_views(reader[0], reader.manifest, reader.vocabulary(), 5)
    assert len(views) == len(logits)
    for view, row in zip(views, logits, strict=True):
        p = np.exp(row - row.max()) / np.exp(row - row.max()).sum()
        entropy = -math.fsum(x * math.log(x) for x in p if x > 0)
        # graded-fine log-probabilities are off by up to 0.004 nats, and the entropy by as much
        assert view.entropy_at_least is not None
        assert view.entropy_at_most is not None
        assert view.entropy_at_least - 0.01 <= entropy <= view.entropy_at_most + 0.01
        assert view.probability == pytest.approx(p[view.id], rel=2e-2)  # float16 of a log-probability of up to -30
        assert view.rank == 1 + (p > p[view.id]).sum()
        order = np.argsort(-p, kind="stable")
        assert view.kept == 8
        assert view.tail_mass is not None
        for name, mass in view.tail_mass.items():
            soft = np.exp((row - row.max()) / float(name))
            assert mass == pytest.approx(
                1 - (soft / soft.sum())[order[:8]].sum(), rel=2e-2, abs=1e-4
            )  # tail_odds: 8 bits
        assert [one.id for one in view.top] == order[:5].tolist()
        for one in view.top:
            assert one.probability == pytest.approx(p[one.id], rel=1e-2)
            assert one.text == tokenizer.decode([one.id]) or "\\x" in (one.text or "") or one.text == "<|endoftext|>"
        assert sum(one.draws or 0 for one in view.draws) == 4


def test_rows_that_differ_in_length_show_what_each_keeps(of_profile) -> None:
    reader = of_profile("adaptive", top_k=40, min_probability=0.01)
    example = reader[1]
    assert example.targets.kept is not None
    for row, view in enumerate(token_views(example, reader.manifest, reader.vocabulary(), 100)):
        assert len(view.top) == view.kept == example.targets.kept[row]
        mass = sum(one.probability or 0.0 for one in view.top)
        assert view.tail_mass is not None
        assert mass + view.tail_mass["1"] == pytest.approx(1, abs=1e-6)


def test_profiles_without_ids_or_without_a_top_k_show_what_they_have(of_profile) -> None:
    reader = of_profile("uld", tail_bands=4)
    view = token_views(reader[0], reader.manifest, reader.vocabulary(), 3)[0]
    assert [(one.id, one.text) for one in view.top] == [(None, None)] * 3
    assert all(one.probability for one in view.top)
    reader = of_profile("sampled", samples=6)
    view = token_views(reader[0], reader.manifest, reader.vocabulary(), 3)[0]
    assert (view.top, view.kept, view.tail_mass) == ([], None, None)
    assert sum(one.draws or 0 for one in view.draws) == 6
    assert view.entropy_at_least is not None


def test_nothing_is_said_of_a_tail_that_nobody_knows(renormalised: CacheReader) -> None:
    (view,) = token_views(renormalised[0], renormalised.manifest, renormalised.vocabulary(), 9, [1])
    assert view.tail_mass is None
    assert view.entropy_at_most is None
    assert view.is_bound
    p = np.exp([-0.5, -1.0]) / np.exp([-0.5, -1.0]).sum()
    assert view.entropy_at_least == pytest.approx(-(p * np.log(p)).sum(), rel=1e-6)


def test_bytes_that_are_no_characters_and_ids_without_a_piece_are_spelled() -> None:
    assert [piece_text([b"a", b"\xe2\x82", b""], n) for n in range(4)] == ["a", "\\xe2\\x82", "<id 2>", "<id 3>"]
