"""How others put a teacher's top-k on disk: small re-implementations, ours, from what their authors document.

    torch       float16 log-probabilities and int32 ids, one `torch.save` per batch: the script most people write
    parquet     float16 log-probabilities and uint16 ids as list columns, pyarrow's default compression (snappy)
    megatron    Megatron-LM's offline logits: float16 values, ids as uint16 and one bit more, `torch.save`, zstd 3, in a tar
    distillkit  DistillKit's compressed logits: ids packed at ceil(log2 V) bits, 16 log-probabilities in bfloat16, the others as
                six float32 coefficients of a least-squares fit over the rank, rows as byte lists in Parquet

Each is a pair `write(folder, number, ids, logprobs, vocabulary)`, `read(folder, number, vocabulary)` over arrays `[n, k]`,
most probable first: int64 ids, float32 natural log-probabilities. They measure size, fidelity and time; nothing of theirs
but the layout of the bytes is here (no resume, no checks), and nothing of ours.
"""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

Array = np.ndarray

EXACT = 16
"""DistillKit's recommended `exact_k`."""


@dataclass(frozen=True)
class Encoding:
    """One way to store a batch of rows."""

    label: str
    write: Callable[[Path, int, Array, Array, int], None]
    read: Callable[[Path, int, int], tuple[Array, Array]]


def write_torch(folder: Path, number: int, ids: Array, logprobs: Array, vocabulary: int) -> None:
    import torch

    values = {"ids": torch.from_numpy(ids.astype(np.int32)), "logprobs": torch.from_numpy(logprobs).half()}
    torch.save(values, folder / f"{number}.pt")


def read_torch(folder: Path, number: int, vocabulary: int) -> tuple[Array, Array]:
    import torch

    values = torch.load(folder / f"{number}.pt", weights_only=True)
    return values["ids"].long().numpy(), values["logprobs"].float().numpy()


def write_parquet(folder: Path, number: int, ids: Array, logprobs: Array, vocabulary: int) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    kind = np.uint16 if vocabulary <= 2**16 else np.uint32
    table = {"ids": _lists(ids.astype(kind)), "logprobs": _lists(logprobs.astype(np.float16))}
    pq.write_table(pa.table(table), folder / f"{number}.parquet")


def read_parquet(folder: Path, number: int, vocabulary: int) -> tuple[Array, Array]:
    import pyarrow.parquet as pq

    table = pq.read_table(folder / f"{number}.parquet")
    return _rows(table["ids"]).astype(np.int64), _rows(table["logprobs"]).astype(np.float32)


def write_megatron(folder: Path, number: int, ids: Array, logprobs: Array, vocabulary: int) -> None:
    import torch
    from numcodecs.zstd import Zstd

    if vocabulary > 2**17:
        raise ValueError("the format holds ids of 17 bits")
    values = {
        "values": torch.from_numpy(logprobs).half(),
        "indices_low": torch.from_numpy((ids & 0xFFFF).astype(np.uint16)),
        "bit_17": torch.from_numpy(np.packbits((ids >> 16).astype(bool), axis=1)),
    }
    buffer = io.BytesIO()
    torch.save(values, buffer)
    data = Zstd(level=3).encode(buffer.getvalue())
    with tarfile.open(folder / f"{number}.tar", "w") as tar:
        entry = tarfile.TarInfo(f"{number}.pt.zst")
        entry.size = len(data)
        tar.addfile(entry, io.BytesIO(data))


def read_megatron(folder: Path, number: int, vocabulary: int) -> tuple[Array, Array]:
    import torch
    from numcodecs.zstd import Zstd

    with tarfile.open(folder / f"{number}.tar") as tar:
        member = tar.extractfile(f"{number}.pt.zst")
        assert member is not None
        data = Zstd().decode(member.read())
    values = torch.load(io.BytesIO(bytes(data)), weights_only=True)
    low, high = values["indices_low"].numpy(), values["bit_17"].numpy()
    bits = np.unpackbits(high, axis=1, count=low.shape[1]).astype(np.int64)
    return low.astype(np.int64) + (bits << 16), values["values"].float().numpy()


