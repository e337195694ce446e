"""Arms, pairs and the reference table: what may be compared, with which error, and who is marked."""

from __future__ import annotations

import csv
import json
import math

import numpy as np
import pytest

from kd.common.errors import DataError
from kd.evaluation.report.columns import Column
from kd.evaluation.report.comparison import Entry, compare
from kd.evaluation.report.pairs import arms_of, pairs_of
from kd.evaluation.report.reference import Reference, reference_of
from kd.evaluation.report.writing import write_report
from kd.evaluation.results import EvalReport

SETTINGS = {
    "student": "tiny",
    "tokenizer": None,
    "revision": None,
    "lr": 1e-3,
    "max_steps": 9,
    "out": "x",
    "cache": "/c",
}


def facts(loss: str, seed: int, name: str = "", **changes) -> dict:
    settings = {**SETTINGS, "loss": loss, "seed": seed, "alpha": None if loss == "ce" else 1.0, **changes}
    return {
        "name": name or f"{loss}-seed{seed}",
        "loss": loss,
        "settings": settings,
        "cache_fingerprint": "f",
        "complete": True,
    }


def chosen(values: dict[str, list[int]], *, kept: bool = True, parameters: int = 7) -> EvalReport:
    """A report of `choices` from right (1) and wrong (0) answers by task."""
    tasks = list(values)
    hits = np.concatenate([np.array(values[t], dtype=float) for t in tasks])
    names = np.concatenate([[t] * len(values[t]) for t in tasks])

    def figure(inside: np.ndarray, title: str) -> tuple[dict, list[float]]:
        n, mean = inside.sum(), hits[inside].mean()
        u = np.where(inside, (hits - mean) / n, 0.0)
        scale = math.sqrt(n / (n - 1) * (len(hits) - 1) / len(hits))
        error = math.sqrt(n / (n - 1) * (u**2).sum())
        about = {
            "value": mean,
            "stderr": error,
            "n": int(n),
            "over": "example",
            "unit": "share of examples",
            "better": "higher",
            "title": title,
        }
        return about, (u * scale).tolist()

    found = {"accuracy": figure(np.full(len(hits), True), "accuracy")}
    found |= {f"accuracy/{t}": figure(names == t, f"accuracy: {t}") for t in tasks}
    documents = {"digest": "same", "count": len(hits)} | (
        {"influence": {m: u for m, (_, u) in found.items()}} if kept else {}
    )
    return EvalReport(
        model="m",
        parameters=parameters,
        identity={},
        tokenizer="t",
        tasks={"choices": {m: f for m, (f, _) in found.items()}},
        settings={"choices": {"text_digest": "d", "choices_digest": "c"}},
        data={"spec": "s", "split": "dev"},
        cache=None,
        versions={},
        documents={"choices": documents},
    )


RIGHT, HALF, FEW = [1, 1, 1, 1, 1, 1, 0, 1], [1, 0, 1, 0, 1, 0, 1, 0], [0, 0, 1, 0, 0, 0, 0, 0]


def reference(*entries: Entry, baseline: str | None = None) -> Reference:
    arms = arms_of(entries)
    return reference_of(compare(entries), arms, pairs_of(arms, baseline))


def seeds_of(loss: str, *answers: dict[str, list[int]], **changes) -> list[Entry]:
    return [Entry(f"{loss}-seed{s}", chosen(a), facts(loss, s, **changes)) for s, a in enumerate(answers)]


def test_students_that_differ_in_the_seed_alone_are_one_arm():
    entries = [
        *seeds_of("ce", {"a": HALF, "b": HALF}, {"a": HALF, "b": HALF}),
        *seeds_of("kl", {"a": RIGHT, "b": HALF}),
    ]
    arms = arms_of([Entry("teacher", chosen({"a": RIGHT, "b": RIGHT})), *entries])
    assert [(a.name, list(a.models)) for a in arms] == [("teacher", [None]), ("ce", [0, 1]), ("kl", [0])]
    assert [(p.baseline.name, p.other.name, p.seeds) for p in pairs_of(arms)] == [("ce", "kl", [0])]


