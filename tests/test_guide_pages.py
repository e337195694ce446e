"""The guides run as they are written, in a folder where every model is tiny (`page_world`); their tables are those of the code.

What cannot run here is left out by name, with the reason: `run_page` fails where the page no longer has it.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import glue_fixtures
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from captures import save_capture
from chat_templates import CHATML
from numbered_rows import save_rows
from page_runner import DOCS, blocks, run_command, run_page, typed_commands
from page_world import SHORT_SOURCES, save_lines, save_world, smaller, without
from teacher_server import TeacherServer

import kd
from kd.cache_builder.exchange.npz_source import OPTIONAL, REQUIRED
from kd.data.instruction_tasks.clusters import flan_clusters
from kd.data.instruction_tasks.mixing.mixture_names import flan_tasks
from kd.data.named_sources import SOURCES
from kd.evaluation.tasks.task_registry import TASKS
from kd.recipes.experiment_file import experiment_names, load_experiment
from kd.recipes.recipe_file import recipe_names
from kd.student_trainer.losses.loss_registry import LOSSES
from kd.student_trainer.merging.method_registry import MERGE_METHODS

make_classifier = glue_fixtures.make_classifier
BUILT = (
    "kd cache build --teacher EleutherAI/gpt-neo-2.7B --data wikitext-2 --out runs/neo-wikitext",
    "kd cache build --teacher EleutherAI/gpt-neo-2.7B --data held-out.txt --out runs/other",
    "kd train --cache runs/neo-wikitext --student openai-community/gpt2 --out runs/gpt2-neo",
)
"""What other pages have made before a page begins."""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, tokenizer_dir: Path, t5_dir: Path) -> Path:
    """Models, texts, rows and runs under the names of the pages."""
    folder = save_world(tmp_path_factory.mktemp("world"), tokenizer_dir, t5_dir)
    with pytest.MonkeyPatch.context() as here:
        here.chdir(folder)
        for name, source in SHORT_SOURCES.items():
            here.setitem(SOURCES, name, source)
        for command in BUILT:
            run_command(command, "before", smaller)
    for copy in ("student", "pythia-uld", "ten/distilled"):
        shutil.copytree(folder / "runs" / "gpt2-neo", folder / "runs" / copy)
    return folder


@pytest.fixture
def place(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """`place("runs/cache=runs/neo-wikitext", …)`: the world's models and texts, and runs of it under other names."""

    for one, source in SHORT_SOURCES.items():
        monkeypatch.setitem(SOURCES, one, source)
    monkeypatch.chdir(tmp_path)

    def lay_out(*runs: str) -> Path:
        for entry in world.iterdir():
            if entry.name != "runs":
                (tmp_path / entry.name).symlink_to(entry)
        for name, _, source in (run.partition("=") for run in runs):
            shutil.copytree(world / (source or name), tmp_path / name)
        return tmp_path

    return lay_out


def text_of(page: str) -> str:
    return (DOCS / page).read_text(encoding="utf-8")


def first_cells(page: str, heading: str) -> list[str]:
    """The names in the first column of the table whose heading begins so."""
    lines = iter(text_of(page).splitlines())
    for line in lines:
        if line.startswith(f"| {heading}"):
            break
    next(lines)
    cells = []
    for line in lines:
        if not line.startswith("|"):
            break
        cells += re.findall(r"`([^`]+)`", line.split("|")[1])
    assert cells, (page, heading)
    return cells


def test_building_a_cache(place) -> None:
    folder = place("runs/one=runs/neo-wikitext", "runs/two=runs/other")
    printed = run_page(
        DOCS / "building.md",
        folder,
        small=smaller,
        left_out=["kd cache build --teacher … --data … --out s3://"],  # build/object_store/ has an S3 server
    )
    assert "sound" in next(text for command, text in printed.items() if "verify" in command)
    assert "gradient" in next(text for command, text in printed.items() if "fidelity" in command)


