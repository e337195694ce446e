"""Batch sizes: batches of examples by length, padded ids on the device, and rows of the output layer per chunk.

The teacher pass, the student's loss and the evaluation share this code. Hidden states come for whole batches, logits for
a few rows at a time (see `kd.models.heads`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import torch

Size = int | tuple[int, int]
"""Tokens of an example; for an encoder-decoder, (encoder tokens, decoder tokens)."""

BATCH_TOKENS = 16
"""Cost of starting a batch, in tokens of padding. An encoder-decoder's batch ends where one more example would add more
padding than that (docs/log.md)."""

CPU_CHUNK_BYTES = 24 * 2**20
"""Bytes of a chunk of float32 logits on a CPU. Above 32 MB, glibc maps and zeroes fresh pages for every tensor, which costs
30-80 % of the time of the output layer; twice as many rows make the product only 4 % faster (benchmarks/chunks.py). Each lane
of a teacher pass holds one or two chunks (docs/log.md)."""
CPU_TRAINING_BYTES = 64 * 2**20
"""The same in training, where all chunks share one buffer and each chunk reads and writes the weight's gradient once."""
GPU_CHUNK_BYTES = 256 * 2**20
"""Bytes of a chunk of float32 logits on a GPU."""


def forward_tokens(device_type: str, threads: int | None = None, *, two_sides: bool = False) -> int:
    """Default token budget of a forward pass, padding included.

    threads     threads of the CPU that work on it; None is torch's number
    two_sides   whether the model has an encoder and a decoder, which share the budget

    A CPU gets few tokens: the activations of 512 tokens stay in the cache, those of 4,096 are written to memory by every
    layer, which takes 10-30 % longer (docs/log.md). A GPU, and a CPU with many threads, need more tokens to be busy.
    """
    import torch

    per_thread = 512 if two_sides else 256
    if device_type != "cpu":
        return 4096
    return min(4096, per_thread * max(2, threads or torch.get_num_threads()))


def batches_by_length(lengths: Sequence[Size], tokens_per_batch: int) -> list[list[int]]:
    """Batches of indices into `lengths`, longest first, each of at most `tokens_per_batch` tokens with padding.

    A single example longer than that is a batch of its own. The two sides of an encoder-decoder are padded separately, and
    their lengths are independent. Examples are therefore grouped by the decoder's length (1, 2-3, 4-7, ...) and sorted by
    the encoder's length within a group, and a batch ends early where filling it up would mostly add padding.
    """
    sizes = [size if isinstance(size, tuple) else (size, 0) for size in lengths]
    two_sides = any(isinstance(size, tuple) for size in lengths)
    result: list[list[int]] = []
    width = (0, 0)
    for i in sorted(range(len(sizes)), key=lambda i: (-sizes[i][1].bit_length(), -sizes[i][0], -sizes[i][1], i)):
        wider = (max(width[0], sizes[i][0]), max(width[1], sizes[i][1]))
        count = len(result[-1]) if result else 0
        joined = (count + 1) * sum(wider)
        wasted = joined - count * sum(width) - sum(sizes[i])
        if result and joined <= tokens_per_batch and not (two_sides and wasted > BATCH_TOKENS):
            result[-1].append(i)
            width = wider
        else:
            result.append([i])
            width = sizes[i]
    return result


def padded_tokens(lengths: Sequence[Size]) -> int:
    """Tokens of one batch, padding included."""
    sizes = [size if isinstance(size, tuple) else (size, 0) for size in lengths]
    return len(sizes) * (max(a for a, _ in sizes) + max(b for _, b in sizes))


def head_rows(vocabulary_size: int, device_type: str, *, training: bool = False) -> int:
    """Rows of the output layer per chunk: a multiple of 16 from 64 to 1,024 whose logits fit the chunk's bytes."""
    budget = GPU_CHUNK_BYTES if device_type != "cpu" else CPU_TRAINING_BYTES if training else CPU_CHUNK_BYTES
    return min(1024, max(64, budget // (4 * vocabulary_size) // 16 * 16))


def even_rows(rows: int, most: int) -> int:
    """Rows per chunk, at most `most`, such that there are as few chunks as possible and no small one at the end."""
    rows = max(rows, 1)
    chunks = -(-rows // most)
    return min(most, -(-rows // chunks // 16) * 16)


def padded_ids(sequences: Sequence[np.ndarray], device: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`[B, T]` ids padded with 0 on the right, and their mask; None where all sequences have one length."""
    import torch

    lengths = [len(s) for s in sequences]
    ids = np.zeros((len(lengths), max(lengths)), dtype=np.int64)
    for b, sequence in enumerate(sequences):
        ids[b, : lengths[b]] = sequence
    mask = None
    if min(lengths) != max(lengths):
        mask = on_device((torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long(), device)
    return on_device(torch.from_numpy(ids), device), mask


def on_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy a host tensor to `device`. It is pinned first, because a copy from pageable memory waits for the GPU's queue."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)
