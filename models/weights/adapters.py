"""Adapters on top of a teacher (LoRA and its relatives, by peft): found, identified by digests, and merged in memory.

    model = merged(model, Adapter("my/lora"))

A merged model has plain linear layers and costs what its base costs. Adapters that cannot be merged are refused: soft prompts,
and those of one of two tied weights, where merging would change the other as well.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from kd.common.disk.digests import file_sha256
from kd.common.errors import TeacherError
from kd.common.extras import needed
from kd.common.files import read_object
from kd.common.paths import as_path

CONFIG = "adapter_config.json"
"""The file by which peft knows an adapter."""
WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
"""Files of an adapter's weights, in the order in which peft looks for them."""
CHANGES_NO_NUMBER = (
    "auto_mapping",
    "base_model_name_or_path",
    "inference_mode",
    "loftq_config",
    "megatron_config",
    "megatron_core",
    "peft_version",
    "revision",
    "runtime_config",
    "task_type",
)
"""Entries that are left out of the digest of an adapter's configuration."""


@dataclass(frozen=True)
class Adapter:
    """An adapter by name."""

    name: str
    """A folder that peft wrote, or a hub id."""
    revision: str | None = None
    """Branch, tag or commit of a hub id."""

    @property
    def local(self) -> bool:
        """Whether the adapter is a folder on this machine."""
        return as_path(self.name).is_dir()

    def folder(self) -> Path:
        """The adapter's folder, fetched from the hub where it is a hub id. Raises TeacherError."""
        if self.local:
            return as_path(self.name)
        from huggingface_hub import snapshot_download

        patterns = [CONFIG, *WEIGHTS]
        try:
            return Path(snapshot_download(self.name, revision=self.revision, allow_patterns=patterns))
        except Exception as error:  # the hub's client raises many unrelated types
            raise TeacherError(
                "the adapter cannot be found",
                where=self.name,
                here=f"no folder of this name in {Path.cwd()}",
                found=f"{type(error).__name__}: {(str(error).strip() or '-').splitlines()[0]}",
                expected="a folder that peft's save_pretrained wrote, or a hub id",
            ) from error

    def pinned(self) -> Adapter:
        """The adapter with a branch or tag of the hub replaced by its commit."""
        return self if self.local else replace(self, revision=self.folder().name)

    def identity(self) -> dict[str, Any]:
        """What of an adapter can change a number: its settings as a digest, and the SHA-256 of its weights."""
        folder = self.folder()
        settings = {k: v for k, v in _settings(folder, self.name).items() if k not in CHANGES_NO_NUMBER}
        digest = hashlib.blake2b(json.dumps(settings, sort_keys=True).encode(), digest_size=16).hexdigest()
        weights = _weights(folder, self.name)
        return {"config": digest, "weights": {weights.name: file_sha256(weights)}}

    def base(self) -> str | None:
        """The model that the adapter says it was trained on."""
        base = _settings(self.folder(), self.name).get("base_model_name_or_path")
        return str(base) if base else None

    def other_base(self, model: str) -> str | None:
        """The model that the adapter says it was trained on, where it may be another than `model`; None where it is the same.

        A copy of a model has another path and owner, so the last parts of the names are compared, and the weights where both
        are folders.
        """
        base = self.base()
        if base is None or as_path(base).name.lower() == as_path(model).name.lower():
            return None
        return None if _same_weights(as_path(base), as_path(model)) else base


