"""Load a language model (causal or encoder-decoder) that a `ModelRequest` names.

Language models are loaded here and nowhere else; loading in 4 or 8 bits is in `kd.models.weights.quantised`.
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kd.common.disk.digests import refuse_damage
from kd.common.errors import DataError
from kd.common.shown_text import without_secrets
from kd.models.families.text_model import loader_of, refuse_missing_weights
from kd.models.model_config import (
    adapter_error,
    cannot_load,
    load_config,
    refuse_classifier,
    resolve_dtype,
    stored_config,
)
from kd.models.model_request import ModelRequest, resolve_device
from kd.models.placement.device_maps import refuse_missing_gpus, refuse_other_modules
from kd.models.placement.tensor_parallel import all_at_once, group_for, lead, sharding
from kd.models.weights.adapters import Adapter, merged
from kd.models.weights.quantised import QuantisedShare, load_quantised, planned_share, refuse_mostly_unquantised
from kd.models.weights.quantised_checkpoints import (
    cannot_run,
    make_plain,
    refuse_quantising_again,
    stored_method,
    unpack,
)

if TYPE_CHECKING:
    import torch

Model = Any
"""A `PreTrainedModel` with an output layer."""

STATES = (".jsonl", ".pt", ".pth")
"""Endings of files beside the weights that are no part of the model: a run's records, and a checkpoint's states."""


def load_model(request: ModelRequest) -> Model:
    """Load the model in evaluation mode on its device. Raises TeacherError saying what failed."""
    import torch

    device, dtype = resolve_device(request.device), resolve_dtype(request)
    refuse_damaged_model(request)
    config = load_config(request)
    refuse_classifier(request, config)
    if request.placement.tensor_parallel > 1:
        return _load_share(request, device, dtype)
    refuse_quantising_again(config, request.name, request.bits)
    if request.bits is not None:
        model = _load_quantised(request, request.bits, device, dtype)
    elif request.random_shape is not None:
        with torch.random.fork_rng(devices=[] if device == "cpu" else None), torch.device(device):
            torch.manual_seed(request.seed)
            model = random_model(config, dtype)
            if request.attention is not None:
                _set_attention(model, request)
    else:
        model = _load_files(request, device, dtype)
    if request.adapter is not None:
        model = merged(model, request.adapter)
        _warn_of_another_base(request.adapter, request.name)
    if request.target_lang is not None:
        model.config.decoder_start_token_id = config.decoder_start_token_id
    return model.eval()


def _warn_of_another_base(adapter: Adapter, model: str) -> None:
    base = adapter.other_base(model)
    if base is not None:
        message = f"the adapter {adapter.name} says that it was trained on {base}, and it was merged into {model}; "
        warnings.warn(without_secrets(message + "check that these have the same weights"), stacklevel=1)


def _load_share(request: ModelRequest, device: str, dtype: torch.dtype) -> Model:
    """This process's share of a model. Its group's leader has the others load theirs, and tells them of every call."""
    group = group_for(request.placement.tensor_parallel)
    options = sharding(group.size, _on_meta(request))
    if group.leads:
        group.tell("load", request)
    with all_at_once(group):
        model = _load_files(request, device, dtype, **options)
    if group.leads:
        lead(model, group)
    return model.eval()


def _load_files(request: ModelRequest, device: str, dtype: torch.dtype, **sharded: Any) -> Model:
    """A model from its files, on one device, or as its device map or its group of processes has it."""
    stored = stored_config(request)
    auto_class, options = loader_of(stored)
    options = {**options, **sharded, **_attention(request)}
    quantised = stored_method(stored) is not None
    if request.adapter is not None and quantised:
        raise DataError(
            "an adapter is merged into plain weights alone",
            where=request.adapter.name,
            found=f"a model whose weights are stored as {stored_method(stored)}",
            try_="the adapter on the plain weights of this model",
        )
    if request.placement.spread:
        refuse_unusable_map(request)
        options = {**options, **request.placement.arguments()}
    elif quantised:  # such a model is not moved once it is loaded
        options = {**options, "device_map": {"": device}}
    try:
        model, loading_info = auto_class.from_pretrained(
            request.path,
            revision=request.revision,
            dtype=dtype,
            trust_remote_code=False,
            output_loading_info=True,
            **options,
        )
    except Exception as error:
        if "offload_folder" in str(error):
            raise DataError(
                "weights on the disk need a folder of their own",
                where=request.name,
                found="a checkpoint that is not in safetensors, or whose weights are converted while they are read",
                try_="--offload-folder FOLDER",
            ) from error
        raise (cannot_run(stored, request.name, device, error) if quantised else cannot_load(request, error)) from error
    if getattr(model, "_hf_peft_config_loaded", False):  # of a hub id, which was not seen before
        raise adapter_error(request, None)
    refuse_missing_weights(request.name, model, loading_info)
    if quantised:
        unpack(model)
        make_plain(model, stored, dtype)
        return model
    return model if request.placement.spread or sharded else model.to(device)


def _attention(request: ModelRequest) -> dict[str, Any]:
    return {} if request.attention is None else {"attn_implementation": request.attention}


def _set_attention(model: Model, request: ModelRequest) -> None:
    try:
        model.set_attn_implementation(request.attention)
    except (ValueError, ImportError, OSError) as error:
        raise cannot_load(request, error) from error


def refuse_unusable_map(request: ModelRequest) -> None:
    """Raise DataError for a map of GPUs that are not here, or of modules that the model does not have. Reads no weights.

    Raises TeacherError for a model that cannot be shared out among processes.
    """
    if request.placement.tensor_parallel > 1:
        sharding(request.placement.tensor_parallel, _on_meta(request))
    refuse_missing_gpus(request.placement)
    placed = request.placement.device_map
    if isinstance(placed, Mapping):
        refuse_other_modules(placed, _on_meta(request))


def refuse_damaged_model(request: ModelRequest) -> None:
    """Raise DamagedFilesError for a folder of ours whose files are not what was written; other models say nothing of this."""
    if request.local:
        refuse_damage(Path(request.path), lambda name: not name.endswith(STATES))


def random_model(config: Any, dtype: torch.dtype) -> Model:
    """A model with random weights. Its output layer is untied where the configuration says so.

    transformers 5 stores T5Config(tie_word_embeddings=False) as True with `scale_decoder_outputs=False`, and ties
    a randomly initialised head to the embedding: `flan-t5-small` would have 60.5 M parameters instead of 77.0 M.
    """
    import torch

    model = loader_of(config)[0].from_config(config, dtype=dtype)
    if config.model_type == "t5" and not getattr(config, "scale_decoder_outputs", config.tie_word_embeddings):
        embedding = model.get_input_embeddings().weight
        model.lm_head.weight = torch.nn.Parameter(torch.empty_like(embedding))
        torch.nn.init.normal_(model.lm_head.weight, std=config.d_model**-0.5)
    if dtype == torch.float16:  # from_pretrained does the same, because T5's feed-forward layers overflow
        for name, module in model.named_modules():
            if name.rpartition(".")[2] in (model._keep_in_fp32_modules or ()):
                module.float()
    return model


def _load_quantised(request: ModelRequest, bits: int, device: str, dtype: torch.dtype) -> Model:
    """A model in 4 or 8 bits. bitsandbytes quantises while it loads files, so random weights are saved to a temporary folder."""
    auto_class, options = loader_of(stored_config(request))
    options = {**options, **_attention(request)}
    whole = {"device_map": {"": device}}
    if request.random_shape is None:
        options = {**options, **(request.placement.arguments() if request.placement.spread else whole)}
        path, revision, name = request.path, request.revision, request.name
        return load_quantised(auto_class, path, revision, dtype, device, bits=bits, name=name, **options)
    with tempfile.TemporaryDirectory() as folder:
        plain = replace(request, load_in_4bit=False, load_in_8bit=False, device="cpu")
        load_model(plain).save_pretrained(folder)
        return load_quantised(auto_class, folder, None, dtype, device, bits=bits, name=request.name, **whole)


def parameter_count(request: ModelRequest) -> int:
    """Number of parameters of a model, counted on the meta device: no weights are created or read."""
    return sum(p.numel() for p in _on_meta(request).parameters())


def quantised_share(request: ModelRequest) -> QuantisedShare:
    """What bitsandbytes will quantise of a model, found on the meta device. Raises TeacherError where it is too little."""
    share = planned_share(_on_meta(request))
    refuse_mostly_unquantised(share, request.name, request.bits or 4)
    return share


def _on_meta(request: ModelRequest) -> Model:
    import torch

    stored = stored_config(request)
    with torch.device("meta"):
        return random_model(loader_of(stored)[1].get("config", stored), torch.float32)
