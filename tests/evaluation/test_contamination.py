"""What a model was trained on, found again among what it is asked."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner
from evaluating import evaluated, run_tasks

from kd.common.errors import DataError
from kd.data.corpus import Corpus
from kd.data.rows.example import Example
from kd.data.sources import load_corpus
from kd.evaluation.contamination import (
    SHINGLE,
    TrainingText,
    benchmark_text,
    cache_texts,
    openings,
    refuse_benchmark_text,
    shared_examples,
    shared_rows,
    source_place,
    trained_on,
    why_known,
)
from kd.evaluation.measures.hellaswag import Scene, Scenes

LONG = "a man sits on a roof and starts pulling up roofing on a roof while it rains"
PAIRS = tuple(Example(f"p/{i}", f"answer {i}", f"Question {i}?") for i in range(4))


def text_of(*examples: Example, spec: str = "mine", source: str = "", digest: str | None = "d") -> TrainingText:
    return TrainingText("run", spec, "train", source, digest, examples)


def corpus_of(*examples: Example, kind: str = "pairs") -> Corpus:
    return Corpus("asked", "test", kind, examples, {})


def scene(context: str) -> Scene:
    return Scene("s", "Fog", context, None, ("it stops there", "no"), 0)


@pytest.fixture
def trained(tmp_path: Path, student_dirs: list[Path], exact_cache: Path) -> Path:
    """A student's folder that says it was trained from the cache of the prose."""
    folder = tmp_path / "student"
    folder.mkdir()
    for file in student_dirs[0].iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    run = {
        "corpus": {"corpus": "prose.txt", "split": "train"},
        "settings": {"cache": str(exact_cache), "student": "gpt2"},
    }
    (folder / "run.json").write_text(json.dumps(run))
    return folder


def test_pairs_are_known_by_their_texts_whatever_case_and_white_space() -> None:
    known = text_of(PAIRS[0], Example("other", "ANSWER  2", "question 2?"), Example("q", "answer 3", "Another?"))
    assert shared_examples(corpus_of(*PAIRS), known) == 2
    assert shared_examples(corpus_of(*PAIRS), text_of()) == 0
    assert str(why_known([known], corpus_of(*PAIRS))).endswith("2 of 4 examples are among its text")
    assert why_known([text_of()], corpus_of(*PAIRS)) is None


def test_rows_of_a_task_are_known_by_their_place_in_any_wording_and_split_of_that_name() -> None:
    asked = corpus_of(Example("boolq/test/7", "True", "worded so"), Example("boolq/test/8", "True", "worded so too"))
    known = text_of(
        Example("boolq/dev/7", "False", "worded otherwise")
    )  # BoolQ's dev and test are its validation split
    assert shared_examples(asked, known) == 1
    assert shared_examples(asked, text_of(Example("boolq/train/7", "x", "y"))) == 0
    assert source_place("boolq/dev/7") == ("boolq", "validation", "7")
    assert source_place("pairs.jsonl:7") is None
    assert source_place("nothing/dev/7") is None


def test_documents_are_known_by_their_beginning_through_their_blocks(prose, exact_cache) -> None:
    (known,) = cache_texts(exact_cache)
    assert known.digest == prose.digest
    assert [o[:40] for o in openings(known.examples)] == [
        " ".join(e.target.split()).casefold()[:40] for e in prose.examples
    ]
    assert shared_examples(prose, known) == len(prose.examples)
    changed = corpus_of(*(Example(e.id, e.target + " More.") for e in prose.examples), kind="documents")
    assert shared_examples(changed, known) == 2  # the middle one is shorter than what a document is known by
    assert shared_examples(corpus_of(Example("z", "Else. " * 60), kind="documents"), known) == 0


def test_thirteen_words_in_a_row_make_a_row_known() -> None:
    words = LONG.split()
    scenes = Scenes(
        (scene(LONG), scene("something else happens in a very different place altogether, and then")), "local"
    )
    assert shared_rows(scenes, text_of(Example("1", f"Once {LONG.upper()}, they say."))) == 1
    assert shared_rows(scenes, text_of(Example("1", " ".join(words[1 : 1 + SHINGLE])))) == 1
    assert shared_rows(scenes, text_of(Example("1", " ".join(words[1:SHINGLE])))) == 0
    assert "1 of 2 rows share 13 words" in str(why_known([text_of(Example("1", LONG))], scenes))


