"""Where models come from: a name becomes a language model, causal or encoder-decoder, and its tokenizer.

    demo, demo-t5    the embedded teachers (2.7 M and 3.0 M parameters); as a student, `demo` is `random:demo-student`
    random:NAME      random weights in the real shape of a known model; no download (`--tokenizer demo-t5` with
                     `random:demo-t5-student`)
    a folder         anything `save_pretrained` wrote
    a hub id         through transformers, never with remote code

This is the only door to `transformers` models and to bitsandbytes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kd.common.errors import DataError, TeacherError, unknown_name
from kd.common.extras import needed
from kd.models.shapes import SHAPES
from kd.models.tokenizer import EMBEDDED, Tokenizer, load_tokenizer

if TYPE_CHECKING:
    import torch

Model = Any
"""A `PreTrainedModel` with an output embedding."""

RELATIVE_POSITIONS = ("t5", "mt5", "umt5", "longt5", "switch_transformers")
"""Model types that take any length."""
DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass(frozen=True)
class ModelRequest:
    """What the user asked for, before anything is loaded."""

    name: str
    """`demo`, `demo-t5`, `random:NAME`, a folder, or a hub id."""
    revision: str | None = None
    """Branch, tag or commit of a hub id."""
    dtype: str = "auto"
    """One of DTYPES; `auto` = as stored, float32 on a CPU."""
    device: str = "auto"
    """`auto` = cuda where there is one."""
    load_in_4bit: bool = False
    """bitsandbytes nf4 with double quantisation."""
    tokenizer: str | None = None
    """Folder or hub id of the tokenizer, where it is not beside the model."""
    seed: int = 0
    """Of random weights."""

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise unknown_name("dtype", self.dtype, DTYPES)
        if self.random_shape is not None and self.random_shape not in SHAPES:
            raise unknown_name("random model", self.random_shape, SHAPES)

    @property
    def random_shape(self) -> str | None:
        """NAME of `random:NAME`, else None."""
        kind, _, shape = self.name.partition(":")
        return shape if kind == "random" else None

    @property
    def path(self) -> str:
        """What `from_pretrained` is given."""
        if self.name in EMBEDDED:
            return str(EMBEDDED[self.name])
        return str(Path(self.name).expanduser()) if self.local else self.name

    @property
    def local(self) -> bool:
        """Is it a folder of this machine?"""
        return self.name in EMBEDDED or (self.random_shape is None and Path(self.name).expanduser().is_dir())


def resolve_device(device: str) -> str:
    """`auto` -> `cuda` or `cpu`; refuses cuda where there is none, and what torch does not know."""
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
    """The dtype the model computes in. `auto`: as stored on a GPU, float32 on a CPU (most have no fast bfloat16)."""
    import torch

    if request.dtype != "auto":
        return getattr(torch, request.dtype)  # type: ignore[no-any-return]
    if resolve_device(request.device) == "cpu":
        return torch.float32
    if request.random_shape is not None or request.name in EMBEDDED:
        return torch.bfloat16
    stored = getattr(load_config(request), "dtype", None)
    return stored if isinstance(stored, torch.dtype) else torch.float32


def load_config(request: ModelRequest) -> Any:
    """The model's configuration; reads no weights."""
    if request.random_shape is not None:
        return SHAPES[request.random_shape]()
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(request.path, revision=request.revision, trust_remote_code=False)
    except Exception as error:  # OSError, ValueError, HTTP errors: one message for all
        raise cannot_load(request, error) from error


def load_request_tokenizer(request: ModelRequest) -> Tokenizer:
    """The model's tokenizer; random models use the embedded one unless `tokenizer` names another."""
    if request.tokenizer is not None:
        return load_tokenizer(request.tokenizer)
    if request.random_shape is not None:
        return load_tokenizer("demo")
    return load_tokenizer(request.name, request.revision)


