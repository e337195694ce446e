"""What the device has computed, on its way to the host, and the time it took: nobody waits before it is there.

On a GPU `tensor.cpu()` and `bool(tensor)` wait for everything that was launched before; then the GPU waits in turn, for
the next launch. Here tensors are copied to pinned memory on a stream of their own, beside the next computation, and read
when their event has fired. On a CPU a tensor is where it shall be: everything here passes it through.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor


class HostCopies:
    """The way from one device to the host."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]

    @property
    def ahead(self) -> int:
        """Batches to launch before the first of them is read."""
        return 0 if self.stream is None else 1

    def start(self, tensors: Mapping[str, Tensor | None]) -> Arrival:
        """Copy what the current stream has launched or is launching; returns at once."""
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
    """Tensors that are on their way.

    It holds their sources until they have arrived: memory given back earlier would go to the next computation, which
    knows nothing of the copying stream.
    """

    def __init__(
        self, copies: Mapping[str, Tensor], event: Any = None, sources: Mapping[str, Tensor] | None = None
    ) -> None:
        self._copies, self._event, self._sources = copies, event, sources

    def wait(self) -> dict[str, Tensor]:
        """The tensors, on the host; waits until the last of them is there."""
        if self._event is not None:
            self._event.synchronize()
        self._event = self._sources = None
        return dict(self._copies)


def pinned_like(tensor: Tensor) -> Tensor:
    """Empty page-locked host memory, which a GPU writes to by itself. torch keeps what is freed for the next one."""
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)


class Laps:
    """When the parts of a piece of work ended: by the clock, or on a GPU, where launching takes no time, by its own events."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._marks: list[tuple[str, Any]] = [("", self._now())]

    def mark(self, part: str) -> None:
        """`part` ends here."""
        self._marks.append((part, self._now()))

    def seconds(self) -> Iterator[tuple[str, float]]:
        """`(part, seconds)` in order. On a GPU only after something launched later has been waited for."""
        for (_, before), (part, after) in pairwise(self._marks):
            yield part, after - before if self.device.type != "cuda" else before.elapsed_time(after) / 1000

    def _now(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self.device))
        return event
