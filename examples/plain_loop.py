"""Distil a student from a cache in a plain training loop.

python examples/plain_loop.py --cache runs/cache --student demo --out runs/student
"""

import argparse

import torch

import kd


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", required=True, help="path or URL of a cache")
    parser.add_argument("--student", default="demo", help="demo, random:NAME, a folder, or a hub id")
    parser.add_argument("--out", required=True, help="folder of the trained student")
    args = parser.parse_args()

    model, tokenizer = kd.load_student(args.student)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model.to(device).train()
    dataset = kd.CacheDataset(args.cache, model, tokenizer, temperature=2.0, tokens_per_batch=1024)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4, weight_decay=0.0)
    for step, batch in enumerate(dataset, 1):
        batch = {name: tensor.to(device) for name, tensor in batch.items()}
        parts = dataset.loss(model(**dataset.inputs(batch)), batch)
        parts.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step} of {len(dataset)}: kd {parts.kd:.4f}, ce {parts.ce:.4f}")

    model.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)


if __name__ == "__main__":
    main()
