"""Rows of a split are found in a folder by documented names, in files a task names, or on the hub."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from kd.common.errors import DataError
from kd.data.instruction_tasks.task_files import load_task
from kd.data.instruction_tasks.task_rows import load_task_rows
from kd.data.rows.hub import HubRows

PAWS = [{"sentence1": f"a{i}", "sentence2": f"b{i}", "label": i % 2} for i in range(4)]
CODE = [{"instruction": f"i{n}", "input": "", "output": f"o{n}"} for n in range(20)]


def put(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".csv":
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def no_hub(*_: Any) -> Any:
    pytest.fail("asked the hub")


def found(root: Path, name: str, split: str) -> list[Any]:
    rows = load_task_rows(load_task(name), split, root, no_hub)
    return [tuple(row.values()) for row in rows.rows]


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet", ".csv"])
@pytest.mark.parametrize(
    ("file", "split"),
    [
        ("train", "train"),
        ("dev", "dev"),
        ("validation", "dev"),
        ("valid", "dev"),
        ("test", "test"),
        ("sample200", "dev"),
        ("sample200", "test"),
        ("train_part", "train"),
        ("train-00000-of-00001", "train"),
    ],
)
def test_a_split_is_found_by_its_names_in_every_format(tmp_path: Path, file: str, split: str, suffix: str) -> None:
    put(tmp_path / "paws" / f"{file}{suffix}", PAWS)
    rows = load_task_rows(load_task("paws"), split, tmp_path, no_hub)
    assert [row["sentence1"] for row in rows.rows] == ["a0", "a1", "a2", "a3"]
    assert rows.source == f"local {file}{suffix}"


def test_the_hubs_own_split_name_is_found_too(tmp_path: Path) -> None:
    rows = [{"premise": "p", "hypothesis": "h", "label": 0}]
    put(tmp_path / "anli_r1" / "train_r1.jsonl", rows)
    assert len(found(tmp_path, "anli_r1", "train")) == 1
    put(tmp_path / "anli_r1" / "train.jsonl", rows * 2)
    assert len(found(tmp_path, "anli_r1", "train")) == 2, "our own name comes first"


def test_parts_are_joined_in_the_order_of_their_names(tmp_path: Path) -> None:
    put(tmp_path / "paws" / "train-00001-of-00002.jsonl", PAWS[2:])
    put(tmp_path / "paws" / "train-00000-of-00002.jsonl", PAWS[:2])
    assert [row[0] for row in found(tmp_path, "paws", "train")] == ["a0", "a1", "a2", "a3"]


def test_tasks_without_a_labelled_test_split_test_on_validation(tmp_path: Path) -> None:
    rows = [{"question": "q", "passage": "p", "answer": True}]
    put(tmp_path / "boolq" / "validation.jsonl", rows)
    assert len(found(tmp_path, "boolq", "test")) == 1
    put(tmp_path / "paws" / "validation.jsonl", PAWS)
    with pytest.raises(DataError, match="no file of the split"):
        found(tmp_path, "paws", "test")


def test_a_sample_is_never_taken_for_train(tmp_path: Path) -> None:
    put(tmp_path / "paws" / "sample200.jsonl", PAWS)
    with pytest.raises(DataError, match="no file of the split") as caught:
        found(tmp_path, "paws", "train")
    assert caught.value.details["found"] == "sample200.jsonl"
    assert "train.jsonl" in caught.value.details["expected"]
    assert "dev" in caught.value.details["try"]


def test_one_local_split_is_cut_as_on_the_hub_unless_there_are_others(tmp_path: Path) -> None:
    put(tmp_path / "python_code" / "train.jsonl", CODE)
    task = load_task("python_code")
    train, dev = (load_task_rows(task, s, tmp_path, no_hub) for s in ("train", "dev"))
    assert [len(train.rows), len(dev.rows)] == [18, 2]
    assert ([*train.rows, *dev.rows], dev.first) == (CODE, 18)
    put(tmp_path / "python_code" / "dev.jsonl", CODE[:5])
    assert [len(found(tmp_path, "python_code", s)) for s in ("train", "dev")] == [20, 5]


def test_the_hub_is_asked_for_the_pinned_data_set_and_split() -> None:
    from datasets import Dataset

    asked = []

    def hub(*arguments: Any) -> HubRows:
        asked.append(arguments)
        return HubRows(Dataset.from_list(CODE), str(arguments[2]))

    task = load_task("python_code")
    rows = load_task_rows(task, "test", None, hub)
    assert task.hub is not None
    commit = task.hub.revision
    assert asked == [("iamtarun/python_code_instructions_18k_alpaca", None, commit, "train")]
    assert ([r["output"] for r in rows.rows], rows.first) == (["o18", "o19"], 18)
    assert rows.source == f"iamtarun/python_code_instructions_18k_alpaca@{commit} train[90%:]"


def test_a_task_without_any_source_says_where_files_go(tmp_path: Path) -> None:
    path = tmp_path / "talks.yaml"
    path.write_text("extends: cosmos_qa\nfiles: {}\n")
    with pytest.raises(DataError, match="no data set on the hub that loads without code") as caught:
        load_task_rows(load_task(str(path)), "train", None, no_hub)
    assert "--task-root DIR" in str(caught.value)


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Address of a real HTTP server over `tmp_path/www`."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "DOWNLOADED_DATASETS_PATH", tmp_path / "downloads")
    (tmp_path / "www").mkdir()
    handler = partial(SimpleHTTPRequestHandler, directory=str(tmp_path / "www"))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        thread = Thread(target=running.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()
        thread.join()


COSMOS = 'id,context,question,answer0,answer1,answer2,answer3,label\nx,It rained .,Why wet ?,a,b,"c, d",e,2\n'


def test_files_at_an_address_are_read_where_they_lie(tmp_path: Path, server: str) -> None:
    (tmp_path / "www" / "valid.csv").write_text(COSMOS)
    path = tmp_path / "cosmos.yaml"
    path.write_text(
        f"extends: cosmos_qa\nfiles: {{dev: {server}/valid.csv, test: {server}/none.csv, train: {server}/x.zip}}\n"
    )
    task = load_task(str(path))
    found = load_task_rows(task, "dev", None, no_hub)
    assert [r["answer2"] for r in found.rows] == ["c, d"]
    assert found.source == f"{server}/valid.csv"
    with pytest.raises(DataError, match="cannot load the file") as caught:
        load_task_rows(task, "test", None, no_hub)
    assert caught.value.details["where"] == f"{server}/none.csv"
    with pytest.raises(DataError, match="has an unknown type"):
        load_task_rows(task, "train", None, no_hub)


def test_files_that_a_task_names_lie_beside_it(tmp_path: Path) -> None:
    put(tmp_path / "talks" / "one.jsonl", [{"dialogue": "d", "summary": "s"}])
    path = tmp_path / "talks.yaml"
    path.write_text("extends: samsum\nfiles: {train: talks/one.jsonl, test: talks/none.jsonl}\n")
    task = load_task(str(path))
    assert load_task_rows(task, "train", None, no_hub).rows == [{"dialogue": "d", "summary": "s"}]
    with pytest.raises(DataError, match="names no file for this split"):
        load_task_rows(task, "dev", None, no_hub)
    with pytest.raises(DataError, match="file is missing"):
        load_task_rows(task, "test", None, no_hub)


@pytest.mark.parametrize(
    "name", ["../secret.jsonl", "{root}/secret.jsonl", "link.jsonl", "folder/secret.jsonl", "~/secret.jsonl"]
)
def test_files_outside_of_a_tasks_folder_are_refused(name: str, tmp_path: Path) -> None:
    put(tmp_path / "secret.jsonl", [{"dialogue": "d", "summary": "s"}])
    (tmp_path / "task").mkdir()
    (tmp_path / "task" / "link.jsonl").symlink_to(tmp_path / "secret.jsonl")
    (tmp_path / "task" / "folder").symlink_to(tmp_path)
    path = tmp_path / "task" / "talks.yaml"
    path.write_text(f"extends: samsum\nfiles: {{train: '{name.format(root=tmp_path)}'}}\n")
    with pytest.raises(DataError, match=r"outside of its folder|file is missing") as caught:
        load_task_rows(load_task(str(path)), "train", None, no_hub)
    assert caught.value.details["where"] == f"{path} files.train"


@pytest.mark.parametrize(
    ("name", "split", "root", "words"),
    [
        ("paws", "dve", None, "unknown split"),
        ("paws", "train", "nowhere", "no files of the task"),
    ],
)
def test_what_is_not_there_is_one_clear_error(name: str, split: str, root: str | None, words: str) -> None:
    with pytest.raises(DataError, match=words) as caught:
        load_task_rows(load_task(name), split, None if root is None else Path(root), no_hub)
    assert len(caught.value.details) >= 2


def test_missing_columns_are_found_before_any_row_is_rendered(tmp_path: Path) -> None:
    put(tmp_path / "paws" / "dev.jsonl", [{"s1": "a", "sentence2": "b", "label": 0}])
    with pytest.raises(DataError, match="columns are missing") as caught:
        found(tmp_path, "paws", "dev")
    assert caught.value.details["found"] == "s1, sentence2, label"
    assert "label, sentence1, sentence2" in caught.value.details["expected"]
    assert "dev.jsonl" in str(caught.value)


def test_two_files_for_one_split_are_refused(tmp_path: Path) -> None:
    put(tmp_path / "paws" / "dev.jsonl", PAWS)
    put(tmp_path / "paws" / "dev.csv", PAWS)
    with pytest.raises(DataError, match="two files for one split"):
        found(tmp_path, "paws", "dev")


def test_rows_that_the_hub_does_not_give_say_how_to_give_them_as_files():
    def offline(*rest):
        raise DataError(
            "cannot load the data set from the hub",
            where="google/boolq split validation",
            found="ConnectionError: …",
            try_="a local file",
        )

    with pytest.raises(DataError, match=r"\(task boolq\)") as error:
        load_task_rows(load_task("boolq"), "dev", None, offline)
    assert error.value.details["where"] == "google/boolq split validation"
    for said in ("--task-root DIR", "DIR/boolq/dev.jsonl", "answer, passage, question"):
        assert said in error.value.details["try"]


# parts of the files that a task names


def parts(tmp_path: Path, yaml: str) -> dict[str, list[int]]:
    """Split -> numbers of its rows, of a task with files beside it."""
    put(tmp_path / "rows.jsonl", [{"x": str(n), "y": "a"} for n in range(10)])
    put(tmp_path / "dev.jsonl", [{"x": str(n), "y": "a"} for n in range(100, 104)])
    path = tmp_path / "mine.yaml"
    path.write_text("fields: {x: x}\nreferences: y\ntemplates: [{prompt: '{x}'}]\n" + yaml)
    task = load_task(str(path))
    found = {}
    for split in task.splits:
        rows = load_task_rows(task, split, None, no_hub)
        found[split] = [int(row["x"]) for row in rows.rows]
        assert rows.first == (found[split][0] if found[split][0] < 100 else 0)
    return found


def test_parts_of_one_file_do_not_overlap(tmp_path: Path) -> None:
    cut = parts(
        tmp_path,
        "files: {train: rows.jsonl, dev: rows.jsonl, test: rows.jsonl}\n"
        "splits: {train: 'train[:70%]', dev: 'train[70%:90%]', test: 'train[90%:]'}\n",
    )
    assert cut == {"train": [0, 1, 2, 3, 4, 5, 6], "dev": [7, 8], "test": [9]}


def test_a_split_without_a_file_is_a_part_of_the_file_that_it_names(tmp_path: Path) -> None:
    cut = parts(
        tmp_path,
        "files: {train: rows.jsonl, dev: dev.jsonl}\n"
        "splits: {train: 'train[:-2]', dev: 'validation[:3]', test: 'train[-2:]'}\n",
    )
    assert cut == {"train": list(range(8)), "dev": [100, 101, 102], "test": [8, 9]}
    assert parts(tmp_path, "files: {train: rows.jsonl, dev: dev.jsonl}\nsplits: {dev: validation, test: dev}\n") == {
        "dev": [100, 101, 102, 103],
        "test": [100, 101, 102, 103],
    }


def test_a_split_with_a_file_of_its_own_and_a_part_of_another_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="a file of its own and is also a part of another"):
        parts(tmp_path, "files: {train: rows.jsonl, dev: dev.jsonl}\nsplits: {train: train, dev: 'train[90%:]'}\n")


def test_parts_that_a_task_inherits_do_not_cut_its_own_files(tmp_path: Path) -> None:
    for name in ("train", "dev"):
        put(tmp_path / f"{name}.jsonl", CODE)
    path = tmp_path / "code.yaml"
    path.write_text("extends: python_code\nfiles: {train: train.jsonl, dev: dev.jsonl}\n")
    task = load_task(str(path))
    assert [len(load_task_rows(task, s, None, no_hub).rows) for s in ("train", "dev")] == [20, 20]


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_part_of_a_file_at_an_address_is_cut_too(tmp_path: Path, server: str, split: str) -> None:
    put(tmp_path / "www" / "rows.jsonl", CODE)
    path = tmp_path / "code.yaml"
    path.write_text(
        f"extends: python_code\nfiles: {{train: {server}/rows.jsonl}}\n"
        "splits: {train: 'train[:90%]', test: 'train[90%:]'}\n"
    )
    rows = load_task_rows(load_task(str(path)), split, None, no_hub)
    assert [r["output"] for r in rows.rows] == [r["output"] for r in (CODE[:18] if split == "train" else CODE[18:])]
    assert rows.location(rows.first) == f"{server}/rows.jsonl line {1 if split == 'train' else 19}"


def test_values_at_an_address_are_what_the_file_says(tmp_path: Path, server: str) -> None:
    (tmp_path / "www" / "valid.csv").write_text(COSMOS.replace("c, d", "NA").replace("Why wet ?", "007"))
    path = tmp_path / "cosmos.yaml"
    path.write_text(f"extends: cosmos_qa\nfiles: {{dev: {server}/valid.csv}}\n")
    row = load_task_rows(load_task(str(path)), "dev", None, no_hub).rows[0]
    assert (row["answer2"], row["question"]) == ("NA", "007")


def test_a_row_without_a_column_of_the_task_names_its_line(tmp_path: Path) -> None:
    put(tmp_path / "paws" / "dev-0.jsonl", PAWS)
    put(tmp_path / "paws" / "dev-1.jsonl", [PAWS[0], {"sentence1": "a", "sentence2": "b", "lable": 0}])
    with pytest.raises(DataError, match="columns are missing") as caught:
        found(tmp_path, "paws", "dev")
    assert str(caught.value.details["where"]).endswith("dev-1.jsonl line 2")
    assert "missing: label" in str(caught.value.details["expected"])


def test_places_of_rows_in_several_files_name_the_file(tmp_path: Path) -> None:
    put(tmp_path / "paws" / "dev-0.jsonl", PAWS)
    put(tmp_path / "paws" / "dev-1.csv", PAWS)
    rows = load_task_rows(load_task("paws"), "dev", tmp_path, no_hub)
    assert [Path(rows.location(n)).name for n in (0, 3, 4, 7)] == [
        "dev-0.jsonl line 1",
        "dev-0.jsonl line 4",
        "dev-1.csv line 2",
        "dev-1.csv line 5",
    ]


def test_compressed_files_and_upper_case_suffixes_are_found_and_hidden_ones_are_not(tmp_path: Path) -> None:
    import gzip

    put(tmp_path / "paws" / "dev.jsonl", PAWS)
    data = (tmp_path / "paws" / "dev.jsonl").read_bytes()
    (tmp_path / "paws" / "._dev.jsonl").write_bytes(b"\0")
    (tmp_path / "paws" / "train.JSONL.gz").write_bytes(gzip.compress(data))
    assert found(tmp_path, "paws", "train") == found(tmp_path, "paws", "dev")


# the layout of the source, seeded orders, rows per item, several files


def rte(numbers: range) -> list[dict[str, Any]]:
    return [{"premise": str(n), "hypothesis": "h", "label": 0} for n in numbers]


def test_local_files_called_as_at_the_source_are_cut_as_at_the_source(tmp_path: Path) -> None:
    put(tmp_path / "rte" / "train.jsonl", rte(range(300)))
    put(tmp_path / "rte" / "validation.jsonl", rte(range(1000, 1004)))
    task = load_task("rte")
    cut = {s: load_task_rows(task, s, tmp_path, no_hub) for s in ("train", "dev", "test")}
    assert [[int(r["premise"]) for r in cut[s].rows] for s in cut] == [
        [*range(100)],
        [*range(100, 300)],
        [*range(1000, 1004)],
    ]
    put(tmp_path / "rte" / "dev.jsonl", rte(range(5)))
    assert len(found(tmp_path, "rte", "train")) == 300, "a dev file of one's own leaves train whole"
    assert len(found(tmp_path, "rte", "dev")) == 5


def test_a_train_split_may_be_a_part_of_validation(tmp_path: Path) -> None:
    story = dict(load_task("story_cloze").example)
    for name in ("validation", "test"):
        put(tmp_path / "story_cloze" / f"{name}.jsonl", [story] * 250)
    sizes = {s: len(found(tmp_path, "story_cloze", s)) for s in ("train", "dev", "test")}
    assert sizes == {"train": 50, "dev": 200, "test": 250}


def test_a_seeded_order_comes_before_the_cut_and_rows_keep_their_numbers(tmp_path: Path) -> None:
    from datasets import Dataset

    rows = [{"text": f"review {n}", "label": int(n >= 300)} for n in range(600)]
    put(tmp_path / "imdb" / "train.jsonl", rows)
    put(tmp_path / "imdb" / "test.jsonl", rows)
    task = load_task("imdb")
    local, hub = (
        {
            s: load_task_rows(task, s, root, lambda *_: HubRows(Dataset.from_list(rows), "c" * 40))
            for s in ("train", "dev")
        }
        for root in (tmp_path, None)
    )
    for split, taken in local.items():
        assert taken.numbers == hub[split].numbers is not None
        assert list(taken.rows) == list(hub[split].rows) == [rows[n] for n in taken.numbers]
        share = sum(row["label"] for row in taken.rows) / len(taken.rows)
        assert 0.35 < share < 0.65, "both labels in every part of rows sorted by label"
    numbers = [*(local["train"].numbers or ()), *(local["dev"].numbers or ())]
    assert sorted(numbers) == list(range(600))
    assert local["train"].source.endswith("train[:-200] shuffled by 0")


def test_every_question_of_a_conversation_is_a_row_before_the_cut(tmp_path: Path) -> None:
    talk = dict(load_task("quac").example)
    for name in ("train", "validation"):
        put(tmp_path / "quac" / f"{name}.jsonl", [talk] * 150)
    rows = load_task_rows(load_task("quac"), "dev", tmp_path, no_hub)
    assert (len(rows.rows), rows.first) == (200, 100)
    assert [r["questions"] for r in rows.rows[:2]] == talk["questions"]
    assert rows.location(100).endswith("train.jsonl line 51 item 1")


def test_several_files_of_a_split_are_one_after_the_other(tmp_path: Path) -> None:
    cut = parts(tmp_path, "files: {train: [rows.jsonl, dev.jsonl]}\nsplits: {train: 'train[8:]'}\n")
    assert cut == {"train": [8, 9, 100, 101, 102, 103]}


def test_files_of_a_repository_are_asked_for_by_split() -> None:
    from datasets import Dataset

    asked: list[Any] = []

    def hub(*arguments: Any) -> HubRows:
        asked.append(arguments)
        return HubRows(Dataset.from_list([dict(load_task("wsc273").example)]), "c" * 40)

    task = load_task("wsc273")
    assert task.hub is not None
    load_task_rows(task, "test", None, hub)
    files = {"test": ["wsc273/winograd_wsc-test.parquet"]}
    assert asked == [("ErnestSDavis/winograd_wsc", None, task.hub.revision, "test", files)]
    with pytest.raises(DataError, match="no such split"):
        load_task_rows(task, "train", None, hub)
