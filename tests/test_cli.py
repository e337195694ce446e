"""The command line as scripts and people see it: documentation, exit codes, JSON, messages."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import subprocess
import sys
from dataclasses import make_dataclass
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner
from terminal import run_main as kd

from kd.cli import cli

ROOT = Path(__file__).parents[1]
PLAN = ("cache", "plan", "--teacher", "demo", "--data", "demo", "--limit", "1", "--out", "NOWHERE")


def kd_process(*arguments: object, code: int = 0) -> subprocess.CompletedProcess[str]:
    """Run `kd` in a process of its own: one build, and one of each exit code."""
    command = [sys.executable, "-m", "kd.cli", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == code, f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


def leaves(command: click.Command = cli, path: tuple[str, ...] = ()) -> list[tuple[tuple[str, ...], click.Command]]:
    if isinstance(command, click.Group):
        return [leaf for name, sub in command.commands.items() for leaf in leaves(sub, (*path, name))]
    return [(path, command)]


def test_reference_equals_the_help_texts() -> None:
    # in a process of its own: a command that a test called alone keeps the help option of that call
    script = "import runpy, sys; sys.stdout.write(runpy.run_path(sys.argv[1])['render']())"
    words = [sys.executable, "-c", script, str(ROOT / "scripts" / "write_cli_docs.py")]
    rendered = subprocess.run(words, capture_output=True, text=True, check=True).stdout
    assert (ROOT / "docs" / "cli.md").read_text(encoding="utf-8") == rendered, "run scripts/write_cli_docs.py"


@pytest.mark.parametrize(("path", "command"), leaves(), ids=lambda v: " ".join(v) if isinstance(v, tuple) else "")
def test_every_command_and_option_is_documented(path: tuple[str, ...], command: click.Command) -> None:
    text = command.help or ""
    assert re.match(r"[A-Z][a-z]+ ", text), "help begins with a verb"
    assert f"Example: kd {' '.join(path)}" in text
    for parameter in command.params:
        if isinstance(parameter, click.Option):
            described = parameter.help or parameter.name in ("teacher", "spec", "cache")
            assert described, f"{' '.join(path)} {parameter.opts}"


@pytest.mark.parametrize(
    ("module", "registry", "command", "option"),
    [
        ("kd.student_trainer.losses.loss_registry", "LOSSES", "train", "loss"),
        ("kd.student_trainer.losses.loss_registry", "TAILS", "train", "tail"),
        ("kd.student_trainer.configuration.step_settings", "OPTIMIZERS", "train", "optimizer"),
        ("kd.student_trainer.configuration.step_settings", "SCHEDULES", "train", "schedule"),
        ("kd.cache_builder.store.targets", "PROFILES", "cache build", "profile"),
        ("kd.cache_builder.store.encoding.codecs", "CODECS", "cache build", "logprob_codec"),
        ("kd.models.model_request", "DTYPES", "cache build", "dtype"),
        ("kd.data.data_settings", "TEMPLATE_CHOICES", "cache build", "template"),
        ("kd.data.instruction_tasks.task", "WORDINGS", "cache build", "labels"),
        ("kd.evaluation.tasks.task_registry", "TASKS", "eval", "tasks"),
    ],
)
def test_help_names_every_entry_of_the_registry(module: str, registry: str, command: str, option: str) -> None:
    known = getattr(importlib.import_module(module), registry)
    parameters = {p.name: p for p in {" ".join(p): c for p, c in leaves()}[command].params}
    parameter = parameters[option]
    text = " ".join([parameter.help or "", *getattr(parameter.type, "choices", ())])
    for name in known:
        assert re.search(rf"\b{re.escape(name)}\b", text), f"--{option} does not mention {name}"


def test_data_ls_is_json() -> None:
    listed = json.loads(kd("data", "ls", "--json").stdout)
    assert {"demo", "wikitext-2", "flan:four", "flan:ten", "flan:boolq", "flan:all-but=CLUSTER"} <= set(listed)


def test_data_show_prints_size_and_digest(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("One document.\n<|endoftext|>\nAnother document.\n", encoding="utf-8")
    shown = json.loads(kd("data", "show", tmp_path / "a.txt", "--json", "--limit", 1).stdout)
    assert shown["examples"] == 2
    assert [e["target"] for e in shown["shown"]] == ["One document."]


def test_data_templates_shows_every_template_offline() -> None:
    shown = json.loads(kd("data", "templates", "anli_r1", "--labels", "flan", "--json").stdout)
    assert len(shown["templates"]) == 11
    assert shown["templates"][0]["shown"]["choices"] == ["Yes", "It's impossible to say", "No"]
    assert shown["hub"]["id"] == "facebook/anli"
    text = kd("data", "templates", "squad").stdout
    assert "[10] inverted" in text
    assert "=> a ferry" in text


@pytest.fixture
def task_root(tmp_path: Path) -> Path:
    """Made-up rows of two tasks under DIR/TASK/SPLIT.jsonl."""
    from kd.data.instruction_tasks.task_files import load_task

    for name in ("boolq", "xsum"):
        (tmp_path / "root" / name).mkdir(parents=True)
        row = json.dumps(dict(load_task(name).example)) + "\n"
        (tmp_path / "root" / name / "train.jsonl").write_text(row * 4, encoding="utf-8")
    return tmp_path / "root"


def test_task_options_reach_show_plan_and_eval(task_root: Path, tmp_path: Path) -> None:
    options = ("--task-root", task_root, "--template", "0", "--no-options", "--labels", "flan", "--max-per-task", "2")
    shown = json.loads(kd("data", "show", "flan:boolq,xsum", *options, "--limit", 4, "--json").stdout)
    assert shown["examples"] == 4
    assert shown["source"]["labels"] == "flan"
    assert {e["target"] for e in shown["shown"] if e["task"] == "boolq"} == {"no"}
    assert not any("OPTIONS" in e["prompt"] for e in shown["shown"])
    plan = json.loads(
        kd(
            "cache",
            "plan",
            "--teacher",
            "demo",
            "--data",
            "flan:boolq,xsum",
            *options,
            "--out",
            tmp_path / "c",
            "--json",
        ).stdout
    )
    other = json.loads(
        kd(
            "cache",
            "plan",
            "--teacher",
            "demo",
            "--data",
            "flan:boolq,xsum",
            *options,
            "--data-seed",
            "5",
            "--out",
            tmp_path / "c",
            "--json",
        ).stdout
    )
    assert plan["rows"] == other["rows"]
    assert plan["fingerprint"] != other["fingerprint"], "another order is another corpus"
    scores = json.loads(kd("eval", "demo", "--tasks", "perplexity", "--data", "flan:boolq", *options, "--json").stdout)
    assert scores[0]["data"]["source"]["template"] == "0"


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A small cache of the embedded teacher, made by the command itself."""
    out = tmp_path_factory.mktemp("cli") / "cache"
    done = kd_process(
        "cache", "build", "--teacher", "demo", "--data", "demo", "--limit", 2, "--seq-len", 64, "--out", out, "--json"
    )
    return out, json.loads(done.stdout)


