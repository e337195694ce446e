"""Which model, and how it is loaded: `ModelRequest`, which loads nothing itself.

demo, demo-t5    the embedded teachers (2.7 M and 3.0 M parameters); as a student, `demo` is `random:demo-student`
random:NAME      random weights in the real shape of a known model; no download (`--tokenizer demo-t5` with
                 `random:demo-t5-student`)
a folder         anything that `save_pretrained` wrote
a hub id         loaded through transformers, never with remote code
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field

from kd.common.errors import DataError, unknown_name
from kd.common.paths import as_path
from kd.models.placement.device_maps import Placement
from kd.models.shapes import SHAPES
from kd.models.tokenizer import EMBEDDED
from kd.models.weights.adapters import Adapter

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