def test_training_a_student(place, hub) -> None:
    folder = place("runs/neo-wikitext", "runs/other", "runs/cache=runs/neo-wikitext")
    hub_cache(folder)

    def small(words: list[str]) -> list[str]:
        words = ["openai-community/gpt2" if word == "demo" and "--cache" in words else word for word in words]
        if words[1:3] == ["recipe", "run"]:  # recipes/test_recipe_runs.py runs them
            words = ["kd", "recipe", "show", words[3]]
        return smaller(words)

    run_page(DOCS / "training.md", folder, small=small)
    assert (folder / "runs" / "gpt2" / "model.safetensors").is_file()
    assert "NAME/gpt2-distilled" in hub.repositories
    assert set(first_cells("training.md", "loss |")) == LOSSES.keys()


def test_the_losses_that_the_page_gives_any_tokenizer_take_any(tmp_path: Path) -> None:
    rows = re.findall(r"^\| (`[\w`, -]+`) \| [^|]+ \| ([^|]+) \|$", text_of("training.md"), flags=re.MULTILINE)
    said = {name: needs for names, needs in rows for name in re.findall(r"`([^`]+)`", names)}
    for name, loss in LOSSES.items():
        assert ("any tokenizer" in said[name]) is (loss.any_tokenizer or name == "ce"), name


def hub_cache(folder: Path) -> None:
    """The cache of the world on the hub, where the pages say that one is."""
    with pytest.MonkeyPatch.context() as here:
        here.chdir(folder)
        run_command("kd cache push runs/neo-wikitext hf://datasets/OWNER/NAME --license mit", "before", smaller)


def test_evaluating_models(place, world: Path) -> None:
    runs = [f"runs/{name}" for name in ("neo-wikitext", "gpt2-neo", "student", "pythia-uld", "ten/distilled")]
    folder = place(*runs, "runs/qwen-student=Qwen/Qwen3-0.6B")
    (folder / "runs" / "qwen-student" / "chat_template.jinja").write_text(CHATML.source, encoding="utf-8")
    run_page(
        DOCS / "evaluation.md",
        folder,
        small=smaller,
        left_out=[
            "kd eval runs/gpt2-neo openai-community/gpt2 --tasks lm_eval:",  # measures/test_lm_harness.py runs the harness
            "kd report evals --out",  # of what that would have written
        ],
    )
    run_command("kd report runs/ten --table my.yaml --out own", "the table of the page", lambda words: words)
    cells = first_cells("evaluation.md", "task |")
    assert set(cells) == {*TASKS, "lm_eval:NAME"} - {"lm_eval"}


def planned(words: list[str]) -> list[str]:
    """Experiments and recipes are spelled out, and every step of them is checked: test_recipe_runs.py runs the recipes."""
    if words[1] == "experiment":
        return words if "--plan" in words else [*words, "--plan"]
    if words[1:3] == ["recipe", "run"]:
        return ["kd", "recipe", "show", *without(words[3:], "--out")]
    return smaller(words)


def test_experiments_and_their_reports(place) -> None:
    folder = place("runs/student", "runs/kl-prose=runs")

    def small(words: list[str]) -> list[str]:
        return planned([{"demo": "openai-community/gpt2"}.get(word, word) for word in words])

    printed = run_page(DOCS / "experiments.md", folder, small=small)
    steps = printed["kd experiment mine.yaml --set data=prose.txt --plan"].splitlines()
    assert sum(step.startswith("kd train") for step in steps) == 13, "the teacher, and four arms of three seeds"
    named = set(re.findall(r"`([a-z]+-[a-z-]+)`", text_of("experiments.md")))
    assert named & set(experiment_names()) >= {"kl-prose", "text-prose", "answers-mini", "uld-tasks", "demo-chat"}


def test_choosing_what_to_keep(place) -> None:
    printed = run_page(DOCS / "choosing.md", place(), small=planned)
    for name, begin in (("bytes-prose", "<!-- table -->"), ("tails-prose", "<!-- table tails-prose -->")):
        arms = load_experiment(name).arms
        table, _, after = text_of("choosing.md").partition(begin)[2].partition("<!-- end of table -->")
        form = r"^\| `([\w-]+)` \| ([\d.,]+) \| ([+-][\d.]+)?(?: ± ([\d.]+))?"
        rows = re.findall(form, table, flags=re.MULTILINE)
        assert {arm for arm, *_ in rows} == set(arms)
        steps = next(text for command, text in printed.items() if name in command)
        assert all(f"/{arm}-seed4" in steps for arm in arms)
        for mean, error in re.findall(r"([+-]?\d\.\d+) ± (\d\.\d+)", after.partition("\n## ")[0]):
            assert (mean if mean[0] in "+-" else f"+{mean}", error) in {row[2:] for row in rows}, (
                "words say the table's figures"
            )


