"""Every page has an owner: a test that fails when the page lies. A page without one fails here."""

from __future__ import annotations

import ast

import pytest
from page_runner import DOCS, ROOT

FILES = "test_docs.py::test_files_that_a_page_points_to_exist"
"""Pages of figures: they are repeated by the command that the page names, and not by a test."""
HOW_TO = "test_tutorial_pages.py::test_a_how_to_runs_and_prints_what_it_says"
PYTHON = "test_tutorial_pages.py::test_the_python_of_an_explanation_prints_what_it_says"
NOTEBOOK = "test_notebooks.py::test_the_cells_of_a_notebook_run"
OWNERS = {
    "api.md": "test_api.py::test_the_page_of_the_api_is_made_from_the_docstrings",
    "architecture.md": "test_docs.py::test_the_tree_is_that_of_the_files",
    "benchmarks.md": "benchmarks/test_peers.py::test_the_command_writes_a_page_with_a_row_for_every_case",
    "building.md": "test_guide_pages.py::test_building_a_cache",
    "cache-format.md": "cache_builder/test_golden.py::test_the_worked_example_of_the_documents_is_the_file",
    "choosing.md": "test_guide_pages.py::test_choosing_what_to_keep",
    "cli.md": "test_cli.py::test_reference_equals_the_help_texts",
    "demo.md": FILES,
    "errors.md": "test_errors_page.py::test_the_page_prints_what_it_says",
    "evaluation.md": "test_guide_pages.py::test_evaluating_models",
    "experiments.md": "test_guide_pages.py::test_experiments_and_their_reports",
    "explanation/tails-and-temperatures.md": PYTHON,
    "explanation/uld-and-alignment.md": "test_tutorial_pages.py::test_the_groups_that_the_page_draws_are_those_of_the_alignment",
    "explanation/what-is-in-a-cache.md": PYTHON,
    "extending.md": "test_docs.py::test_the_task_file_in_the_documents_is_a_task",
    "footguns.md": "test_footguns_page.py::test_every_mistake_names_a_test_that_is_there_and_runs_by_default",
    "how-to/another-tokenizer.md": HOW_TO,
    "how-to/caches-from-elsewhere.md": "test_guide_pages.py::test_caches_from_elsewhere",
    "how-to/chat.md": "test_chat_page.py::test_the_commands_of_the_page_run_as_they_are_typed",
    "how-to/choose-k-and-profile.md": HOW_TO,
    "how-to/cluster.md": "recipes/test_cluster_files.py::test_every_option_of_kd_exists",
    "how-to/flan.md": "test_guide_pages.py::test_flan_and_its_ablations",
    "how-to/from-hugging-face-to-gguf.md": HOW_TO,
    "how-to/larger-than-one-device.md": "test_guide_pages.py::test_a_teacher_that_is_larger_than_one_device",
    "how-to/look-into-a-cache.md": "test_look_page.py::test_every_command_of_the_page_runs",
    "how-to/own-training-loop.md": HOW_TO,
    "how-to/reference-systems.md": "test_guide_pages.py::test_the_reference_systems",
    "how-to/served-teacher.md": "test_guide_pages.py::test_a_served_teacher",
    "how-to/several-gpus.md": HOW_TO,
    "log.md": FILES,
    "merging.md": "test_guide_pages.py::test_merging_classifiers",
    "migration.md": "test_migration_page.py::test_every_option_of_the_page_is_one_of_building_importing_or_training",
    "models.md": "test_models_page.py::test_the_page_has_a_line_per_row_and_the_words_of_the_script",
    "notebooks/look-at-a-cache.ipynb": NOTEBOOK,
    "notebooks/own-training-loop.ipynb": NOTEBOOK,
    "reliability.md": FILES,
    "results-merging.md": FILES,
    "results.md": FILES,
    "scale.md": "cache_builder/build/test_bill.py::test_the_page_has_the_table_of_today",
    "settings.md": "test_site.py::test_the_settings_page_is_made_from_the_classes",
    "sharing.md": "test_guide_pages.py::test_sharing_a_cache",
    "training.md": "test_guide_pages.py::test_training_a_student",
    "tutorial.md": "test_tutorial_pages.py::test_the_tutorial_runs_with_one_document_and_two_steps",
}
"""Page -> the test that owns it. The months of the log are what was measured then, and have none."""


def test_every_page_has_an_owner() -> None:
    pages = {path.relative_to(DOCS).as_posix() for kind in ("md", "ipynb") for path in DOCS.rglob(f"*.{kind}")}
    assert {page for page in pages if not page.startswith("log/")} == OWNERS.keys()


@pytest.mark.parametrize("page", OWNERS)
def test_an_owner_is_there(page: str) -> None:
    file, _, name = OWNERS[page].partition("::")
    text = (ROOT / "tests" / file).read_text(encoding="utf-8")
    assert name in {node.name for node in ast.parse(text).body if isinstance(node, ast.FunctionDef)}
