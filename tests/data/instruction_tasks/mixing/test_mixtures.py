"""Probabilities are exact, orders are stable, and `--data flan:…` gives the tasks it names."""

from __future__ import annotations

import json
from collections import Counter
from fractions import Fraction
from math import sqrt
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kd.common.errors import DataError
from kd.data.data_settings import InstructionConfig
from kd.data.instruction_tasks.mixing.mixture_names import flan_tasks, select
from kd.data.instruction_tasks.mixing.mixtures import mixing_rates, row_cap, sampled, shuffled
from kd.data.instruction_tasks.task_files import load_task, task_names
from kd.data.rows.example import Example
from kd.data.sources import load_corpus

COUNTS = st.dictionaries(st.sampled_from("abcdef"), st.integers(0, 10**6), min_size=1).filter(lambda c: any(c.values()))
MAXIMUM = st.none() | st.integers(1, 10**5)


def pool(name: str, count: int) -> list[Example]:
    return [Example(f"{name}/train/{i}", f"target {i}", task=name) for i in range(count)]


# probabilities


@given(COUNTS, MAXIMUM)
def test_probabilities_sum_to_exactly_one(counts: dict[str, int], maximum: int | None) -> None:
    rates = mixing_rates(counts, maximum)
    assert sum(rates.values()) == 1
    assert all(rate >= 0 for rate in rates.values())


@given(COUNTS, MAXIMUM)
def test_probabilities_do_not_depend_on_the_order_of_tasks(counts: dict[str, int], maximum: int | None) -> None:
    assert mixing_rates(counts, maximum) == mixing_rates(dict(reversed(counts.items())), maximum)


@given(COUNTS, MAXIMUM)
def test_more_rows_never_mean_a_smaller_share(counts: dict[str, int], maximum: int | None) -> None:
    rates = mixing_rates(counts, maximum)
    for one in counts:
        for other in counts:
            assert counts[one] < counts[other] or rates[one] >= rates[other]


@given(COUNTS)
def test_a_maximum_above_every_count_is_proportional_and_one_of_one_is_uniform(counts: dict[str, int]) -> None:
    assert mixing_rates(counts, 10**6) == mixing_rates(counts)
    filled = {name: n for name, n in counts.items() if n}
    assert set(mixing_rates(filled, 1).values()) == {Fraction(1, len(filled))}


def test_flans_numbers_by_hand() -> None:
    """30,000 and 16,946 rows meet the maximum of 3,000; 2,490 do not."""
    rates = mixing_rates({"squad": 30_000, "anli_r1": 16_946, "rte": 2_490}, 3_000)
    assert rates == {"squad": Fraction(3000, 8490), "anli_r1": Fraction(3000, 8490), "rte": Fraction(2490, 8490)}


@pytest.mark.parametrize(("counts", "maximum"), [({}, None), ({"a": 0}, 5), ({"a": -1}, 5), ({"a": 1}, 0)])
def test_a_mixture_of_nothing_is_an_error(counts: dict[str, int], maximum: int | None) -> None:
    with pytest.raises(DataError):
        mixing_rates(counts, maximum)


# realisation


def test_a_shuffle_holds_every_example_once_and_a_seed_fixes_it() -> None:
    pools = {"a": pool("a", 30), "b": pool("b", 20)}
    mixed = shuffled(pools, seed=1)
    assert Counter(e.id for e in mixed) == Counter(e.id for p in pools.values() for e in p)
    assert mixed == shuffled(dict(reversed(pools.items())), seed=1)
    assert mixed != shuffled(pools, seed=2)
    assert {e.task for e in mixed[:10]} == {"a", "b"}


@given(st.integers(1, 20), st.integers(1, 20), st.integers(0, 3))
def test_another_task_does_not_change_the_order_of_the_others(a: int, b: int, seed: int) -> None:
    alone = shuffled({"a": pool("a", a)}, seed=seed)
    together = shuffled({"a": pool("a", a), "b": pool("b", b)}, seed=seed)
    assert tuple(e for e in together if e.task == "a") == alone


@given(st.integers(0, 60), st.integers(0, 60), st.integers(0, 3))
def test_fewer_draws_are_the_first_of_more(few: int, more: int, seed: int) -> None:
    pools = {"a": pool("a", 3), "b": pool("b", 9)}
    one, other = (sampled(pools, maximum=5, draws=n, seed=seed) for n in sorted((few, more)))
    assert other[: len(one)] == one


