"""The identity of a model as a few digests: the teacher's part of a cache's fingerprint.

A model that has a name is identified without loading its weights: `model_identity`. Weight files are identified by their
SHA-256, read from a local folder or from the hub's file list; a hub id by the commit that its branch or tag points to.
`pinned` makes later loads use that commit. A model object in memory is identified by reading its weights:
`parameters_digest`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from kd.common.disk.digests import file_sha256
from kd.common.errors import DataError
from kd.common.files import MAX_JSON_BYTES
from kd.common.strangers.plain_files import read_plain
from kd.models.families.logit_transform import changed_numbers
from kd.models.model_config import cannot_load, load_config, resolve_dtype
from kd.models.model_request import ModelRequest, resolve_device
from kd.models.placement.spread_models import offloaded
from kd.models.weights.quantised_checkpoints import computed_as

BITSANDBYTES = {4: "bitsandbytes-nf4-double", 8: "bitsandbytes-int8"}
"""Bits -> what the identity of a model calls them that bitsandbytes quantises while it loads it."""
IN_MEMORY = "in memory"
"""What the identity of a model calls it that was never loaded by name."""
CHANGES_NO_NUMBER = ("transformers_version", "_name_or_path", "dtype", "torch_dtype", "use_cache", "architectures")
"""Entries that are left out of a configuration's digest. The identity names dtype and class beside the digest."""
WITH_FINAL_BIAS = (
    "bart",
    "bigbird_pegasus",
    "blenderbot",
    "blenderbot-small",
    "led",
    "marian",
    "mbart",
    "mvp",
    "pegasus",
    "plbart",
)
"""Model types that add `final_logits_bias` to their logits. Caches whose values lack it have the identity without this entry."""


def pinned(request: ModelRequest) -> ModelRequest:
    """The request with a hub id's branch or tag replaced by its commit, so that everything is loaded from one commit."""
    if request.adapter is not None:
        request = replace(request, adapter=request.adapter.pinned())
    if request.local or request.random_shape is not None:
        return request
    from huggingface_hub import HfApi

    try:
        commit = HfApi().model_info(request.name, revision=request.revision).sha
    except Exception as online:  # the hub's client raises many unrelated types
        commit = _snapshot(request, online).name
    return replace(request, revision=commit)


