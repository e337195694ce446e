"""`TrainConfig`: every setting of a training run, saved beside its weights."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, get_args, get_type_hints

from kd.common.errors import DataError, unknown_name
from kd.student_trainer.batches.alignment import ALIGNMENTS

RANKINGS = ("exact", "fast")
"""How the student's probabilities are brought into order (`groups.uld`)."""
LORA_TARGETS = {
    "gpt2": ["c_attn", "c_proj"],
    "gpt_neox": ["query_key_value"],
    "llama": ["q_proj", "v_proj"],
    "gpt_neo": ["q_proj", "v_proj"],
    "t5": ["q", "v"],
}
"""Model type -> modules that LoRA adapts."""

OPTIMIZERS = {"adamw": "adamw_torch_fused", "adafactor": "adafactor", "adamw8bit": "adamw_bnb_8bit"}
"""Our name -> transformers' name."""
SCHEDULES = {"linear": "linear", "cosine": "cosine", "constant": "constant_with_warmup"}
PRECISIONS = ("fp32", "bf16")


@dataclass(frozen=True)
class TrainConfig:
    """Settings of one run. Equal settings, cache and library versions give equal weights on one machine."""

    cache: str
    """Path or URL of the cache."""
    student: str
    """`demo`, `random:NAME`, a folder, or a hub id."""
    out: str
    """Folder of the run."""
    loss: str = "kl"
    """Key of `losses.LOSSES`."""
    tail: str = "auto"
    """Key of `losses.TAILS`, or `auto`."""
    alpha: float | None = None
    """Weight of the distillation loss; None = 1 (0 for `ce`), 0.5 for losses over aligned text."""
    ce_weight: float | None = None
    """Weight of the cross-entropy; None = 1 - alpha."""
    beta: float = 0.5
    """Of the generalised JSD (`jsd`, `hybrid`): weight of KL(teacher || mixture)."""
    alignment: str = "bytes"
    """Of losses over aligned text: one of `alignment.ALIGNMENTS`."""
    align_eos: bool = True
    """Compare the ends of text too, where both sides have one."""
    ranking: str = "fast"
    """How `uld` orders the student's probabilities: one of RANKINGS."""
    prompt_loss: bool = False
    """Cross-entropy over the prompt's tokens too."""
    seq_len: int | None = None
    """Most tokens of an example in the student's own cut, for losses over text (of an encoder: of the prompt), and of a
    packed sequence; None = the student's positions."""
    target_len: int | None = None
    """Most tokens of a target in the student's own cut, EOS included, for losses over text; None = what `seq_len`
    leaves, of a decoder its positions."""
    separator: str | None = None
    """Text between prompt and target for the student; None = as in the cache."""
    temperature: float = 1.0
    """Of the softmaxes compared; must be on the cache's grid."""
    top_k: int | None = None
    """Tokens per row to use; None = all that are stored."""
    epochs: float = 1.0
    max_steps: int | None = None
    """Optimizer steps; overrides `epochs`."""
    tokens_per_batch: int | None = None
    """Tokens per micro-batch and device, padding included; None: `batch_size`, or 4096 tokens."""
    batch_size: int | None = None
    """Examples, or packed sequences, per micro-batch and device."""
    packing: bool = False
    """Put several examples into one sequence of at most `seq_len` tokens; none of them sees another."""
    accumulate: int = 1
    """Micro-batches per optimizer step."""
    lr: float = 5e-4
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    optimizer: str = "adamw"
    schedule: str = "linear"
    warmup: float = 0.0
    """Steps when >= 1, else a share of all steps."""
    precision: str = "fp32"
    lora_targets: str | None = None
    """Modules to adapt, separated by commas; None = `LORA_TARGETS` of the student's family, else peft's own."""
    lora: int | None = None
    """Rank of LoRA adapters (alpha = 2 x rank), merged into the output; None = all weights."""
    gradient_checkpointing: bool = False
    seed: int = 0
    revision: str | None = None
    """Of a hub student."""
    tokenizer: str | None = None
    """Of a random student."""
    device: str = "auto"
    cache_bytes: int | None = None
    """Of a cache that is read from a URL: most bytes of its shards kept on this disk; None = as in `cache_builder.mirror`."""
    save_every: int = 0
    """Optimizer steps between checkpoints; 0 = at the end only."""
    log_every: int = 10
    report_to: str = "none"
    """Any tracker transformers knows: tensorboard, wandb, …"""
    head_chunk: int | None = None
    """Rows of the output layer computed at once; None = what suits vocabulary and device (`kd.models.padded_batches.head_rows`)."""

    def __post_init__(self) -> None:
        _check_types(self)
        for name, value, known in (
            ("optimizer", self.optimizer, OPTIMIZERS),
            ("schedule", self.schedule, SCHEDULES),
            ("precision", self.precision, PRECISIONS),
            ("alignment", self.alignment, ALIGNMENTS),
            ("ranking", self.ranking, RANKINGS),
        ):
            if value not in known:
                raise unknown_name(name, value, known)
        if self.device not in ("auto", "cpu", "cuda"):
            raise DataError(
                "no such kind of device",
                found=f"--device {self.device}",
                expected="auto, cpu or cuda",
                try_="CUDA_VISIBLE_DEVICES=N chooses one, torchrun or accelerate launch uses several",
            )
        if self.tokens_per_batch is not None and self.batch_size is not None:
            raise DataError("two batch sizes were given", found="--tokens-per-batch and --batch-size", expected="one")
        for name in (
            "tokens_per_batch",
            "batch_size",
            "accumulate",
            "max_steps",
            "lora",
            "log_every",
            "head_chunk",
            "seq_len",
            "target_len",
            "cache_bytes",
        ):
            number = getattr(self, name)
            if number is not None and number < 1:
                raise DataError(f"{name.replace('_', ' ')} must be at least 1", found=number)
        if not 0 < self.beta < 1:  # at either end the mixture is one of the two sides, and the divergence is 0
            raise DataError(
                "beta is out of bounds",
                found=f"--beta {self.beta:g}",
                expected="between 0 and 1",
                try_="--loss kl or reverse-kl for the limits",
            )
        for name in ("weight_decay", "max_grad_norm", "warmup", "save_every", "seed"):
            if not getattr(self, name) >= 0:
                raise DataError(f"{name.replace('_', ' ')} must not be negative", found=getattr(self, name))
        for name in ("lr", "epochs", "temperature"):
            if not getattr(self, name) > 0:
                raise DataError(f"{name} must be positive", found=getattr(self, name))

    def identity(self) -> dict[str, Any]:
        """What must be equal for a checkpoint to be continued: everything but where and how often to write."""
        ignored = ("out", "cache", "cache_bytes", "save_every", "log_every", "report_to", "device")
        return {k: v for k, v in asdict(self).items() if k not in ignored}


