"""A score is marked seen or unseen by FLAN's exclusions, and only where what was trained on is known."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reported import evaluation

from kd.data.corpus import Corpus
from kd.data.instruction_tasks.clusters import flan_clusters
from kd.data.rows.example import Example
from kd.evaluation.contamination import TrainingText
from kd.evaluation.eval_settings import EvalSettings
from kd.evaluation.evaluator import evaluate_model
from kd.evaluation.report.comparison import Entry, compare
from kd.evaluation.report.pairs import Arm
from kd.evaluation.report.reference import reference_of
from kd.evaluation.unseen_tasks import MARK, SEEN, UNSEEN, marked, seen_or_unseen

FLAN = flan_clusters()
DATA_SETS = st.lists(st.sampled_from(FLAN.datasets), min_size=1, max_size=5, unique=True)


def trained_text(tasks: str, spec: str = "flan:all", **source: str) -> TrainingText:
    return TrainingText("run", spec, "train", json.dumps({"tasks": tasks} | source), "d", ())


def asked(*tasks: str, **source: str) -> Corpus:
    return Corpus("asked", "test", "pairs", tuple(Example(f"{t}/test/0", "a", "b", t) for t in tasks), source)


@given(DATA_SETS, DATA_SETS)
@settings(deadline=None)
def test_marks_are_those_of_the_registry(trained: list[str], tasks: list[str]) -> None:
    found = seen_or_unseen([trained_text(", ".join(trained))], asked(*tasks))
    assert found == {task: UNSEEN if FLAN.unseen(task, trained) else SEEN for task in tasks}


def test_names_of_dumps_and_clusters_of_ones_own_files_count() -> None:
    dump = trained_text("super_glue/rte:1.0.2, bool_q:1.0.0", spec="dump.jsonl")
    assert seen_or_unseen([dump], asked("paws", "squad", "imdb")) == {"paws": SEEN, "squad": SEEN, "imdb": UNSEEN}
    mine = trained_text("mine", spec="mine.yaml", clusters=json.dumps({"mine": ["nli"]}))
    assert seen_or_unseen([mine], asked("paws", "imdb")) == {"paws": SEEN, "imdb": UNSEEN}
    own = asked("theirs", clusters=json.dumps({"theirs": ["paraphrase"]}))
    assert seen_or_unseen([mine], own) == {"theirs": SEEN}


def test_what_is_not_known_is_not_marked() -> None:
    known, unknown = trained_text("rte"), TrainingText("run", "rows.jsonl", "train", '{"source": "local"}', "d", ())
    gone = TrainingText("run", "flan:all", "train", "", None, ())
    assert seen_or_unseen([], asked("rte")) == {}
    assert seen_or_unseen([unknown], asked("rte")) == {}
    for other in (unknown, gone, trained_text("rte, some_task")):
        assert seen_or_unseen([known, other], asked("imdb", "paws")) == {"paws": SEEN}, "imdb may be in the other text"
    assert seen_or_unseen([known, trained_text("", spec="wikitext-2")], asked("imdb")) == {"imdb": UNSEEN}
    assert seen_or_unseen([known], asked("python_code", "somebodys")) == {}, "they have no cluster"


def test_figures_carry_the_mark_of_their_task_and_a_whole_only_one_that_all_share() -> None:
    figures = {name: {"value": 1.0} for name in ("accuracy", "accuracy/rte", "accuracy/imdb")}
    mixed = marked(figures, {"rte": SEEN, "imdb": UNSEEN})
    assert [mixed[n].get(MARK) for n in figures] == [None, SEEN, UNSEEN]
    same = marked(figures, {"rte": UNSEEN, "imdb": UNSEEN})
    assert [same[n].get(MARK) for n in figures] == [UNSEEN] * 3
    assert marked(figures, {"rte": UNSEEN})["accuracy"].get(MARK) is None, "of imdb it is not known"
    assert marked(figures, {}) == figures


def figure(value: float, title: str, mark: str | None) -> dict[str, Any]:
    about = {"n": 9, "over": "example", "unit": "share", "better": "higher", "title": title}
    return {"value": value, "stderr": 0.1, **about} | ({MARK: mark} if mark else {})


def test_tables_show_the_mark_of_each_student() -> None:
    def report(model: str, rte: str | None, imdb: str | None) -> Any:
        parts = {
            "accuracy/rte": figure(0.5, "accuracy: rte", rte),
            "accuracy/imdb": figure(0.75, "accuracy: imdb", imdb),
        }
        return evaluation(
            model,
            [0.0],
            1.0,
            tasks={"choices": {"accuracy": figure(0.6, "accuracy", None)} | parts},
            settings={"choices": {"text_digest": "d1"}},
            documents={},
        )

    reports = [report("student", SEEN, UNSEEN), report("teacher", None, None)]
    comparisons = compare([Entry(r.model, r) for r in reports])
    rows = comparisons[0].table().rows
    assert rows[0][-2:] == ["0.50 ± 0.10 (seen)", "0.75 ± 0.10 (unseen)"]
    assert not any("seen" in cell for cell in rows[1])
    arms = [Arm(r.model, {None: r.model}, 1, {}) for r in reports]
    shown = reference_of(comparisons, arms, []).table().rows
    assert shown[0][2:4] == ["0.50 ± 0.10 (seen)", "0.75 ± 0.10 (unseen)"]
    assert "seen" not in shown[0][4], "a mean over both"


def test_an_evaluation_marks_what_its_run_was_not_trained_on(
    tmp_path: Path, student_dirs: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from kd.data.instruction_tasks.task_files import load_task
    from kd.evaluation import evaluator

    for name in ("rte", "imdb"):
        (tmp_path / name).mkdir()
        rows = [json.dumps(load_task(name).example | {"number": n}) for n in range(2)]
        (tmp_path / name / "test.jsonl").write_text("\n".join(rows) + "\n")

    def trained(model: str, *, whole: bool = True) -> list[TrainingText]:
        assert not whole, "what the manifests say is enough"
        return [trained_text("mnli, boolq")]

    monkeypatch.setattr(evaluator, "trained_on", trained)
    monkeypatch.setattr(evaluator, "contaminated_tasks", lambda *_: {})
    from kd.common.settings import make

    chosen = {"tasks": "choices", "data": "flan:rte,imdb", "split": "test", "task_root": tmp_path, "template": 0}
    *_, last = evaluate_model(str(student_dirs[0]), make(EvalSettings, chosen))
    assert last.result is not None
    figures = last.result.tasks["choices"]
    assert [figures[f"accuracy/{name}"][MARK] for name in ("rte", "imdb")] == [SEEN, UNSEEN]
    assert MARK not in figures["accuracy"]