def load_model(request: ModelRequest) -> Model:
    """Load the model in evaluation mode on its device. Raises TeacherError saying what failed."""
    import torch

    device, dtype = resolve_device(request.device), resolve_dtype(request)
    config = load_config(request)
    refuse_classifier(request, config)
    if request.load_in_4bit:
        model = _load_4bit(request, device, dtype)
    elif request.random_shape is not None:
        with torch.random.fork_rng(devices=[] if device == "cpu" else None), torch.device(device):
            torch.manual_seed(request.seed)
            model = random_model(config, dtype)
    else:
        try:
            model = _auto_class(config).from_pretrained(
                request.path, revision=request.revision, dtype=dtype, trust_remote_code=False
            )
        except Exception as error:
            raise cannot_load(request, error) from error
        model.to(device)
    return model.eval()


def is_encoder_decoder(config: Any) -> bool:
    """Does the model read its prompt with an encoder?"""
    return bool(getattr(config, "is_encoder_decoder", False))


def is_classifier(config: Any) -> bool:
    """Does a configuration say that its weights have a trained classification head?"""
    return any(name.endswith("ForSequenceClassification") for name in config.architectures or ())


def refuse_classifier(request: ModelRequest, config: Any) -> None:
    """Raise TeacherError for a classifier: transformers would give it a new output layer and a warning."""
    if is_classifier(config):
        raise TeacherError(
            "the model is a classifier and predicts no tokens",
            where=request.name,
            found=config.architectures[0],
            expected="a language model",
            try_="kd classify eval",
        )


def decoder_start(config: Any) -> int:
    """The token an encoder-decoder's decoder starts from. Raises TeacherError where its configuration says none."""
    start = getattr(config, "decoder_start_token_id", None)
    if start is None:
        raise TeacherError(
            "the model does not say what its decoder starts from",
            where=config.model_type,
            expected="decoder_start_token_id in its configuration",
        )
    return int(start)


def _auto_class(config: Any) -> Any:
    import transformers

    return transformers.AutoModelForSeq2SeqLM if is_encoder_decoder(config) else transformers.AutoModelForCausalLM


def random_model(config: Any, dtype: torch.dtype) -> Model:
    """Random weights; an output layer that the configuration calls untied is untied.

    transformers 5 stores T5Config(tie_word_embeddings=False) as True with `scale_decoder_outputs=False`, and ties
    a randomly initialised head to the embedding: `flan-t5-small` would have 60.5 M parameters instead of 77.0 M.
    """
    import torch

    model = _auto_class(config).from_config(config, dtype=dtype)
    if config.model_type == "t5" and not getattr(config, "scale_decoder_outputs", config.tie_word_embeddings):
        embedding = model.get_input_embeddings().weight
        model.lm_head.weight = torch.nn.Parameter(torch.empty_like(embedding))
        torch.nn.init.normal_(model.lm_head.weight, std=config.d_model**-0.5)
    if dtype == torch.float16:  # as from_pretrained does: T5's feed-forward layers overflow
        for name, module in model.named_modules():
            if name.rpartition(".")[2] in (model._keep_in_fp32_modules or ()):
                module.float()
    return model