def _check_types(config: TrainConfig) -> None:
    """Raise DataError for a value that is not of its field's type; a whole number will do where a fraction is wanted."""
    for name, expected in get_type_hints(TrainConfig).items():
        value, kinds = getattr(config, name), get_args(expected) or (expected,)
        fits = isinstance(value, kinds) or (isinstance(value, int) and float in kinds)
        if not fits or (isinstance(value, bool) and bool not in kinds):
            raise DataError(
                "a setting has the wrong type",
                found=f"{name} {value!r}",
                expected=" or ".join("none" if k is type(None) else k.__name__ for k in kinds),
            )


def config_from(values: Mapping[str, Any], file: Path | None = None) -> TrainConfig:
    """Settings from a YAML or JSON file, overridden by `values` that are not None. Unknown keys are refused."""
    settings: dict[str, Any] = {}
    if file is not None:
        import yaml

        try:
            loaded = yaml.safe_load(file.read_text(encoding="utf-8"))
        except (OSError, yaml.YAMLError) as error:
            raise DataError("cannot read the configuration file", where=file, found=error) from error
        if not isinstance(loaded, dict):
            raise DataError("the configuration file is not a mapping", where=file, found=type(loaded).__name__)
        settings = {str(key).replace("-", "_"): value for key, value in loaded.items()}
    settings |= {key: value for key, value in values.items() if value is not None}
    known = {f.name: f for f in fields(TrainConfig)}
    for key in settings:
        if key not in known:
            raise unknown_name("setting", key, known, where=file)
    missing = [name for name in ("cache", "student", "out") if name not in settings]
    if missing:
        raise DataError("settings are missing", where=file, expected=", ".join(f"--{m}" for m in missing))
    for name, expected in get_type_hints(TrainConfig).items():
        if isinstance(settings.get(name), str) and float in (get_args(expected) or (expected,)):
            with suppress(ValueError):  # to YAML 1.1, 5e-4 is text: it wants 5.0e-4
                settings[name] = float(settings[name])
    return TrainConfig(**settings)
