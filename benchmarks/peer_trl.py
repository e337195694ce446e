"""TRL's trainers on the shared texts, in an interpreter that has trl (and need not have kd).

    python benchmarks/peer_trl.py sft --work FOLDER --batch 4 --steps 4      # prints one line of JSON

    sft    SFTTrainer: cross-entropy
    gkd    GKDTrainer with lmbda=0 (the data's own targets) and beta=0 (forward KL): the teacher's logits for every batch
    gold   GOLDTrainer with use_uld_loss and lmbda=0, otherwise as it comes (extended alignment by byte offsets)

The teacher is in memory in gkd and gold. The first step is not counted: it allocates the optimizer's state.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from workload import PROMPT_TOKENS, Meter, load_model, read_texts


def case(name: str, work: Path, batch: int, steps: int) -> dict[str, Any]:
    import transformers
    import trl
    from datasets import Dataset
    from transformers import AutoTokenizer, TrainerCallback

    texts = read_texts(work / "texts.jsonl")
    tokenizer = AutoTokenizer.from_pretrained(work / "student")
    tokenizer.pad_token = tokenizer.eos_token
    length = len(texts[0]["input_ids"])
    mask = [0] * PROMPT_TOKENS + [1] * (length - PROMPT_TOKENS)
    pretokenized = [{"input_ids": t["input_ids"], "completion_mask": mask, "prompt": t["prompt"]} for t in texts]
    common = {
        "output_dir": str(work / "trl"),
        "per_device_train_batch_size": batch,
        "max_steps": steps + 1,
        "max_length": length,
        "optim": "adamw_torch",
        "learning_rate": 1e-5,
        "logging_strategy": "no",
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "disable_tqdm": True,
        "packing": False,
    }

    class Timer(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
            if state.global_step == 1:
                meter.start()
            elif state.global_step == steps + 1:
                meter.stop()

    settings: dict[str, Any] = {}
    if name == "sft":
        from trl import SFTConfig as Config
        from trl import SFTTrainer as Trainer

        pretokenized = [{k: t[k] for k in ("input_ids", "completion_mask")} for t in pretokenized]
        settings = {"completion_only_loss": True}
    elif name == "gkd":
        from trl.experimental.gkd import GKDConfig as Config
        from trl.experimental.gkd import GKDTrainer as Trainer

        settings = {"lmbda": 0.0, "beta": 0.0}
    else:
        from trl.experimental.gold import GOLDConfig as Config
        from trl.experimental.gold import GOLDTrainer as Trainer

        pretokenized = [{"prompt": t["prompt"], "completion": t["target"]} for t in texts]
        settings = {
            "lmbda": 0.0,
            "use_uld_loss": True,
            "max_completion_length": length - PROMPT_TOKENS - 1,
            "teacher_tokenizer_name_or_path": str(work / "teacher"),
        }
    meter = Meter()
    models = {"model": load_model(work / "student")}
    if name != "sft":
        models["teacher_model"] = load_model(work / "teacher")
    trainer = Trainer(
        **models,
        args=Config(**common, **settings),
        train_dataset=Dataset.from_list(pretokenized),
        processing_class=tokenizer,
        callbacks=[Timer()],
    )
    trainer.train()
    result = meter.result(steps * batch * length)
    return result | {"versions": {"trl": trl.__version__, "transformers": transformers.__version__}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("case", choices=("sft", "gkd", "gold"))
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--batch", type=int, required=True)
    parser.add_argument("--steps", type=int, required=True)
    args = parser.parse_args()
    print(json.dumps(case(args.case, args.work, args.batch, args.steps)))


if __name__ == "__main__":
    main()
