"""What is wrong with a file of arrays is said before anything is written."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from kd.cache_builder.exchange.npz_source import npz_sequences
from kd.cache_builder.exchange.source_formats import CacheSource
from kd.common.errors import DataError


def refused(path: Path) -> DataError:
    with pytest.raises(DataError) as raised:
        list(CacheSource.at("npz", path).sequences())
    return raised.value


def test_sequences_are_the_parts_of_the_arrays(write, arrays) -> None:
    sequences = list(npz_sequences(write(), 0))
    np.testing.assert_array_equal(np.concatenate([s.input_ids for s in sequences]), arrays["input_ids"])
    np.testing.assert_array_equal(np.concatenate([s.token_ids for s in sequences]), arrays["token_ids"])
    np.testing.assert_array_equal(
        np.concatenate([s.gold_ids for s in sequences]),
        np.concatenate([s.input_ids[s.context :] for s in sequences]),
    )
    assert [s.name for s in sequences] == arrays["ids"].tolist()


def test_two_rows_by_hand(tmp_path: Path) -> None:
    np.savez(
        tmp_path / "a.npz",
        input_ids=np.array([7, 8, 9, 4, 5]),
        lengths=np.array([3, 2]),
        token_ids=np.array([[8, 1], [2, 9], [5, 6]]),
        logprobs=np.log(np.array([[0.5, 0.25], [0.5, 0.3], [0.9, 0.05]])),
        kept=np.array([2, 1, 2]),
    )
    first, second = npz_sequences(tmp_path / "a.npz", 3)
    assert (first.name, first.context, first.gold_ids.tolist()) == ("3/0", 1, [8, 9])
    assert first.token_ids.tolist() == [[8, 1], [2, -1]]
    assert first.logprobs[1, 1] == -np.inf
    assert (second.name, second.gold_ids.tolist()) == ("3/1", [5])


def test_sizes_that_contradict_each_other_are_named(write, arrays) -> None:
    for change, name in (
        ({"input_ids": arrays["input_ids"][:-1]}, "input_ids"),
        ({"lengths": arrays["lengths"] + 1}, "input_ids"),
        ({"context_lengths": arrays["context_lengths"][:-1]}, "context_lengths"),
        ({"token_ids": arrays["token_ids"][:-1], "logprobs": arrays["logprobs"][:-1]}, "token_ids"),
        ({"gold_ranks": arrays["gold_ranks"][1:]}, "gold_ranks"),
        ({"ids": arrays["ids"][1:]}, "ids"),
    ):
        error = refused(write(**change))
        assert error.headline == "an array has another size than the others need"
        assert str(error.details["where"]).endswith(name)


def test_missing_unknown_and_wrong_arrays_are_named(write, arrays) -> None:
    assert "lengths" in str(refused(write(without=("lengths",))))
    assert "byte_ends beside" in str(refused(write(without=("byte_ends",))))
    assert "of this format" not in str(refused(write(logits=arrays["logprobs"])))
    assert "logits" in str(refused(write(logits=arrays["logprobs"])))
    assert "float32" in str(refused(write(token_ids=arrays["logprobs"])))
    assert "no token to predict" in str(refused(write(context_lengths=arrays["lengths"])))
    assert "1..8" in str(refused(write(kept=np.full(len(arrays["logprobs"]), 9))))
    assert "same id" in str(refused(write(ids=np.full(len(arrays["ids"]), "x"))))


def test_what_is_no_archive_is_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "one.npy", np.zeros(3))
    (tmp_path / "text.npz").write_text("no archive", encoding="utf-8")
    np.savez(tmp_path / "objects.npz", lengths=np.array([{}], dtype=object))
    for name in ("one.npy", "text.npz", "objects.npz"):
        assert refused(tmp_path / name).headline == "a file cannot be read as arrays"
    assert "no such file" in str(refused(tmp_path / "nowhere"))
    (tmp_path / "empty").mkdir()
    assert "a folder without such files" in str(refused(tmp_path / "empty"))
