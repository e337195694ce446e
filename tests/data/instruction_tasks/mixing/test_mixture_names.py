"""Names of mixtures stand for FLAN's tasks, by cluster, in FLAN's cut; the rates over all of them are exact."""

from __future__ import annotations

import json
from collections import Counter
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kd.common.errors import DataError
from kd.data.data_settings import InstructionConfig
from kd.data.instruction_tasks.clusters import flan_clusters
from kd.data.instruction_tasks.mixing.mixture_names import (
    FLAN_CAP,
    flan_tasks,
    known_rows,
    mini_tasks,
    select,
    select_mini,
)
from kd.data.instruction_tasks.mixing.mixtures import load_mixture, mixing_rates
from kd.data.instruction_tasks.task_files import load_task
from kd.data.rows.hub import HubRows
from kd.data.sources import load_corpus
from kd.evaluation.contamination import source_place

FLAN = flan_clusters()
CLUSTERS = st.sets(st.sampled_from(sorted(FLAN.clusters)), min_size=1)
SMALL = {
    "anli_r1": 16_946,
    "cb": 200,
    "rte": 2_290,
    "wnli": 605,
    "copa": 350,
    "piqa": 16_013,
    "story_cloze": 1_671,
    "imdb": 24_800,
    "mrpc": 3_468,
    "stsb": 5_649,
    "arc_challenge": 919,
    "arc_easy": 2_051,
    "boolq": 9_227,
    "multirc": 27_043,
    "openbookqa": 4_957,
    "cosmos_qa": 25_062,
    "dpr": 1_122,
    "coqa": 7_099,
    "wic": 5_228,
    "trec": 5_252,
    "cola": 8_351,
    "aeslc": 14_436,
    "samsum": 14_732,
    "opinion_abstracts_idebate": 1_659,
    "opinion_abstracts_rotten_tomatoes": 3_131,
}
"""Training rows of the tasks that have fewer than the cap, counted by hand: rows of train less FLAN's rows of dev."""


def training_rows() -> dict[str, int]:
    rows = {task.name: known_rows(task, "train", FLAN_CAP) for task in select("all").files()}
    return {name: count for name, count in rows.items() if count is not None}


def test_training_rows_are_what_a_count_by_hand_gives() -> None:
    counts = training_rows()
    assert set(flan_tasks()) - set(counts) == {"wsc273"}, "it has test rows alone"
    assert counts == dict.fromkeys(counts, FLAN_CAP) | SMALL


def test_mixing_probabilities_over_all_62_data_sets_are_exact() -> None:
    rates = mixing_rates(training_rows(), 3_000)
    total = 59 * 3_000 + 200 + 2_290 + 605 + 350 + 1_671 + 919 + 2_051 + 1_122 + 1_659
    assert total == 187_867
    assert len(rates) == 68
    assert sum(rates.values()) == 1
    for name, rate in rates.items():
        assert rate == Fraction(min(SMALL.get(name, FLAN_CAP), 3_000), total), name


@pytest.mark.parametrize(("split", "other"), [("dev", 50), ("dev", 200)])
def test_development_rows_are_flans(split: str, other: int) -> None:
    fifty, hundred, thirty = {"cb", "copa"}, {"stsb", "piqa", "coqa"}, {"wnli"}
    opinions = {"opinion_abstracts_idebate", "opinion_abstracts_rotten_tomatoes"}
    for task in select("all").files():
        count = known_rows(task, split)
        size = (
            50 if task.name in fifty else 30 if task.name in thirty else 100 if task.name in hundred | opinions else 200
        )
        assert count in (size, None), task.name


@pytest.mark.parametrize("name", [n for n in flan_tasks() if n != "wsc273"])
def test_training_and_development_rows_of_flan_do_not_overlap(name: str) -> None:
    task = next(iter(select(f"tasks={name}").files()))
    train, dev = task.splits["train"], task.splits["dev"]
    if train.name == dev.name:
        rows = task.rows[train.name]
        (a, b), (c, d) = train.cut(rows), dev.cut(rows)
        assert b <= c or d <= a


@given(CLUSTERS)
def test_clusters_and_their_complement_are_all_tasks_when_nothing_is_excluded_with_them(clusters: set[str]) -> None:
    named, rest = select("clusters=" + ",".join(sorted(clusters))), select("all-but=" + ",".join(sorted(clusters)))
    assert not set(named.tasks) & set(rest.tasks)
    left = {name for name in flan_tasks() if name not in named.tasks and name not in rest.tasks}
    excluded = FLAN.excluded(clusters) - clusters
    assert all(set(load_task(name).clusters) & excluded for name in left)
    assert (named.cap, named.flan, rest.cap, rest.flan) == (30_000, True, 30_000, True)