def write_distillkit(folder: Path, number: int, ids: Array, logprobs: Array, vocabulary: int) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq
    import torch

    exact = min(EXACT, ids.shape[1])
    head = torch.from_numpy(np.ascontiguousarray(logprobs[:, :exact])).bfloat16().view(torch.uint8).numpy()
    coefficients = np.zeros((len(ids), 0), np.float32)
    if ids.shape[1] > exact:
        design = _terms(ids.shape[1] - exact)
        coefficients = np.linalg.lstsq(design, logprobs[:, exact:].T.astype(np.float64), rcond=None)[0].T
    tail = np.ascontiguousarray(coefficients, dtype=np.float32).view(np.uint8)
    rows = {
        "compressed_logprobs": _lists(np.concatenate([head, tail], axis=1)),
        "bytepacked_indices": _lists(pack_bits(ids, width_of(vocabulary))),
    }
    pq.write_table(pa.table(rows), folder / f"{number}.parquet")
    (folder / "compression_config.txt").write_text(f"k={ids.shape[1]} exact_k={exact}")


def read_distillkit(folder: Path, number: int, vocabulary: int) -> tuple[Array, Array]:
    import pyarrow.parquet as pq
    import torch

    settings = dict(part.split("=") for part in (folder / "compression_config.txt").read_text().split())
    k, exact = int(settings["k"]), int(settings["exact_k"])
    table = pq.read_table(folder / f"{number}.parquet")
    ids = unpack_bits(_rows(table["bytepacked_indices"]), width_of(vocabulary), k)
    data = _rows(table["compressed_logprobs"])
    head = torch.from_numpy(data[:, : 2 * exact].copy()).view(torch.bfloat16).float().numpy()
    tail = np.ascontiguousarray(data[:, 2 * exact :]).view(np.float32) @ _terms(k - exact).T
    return ids, np.concatenate([head, tail.astype(np.float32)], axis=1)


def width_of(vocabulary: int) -> int:
    return int(vocabulary - 1).bit_length()


def pack_bits(ids: Array, width: int) -> Array:
    """`[n, k]` ids below 2^width -> `[n, ceil(k * width / 8)]` bytes, most significant bit first."""
    bits = (ids[:, :, None] >> np.arange(width - 1, -1, -1)) & 1
    return np.packbits(bits.reshape(len(ids), -1).astype(bool), axis=1)


def unpack_bits(data: Array, width: int, k: int) -> Array:
    """The inverse: `[n, k]` int64."""
    bits = np.unpackbits(data, axis=1, count=k * width).reshape(len(data), k, width)
    return bits.astype(np.int64) @ (1 << np.arange(width - 1, -1, -1))


def _terms(count: int) -> Array:
    """`[count, 6]` of the rank beyond the exact ones, scaled to 0..1: powers 0 to 3, square root, exponential.

    The scale keeps the powers apart in float32; it changes no fit.
    """
    x = np.arange(count) / max(count - 1, 1)
    return np.stack([np.ones_like(x), x, x**2, x**3, np.sqrt(x), np.exp(-8 * x)], axis=1)


def _lists(values: Array) -> object:
    """`[n, m]` as an Arrow array of n lists."""
    import pyarrow as pa

    flat = pa.array(np.ascontiguousarray(values).reshape(-1))
    offsets = pa.array(np.arange(0, values.size + 1, values.shape[1], dtype=np.int32))
    return pa.ListArray.from_arrays(offsets, flat)


def _rows(column: object) -> Array:
    """The inverse: `[n, m]`."""
    whole = column.combine_chunks()  # type: ignore[attr-defined]
    flat = whole.flatten().to_numpy(zero_copy_only=False)
    return np.asarray(flat.reshape(len(whole), -1))


ENCODINGS = {
    "torch": Encoding("torch.save, float16", write_torch, read_torch),
    "parquet": Encoding("Parquet, float16", write_parquet, read_parquet),
    "megatron": Encoding("Megatron's encoding", write_megatron, read_megatron),
    "distillkit": Encoding("DistillKit's encoding", write_distillkit, read_distillkit),
}


def head_kl(true: Array, stored: Array) -> float:
    """Mean KL in nats between the kept tokens' log-probabilities `[n, k]`, each row normalised over what is kept.

    Both in the same order of tokens. Normalised, since a fitted curve need not leave room for a tail.
    """
    p, q = (_normalised(values.astype(np.float64)) for values in (true, stored))
    return float((np.exp(p) * (p - q)).sum(axis=1).mean())


def _normalised(values: Array) -> Array:
    top = values - values.max(axis=1, keepdims=True)
    return np.asarray(top - np.log(np.exp(top).sum(axis=1, keepdims=True)))
