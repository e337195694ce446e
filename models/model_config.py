"""A model's configuration and tokenizer, without its weights: what kind of model it is, and why it cannot be used."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from kd.common.errors import DataError, TeacherError
from kd.common.files import read_object
from kd.common.paths import as_path
from kd.common.strangers.hub_cache import nearest_cached
from kd.common.strangers.plain_files import refuse_special_files
from kd.common.synonyms import nearest_name
from kd.models.families.encoder_layout import set_languages, start_language
from kd.models.families.text_model import text_config
from kd.models.model_request import ModelRequest, resolve_device
from kd.models.shapes import SHAPES
from kd.models.tokenizer import EMBEDDED, Tokenizer, load_tokenizer

if TYPE_CHECKING:
    import torch

ADAPTER = "adapter_config.json"
"""The file by which peft and transformers know an adapter."""


def load_config(request: ModelRequest) -> Any:
    """The text model's configuration, without reading weights. Raises TeacherError saying what failed.

    Where `target_lang` decides the token that the decoder starts from, the configuration says so.
    """
    config = text_config(stored_config(request))
    if request.target_lang is not None:
        start = start_language(load_request_tokenizer(request), config.model_type)
        config.decoder_start_token_id = getattr(config, "decoder_start_token_id", None) if start is None else start
    return config


def stored_config(request: ModelRequest) -> Any:
    """The configuration of the whole checkpoint."""
    if request.random_shape is not None:
        return SHAPES[request.random_shape]()
    refuse_adapter(request)
    from transformers import AutoConfig

    refuse_special_files(request.path)
    try:
        return AutoConfig.from_pretrained(request.path, revision=request.revision, trust_remote_code=False)
    except Exception as error:  # OSError, ValueError, HTTP errors: one message for all
        raise cannot_load(request, error) from error


def load_request_tokenizer(request: ModelRequest) -> Tokenizer:
    """The model's tokenizer, in the request's languages. Random models use the embedded one unless `tokenizer` names another."""
    if request.tokenizer is not None:
        tokenizer = load_tokenizer(request.tokenizer)
    elif request.random_shape is not None:
        tokenizer = load_tokenizer("demo")
    else:
        tokenizer = load_tokenizer(request.name, request.revision)
    set_languages(tokenizer, request.source_lang, request.target_lang)
    return tokenizer


def resolve_dtype(request: ModelRequest) -> torch.dtype:
    """The dtype the model computes in. `auto` is the stored type on a GPU, float32 on a CPU (most have no fast bfloat16)."""
    import torch

    if request.dtype != "auto":
        return getattr(torch, request.dtype)  # type: ignore[no-any-return]
    on_cpu = resolve_device(request.device) == "cpu"
    return torch.float32 if on_cpu else getattr(torch, stored_dtype(request))


def stored_dtype(request: ModelRequest) -> str:
    """The name of the dtype that the weights are stored in, which `auto` is on a GPU."""
    import torch

    if request.random_shape is not None or request.name in EMBEDDED:
        return "bfloat16"
    stored = getattr(load_config(request), "dtype", None)
    return str(stored).removeprefix("torch.") if isinstance(stored, torch.dtype) else "float32"


def is_encoder_decoder(config: Any) -> bool:
    """Whether the model reads its prompt with an encoder."""
    return bool(getattr(config, "is_encoder_decoder", False))


def is_classifier(config: Any) -> bool:
    """Whether the configuration declares a trained classification head."""
    return any(name.endswith("ForSequenceClassification") for name in config.architectures or ())


def refuse_classifier(request: ModelRequest, config: Any) -> None:
    """Raise TeacherError for a classifier. transformers would only warn, and give it a new random output layer."""
    if is_classifier(config):
        raise TeacherError(
            "the model is a classifier and predicts no tokens",
            where=request.name,
            found=config.architectures[0],
            expected="a language model",
            try_="kd classify eval",
        )


def decoder_start(config: Any) -> int:
    """Id of the token that the decoder starts from. Raises TeacherError where the configuration has none."""
    start = getattr(config, "decoder_start_token_id", None)
    if start is None:
        raise TeacherError(
            "the model's configuration has no start token for its decoder",
            where=config.model_type,
            expected="decoder_start_token_id in its configuration",
        )
    return int(start)


def refuse_adapter(request: ModelRequest) -> None:
    """Raise DataError for a folder that holds an adapter: transformers would load its base and save the adapter alone."""
    file = Path(request.path) / ADAPTER if request.local else None
    if file is None or not file.is_file():
        return
    base = read_object(file).get("base_model_name_or_path")
    raise adapter_error(request, str(base) if base else None)


def adapter_error(request: ModelRequest, base: str | None) -> DataError:
    """The error for an adapter in place of a model; `base` is the model it was made for, where that is known."""
    return DataError(
        "this is an adapter, and not a model",
        where=request.name,
        found=f"{ADAPTER}, an adapter of {base}" if base else ADAPTER,
        expected="a model with all its weights",
        try_=f"for a teacher: --teacher {base or 'BASE'} --teacher-adapter {request.name}; "
        f"to score it: kd eval {base or 'BASE'} --adapter {request.name}; "
        f"to train a new one: --student {base or 'BASE'} --lora 16; or peft's merge_and_unload, then save_pretrained",
    )


def cannot_load(request: ModelRequest, error: Exception) -> TeacherError:
    """The TeacherError for a model that transformers could not load because of `error`."""
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    here = {} if request.local else {"here": f"no folder of this name in {Path.cwd()}"}
    if request.attention is not None and isinstance(error, ValueError | ImportError):
        return TeacherError(
            "the model cannot be loaded with this attention",
            where=request.name,
            found=f"--attn-implementation {request.attention}: {reason}",
            expected="sdpa or eager, or kernels whose package is installed and that this model supports",
        )
    return TeacherError(
        "cannot load the model",
        where=request.name,
        **here,
        did_you_mean=None if request.local else nearest_model(request.name),
        found=f"{type(error).__name__}: {reason}",
        expected="a folder written by save_pretrained, a hub id, demo, or random:NAME",
        known_shapes=", ".join(SHAPES),
    )


def nearest_model(name: str) -> str | None:
    """What is spelled most like `name`: the embedded model, a model folder beside it, or a model of the hub that was fetched."""
    parent = as_path(name).parent
    try:
        beside = [str(path.parent) for path in parent.glob("*/config.json")]
    except OSError:
        beside = []
    return nearest_cached("models", name) or nearest_name(name, ["demo", "demo-t5", *beside])
