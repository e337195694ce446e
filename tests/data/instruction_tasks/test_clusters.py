"""The FLAN registry is the paper's, and nothing that is held out is trained on."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kd.common.errors import DataError
from kd.data.instruction_tasks.clusters import ClusterRegistry, flan_clusters
from kd.data.instruction_tasks.mixing.mixture_names import flan_tasks, select, tasks_without
from kd.data.instruction_tasks.task_files import load_task, task_names

FLAN = flan_clusters()
HELD_OUT = st.sets(st.sampled_from(sorted(FLAN.clusters)), min_size=1)


def test_there_are_62_data_sets_in_12_clusters_of_the_papers_sizes() -> None:
    sizes = {name: len(members) for name, members in FLAN.clusters.items()}
    assert sizes == {
        "nli": 7,
        "commonsense": 4,
        "sentiment": 4,
        "paraphrase": 4,
        "closed_book_qa": 3,
        "struct_to_text": 4,
        "translation": 8,
        "reading_comprehension": 5,
        "reading_comprehension_commonsense": 2,
        "coreference": 3,
        "misc": 7,
        "summarization": 11,
    }
    assert len(FLAN.datasets) == 62 == len(set(FLAN.datasets))


@pytest.mark.parametrize(
    ("held_out", "excluded"),
    [
        ("nli", {"nli", "paraphrase"}),
        ("paraphrase", {"nli", "paraphrase"}),
        ("commonsense", {"commonsense", "reading_comprehension_commonsense"}),
        ("reading_comprehension", {"reading_comprehension", "reading_comprehension_commonsense"}),
        (
            "reading_comprehension_commonsense",
            {"reading_comprehension_commonsense", "reading_comprehension", "commonsense"},
        ),
        ("translation", {"translation"}),
    ],
)
def test_clusters_that_teach_the_same_are_held_out_together(held_out: str, excluded: set[str]) -> None:
    assert FLAN.excluded([held_out]) == excluded
    left = FLAN.remaining([held_out])
    assert len(left) == 62 - sum(len(FLAN.clusters[c]) for c in excluded)


def test_without_nli_51_data_sets_remain() -> None:
    assert len(FLAN.remaining(["nli"])) == 62 - 7 - 4


@given(HELD_OUT)
def test_all_of_a_held_out_cluster_is_unseen_by_what_remains(held_out: set[str]) -> None:
    left = FLAN.remaining(held_out)
    for cluster in held_out:
        assert all(FLAN.unseen(dataset, left) for dataset in FLAN.clusters[cluster])


@given(HELD_OUT, HELD_OUT)
def test_holding_out_more_leaves_a_subset_and_order_does_not_matter(one: set[str], two: set[str]) -> None:
    assert set(FLAN.remaining(one | two)) == set(FLAN.remaining(one)) & set(FLAN.remaining(two))
    assert FLAN.remaining(sorted(one)) == FLAN.remaining(sorted(one, reverse=True))


@given(st.sampled_from(FLAN.datasets), st.sampled_from(FLAN.datasets))
def test_being_unseen_is_mutual(one: str, other: str) -> None:
    assert FLAN.unseen(one, [other]) == FLAN.unseen(other, [one])


def test_a_data_set_of_several_clusters_is_seen_through_any_of_them() -> None:
    registry = ClusterRegistry({"a": ("x", "both"), "b": ("y", "both"), "c": ("z",)}, ())
    assert registry.clusters_of("both") == {"a", "b"}
    assert not registry.unseen("both", ["x"])
    assert not registry.unseen("both", ["y"])
    assert registry.unseen("both", ["z"])
    assert registry.remaining(["a"]) == ("y", "z")
    assert registry.datasets == ("x", "both", "y", "z")


def test_our_tasks_without_nli_have_neither_anli_nor_paws() -> None:
    left = select("all-but=nli").tasks
    out = {name for name in flan_tasks() if {"nli", "paraphrase"} & set(load_task(name).clusters)}
    assert set(flan_tasks()) - set(left) == out >= {"anli_r1", "anli_r2", "anli_r3", "paws"}
    assert left == tasks_without(["nli"])
    assert select("all-but=nli").cap == 30_000


@given(HELD_OUT)
def test_our_tasks_are_held_out_as_their_data_sets_are(held_out: set[str]) -> None:
    remaining, ours = set(FLAN.remaining(held_out)), tasks_without(sorted(held_out))
    for name in task_names():
        if (dataset := load_task(name).flan) is not None:
            assert (name in ours) == (dataset in remaining)


def test_unknown_names_suggest_the_nearest() -> None:
    for call in (lambda: FLAN.remaining(["nil"]), lambda: select("all-but=nil")):
        with pytest.raises(DataError, match="unknown cluster") as caught:
            call()
        assert caught.value.details["did you mean"] == "nli"
    with pytest.raises(DataError, match="unknown FLAN data set") as caught:
        FLAN.clusters_of("bool_q")
    assert caught.value.details["did you mean"] == "boolq"