def test_another_cache_another_student_or_other_seeds_make_no_pair():
    base = seeds_of("ce", {"a": HALF})
    for other in (
        [Entry("kl-seed0", chosen({"a": HALF}), {**facts("kl", 0), "cache_fingerprint": "g"})],
        seeds_of("kl", {"a": HALF}, student="other"),
        [Entry("kl-seed1", chosen({"a": HALF}), facts("kl", 1))],
    ):
        assert pairs_of(arms_of([*base, *other])) == []


def test_caches_of_the_same_rows_make_a_pair_and_the_difference_is_said():
    ours = {"cache_fingerprint": "f", "rows_digest": "r"}
    base = [Entry("ce-seed0", chosen({"a": HALF}), {**facts("ce", 0), **ours})]
    for rows, pairs in (("r", 1), ("s", 0)):
        told = {**facts("kl", 0, cache="/c/cache-k4"), "cache_fingerprint": "g", "rows_digest": rows}
        found = pairs_of(arms_of([*base, Entry("kl-seed0", chosen({"a": HALF}), told)]))
        assert len(found) == pairs
        assert not found or found[0].differs == {"cache": ("c", "cache-k4")}


def test_a_baseline_that_is_named_may_have_read_other_rows():
    told = {**facts("kl", 0, cache="/c/answers"), "cache_fingerprint": "g", "rows_digest": "s"}
    arms = arms_of([*seeds_of("ce", {"a": HALF}), Entry("kl-seed0", chosen({"a": HALF}), told)])
    assert pairs_of(arms) == []
    (pair,) = pairs_of(arms, ["ce"])
    assert (pair.baseline.name, pair.other.name, pair.differs) == ("ce", "kl", {"cache": ("c", "answers")})


def test_what_differs_beside_the_loss_is_said():
    found = reference(*seeds_of("ce", {"a": HALF, "b": HALF}), *seeds_of("kl", {"a": RIGHT, "b": HALF}, lr=3e-3))
    (pair,) = found.pairs
    assert pair.differs == {"lr": (1e-3, 3e-3)}
    assert "lr 0.001 and 0.003" in found.pair_note(pair)


def test_a_distilled_arm_is_compared_with_the_baseline_most_like_it():
    told = (facts("ce", 0, "slow", lr=1.0), facts("ce", 0, "like"), facts("kl", 0, "kl"))
    entries = [Entry(t["name"], chosen({"a": HALF}), t) for t in told]
    assert [p.baseline.name for p in pairs_of(arms_of(entries))] == ["like"]
    assert [p.other.name for p in pairs_of(arms_of(entries), "slow")] == ["like", "kl"]
    with pytest.raises(DataError, match="unknown baseline"):
        pairs_of(arms_of(entries), "lik")


def test_errors_are_those_of_a_loop_over_documents_and_seeds():
    answers = {
        "ce": [{"a": HALF, "b": FEW}, {"a": FEW, "b": HALF}, {"a": RIGHT, "b": FEW}],
        "kl": [{"a": RIGHT, "b": HALF}, {"a": HALF, "b": HALF}, {"a": RIGHT, "b": RIGHT}],
    }
    found = reference(*seeds_of("ce", *answers["ce"]), *seeds_of("kl", *answers["kl"]))
    (pair,) = found.pairs
    for d in found.differences(pair):
        tasks = [d.column.title.partition(": ")[2]] if len(d.column.parts) == 1 else ["a", "b"]
        by_seed, variance = [], 0.0
        for task in tasks:
            per_document = [
                np.mean([k[task][i] - c[task][i] for c, k in zip(answers["ce"], answers["kl"], strict=True)])
                for i in range(8)
            ]
            variance += np.var(per_document, ddof=1) / 8 / len(tasks) ** 2  # tasks have documents of their own
        for c, k in zip(answers["ce"], answers["kl"], strict=True):
            by_seed.append(np.mean([np.mean(k[t]) - np.mean(c[t]) for t in tasks]))
        assert d.by_seed == pytest.approx(by_seed, abs=1e-12)
        # influences are scaled for the standard error over all documents, so only float64's rounding is left
        assert d.document_error == pytest.approx(math.sqrt(variance), rel=1e-9)
        assert d.test.stderr == pytest.approx(np.std(by_seed, ddof=1) / math.sqrt(3), rel=1e-9)
        assert d.document_error is not None
        assert d.test.stderr is not None
        assert d.error == pytest.approx(math.hypot(d.document_error, d.test.stderr))


