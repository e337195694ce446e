"""The student's layers compiled by torch: `kd train --compile`.

What is compiled are the modules that compute hidden states. The output layer and the loss stay as they are: they go
through their rows in chunks with gradients of their own (`head`). The modules are compiled in place, so the names of the
weights do not change. torch compiles again for batches of other lengths, the second time with the lengths as symbols.

Where torch cannot compile a part, it runs that part uncompiled. `UncompiledParts` says which; it is never silent.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn
from transformers import TrainerCallback

from kd.common.errors import DataError

BACKEND = "inductor"
"""torch's compiler."""


def compile_layers(bodies: Sequence[nn.Module]) -> None:
    """Compile modules in place. torch does it when they are called."""
    for body in bodies:
        body.compile(backend=BACKEND)


def refuse_to_compile_parts(trainer: Any) -> None:
    """Raise DataError for a student that processes share: its layers are gathered by hooks between them."""
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        raise DataError(
            "a student in parts is not compiled", found="--compile with FSDP or DeepSpeed", try_="--no-compile"
        )


@contextmanager
def uncompiled(model: nn.Module) -> Iterator[None]:
    """The model without its compiled code: for scores, which need other code and come too seldom to pay for it."""
    compiled = {module: module._compiled_call_impl for module in model.modules() if module._compiled_call_impl}
    for module in compiled:
        module._compiled_call_impl = None
    try:
        yield
    finally:
        for module, code in compiled.items():
            module._compiled_call_impl = code


@contextmanager
def clear_compile_errors() -> Iterator[None]:
    """Turn errors of torch's compiler into DataError."""
    try:
        yield
    except RuntimeError as error:
        if not _is_of_compiler(error):
            raise
        lines = [line for line in str(error).splitlines() if line.strip()]
        raise DataError(
            "torch cannot compile this student here",
            found=f"{type(error).__name__}: {' '.join(lines[:2])}",
            try_="--no-compile; kd -v train … prints the whole error",
        ) from error


def _is_of_compiler(error: RuntimeError) -> bool:
    """Whether torch's compiler raised it; the compiler is not imported to find out, which takes a second."""
    module = sys.modules.get("torch._dynamo.exc")
    return module is not None and isinstance(error, module.TorchDynamoException)


class UncompiledParts(TrainerCallback):  # type: ignore[misc]
    """Says after a step which parts of the student torch runs uncompiled, each once."""

    def __init__(self, say: Callable[[str], object]) -> None:
        from torch._dynamo.utils import counters

        self.say = say
        self._counters = counters
        self._known = dict(counters["graph_break"])
        self._skipped = self._frames_skipped()

    def _frames_skipped(self) -> int:
        frames = self._counters["frames"]
        return int(frames["total"] - frames["ok"])

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Called by the Trainer."""
        breaks, skipped = self._counters["graph_break"], self._frames_skipped()
        new = [reason for reason, count in breaks.items() if count != self._known.get(reason)]
        for reason in new:
            self._known[reason] = breaks[reason]
            self.say(f"torch runs a part of the student uncompiled: {(reason.splitlines() or ['no reason given'])[0]}")
        if skipped > self._skipped and not new:
            self.say(
                "torch runs a part of the student uncompiled: its limit of recompilations, or an error that it hides"
            )
        self._skipped = skipped
