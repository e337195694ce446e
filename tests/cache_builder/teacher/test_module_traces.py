"""Whatever a forward pass writes into its modules is seen."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch

from kd.cache_builder.teacher.module_traces import leaves_no_trace


class Writes(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("buffer", torch.zeros(3))
        self.inner = torch.nn.Linear(2, 2)
        setattr(self.inner.weight, "quant_state", SimpleNamespace(scale=1))  # noqa: B010
        self.config = SimpleNamespace(scale=1, rope={"layer": {"type": "x"}})
        self.count, self.cache, self.seen, self.last = 0, {"inner": {}}, [], deque()


@pytest.mark.parametrize(
    ("write", "clean"),
    [
        (lambda m: m.inner(torch.ones(1, 2)), True),
        (lambda m: setattr(m, "count", m.count + 1), False),
        (lambda m: setattr(m, "count", m.count), False),
        (lambda m: setattr(m.config, "scale", 2), False),
        (lambda m: m.config.rope["layer"].update(type="y"), False),
        (lambda m: setattr(m.inner.weight.quant_state, "scale", 2), False),
        (lambda m: m.cache["inner"].update(key=1), False),
        (lambda m: m.last.append(1), False),
        (lambda m: m.cache.update(key=1), False),
        (lambda m: m.seen.append(1), False),
        (lambda m: setattr(m, "late", 1), False),
        (lambda m: m.buffer.copy_(m.buffer), False),
        (lambda m: m.register_buffer("buffer", torch.zeros(3)), False),
        (lambda m: m.inner.weight.mul_(1.0), False),
        (lambda m: setattr(m.inner, "weight", torch.nn.Parameter(torch.zeros(2, 2))), False),
        (lambda m: m.add_module("inner", torch.nn.Linear(2, 2)), False),
        (lambda m: vars(m.inner).update(forward=len), False),
    ],
)
def test_what_a_module_was_left_with_is_seen(write: Callable, clean: bool):
    module = Writes()
    with torch.inference_mode():
        assert leaves_no_trace([module], lambda: write(module)) is clean


def test_what_cannot_be_looked_into_is_not_trusted():
    ran = []
    assert not leaves_no_trace([object()], lambda: ran.append(1))
    patched = torch.nn.Linear(2, 2)
    setattr(patched, "forward", patched.forward)  # noqa: B010, as accelerate puts its own in the place of it
    assert not leaves_no_trace([patched], lambda: ran.append(1))
    assert not ran


def test_a_hook_on_all_modules_is_not_trusted():
    module = torch.nn.Linear(2, 2)
    handle = torch.nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        assert not leaves_no_trace([module], lambda: None)
    finally:
        handle.remove()
    assert leaves_no_trace([module], lambda: None)


def test_setting_attributes_is_watched_only_meanwhile_and_only_of_these_modules():
    plain, other = torch.nn.Module.__setattr__, torch.nn.Linear(2, 2)
    assert leaves_no_trace([torch.nn.Linear(2, 2)], lambda: setattr(other, "mark", 1))
    assert other.mark == 1
    with pytest.raises(ZeroDivisionError):
        leaves_no_trace([other], lambda: 1 // 0)
    assert torch.nn.Module.__setattr__ is plain