def _snapshot(request: ModelRequest, online: Exception) -> Path:
    """The downloaded folder of a hub id, named by its commit. Raises TeacherError with the `online` error where there is none."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(request.name, revision=request.revision, local_files_only=True))
    except Exception:  # it is not on this disk either, so the user needs to know why the hub did not answer
        raise cannot_load(request, online) from online


def model_identity(request: ModelRequest) -> dict[str, Any]:
    """Everything about the (pinned) model that can change its numbers, without loading weights.

    A local folder is identified by its weights and configuration, not by its path.
    """
    import torch

    config = load_config(request)
    identity: dict[str, Any] = {
        "model": "local" if request.local else request.name,
        "model_class": (config.architectures or [type(config).__name__])[0],
        "dtype": str(resolve_dtype(request)).removeprefix("torch."),
        "quantization": BITSANDBYTES[request.bits] if request.bits else computed_as(config) or "none",
        "config": config_digest(config),
        **_final_bias(config),
    }
    if request.adapter is not None:
        identity["adapter"] = request.adapter.identity()
    if request.random_shape is not None:  # random numbers depend on torch's version and on the kind of device
        device = "cpu" if request.bits is not None else resolve_device(request.device).partition(":")[0]
        return identity | {"seed": request.seed, "torch": torch.__version__.partition("+")[0], "device": device}
    return identity | weight_digests(request)


def in_memory_identity(model: Any, digest: str) -> dict[str, Any]:
    """Everything about a model object that can change its numbers; `digest` is its `parameters_digest`."""
    quantization = getattr(model.config, "quantization_config", None)
    return {
        "model": IN_MEMORY,
        "model_class": type(model).__name__,
        "dtype": str(model.dtype).removeprefix("torch."),
        "quantization": "none" if quantization is None else str(getattr(quantization, "quant_method", "other")),
        "config": config_digest(model.config),
        "parameters": digest,
        **_final_bias(model.config),
        **_changed_numbers(model),
    }


def _final_bias(config: Any) -> dict[str, Any]:
    return {"final_logits_bias": "added"} if config.model_type in WITH_FINAL_BIAS else {}


def _changed_numbers(model: Any) -> dict[str, Any]:
    changed = changed_numbers(model)
    return {"logit_numbers": changed} if changed else {}


def parameters_digest(model: Any) -> str:
    """SHA-256 hex of a model's parameters and buffers: their names, shapes, dtypes and bytes; and how its adapters are set.

    The parts of quantised weights (packed numbers, scales, tables) count like any tensor. Tied weights count once, under the
    first of their names. Offloaded weights are read from where they lie. Two models of one digest and one configuration
    give the same numbers; a weight that was changed in place gives another digest. Every byte is read, and tensors of a GPU
    are copied to the host one at a time: docs/log.md has how fast that is. Raises DataError for weights that lie nowhere.
    """
    digest = hashlib.sha256()
    seen: set[tuple[Any, ...]] = set()
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    for name, tensor in sorted(_named_tensors(model).items()):
        memory: tuple[Any, ...]
        if tensor.device.type == "meta":
            # by name: the memory of one that is read is free for the next
            memory = ("offloaded", tied.get(name, name))
            if memory in seen:
                continue
            tensor = _read(model, name)
        else:
            tensor = tensor.detach()
            memory = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        if tensor.numel() and memory in seen:
            continue
        seen.add(memory)
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(_bytes_of(tensor))
    for line in _adapter_lines(model):
        digest.update(line.encode())
    return digest.hexdigest()


def _read(model: Any, name: str) -> Any:
    """The tensor of this name from the CPU or the disk. Raises DataError where it is in no place that accelerate knows."""
    tensor = offloaded(model, name)
    if tensor is None:
        raise DataError(
            "a weight of the model is not in memory",
            where=name,
            found="a tensor on the meta device",
            expected="a model whose weights are loaded, or offloaded by accelerate",
        )
    return tensor.detach()


def _named_tensors(model: Any) -> dict[str, Any]:
    """Name -> parameter or buffer; of rotary frequencies that grow with the text, those the model began with.

    A tensor that is made of others, as those of quantisation libraries are, is replaced by its parts: it has no memory of its
    own, so that it could neither be read nor be told from another.
    """
    import torch

    tensors = {n: t for n, t in model.state_dict(keep_vars=True).items() if isinstance(t, torch.Tensor)}
    for path, module in model.named_modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name.endswith("inv_freq") and _grows(module, name):
                buffer = getattr(module, name.removesuffix("inv_freq") + "original_inv_freq", buffer)
            tensors[f"{path}.{name}" if path else name] = buffer
    return {part: t for name, tensor in tensors.items() for part, t in _parts(name, tensor)}


def _grows(module: Any, name: str) -> bool:
    """Whether the forward pass itself changes these rotary frequencies, by the length of the text."""
    kind = getattr(module, "rope_type", "")
    if isinstance(kind, Mapping):
        kind = kind.get(name.removesuffix("_inv_freq"), "")
    return "dynamic" in str(kind) or kind == "longrope"


def _parts(name: str, tensor: Any) -> Iterator[tuple[str, Any]]:
    from torch.utils._python_dispatch import is_traceable_wrapper_subclass

    if not is_traceable_wrapper_subclass(tensor):
        yield name, tensor
        return
    names, context = tensor.__tensor_flatten__()
    for inner in names:
        yield from _parts(f"{name}.{inner} of {type(tensor).__name__} {context}", getattr(tensor, inner))


def _adapter_lines(model: Any) -> Iterator[str]:
    """What decides, beside their weights, how adapters count: which are active, merged and off, and their scales."""
    for path, module in model.named_modules():
        if (
            hasattr(module, "active_adapters")
            and hasattr(module, "disable_adapters")
            and hasattr(module, "merged_adapters")
        ):
            scales = sorted(getattr(module, "scaling", {}).items())
            state = (list(module.active_adapters), bool(module.disable_adapters), list(module.merged_adapters), scales)
            yield f"{path} adapters {state}\n"


def _bytes_of(tensor: Any) -> Any:
    """The tensor's bytes in row-major order, as a buffer on the host."""
    import torch

    return tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy() if tensor.numel() else b""


