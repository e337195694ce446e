"""Distil a student with a subclass of transformers' Trainer.

python examples/hf_trainer.py --cache runs/cache --student demo --out runs/student
torchrun --nproc-per-node 2 examples/hf_trainer.py --cache runs/cache --student demo --out runs/student

Each process gets its own share of the batches from the dataset. Use one GPU per process (torchrun), not DataParallel.
"""

import argparse
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments

import kd


class DistillationTrainer(Trainer):
    """A Trainer whose data set makes whole batches, and their loss."""

    def get_train_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        return self.train_dataset.loader()

    def compute_loss(self, model: Any, inputs: dict[str, Tensor], return_outputs: bool = False, **_: Any) -> Any:
        outputs = model(**self.train_dataset.inputs(inputs))
        loss = self.train_dataset.loss(outputs, inputs).loss
        return (loss, outputs) if return_outputs else loss


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", required=True, help="path or URL of a cache")
    parser.add_argument("--student", default="demo", help="demo, random:NAME, a folder, or a hub id")
    parser.add_argument("--out", required=True, help="folder of the trained student")
    args = parser.parse_args()

    settings = TrainingArguments(
        args.out,
        num_train_epochs=1,
        learning_rate=5e-4,
        lr_scheduler_type="constant",
        logging_steps=1,
        report_to="none",
        use_cpu=not torch.cuda.is_available(),
    )
    model, tokenizer = kd.load_student(args.student)
    share = {"rank": settings.process_index, "world_size": settings.world_size}
    dataset = kd.CacheDataset(args.cache, model, tokenizer, temperature=2.0, tokens_per_batch=1024, **share)
    trainer = DistillationTrainer(model=model, args=settings, train_dataset=dataset)
    trainer.train()
    trainer.save_model(args.out)
    tokenizer.save_pretrained(args.out)


if __name__ == "__main__":
    main()