def test_two_metrics_of_the_same_answers_are_not_taken_for_independent():
    """The mean of a column and itself has the column's own error, not one smaller by the root of two."""
    (arm,) = arms_of([entry := Entry("x", chosen({"a": HALF, "b": FEW}))])
    (comparison,) = compare([entry])
    found = Reference((arm,), (), ())
    once = found.figure(arm, Column("a", ((comparison, "accuracy/a"),)))
    twice = found.figure(arm, Column("aa", ((comparison, "accuracy/a"),) * 2))
    apart = found.figure(arm, Column("ab", ((comparison, "accuracy/a"), (comparison, "accuracy/b"))))
    assert twice.error == pytest.approx(once.error, rel=1e-12)
    other = found.figure(arm, Column("b", ((comparison, "accuracy/b"),)))
    assert once.error is not None
    assert other.error is not None
    assert apart.error == pytest.approx(math.hypot(once.error, other.error) / 2, rel=1e-12)


def test_without_influences_an_arms_error_is_never_smaller_than_with_them():
    answers = [{"a": HALF, "b": FEW}, {"a": RIGHT, "b": HALF}]
    known, unknown = (
        reference(*(Entry(f"ce-seed{s}", chosen(a, kept=kept), facts("ce", s)) for s, a in enumerate(answers)))
        for kept in (True, False)
    )
    for a, b in zip(known.columns, unknown.columns, strict=True):
        assert unknown.figure(unknown.arms[0], b).document_error > known.figure(known.arms[0], a).document_error


def test_a_student_is_marked_only_beyond_the_corrected_interval_and_a_baseline_only_when_it_beats_all():
    other = [0, 1, 0, 0, 0, 0, 0, 0]  # one right of eight, as FEW, on other questions
    answers = {"ce": {"a": HALF, "b": RIGHT, "c": FEW}, "kl": {"a": RIGHT, "b": FEW, "c": other}}
    many = {loss: {task: right * 6 for task, right in tasks.items()} for loss, tasks in answers.items()}
    ce, kl = (seeds_of(loss, many[loss]) for loss in ("ce", "kl"))
    found = reference(*ce, *kl)
    marked = {c.title: found.best(c) for c in found.columns}
    assert marked["accuracy: a"] == {"kl"}
    assert marked["accuracy: b"] == {"ce"}
    assert marked["accuracy: c"] == set()
    assert {k: n for k, n in found.wins(found.pairs[0]).items() if n} == {"better": 1, "worse": 1, "within error": 1}
    third = seeds_of("uld", {"a": FEW * 6, "b": RIGHT * 6, "c": FEW * 6})
    assert reference(*ce, *kl, *third).best(found.columns[1]) == set()  # it does not beat uld
    few = reference(
        *seeds_of("ce", answers["ce"]), *seeds_of("kl", answers["kl"])
    )  # the same shares of eight questions
    leaning = {k: n for k, n in few.wins(few.pairs[0]).items() if n}
    assert leaning == {"leans better": 1, "worse": 1, "within error": 1}
    assert few.best(few.columns[0]) == set()


def test_verdicts_are_corrected_over_every_cell_of_the_table():
    """A difference of two errors is real alone, and only leans among twenty that are nothing."""
    rng = np.random.default_rng(0)
    answers = {f"t{n}": rng.integers(0, 2, 40).tolist() for n in range(20)}
    better = {**answers, "t0": [1] * 6 + answers["t0"][6:]}
    alone = reference(*seeds_of("ce", {"t0": answers["t0"]}), *seeds_of("kl", {"t0": better["t0"]}))
    among = reference(*seeds_of("ce", answers), *seeds_of("kl", better))
    one, same = (next(d for d in r.differences(r.pairs[0]) if len(d.column.parts) == 1) for r in (alone, among))
    assert one.p == pytest.approx(same.p)
    assert same.p is not None
    cells = sum(d.p is not None for d in among.differences(among.pairs[0]))
    assert same.corrected_p == pytest.approx(min(1.0, cells * same.p))


