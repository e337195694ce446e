"""Distil a student with a DataLoader that reads the cache in two worker processes, and continue after an interruption.

python examples/dataloader.py --cache runs/cache --student demo --out runs/student --stop-after 3
python examples/dataloader.py --cache runs/cache --student demo --out runs/student

The first command stops after three steps and writes a checkpoint; the second one continues with the very next batch. The
loss is computed from hidden states: logits of the whole batch never exist.
"""

import argparse
from pathlib import Path

import torch

import kd


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", required=True, help="path or URL of a cache")
    parser.add_argument("--student", default="demo", help="demo, random:NAME, a folder, or a hub id")
    parser.add_argument("--out", required=True, type=Path, help="folder of the trained student, and of the checkpoint")
    parser.add_argument("--stop-after", type=int, help="number of steps after which to stop with a checkpoint")
    args = parser.parse_args()

    model, tokenizer = kd.load_student(args.student)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model.to(device).train()
    dataset = kd.CacheDataset(args.cache, model, tokenizer, temperature=2.0, tokens_per_batch=1024)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4, weight_decay=0.0)
    checkpoint = args.out / "checkpoint.pt"
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        dataset.load_state_dict(state["dataset"])
    loader = dataset.loader(num_workers=2, pin_memory=device == "cuda")
    for step, batch in enumerate(loader, dataset.position + 1):
        batch = {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}
        hidden = model.base_model(**dataset.inputs(batch))
        parts = dataset.chunked_loss(hidden, model, batch)
        parts.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step} of {len(dataset)}: kd {parts.kd:.4f}, ce {parts.ce:.4f}")
        if step == args.stop_after:
            args.out.mkdir(parents=True, exist_ok=True)
            states = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            torch.save({**states, "dataset": dataset.state_dict(step)}, checkpoint)
            return

    model.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)


if __name__ == "__main__":  # worker processes import this file
    main()