def test_clusters_have_the_names_of_the_paper_and_of_its_code() -> None:
    assert select("clusters=entailment,qa").tasks == select("clusters=nli,closed_book_qa").tasks
    assert select("all-but=common_sense").tasks == select("all-but=commonsense").tasks
    for name in ("clusters=", "clusters=,", "all-but="):
        with pytest.raises(DataError, match="no cluster is"):
            select(name)
    with pytest.raises(DataError, match="unknown task of FLAN") as caught:
        select("tasks=eng_spa")
    assert caught.value.details["try"] == "kd data ls flan"


def test_a_file_of_ones_own_joins_by_its_cluster(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("extends: rte\nabout: mine\nflan: null\nfiles: {train: mine.jsonl}\n")
    for name in ("all", "clusters=nli", "all-but=qa", "tasks=boolq"):
        assert select(f"{name},{path}").tasks[-1] == str(path)
    with pytest.raises(DataError, match="names none of the mixture's clusters"):
        select(f"clusters=qa,{path}")
    for held_out in ("nli", "paraphrase"):
        with pytest.raises(DataError, match="a cluster that is held out") as caught:
            select(f"all-but={held_out},{path}")
        assert caught.value.details["found"] == "nli"


# rows


def example_rows(name: str, count: int) -> list[dict[str, Any]]:
    return [dict(load_task(name).example) | {"number": n} for n in range(count)]


def put(folder: Path, **splits: list[dict[str, Any]]) -> None:
    folder.mkdir(parents=True)
    for split, rows in splits.items():
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_flans_cut_of_a_reference_task_has_other_parts_and_no_limit_of_length(tmp_path: Path) -> None:
    rows = example_rows("boolq", 300)
    rows[0]["passage"] = "p" * 5000
    put(tmp_path / "boolq", train=rows, validation=example_rows("boolq", 7))
    settings = InstructionConfig(task_root=tmp_path)

    def ids(spec: str, split: str) -> list[str]:
        return [e.id for e in load_corpus(spec, split=split, instructions=settings).examples]

    assert len(ids("flan:boolq", "train")) == 299
    assert len(ids("flan:boolq", "dev")) == 7
    assert ids("flan:tasks=boolq", "train") == [f"boolq/train/{n}" for n in range(100)]
    assert ids("flan:tasks=boolq", "dev") == [f"boolq/train/{n}" for n in range(100, 300)]
    assert ids("flan:tasks=boolq", "test") == [f"boolq/validation/{n}" for n in range(7)]
    places = {source_place(i) for i in ids("flan:tasks=boolq", "test")}
    assert places == {source_place(i) for i in ids("flan:boolq", "test")}, "the same rows, for contamination"
    assert source_place("boolq/train/150") == ("boolq", "train", "150")


def test_tasks_without_the_split_are_passed_over_and_named(tmp_path: Path) -> None:
    put(tmp_path / "dpr", train=example_rows("dpr", 300), test=example_rows("dpr", 5))
    winogrande = {"validation": example_rows("winogrande", 5), "test": example_rows("winogrande", 9)}
    put(tmp_path / "winogrande", train=example_rows("winogrande", 300), **winogrande)
    put(tmp_path / "wsc273", test=example_rows("wsc273", 4))
    settings = InstructionConfig(task_root=tmp_path)
    train = load_corpus("flan:clusters=coreference", instructions=settings)
    assert Counter(e.task for e in train.examples) == {"dpr": 100, "winogrande": 100}
    assert train.source["without split train"] == "wsc273"
    test = load_corpus("flan:clusters=coreference", split="test", instructions=settings)
    assert Counter(e.task for e in test.examples) == {"dpr": 5, "winogrande": 5, "wsc273": 4}
    with pytest.raises(DataError, match="no such split"):
        load_corpus("flan:wsc273", instructions=settings)


def test_all_tasks_whose_rows_are_missing_are_named_at_once(tmp_path: Path) -> None:
    put(tmp_path / "boolq", train=example_rows("boolq", 5))
    with pytest.raises(DataError, match="the rows of tasks are missing") as caught:
        load_corpus("flan:four", instructions=InstructionConfig(task_root=tmp_path))
    assert all(f"{name}: no files of the task" in caught.value.details["found"] for name in ("anli_r1", "xsum"))
    assert "boolq" not in caught.value.details["found"]
    assert "--skip-missing" in caught.value.details["try"]
    corpus = load_corpus("flan:four", instructions=InstructionConfig(task_root=tmp_path, skip_missing=True))
    assert {e.task for e in corpus.examples} == {"boolq"}
    assert corpus.source["missing tasks"] == "anli_r1, common_gen, xsum"
    assert corpus.source["tasks"] == "boolq"
    assert corpus.left_out.document()["missing_tasks"] == {"count": 3, "first": "anli_r1"}
    with pytest.raises(DataError, match="are missing"):
        load_corpus("flan:xsum,paws", instructions=InstructionConfig(task_root=tmp_path, skip_missing=True))
    with pytest.raises(DataError, match="no files of the task"):
        load_corpus("flan:xsum", instructions=InstructionConfig(task_root=tmp_path, skip_missing=True))


def test_a_fault_in_rows_is_not_a_missing_task(tmp_path: Path) -> None:
    put(tmp_path / "boolq", train=example_rows("boolq", 5))
    put(tmp_path / "paws", train=[{"a": 1}])
    with pytest.raises(DataError, match="columns are missing"):
        load_corpus("flan:boolq,paws", instructions=InstructionConfig(task_root=tmp_path, skip_missing=True))


def test_the_whole_mixture_loads_from_rows_of_the_true_shape(tmp_path: Path) -> None:
    """Every task's example row, many times, as a data set of the hub would give it, or as files for those given by hand."""
    from datasets import Dataset

    late = {"fix_punctuation", "true_case", "word_segment"}  # their parts begin beyond 30,000 rows
    tasks = {task.name: task for task in select("all").files() if task.name not in late}
    many = {"wiki_lingua": 2_300, "para_crawl_enes": 1_300}
    by_id = {(task.hub.id, task.hub.config): task for task in tasks.values() if task.hub is not None}

    def rows(name: str) -> list[dict[str, Any]]:
        return [dict(tasks[name].example)] * many.get(name, 620)

    def hub(identity: str, config: str | None, revision: str | None, split: str, *files: Any) -> HubRows:
        return HubRows(Dataset.from_list(rows(by_id[identity, config].name)), "c" * 40)

    local = [name for name, task in tasks.items() if task.hub is None]
    for name in local:
        put(tmp_path / name, **{part.name: rows(name) for part in tasks[name].splits.values()})
    for split in ("train", "dev", "test"):
        settings = InstructionConfig(template="round-robin", mix_maximum=3_000)
        fetched = load_mixture(select("tasks=" + ",".join(n for n in tasks if n not in local)), split, settings, hub)
        by_hand = load_corpus(
            "flan:tasks=" + ",".join(local), split=split, instructions=InstructionConfig(task_root=tmp_path)
        )
        found = {e.task for e in (*fetched.examples, *by_hand.examples)}
        assert set(tasks) - found == (set() if split == "test" else {"wsc273"}), split


SEVEN = (
    *("summarization", "translation", "reading_comprehension", "sentiment", "struct_to_text", "coreference"),
    "conversational_qa",
)
"""FLAN's ablation of the number of clusters adds them in this order (`train_clusters_ordered` of its task_splits.py)."""


def test_the_first_tasks_of_each_cluster_are_those_of_flans_code() -> None:
    selection = select(f"clusters={','.join(SEVEN)}")
    first = {
        1: {"aeslc", "para_crawl_enes", "squad", "imdb", "web_nlg", "dpr", "quac"},
        2: {"cnn_dailymail", "wmt14_enfr", "squad_v2", "sentiment140", "common_gen", "winogrande", "coqa"},
        3: {"gigaword", "wmt16_de", "drop", "yelp", "e2e_nlg", "wsc273"},
        4: {"multi_news", "wmt16_tr", "multirc", "sst2", "dart"},
    }
    for count in first:
        expected = set().union(*(first[n] for n in range(1, count + 1)))
        assert set(selection.first_of_clusters(count).tasks) == expected
    assert selection.first_of_clusters(99) == selection
    with pytest.raises(DataError, match="no choice of clusters"):
        select("four").first_of_clusters(1)


def test_clusters_of_flans_code_that_are_parts_of_one_can_be_chosen() -> None:
    assert set(select("clusters=conversational_qa").tasks) == {"coqa", "quac"}
    counts = [len(select(f"clusters={','.join(SEVEN[:n])}").tasks) for n in range(1, 8)]
    assert counts == [11, 19, 25, 29, 33, 36, 38]  # the paper: 11, 20, 26, 30, 34, 37, 39; of translation it has nine
    for part, tasks in FLAN.parts.items():
        assert {t for t in tasks if not t.startswith("mini_")} == set(select(f"clusters={part}").tasks)
    listed = [task for tasks in FLAN.order.values() for task in tasks]
    assert sorted(listed) == sorted(
        set(flan_tasks()) - {t for tasks in FLAN.parts.values() for t in tasks} - {"wsc273"}
    )


def test_the_small_world_has_the_same_mixtures_in_ten_clusters() -> None:
    assert len(select_mini("").tasks) == 30 == len(mini_tasks())
    assert select_mini("all") == select_mini("")
    assert {load_task(name).clusters[0] for name in mini_tasks()} == {
        *SEVEN[:-1],
        "misc",
        "nli",
        "closed_book_qa",
        "commonsense",
    }
    assert set(select_mini("all-but=nli").tasks) == set(mini_tasks()) - {"mini_cb", "mini_rte"}
    assert [len(select_mini(f"clusters={','.join(SEVEN)}").first_of_clusters(n).tasks) for n in (1, 2, 3, 4)] == [
        7,
        14,
        19,
        24,
    ]
    assert select_mini("mini_rte") == select_mini("tasks=mini_rte")
    assert not {name for name in flan_tasks() if name.startswith("mini_")}
