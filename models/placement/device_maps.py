"""Device maps: which device holds which part of a model, as accelerate understands them.

    Placement.of("auto", max_memory={"0": "20GiB", "cpu": "60GiB"})
    Placement.of("map.yaml")                  # module: device, as `model.hf_device_map` has it

A device is the number of a GPU, `cpu` or `disk`. What lies on the disk, and on the CPU where there is a GPU too, is brought to
the device that computes for every forward pass. A map says nothing of what the model predicts, so it is no part of its identity.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kd.common.byte_sizes import byte_count
from kd.common.errors import DataError, unknown_name
from kd.common.paths import as_path
from kd.common.strangers.yaml_file import read_mapping

STRATEGIES = ("auto", "balanced", "balanced_low_0", "sequential")
"""Ways in which accelerate makes a map by itself."""
Device = int | str
"""The number of a GPU, `cpu`, or `disk`."""


@dataclass(frozen=True)
class Placement:
    """Where the weights of a model are put when it is loaded. Creating one loads nothing."""

    device_map: str | Mapping[str, Device] | None = None
    """One of STRATEGIES, or module -> device; None puts the whole model on one device."""
    max_memory: Mapping[Device, int] | None = None
    """Device -> the most bytes of weights that a strategy puts there; devices that are not named hold none. None: what is free."""
    offload_folder: Path | None = None
    """Folder for weights on the disk that cannot be read from the checkpoint itself."""
    tensor_parallel: int = 1
    """Number of processes that hold the model together, see `kd.models.placement.tensor_parallel`."""

    @classmethod
    def of(
        cls,
        device_map: str | os.PathLike[str] | Mapping[str, Any] | None = None,
        max_memory: Mapping[Any, Any] | None = None,
        offload_folder: str | os.PathLike[str] | None = None,
        tensor_parallel: int = 1,
    ) -> Placement:
        """What people write, checked: a strategy, a file or a mapping; sizes such as `20GiB`. Raises DataError."""
        if device_map is not None and tensor_parallel > 1:
            raise DataError(
                "a device map and tensor parallelism exclude each other",
                found=f"--device-map {device_map} with --tensor-parallel {tensor_parallel}",
            )
        if device_map is None:
            for name, value in (("--max-memory", max_memory), ("--offload-folder", offload_folder)):
                if value is not None:
                    raise DataError(f"{name} does nothing without a device map", found=name, try_="--device-map auto")
            return cls(tensor_parallel=tensor_parallel)
        folder = None if offload_folder is None else as_path(offload_folder)
        memory = None if max_memory is None else memory_of(max_memory)
        if isinstance(device_map, str) and device_map in STRATEGIES:
            return cls(device_map, memory, folder)
        if memory is not None:
            raise DataError(
                "--max-memory does nothing with a map that names every device",
                found=device_map if isinstance(device_map, str) else "a map",
                expected=f"one of {', '.join(STRATEGIES)}",
            )
        return cls(map_of(device_map), None, folder)

    @property
    def spread(self) -> bool:
        """Whether there is a map."""
        return self.device_map is not None

    def arguments(self) -> dict[str, Any]:
        """Arguments of transformers' `from_pretrained`."""
        memory = None if self.max_memory is None else dict(self.max_memory)
        return {"device_map": self.device_map, "max_memory": memory, "offload_folder": self.offload_folder}


def map_of(given: str | os.PathLike[str] | Mapping[str, Any]) -> dict[str, Device]:
    """A map from a YAML or JSON file, or from a mapping. Raises DataError."""
    where: object = None
    if not isinstance(given, Mapping):
        where = as_path(given)
        if not as_path(given).is_file():
            raise DataError(
                "there is no such device map",
                found=f"--device-map {os.fspath(given)}",
                expected=f"{', '.join(STRATEGIES)}, or a YAML or JSON file of module: device",
            )
        given = read_mapping(as_path(given), "device map")
    if not given:
        raise DataError("the device map is empty", where=where, expected='module: device, such as "model.layers.0": 0')
    return {str(module): device_of(device, where=where, module=str(module)) for module, device in given.items()}


def device_of(given: Any, *, where: object = None, module: str | None = None) -> Device:
    """`0`, `"0"` or `cuda:0` as 0; `cpu` and `disk` as they are. Raises DataError."""
    text = str(given).removeprefix("cuda:")
    if text == "cuda":
        return 0
    if text.isdecimal() and not isinstance(given, bool):
        return int(text)
    if text in ("cpu", "disk"):
        return text
    raise DataError(
        "a device map names a device that there is not",
        where=where,
        module=module,
        found=given,
        expected="the number of a GPU, cpu, or disk",
    )