def config_digest(config: Any) -> str:
    """Digest of a configuration's entries that differ from its class's defaults, which change with library versions."""
    settings = json.loads(config.to_json_string(use_diff=True))
    kept = {key: value for key, value in settings.items() if key not in CHANGES_NO_NUMBER}
    return hashlib.blake2b(json.dumps(kept, sort_keys=True).encode(), digest_size=16).hexdigest()


def weight_digests(request: ModelRequest) -> dict[str, Any]:
    """`{"revision": commit or "local", "weights": {file: sha256}}` of the files that transformers would load."""
    if request.local:
        return {"revision": "local", "weights": _folder_digests(Path(request.path), request.name)}
    from huggingface_hub import HfApi, hf_hub_download

    try:
        info = HfApi().model_info(request.name, revision=request.revision, files_metadata=True)
    except Exception as online:  # as in `pinned`
        folder = _snapshot(request, online)
        return {"revision": folder.name, "weights": _folder_digests(folder, request.name)}
    files = {s.rfilename: s for s in info.siblings or []}
    names = weight_files(
        files, lambda name: index_text(Path(hf_hub_download(request.name, name, revision=info.sha))), request.name
    )
    # a file outside large-file storage has no SHA-256 on the hub; its git blob identifies it
    digests = {n: lfs.sha256 if (lfs := files[n].lfs) else f"git:{files[n].blob_id}" for n in names}
    return {"revision": info.sha, "weights": digests}


def _folder_digests(folder: Path, name: str) -> dict[str, str]:
    files = weight_files([p.name for p in folder.iterdir()], lambda index: index_text(folder / index), name)
    return {f: file_sha256(folder / f) for f in files}


def weight_files(names: Collection[str], read: Callable[[str], str], where: str) -> list[str]:
    """The files out of `names` that `from_pretrained` loads: safetensors before PyTorch's, one file before an index.

    `read` returns the text of a file. Raises DataError where there are none, or where an adapter would change them.
    """
    # transformers would load the adapter silently, and the digests of the weights would not show it
    adapters = sorted({"adapter_config.json", "adapter_model.safetensors"} & set(names))
    if adapters:
        raise DataError(
            "an adapter lies beside the weights",
            where=where,
            found=", ".join(adapters),
            expected="a merged model",
            try_="peft's merge_and_unload, then save_pretrained",
        )
    for whole in ("model.safetensors", "pytorch_model.bin"):
        if whole in names:
            return [whole]
        if f"{whole}.index.json" in names:
            try:
                files = sorted(set(json.loads(read(f"{whole}.index.json"))["weight_map"].values()))
            except (ValueError, LookupError, TypeError, AttributeError) as error:
                raise DataError("the index of the weights cannot be read", where=where, found=error) from error
            missing = [f for f in files if f not in names]
            if missing:
                raise DataError("weight files are missing", where=where, found=", ".join(missing[:5]))
            return files
    raise DataError(
        "no weight files found",
        where=where,
        found=", ".join(sorted(names)[:8]) or "an empty folder",
        expected="model.safetensors, or its index and shards",
    )


def index_text(path: Path) -> str:
    """The text of an index of weight files. Raises DataError where it is not a plain file, or too large."""
    try:
        return read_plain(path, MAX_JSON_BYTES).decode(errors="replace")
    except OSError as error:
        raise DataError("the index of the weights cannot be read", where=path, found=error.strerror) from error