def merged(model: Any, adapter: Adapter) -> Any:
    """The model with the adapter merged into its weights; `model` itself is changed. Raises TeacherError."""
    with needed("peft", "an adapter", where=adapter.name, instead="a merged model"):
        import peft
    from transformers.pytorch_utils import Conv1D

    folder = adapter.folder()
    _settings(folder, adapter.name), _weights(folder, adapter.name)
    _refuse_offloaded(model, adapter)
    try:
        config = peft.PeftConfig.from_pretrained(folder)
        _refuse_soft_prompts(config, adapter)
        config.base_model_name_or_path = None  # peft would warn that a copy of it has another name
        if hasattr(config, "fan_in_fan_out"):  # GPT-2's layers; an adapter trained on quantised ones says otherwise
            config.fan_in_fan_out = any(isinstance(module, Conv1D) for module in model.modules())
        wrapped = peft.get_peft_model(model, config)
        stored = peft.load_peft_weights(str(folder), device="cpu")
        _refuse_other_weights(
            set(peft.get_peft_model_state_dict(wrapped, save_embedding_layers=False)), set(stored), adapter
        )
        _refuse_tied(model, wrapped, adapter)
        peft.set_peft_model_state_dict(wrapped, stored)
        return wrapped.merge_and_unload(safe_merge=True)
    except (ValueError, RuntimeError, TypeError, AttributeError, KeyError, OSError) as error:
        reason = (str(error).strip() or "-").splitlines()
        raise TeacherError(
            "the adapter does not fit the model",
            where=adapter.name,
            found=f"{type(error).__name__}: {reason[0]}" + (f" {reason[1].strip()}" if len(reason) > 1 else ""),
            trained_on=adapter.base(),
            expected="an adapter of this model, of a kind that peft can merge",
        ) from error


def _same_weights(one: Path, other: Path) -> bool:
    """Whether two folders hold files of weights of the same names and bytes."""
    weights = [
        {file.name: file_sha256(file) for file in sorted(folder.glob("*.safetensors"))} if folder.is_dir() else {}
        for folder in (one, other)
    ]
    return bool(weights[0]) and weights[0] == weights[1]


def _settings(folder: Path, name: str) -> dict[str, Any]:
    """The adapter's configuration. Raises TeacherError where there is none."""
    if not (folder / CONFIG).is_file():
        raise TeacherError(
            "this is not an adapter",
            where=name,
            found=f"no {CONFIG}",
            expected="a folder that peft's save_pretrained wrote",
        )
    return read_object(folder / CONFIG)


def _weights(folder: Path, name: str) -> Path:
    """The file of the adapter's weights. Raises TeacherError where there is none."""
    for weights in WEIGHTS:
        if (folder / weights).is_file():
            return folder / weights
    raise TeacherError("the adapter has no weights", where=name, expected=" or ".join(WEIGHTS))


def _refuse_offloaded(model: Any, adapter: Adapter) -> None:
    if any(parameter.device.type == "meta" for parameter in model.parameters()):
        raise TeacherError(
            "an adapter cannot be merged into weights that are offloaded",
            where=adapter.name,
            found="a device map with weights on the CPU or the disk",
            try_="a map of GPUs alone; or merge with peft (merge_and_unload, save_pretrained) and the merged model",
        )


def _refuse_soft_prompts(config: Any, adapter: Adapter) -> None:
    if config.is_prompt_learning:
        raise TeacherError(
            "an adapter of soft prompts cannot be merged",
            where=adapter.name,
            found=str(config.peft_type).rpartition(".")[2],
            expected="adapters in the layers, such as LoRA",
        )


def _refuse_other_weights(expected: set[str], stored: set[str], adapter: Adapter) -> None:
    """peft would warn about weights that it does not find, and leave those parts of the adapter without effect."""
    for headline, names in (
        ("the adapter lacks weights for this model", expected - stored),
        ("the adapter holds weights that this model has no place for", stored - expected),
    ):
        if names:
            raise TeacherError(
                headline,
                where=adapter.name,
                found=f"{len(names)}, such as {min(names)}",
                trained_on=adapter.base(),
                expected="an adapter of this model",
            )


def _refuse_tied(model: Any, wrapped: Any, adapter: Adapter) -> None:
    """Merging into one of two tied weights would change the other, which the adapter was not trained with."""
    tied = {
        name.rpartition(".")[0]
        for pair in (getattr(model, "all_tied_weights_keys", None) or {}).items()
        for name in pair
    }
    prefix = "base_model.model."
    for path, module in wrapped.named_modules():
        adapted = hasattr(module, "merged_adapters") or hasattr(module, "modules_to_save")
        if adapted and path.removeprefix(prefix) in tied:
            raise TeacherError(
                "the adapter changes one of two tied weights, so that it cannot be merged",
                where=adapter.name,
                found=path.removeprefix(prefix),
                expected="an adapter of layers whose weights are their own",
            )
