"""Our task files hold what they promise; a faulty one names the file, the key and what was expected."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

import kd.data.instruction_tasks.instructions
from kd.common.errors import DataError
from kd.common.strangers.braces import template_fields
from kd.data.instruction_tasks.clusters import flan_clusters
from kd.data.instruction_tasks.task import ANSWER, MAX_INVERTED, TaskFile
from kd.data.instruction_tasks.task_files import MINI, load_task, parse_task, task_names

GOOD = {
    "fields": {"passage": "text"},
    "labels": {"column": "label", "original": {0: "bad", 1: "good"}},
    "example": {"text": "Fine.", "label": 1},
    "templates": [
        {"prompt": "{passage}\n\nVerdict:"},
        {"prompt": "Write a {answer} text.", "target": "{passage}", "inverted": True},
    ],
}


def parse(**changes: object) -> TaskFile:
    return parse_task(yaml.safe_dump(GOOD | changes), "mine", "mine.yaml")


REFERENCE = (
    *("anli_r1", "anli_r2", "anli_r3", "boolq", "common_gen", "coqa", "cosmos_qa"),
    *("eng_spa", "paws", "python_code", "samsum", "squad", "xsum"),
)
"""The tasks of the reference systems; their rows, parts and words are theirs."""
UNPINNED = {"yelp": "bbf1c97", "dpr": "0fdf659", "aeslc": "2305f2e", "wiki_lingua": "ea3db35"}
"""Tasks whose commit is known by a short name alone, which pins nothing."""
BY_HAND = {
    *("story_cloze", "newsroom", "opinion_abstracts_idebate", "opinion_abstracts_rotten_tomatoes", "para_crawl_enes"),
    *("quac", "gigaword", "multi_news", "fix_punctuation", "true_case", "word_segment"),
}
"""Tasks whose rows are given by agreement or by a script alone."""


def test_every_data_set_of_flan_is_a_task_and_two_tasks_are_none_of_them() -> None:
    registry = flan_clusters()
    assert {load_task(name).flan for name in task_names()} - {None} == set(registry.datasets)
    assert [name for name in task_names() if load_task(name).flan is None] == ["eng_spa", "python_code"]
    assert set(REFERENCE) < set(task_names())
    assert len(task_names()) == 71


def test_a_tasks_file_lies_in_the_folder_of_its_first_cluster() -> None:
    root = Path(kd.data.instruction_tasks.instructions.__path__[0])
    for file in root.rglob("*.yaml"):
        clusters = ("mini",) if file.stem.startswith(MINI) else load_task(file.stem).clusters
        assert file.parent.name == (clusters[0] if clusters else "other"), file


@pytest.mark.parametrize("name", task_names())
def test_every_task_has_ten_templates_of_its_own_and_at_most_three_inverted(name: str) -> None:
    task = load_task(name)
    plain = [t for t in task.templates if not t.inverted]
    assert len(task.templates) >= 10
    assert len(task.templates) - len(plain) <= MAX_INVERTED
    assert len({(t.prompt, t.target) for t in task.templates}) == len(task.templates)
    assert not task.templates[0].inverted, "evaluation takes the first"
    assert all(t.target == "{answer}" for t in plain)
    assert not any("option" in t.prompt.lower() for t in task.templates), "the suffix lists them"


@pytest.mark.parametrize("name", task_names())
def test_every_plain_template_of_a_task_uses_the_same_inputs(name: str) -> None:
    task = load_task(name)
    uses = {frozenset(template_fields(t.prompt, name)) - {ANSWER} for t in task.templates if not t.inverted}
    optional = {"title"}
    assert len({u - optional for u in uses}) == 1


@pytest.mark.parametrize("name", task_names())
def test_every_task_says_where_its_rows_are_and_how_it_is_scored(name: str) -> None:
    task = load_task(name)
    assert task.about
    assert task.metrics
    assert set(task.splits) == ({"test"} if name == "wsc273" else {"train", "dev", "test"})
    assert task.hub is not None or task.url
    assert set(task.columns) <= set(task.example)
    assert task.cap == (10_000 if name in REFERENCE else 30_000)


@pytest.mark.parametrize("name", [n for n in task_names() if load_task(n).flan is not None])
def test_a_task_of_flan_says_how_many_rows_it_has_under_which_licence_and_how_sure_that_is(name: str) -> None:
    task = load_task(name)
    parts = (task.flan_splits or task.splits).values()
    assert task.licence
    assert task.sure in {"A", "B", "C"}
    known = {part.name for part in parts} & set(task.rows)
    assert known, "the rows of a split that the task reads are known"
    assert {part.name for part in parts} - known <= {"test"}
    assert (task.hub is None and not task.files) == (name in BY_HAND)


@pytest.mark.parametrize("name", [n for n in task_names() if load_task(n).labels is not None])
def test_fixed_labels_have_a_second_wording(name: str) -> None:
    labels = load_task(name).labels
    assert labels is not None
    own, flan = (dict(labels.words[wording]) for wording in ("original", "flan"))
    same = {"stsb", "cola", "sst2", "yelp", "sentiment140"}  # their own words are FLAN's
    assert (own == flan) == (name in same)


@pytest.mark.parametrize("name", [n for n in task_names() if n not in REFERENCE])
def test_a_task_beyond_those_of_the_reference_systems_has_exactly_ten_templates(name: str) -> None:
    assert len(load_task(name).templates) == 10


def test_the_facts_of_the_reference_systems() -> None:
    assert {n: dict(load_task(n).max_chars) for n in task_names() if load_task(n).max_chars} == {
        "boolq": {"passage": 2000},
        "squad": {"context": 2000},
        "samsum": {"dialogue": 1200},
        "xsum": {"document": 2800},
        "python_code": {"output": 1500},
        "coqa": {"story": 1600},
        "eng_spa": {"english": 149},
    }
    labels = {n: task.labels.words for n in ("anli_r1", "boolq", "paws") if (task := load_task(n)).labels}
    assert labels["anli_r1"]["original"] == (("0", "entailment"), ("1", "neutral"), ("2", "contradiction"))
    assert labels["anli_r1"]["flan"] == (("0", "Yes"), ("1", "It's impossible to say"), ("2", "No"))
    assert labels["boolq"]["original"] == (("true", "True"), ("false", "False"))
    assert labels["boolq"]["flan"] == (("false", "no"), ("true", "yes"))
    assert labels["paws"]["original"] == (("0", "No"), ("1", "Yes"))
    assert str(load_task("anli_r3").splits["test"]) == "test_r3"
    assert str(load_task("python_code").splits["dev"]) == "train[90%:]"
    assert load_task("cosmos_qa").hub is None  # a script on the hub, and no export


@pytest.mark.parametrize("name", task_names())
def test_rows_come_from_one_commit_except_where_the_file_says_why_not(name: str) -> None:
    task = load_task(name)
    if task.hub is None:
        assert all(re.search("/[0-9a-f]{40}/", a) for addresses in task.files.values() for a in addresses)
    elif name == "sentiment140":
        assert task.hub.revision == "refs/convert/parquet"
    else:
        assert re.fullmatch("[0-9a-f]{40}", task.hub.revision or "") or name in UNPINNED


def test_a_file_may_extend_one_of_ours(tmp_path: Path) -> None:
    path = tmp_path / "dialogsum.yaml"
    path.write_text("extends: samsum\nabout: talks\nfiles: {train: train.jsonl}\n")
    task, base = load_task(str(path)), load_task("samsum")
    assert (task.name, task.about, task.files) == ("dialogsum", "talks", {"train": ("train.jsonl",)})
    assert (task.templates, task.fields, task.max_chars) == (base.templates, base.fields, base.max_chars)
    chain = parse_task("extends: anli_r2\nabout: more\n", "more", "more.yaml")
    assert (chain.templates, chain.splits) == (load_task("anli_r1").templates, load_task("anli_r2").splits)


@pytest.mark.parametrize(
    ("changes", "words", "detail"),
    [
        ({"templates": [{"prompt": "{pasage}"}]}, "unknown field in a template", "passage"),
        ({"templates": [{"prompt": "{passage"}]}, "stray brace", "mine.yaml templates[0]"),
        ({"templates": [{"prompt": "{passage.x}"}]}, "plain field names", "{passage.x}"),
        ({"templates": [{"prompt": "{passage!r}"}]}, "plain field names", "mine.yaml"),
        ({"templates": [{"prompt": "x", "target": "{passage}"}]}, "does not fit its kind", "inverted: true"),
        ({"templates": [{"prompt": "x", "inverted": True}]}, "does not fit its kind", "no {answer}"),
        ({"templates": [{"prompt": "x {answer}"}]}, "contains the answer", "templates[0]"),
        ({"templates": [{"prompt": "x", "target": "y", "inverted": True}]}, "always the same", "y"),
        ({"templates": [*GOOD["templates"][:1], *GOOD["templates"][1:] * 4]}, "too many inverted", "4 of 5"),
        ({"templates": GOOD["templates"][1:]}, "too many inverted", "1 of 1"),
        ({"templates": []}, "wrong type", "templates"),
        ({"templates": [{"promt": "x"}]}, "unknown key", "prompt"),
        ({"templates": ["x"]}, "a mapping is missing", "templates[0]"),
        ({"template": []}, "unknown key", "templates"),
        ({"clusters": ["nil"]}, "unknown cluster", "nli"),
        ({"clusters": "nli"}, "wrong type", "a list of strings"),
        ({"flan": "boolq"}, "lacks a cluster", "reading_comprehension"),
        ({"flan": "bool_q"}, "unknown FLAN data set", "boolq"),
        ({"labels": None}, "one kind of answer", "none"),
        ({"references": "text"}, "one kind of answer", "labels, references"),
        ({"labels": {"column": "label", "original": {0: "bad"}}}, "labels are a mapping", "words in quotes"),
        ({"labels": {"column": "label", "original": {0: False, 1: True}}}, "labels are a mapping", "words in quotes"),
        (
            {"labels": {"column": "label", "original": {0: "a", 1: "b"}, "flan": {0: "a", 2: "b"}}},
            "different labels",
            "0, 2",
        ),
        ({"labels": {"original": {0: "a", 1: "b"}}}, "wrong type", "column"),
        ({"labels": None, "choices": {"columns": [], "label": "x"}}, "wrong type", "columns"),
        ({"fields": {"answer": "x", "passage": "text"}}, "cannot be called answer", "another name"),
        ({"fields": {"passage": {"column": "text", "drop": "["}}}, "not a regular expression", "passage"),
        ({"fields": {"passage": {"column": "text", "wrap": "x"}}}, "must contain {} once", "one {}"),
        ({"fields": {"passage": {"column": "text", "group": "x"}}}, "only references are grouped", "passage"),
        ({"fields": {"passage": {"columm": "text"}}}, "unknown key", "column"),
        ({"fields": {"passage": 3}}, "a mapping is missing", "fields.passage"),
        ({"splits": {"training": "train"}}, "unknown split", "train"),
        ({"splits": {"train": "train[:x]"}}, "not a split", "train[:90%]"),
        ({"max_chars": {"text": "long"}}, "wrong type", "max_chars"),
        ({"cap": 0}, "wrong type", "cap"),
        ({"hub": {"id": "a/b", "rev": "main"}}, "unknown key", "revision"),
        ({"hub": {"id": "/etc"}}, "not the id", "OWNER/NAME"),
        ({"hub": {"id": "../mine"}}, "not the id", "OWNER/NAME"),
        ({"templates": [{"prompt": "{passage.__class__}"}]}, "plain field names", "templates[0]"),
        ({"templates": [{"prompt": "{passage:>9999999999}"}]}, "plain field names", "templates[0]"),
        ({"fields": {"passage": {"column": "text", "drop": "(x{999}){999}"}}}, "too large", "passage"),
        ({"splits": {"train": f"train[:{'9' * 5000}]"}}, "not a split", "train[:90%]"),
        ({"extends": "boolqq"}, "unknown task to extend", "boolq"),
    ],
)
def test_a_faulty_file_is_one_clear_error(changes: dict[str, object], words: str, detail: str) -> None:
    with pytest.raises(DataError, match=words) as caught:
        parse(**changes)
    assert "mine.yaml" in str(caught.value) or "unknown FLAN" in str(caught.value)
    assert detail in str(caught.value)


def test_what_is_not_yaml_or_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot read the task file"):
        parse_task("a: [", "mine", "mine.yaml")
    with pytest.raises(DataError, match="is not a mapping"):
        parse_task("", "mine", "mine.yaml")
    with pytest.raises(DataError, match="no such task file"):
        load_task(str(tmp_path / "none.yaml"))
    with pytest.raises(DataError, match="unknown task") as caught:
        load_task("bool_q")
    assert caught.value.details["did you mean"] == "boolq"