def test_draws_use_up_a_task_before_they_repeat_and_ids_stay_unique() -> None:
    mixed = sampled({"a": pool("a", 3), "b": pool("b", 50)}, maximum=3, draws=40)
    assert len({e.id for e in mixed}) == 40
    of_a = [e for e in mixed if e.task == "a"]
    for turn in range(0, len(of_a) - 2, 3):
        assert len({e.target for e in of_a[turn : turn + 3]}) == 3
    assert of_a[3].id.endswith(" (2)")


def test_shares_of_draws_are_near_the_probabilities() -> None:
    pools, draws = {"a": pool("a", 10), "b": pool("b", 40), "c": pool("c", 400)}, 4000
    counts = Counter(e.task for e in sampled(pools, maximum=50, draws=draws, seed=7))
    for name, rate in mixing_rates({n: len(p) for n, p in pools.items()}, 50).items():
        spread = sqrt(draws * rate * (1 - rate))
        assert abs(counts[name] - draws * rate) < 4 * spread  # one seed, four standard deviations


def test_by_default_there_are_as_many_draws_as_bounded_rows() -> None:
    assert len(sampled({"a": pool("a", 10), "b": pool("b", 400)}, maximum=50)) == 60


# names


def test_presets_are_the_reference_systems() -> None:
    assert select("four").tasks == ("anli_r1", "boolq", "common_gen", "xsum")
    assert set(select("ten").tasks) - set(select("eight").tasks) == {"python_code", "eng_spa"}
    assert "coqa" not in select("ten").tasks
    assert select("all").tasks == flan_tasks()
    assert set(task_names()) - set(flan_tasks()) == {"python_code", "eng_spa"}
    assert select("squad").tasks == ("squad",)
    assert select("squad,xsum,squad").tasks == ("squad", "xsum")


@pytest.mark.parametrize(
    ("name", "words", "meant"),
    [
        ("foru", "unknown task or mixture", "four"),
        ("bool_q", "unknown task or mixture", "boolq"),
        ("all-but=trnslation", "unknown cluster", "translation"),
    ],
)
def test_unknown_names_suggest_the_nearest(name: str, words: str, meant: str) -> None:
    with pytest.raises(DataError, match=words) as caught:
        select(name)
    assert caught.value.details["did you mean"] == meant


def test_a_preset_among_tasks_and_an_empty_hold_out_are_errors() -> None:
    with pytest.raises(DataError, match="a preset cannot be combined"):
        select("boolq,ten")
    with pytest.raises(DataError, match="no cluster is held out"):
        select("all-but=")


