"""Distil a student with a Lightning module.

python examples/lightning_module.py --cache runs/cache --student demo --out runs/student

With several devices, give `CacheDataset` this process's `rank` and the `world_size`: Lightning is told not to share out
batches, because the dataset does.
"""

import argparse
import sys

import torch
from torch import Tensor
from torch.utils.data import DataLoader

import kd

try:
    import lightning
except ImportError:
    sys.exit("this example needs Lightning: pip install lightning")


class Distillation(lightning.LightningModule):
    """A student and the batches of its cache."""

    def __init__(self, cache: str, student: str) -> None:
        super().__init__()
        self.model, self.tokenizer = kd.load_student(student)
        self.dataset = kd.CacheDataset(cache, self.model, self.tokenizer, temperature=2.0, tokens_per_batch=1024)

    def train_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        return self.dataset.loader()

    def training_step(self, batch: dict[str, Tensor], number: int) -> Tensor:
        parts = self.dataset.loss(self.model(**self.dataset.inputs(batch)), batch)
        self.log_dict({"kd": parts.kd, "ce": parts.ce}, prog_bar=True, batch_size=len(batch["gold_ids"]))
        return parts.loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.model.parameters(), lr=5e-4, weight_decay=0.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", required=True, help="path or URL of a cache")
    parser.add_argument("--student", default="demo", help="demo, random:NAME, a folder, or a hub id")
    parser.add_argument("--out", required=True, help="folder of the trained student")
    args = parser.parse_args()

    module = Distillation(args.cache, args.student)
    module.model.train()
    trainer = lightning.Trainer(
        max_epochs=1,
        devices=1,
        gradient_clip_val=1.0,
        use_distributed_sampler=False,
        logger=False,
        enable_checkpointing=False,
    )
    trainer.fit(module)
    module.model.save_pretrained(args.out)
    module.tokenizer.save_pretrained(args.out)


if __name__ == "__main__":
    main()