def test_sharing_a_cache(place, hub) -> None:
    folder = place("runs/cache=runs/neo-wikitext")
    others = {"URL": "hf://datasets/OWNER/NAME", "demo": "Qwen/Qwen3-0.6B", "0:1000": "0:2"}
    others["HuggingFaceTB/SmolLM2-360M"] = "Qwen/Qwen3-8B"  # which has the tokenizer of the cache

    def small(words: list[str]) -> list[str]:
        words = [others.get(word, word) for word in words]
        return words if words[1] == "cache" else smaller(words)

    printed = run_page(DOCS / "sharing.md", folder, small=small)
    by_teacher, by_tokenizer = (text for command, text in printed.items() if "search" in command)
    assert ("OWNER/NAME" in by_teacher, "OWNER/NAME" in by_tokenizer) == (False, True)
    run_command("kd cache verify runs/copy", "the copy", lambda words: words)


def test_merging_classifiers(place, make_classifier) -> None:
    folder = place()
    for task in ("sst2", "cola"):
        for split, first in (("train", 0), ("dev", 100)):
            save_rows(folder / "glue-rows" / task / f"{split}.jsonl", glue_fixtures.made_up_rows(task, 12, first))
    (folder / "runs").mkdir()
    make_classifier(folder / "runs" / "cola", "cola", folder / "openai-community" / "gpt2", seed=1)

    def small(words: list[str]) -> list[str]:
        extra = ["--task-root", "glue-rows"]
        if words[1:3] == ["classify", "train"]:
            extra += ["--max-steps", "2", *(() if "--cache" in words else ("--max-length", "32"))]
        if "--cache" in words:
            extra = extra[2:]
        return [*without(words, "--task-root"), *extra]

    run_page(DOCS / "merging.md", folder, small=small)
    assert first_cells("merging.md", "method |") == list(MERGE_METHODS)
    assert (folder / "runs" / "ties" / "sweep.png").is_file()


def test_flan_and_its_ablations(place) -> None:
    folder = place()
    dump = folder / "itay1itzhak" / "flan_2022_350k"
    dump.mkdir(parents=True)
    row = {"prompt": "Is rye bread light?", "completion": "no", "task_name": "bool_q:1.0.0", "template_type": "zs_opt"}
    save_lines(dump / "train.jsonl", (row | {"prompt": f"{n} {row['prompt']}"} for n in range(3)))

    def small(words: list[str]) -> list[str]:
        if words[1] == "experiment":
            return planned(words)
        flan = any(word.startswith("flan:") for word in words)
        words = smaller(words)
        return [*without(words, "--task-root"), "--task-root", "my/flan", "--skip-missing"] if flan else words

    printed = run_page(DOCS / "how-to" / "flan.md", folder, small=small)
    text, registry = text_of("how-to/flan.md"), flan_clusters()
    assert f"is {len(registry.datasets)} data sets in {len(registry.clusters)} clusters" in text
    assert f"The list has {len(flan_tasks())} tasks" in text
    assert "(unseen)" in (folder / "runs" / "report" / "report.md").read_text(encoding="utf-8")
    ablations = first_cells("how-to/flan.md", "experiment |")
    assert [name for name in ablations if name.startswith("flan-")] == ablations
    assert set(ablations) == {name for name in experiment_names() if name.startswith("flan-")}
    assert len(printed) == len(typed_commands(DOCS / "how-to" / "flan.md"))


