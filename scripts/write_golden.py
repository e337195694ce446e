"""Make the stores of format version 3 in tests/golden, and what their reader gives: `python scripts/write_golden.py tests/golden`.

Once for each released version: later releases must read these bytes. A folder that exists is left alone.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from kd.cache_builder.build.builder import build
from kd.cache_builder.build.plan import plan_build
from kd.cache_builder.build.request import BuildRequest
from kd.cache_builder.store.readers.reader import CacheReader
from kd.cache_builder.store.records.manifest import Layout
from kd.cache_builder.store.targets import TargetConfig
from kd.data.conversations.chat_settings import ChatSettings
from kd.data.sources import load_corpus
from kd.data.tokenizing.block_config import BlockConfig
from kd.models.model_request import ModelRequest

TEXTS = (
    "A very short one.",
    "The fox met the keeper at the bridge. They told each other a story, and then it was night.",
)
TALKS = (
    (("user", "One?"), ("assistant", "Two."), ("user", "And then?"), ("assistant", "Three, as ever.")),
    (("system", "Be brief."), ("user", "Why?"), ("assistant", "Because.")),
)
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}[{{ m.role }}]\n{{ m.content }}"
    "{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]\n{% endif %}"
)
FIELDS = (
    *("gold_ids", "gold_logprob", "gold_rank", "byte_end", "log_z", "kept", "token_ids", "logprobs"),
    *("tail_bands", "sample_ids", "sample_counts", "tail_ids", "tail_draws", "boundary_logprob"),
)


def main(golden: Path) -> None:
    """Write every store that is not there."""
    full = TargetConfig.of_profile("full", top_k=4, samples=3, tail_bands=3)
    adaptive = TargetConfig.of_profile("adaptive", top_k=12, min_probability=0.02, min_k=2)
    tails = TargetConfig.of_profile("adaptive", top_k=12, min_probability=0.05, tail_samples=20)
    stores = {"v3": (full, False), "v3-adaptive": (adaptive, False), "v3-conversations": (full, True)}
    stores |= {"v3-tails": (tails, False)}
    for name, (targets, chat) in stores.items():
        if not (golden / name).exists():
            with tempfile.TemporaryDirectory() as folder:
                write_store(golden / name, Path(folder), targets, chat=chat)
            values = values_of(CacheReader(golden / name))
            (golden / f"{name}.json").write_text(json.dumps(values, separators=(",", ":")) + "\n")


def write_store(out: Path, folder: Path, targets: TargetConfig, *, chat: bool) -> None:
    """Build a cache of a few examples in two shards or more, with the embedded teacher."""
    (folder / "two.txt").write_text("\n\n".join(TEXTS) + "\n")
    rows = [{"messages": [{"role": role, "content": text} for role, text in talk]} for talk in TALKS]
    (folder / "two.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "plain.jinja").write_text(TEMPLATE)
    request = BuildRequest(
        out=folder / "cache",
        teacher=ModelRequest("demo", device="cpu"),
        corpus=load_corpus(str(folder / ("two.jsonl" if chat else "two.txt"))),
        blocks=BlockConfig(seq_len=128 if chat else 16),
        targets=targets,
        layout=Layout(16, 4) if chat else Layout(32, 8),
        tokens_per_batch=128,
        chat=ChatSettings(chat_template=str(folder / "plain.jinja")) if chat else ChatSettings(),
    )
    for _ in build(plan_build(request)):
        pass
    shutil.copytree(folder / "cache", out)


def values_of(reader: CacheReader) -> list[dict[str, Any]]:
    """The first and the last example, as the reader hands them out."""
    examples: list[dict[str, Any]] = []
    for number in (0, len(reader) - 1):
        example = reader[number]
        values = {name: getattr(example.targets, name) for name in FIELDS}
        examples.append(
            {"number": number, "id": example.id, "target": example.target}
            | {"context_ids": example.context_ids.tolist(), "input_ids": example.input_ids.tolist()}
            | {name: value.tolist() for name, value in values.items() if value is not None}
        )
    return examples


if __name__ == "__main__":
    main(Path(sys.argv[1]))
