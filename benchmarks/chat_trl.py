"""The tokens that TRL's SFT trainer scores in conversations, in an interpreter that has trl (and need not have kd).

    python benchmarks/chat_trl.py templates --work FOLDER    # writes the chat templates that TRL knows, as FOLDER/NAME.jinja
    python benchmarks/chat_trl.py scored --work FOLDER       # reads FOLDER/NAME/ (tokenizer, chat.jsonl), writes FOLDER/NAME.json

`scored` runs `SFTTrainer` with `assistant_only_loss=True` up to its first step, on a model of a few weights, and writes the ids and
labels of each conversation that it prepared, or what it raised.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any


def write_templates(work: Path) -> None:
    """The templates that TRL has a training template for; it compares texts, so they are the models' own."""
    import trl

    for file in (Path(trl.__file__).parent / "chat_templates").glob("*_training.jinja"):
        plain = file.with_name(file.name.replace("_training", ""))
        (work / plain.name).write_text(plain.read_text(encoding="utf-8"), encoding="utf-8")


def each_or_all(folder: Path, talks: list[list[dict[str, Any]]], work: Path) -> list[dict[str, Any]]:
    """Ids and labels of each conversation, prepared together, or one by one where one of them is refused."""
    together = prepared(folder, talks, work)
    if "error" not in together[0]:
        return together
    return [prepared(folder, [messages], work)[0] for messages in talks]


def prepared(folder: Path, talks: list[list[dict[str, Any]]], work: Path) -> list[dict[str, Any]]:
    """Ids and labels of conversations, or what was raised."""
    from datasets import Dataset
    from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel
    from trl import SFTConfig, SFTTrainer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    config = GPT2Config(vocab_size=len(tokenizer), n_positions=8, n_embd=2, n_layer=1, n_head=1)
    args = SFTConfig(
        output_dir=str(work / "trl"),
        assistant_only_loss=True,
        max_length=None,
        packing=False,
        report_to="none",
        use_cpu=True,
        bf16=False,
    )
    try:
        trainer = SFTTrainer(
            GPT2LMHeadModel(config),
            args=args,
            train_dataset=Dataset.from_list([{"messages": messages} for messages in talks]),
            processing_class=tokenizer,
        )
    except Exception as error:  # what TRL and the templates raise
        return [{"error": f"{type(error).__name__}: {error}".splitlines()[0]}]
    return [{"ids": row["input_ids"], "labels": row["labels"]} for row in trainer.train_dataset]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("templates", "scored"))
    parser.add_argument("--work", type=Path, required=True)
    args = parser.parse_args()
    if args.what == "templates":
        write_templates(args.work)
        return
    for folder in sorted(path for path in args.work.iterdir() if (path / "tokenizer.json").exists()):
        talks = [json.loads(line)["messages"] for line in (folder / "chat.jsonl").read_text().splitlines()]
        (args.work / f"{folder.name}.json").write_text(json.dumps(each_or_all(folder, talks, args.work)))


if __name__ == "__main__":
    main()
