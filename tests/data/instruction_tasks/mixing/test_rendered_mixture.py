"""Rows that are rendered already make a mixture by a column of tasks: caps, rates, choice of rows, held-out clusters."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kd.common.errors import DataError
from kd.data.corpus import Corpus
from kd.data.data_settings import DataSettings, InstructionConfig, RowSettings
from kd.data.instruction_tasks.clusters import flan_clusters
from kd.data.instruction_tasks.mixing.mixtures import sampled
from kd.data.instruction_tasks.mixing.rendered_mixture import clusters_of_name, rendered_mixture
from kd.data.instruction_tasks.task_files import load_task, task_names
from kd.data.left_out import LeftOut
from kd.data.rows.example import Example
from kd.data.rows.row_streams import StreamedRow, numbered_rows
from kd.data.sources import load_corpus

COLUMNS = {"prompt": "inputs", "target": "targets", "task": "task_name"}
ROW = st.tuples(
    st.sampled_from(["super_glue/rte:1.0.2", "bool_q", "imdb"]), st.sampled_from("zf"), st.sampled_from(["", "a", "b"])
)


def dump(rows: list[tuple[str, str, str]]) -> list[dict[str, Any]]:
    return [
        {"inputs": f"q{n}", "targets": target, "task_name": task, "kind": kind}
        for n, (task, kind, target) in enumerate(rows)
    ]


def load(path: Path, rows: RowSettings | None = None, **instructions: Any) -> Corpus:
    return load_corpus(str(path), columns=COLUMNS, rows=rows, instructions=InstructionConfig(**instructions))


@given(
    st.lists(ROW, max_size=60),
    st.none() | st.integers(1, 5),
    st.none() | st.integers(1, 9),
    st.booleans(),
    st.booleans(),
)
@settings(suppress_health_check=[HealthCheck.too_slow], deadline=None)
def test_it_is_what_lists_would_give(
    rows: list[tuple[str, str, str]], cap: int | None, maximum: int | None, only: bool, held: bool
) -> None:
    """The twin holds all rows and filters, caps and draws them one step after the other."""
    choice = RowSettings({"kind": "z"} if only else None, "nli" if held else None)
    config, left_out = InstructionConfig(max_per_task=cap, mix_maximum=maximum, data_seed=3), LeftOut()
    kept = [Example(f"d:{n}", r["targets"], r["inputs"], r["task_name"]) for n, r in enumerate(dump(rows))]
    kept = [e for e, (_, kind, _) in zip(kept, rows, strict=True) if not only or kind == "z"]
    kept = [e for e in kept if e.target and not (held and e.task.startswith("super"))]
    pools = {task: [e for e in kept if e.task == task][:cap] for task in {e.task for e in kept}}
    expected = [e for e in kept if e in pools[e.task]]
    streams = {"d": numbered_rows(dump(rows), "here")}
    if maximum is not None and not expected:
        with pytest.raises(DataError, match="no rows"):
            rendered_mixture(streams, COLUMNS, choice, config, "train", left_out)
        return
    mixed = rendered_mixture(streams, COLUMNS, choice, config, "train", left_out)
    drawn = expected if maximum is None else list(sampled(pools, maximum=maximum, seed=3))
    assert list(mixed.examples) == drawn
    assert sum(left_out.counts.values()) == len(rows) - len(expected), "every row is used or counted"


def test_rows_beyond_the_caps_are_not_kept() -> None:
    alive: set[int] = set()
    most = 0

    class Text(str):
        def __del__(self) -> None:
            alive.discard(id(self))

    def rows() -> Iterator[StreamedRow]:
        nonlocal most
        for number in range(2_000):
            text = Text(f"prompt {number}")
            alive.add(id(text))
            most = max(most, len(alive))
            row = {"inputs": text, "targets": "a", "task_name": f"task {number % 4}"}
            del text
            yield StreamedRow(number, row, f"row {number}")

    config = InstructionConfig(max_per_task=5)
    mixed = rendered_mixture({"d": rows()}, COLUMNS, RowSettings(), config, "train", left_out := LeftOut())
    assert (len(mixed.examples), left_out.counts) == (20, {"beyond_limit": 1_980})
    assert most < 40


def test_a_dump_is_a_mixture_with_figures_for_each_task(tmp_path: Path) -> None:
    rows = dump([("super_glue/rte:1.0.2", "z", "yes"), ("my/own", "f", "no")] * 4)
    path = tmp_path / "dump.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    corpus = load(path, max_per_task=3)
    assert Counter(e.task for e in corpus.examples) == {"super_glue/rte:1.0.2": 3, "my/own": 3}
    assert [e.id for e in corpus.examples] == [f"dump.jsonl:{n}" for n in range(6)]
    assert corpus.source == {
        "source": "local",
        "tasks": "my/own, super_glue/rte:1.0.2",
        "task super_glue/rte:1.0.2": "3 examples",
        "task my/own": "3 examples",
        "max_per_task": "3",
    }
    limited = load(path, max_per_task=3, task_limits={"my/own": 1})
    assert Counter(e.task for e in limited.examples) == {"super_glue/rte:1.0.2": 3, "my/own": 1}
    assert limited.source["task_limits"] == "my/own=1"
    with pytest.raises(DataError, match="unknown task"):
        load(path, task_limits={"my/wn": 1})
    only = load(path, RowSettings({"kind": "f|x"}))
    assert {e.task for e in only.examples} == {"my/own"}
    assert only.left_out.document() == {"filtered": {"count": 4, "first": "dump.jsonl:0"}}
    assert DataSettings(spec=str(path), columns=COLUMNS).rows == RowSettings()


def test_held_out_clusters_need_a_cluster_for_every_name(tmp_path: Path) -> None:
    path = tmp_path / "dump.jsonl"
    rows = dump([("super_glue/rte:1.0.2", "z", "yes"), ("mine", "f", "no"), ("paws_wiki", "f", "no")])
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(DataError, match="cluster of tasks is not known") as caught:
        load(path, RowSettings(held_out="nli"))
    assert caught.value.details["found"] == "mine"
    told = tmp_path / "map.yaml"
    for value, kept in (("none", ["mine"]), ("imdb", ["mine"]), ("sentiment", ["mine"])):
        told.write_text(f"mine: {value}\n")
        corpus = load(path, RowSettings(held_out="nli", task_map=told))
        assert [e.task for e in corpus.examples] == kept, "paraphrase is held out with NLI"
        assert corpus.left_out.counts == {"held_out": 2}
    told.write_text("mine: nil\n")
    with pytest.raises(DataError, match="unknown task, data set or cluster"):
        load(path, RowSettings(held_out="nli", task_map=told))
    with pytest.raises(DataError, match="is for held-out clusters"):
        load(path, RowSettings(task_map=told))
    with pytest.raises(DataError, match="unknown cluster"):
        load(path, RowSettings(held_out="nil"))


def test_every_name_of_flan_is_known_with_and_without_a_version() -> None:
    registry = flan_clusters()
    assert set(registry.written_as) == set(registry.datasets)
    for dataset, names in registry.written_as.items():
        for name in (dataset, *names, *(f"{n}:1.2.0" for n in names)):
            assert clusters_of_name(name) == registry.clusters_of(dataset), name
    for name in task_names():
        assert clusters_of_name(name) == frozenset(load_task(name).clusters)
    assert clusters_of_name("some/other:1.0.0") is None


@pytest.mark.parametrize(
    ("spec", "columns", "rows", "settings", "words"),
    [
        ("flan:boolq", None, {"held_out": "nli"}, {}, "no column of tasks"),
        ("mini", COLUMNS, {}, {}, "no column of tasks"),
        ("DUMP", COLUMNS, {}, {"template": 0}, "have no templates"),
        ("DUMP", {"prompt": "inputs", "target": "targets"}, {"held_out": "nli"}, {}, "no column names the tasks"),
        (
            "DUMP",
            {"prompt": "inputs", "target": "targets"},
            {"only": {"kind": "z"}},
            {"max_per_task": 1},
            "no column names",
        ),
        ("DUMP", COLUMNS | {"text": "x"}, {}, {}, "unknown field in --columns"),
        ("DUMP", COLUMNS | {"task": "source"}, {}, {}, "columns are missing"),
        ("DUMP", COLUMNS, {"only": {"kin": "z"}}, {}, "columns are missing"),
        ("DUMP", COLUMNS, {"only": {"kind": "none"}}, {}, "no text found"),
    ],
)
def test_what_cannot_be_is_one_clear_error(
    spec: str, columns: Any, rows: Any, settings: Any, words: str, tmp_path: Path
) -> None:
    path = tmp_path / "dump.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in dump([("imdb", "z", "a")])))
    with pytest.raises(DataError, match=words):
        load_corpus(
            spec.replace("DUMP", str(path)),
            columns=columns,
            rows=RowSettings(**rows),
            instructions=InstructionConfig(**settings),
        )


def test_a_dump_of_the_hub_is_read_as_a_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked: list[Any] = []

    def load_dataset(*arguments: Any, **options: Any) -> Any:
        asked.append((arguments, options))
        return iter(dump([("imdb", "z", "a"), ("bool_q", "z", "b")]))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    commit = "a" * 40
    corpus = load(Path(f"owner/dump@{commit}"))
    assert [e.id for e in corpus.examples] == ["owner/dump:0", "owner/dump:1"]
    assert asked == [(("owner/dump", None), {"revision": commit, "split": "train", "streaming": True})]
    assert (corpus.source["source"], corpus.source["revision"]) == ("owner/dump", commit)