def test_the_interval_and_p_say_the_same_of_a_cell():
    found = reference(
        *seeds_of("ce", {"a": HALF * 3}, {"a": FEW * 3}), *seeds_of("kl", {"a": RIGHT * 3}, {"a": HALF * 3})
    )
    for d in found.differences(found.pairs[0]):
        assert d.test.n - 1 <= d.freedom <= d.test.n - 1 + 23
        assert d.interval is not None
        assert d.p is not None
        low, high = d.interval
        assert (low > 0 or high < 0) == (d.p < 0.05)


def test_one_document_marks_nothing_and_is_counted_apart():
    report = chosen({"a": HALF, "b": FEW})
    for metric in report.tasks["choices"].values():
        metric["stderr"] = None
    report.documents["choices"].pop("influence")
    found = reference(Entry("ce-seed0", report, facts("ce", 0)), Entry("kl-seed0", report, facts("kl", 0)))
    assert found.wins(found.pairs[0])["no error known"] == 2
    assert all(found.best(c) == set() for c in found.columns)


def test_the_mean_is_over_shares_and_counts_hellaswag_once():
    report = chosen({"a": HALF, "b": RIGHT})
    share = report.tasks["choices"]["accuracy/a"]
    tasks = {
        **report.tasks,
        "perplexity": {
            "perplexity": {**share, "value": 40.0, "better": "lower", "title": "perplexity", "over": "token"}
        },
    }
    documents = {**report.documents, "perplexity": {}}
    settings = {**report.settings, "perplexity": {"text_digest": "d"}}
    entries = []
    for protocol, value in (("nanogpt", 0.2), ("harness", 0.3)):
        metric = f"acc_norm_{protocol}"
        entries.append(
            Entry(
                "m",
                EvalReport(
                    **{
                        **report.__dict__,
                        "tasks": {"hellaswag": {metric: {**share, "value": value, "title": metric}}},
                        "documents": {},
                        "settings": {
                            "hellaswag": {"protocol": protocol, "protocol_digest": protocol, "source": "rows"}
                        },
                    }
                ),
            )
        )
    whole = EvalReport(**{**report.__dict__, "tasks": tasks, "settings": settings, "documents": documents})
    found = reference(Entry("m", whole), *entries)
    titles = [c.title for c in found.columns]
    assert titles == ["perplexity", "accuracy: a", "accuracy: b", "acc_norm_nanogpt", "acc_norm_harness", "mean of 3"]
    for column in found.columns[:-1]:
        assert len({c.entries[0].report.settings[c.task].get("protocol") for c, _ in column.parts}) == 1
    assert found.columns[-1].value("m") == pytest.approx((0.5 + 0.875 + 0.3) / 3)


def test_answers_have_the_metric_of_their_task():
    report = chosen({"qa": HALF, "sum": RIGHT, "other": FEW})
    figures = report.tasks["choices"]
    figure = figures["accuracy"]
    tasks = {"exact_match": figure, "rougeL": figure, "squad_f1": figure}
    tasks |= {f"exact_match/{t}": {**figure, "title": f"exact match: {t}"} for t in ("qa", "sum", "other")}
    tasks |= {"rougeL/sum": {**figure, "title": "ROUGE-L: sum"}, "squad_f1/qa": {**figure, "title": "SQuAD F1: qa"}}
    whole = EvalReport(
        **{
            **report.__dict__,
            "tasks": {"generation": tasks},
            "settings": {"generation": {"text_digest": "d"}},
            "documents": {},
        }
    )
    titles = [c.title for c in reference(Entry("m", whole)).columns]
    assert set(titles) == {"exact match: other", "ROUGE-L: sum", "SQuAD F1: qa", "mean of 3"}


def test_a_task_may_have_several_metrics_of_which_the_first_counts():
    report = chosen({"sum": RIGHT, "gen": HALF})
    figure = report.tasks["choices"]["accuracy"]
    metrics = ("rouge1", "rougeL", "rougeLsum", "bertscore")
    tasks = {f"{m}/sum": {**figure, "title": f"{m}: sum"} for m in metrics}
    tasks |= {f"{m}/gen": {**figure, "title": f"{m}: gen"} for m in ("rouge1", "coverage", "exact_match")}
    settings = {"generation": {"text_digest": "d"}}
    whole = EvalReport(**{**report.__dict__, "tasks": {"generation": tasks}, "settings": settings, "documents": {}})
    columns = reference(Entry("m", whole)).columns
    assert {c.title: c.counts for c in columns[:-1]} == {
        "rougeL: sum": True,
        "bertscore: sum": False,
        "coverage: gen": True,
        "rouge1: gen": False,
    }
    assert columns[-1].title == "mean of 2"