def test_build_prints_the_promised_keys(built: tuple[Path, dict[str, Any]]) -> None:
    promised = {
        "fingerprint",
        "complete",
        "examples",
        "rows",
        "bytes",
        "bytes_per_token",
        "top_k",
        "temperatures",
        "profile",
        "teacher",
        "mass_kept_mean",
        "head_kl_mean",
    }
    assert promised <= set(built[1])
    assert built[1]["complete"] is True
    assert 0.5 < built[1]["mass_kept_mean"] <= 1.0


def test_info_agrees_with_build(built: tuple[Path, dict[str, Any]]) -> None:
    info = json.loads(kd("cache", "info", built[0], "--json").stdout)
    assert {k: info[k] for k in ("fingerprint", "rows", "bytes")} == {
        k: built[1][k] for k in ("fingerprint", "rows", "bytes")
    }


def test_plan_predicts_the_rows_and_the_fingerprint_and_writes_nothing(
    built: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    out = tmp_path / "c"
    plan = json.loads(
        kd(
            "cache",
            "plan",
            "--teacher",
            "demo",
            "--data",
            "demo",
            "--limit",
            2,
            "--seq-len",
            64,
            "--out",
            out,
            "--json",
        ).stdout
    )
    assert (plan["rows"], plan["fingerprint"]) == (built[1]["rows"], built[1]["fingerprint"])
    assert built[1]["bytes"] <= plan["bytes_at_most"] * 1.2  # small caches: metadata weighs
    assert not out.exists()


def test_same_build_again_says_complete(built: tuple[Path, dict[str, Any]]) -> None:
    again = kd(
        "cache", "build", "--teacher", "demo", "--data", "demo", "--limit", 2, "--seq-len", 64, "--out", built[0]
    )
    assert "complete (nothing left to do here)" in again.stdout


def test_prompts_are_enough_for_a_teacher_that_answers(tmp_path: Path) -> None:
    (tmp_path / "q.jsonl").write_text('{"question": "The file"}\n{"question": "Return"}\n')
    words = (
        "--teacher",
        "demo",
        "--data",
        tmp_path / "q.jsonl",
        "--columns",
        "prompt=question",
        "--seq-len",
        64,
        "--target-len",
        8,
        "--targets",
        "teacher",
    )
    out = ("--out", tmp_path / "c")
    before = json.loads(kd("cache", "plan", *words, *out, "--json").stdout)
    assert (before["targets_known"], before["fingerprint"], before["rows_at_most"]) == (False, None, 2 * 8)
    text = kd("cache", "plan", *words, *out).stdout
    assert "at most (the teacher has not answered yet: this is an upper bound)" in text
    assert re.search(r"^  targets known +no$", text, flags=re.MULTILINE)
    assert "target length: 8 tokens per answer" in text
    assert re.search(r"^  rows at most +16$", text, flags=re.MULTILINE)
    assert not (tmp_path / "c").exists()
    built = json.loads(kd("cache", "build", *words, "--out", tmp_path / "c", "--json").stdout)
    assert (built["complete"], built["examples"]) == (True, 2)
    after = json.loads(kd("cache", "plan", *words, *out, "--json").stdout)
    assert (after["targets_known"], after["fingerprint"]) == (True, built["fingerprint"])
    assert after["rows"] == built["rows"] <= before["rows_at_most"]
    again = json.loads(kd("cache", "build", *words, "--out", tmp_path / "c", "--json").stdout)
    assert (again["reused"], again["fingerprint"]) == (True, built["fingerprint"])
    assert "columns are missing" in kd("cache", "build", *words[:-2], "--out", tmp_path / "d", code=1).stderr


def test_other_settings_are_refused_with_the_difference(built: tuple[Path, dict[str, Any]]) -> None:
    done = kd(
        "cache",
        "build",
        "--teacher",
        "demo",
        "--data",
        "demo",
        "--limit",
        2,
        "--seq-len",
        64,
        "--top-k",
        5,
        "--out",
        built[0],
        code=1,
    )
    assert "targets.top_k" in done.stderr
    assert "asked for 5, the cache has 64" in done.stderr


def test_damage_is_exit_code_3_and_names_the_place(built: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(built[0], copy)
    file = copy / "targets.zarr" / "logprobs" / "c.0.0"
    data = bytearray(file.read_bytes())
    data[len(data) // 3] ^= 4
    file.write_bytes(bytes(data))
    assert json.loads(kd("cache", "verify", built[0], "--json").stdout)["sound"] is True
    findings = json.loads(kd_process("cache", "verify", copy, "--json", code=3).stdout)["findings"]
    assert [(f["shard"], f["array"]) for f in findings] == [(0, "logprobs")]


def test_a_second_copy_that_is_not_one_is_refused(built: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    assert "not a cache" in kd_process("cache", "repair", built[0], "--from", tmp_path / "nowhere", code=1).stderr
    other = tmp_path / "other"
    kd("cache", "slice", built[0], "--top-k", 8, "--out", other)
    assert "another cache" in kd("cache", "repair", built[0], "--from", other, code=1).stderr


def test_what_is_there_of_an_unfinished_cache_is_checked_and_the_rest_named(tmp_path: Path) -> None:
    out = tmp_path / "half"
    kd(
        "cache",
        "build",
        "--teacher",
        "demo",
        "--data",
        "demo:heldout",
        "--limit",
        3,
        "--shard-rows",
        4096,
        "--shard",
        "1/2",
        "--no-reuse",
        "--out",
        out,
    )
    done = kd("cache", "verify", out, code=1)
    assert "sound" in done.stdout
    assert re.search(r"not complete\n +where .*\n +found +\d of \d shards", done.stderr)
    found = json.loads(kd("cache", "verify", out, "--json", code=1).stdout)
    assert (found["sound"], found["complete"]) == (True, False)


def test_info_of_a_cache_with_a_missing_file_names_it(built: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(built[0], copy)
    (copy / "targets.zarr" / "token_ids" / "c.0.0").unlink()
    stderr = kd("cache", "info", copy, code=3).stderr
    assert "token_ids/c.0.0" in stderr
    assert "Traceback" not in stderr


def test_an_encoder_decoder_teacher_over_documents_is_refused(t5_dir: Path, tmp_path: Path) -> None:
    stderr = kd("cache", "plan", "--teacher", t5_dir, "--data", "demo", "--out", tmp_path / "c", code=1).stderr
    assert "needs a prompt for its encoder" in stderr
    assert "Traceback" not in stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("cache", "info", "NOWHERE"), "not a cache"),
        (("data", "show", "wikitext2"), "did you mean"),
        (("data", "show", "no/such/file.txt"), "no such file"),
        (("data", "show", "no/such/task.yaml"), "no such file"),
        (("data", "show", "flan:foru"), "did you mean"),
        (("data", "show", "flan:all-but=nil"), "did you mean"),
        (("data", "show", "flan:boolq", "--template", "99", "--task-root", "NOWHERE"), "0..10"),
        (("data", "show", "flan:xsum", "--options"), "no task has choices"),
        (("data", "show", "flan:cosmos_qa"), "--task-root"),
        (("data", "show", "demo", "--labels", "flan"), "no templates"),
        (("data", "templates", "bool_q"), "did you mean"),
        (("cache", "plan", "--teacher", "random:gpt-5", "--data", "demo", "--out", "NOWHERE"), "known"),
        ((*PLAN, "--top-k", "5000"), "at most 2048"),
        ((*PLAN, "--seq-len", "999"), "at most 256"),
        (("train", "--cache", "NOWHERE", "--student", "demo", "--out", "RUN"), "not a cache"),
        (("eval", "demo", "--tasks", "perplexity"), "--data"),
        (("report", "NOWHERE", "--out", "REPORT"), "NOWHERE"),
        (
            (
                "cache",
                "build",
                "--teacher",
                "demo",
                "--data",
                "demo",
                "--limit",
                "1",
                "--out",
                "NOWHERE",
                "--device",
                "gpu",
            ),
            "knows no such device",
        ),
        (("cache", "plan", "--teacher", "./nosuch", "--data", "demo", "--out", "NOWHERE"), "no folder of this name"),
    ],
)
def test_wrong_input_is_one_clear_error(arguments: tuple[str, ...], words: str, tmp_path: Path) -> None:
    places = [str(tmp_path / a) if a.isupper() else a for a in arguments]
    done = kd(*places, code=1)
    assert words in done.stderr
    assert "Traceback" not in done.stderr
    assert not any(tmp_path.iterdir()), "nothing half-written"


def test_wrong_usage_is_exit_code_2() -> None:
    assert "--shard" in kd_process("cache", "build", "--shard", "x", code=2).stderr
    assert "did you mean 'graded'?" in kd(*PLAN, "--logprob-codec", "grad", code=2).stderr
    assert "did you mean 'round-robin'?" in kd("data", "show", "demo", "--template", "round", code=2).stderr
    train = ("train", "--cache", "NOWHERE", "--student", "demo", "--out", "RUN")
    assert "did you mean 'adamw'?" in kd(*train, "--optimizer", "adam", code=2).stderr
    assert "torchrun" in kd(*train, "--device", "cuda:1", code=2).stderr


def test_train_eval_and_report_end_to_end(built: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    (tmp_path / "held.txt").write_text(
        "The module provides functions that return the name of the file.\n" * 5, encoding="utf-8"
    )
    run = tmp_path / "run"
    trained = json.loads(
        kd(
            "train",
            "--cache",
            built[0],
            "--student",
            "demo",
            "--out",
            run,
            "--max-steps",
            3,
            "--tokens-per-batch",
            512,
            "--log-every",
            1,
            "--eval-data",
            tmp_path / "held.txt",
            "--json",
        ).stdout
    )
    assert trained["cache_fingerprint"] == built[1]["fingerprint"]
    assert trained["perplexity_after"] < trained["perplexity_before"]
    assert built[1]["fingerprint"] in (run / "README.md").read_text(encoding="utf-8")
    scores = json.loads(
        kd(
            "eval",
            run,
            "--tasks",
            "perplexity,agreement",
            "--data",
            tmp_path / "held.txt",
            "--cache",
            built[0],
            "--out",
            run / "eval",
            "--json",
        ).stdout
    )
    assert scores[0]["tasks"]["perplexity"]["perplexity"]["value"] == pytest.approx(
        trained["perplexity_after"], rel=1e-6
    )
    assert "kl_kept" in scores[0]["tasks"]["agreement"]
    report = json.loads(kd("report", run, "--out", tmp_path / "report", "--json").stdout)
    assert Path(report["loss_png"]).read_bytes().startswith(b"\x89PNG")


def test_held_out_scores_before_and_after_are_of_one_model_and_one_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    from click.testing import CliRunner

    from kd.commands import train as module
    from kd.student_trainer.batches.trained_reading import TrainedReading

    asked: list[tuple[str, dict[str, Any]]] = []
    monkeypatch.setattr(module, "held_out_perplexity", lambda model, **options: asked.append((model, options)) or 9.0)
    finished = make_dataclass("Finished", [("out", str)])("o")
    monkeypatch.setattr(module, "run_training", lambda config, resume, midway: finished)
    monkeypatch.setattr("kd.evaluation.contamination.refuse_benchmark_text", lambda cache, allow: None)
    monkeypatch.setattr("kd.evaluation.midway_scores.plan_scores", lambda *rest, **options: None)
    monkeypatch.setattr("kd.student_trainer.model_card.write_card", lambda out, scores: None)
    monkeypatch.setattr(
        "kd.student_trainer.prepare.reading_before_training", lambda config: TrainedReading(bos=False, separator=" => ")
    )
    CliRunner().invoke(
        cli,
        [
            "train",
            "--cache",
            "c",
            "--student",
            "owner/s",
            "--out",
            "o",
            "--revision",
            "v1",
            "--device",
            "cpu",
            "--seed",
            "3",
            "--eval-data",
            "demo",
            "--eval-split",
            "heldout",
        ],
        catch_exceptions=False,
    )
    # that the text is none of the cache's was checked before the first step
    alike = {"data": "demo", "split": "heldout", "device": "cpu", "dtype": "float32", "allow_contaminated": True}
    alike |= {"bos": False, "separator": " => ", "control_tokens": "auto"}  # as in training
    alike |= {"chat_template": None, "template_kwargs": None, "system": None}
    assert asked == [("owner/s", alike | {"revision": "v1", "tokenizer": None, "seed": 3}), ("o", alike)]


def test_a_mixture_and_a_fingerprint_stand_for_a_cache_in_kd_train(tmp_path: Path, build_request, run_build, model_dir):
    from kd.cache_builder.upkeep.cache_registry import remember

    for name, seq_len in (("a", 32), ("b", 32)):
        run_build(build_request(tmp_path / name, seq_len=seq_len, top_k=8))
    remember(tmp_path / "a")
    fingerprint = json.loads((tmp_path / "a" / "manifest.json").read_text())["fingerprint"]
    common = ["--student", str(model_dir), "--max-steps", "1", "--batch-size", "2", "--device", "cpu", "--json"]
    caches = {
        "mixed": [f"--cache={tmp_path / 'a'}=0.7", f"--cache={tmp_path / 'b'}=0.3"],
        "named": ["--cache", fingerprint[:12]],
        "url": ["--cache", f"file://{tmp_path / 'a'}"],
    }
    for name, words in caches.items():
        done = CliRunner().invoke(
            cli, ["train", *words, *common, "--out", str(tmp_path / name)], catch_exceptions=False
        )
        assert done.exit_code == 0, done.output
        found = json.loads(done.stdout)["cache_fingerprint"]
        assert (found == fingerprint) == (name != "mixed")
    words = [f"--cache={tmp_path / 'a'}=0.7", f"--cache={tmp_path / 'b'}"]
    done = CliRunner().invoke(cli, ["train", *words, *common, "--out", str(tmp_path / "x")])
    assert "mixed by weights" in str(done.exception)
