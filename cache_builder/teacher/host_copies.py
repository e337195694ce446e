"""Asynchronous device-to-host copies, and timing of the stages on the device.

On a GPU, `tensor.cpu()` and `bool(tensor)` wait for everything that was launched before; then the GPU waits for the next
launch. Here tensors are copied to pinned memory on a stream of their own, beside the next computation, and read when their
event has fired. On a CPU tensors are on the host already, and are passed through.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor


class HostCopies:
    """Copies tensors of one device to the host."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]

    @property
    def ahead(self) -> int:
        """Number of batches to launch before the first of them is read."""
        return 0 if self.stream is None else 1

    def start(self, tensors: Mapping[str, Tensor | None]) -> Arrival:
        """Start copying tensors that the current stream computes; returns at once."""
        here = {name: tensor for name, tensor in tensors.items() if tensor is not None}
        if self.stream is None:
            return Arrival(here)
        sources = {name: tensor.contiguous() for name, tensor in here.items()}
        copies = {name: pinned_like(tensor) for name, tensor in sources.items()}
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            for name, tensor in sources.items():
                copies[name].copy_(tensor, non_blocking=True)
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record(self.stream)
        return Arrival(copies, event, sources)


class Arrival:
    """Tensors that are being copied.

    It holds their sources until they have arrived. Memory that is freed earlier would go to the next computation, which
    does not wait for the copying stream.
    """

    def __init__(
        self, copies: Mapping[str, Tensor], event: Any = None, sources: Mapping[str, Tensor] | None = None
    ) -> None:
        self._copies, self._event, self._sources = copies, event, sources

    def wait(self) -> dict[str, Tensor]:
        """The tensors on the host; waits for the last of them."""
        if self._event is not None:
            self._event.synchronize()
        self._event = self._sources = None
        return dict(self._copies)


def pinned_like(tensor: Tensor) -> Tensor:
    """Uninitialised page-locked host memory, which a GPU can write to by itself. torch reuses it when it is freed."""
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)


class Laps:
    """Times at which the stages of a batch ended: on the clock, or by events of the GPU, where launching takes no time."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._marks: list[tuple[str, Any]] = [("", self._now())]

    def mark(self, part: str) -> None:
        """Note that the stage `part` ends here."""
        self._marks.append((part, self._now()))

    def seconds(self) -> Iterator[tuple[str, float]]:
        """`(part, seconds)` in order. On a GPU, call it after waiting for something that was launched later."""
        for (_, before), (part, after) in pairwise(self._marks):
            yield part, after - before if self.device.type != "cuda" else before.elapsed_time(after) / 1000

    def _now(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self.device))
        return event