# through load_corpus


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A task root of made-up rows: the example row of each task, numbered."""
    for name in ("anli_r1", "boolq", "common_gen", "xsum"):
        task = load_task(name)
        rows = [dict(task.example) for _ in range(12)]
        folder = tmp_path / "root" / name
        folder.mkdir(parents=True)
        for split in ("train", "dev"):
            (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path / "root"


def load(spec: str, root: Path, split: str | None = None, limit: int | None = None, **settings: Any):
    return load_corpus(spec, split=split, limit=limit, instructions=InstructionConfig(task_root=root, **settings))


def test_flan_four_is_pairs_of_all_four_tasks(root: Path) -> None:
    corpus = load("flan:four", root)
    assert (corpus.kind, corpus.split, len(corpus.examples)) == ("pairs", "train", 48)
    assert Counter(e.task for e in corpus.examples) == dict.fromkeys(select("four").tasks, 12)
    assert corpus.digest == load("flan:four", root).digest
    assert corpus.source["template"] == "random"
    assert "12 examples" in corpus.source["task boolq"]
    assert not any(str(root) in value for value in corpus.source.values())


def test_whatever_changes_the_text_changes_the_digest(root: Path) -> None:
    plain = load("flan:four", root).digest
    for settings in (
        {"data_seed": 1},
        {"template": 0},
        {"template": "round-robin"},
        {"options": False},
        {"labels": "flan"},
        {"max_per_task": 5},
        {"task_limits": {"boolq": 5}},
        {"mix_maximum": 3},
    ):
        assert load("flan:four", root, **settings).digest != plain, settings


def test_caps_count_rows_and_the_maximum_counts_draws(root: Path) -> None:
    assert len(load("flan:four", root, max_per_task=5).examples) == 20
    assert len(load("flan:four", root, mix_maximum=3).examples) == 12
    assert len(load("flan:four", root, mix_maximum=3, mix_draws=100).examples) == 100
    assert len(load("flan:four", root, mix_maximum=3, max_per_task=2).examples) == 8
    assert load("flan:four", root, limit=7).examples == load("flan:four", root).examples[:7]


def test_single_tasks_may_have_limits_of_their_own(root: Path) -> None:
    corpus = load("flan:four", root, max_per_task=5, task_limits={"boolq": 2, "coqa": 1})
    assert Counter(e.task for e in corpus.examples) == {"anli_r1": 5, "boolq": 2, "common_gen": 5, "xsum": 5}
    assert row_cap(load_task("boolq"), "train", InstructionConfig(task_limits={"xsum": 3}), 30_000) == 30_000
    with pytest.raises(DataError, match="unknown task") as caught:
        load("flan:four", root, task_limits={"bolq": 2})
    assert caught.value.details["did you mean"] == "boolq"


def test_the_default_cap_is_the_mixtures_own_and_for_train_alone() -> None:
    task, plain = load_task("boolq"), InstructionConfig()
    assert row_cap(task, "train", plain, select("four").cap) == 10_000
    assert row_cap(task, "train", plain, select("all").cap) == 30_000
    assert row_cap(task, "dev", plain, select("all").cap) is None
    assert {row_cap(task, s, InstructionConfig(max_per_task=7), 30_000) for s in ("train", "dev", "test")} == {7}


def test_one_task_keeps_its_order_and_dev_has_other_names(root: Path) -> None:
    corpus = load("flan:boolq", root, split="validation", template=0)
    assert [e.id for e in corpus.examples] == [f"boolq/dev/{i}" for i in range(12)]
    assert corpus.split == "dev"


def test_a_users_own_file_is_a_source_and_joins_mixtures(root: Path, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"q": "Why?", "a": "Because."}\n')
    path = tmp_path / "mine.yaml"
    path.write_text("fields: {q: q}\nreferences: a\nfiles: {train: rows.jsonl}\ntemplates: [{prompt: 'Q: {q}'}]\n")
    [example] = load_corpus(str(path)).examples
    assert (example.id, example.prompt, example.target) == ("mine/train/0", "Q: Why?", "Because.")
    (root / "mine").mkdir()
    (root / "mine" / "train.jsonl").write_text('{"q": "Why?", "a": "Because."}\n')
    assert Counter(e.task for e in load(f"flan:boolq,{path}", root).examples) == {"boolq": 12, "mine": 1}


def test_settings_of_tasks_are_refused_elsewhere(root: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(DataError, match="no templates") as caught:
        load(str(tmp_path / "a.txt"), root, labels="flan")
    assert caught.value.details["found"] == "labels, task_root given"
    with pytest.raises(DataError, match="take no --columns"):
        load_corpus("flan:boolq", columns={"text": "passage"})
    with pytest.raises(DataError, match="no task has choices"):
        load("flan:xsum", root, options=True)
    with pytest.raises(DataError, match="unknown split"):
        load("flan:xsum", root, split="heldout")
    with pytest.raises(DataError, match="no such template"):
        load("flan:four", root, template=99)


def test_tasks_load_through_datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets
    import pyarrow as pa
    import pyarrow.parquet as pq

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "google-research-datasets" / "paws"
    (folder / "labeled_final").mkdir(parents=True)
    rows = [{"id": i, "sentence1": "a", "sentence2": "b", "label": i % 2} for i in range(3)]
    pq.write_table(pa.Table.from_pylist(rows), folder / "labeled_final" / "validation-00000-of-00001.parquet")
    (folder / "README.md").write_text(
        "---\nconfigs:\n- config_name: labeled_final\n  data_files:\n  - split: validation\n"
        "    path: labeled_final/validation-*\n---\n"
    )
    corpus = load_corpus("flan:paws", split="dev")
    assert [(e.id, e.answer) for e in corpus.examples] == [("paws/dev/0", 0), ("paws/dev/1", 1), ("paws/dev/2", 0)]
    hub = load_task("paws").hub
    assert hub is not None
    assert corpus.source["task paws"].startswith(
        f"google-research-datasets/paws:labeled_final@{hub.revision} validation;"
    )


def test_real_tasks_make_a_mixture(shared: Path) -> None:
    corpus = load("flan:four", shared / "tasks", split="dev")
    assert {e.task for e in corpus.examples} == set(select("four").tasks)
    assert all(e.choices[e.answer] == e.target for e in corpus.examples if e.answer is not None)
    assert len([e for e in corpus.examples if e.task == "common_gen"]) == 4018
