"""Where models come from: a name becomes a causal language model, its tokenizer and its identity.

    demo             the embedded teacher (2.7 M parameters); as a student, `random:demo-student`
    random:NAME      random weights in the real shape of a known model; no download
    a folder         anything `save_pretrained` wrote
    a hub id         through transformers, never with remote code

This is the only door to `transformers` models and to bitsandbytes. Add a random shape: one line in `SHAPES`.
Shapes were read from the models' public configs; parameter counts are checked by a test on the meta device.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kd.data.errors import DataError, TeacherError, unknown_name
from kd.data.tokenizer import EMBEDDED, Tokenizer, load_tokenizer

if TYPE_CHECKING:
    import torch

Model = Any
"""A `PreTrainedModel` with an output embedding."""

DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass(frozen=True)
class ModelRequest:
    """What the user asked for, before anything is loaded."""

    name: str
    """`demo`, `random:NAME`, a folder, or a hub id."""
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
        return str(EMBEDDED) if self.name == "demo" else self.name


def resolve_device(device: str) -> str:
    """`auto` -> `cuda` or `cpu`; refuses cuda where there is none."""
    import torch

    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
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
    if request.random_shape is not None or request.name == "demo":
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
        raise _cannot_load(request, error) from error


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
    from transformers import AutoModelForCausalLM

    device, dtype = resolve_device(request.device), resolve_dtype(request)
    config = load_config(request)
    if getattr(config, "is_encoder_decoder", False):
        raise TeacherError("this is an encoder-decoder model", where=request.name,
                           found=", ".join(config.architectures or [type(config).__name__]),
                           expected="a causal language model")  # fmt: skip
    if request.load_in_4bit:
        model = _load_4bit(request, device, dtype)
    elif request.random_shape is not None:
        with torch.random.fork_rng(devices=[] if device == "cpu" else None), torch.device(device):
            torch.manual_seed(request.seed)
            model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    else:
        try:
            model = AutoModelForCausalLM.from_pretrained(
                request.path, revision=request.revision, dtype=dtype, trust_remote_code=False
            )
        except Exception as error:
            raise _cannot_load(request, error) from error
        model.to(device)
    return model.eval()


def _load_4bit(request: ModelRequest, device: str, dtype: torch.dtype) -> Model:
    try:
        import bitsandbytes
    except ImportError as error:
        raise TeacherError("4-bit loading needs bitsandbytes", where=request.name, found="not installed",
                           try_="pip install 'kd-logit-cache[quantization]', or --dtype bfloat16") from error  # fmt: skip
    import tempfile

    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )
    with tempfile.TemporaryDirectory() as folder:
        path = request.path
        if request.random_shape is not None:  # bitsandbytes quantises while loading, so there must be a file to load
            from dataclasses import replace

            load_model(replace(request, load_in_4bit=False, device="cpu")).save_pretrained(folder)
            path = folder
        try:
            return AutoModelForCausalLM.from_pretrained(
                path, revision=request.revision, dtype=dtype, quantization_config=quantization,
                device_map={"": device}, trust_remote_code=False,
            )  # fmt: skip
        except Exception as error:
            raise TeacherError("bitsandbytes cannot load this model in 4 bits here", where=request.name,
                               found=f"{type(error).__name__}: {error}",
                               expected=f"a model and a device that bitsandbytes {bitsandbytes.__version__} supports "
                               f"(device {device})", try_="--dtype bfloat16") from error  # fmt: skip


def _cannot_load(request: ModelRequest, error: Exception) -> TeacherError:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    return TeacherError("cannot load the model", where=request.name, found=f"{type(error).__name__}: {reason}",
                        expected="a folder written by save_pretrained, a hub id, demo, or random:NAME",
                        known_shapes=", ".join(SHAPES))  # fmt: skip


def model_identity(request: ModelRequest) -> dict[str, Any]:
    """Everything about the model that can change its numbers, without loading weights.

    Weight files are named by their SHA-256: read from a local folder, or from the hub's file list.
    """
    import torch

    config = load_config(request)
    identity: dict[str, Any] = {
        "model": request.name,
        "model_class": (config.architectures or [type(config).__name__])[0],
        "dtype": str(resolve_dtype(request)).removeprefix("torch."),
        "quantization": "bitsandbytes-nf4-double" if request.load_in_4bit else "none",
        "config": _config_digest(config),
    }
    if request.random_shape is not None:  # random numbers depend on the library and the kind of device
        device = resolve_device(request.device).partition(":")[0]
        return identity | {"seed": request.seed, "torch": torch.__version__.partition("+")[0], "device": device}
    return identity | weight_digests(request.path, request.revision)


def _config_digest(config: Any) -> str:
    text = config.to_json_string(use_diff=False)
    import json

    settings = {k: v for k, v in json.loads(text).items()
                if k not in ("transformers_version", "_name_or_path", "dtype", "torch_dtype")}  # fmt: skip
    return hashlib.blake2b(json.dumps(settings, sort_keys=True).encode(), digest_size=16).hexdigest()


def weight_digests(name: str, revision: str | None) -> dict[str, Any]:
    """`{"revision": commit or "local", "weights": {file: sha256}}` of the files transformers would load."""
    folder = Path(name).expanduser()
    if folder.is_dir():
        files = _weight_files([p.name for p in folder.iterdir()], name)
        return {"revision": "local", "weights": {f: file_sha256(folder / f) for f in files}}
    from huggingface_hub import HfApi, snapshot_download

    try:
        info = HfApi().model_info(name, revision=revision, files_metadata=True)
        digests = {s.rfilename: s.lfs.sha256 for s in info.siblings or [] if s.lfs is not None}
        return {"revision": info.sha, "weights": {f: digests[f] for f in _weight_files(list(digests), name)}}
    except DataError:
        raise
    except Exception as online:  # offline: the same from what is already on disk
        try:
            local = Path(snapshot_download(name, revision=revision, local_files_only=True))
        except Exception:
            raise _cannot_load(ModelRequest(name, revision), online) from online
        files = _weight_files([p.name for p in local.iterdir()], name)
        return {"revision": local.name, "weights": {f: file_sha256(local / f) for f in files}}


def _weight_files(names: list[str], where: str) -> list[str]:
    """The files `from_pretrained` prefers: safetensors, else PyTorch's."""
    if {"adapter_config.json", "adapter_model.safetensors"} & set(names):  # loaded silently, and not what is hashed here
        raise DataError("an adapter lies beside the weights", where=where, found="adapter_config.json or its weights",
                        expected="a merged model", try_="peft's merge_and_unload, then save_pretrained")  # fmt: skip
    for prefix, suffix in (("model", ".safetensors"), ("pytorch_model", ".bin")):
        found = sorted(n for n in names if n.startswith(prefix) and n.endswith(suffix))
        if found:
            return found
    raise DataError("no weight files found", where=where, found=", ".join(sorted(names)[:8]) or "an empty folder",
                    expected="model*.safetensors")  # fmt: skip


