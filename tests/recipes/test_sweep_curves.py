"""FLAN's ablations end to end: on the small world, and by the same files on rows of FLAN's own tasks."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from terminal import kd

from kd.data.instruction_tasks.mixing.mixture_names import select
from kd.data.instruction_tasks.task_files import load_task
from kd.evaluation.report.comparison import compare
from kd.evaluation.report.runs import collect_runs
from kd.recipes.sweep_curves import MEAN, cluster_columns

pytestmark = pytest.mark.slow
SMALL = (
    "--seeds",
    "0",
    "--set",
    "rows=3",
    "--set",
    "eval-rows=2",
    "--set",
    "steps=1",
    "--set",
    "student=random:demo-student-s",
)


def section(text: str, heading: str) -> str:
    return re.split(r"^## ", text.split(f"## {heading}", 1)[1], flags=re.MULTILINE)[0]


@pytest.fixture(scope="module")
def by_options(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`flan-options` on the small world: two caches, two students, two evaluations of each."""
    out = tmp_path_factory.mktemp("sweep") / "options"
    kd("experiment", "flan-options", "--out", out, *SMALL)
    return out


def test_a_sweep_compares_arms_of_different_caches_in_every_evaluation(by_options: Path) -> None:
    document = json.loads((by_options / "report" / "report.json").read_text())
    (pair,) = document["reference"]["pairs"]
    assert (pair["baseline"], pair["other"]) == ("options", "no-options")
    columns = [d["column"] for d in pair["differences"]]
    assert sum("mini_rte" in c for c in columns) == 2
    assert sum("no options" in c for c in columns) * 2 >= len(columns) - 1
    caches = [
        json.loads((by_options / f"cache-{arm}" / "manifest.json").read_text()) for arm in ("options", "no-options")
    ]
    assert len({cache["fingerprint"] for cache in caches}) == 2


def test_the_report_begins_with_a_table_by_cluster_for_each_evaluation_and_a_picture(by_options: Path) -> None:
    text = (by_options / "report" / "report.md").read_text()
    headings = re.findall(r"^## (.*)", text, re.MULTILINE)
    assert sum(h.startswith("Sweep, accuracy") for h in headings) == 2
    assert headings[2] == "Sweep"
    assert (by_options / "report" / "sweep.png").stat().st_size > 10_000
    table = section(text, "Sweep, accuracy")
    for column in ("nli", "closed book qa", "commonsense", MEAN, "best template"):
        assert column in table
    assert "(unseen)" in text


def test_the_mean_over_clusters_gives_each_cluster_the_same_weight(by_options: Path) -> None:
    _, entries = collect_runs([by_options / "options-seed0"])
    comparison = compare(entries)[0]
    *clusters, mean, _ = cluster_columns(comparison, "accuracy")
    tasks = {c.title: [comparison.figure(entries[0], m)["value"] for _, m in c.parts] for c in clusters}
    assert {title: len(values) for title, values in tasks.items()} == {"nli": 2, "closed book qa": 2, "commonsense": 2}
    of_clusters = [sum(values) / len(values) for values in tasks.values()]
    assert mean.value("options-seed0") == pytest.approx(sum(of_clusters) / 3)


def test_the_same_file_runs_on_rows_of_flans_own_tasks(tmp_path: Path) -> None:
    """Rows of the true shape stand in for four tasks; those without rows are passed over and named."""
    for name in ("aeslc", "sst2", "rte", "copa"):
        task = load_task(name)
        (tmp_path / "rows" / name).mkdir(parents=True)
        for split in ("train", "dev", "test"):
            rows = [dict(task.example) | ({"sentence": f"a fine film {n}"} if name == "sst2" else {}) for n in range(4)]
            (tmp_path / "rows" / name / f"{split}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    out = tmp_path / "out"
    settings = ("--set", "world=flan", "--set", f"task-root={tmp_path / 'rows'}", "--set", "skip-missing=true")
    kd("experiment", "flan-templates", "--out", out, *SMALL, *settings, "--set", "seq-len=128")
    manifest = json.loads((out / "cache-4-templates" / "manifest.json").read_text())
    assert manifest["provenance"]["source"]["tasks"].split(", ") == ["sst2", "aeslc"]
    assert "squad" in manifest["provenance"]["source"]["missing tasks"]
    table = section((out / "report" / "report.md").read_text(), "Sweep, accuracy")
    assert "commonsense" in table
    assert "nli" in table
    assert "10-templates" in table
    assert set(select("clusters=nli,commonsense").tasks) > {"rte", "copa"}
