"""Load a language model (causal or encoder-decoder) and its tokenizer by name.

    demo, demo-t5    the embedded teachers (2.7 M and 3.0 M parameters); as a student, `demo` is `random:demo-student`
    random:NAME      random weights in the real shape of a known model; no download (`--tokenizer demo-t5` with
                     `random:demo-t5-student`)
    a folder         anything that `save_pretrained` wrote
    a hub id         loaded through transformers, never with remote code

Language models are loaded here and nowhere else; loading in 4 or 8 bits is in `kd.models.quantised`.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kd.common.disk.digests import refuse_damage
from kd.common.errors import DataError, TeacherError, unknown_name
from kd.common.files import read_object
from kd.common.paths import as_path
from kd.common.strangers.plain_files import refuse_special_files
from kd.models.families.encoder_layout import set_languages, start_language
from kd.models.families.text_model import loader_of, refuse_missing_weights, text_config
from kd.models.placement.device_maps import Placement, refuse_missing_gpus, refuse_other_modules
from kd.models.placement.tensor_parallel import all_at_once, group_for, lead, sharding
from kd.models.quantised import QuantisedShare, load_quantised, planned_share, refuse_mostly_unquantised
from kd.models.shapes import SHAPES
from kd.models.tokenizer import EMBEDDED, Tokenizer, load_tokenizer
from kd.models.weights.adapters import Adapter, merged
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
ADAPTER = "adapter_config.json"
"""The file by which peft and transformers know an adapter."""
DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass(frozen=True)
class ModelRequest:
    """A model by name, and how to load it. Creating a request loads nothing."""

    name: str
    """`demo`, `demo-t5`, `random:NAME`, a folder, or a hub id."""
    revision: str | None = None
    """Branch, tag or commit of a hub id."""
    dtype: str = "auto"
    """One of DTYPES; `auto` is the stored type on a GPU and float32 on a CPU."""
    device: str = "auto"
    """`auto`, `cpu`, `cuda` or `cuda:N`; `auto` is cuda where there is a GPU."""
    load_in_4bit: bool = False
    """Load the weights in nf4 with double quantisation (bitsandbytes)."""
    tokenizer: str | None = None
    """Folder or hub id of the tokenizer; None is the model's own."""
    seed: int = 0
    """Seed of random weights."""
    source_lang: str | None = None
    """Language code of the texts that an encoder reads, for a tokenizer that writes one; None is the tokenizer's own."""
    target_lang: str | None = None
    """Language code of the texts that a decoder writes."""
    placement: Placement = field(default_factory=Placement)
    """Where the weights are put, for a model that is larger than one device."""
    load_in_8bit: bool = False
    """Load the weights in 8 bits, LLM.int8 (bitsandbytes)."""
    adapter: Adapter | None = None
    """An adapter that is merged into the weights."""
    attention: str | None = None
    """Attention as transformers names it, such as sdpa or flash_attention_2; None is the model's own."""

    def __post_init__(self) -> None:
        self._check_placement()
        self._check_weights()
        if self.dtype not in DTYPES:
            raise unknown_name("dtype", self.dtype, DTYPES)
        if self.random_shape is not None and self.random_shape not in SHAPES:
            raise unknown_name("random model", self.random_shape, SHAPES)

    def _check_placement(self) -> None:
        """Raise DataError where a device map cannot be used."""
        if self.placement.tensor_parallel > 1:
            self._check_tensor_parallel()
        if not self.placement.spread:
            return
        if self.device != "auto":
            raise DataError(
                "a device map and a device exclude each other",
                found=f"--device {self.device} with --device-map",
                try_="--max-memory, or a map from a file, which say what each device holds",
            )
        if self.random_shape is not None:
            raise DataError(
                "a device map needs weights in files",
                where=self.name,
                found="random weights",
                expected="a folder or a hub id",
            )

    def _check_tensor_parallel(self) -> None:
        """Raise DataError for what a group of processes cannot load."""
        for option, given in (
            (f"--device {self.device}", self.device != "auto"),
            ("random weights", self.random_shape is not None),
            (f"--load-in-{self.bits}bit", self.bits is not None),
            ("--teacher-adapter", self.adapter is not None),
        ):
            if given:
                raise DataError(
                    "tensor parallelism takes plain weights in files, on the GPUs of torchrun's processes",
                    where=self.name,
                    found=f"--tensor-parallel {self.placement.tensor_parallel} with {option}",
                    try_="--device-map auto",
                )

    def _check_weights(self) -> None:
        """Raise DataError where ways to load weights exclude each other."""
        if self.load_in_4bit and self.load_in_8bit:
            raise DataError("a model is loaded in 4 bits or in 8", found="--load-in-4bit with --load-in-8bit")
        if self.adapter is not None and self.bits is not None:
            raise DataError(
                "an adapter is merged into plain weights alone",
                where=self.adapter.name,
                found=f"an adapter with --load-in-{self.bits}bit",
                try_=f"without --load-in-{self.bits}bit; or merge with peft, save, and load the merged model in {self.bits} bits",
            )

    @property
    def bits(self) -> int | None:
        """Bits of the weights that bitsandbytes quantises while it loads them; None for weights as they are stored."""
        return 4 if self.load_in_4bit else 8 if self.load_in_8bit else None

    @property
    def random_shape(self) -> str | None:
        """NAME of `random:NAME`, else None."""
        kind, _, shape = self.name.partition(":")
        return shape if kind == "random" else None

    @property
    def path(self) -> str:
        """The folder or hub id to pass to `from_pretrained`."""
        if self.name in EMBEDDED:
            return str(EMBEDDED[self.name])
        return str(as_path(self.name)) if self.local else self.name

    @property
    def local(self) -> bool:
        """Whether the model is a folder on this machine."""
        return self.name in EMBEDDED or (self.random_shape is None and os.path.isdir(as_path(self.name)))


def resolve_device(device: str) -> str:
    """The device that `auto` stands for, else `device` itself. Raises DataError for one that does not exist here."""
    import torch

    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.device(device)
    except RuntimeError:
        raise DataError(
            "torch knows no such device", found=f"--device {device}", expected="auto, cpu, cuda or cuda:N"
        ) from None
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise DataError("no CUDA device on this machine", found=f"--device {device}", try_="--device cpu")
    return device


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


def load_config(request: ModelRequest) -> Any:
    """The text model's configuration, without reading weights. Raises TeacherError saying what failed.

    Where `target_lang` decides the token that the decoder starts from, the configuration says so.
    """
    config = text_config(_stored_config(request))
    if request.target_lang is not None:
        start = start_language(load_request_tokenizer(request), config.model_type)
        config.decoder_start_token_id = getattr(config, "decoder_start_token_id", None) if start is None else start
    return config


def _stored_config(request: ModelRequest) -> Any:
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
    if request.target_lang is not None:
        model.config.decoder_start_token_id = config.decoder_start_token_id
    return model.eval()


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
    stored = _stored_config(request)
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


def refuse_damaged_model(request: ModelRequest) -> None:
    """Raise DamagedFilesError for a folder of ours whose files are not what was written; other models say nothing of this."""
    if request.local:
        refuse_damage(Path(request.path), lambda name: not name.endswith(STATES))


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
    auto_class, options = loader_of(_stored_config(request))
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

    stored = _stored_config(request)
    with torch.device("meta"):
        return random_model(loader_of(stored)[1].get("config", stored), torch.float32)


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
        found=f"{type(error).__name__}: {reason}",
        expected="a folder written by save_pretrained, a hub id, demo, or random:NAME",
        known_shapes=", ".join(SHAPES),
    )