def file_sha256(path: Path) -> str:
    """SHA-256 of a file; remembered for this process while size and time stay the same."""
    stat = path.resolve().stat()
    return _file_sha256(str(path.resolve()), stat.st_size, stat.st_mtime_ns)


@lru_cache(maxsize=1024)
def _file_sha256(path: str, size: int, mtime_ns: int) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def max_positions(config: Any) -> int | None:
    """The longest sequence the model's positions allow, or None where nothing limits it."""
    for field in ("max_position_embeddings", "n_positions"):
        value = getattr(config, field, None)
        if isinstance(value, int):
            return value
    return None


def _gpt2(vocab: int = 50257, positions: int = 1024, **shape: Any) -> Callable[[], Any]:
    def build() -> Any:
        from transformers import GPT2Config

        end = 50256 if vocab > 50256 else 0
        return GPT2Config(vocab_size=vocab, n_positions=positions, bos_token_id=end, eos_token_id=end,
                          architectures=["GPT2LMHeadModel"], **shape)  # fmt: skip

    return build


def _gpt_neo_2_7b() -> Any:
    from transformers import GPTNeoConfig

    return GPTNeoConfig(
        vocab_size=50257, max_position_embeddings=2048, hidden_size=2560, num_layers=32, num_heads=20,
        attention_types=[[["global", "local"], 16]], window_size=256, resid_dropout=0.0, embed_dropout=0.0,
        attention_dropout=0.0, architectures=["GPTNeoForCausalLM"],
    )  # fmt: skip


def _pythia_410m() -> Any:
    from transformers import GPTNeoXConfig

    return GPTNeoXConfig(
        vocab_size=50304, hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096,
        max_position_embeddings=2048, bos_token_id=0, eos_token_id=0, tie_word_embeddings=False,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25},
        architectures=["GPTNeoXForCausalLM"],
    )  # fmt: skip


def _smollm_360m() -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=49152, hidden_size=960, num_hidden_layers=32, num_attention_heads=15, num_key_value_heads=5,
        intermediate_size=2560, max_position_embeddings=2048, rms_norm_eps=1e-5, tie_word_embeddings=True,
        bos_token_id=0, eos_token_id=0, rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        architectures=["LlamaForCausalLM"],
    )  # fmt: skip


SHAPES: dict[str, Callable[[], Any]] = {
    "demo-student": _gpt2(2048, 256, n_embd=96, n_layer=3, n_head=3, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0),
    "gpt2": _gpt2(),
    "gpt2-medium": _gpt2(n_embd=1024, n_layer=24, n_head=16),
    "gpt-neo-2.7B": _gpt_neo_2_7b,
    "pythia-410m": _pythia_410m,
    "SmolLM-360M": _smollm_360m,
}
