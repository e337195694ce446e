"""The student: which model is trained, how it is run, and which adapters it gets."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from kd.common.settings import check, setting

LORA_TARGETS = {
    "gpt2": ["c_attn", "c_proj"],
    "gpt_neox": ["query_key_value"],
    "llama": ["q_proj", "v_proj"],
    "gpt_neo": ["q_proj", "v_proj"],
    "t5": ["q", "v"],
}
"""Model type -> modules that LoRA adapts."""

PrecisionName = Literal["fp32", "bf16"]
ONE_DEVICE = "CUDA_VISIBLE_DEVICES=N chooses one device, torchrun or accelerate launch uses several"
"""What to try where a device is named by its number."""


@dataclass(frozen=True)
class StudentSettings:
    """The model that is trained, and how it is run."""

    student: str
    """Model to train: hub id, folder, demo, demo-t5, or random:NAME."""
    revision: str | None = None
    """Branch, tag or commit of a hub student."""
    tokenizer: str | None = None
    """Folder or hub id of the tokenizer, for a random student."""
    source_lang: str | None = setting(None, metavar="CODE", shown="the tokenizer's own")
    """Language code of the prompts, for an encoder-decoder whose tokenizer writes one (mBART: fr_XX, NLLB: fra_Latn)."""
    target_lang: str | None = setting(None, metavar="CODE", shown="the tokenizer's own")
    """Language code of the targets, likewise."""
    device: Literal["auto", "cpu", "cuda"] = setting("auto", hint=ONE_DEVICE)
    """Device to train on. CUDA_VISIBLE_DEVICES=N selects one GPU; torchrun or accelerate launch uses several."""
    precision: PrecisionName = "fp32"
    """Precision of the matrix products: bf16 (autocast) or fp32."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, more time."""
    head_chunk: int | None = setting(None, minimum=1, shown="by vocabulary and device")
    """Number of rows of the output layer computed at once."""

    def __post_init__(self) -> None:
        check(self)

    @property
    def model_name(self) -> str:
        """The student as `kd.models.loading.ModelRequest` names it."""
        return "random:demo-student" if self.student == "demo" else self.student


@dataclass(frozen=True)
class LoraSettings:
    """Low-rank adapters instead of all weights."""

    lora: int | None = setting(None, metavar="R", minimum=1)
    """Train LoRA adapters of rank R (peft), with alpha = 2 R; they are merged into the output. By default all weights are
    trained."""
    lora_targets: str | None = setting(None, shown="by the student's family, else all linear layers")
    """Names of the modules to adapt, separated by commas."""

    def __post_init__(self) -> None:
        check(self)
