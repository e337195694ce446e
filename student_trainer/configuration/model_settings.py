"""The student: which model is trained, how it is run, and which adapters it gets."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from kd.common.errors import DataError
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
KernelsName = Literal["auto", "torch", "triton"]
LoraSaveName = Literal["merged", "adapter", "both"]
SaveTypeName = Literal["auto", "float32", "bfloat16", "float16"]
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
    attn_implementation: str | None = setting(None, metavar="NAME", shown="the model's own")
    """Attention as transformers names it: eager, sdpa, flash_attention_2, flex_attention, or kernels of the hub."""
    compile: bool = False
    """Compile the student's layers with torch.compile: the first steps take longer, the others less. Losses change by
    roundings. What torch cannot compile is named."""
    liger: bool = False
    """Use Liger's Triton kernels for the norms, rotary positions and feed-forward layers of the student (extra liger, on a GPU).
    Before the first step they are compared with the student's own layers."""
    kernels: KernelsName = "auto"
    """Kernels of the losses kl and ce: torch, triton (one fused kernel, on a GPU), or auto (triton where it runs). Before the first
    step Triton's are compared with torch's. The losses are the same up to roundings."""
    load_in_4bit: bool = False
    """Load the student's weights in 4 bits (nf4, bitsandbytes) and train LoRA adapters on them: QLoRA. It needs --lora."""

    def __post_init__(self) -> None:
        check(self)

    @property
    def model_name(self) -> str:
        """The student as `kd.models.model_request.ModelRequest` names it."""
        return "random:demo-student" if self.student == "demo" else self.student


@dataclass(frozen=True)
class LoraSettings:
    """Low-rank adapters instead of all weights."""

    lora: int | None = setting(None, metavar="R", minimum=1)
    """Train LoRA adapters of rank R (peft). By default all weights are trained."""
    lora_alpha: int | None = setting(None, minimum=1, shown="2 R")
    """Scale of the adapters: their product is multiplied by alpha / R."""
    lora_dropout: float | None = setting(None, minimum=0, shown="0")
    """Share of the adapters' inputs that dropout sets to 0 in training."""
    lora_targets: str | None = setting(None, shown="by the student's family, else all linear layers")
    """Names of the modules to adapt, separated by commas."""
    lora_save: LoraSaveName = "merged"
    """What the run's folder holds at the end: merged (the model with the adapters merged in), adapter (the adapters alone, as peft
    writes them), or both (the merged model, and the adapters in the folder adapter)."""

    def __post_init__(self) -> None:
        check(self)
        if self.lora_dropout is not None and self.lora_dropout >= 1:
            raise DataError(
                "LoRA's dropout is out of bounds",
                found=f"--lora-dropout {self.lora_dropout:g}",
                expected="from 0 to below 1",
            )
        if self.lora is None:
            refuse_without_lora(self)

    @property
    def scale(self) -> int:
        """`lora_alpha` with the default filled in."""
        return 2 * (self.lora or 0) if self.lora_alpha is None else self.lora_alpha


def refuse_without_lora(adapters: LoraSettings) -> None:
    """Raise DataError for settings of adapters where no rank says that there are any."""
    given = {
        "--lora-alpha": adapters.lora_alpha is not None,
        "--lora-dropout": adapters.lora_dropout is not None,
        "--lora-targets": adapters.lora_targets is not None,
        "--lora-save": adapters.lora_save != "merged",
    }
    if any(given.values()):
        raise DataError(
            "these settings are those of LoRA adapters, and there are none",
            found=", ".join(name for name, is_given in given.items() if is_given),
            try_="--lora R, such as --lora 16",
        )


@dataclass(frozen=True)
class OutputSettings:
    """How the trained weights are written, and where they go. None of it changes the training."""

    save_dtype: SaveTypeName = "auto"
    """Type of the weights that are written: auto (the type that the student is stored in), float32, bfloat16 or float16.
    Training and checkpoints use float32."""
    push_to_hub: str | None = setting(None, metavar="NAME/REPO")
    """Repository of the Hugging Face hub to which the student and its model card are uploaded at the end."""
    hub_private: bool = False
    """Make the repository of --push-to-hub private, if it is new."""

    def __post_init__(self) -> None:
        check(self)
        if self.hub_private and self.push_to_hub is None:
            raise DataError("nothing is uploaded", found="--hub-private", try_="--push-to-hub NAME/REPO")