@pytest.mark.parametrize("same_text", [True, False])
def test_questions_that_were_answered_by_rank_and_in_words_count_once(same_text: bool):
    report = chosen({"nli": HALF, "qa": RIGHT})
    figures = report.tasks["choices"]
    answers = {
        f"{m}/{t}": {**figures["accuracy"], "value": 0.1, "title": f"{m}: {t}"}
        for m, t in (("exact_match", "nli"), ("exact_match", "qa"), ("rougeL", "sum"))
    }
    settings = {**report.settings, "generation": {"text_digest": "d" if same_text else "other"}}
    tasks = {**report.tasks, "generation": answers}
    whole = EvalReport(**{**report.__dict__, "tasks": tasks, "settings": settings, "documents": {}})
    *columns, mean = reference(Entry("m", whole)).columns
    counted = {c.title for c in columns if c.counts}
    assert {"accuracy: nli", "accuracy: qa", "rougeL: sum"} <= counted
    assert len(columns) == 5
    assert len(counted) == (3 if same_text else 5)
    assert mean.value("m") == pytest.approx(np.mean([0.5, 0.875, 0.1] if same_text else [0.5, 0.875, 0.1, 0.1, 0.1]))


def save(folder, entry: Entry):
    """A run with its evaluation on disk."""
    entry.report.save(folder / "eval")
    if entry.facts:
        (folder / "run.json").write_text(json.dumps(entry.facts))
        lines = [json.dumps({"step": s, "loss": 3 - s / 9, "ce": 3 - s / 9, "tokens": 10 * s}) for s in range(1, 9)]
        (folder / "metrics.jsonl").write_text("".join(f"{line}\n" for line in lines))
    return folder


def test_the_report_holds_reference_pairs_and_gains(tmp_path):
    entries = [*seeds_of("ce", *[{"a": HALF, "b": FEW}] * 3), *seeds_of("kl", *[{"a": RIGHT, "b": FEW}] * 3)]
    folders = [save(tmp_path / e.name, e) for e in entries]
    files = write_report(folders, tmp_path / "report", baseline="ce")
    assert files.deltas_png is not None
    markdown = files.markdown.read_text("utf-8")
    assert "| ce (3 seeds) | 7 |" in markdown
    assert "Of 2 tasks, kl is better than ce in 0 and worse in 0." in markdown
    assert "It leans to better in 1, to worse in 0, and is within the error in 1." in markdown
    assert "The mean of 2 differs by +0.19 ± 0.13 (95 %: " in markdown
    page = files.page.read_text("utf-8")
    assert page.count("<h2>kl against ce</h2>") == 1
    (pair,) = json.loads(files.json.read_text("utf-8"))["reference"]["pairs"]
    assert [(d["column"], d["seeds_better"]) for d in pair["differences"]] == [
        ("accuracy: a", 3),
        ("accuracy: b", 0),
        ("mean of 2", 3),
    ]
    assert pair["differences"][0]["p_permutation"] == 0.25
    rows = {row["model"]: row for row in csv.DictReader(files.reference_csv.read_text("utf-8").splitlines())}
    assert float(rows["kl"]["accuracy: a"]) == pytest.approx(0.875)
    again = write_report(folders, tmp_path / "again", baseline="ce")
    assert again.deltas_png.read_bytes() == files.deltas_png.read_bytes()


def test_an_evaluation_elsewhere_knows_the_training_of_its_model(tmp_path):
    folders = []
    for entry in (*seeds_of("ce", {"a": HALF, "b": FEW}), *seeds_of("kl", {"a": RIGHT, "b": FEW})):
        run = save(tmp_path / "runs" / entry.name, entry)
        EvalReport(**{**entry.report.__dict__, "model": str(run)}).save(tmp_path / "evals" / entry.name)
        folders.append(tmp_path / "evals" / entry.name)
    files = write_report(folders, tmp_path / "report")
    assert files.deltas_png is not None
    assert files.loss_png is None