@pytest.mark.parametrize(
    ("spec", "source", "known"),
    [
        ("Rowan/hellaswag", "", True),
        ("data.jsonl", '{"source": "friedrichor/ActivityNet_Captions"}', True),
        ("sentence-transformers/wikihow", "", True),
        ("wikitext-2", "Salesforce/wikitext", False),
        ("hello.txt", "", False),
    ],
)
def test_hellaswags_text_is_known_by_the_names_of_its_sources(spec, source, known) -> None:
    text = text_of(spec=spec, source=source)
    assert (benchmark_text(text) is not None) is known
    assert (why_known([text], Scenes((scene("x"),), "local")) is not None) is known


def test_a_model_that_no_run_made_was_trained_on_nothing_we_know(model_dir, trained, tmp_path) -> None:
    assert trained_on(str(model_dir)) == trained_on("random:gpt2") == []
    second = tmp_path / "second"
    second.mkdir()
    run = {
        "corpus": {"corpus": "gone.txt", "split": "train"},
        "settings": {"cache": str(tmp_path / "gone"), "student": str(trained)},
    }
    (second / "run.json").write_text(json.dumps(run))
    found = trained_on(str(second))  # through the run it began with
    assert found[0].spec == "gone.txt"
    assert found[0].digest is None
    assert found[1].digest is not None
    (trained / "run.json").write_text("{")
    assert trained_on(str(trained)) == []


def test_text_of_the_training_is_refused_before_weights_are_loaded_and_marked_where_allowed(
    trained, prose_file, exact_cache, tmp_path
) -> None:
    (weights := trained / "model.safetensors").rename(tmp_path / "aside")
    with pytest.raises(DataError, match="was trained on what it would be asked") as error:
        list(run_tasks(str(trained), ["perplexity"], data=str(prose_file), device="cpu"))
    assert "3 of 3 examples" in error.value.details["found"]
    assert "--allow-contaminated" in error.value.details["try"]
    (tmp_path / "aside").rename(weights)
    options = {"data": str(prose_file), "cache": exact_cache, "seq_len": 24, "device": "cpu"}
    report = evaluated(str(trained), ["perplexity", "agreement"], allow_contaminated=True, **options)
    assert "3 of 3 examples" in report.settings["perplexity"]["contaminated"]
    assert "contaminated" not in report.settings["agreement"]  # asked about the training text on purpose
    assert evaluated(str(trained), ["agreement"], cache=exact_cache, device="cpu") is not None
    clean = evaluated(
        str(trained), ["perplexity"], data="demo", split="heldout", limit=1, limit_tokens=20, device="cpu"
    )
    assert "contaminated" not in clean.settings["perplexity"]


def test_training_on_a_benchmarks_own_text_is_refused_and_marked_where_allowed(
    tmp_path, build_request, run_build, student_dirs
) -> None:
    from kd import cli

    (tmp_path / "hellaswag").mkdir()
    (tmp_path / "hellaswag" / "train.txt").write_text(f"{LONG}.\n<|endoftext|>\n{LONG} again.\n")
    cache = tmp_path / "cache"
    run_build(build_request(cache, text=tmp_path / "hellaswag" / "train.txt"))
    with pytest.raises(DataError, match="benchmark's own text"):
        refuse_benchmark_text(cache, allow=False)
    assert "hellaswag" in str(refuse_benchmark_text(cache, allow=True))
    command = [
        "train",
        "--cache",
        str(cache),
        "--student",
        str(student_dirs[0]),
        "--out",
        str(tmp_path / "run"),
        "--device",
        "cpu",
        "--max-steps",
        "1",
        "--json",
    ]
    refused = CliRunner().invoke(cli.cli, command)
    assert refused.exit_code == 1
    assert not (tmp_path / "run").exists()
    done = CliRunner().invoke(cli.cli, [*command, "--allow-contaminated"], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    assert "hellaswag" in json.loads(done.stdout)["contaminated"]


def test_a_corpus_and_its_cache_have_one_digest_whatever_their_order(prose_file, exact_cache) -> None:
    whole = load_corpus(str(prose_file))
    assert shared_examples(whole, text_of(digest=whole.digest)) == len(whole.examples)
    assert shared_examples(load_corpus(str(prose_file), limit=2), cache_texts(exact_cache)[0]) == 1


def test_a_pair_is_known_however_its_cache_has_split_it() -> None:
    """A cache stores a target as it was scored: without its end token, and from the first scored token on."""
    asked = (Example("a", "happy man", prompt="The un"), Example("b", "Four.<|im_end|>", prompt="Two plus two?"))
    stored = (Example("a", " man", prompt="The unhappy"), Example("b", "Four.", prompt="Two plus two?"))
    text = TrainingText("run", "x", "train", "", None, stored)
    assert shared_examples(Corpus("y", "train", "pairs", asked, {}), text) == 2
    other = (Example("c", "Five.<|im_end|>", prompt="Two plus two?"),)
    assert shared_examples(Corpus("y", "train", "pairs", other, {}), text) == 0