def load_encoder(name: str, layers: int, device: str) -> tuple[Any, Any]:
    """The first `layers` layers of an encoder in float32, for BERTScore, and its tokenizer. Raises DataError."""
    import torch
    from transformers import AutoConfig, AutoModel, AutoModelForTextEncoding, AutoTokenizer
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    try:
        path = str(Path(name).expanduser())
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
        if not 1 <= layers <= config.num_hidden_layers:
            raise DataError(
                "the encoder has no such layer",
                where=name,
                found=f"--bertscore-layer {layers}",
                expected=f"1..{config.num_hidden_layers}",
            )
        config.num_hidden_layers = layers
        kind = AutoModelForTextEncoding if type(config) in AutoModelForTextEncoding._model_mapping else AutoModel
        logging.set_verbosity_error()  # layers beyond are left out on purpose
        model = kind.from_pretrained(path, config=config, dtype=torch.float32, trust_remote_code=False)
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except DataError:
        raise
    except Exception as error:  # OSError, ValueError, HTTP errors: one message for all
        raise DataError(
            "cannot load the encoder",
            where=name,
            found=f"{type(error).__name__}: {str(error).splitlines()[0]}",
            expected="a folder written by save_pretrained, or a hub id that can be reached",
            try_="--bertscore-model FOLDER, or leave it out",
        ) from error
    finally:
        logging.set_verbosity(verbosity)
    if tokenizer.pad_token_id is None:
        raise DataError("the encoder's tokenizer has no padding token", where=name, try_="another --bertscore-model")
    positions = max_positions(config)
    if positions is not None:  # RoBERTa's first position is that of its padding token, plus one
        offset = (config.pad_token_id or 0) + 1 if "roberta" in config.model_type else 0
        tokenizer.model_max_length = min(tokenizer.model_max_length, positions - offset)
    return model.to(device).eval(), tokenizer


def _load_4bit(request: ModelRequest, device: str, dtype: torch.dtype) -> Model:
    with needed("bitsandbytes", "4-bit loading", where=request.name, instead="--dtype bfloat16"):
        import bitsandbytes
    import tempfile

    from transformers import BitsAndBytesConfig

    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )
    with tempfile.TemporaryDirectory() as folder:
        path = request.path
        if request.random_shape is not None:  # bitsandbytes quantises while loading, so there must be a file to load
            load_model(replace(request, load_in_4bit=False, device="cpu")).save_pretrained(folder)
            path = folder
        try:
            model = _auto_class(load_config(request)).from_pretrained(
                path,
                revision=request.revision,
                dtype=dtype,
                quantization_config=quantization,
                device_map={"": device},
                trust_remote_code=False,
            )
        except Exception as error:
            raise TeacherError(
                "bitsandbytes cannot load this model in 4 bits here",
                where=request.name,
                found=f"{type(error).__name__}: {error}",
                expected=f"a model and a device that bitsandbytes {bitsandbytes.__version__} supports "
                f"(device {device})",
                try_="--dtype bfloat16",
            ) from error
    odd = [n for n, m in model.named_modules() if isinstance(m, bitsandbytes.nn.Linear4bit) and m.in_features % 64]
    if device == "cpu" and odd:  # its kernel for CPUs packs whole blocks; it would fail in the first forward pass
        raise TeacherError(
            "bitsandbytes cannot run this model in 4 bits on a CPU",
            where=request.name,
            found=f"{len(odd)} layers such as {odd[0]}",
            expected="input widths that are multiples of 64",
            try_="--dtype bfloat16",
        )
    return model


def parameter_count(request: ModelRequest) -> int:
    """Parameters of a model, counted on the meta device (no weights are made or read)."""
    import torch

    with torch.device("meta"):
        model = random_model(load_config(request), torch.float32)
    return sum(p.numel() for p in model.parameters())


def cannot_load(request: ModelRequest, error: Exception) -> TeacherError:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    here = {} if request.local else {"here": f"no folder of this name in {Path.cwd()}"}
    return TeacherError(
        "cannot load the model",
        where=request.name,
        **here,
        found=f"{type(error).__name__}: {reason}",
        expected="a folder written by save_pretrained, a hub id, demo, or random:NAME",
        known_shapes=", ".join(SHAPES),
    )


def max_positions(config: Any) -> int | None:
    """The longest sequence the model's positions allow, or None where nothing limits it (relative positions)."""
    if config.model_type in RELATIVE_POSITIONS:  # whose n_positions is the length they were trained on
        return None
    for field in ("max_position_embeddings", "n_positions"):
        value = getattr(config, field, None)
        if isinstance(value, int):
            return value
    return None