def memory_from(text: str) -> dict[str, str]:
    """`0=20GiB,cpu=60GiB` as a mapping. Raises ValueError."""
    pairs = [item.partition("=") for item in text.split(",") if item.strip()]
    if not pairs or any(not device.strip() or not size.strip() for device, _, size in pairs):
        raise ValueError("DEVICE=SIZE,…, e.g. 0=20GiB,cpu=60GiB")
    if len({device.strip() for device, _, _ in pairs}) < len(pairs):
        raise ValueError("each device once")
    return {device.strip(): size.strip() for device, _, size in pairs}


def memory_of(given: Mapping[Any, Any]) -> dict[Device, int]:
    """Sizes of devices in bytes. Raises DataError."""
    memory = {device_of(device): byte_count(str(size)) for device, size in given.items()}
    if "disk" in memory:
        raise DataError(
            "the disk has no limit in a device map",
            found="--max-memory disk=…",
            expected="GPUs and cpu; what they do not hold lies on the disk",
        )
    return memory


def refuse_missing_gpus(placement: Placement) -> None:
    """Raise DataError where a map or its limits name a GPU that this machine lacks."""
    import torch

    named: set[Device] = set(placement.max_memory or ())
    if isinstance(placement.device_map, Mapping):
        named |= set(placement.device_map.values())
    count = torch.cuda.device_count()
    missing = sorted(device for device in named if isinstance(device, int) and device >= count)
    if missing:
        raise DataError(
            "the device map names a GPU that this machine lacks",
            found=f"GPU {', '.join(map(str, missing))}",
            expected=f"GPUs 0 to {count - 1}, cpu or disk" if count else "cpu or disk: there is no GPU here",
        )


def refuse_other_modules(placed: Mapping[str, Device], model: Any) -> None:
    """Raise DataError unless a map's modules are the model's, side by side, and hold every weight, tied ones on one device.

    accelerate would put what a map forgets on the CPU and pass over names that it does not know, and fail in the first forward
    pass where one of two tied weights is offloaded alone.

    model   any model of the same class and configuration; its weights are not looked at
    """
    tied: Mapping[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    parameters = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    known = {name for name, _ in model.named_modules()} | set(parameters)
    for name in placed:
        if name and name not in known:
            raise unknown_name("module of the device map", name, _around(name, known))
    for name, device in placed.items():
        around = _home({other: where for other, where in placed.items() if other != name}, name)
        if around not in (None, device):
            raise DataError(
                "a module of the device map lies inside another one",
                found=f"{name} on {_spelled(device)}, and what holds it on {_spelled(around)}",
                expected="modules side by side",
            )
    left = [name for name in parameters if _home(placed, name) is None]
    if left:
        raise DataError(
            "the device map leaves out weights of the model",
            found=f"{len(left)} weights, such as {left[0]}",
            expected="a device for every module",
        )
    for one, other in tied.items():
        apart = [f"{name} on {_spelled(_home(placed, name))}" for name in (one, other)]
        if _home(placed, one) != _home(placed, other):
            raise DataError(
                "the device map parts two modules that share one weight",
                found=" and ".join(apart),
                expected="both on one device",
            )


def bytes_by_device(model: Any) -> dict[str, int]:
    """Device -> bytes of weights there, GPUs first; empty for a model that lies on one device."""
    placed: Mapping[str, Device] = getattr(model, "hf_device_map", None) or {}
    if len(set(placed.values())) < 2 and "disk" not in placed.values():
        return {}
    sizes: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        home = _home(placed, name)
        device = parameter.device if home is None else home
        sizes[_spelled(device)] = sizes.get(_spelled(device), 0) + parameter.numel() * parameter.element_size()
    return dict(sorted(sizes.items(), key=lambda item: (item[0] == "disk", item[0] == "cpu", item[0])))


def _home(placed: Mapping[str, Device], name: str) -> Device | None:
    """The device of a weight: that of the innermost module of the map that holds it."""
    homes = [module for module in placed if not module or name == module or name.startswith(f"{module}.")]
    return placed[max(homes, key=len)] if homes else None


def _spelled(device: Any) -> str:
    return f"cuda:{device}" if isinstance(device, int) else str(device)


def _around(name: str, known: Collection[str]) -> list[str]:
    """The modules and weights that lie where a name that is not among them should."""
    above = name.rpartition(".")[0]
    while above not in known and above:
        above = above.rpartition(".")[0]
    return [other for other in known if other and other.rpartition(".")[0] == above]