def test_a_served_teacher(place) -> None:
    folder = place()
    server = TeacherServer(folder / "Qwen" / "Qwen3-8B")
    server.names = ["Qwen/Qwen3-8B"]

    def small(words: list[str]) -> list[str]:
        return smaller([f"{server.url}/v1" if word.startswith("http://localhost") else word for word in words])

    left_out = [
        "kd cache build --backend vllm"
    ]  # vLLM pins another torch: served/test_real_vllm.py runs it where it is
    try:
        printed = run_page(DOCS / "how-to" / "served-teacher.md", folder, small=small, left_out=left_out)
    finally:
        server.close()
    assert server.questions
    about = run_command("kd cache info runs/qwen", "the cache", lambda words: words)
    assert re.search(r"^ +temperatures +1$", about, flags=re.MULTILINE)
    assert len(printed) == 2
    build = next(command for command in typed_commands(DOCS / "how-to" / "served-teacher.md"))
    assert "--teacher-url" in build


def test_a_teacher_that_is_larger_than_one_device(place, world: Path) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, teacher = place(), "meta-llama/Llama-3.1-8B"
    (folder / "offloaded").mkdir()
    model = AutoModelForCausalLM.from_pretrained(world / teacher)
    get_peft_model(model, LoraConfig(target_modules=["q_proj"])).save_pretrained(folder / "my" / "lora")
    names = {
        "kd": kd,
        "name": str(world / teacher),
        "AutoModelForCausalLM": AutoModelForCausalLM,
        "tokenizer": AutoTokenizer.from_pretrained(world / teacher),
        "texts": ["The fox went down to the river."],
    }
    left_out = [
        'kd.build_cache(name, data="wikitext-2", out="runs/llama", device_map="auto", max_memory={0:',  # needs a GPU
        'cache = kd.build_cache(name, data="wikitext-2", out="runs/llama", tensor_parallel=4',  # needs torchrun
    ]
    run_page(DOCS / "how-to" / "larger-than-one-device.md", folder, small=smaller, names=names, left_out=left_out)


def test_caches_from_elsewhere(place, world: Path) -> None:
    folder, teacher = place("runs/cache=runs/neo-wikitext"), str(world / "Qwen" / "Qwen3-8B")
    made = iter(range(9))

    def small(words: list[str]) -> list[str]:
        words = [f"{word}-{next(made)}" if word == "runs/imported" and "import" in words else word for word in words]
        words = [{"runs/imported": "runs/imported-0"}.get(word, word) for word in words]
        unlike_text = (
            ["--no-check-source"] if "import" in words else []
        )  # random weights name the token before the next one
        return [*smaller(words), *unlike_text]

    save_capture(folder / "capture", folder / "runs" / "cache")
    tokenizer = kd.load_teacher(teacher)[1]
    input_ids = torch.tensor([0, *tokenizer("The fox went down to the river.")["input_ids"]])
    with torch.no_grad():
        logits = kd.load_teacher(teacher)[0](input_ids[None]).logits[0]
    names = {"numpy": np, "logits": logits, "input_ids": input_ids}
    page = DOCS / "how-to" / "caches-from-elsewhere.md"
    (code,) = [block.text for block in blocks(page.read_text(encoding="utf-8")) if block.language == "python"]
    exec(compile(code, page.name, "exec"), names)  # the first command reads the file that it writes
    run_command("kd cache export parquet runs/cache --out rows", "before", lambda words: words)
    rows = [row for file in sorted(folder.glob("rows/*.parquet")) for row in pq.read_table(file).to_pylist()]
    save_lines(folder / "answers.jsonl", rows)
    run_page(page, folder, small=small, names=names)
    columns = set(first_cells("how-to/caches-from-elsewhere.md", "array |"))
    assert columns == {*REQUIRED, *OPTIONAL}


@pytest.mark.parametrize("name", ["another-tokenizer", "from-hugging-face-to-gguf", "choose-k-and-profile"])
def test_a_how_to_runs_with_few_steps(name: str, place) -> None:
    """What it prints is compared by the slow test of test_tutorial_pages.py."""
    run_page(DOCS / "how-to" / f"{name}.md", place(), small=smaller, compare=False)


def test_the_reference_systems(place) -> None:
    run_page(DOCS / "how-to" / "reference-systems.md", place(), small=planned)
    text = text_of("how-to/reference-systems.md")
    assert set(recipe_names()) <= set(re.findall(r"`([\w-]+)`", text))
