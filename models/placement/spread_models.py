"""Models whose parts lie on several devices, or on the disk: what is needed of them to compute logits in two parts.

accelerate's hooks bring inputs and weights of each module to the device where it computes. They leave three things to whoever
takes a model apart: where its inputs go in, where its states come out, and the weight of an output layer, which is no tensor in
memory while it is offloaded.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from kd.common.errors import DataError

if TYPE_CHECKING:
    import torch


def is_spread(model: Any) -> bool:
    """Whether accelerate's hooks move inputs and weights of the model between devices."""
    return any(hasattr(module, "_hf_hook") for module in model.modules())


def whole_weight(module: Any, name: str = "weight") -> torch.Tensor | None:
    """A module's parameter as a tensor in memory, on the device where the module computes; None where it has none.

    An offloaded weight is read once and stays in memory for as long as the caller keeps it. accelerate brings it there for
    every forward pass anyway.
    """
    tensor = getattr(module, name, None)
    if tensor is None or tensor.device.type != "meta":
        return tensor
    device = _execution_device(module)
    value = _stored(module, name)
    if value is None or device is None:
        raise DataError("a weight of the model is not in memory", found=f"{name} on the meta device")
    return value.detach().to(device)


def input_device(model: Any) -> torch.device:
    """The device that a model's token ids are brought to first."""
    import torch

    embedding = model.get_input_embeddings()
    device = _execution_device(embedding)
    return embedding.weight.device if device is None else torch.device(device)


def offloaded(model: Any, name: str) -> torch.Tensor | None:
    """The tensor of a model by its name in `state_dict`, read from where it is offloaded to; None for any other tensor."""
    path, _, attribute = name.rpartition(".")
    return _stored(model.get_submodule(path), attribute)


class SpreadBody:
    """A model's body that takes its inputs from any device, and gives its states on the device of the output layer."""

    def __init__(self, body: Any, first: torch.device, last: torch.device) -> None:
        """`first`: device of the inputs; `last`: device of the output layer."""
        self.body, self.config = body, body.config
        self._first, self._last = first, last

    @property
    def forward(self) -> Any:
        """The body's own forward pass, for those who ask what it takes."""
        return self.body.forward

    def __call__(self, **inputs: Any) -> Any:
        """The body's last hidden states, as `last_hidden_state`."""
        moved = {name: _moved(value, self._first) for name, value in inputs.items()}
        return SimpleNamespace(last_hidden_state=self.body(**moved).last_hidden_state.to(self._last))


def spread_body(model: Any, body: Any, last: torch.device) -> Any:
    """The body of a model, which moves inputs and states where the model's parts lie on several devices."""
    return SpreadBody(body, input_device(model), last) if is_spread(model) else body


def _moved(value: Any, device: torch.device) -> Any:
    return value.to(device) if hasattr(value, "to") else value


def _hooks(module: Any) -> Iterator[Any]:
    """accelerate's hooks on one module, one by one."""
    hook = getattr(module, "_hf_hook", None)
    if hook is not None:
        yield from getattr(hook, "hooks", [hook])


def _stored(module: Any, name: str) -> torch.Tensor | None:
    """A module's tensor from the CPU or the disk, where a hook brings it from there."""
    for hook in _hooks(module):
        if getattr(hook, "offload", False) and getattr(hook, "weights_map", None) is not None:
            with suppress(KeyError):
                return hook.weights_map[name]  # type: ignore[no-any-return]
    return None


def _execution_device(module: Any) -> Any:
    """The device to which accelerate brings a module's inputs and weights; None where it does not."""
    import torch

    for hook in _hooks(module):
        device = getattr(hook, "execution_device", None)
        if device is not None:
            return torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
    return None
