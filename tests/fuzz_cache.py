"""Coverage-guided fuzzing of everything that reads a stranger's bytes: `make fuzz` (needs the extra `fuzz`, atheris).

    python tests/fuzz_cache.py manifest|commit|shard|table|shards|commits|lengths CORPUS_DIR -max_total_time=600
    python tests/fuzz_cache.py task|recipe|experiment|pool|config CORPUS_DIR -max_total_time=600
    python tests/fuzz_cache.py rows|talk|template CORPUS_DIR -max_total_time=600

The first line reads files of a cache. The second reads YAML: a task is rendered on its example row, a recipe and an experiment are
filled in and checked, a pool is read, a configuration becomes the settings of a training. The third is about conversations: lines
of a data set, a conversation as a cache stores it, and a chat template that is looked through for the tokens it reads.

Any exception but ours is a finding; libFuzzer writes the input that did it. Findings become cases of test_hostile.py.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import atheris
import pyarrow as pa

with atheris.instrument_imports(include=["kd"]):
    from kd.cache_builder.store.cache_files import LocalFiles
    from kd.cache_builder.store.chunks import decode_shard
    from kd.cache_builder.store.encoding.arrays import ArraySpec
    from kd.cache_builder.store.encoding.parquet import read_parquet
    from kd.cache_builder.store.example_table import EXAMPLE_SCHEMA
    from kd.cache_builder.store.lengths import read_page
    from kd.cache_builder.store.records.cache_tables import COMMITS, SHARDS, load_commit_table, load_shard_table
    from kd.cache_builder.store.records.commits import file_entry
    from kd.cache_builder.store.records.manifest import Layout, fingerprint_of, load_manifest
    from kd.cache_builder.store.records.manifest_checks import length_page
    from kd.cache_builder.store.records.shard_record import parse_shard_record
    from kd.common.errors import KdError
    from kd.common.files import canonical_json, digest_of, read_json
    from kd.common.settings import flattened, make
    from kd.common.strangers.yaml_file import parse_mapping, read_settings
    from kd.data.conversations.conversation import conversation_from_json
    from kd.data.data_settings import InstructionConfig
    from kd.data.instruction_tasks import text_rules
    from kd.data.instruction_tasks.rendering import show_templates
    from kd.data.instruction_tasks.task_files import task_of
    from kd.data.left_out import LeftOut
    from kd.data.rows.local_files import read_examples
    from kd.data.rows.row_reading import RowReading
    from kd.models.chat.turn_tokens import token_roles
    from kd.recipes.experiment_file import load_experiment
    from kd.recipes.recipe_file import load_recipe
    from kd.recipes.run_steps import check_steps
    from kd.student_trainer.configuration.train_config import TrainConfig
    from kd.student_trainer.merging.pool import read_pool

text_rules.SECONDS = 0.2  # so that libFuzzer does not take a slow expression, which ends, for a hang

FOLDER = Path(tempfile.mkdtemp())
SPECS = (ArraySpec("x", "uint16", None, {}), ArraySpec("x", "uint8", 8, {}, by_column=True))


def _signed(data: bytes) -> bytes:
    """JSON with its checksum and fingerprint made right, so that what lies behind them is reached too."""
    try:
        document = json.loads(data)
        content = {k: v for k, v in document.items() if k != "checksum"}
        if "identity" in content:
            content["fingerprint"] = fingerprint_of(content["identity"], content["format_version"])
        return canonical_json(content | {"checksum": digest_of(content)}).encode()
    except (ValueError, AttributeError, RecursionError, TypeError, LookupError):
        return data


def manifest(data: bytes) -> None:
    (FOLDER / "manifest.json").write_bytes(_signed(data))
    load_manifest(FOLDER)


def commit(data: bytes) -> None:
    path = FOLDER / "00000.json"
    path.write_bytes(_signed(data))
    parse_shard_record(read_json(path), path)


def shard(data: bytes) -> None:
    for spec in SPECS:
        try:
            decode_shard(data, spec, Layout(32, 8), 25)
        except (KdError, RuntimeError, ValueError):  # read_shard calls any of them damage
            continue


def table(data: bytes) -> None:
    try:
        read_parquet(data, EXAMPLE_SCHEMA, rows=2)
    except (
        pa.ArrowException,
        OSError,
        KeyError,
        ValueError,
        RuntimeError,
    ):  # what Arrow raises; read_shard calls it damage
        return


def _signed_table(name: str, data: bytes) -> dict[str, object]:
    (FOLDER / name).parent.mkdir(exist_ok=True)
    (FOLDER / name).write_bytes(data)
    return file_entry(FOLDER / name)


def shards(data: bytes) -> None:
    load_shard_table(FOLDER, _signed_table(SHARDS, data), 2)


def commits(data: bytes) -> None:
    load_commit_table(FOLDER, _signed_table(COMMITS, data), 2, ["gold_ids"])


def lengths(data: bytes) -> None:
    read_page(LocalFiles(FOLDER), length_page(0), _signed_table(length_page(0), data), 2)


def task(data: bytes) -> None:
    show_templates(
        task_of(parse_mapping(_text(data), "task file", "mine.yaml"), "mine", "mine.yaml"), InstructionConfig()
    )


def recipe(data: bytes) -> None:
    check_steps(load_recipe(_written("recipe.yaml", data)).fill(FOLDER / "run", {}))


def experiment(data: bytes) -> None:
    chosen = load_experiment(_written("experiment.yaml", data))
    assert len(chosen.runs) == len(set(chosen.runs))
    check_steps(chosen.recipe.fill(FOLDER / "run", {}))


def pool(data: bytes) -> None:
    read_pool(Path(_written("pool.yaml", data)))


def config(data: bytes) -> None:
    file = Path(_written("config.yaml", data))
    make(TrainConfig, flattened(TrainConfig, read_settings(file), where=file), where=file)


def rows(data: bytes) -> None:
    """Lines of JSON as documents, pairs or conversations; each conversation is stored and read again."""
    file = Path(_written("rows.jsonl", data))
    for reading in (RowReading(skip=True), RowReading(form="messages", skip=True), RowReading()):
        _, examples = read_examples(file, "rows.jsonl", reading, "train", LeftOut())
        for talk in (example.conversation for example in examples if example.conversation is not None):
            again = conversation_from_json(talk.id, talk.to_json())
            assert (again.messages, again.tools) == (talk.messages, talk.tools)


def talk(data: bytes) -> None:
    conversation_from_json("one", _text(data)).to_json()


def template(data: bytes) -> None:
    token_roles(_text(data), ("<think>", "</think>", "<|im_end|>"), lambda messages, prompt: _text(data) * prompt)


def _written(name: str, data: bytes) -> str:
    (FOLDER / name).write_bytes(data)
    return str(FOLDER / name)


def _text(data: bytes) -> str:
    return data.decode("utf-8", errors="replace")


TARGETS = {
    "manifest": manifest,
    "commit": commit,
    "shard": shard,
    "table": table,
    "shards": shards,
    "commits": commits,
    "lengths": lengths,
    "task": task,
    "recipe": recipe,
    "experiment": experiment,
    "pool": pool,
    "config": config,
    "rows": rows,
    "talk": talk,
    "template": template,
}


def main() -> None:
    target = TARGETS[sys.argv.pop(1)]

    def one(data: bytes) -> None:
        try:
            target(data)
        except KdError:
            return

    atheris.Setup(sys.argv, one)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
