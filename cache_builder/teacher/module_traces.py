"""Whether running a model writes anything into its modules. If not, several threads may run it at once.

Some models do write: rotary embeddings grow with the text, and hooks may do anything. So it is tried before it is relied on.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import FunctionType, MethodType, ModuleType
from typing import Any

import torch

DEPTH = 3
"""How many levels of objects that modules hold are looked into."""


def leaves_no_trace(modules: Iterable[Any], run: Callable[[], object]) -> bool:
    """Whether `run()` writes nothing into the modules: no attribute is set, even to its old value, and no tensor changes.

    False, without a run, for objects that are not modules, for hooks, and for a forward method that replaces a module's
    own: what those write cannot be seen. What lies deeper than DEPTH in the objects that modules hold, and tensors made in
    inference mode, are not seen either. No other thread may run the modules meanwhile.
    """
    tops = list(modules)
    hooks = torch.nn.modules.module
    if hooks._global_forward_hooks or hooks._global_forward_pre_hooks:
        return False
    if not all(isinstance(m, torch.nn.Module) for m in tops):
        return False
    every = list(dict.fromkeys(m for top in tops for m in top.modules()))
    if any(m._forward_hooks or m._forward_pre_hooks or "forward" in vars(m) for m in every):
        return False
    before = _state(every)
    with _written(every) as written:
        run()
    after = _state(every)
    same = len(before) == len(after) and all(a is b and m == n for (a, m), (b, n) in zip(before, after, strict=True))
    return same and not written


@contextmanager
def _written(modules: Iterable[torch.nn.Module]) -> Iterator[list[str]]:
    """Names of the modules' attributes that are set while the context is open, in order."""
    watched_ids, names, plain = set(map(id, modules)), list[str](), torch.nn.Module.__setattr__

    def watched(self: torch.nn.Module, name: str, value: Any) -> None:
        if id(self) in watched_ids:
            names.append(name)
        plain(self, name, value)

    torch.nn.Module.__setattr__ = watched  # type: ignore[method-assign]
    try:
        yield names
    finally:
        torch.nn.Module.__setattr__ = plain  # type: ignore[method-assign]


def _state(modules: Iterable[torch.nn.Module]) -> list[tuple[Any, int]]:
    """Every object that the modules hold, and how often it was written to where torch counts that.

    The objects themselves are kept, so that none is freed and its address used again before the comparison.
    """
    seen: set[int] = set()
    return [held for m in modules for value in vars(m).values() for held in _inside(value, DEPTH, seen)]


def _inside(value: Any, depth: int, seen: set[int]) -> Iterator[tuple[Any, int]]:
    tracked = isinstance(value, torch.Tensor) and not value.is_inference()
    yield value, value._version if tracked else 0
    if (
        depth == 0
        or id(value) in seen
        or isinstance(value, torch.nn.Module | type | FunctionType | MethodType | ModuleType)
    ):
        return
    held: Iterable[Any] = vars(value).values() if hasattr(value, "__dict__") else ()
    if isinstance(value, dict):
        held = [*value.values(), *held]
    elif isinstance(value, list | tuple | set | frozenset | deque):
        held = [*value, *held]
    else:
        held = list(held)
    if held:
        seen.add(id(value))
    for part in held:
        yield from _inside(part, depth - 1, seen)
